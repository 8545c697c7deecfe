"""Unary region: one activation function, whatever it is made of.

The region that ends at y starts at y's furthest dominator x among the active values
such that everything between is elementwise in x and constants, at least one equation of
it nonlinear in x; what moves numbers inside of it must move them alike on all paths.
Literal shifts and scales belong to it; on a single path it stops at a scale or shift by
a parameter, which belongs to the affine operation. At its start so does

* a literal shift, if what follows is homogeneous (1/x, ReLU): it is a bias;
* a literal scale of one over the count, right behind a sum: both are a mean;
* a minus behind a dense or convolution, unless f is larger for negative numbers and
  nothing else reads what is behind the minus.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.extend.core import primitives as p

from jlrp.analysis.intervals import at_zero, is_elementwise, scalar_of, value_at
from jlrp.analysis.missing import elementwise_sources, replaces, tested_by
from jlrp.analysis.terms import Terms, is_move, moved, moves_all
from jlrp.analysis.terms import View as AxisView
from jlrp.ir.families import rounds, why_missing
from jlrp.ir.primitives import traits
from jlrp.ir.program import Equation, Program, Value, between
from jlrp.ops.affine import core_of, scale_chain, start_of
from jlrp.ops.mean import mean_of
from jlrp.ops.softmax import Softmaxes
from jlrp.promise import is_complex


@dataclass(frozen=True)
class Region:
    """The elementwise function from ``start`` to ``end``."""

    start: Value
    end: Value
    equations: tuple[Equation, ...]
    constants: tuple[Value, ...]
    zero_at_zero: bool  # f(0) = 0 is proved
    homogeneous: bool  # f(x) = c x^n: relevance passes (Euler), even if f(0) != 0
    may_miss: bool = False  # x may be NaN where the output is not: it was tested
    inverted: bool = False  # something is divided by the output: the function is 1/f
    layout: AxisView | None = None  # of the start's numbers in the end; None: as is


class Regions:
    """Finds the unary region that ends at a value; memoised over one program."""

    def __init__(
        self,
        program: Program,
        opaque: set[Any],
        outer: Regions | None = None,
        inverts: bool = True,
    ):
        self.program = program
        self.inverts = inverts  # what a value is divided by is read as one over it
        self.outer = outer  # of the program around a body
        self.opaque = opaque  # primitives with a rule of their own
        self.terms = Terms(program, opaque)
        self.softmaxes = Softmaxes(self.terms)
        self._dominators: dict[Value, Value | None] = {}
        self._regions: dict[Value, Region | None] = {}
        self.ends: dict[Value, str | None] = {}  # what products end in (product.py)

    def dominator(self, value: Value) -> Value | None:
        """The nearest active value of which ``value`` is an elementwise function."""
        if value not in self._dominators:
            self._dominators[value] = self._dominator(value)
        return self._dominators[value]

    def _dominator(self, value: Value) -> Value | None:
        equation = value.producer
        if equation is None or equation.primitive in self.opaque:
            return None
        if is_move(equation) and not rounds(equation):
            source = self.terms.before_trip(value)
            if source is value and moves_all(equation):
                (source, *_) = self.program.active_inputs(equation) or (value,)
            return None if source is value or is_complex(source) else source
        if not traits(equation).carries_elementwise:
            return None
        operands = self.program.active_inputs(equation)
        if not operands or any(a.shape != value.shape for a in operands):
            return None
        if any(map(is_complex, (value, *operands))):  # no sign, no f(x)/x
            return None
        if why_missing(equation, self.program.active) is not None:
            return None
        if rounds(equation) or replaces(self.program, equation):
            return None
        meeting: Value | None = operands[0]
        for other in operands[1:]:
            meeting = self.meet(meeting, other)
        return meeting

    def meet(self, a: Value | None, b: Value | None) -> Value | None:
        """The nearest value of which both are elementwise functions."""
        while a is not b:
            if a is None or b is None:
                return None
            if a.position >= b.position:
                a = self._above(a)
            else:
                b = self._above(b)
        return a

    def _above(self, value: Value) -> Value | None:
        """The dominator of a value inside a region, which no boundary may be."""
        return None if value in self.program.boundaries else self.dominator(value)

    def _is_apart(self, value: Value) -> bool:
        """Whether a value is the end of an operation that is no region."""
        if value in self.program.boundaries:
            return True
        return self.softmaxes.ending_at(value) is not None

    def ending_at(self, end: Value) -> Region | None:
        if end not in self._regions:
            self._regions[end] = self._ending_at(end)
        return self._regions[end]

    def _ending_at(self, end: Value) -> Region | None:
        made = end.producer
        if made is None or is_move(made):
            return None
        path = [end]
        while (above := self.dominator(path[-1])) is not None:
            if len(path) > 1 and self._is_apart(path[-1]):
                break
            if self._is_affine_step(path[-1], above):
                break
            path.append(above)
        inverted = self._divides(end)
        while len(path) > 1 and self._begins_behind(path, inverted):
            path.pop()
        if len(path) == 1:
            return None
        return self._region(path[-1], end, inverted)

    def _region(self, start: Value, end: Value, inverted: bool) -> Region | None:
        equations, constants = between([start], [end], self._inside)
        of_active = [e for e in equations if self._is_active(e)]
        if not any(_is_nonlinear(e, start, equations) for e in of_active):
            return None
        if any(map(self._adds_dead, of_active)):
            return None
        layout = None
        if any(map(is_move, equations)):
            views = self._views(start, equations)
            if views is None:
                return None
            layout = views[end]
            if layout == AxisView.whole(start.shape):
                layout = None
        f0 = at_zero(end, start)
        tolerance = 8 * np.finfo(np.float32).eps
        zero = f0 is not None and bool(np.abs(f0) <= tolerance)
        homogeneous = _is_monomial(start, equations)
        missing = bool(self.tested and self.tested & elementwise_sources(start))
        return Region(
            start,
            end,
            equations,
            constants,
            zero and not inverted,
            homogeneous,
            missing,
            inverted,
            layout,
        )

    def _views(
        self, start: Value, equations: Sequence[Equation]
    ) -> dict[Value, AxisView] | None:
        """How the values of a region view its start; None if its paths differ."""
        views = {start: AxisView.whole(start.shape)}
        for equation in equations:
            (out, *_) = equation.outputs
            before = self.terms.before_trip(out)
            if before is not out and before in views:
                views[out] = views[before]
                continue
            inside = [views[a] for a in equation.inputs if a in views]  # type: ignore
            moves = is_move(equation)
            if not inside or (moves and not moves_all(equation)):
                if moves or not self._is_active(equation):
                    continue
                return None  # of a part of what is moved
            view: AxisView | None = inside[0]
            if any(other != view for other in inside[1:]):
                return None
            if moves_all(equation):
                view = moved(equation, inside[0])
            elif view.shape != tuple(out.shape):  # beside a constant that is larger
                view = None
            if view is None:
                return None
            views[out] = view
        return views if equations[-1].outputs[0] in views else None

    # Where a region begins.

    def _begins_behind(self, path: Sequence[Value], inverted: bool) -> bool:
        """Whether the first equation of a path from its last value is no part of f."""
        start, behind = path[-1], path[-2]
        made = behind.producer
        assert made is not None
        if self.terms.before_trip(behind) is start:
            return True
        if self.program.active_inputs(made) != (start,) or made.inputs.count(start) > 1:
            return False
        if len(self.program.uses.get(start, ())) > 1:
            return False
        if moves_all(made):
            return True
        others = [a for a in made.inputs if a is not start]
        known = [scalar_of(a) for a in others]
        minus = made.primitive is p.mul_p and len(known) == 1 and known[0] == -1
        if made.primitive is p.neg_p or minus:
            if not self._is_mapped(start):
                return False
            return self._is_read_outside(path) or _grows(path[0], behind, inverted)
        if len(known) != 1 or known[0] is None:
            return False
        if made.primitive in (p.add_p, p.add_jaxvals_p, p.sub_p, p.max_p):
            if made.primitive is p.max_p:
                positive = float(known[0]) > 0
                if not positive or not _falls(path[0], behind, inverted):
                    return False
            negated = made.primitive is p.sub_p and made.inputs[1] is start
            if negated and not (
                self._is_mapped(start) and _grows(path[0], behind, inverted)
            ):
                return False
            while len(path) > 2 and self._shifts(path[-2], path[-3]):
                path = path[:-1]  # several shifts are one
            behind = path[-2]
            equations, _ = between([behind], [path[0]], self._inside)
            return _is_monomial(behind, equations) or (
                not inverted and _is_rectifier(behind, path[0], equations)
            )
        if made.primitive in (p.mul_p, p.div_p) and made.inputs[1] is not start:
            return mean_of(self.terms, behind) is not None
        if made.primitive is p.mul_p:
            return mean_of(self.terms, behind) is not None
        return False

    def _is_read_outside(self, path: Sequence[Value]) -> bool:
        """Whether other operations read the last value of a path but one."""
        behind = path[-2]
        equations, _ = between([behind], [path[0]], self._inside)
        return not set(self.program.uses.get(behind, ())) <= set(equations)

    def _shifts(self, before: Value, behind: Value) -> bool:
        """Whether a number is added to one value to make another, and that is all."""
        made = behind.producer
        if made is None or made.primitive not in (p.add_p, p.sub_p):
            return False
        others = [scalar_of(a) for a in made.inputs if a is not before]
        alone = len(self.program.uses.get(before, ())) == 1
        return alone and made.inputs[0] is before and None not in others

    def _is_mapped(self, value: Value) -> bool:
        """Whether a value comes from a dense or convolution, scaled and shifted."""
        steps = scale_chain(self.terms, value)
        start = start_of(self.terms, steps) if steps else value
        return core_of(self.terms, start) is not None

    def _divides(self, end: Value) -> bool:
        """Whether the one thing that is done with a value is to divide by it."""
        value = end
        if not self.inverts:
            return False
        while len(uses := self.program.uses.get(value, ())) == 1:
            (use,) = uses
            if use.primitive is p.div_p:
                dividend, divisor = use.inputs
                return divisor is value and self.program.is_active(dividend)
            if use.primitive not in _SPREADING or value in self.program.boundaries:
                return False
            (value, *_) = use.outputs
        return False

    def is_inverted(self, equation: Equation, place: int) -> bool:
        """Whether an operand is divided by, and is the end of an inverted region."""
        value = equation.inputs[place]
        if equation.primitive is not p.div_p or place != 1:
            return False
        while isinstance(value, Value) and value in self.program.active:
            region = self.ending_at(value)
            if region is not None:
                return region.inverted
            made = value.producer
            if made is None or made.primitive not in _SPREADING:
                return False
            value = made.inputs[0]
        return False

    @cached_property
    def tested(self) -> set[Value]:
        """The values of which the program asks whether they are numbers."""
        chosen = [
            e.inputs[0] for e in self.program.equations if e.primitive is p.select_n_p
        ]
        return set().union(*(tested_by(a, alone=False) for a in chosen))

    def _inside(self, value: Value) -> bool:
        """Masks computed from x element by element are part of the function too."""
        return value in self.program.active or is_elementwise(value)

    def _is_affine_step(self, value: Value, above: Value) -> bool:
        """A scale or shift by a parameter, or a dead shift, on a single path."""
        equation = value.producer
        assert equation is not None
        if self._adds_dead(equation):
            return True
        row = traits(equation)
        if not row.addition and not row.scaling:
            return False
        operands = self.program.active_inputs(equation)
        others = [a for a in equation.inputs if a is not above]
        if operands != (above,) or len(others) != 1:
            return False
        divides = equation.primitive is p.div_p and equation.inputs[1] is above
        scalar = scalar_of(others[0]) is not None
        return self.program.is_parameter(others[0]) and not scalar and not divides

    def _is_active(self, equation: Equation) -> bool:
        return any(v in self.program.active for v in equation.outputs)

    def _adds_dead(self, equation: Equation) -> bool:
        """Whether a dead value is added, or put in by a mask that is no part of f."""
        masked = equation.primitive is p.select_n_p and self.program.is_parameter(
            equation.inputs[0]
        )
        if not traits(equation).addition and not masked:
            return False
        alone = len(self.program.active_inputs(equation)) == 1
        return alone and any(map(self.program.is_dead, equation.inputs))


def to_start(
    layout: AxisView | None, shape: tuple[int, ...]
) -> Callable[[jax.Array], jax.Array]:
    """The numbers of an end, each where in the start of this shape it was made from.

    ``layout`` is how the end sees the start; None: as it is.
    """
    if layout is None:
        return lambda end: end
    digits = [digit for axis in layout.axes for digit in axis]
    order = sorted(range(len(digits)), key=lambda i: -abs(digits[i][1]))
    backwards = [k for k, i in enumerate(order) if digits[i][1] < 0]

    def back(end: jax.Array) -> jax.Array:
        end = lax.reshape(end, [size for size, _ in digits])
        end = lax.rev(lax.transpose(end, order), backwards)
        return lax.reshape(end, shape)

    return back


def _is_nonlinear(
    equation: Equation, start: Value, region: tuple[Equation, ...]
) -> bool:
    """Whether an equation of a region is nonlinear in the region's start."""
    inside = {v for e in region for v in e.outputs} | {start}
    varies = [isinstance(a, Value) and a in inside for a in equation.inputs]
    prim = equation.primitive
    if prim is p.mul_p:
        return all(varies)
    if prim is p.div_p:
        return varies[1]
    if prim is p.select_n_p:
        return varies[0]
    row = traits(equation)
    return row.carries_elementwise and row.nature not in ("linear", "movement")


def _is_monomial(start: Value, region: Sequence[Equation]) -> bool:
    """Whether the region is ``c x^n``, with ``|x|`` in place of ``x`` allowed."""
    inside = {v for e in region for v in e.outputs} | {start}

    def is_power(equation: Equation) -> bool:
        if equation.primitive is p.pow_p:
            return equation.inputs[1] not in inside
        row = traits(equation)
        return row.scaling or row.degree is not None or is_move(equation)

    return all(is_power(e) for e in region)


_COMPARED = {p.ge_p, p.gt_p, p.le_p, p.lt_p}
_SPREADING = {p.broadcast_in_dim_p, p.reshape_p, p.squeeze_p, p.transpose_p}


def _is_rectifier(start: Value, end: Value, region: Sequence[Equation]) -> bool:
    """Whether ``f(c x) = c f(x)`` for c > 0: ReLU, also leaky or with a parameter."""
    degrees: dict[Any, int | None] = {start: 1}

    def degree(atom: Any) -> int | None:
        if atom in degrees:
            return degrees[atom]
        known = scalar_of(atom)
        return None if known is not None and not np.any(known) else 0  # None: any

    for equation in region:
        prim, x = equation.primitive, [degree(a) for a in equation.inputs]
        if prim in _COMPARED or prim in (p.eq_p, p.ne_p, p.sign_p):
            found = 0 if all(d in (1, None) for d in x) or not any(x) else -1
        elif prim is p.select_n_p:
            found = _same_degree(x[1:]) if x[0] == 0 else -1
        elif prim is p.mul_p:
            found = None if None in x else x[0] + x[1]  # type: ignore[operator]
        elif prim is p.div_p:
            found = x[0] if x[1] == 0 else -1
        elif prim in (p.abs_p, p.neg_p, p.convert_element_type_p, p.copy_p):
            found = x[0]
        elif prim in (p.add_p, p.add_jaxvals_p, p.sub_p, p.max_p, p.min_p):
            found = _same_degree(x)
        elif prim is p.clamp_p:
            bounds = [scalar_of(equation.inputs[i]) for i in (0, 2)]
            fixed = all(b is not None and b in (0, -np.inf, np.inf) for b in bounds)
            found = x[1] if fixed else -1
        elif is_move(equation):
            found = _same_degree(x)
        else:
            found = -1 if any(x) else 0
        if found == -1:
            return False
        degrees.update(dict.fromkeys(equation.outputs, found))
    return degrees[end] == 1


def _same_degree(x: Sequence[int | None]) -> int | None:
    found = set(x) - {None}
    return None if not found else found.pop() if len(found) == 1 else -1


_FAR = 1e3


def _grows(end: Value, start: Value, inverted: bool) -> bool:
    """Whether a function is as large for a large number as for its negative."""
    above, below = (value_at(end, start, x) for x in (_FAR, -_FAR))
    if above is None or below is None:
        return False
    above, below = abs(float(above)), abs(float(below))
    return above <= below if inverted else above >= below


def _falls(end: Value, start: Value, inverted: bool) -> bool:
    """Whether a function is a power below 0, or divided by."""
    if end is start:
        return inverted
    far, near = (value_at(end, start, x) for x in (2.0, 1.0))
    if far is None or near is None:
        return False
    return (abs(float(far)) < abs(float(near))) != inverted
