import gzip
import json
import math
import random
import subprocess
import sys
import types

import pytest

from gpt2_jax.config import ConfigError, LogConfig
from gpt2_jax.metrics import (
    Meter,
    MetricsLog,
    compressed_bits_per_byte,
    plot_loss,
    progress_line,
    read_metrics,
)


def record(step, **more):
    return {
        "step": step,
        "train_loss": 10 / (1 + step),
        "tokens_per_second": 1.0,
    } | more


def write(run_dir, steps, *, resume_step=0, **config):
    with MetricsLog(run_dir, LogConfig(**config), resume_step=resume_step) as log:
        for step in steps:
            log.write(record(step))


def test_records_come_back(tmp_path):
    write(tmp_path, range(1, 5))
    assert read_metrics(tmp_path / "metrics.jsonl") == [record(s) for s in range(1, 5)]


def test_a_record_is_on_disk_when_write_returns(tmp_path):
    with MetricsLog(tmp_path, LogConfig(), resume_step=0) as log:
        log.write(record(1))
        assert read_metrics(tmp_path / "metrics.jsonl") == [record(1)]


def test_resuming_drops_what_is_written_again(tmp_path):
    write(tmp_path, range(1, 10))
    with MetricsLog(tmp_path, LogConfig(), resume_step=9) as log:
        log.write({"event": "done", "step": 9, "val_loss": 1.0})
    write(tmp_path, [7, 8], resume_step=6)
    kept = read_metrics(tmp_path / "metrics.jsonl")
    assert kept == [record(step) for step in range(1, 9)]


def test_who_only_finishes_measures_again_and_keeps_the_rest(tmp_path):
    skipped = {"event": "skipped", "step": 5, "loss": 1.0}
    with MetricsLog(tmp_path, LogConfig(), resume_step=0) as log:
        log.write({"step": 4, "val_loss": 2.0})
        log.write(record(5))
        log.write(skipped)
        log.write({"step": 5, "val_loss": 1.0})
        log.write({"event": "samples", "step": 5, "samples_bytes": 7})
        log.write({"step": 5, "zero_shot/cbt_cn": 0.5})
    kept = [{"step": 4, "val_loss": 2.0}, record(5), skipped]
    with MetricsLog(tmp_path, LogConfig(), resume_step=5) as log:
        assert len(log.kept) == 6
    with MetricsLog(tmp_path, LogConfig(), resume_step=5, finishes=True) as log:
        assert log.kept == kept
    assert read_metrics(tmp_path / "metrics.jsonl") == kept


def test_resuming_at_the_end_leaves_one_done(tmp_path):
    for _ in range(2):
        with MetricsLog(tmp_path, LogConfig(), resume_step=5) as log:
            log.write({"event": "done", "step": 5})
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"event": "done", "step": 5}]


@pytest.mark.parametrize("cut", range(1, 20, 3))
def test_a_torn_last_line_is_left_out(tmp_path, cut):
    write(tmp_path, range(1, 4))
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[: -1 - cut])
    assert read_metrics(path) == [record(1), record(2)]
    write(tmp_path, [3], resume_step=3)
    assert read_metrics(path) == [record(1), record(2), record(3)]


@pytest.mark.parametrize("bad", ["{torn", "[1]", "3", "\x00"])
def test_a_bad_line_is_named(tmp_path, bad):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1}}\n{bad}\n{{"step": 3}}\n')
    with pytest.raises(ConfigError, match=r"metrics\.jsonl line 2"):
        read_metrics(path)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_stay_json(tmp_path, value):
    with MetricsLog(tmp_path, LogConfig(), resume_step=0) as log:
        log.write(record(1, train_loss=value, grad_norm=2.0))

    def refuse(name):
        raise AssertionError(name)

    text = (tmp_path / "metrics.jsonl").read_text()
    found = json.loads(text, parse_constant=refuse)
    expected = {"train_loss": None, "grad_norm": 2.0, "nonfinite": ["train_loss"]}
    assert found == record(1) | expected


def test_tensorboard_gets_every_scalar(tmp_path):
    write(tmp_path, [1, 2], tensorboard=True)
    (events,) = tmp_path.glob("events.out.tfevents.*")
    data = events.read_bytes()
    assert data.count(b"train_loss") == data.count(b"tokens_per_second") == 2


def test_wandb_gets_every_scalar(tmp_path, monkeypatch):
    calls = []
    run = types.SimpleNamespace(
        log=lambda scalars, step: calls.append((scalars, step)),
        finish=lambda: calls.append("finish"),
    )
    fake = types.SimpleNamespace(init=lambda **how: calls.append(how) or run)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    write(tmp_path, [3], wandb="gpt2")
    scalars = {k: v for k, v in record(3).items() if k != "step"}
    how = dict(project="gpt2", dir=str(tmp_path), name=tmp_path.name)
    assert calls == [how, (scalars, 3), "finish"]


@pytest.mark.parametrize(
    ("module", "config", "extra"),
    [("tensorboardX", {"tensorboard": True}, "tensorboard"),
     ("wandb", {"wandb": "gpt2"}, "wandb")],
)  # fmt: skip
def test_a_missing_extra_says_what_to_install(
    tmp_path, monkeypatch, module, config, extra
):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=rf'pip install "gpt2_jax\[{extra}\]"'):
        write(tmp_path, [], **config)


def test_progress_line():
    line = dict(step=120, steps=2000, loss=2.31449, tokens_per_second=18342.3)
    found = progress_line(**line, mfu=0.412, eta_seconds=83.4)
    assert found == "step  120/2000  loss 2.3145  18,342 tok/s  MFU 41.2%  ETA 1m 23s"
    found = progress_line(**line, mfu=None, eta_seconds=math.nan)
    assert found == "step  120/2000  loss 2.3145  18,342 tok/s  ETA unknown"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "0s"), (59.6, "1m 00s"), (3_600.0, "1h 00m"), (90_000.0, "1d 01h")],
)
def test_time_left_reads_well(seconds, text):
    line = dict(step=1, steps=2, loss=1.0, tokens_per_second=1.0, mfu=None)
    assert progress_line(**line, eta_seconds=seconds).endswith(f"ETA {text}")


def test_the_meter_forgets_what_left_its_window():
    meter = Meter(0.0, window=3)
    assert math.isnan(meter.tokens_per_second)
    assert meter.update(100, 100.0) == 1.0  # compiling
    rates = [meter.update(100, 100.0 + i) for i in range(1, 5)]
    assert rates[-1] == 100.0
    assert meter.eta_seconds(1000) == 10.0


def test_the_meter_survives_a_clock_that_stands():
    meter = Meter(5.0)
    assert math.isnan(meter.update(10, 5.0))
    assert math.isnan(meter.eta_seconds(10))


def test_compressed_bits_per_byte_are_those_of_the_programs():
    data = random.Random(0).choices(b"etaoin shrdlu", k=5000)
    found = compressed_bits_per_byte(bytes(data))
    for name in ("gzip", "xz"):
        packed = subprocess.run([name, "-9"], input=bytes(data), capture_output=True)
        here = len(packed.stdout) * 8 / len(data)
        assert found[f"{name}_bits_per_byte"] == pytest.approx(here, abs=0.05)
    assert found["gzip_bits_per_byte"] < 8 * len(gzip.compress(b"", 9)) + 8


def test_nothing_cannot_be_compressed():
    with pytest.raises(ConfigError, match="0 bytes"):
        compressed_bits_per_byte(b"")


@pytest.mark.parametrize("steps", [[], [1], range(1, 300)])
def test_the_loss_is_drawn(tmp_path, steps):
    with MetricsLog(tmp_path, LogConfig(), resume_step=0) as log:
        for step in steps:
            log.write(record(step))
            log.write({"step": step, "val_loss": math.nan if step == 5 else 2.0})
        log.write({"event": "done", "step": 300, "val_loss": 2.0})
    path = plot_loss(tmp_path, title="a run", references={"gzip -9": 1.9})
    assert path == tmp_path / "loss.png"
    assert path.read_bytes().startswith(b"\x89PNG")
