"""Activity: which values carry relevance between the sources and what is explained.

Only active paths carry relevance; parameters, masks, positions and random bits are
constants. Loops are followed by their fixpoint: a carry is active if any iteration
makes it so.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence

import jax.numpy as jnp
from jax.extend.core import primitives as p

from jlrp.bodies import Body, bodies_of
from jlrp.families import choosing, taken_from
from jlrp.graph import Atom, Equation, Program, Value

Carries = Callable[[Equation], bool]
Passes = Callable[[Equation], Sequence[bool]]


def activate(
    program: Program,
    sources: Sequence[Value],
    explained: Sequence[Atom],
    carries: Carries,
    entries: Mapping[Value, Sequence[Value]],
    dependent: Iterable[Value] = (),
) -> None:
    """Find the values that carry relevance between ``sources`` and ``explained``.

    A value is active if it depends on a source through floating-point values and
    equations that ``carries`` relevance, and reaches an explained output. ``entries``
    are the floats that integer sources turn into, with these sources. ``dependent`` are
    inputs that depend on what is explained without carrying relevance.
    """
    targets = tuple(a for a in explained if isinstance(a, Value))
    starts = {v for v in sources if jnp.issubdtype(v.dtype, jnp.inexact)}

    def passes(equation: Equation) -> Sequence[bool]:
        if not carries(equation):
            return [False] * len(equation.outputs)
        return [jnp.issubdtype(v.dtype, jnp.inexact) for v in equation.outputs]

    reached = flow(program, starts.union(entries), passes)
    active = reached.intersection(targets)
    uses: dict[Value, list[Equation]] = defaultdict(list)
    program.choosing = {}
    for equation in reversed(program.equations):
        if active.isdisjoint(equation.outputs):
            continue
        if keys := choosing(equation, active):
            program.choosing[equation] = keys
        for atom in equation.inputs:
            if isinstance(atom, Value) and atom in reached and atom not in keys:
                active.add(atom)
                uses[atom].append(equation)
    program.sources = tuple(sources)
    program.explained = targets
    program.active = frozenset(active)
    program.entered = frozenset(
        v for end in entries if end in active for v in entries[end]
    )
    starts = {*sources, *dependent}
    program.dependent = frozenset(flow(program, starts, everything))
    program.uses = dict(uses)


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


def with_carries(body: Body, inside: list[bool], made: Sequence[bool]) -> list[bool]:
    """Flags of a body's inputs, with those of the carries that an iteration sets."""
    grown = list(inside)
    for k in range(body.n_carries):
        grown[body.n_constants + k] |= made[k]
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
        operands = body.operands(equation)
        active = [program.is_active(a) for a in operands]
        dependent = [not program.is_parameter(a) for a in operands]
        parts: list[tuple[Body, list[bool], list[bool]]] = []
        while True:
            part = bodies_of(equation, equation.fresh_bodies())[case]
            last = len(parts) == _PEELED
            next_active = _after(part, active, _floats(carries), last)
            next_dependent = _after(part, dependent, everything, last)
            settled = (next_active, next_dependent) == (active, dependent)
            if last and not settled:
                active, dependent, settled = next_active, next_dependent, True
            parts.append((part, active, dependent))
            if settled and (len(parts) > 1 or not (peel_first and body.n_carries)):
                break
            active, dependent = next_active, next_dependent
        _explain(program, equation, parts, carries)
        for part, _, _ in parts:
            part.program.parent = program
            part.program.origins = _origins(equation, part)
        found.append([part for part, _, _ in parts])
    return found


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
    parts: list[tuple[Body, list[bool], list[bool]]],
    carries: Carries,
) -> None:
    """Activate the parts, last first: each explains the carries that the next reads."""
    outer = [v in program.active for v in equation.outputs]
    following: Body | None = None
    for body, active, dependent in reversed(parts):
        wanted = list(outer)
        while True:
            inner = body.program
            for k, carry in enumerate((following or body).carries):
                wanted[k] |= carry in (following or body).program.active
            explained = [a for a, w in zip(inner.outputs, wanted, strict=True) if w]
            before = inner.active
            activate(
                inner,
                _chosen(inner, active),
                explained,
                carries,
                {},
                _chosen(inner, dependent),
            )
            if following is not None or inner.active == before:
                break
        following = body


def _after(body: Body, flags: list[bool], passes: Passes, settle: bool) -> list[bool]:
    """Flags of a body's inputs behind one iteration, or behind any number."""
    while True:
        found = flow(body.program, _chosen(body.program, flags), passes)
        made = [isinstance(a, Value) and a in found for a in body.program.outputs]
        grown = with_carries(body, flags, made)
        if grown == flags or not settle:
            return grown
        flags = grown


def _chosen(program: Program, flags: Sequence[bool]) -> list[Value]:
    return [v for v, flag in zip(program.inputs, flags, strict=True) if flag]


def everything(equation: Equation) -> Sequence[bool]:
    return [True] * len(equation.outputs)


def _floats(carries: Carries) -> Passes:
    def passes(equation: Equation) -> Sequence[bool]:
        floating = [jnp.issubdtype(v.dtype, jnp.inexact) for v in equation.outputs]
        return floating if carries(equation) else [False] * len(floating)

    return passes
