"""Decoding: cached = uncached, rows do not see each other, sampling keeps its word."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2_jax import model
from gpt2_jax.config import ConfigError
from gpt2_jax.decode import Sampling, generate, restrict

GREEDY = Sampling(temperature=0.0)


@pytest.fixture
def trained(tiny):
    """Return a config and parameters large enough for decided answers."""
    params = model.init(tiny, jax.random.key(0))
    return tiny, jax.tree.map(lambda x: 4.0 * x, params)


def new_tokens(trained, prompts, sampling=GREEDY, *, count=6, seed=0, eot=None):
    config, params = trained
    return generate(
        config,
        model.unstack(config, params),
        [np.asarray(prompt) for prompt in prompts],
        max_new_tokens=count,
        sampling=sampling,
        seed=seed,
        eot=eot,
    )


def test_greedy_with_a_cache_equals_greedy_without(trained):
    config, params = trained
    tokens = [5, 9, 2]
    for _ in range(6):
        logits = model.apply(config, params, jnp.asarray([tokens]))
        tokens.append(int(jnp.argmax(logits[0, -1])))
    (new,) = new_tokens(trained, [[5, 9, 2]])
    assert list(new) == tokens[3:]


def test_a_batch_of_different_lengths_equals_each_prompt_alone(trained):
    prompts = [[3], [7, 1, 4, 4, 2], list(range(10))]
    together = new_tokens(trained, prompts)
    for prompt, new in zip(prompts, together, strict=True):
        np.testing.assert_array_equal(new, new_tokens(trained, [prompt])[0])


def test_a_row_draws_the_same_whatever_its_neighbours_are(trained):
    sampling = Sampling(temperature=1.0, top_k=20, top_p=0.9)
    one = new_tokens(trained, [[3, 4], [1]], sampling, seed=7)
    two = new_tokens(trained, [[3, 4], [9, 9, 9, 9], [2]], sampling, seed=7)
    np.testing.assert_array_equal(one[0], two[0])
    assert list(one[0]) != list(new_tokens(trained, [[3, 4]], sampling, seed=8)[0])


def test_top_k_one_and_a_tiny_top_p_are_greedy(trained):
    prompts = [[3], [7, 1, 4]]
    greedy = new_tokens(trained, prompts)
    for sampling in (Sampling(1.0, 1), Sampling(1.0, None, 1e-6)):
        drawn = new_tokens(trained, prompts, sampling)
        np.testing.assert_array_equal(drawn, greedy)


def test_a_row_ends_before_its_end_of_text(trained):
    (whole,) = new_tokens(trained, [[5, 9, 2]])
    stop = int(whole[3])
    first = list(whole).index(stop)
    (cut,) = new_tokens(trained, [[5, 9, 2]], eot=stop)
    assert list(cut) == list(whole[:first])


def test_padding_is_never_drawn(trained):
    config, params = trained
    loud = jax.tree.map(jnp.copy, params)
    rows = loud["wte"]["embedding"]
    loud["wte"]["embedding"] = rows.at[config.n_vocab :].set(100.0)
    hot = Sampling(temperature=1e6)
    for new in new_tokens((config, loud), [[1]] * 20, hot, count=8):
        assert new.max() < config.n_vocab


def test_the_last_slot_of_the_context_is_used_and_no_more(trained):
    config, _ = trained
    (new,) = new_tokens(trained, [[1] * 10], count=config.n_ctx - 10)
    assert len(new) == 6
    with pytest.raises(ConfigError, match=r"10 tokens .* = 7 exceed .* 16 by 1;"):
        new_tokens(trained, [[1] * 10], count=7)


@pytest.mark.parametrize(
    ("how", "found"),
    [
        (dict(prompts=[[]]), "prompt is '0 tokens'"),
        (dict(prompts=[[61]]), "token id is 61"),
        (dict(prompts=[[-1]]), "token id is -1"),
        (dict(count=0), "max_new_tokens is 0"),
        (dict(sampling=Sampling(-1.0)), "temperature is -1.0"),
        (dict(sampling=Sampling(float("nan"))), "temperature is nan"),
        (dict(sampling=Sampling(1.0, 0)), "top_k is 0"),
        (dict(sampling=Sampling(1.0, None, 0.0)), "top_p is 0.0"),
        (dict(sampling=Sampling(1.0, None, 1.5)), "top_p is 1.5"),
    ],
)
def test_bad_requests_are_refused(trained, how, found):
    with pytest.raises(ConfigError, match=found):
        new_tokens(trained, **{"prompts": [[1]]} | how)


def test_logits_that_are_not_finite_are_an_error(trained):
    config, params = trained
    broken = jax.tree.map(lambda x: x * jnp.nan, params)
    with pytest.raises(FloatingPointError, match="not finite"):
        new_tokens((config, broken), [[1]])


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.floats(-5, 5, width=32), min_size=2, max_size=12, unique=True),
    st.integers(1, 14),
    st.floats(0.05, 1.0),
)
def test_restrict_keeps_the_most_likely(values, k, p):
    """The kept set by its definition, in float64 and plain Python."""
    order = sorted(values, reverse=True)[:k]
    weights = np.exp(np.array(order, np.float64))
    before = np.cumsum(weights) / weights.sum() - weights / weights.sum()
    if np.any(np.abs(before - p) < 1e-5):
        return  # a tie that float32 may decide either way
    wanted = {v for v, b in zip(order, before, strict=True) if b < p}
    kept = restrict(jnp.asarray([values], jnp.float32), k, jnp.float32(p))[0]
    assert {v for v, x in zip(values, kept, strict=True) if jnp.isfinite(x)} == wanted


def test_compiles_are_few(trained):
    """Prompts of 1 to 10 tokens share a bucket; so do temperatures and limits."""
    from gpt2_jax.decode import _generate

    config, params = trained
    trained = dataclasses.replace(config, n_ctx=16), params
    new_tokens(trained, [[1]], Sampling(0.5, 3))
    before = _generate._cache_size()
    for length in range(1, 10):
        new_tokens(
            trained, [[1] * length], Sampling(0.1 * length, 3), count=length % 5 + 1
        )
    assert _generate._cache_size() == before
