"""Compare our GPT-2 with a reference: numbers that transformers computed once."""

import dataclasses
import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gpt2_jax import hf, model
from gpt2_jax.config import ModelConfig
from gpt2_jax.loss import IGNORED, chunked_loss

# Both sides compute in float32; the issue asks for 1e-4 on logits and gradients.
TOLERANCE = 1e-4


class Reference(NamedTuple):
    """A GPT-2 under Hugging Face names and what it computes for `tokens`."""

    values: dict[str, Any]  # of config.json
    tensors: dict[str, np.ndarray]
    tokens: np.ndarray
    logits: np.ndarray
    loss: np.ndarray  # mean over the tokens that have a successor
    gradients: dict[str, np.ndarray]  # of the loss, perhaps of some tensors only


def save(path: Path, reference: Reference) -> None:
    arrays = {f"tensors/{k}": v for k, v in reference.tensors.items()}
    arrays |= {f"gradients/{k}": v for k, v in reference.gradients.items()}
    arrays |= {k: getattr(reference, k) for k in ("tokens", "logits", "loss")}
    np.savez_compressed(path, values=json.dumps(reference.values), **arrays)


def load(path: Path) -> Reference:
    with np.load(path) as file:
        arrays = dict(file)

    def group(name):
        start = f"{name}/"
        return {k[len(start) :]: v for k, v in arrays.items() if k.startswith(start)}

    return Reference(
        values=json.loads(str(arrays["values"])),
        tensors=group("tensors"),
        tokens=arrays["tokens"],
        logits=arrays["logits"],
        loss=arrays["loss"],
        gradients=group("gradients"),
    )


def logits_and_gradients(config: ModelConfig, params: model.Params, tokens: Any):
    """Return logits, the mean loss and its gradients for one batch."""
    last = jnp.full_like(tokens[:, :1], IGNORED)
    targets = jnp.concatenate([tokens[:, 1:], last], axis=1)

    def mean_loss(params):
        hidden = model.hidden_states(config, params, tokens)
        head = model.output_matrix(params)
        total, count = chunked_loss(hidden, head, targets, n_vocab=config.n_vocab)
        logits = model.project(config, params, hidden)[..., : config.n_vocab]
        return total / count, logits

    (loss, logits), gradients = jax.value_and_grad(mean_loss, has_aux=True)(params)
    return logits, loss, gradients


def largest_differences(reference: Reference) -> dict[str, float]:
    """Return the largest absolute difference of logits, loss and gradients."""
    config = dataclasses.replace(hf.config_from_hf(reference.values), dtype="float32")
    params = hf.params_from_hf(config, reference.tensors)
    logits, loss, gradients = jax.jit(
        lambda params, tokens: logits_and_gradients(config, params, tokens),
    )(params, jnp.asarray(reference.tokens))
    ours = hf.params_to_hf(config, gradients)
    return {
        "logits": _gap(logits, reference.logits),
        "loss": _gap(loss, reference.loss),
        "gradients": max(_gap(ours[k], v) for k, v in reference.gradients.items()),
    }


def _gap(ours: Any, theirs: np.ndarray) -> float:
    assert ours.shape == theirs.shape
    return float(np.max(np.abs(np.asarray(ours, np.float64) - theirs)))
