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
from jlrp.ir.names import is_inside, without_maps
from jlrp.ir.primitives import traits
from jlrp.ir.program import Atom, Equation, Program, Value, between, computing
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
            if _is_back(equation):
                found.add(value)
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


_DEEP = 16  # at most: equations of a function that is computed where it was moved to


def _is_back(equation: Equation) -> bool:
    """Whether it moves a function of what was moved, into the shape that this had."""
    if not moves_all(equation):
        return False
    (out,), stack, left = equation.outputs, [equation.inputs[0]], _DEEP
    while stack and left:
        atom, left = stack.pop(), left - 1
        made = atom.producer if isinstance(atom, Value) else None
        if made is None:
            continue
        if left < _DEEP - 1 and moves_all(made):
            if made.inputs[0].shape == out.shape:
                return True
        elif _is_function(made):
            stack += made.inputs
    return False


def _root(atom: Atom) -> frozenset[Value]:
    return frozenset((atom,)) if isinstance(atom, Value) else _NO_ROOT


def _cut_out(
    equation: Equation, output: int, parts: Mapping[Value, Hashable]
) -> Hashable:
    """A name of the part that is cut out; None where it may be all after all, since
    what it is cut from was joined."""
    source = equation.inputs[0]
    made = source.producer if isinstance(source, Value) else None
    if equation.outputs[output].shape == source.shape:
        return parts.get(source)  # type: ignore[arg-type]
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
        # What depends on the inputs is no number that is known: no interval is asked.
        self._varying = set[Any](program.inputs)
        self.new.active = self._varying  # type: ignore[assignment]
        self.terms = Terms(self.new, opaque, only_moved=True)
        self._tagged = {a for atoms in program.tags.values() for a in atoms}
        self._naming: dict[Value, bool] = {}
        self._viewed: dict[tuple[Any, View, Any], Value] = {}
        self._joined: dict[tuple[tuple[_Part, ...], int], Atom | None] = {}

    def _is_named(self, value: Value) -> bool:
        """Whether it has a tag, or leaves the scope that it was made in."""
        if value not in self._naming:
            path = _scope(value)
            readers = self._readers.get(value, ()) if path else ()
            leaves = any(s != path and not is_inside(s, path) for s in readers)
            self._naming[value] = leaves or value in self._tagged
        return self._naming[value]

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
        if not self._varying.isdisjoint(kept.inputs):
            self._varying.update(kept.outputs)
        if self.candidates.isdisjoint(kept.outputs):
            return
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
            if same is None and _is_back(kept):
                same = self._brought_back(kept)
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

    def _brought_back(self, kept: Equation) -> Value | None:
        """A function of what was moved, as that of what it was before."""
        (source, *_), (value,) = kept.inputs, kept.outputs
        view = moved(kept, View.whole(source.shape))
        if view is None:
            return None
        whole = self._join(((source, view),), 0, tuple(value.shape))
        return whole if isinstance(whole, Value) else None

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
        whole = self._join(tuple(parts), axis, tuple(out.shape))
        if whole is None:  # it is the whole itself
            self._joined[tuple(parts), axis] = out
        return whole

    def _join(
        self, parts: tuple[_Part, ...], axis: int, shape: tuple[int, ...]
    ) -> Atom | None:
        """The value that consists of these parts, along an axis."""
        if (parts, axis) not in self._joined:
            self._joined[parts, axis] = self._join_anew(parts, axis, shape)
        return self._joined[parts, axis]

    def _join_anew(
        self, parts: tuple[_Part, ...], axis: int, shape: tuple[int, ...]
    ) -> Atom | None:
        atoms = [atom for atom, _ in parts]
        if len(parts) == 1 and tuple(atoms[0].shape) == shape:
            if parts[0][1] == View.whole(shape):
                return atoms[0]
        if (number := self._number(atoms)) is not None:
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
        values = [a for a in atoms if isinstance(a, Value)]
        made = [v.producer for v in values]
        first = made[0] if len(made) == len(atoms) else None
        if len(parts) == 1 and len(self._readers.get(atoms[0], ())) > 1:
            return None  # what reads it elsewhere would read another value
        if first is None or any(not _alike(first, other) for other in made):
            return None
        if any(map(self._is_named, values)):
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
            number = self._number(operands)
            alike = all(a is first for a in operands) or number is not None
            return first if alike else None
        pairs = list(zip(operands, parts, strict=True))
        if all(a.shape == b.shape for a, (b, _) in pairs):
            moved = tuple((a, view) for a, (_, view) in pairs)
            return self._join(moved, axis, shape)
        if any(view != View.whole(b.shape) for _, (b, view) in pairs):
            return None
        repeated = {_repeated_axes(a, b) for a, (b, _) in pairs}
        axes = repeated.pop()
        if repeated or axes is None:
            return None
        if axis in axes:  # one for all parts
            return first if all(a is first for a in operands) else None
        thin = tuple(1 if k in axes else size for k, size in enumerate(shape))
        return self._join(tuple((a, View.whole(a.shape)) for a in operands), axis, thin)

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
        if not self._varying.isdisjoint(inputs):
            self._varying.add(whole)
        return whole

    def _number(self, atoms: Sequence[Atom]) -> Any:
        """The one number that all of these consist of."""
        if not self._varying.isdisjoint(atoms):
            return None
        numbers = [scalar_of(a) for a in atoms]
        if any(n is None or np.ndim(n) for n in numbers):
            return None
        return numbers[0] if all(n == numbers[0] for n in numbers) else None

    # Names.

    def _may_stand_for(self, same: Value, value: Value) -> bool:
        """Whether no name is lost: relevance at a name is that of its own readers."""
        if value in self._tagged:
            return False
        on_the_way: tuple[Equation, ...] = ()
        if same.position < value.position:  # else it was made anew, of its parts
            on_the_way, _ = between([same], [value], lambda v: True)
        inside = {v for e in on_the_way for v in e.outputs} - {value}
        if any(map(self._is_named, inside)) or self._drops_a_tag(same, on_the_way):
            return False
        scope = _scope(same)
        if not self._is_named(value):  # nor may the other one get a name
            readers = self._readers.get(value, ())
            return not scope or all(is_inside(reader, scope) for reader in readers)
        readers = self._readers.get(same, ())
        alone = sum(same in e.inputs for e in on_the_way) == len(readers)
        return alone and scope == _scope(value)

    def _drops_a_tag(self, same: Value, on_the_way: Sequence[Equation]) -> bool:
        """Whether what has a tag is joined on the way, and may be read nowhere else."""
        if not self._tagged:
            return False
        read = {a for e in on_the_way for a in e.inputs if isinstance(a, Value)}
        made = {v for e in on_the_way for v in e.outputs}
        joined, before = (
            {
                v
                for e in computing(self.new, values, lambda v: True)[0]
                for v in e.outputs
            }
            for values in (read - made - {same}, [same])
        )
        return not self._tagged.isdisjoint(joined - before)


def _is_part_of_input(factor: Factor, value: Value) -> bool:
    """Such as one layer's weights among those of all: what reads these later is to cut
    them out again, or they would be kept meanwhile."""
    root = factor.root
    cut = math.prod(value.shape) < math.prod(root.shape)
    return isinstance(root, Value) and root.producer is None and cut


def _scope(value: Value) -> str:
    return "" if value.producer is None else without_maps(value.producer.scope)


def _repeated_axes(operand: Atom, out: Atom) -> frozenset[int] | None:
    """The axes of size 1 along which an operand is repeated; None: it does not fit."""
    if len(operand.shape) != len(out.shape):
        return None
    pairs = list(enumerate(zip(operand.shape, out.shape, strict=True)))
    if any(a not in (1, b) for _, (a, b) in pairs):
        return None
    return frozenset(k for k, (a, b) in pairs if a != b)


def _is_like(value: Value, like: Any) -> bool:
    return value.shape == tuple(like.shape) and value.dtype == like.dtype


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
