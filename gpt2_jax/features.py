"""What a model makes of token sequences: logits, hidden states, attention, scores.

Rows of different lengths are padded on the right, where a causal model does not look;
T is then rounded up to a bucket, so that compiles are few, and cut back: by numpy,
since a cut by jax is one more program for each length.

Axes: B batch, T position, D width, N heads, L layer, V vocabulary, K = L + 1.
"""

import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Int32, Integer

from gpt2_jax import model
from gpt2_jax.config import ConfigError, ModelConfig, check
from gpt2_jax.decode import bucket, check_tokens
from gpt2_jax.loss import IGNORED, token_log_probs

Pool = Literal["mean", "last"]
AT_ONCE = 64  # positions whose next tokens are held at once
NOT_FINITE = "what the model computes is not finite; check its weights"


class Batch(NamedTuple):
    """Token sequences in one array, padded on the right with 0."""

    ids: Int32[np.ndarray, "B T"]
    mask: Bool[np.ndarray, "B T"]  # True where a token is


class Score(NamedTuple):
    """How likely a model finds one text."""

    token_ids: Integer[np.ndarray, " n"]  # those that are scored
    log_probs: Float[np.ndarray, " n"]  # of each after all before it, in nats
    total: float  # their sum
    perplexity: float  # exp(-total / n) per token; NaN when n is 0


def pad(
    config: ModelConfig,
    rows: Sequence[Integer[np.ndarray, " _"]],
    *,
    truncate: Literal["left"] | None = None,
) -> Batch:
    """Return the rows as one batch; `truncate` forgets the start of what is too long.

    Raises
    ------
    ConfigError
        If a row is empty, holds an id outside the vocabulary or exceeds the context;
        the message says by how much.
    """
    check(truncate in (None, "left"), "truncate", truncate, "None or 'left'")
    for row in rows:
        check_tokens(config, row)
    if truncate == "left":
        rows = [row[-config.n_ctx :] for row in rows]
    longest = max(map(len, rows), default=0)
    if longest > config.n_ctx:
        raise ConfigError(
            f"text of {longest} tokens exceeds the context of {config.n_ctx} by "
            f"{longest - config.n_ctx}; shorten it or say truncate left"
        )
    ids = np.zeros((len(rows), longest), np.int32)
    mask = np.zeros(ids.shape, bool)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = row
        mask[i, : len(row)] = True
    return Batch(ids, mask)


def logits(
    config: ModelConfig, params: model.Params, ids: Int32[np.ndarray, "B T"]
) -> Float[Array, "B T V"]:
    """Return float32 next-token logits without padding, V = `config.n_vocab`."""
    wide = _widen(config, ids)
    return _logits(config, params, wide)[:, : ids.shape[1], : config.n_vocab]


def features(
    config: ModelConfig,
    params: model.Params,
    batch: Batch,
    *,
    layer: int = -1,
    pool: Pool | None = None,
) -> Float[np.ndarray, "B *T D"]:
    """Return float32 hidden states of one layer: (B, T, D), or pooled (B, D).

    `layer` counts as in `hidden_states`: 0 the embeddings, -1 or L the last, normed.
    Padded positions are 0 and no part of a mean; "last" is each row's last token.

    Raises
    ------
    ConfigError
        If there is no such layer or pool.
    FloatingPointError
        If a hidden state is not finite.
    """
    count = config.n_layer + 1
    whole = isinstance(layer, int | np.integer) and not isinstance(layer, bool)
    good = whole and -count <= layer < count
    allowed = f"-{count} <= layer <= {config.n_layer}"
    check(good, "layer", layer, allowed)
    check(pool in (None, "mean", "last"), "pool", pool, "None, 'mean' or 'last'")
    if not len(batch.ids):
        shape = (0, config.n_embd) if pool else (0, 0, config.n_embd)
        return np.zeros(shape, np.float32)
    wide = _widen(config, batch.ids)
    layer %= count
    if layer == config.n_layer:
        values = _last(config, params, wide)
    else:
        values = _after(config, params, wide, jnp.int32(layer))
    if pool is not None:
        return _finite(_pool(values, batch.mask.sum(axis=1), pool))
    values = _finite(values)[:, : batch.ids.shape[1]]
    return np.where(batch.mask[..., None], values, np.float32(0))


def hidden_states(
    config: ModelConfig, params: model.Params, batch: Batch
) -> Float[np.ndarray, "K B T D"]:
    """Return the float32 hidden states of all K = L + 1 layers, 0 where padded."""
    wide = _widen(config, batch.ids)
    states = _finite(_by_layer(config, params, wide))[:, :, : batch.ids.shape[1]]
    return np.where(batch.mask[None, :, :, None], states, np.float32(0))


def attentions(
    config: ModelConfig, params: model.Params, batch: Batch
) -> Float[np.ndarray, "L B N T T"]:
    """Return every head's float32 attention weights, 0 where query or key is padded.

    The last two axes are the query's position and the key's.
    """
    length = batch.ids.shape[1]
    wide = _widen(config, batch.ids)
    maps = _finite(_attentions(config, params, wide))[..., :length, :length]
    real = batch.mask[:, :, None] & batch.mask[:, None, :]
    return np.where(real[None, :, None], maps, np.float32(0))


def scores(config: ModelConfig, params: model.Params, batch: Batch) -> list[Score]:
    """Return the score of each row: every token but the first, after those before.

    Raises
    ------
    FloatingPointError
        If a log-probability is not finite.
    """
    if not len(batch.ids):
        return []
    targets = np.where(batch.mask[:, 1:], batch.ids[:, 1:], IGNORED)
    targets = np.pad(targets, ((0, 0), (0, 1)), constant_values=IGNORED)
    targets = _widen(config, targets, IGNORED)
    found = _finite(_log_probs(config, params, _widen(config, batch.ids), targets))
    lengths = batch.mask.sum(axis=1)
    rows = zip(batch.ids, found, lengths, strict=True)
    return [_score(ids[1:n], values[: n - 1]) for ids, values, n in rows]


def next_log_probs(
    config: ModelConfig, params: model.Params, ids: Integer[np.ndarray, " T"]
) -> Iterator[Float[np.ndarray, " V"]]:
    """Give the log-probabilities of all tokens after each of `ids`, in nats.

    V = `config.n_vocab`; few positions are held at once.
    """
    batch = pad(config, [ids])
    hidden = _last(config, params, _widen(config, batch.ids))[0]
    for start in range(0, len(ids), AT_ONCE):
        part = jax.lax.dynamic_slice_in_dim(hidden, start, min(AT_ONCE, len(hidden)))
        start, first = min(start, len(hidden) - len(part)), start
        rows = _finite(_next(config, params, part))
        yield from rows[first - start : len(ids) - start, : config.n_vocab]


def _score(ids, log_probs):
    total = float(np.sum(log_probs, dtype=np.float64))
    if not len(ids):
        return Score(ids, log_probs, total, math.nan)
    with np.errstate(over="ignore"):  # infinite from 710 nats a token on
        perplexity = float(np.exp(-total / len(ids)))
    return Score(ids, log_probs, total, perplexity)


def _finite(values: Any) -> np.ndarray:
    """Return the values on the host; NaN is no feature and no score."""
    values = np.asarray(values)
    if not np.isfinite(values).all():
        raise FloatingPointError(NOT_FINITE)
    return values


def _widen(config, ids, value=0):
    more = bucket(ids.shape[1], config.n_ctx) - ids.shape[1]
    return np.pad(ids, ((0, 0), (0, more)), constant_values=value)


@functools.partial(jax.jit, static_argnames="config")
def _logits(config: ModelConfig, params: Any, ids: Int[Array, "B T"]):
    return model.project(config, params, model.hidden_states(config, params, ids))


@functools.partial(jax.jit, static_argnames="config")
def _last(config: ModelConfig, params: Any, ids: Int[Array, "B T"]):
    return model.hidden_states(config, params, ids).astype(jnp.float32)


@functools.partial(jax.jit, static_argnames="config")
def _after(
    config: ModelConfig, params: Any, ids: Int[Array, "B T"], layers: Int[Array, ""]
):
    states = model.hidden_states_after(config, params, ids, layers)
    return states.astype(jnp.float32)


@functools.partial(jax.jit, static_argnames="pool")
def _pool(values: Float[Array, "B T D"], lengths: Int[Array, " B"], pool: str):
    if pool == "last":
        last = (lengths - 1)[:, None, None]
        return jnp.take_along_axis(values, last, axis=1)[:, 0]
    real = jnp.arange(values.shape[1])[None] < lengths[:, None]
    total = jnp.sum(jnp.where(real[..., None], values, 0.0), axis=1)
    return total / lengths[:, None]


@functools.partial(jax.jit, static_argnames="config")
def _next(config: ModelConfig, params: Any, hidden: Float[Array, "T D"]):
    hidden = hidden.astype(jnp.dtype(model.resolve(config).dtype))
    return jax.nn.log_softmax(model.project(config, params, hidden[None])[0])


@functools.partial(jax.jit, static_argnames="config")
def _by_layer(config: ModelConfig, params: Any, ids: Int[Array, "B T"]):
    return model.hidden_states_by_layer(config, params, ids).astype(jnp.float32)


@functools.partial(jax.jit, static_argnames="config")
def _attentions(config: ModelConfig, params: Any, ids: Int[Array, "B T"]):
    states = model.hidden_states_by_layer(config, params, ids)
    return model.attention_maps(config, params, states)


@functools.partial(jax.jit, static_argnames="config")
def _log_probs(
    config: ModelConfig, params: Any, ids: Int[Array, "B T"], wanted: Int[Array, "B T"]
):
    hidden = model.hidden_states(config, params, ids)
    head = model.output_matrix(params).astype(hidden.dtype)
    return token_log_probs(hidden, head, wanted, n_vocab=config.n_vocab)
