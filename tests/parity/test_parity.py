"""Logits and gradients against transformers, in float32, on random weights."""

import agreement
import make_golden
import numpy as np
import pytest

# Depth and heads of the four GPT-2s; narrow copies have heads of width 8.
SHAPES = {"124m": (12, 12), "355m": (24, 16), "774m": (36, 20), "1558m": (48, 25)}


def assert_agreement(reference, record_property):
    gaps = agreement.largest_differences(reference)
    record_property("largest_differences", gaps)
    print(gaps)
    assert max(gaps.values()) <= agreement.TOLERANCE, gaps


@pytest.mark.parametrize("name", make_golden.CASES)
def test_option_agrees(name, record_property):
    values = make_golden.TINY | make_golden.CASES[name]
    assert_agreement(make_golden.compute_reference(values), record_property)


@pytest.mark.parametrize("name", make_golden.GOLDEN)
def test_golden_file_is_what_transformers_computes(name):
    fresh = make_golden.compute_golden(name)
    kept = agreement.load(make_golden.TESTS / "golden" / f"{name}.npz")
    assert kept.values == fresh.values
    assert kept.tensors.keys() == fresh.tensors.keys()
    assert kept.gradients.keys() == fresh.gradients.keys()
    np.testing.assert_array_equal(kept.tokens, fresh.tokens)
    for tensor in kept.tensors:
        np.testing.assert_array_equal(kept.tensors[tensor], fresh.tensors[tensor])
    # Rounding only: another CPU sums in another order.
    close = dict(rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(kept.logits, fresh.logits, **close)
    np.testing.assert_allclose(kept.loss, fresh.loss, **close)
    for tensor in kept.gradients:
        ours, theirs = kept.gradients[tensor], fresh.gradients[tensor]
        np.testing.assert_allclose(ours, theirs, **close)


def test_every_option_moves_the_logits():
    """Prove that agreement in a case could not be had by ignoring its option."""
    plain = make_golden.compute_reference(make_golden.TINY).logits
    same = {"plain", "gelu_pytorch_tanh", "reorder_and_upcast_attn"}  # in float32
    for name in make_golden.CASES.keys() - same - {"n_inner", "mistral", "untied"}:
        values = make_golden.TINY | make_golden.CASES[name]
        moved = np.abs(make_golden.compute_reference(values).logits - plain).max()
        assert moved > 3 * agreement.TOLERANCE, name


@pytest.mark.parametrize("name", SHAPES)
def test_narrow_copy_agrees(name, record_property):
    n_layer, n_head = SHAPES[name]
    shape = dict(n_layer=n_layer, n_head=n_head, n_embd=8 * n_head, n_positions=64)
    values = make_golden.TINY | shape | dict(vocab_size=257)
    reference = make_golden.compute_reference(values, length=64, std=0.02)
    assert_agreement(reference, record_property)


def test_124m_agrees(record_property):
    shape = dict(n_layer=12, n_head=12, n_embd=768, n_positions=1024)
    values = make_golden.TINY | shape | dict(vocab_size=50_257)
    reference = make_golden.compute_reference(values, batch=1, length=64, std=0.02)
    assert_agreement(reference, record_property)
