"""Factors that are functions of one value, multiplied before the other factors.

``a * (g * sigmoid(g))`` is a product of a value and an activation; ``(a * g) *
sigmoid(g)`` is the same in another order, and is read so.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from jax import lax
from jax.extend.core import primitives as p

from jlrp.ir.program import Equation, Value
from jlrp.ops.activation import Regions
from jlrp.ops.standing import OtherWords, standing_for


@dataclass(frozen=True)
class _Factor:
    value: Value
    divides: bool


class Regrouped(OtherWords):
    """Products, the functions of one value among their factors multiplied first."""

    @cached_property
    def regions(self) -> Regions:
        return Regions(self.program, set(self.opaque))

    def found(self) -> Iterator[tuple[Value, list[Equation]]]:
        inside: set[Value] = set()
        for equation in reversed(self.program.equations):
            (out, *_) = equation.outputs
            if out in inside or not self._may_regroup(equation):
                continue
            if self.regions.dominator(out) is not None:
                continue  # a function of one value as it is
            factors = list(self._opened(out, False, inside))
            groups = self._groups(factors)
            if 1 < len(groups) < len(factors):
                operands = [f.value for group in groups for f in group]
                yield out, standing_for(out, _product(groups), operands, equation)

    def _operands(self, value: object) -> Sequence[Value]:
        """The two factors of a product, or numerator and divisor."""
        made = self.made(value, p.mul_p, p.div_p)
        found = self.program.active_inputs(made) if made is not None else ()
        return made.inputs if made is not None and len(found) == 2 else ()  # type: ignore

    def _is_inner(self, value: Value) -> bool:
        """Whether a factor is a product of which nothing else reads."""
        if value in self.named or not self.program.used_once(value):
            return False
        return bool(self._operands(value))

    def _may_regroup(self, equation: Equation) -> bool:
        """Whether it is a product of a product: before anything is looked for."""
        return any(map(self._is_inner, self._operands(equation.outputs[0])))

    def _opened(
        self, product: Value, divides: bool, inside: set[Value]
    ) -> Iterator[_Factor]:
        """The factors of a product, those of its factors in their place."""
        inside.add(product)
        inverts = self.made(product, p.div_p) is not None
        for value, below in zip(self._operands(product), (False, inverts), strict=True):
            below = below != divides
            if self._is_inner(value) and self.regions.dominator(value) is None:
                yield from self._opened(value, below, inside)
            else:
                yield _Factor(value, below)

    def _groups(self, factors: Sequence[_Factor]) -> list[list[_Factor]]:
        """Those that are functions of one value side by side."""
        groups: list[list[_Factor]] = []
        for factor in factors:
            for group in groups:
                if self.regions.meet(group[0].value, factor.value) is not None:
                    group.append(factor)
                    break
            else:
                groups.append([factor])
        return groups


def _product(groups: Sequence[Sequence[_Factor]]) -> Any:
    def product(*values: Any) -> Any:
        numbers, parts = iter(values), []
        for group in groups:
            parts.append(_quotient([(next(numbers), f.divides) for f in group]))
        return _quotient(parts)[0]

    return product


def _quotient(factors: Sequence[tuple[Any, bool]]) -> tuple[Any, bool]:
    """A product of some factors by the product of those that divide.

    It divides, if all do.
    """
    above = [x for x, divides in factors if not divides]
    below = [x for x, divides in factors if divides]
    if not above:
        return math.prod(below[1:], start=below[0]), True
    top = math.prod(above[1:], start=above[0])
    if not below:
        return top, False
    return lax.div(top, math.prod(below[1:], start=below[0])), False
