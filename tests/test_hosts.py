"""Several processes of one run, over gloo on loopback: one run, told by process 0."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from ports import free_port
from quick import xla_flags

from gpt2_jax import hosts
from gpt2_jax.config import ConfigError, load_config
from gpt2_jax.metrics import read_metrics
from gpt2_jax.pretrained import load
from gpt2_jax.train import train

STEPS = 16
COMMAND = [sys.executable, "-m", "gpt2_jax.start", "train", "shakespeare"]
FLAGS = {
    "train.steps": STEPS,
    "optimizer.warmup-steps": 1,
    "train.batch-tokens": 16 * 16,
    "train.micro-batch": 1,  # and so two micro-batches a step
    "model.n-ctx": 16,
    "model.n-embd": 16,
    "model.n-layer": 1,
    "model.embd-pdrop": 0.1,
    "mesh.data": 2,
    "mesh.fsdp": 4,
    "log.interval": 1,
    "evaluate.interval": 8,
    "evaluate.batch-sequences": 1,
    "evaluate.samples": 1,
    "evaluate.sample-tokens": 4,
    "checkpoint.interval": 8,
}


def start(
    folder: Path, run_dir: str, *others: dict, count: int = 2, steps: int = STEPS
) -> list[subprocess.Popen]:
    """Start processes of 4 devices each; `others` are more flags of the i-th."""
    (folder / "text.txt").write_text("the quick brown fox jumps\n" * 200)
    address = f"127.0.0.1:{free_port()}"
    processes = []
    for number in range(count):
        more = others[number] if number < len(others) else {}
        flags = FLAGS | {"data.source": "text.txt", "run-dir": run_dir} | more
        flags["train.steps"] = steps
        environment = os.environ | {
            "JAX_COORDINATOR_ADDRESS": address,
            "JAX_NUM_PROCESSES": str(count),
            "JAX_PROCESS_ID": str(number),
            "XLA_FLAGS": xla_flags(4),
            "GLIBC_TUNABLES": "",
        }
        processes.append(
            subprocess.Popen(
                [*COMMAND, *(f"--{name}={value}" for name, value in flags.items())],
                cwd=folder,
                env=environment,
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )  # fmt: skip
        )
    return processes


def finish(processes: list[subprocess.Popen]) -> list[tuple[int, str, str]]:
    """Return status, standard output and standard error of each."""
    try:
        texts = [process.communicate(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
    codes = (process.returncode for process in processes)
    return [(code, *text) for code, text in zip(codes, texts, strict=True)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Return where two processes have made the run `two`."""
    folder = tmp_path_factory.mktemp("hosts")
    found = finish(start(folder, "two"))
    assert [code for code, _, _ in found] == [0, 0], found
    assert "held-out loss" in found[0][1]
    assert "step" not in found[1][1]  # process 0 tells
    return folder


def alone(folder: Path, run_dir: str) -> None:
    """Train the same in this process, on its 8 devices."""
    base = load_config("shakespeare")
    groups: dict[str, dict] = {}
    for name, value in FLAGS.items():
        group, _, field = name.partition(".")
        groups.setdefault(group, {})[field.replace("-", "_")] = value
    changes = {
        group: dataclasses.replace(getattr(base, group), **fields)
        for group, fields in groups.items()
    }
    source = str(folder / "text.txt")
    changes["data"] = dataclasses.replace(base.data, source=(source,))
    config = dataclasses.replace(base, run_dir=str(folder / run_dir), **changes)
    train(config, say=lambda line: None)


def losses(run_dir: Path, name: str = "train_loss") -> dict[int, float]:
    records = read_metrics(run_dir / "metrics.jsonl")
    return {record["step"]: record[name] for record in records if name in record}


def test_two_processes_train_as_one(folder):
    alone(folder, "one")
    for name in ("train_loss", "val_loss"):
        one, two = losses(folder / "one", name), losses(folder / "two", name)
        assert one.keys() == two.keys() and len(one) > 1
        for step in one:  # sums in another order
            assert one[step] == pytest.approx(two[step], abs=1e-5)
    # The same data in the same order, dropout too, or parameters were far apart.
    pairs = zip(
        *(jax.tree.leaves(load(folder / run).params) for run in ("one", "two")),
        strict=True,
    )
    for one, two in pairs:
        np.testing.assert_allclose(one, two, atol=1e-4)


def test_a_signal_to_one_stops_all_and_one_process_goes_on(folder):
    processes = start(folder, "stopped", steps=400)
    lines = iter(processes[0].stdout.readline, "")
    assert any(re.match(r"step +3/", line) for line in lines)
    processes[1].send_signal(signal.SIGTERM)
    found = finish(processes)
    assert [code for code, _, _ in found] == [143, 143], found
    assert "the same command goes on there" in found[0][1]
    step = max(losses(folder / "stopped"))
    saved = [p.name for p in (folder / "stopped" / "checkpoints").iterdir()]
    assert str(step) in saved  # 0 steps lost
    code, said, error = resume_in_one(folder, step + 2)
    assert code == 0, error
    assert f"resumed stopped at step {step}" in said


def resume_in_one(folder: Path, steps: int) -> tuple[int, str, str]:
    """Go on with `stopped` in one process of 8 devices."""
    flags = FLAGS | {"data.source": "text.txt", "run-dir": "stopped"}
    flags["train.steps"] = steps
    done = subprocess.run(
        [*COMMAND, *(f"--{name}={value}" for name, value in flags.items())],
        cwd=folder,
        env=os.environ | {"GLIBC_TUNABLES": ""},
        text=True,
        capture_output=True,
    )
    return done.returncode, done.stdout, done.stderr


def test_processes_of_another_config_refuse_to_start(tmp_path):
    found = finish(start(tmp_path, "run", {}, {"train.seed": 1}))
    for code, _, error in found:
        assert code == 2
        assert "config train.seed on process 1 (" in error
        assert "is not that of process 0; start all processes with the same" in error
    assert not list(tmp_path.rglob("checkpoints/*"))


def test_what_stops_process_0_is_told_by_all(tmp_path):
    missing = {"data.source": "absent.txt"}
    for code, _, error in finish(start(tmp_path, "run", missing, missing)):
        assert code == 2
        assert "absent.txt" in error


@pytest.mark.parametrize(
    ("come", "missing"),
    [([0], "1, 2, 3"), ([0, 1, 3], "2"), ([1, 2], "0, which knows of the rest")],
)
def test_who_does_not_come_is_named(come, missing):
    code = "from gpt2_jax import hosts; hosts.WAIT_SECONDS = 15; hosts.join()"
    environment = os.environ | {
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}",
        "JAX_NUM_PROCESSES": "4",
    }
    command = [sys.executable, "-c", code]
    began = time.monotonic()
    processes = [
        subprocess.Popen(
            command,
            env=environment | {"JAX_PROCESS_ID": str(number)},
            text=True,
            stderr=subprocess.PIPE,
        )
        for number in come
    ]
    errors = [process.communicate(timeout=60)[1] for process in processes]
    assert time.monotonic() - began < 60
    assert {process.returncode for process in processes} == {2}
    for number, error in zip(come, errors, strict=True):
        assert f"error: process {number} of 4 waited 15 s at 127.0.0.1" in error
        assert f"; nothing was heard of process {missing}; start all of them" in error


def test_a_laptop_joins_nobody(monkeypatch):
    monkeypatch.delenv(hosts.ADDRESS, raising=False)
    monkeypatch.setattr(hosts, "TPU_DEVICES", ())
    monkeypatch.setattr(jax.distributed, "initialize", lambda **how: 1 / 0)
    hosts.join()
    monkeypatch.setattr(hosts, "TPU_DEVICES", ("/",))
    with pytest.raises(ZeroDivisionError):  # a TPU VM asks jax, which asks its metadata
        hosts.join()


@pytest.mark.parametrize(
    ("count", "number", "message"),
    [
        ("", "0", "JAX_NUM_PROCESSES is ''; allowed: a number >= 1"),
        ("2", "x", "JAX_PROCESS_ID is 'x'; allowed: a number >= 0"),
        ("2", "2", "JAX_PROCESS_ID is 2; allowed: < JAX_NUM_PROCESSES = 2"),
    ],
)
def test_incomplete_variables_are_refused(monkeypatch, count, number, message):
    monkeypatch.setenv(hosts.ADDRESS, "127.0.0.1:1")
    monkeypatch.setenv(hosts.COUNT, count)
    monkeypatch.setenv(hosts.NUMBER, number)
    with pytest.raises(ConfigError, match=message):
        hosts.join()


def test_alone_nothing_is_asked_of_anybody(tmp_path):
    assert hosts.is_first() and not hosts.asked_to_stop(3)
    hosts.check_same({"config": json.dumps({})})
    assert hosts.first_goes_first(lambda: 7) == 7
    tree = {"a": np.arange(3)}
    assert hosts.gather(tree) is tree
    assert len(hosts.code_digest()) == 64
