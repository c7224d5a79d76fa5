"""Runs command lines in one fresh process and says what each printed, left and cost.

A process of its own has no type-checking hook, as users have none, and a peak of memory
that is its own. As a program: requests as JSON on standard input, answers on output.
"""

import contextlib
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

MOST_MB = 100  # shared/reference/reliability.md, R12
MOST_SECONDS = 20  # a command that refuses takes milliseconds
MOST_LINE = 7000  # characters of a message


class Outcome(NamedTuple):
    """What one command line did."""

    status: int | str  # of the exit, or the exception that left it
    out: str
    err: str
    left: list[str]  # files and directories that are new, changed or gone
    grown: float  # MB by which the peak of memory lay above what was held before
    seconds: float
    compiled: int  # programs


def run_all(home: Path, requests: list[tuple[Path, list[str]]]) -> list[Outcome]:
    """Return the outcomes of `gpt2-jax ARGUMENTS..`, each in its own directory.

    `home` holds caches and temporary files and belongs to what is watched.
    """
    names = ("XDG_CACHE_HOME", "HF_HOME", "TMPDIR", "TIKTOKEN_CACHE_DIR")
    places = {name: str(home / name.lower()) for name in names}
    for place in places.values():
        Path(place).mkdir(parents=True, exist_ok=True)
    fonts = Path(tempfile.gettempdir(), "gpt2_jax_fonts")  # seconds to list them anew
    apart = {"HF_HUB_OFFLINE": "1", "HOME": str(home), "MPLCONFIGDIR": str(fonts)}
    environment = os.environ | places | apart
    for name in ("JAX_COMPILATION_CACHE_DIR", "XLA_FLAGS"):
        environment.pop(name, None)
    run = subprocess.run(
        [sys.executable, __file__, str(home)],
        input=json.dumps([(str(place), arguments) for place, arguments in requests]),
        capture_output=True,
        text=True,
        env=environment,
        timeout=500,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return [Outcome(*answer) for answer in json.loads(run.stdout)]


def choose(request: pytest.FixtureRequest, names: Iterable[str]) -> list[str]:
    """Return those of `names` that are a parameter of a test that is to run."""
    specs = [getattr(item, "callspec", None) for item in request.session.items]
    asked = {spec.params.get("name") for spec in specs if spec is not None}
    return [name for name in names if name in asked]


def check_refused(outcome: Outcome, expected: str) -> None:
    """Fail unless the command was refused by one line, and left and cost nothing."""
    assert outcome.status == 2, outcome
    assert outcome.err.startswith("error: ") and outcome.err.count("\n") == 1, outcome
    assert re.fullmatch(r"[^\x00-\x1f\x7f]*\n", outcome.err), outcome
    assert expected in outcome.err, outcome
    assert len(outcome.err) < MOST_LINE, outcome
    assert outcome.out == "", outcome
    check_harmless(outcome)


def check_harmless(outcome: Outcome) -> None:
    """Fail if the command left something, took much memory or long, or compiled."""
    assert outcome.left == [], outcome
    assert outcome.grown < MOST_MB, outcome
    assert outcome.seconds < MOST_SECONDS, outcome
    assert outcome.compiled == 0, outcome


def _main(home: Path) -> None:
    import jax

    from gpt2_jax import cli

    compiled: list[str] = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, *_, **__: compiled.append(name) if "compile" in name else None
    )
    requests = json.loads(sys.stdin.read())
    answers: list[Any] = []
    for place, arguments in [requests[0], *requests]:  # the first one warms up
        os.chdir(place)
        before = _tree(Path(place)) | _tree(home)
        compiled.clear()
        _forget_peak()
        held, began = _memory("VmRSS"), time.monotonic()
        with contextlib.ExitStack() as stack:
            out = stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
            err = stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
            status = _run(cli.run, arguments)
        seconds, grown = time.monotonic() - began, _memory("VmHWM") - held
        after = _tree(Path(place)) | _tree(home)
        left = sorted(name for name, _ in before.items() ^ after.items())
        texts = out.getvalue()[:MOST_LINE], err.getvalue()[:MOST_LINE]
        answers.append([status, *texts, left, grown, seconds, len(compiled)])
    json.dump(answers[1:], sys.stdout)


def _run(command, arguments: list[str]) -> int | str:
    try:
        return command(arguments)
    except BaseException as error:  # noqa: BLE001  what comes through is the finding
        return f"{type(error).__name__}: {error}"[:500]


def _tree(root: Path) -> dict[str, tuple[int, int]]:
    """Return when each file was written, and its size; of directories, their names."""
    found = {str(root): (0, 0)}
    for top, folders, names in os.walk(root):
        found |= {str(Path(top, name)): (0, 0) for name in folders}
        for name in names:
            status = Path(top, name).lstat()
            found[str(Path(top, name))] = status.st_mtime_ns, status.st_size
    return found


def _forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")  # man 5 proc: resets VmHWM


def _memory(name: str) -> float:
    text = Path("/proc/self/status").read_text()
    return int(re.search(rf"{name}:\s*(\d+) kB", text)[1]) / 1024


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
