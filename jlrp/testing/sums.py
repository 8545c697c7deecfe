"""Rewritings of sums: what is added, in which order, and by which primitive."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import primitives as p

from jlrp.ir.jax_compat import Operand
from jlrp.testing import documented
from jlrp.testing.movement import index
from jlrp.testing.rewriting import Site, rewriting
from jlrp.typing import Array, DTypeLike


def ones(shape: tuple[int, ...], dtype: DTypeLike, value: float = 1.0) -> Array:
    """A constant that is made inside of the function."""
    return lax.full(shape, value, dtype)


def _summed(site: Site) -> tuple[Operand, tuple[int, ...], list[int]] | None:
    """The operand, the axes summed, and the others, of a sum that carries."""
    if not site.carries or not site.params["axes"] or len(site.inputs) != 1:
        return None
    y, axes = site.inputs[0], site.params["axes"]
    return y, axes, [a for a in range(y.ndim) if a not in axes]


@rewriting("sums", p.reduce_sum_p)
def sum_as_dot_with_ones(site: Site) -> Operand | None:
    """A sum over axes as a dot with ones made inside."""
    if (found := _summed(site)) is None:
        return None
    y, axes, _ = found
    along = tuple(range(len(axes)))
    vector = ones(tuple(y.shape[a] for a in axes), y.dtype)
    return lax.dot_general(y, vector, ((axes, along), ((), ())))


@rewriting("sums", p.reduce_sum_p)
def sum_as_dot_from_the_left(site: Site) -> Operand | None:
    """A sum over axes as a matrix of ones times the value."""
    if (found := _summed(site)) is None:
        return None
    y, axes, rest = found
    rows = int(np.prod([y.shape[a] for a in axes]))
    y = lax.reshape(
        lax.transpose(y, [*axes, *rest]), (rows, max(1, y.size // max(1, rows)))
    )
    return lax.reshape(lax.dot(ones((1, rows), y.dtype), y), site.shape)


@rewriting("sums", p.reduce_sum_p)
def sum_added_up(site: Site) -> Operand | None:
    """A sum over a short axis as a chain of additions."""
    if (found := _summed(site)) is None:
        return None
    y, axes, _ = found
    if any(y.shape[a] > 8 for a in axes) or 0 in y.shape:
        return None
    for axis in sorted(axes, reverse=True):
        terms = [
            lax.index_in_dim(y, i, axis, keepdims=False) for i in range(y.shape[axis])
        ]
        y = functools.reduce(lax.add, terms)
    return y


@rewriting("sums", p.reduce_sum_p)
def sum_as_a_tree(site: Site) -> Operand | None:
    """A sum over an axis of even size as the sum of the sums of its halves."""
    if (found := _summed(site)) is None:
        return None
    y, axes, _ = found
    axis = axes[0]
    if y.shape[axis] % 2 or not y.shape[axis]:
        return None
    half = y.shape[axis] // 2
    parts = [
        site.bind(lax.slice_in_dim(y, start, start + half, axis=axis))
        for start in (0, half)
    ]
    return parts[0] + parts[1]


@rewriting("sums", p.reduce_sum_p)
def sum_as_last_of_running_sum(site: Site) -> Operand | None:
    """A sum over an axis as the last element of a cumulative sum."""
    if (found := _summed(site)) is None:
        return None
    y, axes, _ = found
    for axis in sorted(axes, reverse=True):
        if not y.shape[axis]:
            return None
        y = lax.index_in_dim(lax.cumsum(jnp.asarray(y), axis), -1, axis, keepdims=False)
    return y


@rewriting("sums", p.reduce_sum_p)
def sum_axis_by_axis(site: Site) -> Operand | None:
    """A sum over several axes as one sum after the other."""
    if (found := _summed(site)) is None or len(found[1]) < 2:
        return None
    y, axes, _ = found
    for axis in sorted(axes, reverse=True):
        y = site.bind(y, axes=(axis,))
    return y


@rewriting("sums", p.reduce_sum_p)
def sum_of_merged_axes(site: Site) -> Operand | None:
    """A sum over several axes as one over their product."""
    if (found := _summed(site)) is None or len(found[1]) < 2:
        return None
    y, axes, rest = found
    shape = (*(y.shape[a] for a in rest), int(np.prod([y.shape[a] for a in axes])))
    y = lax.reshape(lax.transpose(y, [*rest, *axes]), shape)
    return site.bind(y, axes=(len(shape) - 1,))


@rewriting("sums", p.reduce_sum_p)
def sum_by_windows(site: Site) -> Operand | None:
    """A sum over axes as a sum over one window that covers them."""
    if (found := _summed(site)) is None:
        return None
    y, axes, _ = found
    window = tuple(n if a in axes else 1 for a, n in enumerate(y.shape))
    zero = np.zeros((), y.dtype)
    y = lax.reduce_window(y, zero, lax.add, window, (1,) * y.ndim, "VALID")
    return lax.squeeze(y, axes)


@rewriting("sums", p.reduce_sum_p)
def sum_scattered(site: Site) -> Operand | None:
    """A sum over the first axis as a scatter-add into one place."""
    if (found := _summed(site)) is None or found[1] != (0,):
        return None
    y = found[0]
    zeros = ones((1, *y.shape[1:]), y.dtype, 0.0)
    return lax.squeeze(zeros.at[index((y.shape[0],)) * np.int32(0)].add(y), (0,))


def _count(site: Site, axes: Sequence[int], shape: Sequence[int]) -> int:
    return int(np.prod([shape[a] for a in axes]))


def _mean(site: Site) -> tuple[Site, Operand, tuple[int, ...]] | None:
    """The sum, its operand and axes, of a division of a sum by its count."""
    inner = site.producer(0, p.reduce_sum_p)
    if not site.carries or inner is None or (found := _summed(inner)) is None:
        return None
    y, axes, _ = found
    number = site.literal(1)
    if number is None or number != _count(inner, axes, y.shape):
        return None
    return inner, y, axes


@rewriting("sums", p.div_p)
def mean_as_dot(site: Site) -> Operand | None:
    """A mean as a dot with a vector of 1/n made inside."""
    if (found := _mean(site)) is None:
        return None
    inner, y, axes = found
    n = _count(inner, axes, y.shape)
    vector = ones(tuple(y.shape[a] for a in axes), y.dtype, 1 / n)
    along = tuple(range(len(axes)))
    return lax.dot_general(y, vector, ((axes, along), ((), ())))


@rewriting("sums", p.div_p)
def mean_times_reciprocal(site: Site) -> Operand | None:
    """A mean as a sum times 1/n."""
    if (found := _mean(site)) is None:
        return None
    inner, y, axes = found
    return inner.bind(y) * (1 / _count(inner, axes, y.shape))


@rewriting("sums", p.div_p)
def mean_divided_first(site: Site) -> Operand | None:
    """A mean as a sum of what is divided by n."""
    if (found := _mean(site)) is None:
        return None
    inner, y, axes = found
    return inner.bind(y / _count(inner, axes, y.shape))


@rewriting("sums", p.div_p)
def mean_of_means(site: Site) -> Operand | None:
    """A mean over several axes as means one after the other."""
    if (found := _mean(site)) is None or len(found[2]) < 2:
        return None
    inner, y, axes = found
    for axis in sorted(axes, reverse=True):
        size = y.shape[axis]
        y = inner.bind(y, axes=(axis,)) / size
    return y


@rewriting("sums", p.cumsum_p)
def running_sum_as_dot(site: Site) -> Operand | None:
    """A cumulative sum as a dot with a triangle made inside."""
    if not site.carries:
        return None
    y, axis = site.inputs[0], site.params["axis"]
    n = y.shape[axis]
    rows, columns = index((n, n), 0), index((n, n), 1)
    below = rows >= columns if site.params["reverse"] else rows <= columns
    triangle = lax.convert_element_type(below, y.dtype)
    y = lax.dot_general(y, triangle, (((axis,), (0,)), ((), ())))
    order = [*range(axis), y.ndim - 1, *range(axis, y.ndim - 1)]
    return lax.transpose(y, order)


@rewriting("sums", p.add_p)
def operands_of_add_swapped(site: Site) -> Operand | None:
    """``a + b`` as ``b + a``."""
    return site.bind(*site.inputs[::-1]) if site.carries else None


@rewriting("sums", p.add_p)
def add_as_subtraction(site: Site) -> Operand | None:
    """``a + b`` as ``a - (-b)``."""
    a, b = site.inputs
    return a - lax.neg(b) if site.carries else None


@rewriting("sums", p.sub_p)
def subtraction_as_add(site: Site) -> Operand | None:
    """``a - b`` as ``a + (-b)``."""
    a, b = site.inputs
    return a + lax.neg(b) if site.carries else None


@rewriting("sums", p.sub_p)
def subtraction_the_other_way(site: Site) -> Operand | None:
    """``a - b`` as ``-(b - a)``."""
    a, b = site.inputs
    return lax.neg(b - a) if site.carries else None


@rewriting("sums", p.add_p, documented=documented.of_biases)
def add_associated_right(site: Site) -> Operand | None:
    """``(a + b) + c`` as ``a + (b + c)``."""
    inner = site.producer(0, p.add_p)
    if not site.carries or inner is None or not inner.is_read_once():
        return None
    (a, b), c = inner.inputs, site.inputs[1]
    return a + (b + c)


@rewriting("sums", p.add_p, documented=documented.of_biases)
def add_associated_left(site: Site) -> Operand | None:
    """``a + (b + c)`` as ``(a + b) + c``."""
    inner = site.producer(1, p.add_p)
    if not site.carries or inner is None or not inner.is_read_once():
        return None
    a, (b, c) = site.inputs[0], inner.inputs
    return (a + b) + c


@rewriting("sums", p.add_p)
def add_as_sum_of_a_stack(site: Site) -> Operand | None:
    """``a + b`` as the sum of the two, stacked."""
    if not site.is_active(0) or not site.is_active(1) or not site.is_float:
        return None
    if any(np.shape(x) != site.shape for x in site.inputs):
        return None
    both = lax.concatenate([lax.expand_dims(x, (0,)) for x in site.inputs], 0)
    return p.reduce_sum_p.bind(both, axes=(0,), out_sharding=None)


@rewriting("sums", p.add_p)
def parameter_added_in_two_parts(site: Site) -> Operand | None:
    """A bias as a quarter and three quarters of it."""
    for i, j in itertools.permutations((0, 1)):
        if site.is_active(i) and site.is_parameter(j) and site.is_float:
            a, b = site.inputs[i], site.inputs[j]
            return (a + b * 0.25) + b * 0.75
    return None


@rewriting("sums", p.add_p, p.sub_p)
def literal_added_in_two_parts(site: Site) -> Operand | None:
    """A literal that is added, as two literals."""
    number = site.literal(1)
    if number is None or not site.is_active(0) or not site.is_float:
        return None
    return site.bind(site.bind(site.inputs[0], site.inputs[1] / 2), site.inputs[1] / 2)


@rewriting("sums", p.add_p, p.sub_p, p.mul_p, p.div_p)
def literal_as_an_array(site: Site) -> Operand | None:
    """A literal operand as an array made inside."""
    if not site.carries or not site.shape:
        return None
    inputs = list(site.inputs)
    for i in range(2):
        if (number := site.literal(i)) is not None:
            inputs[i] = ones(site.shape, site.dtype, number)
            return site.bind(*inputs)
    return None


@rewriting("sums", p.add_p, p.sub_p, p.mul_p, p.div_p)
def literal_computed(site: Site) -> Operand | None:
    """A literal operand as the result of arithmetic, not folded."""
    if not site.carries:
        return None
    inputs = list(site.inputs)
    for i in range(2):
        if (number := site.literal(i)) is not None and np.isfinite(number):
            two = lax.full((), 2.0, site.dtype)
            inputs[i] = lax.full((), number, site.dtype) * two / two
            if np.shape(site.inputs[i]) != () or site.shape:
                inputs[i] = lax.broadcast(inputs[i], site.shape)
            return site.bind(*inputs)
    return None
