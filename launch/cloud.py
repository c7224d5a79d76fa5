"""One TPU on Google Cloud, by `gcloud` lines that are printed before they run."""

import json
import os
import re
import shlex
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

WORKER = "gpt2-jax/venv/bin/python gpt2-jax/source/launch/worker.py"
BARE = """echo '{"state": "bare"}'"""
SETUP_MINUTES, STEP_MINUTES = 40, 15  # that ssh may take before its worker is lost
NOT_FOUND = r"NOT_FOUND|not found|could not be found"
NO_CAPACITY = (
    r"no more capacity|insufficient (reserved )?capacity|stockout|"
    r"RESOURCE_EXHAUSTED|code.? 8\b"
)
# What trying again cannot mend, and what can.
FINAL = {
    r"quota(?!.*per minute)": "ask for more at console.cloud.google.com/iam-admin/"
    "quotas, or take another --type or --zone",
    r"PERMISSION_DENIED|does not have (permission|.* access)|Permission '": "ask the "
    "owner of the project or bucket for the roles that docs/tpu.md names",
    r"SERVICE_DISABLED|has not been used in project": "run `gcloud services enable "
    "tpu.googleapis.com`",
    r"active account|auth login|Reauthentication": "run `gcloud auth login`",
    r"not present in the SSH agent": "run `ssh-add ~/.ssh/google_compute_engine`",
    r"INVALID_ARGUMENT|unrecognized arguments|argument --|Invalid value|property \[": (
        "check --project, --zone, --type and --image"
    ),
}


class Mistake(Exception):
    """What only the user can mend; exit status 2."""


class GaveUp(Exception):
    """The end of trying; exit status 1."""


class Lost(Exception):
    """The run does not go on by itself; `recreate` says that the TPU is to blame."""

    def __init__(self, why: str, *, recreate: bool = False):
        super().__init__(why)
        self.recreate = recreate


@dataclass(frozen=True, kw_only=True)
class Settings:
    """One command line, resolved."""

    name: str
    type: str
    zone: str
    image: str
    project: str | None
    spot: bool
    queued: bool
    hosts: int
    devices: int  # of all hosts, as jax counts
    run_id: str
    run_dir: str  # as given: gs://... or a path on the only host
    data: str  # gs://... of shards, or empty
    ref: str  # commit of this repository that is installed
    arguments: tuple[str, ...]  # of gpt2-jax train
    retries: int
    backoff_seconds: float
    backoff_cap_seconds: float
    poll_seconds: float
    wait_hours: float  # for capacity
    up_minutes: float  # from capacity to a node that answers
    ssh_tries: int
    min_disk_gb: float
    worker: str  # of logs
    lines: int
    follow: bool
    dry_run: bool

    @property
    def bucket(self) -> str:
        """Return the name of the bucket that holds the run directory, or nothing."""
        scheme, _, rest = self.run_dir.partition("gs://")
        return "" if scheme else rest.partition("/")[0]

    @property
    def mounted_run_dir(self) -> str:
        """Return the run directory as a worker sees it."""
        return self.run_dir.replace("gs://", "/mnt/gcs/", 1)

    @property
    def train_arguments(self) -> list[str]:
        """Return what follows `gpt2-jax train` on every worker."""
        data = ["--data.source", f"data/{Path(self.data).name}"] if self.data else []
        return [*self.arguments, "--run-dir", self.mounted_run_dir, *data]


class Reply(NamedTuple):
    """How a command ended; both texts are empty where it wrote to the terminal."""

    status: int
    out: str = ""
    error: str = ""


class Cloud:
    """The TPU of the settings: its state, and commands on its workers."""

    def __init__(self, settings: Settings):
        self.settings = settings
        self.step = -1  # the last one that the run was seen at, ever
        self.recreate = False  # whether to delete the TPU though it looks well
        self._polled: set[str] = set()  # lines that are printed once only
        self._canned = _canned_answers(settings)

    def state(self, *, polled: bool = False) -> str:
        """Return one word: a state of the node, or of its queued resource before."""
        queued = self.settings.queued
        if queued:
            what = "--format=value(state.state,state.failedData.error.message)"
            found = self._describe("queued-resources", what, polled)
            word, _, why = found.partition("\t")
            self._refuse(f"ERROR: (gcloud) {why}")
            if word != "ACTIVE":
                return word
        word = self._describe("tpu-vm", "--format=value(state)", polled)
        return "TERMINATED" if queued and word == "ABSENT" else word

    def create(self) -> bool:
        """Ask for the TPU; return whether there is capacity, or a place in the queue.

        Raises
        ------
        Mistake
            If Google refuses for want of quota, permission or sense.
        """
        s = self.settings
        words, image = ["tpu-vm", "create", s.name], f"--version={s.image}"
        if s.queued:
            words = ["queued-resources", "create", s.name, f"--node-id={s.name}"]
            image = f"--runtime-version={s.image}"
        spot = ["--spot"] if s.spot else []
        line = self.line(*words, f"--accelerator-type={s.type}", image, *spot)
        reply = self.run(line, minutes=s.up_minutes)
        if reply.status == 0 or re.search("ALREADY_EXISTS|already exists", reply.error):
            return True
        self._refuse(reply.error)
        if re.search(NO_CAPACITY, reply.error, re.IGNORECASE):
            return False
        raise Lost(f"gcloud cannot create {s.name}: {last_line(reply.error)}")

    def delete(self) -> None:
        """Delete the TPU and its place in the queue, if there are any."""
        name = self.settings.name
        words = ["tpu-vm", "delete", name, "--quiet"]
        if self.settings.queued:
            words = ["queued-resources", "delete", name, "--force", "--quiet"]
        reply = self.run(self.line(*words))
        if reply.status and not re.search(NOT_FOUND, reply.error):
            self._refuse(reply.error)
            raise Lost(f"gcloud cannot delete {name}: {last_line(reply.error)}")

    def ask_state(self, *, polled: bool = False) -> dict[int, dict[str, Any]]:
        """Return each worker's state of the run; say and remember how far it is."""
        s = self.settings
        answers = self.ask("state", s.run_id, s.mounted_run_dir, polled=polled)
        steps = [a["step"] for a in answers.values() if a.get("step") is not None]
        if steps and max(steps) > self.step:
            self.step = max(steps)
            say(f"step {self.step}")
        return answers

    def ask(self, verb: str, *words: str, polled=False) -> dict[int, dict[str, Any]]:
        """Return what worker.py answers on each worker.

        Raises
        ------
        Lost
            If a worker cannot be reached or does not answer; the message names it.
        """
        command = f"{WORKER} {shlex.join([verb, *words])}"
        if verb == "state":
            command = f"if test -e gpt2-jax/ready; then {command}; else {BARE}; fi"
        reply = self.ssh(command, polled=polled, canned=verb)
        lines = [line for line in reply.out.splitlines() if line.startswith("{")]
        found = [json.loads(line) for line in lines]
        answers = {answer["worker"]: answer for answer in found if "worker" in answer}
        missing = [i for i in range(self.settings.hosts) if i not in answers]
        if len(missing) > len(found) - len(answers):  # the others have no worker.py yet
            names = ", ".join(map(str, missing))
            raise Lost(f"worker {names}: no answer to `{verb}`", recreate=True)
        answers |= {index: {"state": "bare"} for index in missing}
        return dict(sorted(answers.items()))

    def ssh(self, command: str, *, minutes: float = STEP_MINUTES, **how: Any) -> Reply:
        """Run a command on all workers."""
        words = ("ssh", self.settings.name, "--worker=all", f"--command={command}")
        return self.over_ssh(*words, minutes=minutes, **how)

    def over_ssh(self, *words: str, **how: Any) -> Reply:
        """Run `tpu-vm ssh` or `scp`, again where the connection fails.

        Raises
        ------
        Lost
            If it fails still, or if the command does; the message names the worker.
        """
        line, reply = self.line("tpu-vm", *words), Reply(255)
        for attempt in range(max(1, self.settings.ssh_tries)):
            if attempt:
                self.sleep(self.settings.poll_seconds)
            reply = self.run(line, **how)
            if reply.status == 0:
                return reply
            self._refuse(reply.error)
            if reply.status != 255:  # that of ssh itself; others are the command's
                break
        why = f"{_blamed(reply.error)}: {words[0]} ended with status {reply.status}"
        raise Lost(f"{why}: {last_line(reply.error)}", recreate=True)

    def line(self, *words: str) -> list[str]:
        """Return a gcloud command line: names, then zone and project, then flags."""
        s = self.settings
        names = [word for word in words if not word.startswith("--")]
        flags = [word for word in words if word.startswith("--")]
        project = [f"--project={s.project}"] if s.project else []
        where = [f"--zone={s.zone}", *project]
        return ["gcloud", "compute", "tpus", *names, *where, *flags]

    def run(
        self,
        line: list[str],
        *,
        minutes: float | None = STEP_MINUTES,
        polled: bool = False,
        capture: bool = True,
        canned: str = "",
    ) -> Reply:
        """Print a command line and run it; a polled one is printed the first time."""
        text = shlex.join(line)
        if not polled or text not in self._polled:
            say(f"+ {text}")
        if polled:
            self._polled.add(text)
        if self.settings.dry_run:
            return Reply(0, next(self._canned[canned]) if canned else "")
        return _execute(line, minutes, capture)

    def sleep(self, seconds: float) -> None:
        """Wait, unless nothing runs."""
        if not self.settings.dry_run:
            time.sleep(seconds)

    def _describe(self, group: str, what: str, polled: bool) -> str:
        line = self.line(group, "describe", self.settings.name, what)
        reply = self.run(line, polled=polled, canned=group)
        if reply.status == 0:
            return reply.out.strip()
        if re.search(NOT_FOUND, reply.error):
            return "ABSENT"
        self._refuse(reply.error)
        raise Lost(f"gcloud cannot tell the state: {last_line(reply.error)}")

    def _refuse(self, text: str) -> None:
        """Raise if Google says what trying again cannot mend."""
        _, begins, said = text.partition("ERROR: (gcloud")
        for pattern, remedy in FINAL.items():
            if begins and re.search(pattern, said, re.IGNORECASE):
                raise Mistake(f"{said.partition(') ')[2].splitlines()[0]}; {remedy}")


def say(line: str) -> None:
    """Print a line at once."""
    print(line, flush=True)


def last_line(text: str) -> str:
    """Return the last line that says something."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "no message"


def _execute(line: list[str], minutes: float | None, capture: bool) -> Reply:
    pipe = subprocess.PIPE if capture else None
    try:
        # In a session of its own: gcloud's ssh processes end with it.
        process = subprocess.Popen(
            line,
            text=True,
            stdin=subprocess.DEVNULL,
            stdout=pipe,
            stderr=pipe,
            start_new_session=True,
        )
    except FileNotFoundError as error:
        raise Mistake(f"{line[0]} is not on PATH; install it") from error
    try:
        out, error = process.communicate(
            timeout=None if minutes is None else minutes * 60
        )
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return Reply(255, "", f"no answer in {minutes:g} minutes")
    except KeyboardInterrupt:
        os.killpg(process.pid, signal.SIGTERM)
        raise
    return Reply(process.returncode, out or "", error or "")


def _blamed(error: str) -> str:
    """Return the workers that gcloud's messages name as failed, or tried again."""
    failed = re.findall(r"execution on worker (\d+) failed", error)
    tried = re.findall(r"connect to worker (\d+)", error)
    names = sorted(set(failed or [n for n in tried if tried.count(n) > 1]), key=int)
    return f"worker {', '.join(names)}" if names else "a worker"


def _canned_answers(s: Settings) -> dict[str, Iterator[str]]:
    """Return plausible answers for --dry-run, from no TPU to a run that is done."""

    def each(**values: Any) -> str:
        return "\n".join(json.dumps(dict(worker=i) | values) for i in range(s.hosts))

    def forever(*texts: str) -> Iterator[str]:
        yield from texts
        while True:
            yield texts[-1]

    queue = forever("ABSENT", "WAITING_FOR_RESOURCES", "ACTIVE")
    node = forever("READY") if s.queued else forever("ABSENT", "READY")
    bare = "\n".join([json.dumps({"state": "bare"})] * s.hosts)
    running = each(state="running", done=False, step=None, stopped=False)
    done = each(state="exited", exit=0, done=True, step=1, stopped=False)
    devices = dict(devices=s.devices, local_devices=s.devices // s.hosts)
    return {
        "queued-resources": queue,
        "tpu-vm": node,
        "state": forever(bare, running, done),
        "check": forever(each(**devices, versions={}, disk_free_bytes=1e12, time=0.0)),
        "unlock": forever(each(held_by=[], removed=False)),
        "start": forever(each(state="running", started=True)),
        "stop": forever(each(state="stopped")),
    }
