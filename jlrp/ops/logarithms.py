"""Logarithms of sums of exponentials: log-softmax and logsumexp, however added up."""

from __future__ import annotations

from functools import cached_property

from jax.extend.core import primitives as p

from jlrp.analysis.terms import (
    Factor,
    Function,
    Reading,
    Root,
    Term,
    View,
    factors_of,
)
from jlrp.ir.program import Value, produced_by
from jlrp.ops.alike import Amounts, amounts, equal, seen_from, with_sums_opened
from jlrp.ops.exponentials import Exponentials, Softmax
from jlrp.ops.parts import is_part_of

LOGS = (p.log_p, p.log1p_p)


class Logarithms:
    """Finds the log-softmax, or the logsumexp, that ends at a value."""

    def __init__(self, exponentials: Exponentials):
        self.exponentials = exponentials
        self.terms, self.program = exponentials.terms, exponentials.program

    @cached_property
    def _logs(self) -> set[Root]:
        """The values that are logarithms of sums of exponentials, perhaps."""
        made = (e for e in self.program.equations if e.primitive in LOGS)
        return {v for e in made for v in e.outputs if v in self.program.active}

    def ending_at(self, end: Value) -> Softmax | None:
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
            rest = with_sums_opened(self.terms, rest)
            if term.coefficient == -1:
                return self._log_softmax(rest, *found, term.factors[0])
            return self._logsumexp(rest, *found) if term.coefficient == 1 else None
        return None

    def _log_softmax(
        self, minuend: Reading, function: Function, summed: Term, log: Factor
    ) -> Softmax | None:
        if not equal(amounts(minuend), self._exponents(function, summed)):
            return None
        scores = self.exponentials.scores(function, summed)
        seen = self._view_of(function)
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
        return self.exponentials.with_rows(found, function, summed, still)

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
        below = self.terms.active(
            with_sums_opened(self.terms, self.terms.operand(scores))
        )
        whole = View.whole(scores.shape)
        if seen_from(above) == seen_from(below):
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
            return self._of_rows(self.exponentials.exponent(function), function, summed)
        unshifted = self._exponents(function, summed)
        for what, amount in amounts(added).items():
            unshifted[what] += amount
        if not equal(unshifted, amounts(self.terms.active(self._of(function)))):
            return None
        scores = self.exponentials.scores(function, summed)
        return self._of_rows(scores, function, summed)

    def _of_rows(
        self, scores: Value | None, function: Function, summed: Term
    ) -> Softmax | None:
        if scores is None:
            return None
        return self.exponentials.with_rows(Softmax(scores), function, summed)

    def _of(self, function: Function) -> Reading:
        """What a function is of."""
        return with_sums_opened(self.terms, function.argument)

    def _exponents(self, function: Function, summed: Term) -> Amounts:
        """What is exponentiated, and what the exponentials are divided by."""
        found = amounts(self._of(function))
        for factor in summed.factors:
            root = factor.root
            if root is not function and isinstance(root, Function):
                for what, number in amounts(self._of(root)).items():
                    found[what] += factor.power * number
        return found

    def _log_of_exponentials(self, atom: Root) -> tuple[Function, Term] | None:
        made = produced_by(atom, *LOGS)
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
