"""Transposes of linear operations, by those that JAX has of their equations.

``jax.linear_transpose`` traces the operation again, which takes longer than all else
that a sum or a dot costs: on a transformer, a third of the tracing time. Here JAX's
rule of each primitive is called as it is. By hand are the transposes of a dot, since
XLA copies a kernel to bring several of its axes in order, unless it is taken as a
matrix, and of a slice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import primitives as p

from jlrp import tactics
from jlrp.ir import jax_compat
from jlrp.ir.primitives import traits
from jlrp.ir.program import Atom, Equation, Value
from jlrp.ops.affine import Affine
from jlrp.ops.base import Operation
from jlrp.ops.context import Context, widened
from jlrp.promise import number
from jlrp.tactics.dependencies import depend_on

Array = jax.Array


def direct_transpose(
    op: Operation, cotangents: Sequence[Array | None], ctx: Context
) -> list[Array] | None:
    """The transpose of a linear operation by those of its equations.

    None if JAX has none of one of them.
    """
    moving, still = set(op.inputs), {}

    def read(atom: Atom) -> Array:
        return still[atom] if atom in still else ctx.read(atom)

    for equation in op.equations:
        if not moving.isdisjoint(equation.inputs):
            moving.update(equation.outputs)
        elif traits(equation).scaling:  # scales, before they are one
            args = [read(a) for a in equation.inputs]
            outs = jax_compat.bind(equation.primitive, equation.params, args)
            still.update(zip(equation.outputs, outs, strict=True))
        else:
            return None
    pairs = zip(op.outputs, cotangents, strict=True)
    pending: dict[Atom, Array] = {v: m for v, m in pairs if m is not None}
    for equation in reversed(op.equations):
        of_outputs = [pending.pop(v, None) for v in equation.outputs]
        if all(m is None for m in of_outputs):
            continue
        of_inputs = _of_equation(equation, moving, of_outputs, read)
        if of_inputs is None:
            return None
        for a, m in zip(equation.inputs, of_inputs, strict=True):
            if m is not None:
                pending[a] = lax.add(pending[a], m) if a in pending else m
    return [
        pending[v] if v in pending else jnp.zeros_like(widened(v)) for v in op.inputs
    ]


def _of_equation(
    equation: Equation,
    moving: set[Value],
    cotangents: Sequence[Array | None],
    read: Callable[[Atom], Array],
) -> Sequence[Array | None] | None:
    """JAX's transpose of one equation, in the dtypes of a context."""
    same = {a.dtype for a in (*equation.inputs, *equation.outputs) if a in moving}
    if equation.bodies or not traits(equation).transposes or len(same) > 1:
        return None
    if equation.primitive is p.slice_p:
        (m,) = cotangents
        return None if m is None else [_of_slice(equation, m)]
    args = [widened(a) if a in moving else read(a) for a in equation.inputs]  # type: ignore[arg-type]
    params = jax_compat.widened(equation.params)
    filled = [
        widened(v) if m is None else m
        for v, m in zip(equation.outputs, cotangents, strict=True)
    ]
    return jax_compat.transpose(equation.primitive, params, filled, args)


def _of_slice(equation: Equation, m: Array) -> Array:
    """By hand: from jax 0.12 on, JAX's own is not public."""
    (x,), params = equation.inputs, equation.params
    starts = params["start_indices"]
    steps = params["strides"] or [1] * len(starts)
    config = [
        (start, size - start - max(0, (count - 1) * step + 1), step - 1)
        for start, size, count, step in zip(
            starts, x.shape, m.shape, steps, strict=True
        )
    ]
    return lax.pad(m, number(m, 0), config)


def dot_transpose(
    params: dict[str, Any], m: Array, other: Array, side: int, shape: tuple[int, ...]
) -> Array:
    """The transpose of a ``dot_general`` by one of its operands, given the other.

    Args:
      m: cotangent of the output.
      side: which operand is wanted: 0 the left, 1 the right.
      shape: of the wanted operand.
    """
    contracting, batch = params["dimension_numbers"]
    mine, its = contracting[side], contracting[1 - side]
    my_batch, its_batch = batch[side], batch[1 - side]
    my_free = [i for i in range(len(shape)) if i not in mine and i not in my_batch]
    its_free = [i for i in range(other.ndim) if i not in its and i not in its_batch]
    n, left = len(my_batch), my_free if side == 0 else its_free
    of_left = list(range(n, n + len(left)))
    of_right = list(range(n + len(left), m.ndim))
    of_its = of_right if side == 0 else of_left
    order = sorted(range(len(its)), key=its.__getitem__)
    kept = sorted(its)
    beside = _are_beside(its_free) and _are_beside(kept)
    if not n and beside and tactics.enabled():
        # As a matrix: XLA would copy a kernel to bring several axes in order.
        out = _by_matrix(params, m, of_its, other, its_free, kept)
    else:
        out = lax.dot_general(
            m,
            other,
            ((of_its, its_free), (list(range(n)), its_batch)),
            precision=params["precision"],
        )
    # Its axes: the batch, mine that are free, and the contracted by the other's order.
    axes = [*my_batch, *my_free, *(mine[k] for k in order)]
    if axes == sorted(axes):
        return out
    return lax.transpose(out, sorted(range(len(axes)), key=axes.__getitem__))


def _are_beside(axes: list[int]) -> bool:
    return bool(axes) and axes[-1] - axes[0] + 1 == len(axes)


def _by_matrix(
    params: dict[str, Any],
    m: Array,
    of_its: list[int],
    other: Array,
    summed: list[int],
    kept: list[int],
) -> Array:
    """The product of m and ``other``, over axes of m that are beside each other."""
    sizes = [other.shape[axis] for axis in kept]
    total = math.prod(other.shape[axis] for axis in summed)
    first, last = of_its[0], of_its[-1]
    matrix = [total, math.prod(sizes)]
    if kept[0] < summed[0]:
        matrix.reverse()
    out = lax.dot_general(
        _reshaped(m, (*m.shape[:first], total, *m.shape[last + 1 :])),
        _reshaped(other, matrix),
        (([first], [0 if summed[0] < kept[0] else 1]), ([], [])),
        precision=params["precision"],
    )
    return _reshaped(out, (*out.shape[:-1], *sizes))


def _reshaped(x: Array, shape: Sequence[int]) -> Array:
    return x if x.shape == tuple(shape) else lax.reshape(x, shape)


def core_transpose(
    primitive: Any,
    params: dict[str, Any],
    operand: int,
    m: Array,
    kernel: Array,
    x: jax.ShapeDtypeStruct,
    after: Array | None,
) -> Array | None:
    """The transpose of a dot or convolution by its input x; None: take JAX's.

    What XLA makes of a convolution's kernel depends on ``after``; a dot takes it as it
    is.
    """
    if primitive is p.dot_general_p:
        return dot_transpose(params, m, kernel, operand, x.shape)
    if operand != 0 or params["batch_group_count"] > 1:
        return None
    args = [x, depend_on(kernel, after=after)]
    found = jax_compat.transpose(primitive, params, [m], args)
    return None if found is None else found[0]


def affine_transpose(affine: Affine, m: Array, ctx: Context) -> Array | None:
    """A dot or convolution by a parameter, scaled and shifted, its axes kept."""
    if affine.of_kernel:
        return None
    kernel, start = ctx.read(affine.kernel), widened(affine.start)
    if not kernel.dtype == m.dtype == start.dtype:
        return None
    for step in reversed(affine.steps):
        if step.kind == "move" or step.source.shape != m.shape:
            return None
        if step.kind == "scale":
            reads = step.equation.inputs
            args = [m if a is step.source else ctx.read(a) for a in reads]
            (m,) = jax_compat.bind(
                step.equation.primitive, jax_compat.widened(step.equation.params), args
            )
        elif step.negates:
            m = lax.neg(m)
    core = affine.core.primitive, jax_compat.widened(affine.core.params), affine.operand
    return core_transpose(*core, m, kernel, start, ctx.after)
