"""Name what a state is made of by a few digits: to see damage, to compare runs."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Shaped, UInt32


def digests(tree: Any) -> dict[str, str]:
    """Return name -> 16 hex digits that stand for the bits of each array.

    Two sums modulo 2**32 over all elements of an integer hash of (bits, position). The
    hash is one to one in the bits, so a change within one element of up to 32 bits is
    always seen. Any other accident goes unseen about once in 2**64. No protection
    against intent. Sums of integers do not depend on their order: every mesh,
    sharding and backend gives the same digits. Computed where the arrays are, without
    a copy of them. Shape and dtype are no part of it: they are compared by name.
    """
    leaves = named(tree)
    pairs = jax.device_get([_hash_sums(leaf) for leaf in leaves.values()])
    hexes = (f"{int(a):08x}{int(b):08x}" for a, b in pairs)
    return dict(zip(leaves, hexes, strict=True))


def named(tree: Any) -> dict[str, Any]:
    """Return the leaves by path, such as `blocks/ln_1/scale`.

    Orbax keeps such a dict whole; of a tree it forgets named tuples and empty nodes.
    """
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


@jax.jit  # leaf by leaf: moments share the compilation of their parameter
def _hash_sums(
    leaf: Shaped[Array, "..."],
) -> tuple[UInt32[Array, ""], UInt32[Array, ""]]:
    if leaf.dtype == jnp.bool_:
        leaf = leaf.astype(jnp.uint8)
    # Elements of 8 bytes become pairs; narrower ones are widened.
    unsigned = jnp.dtype(f"uint{8 * min(leaf.dtype.itemsize, 4)}")
    bits = jax.lax.bitcast_convert_type(leaf, unsigned).astype(jnp.uint32)
    place = _scramble(_positions(bits.shape))
    first = _scramble(bits ^ place)
    second = _scramble(first + (place ^ jnp.uint32(0x9E3779B9)))  # 2**32 / golden ratio
    # One reduction of the pair: two would write both hashes to memory.
    zero, axes = jnp.uint32(0), tuple(range(bits.ndim))
    total, second_total = jax.lax.reduce(
        (first, second), (zero, zero), lambda x, y: (x[0] + y[0], x[1] + y[1]), axes
    )
    return total, second_total


def _positions(shape: tuple[int, ...]) -> UInt32[Array, "..."]:
    """Return each element's index in row-major order, modulo 2**32."""
    places = jnp.zeros(shape, jnp.uint32)
    for axis in range(len(shape)):
        stride = jnp.uint32(math.prod(shape[axis + 1 :]) % 2**32)
        places += jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * stride
    return places


def _scramble(x: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """Return a one-to-one hash of every element: lowbias32 of C. Wellons, 2018."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)
