"""Decoding: cached = uncached, rows do not see each other, sampling keeps its word."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2_jax import hlo, model
from gpt2_jax.config import ConfigError, MeshConfig
from gpt2_jax.decode import (
    ENDED,
    Decoder,
    Row,
    Sampling,
    _advance,
    _begin,
    bucket,
    generate,
    restrict,
)
from gpt2_jax.sharding import make_mesh, state_shardings

GREEDY = Sampling(temperature=0.0)


@pytest.fixture
def trained(tiny):
    """Return a config and parameters large enough for decided answers."""
    params = model.init(tiny, jax.random.key(0))
    return tiny, jax.tree.map(lambda x: 4.0 * x, params)


def new_tokens(
    trained, prompts, sampling=GREEDY, *, count=6, seed=0, eot=None, slide=False
):
    """Return the new tokens of every prompt, in steps of at most four."""
    config, params = trained
    rows = [Row(np.asarray(prompt), count, seed) for prompt in prompts]
    decoder = Decoder(
        config,
        model.unstack(config, params),
        rows,
        sampling=sampling,
        eot=eot,
        slide=slide,
    )
    parts = []
    while not decoder.done:
        parts.append(decoder.advance(4)[0])
    rows = np.concatenate(parts, axis=1)
    return [row[(row != ENDED) & (row != eot)] for row in rows]


def test_greedy_with_a_cache_equals_greedy_without(trained):
    config, params = trained
    tokens = [5, 9, 2]
    for _ in range(6):
        logits = model.apply(config, params, jnp.asarray([tokens]))
        tokens.append(int(jnp.argmax(logits[0, -1])))
    (new,) = new_tokens(trained, [[5, 9, 2]])
    assert list(new) == tokens[3:]


@pytest.mark.parametrize("devices", [1, 2])
def test_parameters_on_a_mesh_write_the_same(trained, devices):
    config, params = trained
    wanted = new_tokens(trained, [[5, 9, 2], [1]])
    mesh = make_mesh(MeshConfig(data=1, fsdp=devices), jax.devices()[:devices])
    places = state_shardings(params, params, config, mesh)
    on_mesh = jax.device_put(params, places)
    found = new_tokens((config, on_mesh), [[5, 9, 2], [1]])
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(one, other)


def test_layers_on_one_cpu_device_share_the_memory_of_the_stack(trained):
    config, params = trained
    stack = params["blocks"]["mlp"]["up"]["kernel"]
    layers = model.unstack(config, params)["blocks"]
    start = stack.unsafe_buffer_pointer()
    for i, layer in enumerate(layers):
        place = layer["mlp"]["up"]["kernel"].unsafe_buffer_pointer()
        assert place == start + i * stack.nbytes // config.n_layer


def test_a_batch_of_different_lengths_equals_each_prompt_alone(trained):
    prompts = [[3], [7, 1, 4, 4, 2], list(range(10))]
    together = new_tokens(trained, prompts)
    for prompt, new in zip(prompts, together, strict=True):
        np.testing.assert_array_equal(new, new_tokens(trained, [prompt])[0])


def test_a_row_draws_the_same_whatever_its_neighbours_are(trained):
    sampling = Sampling(temperature=1.0, top_k=20, top_p=0.9, repetition_penalty=1.2)
    (alone,) = new_tokens(trained, [[3, 4]], sampling, seed=7)
    for place, prompts in enumerate(([[3, 4], [1]], [[9] * 9, [3, 4], [2]])):
        crowd = new_tokens(trained, prompts, sampling, seed=7)
        np.testing.assert_array_equal(crowd[place], alone)
    assert list(alone) != list(new_tokens(trained, [[3, 4]], sampling, seed=8)[0])


def test_every_row_may_have_options_of_its_own(trained):
    prompts = [[3, 4]] * 4
    each = [GREEDY, Sampling(1.0, 3), Sampling(2.0, None, 0.5), Sampling(min_p=0.2)]
    together = new_tokens(trained, prompts, each)
    for how, new in zip(each, together, strict=True):
        np.testing.assert_array_equal(new, new_tokens(trained, [[3, 4]], how)[0])


def test_rows_of_one_seed_differ_by_their_index(trained):
    config, params = trained
    rows = [Row(np.array([3, 4]), 6, 0, index) for index in range(3)]
    new = generate(
        config, model.unstack(config, params), rows, sampling=Sampling(5.0), eot=None
    )
    assert len({tuple(row) for row in new}) == 3


def test_steps_of_any_size_draw_the_same(trained):
    config, params = trained
    texts = []
    for most in (1, 3, None):
        row = Row(np.array([5, 9]), 10, 3)
        decoder = Decoder(config, model.unstack(config, params), [row], eot=None)
        parts = []
        while not decoder.done:
            parts.append(decoder.advance(most)[0][0])
        texts.append(np.concatenate(parts).tolist())
    assert len(texts[0]) == 10
    assert texts[0] == texts[1] == texts[2]


def test_log_probs_are_those_of_the_model(trained):
    config, params = trained
    hot = Sampling(temperature=3.0, top_k=5, repetition_penalty=2.0)
    row = Row(np.array([5, 9, 2]), 8)
    decoder = Decoder(
        config, model.unstack(config, params), [row], sampling=hot, eot=None
    )
    tokens, found = decoder.advance()
    text = jnp.concatenate([jnp.array([5, 9, 2]), tokens[0]])
    log_probs = jax.nn.log_softmax(model.apply(config, params, text[None])[0])
    wanted = log_probs[jnp.arange(2, 10), tokens[0]]
    np.testing.assert_allclose(found[0], wanted, atol=1e-4)  # sums in another order


def test_a_stopped_row_leaves_the_others_alone(trained):
    config, params = trained
    rows = [Row(np.array([5, 9]), 8), Row(np.array([7]), 8)]
    decoder = Decoder(
        config, model.unstack(config, params), rows, sampling=GREEDY, eot=None
    )
    first, _ = decoder.advance(2)
    decoder.stop(0)
    rest, _ = decoder.advance()
    assert decoder.done and (rest[0] == ENDED).all()
    wanted = new_tokens(trained, [[7]], count=8)[0]
    np.testing.assert_array_equal(np.concatenate([first[1], rest[1]]), wanted)


def test_rows_end_at_their_own_limits(trained):
    config, params = trained
    rows = [Row(np.array([5, 9]), count) for count in (1, 5, 3)]
    decoder = Decoder(
        config, model.unstack(config, params), rows, sampling=GREEDY, eot=None
    )
    tokens, _ = decoder.advance()
    assert (tokens != ENDED).sum(axis=1).tolist() == [1, 5, 3]


def test_min_p_keeps_what_is_likely_enough():
    logits = jnp.log(jnp.array([[0.5, 0.3, 0.15, 0.05]]))
    kept = restrict(logits, None, None, jnp.array([0.3]))  # 0.15 is the least
    assert jnp.isfinite(kept).tolist() == [[True, True, True, False]]
    kept = restrict(logits, None, None, jnp.array([0.31]))
    assert jnp.isfinite(kept).tolist() == [[True, True, False, False]]


def test_a_strong_repetition_penalty_repeats_nothing(trained):
    prompts = [[5, 9, 2], [1]]
    plain = new_tokens(trained, prompts, count=6)
    assert any(len(set(row.tolist())) < 6 for row in plain)
    for prompt, new in zip(
        prompts, new_tokens(trained, prompts, Sampling(0.0, repetition_penalty=1e6)),
        strict=True,
    ):  # fmt: skip
        assert len({*prompt, *new.tolist()}) == len(prompt) + 6


def test_sliding_goes_on_past_the_context(trained):
    config, params = trained
    prompts = [[5, 9, 2], list(range(12))]
    found = new_tokens(trained, prompts, count=40, slide=True)
    for prompt, new in zip(prompts, found, strict=True):
        text, start = [*prompt, *new.tolist()], 0
        assert len(new) == 40
        for end in range(len(prompt), len(text)):
            if end - start == config.n_ctx:  # full: the older half is forgotten
                start = end - config.n_ctx // 2
            seen = jnp.array([text[start:end]])
            logits = model.apply(config, params, seen)[0, -1]
            assert text[end] == int(jnp.argmax(logits))


def test_a_full_prompt_may_slide_and_no_longer_one(trained):
    config, _ = trained
    prompt = list(range(config.n_ctx))
    (new,) = new_tokens(trained, [prompt], count=5, slide=True)
    assert len(new) == 5
    with pytest.raises(ConfigError, match=r"of 16 by 1; .*--truncate left$"):
        new_tokens(trained, [[*prompt, 1]], count=5, slide=True)


def test_buckets_are_few_and_wide_enough():
    sizes = {bucket(n, 1024) for n in range(1, 1025)}
    assert sizes == {64, 96, 128, 192, 256, 384, 512, 768, 1024}
    assert all(bucket(n, 1024) >= n for n in range(1, 1025))
    assert bucket(5, 16) == 16


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
        (dict(sampling=Sampling(min_p=-0.1)), "min_p is -0.1"),
        (dict(sampling=Sampling(repetition_penalty=0.0)), "repetition_penalty is 0"),
        (dict(seed=-1), "seed is -1"),
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
    logits = jnp.asarray([values], jnp.float32)
    kept = restrict(logits, jnp.array([k]), jnp.float32([p]))[0]
    assert {v for v, x in zip(values, kept, strict=True) if jnp.isfinite(x)} == wanted


def test_compiles_are_few(trained):
    """Lengths of a bucket share programs; so do temperatures, limits, k and p."""
    config, params = trained
    trained = dataclasses.replace(config, n_ctx=256), _longer(params, 256)
    new_tokens(trained, [[1]], Sampling(0.5, 3, 0.5), count=3)
    before = _begin._cache_size(), _advance._cache_size()
    for length in range(1, 50):
        how = Sampling(0.1 * length, length, 1 / length if length > 1 else 0.9)
        new_tokens(trained, [[1] * length], how, count=length % 5 + 1)
    assert (_begin._cache_size(), _advance._cache_size()) == before
    new_tokens(trained, [[1] * 200], Sampling(0.5, 3, 0.5), count=3)
    assert _begin._cache_size() == before[0] + 1


@pytest.mark.parametrize("count", [1, 3])
def test_no_token_copies_the_cache(trained, count):
    """What XLA:CPU does to a cache in another layout, at the cost of a third more."""
    config, params = trained
    unstacked = model.unstack(config, params)
    rows = [Row(np.array([i + 1]), 15) for i in range(count)]
    decoder = Decoder(config, unstacked, rows, sampling=GREEDY, eot=None)
    decoder.advance(1)
    state, options = decoder._state, decoder._options
    lowered = _advance.lower(
        config, unstacked, state, options, state.done, jnp.int32(1), jnp.int32(1),
        uses=decoder._uses, eot=None,
    )  # fmt: skip
    computations, _ = hlo.parse_program(lowered.compile().as_text())
    sized = [
        instruction.opcode
        for computation in computations.values()
        for instruction in computation.values()
        if (found := re.match(r"f32\[([\d,]+)\]", instruction.type))
        and math.prod(map(int, found[1].split(","))) == state.cache[0].keys.size
    ]
    writes = sized.count("scatter") + sized.count("dynamic-update-slice")
    assert writes == 2 * config.n_layer  # the sizes seen are those of keys and values
    assert not {"copy", "transpose"} & set(sized)


def _longer(params, n_ctx):
    embedding = jnp.zeros((n_ctx, params["wpe"]["embedding"].shape[1]))
    return {**params, "wpe": {"embedding": embedding}}
