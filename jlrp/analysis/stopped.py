"""Where relevance stops while another path goes on, and what x only chooses.

A value is *dead* if it depends on floats of x, but on no path that carries relevance:
behind a round, a cast to integers, a comparison, a ``stop_gradient``. Where a dead
value is added to one that carries relevance, its part of the output is on no input: the
ledger's cause ``stopped``. What x decides by predicates, indices, trip counts and
factors that are dead is a choice: it has no part of its own, and neither has a constant
that was chosen so.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jax.extend.core import primitives as p

from jlrp.analysis.dataflow import Dependence
from jlrp.analysis.intervals import scalar_of
from jlrp.ir import jax_compat
from jlrp.ir.families import keeps_order
from jlrp.ir.primitives import traits
from jlrp.ir.program import (
    CARRIED,
    CHOSEN,
    DEAD,
    INDEPENDENT,
    Atom,
    Equation,
    Literal,
    Program,
    Value,
)


@dataclass(frozen=True)
class Stop:
    """A dead value that meets one that carries relevance.

    Attributes:
      endings: the equations at which its paths from x end.
      meeting: the equation that adds it.
    """

    endings: tuple[Equation, ...]
    meeting: Equation

    @property
    def is_meant(self) -> bool:
        """Whether the user stopped it, or what is left is a function of what goes on.

        A straight-through estimator, ``q(x) - stop_gradient(x) + x``; a fraction,
        ``x - floor(x)``, which weighs the corners of a grid in bilinear sampling.
        """
        if not self.endings:
            return False
        if all(e.primitive is p.stop_gradient_p for e in self.endings):
            return True
        others = [_unscaled(a) for a in self.meeting.inputs]
        of_others = [e for e in self.endings if _unscaled(e.inputs[0]) in others]
        straight = any(e.primitive is p.stop_gradient_p for e in of_others)
        fraction = self.meeting.primitive is p.sub_p and all(
            _rounds(e) and e in of_others for e in self.endings
        )
        return straight or fraction

    def __str__(self) -> str:
        ended = ", ".join(f"{e} ({why_it_ends(e)})" for e in self.endings[:3])
        return f"{ended or 'a loop'}, added by {self.meeting}"


@dataclass(frozen=True)
class Choice:
    """What x decides without being a part of it.

    Attributes:
      what: ``"predicate"``, ``"index"``, ``"trip count"`` or ``"factor"``.
    """

    what: str
    equation: Equation

    def __str__(self) -> str:
        return f"{self.what} of {self.equation}"


def _rounds(equation: Equation) -> bool:
    """Whether it gives whole numbers: by rounding, or by a cast to integers."""
    casts = equation.primitive is p.convert_element_type_p
    return casts or traits(equation).rounding


def _unscaled(atom: Atom) -> Atom:
    """What a value is up to movement and literal scales."""
    while isinstance(atom, Value) and atom.producer is not None:
        prim, inputs = atom.producer.primitive, atom.producer.inputs
        scales = prim is p.mul_p and scalar_of(inputs[1]) is not None
        if not keeps_order(atom.producer) and not scales:
            break
        atom = inputs[0]
    return atom


def why_it_ends(equation: Equation) -> str:
    """Why an equation carries no relevance on."""
    if traits(equation).stops:
        return traits(equation).how
    if equation.primitive is p.convert_element_type_p:
        return "a cast to integers"
    if equation.bodies:
        return "inside of its body"
    return "x only chooses what it computes"


def stopped_operands(
    program: Program, equations: Sequence[Equation], constants: Iterable[Value]
) -> tuple[Value, ...]:
    """The dead constants of a linear operation that it adds to its active inputs.

    A dead factor is a choice, and so is a mask: booleans times a number as large as
    only a mask is.
    """
    dead = [v for v in constants if program.is_dead(v)]
    return tuple(
        v
        for v in dead
        if all(traits(e).adds for e in equations if v in e.inputs)
        and not _is_mask(program, v)
    )


def endings(program: Program, value: Atom) -> tuple[Equation, ...]:
    """The equations at which the carrying paths to a dead value end."""
    found: dict[Equation, None] = {}
    for equation, home in _behind(program, value, p.stop_gradient_p):
        carrying = any(home.level(a) == CARRIED for a in equation.inputs)
        if carrying or equation.primitive is p.stop_gradient_p:
            found[equation] = None
    return tuple(sorted(found, key=lambda e: e.position))


def _behind(
    program: Program, value: Atom, until: Any = None
) -> Iterator[tuple[Equation, Program]]:
    """The equations that made a dead value, back to those with carrying operands.

    Or back to a primitive.
    """
    stack: list[tuple[Program, Atom]] = [(program, value)]
    seen: set[Atom] = set()
    while stack:
        home, atom = stack.pop()
        if atom in seen or home.level(atom) != DEAD:
            continue
        seen.add(atom)
        assert isinstance(atom, Value)
        if atom.producer is not None:
            yield atom.producer, home
            if atom.producer.primitive is not until:
                stack += [(home, a) for a in atom.producer.inputs]
            continue
        outer, *following = home.origins.get(atom, ())
        if home.parent is not None:
            stack.append((home.parent, outer))
        stack += [(home, a) for a in following]


_LEAST_OF_A_MASK = 1e3


def _is_mask(program: Program, value: Value) -> bool:
    """Whether a dead value holds comparisons of x, times a number that excludes."""
    largest = 0.0
    for equation, home in _behind(program, value):
        ends = any(home.level(a) == CARRIED for a in equation.inputs)
        if ends and any(v.dtype != np.bool_ for v in equation.outputs):
            return False
        for atom in equation.inputs:
            number = _number(atom)
            if number is not None:
                largest = max(largest, abs(number))
    return largest >= _LEAST_OF_A_MASK


def _number(atom: Atom) -> float | None:
    if not isinstance(atom, Literal) and atom.producer is None:
        return None
    number = scalar_of(atom)
    return None if number is None or np.isnan(number) else float(number)


def choices_of(
    program: Program, equations: Iterable[Equation], constants: Iterable[Value]
) -> Iterator[Choice]:
    """What x decides in some equations, and among what made their constants."""
    for equation in (*equations, *_choosing(program, constants)):
        prim = equation.primitive
        steering = traits(equation).steering
        operands = [a for i, a in enumerate(equation.inputs) if i in steering]
        if any(program.level(a) != INDEPENDENT for a in operands):
            yield Choice("predicate" if prim is p.select_n_p else "index", equation)
        elif equation.bodies and _decides(program, equation):
            yield Choice("predicate" if prim is p.cond_p else "trip count", equation)
        elif traits(equation).scaling and any(map(program.is_dead, equation.inputs)):
            yield Choice("factor", equation)


def _choosing(program: Program, constants: Iterable[Value]) -> Iterator[Equation]:
    """The equations that chose some constants, by floats of x."""
    stack: list[Atom] = [v for v in constants if _is_float(v)]
    seen: set[Atom] = set()
    while stack:
        atom = stack.pop()
        if atom in seen or program.level(atom) != CHOSEN:
            continue
        seen.add(atom)
        if isinstance(atom, Value) and atom.producer is not None:
            if any(program.level(a) >= DEAD for a in atom.producer.inputs):
                yield atom.producer
            stack += atom.producer.inputs


def _is_float(atom: Atom) -> bool:
    return jax_compat.is_inexact(atom)


def _decides(program: Program, equation: Equation) -> bool:
    """Whether x chooses a branch, or how often a loop runs."""
    from_x = [program.level(a) != INDEPENDENT for a in equation.inputs]
    return Dependence().deciding(equation, from_x)
