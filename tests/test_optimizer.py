"""Schedules, decay masks, Muon on stacked blocks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt2_jax import model
from gpt2_jax.config import OptimizerConfig
from gpt2_jax.optimizer import decays, make_optimizer, make_schedule


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
def test_the_rate_warms_up_to_its_peak_and_ends_where_it_should(schedule):
    config = OptimizerConfig(
        schedule=schedule, warmup_steps=10, final_fraction=0.1, decay_fraction=0.5
    )
    rate = make_schedule(config, 2.0, 100)
    rises = [float(rate(step)) for step in range(11)]
    assert rises == sorted(rises) and 0 < rises[0] < 0.3
    assert rises[10] == pytest.approx(2.0)
    last = 2.0 if schedule == "constant" else 0.2
    assert float(rate(100)) == pytest.approx(last)
    falls = [float(rate(step)) for step in range(10, 101)]
    assert falls == sorted(falls, reverse=True)


def test_wsd_stays_at_the_peak_until_its_decay():
    config = OptimizerConfig(schedule="wsd", warmup_steps=10, decay_fraction=0.2)
    rate = make_schedule(config, 1.0, 100)
    assert [float(rate(step)) for step in (10, 50, 80)] == [1.0, 1.0, 1.0]
    assert float(rate(90)) == pytest.approx(0.55)


def test_warm_up_may_take_the_whole_run():
    rate = make_schedule(OptimizerConfig(warmup_steps=5), 1.0, 5)
    assert float(rate(4)) < 1.0


def test_only_matrices_and_embeddings_decay(tiny):
    params = model.init(tiny, jax.random.key(0))
    for path, decayed in jax.tree.leaves_with_path(decays(params)):
        is_matrix = path[-1].key in ("kernel", "embedding")
        assert decayed == is_matrix, path


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_weight_decay_moves_matrices_only(tiny, name):
    params = model.init(tiny, jax.random.key(0))
    params = jax.tree.map(lambda x: x + 0.5, params)
    zeros = jax.tree.map(jnp.zeros_like, params)
    rule = make_optimizer(OptimizerConfig(name=name, weight_decay=0.1), 10)
    updates, _ = rule.update(zeros, rule.init(params), params)
    for path, update in jax.tree.leaves_with_path(updates):
        moved = bool(jnp.any(update != 0))
        assert moved == (path[-1].key in ("kernel", "embedding")), path


def one_update(params, config):
    grads = jax.tree.map(
        lambda x: jax.random.normal(jax.random.key(x.size), x.shape), params
    )
    rule = make_optimizer(config, 10)
    return rule.update(grads, rule.init(params), params)[0], grads


def test_muon_orthogonalizes_each_layers_matrices_alone(tiny):
    """ecosystem trap: optax's default picks leaves of two axes, not stacked kernels."""
    params = model.init(tiny, jax.random.key(0))
    config = OptimizerConfig(name="muon", weight_decay=0.0, grad_clip=0.0)
    updates, _ = one_update(params, config)
    qkv = np.asarray(updates["blocks"]["attn"]["qkv"]["kernel"])
    matrices = [qkv[layer, :, part] for layer in range(3) for part in range(3)]
    for part in ("up", "down"):
        matrices += list(np.asarray(updates["blocks"]["mlp"][part]["kernel"]))
    for matrix in matrices:
        values = np.linalg.svd(matrix, compute_uv=False)
        # Newton-Schulz leaves singular values near 1, not at 1 (Jordan et al. 2024);
        # the smallest of a square random matrix are too near 0 to be lifted.
        assert np.quantile(values, 0.1) > 0.5 * values.max()


def test_muon_of_a_stack_equals_muon_of_its_layers(tiny):
    params = model.init(tiny, jax.random.key(0))["blocks"]["mlp"]
    config = OptimizerConfig(name="muon", weight_decay=0.0, grad_clip=0.0)
    stacked, grads = one_update(params, config)
    rule = make_optimizer(config, 10)
    for layer in range(3):
        alone = jax.tree.map(lambda x, i=layer: x[i : i + 1], params)
        part = jax.tree.map(lambda x, i=layer: x[i : i + 1], grads)
        update, _ = rule.update(part, rule.init(alone), alone)
        got = stacked["up"]["kernel"][layer]
        np.testing.assert_allclose(got, update["up"]["kernel"][0], atol=1e-7)


def test_embeddings_and_biases_get_adamw_under_muon(tiny):
    params = model.init(tiny, jax.random.key(0))
    both = dict(weight_decay=0.0, grad_clip=0.0, learning_rate=1e-3)
    muon, _ = one_update(params, OptimizerConfig(name="muon", **both))
    adamw, _ = one_update(params, OptimizerConfig(name="adamw", **both))
    for path, update in jax.tree.leaves_with_path(muon):
        other = _at(adamw, path)
        same = bool(jnp.allclose(update, other, rtol=1e-6, atol=0))
        assert same == (path[-1].key != "kernel"), path


def _at(tree, path):
    for key in path:
        tree = tree[key.key]
    return tree


def test_gradients_are_clipped_by_their_global_norm(tiny):
    params = {"kernel": jnp.ones((1, 4, 4))}
    rule = make_optimizer(OptimizerConfig(grad_clip=1.0, weight_decay=0.0), 10)
    small, _ = rule.update({"kernel": jnp.ones((1, 4, 4))}, rule.init(params), params)
    state = rule.init(params)
    large, _ = rule.update({"kernel": 1e6 * jnp.ones((1, 4, 4))}, state, params)
    np.testing.assert_allclose(small["kernel"], large["kernel"], rtol=1e-5)
