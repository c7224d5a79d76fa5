"""What a model makes of texts, against the model itself and numpy by hand."""

import dataclasses
import functools
import inspect
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt2_jax import features, model
from gpt2_jax.config import ConfigError, ModelConfig
from gpt2_jax.pretrained import GPT2
from gpt2_jax.tokenizer import load_tokenizer

# A row beside longer ones is summed in another order than alone.
CLOSE = dict(rtol=1e-5, atol=1e-5)
WIDE = ModelConfig(  # n_ctx with three buckets: 64, 96 and 100
    n_vocab=257, n_ctx=100, n_embd=8, n_layer=2, n_head=2, dtype="float32"
)
LENGTHS = (5, 1, 16, 3)


@functools.cache
def random_params(config):
    shapes = jax.eval_shape(lambda: model.init(config, jax.random.key(0)))
    random = np.random.default_rng(0)

    def draw(path, leaf):
        values = 0.3 * random.standard_normal(leaf.shape, np.float32)
        return jnp.asarray(values + ("scale" in jax.tree_util.keystr(path)))

    return jax.tree.map_with_path(draw, shapes)


def apply_compiled(config, params, ids):
    """Return logits, compiled."""
    run = jax.jit(functools.partial(model.apply, config))
    return run(params, jnp.asarray(ids))


def random_rows(config, lengths=LENGTHS):
    random = np.random.default_rng(1)
    return [random.integers(0, config.n_vocab, n) for n in lengths]


@pytest.fixture(scope="module")
def lm():
    return GPT2(WIDE, random_params(WIDE), load_tokenizer("bytes"))


@pytest.fixture
def small(tiny):
    """Return config, parameters, rows of different lengths, and their batch."""
    rows = random_rows(tiny)
    return tiny, random_params(tiny), rows, features.pad(tiny, rows)


def test_rows_are_padded_with_0_on_the_right(tiny):
    ids, mask = features.pad(tiny, [np.array([7, 8]), np.array([9])])
    np.testing.assert_array_equal(ids, [[7, 8], [9, 0]])
    np.testing.assert_array_equal(mask, [[True, True], [True, False]])
    assert ids.dtype == np.int32
    assert [x.shape for x in features.pad(tiny, [])] == [(0, 0), (0, 0)]


def test_too_long_a_row_is_refused_or_loses_its_start(tiny):
    row = np.arange(tiny.n_ctx + 3)
    message = "text of 19 tokens exceeds the context of 16 by 3; .*truncate left"
    with pytest.raises(ConfigError, match=message):
        features.pad(tiny, [row[:4], row])
    ids, mask = features.pad(tiny, [row, row[:2]], truncate="left")
    np.testing.assert_array_equal(ids[0], row[3:])
    np.testing.assert_array_equal(ids[1, :3], [0, 1, 0])
    np.testing.assert_array_equal(mask.sum(axis=1), [16, 2])


@pytest.mark.parametrize(
    "row, message",
    [
        ([], "0 tokens"),
        ([0, 61], "token id is 61; allowed: 0 <= id < 61"),
        ([-1, 2], "token id is -1"),
    ],
)
def test_what_is_no_token_is_refused(tiny, row, message):
    with pytest.raises(ConfigError, match=message):
        features.pad(tiny, [np.array([3]), np.array(row, int)])


def test_another_way_to_truncate_is_refused(tiny):
    pad = inspect.unwrap(features.pad)  # without the hook, which refuses it as well
    with pytest.raises(ConfigError, match="truncate is 'right'; allowed: None or 'lef"):
        pad(tiny, [np.array([1])], truncate="right")


def test_logits_are_those_of_the_model(small):
    config, params, rows, batch = small
    ours = features.logits(config, params, batch.ids)
    assert (ours.shape, ours.dtype) == ((4, 16, config.n_vocab), jnp.float32)
    for logits, row in list(zip(ours, rows, strict=True))[:2]:
        alone = apply_compiled(config, params, row[None])[0]
        np.testing.assert_allclose(logits[: len(row)], alone, **CLOSE)


def test_states_have_shapes_and_zeros_where_no_token_is(small):
    config, params, _, batch = small
    layers = config.n_layer
    states = features.hidden_states(config, params, batch)
    maps = features.attentions(config, params, batch)
    assert (states.shape, maps.shape) == (
        (layers + 1, 4, 16, 32),
        (layers, 4, 4, 16, 16),
    )
    assert states.dtype == maps.dtype == np.float32
    padded = ~batch.mask
    assert padded.sum() == 4 * 16 - sum(LENGTHS)
    assert not states[:, padded].any()
    assert states[:, batch.mask].all()
    assert not maps.transpose(1, 3, 0, 2, 4)[padded].any()
    assert not maps.transpose(1, 4, 0, 2, 3)[padded].any()


@pytest.mark.parametrize("layer", [0, 1, 2, 3, -1, -4])
def test_a_layer_is_counted_as_in_hidden_states(small, layer):
    config, params, _, batch = small
    ours = features.features(config, params, batch, layer=layer)
    assert ours.dtype == np.float32
    states = features.hidden_states(config, params, batch)
    np.testing.assert_allclose(ours, states[layer], **CLOSE)
    for other in set(range(4)) - {layer % 4}:
        assert np.abs(ours - states[other]).max() > 0.1


def test_the_first_layer_is_the_sum_of_the_embeddings(small):
    config, params, rows, batch = small
    ours = features.features(config, params, batch, layer=0)
    wte, wpe = (np.asarray(params[name]["embedding"]) for name in ("wte", "wpe"))
    for values, row in zip(ours, rows, strict=True):
        wanted = wte[row] + wpe[: len(row)]
        np.testing.assert_allclose(values[: len(row)], wanted, rtol=1e-6)


def test_the_last_layer_gives_the_logits(small):
    config, params, _, batch = small
    last = features.features(config, params, batch)
    logits = last @ np.asarray(model.output_matrix(params))[: config.n_vocab].T
    theirs = np.asarray(features.logits(config, params, batch.ids))
    np.testing.assert_allclose(logits[batch.mask], theirs[batch.mask], **CLOSE)


def test_a_row_of_a_batch_is_the_row_alone(small):
    config, params, rows, batch = small
    states = features.hidden_states(config, params, batch)
    maps = features.attentions(config, params, batch)
    pooled = features.features(config, params, batch, pool="mean")
    for i, row in enumerate(rows):
        alone, n = features.pad(config, [row]), len(row)
        ours = features.hidden_states(config, params, alone)[:, 0]
        np.testing.assert_allclose(ours, states[:, i, :n], **CLOSE)
        ours = features.attentions(config, params, alone)[:, 0]
        np.testing.assert_allclose(ours, maps[:, i, :, :n, :n], **CLOSE)
        ours = features.features(config, params, alone, pool="mean")
        np.testing.assert_allclose(ours[0], pooled[i], **CLOSE)


@pytest.mark.parametrize("layer", [1, -1])
def test_a_pool_is_the_mean_or_the_last_of_the_tokens(small, layer):
    config, params, rows, batch = small
    values = features.features(config, params, batch, layer=layer)
    tokens = [value[: len(row)] for value, row in zip(values, rows, strict=True)]
    wanted = {
        "mean": [part.mean(axis=0, dtype=np.float64) for part in tokens],
        "last": [part[-1] for part in tokens],
    }
    for pool, theirs in wanted.items():
        ours = features.features(config, params, batch, layer=layer, pool=pool)
        assert (ours.shape, ours.dtype) == ((4, 32), np.float32)
        np.testing.assert_allclose(ours, np.stack(theirs), **CLOSE)


def test_half_precision_is_pooled_in_float32(small):
    config, params, _, batch = small
    half = dataclasses.replace(config, dtype="bfloat16")
    values = features.features(half, params, batch, layer=1)
    pooled = features.features(half, params, batch, layer=1, pool="mean")
    assert values.dtype == pooled.dtype == np.float32
    np.testing.assert_allclose(pooled[2], values[2].mean(axis=0), **CLOSE)
    assert features.scores(half, params, batch)[0].log_probs.dtype == np.float32


@pytest.mark.parametrize(
    "how, message",
    [
        ({"layer": 3}, "layer is 3; allowed: -3 <= layer <= 2"),
        ({"layer": -4}, "layer is -4; allowed"),
        ({"pool": "max"}, "pool is 'max'; allowed: None, 'mean' or 'last'"),
    ],
)
@pytest.mark.parametrize("texts", [["a"], []])
def test_a_layer_or_pool_that_there_is_not_is_refused(lm, texts, how, message):
    call = inspect.unwrap(features.features)  # without the hook
    with pytest.raises(ConfigError, match=message):
        call(WIDE, lm.params, features.Batch(*lm.encode(texts)), **how)


def test_no_text_gives_arrays_without_rows(lm):
    assert lm.features([]).shape == (0, 0, 8)
    assert (
        lm.features([], -1, "mean").shape == lm.features([], 0, "last").shape == (0, 8)
    )
    assert lm.features([]).dtype == np.float32
    assert lm.hidden_states([]).shape == (3, 0, 0, 8)
    assert lm.attentions([]).shape == (2, 0, 2, 0, 0)
    assert lm.score([]) == []


def test_attention_is_causal_and_sums_to_1(small):
    config, params, _, batch = small
    maps = features.attentions(config, params, batch)
    assert (maps >= 0).all()
    np.testing.assert_array_equal(maps, np.tril(maps))
    sums = maps.sum(axis=-1).transpose(1, 3, 0, 2)  # row, query, layer, head
    np.testing.assert_allclose(sums[batch.mask], 1, rtol=1e-6)
    np.testing.assert_array_equal(maps[..., 0, 0], 1)


def test_scores_are_the_log_softmax_of_the_model(small):
    config, params, rows, batch = small
    found = features.scores(config, params, batch)
    every = jax.nn.log_softmax(apply_compiled(config, params, batch.ids))
    for score, row, rows_log_probs in zip(found, rows, every, strict=True):
        log_probs = rows_log_probs[np.arange(len(row) - 1), row[1:]]
        np.testing.assert_array_equal(score.token_ids, row[1:])
        np.testing.assert_allclose(score.log_probs, log_probs, **CLOSE)
        assert score.total == pytest.approx(float(log_probs.sum()), rel=1e-5)
        if len(row) > 1:
            perplexity = math.exp(-log_probs.mean())
            assert score.perplexity == pytest.approx(perplexity, rel=1e-5)


def test_a_single_token_has_no_score_and_no_perplexity(small):
    config, params, rows, batch = small
    score = features.scores(config, params, batch)[1]
    assert len(rows[1]) == 1
    assert (len(score.token_ids), len(score.log_probs), score.total) == (0, 0, 0.0)
    assert math.isnan(score.perplexity)


def test_a_hopeless_text_has_infinite_perplexity(tiny):
    params = jax.tree.map(lambda leaf: 100 * leaf, random_params(tiny))
    (score,) = features.scores(tiny, params, features.pad(tiny, random_rows(tiny, [9])))
    assert score.total < -709 * 8  # exp(709.8) is the largest of float64
    assert score.perplexity == math.inf


def test_buckets_change_no_result(lm):
    text = "abcdefghij" * 10
    ids = np.frombuffer(text.encode(), np.uint8)
    whole = lm.hidden_states(text)[:, 0]  # 100 tokens, no padding at all
    logits = apply_compiled(WIDE, lm.params, ids[None].astype(np.int32))[0]
    for n in (1, 64, 65, 97, 99):
        states = lm.hidden_states(text[:n])
        assert states.shape[2] == n
        np.testing.assert_allclose(states[:, 0], whole[:, :n], **CLOSE)
        last = lm.features(text[:n], -1, "last")
        np.testing.assert_allclose(last[0], whole[-1, n - 1], **CLOSE)
        np.testing.assert_allclose(lm.logits(ids[:n]), logits[:n], **CLOSE)


def test_lengths_of_one_bucket_share_every_program(lm):
    def call(n):
        text = "a" * n
        lm.features(text)
        lm.features(text, 1, "mean")
        lm.features(text, 1, "last")
        lm.hidden_states(text)
        lm.attentions(text)
        lm.score(text)

    call(64)
    names = []

    def listen(name, *_, **__):
        names.append(name)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        for n in (1, 2, 40, 63):
            call(n)
        assert not names  # neither traced nor compiled
        call(65)
        assert names
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


@pytest.mark.parametrize("length", [1, 5, 63, 64, 65, 100])
def test_next_log_probs_are_those_of_the_logits(lm, length):
    ids = random_rows(WIDE, [length])[0]
    logits = np.asarray(apply_compiled(WIDE, lm.params, ids[None]))[0]
    expected = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    found = np.array(list(features.next_log_probs(WIDE, lm.params, ids)))
    assert found.shape == (length, WIDE.n_vocab)
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_next_log_probs_refuse_what_logits_refuse(lm):
    with pytest.raises(ConfigError, match="by 1"):
        list(features.next_log_probs(WIDE, lm.params, np.zeros(101, int)))
    with pytest.raises(ConfigError, match="token id is 257"):
        list(features.next_log_probs(WIDE, lm.params, np.array([257])))
