"""What runs on a TPU worker: start, state, stop, the lock, the check."""

import importlib
import json
import os
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parents[2] / "launch"
PROGRAM = """\
#!/bin/sh
trap 'echo saved; exit 0' TERM
[ "$2" = deaf ] && trap '' TERM
echo "arguments: $*" "on $JAX_PLATFORMS in $PWD"
[ "$2" = crash ] && exit 7
[ "$2" = quick ] || { sleep 30 & wait; wait; }
"""


@pytest.fixture
def worker(tmp_path, monkeypatch):
    """The module, for what starts nothing."""
    monkeypatch.syspath_prepend(LAUNCH)
    module = importlib.import_module("worker")
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(module, "LOCK", tmp_path / "libtpu_lockfile")
    monkeypatch.setattr(module, "ACCELERATORS", [f"{tmp_path}/accel*"])
    return module


class Home:
    """A worker's home directory, where worker.py runs as over ssh."""

    def __init__(self, where: Path):
        self.root = where / "gpt2-jax"
        self.environment = {"HOME": str(where), "PATH": os.environ["PATH"]}
        program(self.root / "venv/bin/gpt2-jax", PROGRAM)

    def ask(self, verb: str, *words: str) -> dict:
        done = subprocess.run(
            [
                sys.executable,
                "-I",
                "-S",
                str(LAUNCH / "worker.py"),
                verb,
                "one",
                *words,
            ],
            env=self.environment,
            capture_output=True,
            text=True,
            check=True,
            start_new_session=True,
        )
        [line] = [line for line in done.stdout.splitlines() if line]
        return json.loads(line)

    def state(self) -> dict:
        return self.ask("state", "runs/one")

    def until(self, state: str) -> dict:
        deadline = time.monotonic() + 10
        while (answer := self.state())["state"] != state:
            assert time.monotonic() < deadline, answer
        return answer

    def log(self, wanted: str = "arguments") -> str:
        """Return the log once the run has said something, as it does when it is set."""
        deadline = time.monotonic() + 10
        while wanted not in (text := (self.root / "one.log").read_text()):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        return text


@pytest.fixture
def home(tmp_path):
    home = Home(tmp_path)
    yield home
    home.ask("stop", "0", "no")


def program(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def test_a_run_starts_once_outlives_ssh_and_says_that_it_runs(home):
    assert home.state()["state"] == "absent"
    assert home.ask("start", "slow", "--a b")["started"]
    assert not home.ask("start", "slow", "--a b")["started"]
    assert home.log() == f"arguments: train slow --a b on tpu,cpu in {home.root}\n"
    answer = home.state()
    assert answer["state"] == "running"
    assert answer["arguments"] == ["slow", "--a b"]


def test_an_ended_run_tells_its_status_and_last_lines(home):
    home.ask("start", "crash")
    answer = home.until("exited")
    assert answer["exit"] == 7
    assert answer["log"][-1].startswith("arguments: train crash")
    home.ask("start", "quick")
    assert home.until("exited")["exit"] == 0


def test_stop_lets_the_run_save(home):
    home.ask("start", "slow")
    home.log()
    assert home.ask("stop", "10", "yes")["state"] == "stopped"
    answer = home.until("exited")
    assert (answer["exit"], answer["stopped"]) == (0, True)
    assert answer["log"][-1] == "saved"
    home.ask("start", "slow")
    assert not home.state()["stopped"]


def test_stop_kills_what_does_not_end(home):
    home.ask("start", "deaf")
    home.log()
    assert home.ask("stop", "0.3", "no")["state"] == "killed"
    assert home.until("absent")["stopped"] is False
    assert home.ask("stop", "0", "no")["state"] == "absent"


def test_an_earlier_end_is_forgotten_by_the_next_start(home):
    home.ask("start", "crash")
    home.until("exited")
    home.ask("start", "deaf")
    home.log("deaf")
    home.ask("stop", "0", "no")
    assert home.until("absent")["state"] == "absent"


def test_a_process_number_used_again_is_not_the_run(home):
    (home.root / "one.pid").write_text(str(os.getpid()))
    assert home.state()["state"] == "absent"


@pytest.mark.parametrize(
    ("lines", "step", "done"),
    [
        ([], None, False),
        (['{"step": 3, "loss": 1.0}', '{"step": 4, "los'], 3, False),
        (['{"step": 9}', '{"event": "done", "step": 9}'], 9, True),
        (['{"event": "done", "step": 9}', '{"step": 10}'], 10, False),
        (['{"step": 1, "loss": 1.0}'] * 9000 + ['{"step": 2}'], 2, False),
    ],
)
def test_the_end_of_metrics_says_how_far_the_run_is(worker, lines, step, done):
    path = worker.ROOT / "runs/one/metrics.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text("\n".join(lines))
    answer = worker.state("one", "runs/one")
    assert (answer["step"], answer["done"]) == (step, done)


@pytest.mark.parametrize("held", [True, False])
def test_the_lock_is_removed_only_while_nobody_holds_the_tpu(
    worker, tmp_path, monkeypatch, held
):
    (tmp_path / "accel0").touch()
    (tmp_path / "libtpu_lockfile").touch()
    program(tmp_path / "bin/sudo", '#!/bin/sh\nexec "$@"\n')
    answer = f"echo {os.getpid()}" if held else "exit 1"
    program(tmp_path / "bin/lsof", f"#!/bin/sh\n{answer}\n")
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    found = worker.unlock()
    assert found["removed"] is not held
    assert (tmp_path / "libtpu_lockfile").exists() is held
    assert [holder.split()[0] for holder in found["held_by"]] == [
        str(os.getpid())
    ] * held


@pytest.mark.parametrize("hosts", [1, 4])
def test_check_joins_the_other_hosts_and_tells_what_it_sees(worker, monkeypatch, hosts):
    calls = []
    distributed = types.SimpleNamespace(initialize=lambda **_: calls.append("join"))
    together = types.SimpleNamespace(sync_global_devices=calls.append)
    jax = types.ModuleType("jax")
    vars(jax).update(
        distributed=distributed, device_count=lambda: 16, local_device_count=lambda: 4
    )
    experimental = types.ModuleType("jax.experimental")
    vars(experimental).update(multihost_utils=together)
    monkeypatch.setitem(sys.modules, "jax", jax)
    monkeypatch.setitem(sys.modules, "jax.experimental", experimental)
    found = worker.check(str(hosts))
    assert calls == (["join", "clock"] if hosts > 1 else [])
    assert (found["devices"], found["local_devices"]) == (16, 4)
    assert set(found["versions"]) == {"python", "gpt2_jax", "jax", "jaxlib", "libtpu"}
    assert abs(found["time"] - time.time()) < 60
    assert found["disk_free_bytes"] > 0


@pytest.mark.parametrize(
    ("hostname", "index"), [("t1v-n-0a1b2c3d-w-0", 0), ("t1v-n-ff-w-12", 12), ("me", 0)]
)
def test_a_hostname_says_which_worker_it_is(worker, hostname, index):
    assert worker.worker_index(hostname) == index
