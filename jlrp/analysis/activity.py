"""Activity: which values carry relevance between the sources and what is explained.

Only active paths carry relevance; parameters, masks, positions and random bits are
constants. Loops are followed by their fixpoint: a carry is active if any iteration
makes it so.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

import jax.numpy as jnp
from jax.extend.core import primitives as p

from jlrp.ir.families import choosing, taken_from
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
Passes = Callable[[Equation], Sequence[bool]]
Levels = Mapping[Value, int]
Flag = TypeVar("Flag", bool, int)


def activate(
    program: Program,
    sources: Sequence[Value],
    explained: Sequence[Atom],
    carries: Carries,
    entries: Mapping[Value, Sequence[Value]],
    levels: Levels | None = None,
) -> None:
    """Find the values that carry relevance between ``sources`` and ``explained``.

    A value is active if it depends on a source through floating-point values and
    equations that ``carries`` relevance, and reaches an explained output. ``entries``
    are the floats that integer sources turn into, with these sources. ``levels`` are
    those of the inputs, if not the sources alone depend on what is explained.
    """
    targets = tuple(a for a in explained if isinstance(a, Value))
    starts = {v: CARRIED if _is_float(v) else CHOSEN for v in sources}
    starts |= dict.fromkeys(entries, CARRIED)
    found = levels_in(program, starts if levels is None else levels, carries)
    active = {v for v in targets if found.get(v) == CARRIED}
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
            if found.get(atom) == CARRIED:
                active.add(atom)
                uses[atom].append(equation)
    program.sources = tuple(sources)
    program.explained = targets
    program.active = frozenset(active)
    program.entered = frozenset(
        v for end in entries if end in active for v in entries[end]
    )
    program.levels = found
    program.uses = dict(uses)


def _is_float(atom: Atom) -> bool:
    return jnp.issubdtype(atom.dtype, jnp.inexact)


def levels_in(program: Program, starts: Levels, carries: Carries) -> dict[Value, int]:
    """How the values of a program depend on its inputs, whose levels are given."""
    found: dict[Value, int] = {v: n for v, n in starts.items() if n}  # type: ignore
    for equation in program.equations:
        operands = [found.get(a, INDEPENDENT) for a in equation.inputs]  # type: ignore
        if not any(operands):
            continue
        if _is_a_copy(equation):
            operands[0] = INDEPENDENT
        if equation.bodies:
            outs = _levels_through_bodies(equation, operands, carries)
        elif (sources := _taken_from(equation)) is not None:  # the others choose
            taken = [max(operands[i] for i in part) for part in sources]
            outs = [max(n, min(max(operands), CHOSEN)) for n in taken]
        else:
            outs = [max(operands)] * len(equation.outputs)
        for value, level in zip(equation.outputs, outs, strict=True):
            if level == CARRIED and not (_is_float(value) and carries(equation)):
                level = DEAD
            if level > found.get(value, INDEPENDENT):
                found[value] = level
    return found


def _taken_from(equation: Equation) -> list[set[int]] | None:
    """For each output, the operands whose numbers it may be; None: all of them."""
    steering = traits(equation).steering
    if not steering:
        return taken_from(equation)
    return [{i for i in range(len(equation.inputs)) if i not in steering}]


def _levels_through_bodies(
    equation: Equation, operands: Sequence[int], carries: Carries
) -> list[int]:
    outs = [INDEPENDENT] * len(equation.outputs)
    for body in bodies_of(equation):
        inside = list(operands[body.first :])
        left = equation.params.get("length")  # a scan's; other loops may run for ever
        while True:
            made = _outputs(body, inside, carries)
            grown = with_carries(body, inside, made)
            left = left and left - 1
            if grown == inside or left == 0:
                break
            inside = grown
        outs = [max(a, b) for a, b in zip(outs, made, strict=True)]
    return outs


def _outputs(body: Body, inputs: Sequence[int], carries: Carries) -> list[int]:
    """The levels of a body's outputs behind one iteration."""
    starts = dict(zip(body.program.inputs, inputs, strict=True))
    found = levels_in(body.program, starts, carries)
    return [found.get(a, INDEPENDENT) for a in body.program.outputs]  # type: ignore


def flow(program: Program, starts: Iterable[Value], passes: Passes) -> set[Value]:
    """The values that depend on some values, through what ``passes`` of an equation."""
    found = set(starts)
    for equation in program.equations:
        flags = [isinstance(a, Value) and a in found for a in equation.inputs]
        if flags and _is_a_copy(equation):
            flags[0] = False
        if not any(flags):
            continue
        outs = passes(equation)
        if passes is not everything and (sources := taken_from(equation)) is not None:
            taken = [any(flags[i] for i in part) for part in sources]
            outs = [a and b for a, b in zip(outs, taken, strict=True)]
        if equation.bodies:
            inside = _through_bodies(equation, flags, passes)
            outs = [a and b for a, b in zip(outs, inside, strict=True)]
        found.update(v for v, out in zip(equation.outputs, outs, strict=True) if out)
    return found


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


def _through_bodies(
    equation: Equation, flags: Sequence[bool], passes: Passes
) -> list[bool]:
    bodies = bodies_of(equation)
    outs = [not bodies] * len(equation.outputs)
    for body in bodies:
        inside = list(flags[body.first :])
        left = equation.params.get("length")  # a scan's; other loops may run for ever
        while True:
            starts = [v for v, f in zip(body.program.inputs, inside, strict=True) if f]
            found = flow(body.program, starts, passes)
            made = [a in found for a in body.program.outputs]  # type: ignore[operator]
            grown = with_carries(body, inside, made)
            left = left and left - 1
            if grown == inside or left == 0:
                break
            inside = grown
        outs = [a or b for a, b in zip(outs, made, strict=True)]
    return outs


def with_carries(body: Body, inside: list[Flag], made: Sequence[Flag]) -> list[Flag]:
    """Flags or levels of a body's inputs; carries as high as an iteration sets them."""
    grown = list(inside)
    for k in range(body.n_carries):
        carry = body.n_constants + k
        grown[carry] = max(grown[carry], made[k])
    return grown


_PEELED = 8  # at most: iterations by which a loop's activity has settled


def active_parts(
    program: Program, equation: Equation, carries: Carries, peel_first: bool = False
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
            last = len(parts) == _PEELED
            following = _after(part, levels, carries, last)
            settled = following == levels
            if last and not settled:
                levels, settled = following, True
            parts.append((part, levels))
            if settled and (len(parts) > 1 or not (peel_first and body.n_carries)):
                break
            levels = following
        _explain(program, equation, parts, carries)
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
    carries: Carries,
) -> None:
    """Activate the parts, last first: each explains the carries that the next reads."""
    outer = [v in program.active for v in equation.outputs]
    following: Body | None = None
    for body, levels in reversed(parts):
        wanted = list(outer)
        inner = body.program
        starts = dict(zip(inner.inputs, levels, strict=True))
        sources = [v for v, level in starts.items() if level == CARRIED]
        while True:
            for k, carry in enumerate((following or body).carries):
                wanted[k] |= carry in (following or body).program.active
            explained = [a for a, w in zip(inner.outputs, wanted, strict=True) if w]
            before = inner.active
            activate(inner, sources, explained, carries, {}, starts)
            if following is not None or inner.active == before:
                break
        following = body


def _after(body: Body, levels: list[int], carries: Carries, settle: bool) -> list[int]:
    """Levels of a body's inputs behind one iteration, or behind any number."""
    while True:
        grown = with_carries(body, levels, _outputs(body, levels, carries))
        if grown == levels or not settle:
            return grown
        levels = grown


def everything(equation: Equation) -> Sequence[bool]:
    return [True] * len(equation.outputs)
