"""Switch each guard off, one after another, and see its test fail.

    python tests/faults/guards.py            # all, about ten seconds each
    python tests/faults/guards.py hosts lock # those whose file's path has a word

Works on a copy of the tracked files. Ends with status 1 if a test still passes.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]


class Guard(NamedTuple):
    """A line of the product, and the test that misses it."""

    file: str  # in gpt2_jax/
    line: str  # as it stands there, once
    off: str  # in its place
    test: str  # in tests/; a file, or a node in it


GUARDS = [
    Guard(
        "lock.py",
        "fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)",
        "pass",
        "test_lock.py",
    ),
    Guard(
        "train.py",
        "hosts.first_goes_first(lambda: _hold(directory, held))",
        "pass",
        "test_train.py::test_a_directory_that_another_process_trains_in_is_refused",
    ),
    Guard(
        "signals.py",
        "if before != signal.SIG_IGN:",
        "if True:",
        "test_signals.py::test_what_nohup_ignores_stays_ignored",
    ),
    Guard(
        "signals.py",
        "if self._breaking:",
        "if False:",
        "test_signals.py::test_a_signal_breaks_what_may_be_left_and_nothing_else",
    ),
    Guard(
        "signals.py",
        "threading.current_thread() is not threading.main_thread()",
        "False",
        "test_signals.py::test_a_thread_of_a_notebook_may_train",
    ),
    Guard(
        "train.py",
        "            with stop.breaks():\n                batch = next(batches)",
        "            if True:\n                batch = next(batches)",
        "faults/test_stops.py::test_a_signal_while_no_data_come_is_not_waited_out",
    ),
    Guard(
        "hosts.py",
        "    sys.stdout.flush()\n    sys.stderr.flush()\n    os._exit(status)",
        "    sys.exit(status)",
        "faults/test_stops.py::test_a_signal_while_no_data_come_is_not_waited_out",
    ),
    Guard(
        "train.py",
        "measures.take(measures.left_out(run.step), run.step, state.params)",
        "pass",
        "test_train.py::test_an_interrupted_run_leaves_what_one_left_alone_does",
    ),
    Guard(
        "train.py",
        "measures.drop_samples()",
        "pass",
        "faults/test_kills.py::test_three_kills_change_nothing",
    ),
    Guard(
        "metrics.py",
        '[r for r in records if r.get("step", 0) <= step and r.get("event") != "done"]',
        "list(records)",
        "test_train.py::test_an_interrupted_run_leaves_what_one_left_alone_does",
    ),
    Guard(
        "measure.py",
        "            self.stop.leave_if_it_came()\n",
        "",
        "test_train.py::test_an_interrupted_run_leaves_what_one_left_alone_does",
    ),
    Guard(
        "watchdog.py",
        "elif time.monotonic() - since > self._limit:",
        "elif False:",
        "test_watchdog.py::test_who_does_not_go_on_is_ended_and_all_are_told_of",
    ),
    Guard(
        "watchdog.py",
        "faulthandler.dump_traceback_later(self._limit + 2 * pause, exit=True)",
        "pass",
        "faults/test_processes.py::test_a_stuck_process_ends_all_with_their_stacks",
    ),
    Guard(
        "hosts.py",
        "heartbeat_timeout_seconds=heartbeat",
        "heartbeat_timeout_seconds=300",
        "faults/test_processes.py::test_a_process_that_is_frozen_ends_the_other",
    ),
    Guard(
        "hosts.py",
        "other = (digests != digests[0]).any(axis=2)",
        "other = (digests != digests).any(axis=2)",
        "faults/test_processes.py::test_a_host_that_differs_is_named_before_step_0",
    ),
    Guard(
        "train.py",
        "        hosts.check_shared(directory)\n",
        "",
        "faults/test_processes.py::test_other_data_or_another_directory_is_refused",
    ),
    Guard(
        "hosts.py",
        "timer = threading.Timer(EXIT_SECONDS, os._exit, [2])",
        "timer = threading.Timer(600, os._exit, [2])",
        "faults/test_processes.py::test_an_error_in_one_ends_both",
    ),
]


def still_passes(guard: Guard, copies: list[Path]) -> str | None:
    """Return what is wrong: the test passes without the guard, or did not run."""
    copy = copies.pop()
    path = copy / "gpt2_jax" / guard.file
    source = path.read_text()
    try:
        if source.count(guard.line) != 1:
            return f"{source.count(guard.line)} times in the source"
        path.write_text(source.replace(guard.line, guard.off))
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-n0", "-qx", "-m", "", guard.test],
            cwd=copy / "tests",
            env=os.environ | {"PYTHONPATH": str(copy)},
            capture_output=True,
            text=True,
        )
    finally:
        path.write_text(source)
        copies.append(copy)
    # 1: tests failed, which is right; 2: could not be collected; 4: no such test.
    if done.returncode == 1:
        return None
    return "its test passes" if done.returncode == 0 else done.stdout[-2000:]


def main() -> int:
    """Return 0 if every guard is missed."""
    words = sys.argv[1:] or [""]
    guards = [g for g in GUARDS if any(word in g.file for word in words)]
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    with tempfile.TemporaryDirectory() as scratch:
        copies = [Path(scratch, name) for name in ("a", "b")]
        for copy in copies:
            for name in listed.stdout.splitlines():
                target = copy / name
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / name, target)
        with ThreadPoolExecutor(len(copies)) as pool:
            found = pool.map(lambda guard: still_passes(guard, copies), guards)
            bad = 0
            for guard, problem in zip(guards, found, strict=True):
                bad += problem is not None
                print(
                    f"{problem or 'missed'}: {guard.file}: {guard.line!r}", flush=True
                )
    print(f"{len(guards) - bad} of {len(guards)} guards are missed by their tests")
    return bad > 0


if __name__ == "__main__":
    sys.exit(main())
