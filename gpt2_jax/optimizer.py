"""Schedules, AdamW and Muon, and which parameters decay."""

import jax
import optax
from jaxtyping import PyTree

from gpt2_jax.config import OptimizerConfig

MATRICES = ("kernel", "embedding", "lm_head")  # leaves that decay
QKV_DIMS = optax.contrib.MuonDimensionNumbers(reduction_axis=1, output_axis=3)
KERNEL_DIMS = optax.contrib.MuonDimensionNumbers(reduction_axis=1, output_axis=2)
RMS = 0.2  # of a Muon update, to match AdamW's; Liu et al. 2025, section 2.2


def make_schedule(config: OptimizerConfig, peak: float, steps: int) -> optax.Schedule:
    """Return step -> learning rate: linear warm-up, then the configured decay.

    cosine falls to `final_fraction` of the peak at the last step; wsd stays at the
    peak and falls linearly over the last `decay_fraction` of all steps.
    """
    warmup, low = config.warmup_steps, peak * config.final_fraction
    # Update 0 already moves: its rate is peak / (warmup + 1), not 0.
    rise = optax.linear_schedule(peak / (warmup + 1), peak, warmup)
    rest = max(steps - warmup, 1)
    if config.schedule == "constant":
        return optax.join_schedules([rise, optax.constant_schedule(peak)], [warmup])
    if config.schedule == "cosine":
        fall = optax.cosine_decay_schedule(peak, rest, alpha=config.final_fraction)
        return optax.join_schedules([rise, fall], [warmup])
    decay = min(max(round(config.decay_fraction * steps), 1), rest)
    stay, fall = optax.constant_schedule(peak), optax.linear_schedule(peak, low, decay)
    return optax.join_schedules([rise, stay, fall], [warmup, steps - decay])


def make_optimizer(
    config: OptimizerConfig, steps: int
) -> optax.GradientTransformationExtraArgs:
    """Return the update rule: clip by global norm, then AdamW or Muon with AdamW.

    Decoupled weight decay applies to matrices and embeddings only. Muon takes the
    kernels of the blocks, each layer's matrix alone and query, key and value apart.
    """
    adamw = optax.adamw(
        make_schedule(config, config.learning_rate, steps),
        b1=config.beta1,
        b2=config.beta2,
        eps=config.epsilon,
        weight_decay=config.weight_decay,
        mask=decays,
    )
    rule = adamw if config.name == "adamw" else _with_muon(config, steps, adamw)
    if config.grad_clip == 0:
        return optax.with_extra_args_support(rule)
    return optax.chain(optax.clip_by_global_norm(config.grad_clip), rule)


def _with_muon(config, steps, adamw):
    muon = optax.contrib.muon(
        make_schedule(config, config.muon_learning_rate, steps),
        ns_steps=config.muon_steps,
        beta=config.momentum,
        weight_decay=config.weight_decay,
        muon_weight_dimension_numbers=_dimensions,
        consistent_rms=RMS,
    )
    return optax.partition({"muon": muon, "adamw": adamw}, _labels)


def decays(params: PyTree) -> PyTree:
    """Return which leaves weight decay applies to: matrices and embeddings."""
    return jax.tree.map_with_path(lambda path, _: _names(path)[-1] in MATRICES, params)


def _labels(params):
    def label(path, _):
        return "muon" if _names(path)[-1] == "kernel" else "adamw"

    return jax.tree.map_with_path(label, params)


def _dimensions(params):
    def dimensions(path, _):
        return QKV_DIMS if "qkv" in _names(path) else KERNEL_DIMS

    return jax.tree.map_with_path(dimensions, params)


def _names(path):
    return [str(getattr(key, "key", key)) for key in path]
