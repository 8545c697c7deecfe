"""Softmax: a quotient of an exp by its own sum; its logarithm; the log of that sum.

Found by data flow: with or without the max shift, with masks before or after the exp,
transposes and broadcasts anywhere, in any spelling of the quotient.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from jax.extend.core import primitives as p

from jlrp.analysis.intervals import scalar_of
from jlrp.ir.primitives import primitives_where
from jlrp.ir.program import Atom, Equation, Program, Value
from jlrp.ops.affine import reshape_groups, varying_axes

_MOVES = primitives_where(lambda row: row.view) | {p.stop_gradient_p}
_MASKS = primitives_where(lambda row: row.addition or row.scaling) | {p.select_n_p}
_EXPONENTIALS = primitives_where(lambda row: row.base is not None)


def softmax_input(program: Program, end: Value) -> Value | None:
    """The scores of the softmax, log-softmax or logsumexp that ends at ``end``.

    Scores are taken before the shift and behind scaling, soft-capping and masks.
    """
    for recognise in (_softmax, _segment_softmax, _log_softmax, _logsumexp):
        scores = recognise(program, end)
        if scores is not None and scores in program.active:
            return scores
    return None


def softmax_axes(program: Program, end: Value) -> tuple[int, ...] | None:
    """The axes along which a softmax sums to one, if it moves nothing."""
    quotient = _as_quotient(end)
    if quotient is None:
        return None
    exponential, total = quotient
    summed = _summed_exponentials(program, total)
    if exponential is not (summed and summed.exponentials) or summed is None:
        return None
    assert summed.exponentials.producer is not None
    plain = summed.exponentials.producer.primitive is p.exp_p
    whole = summed.equation.inputs[0] is exponential
    made = _produced_by(_unmoved(total), p.reduce_sum_p)
    if not plain or not whole or made is None:
        return None
    return tuple(made.params["axes"])


def is_softmax_weights(program: Program, end: Value) -> bool:
    """Whether ``end`` is a softmax itself: weights that sum to one."""
    found = (_softmax(program, end), _segment_softmax(program, end))
    return any(scores in program.active for scores in found)


def may_be_minus_infinity(program: Program, scores: Value) -> bool:
    """Whether a mask of -inf, or of numbers unknown here, was laid on the scores."""
    value = scores
    while value.producer is not None:
        equation = value.producer
        operands = program.active_inputs(equation)
        if equation.primitive not in _MASKS | _MOVES or len(operands) != 1:
            return False
        constants = [a for a in equation.inputs if a is not operands[0] and a.shape]
        floats = [a for a in constants if np.issubdtype(a.dtype, np.floating)]
        for known in map(scalar_of, floats):
            if known is None or not np.all(np.isfinite(np.asarray(known, np.float64))):
                return True
        (value,) = operands
    return False


def _softmax(program: Program, end: Value) -> Value | None:
    quotient = _as_quotient(end)
    if quotient is None:
        return None
    exponential, total = quotient
    summed = _summed_exponentials(program, total)
    if summed is None or _unmasked(program, exponential) is not summed.exponentials:
        return None
    if not _divides_each_by_its_sum(program, exponential, total, summed):
        return None
    return _scores(program, summed)


def _segment_softmax(program: Program, end: Value) -> Value | None:
    """A softmax over the rows that share an index, as over a node's neighbours.

    The sum is scattered to its segment, and gathered by the same index.
    """
    quotient = _as_quotient(end)
    if quotient is None:
        return None
    fetched = _produced_by(_unstabilised(program, quotient[1]), p.gather_p)
    exponentials = _unmasked(program, quotient[0])
    if fetched is None or exponentials is None:
        return None
    summed = _produced_by(_unstabilised(program, fetched.inputs[0]), p.scatter_add_p)
    exponential = _produced_by(exponentials, *_EXPONENTIALS)
    if summed is None or exponential is None or not _same_rows(fetched, summed):
        return None
    start, _, updates = summed.inputs
    if np.any(scalar_of(start) != 0) or _unmasked(program, updates) is not exponentials:
        return None
    (scores, *_) = exponential.inputs
    shifted = _produced_by(scores, p.sub_p)
    if shifted is not None:  # by the same number in all of a segment
        scores, shift = shifted.inputs
        of_segments = _produced_by(_unmoved(shift), p.gather_p)
        if of_segments is None or not _same_rows(of_segments, summed):
            (scores, *_) = exponential.inputs
    return scores if isinstance(scores, Value) else None


def _same_rows(gather: Equation, scatter: Equation) -> bool:
    """Whether a gather reads the rows that a scatter writes, in the same order."""
    read, written = (e.params["dimension_numbers"] for e in (gather, scatter))
    same_axes = (
        tuple(read.start_index_map) == tuple(written.scatter_dims_to_operand_dims)
        and tuple(read.offset_dims) == tuple(written.update_window_dims)
        and tuple(read.collapsed_slice_dims) == tuple(written.inserted_window_dims)
    )
    return same_axes and _rows(gather.inputs[1]) is _rows(scatter.inputs[1])


def _rows(index: Atom) -> Atom:
    """An index before moves, and before negative ones are counted from the end."""
    while True:
        index = _unmoved(index)
        made = _produced_by(index, p.select_n_p)
        if made is None:
            return index
        below, *cases = made.inputs
        compared = _produced_by(below, p.lt_p)
        if compared is None or _unmoved(compared.inputs[0]) is not _unmoved(cases[0]):
            return index
        index = cases[0]


def _unstabilised(program: Program, total: Atom) -> Atom:
    """``sum`` in ``sum + eps`` or ``max(sum, eps)``."""
    total = _unmoved(total)
    made = _produced_by(total, p.add_p, p.max_p)
    operands = program.active_inputs(made) if made is not None else ()
    return _unmoved(operands[0]) if len(operands) == 1 else total


def _log_softmax(program: Program, end: Value) -> Value | None:
    equation = end.producer
    if equation is None or equation.primitive is not p.sub_p:
        return None
    minuend, log_total = equation.inputs
    log_total = _unmoved(log_total)
    summed = _log_of_exponentials(program, log_total)
    if summed is not None:  # (x - m) - log sum exp(x - m)
        exponent = summed.exponent
        same = exponent is not None and _unmoved(minuend) is _unmoved(exponent)
        return _scores(program, summed) if same else None
    if isinstance(log_total, Value):  # x - (log sum exp(x - m) + m)
        scores = _logsumexp(program, log_total)
        if scores is not None and _unmoved(scores) is _unmoved(minuend):
            return scores
    return None


def _logsumexp(program: Program, end: Value) -> Value | None:
    """``log sum exp(x)``, or ``log sum exp(x - m) + m``."""
    summed = _log_of_exponentials(program, end)
    if summed is not None:
        return summed.exponent
    if end.producer is None or end.producer.primitive is not p.add_p:
        return None
    for log_total, shift in _both_ways(end.producer):
        summed = _log_of_exponentials(program, _unmoved(log_total))
        if summed is None:
            continue
        made = _produced_by(summed.exponent, p.sub_p)
        if made is not None and _unmoved(made.inputs[1]) is _unmoved(shift):
            scores = made.inputs[0]
            return scores if isinstance(scores, Value) else None
    return None


def _divides_each_by_its_sum(
    program: Program, exponential: Atom, total: Atom, summed: _Summed
) -> bool:
    """Whether the sum is divided out along the axes over which it was taken."""
    numerator = _labels(program, exponential, summed)
    denominator = _labels(program, total, summed)
    if numerator is None or denominator is None:
        return False
    gone = [n for n, d in zip(numerator, denominator, strict=True) if n and not d]
    rest = [(n, d) for n, d in zip(numerator, denominator, strict=True) if d]
    over = {f for label in gone for f in label}
    axes = {(i, 0) for i in summed.equation.params["axes"]}
    inside = _labels(program, summed.equation.inputs[0], summed)
    if inside is None:
        return False
    taken = {f for i, _ in axes for f in inside[i]}
    return over == taken and all(n == d for n, d in rest)


Label = tuple[Any, ...]  # the axes of the exponentials that an axis is made of


def _labels(program: Program, atom: Atom, summed: _Summed) -> list[Label] | None:
    """For each axis of a value, the axes of the exponentials that it runs along."""
    if atom is summed.exponentials:
        shape = summed.exponentials.shape
        return [(i,) if n > 1 else () for i, n in enumerate(shape)]
    if not isinstance(atom, Value) or atom.producer is None:
        return None
    equation = atom.producer
    prim, params = equation.primitive, equation.params
    active = program.active_inputs(equation)
    source = active[0] if len(active) == 1 else equation.inputs[0]
    inner = _labels(program, source, summed)
    if inner is None:
        return None
    if equation is summed.equation:
        return [label for i, label in enumerate(inner) if i not in params["axes"]]
    if prim is p.transpose_p:
        return [inner[i] for i in params["permutation"]]
    if prim is p.broadcast_in_dim_p:
        labels: list[Label] = [()] * len(atom.shape)
        for i, axis in enumerate(params["broadcast_dimensions"]):
            labels[axis] = inner[i]
        return labels
    if prim in (p.reshape_p, p.squeeze_p):
        labels = [()] * len(atom.shape)
        for old, new in reshape_groups(source.shape, atom.shape):
            wide = [i for i in new if atom.shape[i] > 1]
            label = tuple(f for i in old for f in inner[i])
            for k, axis in enumerate(wide):
                labels[axis] = label if len(wide) == 1 else (*label, k, len(wide))
        return labels
    return inner if len(inner) == len(atom.shape) else None


def _as_quotient(end: Value) -> tuple[Atom, Atom] | None:
    """``a / b`` in any of its spellings: ``a * b**-1``, ``a * (1 / b)``."""
    equation = end.producer
    if equation is None:
        return None
    if equation.primitive is p.div_p:
        return equation.inputs[0], equation.inputs[1]
    if equation.primitive is not p.mul_p:
        return None
    for a, b in _both_ways(equation):
        inverse = _unmoved(b)
        if (made := _produced_by(inverse, p.div_p)) is not None:
            numerator = scalar_of(made.inputs[0])
            if numerator is not None and np.all(np.equal(numerator, 1)):
                return a, made.inputs[1]
        if (made := _produced_by(inverse, p.integer_pow_p)) is not None:
            if made.params["y"] == -1:
                return a, made.inputs[0]
    return None


@dataclass(frozen=True)
class _Summed:
    """A sum of exponentials."""

    exponentials: Value
    equation: Equation  # the sum

    @property
    def exponent(self) -> Value | None:
        assert self.exponentials.producer is not None
        (exponent, *_) = self.exponentials.producer.inputs
        return exponent if isinstance(exponent, Value) else None


def _log_of_exponentials(program: Program, atom: Atom) -> _Summed | None:
    made = _produced_by(atom, p.log_p)
    if made is None:
        return None
    total = made.inputs[0]
    if (absolute := _produced_by(total, p.abs_p)) is not None:  # jax's logsumexp
        total = absolute.inputs[0]
    return _summed_exponentials(program, total)


def _summed_exponentials(program: Program, total: Atom) -> _Summed | None:
    """The exponentials of which ``total`` is the sum, a constant added or not."""
    made = _produced_by(_unstabilised(program, total), p.reduce_sum_p)
    if made is None:
        return None
    exponentials = _unmasked(program, made.inputs[0])
    if exponentials is None or not _produced_by(exponentials, *_EXPONENTIALS):
        return None
    return _Summed(exponentials, made)


def _unmasked(program: Program, atom: Atom) -> Value | None:
    """``atom`` before moves and masks that only set some of its elements to zero."""
    while True:
        atom = _unmoved(atom)
        if not isinstance(atom, Value) or atom.producer is None:
            return None
        made = atom.producer
        operands = program.active_inputs(made)
        if len(operands) != 1 or made.primitive not in (p.select_n_p, p.mul_p):
            return atom
        if made.primitive is p.select_n_p:
            others = [scalar_of(a) for a in made.inputs[1:] if a is not operands[0]]
            if any(v is None or np.any(v) for v in others):
                return atom
        (atom,) = operands


def _scores(program: Program, summed: _Summed) -> Value | None:
    """What is exponentiated, before a shift that is constant along the sum.

    Whatever the shift, the multiplier of shifted scores sums to zero along the sum, so
    that of the unshifted ones is the same, and the shift gets none.
    """
    exponent = summed.exponent
    made = _produced_by(exponent, p.sub_p)
    if made is None:
        return exponent
    unshifted, shift = made.inputs
    if _is_constant_along(program, shift, summed) or _is_max_of(shift, unshifted):
        return unshifted if isinstance(unshifted, Value) else None
    return exponent


def _is_constant_along(program: Program, shift: Atom, summed: _Summed) -> bool:
    layout = summed.equation.inputs[0]
    while layout is not summed.exponentials:  # masks keep the layout, moves do not
        made = _produced_by(layout, p.select_n_p, p.mul_p, p.convert_element_type_p)
        if made is None:
            return False
        (layout,) = program.active_inputs(made)
    axes = set(summed.equation.params["axes"])
    return axes.isdisjoint(varying_axes(shift, len(summed.exponentials.shape)))


def _both_ways(equation: Equation) -> Iterator[tuple[Atom, Atom]]:
    a, b = equation.inputs
    yield a, b
    yield b, a


def _produced_by(atom: Atom | None, *primitives: object) -> Equation | None:
    if not isinstance(atom, Value) or atom.producer is None:
        return None
    return atom.producer if atom.producer.primitive in primitives else None


def _unmoved(atom: Atom) -> Atom:
    while isinstance(atom, Value) and atom.producer is not None:
        if atom.producer.primitive not in _MOVES:
            break
        atom = atom.producer.inputs[0]
    return atom


def _is_max_of(shift: Atom, scores: Atom) -> bool:
    """``max(scores)``, also guarded against -inf: ``max(-inf, .)``, ``where(.)``."""
    shift = _unmoved(shift)
    while (made := _produced_by(shift, p.max_p, p.select_n_p)) is not None:
        values = made.inputs[1:] if made.primitive is p.select_n_p else made.inputs
        guarded = [a for a in values if scalar_of(a) is None]
        if len(guarded) != 1:
            return False
        shift = _unmoved(guarded[0])
    made = _produced_by(shift, p.reduce_max_p)
    if made is None:
        return False
    maximised, scores = _unmoved(made.inputs[0]), _unmoved(scores)
    while (masks := _produced_by(maximised, p.select_n_p)) is not None:
        values = [a for a in masks.inputs[1:] if scalar_of(a) is None]
        if len(values) != 1 or maximised is scores:
            break
        maximised = _unmoved(values[0])
    return maximised is scores
