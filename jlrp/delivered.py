"""What a reverse pass delivered, and what follows from it: relevance at names,
multipliers of parameters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jlrp.ir import jax_compat
from jlrp.ir.program import Equation, Value, computing, evaluate
from jlrp.ops.base import Operation
from jlrp.ops.captures import Captured, Entry
from jlrp.ops.context import Context, widened
from jlrp.ops.kinds.activation import ActivationOp
from jlrp.plan.planning import Plan, is_float
from jlrp.promise import Promise
from jlrp.rules.base import Propagation
from jlrp.typing import PyTree

Array = jax.Array


@dataclass(frozen=True)
class Delivered:
    """The promises that the reverse pass delivered.

    Attributes:
      sources: one for each source of the program.
      captured: those of the captured values, when all their consumers had added.
      parameters: multipliers of the parameters' values that were asked for.
      inside: by loop or branch and by its body, what was captured in it.
    """

    sources: list[Promise | None]
    captured: dict[Value, Promise]
    parameters: dict[Value, Array]
    inside: dict[Equation, Mapping[int, Captured]]


def captured(plan: Plan, delivered: Delivered, ctx: Context) -> Captured:
    """The relevance that was asked for by name, zeros where there is none."""

    def one(name: str, entry: Entry) -> PyTree:
        if entry.like is None:
            return ()
        if entry.value is not None:
            return resolved(entry.value, delivered.captured.get(entry.value), ctx)
        of_loop = {} if entry.loop is None else delivered.inside.get(entry.loop, {})
        rows = jnp.zeros(entry.like.shape, entry.like.dtype)
        if entry.body in of_loop:
            rows = of_loop[entry.body][name][entry.index]
        moves = entry.carry is not None and entry.loop is not None
        return moved_on(rows, entry) if moves else rows

    def moved_on(rows: Array, entry: Entry) -> Array:
        """Of a carry: what each iteration made as what the next got of it."""
        start = jnp.zeros(rows.shape[1:], rows.dtype)
        if entry.start is not None:
            promise = delivered.captured.get(entry.start)
            start = resolved(entry.start, promise, ctx).astype(rows.dtype)
        if not len(rows):
            return rows
        if entry.backwards:
            return jnp.concatenate([rows[1:], start[None]])
        return jnp.concatenate([start[None], rows[:-1]])

    return {name: [one(name, e) for e in es] for name, es in plan.captured.items()}


def resolved(value: Value, promise: Promise | None, ctx: Context) -> PyTree:
    """The relevance of a value; random keys have none, not even zeros."""
    if jax_compat.is_key(value.dtype):
        return ()
    if promise is None:
        dtype = widened(value).dtype
        dtype = dtype if is_float(value) else jnp.float32
        return jnp.zeros(value.shape, dtype).real
    return promise.resolve(ctx.difference(value))


def to_inputs(
    plan: Plan,
    delivered: Delivered,
    inputs: Sequence[Value],
    given: Mapping[Value, Array],
) -> Sequence[Array]:
    """Multipliers of inputs, by the chain rule from those of what is made of them."""
    wanted, constants = delivered.parameters, plan.program.constants
    equations, starts = computing(plan.program, wanted, plan.parameters.__contains__)
    read = [v for v in inputs if v in starts]

    def values(*numbers: Array) -> list[Array]:
        env = {**constants, **given, **dict(zip(read, numbers, strict=True))}
        evaluate(equations, env, lambda e: jax_compat.widened(e.params))
        return [env[v] for v in wanted]

    _, pull = jax.vjp(values, *(jax_compat.at_least_float32(given[v]) for v in read))
    found = dict(zip(read, pull(list(wanted.values())), strict=True))
    zeros = {v: jnp.zeros(v.shape, v.dtype) for v in inputs if v not in found}
    return [
        found[v] if v in found else jax_compat.at_least_float32(zeros[v])
        for v in inputs
    ]


def of_constants(
    op: Operation,
    r_out: Sequence[Promise | None],
    propagation: Propagation,
    ctx: Context,
    wanted: Sequence[Value],
) -> Sequence[Array]:
    """The multipliers of some constants of an operation."""
    if not wanted:
        return []
    if propagation.constants is not None:
        return propagation.constants(wanted)
    shares = propagation.shares
    if shares is None:
        shares = [
            promise and promise.per_unit(ctx.difference(out))
            for out, promise in zip(op.outputs, r_out, strict=True)
        ]
    multipliers = op.vjp_constants(shares, wanted, ctx)
    if isinstance(op, ActivationOp) and op.region.inverted:  # R / y is that of 1/y
        multipliers = [-m for m in multipliers]
    return multipliers
