"""Rules that look at the kernel of a dense or convolution, and at its bias.

Notation: ``q = x w`` are the contributions of the inputs to an output ``z = W x + b``,
the bias among them; ``q+ = max(q, 0)``, ``q- = min(q, 0)``. Every division is
stabilised, ``z + s sign(z)`` with ``sign(0) = +1``. A rule says by which sums over
contributions relevance is divided, see ``contributions``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jlrp import arguments, tactics
from jlrp.errors import RuleError
from jlrp.ir.program import Value
from jlrp.ops.affine import feature_axes
from jlrp.ops.base import Operation
from jlrp.ops.context import Context
from jlrp.ops.kinds.affine import AffineOp
from jlrp.promise import Parts, Promise
from jlrp.rules.base import Array, Causes, Propagation, Rule, refuse
from jlrp.rules.contributions import (
    Arrays,
    Contributions,
    Layer,
    Total,
    negative,
    positive,
    times,
)
from jlrp.rules.kernel_difference import Changes, OnDifferences
from jlrp.rules.ledger import summed
from jlrp.rules.padding import padding_of
from jlrp.tactics.contributions import (
    Cut,
    FewerMaps,
    by_blocks,
    large_axes,
    traced_once,
)
from jlrp.tactics.dependencies import first_of


@dataclass(frozen=True)
class _KernelRule(Rule):
    """Common to the rules that look at the kernel of a dense or convolution."""

    _degree: ClassVar[int] = 1  # of the shares, as functions of kernel and bias

    def check(self, op: Operation) -> None:
        if not isinstance(op, AffineOp):
            refuse(self, op, "it has no kernel (it is not dense or conv)")

    def needs(self, op: Operation) -> tuple[Value, ...]:
        return op.inputs + op.outputs

    def parts(self, op: Operation, r: Sequence[Parts]) -> Sequence[Parts]:
        return [Parts.MULTIPLIER] * len(op.inputs)

    def propagate(
        self, op: Operation, r: Sequence[Promise | None], ctx: Context
    ) -> Propagation:
        (promise,) = r
        assert promise is not None and isinstance(op, AffineOp)
        layer, arrays = self._layer(op, promise, ctx)

        def causes() -> Causes:
            q = self._contributions(layer, arrays)
            self._distribute(q)
            return summed([absorbed() for absorbed in q.absorbed])

        def constants(wanted: Sequence[Value]) -> Sequence[Array]:
            return self._of_constants(op, layer, arrays, wanted, ctx)

        r_in = traced_once(self.share, layer, arrays)
        return Propagation([r_in], causes, constants=constants)

    def _layer(
        self, op: AffineOp, promise: Promise, ctx: Context
    ) -> tuple[Layer, Arrays]:
        x, z = ctx.read(op.inputs[0]), ctx.read(op.outputs[0])
        found = op.kernel_map(ctx)
        if op.is_negated:  # so is the effective kernel
            z = lax.neg(z)
            m = promise.multiplier
            promise = Promise(promise.value, None if m is None else lax.neg(m))
        # One element: the whole array has another shape for each position of a layer,
        # so that equal layers would be traced again.
        after = first_of(ctx.after)
        arrays = Arrays(found.kernel, found.bias, x, z, promise, after)
        # Not where z is divided otherwise: by values, or without its bias.
        plain = promise.value is None and self._option != "split"
        layer = Layer(
            found.linear,
            padding_of(op.inputs[0]),
            "nonnegative" in op.facts,
            "rectified" in op.facts and plain,
            op.outputs[0].dtype != z.dtype,
            large_axes(op, found.kernel),
            _products_of(op, found.kernel),
        )
        return layer, arrays

    @property
    def _stabilizer(self) -> float:
        return getattr(self, "stabilizer")  # noqa: B009  (a field of each subclass)

    @property
    def _option(self) -> str:
        """What becomes of the bias."""
        return getattr(self, "bias", "absorb")

    def share(self, layer: Layer, arrays: Arrays) -> Promise:
        """The promise of the input of a layer."""
        if layer.blocks is not None and tactics.enabled():
            whole = layer._replace(blocks=None)

            def part(kernel: Array, cut: Cut) -> Promise:
                bias = None if arrays.bias is None else cut(arrays.bias)
                promise = arrays.promise.map(cut)
                of_block = kernel, bias, arrays.x, cut(arrays.z), promise, None
                return self.share(whole, Arrays(*of_block))

            return by_blocks(part, arrays.kernel, layer.blocks)
        return self._distribute(self._contributions(layer, arrays))

    def _contributions(self, layer: Layer, arrays: Arrays) -> Contributions:
        found = FewerMaps if tactics.enabled() else Contributions
        return found(layer, arrays, self._option, self._stabilizer)

    def _distribute(self, q: Contributions) -> Promise:
        raise NotImplementedError

    def _of_constants(
        self,
        op: AffineOp,
        layer: Layer,
        arrays: Arrays,
        wanted: Sequence[Value],
        ctx: Context,
    ) -> Sequence[Array]:
        """Multipliers by Euler: what is shared is homogeneous in the constants."""

        def shared(*moved: Array) -> Array:
            by = op.kernel_map(ctx.replaced(dict(zip(wanted, moved, strict=True))))
            by_these = arrays._replace(kernel=by.kernel, bias=by.bias)
            q = Contributions(layer, by_these, self._option, self._stabilizer)
            self._distribute(q)
            totals = [jnp.sum(lax.stop_gradient(s) * total) for s, total in q.shared]
            return sum(totals) / self._degree  # type: ignore[return-value]

        found = [ctx.read(v) for v in wanted]
        return jax.grad(shared, tuple(range(len(wanted))))(*found)


def _products_of(op: AffineOp, kernel: Array) -> int:
    features = {axis for _, axis in feature_axes(op.affine)}
    return math.prod(n for i, n in enumerate(kernel.shape) if i not in features)


@dataclass(frozen=True)
class ZPlus(_KernelRule, OnDifferences):
    """LRP-z+: only positive contributions, ``(x w)+ / (sum (x w)+ + b+) R``.

    AlphaBeta(1, 0); negative inputs with negative weights count. Source: Montavon et
    al. 2017; Zennit ``ZPlus``.

    Args:
      bias: ``"absorb"``, ``"ignore"`` or ``"split"``, as in ``Epsilon``.
      stabilizer: added to denominators with their sign.
    """

    bias: str = "absorb"
    stabilizer: float = 1e-6

    def _distribute(self, q: Contributions) -> Promise:
        s = q.per_unit(q.relevance, q.of_sign(positive))
        return Promise(multiplier=q.back_of_sign(positive, s))

    def of_changes(self, changes: Changes) -> Array:
        return changes.favouring(0.5, 0.5)


@dataclass(frozen=True)
class AlphaBeta(_KernelRule, OnDifferences):
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

    def _distribute(self, q: Contributions) -> Promise:
        if not self.beta:
            return ZPlus(self.bias, self.stabilizer)._distribute(q)
        sums = q.by_sign()
        above = q.per_unit(times(self.alpha, q.relevance), sums.above)
        below = q.per_unit(times(-self.beta, q.relevance), sums.below)
        return Promise(multiplier=q.back_by_sign(sums, above, below))

    def of_changes(self, changes: Changes) -> Array:
        return changes.by_both_signs(self.alpha, self.beta)


@dataclass(frozen=True)
class Gamma(_KernelRule, OnDifferences):
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

    def _distribute(self, q: Contributions) -> Promise:
        s = q.per_unit(q.unless_zero(), q.favouring(self.gamma))
        return Promise(multiplier=q.back_favouring(self.gamma, s))

    def of_changes(self, changes: Changes) -> Array:
        return changes.favouring(1 + self.gamma / 2, self.gamma / 2)


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

    def _distribute(self, q: Contributions) -> Promise:
        w = self._favoured(q.kernel)
        part = self._favoured if self.gamma_bias else lambda b: b
        s = q.per_unit(q.relevance, q.with_bias(q.apply(q.x, w), part))
        return Promise(multiplier=q.transpose(w, s))

    def _favoured(self, w: Array) -> Array:
        return lax.add(w, times(self.gamma, positive(w)))


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

    def parts(self, op: Operation, r: Sequence[Parts]) -> Sequence[Parts]:
        return [Parts.BOTH] * len(op.inputs)

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

    def _distribute(self, q: Contributions) -> Promise:
        inputs, above, below = q.ones(), positive(q.kernel), negative(q.kernel)
        low, high = (bound.like(inputs) * inputs for bound in (self.low, self.high))
        z = q.linear() - q.apply(low, above) - q.apply(high, below)
        s = q.per_unit(q.relevance, Total(z))
        value = -low * q.transpose(above, s) - high * q.transpose(below, s)
        return Promise(value, q.back_linear(s))


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

    def parts(self, op: Operation, r: Sequence[Parts]) -> Sequence[Parts]:
        return [Parts.VALUE] * len(op.inputs)

    def _distribute(self, q: Contributions) -> Promise:
        inputs, squared = q.ones(), q.kernel * q.kernel
        total = q.with_bias(q.apply(inputs, squared), lambda b: b * b)
        s = q.per_unit(q.relevance, total)
        return Promise(value=q.transpose(squared, s) * inputs)
