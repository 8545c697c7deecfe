"""Sums over contributions by fewer maps, for XLA on CPUs and GPUs.

Both signs of ``q = x w`` follow from ``W x``, which the forward pass has computed, and
``|W| |x|``: one more map instead of four, and two transposes instead of four. Large
kernels go by blocks. Equal layers are traced once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cached_property, partial
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import primitives as p

from jlrp.ops.affine import feature_axes
from jlrp.ops.kinds.affine import AffineOp
from jlrp.promise import Promise, zero
from jlrp.rules.bias import without
from jlrp.rules.contributions import (
    Arrays,
    Contributions,
    Layer,
    Sign,
    Signs,
    Total,
    negative,
    other,
    positive,
    times,
)
from jlrp.tactics import enabled
from jlrp.tactics.batches import any_unbatched
from jlrp.typing import Array

# Where one sign is rare, ``W x`` and ``|W| |x|`` cancel and lose digits: if a sum of
# one sign is below this share of |W| |x| anywhere, each sign is summed by itself.
_SMALL = 1 / 32
_FEW = 64  # of fewer products one sign is often rare: each is summed by itself
# Kernels that are much larger than what goes through them, as that of a language
# model's logits, are explained by blocks of about so many elements, which fit in a
# cache: what rules make of them would take more time, and memory, than all else.
_BLOCK = 2**20
_MUCH_LARGER = 16


class FewerMaps(Contributions):
    """The same sums and transposes, by as few maps as can be."""

    @cached_property
    def _linear(self) -> Array:
        if self.layer.rounded:
            return self.apply(self.x, self.arrays.kernel)
        z, bias = self.arrays.z, self.arrays.bias
        return z if bias is None else without(z, bias)

    def linear(self) -> Array:
        return self._linear

    def back_linear(self, s: Array) -> Array:
        """By W itself, of which nothing has to be made first."""
        arrays = self.arrays
        return self.layer.linear.transpose(arrays.kernel, s, arrays.after)

    def _whole(self) -> Array:
        """``W x + bias``: z itself, unless the forward pass rounded it."""
        if self.bias is None:
            return self.linear()
        return lax.add(self.linear(), self.bias) if self.layer.rounded else self.z

    def _sizes(self) -> Array:
        """``|W| |x|``."""
        x = self.x if self.layer.nonnegative else lax.abs(self.x)
        return self.apply(x, lax.abs(self.kernel))

    def _back_sizes(self, s: Array) -> Array:
        """The transpose of ``|W| |x|`` by x: with the sign of x."""
        back = self.transpose(lax.abs(self.kernel), s)
        return back if self.layer.nonnegative else lax.mul(lax.sign(self.x), back)

    # One sign: half of the maps where x >= 0.

    def of_sign(self, sign: Sign) -> Total:
        return self.with_bias(self._by_parts(sign, other(sign)), sign)

    def back_of_sign(self, sign: Sign, s: Array) -> Array:
        return self._back_by_parts(sign, other(sign), s)

    def _by_parts(self, upper: Sign, lower: Sign) -> Array:
        """``x+ upper(W) + x- lower(W)``."""
        if self.layer.nonnegative:
            return self.apply(self.x, upper(self.kernel))
        total = self.apply(positive(self.x), upper(self.kernel))
        return lax.add(total, self.apply(negative(self.x), lower(self.kernel)))

    def _back_by_parts(self, upper: Sign, lower: Sign, s: Array) -> Array:
        above = self.transpose(upper(self.kernel), s)
        if self.layer.nonnegative:
            return above
        below = self.transpose(lower(self.kernel), s)
        return lax.select(lax.gt(self.x, zero(self.x)), above, below)

    # Both signs.

    def by_sign(self) -> Signs:
        above, below, few = self._both()
        return Signs(
            self.with_bias(above, positive), self.with_bias(below, negative), few
        )

    def _both(self) -> tuple[Array, Array, Array | None]:
        def apart() -> tuple[Array, Array]:
            return self._by_parts(positive, negative), self._by_parts(
                negative, positive
            )

        if self.layer.nonnegative:
            above = self.apply(self.x, positive(self.kernel))
            return above, self._rest(above), None
        if self.layer.products < _FEW:
            return *apart(), None
        plain, size = self.linear(), self._sizes()
        above, below = (times(0.5, z) for z in (plain + size, plain - size))
        least = lax.min(lax.abs(above), lax.abs(below))
        few = any_unbatched(lax.lt(least, times(_SMALL, size)))
        return *lax.cond(few, apart, lambda: (above, below)), few

    def _rest(self, part: Array) -> Array:
        """``x W-``, of which ``W x - part`` gives all digits unless it is small."""
        exact = lambda: self.apply(self.x, negative(self.kernel))  # noqa: E731
        if self.layer.rounded:
            return exact()
        rest = lax.sub(self.linear(), part)
        small = lax.lt(lax.abs(rest), times(_SMALL, lax.abs(part)))
        return lax.cond(any_unbatched(small), exact, lambda: rest)

    def back_by_sign(self, signs: Signs, above: Array, below: Array) -> Array:
        def apart() -> Array:
            parts = [
                self._back_by_parts(positive, negative, above),
                self._back_by_parts(negative, positive, below),
            ]
            return lax.add(*parts)

        if signs.few is None:
            return apart()

        def together() -> Array:
            both, odd = lax.add(above, below), lax.sub(above, below)
            return times(0.5, lax.add(self.back_linear(both), self._back_sizes(odd)))

        return lax.cond(signs.few, apart, together)

    # Those of z's sign favoured: ``q + g q+`` is ``(1 + g/2) q + g/2 |q|``, and
    # ``q + g q-`` the same with a minus. Nothing cancels on z's side.

    def favouring(self, gamma: float) -> Total:
        if self._above_only:
            return self.with_bias(
                self._by_parts(*_favoured(gamma)), _favoured(gamma)[0]
            )
        size, bias = self._sizes(), self.bias
        if bias is not None:
            size = lax.add(size, lax.abs(bias))
        whole = times(1 + gamma / 2, self._whole())
        total = lax.add(whole, self._as_z(gamma, size))
        if bias is None:
            return Total(total)
        of_bias = lambda: (1 + gamma / 2) * bias + self._as_z(gamma, lax.abs(bias))  # noqa: E731
        return Total(total, of_bias)

    def back_favouring(self, gamma: float, s: Array) -> Array:
        if self._above_only:
            return self._back_by_parts(*_favoured(gamma), s)
        shared = times(1 + gamma / 2, self.back_linear(s))
        return lax.add(shared, self._back_sizes(self._as_z(gamma, s)))

    def unless_zero(self) -> Array:
        return self.relevance if self._above_only else super().unless_zero()

    @property
    def _above_only(self) -> bool:
        """Relevance comes only where z > 0, and x >= 0: one map of W + g W+."""
        return self.layer.nonnegative and self.layer.rectified

    def _as_z(self, gamma: float, size: Array) -> Array:
        return times(gamma / 2, lax.select(self._above, size, lax.neg(size)))

    @cached_property
    def _above(self) -> Array:
        return lax.gt(self.z, zero(self.z))


def _favoured(gamma: float) -> tuple[Sign, Sign]:
    """``q + gamma q+`` and ``q + gamma q-``."""
    return (
        lambda q: lax.add(q, times(gamma, positive(q))),
        lambda q: lax.add(q, times(gamma, negative(q))),
    )


Share = Callable[[Layer, Arrays], Promise]
Cut = Callable[[Array], Array]
T = TypeVar("T")


def is_large(kernel: Array, through: int) -> bool:
    """Whether a kernel is much larger than what goes through it."""
    return kernel.size >= max(4 * _BLOCK, _MUCH_LARGER * through)


def large_axes(op: AffineOp, kernel: Array) -> tuple[int, int] | None:
    """The axes of the features, in the kernel and in the output, of a large kernel."""
    affine = op.affine
    through = math.prod(op.inputs[0].shape) + math.prod(op.outputs[0].shape)
    if not is_large(kernel, through) or affine.core.primitive is not p.dot_general_p:
        return None
    if any(step.kind == "move" for step in affine.steps):
        return None
    batch = affine.core.params["dimension_numbers"][1][1 - affine.operand]
    pairs = [(axis, out) for out, axis in feature_axes(affine) if axis not in batch]
    return max(pairs, key=lambda pair: kernel.shape[pair[0]], default=None)


def by_blocks(
    part: Callable[[Array, Cut], T], kernel: Array, axes: tuple[int, int]
) -> T:
    """What is made for some output features at a time, added up.

    ``part(kernel, cut)`` makes it of the kernel of these features; ``cut`` takes them
    from what has the shape of the output. ``axes`` are those of `large_axes`.
    """
    of_kernel, of_out = axes
    features = kernel.shape[of_kernel]
    size = max(1, _BLOCK * features // kernel.size)

    def block(start: Array | int, size: int) -> T:
        def cut(array: Array, axis: int = of_out) -> Array:
            return lax.dynamic_slice_in_dim(array, start, size, axis)

        return part(cut(kernel, of_kernel), cut)

    starts = jnp.arange(features // size) * size
    parts = lax.map(lambda start: block(start, size), starts)
    total = jax.tree.map(lambda part: lax.reduce_sum(part, [0]), parts)
    if rest := features % size:
        total = jax.tree.map(lax.add, total, block(features - rest, rest))
    return total


def traced_once(share: Share, layer: Layer, arrays: Arrays) -> Promise:
    """The shares of a layer; what was traced for an equal layer is called again."""
    if not enabled():
        return share(layer, arrays)
    try:
        hash(layer)
    except TypeError:  # a parameter of the primitive that is not hashable
        return share(layer, arrays)
    return _called(share, layer, arrays)


@partial(jax.jit, static_argnums=(0, 1))
def _called(share: Share, layer: Layer, arrays: Arrays) -> Promise:
    return share(layer, arrays)
