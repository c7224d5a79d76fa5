"""Chips, FLOPs per token and utilization."""

import pytest

from gpt2_jax.hardware import CHIPS, find_chip, mfu, resolve_dtype


@pytest.mark.parametrize(
    "kind, name",
    [
        ("TPU v3", "TPU v3"),
        ("TPU v4", "TPU v4"),
        ("TPU v4 lite", "TPU v4 lite"),
        ("TPU v5 lite", "TPU v5 lite"),
        ("TPU v5p", "TPU v5"),
        ("NVIDIA H100 80GB HBM3", "NVIDIA H100 80GB HBM3"),
        ("NVIDIA H200", "NVIDIA H200"),
    ],
)
def test_chip_is_found_by_its_longest_name(kind, name):
    assert find_chip(kind) == CHIPS[name]


@pytest.mark.parametrize("kind", ["cpu", "", "NVIDIA GeForce RTX 4090"])
def test_unknown_chip_has_no_peak(kind):
    assert find_chip(kind) is None
    assert mfu(1e5, 1e9, kind, 1) is None


def test_mfu_is_the_share_of_all_devices():
    half = mfu(1e5, 61.5e12 / 1e5, "TPU v3", 2)
    assert half == pytest.approx(0.5)


def test_mfu_of_an_unknown_rate_is_unknown():
    assert mfu(float("nan"), 1e9, "TPU v3", 1) is None
    assert mfu(float("inf"), 1e9, "TPU v3", 1) is None


@pytest.mark.parametrize(
    "name, platform, dtype",
    [
        ("auto", "cpu", "float32"),
        ("auto", "tpu", "bfloat16"),
        ("auto", "gpu", "bfloat16"),
        ("bfloat16", "cpu", "bfloat16"),
        ("float32", "tpu", "float32"),
    ],
)
def test_auto_dtype_follows_the_platform(name, platform, dtype):
    assert resolve_dtype(name, platform) == dtype
