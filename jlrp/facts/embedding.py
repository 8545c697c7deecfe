"""Embedding: the boundary at which an integer input turns into floats.

Rows fetched from a parameter table (a gather, a dynamic slice), a one-hot code, or the
integers themselves converted to floats. Integers are followed through movement and
integer arithmetic (index clamping, offsets), never through a comparison: a mask or a
position made from token ids is a constant.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jax.extend.core import primitives as p

from jlrp.bodies import bodies_of
from jlrp.errors import InputError
from jlrp.graph import Atom, Equation, Program, Value, between

MOVES = {
    p.broadcast_in_dim_p,
    p.concatenate_p,
    p.copy_p,
    p.convert_element_type_p,
    p.device_put_p,
    p.dynamic_slice_p,
    p.dynamic_update_slice_p,
    p.gather_p,
    p.pad_p,
    p.reshape_p,
    p.rev_p,
    p.scatter_p,
    p.slice_p,
    p.squeeze_p,
    p.stop_gradient_p,
    p.transpose_p,
}
ARITHMETIC = {
    p.abs_p,
    p.add_p,
    p.add_jaxvals_p,
    p.and_p,
    p.clamp_p,
    p.div_p,
    p.max_p,
    p.min_p,
    p.mul_p,
    p.neg_p,
    p.or_p,
    p.rem_p,
    p.select_n_p,
    p.shift_left_p,
    p.shift_right_arithmetic_p,
    p.shift_right_logical_p,
    p.sub_p,
    p.xor_p,
}


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
        v: frozenset({v}) for v in sources if is_integer(v)
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
        prim = equation.primitive
        if prim is p.eq_p:
            if _is_one_hot(equation, carried, dependent):
                carried[out] = origins
        elif prim not in MOVES | ARITHMETIC:
            continue
        elif is_integer(out) or (out.dtype == np.bool_ and prim in MOVES):
            carried[out] = origins
        elif jnp.issubdtype(out.dtype, jnp.floating) and _enters(equation, dependent):
            found[out] = origins
    return {
        end: _embedding(end, [v for v in sources if v in origins], frozenset(carried))
        for end, origins in found.items()
    }


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
    end: Value, starts: Sequence[Value], carried: frozenset[Value]
) -> Embedding:
    equations, constants = between(starts, [end], lambda _: True)
    return Embedding(tuple(starts), end, equations, constants, carried)


def is_integer(atom: Atom) -> bool:
    return jnp.issubdtype(atom.dtype, jnp.integer)


def _enters(equation: Equation, dependent: set[Atom]) -> bool:
    """Whether a float output is an integer's own embedding."""
    prim = equation.primitive
    if prim is p.convert_element_type_p:
        return True
    if prim in (p.gather_p, p.dynamic_slice_p):
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
        if atom.producer.primitive not in (
            MOVES - {p.concatenate_p, p.gather_p, p.dynamic_update_slice_p}
        ):
            return int(np.prod(atom.shape)) > 1
        (atom, *_) = atom.producer.inputs
    return int(np.prod(atom.shape)) > 1
