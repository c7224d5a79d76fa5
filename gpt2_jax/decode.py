"""Prefill and decode with a KV cache under one compiled loop; sampling; stopping."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from gpt2_jax import model
from gpt2_jax.config import ConfigError, ModelConfig, check

BUCKET = 64  # prompt and cache lengths are rounded up to it, so compiles are few


class Sampling(NamedTuple):
    """How the next token is drawn from the logits."""

    temperature: float = 1.0  # 0 is greedy
    top_k: int | None = None  # only the k most likely
    top_p: float = 1.0  # only the most likely that reach this share together

    def validate(self) -> None:
        """Raise `ConfigError` for a value outside its range."""
        good = 0 <= self.temperature < float("inf")
        check(good, "temperature", self.temperature, "a finite number >= 0")
        check(self.top_k is None or self.top_k >= 1, "top_k", self.top_k, "None, >= 1")
        check(0 < self.top_p <= 1, "top_p", self.top_p, "0 < top_p <= 1")


class _Loop(NamedTuple):
    cache: tuple[model.Cache, ...]
    logits: Float[Array, "B V"]
    tokens: Int[Array, "B M"]
    done: Bool[Array, " B"]
    drawn: Int[Array, ""]
    finite: Bool[Array, ""]


def generate(
    config: ModelConfig,
    unstacked: model.Params,
    prompts: list[np.ndarray],
    *,
    max_new_tokens: int,
    sampling: Sampling,
    seed: int,
    eot: int | None,
) -> list[np.ndarray]:
    """Return the new tokens of every prompt, cut before the first `eot`.

    Row i draws with `fold_in(seed, i)` and its own positions, so neither the other
    rows' lengths nor their texts change it. `unstacked` comes from `model.unstack`.

    Raises
    ------
    ConfigError
        If a prompt is empty or holds an id outside the vocabulary, or prompt and new
        tokens exceed the context.
    FloatingPointError
        If the model gives logits that are not finite.
    """
    sampling.validate()
    check(max_new_tokens >= 1, "max_new_tokens", max_new_tokens, ">= 1")
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    _check_prompts(config, prompts, int(lengths.max(initial=0)), max_new_tokens)
    width = min(_round_up(int(lengths.max())), config.n_ctx)
    padded = np.zeros((len(prompts), width), np.int32)
    for row, prompt in enumerate(prompts):
        padded[row, : len(prompt)] = prompt
    slots = min(_round_up(int(lengths.max()) + max_new_tokens), config.n_ctx)
    tokens, counts, finite = _generate(
        config, unstacked, jnp.asarray(padded), jnp.asarray(lengths),
        jax.random.key(seed), jnp.float32(sampling.temperature),
        jnp.float32(sampling.top_p), jnp.int32(max_new_tokens),
        slots=slots, greedy=sampling.temperature == 0, top_k=sampling.top_k,
        nucleus=sampling.top_p < 1, eot=eot,
    )  # fmt: skip
    if not bool(finite):
        raise FloatingPointError("the model's logits are not finite; check its weights")
    rows = zip(np.asarray(tokens), np.asarray(counts), strict=True)
    return [row[:count] for row, count in rows]


def _check_prompts(config, prompts, longest, max_new_tokens):
    for prompt in prompts:
        check(len(prompt) > 0, "prompt", "0 tokens", "at least one token")
        low, high = int(np.min(prompt)), int(np.max(prompt))
        allowed = f"0 <= id < {config.n_vocab}"
        check(low >= 0, "token id", low, allowed)
        check(high < config.n_vocab, "token id", high, allowed)
    excess = longest + max_new_tokens - config.n_ctx
    if excess > 0:
        raise ConfigError(
            f"prompt of {longest} tokens + max_new_tokens = {max_new_tokens} exceed "
            f"the context of {config.n_ctx} by {excess}; shorten the prompt or lower "
            "--max-new-tokens"
        )


def _round_up(length):
    return -(-length // BUCKET) * BUCKET


@functools.partial(
    jax.jit,
    static_argnames=("config", "slots", "greedy", "top_k", "nucleus", "eot"),
)
def _generate(
    config: ModelConfig,
    unstacked: Any,
    prompts: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    key: Key[Array, ""],
    temperature: Float[Array, ""],
    top_p: Float[Array, ""],
    limit: Int[Array, ""],
    *,
    slots: int,
    greedy: bool,
    top_k: int | None,
    nucleus: bool,
    eot: int | None,
):
    batch = prompts.shape[0]
    keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.arange(batch))

    def draw(logits: Float[Array, "B V"], count: Int[Array, ""]) -> Int[Array, " B"]:
        if greedy:
            return jnp.argmax(logits, axis=-1)
        kept = restrict(logits / temperature, top_k, top_p if nucleus else None)
        now = jax.vmap(jax.random.fold_in, (0, None))(keys, count)
        return jax.vmap(jax.random.categorical)(now, kept)

    def more(loop: _Loop) -> Bool[Array, ""]:
        return (loop.drawn < limit) & ~jnp.all(loop.done)

    def advance(loop: _Loop) -> _Loop:
        token = draw(loop.logits, loop.drawn).astype(jnp.int32)
        done = loop.done if eot is None else loop.done | (token == eot)
        tokens = loop.tokens.at[:, loop.drawn].set(jnp.where(done, -1, token))
        positions = (lengths + loop.drawn)[:, None]
        hidden, cache = model.decode(
            config, unstacked, token[:, None], positions, loop.cache
        )
        logits = model.project(config, unstacked, hidden)[:, 0]
        finite = loop.finite & jnp.all(jnp.isfinite(logits))
        return _Loop(cache, logits, tokens, done, loop.drawn + 1, finite)

    positions = jnp.broadcast_to(jnp.arange(prompts.shape[1])[None], prompts.shape)
    cache = model.init_cache(config, batch, slots)
    hidden, cache = model.decode(config, unstacked, prompts, positions, cache)
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)
    logits = model.project(config, unstacked, last)[:, 0]
    tokens = jnp.full((batch, slots), -1, jnp.int32)
    done = jnp.zeros(batch, bool)
    finite = jnp.all(jnp.isfinite(logits))
    first = _Loop(cache, logits, tokens, done, jnp.int32(0), finite)
    last_loop = jax.lax.while_loop(more, advance, first)
    return last_loop.tokens, jnp.sum(last_loop.tokens >= 0, axis=1), last_loop.finite


def restrict(
    logits: Float[Array, "B V"], top_k: int | None, top_p: Float[Array, ""] | None
) -> Float[Array, "B V"]:
    """Return logits with all but the most likely tokens at -inf.

    `top_k` keeps the k largest, `top_p` the smallest set of most likely tokens whose
    probabilities reach it (Holtzman et al. 2020); both together keep the overlap,
    top-k first. The most likely token always stays.
    """
    if top_k is not None and top_k < logits.shape[-1]:
        least = jax.lax.top_k(logits, top_k)[0][:, -1:]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if top_p is not None:
        ordered = jnp.sort(logits, axis=-1, descending=True)
        share = jax.nn.softmax(ordered, axis=-1)
        before = jnp.cumsum(share, axis=-1) - share
        kept = jnp.sum(before < top_p, axis=-1, keepdims=True)
        least = jnp.take_along_axis(ordered, jnp.maximum(kept, 1) - 1, axis=-1)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    return logits
