"""Seconds of a save until it is on disk, with digests and without, in turn.

The state is a 124M-parameter model with its optimizer, at random, so that it does not
compress (1.5 GB). Digests are left out by a patch that has no place in the product.

    python benchmarks/digests.py [--config gpt2_124m --pairs 5 --directory DIR --json]
    XLA_FLAGS=--xla_force_host_platform_device_count=8 python benchmarks/digests.py
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp

from gpt2_jax import checkpoint
from gpt2_jax.checkpoint import Checkpoints
from gpt2_jax.config import load_config
from gpt2_jax.digest import Print, prints
from gpt2_jax.step import make_program, settle


def main() -> None:
    """Time the saves and print medians and their ratio."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", default="gpt2_124m")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--directory", type=Path)
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    state = random_state(asked.config)
    digest = median_seconds(lambda: prints(state), asked.pairs)
    seconds: dict[str, list[float]] = {"with": [], "without": []}
    with tempfile.TemporaryDirectory(dir=asked.directory) as folder:
        where = Path(folder)
        with Checkpoints(where, interval=1, keep=1, keep_every=0) as checkpoints:
            for step in range(2 * asked.pairs + 2):  # the first pair warms up
                name = list(seconds)[(step + step // 2) % 2]  # who is first alternates
                checkpoint.prints = prints if name == "with" else no_prints
                began = time.perf_counter()
                checkpoints.save(step, state["params"], state["opt_state"], {})
                checkpoints.finish()
                if step > 1:
                    seconds[name].append(time.perf_counter() - began)
    both = {name: statistics.median(values) for name, values in seconds.items()}
    ratios = [a / b for a, b in zip(seconds["with"], seconds["without"], strict=True)]
    result = dict(
        config=asked.config,
        devices=jax.device_count(),
        state_bytes=sum(leaf.nbytes for leaf in jax.tree.leaves(state)),
        digests_alone_seconds=round(digest, 3),
        save_seconds_with=round(both["with"], 2),
        save_seconds_without=round(both["without"], 2),
        ratio_of_medians=round(both["with"] / both["without"], 3),
        median_of_ratios=round(statistics.median(ratios), 3),
        digests_share=round(digest / both["without"], 3),
        pairs=asked.pairs,
    )
    if asked.json:
        print(json.dumps(result))
    else:
        print("\n".join(f"{name:24} {value}" for name, value in result.items()))


def random_state(config_name: str) -> dict:
    """Return the state that a run of this config saves, every number at random."""
    config, mesh, _ = settle(load_config(config_name), jax.devices())
    abstract = make_program(config, mesh).abstract_state
    leaves, structure = jax.tree.flatten(
        dict(params=abstract.params, opt_state=abstract.opt_state)
    )
    keys = jax.random.split(jax.random.key(0), len(leaves))

    def fill(key, leaf):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return jax.device_put(jnp.zeros(leaf.shape, leaf.dtype), leaf.sharding)
        make = jax.jit(
            lambda key: jax.random.normal(key, leaf.shape, leaf.dtype),
            out_shardings=leaf.sharding,
        )
        return make(key)

    filled = [fill(key, leaf) for key, leaf in zip(keys, leaves, strict=True)]
    return jax.block_until_ready(jax.tree.unflatten(structure, filled))


def median_seconds(action, repeats: int) -> float:
    """Return the median of `repeats` calls after a first one."""
    action()
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def no_prints(tree) -> dict[str, Print]:
    """Return a digest of nothing for each array."""
    return {name: Print("0" * 16, 0) for name in checkpoint.named(tree)}


if __name__ == "__main__":
    main()
