"""Contributions ``q = x w`` of the inputs of a dense or convolution to its outputs.

Rules that look at kernels divide relevance by sums over contributions and hand it back
by the transposes of these sums. The bias is the contribution of an input that is 1.
Here every sum is as the papers have it; ``tactics.contributions`` has the same sums by
fewer maps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax

from jlrp.ops.canonized import LinearMap
from jlrp.promise import Promise, number, product, signed, zero, zeros_like
from jlrp.rules.base import Causes
from jlrp.rules.bias import by_option
from jlrp.rules.padding import Padding, ones
from jlrp.tactics.dependencies import depend_on
from jlrp.typing import Array

Sign = Callable[[Array], Array]  # ``positive`` or ``negative``


def positive(q: Array) -> Array:
    return lax.max(q, zero(q))


def negative(q: Array) -> Array:
    return lax.min(q, zero(q))


def other(sign: Sign) -> Sign:
    return negative if sign is positive else positive


def times(factor: float, x: Array) -> Array:
    return x if factor == 1 else lax.mul(x, number(x, factor))


class Layer(NamedTuple):
    """What rules know of a dense or convolution before it runs: equal layers are equal.

    Attributes:
      linear: its map, without numbers.
      padding: of x.
      nonnegative: whether x >= 0 everywhere.
      rectified: whether relevance is 0 where z < 0: a ReLU follows.
      rounded: whether the forward pass rounded z to a narrower dtype.
      blocks: of a large kernel, the axes of output features, in W and in z.
      products: how many contributions are summed to an output.
    """

    linear: LinearMap
    padding: Padding
    nonnegative: bool
    rectified: bool
    rounded: bool
    blocks: tuple[int, int] | None
    products: int


class Arrays(NamedTuple):
    """The arrays of a layer, and the promise of its output.

    Attributes:
      after: what is made of the kernel alone is to depend on it, see ``tactics``.
    """

    kernel: Array
    bias: Array | None
    x: Array
    z: Array
    promise: Promise
    after: Array | None


class Total(NamedTuple):
    """A sum over contributions.

    Attributes:
      value: of all, the bias among them.
      bias: computes what it has of the bias; None: nothing.
      nonnegative: known to be.
    """

    value: Array
    bias: Callable[[], Array] | None = None
    nonnegative: bool = False


class Signs(NamedTuple):
    """The sums of the positive contributions, and of the negative ones.

    Attributes:
      few: where contributions of one sign are rare; see ``tactics.contributions``.
    """

    above: Total
    below: Total
    few: Array | None = None


class Contributions:
    """The sums over contributions of one layer, and their transposes.

    Attributes:
      x, kernel, bias, z: of the layer; the bias and what is shared of z after the
        rule's option for the bias.
      relevance: of the outputs.
      absorbed: computes what was not handed on, by cause, one entry for each division.
      shared: of each division, relevance per unit and the sum that it was divided by.
    """

    def __init__(self, layer: Layer, arrays: Arrays, option: str, stabilizer: float):
        self.layer, self.arrays, self.stabilizer = layer, arrays, stabilizer
        self.x = arrays.x
        self.kernel = depend_on(arrays.kernel, after=arrays.after)
        self.absorbed: list[Callable[[], Causes]] = []
        self.shared: list[tuple[Array, Array]] = []
        # Without its bias a layer still has the signs of what it computed.
        bias = None if option == "ignore" else arrays.bias
        self.z, promise, self.bias, lost = by_option(
            option, arrays.z, arrays.promise, bias, stabilizer
        )
        self.relevance = promise.resolve(self.z)
        if lost is not None:
            self.absorbed.append(lambda: {"bias": lost})

    # Sums, and the transposes of these by x.

    def apply(self, x: Array, kernel: Array) -> Array:
        return self.layer.linear.apply(x, kernel)

    def transpose(self, kernel: Array, s: Array) -> Array:
        return self.layer.linear.transpose(kernel, s)

    def linear(self) -> Array:
        """``W x``."""
        return self.apply(self.x, self.kernel)

    def back_linear(self, s: Array) -> Array:
        return self.transpose(self.kernel, s)

    def of_sign(self, sign: Sign) -> Total:
        """``sum of q+``, or of ``q-``: of ``x+ w+ + x- w-``, or ``x+ w- + x- w+``."""
        total = self.apply(positive(self.x), sign(self.kernel))
        total = total + self.apply(negative(self.x), other(sign)(self.kernel))
        return self.with_bias(total, sign)

    def back_of_sign(self, sign: Sign, s: Array) -> Array:
        above = self.transpose(sign(self.kernel), s)
        below = self.transpose(other(sign)(self.kernel), s)
        return lax.select(lax.gt(self.x, zero(self.x)), above, below)

    def by_sign(self) -> Signs:
        """``sum of q+`` and ``sum of q-``."""
        return Signs(self.of_sign(positive), self.of_sign(negative))

    def back_by_sign(self, signs: Signs, above: Array, below: Array) -> Array:
        parts = self.back_of_sign(positive, above), self.back_of_sign(negative, below)
        return parts[0] + parts[1]

    def favouring(self, gamma: float) -> Total:
        """``sum of q`` plus ``gamma`` times the sum of those q that have z's sign."""
        same = self._like_z(*(self.of_sign(s).value for s in (positive, negative)))
        total, bias = self.linear(), self.bias
        if bias is None:
            return Total(total + gamma * same)
        of_sign = self._like_z(positive(bias), negative(bias))
        return Total(total + bias + gamma * same, lambda: bias + gamma * of_sign)

    def back_favouring(self, gamma: float, s: Array) -> Array:
        above = self.back_of_sign(positive, self._like_z(s, zeros_like(s)))
        below = self.back_of_sign(negative, self._like_z(zeros_like(s), s))
        return self.back_linear(s) + gamma * (above + below)

    def _like_z(self, above: Array, below: Array) -> Array:
        return jnp.where(self.z > 0, above, below)

    def with_bias(self, total: Array, part: Callable[[Array], Array]) -> Total:
        """A sum without the bias, and a part of the bias added to it."""
        is_positive = part is positive
        if self.bias is None:
            return Total(total, None, is_positive)
        bias = part(self.bias)
        return Total(lax.add(total, bias), lambda: bias, is_positive)

    def ones(self) -> Array:
        """1 for each input, 0 where x is padding."""
        return ones(self.layer.padding, self.x.dtype)

    # Divisions.

    def unless_zero(self) -> Array:
        """The relevance, none where z is 0: that is blocked."""
        relevance, z = self.relevance, self.z
        self.absorbed.append(lambda: {"blocked": jnp.where(z == 0, relevance, 0)})
        return lax.select(lax.eq(z, zero(z)), zeros_like(relevance), relevance)

    def per_unit(self, relevance: Array, total: Total) -> Array:
        """``R / (total + stabiliser)``; what stabiliser and bias get is noted."""
        z = total.value
        share = Promise(value=relevance).over(z, self.stabilizer, total.nonnegative)
        self.shared.append((share, z))

        def absorbed() -> Causes:
            causes = {"stabilizer": share * signed(z, self.stabilizer)}
            if not self.stabilizer:
                causes["blocked"] = jnp.where(z == 0, relevance, 0)
            if total.bias is not None:
                causes["bias"] = product(share, total.bias())
            return causes

        self.absorbed.append(absorbed)
        return share
