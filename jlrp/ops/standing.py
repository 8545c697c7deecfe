"""Equations that stand for those of a program, which computes the same in other words.

The equations of the program still run. Those that stand for them are what recognisers
and rules read: they have a place among the others, and the values between them, which
no equation of the program computes, are *virtual*.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import jax

from jlrp.ir import jax_compat
from jlrp.ir.names import with_names
from jlrp.ir.program import (
    Atom,
    Equation,
    Program,
    Value,
    append,
    produced_by,
    reaching,
)


class OtherWords:
    """What a program computes in other words, and the equations that stand for it.

    ``opaque`` are primitives with a rule of their own, which nothing looks into.
    """

    def __init__(self, program: Program, opaque: Iterable[Any]):
        self.program, self.opaque = program, frozenset(opaque)

    @cached_property
    def named(self) -> set[Atom]:
        """The values between which no equation may stand: relevance is asked there."""
        return with_names(self.program)

    def found(self) -> Iterator[tuple[Value, list[Equation]]]:
        """Values, and the equations that stand for what makes each."""
        raise NotImplementedError

    def made(self, atom: object, *primitives: Any) -> Equation | None:
        """The equation that makes a value, by one of some primitives."""
        found = produced_by(atom, *primitives)
        return None if found is None or found.primitive in self.opaque else found

    @classmethod
    def read_all(cls, program: Program, opaque: Iterable[Any]) -> bool:
        """Let equations stand as long as some are found; whether there were any."""
        times = 0
        while found := dict(cls(program, opaque).found()):
            stand(program, found)
            times += 1
        return times > 0


def stand(program: Program, found: Mapping[Value, Sequence[Equation]]) -> None:
    """Put standing equations in the place of those of the program."""
    program.own = program.own or program.equations
    kept = [e for e in program.equations if not any(v in found for v in e.outputs)]
    for out, standing in found.items():
        step = 1 / len(standing)
        for k, equation in enumerate(standing):
            equation.position = out.position + (k + 1) * step - 1  # type: ignore
            kept.append(equation)
            virtual = {v for v in equation.outputs if v is not out}
            program.virtual |= virtual
            if not program.active.isdisjoint(equation.inputs):
                program.active |= virtual
                program.operands.clear()
        for equation in standing:
            for value in equation.outputs:
                value.producer = equation
    kept.sort(key=lambda e: e.position)
    program.equations = reaching(kept, program.outputs)
    program.uses = _uses(program)
    everything = {*program.own, *program.equations, *program.unread}
    run = {*program.own}

    def order(equation: Equation) -> tuple[float, bool]:
        return equation.position, equation not in run

    for k, equation in enumerate(sorted(everything, key=order)):
        equation.position = k


def _uses(program: Program) -> dict[Value, list[Equation]]:
    uses: dict[Value, list[Equation]] = {}
    for equation in reversed(program.equations):
        if program.active.isdisjoint(equation.outputs):
            continue
        keys = program.choosing.get(equation, ())
        for atom in equation.inputs:
            if atom in program.active and atom not in keys:
                uses.setdefault(atom, []).append(equation)  # type: ignore[arg-type]
    return uses


def standing_for(
    out: Value, function: Any, operands: Sequence[Any], like: Equation
) -> list[Equation]:
    made, (end,) = equations_of(function, operands, like)
    last = made[-1]
    assert end in last.outputs
    return [*made[:-1], replace(last, outputs=(out,))]


def equations_of(
    function: Any, operands: Sequence[Value], like: Equation
) -> tuple[list[Equation], tuple[Value, ...]]:
    """The equations of a function of some values, and what they make."""
    shapes = [jax.ShapeDtypeStruct(v.shape, v.dtype) for v in operands]
    jaxpr, consts = jax_compat.open_jaxpr(jax.make_jaxpr(function)(*shapes))
    scratch = Program([], (), (), {})
    env: dict[Any, Atom] = dict(zip(jaxpr.invars, operands, strict=True))
    outs = append(scratch, jaxpr, consts, env)
    for equation in scratch.equations:
        equation.position, equation.scope = like.position, like.scope
        equation.source_infos, equation.regions = like.source_infos, like.regions
    return scratch.equations, outs  # type: ignore[return-value]
