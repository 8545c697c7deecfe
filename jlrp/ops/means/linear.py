"""Linear maps and movement: the map itself; what constants add cancels."""

from __future__ import annotations

import jax.numpy as jnp

from jlrp.ir.families import rounds
from jlrp.ir.program import Value
from jlrp.ops.base import Cotangents, Operation
from jlrp.ops.context import Context
from jlrp.promise import product
from jlrp.typing import Array


def reads(op: Operation) -> tuple[Value, ...]:
    return ()


def mean_vjp(op: Operation, cotangents: Cotangents, points: Context) -> list[Array]:
    return op.vjp(cotangents, points)


def left_over(
    op: Operation, cotangents: Cotangents, points: Context
) -> dict[str, Array]:
    """What a cast to a few digits (float8) takes of the difference."""
    if not rounds(op.equations[0]):
        return {}
    (m,), (x,), (y,) = cotangents, op.inputs, op.outputs
    if m is None:
        return {}
    lost = points.difference(y) - points.difference(x).astype(m.dtype)
    return {"rounding": jnp.sum(product(m, lost))}
