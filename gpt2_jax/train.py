"""Train a GPT-2: set up, restore, loop, finish.

The loop never waits for the device: step n is reported after step n + 1 is
dispatched. A run directory that holds a checkpoint is resumed, never restarted.
"""

import contextlib
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import jax
import numpy as np

from gpt2_jax import hosts, lock, sharding
from gpt2_jax.checkpoint import Checkpoints, print_to_stderr, read_meta
from gpt2_jax.config import (
    SHAPE,
    Config,
    ConfigError,
    ModelConfig,
    check,
    differences,
    flatten,
    from_dict,
    must_match,
    read_config,
    to_dict,
)
from gpt2_jax.data.dataset import Dataset, open_dataset
from gpt2_jax.data.loader import BatchShape, train_batches
from gpt2_jax.export import keep_tokenizer, open_tokenizer
from gpt2_jax.measure import Measures, zero_shot
from gpt2_jax.metrics import (
    RECORDS,
    MetricsLog,
    compressed_bits_per_byte,
    last_step,
    plot_loss,
)
from gpt2_jax.pretrained import load
from gpt2_jax.report import Reporter, TrainingError, summary
from gpt2_jax.signals import Interrupted, Stop
from gpt2_jax.step import Program, TrainState, make_program, micro_batch, settle
from gpt2_jax.tokenizer import Tokenizer
from gpt2_jax.watchdog import Watchdog

REMEDY = "keep them, or start another run with --run-dir"
SLOW_SECONDS = 5.0  # a wait for data that is worth a line
COMPARED_TOKENS = 2**23  # of held-out text that gzip and xz compress, at most


class Outcome(NamedTuple):
    """How a run ended."""

    run_dir: Path
    step: int
    done: bool  # False: a signal stopped it, a checkpoint holds its state
    signal: int | None  # the one that came


def train(config: Config, *, say: Callable[[str], None] = print) -> Outcome:
    """Train as `config` asks until its last step or a signal, and return the outcome.

    A run directory with a checkpoint goes on from it, bit for bit on the same number
    of devices. SIGINT, SIGTERM and SIGHUP save the current step and end the run; a
    second one ends it at once, as one does before the first step. Several processes
    (`hosts.join`) call it with the same config and a `run_dir` they share, and stop at
    the same step.

    Raises
    ------
    ConfigError
        If something asked for cannot work, or the directory holds another run.
    TrainingError
        If `train.max_bad_steps` steps in a row are not finite.
    CheckpointError
        If a checkpoint cannot be written, or none of those there can be read.
    """
    say = say if hosts.is_first() else _say_nothing
    with contextlib.ExitStack() as held:
        watchdog = held.enter_context(Watchdog(config.train.watchdog))
        say = watchdog.hears(say)
        hosts.check_same(hosts.fingerprint())
        hosts.check_same(_texts(config))
        directory = Path(config.run_dir)
        hosts.first_goes_first(lambda: _make_directory(directory, held))
        hosts.check_shared(directory)
        hosts.first_goes_first(lambda: _hold(directory, held))
        run = _set_up(config, watchdog, say)
        checkpoints = held.enter_context(_open_checkpoints(run))
        stop = held.enter_context(Stop())
        state = _restore_or_start(run, checkpoints)
        hosts.first_goes_first(
            lambda: checkpoints.refuse_if_full(
                state.params, state.opt_state, step=run.step, last=config.train.steps
            )
        )
        log = held.enter_context(
            MetricsLog(
                directory,
                config.log,
                resume_step=run.step,
                finishes=run.step == config.train.steps,
                active=hosts.is_first(),
            )
        )
        done = _loop(run, state, checkpoints, log, stop)
    return Outcome(directory, run.step, done, stop.signal)


@dataclass
class _Run:
    config: Config
    directory: Path
    tokenizer: Tokenizer
    data: Dataset
    program: Program
    shape: BatchShape
    watchdog: Watchdog
    say: Callable[[str], None]
    given: Any = None  # parameters to begin with, of train.init_from
    step: int = 0  # updates done
    seconds: float = 0.0  # of training, earlier sessions included
    skipped: int = 0  # updates, in all
    bad_steps: int = 0  # the last of them in a row
    began: float = field(default_factory=time.perf_counter)

    def clock(self) -> float:
        return self.seconds + time.perf_counter() - self.began


def _say_nothing(line: str) -> None:
    pass


def _texts(config: Config) -> dict[str, str]:
    """Return each field as text, by its name on the command line."""
    fields = flatten(to_dict(config))
    return {f"config {name}": repr(value) for name, value in fields.items()}


def _hold(directory: Path, held: contextlib.ExitStack) -> None:
    if hosts.is_first():
        held.enter_context(lock.hold(directory))


def _set_up(config: Config, watchdog: Watchdog, say: Callable[[str], None]) -> _Run:
    directory = Path(config.run_dir)
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
    zero_shot(config)  # a misspelt name ends the run now, not at its end
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
    found = {"data": data.digest, "tokenizer": tokenizer.fingerprint}
    hosts.check_same(_texts(config) | found)
    hosts.connect(mesh)
    program = make_program(config, mesh)
    rows = sharding.local_rows(program.batch_sharding, sequences)
    shape = BatchShape(accumulation, sequences, config.model.n_ctx, rows)
    _describe(config, data, mesh, shape, program, say)
    return _Run(
        config, directory, tokenizer, data, program, shape, watchdog, say, given
    )


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


def _make_directory(directory: Path, held: contextlib.ExitStack) -> None:
    try:
        new = not directory.exists()
        directory.mkdir(parents=True, exist_ok=True)
        if new and hosts.is_first():
            held.callback(_remove_if_bare, directory)
        probe = directory / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        reason = f"{directory}: {error.strerror}"
        raise ConfigError(
            f"run_dir cannot be written: {reason}; choose another --run-dir"
        ) from error


def _remove_if_bare(directory: Path) -> None:
    """Leave no new directory behind when a run was refused."""
    with contextlib.suppress(OSError):  # it holds something
        directory.rmdir()


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
        hosts.first_goes_first(lambda: _refuse_to_begin_again(run.directory))
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
    run.skipped = found.meta.get("skipped_steps", 0)
    run.bad_steps = found.meta.get("bad_steps", 0)
    run.say(f"resumed {run.directory} at step {run.step}")
    step = jax.device_put(np.int32(found.step), target.step.sharding)
    return TrainState(step, found.params, found.opt_state)


def _refuse_to_begin_again(directory: Path) -> None:
    """Refuse a run that was far enough to have saved, and has no checkpoint."""
    if not (directory / RECORDS).exists() or not (directory / "config.json").exists():
        return
    reached = last_step(directory / RECORDS)
    before = read_config(directory / "config.json")
    if reached > 2 * before.checkpoint.interval:
        raise ConfigError(
            f"{directory} holds no checkpoint, but {RECORDS} goes to step {reached}: "
            "bring its checkpoints back, remove the directory, or start another run "
            "with --run-dir"
        )


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


def _loop(
    run: _Run, state: TrainState, checkpoints: Checkpoints, log: MetricsLog, stop: Stop
) -> bool:
    """Step until the last step or a signal; save, measure and report on the way.

    Return whether the run is done; a signal leaves it at a checkpoint.
    """
    config, steps = run.config, run.config.train.steps
    reporter = Reporter(
        config,
        log,
        run.say,
        step=run.step,
        seconds=run.seconds,
        skipped=run.skipped,
        bad_steps=run.bad_steps,
    )
    measures = Measures(
        config=config,
        directory=run.directory,
        tokenizer=run.tokenizer,
        held_out=run.data.val,
        program=run.program,
        log=log,
        stop=stop,
        watchdog=run.watchdog,
        say=run.say,
    )
    batches = _batches(run)
    measures.drop_samples()
    try:
        if 0 < run.step < steps:  # what a session that ended at this step left out
            measures.take(measures.left_out(run.step), run.step, state.params)
        while run.step < steps:
            with stop.breaks():
                batch = _await_batch(run, batches)
            state, metrics = run.program.train_step(state, batch)
            run.step += 1
            stop.listen()
            run.watchdog.beat(f"has dispatched step {run.step}")
            reporter.dispatched(run.step, metrics)
            if checkpoints.due(run.step) or run.step == steps:
                reporter.catch_up()
                _save(run, checkpoints, state, reporter)
            due = measures.due(run.step) if run.step < steps else set()
            if due:
                reporter.catch_up()
                measures.take(due, run.step, state.params)
            if run.step < steps:
                stop.leave_if_it_came()
        reporter.catch_up()
        checkpoints.finish()  # a run whose last save failed is not done
        _finish(run, state, log, measures)
        return True
    except Interrupted:
        reporter.catch_up()
        _save(run, checkpoints, state, reporter)
        checkpoints.finish()
        run.say(f"stopped at step {run.step}; the same command goes on there")
        return False
    except TrainingError:  # in all processes: a save in flight comes to its end
        checkpoints.finish()
        raise


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


def _await_batch(run: _Run, batches: Iterator[jax.Array]) -> jax.Array:
    """Return the next batch; tell, in the process that it is, of a long wait."""
    where = f"for the batch of step {run.step + 1}"
    run.watchdog.beat(f"waits {where}")
    began = time.monotonic()
    batch = next(batches)
    if (waited := time.monotonic() - began) > SLOW_SECONDS:
        print_to_stderr(
            f"process {jax.process_index()} waited {waited:.0f} s {where}; put the "
            "data on a faster disk or raise --data.prefetch"
        )
    return batch


def _save(
    run: _Run, checkpoints: Checkpoints, state: TrainState, reporter: Reporter
) -> None:
    meta = dict(
        config=to_dict(run.config),
        data=run.data.digest,
        tokenizer=run.tokenizer.fingerprint,
        train_seconds=run.clock(),
        skipped_steps=reporter.skipped,
        bad_steps=reporter.bad_steps,
    )
    checkpoints.save(run.step, state.params, state.opt_state, meta)


def _finish(run: _Run, state: TrainState, log: MetricsLog, measures: Measures) -> None:
    """Evaluate on all held-out text, write samples and loss.png, say what is where."""
    seconds, batches = run.clock(), run.config.evaluate.final_batches
    loss = measures.loss(run.step, state.params, batches)
    measures.zero_shot(run.step, state.params)
    texts = measures.samples(run.step, state.params)
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
