"""Products as one operation of all their factors, for relevance from a reference.

There a product of n values shares by its Shapley values, which are no fractions of a
product of two: ``(a b) c`` is one operation of three factors, through movement,
literal scales and contractions. What divides is a denominator: what a norm divides by,
the second operand of a quotient, a value that ends in a negative power. (A quotient by
a function such as ``1 + exp(-z)`` is a product with a gate.) A product with a
denominator holds no contraction: the numerator and the denominator are elementwise.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from jax.extend.core import primitives as p

from jlrp.ir.program import Equation, Program, Value
from jlrp.ops.activation import Region, Regions
from jlrp.ops.average import Part
from jlrp.ops.product import (
    Product,
    end_of,
    gates_among,
    is_product,
    may_be_nan,
    transparent,
)
from jlrp.ops.signal import is_selective, signal_among
from jlrp.ops.statistic import statistic_of


@dataclass(frozen=True)
class Factor:
    """A value that a product multiplies by, or divides by."""

    value: Value
    inverted: bool = False
    denominator: bool = False


@dataclass(frozen=True)
class Reading:
    """What the factors of a product are looked for in."""

    program: Program
    regions: Regions
    parts: Mapping[Equation, Part]
    find_signals: bool
    hold_statistics: bool


def factors_of(reading: Reading, root: Equation) -> tuple[tuple[Value, ...], Product]:
    """The factors of the product that an equation ends, each once, and its shares."""
    statistic = norm_of(reading, root)
    if statistic is not None:
        found = _of_norm(root, statistic)
    else:
        found = _flat(reading, root, contracting=False)
        if not any(f.denominator for f in found):
            found = _flat(reading, root, contracting=True)
    repeated = len({f.value for f in found}) < len(found)
    if repeated and any(f.denominator or f.inverted for f in found):
        found = _of_two(reading, root)
    by_value = {f.value: f for f in found}
    values = tuple(by_value)
    held = statistic is not None and reading.hold_statistics
    if root in reading.parts:  # an average is weighed by softmax weights: no signal
        reading = replace(reading, find_signals=False)
    product = _product(reading, list(by_value.values()), held)
    return values, replace(product, slots=tuple(range(len(found))))


def _product(reading: Reading, found: list[Factor], held: bool) -> Product:
    values = [f.value for f in found]
    ends = {v: end_of(reading.program, reading.regions, v) for v in values}
    denominators = tuple(f.denominator for f in found)
    if any(denominators):  # none of its factors is a gate
        uniform = [float(not (held and d)) for d in denominators]
        gated = chosen = uniform
    else:
        uniform = [1.0] * len(found)
        gates = gates_among(values, ends)
        gated = [float(v not in gates) for v in values]
        chosen = _of_signal(reading, values)
    return Product(
        tuple(range(len(found))),
        _fractions(uniform),
        _fractions(gated),
        _fractions(chosen),
        tuple(ends[v] == "softmax" for v in values),
        tuple(may_be_nan(reading.program, reading.regions, v) for v in values),
        inverted=tuple(f.inverted for f in found),
        denominators=denominators,
    )


def _fractions(weights: list[float]) -> tuple[float, ...]:
    return tuple(w / sum(weights) for w in weights)


def _of_signal(reading: Reading, values: list[Value]) -> list[float]:
    terms = reading.regions.terms
    signal = signal_among(terms, values) if reading.find_signals else None
    if signal is None or not is_selective(terms, signal, values):
        return [1.0] * len(values)
    return [float(v is signal) for v in values]


def norm_of(reading: Reading, equation: Equation) -> int | None:
    """The operand of a product that a norm divides by, or multiplies by its inverse."""
    if equation in reading.parts:
        return None
    statistic = statistic_of(reading.regions.terms, equation)
    if statistic == 0 and equation.primitive is p.div_p:
        return None
    return statistic


def _of_norm(equation: Equation, statistic: int) -> list[Factor]:
    divides = equation.primitive is p.div_p
    return [
        Factor(a, divides and i == statistic, i == statistic)
        for i, a in enumerate(equation.inputs[:2])
        if isinstance(a, Value)
    ]


def _of_two(reading: Reading, equation: Equation) -> list[Factor]:
    """The operands of a product themselves; without a denominator if they are one."""
    a, b = (v for v in equation.inputs[:2] if isinstance(v, Value))
    divides = equation.primitive is p.div_p
    return [Factor(a), Factor(b, divides, divides)]


def _flat(reading: Reading, root: Equation, contracting: bool) -> list[Factor]:
    found: list[Factor] = []
    stack: list[tuple[Value, bool]] = _operands(root)[::-1]
    while stack:
        value, inverted = stack.pop()
        below = _product_below(reading, value, contracting)
        if below is None:
            found.append(_factor(reading, value, inverted))
        else:
            stack += [(v, inverted != by) for v, by in _operands(below)[::-1]]
    return found


def _operands(equation: Equation) -> list[tuple[Value, bool]]:
    a, b = equation.inputs[:2]
    assert isinstance(a, Value) and isinstance(b, Value)
    return [(a, False), (b, equation.primitive is p.div_p)]


def _factor(reading: Reading, value: Value, inverted: bool) -> Factor:
    region = _region_at(reading, value)
    power = region is not None and region.homogeneous and not region.zero_at_zero
    if inverted:
        return Factor(value, True, region is None or region.homogeneous)
    return Factor(value, False, power and _divides(region))


def _region_at(reading: Reading, value: Value) -> Region | None:
    while (region := reading.regions.ending_at(value)) is None:
        equation = value.producer
        source = None if equation is None else transparent(reading.program, equation)
        if source is None:
            return None
        value = source
    return region


def _divides(region: Region | None) -> bool:
    """Whether a monomial is of negative degree."""
    assert region is not None
    sign = 1
    for equation in region.equations:
        prim, params = equation.primitive, equation.params
        if prim is p.rsqrt_p or (prim is p.integer_pow_p and params["y"] < 0):
            sign = -sign
        elif prim is p.div_p and equation.inputs[1] in _moving(region):
            sign = -sign
    return sign < 0


def _moving(region: Region) -> set[Any]:
    return {region.start, *(v for e in region.equations for v in e.outputs)}


def _product_below(
    reading: Reading, value: Value, contracting: bool
) -> Equation | None:
    """The product that ends at ``value`` through moves and literal scales."""
    program, regions = reading.program, reading.regions
    while program.used_once(value):
        equation = value.producer
        if equation is None:
            return None
        if is_product(program, regions, equation):
            return equation if _joins(reading, equation, contracting) else None
        source = transparent(program, equation)
        if equation.primitive is p.reduce_sum_p and contracting:
            (source,) = program.active_inputs(equation)
        if source is None or regions.ending_at(value) is not None:
            return None
        value = source
    return None


def _joins(reading: Reading, equation: Equation, contracting: bool) -> bool:
    """Whether the factors of a product below are factors of the one above."""
    if equation in reading.parts or norm_of(reading, equation) is not None:
        return False
    elementwise = equation.primitive in (p.mul_p, p.div_p)
    if not contracting:
        return elementwise
    divided = elementwise and any(
        f.denominator for f in _flat(reading, equation, contracting=False)
    )
    return not divided
