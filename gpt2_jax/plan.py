"""Plan a run on a TPU slice that is not here: compile the real step, read its cost.

libtpu compiles for any slice without a TPU. The step is the very function that `train`
runs; nothing is allocated. Times are the compiler's estimates, never measurements.
"""

import atexit
import dataclasses
import functools
import importlib.util
import math
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh
from jaxtyping import PyTree

from gpt2_jax import hlo, sharding
from gpt2_jax.config import Config, ConfigError, check
from gpt2_jax.hardware import GIB, mfu
from gpt2_jax.step import Program, make_program, micro_batch, settle
from gpt2_jax.topology import Topology, find_topology

# XLA knows no cost of a kernel: its instructions are counted, as libtpu lays them out.
BUNDLES = (
    "--xla_jf_dump_llo_text=true --xla_jf_dump_llo_pass_label_regex=.*final_bundles.* "
    "--xla_jf_dump_to="
)
KERNELS = ("flash_forward", "flash_backward")
WITHOUT_LIBTPU = (
    'a plan needs the TPU compiler, libtpu; run pip install "gpt2_jax[tpu]"'
)


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of one core's memory while it steps."""

    parameters: int
    optimizer: int
    batch: int  # tokens, and the padding of small arrays
    temporaries: int  # activations, gradients and all else the step makes
    program: int

    @property
    def total(self) -> int:
        """Return the sum."""
        return sum(dataclasses.astuple(self))


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What the compiler expects of one step. No part of it is measured."""

    step_seconds: float  # its cycles over the clock; collectives are not in it
    kernel_seconds: float  # of them, in attention kernels
    tokens_per_second: float
    mfu: float
    days: float  # of the config's total tokens
    device_hours: float
    collectives: dict[str, hlo.Collective]  # by kind, of one core
    collective_seconds: float  # over one link, when nothing hides them


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A config on a slice."""

    topology: Topology
    config: Config  # resolved: the dtype, attention and mesh of the slice
    mesh: dict[str, int]
    accumulation: int
    micro_batch: int  # sequences per core at once
    flops_per_step: float  # 6 (N - wpe) + 12 L D T per token
    notes: tuple[str, ...] = ()
    memory: Memory | None = None  # None: it does not fit
    estimate: Estimate | None = None
    too_large: str | None = None  # what the compiler says where it does not fit

    @property
    def fits(self) -> bool:
        """Say whether the step compiles for the memory of a core."""
        return self.memory is not None

    @property
    def remedy(self) -> str:
        """Return one line on what does not fit and what to change."""
        return (
            f"a step of {self.micro_batch} sequences per {self.topology.device_word} "
            f"does not fit on {self.topology.name}: {self.too_large}; lower "
            "--train.micro-batch (or --batch auto), set --model.remat block, raise "
            "--mesh.fsdp, or take a larger --topology"
        )

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values; those of a step that does not fit are None."""
        memory, guess = self.memory, self.estimate
        parts = None if memory is None else dataclasses.asdict(memory)
        found = {} if guess is None else guess.collectives
        return {
            "topology": self.topology.name,
            "devices": self.topology.devices,
            "mesh": self.mesh,
            "accumulation": self.accumulation,
            "micro_batch_per_core": self.micro_batch,
            "fits": self.fits,
            "bytes_per_core": None if memory is None else memory.total,
            "bytes_per_core_by_use": parts,
            "hbm_bytes_per_core": int(self.topology.chip.hbm_bytes),
            "step_seconds_estimate": guess and guess.step_seconds,
            "kernel_seconds_estimate": guess and guess.kernel_seconds,
            "tokens_per_second_estimate": guess and guess.tokens_per_second,
            "mfu_estimate": guess and guess.mfu,
            "days_estimate": guess and guess.days,
            "core_hours_estimate": guess and guess.device_hours,
            "flops_per_step": self.flops_per_step,
            "collectives": {kind: one._asdict() for kind, one in found.items()},
            "collective_seconds_over_one_link": guess and guess.collective_seconds,
            "notes": list(self.notes),
        }

    def lines(self) -> list[str]:
        """Return the plan in words."""
        slice_, config = self.topology, self.config
        axes = " x ".join(f"{name} {size}" for name, size in self.mesh.items())
        lines = [
            f"GPT-2 of {config.model.n_params:,} parameters on {slice_.name}: "
            f"{slice_.devices} x {slice_.family.device_kind}, {slice_.hosts} "
            f"host{'s' * (slice_.hosts > 1)}, mesh {axes}",
            *self.notes,
            f"batch: {config.train.batch_tokens:,} tokens a step, per "
            f"{slice_.device_word} {self.accumulation} x {self.micro_batch} sequences "
            f"of {config.model.n_ctx} (accumulation x at once)",
            f"FLOPs: {self.flops_per_step:.4g} a step, by 6 (N - wpe) + 12 L D T",
        ]
        if self.memory is None or self.estimate is None:
            return lines
        return lines + self._memory_lines(self.memory) + self._estimates(self.estimate)

    def _memory_lines(self, memory: Memory) -> list[str]:
        parts = dataclasses.asdict(memory).items()
        words = ", ".join(f"{name} {size / GIB:.2f}" for name, size in parts)
        return [
            f"memory per {self.topology.device_word}: {memory.total / GIB:.2f} of "
            f"{self.topology.chip.hbm_bytes / GIB:.0f} GiB ({words})"
        ]

    def _estimates(self, guess: Estimate) -> list[str]:
        word, train = self.topology.device_word, self.config.train
        kinds = [
            f"{kind} {one.times} x, {one.bytes / 1e9:.3g} GB"
            for kind, one in guess.collectives.items()
        ]
        rate = self.topology.family.link_bytes_per_second / 1e9
        clock = self.topology.clock_hz / 1e9
        return [
            f"collectives per {word} and step: {'; '.join(kinds) or 'none'}",
            f"estimate (the compiler's cycles at {clock:.2f} GHz, collectives not in "
            f"it): {guess.step_seconds:.3f} s a step, of that attention kernels "
            f"{guess.kernel_seconds:.3f} s; {guess.tokens_per_second:,.0f} tokens/s, "
            f"MFU {guess.mfu:.1%}",
            f"collectives besides, if nothing hides them, at one link's {rate:.0f} "
            f"GB/s: {guess.collective_seconds:.3f} s a step",
            f"by that estimate {train.steps:,} steps, "
            f"{self.config.total_tokens / 1e9:,.1f}e9 tokens: {guess.days:.1f} days, "
            f"{guess.device_hours:,.0f} {word}-hours",
        ]


def plan(
    config: Config,
    topology: str,
    *,
    batch: str | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Plan:
    """Return what the step of `config` costs on a slice, by compiling it for that.

    `batch` "auto" takes the largest `train.micro_batch` that fits. A plan whose `fits`
    is false carries its `remedy` and no estimate.

    Raises
    ------
    ConfigError
        If the slice is not known, the mesh or the batch does not suit it, `batch` is
        neither None nor "auto", or libtpu is not installed.
    """
    where = find_topology(topology)
    check(batch in (None, "auto"), "--batch", batch, "auto, or --train.micro-batch N")
    devices = _open_slice(where)
    config, mesh, notes = settle(config, devices)
    if batch is None:
        return _plan_step(config, where, mesh, notes, say)
    return _largest(config, where, mesh, notes, say)


def _open_slice(where: Topology) -> list[Any]:
    """Return the slice's devices, which can be compiled for and nothing else."""
    if importlib.util.find_spec("libtpu") is None:
        raise ConfigError(WITHOUT_LIBTPU)
    flags = os.environ.get("LIBTPU_INIT_ARGS", "")
    os.environ |= {
        "LIBTPU_INIT_ARGS": f"{flags} {BUNDLES}{_bundles_directory()}",
        "TPU_SKIP_MDS_QUERY": "1",  # there is no metadata server to ask
        "TPU_ACCELERATOR_TYPE": where.name,
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # no TPU is used that could be locked
    }
    jax.config.update("jax_platforms", "cpu")
    return topologies.get_topology_desc(
        platform="tpu",
        topology_name=where.libtpu_name,
        chip_config_name=where.family.chip_config,
        chips_per_host_bounds=where.host_shape,
    ).devices


@functools.cache
def _bundles_directory() -> Path:
    """Return where libtpu writes bundles; it reads its flags once a process."""
    directory = Path(tempfile.mkdtemp(prefix="gpt2_jax_bundles_"))
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    return directory


def _take_bundles() -> dict[str, int]:
    """Return kernel -> bundles, one a cycle, of the last program; clear the files."""
    found = {}
    for path in _bundles_directory().iterdir():
        names = [name for name in KERNELS if name in path.name]
        if names and path.name.endswith("schedule-analysis_final_bundles.txt"):
            count = re.search(r"total scheduled bundles:\s+(\d+)", path.read_text())
            found |= {names[0]: int(count[1])} if count else {}
        path.unlink()
    return found


def _plan_step(
    config: Config,
    where: Topology,
    mesh: Mesh,
    notes: list[str],
    say: Callable[[str], None],
) -> Plan:
    accumulation, sequences = micro_batch(config, mesh)
    program = make_program(config, mesh)
    each = sequences // sharding.batch_parts(mesh)
    shapes = program.abstract_state.params, config.model, mesh
    found = Plan(
        topology=where,
        config=config,
        mesh=dict(mesh.shape),
        accumulation=accumulation,
        micro_batch=each,
        flops_per_step=config.model.flops_per_token * config.train.batch_tokens,
        notes=(*notes, *sharding.param_specs(*shapes)[1]),
    )
    say(f"compiling {accumulation} x {each} sequences per device for {where.name}")
    began = time.perf_counter()
    window = (accumulation, sequences, config.model.n_ctx + 1)
    tokens = jax.ShapeDtypeStruct(window, np.int32, sharding=program.batch_sharding)
    lowered = program.train_step.lower(program.abstract_state, tokens)
    _take_bundles()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return replace(
            found, too_large=str(error).partition(": ")[2].split(". ")[0].rstrip(".")
        )
    say(f"compiled in {time.perf_counter() - began:.0f} s")
    memory = _memory(program, compiled.memory_analysis())
    return replace(
        found, memory=memory, estimate=_estimate(found, compiled.as_text() or "")
    )


def _memory(program: Program, stats: Any) -> Memory:
    state = program.abstract_state
    parameters, optimizer = _bytes(state.params), _bytes(state.opt_state)
    # A donated argument and its result are the same memory.
    fresh = stats.output_size_in_bytes - stats.alias_size_in_bytes
    return Memory(
        parameters=parameters,
        optimizer=optimizer,
        batch=stats.argument_size_in_bytes - parameters - optimizer,
        temporaries=stats.temp_size_in_bytes + fresh,
        program=stats.generated_code_size_in_bytes,
    )


def _bytes(tree: PyTree) -> int:
    """Return the bytes that one device holds of arrays with their shardings."""
    leaves = jax.tree.leaves(tree)
    shapes = [(x.sharding.shard_shape(x.shape), x.dtype.itemsize) for x in leaves]
    return sum(math.prod(shape) * size for shape, size in shapes)


def _estimate(found: Plan, text: str) -> Estimate:
    config, where, parts = found.config, found.topology, found.mesh["tensor"]
    heads = config.model.n_head
    rows = -(-found.micro_batch // where.cores_per_device)  # libtpu parts the batch
    steps = rows * (heads if heads % parts else heads // parts)
    kernels = {name: steps * count for name, count in _take_bundles().items()}
    cost = hlo.program_cost(text, kernels)
    seconds = cost.cycles / where.clock_hz
    rate = config.train.batch_tokens / seconds
    kind, count = where.family.device_kind, where.devices
    days = config.total_tokens / rate / 86_400
    # A ring all-reduce passes every byte twice, any other collective once.
    passed = {
        k: c.bytes * (2 if k == "all-reduce" else 1)
        for k, c in cost.collectives.items()
    }
    return Estimate(
        step_seconds=seconds,
        kernel_seconds=cost.kernel_cycles / where.clock_hz,
        tokens_per_second=rate,
        mfu=mfu(rate, config.model.flops_per_token, kind, count) or 0.0,
        days=days,
        device_hours=days * 24 * count,
        collectives=cost.collectives,
        collective_seconds=sum(passed.values()) / where.family.link_bytes_per_second,
    )


def _largest(
    config: Config,
    where: Topology,
    mesh: Mesh,
    notes: list[str],
    say: Callable[[str], None],
) -> Plan:
    """Return the plan of the largest micro-batch that fits, or of 1 if none does."""
    whole = replace(config, train=replace(config.train, micro_batch=None))
    share = micro_batch(whole, mesh)[1] // sharding.batch_parts(mesh)
    sizes = [n for n in range(1, share + 1) if share % n == 0]
    plans, low, high = [], 0, len(sizes)
    while low < high:
        middle = (low + high) // 2
        train = replace(config.train, micro_batch=sizes[middle])
        found = _plan_step(replace(config, train=train), where, mesh, notes, say)
        say(f"{sizes[middle]} per device {'fits' if found.fits else 'does not fit'}")
        low, high = (middle + 1, high) if found.fits else (low, middle)
        plans.append(found)
    return next((found for found in reversed(plans) if found.fits), plans[-1])
