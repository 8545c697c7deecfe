"""``lax.while_loop`` in reverse, from checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import jaxpr_as_fun

from jlrp.ir.program import Equation
from jlrp.ops.captures import COUNTS, Captured
from jlrp.rules.base import Array, Both, Forward, Residuals
from jlrp.rules.loops.bodies import Bodies, Reversal, plus
from jlrp.rules.loops.iteration import Handed, Iteration, Masks, at_both, both_of
from jlrp.rules.loops.parts import Promises, settled
from jlrp.typing import PyTree

_CHECKPOINTS = 64


class _Checkpoints:
    """States of a loop, evenly spaced, from which those between are made again."""

    def __init__(self, advance: Callable[[PyTree], PyTree], start: PyTree, n: Array):
        self.advance = advance
        self.spacing = jnp.maximum(1, -(-n // _CHECKPOINTS))
        states = jax.tree.map(
            lambda v: jnp.zeros((_CHECKPOINTS, *v.shape), v.dtype), start
        )
        self.states, _ = lax.fori_loop(0, n, self._keep, (states, start))

    def _keep(self, i: Array, kept: PyTree) -> PyTree:
        states, state = kept

        def written(row: Array, v: Array) -> Array:
            v = jnp.where(i % self.spacing == 0, v, row[i // self.spacing])
            return lax.dynamic_update_index_in_dim(row, v, i // self.spacing, 0)

        return jax.tree.map(written, states, state), self.advance(state)

    def before(self, i: Array) -> PyTree:
        """The state before iteration i."""
        start = jax.tree.map(lambda s: s[i // self.spacing], self.states)
        return lax.fori_loop(
            0, i % self.spacing, lambda _, state: self.advance(state), start
        )


class _InReverse(Reversal["While"]):
    """From the last iteration that ran to the first, each from a checkpoint."""

    def run(self) -> Handed:
        equation, ctx = self.equation, self.ctx
        self.parts = settled(self.inside, self.outs)
        operands = both_of(ctx, lambda ctx: list(map(ctx.original, equation.inputs)))
        self.loops = at_both(partial(_Loop, equation), operands)
        self.rows = _Rows(self.rule.steps or 0)
        self.masks = self.rule.masks(ctx)
        count = ctx.recorded(equation)
        at_first = at_both(lambda loop: loop.start, self.loops)
        checkpoints = _Checkpoints(self._advance, at_first, count)
        carries, constants = self.start()
        args = carries, at_first, jnp.int32(0)
        runs, no_causes = self.alike(self._run, *args)

        def step(k: Array, state: PyTree) -> PyTree:
            carries, constants, causes, rows = state
            i = count - 1 - k
            part = jnp.minimum(i, len(runs) - 1)
            handed = lax.switch(part, runs, carries, checkpoints.before(i), i)
            return (
                handed.carries,
                plus(constants, handed.constants),
                jax.tree.map(jnp.add, causes, handed.causes),
                self.rows.written(rows, handed.captured, i),
            )

        rows = self.rows.empty(self.iterations[-1].captured_nothing())
        state = carries, constants, no_causes, rows
        carries, constants, causes, rows = lax.fori_loop(0, count, step, state)
        captured = self.rows.finished(rows, count) if self.extra.captures else {}
        return Handed(constants, carries, [], {1: captured}, causes)

    def _advance(self, state: PyTree) -> PyTree:
        return at_both(lambda loop, state: loop.advance(state), self.loops, state)

    def _run(
        self, iteration: Iteration, carries: Promises, state: PyTree, i: Array
    ) -> Handed:
        """Iteration i, from the state before it."""

        def again(loop: _Loop, state: Sequence[Array]) -> Residuals:
            inputs = [*loop.constants, *state]
            return self.ctx.forward_body(iteration.plan, inputs)[1]

        residuals = at_both(again, self.loops, state)
        at_x = state.here if isinstance(state, Both) else state
        loop = self.loops.here if isinstance(self.loops, Both) else self.loops
        running, ended = loop.divided(carries, at_x)
        masks = self.rows.at(self.masks, i)
        handed = iteration(residuals, running, masks, self.parts)
        return handed._replace(carries=plus(handed.carries, ended))


@dataclass(frozen=True)
class _Rows:
    """What is stacked of a loop of unknown length: a fixed number of iterations."""

    count: int

    def empty(self, of_one: Captured) -> Captured:
        return jax.tree.map(lambda a: lax.broadcast(a, (self.count,)), of_one)

    def written(self, rows: Captured, of_one: Captured, i: Array) -> Captured:
        if not self.count:
            return rows
        i = jnp.minimum(i, self.count - 1)
        return jax.tree.map(
            lambda row, a: lax.dynamic_update_index_in_dim(row, a, i, 0), rows, of_one
        )

    def at(self, masks: Masks, i: Array) -> Masks:
        """The masks of an iteration; NaN where there are none left."""

        def row(mask: Array) -> Array:
            if mask.shape[0] == 1:
                return mask[0]
            number = lax.dynamic_index_in_dim(mask, i, 0, False)
            floating = jnp.result_type(number, jnp.float32)
            return jnp.where(i < mask.shape[0], number.astype(floating), jnp.nan)

        return {name: row(mask) for name, mask in masks.items()}

    def finished(self, rows: Captured, ran: Array) -> Captured:
        """All rows, or NaN if there would have been more; and how often it ran.

        A compiled program cannot raise: NaN is seen, a row that is left out is not.
        """

        def filled(row: Array) -> Array:
            if not jnp.issubdtype(row.dtype, jnp.floating):
                return row
            return jnp.where(ran > self.count, jnp.nan, row)

        counts = [*rows.get(COUNTS, ()), jnp.int32(ran)]
        return {**jax.tree.map(filled, rows), COUNTS: counts}


class _Loop:
    """A ``while_loop``'s condition and body, at its constants.

    ``vmap`` may give each example a trip count of its own: the condition then has an
    entry for each, and those that have ended keep their state.
    """

    def __init__(self, equation: Equation, operands: Sequence[Array]):
        n_condition = equation.params["cond_nconsts"]
        self.for_condition, rest = operands[:n_condition], operands[n_condition:]
        n_constants = equation.params["body_nconsts"]
        self.constants, self.start = rest[:n_constants], list(rest[n_constants:])
        self._condition = jaxpr_as_fun(equation.params["cond_jaxpr"])
        self._body = jaxpr_as_fun(equation.params["body_jaxpr"])
        self._is_one = equation.params["cond_jaxpr"].out_avals[0].shape == ()

    def goes_on(self, state: Sequence[Array]) -> Array:
        return self._condition(*self.for_condition, *state)[0]

    def advance(self, state: Sequence[Array]) -> list[Array]:
        new = list(self._body(*self.constants, *state))
        if self._is_one:
            return new
        runs = self.goes_on(state)
        return [
            jnp.where(_over_leading_axes(runs, a), a, b)
            for a, b in zip(new, state, strict=True)
        ]

    def divided(
        self, promises: Promises, state: Sequence[Array]
    ) -> tuple[Promises, Promises]:
        """The promises of examples that run on, and of those that wait."""
        if self._is_one:
            return promises, [None] * len(promises)
        runs = self.goes_on(state)

        def where(condition: Array) -> Promises:
            return jax.tree.map(
                lambda part: jnp.where(_over_leading_axes(condition, part), part, 0),
                promises,
            )

        return where(runs), where(~runs)


def _over_leading_axes(flags: Array, array: Array) -> Array:
    return lax.broadcast_in_dim(flags, array.shape, range(flags.ndim))


@dataclass(frozen=True, eq=False, repr=False)
class While(Bodies):
    """``lax.while_loop``: run again from checkpoints, last iteration first.

    Its trip count n is known only when it has run, so that the states before every
    iteration cannot be kept in an array. It is run once to count, once to keep 64
    states evenly spaced, and each segment is run again from its first state: the
    memory is bounded whatever n, the time about n / 128 runs of each iteration.

    What is captured of the first ``steps`` iterations is stacked, with zeros behind the
    last; NaN everywhere if there were more.
    """

    reversal = _InReverse
    steps: int | None = None

    def captures(self) -> bool:
        return self.steps is not None

    def record(
        self, equation: Equation, operands: Sequence[Array], forward: Forward
    ) -> tuple[list[Array], Array]:
        """Run the loop; its outputs, and how often it ran."""
        loop = _Loop(equation, operands)

        def goes_on(state: PyTree) -> Array:
            return jnp.any(loop.goes_on(state[1]))

        def step(state: PyTree) -> PyTree:
            return state[0] + 1, loop.advance(state[1])

        count, outs = lax.while_loop(goes_on, step, (jnp.int32(0), loop.start))
        return outs, count
