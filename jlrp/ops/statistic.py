"""Statistic: in a product or quotient, an operand that only measures the other's
source.

Layer, RMS, group and instance norms divide a signal by a number computed from the same
signal by a reduction and elementwise functions. That operand gets no relevance and the
signal gets all of it (AttnLRP, Prop. 3.4). A learned map on the way (a dot, a
convolution, a shift by a parameter) makes it a gate, however it is broadcast.
"""

from __future__ import annotations

import heapq
import math

from jax.extend.core import primitives as p

from jlrp.analysis.intervals import scalar_of
from jlrp.analysis.terms import Terms, factors_of, is_move
from jlrp.ir.primitives import traits
from jlrp.ir.program import Atom, Equation, Program, Value
from jlrp.ops.contraction import is_learned
from jlrp.ops.mean import weight_of


def _moves(equation: Equation) -> bool:
    return traits(equation).layout or equation.primitive is p.stop_gradient_p


def _sums(equation: Equation) -> bool:
    """Whether it is a sum, or the same number or its negative."""
    row = traits(equation)
    same = row.identity or equation.primitive is p.neg_p
    return same or row.addition or row.reduction == "sum"


def statistic_of(terms: Terms, equation: Equation) -> int | None:
    """Index of the operand of a product or quotient that is a statistic, or None."""
    a, b = equation.inputs[:2]
    assert isinstance(a, Value) and isinstance(b, Value)
    candidates = [
        i
        for i, (operand, other) in enumerate([(a, b), (b, a)])
        if _measures(terms, operand, other)
    ]
    if len(candidates) == 2:  # Keras's mean * inv: the statistic is the nonlinear one
        candidates = [
            i
            for i, (operand, other) in enumerate([(a, b), (b, a)])
            if not _is_linear(terms, operand, _Cone(terms, other))
        ]
    if len(candidates) == 2:  # of a pooled signal, scaled before: the one broadcast
        sizes = [_size(a), _size(b)]
        candidates = [i for i in (0, 1) if sizes[i] < sizes[1 - i]]
    return candidates[0] if len(candidates) == 1 else None


def _size(value: Value) -> int:
    """How many numbers a value holds, before it was broadcast."""
    while value.producer is not None and _moves(value.producer):
        (source, *_) = value.producer.inputs
        if not isinstance(source, Value):
            break
        value = source
    return math.prod(value.shape)


def unscaled(program: Program, statistic: Value) -> tuple[Value, list[Equation]]:
    """The statistic before its scales by parameters, and these scales, in order.

    Norms write ``x * (inverse * gamma)``: the scale is the layer's, and the number that
    is held constant is small.
    """
    scales: list[Equation] = []
    value = statistic
    while (equation := value.producer) is not None:
        moves = _moves(equation)
        if not moves and not traits(equation).scaling:
            break
        operands = program.active_inputs(equation)
        others = [a for a in equation.inputs if a not in operands]
        if len(operands) != 1 or not all(map(program.is_parameter, others)):
            break
        if equation.primitive is p.div_p and equation.inputs[1] is operands[0]:
            break
        scales.append(equation)
        (value,) = operands
    return value, scales[::-1]


def _measures(terms: Terms, operand: Value, signal: Value) -> bool:
    """Whether every path back from ``operand`` reduces the signal or its source."""
    sources = _Cone(terms, signal)
    stack, seen = [(operand, False)], set()
    while stack:
        value, reduced = stack.pop()
        if (value, reduced) in seen:
            continue
        seen.add((value, reduced))
        if reduced and value in sources:
            continue
        equation = value.producer
        if equation is not None and (parts := _written_out(terms, equation)):
            stack += [(a, True) for a in parts]  # a sum over an axis, term by term
            continue
        if equation is None or not _is_measuring(terms, equation):
            return False
        reduced = reduced or _reduces(equation)
        stack += [(a, reduced) for a in terms.program.active_inputs(equation)]
    return True


class _Cone:
    """A value and what it comes from through elementwise, moving, reducing steps.

    Looked for only as far back as it is asked about: through a residual stream it goes
    back to the first layer, and all cones together would grow as depth squared.
    """

    def __init__(self, terms: Terms, value: Value):
        self._terms = terms
        self._found: set[Value] = set()
        self._latest_first: list[tuple[int, int, Value]] = []
        self._add(value)

    def __contains__(self, value: Value) -> bool:
        while self._latest_first and -self._latest_first[0][0] > value.position:
            producer = heapq.heappop(self._latest_first)[2].producer
            if producer is not None and _is_measuring(self._terms, producer):
                for operand in self._terms.program.active_inputs(producer):
                    self._add(operand)
        return value in self._found

    def _add(self, value: Value) -> None:
        if value not in self._found:
            self._found.add(value)
            entry = (-value.position, len(self._found), value)
            heapq.heappush(self._latest_first, entry)


def _is_measuring(terms: Terms, equation: Equation) -> bool:
    row, program = traits(equation), terms.program
    operands = program.active_inputs(equation)
    if row.addition and len(operands) == 1:
        constants = [a for a in equation.inputs if a is not operands[0]]
        return all(scalar_of(a) is not None for a in constants)
    if equation.primitive is p.dot_general_p:
        if weight_of(program, equation) is not None:  # a sum as a dot with ones
            return True
        # einsum('bd,bd->b', x, x): a product and its sum
        contracting, batch = equation.params["dimension_numbers"]
        summed = all(
            len(a.shape) == len(c) + len(b)
            for a, c, b in zip(equation.inputs, contracting, batch, strict=True)
        )
        return summed and all(program.is_active(a) for a in equation.inputs)
    if row.reduction == "sum" and is_learned(terms, equation):
        return False
    return row.carries_elementwise or row.reduction is not None or _moves(equation)


def _written_out(terms: Terms, equation: Equation) -> list[Value]:
    """What an addition of slices sums over an axis: ``x[:, :1] + x[:, 1:]``."""
    made: Equation | None = equation
    if len(terms.program.active_inputs(equation)) < 2:
        return []  # a shift, by a parameter or by a number
    while made is not None and traits(made).addition and len(made.inputs) == 2:
        made = made.inputs[1].producer if isinstance(made.inputs[1], Value) else None
    if made is equation or made is None or not is_move(made):
        return []
    reading = terms.closed(terms.read(equation.outputs[0]))
    if terms.active(reading).terms != reading.terms:
        return []  # shifted by a parameter
    roots = [f.root for f in factors_of(reading)]
    summed = bool(reading.terms) and all(term.inner for term in reading.terms)
    values = [root for root in roots if isinstance(root, Value)]
    return values if summed and len(values) == len(roots) else []


def _reduces(equation: Equation) -> bool:
    reduces = traits(equation).reduction is not None
    return reduces or equation.primitive is p.dot_general_p


def _is_linear(terms: Terms, operand: Atom, sources: _Cone) -> bool:
    """Whether an operand is linear in the sources that it was computed from."""
    stack, seen = [operand], set()
    while stack:
        value = stack.pop()
        if not isinstance(value, Value) or value in seen or value.producer is None:
            continue
        if value in sources:  # how the sources came about is no concern of the norm
            continue
        seen.add(value)
        equation = value.producer
        if not _is_measuring(terms, equation):
            continue
        operands = terms.program.active_inputs(equation)
        scales = traits(equation).scaling and len(operands) == 1
        sums = _sums(equation) or weight_of(terms.program, equation) is not None
        if not sums and not _moves(equation) and not scales:
            return False
        stack += operands
    return True
