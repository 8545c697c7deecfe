"""The effective kernel and bias of an affine operation.

Scales behind the dot or convolution (batch norm) are moved onto the kernel, so that
rules that look at weights see one linear map: what other libraries call a canonizer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import primitives as p

from jlrp.ir import jax_compat
from jlrp.ir.program import Value, evaluate
from jlrp.ops.affine import (
    Affine,
    Stage,
    feature_axes,
    feature_layouts,
    varying_axes,
)
from jlrp.ops.context import Context, widened
from jlrp.ops.transposes import core_transpose

Array = jax.Array


@dataclass(frozen=True)
class LinearMap:
    """``y = apply(x, kernel)``, bilinear: a dot or convolution, then its axes moved.

    Without any numbers: equal layers have equal maps.
    """

    primitive: Any
    params: tuple[tuple[str, Any], ...]
    operand: int  # which of its operands is x
    moves: tuple[tuple[Any, tuple[tuple[str, Any], ...]], ...]
    x: jax.ShapeDtypeStruct

    def apply(self, x: Array, kernel: Array) -> Array:
        args = [x, kernel] if self.operand == 0 else [kernel, x]
        (y,) = jax_compat.bind(self.primitive, dict(self.params), args)
        for primitive, params in self.moves:
            (y,) = jax_compat.bind(primitive, dict(params), [y])
        return y

    def transpose(self, kernel: Array, y: Array, after: Array | None = None) -> Array:
        """Of ``apply`` by x. What is made of the kernel depends on ``after``."""
        if not self.moves:
            core = self.primitive, dict(self.params), self.operand
            x = core_transpose(*core, y, kernel, self.x, after)
            if x is not None:
                return x
        (x,) = jax.linear_transpose(lambda x: self.apply(x, kernel), self.x)(y)
        return x


@dataclass(frozen=True)
class CanonizedKernel:
    """An affine operation: ``y = linear.apply(x, kernel) + bias``."""

    linear: LinearMap
    kernel: Array
    bias: Array | None


def canonized_map(
    affine: Affine, bias: Array | None, negated: bool, ctx: Context
) -> CanonizedKernel:
    """The kernel and bias that rules see; ``negated``: of a term that is subtracted."""
    moves = [step.equation for step in affine.steps if step.kind == "move"]
    linear = LinearMap(
        affine.core.primitive,
        _frozen(affine.core.params),
        affine.operand,
        tuple((equation.primitive, _frozen(equation.params)) for equation in moves),
        widened(affine.start),
    )
    kernel = canonized_kernel(affine, ctx)
    if negated:
        kernel, bias = lax.neg(kernel), bias if bias is None else lax.neg(bias)
    return CanonizedKernel(linear, kernel, bias)


def _frozen(params: dict[str, Any]) -> tuple[tuple[str, Any], ...]:
    return tuple(sorted(jax_compat.widened(params).items()))


def linear_part(affine: Affine, x: Array, ctx: Context) -> Array:
    """The affine operation without its shifts, the scales left where they are."""
    y, kernel = x, kernel_of(affine, ctx)
    for equation, source in [(affine.core, affine.start)] + [
        (step.equation, step.source) for step in affine.steps if step.kind != "shift"
    ]:
        args = [
            y if a is source else kernel if a is affine.kernel else ctx.read(a)
            for a in equation.inputs
        ]
        (y,) = jax_compat.bind(
            equation.primitive, jax_compat.widened(equation.params), args
        )
    negations = sum(step.negates for step in affine.steps if step.kind == "shift")
    return -y if negations % 2 else y


def kernel_of(affine: Affine, ctx: Context) -> Array:
    """The kernel of the core, which may have been cut or joined of parameters."""
    if not affine.of_kernel:
        return ctx.read(affine.kernel)
    read = [a for e in affine.of_kernel for a in e.inputs]
    made = {v for e in affine.of_kernel for v in e.outputs}
    env = {v: ctx.read(v) for v in read if isinstance(v, Value) and v not in made}
    evaluate(affine.of_kernel, env, lambda e: jax_compat.widened(e.params))
    return env[affine.kernel]  # type: ignore[index]


def canonized_kernel(affine: Affine, ctx: Context) -> Array:
    """The kernel times every scale behind the core."""
    kernel = kernel_of(affine, ctx)
    for index, step in enumerate(affine.steps):
        if step.negates:
            kernel = -kernel
        if step.kind == "scale" and step.constant is not None:
            scale = _on_kernel(affine, index, ctx.read(step.constant))
            divides = step.equation.primitive is p.div_p
            kernel = _scaled(kernel, scale, lax.div if divides else lax.mul)
    return kernel


def _scaled(
    kernel: Array, scale: Array, combine: Callable[[Array, Array], Array]
) -> Array:
    """Plain lax: jnp's operators would be a noticeable part of the tracing time."""
    axes = range(kernel.ndim - scale.ndim, kernel.ndim)
    scale = lax.broadcast_in_dim(scale, kernel.shape, axes)
    return combine(kernel, lax.convert_element_type(scale, kernel.dtype))


def _on_kernel(affine: Affine, index: int, scale: Array) -> Array:
    """The scale of step ``index`` as an array that broadcasts to the kernel."""
    step = affine.steps[index]
    axes = feature_layouts(affine)[index]
    if not varying_axes(step.constant, len(step.source.shape)) or axes is None:
        return jnp.reshape(scale, -1)[0]
    shape = _features_only(step.source.shape, axes)
    scale = _first_along_others(scale, axes)
    if scale.shape != shape:
        scale = jnp.broadcast_to(scale, shape)
    for earlier in reversed(affine.steps[:index]):
        scale = _moved_back(affine, earlier, scale)
    pairs = sorted(feature_axes(affine), key=lambda pair: pair[1])
    kernel_axes = {axis for _, axis in pairs}
    outs = [out for out, _ in pairs]
    if outs != sorted(outs):
        others = [i for i in range(scale.ndim) if i not in outs]
        scale = lax.transpose(scale, outs + others)
    return lax.reshape(scale, _features_only(affine.kernel.shape, kernel_axes))


def _moved_back(affine: Affine, step: Stage, scale: Array) -> Array:
    """Undo a move on an array that is 1 along all axes without features."""
    if step.kind != "move":
        return scale
    if step.equation.primitive is p.transpose_p:
        permutation = step.equation.params["permutation"]
        return jnp.transpose(
            scale, sorted(range(scale.ndim), key=permutation.__getitem__)
        )
    axes = feature_layouts(affine)[affine.steps.index(step)]
    assert axes is not None
    return jnp.reshape(scale, _features_only(step.source.shape, axes))


def _features_only(
    shape: tuple[int, ...], axes: frozenset[int] | set[int]
) -> tuple[int, ...]:
    return tuple(n if i in axes else 1 for i, n in enumerate(shape))


def _first_along_others(scale: Array, axes: frozenset[int]) -> Array:
    shape = _features_only(scale.shape, axes)
    return scale if shape == scale.shape else lax.slice(scale, [0] * scale.ndim, shape)
