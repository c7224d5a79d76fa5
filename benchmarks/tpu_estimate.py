"""What libtpu's compiler expects of a training step on TPU slices that are not here.

The shipped recipes, then 124M on a v3-8 with one choice changed at a time: attention
kernel, loss in chunks or whole, what is computed again, layers in a loop or unrolled.
Estimates, never measurements: see docs/tpu.md for what they count.

    pip install "gpt2_jax[tpu]"
    python benchmarks/tpu_estimate.py [--json out.json]      # about 15 minutes, 2 cores
"""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

from gpt2_jax.config import Config, config_directory, load_config
from gpt2_jax.plan import Plan, plan
from gpt2_jax.topology import FAMILIES

ONE = "gpt2_124m_v3_8"
CHANGES = {
    "attention: xla": dict(attention="xla", micro_batch=8),
    "attention: flash": dict(micro_batch=8),
    "loss: chunks of 32": dict(micro_batch=8, loss_chunk=32),
    "loss: whole": dict(micro_batch=8, loss_chunk=1024),
    "remat: dots": dict(micro_batch=8, remat="dots"),
    "remat: block": dict(micro_batch=8, remat="block"),
    "layers: a loop": dict(micro_batch=8, unroll=1),
    "micro-batch: 16": dict(micro_batch=16),
    "micro-batch: 32": dict(micro_batch=32),
}
HEAD = (
    "| | mesh data x fsdp x tensor | accumulation x at once | GiB per device | "
    "s a step | of which kernels | tokens/s | MFU | collectives besides, s |"
)


def slice_of(name: str) -> str | None:
    """Return the slice that a recipe's name ends in: gpt2_124m_v3_8 is for v3-8."""
    family, _, size = name.rpartition("_")
    family = family.rpartition("_")[2]
    known = {one.libtpu for one in FAMILIES.values()}
    return f"{family}-{size}" if family in known else None


def change(config: Config, **changes) -> Config:
    """Return the config with fields of its model and its training replaced."""
    train = {k: changes.pop(k) for k in ("micro_batch", "loss_chunk") if k in changes}
    return replace(
        config,
        model=replace(config.model, **changes),
        train=replace(config.train, **train),
    )


def row(name: str, found: Plan) -> str:
    """Return a line of the table."""
    cells = [
        " x ".join(map(str, found.mesh.values())),
        f"{found.accumulation} x {found.micro_batch}",
    ]
    if found.memory is None or found.estimate is None:
        cells += ["does not fit", "", "", "", "", ""]
    else:
        memory, guess = found.memory.total / 2**30, found.estimate
        cells += [
            f"{memory:.1f} of {found.topology.chip.hbm_bytes / 2**30:.0f}",
            f"{guess.step_seconds:.3f}",
            f"{guess.kernel_seconds:.3f}",
            f"{guess.tokens_per_second:,.0f}",
            f"{guess.mfu:.1%}",
            f"{guess.collective_seconds:.3f}",
        ]
    return f"| {name} | {' | '.join(cells)} |"


def main() -> None:
    """Compile, print the table, write the figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", default="", help="rows whose name holds this")
    asked = parser.parse_args()
    recipes = {p.stem: slice_of(p.stem) for p in config_directory().glob("*.py")}
    rows = {
        name: (load_config(name), topology)
        for name, topology in sorted(recipes.items())
        if topology is not None
    }
    rows |= {
        name: (change(load_config(ONE), **c), "v3-8") for name, c in CHANGES.items()
    }
    print(f"{HEAD}\n|{'---|' * HEAD.count(' |')}", flush=True)
    figures = {}
    for name, (config, topology) in rows.items():
        if asked.only in name:
            found = plan(
                config, topology, say=lambda line: print(line, file=sys.stderr)
            )
            print(row(name, found), flush=True)
            figures[name] = found.to_json()
    if asked.json:
        asked.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
