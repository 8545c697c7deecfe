"""Residual policies: which activations are kept for the reverse pass, which recomputed.

An activation that is not kept is recomputed from kept ones when a rule asks for it. A
policy looks at a program and at the values that its rules read, and says of any value
whether it may be kept. What a ``jax.checkpoint`` of the user's does not save is
recomputed under every policy; random numbers never are.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Callable, Container, Hashable, Iterable, Sequence
from dataclasses import dataclass

import jax
import numpy as np
from jax.extend.core import Var
from jax.extend.core import primitives as p

from jlrp import arguments
from jlrp.analysis.dataflow import dependent
from jlrp.errors import InputError
from jlrp.ir import jax_compat
from jlrp.ir.loops import Body
from jlrp.ir.primitives import traits
from jlrp.ir.program import Atom, Equation, Program, Value, computing, evaluate
from jlrp.ops.base import Operation
from jlrp.typing import Array

Saves = Callable[[Value], bool]
Policy = Callable[[Program, Sequence[Value]], Saves]


def kept_and_recomputed(
    program: Program, needed: Iterable[Value], kept: Container[Value], policy: Policy
) -> tuple[list[Value], list[Value]]:
    """Divide the values that rules need into kept and recomputed ones.

    The kept ones include what the others are computed from. Values in ``kept`` are kept
    anyway.
    """
    needed = list(dict.fromkeys(needed))
    allowed, forbidden = policy(program, needed), _not_saved_by_user(program)

    def is_recomputed(v: Value) -> bool:
        if v in program.virtual:  # the forward pass does not make it
            return True
        if v in kept or v.producer is None or _runs_once(v.producer):
            return False
        return v in forbidden or not allowed(v)

    recomputed = [v for v in needed if is_recomputed(v)]
    _, starts = computing(program, recomputed, is_recomputed)
    return [v for v in needed if not is_recomputed(v)] + starts, recomputed


def _runs_once(equation: Equation) -> bool:
    """Whether an equation is never run again: random numbers, what has effects."""
    inside = (e for body in equation.bodies for e in body.equations)
    return (
        traits(equation).random or equation.has_effects or any(map(_runs_once, inside))
    )


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


@dataclass(frozen=True)
class Recompute:
    """A share of the program is run again, by segments of about sqrt(n) operations.

    Between segments the least is alive. Those are run again that save most bytes for
    their work; of the others is kept what ``promise`` keeps. The last is never run
    again: its activations are read first. Source: Chen et al. 2016 (arXiv 1604.06174).
    """

    share: float

    def __call__(self, program: Program, needed: Sequence[Value]) -> Saves:
        segments = _segments(program, needed)
        by_gain = sorted(segments[:-1], key=lambda s: s.saves / s.work, reverse=True)
        again = by_gain[: math.ceil(self.share * len(by_gain))]
        saved = {v for s in again for v in (*s.alive_before, *s.alive_behind)}
        places = [range(s.first, s.last) for s in again]
        kept_elsewhere = promise(program, needed)

        def keeps(v: Value) -> bool:
            if v in saved:
                return True
            # By bisection: there may be many segments.
            return not _within(places, v.position) and kept_elsewhere(v)

        places.sort(key=lambda place: place.start)
        return keeps


def _within(places: Sequence[range], position: int) -> bool:
    index = bisect.bisect(places, position, key=lambda place: place.start) - 1
    return index >= 0 and position in places[index]


@dataclass(frozen=True)
class _Segment:
    """Equations from position ``first`` until ``last``.

    Attributes:
      saves: bytes that rules read of it and that are not alive around it.
      work: about how many multiplications it takes.
    """

    first: int
    last: int
    alive_before: frozenset[Value]
    alive_behind: frozenset[Value]
    saves: int
    work: int


def _segments(program: Program, needed: Sequence[Value]) -> list[_Segment]:
    made = [e for e in program.equations if any(v in program.active for v in e.outputs)]
    count = max(1, round(math.sqrt(len(made))))
    alive = _Alive(program)
    cuts = [0]
    for i in range(1, count):
        low, high = (len(made) * (2 * i + d) // (2 * count) for d in (-1, 1))
        window = made[low:high]
        best = min(window, key=lambda e: alive.size_at(e.position), default=None)
        if best is not None and best.position > cuts[-1]:
            cuts.append(best.position)
    cuts.append(program.equations[-1].position + 1 if program.equations else 1)
    sets = [frozenset(alive.at(cut)) for cut in cuts[:-1]] + [frozenset()]
    saves, work = [0] * len(cuts), [1] * len(cuts)
    for value in needed:
        index = bisect.bisect(cuts, value.position) - 1
        if value.producer is not None and value not in sets[index + 1]:
            saves[index] += size_of(value)
    for equation in program.equations:
        work[bisect.bisect(cuts, equation.position) - 1] += _work(equation)
    return [
        _Segment(first, last, sets[i], sets[i + 1], saves[i], work[i])
        for i, (first, last) in enumerate(itertools.pairwise(cuts))
    ]


sqrt = Recompute(1.0)


@dataclass(frozen=True)
class KeepWhere:
    """Keep what some operations hand out, by the user's word; promise all else.

    Args:
      chosen: ``chosen(operation) -> bool``, as a predicate of a composite: it looks at
        ``kind``, ``scope``, ``primitive``, ``facts``.

    Example:
      >>> import jax.numpy as jnp, jlrp
      >>> dots = jlrp.KeepWhere(lambda op: op.kind in ("dense", "conv"))
      >>> w, x = jnp.array([1.0, 2.0]), jnp.array([3.0, 4.0])
      >>> r = jlrp.relevance(lambda w, x: x @ w, w, x, residuals=dots)
    """

    chosen: Callable[[Operation], bool]

    def __post_init__(self) -> None:
        arguments.check_predicate("chosen", self.chosen)

    def among(self, operations: Iterable[Operation]) -> Policy:
        """The policy for a program with these operations."""
        kept = {v for op in operations if self.chosen(op) for v in op.outputs}
        return lambda program, needed: kept.__contains__


@dataclass(frozen=True)
class Saving:
    """A policy of JAX's: ``decide(primitive, *avals, **params)`` says what is saved."""

    decide: CheckpointPolicy

    def __call__(self, program: Program, needed: Sequence[Value]) -> Saves:
        named = _named(program, self.decide, _saves)
        return lambda v: v in named or _says(self.decide, v.producer, _saves)

    def offloads(self, program: Program) -> Saves:
        named = _named(program, self.decide, _offloads)
        return lambda v: v in named or _says(self.decide, v.producer, _offloads)


class _Offload:
    """All that rules need, in the memory of the host."""

    def __call__(self, program: Program, needed: Sequence[Value]) -> Saves:
        return keep(program, needed)

    def offloads(self, program: Program) -> Saves:
        return lambda v: True


def offloaded(
    program: Program, kept: Iterable[Value], policy: Policy | None
) -> frozenset[Value]:
    """What the policy wants to be in the memory of the host between the passes."""
    if not hasattr(policy, "offloads"):
        return frozenset()
    wanted = policy.offloads(program)  # type: ignore[union-attr]
    return frozenset(
        v
        for v in kept
        if v.producer is not None and v not in program.outputs and wanted(v)
    )


def within(policy: Policy, body: Body) -> Policy:
    """The policy for a scan's body, of which all that is kept is stacked.

    What is cheap is made again. Where rules read much more than the derivative would,
    all is, from the carries: ``epsilon`` reads the output of every dense, of which the
    derivative of a recurrent cell reads none.
    """
    if isinstance(policy, Recompute):  # chunks of iterations are run again instead
        policy = keep if policy.share > 0 else promise
    if policy is not keep:
        return policy

    def stacked(program: Program, needed: Sequence[Value]) -> Saves:
        varying = dependent(program, (*body.carries, *body.slices))
        kept, _ = kept_and_recomputed(program, needed, (), promise)
        found = {v for v in kept if v in varying and v not in body.slices}
        size = sum(map(size_of, found))
        # To ask JAX takes as long as to trace the network's gradient.
        if any(size <= _SLACK * least(body) for least in (_least_kept, _kept)):
            return promise(program, needed)
        return nothing(program, needed)

    return stacked


# More than the 1.2 that is aimed at: what rules declare they do not always read.
_SLACK = 1.3


def in_chunks(policy: Policy | None, scan: Equation) -> bool:
    """Whether a scan is run again chunk by chunk, rather than stacked."""
    asked = isinstance(policy, Recompute) and policy.share > 0
    return asked and not _runs_once(scan)


def resolve(residuals: object) -> Policy:
    """The policy of a name, or of a function of ``jax.checkpoint_policies``.

    Raises:
      InputError: it is neither.
    """
    if isinstance(residuals, str) and residuals in POLICIES:
        return POLICIES[residuals]
    if isinstance(residuals, Recompute | KeepWhere):
        return residuals  # type: ignore[return-value]  (make_plan binds the second)
    if callable(residuals):
        return Saving(residuals)
    raise InputError(
        f"residuals is one of {', '.join(map(repr, POLICIES))}, jlrp.KeepWhere(...), "
        f"or a policy of jax.checkpoint_policies; got {residuals!r}."
    )


POLICIES: dict[str, Policy] = {
    "keep": keep,
    "promise": promise,
    "sqrt": sqrt,
    "offload": _Offload(),
}


# What the user's checkpoints say.


def _not_saved_by_user(program: Program) -> set[Value]:
    """The values that ``jax.checkpoint`` makes again: not its outputs."""
    inside = [e for e in program.equations if e.regions]
    if not inside:
        return set()
    outer: dict[Value, set[object]] = {}  # the regions that a value leaves
    for equation in program.equations:
        for atom in equation.inputs:
            if isinstance(atom, Value) and atom.producer is not None:
                left = set(atom.producer.regions).difference(equation.regions)
                outer.setdefault(atom, set()).update(left)
    found = set()
    named: dict[Hashable, set[Value]] = {}
    for equation in inside:
        for value in equation.outputs:
            for region in equation.regions:
                if value in program.outputs or region in outer.get(value, ()):
                    continue
                if region not in named:
                    named[region] = _named(program, region.policy, _saves)
                if value not in named[region] and not _says(
                    region.policy, equation, _saves
                ):
                    found.add(value)
    return found


def saved_by_user(equation: Equation) -> bool:
    """Whether the checkpoints around an equation let its outputs be kept."""
    return all(_says(region.policy, equation, _saves) for region in equation.regions)


CheckpointPolicy = Callable[..., object]  # of jax.checkpoint
Reading = Callable[[object], bool]  # of a policy's answer


def _says(
    policy: CheckpointPolicy | None, equation: Equation | None, reading: Reading
) -> bool:
    if policy is None or equation is None:
        return False
    avals = [_aval(atom) for atom in equation.inputs]
    return reading(policy(equation.primitive, *avals, **equation.params))


def _named(
    program: Program, policy: CheckpointPolicy | None, reading: Reading
) -> set[Value]:
    if policy is None:
        return set()
    return {
        atom
        for name, atoms in program.tags.items()
        for atom in atoms
        if isinstance(atom, Value) and reading(policy(p.name_p, atom.aval, name=name))
    }


def _saves(answer: object) -> bool:
    """Policies answer with a bool, or with one of JAX's objects."""
    if isinstance(answer, bool):
        return answer
    return _offloads(answer) or type(answer).__name__ in ("Saveable", "SaveableType")


def _offloads(answer: object) -> bool:
    return type(answer).__name__ == "Offloadable"


def _aval(atom: Atom) -> object:
    return atom.aval if isinstance(atom, Value) else atom.number


# Costs.


def _is_cheap(value: Value) -> bool:
    equation = value.producer
    if equation is None:
        return False
    return traits(equation).cheap


def _least_kept(body: Body) -> float:
    """Bytes that reverse-mode differentiation of an iteration keeps at least.

    The factors of products, and an array for each function that is not linear.
    """
    program = body.program
    kept: set[Value] = set()
    for equation in program.equations:
        active = [a for a in equation.inputs if program.is_active(a)]
        row = traits(equation)
        if row.nature == "product" and len(active) == 2:
            kept.update(active)  # type: ignore[arg-type]
        elif row.activation and active:
            kept.update(equation.outputs)
    return sum(size_of(v) for v in kept if v not in body.slices)


def _kept(body: Body) -> float:
    """Bytes that reverse-mode differentiation of an iteration keeps of it.

    Asked of JAX: it knows what each derivative reads, and in which form. Without a
    derivative (a kernel that has only a rule) there is no such bound.
    """
    program = body.program
    shapes = [jax.ShapeDtypeStruct(v.shape, v.dtype) for v in program.inputs]
    places = [i for i, v in enumerate(program.inputs) if v in program.active]

    def residuals(*inputs: Array) -> list[Array]:
        def outputs(*active: Array) -> list[Array]:
            env = {
                **program.constants,
                **dict(zip(program.inputs, inputs, strict=True)),
            }
            env |= {program.inputs[i]: x for i, x in zip(places, active, strict=True)}
            evaluate(program.equations, env)
            return [env[v] for v in program.outputs if program.is_active(v)]  # type: ignore

        _, pull = jax.vjp(outputs, *(inputs[i] for i in places))
        return jax.tree.leaves(pull)

    try:
        jaxpr = jax.make_jaxpr(residuals)(*shapes).jaxpr
    except (NotImplementedError, TypeError, ValueError):  # JAX's, for each primitive
        return math.inf
    outside = {*jaxpr.constvars, *jaxpr.invars[: body.n_constants]}
    outside.update(jaxpr.invars[body.n_constants + body.n_carries :])
    made = {v for v in jaxpr.outvars if isinstance(v, Var)} - outside
    shapes = map(jax_compat.shape_of, made)
    return sum(_count(s.shape) * s.dtype.itemsize for s in shapes)


def _work(equation: Equation) -> int:
    """About how many multiplications an equation takes, or elements it writes."""
    written = sum(_count(v.shape) for v in equation.outputs)
    prim, params = equation.primitive, equation.params
    if prim is p.dot_general_p:
        (contracted, _), _ = params["dimension_numbers"]
        shape = equation.inputs[0].shape
        return written * _count([shape[axis] for axis in contracted])
    if prim is p.conv_general_dilated_p:
        kernel = equation.inputs[1].shape
        features = kernel[params["dimension_numbers"].rhs_spec[0]]
        return written * _count(kernel) // max(1, features)
    if equation.bodies:
        inside = max(sum(map(_work, body.equations)) for body in equation.bodies)
        return written + inside * params.get("length", 1)
    return written


def size_of(value: Value) -> int:
    """Bytes; of a dimension that is only known by name, for one element along it."""
    itemsize = getattr(value.dtype, "itemsize", 4)
    return _count(value.shape) * itemsize


def _count(shape: Sequence[int]) -> int:
    return math.prod(n for n in shape if isinstance(n, int))


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
