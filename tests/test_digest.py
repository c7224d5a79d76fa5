import hashlib

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from gpt2_jax.digest import digests, prints, state_digest


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


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_prints_count_what_is_not_finite(dtype):
    x = make_leaves()[dtype].copy()
    x[0, 0, 0], x[3, 1, 2], x[7, 3, 15] = np.inf, -np.inf, np.nan
    x[1, 1, 1] = jnp.finfo(dtype).max
    found = prints({"x": x, "n": make_leaves()["int32"], "b": np.ones(3, bool)})
    assert [found[name].nonfinite for name in "xnb"] == [3, 0, 0]
    assert found["x"].digest == digests({"x": x})["x"]


def test_a_state_digest_is_a_sha256_that_anyone_can_compute():
    params, opt_state = {"w": np.arange(4, dtype="<f4")}, ({"n": np.int32(7)},)
    text = b"step 3\nopt_state/0/n int32 []\n" + np.array(7, "<i4").tobytes()
    text += b"params/w float32 [4]\n" + np.arange(4, dtype="<f4").tobytes()
    assert state_digest(3, params, opt_state) == hashlib.sha256(text).hexdigest()


def test_a_state_digest_is_the_same_on_every_mesh():
    leaves = make_leaves()
    place = NamedSharding(make_mesh(2, 2, 2), PartitionSpec("data", "fsdp", "tensor"))
    known = state_digest(3, leaves, {})
    assert state_digest(3, jax.device_put(leaves, place), {}) == known
    assert state_digest(4, leaves, {}) != known
    other = leaves | {"int8": leaves["int8"].reshape(4, 8, 16)}
    assert state_digest(3, other, {}) != known
