"""Rules that look at kernels, relative to a reference: on differences, without bias."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax

from jlrp import tactics
from jlrp.ops.base import Operation
from jlrp.ops.canonized import LinearMap
from jlrp.ops.context import Context
from jlrp.ops.kinds.affine import AffineOp
from jlrp.promise import Parts, Promise, safe_divide, zero, zeros_like
from jlrp.rules.base import Propagation, Rule
from jlrp.rules.contributions import Sign, negative, other, positive
from jlrp.rules.reference import (
    OfChanges,
    averaged,
    constants_of,
    multipliers_of,
    settings,
    switched,
)
from jlrp.tactics.contributions import Cut, by_blocks, large_axes
from jlrp.tactics.dependencies import depend_on, first_of
from jlrp.typing import Array


class OnDifferences(Rule):
    """A rule that looks at kernels, and has a form on differences."""

    def from_reference(self, op: Operation) -> Rule:
        return KernelDifference(self)

    def of_changes(self, changes: Changes) -> Array:
        """The multiplier of a layer's input."""
        raise NotImplementedError


@dataclass(frozen=True)
class KernelDifference(OfChanges):
    """``Gamma``, ``ZPlus`` or ``AlphaBeta`` on differences: ``z = W D``, no bias.

    With ``P = (W + g W+) D+ + (W + g W-) D-`` and N the same with the signs exchanged,
    relevance ``m z`` is shared by the contributions to P where z > 0, to N where z < 0,
    and there is none at z = 0. z+ is gamma to infinity: shares among the contributions
    that have z's sign. Alpha-beta: alpha on z's side, beta on the other; all on z's
    side where the other is empty. ``|P| >= |z|`` on z's side, so that ``z / P`` is
    bounded and takes no stabiliser, which would lose most of little changes.

    Args:
      rule: the rule without a reference; its bias and stabiliser play no part.
    """

    rule: OnDifferences

    def __repr__(self) -> str:
        return f"Difference({self.rule!r})"

    def parts(self, op: Operation, r: Sequence[Parts]) -> Sequence[Parts]:
        return [Parts.MULTIPLIER] * len(op.inputs)

    def propagate(
        self, op: Operation, r: Sequence[Promise | None], ctx: Context
    ) -> Propagation:
        (m,) = multipliers_of(op, r, ctx)
        assert m is not None
        points = settings(self, op, ctx)
        (multiplier,) = averaged([[self._multiplier(op, m, at)] for at in points])
        return Propagation(
            [Promise(multiplier=multiplier)],
            lambda: switched(op, [m], ctx),
            constants=constants_of(op, [m], ctx),
        )

    def _multiplier(self, op: Operation, m: Array, ctx: Context) -> Array:
        assert isinstance(op, AffineOp)
        found = op.kernel_map(ctx)
        d, z = map(ctx.difference, (*op.inputs, *op.outputs))
        d = depend_on(d, first_of(ctx.after))
        axes, after = large_axes(op, found.kernel), first_of(ctx.after)
        if axes is None or not tactics.enabled():
            late = depend_on(found.kernel, after)
            return self.rule.of_changes(
                Changes(found.linear, found.kernel, late, d, z, m)
            )

        def part(kernel: Array, cut: Cut) -> Array:
            late = depend_on(kernel, after)  # of the whole it would be a copy
            changes = Changes(found.linear, kernel, late, d, cut(z), cut(m))
            return self.rule.of_changes(changes)

        return by_blocks(part, found.kernel, axes)


class Changes(NamedTuple):
    """A layer between two points, and the multiplier of its output.

    What is made of the kernel is made of ``late``: the same, which is there no sooner
    than relevance is.
    """

    linear: LinearMap
    kernel: Array
    late: Array
    d: Array
    z: Array
    m: Array

    def favouring(self, whole: float, size: float) -> Array:
        """Shares by ``whole w D + size |w D| sign(z)``.

        ``|W| |D|`` and W D give the sums of both signs by one map: on z's side no
        digits are lost.
        """
        sizes = self.linear.apply(lax.abs(self.d), lax.abs(self.late))
        sign = lax.sign(self.z)
        total = whole * self.z + size * sign * sizes
        s = self.m * safe_divide(self.z, total)
        back = self.linear.transpose(lax.abs(self.late), sign * s)
        return whole * self.linear.transpose(self.kernel, s) + size * (
            lax.sign(self.d) * back
        )

    def by_both_signs(self, alpha: float, beta: float) -> Array:
        above, below = self._sum(positive), self._sum(negative)
        is_above = lax.gt(self.z, zero(self.z))
        other = lax.select(is_above, below, above)
        empty = lax.eq(other, zero(other))
        mine = jnp.where(empty, 1.0, alpha)
        own = self.m * mine * safe_divide(self.z, lax.select(is_above, above, below))
        its = self.m * jnp.where(empty, 0.0, -beta) * safe_divide(self.z, other)
        nothing = lax.eq(self.z, zero(self.z))
        own, its = (lax.select(nothing, zeros_like(s), s) for s in (own, its))
        of_positive = self._back(positive, lax.select(is_above, own, its))
        return of_positive + self._back(negative, lax.select(is_above, its, own))

    def _sum(self, sign: Sign) -> Array:
        """The contributions of one sign, by maps of their own: 0 if there are none."""
        apply, kernel = self.linear.apply, self.late
        upper = apply(positive(self.d), sign(kernel))
        return upper + apply(negative(self.d), other(sign)(kernel))

    def _back(self, sign: Sign, s: Array) -> Array:
        above = self.linear.transpose(sign(self.late), s)
        below = self.linear.transpose(other(sign)(self.late), s)
        return lax.select(lax.gt(self.d, zero(self.d)), above, below)
