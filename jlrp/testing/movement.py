"""Rewritings that only move numbers: there and back again, or by another primitive."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import primitives as p

from jlrp.ir.jax_compat import Operand
from jlrp.testing.rewriting import OfEquation, Site, rewriting
from jlrp.typing import Array

Move = Callable[[Operand], Operand]

ELEMENTWISE = frozenset(
    getattr(p, f"{name}_p")
    for name in (
        "abs acos acosh add and asin asinh atan atan2 atanh cbrt ceil clamp cos cosh "
        "div eq erf erf_inv erfc exp exp2 expm1 floor ge gt integer_pow is_finite le "
        "lgamma log log1p logistic lt max min mul ne neg not or pow rem round rsqrt "
        "select_n sign sin sinh sqrt square sub tan tanh xor"
    ).split()
    if hasattr(p, f"{name}_p")
)


def round_trip(move: Move, least: int = 0) -> Callable[[Site], Operand | None]:
    """A rewriting of every active value of at least so many axes, by an identity."""

    def after(site: Site) -> Operand | None:
        if len(site.eqn.outvars) != 1 or not site.carries or len(site.shape) < least:
            return None
        if 0 in site.shape or site.primitive in _BODIES:
            return None
        return move(site.computed()[0])

    return after


_BODIES = {
    *(p.jit_p, p.closed_call_p, p.custom_jvp_call_p, p.custom_vjp_call_p),
    *(p.remat_p, p.scan_p, p.while_p, p.cond_p),
}


def round_trips(family: str, least: int = 0) -> Callable[[Move], OfEquation]:
    """Register an identity as a rewriting of every active value."""

    def register(move: Move) -> OfEquation:
        after = round_trip(move, least)
        after.__name__, after.__doc__ = move.__name__, move.__doc__
        return rewriting(family)(after)

    return register


def index(shape: tuple[int, ...], axis: int = 0) -> Array:
    """0, 1, 2 ... along an axis, made inside."""
    return lax.broadcasted_iota(np.int32, shape, axis)


@round_trips("movement", least=1)
def reshaped_and_back(y: Operand) -> Operand:
    """Every value flattened, and back in shape."""
    return lax.reshape(lax.reshape(y, (y.size,)), y.shape)


@round_trips("movement", least=2)
def transposed_and_back(y: Operand) -> Operand:
    """Every value transposed twice."""
    order = tuple(range(y.ndim))[::-1]
    return lax.transpose(lax.transpose(y, order), order)


@round_trips("movement", least=1)
def reversed_twice(y: Operand) -> Operand:
    """Every value reversed twice along its last axis."""
    return lax.rev(lax.rev(y, (y.ndim - 1,)), (y.ndim - 1,))


@round_trips("movement")
def axis_added_and_dropped(y: Operand) -> Operand:
    """Every value with an axis more, then without."""
    return lax.squeeze(lax.expand_dims(y, (0,)), (0,))


@round_trips("movement", least=1)
def split_and_joined(y: Operand) -> Operand:
    """Every value cut in two along its last axis, and concatenated."""
    half = y.shape[-1] // 2
    if not half:
        return lax.concatenate([y], y.ndim - 1)
    low = lax.slice_in_dim(y, 0, half, axis=-1)
    high = lax.slice_in_dim(y, half, y.shape[-1], axis=-1)
    return lax.concatenate([low, high], y.ndim - 1)


@round_trips("movement", least=1)
def unstacked_and_stacked(y: Operand) -> Operand:
    """Every value taken apart along its first axis, of up to 8, and stacked."""
    if y.shape[0] > 8:
        return lax.concatenate([y], 0)
    return jnp.stack([y[i] for i in range(y.shape[0])])


@round_trips("movement", least=1)
def rows_concatenated(y: Operand) -> Operand:
    """Every value cut into rows along its first axis, of up to 8, and concatenated."""
    if y.shape[0] > 8:
        return lax.concatenate([y], 0)
    rows = [lax.slice_in_dim(y, i, i + 1) for i in range(y.shape[0])]
    return lax.concatenate(rows, 0)


@round_trips("movement")
def stacked_and_taken(y: Operand) -> Operand:
    """Every value stacked on itself; one of the two is read."""
    return lax.index_in_dim(jnp.stack([y, y]), 1, keepdims=False)


@round_trips("movement")
def broadcast_and_taken(y: Operand) -> Operand:
    """Every value broadcast along a new axis; one of the copies is read."""
    copies = lax.broadcast_in_dim(y, (2, *y.shape), tuple(range(1, y.ndim + 1)))
    return lax.squeeze(lax.slice_in_dim(copies, 0, 1), (0,))


@round_trips("movement", least=1)
def padded_and_cut(y: Operand) -> Operand:
    """Every value padded with zeros that are cut off again."""
    wide = lax.pad(y, np.zeros((), y.dtype), [(1, 2, 0)] * y.ndim)
    return lax.slice(wide, (1,) * y.ndim, tuple(n + 1 for n in y.shape))


@round_trips("movement", least=1)
def zeros_joined_and_cut(y: Operand) -> Operand:
    """Every value concatenated with zeros that are cut off again."""
    wide = lax.concatenate([y, lax.full_like(y, 0.0)], 0)
    return lax.slice_in_dim(wide, 0, y.shape[0])


@round_trips("movement", least=1)
def sliced_dynamically(y: Operand) -> Operand:
    """Every value by a dynamic slice that starts at 0."""
    return lax.dynamic_slice(y, (0,) * y.ndim, y.shape)


@round_trips("movement", least=1)
def updated_into_zeros(y: Operand) -> Operand:
    """Every value written over zeros."""
    return lax.dynamic_update_slice(lax.full_like(y, 0.0), y, (0,) * y.ndim)


@round_trips("movement", least=1)
def gathered_in_order(y: Operand) -> Operand:
    """Every value gathered by the indices 0, 1, 2 ... of its first axis."""
    return y[index((y.shape[0],))]


@round_trips("movement", least=1)
def gathered_backwards_twice(y: Operand) -> Operand:
    """Every value gathered in reversed order, twice."""
    backwards = y.shape[-1] - 1 - index((y.shape[-1],))
    return y[..., backwards][..., backwards]


@round_trips("movement", least=1)
def scattered_into_zeros(y: Operand) -> Operand:
    """Every value scattered over zeros, row by row."""
    return lax.full_like(y, 0.0).at[index((y.shape[0],))].set(y)


@round_trips("movement")
def selected_always(y: Operand) -> Operand:
    """Every value selected by a mask that is always true."""
    mask = lax.full(y.shape, True)
    return lax.select(mask, y, lax.full_like(y, 0.0))


@round_trips("movement")
def behind_a_barrier(y: Operand) -> Operand:
    """Every value behind an optimization barrier."""
    return lax.optimization_barrier(y)


@round_trips("movement")
def copied(y: Operand) -> Operand:
    """Every value copied."""
    return p.copy_p.bind(y)


@round_trips("movement")
def through_complex(y: Operand) -> Operand:
    """Every value made complex, and its real part taken."""
    return lax.real(lax.complex(y, lax.full_like(y, 0.0)))


def _wide(site: Site) -> list[Operand] | None:
    """The operands of an elementwise equation that carries, but scalars, in full."""
    if not site.carries or not site.shape or 0 in site.shape:
        return None
    everywhere = tuple(range(len(site.shape)))
    return [
        lax.broadcast_in_dim(x, site.shape, everywhere) if np.ndim(x) else x
        for x in site.inputs
    ]


def _moved(site: Site, move: Move, back: Move) -> Operand | None:
    """An elementwise equation on moved operands, its output moved back."""
    if (inputs := _wide(site)) is None:
        return None
    return back(site.bind(*(move(x) if np.ndim(x) else x for x in inputs)))


@rewriting("movement", *ELEMENTWISE)
def computed_flat(site: Site) -> Operand | None:
    """Elementwise functions of flattened operands."""
    flat = (int(np.prod(site.shape)),)
    return _moved(
        site, lambda x: lax.reshape(x, flat), lambda y: lax.reshape(y, site.shape)
    )


@rewriting("movement", *ELEMENTWISE)
def computed_transposed(site: Site) -> Operand | None:
    """Elementwise functions of transposed operands."""
    if len(site.shape) < 2:
        return None
    order = tuple(range(len(site.shape)))[::-1]
    return _moved(
        site, lambda x: lax.transpose(x, order), lambda y: lax.transpose(y, order)
    )


@rewriting("movement", *ELEMENTWISE)
def computed_in_halves(site: Site) -> Operand | None:
    """Elementwise functions of two halves, which are concatenated."""
    if (inputs := _wide(site)) is None or site.shape[-1] < 2:
        return None
    half, axis = site.shape[-1] // 2, len(site.shape) - 1

    def part(start: int, stop: int) -> Array:
        ends = (start, stop)
        cut = [lax.slice_in_dim(x, *ends, axis=-1) if np.ndim(x) else x for x in inputs]
        return site.bind(*cut)

    return lax.concatenate([part(0, half), part(half, site.shape[-1])], axis)


@rewriting("movement", *ELEMENTWISE)
def computed_by_vmap(site: Site) -> Operand | None:
    """Elementwise functions mapped over the last axis."""
    if (inputs := _wide(site)) is None:
        return None
    axis = len(site.shape) - 1
    axes = [axis if np.ndim(x) else None for x in inputs]
    return jax.vmap(site.bind, axes, axis)(*inputs)


@rewriting("movement", p.slice_p)
def slice_gathered(site: Site) -> Operand | None:
    """A slice as a gather of constant indices."""
    if not site.is_float:
        return None
    (y,), params = site.inputs, site.params
    strides = params["strides"] or (1,) * len(site.shape)
    for axis, (start, step) in enumerate(
        zip(params["start_indices"], strides, strict=True)
    ):
        if site.shape[axis] == y.shape[axis]:
            continue
        at = index((site.shape[axis],)) * np.int32(step) + np.int32(start)
        y = y[(slice(None),) * axis + (at,)]
    return y


@rewriting("movement", p.slice_p)
def slice_started_dynamically(site: Site) -> Operand | None:
    """A slice as a dynamic slice with constant starts."""
    strides = site.params["strides"]
    if not site.is_float or (strides and set(strides) != {1}):
        return None
    return lax.dynamic_slice(site.inputs[0], site.params["start_indices"], site.shape)


@rewriting("movement", p.slice_p)
def slice_split(site: Site) -> Operand | None:
    """A slice as one part of a split."""
    if not site.is_float or site.params["strides"] not in (
        None,
        (1,) * len(site.shape),
    ):
        return None
    y = site.inputs[0]
    for axis, start in enumerate(site.params["start_indices"]):
        size, stop = y.shape[axis], start + site.shape[axis]
        sizes = [n for n in (start, stop - start, size - stop) if n]
        if len(sizes) > 1:
            y = lax.split(y, sizes, axis)[bool(start)]
    return y


@rewriting("movement", p.concatenate_p)
def concatenate_padded_and_added(site: Site) -> Operand | None:
    """A concatenation as a sum of padded parts."""
    if not site.carries:
        return None
    axis, total, start = site.params["dimension"], None, 0
    zero = np.zeros((), site.dtype)
    for part in site.inputs:
        config = [(0, 0, 0)] * len(site.shape)
        stop = start + part.shape[axis]
        config[axis] = (start, site.shape[axis] - stop, 0)
        padded, start = lax.pad(part, zero, config), stop
        total = padded if total is None else total + padded
    return total


@rewriting("movement", p.concatenate_p)
def concatenate_written(site: Site) -> Operand | None:
    """A concatenation as parts written over zeros."""
    if not site.carries:
        return None
    axis, start = site.params["dimension"], 0
    y = lax.full(site.shape, 0.0, site.dtype)
    for part in site.inputs:
        starts = [0] * len(site.shape)
        starts[axis] = start
        y, start = lax.dynamic_update_slice(y, part, starts), start + part.shape[axis]
    return y


@rewriting("movement", p.concatenate_p)
def concatenate_the_other_way(site: Site) -> Operand | None:
    """A concatenation of reversed parts, reversed."""
    if not site.carries:
        return None
    axis = (site.params["dimension"],)
    parts = [lax.rev(part, axis) for part in site.inputs[::-1]]
    return lax.rev(lax.concatenate(parts, axis[0]), axis)


@rewriting("movement", p.broadcast_in_dim_p)
def broadcast_by_reshape_first(site: Site) -> Operand | None:
    """A broadcast of what has its axes already, of size 1."""
    if not site.is_float or len(site.inputs) != 1 or not site.shape:
        return None
    (y,), dims = site.inputs, site.params["broadcast_dimensions"]
    shape = [1] * len(site.shape)
    for axis, size in zip(dims, np.shape(y), strict=True):
        shape[axis] = size
    everywhere = tuple(range(len(shape)))
    return lax.broadcast_in_dim(lax.reshape(y, shape), site.shape, everywhere)


@rewriting("movement", p.broadcast_in_dim_p)
def broadcast_times_ones(site: Site) -> Operand | None:
    """A broadcast as an outer product with ones."""
    if not site.carries or len(site.inputs) != 1:
        return None
    return site.computed()[0] * lax.full(site.shape, 1.0, site.dtype)


@rewriting("movement", p.broadcast_in_dim_p)
def broadcast_concatenated(site: Site) -> Operand | None:
    """A broadcast along one axis as a concatenation of copies."""
    if not site.carries or len(site.inputs) != 1:
        return None
    (y,), dims = site.inputs, site.params["broadcast_dimensions"]
    shape = [1] * len(site.shape)
    for axis, size in zip(dims, np.shape(y), strict=True):
        shape[axis] = size
    y = lax.reshape(y, shape)
    for axis, size in enumerate(site.shape):
        if shape[axis] != size:
            y = lax.concatenate([y] * size, axis)
    return y


@rewriting("movement", p.reshape_p)
def reshape_through_flat(site: Site) -> Operand | None:
    """A reshape in two steps."""
    if not site.is_float or not site.shape:
        return None
    y = site.inputs[0]
    return lax.reshape(lax.reshape(y, (y.size,)), site.shape)


@rewriting("movement", p.transpose_p)
def transpose_in_steps(site: Site) -> Operand | None:
    """A transpose of three axes or more as swaps of two, one after the other."""
    order = list(site.params["permutation"])
    if not site.is_float or sum(n != a for n, a in enumerate(order)) < 3:
        return None
    y, now = site.inputs[0], list(range(len(order)))
    for at, axis in enumerate(order):
        other = now.index(axis)
        if other != at:
            y = jnp.swapaxes(y, at, other)
            now[at], now[other] = now[other], now[at]
    return y
