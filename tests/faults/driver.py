"""Run `gpt2-jax ARGUMENTS` with a fault in it: python driver.py ARGUMENTS.

FAULT is ACTION@PHASE:CALL[:DELAY]: the action happens DELAY seconds after the CALL-th
call of the phase began (0: before it). The product has no hooks: each phase is a
function that is wrapped here.
"""

import ctypes
import os
import shutil
import signal
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

from gpt2_jax import cli, hosts, train
from gpt2_jax.checkpoint import Checkpoints
from gpt2_jax.data import loader
from gpt2_jax.measure import Measures
from gpt2_jax.report import Reporter

ACTION, _, WHERE = os.environ.get("FAULT", "none@none:0").partition("@")
PHASE, CALL, DELAY = (*WHERE.split(":"), "0")[:3]
WAITS = ("eval", "sample", "data", "finish")


def act() -> None:
    """Do what FAULT asks for; what goes on for ever is ended from outside."""
    if ACTION == "stall":
        time.sleep(1000)
    elif ACTION == "stall_held":  # with the interpreter's lock
        ctypes.PyDLL(None).sleep(1000)
    elif ACTION == "pause":
        time.sleep(40)
    elif ACTION == "raise":
        raise RuntimeError("a fault of the test")
    elif ACTION in signal.Signals.__members__:
        os.kill(os.getpid(), signal.Signals[ACTION])


def wrap(owner, name: str, phase: str) -> None:
    """Let calls of `owner.name` count as calls of `phase`."""
    original, calls = getattr(owner, name), []

    def wrapped(*args, **how):
        calls.append(phase)
        if phase == PHASE and len(calls) == int(CALL):
            print(f"fault {ACTION} in {phase}", flush=True)
            if phase == "delete":  # in the middle of it
                next(
                    path for path in Path(args[0]).rglob("*") if path.is_file()
                ).unlink()
            if float(DELAY):
                threading.Timer(float(DELAY), act).start()
            else:
                act()
            if phase in WAITS:  # so that a signal finds the phase still going on
                time.sleep(2 * float(DELAY))
        return original(*args, **how)

    setattr(owner, name, wrapped)


def make_program(*args):
    """Return the program whose first training step, which compiles, is a phase."""
    holder = SimpleNamespace(train_step=(program := MAKE(*args)).train_step)
    wrap(holder, "train_step", "compile")
    return program._replace(train_step=holder.train_step)


MAKE, train.make_program = train.make_program, make_program
wrap(train, "_set_up", "set_up")
wrap(Reporter, "dispatched", "step")
wrap(loader._Windows, "__getitem__", "data")
wrap(Measures, "loss", "eval")
wrap(Measures, "_samples", "sample")
wrap(train, "_finish", "finish")
wrap(Checkpoints, "save", "save")
wrap(Checkpoints, "finish", "wait")
wrap(Checkpoints, "restore", "restore")
wrap(shutil, "rmtree", "delete")
for name in ("WAIT_SECONDS", "SEEN_SECONDS"):
    setattr(hosts, name, int(os.environ.get(name, getattr(hosts, name))))
signal.signal(signal.SIGINT, signal.SIG_DFL)  # as `start.main` does
sys.exit(cli.run(sys.argv[1:]))
