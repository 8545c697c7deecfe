"""Rewritings of dense layers, convolutions and contractions."""

from __future__ import annotations

import numpy as np
from jax import lax
from jax.extend.core import primitives as p

from jlrp.ir.jax_compat import Operand
from jlrp.testing import documented
from jlrp.testing.rewriting import Site, rewriting
from jlrp.typing import Array


def _kernel(site: Site) -> int | None:
    """Which operand is a kernel: parameters, beside one that is active."""
    for i in range(2):
        if site.is_active(1 - i) and site.is_parameter(i) and site.is_float:
            return i
    return None


def _axes(site: Site, i: int) -> tuple[list[int], list[int], list[int]]:
    """The batch axes, the contracted and the free axes of an operand of a dot."""
    contracted, batch = site.params["dimension_numbers"]
    taken = {*contracted[i], *batch[i]}
    rest = [a for a in range(site.inputs[i].ndim) if a not in taken]
    return list(batch[i]), list(contracted[i]), rest


def _first_free_in_output(site: Site, i: int, axis: int) -> int:
    """Where a free axis of operand ``i`` is in the output of a dot."""
    batch, _, rest = _axes(site, i)
    start = len(batch) + (len(_axes(site, 0)[2]) if i else 0)
    return start + rest.index(axis)


def _replaced(site: Site, i: int, value: Operand) -> Array:
    inputs = list(site.inputs)
    inputs[i] = value
    return site.bind(*inputs)


@rewriting("dense", p.dot_general_p)
def kernel_split_by_outputs(site: Site) -> Operand | None:
    """A dense layer as two, which are concatenated along the output features."""
    if (i := _kernel(site)) is None or not (rest := _axes(site, i)[2]):
        return None
    kernel, axis = site.inputs[i], rest[-1]
    size = kernel.shape[axis]
    if size < 2:
        return None
    parts = [
        _replaced(site, i, lax.slice_in_dim(kernel, *ends, axis=axis))
        for ends in ((0, size // 2), (size // 2, size))
    ]
    return lax.concatenate(parts, _first_free_in_output(site, i, axis))


@rewriting("dense", p.dot_general_p)
def kernel_column_by_column(site: Site) -> Operand | None:
    """A dense layer as a stack of its output features."""
    if (i := _kernel(site)) is None or not (rest := _axes(site, i)[2]):
        return None
    kernel, axis = site.inputs[i], rest[-1]
    size = kernel.shape[axis]
    if not 2 <= size <= 8:
        return None
    parts = [
        _replaced(site, i, lax.slice_in_dim(kernel, n, n + 1, axis=axis))
        for n in range(size)
    ]
    return lax.concatenate(parts, _first_free_in_output(site, i, axis))


@rewriting("dense", p.dot_general_p, documented=documented.of_kernels)
def kernel_split_by_inputs(site: Site) -> Operand | None:
    """A dense layer as the sum of two, of the halves of its input features."""
    if (i := _kernel(site)) is None or not (along := _axes(site, i)[1]):
        return None
    return _halves_added(site, i, along[0])


@rewriting("dense", p.dot_general_p)
def contraction_in_halves(site: Site) -> Operand | None:
    """A contraction of two active values as the sum of two.

    Not of values that were joined: that is a sum of products of other values.
    """
    if not (site.is_active(0) and site.is_active(1) and site.is_float):
        return None
    if any(_was_joined(site, i) for i in range(2)):
        return None
    along = _axes(site, 0)[1]
    return _halves_added(site, 0, along[0]) if along else None


def _was_joined(site: Site, i: int) -> bool:
    made = site.producer(i, p.transpose_p, p.concatenate_p)
    while made is not None and made.primitive is p.transpose_p:
        made = made.producer(0, p.transpose_p, p.concatenate_p)
    return made is not None


def _halves_added(site: Site, i: int, axis: int) -> Operand | None:
    contracted, _ = site.params["dimension_numbers"]
    other = contracted[1 - i][contracted[i].index(axis)]
    size = site.inputs[i].shape[axis]
    if size < 2:
        return None

    def part(start: int, stop: int) -> Array:
        inputs = list(site.inputs)
        inputs[i] = lax.slice_in_dim(inputs[i], start, stop, axis=axis)
        inputs[1 - i] = lax.slice_in_dim(inputs[1 - i], start, stop, axis=other)
        return site.bind(*inputs)

    return part(0, size // 2) + part(size // 2, size)


@rewriting("dense", p.dot_general_p)
def dot_as_product_and_sum(site: Site) -> Operand | None:
    """A contraction as a broadcast product that is summed."""
    if not site.carries:
        return None
    batch, along, _ = _axes(site, 0)
    free = [_axes(site, i)[2] for i in range(2)]
    count = len(batch) + len(free[0]) + len(free[1])
    sizes = tuple(site.inputs[0].shape[a] for a in along)
    if np.prod((*site.shape, *sizes)) > 1e6:
        return None
    wide = []
    for i in range(2):
        batch, along, rest = _axes(site, i)
        start = len(batch) + (len(free[0]) if i else 0)
        place = {a: n for n, a in enumerate(batch)}
        place |= {a: start + n for n, a in enumerate(rest)}
        place |= {a: count + n for n, a in enumerate(along)}
        order = sorted(place, key=place.__getitem__)
        dims = tuple(place[a] for a in order)
        x = lax.transpose(site.inputs[i], order)
        wide.append(lax.broadcast_in_dim(x, (*site.shape, *sizes), dims))
    axes = tuple(range(count, count + len(sizes)))
    return p.reduce_sum_p.bind(wide[0] * wide[1], axes=axes, out_sharding=None)


@rewriting("dense", p.dot_general_p)
def operands_of_dot_swapped(site: Site) -> Operand | None:
    """``a @ b`` as the transpose of ``b.T @ a.T``."""
    if not site.carries:
        return None
    (left, right), (batch_left, batch_right) = site.params["dimension_numbers"]
    a, b = site.inputs
    numbers = ((right, left), (batch_right, batch_left))
    y = site.bind(b, a, dimension_numbers=numbers)
    batch, frees = len(batch_left), [len(_axes(site, i)[2]) for i in range(2)]
    first = range(batch + frees[1], batch + frees[1] + frees[0])
    order = [*range(batch), *first, *range(batch, batch + frees[1])]
    return lax.transpose(y, order)


@rewriting("dense", p.dot_general_p)
def dot_of_transposed_operands(site: Site) -> Operand | None:
    """A contraction of operands whose axes are in reversed order."""
    if not site.carries:
        return None
    (left, right), (batch_left, batch_right) = site.params["dimension_numbers"]
    a, b = (lax.transpose(x, range(x.ndim)[::-1]) for x in site.inputs)
    flip = lambda axes, x: tuple(x.ndim - 1 - n for n in axes)  # noqa: E731
    numbers = (
        (flip(left, a), flip(right, b)),
        (flip(batch_left, a), flip(batch_right, b)),
    )
    y = site.bind(a, b, dimension_numbers=numbers)
    batch, frees = len(batch_left), [len(_axes(site, i)[2]) for i in range(2)]
    first = range(batch, batch + frees[0])
    second = range(batch + frees[0], batch + sum(frees))
    return lax.transpose(y, [*range(batch), *first[::-1], *second[::-1]])


@rewriting("dense", p.dot_general_p)
def dot_of_merged_rows(site: Site) -> Operand | None:
    """A dense layer on several axes as one on their product."""
    if (i := _kernel(site)) is None:
        return None
    batch, along, rest = _axes(site, 1 - i)
    if batch or len(rest) < 2:
        return None
    x = site.inputs[1 - i]
    x = lax.transpose(x, [*rest, *along])
    sizes = [x.shape[n] for n in range(len(rest))]
    x = lax.reshape(x, (int(np.prod(sizes)), *x.shape[len(rest) :]))
    contracted = list(site.params["dimension_numbers"][0])
    contracted[1 - i] = tuple(range(1, 1 + len(along)))
    inputs = list(site.inputs)
    inputs[1 - i] = x
    y = site.bind(*inputs, dimension_numbers=(tuple(contracted), ((), ())))
    return lax.reshape(y, site.shape)


@rewriting("dense", p.dot_general_p)
def rows_computed_apart(site: Site) -> Operand | None:
    """A dense layer on each row of its input, which are concatenated."""
    if (i := _kernel(site)) is None:
        return None
    batch, _, rest = _axes(site, 1 - i)
    if batch or not rest or not 1 <= site.inputs[1 - i].shape[rest[0]] <= 6:
        return None
    x, axis = site.inputs[1 - i], rest[0]
    parts = [
        _replaced(site, 1 - i, lax.slice_in_dim(x, n, n + 1, axis=axis))
        for n in range(x.shape[axis])
    ]
    return lax.concatenate(parts, _first_free_in_output(site, 1 - i, axis))


@rewriting("dense", p.dot_general_p)
def kernel_scaled_and_back(site: Site) -> Operand | None:
    """A dense layer of twice the kernel, halved."""
    if (i := _kernel(site)) is None:
        return None
    return _replaced(site, i, site.inputs[i] * 2.0) * 0.5


@rewriting("dense", p.dot_general_p, documented=documented.of_negations)
def kernel_negated_and_back(site: Site) -> Operand | None:
    """A dense layer of the negative kernel, negated."""
    if (i := _kernel(site)) is None:
        return None
    return -_replaced(site, i, -site.inputs[i])


@rewriting("dense", p.sub_p)
def minus_into_kernel(site: Site) -> Operand | None:
    """``c - x @ w`` as ``c + x @ (-w)``."""
    inner = site.producer(1, p.dot_general_p, p.conv_general_dilated_p)
    if not site.carries or inner is None or not inner.is_read_once():
        return None
    if (i := _kernel(inner)) is None:
        return None
    return site.inputs[0] + _replaced(inner, i, -inner.inputs[i])


@rewriting("dense", p.add_p)
def plus_as_minus_of_negative_kernel(site: Site) -> Operand | None:
    """``c + x @ w`` as ``c - x @ (-w)``."""
    inner = site.producer(1, p.dot_general_p, p.conv_general_dilated_p)
    if not site.carries or inner is None or not inner.is_read_once():
        return None
    if (i := _kernel(inner)) is None:
        return None
    return site.inputs[0] - _replaced(inner, i, -inner.inputs[i])


@rewriting("dense", p.neg_p)
def negation_into_kernel(site: Site) -> Operand | None:
    """``-(x @ w)`` as ``x @ (-w)``."""
    inner = site.producer(0, p.dot_general_p, p.conv_general_dilated_p)
    if not site.carries or inner is None or not inner.is_read_once():
        return None
    if (i := _kernel(inner)) is None:
        return None
    return _replaced(inner, i, -inner.inputs[i])


@rewriting("dense", p.add_p)
def bias_before_concatenation(site: Site) -> Operand | None:
    """A dense layer with bias as two with the halves of it, concatenated."""
    for j in range(2):
        wide = site.producer(1 - j, p.broadcast_in_dim_p, p.reshape_p)
        inner = site.producer(j, p.dot_general_p)
        if not site.carries or wide is None or inner is None:
            continue
        i = _kernel(inner)
        if i is None or not inner.is_read_once() or not site.is_parameter(1 - j):
            continue
        if np.shape(site.inputs[1 - j]) != site.shape or not _axes(inner, i)[2]:
            continue
        kernel, axis = inner.inputs[i], _axes(inner, i)[2][-1]
        size, out = kernel.shape[axis], _first_free_in_output(inner, i, axis)
        if size < 2:
            continue
        parts = [
            _replaced(inner, i, lax.slice_in_dim(kernel, *ends, axis=axis))
            + lax.slice_in_dim(site.inputs[1 - j], *ends, axis=out)
            for ends in ((0, size // 2), (size // 2, size))
        ]
        return lax.concatenate(parts, out)
    return None


_CONV = p.conv_general_dilated_p


@rewriting("dense", _CONV)
def conv_in_another_layout(site: Site) -> Operand | None:
    """A convolution with the axes of all operands and of the output reversed."""
    if not site.carries:
        return None
    numbers = site.params["dimension_numbers"]
    x, kernel = (lax.transpose(v, range(v.ndim)[::-1]) for v in site.inputs)
    flip = lambda spec: tuple(len(spec) - 1 - n for n in spec)  # noqa: E731
    flipped = lax.ConvDimensionNumbers(*map(flip, numbers))
    y = site.bind(x, kernel, dimension_numbers=flipped)
    return lax.transpose(y, range(y.ndim)[::-1])


@rewriting("dense", _CONV)
def conv_channels_first(site: Site) -> Operand | None:
    """A convolution with its channels before its spatial axes, or behind them."""
    if not site.carries:
        return None
    numbers = site.params["dimension_numbers"]
    rank = len(site.shape)
    first = tuple(range(rank))
    last = (0, rank - 1, *range(1, rank - 1))
    to = last if numbers.lhs_spec == first else first
    # Axis n of the specs is at to[n] afterwards: the transposes say where it was.
    move = lambda spec: [spec[to.index(a)] for a in range(rank)]  # noqa: E731
    x = lax.transpose(site.inputs[0], move(numbers.lhs_spec))
    kernel = lax.transpose(site.inputs[1], move(numbers.rhs_spec))
    y = site.bind(x, kernel, dimension_numbers=lax.ConvDimensionNumbers(to, to, to))
    order = [to[numbers.out_spec.index(a)] for a in range(rank)]
    return lax.transpose(y, order)


@rewriting("dense", _CONV)
def conv_split_by_outputs(site: Site) -> Operand | None:
    """A convolution as two, which are concatenated along the output channels."""
    groups = (site.params["feature_group_count"], site.params["batch_group_count"])
    if _kernel(site) != 1 or groups != (1, 1):
        return None
    numbers = site.params["dimension_numbers"]
    axis, kernel = numbers.rhs_spec[0], site.inputs[1]
    size = kernel.shape[axis]
    if size < 2:
        return None
    parts = [
        _replaced(site, 1, lax.slice_in_dim(kernel, *ends, axis=axis))
        for ends in ((0, size // 2), (size // 2, size))
    ]
    return lax.concatenate(parts, numbers.out_spec[1])


@rewriting("dense", _CONV)
def conv_padded_before(site: Site) -> Operand | None:
    """A convolution of what was padded with zeros before."""
    padding = site.params["padding"]
    if not site.carries or not any(n > 0 for pair in padding for n in pair):
        return None
    if any(n < 0 for pair in padding for n in pair):
        return None
    if any(n != 1 for n in site.params["lhs_dilation"]):
        return None
    spec = site.params["dimension_numbers"].lhs_spec
    config = [(0, 0, 0)] * len(spec)
    for axis, (low, high) in zip(spec[2:], padding, strict=True):
        config[axis] = (low, high, 0)
    x = lax.pad(site.inputs[0], np.zeros((), site.dtype), config)
    return site.bind(x, site.inputs[1], padding=((0, 0),) * len(padding))


@rewriting("dense", _CONV, documented=documented.of_layer_kinds)
def conv_of_one_pixel_as_dot(site: Site) -> Operand | None:
    """A convolution with a window of one pixel as a dot."""
    params = site.params
    numbers = params["dimension_numbers"]
    x, kernel = site.inputs
    sizes = [kernel.shape[a] for a in numbers.rhs_spec[2:]]
    plain = (
        _kernel(site) == 1
        and set(sizes) <= {1}
        and set(params["window_strides"]) <= {1}
        and not any(n for pair in params["padding"] for n in pair)
        and (params["feature_group_count"], params["batch_group_count"]) == (1, 1)
        and set(params["lhs_dilation"]) <= {1}
    )
    if not plain:
        return None
    matrix = lax.transpose(kernel, numbers.rhs_spec)
    matrix = lax.reshape(matrix, matrix.shape[:2])  # outputs, inputs
    lhs, out = numbers.lhs_spec, numbers.out_spec
    y = lax.dot_general(x, matrix, (((lhs[1],), (1,)), ((), ())))
    rest = [a for a in range(x.ndim) if a != lhs[1]]
    made = {lhs.index(a): n for n, a in enumerate(rest)}
    made[1] = x.ndim - 1
    return lax.transpose(y, [made[out.index(a)] for a in range(x.ndim)])


@rewriting("dense", _CONV)
def conv_with_one_axis_more(site: Site) -> Operand | None:
    """A convolution with a spatial axis more, of size 1."""
    if not site.carries:
        return None
    params = site.params
    numbers, rank = params["dimension_numbers"], len(site.shape)
    x, kernel = (lax.expand_dims(v, (v.ndim,)) for v in site.inputs)
    more = lax.ConvDimensionNumbers(*((*spec, rank) for spec in numbers))
    y = site.bind(
        x,
        kernel,
        dimension_numbers=more,
        window_strides=(*params["window_strides"], 1),
        padding=(*params["padding"], (0, 0)),
        lhs_dilation=(*params["lhs_dilation"], 1),
        rhs_dilation=(*params["rhs_dilation"], 1),
    )
    return lax.squeeze(y, (rank,))
