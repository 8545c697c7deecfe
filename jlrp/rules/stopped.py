"""Relevance absorbed by dead values: those that depend on x by a stopped path alone."""

from __future__ import annotations

import jax.numpy as jnp

from jlrp.ops.base import Operation
from jlrp.ops.context import Context
from jlrp.promise import product, zeros_like
from jlrp.rules.base import Array, Causes


def divided(share: Array, offset: Array, op: Operation, ctx: Context) -> Causes:
    """Relevance absorbed by an offset, ``share * offset``, by cause.

    An offset is the sum of parameters, cause ``bias``, and of dead values, cause
    ``stopped``; it is linear in both.
    """
    if not op.stopped:
        return {"bias": product(share, offset)}
    dead = dead_part(op, ctx)
    rest = product(share, offset - dead)
    return {"bias": rest, "stopped": product(share, dead)}


def dead_part(op: Operation, ctx: Context, marked: bool = False) -> Array:
    """What dead values add to the one output of an operation.

    Args:
      marked: ones in place of the dead values, which mark where they were moved to.
    """
    given = {v: ctx.read(v) for v in op.stopped}
    if marked:
        given = {v: jnp.ones_like(number) for v, number in given.items()}
    nothing = [zeros_like(ctx.read(v)) for v in op.inputs]
    (there,) = op.apply(nothing, ctx.replaced(given))
    none = {v: zeros_like(number) for v, number in given.items()}
    (without,) = op.apply(nothing, ctx.replaced(none))
    # Where a mask adds -inf both are -inf, and their difference is NaN.
    return jnp.where(there == without, 0, there - without)
