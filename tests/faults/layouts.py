"""Train, save and restore one tiny run on many layouts of devices and processes.

    python layouts.py save|check FOLDER LAYOUT..

A layout is DEVICESxPROCESSES, such as 8x2. Every process holds 8 / PROCESSES devices,
and a layout takes the first of each. The last line printed is JSON: what was found, by
layout.
"""

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gpt2_jax import hosts, sharding
from gpt2_jax.checkpoint import Checkpoints
from gpt2_jax.config import (
    Config,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
)
from gpt2_jax.data.loader import BatchShape, train_batches
from gpt2_jax.step import Program, TrainState, make_program, micro_batch

AXES = {
    "1x1": (1, 1, 1),
    "2x1": (1, 2, 1),
    "4x1": (2, 2, 1),
    "8x1": (2, 2, 2),
    "2x2": (2, 1, 1),
    "4x2": (1, 2, 2),
    "8x2": (2, 4, 1),
}
SAVED, STEPS, BATCHES = 3, 5, 20
SEQUENCES = 16  # a step, in two micro-batches


class Tokens:
    """Tokens of which each window is another."""

    n_tokens = 8 * 200 + 1

    def read(self, start: int, count: int) -> np.ndarray:
        places = np.arange(start, start + count)
        return ((places * 7919 + places // 8) % 61).astype(np.int32)


def set_up(layout: str) -> tuple[Program, BatchShape]:
    data, fsdp, tensor = AXES[layout]
    count, processes = map(int, layout.split("x"))
    config = Config(
        model=ModelConfig(
            n_vocab=61, n_ctx=8, n_embd=16, n_layer=2, n_head=2, vocab_multiple=8,
            embd_pdrop=0.1, attn_pdrop=0.1, resid_pdrop=0.1, dtype="float32",
        ),
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=2),
        train=TrainConfig(
            steps=STEPS,
            batch_tokens=SEQUENCES * 8,
            micro_batch=SEQUENCES // 2 // (data * fsdp),
        ),
    )  # fmt: skip
    each = count // processes
    devices = [
        device
        for process in range(processes)
        for device in [d for d in jax.devices() if d.process_index == process][:each]
    ]
    axes = MeshConfig(data=data, fsdp=fsdp, tensor=tensor)
    program = make_program(config, sharding.make_mesh(axes, devices))
    accumulation, sequences = micro_batch(config, program.mesh)
    assert accumulation == 2
    rows = sharding.local_rows(program.batch_sharding, sequences)
    return program, BatchShape(accumulation, sequences, 8, rows)


def batches(program: Program, shape: BatchShape, start: int, stop: int):
    found = train_batches(Tokens(), shape, seed=5, start=start, stop=stop, ahead=2)
    for batch in found:
        yield sharding.to_global(batch, program.batch_sharding, shape.sequences)


def hash_batches(program, shape, start: int) -> list[str]:
    """Return a SHA-256 of each global batch, its sequences in their order."""
    found = [
        np.asarray(hosts.gather(b)) for b in batches(program, shape, start, BATCHES)
    ]
    return [
        hashlib.sha256(b.reshape(SEQUENCES, -1).tobytes()).hexdigest() for b in found
    ]


def hash_state(params: Any, opt_state: Any) -> str:
    """Return a SHA-256 of names and bytes, wherever the arrays lie."""
    whole = hashlib.sha256()
    leaves = jax.tree.leaves_with_path(hosts.gather((params, opt_state)))
    for path, leaf in leaves:
        whole.update(jax.tree_util.keystr(path).encode() + np.asarray(leaf).tobytes())
    return whole.hexdigest()


def advance(program, shape, state: TrainState, start: int, stop: int):
    losses = []
    for batch in batches(program, shape, start, stop):
        state, metrics = program.train_step(state, batch)
        losses.append(float(metrics.loss))
    return state, losses


def open_checkpoints(folder: Path, layout: str) -> Checkpoints:
    return Checkpoints(folder / layout, interval=1, keep=1, keep_every=0)


def save(folder: Path, layout: str) -> dict[str, Any]:
    """Train, save on the way, go on to the last step."""
    program, shape = set_up(layout)
    state, losses = advance(program, shape, program.start(), 0, SAVED)
    digest = hash_state(state.params, state.opt_state)
    with open_checkpoints(folder, layout) as checkpoints:
        checkpoints.save(SAVED, state.params, state.opt_state, {})
    _, more = advance(program, shape, state, SAVED, STEPS)
    orders = hash_batches(program, shape, 0)
    return dict(state=digest, losses=losses + more, batches=orders)


def check(folder: Path, layout: str) -> dict[str, Any]:
    """Restore what every layout saved, and go on with it."""
    program, shape = set_up(layout)
    target = program.abstract_state
    states, losses = {}, {}
    for saved in sorted(path.name for path in folder.iterdir() if path.name in AXES):
        with open_checkpoints(folder, saved) as checkpoints:
            found = checkpoints.restore(SAVED, *target[1:])
        states[saved] = hash_state(found.params, found.opt_state)
        step = sharding_step(target)
        state = TrainState(step, found.params, found.opt_state)
        _, losses[saved] = advance(program, shape, state, SAVED, STEPS)
    return dict(
        states=states,
        losses=losses,
        resumed=hash_batches(program, shape, BATCHES // 2),
    )


def sharding_step(target: TrainState) -> jax.Array:
    """Return the step number on every device of the mesh."""
    value, where = np.int32(SAVED), target.step.sharding
    return jax.make_array_from_callback((), where, lambda index: np.asarray(value))


def main() -> None:
    hosts.join()
    verb, folder, *layouts = sys.argv[1:]
    act = dict(save=save, check=check)[verb]
    print(json.dumps({layout: act(Path(folder), layout) for layout in layouts}))


if __name__ == "__main__":
    main()
