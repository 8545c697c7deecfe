"""Products, quotients and contractions of several active values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import jax
from jax import lax
from jax.extend.core import primitives as p

from jlrp.ir import jax_compat
from jlrp.ir.primitives import traits
from jlrp.ops.base import Operation
from jlrp.ops.context import Context
from jlrp.ops.product import Product
from jlrp.ops.transposes import dot_transpose
from jlrp.typing import Array


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class ProductOp(Operation):
    """A product whose shares ``product`` says."""

    product: Product

    @property
    def is_elementwise(self) -> bool:
        return traits(self).scaling

    @property
    def divides(self) -> bool:
        """Whether it is a quotient, by its second operand."""
        return self.primitive is p.div_p

    def factor_vjp(
        self,
        m: Array,
        operands: Sequence[Array],
        taking: Sequence[int],
        ctx: Context,
    ) -> list[Array]:
        """Cotangents of some operands, at these operands."""
        (equation,) = self.equations
        alike = all(operand.dtype == m.dtype for operand in operands)
        if alike and equation.primitive is p.dot_general_p:
            return [
                dot_transpose(equation.params, m, operands[1 - i], i, operands[i].shape)
                for i in taking
            ]
        same = operands[0].shape == operands[-1].shape == m.shape
        if alike and same and equation.primitive is p.mul_p:
            return [lax.mul(m, operands[1 - i]) for i in taking]
        params = jax_compat.widened(equation.params)
        others = [ctx.read(a) for a in equation.inputs[len(operands) :]]

        def of_taking(*taken: Array) -> list[Array]:
            args = [*operands, *others]
            for i, x in zip(taking, taken, strict=True):
                args[i] = x
            return jax_compat.bind(equation.primitive, params, args)

        _, pull = jax.vjp(of_taking, *(operands[i] for i in taking))
        return list(pull([m]))
