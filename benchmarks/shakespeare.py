"""Ours beside nanoGPT's CPU recipe: validation loss and wall time, in pairs.

Each pair runs the peer (benchmarks/nanogpt_cpu.py, in an interpreter that has torch)
and then `gpt2-jax train shakespeare`, as whole commands: start-up, compilation,
evaluation and files included. Prints each pair and the medians as JSON lines.

    python benchmarks/shakespeare.py input.txt --torch-python PYTHON [--pairs 3]
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PEER = Path(__file__).with_name("nanogpt_cpu.py")


def run_peer(python: str, file: str) -> dict[str, float]:
    """Return the peer's loss and wall seconds."""
    began = time.perf_counter()
    result = subprocess.run(
        [python, str(PEER), file], check=True, capture_output=True, text=True
    )
    seconds = time.perf_counter() - began
    return {"val_loss": json.loads(result.stdout)["val_loss"], "seconds": seconds}


def run_ours(file: str, *flags: str) -> dict[str, float]:
    """Return our loss and wall seconds, from an empty run directory."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "gpt2_jax.start", "train", "shakespeare"]
        command += ["--data.source", file, "--run-dir", folder, *flags]
        began = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        seconds = time.perf_counter() - began
        lines = Path(folder, "metrics.jsonl").read_text().splitlines()
    return {"val_loss": json.loads(lines[-1])["val_loss"], "seconds": seconds}


def main() -> None:
    """Run the pairs and print them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("file")
    parser.add_argument("--torch-python", default=sys.executable)
    parser.add_argument("--pairs", type=int, default=3)
    asked = parser.parse_args()
    pairs = []
    for _ in range(asked.pairs):
        pair = {"peer": run_peer(asked.torch_python, asked.file)}
        pair["ours"] = run_ours(asked.file)
        print(json.dumps(pair), flush=True)
        pairs.append(pair)
    ratios = [pair["ours"]["seconds"] / pair["peer"]["seconds"] for pair in pairs]
    summary = {
        side: {
            key: round(statistics.median(pair[side][key] for pair in pairs), 4)
            for key in ("val_loss", "seconds")
        }
        for side in ("peer", "ours")
    }
    print(json.dumps(summary | {"seconds_ratio": round(statistics.median(ratios), 3)}))


if __name__ == "__main__":
    main()
