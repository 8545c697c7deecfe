"""Values that consist of others, side by side, read as concatenations of these.

A sum of parts that are padded with zeros, parts that are written over zeros one by one,
and a reversed or transposed concatenation of reversed or transposed parts are one
concatenation: its parts meet their readers as they are. Copies of one value, one behind
the other, are a broadcast. One layer of each of several values is the layer of all.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from jax import lax
from jax.extend.core import primitives as p

from jlrp.analysis.intervals import scalar_of
from jlrp.ir import jax_compat
from jlrp.ir.program import Atom, Equation, Value
from jlrp.ops.affine import is_core
from jlrp.ops.contraction import operand_axis
from jlrp.ops.standing import OtherWords, standing_for

Array = Any
_ADDS = (p.add_p, p.add_jaxvals_p)
_ORDERS = (p.rev_p, p.transpose_p)
_PLACES = (p.concatenate_p, p.dynamic_update_slice_p, p.pad_p)


class _Part(NamedTuple):
    """Where a value lies in another one: transposed, then reversed along axes."""

    value: Value
    starts: tuple[int, ...]
    order: tuple[int, ...]
    backwards: frozenset[int]

    @staticmethod
    def whole(value: Value) -> _Part:
        axes = tuple(range(len(value.shape)))
        return _Part(value, (0,) * len(axes), axes, frozenset())

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.value.shape[i] for i in self.order)

    @property
    def is_as_it_lies(self) -> bool:
        return not self.backwards and self.order == tuple(range(len(self.order)))

    def moved(self, by: Sequence[int]) -> _Part:
        at = tuple(a + b for a, b in zip(self.starts, by, strict=True))
        return self._replace(starts=at)

    def transposed(self, order: Sequence[int]) -> _Part:
        return self._replace(
            starts=tuple(self.starts[i] for i in order),
            order=tuple(self.order[i] for i in order),
            backwards=frozenset(k for k, i in enumerate(order) if i in self.backwards),
        )

    def reversed_in(self, shape: Sequence[int], axes: Iterable[int]) -> _Part:
        starts = list(self.starts)
        for i in axes:
            starts[i] = shape[i] - starts[i] - self.shape[i]
        return self._replace(
            starts=tuple(starts), backwards=self.backwards.symmetric_difference(axes)
        )

    def meets(self, other: _Part) -> bool:
        pairs = zip(self.starts, self.shape, other.starts, other.shape, strict=True)
        return all(a < b + m and b < a + n for a, n, b, m in pairs)

    def before(self) -> _Part:
        """What the value was before it was transposed or reversed itself."""
        part, made = self, self.value.producer
        while made is not None and made.primitive in _ORDERS:
            (source,) = made.inputs
            assert isinstance(source, Value)
            if made.primitive is p.rev_p:
                along = (
                    k
                    for k, i in enumerate(part.order)
                    if i in made.params["dimensions"]
                )
                part = part._replace(
                    value=source, backwards=part.backwards.symmetric_difference(along)
                )
            else:
                order = made.params["permutation"]
                part = part._replace(
                    value=source, order=tuple(order[i] for i in part.order)
                )
            made = source.producer
        return part


class Concatenations(OtherWords):
    """Parts of one value side by side, as its concatenation."""

    def found(self) -> Iterator[tuple[Value, list[Equation]]]:
        """Values, and the concatenation that stands for what makes each."""
        inside = set[Value]()
        for equation in reversed(self.program.equations):
            (out, *others) = equation.outputs
            if others or out in inside or out not in self.program.active:
                continue
            if not self._may_end(equation):
                continue
            if (copies := _copies(equation)) is not None:
                yield out, copies
                continue
            through: set[Value] = set()
            parts = self._parts_of(out, through, end=True)
            standing = self._concatenated(equation, parts)
            if standing is not None:
                inside |= through
                yield out, standing

    def _may_end(self, equation: Equation) -> bool:
        prim = equation.primitive
        if prim in self.opaque:
            return False
        if prim is p.dynamic_update_slice_p:
            return True
        if prim not in (*_ADDS, *_ORDERS, p.concatenate_p):
            return False
        made = [a.producer for a in equation.inputs if isinstance(a, Value)]
        found = [e.primitive for e in made if e is not None]
        if prim is p.concatenate_p and _is_repeated(equation):
            return True
        if prim in _ADDS:
            return len(found) == 2 and set(found) <= {*_ADDS, *_ORDERS, *_PLACES}
        return not {*_ADDS, *_PLACES}.isdisjoint(found)

    def _parts_of(
        self, value: Value, through: set[Value], end: bool = False
    ) -> list[_Part]:
        """The parts that a value consists of, beside zeros; else itself."""
        made = value.producer
        whole = [_Part.whole(value)]
        if not end and (not self.program.used_once(value) or value in self.named):
            return whole
        if made is None or made.primitive in self.opaque:
            return whole
        prim, shape = made.primitive, value.shape
        inside: set[Value] = set()
        found: list[_Part] | None = None

        def parts_of(atom: Atom) -> list[_Part]:
            if scalar_of(atom) == 0:
                return []
            if not isinstance(atom, Value):
                return whole  # of known numbers: meets all
            return self._parts_of(atom, inside)

        if prim in _ORDERS:
            (source,) = made.inputs
            found = parts_of(source)
            if prim is p.rev_p:
                axes = made.params["dimensions"]
                found = [part.reversed_in(shape, axes) for part in found]
            else:
                order = made.params["permutation"]
                found = [part.transposed(order) for part in found]
        elif prim in _ADDS:
            found = [part for a in made.inputs for part in parts_of(a)]
        elif prim is p.concatenate_p:
            axis, at, found = made.params["dimension"], 0, []
            for a in made.inputs:
                by = [at if i == axis else 0 for i in range(len(shape))]
                found += [part.moved(by) for part in parts_of(a)]
                at += a.shape[axis]
        elif prim is p.pad_p:
            config = made.params["padding_config"]
            if scalar_of(made.inputs[1]) == 0 and all(
                low >= 0 and high >= 0 and not between for low, high, between in config
            ):
                by = [low for low, *_ in config]
                found = [part.moved(by) for part in parts_of(made.inputs[0])]
        elif prim is p.dynamic_update_slice_p:
            found = self._written_over(made, parts_of)
        if found is None or _meet(found) or any(part in whole for part in found):
            return whole
        through |= {*inside, value}
        return found

    @staticmethod
    def _written_over(made: Equation, parts_of: Any) -> list[_Part] | None:
        below, update, *starts = made.inputs
        known = [scalar_of(a) for a in starts]
        if None in known:
            return None
        at = [
            min(max(int(start), 0), n - m)  # type: ignore[arg-type]
            for start, n, m in zip(known, below.shape, update.shape, strict=True)
        ]
        return [*parts_of(below), *(part.moved(at) for part in parts_of(update))]

    def _concatenated(
        self, equation: Equation, parts: Sequence[_Part]
    ) -> list[Equation] | None:
        """A concatenation of parts along one axis, with zeros where none is."""
        (out,) = equation.outputs
        if equation.primitive in _ORDERS:
            parts = [part.before() for part in parts]
            if not all(part.is_as_it_lies for part in parts):
                return None
        nested = len(parts) > len(equation.inputs)
        if len(parts) < 2 or (equation.primitive is p.concatenate_p and not nested):
            return None
        shape = tuple(out.shape)
        along = {i for part in parts for i, n in enumerate(shape) if part.shape[i] != n}
        if len(along) != 1:
            return None
        (axis,) = along
        parts = sorted(parts, key=lambda part: part.starts[axis])
        if any(part.value.dtype != out.dtype for part in parts):
            return None

        def zeros(like: Array, size: int) -> list[Array]:
            wide = [size if i == axis else n for i, n in enumerate(shape)]
            return [lax.full(wide, 0, like.dtype)] if size else []

        def joined(*values: Array) -> Array:
            at, found = 0, []
            for part, x in zip(parts, values, strict=True):
                found += zeros(x, part.starts[axis] - at)
                if part.order != tuple(range(x.ndim)):
                    x = lax.transpose(x, part.order)
                found.append(
                    lax.rev(x, sorted(part.backwards)) if part.backwards else x
                )
                at = part.starts[axis] + part.shape[axis]
            return lax.concatenate([*found, *zeros(values[0], shape[axis] - at)], axis)

        return standing_for(out, joined, [part.value for part in parts], equation)


class Rows(OtherWords):
    """Rows of which one layer each is taken, as the layer of all rows."""

    def found(self) -> Iterator[tuple[Value, list[Equation]]]:
        for equation in self.program.equations:
            if equation.primitive is p.concatenate_p and not _is_repeated(equation):
                standing = self._of_all(equation)
                if standing is not None:
                    yield equation.outputs[0], standing

    def _of_all(self, concatenation: Equation) -> list[Equation] | None:
        layers = [
            self.made(a, p.dot_general_p, p.conv_general_dilated_p)
            for a in concatenation.inputs
        ]
        if concatenation.primitive in self.opaque or None in layers:
            return None
        first, *others = layers
        assert first is not None
        if not is_core(self.program, first):
            return None
        k = next(i for i, a in enumerate(first.inputs) if self.program.is_active(a))
        axis = operand_axis(first, k, concatenation.params["dimension"])
        if axis is None or not all(self._is_like(first, e, k) for e in others):
            return None
        parts = concatenation.inputs
        if not all(self.program.used_once(a) for a in parts):  # type: ignore[arg-type]
            return None
        if not self.named.isdisjoint(parts):
            return None

        def layer(kernel: Array, *rows: Array) -> Array:
            x = lax.concatenate(rows, axis)
            operands = (kernel, x) if k else (x, kernel)
            (y,) = jax_compat.bind(first.primitive, first.params, operands)
            return y

        kernel, rows = first.inputs[1 - k], [e.inputs[k] for e in layers if e]
        (out,) = concatenation.outputs
        return standing_for(out, layer, [kernel, *rows], concatenation)

    def _is_like(self, first: Equation, other: Equation | None, k: int) -> bool:
        return (
            other is not None
            and other.primitive is first.primitive
            and other.params == first.params
            and other.inputs[1 - k] is first.inputs[1 - k]
            and self.program.is_active(other.inputs[k])
        )


def _is_repeated(concatenation: Equation) -> bool:
    first, *others = concatenation.inputs
    return bool(others) and all(a is first for a in others)


def _copies(equation: Equation) -> list[Equation] | None:
    """A broadcast, for copies of one value, one behind the other."""
    if equation.primitive is not p.concatenate_p or not _is_repeated(equation):
        return None
    (value, *_), (out,) = equation.inputs, equation.outputs
    axis, count = equation.params["dimension"], len(equation.inputs)
    if not isinstance(value, Value):
        return None

    def repeated(x: Array) -> Array:
        axes = range(x.ndim)
        if x.shape[axis] == 1:
            return lax.broadcast_in_dim(x, out.shape, tuple(axes))
        wide = (*x.shape[:axis], count, *x.shape[axis:])
        at = tuple(i + (i >= axis) for i in axes)
        return lax.reshape(lax.broadcast_in_dim(x, wide, at), out.shape)

    return standing_for(out, repeated, [value], equation)


def _meet(parts: Sequence[_Part]) -> bool:
    return any(a.meets(b) for i, a in enumerate(parts) for b in parts[:i])
