"""Numbers that wait: made no sooner than what arrives.

XLA's scheduler for CPUs starts whatever can start. All that the reverse pass makes of
parameters alone, kernels of positive weights, kernels turned around for a transpose, it
would make at once, before the forward pass, and hold until it is needed. So they get a
data dependency on the relevance that arrives: on ResNet-50 z+ then takes two fifths of
the memory (docs/benchmarks.md). Rejected: ``lax.optimization_barrier``, which XLA's
pipelines for CPUs take away before they schedule (jax 0.10), or which keeps what is
behind it from being fused (0.12). Other schedulers look at memory by themselves: there
nothing is added.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

Array = jax.Array

never_p = Primitive("never")
never_p.def_impl(lambda arrived: np.False_)
never_p.def_abstract_eval(
    lambda arrived: jax.core.ShapedArray((), np.dtype(bool))  # type: ignore[attr]
)


def _unseen(arrived: Array) -> Array:
    """False, but the compiler does not know it: whether a number is NaN and is not."""
    first = lax.slice(arrived, [0] * arrived.ndim, [1] * arrived.ndim)
    first = lax.reshape(first, ())
    return lax.bitwise_and(lax.ne(first, first), lax.eq(first, first))


mlir.register_lowering(
    never_p,
    mlir.lower_fun(lambda arrived: lax.full((), False), multiple_results=False),
)
mlir.register_lowering(
    never_p, mlir.lower_fun(_unseen, multiple_results=False), platform="cpu"
)


def _batched(args: Sequence[Any], axes: Sequence[Any]) -> tuple[Any, Any]:
    """One for the whole batch: what waits is not made for each example apart."""
    (arrived,), (axis,) = args, axes
    first = lax.index_in_dim(arrived, 0, axis, keepdims=False)
    return never_p.bind(first), None  # an axis: none


batching.primitive_batchers[never_p] = _batched
ad.primitive_jvps[never_p] = lambda primals, tangents: (
    never_p.bind(*primals),
    ad.Zero(jax.core.ShapedArray((), jax.dtypes.float0)),  # type: ignore[attr]
)


def waiting_for(arrived: Array | None, number: Array) -> Array:
    """The number, made no sooner than ``arrived``, of whatever shape, is there."""
    if arrived is None or arrived.size == 0:
        return number
    return lax.select(never_p.bind(arrived), lax.full_like(number, 0), number)
