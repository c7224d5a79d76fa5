"""Programs as processes of their own that need not import anything: forks.

To import gpt2_jax takes as long as a short run. One process for each of pytest's has
done so, started no thread of ours and used no device; it forks for each program that
is asked for. From there a fork is what `python PROGRAM ARGUMENTS ..` would have become.
"""

import atexit
import functools
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

LOOK_SECONDS = 0.02
IMPORTED = ("gpt2_jax.cli", "gpt2_jax.train", "matplotlib.backends.backend_agg")


class Fork:
    """A process with what the tests use of `subprocess.Popen`."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        cwd: Path,
        env: Mapping[str, str],
        stdout: Path,
        stderr: Path,
    ):
        self.returncode: int | None = None
        files = dict(stdout=str(stdout.absolute()), stderr=str(stderr.absolute()))
        how = dict(command=list(command), cwd=str(cwd), env=dict(env), **files)
        self.pid = _ask(fork=how)

    def poll(self) -> int | None:
        """Return the exit status, -N for signal N; None while it runs."""
        if self.returncode is None:
            self.returncode = _ask(poll=self.pid)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Return the exit status; raise `subprocess.TimeoutExpired`."""
        until = float("inf") if timeout is None else time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > until:
                raise subprocess.TimeoutExpired(str(self.pid), timeout or 0.0)
            time.sleep(LOOK_SECONDS)
        return code

    def send_signal(self, number: int) -> None:
        """Send a signal, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Send SIGKILL, unless it has ended."""
        self.send_signal(signal.SIGKILL)


def run(
    command: Sequence[str], *, env: Mapping[str, str], logs: Path, timeout: float
) -> subprocess.CompletedProcess:
    """Return how a program ended; what it prints goes through files in `logs`."""
    out, error = logs / "out.txt", logs / "error.txt"
    process = Fork(command, cwd=Path.cwd(), env=env, stdout=out, stderr=error)
    try:
        code = process.wait(timeout)
    finally:
        process.kill()
    texts = (path.read_text(errors="replace") for path in (out, error))
    return subprocess.CompletedProcess(list(command), code, *texts)


@functools.cache
def _server() -> subprocess.Popen:
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    return subprocess.Popen([sys.executable, __file__], text=True, **pipes)


def _ask(**what: Any) -> Any:
    server = _server()
    server.stdin.write(json.dumps(what) + "\n")
    server.stdin.flush()
    return json.loads(server.stdout.readline())


def serve() -> None:
    """Fork and tell of forks, until nobody asks any more."""
    for name in IMPORTED:
        importlib.import_module(name)
    for line in sys.stdin:
        asked = json.loads(line)
        if how := asked.get("fork"):
            answer = os.fork() or _become(**how)
        else:
            pid, status = os.waitpid(asked["poll"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        print(json.dumps(answer), flush=True)


def _become(command: list[str], cwd: str, env: dict[str, str], **files: str) -> int:
    """Run the program in this process, and end it as Python ends."""
    code = 1
    try:
        _take_on(env, cwd, **files)
        program, *arguments = command
        sys.argv = [program, *arguments]
        if program == "-m":
            sys.argv = arguments
            runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
        else:
            sys.path.insert(0, str(Path(program).parent))
            runpy.run_path(program, run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:  # noqa: BLE001  all that a program may raise
        sys.excepthook(*sys.exc_info())
    finally:
        threading._shutdown()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _take_on(env: dict[str, str], cwd: str, stdout: str, stderr: str) -> None:
    import jax

    cached = env.get("JAX_ENABLE_COMPILATION_CACHE", "True") == "True"
    jax.config.update("jax_enable_compilation_cache", cached)  # read at the import
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    for number, name in ((1, stdout), (2, stderr)):
        file = os.open(name, os.O_WRONLY | os.O_TRUNC | os.O_APPEND | os.O_CREAT, 0o644)
        os.dup2(file, number)
        os.close(file)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.stdout = os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)


if __name__ == "__main__":
    serve()
