"""Write tests/golden/*.npz: tiny GPT-2s of transformers and what they compute.

    python tests/parity/make_golden.py

The parity tests compute their references with the same functions.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import GPT2Config, GPT2LMHeadModel

TESTS = Path(__file__).parents[1]
sys.path.insert(0, str(TESTS))

import agreement  # noqa: E402  it lies in tests/

TINY = dict(
    model_type="gpt2", vocab_size=31, n_positions=8, n_embd=12, n_layer=2, n_head=3,
    n_inner=None, activation_function="gelu_new", layer_norm_epsilon=1e-5,
    scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False,
    reorder_and_upcast_attn=False, tie_word_embeddings=True,
)  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "n_inner": {"n_inner": 20},
    "gelu_pytorch_tanh": {"activation_function": "gelu_pytorch_tanh"},
    "gelu": {"activation_function": "gelu"},
    "relu": {"activation_function": "relu"},
    "silu": {"activation_function": "silu"},
    "swish": {"activation_function": "swish"},
    "tanh": {"activation_function": "tanh"},
    "layer_norm_epsilon": {"layer_norm_epsilon": 0.01},
    "scale_attn_weights": {"scale_attn_weights": False},
    "scale_attn_by_inverse_layer_idx": {"scale_attn_by_inverse_layer_idx": True},
    "reorder_and_upcast_attn": {"reorder_and_upcast_attn": True},
    "untied": {"tie_word_embeddings": False},
    "mistral": {
        "scale_attn_by_inverse_layer_idx": True,
        "reorder_and_upcast_attn": True,
        "n_inner": 20,
    },
}
GOLDEN = tuple(name for name in CASES if name not in ("gelu_pytorch_tanh", "swish"))
KEPT_GRADIENTS = (
    "transformer.wte.weight",
    "transformer.h.1.attn.c_attn.weight",
    "transformer.h.0.attn.c_attn.bias",
    "transformer.h.0.mlp.c_proj.weight",
    "transformer.h.1.ln_2.weight",
    "lm_head.weight",
)


def compute_reference(
    values: dict[str, Any], *, batch: int = 2, length: int = 8, std: float = 0.3
) -> agreement.Reference:
    """Return what transformers computes with random weights, biases and norms.

    Weights are N(0, std), wide enough that every option moves the logits, and
    rounded to float16 so that a file holds them exactly in half the space.
    """
    random = np.random.default_rng(0)
    settings = {k: v for k, v in values.items() if k != "model_type"}
    config = GPT2Config(**settings, attn_implementation="eager")
    network = GPT2LMHeadModel(config).eval()
    tensors = {}
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            drawn = std * random.standard_normal(tuple(parameter.shape), np.float32)
            is_scale = parameter.ndim == 1 and name.endswith("weight")
            tensors[name] = (drawn + is_scale).astype(np.float16)
            parameter.copy_(torch.from_numpy(tensors[name]))
    tokens = random.integers(0, values["vocab_size"], (batch, length), np.int32)
    ids = torch.from_numpy(tokens.astype(np.int64))
    output = network(ids, labels=ids, use_cache=False)
    output.loss.backward()
    gradients = {k: p.grad.numpy() for k, p in network.named_parameters()}
    logits, loss = output.logits.detach().numpy(), output.loss.detach().numpy()
    return agreement.Reference(values, tensors, tokens, logits, loss, gradients)


def compute_golden(name: str) -> agreement.Reference:
    """Return the reference of one case, with the gradients that its file keeps."""
    reference = compute_reference(TINY | CASES[name])
    kept = {k: v for k, v in reference.gradients.items() if k in KEPT_GRADIENTS}
    return reference._replace(gradients=kept)


def main() -> None:
    """Write one file per case and print its size."""
    for name in GOLDEN:
        path = TESTS / "golden" / f"{name}.npz"
        agreement.save(path, compute_golden(name))
        print(path.name, path.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
