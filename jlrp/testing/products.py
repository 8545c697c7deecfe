"""Rewritings of products, quotients and powers."""

from __future__ import annotations

import numpy as np
from jax import lax
from jax.extend.core import primitives as p

from jlrp.ir import jax_compat
from jlrp.ir.jax_compat import Operand
from jlrp.testing import documented
from jlrp.testing.rewriting import Site, rewriting
from jlrp.typing import Array, ArrayLike


def product(a: ArrayLike, b: ArrayLike) -> Array:
    return lax.mul(a, b)


@rewriting("products", p.mul_p)
def operands_of_mul_swapped(site: Site) -> Operand | None:
    """``a * b`` as ``b * a``."""
    return site.bind(*site.inputs[::-1]) if site.carries else None


def _associated_right(site: Site, with_literal: bool) -> Operand | None:
    inner = site.producer(0, p.mul_p)
    if not site.carries or inner is None or not inner.is_read_once():
        return None
    if _has_literal(site, inner) is not with_literal:
        return None
    (a, b), c = inner.inputs, site.inputs[1]
    return a * (b * c)


def _associated_left(site: Site, with_literal: bool) -> Operand | None:
    inner = site.producer(1, p.mul_p)
    if not site.carries or inner is None or not inner.is_read_once():
        return None
    if _has_literal(site, inner) is not with_literal:
        return None
    a, (b, c) = site.inputs[0], inner.inputs
    return (a * b) * c


def _has_literal(*sites: Site) -> bool:
    return any(site.literal(i) is not None for site in sites for i in range(2))


@rewriting("products", p.mul_p, documented=documented.of_order)
def mul_associated_right(site: Site) -> Operand | None:
    """``(a * b) * c`` as ``a * (b * c)``."""
    return _associated_right(site, with_literal=False)


@rewriting("products", p.mul_p, documented=documented.of_order)
def mul_associated_left(site: Site) -> Operand | None:
    """``a * (b * c)`` as ``(a * b) * c``."""
    return _associated_left(site, with_literal=False)


@rewriting("products", p.mul_p, documented=documented.of_factors)
def literal_associated_right(site: Site) -> Operand | None:
    """``(a * b) * 2`` as ``a * (b * 2)``."""
    return _associated_right(site, with_literal=True)


@rewriting("products", p.mul_p, documented=documented.of_factors)
def literal_associated_left(site: Site) -> Operand | None:
    """``a * (b * 2)`` as ``(a * b) * 2``."""
    return _associated_left(site, with_literal=True)


@rewriting("products", p.mul_p)
def mul_as_division_by_reciprocal(site: Site) -> Operand | None:
    """A product with a literal as a division by its reciprocal."""
    for i in range(2):
        if (number := site.literal(i)) and site.carries:
            return site.inputs[1 - i] / np.asarray(1 / number, site.dtype)
    return None


@rewriting("products", p.mul_p)
def mul_as_dot(site: Site) -> Operand | None:
    """A product of two active values as a dot that contracts nothing."""
    if not site.is_active(0) or not site.is_active(1) or not site.is_float:
        return None
    axes = tuple(range(len(site.shape)))
    a, b = (lax.broadcast_in_dim(x, site.shape, axes) for x in site.inputs)
    return lax.dot_general(a, b, (((), ()), (axes, axes)))


@rewriting("products", p.mul_p)
def square_as_square(site: Site) -> Operand | None:
    """``x * x`` as ``square(x)``."""
    a, b = site.eqn.invars
    return lax.square(site.inputs[0]) if a is b and site.carries else None


@rewriting("products", p.mul_p)
def square_as_power(site: Site) -> Operand | None:
    """``x * x`` as ``x ** 2``."""
    a, b = site.eqn.invars
    return lax.integer_pow(site.inputs[0], 2) if a is b and site.carries else None


@rewriting("products", p.square_p, p.integer_pow_p)
def square_as_product(site: Site) -> Operand | None:
    """``square(x)`` and ``x ** n`` as products."""
    n = site.params.get("y", 2)
    if not site.carries or not 2 <= n <= 4:
        return None
    x = y = site.inputs[0]
    for _ in range(n - 1):
        y = y * x
    return y


@rewriting("products", p.square_p, p.mul_p)
def square_of_magnitude(site: Site) -> Operand | None:
    """``x ** 2`` as ``abs(x) ** 2``."""
    if not site.carries or (
        site.primitive is p.mul_p and site.eqn.invars[0] is not site.eqn.invars[1]
    ):
        return None
    return lax.square(lax.abs(site.inputs[0]))


@rewriting("products", p.integer_pow_p)
def power_with_float_exponent(site: Site) -> Operand | None:
    """``x ** n`` of an integer n as a power of a float, where x is positive."""
    x, n = site.inputs[0], site.params["y"]
    if not site.carries or n % 2:
        return None
    return lax.pow(lax.abs(x), np.asarray(n, site.dtype))


@rewriting("products", p.integer_pow_p)
def negative_power_as_quotient(site: Site) -> Operand | None:
    """``x ** -n`` as ``1 / x ** n``."""
    x, n = site.inputs[0], site.params["y"]
    if not site.carries or n >= 0:
        return None
    y = x if n == -1 else lax.integer_pow(x, -n)
    return lax.full_like(x, 1.0) / y


@rewriting("products", p.div_p)
def division_by_reciprocal(site: Site) -> Operand | None:
    """``a / b`` as ``a * (1 / b)``."""
    a, b = site.inputs
    b = lax.full((), b, site.dtype) if site.literal(1) is not None else b
    if not site.carries or site.literal(0) == 1.0:
        return None
    return a * (
        np.ones((), site.dtype) / b if np.shape(b) == () else lax.full_like(b, 1.0) / b
    )


@rewriting("products", p.div_p)
def division_by_power(site: Site) -> Operand | None:
    """``a / b`` as ``a * b ** -1``."""
    a, b = site.inputs
    if not site.is_active(1) or not site.is_float:
        return None
    return a * lax.integer_pow(b, -1)


@rewriting("products", p.div_p)
def division_by_float_power(site: Site) -> Operand | None:
    """``a / b`` as ``a * b ** -1.0``, for a sum, root or exponential b."""
    a, b = site.inputs
    if not site.is_active(1) or not site.is_float or not _is_positive(site, 1):
        return None
    return a * lax.pow(b, np.asarray(-1.0, site.dtype))


_POSITIVE = frozenset({p.exp_p, p.sqrt_p, p.rsqrt_p, p.logistic_p, p.square_p})


def _is_positive(site: Site, i: int) -> bool:
    found: Site | None = site
    while found is not None:
        found = found.producer(i)
        i = 0
        if found is not None and found.primitive in _POSITIVE:
            return True
        if found is None or found.primitive not in _THROUGH:
            return False
    return False


_THROUGH = frozenset({p.broadcast_in_dim_p, p.reshape_p, p.squeeze_p, p.reduce_sum_p})


@rewriting("products", p.div_p)
def reciprocal_before_broadcast(site: Site) -> Operand | None:
    """``a / broadcast(s)`` as ``a * broadcast(1 / s)``."""
    a, b = site.inputs
    if not site.carries or (wide := site.producer(1, p.broadcast_in_dim_p)) is None:
        return None
    if len(wide.inputs) != 1:
        return None
    small = wide.inputs[0]
    return a * wide.bind(lax.full_like(small, 1.0) / small)


@rewriting("products", p.div_p)
def division_twice(site: Site) -> Operand | None:
    """``a / (b * c)`` as ``(a / b) / c``."""
    inner = site.producer(1, p.mul_p)
    if not site.carries or inner is None or not inner.is_read_once():
        return None
    b, c = inner.inputs
    return (site.inputs[0] / b) / c


@rewriting("products", p.div_p)
def division_by_root_as_rsqrt(site: Site) -> Operand | None:
    """``a / sqrt(b)`` as ``a * rsqrt(b)``."""
    inner = site.producer(1, p.sqrt_p)
    if not site.carries:
        return None
    if inner is not None:
        return site.inputs[0] * lax.rsqrt(inner.inputs[0])
    wide = site.producer(1, p.broadcast_in_dim_p)
    inner = None if wide is None else wide.producer(0, p.sqrt_p)
    if wide is None or inner is None:
        return None
    return site.inputs[0] * wide.bind(lax.rsqrt(inner.inputs[0]))


@rewriting("products", p.rsqrt_p)
def rsqrt_as_quotient(site: Site) -> Operand | None:
    """``rsqrt(x)`` as ``1 / sqrt(x)``."""
    x = site.inputs[0]
    return lax.full_like(x, 1.0) / lax.sqrt(x) if site.carries else None


@rewriting("products", p.rsqrt_p, p.sqrt_p)
def root_as_power(site: Site) -> Operand | None:
    """``sqrt(x)`` and ``rsqrt(x)`` as powers."""
    power = 0.5 if site.primitive is p.sqrt_p else -0.5
    return (
        lax.pow(site.inputs[0], np.asarray(power, site.dtype)) if site.carries else None
    )


@rewriting("products", p.mul_p)
def mul_by_rsqrt_as_division(site: Site) -> Operand | None:
    """``a * rsqrt(b)`` as ``a / sqrt(b)``."""
    if not site.carries:
        return None
    for i in range(2):
        inner = site.producer(i, p.rsqrt_p)
        if inner is not None:
            return site.inputs[1 - i] / lax.sqrt(inner.inputs[0])
        wide = site.producer(i, p.broadcast_in_dim_p)
        inner = None if wide is None else wide.producer(0, p.rsqrt_p)
        if wide is not None and inner is not None:
            return site.inputs[1 - i] / wide.bind(lax.sqrt(inner.inputs[0]))
    return None


@rewriting("products", p.exp_p)
def exp_of_difference_as_quotient(site: Site) -> Operand | None:
    """``exp(a - b)`` as ``exp(a) / exp(b)``."""
    inner = site.producer(0, p.sub_p)
    if not site.carries or inner is None or not inner.is_read_once():
        return None
    a, b = inner.inputs
    return lax.exp(a) / lax.exp(b)


@rewriting("products", p.exp_p)
def exp_without_shift(site: Site) -> Operand | None:
    """``exp(a - stop_gradient(max))`` of a softmax as ``exp(a)``."""
    inner = site.producer(0, p.sub_p)
    if not site.carries or inner is None or not _is_shift(inner, 1):
        return None
    if not _is_normalised(site):
        return None
    return lax.exp(inner.inputs[0])


def _is_shift(site: Site, i: int) -> bool:
    found: Site | None = site
    while found is not None:
        found, i = found.producer(i), 0
        if found is None:
            return False
        if found.primitive.name == "stop_gradient":
            return True
        if found.primitive not in _THROUGH:
            return False
    return False


def _is_normalised(site: Site) -> bool:
    """Whether all that reads an exponential is its sum, and the quotient by that."""
    out = site.eqn.outvars[0]
    readers = [e for e in site.body.jaxpr.eqns if out in e.invars]
    if out in site.body.jaxpr.outvars or len(readers) != 2:
        return False
    sums = [e for e in readers if e.primitive is p.reduce_sum_p]
    quotients = [e for e in readers if e.primitive is p.div_p and e.invars[0] is out]
    if len(sums) != 1 or len(quotients) != 1:
        return False
    axes = sums[0].params["axes"]
    bottom = Site(quotients[0], site.body).eqn.invars[1]
    for _ in range(3):
        made = site.body.producers.get(bottom)
        if made is sums[0]:
            return axes == (len(site.shape) - 1,)
        if made is None or made.primitive not in _THROUGH:
            return False
        bottom = made.invars[0]
    return False


@rewriting("products", p.div_p)
def softmax_in_log_space(site: Site) -> Operand | None:
    """``exp(a) / s`` as ``exp(a - log(s))``."""
    inner = site.producer(0, p.exp_p)
    if not site.carries or inner is None or not _is_positive(site, 1):
        return None
    return lax.exp(inner.inputs[0] - lax.log(site.inputs[1]))


def _constant_along(site: Site, i: int, axes: tuple[int, ...]) -> bool:
    """Whether operand ``i`` is the same along axes, being broadcast along them."""
    wide = site.producer(i, p.broadcast_in_dim_p)
    if wide is None:
        return False
    small = jax_compat.shape_of(wide.eqn.invars[0])
    dims = wide.params["broadcast_dimensions"]
    varying = {d for d, n in zip(dims, small.shape, strict=True) if n > 1}
    return not varying.intersection(axes)


@rewriting("products", p.dot_general_p, documented=documented.of_divisions)
def divided_late(site: Site) -> Operand | None:
    """``(e / s) @ v`` as ``(e @ v) / s``."""
    if not site.carries:
        return None
    (left, right), (batch, batch_right) = site.params["dimension_numbers"]
    for i, along, of_batch in ((0, left, batch), (1, right, batch_right)):
        inner = site.producer(i, p.div_p)
        if inner is None or not _constant_along(inner, 1, tuple(along)):
            continue
        top, bottom = inner.inputs
        other = site.inputs[1 - i]
        out = site.bind(*((top, other) if i == 0 else (other, top)))
        for axis in along:
            bottom = lax.slice_in_dim(bottom, 0, 1, axis=axis)
        bottom = lax.squeeze(bottom, tuple(along))
        # The axes of the quotient in the output: batch first, then its free ones.
        free = [a for a in range(top.ndim) if a not in (*along, *of_batch)]
        kept = [a for a in range(top.ndim) if a not in along]
        others = other.ndim - len(of_batch) - len(along)
        start = len(of_batch) + (0 if i == 0 else others)
        place = {a: n for n, a in enumerate(of_batch)}
        place |= {a: start + n for n, a in enumerate(free)}
        order = sorted(range(len(kept)), key=lambda k: place[kept[k]])
        bottom = lax.transpose(bottom, order)
        dims = tuple(sorted(place[a] for a in kept))
        return out / lax.broadcast_in_dim(bottom, out.shape, dims)
    return None


@rewriting("products", p.div_p, documented=documented.of_divisions)
def divided_early(site: Site) -> Operand | None:
    """``(e @ v) / s`` as ``(e / s) @ v``, for an s of the rows of e."""
    inner = site.producer(0, p.dot_general_p)
    if not site.carries or inner is None or not inner.is_read_once():
        return None
    (left, _), (batch, _) = inner.params["dimension_numbers"]
    e, v = inner.inputs
    rows = [a for a in range(e.ndim) if a not in (*left, *batch)]
    columns = range(len(batch) + len(rows), len(site.shape))
    if not _constant_along(site, 1, tuple(columns)):
        return None
    s = site.inputs[1]
    for axis in reversed(columns):
        s = lax.index_in_dim(s, 0, axis, keepdims=False)
    dims = (*batch, *rows)  # the order of the output's axes, and of those of s
    order = sorted(range(len(dims)), key=lambda k: dims[k])
    s = lax.broadcast_in_dim(lax.transpose(s, order), e.shape, tuple(sorted(dims)))
    return inner.bind(e / s, v)


@rewriting("products", p.mul_p, p.div_p, documented=documented.of_inputs)
def literal_scale_moved_before_dot(site: Site) -> Operand | None:
    """``(a @ b) * c`` of a literal c as ``(a * c) @ b``."""
    inner = site.producer(0, p.dot_general_p)
    if not site.carries or inner is None or not inner.is_read_once():
        return None
    if site.literal(1) is None:
        return None
    a, b = inner.inputs
    scale = site.inputs[1]
    scaled = a * scale if site.primitive is p.mul_p else a / scale
    return inner.bind(scaled, b)


_SUMS = (p.reduce_sum_p, p.reduce_window_sum_p)


@rewriting("products", p.dot_general_p, documented=documented.of_inputs)
def literal_scale_moved_behind_dot(site: Site) -> Operand | None:
    """``(a * c) @ b`` of a literal c as ``(a @ b) * c``."""
    if not site.carries:
        return None
    for i in range(2):
        inner = site.producer(i, p.mul_p, p.div_p)
        if inner is None or inner.literal(1) is None or not inner.is_read_once():
            continue
        kept = inner.producer(0, p.broadcast_in_dim_p, p.reshape_p) or inner
        if kept.producer(0, *_SUMS) or inner.producer(0, *_SUMS):
            continue  # the scale makes a mean of the sum
        inputs = list(site.inputs)
        inputs[i] = inner.inputs[0]
        y, scale = site.bind(*inputs), inner.inputs[1]
        return y * scale if inner.primitive is p.mul_p else y / scale
    return None


@rewriting("products", p.reduce_sum_p)
def sum_of_products_as_dot(site: Site) -> Operand | None:
    """``(a * b).sum(axes)`` as a contraction."""
    inner = site.producer(0, p.mul_p)
    if not site.carries or inner is None or not inner.is_read_once():
        return None
    a, b = inner.inputs
    if np.shape(a) != np.shape(b) or not site.params["axes"]:
        return None
    axes = tuple(site.params["axes"])
    rest = tuple(i for i in range(a.ndim) if i not in axes)
    return lax.dot_general(a, b, ((axes, axes), (rest, rest)))


@rewriting("products", p.reduce_sum_p)
def sum_of_squares_as_dot(site: Site) -> Operand | None:
    """``square(a).sum(axes)`` as a contraction of a with itself."""
    inner = site.producer(0, p.square_p, p.integer_pow_p)
    if not site.carries or inner is None or inner.params.get("y", 2) != 2:
        return None
    if not site.params["axes"]:
        return None
    a, axes = inner.inputs[0], tuple(site.params["axes"])
    rest = tuple(i for i in range(a.ndim) if i not in axes)
    return lax.dot_general(a, a, ((axes, axes), (rest, rest)))


@rewriting("products", p.neg_p)
def negation_as_product(site: Site) -> Operand | None:
    """``-x`` as ``-1 * x``."""
    return site.inputs[0] * np.asarray(-1.0, site.dtype) if site.carries else None


@rewriting("products", p.neg_p)
def negation_as_subtraction(site: Site) -> Operand | None:
    """``-x`` as ``0 - x``."""
    x = site.inputs[0]
    return lax.full_like(x, 0.0) - x if site.carries else None
