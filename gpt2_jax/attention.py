"""The one door to attention kernels: causal multi-head attention, with a cache or not.

Axes: B batch, T query position, S key position, N heads, H head width.
"""

import functools
import warnings
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Key

from gpt2_jax.config import check
from gpt2_jax.flash import LONGEST, SAVED, flash_attention
from gpt2_jax.layers import product
from gpt2_jax.sharding import BATCH

QUERY_BLOCK = 256  # rows; 124M at T=1024 on CPU: 5.99 -> 4.82 s a step
MASKED = jnp.finfo(jnp.float32).min  # finite: a row masked whole is no NaN
FLOAT32_ONLY = ("TPU v2", "TPU v3")  # Mosaic refuses bfloat16 operands there (E2001)


def choose_attention(
    name: str, device: Any, dtype: str, *, length: int, heads: int, head_width: int
) -> str:
    """Return the kernel that `device` runs: `auto`, or one that fails, is replaced.

    `auto` is cuDNN where a GPU can, Pallas's on TPU v4 and later, XLA's elsewhere. A
    kernel that does not compile for the device gives way to XLA's, with one warning.

    Raises
    ------
    ConfigError
        If a kernel is named that is of another kind of device.
    """
    # jax/_src/cudnn/fused_attention_stablehlo.py, check_is_flash_attention
    fits = dtype == "bfloat16" and head_width % 8 == 0 and head_width <= 128
    can = device.platform == "gpu" and fits
    allowed = "auto or xla; cudnn needs a GPU, bfloat16 and a head width of 8 to 128"
    check(can or name != "cudnn", "model.attention", name, allowed)
    allowed = "auto, xla or cudnn; flash is a kernel for TPU, interpreted on CPU"
    refused = name == "flash" and device.platform == "gpu"
    check(not refused, "model.attention", name, allowed)
    if name == "auto":
        late = device.platform == "tpu" and not _float32_only(device)
        name = "cudnn" if can else "flash" if late else "xla"
    if name == "xla" or device.platform == "cpu":
        return name
    return name if _compiles(name, device, dtype, length, heads, head_width) else "xla"


@functools.cache
def _compiles(kernel, device, dtype, length, heads, head_width):
    """Try values and gradients of one row; warn if they do not compile."""
    mesh = Mesh([[[device]]], (*BATCH, "tensor"))
    where = jax.NamedSharding(mesh, P())
    shape = 1, length, 3, heads, head_width
    qkv = jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=where)

    def total(qkv: Array) -> Array:
        out = causal_attention(qkv, scale=1.0, kernel=kernel, mesh=mesh)
        return jnp.sum(out.astype(jnp.float32))

    try:
        jax.jit(jax.value_and_grad(total)).lower(qkv).compile()
    except Exception as error:  # noqa: BLE001 compilers raise what they like
        reason = str(error).partition("\n")[0]
        warnings.warn(
            f"attention {kernel!r} does not compile for {device.device_kind}, XLA's "
            f"is used: {type(error).__name__}: {reason}",
            stacklevel=2,
        )
        return False
    return True


def _float32_only(device):
    return device.device_kind.startswith(FLOAT32_ONLY)


def causal_attention(
    qkv: Float[Array, "B T 3 N H"],
    *,
    scale: float | Float[Array, ""],
    kernel: str = "xla",
    upcast: bool = False,
    dropout: float = 0.0,
    key: Key[Array, ""] | None = None,
    mesh: Mesh | None = None,
) -> Float[Array, "B T N H"]:
    """Return softmax(scale q k^T, causal) v, with the softmax in float32.

    `upcast` forms the scores in float32 as well. Without `key` nothing is dropped.
    cuDNN and flash take neither `upcast`, dropout nor a traced scale: XLA serves
    those, and rows too long for flash. `mesh` is what `qkv` is spread over, batch and
    heads: flash computes by it, XLA keeps rows and heads apart for it.
    """
    key = key if dropout > 0 else None
    if kernel != "xla" and not upcast and key is None and isinstance(scale, float):
        if kernel == "cudnn":
            return jax.nn.dot_product_attention(
                *jnp.unstack(qkv, axis=2),
                scale=scale,
                is_causal=True,
                implementation="cudnn",
            )
        if qkv.shape[1] <= LONGEST:
            return _flash(qkv, scale, mesh)
    batch, length, _, heads, width = qkv.shape
    # XLA:CPU multiplies one axis of heads fastest; a mesh parts rows and heads.
    apart = by_head if mesh is None or mesh.size == 1 else _by_row_and_head
    q, k, v = map(apart, jnp.unstack(qkv, axis=2))
    kept: list[Array | None] = [None for _ in _blocks(length)]
    if key is not None:
        keys = jax.random.split(key, len(kept))
        shapes = [
            (*q.shape[:-2], stop - start, stop) for start, stop in _blocks(length)
        ]
        draw = functools.partial(jax.random.bernoulli, p=1.0 - dropout)
        kept = [draw(one, shape=s) for one, s in zip(keys, shapes, strict=True)]
    out: Array = _attend(q, k, v, jnp.float32(scale), kept, dropout, upcast)
    return jnp.swapaxes(out.reshape(batch, heads, length, width), 1, 2)


def _flash(qkv, scale, mesh):
    """Return the Pallas kernel's attention; each device computes its own heads."""
    device = jax.local_devices()[0] if mesh is None else mesh.devices.flat[0]
    run = functools.partial(
        flash_attention,
        scale=scale,
        operands=jnp.float32 if _float32_only(device) else qkv.dtype,
        interpret=device.platform != "tpu",
    )
    if mesh is None or mesh.size == 1:
        return run(qkv)
    heads = None if qkv.shape[3] % mesh.shape["tensor"] else "tensor"
    given, made = P(BATCH, None, None, heads), P(BATCH, None, heads)
    how: dict[str, Any] = dict(mesh=mesh, in_specs=given, out_specs=made)
    return jax.shard_map(run, check_vma=False, **how)(qkv)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _attend(
    q: Float[Array, "*heads T H"],
    k: Float[Array, "*heads T H"],
    v: Float[Array, "*heads T H"],
    scale: Float[Array, ""],
    kept: list[Array | None],
    dropout: float,
    upcast: bool,
) -> Float[Array, "*heads T H"]:
    """Return causal attention, a block of queries at a time, each over its prefix.

    That is half the work of the full square. The backward pass forms the weights again
    from the rows' greatest scores and totals, and transposes operands that are H wide.
    Differentiated by JAX, XLA:CPU keeps the weights and transposes them in memory (124M
    at T=1024 on a Xeon with AVX-512: 107 -> 51 ms a layer).
    """
    return _attend_forward(q, k, v, scale, kept, dropout, upcast)[0]


def _attend_forward(q, k, v, scale, kept, dropout, upcast):
    out, norms = [], []
    for (start, stop), mask in zip(_blocks(q.shape[-2]), kept, strict=True):
        scores = _scores(q, k, start, stop, scale, upcast)[1]
        greatest = jnp.max(scores, axis=-1, keepdims=True)
        shares = jnp.exp(scores - greatest)
        total = jnp.sum(shares, axis=-1, keepdims=True)
        weights = _keep((shares / total).astype(v.dtype), mask, dropout)
        out.append(_product(weights, v[..., :stop, :], -1, -2))
        norms.append((greatest, total))
    out, norms = checkpoint_name((jnp.concatenate(out, axis=-2), norms), SAVED)
    return out, (q, k, v, scale, kept, norms)


def _attend_backward(dropout, upcast, saved, d_out):
    q, k, v, scale, kept, norms = saved
    d_q, d_k, d_v, d_scale = [], *jnp.zeros((2, *k.shape), jnp.float32), 0.0
    blocks = zip(_blocks(q.shape[-2]), kept, norms, strict=True)
    for (start, stop), mask, (greatest, total) in blocks:
        raw, scores = _scores(q, k, start, stop, scale, upcast)
        weights = jnp.exp(scores - greatest) / total
        d_rows = d_out[..., start:stop, :]
        used = _keep(weights.astype(v.dtype), mask, dropout)
        d_v += _grow(_product(d_rows, used, -2, -2), v)
        d_weights = _keep(_product(d_rows, v[..., :stop, :], -1, -1), mask, dropout)
        d_weights = d_weights.astype(jnp.float32)
        mean = jnp.sum(weights * d_weights, axis=-1, keepdims=True)
        d_scores = weights * (d_weights - mean)
        d_scale += jnp.sum(d_scores * raw)
        d_raw = (d_scores * scale).astype(raw.dtype)
        d_q.append(_product(d_raw, k[..., :stop, :].astype(raw.dtype), -1, -2))
        d_k += _grow(
            _product(q[..., start:stop, :].astype(raw.dtype), d_raw, -2, -2), k
        )
    d_q = jnp.concatenate(d_q, axis=-2)
    grads = (d.astype(x.dtype) for d, x in ((d_q, q), (d_k, k), (d_v, v)))
    return *grads, d_scale, [None for _ in kept]


_attend.defvjp(_attend_forward, _attend_backward)


def _blocks(length):
    starts = range(0, length, QUERY_BLOCK)
    return [(start, min(start + QUERY_BLOCK, length)) for start in starts]


def _scores(q, k, start, stop, scale, upcast):
    """Return what a block of queries scores its prefix: as formed, and as masked."""
    wide = jnp.float32 if upcast else q.dtype
    rows, prefix = q[..., start:stop, :].astype(wide), k[..., :stop, :].astype(wide)
    raw = _product(rows, prefix, -1, -1)
    seen = jnp.tril(jnp.ones(raw.shape[-2:], bool), start)
    return raw, jnp.where(seen, raw.astype(jnp.float32) * scale, MASKED)


def _product(left, right, axis, other):
    """Return the product of two batches of matrices over one axis of each."""
    over = [left.ndim + axis], [right.ndim + other]
    return product(left, right, *over, batch=left.ndim - 2)


def _grow(d_prefix, whole):
    """Return (.., H, S), the gradient of a prefix, as that of `whole`, (.., T, H)."""
    missing = whole.shape[-2] - d_prefix.shape[-1]
    edges = [(0, 0)] * whole.ndim
    edges[-2] = 0, missing
    return jnp.pad(jnp.swapaxes(d_prefix, -1, -2), edges)


def attend_by_head(
    q: Float[Array, "B T N H"],
    k: Float[Array, "BN S H"],
    v: Float[Array, "BN S H"],
    seen: Bool[Array, "B T S"],
    *,
    scale: float | Float[Array, ""],
    upcast: bool = False,
) -> Float[Array, "B T N H"]:
    """Return attention of every query over the slots it has `seen`.

    Keys and values are held `by_head`: from (B, S, N, H) XLA:CPU copies the cache.
    """
    batch, length, heads, width = q.shape
    q = by_head(q)
    if upcast:
        q, k = q.astype(jnp.float32), k.astype(jnp.float32)
    scores = jnp.einsum("xth,xsh->xts", q, k).reshape(batch, heads, length, -1)
    weights = _shares(scores, seen[:, None], scale).astype(v.dtype)
    weights = weights.reshape(batch * heads, length, -1)
    mixed = jnp.einsum("xts,xsh->xth", weights, v)
    return jnp.swapaxes(mixed.reshape(batch, heads, length, width), 1, 2)


def by_head(x: Float[Array, "B T N H"]) -> Float[Array, "BN T H"]:
    """Return every head of every row as a row of its own."""
    batch, length, heads, width = x.shape
    return _by_row_and_head(x).reshape(batch * heads, length, width)


def _by_row_and_head(x):
    return jnp.swapaxes(x, 1, 2)


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
    return _shares(jnp.einsum("btnh,bsnh->bnts", q, k), seen, scale)


def _shares(scores, seen, scale):
    """Return scores scaled, masked and normalized, in float32."""
    scores = scores.astype(jnp.float32) * scale
    return jax.nn.softmax(jnp.where(seen, scores, MASKED), axis=-1)


def drop(
    x: Float[Array, "..."], rate: float, key: Key[Array, ""] | None
) -> Float[Array, "..."]:
    """Return `x` with a share `rate` of it zeroed, the rest scaled up to match.

    Without a key, or at rate 0, `x` itself.
    """
    if key is None or rate == 0.0:
        return x
    return _keep(x, jax.random.bernoulli(key, 1.0 - rate, x.shape), rate)


def _keep(x, kept, rate):
    return x if kept is None else jnp.where(kept, x / (1.0 - rate), jnp.zeros_like(x))
