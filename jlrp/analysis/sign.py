"""Sign: values that are provably non-negative or non-positive.

With non-negative inputs the four-term rules (gamma, z+, alpha-beta) need half the work.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from jax.extend.core import primitives as p

from jlrp.analysis.scalar import Scalar, scalar_of
from jlrp.ir.primitives import traits
from jlrp.ir.program import Atom, Equation, Program, Value

Sign = int | None  # +1: never negative, -1: never positive, 0: zero, None: unknown

_SIGN_PRESERVING = {  # a part of the numbers, or sums of them, has their sign
    p.cumsum_p,
    p.cummax_p,
    p.cummin_p,
    p.dynamic_slice_p,
    p.reduce_max_p,
    p.reduce_min_p,
    p.reduce_sum_p,
    p.reduce_window_max_p,
    p.reduce_window_sum_p,
    p.rev_p,
    p.slice_p,
    p.sort_p,
}
_JOINS = {p.add_p, p.add_jaxvals_p, p.concatenate_p, p.dynamic_update_slice_p}


def signs(program: Program) -> dict[Value, int]:
    """The known signs of the program's values, found in one forward walk."""
    known: dict[Value, int] = {}
    scalars: dict[Value, Scalar] = {}

    def sign_of(atom: Atom) -> Sign:
        if isinstance(atom, Value) and atom in known:
            return known[atom]
        number = scalar_of(atom, scalars)
        if number is None or np.iscomplexobj(number):
            return None
        sign = np.sign(np.asarray(number, np.float64))
        return None if np.isnan(sign) else int(sign)

    for equation in program.equations:
        sign = _equation_sign(equation, sign_of)
        if sign is not None:
            known.update(dict.fromkeys(equation.outputs, sign))
    return known


def _equation_sign(equation: Equation, sign_of: Callable[[Atom], Sign]) -> Sign:
    prim, x = equation.primitive, equation.inputs
    row, params = traits(equation), equation.params
    if row.activation and row.range_with(params)[0] >= 0:
        return +1
    if row.view or prim in _SIGN_PRESERVING:
        return sign_of(x[0])
    if row.monotone_with(params) == +1 and row.value([0.0], params) == 0:
        return sign_of(x[0])
    if prim is p.integer_pow_p:
        return sign_of(x[0])  # an odd one
    if prim is p.neg_p:
        return _negated(sign_of(x[0]))
    if prim is p.sub_p:
        return _joined([sign_of(x[0]), _negated(sign_of(x[1]))])
    if prim in (p.mul_p, p.div_p, p.dot_general_p, p.conv_general_dilated_p):
        if prim is p.mul_p and x[0] is x[1]:
            return +1
        a, b = sign_of(x[0]), sign_of(x[1])
        return None if a is None or b is None else a * b
    if prim is p.max_p:
        return +1 if +1 in (s := [sign_of(a) for a in x]) or 0 in s else _joined(s)
    if prim is p.min_p:
        return -1 if -1 in (s := [sign_of(a) for a in x]) or 0 in s else _joined(s)
    if prim is p.clamp_p:
        low, _, high = (sign_of(a) for a in x)
        return +1 if low in (0, 1) else -1 if high in (0, -1) else sign_of(x[1])
    if prim is p.select_n_p:
        return _joined([sign_of(a) for a in x[1:]])
    if prim is p.pad_p or prim in _JOINS:
        values = x[:2] if prim is not p.concatenate_p else x
        return _joined([sign_of(a) for a in values])
    return None


def _negated(sign: Sign) -> Sign:
    return None if sign is None else -sign


def _joined(signs: list[Any]) -> Sign:
    """The sign of a value that mixes or adds values of these signs."""
    found = set(signs) - {0}
    return None if None in found or len(found) > 1 else next(iter(found), 0)
