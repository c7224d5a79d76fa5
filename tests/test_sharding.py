"""The mesh, the table, the rules that step in."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from gpt2_jax import model, sharding
from gpt2_jax.config import ConfigError, MeshConfig, ModelConfig, OptimizerConfig
from gpt2_jax.optimizer import make_optimizer


def shapes(config: ModelConfig):
    return jax.eval_shape(lambda: model.init(config, jax.random.key(0)))


def test_a_free_axis_takes_what_the_others_leave():
    mesh = sharding.make_mesh(MeshConfig(fsdp=2, tensor=2))
    assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    one = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    assert dict(one.shape) == {"data": 1, "fsdp": 1, "tensor": 1}


@pytest.mark.parametrize("axes", [dict(fsdp=3), dict(data=1, fsdp=4), dict(tensor=16)])
def test_a_mesh_that_is_not_the_devices_is_refused(axes):
    with pytest.raises(ConfigError, match=r"8 devices here; allowed: .*mesh.data -1"):
        sharding.make_mesh(MeshConfig(**axes))


def test_every_path_of_the_table_is_a_parameter_and_every_matrix_is_in_it():
    config = ModelConfig(tie_word_embeddings=False)
    paths = {
        "/".join(key.key for key in path): leaf
        for path, leaf in jax.tree.leaves_with_path(shapes(config))
    }
    assert set(sharding.TABLE) <= set(paths)
    for path, leaf in paths.items():
        if leaf.size > 10 * config.n_embd * config.n_layer:
            assert path in sharding.TABLE, f"{path} would be whole on every device"


@pytest.mark.parametrize("heads", [12, 16, 20, 25])
def test_what_does_not_divide_stays_whole_and_is_said(heads):
    config = ModelConfig(n_head=heads, n_embd=heads * 8, n_layer=2)
    mesh = sharding.make_mesh(MeshConfig(tensor=8))
    specs, notes = sharding.param_specs(shapes(config), config, mesh)
    qkv = specs["blocks"]["attn"]["qkv"]["kernel"]
    divides = heads % 8 == 0
    assert qkv == P(None, "fsdp", None, "tensor" if divides else None)
    assert any(f"does not divide {heads} heads" in note for note in notes) != divides
    assert specs["blocks"]["mlp"]["up"]["kernel"] == P(None, "fsdp", "tensor")


def test_moments_are_placed_like_their_parameters(tiny):
    mesh = sharding.make_mesh(MeshConfig(fsdp=4, tensor=2))
    params = shapes(tiny)
    for name in ("adamw", "muon"):
        rule = make_optimizer(OptimizerConfig(name=name), 10)
        state = jax.eval_shape(rule.init, params)
        placed = sharding.state_shardings(state, params, tiny, mesh)
        whole = [
            leaf.size
            for leaf, where in zip(
                jax.tree.leaves(state), jax.tree.leaves(placed), strict=True
            )
            if where.is_fully_replicated
        ]
        # Biases and layer norms at most: nothing large is on every device.
        assert max(whole) <= tiny.n_layer * tiny.n_embd


def test_a_batch_is_parted_by_data_and_fsdp_and_read_back_whole():
    mesh = sharding.make_mesh(MeshConfig(fsdp=4))
    assert sharding.batch_parts(mesh) == 8
    rows = np.arange(16 * 3, dtype=np.int32).reshape(1, 16, 3)
    array = sharding.to_global(rows, sharding.batch_sharding(mesh, leading=1))
    assert {shard.data.shape for shard in array.addressable_shards} == {(1, 2, 3)}
    np.testing.assert_array_equal(array, rows)


def test_the_pin_keeps_the_residual_stream_parted_by_batch():
    mesh = sharding.make_mesh(MeshConfig(fsdp=2, tensor=2))
    pinned = jax.jit(lambda x: sharding.pin_residual(x, mesh))(jnp.ones((8, 2, 4)))
    assert pinned.sharding.spec == P(("data", "fsdp"))  # trailing None are dropped


@pytest.mark.parametrize(
    ("devices", "gib", "sequences", "wanted"),
    [
        (8, None, 64, (8, 1, 1)),  # unknown memory: copies
        (8, 16, 64, (8, 1, 1)),  # 124M's state is 1.9 GiB
        (8, 2, 64, (4, 2, 1)),  # half of 2 GiB holds half of it
        (8, 0.5, 64, (1, 8, 1)),
        (8, 0.01, 64, (1, 8, 1)),  # nothing suffices: the most parts
        (8, 16, 4, (4, 1, 2)),  # more devices than sequences: parts of matrices
        (1, 16, 64, (1, 1, 1)),
    ],
)
def test_a_mesh_is_chosen_from_model_memory_and_batch(devices, gib, sequences, wanted):
    memory = None if gib is None else int(gib * 2**30)
    mesh, reason = sharding.choose_mesh(ModelConfig(), devices, memory, sequences)
    assert (mesh.data, mesh.fsdp, mesh.tensor) == wanted
    assert "GiB of state" in reason


def test_1558m_on_v3_256_is_parted():
    large = ModelConfig(n_layer=48, n_head=25, n_embd=1600)
    mesh, _ = sharding.choose_mesh(large, 256, 16 * 2**30, 512)
    assert (mesh.data, mesh.fsdp, mesh.tensor) == (64, 4, 1)


def test_rows_of_a_process_are_those_its_devices_hold():
    mesh = sharding.make_mesh(MeshConfig(fsdp=2, tensor=2))
    where = sharding.batch_sharding(mesh, leading=1)
    assert sharding.local_rows(where, 8) == tuple(range(8))  # one process holds all
