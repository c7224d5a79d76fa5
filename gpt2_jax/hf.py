"""Hugging Face layout to ours and back: one table of parameter names.

Conv1D holds its kernels as (in, out), as we do, so that nothing is transposed: layers
are stacked, the fused query, key and value axis 3D is split into (3, D), and `wte` is
padded. Axes: T positions, D width, F feed-forward width, V vocabulary, L layer.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from gpt2_jax.config import ConfigError, ModelConfig, check
from gpt2_jax.model import Params

# Our path, their name ({} is the layer), their shape.
TABLE = (
    ("wte/embedding", "transformer.wte.weight", "V D"),
    ("wpe/embedding", "transformer.wpe.weight", "T D"),
    ("blocks/ln_1/scale", "transformer.h.{}.ln_1.weight", "D"),
    ("blocks/ln_1/bias", "transformer.h.{}.ln_1.bias", "D"),
    ("blocks/attn/qkv/kernel", "transformer.h.{}.attn.c_attn.weight", "D 3D"),
    ("blocks/attn/qkv/bias", "transformer.h.{}.attn.c_attn.bias", "3D"),
    ("blocks/attn/out/kernel", "transformer.h.{}.attn.c_proj.weight", "D D"),
    ("blocks/attn/out/bias", "transformer.h.{}.attn.c_proj.bias", "D"),
    ("blocks/ln_2/scale", "transformer.h.{}.ln_2.weight", "D"),
    ("blocks/ln_2/bias", "transformer.h.{}.ln_2.bias", "D"),
    ("blocks/mlp/up/kernel", "transformer.h.{}.mlp.c_fc.weight", "D F"),
    ("blocks/mlp/up/bias", "transformer.h.{}.mlp.c_fc.bias", "F"),
    ("blocks/mlp/down/kernel", "transformer.h.{}.mlp.c_proj.weight", "F D"),
    ("blocks/mlp/down/bias", "transformer.h.{}.mlp.c_proj.bias", "D"),
    ("ln_f/scale", "transformer.ln_f.weight", "D"),
    ("ln_f/bias", "transformer.ln_f.bias", "D"),
    ("lm_head", "lm_head.weight", "V D"),
)
PREFIX = "transformer."
HEAD = "lm_head.weight"
WTE = "transformer.wte.weight"
# Causal masks that older versions of transformers saved beside the parameters.
BUFFER = re.compile(r"transformer\.h\.\d+\.attn\.(masked_)?bias")

# Their field -> ours and the value where config.json is silent, which is not always
# ours (transformers configuration_gpt2.py).
FIELDS = {
    "vocab_size": ("n_vocab", 50_257),
    "n_positions": ("n_ctx", 1024),
    "n_embd": ("n_embd", 768),
    "n_layer": ("n_layer", 12),
    "n_head": ("n_head", 12),
    "n_inner": ("n_inner", None),
    "activation_function": ("activation_function", "gelu_new"),
    "layer_norm_epsilon": ("layer_norm_epsilon", 1e-5),
    "embd_pdrop": ("embd_pdrop", 0.1),
    "attn_pdrop": ("attn_pdrop", 0.1),
    "resid_pdrop": ("resid_pdrop", 0.1),
    "initializer_range": ("initializer_range", 0.02),
    "scale_attn_weights": ("scale_attn_weights", True),
    "scale_attn_by_inverse_layer_idx": ("scale_attn_by_inverse_layer_idx", False),
    "reorder_and_upcast_attn": ("reorder_and_upcast_attn", False),
    "tie_word_embeddings": ("tie_word_embeddings", True),
}
# transformers' attribute_map: other names that config.json may use.
ALIASES = {
    "max_position_embeddings": "n_positions",
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
}
ACTIVATIONS = {
    "gelu_new": "gelu_new",
    "gelu_pytorch_tanh": "gelu_new",
    "gelu_python_tanh": "gelu_new",
    "gelu_fast": "gelu_new",
    "gelu_accurate": "gelu_new",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
    "tanh": "tanh",
}


def config_from_hf(values: Mapping[str, Any]) -> ModelConfig:
    """Return the `ModelConfig` of the contents of a GPT-2 `config.json`.

    Fields that change no number are passed over; absent ones have transformers'
    defaults, dropout of 0.1 among them.

    Raises
    ------
    ConfigError
        If the model is not GPT-2, or uses what this project does not compute.
    """
    kind = values.get("model_type", "gpt2")
    check(kind == "gpt2", "model_type", kind, "'gpt2'")
    crossed = values.get("add_cross_attention", False)
    check(not crossed, "add_cross_attention", crossed, "false")
    values = {ALIASES.get(name, name): value for name, value in values.items()}
    fields = {
        ours: values.get(theirs, default) for theirs, (ours, default) in FIELDS.items()
    }
    name = fields["activation_function"]
    check(name in ACTIVATIONS, "activation_function", name, ", ".join(ACTIVATIONS))
    return ModelConfig(**{**fields, "activation_function": ACTIVATIONS[name]})


def params_from_hf(config: ModelConfig, tensors: Mapping[str, np.ndarray]) -> Params:
    """Return float32 parameters on the host from tensors under Hugging Face names.

    Names may lack `transformer.`; saved masks are passed over, and so is `lm_head`
    where the head is tied and it equals `wte`.

    Raises
    ------
    ConfigError
        If tensors are missing, unknown or of another shape; it names all of them.
    """
    found = {_full_name(name): tensor for name, tensor in tensors.items()}
    found = {k: v for k, v in found.items() if not BUFFER.fullmatch(k)}
    _check_tensors(config, found)
    params: Params = {}
    for path, name, shape in _rows(config):
        ours = _sizes(config, shape.replace("3D", "3 D"))
        layers = [
            np.asarray(found[n], np.float32).reshape(ours) for n in _names(config, name)
        ]
        leaf = np.stack(layers) if "{}" in name else layers[0]
        _put(params, path, _pad(config, leaf) if shape == "V D" else leaf)
    return params


def params_to_hf(config: ModelConfig, params: Params) -> dict[str, np.ndarray]:
    """Return C-contiguous tensors under Hugging Face names, without padded rows."""
    tensors: dict[str, np.ndarray] = {}
    for path, name, shape in _rows(config):
        leaf = np.asarray(_get(params, path))
        layers = list(leaf) if "{}" in name else [leaf[: _sizes(config, shape)[0]]]
        for full, layer in zip(_names(config, name), layers, strict=True):
            # safetensors 0.8.0 writes other layouts wrong (safetensors#825).
            tensors[full] = np.ascontiguousarray(layer).reshape(_sizes(config, shape))
    return tensors


def _full_name(name: str) -> str:
    return name if name == HEAD or name.startswith(PREFIX) else PREFIX + name


def _rows(config: ModelConfig) -> Iterator[tuple[str, str, str]]:
    return (row for row in TABLE if row[1] != HEAD or not config.tie_word_embeddings)


def _names(config: ModelConfig, name: str) -> list[str]:
    layers = range(config.n_layer)
    return [name.format(i) for i in layers] if "{}" in name else [name]


def _sizes(config: ModelConfig, shape: str) -> tuple[int, ...]:
    width = config.n_embd
    sizes = {"T": config.n_ctx, "D": width, "F": config.inner_width}
    sizes |= {"V": config.n_vocab, "3": 3, "3D": 3 * width}
    return tuple(sizes[letter] for letter in shape.split())


def _check_tensors(config: ModelConfig, found: Mapping[str, np.ndarray]) -> None:
    expected = {
        full: _sizes(config, shape)
        for _, name, shape in _rows(config)
        for full in _names(config, name)
    }
    faults = [f"{name} is missing" for name in expected if name not in found]
    for name, tensor in found.items():
        if name in expected:
            faults += _find_faults(name, tensor, expected[name])
        elif name != HEAD:
            faults.append(f"{name} is unknown")
        elif WTE in found and not np.array_equal(tensor, found[WTE]):
            faults.append(f"{HEAD} differs from {WTE} though tie_word_embeddings is on")
    if faults:
        raise ConfigError(f"the tensors do not fit the config: {'; '.join(faults)}")


def _find_faults(name: str, tensor: np.ndarray, shape: tuple[int, ...]) -> list[str]:
    faults = []
    if tensor.shape != shape:
        faults.append(f"{name} has shape {tensor.shape}; allowed: {shape}")
    if not jnp.issubdtype(tensor.dtype, jnp.floating):
        faults.append(f"{name} has dtype {tensor.dtype}; allowed: floating point")
    return faults


def _pad(config: ModelConfig, rows: np.ndarray) -> np.ndarray:
    return np.pad(rows, ((0, config.n_vocab_padded - config.n_vocab), (0, 0)))


def _get(params: Params, path: str) -> Any:
    leaf = params
    for part in path.split("/"):
        leaf = leaf[part]
    return leaf


def _put(params: Params, path: str, leaf: np.ndarray) -> None:
    *parents, last = path.split("/")
    for part in parents:
        params = params.setdefault(part, {})
    params[last] = leaf
