"""Do one thing on one TPU worker and answer with one line of JSON.

`tpu.py` runs `worker.py VERB ...` on every worker over ssh. Standard library only; jax
is imported by `check` alone, so that everything else answers while the TPU is busy.
"""

import glob
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path.home() / "gpt2-jax"
LOCK = Path("/tmp/libtpu_lockfile")  # jax#10192: it outlives a killed process
ACCELERATORS = ["/dev/accel*", "/dev/vfio/[0-9]*"]  # v4 and older; v5 and newer
PACKAGES = ["gpt2_jax", "jax", "jaxlib", "libtpu"]
TAIL_BYTES = 2**16
NAME = "gpt2-jax-run"  # how a run's process is told from any other
# The shell outlives the signals that the run answers, and writes down how it ended.
WRAPPER = 'trap : TERM INT; exit=$1; shift 2; "$@"; echo $? > "$exit"'


def main() -> None:
    """Answer the verb on the command line."""
    verb, *rest = sys.argv[1:]
    verbs = dict(unlock=unlock, check=check, start=start, state=state, stop=stop)
    answer = dict(worker=worker_index(socket.gethostname())) | verbs[verb](*rest)
    # One write: the answers of all workers share one terminal.
    os.write(1, f"\n{json.dumps(answer)}\n".encode())


def worker_index(hostname: str) -> int:
    """Return N of a TPU VM's hostname, `t1v-n-<hash>-w-N`."""
    found = re.search(r"-w-(\d+)$", hostname)
    return int(found[1]) if found else 0


def unlock() -> dict[str, Any]:
    """Remove libtpu's lock file, unless a process has an accelerator open.

    `lsof` names who has /dev/accel* or /dev/vfio/* open; root sees all processes.
    """
    devices = [path for pattern in ACCELERATORS for path in glob.glob(pattern)]
    found = []
    if devices:
        command = ["sudo", "lsof", "-t", "-w", *devices]
        done = subprocess.run(command, capture_output=True, text=True)
        found = sorted({int(pid) for pid in done.stdout.split()})
    holders = [f"{pid} ({_command_line(pid)[:80]})" for pid in found]
    stale = LOCK.exists() and not holders
    if stale:
        subprocess.run(["sudo", "rm", "-f", str(LOCK)], check=True)
    return dict(held_by=holders, removed=stale)


def check(hosts: str) -> dict[str, Any]:
    """Return devices, versions, free disk and time, read at the same moment on all."""
    import jax
    from jax.experimental import multihost_utils

    if int(hosts) > 1:
        jax.distributed.initialize(initialization_timeout=120)
        multihost_utils.sync_global_devices("clock")
    now = time.time()
    return dict(
        time=now,
        devices=jax.device_count(),
        local_devices=jax.local_device_count(),
        versions={"python": sys.version.split()[0]}
        | {p: _version(p) for p in PACKAGES},
        disk_free_bytes=shutil.disk_usage(ROOT).free,
    )


def start(run_id: str, *arguments: str) -> dict[str, Any]:
    """Start `gpt2-jax train ARGUMENTS` so that it outlives the ssh connection."""
    if _run_pid(run_id):
        return dict(state="running", started=False)
    for suffix in ("exit", "stopped"):
        _file(run_id, suffix).unlink(missing_ok=True)
    program = [str(ROOT / "venv/bin/gpt2-jax"), "train", *arguments]
    exit_file = str(_file(run_id, "exit"))
    # An accelerator that cannot be opened is an error, never a run on the CPU.
    environment = {"JAX_PLATFORMS": "tpu,cpu"} | os.environ
    with _file(run_id, "log").open("ab") as log:
        process = subprocess.Popen(
            ["bash", "-c", WRAPPER, NAME, exit_file, run_id, *program],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    _file(run_id, "pid").write_text(str(process.pid))
    _file(run_id, "arguments").write_text(json.dumps(arguments))
    return dict(state="running", started=True)


def state(run_id: str, run_dir: str) -> dict[str, Any]:
    """Return whether the run is absent, running or exited, and how far it is.

    `done` says that metrics.jsonl ends with the record of a finished run.
    """
    last = _last_records(ROOT / run_dir / "metrics.jsonl")
    steps = [record["step"] for record in last if "step" in record]
    answer = dict(
        state="running" if _run_pid(run_id) else "absent",
        done=bool(last) and last[-1].get("event") == "done",
        step=steps[-1] if steps else None,
        stopped=_file(run_id, "stopped").exists(),
        arguments=_arguments(run_id),
    )
    if answer["state"] == "absent" and _file(run_id, "exit").exists():
        answer |= dict(state="exited", exit=int(_file(run_id, "exit").read_text()))
        log = _tail(_file(run_id, "log")).strip().splitlines()
        answer["log"] = log[-5:]
    return answer


def stop(run_id: str, seconds: str, on_purpose: str) -> dict[str, Any]:
    """Ask the run to save and end; kill it if it still runs after `seconds`."""
    pid = _run_pid(run_id)
    if on_purpose == "yes":
        _file(run_id, "stopped").touch()
    if not pid:
        return dict(state="absent")
    os.killpg(pid, signal.SIGTERM)
    until = time.monotonic() + float(seconds)
    while _run_pid(run_id):
        if time.monotonic() > until:
            os.killpg(pid, signal.SIGKILL)
            return dict(state="killed")
        time.sleep(0.1)
    return dict(state="stopped")


def _file(run_id: str, suffix: str) -> Path:
    return ROOT / f"{run_id}.{suffix}"


def _arguments(run_id: str) -> list[str]:
    path = _file(run_id, "arguments")
    return json.loads(path.read_text()) if path.exists() else []


def _run_pid(run_id: str) -> int | None:
    """Return the process of the run if it lives; a number used again is not it."""
    try:
        pid = int(_file(run_id, "pid").read_text())
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
    except (OSError, ValueError):
        return None
    return pid if NAME in words and run_id in words else None


def _command_line(pid: int) -> str:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
    except OSError:
        return "ended"
    return words.replace("\0", " ").strip()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def _last_records(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    _push(path)
    records = []
    for line in _tail(path).splitlines():
        try:
            record = json.loads(line)
        except ValueError:  # the torn first or last line
            continue
        if isinstance(record, dict):
            records.append(record)
    return records


def _push(path: Path) -> None:
    """Have gcsfuse upload what was written: it does on fsync and close alone."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _tail(path: Path) -> str:
    if not path.is_file():
        return ""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - TAIL_BYTES))
        return file.read().decode(errors="replace")


if __name__ == "__main__":
    main()
