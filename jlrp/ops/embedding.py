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

import jax.numpy as jnp
import numpy as np
from jax.extend.core import primitives as p

from jlrp.analysis.dataflow import Flow, Passage, dependent, reached
from jlrp.analysis.intervals import scalar_of
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
    starts = {v: frozenset({v}) for v in _possible_codes(program, sources)}
    if not starts:
        return {}
    codes = _Codes(dependent(program, sources))
    carried = frozenset(codes.forward(program, starts))
    return {
        end: _embedding(end, [v for v in sources if v in origins], carried)
        for end, origins in codes.entered.items()
    }


class _Codes(Flow[frozenset[Value]]):
    """Of which sources a value is the integers, or their one-hot code.

    Attributes:
      entered: the same of the floats that embed them.
    """

    nothing = frozenset[Value]()

    def __init__(self, from_sources: set[Value]) -> None:
        super().__init__()
        self.from_sources = from_sources
        self.entered: dict[Value, frozenset[Value]] = {}
        self._one_hot: set[Value] = set()

    def join(self, a: frozenset[Value], b: frozenset[Value]) -> frozenset[Value]:
        return a | b

    def transfer(
        self, equation: Equation, operands: list[frozenset[Value]]
    ) -> list[frozenset[Value]]:
        codes = [a for a, of in zip(equation.inputs, operands, strict=True) if of]
        _refuse_inside_bodies(equation, codes)
        origins, none = self.nothing.union(*operands), self.nothing
        if self._fetches(equation, codes):
            self.entered[equation.outputs[0]] = origins
            return [none]
        self._mark_one_hot(equation, codes)
        if len(equation.outputs) == 1 and self._is_code(equation, codes):
            return [origins]
        if len(equation.outputs) == 1 and self._enters(equation, codes):
            self.entered[equation.outputs[0]] = origins
            if equation.primitive is p.convert_element_type_p:  # to be cast back
                return [origins]
        return [none] * len(equation.outputs)

    def _mark_one_hot(self, equation: Equation, codes: Sequence[Atom]) -> None:
        """A comparison of an integer with a row of constants, moved or cast or not."""
        compared = equation.primitive is p.eq_p and self._is_one_hot(equation, codes)
        moves = traits(equation).codes == "moves" and len(equation.inputs) == 1
        if compared or (moves and self._one_hot.issuperset(codes) and codes):
            self._one_hot.update(equation.outputs)

    def _fetches(self, equation: Equation, codes: Sequence[Atom]) -> bool:
        """Whether a one-hot code takes rows of a table: ``one_hot(ids) @ table``."""
        if equation.primitive is not p.dot_general_p or len(codes) != 1:
            return False
        others = [a for a in equation.inputs if a not in codes]
        hot = self._one_hot.issuperset(codes)
        return hot and len(others) == 1 and others[0] not in self.from_sources

    def _is_code(self, equation: Equation, codes: Sequence[Atom]) -> bool:
        """Whether the output is a code as the operands are."""
        prim, (out,) = equation.primitive, equation.outputs
        if prim is p.eq_p:
            return self._is_one_hot(equation, codes)
        codes_as = traits(equation).codes
        if codes_as is None:
            return False
        if _is_float(out):
            return all(map(_is_float, codes)) and _keeps_codes(equation, codes)
        return is_integer(out) or (out.dtype == np.bool_ and codes_as == "moves")

    def _is_one_hot(self, equation: Equation, codes: Sequence[Atom]) -> bool:
        """An integer compared with a row of constants; with one constant, a mask."""
        others = [a for a in equation.inputs if a not in self.from_sources]
        return len(codes) == 1 == len(others) and _varies(others[0])

    def _enters(self, equation: Equation, codes: Sequence[Atom]) -> bool:
        """Whether a float output is an integer's own embedding."""
        prim, (out,) = equation.primitive, equation.outputs
        if not _is_float(out) or all(map(_is_float, codes)):
            return False
        if prim is p.convert_element_type_p or traits(equation).contraction:
            return True
        if traits(equation).fetches:
            return equation.inputs[0] not in self.from_sources
        # A one-hot code's numbers are constants; among others an integer only chooses.
        chooses = prim is p.select_n_p
        return chooses and self.from_sources.isdisjoint(equation.inputs[1:])


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
    def moves(equation: Equation, _: object) -> bool:
        return traits(equation).codes == "moves" and not _counts(equation)

    flow = Passage(moves)
    moved, from_x = reached(flow, program, [source]), dependent(program, sources)

    def counts(equation: Equation) -> bool:
        others = set(equation.inputs) - moved
        return _counts(equation) or from_x.isdisjoint(others)

    counting = [
        counts(e)
        for e in program.equations
        if (_counts(e) or traits(e).contraction or traits(e).scaling)
        and not moved.isdisjoint(e.inputs)
    ]
    return bool(counting) and all(counting)


def _counts(equation: Equation) -> bool:
    """Whether booleans are summed by it, or stand beside numbers."""
    return equation.primitive in (p.concatenate_p, p.cumsum_p, p.reduce_sum_p)


def _keeps_codes(equation: Equation, codes: Sequence[Atom]) -> bool:
    """Whether floats that may be codes are only moved, or meet integer literals."""
    row = traits(equation)
    if row.codes == "moves":
        return True
    others = [a for a in equation.inputs if a not in codes and a.dtype != np.bool_]
    numbers = [scalar_of(a) for a in others]
    clamps = row.addition or row.clipping or equation.primitive is p.select_n_p
    return clamps and all(n is not None and float(n).is_integer() for n in numbers)


def _refuse_inside_bodies(equation: Equation, codes: Sequence[Atom]) -> None:
    """Integers that a loop or branch embeds would lose their relevance silently."""
    for body in bodies_of(equation):
        pairs = zip(body.program.inputs, body.operands(equation), strict=True)
        entering = [v for v, a in pairs if a in codes]
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
