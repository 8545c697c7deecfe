"""Rectified: values behind which only their positive part carries relevance.

Where all readers of a value are activations that are zero below zero (ReLU, ReLU6),
whatever they are written as, no relevance that comes back as a multiplier reaches a
negative entry. Rules that treat the two signs apart then need one of them.
"""

from __future__ import annotations

import numpy as np
from jax.extend.core import primitives as p

from jlrp.analysis.scalar import Scalar, evaluate_scalar, scalar_of
from jlrp.ir.program import Atom, Equation, Value
from jlrp.ops.activation import Region

Interval = tuple[float, float]

_NEGATIVE: Interval = (-np.inf, np.nextafter(0.0, -1.0))
_ZERO: Interval = (0.0, 0.0)
_UNCHANGED = {p.broadcast_in_dim_p, p.convert_element_type_p, p.copy_p, p.reshape_p}


def vanishes_below_zero(region: Region) -> bool:
    """Whether it is proved that f(x) = 0 for every x < 0."""
    known: dict[Value, Interval | None] = {region.start: _NEGATIVE}

    def of(atom: Atom) -> Interval | None:
        if isinstance(atom, Value) and atom in known:
            return known[atom]
        scalar = scalar_of(atom)
        return _point(scalar)

    for equation in region.equations:
        found = _interval(equation, [of(a) for a in equation.inputs])
        known.update(dict.fromkeys(equation.outputs, found))
    return known[region.end] == _ZERO


def _point(scalar: Scalar) -> Interval | None:
    return None if scalar is None else (float(scalar), float(scalar))


def _interval(equation: Equation, x: list[Interval | None]) -> Interval | None:
    """The least and the largest number that an equation makes, if that is known."""
    prim = equation.primitive
    if prim is p.mul_p and _ZERO in x:
        return _ZERO
    if prim is p.select_n_p and x[0] is not None and x[0][0] == x[0][1]:
        return x[1 + int(x[0][0])]
    pairs = [pair for pair in x if pair is not None]
    if len(pairs) < len(x):
        return None
    if all(low == high for low, high in pairs):
        return _point(evaluate_scalar(equation, [low for low, _ in pairs]))
    (low, high), *others = pairs
    if prim in _UNCHANGED:
        return low, high
    if prim is p.max_p:
        return max(low, others[0][0]), max(high, others[0][1])
    if prim is p.min_p:
        return min(low, others[0][0]), min(high, others[0][1])
    if prim is p.clamp_p:
        return tuple(np.clip(end, low, others[1][1]) for end in others[0])  # type: ignore
    if prim in (p.lt_p, p.le_p, p.gt_p, p.ge_p):
        (other_low, other_high), below = others[0], prim in (p.lt_p, p.le_p)
        if high < other_low:
            return (1.0, 1.0) if below else _ZERO
        if low > other_high:
            return _ZERO if below else (1.0, 1.0)
    return None
