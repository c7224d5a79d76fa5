"""One compiled training step and one evaluation step.

`train.py`, the planner, the benchmarks and the tests compile these same functions.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int, Int32, PyTree

from gpt2_jax import model, sharding, spikes
from gpt2_jax.config import Config, ConfigError, MeshConfig
from gpt2_jax.hardware import find_chip
from gpt2_jax.loss import IGNORED, LOGITS_BYTES_ACCELERATOR, chunked_loss
from gpt2_jax.optimizer import make_optimizer


class TrainState(NamedTuple):
    """Everything that a step changes."""

    step: Int[Array, ""]  # updates tried so far
    params: PyTree
    opt_state: PyTree  # of the optimizer, or `Watched` with `train.spike_sigmas`


class Watched(NamedTuple):
    """The optimizer's state and what spikes are told by."""

    rule: PyTree
    history: spikes.History


class StepMetrics(NamedTuple):
    """What one step tells about itself."""

    loss: Float[Array, ""]  # nats per token, before the update
    grad_norm: Float[Array, ""]  # global, before clipping
    finite: Bool[Array, ""]  # False: the update was skipped
    spike: Bool[Array, ""] | None = None  # True: skipped; None: nobody looks


class Program(NamedTuple):
    """The compiled functions of a run and where their arrays live."""

    start: Callable[[], TrainState]  # from new random weights
    start_from: Callable[[PyTree], TrainState]  # from given ones
    train_step: jax.stages.Wrapped  # (state, batch) to (state, metrics)
    eval_step: Callable[[PyTree, Array], tuple[Array, Array]]
    mesh: Mesh
    abstract_state: TrainState  # ShapeDtypeStructs with their shardings
    batch_sharding: NamedSharding
    eval_sharding: NamedSharding


def settle(config: Config, devices: Sequence[Any]) -> tuple[Config, Mesh, list[str]]:
    """Return the config as `devices` run it, their mesh, and how that was chosen."""
    here = jax.process_index()
    device = next((d for d in devices if d.process_index == here), devices[0])
    config = replace(config, model=model.resolve(config.model, device))
    asked, notes = config.mesh, []
    if asked == MeshConfig():
        chip = find_chip(device.device_kind)
        memory = None if chip is None else chip.hbm_bytes
        how = config.model, len(devices), memory, config.batch_sequences
        asked, reason = sharding.choose_mesh(*how)
        if len(devices) > 1:
            notes = [f"mesh chosen for {reason}; another: --mesh.data, fsdp, tensor"]
    return config, sharding.make_mesh(asked, devices), notes


def micro_batch(config: Config, mesh: Mesh) -> tuple[int, int]:
    """Return (accumulation, sequences per micro-batch over all devices).

    The micro-batch per device is the largest divisor of its share of the batch that
    is at most `train.micro_batch`: the recipe fixes tokens per step, the devices
    decide how they are taken.

    Raises
    ------
    ConfigError
        If the batch does not divide over the mesh.
    """
    parts, total = sharding.batch_parts(mesh), config.batch_sequences
    if total % parts:
        raise ConfigError(
            f"train.batch_tokens = {config.train.batch_tokens} is {total} sequences of "
            f"{config.model.n_ctx}; allowed: a multiple of data x fsdp = {parts} "
            "sequences; change --train.batch-tokens or the mesh"
        )
    share = total // parts
    most = config.train.micro_batch or share
    size = max(n for n in range(1, share + 1) if share % n == 0 and n <= most)
    return share // size, size * parts


def make_program(config: Config, mesh: Mesh) -> Program:
    """Return the compiled functions of `config` on `mesh`.

    `train_step` donates its state and gives it back with the same shardings, so it
    compiles once.
    """
    optimizer = make_optimizer(config.optimizer, config.train.steps)

    def start_from(params: PyTree) -> TrainState:
        rule = optimizer.init(params)
        watches = config.train.spike_sigmas > 0
        opt_state = Watched(rule, spikes.start()) if watches else rule
        return TrainState(jnp.zeros((), jnp.int32), params, opt_state)

    def start() -> TrainState:
        return start_from(model.init(config.model, jax.random.key(config.train.seed)))

    abstract = jax.eval_shape(start)
    shardings = sharding.state_shardings(abstract, abstract.params, config.model, mesh)
    whole = NamedSharding(mesh, P())
    batches = sharding.batch_sharding(mesh, leading=1)

    def step(state: TrainState, batch: Array) -> tuple[TrainState, StepMetrics]:
        return train_step(config, optimizer, mesh, state, batch)

    def evaluate(params: PyTree, batch: Array) -> tuple[Array, Array]:
        return eval_step(config, mesh, params, batch)

    return Program(
        start=jax.jit(start, out_shardings=shardings),
        start_from=jax.jit(start_from, out_shardings=shardings),
        train_step=jax.jit(
            step,
            donate_argnums=0,
            in_shardings=(shardings, batches),
            out_shardings=(shardings, whole),
        ),
        eval_step=jax.jit(evaluate, out_shardings=whole),
        mesh=mesh,
        abstract_state=jax.tree.map(_place, abstract, shardings),
        batch_sharding=batches,
        eval_sharding=sharding.batch_sharding(mesh),
    )


def _place(leaf: Any, where: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)


def train_step(
    config: Config,
    optimizer: optax.GradientTransformationExtraArgs,
    mesh: Mesh,
    state: TrainState,
    batch: Int32[Array, "A B W"],
) -> tuple[TrainState, StepMetrics]:
    """Return the state after one update on A micro-batches of B sequences.

    The loss is the mean over all counted tokens of the step, so A micro-batches of B
    equal one of A * B. Dropout's key is `fold_in(seed, step)`. If the loss or the
    gradient's norm is not finite, or is a spike (`train.spike_sigmas`), parameters and
    optimizer state stay as they are.

    The new parameters are not looked at: that takes another pass, 18 bytes a parameter,
    and only learning rates near 1e38 overflow there. One that did makes the next loss
    not finite, and is not saved.
    """
    key = jax.random.fold_in(jax.random.key(config.train.seed), state.step)
    count = jnp.maximum(jnp.sum(batch[..., 1:] != IGNORED), 1).astype(jnp.float32)

    def loss(params: PyTree, window: Array, index: Array) -> Array:
        micro_key = jax.random.fold_in(key, index) if _drops(config) else None
        return window_loss(config, params, window, key=micro_key, mesh=mesh)[0] / count

    value_and_grad = jax.value_and_grad(loss)

    def add(carry: PyTree, micro: PyTree) -> tuple[PyTree, None]:
        new = value_and_grad(state.params, *micro)
        return jax.tree.map(jnp.add, carry, new), None

    micros = batch, jnp.arange(batch.shape[0])
    if batch.shape[0] == 1:
        value, grads = value_and_grad(state.params, batch[0], jnp.zeros((), jnp.int32))
    else:
        zeros = jnp.zeros(()), jax.tree.map(jnp.zeros_like, state.params)
        (value, grads), _ = jax.lax.scan(add, zeros, micros)

    norm = optax.tree.norm(grads)
    finite = jnp.isfinite(value) & jnp.isfinite(norm)
    if not isinstance(state.opt_state, Watched):
        kept = _update(optimizer, finite, grads, state.params, state.opt_state)
        return TrainState(state.step + 1, *kept), StepMetrics(value, norm, finite)
    rule, history = state.opt_state
    high, seen = spikes.judge(history, value, norm, config.train.spike_sigmas)
    spike = finite & high
    params, rule = _update(optimizer, finite & ~spike, grads, state.params, rule)
    history = _choose(finite, seen, history)
    after = TrainState(state.step + 1, params, Watched(rule, history))
    return after, StepMetrics(value, norm, finite, spike)


def _update(optimizer, good, grads, params, rule) -> tuple[PyTree, PyTree]:
    """Return parameters and optimizer state after an update, or as they are."""
    updates, new_rule = optimizer.update(grads, rule, params)
    new = optax.apply_updates(params, updates), new_rule
    return _choose(good, new, (params, rule))


def _choose(good: Bool[Array, ""], after: PyTree, before: PyTree) -> Any:
    return jax.tree.map(lambda a, b: jnp.where(good, a, b), after, before)


def eval_step(
    config: Config, mesh: Mesh, params: PyTree, batch: Int32[Array, "B W"]
) -> tuple[Float[Array, ""], Int[Array, ""]]:
    """Return the summed loss in nats and the number of targets it sums."""
    return window_loss(config, params, batch, key=None, mesh=mesh)


def window_loss(
    config: Config,
    params: PyTree,
    window: Int32[Array, "B W"],
    *,
    key: Array | None,
    mesh: Mesh,
) -> tuple[Float[Array, ""], Int[Array, ""]]:
    """Return the summed loss in nats of predicting each next token, and the count."""
    tokens, targets = jnp.maximum(window[:, :-1], 0), window[:, 1:]
    hidden = model.hidden_states(config.model, params, tokens, key=key, mesh=mesh)
    head = model.output_matrix(params).astype(hidden.dtype)
    head = sharding.gather_head(head, mesh)
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    return chunked_loss(
        hidden,
        head,
        targets,
        n_vocab=config.model.n_vocab,
        chunk=config.train.loss_chunk,
        parts=sharding.batch_parts(mesh),
        logits_bytes=None if on_cpu else LOGITS_BYTES_ACCELERATOR,
    )


def _drops(config):
    rates = config.model.embd_pdrop, config.model.attn_pdrop, config.model.resid_pdrop
    return any(rate > 0 for rate in rates)
