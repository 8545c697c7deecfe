"""Rules for every linear operation: Zero, Epsilon and Flat.

They fit dense and convolution, sums, means, pooling and scales alike; rules that look
at weights are in ``kernel``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp

from jlrp.ir.program import Value
from jlrp.ops.base import Operation
from jlrp.ops.context import Context
from jlrp.ops.kinds.affine import AffineOp
from jlrp.ops.kinds.generic import SelectionOp
from jlrp.ops.kinds.linear import LinearOp, ReductionOp
from jlrp.promise import Parts, Promise, safe_divide, signed, zeros_like
from jlrp.rules.base import Array, Causes, Propagation, Rule, refuse
from jlrp.rules.bias import Shared, by_option
from jlrp.rules.ledger import summed
from jlrp.rules.padding import ones, padding_of
from jlrp.rules.reference import Difference, EpsilonDifference
from jlrp.rules.stopped import dead_part, divided


class _ByContribution(Rule):
    """``R_i = sum_j q_ij R_j / z_j``: shares by contribution to any linear operation.

    Relevance per unit of z is divided by nothing but a stabilised z, and goes through
    the transpose of the operation as a multiplier.
    """

    bias: str

    @property
    def _stabilizer(self) -> float:
        raise NotImplementedError

    def needs(self, op: Operation) -> tuple[Value, ...]:
        inputs = () if isinstance(op, LinearOp) else op.inputs
        return inputs + op.outputs

    def parts(self, op: Operation, r: Sequence[Parts]) -> Sequence[Parts]:
        return [Parts.MULTIPLIER] * len(op.inputs)

    def check(self, op: Operation) -> None:
        if not isinstance(op, LinearOp | SelectionOp):
            refuse(self, op, "it is not linear")

    def from_reference(self, op: Operation) -> Rule:
        return EpsilonDifference(self._stabilizer) if self._stabilizer else Difference()

    def propagate(
        self, op: Operation, r: Sequence[Promise | None], ctx: Context
    ) -> Propagation:
        of_outputs = [
            None if promise is None else self._shared(op, promise, ctx.read(out), ctx)
            for out, promise in zip(op.outputs, r, strict=True)
        ]
        s = [o and o.promise.over(o.z, self._stabilizer) for o in of_outputs]
        multipliers = op.vjp(s, ctx)

        def causes() -> Causes:
            pairs = zip(of_outputs, s, strict=True)
            found = [
                self._absorbed(op, o, m, ctx) for o, m in pairs if o and m is not None
            ]
            return summed(found)

        def without_offset(wanted: Sequence[Value]) -> Sequence[Array]:
            at_zero = ctx.replaced({v: zeros_like(ctx.read(v)) for v in op.inputs})
            whole = op.vjp_constants(s, wanted, ctx)
            offset = op.vjp_constants(s, wanted, at_zero)
            return [a - b for a, b in zip(whole, offset, strict=True)]

        constants = None if self.bias == "absorb" else without_offset
        promises = [Promise(multiplier=m) for m in multipliers]
        return Propagation(promises, causes, s, constants)

    def _shared(
        self, op: Operation, promise: Promise, z: Array, ctx: Context
    ) -> Shared:
        """Relevance of an output, and what it is shared by, after the bias's option."""
        if self.bias == "absorb" or not op.has_offset:
            return Shared(z, promise, None)
        return by_option(self.bias, z, promise, _offset(op, ctx), self._stabilizer)

    def _absorbed(self, op: Operation, of: Shared, s: Array, ctx: Context) -> Causes:
        """What constants and the stabiliser have of an output."""
        causes: Causes = {"stabilizer": s * signed(of.z, self._stabilizer)}
        value = of.promise.value
        if not self._stabilizer and value is not None:
            causes["blocked"] = jnp.where(of.z == 0, value, 0)
        if not op.has_offset:
            return causes
        if self.bias == "absorb":
            causes |= divided(s, _offset(op, ctx), op, ctx)
            if value is not None:  # at a mask's -inf the bias has all
                causes["bias"] += jnp.where(jnp.isinf(of.z), value, 0)
            return causes
        causes["bias"] = jnp.zeros_like(of.z) if of.lost is None else of.lost
        if op.stopped:
            dead = safe_divide(dead_part(op, ctx), _offset(op, ctx))
            causes["stopped"] = causes["bias"] * dead
            causes["bias"] = causes["bias"] - causes["stopped"]
        return causes


def _offset(op: Operation, ctx: Context) -> Array:
    assert isinstance(op, LinearOp)  # no other has one
    return op.offset(ctx)


@dataclass(frozen=True)
class Epsilon(_ByContribution):
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
class Zero(_ByContribution):
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

    def parts(self, op: Operation, r: Sequence[Parts]) -> Sequence[Parts]:
        return [Parts.VALUE] * len(op.inputs)

    def check(self, op: Operation) -> None:
        if not isinstance(op, AffineOp | ReductionOp):
            refuse(self, op, "it has no kernel and is no sum")

    def propagate(
        self, op: Operation, r: Sequence[Promise | None], ctx: Context
    ) -> Propagation:
        (promise,) = r
        assert promise is not None
        relevance = promise.resolve(ctx.read(op.outputs[0]))
        inputs = ones(padding_of(op.inputs[0]), relevance.dtype)
        if isinstance(op, AffineOp):
            kernel_map = op.kernel_map(ctx)
            kernel = jnp.ones_like(kernel_map.kernel)
            z = kernel_map.linear.apply(inputs, kernel)
            share = Promise(value=relevance).over(z, self.stabilizer)
            value = kernel_map.linear.transpose(kernel, share)
        else:
            (z,) = op.apply([inputs], ctx)
            share = Promise(value=relevance).over(z, self.stabilizer)
            (value,) = op.vjp([share], ctx)
        return Propagation(
            [Promise(value=value * inputs)],
            lambda: summed([{"stabilizer": share * signed(z, self.stabilizer)}]),
        )
