"""The launcher against a fake gcloud: waits, preemptions, dead workers, refusals."""

import importlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

HERE = Path(__file__).parent
LAUNCH = HERE.parents[1] / "launch"
POD = ["--type", "v5litepod-16", "--run-dir", "gs://bucket/runs/one"]
FAST = ["--poll-seconds", "0", "--backoff-seconds", "0", "--project", "mine"]
RECIPE = ["gpt2_124m", "--train.steps", "100"]
ARGUMENTS = [*RECIPE, "--run-dir", "/mnt/gcs/bucket/runs/one"]
NO_SSH = "ERROR: (gcloud.ssh) [/usr/bin/ssh] exited with return code [255].\n"
CAPACITY = 'ERROR: (gcloud.create) {"code": 8, "message": "There is no more capacity"}'
PREEMPTED = dict(states=["READY", "READY", "PREEMPTED"], run=["running@40"])
WELL = dict(states=["READY"], run=["running@60", "done"])


class Fake:
    """A fake gcloud (and git) on PATH, its scenario and what it was asked."""

    def __init__(self, where: Path):
        self.where = where
        bin = where / "bin"
        bin.mkdir()
        begin = f"#!{sys.executable} -IS\nimport sys\nsys.path.append({str(HERE)!r})\n"
        play = "import fake_gcloud\nfake_gcloud.main(sys.argv[1:])\n"
        for name, text in dict(gcloud=begin + play, git="#!/bin/sh\n").items():
            (bin / name).write_text(text)
            (bin / name).chmod(0o755)
        path = f"{bin}{os.pathsep}{os.environ['PATH']}"
        self.environment = os.environ | {"PATH": path, "FAKE_GCLOUD": str(where)}

    def play(self, *, hosts: int = 4, **scenario) -> None:
        self.scenario = dict(hosts=hosts, **scenario)
        (self.where / "scenario.json").write_text(json.dumps(self.scenario))

    def command(self, verb: str, *flags: str, recipe=RECIPE) -> list[str]:
        launcher = [sys.executable, "-ES", str(LAUNCH / "tpu.py")]
        words = [*launcher, verb, "pod", *FAST, *flags]
        return [*words, "--", *recipe] if recipe else words

    def tpu(
        self, verb: str, *flags: str, recipe=RECIPE
    ) -> "subprocess.CompletedProcess":
        return subprocess.run(
            self.command(verb, *flags, recipe=recipe),
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=60,
        )

    @property
    def calls(self) -> list[list[str]]:
        path = self.where / "calls.jsonl"
        return (
            [json.loads(x) for x in path.read_text().splitlines()]
            if path.exists()
            else []
        )

    def story(self) -> list[str]:
        """Return what changed something: create, delete, scp, and verbs of workers."""
        words = []
        for call in self.calls:
            command = next((w for w in call if w.startswith("--command=")), "")
            if call[3] in ("create", "delete", "scp"):
                words.append(call[3])
            elif "setup.sh" in command:
                words.append("setup")
            elif "worker.py" in command:
                words.append(command.partition("worker.py ")[2].split()[0])
        return [word for word in words if word != "state"]


START = ["scp", "setup", "unlock", "check", "start"]


@pytest.fixture
def fake(tmp_path) -> Fake:
    return Fake(tmp_path)


def last_line(done) -> str:
    return done.stdout.strip().splitlines()[-1]


def test_a_run_on_a_spot_pod_from_the_queue_to_the_end(fake):
    waits = ["WAITING_FOR_RESOURCES", "WAITING_FOR_RESOURCES", "PROVISIONING", "READY"]
    fake.play(lives=[dict(states=waits, run=["running", "running@50", "done"])])
    done = fake.tpu("train", *POD, "--spot", "--data", "gs://bucket/data/webtext")
    assert done.returncode == 0, done.stdout + done.stderr
    assert fake.story() == ["create", *START]
    assert last_line(done) == "done: run pod at step 100, in gs://bucket/runs/one"
    create = next(call for call in fake.calls if call[3] == "create")
    assert create == shlex.split(
        "compute tpus queued-resources create pod --zone=us-west4-a --project=mine "
        "--node-id=pod --accelerator-type=v5litepod-16 "
        "--runtime-version=v2-alpha-tpuv5-lite --spot"
    )
    [start] = [call[-1] for call in fake.calls if " start pod " in call[-1]]
    assert start.endswith(shlex.join([*ARGUMENTS, "--data.source", "data/webtext"]))
    setup = next(call[-1] for call in fake.calls if "setup.sh" in call[-1])
    assert setup.endswith("setup.sh ../gpt2_jax.tar.gz bucket gs://bucket/data/webtext")


def test_on_demand_waits_for_capacity_without_a_queue(fake):
    refused = dict(rc=1, err=CAPACITY)
    fake.play(
        create=[refused, refused], lives=[WELL | dict(states=["CREATING", "READY"])]
    )
    done = fake.tpu("train", *POD)
    assert done.returncode == 0, done.stdout
    assert fake.story() == ["create"] * 3 + START
    assert all("queued-resources" not in call for call in fake.calls)


def test_no_capacity_ends_after_the_hours_allowed(fake):
    fake.play(create=[dict(rc=1, err=CAPACITY)] * 99, lives=[])
    done = fake.tpu("train", *POD, "--wait-hours", "0.00001")
    assert done.returncode == 1
    assert "no capacity for v5litepod-16 in us-west4-a" in last_line(done)


@pytest.mark.parametrize("spot", [True, False])
def test_a_preempted_run_goes_on_on_a_new_tpu_under_its_name(fake, spot):
    fake.play(lives=[PREEMPTED, WELL])
    done = fake.tpu("train", *POD, *(["--spot"] if spot else []))
    assert done.returncode == 0, done.stdout
    assert fake.story() == ["create", *START, "delete", "create", *START]
    first, second = [call[-1] for call in fake.calls if " start pod " in call[-1]]
    assert first == second
    assert "lost: pod is PREEMPTED; try 1 of 10 to mend it" in done.stdout


@pytest.mark.parametrize("state", ["SUSPENDED", "FAILED", "GONE"])
def test_a_dead_place_in_the_queue_is_deleted_first(fake, state):
    fake.play(exists=True, lives=[dict(states=[state]), WELL])
    done = fake.tpu("train", *POD, "--spot")
    assert done.returncode == 0, done.stdout
    assert fake.story() == ["delete", "create", *START]
    delete = next(call for call in fake.calls if call[3] == "delete")
    expected = "compute tpus queued-resources delete pod --zone=us-west4-a "
    assert delete == shlex.split(f"{expected} --project=mine --force --quiet")


def test_retries_end_without_progress_and_count_anew_with_it(fake):
    lives = [PREEMPTED | dict(run=[f"running@{step}"]) for step in (10, 20, 20, 20)]
    fake.play(lives=lives)
    done = fake.tpu("train", *POD, "--retries", "2")
    assert done.returncode == 1
    assert fake.story().count("start") == 4  # two with progress, then two tries
    assert "3 failures without a new step" in last_line(done)
    assert "gs://bucket/runs/one" in last_line(done)


@pytest.mark.parametrize(("first", "cap"), [("0.1", "9"), ("20", "0.01")])
def test_back_off_doubles_up_to_its_cap(fake, first, cap):
    fake.play(create=[dict(rc=1, err="connection reset")] * 9, lives=[])
    began = time.monotonic()
    flags = ["--backoff-seconds", first, "--backoff-cap-seconds", cap]
    done = fake.tpu("train", *POD, "--retries", "3", *flags)
    # The fake's own calls take time as well, but never near the 20 s of the second.
    seconds = time.monotonic() - began
    assert seconds >= 0.1 + 0.2 + 0.4 if first == "0.1" else seconds < 20
    assert done.returncode == 1
    assert fake.story() == ["create"] * 4


def test_a_new_place_in_the_queue_that_fails_counts_as_a_try(fake):
    failed = dict(states=["FAILED:internal error"])
    fake.play(lives=[failed] * 9)
    done = fake.tpu("train", *POD, "--spot", "--retries", "1")
    assert done.returncode == 1
    assert "the new pod is FAILED; 2 failures" in last_line(done)
    assert fake.story() == ["create", "delete", "create"]


def test_a_node_that_never_comes_up_is_named_and_replaced(fake):
    fake.play(lives=[dict(states=["CREATING"]), WELL])
    done = fake.tpu("train", *POD, "--up-minutes", "0.005")
    assert done.returncode == 0, done.stdout
    assert "pod is still CREATING after --up-minutes 0.005" in done.stdout
    assert fake.story() == ["create", "delete", "create", *START]


def test_a_worker_without_answer_is_named_and_the_tpu_replaced(fake):
    silent = dict(answers={"2": None})
    fake.play(lives=[WELL | dict(ssh=dict(check=[silent] * 3)), WELL])
    done = fake.tpu("train", *POD, "--ssh-tries", "3")
    assert done.returncode == 0, done.stdout
    again = [*START[:-1], "check", "check"]
    assert fake.story() == ["create", *again, "delete", "create", *START]


def test_a_worker_without_answer_is_missed_whatever_gcloud_says(fake):
    fake.play(lives=[WELL | dict(ssh=dict(check=[dict(rc=0, answers={"2": None})]))])
    done = fake.tpu("train", *POD, "--retries", "0")
    assert done.returncode == 1
    assert "worker 2: no answer to `check`" in last_line(done)


def test_ssh_that_fails_twice_is_no_loss(fake):
    broken = dict(rc=255, err=NO_SSH)
    ssh = dict(scp=[broken, broken], setup=[broken], start=[broken])
    fake.play(lives=[WELL | dict(ssh=ssh)])
    done = fake.tpu("train", *POD)
    assert done.returncode == 0, done.stdout
    assert fake.story().count("create") == 1
    assert "lost" not in done.stdout


def test_ssh_that_fails_during_the_run_replaces_the_tpu_and_resumes(fake):
    err = "".join(f"SSH: Attempting to connect to worker {i}...\n" for i in (0, 1, 1))
    broken = dict(rc=255, err=err + NO_SSH)
    fake.play(lives=[WELL | dict(ssh=dict(state=[None, None, *[broken] * 3])), WELL])
    done = fake.tpu("train", *POD)
    assert done.returncode == 0, done.stdout
    assert "lost: worker 1: ssh ended with status 255" in done.stdout
    assert fake.story() == ["create", *START, "delete", "create", *START]


def test_a_setup_that_fails_names_its_worker(fake):
    err = "##### Command execution on worker 3 failed with exit status 100. Continuing."
    fake.play(lives=[WELL | dict(ssh=dict(setup=[dict(rc=100, err=err)]))])
    done = fake.tpu("train", *POD, "--retries", "0")
    assert done.returncode == 1
    assert "worker 3: ssh ended with status 100" in last_line(done)


@pytest.mark.parametrize(
    ("message", "remedy"),
    [
        ("Quota limit 'TPUV5' has been exceeded. Limit: 0 in region x", "quotas"),
        ("PERMISSION_DENIED: Permission 'tpu.nodes.create' denied", "roles"),
        ("SERVICE_DISABLED: Cloud TPU API has not been used in project 1", "enable"),
        ("You do not currently have an active account selected.", "gcloud auth login"),
        ("INVALID_ARGUMENT: unknown accelerator type", "--type"),
    ],
)
def test_what_google_refuses_is_not_tried_again(fake, message, remedy):
    error = f"ERROR: (gcloud.compute.tpus.queued-resources.create) {message}\nmore\n"
    fake.play(create=[dict(rc=1, err=error)], lives=[])
    done = fake.tpu("train", *POD, "--spot")
    assert done.returncode == 2
    assert fake.story() == ["create"]
    assert last_line(done).startswith(f"error: {message}; ")
    assert remedy in last_line(done)


def test_a_quota_that_fails_the_place_in_the_queue_is_not_tried_again(fake):
    fake.play(lives=[dict(states=["WAITING_FOR_RESOURCES", "FAILED:Quota limit is 0"])])
    done = fake.tpu("train", *POD, "--spot")
    assert done.returncode == 2
    assert last_line(done).startswith("error: Quota limit is 0; ask for more")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(local_devices=3), "worker 2 has 16 devices, 3 of them its own"),
        (dict(versions={"jax": "0.9.0"}), 'worker 2 has {"jax": "0.9.0"}'),
        (dict(time=1e9 + 7), "the clock of worker 2 is +7.0 s off"),
    ],
)
def test_an_odd_worker_is_named_and_the_tpu_replaced(fake, changes, message):
    odd = dict(check=[dict(answers={"2": changes})])
    fake.play(lives=[WELL | dict(ssh=odd), WELL])
    done = fake.tpu("train", *POD)
    assert done.returncode == 0, done.stdout
    assert f"lost: {message}" in done.stdout
    assert fake.story() == ["create", *START[:-1], "delete", "create", *START]


@pytest.mark.parametrize(
    ("verb", "changes", "message"),
    [
        ("check", dict(disk_free_bytes=2e9), "worker 1 has 2.0 GB free"),
        (
            "unlock",
            dict(held_by=["77 (python)"]),
            "worker 1: 77 (python) holds the TPU",
        ),
    ],
)
def test_what_the_user_must_mend_on_a_worker_ends_it(fake, verb, changes, message):
    fake.play(lives=[WELL | dict(ssh={verb: [dict(answers={"1": changes})]})])
    done = fake.tpu("train", *POD)
    assert done.returncode == 2
    assert message in last_line(done)
    assert "start" not in fake.story()


def test_a_crash_starts_again_on_the_same_tpu_after_ending_what_is_left(fake):
    crashed = ["running", "running", "exit:1", "running"]
    fake.play(lives=[dict(states=["READY"], run=[crashed, crashed, "running", "done"])])
    done = fake.tpu("train", *POD)
    assert done.returncode == 0, done.stdout
    assert "worker 2: the last line" in done.stdout
    assert "lost: worker 2 ended with status 1" in done.stdout
    assert fake.story() == ["create", *START, "stop", *START]


def test_a_dead_worker_starts_the_run_again(fake):
    gone = ["running", "absent", "running", "running"]
    fake.play(lives=[dict(states=["READY"], run=[gone, gone, "running", "done"])])
    done = fake.tpu("train", *POD)
    assert done.returncode == 0, done.stdout
    assert "lost: worker 1 has no run any more" in done.stdout


def test_a_mistake_in_the_recipe_is_not_tried_again(fake):
    fake.play(lives=[dict(states=["READY"], run=["exit:2"])])
    done = fake.tpu("train", *POD)
    assert done.returncode == 2
    assert fake.story() == ["create", *START]


def test_a_run_that_was_stopped_stays_stopped(fake):
    fake.play(lives=[dict(states=["READY"], run=["running", "stopped"])])
    done = fake.tpu("train", *POD)
    assert done.returncode == 1
    assert "`stop` ended run pod" in last_line(done)


def test_an_end_before_the_last_step_is_resumed(fake):
    fake.play(lives=[dict(states=["READY"], run=["exit:0", "exit:0", "done"])])
    done = fake.tpu("train", *POD)
    assert done.returncode == 0, done.stdout
    assert "lost: the run ended before its last step" in done.stdout
    assert fake.story() == ["create", *START, *START]


def test_a_worker_that_does_not_end_with_the_others_is_named(fake):
    stuck = ["exit:0", "exit:0", "running", "exit:0"]
    fake.play(lives=[dict(states=["READY"], run=[stuck])])
    done = fake.tpu("train", *POD, "--up-minutes", "0.005", "--retries", "0")
    assert done.returncode == 1
    assert "worker 2 does not end" in last_line(done)


def test_train_again_only_watches_a_run_that_is_going(fake):
    life = dict(states=["READY"], run=["running@7", "done"], arguments=ARGUMENTS)
    fake.play(exists=True, lives=[life])
    done = fake.tpu("train", *POD)
    assert done.returncode == 0, done.stdout
    assert fake.story() == []


@pytest.mark.parametrize(("steps", "story"), [("100", []), ("200", START)])
def test_train_again_on_a_done_run_starts_it_for_other_arguments_only(
    fake, steps, story
):
    life = dict(states=["READY"], run=["done"], arguments=ARGUMENTS)
    fake.play(exists=True, lives=[life])
    done = fake.tpu("train", *POD, recipe=["gpt2_124m", "--train.steps", steps])
    assert done.returncode == 0, done.stdout
    assert fake.story() == story


def test_ctrl_c_leaves_the_run_going_and_says_how_to_come_back(fake):
    fake.play(exists=True, lives=[dict(states=["READY"], run=["running"])])
    words = fake.command("train", *POD, "--poll-seconds", "60")
    # Tests that `nohup .. &` started ignore SIGINT, and so would their children.
    words = ["env", "--default-signal=INT", *words]
    pipe = subprocess.PIPE
    with subprocess.Popen(
        words, env=fake.environment, stdout=pipe, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if "watching" in line:
                break
        process.send_signal(signal.SIGINT)
        rest = process.stdout.read()
    assert process.returncode == 130
    assert "goes on" in rest and "`status`, `logs` or `stop`" in rest
    assert fake.story() == []


def test_status_stop_logs_and_delete(fake):
    fake.play(exists=True, lives=[dict(states=["READY"], run=["running@5"])])
    status = fake.tpu("status", *POD, recipe=None)
    assert status.returncode == 0
    assert "pod in us-west4-a: READY" in status.stdout
    assert status.stdout.count('"state": "running"') == 4
    logs = fake.tpu("logs", *POD, "--worker", "3", "--follow", recipe=None)
    assert "the end of the log" in logs.stdout
    assert "--worker=3" in fake.calls[-1]
    assert "--command=tail -n 50 -f gpt2-jax/pod.log" in fake.calls[-1]
    assert fake.tpu("stop", *POD, recipe=None).returncode == 0
    assert "--command=" + worker("stop pod 300 yes") == fake.calls[-1][-1]
    assert fake.tpu("delete", *POD, "--spot", recipe=None).returncode == 0
    assert fake.calls[-1][2:5] == ["queued-resources", "delete", "pod"]
    assert "ABSENT" in fake.tpu("status", *POD, recipe=None).stdout


def worker(words: str) -> str:
    return f"gpt2-jax/venv/bin/python gpt2-jax/source/launch/worker.py {words}"


def test_create_and_setup_alone(fake):
    fake.play(hosts=1, lives=[WELL])
    one = ["--type", "v5litepod-4"]
    assert fake.tpu("create", *one, recipe=None).returncode == 0
    assert fake.tpu("setup", *one, recipe=None).returncode == 0
    assert fake.story() == ["create", *START[:-1]]


def test_setup_refuses_while_the_run_is_going(fake):
    fake.play(exists=True, lives=[dict(states=["READY"], run=["running"])])
    done = fake.tpu("setup", *POD, recipe=None)
    assert done.returncode == 2
    assert fake.story() == []


def test_a_stopped_tpu_is_left_alone(fake):
    fake.play(exists=True, lives=[dict(states=["STOPPED"])])
    done = fake.tpu("train", *POD)
    assert done.returncode == 2
    assert "tpu-vm start pod" in last_line(done)
    assert fake.story() == []


@pytest.mark.parametrize(
    ("flags", "recipe", "message"),
    [
        (["--type", "v9-8"], RECIPE, "--type is 'v9-8'"),
        (["--type", "v3-32"], RECIPE, "needs --run-dir gs://BUCKET/PATH"),
        (["--type", "v3-8", "--spot"], RECIPE, "needs --run-dir gs://BUCKET/PATH"),
        (POD, ["--run-dir=runs/x"], "--run-dir stands behind --"),
        ([*POD, "--data", "data/webtext"], RECIPE, "--data is 'data/webtext'"),
        ([*POD, "--run-id", "A b"], RECIPE, "name is 'A b'"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_runs(fake, flags, recipe, message):
    fake.play(lives=[])
    done = fake.tpu("train", *flags, recipe=recipe)
    assert done.returncode == 2
    assert message in last_line(done)
    assert fake.calls == []


def test_without_gcloud_one_line_says_so(fake, tmp_path):
    fake.environment["PATH"] = str(tmp_path)
    done = fake.tpu("status", *POD)
    assert done.returncode == 2
    assert last_line(done) == "error: gcloud is not on PATH; install it"


def test_a_dry_run_prints_every_line_of_a_train_and_runs_none(fake):
    fake.play(lives=[PREEMPTED])
    done = fake.tpu("train", *POD, "--spot", "--dry-run")
    assert done.returncode == 0, done.stdout
    assert fake.calls == []
    lines = [shlex.split(x[2:]) for x in done.stdout.splitlines() if x[:2] == "+ "]
    kinds = [" ".join(line[3:5]) for line in lines if line[0] == "gcloud"]
    order = ["queued-resources describe", "queued-resources create"]
    order += ["queued-resources describe"] * 2 + ["tpu-vm describe", "tpu-vm ssh"]
    order += ["tpu-vm scp", *["tpu-vm ssh"] * 4, "queued-resources describe"]
    assert kinds == [*order, "tpu-vm describe", "tpu-vm ssh"]
    assert done.stdout.count("--project=mine") == len(kinds)


def test_a_dry_run_prints_the_lines_that_a_real_one_runs(fake):
    fake.play(lives=[dict(states=["WAITING_FOR_RESOURCES", "READY"], run=["done"])])
    dry = fake.tpu("train", *POD, "--spot", "--dry-run")
    real = fake.tpu("train", *POD, "--spot")
    printed = [x[2:] for x in dry.stdout.splitlines() if x.startswith("+ gcloud")]
    ran = [shlex.join(["gcloud", *call]) for call in fake.calls]
    assert real.returncode == 0
    assert list(dict.fromkeys(printed)) == list(dict.fromkeys(ran))


@pytest.mark.parametrize(
    ("name", "hosts", "devices", "image"),
    [
        ("v2-8", 1, 8, "tpu-ubuntu2204-base"),
        ("v3-8", 1, 8, "tpu-ubuntu2204-base"),
        ("v3-32", 4, 32, "tpu-ubuntu2204-base"),
        ("v4-8", 1, 4, "tpu-ubuntu2204-base"),
        ("v4-32", 4, 16, "tpu-ubuntu2204-base"),
        ("v5p-16", 2, 8, "v2-alpha-tpuv5"),
        ("v5litepod-1", 1, 1, "v2-alpha-tpuv5-lite"),
        ("v5litepod-8", 1, 8, "v2-alpha-tpuv5-lite"),
        ("v5litepod-16", 4, 16, "v2-alpha-tpuv5-lite"),
        ("v6e-8", 1, 8, "v2-alpha-tpuv6e"),
        ("v6e-256", 64, 256, "v2-alpha-tpuv6e"),
    ],
)
def test_a_type_says_how_many_hosts_and_devices(
    monkeypatch, name, hosts, devices, image
):
    monkeypatch.syspath_prepend(LAUNCH)
    family, *found = importlib.import_module("tpu").read_type(name, None, None)
    assert (found, family.image) == ([hosts, devices], image)


def test_hosts_and_devices_may_be_told(fake):
    fake.play(lives=[])
    done = fake.tpu("train", *POD, "--hosts", "2", "--devices", "32", "--dry-run")
    assert "2 workers, 32 devices" in done.stdout
    assert "worker.py check 2" in done.stdout
