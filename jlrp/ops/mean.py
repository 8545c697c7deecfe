"""Sums and means: reductions, and contractions with a number in place of a kernel.

``x @ ones(n)`` is ``x.sum(-1)``, ``x @ full(n, 1 / n)`` is ``x.mean(-1)``. A scale of
one over the count right behind a sum belongs to it.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from jax.extend.core import primitives as p

from jlrp.analysis.intervals import scalar_of
from jlrp.analysis.terms import Terms
from jlrp.ir.primitives import traits
from jlrp.ir.program import Equation, Program, Value


def mean_kind(equation: Equation) -> str:
    """The kind of a sum that is divided by its count."""
    return traits(equation).mean or "mean"


def weight_of(program: Program, equation: Equation) -> float | None:
    """The one number by which a sum over axes or windows weighs its operand."""
    if equation.primitive in (p.reduce_sum_p, p.reduce_window_sum_p):
        return 1.0
    if equation.primitive is not p.dot_general_p:
        return None
    (lhs, rhs), _ = equation.params["dimension_numbers"]
    still = [a for a in equation.inputs if not program.is_active(a)]
    if len(still) != 1 or not (lhs or rhs):
        return None
    known = scalar_of(still[0])
    return None if known is None or np.iscomplexobj(known) else float(known)


def count_of(equation: Equation) -> int:
    """How many numbers a sum adds up."""
    params, shape = equation.params, equation.inputs[0].shape
    if equation.primitive is p.reduce_sum_p:
        return math.prod(shape[i] for i in params["axes"])
    if equation.primitive is p.reduce_window_sum_p:
        return math.prod(params["window_dimensions"])
    (lhs, _), _ = params["dimension_numbers"]
    return math.prod(shape[i] for i in lhs)


def mean_of(terms: Terms, value: Value) -> Equation | None:
    """The sum that a value is, times one over its count, moved or not between."""
    program, scale = terms.program, 1.0
    while (made := value.producer) is not None:
        if made.primitive in terms.opaque:
            return None
        before = terms.before_trip(value)
        if before is not value:
            value = before
            continue
        operands = program.active_inputs(made)
        weight = weight_of(program, made)
        if weight is not None and len(operands) == 1:
            share = scale * weight * count_of(made)
            return made if math.isclose(share, 1.0, rel_tol=1e-5) else None
        if len(operands) != 1:
            return None
        if traits(made).scaling:
            others = [a for a in made.inputs if a is not operands[0]]
            known: Any = scalar_of(others[0]) if others else None
            inverts = made.primitive is p.div_p and made.inputs[1] is operands[0]
            if known is None or inverts or not np.all(known) or np.imag(known):
                return None
            known = np.real(known)
            scale *= float(known) if made.primitive is p.mul_p else 1 / float(known)
        elif not traits(made).view:
            return None
        (value,) = operands
        if not program.used_once(value):
            return None
    return None
