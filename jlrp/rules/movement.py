"""Movement and selection: relevance goes exactly where each number came from.

Reshapes, slices, gathers, concatenation; max pooling, max, sort, top-k. Both parts of a
promise, multiplier and value, go through the transpose; a constant among the operands
(a concatenated token, padding) absorbs what reaches it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from operator import or_

import jax.numpy as jnp

from jlrp.ir.families import rounds
from jlrp.ir.program import Value
from jlrp.ops.base import Operation
from jlrp.ops.context import Context
from jlrp.ops.kinds.generic import SelectionOp
from jlrp.ops.kinds.linear import MovementOp
from jlrp.promise import Parts, Promise, is_complex, lax_real, like, safe_divide
from jlrp.rules.base import Array, Causes, Propagation, Rule, refuse
from jlrp.rules.ledger import summed
from jlrp.rules.reference import Difference
from jlrp.rules.stopped import dead_part


@dataclass(frozen=True)
class Follow(Rule):
    """Relevance follows each number to where it came from; ties as in JAX's gradient.

    The rule of movement and of selection (the winner takes all; Montavon 2019). Through
    a cast that rounds to a few digits (float8) the relevance itself passes.
    """

    def needs(self, op: Operation) -> tuple[Value, ...]:
        if rounds(op.equations[0]):
            return op.inputs + op.outputs
        return op.inputs if isinstance(op, SelectionOp) else ()

    def parts(self, op: Operation, r: Sequence[Parts]) -> Sequence[Parts]:
        return [reduce(or_, r)] * len(op.inputs)

    def check(self, op: Operation) -> None:
        if not isinstance(op, MovementOp | SelectionOp):
            refuse(self, op, "it computes new numbers instead of moving them")

    def from_reference(self, op: Operation) -> Rule:
        return Difference()

    def propagate(
        self, op: Operation, r: Sequence[Promise | None], ctx: Context
    ) -> Propagation:
        values = [p and p.value for p in r]
        multipliers = [p and p.multiplier for p in r]
        values_in = _moved_values(op, values, ctx)
        cotangents = _moved(op, multipliers, ctx)
        if rounds(op.equations[0]) and cotangents[0] is not None:
            cotangents = [cotangents[0] * _rounding(op, ctx)]
        promises = [
            None if v is None and m is None else Promise(v, m)
            for v, m in zip(values_in, cotangents, strict=True)
        ]
        return Propagation(promises, lambda: _kept_by_constants(op, r, ctx))


def _moved_values(op: Operation, values: Sequence, ctx: Context) -> Sequence:
    """Relevance itself, which is real, also where the moved numbers are complex."""
    if not any(map(is_complex, (*op.inputs, *op.outputs))):
        return _moved(op, values, ctx)
    parts = [
        part if part is None else like(part, v)
        for v, part in zip(op.outputs, values, strict=True)
    ]
    return [part if part is None else lax_real(part) for part in _moved(op, parts, ctx)]


def _moved(op: Operation, parts: Sequence, ctx: Context) -> Sequence:
    if all(part is None for part in parts):
        return [None] * len(op.inputs)
    return op.vjp(parts, ctx)


def _rounding(op: Operation, ctx: Context) -> Array:
    """What a cast makes of a number, over that number."""
    (x,), (y,) = (ctx.read(v) for v in op.inputs), (ctx.read(v) for v in op.outputs)
    return jnp.where((x != 0) & jnp.isfinite(y), safe_divide(y.astype(x.dtype), x), 1)


def _kept_by_constants(
    op: Operation, r: Sequence[Promise | None], ctx: Context
) -> Causes:
    """Relevance of the output elements that came from a constant operand."""
    ones = [jnp.ones_like(ctx.read(v)) for v in op.inputs]
    marks = op.jvp(ctx, ones)  # 1 where an active element was moved to, else 0
    causes: list[Causes] = []
    for out, promise, mark in zip(op.outputs, r, marks, strict=True):
        if promise is not None:
            relevance = promise.resolve(ctx.read(out))
            of_constants = relevance * (1 - jnp.abs(mark))
            if op.stopped:
                dead = jnp.abs(dead_part(op, ctx, marked=True))
                causes.append({"stopped": of_constants * dead})
                of_constants = of_constants * (1 - dead)
            causes.append({"constants": of_constants})
    return summed(causes)
