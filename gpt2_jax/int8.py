"""Weights in 8 bits, to write text faster where integers multiply fast.

Each column of a matrix keeps 255 levels and a scale; what it multiplies keeps 16 bits,
as two rows of 8. What is lost is then lost by the weights, as in weight-only schemes,
while the product itself is one of integers.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Int8

from gpt2_jax.config import Quantize, check

FEW = 32  # rows of 8 bits; from there on the weights are the second operand


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

        XLA:CPU packs the second operand anew each time and reads the first one as it
        lies: of few rows the weights are the first (60 matrices of 768 x 3072 on a Xeon
        with AMX, 2 rows: 19 weights a ns, as the second one 12). A single row it would
        multiply 15 times slower; there are two at least.
        """
        rows = x.astype(jnp.float32).reshape(-1, x.shape[-1])
        scale, levels = _levels(rows)
        high = jnp.round(levels)
        low = jnp.round((levels - high) * 254)
        both = jnp.concatenate([high, low]).astype(jnp.int8)
        columns = self.values.reshape(-1, x.shape[-1])
        if len(both) < FEW:
            # Scaled before it is transposed: XLA would swap the operands else.
            out = _sum(_product(columns, both), axis=1) * self.scale.reshape(-1, 1)
            out = (out * scale.reshape(1, -1)).T
        else:
            out = _sum(_product(both, columns), axis=0) * self.scale.reshape(1, -1)
            out = out * scale.reshape(-1, 1)
        return out.reshape(*x.shape[:-1], *self.scale.shape)

    def take(self, ids: Int[Array, "..."]) -> Float[Array, "... D"]:
        """Return the columns of these numbers."""
        return self.values[ids] * self.scale[ids][..., None]


def _product(left, right):
    over = ((1,), (1,)), ((), ())
    return jax.lax.dot_general(left, right, over, preferred_element_type=jnp.int32)


def _sum(sums, axis):
    """Return what the high and the low parts, side by side, are together."""
    high, low = jnp.split(sums.astype(jnp.float32), 2, axis=axis)
    return high + low / 254


@jax.jit
def _round(kernel):
    scale, levels = _levels(jnp.moveaxis(kernel.astype(jnp.float32), 0, -1))
    return jnp.round(levels).astype(jnp.int8), scale


def _levels(rows):
    """Return the scale of each row and the row over it, within -127 and 127."""
    scale = jnp.max(jnp.abs(rows), axis=-1) / 127
    return scale, rows / jnp.where(scale == 0, 1, scale)[..., None]


def check_kind(how: Any) -> None:
    """Raise `ConfigError` for another kind of weights than there is."""
    check(how in (None, "int8"), "quantize", how, "None or 'int8'")


def quantize(unstacked: Any, how: Quantize | None = "int8") -> Any:
    """Return `model.unstack`'s parameters with kernels and tokens as `Matrix`.

    Biases, layer norms and positions stay as they are; all does if `how` is None.

    Raises
    ------
    ConfigError
        If `how` is neither.
    """
    check_kind(how)
    if how is None:
        return unstacked

    def convert(path: Any, leaf: Array) -> Any:
        name, owner = path[-1].key, path[-2].key if len(path) > 1 else None
        if name == "kernel":
            return Matrix.of(leaf)
        by_token = name == "lm_head" or (owner, name) == ("wte", "embedding")
        return Matrix.of(leaf.T) if by_token else leaf

    return jax.tree.map_with_path(convert, unstacked)
