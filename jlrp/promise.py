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
            return jnp.zeros_like(v) if self.value is None else self.value
        # Only non-finite v are replaced: where(multiplier == 0, 0, v) alone would
        # also cut the gradient of relevance with respect to the multiplier.
        masked = (self.multiplier == 0) & ~jnp.isfinite(v)
        product = jnp.where(masked, 0, v) * self.multiplier
        return product if self.value is None else self.value + product

    def over(self, z: Array, stabilizer: float) -> Array:
        """Relevance per unit of ``z``: ``R / (z + stabilizer sign(z))``.

        Without stabiliser nothing is divided but the value part, and that is 0 where
        ``z`` is 0.
        """
        if stabilizer:
            return self.resolve(z) / stabilized(z, stabilizer)
        if self.value is None:
            assert self.multiplier is not None
            return self.multiplier
        quotient = safe_divide(self.value, z)
        return quotient if self.multiplier is None else quotient + self.multiplier

    def map(self, linear: Callable[[Array], Array]) -> Promise:
        """The promise whose parts are ``linear`` of these."""
        return Promise(
            None if self.value is None else linear(self.value),
            None if self.multiplier is None else linear(self.multiplier),
        )


def stabilized(z: Array, stabilizer: float) -> Array:
    """``z + stabilizer * sign(z)`` with ``sign(0) = +1`` (Bach et al. 2015, eq. 58)."""
    return z + signed(z, stabilizer)


def signed(z: Array, stabilizer: float) -> Array:
    """``stabilizer * sign(z)`` with ``sign(0) = +1``."""
    return jnp.where(z >= 0, stabilizer, -stabilizer).astype(z.dtype)


def safe_divide(a: Array, b: Array) -> Array:
    """``a / b``, 0 where b is 0; a double ``where`` keeps its gradient finite."""
    zero = b == 0
    return jnp.where(zero, 0, a / jnp.where(zero, 1, b))


def _add(a: Array | None, b: Array | None) -> Array | None:
    if a is None or b is None:
        return b if a is None else a
    return a + b
