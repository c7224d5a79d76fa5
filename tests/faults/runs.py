"""Small training runs as real processes, and what they leave behind."""

import hashlib
import os
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from forks import Fork
from ports import free_port
from quick import xla_flags

from gpt2_jax.check import check_run
from gpt2_jax.metrics import read_metrics

DRIVER = Path(__file__).with_name("driver.py")
TEXT = "".join(f"{n} green bottles hanging on the wall,\n" for n in range(300))
CLOCKS = ("tokens_per_second", "seconds", "train_seconds", "mfu")
FLAGS = {
    "run-dir": "run",
    "data.source": "text.txt",
    "data.tokenizer": "bytes",
    "model.n-vocab": 257,
    "model.n-ctx": 16,
    "model.n-embd": 16,
    "model.n-layer": 2,
    "model.n-head": 2,
    "model.embd-pdrop": 0.1,
    "model.attn-pdrop": 0.1,
    "model.resid-pdrop": 0.1,
    "optimizer.learning-rate": 0.01,
    "train.steps": 60,
    "train.batch-tokens": 16 * 16,
    "train.micro-batch": 1,  # and so two micro-batches a step on eight devices
    "evaluate.interval": 10,
    "evaluate.batch-sequences": 8,
    "evaluate.sample-interval": 20,
    "evaluate.samples": 1,
    "evaluate.sample-tokens": 8,
    "checkpoint.interval": 5,
    "log.interval": 2,
}


class Session:
    """A process whose output goes to a file, so that reading it never blocks."""

    def __init__(self, command: Sequence[str], folder: Path, environment: dict):
        handle, name = tempfile.mkstemp(suffix=".log", dir=folder)
        os.close(handle)
        self.log = Path(name)
        how = dict(cwd=folder, env=environment, stdout=self.log, stderr=self.log)
        self.process = Fork(command, **how)

    def output(self) -> str:
        """Return standard output and error so far."""
        return self.log.read_text(errors="replace")

    def wait_for(self, text: str, *, seconds: float = 120) -> float:
        """Return the moment when the output had `text` first, nearly."""
        until = time.monotonic() + seconds
        while text not in self.output():
            assert time.monotonic() < until, self.output()
            assert self.process.poll() is None or text in self.output(), self.output()
            time.sleep(0.02)
        return time.monotonic()


def start(
    folder: Path,
    *,
    number: int = 0,
    count: int = 1,
    port: int = 0,
    devices: int = 8,
    fault: str | None = None,
    cached: bool = True,
    program: Sequence[str] = (str(DRIVER), "train", "shakespeare"),
    **flags: object,
) -> Session:
    """Start process `number` of `count`; `train__steps=3` is --train.steps 3."""
    text = folder / "text.txt"
    if not text.exists():
        text.write_text(TEXT)
    names = {k.replace("__", ".").replace("_", "-"): v for k, v in flags.items()}
    arguments = [f"--{name}={value}" for name, value in (FLAGS | names).items()]
    environment = os.environ | {
        "XLA_FLAGS": xla_flags(devices),
        "GLIBC_TUNABLES": "",
        "JAX_ENABLE_COMPILATION_CACHE": str(cached),
    }
    environment |= {} if fault is None else {"FAULT": fault}
    if count > 1:
        environment |= {
            "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
            "JAX_NUM_PROCESSES": str(count),
            "JAX_PROCESS_ID": str(number),
        }
    more = arguments if "train" in program else ()
    return Session([*program, *more], folder, environment)


def start_two(
    folder: Path, faults: dict[int, str], *, folders: Sequence[Path] = (), **how: Any
) -> list[Session]:
    """Start two processes of four devices; `faults` and `folders` are those of each."""
    how = dict(count=2, port=free_port(), devices=4) | how
    where = folders or (folder, folder)
    return [start(where[n], number=n, fault=faults.get(n), **how) for n in (0, 1)]


def end(*sessions: Session, seconds: float = 300) -> list[tuple[int, str]]:
    """Return exit status and output of each; fail if one is still there then."""
    until = time.monotonic() + seconds
    try:
        for session in sessions:
            session.process.wait(max(until - time.monotonic(), 0.1))
    except subprocess.TimeoutExpired as error:
        raise AssertionError([session.output() for session in sessions]) from error
    finally:
        for session in sessions:
            session.process.kill()
            session.process.wait()
    return [(session.process.returncode, session.output()) for session in sessions]


def left_behind(run_dir: Path) -> dict[str, object]:
    """Return what must not depend on how often the run was stopped.

    The SHA-256 of parameters, optimizer state and step, the log without what the clock
    decides, and the samples.
    """
    found = check_run(run_dir, say=lambda line: None)
    assert found.good, found.remedy()
    log = [
        {name: value for name, value in record.items() if name not in CLOCKS}
        for record in read_metrics(run_dir / "metrics.jsonl")
    ]
    samples = (run_dir / "samples.txt").read_bytes()
    return dict(
        steps={step.step: step.sha256 for step in found.steps},
        log=log,
        samples=hashlib.sha256(samples).hexdigest(),
    )
