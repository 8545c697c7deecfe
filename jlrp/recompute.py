"""Activations that the forward pass did not keep, made again in the reverse pass."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import jax
from jax import lax
from jax.extend.core import primitives as p

from jlrp import tactics
from jlrp.errors import RuleError
from jlrp.interpreter import run
from jlrp.ir import jax_compat
from jlrp.ir.program import Atom, Equation, Value, computing
from jlrp.plan.planning import Plan, is_float
from jlrp.rules.base import Residuals
from jlrp.tactics.dependencies import depend_on
from jlrp.typing import PyTree

Array = jax.Array


class Recomputed:
    """Activations that the forward pass did not keep, made again when asked for.

    ``guarded``: behind a barrier, or the compiler would take them from the forward
    pass, and keep them after all.
    """

    def __init__(self, plan: Plan, residuals: Residuals, guarded: bool = True):
        self._plan, self._kept, self._guarded = plan, residuals, guarded
        self._made: Residuals = {}
        self.after: Array | None = None

    def __getitem__(self, value: Value) -> Array:
        if value not in self._plan.recomputed:
            made = value.producer
            raise RuleError(
                "A rule reads a value that its needs(op) does not name, "
                + (f"an output of {made.primitive.name}" if made else "an input")
                + (f" at {made.where()}." if made else ".")
            )
        if value not in self._made:
            self._make([value])
        return self._made[value]

    def recorded(self, equation: Equation) -> PyTree:
        if equation not in self._made:
            # Its outputs may be kept, what it records is not.
            self._make([a for a in equation.inputs if isinstance(a, Value)])
            run([equation], self._made, self._plan.recorders)
        return self._made[equation]

    def _make(self, values: Sequence[Value]) -> None:
        def is_missing(v: Value) -> bool:
            return v not in self._kept and v not in self._made

        equations, starts = computing(self._plan.program, values, is_missing)
        starts = [v for v in starts if v not in self._made]
        self._made.update(self._plan.program.constants)
        held = self._held_back(starts, _laid_out(equations))
        self._made.update(zip(starts, held, strict=True))
        run(equations, self._made, self._plan.recorders)

    def _held_back(
        self, starts: Sequence[Value], laid_out: frozenset[Atom]
    ) -> list[Array]:
        """What a recomputation starts from, with a dependency on relevance.

        The dependency may cost a copy. So parameters have none, but for those that are
        ``laid_out`` anew, which is a copy by itself.
        """
        numbers = [jax_compat.on_device(self._kept[v]) for v in starts]
        floats = [i for i, v in enumerate(starts) if is_float(v)]
        guarded = self._guarded and tactics.enabled()
        if guarded and floats and self.after is not None:
            held = [*(numbers[i] for i in floats), self.after]
            for i, number in zip(floats, lax.optimization_barrier(held), strict=False):
                is_parameter = self._plan.program.is_parameter(starts[i])
                if starts[i] in laid_out or not is_parameter:
                    number = depend_on(number, after=self.after)
                numbers[i] = number
        return numbers


def _laid_out(equations: Iterable[Equation]) -> frozenset[Atom]:
    """The kernels of convolutions, which XLA copies into an order of its own."""
    convolutions = (e for e in equations if e.primitive is p.conv_general_dilated_p)
    return frozenset(e.inputs[1] for e in convolutions)
