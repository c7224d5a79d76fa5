"""Batches of token windows: each a pure function of (seed, step).

A split of n tokens holds (n - 1) // T windows of T + 1 tokens; neighbours share one
token, so every token but the first is a target exactly once per epoch. Each epoch
visits all windows in a new order. The position in the data is the step number.
"""

from collections.abc import Iterator
from typing import NamedTuple, Protocol, runtime_checkable

import grain
import numpy as np
from jaxtyping import Int32

from gpt2_jax.config import ConfigError
from gpt2_jax.loss import IGNORED


@runtime_checkable
class Tokens(Protocol):
    """One long array of tokens, as `TokenShards` gives it."""

    n_tokens: int

    def read(self, start: int, count: int) -> Int32[np.ndarray, " count"]:
        """Return `count` tokens from `start` on."""
        ...


class BatchShape(NamedTuple):
    """How the sequences of one step are laid out over time and processes."""

    accumulation: int  # micro-batches per step
    sequences: int  # per micro-batch, over all processes
    n_ctx: int  # targets per sequence
    rows: tuple[int, ...] | None = None  # of a micro-batch that are read; None: all

    def numbers(self) -> np.ndarray:
        """Return which of the step's sequences this process reads, (A, B)."""
        step = np.arange(self.accumulation * self.sequences)
        micros = step.reshape(self.accumulation, self.sequences)
        return micros if self.rows is None else micros[:, list(self.rows)]


class _Windows:
    def __init__(self, tokens, n_ctx):
        self.tokens, self.n_ctx = tokens, n_ctx

    def __len__(self):
        return (self.tokens.n_tokens - 1) // self.n_ctx

    def __getitem__(self, index):
        return self.tokens.read(int(index) * self.n_ctx, self.n_ctx + 1)


def train_batches(
    tokens: Tokens, shape: BatchShape, *, seed: int, start: int, stop: int, ahead: int
) -> Iterator[Int32[np.ndarray, "A B W"]]:
    """Yield the batches of steps `start` to `stop`, read `ahead` by threads.

    Raises
    ------
    ConfigError
        If the tokens do not fill one window.
    """
    windows = _Windows(tokens, shape.n_ctx)
    if len(windows) == 0:
        raise ConfigError(
            f"training split has {tokens.n_tokens} tokens; allowed: at least "
            f"model.n_ctx + 1 = {shape.n_ctx + 1}; add text or lower --model.n-ctx"
        )
    order = grain.MapDataset.source(windows).seed(seed).shuffle().repeat()
    numbers = shape.numbers()

    def read(step: int) -> np.ndarray:
        first = step * shape.accumulation * shape.sequences
        flat = np.stack([order[first + n] for n in numbers.ravel().tolist()])
        return flat.reshape(*numbers.shape, -1)

    options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=ahead)
    return iter(grain.MapDataset.range(start, stop).map(read).to_iter_dataset(options))


def eval_batches(
    tokens: Tokens, sequences: int, n_ctx: int, rows: tuple[int, ...] | None = None
) -> Iterator[Int32[np.ndarray, "B W"]]:
    """Yield all windows of a split in order, the last filled up with -1.

    Every target is scored exactly once; all processes see the same number of
    batches, each its own `rows` of them (None: all).
    """
    windows = -(-(tokens.n_tokens - 1) // n_ctx)
    rows = tuple(range(sequences)) if rows is None else rows
    for first in range(0, windows, sequences):
        batch = np.full((len(rows), n_ctx + 1), IGNORED, np.int32)
        for out, row in zip(batch, rows, strict=True):
            start = (first + row) * n_ctx
            count = min(n_ctx + 1, tokens.n_tokens - start)
            if count > 1:
                out[:count] = tokens.read(start, count)
        yield batch
