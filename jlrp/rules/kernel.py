"""Rules that look at the kernel of a dense or convolution, and at its bias.

Notation: ``z = W x + b`` and ``q+ = max(q, 0)``, ``q- = min(q, 0)``, of the effective
kernel and bias. Every division is stabilised, ``z + s sign(z)`` with ``sign(0) = +1``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import primitives as p

from jlrp import arguments
from jlrp.errors import RuleError
from jlrp.ir.program import Value
from jlrp.ops.affine import feature_axes
from jlrp.ops.base import Operation
from jlrp.promise import (
    Promise,
    number,
    product,
    safe_divide,
    signed,
    zero,
    zeros_like,
)
from jlrp.rules.base import (
    Array,
    Causes,
    Context,
    LinearMap,
    Propagation,
    Rule,
    refuse,
)
from jlrp.rules.linear import bias_fraction, summed, without
from jlrp.rules.padding import Padding, ones, padding_of
from jlrp.rules.reference import (
    constants_of,
    multipliers_of,
    settings,
    switched,
)
from jlrp.tactics import any_unbatched, depend_on, first_of


class _Layer(NamedTuple):
    """What a rule asks of a dense or convolution, beside its arrays; all of it static.

    Equal layers of equal shapes are traced once.
    """

    linear: LinearMap
    padding: Padding  # of x
    nonnegative: bool  # whether x >= 0 everywhere
    rectified: bool  # whether relevance is 0 where z < 0: a ReLU follows
    rounded: bool  # whether the forward pass rounded z to a narrower dtype
    blocks: tuple[int, int] | None  # of a large kernel: output features, in W and in z
    products: int  # how many products x w are summed to an output


class _Arrays(NamedTuple):
    """The arrays of a layer, and the promise of its output."""

    kernel: Array
    bias: Array | None
    x: Array
    z: Array
    promise: Promise
    after: Array | None  # what is made of the kernel alone is to depend on it


@dataclass(frozen=True)
class _KernelRule(Rule):
    """Common to the rules that look at the kernel of a dense or convolution."""

    _degree: ClassVar[int] = 1  # of the shares, as functions of kernel and bias

    def check(self, op: Operation) -> None:
        if op.affine is None:
            refuse(self, op, "it has no kernel (it is not dense or conv)")

    def needs(self, op: Operation) -> tuple[Value, ...]:
        return op.inputs + op.outputs

    def propagate(
        self, op: Operation, r: Sequence[Promise | None], ctx: Context
    ) -> Propagation:
        (promise,) = r
        assert promise is not None
        z, found = ctx.read(op.outputs[0]), ctx.kernel_map(op)
        x = ctx.read(op.inputs[0])
        if "negated" in op.facts:  # so is the effective kernel
            z = lax.neg(z)
            promise = Promise(
                promise.value,
                None if promise.multiplier is None else lax.neg(promise.multiplier),
            )
        # One element: the whole array has another shape for each position of a layer,
        # so that equal layers would be traced again.
        after = first_of(ctx.arrived)
        numbers = _Arrays(found.kernel, found.bias, x, z, promise, after)
        layer = _Layer(
            found.linear,
            padding_of(op.inputs[0]),
            "nonnegative" in op.facts,
            # Not where z is divided otherwise: by values, or without its bias.
            "rectified" in op.facts
            and promise.value is None
            and self.option != "split",
            op.outputs[0].dtype != z.dtype,
            _large_axes(op, found.kernel),
            _products_of(op, found.kernel),
        )

        def constants(wanted: Sequence[Value]) -> Sequence[Array]:
            """Multipliers by Euler: what is shared is homogeneous in the constants."""

            def shared(*moved: Array) -> Array:
                by = ctx.replaced(dict(zip(wanted, moved, strict=True))).kernel_map(op)
                again = layer._replace(rounded=True)  # W x is not z - b then
                split = _Split(self, again, numbers._replace(kernel=by.kernel))
                if split.bias is not None:
                    split.bias = by.bias
                self._distribute(split)
                totals = [
                    jnp.sum(lax.stop_gradient(share) * total)
                    for share, total in split.shared
                ]
                return sum(totals) / self._degree  # type: ignore[return-value]

            found = [ctx.read(v) for v in wanted]
            return jax.grad(shared, tuple(range(len(wanted))))(*found)

        def causes() -> Causes:
            split = _Split(self, layer, numbers)
            self._distribute(split)
            return summed([absorbed() for absorbed in split.absorbed])

        r_in = _traced_once(self, layer, numbers)
        return Propagation([r_in], causes, constants=constants)

    @property
    def stabilizing(self) -> float:
        return getattr(self, "stabilizer")  # noqa: B009  (a field of each subclass)

    @property
    def option(self) -> str:
        """What becomes of the bias."""
        return getattr(self, "bias", "absorb")

    def share(self, layer: _Layer, numbers: _Arrays) -> Promise:
        """The promise of the input of a layer."""
        if layer.blocks is not None:
            return self._by_blocks(layer, numbers)
        return self._distribute(_Split(self, layer, numbers))

    def _by_blocks(self, layer: _Layer, numbers: _Arrays) -> Promise:
        """The shares of some output features at a time, added up."""
        assert layer.blocks is not None
        of_kernel, of_out = layer.blocks
        kernel, bias, x, z, promise, _ = numbers
        features = kernel.shape[of_kernel]
        size = max(1, _BLOCK * features // kernel.size)
        whole = layer._replace(blocks=None)

        def block(start: Array | int, size: int) -> Promise:
            def cut(array: Array, axis: int = of_out) -> Array:
                return lax.dynamic_slice_in_dim(array, start, size, axis)

            part = None if bias is None else cut(bias)
            of_block = cut(kernel, of_kernel), part, x, cut(z), promise.map(cut), None
            return self.share(whole, _Arrays(*of_block))

        starts = jnp.arange(features // size) * size
        parts = lax.map(lambda start: block(start, size), starts)
        total = parts.map(lambda part: lax.reduce_sum(part, [0]))
        if rest := features % size:
            total = total + block(features - rest, rest)
        return total

    def _distribute(self, split: _Split) -> Promise:
        raise NotImplementedError


@dataclass(frozen=True)
class KernelDifference(Rule):
    """``Gamma``, ``ZPlus`` or ``AlphaBeta`` on differences: ``z = W D``, no bias.

    With ``P = (W + g W+) D+ + (W + g W-) D-`` and N the same with the signs exchanged,
    relevance ``m z`` is shared by the contributions to P where z > 0, to N where z < 0,
    and there is none at z = 0. z+ is gamma to infinity: shares among the contributions
    that have z's sign. Alpha-beta: alpha on z's side, beta on the other; all on z's
    side where the other is empty. ``|P| >= |z|`` on z's side, so that ``z / P`` is
    bounded and takes no stabiliser, which would lose most of little changes.

    Args:
      rule: the rule without a reference; its bias and stabiliser play no part.
    """

    rule: Rule

    def __repr__(self) -> str:
        return f"Difference({self.rule!r})"

    def needs(self, op: Operation) -> tuple[Value, ...]:
        return op.inputs + op.outputs

    def from_reference(self, op: Operation) -> Rule:
        return self

    def propagate(
        self, op: Operation, r: Sequence[Promise | None], ctx: Context
    ) -> Propagation:
        (m,) = multipliers_of(op, r, ctx)
        assert m is not None
        parts = [self._multiplier(op, m, at) for at in settings(self, op, ctx)]
        multiplier = sum(parts[1:], parts[0]) / len(parts) if parts[1:] else parts[0]
        return Propagation(
            [Promise(multiplier=multiplier)],
            lambda: switched(op, [m], ctx),
            constants=constants_of(op, [m], ctx),
        )

    def _multiplier(self, op: Operation, m: Array, ctx: Context) -> Array:
        found = ctx.kernel_map(op)
        d, z = ctx.difference(op.inputs[0]), ctx.difference(op.outputs[0])
        kernel = depend_on(found.kernel, after=first_of(ctx.arrived))
        changes = _Changes(found.linear, kernel, d, z, m)
        if isinstance(self.rule, AlphaBeta):
            return changes.by_both_signs(self.rule.alpha, self.rule.beta)
        if isinstance(self.rule, Gamma):
            return changes.favouring(1 + self.rule.gamma / 2, self.rule.gamma / 2)
        return changes.favouring(0.5, 0.5)


class _Changes(NamedTuple):
    """A layer between two points, and the multiplier of its output."""

    linear: LinearMap
    kernel: Array
    d: Array
    z: Array
    m: Array

    def favouring(self, whole: float, size: float) -> Array:
        """Shares by ``whole w D + size |w D|`` with the sign of z.

        ``|W| |D|`` and W D give the sums of both signs by one map: on z's side no
        digits are lost.
        """
        sizes = self.linear.apply(lax.abs(self.d), lax.abs(self.kernel))
        sign = lax.sign(self.z)
        total = whole * self.z + size * sign * sizes
        s = self.m * safe_divide(self.z, total)
        back = self.linear.transpose(lax.abs(self.kernel), sign * s)
        return whole * self.linear.transpose(self.kernel, s) + size * (
            lax.sign(self.d) * back
        )

    def by_both_signs(self, alpha: float, beta: float) -> Array:
        above, below = self._sum(positive), self._sum(negative)
        is_above = lax.gt(self.z, zero(self.z))
        other = lax.select(is_above, below, above)
        empty = lax.eq(other, zero(other))
        mine = jnp.where(empty, 1.0, alpha)
        own = self.m * mine * safe_divide(self.z, lax.select(is_above, above, below))
        its = self.m * jnp.where(empty, 0.0, -beta) * safe_divide(self.z, other)
        nothing = lax.eq(self.z, zero(self.z))
        own, its = (lax.select(nothing, zeros_like(s), s) for s in (own, its))
        of_positive = self._back(positive, lax.select(is_above, own, its))
        return of_positive + self._back(negative, lax.select(is_above, its, own))

    def _sum(self, sign: Sign) -> Array:
        """The contributions of one sign, by maps of their own: 0 if there are none."""
        apply, kernel = self.linear.apply, self.kernel
        upper = apply(positive(self.d), sign(kernel))
        return upper + apply(negative(self.d), _other(sign)(kernel))

    def _back(self, sign: Sign, s: Array) -> Array:
        above = self.linear.transpose(sign(self.kernel), s)
        below = self.linear.transpose(_other(sign)(self.kernel), s)
        return lax.select(lax.gt(self.d, zero(self.d)), above, below)


def _traced_once(rule: _KernelRule, layer: _Layer, numbers: _Arrays) -> Promise:
    """The shares of a layer; what was traced for an equal layer is called again."""
    try:
        hash(layer)
    except TypeError:  # a parameter of the primitive that is not hashable
        return rule.share(layer, numbers)
    return _called(rule, layer, numbers)


@partial(jax.jit, static_argnums=(0, 1))
def _called(rule: _KernelRule, layer: _Layer, numbers: _Arrays) -> Promise:
    return rule.share(layer, numbers)


class _Split:
    """Divides relevance by sums over parts of the kernel, and notes what is absorbed.

    Attributes:
      relevance, z, bias: after the rule's option for the bias; None is no bias.
      kernel: W with a control dependency on relevance; of it are made |W|, W+, W-.
    """

    def __init__(self, rule: _KernelRule, layer: _Layer, numbers: _Arrays):
        self._map, self.nonnegative = layer.linear, layer.nonnegative
        self.rectified = layer.rectified
        self.stabilizer = rule.stabilizing
        self.absorbed: list[Callable[[], Causes]] = []
        self.shared: list[tuple[Array, Array]] = []  # R / z, and z, of each division
        self.x = numbers.x
        self.kernel = depend_on(numbers.kernel, after=numbers.after)
        self._layer, self._numbers = layer, numbers
        self._linear: Array | None = None
        self.few: Array | None = None  # whether a sign is rare somewhere, see ``sums``
        self.z, bias = numbers.z, numbers.bias
        self.relevance = numbers.promise.resolve(self.z)
        if rule.option == "split" and bias is not None:
            self.z = without(self.z, bias)
            lost = self.relevance * bias_fraction(self.z, bias, self.stabilizer)
            self.relevance = self.relevance - lost
            self.absorbed.append(lambda: {"bias": lost})
        self.bias = bias if rule.option == "absorb" else None

    def ones(self) -> Array:
        """1 for each input, 0 where x is padding."""
        return ones(self._layer.padding, self.x.dtype)

    def apply(self, x: Array, kernel: Array) -> Array:
        return self._map.apply(x, kernel)

    def transpose(self, kernel: Array, y: Array) -> Array:
        return self._map.transpose(kernel, y)

    def transpose_whole(self, y: Array) -> Array:
        """By W itself, of which nothing has to be made first."""
        numbers = self._numbers
        return self._map.transpose(numbers.kernel, y, numbers.after)

    def sizes(self) -> Array:
        """``|W| |x|``."""
        x = self.x if self.nonnegative else lax.abs(self.x)
        return self.apply(x, lax.abs(self.kernel))

    def transpose_sizes(self, y: Array) -> Array:
        """Of ``|W| |x|`` by x: with the sign of x."""
        back = self.transpose(lax.abs(self.kernel), y)
        return back if self.nonnegative else lax.mul(lax.sign(self.x), back)

    def linear(self) -> Array:
        """``W x``."""
        if self._linear is None:
            _, bias, x, z, _, _ = self._numbers
            if self._layer.rounded:
                self._linear = self.apply(x, self._numbers.kernel)
            else:
                self._linear = z if bias is None else without(z, bias)
        return self._linear

    def whole(self) -> Array:
        """``W x + bias``: z itself, unless the forward pass rounded it."""
        if self.bias is None:
            return self.linear()
        return lax.add(self.linear(), self.bias) if self._layer.rounded else self.z

    def per_unit(
        self,
        relevance: Array,
        z: Array,
        bias: Array | None = None,
        nonnegative: bool = False,
    ) -> Array:
        """``R / (z + bias + stabiliser)``, the absorbed parts noted."""
        if bias is not None:
            z = lax.add(z, bias)
        share = Promise(value=relevance).over(z, self.stabilizer, nonnegative)
        self.shared.append((share, z))

        def absorbed() -> Causes:
            causes = {"stabilizer": share * signed(z, self.stabilizer)}
            if not self.stabilizer:
                causes["blocked"] = jnp.where(z == 0, relevance, 0)
            if bias is not None:
                causes["bias"] = product(share, bias)
            return causes

        self.absorbed.append(absorbed)
        return share

    def sum_by_sign(
        self, upper: Callable[[Array], Array], lower: Callable[[Array], Array]
    ) -> Array:
        """``x+ upper(W) + x- lower(W)``, by separate sums for the two signs of x.

        Taking one from the difference of the whole and the other loses digits where the
        kept sign is rare.
        """
        if self.nonnegative:
            return self.apply(self.x, upper(self.kernel))
        z = self.apply(positive(self.x), upper(self.kernel))
        return lax.add(z, self.apply(negative(self.x), lower(self.kernel)))

    def back_by_sign(
        self, upper: Callable[[Array], Array], lower: Callable[[Array], Array], s: Array
    ) -> Array:
        """The transpose of ``upper(W)`` where x is positive, else of ``lower(W)``."""
        above = self.transpose(upper(self.kernel), s)
        if self.nonnegative:
            return above
        below = self.transpose(lower(self.kernel), s)
        return lax.select(lax.gt(self.x, zero(self.x)), above, below)

    def sums(self, signs: Sequence[Sign]) -> Sequence[Array]:
        """The sums of the positive products ``x w``, and of the negative ones.

        Both follow from ``W x`` and ``|W| |x|``: one more map instead of four. Where
        one sign is rare, the difference of these cancels and loses its digits: if that
        is so anywhere, each sign is summed by itself.
        """

        def apart() -> Sequence[Array]:
            return [self.sum_by_sign(sign, _other(sign)) for sign in signs]

        if len(signs) == 1:
            return apart()
        if self.nonnegative:
            above = self.apply(self.x, positive(self.kernel))
            return [above, self._rest(above)]
        if self._layer.products < _FEW:
            return apart()
        plain, size = self.linear(), self.sizes()
        halves = [_times(0.5, z) for z in (lax.add(plain, size), lax.sub(plain, size))]
        least = lax.min(*map(lax.abs, halves))
        self.few = any_unbatched(lax.lt(least, _times(_SMALL, size)))
        return lax.cond(self.few, apart, lambda: halves)

    def _rest(self, part: Array) -> Array:
        """``x W-``, of which ``W x - part`` gives all digits unless it is small."""
        exact = lambda: self.apply(self.x, negative(self.kernel))  # noqa: E731
        if self._layer.rounded:
            return exact()
        rest = lax.sub(self.linear(), part)
        small = lax.lt(lax.abs(rest), _times(_SMALL, lax.abs(part)))
        return lax.cond(any_unbatched(small), exact, lambda: rest)

    def back(self, signs: Sequence[Sign], shares: Sequence[Array]) -> Array:
        """The transpose of ``sums``, of relevance per unit of each."""

        def apart() -> Array:
            parts = [
                self.back_by_sign(sign, _other(sign), s)
                for sign, s in zip(signs, shares, strict=True)
            ]
            return reduce(lax.add, parts)

        if self.few is None:
            return apart()

        def together() -> Array:
            both, odd = lax.add(*shares), lax.sub(*shares)
            doubled = lax.add(self.transpose_whole(both), self.transpose_sizes(odd))
            return _times(0.5, doubled)

        return lax.cond(self.few, apart, together)


Sign = Callable[[Array], Array]  # ``positive`` or ``negative``
_SMALL = 1 / 32
_FEW = 64  # of fewer products one sign is often rare: each is summed by itself

# Kernels that are much larger than what goes through them, as that of a language
# model's logits, are explained by blocks of about so many elements, which fit in a
# cache: what rules make of them would take more time, and memory, than all else.
_BLOCK = 2**20
_MUCH_LARGER = 16


def _large_axes(op: Operation, kernel: Array) -> tuple[int, int] | None:
    """The axes of the features, in the kernel and in the output, of a large kernel."""
    affine = op.affine
    assert affine is not None
    through = _size(op.inputs[0]) + _size(op.outputs[0])
    if kernel.size < max(4 * _BLOCK, _MUCH_LARGER * through):
        return None
    if affine.core.primitive is not p.dot_general_p:
        return None
    if any(step.kind == "move" for step in affine.steps):
        return None
    batch = affine.core.params["dimension_numbers"][1][1 - affine.operand]
    pairs = [(axis, out) for out, axis in feature_axes(affine) if axis not in batch]
    return max(pairs, key=lambda pair: kernel.shape[pair[0]], default=None)


def _products_of(op: Operation, kernel: Array) -> int:
    assert op.affine is not None
    features = {axis for _, axis in feature_axes(op.affine)}
    return math.prod(n for i, n in enumerate(kernel.shape) if i not in features)


def _size(value: Value) -> int:
    return math.prod(value.shape)


def positive(x: Array) -> Array:
    return lax.max(x, zero(x))


def negative(x: Array) -> Array:
    return lax.min(x, zero(x))


def _other(sign: Sign) -> Sign:
    return negative if sign is positive else positive


def _times(factor: float, x: Array) -> Array:
    return lax.mul(x, number(x, factor))


def _favouring(
    part: Callable[[Array], Array], gamma: float
) -> Callable[[Array], Array]:
    """``q + gamma part(q)``."""
    return lambda q: lax.add(q, _times(gamma, part(q)))


@dataclass(frozen=True)
class Gamma(_KernelRule):
    """Generalised LRP-gamma: positive contributions count ``1 + gamma`` times.

    For ``z > 0``: numerators ``x+ (w + g w+) + x- (w + g w-)``, denominator their sum
    plus ``b + g b+``; for ``z < 0`` the signs are exchanged, with ``b + g b-``; ``z =
    0`` hands on nothing. Source: Andeol et al. 2021; Zennit ``Gamma``.

    Args:
      gamma: additional weight of the contributions that have the sign of z.
      bias: ``"absorb"``, ``"ignore"`` or ``"split"``, as in ``Epsilon``.
      stabilizer: added to denominators with their sign.
    """

    gamma: float = 0.25
    bias: str = "absorb"
    stabilizer: float = 1e-6

    def from_reference(self, op: Operation) -> Rule:
        return KernelDifference(self)

    def _distribute(self, split: _Split) -> Promise:
        g, bias = self.gamma, split.bias
        if split.nonnegative and split.rectified:
            upper, lower = _favouring(positive, g), _favouring(negative, g)
            total = split.sum_by_sign(upper, lower)
            b = None if bias is None else upper(bias)
            s = split.per_unit(split.relevance, total, b)
            return Promise(multiplier=split.back_by_sign(upper, lower, s))
        z, relevance = split.z, split.relevance
        split.absorbed.append(lambda: {"blocked": jnp.where(z == 0, relevance, 0)})
        # ``q + g q+`` is ``(1 + g/2) q + g/2 |q|`` and ``q + g q-`` the same with a
        # minus: the favoured sums of both signs are two maps, of W and of |W|.
        is_positive = lax.gt(z, zero(z))

        def as_z(size: Array) -> Array:
            return _times(g / 2, lax.select(is_positive, size, lax.neg(size)))

        size = split.sizes()
        if bias is not None:
            size = lax.add(size, lax.abs(bias))
        total = lax.add(_times(1 + g / 2, split.whole()), as_z(size))
        nothing = zeros_like(relevance)
        relevance = lax.select(lax.eq(z, zero(z)), nothing, relevance)
        s = split.per_unit(relevance, total)
        if bias is not None:
            favoured = lambda: (1 + g / 2) * bias + as_z(lax.abs(bias))  # noqa: E731
            split.absorbed.append(lambda: {"bias": product(s, favoured())})
        shared = _times(1 + g / 2, split.transpose_whole(s))
        return Promise(multiplier=lax.add(shared, split.transpose_sizes(as_z(s))))


@dataclass(frozen=True)
class GammaMontavon(_KernelRule):
    """LRP-gamma on weights: epsilon with ``w + g w+`` and ``b + g b+``.

    Meant for non-negative inputs, where it equals ``Gamma`` if a ReLU follows.
    Source: Montavon et al. 2019; Captum ``GammaRule``.

    Args:
      gamma: additional weight of positive kernel entries.
      gamma_bias: whether the bias is modified too (Captum: False).
      bias: ``"absorb"``, ``"ignore"`` or ``"split"``, as in ``Epsilon``.
      stabilizer: added to denominators with their sign.
    """

    gamma: float = 0.25
    _why_no_reference: ClassVar[str] = "it is meant for x >= 0, and a change has signs"
    gamma_bias: bool = True
    bias: str = "absorb"
    stabilizer: float = 1e-6

    def _distribute(self, split: _Split) -> Promise:
        favoured = _favouring(positive, self.gamma)
        w, bias = favoured(split.kernel), split.bias
        if bias is not None and self.gamma_bias:
            bias = favoured(bias)
        s = split.per_unit(split.relevance, split.apply(split.x, w), bias)
        return Promise(multiplier=split.transpose(w, s))


@dataclass(frozen=True)
class AlphaBeta(_KernelRule):
    """LRP-alpha-beta: ``(alpha (x w)+ / (sum (x w)+ + b+) - beta (x w)- / (...)) R``.

    With ``(x w)+ = x+ w+ + x- w-`` and ``(x w)- = x+ w- + x- w+``: products are split,
    not weights. Source: Bach et al. 2015, eq. 60.

    Args:
      alpha: weight of positive contributions.
      beta: weight of negative ones; ``alpha - beta = 1``.
      bias: ``"absorb"``, ``"ignore"`` or ``"split"``, as in ``Epsilon``.
      stabilizer: added to denominators with their sign.
    """

    alpha: float = 2.0
    beta: float = 1.0
    bias: str = "absorb"
    stabilizer: float = 1e-6

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.alpha < 0 or self.beta < 0 or abs(self.alpha - self.beta - 1) > 1e-9:
            raise RuleError(
                f"AlphaBeta needs alpha - beta = 1 and both non-negative; got alpha="
                f"{self.alpha}, beta={self.beta}."
            )

    def from_reference(self, op: Operation) -> Rule:
        return KernelDifference(self)

    def _distribute(self, split: _Split) -> Promise:
        signs = (positive, negative) if self.beta else (positive,)
        shares = []
        for sign, total in zip(signs, split.sums(signs), strict=True):
            b = None if split.bias is None else sign(split.bias)
            weight = self.alpha if sign is positive else -self.beta
            relevance = split.relevance
            if weight != 1:
                relevance = _times(weight, relevance)
            is_positive = sign is positive
            shares.append(split.per_unit(relevance, total, b, nonnegative=is_positive))
        return Promise(multiplier=split.back(signs, shares))


@dataclass(frozen=True)
class ZPlus(_KernelRule):
    """LRP-z+: only positive contributions, ``(x w)+ / (sum (x w)+ + b+) R``.

    AlphaBeta(1, 0); negative inputs with negative weights count. Source: Montavon et
    al. 2017; Zennit ``ZPlus``.

    Args:
      bias: ``"absorb"``, ``"ignore"`` or ``"split"``, as in ``Epsilon``.
      stabilizer: added to denominators with their sign.
    """

    bias: str = "absorb"
    stabilizer: float = 1e-6

    def from_reference(self, op: Operation) -> Rule:
        return KernelDifference(self)

    def _distribute(self, split: _Split) -> Promise:
        rule = AlphaBeta(1.0, 0.0, self.bias, self.stabilizer)
        return rule._distribute(split)


class _Bound:
    """A bound of ZBox that may be an array: hashable and printable."""

    def __init__(self, bound: Bound):
        self.array = bound.array if isinstance(bound, _Bound) else np.asarray(bound)
        self._key = (self.array.shape, str(self.array.dtype), self.array.tobytes())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Bound) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    def __repr__(self) -> str:
        if self.array.ndim == 0:
            return repr(self.array.item())
        return f"array{self.array.shape}"

    def like(self, x: Array) -> Array:
        return jnp.broadcast_to(jnp.asarray(self.array, x.dtype), x.shape)


def _is_below(low: np.ndarray, high: np.ndarray) -> bool:
    try:
        return low.size > 0 < high.size and bool(np.all(low <= high))
    except ValueError:  # they do not broadcast to one shape
        return False


Bound = float | np.ndarray | Array | _Bound


@dataclass(frozen=True, init=False)
class ZBox(_KernelRule):
    """LRP-z^B for bounded inputs: ``(x w - l w+ - h w-) / (sum ...) R``.

    The bias cancels. Source: Montavon et al. 2017, section 3.2.

    Args:
      low: lowest possible input: a scalar or an array that broadcasts to x.
      high: highest possible input.
      stabilizer: added to denominators with their sign.
    """

    _why_no_reference: ClassVar[str] = (
        "it gives relevance to inputs that are the same at both points"
    )
    low: _Bound
    high: _Bound
    stabilizer: float = 1e-6

    def __init__(self, low: Bound, high: Bound, stabilizer: float = 1e-6):
        for name, bound in (("low", low), ("high", high)):
            if not isinstance(bound, _Bound):
                arguments.concrete(name, bound)
        low, high = _Bound(low), _Bound(high)
        if not _is_below(low.array, high.array):
            raise RuleError(
                "ZBox needs low <= high, numbers or arrays that broadcast to x; got "
                f"{low} and {high}."
            )
        object.__setattr__(self, "low", low)
        object.__setattr__(self, "high", high)
        object.__setattr__(self, "stabilizer", stabilizer)
        self.__post_init__()

    def check(self, op: Operation) -> None:
        super().check(op)
        shape = op.inputs[0].shape
        for name, bound in (("low", self.low), ("high", self.high)):
            try:
                fits = np.broadcast_shapes(bound.array.shape, shape) == shape
            except ValueError:
                fits = False
            if not fits:
                why = f"{name} has shape {bound.array.shape}, its input {shape}"
                refuse(self, op, why)

    def _distribute(self, split: _Split) -> Promise:
        inputs, w = split.ones(), split.kernel
        low, high = (bound.like(inputs) * inputs for bound in (self.low, self.high))
        w_positive, w_negative = positive(w), negative(w)
        z = split.linear() - split.apply(low, w_positive)
        z = z - split.apply(high, w_negative)
        s = split.per_unit(split.relevance, z)
        value = -low * split.transpose(w_positive, s)
        value = value - high * split.transpose(w_negative, s)
        return Promise(value, split.transpose_whole(s))


@dataclass(frozen=True)
class WSquare(_KernelRule):
    """LRP-w^2: ``w_ij^2 / (sum_i w_ij^2 + b_j^2) R_j``, for unbounded first inputs.

    Source: Montavon et al. 2017, section 3.1 (the squared bias: Zennit).

    Args:
      bias: ``"absorb"``, ``"ignore"`` or ``"split"``, as in ``Epsilon``.
      stabilizer: added to denominators with their sign.
    """

    _why_no_reference: ClassVar[str] = (
        "it gives relevance to inputs that are the same at both points"
    )
    _degree: ClassVar[int] = 2
    bias: str = "absorb"
    stabilizer: float = 1e-6

    def _distribute(self, split: _Split) -> Promise:
        squared, inputs = split.kernel * split.kernel, split.ones()
        b = None if split.bias is None else split.bias * split.bias
        s = split.per_unit(split.relevance, split.apply(inputs, squared), b)
        return Promise(value=split.transpose(squared, s) * inputs)
