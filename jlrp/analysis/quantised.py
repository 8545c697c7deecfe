"""Quantised layers, read as the straight-through estimators that they stand for.

A quantised layer divides by a scale, rounds, casts to integers or 8-bit floats,
multiplies by quantised weights and scales back:
``dot(int8(round(x / s)), wq) * s * t``. Its derivative is zero but through the scale,
which a reduction of ``|x|`` gives all to the largest x. So rounding, clipping and casts
pass, ``q = v + stop_gradient(q - v)`` where they do not clip, and scales and zero
points are statistics: they are stopped.

Source: the straight-through estimator, Bengio et al. 2013 (arXiv 1308.3432).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import primitives as p

from jlrp.analysis.intervals import scalar_of
from jlrp.ir import jax_compat
from jlrp.ir.own_primitives import straight_through_p
from jlrp.ir.primitives import traits
from jlrp.ir.program import Atom, Equation, Literal, Program, Value
from jlrp.ir.rewriting import (
    Rewriting,
    computes_numbers,
    is_narrow,
    number_operands,
)


@dataclass(frozen=True, eq=False)
class Quantiser:
    """One quantiser, from the division by its scale to the numbers that it gives.

    Attributes:
      scaled: the signal over its scale.
      chain: the equations behind it, each with the operand that comes from it.
      roots: the reductions that scale and zero point were computed from.
    """

    scaled: Value
    chain: tuple[tuple[Equation, int], ...]
    roots: frozenset[Value]

    @property
    def grid(self) -> Equation:
        """The equation that gives the quantised numbers."""
        return self.chain[-1][0]


def straighten(program: Program) -> None:
    """Write a program again in which quantisers are straight-through."""
    quantisers = _quantisers(program)
    if quantisers:
        _Straight(program, quantisers).run()


def _quantisers(program: Program) -> list[Quantiser]:
    rounds = [e for e in program.equations if e.primitive is p.round_p]
    casts = [e for e in program.equations if _is_cast(e)]
    found = [q for e in casts if (q := _ending_at(e)) and _counts(program, q)]
    inside = {e for q in found for e, _ in q.chain}
    by_itself = (_ending_at(e) for e in rounds if e not in inside)
    return found + [q for q in by_itself if q is not None and q.roots]


def _is_cast(equation: Equation) -> bool:
    """Whether floats are cast to integers, or to floats of 8 bits."""
    if equation.primitive is not p.convert_element_type_p:
        return False
    (source,), (out,) = equation.inputs, equation.outputs
    return not is_narrow(source) and is_narrow(out) and out.dtype != np.bool_


def _counts(program: Program, quantiser: Quantiser) -> bool:
    """Whether quantised numbers are computed with, and are meant to stand for floats.

    A scale that is no statistic might as well make bins: then the numbers are rounded,
    and are as narrow as quantised ones are or meet integers in a contraction.
    """
    (out,) = quantiser.grid.outputs
    reaches, contracted = _uses(program, out)
    if not reaches:
        return False
    if quantiser.roots or jax_compat.is_inexact(out):
        return True
    rounded = any(traits(e).rounding for e, _ in quantiser.chain)
    return rounded and (np.dtype(out.dtype).itemsize <= 2 or contracted)


def _uses(program: Program, narrow: Value) -> tuple[bool, bool]:
    """Whether floats are computed with a number, and whether integers contract it."""
    moved: set[Atom] = {narrow}
    reaches = contracted = False
    for equation in program.equations:
        if moved.isdisjoint(equation.inputs) or not computes_numbers(equation):
            continue
        if all(equation.inputs[i] not in moved for i in number_operands(equation)):
            continue
        narrowed = [v for v in equation.outputs if is_narrow(v)]
        reaches |= len(narrowed) < len(equation.outputs)
        contracted |= bool(narrowed) and traits(equation).contraction
        moved.update(narrowed)
    return reaches, contracted


def _ending_at(grid: Equation) -> Quantiser | None:
    """The quantiser whose last equation is ``grid``, back to the scale."""
    chain: list[tuple[Equation, int]] = []
    roots: set[Value] = set()
    equation: Equation | None = grid
    while equation is not None:
        scale = _scale_of(equation)
        if scale is not None:
            (scaled,) = equation.outputs
            return Quantiser(scaled, tuple(chain[::-1]), frozenset(roots | scale))
        index = _signal_of(equation)
        if index is None:
            return None
        for i, atom in enumerate(equation.inputs):
            if i != index and (found := _roots(atom)) is not None:
                roots |= found
            elif i != index:
                return None
        chain.append((equation, index))
        signal = equation.inputs[index]
        equation = signal.producer if isinstance(signal, Value) else None
    return None


def _signal_of(equation: Equation) -> int | None:
    """Which operand of an equation of a quantiser is quantised; the others bound it."""
    prim, row = equation.primitive, traits(equation)
    if row.rounding or row.view:
        return 0
    if prim is p.clamp_p:
        return 1
    if row.clipping or row.addition:
        sizes = [_size(a) for a in equation.inputs]
        if prim is p.sub_p:
            return 0 if sizes[1] < sizes[0] else None
        return None if sizes[0] == sizes[1] else int(np.argmax(sizes))
    return None


def _scale_of(equation: Equation) -> set[Value] | None:
    """The roots of the scale by which an equation divides; None if it does not."""
    if equation.primitive is p.div_p:
        candidates = [1]
    elif equation.primitive is p.mul_p:
        candidates = [0, 1]
    else:
        return None
    for i in candidates:
        scale, signal = equation.inputs[i], equation.inputs[1 - i]
        roots = _roots(scale)
        if roots is not None and (roots or _size(scale) < _size(signal)):
            if _size(scale) <= _size(signal):
                return roots
    return None


def _size(atom: Atom) -> int:
    """How many numbers an atom holds, before it was broadcast."""
    while isinstance(atom, Value) and atom.producer is not None:
        made = atom.producer
        if not traits(made).view and made.primitive is not p.stop_gradient_p:
            break
        (atom, *_) = atom.producer.inputs
    return math.prod(atom.shape)


def _measures(equation: Equation) -> bool:
    """Whether a scale may be computed with it, from a reduction or parameters."""
    row = traits(equation)
    return row.carries_elementwise or row.view or row.stops


def _reduces(equation: Equation) -> bool:
    """Whether it is a reduction, or a quantile."""
    return traits(equation).reduction is not None or equation.primitive is p.sort_p


def _roots(atom: Atom) -> set[Value] | None:
    """The reductions that a scale or zero point comes from; None if it is neither."""
    found: set[Value] = set()
    stack, seen = [atom], set()
    while stack:
        value = stack.pop()
        if isinstance(value, Literal) or value in seen or value.producer is None:
            continue
        seen.add(value)
        equation = value.producer
        if _reduces(equation):
            found.add(value)
        elif equation.primitive is p.cond_p and _all_measure(equation):
            found.add(value)  # of this batch, or what was measured before
            stack += equation.inputs
        elif _measures(equation):
            stack += equation.inputs
        else:
            return None
    return found


def _adds_half(equation: Equation) -> bool:
    """Whether a shift only makes a floor round: ``floor(v + 0.5)``."""
    numbers = [scalar_of(a) for a in equation.inputs]
    shifts = traits(equation).addition
    return shifts and any(n is not None and abs(float(n)) == 0.5 for n in numbers)


def _all_measure(branches: Equation) -> bool:
    return all(
        _measures(e) or _reduces(e) for body in branches.bodies for e in body.equations
    )


class _Straight(Rewriting):
    def __init__(self, program: Program, quantisers: list[Quantiser]):
        super().__init__(program)
        self.by_grid = {q.grid: q for q in quantisers}
        self.roots = frozenset().union(*(q.roots for q in quantisers))
        self._original: dict[Equation, Equation] = {}

    def keep(self, equation: Equation) -> Equation:
        kept = super().keep(equation)
        self._original[kept] = equation
        return kept

    def visit(self, kept: Equation) -> None:
        quantiser = self.by_grid.get(self._original[kept])
        if quantiser is not None:
            self._pass_through(kept, quantiser)
        else:
            self.compute_with_twins(kept)
        for value in kept.outputs:
            if value in self.roots:
                (self.renamed[value],) = self.insert(kept, lax.stop_gradient, value)

    def _pass_through(self, kept: Equation, quantiser: Quantiser) -> None:
        carrier = self.now(quantiser.scaled)
        inside: Atom | None = None
        for equation, index in quantiser.chain:
            row = traits(equation)
            if row.clipping:
                fits = self._fits(kept, equation, index)
                if inside is not None:
                    (fits,) = self.insert(kept, lax.bitwise_and, inside, fits)
                inside = fits
            elif (row.addition or row.view) and not _adds_half(equation):
                carrier = self._moved(kept, equation, index, carrier)
                if inside is not None and row.view:
                    inside = self._moved(kept, equation, index, inside)
        (numbers,) = kept.outputs
        (rounded,) = self.insert(
            kept,
            lambda x: lax.stop_gradient(lax.convert_element_type(x, carrier.dtype)),
            numbers,
        )
        if inside is None:
            shape = numbers.shape
            (inside,) = self.insert(kept, lambda: lax.full(shape, True))
        (out,) = self.insert(kept, straight_through_p.bind, carrier, rounded, inside)
        if is_narrow(numbers):
            self.twins[numbers] = out  # type: ignore[assignment]
        else:
            self.renamed[numbers] = out

    def _fits(self, kept: Equation, clip: Equation, index: int) -> Atom:
        """Where a clip takes no more than rounding would."""
        before, (after,) = self.now(clip.inputs[index]), map(self.now, clip.outputs)
        (fits,) = self.insert(
            kept,
            lambda a, b: jnp.broadcast_to(abs(a - b) <= 0.5, b.shape),
            before,
            after,
        )
        return fits

    def _moved(
        self, kept: Equation, equation: Equation, index: int, carrier: Atom
    ) -> Atom:
        """The carrier behind a shift or move; a cast to narrow numbers is none."""
        if equation.primitive is p.convert_element_type_p:
            dtype = equation.outputs[0].dtype
            if is_narrow(equation.outputs[0]) or carrier.dtype == np.bool_:
                return carrier
            return self.insert(
                kept, lambda x: lax.convert_element_type(x, dtype), carrier
            )[0]
        others = [self.now(a) for a in equation.inputs]
        others[index] = carrier
        bound = _bound(equation)
        return self.insert(kept, bound, *others)[0]


def _bound(equation: Equation) -> Any:
    return lambda *x: jax_compat.bind(equation.primitive, equation.params, x)
