"""Exponentials of scores, and the rows along which they are summed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from jax.extend.core import primitives as p

from jlrp.analysis.intervals import scalar_of
from jlrp.analysis.terms import (
    Function,
    Root,
    Term,
    Terms,
    View,
    factors_of,
)
from jlrp.ir.primitives import traits
from jlrp.ir.program import Atom, Equation, Value, produced_by
from jlrp.ops.alike import unmoved

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


class Exponentials:
    """What the exponentials of a program are of, and how they are summed."""

    def __init__(self, terms: Terms):
        self.terms = terms
        self.program = terms.program

    def with_rows(
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
        exponent = self.exponent(function)
        (made, *_) = function.made_by
        operand = made.inputs[made.primitive is p.pow_p]
        if exponent is not operand:
            return 1.0
        scaled = {t.factors: t.coefficient for t in function.argument.terms}
        terms = self.terms.unmoved(operand).terms
        ratios = {scaled.get(t.factors, np.nan) / t.coefficient for t in terms}
        (first, *others) = ratios
        return None if others or first != first else float(np.real(first))

    def behind(self, roots: Iterable[Root]) -> Function | None:
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

    def scores(self, function: Function, summed: Term) -> Value | None:
        """What is exponentiated, before a shift that is constant along the sum.

        Whatever the shift, the multiplier of shifted scores sums to zero along the sum,
        so that of the unshifted ones is the same, and the shift gets none.
        """
        scores = self.exponent(function)
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

    def exponent(self, function: Function) -> Value | None:
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
        exponential = term and self.behind(f.root for f in term.factors)
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

    def axes(
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
