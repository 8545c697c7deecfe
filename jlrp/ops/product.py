"""Products of active values, flattened: ``(ab)c`` and ``a(bc)`` give each factor 1/3.

A product is not rewritten. Each operand is weighed by the factors below it, so that the
shares multiply to those of the flat product whatever the association. Flattening goes
through contractions (``(QK)V``), movement and literal scales; it stops at sums, unary
regions and values that are read more than once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from jax.extend.core import primitives as p

from jlrp.analysis.intervals import scalar_of
from jlrp.analysis.terms import Terms
from jlrp.ir.families import rounds
from jlrp.ir.primitives import traits
from jlrp.ir.program import Atom, Equation, Program, Value
from jlrp.ops.activation import Regions
from jlrp.ops.average import Averages, Handed, Part, averages
from jlrp.ops.contraction import is_parameter, meets_constant
from jlrp.ops.mean import weight_of
from jlrp.ops.signal import is_selective, signal_among
from jlrp.ops.softmax import may_be_minus_infinity
from jlrp.ops.statistic import statistic_of


@dataclass(frozen=True)
class Product:
    """Shares of the active operands, by position in the equation.

    ``uniform``, ``gated`` and ``selective`` are fractions that sum to 1: of equally
    many shares a factor, of all to the factors that are not gates, and of all to the
    factor that the others were computed from. In an average they may sum to another
    number: what is missing is the Taylor remainder of its softmax. ``weights`` marks
    the operands that are softmax weights, ``masked`` those that a mask of -inf may have
    made NaN. ``recurs`` marks that of a selective recurrence (see ``ops.signal``).
    ``reciprocal`` marks the operand that is divided by and whose relevance is that of
    one over it, since it is the end of an inverted region (see ``ops.activation``).
    From a reference (see ``ops.factors``) there is a slot for each factor, and one
    value may have several; ``inverted`` marks the values that enter by division,
    ``denominators`` those that are shared with as such.
    """

    slots: tuple[int, ...]
    uniform: tuple[float, ...]
    gated: tuple[float, ...]
    selective: tuple[float, ...]
    weights: tuple[bool, ...]
    masked: tuple[bool, ...]
    recurs: bool = False
    reciprocal: tuple[bool, ...] = ()
    inverted: tuple[bool, ...] = ()
    denominators: tuple[bool, ...] = ()


def products(
    program: Program,
    regions: Regions,
    find_signals: bool,
    handed: Iterable[Handed] = (),
) -> tuple[dict[Equation, Product], Averages]:
    """The products of several active values of a program, and the averages among them.

    Without ``find_signals``, ``selective`` is as ``uniform`` and nothing ``recurs``.
    ``handed`` are pairs of outputs that are averaged outside.
    """
    equations = [e for e in program.equations if is_product(program, regions, e)]
    quotients = [e for e in equations if e.primitive is p.div_p]
    averaged = averages(program, quotients, handed)
    parts = averaged.parts
    found = {e: _part(parts[e]) for e in equations if e in parts}
    for equation in reversed(equations):  # roots before what they flatten
        if equation not in found:
            _share(program, regions, equation, found, find_signals, parts)
    return found, averaged


def _part(part: Part) -> Product:
    """Shares as of a softmax times values: half of the gradient goes to the weights.

    A weight is rescaled and divided by the total with it, so that these take part in
    the derivative of the softmax, and only the terms share as a product does.
    """
    (uniform, gated), weight = {
        "quotient": (((1.0, -0.5), (1.0, 0.0)), 0),
        "total": (((1.0, 1.0), (1.0, 1.0)), 0),
        "rescaled": (((0.5, 1.0), (0.0, 1.0)), part.weight),
        "term": (((0.5, 0.5), (0.0, 1.0)), part.weight),
    }[part.role]
    if weight == 1:
        uniform, gated = uniform[::-1], gated[::-1]
    marks = (part.role == "term" and weight == 0, part.role == "term" and weight == 1)
    return Product((0, 1), uniform, gated, uniform, marks, (False, False))


def is_product(program: Program, regions: Regions, equation: Equation) -> bool:
    if traits(equation).nature != "product":
        return False
    if equation.primitive in regions.opaque:
        return False
    if not all(program.is_active(a) for a in equation.inputs[:2]):
        return False
    (out,) = equation.outputs
    return regions.softmaxes.ending_at(out) is None and regions.ending_at(out) is None


def _share(
    program: Program,
    regions: Regions,
    root: Equation,
    found: dict[Equation, Product],
    find_signals: bool,
    parts: Mapping[Equation, Part],
) -> None:
    """Record the product ``root`` and the products that it flattens."""
    members: list[tuple[Equation, list[list[Value]]]] = []

    def factors(value: Value) -> list[Value]:
        found = _products_below(program, regions, value)
        if not found:
            return [value]
        inner, *others = found
        for other in others:
            flatten(other)
        if inner in parts:  # an average is weights times values
            return [value] * (2 if parts[inner].role == "quotient" else 1)
        is_norm = statistic_of(regions.terms, inner) is not None
        return [value] if is_norm else flatten(inner)

    def flatten(equation: Equation) -> list[Value]:
        below = [factors(a) for a in equation.inputs[:2] if isinstance(a, Value)]
        members.append((equation, below))
        return below[0] + below[1]

    all_factors = flatten(root)
    several = {v for _, below in members for fs in below for v in fs}
    ends = {v: end_of(program, regions, v) for v in several}
    gates = gates_among(all_factors, ends)
    signal = signal_among(regions.terms, all_factors) if find_signals else None
    recurs = signal is not None and is_selective(regions.terms, signal, all_factors)
    for equation, below in members:
        uniform = [float(len(fs)) for fs in below]
        signals = [float(sum(f not in gates for f in fs)) for fs in below]
        gated = signals if sum(signals) else uniform
        chosen = [float(signal in fs) for fs in below]
        chosen = chosen if sum(chosen) else uniform
        found[equation] = Product(
            (0, 1),
            tuple(u / sum(uniform) for u in uniform),
            tuple(g / sum(gated) for g in gated),
            tuple(c / sum(chosen) for c in chosen),
            tuple(len(fs) == 1 and ends[fs[0]] == "softmax" for fs in below),
            tuple(len(fs) == 1 and may_be_nan(program, regions, fs[0]) for fs in below),
            recurs,
        )


def _products_below(program: Program, regions: Regions, value: Value) -> list[Equation]:
    """The product that ends at ``value`` through moves and literal scales.

    Or the several that a contraction adds up, written out term by term.
    """
    while program.used_once(value):
        equation = value.producer
        if equation is None:
            break
        if is_product(program, regions, equation):
            return [equation]
        if traits(equation).addition and len(program.active_inputs(equation)) == 2:
            return _products_of_contraction(program, regions, value)
        source = transparent(program, equation)
        if weight_of(program, equation) is not None:  # a contraction, written out
            (source,) = program.active_inputs(equation)
        if source is None or regions.ending_at(value) is not None:
            return []
        value = source
    return []


def _products_of_contraction(
    program: Program, regions: Regions, value: Value
) -> list[Equation]:
    """The products that a sum adds up, if they are the terms of one contraction."""
    assert value.producer is not None
    found = [
        _products_below(program, regions, a)
        for a in value.producer.inputs
        if isinstance(a, Value)
    ]
    if not all(found) or regions.ending_at(value) is not None:
        return []
    terms = regions.terms
    term = terms.closed(terms.read(value)).only
    active = [f for f in term.factors if terms.is_active(f.root)] if term else []
    if term is None or not term.inner or len(active) < 2:
        return []
    return [product for products in found for product in products]


def _is_transparent(equation: Equation) -> bool:
    kept = equation.primitive in (p.neg_p, p.slice_p)
    return kept or traits(equation).view


def transparent(program: Program, equation: Equation) -> Value | None:
    """What an equation moves beside constants, or scales by a number."""
    operands = program.active_inputs(equation)
    if len(operands) != 1:
        return None
    if traits(equation).nature == "movement" and not rounds(equation):
        return operands[0]
    if traits(equation).scaling and equation.inputs[0] is operands[0]:
        return operands[0] if scalar_of(equation.inputs[1]) is not None else None
    if equation.primitive is p.mul_p and scalar_of(equation.inputs[0]) is not None:
        return operands[0]
    return None


def end_of(program: Program, regions: Regions, value: Value) -> str | None:
    """What a factor ends in: ``"softmax"``, ``"activation"``, None, or ``"open"``: an
    activation with f(0) other than 0, such as a sigmoid."""
    while True:
        origins = program.origins.get(value, ())
        if len(origins) == 1 and regions.outer is not None:  # into a loop or branch
            (value,) = origins  # type: ignore[assignment]
            program, regions = regions.outer.program, regions.outer
            if not isinstance(value, Value):
                return None
        if regions.softmaxes.are_weights(value):
            return "softmax"
        region = regions.ending_at(value)
        if region is not None and region.homogeneous and not region.zero_at_zero:
            value = region.start  # 1/b, for which relevance passes
            continue
        if region is not None:
            return "activation" if region.zero_at_zero else "open"
        made = value.producer
        before = regions.terms.before_trip(value)
        if before is not value:
            value = before
            continue
        source = made and _handed_on(program, regions, made)
        if source is None:
            return _end_of_product(program, regions, value)
        value = source


def _end_of_product(program: Program, regions: Regions, value: Value) -> str | None:
    """A product of gates is a gate: the coefficient of two steps of a recurrence."""
    equation = value.producer
    if equation is None or not is_product(program, regions, equation):
        return None
    if value not in regions.ends:
        ends = [end_of(program, regions, v) for v in program.active_inputs(equation)]
        weakest = "activation" if "activation" in ends else "open"
        regions.ends[value] = None if None in ends else weakest
    return regions.ends[value]


def _handed_on(program: Program, regions: Regions, equation: Equation) -> Value | None:
    """The value that an equation moves, selects from, scales, shifts or normalises."""
    operands = program.active_inputs(equation)
    if len(operands) == 1:
        moves = traits(equation).nature in ("movement", "selection")
        scales = (
            _scales(equation, operands[0])
            or _is_literal_shift(equation)
            or _places(regions.terms, equation)
        )
        return operands[0] if moves or scales else None
    if traits(equation).scaling:
        statistic = statistic_of(regions.terms, equation)
        if statistic is not None:
            signal = equation.inputs[1 - statistic]
            return signal if isinstance(signal, Value) else None
    return None


def _scales(equation: Equation, operand: Value) -> bool:
    """Whether an equation only multiplies each element of its active operand."""
    if equation.primitive is p.dot_general_p:
        (contracting, _), _ = equation.params["dimension_numbers"]
        others = [a for a in equation.inputs if a is not operand]
        # By a diagonal: a mask of heads. By a code: weights put where they belong.
        # By itself: it is a product of two values.
        return bool(others) and (not contracting or _is_code(others[0]))
    divides = equation.primitive is p.div_p and equation.inputs[1] is operand
    return traits(equation).scaling and not divides


def _places(terms: Terms, equation: Equation) -> bool:
    """Whether a sum puts weights where a code says: ``(one_hot(i) * w).sum(1)``."""
    if equation.primitive is not p.reduce_sum_p:
        return False
    if not meets_constant(terms, equation.inputs[0]):
        return False
    term = terms.read(equation.outputs[0]).only
    factors = term.factors if term else ()
    still = [f.root for f in factors if not terms.is_active(f.root)]
    return bool(still) and not any(is_parameter(terms, r) for r in still)


def _is_literal_shift(equation: Equation) -> bool:
    """``1 - z`` of a gate that was split from others, and so begins no region."""
    if equation.primitive not in (p.add_p, p.sub_p):
        return False
    return any(scalar_of(a) is not None for a in equation.inputs)


def _is_code(atom: Atom) -> bool:
    """Whether an operand holds zeros and ones: it was a comparison."""
    while isinstance(atom, Value) and atom.producer is not None:
        equation = atom.producer
        source = equation.inputs[0]
        if equation.primitive is p.convert_element_type_p and source.dtype == np.bool_:
            return True
        if traits(equation).nature != "movement":
            return False
        atom = source
    return False


def may_be_nan(program: Program, regions: Regions, factor: Value) -> bool:
    """Whether a factor is the softmax of scores that may all be -inf."""
    value: Value | None = factor
    while value is not None:
        if (found := regions.softmaxes.ending_at(value)) is not None:
            return may_be_minus_infinity(program, found.scores)
        made = value.producer
        value = made and transparent(program, made)
    return False


def gates_among(factors: list[Value], ends: dict[Value, str | None]) -> set[Value]:
    for kinds in (("softmax", "open"), ("activation",)):
        gates = {f for f in factors if ends[f] in kinds}
        if gates and len(factors) > len([f for f in factors if f in gates]):
            return gates
    return set()
