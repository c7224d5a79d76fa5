"""Two processes of which one is gone, stuck, or not like the other."""

import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import runs

HEARTBEAT, WATCHDOG = 10, 12
SLACK = 30  # for a machine that does much else


@pytest.mark.faults
@pytest.mark.parametrize("stuck", [0, 1])
@pytest.mark.parametrize("fault", ["stall@data:160", "stall_held@step:4"])
def test_a_stuck_process_ends_all_with_their_stacks(tmp_path, stuck, fault):
    how = dict(train__watchdog=WATCHDOG, data__prefetch=1, devices=2)
    processes = runs.start_two(tmp_path, {stuck: fault}, **how)
    began = processes[stuck].wait_for("fault")
    found = runs.end(*processes, seconds=120)
    assert time.monotonic() - began < WATCHDOG + 10 + SLACK
    for number, (code, text) in enumerate(found):
        assert code != 0, text
        assert "Thread 0x" in text and "train.py" in text, text
        if "held" not in fault:  # else its own thread cannot run; Python's C code does
            assert code == 75, text
            assert f"error: no process has gone on for {WATCHDOG} s" in text, text
            assert f"  process {stuck}: waits for the batch of step" in text, text
        if "held" not in fault and number == stuck:
            assert "driver.py" in text  # where it is stuck


@pytest.mark.faults
@pytest.mark.parametrize("stopped", [0, 1])
def test_a_process_that_is_frozen_ends_the_other(tmp_path, stopped):
    how = dict(train__heartbeat=HEARTBEAT, train__watchdog=0, devices=2)
    processes = runs.start_two(tmp_path, {stopped: "none@step:8"}, **how)
    began = processes[stopped].wait_for("fault")
    processes[stopped].process.send_signal(signal.SIGSTOP)
    try:
        [(code, text)] = runs.end(processes[1 - stopped])
    finally:
        processes[stopped].process.kill()
        processes[stopped].process.wait()
    assert code != 0, text
    assert time.monotonic() - began < 2 * HEARTBEAT + SLACK, text


@pytest.mark.faults
@pytest.mark.parametrize("phase", ["step:3", "eval:1", "save:1", "set_up:1"])
def test_an_error_in_one_ends_both(tmp_path, phase):
    how = dict(train__heartbeat=HEARTBEAT, devices=2)
    processes = runs.start_two(tmp_path, {1: f"raise@{phase}"}, **how)
    began = processes[1].wait_for("fault")
    found = runs.end(*processes, seconds=120)
    assert time.monotonic() - began < HEARTBEAT + 5 + 5 + SLACK
    assert "a fault of the test" in found[1][1]
    assert all(code not in (0, 75) for code, _ in found), found


@pytest.mark.faults
def test_one_that_compiles_for_longer_is_waited_for(tmp_path):
    """Longer than the 30 s that gloo gives the others when it connects them."""
    how = dict(train__steps=10, evaluate__samples=0, devices=2)
    for code, text in runs.end(
        *runs.start_two(tmp_path, {1: "pause@compile:1"}, **how)
    ):
        assert code == 0, text


@pytest.mark.faults
def test_a_host_that_differs_is_named_before_step_0(tmp_path):
    """Every field of the config, and all that is compared beside it."""
    worker = Path(__file__).with_name("differ.py")
    processes = runs.start_two(tmp_path, {}, program=[str(worker)])
    found = runs.end(*processes, seconds=120)
    assert [code for code, _ in found] == [0, 0], found
    for _, text in found:
        told = re.findall(r"^refused (.+)$", text, flags=re.MULTILINE)
        assert len(told) > 90 and "config train.seed" in told and "jaxlib" in told
        assert "accepted" not in text


@pytest.mark.faults
@pytest.mark.parametrize("what", ["data", "run_dir"])
def test_other_data_or_another_directory_is_refused(tmp_path, what, monkeypatch):
    """The same command on hosts whose files differ."""
    monkeypatch.setenv("SEEN_SECONDS", "5")  # until a file is given up
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder, text in zip(folders, (runs.TEXT, runs.TEXT.swapcase()), strict=True):
        folder.mkdir()
        (folder / "text.txt").write_text(text)
    # One shared run directory and two texts, or two directories of one name.
    run_dir = tmp_path / "run"
    if what == "data":
        how = {"data__source": "shards", "run_dir": run_dir}
        for folder in folders:
            subprocess.run(
                [sys.executable, "-m", "gpt2_jax.start", "prepare", "text.txt", "--out"]
                + ["shards", "--tokenizer", "bytes"],
                cwd=folder,
                check=True,
            )
    else:
        how = {"data__source": folders[0] / "text.txt"}
    processes = runs.start_two(tmp_path, {}, folders=folders, **how)
    for code, text in runs.end(*processes):
        assert code == 2, text
        assert f"error: {what} on process 1 (" in text, text
        assert "is not that of process 0; start all" in text
    assert not list(tmp_path.rglob("checkpoints/*"))
