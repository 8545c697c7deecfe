"""Equations that are sums in other words, read as sums.

A product in the words of a contraction of nothing is a product; a contraction element
by element a product and a sum; a dot with one number a sum, scaled; one with a triangle
of ones a running sum. A sum of a stack is an addition, one of rows that are all added
to one place a sum of these, and one of what is scaled a mean.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence, Set
from typing import Any

import numpy as np
from jax import lax
from jax.extend.core import primitives as p

from jlrp.analysis.intervals import scalar_of
from jlrp.analysis.terms import Terms, View, moves_all
from jlrp.ir import jax_compat
from jlrp.ir.primitives import traits
from jlrp.ir.program import Atom, Equation, Program, Value
from jlrp.ops.contraction import is_fixed
from jlrp.ops.mean import count_of, mean_of, weight_of
from jlrp.ops.standing import standing_for

Array = Any


def may_be_other(program: Program, equation: Equation) -> bool:
    """Whether an equation may be a sum, or a product, in other words."""
    if equation.primitive is p.scatter_add_p:
        return True
    if equation.primitive is not p.dot_general_p:
        return False
    sums = weight_of(program, equation) is not None or _may_run(program, equation)
    return sums or _is_outer(equation) or _is_elementwise(program, equation)


def in_other_words(
    terms: Terms, equation: Equation, names: Callable[[], Set[Atom]]
) -> list[Equation] | None:
    """The equations for a product, a sum of a stack or of what is scaled, and a dot
    with a number."""
    if _is_outer(equation):
        return _product(equation)
    if _is_elementwise(terms.program, equation):
        return _sum_of_product(equation)
    if equation.primitive is p.dot_general_p:
        return _sum_of_dot(terms, equation) or _running_sum(terms, equation)
    if equation.primitive is p.scatter_add_p:
        return _sum_of_rows(terms, equation)
    if equation.primitive is not p.reduce_sum_p:
        return None
    (operand,) = equation.inputs
    if operand in names() or not terms.program.used_once(operand):  # type: ignore
        return None
    if (operands := _stacked(terms, equation)) is not None:
        return _addition(equation, operands)
    scaled, moves = _before_moves(terms, operand, names())
    if scaled in names() or not isinstance(scaled, Value):
        return None
    return _by_reciprocals(terms, equation, scaled, moves) or _scaled_after(
        terms, equation, scaled, moves
    )


def _is_outer(equation: Equation) -> bool:
    """Whether it is a product in the words of a contraction, of nothing."""
    if equation.primitive is not p.dot_general_p:
        return False
    (contracting, _), _ = equation.params["dimension_numbers"]
    dtypes = {a.dtype for a in (*equation.inputs, *equation.outputs)}
    return not contracting and len(dtypes) == 1


def _is_elementwise(program: Program, equation: Equation) -> bool:
    """Whether it is the sum of a product of two active values, element by element."""
    if equation.primitive is not p.dot_general_p:
        return False
    contracting, batch = equation.params["dimension_numbers"]
    dtypes = {a.dtype for a in (*equation.inputs, *equation.outputs)}
    return len(dtypes) == 1 and all(
        program.is_active(a) and c and len(a.shape) == len(c) + len(b)
        for a, c, b in zip(equation.inputs, contracting, batch, strict=True)
    )


def _may_run(program: Program, equation: Equation) -> bool:
    """Whether it may be a running sum: a dot with a square that is made of literals."""
    (contracting, batch), square = equation.params["dimension_numbers"], None
    for a, along in zip(equation.inputs, contracting, strict=True):
        if not program.is_active(a) and len(a.shape) == 2 and len(along) == 1:
            square = a
    if square is None or batch[0] or square.shape[0] != square.shape[1]:
        return False
    return is_fixed(program, square)


def _stacked(terms: Terms, equation: Equation) -> list[Value] | None:
    """The values that were stacked along an axis that is summed."""
    (stack,) = equation.inputs
    made = stack.producer if isinstance(stack, Value) else None
    if made is None or made.primitive is not p.concatenate_p or len(made.inputs) < 2:
        return None
    axis, axes = made.params["dimension"], equation.params["axes"]
    if axes != (axis,) or any(a.shape[axis] != 1 for a in made.inputs):
        return None
    if not all(isinstance(a, Value) for a in made.inputs):
        return None
    return [_without_axis(terms, a, equation.outputs[0]) for a in made.inputs]  # type: ignore


def _without_axis(terms: Terms, row: Value, like: Value) -> Value:
    """What a row of a stack was before it had an axis more, or the row."""
    found = terms.before_moves(row)
    if found is None or found[0].shape != like.shape:
        return row
    root, view = found
    return root if view.reshaped(like.shape) == View.whole(like.shape) else row


def _scaled_after(
    terms: Terms, equation: Equation, scaled: Value, moves: Sequence[Equation]
) -> list[Equation] | None:
    """For a sum of what is scaled by one over the count, or of a scaled sum, the scaled
    sum: a mean."""
    made = scaled.producer
    if made is None or not traits(made).scaling or made.primitive in terms.opaque:
        return None
    operands = terms.program.active_inputs(made)
    if len(operands) != 1 or operands[0].dtype != scaled.dtype:
        return None
    (source,) = operands
    place = made.inputs.index(source)
    number = scalar_of(made.inputs[1 - place]) if len(made.inputs) == 2 else None
    divides = made.primitive is p.div_p
    if number is None or np.iscomplexobj(number) or (divides and place == 1):
        return None
    mean = mean_of(terms, made.outputs[0])
    if mean is not None and mean.primitive is p.reduce_window_sum_p:
        return None  # average pooling: windows are no part of a sum over axes
    count = count_of(equation)
    averages = math.isclose(
        float(number), count if divides else 1 / count, rel_tol=1e-5
    )
    if not averages and not _is_sum(terms, source):
        return None
    (out,) = equation.outputs

    def scale(x: Array) -> Array:
        for move in moves:
            (x,) = jax_compat.bind(move.primitive, move.params, [x])
        total = lax.reduce_sum(x, equation.params["axes"])
        wide = lax.full_like(total, number)
        return lax.div(total, wide) if divides else lax.mul(total, wide)

    return standing_for(out, scale, [source], equation)


def _by_reciprocals(
    terms: Terms, equation: Equation, scaled: Value, moves: Sequence[Equation]
) -> list[Equation] | None:
    """For a sum of what parameters divide, the sum of products: perhaps a layer."""
    made = scaled.producer
    if made is None or made.primitive is not p.div_p or p.div_p in terms.opaque:
        return None
    x, divisor = made.inputs
    if not isinstance(divisor, Value) or terms.program.is_active(divisor):
        return None
    if not terms.program.is_parameter(divisor) or scalar_of(divisor) is not None:
        return None
    (out,), axes = equation.outputs, range(len(divisor.shape))
    if len(divisor.shape) != len(x.shape):
        return None

    def summed(x: Array, divisor: Array) -> Array:
        kernel = lax.div(lax.full_like(divisor, 1), divisor)
        x = lax.mul(x, lax.broadcast_in_dim(kernel, x.shape, axes))
        for move in moves:
            (x,) = jax_compat.bind(move.primitive, move.params, [x])
        return lax.reduce_sum(x, equation.params["axes"])

    return standing_for(out, summed, [x, divisor], equation)  # type: ignore[list-item]


def _before_moves(
    terms: Terms, atom: Atom, named: Set[Atom] = frozenset()
) -> tuple[Atom, list[Equation]]:
    """What was moved to make an atom, and how: nothing else reads what is between."""
    moves: list[Equation] = []
    while isinstance(atom, Value) and (made := atom.producer) is not None:
        source = made.inputs[0] if moves_all(made) else None
        if not isinstance(source, Value) or not terms.program.used_once(source):
            break
        if made.primitive in terms.opaque or atom in named:
            break
        atom, moves = source, [made, *moves]
    return atom, moves


def _is_sum(terms: Terms, value: Value) -> bool:
    """Whether a value is a sum, scaled and moved or not."""
    while terms.program.used_once(value) and (made := value.producer) is not None:
        if made.primitive in terms.opaque:
            return False
        operands = terms.program.active_inputs(made)
        if weight_of(terms.program, made) is not None:
            return len(operands) == 1 and not _is_product(terms, operands[0])
        if traits(made).addition and len(operands) == 2:
            return _are_of_one(terms, operands)
        moves = moves_all(made) or traits(made).scaling
        if not moves or len(operands) != 1:
            return False
        (value,) = operands
    return False


def _is_product(terms: Terms, value: Value) -> bool:
    """Whether a sum of the value may be a contraction, which is no sum."""
    moved, _ = _before_moves(terms, value)
    made = moved.producer if isinstance(moved, Value) else None
    if made is None or made.primitive is not p.mul_p:
        return False
    return all(scalar_of(a) is None for a in made.inputs)


def _are_of_one(terms: Terms, parts: Sequence[Value]) -> bool:
    """Whether some values are parts of one, so that their addition is a sum of it."""
    roots = {found and found[0] for found in map(terms.before_moves, parts)}
    return len(roots) == 1 and None not in roots


def _sum_of_dot(terms: Terms, equation: Equation) -> list[Equation] | None:
    """For a dot with a number everywhere, the sum that it is."""
    weight = weight_of(terms.program, equation)
    dtypes = {a.dtype for a in (*equation.inputs, *equation.outputs)}
    (contracting, batch), (out,) = (
        equation.params["dimension_numbers"],
        equation.outputs,
    )
    if weight is None or len(dtypes) > 1 or batch[0]:
        return None
    i = int(not terms.program.is_active(equation.inputs[0]))
    free = len(equation.inputs[i].shape) - len(contracting[i])
    others = len(equation.inputs[1 - i].shape) - len(contracting[1 - i])
    at = range(others, others + free) if i else range(free)

    def summed(x: Array) -> Array:
        total = lax.reduce_sum(x, contracting[i])
        if weight != 1:
            total = lax.mul(total, lax.full_like(total, weight))
        wide = lax.broadcast_in_dim(total, out.shape, tuple(at))
        return wide if others else total

    return standing_for(out, summed, [equation.inputs[i]], equation)


def _running_sum(terms: Terms, equation: Equation) -> list[Equation] | None:
    """For a dot with a triangle of ones, the running sum that it is."""
    k = int(not terms.program.is_active(equation.inputs[1]))
    same = equation.inputs[1 - k].dtype == equation.outputs[0].dtype
    if not same or not _may_run(terms.program, equation):
        return None
    triangle = terms.array_of(equation.inputs[k])
    (contracting, _), (out,) = equation.params["dimension_numbers"], equation.outputs
    n, (axis,), (along,) = (
        equation.inputs[k].shape[0],
        contracting[1 - k],
        contracting[k],
    )
    if triangle is None:
        return None
    into = triangle.reshape(n, n) if along == 0 else triangle.reshape(n, n).T
    backwards = np.array_equal(into, np.tri(n))  # what is summed, by where it goes
    if not backwards and not np.array_equal(into, np.tri(n).T):
        return None
    last = 0 if k == 0 else len(out.shape) - 1

    def running(x: Array) -> Array:
        order = [i for i in range(x.ndim) if i != axis]
        order.insert(last, axis)
        y = lax.cumsum(x, axis, reverse=backwards)
        return y if order == sorted(order) else lax.transpose(y, order)

    return standing_for(out, running, [equation.inputs[1 - k]], equation)


def _sum_of_rows(terms: Terms, scatter: Equation) -> list[Equation] | None:
    """For rows that are all added to one place, where 0 was, their sum."""
    start, index, rows = scatter.inputs
    numbers, (out,) = scatter.params["dimension_numbers"], scatter.outputs
    inserted = numbers.inserted_window_dims
    one = inserted == numbers.scatter_dims_to_operand_dims
    if scalar_of(start) != 0 or not one or any(out.shape[i] != 1 for i in inserted):
        return None
    if math.prod(out.shape) * math.prod(index.shape[:-1]) != math.prod(rows.shape):
        return None
    places = terms.array_of(index)
    if places is None or np.any(places) or not isinstance(rows, Value):
        return None
    axes = [i for i in range(len(rows.shape)) if i not in numbers.update_window_dims]

    def summed(x: Array) -> Array:
        return lax.expand_dims(lax.reduce_sum(x, axes), inserted)

    return standing_for(out, summed, [rows], scatter)


def _sum_of_product(dot: Equation) -> list[Equation]:
    (out,) = dot.outputs
    contracting, batch = dot.params["dimension_numbers"]
    orders = [[*b, *c] for b, c in zip(batch, contracting, strict=True)]
    axes = range(len(batch[0]), len(orders[0]))

    def summed(*x: Array) -> Array:
        pairs = zip(x, orders, strict=True)
        a, b = (
            v if order == sorted(order) else lax.transpose(v, order)
            for v, order in pairs
        )
        return lax.reduce_sum(lax.mul(a, b), tuple(axes))

    return standing_for(out, summed, dot.inputs, dot)


def _addition(equation: Equation, operands: Sequence[Value]) -> list[Equation]:
    (out,) = equation.outputs

    def added(*rows: Array) -> Array:
        rows = tuple(x if x.shape == out.shape else x.reshape(out.shape) for x in rows)
        return functools.reduce(lax.add, rows)

    return standing_for(out, added, operands, equation)


def _product(outer: Equation) -> list[Equation]:
    """The product of what is broadcast, for a contraction of nothing."""
    (out,) = outer.outputs
    _, batch = outer.params["dimension_numbers"]
    ranks, places = [len(a.shape) for a in outer.inputs], []
    start = len(batch[0])
    for rank, both in zip(ranks, batch, strict=True):
        free = [i for i in range(rank) if i not in both]
        at = dict(zip(both, range(len(both)), strict=True))
        at |= dict(zip(free, range(start, start + len(free)), strict=True))
        start += len(free)
        places.append(at)

    def wide(x: Array, at: dict[int, int]) -> Array:
        order = sorted(range(x.ndim), key=at.__getitem__)
        x = x if order == sorted(order) else lax.transpose(x, order)
        if x.shape == tuple(out.shape):
            return x
        return lax.broadcast_in_dim(x, out.shape, [at[i] for i in order])

    def product(*x: Array) -> Array:
        return lax.mul(*map(wide, x, places))

    return standing_for(out, product, outer.inputs, outer)
