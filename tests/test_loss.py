"""The chunked loss against optax on whole logits."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2_jax.config import ConfigError
from gpt2_jax.loss import (
    IGNORED,
    LOGITS_BYTES,
    choose_chunk,
    chunked_loss,
    mask_padding,
    token_log_probs,
)

BATCH, LENGTH, WIDTH, ROWS = 2, 24, 8, 128


def random_batch(n_vocab=ROWS):
    keys = jax.random.split(jax.random.key(0), 3)
    hidden = jax.random.normal(keys[0], (BATCH, LENGTH, WIDTH))
    head = jax.random.normal(keys[1], (ROWS, WIDTH))
    targets = jax.random.randint(keys[2], (BATCH, LENGTH), 0, n_vocab)
    return hidden, head, targets


def plain_loss(hidden, head, targets, n_vocab):
    logits = jnp.einsum("btd,vd->btv", hidden, head)[..., :n_vocab]
    nll = optax.softmax_cross_entropy_with_integer_labels(
        logits, jnp.maximum(targets, 0)
    )
    return jnp.sum(jnp.where(targets == IGNORED, 0.0, nll))


def both_losses(hidden, head, targets, n_vocab, chunk):
    """Return (loss, gradients) of ours and of the plain loss."""

    def ours(hidden, head):
        return chunked_loss(hidden, head, targets, n_vocab=n_vocab, chunk=chunk)[0]

    def plain(hidden, head):
        return plain_loss(hidden, head, targets, n_vocab)

    def both(hidden, head):
        return [jax.value_and_grad(f, (0, 1))(hidden, head) for f in (ours, plain)]

    return jax.jit(both)(hidden, head)


def assert_equal_to_rounding(ours, theirs):
    """Compare to 1e-6 of the largest entry, as the issue asks."""
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert one.dtype == other.dtype
        scale = float(jnp.max(jnp.abs(other)))
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-6 * scale)


@pytest.mark.parametrize(
    "chunk, n_vocab", [(0, 100), (1, ROWS), (3, 100), (8, ROWS), (8, 100), (24, 100)]
)
def test_loss_and_gradients_are_the_plain_ones(chunk, n_vocab):
    hidden, head, targets = random_batch(n_vocab)
    assert_equal_to_rounding(*both_losses(hidden, head, targets, n_vocab, chunk))


@pytest.mark.parametrize("chunk", [1, 8])
def test_ignored_targets_count_for_nothing(chunk):
    hidden, head, targets = random_batch(100)
    targets = targets.at[0, 3:11].set(IGNORED).at[1, 0].set(IGNORED)
    _, counted = chunked_loss(hidden, head, targets, n_vocab=100, chunk=chunk)
    assert counted == targets.size - 9
    ours, plain = both_losses(hidden, head, targets, 100, chunk)
    assert_equal_to_rounding(ours, plain)
    assert not ours[1][0][0, 3:11].any()


def test_loss_without_a_single_target_is_zero():
    hidden, head, targets = random_batch()
    ignored = jnp.full_like(targets, IGNORED)
    assert chunked_loss(hidden, head, ignored, n_vocab=ROWS, chunk=8)[1] == 0
    loss, gradients = both_losses(hidden, head, ignored, ROWS, 8)[0]
    assert loss == 0
    assert not any(gradient.any() for gradient in gradients)


def test_huge_logits_stay_finite():
    hidden, head, targets = random_batch()
    ours, plain = both_losses(100 * hidden, 100 * head, targets, ROWS, 8)
    assert jnp.isfinite(ours[0])
    assert_equal_to_rounding(ours, plain)


def test_padded_rows_get_no_gradient_and_change_nothing():
    hidden, head, targets = random_batch(100)
    run = functools.partial(chunked_loss, n_vocab=100, chunk=8)
    loss = jax.value_and_grad(lambda head: run(hidden, head, targets)[0])
    value, gradient = loss(head)
    moved, _ = loss(head.at[100:].set(50.0))
    assert value == moved
    assert not gradient[100:].any()
    assert gradient[:100].any()


def test_cotangent_scales_the_gradients():
    hidden, head, targets = random_batch()

    def mean(hidden):
        total, count = chunked_loss(hidden, head, targets, n_vocab=ROWS, chunk=8)
        return total / count

    ours = jax.grad(mean)(hidden)
    plain = jax.grad(plain_loss)(hidden, head, targets, ROWS) / targets.size
    assert_equal_to_rounding(ours, plain)


def test_half_precision_is_summed_in_float32():
    hidden, head, targets = random_batch()
    halves = [x.astype(jnp.bfloat16) for x in (hidden, head)]
    loss, gradients = both_losses(*halves, targets, ROWS, 8)[0]
    wide = [x.astype(jnp.float32) for x in halves]
    exact, exact_gradients = both_losses(*wide, targets, ROWS, 8)[1]
    assert loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, exact, rtol=1e-5)
    for ours, theirs in zip(gradients, exact_gradients, strict=True):
        assert ours.dtype == jnp.bfloat16
        # Logits' gradients are rounded to 8 bits before the matmuls.
        tolerance = 0.02 * float(jnp.abs(theirs).max())
        np.testing.assert_allclose(
            ours.astype(jnp.float32), theirs, rtol=0, atol=tolerance
        )


def largest_array(chunk):
    """Return the elements of the largest array in the compiled gradient."""

    def total(hidden, head, targets):
        return chunked_loss(hidden, head, targets, n_vocab=100, chunk=chunk)[0]

    gradient = jax.jit(jax.value_and_grad(total, (0, 1)))
    text = gradient.lower(*random_batch(100)).compile().as_text()
    return max(
        math.prod(map(int, shape.split(",")))
        for shape in re.findall(r"[a-z]+\d+\[([\d,]+)\]", text)
    )


def test_whole_logits_are_never_held():
    assert largest_array(LENGTH) >= BATCH * LENGTH * ROWS  # the probe sees them
    assert largest_array(4) <= BATCH * 4 * ROWS


def test_chunk_that_does_not_divide_is_refused():
    with pytest.raises(ConfigError, match="chunk is 5; allowed: a divisor of T = 24"):
        chunked_loss(*random_batch(), n_vocab=ROWS, chunk=5)


@settings(deadline=None)
@given(st.integers(1, 64), st.integers(1, 2048), st.integers(2, 200_000))
def test_chosen_chunk_is_the_largest_that_fits(batch, length, n_vocab):
    chunk = choose_chunk(batch, length, n_vocab)
    assert length % chunk == 0
    row_bytes = batch * n_vocab * 4
    assert chunk == 1 or chunk * row_bytes <= LOGITS_BYTES
    larger = [c for c in range(chunk + 1, length + 1) if length % c == 0]
    assert not larger or larger[0] * row_bytes > LOGITS_BYTES


@pytest.mark.parametrize("n_vocab", [100, ROWS])
def test_token_log_probs_are_those_of_a_softmax(n_vocab):
    hidden, head, targets = random_batch(n_vocab)
    targets = targets.at[0, 3:11].set(IGNORED).at[1, 0].set(IGNORED)
    ours = token_log_probs(hidden, head, targets, n_vocab=n_vocab)
    logits = jnp.einsum("btd,vd->btv", hidden, head)[..., :n_vocab]
    at = jnp.maximum(targets, 0)[..., None]
    plain = jnp.take_along_axis(jax.nn.log_softmax(logits), at, axis=-1)[..., 0]
    assert_equal_to_rounding(ours, jnp.where(targets == IGNORED, 0.0, plain))
    assert not ours[targets == IGNORED].any()


def test_token_log_probs_add_up_to_the_loss():
    hidden, head, targets = random_batch(100)
    targets = targets.at[0, 5].set(IGNORED)
    log_probs = token_log_probs(hidden, head, targets, n_vocab=100)
    loss, _ = chunked_loss(hidden, head, targets, n_vocab=100)
    assert_equal_to_rounding(-jnp.sum(log_probs), loss)


def test_padded_rows_take_no_probability():
    hidden, head, targets = random_batch(100)
    run = functools.partial(token_log_probs, hidden, targets=targets, n_vocab=100)
    np.testing.assert_array_equal(run(head=head), run(head=head.at[100:].set(50.0)))


def test_token_log_probs_do_not_depend_on_the_chunk(monkeypatch):
    hidden, head, targets = random_batch(100)
    whole = token_log_probs(hidden, head, targets, n_vocab=100)
    monkeypatch.setattr("gpt2_jax.loss.LOGITS_BYTES", BATCH * 3 * ROWS * 4)
    run = functools.partial(token_log_probs, n_vocab=100)
    text = jax.jit(run).lower(hidden, head, targets).as_text()
    assert f"{BATCH}x3x{ROWS}xf32" in text  # three positions at once
    assert f"{BATCH}x{LENGTH}x{ROWS}xf32" not in text
    assert_equal_to_rounding(run(hidden, head, targets), whole)


def test_log_probs_of_half_precision_are_float32():
    hidden, head, targets = random_batch()
    halves = [x.astype(jnp.bfloat16) for x in (hidden, head)]
    ours = token_log_probs(*halves, targets, n_vocab=ROWS)
    wide = [x.astype(jnp.float32) for x in halves]
    exact = token_log_probs(*wide, targets, n_vocab=ROWS)
    assert ours.dtype == jnp.float32
    np.testing.assert_allclose(ours, exact, rtol=1e-5)  # products of 8 bits are exact


def test_mask_leaves_real_logits_alone():
    logits = jax.random.normal(jax.random.key(0), (2, 3, 8))
    masked = mask_padding(logits, 5)
    np.testing.assert_array_equal(masked[..., :5], logits[..., :5])
    np.testing.assert_array_equal(jax.nn.softmax(masked)[..., 5:], 0)
    assert mask_padding(logits, 8) is logits
