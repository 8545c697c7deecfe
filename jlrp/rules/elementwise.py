"""Elementwise functions of one active value: activations, whatever they are made of.

``Pass`` hands the multiplier on times ``f(x) / x``. That ratio is taken apart along the
region's equations, so that the exact gates come out where they exist (ReLU's step,
SiLU's sigmoid, GELU's Phi) and nothing is divided by a small x.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import primitives as p

from jlrp.analysis.intervals import at_zero, scalar_of, slope_at_infinity
from jlrp.analysis.terms import View, moves_all
from jlrp.ir import jax_compat
from jlrp.ir.families import keeps_order
from jlrp.ir.primitives import traits
from jlrp.ir.program import Atom, Equation, Literal, Value
from jlrp.ops.activation import Region, to_start
from jlrp.ops.base import Operation
from jlrp.ops.context import Context
from jlrp.ops.kinds.activation import ActivationOp, values_of
from jlrp.ops.kinds.embedding import EmbeddingOp
from jlrp.ops.kinds.generic import CustomOp
from jlrp.ops.kinds.softmax import SoftmaxOp
from jlrp.promise import Parts, Promise, safe_divide, unless_zero, zero, zeros_like
from jlrp.rules.base import Array, Causes, Propagation, Rule, refuse
from jlrp.rules.reference import Difference
from jlrp.tactics.dependencies import made_again


@dataclass(frozen=True)
class Pass(Rule):
    """Relevance passes: ``R_in = R_out``.

    In multipliers ``m f(x) / x``, with f'(0) as the limit at 0; where f(0) is not 0 the
    relevance itself goes on. It fits what is elementwise in one active value
    (activations, scales, shifts, casts, masks, inference batch norms), and a softmax,
    as DynamicLRP has it. Sources: Bach et al. 2015; AttnLRP (arXiv 2402.05602), eq. 9.
    """

    def needs(self, op: Operation) -> tuple[Value, ...]:
        return op.inputs + op.outputs

    def parts(self, op: Operation, r: Sequence[Parts]) -> Sequence[Parts]:
        passes = isinstance(op, ActivationOp) and op.passes
        return r if passes else [Parts.VALUE]

    def check(self, op: Operation) -> None:
        if isinstance(op, SoftmaxOp):
            moved = op.softmax.layout is not None
            if not moved and op.inputs[0].shape != op.outputs[0].shape:  # the largest
                refuse(self, op, "its output is not one number for each score")
        elif not is_elementwise(op):
            refuse(self, op, _NOT_ELEMENTWISE)

    def from_reference(self, op: Operation) -> Rule:
        if is_elementwise(op):
            return Difference()
        return super().from_reference(op)

    def propagate(
        self, op: Operation, r: Sequence[Promise | None], ctx: Context
    ) -> Propagation:
        (promise,) = r
        assert promise is not None
        x, y = ctx.read(op.inputs[0]), ctx.read(op.outputs[0])
        region = op.region if isinstance(op, ActivationOp) else None
        back = to_start(_layout(op), x.shape)
        y, passing = back(y), promise.map(back)
        if region is None or not (region.zero_at_zero or region.homogeneous):
            passing = Promise(value=passing.resolve(y))
        if x.dtype != y.dtype:  # a cast inside the activation
            passing = passing.map(lambda part: part.astype(x.dtype))
        multiplier, replaced = passing.multiplier, None
        if region is not None and region.may_miss and passing.value is not None:
            passing, replaced = _without_missing(passing, x, y)
        if multiplier is None or region is None:
            return Propagation([passing], lambda: _constants(replaced))
        if _is_costly(region):
            (x,) = made_again([x], after=ctx.after)
        passed = gated(region, x, y, multiplier, ctx)
        if region.may_miss:
            passed = unless_zero(passed, multiplier)
        r_in = Promise(passing.value, passed)

        def causes() -> Causes:
            ratio = gated(region, x, y, jnp.ones_like(x), ctx)
            if region.may_miss:
                ratio = unless_zero(ratio, multiplier)
            # Where x is 0 and f(x) is not (1/x, or the limit set to 0), y m is lost.
            lost = jnp.where((x == 0) | (ratio == 0), y * multiplier, 0)
            blocked = jnp.sum(jnp.where(jnp.isfinite(y), lost, 0))
            return {"blocked": blocked, **_constants(replaced)}

        return Propagation([r_in], causes)


def _layout(op: Operation) -> View | None:
    if isinstance(op, SoftmaxOp):
        return op.softmax.layout
    return op.region.layout if isinstance(op, ActivationOp) else None


def _without_missing(promise: Promise, x: Array, y: Array) -> tuple[Promise, Array]:
    """Without relevance itself where f replaced a missing x; and what that was."""
    value = promise.value
    assert value is not None
    replaced = jnp.isfinite(y) & ~jnp.isfinite(x)
    kept = Promise(jnp.where(replaced, 0, value), promise.multiplier)
    return kept, jnp.where(replaced, value, 0)


def _constants(replaced: Array | None) -> Causes:
    return {} if replaced is None else {"constants": jnp.sum(replaced)}


@dataclass(frozen=True)
class NativeGradient(Rule):
    """``R_in = f'(x) R_out / c``: the gradient that Zennit leaves to activations.

    c is the function's own slope at infinity, else at minus infinity, so that a literal
    gain (``relu(x) * 2 ** 0.5``, ``gelu(2 * x)``) is no gain of relevance; of a bounded
    function, and where that slope depends on a parameter, it is 1. It fits what is
    elementwise in one active value.

    Source: excitation backprop as in Zennit, whose activations have no rule.
    """

    def needs(self, op: Operation) -> tuple[Value, ...]:
        return op.inputs + op.outputs

    def parts(self, op: Operation, r: Sequence[Parts]) -> Sequence[Parts]:
        return [Parts.VALUE] * len(op.inputs)

    def check(self, op: Operation) -> None:
        if not is_elementwise(op):
            refuse(self, op, _NOT_ELEMENTWISE)

    def propagate(
        self, op: Operation, r: Sequence[Promise | None], ctx: Context
    ) -> Propagation:
        (promise,) = r
        assert promise is not None
        y = ctx.read(op.outputs[0])
        relevance = promise.resolve(y)
        gain = slope_at_infinity(op.outputs[0], op.inputs[0])
        region = op.region if isinstance(op, ActivationOp) else None
        inverted = region is not None and region.inverted
        # Of 1/f: minus f' over f squared, which has no gain.
        share = -safe_divide(relevance, y * y) if inverted else relevance / gain
        (value,) = op.vjp([share], ctx)
        if region is not None and region.may_miss:
            value = unless_zero(value, to_start(region.layout, value.shape)(relevance))

        def causes() -> Causes:
            r_out = jnp.sum(jnp.where(jnp.isfinite(relevance), relevance, 0))
            return {"taylor": r_out.astype(value.dtype) - jnp.sum(value)}

        return Propagation([Promise(value=value)], causes)


_NOT_ELEMENTWISE = "its output is not elementwise in one active input"


def is_elementwise(op: Operation) -> bool:
    """Whether an element of the output depends on that element of one input alone.

    Its equations decide. What is not in the program (a primitive with a rule of its
    own, a derivative around a kernel) is what the user says, if its shape allows.
    """
    if not len(op.inputs) == len(op.outputs) == 1 or isinstance(op, EmbeddingOp):
        return False
    (x,), (y,) = op.inputs, op.outputs
    if isinstance(op, ActivationOp):
        return True
    if x.shape != y.shape:
        return False
    if isinstance(op, CustomOp) or traits(op).has_derivative:
        return True
    moving: set[Atom] = {x}
    for equation in op.equations:
        active = [a for a in equation.inputs if a in moving]
        if not active:
            continue
        (out,) = equation.outputs
        same = all(a.shape == out.shape for a in active)
        fits = same and traits(equation).carries_elementwise
        if not fits and not keeps_order(equation):
            return False
        moving.add(out)
    return True


def _is_costly(region: Region) -> bool:
    """Whether the region has intermediate values that XLA would keep."""
    rows = map(traits, region.equations)
    return any(row.activation and not row.arithmetic for row in rows)


def gated(region: Region, x: Array, y: Array, m: Array, ctx: Context) -> Array:
    """``m f(x) / x`` of a region with f(0) = 0, not divided where it need not be."""
    back = to_start(region.layout, x.shape)
    passed = _Ratios(region, x, m, ctx).of(region.end)
    if passed is not None:
        return back(passed)
    y = y.astype(x.dtype)
    if region.homogeneous and not region.zero_at_zero:
        return lax.mul(m, safe_divide(y, x))
    if region.homogeneous:  # its derivative at 0 may be infinite
        y = values_of(region, lax.select(x == 0, lax.full_like(x, 1), x), ctx)[
            region.end
        ]
        y = back(y)
    ratio = _quotient(lambda v: back(values_of(region, v, ctx)[region.end]), x, y)
    return lax.mul(m, ratio)


def _quotient(function: Callable[[Array], Array], x: Array, y: Array) -> Array:
    """``f(x) / x`` with the derivative at 0 as its limit, 0 where that is infinite."""
    zeros = zeros_like(x)
    slope = jax.jvp(function, (zeros,), (lax.full_like(x, 1),))[1]
    slope = lax.select(lax.is_finite(slope), slope, zeros)
    at_zero = lax.eq(x, zero(x))
    # Where f replaces a missing x it is no number times x.
    missing = lax.ne(x, x)
    y = lax.select(missing, lax.sub(y, y), y)
    undefined = lax.bitwise_or(at_zero, missing)
    quotient = lax.div(y, lax.select(undefined, lax.full_like(x, 1), x))
    return lax.select(at_zero, slope, quotient)


class _Ratios:
    """``m v / x`` for the values v of a region, from the equations that made them.

    None where it must be divided out. Arrays have the shape of v.
    """

    def __init__(self, region: Region, x: Array, m: Array, ctx: Context):
        self.region, self.x, self._ctx = region, x, ctx
        self.memo: dict[Value, Array | None] = {region.start: m}

    @cached_property
    def _env(self) -> dict[Value, Array]:
        return values_of(self.region, self.x, self._ctx)

    def number(self, atom: Atom) -> Array:
        if isinstance(atom, Literal):
            return atom.number  # type: ignore[return-value]
        return self.x if atom is self.region.start else self._env[atom]

    def of(self, atom: Atom) -> Array | None:
        if isinstance(atom, Literal):
            return None if np.any(atom.number) else zeros_like(self.x)
        if atom not in self.memo:
            if atom.producer in self.region.equations:
                self.memo[atom] = self._made_by(atom.producer)
            else:
                known = scalar_of(atom)
                vanishes = known is not None and not np.any(known)
                self.memo[atom] = zeros_like(self.x) if vanishes else None
        return self.memo[atom]

    def value(self, atom: Atom, shape: tuple[int, ...]) -> Array:
        number = self.number(atom)
        if number.dtype != self.x.dtype:  # a low-precision literal
            number = number.astype(self.x.dtype)
        if np.shape(number) in ((), shape):
            return number  # lax takes scalars as they are
        return jnp.broadcast_to(jnp.asarray(number, self.x.dtype), shape)

    def pair(self, a: Atom, b: Atom) -> tuple[Array, Array] | None:
        """The ratios of two values, in one shape: that of a zero is any."""
        left, right = self.of(a), self.of(b)
        if left is None or right is None:
            return None
        if left.shape != right.shape:
            shape = (
                right.shape if isinstance(a, Literal) or a.shape == () else left.shape
            )
            left, right = lax.reshape(left, shape), lax.reshape(right, shape)
        return left, right

    def _made_by(self, equation: Equation | None) -> Array | None:
        assert equation is not None
        inputs = equation.inputs
        if moves_all(equation):
            return self.moved(equation, inputs[0])
        ratio = traits(equation).ratio
        return None if ratio is None else _COMBINE[ratio](self, equation, *inputs)

    def own(self, equation: Equation, a: Atom) -> Array | None:
        """``g(a) / a`` by itself, times the ratio of a."""
        inner = self.of(a)
        if inner is None:
            return None
        number = self.value(a, inner.shape)

        def function(v: Array) -> Array:
            return jax_compat.bind(equation.primitive, equation.params, [v])[0]

        return lax.mul(inner, _quotient(function, number, function(number)))

    def same(self, equation: Equation, a: Atom) -> Array | None:
        return self.of(a)

    def moved(self, equation: Equation, a: Atom) -> Array | None:
        inner = self.of(a)
        if inner is None:
            return None
        (out,) = jax_compat.bind(equation.primitive, equation.params, [inner])
        return out

    def negated(self, equation: Equation, a: Atom) -> Array | None:
        inner = self.of(a)
        return None if inner is None else lax.neg(inner)

    def product(self, equation: Equation, a: Atom, b: Atom) -> Array | None:
        for factor, other in ((a, b), (b, a)):
            if (inner := self.of(factor)) is not None:
                return lax.mul(inner, self.value(other, inner.shape))
        return None

    def quotient(self, equation: Equation, a: Atom, b: Atom) -> Array | None:
        inner = self.of(a)
        if inner is None or _vanishes(b, self.region):
            return None
        return lax.div(inner, self.value(b, inner.shape))

    def sum(self, equation: Equation, a: Atom, b: Atom) -> Array | None:
        found = self.pair(a, b)
        if found is None:
            return None
        left, right = found
        combine = lax.sub if equation.primitive is p.sub_p else lax.add
        return combine(left, right)

    def chosen(self, equation: Equation, which: Atom, *cases: Atom) -> Array | None:
        ratios = [r for case in cases if (r := self.of(case)) is not None]
        if len(ratios) < len(cases):
            return None
        shape = equation.outputs[0].shape
        ratios = [r if r.shape == shape else lax.reshape(r, shape) for r in ratios]
        return lax.select_n(self.number(which), *ratios)

    def extreme(self, equation: Equation, a: Atom, b: Atom) -> Array | None:
        if isinstance(a, Literal):  # at a tie the constant wins: ReLU's step is 0 at 0
            a, b = b, a
        found = self.pair(a, b)
        if found is None:
            return None
        left, right = found
        wins = lax.gt if equation.primitive is p.max_p else lax.lt
        above, below = (self.value(v, left.shape) for v in (a, b))
        return lax.select(wins(above, below), left, right)

    def power(self, equation: Equation, a: Atom) -> Array | None:
        inner, y = self.of(a), equation.params.get("y", 2)
        if inner is None or y < 1:
            return None
        return lax.mul(inner, lax.integer_pow(self.value(a, inner.shape), y - 1))


_COMBINE: dict[str, Callable[..., Array | None]] = {
    "chosen": _Ratios.chosen,
    "extreme": _Ratios.extreme,
    "negated": _Ratios.negated,
    "own": _Ratios.own,
    "power": _Ratios.power,
    "product": _Ratios.product,
    "quotient": _Ratios.quotient,
    "same": _Ratios.same,
    "sum": _Ratios.sum,
}


def _vanishes(denominator: Atom, region: Region) -> bool:
    """Whether a denominator inside the region may be 0 where x is."""
    if isinstance(denominator, Literal):
        return False
    number = at_zero(denominator, region.start)
    return number is None or number == 0
