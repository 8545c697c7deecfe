"""Terms: one canonical reading of a value, in whatever words it was computed.

A value is read as a sum of *strided einsums*::

    constant + sum_t c_t * sum_s prod_f root_f[offset_f + strides_f] ** power_f

over the indices of the value and summed digits s. A root is a value of the program that
is read no further, or a ``Function`` of a reading; how it is indexed is a ``View``: of
each axis a list of digits (size, stride), from the slowest, into the root's numbers in
row-major order. Transposes, broadcasts, reshapes, slices, reversals, sums over axes and
contractions are then operations on lists, and two spellings of one number are one
reading.

Readings annotate: the program's own equations still run. They are made when a
recogniser asks, from the value it asks about backwards, and remembered. Views and
elementwise functions are followed through values with several readers; sums and
products are not, or the terms would grow with the depth of a network.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend.core import primitives as p

from jlrp.analysis.intervals import scalar_of
from jlrp.ir.families import rounds
from jlrp.ir.jax_compat import is_inexact, is_tracer
from jlrp.ir.primitives import traits
from jlrp.ir.program import (
    Atom,
    Equation,
    Literal,
    Program,
    Value,
    between,
    computing,
    evaluate,
)
from jlrp.promise import is_complex

Digit = tuple[int, int]  # size, stride
Axis = tuple[Digit, ...]  # from the slowest digit to the fastest; of size 1: none


# The algebra of axes.


def merged(digits: Iterable[Digit]) -> Axis:
    """The fewest digits that index the same."""
    found: list[Digit] = []
    for size, stride in digits:
        if size == 1:
            continue
        if found and found[-1][1] == size * stride:
            found[-1] = (found[-1][0] * size, stride)
        else:
            found.append((size, stride))
    return tuple(found)


def size_of(axis: Axis) -> int:
    return math.prod(size for size, _ in axis)


def refined(axes: Iterable[Axis]) -> list[int] | None:
    """The sizes of digits into which axes of one size can all be split, or None."""
    cuts = set()
    for axis in axes:
        cut = 1
        for size, _ in reversed(axis):
            cut *= size
            cuts.add(cut)
    sizes, before = [], 1
    for cut in sorted(cuts):
        if cut % before:
            return None
        sizes.append(cut // before)
        before = cut
    return sizes[::-1]


def strides_of(axis: Axis, sizes: Sequence[int]) -> list[int] | None:
    """The strides of the digits of these sizes, or None if an axis has others."""
    left, found = list(axis), []
    for size in reversed(sizes):
        if size == 1:
            found.append(0)
            continue
        if not left:
            return None
        whole, stride = left.pop()
        if whole % size:
            return None
        if whole > size:
            left.append((whole // size, stride * size))
        found.append(stride)
    return None if left else found[::-1]


class View(NamedTuple):
    """How an array is indexed: at ``offset`` plus, of each axis, digits by strides."""

    offset: int
    axes: tuple[Axis, ...]

    @staticmethod
    def whole(shape: Sequence[int]) -> View:
        """An array as it is."""
        axes, stride = [], math.prod(shape)
        for size in shape:
            stride //= max(size, 1)
            axes.append(((size, stride),) if size != 1 else ())
        return View(0, tuple(axes))

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(map(size_of, self.axes))

    def orders(self, shape: Sequence[int]) -> bool:
        """Whether each number of an array of this shape is seen once."""
        left = math.prod(shape)
        digits = (digit for axis in self.axes for digit in axis)
        for size, stride in sorted(digits, key=lambda digit: -abs(digit[1])):
            left //= size
            if abs(stride) != left:
                return False
        return left == 1

    def transposed(self, permutation: Sequence[int]) -> View:
        return View(self.offset, tuple(self.axes[i] for i in permutation))

    def broadcast(self, shape: Sequence[int], dimensions: Sequence[int]) -> View:
        axes: list[Axis] = [((size, 0),) if size != 1 else () for size in shape]
        for axis, dimension in zip(self.axes, dimensions, strict=True):
            if axis:
                axes[dimension] = axis
        return View(self.offset, tuple(axes))

    def reshaped(self, shape: Sequence[int]) -> View | None:
        """None if an axis of ``shape`` cuts a digit at no whole number."""
        left = list(merged(digit for axis in self.axes for digit in axis))
        axes = []
        for size in reversed(shape):
            axis: list[Digit] = []
            while not isinstance(size, int) or size > 1:
                if not left:
                    return None
                whole, stride = left.pop()
                taken = _common(whole, size)
                if taken == 1 or (taken < whole and taken < size):
                    return None
                if taken < whole:
                    left.append((whole // taken, stride * taken))
                axis.append((taken, stride))
                size //= taken
            axes.append(merged(reversed(axis)))
        return View(self.offset, tuple(reversed(axes)))

    def cut(
        self, starts: Sequence[int], shape: Sequence[int], steps: Sequence[int]
    ) -> View | None:
        """A slice of ``shape``; None if it cuts an axis of several digits otherwise."""
        if 0 in shape:
            return None
        offset, axes = self.offset, []
        for axis, start, size, step in zip(
            self.axes, starts, shape, steps, strict=True
        ):
            if start == 0 and size == size_of(axis) and step == 1:
                axes.append(axis)
                continue
            left = start
            for digit, stride in reversed(axis):
                left, index = divmod(left, digit)
                offset += index * stride
            if size == 1:
                axes.append(())
                continue
            inner = math.prod(n for n, _ in axis[1:])
            if start % inner and len(axis) > 1 or step != 1 and len(axis) > 1:
                return None
            if size % inner:
                return None
            (_, stride), *rest = list(axis)
            axes.append(merged([(size // inner, stride * step), *rest]))
        return View(offset, tuple(axes))

    def reversed_along(self, dimensions: Iterable[int]) -> View:
        offset, axes = self.offset, list(self.axes)
        for i in dimensions:
            offset += sum((size - 1) * stride for size, stride in axes[i])
            axes[i] = tuple((size, -stride) for size, stride in axes[i])
        return View(offset, tuple(axes))

    def after(self, outer: View) -> View | None:
        """This view of an array, itself viewed by ``outer``; None if that has no
        digits."""
        digits = list(merged(digit for axis in self.axes for digit in axis))
        weights = [math.prod(n for n, _ in digits[i + 1 :]) for i in range(len(digits))]
        offset, left = self.offset, outer.offset
        low, high = [0] * len(digits), [0] * len(digits)
        for i, ((size, stride), weight) in enumerate(zip(digits, weights, strict=True)):
            index, left = divmod(left, weight) if weight else (0, left)
            if not 0 <= index < size:
                return None
            offset += index * stride
            low[i] = high[i] = index
        if left:
            return None
        axes = []
        for axis in outer.axes:
            found: list[Digit] = []
            todo = list(reversed(axis))
            while todo:
                size, step = todo.pop()
                if step == 0:
                    found.append((size, 0))
                    continue
                at = next(
                    (
                        i
                        for i, ((n, _), w) in enumerate(
                            zip(digits, weights, strict=True)
                        )
                        if w <= abs(step) < w * n
                    ),
                    None,
                )
                if at is None or step % weights[at]:
                    return None
                times, (n, stride) = step // weights[at], digits[at]
                fits = n // abs(times)
                if size > fits:
                    if n % abs(times) or size % fits or fits < 2:
                        return None
                    todo += [(fits, step), (size // fits, step * fits)]
                    continue
                if times > 0:
                    high[at] += (size - 1) * times
                else:
                    low[at] += (size - 1) * times
                found.append((size, stride * times))
            axes.append(merged(found))
        if any(low[i] < 0 or high[i] >= size for i, (size, _) in enumerate(digits)):
            return None
        return View(offset, tuple(axes))


# Readings.


def _common(a: int, b: int) -> int:
    """The greatest common divisor; of sizes that are symbols, if they are the same."""
    if isinstance(a, int) and isinstance(b, int):
        return math.gcd(a, b)
    return a if a == b else 1


class Factor(NamedTuple):
    """``root[view, plus summed digits by inner strides] ** power``."""

    root: Root
    power: float
    view: View
    inner: tuple[int, ...]


class Term(NamedTuple):
    """A strided einsum: a product of factors, summed over digits of some sizes."""

    coefficient: float
    factors: tuple[Factor, ...]
    inner: tuple[int, ...]  # sizes of the summed digits

    def with_factors(self, factors: Iterable[Factor]) -> Term:
        return self._replace(factors=tuple(factors))


class Reading(NamedTuple):
    """A constant plus a sum of terms."""

    shape: tuple[int, ...]
    terms: tuple[Term, ...]
    constant: float = 0.0

    @property
    def only(self) -> Term | None:
        """The one term that it consists of."""
        alone = len(self.terms) == 1 and self.constant == 0
        return self.terms[0] if alone else None


@dataclass(eq=False)
class Function:
    """A function of a reading, made once: two of them are equal if they are one.

    Attributes:
      name: ``"exp"``, ``"sum"`` (the reading itself, raised to a power), ``"not"``.
      argument: what it is a function of, over axes of its own.
      made_by: the equations that compute it.
    """

    name: str
    argument: Reading
    made_by: list[Equation] = field(default_factory=list)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.argument.shape


Root = Value | Function
_LONGEST = 4096  # numbers of an index that is looked at
_MOST = 256  # terms of a reading; a value with more is its own root


class Terms:
    """The readings of a program's values, made when asked for.

    ``opaque`` are primitives with a rule of their own, which nothing looks into.
    """

    def __init__(
        self, program: Program, opaque: Iterable[Any] = (), only_moved: bool = False
    ):
        self.program = program
        self.only_moved = only_moved
        self.opaque = frozenset(opaque)
        self._readings: dict[Value, Reading] = {}
        self.given: Mapping[Value, Reading] = {}
        self._through = False
        self._functions: dict[Any, Function] = {}
        self._numbers: dict[Any, int] = {}
        self.remembered: dict[Any, Any] = {}  # what recognisers made of readings

    @cached_property
    def moves(self) -> Terms:
        """Readings of movement alone: what each value was before it was moved."""
        return self if self.only_moved else Terms(self.program, self.opaque, True)

    def before_moves(self, atom: Atom) -> tuple[Value, View] | None:
        """The value that an atom is a view of, and that view; None of a number."""
        term = self.unmoved(atom).only
        if term is None or not isinstance(term.factors[0].root, Value):
            return None
        return term.factors[0].root, term.factors[0].view

    def before_trip(self, value: Value) -> Value:
        """What a value was before it was moved forth and back: split and joined, padded
        and cut, behind a barrier; itself if something else reads what is on the way."""
        made = value.producer
        in_shape = (
            made is not None and moves_all(made) and made.primitive is not p.rev_p
        )
        if made is None or not is_move(made) or in_shape:
            return value
        found = self.before_moves(value)
        if found is None or found[0] is value or not self.program.is_active(value):
            return value
        root, view = found
        if root.shape != value.shape or view != View.whole(root.shape):
            return value
        equations, _ = between([root], [value], self.program.active.__contains__)
        on_the_way = {root, *(v for e in equations for v in e.outputs)} - {value}
        uses = (use for v in on_the_way for use in self.program.uses.get(v, ()))
        kept_apart = not on_the_way.isdisjoint(self.program.boundaries)
        alone = not kept_apart and set(uses) <= set(equations)
        return root if alone else value

    def unmoved(self, atom: Atom) -> Reading:
        """An atom as a view of what it was before it was moved."""
        known = isinstance(atom, Literal) or self.number_of(atom) is not None
        return self.operand(atom) if known else self.moves.read(atom)  # type: ignore

    # What recognisers ask.

    def read(self, value: Value) -> Reading:
        """What a value is made of."""
        if value not in self._readings:
            self._fill(value)
        return self._readings[value]

    def opened(self, root: Root) -> Reading | None:
        """What a root is made of, over its own axes; None if it is nothing else."""
        if isinstance(root, Function):
            return root.argument if root.name == "sum" else None
        stabilised = self._stabilised(root)
        if stabilised is not None:
            inner = isinstance(stabilised, Value)
            return self.read(stabilised) if inner else self.operand(stabilised)  # type: ignore
        reading = self.read(root)
        term = reading.only
        itself = term and len(term.factors) == 1 and term.factors[0].root is root
        return None if itself else reading

    def expanded(self, factor: Factor) -> Reading | None:
        """What a factor's root is made of, over the axes of the factor."""
        reading = self.opened(factor.root)
        return reading and self.within(reading, factor.view)

    def within(self, reading: Reading, view: View) -> Reading | None:
        """A reading over the axes of a view of what it reads."""
        return _mapped(reading, view.shape, lambda inner: inner.after(view))

    def number_of(self, atom: Atom) -> float | None:
        """The one number that an atom is known to consist of."""
        if isinstance(atom, Value) and self.program.is_active(atom):
            return None
        known = scalar_of(atom)
        if known is None or np.iscomplexobj(known):
            return None
        return float(known)

    def array_of(self, atom: Atom) -> np.ndarray | None:
        """The numbers of a short index, if they are known; in one row."""
        if math.prod(atom.shape) > _LONGEST:
            return None
        number = scalar_of(atom)
        if number is not None:
            return np.full(math.prod(atom.shape), number)
        if isinstance(atom, Literal):
            return np.ravel(atom.number)
        equations, starts = computing(self.program, [atom], lambda value: True)
        if starts or any(math.prod(e.outputs[0].shape) > _LONGEST for e in equations):
            return None
        read = {v for e in equations for v in e.inputs if isinstance(v, Value)}
        env = {v: self.program.constants.get(v) for v in read}
        env[atom] = self.program.constants.get(atom)
        held = [v for v in env if v in self.program.constants]
        if any(is_tracer(env[v]) for v in held):
            return None
        with jax.ensure_compile_time_eval():
            evaluate(equations, env)
            return np.ravel(np.asarray(env[atom]))

    def operand(self, atom: Atom) -> Reading:
        """An atom as what reads it reads it."""
        number = self.number_of(atom)
        if number is not None:
            return Reading(tuple(atom.shape), (), number)
        if isinstance(atom, Literal):
            atom = self._literal(atom)
        if atom in self.given:
            return self.given[atom]
        if self._is_root(atom) or atom not in self._readings:
            return itself(atom)
        return self._readings[atom]

    def assuming(self, given: Mapping[Value, Reading], through: bool = False) -> Terms:
        """Terms in which some values are read as something else; ``through`` learned
        maps, as far as to these values."""
        other = copy(self)
        other._readings, other.given, other._through = {}, given, through
        return other

    def beside(self, atom: Atom, out: Value) -> Reading:
        """An operand over the axes of an elementwise output; axes of 1 are repeated."""
        reading = self.operand(atom)
        shape = tuple(out.shape)
        if reading.shape == shape:
            return reading
        axes = range(len(reading.shape))  # of a scalar: none
        found = _mapped(reading, shape, lambda view: view.broadcast(shape, axes))
        assert found is not None
        return found

    def is_active(self, root: Root) -> bool:
        if isinstance(root, Value):
            return self.program.is_active(root)
        return any(self.is_active(f.root) for f in factors_of(root.argument))

    def active(self, reading: Reading) -> Reading:
        """A reading without the terms and numbers that do not carry relevance."""
        kept = (
            t for t in reading.terms if any(self.is_active(f.root) for f in t.factors)
        )
        return Reading(reading.shape, tuple(kept))

    # How values are read.

    def _fill(self, wanted: Value) -> None:
        stack: list[Any] = [wanted]
        while stack:
            value = stack[-1]
            if value in self._readings:
                stack.pop()
                continue
            made = value.producer
            rule = None if made is None else self._rule(made)
            if rule is None:
                self._readings[stack.pop()] = itself(value)
                continue
            assert made is not None
            missing = [a for a in _followed(made) if self._is_followed(a)]
            if missing:
                stack += missing
                continue
            found = rule(self, made, value)
            if found is None or len(found.terms) > _MOST:
                found = itself(value)
            self._readings[stack.pop()] = found

    def _is_followed(self, atom: Atom) -> bool:
        return (
            isinstance(atom, Value)
            and atom not in self._readings
            and atom not in self.given
            and not self._is_root(atom)
            and self.number_of(atom) is None
        )

    def _rule(self, equation: Equation) -> Rule | None:
        prim = equation.primitive
        if prim in self.opaque:
            return None
        rule = _MOVED.get(prim) or _MOVED_BY_NAME.get(prim.name)
        if rule is None:
            rule = (_CHOSEN if self.only_moved else _RULES).get(prim)
        if rule is None or any(map(is_complex, equation.outputs)):
            return None
        return rule

    def _is_root(self, value: Value) -> bool:
        """Whether what reads a value reads nothing behind it."""
        made = value.producer
        if made is None or value in self.program.boundaries:
            return True
        if self._rule(made) is None:
            return True
        prim = made.primitive
        if (
            self.only_moved
            or prim in _FOLLOWED
            or prim in _MOVED
            or prim.name in _MOVED_BY_NAME
        ):
            return False
        if not self.program.is_active(value):  # what parameters make is one of them
            return made.primitive is not p.select_n_p
        if made.primitive is p.dot_general_p and not self._through:  # a learned map
            still = [a for a in made.inputs if not self.program.is_active(a)]
            if any(self.number_of(a) is None and a not in self.given for a in still):
                return True
        return len(self.program.uses.get(value, ())) > 1

    def _stabilised(self, value: Value) -> Atom | None:
        """``b`` in ``max(b, c)`` with a number c."""
        made = value.producer
        if made is None or made.primitive not in (p.max_p, p.clamp_p):
            return None
        others = [a for a in made.inputs if self.number_of(a) is None]
        return others[0] if len(others) == 1 else None

    def _literal(self, literal: Literal) -> Value:
        key = ("literal", literal.shape, str(literal.dtype), literal.number.tobytes())
        if key not in self._functions:
            self._functions[key] = Value(literal.number)  # type: ignore[assignment]
        return self._functions[key]  # type: ignore[return-value]

    def _number(self, root: Root) -> int:
        return self._numbers.setdefault(root, len(self._numbers))

    def normal(self, term: Term) -> Term:
        """A term with its factors in order, and as few summed digits as can be."""
        return _normal(term, self._number)

    def closed(self, reading: Reading) -> Reading:
        """A reading in its normal form: like terms are one, zeros are gone."""
        terms = list(map(self.normal, reading.terms))
        if len(terms) > 1:
            terms = _collected(terms)
        if len(terms) > 1 and (unrolled := _unrolled(terms)):
            again = _collected(unrolled)  # parts of one sum, of different lengths
            terms = again if len(again) < len(terms) else terms
        return Reading(reading.shape, tuple(terms), reading.constant)

    def function(
        self, name: str, reading: Reading, made_by: Equation | None, out: Value
    ) -> Reading:
        """An elementwise function of a reading; views stay outside of it."""
        reading = self.closed(reading)
        term = reading.terms[0] if len(reading.terms) == 1 else None
        if term is not None and len(term.factors) == 1 and not term.inner:
            (factor,) = term.factors
            whole = View.whole(factor.root.shape)
            inside = Factor(factor.root, factor.power, whole, ())
            argument = Reading(
                tuple(factor.root.shape),
                (Term(term.coefficient, (inside,), ()),),
                reading.constant,
            )
            view = factor.view
        else:
            found = self._own_axes(reading)
            if found is None:
                return itself(out)
            argument, view = found
        function = self._functions.setdefault(
            (name, argument), Function(name, argument)
        )
        if made_by is not None and made_by not in function.made_by:
            function.made_by.append(made_by)
        return Reading(
            reading.shape, (Term(1.0, (Factor(function, 1, view, ()),), ()),)
        )

    def _own_axes(self, reading: Reading) -> tuple[Reading, View] | None:
        """A reading over the digits along which it varies, and the view of that."""
        factors = list(factors_of(reading))
        digits: list[tuple[tuple[int, ...], int, int, int]] = []
        sizes_of_axes = []
        for i in range(len(reading.shape)):
            sizes = refined(f.view.axes[i] for f in factors)
            if sizes is None:
                return None
            strides = [strides_of(f.view.axes[i], sizes) for f in factors]
            if None in strides:
                return None
            sizes_of_axes.append(sizes)
            for k, size in enumerate(sizes):
                along = tuple(s[k] for s in strides)  # type: ignore[index]
                if any(along):
                    digits.append((tuple(-abs(s) for s in along), i, k, size))
        digits.sort()
        places = {(i, k): place for place, (_, i, k, _) in enumerate(digits)}
        shape = tuple(size for *_, size in digits)
        own = View.whole(shape).axes

        def view_of(i: int) -> Axis:
            axis: list[Digit] = []
            for k, size in enumerate(sizes_of_axes[i]):
                place = places.get((i, k))
                stride = own[place][0][1] if place is not None and own[place] else 0
                axis.append((size, stride))
            return merged(axis)

        def moved(factor: Factor) -> Factor:
            axes: list[Axis] = [()] * len(digits)
            for (i, k), place in places.items():
                strides = strides_of(factor.view.axes[i], sizes_of_axes[i])
                assert strides is not None
                axes[place] = merged([(shape[place], strides[k])])
            return factor._replace(view=View(factor.view.offset, tuple(axes)))

        terms = tuple(t.with_factors(map(moved, t.factors)) for t in reading.terms)
        view = View(0, tuple(map(view_of, range(len(reading.shape)))))
        return Reading(shape, terms, reading.constant), view


def _followed(equation: Equation) -> Sequence[Atom]:
    """The operands behind which a rule reads; an exponent is only moved back."""
    moved = (p.exp_p, p.exp2_p, p.expm1_p)
    return () if equation.primitive in moved else equation.inputs


Rule = Callable[[Terms, Equation, Value], Reading | None]


def itself(value: Value) -> Reading:
    """A value read as itself."""
    factor = Factor(value, 1, View.whole(value.shape), ())
    return Reading(tuple(value.shape), (Term(1.0, (factor,), ()),))


def factors_of(reading: Reading) -> Iterator[Factor]:
    return (factor for term in reading.terms for factor in term.factors)


def varying_axes(reading: Reading) -> frozenset[int]:
    """The axes along which a reading may vary."""
    views = [f.view for f in factors_of(reading)]
    return frozenset(
        i
        for i in range(len(reading.shape))
        if any(stride for view in views for _, stride in view.axes[i])
    )


def _mapped(
    reading: Reading, shape: Sequence[int], change: Callable[[View], View | None]
) -> Reading | None:
    """A reading of which every view is changed; None if one cannot be."""
    terms = []
    for term in reading.terms:
        factors = []
        for factor in term.factors:
            view = change(factor.view)
            if view is None:
                return None
            factors.append(factor._replace(view=view))
        terms.append(term.with_factors(factors))
    return Reading(tuple(shape), tuple(terms), reading.constant)


# Normal form.


def _normal(term: Term, number: Callable[[Root], int]) -> Term:
    """A term with its factors in order, and as few summed digits as there can be."""
    coefficient, factors, sizes = term.coefficient, list(term.factors), term.inner
    if len(factors) > 1:
        factors.sort(key=lambda f: (number(f.root), f.power, f.view, f.inner))
        same: list[Factor] = []
        for factor in factors:
            last = same[-1] if same else None
            if last is not None and last._replace(power=factor.power) == factor:
                same[-1] = factor._replace(power=factor.power + last.power)
            else:
                same.append(factor)
        factors = same
    digits: list[tuple[int, tuple[int, ...]]] = []
    starts = [f.view.offset for f in factors]
    for k, size in enumerate(sizes):
        along = tuple(f.inner[k] for f in factors)
        first = next((stride for stride in along if stride), 0)
        if first < 0:  # counted from the other end
            starts = [a + (size - 1) * s for a, s in zip(starts, along, strict=True)]
            along = tuple(-stride for stride in along)
        if first:
            digits.append((size, along))
        else:
            coefficient *= size
    digits = _fewest(digits)
    inner = tuple(size for size, _ in digits)
    return Term(
        coefficient,
        tuple(
            f._replace(
                view=f.view._replace(offset=starts[i]),
                inner=tuple(along[i] for _, along in digits),
            )
            for i, f in enumerate(factors)
        ),
        inner,
    )


def _fewest(
    digits: list[tuple[int, tuple[int, ...]]],
) -> list[tuple[int, tuple[int, ...]]]:
    """Summed digits in order, those that continue each other as one."""
    digits = sorted(d for d in digits if d[0] > 1)
    again = len(digits) > 1
    while again:
        again = False
        for a in digits:
            for b in digits:
                if a is not b and a[1] == tuple(b[0] * s for s in b[1]):
                    digits = [d for d in digits if d is not a and d is not b]
                    digits = sorted([*digits, (a[0] * b[0], b[1])])
                    again = True
                    break
            if again:
                break
    return digits


def _collected(terms: Sequence[Term]) -> list[Term]:
    """Equal terms as one, and terms along a line of offsets as a sum over it."""
    totals: dict[Any, float] = {}
    for term in terms:
        key = term._replace(coefficient=1.0)
        totals[key] = totals.get(key, 0.0) + term.coefficient
    lines: dict[Any, dict[tuple[int, ...], None]] = {}
    for term, coefficient in totals.items():
        if coefficient:
            offsets = tuple(f.view.offset for f in term.factors)
            start = term.with_factors(
                f._replace(view=f.view._replace(offset=0)) for f in term.factors
            )
            lines.setdefault((coefficient, start), {})[offsets] = None
    found = []
    for (coefficient, start), offsets in lines.items():
        found += _on_lines(start._replace(coefficient=coefficient), sorted(offsets))
    return found


_UNROLLED = 64  # at most: terms that sums of different lengths are taken apart into


def _unrolled(terms: Sequence[Term]) -> list[Term] | None:
    """Sums that differ in their length alone, and offset, taken apart."""

    def summand(term: Term) -> Any:
        parts = [(f.root, f.power, f.view.axes) for f in term.factors]
        return term.coefficient, tuple(parts)

    counts = [math.prod(term.inner) for term in terms]
    alike = len(set(map(summand, terms))) < len(terms)
    if not alike or len({t.inner for t in terms}) < 2 or sum(counts) > _UNROLLED:
        return None
    found = []
    for term in terms:
        for index in np.ndindex(*term.inner):
            steps = [
                sum(i * s for i, s in zip(index, f.inner, strict=True))
                for f in term.factors
            ]
            factors = (
                f._replace(view=f.view._replace(offset=f.view.offset + n), inner=())
                for f, n in zip(term.factors, steps, strict=True)
            )
            found.append(Term(term.coefficient, tuple(factors), ()))
    return found


def _on_lines(term: Term, offsets: list[tuple[int, ...]]) -> list[Term]:
    """Like terms at some offsets; those equally far apart are one sum."""

    def at(offset: Sequence[int], size: int, step: Sequence[int]) -> Term:
        factors = tuple(
            f._replace(
                view=f.view._replace(offset=o),
                inner=(*f.inner, s) if size > 1 else f.inner,
            )
            for f, o, s in zip(term.factors, offset, step, strict=True)
        )
        inner = (*term.inner, size) if size > 1 else term.inner
        summed = term._replace(factors=factors, inner=inner)
        digits = _fewest(
            [(n, tuple(f.inner[k] for f in factors)) for k, n in enumerate(inner)]
        )
        return summed._replace(
            factors=tuple(
                f._replace(inner=tuple(along[i] for _, along in digits))
                for i, f in enumerate(factors)
            ),
            inner=tuple(n for n, _ in digits),
        )

    if len(offsets) == 1:
        return [at(offsets[0], 1, offsets[0])]
    step = tuple(b - a for a, b in zip(offsets[0], offsets[1], strict=True))
    length = 1
    while length < len(offsets) and offsets[length] == tuple(
        o + length * s for o, s in zip(offsets[0], step, strict=True)
    ):
        length += 1
    lines = [offsets[i : i + length] for i in range(0, len(offsets), length)]
    straight = all(
        line
        == [
            tuple(o + k * s for o, s in zip(line[0], step, strict=True))
            for k in range(length)
        ]
        for line in lines
    )
    if not straight:
        return [at(o, 1, o) for o in offsets]
    summed = at(offsets[0], length, step)
    return _on_lines(summed, [line[0] for line in lines])


# Sums of readings, and products.


def added(readings: Sequence[Reading], signs: Sequence[float]) -> Reading:
    terms = [
        term._replace(coefficient=sign * term.coefficient)
        for reading, sign in zip(readings, signs, strict=True)
        for term in reading.terms
    ]
    constant = sum(s * r.constant for r, s in zip(readings, signs, strict=True))
    return Reading(readings[0].shape, tuple(terms), constant)


def scaled(reading: Reading, number: float) -> Reading:
    if number == 1:
        return reading
    terms = (t._replace(coefficient=number * t.coefficient) for t in reading.terms)
    return Reading(reading.shape, tuple(terms), number * reading.constant)


def times(a: Reading, b: Reading) -> Reading | None:
    """A product, which is not distributed over sums: None of two of several terms."""
    for number, other in ((a, b), (b, a)):
        if not number.terms:
            return scaled(other, number.constant)
    one, two = a.only, b.only
    if one is None or two is None:
        return None
    before, behind = (0,) * len(one.inner), (0,) * len(two.inner)
    factors = [f._replace(inner=(*f.inner, *behind)) for f in one.factors]
    factors += [f._replace(inner=(*before, *f.inner)) for f in two.factors]
    term = Term(
        one.coefficient * two.coefficient, tuple(factors), (*one.inner, *two.inner)
    )
    return Reading(a.shape, (term,))


def summed_over(reading: Reading, axes: Sequence[int]) -> Reading | None:
    """A sum over some axes."""
    kept = [i for i in range(len(reading.shape)) if i not in axes]
    count = math.prod(reading.shape[i] for i in axes)
    terms = []
    for term in reading.terms:
        sizes: list[int] = list(term.inner)
        inner = [list(f.inner) for f in term.factors]
        for i in axes:
            split = refined(f.view.axes[i] for f in term.factors)
            if split is None:
                return None
            for strides, factor in zip(inner, term.factors, strict=True):
                along = strides_of(factor.view.axes[i], split)
                if along is None:
                    return None
                strides += along
            sizes += split
        factors = tuple(
            Factor(f.root, f.power, f.view.transposed(kept), tuple(strides))
            for f, strides in zip(term.factors, inner, strict=True)
        )
        terms.append(Term(term.coefficient, factors, tuple(sizes)))
    shape = tuple(reading.shape[i] for i in kept)
    return Reading(shape, tuple(terms), count * reading.constant)


# The rules of primitives.


def _movement(
    change: Callable[[Equation, View], View | None],
) -> Rule:
    def rule(terms: Terms, equation: Equation, out: Value) -> Reading | None:
        if rounds(equation):
            return None
        reading = terms.operand(equation.inputs[0])
        return _mapped(reading, out.shape, lambda view: change(equation, view))

    return rule


def _unchanged(terms: Terms, equation: Equation, out: Value) -> Reading | None:
    position = equation.outputs.index(out)
    cast = out.dtype != equation.inputs[position].dtype
    if cast and (rounds(equation) or not is_inexact(out)):
        return None
    return terms.operand(equation.inputs[position])


def _sliced(terms: Terms, equation: Equation, out: Value) -> Reading | None:
    params = equation.params
    steps = params["strides"] or (1,) * len(out.shape)
    return _cut(terms, equation.inputs[0], params["start_indices"], out.shape, steps)


def _cut(
    terms: Terms,
    atom: Atom,
    starts: Sequence[int],
    shape: Sequence[int],
    steps: Sequence[int] | None = None,
) -> Reading | None:
    """A slice of an operand: of one of its parts, if it lies within one."""
    steps = steps or (1,) * len(shape)
    while (part := _part_of(terms, atom, starts, shape, steps)) is not None:
        atom, starts = part
    total = _last_of_running(terms, atom, starts, shape)
    if total is not None:
        return total
    reading = terms.operand(atom)
    return _mapped(reading, shape, lambda view: view.cut(starts, shape, steps))


def _last_of_running(
    terms: Terms, atom: Atom, starts: Sequence[int], shape: Sequence[int]
) -> Reading | None:
    """The last of a running sum is the sum."""
    made = atom.producer if isinstance(atom, Value) else None
    if made is None or made.primitive is not p.cumsum_p or terms.only_moved:
        return None
    axis, (operand,) = made.params["axis"], made.inputs
    last = 0 if made.params["reverse"] else operand.shape[axis] - 1
    one = [1 if i == axis else n for i, n in enumerate(operand.shape)]
    if list(shape) != one or starts[axis] != last:
        return None
    total = _closed_sum(terms, terms.operand(operand), [axis])
    return total and _mapped(total, shape, lambda view: view.reshaped(shape))


def _part_of(
    terms: Terms,
    atom: Atom,
    starts: Sequence[int],
    shape: Sequence[int],
    steps: Sequence[int],
) -> tuple[Atom, list[int]] | None:
    """The operand of a concatenation or padding that a slice lies within."""
    made = atom.producer if isinstance(atom, Value) else None
    if made is None or made.primitive in terms.opaque or atom in terms.given:
        return None
    first = list(starts)
    last = [a + (n - 1) * s for a, n, s in zip(starts, shape, steps, strict=True)]
    if made.primitive is p.concatenate_p and len(made.inputs) > 1:
        axis, start = made.params["dimension"], 0
        for part in made.inputs:
            end = start + part.shape[axis]
            if start <= first[axis] and last[axis] < end:
                first[axis] -= start
                return part, first
            start = end
    if made.primitive is p.pad_p:
        operand, *_ = list(made.inputs)
        low = [n for n, *_ in made.params["padding_config"]]
        spread = any(between for *_, between in made.params["padding_config"])
        at = [a - n for a, n in zip(first, low, strict=True)]
        ends = [a - n for a, n in zip(last, low, strict=True)]
        inside = all(
            0 <= a and b < n for a, b, n in zip(at, ends, operand.shape, strict=True)
        )
        return (operand, at) if inside and not spread else None
    return None


def _split(terms: Terms, equation: Equation, out: Value) -> Reading | None:
    index, axis = equation.outputs.index(out), equation.params["axis"]
    (operand,) = equation.inputs
    starts = [0] * len(operand.shape)
    if equation.primitive.name == "split":
        starts[axis] = sum(equation.params["sizes"][:index])
        return _cut(terms, operand, starts, out.shape)
    shape = list(operand.shape)
    starts[axis], shape[axis] = index, 1
    part = _cut(terms, operand, starts, shape)
    return part and _mapped(part, out.shape, lambda view: view.reshaped(out.shape))


def _dynamic_slice(terms: Terms, equation: Equation, out: Value) -> Reading | None:
    operand, *starts = equation.inputs
    known = [terms.number_of(a) for a in starts]
    if None in known:
        return None
    at = [
        min(max(int(start), 0), n - m)  # type: ignore[arg-type]
        for start, n, m in zip(known, operand.shape, out.shape, strict=True)
    ]
    return _cut(terms, operand, at, out.shape)


def _concatenated(terms: Terms, equation: Equation, out: Value) -> Reading | None:
    """Parts of one value that continue each other."""
    axis = equation.params["dimension"]
    parts = [terms.operand(a).only for a in equation.inputs]
    return _together(parts, [a.shape[axis] for a in equation.inputs], axis, out)


def _stacked(terms: Terms, equation: Equation, out: Value) -> Reading | None:
    axis = equation.params["axis"]
    shape = [1 if i == axis else n for i, n in enumerate(out.shape)]
    wide = [
        _mapped(terms.operand(a), shape, lambda view: view.reshaped(shape))
        for a in equation.inputs
    ]
    return _together([w and w.only for w in wide], [1] * len(wide), axis, out)


def _together(
    parts: Sequence[Term | None], sizes: Sequence[int], axis: int, out: Value
) -> Reading | None:
    first = parts[0]
    if first is None or any(
        part is None
        or part._replace(factors=()) != first._replace(factors=())
        or len(part.factors) != len(first.factors)
        for part in parts
    ):
        return None
    factors = []
    for several in zip(*(part.factors for part in parts if part), strict=True):
        whole = joined(several, sizes, axis)
        if whole is None:
            return None
        factors.append(whole)
    return Reading(tuple(out.shape), (first.with_factors(factors),))


def joined(parts: Sequence[Factor], sizes: Sequence[int], axis: int) -> Factor | None:
    def elsewhere(factor: Factor) -> Factor:
        axes = list(factor.view.axes)
        axes[axis] = ()
        return factor._replace(view=View(0, tuple(axes)))

    first = parts[0]
    if any(elsewhere(part) != elsewhere(first) for part in parts):
        return None
    along = [part.view.axes[axis] for part in parts]
    offsets = [part.view.offset for part in parts]
    if len(parts) == 1:
        return first
    alike = len(set(along)) == 1
    if alike:  # equally far apart
        step = offsets[1] - offsets[0]
        if offsets == [offsets[0] + k * step for k in range(len(parts))]:
            digits = merged([(len(parts), step), *along[0]])
            return _with_axis(first, axis, digits)
    strides = {digits[0][1] for digits in along if len(digits) == 1}
    if len(strides) != 1 or any(len(digits) > 1 for digits in along):
        return None
    (stride,), at = strides, offsets[0]
    for offset, size in zip(offsets, sizes, strict=True):
        if offset != at:
            return None
        at += size * stride
    return _with_axis(first, axis, merged([(sum(sizes), stride)]))


def _with_axis(factor: Factor, axis: int, digits: Axis) -> Factor:
    axes = list(factor.view.axes)
    axes[axis] = digits
    return factor._replace(view=factor.view._replace(axes=tuple(axes)))


def _added(terms: Terms, equation: Equation, out: Value) -> Reading | None:
    sign = -1.0 if equation.primitive is p.sub_p else 1.0
    readings = [terms.beside(a, out) for a in equation.inputs]
    return added(readings, (1.0, sign))


def _negated(terms: Terms, equation: Equation, out: Value) -> Reading | None:
    return scaled(terms.operand(equation.inputs[0]), -1.0)


def _multiplied(terms: Terms, equation: Equation, out: Value) -> Reading | None:
    a, b = (_as_factor(terms, x, out) for x in equation.inputs)
    return None if a is None or b is None else times(a, b)


def _as_factor(terms: Terms, atom: Atom, out: Value | None = None) -> Reading | None:
    """An operand of a product: a sum of several terms is one factor."""
    reading = terms.operand(atom) if out is None else terms.beside(atom, out)
    if not reading.terms or reading.only is not None:
        return reading
    assert isinstance(atom, Value)
    return terms.function("sum", reading, None, atom)


def _divided(terms: Terms, equation: Equation, out: Value) -> Reading | None:
    a = _as_factor(terms, equation.inputs[0], out)
    b = _to_power(terms, equation.inputs[1], -1.0, out)
    return None if a is None or b is None else times(a, b)


def _to_power(
    terms: Terms, atom: Atom, power: float, out: Value | None = None
) -> Reading | None:
    reading = terms.operand(atom) if out is None else terms.beside(atom, out)
    if not reading.terms:
        with np.errstate(all="ignore"):
            number = float(np.float64(reading.constant) ** power)
        return Reading(reading.shape, (), number) if np.isfinite(number) else None
    assert isinstance(atom, Value)
    term = reading.only
    whole = power == int(power)
    alone = term is not None and len(term.factors) == 1 and term.factors[0].power == 1
    powers = whole or (alone and term is not None and term.coefficient > 0)
    if term is None or term.inner or not powers:
        reading = terms.function("sum", reading, None, atom)
        term = reading.only
        assert term is not None
    factors = (f._replace(power=f.power * power) for f in term.factors)
    scale = float(np.float64(term.coefficient) ** power)
    return Reading(reading.shape, (Term(scale, tuple(factors), ()),))


def _powered(power: float | None) -> Rule:
    def rule(terms: Terms, equation: Equation, out: Value) -> Reading | None:
        exponent = equation.params["y"] if power is None else power
        return _to_power(terms, equation.inputs[0], exponent)

    return rule


def _exponential(terms: Terms, equation: Equation, out: Value) -> Reading | None:
    prim = equation.primitive
    if prim is p.pow_p:
        base = terms.number_of(equation.inputs[0])
        power = terms.number_of(equation.inputs[1])
        if power is not None:
            return _to_power(terms, equation.inputs[0], power)
        if base is None or base <= 0 or base == 1:
            return None
        exponent, scale = terms.unmoved(equation.inputs[1]), math.log(base)
    else:
        exponent = terms.unmoved(equation.inputs[0])
        scale = math.log(2.0) if prim is p.exp2_p else 1.0
    return terms.function("exp", scaled(exponent, scale), equation, out)


def _exponential_less_one(
    terms: Terms, equation: Equation, out: Value
) -> Reading | None:
    exponent = terms.unmoved(equation.inputs[0])
    exponential = terms.function("exp", exponent, equation, out)
    if exponential.terms[0].factors[0].root is out:  # it has no axes of its own
        return None
    return exponential._replace(constant=-1.0)


def _reduced(terms: Terms, equation: Equation, out: Value) -> Reading | None:
    return _closed_sum(
        terms, terms.operand(equation.inputs[0]), equation.params["axes"]
    )


def _windowed(terms: Terms, equation: Equation, out: Value) -> Reading | None:
    """A sum over one window, that covers its axes."""
    if (axes := covered(equation)) is None:
        return None
    total = _closed_sum(terms, terms.operand(equation.inputs[0]), axes)
    return total and _mapped(total, out.shape, lambda view: view.reshaped(out.shape))


def covered(equation: Equation) -> list[int] | None:
    """The axes that the window of a sum covers; None if there are several windows."""
    (operand,), params = equation.inputs, equation.params
    window = params["window_dimensions"]
    dilated = {*params["base_dilation"], *params["window_dilation"]} - {1}
    padded = any(n for pair in params["padding"] for n in pair)
    along = list(zip(window, operand.shape, params["window_strides"], strict=True))
    if dilated or padded or any(n not in (1, m) for n, m, _ in along):
        return None
    skips = any(n == 1 and step != 1 for n, _, step in along)
    return None if skips else [i for i, n in enumerate(window) if n != 1]


def _closed_sum(terms: Terms, reading: Reading, axes: Sequence[int]) -> Reading | None:
    found = summed_over(reading, axes)
    return None if found is None else terms.closed(found)


def _contracted(terms: Terms, equation: Equation, out: Value) -> Reading | None:
    """A contraction: a product of both operands over all of their axes, summed."""
    contracting, batch = equation.params["dimension_numbers"]
    ranks = [len(a.shape) for a in equation.inputs]
    free = [
        [i for i in range(ranks[k]) if i not in contracting[k] and i not in batch[k]]
        for k in (0, 1)
    ]
    lhs, rhs = (a.shape for a in equation.inputs)
    shape = (
        *(lhs[i] for i in (*batch[0], *free[0])),
        *(rhs[i] for i in free[1]),
        *(lhs[i] for i in contracting[0]),
    )
    n, m = len(batch[0]), len(batch[0]) + len(free[0])
    summed = range(m + len(free[1]), len(shape))
    places = [{}, {}]
    for k in (0, 1):
        start = n if k == 0 else m
        pairs = [
            *zip(batch[k], range(n), strict=True),
            *zip(free[k], range(start, start + len(free[k])), strict=True),
            *zip(contracting[k], summed, strict=True),
        ]
        places[k] = dict(pairs)
    wide = []
    for k, atom in enumerate(equation.inputs):
        reading = _as_factor(terms, atom)
        if reading is None:
            return None
        at = [places[k][i] for i in range(ranks[k])]
        wide.append(_mapped(reading, shape, lambda view: view.broadcast(shape, at)))  # noqa: B023
    product = times(*wide)
    return product and _closed_sum(terms, product, list(summed))


def _selected(terms: Terms, equation: Equation, out: Value) -> Reading | None:
    """A mask: one of two cases is zero."""
    which, *cases = equation.inputs
    always = terms.number_of(which)
    if always is not None:
        return terms.beside(cases[int(always)], out)
    zeros = [terms.number_of(a) == 0 for a in cases]
    if len(cases) != 2 or sum(zeros) != 1 or which.shape != out.shape:
        return None
    kept = zeros.index(False)
    mask = terms.operand(which)
    if kept == 0:
        mask = terms.function("not", mask, None, out)
    value = _as_factor(terms, cases[kept], out)
    return value and times(mask, value)


def _cast(terms: Terms, equation: Equation, out: Value) -> Reading | None:
    if equation.inputs[0].dtype == np.bool_:
        return terms.operand(equation.inputs[0])  # a mask of zeros and ones
    return _unchanged(terms, equation, out)


def is_move(equation: Equation) -> bool:
    """Whether an equation puts numbers elsewhere, each of them unchanged."""
    row = traits(equation)
    return row.movement and not row.carries_elementwise


def moves_all(equation: Equation) -> bool:
    """Whether an equation only puts the numbers of one operand in another order."""
    if equation.primitive not in _ORDERS or rounds(equation):
        return False
    (source, *_), (out, *_) = equation.inputs, equation.outputs
    return math.prod(source.shape) == math.prod(out.shape)


def moved(equation: Equation, view: View) -> View | None:
    """The view of what an equation moves, behind it."""
    change = _ORDERS[equation.primitive]
    return change(equation, view)


def _reshaped(equation: Equation, view: View) -> View | None:
    return view.reshaped(equation.outputs[0].shape)


def _selected_always(terms: Terms, equation: Equation, out: Value) -> Reading | None:
    which, *cases = equation.inputs
    always = terms.number_of(which)
    return None if always is None else terms.beside(cases[int(always)], out)


def _real(terms: Terms, equation: Equation, out: Value) -> Reading | None:
    """The real part of what was made complex."""
    (source,) = equation.inputs
    made = source.producer if isinstance(source, Value) else None
    if made is None or made.primitive is not p.complex_p:
        return None
    return terms.operand(made.inputs[0])


def _written_over(terms: Terms, equation: Equation, out: Value) -> Reading | None:
    """What was written over all of something."""
    _, update, *_ = equation.inputs
    return terms.operand(update) if update.shape == out.shape else None


def _scattered_over(terms: Terms, equation: Equation, out: Value) -> Reading | None:
    """Rows that were written over all of something, in order."""
    _, index, update = equation.inputs
    numbers = equation.params["dimension_numbers"]
    if numbers.scatter_dims_to_operand_dims != (0,) or update.shape != out.shape:
        return None
    plain = (
        numbers.inserted_window_dims == (0,)
        and numbers.update_window_dims == tuple(range(1, len(out.shape)))
        and equation.params["update_jaxpr"] is None
    )
    rows = terms.array_of(index) if plain else None
    in_order = rows is not None and np.array_equal(rows, np.arange(out.shape[0]))
    return terms.operand(update) if in_order else None


def _gathered(terms: Terms, equation: Equation, out: Value) -> Reading | None:
    """Rows at known places, equally far apart: ``x[:, 2]``, ``x[[2, 1, 0]]``."""
    operand, index = equation.inputs
    numbers = equation.params["dimension_numbers"]
    sizes = list(equation.params["slice_sizes"])
    if len(numbers.start_index_map) != 1 or getattr(
        numbers, "operand_batching_dims", ()
    ):
        return None
    (axis,) = numbers.start_index_map
    collapsed = tuple(numbers.collapsed_slice_dims)
    offsets = tuple(numbers.offset_dims)
    if collapsed not in ((), (axis,)) or sorted(offsets) != list(offsets):
        return None
    rows = terms.array_of(index)
    if rows is None or len(rows) == 0 or (len(rows) > 1 and collapsed != (axis,)):
        return None
    steps = set(np.diff(rows).tolist()) or {1}
    (step, *others) = steps
    last = operand.shape[axis] - sizes[axis]
    if others or step == 0 or rows.min() < 0 or rows.max() > last:
        return None
    starts, strides = [0] * len(sizes), [1] * len(sizes)
    starts[axis], strides[axis] = int(rows.min()), abs(step)
    if len(rows) > 1:
        sizes[axis] = len(rows)
    part = _cut(terms, operand, starts, sizes, strides)
    if step < 0:
        part = part and _mapped(part, sizes, lambda view: view.reversed_along([axis]))
    kept = [i for i in range(len(sizes)) if i not in collapsed]
    batch = [i for i in range(len(out.shape)) if i not in offsets]
    if len(batch) > 1 or (len(rows) > 1 and not batch):
        return None

    def change(view: View) -> View | None:
        if len(rows) > 1:
            at: dict[int, int] = dict(zip(offsets, kept, strict=True))
            order = [at[i] if i in at else axis for i in range(len(out.shape))]
            return view.transposed(order)
        return view.transposed(kept).reshaped(out.shape)

    return part and _mapped(part, out.shape, change)


_Change = Callable[[Equation, View], "View | None"]
_ORDERS: dict[Any, _Change] = {
    p.broadcast_in_dim_p: lambda e, v: v.broadcast(
        e.outputs[0].shape, e.params["broadcast_dimensions"]
    ),
    p.reshape_p: _reshaped,
    p.rev_p: lambda e, v: v.reversed_along(e.params["dimensions"]),
    p.squeeze_p: _reshaped,
    p.transpose_p: lambda e, v: v.transposed(e.params["permutation"]),
}
_MOVED: dict[Any, Rule] = {
    p.concatenate_p: _concatenated,
    p.convert_element_type_p: _cast,
    p.copy_p: _unchanged,
    p.dynamic_slice_p: _dynamic_slice,
    p.dynamic_update_slice_p: _written_over,
    p.gather_p: _gathered,
    p.real_p: _real,
    p.reduce_precision_p: _unchanged,
    p.scatter_p: _scattered_over,
    p.slice_p: _sliced,
    **{primitive: _movement(change) for primitive, change in _ORDERS.items()},
}
_MOVED_BY_NAME: dict[str, Rule] = {
    "optimization_barrier": _unchanged,
    "split": _split,
    "stack": _stacked,
    "unstack": _split,
    "wait": _unchanged,
}
_CHOSEN: dict[Any, Rule] = {p.select_n_p: _selected_always}  # a movement, perhaps
_RULES: dict[Any, Rule] = {
    p.add_jaxvals_p: _added,
    p.add_p: _added,
    p.cumsum_p: lambda terms, equation, out: None,  # but for its last
    p.div_p: _divided,
    p.dot_general_p: _contracted,
    p.exp2_p: _exponential,
    p.exp_p: _exponential,
    p.expm1_p: _exponential_less_one,
    p.integer_pow_p: _powered(None),
    p.mul_p: _multiplied,
    p.neg_p: _negated,
    p.pow_p: _exponential,
    p.reduce_sum_p: _reduced,
    p.reduce_window_sum_p: _windowed,
    p.rsqrt_p: _powered(-0.5),
    p.select_n_p: _selected,
    p.sqrt_p: _powered(0.5),
    p.square_p: _powered(2.0),
    p.sub_p: _added,
}
# Followed through values with several readers: functions of one value, as views are.
_FOLLOWED = {p.exp2_p, p.exp_p, p.expm1_p, p.neg_p}
