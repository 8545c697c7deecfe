"""Maxima, minima and magnitudes in other words.

``(a + b + |a - b|) / 2`` is ``max(a, b)``; ``max(x, -x)``, ``x * sign(x)``,
``sqrt(x * x)`` and a selection of x or -x by the sign of x are ``|x|``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from jax import lax
from jax.extend.core import primitives as p

from jlrp.analysis.intervals import scalar_of
from jlrp.ir.program import Atom, Equation, Program, Value, produced_by
from jlrp.ops.standing import OtherWords, standing_for


class Magnitudes(OtherWords):
    """Magnitudes in other words: ``sqrt(x * x)``, ``x * sign(x)``, ``max(x, -x)``."""

    def found(self) -> Iterator[tuple[Value, list[Equation]]]:
        for equation in self.program.equations:
            (out, *_) = equation.outputs
            if equation.primitive not in _MAGNITUDES or out not in self.program.active:
                continue
            x = None if equation.primitive in self.opaque else _magnitude_of(equation)
            active = isinstance(x, Value) and self.program.is_active(x)
            if active and x.shape == out.shape:  # type: ignore[union-attr]
                yield out, standing_for(out, lax.abs, [x], equation)


_MAGNITUDES = (p.max_p, p.mul_p, p.select_n_p, p.sqrt_p)


def _magnitude_of(equation: Equation) -> Atom | None:
    """x, if the equation computes its magnitude."""
    prim, inputs = equation.primitive, equation.inputs
    if prim is p.sqrt_p:
        made = produced_by(inputs[0], p.integer_pow_p, p.mul_p, p.square_p)
        squares = made is not None and (
            made.primitive is p.square_p
            or (made.primitive is p.mul_p and made.inputs[0] is made.inputs[1])
            or made.params.get("y") == 2
        )
        return made.inputs[0] if made is not None and squares else None
    if prim is p.select_n_p:
        return _chosen_by_sign(equation)
    undo = p.neg_p if prim is p.max_p else p.sign_p
    for x, other in (inputs, inputs[::-1]):
        made = produced_by(other, undo)
        if made is not None and made.inputs[0] is x:
            return x
    return None


def _chosen_by_sign(selection: Equation) -> Atom | None:
    which, *cases = selection.inputs
    compared = produced_by(which, p.ge_p, p.gt_p, p.le_p, p.lt_p)
    if compared is None or len(cases) != 2 or scalar_of(compared.inputs[1]) != 0:
        return None
    x = compared.inputs[0]
    above = compared.primitive in (p.ge_p, p.gt_p)
    negative, positive = cases if above else cases[::-1]
    made = produced_by(negative, p.neg_p)
    return x if positive is x and made is not None and made.inputs[0] is x else None


class Extrema(OtherWords):
    """Maxima and minima as arithmetic: ``(a + b + |a - b|) / 2``."""

    def found(self) -> Iterator[tuple[Value, list[Equation]]]:
        program = self.program
        if not any(e.primitive is p.abs_p for e in program.equations):
            return
        for equation in program.equations:
            (out, *_) = equation.outputs
            if equation.primitive in self.opaque or out not in program.active:
                continue
            total = _half(program, equation)
            terms = total and self._terms(total)
            if not terms or (operands := self._compared(terms)) is None:
                continue
            a, b, extremum = operands
            if a.shape == b.shape == out.shape:
                yield out, standing_for(out, extremum, [a, b], equation)

    def _terms(self, total: Value) -> list[tuple[Value, int]] | None:
        """The three terms of a sum, with their signs."""
        found: list[tuple[Value, int]] = []
        stack: list[tuple[Atom, int]] = [(total, 1)]
        while stack:
            atom, sign = stack.pop()
            if not isinstance(atom, Value) or not self.program.is_active(atom):
                return None
            made = atom.producer
            adds = made is not None and made.primitive in (p.add_p, p.sub_p)
            outer = atom is total or len(found) + len(stack) < 2
            alone = adds and outer and self.program.used_once(atom)
            if alone and atom not in self.named:
                assert made is not None
                if made.primitive in self.opaque:
                    return None
                second = -sign if made.primitive is p.sub_p else sign
                stack += [(made.inputs[1], second), (made.inputs[0], sign)]
            else:
                found.append((atom, sign))
        return found if len(found) == 3 else None

    def _compared(
        self, terms: list[tuple[Value, int]]
    ) -> tuple[Value, Value, Any] | None:
        """The two values of which one is taken, if a term is their distance."""
        for k, (term, sign) in enumerate(terms):
            made = term.producer
            if (
                made is None
                or made.primitive is not p.abs_p
                or made.primitive in self.opaque
            ):
                continue
            difference = made.inputs[0].producer  # type: ignore[union-attr]
            others = [t for i, t in enumerate(terms) if i != k]
            if difference is None or difference.primitive is not p.sub_p:
                continue
            values = {value for value, _ in others}
            if values == {*difference.inputs} and all(s == 1 for _, s in others):
                (a, _), (b, _) = others
                return a, b, lax.max if sign == 1 else lax.min
        return None


def _half(program: Program, equation: Equation) -> Value | None:
    """What is halved."""
    if equation.primitive not in (p.mul_p, p.div_p):
        return None
    for i in (1, 0):
        number = scalar_of(equation.inputs[i])
        if number is None or (equation.primitive is p.div_p and i == 0):
            continue
        half = 2.0 if equation.primitive is p.div_p else 0.5
        total = equation.inputs[1 - i]
        if number == half and program.is_active(total):
            return total  # type: ignore[return-value]
    return None
