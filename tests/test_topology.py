"""Accelerator types: what they count, what libtpu calls them, wrong names."""

import math

import pytest

from gpt2_jax.config import ConfigError
from gpt2_jax.topology import FAMILIES, find_topology, known_topologies

KNOWN = known_topologies()


@pytest.mark.parametrize(
    "name, libtpu, devices, hosts, word",
    [
        ("v2-8", "v2:2x2", 8, 1, "core"),
        ("v3-8", "v3:2x2", 8, 1, "core"),
        ("v3-32", "v3:4x4", 32, 4, "core"),
        ("v3-128", "v3:8x8", 128, 16, "core"),
        ("v3-256", "v3:8x16", 256, 32, "core"),
        ("v4-8", "v4:2x2x1", 4, 1, "chip"),
        ("v4-32", "v4:2x2x4", 16, 4, "chip"),
        ("v5litepod-1", "v5e:1x1", 1, 1, "chip"),
        ("v5litepod-8", "v5e:2x4", 8, 1, "chip"),
        ("v5litepod-16", "v5e:4x4", 16, 4, "chip"),
        ("v5p-8", "v5p:2x2x1", 4, 1, "chip"),
        ("v6e-8", "v6e:2x4", 8, 1, "chip"),
        ("v6e-256", "v6e:16x16", 256, 64, "chip"),
    ],
)
def test_a_type_says_what_it_is(name, libtpu, devices, hosts, word):
    found = find_topology(name)
    assert found.name == name
    assert found.libtpu_name == libtpu
    assert (found.devices, found.hosts, found.device_word) == (devices, hosts, word)


def test_v5e_is_the_short_name_of_v5litepod():
    assert find_topology("v5e-8") == find_topology("v5litepod-8")


@pytest.mark.parametrize("name", KNOWN)
def test_hosts_part_the_chips_of_every_slice(name):
    found = KNOWN[name]
    assert found.hosts * math.prod(found.host_shape) == found.chips
    for length, part in zip(found.shape, found.host_shape, strict=False):
        assert length % part == 0


@pytest.mark.parametrize("name", FAMILIES)
def test_the_clock_is_that_of_a_tpu(name):
    (found, *_) = (t for t in KNOWN.values() if t.name.startswith(f"{name}-"))
    # 0.70, 0.94, 1.05 GHz for v2 to v4: Jouppi et al. 2020 and 2023; later ones are
    # said to run at up to 1.75.
    assert 0.69e9 < found.clock_hz < 1.76e9


@pytest.mark.parametrize("name", ["v3-9", "v3", "v7-8", "3", "", "tpu-v3-8", "v4-4"])
def test_an_unknown_type_lists_the_known_ones(name):
    with pytest.raises(ConfigError, match="--topology") as refused:
        find_topology(name)
    message = str(refused.value)
    assert "v3-8, v3-32" in message and "v6e-256" in message
    assert "\n" not in message


def test_a_near_miss_is_told():
    with pytest.raises(ConfigError, match="did you mean 'v3-256'"):
        find_topology("v3-265")


@pytest.mark.parametrize(
    "name, cores", [("v3-8", 1), ("v4-8", 2), ("v5p-8", 2), ("v5e-8", 1), ("v6e-8", 1)]
)
def test_two_cores_share_the_work_of_a_megacore_chip(name, cores):
    assert find_topology(name).cores_per_device == cores
