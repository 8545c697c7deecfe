"""Names of values: the outputs of name scopes, and tags.

A scope's outputs are the values that are made in it and read outside of it. Globs match
component by component: ``*`` within one, ``**`` any number of them.
"""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from jlrp.errors import SelectorError
from jlrp.graph import Program, Value
from jlrp.operations import Operation

Named = dict[str, tuple[Value, ...]]


def named_values(program: Program) -> Named:
    """The values of every tag and scope, in the program's order."""
    readers: dict[Value, set[str | None]] = defaultdict(set)
    for equation in program.equations:
        for atom in equation.inputs:
            if isinstance(atom, Value):
                readers[atom].add(equation.scope)
    for atom in program.outputs:
        if isinstance(atom, Value):
            readers[atom].add(None)
    named: dict[str, dict[Value, None]] = defaultdict(dict)
    for equation in program.equations:
        components = equation.scope.split("/") if equation.scope else []
        for value in equation.outputs:
            for depth in range(1, len(components) + 1):
                path = "/".join(components[:depth])
                if any(not _is_inside(scope, path) for scope in readers[value]):
                    named[path][value] = None
    for name, atoms in program.tags.items():
        named[name] = dict.fromkeys(a for a in atoms if isinstance(a, Value))
    return {name: tuple(values) for name, values in named.items() if values}


def _is_inside(scope: str | None, path: str) -> bool:
    return scope is not None and f"{scope}/".startswith(f"{path}/")


def names_inside(program: Program, named: Named) -> frozenset[str]:
    """The names of values in the bodies of loops and branches, and of none outside.

    A tag's name is among them wherever else it is used.
    """
    found: set[str] = set()
    for equation in program.equations:
        for body in equation.bodies:
            inner = named_values(body)
            found.update(body.tags, (name for name in inner if name not in named))
            found |= names_inside(body, named)
    return frozenset(found)


def matching(
    named: Named, patterns: Iterable[str], inside: Iterable[str] = ()
) -> Named:
    """The named values that patterns match.

    Raises:
      SelectorError: a pattern matches no scope and no tag, or one of those ``inside``
        a loop or branch.
    """
    found: Named = {}
    for pattern in patterns:
        matched = [name for name in named if matches_path(name, pattern)]
        hidden = [name for name in inside if matches_path(name, pattern)]
        if hidden and (not matched or pattern in hidden):
            raise SelectorError(
                f"{pattern!r} names a value inside of a loop or branch ({hidden[0]}), "
                "which has one for each iteration. Return it from the body as an "
                "output, and name that with jlrp.tag, or unroll the loop."
            )
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


def at_operations(named: Named, operations: Sequence[Operation]) -> Named:
    """The same names, with values inside an operation replaced by its output.

    Naming a value must not change the explanation, so that no operation is split:
    between a convolution and its batch norm, both of one operation, is at its end.
    """
    ends = {v for op in operations for v in op.outputs}
    inside: dict[Value, Value] = {}
    for op in operations:
        for equation in op.equations:
            for value in equation.outputs:
                inside.setdefault(value, op.outputs[0])
    return {
        name: tuple(dict.fromkeys(v if v in ends else inside.get(v, v) for v in values))
        for name, values in named.items()
    }


def conditioned(
    named: Named, names: Iterable[str], inside: Iterable[str] = ()
) -> Mapping[str, Value]:
    """The one value of each name that a condition is set on.

    Raises:
      SelectorError: a name matches nothing, more than one value, or one of those
        ``inside`` a loop or branch.
    """
    found: dict[str, Value] = {}
    for name in names:
        matched = matching(named, [name], inside)
        values = [v for vs in matched.values() for v in vs]
        if len(values) != 1:
            listed = ", ".join(matched)
            raise SelectorError(
                f"A condition masks one value; {name!r} names {len(values)}, of "
                f"{listed}. Choose a narrower name, or mark the value with jlrp.tag."
            )
        (found[name],) = values
    return found
