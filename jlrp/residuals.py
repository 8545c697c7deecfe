"""Residual policies: which activations are kept for the reverse pass, which promised.

A promised activation is made again from kept ones when a rule asks for it. A policy
looks at a program and at the values that its rules read, and says of any value whether
it may be kept. What a ``jax.checkpoint`` of the user's does not save is promised under
every policy; random numbers never are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterable, Sequence
from typing import Any

import numpy as np
from jax.extend.core import primitives as p

from jlrp.bodies import Body
from jlrp.errors import InputError
from jlrp.facts.activity import everything, flow
from jlrp.facts.unary import ELEMENTWISE, NONLINEAR_UNARY
from jlrp.families import MOVEMENT, MOVEMENT_BY_NAME, RANDOM
from jlrp.graph import Equation, Program, Value, computing

Saves = Callable[[Value], bool]
Policy = Callable[[Program, Sequence[Value]], Saves]


def kept_and_promised(
    program: Program, needed: Iterable[Value], kept: Container[Value], policy: Policy
) -> tuple[list[Value], list[Value]]:
    """Divide the values that rules need into kept and promised ones.

    The kept ones include what promised ones are made from. Values in ``kept`` are kept
    anyway.
    """
    needed = list(dict.fromkeys(needed))
    allowed, forbidden = policy(program, needed), _not_saved_by_user(program)

    def is_promised(v: Value) -> bool:
        if v in kept or v.producer is None or _runs_once(v.producer):
            return False
        return v in forbidden or not allowed(v)

    promised = [v for v in needed if is_promised(v)]
    _, starts = computing(program, promised, is_promised)
    return [v for v in needed if not is_promised(v)] + starts, promised


def _runs_once(equation: Equation) -> bool:
    """Whether an equation is never run again: random numbers, what has effects."""
    return equation.primitive in RANDOM or equation.has_effects


# Policies.


def keep(program: Program, needed: Sequence[Value]) -> Saves:
    """All that rules need, and nothing else."""
    return lambda v: True


def promise(program: Program, needed: Sequence[Value]) -> Saves:
    """Nothing that cheap equations make from kept values or from inputs."""
    kept: set[Value] = set()

    def follows(v: Value) -> bool:
        return v not in kept and _is_cheap(v)

    for value in sorted(needed, key=lambda v: v.position):
        _, starts = computing(program, [value], follows)
        if any(v.producer is not None and v not in kept for v in starts):
            kept.add(value)
    return lambda v: not follows(v)


def nothing(program: Program, needed: Sequence[Value]) -> Saves:
    """Only inputs: all else is made again."""
    return lambda v: False


def sqrt(program: Program, needed: Sequence[Value]) -> Saves:
    """What is alive at about sqrt(n) cuts through the program, n operations long.

    Each cut is made where the least is alive. Between two cuts all is made again, once.
    Source: Chen et al. 2016 (arXiv 1604.06174).
    """
    made = [e for e in program.equations if any(v in program.active for v in e.outputs)]
    segments = max(1, round(math.sqrt(len(made))))
    alive = _Alive(program)
    saved: set[Value] = set()
    for i in range(1, segments):
        low, high = (len(made) * (2 * i + d) // (2 * segments) for d in (-1, 1))
        window = made[low:high]
        if window:
            best = min(window, key=lambda e: alive.size_at(e.position))
            saved |= alive.at(best.position)
    return saved.__contains__


def saving(decide: Callable[..., Any]) -> Policy:
    """A policy of JAX's: ``decide(primitive, *avals, **params)`` says what is saved."""

    def policy(program: Program, needed: Sequence[Value]) -> Saves:
        named = _saved_by_name(program, decide)
        return lambda v: v in named or _says_yes(decide, v.producer)

    return policy


def within(policy: Policy, body: Body) -> Policy:
    """The policy for a scan's body, of which all that is kept is stacked.

    Where rules read much more than the derivative would, all is made again from the
    carries: ``epsilon`` reads the output of every dense, of which the derivative of a
    recurrent cell reads none.
    """
    if policy is not keep:
        return policy

    def stacked(program: Program, needed: Sequence[Value]) -> Saves:
        varying = flow(program, (*body.carries, *body.slices), everything)
        read = {v for v in needed if v in varying and v not in body.slices}
        derivative = _read_by_derivative(program)
        if _bytes(read) <= _SLACK * _bytes(derivative & varying):
            return keep(program, needed)
        return nothing(program, needed)

    return stacked


_SLACK = 1.2


def resolve(residuals: Any) -> Policy:
    """The policy of a name, or of a function of ``jax.checkpoint_policies``.

    Raises:
      InputError: it is neither.
    """
    if isinstance(residuals, str) and residuals in POLICIES:
        return POLICIES[residuals]
    if callable(residuals):
        return saving(residuals)
    raise InputError(
        f"residuals is one of {', '.join(map(repr, POLICIES))}, or a policy of "
        f"jax.checkpoint_policies; got {residuals!r}."
    )


POLICIES: dict[str, Policy] = {"keep": keep, "promise": promise, "sqrt": sqrt}


# What the user's checkpoints say.


def _not_saved_by_user(program: Program) -> set[Value]:
    """The values that ``jax.checkpoint`` makes again: not its outputs."""
    inside = [e for e in program.equations if e.regions]
    if not inside:
        return set()
    outer: dict[Value, set[Any]] = {}  # the regions that a value leaves
    for equation in program.equations:
        for atom in equation.inputs:
            if isinstance(atom, Value) and atom.producer is not None:
                left = set(atom.producer.regions).difference(equation.regions)
                outer.setdefault(atom, set()).update(left)
    found = set()
    named: dict[Any, set[Value]] = {}
    for equation in inside:
        for value in equation.outputs:
            for region in equation.regions:
                if value in program.outputs or region in outer.get(value, ()):
                    continue
                if region not in named:
                    named[region] = _saved_by_name(program, region.policy)
                if value not in named[region] and not _says_yes(
                    region.policy, equation
                ):
                    found.add(value)
    return found


def saved_by_user(equation: Equation) -> bool:
    """Whether the checkpoints around an equation let its outputs be kept."""
    return all(_says_yes(region.policy, equation) for region in equation.regions)


def _says_yes(policy: Any, equation: Equation | None) -> bool:
    if policy is None or equation is None:
        return False
    avals = [_aval(atom) for atom in equation.inputs]
    return _saves(policy(equation.primitive, *avals, **equation.params))


def _saved_by_name(program: Program, policy: Any) -> set[Value]:
    if policy is None:
        return set()
    return {
        atom
        for name, atoms in program.tags.items()
        for atom in atoms
        if isinstance(atom, Value) and _saves(policy(p.name_p, atom.aval, name=name))
    }


def _saves(answer: Any) -> bool:
    """Policies answer with a bool, or with one of JAX's objects."""
    if isinstance(answer, bool):
        return answer
    return type(answer).__name__ in ("Saveable", "Offloadable", "SaveableType")


def _aval(atom: Any) -> Any:
    return atom.aval if isinstance(atom, Value) else atom.number


# Costs.


def _is_cheap(value: Value) -> bool:
    equation = value.producer
    if equation is None:
        return False
    prim = equation.primitive
    return prim in _CHEAP or prim.name in MOVEMENT_BY_NAME


_CHEAP = {*ELEMENTWISE, *MOVEMENT, p.iota_p, p.stop_gradient_p}
_CHEAP |= {p.eq_p, p.ge_p, p.gt_p, p.le_p, p.lt_p, p.ne_p, p.not_p, p.and_p, p.or_p}
_CHEAP |= {p.reduce_sum_p, p.reduce_max_p, p.reduce_min_p}


def _read_by_derivative(program: Program) -> set[Value]:
    """About what reverse-mode differentiation keeps of the active equations."""
    found: set[Value] = set()
    for equation in program.equations:
        active = program.active_inputs(equation)
        if not active or program.active.isdisjoint(equation.outputs):
            continue
        if len(active) > 1 and equation.primitive in _PRODUCTS:
            found.update(active)
        elif equation.primitive in NONLINEAR_UNARY:
            found.update(equation.outputs)
    return found


_PRODUCTS = {p.mul_p, p.div_p, p.dot_general_p, p.conv_general_dilated_p, p.pow_p}


def size_of(value: Value) -> int:
    """Bytes; of a dimension that is only known by name, for one element along it."""
    itemsize = getattr(value.dtype, "itemsize", 4)
    return math.prod(n for n in value.shape if isinstance(n, int)) * itemsize


def _bytes(values: Iterable[Value]) -> int:
    return sum(map(size_of, values))


class _Alive:
    """The values that are made before a place in the program and read behind it."""

    def __init__(self, program: Program):
        self._last: dict[Value, int] = {}
        for equation in program.equations:
            for atom in equation.inputs:
                if isinstance(atom, Value) and atom.producer is not None:
                    self._last[atom] = equation.position
        end = len(program.equations) and program.equations[-1].position + 1
        changes = np.zeros(end + 1, np.int64)
        for value, last in self._last.items():
            changes[value.position + 1] += size_of(value)
            changes[last + 1] -= size_of(value)
        self._sizes = np.cumsum(changes)

    def size_at(self, position: int) -> int:
        return int(self._sizes[position])

    def at(self, position: int) -> set[Value]:
        return {v for v, last in self._last.items() if v.position < position <= last}
