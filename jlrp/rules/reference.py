"""Relevance from a reference: every operation by its mean Jacobian.

Two points, x and x0. A multiplier is of ``D = v - v0``: ``R_v = D m``, so that the
relevance of x sums to f(x) - f(x0). With M the mean Jacobian of an operation, ``M D =
f(v) - f(v0)`` (see ``ops.means``), ``m' M`` goes on: constants and biases cancel,
nothing is absorbed, and swapping the points negates relevance.

What an operation reads beside its inputs may differ between the points too: what x
stopped at (``stop_gradient``, a rounding), or chose (a mask, an index). Then each
point's constants have half, and what their change made is the ledger's cause
``stopped`` or ``switch``, ``m (f(x; c) - f(x; c0) + f(x0; c) - f(x0; c0)) / 2``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType

import jax.numpy as jnp

from jlrp.errors import RuleError
from jlrp.ir.program import Value
from jlrp.ops.base import Operation
from jlrp.ops.context import Context
from jlrp.ops.kinds.activation import ActivationOp
from jlrp.ops.kinds.generic import FunctionOp, HomogeneousOp, SelectionOp
from jlrp.ops.kinds.linear import LinearOp
from jlrp.ops.kinds.product import ProductOp
from jlrp.ops.kinds.softmax import SoftmaxOp
from jlrp.ops.means import factors, line, linear, secant, weights, winners
from jlrp.promise import Parts, Promise, product, signed
from jlrp.rules.base import Array, Causes, Propagation, Rule, refuse
from jlrp.rules.ledger import summed

_MEANS: dict[type, ModuleType] = {
    ActivationOp: secant,
    FunctionOp: line,
    HomogeneousOp: line,
    LinearOp: linear,
    ProductOp: factors,
    SelectionOp: winners,
    SoftmaxOp: weights,
}


def means_of(op: Operation) -> ModuleType:
    """The file of ``ops.means`` that holds an operation's mean Jacobian."""
    return next(_MEANS[c] for c in type(op).mro() if c in _MEANS)


def has_means(op: Operation) -> bool:
    return any(issubclass(type(op), c) for c in _MEANS)


class OfChanges(Rule):
    """A rule that is relative to a reference by itself."""

    def needs(self, op: Operation) -> tuple[Value, ...]:
        return op.inputs + op.outputs

    def from_reference(self, op: Operation) -> Rule:
        return self


@dataclass(frozen=True)
class Difference(OfChanges):
    """The mean Jacobian: ``m_i = sum_j M_ji m_j`` with ``M D = f(x) - f(x0)``.

    The secant of an activation (DeepLIFT's Rescale), the matrix of a linear map, the
    Shapley values of a product, logarithmic means of softmax weights, cross-max. The
    rule of ``deep_lift``; it needs a ``baseline``. Sources: Shrikumar et al. 2017
    (arXiv 1704.02685); Lundberg and Lee 2017; Ancona et al. 2018 (arXiv 1711.06104).

    Args:
      gates: of products: ``"share"``; ``"hold"``: a gate is a constant, its mean at the
        two points, and what it would have got is the ledger's cause ``held``;
        ``"signal"``: all factors but a selective recurrence's signal are.
    """

    gates: str = "share"

    def __post_init__(self) -> None:
        if self.gates not in _SHARES:
            raise RuleError(
                f"gates is one of {', '.join(map(repr, _SHARES))}; got {self.gates!r}."
            )

    def __repr__(self) -> str:
        option = "" if self.gates == "share" else f"gates={self.gates!r}"
        return f"Difference({option})"

    def needs(self, op: Operation) -> tuple[Value, ...]:
        return means_of(op).reads(op)

    def parts(self, op: Operation, r: Sequence[Parts]) -> Sequence[Parts]:
        held = self._held(op)
        given = range(len(op.inputs))
        return [Parts.NONE if i in held else Parts.MULTIPLIER for i in given]

    def check(self, op: Operation) -> None:
        if not has_means(op):
            refuse(self, op, "it has no mean Jacobian")

    def is_exact(self, op: Operation) -> bool:
        means = means_of(op)
        if means is weights:
            return weights.is_exact(op)
        return means is not line or line.polynomial_degree(op) is not None

    def propagate(
        self, op: Operation, r: Sequence[Promise | None], ctx: Context
    ) -> Propagation:
        multipliers = multipliers_of(op, r, ctx)
        means, points = means_of(op), settings(self, op, ctx)
        cotangents = averaged([means.mean_vjp(op, multipliers, at) for at in points])
        held = self._held(op)

        def causes() -> Causes:
            lost: list[Causes] = [
                _times(1 / len(points), means.left_over(op, multipliers, at))
                for at in points
            ]
            lost.append(switched(op, multipliers, ctx))
            for i, name in held.items():
                amount = jnp.sum(product(cotangents[i], ctx.difference(op.inputs[i])))
                lost.append({name: amount})
            return summed(lost)

        promises = [
            None if i in held else Promise(multiplier=m)
            for i, m in enumerate(cotangents)
        ]
        return Propagation(
            promises, causes, multipliers, constants_of(op, multipliers, ctx)
        )

    def _held(self, op: Operation) -> dict[int, str]:
        """The inputs that are constants, and what their share is called."""
        if not isinstance(op, ProductOp):
            return {}
        share: tuple[float, ...] = getattr(op.product, _SHARES[self.gates])
        of_norm = any(op.product.denominators)
        cause = "statistic" if of_norm else "held"
        return {i: cause for i, weight in enumerate(share) if not weight}


_SHARES = {"share": "uniform", "hold": "gated", "signal": "selective"}


@dataclass(frozen=True)
class Taylor(OfChanges):
    """``R_i = D_i sum_j df_j/dx_i m_j``, the derivative at x: gradient x (x - x0).

    What ``Gradient`` is from a reference. The remainder ``f(x) - f(x0) - f'(x) D`` is
    absorbed.
    """

    def parts(self, op: Operation, r: Sequence[Parts]) -> Sequence[Parts]:
        return [Parts.MULTIPLIER] * len(op.inputs)

    def propagate(
        self, op: Operation, r: Sequence[Promise | None], ctx: Context
    ) -> Propagation:
        multipliers = multipliers_of(op, r, ctx)
        cotangents = op.vjp(multipliers, ctx)

        def causes() -> Causes:
            lost = jnp.zeros(())
            for v, m in zip(op.outputs, multipliers, strict=True):
                if m is not None:
                    lost = lost + jnp.sum(product(m, ctx.difference(v)))
            for v, m in zip(op.inputs, cotangents, strict=True):
                lost = lost - jnp.sum(product(m, ctx.difference(v)))
            return {"taylor": lost}

        promises = [Promise(multiplier=m) for m in cotangents]
        return Propagation(
            promises, causes, multipliers, constants_of(op, multipliers, ctx)
        )


@dataclass(frozen=True)
class EpsilonDifference(OfChanges):
    """``R_i = D_i sum_j w_ij m_j z_j / (z_j + epsilon sign(z_j))``, z the change of y.

    What ``Epsilon`` is from a reference, on any linear operation: the only rule there
    that absorbs, and little changes lose most.

    Args:
      epsilon: stabiliser of the change.
    """

    epsilon: float = 1e-6

    def parts(self, op: Operation, r: Sequence[Parts]) -> Sequence[Parts]:
        return [Parts.MULTIPLIER] * len(op.inputs)

    def propagate(
        self, op: Operation, r: Sequence[Promise | None], ctx: Context
    ) -> Propagation:
        multipliers = multipliers_of(op, r, ctx)
        shares = [
            None if m is None else Promise(multiplier=m).over(z, self.epsilon)
            for z, m in zip(map(ctx.difference, op.outputs), multipliers, strict=True)
        ]
        means, points = means_of(op), settings(self, op, ctx)
        cotangents = averaged([means.mean_vjp(op, shares, at) for at in points])

        def causes() -> Causes:
            lost = [switched(op, shares, ctx)]
            lost += [
                _times(1 / len(points), means.left_over(op, shares, at))
                for at in points
            ]
            for v, share in zip(op.outputs, shares, strict=True):
                if share is not None:
                    taken = share * signed(ctx.difference(v), self.epsilon)
                    lost.append({"stabilizer": taken})
            return summed(lost)

        promises = [Promise(multiplier=m) for m in cotangents]
        return Propagation(promises, causes, shares, constants_of(op, shares, ctx))


def multipliers_of(
    op: Operation, r: Sequence[Promise | None], ctx: Context
) -> list[Array | None]:
    """Relevance of the outputs, per unit of their differences."""
    found: list[Array | None] = []
    for v, promise in zip(op.outputs, r, strict=True):
        if promise is None or promise.value is None:
            found.append(promise and promise.multiplier)
        else:  # of a rule of the user's own
            found.append(promise.per_unit(ctx.difference(v)))
    return found


def settings(rule: Rule, op: Operation, ctx: Context) -> list[Context]:
    """Both points with the same constants: those of x, then those of the reference.

    One, if no constant depends on x. The outputs that go with the constants are there
    if the rule reads outputs.
    """
    outputs = not set(op.outputs).isdisjoint(rule.needs(op))
    return _settings(op, ctx, outputs)


def _settings(op: Operation, ctx: Context, outputs: bool) -> list[Context]:
    reference = ctx.reference
    varying = [v for v in op.effective_constants if ctx.varies(v)]
    if reference is None or not varying:
        return [ctx]
    here = {v: ctx.original(v) for v in varying}
    there = {v: reference.original(v) for v in varying}
    of_x, of_reference = ctx.replaced(there), reference.replaced(here)
    if outputs:
        of_x, of_reference = _computed(op, of_x), _computed(op, of_reference)
    return [ctx.with_reference(of_reference), of_x]


def _computed(op: Operation, ctx: Context) -> Context:
    """With the outputs that its constants make."""
    outs = op.apply([ctx.read(v) for v in op.inputs], ctx)
    return ctx.replaced(dict(zip(op.outputs, outs, strict=True)))


def switched(
    op: Operation, multipliers: Sequence[Array | None], ctx: Context
) -> Causes:
    """What the change of an operation's constants made of its outputs."""
    points = _settings(op, ctx, outputs=True)
    if len(points) == 1:
        return {}
    first, second = points
    assert ctx.reference is not None and first.reference is not None
    total = jnp.zeros(())
    for v, m in zip(op.outputs, multipliers, strict=True):
        if m is None:
            continue
        # x with its own constants, less x with the reference's; then of the reference.
        at_x = ctx.read(v) - second.read(v)
        at_reference = first.reference.read(v) - ctx.reference.read(v)
        total = total + jnp.sum(product(m, at_x) + product(m, at_reference)) / 2
    return {"stopped" if op.stopped else "switch": total}


def constants_of(
    op: Operation, multipliers: Sequence[Array | None], ctx: Context
) -> Callable[[Sequence[Value]], Sequence[Array]]:
    """Multipliers of parameters: the derivative by them of ``m (f(x) - f(x0))``.

    Of a dense layer ``m D'``, so that weights times multipliers sum to its relevance.
    """

    def found(wanted: Sequence[Value]) -> Sequence[Array]:
        assert ctx.reference is not None
        here = op.vjp_constants(multipliers, wanted, ctx)
        there = op.vjp_constants(multipliers, wanted, ctx.reference)
        return [a - b for a, b in zip(here, there, strict=True)]

    return found


def averaged(cotangents: list[list[Array]]) -> list[Array]:
    if len(cotangents) == 1:
        return cotangents[0]
    return [(a + b) / 2 for a, b in zip(*cotangents, strict=True)]


def _times(factor: float, causes: Causes) -> Causes:
    return {name: factor * amount for name, amount in causes.items()}
