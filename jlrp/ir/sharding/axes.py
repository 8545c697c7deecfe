"""Axes of arrays over devices: what one device has of the values of all.

Two primitives say how the values of all devices relate to those of one. They exist
while a body is traced for one device: laid out for all, nothing of them is left.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import AbstractValue
from jax.extend.core import Primitive

from jlrp.ir import jax_compat
from jlrp.ir.jax_compat import Aval
from jlrp.typing import Array

Arrays = Sequence[Array]
Dims = Sequence[int | None]


class MappedAxis(Protocol):
    """What JAX says of an axis that ``vmap`` maps."""

    name: object


gathered_p = Primitive("gathered")
own_p = Primitive("own")


@gathered_p.def_abstract_eval
def _gathered_shape(x: Aval, *, axis: str, size: int) -> AbstractValue:
    return jax.core.ShapedArray((size, *x.shape), x.dtype)  # type: ignore[attr]


@own_p.def_abstract_eval
def _own_shape(x: Aval, *, axis: str) -> AbstractValue:
    return jax.core.ShapedArray(x.shape[1:], x.dtype)  # type: ignore[attr]


def _lay_out_gathered(
    mapped: MappedAxis, args: Arrays, dims: Dims, *, axis: str, size: int
) -> tuple[Array, int | None]:
    (x,), (dim,) = args, dims
    if mapped.name != axis:
        out = gathered_p.bind(x, axis=axis, size=size)
        return out, None if dim is None else dim + 1
    if dim is None:
        return jnp.broadcast_to(x, (size, *x.shape)), None
    return (x if dim == 0 else jnp.moveaxis(x, dim, 0)), None


def _lay_out_own(
    mapped: MappedAxis, args: Arrays, dims: Dims, *, axis: str
) -> tuple[Array, int | None]:
    (x,), (dim,) = args, dims
    if mapped.name == axis:
        if dim is None:
            return x, 0
        return jnp.moveaxis(jnp.diagonal(x, 0, dim, 0 if dim else 1), -1, 0), 0
    if dim is None:
        return own_p.bind(x, axis=axis), None
    if dim == 0:
        x, dim = jnp.moveaxis(x, 0, 1), 1
    return own_p.bind(x, axis=axis), dim - 1


jax_compat.define_layout(gathered_p, _lay_out_gathered)
jax_compat.define_layout(own_p, _lay_out_own)


def moved(x: Array, source: int, destination: int) -> Array:
    return x if source == destination else jnp.moveaxis(x, source, destination)


def joined(x: Array, axis: int) -> Array:
    """An axis and the one behind it as one."""
    size = x.shape[axis] * x.shape[axis + 1]
    return lax.reshape(x, (*x.shape[:axis], size, *x.shape[axis + 2 :]))


def split(x: Array, axis: int, count: int) -> Array:
    """An axis as two, the first of a given size."""
    sizes = (count, x.shape[axis] // count)
    return lax.reshape(x, (*x.shape[:axis], *sizes, *x.shape[axis + 1 :]))


def permuted(whole: Array, pairs: Iterable[tuple[int, int]]) -> Array:
    """Slices of the leading axis in another order; zeros where nothing is sent.

    In runs: of a ring there are two, which XLA makes one exchange of.
    """
    senders: list[int | None] = [None] * whole.shape[0]
    for source, destination in pairs:
        senders[destination] = source
    runs: list[tuple[int | None, int]] = []  # first sender, and how many follow
    for sender in senders:
        first, count = runs[-1] if runs else (None, 0)
        follows = sender is None if first is None else sender == first + count
        if count and follows:
            runs[-1] = (first, count + 1)
        else:
            runs.append((sender, 1))
    parts = [
        jnp.zeros((count, *whole.shape[1:]), whole.dtype)
        if first is None
        else lax.slice_in_dim(whole, first, first + count)
        for first, count in runs
    ]
    return parts[0] if len(parts) == 1 else lax.concatenate(parts, 0)
