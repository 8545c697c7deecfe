"""Conditions: relevance masked at a named value, then on (CRP)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import jax.numpy as jnp

from jlrp.ir.program import Value
from jlrp.ops.base import Operation
from jlrp.ops.context import Context
from jlrp.promise import Parts, Promise
from jlrp.rules.base import Causes, Propagation, Rule


@dataclass(frozen=True)
class Mask(Rule):
    """``R <- R * mask`` at a named value. Source: CRP (Achtibat et al. 2023).

    In a loop it is the mask of ``this`` iteration or, on a carry as it goes out, of the
    ``next``; on what a loop starts from, the ``first`` or ``last`` of all, whichever
    runs before the others.
    """

    name: str
    which: str = "this"

    def needs(self, op: Operation) -> tuple[Value, ...]:
        return op.outputs

    def parts(self, op: Operation, r: Sequence[Parts]) -> Sequence[Parts]:
        return r

    def propagate(
        self, op: Operation, r: Sequence[Promise | None], ctx: Context
    ) -> Propagation:
        (promise,) = r
        assert promise is not None
        y = ctx.read(op.outputs[0])
        mask = ctx.masks[self.name]
        if self.which in ("first", "last") and mask.ndim > y.ndim:
            mask = mask[0 if self.which == "first" else -1]
        mask = jnp.broadcast_to(mask, y.shape).astype(y.dtype)

        def causes() -> Causes:
            moved = ctx.difference(op.outputs[0])
            return {"blocked": jnp.sum(promise.resolve(moved) * (1 - mask))}

        return Propagation([promise.map(lambda part: part * mask)], causes)
