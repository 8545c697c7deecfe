"""Intervals: between which numbers all elements of a value lie, for every x.

One abstract interpretation with the functions of the table of primitives. A value that
is one number known at trace time is a point, evaluated as NumPy does it, in its dtype;
bounds of other values are rounded outwards, for the dtype in which they are computed.
With an interval put in place of a value it says what a function does there: f(0), or
that f(x) = 0 for every x < 0. An interval speaks of those x for which all numbers on
the way to a value are finite, and integers are taken not to overflow.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.extend.core import primitives as p

from jlrp.ir.jax_compat import is_inexact
from jlrp.ir.primitives import traits
from jlrp.ir.program import Atom, Equation, Literal, Value
from jlrp.ir.traits import REALS, Scalar, Traits

Interval = tuple[Any, Any]  # the least and the greatest number; of a point, one scalar
Transfer = Callable[[Equation, Sequence[Interval], Value], Interval]


def interval_of(atom: Atom) -> Interval:
    """The interval of an atom; found once for each value."""
    if isinstance(atom, Literal):
        return (atom.number, atom.number) if atom.number.ndim == 0 else REALS
    if atom.interval is None:
        _find(atom, lambda v: v.interval, _remember)
    assert atom.interval is not None
    return atom.interval


def _remember(value: Value, interval: Interval) -> None:
    value.interval = interval


def scalar_of(atom: Atom) -> Scalar:
    """The one number that an atom consists of, if it is known at trace time."""
    return _point(interval_of(atom))


def is_nonnegative(atom: Atom) -> bool:
    low, _ = interval_of(atom)
    return not np.iscomplexobj(low) and bool(low >= 0)


def at_zero(end: Value, start: Value) -> Scalar:
    """``f(0)`` of the elementwise function from ``start`` to ``end``, if provable."""
    return _point(_behind(end, start, (0.0, 0.0)))


def vanishes_below_zero(end: Value, start: Value) -> bool:
    """Whether it is proved that f(x) = 0 for every x < 0."""
    _, tiny, _ = _precision(start.dtype)
    return _point(_behind(end, start, (-np.inf, -tiny))) == 0


def value_at(end: Value, start: Value, number: float) -> Scalar:
    """``f(number)`` of the elementwise function from ``start`` to ``end``, if known."""
    at = np.float64(number)
    return _point(_behind(end, start, (at, at), rounds=False))


def slope_at_infinity(end: Value, start: Value) -> float:
    """The slope of an elementwise function far from 0, its own gain; else 1.

    At infinity, else at minus infinity: where f(L) / L and f(2 L) / 2 L agree and are
    not 0, so that bounded functions have none, nor have powers.
    """
    for sign in (1.0, -1.0):
        for far in _FAR:
            at = np.float64(sign * far)
            once = value_at(end, start, at)
            twice = value_at(end, start, 2 * at)
            if once is None or twice is None:
                continue
            a, b = float(once) / at, float(twice) / (2 * at)
            if not np.isfinite([a, b]).all():
                continue  # exponentials of it are inf: nearer, they are not
            if a and abs(a - b) <= 1e-5 * abs(a):
                return float((twice - once) / at)
            break
    return 1.0


_FAR = (1e6, 300.0)  # the second where f overflows at the first: exp(600) does not


def is_elementwise(value: Value) -> bool:
    """Whether a value was made element by element, comparisons included."""
    equation = value.producer
    if equation is None:
        return False
    row = traits(equation)
    shapes = (a.shape in ((), value.shape) for a in equation.inputs)
    return row.elementwise and row.evaluate is not None and all(shapes)


# The walk: from the operands on, and each value once.


def _behind(
    end: Value, start: Value, interval: Interval, rounds: bool = True
) -> Interval:
    """The interval of ``end`` where ``start`` is in one.

    Casts to another floating dtype are left out if it does not ``rounds``.
    """
    known = {start: interval}

    def of(value: Value) -> Interval | None:
        if rounds and value not in known and value.position <= start.position:
            return interval_of(value)  # it does not depend on start
        return known.get(value)

    _find(end, of, known.__setitem__, rounds)
    found = of(end)
    assert found is not None
    return found


def _find(
    end: Value,
    of: Callable[[Value], Interval | None],
    remember: Callable[[Value, Interval], None],
    rounds: bool = True,
) -> None:
    """Remember the intervals of a value and of what it is made of."""
    stack: list[Any] = [end]
    while stack:
        value = stack[-1]
        if of(value) is not None:
            stack.pop()
            continue
        equation = value.producer
        transfer = equation and _transfer_of(equation.primitive, traits(equation))
        if transfer is None:
            remember(stack.pop(), REALS)
            continue
        x: list[Any] = [
            of(a) if isinstance(a, Value) else interval_of(a) for a in equation.inputs
        ]
        if None in x:
            stack += [a for a, of_a in zip(equation.inputs, x, strict=True) if not of_a]
        elif not rounds and traits(equation).identity and is_inexact(value):
            remember(stack.pop(), x[0])
        else:
            remember(stack.pop(), _interval(equation, transfer, x, value))


def _interval(
    equation: Equation, transfer: Transfer, x: Sequence[Interval], out: Value
) -> Interval:
    if all(interval is REALS for interval in x) and transfer not in _OF_ALL_REALS:
        return REALS
    if len(equation.outputs) == 1:
        number = traits(equation).value(list(map(_point, x)), equation.params)
        if number is not None:
            return number, number
    if any(map(_is_complex, (out, *equation.inputs))):
        return REALS
    low, high = transfer(equation, x, out)
    bounded = low > -np.inf or high < np.inf
    return (low, high) if bounded and low <= high else REALS  # NaN is no bound


def _point(interval: Interval) -> Scalar:
    low, high = interval
    return low if low is high or low == high else None


def _is_complex(atom: Atom) -> bool:
    return getattr(atom.dtype, "kind", "") == "c"


# How an equation passes intervals on, if its value is not a known number.


@functools.cache
def _transfer_of(primitive: Any, row: Traits) -> Transfer | None:
    """None: nothing is known of its values, whatever its operands are."""
    if primitive in _TRANSFERS:
        return _TRANSFERS[primitive]
    if row.comparison:
        return _compared
    if row.clipping:
        return _clipped
    if row.contraction:
        return _contracted
    if row.kind == "sum" and not row.adds:
        return _summed
    if row.nature == "selection" and not row.steering:
        return _selected
    fills = row.fetches and row.adds  # where an index is out of bounds
    if row.movement and not fills and row.lacks is None:
        return _moved
    known = row.evaluate or row.monotone or row.range != REALS
    return _function if row.elementwise and known else None


def _function(equation: Equation, x: Sequence[Interval], out: Value) -> Interval:
    """A function of one operand, or of a known range."""
    row, params = traits(equation), equation.params
    low, high = row.range_with(params)
    if (rises := row.monotone_with(params)) and x[0] != REALS:
        ends = [row.value([float(end)], params) for end in x[0]]
        least, most = ends[::rises]
        if least is not None:
            low = max(low, float(least))
        if most is not None:
            high = min(high, float(most))
    return _outwards(low, high, out)


def _power(equation: Equation, x: Sequence[Interval], out: Value) -> Interval:
    exponent = equation.params["y"]
    if exponent < 0 and exponent % 2:
        return _sign(x[0])
    return _function(equation, x, out)


def _added(equation: Equation, x: Sequence[Interval], out: Value) -> Interval:
    (a, b), (c, d) = x
    return _outwards(float(a) + float(c), float(b) + float(d), out)


def _subtracted(equation: Equation, x: Sequence[Interval], out: Value) -> Interval:
    return _added(equation, [x[0], _negative(x[1])], out)


def _negated(equation: Equation, x: Sequence[Interval], out: Value) -> Interval:
    return _negative(x[0])


def _multiplied(equation: Equation, x: Sequence[Interval], out: Value) -> Interval:
    a, b = equation.inputs
    low, high = _product(*x)
    return _outwards(max(low, 0.0) if a is b else low, high, out)


def _divided(equation: Equation, x: Sequence[Interval], out: Value) -> Interval:
    quotient = _product(x[0], _inverse(x[1]))
    return _outwards(*quotient, out) if is_inexact(out) else _sign(quotient)


def _chosen(equation: Equation, x: Sequence[Interval], out: Value) -> Interval:
    which, *cases = x
    known = _point(which)
    return _join(cases) if known is None else cases[int(np.asarray(known))]


def _compared(equation: Equation, x: Sequence[Interval], out: Value) -> Interval:
    (a, b), (c, d) = x
    always = {
        p.lt_p: (b < c, a >= d),
        p.le_p: (b <= c, a > d),
        p.gt_p: (a > d, b <= c),
        p.ge_p: (a >= d, b < c),
        p.eq_p: (False, b < c or a > d),
        p.ne_p: (b < c or a > d, False),
    }
    yes, no = always[equation.primitive]
    return bool(yes), not no


def _clipped(equation: Equation, x: Sequence[Interval], out: Value) -> Interval:
    """The larger, the smaller, the middle: they rise in each operand."""
    row, params = traits(equation), equation.params
    low, high = (row.value([float(i[end]) for i in x], params) for end in (0, 1))
    return low, high


def _contracted(equation: Equation, x: Sequence[Interval], out: Value) -> Interval:
    return _sign(_product(*x))


def _summed(equation: Equation, x: Sequence[Interval], out: Value) -> Interval:
    return _sign(x[0])


def _selected(equation: Equation, x: Sequence[Interval], out: Value) -> Interval:
    if equation.primitive is p.sort_p:
        return x[equation.outputs.index(out)]
    alone = len(x) == 1 == len(equation.outputs)
    return x[0] if alone else REALS


def _moved(equation: Equation, x: Sequence[Interval], out: Value) -> Interval:
    steering = traits(equation).steering
    return _join([interval for i, interval in enumerate(x) if i not in steering])


def _cast(equation: Equation, x: Sequence[Interval], out: Value) -> Interval:
    """The nearest numbers of another dtype; of integers, the next towards zero."""
    if out.dtype == np.bool_:
        return False, True
    low, high = (float(end) for end in x[0])
    if is_inexact(out):
        with np.errstate(all="ignore"):
            low, high = (np.asarray(end).astype(out.dtype) for end in (low, high))
        return float(low), float(high)
    info = jnp.iinfo(out.dtype)
    inside = (not math.isfinite(end) or info.min <= end <= info.max for end in x[0])
    if not all(inside) or (info.min == 0 and low < 0):
        return REALS
    return tuple(math.trunc(e) if math.isfinite(e) else e for e in (low, high))  # type: ignore


def _rounded(equation: Equation, x: Sequence[Interval], out: Value) -> Interval:
    return _sign(x[0])


_TRANSFERS: dict[Any, Transfer] = {
    p.add_jaxvals_p: _added,
    p.add_p: _added,
    p.convert_element_type_p: _cast,
    p.div_p: _divided,
    p.integer_pow_p: _power,
    p.mul_p: _multiplied,
    p.neg_p: _negated,
    p.reduce_precision_p: _rounded,
    p.select_n_p: _chosen,
    p.stop_gradient_p: _moved,
    p.sub_p: _subtracted,
}


# What else makes anything of anything.
_OF_ALL_REALS = (_compared, _function, _multiplied, _power)


# Arithmetic.


def _negative(interval: Interval) -> Interval:
    low, high = interval
    return -float(high), -float(low)


def _product(a: Interval, b: Interval) -> Interval:
    ends = [
        float(m) * float(n) if m != 0 and n != 0 else 0.0 for m in a for n in b
    ]  # the infinite end of an interval is none of its numbers
    return min(ends), max(ends)


def _inverse(interval: Interval) -> Interval:
    low, high = map(float, interval)
    if low < 0 < high or low == 0 == high:
        return REALS
    least = 1 / high if high else -np.inf
    most = 1 / low if low else np.inf
    return least, most


def _sign(interval: Interval) -> Interval:
    """The numbers of the same sign."""
    low, high = interval
    return 0.0 if low >= 0 else -np.inf, 0.0 if high <= 0 else np.inf


def _join(intervals: Sequence[Interval]) -> Interval:
    lows, highs = zip(*intervals, strict=True)
    return min(lows), max(highs)


# Rounding.


def _outwards(low: float, high: float, out: Value) -> Interval:
    """Bounds of what the dtype makes of exact numbers; a zero is exact."""
    if not is_inexact(out):
        return low, high
    return -_upwards(-low, out.dtype), _upwards(high, out.dtype)


def _upwards(bound: float, dtype: Any) -> float:
    slack, tiny, most = _precision(dtype)
    bound += slack * abs(bound) if math.isfinite(bound) else 0.0
    if 0 < bound < tiny:
        return tiny
    if -tiny < bound < 0:
        return 0.0
    return np.inf if bound > most else max(bound, -most)


@functools.cache
def _precision(dtype: Any) -> tuple[float, float, float]:
    """What a function's error may be, relatively; the least and the largest number."""
    info = jnp.finfo(dtype)
    return 64 * float(info.eps), float(info.tiny), float(info.max)
