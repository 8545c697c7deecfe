"""Transposes that are one equation, written down.

``jax.linear_transpose`` traces the operation again, which takes longer than all else
that a sum or a reshape costs; on a transformer that is a third of the tracing time.
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


def direct_transpose(
    op: Operation, cotangents: Sequence[Array | None], numbers: Reader
) -> list[Array] | None:
    """The transpose of a one-equation operation, or None: take JAX's."""
    if len(op.equations) != 1 or op.affine is not None or len(cotangents) != 1:
        return None
    (equation,), (cotangent,) = op.equations, cotangents
    transpose = _DIRECT.get(equation.primitive)
    if transpose is None or cotangent is None:
        return None
    if any(v.dtype != op.outputs[0].dtype for v in op.inputs):
        return None
    return transpose(op, equation, cotangent, numbers)


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
