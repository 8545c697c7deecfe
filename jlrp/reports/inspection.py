"""The inspection: the operations of a program, their rules, what is kept."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from jlrp.ir.program import Equation, Value, computing
from jlrp.ops.kinds.loop import LoopOp
from jlrp.ops.lower import choices
from jlrp.plan.planning import Plan, Step, read_by
from jlrp.plan.residuals import size_of
from jlrp.reports.table import Table, some

_EQUATIONS_LISTED = 8  # by a coverage


@dataclass(frozen=True)
class EquationCoverage:
    """One active equation: ``covered``, by ``fallback`` or ``uncovered``."""

    primitive: str
    where: str
    status: str
    by: str


@dataclass(frozen=True, repr=False)
class Coverage:
    """Counts of the program's active equations.

    Covered: by the exact rule of its kind. Fallback: by a rule that stands in for one.
    Uncovered: by none; ``jlrp.relevance`` raises.
    """

    equations: tuple[EquationCoverage, ...]

    def __repr__(self) -> str:
        counts = f"{self.covered} covered, {self.fallback} by fallback"
        lines = [f"active equations: {counts}, {self.uncovered} uncovered"]
        others = Counter(
            f"{e.status}: {e.primitive} at {e.where} ({e.by})"
            for e in self.equations
            if e.status != "covered"
        )
        for text, count in others.most_common(_EQUATIONS_LISTED):
            lines.append(f"  {text}" + (f", {count} times" if count > 1 else ""))
        if len(others) > _EQUATIONS_LISTED:
            more = len(others) - _EQUATIONS_LISTED
            lines.append(f"  and {more} more, in .equations")
        return "\n".join(lines)

    def _count(self, status: str) -> int:
        return sum(e.status == status for e in self.equations)

    @property
    def covered(self) -> int:
        return self._count("covered")

    @property
    def fallback(self) -> int:
        return self._count("fallback")

    @property
    def uncovered(self) -> int:
        return self._count("uncovered")


@dataclass(frozen=True)
class Activation:
    """An activation that rules read, and whether the forward pass keeps it.

    Attributes:
      size: bytes.
      chain: how many equations make it again from kept ones; 0: it is kept.
    """

    primitive: str
    where: str
    shape: tuple[int, ...]
    size: int
    chain: int


@dataclass(frozen=True)
class Activations:
    """The activations between the two passes, without inputs, parameters and loops'.

    Attributes:
      values: the activations.
      equations: of the program.
      peak_bytes: the most that is there at once in the reverse pass, kept ones until
        they are read the last time, promised ones from when they are made. What XLA
        needs besides is not in it.
    """

    values: tuple[Activation, ...]
    equations: int
    peak_bytes: int

    @property
    def kept_bytes(self) -> int:
        return sum(v.size for v in self.values if not v.chain)

    @property
    def promises(self) -> int:
        """How many are made again (DynamicLRP counts them so)."""
        return sum(v.chain > 0 for v in self.values)

    @property
    def density(self) -> float:
        """Promises over equations (DynamicLRP's rho)."""
        return self.promises / max(1, self.equations)

    @property
    def total_chain(self) -> int:
        """Equations behind all promises, shared ones counted again (its delta)."""
        return sum(v.chain for v in self.values)

    def __str__(self) -> str:
        kept = len(self.values) - self.promises
        text = (
            f"activations: {kept} kept ({self.kept_bytes / 1e6:.3g} MB, "
            f"at most {self.peak_bytes / 1e6:.3g} MB at once)"
        )
        if not self.promises:
            return text
        return (
            f"{text}, {self.promises} promised (density {self.density:.2f}, "
            f"chains of {self.total_chain} equations in all)"
        )


@dataclass(frozen=True, repr=False)
class OperationRow:
    """One operation of the inspection, in the program's order.

    Attributes:
      facts: what was recognised of it, in words that select it in a composite.
    """

    kind: str
    scope: str
    primitive: str
    rule: str
    facts: tuple[str, ...]
    input_shapes: tuple[tuple[int, ...], ...]
    output_shape: tuple[int, ...]
    equations: int
    status: str
    depth: int = 0  # in how many loops and branches


@dataclass(frozen=True, repr=False)
class Inspection(Table):
    """What jlrp sees in a program, and the rule it gives to each operation.

    Attributes:
      stops: where a path from x ends while another goes on, a line each.
      choices: what x decides without being a part of it (predicates, indices, trip
        counts, factors that carry no relevance), a line each.
    """

    operations: tuple[OperationRow, ...]
    coverage: Coverage
    activations: Activations
    stops: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    why: str = ""  # what ``auto`` took for this program, and why

    def _title(self) -> str:
        kinds = Counter(row.kind for row in self.operations)
        counts = ", ".join(f"{n} {kind}" for kind, n in sorted(kinds.items()))
        title = f"{len(self.operations)} operations: {counts}"
        return f"{title}\n{self.why}" if self.why else title

    def _cells(self) -> tuple[Sequence[str], Sequence[Sequence[str]]]:
        header = ("kind", "scope", "shape", "rule", "facts", "eqns")
        return header, [
            (
                "  " * row.depth + row.kind,
                row.scope,
                _shapes(row),
                row.rule if row.status == "covered" else f"{row.rule} [{row.status}]",
                " ".join(row.facts),
                str(row.equations),
            )
            for row in self.operations
        ]

    def _footer(self) -> str:
        c = self.coverage
        lines = [
            f"active equations: {c.covered} covered, {c.fallback} by fallback, "
            f"{c.uncovered} uncovered",
            str(self.activations),
            *some("relevance stops", self.stops),
            *some("x chooses", self.choices),
        ]
        return "\n".join(lines)


def inspection(plan: Plan, why: str = "") -> Inspection:
    """The inspection of a plan; static: no number is computed."""
    operations = [step.operation for step in reversed(plan.steps)]
    return Inspection(
        tuple(_rows(plan)),
        coverage(plan),
        activations(plan),
        tuple(dict.fromkeys(map(str, plan.stops))),
        tuple(dict.fromkeys(map(str, choices(plan.program, operations)))),
        why,
    )


def activations(plan: Plan) -> Activations:
    """What the forward pass keeps for the reverse pass, and what is made again."""
    kept = set(plan.kept)
    found = [_activation(v, 0) for v in plan.kept if v.producer is not None]
    for value in plan.recomputed:
        again, _ = computing(plan.program, [value], lambda v: v not in kept)
        found.append(_activation(value, len(again)))
    return Activations(tuple(found), len(plan.program.equations), _peak_bytes(plan))


def _peak_bytes(plan: Plan) -> int:
    """By a walk through the reverse pass."""
    kept = set(plan.kept)
    last: dict[Value, int] = {}  # the step that reads a value last
    for time, step in enumerate(plan.steps):
        for value in read_by(step):
            if value in plan.recomputed and value not in last:
                _, starts = computing(plan.program, [value], lambda v: v not in kept)
                last.update(dict.fromkeys(starts, time))
            last[value] = time
    ends: dict[int, list[Value]] = {}
    for value, time in last.items():
        ends.setdefault(time, []).append(value)
    there = {v for v in kept if v.producer is not None}
    size = peak = sum(map(size_of, there))
    for time, step in enumerate(plan.steps):
        made = {v for v in read_by(step) if v in plan.recomputed} - there
        gone = (there | made).intersection(ends.get(time, ()))
        peak = max(peak, size := size + sum(map(size_of, made)))
        size -= sum(map(size_of, gone))
        there = (there | made) - gone
    return peak


def _activation(value: Value, chain: int) -> Activation:
    assert value.producer is not None
    made = value.producer
    return Activation(
        made.primitive.name, made.where(), value.shape, size_of(value), chain
    )


def _rows(plan: Plan, depth: int = 0) -> Iterator[OperationRow]:
    """In the program's order; a loop is followed by what its body holds."""
    for step in reversed(plan.steps):
        yield _row(step, depth)
        for body in step.bodies:
            yield from _rows(body, depth + 1)


def status(step: Step) -> str:
    return "uncovered" if step.missing else "fallback" if step.fallback else "covered"


def _row(step: Step, depth: int) -> OperationRow:
    op = step.operation
    return OperationRow(
        op.kind,
        op.scope,
        op.primitive.name,
        "none" if step.missing else repr(step.rule),
        tuple(sorted(op.facts)),
        tuple(v.shape for v in op.inputs),
        op.outputs[0].shape,
        len(op.equations),
        status(step),
        depth,
    )


_WORST = {"covered": 0, "fallback": 1, "uncovered": 2}


def coverage(plan: Plan) -> Coverage:
    """What covers each active equation, those of loops and branches included."""
    return Coverage(tuple(_covered(plan)))


def _covered(plan: Plan) -> Iterator[EquationCoverage]:
    by_equation: dict[Equation, Step] = {}
    for step in plan.steps:
        for equation in step.operation.equations:
            known = by_equation.get(equation)
            if known is None or _WORST[status(step)] > _WORST[status(known)]:
                by_equation[equation] = step
    program = plan.program
    for equation in program.equations:
        if not any(program.is_active(v) for v in equation.outputs):
            continue
        step = by_equation.get(equation)
        if step is not None:
            by = "no rule" if step.missing else repr(step.rule)
            entry = (status(step), by)
        else:
            entry = ("covered", "constant: computes a statistic or shift, no relevance")
        yield EquationCoverage(equation.primitive.name, equation.where(), *entry)
        if step is not None:
            # A peeled iteration repeats the equations of the others: the last counts.
            op = step.operation
            branches = isinstance(op, LoopOp) and op.is_branch
            cases = step.bodies if branches else step.bodies[-1:]
            for body in cases:
                yield from _covered(body)


def _shapes(row: OperationRow) -> str:
    return f"{' '.join(map(_shape, row.input_shapes))} -> {_shape(row.output_shape)}"


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "scalar"
