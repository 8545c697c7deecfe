"""Softmax, log-softmax and logsumexp, in whatever words they are written."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import jax.numpy as jnp
from jax import lax

from jlrp.ir.primitives import traits
from jlrp.ir.program import Atom, Value
from jlrp.ops.alike import unmoved
from jlrp.ops.base import Cotangents, Operation
from jlrp.ops.context import Context, widened
from jlrp.ops.exponentials import Softmax
from jlrp.promise import number
from jlrp.typing import Array


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class SoftmaxOp(Operation):
    """``exp(s) / sum exp(s)``, or what is made of that sum.

    ``softmax`` says its scores and the axes of its rows.
    """

    softmax: Softmax

    @property
    def masked(self) -> bool:
        """Whether scores may be -inf."""
        return "masked" in self.facts

    @property
    def effective_constants(self) -> tuple[Value, ...]:
        """Not what is subtracted from all scores of a row: weights stay the same."""
        shifts = {unmoved(shift) for shift in self._shifts()}
        return tuple(v for v in self.constants if unmoved(v) not in shifts)

    def _shifts(self) -> Iterator[Atom]:
        """What is added to the scores, which begin before all shifts."""
        (shifted,) = self.inputs
        for equation in self.equations:
            if not traits(equation).addition or shifted not in equation.inputs:
                continue
            others = [a for a in equation.inputs if a is not shifted]
            if len(others) == 1 and others[0] in self.constants:
                yield others[0]
                (shifted,) = equation.outputs

    def apply(self, x: Sequence[Array], ctx: Context) -> list[Array]:
        inputs = dict(zip(self.inputs, x, strict=True))
        # The shift of a row in which all is masked is -inf.
        constants = {v: _finite(ctx.read(v)) for v in self.constants}
        env = ctx.run(self.equations, (), {**constants, **inputs})
        return [env[v] for v in self.outputs]

    def at_inputs(self, ctx: Context) -> list[Array]:
        """Masked scores as the lowest number: the derivative is the same, never NaN."""
        return [_finite(ctx.read(v)) for v in self.inputs]

    def vjp(self, cotangents: Cotangents, ctx: Context) -> list[Array]:
        (m,), axes = cotangents, self.softmax.axes
        plain = m is not None and widened(self.inputs[0]).dtype == m.dtype
        if m is None or axes is None or not plain:
            return super().vjp(cotangents, ctx)
        return [self._vjp(m, axes, ctx)]

    def _vjp(self, m: Array, axes: Sequence[int], ctx: Context) -> Array:
        """``y (m - sum y m)``."""
        y = ctx.read(self.outputs[0])
        if self.masked:  # a row in which all is masked is no number
            y = lax.select(lax.ne(y, y), lax.full_like(y, 0), y)
        mean = lax.reduce_sum(lax.mul(y, m), axes)
        kept = tuple(i for i in range(y.ndim) if i not in axes)
        spread = lax.broadcast_in_dim(mean, y.shape, kept)
        return lax.mul(y, lax.sub(m, spread))


def _finite(scores: Array) -> Array:
    """-inf as the lowest number, inf as the highest."""
    if not jnp.issubdtype(scores.dtype, jnp.floating):
        return scores
    largest = number(scores, float(jnp.finfo(scores.dtype).max))
    return lax.clamp(-largest, scores, largest)
