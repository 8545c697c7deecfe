"""Activity: which values carry relevance between the sources and what is explained.

Only active paths carry relevance; parameters, masks, positions and random bits are
constants. Loops are followed by their fixpoint: a carry is active if any iteration
makes it so.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

from jlrp.analysis.dataflow import Flow
from jlrp.ir.families import choosing, taken_from
from jlrp.ir.fixpoint import settled
from jlrp.ir.jax_compat import is_inexact
from jlrp.ir.loops import Body, bodies_of
from jlrp.ir.primitives import traits
from jlrp.ir.program import (
    CARRIED,
    CHOSEN,
    DEAD,
    INDEPENDENT,
    Atom,
    Equation,
    Program,
    Value,
)

Carries = Callable[[Equation], bool]


class Levels(Flow[int]):
    """How values depend on what is explained; ``carries``: what passes relevance on."""

    nothing = INDEPENDENT

    def __init__(self, carries: Carries) -> None:
        super().__init__()
        self._carries = carries

    def transfer(self, equation: Equation, operands: list[int]) -> Sequence[int]:
        if equation.bodies:
            chosen = min(self.deciding(equation, operands), CHOSEN)
            outs = [max(chosen, out) for out in self.through(equation, operands)]
        elif (sources := _taken_from(equation)) is not None:  # the others choose
            chosen = min(max(operands), CHOSEN)
            outs = [max(chosen, *(operands[i] for i in part)) for part in sources]
        else:
            outs = [max(operands)] * len(equation.outputs)
        if CARRIED not in outs:
            return outs
        carries = self._carries(equation)
        return [
            level if level < CARRIED or (carries and is_inexact(v)) else DEAD
            for v, level in zip(equation.outputs, outs, strict=True)
        ]


def _taken_from(equation: Equation) -> list[set[int]] | None:
    """For each output, the operands whose numbers it may be; None: all of them."""
    steering = traits(equation).steering
    if not steering:
        return taken_from(equation)
    return [{i for i in range(len(equation.inputs)) if i not in steering}]


def activate(
    program: Program,
    sources: Sequence[Value],
    explained: Sequence[Atom],
    levels: Levels,
    entries: Mapping[Value, Sequence[Value]],
) -> None:
    """Find the values that carry relevance between ``sources`` and ``explained``.

    A value is active if it depends on a source through floating-point values and
    equations that carry relevance, and reaches an explained output. ``entries`` are the
    floats that integer sources turn into, with these sources.
    """
    starts = {v: CARRIED if is_inexact(v) else CHOSEN for v in sources}
    starts |= dict.fromkeys(entries, CARRIED)
    _activate(program, sources, explained, levels.forward(program, starts))
    program.entered = frozenset(
        v for end in entries if end in program.active for v in entries[end]
    )


def _activate(
    program: Program,
    sources: Sequence[Value],
    explained: Sequence[Atom],
    levels: Mapping[Value, int],
) -> None:
    targets = tuple(a for a in explained if isinstance(a, Value))
    active = {v for v in targets if levels.get(v) == CARRIED}
    uses: dict[Value, list[Equation]] = defaultdict(list)
    program.choosing = {}
    for equation in reversed(program.equations):
        if active.isdisjoint(equation.outputs):
            continue
        if keys := choosing(equation, active):
            program.choosing[equation] = keys
        for atom in equation.inputs:
            if not isinstance(atom, Value) or atom in keys:
                continue
            if levels.get(atom) == CARRIED:
                active.add(atom)
                uses[atom].append(equation)
    program.sources = tuple(sources)
    program.explained = targets
    program.active, program.operands = frozenset(active), {}
    program.levels = levels
    program.uses = dict(uses)


_PEELED = 8  # at most: iterations by which a loop's activity has settled


def active_parts(
    program: Program, equation: Equation, flow: Levels, peel_first: bool = False
) -> list[list[Body]]:
    """The bodies of a loop or branch, active as the program around them makes them.

    Of a branch, one for each case. Of a loop, one for the first iteration if its
    initial state carries no relevance while later ones do, as in the unrolled program,
    or if asked to, and one for all that follow.
    """
    found = []
    for case, body in enumerate(bodies_of(equation)):
        levels = [_level(program, atom) for atom in body.operands(equation)]
        parts: list[tuple[Body, list[int]]] = []
        while True:
            part = bodies_of(equation, equation.fresh_bodies())[case]
            following = flow.settled([part], levels, rounds=1)
            if len(parts) == _PEELED:
                following = levels = flow.settled([part], levels)
            parts.append((part, levels))
            alone = peel_first and body.n_carries and len(parts) == 1
            if following == levels and not alone:
                break
            levels = following
        _explain(program, equation, parts, flow)
        for part, _ in parts:
            part.program.parent = program
            part.program.origins = _origins(equation, part)
        found.append([part for part, _ in parts])
    return found


def _level(program: Program, atom: Atom) -> int:
    level = program.level(atom)
    return level if level < CARRIED or program.is_active(atom) else DEAD


def _origins(equation: Equation, body: Body) -> dict[Value, tuple[Atom, ...]]:
    """What the inputs of a body are: operands, and for carries the last iteration's."""
    inner = body.program
    pairs = zip(inner.inputs, body.operands(equation), strict=True)
    found: dict[Value, tuple[Atom, ...]] = {v: (a,) for v, a in pairs}
    for carry, out in zip(body.carries, inner.outputs, strict=False):
        found[carry] += (out,)
    return found


def _explain(
    program: Program,
    equation: Equation,
    parts: list[tuple[Body, list[int]]],
    flow: Levels,
) -> None:
    """Activate the parts, last first: each explains the carries that the next reads."""
    outer = [v in program.active for v in equation.outputs]
    read: list[bool] | None = None
    for body, levels in reversed(parts):
        read = _activate_part(body, levels, flow, outer, read)


def _activate_part(
    body: Body,
    levels: list[int],
    flow: Levels,
    outer: list[bool],
    read: list[bool] | None,
) -> list[bool]:
    """Activate one part of a loop; which of its carries are active.

    ``outer`` are the outputs that are active behind the loop, ``read`` the carries that
    are in the part that follows; None: it follows itself.
    """
    inner, n = body.program, body.n_carries
    starts = dict(zip(inner.inputs, levels, strict=True))
    sources = [v for v, level in starts.items() if level == CARRIED]
    found = flow.forward(inner, starts)

    def step(read: Sequence[bool]) -> list[bool]:
        wanted = [*map(operator.or_, outer, read), *outer[n:]]
        explained = [a for a, w in zip(inner.outputs, wanted, strict=True) if w]
        _activate(inner, sources, explained, found)
        return [v in inner.active for v in body.carries]

    if read is not None:
        return step(read)
    return settled(step, [False] * n, operator.or_)
