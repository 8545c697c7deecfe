"""Embedding: the boundary at which an integer input turns into floats.

Rows fetched from a parameter table (a gather, a dynamic slice), a one-hot code, or the
integers themselves converted to floats. Integers are followed through movement and
integer arithmetic (index clamping, offsets), never through a comparison: a mask or a
position made from token ids is a constant. A float of x is a code too where only
movement and integer literals (index clamping) are before its cast to integers: ids that
came as floats, a column of codes in a table of floats.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.extend.core import primitives as p

from jlrp.analysis.scalar import scalar_of
from jlrp.errors import InputError
from jlrp.ir.loops import bodies_of
from jlrp.ir.primitives import traits
from jlrp.ir.program import Atom, Equation, Program, Value, between


@dataclass(frozen=True)
class Embedding:
    """``end``, made of the integers ``sources``.

    Attributes:
      carried: the values between that carry the integers, or their one-hot code.
    """

    sources: tuple[Value, ...]
    end: Value
    equations: tuple[Equation, ...]
    constants: tuple[Value, ...]
    carried: frozenset[Value]


def embeddings(program: Program, sources: Sequence[Value]) -> dict[Value, Embedding]:
    """The embeddings of the integer inputs among ``sources``, by their float value."""
    carried: dict[Value, frozenset[Value]] = {
        v: frozenset({v}) for v in _possible_codes(program, sources)
    }
    if not carried:
        return {}
    dependent: set[Atom] = set(sources)
    found: dict[Value, frozenset[Value]] = {}
    for equation in program.equations:
        from_sources = not dependent.isdisjoint(equation.inputs)
        if not from_sources:
            continue
        dependent.update(equation.outputs)
        _refuse_inside_bodies(equation, carried)
        operands = [a for a in equation.inputs if isinstance(a, Value)]
        origins = frozenset[Value]().union(*(carried.get(a, ()) for a in operands))
        (out, *others) = equation.outputs
        if not origins or others:
            continue
        prim, row = equation.primitive, traits(equation)
        if prim is p.eq_p:
            if _is_one_hot(equation, carried, dependent):
                carried[out] = origins
        elif row.contraction and not _is_float(out):
            continue
        elif row.codes is None and not row.contraction:
            continue
        elif _is_float(out) and _stays_float(equation, carried):
            if _keeps_codes(equation, carried):
                carried[out] = origins
        elif is_integer(out) or (out.dtype == np.bool_ and row.codes == "moves"):
            carried[out] = origins
        elif _is_float(out) and _enters(equation, dependent):
            found[out] = origins
            if prim is p.convert_element_type_p:  # it may become an integer again
                carried[out] = origins
    return {
        end: _embedding(end, [v for v in sources if v in origins], frozenset(carried))
        for end, origins in found.items()
    }


def _is_float(atom: Atom) -> bool:
    return jnp.issubdtype(atom.dtype, jnp.floating)


def _possible_codes(program: Program, sources: Sequence[Value]) -> list[Value]:
    """The inputs that may be codes, or numbers that are no floats.

    Booleans are numbers where they are summed or meet a kernel; where they are
    multiplied with what depends on x they are a mask.
    """
    are_cast = any(
        e.primitive is p.convert_element_type_p
        and _is_float(e.inputs[0])
        and is_integer(e.outputs[0])
        for e in program.equations
    )
    return [
        v
        for v in sources
        if is_integer(v)
        or (_is_float(v) and are_cast)
        or (v.dtype == np.bool_ and _is_counted(program, v, sources))
    ]


def _is_counted(program: Program, source: Value, sources: Sequence[Value]) -> bool:
    dependent: set[Atom] = set(sources)
    moved: set[Atom] = {source}
    counted = False
    for equation in program.equations:
        if dependent.isdisjoint(equation.inputs):
            continue
        dependent.update(equation.outputs)
        operands = [a for a in equation.inputs if a in moved]
        if not operands:
            continue
        row, others = traits(equation), set(equation.inputs) - moved
        multiplies = row.contraction or row.scaling
        if _counts(equation) or (multiplies and dependent.isdisjoint(others)):
            counted = True
        elif multiplies:
            return False
        elif row.codes == "moves":
            moved.update(equation.outputs)
    return counted


def _counts(equation: Equation) -> bool:
    """Whether booleans are summed by it, or stand beside numbers."""
    return equation.primitive in (p.concatenate_p, p.cumsum_p, p.reduce_sum_p)


def _stays_float(equation: Equation, carried: dict[Value, Any]) -> bool:
    """Whether all that is carried into an equation are floats."""
    return all(_is_float(a) for a in equation.inputs if a in carried)


def _keeps_codes(equation: Equation, carried: dict[Value, Any]) -> bool:
    """Whether floats that may be codes are only moved, or meet integer literals."""
    row = traits(equation)
    if row.codes == "moves":
        return True
    others = [a for a in equation.inputs if a not in carried and a.dtype != np.bool_]
    numbers = [scalar_of(a) for a in others]
    clamps = row.addition or row.clipping or equation.primitive is p.select_n_p
    return clamps and all(n is not None and float(n).is_integer() for n in numbers)


def _refuse_inside_bodies(
    equation: Equation, carried: dict[Value, frozenset[Value]]
) -> None:
    """Integers that a loop or branch embeds would lose their relevance silently."""
    for body in bodies_of(equation):
        pairs = zip(body.program.inputs, body.operands(equation), strict=True)
        entering = [v for v, a in pairs if isinstance(a, Value) and a in carried]
        if entering and embeddings(body.program, entering):
            raise InputError(
                f"{equation} turns integers of x into floats inside its body; their "
                "relevance is not handed out of it yet. Embed them before the loop or "
                "branch, or pass them with params."
            )


def _embedding(
    end: Value, origins: Sequence[Value], carried: frozenset[Value]
) -> Embedding:
    equations, constants = between(origins, [end], lambda _: True)
    return Embedding(tuple(origins), end, equations, constants, carried)


def is_integer(atom: Atom) -> bool:
    return jnp.issubdtype(atom.dtype, jnp.integer)


def _enters(equation: Equation, dependent: set[Atom]) -> bool:
    """Whether a float output is an integer's own embedding."""
    prim = equation.primitive
    if prim is p.convert_element_type_p or traits(equation).contraction:
        return True
    if traits(equation).fetches:
        (fetched, *_) = equation.inputs
        return fetched not in dependent
    # A one-hot code's numbers are constants; among others an integer only chooses.
    return prim is p.select_n_p and dependent.isdisjoint(equation.inputs[1:])


def _is_one_hot(equation: Equation, carried: dict, dependent: set[Atom]) -> bool:
    """An integer compared with a row of constants; with one constant it is a mask."""
    a, b = equation.inputs
    codes = [v for v in (a, b) if isinstance(v, Value) and v in carried]
    others = [v for v in (a, b) if not isinstance(v, Value) or v not in dependent]
    if len(codes) != 1 or len(others) != 1:
        return False
    return _varies(others[0])


def _varies(atom: Atom) -> bool:
    """Whether a constant holds different numbers: not a literal that was broadcast."""
    while isinstance(atom, Value) and atom.producer is not None:
        if atom.producer.primitive is p.iota_p:
            return True
        row, joins = traits(atom.producer), atom.producer.primitive in _JOINS
        if row.codes != "moves" or joins:
            return int(np.prod(atom.shape)) > 1
        (atom, *_) = atom.producer.inputs
    return int(np.prod(atom.shape)) > 1


_JOINS = (p.concatenate_p, p.gather_p, p.dynamic_update_slice_p)
