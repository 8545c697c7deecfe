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


def _direct_affine(
    op: Operation, cotangents: Sequence[Array | None], numbers: Reader
) -> list[Array] | None:
    """A dot by a parameter with its bias: the shape of its output kept."""
    affine, (cotangent,) = op.affine, cotangents
    if affine is None or affine.core.primitive is not p.dot_general_p:
        return None
    shifts = all(step.kind == "shift" and not step.negates for step in affine.steps)
    if not shifts or cotangent is None:
        return None
    kernel = numbers.read(affine.kernel)
    start = numbers.shape_of(affine.start)
    if not kernel.dtype == cotangent.dtype == start.dtype:
        return None
    params, shape = affine.core.params, affine.start.shape
    return [dot_transpose(params, cotangent, kernel, affine.operand, shape)]


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
