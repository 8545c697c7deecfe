"""The plan: a rule for each operation, and which activations the forward pass keeps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from jlrp.graph import Program, Value
from jlrp.operations import Operation
from jlrp.rules import Rule


@dataclass(frozen=True, eq=False)
class Step:
    """One operation and the rule that explains it."""

    operation: Operation
    rule: Rule
    fallback: bool = False  # the rule stands in for an exact one
    missing: bool = False  # there is no rule: for reports only


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

    def wanted(self, op: Operation) -> tuple[Value, ...]:
        """The constants of an operation whose multipliers are asked for."""
        return tuple(v for v in op.constants if v in self.parameters)


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
    for values in captured.values():
        kept.update(dict.fromkeys(values))
    for step in steps:
        op = step.operation
        needed = op.constants + step.rule.needs(op)
        if keep_all or not parameters.isdisjoint(op.constants):
            needed += op.inputs + op.outputs
        kept.update(dict.fromkeys(needed))
    return Plan(program, tuple(steps), tuple(kept), captured, parameters)
