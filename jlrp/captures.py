"""Names of values: the outputs of name scopes, and tags.

A scope's outputs are the values that are made in it and read outside of it. Globs match
component by component: ``*`` within one, ``**`` any number of them. A name in the body
of a loop stands for one value in each iteration, stacked; one in a branch for zeros
where another branch ran.
"""

from __future__ import annotations

import difflib
import fnmatch
import functools
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import primitives as p

from jlrp import _jax
from jlrp.bodies import bodies_of
from jlrp.errors import InputError, SelectorError
from jlrp.graph import Equation, Program, Value
from jlrp.operations import Operation

T = TypeVar("T")
Named = dict[str, tuple[Value, ...]]


def named_values(program: Program, scope: str = "") -> Named:
    """The values of every tag and scope, in the program's order.

    ``scope`` is that of the loop or branch whose body the program is: a value that
    leaves the body is still in it. That a scope was opened under ``vmap`` is no part of
    its name.
    """
    scope = _without_maps(scope)
    readers: dict[Value, set[str | None]] = defaultdict(set)
    for equation in program.equations:
        for atom in equation.inputs:
            if isinstance(atom, Value):
                readers[atom].add(_without_maps(equation.scope))
    for atom in program.outputs:
        if isinstance(atom, Value):
            readers[atom].add(None)
    named: dict[str, dict[Value, None]] = defaultdict(dict)
    for equation in program.equations:
        path = _without_maps(equation.scope)
        components = path.split("/") if path else []
        for value in equation.outputs:
            for depth in range(1, len(components) + 1):
                path = "/".join(components[:depth])
                leaves = any(not _is_inside(s, path) for s in readers[value])
                if leaves and not _is_inside(scope, path):
                    named[path][value] = None
    for name, atoms in program.tags.items():
        named[name] = dict.fromkeys(a for a in atoms if isinstance(a, Value))
    return {name: tuple(values) for name, values in named.items() if values}


@functools.lru_cache(maxsize=4096)
def _without_maps(path: str) -> str:
    return "/".join(part for part in path.split("/") if part not in _MAPS)


_MAPS = ("vmap()", "jvp()")  # components that JAX adds to a path


def _is_inside(scope: str | None, path: str) -> bool:
    return scope is not None and f"{scope}/".startswith(f"{path}/")


# Where names are: in a program, and in the bodies of its loops and branches.


@dataclass(frozen=True)
class Place:
    """A value that a name stands for, and the loops and branches around it."""

    value: Value
    around: tuple[Equation, ...] = ()

    def stacked(self, steps: int | None) -> tuple[int, ...] | None:
        """The shape of its values in all iterations; None in a loop of no known length.

        ``steps`` is how many iterations of a while loop are recorded.
        """
        axes: list[int] = []
        for equation in self.around:
            if equation.primitive is p.while_p and steps is None:
                return None
            axes += _axis(equation, steps)
        return (*axes, *self.value.shape)

    def made_at(self, iteration: tuple[int, ...]) -> tuple[float, ...]:
        """What orders values by when they are made, in these iterations of the loops.

        An output of a loop is made behind all values in it.
        """
        when: list[float] = []
        left = list(iteration)
        for equation in self.around:
            when.append(equation.position)
            if equation.primitive is not p.cond_p:
                i = left.pop(0)
                backwards = equation.params.get("reverse", False)
                when.append(equation.params["length"] - 1 - i if backwards else i)
        return (*when, self.value.position, math.inf)


def places(program: Program, scope: str = "") -> dict[str, list[Place]]:
    """The places of every name, in the program's order."""
    own: dict[str, list[tuple[int, Place]]] = defaultdict(list)
    inner: dict[str, list[tuple[int, Place]]] = defaultdict(list)
    for name, values in named_values(program, scope).items():
        own[name] = [(v.position, Place(v)) for v in values]
    for equation in _with_unread(program):
        for body in equation.bodies:
            for name, found in places(body, equation.scope).items():
                for place in found:
                    outside = Place(place.value, (equation, *place.around))
                    inner[name].append((equation.position, outside))
    return {name: _in_order(own[name], inner[name]) for name in {**own, **inner}}


def _with_unread(program: Program) -> list[Equation]:
    equations = [*program.equations, *program.unread]
    return sorted(equations, key=lambda e: e.position)


def _in_order(own: Sequence[tuple[int, T]], inner: Sequence[tuple[int, T]]) -> list[T]:
    """A program's own items, and between them those of its loops, by position."""
    waiting = list(inner)
    ordered = []
    for position, item in own:
        while waiting and waiting[0][0] <= position:
            ordered.append(waiting.pop(0)[1])
        ordered.append(item)
    return ordered + [item for _, item in waiting]


def _axis(equation: Equation, steps: int | None) -> list[int]:
    """The axis of iterations that a loop puts in front; a branch has none."""
    if equation.primitive is p.scan_p:
        return [equation.params["length"]]
    return [steps or 0] if equation.primitive is p.while_p else []


def matching(named: Mapping[str, T], patterns: Iterable[str]) -> dict[str, T]:
    """The names that patterns match.

    Raises:
      SelectorError: a pattern matches no scope and no tag.
    """
    found: dict[str, T] = {}
    for pattern in patterns:
        path = _without_maps(pattern)
        matched = [name for name in named if matches_path(name, path)]
        if not matched:
            near = difflib.get_close_matches(pattern, named, n=3, cutoff=0.4)
            listed = ", ".join(sorted(named)[:12]) or "none"
            raise SelectorError(
                f"{pattern!r} matches no name scope and no tag of this program. "
                + (f"Nearest: {', '.join(map(repr, near))}. " if near else "")
                + f"Names here: {listed}{', ...' if len(named) > 12 else ''}. Name "
                "values with jax.named_scope or jlrp.tag, or wrap the model with "
                "jlrp.integrations, which gives operations their module paths."
            )
        found.update((name, named[name]) for name in matched)
    return found


def matches_path(path: str, pattern: str) -> bool:
    """Whether a glob matches a whole path, component by component."""
    parts = [_component(part) for part in pattern.split("/")]
    return (
        re.fullmatch("/".join(parts).replace("(?:.*)/", "(?:.*/)?"), path) is not None
    )


def _component(glob: str) -> str:
    if glob == "**":
        return "(?:.*)"
    translated = fnmatch.translate(glob)  # (?s:...)\Z or \z
    inner = translated[translated.index(":") + 1 : translated.rindex(")")]
    return inner.replace(".*", "[^/]*")


def conditioned(
    named: Mapping[str, Sequence[Place]], names: Iterable[str]
) -> dict[str, tuple[str, Place]]:
    """By pattern, the one name that it matches, and the one place of that.

    Raises:
      SelectorError: a pattern matches nothing, or more than one value.
    """
    found: dict[str, tuple[str, Place]] = {}
    for pattern in names:
        matched = matching(named, [pattern])
        all_places = [(name, place) for name, some in matched.items() for place in some]
        if len(all_places) != 1:
            listed = ", ".join(matched)
            raise SelectorError(
                f"A condition masks one value; {pattern!r} names {len(all_places)}, of "
                f"{listed}. Choose a narrower name, or mark the value with jlrp.tag."
            )
        (found[pattern],) = all_places
    return found


def check_mask(
    name: str, mask: tuple[int, ...], place: Place, steps: int | None
) -> None:
    """Refuse a mask that fits neither the value nor its values in all iterations.

    Raises:
      InputError: for such a mask, or one by iteration of a while loop of no known
        length.
    """
    stacked = place.stacked(steps)
    if _broadcasts(mask, place.value.shape):
        return
    if stacked is not None and _broadcasts(mask, stacked):
        return
    shapes = f"{place.value.shape}"
    if stacked is None:
        shapes += (
            ": it is in a while loop, and one mask for each iteration needs "
            "capture_steps=N in jlrp.explain"
        )
    elif stacked != place.value.shape:
        shapes += f", or to {stacked} with one for each iteration"
    raise InputError(
        f"The condition on {name!r} has shape {mask}; it must broadcast to that "
        f"value's shape, {shapes}."
    )


def _broadcasts(mask: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    try:
        return np.broadcast_shapes(mask, shape) == shape
    except ValueError:
        return False


def check_steps(named: Mapping[str, Sequence[Place]], steps: int | None) -> None:
    """Refuse to stack the iterations of a while loop without a number of them.

    Raises:
      InputError: a place is in a while loop, and ``steps`` is None.
    """
    for name, found in named.items():
        for place in found:
            loops = [e for e in place.around if e.primitive is p.while_p]
            if loops and steps is None:
                raise InputError(
                    f"{name!r} names a value in the while loop at {loops[0].where()}, "
                    "which runs a number of times that is known only then. Pass "
                    "capture_steps=N to jlrp.explain, at least as many as it runs: the "
                    "rows behind are zeros."
                )


# What is asked for, program by program.


@dataclass(frozen=True)
class Asked:
    """What is asked for at the names of a program, and of the bodies in it.

    Attributes:
      capture: names whose relevance is returned.
      conditions: by name, the masks that are set on it.
      steps: how many iterations of a while loop are recorded.
      scope: of the loop or branch whose body the program is.
      stacked: by name, the outputs of the program that it names from outside.
    """

    capture: frozenset[str] = frozenset()
    conditions: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    steps: int | None = None
    scope: str = ""
    stacked: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def inside(self, program: Program, equation: Equation) -> Asked:
        """The same for the bodies of a loop or branch in the program."""
        stacked: dict[str, tuple[int, ...]] = {}
        for name, values in self._named(program).items():
            indices = [_stacks(program, v) for v in values if v.producer is equation]
            if found := tuple(i for i in indices if i is not None):
                stacked[name] = found
        return Asked(self.capture, self.conditions, self.steps, equation.scope, stacked)

    def captured(self, program: Program) -> Named:
        return self._own(program, self.capture)

    def masked(self, program: Program) -> dict[str, Value]:
        """By mask, the value of the program that it is set on."""
        own = self._own(program, self.conditions)
        return {mask: v for n, (v,) in own.items() for mask in self.conditions[n]}

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
    program.boundaries.update(asked.masked(program).values())
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
    """

    like: jax.ShapeDtypeStruct | None
    value: Value | None = None
    loop: Equation | None = None
    body: int = 0
    index: int = 0
    origin: int = 0
    axes: int = 0


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
        found = _reported(
            program, values, at_operations(values, operations), name, like
        )
        own[name] = [(values[e.origin].position, e) for e in found]
    for equation in _with_unread(program):
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
    ordered = {name: _in_order(own[name], inner[name]) for name in {**own, **inner}}
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
        shape = (*_axis(loop, steps), *like.shape)
        like = jax.ShapeDtypeStruct(shape, like.dtype)
    axes = entry.axes + len(_axis(loop, steps))
    return Entry(like, None, loop, body, index, axes=axes)


def _reported(
    program: Program,
    values: Sequence[Value],
    reported: Sequence[Value],
    name: str,
    like: Entries | None,
) -> list[Entry]:
    """The values at which relevance is reported, each once, as ``like`` has them."""
    if like is None:
        first: dict[Value, int] = {}
        for i, v in enumerate(reported):
            first.setdefault(v, i)
        return [Entry(_like(v), v, origin=i) for v, i in first.items()]
    found = []
    for entry in like.get(name, ()):
        if entry.loop is not None or entry.origin >= len(reported):
            continue
        value = reported[entry.origin]
        if _like(value) == entry.like:
            found.append(Entry(entry.like, value, origin=entry.origin))
        elif value not in program.active:  # of no relevance: in any shape
            found.append(Entry(entry.like, origin=entry.origin))
        else:
            found.append(Entry(_like(value), value, origin=entry.origin))
    return found


def _like(value: Value) -> jax.ShapeDtypeStruct | None:
    """Shape and dtype of a value's relevance."""
    if _jax.is_key(value.dtype):
        return None
    dtype = jnp.dtype(jnp.float32)
    if jnp.issubdtype(value.dtype, jnp.inexact):
        low = str(value.dtype) in _jax.LOW_PRECISION
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
