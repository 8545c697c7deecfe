"""What a kernel is; contractions written out: ``(x[..., None] * w).sum(1)``, ``x @ w``.

A sum of products of one active value with a parameter that varies along it is a dense
layer, a learned map. It is read as the dot that computes the same: an equation that
stands for those of the program, which still run.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from jax import lax
from jax.extend.core import primitives as p

from jlrp.analysis.terms import (
    Factor,
    Function,
    Root,
    Terms,
    factors_of,
    refined,
    strides_of,
)
from jlrp.ir.primitives import traits
from jlrp.ir.program import Atom, Equation, Program, Value, between
from jlrp.ops.standing import equations_of

_MOVES = {p.broadcast_in_dim_p, p.reshape_p, p.squeeze_p, p.transpose_p}


def is_fixed(program: Program, constant: Atom | None) -> bool:
    """Whether a constant is the same for all parameters: counts, literals."""
    stack = [constant]
    while stack:
        atom = stack[-1]
        if not isinstance(atom, Value) or atom in program.fixed:
            stack.pop()
            continue
        made = atom.producer
        if made is None:  # a constant of a loop is what it is outside
            outside = program.origins.get(atom, ())
            known = len(outside) == 1 and program.parent is not None
            program.fixed[atom] = known and is_fixed(program.parent, outside[0])  # type: ignore
            continue
        operands = [a for a in made.inputs if isinstance(a, Value)]
        unknown = next((a for a in operands if a not in program.fixed), None)
        if unknown is None or any(program.fixed.get(a) is False for a in operands):
            program.fixed[atom] = unknown is None and all(
                program.fixed[a] for a in operands
            )
        else:
            stack.append(unknown)
    return not isinstance(constant, Value) or program.fixed[constant]


def is_learned(terms: Terms, reduction: Equation) -> bool:
    """Whether a sum goes along axes along which a parameter weighs what is summed.

    It is a learned map then, ``x @ w`` in other words, whatever is done with it; a
    parameter that is constant along the sum is a scale, and comparisons are a mask.
    """
    if reduction.primitive is not p.reduce_sum_p:
        return False
    (out,) = reduction.outputs
    if out not in terms.program.active:
        return False
    if not meets_constant(terms, reduction.inputs[0]):
        return False
    return any(
        f.inner and any(f.inner) and is_parameter(terms, f.root)
        for f in factors_of(terms.read(out))
    )


def is_parameter(terms: Terms, root: Root) -> bool:
    """Whether a root is a number that is learned, or a function of such."""
    if isinstance(root, Function):
        return root.name != "not" and not terms.is_active(root)
    inexact = np.issubdtype(root.dtype, np.inexact)
    program = terms.program
    learned = program.is_parameter(root) and not is_fixed(program, root)
    return bool(inexact and learned)


def meets_constant(terms: Terms, atom: Atom) -> bool:
    """Whether a constant array is a factor in the products that make a value."""
    stack = [atom]
    while stack:
        value = stack.pop()
        made = value.producer if isinstance(value, Value) else None
        if made is None or made.primitive not in _PRODUCTS | _MOVES:
            continue
        for operand in made.inputs:
            if terms.program.is_active(operand):
                stack.append(operand)
            elif operand.shape and isinstance(operand, Value):
                return True
    return False


_PRODUCTS = {p.mul_p, p.div_p, p.neg_p, p.convert_element_type_p, p.copy_p}


class Dot(NamedTuple):
    """Equations that stand for those of the program: a dot, and moves behind it.

    ``kernel`` are those that make its kernel of parameters.
    """

    core: Equation
    moves: tuple[Equation, ...]
    kernel: tuple[Equation, ...]


def as_dot(terms: Terms, equation: Equation) -> Dot | None:
    """The dot that computes what a sum of products does, a cut of another dot's output,
    or several dots of one value, concatenated."""
    if equation not in terms.remembered:
        dot = _as_dot(terms, equation)
        if dot is not None and _spans_a_name(terms.program, dot, equation):
            dot = None
        terms.remembered[equation] = dot
    return terms.remembered[equation]


def _spans_a_name(program: Program, dot: Dot, equation: Equation) -> bool:
    """Whether a value inside has a tag: it has relevance of its own, asked for or not.

    Rejected: its relevance as that of the output, as inside a convolution with its
    batch norm. The terms of a sum have another shape, and are tagged to be told apart.
    """
    if not program.tags:
        return False
    starts = program.active_inputs(dot.core)
    inside, _ = between(starts, equation.outputs, program.active.__contains__)
    values = {v for e in inside for v in e.outputs} - {*equation.outputs}
    return any(not values.isdisjoint(atoms) for atoms in program.tags.values())


_CUTS = {"slice", "split", "unstack"}


def _as_dot(terms: Terms, equation: Equation) -> Dot | None:
    program, (out, *_) = terms.program, equation.outputs
    if equation.primitive in terms.opaque or out not in program.active:
        return None
    if equation.primitive is p.concatenate_p:
        operands = equation.inputs
        if len(operands) < 2 or not all(
            isinstance(a, Value) and program.used_once(a) for a in operands
        ):
            return None
        if (whole := _joined_layers(terms, equation)) is not None:
            return whole
        parts = [_product(terms, a) for a in operands]  # type: ignore[arg-type]
        return None if None in parts else _joined(parts, equation)  # type: ignore
    if equation.primitive is p.reduce_sum_p and is_learned(terms, equation):
        part = _product(terms, out)
        return part and _joined([part], equation)
    return None


def cut_of_dot(terms: Terms, value: Value) -> Dot | None:
    """The same of a part of the output of a dot that is read in parts only."""
    made = value.producer
    if made is None or made.primitive.name not in _CUTS:
        return None
    (source, *_) = made.inputs
    uses = terms.program.uses.get(source, ())  # type: ignore[arg-type]
    if any(use.primitive.name not in _CUTS for use in uses):
        return None
    part = _product(terms, value)
    return part and _joined([part], made, value)


def _joined_layers(terms: Terms, concatenation: Equation) -> Dot | None:
    """One layer for several of one value, concatenated along their features."""
    program, made = terms.program, [a.producer for a in concatenation.inputs]  # type: ignore
    first = made[0]
    if first is None or first.primitive in terms.opaque:
        return None
    still = [i for i, a in enumerate(first.inputs) if not program.is_active(a)]
    if not traits(first).contraction or len(still) != 1:
        return None
    (k,) = still
    axis = operand_axis(first, k, concatenation.params["dimension"])
    if axis is None:
        return None
    alike = all(
        e is not None
        and e.primitive is first.primitive
        and e.params == first.params
        and e.inputs[1 - k] is first.inputs[1 - k]
        and not program.is_active(e.inputs[k])
        and not is_fixed(program, e.inputs[k])
        for e in made
    )
    if not alike:
        return None
    kernels = [e.inputs[k] for e in made if e is not None]

    def joined(*kernels: Any) -> Any:
        return lax.concatenate(kernels, axis)

    of_kernel, (weights,) = equations_of(joined, kernels, concatenation)  # type: ignore
    inputs = list(first.inputs)
    inputs[k] = weights
    core = replace(first, inputs=tuple(inputs), outputs=concatenation.outputs)
    return Dot(core, (), tuple(of_kernel))


def operand_axis(layer: Equation, k: int, axis: int) -> int | None:
    """The axis of operand ``k`` alone that an axis of the output goes along.

    Of a convolution, its images (``k`` is 0) or its features (1).
    """
    if layer.primitive is p.conv_general_dilated_p:
        numbers = layer.params["dimension_numbers"]
        groups = [layer.params[f"{of}_group_count"] for of in ("feature", "batch")]
        plain = groups == [1, 1] and axis == numbers.out_spec[k]
        return (numbers.lhs_spec, numbers.rhs_spec)[k][0] if plain else None
    if layer.primitive is not p.dot_general_p:
        return None
    _, batch = layer.params["dimension_numbers"]
    places = axes_in_output(layer, k).items()
    found = [i for i, place in places if place == axis and i not in batch[k]]
    return found[0] if found else None


def axes_in_output(dot: Equation, k: int) -> dict[int, int]:
    """Where the axes of operand ``k`` are in the output, but those that are summed."""
    contracting, batch = dot.params["dimension_numbers"]
    free = [
        [
            i
            for i in range(len(a.shape))
            if i not in contracting[n] and i not in batch[n]
        ]
        for n, a in enumerate(dot.inputs)
    ]
    start = len(batch[0]) + (len(free[0]) if k else 0)
    placed = {i: place for place, i in enumerate(batch[k])}
    return placed | {i: start + n for n, i in enumerate(free[k])}


class _Part(NamedTuple):
    """A product of one active value and one parameter, summed.

    Attributes:
      digits: the sizes of the output's digits, axis by axis, then of the summed ones.
      x, kernel: the axis of either that each digit goes along.
      starts: where the kernel begins, along each of its axes.
    """

    roots: tuple[Value, Value]
    axes: tuple[tuple[int, ...], ...]  # of the output: which digits each consists of
    digits: tuple[int, ...]
    x: tuple[int | None, ...]
    kernel: tuple[int | None, ...]
    starts: tuple[int, ...]


def _product(terms: Terms, value: Value) -> _Part | None:
    term = terms.closed(terms.read(value)).only
    if term is None or term.coefficient != 1:
        return None
    if len(term.factors) == 1 and not term.inner:
        (factor,) = term.factors  # a part of a dot
        inside = factor.power == 1 and terms.expanded(factor)
        term = terms.closed(inside).only if inside else None
    if term is None or term.coefficient != 1 or len(term.factors) != 2:
        return None
    active = [terms.is_active(f.root) for f in term.factors]
    if sum(active) != 1 or not term.inner:
        return None
    x, kernel = (term.factors[active.index(flag)] for flag in (True, False))
    if not is_parameter(terms, kernel.root):
        return None
    digits: list[tuple[int, int, int]] = []  # sizes, and strides of both
    axes = []
    for pair in zip(x.view.axes, kernel.view.axes, strict=True):
        sizes = refined(pair)
        split = sizes and [strides_of(axis, sizes) for axis in pair]
        if sizes is None or (split and None in split):
            return None
        axes.append(tuple(range(len(digits), len(digits) + len(sizes))))
        digits += zip(sizes, *split, strict=True) if split else []  # type: ignore
    digits += zip(term.inner, x.inner, kernel.inner, strict=True)
    digits, axes = _within_axes(digits, axes, (x, kernel))
    of_x, of_kernel = (_axes_of(f, digits, i) for i, f in enumerate((x, kernel)))
    if of_x is None or of_kernel is None or any(of_x[1]):
        return None
    if any(
        n != m for n, m in zip(_sizes(x, digits, of_x[0]), x.root.shape, strict=True)
    ):
        return None
    return _Part(
        (x.root, kernel.root),  # type: ignore[arg-type]
        tuple(axes),
        tuple(size for size, *_ in digits),
        of_x[0],
        of_kernel[0],
        of_kernel[1],
    )


def _within_axes(
    digits: Sequence[tuple[int, int, int]],
    axes: Sequence[tuple[int, ...]],
    factors: Sequence[Factor],
) -> tuple[list[tuple[int, int, int]], list[tuple[int, ...]]]:
    """Digits that go along several axes of a root as one digit for each of these."""
    found: list[tuple[int, int, int]] = []
    places: list[tuple[int, ...]] = []
    for size, *strides in digits:
        cuts = {1, size}
        for factor, stride in zip(factors, strides, strict=True):
            shape = factor.root.shape
            whole = [math.prod(shape[i:]) for i in range(len(shape))]
            cuts |= {n // stride for n in whole if stride > 0 and n % stride == 0}
        fit = sorted(n for n in cuts if n <= size)
        if any(b % a for a, b in itertools.pairwise(fit)):
            fit = [1, size]
        start = len(found)
        for inner, outer in reversed(list(itertools.pairwise(fit))):
            found.append((outer // inner, *(inner * s for s in strides)))  # type: ignore
        places.append(tuple(range(start, len(found))))
    return found, [tuple(k for i in axis for k in places[i]) for axis in axes]


def _sizes(
    factor: Factor, digits: Sequence[tuple[int, ...]], axes: Sequence[int | None]
) -> list[int]:
    sizes = [1] * len(factor.root.shape)
    for (size, *_), axis in zip(digits, axes, strict=True):
        if axis is not None:
            sizes[axis] = size
    return sizes


def _axes_of(
    factor: Factor, digits: Sequence[tuple[int, ...]], index: int
) -> tuple[tuple[int | None, ...], tuple[int, ...]] | None:
    """The axis of a factor's root that each digit goes along, and from where on."""
    if not isinstance(factor.root, Value) or factor.power != 1:
        return None
    shape = factor.root.shape
    strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    starts, left = [], factor.view.offset
    for stride in strides:
        start, left = divmod(left, stride)
        starts.append(start)
    by_stride = {
        s: i for i, (s, n) in enumerate(zip(strides, shape, strict=True)) if n > 1
    }
    found: list[int | None] = []
    for size, *along in digits:
        stride = along[index]
        if stride == 0:
            found.append(None)
            continue
        axis = by_stride.pop(stride, None)
        if axis is None or starts[axis] + size > shape[axis]:
            return None
        found.append(axis)
    return tuple(found), tuple(starts)


def _joined(
    parts: Sequence[_Part], like: Equation, out: Value | None = None
) -> Dot | None:
    """One dot for some parts, concatenated along the features of their kernels."""
    first = parts[0]
    out = like.outputs[0] if out is None else out
    sizes, along = list(first.digits), None
    if len(parts) > 1:
        of_axis = first.axes[like.params["dimension"]]
        alike = {(p.roots[0], p.axes, p.x, p.kernel) for p in parts}
        if len(alike) > 1 or len(of_axis) != 1:
            return None
        (digit,) = of_axis
        along = first.kernel[digit]
        others = {p.digits[:digit] + p.digits[digit + 1 :] for p in parts}
        if along is None or first.x[digit] is not None or len(others) > 1:
            return None
        sizes[digit] = sum(p.digits[digit] for p in parts)
    n = sum(map(len, first.axes))
    x, kernel = first.x, first.kernel
    if any(x[k] is None or kernel[k] is None for k in range(n, len(sizes))):
        return None
    if any(x[k] is None and kernel[k] is None for k in range(n)):
        return None
    both = [k for k in range(n) if x[k] is not None and kernel[k] is not None]
    free = [
        sorted(
            (k for k in range(n) if k not in both and at[k] is not None),
            key=lambda k, at=at: at[k],  # type: ignore[arg-type]
        )
        for at in (x, kernel)
    ]
    numbers = (
        tuple(tuple(at[k] for k in range(n, len(sizes))) for at in (x, kernel)),
        tuple(tuple(at[k] for k in both) for at in (x, kernel)),
    )
    made = [*both, *free[0], *free[1]]
    order = [made.index(k) for k in range(n)]

    def cut(part: _Part, kernel: Any) -> Any:
        shape = [1] * kernel.ndim
        for size, axis in zip(part.digits, part.kernel, strict=True):
            if axis is not None:
                shape[axis] = size
        if tuple(shape) == kernel.shape:
            return kernel
        ends = [start + size for start, size in zip(part.starts, shape, strict=True)]
        return lax.slice(kernel, part.starts, ends)

    def joined(*kernels: Any) -> Any:
        cuts = [cut(part, k) for part, k in zip(parts, kernels, strict=True)]
        return cuts[0] if along is None else lax.concatenate(cuts, along)

    def applied(x: Any, kernel: Any) -> Any:
        y = lax.dot_general(x, kernel, numbers)  # type: ignore[arg-type]
        shape = [sizes[k] for k in made]
        y = y if list(y.shape) == shape else lax.reshape(y, shape)
        y = y if order == sorted(order) else lax.transpose(y, order)
        return y if y.shape == tuple(out.shape) else lax.reshape(y, out.shape)

    kernels = [part.roots[1] for part in parts]
    of_kernel, (weights,) = equations_of(joined, kernels, like)
    core, (end,) = equations_of(applied, [first.roots[0], weights], like)
    last = core[-1]
    assert end in last.outputs
    standing = [*core[:-1], replace(last, outputs=(out,))]
    return Dot(standing[0], tuple(standing[1:]), tuple(of_kernel))
