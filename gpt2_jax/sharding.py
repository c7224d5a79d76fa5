"""The mesh, the table from parameter path to PartitionSpec, host batch to device.

Mesh axes: `data` copies the parameters, `fsdp` parts them, both part the batch;
`tensor` parts every matrix. One device is a 1 x 1 x 1 mesh, not a special case.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int32, PyTree

from gpt2_jax.config import ConfigError, MeshConfig, ModelConfig

AXES = ("data", "fsdp", "tensor")
BATCH = ("data", "fsdp")  # the axes that part a batch

# Parameter path -> which mesh axis parts each dimension. Paths not named here are
# whole on every device: layer norms and the biases of the residual stream.
TABLE = {
    "wte/embedding": P("tensor", "fsdp"),
    "lm_head": P("tensor", "fsdp"),
    "wpe/embedding": P(None, "fsdp"),
    "blocks/attn/qkv/kernel": P(None, "fsdp", None, "tensor"),
    "blocks/attn/qkv/bias": P(None, None, "tensor"),
    "blocks/attn/out/kernel": P(None, "tensor", "fsdp"),
    "blocks/mlp/up/kernel": P(None, "fsdp", "tensor"),
    "blocks/mlp/up/bias": P(None, "tensor"),
    "blocks/mlp/down/kernel": P(None, "tensor", "fsdp"),
}


def choose_mesh(
    model: ModelConfig, n_devices: int, hbm_bytes: int | None, sequences: int
) -> tuple[MeshConfig, str]:
    """Return a mesh for steps of `sequences` sequences, and the reason in words.

    Copies of the parameters are fastest: they exchange gradients once a step. Where
    parameters, AdamW's moments and gradients, 16 bytes a parameter, would take more
    than half of a device's memory, `fsdp` parts them over the fewest devices that
    suffice, so that activations have the other half. Devices beyond the number of
    sequences part matrices (`tensor`). Unknown memory counts as enough.
    """
    parts = max(n for n in _divisors(n_devices) if sequences % n == 0)
    tensor = n_devices // parts
    state = 16 * model.n_params / tensor
    room = float("inf") if hbm_bytes is None else hbm_bytes / 2
    fits = [n for n in _divisors(parts) if state / n <= room]
    fsdp = min(fits, default=parts)
    reason = f"{state / 2**30:.2f} GiB of state"
    if hbm_bytes is None:
        reason += " beside unknown memory"
    else:
        share = "within" if fits else "above"
        reason += f" in {fsdp} parts, {share} half of {hbm_bytes / 2**30:.0f} GiB"
    if tensor > 1:
        reason += f"; {sequences} sequences a step for {n_devices} devices"
    return MeshConfig(data=parts // fsdp, fsdp=fsdp, tensor=tensor), reason


def _divisors(n):
    return [i for i in range(1, n + 1) if n % i == 0]


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """Return the mesh over all devices; an axis of -1 takes what the others leave.

    Without any axis stated all devices hold copies: see `choose_mesh`.

    Raises
    ------
    ConfigError
        If the axes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [config.data or -1, config.fsdp or 1, config.tensor or 1]
    if sizes.count(-1) > 1:  # `data` is not stated and another axis is free
        sizes[0] = 1
    fixed = math.prod(size for size in sizes if size != -1)
    sizes = [len(devices) // fixed if size == -1 else size for size in sizes]
    if math.prod(sizes) != len(devices):
        raise ConfigError(
            f"mesh data x fsdp x tensor = {' x '.join(map(str, sizes))} is not the "
            f"{len(devices)} devices here; allowed: a product of {len(devices)}, or "
            "--mesh.data -1 for all that are left"
        )
    # Neighbours in the mesh are neighbours on the wires of a TPU slice.
    kinds = (AxisType.Auto,) * len(AXES)
    return jax.make_mesh(sizes, AXES, axis_types=kinds, devices=devices)


def batch_parts(mesh: Mesh) -> int:
    """Return how many parts a batch has: the product of `data` and `fsdp`."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def param_specs(
    params: PyTree, model: ModelConfig, mesh: Mesh
) -> tuple[PyTree, list[str]]:
    """Return a PartitionSpec per leaf and the rules that had to step in, in words.

    An axis that does not divide its dimension is left out there; `tensor` leaves
    attention whole when it does not divide the heads.
    """
    notes: list[str] = []

    def place(path: Any, leaf: Any) -> P:
        name = _path_name(path)
        wanted = TABLE.get(name, P())
        axes = [_fit(name, axis, leaf, i, mesh, notes) for i, axis in enumerate(wanted)]
        if "/attn/" in name and model.n_head % mesh.shape["tensor"]:
            axes = [None if axis == "tensor" else axis for axis in axes]
            size = mesh.shape["tensor"]
            notes.append(
                f"{name}: tensor = {size} does not divide {model.n_head} heads; "
                "whole on that axis"
            )
        return P(*axes)

    return jax.tree.map_with_path(place, params), notes


def _fit(name, axis, leaf, dimension, mesh, notes):
    if axis is None or leaf.shape[dimension] % mesh.shape[axis] == 0:
        return axis
    size, length = mesh.shape[axis], leaf.shape[dimension]
    notes.append(f"{name}: {axis} = {size} does not divide {length}; whole there")
    return None


def state_shardings(
    state: PyTree, params: PyTree, model: ModelConfig, mesh: Mesh
) -> PyTree:
    """Return a NamedSharding per leaf of a training state.

    A leaf whose path ends in a parameter's path and has its shape (the parameter, a
    moment of it) is placed like the parameter; every other one is whole everywhere.
    """
    specs, _ = param_specs(params, model, mesh)
    shapes = {_path_name(p): x.shape for p, x in jax.tree.leaves_with_path(params)}
    leaves = jax.tree.leaves_with_path(specs, is_leaf=lambda x: isinstance(x, P))
    placed = {_path_name(p): spec for p, spec in leaves}

    def place(path: Any, leaf: Any) -> NamedSharding:
        parts = _path_name(path).split("/")
        ends = ("/".join(parts[i:]) for i in range(len(parts)))
        found = next((e for e in ends if shapes.get(e) == leaf.shape), None)
        return NamedSharding(mesh, placed[found] if found else P())

    return jax.tree.map_with_path(place, state)


def _path_name(path):
    return "/".join(str(getattr(k, "key", getattr(k, "name", k))) for k in path)


def batch_sharding(mesh: Mesh, leading: int = 0) -> NamedSharding:
    """Return the sharding of a batch whose batch axis follows `leading` axes."""
    return NamedSharding(mesh, P(*[None] * leading, BATCH))


def pin_residual(x: Float[Array, "B T D"], mesh: Mesh) -> Float[Array, "B T D"]:
    """Return the residual stream, kept parted by batch only."""
    sharding = NamedSharding(mesh, P(BATCH, None, None))
    return jax.lax.with_sharding_constraint(x, sharding)


def gather_head(head: Float[Array, "V D"], mesh: Mesh) -> Float[Array, "V D"]:
    """Return the output matrix, whole but for `tensor`: once, not in every chunk."""
    return jax.lax.with_sharding_constraint(head, NamedSharding(mesh, P("tensor")))


def local_rows(sharding: NamedSharding, sequences: int) -> tuple[int, ...]:
    """Return which rows of a batch of `sequences` this process's devices hold.

    They need not be neighbours: on a TPU pod the mesh follows the wires, not the hosts.
    """
    axis = len(sharding.spec) - 1
    shape = (1,) * axis + (sequences,)
    parts = sharding.addressable_devices_indices_map(shape).values()
    rows = {row for part in parts if part for row in range(sequences)[part[axis]]}
    return tuple(sorted(rows))


def to_global(
    batch: Int32[np.ndarray, "..."],
    sharding: NamedSharding,
    sequences: int | None = None,
) -> Int32[Array, "..."]:
    """Return the batch of `sequences` rows of which `batch` has the `local_rows`.

    None: it has all of them.
    """
    axis = len(sharding.spec) - 1
    count = batch.shape[axis] if sequences is None else sequences
    places = {row: i for i, row in enumerate(local_rows(sharding, count))}
    shape = (*batch.shape[:axis], count, *batch.shape[axis + 1 :])

    def cut(part: Any) -> np.ndarray:
        rows = [places[row] for row in range(count)[part[axis]]]
        return np.take(batch, rows, axis)

    return jax.make_array_from_callback(shape, sharding, cut)
