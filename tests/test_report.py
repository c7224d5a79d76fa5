"""What a run tells: one step late, counted when not finite."""

import numpy as np
import pytest

from gpt2_jax.config import Config, LogConfig, ModelConfig, TrainConfig
from gpt2_jax.metrics import MetricsLog, read_metrics
from gpt2_jax.report import Reporter, TrainingError, summary
from gpt2_jax.step import StepMetrics

CONFIG = Config(
    model=ModelConfig(n_ctx=16, n_embd=8, n_head=2, n_layer=1, n_vocab=9),
    train=TrainConfig(steps=50, batch_tokens=64, max_bad_steps=2),
    log=LogConfig(interval=5),
)


def metrics(loss: float) -> StepMetrics:
    value = np.float32(loss)
    return StepMetrics(value, value, np.isfinite(value))


def follow(tmp_path, losses):
    lines: list[str] = []
    with MetricsLog(tmp_path, CONFIG.log, resume_step=0) as log:
        reporter = Reporter(CONFIG, log, lines.append, step=0, seconds=3.0)
        for step, loss in enumerate(losses, start=1):
            reporter.dispatched(step, metrics(loss))
        reporter.catch_up()
    return lines, read_metrics(tmp_path / "metrics.jsonl")


def test_the_first_step_and_every_fifth_are_told(tmp_path):
    lines, records = follow(tmp_path, [4.0 - 0.1 * i for i in range(12)])
    assert [record["step"] for record in records] == [1, 5, 10]
    assert [line.split()[1] for line in lines] == ["1/50", "5/50", "10/50"]
    assert records[1]["train_loss"] == pytest.approx(3.6)
    assert records[0]["seconds"] >= 3.0


def test_steps_not_finite_are_counted_and_a_row_of_them_stops(tmp_path):
    nan = float("nan")
    lines, records = follow(tmp_path, [1.0, nan, 1.0, nan, 1.0])
    assert records[-1]["skipped_steps"] == 2
    assert sum("update skipped (sequences 4 to 7" in line for line in lines) == 1
    with pytest.raises(TrainingError, match=r"2 steps in a row.*sequences 8 to 11"):
        follow(tmp_path, [1.0, nan, nan, 1.0])


def test_the_summary_shows_samples_figures_and_what_next(tmp_path):
    result = dict(
        step=50, val_loss=1.5, val_bits_per_byte=2.1, gzip_bits_per_byte=1.94,
        xz_bits_per_byte=1.6,
    )  # fmt: skip
    text = summary(tmp_path, result, seconds=61.0, samples=["one", "two"])
    for wanted in ("one", "two", "2.100", "1.940", "1m 01s", "loss.png", "generate"):
        assert wanted in text
