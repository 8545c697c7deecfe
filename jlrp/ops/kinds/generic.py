"""Operations that are one equation, by what is known of its primitive."""

from __future__ import annotations

from dataclasses import dataclass

from jax.extend.core import primitives as p

from jlrp.ops.base import Cotangents, Operation
from jlrp.ops.context import Context, widened
from jlrp.typing import Array


@dataclass(frozen=True, eq=False, repr=False)
class SelectionOp(Operation):
    """One number chosen among several: max pooling, max, sort, top-k."""

    def vjp(self, cotangents: Cotangents, ctx: Context) -> list[Array]:
        (m, *others), (equation, *_) = cotangents, self.equations
        winner = _WINNERS.get(equation.primitive)
        if m is None or others or winner is None:
            return super().vjp(cotangents, ctx)
        params = dict(equation.params)
        dilations = params.pop("base_dilation"), params.pop("window_dilation")
        dilated = any(n != 1 for dilation in dilations for n in dilation)
        if dilated or widened(self.inputs[0]).dtype != m.dtype:
            return super().vjp(cotangents, ctx)
        # To the winner of each window, as JAX chooses it.
        x: Array = ctx.read(equation.inputs[0])
        return [p.select_and_scatter_add_p.bind(m, x, select_prim=winner, **params)]


_WINNERS = {p.reduce_window_max_p: p.ge_p, p.reduce_window_min_p: p.le_p}


@dataclass(frozen=True, eq=False, repr=False)
class FunctionOp(Operation):
    """A function of several values, of which only the derivative is known."""


@dataclass(frozen=True, eq=False, repr=False)
class HomogeneousOp(Operation):
    """Homogeneous of a known degree: decompositions, solvers, products over axes."""


@dataclass(frozen=True, eq=False, repr=False)
class RoundingOp(Operation):
    """A quantiser."""


@dataclass(frozen=True, eq=False, repr=False)
class CustomOp(Operation):
    """A primitive with a rule that the user registered."""


@dataclass(frozen=True, eq=False, repr=False)
class UnsupportedOp(Operation):
    """A primitive that has no rule."""
