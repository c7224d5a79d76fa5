"""Hand-written gradients equal those that JAX derives from the plain equations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt2_jax.layers import gelu_tanh, layer_norm, linear, product

EPSILON = 1e-5


def draw(seed: int, *shape: int, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape, jnp.float32).astype(dtype)


def plain_linear(x, kernel, bias):
    out = jnp.tensordot(x, kernel.astype(x.dtype), 1)
    return out + jnp.broadcast_to(bias.astype(x.dtype), out.shape)


def plain_layer_norm(x, scale, bias):
    mean = jnp.mean(x, axis=-1, keepdims=True)
    variance = jnp.var(x, axis=-1, keepdims=True)
    unit = (x - mean) / jnp.sqrt(variance + EPSILON)
    return unit * scale[None, None] + bias[None, None]


def layer_norm_here(x, scale, bias):
    return layer_norm(x, scale, bias, EPSILON)


CASES = {
    "linear": (linear, plain_linear, [(2, 3, 8), (8, 5), (5,)]),
    "linear to two axes": (linear, plain_linear, [(2, 3, 8), (8, 3, 4), (3, 4)]),
    "layer norm": (layer_norm_here, plain_layer_norm, [(2, 3, 8), (8,), (8,)]),
    "gelu": (gelu_tanh, lambda x: jax.nn.gelu(x, approximate=True), [(2, 3, 8)]),
}


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_equal_the_plain_equation(name):
    ours, plain, shapes = CASES[name]
    inputs = [3 * draw(i, *shape) + 1 for i, shape in enumerate(shapes)]
    out, pull = jax.vjp(ours, *inputs)
    wanted, plain_pull = jax.vjp(plain, *inputs)
    np.testing.assert_allclose(out, wanted, rtol=2e-5, atol=2e-5)
    d_out = draw(9, *out.shape)
    for got, want in zip(pull(d_out), plain_pull(d_out), strict=True):
        # Float32 sums of the same terms in another order.
        np.testing.assert_allclose(got, want, rtol=2e-5, atol=5e-5)


@pytest.mark.parametrize("name", ["linear", "layer norm"])
def test_parameters_stay_float32_when_the_stream_is_bfloat16(name):
    ours, plain, shapes = CASES[name]
    x, *parameters = [draw(i, *shape) for i, shape in enumerate(shapes)]
    out, pull = jax.vjp(ours, x.astype(jnp.bfloat16), *parameters)
    assert out.dtype == jnp.bfloat16
    d_x, *d_parameters = pull(jnp.ones_like(out))
    assert d_x.dtype == jnp.bfloat16
    _, plain_pull = jax.vjp(plain, x, *parameters)
    _, *wanted = plain_pull(jnp.ones(out.shape))
    for got, want in zip(d_parameters, wanted, strict=True):
        assert got.dtype == jnp.float32
        # bfloat16 keeps 8 bits of x; the sums themselves are float32.
        np.testing.assert_allclose(got, want, rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    "left, right, over, other, batch",
    [
        ((3, 8, 5), (5, 6), [2], [0], 0),
        ((3, 8, 5), (3, 8, 6), [0, 1], [0, 1], 0),
        ((3, 8, 2, 5), (7, 2, 5), [2, 3], [1, 2], 0),
        ((2, 3, 8, 5), (2, 3, 8, 6), [2], [2], 2),
    ],
)
def test_products_in_bfloat16_are_over_the_axes_asked_for(
    monkeypatch, left, right, over, other, batch
):
    monkeypatch.setattr(jax, "device_count", lambda: 1)  # of several: not transposed
    one, two = draw(0, *left, dtype=jnp.bfloat16), draw(1, *right, dtype=jnp.bfloat16)
    how: dict = dict(over=over, other=other, batch=batch)
    wide, want = one.astype(jnp.float32), two.astype(jnp.float32)
    wanted = product(wide, want, **how)
    got = jax.jit(lambda x, y: product(x, y, dtype=jnp.float32, **how))(one, two)
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)
    assert jax.jit(lambda x, y: product(x, y, **how))(one, two).dtype == jnp.bfloat16


def test_layer_norm_of_a_constant_is_its_bias():
    out = layer_norm_here(jnp.full((1, 2, 8), 7.0), draw(0, 8), draw(1, 8))
    np.testing.assert_allclose(out[0, 0], draw(1, 8), atol=1e-6)
