"""Chips and their peaks; model FLOPs utilization (MFU)."""

import math
from typing import NamedTuple

GIB = 2**30
HUGE_PAGES = "glibc.malloc.hugetlb=1"  # GLIBC_TUNABLES that make XLA faster on CPU


class Chip(NamedTuple):
    """One JAX device: dense bfloat16 peak and memory."""

    flops: float  # FLOP/s
    hbm_bytes: int


# By `device_kind` prefix. A TPU v2 or v3 device is one of a chip's two cores. v3 is
# 123e12 per chip (cloud.google.com/tpu/docs/v3), not the 140e12 of jax's tpu_info.
CHIPS = {
    "TPU v2": Chip(23e12, 8 * GIB),  # jax tpu_info.py
    "TPU v3": Chip(61.5e12, 16 * GIB),
    "TPU v4 lite": Chip(137e12, 8 * GIB),  # jax tpu_info.py
    "TPU v4": Chip(275e12, 32 * GIB),  # cloud.google.com/tpu/docs/v4, megacore
    "TPU v5 lite": Chip(197e12, 16 * GIB),  # cloud.google.com/tpu/docs/v5e
    "TPU v5": Chip(459e12, 95 * GIB),  # jax tpu_info.py
    "TPU v6 lite": Chip(918e12, 32 * GIB),  # cloud.google.com/tpu/docs/v6e
    "NVIDIA A100-SXM4-40GB": Chip(312e12, 40 * GIB),
    "NVIDIA A100-SXM4-80GB": Chip(312e12, 80 * GIB),
    "NVIDIA H100 80GB HBM3": Chip(989.5e12, 80 * GIB),  # SXM, dense
    "NVIDIA H100 PCIe": Chip(756e12, 80 * GIB),
    "NVIDIA H200": Chip(989.5e12, 141 * GIB),
}


def find_chip(device_kind: str) -> Chip | None:
    """Return the chip of a JAX `device_kind`, or None when its peak is not known."""
    names = [name for name in CHIPS if device_kind.startswith(name)]
    return CHIPS[max(names, key=len)] if names else None


def mfu(
    tokens_per_second: float, token_flops: float, device_kind: str, n_devices: int
) -> float | None:
    """Return the share of the devices' peak that is used, None if it is unknown."""
    chip = find_chip(device_kind)
    if chip is None or not math.isfinite(tokens_per_second):
        return None
    return tokens_per_second * token_flops / (chip.flops * n_devices)


def resolve_dtype(name: str, platform: str) -> str:
    """Return the compute dtype: `auto` is float32 on CPU, bfloat16 elsewhere."""
    if name != "auto":
        return name
    return "float32" if platform == "cpu" else "bfloat16"
