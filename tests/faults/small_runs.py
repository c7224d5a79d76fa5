"""A run of a few seconds from the command line, and what is left of it."""

import atexit
import functools
import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import forks
from quick import xla_flags

from gpt2_jax.check import check_run
from gpt2_jax.checkpoint import saved_steps

DRIVER = Path(__file__).parent / "strike.py"
FLAGS = {
    "model.n-ctx": 16,
    "model.n-embd": 32,
    "model.n-layer": 2,
    "model.n-head": 2,
    "model.embd-pdrop": 0.1,
    "data.tokenizer": "bytes",
    "optimizer.warmup-steps": 2,
    "train.batch-tokens": 128,
    "train.steps": 8,
    "evaluate.samples": 0,
    "checkpoint.interval": 2,
    "log.interval": 1,
}
NEVER = ("none", "", "", 0)


def train(run: Path, strike=NEVER, **variables: str) -> subprocess.CompletedProcess:
    """Train with `gpt2-jax`, one device, and return how it ended."""
    flags = FLAGS | {"data.source": folder() / "text.txt", "run-dir": run}
    command = [str(DRIVER), *map(str, strike), "train", "shakespeare"]
    command += [f"--{name}={value}" for name, value in flags.items()]
    alone = {"XLA_FLAGS": xla_flags(1), "JAX_PLATFORMS": "cpu", "GLIBC_TUNABLES": ""}
    with tempfile.TemporaryDirectory() as logs:
        env = os.environ | alone | variables
        return forks.run(command, env=env, logs=Path(logs), timeout=240)


@functools.cache
def folder() -> Path:
    """Return where the text lies that all runs of this process train on."""
    path = Path(tempfile.mkdtemp(prefix="gpt2_jax_faults_"))
    atexit.register(shutil.rmtree, path)
    lines = (f"{n} green bottles hanging on the wall,\n" for n in range(200))
    (path / "text.txt").write_text("".join(lines))
    return path


@functools.cache
def left_alone() -> Path:
    """Return a run that nothing befalls: 8 steps, of which 6 and 8 are kept."""
    ended = train(folder() / "alone")
    assert ended.returncode == 0, ended.stderr
    return folder() / "alone"


def final_digest(run: Path) -> str | None:
    """Return the digest of the last step's state; all of the run must be good."""
    report = check_run(run, say=lambda line: None)
    assert report.good, report.remedy()
    assert report.newest_good == FLAGS["train.steps"]
    return report.steps[-1].sha256


def good_steps(run: Path) -> list[int]:
    """Return the steps that read back, in order."""
    steps = check_run(run, say=lambda line: None).steps
    return [step.step for step in steps if step.ok]


def names(run: Path) -> list[str]:
    """Return what lies beside the checkpoints' steps, temporary or set aside."""
    steps = set(map(str, saved_steps(run / "checkpoints")))
    return sorted({path.name for path in (run / "checkpoints").iterdir()} - steps)


def losses(run: Path) -> list[tuple[int, float]]:
    """Return step and loss of every training record."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    return [(r["step"], r["train_loss"]) for r in records if "train_loss" in r]


def contents(folder: Path) -> dict[str, bytes]:
    """Return the bytes of every file by its path."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}
