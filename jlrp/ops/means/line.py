"""The derivative averaged over the straight line between the two points.

``m_i = integral over t of df/dx_i (x0 + t D) dt``: for a product of n factors (a
contraction, a product over an axis) it is the Shapley value of each factor, and
Gauss-Legendre quadrature with ``ceil(n / 2)`` points is exact; of two factors each gets
the mean of the other. Sources: Aumann and Shapley 1974; Owen 1972 (the multilinear
extension); Sundararajan et al. 2017 for its completeness.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import reduce
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import primitives as p

from jlrp.ir.program import Value
from jlrp.ops.base import Cotangents, Operation
from jlrp.ops.context import Context, widened
from jlrp.ops.kinds.product import ProductOp
from jlrp.promise import number, product
from jlrp.typing import Array

_POINTS = 8  # where the function is no polynomial
_MOST = 32  # more factors than twice as many are no longer exact
_UNROLLED = 4


def reads(op: Operation) -> tuple[Value, ...]:
    return op.inputs


def mean_vjp(op: Operation, cotangents: Cotangents, points: Context) -> list[Array]:
    start, moves = _line(op, points)

    def at(t: Array | float) -> list[Array]:
        return op.vjp(cotangents, points.replaced(_moved(op, start, moves, t)))

    return averaged(at, n_points(op))


def averaged(at: Callable[[Any], list[Array]], count: int) -> list[Array]:
    """The mean over the line of ``at(t)``, by so many points."""
    nodes, weights = nodes_of(count)

    def weighed(t: Any, weight: Any) -> list[Array]:
        return [lax.mul(m, jnp.asarray(weight, m.dtype)) for m in at(t)]

    if count == 1:
        return at(0.5)
    if count <= _UNROLLED:
        parts = [weighed(t, w) for t, w in zip(nodes, weights, strict=True)]
        return [reduce(lax.add, of_one) for of_one in zip(*parts, strict=True)]

    def step(total: list[Array], node: tuple[Array, Array]) -> tuple[list[Array], None]:
        return [a + b for a, b in zip(total, weighed(*node), strict=True)], None

    zeros = [jnp.zeros(s.shape, s.dtype) for s in jax.eval_shape(at, 0.5)]
    total, _ = lax.scan(step, zeros, (jnp.asarray(nodes), jnp.asarray(weights)))
    return total


def left_over(
    op: Operation, cotangents: Cotangents, points: Context
) -> dict[str, Array]:
    """What the quadrature misses: 0 for polynomials of the degree it is made for."""
    if polynomial_degree(op) is not None:
        return {}
    start, moves = _line(op, points)
    nodes, weights = nodes_of(n_points(op))
    reached = [jnp.zeros_like(widened(v)) for v in op.outputs]
    for t, weight in zip(nodes, weights, strict=True):
        here = points.replaced(_moved(op, start, moves, t))
        slopes = op.jvp(here, moves)
        reached = [r + weight * s for r, s in zip(reached, slopes, strict=True)]
    missed = jnp.zeros(())
    for v, m, r in zip(op.outputs, cotangents, reached, strict=True):
        if m is not None:
            missed = missed + jnp.sum(product(m, points.difference(v) - r))
    return {"quadrature": missed}


def polynomial_degree(op: Operation) -> int | None:
    """The degree of an operation that is a polynomial of its inputs, else None."""
    if isinstance(op, ProductOp):
        return len(op.product.slots)
    (equation, *_) = op.equations
    if equation.primitive is p.reduce_prod_p:
        shape = op.inputs[0].shape
        count = math.prod(shape[a] for a in equation.params["axes"])
    elif equation.primitive is p.cumprod_p:
        count = op.inputs[0].shape[equation.params["axis"]]
    else:
        return None
    return count if count <= 2 * _MOST else None


def n_points(op: Operation) -> int:
    degree = polynomial_degree(op)
    return _POINTS if degree is None else max(1, math.ceil(degree / 2))


def nodes_of(count: int) -> tuple[list[float], list[float]]:
    """Gauss-Legendre on [0, 1]: nodes and weights."""
    nodes, weights = np.polynomial.legendre.leggauss(count)
    return ((nodes + 1) / 2).tolist(), (weights / 2).tolist()


def _line(op: Operation, points: Context) -> tuple[list[Array], list[Array]]:
    start = [points.there.read(v) for v in op.inputs]
    return start, [points.difference(v) for v in op.inputs]


def _moved(
    op: Operation, start: list[Array], moves: list[Array], t: Array | float
) -> dict[Value, Array]:
    return {
        v: between(a, d, t) for v, a, d in zip(op.inputs, start, moves, strict=True)
    }


def between(start: Array, move: Array, t: Array | float) -> Array:
    """The point at t of the line."""
    known = isinstance(t, float | int)
    share = number(move, t) if known else t.astype(move.dtype)
    return lax.add(start, lax.mul(move, share))
