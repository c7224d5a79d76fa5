"""End a run of several processes when one of them is stuck, and say which.

jax's heartbeat ends a run whose process is gone. One that is alive and stuck leaves
the others waiting in a collective for ever (jax issue 38503).
"""

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping

import jax

from gpt2_jax import hosts

STATUS = 75  # EX_TEMPFAIL of sysexits.h: start it again
FOLDER = "gpt2_jax/progress/"
WRITTEN = "gpt2_jax/written/"  # who has told its stacks
LOOKS = 10  # in the time allowed, and at least one every 2 seconds
WRITE_SECONDS = 2.0  # for the others to be gone before process 0 is
MEET_SECONDS = 4.0  # for all to tell their stacks; a busy machine needs some of them


class Watchdog:
    """Ends every process once none has gone on for `limit` seconds; 0: never.

    Each process tells the others how far it is. Who is last of all is the stuck one.
    Alone there is nobody to wait for, and nothing is watched.
    """

    def __init__(self, limit: int):
        self._limit = limit
        self._beats, self._doing = 0, "starts"
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "Watchdog":
        if self._limit and jax.process_count() > 1:
            self._thread.start()
        return self

    def __exit__(self, kind, error, trace) -> None:
        self._ended.set()
        faulthandler.cancel_dump_traceback_later()

    def beat(self, doing: str) -> None:
        """Say that this process goes on, and with what."""
        self._beats += 1
        self._doing = doing

    def hears(self, say: Callable[[str], None]) -> Callable[[str], None]:
        """Return `say` as a function whose every line is a beat."""

        def told(line: str) -> None:
            self._beats += 1
            say(line)

        return told

    def _watch(self) -> None:
        pause = min(2.0, self._limit / LOOKS)
        seen, since = {}, time.monotonic()
        while not self._ended.wait(pause):
            # For a thread that holds the interpreter's lock, and stops this one too.
            # The others lose their connections when this process ends: process 0 ends
            # after them, and jax ends one of them once process 0 is gone.
            first = hosts.is_first()
            late = self._limit + 2 * pause + 2 * WRITE_SECONDS * first
            faulthandler.dump_traceback_later(late, exit=first)
            hosts.publish(f"{FOLDER}{jax.process_index()}", self._progress())
            now = hosts.published(FOLDER)
            if now is not None and now != seen:
                seen, since = now, time.monotonic()
            elif time.monotonic() - since > self._limit:
                return self._end(seen)

    def _progress(self) -> str:
        return f"{self._beats} {self._doing}"

    def _end(self, everyone: Mapping[str, str]) -> None:
        lines = [f"error: no process has gone on for {self._limit} s"]
        for name, text in sorted(everyone.items()):
            beats, _, doing = text.partition(" ")
            lines.append(f"  process {name.removeprefix(FOLDER)}: {doing} ({beats})")
        lines.append("stacks of this process, the latest call first:")
        print("\n".join(lines), file=sys.stderr, flush=True)
        faulthandler.dump_traceback(all_threads=True)
        self._meet()
        time.sleep(WRITE_SECONDS * hosts.is_first())
        os._exit(STATUS)

    def _meet(self) -> None:
        """Wait until every process has told its stacks: jax ends who loses another."""
        hosts.publish(f"{WRITTEN}{jax.process_index()}", "told")
        until = time.monotonic() + MEET_SECONDS
        while len(hosts.published(WRITTEN) or ()) < jax.process_count():
            if time.monotonic() > until:
                return
            time.sleep(0.1)
