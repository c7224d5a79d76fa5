"""A spike by its definition, in float64 and plain numpy."""

import jax.numpy as jnp
import numpy as np
import pytest

from gpt2_jax import spikes


def follow(losses, norms, sigmas=6.0):
    """Return which steps are spikes, and the history after all."""
    history, found = spikes.start(), []
    for loss, norm in zip(losses, norms, strict=True):
        pair = jnp.float32(loss), jnp.float32(norm)
        spike, history = spikes.judge(history, *pair, sigmas)
        found.append(bool(spike))
    return found, history


def expected(losses, norms, sigmas):
    recent: list[np.ndarray] = []
    found = []
    for new in np.array([losses, norms]).T:
        limit = np.full(2, np.inf)
        if len(recent) >= 64:
            last = np.array(recent[-128:])
            limit = last.mean(axis=0) + sigmas * last.std(axis=0)
        found.append(bool((new > limit).any()))
        recent.append(np.minimum(new, limit))
    return found


@pytest.mark.parametrize("sigmas", [2.0, 6.0])
def test_spikes_are_those_of_the_definition(sigmas):
    rng = np.random.default_rng(0)
    losses, norms = rng.normal(3.0, 0.1, 300), rng.normal(1.0, 0.05, 300)
    losses[[70, 150, 151, 290]] += 1.0
    norms[[20, 100, 260]] += 5.0  # the first before any is judged
    found, history = follow(losses, norms, sigmas)
    assert found == expected(losses, norms, sigmas)
    assert int(history.written) == 300
    if sigmas == 6.0:
        assert np.flatnonzero(found).tolist() == [70, 100, 150, 151, 260, 290]


def test_no_step_is_judged_by_fewer_than_64():
    found, _ = follow([1.0] * 63 + [1e6], [1.0] * 64)
    assert not any(found)
    found, _ = follow([1.0] * 64 + [1e6], [1.0] * 65)
    assert found == [False] * 64 + [True]


def test_a_giant_does_not_hide_the_next_one():
    losses = [3.0 + 0.01 * (i % 5) for i in range(128)] + [1e30, 5.0, 3.0, 5.0]
    found, history = follow(losses, [1.0] * len(losses))
    assert found[128:] == [True, True, False, True]
    assert float(history.recent.max()) < 4


def test_a_loss_that_stays_higher_is_accepted_in_time():
    losses = [3.0 + 0.01 * (i % 5) for i in range(128)] + [3.2] * 20
    found, _ = follow(losses, [1.0] * len(losses))
    assert found[128] and not found[-1]


def test_rounding_is_no_spike():
    found, _ = follow([3.0] * 100 + [3.000001, 3.0001], [1e4] * 102)
    assert found == [False] * 101 + [True]
