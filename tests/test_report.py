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


def metrics(loss: float, spike: bool | None = None) -> StepMetrics:
    value = np.float32(loss)
    flag = None if spike is None else np.bool_(spike)
    return StepMetrics(value, value, np.isfinite(value), flag)


def follow(tmp_path, losses, *, spikes=(), **before):
    """Report steps of these losses; those of `spikes` are skipped as such."""
    lines: list[str] = []
    with MetricsLog(tmp_path, CONFIG.log, resume_step=0) as log:
        reporter = Reporter(CONFIG, log, lines.append, step=0, seconds=3.0, **before)
        for step, loss in enumerate(losses, start=1):
            spike = step in spikes if spikes else None
            reporter.dispatched(step, metrics(loss, spike))
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


def test_a_skipped_step_is_written_down_with_its_place_in_the_data(tmp_path):
    lines, records = follow(tmp_path, [1.0, float("inf"), 1.0, 7.0], spikes=(4,))
    skipped = [record for record in records if record.get("event") == "skipped"]
    assert [(r["step"], r["reason"]) for r in skipped] == [
        (2, "not finite"), (4, "a spike"),
    ]  # fmt: skip
    assert skipped[0]["nonfinite"] == ["loss", "grad_norm"]
    assert (skipped[1]["first_sequence"], skipped[1]["last_sequence"]) == (12, 15)
    assert skipped[1]["loss"] == 7.0
    assert "step 4: loss 7, gradient norm 7: a spike, update skipped (seq" in lines[-1]


def test_spikes_and_bad_numbers_are_one_row(tmp_path):
    """Else a run that alternates them would never end."""
    with pytest.raises(TrainingError, match=r"2 steps in a row.* loss 7.*a spike"):
        follow(tmp_path, [1.0, float("nan"), 7.0], spikes=(3,))


def test_counts_go_on_from_an_earlier_session(tmp_path):
    nan = float("nan")
    _, records = follow(tmp_path, [1.0] * 5, skipped=4, bad_steps=1)
    assert records[-1]["skipped_steps"] == 4
    with pytest.raises(TrainingError, match=r"2 steps in a row"):
        follow(tmp_path, [nan], skipped=4, bad_steps=1)
    _, records = follow(tmp_path, [1.0, nan, 1.0, 1.0, 1.0], skipped=4, bad_steps=1)
    assert records[-1]["skipped_steps"] == 5


def test_the_summary_shows_samples_figures_and_what_next(tmp_path):
    result = dict(
        step=50, val_loss=1.5, val_bits_per_byte=2.1, gzip_bits_per_byte=1.94,
        xz_bits_per_byte=1.6,
    )  # fmt: skip
    text = summary(tmp_path, result, seconds=61.0, samples=["one", "two"])
    for wanted in ("one", "two", "2.100", "1.940", "1m 01s", "loss.png", "generate"):
        assert wanted in text
