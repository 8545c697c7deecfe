"""Dense layers and convolutions, with their bias and an inference batch norm."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import jax
from jax import lax

from jlrp.ir.program import Equation
from jlrp.ops.affine import Affine
from jlrp.ops.base import Cotangents
from jlrp.ops.canonized import CanonizedKernel, canonized_map, linear_part
from jlrp.ops.context import Context, widened
from jlrp.ops.kinds.linear import LinearOp
from jlrp.ops.transposes import affine_transpose
from jlrp.typing import Array


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class AffineOp(LinearOp):
    """A dot or convolution with a kernel of parameters, scaled and shifted.

    Attributes:
      affine: its chain, from the dot or convolution to the last scale or shift.
      depth: how many lie before it on the longest path from x, as a share of the most
        that lie before any: 0 is nearest to x, 1 nearest to the output.
    """

    affine: Affine
    depth: float = 0.0  # type: ignore[misc]

    @property
    def equation(self) -> Equation:
        return self.affine.core

    @property
    def is_convolution(self) -> bool:
        return self.affine.kind == "conv"

    @property
    def is_negated(self) -> bool:
        """Whether it is a term that a sum subtracts: so is then its kernel."""
        return "negated" in self.facts

    def offset(self, ctx: Context) -> Array:
        """The bias. The core gives zero at zero; XLA would run one of zeros."""
        (end,), (out,) = self.affine.core.outputs, self.outputs
        zero = {end: lax.full(end.shape, 0, widened(end).dtype)}
        before = {self.affine.core, *self.affine.of_kernel}
        behind = [e for e in self.equations if e not in before]
        return ctx.run(behind, self.constants, zero)[out]

    def transpose(self, cotangents: Cotangents, ctx: Context) -> list[Array]:
        (m,) = cotangents
        assert m is not None
        direct = affine_transpose(self.affine, m, ctx)
        if direct is not None:
            return [direct]
        linear = partial(linear_part, self.affine, ctx=ctx)
        return list(jax.linear_transpose(linear, widened(self.inputs[0]))(m))

    def kernel_map(self, ctx: Context) -> CanonizedKernel:
        """The operation with its effective kernel and bias, as rules see it."""
        bias = self.offset(ctx) if self.has_offset else None
        return canonized_map(self.affine, bias, self.is_negated, ctx)
