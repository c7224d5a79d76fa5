"""SIGTERM and Ctrl-C in every phase: saved and left, no step lost, and it is told."""

import random
import re
import signal
import time
from pathlib import Path

import pytest
import runs
from test_kills import reached, resumed

from gpt2_jax.checkpoint import saved_steps

CODES = {"SIGTERM": 143, "SIGINT": 130}
CALLS = {"step": (1, 8), "eval": (1, 1), "data": (20, 120), "save": (1, 1)}
STOPPED = re.compile(r"^stopped at step (\d+); the same command goes on", re.MULTILINE)


def newest(run_dir: Path) -> int:
    return saved_steps(run_dir / "checkpoints")[0]


def stops(seed: int) -> list[str]:
    """Return both signals in every phase, twice, at random moments within it."""
    draw = random.Random(seed)
    found = []
    for name in 2 * list(CODES):
        for phase, calls in CALLS.items():
            where = f"{phase}:{draw.randint(*calls)}:{draw.uniform(0.05, 0.3):.3f}"
            found.append(f"{name}@{where}")
        found.append(f"{name}@compile:1:{draw.uniform(0.05, 0.3):.3f}")
    return found


@pytest.mark.faults
def test_twenty_signals_in_all_phases_lose_nothing(tmp_path):
    left_alone = tmp_path / "alone"
    left_alone.mkdir()
    long = dict(train__steps=140)
    [(code, text)] = runs.end(runs.start(left_alone, log__interval=1, **long))
    assert code == 0, text
    at = 0  # the step where the run stands
    for fault in stops(seed=7):
        compiles = "compile" in fault
        how = dict(fault=fault, cached=not compiles, log__interval=1)
        session = runs.start(tmp_path, **how, **long)
        [(code, text)] = runs.end(session)
        number = signal.Signals[fault.partition("@")[0]]
        assert f"fault {number.name} in" in text, f"{fault}: {code}\n{text}"
        assert resumed(text) == at, f"{fault}\n{text}"
        if compiles or code == -number:  # at once: there is no step to save yet
            assert code == -number and reached(text) == 0, f"{code}\n{text}"
        else:
            assert code == CODES[number.name], f"{fault}: {code}\n{text}"
            [stopped] = STOPPED.findall(text)
            at = int(stopped)
            assert newest(tmp_path / "run") == at
    [(code, text)] = runs.end(runs.start(tmp_path, log__interval=1, **long))
    assert code == 0 and resumed(text) == at, text
    assert runs.left_behind(tmp_path / "run") == runs.left_behind(left_alone / "run")


@pytest.mark.faults
@pytest.mark.parametrize(
    "phase", ["compile:1", "step:3", "eval:1", "data:40", "save:2"]
)
def test_a_signal_to_one_of_two_stops_both_at_one_step(tmp_path, phase):
    processes = runs.start_two(tmp_path, {1: f"SIGTERM@{phase}:0.1"}, devices=2)
    (code, text), (other, _) = runs.end(*processes)
    assert (code, other) == (143, 143), text
    [stopped] = STOPPED.findall(text)
    assert newest(tmp_path / "run") == int(stopped)


def test_a_signal_while_no_data_come_is_not_waited_out(tmp_path):
    """A file system that hangs: the state is saved, the stuck thread left behind."""
    session = runs.start(tmp_path, fault="stall@data:150")
    session.wait_for("fault")
    time.sleep(5)  # until the batches are used up that were there
    session.process.send_signal(signal.SIGTERM)
    [(code, text)] = runs.end(session, seconds=60)
    assert code == 143, text
    [stopped] = STOPPED.findall(text)
    assert newest(tmp_path / "run") == int(stopped)


@pytest.mark.faults
def test_a_second_signal_ends_at_once_and_loses_no_checkpoint(tmp_path):
    session = runs.start(tmp_path, fault="stall@wait:5")  # a save that hangs
    session.wait_for("fault")
    before = saved_steps(tmp_path / "run" / "checkpoints")
    session.process.send_signal(signal.SIGTERM)
    time.sleep(1)
    session.process.send_signal(signal.SIGTERM)
    [(code, text)] = runs.end(session, seconds=40)
    assert code == -signal.SIGTERM, text
    assert set(before) <= set(saved_steps(tmp_path / "run" / "checkpoints"))
    [(code, text)] = runs.end(runs.start(tmp_path))
    assert code == 0 and resumed(text) == max(before), text


@pytest.mark.faults
@pytest.mark.parametrize("second", ["no", "yes"])
def test_ctrl_c_while_it_compiles_ends_at_once(tmp_path, second):
    """Twice was a segmentation fault in XLA once."""
    session = runs.start(tmp_path, fault="none@compile:1", cached=False)
    session.wait_for("fault")
    time.sleep(0.2)
    session.process.send_signal(signal.SIGINT)
    if second == "yes":
        time.sleep(0.05)
        session.process.send_signal(signal.SIGINT)
    [(code, text)] = runs.end(session, seconds=40)
    assert code == -signal.SIGINT, text
