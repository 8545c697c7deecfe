"""``lax.scan`` in reverse, over what its iterations stacked or by chunks of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial, reduce
from typing import Any

import jax.numpy as jnp

from jlrp.analysis.dataflow import dependent
from jlrp.ir.loops import Body
from jlrp.ir.program import Equation, Value, computing
from jlrp.ops.base import Operation
from jlrp.ops.context import computed
from jlrp.promise import Parts
from jlrp.rules.base import Array, BodyPlan, Both, Forward, LoopContext, Residuals
from jlrp.rules.loops.bodies import Bodies, Reversal, plus
from jlrp.rules.loops.iteration import (
    Handed,
    Iteration,
    Masks,
    add_to,
    at_both,
    both_of,
)
from jlrp.rules.loops.order import Order, Recompute, ScanBody
from jlrp.rules.loops.parts import Inside, Promises, filled, joined, settled
from jlrp.typing import PyTree


@dataclass(frozen=True, eq=False)
class Stacking:
    """What of a scan's body is stacked, sliced, made again."""

    body: Body
    plan: BodyPlan

    @cached_property
    def _varying(self) -> set[Value]:
        body = self.body
        return dependent(body.program, (*body.carries, *body.slices))

    @cached_property
    def stacked(self) -> list[Value | Equation]:
        slices = set(self.body.slices)
        kept = [v for v in self.plan.kept if v in self._varying and v not in slices]
        recorded = [e for e in self.plan.recorders if e not in self.plan.repeated]
        return [*kept, *recorded]

    @cached_property
    def invariant(self) -> list[Value]:
        return [v for v in self.plan.kept if v not in self._varying]

    @cached_property
    def inputs_read(self) -> set[Value]:
        """The constants and slices that the reverse pass reads."""
        program = self.body.program
        _, starts = computing(program, self.invariant, lambda _: True)
        slices = {v for v in self.body.slices if v in self.plan.kept}
        return slices.union(starts)

    def rerun(self, equation: Equation, order: Order, ctx: LoopContext) -> Recompute:
        """An iteration that is run again, and the arrays that it slices."""
        constants, _, xs = self.body.divided([ctx.original(a) for a in equation.inputs])
        return self.forward(constants, ctx.forward_body), order.taken(xs)[1]

    def forward(self, constants: Sequence[Array], forward: Forward) -> ScanBody:
        """One iteration, and with its ys what rules read of it."""
        n = self.body.n_carries

        def run(carry: PyTree, xs: PyTree) -> tuple[PyTree, PyTree]:
            outs, residuals = forward(self.plan, [*constants, *carry, *xs])
            return outs[:n], (outs[n:], [residuals[key] for key in self.stacked])

        return run


def _parts_by_plan(
    first: Sequence[Inside], main: Inside, outs: Sequence[Parts]
) -> list[list[Parts]]:
    """What the stacked iterations hand back; then, from the last, each of the first."""
    n = main.body.n_carries
    several = [settled([main], outs)]
    for inside in reversed(first):
        carries = inside.body.divided(several[-1])[1]
        several.append(inside([*carries, *outs[n:]]))
    return several


def _again(reruns: Recompute | Both) -> Recompute:
    """Iterations that are run again at x, or at both points, as one."""

    def run(carry: PyTree, xs: PyTree) -> tuple[PyTree, PyTree]:
        found = at_both(lambda one, carry, xs: one[0](carry, xs), reruns, carry, xs)
        return at_both(lambda f: f[0], found), at_both(lambda f: f[1][1], found)

    return run, at_both(lambda one: one[1], reruns)


class _Stacked:
    """One iteration in reverse, from what was stacked of it and the slices it reads."""

    def __init__(self, part: Stacking, iteration: Iteration, equation: Equation):
        self.part, self.iteration, body = part, iteration, part.body
        pairs = zip(body.program.inputs, body.operands(equation), strict=True)
        operands = [(v, a) for v, a in pairs if v in part.inputs_read]
        self.sliced = [v for v in body.slices if v in part.inputs_read]

        def outside(ctx: LoopContext) -> tuple[list[Array], dict[Value, Array]]:
            found = {v: ctx.original(a) for v, a in operands}
            arrays = [found.pop(v) for v in self.sliced]
            return arrays, computed(body.program, part.invariant, found)

        found = both_of(iteration.ctx, outside)
        self.arrays = at_both(lambda pair: pair[0], found)
        self.constants = at_both(lambda pair: pair[1], found)

    def __call__(self, carried: Promises, xs: PyTree, parts: Sequence[Parts]) -> Handed:
        ys, residuals, (slices, masks) = xs

        def numbers_of(
            constants: Residuals, residuals: PyTree, slices: Sequence[Array]
        ) -> Residuals:
            stacked = zip(self.part.stacked, residuals, strict=True)
            sliced = zip(self.sliced, slices, strict=True)
            return constants | dict(stacked) | dict(sliced)

        numbers = at_both(numbers_of, self.constants, residuals, slices)
        return self.iteration(numbers, [*carried, *ys], masks, parts)


class _InReverse(Reversal["Scan"]):
    """First through the iterations that are stacked, by a scan over each span of them,
    then one by one through the first, which have plans of their own.
    """

    def __init__(self, rule: Scan, equation: Equation, *args: Any):
        super().__init__(rule, equation, *args)
        self.order = rule.order(equation)
        first = self.inside[: self.order.n_first]
        self.by_plan = _parts_by_plan(first, self.inside[-1], self.outs)
        self.parts = self.by_plan[0]
        self.recorded = both_of(self.ctx, lambda ctx: ctx.recorded(equation))
        self.stacked = [
            _Stacked(part, iteration, equation)
            for part, iteration in zip(rule.stacking, self.iterations, strict=True)
        ]
        masks = rule.masks_by_iteration(equation, self.ctx)
        self.slices = [self.order.taken((s.arrays, masks)) for s in self.stacked]
        self.ys = self.order.taken(self.r_out[self.body.n_carries :])

    def run(self) -> Handed:
        (carries, constants), (rest, amounts) = self._through_spans()
        causes = {name: jnp.sum(stacked) for name, stacked in amounts.items()}
        first: list[PyTree] = []
        backwards = reversed(range(self.order.n_first))
        for i, parts in zip(backwards, self.by_plan[1:], strict=True):
            xs = self.ys[0][i], self._residuals(i), self.slices[i][0][i]
            handed = self.stacked[i](carries, xs, parts)
            carries, constants = handed.carries, plus(constants, handed.constants)
            first.insert(0, (handed.slices, handed.captured))
            for name, amount in handed.causes.items():
                add_to(causes, name, amount)
        slices, captured = self._joined(first, rest)
        return Handed(constants, carries, slices, {0: captured}, causes)

    def _through_spans(self) -> PyTree:
        """Promises before the stacked iterations, and what these stack."""
        main, order, chunked = self.stacked[-1], self.order, self.rule.chunked

        def step(state: PyTree, xs: PyTree) -> PyTree:
            carries, constants = state
            handed = main(carries, xs, self.parts)
            state = handed.carries, plus(constants, handed.constants)
            return state, ((handed.slices, handed.captured), handed.causes)

        again = None
        if chunked:
            again = _again(
                both_of(self.ctx, partial(main.part.rerun, self.equation, order))
            )
        state, rows = self.start(), []
        arrays = self.ys[1], self.slices[-1][1]
        for i, span in reversed(list(enumerate(order.spans(chunked), order.n_first))):
            residuals = self._residuals(i)
            state, of_span = span.reverse(step, state, arrays, residuals, again)
            rows.insert(0, of_span)
        return state, order.concatenated(rows)

    def _residuals(self, i: int) -> PyTree:
        """What was recorded of a first iteration, or, behind these, of a span."""
        return at_both(lambda recorded: recorded[i], self.recorded)

    def _joined(self, first: list[PyTree], rest: PyTree) -> PyTree:
        """Rows of all iterations, the same parts of slices in each."""
        if not first:
            return rest
        parts = self.body.divided(reduce(joined, self.by_plan))[2]

        def alike(rows: PyTree, *axes: int) -> PyTree:
            slices, captured = rows
            values, dtype = self.body.slices, self.dtype
            return filled(slices, parts, values, dtype, *axes), captured

        rest = alike(rest, self.order.length - len(first))
        return self.order.joined(list(map(alike, first)), rest)


@dataclass(frozen=True, eq=False, repr=False)
class Scan(Bodies):
    """``lax.scan``: relevance by the reverse scan over stacked residuals.

    Stacked is only what the body's rules read and what differs between iterations;
    slices are read from the scanned arrays, invariants made again from constants. First
    iterations that have a plan of their own are run before the scan.

    A ``chunked`` scan of n iterations keeps the carries before each of about sqrt(n)
    chunks instead, and runs a chunk again where relevance comes back. Source: Chen et
    al. 2016 (arXiv 1604.06174).
    """

    reversal = _InReverse
    chunked: bool = False

    @cached_property
    def stacking(self) -> list[Stacking]:
        return [Stacking(b, p) for b, p in zip(self.bodies, self.plans, strict=True)]

    def order(self, equation: Equation) -> Order:
        return Order(equation, len(self.bodies) - 1)

    def needs(self, op: Operation) -> tuple[Value, ...]:
        (equation,) = op.equations
        if self.chunked:
            return super().needs(op)
        needed: dict[Value, None] = {}
        for part in self.stacking:
            operands = part.body.operands(equation)
            for v, a in zip(part.body.program.inputs, operands, strict=True):
                if v in part.inputs_read and isinstance(a, Value):
                    needed[a] = None
        return tuple(needed)

    def parts_inside(self, equation: Equation, outs: Sequence[Parts]) -> list[Parts]:
        inside, n_first = self.inside(), self.order(equation).n_first
        several = _parts_by_plan(inside[:n_first], inside[-1], outs)
        body, first = self.bodies[0], several[-1]
        constants, _, slices = body.divided(reduce(joined, several))
        return [*constants, *body.divided(first)[1], *slices]

    def record(
        self, equation: Equation, operands: Sequence[Array], forward: Forward
    ) -> tuple[list[Array], list[PyTree]]:
        """Run the scan; its outputs, and what is kept for the reverse pass."""
        *peeled, main = self.stacking
        constants, carry, xs = main.body.divided(operands)
        order = self.order(equation)
        first, rest = order.taken(xs)
        kept, first_ys, rest_ys = [], [], []
        for part, xs in zip(peeled, first, strict=False):
            carry, (ys, residuals) = part.forward(constants, forward)(carry, xs)
            kept.append(residuals)
            first_ys.append(ys)
        run = main.forward(constants, forward)
        for span in order.spans(self.chunked):
            carry, (ys, residuals) = span.forward(run, carry, rest)
            kept.append(residuals)
            rest_ys.append(ys)
        return [*carry, *order.joined(first_ys, order.concatenated(rest_ys))], kept

    def masks_by_iteration(self, equation: Equation, ctx: LoopContext) -> Masks:
        """The masks that differ between iterations, one for each."""
        order = self.order(equation)
        masks = {
            name: jnp.broadcast_to(mask, (order.length, *mask.shape[1:]))
            for name, mask in self.masks(ctx).items()
        }
        for name in frozenset().union(*(plan.masks_of_next for plan in self.plans)):
            mask = ctx.masks[name]
            mask = masks.get(name, jnp.broadcast_to(mask, (order.length, *mask.shape)))
            masks[name] = order.of_next(mask, jnp.ones(mask.shape[1:], mask.dtype))
        return masks
