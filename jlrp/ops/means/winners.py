"""Maxima and other selections between two points.

Of a maximum y, each winner is answerable for what its own number changed (cross-max):
``max(y, y0) - y0`` is x's winner's, ``y - max(y, y0)`` the reference's, each over its
D. Multipliers lie in [0, 1], nothing is left over, and a chain of maxima equals one
over all. SHAP's DeepExplainer has it for max pooling. Rejected: the share of the line
between the points on which each wins, which depends on how the maximum is written.

Of what sorts, or picks several, both points' selections have half; what a switch leaves
over is ``(s(x) - s0(x) + s(x0) - s0(x0)) / 2`` for the selections s and s0 of the two
points.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jax.extend.core import primitives as p

from jlrp.ir.program import Value
from jlrp.ops.base import Cotangents, Operation
from jlrp.ops.context import Context
from jlrp.promise import product, safe_divide
from jlrp.typing import Array

_MAXIMA = {
    **dict.fromkeys(
        (p.cummax_p, p.max_p, p.reduce_max_p, p.reduce_window_max_p), lax.max
    ),
    **dict.fromkeys(
        (p.cummin_p, p.min_p, p.reduce_min_p, p.reduce_window_min_p), lax.min
    ),
}


def reads(op: Operation) -> tuple[Value, ...]:
    return op.inputs + op.outputs


def mean_vjp(op: Operation, cotangents: Cotangents, points: Context) -> list[Array]:
    extreme = _MAXIMA.get(op.primitive)
    if extreme is None:
        here, there = op.vjp(cotangents, points), op.vjp(cotangents, points.there)
        return [(a + b) / 2 for a, b in zip(here, there, strict=True)]
    (m,), (out,) = cotangents, op.outputs
    assert m is not None
    y, y0 = points.read(out), points.there.read(out)
    most = extreme(y, y0)
    of_winner = op.vjp([product(m, _minus(most, y0))], points)
    of_other = op.vjp([product(m, _minus(y, most))], points.there)
    return [
        safe_divide(a + b, points.difference(v))
        for v, a, b in zip(op.inputs, of_winner, of_other, strict=True)
    ]


def _minus(a: Array, b: Array) -> Array:
    return jnp.where(a == b, 0, a - b)  # both may be a mask's -inf


def left_over(
    op: Operation, cotangents: Cotangents, points: Context
) -> dict[str, Array]:
    if op.primitive in _MAXIMA:
        return {}
    x = [points.read(v) for v in op.inputs]
    x0 = [points.there.read(v) for v in op.inputs]
    switched = jnp.zeros(())
    crossed = op.jvp(points, x0), op.jvp(points.there, x)
    for v, m, at_x, at_x0 in zip(op.outputs, cotangents, *crossed, strict=True):
        if m is not None:
            y, y0 = points.read(v), points.there.read(v)
            switched = switched + jnp.sum(product(m, y - at_x0 + at_x - y0)) / 2
    return {"switch": switched}
