"""Rules for linear maps: dense and convolution with their effective kernel and bias.

Zero and Epsilon fit every linear operation (sums, means, pooling, scales); the others
look at the kernel. Notation: ``z = W x + b`` and ``q+ = max(q, 0)``, ``q- = min(q,
0)``. Every division is stabilised, ``z + s sign(z)`` with ``sign(0) = +1``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import primitives as p

from jlrp.facts.affine import feature_axes
from jlrp.facts.scalar import scalar_of
from jlrp.graph import Value
from jlrp.operations import Operation
from jlrp.promise import Promise, number, product, safe_divide, signed, zero, zeros_like
from jlrp.rules.base import (
    Array,
    Causes,
    Context,
    KernelMap,
    Propagation,
    Rule,
    refuse,
)
from jlrp.waiting import waiting_for

_BIASES = ("absorb", "ignore", "split")


class _LinearRule(Rule):
    """Shares by contribution to any linear operation: the logic of Zero and Epsilon."""

    bias: str

    @property
    def _stabilizer(self) -> float:
        raise NotImplementedError

    def needs(self, op: Operation) -> tuple[Value, ...]:
        inputs = () if op.nature in ("linear", "movement") else op.inputs
        return inputs + op.outputs

    def check(self, op: Operation) -> None:
        if op.nature not in ("linear", "movement", "selection"):
            refuse(self, op, "it is not linear")

    def propagate(
        self, op: Operation, r: Sequence[Promise | None], ctx: Context
    ) -> Propagation:
        shares: list[Array | None] = []
        causes: list[Callable[[], Causes]] = []
        for out, promise in zip(op.outputs, r, strict=True):
            if promise is None:
                shares.append(None)
                continue
            share, absorbed = self._share(op, promise, ctx.read(out), ctx)
            shares.append(share)
            causes.append(absorbed)
        handed = ctx.vjp(op, shares)

        def without_offset(wanted: Sequence[Value]) -> Sequence[Array]:
            at_zero = ctx.replaced({v: zeros_like(ctx.read(v)) for v in op.inputs})
            whole = ctx.vjp_constants(op, shares, wanted)
            offset = at_zero.vjp_constants(op, shares, wanted)
            return [a - b for a, b in zip(whole, offset, strict=True)]

        return Propagation(
            [Promise(multiplier=m) for m in handed],
            lambda: summed([absorbed() for absorbed in causes]),
            shares,
            None if self.bias == "absorb" else without_offset,
        )

    def _share(
        self, op: Operation, promise: Promise, z: Array, ctx: Context
    ) -> tuple[Array, Callable[[], Causes]]:
        """Relevance per unit of output, and what the output's constants absorb."""
        stabilizer = self._stabilizer
        if self.bias == "absorb" or not op.has_offset:
            share = promise.over(z, stabilizer)

            def absorbed() -> Causes:
                causes = {"stabilizer": share * signed(z, stabilizer)}
                if op.has_offset:
                    causes["bias"] = product(share, ctx.offset(op))
                if not stabilizer and promise.value is not None:
                    causes["blocked"] = jnp.where(z == 0, promise.value, 0)
                return causes

            return share, absorbed
        b = ctx.offset(op)
        z0 = z - b
        relevance = promise.resolve(z)
        lost = jnp.zeros_like(relevance)
        if self.bias == "split":
            lost = relevance * _bias_fraction(z0, b, stabilizer)
            relevance = relevance - lost
        share = Promise(value=relevance).over(z0, stabilizer)

        def ignored() -> Causes:
            causes = {"bias": lost, "stabilizer": share * signed(z0, stabilizer)}
            if not stabilizer:
                causes["blocked"] = jnp.where(z0 == 0, relevance, 0)
            return causes

        return share, ignored


@dataclass(frozen=True)
class Epsilon(_LinearRule):
    """LRP-epsilon: ``R_i = sum_j x_i w_ij / (z_j + epsilon sign(z_j)) R_j``.

    Source: Bach et al. 2015, eq. 58. On sums and average pooling it is Zennit's
    ``Norm``.

    Args:
      epsilon: stabiliser of the denominator; 0 divides nowhere (LRP-0).
      bias: ``"absorb"``: the bias takes its share of ``z``; ``"ignore"``: it is taken
        as zero; ``"split"``: relevance is first shared between ``W x`` and ``b`` by
        absolute value, then by the rule without bias (DynamicLRP).

    Example:
      >>> import jlrp
      >>> composite = jlrp.Composite([("dense", jlrp.rules.Epsilon(1e-6))])
    """

    epsilon: float = 1e-6
    bias: str = "absorb"

    def __post_init__(self) -> None:
        _check_options(self.epsilon, self.bias)

    @property
    def _stabilizer(self) -> float:
        return self.epsilon


@dataclass(frozen=True)
class Zero(_LinearRule):
    """LRP-0: ``R_i = sum_j x_i w_ij / z_j R_j``; multipliers pass the plain transpose.

    Source: Bach et al. 2015, eq. 56. Divides nowhere (value parts: 0 where z is 0).

    Args:
      bias: as in ``Epsilon``.
    """

    bias: str = "absorb"

    def __post_init__(self) -> None:
        _check_options(0.0, self.bias)

    @property
    def _stabilizer(self) -> float:
        return 0.0


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
        z = ctx.read(op.outputs[0])
        kernel_map = ctx.kernel_map(op)
        bias = kernel_map.bias
        relevance = promise.resolve(z)
        option = getattr(self, "bias", "absorb")
        facts = op.facts
        if promise.value is not None or option == "split":  # z is another one there
            facts -= {"rectified"}
        x = ctx.read(op.inputs[0])
        split = _Split(kernel_map, x, op.inputs[0], facts, self._stabilizer)
        if op.outputs[0].dtype == z.dtype:  # or z was rounded
            split.plain = z if bias is None else lax.sub(z, bias)
        if option == "split" and bias is not None:
            z = z - bias
            lost = relevance * _bias_fraction(z, bias, self._stabilizer)
            relevance = relevance - lost
            split.absorbed.append(lambda: {"bias": lost})
        if option != "absorb":
            bias = None
        axes = _large_axes(op, kernel_map.kernel)
        if axes is None:
            handed = self._distribute(split, relevance, z, bias)
        else:
            handed = self._by_blocks(split, axes, relevance, z, bias)

        def constants(wanted: Sequence[Value]) -> Sequence[Array]:
            """Multipliers by Euler: what is shared is homogeneous in the constants."""

            def shared(*numbers: Array) -> Array:
                moved = ctx.replaced(dict(zip(wanted, numbers, strict=True)))
                kernel_map = moved.kernel_map(op)
                parts = _Split(kernel_map, x, op.inputs[0], facts, self._stabilizer)
                bias = kernel_map.bias if option == "absorb" else None
                self._distribute(parts, relevance, z, bias)
                totals = [
                    jnp.sum(lax.stop_gradient(share) * total)
                    for share, total in parts.shared
                ]
                return sum(totals) / self._degree  # type: ignore[return-value]

            numbers = [ctx.read(v) for v in wanted]
            return jax.grad(shared, tuple(range(len(wanted))))(*numbers)

        def causes() -> Causes:
            if axes is not None:
                self._distribute(split, relevance, z, bias)
            return summed([absorbed() for absorbed in split.absorbed])

        return Propagation([handed], causes, constants=constants)

    def _by_blocks(
        self,
        split: _Split,
        axes: tuple[int, int],
        relevance: Array,
        z: Array,
        bias: Array | None,
    ) -> Promise:
        """The shares of some output features at a time, added up."""
        of_kernel, of_out = axes
        kernel = split.map.kernel
        features = kernel.shape[of_kernel]
        size = max(1, _BLOCK * features // kernel.size)

        def block(start: Array | int, size: int) -> Promise:
            def cut(array: Array | None, axis: int) -> Any:
                if array is None:
                    return None
                return lax.dynamic_slice_in_dim(array, start, size, axis)

            arrived, out = cut(relevance, of_out), cut(z, of_out)
            part = split.part(cut(kernel, of_kernel), cut(split.plain, of_out))
            return self._distribute(part, arrived, out, cut(bias, of_out))

        starts = jnp.arange(features // size) * size
        parts = lax.map(lambda start: block(start, size), starts)
        handed = parts.map(lambda part: lax.reduce_sum(part, [0]))
        if rest := features % size:
            handed = handed + block(features - rest, rest)
        return handed

    @property
    def _stabilizer(self) -> float:
        return getattr(self, "stabilizer")  # noqa: B009  (a field of each subclass)

    def _distribute(
        self, split: _Split, relevance: Array, z: Array, bias: Array | None
    ) -> Promise:
        raise NotImplementedError


class _Split:
    """Shares relevance by parts of the kernel, and remembers what was absorbed."""

    def __init__(
        self,
        kernel_map: KernelMap,
        x: Array,
        start: Value,
        facts: frozenset[str],
        stabilizer: float,
    ):
        self.map = kernel_map
        # Of this one others are made, when relevance arrives; map.kernel is there.
        self.kernel = waiting_for(kernel_map.arrived, kernel_map.kernel)
        self.x = x
        self._start, self._facts = start, facts  # of which x is the number
        self.nonnegative = "nonnegative" in facts
        self.rectified = "rectified" in facts  # no relevance where z < 0
        self.stabilizer = stabilizer
        self.plain: Array | None = None  # W x, if the forward pass has it
        self.absorbed: list[Callable[[], Causes]] = []
        self.shared: list[tuple[Array, Array]] = []  # per unit, and all that is shared

    def part(self, kernel: Array, plain: Array | None) -> _Split:
        """The same for some output features."""
        some = _Split(
            _PartOfMap(kernel, self.map),
            self.x,
            self._start,
            self._facts,
            self.stabilizer,
        )
        some.plain = plain
        return some

    def ones(self) -> Array:
        """1 for each input, 0 where x is padding."""
        return _ones_but_for_padding(self._start, self.x.dtype)

    def linear(self) -> Array:
        """``W x``."""
        if self.plain is None:
            self.plain = self.map.apply(self.x, self.map.kernel)
        return self.plain

    def whole(self, z: Array, bias: Array | None) -> Array:
        """``W x + bias``: z itself, unless the forward pass rounded it."""
        if bias is None:
            return self.linear()
        return lax.add(self.linear(), bias) if self.plain is None else z

    def per_unit(self, relevance: Array, z: Array, bias: Array | None) -> Array:
        """``R / (z + bias + stabiliser)``, the absorbed parts noted."""
        if bias is not None:
            z = lax.add(z, bias)
        share = Promise(value=relevance).over(z, self.stabilizer)
        self.shared.append((share, z))

        def absorbed() -> Causes:
            causes = {"stabilizer": share * signed(z, self.stabilizer)}
            if not self.stabilizer:
                causes["blocked"] = jnp.where(z == 0, relevance, 0)
            if bias is not None:
                causes["bias"] = share * bias
            return causes

        self.absorbed.append(absorbed)
        return share

    def by_sign(
        self, relevance: Array, upper: Array, lower: Array, bias: Array | None
    ) -> Array:
        """Multiplier of shares ``(x+ upper + x- lower) / (sum + bias) R``."""
        s = self.per_unit(relevance, self.sum_by_sign(upper, lower), bias)
        return self.back_by_sign(upper, lower, s)

    def sum_by_sign(self, upper: Array, lower: Array) -> Array:
        """``x+ upper + x- lower``, by separate sums for the two signs of x.

        Taking one from the difference of the whole and the other loses digits where the
        kept sign is rare.
        """
        if self.nonnegative:
            return self.map.apply(self.x, upper)
        z = self.map.apply(positive(self.x), upper)
        return lax.add(z, self.map.apply(negative(self.x), lower))

    def back_by_sign(self, upper: Array, lower: Array, s: Array) -> Array:
        """The transpose of ``upper`` where x is positive, of ``lower`` elsewhere."""
        if self.nonnegative:
            return self.map.transpose(upper, s)
        above, below = self.map.transpose(upper, s), self.map.transpose(lower, s)
        return lax.select(lax.gt(self.x, zero(self.x)), above, below)

    def rest(self, part: Array, kernel: Array) -> Array:
        """``x kernel``, of which ``W x - part`` gives all digits unless it is small."""
        if self.plain is None:
            return self.map.apply(self.x, kernel)
        rest = lax.sub(self.plain, part)
        small = lax.lt(lax.abs(rest), lax.mul(lax.abs(part), number(part, _SMALL)))
        exact = lambda: self.map.apply(self.x, kernel)  # noqa: E731
        return lax.cond(lax.reduce_or(small, range(small.ndim)), exact, lambda: rest)


_SMALL = 1 / 32

# Kernels that are much larger than what goes through them, as that of a language
# model's logits, are explained by blocks of about so many elements, which fit in a
# cache: what rules make of them would take more time, and memory, than all else.
_BLOCK = 2**20
_MUCH_LARGER = 16


@dataclass(frozen=True)
class _PartOfMap:
    """A linear map with the kernel of some output features; it has no bias."""

    kernel: Array
    whole: KernelMap
    bias: Array | None = None
    arrived: Array | None = None

    def apply(self, x: Array, kernel: Array) -> Array:
        return self.whole.apply(x, kernel)

    def transpose(self, kernel: Array, y: Array) -> Array:
        return self.whole.transpose(kernel, y)


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


def _size(value: Value) -> int:
    return math.prod(value.shape)


def positive(x: Array) -> Array:
    return lax.max(x, zero(x))


def negative(x: Array) -> Array:
    return lax.min(x, zero(x))


def _times(factor: float, x: Array) -> Array:
    return lax.mul(x, number(x, factor))


def _favouring(part: Callable[[Array], Array], x: Array, gamma: float) -> Array:
    return lax.add(x, _times(gamma, part(x)))


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

    def __post_init__(self) -> None:
        _check_options(self.stabilizer, self.bias)

    def _distribute(
        self, split: _Split, relevance: Array, z: Array, bias: Array | None
    ) -> Promise:
        w, g = split.kernel, self.gamma
        if split.nonnegative and split.rectified:
            upper, lower = _favouring(positive, w, g), _favouring(negative, w, g)
            b = None if bias is None else _favouring(positive, bias, g)
            return Promise(multiplier=split.by_sign(relevance, upper, lower, b))
        split.absorbed.append(lambda: {"blocked": jnp.where(z == 0, relevance, 0)})
        # ``q + g q+`` is ``(1 + g/2) q + g/2 |q|`` and ``q + g q-`` the same with a
        # minus: the favoured sums of both signs are two maps, of W and of |W|.
        is_positive = lax.gt(z, zero(z))

        def as_z(size: Array) -> Array:
            return _times(g / 2, lax.select(is_positive, size, lax.neg(size)))

        x = split.x if split.nonnegative else lax.abs(split.x)
        size = split.map.apply(x, lax.abs(w))
        if bias is not None:
            size = lax.add(size, lax.abs(bias))
        total = lax.add(_times(1 + g / 2, split.whole(z, bias)), as_z(size))
        nothing = zeros_like(relevance)
        relevance = lax.select(lax.eq(z, zero(z)), nothing, relevance)
        s = split.per_unit(relevance, total, None)
        if bias is not None:
            favoured = lambda: (1 + g / 2) * bias + as_z(lax.abs(bias))  # noqa: E731
            split.absorbed.append(lambda: {"bias": s * favoured()})
        odd = split.map.transpose(lax.abs(w), as_z(s))
        if not split.nonnegative:
            odd = lax.mul(lax.sign(split.x), odd)
        shared = split.map.transpose(split.map.kernel, s)
        return Promise(multiplier=lax.add(_times(1 + g / 2, shared), odd))


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
    gamma_bias: bool = True
    bias: str = "absorb"
    stabilizer: float = 1e-6

    def __post_init__(self) -> None:
        _check_options(self.stabilizer, self.bias)

    def _distribute(
        self, split: _Split, relevance: Array, z: Array, bias: Array | None
    ) -> Promise:
        w = split.kernel + self.gamma * positive(split.kernel)
        if bias is not None and self.gamma_bias:
            bias = bias + self.gamma * positive(bias)
        s = split.per_unit(relevance, split.map.apply(split.x, w), bias)
        return Promise(multiplier=split.map.transpose(w, s))


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
        _check_options(self.stabilizer, self.bias)
        if self.alpha < 0 or self.beta < 0 or abs(self.alpha - self.beta - 1) > 1e-9:
            raise ValueError(
                f"AlphaBeta needs alpha - beta = 1 and both non-negative; got alpha="
                f"{self.alpha}, beta={self.beta}."
            )

    def _distribute(
        self, split: _Split, relevance: Array, z: Array, bias: Array | None
    ) -> Promise:
        w_positive, w_negative = positive(split.kernel), negative(split.kernel)
        b = None if bias is None else positive(bias)
        r_positive = _times(self.alpha, relevance) if self.beta else relevance
        z = split.sum_by_sign(w_positive, w_negative)
        s = split.per_unit(r_positive, z, b)
        m = split.back_by_sign(w_positive, w_negative, s)
        if not self.beta:
            return Promise(multiplier=m)
        b = None if bias is None else negative(bias)
        if split.nonnegative:
            z = split.rest(z, w_negative)
        else:
            z = split.sum_by_sign(w_negative, w_positive)
        s = split.per_unit(_times(-self.beta, relevance), z, b)
        against = split.back_by_sign(w_negative, w_positive, s)
        return Promise(multiplier=lax.add(m, against))


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

    def __post_init__(self) -> None:
        _check_options(self.stabilizer, self.bias)

    def _distribute(
        self, split: _Split, relevance: Array, z: Array, bias: Array | None
    ) -> Promise:
        rule = AlphaBeta(1.0, 0.0, self.bias, self.stabilizer)
        return rule._distribute(split, relevance, z, bias)


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

    low: _Bound
    high: _Bound
    stabilizer: float = 1e-6

    def __init__(self, low: Bound, high: Bound, stabilizer: float = 1e-6):
        _check_options(stabilizer)
        low, high = _Bound(low), _Bound(high)
        if np.any(low.array > high.array):
            raise ValueError(f"ZBox needs low <= high; got {low} and {high}.")
        object.__setattr__(self, "low", low)
        object.__setattr__(self, "high", high)
        object.__setattr__(self, "stabilizer", stabilizer)

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

    def _distribute(
        self, split: _Split, relevance: Array, z: Array, bias: Array | None
    ) -> Promise:
        x, w, linear = split.x, split.kernel, split.map
        ones = split.ones()
        low, high = self.low.like(x) * ones, self.high.like(x) * ones
        w_positive, w_negative = positive(w), negative(w)
        z = linear.apply(x, linear.kernel)
        z = z - linear.apply(low, w_positive) - linear.apply(high, w_negative)
        s = split.per_unit(relevance, z, None)
        value = -low * linear.transpose(w_positive, s)
        value = value - high * linear.transpose(w_negative, s)
        return Promise(value, linear.transpose(linear.kernel, s))


@dataclass(frozen=True)
class WSquare(_KernelRule):
    """LRP-w^2: ``w_ij^2 / (sum_i w_ij^2 + b_j^2) R_j``, for unbounded first inputs.

    Source: Montavon et al. 2017, section 3.1 (the squared bias: Zennit).

    Args:
      bias: ``"absorb"``, ``"ignore"`` or ``"split"``, as in ``Epsilon``.
      stabilizer: added to denominators with their sign.
    """

    _degree: ClassVar[int] = 2
    bias: str = "absorb"
    stabilizer: float = 1e-6

    def __post_init__(self) -> None:
        _check_options(self.stabilizer, self.bias)

    def _distribute(
        self, split: _Split, relevance: Array, z: Array, bias: Array | None
    ) -> Promise:
        squared, ones = split.kernel * split.kernel, split.ones()
        b = None if bias is None else bias * bias
        z = split.map.apply(ones, squared)
        s = split.per_unit(relevance, z, b)
        return Promise(value=split.map.transpose(squared, s) * ones)


@dataclass(frozen=True)
class Flat(Rule):
    """Equal shares: ``R_j / (number of inputs that j sees)``; padding is not an input.

    On sums, means and average pooling: by their weights, whatever the inputs.
    Source: Lapuschkin et al. 2019.

    Args:
      stabilizer: added to denominators with their sign.
    """

    stabilizer: float = 1e-6

    def __post_init__(self) -> None:
        _check_options(self.stabilizer)

    def needs(self, op: Operation) -> tuple[Value, ...]:
        return op.outputs

    def check(self, op: Operation) -> None:
        if op.affine is None and op.kind not in ("sum", "mean", "avg_pool"):
            refuse(self, op, "it has no kernel and is no sum")

    def propagate(
        self, op: Operation, r: Sequence[Promise | None], ctx: Context
    ) -> Propagation:
        (promise,) = r
        assert promise is not None
        relevance = promise.resolve(ctx.read(op.outputs[0]))
        ones = _ones_but_for_padding(op.inputs[0], relevance.dtype)
        if op.affine is not None:
            kernel_map = ctx.kernel_map(op)
            kernel = jnp.ones_like(kernel_map.kernel)
            z = kernel_map.apply(ones, kernel)
            share = Promise(value=relevance).over(z, self.stabilizer)
            value = kernel_map.transpose(kernel, share)
        else:
            (z,) = ctx.apply(op, [ones])
            share = Promise(value=relevance).over(z, self.stabilizer)
            (value,) = ctx.transpose(op, [share])
        return Propagation(
            [Promise(value=value * ones)],
            lambda: summed([{"stabilizer": share * signed(z, self.stabilizer)}]),
        )


def _ones_but_for_padding(value: Value, dtype: Any) -> Array:
    """1, and 0 where a value is padding by a literal 0, which is no input.

    A convolution may pad by itself, or a framework before it.
    """
    made = value.producer
    if made is not None and made.primitive is p.pad_p:
        padded, filling = made.inputs
        known = scalar_of(filling)
        if known is not None and known == 0 and isinstance(padded, Value):
            inside = _ones_but_for_padding(padded, dtype)
            nothing = jnp.zeros((), dtype)
            return lax.pad(inside, nothing, made.params["padding_config"])
    return jnp.ones(value.shape, dtype)


def _check_options(stabilizer: float, bias: str = "absorb") -> None:
    if bias not in _BIASES:
        raise ValueError(f"bias must be one of {_BIASES}; got {bias!r}.")
    if stabilizer < 0:
        raise ValueError(f"A stabilizer must not be negative; got {stabilizer}.")


def _bias_fraction(z0: Array, b: Array, stabilizer: float) -> Array:
    """The part of relevance that is not ``|z0| / (|z0| + |b| + stabilizer)``."""
    size = jnp.abs(z0)
    total = size + jnp.abs(b) + stabilizer
    return 1 - safe_divide(size, total)


def summed(causes: Sequence[Causes]) -> Causes:
    totals: Causes = {}
    for cause in causes:
        for name, amount in cause.items():
            amount = jnp.real(jnp.sum(amount))
            totals[name] = totals[name] + amount if name in totals else amount
    return totals
