"""The plan: a rule for each operation, and which activations the forward pass keeps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import jax.numpy as jnp

from jlrp.bodies import Body
from jlrp.facts.activity import flow
from jlrp.graph import Equation, Program, Value
from jlrp.operations import Operation
from jlrp.rules import Rule


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
      captured: the values whose relevance is asked for, by name.
      parameters: the constants whose multipliers are asked for.
    """

    program: Program
    steps: tuple[Step, ...]
    kept: tuple[Value, ...]
    captured: Mapping[str, tuple[Value, ...]] = field(default_factory=dict)
    parameters: frozenset[Value] = frozenset()

    @cached_property
    def recorders(self) -> dict[Equation, Any]:
        """The rules that run their equation themselves in the forward pass."""
        return {
            step.operation.equations[0]: step.rule
            for step in self.steps
            if hasattr(step.rule, "record")
        }

    def wanted(self, op: Operation) -> tuple[Value, ...]:
        """The constants of an operation whose multipliers are asked for."""
        read = op.equations[0].inputs if op.bodies else op.constants
        return tuple(dict.fromkeys(v for v in read if v in self.parameters))  # type: ignore


def parameters_inside(
    body: Body, equation: Equation, parameters: frozenset[Value]
) -> frozenset[Value]:
    """The values of a body that depend on parameters, and not on x."""
    pairs = zip(body.program.inputs, body.operands(equation), strict=True)
    starts = [v for v, atom in pairs if atom in parameters]
    found = flow(body.program, starts, lambda e: [is_float(v) for v in e.outputs])
    return frozenset(v for v in found if v not in body.program.dependent)


def plan_body(
    body: Body,
    steps: Sequence[Step],
    parameters: frozenset[Value],
    keep_all: bool = False,
) -> Plan:
    """The plan of a loop's or branch's body."""
    return make_plan(body.program, steps, {}, parameters, keep_all)


def is_float(value: Value) -> bool:
    return jnp.issubdtype(value.dtype, jnp.inexact)


def make_plan(
    program: Program,
    steps: Sequence[Step],
    captured: Mapping[str, tuple[Value, ...]],
    parameters: frozenset[Value] = frozenset(),
    keep_all: bool = False,
) -> Plan:
    """Keep what the rules declare, their constants, and what is explained."""
    kept: dict[Value, None] = dict.fromkeys(program.sources)
    kept.update(dict.fromkeys(program.explained))
    kept.update(dict.fromkeys(v for v in program.inputs if v in parameters))
    for values in captured.values():
        kept.update(dict.fromkeys(v for v in values if v in program.active))
    for step in steps:
        op = step.operation
        needed = op.constants + step.rule.needs(op)
        if op.bodies:
            read = op.equations[0].inputs
            needed += tuple(v for v in read if v in parameters)  # type: ignore
        asked = not parameters.isdisjoint(op.constants)
        if (keep_all or asked) and not op.bodies:
            needed += op.inputs + op.outputs
        kept.update(dict.fromkeys(needed))
    return Plan(program, tuple(steps), tuple(kept), captured, parameters)
