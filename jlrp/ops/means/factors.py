"""Products and quotients of several active values between two points.

A product shares by its Shapley values: the line's (see ``line``), of values that enter
by division as of their reciprocals. What divides, a *denominator* (what a norm divides
by, the second operand of a quotient), is a factor of another kind: of ``y = N / B``,
read as ``y B = N``,

    N gets 2 / (B + B0),    B gets -(y + y0) / (B + B0),

which stays bounded where 1/B does not: a signal times the mean of 1/B explodes at a
flat reference, whose deviation is 0. ``N`` and ``1 / B`` are products of factors each,
and share on by their own lines, so that no association of a product matters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import jax.numpy as jnp
from jax import lax

from jlrp.ir.program import Value
from jlrp.ops.base import Cotangents, Operation
from jlrp.ops.context import Context
from jlrp.ops.kinds.product import ProductOp
from jlrp.ops.means import line
from jlrp.ops.product import Product
from jlrp.promise import difference, safe_divide, zero
from jlrp.typing import Array


def reads(op: Operation) -> tuple[Value, ...]:
    return op.inputs + (op.outputs if any(_product(op).denominators) else ())


def mean_vjp(op: Operation, cotangents: Cotangents, points: Context) -> list[Array]:
    product = _product(op)
    points = _without_nan(op, product, points)
    if not any(product.inverted) and not any(product.denominators):
        return line.mean_vjp(op, cotangents, points)
    lines = _Lines(op, product, points)
    (m,) = cotangents
    assert m is not None
    everything = range(len(op.inputs))
    if not any(product.denominators):
        by_factor = lines.mean_vjp(m, everything, {})
    else:
        below = [i for i in everything if product.denominators[i]]
        above = [i for i in everything if not product.denominators[i]]
        to_numerator, to_inverse = lines.shared(m, above, below)
        ones = {i: jnp.ones_like(lines.here[i]) for i in everything}
        by_factor = lines.mean_vjp(to_numerator, above, {i: ones[i] for i in below})
        by_factor |= lines.mean_vjp(to_inverse, below, {i: ones[i] for i in above})
    return [by_factor[i] for i in everything]


def left_over(
    op: Operation, cotangents: Cotangents, points: Context
) -> dict[str, Array]:
    return {}


def _product(op: Operation) -> Product:
    assert isinstance(op, ProductOp)
    return op.product


def _without_nan(op: Operation, product: Product, points: Context) -> Context:
    """Softmax weights of a row in which all is masked as zeros: it has no relevance."""
    masked = [v for v, m in zip(op.inputs, product.masked, strict=True) if m]
    if not masked:
        return points

    def cleaned(at: Context) -> Context:
        found = {v: at.read(v) for v in masked}
        return at.replaced({v: jnp.where(x != x, 0, x) for v, x in found.items()})

    return cleaned(points).with_reference(cleaned(points.there))


class _Lines:
    """The factors at both points, those that enter by division as reciprocals."""

    def __init__(self, op: Operation, product: Product, points: Context):
        self.op, self.points, self.inverted = op, points, product.inverted
        self.here = [self._factor(i, points) for i in range(len(op.inputs))]
        self.there = [self._factor(i, points.there) for i in range(len(op.inputs))]

    def _factor(self, i: int, points: Context) -> Array:
        x = points.read(self.op.inputs[i])
        return 1 / x if self.inverted[i] else x

    def _product(self, factors: Mapping[int, Array]) -> Array:
        numbers = [1 / f if self.inverted[i] else f for i, f in factors.items()]
        (y,) = self.op.apply(numbers, self.points)
        return y

    def shared(
        self, m: Array, above: Sequence[int], below: Sequence[int]
    ) -> tuple[Array, Array]:
        """What the numerator N and the inverse denominator r of ``y = N r`` get.

        ``2 r r0 / (r + r0)`` and ``(y + y0) / (r + r0)``, which is the above in r.
        Where the denominator changes its sign, or a learned scale is 0: the means.
        """
        every = range(len(self.here))

        def part(of: Sequence[int], factors: Sequence[Array]) -> Array:
            ones = [jnp.ones_like(f) for f in factors]
            return self._product({i: (factors if i in of else ones)[i] for i in every})

        scale = part((), self.here)
        n, n0 = part(above, self.here), part(above, self.there)
        r, r0 = (safe_divide(part(below, f), scale) for f in (self.here, self.there))
        (out,) = self.op.outputs
        total_y = self.points.read(out) + self.points.there.read(out)
        bounded, total = lax.gt(r * r0, zero(r)), r + r0
        harmonic = 2 * r * safe_divide(r0, total)
        of_n = lax.select(bounded, harmonic, total / 2)
        of_r = lax.select(bounded, safe_divide(total_y, total), (n + n0) / 2)
        return m * of_n, safe_divide(m * of_r, scale)

    def mean_vjp(
        self, m: Array, moving: Sequence[int], still: Mapping[int, Array]
    ) -> dict[int, Array]:
        """The line of some factors, with the others held; by their own values."""
        values = self.op.inputs
        moves = {i: difference(self.here[i], self.there[i]) for i in moving}

        def at(t: Array | float) -> list[Array]:
            factors = dict(still)
            for i in moving:
                factors[i] = line.between(self.there[i], moves[i], t)
            numbers = {
                values[i]: 1 / f if self.inverted[i] else f for i, f in factors.items()
            }
            handed = self.op.vjp([m], self.points.replaced(numbers))
            found = []
            for i in moving:
                # By v = 1 / f to the factor f, and by f = 1 / v between the points.
                squared = lax.square(numbers[values[i]])
                found.append(handed[i] * squared if self.inverted[i] else handed[i])
            return found

        count = max(1, -(-len(moving) // 2))
        found = dict(zip(moving, line.averaged(at, count), strict=True))
        for i in moving:
            if self.inverted[i]:
                found[i] = found[i] * self.here[i] * self.there[i]
        return found
