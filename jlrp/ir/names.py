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
import itertools
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
from jax.extend.core import primitives as p

from jlrp.errors import InputError, SelectorError
from jlrp.ir.loops import bodies_of
from jlrp.ir.program import Atom, Equation, Program, Value

T = TypeVar("T")
Named = dict[str, tuple[Value, ...]]


def named_values(program: Program, scope: str = "") -> Named:
    """The values of every tag and scope, in the program's order.

    ``scope`` is that of the loop or branch whose body the program is: a value that
    leaves the body is still in it. That a scope was opened under ``vmap`` is no part of
    its name.
    """
    scope = without_maps(scope)
    readers: dict[Value, set[str | None]] = defaultdict(set)
    for equation in program.equations:
        for atom in equation.inputs:
            if isinstance(atom, Value):
                readers[atom].add(without_maps(equation.scope))
    for atom in program.outputs:
        if isinstance(atom, Value):
            readers[atom].add(None)
    named: dict[str, dict[Value, None]] = defaultdict(dict)
    for equation in program.equations:
        if not (path := without_maps(equation.scope)):
            continue
        components = path.split("/")
        for value in equation.outputs:
            stays = [_shared(path, reader) for reader in readers[value]]
            for depth in range(min(stays, default=len(components)), len(components)):
                left = "/".join(components[: depth + 1])
                if not is_inside(scope, left):
                    named[left][value] = None
    for name, atoms in program.tags.items():
        named[name] = dict.fromkeys(a for a in atoms if isinstance(a, Value))
    return {name: tuple(values) for name, values in named.items() if values}


@functools.lru_cache(maxsize=4096)
def without_maps(path: str) -> str:
    return "/".join(part for part in path.split("/") if part not in _MAPS)


_MAPS = ("vmap()", "jvp()")  # components that JAX adds to a path


@functools.lru_cache(maxsize=4096)
def _shared(path: str, other: str | None) -> int:
    """How many components two paths share, from the first."""
    pairs = zip(path.split("/"), (other or "").split("/"), strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def with_names(program: Program) -> set[Atom]:
    """All values that have a name; equations that stand for others make none."""
    if program.named is None:
        traced = replace(program, equations=program.own or program.equations)
        program.named = set[Atom]().union(*named_values(traced).values())
    return program.named


def is_inside(scope: str | None, path: str) -> bool:
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
            axes += loop_axis(equation, steps)
        return (*axes, *self.value.shape)

    def made_at(self, iteration: tuple[int, ...]) -> tuple[tuple[float, ...], ...]:
        """What orders values by when they are made, in these iterations of the loops.

        An output of a loop is made behind all values in it; the carry of a scan as it
        comes in, in the iteration before. Two names of one value are in the order in
        which it gets them.
        """
        when = self._iteration(iteration)
        named = (*when, self.value.position, math.inf)
        if not self.around or self.around[-1].primitive is not p.scan_p:
            return named, named
        scan = self.around[-1]
        (body,) = bodies_of(scan)
        for carry, made, start in zip(
            body.carries,
            body.program.outputs,
            scan.inputs[body.n_constants :],
            strict=False,
        ):
            if carry is self.value and is_made(made):
                *outside, position, time = when
                if time > 0:
                    outside, start = [*outside, position, time - 1], made
                first = start.position if isinstance(start, Value) else -1
                return (*outside, first, math.inf), named
        return named, named

    def _iteration(self, iteration: tuple[int, ...]) -> list[float]:
        """The loops around it and their iterations, in time."""
        when: list[float] = []
        left = list(iteration)
        for equation in self.around:
            when.append(equation.position)
            if equation.primitive is not p.cond_p:
                i = left.pop(0)
                backwards = equation.params.get("reverse", False)
                when.append(equation.params["length"] - 1 - i if backwards else i)
        return when


def is_made(atom: Atom) -> bool:
    """Whether a body makes an output, rather than to hand out what it gets."""
    return isinstance(atom, Value) and atom.producer is not None


def places(program: Program, scope: str = "") -> dict[str, list[Place]]:
    """The places of every name, in the program's order."""
    own: dict[str, list[tuple[int, Place]]] = defaultdict(list)
    inner: dict[str, list[tuple[int, Place]]] = defaultdict(list)
    for name, values in named_values(program, scope).items():
        own[name] = [(v.position, Place(v)) for v in values]
    for equation in with_unread(program):
        for body in equation.bodies:
            for name, found in places(body, equation.scope).items():
                for place in found:
                    outside = Place(place.value, (equation, *place.around))
                    inner[name].append((equation.position, outside))
    return {name: in_order(own[name], inner[name]) for name in {**own, **inner}}


def with_unread(program: Program) -> list[Equation]:
    equations = [*program.equations, *program.unread]
    return sorted(equations, key=lambda e: e.position)


def in_order(own: Sequence[tuple[int, T]], inner: Sequence[tuple[int, T]]) -> list[T]:
    """A program's own items, and between them those of its loops, by position."""
    waiting = list(inner)
    ordered = []
    for position, item in own:
        while waiting and waiting[0][0] <= position:
            ordered.append(waiting.pop(0)[1])
        ordered.append(item)
    return ordered + [item for _, item in waiting]


def loop_axis(equation: Equation, steps: int | None) -> list[int]:
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
        path = without_maps(pattern)
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
                    "capture_steps=N (to jlrp.explain or flow.between), at least as "
                    "many as it runs: the rows behind are zeros."
                )
