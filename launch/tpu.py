#!/usr/bin/env python3
"""Train gpt2_jax on Cloud TPU: create, install, check, start, watch, resume.

    launch/tpu.py train NAME --type v5litepod-16 --spot \\
        --run-dir gs://BUCKET/runs/one --data gs://BUCKET/data/webtext -- gpt2_124m

Standard library and `gcloud` only. docs/tpu.md tells the whole way; `--dry-run`
prints every gcloud line. Tested with a fake gcloud only, never on a TPU.
"""

import argparse
import json
import re
import shlex
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from cloud import SETUP_MINUTES, Cloud, GaveUp, Lost, Mistake, Settings, last_line, say

SOURCE = Path(__file__).resolve().parents[1]
SKEW_SECONDS = 5.0  # that clocks of workers may differ
SAVE_SECONDS, KILL_SECONDS = 300, 20  # a run may take to end: asked to, or broken


class Family(NamedTuple):
    """What the name of an accelerator type implies."""

    image: str  # cloud.google.com/tpu/docs/runtimes, as of 2026
    zone: str  # cloud.google.com/tpu/docs/types-zones, a 2025 copy, read 2026-11-25
    cores: bool  # the number in the type counts TensorCores, two a chip; else chips
    devices_per_chip: int  # jax sees both cores of a v2 or v3 chip, else the chip


FAMILIES = {
    "v2": Family("tpu-ubuntu2204-base", "us-central1-b", True, 2),
    "v3": Family("tpu-ubuntu2204-base", "europe-west4-a", True, 2),
    "v4": Family("tpu-ubuntu2204-base", "us-central2-b", True, 1),
    "v5p": Family("v2-alpha-tpuv5", "us-east5-a", True, 1),
    "v5litepod": Family("v2-alpha-tpuv5-lite", "us-west4-a", False, 1),
    "v6e": Family("v2-alpha-tpuv6e", "us-east1-d", False, 1),
}
# States of nodes and queued resources: the enums of gcloud's tpu v2 messages.
QUEUED = ("ACCEPTED", "WAITING_FOR_RESOURCES")
DEAD = ("FAILED", "SUSPENDED", "PREEMPTED", "TERMINATED", "UNKNOWN", "HIDDEN")
STOPPED = ("STOPPED", "STOPPING")


def main(argv: list[str]) -> int:
    """Return the exit status: 0 done, 1 gave up, 2 a mistake, 130 interrupted."""
    verbs: dict[str, Callable[[Cloud], None]] = dict(
        create=bring_up,
        setup=setup,
        train=train,
        status=status,
        logs=logs,
        stop=stop,
        delete=Cloud.delete,
    )
    try:
        verb, settings = parse(argv, list(verbs))
        verbs[verb](Cloud(settings))
    except (Mistake, GaveUp, Lost) as error:
        say(f"error: {error}")
        return 2 if isinstance(error, Mistake) else 1
    except KeyboardInterrupt:
        say("interrupted; what was started goes on. Come back with the same command,")
        say("or with `status`, `logs` or `stop` in place of its verb")
        return 130
    return 0


def train(cloud: Cloud) -> None:
    """Stay in charge until the run says that it is done; re-create and resume."""
    s, failures, step = cloud.settings, 0, -1
    while True:
        try:
            bring_up(cloud)
            return run_to_the_end(cloud)
        except Lost as lost:
            failures = 1 if cloud.step > step else failures + 1
            step, cloud.recreate = cloud.step, cloud.recreate or lost.recreate
            if failures > s.retries:
                raise GaveUp(
                    f"{lost}; {failures} failures without a new step in between are "
                    f"more than --retries {s.retries}. Checkpoints stay in "
                    f"{s.run_dir}; `delete` ends what is left of {s.name}"
                ) from lost
            say(f"lost: {lost}; try {failures} of {s.retries} to mend it")
            cloud.sleep(min(s.backoff_cap_seconds, s.backoff_seconds * 2**failures / 2))


def bring_up(cloud: Cloud) -> None:
    """Return once the TPU is ready; create it, and first delete one that is dead."""
    s, queued_since, created = cloud.settings, time.monotonic(), False
    up_since = queued_since
    while (state := cloud.state()) != "READY" or cloud.recreate:
        say(f"{s.name} in {s.zone}: {state}{', given up' * cloud.recreate}")
        if state in STOPPED:
            start = f"gcloud compute tpus tpu-vm start {s.name} --zone={s.zone}"
            raise Mistake(f"{s.name} is {state}; run `{start}` or `delete` it")
        if state in DEAD and created:
            raise Lost(f"the new {s.name} is {state}", recreate=True)
        if state in DEAD or (cloud.recreate and state not in ("ABSENT", "DELETING")):
            cloud.delete()
            cloud.recreate = False
            continue
        if state == "ABSENT":
            cloud.recreate = False
            if cloud.create():
                up_since, created = time.monotonic(), True
                continue
            say(f"no capacity for {s.type} in {s.zone}")
        if state in ("ABSENT", *QUEUED):
            up_since = time.monotonic()
            if up_since - queued_since > s.wait_hours * 3600:
                hours = f"--wait-hours {s.wait_hours:g}"
                raise GaveUp(f"no capacity for {s.type} in {s.zone} in {hours}")
        elif time.monotonic() - up_since > s.up_minutes * 60:
            why = f"{s.name} is still {state} after --up-minutes {s.up_minutes:g}"
            raise Lost(why, recreate=True)
        cloud.sleep(s.poll_seconds)
    say(f"{s.name} in {s.zone}: READY")


def run_to_the_end(cloud: Cloud) -> None:
    """Start the run unless it is going or done, and watch it."""
    s = cloud.settings
    answers = cloud.ask_state()
    same = all(a.get("arguments") == s.train_arguments for a in answers.values())
    states = {answer["state"] for answer in answers.values()}
    if not (_is_done(answers) and same) and states != {"running"}:
        if "running" in states:  # on some of the workers: half a run never ends
            cloud.ask("stop", s.run_id, str(KILL_SECONDS), "no")
        install(cloud)
        cloud.ask("start", s.run_id, *s.train_arguments)
    elif not same:
        say("it was started with other arguments; these count once it is stopped")
    say(f"watching run {s.run_id}; Ctrl-C leaves it going")
    watch(cloud)


def setup(cloud: Cloud) -> None:
    """Install and check, unless the run is going."""
    answers = cloud.ask_state()
    if any(answer["state"] == "running" for answer in answers.values()):
        raise Mistake(f"run {cloud.settings.run_id} is going; `stop` it first")
    install(cloud)


def install(cloud: Cloud) -> None:
    """Install what is missing on every worker, clear the stale lock, compare workers.

    What is committed is installed, from an archive made here.
    """
    s = cloud.settings
    archive = Path(tempfile.gettempdir()) / f"gpt2_jax-{s.name}.tar.gz"
    git = ["git", "-C", str(SOURCE), "archive", "--format=tar.gz"]
    made = cloud.run([*git, f"--output={archive}", s.ref])
    if made.status:
        raise Mistake(f"--ref {s.ref}: {last_line(made.error)}")
    cloud.over_ssh("scp", str(archive), f"{s.name}:gpt2_jax.tar.gz", "--worker=all")
    unpack = (
        "rm -rf gpt2-jax/source && mkdir -p gpt2-jax/source && "
        "tar -xzf gpt2_jax.tar.gz -C gpt2-jax/source && "
    )
    words = ["bash", "gpt2-jax/source/launch/setup.sh", "../gpt2_jax.tar.gz"]
    say(f"installing on {s.hosts} workers; a new one takes some minutes")
    cloud.ssh(unpack + shlex.join([*words, s.bucket, s.data]), minutes=SETUP_MINUTES)
    for index, answer in cloud.ask("unlock").items():
        if answer["held_by"]:
            who = ", ".join(answer["held_by"])
            raise Mistake(f"worker {index}: {who} holds the TPU; end it there")
    compare(s, cloud.ask("check", str(s.hosts)))


def compare(s: Settings, answers: dict[int, dict[str, Any]]) -> None:
    """Raise if a worker is not what the type says, or differs from the others."""
    expected = (s.devices, s.devices // s.hosts)
    versions = [json.dumps(answer["versions"]) for answer in answers.values()]
    usual = max(versions, key=versions.count)
    times = sorted(answer["time"] for answer in answers.values())
    for (index, answer), mine in zip(answers.items(), versions, strict=True):
        found = (answer["devices"], answer["local_devices"])
        if found != expected:
            why = f"{found[0]} devices, {found[1]} of them its own; expected {expected}"
            raise Lost(f"worker {index} has {why} (--devices, --hosts)", recreate=True)
        if mine != usual:
            raise Lost(f"worker {index} has {mine}, others {usual}", recreate=True)
        skew = answer["time"] - times[len(times) // 2]
        if abs(skew) >= SKEW_SECONDS:
            why = f"the clock of worker {index} is {skew:+.1f} s off"
            raise Lost(f"{why}; allowed: less than {SKEW_SECONDS:g}", recreate=True)
        free, least = answer["disk_free_bytes"] / 1e9, s.min_disk_gb
        if free < least:
            allowed = f"at least --min-disk-gb {least:g}; make room or take less --data"
            raise Mistake(f"worker {index} has {free:.1f} GB free; allowed: {allowed}")
    say(f"{len(answers)} workers, {s.devices} devices, {usual}")


def watch(cloud: Cloud) -> None:
    """Return when the run is done; raise if it will not become so by itself."""
    s, ended_since = cloud.settings, None
    while True:
        state = cloud.state(polled=True)
        if state != "READY":
            raise Lost(f"{s.name} is {state}")
        answers = cloud.ask_state(polled=True)
        if _is_done(answers):
            return say(f"done: run {s.run_id} at step {cloud.step}, in {s.run_dir}")
        _raise_if_ended(s, answers)
        some_ended = any(answer["state"] == "exited" for answer in answers.values())
        ended_since = (ended_since or time.monotonic()) if some_ended else None
        if ended_since and time.monotonic() - ended_since > s.up_minutes * 60:
            running = [i for i, a in answers.items() if a["state"] == "running"]
            raise Lost(f"worker {', '.join(map(str, running))} does not end")
        cloud.sleep(s.poll_seconds)


def status(cloud: Cloud) -> None:
    """Print the state of the TPU, and of the run on each worker."""
    state = cloud.state()
    say(f"{cloud.settings.name} in {cloud.settings.zone}: {state}")
    if state == "READY":
        for index, answer in cloud.ask_state().items():
            say(f"worker {index}: {json.dumps(answer)}")


def logs(cloud: Cloud) -> None:
    """Print the end of one worker's log."""
    s = cloud.settings
    follow = ["-f"] if s.follow else []
    tail = shlex.join(["tail", "-n", str(s.lines), *follow, f"gpt2-jax/{s.run_id}.log"])
    words = ["tpu-vm", "ssh", s.name, f"--worker={s.worker}", f"--command={tail}"]
    if cloud.run(cloud.line(*words), capture=False, minutes=None).status:
        raise Lost(f"no log of run {s.run_id} on worker {s.worker}")


def stop(cloud: Cloud) -> None:
    """End the run at a checkpoint; the TPU stays until `delete`."""
    s = cloud.settings
    for index, answer in cloud.ask("stop", s.run_id, str(SAVE_SECONDS), "yes").items():
        say(f"worker {index}: {answer['state']}")
    say(f"{s.name} is still there; `delete` ends it, `train` resumes the run")


def _is_done(answers: dict[int, dict[str, Any]]) -> bool:
    """Tell whether all processes ended well and the record of the end is written."""
    ended_well = all(answer.get("exit") == 0 for answer in answers.values())
    return ended_well and any(answer["done"] for answer in answers.values())


def _raise_if_ended(s: Settings, answers: dict[int, dict[str, Any]]) -> None:
    """Raise if a worker's run is over, though the run is not done."""
    states = {answer["state"] for answer in answers.values()}
    if "running" not in states and any(a.get("stopped") for a in answers.values()):
        raise GaveUp(f"`stop` ended run {s.run_id}; `train` again resumes it")
    for index, answer in answers.items():
        if answer.get("exit", 0):
            for line in answer["log"]:
                say(f"worker {index}: {line}")
            why = f"worker {index} ended with status {answer['exit']}"
            if answer["exit"] == 2:  # gpt2-jax: a user's mistake
                raise Mistake(f"{why}: gpt2-jax train refuses what it was asked")
            raise Lost(why)
        if answer["state"] in ("absent", "bare"):
            raise Lost(f"worker {index} has no run any more")
    if "running" not in states:
        raise Lost("the run ended before its last step")


def parse(argv: list[str], verbs: list[str]) -> tuple[str, Settings]:
    """Return verb and settings; what cannot work is refused before anything runs."""
    cut = argv.index("--") if "--" in argv else len(argv)
    values = vars(_parser(verbs).parse_args(argv[:cut]))
    verb, layout = values.pop("verb"), (values.pop("hosts"), values.pop("devices"))
    family, hosts, devices = read_type(values["type"], *layout)
    values["zone"] = values["zone"] or family.zone
    values["image"] = values["image"] or family.image
    values["queued"] = values["spot"] if values["queued"] is None else values["queued"]
    values["run_id"] = values["run_id"] or values["name"]
    values["run_dir"] = values["run_dir"] or f"runs/{values['run_id']}"
    arguments = tuple(argv[cut + 1 :])
    s = Settings(**values, hosts=hosts, devices=devices, arguments=arguments)
    for name in (s.name, s.run_id):
        if not re.fullmatch(r"[a-z]([a-z0-9-]{0,61}[a-z0-9])?", name):
            raise Mistake(f"name is {name!r}; allowed: a-z, 0-9 and -, from a letter")
    for flag in ("--run-dir", "--data.source"):
        if any(word.partition("=")[0] == flag for word in s.arguments):
            raise Mistake(f"{flag} stands behind --; give --run-dir and --data before")
    if verb == "train" and not s.bucket and (s.spot or s.hosts > 1):
        found = f"--run-dir is {s.run_dir!r} with {s.hosts} hosts, spot {s.spot}"
        raise Mistake(f"{found}; a spot TPU or a pod needs --run-dir gs://BUCKET/PATH")
    if s.data and not s.data.startswith("gs://"):
        raise Mistake(f"--data is {s.data!r}; allowed: gs://BUCKET/PATH of shards")
    return verb, s


def read_type(
    name: str, hosts: int | None, devices: int | None
) -> tuple[Family, int, int]:
    """Return family, hosts and devices of a type, unless the flags know better.

    A host is a VM with 4 chips; v5e and v6e of up to 8 chips are one host
    (cloud.google.com/tpu/docs/v5e and v6e, VM types).
    """
    found = re.fullmatch(r"(\w+)-(\d+)", name)
    if not found or found[1] not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise Mistake(f"--type is {name!r}; allowed: one of {known}, - and a number")
    family = FAMILIES[found[1]]
    chips = int(found[2]) // (2 if family.cores else 1)
    one_host = 4 if family.cores else 8
    hosts = hosts or (1 if chips <= one_host else chips // 4)
    return family, hosts, devices or chips * family.devices_per_chip


def _parser(verbs: list[str]) -> argparse.ArgumentParser:
    usage = (
        f"tpu.py {{{'|'.join(verbs)}}} NAME [flags] [-- arguments of gpt2-jax train]"
    )
    parser = argparse.ArgumentParser(
        usage=usage,
        description=(__doc__ or "").partition("\n")[0],
        allow_abbrev=False,
    )
    add = parser.add_argument
    either = argparse.BooleanOptionalAction
    add("verb", choices=verbs)
    add("name", help="of the TPU, and of its queued resource")
    add("--type", default="v5litepod-8", help="accelerator type (%(default)s)")
    add("--zone", help="default: one that has the type")
    add("--project", help="default: gcloud's")
    add("--image", help="runtime version; default: the one of the type")
    add("--spot", action="store_true", help="cheaper, and may be taken away")
    add("--queued", action=either, help="queue for capacity; default: if --spot")
    add("--hosts", type=int, help="default: derived from the type")
    add("--devices", type=int, help="of jax on all hosts; default: derived")
    add("--run-dir", help="gs://BUCKET/PATH; one host on demand: also a path there")
    add("--run-id", help="names the run's process and log on the workers (NAME)")
    add("--data", default="", help="gs://BUCKET/PATH of token shards to copy")
    add("--ref", default="HEAD", help="commit that is installed (%(default)s)")
    add("--retries", type=int, default=10, help="without a new step in between (10)")
    add("--backoff-seconds", type=float, default=30, help="doubled each time (30)")
    add("--backoff-cap-seconds", type=float, default=900, help="at most (900)")
    add("--poll-seconds", type=float, default=60, help="between looks (60)")
    add("--wait-hours", type=float, default=72, help="for capacity (72)")
    add("--up-minutes", type=float, default=30, help="to come up after that (30)")
    add("--ssh-tries", type=int, default=3, help="before a worker is lost (3)")
    add("--min-disk-gb", type=float, default=10, help="free after setup (10)")
    add("--worker", default="0", help="whose log (0)")
    add("--lines", type=int, default=50, help="of the log (50)")
    add("--follow", action="store_true", help="the log")
    add("--dry-run", action="store_true", help="print the lines, run none")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
