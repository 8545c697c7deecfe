"""Control dependencies on relevance.

XLA's scheduler for CPUs starts whatever can start. All that the reverse pass makes of
parameters alone, kernels of positive weights, kernels turned around for a transpose, it
would make at once, before the forward pass, and hold until it is used. So they get a
data dependency on the relevance of the layer: on ResNet-50 z+ then takes two fifths of
the memory. Rejected: ``lax.optimization_barrier``, which XLA's pipelines for CPUs take
away before they schedule (jax 0.10), or which keeps what is behind it from being fused
(0.12). Other schedulers look at memory by themselves: there nothing is added.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from jlrp.tactics import enabled
from jlrp.typing import Array

depend_p = Primitive("depend")
depend_p.def_impl(lambda after, value: value)
depend_p.def_abstract_eval(lambda after, value: value)


def _first(after: Array) -> Array:
    return lax.slice(after, [0] * after.ndim, [1] * after.ndim)


def _held_back(after: Array, value: Array) -> Array:
    """The value, chosen by a comparison whose outcome the compiler does not know.

    A tanh is nowhere above 2. To XLA it is too costly to be computed at each element,
    so it stays a program of its own: a cheap one would be written, with all that
    ``after`` is made of, into whatever is made of the value.
    """
    first = lax.reshape(_first(after), ())
    bounded = lax.tanh(lax.real(first) if jnp.iscomplexobj(first) else first)
    never = lax.gt(lax.broadcast(bounded, value.shape), np.asarray(2, bounded.dtype))
    return lax.select(never, lax.full_like(value, 0), value)


mlir.register_lowering(depend_p, lambda ctx, after, value: [value])
mlir.register_lowering(
    depend_p, mlir.lower_fun(_held_back, multiple_results=False), platform="cpu"
)


def _batched(
    args: Sequence[Array], axes: Sequence[int | None]
) -> tuple[Array, int | None]:
    """A value without a batch depends on the first of the batch, and stays one."""
    (after, value), (axis, of_number) = args, axes
    if axis is not None:
        after = lax.index_in_dim(after, 0, axis, keepdims=False)
    return depend_p.bind(after, value), of_number


def _jvp(primals: Sequence[Array], tangents: Sequence[Array]) -> tuple[Array, Array]:
    (after, value), (_, tangent) = primals, tangents
    if not isinstance(tangent, ad.Zero):
        tangent = depend_p.bind(after, tangent)
    return depend_p.bind(after, value), tangent


def _transpose(
    cotangent: Array, after: object, value: object
) -> Sequence[Array | None]:
    return [None, cotangent]


batching.primitive_batchers[depend_p] = _batched
ad.primitive_jvps[depend_p] = _jvp
ad.primitive_transposes[depend_p] = _transpose


def depend_on(value: Array, after: Array | None) -> Array:
    """The value, computed no sooner than ``after``, which has any shape."""
    if after is None or after.size == 0 or not enabled():
        return value
    return depend_p.bind(after, value)


def made_again(values: Sequence[Array], after: Array | None) -> list[Array]:
    """The values, as others than those of the forward pass.

    Else XLA merges what is computed from them in the reverse pass with the same
    equations of the forward pass, and keeps their results.
    """
    if not enabled():
        return list(values)
    held = lax.optimization_barrier(list(values))
    return [depend_on(value, after) for value in held]


def first_of(after: Array | None) -> Array | None:
    """One element, which is there no sooner than the whole array."""
    if after is None or after.size == 0:
        return None
    return _first(after)
