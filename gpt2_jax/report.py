"""What a run tells while it goes on, one step late, and when it ends."""

import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax

from gpt2_jax import hardware
from gpt2_jax.config import Config, ConfigError
from gpt2_jax.metrics import Meter, MetricsLog, progress_line
from gpt2_jax.step import StepMetrics


class TrainingError(ConfigError):
    """The run cannot go on: its updates are skipped again and again."""


class Reporter:
    """Reports each step after the next one is dispatched: the device never waits.

    `skipped` counts the run's skipped updates, `bad_steps` the last ones in a row; both
    go on from what an earlier session left.
    """

    def __init__(
        self,
        config: Config,
        log: MetricsLog,
        say: Callable[[str], None],
        *,
        step: int,
        seconds: float,
        skipped: int = 0,
        bad_steps: int = 0,
    ):
        self.config, self.log, self.say = config, log, say
        self.first = step + 1  # of this session
        self.seconds, self.began = seconds, time.perf_counter()
        self.meter = Meter(self.began)
        self.waiting: list[tuple[int, StepMetrics]] = []
        self.skipped, self.bad_steps = skipped, bad_steps

    def dispatched(self, step: int, metrics: StepMetrics) -> None:
        """Take the metrics of `step`, just dispatched; report the step before."""
        self.catch_up()
        self.waiting.append((step, metrics))

    def catch_up(self) -> None:
        """Report every step dispatched so far.

        Raises
        ------
        TrainingError
            If `train.max_bad_steps` updates in a row were skipped.
        """
        for step, metrics in self.waiting:
            self._report(step, jax.device_get(metrics))
        self.waiting.clear()

    def _report(self, step: int, metrics: StepMetrics) -> None:
        tokens, steps = self.config.train.batch_tokens, self.config.train.steps
        rate = self.meter.update(tokens, time.perf_counter())
        self._count_skipped(step, metrics)
        if step != self.first and step % self.config.log.interval:
            return
        loss, used = float(metrics.loss), self._mfu(rate)
        line = progress_line(
            step=step,
            steps=steps,
            loss=loss,
            tokens_per_second=rate,
            mfu=used,
            eta_seconds=self.meter.eta_seconds((steps - step) * tokens),
        )
        self.say(line)
        if step != 1 and step % self.config.log.interval:
            return  # told, as the first of its session; in the log of no other run
        record = dict(
            step=step,
            train_loss=loss,
            tokens_per_second=rate,
            grad_norm=float(metrics.grad_norm),
            seconds=self.seconds + time.perf_counter() - self.began,
            skipped_steps=self.skipped,
        )
        self.log.write(record if used is None else record | {"mfu": used})

    def _mfu(self, rate: float) -> float | None:
        token_flops = self.config.model.flops_per_token
        kind = jax.devices()[0].device_kind
        return hardware.mfu(rate, token_flops, kind, jax.device_count())

    def _count_skipped(self, step: int, metrics: StepMetrics) -> None:
        if bool(metrics.finite) and not metrics.spike:
            self.bad_steps = 0
            return
        self.bad_steps, self.skipped = self.bad_steps + 1, self.skipped + 1
        sequences, most = self.config.batch_sequences, self.config.train.max_bad_steps
        first = (step - 1) * sequences
        last, seed = first + sequences - 1, self.config.data.seed
        where = f"sequences {first} to {last} of the order of data.seed {seed}"
        loss, norm = float(metrics.loss), float(metrics.grad_norm)
        why = "a spike" if metrics.spike else "not finite"
        found = f"loss {loss:.4g}, gradient norm {norm:.4g}: {why}"
        self.say(f"step {step}: {found}, update skipped ({where})")
        record = dict(event="skipped", reason=why, loss=loss, grad_norm=norm)
        places = dict(first_sequence=first, last_sequence=last)
        self.log.write(dict(step=step) | record | places)
        if self.bad_steps >= most:
            raise TrainingError(
                f"{most} steps in a row were skipped, the last at step {step} with "
                f"{found}, {where}; lower --optimizer.learning-rate or raise "
                "--train.max-bad-steps"
            )


def summary(
    directory: Path,
    result: Mapping[str, int | float],
    *,
    seconds: float,
    samples: Sequence[str],
) -> str:
    """Return what a finished run shows: samples, figures, where all lies, what next."""
    minutes, rest = divmod(round(seconds), 60)
    texts = [
        f"\n--- sample {number} of {len(samples)}\n{text}"
        for number, text in enumerate(samples, start=1)
    ]
    written = f"samples      {directory / 'samples.txt'}\n" if samples else ""
    return "\n".join(texts) + (
        f"\n\nheld-out loss {result['val_loss']:.4f} nats per token after "
        f"{result['step']:,} steps in {minutes}m {rest:02}s\n"
        f"held-out bits per byte {result['val_bits_per_byte']:.3f}  "
        f"(gzip -9 {result['gzip_bits_per_byte']:.3f}, "
        f"xz -9 {result['xz_bits_per_byte']:.3f})\n\n"
        f"loss curve   {directory / 'loss.png'}\n"
        f"metrics      {directory / 'metrics.jsonl'}\n"
        f"{written}"
        f"checkpoints  {directory / 'checkpoints'}\n\n"
        "next:\n"
        f"  gpt2-jax generate {shlex.quote(str(directory))} 'def '\n"
        "  gpt2-jax train quickstart --data.source FILE --run-dir runs/mine\n"
        "  gpt2-jax train --help"
    )
