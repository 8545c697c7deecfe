"""Signal: of the factors of a product, the one that the others were computed from.

A selective state-space model multiplies its signal by step sizes, input and read-out
matrices that are learned maps of that same signal (Mamba): they are constants then, and
the recurrence is linear. A factor is the signal if the others depend, through a
parameter map, on what the factor is made of without one. Loops are looked through: a
carry is made of its initial state and of what an iteration makes of it.
"""

from __future__ import annotations

from collections.abc import Sequence

from jax.extend.core import primitives as p

from jlrp.facts.affine import CORES
from jlrp.graph import Equation, Program, Value

_MOVES = {
    p.broadcast_in_dim_p,
    p.convert_element_type_p,
    p.copy_p,
    p.reshape_p,
    p.squeeze_p,
    p.transpose_p,
}


def signal_among(program: Program, factors: Sequence[Value]) -> Value | None:
    """The factor that all others were computed from, or None."""
    made = {f: _made_of(program, f) for f in dict.fromkeys(factors)}
    if len(made) < 2:
        return None

    def before(one: Value, other: Value) -> bool:
        (direct, _), (_, behind) = made[one], made[other]
        return not direct.isdisjoint(behind)

    for factor in made:
        others = [f for f in made if f is not factor]
        if all(before(factor, f) and not before(f, factor) for f in others):
            return factor
    return None


def _made_of(program: Program, factor: Value) -> tuple[set[Value], set[Value]]:
    """The values that a factor is made of: through no parameter map, and behind one."""
    direct: set[Value] = set()
    entered: list[Value] = []
    stack = [factor]
    while stack:
        value = stack.pop()
        if value in direct:
            continue
        direct.add(value)
        core = _map_of(program, value)
        if core is not None:
            entered += _operands(program, core)
        else:
            stack += _before(program, value)
    behind: set[Value] = set()
    while entered:
        value = entered.pop()
        if value not in behind:
            behind.add(value)
            entered += _before(program, value)
    return direct, behind


def _before(program: Program, value: Value) -> list[Value]:
    """What a value was made of, also across the boundary of a loop."""
    if value.producer is not None:
        return _operands(program, value.producer)
    while program is not None:
        if value in program.origins:
            return [v for v in program.origins[value] if isinstance(v, Value)]
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


def _map_of(program: Program, value: Value) -> Equation | None:
    """The parameter map that made a value, or a part of one map's features."""
    equation = value.producer
    while equation is not None:
        operands = _operands(program, equation)
        if equation.primitive in CORES:
            return equation if len(operands) == 1 else None
        splits = equation.primitive is p.slice_p or equation.primitive.name == "split"
        shifts = equation.primitive in (p.add_p, p.mul_p, p.sub_p)  # a bias
        if not (splits or shifts or equation.primitive in _MOVES) or len(operands) != 1:
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
