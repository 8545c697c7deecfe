"""The promise: the pending relevance of one value.

``R = value + v * multiplier`` for a value ``v`` of the program, either part possibly
absent. Nearly every rule of LRP hands on ``R_i = x_i c_i``: it promises ``c`` and
leaves ``x_i`` to be multiplied when, and only if, the number is asked for. Sums thus
pass relevance on without an activation or a division.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

Array = jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True)
class Promise:
    """Pending relevance ``value + v * multiplier`` of a value ``v``.

    Both parts have the shape of ``v``; ``None`` stands for zero, which is never
    materialised. Of a complex v, relevance is the real number ``Re(v * multiplier)``,
    without conjugation: JAX's convention for cotangents.
    """

    value: Array | None = None
    multiplier: Array | None = None

    def __add__(self, other: Promise | None) -> Promise:
        if other is None:
            return self
        return Promise(
            _add(self.value, other.value), _add(self.multiplier, other.multiplier)
        )

    def resolve(self, v: Array) -> Array:
        """The relevance itself; 0 where the multiplier is 0, even if v is infinite."""
        if self.multiplier is None:
            return zeros_like(lax_real(v)) if self.value is None else self.value
        # Only non-finite v are replaced: a zero wherever the multiplier is 0 would
        # also cut the gradient of relevance with respect to the multiplier.
        harmless = lax.bitwise_or(_is_finite(v), lax.ne(self.multiplier, zero(v)))
        finite = lax.select(harmless, v, zeros_like(v))
        product = lax_real(lax.mul(finite, self.multiplier))
        return product if self.value is None else lax.add(self.value, product)

    def over(self, z: Array, stabilizer: float, nonnegative: bool = False) -> Array:
        """Relevance per unit of ``z``: ``R / (z + stabilizer sign(z))``.

        Without stabiliser nothing is divided but the value part, and that is 0 where
        ``z`` is 0. ``nonnegative``: z is known to be.
        """
        parts = []
        if self.multiplier is not None:
            m = self.multiplier
            parts.append(lax.mul(m, _kept_fraction(z, stabilizer)) if stabilizer else m)
        if self.value is not None:
            value = like(self.value, z)
            parts.append(
                _divided(value, stabilized(z, stabilizer, nonnegative))
                if stabilizer
                else safe_divide(value, _or_zero(z, value))
            )
        return parts[0] if len(parts) == 1 else lax.add(*parts)

    def per_unit(self, z: Array) -> Array | None:
        """Relevance per unit of ``z``, where nothing stabilises: 0 where z is 0."""
        if self.value is None:
            return self.multiplier
        return self.over(z, 0.0)

    def map(self, linear: Callable[[Array], Array]) -> Promise:
        """The promise whose parts are ``linear`` of these."""
        return Promise(
            None if self.value is None else linear(self.value),
            None if self.multiplier is None else linear(self.multiplier),
        )


class Parts(enum.Flag):
    """Which parts a promise has; ``NONE``: there is no promise."""

    NONE = 0
    VALUE = enum.auto()
    MULTIPLIER = enum.auto()
    BOTH = VALUE | MULTIPLIER

    @staticmethod
    def of(promise: Promise | None) -> Parts:
        has_value = promise is not None and promise.value is not None
        has_multiplier = promise is not None and promise.multiplier is not None
        return (Parts.VALUE if has_value else Parts.NONE) | (
            Parts.MULTIPLIER if has_multiplier else Parts.NONE
        )


class HasDtype(Protocol):
    @property
    def dtype(self) -> np.dtype: ...


def is_complex(v: HasDtype) -> bool:
    """Whether an array, or a value of the program, is complex."""
    return getattr(v.dtype, "kind", "") == "c"  # the dtypes of keys have no kind


def lax_real(v: Array) -> Array:
    """The real part; a real array as it is."""
    return lax.real(v) if is_complex(v) else v


def like(real: Array, z: HasDtype) -> Array:
    """Real numbers as complex ones, where z is complex."""
    return lax.complex(real, zeros_like(real)) if is_complex(z) else real


def _is_finite(v: Array) -> Array:
    if not is_complex(v):
        return lax.is_finite(v)
    return lax.bitwise_and(lax.is_finite(lax.real(v)), lax.is_finite(lax.imag(v)))


# Plain lax from here on: these run once an operation, and jnp's wrappers would take a
# large part of the tracing time.


def stabilized(z: Array, stabilizer: float, nonnegative: bool = False) -> Array:
    """``z + stabilizer * sign(z)`` with ``sign(0) = +1`` (Bach et al. 2015, eq. 58)."""
    if is_complex(z):
        return lax.add(z, signed(z, stabilizer))
    s = number(z, stabilizer)
    if nonnegative:
        return lax.add(z, s)
    return lax.select(lax.ge(z, zero(z)), lax.add(z, s), lax.sub(z, s))


def signed(z: Array, stabilizer: float) -> Array:
    """``stabilizer * sign(z)`` with ``sign(0) = +1``; of complex z, ``z / |z|``."""
    if is_complex(z):
        unit = lax.select(lax.eq(z, zero(z)), filled(z, 1), lax.sign(z))
        return lax.mul(unit, number(z, stabilizer))
    s = filled(z, stabilizer)
    return lax.select(lax.ge(z, zero(z)), s, lax.neg(s))


def _kept_fraction(z: Array, stabilizer: float) -> Array:
    """``z / stabilized(z)``, as ``|z| / (|z| + stabilizer)``: 1 for infinite z.

    For NaN too: it shows where the multiplier meets z, if that is not 0.
    """
    size = lax.abs(z)
    largest = jnp.finfo(size.dtype).max
    size = lax.clamp(zero(size), size, np.asarray(largest, size.dtype))
    return like(lax.div(size, lax.add(size, number(size, stabilizer))), z)


def _or_zero(z: Array, relevance: Array) -> Array:
    """z, 0 where it is NaN and the relevance is 0."""
    missing = lax.bitwise_and(lax.ne(z, z), lax.eq(relevance, zero(relevance)))
    return lax.select(missing, zeros_like(z), z)


def _divided(relevance: Array, z: Array) -> Array:
    """``relevance / z``, 0 where the relevance is, even if z is NaN."""
    vanishes = lax.eq(relevance, zero(relevance))
    return lax.div(relevance, lax.select(vanishes, filled(z, 1), z))


def product(multiplier: Array, v: Array) -> Array:
    """``v * multiplier``, 0 where the multiplier is 0, even if v is infinite."""
    return Promise(multiplier=multiplier).resolve(v)


def difference(a: Array, b: Array) -> Array:
    """``a - b``, 0 where both are the same infinity or NaN, as masked scores are."""
    if not jnp.issubdtype(a.dtype, jnp.inexact):
        return a
    missing = lax.bitwise_and(lax.ne(a, a), lax.ne(b, b))
    same = lax.bitwise_or(lax.eq(a, b), missing)
    return lax.select(same, zeros_like(a), lax.sub(a, b))


def unless_zero(m_in: Array, m_out: Array) -> Array:
    """Multipliers of an input, 0 where those of the output are, even if NaN."""
    kept = lax.bitwise_or(_is_finite(m_in), lax.ne(m_out, zero(m_out)))
    return lax.select(kept, m_in, zeros_like(m_in))


def safe_divide(a: Array, b: Array) -> Array:
    """``a / b``, 0 where b is 0; a double ``select`` keeps its gradient finite.

    The division comes last: XLA writes what is behind a division, but never a division
    itself, into each of its consumers.
    """
    vanishes = lax.eq(b, zero(b))
    a = lax.select(vanishes, zeros_like(a), a)
    return lax.div(a, lax.select(vanishes, filled(b, 1), b))


def number(x: Array, number: float) -> np.ndarray:
    """A scalar operand of the dtype of x: ``lax`` takes it beside x as it is."""
    return np.asarray(number, x.dtype)


def zero(x: Array) -> np.ndarray:
    return number(x, 0)


def filled(x: Array, value: float) -> Array:
    """An array like x: ``lax.full_like`` would take thrice as long to trace."""
    return lax.broadcast(number(x, value), x.shape)


def zeros_like(x: Array) -> Array:
    return filled(x, 0)


def _add(a: Array | None, b: Array | None) -> Array | None:
    if a is None or b is None:
        return b if a is None else a
    return lax.add(a, b)
