"""The context of rules as the two loops give it: it runs bodies of loops, too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import jax.numpy as jnp

from jlrp.delivered import captured, to_inputs
from jlrp.interpreter import Observer, forward, reverse
from jlrp.ir.program import Value
from jlrp.ops.captures import Captured, Entry
from jlrp.plan.planning import Plan
from jlrp.promise import Promise
from jlrp.recompute import Recomputed
from jlrp.rules.base import BodyPlan, Both, LoopContext, Residuals
from jlrp.typing import Array, PyTree


class EvalContext(LoopContext):
    """The values of one explanation, and its two loops for the bodies in it."""

    def forward_body(
        self, plan: BodyPlan, inputs: Sequence[Array]
    ) -> tuple[list[Array], Residuals]:
        assert isinstance(plan, Plan)
        return forward(plan, inputs)

    def reverse_body(
        self,
        plan: BodyPlan,
        residuals: Residuals | Both,
        seeds: Mapping[Value, Promise],
        observe: Observer | None,
        wanted: Sequence[Value],
        explained: Mapping[Value, Array],
        masks: Mapping[str, Array],
        captures: bool,
    ) -> tuple[list[Promise | None], Sequence[Array], Captured]:
        assert isinstance(plan, Plan)
        program, whole = plan.program, plan
        masks = {**self.masks, **masks}

        def at(residuals: Residuals, reference: EvalContext | None) -> EvalContext:
            residuals = {**program.constants, **residuals}
            recomputed = Recomputed(whole, residuals, guarded=False)
            return EvalContext(program, residuals, recomputed, masks, reference)

        here, there = (
            (residuals.here, residuals.there)
            if isinstance(residuals, Both)
            else (residuals, None)
        )
        inside = at(here, None if there is None else at(there, None))
        plan = plan if wanted else replace(plan, parameters=frozenset())
        delivered = reverse(plan, inside, seeds, observe, explained)
        found = _stackable(plan, captured(plan, delivered, inside)) if captures else {}
        if not wanted:
            return delivered.sources, [], found
        return delivered.sources, to_inputs(plan, delivered, wanted, inside.kept), found


def context_of(
    plan: Plan, residuals: Residuals, masks: Mapping[str, Array] | None = None
) -> EvalContext:
    """The context of a plan, with what its forward pass kept."""
    return EvalContext(plan.program, residuals, Recomputed(plan, residuals), masks)


def _stackable(plan: Plan, found: Captured) -> Captured:
    """What was captured, in the dtypes that all iterations share."""

    def cast(array: Array, entry: Entry) -> PyTree:
        return array if entry.like is None else jnp.asarray(array, entry.like.dtype)

    return {
        name: [cast(a, e) for a, e in zip(found[name], several, strict=True)]
        for name, several in plan.captured.items()
    }
