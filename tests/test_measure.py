import json
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from gpt2_jax import hosts, measure, sharding
from gpt2_jax.config import (
    Config,
    ConfigError,
    EvaluateConfig,
    LogConfig,
    MeshConfig,
)
from gpt2_jax.measure import Measures
from gpt2_jax.metrics import LOSS, TEXTS, ZERO_SHOT, MetricsLog, read_metrics
from gpt2_jax.signals import Interrupted, Stop
from gpt2_jax.tokenizer import load_tokenizer
from gpt2_jax.watchdog import Watchdog

EVERY = EvaluateConfig(interval=10, sample_interval=20, tasks_interval=25, samples=2)


def make(tmp_path, log: MetricsLog, lines: list[str] | None = None) -> Measures:
    """Return measures of a run that is never evaluated: there is no program."""
    nothing: Any = SimpleNamespace()
    return Measures(
        config=Config(evaluate=EVERY),
        directory=tmp_path,
        tokenizer=load_tokenizer("bytes"),
        held_out=nothing,
        program=nothing,
        log=log,
        stop=Stop(),
        watchdog=Watchdog(0),
        say=[].append if lines is None else lines.append,
    )


@pytest.fixture(autouse=True)
def unchecked(monkeypatch):
    """Let the stand-ins above pass for what they stand in for."""
    monkeypatch.setattr(measure.Measures, "__init__", bare_init)


def bare_init(self, **fields):
    for name, value in fields.items():
        object.__setattr__(self, name, value)


@pytest.mark.parametrize(
    ("step", "due"),
    [
        (1, set()),
        (10, {LOSS}),
        (20, {LOSS, TEXTS}),
        (25, {ZERO_SHOT}),
        (100, {LOSS, TEXTS, ZERO_SHOT}),
    ],
)
def test_intervals_say_what_is_due(tmp_path, step, due):
    with MetricsLog(tmp_path, LogConfig(), resume_step=0) as log:
        assert make(tmp_path, log).due(step) == due


@pytest.mark.parametrize(
    ("held", "left_out"),
    [
        ({}, {LOSS, TEXTS, ZERO_SHOT}),
        ({"val_loss": 1.0}, {TEXTS, ZERO_SHOT}),
        ({"samples_bytes": 7}, {LOSS, ZERO_SHOT}),
        ({"zero_shot/cbt_cn": 0.5}, {LOSS, TEXTS}),
    ],
)
def test_what_the_log_does_not_hold_of_the_step_is_left_out(tmp_path, held, left_out):
    records = [
        {"step": 90, "val_loss": 1.0, "samples_bytes": 3, "zero_shot/cbt_cn": 0.5},
        {"step": 100, "train_loss": 1.0},
        {"step": 100} | held,
    ]
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (tmp_path / "metrics.jsonl").write_text(lines)
    with MetricsLog(tmp_path, LogConfig(), resume_step=100) as log:
        assert make(tmp_path, log).left_out(100) == left_out


@pytest.mark.parametrize(("step", "left"), [(40, "onetwo"), (20, "one"), (10, "")])
def test_samples_of_a_killed_session_are_cut_off(tmp_path, step, left):
    (tmp_path / "samples.txt").write_text("onetwothr")  # killed while it wrote
    with MetricsLog(tmp_path, LogConfig(), resume_step=0) as log:
        for at, size in ((20, 3), (40, 6)):
            log.write({"event": "samples", "step": at, "samples_bytes": size})
    with MetricsLog(tmp_path, LogConfig(), resume_step=step) as log:
        make(tmp_path, log).drop_samples()
    assert (tmp_path / "samples.txt").read_text() == left


def test_logits_that_are_not_finite_cost_samples_and_not_the_run(tmp_path, monkeypatch):
    def broken(self, step, params):
        raise FloatingPointError("logits are not finite")

    monkeypatch.setattr(measure.Measures, "_samples", broken)
    lines: list[str] = []
    with MetricsLog(tmp_path, LogConfig(), resume_step=0) as log:
        assert make(tmp_path, log, lines).samples(20, {}) == []
    assert lines == ["step 20  no samples: logits are not finite"]
    assert read_metrics(tmp_path / "metrics.jsonl") == []


def test_a_signal_to_another_process_ends_an_evaluation_soon(tmp_path, monkeypatch):
    """No handler of this process runs then, so `Stop.breaks` does not see it."""
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    program = SimpleNamespace(
        mesh=mesh,
        eval_sharding=sharding.batch_sharding(mesh),
        eval_step=lambda params, batch: np.ones(2),
    )
    zeros = SimpleNamespace(
        n_tokens=100_000, read=lambda start, count: np.zeros(count, np.uint16)
    )
    asked: list[int] = []

    def asked_to_stop(count: int) -> bool:
        asked.append(count)
        return count == 3

    monkeypatch.setattr(hosts, "asked_to_stop", asked_to_stop)
    with MetricsLog(tmp_path, LogConfig(), resume_step=0) as log:
        measures = make(tmp_path, log)
        measures.__dict__.update(program=program, held_out=zeros)
        with pytest.raises(Interrupted):
            measures.loss(10, {}, 9)
    assert asked == [1, 2, 3]


def test_tasks_are_known_before_the_first_step():
    assert measure.zero_shot(Config()) is None
    both = EvaluateConfig(tasks="lambada_ppl,text8")
    found = measure.zero_shot(Config(evaluate=both))
    assert found is not None and found.stride == 1024
    with pytest.raises(ConfigError, match="lambda"):
        measure.zero_shot(Config(evaluate=EvaluateConfig(tasks="lambda")))
