"""The program `gpt2-jax`: what a process needs before and after its verb.

Nothing that takes long is imported before it may start itself again.
"""

import gc
import io
import os
import signal
import sys
from pathlib import Path

from gpt2_jax.hardware import HUGE_PAGES


def main() -> None:
    """Run the verb on the command line and exit: 0 well, 2 for a user's mistake."""
    _use_huge_pages()
    verb = sys.argv[1:2]
    short = verb == ["generate"]
    if short:  # too short for garbage: looking for it would only slow the imports
        gc.disable()
    training = verb == ["train"]
    if training and signal.getsignal(signal.SIGINT) == signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # no waiting for XLA's compiler
    for screen in (sys.stdout, sys.stderr):  # of any encoding
        if isinstance(screen, io.TextIOWrapper):
            screen.reconfigure(errors="replace")

    from gpt2_jax.cli import run

    status = run(sys.argv[1:])
    if short:
        _leave_at_once(status)
    sys.exit(status)


def _use_huge_pages() -> None:
    """Start this program again with huge pages for malloc, where Linux offers them.

    XLA:CPU takes fresh memory on every call, and 4 KiB page faults then cost more than
    small operations (an Adam update of 38M elements: 180 -> 33 ms). glibc reads the
    setting only when a process begins. A GLIBC_TUNABLES that is set, even to nothing,
    is left alone.
    """
    offered = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if "GLIBC_TUNABLES" in os.environ or not offered.is_file():
        return
    quick = sys.argv[1:2] in ([], ["prepare"]) or {"-h", "--help"} & set(sys.argv)
    if "[never]" in offered.read_text() or quick:
        return
    os.environ["GLIBC_TUNABLES"] = HUGE_PAGES
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _leave_at_once(status: int) -> None:
    """End the process, which holds nothing to save: Python would tidy up for 0.8 s."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has seen enough
        status = 141
    os._exit(status)


if __name__ == "__main__":
    main()
