"""One trainer at a time in a run directory."""

import contextlib
import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from gpt2_jax.config import ConfigError

NAME = ".lock"


@contextlib.contextmanager
def hold(directory: Path) -> Iterator[None]:
    """Hold the directory as long as the context lasts; a killed holder lets go.

    Raises
    ------
    ConfigError
        If another process holds it: the message names process and host.
    """
    path = directory / NAME
    with path.open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The last holder may have deleted it since it was opened.
            mine = os.fstat(file.fileno())
            held = path.exists() and os.path.samestat(path.stat(), mine)
        except BlockingIOError:
            held = False
        if not held:
            file.seek(0)
            raise ConfigError(
                f"{directory} is in use by {file.read().strip() or 'another process'}; "
                "wait until it ends, or choose another --run-dir"
            )
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        try:
            yield
        finally:
            path.unlink()
