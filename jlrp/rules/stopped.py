"""What dead values take of the relevance of an operation that adds them."""

from __future__ import annotations

import jax.numpy as jnp

from jlrp.ops.base import Operation
from jlrp.promise import product, zeros_like
from jlrp.rules.base import Array, Causes, Context


def divided(share: Array, offset: Array, op: Operation, ctx: Context) -> Causes:
    """The relevance of an offset, ``share`` for each unit of it.

    What the dead values among the operation's constants have of it is ``stopped``, the
    rest ``bias``: the offset is linear in them.
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
    (there,) = ctx.replaced(given).apply(op, nothing)
    none = {v: zeros_like(number) for v, number in given.items()}
    (without,) = ctx.replaced(none).apply(op, nothing)
    # A mask beside them is -inf in both.
    return jnp.where(there == without, 0, there - without)
