"""Names and layout of Hugging Face's GPT-2, in both directions."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from gpt2_jax import model
from gpt2_jax.config import ConfigError, ModelConfig
from gpt2_jax.hf import config_from_hf, params_from_hf, params_to_hf

# config.json of openai-community/gpt2, without its task-specific parameters.
GPT2 = json.loads("""
{"activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"],
 "attn_pdrop": 0.1, "bos_token_id": 50256, "embd_pdrop": 0.1, "eos_token_id": 50256,
 "initializer_range": 0.02, "layer_norm_epsilon": 1e-05, "model_type": "gpt2",
 "n_ctx": 1024, "n_embd": 768, "n_head": 12, "n_layer": 12, "n_positions": 1024,
 "resid_pdrop": 0.1, "summary_activation": null, "summary_first_dropout": 0.1,
 "summary_proj_to_labels": true, "summary_type": "cls_index",
 "summary_use_proj": true, "vocab_size": 50257}
""")


@pytest.fixture
def untied(tiny) -> ModelConfig:
    return dataclasses.replace(tiny, tie_word_embeddings=False)


@pytest.fixture
def tensors(tiny) -> dict[str, np.ndarray]:
    return params_to_hf(tiny, random_params(tiny))


def random_params(config):
    """Return parameters of random numbers everywhere but in the padded rows."""
    shapes = jax.eval_shape(lambda: model.init(config, jax.random.key(0)))
    random = np.random.default_rng(0)

    def draw(path, leaf):
        values = random.standard_normal(leaf.shape, np.float32)
        if leaf.shape[0] == config.n_vocab_padded:
            values[config.n_vocab :] = 0
        return values

    return jax.tree.map_with_path(draw, shapes)


def test_config_of_gpt2_is_ours_with_its_dropout():
    dropout = dict(embd_pdrop=0.1, attn_pdrop=0.1, resid_pdrop=0.1)
    assert config_from_hf(GPT2) == ModelConfig(**dropout)


def test_absent_fields_have_transformers_defaults():
    assert config_from_hf({}) == config_from_hf(GPT2)


def test_every_option_is_carried_over():
    options = dict(
        n_embd=48, n_layer=5, n_head=3, n_inner=100, layer_norm_epsilon=1e-6,
        embd_pdrop=0.2, attn_pdrop=0.3, resid_pdrop=0.4, initializer_range=0.01,
        scale_attn_weights=False, scale_attn_by_inverse_layer_idx=True,
        reorder_and_upcast_attn=True, tie_word_embeddings=False,
    )  # fmt: skip
    config = config_from_hf(options | dict(vocab_size=99, n_positions=7))
    assert config == ModelConfig(**options, n_vocab=99, n_ctx=7)


def test_names_of_other_models_are_understood():
    values = dict(
        max_position_embeddings=7, hidden_size=48, num_hidden_layers=5,
        num_attention_heads=3,
    )  # fmt: skip
    config = config_from_hf(values)
    assert (config.n_ctx, config.n_embd, config.n_layer, config.n_head) == (7, 48, 5, 3)


@pytest.mark.parametrize(
    "theirs, ours",
    [
        ("gelu_new", "gelu_new"),
        ("gelu_pytorch_tanh", "gelu_new"),
        ("gelu_fast", "gelu_new"),
        ("gelu", "gelu"),
        ("gelu_python", "gelu"),
        ("relu", "relu"),
        ("silu", "silu"),
        ("swish", "silu"),
        ("tanh", "tanh"),
    ],
)
def test_activation_aliases(theirs, ours):
    config = config_from_hf({"activation_function": theirs})
    assert config.activation_function == ours


@pytest.mark.parametrize(
    "values, message",
    [
        ({"model_type": "llama"}, "model_type is 'llama'; allowed: 'gpt2'"),
        ({"add_cross_attention": True}, "add_cross_attention is True"),
        ({"activation_function": "quick_gelu"}, "activation_function is 'quick_gelu'"),
        ({"n_head": 5}, "model.n_head is 5"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(values, message):
    with pytest.raises(ConfigError, match=message):
        config_from_hf(GPT2 | values)


@pytest.mark.parametrize("head", ["tied", "untied"])
def test_round_trip_is_bitwise(head, tiny, untied):
    config = tiny if head == "tied" else untied
    params = random_params(config)
    back = params_from_hf(config, params_to_hf(config, params))
    assert jax.tree.structure(back) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, back, params)


def test_exported_shapes_are_those_of_gpt2(tiny, untied):
    tensors = params_to_hf(untied, random_params(untied))
    assert len(tensors) == 2 + 12 * tiny.n_layer + 2 + 1
    assert tensors["transformer.wte.weight"].shape == (61, 32)
    assert tensors["transformer.wpe.weight"].shape == (16, 32)
    assert tensors["transformer.h.2.attn.c_attn.weight"].shape == (32, 96)
    assert tensors["transformer.h.2.attn.c_attn.bias"].shape == (96,)
    assert tensors["transformer.h.0.mlp.c_fc.weight"].shape == (32, 128)
    assert tensors["transformer.h.0.mlp.c_proj.weight"].shape == (128, 32)
    assert tensors["lm_head.weight"].shape == (61, 32)
    assert all(tensor.flags.c_contiguous for tensor in tensors.values())


def test_tied_export_has_no_head(tensors):
    assert "lm_head.weight" not in tensors


def test_query_key_and_value_keep_their_order(tiny, tensors):
    kernel = params_from_hf(tiny, tensors)["blocks"]["attn"]["qkv"]["kernel"]
    fused = tensors["transformer.h.1.attn.c_attn.weight"]
    for i, part in enumerate(np.split(fused, 3, axis=1)):
        np.testing.assert_array_equal(kernel[1, :, i], part)


def test_padded_rows_are_zero(tiny, tensors):
    embedding = params_from_hf(tiny, tensors)["wte"]["embedding"]
    assert embedding.shape == (64, 32)
    assert not embedding[61:].any()


def test_names_without_prefix_saved_masks_and_equal_head_are_read(tiny, tensors):
    expected = params_from_hf(tiny, tensors)
    bare = {name.removeprefix("transformer."): t for name, t in tensors.items()}
    bare["h.0.attn.bias"] = np.ones((1, 1, 16, 16), bool)
    bare["h.0.attn.masked_bias"] = np.float32(-1e4)[None]
    bare["lm_head.weight"] = bare["wte.weight"].copy()
    jax.tree.map(np.testing.assert_array_equal, params_from_hf(tiny, bare), expected)


def test_half_precision_becomes_float32(tiny, tensors):
    halves = {name: tensor.astype(np.float16) for name, tensor in tensors.items()}
    for leaf in jax.tree.leaves(params_from_hf(tiny, halves)):
        assert leaf.dtype == np.float32


def test_every_fault_is_named_at_once(tiny, tensors):
    del tensors["transformer.h.1.ln_2.bias"]
    tensors["transformer.h.3.ln_1.bias"] = np.zeros(32, np.float32)
    tensors["transformer.wpe.weight"] = np.zeros((15, 32), np.float32)
    tensors["transformer.ln_f.bias"] = np.zeros(32, np.int8)
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"] + 1
    with pytest.raises(ConfigError) as refused:
        params_from_hf(tiny, tensors)
    for fault in (
        "transformer.h.1.ln_2.bias is missing",
        "transformer.h.3.ln_1.bias is unknown",
        "transformer.wpe.weight has shape (15, 32); allowed: (16, 32)",
        "transformer.ln_f.bias has dtype int8",
        "lm_head.weight differs from transformer.wte.weight",
    ):
        assert fault in str(refused.value)


def test_untied_model_needs_its_head(untied, tensors):
    with pytest.raises(ConfigError, match="lm_head.weight is missing"):
        params_from_hf(untied, tensors)
