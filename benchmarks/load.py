"""Time and memory from a directory in Hugging Face layout to the first logits.

    python benchmarks/load.py MODEL

The compiled program is on disk already, from a first run: compiling is not counted.
Memory is the peak of the process above what it holds with everything imported.
"""

import json
import resource
import subprocess
import sys
import time

ROUNDS = 5


def peak_bytes() -> int:
    """Return the most memory that this process has held, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(name: str) -> dict[str, float]:
    """Return seconds and bytes of one load in this process."""
    began = time.perf_counter()
    import jax

    import gpt2_jax

    load = gpt2_jax.load
    jax.numpy.zeros(8).block_until_ready()
    imported, before = time.perf_counter(), peak_bytes()
    lm = load(name, dtype="float32")
    loaded = time.perf_counter()
    lm.logits([464, 3290]).block_until_ready()
    done = time.perf_counter()
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(lm.params))
    return dict(
        import_seconds=imported - began,
        load_seconds=loaded - imported,
        first_logits_seconds=done - loaded,
        parameter_bytes=size,
        peak_share=(peak_bytes() - before) / size,
    )


def main() -> None:
    """Print the median of each figure over processes of their own."""
    if sys.argv[1] == "--once":
        print(json.dumps(measure(sys.argv[2])))
        return
    command = [sys.executable, __file__, "--once", sys.argv[1]]
    runs = []
    for _ in range(ROUNDS + 1):
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        runs.append(json.loads(done.stdout))
    for name in runs[0]:
        values = sorted(run[name] for run in runs[1:])
        middle = values[len(values) // 2]
        print(f"{name:22} {middle:.4g}  ({values[0]:.4g} to {values[-1]:.4g})")


if __name__ == "__main__":
    main()
