"""A batch is a pure function of (seed, step), on any number of processes."""

import time

import numpy as np
import pytest

from gpt2_jax.config import ConfigError
from gpt2_jax.data.loader import IGNORED, BatchShape, eval_batches, train_batches


class Counting:
    """Token i is i, so a batch shows which tokens it was cut from."""

    def __init__(self, n_tokens: int):
        self.n_tokens = n_tokens

    def read(self, start: int, count: int):
        assert start >= 0 and start + count <= self.n_tokens
        return np.arange(start, start + count, dtype=np.int32)


def batches(tokens, shape, *, seed=0, start=0, stop=6):
    how = dict(seed=seed, start=start, stop=stop, ahead=2)
    return list(train_batches(tokens, shape, **how))


def test_an_epoch_shows_every_token_once_as_a_target_and_the_next_in_a_new_order():
    tokens, shape = Counting(8 * 4 + 1), BatchShape(1, 4, 4)
    seen = [batch[0, :, 1:].ravel() for batch in batches(tokens, shape, stop=4)]
    first, second = np.concatenate(seen[:2]), np.concatenate(seen[2:])
    assert sorted(first) == sorted(second) == list(range(1, 33))
    assert list(first) != list(second)


def test_a_batch_depends_on_seed_and_step_alone():
    tokens, shape = Counting(1000), BatchShape(2, 4, 7)
    whole = batches(tokens, shape)
    resumed = batches(tokens, shape, start=3)
    np.testing.assert_array_equal(whole[3:], resumed)
    assert not np.array_equal(whole, batches(tokens, shape, seed=1))


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_processes_together_read_the_batch_of_one(processes):
    tokens, whole = Counting(1000), BatchShape(2, 8, 7)
    # Rows of a process need not be neighbours: devices of a pod are not.
    rows = [tuple(range(p, 8, processes)) for p in range(processes)]
    parts = [batches(tokens, whole._replace(rows=mine)) for mine in rows]
    for step, batch in enumerate(batches(tokens, whole)):
        for mine, part in zip(rows, parts, strict=True):
            np.testing.assert_array_equal(batch[:, list(mine)], part[step])


def test_accumulation_changes_the_shape_and_not_the_sequences():
    tokens = Counting(1000)
    one = batches(tokens, BatchShape(1, 8, 7))
    four = batches(tokens, BatchShape(4, 2, 7))
    for a, b in zip(one, four, strict=True):
        np.testing.assert_array_equal(a.reshape(8, 8), b.reshape(8, 8))


def test_the_batch_reads_ahead_of_its_consumer():
    """One batch of 2 sequences is taken; more than 2 are read meanwhile."""
    tokens, reads = Counting(1000), []
    read = tokens.read
    tokens.read = lambda start, count: reads.append(start) or read(start, count)
    iterator = train_batches(
        tokens, BatchShape(1, 2, 7), seed=0, start=0, stop=10**9, ahead=4
    )
    next(iterator)
    deadline = time.monotonic() + 10
    while len(reads) < 8 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(reads) >= 8


@pytest.mark.parametrize("n_tokens", [1, 7])
def test_text_too_short_for_one_window_is_refused(n_tokens):
    with pytest.raises(ConfigError, match=r"at least model.n_ctx \+ 1 = 8.*--model"):
        batches(Counting(n_tokens), BatchShape(1, 2, 7))


@pytest.mark.parametrize("n_tokens", [2, 8, 9, 30, 57])
@pytest.mark.parametrize("processes", [1, 2])
def test_evaluation_scores_every_token_but_the_first_exactly_once(n_tokens, processes):
    rows = [tuple(range(p, 4, processes)) for p in range(processes)]
    parts = [list(eval_batches(Counting(n_tokens), 4, 7, mine)) for mine in rows]
    assert len({len(part) for part in parts}) == 1
    targets = np.concatenate([b[:, 1:].ravel() for part in parts for b in part])
    assert sorted(targets[targets != IGNORED]) == list(range(1, n_tokens))
