"""Beam search over the KV cache, by transformers' rules, in one compiled loop.

Axes: K beams, M new tokens, V vocabulary (padded).
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from gpt2_jax import model
from gpt2_jax.config import ModelConfig, check
from gpt2_jax.decode import (
    ENDED,
    NOT_FINITE,
    Row,
    bucket,
    check_row,
    pad_prompts,
    prefill,
)

NEVER = -1e9  # a score below every real one; transformers generation/utils.py


class Beam(NamedTuple):
    """One finished sequence."""

    tokens: np.ndarray  # new ones, a drawn end of text among them
    log_probs: np.ndarray  # of each token, in nats
    score: float  # summed log-probability / length ** length_penalty


class _Beams(NamedTuple):
    tokens: Int[Array, "K M"]
    log_probs: Float[Array, "K M"]
    score: Float[Array, " K"]

    def take(self, index: Int[Array, " K"]) -> "_Beams":
        return _Beams(*(leaf[index] for leaf in self))


class _Search(NamedTuple):
    cache: tuple[model.Cache, ...]
    running: _Beams  # scores are sums
    finished: _Beams  # scores are divided by length ** length_penalty
    is_finished: Bool[Array, " K"]
    last: Int[Array, " K"]  # token of each running beam that is not in the cache yet
    drawn: Int[Array, ""]
    open: Bool[Array, ""]  # a running beam may still beat a finished one
    finite: Bool[Array, ""]


def beam_search(
    config: ModelConfig,
    unstacked: model.Params,
    row: Row,
    *,
    beams: int,
    length_penalty: float = 1.0,
    eot: int | None,
) -> list[Beam]:
    """Return the `beams` best sequences found, best first; fewer if fewer exist.

    transformers' `generate(num_beams=beams, do_sample=False, early_stopping=False)`:
    each step keeps the likeliest continuations; one that ends is scored by its summed
    log-probability / length ** `length_penalty` and set aside; the search ends when no
    running beam can beat those set aside, or at the row's limit.

    Raises
    ------
    ConfigError
        If the row does not fit the context, or an option is out of range.
    FloatingPointError
        If the model gives logits that are not finite.
    """
    check_row(config, row)
    check(beams >= 1, "num_beams", beams, ">= 1")
    good = -1 <= length_penalty <= 10  # further, scores leave float32 or pass NEVER
    check(good, "length_penalty", length_penalty, "-1 <= length_penalty <= 10")
    slots = bucket(len(row.prompt) + row.limit, config.n_ctx)
    found, finite = _search(
        config, unstacked, pad_prompts(config, [row.prompt]),
        jnp.int32(len(row.prompt)), jnp.int32(row.prompt[-1]), jnp.int32(row.limit),
        jnp.float32(length_penalty), beams=beams, slots=slots, eot=eot,
    )  # fmt: skip
    if not bool(finite):
        raise FloatingPointError(NOT_FINITE)
    rows = zip(*(np.asarray(leaf) for leaf in found), strict=True)
    kept = [(tokens != ENDED, tokens, logs, score) for tokens, logs, score in rows]
    texts = [Beam(t[real], logs[real], float(score)) for real, t, logs, score in kept]
    return [text for text in texts if _is_real(text, length_penalty)]


def _is_real(beam: Beam, length_penalty: float) -> bool:
    """Say whether a beam is a text: fillers stand where there are fewer texts."""
    length = float(len(beam.tokens))
    return length > 0 and beam.score * length**length_penalty > NEVER / 2


@functools.partial(jax.jit, static_argnames=("config", "beams", "slots", "eot"))
def _search(
    config: ModelConfig,
    unstacked: Any,
    prompt: Int[Array, "1 T"],
    length: Int[Array, ""],
    last: Int[Array, ""],
    limit: Int[Array, ""],
    length_penalty: Float[Array, ""],
    *,
    beams: int,
    slots: int,
    eot: int | None,
):
    kept = 2 * beams  # so that `beams` go on even if as many end at once

    def more(search: _Search) -> Bool[Array, ""]:
        return search.open & (search.drawn < limit)

    def step(search: _Search) -> _Search:
        places = jnp.full((beams, 1), length - 1 + search.drawn)
        hidden, cache = model.decode(
            config, unstacked, search.last[:, None], places, search.cache
        )
        logits = model.project(config, unstacked, hidden)[:, 0]
        finite = search.finite & jnp.all(jnp.isfinite(logits))
        log_probs = jax.nn.log_softmax(logits, axis=-1)
        sums = log_probs + search.running.score[:, None]
        total, index = jax.lax.top_k(sums.reshape(-1), kept)
        source, token = jnp.divmod(index, logits.shape[-1])
        drawn = search.drawn + 1
        grown = search.running.take(source)
        gains = total - grown.score
        grown = _Beams(
            grown.tokens.at[:, search.drawn].set(token),
            grown.log_probs.at[:, search.drawn].set(gains),
            total,
        )
        ends = jnp.full(kept, drawn == limit)
        ends = ends if eot is None else ends | (token == eot)

        scores, best = jax.lax.top_k(total + jnp.where(ends, NEVER, 0.0), beams)
        running = grown.take(best)._replace(score=scores)

        counts = ends & (jnp.arange(kept) < beams) & search.open
        power = drawn.astype(jnp.float32) ** length_penalty
        ended = grown._replace(score=total / power + jnp.where(counts, 0.0, NEVER))
        both = jax.tree.map(_join, search.finished, ended)
        scores, chosen = jax.lax.top_k(both.score, beams)
        finished = both.take(chosen)._replace(score=scores)
        is_finished = _join(search.is_finished, counts)[chosen]

        worst = jnp.where(jnp.all(is_finished), jnp.min(scores), NEVER)
        still_open = search.open & (running.score[0] / power > worst)
        cache = tuple(slots.take(source[best], config.n_head) for slots in cache)
        return _Search(
            cache,
            running,
            finished,
            is_finished,
            token[best],
            drawn,
            still_open,
            finite,
        )

    none = _Beams(
        jnp.full((beams, slots), ENDED, jnp.int32),
        jnp.zeros((beams, slots), jnp.float32),
        jnp.full(beams, NEVER, jnp.float32),
    )
    # Beams begin alike: only the first may grow, or all would stay alike.
    running = none._replace(score=none.score.at[0].set(0.0))
    search = _Search(
        cache=prefill(config, unstacked, prompt, jnp.zeros(beams, int), slots=slots),
        running=running,
        finished=none,
        is_finished=jnp.zeros(beams, bool),
        last=jnp.full(beams, last),
        drawn=jnp.int32(0),
        open=jnp.array(True),
        finite=jnp.array(True),
    )
    search = jax.lax.while_loop(more, step, search)
    return search.finished, search.finite


def _join(first, second):
    return jnp.concatenate([first, second])
