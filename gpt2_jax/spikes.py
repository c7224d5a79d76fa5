"""Which losses and gradient norms are spikes: far above those of the last steps."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

WINDOW = 128  # steps; levanter optim/skipstep.py
LEAST = WINDOW // 2  # steps before any is judged; the same
ROUNDING = 1e-6  # of the mean: a smaller deviation is float32's, not the loss's


class History(NamedTuple):
    """Loss and gradient norm of the last steps that were finite."""

    recent: Float[Array, "2 window"]
    written: Int[Array, ""]  # steps, in all


def start() -> History:
    """Return a history of no steps."""
    return History(jnp.zeros((2, WINDOW), jnp.float32), jnp.zeros((), jnp.int32))


def judge(
    history: History, loss: Float[Array, ""], norm: Float[Array, ""], sigmas: float
) -> tuple[Bool[Array, ""], History]:
    """Return whether either is a spike, and the history with both.

    A spike lies more than `sigmas` standard deviations above the mean. Spikes are
    written down too, or a loss that stays higher would be one for ever; but as high as
    the limit, or one of them would hide the next.
    """
    known = jnp.arange(WINDOW)[None] < history.written
    mean = jnp.mean(history.recent, axis=1, where=known)
    deviation = jnp.std(history.recent, axis=1, where=known)
    limit = mean + sigmas * jnp.maximum(deviation, ROUNDING * jnp.abs(mean))
    limit = jnp.where(history.written < LEAST, jnp.inf, limit)
    new = jnp.stack([loss, norm])
    place = history.written % WINDOW
    recent = history.recent.at[:, place].set(jnp.minimum(new, limit))
    return jnp.any(new > limit), History(recent, history.written + 1)
