"""Softmax: a quotient of an exp by its own sum; its logarithm; the log of that sum.

Found on terms: with or without the max shift, with masks before or after the exp, in
any spelling of the exponential, of the sum and of the quotient. Renormalised weights
(those of the best experts, divided by their sum) are the softmax that they equal.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
from jax.extend.core import primitives as p

from jlrp.analysis.intervals import scalar_of
from jlrp.analysis.terms import (
    Factor,
    Function,
    Root,
    Term,
    Terms,
    View,
    factors_of,
    varying_axes,
)
from jlrp.ir.names import with_names
from jlrp.ir.primitives import primitives_where, traits
from jlrp.ir.program import Atom, Equation, Program, Value, between, produced_by
from jlrp.ops.alike import (
    MOVES,
    amounts,
    equal,
    is_linear,
    seen_from,
    unmoved,
    with_sums_opened,
)
from jlrp.ops.exponentials import Exponentials, Softmax
from jlrp.ops.logarithms import LOGS, Logarithms
from jlrp.ops.parts import is_part_of

_MASKS = primitives_where(lambda row: row.addition or row.scaling) | {p.select_n_p}


class Softmaxes:
    """Finds the softmax that ends at a value; remembered for one program."""

    def __init__(self, terms: Terms):
        self.terms = terms
        self.program = terms.program
        self.exponentials = Exponentials(terms)
        self.logarithms = Logarithms(self.exponentials)
        self._found: dict[Value, Softmax | None] = {}

    def ending_at(self, end: Value) -> Softmax | None:
        if end not in self._found:
            found = self._find(end)
            if found is not None and found.scores not in self.program.active:
                found = None
            self._found[end] = found and self._of_all_read(found, end)
        return self._found[end]

    def _of_all_read(self, found: Softmax, end: Value) -> Softmax | None:
        """A softmax of the scores before all by which they are read, moved or negated
        twice; None if that is not the same."""
        program, chain = self.program, list(self._linearly_before(found.scores))
        _, beside = between([found.scores], [end], program.active.__contains__)
        origin = 0
        for value in filter(program.active.__contains__, beside):
            before = (v for v in self._linearly_before(value) if v in chain)
            shared = next((chain.index(v) for v in before), 0)
            origin = max(origin, shared)
        scores = chain[origin]
        if scores is found.scores:
            return found
        if not with_names(program).isdisjoint(chain[:origin]):
            return None  # relevance may be asked for at what would be inside
        first = with_sums_opened(self.terms, self.terms.unmoved(found.scores))
        last = self.terms.unmoved(scores)
        first, last = map(self.terms.active, (first, last))
        if not equal(amounts(first), amounts(last)):
            return None
        found = replace(found, scores=scores)
        if seen_from(first) == seen_from(last):
            return found
        return replace(found, rows=None, axes=None, layout=None)

    def _linearly_before(self, value: Value) -> Iterator[Value]:
        """A value, and those that it is a move, a multiple or a shift of."""
        while True:
            yield value
            moved = self.terms.before_moves(value)
            before = moved[0] if moved is not None else value
            if before is value:
                if not is_linear(value):
                    return
                sources = self.program.active_inputs(value.producer)  # type: ignore
                if len(sources) != 1:
                    return
                (before,) = sources
            value = before

    def are_weights(self, end: Value) -> bool:
        found = self.ending_at(end)
        return found is not None and found.weights

    def _find(self, end: Value) -> Softmax | None:
        made = end.producer
        if made is None or end not in self.program.active:
            return None
        prim = made.primitive
        divides = prim is p.div_p and self.program.is_active(made.inputs[1])
        if divides or (prim is p.mul_p and any(map(_inverts, made.inputs))):
            return self._quotient(end) or self._of_segments(end)
        if traits(made).addition or prim in LOGS:
            return self.logarithms.ending_at(end)
        return None

    def _quotient(self, end: Value) -> Softmax | None:
        terms = self.terms
        term = terms.read(end).only
        if term is None:
            return None
        for i, factor in enumerate(term.factors):
            if factor.power != -1:
                continue
            total = terms.expanded(factor)
            total = total and terms.closed(terms.active(total))
            others = (f for k, f in enumerate(term.factors) if k != i)
            weights = term.with_factors(others)
            if total is None or len(total.terms) != 1:
                continue
            (summed,) = total.terms
            weights = terms.normal(weights)
            if not is_part_of(weights, summed):
                continue
            found = self.exponentials.behind(f.root for f in weights.factors)
            if found is not None:
                scores = self.exponentials.scores(found, summed)
                axes = self.exponentials.axes(end, found, summed)
                if scores is None:
                    return None
                views = self._views_of(found, term)
                still = views == [View.whole(scores.shape)]
                ordered = len(views) == 1 and views[0] and views[0].orders(scores.shape)
                layout = views[0] if ordered and not still else None
                return self.exponentials.with_rows(
                    Softmax(scores, True, axes, layout=layout), found, summed, still
                )
        return None

    def _views_of(self, function: Function, term: Term) -> list[View | None]:
        """How a term sees a function: as it is, or by way of a value made of it."""
        found = []
        for factor in term.factors:
            if factor.root is function:
                found.append(factor.view)
            elif isinstance(factor.root, Value):
                of_value = self.terms.read(factor.root).only
                inner = of_value.factors if of_value is not None else ()
                views = (f.view for f in inner if f.root is function)
                found += [view.after(factor.view) for view in views]
        return found

    def _of_segments(self, end: Value) -> Softmax | None:
        """As over a node's neighbours: the sum is scattered to its segment, and
        gathered by the same index."""
        terms = self.terms
        term = terms.read(end).only
        for i, factor in enumerate(term.factors if term else ()):
            if factor.power != -1:
                continue
            total = self._unstabilised(factor.root)
            fetched = produced_by(total, p.gather_p)
            summed = fetched and produced_by(
                self._unstabilised(fetched.inputs[0]), p.scatter_add_p
            )
            if fetched is None or summed is None or not _same_rows(fetched, summed):
                continue
            start, _, updates = summed.inputs
            added = terms.operand(updates).only
            weights = [f for k, f in enumerate(term.factors) if k != i]  # type: ignore
            alike = added is not None and _roots(weights) == _roots(added.factors)
            if not alike or np.any(scalar_of(start) != 0):
                continue
            function = self.exponentials.behind(f.root for f in weights)
            scores = function and self._unshifted_in_segments(function, summed)
            return Softmax(scores, True) if scores is not None else None
        return None

    def _unshifted_in_segments(
        self, function: Function, summed: Equation
    ) -> Value | None:
        """Scores before a shift by the same number in all of a segment."""
        scores = self.exponentials.exponent(function)
        made = produced_by(scores, p.sub_p)
        if made is None:
            return scores
        unshifted, shift = made.inputs
        fetched = produced_by(unmoved(shift), p.gather_p)
        of_segments = fetched is not None and _same_rows(fetched, summed)
        if of_segments or not varying_axes(self.terms.operand(shift)):
            return unshifted if isinstance(unshifted, Value) else None
        return scores

    def _unstabilised(self, total: Root | Atom) -> Root | Atom:
        """``sum`` in ``sum + eps`` or ``max(sum, eps)``."""
        if isinstance(total, Function):
            active = self.terms.active(total.argument)
            roots = [f.root for f in factors_of(active)]
            return roots[0] if total.name == "sum" and len(roots) == 1 else total
        total = unmoved(total)
        made = produced_by(total, p.add_p, p.max_p)
        operands = self.program.active_inputs(made) if made is not None else ()
        return unmoved(operands[0]) if len(operands) == 1 else total


def may_be_minus_infinity(program: Program, scores: Value) -> bool:
    """Whether a mask of -inf, or of numbers unknown here, was laid on the scores."""
    value = scores
    while value.producer is not None:
        equation = value.producer
        operands = program.active_inputs(equation)
        if len(operands) != 1 or equation.primitive not in _MASKS | MOVES:
            return False
        constants = [a for a in equation.inputs if a is not operands[0] and a.shape]
        floats = [a for a in constants if np.issubdtype(a.dtype, np.floating)]
        for known in map(scalar_of, floats):
            if known is None or not np.all(np.isfinite(np.asarray(known, np.float64))):
                return True
        (value,) = operands
    return False


def _inverts(atom: Atom) -> bool:
    """Whether an operand may be one over something."""
    made = produced_by(unmoved(atom), p.div_p, p.integer_pow_p, p.pow_p)
    return made is not None and made.params.get("y", -1) < 0


def _roots(factors: Sequence[Factor]) -> list[tuple[Root, float]]:
    return [(f.root, f.power) for f in factors]


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
        index = unmoved(index)
        made = produced_by(index, p.select_n_p)
        if made is None:
            return index
        below, *cases = made.inputs
        compared = produced_by(below, p.lt_p)
        if compared is None or unmoved(compared.inputs[0]) is not unmoved(cases[0]):
            return index
        index = cases[0]
