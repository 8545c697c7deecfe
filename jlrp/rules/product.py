"""Rules for products and quotients of several active values.

A product is homogeneous of degree 1 in each operand, so Euler shares its relevance
among them; how much each gets is what the rules differ in. A quotient is a product with
1/b.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp
from jax import lax

from jlrp.ir.program import Value
from jlrp.ops.base import Operation
from jlrp.ops.context import Context
from jlrp.ops.kinds.linear import LinearOp, ReductionOp, SumOp
from jlrp.ops.kinds.product import ProductOp
from jlrp.promise import Parts, Promise, is_complex, number, safe_divide, signed
from jlrp.rules.base import Array, Causes, Propagation, Rule, refuse
from jlrp.rules.ledger import summed
from jlrp.rules.reference import Difference


@dataclass(frozen=True)
class _ProductRule(Rule):
    stabilizer: float = 0.0

    def needs(self, op: Operation) -> tuple[Value, ...]:
        return op.inputs + op.outputs

    def parts(self, op: Operation, r: Sequence[Parts]) -> Sequence[Parts]:
        assert isinstance(op, ProductOp)
        weights = self._weights(op)
        return [Parts.MULTIPLIER if weight else Parts.NONE for weight in weights]

    def check(self, op: Operation) -> None:
        if not isinstance(op, ProductOp):
            refuse(self, op, "it is not a product of several active values")

    def from_reference(self, op: Operation) -> Rule:
        return Difference(self._gates)

    _gates: ClassVar[str] = "share"  # of ``Difference``, which replaces the rule

    def _weights(self, op: ProductOp) -> tuple[float, ...]:
        raise NotImplementedError

    def propagate(
        self, op: Operation, r: Sequence[Promise | None], ctx: Context
    ) -> Propagation:
        (promise,) = r
        assert promise is not None and isinstance(op, ProductOp)
        y = ctx.read(op.outputs[0])
        m = promise.over(y, self.stabilizer)
        operands = [
            _without_nan(ctx.read(v)) if masked else ctx.read(v)
            for v, masked in zip(op.inputs, op.product.masked, strict=True)
        ]
        weights = self._weights(op)
        taking = [i for i, weight in enumerate(weights) if weight]

        promises: list[Promise | None] = [None] * len(operands)
        cotangents = op.factor_vjp(m, operands, taking, ctx)
        for i, cotangent in zip(taking, cotangents, strict=True):
            inverse = op.divides and i == 1
            weight = -weights[i] if inverse else weights[i]
            if weight != 1:
                cotangent = lax.mul(cotangent, number(m, weight))
            promises[i] = Promise(multiplier=cotangent)

        def causes() -> Causes:
            lost = {"stabilizer": m * signed(y, self.stabilizer)}
            if not self.stabilizer and promise.value is not None:
                lost["blocked"] = jnp.where(y == 0, promise.value, 0)
            if sum(weights) != 1:  # a part of an average
                lost["taylor"] = m * y * (1 - sum(weights))
            return summed([lost])

        return Propagation(promises, causes)


def _without_nan(weights: Array) -> Array:
    """Softmax weights of a row in which all is masked are no numbers: zeros instead.

    Such a row has no relevance, but would spoil the multipliers of the values, which
    other rows read too.
    """
    return jnp.where(jnp.isnan(weights), 0, weights)


@dataclass(frozen=True)
class Uniform(_ProductRule):
    """Each of N factors gets R/N, whatever the association of the product.

    Sources: AttnLRP (arXiv 2402.05602), eq. 7; the half rule of MambaLRP for gates.

    Args:
      stabilizer: added to the product with its sign where R is divided by it.
    """

    def _weights(self, op: ProductOp) -> tuple[float, ...]:
        return op.product.uniform


@dataclass(frozen=True)
class Gate(_ProductRule):
    """The signal gets all of R, the gate none; with no or several gates: Uniform.

    A gate ends in a sigmoid-like function or softmax, else in an activation. Sources:
    Arras et al. 2017 for LSTM gates; CP-LRP (Ali et al. 2022).

    Args:
      stabilizer: added to the product with its sign where R is divided by it.
    """

    _gates: ClassVar[str] = "hold"

    def _weights(self, op: ProductOp) -> tuple[float, ...]:
        return op.product.gated


@dataclass(frozen=True)
class Selective(_ProductRule):
    """All to the factor that the others are learned maps of; with none: Uniform.

    Makes a selective state-space model linear in its signal: step sizes, input and
    read-out matrices are constants, gates by another path get their half. Source:
    MambaLRP (arXiv 2406.07592). For composites with ``find_signals=True``.

    Args:
      stabilizer: added to the product with its sign where R is divided by it.
    """

    _gates: ClassVar[str] = "signal"

    def _weights(self, op: ProductOp) -> tuple[float, ...]:
        return op.product.selective


@dataclass(frozen=True)
class Absolute(Rule):
    """Shares by absolute value: ``|a_k| / (sum_k |a_k| + stabilizer) R``.

    For sums, means and products (a quotient: ``|a| : |1/b|``); constants get none.
    Sources: DynamicLRP (arXiv 2512.07010); Otsuki et al. 2024 for residual sums.

    Args:
      stabilizer: added to the sum of absolute values.
    """

    stabilizer: float = 1e-11

    def needs(self, op: Operation) -> tuple[Value, ...]:
        return op.inputs + op.outputs

    def parts(self, op: Operation, r: Sequence[Parts]) -> Sequence[Parts]:
        return [Parts.VALUE] * len(op.inputs)

    def check(self, op: Operation) -> None:
        if not isinstance(op, ProductOp | SumOp | ReductionOp):
            refuse(self, op, "it is neither a sum nor a product of active values")
        if is_complex(op.outputs[0]):
            refuse(self, op, "complex numbers have no sign to compare")
        if isinstance(op, ProductOp) and not op.is_elementwise:
            refuse(self, op, "a contraction has no elementwise factors to compare")

    def propagate(
        self, op: Operation, r: Sequence[Promise | None], ctx: Context
    ) -> Propagation:
        (promise,) = r
        assert promise is not None
        relevance = promise.resolve(ctx.read(op.outputs[0]))
        if isinstance(op, ProductOp):
            return self._of_product(op, relevance, ctx)
        assert isinstance(op, LinearOp)
        return self._of_sum(op, relevance, ctx)

    def _of_sum(self, op: LinearOp, relevance: Array, ctx: Context) -> Propagation:
        x = [ctx.read(v) for v in op.inputs]
        if len(x) == 1:  # a sum over axes or windows: its weights are not negative
            total = op.linear([jnp.abs(x[0])], ctx)[0]
            s = safe_divide(relevance, total + self.stabilizer)
            (share,) = op.transpose([s], ctx)
            promises = [Promise(value=jnp.abs(x[0]) * share)]
        else:
            parts = [
                op.linear(
                    [v if i == k else jnp.zeros_like(v) for k, v in enumerate(x)], ctx
                )
                for i in range(len(x))
            ]
            sizes = [jnp.abs(part) for (part,) in parts]
            total = jnp.sum(jnp.stack(sizes), 0)
            s = safe_divide(relevance, total + self.stabilizer)
            promises = []
            for i, (part,) in enumerate(parts):
                share = op.transpose([jnp.sign(part) * s], ctx)[i]
                promises.append(Promise(value=x[i] * share))
        return Propagation(
            promises, lambda: _lost(s, self.stabilizer, total, relevance)
        )

    def _of_product(self, op: ProductOp, relevance: Array, ctx: Context) -> Propagation:
        a, b = (ctx.read(v) for v in op.inputs)
        size_a = jnp.abs(a)
        size_b = safe_divide(jnp.ones_like(b), jnp.abs(b))
        size_b = size_b if op.divides else jnp.abs(b)
        total = size_a + size_b
        s = safe_divide(relevance, total + self.stabilizer)
        promises = [
            Promise(value=_summed_to(size_a * s, a.shape)),
            Promise(value=_summed_to(size_b * s, b.shape)),
        ]
        return Propagation(
            promises, lambda: _lost(s, self.stabilizer, total, relevance)
        )


def _lost(s: Array, stabilizer: float, total: Array, relevance: Array) -> Causes:
    blocked = jnp.where(total + stabilizer == 0, relevance, 0)
    return {"stabilizer": jnp.sum(s * stabilizer), "blocked": jnp.sum(blocked)}


def _summed_to(array: Array, shape: tuple[int, ...]) -> Array:
    """Sum over the axes along which an operand of size 1 was broadcast."""
    axes = tuple(
        i for i, (n, m) in enumerate(zip(array.shape, shape, strict=True)) if n != m
    )
    return jnp.sum(array, axes, keepdims=True) if axes else array
