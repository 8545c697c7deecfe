"""Unary region: one activation function, whatever it is made of.

The region that ends at y starts at y's furthest dominator x among the active values
such that everything between is elementwise in x and constants, at least one equation of
it nonlinear in x. Literal shifts and scales belong to it; on a single path it stops at
a scale or shift by a parameter, which belongs to the affine operation.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from jax.extend.core import primitives as p

from jlrp.analysis.intervals import at_zero, is_elementwise, scalar_of
from jlrp.analysis.missing import elementwise_sources, replaces, tested_by
from jlrp.ir.families import rounds, why_missing
from jlrp.ir.primitives import traits
from jlrp.ir.program import Equation, Program, Value, between
from jlrp.promise import is_complex


@dataclass(frozen=True)
class Region:
    """The elementwise function from ``start`` to ``end``."""

    start: Value
    end: Value
    equations: tuple[Equation, ...]
    constants: tuple[Value, ...]
    zero_at_zero: bool  # f(0) = 0 is proved
    homogeneous: bool  # f(x) = c x^n: relevance passes (Euler), even if f(0) != 0
    may_miss: bool = False  # x may be NaN where the output is not: it was tested


class Regions:
    """Finds the unary region that ends at a value; memoised over one program."""

    def __init__(
        self, program: Program, opaque: set[Any], outer: Regions | None = None
    ):
        self.program = program
        self.outer = outer  # of the program around a body
        self.opaque = opaque  # primitives with a rule of their own
        self._dominators: dict[Value, Value | None] = {}
        self.ends: dict[Value, str | None] = {}  # what products end in (product.py)

    def dominator(self, value: Value) -> Value | None:
        """The nearest active value of which ``value`` is an elementwise function."""
        if value not in self._dominators:
            self._dominators[value] = self._dominator(value)
        return self._dominators[value]

    def _dominator(self, value: Value) -> Value | None:
        equation = value.producer
        if (
            equation is None
            or not traits(equation).carries_elementwise
            or equation.primitive in self.opaque
        ):
            return None
        operands = self.program.active_inputs(equation)
        if not operands or any(a.shape != value.shape for a in operands):
            return None
        if any(map(is_complex, (value, *operands))):  # no sign, no f(x)/x
            return None
        if why_missing(equation, self.program.active) is not None:
            return None
        if rounds(equation) or replaces(self.program, equation):
            return None
        meeting: Value | None = operands[0]
        for other in operands[1:]:
            meeting = self._meet(meeting, other)
        return meeting

    def _meet(self, a: Value | None, b: Value | None) -> Value | None:
        while a is not b:
            if a is None or b is None:
                return None
            if a.position >= b.position:
                a = self._above(a)
            else:
                b = self._above(b)
        return a

    def _above(self, value: Value) -> Value | None:
        """The dominator of a value inside a region, which no boundary may be."""
        return None if value in self.program.boundaries else self.dominator(value)

    def ending_at(self, end: Value) -> Region | None:
        start = end
        while (above := self.dominator(start)) is not None:
            if start is not end and start in self.program.boundaries:
                break
            if self._is_affine_step(start, above):
                break
            start = above
        if start is end:
            return None
        equations, constants = between([start], [end], self._inside)
        of_active = [e for e in equations if self._is_active(e)]
        if not any(_is_nonlinear(e, start, equations) for e in of_active):
            return None
        if any(map(self._adds_dead, of_active)):
            return None
        f0 = at_zero(end, start)
        tolerance = 8 * np.finfo(np.float32).eps
        zero = f0 is not None and bool(np.abs(f0) <= tolerance)
        homogeneous = _is_monomial(end, start, equations)
        missing = bool(self.tested and self.tested & elementwise_sources(start))
        return Region(start, end, equations, constants, zero, homogeneous, missing)

    @cached_property
    def tested(self) -> set[Value]:
        """The values of which the program asks whether they are numbers."""
        chosen = [
            e.inputs[0] for e in self.program.equations if e.primitive is p.select_n_p
        ]
        return set().union(*(tested_by(a, alone=False) for a in chosen))

    def _inside(self, value: Value) -> bool:
        """Masks computed from x element by element are part of the function too."""
        return value in self.program.active or is_elementwise(value)

    def _is_affine_step(self, value: Value, above: Value) -> bool:
        """A scale or shift by a parameter, or a dead shift, on a single path."""
        equation = value.producer
        assert equation is not None
        if self._adds_dead(equation):
            return True
        row = traits(equation)
        if not row.addition and not row.scaling:
            return False
        operands = self.program.active_inputs(equation)
        others = [a for a in equation.inputs if a is not above]
        if operands != (above,) or len(others) != 1:
            return False
        divides = equation.primitive is p.div_p and equation.inputs[1] is above
        scalar = scalar_of(others[0]) is not None
        return self.program.is_parameter(others[0]) and not scalar and not divides

    def _is_active(self, equation: Equation) -> bool:
        return any(v in self.program.active for v in equation.outputs)

    def _adds_dead(self, equation: Equation) -> bool:
        """Whether a dead value is added, or put in by a mask that is no part of f."""
        masked = equation.primitive is p.select_n_p and self.program.is_parameter(
            equation.inputs[0]
        )
        if not traits(equation).addition and not masked:
            return False
        alone = len(self.program.active_inputs(equation)) == 1
        return alone and any(map(self.program.is_dead, equation.inputs))


def _is_nonlinear(
    equation: Equation, start: Value, region: tuple[Equation, ...]
) -> bool:
    """Whether an equation of a region is nonlinear in the region's start."""
    inside = {v for e in region for v in e.outputs} | {start}
    varies = [isinstance(a, Value) and a in inside for a in equation.inputs]
    prim = equation.primitive
    if prim is p.mul_p:
        return all(varies)
    if prim is p.div_p:
        return varies[1]
    if prim is p.select_n_p:
        return varies[0]
    row = traits(equation)
    return row.carries_elementwise and row.nature not in ("linear", "movement")


def _is_monomial(end: Value, start: Value, region: tuple[Equation, ...]) -> bool:
    """Whether the region is ``c x^n``, with ``|x|`` in place of ``x`` allowed."""
    inside = {v for e in region for v in e.outputs} | {start}

    def is_power(equation: Equation) -> bool:
        if equation.primitive is p.pow_p:
            return equation.inputs[1] not in inside
        row = traits(equation)
        return row.scaling or row.degree is not None

    return all(is_power(e) for e in region)
