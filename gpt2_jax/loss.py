"""Cross-entropy of the next token, from hidden states, in chunks of positions.

The logits of a batch, (B, T, V) in float32, are the largest array of a GPT-2 step
(124M, 8 x 1024: 1.6 GB). Here only `chunk` positions of them exist at once, and the
forward pass of a differentiated loss already forms the gradients, so that the
backward pass computes nothing again.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gpt2_jax.config import check
from gpt2_jax.layers import product

IGNORED = -1  # a target that counts for nothing
# Of one chunk, when the chunk is chosen here. Every chunk reads and writes the gradient
# of the head once more: 124M on a v3-8, 8 x 1024 a core at once, by libtpu's estimate
# 1.39 s a step with 64 MiB, 1.26 s with 512.
LOGITS_BYTES = 2**26
LOGITS_BYTES_ACCELERATOR = 2**29


def choose_chunk(
    batch: int, length: int, n_vocab: int, logits_bytes: int | None = None
) -> int:
    """Return the most positions (a divisor of `length`) whose logits fit.

    In `LOGITS_BYTES`, or as many as are given.
    """
    limit = LOGITS_BYTES if logits_bytes is None else logits_bytes
    fits = [
        c
        for c in range(1, length + 1)
        if length % c == 0 and batch * c * n_vocab * 4 <= limit
    ]
    return max(fits, default=1)


def chunked_loss(
    hidden: Float[Array, "B T D"],
    head: Float[Array, "V D"],
    targets: Int[Array, "B T"],
    *,
    n_vocab: int,
    chunk: int = 0,
    parts: int = 1,
    logits_bytes: int | None = None,
) -> tuple[Float[Array, ""], Int[Array, ""]]:
    """Return the summed cross-entropy in nats, float32, and how many tokens it sums.

    Rows of `head` from `n_vocab` on are padding: their probability is 0 and they get
    no gradient. Targets of -1 count for nothing. Peak memory is B * chunk * V * 4
    bytes; chunk 0 is chosen so that this is at most `logits_bytes` (64 MiB) on each of
    the `parts` that the batch is spread over.

    Raises
    ------
    ValueError
        If `chunk` does not divide T.
    """
    batch, length = targets.shape
    each = max(batch // parts, 1)
    chunk = chunk or choose_chunk(each, length, head.shape[0], logits_bytes)
    check(length % chunk == 0, "chunk", chunk, f"a divisor of T = {length}")
    counted = jnp.sum(targets != IGNORED, dtype=jnp.int32)
    return _summed(n_vocab, chunk, hidden, head, targets), counted


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _summed(n_vocab, chunk, hidden, head, targets):
    def add(total, part):
        nll, _ = _nll(n_vocab, part[0], head, part[1])
        return total + nll, None

    zero = jnp.zeros((), jnp.float32)
    return jax.lax.scan(add, zero, _chunks(chunk, hidden, targets))[0]


def _summed_forward(n_vocab, chunk, hidden, head, targets):
    def add(carry, part):
        total, d_head = carry
        x, wanted = part
        nll, probabilities = _nll(n_vocab, x, head, wanted)
        columns = jnp.arange(head.shape[0], dtype=wanted.dtype)[None, None]
        hit = columns == wanted[..., None]
        counts = (wanted != IGNORED)[..., None]
        d_logits = jnp.where(counts, probabilities - hit, 0.0).astype(x.dtype)
        d_x = product(d_logits, head, [2], [0])
        d_head += product(d_logits, x, [0, 1], [0, 1], dtype=jnp.float32)
        return (total + nll, d_head), d_x

    zeros = jnp.zeros((), jnp.float32), jnp.zeros(head.shape, jnp.float32)
    parts = _chunks(chunk, hidden, targets)
    (total, d_head), d_hidden = jax.lax.scan(add, zeros, parts)
    d_hidden = jnp.moveaxis(d_hidden, 0, 1).reshape(hidden.shape)
    return total, (d_hidden, d_head.astype(head.dtype))


def _summed_backward(n_vocab, chunk, residuals, cotangent):
    d_hidden, d_head = residuals
    scale = cotangent.astype(jnp.float32)
    scaled = [(d * scale).astype(d.dtype) for d in (d_hidden, d_head)]
    return *scaled, None


_summed.defvjp(_summed_forward, _summed_backward)


def token_log_probs(
    hidden: Float[Array, "B T D"],
    head: Float[Array, "V D"],
    targets: Int[Array, "B T"],
    *,
    n_vocab: int,
) -> Float[Array, "B T"]:
    """Return the log-probability of every target in nats, float32; 0 where it is -1.

    As `chunked_loss`, it holds the logits of some positions only.
    """
    batch, length = targets.shape
    chunk = choose_chunk(batch, length, head.shape[0])

    def score(part):
        return -_token_nll(n_vocab, part[0], head, part[1])[0]

    found = jax.lax.map(score, _chunks(chunk, hidden, targets))
    return jnp.moveaxis(found, 0, 1).reshape(targets.shape)


def _chunks(chunk, hidden, targets):
    batch, length = targets.shape
    x = hidden.reshape(batch, length // chunk, chunk, -1)
    wanted = targets.reshape(batch, length // chunk, chunk)
    return jnp.moveaxis(x, 1, 0), jnp.moveaxis(wanted, 1, 0)


def _nll(n_vocab, x, head, wanted):
    """Return the summed loss of one chunk and its probabilities, in float32."""
    nll, probabilities = _token_nll(n_vocab, x, head, wanted)
    return jnp.sum(nll), probabilities


def _token_nll(n_vocab, x, head, wanted):
    logits = jnp.einsum("btd,vd->btv", x, head, preferred_element_type=jnp.float32)
    logits = mask_padding(logits, n_vocab)
    top = jnp.max(logits, axis=-1, keepdims=True)
    exponents = jnp.exp(logits - top)
    norm = jnp.sum(exponents, axis=-1, keepdims=True)
    row = jnp.maximum(wanted, 0)[..., None]
    at = jnp.take_along_axis(logits, row, axis=-1)
    nll = jnp.where(wanted[..., None] != IGNORED, jnp.log(norm) + top - at, 0.0)
    return nll[..., 0], exponents / norm


def mask_padding(logits: Float[Array, "... V"], n_vocab: int) -> Float[Array, "... V"]:
    """Return the logits with those of padded rows at the dtype's lowest value."""
    width = logits.shape[-1]
    if width == n_vocab:
        return logits
    real = jnp.arange(width) < n_vocab
    real = real.reshape((1,) * (logits.ndim - 1) + (width,))
    return jnp.where(real, logits, jnp.finfo(logits.dtype).min)
