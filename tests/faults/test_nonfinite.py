"""What is not finite changes no bit, is counted, and never becomes a checkpoint.

NU1, NU2 and goal R10 of the reliability reference.
"""

import dataclasses
import math
import os
import signal
from pathlib import Path

import jax
import numpy as np
import poison
import pytest
from poison import INF, LOSS, NAN, poisoned

from gpt2_jax import sharding
from gpt2_jax import step as steps
from gpt2_jax import train as program_of_runs
from gpt2_jax.checkpoint import Checkpoints, read_meta
from gpt2_jax.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    EvaluateConfig,
    LogConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
    must_match,
)
from gpt2_jax.metrics import read_metrics
from gpt2_jax.report import Reporter, TrainingError
from gpt2_jax.step import Program, TrainState, Watched, make_program, micro_batch
from gpt2_jax.train import train

LONG = pytest.mark.faults
SHAPE = ModelConfig(
    n_vocab=61,
    n_ctx=8,
    n_embd=16,
    n_layer=2,
    n_head=2,
    vocab_multiple=8,
    embd_pdrop=0.1,
    dtype="float32",
)
ALONE = MeshConfig(data=1, fsdp=1, tensor=1)
EIGHT = MeshConfig(data=2, fsdp=2, tensor=2)


@pytest.fixture(autouse=True)
def honest(monkeypatch):
    monkeypatch.setattr(steps, "window_loss", poison.window_loss)


def make_config(rule: dict | None = None, **settings) -> Config:
    how = dict(steps=400, batch_tokens=16 * 8, micro_batch=2) | settings
    rule = dict(learning_rate=1e-3, warmup_steps=2) | (rule or {})
    return Config(
        model=SHAPE, optimizer=OptimizerConfig(**rule), train=TrainConfig(**how)
    )


def start(config: Config, axes: MeshConfig = ALONE) -> Program:
    count = math.prod((axes.data or 1, axes.fsdp or 1, axes.tensor or 1))
    return make_program(config, sharding.make_mesh(axes, jax.devices()[:count]))


def batch_of(config: Config, program: Program, step: int) -> np.ndarray:
    shape = micro_batch(config, program.mesh)
    assert shape[0] > 1  # the poison is in one of several micro-batches
    rng = np.random.default_rng(step)
    return rng.integers(0, 61, (*shape, SHAPE.n_ctx + 1), dtype=np.int32)


def take(program: Program, state: TrainState, batch: np.ndarray):
    whole = sharding.to_global(batch, program.batch_sharding)
    return program.train_step(state, whole)


def assert_same_bits(one, other) -> None:
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert a.dtype == b.dtype and a.tobytes() == b.tobytes()


def is_finite(tree) -> bool:
    leaves = map(np.asarray, jax.tree.leaves(tree))
    return all(np.isfinite(leaf).all() for leaf in leaves)


@pytest.mark.parametrize("clip", [1.0, pytest.param(0.0, marks=LONG)])
@pytest.mark.parametrize("name", ["adamw", pytest.param("muon", marks=LONG)])
@pytest.mark.parametrize("axes", [ALONE, pytest.param(EIGHT, marks=LONG)], ids=str)
def test_poison_in_the_loss_or_any_leaf_changes_no_bit(axes, name, clip):
    config = make_config(dict(name=name, grad_clip=clip))
    program = start(config, axes)
    state, metrics = take(program, program.start(), batch_of(config, program, 0))
    assert bool(metrics.finite)
    before = jax.device_get(state)
    places = range(1 + len(jax.tree.leaves(state.params)))
    # 1e25 is finite, but its square is not in float32: the norm is what is looked at.
    tries = [(p, bad) for p in places for bad in (NAN, INF, -INF)]
    tries += [(p, 1e25) for p in places if p != LOSS]
    for number, (place, bad) in enumerate(tries, start=1):
        batch = poisoned(batch_of(config, program, number), place, bad)
        state, metrics = take(program, state, batch)
        assert not bool(metrics.finite), (place, bad)
        assert int(state.step) == number + 1
        assert_same_bits(state[1:], before[1:])
    state, metrics = take(program, state, batch_of(config, program, 0))
    assert bool(metrics.finite) and is_finite(state)
    moved = jax.device_get(state.params)
    for old, new in zip(
        jax.tree.leaves(before.params), jax.tree.leaves(moved), strict=True
    ):
        assert (old != new).any()


@LONG
def test_large_gradients_whose_norm_is_finite_are_taken():
    config = make_config()
    program = start(config)
    state = program.start()
    for place in (1, 5, 9):
        batch = poisoned(batch_of(config, program, place), place, 1e6)
        state, metrics = take(program, state, batch)
        assert bool(metrics.finite) and float(metrics.grad_norm) > 1e3
    assert is_finite(state)


@LONG
def test_parameters_that_overflow_are_seen_by_the_next_step():
    """And by the save: see the checkpoints. The step does not look at them itself."""
    rule = dict(learning_rate=3e38, weight_decay=1e3, warmup_steps=0)
    config = make_config(rule)
    program = start(config)
    state, metrics = take(program, program.start(), batch_of(config, program, 0))
    assert bool(metrics.finite) and not is_finite(state.params)
    before = jax.device_get(state)
    for step in (1, 2):
        state, metrics = take(program, state, batch_of(config, program, step))
        assert not bool(metrics.finite)
        assert_same_bits(state[1:], before[1:])


def poisons_of(seed: int, count: int, places: int) -> dict[int, tuple[int, float]]:
    """Return step -> (place, poison) of one run."""
    rng = np.random.default_rng(seed)
    bad = rng.choice(count, rng.integers(1, count // 2), replace=False).tolist()
    kinds = (NAN, INF, -INF, 1e25)
    return {int(s): (int(rng.integers(1, places)), kinds[rng.integers(4)]) for s in bad}


@pytest.mark.parametrize("runs", [3, pytest.param(100, marks=LONG)])
def test_runs_with_poison_are_runs_that_left_those_steps_out(tmp_path, runs):
    config = make_config(dict(name="adamw"))
    program, count = start(config), 9
    places = 1 + len(jax.tree.leaves(program.abstract_state.params))
    saved = 0
    for seed in range(runs):
        bad = poisons_of(seed, count, places)
        state, wanted = program.start(), program.start()
        folder = tmp_path / str(seed)
        with Checkpoints(folder, interval=count, keep=1, keep_every=0) as checkpoints:
            for step in range(count):
                clean = batch_of(config, program, step + 100 * seed)
                batch = poisoned(clean, *bad[step]) if step in bad else clean
                state, metrics = take(program, state, batch)
                assert bool(metrics.finite) == (step not in bad)
                if step in bad:
                    wanted = wanted._replace(step=wanted.step + 1)
                else:
                    wanted, _ = take(program, wanted, clean)
                if checkpoints.due(step + 1):
                    checkpoints.save(step + 1, state.params, state.opt_state, {})
            assert_same_bits(state, wanted)
            checkpoints.finish()
            target = program.abstract_state[1:]
            found = checkpoints.restore(count, *target)
            assert is_finite((found.params, found.opt_state))
            assert_same_bits((found.params, found.opt_state), wanted[1:])
            saved += 1
    assert saved == runs


# Spikes: NU2


SPIKES = {
    20: (LOSS, 1e3),  # too early to be told
    70: (LOSS, 1e3),
    72: (3, 1e6),  # a gradient of one leaf
    73: (LOSS, 1e3),  # in a row
    75: (4, NAN),
}


@LONG
@pytest.mark.parametrize("axes", [ALONE, EIGHT], ids=str)
def test_a_spike_changes_no_bit_but_the_history(axes):
    config = make_config(spike_sigmas=6.0)
    program = start(config, axes)
    state, skipped = program.start(), []
    for step in range(80):
        batch = batch_of(config, program, step)
        batch = poisoned(batch, *SPIKES[step]) if step in SPIKES else batch
        before = jax.device_get(state)
        state, metrics = take(program, state, batch)
        assert bool(metrics.finite) == (step != 75)
        assert bool(metrics.spike) == (step in (70, 72, 73))
        after, was = jax.device_get(state.opt_state), before.opt_state
        assert isinstance(after, Watched)
        told = int(after.history.written) - int(was.history.written)
        assert told == (step != 75)
        if step in (70, 72, 73, 75):
            assert_same_bits((state.params, after.rule), (before.params, was.rule))
            skipped.append(step)
        if step == 75:
            assert_same_bits(after.history, was.history)
    assert len(skipped) == 4 and is_finite(state)


@pytest.mark.parametrize(
    "axes", [pytest.param(ALONE, marks=LONG), pytest.param(EIGHT, marks=LONG)], ids=str
)
def test_a_resumed_run_tells_spikes_as_an_unbroken_one(tmp_path, axes):
    config = make_config(spike_sigmas=6.0)
    program = start(config)

    def follow(program, state, first, last):
        found = []
        for step in range(first, last):
            batch = batch_of(config, program, step).reshape(16, -1)
            batch = batch.reshape(*micro_batch(config, program.mesh), -1)
            batch = poisoned(batch, *SPIKES[step]) if step in SPIKES else batch
            state, metrics = take(program, state, batch)
            found += [step] if bool(metrics.spike) else []
        return state, found

    state, _ = follow(program, program.start(), 0, 68)
    with Checkpoints(tmp_path, interval=1, keep=1, keep_every=0) as checkpoints:
        checkpoints.save(68, state.params, state.opt_state, {})
        checkpoints.finish()
        whole, wanted = follow(program, state, 68, 80)
        other = start(config, axes)
        target = other.abstract_state
        found = checkpoints.restore(68, *target[1:])
    step = jax.device_put(np.int32(68), target.step.sharding)
    resumed = TrainState(step, found.params, found.opt_state)
    resumed, told = follow(other, resumed, 68, 80)
    assert told == wanted == [70, 72, 73]
    if axes == ALONE:
        assert_same_bits(resumed, whole)


def test_nobody_looks_for_spikes_unasked():
    program = start(make_config())
    state = program.start()
    assert not isinstance(state.opt_state, Watched)
    _, metrics = take(program, state, batch_of(make_config(), program, 0))
    assert metrics.spike is None
    assert must_match("train.spike_sigmas")


# Whole runs


@pytest.fixture
def run_config(tmp_path) -> Config:
    (tmp_path / "text.txt").write_text("the quick brown fox jumps\n" * 200)
    return Config(
        run_dir=str(tmp_path / "run"),
        model=dataclasses.replace(SHAPE, n_vocab=257),
        data=DataConfig(source=(str(tmp_path / "text.txt"),), tokenizer="bytes"),
        train=TrainConfig(steps=8, batch_tokens=8 * 8, max_bad_steps=3),
        evaluate=EvaluateConfig(interval=0, samples=0, final_batches=1),
        checkpoint=CheckpointConfig(interval=1, keep=20),
        log=LogConfig(interval=1),
    )


def poison_steps(monkeypatch, bad) -> None:
    """Poison the batches of these steps, counted from 1, where a run reads them."""
    honest = program_of_runs.train_batches

    def batches(*args, **how):
        read = honest(*args, **how)
        for step, batch in enumerate(read, start=how["start"] + 1):
            yield poisoned(batch, 2, NAN) if step in bad else batch

    monkeypatch.setattr(program_of_runs, "train_batches", batches)


@LONG
def test_a_run_tells_of_its_skipped_steps_and_goes_on(run_config, monkeypatch):
    poison_steps(monkeypatch, {3, 6, 7})
    lines: list[str] = []
    assert train(run_config, say=lines.append).done
    told = [line for line in lines if "update skipped" in line]
    assert [line.split(":")[0] for line in told] == ["step 3", "step 6", "step 7"]
    assert "(sequences 16 to 23 of the order of data.seed 0)" in told[0]
    records = read_metrics(Path(run_config.run_dir) / "metrics.jsonl")
    skipped = [r["step"] for r in records if r.get("event") == "skipped"]
    assert skipped == [3, 6, 7]
    last = [r for r in records if "skipped_steps" in r][-1]
    assert last["skipped_steps"] == 3
    assert check_checkpoints(run_config) == list(range(1, 9))


def test_too_many_in_a_row_end_a_run_and_leave_no_bad_checkpoint(
    run_config, monkeypatch
):
    poison_steps(monkeypatch, {2, 4, 5, 6, 7, 8})
    with pytest.raises(
        TrainingError, match=r"3 steps in a row.* step 6 .*sequences 40"
    ):
        train(run_config, say=lambda line: None)
    assert check_checkpoints(run_config)[-1] in (5, 6)


def test_a_stop_does_not_forget_how_many_were_skipped(run_config, monkeypatch):
    poison_steps(monkeypatch, {2, 4, 5, 6})
    dispatched = Reporter.dispatched

    def signalled(self, step, metrics):
        dispatched(self, step, metrics)
        if step == 5 and self.first == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Reporter, "dispatched", signalled)
    assert not train(run_config, say=lambda line: None).done
    with pytest.raises(TrainingError, match=r"3 steps in a row.* step 6 "):
        train(run_config, say=lambda line: None)
    records = read_metrics(Path(run_config.run_dir) / "metrics.jsonl")
    assert sum(r.get("event") == "skipped" for r in records) == 4


def check_checkpoints(config: Config) -> list[int]:
    """Return the steps saved, all of them finite."""
    folder = Path(config.run_dir) / "checkpoints"
    saved = sorted(int(p.name) for p in folder.iterdir() if p.name.isdecimal())
    program = start(config)
    with Checkpoints(folder, interval=1, keep=20, keep_every=0) as checkpoints:
        for step in saved:
            found = checkpoints.restore(step, *program.abstract_state[1:])
            assert is_finite((found.params, found.opt_state))
    assert read_meta(folder) is not None
    return saved
