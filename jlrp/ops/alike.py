"""Whether two readings are of the same numbers, wherever they are seen from."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np
from jax.extend.core import primitives as p

from jlrp.analysis.terms import Function, Reading, Term, Terms
from jlrp.ir.primitives import primitives_where, traits
from jlrp.ir.program import Atom, Value

MOVES = primitives_where(lambda row: row.view) | {p.stop_gradient_p}
Amounts = defaultdict[Any, float]  # of products of roots, and of None: the constant


def amounts(reading: Reading) -> Amounts:
    """A reading by what its terms are made of, wherever it is seen from."""
    found: Amounts = defaultdict(float, {None: reading.constant})
    for term in reading.terms:
        powers: Amounts = defaultdict(float)
        for factor in term.factors:
            powers[factor.root] += factor.power
        found[frozenset(powers.items())] += term.coefficient
    return found


def equal(a: Amounts, b: Amounts) -> bool:
    return all(np.isclose(a[what], b[what]) for what in {*a, *b})


def seen_from(reading: Reading) -> set[Any]:
    """How a reading sees its roots, whatever these are."""
    return {(t.inner, tuple(f.view for f in t.factors)) for t in reading.terms}


def with_sums_opened(terms: Terms, reading: Reading) -> Reading:
    """A reading with what sums and scaled values are made of in place of these."""
    constant = reading.constant
    found, left = list[Term](), list(reading.terms)
    while left:
        term = left.pop()
        opened = _opened_sum(terms, term)
        if opened is None:
            found.append(term)
            continue
        by = term.coefficient
        left += (t._replace(coefficient=by * t.coefficient) for t in opened.terms)
        constant += by * opened.constant
    return Reading(reading.shape, tuple(found), constant)


def _opened_sum(terms: Terms, term: Term) -> Reading | None:
    (factor, *others) = term.factors
    if others or factor.power != 1:
        return None
    root = factor.root  # a function that is a sum, or it is not opened
    linear = isinstance(root, Function) or is_linear(root)
    return terms.expanded(factor) if linear else None


def is_linear(value: Value) -> bool:
    """Whether a value is moved, or the sum of terms that are scaled."""
    made = value.producer
    if made is None:
        return False
    row = traits(made)
    linear = row.addition or row.scaling or made.primitive is p.neg_p
    return linear or made.primitive in MOVES


def unmoved(atom: Atom) -> Atom:
    """An atom before it was moved without a change of its numbers."""
    while isinstance(atom, Value) and atom.producer is not None:
        if atom.producer.primitive not in MOVES:
            break
        atom = atom.producer.inputs[0]
    return atom
