"""Linear operations: sums, means, scales, norms with their statistic held, movement."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jlrp.ir.primitives import traits
from jlrp.ops.base import Cotangents, Operation
from jlrp.ops.context import Context, widened, zeros
from jlrp.ops.transposes import direct_transpose
from jlrp.typing import Array


@dataclass(frozen=True, eq=False, repr=False)
class LinearOp(Operation):
    """Linear in all of its inputs together, but for what constants add."""

    @property
    def is_scale(self) -> bool:
        """Whether it only scales and shifts one value by constants."""
        return self.kind == "scale"

    def offset(self, ctx: Context) -> Array:
        """The output at inputs of zero: its bias."""
        (out,) = self.apply(zeros(self.inputs), ctx)
        return out

    def linear(self, x: Sequence[Array], ctx: Context) -> list[Array]:
        """The outputs for other inputs, without what constants add."""
        if not self.has_offset:
            return self.apply(x, ctx)
        at_zero = self.apply([jnp.zeros_like(v) for v in x], ctx)
        pairs = zip(self.apply(x, ctx), at_zero, strict=True)
        return [y - offset for y, offset in pairs]

    def transpose(self, cotangents: Cotangents, ctx: Context) -> list[Array]:
        """The transpose of the linear part."""
        direct = direct_transpose(self, cotangents, ctx)
        if direct is not None:
            return direct
        if not all(traits(e).transposes for e in self.equations):
            _, pull = jax.vjp(lambda *x: self.apply(x, ctx), *zeros(self.inputs))
            return list(pull(self.filled(cotangents)))
        # Zeros for the other outputs are not as good as nothing: JAX transposes no
        # solver whose residual or trip count has a cotangent.
        reached = [i for i, m in enumerate(cotangents) if m is not None]

        def outputs(*x: Array) -> list[Array]:
            found = self.apply(x, ctx)
            return [found[i] for i in reached]

        # What constants add is no concern of a transpose: jax drops it.
        pull = jax.linear_transpose(outputs, *map(widened, self.inputs))
        return list(pull([cotangents[i] for i in reached]))

    def vjp(self, cotangents: Cotangents, ctx: Context) -> list[Array]:
        return self.transpose(cotangents, ctx)


@dataclass(frozen=True, eq=False, repr=False)
class SumOp(LinearOp):
    """Several values added, each element of them by itself."""


@dataclass(frozen=True, eq=False, repr=False)
class ReductionOp(LinearOp):
    """A sum or mean of one value over axes or windows: its weights are positive."""

    @property
    def is_pooling(self) -> bool:
        """Over windows, of which there are several."""
        return self.kind == "avg_pool"


@dataclass(frozen=True, eq=False, repr=False)
class MovementOp(LinearOp):
    """Numbers put elsewhere, each unchanged: reshapes, slices, gathers, casts."""
