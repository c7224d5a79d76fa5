"""No save is lost: killed, refused, on a full disk, or the last before the exit."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from small_runs import (
    contents,
    final_digest,
    good_steps,
    left_alone,
    losses,
    names,
    saved_steps,
    train,
)

TEMPORARY = r"/4\.orbax-checkpoint-tmp"


@pytest.fixture
def alone() -> Path:
    return left_alone()


@pytest.fixture
def run(tmp_path) -> Path:
    return tmp_path / "run"


def assert_goes_on_as_if_nothing_befell(run: Path, alone: Path, resumed: int | None):
    ended = train(run)
    assert ended.returncode == 0, ended.stderr
    told = f"resumed {run} at step {resumed}\n"
    assert (told in ended.stdout) == (resumed is not None), ended.stdout
    assert final_digest(run) == final_digest(alone)
    assert losses(run) == losses(alone)
    assert names(run) == []


def test_the_last_save_is_on_disk_when_the_run_ends(alone):
    """The save of step 8 is asynchronous and nothing comes after it but the exit."""
    assert good_steps(alone) == [6, 8]
    assert names(alone) == []


@pytest.mark.parametrize(
    ("event", "pattern", "left"),
    [
        # Before anything of step 4 is written, in between, before its last rename.
        pytest.param("os.mkdir", TEMPORARY, [2], marks=pytest.mark.faults),
        pytest.param(
            "os.rename", TEMPORARY + r"/params", [2], marks=pytest.mark.faults
        ),
        pytest.param("os.rename", TEMPORARY + "$", [2], marks=pytest.mark.faults),
        # Of the first save: there is no checkpoint, so the run may begin again.
        pytest.param(
            "os.rename", r"/2\.orbax-checkpoint-tmp$", [], marks=pytest.mark.faults
        ),
    ],
    ids=["begun", "written in part", "written", "the first"],
)
def test_killed_while_it_saves(run, alone, event, pattern, left):
    killed = train(run, ("kill", event, pattern, 1))
    assert killed.returncode == -9 and "strike: kill" in killed.stdout
    assert saved_steps(run / "checkpoints") == left
    assert bool(names(run)) == (event == "os.rename")  # what is in flight
    assert_goes_on_as_if_nothing_befell(run, alone, left[0] if left else None)


@pytest.mark.faults
@pytest.mark.parametrize(
    ("event", "pattern", "count"),
    [
        ("os.rename", r"checkpoints/2$", 1),
        ("shutil.rmtree", r"2\.deleted$", 1),
        ("os.remove", r"^(manifest\.ocdbt|_METADATA|_sharding)$", 2),
    ],
    ids=["before", "renamed", "half deleted"],
)
def test_killed_while_it_deletes(run, alone, event, pattern, count):
    """Step 2 goes when step 6 is whole; what stays restores, whatever is left of 2."""
    killed = train(run, ("kill", event, pattern, count))
    assert killed.returncode == -9 and "strike: kill" in killed.stdout
    steps = saved_steps(run / "checkpoints")
    assert steps == ([6, 4, 2] if pattern.startswith("checkpoints") else [6, 4])
    assert good_steps(run) == sorted(steps)
    assert_goes_on_as_if_nothing_befell(run, alone, 6)


@pytest.mark.parametrize(
    ("event", "pattern", "left"),
    [
        pytest.param("os.mkdir", TEMPORARY, [2], marks=pytest.mark.faults),
        # In Orbax's thread: told by the next save.
        pytest.param("os.rename", TEMPORARY + "$", [2], marks=pytest.mark.faults),
        # Of the last save: told by the exit.
        ("os.rename", r"/8\.orbax-checkpoint-tmp$", [6, 4]),
    ],
    ids=["at once", "later", "last"],
)
def test_a_save_that_fails_ends_the_run_with_status_2(run, alone, event, pattern, left):
    failed = train(run, ("refuse", event, pattern, 1))
    assert failed.returncode == 2
    lines = failed.stderr.splitlines()
    assert len(lines) == 1, failed.stderr
    assert lines[0].startswith(f"error: a checkpoint could not be saved in {run}")
    assert f"(step {left[0]} is the last one saved)" in lines[0]
    assert "No space left on device" in lines[0]
    assert max(step for step, _ in losses(run)) <= left[0] + 4  # told by the next save
    assert saved_steps(run / "checkpoints") == left == good_steps(run)[::-1]
    assert_goes_on_as_if_nothing_befell(run, alone, left[0])


@pytest.mark.faults
def test_a_deletion_that_fails_is_told_and_the_run_goes_on(run, alone):
    ended = train(run, ("refuse", "shutil.rmtree", r"/\d\.deleted$", 1))
    assert ended.returncode == 0, ended.stderr
    assert f"{run}/checkpoints/2 could not be deleted: OSError" in ended.stdout
    assert names(run) == ["2.deleted", "4.deleted"]
    assert final_digest(run) == final_digest(alone)
    assert train(run).returncode == 0
    assert names(run) == []


@pytest.fixture
def small_disk(tmp_path):
    """Return a file system of 8 MB of its own; none without the right to mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no right to mount tmpfs; the limit on file sizes stands in for it")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.faults
def test_a_full_disk_keeps_the_last_good_step(small_disk, alone):
    """The disk of a run is filled by others while step 4 is saved."""
    run = small_disk / "run"
    filler = small_disk / "filler"
    failed = train(run, ("fill", "os.mkdir", TEMPORARY, 1), FILLER=str(filler))
    assert_failed_at_step_4(run, failed)
    filler.unlink()
    assert_goes_on_as_if_nothing_befell(run, alone, 2)


@pytest.mark.faults
def test_files_that_cannot_grow_keep_the_last_good_step(run, alone):
    failed = train(run, ("limit", "os.mkdir", TEMPORARY, 1))
    assert_failed_at_step_4(run, failed)
    assert_goes_on_as_if_nothing_befell(run, alone, 2)


def assert_failed_at_step_4(run: Path, failed: subprocess.CompletedProcess) -> None:
    assert failed.returncode == 2, failed.stderr
    assert "(step 2 is the last one saved)" in failed.stderr
    assert "No space left" in failed.stderr or "File too large" in failed.stderr
    assert failed.stderr.count("\n") == 1, failed.stderr
    assert saved_steps(run / "checkpoints") == good_steps(run) == [2]


@pytest.mark.faults
def test_a_finished_run_is_not_saved_again(run, alone):
    shutil.copytree(alone, run)
    before = contents(run / "checkpoints")
    assert train(run).returncode == 0
    assert contents(run / "checkpoints") == before
