"""Quantisers: relevance passes the rounding, and ends where it clips."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import jax.numpy as jnp

from jlrp.ir.program import Value
from jlrp.ops.base import Operation
from jlrp.ops.context import Context
from jlrp.ops.kinds.generic import RoundingOp
from jlrp.promise import Parts, Promise
from jlrp.rules.base import Array, Causes, Propagation, Rule, refuse


@dataclass(frozen=True)
class StraightThrough(Rule):
    """Relevance passes a quantiser: multipliers as they are, none where it clips.

    What rounding and clipping took, ``(q - v) m``, is the ledger's cause ``rounding``.
    Source: the straight-through estimator, Bengio et al. 2013 (arXiv 1308.3432).
    """

    def needs(self, op: Operation) -> tuple[Value, ...]:
        return ()

    def parts(self, op: Operation, r: Sequence[Parts]) -> Sequence[Parts]:
        return r

    def check(self, op: Operation) -> None:
        if not isinstance(op, RoundingOp):
            refuse(self, op, "it is no quantiser")

    def from_reference(self, op: Operation) -> Rule:
        return self

    def propagate(
        self, op: Operation, r: Sequence[Promise | None], ctx: Context
    ) -> Propagation:
        (promise,) = r
        assert promise is not None
        (equation,) = op.equations
        _, rounded, inside = equation.inputs
        passes = ctx.read(inside)

        def passed(part: Array) -> Array:
            here = jnp.where(passes, part, 0)
            if ctx.reference is None:
                return here
            return (here + jnp.where(ctx.reference.read(inside), part, 0)) / 2

        r_in = promise.map(passed)

        def causes() -> Causes:
            before = promise.resolve(ctx.difference(op.outputs[0]))
            behind = r_in.resolve(ctx.difference(op.inputs[0]))
            return {"rounding": jnp.sum(before - behind)}

        return Propagation([r_in], causes)
