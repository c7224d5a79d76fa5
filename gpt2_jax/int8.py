"""Weights in 8 bits, to write text faster where integers multiply fast.

Each column of a matrix keeps 255 levels and a scale; what it multiplies keeps 16 bits,
as two rows of 8. What is lost is then lost by the weights, as in weight-only schemes,
while the product itself is one of integers.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Int8


class Matrix(NamedTuple):
    """A matrix whose column j is `values[j] * scale[j]`."""

    values: Int8[Array, "*out D"]  # -127 to 127
    scale: Float[Array, "*out"]

    @property
    def shape(self) -> tuple[int, ...]:
        """Return (*out, D)."""
        return self.values.shape

    @classmethod
    def of(cls, kernel: Float[Array, "D *out"]) -> "Matrix":
        """Return the matrix with each column rounded to 255 levels."""
        return cls(*_round(kernel))

    def multiply(self, x: Float[Array, "*batch D"]) -> Float[Array, "..."]:
        """Return x times this matrix in float32, of shape (*batch, *out).

        XLA:CPU reads the first operand as it lies and packs the second one anew: the
        weights are the first, whatever the number of rows (24 matrices of 768 x 3072
        on a Xeon with AMX: 19 weights a ns, as the second one 12). A single row it
        would multiply 15 times slower; there are two at least.
        """
        rows = x.astype(jnp.float32).reshape(-1, x.shape[-1])
        scale, levels = _levels(rows)
        high = jnp.round(levels)
        low = jnp.round((levels - high) * 254)
        columns = self.values.reshape(-1, x.shape[-1])
        sums = jax.lax.dot_general(
            columns,
            jnp.concatenate([high, low]).astype(jnp.int8),
            (((1,), (1,)), ((), ())),
            preferred_element_type=jnp.int32,
        )
        # Scaled before it is transposed: XLA would swap the operands else.
        high, low = jnp.split(sums.astype(jnp.float32), 2, axis=1)
        out = (high + low / 254) * self.scale.reshape(-1, 1) * scale.reshape(1, -1)
        return out.T.reshape(*x.shape[:-1], *self.scale.shape)

    def take(self, ids: Int[Array, "..."]) -> Float[Array, "... D"]:
        """Return the columns of these numbers."""
        return self.values[ids] * self.scale[ids][..., None]


@jax.jit
def _round(kernel):
    scale, levels = _levels(jnp.moveaxis(kernel.astype(jnp.float32), 0, -1))
    return jnp.round(levels).astype(jnp.int8), scale


def _levels(rows):
    """Return the scale of each row and the row over it, within -127 and 127."""
    scale = jnp.max(jnp.abs(rows), axis=-1) / 127
    return scale, rows / jnp.where(scale == 0, 1, scale)[..., None]


def quantize(unstacked: Any) -> Any:
    """Return `model.unstack`'s parameters with kernels and tokens as `Matrix`.

    Biases, layer norms and positions stay as they are.
    """

    def convert(path: Any, leaf: Array) -> Any:
        name, owner = path[-1].key, path[-2].key if len(path) > 1 else None
        if name == "kernel":
            return Matrix.of(leaf)
        by_token = name == "lm_head" or (owner, name) == ("wte", "embedding")
        return Matrix.of(leaf.T) if by_token else leaf

    return jax.tree.map_with_path(convert, unstacked)
