"""Seconds per training step and peak memory of one config, on this machine.

Compiles the very step that `gpt2-jax train` runs, on random tokens.

    python benchmarks/step.py gpt2_124m --sequences 1 --steps 5 [--dtype float32]
"""

import argparse
import json
import resource
import statistics
import time
from dataclasses import replace

import jax
import numpy as np

from gpt2_jax import model, sharding
from gpt2_jax.config import load_config
from gpt2_jax.step import make_program, micro_batch


def main() -> None:
    """Time the steps and print one JSON line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("config")
    parser.add_argument("--sequences", type=int, default=1)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--unroll", type=int, default=1)
    asked = parser.parse_args()
    config = load_config(asked.config)
    shape = model.resolve(replace(config.model, dtype=asked.dtype, unroll=asked.unroll))
    tokens = asked.sequences * shape.n_ctx
    config = replace(
        config, model=shape, train=replace(config.train, batch_tokens=tokens)
    )
    mesh = sharding.make_mesh(config.mesh)
    program = make_program(config, mesh)
    state = program.start()
    rng = np.random.default_rng(0)
    size = (*micro_batch(config, mesh), shape.n_ctx + 1)
    batch = rng.integers(0, shape.n_vocab, size, dtype=np.int32)
    seconds, loss = [], float("nan")
    for _ in range(asked.steps + 1):
        began = time.perf_counter()
        global_batch = sharding.to_global(batch, program.batch_sharding)
        state, metrics = program.train_step(state, global_batch)
        loss = float(metrics.loss)
        seconds.append(time.perf_counter() - began)
    step = statistics.median(seconds[1:])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    result = dict(
        config=asked.config,
        batch=[asked.sequences, shape.n_ctx],
        dtype=shape.dtype,
        device=jax.devices()[0].device_kind,
        first_step_seconds=round(seconds[0], 2),
        step_seconds=round(step, 3),
        tokens_per_second=round(tokens / step, 1),
        peak_process_bytes=peak,
        loss=loss,
    )
    print(json.dumps(result))


if __name__ == "__main__":
    main()
