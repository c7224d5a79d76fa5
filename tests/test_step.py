"""One step: accumulation, devices, skipped updates, token weights, one compile."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt2_jax import sharding
from gpt2_jax.config import (
    Config,
    ConfigError,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
)
from gpt2_jax.step import make_program, micro_batch


def make_config(model: ModelConfig, **train) -> Config:
    return Config(
        model=model,
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=2),
        train=TrainConfig(**{"steps": 20, "batch_tokens": 8 * model.n_ctx} | train),
    )


def run(config: Config, mesh_config: MeshConfig, steps: int, devices: int = 8):
    """Return the losses of `steps` steps and the parameters after them."""
    mesh = sharding.make_mesh(mesh_config, jax.devices()[:devices])
    program = make_program(config, mesh)
    state, losses = program.start(), []
    shape = (*micro_batch(config, mesh), config.model.n_ctx + 1)
    for step in range(steps):
        rng = np.random.default_rng(step)
        batch = rng.integers(0, config.model.n_vocab, shape, dtype=np.int32)
        batch = sharding.to_global(batch, program.batch_sharding)
        state, metrics = program.train_step(state, batch)
        losses.append(float(metrics.loss))
    return losses, jax.device_get(state.params)


@pytest.mark.parametrize(
    ("optimizer", "axes"),
    [
        ("adamw", dict(data=8)),
        ("adamw", dict(fsdp=8)),
        ("adamw", dict(data=2, tensor=4)),
        ("muon", dict(data=2, fsdp=2, tensor=2)),
    ],
    ids=str,
)
def test_eight_devices_equal_one(tiny, axes, optimizer):
    config = make_config(tiny)
    rule = dataclasses.replace(config.optimizer, name=optimizer)
    config = dataclasses.replace(config, optimizer=rule)
    alone, _ = run(config, MeshConfig(), 20, devices=1)
    together, _ = run(config, MeshConfig(**axes), 20)
    # Sums in another order: 20 steps of float32 rounding.
    np.testing.assert_allclose(together, alone, rtol=1e-5)


def test_micro_batches_equal_one_batch(tiny):
    whole, _ = run(make_config(tiny), MeshConfig(), 5, devices=1)
    for size in (1, 2, 4):
        parts, _ = run(make_config(tiny, micro_batch=size), MeshConfig(), 5, devices=1)
        np.testing.assert_allclose(parts, whole, rtol=2e-6)


@pytest.mark.parametrize(
    ("most", "devices", "wanted"),
    [(None, 1, (1, 60)), (8, 1, (10, 6)), (7, 8, (1, 0)), (8, 4, (3, 20))],
)
def test_devices_decide_the_micro_batch(tiny, most, devices, wanted):
    config = make_config(tiny, batch_tokens=60 * tiny.n_ctx, micro_batch=most)
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:devices])
    if 60 % devices:
        with pytest.raises(ConfigError, match=r"60 sequences.*multiple of .* = 8"):
            micro_batch(config, mesh)
    else:
        assert micro_batch(config, mesh) == wanted


def test_ignored_targets_weigh_nothing_across_micro_batches(tiny):
    """A step's loss is the mean over its counted tokens, wherever they stand."""
    config = make_config(tiny, micro_batch=4)
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    program = make_program(config, mesh)
    rng = np.random.default_rng(0)
    batch = rng.integers(0, tiny.n_vocab, (2, 4, tiny.n_ctx + 1), dtype=np.int32)
    batch[1, 1:, 1:] = -1  # the second micro-batch counts a quarter of the first
    _, metrics = program.train_step(program.start(), jnp.asarray(batch))
    params = program.start().params
    parts = [program.eval_step(params, jnp.asarray(micro)) for micro in batch]
    total, count = np.sum(np.array(jax.device_get(parts)), axis=0)
    assert count == 5 * tiny.n_ctx
    assert float(metrics.loss) == pytest.approx(total / count, rel=1e-6)


def test_a_step_that_is_not_finite_changes_no_bit_but_the_count(tiny):
    config = make_config(tiny)
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    program = make_program(config, mesh)
    batch = jnp.zeros((1, 8, tiny.n_ctx + 1), jnp.int32)
    state, _ = program.train_step(program.start(), batch)
    poisoned = dict(state.params, ln_f=dict(state.params["ln_f"]))
    poisoned["ln_f"]["scale"] = poisoned["ln_f"]["scale"].at[3].set(jnp.nan)
    state = state._replace(params=poisoned)
    before = jax.device_get(state)
    after, metrics = program.train_step(state, batch)
    assert not metrics.finite
    assert int(after.step) == int(before.step) + 1
    for old, new in zip(
        jax.tree.leaves(before[1:]), jax.tree.leaves(after[1:]), strict=True
    ):
        np.testing.assert_array_equal(old, new)


def test_the_step_compiles_once(tiny):
    """ecosystem trap: without out_shardings the second call compiles again."""
    config = make_config(tiny)
    mesh = sharding.make_mesh(MeshConfig(fsdp=4))
    program = make_program(config, mesh)
    state = program.start()
    batch = np.zeros((1, 8, tiny.n_ctx + 1), np.int32)
    for _ in range(3):
        global_batch = sharding.to_global(batch, program.batch_sharding)
        state, _ = program.train_step(state, global_batch)
    assert program.train_step._cache_size() == 1


def test_dropout_differs_by_step_and_repeats_by_seed(tiny):
    model = dataclasses.replace(tiny, embd_pdrop=0.2, attn_pdrop=0.2, resid_pdrop=0.2)
    config = make_config(model)
    first, params = run(config, MeshConfig(), 3, devices=1)
    again, same = run(config, MeshConfig(), 3, devices=1)
    assert first == again
    jax.tree.map(np.testing.assert_array_equal, params, same)
    other, _ = run(make_config(model, seed=1), MeshConfig(), 3, devices=1)
    assert first != other


def test_padding_rows_stay_zero_through_training(tiny):
    config = make_config(tiny)
    _, params = run(config, MeshConfig(), 3, devices=1)
    assert params["wte"]["embedding"].shape[0] == 64
    np.testing.assert_array_equal(params["wte"]["embedding"][61:], 0.0)
