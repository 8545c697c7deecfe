"""Elementwise functions of one active value: activations, whatever they are made of.

``Pass`` hands the multiplier on times ``f(x) / x``. That ratio is taken apart along the
region's equations, so that the exact gates come out where they exist (ReLU's step, SiLU's
sigmoid, GELU's Phi) and nothing is divided by a small x.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import primitives as p

from jlrp.facts.scalar import at_zero
from jlrp.facts.unary import Region
from jlrp.graph import Atom, Equation, Literal, Value, read
from jlrp.operations import Operation
from jlrp.promise import Promise, safe_divide
from jlrp.rules.base import Array, Causes, Context, Propagation, Rule, refuse


@dataclass(frozen=True)
class Pass(Rule):
    """Relevance passes: ``R_in = R_out``.

    In multipliers ``m f(x) / x``, with f'(0) as the limit at 0; where f(0) is not 0 the
    relevance itself is handed on. Sources: Bach et al. 2015; AttnLRP (arXiv
    2402.05602), eq. 9.
    """

    def needs(self, op: Operation) -> tuple[Value, ...]:
        return op.inputs + op.outputs

    def check(self, op: Operation) -> None:
        same = len(op.inputs) == len(op.outputs) == 1
        if not same or op.inputs[0].shape != op.outputs[0].shape:
            refuse(self, op, "its output is not elementwise in one active input")

    def propagate(
        self, op: Operation, r: Sequence[Promise | None], ctx: Context
    ) -> Propagation:
        (promise,) = r
        assert promise is not None
        region, multiplier = op.region, promise.multiplier
        if multiplier is None:
            return Propagation([promise])
        y = ctx.read(op.outputs[0])
        if region is None or not (region.zero_at_zero or region.homogeneous):
            return Propagation([Promise(value=promise.resolve(y))])
        x = ctx.read(op.inputs[0])
        ratio = gate(region, x, y, ctx)
        handed = Promise(promise.value, multiplier * ratio)

        def causes() -> Causes:
            # Where x is 0 and f(x) is not (1/x, or the limit set to 0), y m is lost.
            lost = jnp.where((x == 0) | (ratio == 0), y * multiplier, 0)
            return {"blocked": jnp.sum(jnp.where(jnp.isfinite(y), lost, 0))}

        return Propagation([handed], causes)


@dataclass(frozen=True)
class NativeGradient(Rule):
    """``R_in = f'(x) R_out``: the modified gradient that Zennit leaves to activations.

    Source: excitation backprop as in Zennit, whose activations have no rule.
    """

    def needs(self, op: Operation) -> tuple[Value, ...]:
        return op.inputs + op.outputs

    def check(self, op: Operation) -> None:
        Pass().check(op)

    def propagate(
        self, op: Operation, r: Sequence[Promise | None], ctx: Context
    ) -> Propagation:
        (promise,) = r
        assert promise is not None
        relevance = promise.resolve(ctx.read(op.outputs[0]))
        (value,) = ctx.vjp(op, [relevance])

        def causes() -> Causes:
            slope = ctx.vjp(op, [jnp.ones_like(relevance)])[0]
            return {"taylor": jnp.sum((1 - slope) * relevance)}

        return Propagation([Promise(value=value)], causes)


def gate(region: Region, x: Array, y: Array, ctx: Context) -> Array:
    """``f(x) / x`` of a region with f(0) = 0, without dividing where it need not."""
    env = ctx.region(region, x)
    ratio = _ratio(region.end, region, env, {region.start: jnp.ones_like(x)})
    if ratio is not None:
        return ratio
    if region.homogeneous and not region.zero_at_zero:
        return safe_divide(y, x)
    return _quotient(lambda v: ctx.region(region, v)[region.end], x, y)


def _quotient(function, x: Array, y: Array) -> Array:
    """``f(x) / x`` with the derivative at 0 as its limit, 0 where that is infinite."""
    zeros = jnp.zeros_like(x)
    slope = jax.jvp(function, (zeros,), (jnp.ones_like(x),))[1]
    slope = jnp.where(jnp.isfinite(slope), slope, 0)
    at_zero = x == 0
    return jnp.where(at_zero, slope, y / jnp.where(at_zero, 1, x))


_LINEAR_UNARY = (p.neg_p, p.copy_p, p.convert_element_type_p, p.reduce_precision_p)
_SUMS = {p.add_p: 1, p.add_jaxvals_p: 1, p.sub_p: -1}
# g(0) = 0 with slope 1 there: g(a) / a is taken by itself, times the ratio of a.
_UNIT_SLOPE = {
    p.asin_p: jnp.arcsin,
    p.asinh_p: jnp.arcsinh,
    p.atan_p: jnp.arctan,
    p.atanh_p: jnp.arctanh,
    p.expm1_p: jnp.expm1,
    p.log1p_p: jnp.log1p,
    p.sin_p: jnp.sin,
    p.sinh_p: jnp.sinh,
    p.tan_p: jnp.tan,
    p.tanh_p: jnp.tanh,
}


def _ratio(
    atom: Atom, region: Region, env: dict[Value, Array], memo: dict[Atom, Array | None]
) -> Array | None:
    """``v / x`` for a value v of the region, or None if it must be divided out."""
    if isinstance(atom, Literal):
        return jnp.zeros((), atom.dtype) if not np.any(atom.number) else None
    if atom not in memo:
        equation = atom.producer
        inside = equation is not None and equation in region.equations
        memo[atom] = (
            _equation_ratio(equation, region, env, memo) if inside and equation else None
        )
    return memo[atom]


def _equation_ratio(
    equation: Equation,
    region: Region,
    env: dict[Value, Array],
    memo: dict[Atom, Array | None],
) -> Array | None:
    prim, inputs = equation.primitive, equation.inputs

    def ratio(index: int) -> Array | None:
        return _ratio(inputs[index], region, env, memo)

    def value(index: int) -> Array:
        return read(env, inputs[index])

    if prim in _LINEAR_UNARY:
        inner = ratio(0)
        return None if inner is None else (-inner if prim is p.neg_p else inner)
    if prim is p.mul_p:
        for a, b in ((0, 1), (1, 0)):
            if (inner := ratio(a)) is not None:
                return inner * value(b)
        return None
    if prim is p.div_p:
        inner = ratio(0)
        if inner is None or _vanishes(inputs[1], region):
            return None
        return inner / value(1)
    if prim in _SUMS:
        a, b = ratio(0), ratio(1)
        return None if a is None or b is None else a + _SUMS[prim] * b
    if prim is p.select_n_p:
        cases = [ratio(i) for i in range(1, len(inputs))]
        if any(c is None for c in cases):
            return None
        like = env[equation.outputs[0]]
        cases = [jnp.broadcast_to(jnp.asarray(c, like.dtype), like.shape) for c in cases]
        return jax.lax.select_n(value(0), *cases)
    if prim in (p.max_p, p.min_p):
        a, b = ratio(0), ratio(1)
        if a is None or b is None:
            return None
        # At a tie with a constant 0 the constant wins: ReLU's step is 0 at 0.
        first = value(0) > value(1) if prim is p.max_p else value(0) < value(1)
        return jnp.where(first, a, b)
    if prim is p.square_p:
        inner = ratio(0)
        return None if inner is None else inner * value(0)
    if prim is p.integer_pow_p and equation.params["y"] >= 1:
        inner = ratio(0)
        return None if inner is None else inner * value(0) ** (equation.params["y"] - 1)
    if prim in _UNIT_SLOPE:
        inner = ratio(0)
        if inner is None:
            return None
        a = value(0)
        return inner * _quotient(_UNIT_SLOPE[prim], a, _UNIT_SLOPE[prim](a))
    return None


def _vanishes(denominator: Atom, region: Region) -> bool:
    """Whether a denominator inside the region may be 0 where x is."""
    if isinstance(denominator, Literal):
        return False
    number = at_zero(denominator, region.start)
    return number is None or number == 0
