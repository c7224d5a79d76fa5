import jax
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from gpt2_jax.digest import digests


def make_mesh(*shape):
    names, auto = ("data", "fsdp", "tensor"), (AxisType.Auto,) * 3
    return jax.make_mesh(shape, names, axis_types=auto)


def make_leaves():
    numbers = np.random.default_rng(0).standard_normal((8, 4, 16)).astype(np.float32)
    return {
        "float32": numbers,
        "bfloat16": numbers.astype(ml_dtypes.bfloat16),
        "float16": numbers.astype(np.float16),
        "int32": (numbers * 1000).astype(np.int32),
        "int8": (numbers * 30).astype(np.int8),
        "bool": numbers > 0,
    }


@pytest.mark.parametrize(
    "spec",
    [(), ("data",), (None, "fsdp", "tensor"), (("data", "fsdp"), None, "tensor")],
)
def test_digests_do_not_depend_on_the_sharding(spec):
    leaves = make_leaves()
    sharding = NamedSharding(make_mesh(2, 2, 2), PartitionSpec(*spec))
    assert digests(jax.device_put(leaves, sharding)) == digests(leaves)


def test_digests_are_the_same_in_every_release():
    leaves = {"x": np.arange(6, dtype=np.float32).reshape(2, 3), "n": np.int32(7)}
    assert digests(leaves) == {"n": "948ba1e6ced1d009", "x": "349bad64a8007943"}


@pytest.mark.parametrize("dtype", list(make_leaves()))
def test_any_flipped_bit_changes_both_halves_of_a_digest(dtype):
    leaf = make_leaves()[dtype]
    good = digests({"x": leaf})["x"]
    bits = [0] if dtype == "bool" else range(8 * leaf.itemsize)
    for bit in bits:
        bad = leaf.copy()
        view = bad.reshape(-1).view(f"u{leaf.itemsize}")
        view[37] ^= view.dtype.type(1 << bit)
        found = digests({"x": bad})["x"]
        assert found[:8] != good[:8] and found[8:] != good[8:]


@pytest.mark.parametrize(
    "damage",
    [
        lambda x: np.where(np.arange(x.size).reshape(x.shape) < 2, -x, x),
        lambda x: -x,
        lambda x: x[::-1],
        lambda x: np.roll(x, 1),
        lambda x: np.zeros_like(x),
    ],
    ids=["two signs", "all signs", "reversed", "shifted", "zeros"],
)
def test_changes_of_many_elements_change_the_digest(damage):
    x = np.random.default_rng(1).standard_normal((8, 16)).astype(np.float32)
    assert digests({"x": damage(x)}) != digests({"x": x})
