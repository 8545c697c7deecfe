"""Rules for every linear operation: Zero, Epsilon and Flat.

They fit dense and convolution, sums, means, pooling and scales alike; rules that look
at weights are in ``kernel``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
from jax import lax

from jlrp.ir.program import Value
from jlrp.ops.base import Operation
from jlrp.promise import Promise, safe_divide, signed, zeros_like
from jlrp.rules.base import Array, Causes, Context, Propagation, Rule, refuse
from jlrp.rules.padding import ones, padding_of
from jlrp.rules.reference import Difference, EpsilonDifference
from jlrp.rules.stopped import dead_part, divided


class _LinearRule(Rule):
    """Shares by contribution to any linear operation: the logic of Zero and Epsilon."""

    bias: str

    @property
    def _stabilizer(self) -> float:
        raise NotImplementedError

    def needs(self, op: Operation) -> tuple[Value, ...]:
        inputs = () if op.nature in ("linear", "movement") else op.inputs
        return inputs + op.outputs

    def check(self, op: Operation) -> None:
        if op.nature not in ("linear", "movement", "selection"):
            refuse(self, op, "it is not linear")

    def from_reference(self, op: Operation) -> Rule:
        return EpsilonDifference(self._stabilizer) if self._stabilizer else Difference()

    def propagate(
        self, op: Operation, r: Sequence[Promise | None], ctx: Context
    ) -> Propagation:
        shares: list[Array | None] = []
        causes: list[Callable[[], Causes]] = []
        for out, promise in zip(op.outputs, r, strict=True):
            if promise is None:
                shares.append(None)
                continue
            share, absorbed = self._share(op, promise, ctx.read(out), ctx)
            shares.append(share)
            causes.append(absorbed)
        cotangents = ctx.vjp(op, shares)

        def without_offset(wanted: Sequence[Value]) -> Sequence[Array]:
            at_zero = ctx.replaced({v: zeros_like(ctx.read(v)) for v in op.inputs})
            whole = ctx.vjp_constants(op, shares, wanted)
            offset = at_zero.vjp_constants(op, shares, wanted)
            return [a - b for a, b in zip(whole, offset, strict=True)]

        return Propagation(
            [Promise(multiplier=m) for m in cotangents],
            lambda: summed([absorbed() for absorbed in causes]),
            shares,
            None if self.bias == "absorb" else without_offset,
        )

    def _share(
        self, op: Operation, promise: Promise, z: Array, ctx: Context
    ) -> tuple[Array, Callable[[], Causes]]:
        """Relevance per unit of output, and what the output's constants absorb."""
        stabilizer = self._stabilizer
        if self.bias == "absorb" or not op.has_offset:
            share = promise.over(z, stabilizer)

            def absorbed() -> Causes:
                causes = {"stabilizer": share * signed(z, stabilizer)}
                if op.has_offset:
                    causes |= divided(share, ctx.offset(op), op, ctx)
                    if promise.value is not None:  # at a mask's -inf the bias has all
                        infinite = jnp.isinf(z)
                        causes["bias"] += jnp.where(infinite, promise.value, 0)
                if not stabilizer and promise.value is not None:
                    causes["blocked"] = jnp.where(z == 0, promise.value, 0)
                return causes

            return share, absorbed
        b = ctx.offset(op)
        z0 = without(z, b)
        relevance = promise.resolve(z)
        lost = jnp.zeros_like(relevance)
        if self.bias == "split":
            lost = relevance * bias_fraction(z0, b, stabilizer)
            relevance = relevance - lost
        share = Promise(value=relevance).over(z0, stabilizer)

        def ignored() -> Causes:
            causes = {"bias": lost, "stabilizer": share * signed(z0, stabilizer)}
            if op.stopped:
                causes["stopped"] = lost * safe_divide(dead_part(op, ctx), b)
                causes["bias"] = lost - causes["stopped"]
            if not stabilizer:
                causes["blocked"] = jnp.where(z0 == 0, relevance, 0)
            return causes

        return share, ignored


@dataclass(frozen=True)
class Epsilon(_LinearRule):
    """LRP-epsilon: ``R_i = sum_j x_i w_ij / (z_j + epsilon sign(z_j)) R_j``.

    Source: Bach et al. 2015, eq. 58. On sums and average pooling it is Zennit's
    ``Norm``.

    Args:
      epsilon: stabiliser of the denominator; 0 divides nowhere (LRP-0).
      bias: ``"absorb"``: the bias takes its share of ``z``; ``"ignore"``: it is taken
        as zero; ``"split"``: relevance is first shared between ``W x`` and ``b`` by
        absolute value, then by the rule without bias (DynamicLRP).

    Example:
      >>> import jlrp
      >>> composite = jlrp.Composite([("dense", jlrp.rules.Epsilon(1e-6))])
    """

    epsilon: float = 1e-6
    bias: str = "absorb"

    @property
    def _stabilizer(self) -> float:
        return self.epsilon


@dataclass(frozen=True)
class Zero(_LinearRule):
    """LRP-0: ``R_i = sum_j x_i w_ij / z_j R_j``, the basic rule, with no stabiliser.

    Source: Bach et al. 2015, eq. 56. A multiplier goes through the transpose, as a
    cotangent does, and nothing is divided; relevance that is a value is divided by z,
    and is 0 where z is.

    Args:
      bias: as in ``Epsilon``.
    """

    bias: str = "absorb"

    @property
    def _stabilizer(self) -> float:
        return 0.0


@dataclass(frozen=True)
class Flat(Rule):
    """Equal shares: ``R_j / (number of inputs that j sees)``; padding is not an input.

    On sums, means and average pooling: by their weights, whatever the inputs.
    Source: Lapuschkin et al. 2019.

    Args:
      stabilizer: added to denominators with their sign.
    """

    _why_no_reference: ClassVar[str] = (
        "it gives relevance to inputs that are the same at both points"
    )
    stabilizer: float = 1e-6

    def needs(self, op: Operation) -> tuple[Value, ...]:
        return op.outputs

    def check(self, op: Operation) -> None:
        if op.affine is None and op.kind not in ("sum", "mean", "avg_pool"):
            refuse(self, op, "it has no kernel and is no sum")

    def propagate(
        self, op: Operation, r: Sequence[Promise | None], ctx: Context
    ) -> Propagation:
        (promise,) = r
        assert promise is not None
        relevance = promise.resolve(ctx.read(op.outputs[0]))
        inputs = ones(padding_of(op.inputs[0]), relevance.dtype)
        if op.affine is not None:
            kernel_map = ctx.kernel_map(op)
            kernel = jnp.ones_like(kernel_map.kernel)
            z = kernel_map.linear.apply(inputs, kernel)
            share = Promise(value=relevance).over(z, self.stabilizer)
            value = kernel_map.linear.transpose(kernel, share)
        else:
            (z,) = ctx.apply(op, [inputs])
            share = Promise(value=relevance).over(z, self.stabilizer)
            (value,) = ctx.transpose(op, [share])
        return Propagation(
            [Promise(value=value * inputs)],
            lambda: summed([{"stabilizer": share * signed(z, self.stabilizer)}]),
        )


def without(z: Array, bias: Array) -> Array:
    """``z - bias``; 0 at a mask's -inf, where nothing comes from the inputs."""
    masked = lax.eq(lax.abs(bias), np.asarray(np.inf, jnp.finfo(bias.dtype).dtype))
    zeros = zeros_like(z)
    kept, shift = lax.select(masked, zeros, z), lax.select(masked, zeros, bias)
    return lax.sub(kept, shift)


def bias_fraction(z0: Array, b: Array, stabilizer: float) -> Array:
    """The part of relevance that is not ``|z0| / (|z0| + |b| + stabilizer)``."""
    size = jnp.minimum(jnp.abs(z0), jnp.finfo(z0.dtype).max / 4)
    total = size + jnp.abs(b) + stabilizer
    return 1 - safe_divide(size, total)


def summed(causes: Sequence[Causes]) -> Causes:
    totals: Causes = {}
    for cause in causes:
        for name, amount in cause.items():
            amount = jnp.real(jnp.sum(amount))
            totals[name] = totals[name] + amount if name in totals else amount
    return totals
