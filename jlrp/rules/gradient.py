"""First-order Taylor, and stopping: the rules that fit every operation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import jax.numpy as jnp
from jax import lax
from jax.extend.core.primitives import custom_vjp_call_p, while_p

from jlrp.ir.primitives import names_where, traits
from jlrp.ir.program import Value
from jlrp.ops.activation import to_start
from jlrp.ops.base import Operation
from jlrp.ops.context import Context
from jlrp.ops.kinds.activation import ActivationOp
from jlrp.ops.kinds.embedding import EmbeddingOp
from jlrp.ops.kinds.generic import FunctionOp
from jlrp.ops.kinds.product import ProductOp
from jlrp.ops.kinds.softmax import SoftmaxOp
from jlrp.promise import Parts, Promise, product, unless_zero
from jlrp.rules.base import Array, Causes, Propagation, Rule, refuse
from jlrp.rules.reference import Taylor
from jlrp.rules.stopped import dead_part


@dataclass(frozen=True)
class Gradient(Rule):
    """First-order Taylor: ``R_i = x_i sum_j df_j/dx_i R_j / y_j``, multipliers by vjp.

    The remainder ``f(x) - f'(x) x`` is absorbed, like a bias. On every operation it
    makes gradient x input. Sources: AttnLRP (arXiv 2402.05602), section 3.3; Shrikumar
    2016.
    """

    def needs(self, op: Operation) -> tuple[Value, ...]:
        return op.inputs + op.outputs

    def parts(self, op: Operation, r: Sequence[Parts]) -> Sequence[Parts]:
        return [Parts.MULTIPLIER] * len(op.inputs)

    def check(self, op: Operation) -> None:
        if isinstance(op, EmbeddingOp):
            refuse(self, op, "integers have no gradient")
        if op.primitive is while_p:
            refuse(self, op, "JAX has no reverse derivative of a while_loop")

    def propagate(
        self, op: Operation, r: Sequence[Promise | None], ctx: Context
    ) -> Propagation:
        multipliers: list[Array | None] = []
        for out, promise in zip(op.outputs, r, strict=True):
            multipliers.append(promise and promise.per_unit(ctx.read(out)))
        cotangents = op.vjp(multipliers, ctx)
        # Of 1/y, R / y is minus the derivative by y: what divides has that sign.
        region = op.region if isinstance(op, ActivationOp) else None
        inverted = region is not None and region.inverted
        cotangents = [
            lax.neg(m) if inverted != divides else m
            for m, divides in zip(cotangents, _reciprocals(op), strict=True)
        ]
        if region is not None and region.may_miss:
            back = to_start(region.layout, cotangents[0].shape)
            pairs = zip(cotangents, multipliers, strict=True)
            cotangents = [unless_zero(c, back(m)) for c, m in pairs if m is not None]

        if op.primitive is custom_vjp_call_p:  # it has no forward derivative
            return self._of_backward(op, r, multipliers, cotangents, ctx)

        def causes() -> Causes:
            nothing = jnp.asarray(0, jnp.real(ctx.read(op.outputs[0])).dtype)
            total = blocked = stopped = nothing
            linear = op.jvp(ctx, _tangents(op, ctx, _reciprocals(op)))
            for out, promise, m, j in zip(
                op.outputs, r, multipliers, linear, strict=True
            ):
                if promise is None or m is None:
                    continue
                y = ctx.read(out)
                j = -j if inverted else j
                remainder = jnp.real(jnp.where(m == 0, 0, y - j) * m)
                total = total + jnp.sum(remainder)
                if op.stopped:
                    stopped = stopped + jnp.sum(product(m, dead_part(op, ctx)))
                if promise.value is not None:
                    blocked = blocked + jnp.sum(jnp.where(y == 0, promise.value, 0))
            causes = {"taylor": total - stopped, "blocked": blocked}
            return causes | {"stopped": stopped} if op.stopped else causes

        return Propagation(
            [Promise(multiplier=m) for m in cotangents], causes, multipliers
        )

    def _of_backward(
        self,
        op: Operation,
        r: Sequence[Promise | None],
        multipliers: Sequence[Array | None],
        cotangents: Sequence[Array],
        ctx: Context,
    ) -> Propagation:
        """The remainder is what the user's derivative leaves over."""

        def causes() -> Causes:
            r_out = sum(
                jnp.sum(promise.resolve(ctx.read(out)))
                for out, promise in zip(op.outputs, r, strict=True)
                if promise is not None
            )
            r_in = sum(
                jnp.sum(product(m, ctx.read(v)))
                for v, m in zip(op.inputs, cotangents, strict=True)
            )
            return {"taylor": jnp.asarray(r_out - r_in)}

        return Propagation(
            [Promise(multiplier=m) for m in cotangents], causes, multipliers
        )

    def from_reference(self, op: Operation) -> Rule:
        return Taylor()

    def is_exact(self, op: Operation) -> bool:
        if isinstance(op, SoftmaxOp):
            return True
        if traits(op).has_derivative:
            return not op.equations[-1].holds(names_where(lambda row: row.kernel))
        if isinstance(op, FunctionOp):  # the table of primitives says so
            family = traits(op).family
            return family is not None and family.exact
        return isinstance(op, ActivationOp) and not op.passes


def _reciprocals(op: Operation) -> tuple[bool, ...]:
    """The inputs of which the relevance is that of one over them."""
    marked = op.product.reciprocal if isinstance(op, ProductOp) else ()
    return marked or (False,) * len(op.inputs)


def _tangents(
    op: Operation, ctx: Context, reciprocals: tuple[bool, ...]
) -> Sequence[Array] | None:
    """Where not the inputs themselves: zeros for what is infinite, since by a masked
    score the derivative is 0; minus what divides and is read as one over it."""
    masked = isinstance(op, ActivationOp | SoftmaxOp)
    if not masked and not any(reciprocals):
        return None
    x = [ctx.read(v) for v in op.inputs]
    if masked:
        x = [jnp.where(jnp.isfinite(v), v, 0) for v in x]
    return [-v if divides else v for v, divides in zip(x, reciprocals, strict=True)]


@dataclass(frozen=True)
class Stop(Rule):
    """No relevance goes on; the ledger shows it as blocked."""

    def needs(self, op: Operation) -> tuple[Value, ...]:
        return ()

    def parts(self, op: Operation, r: Sequence[Parts]) -> Sequence[Parts]:
        return [Parts.NONE] * len(op.inputs)

    def from_reference(self, op: Operation) -> Rule:
        return self

    def propagate(
        self, op: Operation, r: Sequence[Promise | None], ctx: Context
    ) -> Propagation:
        def causes() -> Causes:
            resolved = [
                jnp.sum(promise.resolve(ctx.difference(out)))
                for out, promise in zip(op.outputs, r, strict=True)
                if promise is not None
            ]
            return {"blocked": jnp.sum(jnp.stack(resolved))}

        return Propagation([None] * len(op.inputs), causes)
