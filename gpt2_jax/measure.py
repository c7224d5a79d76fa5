"""What is measured of a run beside its training: held-out loss, samples, tasks.

Nothing here changes the state, so a signal leaves any of it at once; the session after
takes what the log does not hold.
"""

import itertools
import os
import time
from collections.abc import Callable
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gpt2_jax import hosts, model, sharding
from gpt2_jax.config import Config
from gpt2_jax.data.loader import Tokens, eval_batches
from gpt2_jax.decode import Row, Sampling, generate
from gpt2_jax.evaluate.columns import evaluate
from gpt2_jax.evaluate.options import EvaluateOptions
from gpt2_jax.metrics import LOSS, TEXTS, ZERO_SHOT, MetricsLog
from gpt2_jax.pretrained import GPT2
from gpt2_jax.signals import Stop
from gpt2_jax.step import Program
from gpt2_jax.tokenizer import Tokenizer
from gpt2_jax.watchdog import Watchdog

SAMPLES = "samples.txt"


def zero_shot(config: Config) -> EvaluateOptions | None:
    """Return what is asked of the zero-shot tasks of a run; None if there are none.

    Windows do not overlap: the quick reading, the same all through a run.

    Raises
    ------
    ConfigError
        If a task is not known.
    """
    how = config.evaluate
    if not how.tasks:
        return None
    options = EvaluateOptions(
        tasks=how.tasks,
        data_dir=Path(how.tasks_dir),
        any_data=how.tasks_any_data,
        stride=config.model.n_ctx,
    )
    options.task_names()
    return options


@dataclass(frozen=True, kw_only=True)
class Measures:
    """Takes the measures of one run; all processes call it alike.

    Every method raises `Interrupted` soon after a signal.
    """

    config: Config
    directory: Path
    tokenizer: Tokenizer
    held_out: Tokens
    program: Program
    log: MetricsLog
    stop: Stop
    watchdog: Watchdog
    say: Callable[[str], None]

    def due(self, step: int) -> set[str]:
        """Return which measures the config asks for after `step`."""
        every = self.config.evaluate
        intervals = {
            LOSS: every.interval,
            TEXTS: every.sample_interval,
            ZERO_SHOT: every.tasks_interval,
        }
        return {name for name, n in intervals.items() if n and step % n == 0}

    def left_out(self, step: int) -> set[str]:
        """Return which of those the log does not hold."""
        here = [record for record in self.log.kept if record.get("step") == step]
        text = " ".join({name for record in here for name in record})
        known = hosts.broadcast(text).split()
        return {d for d in self.due(step) if not any(k.startswith(d) for k in known)}

    def take(self, names: AbstractSet[str], step: int, params: Any) -> None:
        """Take the measures of these names, of the parameters after `step`."""
        if LOSS in names:
            self.loss(step, params, self.config.evaluate.batches)
        if TEXTS in names:
            self.samples(step, params)
        if ZERO_SHOT in names:
            self.zero_shot(step, params)

    def loss(self, step: int, params: Any, batches: int) -> float:
        """Write and return the held-out loss in nats per token; 0 batches are all."""
        began = time.perf_counter()
        loss, count = self._loss(step, params, batches)
        rate = count / (time.perf_counter() - began)
        self.log.write({"step": step, LOSS: loss, "tokens_per_second": rate})
        self.say(f"step {step}  held-out loss {loss:.4f} over {count:,} tokens")
        return loss

    def _loss(self, step: int, params: Any, batches: int) -> tuple[float, int]:
        where, config = self.program.eval_sharding, self.config
        parts = sharding.batch_parts(self.program.mesh)
        sequences = config.evaluate.batch_sequences * parts
        rows = sharding.local_rows(where, sequences)
        windows = eval_batches(self.held_out, sequences, config.model.n_ctx, rows)
        sums, before = [], None
        for index, batch in enumerate(itertools.islice(windows, batches or None)):
            self.watchdog.beat(f"evaluates batch {index} at step {step}")
            whole = sharding.to_global(batch, where, sequences)
            now = self.program.eval_step(params, whole)
            with self.stop.breaks():  # waiting for the batch before
                sums += [] if before is None else [jax.device_get(before)]
            self.stop.leave_if_it_came()
            before = now
        sums.append(jax.device_get(before))
        losses, counts = np.array(sums, np.float64).T
        return float(losses.sum() / counts.sum()), int(counts.sum())

    def samples(self, step: int, params: Any) -> list[str]:
        """Append samples to samples.txt and return them; process 0 does.

        The log has the size of the file, for `drop_samples`.
        """
        if self.config.evaluate.samples == 0:
            return []
        params = hosts.gather(params)
        if not hosts.is_first():
            return []
        try:
            with self.stop.breaks():
                texts = self._samples(step, params)
        except FloatingPointError as error:  # no reason to lose the run
            self.say(f"step {step}  no samples: {error}")
            return []
        with (self.directory / SAMPLES).open("a", encoding="utf-8") as file:
            for number, text in enumerate(texts, start=1):
                file.write(f"--- step {step}, sample {number}\n{text}\n")
            size = file.tell()
        self.log.write({"event": "samples", "step": step, TEXTS: size})
        return texts

    def _samples(self, step: int, params: Any) -> list[str]:
        how, config, tokenizer = self.config.evaluate, self.config.model, self.tokenizer
        start = [tokenizer.eot]
        prompt = np.array(tokenizer.encode(how.prompt) if how.prompt else start)
        limit = min(how.sample_tokens, config.n_ctx - len(prompt))
        new = generate(
            config,
            model.unstack(config, params),
            [Row(prompt, limit, step, i) for i in range(how.samples)],
            sampling=Sampling(how.temperature, how.top_k, how.top_p),
            eot=tokenizer.eot,
        )
        return [how.prompt + tokenizer.decode(tokens) for tokens in new]

    def drop_samples(self) -> None:
        """Cut off samples.txt what is not in the log: the run writes it again."""
        file = self.directory / SAMPLES
        sizes = [record[TEXTS] for record in self.log.kept if TEXTS in record]
        if hosts.is_first() and file.exists():
            os.truncate(file, sizes[-1] if sizes else 0)

    def zero_shot(self, step: int, params: Any) -> None:
        """Write the zero-shot tasks' numbers, which process 0 computes."""
        options = zero_shot(self.config)
        if options is None:
            return
        params = hosts.gather(params)
        if hosts.is_first():
            self._zero_shot(step, params, options)
        hosts.wait_for_all("zero-shot")

    def _zero_shot(self, step: int, params: Any, options: EvaluateOptions) -> None:
        lm = GPT2(self.config.model, params, self.tokenizer)

        def beat(line: str) -> None:
            self.watchdog.beat(f"zero-shot at step {step}: {line}")

        try:
            with self.stop.breaks():
                rows = evaluate(lm, options, say=beat)
        except (FloatingPointError, OSError) as error:  # no reason to lose the run
            self.say(f"step {step}  zero-shot tasks not run: {error}")
            return
        for row in rows:
            number = "" if row.value is None else f" {row.value:.4g}"
            note = f" ({row.note})" if row.note else ""
            self.say(f"step {step}  {row.name}{number}{note}")
            if row.value is not None:
                self.log.write({"step": step, f"{ZERO_SHOT}{row.name}": row.value})
