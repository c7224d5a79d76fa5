"""Hugging Face layout to ours and back: one table of parameter names.

Conv1D holds its kernels as (in, out), as we do, so that nothing is transposed: layers
are stacked, the fused query, key and value axis 3D is split into (3, D), and `wte` is
padded. Axes: T positions, D width, F feed-forward width, V vocabulary, L layer.
"""

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from gpt2_jax.config import ConfigError, ModelConfig, check, join_faults
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
MISSING_NAMED = 8  # layers that are missing whole are named up to this many
ALIGNMENT = 64  # bytes; XLA:CPU's cpu_function_runtime.h, MinAlign
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
ARCHITECTURES = ("GPT2LMHeadModel", "GPT2Model")
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
    kinds = values.get("architectures") or []
    good = isinstance(kinds, list) and all(kind in ARCHITECTURES for kind in kinds)
    check(good, "architectures", kinds, f"a list of {' or '.join(ARCHITECTURES)}")
    packed = values.get("quantization_config")
    check(packed is None, "quantization_config", packed, "none: full precision only")
    values = {ALIASES.get(name, name): value for name, value in values.items()}
    fields = {
        ours: values.get(theirs, default) for theirs, (ours, default) in FIELDS.items()
    }
    name = fields["activation_function"]
    good = isinstance(name, str) and name in ACTIVATIONS
    check(good, "activation_function", name, ", ".join(ACTIVATIONS))
    return ModelConfig(**{**fields, "activation_function": ACTIVATIONS[name]})


def config_to_hf(
    config: ModelConfig, *, eot: int | None, dtype: str = "float32"
) -> dict[str, Any]:
    """Return the contents of the `config.json` that transformers reads as `config`."""
    fields = {theirs: getattr(config, ours) for theirs, (ours, _) in FIELDS.items()}
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        **fields,
        "n_ctx": config.n_ctx,  # as in OpenAI's four; some tools read it
        "bos_token_id": eot,
        "eos_token_id": eot,
        "dtype": dtype,
    }


def params_from_hf(config: ModelConfig, tensors: Mapping[str, Any]) -> Params:
    """Return float32 parameters on the host from tensors under Hugging Face names.

    Names may lack `transformer.`; saved masks are passed over, and so is `lm_head`
    where the head is tied and it equals `wte`. A tensor is anything with shape and
    dtype that `np.asarray` reads; they are read one at a time, so that little more
    than the parameters is held.

    Raises
    ------
    ConfigError
        If tensors are missing, unknown or of another shape; it names them.
    """
    found = _full_names(tensors)
    if config.tie_word_embeddings and WTE not in found and HEAD in found:
        found[WTE] = found.pop(HEAD)  # safetensors.torch.save_model keeps one
    _check_depth(config, found)
    _check_tensors(config, found)
    params: Params = {}
    for path, name, shape in _rows(config):
        ours = _sizes(config, shape.replace("3D", "3 D"))
        names = _names(config, name)
        if "{}" in name:
            leaf = _aligned((len(names), *ours))
            for layer, full in zip(leaf, names, strict=True):
                _fill(layer, full, found)
        elif shape == "V D":
            leaf = _aligned((config.n_vocab_padded, config.n_embd))
            _fill(leaf[: config.n_vocab], name, found)
            leaf[config.n_vocab :] = 0
        else:
            leaf = _aligned(ours)
            _fill(leaf, name, found)
        _put(params, path, leaf)
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


def _full_names(tensors):
    found: dict[str, Any] = {}
    for name, tensor in tensors.items():
        full = name if name == HEAD or name.startswith(PREFIX) else PREFIX + name
        if full in found:
            raise ConfigError(
                f"{full} is there twice, with {PREFIX!r} and without; keep one of them"
            )
        if not BUFFER.fullmatch(full):
            found[full] = tensor
    return found


def _aligned(shape: tuple[int, ...]) -> np.ndarray:
    """Return new float32 memory that jax takes over on CPU without a copy."""
    size = math.prod(shape) * 4
    raw = np.empty(size + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + size].view(np.float32).reshape(shape)


def _fill(leaf: np.ndarray, name: str, found: Mapping[str, Any]) -> None:
    try:
        with np.errstate(over="raise"):
            leaf[...] = np.asarray(found[name]).reshape(leaf.shape)
    except FloatingPointError:
        beyond = f"{name} has numbers of {found[name].dtype} beyond float32"
        raise ConfigError(f"{beyond}; export the model again") from None


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


def _check_depth(config: ModelConfig, found: Mapping[str, Any]) -> None:
    """Refuse a config of many more layers than there are, before naming them all."""
    numbers = (re.match(r"transformer\.h\.(\d{1,6})\.", name) for name in found)
    layers = {int(number[1]) for number in numbers if number}
    if config.n_layer > len(layers) + MISSING_NAMED:
        raise ConfigError(
            f"the tensors are of {len(layers)} layers; config.json says n_layer "
            f"{config.n_layer}; use the config.json that belongs to the weights"
        )


def _same_bits(one: Any, other: Any) -> bool:
    one, other = np.asarray(one), np.asarray(other)
    alike = one.dtype == other.dtype and one.shape == other.shape
    return alike and one.tobytes() == other.tobytes()


def _check_tensors(config: ModelConfig, found: Mapping[str, Any]) -> None:
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
        elif WTE in found and not _same_bits(tensor, found[WTE]):
            faults.append(f"{HEAD} differs from {WTE} though tie_word_embeddings is on")
    if faults:
        raise ConfigError(f"the tensors do not fit the config: {join_faults(faults)}")


def _find_faults(name: str, tensor: Any, shape: tuple[int, ...]) -> list[str]:
    faults = []
    if tuple(tensor.shape) != shape:
        fault = f"{name} has shape {tuple(tensor.shape)}; allowed: {shape}"
        if tuple(tensor.shape) == shape[::-1]:
            fault += (
                ", it is transposed: GPT-2 keeps (in, out), torch's Linear (out, in)"
            )
        faults.append(fault)
    if not jnp.issubdtype(tensor.dtype, jnp.floating):
        faults.append(f"{name} has dtype {tensor.dtype}; allowed: floating point")
    return faults


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
