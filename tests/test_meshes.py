"""One run on 1, 2, 4 or 8 devices: the same losses, no large copies, any checkpoint.

Every shape of GPT-2 stands for itself by its number of heads: 12, 16, 20 and 25. 16
divides by 8 devices and 20 as 12 does: these two are not tried on every mesh.
"""

import functools
import math

import jax
import numpy as np
import pytest

from gpt2_jax import hlo, model, sharding
from gpt2_jax.checkpoint import Checkpoints
from gpt2_jax.config import (
    Config,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
)
from gpt2_jax.optimizer import make_optimizer
from gpt2_jax.step import TrainState, make_program, micro_batch

HEADS = [12, 16, 20, 25]
MESHES = [
    (2, 1, 1), (1, 2, 1), (1, 1, 2),
    (2, 2, 1), (2, 1, 2), (1, 2, 2),
    (8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 4, 1), (2, 2, 2),
]  # fmt: skip
RUNS = [(axes, heads) for heads in (12, 25) for axes in MESHES]
RUNS += [(axes, heads) for heads in (16, 20) for axes in ((1, 1, 8), (2, 2, 2))]
STEPS = 20


def make_config(heads: int, **changes) -> Config:
    shape = dict(n_vocab=125, n_ctx=8, n_embd=4 * heads, n_layer=2, n_head=heads)
    return Config(
        model=ModelConfig(**shape | dict(remat="block") | changes),
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=2),
        train=TrainConfig(steps=STEPS, batch_tokens=16 * 8, micro_batch=1),
    )


def make_mesh(axes: tuple[int, int, int]):
    data, fsdp, tensor = axes
    devices = jax.devices()[: math.prod(axes)]
    return sharding.make_mesh(MeshConfig(data=data, fsdp=fsdp, tensor=tensor), devices)


def train(config: Config, axes: tuple[int, int, int]) -> list[float]:
    """Return the losses of 20 steps on the same 16 sequences each."""
    mesh = make_mesh(axes)
    program = make_program(config, mesh)
    state, losses = program.start(), []
    accumulation, sequences = micro_batch(config, mesh)
    assert accumulation == 16 // (axes[0] * axes[1])
    for step in range(STEPS):
        rng = np.random.default_rng(step)
        rows = rng.integers(0, config.model.n_vocab, (16, config.model.n_ctx + 1))
        batch = rows.astype(np.int32).reshape(accumulation, sequences, -1)
        batch = sharding.to_global(batch, program.batch_sharding)
        state, metrics = program.train_step(state, batch)
        losses.append(float(metrics.loss))
    return losses


@functools.cache
def alone(heads: int) -> list[float]:
    return train(make_config(heads), (1, 1, 1))


@pytest.mark.parametrize("axes, heads", RUNS, ids=str)
def test_losses_are_those_of_one_device(axes, heads):
    np.testing.assert_allclose(train(make_config(heads), axes), alone(heads), rtol=1e-5)


@pytest.mark.parametrize("axes", [(8, 1, 1), (2, 2, 2)], ids=str)
def test_losses_of_flash_are_those_of_one_device(axes):
    config = make_config(12, attention="flash", remat="dots")
    np.testing.assert_allclose(train(config, axes), alone(12), rtol=1e-5)


@pytest.mark.parametrize("axes", [(8, 1, 1), (2, 2, 2)], ids=str)
def test_losses_in_bfloat16_are_close_to_those_of_float32(axes):
    config = make_config(12, dtype="bfloat16", remat="none")
    np.testing.assert_allclose(train(config, axes), alone(12), rtol=2e-3)


def compiled(model: ModelConfig, axes: tuple[int, int, int], **train) -> str:
    """Return the compiled text of one step of a batch at once."""
    train = TrainConfig(**train)
    program = make_program(Config(model=model, train=train), make_mesh(axes))
    window = (1, train.batch_tokens // model.n_ctx, model.n_ctx + 1)
    tokens = jax.ShapeDtypeStruct(window, np.int32, sharding=program.batch_sharding)
    return program.train_step.lower(program.abstract_state, tokens).compile().as_text()


def collectives(text: str) -> list[tuple]:
    """Return the shape of every array that a collective takes or gives."""
    computations, _ = hlo.parse_program(text)
    return [
        tuple(int(n) for n in lengths.split(",") if n)
        for instructions in computations.values()
        for found in instructions.values()
        if found.opcode.removesuffix("-start") in hlo.KINDS
        for _, _, lengths in hlo.ARRAY.findall(found.type)
    ]


@pytest.mark.parametrize("remat", ["none", "block"])
@pytest.mark.parametrize("axes", [m for m in MESHES if math.prod(m) == 8], ids=str)
def test_no_collective_carries_the_activations_of_a_whole_batch(axes, remat):
    """Activations are made the largest arrays by far: 256 sequences of 64, width 16."""
    batch, length, width = 256, 64, 16
    shape = ModelConfig(
        n_vocab=125, n_ctx=length, n_embd=width, n_layer=2, n_head=2, remat=remat
    )
    params = jax.eval_shape(lambda: model.init(shape, jax.random.key(0)))
    largest = max(leaf.size for leaf in jax.tree.leaves(params))
    local = batch // (axes[0] * axes[1]) * length * 4 * width
    text = compiled(shape, axes, batch_tokens=batch * length, loss_chunk=32)
    found = collectives(text)
    assert found, "8 devices that exchange nothing"
    for lengths in found:
        # Tensor parallelism adds up a device's own activations; nothing else may.
        allowed = max(largest, local) if axes[2] > 1 else largest
        assert math.prod(lengths) <= allowed, lengths


def held(tree) -> int:
    """Return the bytes that the first device holds."""
    return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("axes", [(1, 8, 1), (2, 4, 1), (1, 4, 2)], ids=str)
def test_a_device_holds_its_share_and_small_arrays(heads, axes):
    config = make_config(heads, n_embd=8 * heads, n_vocab=1000)
    state = make_program(config, make_mesh(axes)).start()
    parts = math.prod(axes[1:])
    width, layers = config.model.n_embd, config.model.n_layer
    # Whole on every device: norms and biases; 25 heads do not halve, so attention is
    # in fsdp's parts alone.
    small = 4 * (13 * layers + 2) * width
    attention = 16 * layers * width**2 if heads % axes[2] else 0
    for tree, copies in ((state.params, 1), (state.opt_state, 2)):
        whole = sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
        most = whole / parts + copies * (small + attention / axes[1])
        assert held(tree) <= most + 100  # counters
        assert held(tree) >= whole / parts


@pytest.mark.parametrize(
    ("shape", "tensor", "most"),
    [
        (dict(n_layer=12, n_head=12, n_embd=768), 8, 0.35),  # 12 over 8: see below
        (dict(n_layer=24, n_head=16, n_embd=1024), 8, 0.13),
        (dict(n_layer=36, n_head=20, n_embd=1280), 4, 0.26),
        (dict(n_layer=48, n_head=25, n_embd=1600), 8, 0.43),
        (dict(n_layer=48, n_head=25, n_embd=1600), 1, 0.13),  # fsdp 8
    ],
)
def test_the_shares_of_full_sizes(shape, tensor, most):
    """Where heads do not divide, attention, a third of a block, is whole."""
    config = ModelConfig(**shape)
    rule = make_optimizer(OptimizerConfig(), 10)

    def start() -> TrainState:
        params = model.init(config, jax.random.key(0))
        return TrainState(np.zeros((), np.int32), params, rule.init(params))

    state = jax.eval_shape(start)
    mesh = make_mesh((1, 8 // tensor if tensor == 1 else 1, tensor))
    placed = sharding.state_shardings(state, state.params, config, mesh)
    leaves = zip(jax.tree.leaves(state), jax.tree.leaves(placed), strict=True)
    mine = [(math.prod(p.shard_shape(x.shape)), x.size) for x, p in leaves]
    assert sum(part for part, _ in mine) / sum(size for _, size in mine) < most


@pytest.mark.parametrize("old", [(1, 1, 1), *MESHES], ids=str)
def test_checkpoints_move_to_any_other_mesh_to_the_bit(tmp_path, old):
    config = make_config(12)
    state = make_program(config, make_mesh(old)).start()
    with Checkpoints(tmp_path, interval=1, keep=1, keep_every=0) as checkpoints:
        checkpoints.save(1, state.params, state.opt_state, {})
        checkpoints.finish()
        for new in [(1, 1, 1), *MESHES]:
            target = make_program(config, make_mesh(new)).abstract_state[1:]
            found = checkpoints.restore(1, *target)
            for ours, theirs, place in zip(
                jax.tree.leaves((found.params, found.opt_state)),
                jax.tree.leaves(state[1:]),
                jax.tree.leaves(target),
                strict=True,
            ):
                np.testing.assert_array_equal(ours, theirs)
                assert ours.sharding == place.sharding
