"""Transposes and derivatives that are a few equations, written down.

``jax.linear_transpose`` and ``jax.vjp`` trace the operation again, which takes longer
than all else that a sum, a dot or a softmax costs: on a transformer, a third of the
tracing time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import primitives as p

from jlrp.ir import jax_compat
from jlrp.ir.primitives import traits
from jlrp.ir.program import Atom, Equation, Value
from jlrp.ops.base import Operation
from jlrp.promise import number, zeros_like
from jlrp.tactics import depend_on

Array = jax.Array


class Reader(Protocol):
    @property
    def arrived(self) -> Array | None: ...

    def read(self, atom: Atom) -> Array: ...

    def shape_of(self, value: Value) -> jax.ShapeDtypeStruct: ...


def direct_transpose(
    op: Operation, cotangents: Sequence[Array | None], numbers: Reader
) -> list[Array] | None:
    """The transpose of a linear operation, or None: take JAX's."""
    if op.affine is not None:
        return _direct_affine(op, cotangents, numbers)
    moving, still = set(op.inputs), {}

    def read(atom: Atom) -> Array:
        return still[atom] if atom in still else numbers.read(atom)

    for equation in op.equations:
        if not moving.isdisjoint(equation.inputs):
            moving.update(equation.outputs)
        elif traits(equation).scaling:  # scales, before they are one
            args = [read(a) for a in equation.inputs]
            outs = jax_compat.bind(equation.primitive, equation.params, args)
            still.update(zip(equation.outputs, outs, strict=True))
        else:
            return None
    arrived = zip(op.outputs, cotangents, strict=True)
    pending = {v: m for v, m in arrived if m is not None}
    for equation in reversed(op.equations):
        arriving = [pending.pop(v, None) for v in equation.outputs]
        if all(m is None for m in arriving):
            continue
        transpose = _DIRECT.get(equation.primitive.name)
        if transpose is None or not _has_one_dtype(equation, moving):
            return None
        handed = transpose(equation, moving, arriving, read)
        if handed is None:
            return None
        for value, m in handed:
            pending[value] = lax.add(pending[value], m) if value in pending else m
    return [
        pending[v] if v in pending else jnp.zeros_like(numbers.shape_of(v))
        for v in op.inputs
    ]


def _has_one_dtype(equation: Equation, moving: set[Value]) -> bool:
    dtype = equation.outputs[0].dtype
    values = (a for a in (*equation.inputs, *equation.outputs) if a in moving)
    return all(v.dtype == dtype for v in values)


def direct_vjp(
    op: Operation, cotangents: Sequence[Array | None], numbers: Reader
) -> list[Array] | None:
    """The transpose of an operation's derivative, or None: take JAX's."""
    m = cotangents[0]
    if m is None or numbers.shape_of(op.inputs[0]).dtype != m.dtype:
        return None
    if op.softmax is not None and op.softmax.axes is not None:
        return [_softmax_vjp(op, m, numbers)]
    if len(op.equations) == 1 and op.equations[0].primitive in _WINNERS:
        return _pooling_vjp(op.equations[0], m, numbers)
    return None


def _softmax_vjp(op: Operation, m: Array, numbers: Reader) -> Array:
    """``y (m - sum y m)``."""
    y = numbers.read(op.outputs[0])
    assert op.softmax is not None and op.softmax.axes is not None
    axes = op.softmax.axes
    if "masked" in op.facts:  # a row in which all is masked is no number
        y = lax.select(lax.ne(y, y), lax.full_like(y, 0), y)
    mean = lax.reduce_sum(lax.mul(y, m), axes)
    kept = tuple(i for i in range(y.ndim) if i not in axes)
    spread = lax.broadcast_in_dim(mean, y.shape, kept)
    return lax.mul(y, lax.sub(m, spread))


_WINNERS = {p.reduce_window_max_p: p.ge_p, p.reduce_window_min_p: p.le_p}


def _pooling_vjp(equation: Equation, m: Array, numbers: Reader) -> list[Array] | None:
    """To the winner of each window, as JAX chooses it."""
    params = dict(equation.params)
    dilations = params.pop("base_dilation"), params.pop("window_dilation")
    if any(n != 1 for dilation in dilations for n in dilation):
        return None
    x = numbers.read(equation.inputs[0])
    winner = _WINNERS[equation.primitive]
    return [p.select_and_scatter_add_p.bind(m, x, select_prim=winner, **params)]


def dot_transpose(
    params: dict[str, Any], m: Array, other: Array, side: int, shape: tuple[int, ...]
) -> Array:
    """The transpose of a ``dot_general`` by one of its operands, given the other.

    Args:
      m: cotangent of the output.
      side: which operand is wanted: 0 the left, 1 the right.
      shape: of the wanted operand.
    """
    contracting, batch = params["dimension_numbers"]
    mine, its = contracting[side], contracting[1 - side]
    my_batch, its_batch = batch[side], batch[1 - side]
    my_free = [i for i in range(len(shape)) if i not in mine and i not in my_batch]
    its_free = [i for i in range(other.ndim) if i not in its and i not in its_batch]
    n, left = len(my_batch), my_free if side == 0 else its_free
    of_left = list(range(n, n + len(left)))
    of_right = list(range(n + len(left), m.ndim))
    of_its = of_right if side == 0 else of_left
    order = sorted(range(len(its)), key=its.__getitem__)
    kept = sorted(its)
    if not n and _are_beside(its_free) and _are_beside(kept):
        # As a matrix: XLA would copy a kernel to bring several axes in order.
        out = _by_matrix(params, m, of_its, other, its_free, kept)
    else:
        out = lax.dot_general(
            m,
            other,
            ((of_its, its_free), (list(range(n)), its_batch)),
            precision=params["precision"],
        )
    # Its axes: the batch, mine that are free, and the contracted by the other's order.
    axes = [*my_batch, *my_free, *(mine[k] for k in order)]
    if axes == sorted(axes):
        return out
    return lax.transpose(out, sorted(range(len(axes)), key=axes.__getitem__))


def _are_beside(axes: list[int]) -> bool:
    return bool(axes) and axes[-1] - axes[0] + 1 == len(axes)


def _by_matrix(
    params: dict[str, Any],
    m: Array,
    of_its: list[int],
    other: Array,
    summed: list[int],
    kept: list[int],
) -> Array:
    """The product of m and ``other``, over axes of m that are beside each other."""
    sizes = [other.shape[axis] for axis in kept]
    total = math.prod(other.shape[axis] for axis in summed)
    first, last = of_its[0], of_its[-1]
    matrix = [total, math.prod(sizes)]
    if kept[0] < summed[0]:
        matrix.reverse()
    out = lax.dot_general(
        _reshaped(m, (*m.shape[:first], total, *m.shape[last + 1 :])),
        _reshaped(other, matrix),
        (([first], [0 if summed[0] < kept[0] else 1]), ([], [])),
        precision=params["precision"],
    )
    return _reshaped(out, (*out.shape[:-1], *sizes))


def _reshaped(x: Array, shape: Sequence[int]) -> Array:
    return x if x.shape == tuple(shape) else lax.reshape(x, shape)


def direct_product_vjp(
    op: Operation, m: Array, operands: Sequence[Array], taking: Sequence[int]
) -> list[Array] | None:
    """Cotangents of some operands of a product of two, or None: take JAX's."""
    (equation,) = op.equations
    prim = equation.primitive
    if any(operand.dtype != m.dtype for operand in operands):
        return None
    if prim is p.dot_general_p:
        return [
            dot_transpose(equation.params, m, operands[1 - i], i, operands[i].shape)
            for i in taking
        ]
    if prim is p.mul_p and operands[0].shape == operands[1].shape == m.shape:
        return [lax.mul(m, operands[1 - i]) for i in taking]
    return None


def conv_transpose(
    params: dict[str, Any],
    m: Array,
    kernel: Array,
    shape: tuple[int, ...],
    arrived: Array | None = None,
) -> Array | None:
    """The transpose of a convolution by its input, of a shape; None: take JAX's.

    A convolution of ``m``, dilated by the strides, with the kernel reversed when
    relevance has arrived.
    """
    if params["batch_group_count"] > 1:
        return None
    of_x, of_kernel, of_out = params["dimension_numbers"]
    groups = params["feature_group_count"]
    padding = [
        _transposed_padding(*sizes)
        for sizes in zip(
            (shape[axis] for axis in of_x[2:]),
            (kernel.shape[axis] for axis in of_kernel[2:]),
            (m.shape[axis] for axis in of_out[2:]),
            params["window_strides"],
            params["padding"],
            params["lhs_dilation"],
            params["rhs_dilation"],
            strict=True,
        )
    ]
    if groups > 1:  # of each group apart, outputs become inputs
        kernel = lax.transpose(kernel, of_kernel)
        outs, ins, *space = kernel.shape
        kernel = lax.reshape(kernel, (groups, outs // groups, ins, *space))
        kernel = lax.transpose(kernel, (1, 0, *range(2, kernel.ndim)))
        kernel = lax.reshape(kernel, (outs // groups, groups * ins, *space))
        of_kernel = range(kernel.ndim)
    outs, ins, *space = of_kernel
    kernel = depend_on(kernel, after=arrived)
    return lax.conv_general_dilated(
        m,
        lax.rev(kernel, space),
        window_strides=params["lhs_dilation"],
        padding=padding,
        lhs_dilation=params["window_strides"],
        rhs_dilation=params["rhs_dilation"],
        dimension_numbers=lax.ConvDimensionNumbers(
            tuple(of_out), (ins, outs, *space), tuple(of_x)
        ),
        feature_group_count=groups,
        precision=params["precision"],
    )


def _transposed_padding(
    x: int,
    kernel: int,
    out: int,
    stride: int,
    padding: tuple[int, int],
    dilation: int,
    of_kernel: int,
) -> tuple[int, int]:
    window = (kernel - 1) * of_kernel + 1
    before = window - 1 - padding[0]
    after = (x - 1) * dilation + window - 1 - (out - 1) * stride - before
    return before, after


def core_transpose(
    primitive: Any,
    params: dict[str, Any],
    operand: int,
    m: Array,
    kernel: Array,
    shape: tuple[int, ...],
    arrived: Array | None,
) -> Array | None:
    """The transpose of a dot or convolution by its input, of a shape."""
    if primitive is p.dot_general_p:
        return dot_transpose(params, m, kernel, operand, shape)
    if primitive is p.conv_general_dilated_p and operand == 0:
        return conv_transpose(params, m, kernel, shape, arrived)
    return None


def _direct_affine(
    op: Operation, cotangents: Sequence[Array | None], numbers: Reader
) -> list[Array] | None:
    """A dot or convolution by a parameter, scaled and shifted, its axes kept."""
    affine, (m,) = op.affine, cotangents
    if affine is None or m is None or affine.of_kernel:
        return None
    kernel = numbers.read(affine.kernel)
    start = numbers.shape_of(affine.start)
    if not kernel.dtype == m.dtype == start.dtype:
        return None
    for step in reversed(affine.steps):
        if step.kind == "move" or step.source.shape != m.shape:
            return None
        if step.kind == "scale":
            reads = step.equation.inputs
            args = [m if a is step.source else numbers.read(a) for a in reads]
            (m,) = jax_compat.bind(
                step.equation.primitive, jax_compat.widened(step.equation.params), args
            )
        elif step.negates:
            m = lax.neg(m)
    core = affine.core.primitive, jax_compat.widened(affine.core.params), affine.operand
    x = core_transpose(*core, m, kernel, start.shape, numbers.arrived)
    return None if x is None else [x]


# Transposes of equations. The operands in ``moving`` are those that an equation is
# linear in: each is handed a cotangent, made of those that arrived for the outputs
# (None for zero). If nothing is handed, it is not so simple: JAX's is taken.

Handed = Sequence[tuple[Any, Array]] | None
Moving = set[Value]
Arriving = Sequence[Any]
Read = Callable[[Atom], Array]


def _reshape(
    equation: Equation, moving: Moving, arriving: Arriving, read: Read
) -> Handed:
    (x, *_), (m,) = equation.inputs, arriving
    return [(x, lax.reshape(m, x.shape))]


def _transpose(
    equation: Equation, moving: Moving, arriving: Arriving, read: Read
) -> Handed:
    (x,), (m,) = equation.inputs, arriving
    permutation = equation.params["permutation"]
    return [(x, lax.transpose(m, sorted(range(m.ndim), key=permutation.__getitem__)))]


def _sum(equation: Equation, moving: Moving, arriving: Arriving, read: Read) -> Handed:
    (m,) = arriving
    subtracts = equation.primitive is p.sub_p
    handed = []
    for i, x in enumerate(equation.inputs):
        if x in moving:
            part = lax.neg(m) if subtracts and i == 1 else m
            handed.append((x, _summed_to(part, x.shape)))
    return handed


def _scale(
    equation: Equation, moving: Moving, arriving: Arriving, read: Read
) -> Handed:
    (a, b), (m,) = equation.inputs, arriving
    divides = equation.primitive is p.div_p
    if not divides and b in moving:
        a, b = b, a
    if a not in moving or b in moving:
        return None
    scaled = (lax.div if divides else lax.mul)(m, read(b))
    return [(a, _summed_to(scaled, a.shape))]


def _summed_to(m: Array, shape: tuple[int, ...]) -> Array:
    """The transpose of the broadcasting that arithmetic does by itself."""
    if m.shape == shape:
        return m
    axes = [i for i in range(m.ndim) if not shape or m.shape[i] != shape[i]]
    return lax.reshape(lax.reduce_sum(m, axes), shape)


def _negation(
    equation: Equation, moving: Moving, arriving: Arriving, read: Read
) -> Handed:
    (x,), (m,) = equation.inputs, arriving
    return [(x, lax.neg(m))]


def _reduce_sum(
    equation: Equation, moving: Moving, arriving: Arriving, read: Read
) -> Handed:
    (x,), (m,) = equation.inputs, arriving
    axes = equation.params["axes"]
    if equation.params.get("out_sharding") is not None:
        return None
    kept = [i for i in range(len(x.shape)) if i not in axes]
    return [(x, lax.broadcast_in_dim(m, x.shape, kept))]


def _broadcast(
    equation: Equation, moving: Moving, arriving: Arriving, read: Read
) -> Handed:
    x, (m,) = equation.inputs[0], arriving
    if len(equation.inputs) > 1 or equation.params["sharding"] is not None:
        return None
    axes = equation.params["broadcast_dimensions"]
    of_x = dict(zip(axes, x.shape, strict=True))
    summed = [i for i, size in enumerate(m.shape) if of_x.get(i) != size]
    return [(x, lax.reshape(lax.reduce_sum(m, summed) if summed else m, x.shape))]


def _select(
    equation: Equation, moving: Moving, arriving: Arriving, read: Read
) -> Handed:
    (which, *cases), (m,) = equation.inputs, arriving
    if len(cases) != 2 or which in moving:
        return None
    chosen, zeros = read(which), zeros_like(m)
    return [
        (x, lax.select_n(chosen, *parts))
        for x, parts in zip(cases, ((m, zeros), (zeros, m)), strict=True)
        if x in moving
    ]


def _slice(
    equation: Equation, moving: Moving, arriving: Arriving, read: Read
) -> Handed:
    (x,), (m,) = equation.inputs, arriving
    starts = equation.params["start_indices"]
    steps = equation.params["strides"] or [1] * len(starts)
    config = [
        (start, size - start - max(0, (count - 1) * step + 1), step - 1)
        for start, size, count, step in zip(
            starts, x.shape, m.shape, steps, strict=True
        )
    ]
    return [(x, lax.pad(m, number(m, 0), config))]


def _split(
    equation: Equation, moving: Moving, arriving: Arriving, read: Read
) -> Handed:
    (x,) = equation.inputs
    dtype = next(m.dtype for m in arriving if m is not None)
    parts = [
        lax.full(v.shape, 0, dtype) if m is None else m
        for v, m in zip(equation.outputs, arriving, strict=True)
    ]
    return [(x, lax.concatenate(parts, equation.params["axis"]))]


def _concatenate(
    equation: Equation, moving: Moving, arriving: Arriving, read: Read
) -> Handed:
    (m,), axis = arriving, equation.params["dimension"]
    handed, start = [], 0
    for x in equation.inputs:
        stop = start + x.shape[axis]
        if x in moving:
            handed.append((x, lax.slice_in_dim(m, start, stop, axis=axis)))
        start = stop
    return handed


_DIRECT: dict[str, Callable[..., Handed]] = {
    "add": _sum,
    "add_any": _sum,
    "broadcast_in_dim": _broadcast,
    "concatenate": _concatenate,
    "div": _scale,
    "mul": _scale,
    "neg": _negation,
    "reduce_sum": _reduce_sum,
    "reshape": _reshape,
    "select_n": _select,
    "slice": _slice,
    "split": _split,
    "squeeze": _reshape,
    "sub": _sum,
    "transpose": _transpose,
}
