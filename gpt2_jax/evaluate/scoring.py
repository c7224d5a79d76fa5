"""Log-probabilities of targets in rows of tokens: what every zero-shot column asks.

Rows are sorted by length and computed in batches of few shapes; only hidden states that
predict a target meet the output matrix. Log-probabilities are float32, sums float64.
What is done can be kept in a journal, so that a killed evaluation goes on.

Axes: B row, T position, S target, V vocabulary (padded), D width.
"""

import functools
import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Bool, Float, Int, Integer

from gpt2_jax import model, sharding
from gpt2_jax.config import ConfigError, ModelConfig, check
from gpt2_jax.decode import bucket, check_tokens
from gpt2_jax.hardware import find_chip
from gpt2_jax.loss import IGNORED, choose_chunk
from gpt2_jax.pretrained import GPT2

TOKENS_AT_ONCE = 8192  # of a batch on one device


class Request(NamedTuple):
    """A row of tokens, and which of them are to be predicted."""

    tokens: Integer[np.ndarray, " n"]  # the last is predicted, never read
    first: int  # of the targets, >= 1: each is predicted from all before it


class Answer(NamedTuple):
    """How a model predicts the targets of one request."""

    nll: float  # summed over the targets, in nats
    greedy: bool  # every target is the likeliest token at its place
    last: bool  # the last target is


class Choice(NamedTuple):
    """A beginning and what may follow it."""

    prefix: Integer[np.ndarray, " n"]
    endings: tuple[Integer[np.ndarray, " _"], ...]


def windows(n_tokens: int, window: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """Yield (begin, end, first): feed begin..end - 1, score targets first + 1 .. end.

    Each of the targets 1 .. n - 1 is scored once: those of the first window all, later
    ones the last `stride` only, so that they see at least window - stride tokens.
    """
    end = first = 0
    while end < n_tokens - 1:
        end = min(end + (stride if end else window), n_tokens - 1)
        yield max(0, end - window), end, first
        first = end


def window_requests(
    tokens: Integer[np.ndarray, " n"], window: int, stride: int
) -> list[Request]:
    """Return the requests of a text scored by a sliding window."""
    return [
        Request(tokens[begin : end + 1], first + 1 - begin)
        for begin, end, first in windows(len(tokens), window, stride)
    ]


def score(
    lm: GPT2,
    requests: Sequence[Request],
    *,
    banned: Bool[np.ndarray, " _"] | None = None,
    hits: bool = True,
    journal: Path | None = None,
    say: Callable[[str], None] = lambda line: None,
    devices: Sequence[Any] | None = None,
    tokens_at_once: int = TOKENS_AT_ONCE,
) -> list[Answer]:
    """Return an answer for each request, whatever the batches and devices.

    Tokens that are `banned` are no answer to the first target: that changes `greedy`
    (and `last` of a single target), not the probabilities. Without `hits` only `nll` is
    computed, the rest is False. `journal` is a file that
    keeps answers while they come; a second call with the same model and requests goes
    on from it.

    Raises
    ------
    ConfigError
        If a request has no target or exceeds the context, with its number.
    """
    for number, request in enumerate(requests):
        _check_request(lm.config, number, request)
    done = _Journal(journal, lm, requests, banned)
    left = [i for i in range(len(requests)) if i not in done.answers]
    left.sort(key=lambda i: (len(requests[i].tokens), i), reverse=True)
    mesh, params = _place(lm, jax.local_devices() if devices is None else devices)
    mask = np.zeros(lm.config.n_vocab_padded, bool)
    if banned is not None:
        mask[: len(banned)] = banned
    progress = _Progress(len(left), sum(len(requests[i].tokens) for i in left), say)
    while left:
        size, batch = _batch(lm.config, mesh, requests, left, tokens_at_once)
        taken, left = left[:size], left[size:]
        found = _answer(lm.config, mesh, hits, params, batch, jnp.asarray(mask))
        nll, greedy, last = (np.asarray(x)[: len(taken)] for x in found)
        counts = [len(requests[i].tokens) - requests[i].first for i in taken]
        sums = [
            float(np.sum(row[:n], dtype=np.float64))
            for row, n in zip(nll, counts, strict=True)
        ]
        done.add(taken, sums, greedy.tolist(), last.tolist())
        progress.add(len(taken), sum(len(requests[i].tokens) for i in taken))
    return [Answer(*done.answers[i]) for i in range(len(requests))]


def _check_request(config, number, request):
    length, first = len(request.tokens), request.first
    check_tokens(config, request.tokens)
    if not 1 <= first < length:
        raise ConfigError(
            f"request {number} predicts from token {first} of {length}; allowed: 1 to "
            f"{length - 1}, so that a token stands before each target"
        )
    if length > config.n_ctx + 1:
        raise ConfigError(
            f"request {number} reads {length - 1} tokens; allowed: at most the context "
            f"of {config.n_ctx}"
        )


def _place(lm, devices) -> tuple[Mesh, Any]:
    """Return a mesh over the devices, and the parameters on it."""
    chip, count = find_chip(devices[0].device_kind), len(devices)
    memory = None if chip is None else chip.hbm_bytes
    axes, _ = sharding.choose_mesh(lm.config, count, memory, sequences=count)
    mesh = sharding.make_mesh(axes, devices)
    specs, _ = sharding.param_specs(lm.params, lm.config, mesh)
    places = jax.tree.map(
        lambda spec: NamedSharding(mesh, spec),
        specs,
        is_leaf=lambda x: isinstance(x, jax.P),
    )
    return mesh, jax.device_put(lm.params, places)


class _Batch(NamedTuple):
    ids: Int[Any, "B T"]
    positions: Int[Any, "B S"]  # whose hidden state predicts the target
    targets: Int[Any, "B S"]


def _batch(config, mesh, requests, left, tokens_at_once) -> tuple[int, _Batch]:
    """Return how many of the longest requests left to take, and their batch."""
    longest = bucket(len(requests[left[0]].tokens) - 1, config.n_ctx)
    parts = sharding.batch_parts(mesh)
    each = -(-len(left) // parts)  # few shapes, no more than half of one padding
    rows = min(max(1, tokens_at_once // longest), 1 << (each - 1).bit_length()) * parts
    taken = [requests[i] for i in left[:rows]]
    most = max(len(request.tokens) - request.first for request in taken)
    most = min(longest, 1 << (most - 1).bit_length())
    ids = np.zeros((rows, longest), np.int32)
    positions = np.zeros((rows, most), np.int32)
    targets = np.full((rows, most), IGNORED, np.int32)
    for i, (tokens, first) in enumerate(taken):
        count = len(tokens) - first
        ids[i, : len(tokens) - 1] = tokens[:-1]
        positions[i, :count] = np.arange(first - 1, len(tokens) - 1)
        targets[i, :count] = tokens[first:]
    where = sharding.batch_sharding(mesh)
    return len(taken), _Batch(
        *(jax.device_put(x, where) for x in (ids, positions, targets))
    )


@functools.partial(jax.jit, static_argnames=("config", "mesh", "hits"))
def _answer(
    config: ModelConfig, mesh: Mesh, hits: bool, params: Any, batch: _Batch, banned: Any
):
    hidden = model.hidden_states(config, params, batch.ids, mesh=mesh)
    found = _judge(config, params, hidden, batch.positions, batch.targets, banned)
    return found if hits else (found[0], *[jnp.zeros(len(batch.ids), bool)] * 2)


def _judge(
    config: ModelConfig,
    params: Any,
    hidden: Float[Array, "B T D"],
    positions: Int[Array, "B S"],
    targets: Int[Array, "B S"],
    banned: Bool[Array, " V"],
) -> tuple[Float[Array, "B S"], Bool[Array, " B"], Bool[Array, " B"]]:
    """Return each target's nll (0 for none), whether all, whether the last is hit."""
    count, many = targets.shape
    picked = jnp.take_along_axis(hidden, positions[..., None], axis=1)
    chunk = choose_chunk(count, many, config.n_vocab_padded)

    def look(part):
        x, wanted = part
        logits = model.project(config, params, x)
        top = jnp.max(logits, axis=-1)
        row = jnp.maximum(wanted, 0)[..., None]
        at = jnp.take_along_axis(logits, row, axis=-1)[..., 0]
        norm = jnp.log(jnp.sum(jnp.exp(logits - top[..., None]), axis=-1))
        nll = jnp.where(wanted == IGNORED, 0.0, norm + top - at)
        return nll, _is_likeliest(logits, row[..., 0])

    parts = [
        jnp.moveaxis(x.reshape(count, many // chunk, chunk, *x.shape[2:]), 1, 0)
        for x in (picked, targets)
    ]
    nll, hits = (
        jnp.moveaxis(x, 0, 1).reshape(count, many)
        for x in jax.lax.map(look, tuple(parts))
    )
    first = jnp.where(
        banned, -jnp.inf, model.project(config, params, picked[:, :1])[:, 0]
    )
    hits = hits.at[:, 0].set(_is_likeliest(first, targets[:, 0]))
    real = targets != IGNORED
    ending = jnp.sum(real, axis=1, keepdims=True) - 1
    last = jnp.take_along_axis(hits, ending, axis=1)[:, 0]
    return nll, jnp.all(hits | ~real, axis=1), last


def _is_likeliest(logits, wanted):
    """Say whether `wanted` is the argmax: of equal ones the first, as numpy's."""
    top = jnp.max(logits, axis=-1, keepdims=True)
    ids = jnp.arange(logits.shape[-1])[(None,) * wanted.ndim]
    first = jnp.min(jnp.where(logits >= top, ids, logits.shape[-1]), axis=-1)
    return first == wanted


def score_choices(
    lm: GPT2,
    choices: Sequence[Choice],
    *,
    journal: Path | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> list[list[float]]:
    """Return the nll of each ending after its prefix, in nats; a prefix is read once.

    A prefix too long for the context loses its start.
    """
    config = lm.config
    for number, choice in enumerate(choices):
        _check_choice(config, number, choice)
    done = _Journal(journal, lm, choices, None)
    unstacked = model.unstack(config, lm.params)
    left = [i for i in range(len(choices)) if i not in done.answers]
    progress = _Progress(len(left), sum(_size(choices[i]) for i in left), say)
    for i in left:
        nll = _follow(config, unstacked, choices[i])
        done.add([i], [nll])
        progress.add(1, _size(choices[i]))
    return [done.answers[i][0] for i in range(len(choices))]


def _check_choice(config, number, choice):
    check_tokens(config, choice.prefix)
    for ending in choice.endings:
        check_tokens(config, ending)
        name, least = f"ending of choice {number}", f"fewer than {config.n_ctx} tokens"
        check(len(ending) < config.n_ctx, name, f"{len(ending)} tokens", least)


def _size(choice):
    return len(choice.prefix) + sum(map(len, choice.endings))


def _follow(config, unstacked, choice) -> list[float]:
    longest = max(map(len, choice.endings))
    prefix = choice.prefix[-(config.n_ctx - longest + 1) :]
    known, length = len(prefix) - 1, max(8, 1 << (longest - 1).bit_length())
    # The last token of the prefix is read again: it predicts the first of each ending.
    width = bucket(max(known, 1), config.n_ctx)
    ids = np.zeros((1, width), np.int32)
    ids[0, :known] = prefix[:-1]
    rows = np.zeros((len(choice.endings), length), np.int32)
    targets = np.full(rows.shape, IGNORED, np.int32)
    for i, ending in enumerate(choice.endings):
        rows[i, : len(ending)] = [prefix[-1], *ending[:-1]]
        targets[i, : len(ending)] = ending
    nll = np.asarray(_decode(config, unstacked, ids, known, rows, targets))
    return [float(np.sum(row, dtype=np.float64)) for row in nll]


@functools.partial(jax.jit, static_argnames="config")
def _decode(config: ModelConfig, unstacked: Any, ids, known, rows, targets):
    count, length = rows.shape
    slots = min(ids.shape[1] + length, config.n_ctx)
    cache = model.init_cache(config, 1, slots)
    positions = jnp.arange(ids.shape[1])[None]
    _, cache = model.decode(config, unstacked, ids, positions, cache)
    copies = jnp.zeros(count, jnp.int32)
    cache = tuple(slots.take(copies, config.n_head) for slots in cache)
    positions = jnp.broadcast_to(known + jnp.arange(length), rows.shape)
    hidden, _ = model.decode(config, unstacked, rows, positions, cache)
    here = jnp.broadcast_to(jnp.arange(length), rows.shape)
    banned = jnp.zeros(config.n_vocab_padded, bool)
    return _judge(config, unstacked, hidden, here, targets, banned)[0]


class _Journal:
    """Answers by number, kept in a file where there is one."""

    def __init__(self, path, lm, asked, banned):
        self.path, self.answers = path, dict[int, list[Any]]()
        if path is None:
            return
        self.name = _fingerprint(lm, asked, banned)
        lines = path.read_text().splitlines() if path.exists() else []
        for line in lines:
            try:
                record = json.loads(line)
            except ValueError:
                continue  # cut short by a kill
            if record["of"] == self.name:
                self._take(*record["answers"])

    def _take(self, numbers, *columns):
        for number, *values in zip(numbers, *columns, strict=True):
            self.answers[number] = values

    def add(self, *columns):
        self._take(*columns)
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a") as file:
                file.write(f"\n{json.dumps(dict(of=self.name, answers=columns))}\n")


def _fingerprint(lm, asked, banned):
    """Return a digest of the model and of what it is asked."""
    whole = hashlib.sha256(repr(lm.config).encode())
    for leaf in jax.tree.leaves(lm.params):
        whole.update(np.ascontiguousarray(leaf).view(np.uint8).data)
    for leaf in jax.tree.leaves(list(asked)):
        whole.update(np.asarray(leaf, np.int64).tobytes() + b"|")
    whole.update(b"" if banned is None else np.asarray(banned).tobytes())
    return whole.hexdigest()


class _Progress:
    """Say from time to time how far it is and how long it will take."""

    def __init__(self, rows: int, tokens: int, say: Callable[[str], None]):
        self.rows, self.tokens, self.say = rows, tokens, say
        self.done = self.read = 0
        self.began = self.told = time.monotonic()

    def add(self, rows: int, tokens: int) -> None:
        self.done, self.read = self.done + rows, self.read + tokens
        now = time.monotonic()
        if now - self.told > 10 and self.done < self.rows:
            self.told = now
            left = (now - self.began) * (self.tokens / self.read - 1)
            self.say(f"{self.done} of {self.rows}, {math.ceil(left)} s left")
