"""Data flow: a fact of every value, found from the facts of some in one forward walk.

What flows is a subclass of ``Flow``: a lattice of facts, and how an equation passes
them on. Bodies of loops and branches are walked as the program is; what a carry has
before some iteration it has, as far as is known here, before every one that follows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import reduce
from typing import Any, ClassVar, Generic, TypeVar

from jax.extend.core import primitives as p

from jlrp.ir.families import taken_from
from jlrp.ir.fixpoint import settled
from jlrp.ir.loops import Body, bodies_of
from jlrp.ir.program import Atom, Equation, Program, Value

T = TypeVar("T")


class Flow(Generic[T]):
    """One kind of fact. An object remembers what it has found of bodies.

    Attributes:
      nothing: the least fact, that of literals and constants; it is false.
    """

    nothing: ClassVar[Any]

    def __init__(self) -> None:
        self._known: dict[tuple[Program, tuple[T, ...]], list[T]] = {}

    def join(self, a: T, b: T) -> T:
        """The fact of a value that is reached by two paths."""
        return max(a, b)  # type: ignore[type-var]

    def transfer(self, equation: Equation, operands: list[T]) -> Sequence[T]:
        """The facts of an equation's outputs, if some operand has one."""
        raise NotImplementedError

    def forward(self, program: Program, starts: Mapping[Any, T]) -> dict[Any, T]:
        """The facts of a program's values; values without one are left out."""
        nothing: T = self.nothing
        join = self.join
        known = {v: fact for v, fact in starts.items() if fact}
        for equation in program.equations:
            operands: list[T] = [known.get(a, nothing) for a in equation.inputs]
            if not any(operands):
                continue
            if _is_a_copy(equation):
                operands[0] = nothing
            outs = self.transfer(equation, operands)
            for value, fact in zip(equation.outputs, outs, strict=True):
                if fact:
                    known[value] = join(known[value], fact) if value in known else fact
        return known

    def outputs(self, program: Program, inputs: Sequence[T]) -> list[T]:
        """The facts of a body's outputs, from those of its inputs."""
        key = program, tuple(inputs)
        if key not in self._known:
            starts = dict(zip(program.inputs, inputs, strict=True))
            known = self.forward(program, starts)
            nothing: T = self.nothing
            self._known[key] = [known.get(a, nothing) for a in program.outputs]
        return self._known[key]

    def settled(
        self, parts: Sequence[Body], inputs: Sequence[T], rounds: int | None = None
    ) -> list[T]:
        """The facts of a body's inputs, joined over as many iterations and the next.

        ``parts`` are the body as it is in different iterations; without ``rounds``, of
        any number.
        """
        first, n = parts[0].n_constants, parts[0].n_carries

        def with_carry(carry: Sequence[T]) -> list[T]:
            return [*inputs[:first], *carry, *inputs[first + n :]]

        def step(carry: Sequence[T]) -> list[T]:
            before = with_carry(carry)
            made = [self.outputs(part.program, before)[:n] for part in parts]
            return [reduce(self.join, column) for column in zip(*made, strict=True)]

        carry = inputs[first : first + n]
        return with_carry(settled(step, carry, self.join, rounds))

    def through(self, equation: Equation, operands: Sequence[T]) -> list[T]:
        """The facts that a loop's or branch's outputs have by way of its bodies."""
        length = equation.params.get("length")  # a scan's; other loops may go on
        rounds = None if length is None else length - 1
        found = []
        for body in bodies_of(equation):
            inputs = self.settled([body], operands[body.first :], rounds)
            outs = list(self.outputs(body.program, inputs))
            if not length and body.n_carries:  # it may run no time at all
                carry = inputs[body.n_constants : body.n_constants + body.n_carries]
                outs[: body.n_carries] = map(self.join, carry, outs)
            found.append(outs)
        return [reduce(self.join, column) for column in zip(*found, strict=True)]

    def deciding(self, equation: Equation, operands: Sequence[T]) -> T:
        """The fact of what decides: a branch's index, a ``while_loop``'s condition."""
        if equation.primitive is p.cond_p:
            return operands[0]
        if equation.primitive is not p.while_p:
            return self.nothing
        condition, _ = equation.bodies
        (body,) = bodies_of(equation)
        carry = self.settled([body], operands[body.first :])[body.n_constants :]
        (goes_on,) = self.outputs(condition, [*operands[: body.first], *carry])
        return goes_on


def _is_a_copy(equation: Equation) -> bool:
    """Whether a selection is among copies of one value, and depends on no predicate.

    Under ``vmap``, ``lax.switch`` passes every operand of a branch, parameters too,
    through ``select_n(taken, stop_gradient(v), v)``.
    """
    if equation.primitive is not p.select_n_p:
        return False
    (first, *others) = map(_original, equation.inputs[1:])
    return bool(others) and all(other is first for other in others)


def _original(atom: Atom) -> Atom:
    while isinstance(atom, Value) and atom.producer is not None:
        if atom.producer.primitive is not p.stop_gradient_p:
            break
        (atom,) = atom.producer.inputs
    return atom


class Dependence(Flow[bool]):
    """Which values depend on some, in any way: as numbers, or by what these decide.

    Args:
      follows: what of a value's own is followed; else all is.
    """

    nothing = False

    def __init__(self, follows: Callable[[Value], bool] | None = None) -> None:
        super().__init__()
        self._follows = follows

    def transfer(self, equation: Equation, operands: list[bool]) -> Sequence[bool]:
        if equation.bodies:
            decides = self.deciding(equation, operands)
            outs = [out or decides for out in self.through(equation, operands)]
        else:
            outs = [any(operands)] * len(equation.outputs)
        if self._follows is None:
            return outs
        pairs = zip(equation.outputs, outs, strict=True)
        return [out and self._follows(v) for v, out in pairs]


class Passage(Flow[bool]):
    """Which values are made of the numbers of some, through what passes them.

    Args:
      passes: whether an equation passes its operands on to an output.
    """

    nothing = False

    def __init__(self, passes: Callable[[Equation, Value], bool]) -> None:
        super().__init__()
        self._passes = passes

    def transfer(self, equation: Equation, operands: list[bool]) -> Sequence[bool]:
        if equation.bodies:
            outs = self.through(equation, operands)
        elif (sources := taken_from(equation)) is not None:
            outs = [any(operands[i] for i in part) for part in sources]
        else:
            outs = [any(operands)] * len(equation.outputs)
        pairs = zip(equation.outputs, outs, strict=True)
        return [out and self._passes(equation, v) for v, out in pairs]


def reached(flow: Flow[bool], program: Program, starts: Iterable[Any]) -> set[Any]:
    """The values that a flow of booleans reaches from some; these are among them."""
    return set(flow.forward(program, dict.fromkeys(starts, True)))


def dependent(program: Program, starts: Iterable[Any]) -> set[Any]:
    """The values that depend on some in any way, and these."""
    return reached(Dependence(), program, starts)
