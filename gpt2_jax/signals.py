"""Signals that ask a run to end: after its step, or out of what may be left at once."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

import jax

from gpt2_jax import hosts

# A terminal that closes sends SIGHUP; what nohup told us to ignore stays ignored.
ALONE = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
NOTED = b"\nsaving this step, then stopping; once more stops at once\n"


class Interrupted(BaseException):
    """A signal came while nothing was done that its state depends on."""


class Stop:
    """Takes the signals that end a run, so that it saves its state first.

    Before `listen` they act as if nobody listened: there is nothing to save, and no
    handler of Python's runs while XLA compiles. So does a second one.

    Of several processes all stop at one step: jax carries SIGTERM from one to the
    others, and SIGINT is passed on as SIGTERM.
    """

    def __init__(self):
        self.signal: int | None = None  # the one that came
        self._before: dict[int, Any] = {}
        self._breaking = False
        self._asked = 0

    def __enter__(self) -> "Stop":
        return self

    def __exit__(self, kind, error, trace) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def listen(self) -> None:
        """Take signals from now on; a thread other than the main one cannot."""
        if self._before or threading.current_thread() is not threading.main_thread():
            return
        alone = jax.process_count() == 1
        for number in ALONE if alone else (signal.SIGINT,):
            before = signal.getsignal(number)
            if before != signal.SIG_IGN:
                self._before[number] = before
                signal.signal(number, self._note if alone else self._pass_on)

    def came(self) -> bool:
        """Say whether a signal came to any process; all of them ask equally often."""
        self._asked += 1
        if self.signal is None and hosts.asked_to_stop(self._asked):
            self.signal = signal.SIGTERM
        return self.signal is not None

    def leave_if_it_came(self) -> None:
        """Raise `Interrupted` if a signal came to any process."""
        if self.came():
            raise Interrupted

    @contextlib.contextmanager
    def breaks(self) -> Iterator[None]:
        """Let a signal raise `Interrupted` in here at once, in a run of one process."""
        self._breaking = True
        try:
            if self.signal is not None:
                raise Interrupted
            yield
        finally:
            self._breaking = False

    def _note(self, number: int, frame: Any) -> None:
        self.signal = number
        signal.signal(number, self._before[number])
        os.write(2, NOTED)  # print refuses if the signal came in the middle of one
        if self._breaking:
            raise Interrupted

    def _pass_on(self, number: int, frame: Any) -> None:
        signal.signal(number, self._before[number])
        signal.raise_signal(signal.SIGTERM)
