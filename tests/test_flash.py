"""The Pallas kernel, interpreted on the CPU, against XLA's attention."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt2_jax.attention import causal_attention
from gpt2_jax.flash import BLOCK, SAVED, flash_attention

CLOSE = dict(rtol=1e-5, atol=1e-5)


def random_qkv(length, heads=2, width=8, dtype=jnp.float32):
    shape = (2, length, 3, heads, width)
    return jax.random.normal(jax.random.key(length), shape, dtype)


def interpreted(qkv, scale=0.5, operands=jnp.float32):
    return flash_attention(qkv, scale=scale, operands=operands, interpret=True)


def values_and_gradients(kind, qkv):
    cotangent = jax.random.normal(jax.random.key(0), kind(qkv).shape)

    def total(qkv):
        return jnp.sum(kind(qkv).astype(jnp.float32) * cotangent)

    return jax.jit(kind)(qkv), jax.jit(jax.grad(total))(qkv)


# One position, less than a block, a block, two blocks, three with a part of one.
@pytest.mark.parametrize("length", [1, 100, 128, 300, BLOCK, 2 * BLOCK, 2 * BLOCK + 9])
def test_values_and_gradients_are_those_of_xla(length):
    qkv = random_qkv(length)
    xla = functools.partial(causal_attention, scale=0.5)
    ours, theirs = (values_and_gradients(kind, qkv) for kind in (interpreted, xla))
    for one, other in zip(ours, theirs, strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_allclose(one, other, **CLOSE)


@pytest.mark.parametrize("operands", [jnp.bfloat16, jnp.float32])
def test_bfloat16_is_as_near_to_the_truth_as_xla(operands):
    qkv = random_qkv(300, width=64, dtype=jnp.bfloat16)
    xla = functools.partial(causal_attention, scale=0.125)
    flash = functools.partial(interpreted, scale=0.125, operands=operands)
    exact = values_and_gradients(xla, qkv.astype(jnp.float32))
    ours, theirs = (values_and_gradients(kind, qkv) for kind in (flash, xla))
    for one, other, true in zip(ours, theirs, exact, strict=True):
        assert one.dtype == jnp.bfloat16
        error, accepted = (
            np.abs(np.asarray(x, np.float32) - true).mean() for x in (one, other)
        )
        assert error < 1.1 * accepted


def test_no_query_depends_on_a_later_key():
    qkv, row = random_qkv(BLOCK + 20), BLOCK + 5

    def one_row(qkv):
        return jnp.sum(interpreted(qkv)[:, row])

    gradient = jax.jit(jax.grad(one_row))(qkv)
    assert not gradient[:, row + 1 :].any()
    assert jnp.abs(gradient[:, : row + 1, 1:]).max(axis=(0, 2, 3, 4)).all()


def test_large_scores_overflow_nowhere():
    qkv = 1e3 * random_qkv(130)
    for found in values_and_gradients(interpreted, qkv):
        assert jnp.isfinite(found).all()


def test_a_remat_policy_can_keep_what_the_backward_pass_needs(capsys):
    policy = jax.checkpoint_policies.save_only_these_names(SAVED)
    kind = jax.checkpoint(interpreted, policy=policy)
    jax.ad_checkpoint.print_saved_residuals(kind, random_qkv(16))
    assert capsys.readouterr().out.count(f"named '{SAVED}'") == 2  # output and norms
