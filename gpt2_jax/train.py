"""Train a GPT-2: set up, restore, loop, finish.

The loop never waits for the device: step n is reported after step n + 1 is
dispatched. A run directory that holds a checkpoint is resumed, never restarted.
"""

import json
import math
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import jax
import numpy as np

from gpt2_jax import hosts, model, sharding
from gpt2_jax.checkpoint import Checkpoints, read_meta
from gpt2_jax.config import (
    SHAPE,
    Config,
    ConfigError,
    ModelConfig,
    check,
    differences,
    from_dict,
    must_match,
    to_dict,
)
from gpt2_jax.data.dataset import Dataset, open_dataset
from gpt2_jax.data.loader import BatchShape, eval_batches, train_batches
from gpt2_jax.decode import Row, Sampling, generate
from gpt2_jax.evaluate.columns import evaluate
from gpt2_jax.evaluate.options import EvaluateOptions
from gpt2_jax.export import keep_tokenizer, open_tokenizer
from gpt2_jax.metrics import (
    ZERO_SHOT,
    MetricsLog,
    compressed_bits_per_byte,
    plot_loss,
)
from gpt2_jax.pretrained import GPT2, load
from gpt2_jax.report import Reporter, summary
from gpt2_jax.step import Program, TrainState, make_program, micro_batch, settle
from gpt2_jax.tokenizer import Tokenizer

REMEDY = "keep them, or start another run with --run-dir"
COMPARED_TOKENS = 2**23  # of held-out text that gzip and xz compress, at most


class Outcome(NamedTuple):
    """How a run ended."""

    run_dir: Path
    step: int
    done: bool  # False: a signal stopped it, a checkpoint holds its state
    signal: int | None  # the one that came, even if the run was done all the same


def train(config: Config, *, say: Callable[[str], None] = print) -> Outcome:
    """Train as `config` asks until its last step or a signal, and return the outcome.

    A run directory with a checkpoint goes on from it, bit for bit on the same number
    of devices. SIGINT and SIGTERM save the current step and end the run; a second one
    ends it at once. Several processes (`hosts.join`) call it with the same config and a
    `run_dir` they share, and stop at the same step.

    Raises
    ------
    ConfigError
        If something asked for cannot work, or the directory holds another run.
    TrainingError
        If `train.max_bad_steps` steps in a row are not finite.
    CheckpointError
        If a checkpoint cannot be written, or none of those there can be read.
    """
    run = _set_up(config, say if hosts.is_first() else _say_nothing)
    with _open_checkpoints(run) as checkpoints, _Stop() as stop:
        state = _restore_or_start(run, checkpoints)
        how: dict[str, Any] = dict(resume_step=run.step, active=hosts.is_first())
        with MetricsLog(run.directory, config.log, **how) as log:
            done = _loop(run, state, checkpoints, log, stop)
    return Outcome(run.directory, run.step, done, stop.signal)


@dataclass
class _Run:
    config: Config
    directory: Path
    tokenizer: Tokenizer
    data: Dataset
    program: Program
    shape: BatchShape
    say: Callable[[str], None]
    given: Any = None  # parameters to begin with, of train.init_from
    step: int = 0  # updates done
    seconds: float = 0.0  # of training, earlier sessions included
    began: float = field(default_factory=time.perf_counter)

    def clock(self) -> float:
        return self.seconds + time.perf_counter() - self.began


def _say_nothing(line: str) -> None:
    pass


def _set_up(config: Config, say: Callable[[str], None]) -> _Run:
    directory = Path(config.run_dir)
    hosts.first_goes_first(lambda: _make_directory(directory))
    saved = _saved_config(directory, say)
    config, given = hosts.first_goes_first(
        lambda: _adopt_model(config, saved, directory, say)
    )
    _check_same_run(config, saved, directory, say)
    tokenizer = open_tokenizer(directory, config.data.tokenizer)
    padded = config.train.init_from and tokenizer.n_vocab < config.model.n_vocab
    if tokenizer.n_vocab != config.model.n_vocab and not padded:
        raise ConfigError(
            f"model.n_vocab is {config.model.n_vocab}, but tokenizer "
            f"{tokenizer.name!r} has {tokenizer.n_vocab} tokens; set "
            f"--model.n-vocab {tokenizer.n_vocab} "
            "or another --data.tokenizer"
        )
    room = config.model.n_ctx - len(tokenizer.encode(config.evaluate.prompt))
    check(
        room > 0, "evaluate.prompt", config.evaluate.prompt, "fewer than n_ctx tokens"
    )
    if config.evaluate.tasks:  # a misspelt name ends the run now, not at its end
        _tasks(config).task_names()
    config, mesh, notes = settle(config, jax.devices())
    for note in notes:
        say(note)
    accumulation, sequences = micro_batch(config, mesh)
    data = hosts.first_goes_first(
        lambda: open_dataset(config.data, tokenizer, directory / "data", say)
    )
    found, least = data.train.n_tokens, config.model.n_ctx + 1
    allowed = f"at least model.n_ctx + 1 = {least}; add text or lower --model.n-ctx"
    check(found >= least, "the training split's number of tokens", found, allowed)
    allowed = "at least 2; hold out more text"
    check(data.val.n_tokens > 1, "held-out tokens", data.val.n_tokens, allowed)
    hosts.check_same(
        {
            "config": json.dumps(to_dict(config), sort_keys=True),
            "data": data.digest,
            "tokenizer": tokenizer.fingerprint,
            "code": hosts.code_digest(),
            "jax": jax.__version__,
        }
    )
    program = make_program(config, mesh)
    rows = sharding.local_rows(program.batch_sharding, sequences)
    shape = BatchShape(accumulation, sequences, config.model.n_ctx, rows)
    _describe(config, data, mesh, shape, program, say)
    return _Run(config, directory, tokenizer, data, program, shape, say, given)


def _saved_config(directory: Path, say: Callable[[str], None]) -> Config | None:
    """Return the config of the run that the directory holds, if it holds one."""
    meta = read_meta(directory / "checkpoints", report=say)
    if meta is None:
        return None
    if "converted_from" in meta:
        raise ConfigError(
            f"{directory} holds a converted model, which has no optimizer state to "
            f"resume; fine-tune it with --train.init-from {directory} and another "
            "--run-dir"
        )
    return from_dict(meta["config"])


def _adopt_model(
    config: Config,
    saved: Config | None,
    directory: Path,
    say: Callable[[str], None],
) -> tuple[Config, Any]:
    """Return the config with the shape and tokenizer of `train.init_from`'s model.

    And its parameters, unless the run goes on: then the checkpoint has all of it. A
    shorter `model.n_ctx` than the model's stays: the first positions are trained.
    """
    name = config.train.init_from
    if name is None:
        return config, None
    if saved is not None and saved.train.init_from == name:
        return _with_shape(config, saved.model, saved.data.tokenizer), None
    lm = load(name, report=say)
    tokenizer = config.data.tokenizer
    if lm.tokenizer is not None:
        tokenizer = keep_tokenizer(lm.tokenizer, directory)
    adopted = _with_shape(config, lm.config, tokenizer)
    changes = differences(config, adopted)
    lines = [f"{field} {old!r} -> {new!r}" for field, (old, new) in changes.items()]
    say(f"weights of {name}{''.join(f'; {line}' for line in lines)}")
    positions = lm.params["wpe"]["embedding"][: adopted.model.n_ctx]
    return adopted, {**lm.params, "wpe": {"embedding": positions}}


def _with_shape(config: Config, shape: ModelConfig, tokenizer: str) -> Config:
    fields = {name: getattr(shape, name) for name in SHAPE}
    fields["n_ctx"] = min(shape.n_ctx, config.model.n_ctx)
    return replace(
        config,
        model=replace(config.model, **fields),
        data=replace(config.data, tokenizer=tokenizer),
    )


def _make_directory(directory: Path) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe = directory / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        reason = f"{directory}: {error.strerror}"
        raise ConfigError(
            f"run_dir cannot be written: {reason}; choose another --run-dir"
        ) from error


def _describe(config, data, mesh, shape, program, say) -> None:
    _, notes = sharding.param_specs(program.abstract_state.params, config.model, mesh)
    devices = mesh.devices.flat[0].device_kind
    axes = " x ".join(f"{name} {size}" for name, size in mesh.shape.items())
    say(
        f"GPT-2 of {config.model.n_params:,} parameters, {config.model.dtype} on "
        f"{mesh.size} x {devices} ({axes}), attention {config.model.attention}"
    )
    for note in notes:
        say(f"  {note}")
    epochs = config.total_tokens / data.train.n_tokens
    say(
        f"{config.train.steps:,} steps of {shape.accumulation} x {shape.sequences} x "
        f"{shape.n_ctx} tokens: {epochs:.2f} epochs of {data.train.n_tokens:,} tokens; "
        f"{data.val.n_tokens:,} held out"
    )


def _open_checkpoints(run: _Run) -> Checkpoints:
    settings = run.config.checkpoint
    return Checkpoints(
        run.directory / "checkpoints",
        interval=settings.interval,
        keep=settings.keep,
        keep_every=settings.keep_every,
        report=run.say,
    )


def _restore_or_start(run: _Run, checkpoints: Checkpoints) -> TrainState:
    """Return the newest good state, or a new one if there is no checkpoint at all."""
    if checkpoints.latest_step() is None:
        text = json.dumps(to_dict(run.config), indent=2) + "\n"
        if hosts.is_first():
            (run.directory / "config.json").write_text(text)
        if run.given is None:
            return run.program.start()
        places = jax.tree.map(lambda x: x.sharding, run.program.abstract_state.params)
        given = jax.device_put(jax.tree.map(np.asarray, run.given), places)
        run.given = None
        return run.program.start_from(given)
    target = run.program.abstract_state
    found = checkpoints.restore(None, target.params, target.opt_state)
    if found.meta["data"] != run.data.digest:
        raise ConfigError(
            f"{run.directory} holds a run on other data: fingerprint "
            f"{found.meta['data'][:12]}, now {run.data.digest[:12]}; {REMEDY}"
        )
    steps = run.config.train.steps
    allowed = f">= {found.step}, the step that {run.directory} has reached"
    check(steps >= found.step, "train.steps", steps, allowed)
    run.step, run.seconds = found.step, found.meta["train_seconds"]
    run.say(f"resumed {run.directory} at step {run.step}")
    step = jax.device_put(np.int32(found.step), target.step.sharding)
    return TrainState(step, found.params, found.opt_state)


def _check_same_run(
    config: Config, saved: Config | None, directory: Path, say: Callable[[str], None]
) -> None:
    """Refuse a directory that holds a run of another config, before anything else."""
    if saved is None:
        return
    changes = differences(saved, config)
    changes = {k: v for k, v in changes.items() if "auto" not in v}
    lines = {name: f"{name} {old!r} -> {new!r}" for name, (old, new) in changes.items()}
    fatal = [line for name, line in lines.items() if must_match(name)]
    if fatal:
        raise ConfigError(
            f"{directory} holds a run of another config: {', '.join(fatal)}; {REMEDY}"
        )
    if lines:
        say(f"changed since the last session: {', '.join(lines.values())}")


class _Stop:
    """Notes SIGINT and SIGTERM; a second one acts as if nobody listened.

    Of several processes all stop at one step: jax carries SIGTERM from one to the
    others, and SIGINT is passed on as SIGTERM.
    """

    def __init__(self):
        self.signal: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self):
        alone = jax.process_count() == 1
        for number in (signal.SIGINT, signal.SIGTERM) if alone else (signal.SIGINT,):
            handler = self._note if alone else hosts.pass_interrupt_on
            self._before[number] = signal.signal(number, handler)
        return self

    def came(self, step: int) -> bool:
        """Say whether the run is to stop after `step`; to be asked once a step."""
        if hosts.asked_to_stop(step):
            self.signal = signal.SIGTERM
        return self.signal is not None

    def __exit__(self, kind, error, trace):
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number, frame):
        self.signal = number
        signal.signal(number, self._before[number])
        print("\nstopping after this step; once more stops at once", file=sys.stderr)


def _loop(run: _Run, state: TrainState, checkpoints, log, stop: _Stop) -> bool:
    """Step until the last step or a signal; evaluate, save and report on the way.

    Return whether the run is done; a signal leaves it at a checkpoint.
    """
    config, every = run.config, run.config.evaluate
    reporter = Reporter(config, log, run.say, step=run.step, seconds=run.seconds)
    for batch in _batches(run):
        state, metrics = run.program.train_step(state, batch)
        run.step += 1
        reporter.dispatched(run.step, metrics)
        last = run.step == config.train.steps
        if _due(run.step, every.interval) and not last:
            reporter.catch_up()
            _evaluate(run, state.params, log, every.batches)
        if _due(run.step, every.sample_interval) and not last:
            _write_samples(run, state.params)
        stopped = stop.came(run.step) and not last
        if checkpoints.due(run.step) or last or stopped:
            reporter.catch_up()
            _save(run, checkpoints, state)
        if stopped:
            break
        if _due(run.step, every.tasks_interval) and not last:  # what it costs is saved
            reporter.catch_up()
            _zero_shot(run, state.params, log)
    reporter.catch_up()
    checkpoints.finish()  # a run whose last save failed is not done
    done = run.step == config.train.steps
    if done:
        _finish(run, state, log)
    else:
        run.say(f"stopped at step {run.step}; the same command resumes there")
    return done


def _due(step: int, interval: int) -> bool:
    return interval > 0 and step % interval == 0


def _batches(run: _Run) -> Iterator[jax.Array]:
    batches = train_batches(
        run.data.train,
        run.shape,
        seed=run.config.data.seed,
        start=run.step,
        stop=run.config.train.steps,
        ahead=run.config.data.prefetch,
    )
    for batch in batches:
        where, sequences = run.program.batch_sharding, run.shape.sequences
        yield sharding.to_global(batch, where, sequences)


def _evaluate(run: _Run, params: Any, log: MetricsLog, batches: int) -> float:
    """Write and return the held-out loss in nats per token."""
    began = time.perf_counter()
    loss, count = _held_out(run, params, batches)
    rate = count / (time.perf_counter() - began)
    log.write(dict(step=run.step, val_loss=loss, tokens_per_second=rate))
    run.say(f"step {run.step}  held-out loss {loss:.4f} over {count:,} tokens")
    return loss


def _held_out(run: _Run, params: Any, batches: int) -> tuple[float, int]:
    where = run.program.eval_sharding
    sequences = run.config.evaluate.batch_sequences * sharding.batch_parts(
        run.program.mesh
    )
    rows = sharding.local_rows(where, sequences)
    windows = eval_batches(run.data.val, sequences, run.config.model.n_ctx, rows)
    sums = []
    for index, batch in enumerate(windows):
        if batches and index == batches:
            break
        whole = sharding.to_global(batch, where, sequences)
        sums.append(run.program.eval_step(params, whole))
    losses, counts = np.array(jax.device_get(sums), np.float64).T
    return float(losses.sum() / counts.sum()), int(counts.sum())


def _save(run: _Run, checkpoints: Checkpoints, state: TrainState) -> None:
    meta = dict(
        config=to_dict(run.config),
        data=run.data.digest,
        tokenizer=run.tokenizer.fingerprint,
        train_seconds=run.clock(),
    )
    checkpoints.save(run.step, state.params, state.opt_state, meta)


def _zero_shot(run: _Run, params: Any, log: MetricsLog) -> None:
    """Write the zero-shot tasks' numbers; process 0 computes them, on its devices."""
    if not run.config.evaluate.tasks:
        return
    params = hosts.gather(params)
    if hosts.is_first():
        lm = GPT2(run.config.model, params, run.tokenizer)
        try:
            rows = evaluate(lm, _tasks(run.config))
        except (FloatingPointError, OSError) as error:  # no reason to lose the run
            run.say(f"step {run.step}  zero-shot tasks not run: {error}")
            rows = []
        for row in rows:
            number = "" if row.value is None else f" {row.value:.4g}"
            note = f" ({row.note})" if row.note else ""
            run.say(f"step {run.step}  {row.name}{number}{note}")
            if row.value is not None:
                log.write({"step": run.step, f"{ZERO_SHOT}{row.name}": row.value})
    hosts.wait_for_all("zero-shot")


def _tasks(config: Config) -> EvaluateOptions:
    """Return windows without overlap: the quick reading, the same all through a run."""
    how = config.evaluate
    return EvaluateOptions(
        tasks=how.tasks,
        data_dir=Path(how.tasks_dir),
        any_data=how.tasks_any_data,
        stride=config.model.n_ctx,
    )


def _samples(run: _Run, params: Any) -> list[str]:
    how, config = run.config.evaluate, run.config.model
    start = [run.tokenizer.eot]
    prompt = np.array(run.tokenizer.encode(how.prompt) if how.prompt else start)
    limit = min(how.sample_tokens, config.n_ctx - len(prompt))
    new = generate(
        config,
        model.unstack(config, params),
        [Row(prompt, limit, run.step, i) for i in range(how.samples)],
        sampling=Sampling(how.temperature, how.top_k, how.top_p),
        eot=run.tokenizer.eot,
    )
    return [how.prompt + run.tokenizer.decode(tokens) for tokens in new]


def _write_samples(run: _Run, params: Any) -> list[str]:
    """Append samples to samples.txt and return them; process 0 does."""
    if run.config.evaluate.samples == 0:
        return []
    params = hosts.gather(params)
    if not hosts.is_first():
        return []
    texts = _samples(run, params)
    with (run.directory / "samples.txt").open("a", encoding="utf-8") as file:
        for number, text in enumerate(texts, start=1):
            file.write(f"--- step {run.step}, sample {number}\n{text}\n")
    return texts


def _finish(run: _Run, state: TrainState, log: MetricsLog) -> None:
    """Evaluate on all held-out text, write samples and loss.png, say what is where."""
    seconds, began = run.clock(), time.perf_counter()
    loss, count = _held_out(run, state.params, run.config.evaluate.final_batches)
    rate = count / (time.perf_counter() - began)
    log.write(dict(step=run.step, val_loss=loss, tokens_per_second=rate))
    _zero_shot(run, state.params, log)
    texts = _write_samples(run, state.params)
    if not hosts.is_first():
        return
    ids = run.data.val.read(0, min(run.data.val.n_tokens, COMPARED_TOKENS))
    text = run.tokenizer.decode_bytes(ids[ids != run.tokenizer.eot])
    per_bit = math.log(2) * len(text) / len(ids)  # nats per token
    bits = loss / per_bit
    packed = compressed_bits_per_byte(text)
    result = dict(step=run.step, val_loss=loss, val_bits_per_byte=bits, **packed)
    log.write(dict(event="done", **result, train_seconds=seconds))
    names = dict(gzip_bits_per_byte="gzip -9", xz_bits_per_byte="xz -9")
    plot_loss(
        run.directory,
        title=f"{run.directory.name}: {run.config.model.n_params:,} parameters",
        references={names[key]: value * per_bit for key, value in packed.items()},
    )
    run.say(summary(run.directory, result, seconds=seconds, samples=texts))


class _Program(ModuleType):
    """Lets `gpt2_jax.train` be both this module and the function that it is about."""

    def __call__(
        self, config: Config, *, say: Callable[[str], None] = print
    ) -> Outcome:
        return train(config, say=say)


sys.modules[__name__].__class__ = _Program
