"""Continuous batching: texts join and leave one decode loop, between its steps.

A thread of its own owns the model. In every turn it lets one prompt in, or does one
other piece of work, and then draws one token for every text that is being written. A
text has a lane: rows of the cache. There are 1, 2, 4 .. lanes of 128, 256 .. positions,
as many as the texts need, so few programs compile and a lone client does not pay for
others' room. What a text becomes does not depend on who else is there
(`gpt2_jax.decode`).

Axes: B lanes, T prompt position, V vocabulary (padded).
"""

import functools
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from gpt2_jax import model
from gpt2_jax.config import ModelConfig
from gpt2_jax.decode import (
    NOT_FINITE,
    Options,
    Row,
    Sampling,
    Uses,
    check_row,
    draw,
    gather_options,
    gather_uses,
    pad_prompts,
    prefill,
)

SMALLEST = 128  # positions of a lane
NOBODY = Row(np.zeros(1, np.int32), 1), Sampling(0.0)
T = TypeVar("T")


class FullError(Exception):
    """As many texts wait as may."""


class ClosedError(Exception):
    """The engine takes no more work."""

    def __init__(self):
        super().__init__("the server is stopping")


class Drawn(NamedTuple):
    """One new token of a text."""

    token: int
    log_prob: float  # by the model alone, in nats
    tops: list[tuple[int, float]]  # the likeliest tokens at its place, best first


@dataclass(eq=False, kw_only=True)
class Writing:
    """A text to be written; `take` and `end` are called in the engine's thread."""

    row: Row
    sampling: Sampling
    take: Callable[[Drawn], bool]  # of every token; False ends the text
    end: Callable[[Exception | None], None]  # once, whatever happens
    tops: int = 0  # how many of the likeliest tokens `take` is told
    presence_penalty: float = 0.0  # off the logit of what was written already
    frequency_penalty: float = 0.0  # the same, for each time that it was
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    cancelled: bool = False  # set it: nobody waits for the text any more

    def __post_init__(self):
        self.tokens: list[int] = []  # new ones
        self.seen: np.ndarray | None = None  # (V,), for the repetition penalty
        self.added: np.ndarray | None = None  # (V,), to the logits

    def prepare(self, n_vocab: int) -> None:
        """Make what its options need on the host."""
        if self.sampling.repetition_penalty != 1:
            self.seen = np.zeros(n_vocab, bool)
            self.seen[self.row.prompt] = True
        if self.presence_penalty or self.frequency_penalty or self.logit_bias:
            self.added = np.zeros(n_vocab, np.float32)
            for token, bias in self.logit_bias.items():
                self.added[token] = bias

    def note(self, token: int) -> None:
        """Take a new token into account."""
        if self.seen is not None:
            self.seen[token] = True
        if self.added is not None:
            first = token not in self.tokens
            self.added[token] -= self.frequency_penalty
            self.added[token] -= self.presence_penalty if first else 0.0
        self.tokens.append(token)

    @property
    def changes(self) -> bool:
        """Say whether each token changes the odds of the next beyond the model."""
        return self.seen is not None or self.added is not None

    @property
    def need(self) -> int:
        """Return how many positions the whole text takes."""
        return len(self.row.prompt) + self.row.limit


class Engine:
    """Writes texts for many clients at once; use it as a context.

    `lanes` texts, a power of two, are written at once, `queue` more wait for a lane.
    The vocabulary is `config.n_vocab`; `unstacked` comes from `model.unstack`. Leaving
    the context finishes what is under way, `stop` ends it.
    """

    def __init__(
        self,
        config: ModelConfig,
        unstacked: model.Params,
        *,
        lanes: int = 8,
        queue: int = 64,
    ):
        self._config, self._unstacked = config, unstacked
        self._width = model.n_logits(unstacked)
        self._most, self._queue = lanes, queue
        self._wake = threading.Condition()
        self._waiting: deque[list[Writing] | _Work] = deque()
        self._closed = False
        self._lanes: list[Writing | None] = []
        self._entering: list[Writing] = []  # taken out of the queue, not in a lane yet
        self._slots = 0  # positions of a lane
        self._cache: tuple[model.Cache, ...] = ()
        self._options: tuple[Options, Uses] | None = None  # None: lanes have changed
        self._ahead: _Ahead | None = None  # drawn, perhaps not yet computed
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self.drawn = 0  # tokens, ever
        self.error: Exception | None = None  # what the loop died of

    def __enter__(self) -> "Engine":
        self._thread.start()
        return self

    def __exit__(self, kind, error, trace) -> None:
        self.close()
        self._thread.join()

    def close(self) -> None:
        """Take no more work; what was taken is finished."""
        with self._wake:
            self._closed = True
            self._wake.notify()

    def stop(self) -> None:
        """Take no more work, and leave what is not finished."""
        with self._wake:
            self._closed = True
            for writing in self._everyone():
                writing.cancelled = True
            self._wake.notify()

    @property
    def live(self) -> int:
        """Return how many texts are being written."""
        return sum(lane is not None for lane in self._lanes)

    @property
    def waiting(self) -> int:
        """Return how many texts wait for a lane."""
        with self._wake:
            return sum(len(x) for x in self._waiting if isinstance(x, list))

    @property
    def most(self) -> int:
        """Return how many texts may be under way at once, waiting ones among them."""
        return self._most + self._queue

    def submit(self, writings: Sequence[Writing]) -> None:
        """Write the texts; those with equal prompts next to each other read it once.

        Raises
        ------
        ConfigError
            If a row or an option is out of range.
        FullError
            If there is no room for all of them.
        ClosedError
            If the engine takes no more work.
        """
        groups: list[list[Writing]] = []
        for writing in writings:
            check_row(self._config, writing.row)
            writing.sampling.validate()
            if groups and _same_prompt(groups[-1][0], writing):
                groups[-1].append(writing)
            else:
                groups.append([writing])
        with self._wake:
            self._check_open()
            under_way = self.live + sum(
                len(x) for x in self._waiting if isinstance(x, list)
            )
            if under_way + len(writings) > self.most:
                raise FullError(f"{under_way} texts are under way or wait")
            self._waiting.extend(groups)
            self._wake.notify()

    def call(self, work: Callable[[], T]) -> Future[T]:
        """Do other work with the model between two steps."""
        done: Future[T] = Future()
        with self._wake:
            self._check_open()
            self._waiting.append(_Work(work, done))
            self._wake.notify()
        return done

    def warm_up(self, *counts: int) -> None:
        """Compile what so many short texts at once take, one number after another.

        Raises
        ------
        FloatingPointError
            If the model gives logits that are not finite.
        """
        for count in counts:
            ends = [Future() for _ in range(count)]
            rows = [Row(np.array([i]), 2) for i in range(count)]
            self.submit(
                [
                    Writing(
                        row=row,
                        sampling=Sampling(0.0),
                        take=lambda _: True,
                        end=end.set_result,
                    )
                    for row, end in zip(rows, ends, strict=True)
                ]
            )
            for end in ends:
                if (error := end.result()) is not None:
                    raise error

    def _check_open(self):
        if self._closed:
            raise ClosedError

    def _everyone(self):
        waiting = [w for x in self._waiting if isinstance(x, list) for w in x]
        lanes = [lane for lane in self._lanes if lane is not None]
        return waiting + [w for w in self._entering if w not in lanes] + lanes

    def _run(self):
        try:
            while self._turn():
                pass
        except Exception as error:  # noqa: BLE001 told to everyone who waits
            self.error = error
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        with self._wake:
            self._closed = True
            left, works = self._everyone(), list(self._waiting)
            self._waiting.clear()
        for writing in left:
            writing.end(error)
        for work in works:
            if isinstance(work, _Work):
                work.done.set_exception(error)

    def _turn(self) -> bool:
        """Let someone in, draw a token for everyone; say whether there is more."""
        with self._wake:
            while not (self._waiting or self.live or self._closed):
                self._wake.wait()
            gone = self._drop_cancelled()
            item = self._next()
            over = self._closed and not (self.live or self._waiting or item)
        for writing in gone:
            writing.end(None)
        if isinstance(item, _Work):
            item.run()
        elif item:
            self._entering = item
            self._admit(item)
            self._entering = []
        if self.live:
            self._step()
        self._shrink()
        return not over

    def _drop_cancelled(self) -> list[Writing]:
        gone = [writing for writing in self._everyone() if writing.cancelled]
        if gone:
            self._lanes = [
                None if lane is not None and lane.cancelled else lane
                for lane in self._lanes
            ]
            self._options = None
            kept = [
                [w for w in x if not w.cancelled] if isinstance(x, list) else x
                for x in self._waiting
            ]
            self._waiting = deque(x for x in kept if x)
        return gone

    def _next(self) -> "list[Writing] | _Work | None":
        """Take the first that can go on: texts with one prompt, or other work."""
        free = self._most - self.live
        for i, item in enumerate(self._waiting):
            if isinstance(item, _Work):
                del self._waiting[i]
                return item
            if free:
                now, later = item[:free], item[free:]
                if later:
                    self._waiting[i] = later
                else:
                    del self._waiting[i]
                return now
        return None

    def _admit(self, group: list[Writing]) -> None:
        """Read one prompt into a lane for each text of the group."""
        self._settle()
        texts = [lane for lane in self._lanes if lane is not None] + group
        self._arrange(_power_of_two(len(texts)), self._capacity(texts))
        prompts = pad_prompts(self._config, [np.asarray(group[0].row.prompt, np.int32)])
        read = _read(self._config, self._unstacked, prompts)
        free = [i for i, lane in enumerate(self._lanes) if lane is None]
        for lane, writing in zip(free, group, strict=False):
            first = jnp.int32(lane * self._config.n_head)
            self._cache = _insert(self._cache, read, first)
            self._lanes[lane] = writing
            writing.prepare(self._width)
        self._options = None

    def _capacity(self, texts: Sequence[Writing]) -> int:
        need = max((writing.need for writing in texts), default=0)
        return min(max(_power_of_two(need), SMALLEST), self._config.n_ctx)

    def _arrange(self, lanes: int, slots: int) -> None:
        """Make room for as many lanes and positions, and let go of what is more."""
        if (len(self._lanes), self._slots) == (lanes, slots):
            return
        kept = [i for i, lane in enumerate(self._lanes) if lane is not None]
        if kept:
            source = jnp.array(kept + [0] * (lanes - len(kept)), jnp.int32)
            heads = self._config.n_head
            self._cache = _rearrange(self._cache, source, heads=heads, slots=slots)
        else:
            self._cache = _empty(self._config, lanes, slots)
        rest: list[Writing | None] = [None] * (lanes - len(kept))
        self._lanes = [self._lanes[i] for i in kept] + rest
        self._slots, self._options = slots, None

    def _shrink(self) -> None:
        """Let go of half the lanes where half would do and nobody waits."""
        if not self.live:
            self._ahead = None  # all of it for texts that have ended
        elif _power_of_two(self.live) <= len(self._lanes) // 2 and not self._waiting:
            self._settle()
            texts = [lane for lane in self._lanes if lane is not None]
            if texts:
                self._arrange(_power_of_two(len(texts)), self._capacity(texts))

    def _step(self) -> None:
        """Draw one token for every text; hand over those of the step before meanwhile.

        The device goes on with tokens that the host has not seen, unless what was
        written changes the odds of what follows.
        """
        before = self._ahead
        if before and any(text and text.changes for text in self._lanes):
            self._settle()
            before = None
        texts = list(self._lanes)
        if not self.live:
            return
        token, place = np.zeros(len(texts), np.int32), np.zeros(len(texts), np.int32)
        counts = np.zeros(len(texts), np.int32)
        for i, text in enumerate(texts):
            if text is not None:
                last = text.tokens[-1] if text.tokens else text.row.prompt[-1]
                counts[i], token[i] = len(text.tokens) + bool(before), last
                place[i] = len(text.row.prompt) + counts[i] - 1
        logits, self._cache = _forward(
            self._config,
            self._unstacked,
            self._cache,
            before.found[0] if before else token,
            place,
        )
        if self._options is None:
            pairs = [(t.row, t.sampling) if t else NOBODY for t in texts]
            rows, each = zip(*pairs, strict=True)
            self._options = gather_options(rows, each), gather_uses(each)
        options, uses = self._options
        seen = _stack([t and t.seen for t in texts], self._width, bool)
        added = _stack([t and t.added for t in texts], self._width, np.float32)
        found = _draw(logits, seen, added, options, counts, uses=uses)
        self._settle()
        self._ahead = _Ahead(texts, logits, found)

    def _settle(self) -> None:
        """Hand over the tokens that were drawn last, to who still waits for them."""
        ahead, self._ahead = self._ahead, None
        if ahead is None:
            return
        for lane, drawn in enumerate(zip(*map(np.asarray, ahead.found), strict=True)):
            text = ahead.texts[lane]
            if text is not None and self._lanes[lane] is text:
                self._hand_over(text, lane, ahead.logits, *drawn)

    def _hand_over(self, text: Writing, lane, logits, token, log_prob, finite):
        """Give a text its token; take its lane away if that was the last."""
        more, error = False, None
        if finite:
            text.note(int(token))
            self.drawn += 1
            tops = _likeliest(logits, lane, self._config.n_vocab, text.tops)
            more = text.take(Drawn(int(token), float(log_prob), tops))
        else:
            error = FloatingPointError(NOT_FINITE)
        if not more or len(text.tokens) >= text.row.limit:
            self._lanes[lane], self._options = None, None
            text.end(error)


class _Ahead(NamedTuple):
    """A step that was sent to the device: for whom, and what it gives."""

    texts: list[Writing | None]
    logits: Array
    found: tuple[Array, Array, Array]  # token, log-probability, finite


@dataclass(eq=False)
class _Work:
    work: Callable[[], Any]
    done: Future[Any]

    def run(self) -> None:
        if not self.done.set_running_or_notify_cancel():
            return
        try:
            self.done.set_result(self.work())
        except Exception as error:  # noqa: BLE001 whoever waits for it raises it
            self.done.set_exception(error)


def _same_prompt(one, other):
    return np.array_equal(one.row.prompt, other.row.prompt)


def _power_of_two(count):
    return 1 << max(count - 1, 0).bit_length()


def _stack(rows, width, dtype):
    """Return the rows in one array, zeros where one has none; None if none has."""
    if all(row is None for row in rows):
        return None
    return np.stack([np.zeros(width, dtype) if row is None else row for row in rows])


def _likeliest(logits, lane, n_vocab, count) -> list[tuple[int, float]]:
    if not count:
        return []
    row = np.asarray(logits)[lane, :n_vocab].astype(np.float64)
    return likeliest(row - _log_sum_exp(row), count)


def likeliest(
    log_probs: Float[np.ndarray, " V"], count: int
) -> list[tuple[int, float]]:
    """Return the `count` likeliest ids with their log-probabilities, best first."""
    count = min(count, len(log_probs))
    some = np.argpartition(-log_probs, count - 1)[:count]
    order = some[np.lexsort((some, -log_probs[some]))]
    return [(int(i), float(log_probs[i])) for i in order]


def _log_sum_exp(row):
    most = row.max()
    return most + np.log(np.exp(row - most).sum())


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _empty(config: ModelConfig, lanes: int, slots: int):
    """Return an empty cache; each array of it its own, since they are donated."""
    return model.init_cache(config, lanes, slots)


@functools.partial(jax.jit, static_argnames="config")
def _read(config: ModelConfig, unstacked: Any, prompts: Int[Array, "1 T"]):
    source = jnp.zeros(1, jnp.int32)
    return prefill(config, unstacked, prompts, source, slots=prompts.shape[1])


@functools.partial(jax.jit, donate_argnames="cache")
def _insert(cache: Any, read: Any, row: Int[Array, ""]):
    """Return the cache with what was read from a prompt in the rows from `row` on."""

    def put(old: Array, new: Array) -> Array:
        new = new[:, : old.shape[1]]
        return jax.lax.dynamic_update_slice(old, new, (row, 0, 0))

    return jax.tree.map(put, cache, read)


@functools.partial(jax.jit, static_argnames=("heads", "slots"))
def _rearrange(cache: Any, source: Int[Array, " R"], *, heads: int, slots: int):
    """Return the cache of lanes `source`, with `slots` positions each."""

    def fit(old: Array) -> Array:
        more = max(slots - old.shape[1], 0)
        return jnp.pad(old[:, :slots], ((0, 0), (0, more), (0, 0)))

    return jax.tree.map(fit, tuple(layer.take(source, heads) for layer in cache))


@functools.partial(jax.jit, static_argnames="config", donate_argnames="cache")
def _forward(
    config: ModelConfig,
    unstacked: Any,
    cache: Any,
    token: Int[Array, " B"],
    place: Int[Array, " B"],
):
    """Return the logits after each lane's last token, and the cache with it."""
    hidden, cache = model.decode(
        config, unstacked, token[:, None], place[:, None], cache
    )
    return model.project(config, unstacked, hidden)[:, 0], cache


@functools.partial(jax.jit, static_argnames="uses")
def _draw(
    logits: Float[Array, "B V"],
    seen: Bool[Array, "B V"] | None,
    added: Float[Array, "B V"] | None,
    options: Options,
    counts: Int[Array, " B"],
    *,
    uses: Uses,
):
    """Return each lane's next token, its log-probability, and if logits are finite."""
    changed = logits if added is None else logits + added
    token = draw(changed, seen, options, counts, uses)
    chosen = jnp.take_along_axis(logits, token[:, None], axis=-1)[:, 0]
    log_prob = chosen - jax.nn.logsumexp(logits, axis=-1)
    return token, log_prob, jnp.all(jnp.isfinite(logits), axis=-1)
