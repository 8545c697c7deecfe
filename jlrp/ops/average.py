"""Average: a quotient of a weighted sum by the sum of its weights, however accumulated.

Attention sums over the chunks of a long sequence with a running maximum (flash
attention), a recurrence keeps both sums in its state (RWKV). Weights are exponentials,
so that such a quotient is a softmax times values, and is explained as one: what
rescales both sums (a decay, a change of the maximum) belongs to the weights. Found by
walking back through both sums at once, loops included.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jax.extend.core import primitives as p

from jlrp.analysis.intervals import scalar_of
from jlrp.ir.loops import bodies_of
from jlrp.ir.primitives import primitives_where
from jlrp.ir.program import Atom, Equation, Program, Value
from jlrp.ops.affine import reshape_groups

_JOINS = {p.select_n_p, p.concatenate_p, p.pad_p}
_MOVES = primitives_where(lambda row: row.movement) - _JOINS
_SAME_AXES = primitives_where(lambda row: row.identity)
_ADDS = primitives_where(lambda row: row.addition) - {p.sub_p}
_EXPONENTIALS = primitives_where(lambda row: row.base is not None)
_SUMMED = "summed"

Labels = tuple[Any, ...]  # of each axis: that of the quotient, summed over, or None


@dataclass(frozen=True)
class Part:
    """What an equation is in an average.

    Attributes:
      role: ``"quotient"``; in the numerator ``"term"``, a weight times a value, or
        ``"rescaled"``, a coefficient times a sum; ``"total"`` in the denominator.
      weight: the operand that is a weight or coefficient, of the first two.
    """

    role: str
    weight: int = 0


@dataclass(frozen=True)
class _Pair:
    """Numerator and denominator, with the axes of the quotient that each has."""

    numerator: Atom
    denominator: Atom
    axes: tuple[Labels, Labels]


@dataclass(frozen=True)
class Handed:
    """A pair of outputs of a loop that the program around it averages."""

    outputs: tuple[int, int]
    axes: tuple[Labels, Labels]


@dataclass
class Averages:
    """The parts of averages in a program, and what they make of its loops' outputs."""

    parts: dict[Equation, Part] = field(default_factory=dict)
    handed: dict[Equation, set[Handed]] = field(default_factory=dict)


def averages(
    program: Program, quotients: Iterable[Equation], handed: Iterable[Handed] = ()
) -> Averages:
    """The averages among some quotients, and those of pairs of outputs."""
    walks: list[_Walk] = []
    for equation in quotients:
        numerator, denominator = equation.inputs
        labels = tuple(i if n > 1 else None for i, n in enumerate(numerator.shape))
        walk = _Walk(program)
        if walk.matches(_Pair(numerator, denominator, (labels, labels))):
            walk.parts[equation] = Part("quotient")
            walk.entered[equation] = None
            walks.append(walk)
    for pair in handed:
        walk = _Walk(program)
        n, d = (program.outputs[i] for i in pair.outputs)
        if walk.matches(_Pair(n, d, pair.axes)):
            walks.append(walk)
    found = Averages()
    for walk in _closed(program, walks):
        for equation, part in walk.parts.items():
            found.parts.setdefault(equation, part)
        for equation, pairs in walk.handed.items():
            found.handed.setdefault(equation, set()).update(pairs)
    return found


def _closed(program: Program, walks: list[_Walk]) -> list[_Walk]:
    """The walks none of whose sums is also read by something else."""
    while True:
        inside = {equation for walk in walks for equation in walk.entered}
        quotients = {e for walk in walks for e in walk.parts if walk.is_root(e)}

        def is_closed(walk: _Walk) -> bool:
            sums = (e for e in walk.entered if e not in quotients)  # noqa: B023
            uses = (
                use for e in sums for v in e.outputs for use in program.uses.get(v, ())
            )
            return all(use in inside for use in uses)  # noqa: B023

        kept = [walk for walk in walks if is_closed(walk)]
        if len(kept) == len(walks):
            return walks
        walks = kept


class _Walk:
    """One walk back through numerator and denominator.

    ``constants`` are inputs of the program known to carry no relevance, for a body
    whose activity is not known; ``assumed`` the pairs that it is to be proved for.
    """

    def __init__(
        self,
        program: Program,
        constants: frozenset[Value] | None = None,
        assumed: Iterable[_Pair] = (),
    ):
        self.program = program
        self.parts: dict[Equation, Part] = {}
        self.handed: dict[Equation, set[Handed]] = {}
        self.entered: dict[Equation, None] = {}
        self._constants = constants
        self._assumed = set(assumed)
        self._weighted = False

    def is_root(self, equation: Equation) -> bool:
        return self.parts[equation].role == "quotient"

    def matches(self, pair: _Pair) -> bool:
        """Whether the denominator is the numerator with ones in place of values."""
        return self._match(pair) and self._weighted

    def _match(self, pair: _Pair) -> bool:
        n, n_axes, n_moves = _unmoved(pair.numerator, pair.axes[0])
        d, d_axes, d_moves = _unmoved(pair.denominator, pair.axes[1])
        while (total := _unstabilised(d)) is not d:
            assert isinstance(d, Value) and d.producer is not None
            self.entered[d.producer] = None
            d, d_axes, more = _unmoved(total, d_axes)
            d_moves += more
        self.entered.update(dict.fromkeys((*n_moves, *d_moves)))
        if _is_zero(n) and _is_zero(d):
            return True
        if not isinstance(n, Value) or not isinstance(d, Value):
            return False
        pair = _Pair(n, d, (n_axes, d_axes))
        if pair in self._assumed:
            return True
        if n.producer is None or d.producer is None:
            return self._carried(pair)
        if n.producer.bodies:
            return n.producer is d.producer and self._looped(n.producer, pair)
        return any(self._tried(found) for found in self._alternatives(pair))

    def _tried(self, steps: Iterator[bool]) -> bool:
        """Whether all steps succeed; of a failure nothing is left."""
        before = dict(self.parts), dict(self.handed), dict(self.entered), self._weighted
        if all(steps):
            return True
        self.parts, self.handed, self.entered, self._weighted = before
        return False

    def _alternatives(self, pair: _Pair) -> Iterator[Iterator[bool]]:
        assert isinstance(pair.numerator, Value) and pair.numerator.producer
        assert isinstance(pair.denominator, Value) and pair.denominator.producer
        n, d = pair.numerator.producer, pair.denominator.producer
        n_axes, d_axes = pair.axes
        if n.primitive in _ADDS and d.primitive in _ADDS:
            for first, second in (d.inputs, d.inputs[::-1]):
                terms = zip(n.inputs, (first, second), strict=True)
                yield self._all_of(n, d, terms, pair.axes)
        if n.primitive is d.primitive is p.select_n_p:
            if _same(n.inputs[0], n_axes, d.inputs[0], d_axes):
                cases = zip(n.inputs[1:], d.inputs[1:], strict=True)
                yield self._all_of(n, d, cases, pair.axes)
        if n.primitive is d.primitive is p.reduce_sum_p:
            axes = _with_summed(n, n_axes), _with_summed(d, d_axes)
            yield self._all_of(n, d, [(n.inputs[0], d.inputs[0])], axes)
        if n.primitive is p.mul_p:
            for i in (0, 1):
                yield self._term(n, i, n_axes, pair)
                if d.primitive is p.mul_p:
                    for k in (0, 1):
                        yield self._rescaled(n, i, d, k, pair)
        if n.primitive is p.dot_general_p and d.primitive is p.reduce_sum_p:
            for i in (0, 1):
                yield self._contraction(n, i, d, pair)

    def _all_of(
        self, n: Equation, d: Equation, pairs: Any, axes: tuple[Labels, Labels]
    ) -> Iterator[bool]:
        self.entered.update(dict.fromkeys((n, d)))
        for a, b in pairs:
            yield self._match(_Pair(a, b, axes))

    def _term(self, n: Equation, i: int, n_axes: Labels, pair: _Pair) -> Iterator[bool]:
        """A weight times a value, over the weight."""
        weight, d_axes = n.inputs[i], pair.axes[1]
        yield _same(weight, n_axes, pair.denominator, d_axes)
        yield self._is_exponential(weight)
        self.entered[n] = None
        self.parts[n] = Part("term", i)
        self._weighted = True

    def _contraction(
        self, n: Equation, i: int, d: Equation, pair: _Pair
    ) -> Iterator[bool]:
        """Weights times values, summed in one dot, over the sum of the weights."""
        weight, total = n.inputs[i], d.inputs[0]
        axes = _contracted(n, i, pair.axes[0]), _with_summed(d, pair.axes[1])
        yield _same(weight, axes[0], total, axes[1])
        yield self._is_exponential(weight)
        self.entered.update(dict.fromkeys((n, d)))
        self.parts[n] = Part("term", i)
        self._weighted = True

    def _rescaled(
        self, n: Equation, i: int, d: Equation, k: int, pair: _Pair
    ) -> Iterator[bool]:
        """The same coefficient times both sums."""
        n_axes, d_axes = pair.axes
        yield _same(n.inputs[i], n_axes, d.inputs[k], d_axes)
        coefficient = n.inputs[i]
        yield self._is_constant(coefficient) or self._is_exponential(coefficient)
        self.entered.update(dict.fromkeys((n, d)))
        self.parts[n] = Part("rescaled", i)
        self.parts[d] = Part("total")
        yield self._match(_Pair(n.inputs[1 - i], d.inputs[1 - k], pair.axes))

    def _is_exponential(self, atom: Atom) -> bool:
        made = atom.producer if isinstance(atom, Value) else None
        while made is not None and made.primitive in _MOVES:
            (moved, *_) = made.inputs
            made = moved.producer if isinstance(moved, Value) else None
        if made is not None and made.primitive is p.select_n_p:  # a mask
            others = [a for a in made.inputs[1:] if not _is_zero(a)]
            return len(others) == 1 and self._is_exponential(others[0])
        return made is not None and made.primitive in _EXPONENTIALS

    def _is_constant(self, atom: Atom) -> bool:
        if self._constants is None:
            return not self.program.is_active(atom)
        stack = [atom]
        while stack:
            value = stack.pop()
            if not isinstance(value, Value) or value in self._constants:
                continue
            if value.producer is None:
                return value in self.program.constants
            stack += value.producer.inputs
        return True

    def _carried(self, pair: _Pair) -> bool:
        """Two carries of the loop whose body this is: of every iteration."""
        origins = [
            self.program.origins.get(v, ())  # type: ignore[arg-type]
            for v in (pair.numerator, pair.denominator)
        ]
        if [len(atoms) for atoms in origins] != [2, 2]:
            return False
        (n_start, n_next), (d_start, d_next) = origins
        if not (_is_zero(n_start) and _is_zero(d_start)):
            return False
        self._assumed.add(pair)
        found = self._match(_Pair(n_next, d_next, pair.axes))
        if not found:
            self._assumed.discard(pair)
        return found

    def _looped(self, loop: Equation, pair: _Pair) -> bool:
        """Two sums that a loop carries: what every iteration adds to them."""
        bodies = bodies_of(loop)
        outputs = [
            loop.outputs.index(v)  # type: ignore[arg-type]
            for v in (pair.numerator, pair.denominator)
        ]
        if len(bodies) != 1 or any(i >= bodies[0].n_carries for i in outputs):
            return False
        (body,) = bodies
        operands = body.operands(loop)
        if not all(_is_zero(operands[body.n_constants + i]) for i in outputs):
            return False
        n, d = (body.carries[i] for i in outputs)
        pairs = zip(body.constants, operands, strict=False)
        constants = frozenset(v for v, a in pairs if self._is_constant(a))
        inside = _Walk(body.program, constants, [_Pair(n, d, pair.axes)])
        n_next, d_next = (body.program.outputs[i] for i in outputs)
        if not inside.matches(_Pair(n_next, d_next, pair.axes)):
            return False
        handed = Handed((outputs[0], outputs[1]), pair.axes)
        self.handed.setdefault(loop, set()).add(handed)
        self.entered[loop] = None
        self._weighted = True
        return True


def _unmoved(atom: Atom, axes: Labels) -> tuple[Atom, Labels, list[Equation]]:
    """An atom before it was moved, its axes labelled, and the moves."""
    moves = []
    while isinstance(atom, Value) and atom.producer is not None:
        before = _axes_before(atom.producer, axes)
        if before is None:
            break
        moves.append(atom.producer)
        atom, axes = atom.producer.inputs[0], before
    return atom, axes, moves


def _unstabilised(total: Atom) -> Atom:
    """``sum`` in ``sum + eps`` or ``max(sum, eps)``."""
    made = total.producer if isinstance(total, Value) else None
    if made is None or made.primitive not in (*_ADDS, p.max_p):
        return total
    operands = [a for a in made.inputs if scalar_of(a) is None]
    if len(operands) != 1 or any(map(_is_zero, made.inputs)):
        return total
    return operands[0]


def _axes_before(move: Equation, axes: Labels) -> Labels | None:
    """The labels of a move's operand, given those of what it moved."""
    prim, params = move.primitive, move.params
    if prim in _SAME_AXES:
        return axes
    if prim not in (p.broadcast_in_dim_p, p.transpose_p, p.reshape_p, p.squeeze_p):
        return None
    source, out = move.inputs[0].shape, move.outputs[0].shape
    if prim is p.broadcast_in_dim_p:
        pairs = zip(source, params["broadcast_dimensions"], strict=True)
        return tuple(axes[k] if n > 1 else None for n, k in pairs)
    if prim is p.transpose_p:
        before: list[Any] = [None] * len(source)
        for label, k in zip(axes, params["permutation"], strict=True):
            before[k] = label
        return tuple(before)
    before = [None] * len(source)
    for old, new in reshape_groups(source, out):
        wide = [i for i in old if source[i] > 1], [k for k in new if out[k] > 1]
        if len(wide[0]) != len(wide[1]):
            return None
        for i, k in zip(*wide, strict=True):
            before[i] = axes[k]
    return tuple(before)


def _with_summed(reduction: Equation, axes: Labels) -> Labels:
    """The labels of what a sum over axes reads."""
    kept = iter(axes)
    rank = len(reduction.inputs[0].shape)
    summed = reduction.params["axes"]
    return tuple(_SUMMED if i in summed else next(kept) for i in range(rank))


def _contracted(dot: Equation, i: int, axes: Labels) -> Labels:
    """The labels of one operand of a dot, given those of its output."""
    contracting, batch = dot.params["dimension_numbers"]
    free = [
        [
            k
            for k in range(len(dot.inputs[side].shape))
            if k not in contracting[side] and k not in batch[side]
        ]
        for side in (0, 1)
    ]
    labels: list[Any] = [_SUMMED] * len(dot.inputs[i].shape)
    start = len(batch[0]) + (len(free[0]) if i == 1 else 0)
    for k, label in zip(batch[i], axes, strict=False):
        labels[k] = label
    for k, label in zip(free[i], axes[start:], strict=False):
        labels[k] = label
    return tuple(labels)


def _same(a: Atom, a_axes: Labels, b: Atom, b_axes: Labels) -> bool:
    """Whether two atoms are one value along the same axes."""
    (a, a_axes, _), (b, b_axes, _) = _unmoved(a, a_axes), _unmoved(b, b_axes)
    wide = [n > 1 for n in a.shape]
    if a.shape != b.shape or not _equal(a, b):
        return False
    if not wide:  # a scalar beside an array: the same along every axis
        return True
    labels = zip(wide, a_axes, b_axes, strict=True)
    return all(k == m for is_wide, k, m in labels if is_wide)


_SPELLED = 6  # at most: equations by which one number is written twice


def _equal(a: Atom, b: Atom, left: int = _SPELLED) -> bool:
    """Whether two atoms are one value, or made alike: ``exp(-w)``, written twice."""
    if a is b:
        return True
    if not isinstance(a, Value) or not isinstance(b, Value):
        known = scalar_of(a), scalar_of(b)
        return None not in known and known[0] == known[1] and a.shape == b.shape
    one, other = a.producer, b.producer
    if one is None or other is None or not left or one.bodies:
        return False
    alike = one.primitive is other.primitive and one.params == other.params
    if not alike or len(one.outputs) > 1:
        return False
    pairs = zip(one.inputs, other.inputs, strict=True)
    return all(_equal(c, d, left - 1) for c, d in pairs)


def _is_zero(atom: Atom) -> bool:
    known = scalar_of(atom)
    return known is not None and not np.any(known)
