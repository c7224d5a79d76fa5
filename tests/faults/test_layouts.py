"""A run on any number of devices and processes is the same run, and goes on on any.

CK12, DA9 and goal R9 of the reliability reference.
"""

import json
import os
from pathlib import Path

import layouts
import numpy as np
import pytest
from forks import Fork
from ports import free_port
from quick import xla_flags

from gpt2_jax.metrics import read_metrics

HERE = Path(__file__).parent
CLOSE = 1e-5  # of a loss: sums in another order


def start(
    command: list[str], *, devices: int, processes: int, folder: Path
) -> list[list[str]]:
    """Run processes of together `devices` devices; return what each printed."""
    flags = xla_flags(devices // processes)
    base = os.environ | {"XLA_FLAGS": flags, "GLIBC_TUNABLES": ""}
    address = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}"}
    running = []
    for number in range(processes):
        several = address | {
            "JAX_NUM_PROCESSES": str(processes),
            "JAX_PROCESS_ID": str(number),
        }
        out, error = (folder / f"{name}{number}.txt" for name in ("out", "error"))
        env = base | (several if processes > 1 else {})
        process = Fork(command, cwd=folder, env=env, stdout=out, stderr=error)
        running.append((process, (out, error)))
    try:
        codes = [process.wait(600) for process, _ in running]
    finally:
        for process, _ in running:
            process.kill()
    texts = [[file.read_text() for file in files] for _, files in running]
    assert codes == [0] * processes, texts
    return texts


def session(verb: str, folder: Path) -> dict:
    """Return what all layouts answer: those of one process, then those of two."""
    found = {}
    for processes in (1, 2):
        names = [name for name in layouts.AXES if name.endswith(f"x{processes}")]
        command = [str(HERE / "layouts.py"), verb, str(folder), *names]
        said = start(command, devices=8, processes=processes, folder=folder)
        answers = [json.loads(out.splitlines()[-1]) for out, _ in said]
        assert all(answer == answers[0] for answer in answers)
        found |= answers[0]
    return found


def compare(saved: dict, checked: dict) -> None:
    """Check that all restored is what was saved, and that all goes on alike."""
    wanted = {name: got["state"] for name, got in saved.items()}
    first = next(iter(saved.values()))
    orders = first["batches"]
    assert len(set(orders)) == layouts.BATCHES
    for name, got in saved.items():
        assert got["batches"] == orders, name
        np.testing.assert_allclose(got["losses"], first["losses"], atol=CLOSE, rtol=0)
    for name, got in checked.items():
        assert got["states"] == wanted, name
        assert got["resumed"] == orders[layouts.BATCHES // 2 :], name
        for losses in got["losses"].values():
            more = first["losses"][layouts.SAVED :]
            np.testing.assert_allclose(losses, more, atol=CLOSE, rtol=0)


@pytest.mark.faults
def test_every_layout_restores_what_every_other_saved(tmp_path):
    saved = session("save", tmp_path)
    assert list(saved) == list(layouts.AXES)
    checked = session("check", tmp_path)
    compare(saved, checked)
    pairs = [(a, b) for a, got in checked.items() for b in got["states"]]
    assert len(pairs) == 49


FLAGS = {
    "train.batch-tokens": 16 * 16,
    "train.micro-batch": 1,
    "optimizer.schedule": "constant",  # more steps change no rate
    "optimizer.warmup-steps": 1,
    "model.n-ctx": 16,
    "model.n-embd": 16,
    "model.n-layer": 1,
    "log.interval": 1,
    "evaluate.interval": 0,
    "evaluate.final-batches": 1,
    "evaluate.batch-sequences": 1,
    "evaluate.samples": 0,
    "checkpoint.interval": 100,
    "data.source": "text.txt",
}


def train(folder: Path, run: str, layout: str, steps: int) -> dict[int, float]:
    """Train or go on to `steps` from the shell, mesh unasked; return the losses."""
    devices, processes = map(int, layout.split("x"))
    flags = FLAGS | {"run-dir": run, "train.steps": steps}
    command = ["-m", "gpt2_jax.start", "train", "shakespeare"]
    command += [f"--{name}={value}" for name, value in flags.items()]
    start(command, devices=devices, processes=processes, folder=folder)
    records = read_metrics(folder / run / "metrics.jsonl")
    return {r["step"]: r["train_loss"] for r in records if "train_loss" in r}


@pytest.mark.faults
def test_a_run_goes_round_all_layouts_as_if_it_never_moved(tmp_path):
    (tmp_path / "text.txt").write_text("the quick brown fox jumps\n" * 200)
    ring = ["1x1", "8x2", "4x1", "2x2", "1x1"]
    for number, layout in enumerate(ring, start=1):
        moved = train(tmp_path, "moved", layout, 2 * number)
    alone = train(tmp_path, "alone", "1x1", 2 * len(ring))
    assert list(moved) == list(alone) == list(range(1, 11))
    for step, loss in alone.items():
        assert moved[step] == pytest.approx(loss, abs=CLOSE), step
