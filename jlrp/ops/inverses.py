"""What is subtracted or divided by in other words, read as difference and quotient.

``a * (1 / b)`` and ``a * b ** -1`` are ``a / b``; ``a / (b * c)`` is ``(a / b) / c``
and ``a / (b / c)`` is ``(a / b) * c``; ``exp(a - log(b))`` is ``exp(a) / b``, and
``a / exp(b)`` is ``a * exp(-b)``. So what divides is the divisor of one division,
whatever it is made of. ``a + (-b)`` and ``-(b - a)`` are ``a - b``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any, NamedTuple

from jax import lax
from jax.extend.core import primitives as p

from jlrp.analysis.intervals import is_nonnegative, scalar_of
from jlrp.analysis.terms import moves_all
from jlrp.ir import jax_compat
from jlrp.ir.program import Atom, Equation, Value
from jlrp.ops.activation import Regions
from jlrp.ops.standing import OtherWords, standing_for

Array = Any
_POWERS = (p.div_p, p.integer_pow_p, p.pow_p)


class _Moved(NamedTuple):
    """A value, and how it is moved before it is read."""

    value: Value
    moves: tuple[Equation, ...] = ()

    def __call__(self, x: Array) -> Array:
        for move in self.moves:
            (x,) = jax_compat.bind(move.primitive, move.params, [x])
        return x


class Inverses(OtherWords):
    """Differences and quotients, for what subtracts or divides otherwise."""

    @cached_property
    def regions(self) -> Regions:
        return Regions(self.program, set(self.opaque))

    def found(self) -> Iterator[tuple[Value, list[Equation]]]:
        """Values, and the equations that stand for what makes each."""
        readings = {
            p.add_p: self._sum,
            p.add_jaxvals_p: self._sum,
            p.div_p: self._division,
            p.exp_p: self._exponential,
            p.mul_p: self._product,
            p.neg_p: self._negation,
            p.sub_p: self._difference,
        }
        inside = set[Value]()
        for equation in reversed(self.program.equations):
            read = readings.get(equation.primitive)
            (out, *_) = equation.outputs
            if read is None or equation.primitive in self.opaque or out in inside:
                continue
            if out not in self.program.active:
                continue
            if (standing := read(equation)) is not None:
                operands, function, through = standing
                inside.update(through)
                yield out, standing_for(out, function, operands, equation)

    def _sum(self, equation: Equation) -> _Standing | None:
        """``a + (-b)``."""
        for i in (1, 0):
            other, negative = equation.inputs[1 - i], equation.inputs[i]
            if self.program.is_active(other) and (of := self._negated(negative)):
                return _Standing((other, of), lax.sub, {negative})
        return None

    def _difference(self, equation: Equation) -> _Standing | None:
        """``a - (-b)``."""
        minuend, negative = equation.inputs
        if self.program.is_active(minuend) and (of := self._negated(negative)):
            return _Standing((minuend, of), lax.add, {negative})
        return None

    def _negation(self, equation: Equation) -> _Standing | None:
        """``-(b - a)``."""
        (difference,) = equation.inputs
        made = self.made(difference, p.sub_p)
        if made is None or not self._is_inside(_Moved(difference)):  # type: ignore
            return None
        b, a = made.inputs
        if not self.program.is_active(a):
            return None
        return self._of_first(
            b,
            (a,),  # type: ignore[arg-type]
            lambda b, a: lax.sub(a, lax.full_like(a, b) if b.ndim < a.ndim else b),
            {difference},  # type: ignore[arg-type]
        )

    def _negated(self, atom: Atom) -> Value | None:
        """``b`` of ``-b``."""
        made = self.made(atom, p.neg_p)
        if made is None or not self._is_inside(_Moved(atom)):  # type: ignore[arg-type]
            return None
        (value,) = made.inputs
        return value if self.program.is_active(value) else None  # type: ignore

    def _product(self, equation: Equation) -> _Standing | None:
        """``a * (1 / b)`` and ``a * b ** -1``."""
        for i in (1, 0):
            other, factor = equation.inputs[1 - i], equation.inputs[i]
            if not (self.program.is_active(other) and self.program.is_active(factor)):
                return None
            moved = self._unmoved(factor)
            divisor = self._inverted(moved.value)
            if divisor is not None and self._is_inside(moved):
                place = _Moved(divisor, moved.moves)
                return _Standing(
                    (other, divisor),
                    lambda a, b, place=place: lax.div(a, place(b)),
                    self._through(moved),
                )
        return None

    def _inverted(self, value: Value) -> Value | None:
        """``b`` of ``1 / b``."""
        made = value.producer
        if made is None or made.primitive not in _POWERS:
            return None
        first, *others = made.inputs
        if made.primitive is p.div_p:
            divisor, ones, number = others[0], scalar_of(first), 1
        else:
            exponent = made.params["y"] if not others else scalar_of(others[0])
            divisor, ones, number = first, exponent, -1
        inverts = ones is not None and ones == number
        return divisor if inverts and self.program.is_active(divisor) else None  # type: ignore

    def _division(self, equation: Equation) -> _Standing | None:
        """``a / (b * c)``, ``a / (b / c)`` and ``a / exp(b)``."""
        numerator, divisor = equation.inputs
        if not self.program.is_active(divisor):
            return None
        moved = self._unmoved(divisor)
        made = self.made(moved.value, p.div_p, p.exp_p, p.mul_p)
        if made is None or not self._is_inside(moved):
            return None
        if made.primitive is p.exp_p:
            return self._times_exponential(numerator, moved)
        b, c = made.inputs
        if not all(map(self.program.is_active, made.inputs)):
            return None
        if self._is_one_function(moved.value):
            return None
        b, c = _Moved(b, moved.moves), _Moved(c, moved.moves)  # type: ignore[arg-type]
        ending = lax.div if made.primitive is p.mul_p else lax.mul
        return self._of_first(
            numerator,
            (b.value, c.value),
            lambda a, x, y: ending(lax.div(a, b(x)), c(y)),
            self._through(moved),
        )

    def _times_exponential(self, numerator: Atom, moved: _Moved) -> _Standing | None:
        """``a * exp(-b)``; of an exponential, that of the difference."""
        assert moved.value.producer is not None
        place = _Moved(moved.value.producer.inputs[0], moved.moves)  # type: ignore
        through = self._through(moved)
        made = self.made(numerator, p.exp_p)
        if made is not None and self._is_inside(_Moved(numerator)):  # type: ignore
            (exponent,) = made.inputs
            return _Standing(
                (exponent, place.value),  # type: ignore[arg-type]
                lambda a, b: lax.exp(lax.sub(a, place(b))),
                {*through, numerator},  # type: ignore[arg-type]
            )
        return self._of_first(
            numerator,
            (place.value,),
            lambda a, b: lax.mul(a, lax.exp(lax.neg(place(b)))),
            through,
        )

    @staticmethod
    def _of_first(
        first: Atom,
        operands: tuple[Value, ...],
        function: Callable[..., Array],
        through: set[Value],
    ) -> _Standing | None:
        """A function of a value or number, and of some operands."""
        if isinstance(first, Value):
            return _Standing((first, *operands), function, through)
        if first.shape:
            return None

        def of_number(*x: Array) -> Array:
            return function(first.number, *x)

        return _Standing(operands, of_number, through)

    def _is_one_function(self, value: Value) -> bool:
        """Whether a product is a function of one value: an activation, or a softmax."""
        regions = self.regions
        return (
            regions.ending_at(value) is not None
            or regions.softmaxes.ending_at(value) is not None
        )

    def _exponential(self, equation: Equation) -> _Standing | None:
        """``exp(a - log(b))``, also ``exp(a - (log(b) + c))``: a softmax."""
        (exponent,) = equation.inputs
        made = self.made(exponent, p.sub_p)
        if made is None or not self.program.used_once(exponent):  # type: ignore[arg-type]
            return None
        minuend, subtrahend = made.inputs
        if not all(map(self.program.is_active, made.inputs)) or exponent in self.named:
            return None
        whole = self._unmoved(subtrahend)
        through = {exponent}
        if (divisor := self._logarithm(whole.value)) is not None:
            place = _Moved(divisor, whole.moves)
            if (shared := self._exponential_of(minuend)) is not None:
                return _Standing(
                    (shared, divisor), lambda e, b: lax.div(e, place(b)), through
                )
            return _Standing(
                (minuend, divisor), lambda a, b: lax.div(lax.exp(a), place(b)), through
            )
        shifted = self.made(whole.value, p.add_p, p.add_jaxvals_p)
        for a, shift in _both_ways(shifted) if shifted is not None else ():
            inner = self._unmoved(a)
            divisor = self._logarithm(inner.value)
            shared = divisor and self._exponential_less(minuend, shift)
            if divisor is not None and shared is not None:
                place = _Moved(divisor, (*inner.moves, *whole.moves))
                return _Standing(
                    (shared, divisor),
                    lambda e, b, place=place: lax.div(e, place(b)),
                    through,
                )
        return None

    def _exponential_of(self, value: Any) -> Value | None:
        """The exponential of a value, if the program has one."""
        for use in self.program.uses.get(value, ()):
            if use.primitive is p.exp_p and use.primitive not in self.opaque:
                return use.outputs[0]
        return None

    def _exponential_less(self, minuend: Any, shift: Atom) -> Value | None:
        """The exponential of a difference, if the program has one."""
        before = self._unmoved(shift).value
        for use in self.program.uses.get(minuend, ()):
            if use.primitive is not p.sub_p or use.inputs[0] is not minuend:
                continue
            if self._unmoved(use.inputs[1]).value is before:
                return self._exponential_of(use.outputs[0])
        return None

    def _logarithm(self, value: Value) -> Value | None:
        made = self.made(value, p.log_p)
        divisor = made.inputs[0] if made is not None else None
        size = self.made(divisor, p.abs_p)  # type: ignore[arg-type]
        if size is not None and is_nonnegative(size.inputs[0]):
            (divisor,) = size.inputs  # as logsumexp has it, for its derivative
        return divisor if self.program.is_active(divisor) else None  # type: ignore

    def _unmoved(self, atom: Atom) -> _Moved:
        """A value before all of it was moved, or repeated along axes."""
        moves: list[Equation] = []
        value = atom
        while isinstance(value, Value) and (made := value.producer) is not None:
            spreads = made.primitive is p.broadcast_in_dim_p
            if made.primitive in self.opaque or not (spreads or moves_all(made)):
                break
            moves.append(made)
            (value, *_) = made.inputs
        return _Moved(value, tuple(moves[::-1]))  # type: ignore[arg-type]

    def _through(self, moved: _Moved) -> set[Value]:
        return {moved.value, *(v for e in moved.moves for v in e.outputs)}

    def _is_inside(self, moved: _Moved) -> bool:
        """Whether nothing else reads a value, moved or not, and it has no name."""
        through = self._through(moved)
        made = moved.value.producer
        if made is None or made.primitive in self.opaque:
            return False
        alone = all(map(self.program.used_once, through))
        return alone and self.named.isdisjoint(through)


class _Standing(NamedTuple):
    """A function of some operands, and the values that are no longer read."""

    operands: Sequence[Any]
    function: Callable[..., Array]
    through: set[Any]


def _both_ways(equation: Equation) -> tuple[tuple[Atom, Atom], ...]:
    a, b = equation.inputs
    return (a, b), (b, a)
