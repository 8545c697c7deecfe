"""The plan: a rule for each operation, and which activations the forward pass keeps."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import jax.numpy as jnp

from jlrp.analysis.dataflow import Passage, reached
from jlrp.analysis.intervals import vanishes_below_zero
from jlrp.analysis.stopped import Stop
from jlrp.errors import SelectorError
from jlrp.ir.loops import Body
from jlrp.ir.program import Equation, Program, Value, computing
from jlrp.ops.activation import Region
from jlrp.ops.base import Operation
from jlrp.ops.captures import Asked, Entries, Masked, entries
from jlrp.ops.kinds.activation import ActivationOp
from jlrp.ops.kinds.affine import AffineOp
from jlrp.ops.kinds.linear import LinearOp
from jlrp.ops.kinds.loop import LoopOp
from jlrp.plan.residuals import (
    KeepWhere,
    Policy,
    keep,
    kept_and_recomputed,
    offloaded,
    saved_by_user,
)
from jlrp.rules import Pass, Rule
from jlrp.rules.base import Recorder
from jlrp.rules.condition import Mask


@dataclass(frozen=True, eq=False)
class Step:
    """One operation and the rule that explains it."""

    operation: Operation
    rule: Rule
    fallback: bool = False  # the rule stands in for an exact one
    missing: bool = False  # there is no rule: for reports only

    @property
    def bodies(self) -> tuple[Plan, ...]:
        """The plans of a loop's or branch's bodies."""
        return getattr(self.rule, "plans", ())


@dataclass(frozen=True, eq=False)
class Plan:
    """What the two loops run.

    Attributes:
      program: the traced program.
      steps: from the explained outputs back to the sources.
      kept: the values that the forward pass hands to the reverse pass, nothing else.
      offloaded: those of them that wait in the memory of the host.
      recomputed: values that rules read and that are computed again from kept ones.
      repeated: the loops that are run again where relevance comes back.
      captured: whose relevance is asked for, by name.
      parameters: the constants whose multipliers are asked for.
      stops: where relevance stops while another path goes on.
    """

    program: Program
    steps: tuple[Step, ...]
    kept: tuple[Value, ...]
    offloaded: frozenset[Value] = frozenset()
    recomputed: Mapping[Value, None] = field(default_factory=dict)  # in order
    repeated: frozenset[Equation] = frozenset()
    captured: Entries = field(default_factory=dict)
    parameters: frozenset[Value] = frozenset()
    stops: tuple[Stop, ...] = ()

    @cached_property
    def recorders(self) -> dict[Equation, Recorder]:
        """The rules that run their equation themselves in the forward pass."""
        return {
            step.operation.equations[0]: step.rule
            for step in self.steps
            if isinstance(step.rule, Recorder)
        }

    @cached_property
    def watched(self) -> frozenset[Value]:
        """The program's own values among the captured ones."""
        several = itertools.chain.from_iterable(self.captured.values())
        return frozenset(v for entry in several for v in entry.values)

    @cached_property
    def masks(self) -> dict[str, int]:
        """The masks in it and in its bodies, by name: axes of one, all iterations."""
        found: dict[str, int] = {}
        for step in self.steps:
            if isinstance(step.rule, Mask):
                (value,) = step.operation.outputs
                of_a_loop = step.rule.which in ("first", "last")
                found[step.rule.name] = len(value.shape) + of_a_loop
            op = step.operation
            more = int(isinstance(op, LoopOp) and not op.is_branch)
            for plan in step.bodies:
                found |= {name: axes + more for name, axes in plan.masks.items()}
        return found

    @cached_property
    def masks_of_next(self) -> frozenset[str]:
        """Those of its own masks that are of the iteration behind this one."""
        rules = (step.rule for step in self.steps)
        masks = (rule for rule in rules if isinstance(rule, Mask))
        return frozenset(mask.name for mask in masks if mask.which == "next")

    def wanted(self, op: Operation) -> tuple[Value, ...]:
        """The constants of an operation whose multipliers are asked for."""
        return wanted(op, self.parameters)


def wanted(op: Operation, parameters: frozenset[Value]) -> tuple[Value, ...]:
    """The values that an operation reads among some parameters."""
    read = op.equations[0].inputs if op.bodies else op.constants
    return tuple(dict.fromkeys(v for v in read if v in parameters))  # type: ignore


class _Parameters(Passage):
    """Which values are made of parameters: floats of some programs, not active ones."""

    def __init__(self, programs: Iterable[Program]) -> None:
        active = frozenset[Value]().union(*(program.active for program in programs))
        self._may_be = lambda v: is_float(v) and v not in active
        super().__init__(lambda _, v: self._may_be(v))

    def forward(
        self, program: Program, starts: Mapping[Value, bool]
    ) -> dict[Value, bool]:
        starts = {v: flag for v, flag in starts.items() if self._may_be(v)}
        return super().forward(program, starts)


def parameters_of(program: Program, starts: Iterable[Value]) -> frozenset[Value]:
    """The floats that depend on some parameters, and carry no relevance."""
    return frozenset(reached(_Parameters([program]), program, starts))


def parameters_inside(
    bodies: Sequence[Body], equation: Equation, parameters: frozenset[Value]
) -> list[frozenset[Value]]:
    """The same of each body: a carry depends on them if any iteration makes it so."""
    flow = _Parameters(body.program for body in bodies)
    flags = [atom in parameters for atom in bodies[0].operands(equation)]
    flags = flow.settled(bodies, flags)
    starts = [dict(zip(b.program.inputs, flags, strict=True)) for b in bodies]
    return [
        frozenset(flow.forward(body.program, inside))
        for body, inside in zip(bodies, starts, strict=True)
    ]


def plan_body(
    body: Body,
    steps: Sequence[Step],
    parameters: frozenset[Value],
    policy: Policy | None = keep,
    asked: Asked = Asked(),  # noqa: B008
    following: Plan | None = None,
) -> Plan:
    """The plan of a loop's or branch's body.

    ``following`` is that of the iterations behind it, if it is of a first one.
    """
    like = None if following is None else following.captured
    plan = make_plan(body.program, steps, asked, parameters, policy, like)
    # What a loop stacks stays where it is: its slices are read one by one.
    return replace(plan, offloaded=frozenset())


def is_float(value: Value) -> bool:
    return jnp.issubdtype(value.dtype, jnp.inexact)


def make_plan(
    program: Program,
    steps: Sequence[Step],
    names: Asked = Asked(),  # noqa: B008
    parameters: frozenset[Value] = frozenset(),
    policy: Policy | None = keep,
    like: Entries | None = None,
) -> Plan:
    """Keep what the rules declare, their constants, and what is explained.

    Or promise it, as the policy says. Without a policy the operands and outputs of
    every operation are kept, for its ledger. ``like`` is what is captured in the
    iterations behind this one.

    Raises:
      SelectorError: a name stands for a value that gets no relevance of its own.
    """
    captured = _captured(program, steps, names, like)
    steps = _with_masks(program, steps, names.masked(program))
    kept: dict[Value, None] = dict.fromkeys(program.sources)
    kept.update(dict.fromkeys(program.explained))
    kept.update(dict.fromkeys(_behind_parameters(program, steps, parameters)))
    if policy is None:  # of what a body hands on, the ledger counts constants too
        kept.update(dict.fromkeys(v for v in program.outputs if isinstance(v, Value)))
    for several in captured.values():
        values = [v for entry in several for v in entry.values]
        kept.update(dict.fromkeys(v for v in values if v in program.active))
    read: dict[Value, None] = {}
    repeated = set()
    for step in steps:
        op = step.operation
        needed = read_by(step)
        asked = not parameters.isdisjoint(op.constants)
        if policy is None or (asked and not op.bodies):
            needed += op.inputs + op.outputs
        if isinstance(step.rule, Recorder) and not saved_by_user(op.equations[0]):
            repeated.add(op.equations[0])
            needed += tuple(v for v in op.equations[0].inputs if isinstance(v, Value))
        read.update(dict.fromkeys(needed))
    if isinstance(policy, KeepWhere):
        policy = policy.among(step.operation for step in steps)
    more, recomputed = kept_and_recomputed(program, read, kept, policy or keep)
    kept.update(dict.fromkeys(more))
    return Plan(
        program,
        _marked_rectified(program, steps),
        tuple(kept),
        offloaded(program, kept, policy) - parameters,
        dict.fromkeys(recomputed),
        frozenset(repeated),
        captured,
        parameters,
    )


def _captured(
    program: Program, steps: Sequence[Step], asked: Asked, like: Entries | None
) -> Entries:
    planned: dict[Equation, dict[int, Entries]] = {}
    for step in steps:
        op, plans = step.operation, step.bodies
        equation = op.equations[0]
        if plans and isinstance(op, LoopOp) and op.is_branch:
            planned[equation] = {i: plan.captured for i, plan in enumerate(plans)}
        elif plans:  # of a while loop, the first is the condition
            planned[equation] = {len(equation.bodies) - 1: plans[-1].captured}
        else:
            _refuse_names_inside(program, step, asked)
    operations = [step.operation for step in steps]
    return entries(program, asked, operations, planned, like)


def _refuse_names_inside(program: Program, step: Step, asked: Asked) -> None:
    (equation, *_) = step.operation.equations
    for body in equation.bodies:
        for name in entries(body, asked.inside(program, equation)):
            raise SelectorError(
                f"{name!r} names a value in the {step.operation.kind} at "
                f"{equation.where()}, which has one rule as a whole, {step.rule!r}. "
                "Give rules to the operations in it: by their kind, or a glob."
            )


def _with_masks(
    program: Program, steps: Sequence[Step], masked: Sequence[Masked]
) -> list[Step]:
    """Put masks where their values' promises are complete: before the producer.

    Raises:
      SelectorError: a value gets relevance as a part of an operation only.
    """
    steps = list(steps)
    for at in masked:
        value = at.value
        index = next(
            (i for i, s in enumerate(steps) if value in s.operation.outputs), None
        )
        if index is None and value in program.sources and value in program.active:
            index = len(steps)
        elif index is None and value in program.active:
            raise SelectorError(no_path(at.mask))
        if index is not None:
            rule = Mask(at.mask, at.which)
            steps.insert(index, Step(_masked(program, value), rule))
    return steps


def _masked(program: Program, value: Value) -> Operation:
    readers = program.uses.get(value) or program.equations
    equations = (value.producer,) if value.producer is not None else readers[:1]
    return LinearOp("condition", (value,), (value,), tuple(equations), ())


def no_path(name: str) -> str:
    return (
        f"The condition on {name!r} is on no path of relevance: its value is inside of "
        "an operation, or gets none. Choose an operation's output; jlrp.inspect lists "
        "them."
    )


def read_by(step: Step) -> tuple[Value, ...]:
    """The values that the rule of a step reads."""
    return step.operation.constants + step.rule.needs(step.operation)


def _marked_rectified(program: Program, steps: Sequence[Step]) -> tuple[Step, ...]:
    """Mark the affine operations of whose output only the positive part is read.

    Where all readers are activations that are zero below zero, no relevance that comes
    back as a multiplier reaches a negative entry: rules that treat the two signs apart
    need one of them.
    """
    others = {*program.explained, *program.outputs}
    rectifying: set[Value] = set()
    for step in steps:
        op = step.operation
        region = op.region if isinstance(op, ActivationOp) else None
        if region is not None and _rectifies(step.rule, region):
            rectifying.update(op.inputs)
        else:
            others.update(op.inputs)
    rectified = rectifying - others

    def marked(step: Step) -> Step:
        op = step.operation
        if not isinstance(op, AffineOp) or rectified.isdisjoint(op.outputs):
            return step
        return replace(step, operation=replace(op, facts=op.facts | {"rectified"}))

    return tuple(map(marked, steps))


def _rectifies(rule: Rule, region: Region) -> bool:
    return type(rule) is Pass and vanishes_below_zero(region.end, region.start)


def _behind_parameters(
    program: Program, steps: Sequence[Step], parameters: frozenset[Value]
) -> list[Value]:
    """The parameters that operations read, and what these are computed from."""
    read = [v for step in steps for v in wanted(step.operation, parameters)]
    read += [v for v in program.outputs if v in parameters]  # type: ignore
    return [*read, *computing(program, read, parameters.__contains__)[1]]
