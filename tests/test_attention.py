"""Attention against a plain softmax in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from agreement import QUICK

from gpt2_jax.attention import (
    QUERY_BLOCK,
    attend,
    attention_weights,
    causal_attention,
    choose_attention,
    drop,
)
from gpt2_jax.config import ConfigError

# float32 rounding of sums over a few hundred terms of size 1.
CLOSE = dict(rtol=1e-5, atol=1e-5)
quick_jit = functools.partial(jax.jit, compiler_options=QUICK)


def random_qkv(length, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(length), 3)
    return [jax.random.normal(key, (2, length, 2, 4), dtype) for key in keys]


def plain_weights(q, k, scale):
    q, k = (np.asarray(x, np.float64) for x in (q, k))
    scores = scale * np.einsum("btnh,bsnh->bnts", q, k)
    scores = np.where(np.tri(q.shape[1], dtype=bool), scores, -np.inf)
    exponents = np.exp(scores - scores.max(-1, keepdims=True))
    return exponents / exponents.sum(-1, keepdims=True)


def plain_attention(q, k, v, scale):
    weights = plain_weights(q, k, scale)
    return np.einsum("bnts,bsnh->btnh", weights, np.asarray(v, np.float64))


@pytest.mark.parametrize(
    "length, upcast",
    [
        (1, False),
        (5, True),
        (QUERY_BLOCK, False),
        (QUERY_BLOCK + 1, True),
        (2 * QUERY_BLOCK + 9, False),
    ],
)
def test_causal_attention_is_the_plain_softmax(length, upcast):
    q, k, v = random_qkv(length)
    run = functools.partial(causal_attention, scale=0.7, upcast=upcast)
    ours = quick_jit(run)(q, k, v)
    np.testing.assert_allclose(ours, plain_attention(q, k, v, 0.7), **CLOSE)


@pytest.mark.parametrize("upcast", [False, True])
def test_weights_are_the_plain_softmax(upcast):
    q, k, _ = random_qkv(9)
    seen = jnp.tril(jnp.ones((9, 9), bool))[None, None]
    ours = attention_weights(q, k, seen, scale=0.7, upcast=upcast)
    np.testing.assert_allclose(ours, plain_weights(q, k, 0.7), **CLOSE)
    np.testing.assert_array_equal(ours, jnp.tril(ours))
    np.testing.assert_allclose(ours.sum(-1), 1, rtol=1e-6)


def test_weights_of_half_precision_are_float32_and_finer_with_upcast():
    q, k, _ = random_qkv(64, jnp.bfloat16)
    seen = jnp.tril(jnp.ones((64, 64), bool))[None, None]
    exact = plain_weights(q, k, 1.0)

    def error(upcast):
        ours = attention_weights(q, k, seen, scale=1.0, upcast=upcast)
        assert ours.dtype == jnp.float32
        return np.abs(ours - exact).max()

    assert error(upcast=True) < 1e-5 < 1e-3 < error(upcast=False)


def test_weights_of_each_row_follow_what_it_has_seen():
    q, k, _ = random_qkv(4)
    seen = jnp.ones((2, 1, 4, 4), bool).at[1, :, :, 2:].set(False)
    ours = attention_weights(q, k, seen, scale=0.5)
    assert ours[0].all()
    assert not ours[1, :, :, 2:].any()
    np.testing.assert_allclose(ours.sum(-1), 1, rtol=1e-6)


def test_weights_times_values_are_what_attend_returns():
    q, k, v = random_qkv(7)
    seen = jnp.tril(jnp.ones((7, 7), bool))[None, None]
    weights = attention_weights(q, k, seen, scale=0.7)
    mixed = jnp.einsum("bnts,bsnh->btnh", weights, v)
    np.testing.assert_allclose(mixed, attend(q, k, v, seen, scale=0.7), **CLOSE)


def test_scale_may_be_traced():
    q, k, v = random_qkv(5)
    ours = causal_attention(q, k, v, scale=jnp.float32(0.3), kernel="cudnn")
    np.testing.assert_allclose(ours, plain_attention(q, k, v, 0.3), **CLOSE)


def test_blocks_have_the_gradients_of_one_square():
    length = QUERY_BLOCK + 3
    q, k, v = random_qkv(length)
    weights = jax.random.normal(jax.random.key(0), v.shape)
    seen = jnp.tril(jnp.ones((length, length), bool))[None, None]

    def total(kind, q, k, v):
        return jnp.sum(weights * kind(q, k, v, scale=0.5))

    square = functools.partial(attend, seen=seen)
    blocks_gradients, square_gradients = (
        quick_jit(jax.grad(functools.partial(total, kind), (0, 1, 2)))(q, k, v)
        for kind in (causal_attention, square)
    )
    for ours, theirs in zip(blocks_gradients, square_gradients, strict=True):
        np.testing.assert_allclose(ours, theirs, **CLOSE)


def test_no_query_depends_on_a_later_key():
    q, k, v = random_qkv(QUERY_BLOCK + 20)
    row = QUERY_BLOCK + 5

    def one_row(k, v):
        return jnp.sum(causal_attention(q, k, v, scale=0.5)[:, row])

    for gradient in quick_jit(jax.grad(one_row, (0, 1)))(k, v):
        assert not gradient[:, row + 1 :].any()
        assert jnp.abs(gradient[:, : row + 1]).max(axis=(0, 2, 3)).all()


def test_row_that_sees_nothing_is_finite_with_finite_gradients():
    q, k, v = random_qkv(4)
    seen = jnp.ones((1, 1, 4, 4), bool).at[:, :, 2].set(False)

    def total(q, k, v):
        return jnp.sum(attend(q, k, v, seen, scale=0.5) ** 2)

    run = quick_jit(jax.value_and_grad(total, (0, 1, 2)))
    for values in jax.tree.leaves(run(q, k, v)):
        assert jnp.isfinite(values).all()


def test_upcast_forms_scores_in_float32():
    q, k, v = random_qkv(64, jnp.bfloat16)
    exact = plain_attention(q, k, v, 1.0)

    def error(upcast):
        ours = causal_attention(q, k, v, scale=1.0, upcast=upcast)
        assert ours.dtype == jnp.bfloat16
        return np.abs(np.asarray(ours, np.float64) - exact).mean()

    assert error(upcast=True) < error(upcast=False)


@pytest.mark.parametrize("length", [8, QUERY_BLOCK + 8])
def test_dropout_is_decided_by_the_key(length):
    q, k, v = random_qkv(length)
    run = quick_jit(
        functools.partial(causal_attention, q, k, v, scale=0.5, dropout=0.5)
    )
    one, other = jax.random.key(1), jax.random.key(2)
    np.testing.assert_array_equal(run(key=one), run(key=one))
    assert (run(key=one) != run(key=other)).any()
    np.testing.assert_allclose(run(), plain_attention(q, k, v, 0.5), **CLOSE)


def test_no_two_rows_drop_the_same_keys():
    """Tell rows apart by dropout alone: keys are alike, values stop at key 100."""
    length = 2 * QUERY_BLOCK
    q = jnp.zeros((1, length, 1, 4))
    v = jax.random.normal(jax.random.key(0), q.shape).at[:, 100:].set(0)
    run = quick_jit(functools.partial(causal_attention, scale=1.0, dropout=0.5))
    out = np.asarray(run(q, q, v, key=jax.random.key(1)))[0, :, 0]
    sums = (out * np.arange(1, length + 1)[:, None])[100:]  # of the values kept
    gaps = np.abs(sums[:, None] - sums[None]).max(axis=-1)
    assert gaps[~np.eye(len(sums), dtype=bool)].min() > 1e-2


def test_drop_zeroes_its_share_and_keeps_the_mean():
    rate, size = 0.1, 100_000
    dropped = drop(jnp.ones(size), rate, jax.random.key(0))
    five_sigma = 5 * (rate * (1 - rate) / size) ** 0.5
    assert abs(float(jnp.mean(dropped == 0)) - rate) < five_sigma
    assert abs(float(jnp.mean(dropped)) - 1) < five_sigma / (1 - rate)
    kept = dropped[dropped != 0]
    np.testing.assert_allclose(kept, 1 / (1 - rate), rtol=1e-6)


def test_drop_without_key_or_rate_is_the_identity():
    x = jnp.arange(3.0)
    assert drop(x, 0.5, None) is x
    assert drop(x, 0.0, jax.random.key(0)) is x


@pytest.mark.parametrize(
    "name, platform, dtype, width, kernel",
    [
        ("auto", "cpu", "float32", 64, "xla"),
        ("auto", "cpu", "bfloat16", 64, "xla"),
        ("auto", "tpu", "bfloat16", 64, "xla"),
        ("auto", "gpu", "bfloat16", 64, "cudnn"),
        ("auto", "gpu", "bfloat16", 12, "xla"),
        ("auto", "gpu", "bfloat16", 256, "xla"),
        ("auto", "gpu", "float32", 64, "xla"),
        ("xla", "gpu", "bfloat16", 64, "xla"),
        ("cudnn", "gpu", "bfloat16", 64, "cudnn"),
    ],
)
def test_auto_kernel_follows_the_device(name, platform, dtype, width, kernel):
    assert choose_attention(name, platform, dtype, width) == kernel


@pytest.mark.parametrize(
    "platform, dtype, width",
    [("cpu", "bfloat16", 64), ("gpu", "float32", 64), ("gpu", "bfloat16", 12)],
)
def test_cudnn_is_refused_where_it_cannot_run(platform, dtype, width):
    with pytest.raises(ConfigError, match=r"model.attention is 'cudnn'; .*auto or xla"):
        choose_attention("cudnn", platform, dtype, width)
