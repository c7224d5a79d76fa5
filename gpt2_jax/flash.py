"""Causal attention as one Pallas kernel for TPU: scores never leave the core.

The keys of one head of GPT-2, 1024 positions, fit in a core's vector memory whole. So
a block of queries has its softmax at once, over its prefix only, with no running
maximum, and the backward pass is one kernel, not two. Everything is computed
transposed, positions along the lanes: XLA writes the projection that way without a
copy, head width 64 wastes no lane, and sums over keys go down sublanes.

Axes: B batch, T position, N heads, H head width, S key positions, Q queries of a block.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

BLOCK = 256  # queries at once: of 128, 256 and 512 the fewest bundles on v3 and v5e
LANES = 128
LONGEST = 1024  # positions, GPT-2's own; at 2048 a v3 runs out of vector memory
MASKED = jnp.finfo(jnp.float32).min  # finite, so that a difference is no NaN
SAVED = "attention"  # name of what the backward pass needs, for remat policies


def flash_attention(
    qkv: Float[Array, "B T 3 N H"],
    *,
    scale: float,
    operands: Any,
    interpret: bool = False,
) -> Float[Array, "B T N H"]:
    """Return softmax(scale q k^T, causal) v, with the softmax in float32.

    `operands` is the dtype that the matrix unit is given: float32 for a TPU v2 or v3,
    whose compiler refuses bfloat16 there. `interpret` runs the kernel on any device.
    T is at most `LONGEST`.
    """
    length = qkv.shape[1]
    block = min(BLOCK, -(-length // LANES) * LANES)
    # Rows of padding see the real keys and are cut off; no real row sees them.
    padding = [(0, 0), (0, -length % block), (0, 0), (0, 0), (0, 0)]
    lanes = jnp.moveaxis(jnp.pad(qkv, padding), 1, -1)
    out: Any = _attention(scale, block, jnp.dtype(operands), interpret, lanes)
    return jnp.moveaxis(out, -1, 1)[:, :length]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _attention(scale, block, operands, interpret, qkv):
    return _forward(scale, block, operands, interpret, qkv)[0]


def _forward(scale, block, operands, interpret, qkv):
    batch, _, heads, width, length = qkv.shape
    one, row = _head(width, length), _head(1, length)
    out, norm = pl.pallas_call(
        functools.partial(_forward_kernel, scale, block, operands),
        grid=(batch, heads),
        in_specs=_parts(width, length),
        out_specs=[one, row],
        out_shape=[
            jax.ShapeDtypeStruct((batch, heads, width, length), qkv.dtype),
            jax.ShapeDtypeStruct((batch, heads, 1, length), jnp.float32),
        ],
        name="flash_forward",
        **_how(interpret),
    )(qkv, qkv, qkv)
    out, norm = checkpoint_name(out, SAVED), checkpoint_name(norm, SAVED)
    return out, (qkv, out, norm)


def _backward(scale, block, operands, interpret, residuals, d_out):
    qkv, out, norm = residuals
    batch, _, heads, width, length = qkv.shape
    one, row = _head(width, length), _head(1, length)
    d_qkv = pl.pallas_call(
        functools.partial(_backward_kernel, scale, block, operands),
        grid=(batch, heads),
        in_specs=[*_parts(width, length), one, row, one],
        out_specs=pl.BlockSpec(
            (None, 3, None, width, length), lambda b, n: (b, 0, n, 0, 0)
        ),
        out_shape=jax.ShapeDtypeStruct(qkv.shape, qkv.dtype),
        scratch_shapes=[pltpu.VMEM((width, length), jnp.float32)] * 2,
        name="flash_backward",
        **_how(interpret),
    )(qkv, qkv, qkv, out, norm, d_out)
    return (d_qkv,)


_attention.defvjp(_forward, _backward)


def _parts(width, length):
    """Return the blocks of one head's q, k and v."""
    shape = (None, None, None, width, length)
    return [
        pl.BlockSpec(shape, lambda b, n, part=part: (b, part, n, 0, 0))
        for part in range(3)
    ]


def _head(rows, length):
    return pl.BlockSpec((None, None, rows, length), lambda b, n: (b, n, 0, 0))


def _how(interpret) -> dict[str, Any]:
    independent = pltpu.CompilerParams(dimension_semantics=("parallel", "parallel"))
    return dict(compiler_params=independent, interpret=interpret)


def _forward_kernel(scale, block, operands, q_ref, k_ref, v_ref, out_ref, norm_ref):
    """Write one head's (H, T) output and the (1, T) logarithms of its norms."""
    k, v = k_ref[...].astype(operands), v_ref[...].astype(operands)
    for start in range(0, k.shape[1], block):
        end = start + block
        q = _scaled(q_ref[:, start:end], scale, operands)
        scores = _scores(q, k[:, :end])
        top = jnp.max(scores, axis=0, keepdims=True)
        exponents = jnp.exp(scores - top)
        norm = jnp.sum(exponents, axis=0, keepdims=True)
        mixed = _dot(v[:, :end], exponents.astype(operands), 1, 0) / norm
        out_ref[:, start:end] = mixed.astype(out_ref.dtype)
        norm_ref[:, start:end] = top + jnp.log(norm)


def _backward_kernel(
    scale, block, operands,
    q_ref, k_ref, v_ref, out_ref, norm_ref, d_out_ref, d_qkv_ref, d_k_ref, d_v_ref,
):  # fmt: skip
    """Write one head's (3, H, T) gradient; `d_k_ref` and `d_v_ref` are float32 sums."""
    k, v = k_ref[...].astype(operands), v_ref[...].astype(operands)
    d_k_ref[...] = jnp.zeros_like(d_k_ref)
    d_v_ref[...] = jnp.zeros_like(d_v_ref)
    for start in range(0, k.shape[1], block):
        end = start + block
        q = _scaled(q_ref[:, start:end], scale, operands)
        d_out = d_out_ref[:, start:end].astype(jnp.float32)
        out = out_ref[:, start:end].astype(jnp.float32)
        mean = jnp.sum(d_out * out, axis=0, keepdims=True)
        d_out = d_out.astype(operands)
        weights = jnp.exp(_scores(q, k[:, :end]) - norm_ref[:, start:end])
        d_weights = _dot(v[:, :end], d_out, 0, 0)
        d_scores = (weights * (d_weights - mean)).astype(operands)
        d_q = _dot(k[:, :end], d_scores, 1, 0) * scale
        d_qkv_ref[0, :, start:end] = d_q.astype(d_qkv_ref.dtype)
        d_k_ref[:, :end] += _dot(q, d_scores, 1, 1)
        d_v_ref[:, :end] += _dot(d_out, weights.astype(operands), 1, 1)
    d_qkv_ref[1] = d_k_ref[...].astype(d_qkv_ref.dtype)
    d_qkv_ref[2] = d_v_ref[...].astype(d_qkv_ref.dtype)


def _scaled(q, scale, operands):
    return (q.astype(jnp.float32) * scale).astype(operands)


def _scores(q, k):
    """Return (S, Q) scores of the last Q of S positions, those of later keys masked."""
    scores = _dot(k, q, 0, 0)
    queries = q.shape[1]
    before = scores.shape[0] - queries
    square = (queries, queries)
    key, query = (jax.lax.broadcasted_iota(jnp.int32, square, i) for i in (0, 1))
    diagonal = jnp.where(key <= query, scores[before:], MASKED)
    return jnp.concatenate([scores[:before], diagonal]) if before else diagonal


def _dot(a, b, a_axis, b_axis):
    contracted = ((a_axis,), (b_axis,)), ((), ())
    return jax.lax.dot_general(a, b, contracted, preferred_element_type=jnp.float32)
