"""The promise: the pending relevance of one value.

``R = value + v * multiplier`` for a value ``v`` of the program, either part possibly
absent. Nearly every rule of LRP hands on ``R_i = x_i c_i``: it promises ``c`` and
leaves ``x_i`` to be multiplied when, and only if, the number is asked for. Sums thus
pass relevance on without an activation or a division.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

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
    materialised.
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
            return zeros_like(v) if self.value is None else self.value
        # Only non-finite v are replaced: a zero wherever the multiplier is 0 would
        # also cut the gradient of relevance with respect to the multiplier.
        harmless = lax.bitwise_or(lax.is_finite(v), lax.ne(self.multiplier, zero(v)))
        finite = lax.select(harmless, v, zeros_like(v))
        product = lax.mul(finite, self.multiplier)
        return product if self.value is None else lax.add(self.value, product)

    def over(self, z: Array, stabilizer: float) -> Array:
        """Relevance per unit of ``z``: ``R / (z + stabilizer sign(z))``.

        Without stabiliser nothing is divided but the value part, and that is 0 where
        ``z`` is 0.
        """
        parts = []
        if self.multiplier is not None:
            m = self.multiplier
            parts.append(lax.mul(m, _kept_fraction(z, stabilizer)) if stabilizer else m)
        if self.value is not None:
            parts.append(
                _divided(self.value, stabilized(z, stabilizer))
                if stabilizer
                else safe_divide(self.value, z)
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


# Plain lax from here on: these run once an operation, and jnp's wrappers would take a
# large part of the tracing time.


def stabilized(z: Array, stabilizer: float) -> Array:
    """``z + stabilizer * sign(z)`` with ``sign(0) = +1`` (Bach et al. 2015, eq. 58)."""
    s = number(z, stabilizer)
    return lax.select(lax.ge(z, zero(z)), lax.add(z, s), lax.sub(z, s))


def signed(z: Array, stabilizer: float) -> Array:
    """``stabilizer * sign(z)`` with ``sign(0) = +1``."""
    s = lax.full_like(z, stabilizer)
    return lax.select(lax.ge(z, zero(z)), s, lax.neg(s))


def _kept_fraction(z: Array, stabilizer: float) -> Array:
    """``z / stabilized(z)``, as ``|z| / (|z| + stabilizer)``: 1 for infinite z.

    For NaN too: it shows where the multiplier meets z, if that is not 0.
    """
    size, largest = lax.abs(z), lax.full_like(z, float(jnp.finfo(z.dtype).max))
    size = lax.select(lax.lt(size, largest), size, largest)
    return lax.div(size, lax.add(size, number(z, stabilizer)))


def _divided(relevance: Array, z: Array) -> Array:
    """``relevance / z``, 0 where the relevance is, even if z is NaN."""
    quotient = lax.div(relevance, z)
    return lax.select(lax.eq(relevance, zero(relevance)), relevance, quotient)


def product(multiplier: Array, v: Array) -> Array:
    """``v * multiplier``, 0 where the multiplier is 0, even if v is infinite."""
    return Promise(multiplier=multiplier).resolve(v)


def safe_divide(a: Array, b: Array) -> Array:
    """``a / b``, 0 where b is 0; a double ``select`` keeps its gradient finite."""
    vanishes = lax.eq(b, zero(b))
    quotient = lax.div(a, lax.select(vanishes, lax.full_like(b, 1), b))
    return lax.select(vanishes, zeros_like(quotient), quotient)


def number(x: Array, number: float) -> np.ndarray:
    """A scalar operand of the dtype of x: ``lax`` takes it beside x as it is."""
    return np.asarray(number, x.dtype)


def zero(x: Array) -> np.ndarray:
    return number(x, 0)


def zeros_like(x: Array) -> Array:
    return lax.full_like(x, 0)


def _add(a: Array | None, b: Array | None) -> Array | None:
    if a is None or b is None:
        return b if a is None else a
    return lax.add(a, b)
