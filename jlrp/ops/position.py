"""Where operations lie: before or behind others, in the scores of an attention."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from jlrp.ir.loops import Body
from jlrp.ir.program import Atom, Value
from jlrp.ops.base import Operation, with_inner
from jlrp.ops.kinds.affine import AffineOp
from jlrp.ops.kinds.loop import LoopOp
from jlrp.ops.kinds.product import ProductOp
from jlrp.ops.kinds.softmax import SoftmaxOp


def marked_attention(operations: list[Operation]) -> list[Operation]:
    """Mark the products that make the scores of a softmax: queries times keys."""
    behind: set[Value] = set()  # what reaches scores, through no other map
    marked = []
    for op in operations:
        reaches = not behind.isdisjoint(op.outputs)
        if isinstance(op, SoftmaxOp) or (reaches and op.kind in _BETWEEN_SCORES):
            behind.update(op.inputs)
        elif reaches and isinstance(op, ProductOp):
            op = replace(op, facts=op.facts | {"attention"})
        marked.append(op)
    return marked


_BETWEEN_SCORES = ("activation", "add", "movement", "scale", "selection")


def marked_by_position(
    operations: list[Operation],
    fed: Iterable[Atom] = (),
    feeding: Iterable[Atom] = (),
) -> list[Operation]:
    """Mark the ``first`` and ``last`` affine operations.

    First: reached from x through no other affine operation; last: reached so from the
    explained output. ``fed`` and ``feeding`` are values that have others before and
    behind them. In a loop these are the carries, from the iteration before and to the
    next, but for a first iteration that is an operation by itself.
    """
    first, before = _frontier(
        operations[::-1], lambda op: op.inputs, lambda op: op.outputs, fed
    )
    last, behind = _frontier(
        operations, lambda op: op.outputs, lambda op: op.inputs, feeding
    )
    marked = []
    for op in operations:
        marks = {name for name, ops in (("first", first), ("last", last)) if op in ops}
        bodies = []
        for i, (body, inner) in enumerate(op.bodies):
            (equation,) = op.equations
            peeled = i == 0 and len(op.bodies) > 1
            pairs = zip(body.program.inputs, body.operands(equation), strict=True)
            inside = {v for v, a in pairs if a in before}
            inside.update(() if peeled else body.carries)
            outs = body.program.outputs
            pairs = zip(outs, equation.outputs, strict=True)
            after = {a for a, v in pairs if v in behind} | {*outs[: body.n_carries]}
            bodies.append((body, marked_by_position(inner, inside, after)))
        facts = op.facts | (marks if isinstance(op, AffineOp) else set())
        op = replace(op, facts=facts)
        marked.append(_with_bodies(op, bodies))
    return marked


def affine_before(
    operations: Sequence[Operation], known: Mapping[Any, int]
) -> tuple[dict[Operation, int], dict[Any, int]]:
    """How many affine operations are before each of them, and before each value.

    The longest path counts. A body counts once, however often it runs.
    """
    before: dict[Operation, int] = {}
    at = dict(known)
    for op in reversed(operations):
        here = max((at.get(v, 0) for v in op.inputs), default=0)
        behind = here + isinstance(op, AffineOp)
        if isinstance(op, AffineOp):
            before[op] = here
        for body, inner in op.bodies:
            operands = body.operands(op.equations[0])
            pairs = zip(body.program.inputs, operands, strict=True)
            inside, found = affine_before(inner, {v: at.get(a, 0) for v, a in pairs})
            before |= inside
            outputs = (found.get(v, here) for v in body.program.outputs)
            behind = max(behind, *outputs)
        at |= dict.fromkeys(op.outputs, behind)
    return before, at


def with_depths(
    operations: Iterable[Operation], before: Mapping[Operation, int], most: int
) -> list[Operation]:
    found: list[Operation] = []
    for op in operations:
        if isinstance(op, AffineOp):
            op = replace(op, depth=before[op] / max(most, 1))
        bodies = [(b, with_depths(inner, before, most)) for b, inner in op.bodies]
        found.append(_with_bodies(op, bodies))
    return found


def _with_bodies(
    op: Operation, bodies: Sequence[tuple[Body, list[Operation]]]
) -> Operation:
    return replace(op, bodies=tuple(bodies)) if isinstance(op, LoopOp) else op


def _frontier(
    operations: list[Operation],
    entering: Callable[[Operation], tuple[Value, ...]],
    leaving: Callable[[Operation], tuple[Value, ...]],
    behind: Iterable[Any],
) -> tuple[set[Operation], set[Any]]:
    """The affine operations that a walk meets before any other on every path."""
    behind = set(behind)
    found = set()
    for op in operations:
        inside = with_inner([op]) if op.bodies else (op,)
        holds_affine = any(isinstance(o, AffineOp) for o in inside)
        met = not behind.isdisjoint(entering(op))
        if holds_affine and not met:
            found.add(op)
        if met or holds_affine:
            behind.update(leaving(op))
    return found, behind
