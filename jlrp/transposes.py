"""Transposes and derivatives that are a few equations, written down.

``jax.linear_transpose`` and ``jax.vjp`` trace the operation again, which takes longer
than all else that a sum, a dot or a softmax costs: on a transformer, a third of the
tracing time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
from jax import lax
from jax.extend.core import primitives as p

from jlrp import _jax
from jlrp.facts.affine import Affine
from jlrp.graph import Atom, Equation, Value
from jlrp.operations import Operation

Array = jax.Array


class Reader(Protocol):
    def read(self, atom: Atom) -> Array: ...

    def shape_of(self, value: Value) -> jax.ShapeDtypeStruct: ...


def direct_transpose(
    op: Operation, cotangents: Sequence[Array | None], numbers: Reader
) -> list[Array] | None:
    """The transpose of a one-equation operation, or None: take JAX's."""
    if len(cotangents) != 1:
        return None
    if op.affine is not None:
        return _direct_affine(op, cotangents, numbers)
    if len(op.equations) != 1:
        return None
    (equation,), (cotangent,) = op.equations, cotangents
    transpose = _DIRECT.get(equation.primitive)
    if transpose is None or cotangent is None:
        return None
    if any(v.dtype != op.outputs[0].dtype for v in op.inputs):
        return None
    return transpose(op, equation, cotangent, numbers)


def direct_vjp(
    op: Operation, cotangents: Sequence[Array | None], numbers: Reader
) -> list[Array] | None:
    """The transpose of a softmax's derivative, ``y (m - sum y m)``, or None."""
    (axes, *_), (m, *_) = (op.softmax_axes,), cotangents
    if axes is None or m is None:
        return None
    y = numbers.read(op.outputs[0])
    if numbers.shape_of(op.inputs[0]).dtype != m.dtype:
        return None
    if "masked" in op.facts:  # a row in which all is masked is no number
        y = lax.select(lax.ne(y, y), lax.full_like(y, 0), y)
    mean = lax.reduce_sum(lax.mul(y, m), axes)
    kept = tuple(i for i in range(y.ndim) if i not in axes)
    spread = lax.broadcast_in_dim(mean, y.shape, kept)
    return [lax.mul(y, lax.sub(m, spread))]


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
    out = lax.dot_general(
        m,
        other,
        ((of_its, its_free), (list(range(n)), its_batch)),
        precision=params["precision"],
    )
    # Its axes: the batch, mine that are free, and the contracted by the other's order.
    order = sorted(range(len(its)), key=its.__getitem__)
    axes = [*my_batch, *my_free, *(mine[k] for k in order)]
    if axes == sorted(axes):
        return out
    return lax.transpose(out, sorted(range(len(axes)), key=axes.__getitem__))


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
    params: dict[str, Any], m: Array, kernel: Array, shape: tuple[int, ...]
) -> Array | None:
    """The transpose of a convolution by its input, of a shape; None: take JAX's.

    A convolution of ``m``, dilated by the strides, with the kernel reversed.
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
    affine: Affine, params: dict[str, Any], m: Array, kernel: Array
) -> Array | None:
    """The transpose of the dot or convolution of an affine operation by its input."""
    shape, prim = affine.start.shape, affine.core.primitive
    if prim is p.dot_general_p:
        return dot_transpose(params, m, kernel, affine.operand, shape)
    if prim is p.conv_general_dilated_p and affine.operand == 0:
        return conv_transpose(params, m, kernel, shape)
    return None


def _direct_affine(
    op: Operation, cotangents: Sequence[Array | None], numbers: Reader
) -> list[Array] | None:
    """A dot or convolution by a parameter, scaled and shifted, its axes kept."""
    affine, (m,) = op.affine, cotangents
    if affine is None or m is None:
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
            (m,) = _jax.bind(
                step.equation.primitive, _jax.widened(step.equation.params), args
            )
        elif step.negates:
            m = lax.neg(m)
    x = core_transpose(affine, _jax.widened(affine.core.params), m, kernel)
    return None if x is None else [x]


def _reshape(op: Operation, equation: Equation, m: Array, numbers: Reader):
    return [lax.reshape(m, op.inputs[0].shape)]


def _transpose(op: Operation, equation: Equation, m: Array, numbers: Reader):
    permutation = equation.params["permutation"]
    return [lax.transpose(m, sorted(range(m.ndim), key=permutation.__getitem__))]


def _sum(op: Operation, equation: Equation, m: Array, numbers: Reader):
    if any(v.shape != m.shape for v in op.inputs):
        return None
    found: dict[Value, Array] = {}
    for i, atom in enumerate(equation.inputs):
        if isinstance(atom, Value) and atom in op.inputs:
            part = lax.neg(m) if equation.primitive is p.sub_p and i == 1 else m
            found[atom] = lax.add(found[atom], part) if atom in found else part
    return [found[v] for v in op.inputs]


def _scale(op: Operation, equation: Equation, m: Array, numbers: Reader):
    (x,), (a, b) = op.inputs, equation.inputs
    divides = equation.primitive is p.div_p
    if b is x and not divides:
        a, b = b, a
    if a is not x or b is x or x.shape != m.shape:
        return None
    return [(lax.div if divides else lax.mul)(m, numbers.read(b))]


_DIRECT: dict[Any, Callable[..., list[Array] | None]] = {
    p.add_jaxvals_p: _sum,
    p.add_p: _sum,
    p.div_p: _scale,
    p.mul_p: _scale,
    p.reshape_p: _reshape,
    p.squeeze_p: _reshape,
    p.sub_p: _sum,
    p.transpose_p: _transpose,
}
