"""Cloud TPU slices: from an accelerator type to what libtpu and a planner need.

A type of v2, v3, v4 and v5p counts TensorCores, two to a chip; v5litepod and v6e count
chips (cloud.google.com/tpu/docs/supported-tpu-configurations).
"""

import math
from typing import NamedTuple

from gpt2_jax.config import check_name
from gpt2_jax.hardware import CHIPS, Chip

CORES_PER_CHIP = 2  # that v2, v3, v4 and v5p types count

V3 = "2x2 4x4 4x8 8x8 8x16 16x16 16x32 32x32"
V5P = "2x2x1 2x2x2 2x2x4 2x4x4 4x4x4 4x4x8 4x8x8 8x8x8 8x8x16 8x16x16"
V6E = "1x1 2x2 2x4 4x4 4x8 8x8 8x16 16x16"


class Family(NamedTuple):
    """One TPU generation."""

    libtpu: str  # its name in libtpu's topologies
    device_kind: str
    counts_cores: bool  # what the number in the type counts; else chips
    devices_per_chip: int  # jax sees both cores of a v2 or v3 chip, else the chip
    flops_per_cycle: int  # of one device, bfloat16: matrix units x side^2 x 2
    link_bytes_per_second: float  # one interconnect link, one way
    shapes: str  # chips along each axis
    chip_config: str = "default"


# Links: scaling-book (jax-ml.github.io/scaling-book/tpus); v2: Jouppi et al. 2020.
FAMILIES = {
    "v2": Family(
        "v2", "TPU v2", True, 2, 1 * 128**2 * 2, 62e9, "2x2 4x4 8x8 8x16 16x16"
    ),
    "v3": Family("v3", "TPU v3", True, 2, 2 * 128**2 * 2, 100e9, V3),
    "v4": Family("v4", "TPU v4", True, 1, 8 * 128**2 * 2, 45e9, V5P, "megacore"),
    "v5litepod": Family("v5e", "TPU v5 lite", False, 1, 4 * 128**2 * 2, 45e9, V6E),
    "v5p": Family("v5p", "TPU v5", True, 1, 8 * 128**2 * 2, 90e9, V5P),
    "v6e": Family("v6e", "TPU v6 lite", False, 1, 4 * 256**2 * 2, 90e9, V6E),
}
ALIASES = {"v5e": "v5litepod"}


class Topology(NamedTuple):
    """One slice."""

    name: str  # the accelerator type
    family: Family
    shape: tuple[int, ...]  # chips along each axis

    @property
    def libtpu_name(self) -> str:
        """Return the name that libtpu knows the slice by."""
        return f"{self.family.libtpu}:{'x'.join(map(str, self.shape))}"

    @property
    def chips(self) -> int:
        """Return the number of chips."""
        return math.prod(self.shape)

    @property
    def devices(self) -> int:
        """Return the number of devices that jax sees on all hosts together."""
        return self.chips * self.family.devices_per_chip

    @property
    def host_shape(self) -> tuple[int, int, int]:
        """Return the chips of one host along each axis.

        2 x 2, but up to 8 chips of v5e and v6e are one host.
        """
        x, y = (self.shape[0], min(self.shape[1], 4)) if self.chips <= 8 else (2, 2)
        return (x, y, 1) if len(self.shape) == 2 else (2, 2, 1)

    @property
    def hosts(self) -> int:
        """Return the number of hosts, each with its own jax process."""
        return self.chips // math.prod(self.host_shape)

    @property
    def chip(self) -> Chip:
        """Return the peak and the memory of one device."""
        return CHIPS[self.family.device_kind]

    @property
    def clock_hz(self) -> float:
        """Return cycles per second, from the peak and the width of matrix units."""
        return self.chip.flops / self.family.flops_per_cycle

    @property
    def cores_per_device(self) -> int:
        """Return how many TensorCores share a device's work: two on v4 and v5p."""
        return (
            2 if self.family.counts_cores and self.family.devices_per_chip == 1 else 1
        )

    @property
    def device_word(self) -> str:
        """Return what one device is: a core on v2 and v3, else a chip."""
        return "core" if self.family.devices_per_chip == 2 else "chip"


def find_topology(name: str) -> Topology:
    """Return the slice of a Cloud accelerator type; `v5e-8` is `v5litepod-8`.

    Raises
    ------
    ConfigError
        If there is no such type; the message lists those there are.
    """
    known = known_topologies()
    family, _, size = name.partition("-")
    name = f"{ALIASES.get(family, family)}-{size}"
    check_name(name, list(known), "--topology", "; v5e-N is v5litepod-N")
    return known[name]


def known_topologies() -> dict[str, Topology]:
    """Return accelerator type -> slice, for all that there are."""
    found = {}
    for name, family in FAMILIES.items():
        for text in family.shapes.split():
            shape = tuple(int(length) for length in text.split("x"))
            size = math.prod(shape) * (CORES_PER_CHIP if family.counts_cores else 1)
            found[f"{name}-{size}"] = Topology(f"{name}-{size}", family, shape)
    return found
