"""Loops and branches: how the operands of an equation meet the inputs of its bodies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeVar

from jax.extend.core import primitives as p

from jlrp.ir import jax_compat
from jlrp.ir.program import Atom, Equation, Program, Value

T = TypeVar("T")


class Body(NamedTuple):
    """One body of a loop or branch.

    Its inputs are the operands from ``first`` on: constants, carries, and the slices of
    the rest; its outputs, those of the equation: carries first. A branch is a body in
    which all inputs are constants.
    """

    program: Program
    first: int
    n_constants: int
    n_carries: int

    def operands(self, equation: Equation) -> Sequence[Atom]:
        return equation.inputs[self.first :]

    @property
    def constants(self) -> tuple[Value, ...]:
        return self.program.inputs[: self.n_constants]

    @property
    def carries(self) -> tuple[Value, ...]:
        return self.program.inputs[self.n_constants :][: self.n_carries]

    @property
    def slices(self) -> tuple[Value, ...]:
        return self.program.inputs[self.n_constants + self.n_carries :]

    def divided(self, of_inputs: Sequence[T]) -> tuple[list[T], list[T], list[T]]:
        """What there is one of for each input: of constants, of carries, of slices."""
        constants, rest = of_inputs[: self.n_constants], of_inputs[self.n_constants :]
        return (
            list(constants),
            list(rest[: self.n_carries]),
            list(rest[self.n_carries :]),
        )


def bodies_of(
    equation: Equation, programs: Sequence[Program] | None = None
) -> list[Body]:
    """The bodies of a loop or branch through which relevance may go.

    ``programs`` stand in for the equation's own.
    """
    params = equation.params
    programs = equation.bodies if programs is None else programs
    if equation.primitive is p.scan_p:
        return [Body(programs[0], 0, *jax_compat.scan_counts(params))]
    if equation.primitive is p.while_p:  # the condition carries no relevance
        n_constants, first = params["body_nconsts"], params["cond_nconsts"]
        n_carries = len(equation.inputs) - first - n_constants
        return [Body(programs[1], first, n_constants, n_carries)]
    if equation.primitive is p.cond_p:
        n_inputs = len(equation.inputs) - 1
        return [Body(program, 1, n_inputs, 0) for program in programs]
    return []
