"""``lax.cond`` and ``lax.switch`` in reverse: the branch that ran, run again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from jlrp.promise import difference
from jlrp.rules.base import Array, BodyPlan, Both, Residuals
from jlrp.rules.loops.bodies import Bodies, Reversal
from jlrp.rules.loops.iteration import Handed, Iteration, add_to, at_both, both_of
from jlrp.rules.loops.parts import Promises, settled
from jlrp.typing import PyTree


class _InReverse(Reversal["Cond"]):
    """The branch is an iteration that runs once."""

    def run(self) -> Handed:
        ctx, (atom, *operands) = self.ctx, self.equation.inputs
        self.parts = settled(self.inside, self.outs)
        index = ctx.read(atom)
        self.operands = both_of(ctx, lambda ctx: list(map(ctx.read, operands)))
        if ctx.reference is None or not ctx.varies(atom):
            return self._of_branch(index)
        return self._of_both(index, ctx.reference.read(atom))

    def _of_branch(self, index: Array) -> Handed:
        args = self.operands, self.r_out
        return lax.switch(index, self.alike(self._run, *args)[0], *args)

    def _run(self, iteration: Iteration, operands: PyTree, r_out: Promises) -> Handed:
        """A branch, with what all branches capture: of the others zeros."""

        def again(operands: Sequence[Array]) -> Residuals:
            return self.ctx.forward_body(iteration.plan, operands)[1]

        handed = iteration(at_both(again, operands), r_out, {}, self.parts)
        captured = {
            i: handed.captured if one is iteration else one.captured_nothing()
            for i, one in enumerate(self.iterations)
        }
        return handed._replace(captured=captured)

    def _of_both(self, index: Array, other: Array) -> Handed:
        """Half by the branch of each point; what another branch makes is a switch."""
        pair = self._of_branch(index), self._of_branch(other)
        handed: Handed = jax.tree.map(lambda x, y: (x + y) / 2, *pair)
        if self.extra.causes:
            add_to(handed.causes, "switch", self._switched(index, other))
        return handed

    def _switched(self, *indices: Array) -> Array:
        def branch(plan: BodyPlan) -> Callable[..., list[Array]]:
            run = partial(self.ctx.forward_body, plan)
            return lambda *xs: list(map(jnp.asarray, run(xs)[0]))

        branches = list(map(branch, self.rule.plans))
        total = jnp.zeros(())
        assert isinstance(self.operands, Both)
        for xs in (self.operands.here, self.operands.there):
            both = [lax.switch(index, branches, *xs) for index in indices]
            for promise, y, y0 in zip(self.r_out, *both, strict=True):
                if promise is not None:
                    total = total + jnp.sum(promise.resolve(difference(y, y0))) / 2
        return total


class Cond(Bodies):
    """``lax.cond`` and ``lax.switch``: the branch that ran, run again in reverse."""

    reversal = _InReverse
