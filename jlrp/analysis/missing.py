"""Missing: where a program replaces what is not a number, or infinite.

``where(isnan(x), c, x)``, ``nan_to_num``, ``nansum``: a selection between x and a
constant, by a test of x itself that no finite number fails. It is no activation
function: relevance follows it, so that what is replaced gets none, values included.
"""

from __future__ import annotations

import numpy as np
from jax.extend.core import primitives as p

from jlrp.analysis.intervals import is_elementwise, scalar_of
from jlrp.ir.primitives import traits
from jlrp.ir.program import Atom, Equation, Program, Value


def replaces(program: Program, equation: Equation) -> bool:
    """Whether an equation replaces by a constant what of an operand is missing."""
    if equation.primitive is not p.select_n_p:
        return False
    which, *cases = equation.inputs
    active = [a for a in cases if program.is_active(a)]
    tested = tested_by(which)
    if len(active) != 1 or len(cases) != 2 or not tested:
        return False
    sources = elementwise_sources(active[0])
    return tested <= sources


def tested_by(atom: Atom, alone: bool = True) -> set[Value]:
    """The values of which a boolean tells whether they are valid; else none.

    ``alone``: it tells nothing else.
    """
    equation = atom.producer if isinstance(atom, Value) else None
    if equation is None:
        return set()
    row, operands = traits(equation), equation.inputs
    if equation.primitive is p.is_finite_p:
        return {_origin(operands[0])} - {None}  # type: ignore[return-value]
    if row.comparison:
        a, b = operands
        tested = {a} if a is b else _against_infinity(a, b) | _against_infinity(b, a)
        return {_origin(v) for v in tested} - {None}  # type: ignore[return-value]
    if row.view:
        return tested_by(operands[0], alone)
    if row.logic:
        parts = [tested_by(a, alone) for a in operands]
        return set() if alone and not all(parts) else set().union(*parts)
    return set()


def _against_infinity(a: Atom, b: Atom) -> set[Atom]:
    known = scalar_of(b)
    return {a} if known is not None and np.isinf(float(known)) else set()


def _origin(atom: Atom) -> Value | None:
    while isinstance(atom, Value) and atom.producer is not None:
        if not _is_as_valid(atom.producer):
            break
        atom = atom.producer.inputs[0]
    return atom if isinstance(atom, Value) else None


def _is_as_valid(equation: Equation) -> bool:
    """Whether its output is no number where its operand is none, and is as infinite."""
    row = traits(equation)
    return row.view or row.degree == 1 or equation.primitive is p.stop_gradient_p


def elementwise_sources(atom: Atom) -> set[Value]:
    """A value, and all that it is made of element by element."""
    found: set[Value] = set()
    stack = [atom]
    while stack:
        value = stack.pop()
        if not isinstance(value, Value) or value in found:
            continue
        found.add(value)
        made = value.producer
        if made is not None and (traits(made).view or is_elementwise(value)):
            stack += made.inputs
    return found
