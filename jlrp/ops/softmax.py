"""Softmax: a quotient of an exp by its own sum; its logarithm; the log of that sum.

Found on terms: with or without the max shift, with masks before or after the exp, in
any spelling of the exponential, of the sum and of the quotient. Renormalised weights
(those of the best experts, divided by their sum) are the softmax that they equal.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from jax.extend.core import primitives as p

from jlrp.analysis.intervals import scalar_of
from jlrp.analysis.terms import (
    Factor,
    Function,
    Reading,
    Root,
    Term,
    Terms,
    View,
    factors_of,
    refined,
    strides_of,
    varying_axes,
)
from jlrp.ir.primitives import primitives_where, traits
from jlrp.ir.program import Atom, Equation, Program, Value, between, produced_by

_MOVES = primitives_where(lambda row: row.view) | {p.stop_gradient_p}
_MASKS = primitives_where(lambda row: row.addition or row.scaling) | {p.select_n_p}
_LOGS = (p.log_p, p.log1p_p)
_SELECTIONS = (p.top_k_p, p.approx_top_k_p, p.sort_p, p.gather_p)


@dataclass(frozen=True)
class Softmax:
    """A softmax, log-softmax or logsumexp.

    Attributes:
      scores: what it is a function of, before the shift, behind scales and masks.
      weights: whether it is the softmax itself, weights that sum to one.
      axes: those along which it sums to one, if it is the quotient of a plain
        exponential and moves nothing.
      rows: the axes of the scores along which each row of weights lies, whole and where
        the scores are, however the sum is written.
      base: the logarithm of what is raised to the scores.
      layout: how weights that are as many as the scores see these, if they were moved.
    """

    scores: Value
    weights: bool = False
    axes: tuple[int, ...] | None = None
    rows: tuple[int, ...] | None = None
    base: float = 1.0
    layout: View | None = None


class Softmaxes:
    """Finds the softmax that ends at a value; remembered for one program."""

    def __init__(self, terms: Terms):
        self.terms = terms
        self.program = terms.program
        self._found: dict[Value, Softmax | None] = {}

    def ending_at(self, end: Value) -> Softmax | None:
        if end not in self._found:
            found = self._find(end)
            self._found[end] = found and self._of_all_read(found, end)
        return self._found[end]

    def _of_all_read(self, found: Softmax, end: Value) -> Softmax | None:
        """A softmax of scores before all moves by which they are read; None if it reads
        something else that carries relevance."""
        scores, active = found.scores, self.program.active
        first = self._with_sums_opened(self.terms.unmoved(scores))
        while scores in active:
            _, constants = between([scores], [end], active.__contains__)
            if active.isdisjoint(constants):
                break
            before = self.program.active_inputs(scores.producer)  # type: ignore
            if len(before) != 1 or not self._is_linear(scores):
                return None
            (scores,) = before
        else:
            return None
        if scores is found.scores:
            return found
        last = self.terms.unmoved(scores)
        first, last = map(self.terms.active, (first, last))
        if not _equal(_alike(first), _alike(last)):
            return None
        found = replace(found, scores=scores)
        if _seen_from(first) == _seen_from(last):
            return found
        return replace(found, rows=None, axes=None, layout=None)

    def _is_linear(self, value: Value) -> bool:
        """Whether a value is moved, or the sum of terms that are scaled."""
        made = value.producer
        if made is None:
            return False
        row = traits(made)
        linear = row.addition or row.scaling or made.primitive is p.neg_p
        return linear or made.primitive in _MOVES

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
        if traits(made).addition or prim in _LOGS:
            return self._of_logs(end)
        return None

    # The quotient.

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
            found = self._exponential(f.root for f in weights.factors)
            if found is not None:
                scores = self._scores(found, summed)
                axes = self._axes(end, found, summed)
                if scores is None:
                    return None
                views = self._views_of(found, term)
                still = views == [View.whole(scores.shape)]
                ordered = len(views) == 1 and views[0] and views[0].orders(scores.shape)
                layout = views[0] if ordered and not still else None
                return self._with_rows(
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

    def _with_rows(
        self, softmax: Softmax, function: Function, summed: Term, still: bool = True
    ) -> Softmax:
        """With the axes of its rows, if they are where the scores are."""
        axes = self._summed_axes(function, summed)
        shape, made = softmax.scores.shape, function.made_by
        if not still or axes is None or [e.outputs[0].shape for e in made] != [shape]:
            return softmax
        base = self._base(function)
        if base is None or math.prod(shape[i] for i in axes) != math.prod(summed.inner):
            return softmax
        return replace(softmax, rows=tuple(axes), base=base)

    def _base(self, function: Function) -> float | None:
        """The logarithm of what is raised to the scores, up to a shift of these."""
        exponent = self._exponent(function)
        (made, *_) = function.made_by
        operand = made.inputs[made.primitive is p.pow_p]
        if exponent is not operand:
            return 1.0
        scaled = {t.factors: t.coefficient for t in function.argument.terms}
        terms = self.terms.unmoved(operand).terms
        ratios = {scaled.get(t.factors, np.nan) / t.coefficient for t in terms}
        (first, *others) = ratios
        return None if others or first != first else float(np.real(first))

    def _exponential(self, roots: Iterable[Root]) -> Function | None:
        """The one exponential that some active roots are made of, through sums and
        selections."""
        stack = [r for r in roots if self.terms.is_active(r)]
        found: Function | None = None
        seen: set[Root] = set()
        while stack:
            root = stack.pop()
            if root in seen:
                continue
            seen.add(root)
            if isinstance(root, Function) and root.name == "exp":
                if found not in (None, root):
                    return None
                found = root
                continue
            inside = self.terms.opened(root)
            if inside is None:
                selected = _selected_from(root)
                if selected is None or not self.program.is_active(selected):
                    return None
                inside = self.terms.read(selected)
            roots_inside = [f.root for t in inside.terms for f in t.factors]
            stack += [r for r in roots_inside if self.terms.is_active(r)]
        return found

    def _scores(self, function: Function, summed: Term) -> Value | None:
        """What is exponentiated, before a shift that is constant along the sum.

        Whatever the shift, the multiplier of shifted scores sums to zero along the sum,
        so that of the unshifted ones is the same, and the shift gets none.
        """
        scores = self._exponent(function)
        while scores is not None and scores.producer is not None:
            made = scores.producer
            if not traits(made).addition:
                break
            unshifted, shift = made.inputs
            if made.primitive is not p.sub_p and not self.program.is_active(unshifted):
                unshifted, shift = shift, unshifted
            still = self._is_constant_along(shift, function, summed)
            if not still or not isinstance(unshifted, Value):
                break
            if made.primitive is not p.sub_p and self.program.is_parameter(shift):
                break  # a mask or a bias, which is a part of the scores
            scores = unshifted
        return scores

    def _exponent(self, function: Function) -> Value | None:
        """The value that an exponential was computed of; of several, their root."""
        made = function.made_by
        operands = {e.inputs[e.primitive is p.pow_p] for e in made}
        if len(operands) == 1:
            (exponent,) = operands
            known = isinstance(exponent, Value)
            return self._in_base_e(exponent, function) if known else None
        roots = {f.root for t in function.argument.terms for f in t.factors}
        if len(roots) != 1:
            return None
        (root,) = roots
        return root if isinstance(root, Value) else None

    def _in_base_e(self, exponent: Value, function: Function) -> Value:
        """x of ``2 ** (x * log2(e))``."""
        term, made = function.argument.only, exponent.producer
        if term is None or made is None or made.primitive not in (p.mul_p, p.div_p):
            return exponent
        operands = self.program.active_inputs(made)
        known = [scalar_of(a) for a in made.inputs if a not in operands]
        if len(operands) != 1 or len(known) != 1 or known[0] is None:
            return exponent
        scale = float(np.real(known[0]))
        scale = scale if made.primitive is p.mul_p else 1 / scale
        base_e = np.isclose(term.coefficient * scale, 1.0) and term.coefficient != 1
        return operands[0] if base_e else exponent

    def _is_constant_along(self, shift: Atom, function: Function, summed: Term) -> bool:
        axes = self._summed_axes(function, summed)
        if axes is None or not isinstance(shift, Value):
            return axes is not None and not shift.shape
        (out, *others) = (e.outputs[0] for e in function.made_by)
        if others or len(shift.shape) not in (0, len(out.shape)):
            return False
        views = [f.view for f in factors_of(self.terms.unmoved(shift)) if f.view.axes]
        return all(not any(s for _, s in view.axes[i]) for view in views for i in axes)

    def _summed_axes(self, function: Function, summed: Term) -> list[int] | None:
        """The axes of an exponential that a sum goes along, in part at least."""
        along = [
            (size, abs(f.inner[k]))
            for f in summed.factors
            if self._is(f.root, function)
            for k, size in enumerate(summed.inner)
        ]
        if not along:  # a sum of what was selected from it
            return None
        (made, *_) = function.made_by
        return self._axes_along(made.outputs[0], function, along)

    def _is(self, root: Root, function: Function) -> bool:
        """Whether a root is the function, or a value that is it, as it lies there."""
        if root is function or not isinstance(root, Value):
            return root is function
        term = self.terms.read(root).only
        if term is None or len(term.factors) != 1:
            return False
        (factor,) = term.factors
        return factor.root is function and factor.view == View.whole(function.shape)

    def summed_axes(self, weights: Value, summed: Term) -> list[int] | None:
        """The axes along which weights vary that a sum goes along."""
        term = self.terms.read(weights).only
        exponential = term and self._exponential(f.root for f in term.factors)
        roots = [f.root for f in term.factors] if term else []
        for root in (exponential, *roots, weights):
            along = [
                (size, abs(f.inner[k]))
                for f in summed.factors
                if f.root is root
                for k, size in enumerate(summed.inner)
            ]
            if exponential is not None and along:
                return self._axes_along(weights, root, along)  # type: ignore[arg-type]
        return None

    def _axes_along(
        self, value: Value, root: Root, along: Sequence[tuple[int, int]]
    ) -> list[int] | None:
        """The axes of a value that go along some digits of a root of it."""
        if value is root:
            view = View.whole(value.shape)
        else:
            factors = factors_of(self.terms.read(value))  # of expm1: and less one
            views = [f.view for f in factors if f.root is root]
            if len(views) != 1:
                return None
            (view,) = views

        def is_summed(digit: tuple[int, int]) -> bool:
            stride = abs(digit[1])
            return any(
                t <= stride < t * size or stride <= t < stride * digit[0]
                for size, t in along
                if t and stride
            )

        return [i for i, axis in enumerate(view.axes) if any(map(is_summed, axis))]

    def _axes(
        self, end: Value, function: Function, summed: Term
    ) -> tuple[int, ...] | None:
        """The axes of a quotient of a plain exponential by its whole sum."""
        if len(function.made_by) != 1 or len(summed.factors) != 1:
            return None
        (made,) = function.made_by
        assert end.producer is not None
        plain = made.primitive is p.exp_p and made.outputs[0] in end.producer.inputs
        total = _reduced_by(end.producer, made.outputs[0])
        return tuple(total.params["axes"]) if plain and total is not None else None

    # Over the rows that share an index.

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
            function = self._exponential(f.root for f in weights)
            scores = function and self._unshifted_in_segments(function, summed)
            return Softmax(scores, True) if scores is not None else None
        return None

    def _unshifted_in_segments(
        self, function: Function, summed: Equation
    ) -> Value | None:
        """Scores before a shift by the same number in all of a segment."""
        scores = self._exponent(function)
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

    # Logarithms.

    @cached_property
    def _logs(self) -> set[Root]:
        """The values that are logarithms of sums of exponentials, perhaps."""
        made = (e for e in self.program.equations if e.primitive in _LOGS)
        return {v for e in made for v in e.outputs if v in self.program.active}

    def _of_logs(self, end: Value) -> Softmax | None:
        """``e - log sum exp(e)``, or ``log sum exp(e)`` without a shift of e.

        In whatever order it is added up, and whatever the shift.
        """
        if not self._logs:
            return None
        reading = self.terms.read(end)
        for term in reading.terms:
            roots = [f.root for f in term.factors]
            if len(roots) != 1 or roots[0] not in self._logs or term.inner:
                continue
            found = self._log_of_exponentials(roots[0])
            if found is None or term.factors[0].power != 1:
                continue
            others = tuple(t for t in reading.terms if t is not term)
            rest = Reading(reading.shape, others, reading.constant)
            rest = self._with_sums_opened(rest)
            if term.coefficient == -1:
                return self._log_softmax(rest, *found, term.factors[0])
            return self._logsumexp(rest, *found) if term.coefficient == 1 else None
        return None

    def _log_softmax(
        self, minuend: Reading, function: Function, summed: Term, log: Factor
    ) -> Softmax | None:
        if not _equal(_alike(minuend), self._exponents(function, summed)):
            return None
        scores, seen = self._scores(function, summed), self._view_of(function)
        if scores is None or seen is None:
            return None
        moved = self._moved(scores, minuend)
        if moved is None:
            return None
        still = moved == View.whole(scores.shape)
        of_sum = self.terms.within(Reading(log.root.shape, (summed,)), log.view)
        seen = seen.after(moved)
        if of_sum is None or seen is None:
            return None
        (total,) = of_sum.terms
        exponentials = [f for f in total.factors if f.root is function]
        weights = Term(total.coefficient, (Factor(function, 1, seen, ()),), ())
        if not is_part_of(weights, total.with_factors(exponentials)):
            return None
        ordered = not still and moved.orders(scores.shape)
        found = Softmax(scores, layout=moved if ordered else None)
        return self._with_rows(found, function, summed, still)

    def _view_of(self, function: Function) -> View | None:
        """How the exponentials, as they were computed, see the function."""
        if len(function.made_by) != 1:
            return None
        (made,) = function.made_by
        views = [
            f.view
            for f in factors_of(self.terms.read(made.outputs[0]))
            if f.root is function
        ]
        return views[0] if len(views) == 1 else None

    def _moved(self, scores: Value, minuend: Reading) -> View | None:
        """How a minuend, which is made of the scores, sees these."""
        above = self.terms.active(minuend)
        below = self.terms.active(self._with_sums_opened(self.terms.operand(scores)))
        whole = View.whole(scores.shape)
        if _seen_from(above) == _seen_from(below):
            return whole
        (of_one, *others), (itself, *_) = above.terms, below.terms
        seen = [f.view for f in (*of_one.factors, *itself.factors)]
        return None if others or len(seen) > 2 or seen[1] != whole else seen[0]

    def _logsumexp(
        self, added: Reading, function: Function, summed: Term
    ) -> Softmax | None:
        if self.terms.active(added).terms:
            return None
        if not added.terms and not added.constant:
            exponent = self._exponent(function)
            return exponent and self._with_rows(Softmax(exponent), function, summed)
        unshifted = self._exponents(function, summed)
        for what, amount in _alike(added).items():
            unshifted[what] += amount
        if not _equal(
            unshifted, _alike(self.terms.active(self._exponents_of(function)))
        ):
            return None
        scores = self._scores(function, summed)
        return scores and self._with_rows(Softmax(scores), function, summed)

    def _exponents_of(self, function: Function) -> Reading:
        """What a function is of."""
        return self._with_sums_opened(function.argument)

    def _with_sums_opened(self, reading: Reading) -> Reading:
        """With what sums and scaled values are made of in place of these."""
        constant = reading.constant
        found, terms = list[Term](), list(reading.terms)
        while terms:
            term = terms.pop()
            opened = self._opened_sum(term)
            if opened is None:
                found.append(term)
                continue
            by = term.coefficient
            terms += (t._replace(coefficient=by * t.coefficient) for t in opened.terms)
            constant += by * opened.constant
        return Reading(reading.shape, tuple(found), constant)

    def _opened_sum(self, term: Term) -> Reading | None:
        (factor, *others) = term.factors
        if others or factor.power != 1:
            return None
        root = factor.root  # a function that is a sum, or it is not opened
        linear = isinstance(root, Function) or self._is_linear(root)
        return self.terms.expanded(factor) if linear else None

    def _exponents(self, function: Function, summed: Term) -> Amounts:
        """What is exponentiated, and what the exponentials are divided by."""
        found = _alike(self._exponents_of(function))
        for factor in summed.factors:
            root = factor.root
            if root is not function and isinstance(root, Function):
                for what, number in _alike(self._exponents_of(root)).items():
                    found[what] += factor.power * number
        return found

    def _log_of_exponentials(self, atom: Root) -> tuple[Function, Term] | None:
        made = produced_by(atom, *_LOGS)
        if made is None:
            return None
        total, terms = made.inputs[0], self.terms
        if not isinstance(total, Value):
            return None
        reading = terms.read(total)
        constant = reading.constant + (made.primitive is p.log1p_p)
        only = terms.active(reading).only
        if only is not None and (inner := _magnitude(only)) is not None:
            reading = terms.read(inner)
            constant += reading.constant
        reading = terms.closed(terms.active(reading))
        if constant or len(reading.terms) != 1 or not reading.terms[0].inner:
            return None
        (summed,) = reading.terms
        active = [f for f in summed.factors if terms.is_active(f.root)]
        if len(active) != 1 or active[0].power != 1:
            return None
        root = active[0].root
        exponential = isinstance(root, Function) and root.name == "exp"
        return (root, summed) if exponential else None  # type: ignore[return-value]


def _magnitude(term: Term) -> Value | None:
    """Of what a term is the magnitude, as the sum in jax's logsumexp."""
    if term.coefficient != 1 or term.inner or len(term.factors) != 1:
        return None
    absolute = produced_by(term.factors[0].root, p.abs_p)
    return absolute and absolute.inputs[0]  # type: ignore[return-value]


Amounts = defaultdict[Any, float]  # of products of roots, and of None: the constant


def _alike(reading: Reading) -> Amounts:
    """A reading by what its terms are made of, wherever it is seen from."""
    found: Amounts = defaultdict(float, {None: reading.constant})
    for term in reading.terms:
        powers: Amounts = defaultdict(float)
        for root, power in _roots(term.factors):
            powers[root] += power
        found[frozenset(powers.items())] += term.coefficient
    return found


def _equal(a: Amounts, b: Amounts) -> bool:
    return all(np.isclose(a[what], b[what]) for what in {*a, *b})


def _seen_from(reading: Reading) -> set[Any]:
    return {(t.inner, tuple(f.view for f in t.factors)) for t in reading.terms}


def is_part_of(weights: Term, summed: Term) -> bool:
    """Whether a sum is that of all weights, summed along all in which they differ.

    So that, divided by it, the weights sum to one.
    """
    if not summed.inner or len(weights.factors) != len(summed.factors):
        return False
    if weights.inner or not np.isclose(weights.coefficient, summed.coefficient):
        return False
    pairs = list(zip(weights.factors, summed.factors, strict=True))
    if any(a.root is not b.root or a.power != b.power for a, b in pairs):
        return False
    index = _Index(summed)
    start = [a.view.offset - b.view.offset for a, b in pairs]
    if not index.moves(start, 1):
        return False
    for i in range(len(pairs[0][0].view.axes)):
        axes = [f.view.axes[i] for f in (*weights.factors, *summed.factors)]
        sizes = refined(axes)
        strides = sizes and [strides_of(axis, sizes) for axis in axes]
        if sizes is None or (strides and None in strides):
            return False
        for k, size in enumerate(sizes):
            at = [s[k] for s in strides or ()]  # type: ignore[index]
            half = len(pairs)
            step = [a - b for a, b in zip(at[:half], at[half:], strict=True)]
            if any(step) and not index.moves(step, size):
                return False
    return True


class _Index:
    """An index into the summed digits of a term, and how far it has been moved."""

    def __init__(self, summed: Term):
        self.digits = [
            (size, [f.inner[k] for f in summed.factors])
            for k, size in enumerate(summed.inner)
        ]
        self._low = [0] * len(self.digits)
        self._high = [0] * len(self.digits)

    def moves(self, step: Sequence[int], size: int) -> bool:
        """Whether steps move it along its digits, and stay within them."""
        order = sorted(
            range(len(self.digits)), key=lambda k: -max(map(abs, self.digits[k][1]))
        )
        left = list(step)
        for k in order:
            along = self.digits[k][1]
            main = max(range(len(along)), key=lambda i: abs(along[i]))
            times = int(left[main] / along[main])
            if not times:
                continue
            left = [a - times * b for a, b in zip(left, along, strict=True)]
            far = times * (size - 1)
            self._low[k] += times if size == 1 else min(far, 0)
            self._high[k] += times if size == 1 else max(far, 0)
        if any(left):
            return False
        bounds = zip(self.digits, self._low, self._high, strict=True)
        return all(low >= 0 and high < n for (n, _), low, high in bounds)


def may_be_minus_infinity(program: Program, scores: Value) -> bool:
    """Whether a mask of -inf, or of numbers unknown here, was laid on the scores."""
    value = scores
    while value.producer is not None:
        equation = value.producer
        operands = program.active_inputs(equation)
        if len(operands) != 1 or equation.primitive not in _MASKS | _MOVES:
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


def _selected_from(root: Root) -> Value | None:
    """What the numbers of a value were selected from, if they are in no other way
    changed: the best of them, or those at some indices."""
    made = root.producer if isinstance(root, Value) else None
    if made is None or made.primitive not in _SELECTIONS:
        return None
    assert isinstance(root, Value)
    place = made.outputs.index(root) if made.primitive is p.sort_p else 0
    if made.primitive is not p.sort_p and root is not made.outputs[0]:
        return None
    operand = made.inputs[place]
    return operand if isinstance(operand, Value) else None


def _reduced_by(quotient: Equation, exponential: Value) -> Equation | None:
    """The sum over axes that a quotient divides an exponential by, and nothing else."""
    for atom in quotient.inputs:
        made = produced_by(unmoved(atom), p.reduce_sum_p, p.div_p, p.integer_pow_p)
        while made is not None and made.primitive is not p.reduce_sum_p:
            inner = unmoved(made.inputs[-1])
            made = produced_by(inner, p.reduce_sum_p)
        if made is not None and made.inputs[0] is exponential:
            return made
    return None


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


def _both_ways(equation: Equation) -> Iterator[tuple[Atom, Atom]]:
    a, b = equation.inputs
    yield a, b
    yield b, a


def unmoved(atom: Atom) -> Atom:
    """An atom before it was moved without a change of its numbers."""
    while isinstance(atom, Value) and atom.producer is not None:
        if atom.producer.primitive not in _MOVES:
            break
        atom = atom.producer.inputs[0]
    return atom
