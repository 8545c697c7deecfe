"""Scalars known at trace time: literals, what is computed from them, and f(0).

Elementwise equations are evaluated on NumPy scalars. ``None`` means unknown; zero times
an unknown is zero, which proves f(0) = 0 for activations with parameters (PReLU).
"""

from __future__ import annotations

import numpy as np

from jlrp.ir.homogeneity import is_inexact
from jlrp.ir.primitives import traits
from jlrp.ir.program import Atom, Equation, Literal, Value
from jlrp.ir.traits import Scalar


def evaluate_scalar(equation: Equation, x: list[Scalar], rounds: bool = True) -> Scalar:
    """The value of an elementwise equation whose operands are the scalars ``x``.

    Casts to another floating dtype are left out if it does not ``rounds``.
    """
    row = traits(equation)
    if row.identity and not rounds and is_inexact(equation.outputs[0]):
        return x[0]
    return row.value(x, equation.params)


def is_elementwise(value: Value) -> bool:
    """Whether a value was made element by element, comparisons included."""
    equation = value.producer
    if equation is None:
        return False
    row = traits(equation)
    shaped = all(a.shape in ((), value.shape) for a in equation.inputs)
    return row.evaluate is not None and not row.layout and shaped


def scalar_of(atom: Atom, memo: dict[Value, Scalar] | None = None) -> Scalar:
    """The one number that an atom consists of, if it is known at trace time.

    ``memo`` remembers what was found, for walks over a whole program.
    """
    if isinstance(atom, Literal):
        return atom.number if atom.number.ndim == 0 else None
    return _known(atom, {} if memo is None else memo)


def at_zero(end: Value, start: Value) -> Scalar:
    """``f(0)`` of the elementwise function from ``start`` to ``end``, if provable."""
    return _known(end, {start: 0.0})


def slope_at_infinity(end: Value, start: Value) -> float:
    """The slope of an elementwise function far from 0, its own gain; else 1.

    At infinity, else at minus infinity: where f(L) / L and f(2 L) / 2 L agree and are
    not 0, so that bounded functions have none, nor have powers.
    """
    for far in (_FAR, -_FAR):
        once, twice = (
            _known(end, {start: np.float64(n * far)}, rounds=False) for n in (1, 2)
        )
        if once is None or twice is None:
            continue
        a, b = float(once) / far, float(twice) / (2 * far)
        if np.isfinite([a, b]).all() and a and abs(a - b) <= 1e-5 * abs(a):
            return (float(twice) - float(once)) / far
    return 1.0


_FAR = 1e6


def _known(value: Value, memo: dict[Value, Scalar], rounds: bool = True) -> Scalar:
    stack = [value]
    while stack:
        v = stack[-1]
        if v in memo:
            stack.pop()
            continue
        equation = v.producer
        if (
            equation is None
            or len(equation.outputs) > 1
            or traits(equation).evaluate is None
        ):
            memo[stack.pop()] = None
            continue
        operands = [a for a in equation.inputs if isinstance(a, Value)]
        missing = [a for a in operands if a not in memo]
        if missing:
            stack.extend(missing)
            continue
        x = [
            scalar_of(a) if isinstance(a, Literal) else memo[a] for a in equation.inputs
        ]
        memo[stack.pop()] = evaluate_scalar(equation, x, rounds)
    return memo[value]
