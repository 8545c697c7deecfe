"""The plan: a rule for each operation, and which activations the forward pass keeps."""

from __future__ import annotations

from dataclasses import dataclass

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
    """

    program: Program
    steps: tuple[Step, ...]
    kept: tuple[Value, ...]


def make_plan(program: Program, steps: list[Step], keep_all: bool = False) -> Plan:
    """Keep what the rules declare, their constants, and the explained inputs."""
    kept: dict[Value, None] = dict.fromkeys(program.sources)
    kept.update(dict.fromkeys(program.explained))
    for step in steps:
        op = step.operation
        needed = op.constants + step.rule.needs(op)
        if keep_all:
            needed += op.inputs + op.outputs
        kept.update(dict.fromkeys(needed))
    return Plan(program, tuple(steps), tuple(kept))
