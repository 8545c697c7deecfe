"""Signal: of the factors of a product, the one that the others were computed from.

A selective state-space model multiplies its signal by step sizes, input and read-out
matrices that are learned maps of that same signal (Mamba): they are constants then, and
the recurrence is linear. A factor is the signal if the others depend, through a
parameter map, on what the factor is made of without one. Loops are looked through: a
carry is made of its initial state and of what an iteration makes of it.

A recurrence is selective if two learned maps of its signal multiply it at once, such as
step size and input matrix, or if one multiplies what a loop carries and does not depend
on that. A gate is one map of the signal (squeeze-and-excitation), or computed from what
the iterations before have made of it (LSTM, GRU).
"""

from __future__ import annotations

from collections.abc import Sequence

from jax.extend.core import primitives as p

from jlrp.analysis.terms import Terms
from jlrp.ir.primitives import traits
from jlrp.ir.program import Equation, Program, Value
from jlrp.ops.contraction import is_learned

_Made = tuple[Value, bool]  # a value, and whether an earlier iteration made it


def signal_among(terms: Terms, factors: Sequence[Value]) -> Value | None:
    """The factor that all others were computed from, or None."""
    made = {f: _made_of(terms, f) for f in dict.fromkeys(factors)}
    if len(made) < 2:
        return None

    def before(one: Value, other: Value) -> bool:
        (direct, _), (_, entered) = made[one], made[other]
        return _reaches(terms.program, entered, direct)

    for factor in made:
        others = [f for f in made if f is not factor]
        if all(before(factor, f) and not before(f, factor) for f in others):
            return factor
    return None


def is_selective(terms: Terms, signal: Value, factors: Sequence[Value]) -> bool:
    """Whether this signal among some factors is that of a selective recurrence."""
    others = [(f, False) for f in dict.fromkeys(factors) if f is not signal]
    direct, _ = _made_of(terms, signal)
    carried = {value for value, earlier in direct if earlier}
    if len(others) < 2 and not carried:
        return False
    return carried.isdisjoint(_all_before(terms.program, others))


def _all_before(program: Program, starts: Sequence[_Made]) -> set[Value]:
    stack, seen = list(starts), set()
    while stack:
        made = stack.pop()
        if made not in seen:
            seen.add(made)
            stack += _before(program, made)
    return {value for value, _ in seen}


def _made_of(terms: Terms, factor: Value) -> tuple[set[_Made], list[_Made]]:
    """What a factor is made of through no parameter map, and what these maps read."""
    direct: set[_Made] = set()
    entered: list[_Made] = []
    stack = [(factor, False)]
    while stack:
        made = stack.pop()
        if made in direct:
            continue
        direct.add(made)
        value, earlier = made
        core = _map_of(terms, value)
        if core is not None:
            entered += [(a, earlier) for a in _operands(terms.program, core)]
        else:
            stack += _before(terms.program, made)
    return direct, entered


def _reaches(program: Program, starts: Sequence[_Made], wanted: set[_Made]) -> bool:
    """Whether a walk back from some values meets one of those wanted.

    It goes no further back than these: all walks together would grow as depth squared.
    """
    earliest = min(value.position for value, _ in wanted)
    stack, seen = list(starts), set()
    while stack:
        made = stack.pop()
        if made in wanted:
            return True
        if made not in seen and made[0].position >= earliest:
            seen.add(made)
            stack += _before(program, made)
    return False


def _before(program: Program, made: _Made) -> list[_Made]:
    """What a value was made of, also across the boundary of a loop.

    A carry is made of what the iteration before has made: not of the values of its own.
    """
    value, earlier = made
    if value.producer is not None:
        return [(a, earlier) for a in _operands(program, value.producer)]
    while program is not None:
        if value in program.origins:
            outside, *carried = program.origins[value]
            found = [(outside, False), *((a, True) for a in carried)]
            return [(a, when) for a, when in found if isinstance(a, Value)]
        program = program.parent  # type: ignore[assignment]
    return []


def _operands(program: Program, equation: Equation) -> list[Value]:
    return [
        a for a in equation.inputs if isinstance(a, Value) and _is_active(program, a)
    ]


def _is_active(program: Program | None, value: Value) -> bool:
    while program is not None:
        if value in program.active:
            return True
        program = program.parent
    return False


def _map_of(terms: Terms, value: Value) -> Equation | None:
    """The parameter map that made a value, or a part of one map's features."""
    equation = value.producer
    while equation is not None:
        operands = _operands(terms.program, equation)
        row = traits(equation)
        if row.contraction or is_learned(terms, equation):
            return equation if len(operands) == 1 else None
        splits = equation.primitive is p.slice_p or equation.primitive.name == "split"
        shifts = equation.primitive in (p.add_p, p.mul_p, p.sub_p)  # a bias
        if not (splits or shifts or row.view) or len(operands) != 1:
            return None
        if splits and not _splits_features(equation):
            return None
        (source,) = operands
        equation = source.producer
    return None


def _splits_features(equation: Equation) -> bool:
    """Whether a slice takes a part of the last or of the channel axis, not of time.

    Maps put their features last, or next to the batch (channels first); a slice of one
    step of time keeps every feature.
    """
    source, part = equation.inputs[0].shape, equation.outputs[0].shape
    cut = [i for i, (n, m) in enumerate(zip(source, part, strict=True)) if n != m]
    return len(cut) == 1 and part[cut[0]] > 1
