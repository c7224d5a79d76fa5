"""Name what a state is made of by a few digits: to see damage, to compare runs."""

import hashlib
import math
import sys
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Shaped, UInt32


class Print(NamedTuple):
    """What one reading of an array tells."""

    digest: str
    nonfinite: int  # elements that are inf or NaN, modulo 2**32


def digests(tree: Any) -> dict[str, str]:
    """Return name -> 16 hex digits that stand for the bits of each array.

    Two sums modulo 2**32 over all elements of an integer hash of (bits, position). The
    hash is one to one in the bits, so a change within one element of up to 32 bits is
    always seen. Any other accident goes unseen about once in 2**64. No protection
    against intent. Sums of integers do not depend on their order: every mesh,
    sharding and backend gives the same digits. Computed where the arrays are, without
    a copy of them. Shape and dtype are no part of it: they are compared by name.
    """
    return {name: print_.digest for name, print_ in prints(tree).items()}


def prints(tree: Any) -> dict[str, Print]:
    """Return the digest of each array and how many of its numbers are not finite."""
    leaves = named(tree)
    sums = jax.device_get([_sums(_one_copy(leaf)) for leaf in leaves.values()])
    found = (Print(f"{int(a):08x}{int(b):08x}", int(c)) for a, b, c in sums)
    return dict(zip(leaves, found, strict=True))


def state_digest(step: int, params: Any, opt_state: Any) -> str:
    """Return a SHA-256 of a state: 64 hex digits, the same on every mesh.

    Over the step, then name, dtype, shape and bytes (row-major, little-endian) of each
    array, by name. The arrays come to the host one after another; each must be whole
    on this host's devices.
    """
    whole = hashlib.sha256()
    state = dict(opt_state=opt_state, params=params)
    whole.update(f"step {step}\n".encode())
    for name, leaf in sorted(named(state).items()):
        array = np.asarray(leaf)
        whole.update(f"{name} {array.dtype.name} {list(array.shape)}\n".encode())
        rows = np.ascontiguousarray(array).reshape(-1)
        rows = rows if sys.byteorder == "little" else rows.byteswap()
        whole.update(rows.view(np.uint8).data)
    return whole.hexdigest()


def named(tree: Any) -> dict[str, Any]:
    """Return the leaves by path, such as `blocks/ln_1/scale`.

    Orbax keeps such a dict whole; of a tree it forgets named tuples and empty nodes.
    """
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def _one_copy(leaf: Any) -> Any:
    """Return the copy on this process's first device of what all devices hold."""
    copied = isinstance(leaf, jax.Array) and leaf.is_fully_replicated
    return leaf.addressable_data(0) if copied else leaf


Sums = tuple[UInt32[Array, "..."], ...]


@jax.jit  # leaf by leaf: moments share the compilation of their parameter
def _sums(leaf: Shaped[Array, "..."]) -> Sums:
    if leaf.dtype == jnp.bool_:
        leaf = leaf.astype(jnp.uint8)
    # Elements of 8 bytes become pairs; narrower ones are widened.
    unsigned = jnp.dtype(f"uint{8 * min(leaf.dtype.itemsize, 4)}")
    bits = jax.lax.bitcast_convert_type(leaf, unsigned).astype(jnp.uint32)
    place = _scramble(_positions(bits.shape))
    first = _scramble(bits ^ place)
    second = _scramble(first + (place ^ jnp.uint32(0x9E3779B9)))  # 2**32 / golden ratio
    bad = (~jnp.isfinite(leaf)).astype(jnp.uint32)
    bad = jnp.broadcast_to(
        bad.reshape(bad.shape + (1,) * (bits.ndim - bad.ndim)), bits.shape
    )
    # One reduction of all three: each alone would write its operand to memory. Row by
    # row first, which XLA:CPU shares out to its threads; a scalar is made by one.
    rows = _add((first, second, bad), range(1, bits.ndim))
    return _add(rows, range(rows[0].ndim))


def _add(terms: Sums, axes: Iterable[int]) -> Sums:
    return jax.lax.reduce(
        terms,
        (jnp.uint32(0),) * len(terms),
        lambda x, y: tuple(a + b for a, b in zip(x, y, strict=True)),
        tuple(axes),
    )


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
