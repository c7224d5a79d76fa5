"""GPT-2 as a function: its size, what depends on what, and that XLA keeps it right."""

import dataclasses
import functools
import math
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
import pytest

from gpt2_jax import model
from gpt2_jax.config import ConfigError, MeshConfig, ModelConfig
from gpt2_jax.loss import IGNORED, chunked_loss
from gpt2_jax.sharding import make_mesh

SHAPES = {
    124_439_808: dict(n_embd=768, n_layer=12, n_head=12),
    354_823_168: dict(n_embd=1024, n_layer=24, n_head=16),
    774_030_080: dict(n_embd=1280, n_layer=36, n_head=20),
    1_557_611_200: dict(n_embd=1600, n_layer=48, n_head=25),
}
# Rounding of float32 in another order of sums, for logits and gradients of size 1.
CLOSE = dict(rtol=1e-5, atol=1e-5)


def random_params(config: ModelConfig) -> model.Params:
    """Return parameters wide enough that every part of the model matters."""
    shapes = jax.eval_shape(lambda: model.init(config, jax.random.key(0)))
    random = np.random.default_rng(0)

    def draw(path, leaf):
        values = 0.2 * random.standard_normal(leaf.shape, np.float32)
        return jnp.asarray(values + ("scale" in jax.tree_util.keystr(path)))

    return jax.tree.map_with_path(draw, shapes)


def random_tokens(config: ModelConfig, batch: int = 2) -> jax.Array:
    shape = (batch, config.n_ctx)
    return jax.random.randint(jax.random.key(1), shape, 0, config.n_vocab)


def apply_compiled(config: ModelConfig, params, tokens, key=None) -> jax.Array:
    """Return logits, compiled."""
    run = jax.jit(functools.partial(model.apply, config))
    return run(params, tokens, key=key)


def loss_and_gradients(config: ModelConfig, params: model.Params, chunk: int = 0):
    tokens = random_tokens(config)
    targets = jnp.roll(tokens, -1, axis=1).at[:, -1].set(IGNORED)

    def mean_loss(params):
        hidden = model.hidden_states(config, params, tokens)
        head = model.output_matrix(params)
        total, count = chunked_loss(
            hidden, head, targets, n_vocab=config.n_vocab, chunk=chunk
        )
        return total / count

    return jax.jit(jax.value_and_grad(mean_loss))(params)


def assert_close(ours, theirs, **tolerance):
    compare = functools.partial(np.testing.assert_allclose, **(CLOSE | tolerance))
    jax.tree.map(compare, ours, theirs)


@pytest.mark.parametrize("n_params", SHAPES)
def test_parameter_counts_are_those_of_gpt2(n_params):
    config = ModelConfig(**SHAPES[n_params], vocab_multiple=1)
    shapes = jax.eval_shape(lambda: model.init(config, jax.random.key(0)))
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)) == n_params
    assert config.n_params == n_params


@pytest.mark.parametrize("tied", [True, False])
def test_n_params_counts_every_option(tiny, tied):
    options = dict(n_inner=20, tie_word_embeddings=tied, vocab_multiple=1)
    config = dataclasses.replace(tiny, **options)
    leaves = jax.tree.leaves(random_params(config))
    assert sum(leaf.size for leaf in leaves) == config.n_params


def test_initial_weights_follow_the_paper():
    config = ModelConfig(n_vocab=500, n_ctx=64, n_embd=128, n_layer=8, n_head=2)
    start = jax.jit(functools.partial(model.init, config))
    params = start(jax.random.key(0))
    block = params["blocks"]
    wte = params["wte"]["embedding"]
    assert not wte[500:].any()
    for matrix in (
        wte[:500],
        block["attn"]["qkv"]["kernel"],
        block["mlp"]["up"]["kernel"],
        4 * block["attn"]["out"]["kernel"],  # 1 / sqrt(2 * 8 layers)
        4 * block["mlp"]["down"]["kernel"],
    ):
        assert float(jnp.std(matrix)) == pytest.approx(0.02, rel=0.03)
    for leaf in (block["attn"]["qkv"]["bias"], block["ln_1"]["bias"]):
        assert not leaf.any()
    assert (block["ln_2"]["scale"] == 1).all()
    kernels = block["mlp"]["up"]["kernel"]
    assert (kernels[0] != kernels[1]).any()  # layers differ


def test_no_position_depends_on_a_later_one(tiny):
    params, tokens = random_params(tiny), random_tokens(tiny, batch=1)

    def summed_logits(positions):
        moved = {**params, "wpe": {"embedding": positions}}
        return model.apply(tiny, moved, tokens)[0].sum(axis=-1)

    jacobian = jax.jit(jax.jacrev(summed_logits))(params["wpe"]["embedding"])
    depends = np.asarray(jnp.abs(jacobian).max(axis=-1) > 0)
    np.testing.assert_array_equal(depends, np.tri(tiny.n_ctx, dtype=bool))


@pytest.mark.parametrize(
    "options, split",
    [
        ({}, [1] * 16),
        ({"scale_attn_by_inverse_layer_idx": True}, [5, 1, 10]),
        ({"scale_attn_weights": False, "tie_word_embeddings": False}, [16]),
        ({"reorder_and_upcast_attn": True, "n_inner": 20}, [3, 13]),
    ],
    ids=str,
)
def test_cached_logits_are_the_uncached(tiny, options, split):
    config = dataclasses.replace(tiny, **options)
    params, tokens = random_params(config), random_tokens(config)
    unstacked = model.unstack(config, params)
    step = jax.jit(functools.partial(model.decode, config))
    cache = model.init_cache(config, 2, config.n_ctx)
    start, logits = 0, []
    for length in split:
        positions = jnp.tile(jnp.arange(start, start + length), (2, 1))
        part = tokens[:, start : start + length]
        hidden, cache = step(unstacked, part, positions, cache)
        logits.append(model.project(config, unstacked, hidden))
        start += length
    ours = jnp.concatenate(logits, axis=1)[..., : config.n_vocab]
    assert_close(ours, apply_compiled(config, params, tokens))


def test_rows_of_different_lengths_share_a_cache(tiny):
    params, tokens = random_params(tiny), random_tokens(tiny)
    unstacked = model.unstack(tiny, params)
    expected = apply_compiled(tiny, params, tokens)
    lengths = jnp.array([5, 9])
    step = jax.jit(functools.partial(model.decode, tiny))
    # The shorter row is filled up with tokens that are not its own.
    positions = jnp.tile(jnp.arange(9), (2, 1))
    filled = jnp.where(positions < lengths[:, None], tokens[:, :9], 7)
    cache = model.init_cache(tiny, 2, tiny.n_ctx)
    _, cache = step(unstacked, filled, positions, cache)
    for offset in range(7):
        at = (lengths + offset)[:, None]
        new = jnp.take_along_axis(tokens, at, axis=1)
        hidden, cache = step(unstacked, new, at, cache)
        ours = model.project(tiny, unstacked, hidden)[:, 0, : tiny.n_vocab]
        assert_close(ours, expected[jnp.arange(2), at[:, 0]])


def test_position_beyond_the_cache_is_not_written(tiny):
    unstacked = model.unstack(tiny, random_params(tiny))
    cache = model.init_cache(tiny, 1, 4)
    token = jnp.zeros((1, 1), jnp.int32)
    run = jax.jit(functools.partial(model.decode, tiny))
    _, written = run(unstacked, token, token + 4, cache)
    assert not any(slots.any() for slots in jax.tree.leaves(written))


@pytest.mark.parametrize("rate", ["embd_pdrop", "attn_pdrop", "resid_pdrop"])
def test_dropout_is_decided_by_the_key(tiny, rate):
    config = dataclasses.replace(tiny, **{rate: 0.3})
    params, tokens = random_params(config), random_tokens(config)
    apply = functools.partial(model.apply, config, params, tokens)
    run = jax.jit(lambda key: apply(key=key))
    one = run(jax.random.key(1))
    np.testing.assert_array_equal(one, run(jax.random.key(1)))
    assert (jnp.abs(one - run(jax.random.key(2))) > 1e-3).any()
    exact = apply_compiled(tiny, params, tokens)
    np.testing.assert_array_equal(apply_compiled(config, params, tokens), exact)
    assert (jnp.abs(one - exact) > 1e-3).any()


def test_layers_drop_different_units(tiny):
    """Make all layers alike and linear: their dropout alone tells them apart."""
    config = dataclasses.replace(tiny, resid_pdrop=0.5, n_layer=2)
    params = jax.tree.map(jnp.zeros_like, random_params(config))
    params["blocks"]["mlp"]["down"]["bias"] += 1.0
    params["ln_f"]["scale"] += 1.0
    tokens = random_tokens(config)
    run = functools.partial(model.hidden_states, config, key=jax.random.key(0))
    hidden = jax.jit(run)(params, tokens)
    # Each unit is the sum of two coins; one coin used twice never gives the middle.
    assert len(np.unique(np.round(np.asarray(hidden[0, 0]), 3))) == 3


def test_padding_changes_no_logits_and_gets_no_gradient(tiny):
    padded = dataclasses.replace(tiny, vocab_multiple=64, n_vocab=50)
    exact = dataclasses.replace(padded, vocab_multiple=1)
    params, tokens = random_params(padded), random_tokens(padded)
    cut = {**params, "wte": {"embedding": params["wte"]["embedding"][:50]}}
    logits = apply_compiled(padded, params, tokens)
    assert logits.shape[-1] == 50
    assert_close(logits, apply_compiled(exact, cut, tokens))
    loss, gradients = loss_and_gradients(padded, params)
    assert not gradients["wte"]["embedding"][50:].any()
    gradients["wte"]["embedding"] = gradients["wte"]["embedding"][:50]
    assert_close((loss, gradients), loss_and_gradients(exact, cut))


def test_padded_logits_have_no_probability(tiny):
    hidden = jax.random.normal(jax.random.key(0), (2, 3, tiny.n_embd))
    logits = model.project(tiny, random_params(tiny), hidden)
    assert logits.shape[-1] == tiny.n_vocab_padded
    np.testing.assert_array_equal(jax.nn.softmax(logits)[..., tiny.n_vocab :], 0)


def test_untied_head_is_used_and_trained(tiny):
    config = dataclasses.replace(tiny, tie_word_embeddings=False)
    params, tokens = random_params(config), random_tokens(config)
    doubled = {**params, "lm_head": 2 * params["lm_head"]}
    once, twice = (apply_compiled(config, p, tokens) for p in (params, doubled))
    assert_close(twice, 2 * once)
    _, gradients = loss_and_gradients(config, params)
    assert gradients["lm_head"][: config.n_vocab].any()
    assert gradients["wte"]["embedding"].any()


def test_sequence_beyond_the_context_is_refused(tiny):
    tokens = jnp.zeros((1, 17), jnp.int32)
    with pytest.raises(ConfigError, match="sequence length is 17; allowed: <= 16"):
        model.apply(tiny, random_params(tiny), tokens)


def test_with_a_mesh_the_residual_stream_is_parted_by_batch(tiny):
    mesh = make_mesh(MeshConfig(data=4, tensor=2))
    params, tokens = random_params(tiny), jnp.zeros((8, tiny.n_ctx), jnp.int32)
    run = functools.partial(model.hidden_states, tiny, params, mesh=mesh)
    assert str(jax.make_jaxpr(run)(tokens)).count("sharding_constraint") == 1
    assert jax.jit(run)(tokens).sharding.spec[0] == "data"


@pytest.mark.parametrize("remat", ["none", "dots", "block"])
def test_flash_gives_the_loss_and_gradients_of_xla(tiny, remat):
    params, tokens = random_params(tiny), random_tokens(tiny)

    def found(attention):
        config = dataclasses.replace(tiny, attention=attention, remat=remat)

        def total(params):
            return jnp.sum(model.hidden_states(config, params, tokens) ** 2)

        return jax.jit(jax.value_and_grad(total))(params)

    for ours, theirs in zip(
        *map(jax.tree.leaves, map(found, ("flash", "xla"))), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


def test_bfloat16_is_close_to_float32(tiny):
    half = dataclasses.replace(tiny, dtype="bfloat16")
    params, tokens = random_params(tiny), random_tokens(tiny)
    hidden = jax.eval_shape(lambda: model.hidden_states(half, params, tokens))
    assert hidden.dtype == jnp.bfloat16
    ours, exact = (apply_compiled(c, params, tokens) for c in (half, tiny))
    assert ours.dtype == jnp.float32
    # 8 bits of mantissa, three layers: 2 % of the spread of the logits.
    assert float(jnp.std(ours - exact)) < 0.02 * float(jnp.std(exact))


def test_one_cpu_device_trains_in_bfloat16():
    """XLA:CPU of jax 0.10.2 has no kernel for weight gradients as JAX writes them."""
    program = """if True:
        import jax, jax.numpy as jnp
        from gpt2_jax import model
        from gpt2_jax.config import ModelConfig

        def gradient(dtype):
            shape = ModelConfig(n_ctx=64, n_embd=64, n_layer=2, n_head=1, dtype=dtype)
            params = model.init(shape, jax.random.key(0))
            tokens = jnp.arange(64)[None]
            def total(params):
                return jnp.mean(model.hidden_states(shape, params, tokens) ** 3)
            leaves = jax.tree.leaves(jax.jit(jax.grad(total))(params)["blocks"])
            return jnp.concatenate([leaf.ravel() for leaf in leaves])

        exact = gradient("float32")
        apart = jnp.linalg.norm(gradient("bfloat16") - exact)
        print(apart / jnp.linalg.norm(exact))
    """
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"XLA_FLAGS": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert 0 < float(done.stdout) < 0.03  # bfloat16 keeps 8 bits


def states_and_maps(config, params, tokens):
    def run(params, tokens):
        states = model.hidden_states_by_layer(config, params, tokens)
        return states, model.attention_maps(config, params, states)

    return jax.jit(run)(params, tokens)


def test_states_of_all_layers_begin_and_end_as_the_model_does(tiny):
    params, tokens = random_params(tiny), random_tokens(tiny)
    states, _ = states_and_maps(tiny, params, tokens)
    assert states.shape == (tiny.n_layer + 1, 2, tiny.n_ctx, tiny.n_embd)
    embedded = params["wte"]["embedding"][tokens] + params["wpe"]["embedding"][None]
    assert_close(states[0], embedded)
    run = jax.jit(functools.partial(model.hidden_states, tiny))
    assert_close(states[-1], run(params, tokens))


def test_a_state_is_what_the_blocks_before_it_give(tiny):
    """Cut the model after each block: what is left ends in the same final norm."""
    params, tokens = random_params(tiny), random_tokens(tiny)
    states, _ = states_and_maps(tiny, params, tokens)
    for count in range(1, tiny.n_layer):
        config = dataclasses.replace(tiny, n_layer=count)
        blocks = jax.tree.map(lambda leaf, n=count: leaf[:n], params["blocks"])
        shorter = {**params, "blocks": blocks}
        cut, _ = states_and_maps(config, shorter, tokens)
        assert_close(cut[:-1], states[:count])
        last = model.layer_norm(states[count], **params["ln_f"], epsilon=1e-5)
        assert_close(cut[-1], last)


OPTIONS = [
    {},
    {"scale_attn_weights": False},
    {"scale_attn_by_inverse_layer_idx": True},
    {"reorder_and_upcast_attn": True},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_maps_are_the_softmax_that_the_options_ask_for(tiny, options):
    config = dataclasses.replace(tiny, **options)
    params, tokens = random_params(config), random_tokens(config)
    states, maps = states_and_maps(config, params, tokens)
    layers, heads, length = tiny.n_layer, tiny.n_head, tiny.n_ctx
    assert (maps.shape, maps.dtype) == ((layers, 2, heads, length, length), jnp.float32)
    np.testing.assert_array_equal(maps, jnp.tril(maps))
    assert_close(maps.sum(axis=-1), jnp.ones(maps.shape[:-1]))
    for layer in range(layers):
        block = jax.tree.map(lambda leaf, i=layer: leaf[i], params["blocks"])
        x = model.layer_norm(states[layer], **block["ln_1"], epsilon=1e-5)
        kernel, bias = block["attn"]["qkv"]["kernel"], block["attn"]["qkv"]["bias"]
        q, k = (
            (x @ kernel[:, i] + bias[i][None, None]).reshape(2, length, heads, -1)
            for i in range(2)
        )
        scale = tiny.head_width**-0.5 if config.scale_attn_weights else 1.0
        if config.scale_attn_by_inverse_layer_idx:
            scale /= layer + 1
        scores = scale * jnp.einsum("btnh,bsnh->bnts", q, k)
        seen = np.tri(length, dtype=bool)[None, None]
        plain = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf))
        assert_close(maps[layer], plain)


def test_maps_of_half_precision_are_finer_with_upcast(tiny):
    params, tokens = random_params(tiny), random_tokens(tiny)
    _, exact = states_and_maps(tiny, params, tokens)

    def error(upcast):
        config = dataclasses.replace(
            tiny, dtype="bfloat16", reorder_and_upcast_attn=upcast
        )
        states, maps = states_and_maps(config, params, tokens)
        assert (states.dtype, maps.dtype) == (jnp.bfloat16, jnp.float32)
        return float(jnp.abs(maps[0] - exact[0]).mean())  # before errors add up

    assert error(upcast=True) < error(upcast=False)


def test_states_beyond_the_context_are_refused(tiny):
    tokens = jnp.zeros((1, 17), jnp.int32)
    with pytest.raises(ConfigError, match="sequence length is 17; allowed: <= 16"):
        model.hidden_states_by_layer(tiny, random_params(tiny), tokens)


def test_gelu_tanh_has_the_values_and_slope_of_jax():
    x = jnp.linspace(-6, 6, 1001)
    reference = functools.partial(jax.nn.gelu, approximate=True)
    assert_close(model.gelu_tanh(x), reference(x), rtol=1e-6, atol=1e-6)
    ours, theirs = (jax.vmap(jax.grad(f))(x) for f in (model.gelu_tanh, reference))
    assert_close(ours, theirs, atol=4e-6)  # 1 + tanh(x) cancels below -4


@functools.cache
def eager_gradients(config):
    with jax.disable_jit():
        return loss_and_gradients(config, random_params(config), chunk=16)


@pytest.mark.parametrize(
    "options, chunk",
    [
        ({}, 16),
        ({"unroll": 2}, 4),
        ({"remat": "dots"}, 0),
        ({"remat": "block", "unroll": 3}, 0),
    ],
    ids=str,
)
def test_every_way_to_compile_gives_the_eager_loss_and_gradients(tiny, options, chunk):
    """XLA:CPU has compiled wrong gradients before (jaxlib 0.11.2, batched dots)."""
    config = dataclasses.replace(tiny, **options)
    compiled = loss_and_gradients(config, random_params(config), chunk)
    assert_close(compiled, eager_gradients(tiny))


@pytest.mark.parametrize(("remat", "again"), [("dots", 0), ("block", 5)])
def test_remat_multiplies_again_what_it_says(tiny, remat, again):
    """Of a block's four linear layers all but the last; attention's two products."""

    def products(remat: str) -> int:
        config = dataclasses.replace(tiny, remat=remat)
        params, tokens = random_params(config), random_tokens(config)

        def total(params):
            return jnp.sum(model.hidden_states(config, params, tokens))

        return str(jax.make_jaxpr(jax.grad(total))(params)).count("dot_general")

    assert products(remat) == products("none") + again


ROWS = 32_769  # where jaxlib 0.10.2 goes wrong; GPT-2's vocabulary is larger


def test_loss_is_right_where_xla_cpu_miscompiles():
    """Check the shapes of jax#39103: many rows times a narrow matrix."""
    random = np.random.default_rng(0)
    hidden = random.standard_normal((1, 8, 3), np.float32)
    head = random.standard_normal((ROWS, 3), np.float32)
    targets = np.arange(ROWS - 8, ROWS)[None]
    run = jax.jit(functools.partial(chunked_loss, n_vocab=ROWS, chunk=4))
    ours, _ = run(hidden, head, jnp.asarray(targets, jnp.int32))
    logits = hidden[0].astype(np.float64) @ head.T.astype(np.float64)
    exact = np.log(np.exp(logits).sum(-1)) - logits[np.arange(8), targets[0]]
    np.testing.assert_allclose(ours, exact.sum(), rtol=1e-5)


def test_model_is_right_where_xla_cpu_miscompiles():
    """Check that the last of many rows come out as they do in a small batch."""
    config = ModelConfig(
        n_vocab=16, n_ctx=8, n_embd=4, n_layer=1, n_head=2, dtype="float32"
    )
    params = random_params(config)
    tokens = random_tokens(config, batch=ROWS // config.n_ctx + 1)
    run = jax.jit(functools.partial(model.apply, config))
    assert_close(run(params, tokens)[-4:], run(params, tokens[-4:]))


def test_xla_cpu_canary():
    """Say in the summary when this jaxlib has jax#39103; it is right elsewhere."""
    x = jnp.zeros((ROWS, 3)).at[:, 0].set(jnp.arange(ROWS, dtype=jnp.float32))
    squares = jax.jit(jax.vmap(lambda row: jnp.sum((jnp.eye(3) @ row) ** 2)))
    compiled, exact = float(squares(x)[-1]), float((ROWS - 1) ** 2)
    if compiled != exact:
        version = jaxlib.__version__
        pytest.xfail(f"jaxlib {version} has jax#39103: {compiled} is not {exact}")
