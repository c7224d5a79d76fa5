"""Write on from token prompts: prefill, a KV cache, one compiled loop, sampling.

A row is one sequence being written. Its tokens depend on its prompt, its options and
its key alone: rows of different lengths share a batch, and who else is in the batch
changes nothing but the rounding of sums.

Axes: P prompts, B rows, T prompt position, V vocabulary (padded).
"""

import functools
import textwrap
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Integer, UInt32

from gpt2_jax import model
from gpt2_jax.config import ConfigError, ModelConfig, check

SMALLEST_BUCKET = 64  # positions
NOT_FINITE = "the model's logits are not finite; check its weights"
ENDED = -1  # stands for a token of a row that had ended


class Sampling(NamedTuple):
    """How the next token is drawn from the logits."""

    temperature: float = 1.0  # 0 is greedy
    top_k: int | None = None  # only the k most likely
    top_p: float = 1.0  # only the most likely that reach this share together
    min_p: float = 0.0  # only those at least this share as likely as the likeliest
    repetition_penalty: float = 1.0  # > 1 makes tokens of prompt and text less likely

    def validate(self) -> None:
        """Raise `ConfigError` for a value outside its range."""
        good = 0 <= self.temperature < float("inf")
        check(good, "temperature", self.temperature, "a finite number >= 0")
        good = self.top_k is None or 1 <= self.top_k < 2**31
        check(good, "top_k", self.top_k, "None or 1 <= top_k < 2**31")
        check(0 < self.top_p <= 1, "top_p", self.top_p, "0 < top_p <= 1")
        check(0 <= self.min_p <= 1, "min_p", self.min_p, "0 <= min_p <= 1")
        good = 1e-30 <= self.repetition_penalty <= 1e30  # in float32, logits too
        name, allowed = "repetition_penalty", "a number > 0, from 1e-30 to 1e30"
        check(good, name, self.repetition_penalty, allowed)


class Row(NamedTuple):
    """One sequence to be written: its prompt, its length, what it draws with."""

    prompt: np.ndarray  # token ids
    limit: int  # most new tokens
    seed: int = 0
    number: int = 0  # rows of one seed differ by it


class Options(NamedTuple):
    """The options of every row; what a row does not ask for changes nothing."""

    temperature: Float[Array, " B"]
    top_k: Int[Array, " B"]
    top_p: Float[Array, " B"]
    min_p: Float[Array, " B"]
    penalty: Float[Array, " B"]
    seeds: UInt32[Array, " B"]
    numbers: UInt32[Array, " B"]
    limits: Int[Array, " B"]


class Uses(NamedTuple):
    """What any row asks for; the rest is not computed."""

    sampled: bool
    top_k: bool
    top_p: bool
    min_p: bool
    penalty: bool


class _State(NamedTuple):
    cache: tuple[model.Cache, ...]
    token: Int[Array, " B"]  # the last of each row, not yet in the cache
    place: Int[Array, " B"]  # its position
    done: Bool[Array, " B"]
    seen: Bool[Array, "B V"] | None  # tokens of prompt and text
    finite: Bool[Array, ""]


class Decoder:
    """Rows that are written on, some tokens at a time.

    `unstacked` comes from `model.unstack`; `sampling` holds for all rows, or names one
    for each. A row ends when it draws `eot` (None: never) or reaches its limit, and
    after `stop`. With `slide`, a row that has filled the context forgets the older half
    of it and goes on.

    Raises
    ------
    ConfigError
        If there is no row, a prompt is empty or no flat list of ids of the vocabulary,
        prompt and limit exceed the context (without `slide`), or an option is out of
        range.
    """

    def __init__(
        self,
        config: ModelConfig,
        unstacked: model.Params,
        rows: Sequence[Row],
        *,
        sampling: Sampling | Sequence[Sampling] = Sampling(),  # noqa: B008  immutable
        eot: int | None,
        slide: bool = False,
    ):
        check(len(rows) > 0, "the number of rows", 0, "at least 1")
        each = [sampling] * len(rows) if isinstance(sampling, Sampling) else sampling
        for row, how in zip(rows, each, strict=True):
            how.validate()
            check_row(config, row, slide=slide)
        self._config, self._unstacked = config, unstacked
        self._eot, self._slide = eot, slide
        self._texts = [np.asarray(row.prompt, np.int32) for row in rows]
        self._options = gather_options(rows, each)
        self._uses = gather_uses(each)
        self._limits = np.array([row.limit for row in rows])
        self._done = np.zeros(len(rows), bool)
        self._drawn = 0
        self._state: _State | None = None

    @property
    def done(self) -> bool:
        """Say whether every row has ended."""
        return bool(self._done.all())

    def stop(self, row: int) -> None:
        """End a row; the others go on."""
        self._done[row] = True

    def advance(
        self, most: int | None = None
    ) -> tuple[Int[np.ndarray, "B n"], Float[np.ndarray, "B n"]]:
        """Return the next tokens of every row and their log-probabilities.

        At most `most` of them, fewer when all rows end. After a row's end, whose last
        token may be `eot`, its tokens are -1. The log-probabilities are the model's
        own, in nats: neither temperature nor filters count.

        Raises
        ------
        FloatingPointError
            If the model gives logits that are not finite.
        """
        room = self._room()
        if self._state is None or room == 0:
            self._state = self._start()
            room = self._room()
        wanted = room if most is None else min(most, room)
        state, tokens, log_probs = _advance(
            self._config, self._unstacked, self._state, self._options,
            jnp.asarray(self._done), jnp.int32(self._drawn), jnp.int32(wanted),
            uses=self._uses, eot=self._eot,
        )  # fmt: skip
        if not bool(state.finite):
            self._state = None  # it was donated
            raise FloatingPointError(NOT_FINITE)
        self._state, self._done = state, np.array(state.done)
        tokens, log_probs = np.asarray(tokens), np.asarray(log_probs)
        count = int(np.sum((tokens != ENDED).any(axis=0)))
        self._drawn += count
        tokens, log_probs = tokens[:, :count], log_probs[:, :count]
        for i, drawn in enumerate(tokens):
            self._texts[i] = np.concatenate([self._texts[i], drawn[drawn != ENDED]])
        return tokens, log_probs

    def _room(self) -> int:
        """Return how many tokens can be drawn at once: to the end or a full context."""
        live = [i for i, done in enumerate(self._done) if not done]
        left = max((self._limits[i] - self._drawn for i in live), default=0)
        if self._slide:
            free = (self._config.n_ctx - len(self._texts[i]) for i in live)
            left = min(left, min(free, default=0))
        return int(left)

    def _start(self) -> _State:
        """Return the state of every row's text, a full one without its older half."""
        n_ctx = self._config.n_ctx
        half = max(n_ctx // 2, 1)
        self._texts = [t if len(t) < n_ctx else t[-half:] for t in self._texts]
        left = max(np.where(self._done, 0, self._limits - self._drawn))
        longest = max(map(len, self._texts))
        return _read_rows(
            self._config, self._unstacked, self._texts,
            slots=bucket(longest + int(left), n_ctx), penalty=self._uses.penalty,
        )  # fmt: skip


def generate(
    config: ModelConfig,
    unstacked: model.Params,
    rows: Sequence[Row],
    *,
    sampling: Sampling,
    eot: int | None,
) -> list[np.ndarray]:
    """Return the new tokens of every row, cut before the first `eot`."""
    tokens, _ = Decoder(config, unstacked, rows, sampling=sampling, eot=eot).advance()
    return [row[(row != ENDED) & (row != eot)] for row in tokens]


def bucket(length: int, n_ctx: int) -> int:
    """Return the length rounded up to 64, 96, 128, 192, 256, 384 .. and `n_ctx`.

    Every length compiles anew, so there are few of them.
    """
    size = SMALLEST_BUCKET
    while size < length:
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return min(size, n_ctx)


def check_tokens(config: ModelConfig, ids: Any) -> None:
    """Raise `ConfigError` for what is no flat list of ids of the vocabulary."""
    array, allowed = as_integers(ids), f"0 <= id < {config.n_vocab}"
    check(len(array) > 0, "prompt", "0 tokens", "at least one token")
    for found in (int(np.min(array)), int(np.max(array))):
        check(0 <= found < config.n_vocab, "token id", found, allowed)


def as_integers(ids: Any) -> Integer[np.ndarray, " _"]:
    """Return the ids as an array; raise `ConfigError` if they are no flat integers."""
    try:
        array = np.asarray(ids)
    except ValueError:  # nested, with rows of different lengths
        array = np.empty((0, 0))
    if array.ndim == 1 and not len(array):  # numpy takes no numbers for floats
        return array.astype(np.int32)
    if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
        found = textwrap.shorten(repr(ids), 60, placeholder=" ..")  # on one line
        raise ConfigError(f"token ids are {found}; allowed: a flat list of integers")
    return array


def check_row(config: ModelConfig, row: Row, *, slide: bool = False) -> None:
    """Raise `ConfigError` for a row that cannot be written."""
    check_tokens(config, row.prompt)
    _check_whole("max_new_tokens", row.limit, 1, 31)
    _check_whole("seed", row.seed, 0, 32)
    _check_whole("number", row.number, 0, 32)
    excess = len(row.prompt) + (0 if slide else row.limit) - config.n_ctx
    if excess > 0:
        raise ConfigError(
            f"prompt of {len(row.prompt)} tokens + max_new_tokens = {row.limit} exceed "
            f"the context of {config.n_ctx} by {excess}; shorten the prompt or say "
            f"--truncate left{'' if slide else ', lower --max-new-tokens, or --slide'}"
        )


def _check_whole(name, value, least, bits):
    good = isinstance(value, int | np.integer) and least <= value < 2**bits
    check(good, name, value, f"{least} <= {name} < 2**{bits}")


def pad_prompts(
    config: ModelConfig, prompts: Sequence[np.ndarray]
) -> Int[Array, "P T"]:
    """Return the prompts in one array, zeros after each, T rounded up to a bucket."""
    width = bucket(max(map(len, prompts)), config.n_ctx)
    padded = np.zeros((len(prompts), width), np.int32)
    for row, prompt in zip(padded, prompts, strict=True):
        row[: len(prompt)] = prompt
    return jnp.asarray(padded)


def gather_options(rows: Sequence[Row], each: Sequence[Sampling]) -> Options:
    """Return the options of all rows, in numpy's arrays: jax's would take programs."""
    everything = np.iinfo(np.int32).max  # of any vocabulary
    hottest = float(np.finfo(np.float32).max)
    # A share of 1 is out of reach: rounded, it would be reached before the last token.
    shares = [how.top_p if how.top_p < 1 else np.inf for how in each]
    floats = functools.partial(np.array, dtype=np.float32)
    options: dict[str, Any] = dict(
        temperature=floats([min(how.temperature, hottest) for how in each]),
        top_k=np.array([how.top_k or everything for how in each], np.int32),
        top_p=floats(shares),
        min_p=floats([how.min_p for how in each]),
        penalty=floats([how.repetition_penalty for how in each]),
        seeds=np.array([row.seed for row in rows], np.uint32),
        numbers=np.array([row.number for row in rows], np.uint32),
        limits=np.array([row.limit for row in rows], np.int32),
    )
    return Options(**options)


def gather_uses(each: Sequence[Sampling]) -> Uses:
    """Return what any of the rows asks for."""
    return Uses(
        sampled=any(how.temperature > 0 for how in each),
        top_k=any(how.top_k is not None for how in each),
        top_p=any(how.top_p < 1 for how in each),
        min_p=any(how.min_p > 0 for how in each),
        penalty=any(how.repetition_penalty != 1 for how in each),
    )


def _read_rows(config, unstacked, texts, *, slots, penalty) -> _State:
    prompts = {text.tobytes(): text for text in texts}  # alike ones are read once
    order = list(prompts)
    source = jnp.array([order.index(text.tobytes()) for text in texts], jnp.int32)
    seen = None
    if penalty:
        width = model.n_logits(unstacked)
        host = np.zeros((len(texts), width), bool)
        for row, text in zip(host, texts, strict=True):
            row[text] = True
        seen = jnp.asarray(host)
    last = jnp.array([text[-1] for text in texts], jnp.int32)
    place = jnp.array([len(text) - 1 for text in texts], jnp.int32)
    padded = pad_prompts(config, list(prompts.values()))
    return _begin(config, unstacked, padded, source, last, place, seen, slots=slots)


@functools.partial(jax.jit, static_argnames=("config", "slots"))
def _begin(
    config: ModelConfig,
    unstacked: Any,
    prompts: Int[Array, "P T"],
    source: Int[Array, " B"],
    last: Int[Array, " B"],
    place: Int[Array, " B"],
    seen: Bool[Array, "B V"] | None,
    *,
    slots: int,
) -> _State:
    """Return the state of rows whose last token is not in the cache yet."""
    cache = prefill(config, unstacked, prompts, source, slots=slots)
    done = jnp.zeros(last.shape, bool)
    return _State(cache, last, place, done, seen, jnp.array(True))


def prefill(
    config: ModelConfig,
    unstacked: Any,
    prompts: Int[Array, "P T"],
    source: Int[Array, " B"],
    *,
    slots: int,
) -> tuple[model.Cache, ...]:
    """Return the cache of B rows, row i a copy of prompt `source[i]`.

    What lies beyond a prompt's length is overwritten before it is seen.
    """
    positions = jnp.broadcast_to(jnp.arange(prompts.shape[1])[None], prompts.shape)
    cache = model.init_cache(config, prompts.shape[0], slots)
    _, cache = model.decode(config, unstacked, prompts, positions, cache)
    return tuple(slots.take(source, config.n_head) for slots in cache)


@functools.partial(
    jax.jit, static_argnames=("config", "uses", "eot"), donate_argnames=("state",)
)
def _advance(
    config: ModelConfig,
    unstacked: Any,
    state: _State,
    options: Options,
    ended: Bool[Array, " B"],
    drawn: Int[Array, ""],
    wanted: Int[Array, ""],
    *,
    uses: Uses,
    eot: int | None,
):
    """Return the state, tokens and log-probabilities after at most `wanted` more."""
    batch, slots = len(state.token), state.cache[0].keys.shape[1]
    rows = jnp.arange(batch)

    def more(carry: Any) -> Bool[Array, ""]:
        state, count, _, _ = carry
        return (count < wanted) & ~jnp.all(state.done)

    def draw_one(carry: Any) -> Any:
        state, count, tokens, log_probs = carry
        hidden, cache = model.decode(
            config, unstacked, state.token[:, None], state.place[:, None], state.cache
        )
        logits = model.project(config, unstacked, hidden)[:, 0]
        good = jnp.all(jnp.isfinite(logits), axis=-1) | state.done
        counts = jnp.full(batch, drawn + count)
        token = draw(logits, state.seen, options, counts, uses).astype(jnp.int32)
        chosen = jnp.take_along_axis(logits, token[:, None], axis=-1)[:, 0]
        log_prob = chosen - jax.nn.logsumexp(logits, axis=-1)
        tokens = tokens.at[:, count].set(jnp.where(state.done, ENDED, token))
        log_probs = log_probs.at[:, count].set(log_prob)
        done = state.done | (drawn + count + 1 >= options.limits)
        done = done if eot is None else done | (token == eot)
        seen = None if state.seen is None else state.seen.at[rows, token].set(True)
        finite = state.finite & jnp.all(good)
        state = _State(cache, token, state.place + 1, done, seen, finite)
        return state, count + 1, tokens, log_probs

    tokens = jnp.full((batch, slots), ENDED, jnp.int32)
    log_probs = jnp.zeros((batch, slots), jnp.float32)
    state = state._replace(done=state.done | ended)
    first = state, jnp.int32(0), tokens, log_probs
    state, _, tokens, log_probs = jax.lax.while_loop(more, draw_one, first)
    return state, tokens, log_probs


def draw(
    logits: Float[Array, "B V"],
    seen: Bool[Array, "B V"] | None,
    options: Options,
    counts: Int[Array, " B"],
    uses: Uses,
) -> Int[Array, " B"]:
    """Return the next token of every row, after `counts` new ones.

    The order is transformers': repetition penalty (Keskar et al. 2019, CTRL),
    temperature, top-k, top-p, min-p.
    """
    if uses.penalty and seen is not None:
        penalty = options.penalty[:, None]
        lowered = jnp.where(logits < 0, logits * penalty, logits / penalty)
        logits = jnp.where(seen, lowered, logits)
    best = jnp.argmax(logits, axis=-1)
    if not uses.sampled:
        return best
    warm = options.temperature > 0
    # From the largest one down, so that no temperature is too small to divide by.
    below = logits - jnp.max(logits, axis=-1, keepdims=True)
    scaled = below / jnp.where(warm, options.temperature, 1.0)[:, None]
    padding = logits == jnp.finfo(logits.dtype).min  # hot enough, it would be drawn
    scaled = jnp.where(padding, -jnp.inf, scaled)
    kept = restrict(
        scaled,
        options.top_k if uses.top_k else None,
        options.top_p if uses.top_p else None,
        options.min_p if uses.min_p else None,
    )
    keys = jax.vmap(_key)(options.seeds, options.numbers, counts)
    return jnp.where(warm, jax.vmap(jax.random.categorical)(keys, kept), best)


def _key(seed, number, count):
    key = jax.random.fold_in(jax.random.key(seed), number)
    return jax.random.fold_in(key, count)


def restrict(
    logits: Float[Array, "B V"],
    top_k: Int[Array, " B"] | None,
    top_p: Float[Array, " B"] | None,
    min_p: Float[Array, " B"] | None = None,
) -> Float[Array, "B V"]:
    """Return logits with all but the most likely tokens at -inf.

    `top_k` keeps the k largest, `top_p` the smallest set of most likely tokens whose
    probabilities reach it (Holtzman et al. 2020), `min_p` those at least that share as
    likely as the likeliest (Nguyen et al. 2024); several keep the overlap, in this
    order. The most likely token always stays, and so do ties.
    """
    if top_k is not None:
        kept = _most_likely(logits, jnp.ones_like(logits), top_k.astype(jnp.float32))
        logits = jnp.where(kept, logits, -jnp.inf)
    if top_p is not None:
        kept = _most_likely(logits, jax.nn.softmax(logits, axis=-1), top_p)
        logits = jnp.where(kept, logits, -jnp.inf)
    if min_p is not None:
        least = jnp.max(logits, axis=-1, keepdims=True) + jnp.log(min_p)[:, None]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    return logits


def _most_likely(values, weights, target):
    """Say which entries are the smallest set of largest values whose weights reach it.

    The least value kept is found by bisection of float32's bits, whose order as
    integers is that of the numbers: 32 sums instead of a sort (50,304 values on CPU:
    8.6 -> 0.5 ms, and 7.3 -> 0.4 ms beside `lax.top_k` for 40 of them).
    """
    bits = jax.lax.bitcast_convert_type(values, jnp.int32)
    order = jnp.where(bits < 0, bits ^ jnp.int32(0x7FFFFFFF), bits)

    def halve(_, bounds):
        low, high = bounds  # what lies at or above low reaches the target
        middle = (low >> 1) + (high >> 1) + (low & high & 1)
        middle = jnp.where(middle == low, high, middle)
        inside = order >= middle[:, None]
        enough = jnp.sum(jnp.where(inside, weights, 0.0), axis=-1) >= target
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    lowest = jnp.full(target.shape, jnp.iinfo(jnp.int32).min)
    highest = jnp.max(order, axis=-1)
    low, _ = jax.lax.fori_loop(0, 33, halve, (lowest, highest))
    top = jnp.sum(jnp.where(order >= highest[:, None], weights, 0.0), axis=-1) >= target
    return order >= jnp.where(top, highest, low)[:, None]
