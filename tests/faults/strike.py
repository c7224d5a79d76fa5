"""gpt2-jax, struck at one moment of its work with files.

    python strike.py ACTION EVENT PATTERN COUNT gpt2-jax's arguments ..

Python tells audit hooks of every `open`, `os.mkdir`, `os.rename`, `os.remove`. At the
COUNT-th EVENT whose path matches PATTERN comes ACTION: `kill` (SIGKILL), `refuse` (the
disk is full from then on, for such events), `fill` (the disk of $FILLER is filled up),
`limit` (no file may grow beyond 4 KiB from then on), `none`.
"""

import contextlib
import os
import re
import resource
import signal
import sys

from gpt2_jax import cli

action, event, pattern = sys.argv[1:4]
left = int(sys.argv[4])


def strike(name: str, arguments: tuple) -> None:
    global left
    if name != event or not re.search(pattern, str(arguments[0])):
        return
    left -= 1
    if left > 0 or (left < 0 and action != "refuse"):
        return
    print(f"strike: {action} at {name} {arguments[0]}", flush=True)
    if action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif action == "refuse":
        raise OSError(28, "No space left on device")
    elif action == "fill":
        fill(os.environ["FILLER"])
    elif action == "limit":
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))


def fill(path: str) -> None:
    with contextlib.suppress(OSError), open(path, "wb", buffering=0) as file:
        for size in (65_536, 512):
            with contextlib.suppress(OSError):
                while file.write(bytes(size)) == size:
                    pass


if action != "none":
    sys.addaudithook(strike)
sys.exit(cli.run(sys.argv[5:]))
