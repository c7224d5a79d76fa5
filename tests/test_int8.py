"""Weights of 8 bits: only they lose, and what is written follows from what they are."""

import dataclasses
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt2_jax import int8, model
from gpt2_jax.config import ConfigError, ModelConfig
from gpt2_jax.decode import Row, Sampling, generate
from gpt2_jax.pretrained import GPT2, load
from gpt2_jax.tokenizer import load_tokenizer

SHAPE = ModelConfig(
    n_vocab=257, n_ctx=48, n_embd=64, n_layer=2, n_head=2, initializer_range=0.2
)


@pytest.fixture(scope="module")
def exact():
    return model.unstack(SHAPE, model.init(SHAPE, jax.random.key(0)))


@pytest.fixture(scope="module")
def quantized(exact):
    return int8.quantize(exact)


def draw(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("out", [(5,), (3, 4)])
@pytest.mark.parametrize("lead", [(1,), (2, 3), (1, 1), (20,)])  # 40 rows of 8 bits
def test_a_product_loses_what_rounding_the_weights_loses(lead, out):
    x, kernel = draw(0, *lead, 32), draw(1, 32, *out)
    matrix = int8.Matrix.of(jnp.asarray(kernel))
    got = jax.jit(int8.Matrix.multiply)(matrix, x)
    assert got.shape == (*lead, *out) and matrix.values.dtype == np.int8
    rounded = np.moveaxis(np.asarray(matrix.values * matrix.scale[..., None]), -1, 0)
    step = np.abs(kernel).max(axis=0) / 127
    assert (np.abs(rounded - kernel) <= 0.51 * step).all()
    # x keeps 16 bits: 32 terms are each off by 2e-5 of the largest at most.
    bound = 2.1e-5 * np.abs(x).max() * np.abs(rounded).sum(axis=0).max()
    np.testing.assert_allclose(got, np.tensordot(x, rounded, 1), atol=bound, rtol=0)


def test_rows_and_columns_of_zeros_stay_zeros():
    matrix = int8.Matrix.of(jnp.asarray(draw(0, 8, 4)).at[:, 1].set(0))
    found = np.asarray(matrix.multiply(jnp.asarray(draw(1, 3, 8)).at[2].set(0)))
    assert (found[2] == 0).all() and (found[:, 1] == 0).all()
    assert np.count_nonzero(found) == 2 * 3


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("where", ["weights", "row"])
def test_what_is_not_finite_is_not_made_finite(bad, where):
    x, kernel = draw(0, 2, 8), draw(1, 8, 4)
    (kernel if where == "weights" else x)[1, 2] = bad
    found = np.isfinite(int8.Matrix.of(jnp.asarray(kernel)).multiply(jnp.asarray(x)))
    assert not (found[:, 2] if where == "weights" else found[1]).any()
    assert found.sum() == found.size - (2 if where == "weights" else 4)


def test_matrices_and_only_they_are_quantized(quantized, exact):
    kinds = jax.tree.map(
        lambda leaf: type(leaf).__name__, quantized, is_leaf=lambda x: hasattr(x, "of")
    )
    block = {
        "ln_1": {"bias": "ArrayImpl", "scale": "ArrayImpl"},
        "ln_2": {"bias": "ArrayImpl", "scale": "ArrayImpl"},
        "attn": {n: {"kernel": "Matrix", "bias": "ArrayImpl"} for n in ("qkv", "out")},
        "mlp": {n: {"kernel": "Matrix", "bias": "ArrayImpl"} for n in ("up", "down")},
    }
    assert kinds["blocks"] == (block, block)
    assert kinds["wte"] == {"embedding": "Matrix"}
    assert kinds["wpe"] == {"embedding": "ArrayImpl"}
    head = quantized["wte"]["embedding"]
    assert head.shape == exact["wte"]["embedding"].shape
    np.testing.assert_allclose(
        head.take(jnp.arange(5)), exact["wte"]["embedding"][:5], atol=0.004
    )


def test_an_untied_head_is_quantized_too():
    untied = dataclasses.replace(SHAPE, tie_word_embeddings=False)
    unstacked = model.unstack(untied, model.init(untied, jax.random.key(0)))
    found = logits(untied, int8.quantize(unstacked))
    assert isinstance(int8.quantize(unstacked)["lm_head"], int8.Matrix)
    wanted = logits(untied, unstacked)
    assert np.std(found - wanted) < 0.03 * np.std(wanted)


def logits(config, unstacked):
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 257, (2, 16)))
    cache = model.init_cache(config, 2, 16)
    hidden, _ = jax.jit(model.decode, static_argnums=0)(
        config, unstacked, tokens, jnp.arange(16)[None].repeat(2, 0), cache
    )
    return np.asarray(model.project(config, unstacked, hidden))[..., :257]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_logits_are_close_to_those_of_the_weights(quantized, exact, dtype):
    compute = dataclasses.replace(SHAPE, dtype=dtype)
    found, wanted = logits(compute, quantized), logits(SHAPE, exact)
    # A product is off by 0.7 %: steps of 3 / 127 standard deviations, over sqrt(12).
    assert 0 < np.std(found - wanted) < 0.03 * np.std(wanted)


def test_rows_do_not_see_each_other(quantized):
    rows = [Row(np.array([5, 6, 7]), 12, i) for i in range(3)]
    rows[1] = Row(np.array([200] * 9), 20, 1)
    how = dict(sampling=Sampling(0.7, top_k=40), eot=None)
    together = generate(SHAPE, quantized, rows, **how)
    for row, text in zip(rows, together, strict=True):
        np.testing.assert_array_equal(generate(SHAPE, quantized, [row], **how)[0], text)


def test_a_model_writes_with_them_and_all_else_is_as_it_was():
    params = model.init(SHAPE, jax.random.key(0))
    plain = GPT2(SHAPE, params, load_tokenizer("bytes"))
    small = dataclasses.replace(plain, quantize="int8")
    how: dict = dict(max_new_tokens=8, temperature=0.0, details=True)
    [mine], [theirs] = small.generate("Hello", **how), plain.generate("Hello", **how)
    first, exact = mine["log_probs"][0], theirs["log_probs"][0]
    assert 0 < abs(first - exact) < 0.1
    small.generate("Hello", max_new_tokens=4, num_beams=2)
    ours, wanted = small.score("Hello"), plain.score("Hello")
    jax.tree.map(np.testing.assert_array_equal, ours, wanted)


def test_another_kind_is_refused_before_anything_is_read(tmp_path):
    with pytest.raises(ConfigError, match="quantize is 'int4'; allowed: None or 'int8"):
        inspect.unwrap(load)(tmp_path / "none", quantize="int4")
    with pytest.raises(ConfigError, match="quantize is 'int4'"):
        inspect.unwrap(int8.quantize)({}, "int4")
