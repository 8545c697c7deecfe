"""One value for one array of numbers: moved forth and back, or computed in parts.

A value that was split and joined, padded and cut, stacked and taken is the value that
it was before; what reads it reads that. An elementwise function of parts, concatenated,
is the function of the whole. The program is written again so, since no number changes
by a bit: recognisers then meet each array once, in whatever words it was moved.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.extend.core import primitives as p

from jlrp.analysis.intervals import scalar_of
from jlrp.analysis.terms import Factor, Terms, View, is_move, joined, moved, moves_all
from jlrp.ir.jax_compat import is_key, with_shape
from jlrp.ir.names import is_inside, named_values, without_maps
from jlrp.ir.primitives import traits
from jlrp.ir.program import Atom, Equation, Program, Value, between
from jlrp.ir.rewriting import Rewriting, number_operands

_Part = tuple[Atom, View]  # a value, and how it is seen


def without_trips(program: Program, opaque: Iterable[Any] = ()) -> None:
    """Let what reads a value that another one equals read that one.

    ``opaque`` are primitives with a rule of their own, which stay where they are.
    """
    candidates = _may_repeat(program)
    if candidates:
        _OneValue(program, frozenset(opaque), candidates).run()


def _may_repeat(program: Program) -> set[Value]:
    """What is moved and may equal another value: found without looking at views.

    These are values of one shape that were moved from one root, what has the shape of
    its root, and what joins several. Views are costly, and most movement (of heads, of
    a batch) has nothing like it.
    """
    roots: dict[Atom, frozenset[Value]] = {}
    parts: dict[Value, Hashable] = {}  # which part of its root a value is of
    alike: dict[Hashable, list[Value]] = {}
    found: set[Value] = set()
    for equation in program.equations:
        if not is_move(equation) and equation.primitive not in _IDENTITIES:
            continue
        operands = [equation.inputs[i] for i in number_operands(equation)]
        each = [roots[a] if a in roots else _root(a) for a in operands]
        apart = len(each) == len(equation.outputs)
        if equation.primitive.name in _PARTS:  # their functions may be joined again
            found.update(a for a in operands if a in roots)  # type: ignore[arg-type]
        for i, value in enumerate(equation.outputs):
            roots[value] = each[i] if apart else _NO_ROOT.union(*each)
            if equation.primitive.name in _PARTS:
                parts[value] = _cut_out(equation, i, parts)
            elif len(operands) == 1 and operands[0] in parts:
                parts[value] = parts[operands[0]]  # type: ignore[index]
            for root in roots[value]:
                whole = (root.shape, root.dtype) == (value.shape, value.dtype)
                key = (root, parts.get(value), value.shape, value.dtype)
                alike.setdefault(key, [root] if whole else []).append(value)
            if len(roots[value]) > 1:
                found.add(value)
    for values in alike.values():
        if len(values) > 1:
            found.update(values)
    return found


def _root(atom: Atom) -> frozenset[Value]:
    return frozenset((atom,)) if isinstance(atom, Value) else _NO_ROOT


def _cut_out(
    equation: Equation, output: int, parts: Mapping[Value, Hashable]
) -> Hashable:
    """A name of the part that is cut out; None where it may be all after all, since
    what it is cut from was joined."""
    source = equation.inputs[0]
    made = source.producer if isinstance(source, Value) else None
    if made is not None and is_move(made) and not moves_all(made):
        return parts.get(source)  # type: ignore[arg-type]
    params = equation.params
    if equation.primitive.name == "split":
        return source, params["axis"], tuple(params["sizes"]), output
    at = params["start_indices"], params["limit_indices"], params["strides"]
    return source, *at


class _OneValue(Rewriting):
    def __init__(
        self, program: Program, opaque: frozenset[Any], candidates: set[Value]
    ):
        super().__init__(program)
        self.candidates = candidates
        self.terms = Terms(self.new, opaque, only_moved=True)
        self._tagged = {a for atoms in program.tags.values() for a in atoms}
        self._viewed: dict[tuple[Any, View, Any], Value] = {}
        self._joined: dict[tuple[_Part, ...], Atom | None] = {}

    @cached_property
    def _named(self) -> set[Atom]:
        return self._tagged.union(*named_values(self.program).values())

    @cached_property
    def _readers(self) -> dict[Atom, list[str | None]]:
        """The scopes of what reads each value; None: what is outside does."""
        readers: dict[Atom, list[str | None]] = {}
        for equation in self.program.equations:
            for atom in set(equation.inputs):
                readers.setdefault(atom, []).append(without_maps(equation.scope))
        for atom in self.program.outputs:
            readers.setdefault(atom, []).append(None)
        return readers

    def visit(self, kept: Equation) -> None:
        if kept.primitive in self.terms.opaque:
            return
        if not is_move(kept) and kept.primitive not in _IDENTITIES:
            return
        for value in (v for v in kept.outputs if v in self.candidates):
            if kept.primitive in _IDENTITIES and value in self.program.outputs:
                continue  # nothing reads it: it may as well be shown as it is
            same = self._same_as(kept, value)
            if same is not None and self._may_stand_for(same, value):
                self.renamed[value] = same

    def _same_as(self, kept: Equation, value: Value) -> Value | None:
        if is_key(value.dtype) or 0 in value.shape:
            return None
        if not all(isinstance(size, int) for size in value.shape):  # jax.export's
            return None
        if (factor := self._seen(value, View.whole(value.shape))) is not None:
            same = self._found(factor, value)
            if same is None:
                if not _is_part_of_input(factor, value):
                    self._viewed[factor.root, factor.view, value.dtype] = value
                return None
            if same is not value and factor.root is not value:
                return same
        if kept.primitive is p.concatenate_p and len(kept.inputs) > 1:
            whole = self._whole(kept)
            return whole if isinstance(whole, Value) else None
        return None

    def _found(self, factor: Factor, like: Any) -> Value | None:
        """The value of a shape and dtype that a view of a root is."""
        root, view = factor.root, factor.view
        if isinstance(root, Value) and _is_like(root, like):
            if view == View.whole(root.shape):
                return root
        return self._viewed.get((root, view, like.dtype))

    def _seen(self, atom: Atom, view: View) -> Factor | None:
        """What an atom, seen in a view, is a view of."""
        if not isinstance(atom, Value):
            return None
        reading = self.terms.within(self.terms.read(atom), view)
        term = reading.only if reading is not None else None
        if term is None or len(term.factors) != 1 or term.coefficient != 1:
            return None
        (factor,) = term.factors
        return factor if factor.power == 1 and not term.inner else None

    # What was computed in parts.

    def _whole(self, concatenation: Equation) -> Atom | None:
        axis = concatenation.params["dimension"]
        parts = [(a, View.whole(a.shape)) for a in concatenation.inputs]
        (out,) = concatenation.outputs
        return self._join(tuple(parts), axis, tuple(out.shape))

    def _join(
        self, parts: tuple[_Part, ...], axis: int, shape: tuple[int, ...]
    ) -> Atom | None:
        """The value that consists of these parts, along an axis."""
        if parts not in self._joined:
            self._joined[parts] = self._join_anew(parts, axis, shape)
        return self._joined[parts]

    def _join_anew(
        self, parts: tuple[_Part, ...], axis: int, shape: tuple[int, ...]
    ) -> Atom | None:
        atoms = [atom for atom, _ in parts]
        if (number := _number(atoms)) is not None:
            dtype = atoms[0].dtype
            (whole,) = self.insert(None, lambda: lax.full(shape, number, dtype))
            return whole
        seen = [self._seen(*part) for part in parts]
        if None not in seen:
            sizes = [view.shape[axis] for _, view in parts]
            whole = joined(seen, sizes, axis)  # type: ignore[arg-type]
            like = jax.ShapeDtypeStruct(shape, atoms[0].dtype)
            if whole is not None and (found := self._found(whole, like)) is not None:
                return found
        if not all(isinstance(a, Value) for a in atoms) or not self._named.isdisjoint(
            atoms
        ):
            return None
        made = [a.producer for a in atoms]  # type: ignore[union-attr]
        first = made[0]
        if first is None or any(not _alike(first, other) for other in made):
            return None
        if moves_all(first):
            before = self._before(parts)
            return None if before is None else self._join(before, axis, shape)
        if first.primitive in self.terms.opaque or not _is_function(first):
            return None
        inputs = []
        for operands in zip(*(e.inputs for e in made), strict=True):  # type: ignore
            operand = self._operand(operands, parts, axis, shape)
            if operand is None:
                return None
            inputs.append(operand)
        return self._applied(first, inputs, shape)

    @staticmethod
    def _before(parts: Sequence[_Part]) -> tuple[_Part, ...] | None:
        """Parts before they were moved, each in the view that it then has."""
        found = []
        for atom, view in parts:
            assert isinstance(atom, Value) and atom.producer is not None
            (source, *_) = atom.producer.inputs
            behind = moved(atom.producer, View.whole(source.shape))
            seen = behind and behind.after(view)
            if seen is None:
                return None
            found.append((source, seen))
        return tuple(found)

    def _operand(
        self,
        operands: Sequence[Atom],
        parts: tuple[_Part, ...],
        axis: int,
        shape: tuple[int, ...],
    ) -> Atom | None:
        """An operand of the function of the whole, from those of the parts."""
        first = operands[0]
        if all(not a.shape for a in operands):  # a number beside arrays
            number = _number(operands)
            alike = all(a is first for a in operands) or number is not None
            return first if alike else None
        if any(a.shape != b.shape for a, (b, _) in zip(operands, parts, strict=True)):
            return None
        views = (view for _, view in parts)
        return self._join(tuple(zip(operands, views, strict=True)), axis, shape)

    def _applied(
        self, like: Equation, inputs: Sequence[Atom], shape: tuple[int, ...]
    ) -> Value:
        (out,) = like.outputs
        whole = Value(with_shape(out.aval, shape))
        equation = replace(
            like,
            inputs=tuple(inputs),
            outputs=(whole,),
            position=len(self.new.equations),
            placements={},
        )
        whole.producer = equation
        self.new.equations.append(equation)
        return whole

    # Names.

    def _may_stand_for(self, same: Value, value: Value) -> bool:
        """Whether no name is lost: relevance at a name is that of its own readers."""
        if value in self._tagged:
            return False
        on_the_way: tuple[Equation, ...] = ()
        if same.position < value.position:  # else it was made anew, of its parts
            on_the_way, _ = between([same], [value], lambda v: True)
        inside = {v for e in on_the_way for v in e.outputs} - {value}
        if not self._named.isdisjoint(inside):
            return False
        scope = _scope(same)
        if value not in self._named:  # nor may the other one get a name
            readers = self._readers.get(value, ())
            return not scope or all(is_inside(reader, scope) for reader in readers)
        readers = self._readers.get(same, ())
        alone = sum(same in e.inputs for e in on_the_way) == len(readers)
        return alone and scope == _scope(value)


def _is_part_of_input(factor: Factor, value: Value) -> bool:
    """Such as one layer's weights among those of all: what reads these later is to cut
    them out again, or they would be kept meanwhile."""
    root = factor.root
    cut = math.prod(value.shape) < math.prod(root.shape)
    return isinstance(root, Value) and root.producer is None and cut


def _scope(value: Value) -> str:
    return "" if value.producer is None else without_maps(value.producer.scope)


def _is_like(value: Value, like: Any) -> bool:
    return value.shape == tuple(like.shape) and value.dtype == like.dtype


def _number(atoms: Sequence[Atom]) -> Any:
    """The one number that all of these consist of."""
    numbers = [scalar_of(a) for a in atoms]
    if any(n is None or np.ndim(n) for n in numbers):
        return None
    return numbers[0] if all(n == numbers[0] for n in numbers) else None


def _alike(one: Equation, other: Equation | None) -> bool:
    if other is None or one.primitive is not other.primitive:
        return False
    if moves_all(one):  # where to is seen in the views
        return moves_all(other)
    return one.params == other.params


def _is_function(equation: Equation) -> bool:
    plain = not equation.bodies and not equation.has_effects
    return plain and traits(equation).elementwise and len(equation.outputs) == 1


_NO_ROOT: frozenset[Value] = frozenset()
_PARTS = {"slice", "split"}
_IDENTITIES = {
    *(p.complex_p, p.convert_element_type_p, p.copy_p, p.imag_p, p.real_p),
    p.select_n_p,
}
