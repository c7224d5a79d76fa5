"""The one door to attention kernels: causal multi-head attention, with a cache or not.

Axes: B batch, T query position, S key position, N heads, H head width.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key

from gpt2_jax.config import check

QUERY_BLOCK = 256  # rows; 124M at T=1024 on CPU: 5.99 -> 4.82 s a step
MASKED = jnp.finfo(jnp.float32).min  # finite: a row masked whole is no NaN


def choose_attention(name: str, platform: str, dtype: str, head_width: int) -> str:
    """Return the kernel: `auto` is cuDNN where a GPU can, XLA's elsewhere.

    Raises
    ------
    ConfigError
        If cuDNN is named and cannot be had.
    """
    # jax/_src/cudnn/fused_attention_stablehlo.py, check_is_flash_attention
    fits = dtype == "bfloat16" and head_width % 8 == 0 and head_width <= 128
    can = platform == "gpu" and fits
    allowed = "auto or xla; cudnn needs a GPU, bfloat16 and a head width of 8 to 128"
    check(can or name != "cudnn", "model.attention", name, allowed)
    if name == "auto":
        return "cudnn" if can else "xla"
    return name


def causal_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T N H"],
    v: Float[Array, "B T N H"],
    *,
    scale: float | Float[Array, ""],
    kernel: str = "xla",
    upcast: bool = False,
    dropout: float = 0.0,
    key: Key[Array, ""] | None = None,
) -> Float[Array, "B T N H"]:
    """Return softmax(scale q k^T, causal) v, with the softmax in float32.

    `upcast` forms the scores in float32 as well. Without `key` nothing is dropped.
    cuDNN takes neither `upcast`, dropout nor a traced scale: XLA serves those.
    """
    key = key if dropout > 0 else None
    plain = not upcast and key is None
    if kernel == "cudnn" and plain and isinstance(scale, float):
        return jax.nn.dot_product_attention(
            q, k, v, scale=scale, is_causal=True, implementation="cudnn"
        )
    length = q.shape[1]
    blocks = range(0, length, QUERY_BLOCK)
    none = [None] * len(blocks)
    keys = none if key is None else list(jax.random.split(key, len(blocks)))
    out = []
    for start, block_key in zip(blocks, keys, strict=True):
        # A block of queries sees only its prefix: half the work of the full square.
        end = min(start + QUERY_BLOCK, length)
        seen = jnp.tril(jnp.ones((end - start, end), bool), start)[None, None]
        rows = attend(
            q[:, start:end], k[:, :end], v[:, :end], seen,
            scale=scale, upcast=upcast, dropout=dropout, key=block_key,
        )  # fmt: skip
        out.append(rows)
    return out[0] if len(out) == 1 else jnp.concatenate(out, axis=1)


def attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S N H"],
    v: Float[Array, "B S N H"],
    seen: Bool[Array, "#B 1 T S"],
    *,
    scale: float | Float[Array, ""],
    upcast: bool = False,
    dropout: float = 0.0,
    key: Key[Array, ""] | None = None,
) -> Float[Array, "B T N H"]:
    """Return attention of every query over the keys it has `seen`.

    Weights are those of `attention_weights`, cast to `v`'s dtype.
    """
    weights = attention_weights(q, k, seen, scale=scale, upcast=upcast)
    return jnp.einsum("bnts,bsnh->btnh", drop(weights.astype(v.dtype), dropout, key), v)


def attention_weights(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S N H"],
    seen: Bool[Array, "#B 1 T S"],
    *,
    scale: float | Float[Array, ""],
    upcast: bool = False,
) -> Float[Array, "B N T S"]:
    """Return the float32 share of each key in each query's attention; rows sum to 1.

    Scores are formed in the operands' dtype (float32 with `upcast`), then scaled,
    masked and normalized in float32.
    """
    if upcast:
        q, k = q.astype(jnp.float32), k.astype(jnp.float32)
    scores = jnp.einsum("btnh,bsnh->bnts", q, k).astype(jnp.float32) * scale
    return jax.nn.softmax(jnp.where(seen, scores, MASKED), axis=-1)


def drop(
    x: Float[Array, "..."], rate: float, key: Key[Array, ""] | None
) -> Float[Array, "..."]:
    """Return `x` with a share `rate` of it zeroed, the rest scaled up to match.

    Without a key, or at rate 0, `x` itself.
    """
    if key is None or rate == 0.0:
        return x
    kept = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(kept, x / (1.0 - rate), jnp.zeros_like(x))
