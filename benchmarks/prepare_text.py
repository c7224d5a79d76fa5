"""Time `prepare` beside tiktoken's own batch encoding of the same text.

    python benchmarks/prepare_text.py FILE [PAIRS]

Each pair runs both, one after the other; the medians and their ratio are printed,
and the peak memory of a process that only prepares.
"""

import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import tiktoken

from gpt2_jax.data.prepare import prepare
from gpt2_jax.tokenizer import load_tokenizer

PART_CHARACTERS = 2**19  # of a text tiktoken encodes; prepare's batches are as long


def main(path: Path, pairs: int = 3) -> None:
    """Print MB/s of both, their ratio and the peak memory of preparing."""
    peak = prepare_alone(path)[1]  # first: a child inherits its parent's peak
    ours, theirs = [], []
    for _ in range(pairs):
        theirs.append(megabytes_per_second(path, encode_in_tiktoken(path)))
        ours.append(megabytes_per_second(path, prepare_alone(path)[0]))
        print(f"prepare {ours[-1]:.2f} MB/s, tiktoken {theirs[-1]:.2f} MB/s")
    ratio = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
    ours, theirs = statistics.median(ours), statistics.median(theirs)
    print(f"medians: prepare {ours:.2f} MB/s, tiktoken {theirs:.2f} MB/s")
    print(f"ratio of pairs {ratio:.3f}, peak memory of prepare {peak / 1e6:.0f} MB")


def megabytes_per_second(path: Path, seconds: float) -> float:
    """Return the rate at which the file was read."""
    return path.stat().st_size / seconds / 1e6


def encode_in_tiktoken(path: Path) -> float:
    """Return the seconds of `encode_ordinary_batch` alone, the text being read."""
    text = path.read_bytes().decode()
    starts = range(0, len(text), PART_CHARACTERS)
    parts = [text[start : start + PART_CHARACTERS] for start in starts]
    encoding: tiktoken.Encoding = load_tokenizer("gpt2").encoding  # pyright: ignore[reportAttributeAccessIssue]  # the peer
    started = time.perf_counter()
    encoding.encode_ordinary_batch(parts, num_threads=2)
    return time.perf_counter() - started


def prepare_alone(path: Path) -> tuple[float, int]:
    """Return seconds and peak bytes of preparing the file in a new process."""
    command = [sys.executable, __file__, "--prepare", str(path)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    seconds, peak = done.stdout.split()
    return float(seconds), int(peak)


def prepare_here(path: Path) -> None:
    """Print the seconds from file to finished shards, and this process's peak bytes."""
    tokenizer = load_tokenizer("gpt2")
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        prepare([str(path)], Path(folder) / "out", tokenizer)
        seconds = time.perf_counter() - started
    print(seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


if __name__ == "__main__":
    if sys.argv[1] == "--prepare":
        prepare_here(Path(sys.argv[2]))
    else:
        main(Path(sys.argv[1]), *map(int, sys.argv[2:3]))
