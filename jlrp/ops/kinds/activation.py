"""Activation functions: elementwise in one active value, whatever they are made of."""

from __future__ import annotations

from dataclasses import dataclass

from jlrp.ir.program import Value
from jlrp.ops.activation import Region
from jlrp.ops.base import Operation
from jlrp.ops.context import Context
from jlrp.typing import Array


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class ActivationOp(Operation):
    """One activation function; ``region`` are its equations."""

    region: Region

    @property
    def passes(self) -> bool:
        """Whether relevance passes: f(0) = 0, or f is homogeneous."""
        return self.region.zero_at_zero or self.region.homogeneous


def values_of(region: Region, x: Array, ctx: Context) -> dict[Value, Array]:
    """Every value of a region for another input."""
    return ctx.run(region.equations, region.constants, {region.start: x})
