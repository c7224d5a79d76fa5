"""A loss whose value and gradients a batch can poison: no step compiles for it.

The first two tokens of a micro-batch's first sequence name the place and the poison,
as ids beyond the vocabulary: `poisoned` writes them, `window_loss` takes them out.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gpt2_jax import step

MARK = 10_000  # an id beyond every vocabulary here
NAN, INF = float("nan"), float("inf")
POISONS = (NAN, INF, -INF, 1e25, 1e3, 1e6)
LOSS = 0  # the place that is the loss; leaf i of the parameters is place 1 + i
honest_loss = step.window_loss


@jax.custom_vjp
def _taint(x: Any, poison: Any) -> Any:
    """Return 0, with `poison` for a gradient."""
    return 0.0 * poison


_taint.defvjp(
    lambda x, poison: (jnp.zeros(()), poison), lambda poison, _: (poison, None)
)


def window_loss(config, params, window, **how):
    """Return the loss of `step.window_loss`, poisoned as the window says."""
    place, kind = window[0, 0] - MARK, window[0, 1] - MARK
    marked = place >= 0
    amount = jnp.array(POISONS, jnp.float32)[jnp.maximum(kind, 0)]
    clean = jnp.where(marked, window.at[0, :2].set(1), window)
    total, count = honest_loss(config, params, clean, **how)
    total += jnp.where(marked & (place == LOSS), amount, 0.0)
    for i, leaf in enumerate(jax.tree.leaves(params), start=1):
        here = marked & (place == i)
        element = leaf[tuple(n // 2 for n in leaf.shape)]
        total += _taint(element, jnp.where(here, amount, 0.0))
    return total, count


def poisoned(batch: np.ndarray, place: int, poison: float) -> np.ndarray:
    """Return the batch (A, B, W) with a poison in its last micro-batch."""
    kind = next(i for i, x in enumerate(POISONS) if x == poison or poison != poison)
    marked = batch.copy()
    marked[-1, 0, :2] = MARK + place, MARK + kind
    return marked
