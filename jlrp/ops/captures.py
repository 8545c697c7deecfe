"""What is asked for at names, in a program and in the bodies of its loops and branches.

A body has values of its own wherever it is made anew: for a first iteration, for each
case. What is captured in it is counted alike in all of them, by name and order.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import primitives as p

from jlrp.errors import SelectorError
from jlrp.ir import jax_compat
from jlrp.ir.loops import bodies_of
from jlrp.ir.names import (
    Named,
    in_order,
    is_made,
    loop_axis,
    named_values,
    places,
    with_unread,
)
from jlrp.ir.program import Equation, Program, Value
from jlrp.ops.base import Operation


@dataclass(frozen=True)
class Masked:
    """A value with a mask: of this iteration, the next, or a loop's first or last."""

    mask: str
    value: Value
    which: str = "this"


@dataclass(frozen=True)
class Asked:
    """What is asked for at the names of a program, and of the bodies in it.

    Attributes:
      capture: names whose relevance is returned.
      conditions: by name, the masks that are set on it.
      steps: how many iterations of a while loop are recorded.
      scope: of the loop or branch whose body the program is.
      stacked: by name, the outputs of the program that it names from outside.
      carries: which inputs of the program the iteration before makes, in a scan.
    """

    capture: frozenset[str] = frozenset()
    conditions: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    steps: int | None = None
    scope: str = ""
    stacked: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    carries: range = range(0)

    def inside(self, program: Program, equation: Equation) -> Asked:
        """The same for the bodies of a loop or branch in the program."""
        stacked: dict[str, tuple[int, ...]] = {}
        for name, values in self._named(program).items():
            indices = [_stacks(program, v) for v in values if v.producer is equation]
            if found := tuple(i for i in indices if i is not None):
                stacked[name] = found
        carries = range(0)
        if equation.primitive is p.scan_p:
            (body,) = bodies_of(equation)
            carries = range(body.n_constants, body.n_constants + body.n_carries)
        return replace(self, scope=equation.scope, stacked=stacked, carries=carries)

    def captured(self, program: Program) -> Named:
        return self._own(program, self.capture)

    def made_by(self, program: Program, value: Value) -> int | None:
        """Which carry of a scan a value is as it comes in, if an iteration made it.

        It is the value that the iteration before handed out, or that the scan started
        from, with all that is made of it there.
        """
        if value.producer is not None or value not in program.inputs:
            return None
        index = program.inputs.index(value)
        if index not in self.carries:
            return None
        carry = index - self.carries.start
        return carry if is_made(program.outputs[carry]) else None

    def masked(self, program: Program) -> list[Masked]:
        """The values of the program that masks are set on."""
        found: list[Masked] = []
        if not self.conditions:
            return found
        for mask, value in self._with_masks(program):
            carry = self.made_by(program, value)
            if carry is None:
                found.append(Masked(mask, value))
            else:
                made = program.outputs[carry]
                assert isinstance(made, Value)
                found.append(Masked(mask, made, "next"))
        for scan in program.equations:
            if scan.primitive is p.scan_p:
                found += self._masked_starts(program, scan)
        return found

    def _masked_starts(self, program: Program, scan: Equation) -> list[Masked]:
        """What a scan starts from, where its first iteration masks that."""
        inside, (body,) = self.inside(program, scan), bodies_of(scan)
        which = "last" if scan.params["reverse"] else "first"
        found = []
        for mask, value in inside._with_masks(body.program):
            carry = inside.made_by(body.program, value)
            if carry is not None:
                start = scan.inputs[inside.carries[carry]]
                found += (
                    [Masked(mask, start, which)] if isinstance(start, Value) else []
                )
        return found

    def _with_masks(self, program: Program) -> list[tuple[str, Value]]:
        own = self._own(program, self.conditions)
        return [(mask, v) for n, (v,) in own.items() for mask in self.conditions[n]]

    def counts(self, loop: Equation) -> bool:
        """Whether a while loop must say how often it ran."""
        if loop.primitive is not p.while_p or self.steps is None:
            return False
        asked = self.capture.union(self.conditions)
        return any(not asked.isdisjoint(places(b, loop.scope)) for b in loop.bodies)

    def _own(self, program: Program, names: Iterable[str]) -> Named:
        """The program's own values of some names: not those of bodies in it."""
        named = self._named(program) if names else {}
        own = {
            name: tuple(v for v in named[name] if _stacks(program, v) is None)
            for name in names
            if name in named
        }
        return {name: values for name, values in own.items() if values}

    def _named(self, program: Program) -> Named:
        if not self.capture and not self.conditions:
            return {}
        named = named_values(program, self.scope)
        for name, indices in self.stacked.items():
            outs = tuple(program.outputs[i] for i in indices)
            named[name] = named.get(name, ()) + outs  # type: ignore[operator]
        return named


def _stacks(program: Program, value: Value) -> int | None:
    """Which output of a scan's body a value stacks, if that is all it stands for.

    A stacked output that reaches no score has no relevance of its own. A name on it is
    one on what it stacks: so ``h, hs = lax.scan(...)`` with ``jlrp.tag(hs, "layers")``
    names the values of each layer, though only h is read.
    """
    scan = value.producer
    if scan is None or scan.primitive is not p.scan_p or value in program.active:
        return None
    (body,) = bodies_of(scan)
    index = scan.outputs.index(value)
    if index < body.n_carries or program.active.isdisjoint(scan.outputs):
        return None
    return index if isinstance(body.program.outputs[index], Value) else None


def split_at(program: Program, asked: Asked) -> None:
    """Let no operation span a value with a mask, in the program and in its bodies."""
    if not asked.conditions:
        return
    program.boundaries.update(masked.value for masked in asked.masked(program))
    for equation in program.equations:
        if equation.bodies:
            inside = asked.inside(program, equation)
            equation.fresh_bodies = _splitting(equation.fresh_bodies, inside)


def _splitting(
    fresh: Callable[[], tuple[Program, ...]], asked: Asked
) -> Callable[[], tuple[Program, ...]]:
    def programs() -> tuple[Program, ...]:
        made = fresh()
        for program in made:
            split_at(program, asked)
        return made

    return programs


# What is captured.

COUNTS = ""  # no name: there while loops say how often they ran
Captured = dict[str, list[Any]]  # by name: in a program, or of all iterations


@dataclass(frozen=True, eq=False)
class Entry:
    """One array of what is captured at a name, in one program.

    Attributes:
      like: its shape and dtype; None for random keys, which have none.
      value: whose relevance it is; the others are set if it is none of the program's.
      loop, body, index: the loop or branch that hands it out, and which of the arrays
        of which of its bodies it is. Without these it is zeros.
      origin: which of the values of that name it stands for.
      axes: how many of its first axes are iterations.
      carry: of a carry as it comes in: which it is. ``value`` is then what the next
        iteration gets.
      start: what the first iteration gets, by which the rows of such a carry move on;
        they move back if the loop runs backwards.
    """

    like: jax.ShapeDtypeStruct | None
    value: Value | None = None
    loop: Equation | None = None
    body: int = 0
    index: int = 0
    origin: int = 0
    axes: int = 0
    carry: int | None = None
    start: Value | None = None
    backwards: bool = False

    @property
    def values(self) -> list[Value]:
        """The program's own values that it is made of."""
        return [v for v in (self.value, self.start) if v is not None]


Entries = Mapping[str, tuple[Entry, ...]]


def entries(
    program: Program,
    asked: Asked,
    operations: Sequence[Operation] = (),
    planned: Mapping[Equation, Mapping[int, Entries]] | None = None,
    like: Entries | None = None,
) -> Entries:
    """What is captured in a program, by name and in the program's order.

    Args:
      planned: the same of the bodies of its loops and branches; those that are left out
        carry no relevance.
      like: the same of the iterations that follow this one.

    Raises:
      SelectorError: an iteration differs from those that follow.
    """
    if not asked.capture and (not asked.conditions or asked.steps is None):
        return {}
    own: dict[str, list[tuple[int, Entry]]] = defaultdict(list)
    inner: dict[str, list[tuple[int, Entry]]] = defaultdict(list)
    for name, values in asked.captured(program).items():
        carries = [asked.made_by(program, v) for v in values]
        at = [
            v if carry is None else program.outputs[carry]
            for v, carry in zip(values, carries, strict=True)
        ]
        reported = at_operations(at, operations)  # type: ignore[arg-type]
        found = _reported(program, reported, carries, name, like)
        own[name] = [(values[e.origin].position, e) for e in found]
    for equation in with_unread(program):
        within = asked.inside(program, equation) if equation.bodies else asked
        for i, body in enumerate(equation.bodies):
            known = (planned or {}).get(equation, {}).get(i)
            found = entries(body, within) if known is None else known
            for name, several in found.items():
                inner[name] += [
                    (equation.position, _handed_out(e, equation, i, k, asked.steps))
                    for k, e in enumerate(several)
                ]
            if i == 1 and asked.counts(equation):
                count = jax.ShapeDtypeStruct((), jnp.int32)
                index = len(found.get(COUNTS, ()))
                entry = Entry(count, None, equation, i, index)
                inner[COUNTS].append((equation.position, entry))
    ordered = {name: in_order(own[name], inner[name]) for name in {**own, **inner}}
    made = {name: tuple(several) for name, several in ordered.items()}
    if like is not None and _shapes(made) != _shapes(like):
        raise SelectorError(
            f"The values of {', '.join(map(repr, made))} are inside of other "
            "operations in the first iteration of a loop than in those that follow, so "
            "that they cannot be stacked. Name outputs of operations; jlrp.inspect "
            "lists them."
        )
    return made


def _shapes(made: Entries) -> dict[str, list[Any]]:
    return {name: [e.like for e in several] for name, several in made.items()}


def loop_axes(made: Entries) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """By name, how many first axes of each array are iterations, if any are."""
    axes = {n: tuple(e.axes for e in es) for n, es in made.items() if n != COUNTS}
    return tuple((name, counts) for name, counts in axes.items() if any(counts))


def _handed_out(
    entry: Entry, loop: Equation, body: int, index: int, steps: int | None
) -> Entry:
    like = entry.like
    if like is not None:
        shape = (*loop_axis(loop, steps), *like.shape)
        like = jax.ShapeDtypeStruct(shape, like.dtype)
    axes = entry.axes + len(loop_axis(loop, steps))
    handed_out = Entry(like, None, loop, body, index, axes=axes)
    if entry.carry is None or entry.loop is not None or like is None:
        return handed_out
    n_constants = bodies_of(loop)[body].n_constants
    start = loop.inputs[n_constants + entry.carry]
    return replace(
        handed_out,
        start=start if isinstance(start, Value) else None,
        carry=entry.carry,
        backwards=loop.params["reverse"],
    )


def _reported(
    program: Program,
    reported: Sequence[Value],
    carries: Sequence[int | None],
    name: str,
    like: Entries | None,
) -> list[Entry]:
    """The values at which relevance is reported, each once, as ``like`` has them."""
    if like is None:
        first: dict[tuple[Value, int | None], int] = {}
        for i, at in enumerate(zip(reported, carries, strict=True)):
            first.setdefault(at, i)
        return [
            Entry(_like(v), v, origin=i, carry=carry) for (v, carry), i in first.items()
        ]
    found = []
    for entry in like.get(name, ()):
        if entry.loop is not None or entry.origin >= len(reported):
            continue
        value = reported[entry.origin]
        if _like(value) == entry.like:
            found.append(replace(entry, value=value))
        elif value not in program.active:  # of no relevance: in any shape
            found.append(replace(entry, value=None))
        else:
            found.append(replace(entry, value=value, like=_like(value)))
    return found


def _like(value: Value) -> jax.ShapeDtypeStruct | None:
    """Shape and dtype of a value's relevance."""
    if jax_compat.is_key(value.dtype):
        return None
    dtype = jnp.dtype(jnp.float32)
    if jnp.issubdtype(value.dtype, jnp.inexact):
        low = str(value.dtype) in jax_compat.LOW_PRECISION
        dtype = dtype if low else jnp.finfo(value.dtype).dtype
    return jax.ShapeDtypeStruct(value.shape, dtype)


def at_operations(
    values: Sequence[Value], operations: Sequence[Operation]
) -> list[Value]:
    """The same values, those inside an operation replaced by its output.

    Naming a value must not change the explanation, so that no operation is split:
    between a convolution and its batch norm, both of one operation, is at its end.
    """
    ends = {v for op in operations for v in op.outputs}
    inside: dict[Value, Value] = {}
    for op in operations:
        for equation in op.equations:
            for value in equation.outputs:
                inside.setdefault(value, op.outputs[0])
    return [v if v in ends else inside.get(v, v) for v in values]
