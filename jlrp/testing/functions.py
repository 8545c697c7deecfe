"""Rewritings of elementwise functions, selections and masks."""

from __future__ import annotations

import functools
import math

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import primitives as p

from jlrp.ir.jax_compat import Operand
from jlrp.testing import documented
from jlrp.testing.movement import index
from jlrp.testing.rewriting import Site, rewriting
from jlrp.typing import Array


def _x(site: Site) -> Operand:
    return site.inputs[0]


@rewriting("functions", p.logistic_p)
def logistic_spelt_out(site: Site) -> Operand | None:
    """``logistic(x)`` as ``1 / (1 + exp(-x))``."""
    return 1 / (1 + lax.exp(-_x(site))) if site.carries else None


@rewriting("functions", p.logistic_p)
def logistic_of_exponentials(site: Site) -> Operand | None:
    """``logistic(x)`` as ``exp(x) / (exp(x) + 1)``."""
    if not site.carries:
        return None
    e = lax.exp(_x(site))
    return e / (e + 1)


@rewriting("functions", p.logistic_p)
def logistic_by_tanh(site: Site) -> Operand | None:
    """``logistic(x)`` as ``(tanh(x / 2) + 1) / 2``."""
    return (lax.tanh(_x(site) / 2) + 1) / 2 if site.carries else None


@rewriting("functions", p.logistic_p)
def logistic_as_power(site: Site) -> Operand | None:
    """``logistic(x)`` as ``(1 + exp(-x)) ** -1``."""
    return lax.integer_pow(1 + lax.exp(-_x(site)), -1) if site.carries else None


@rewriting("functions", p.logistic_p)
def logistic_of_the_negative(site: Site) -> Operand | None:
    """``logistic(x)`` as ``1 - logistic(-x)``."""
    return 1 - lax.logistic(-_x(site)) if site.carries else None


@rewriting("functions", p.tanh_p)
def tanh_by_logistic(site: Site) -> Operand | None:
    """``tanh(x)`` as ``2 * logistic(2 * x) - 1``."""
    return 2 * lax.logistic(2 * _x(site)) - 1 if site.carries else None


@rewriting("functions", p.tanh_p)
def tanh_of_exponentials(site: Site) -> Operand | None:
    """``tanh(x)`` as ``(e - 1) / (e + 1)``, ``e = exp(2 * x)``."""
    if not site.carries:
        return None
    e = lax.exp(2 * _x(site))
    return (e - 1) / (e + 1)


@rewriting("functions", p.tanh_p)
def tanh_as_quotient(site: Site) -> Operand | None:
    """``tanh(x)`` as ``sinh(x) / cosh(x)``."""
    if not site.carries:
        return None
    return lax.sinh(_x(site)) / lax.cosh(_x(site))


@rewriting("functions", p.tanh_p, p.erf_p, p.sin_p, documented=documented.of_signs)
def odd_function_of_the_negative(site: Site) -> Operand | None:
    """An odd function f(x) as ``-f(-x)``."""
    return -site.bind(-_x(site)) if site.carries else None


@rewriting("functions", p.abs_p, p.cos_p, p.cosh_p, p.square_p)
def even_function_of_the_negative(site: Site) -> Operand | None:
    """An even function f(x) as ``f(-x)``."""
    return site.bind(-_x(site)) if site.carries else None


@rewriting("functions", p.exp_p)
def exp_as_exp2(site: Site) -> Operand | None:
    """``exp(x)`` as ``exp2(x * log2(e))``."""
    return lax.exp2(_x(site) * math.log2(math.e)) if site.carries else None


@rewriting("functions", p.exp_p)
def exp_as_power(site: Site) -> Operand | None:
    """``exp(x)`` as a power of e."""
    if not site.carries:
        return None
    return lax.pow(lax.full_like(_x(site), math.e), _x(site))


@rewriting("functions", p.exp_p)
def exp_as_expm1(site: Site) -> Operand | None:
    """``exp(x)`` as ``expm1(x) + 1``."""
    return lax.expm1(_x(site)) + 1 if site.carries else None


@rewriting("functions", p.exp2_p)
def exp2_as_exp(site: Site) -> Operand | None:
    """``exp2(x)`` as ``exp(x * log(2))``."""
    return lax.exp(_x(site) * math.log(2)) if site.carries else None


@rewriting("functions", p.expm1_p)
def expm1_as_exp(site: Site) -> Operand | None:
    """``expm1(x)`` as ``exp(x) - 1``."""
    return lax.exp(_x(site)) - 1 if site.carries else None


@rewriting("functions", p.log1p_p)
def log1p_as_log(site: Site) -> Operand | None:
    """``log1p(x)`` as ``log(1 + x)``."""
    return lax.log(1 + _x(site)) if site.carries else None


@rewriting("functions", p.log_p)
def log_as_log1p(site: Site) -> Operand | None:
    """``log(x)`` as ``log1p(x - 1)``."""
    return lax.log1p(_x(site) - 1) if site.carries else None


@rewriting("functions", p.erf_p)
def erf_as_erfc(site: Site) -> Operand | None:
    """``erf(x)`` as ``1 - erfc(x)``."""
    return 1 - lax.erfc(_x(site)) if site.carries else None


@rewriting("functions", p.erfc_p)
def erfc_as_erf(site: Site) -> Operand | None:
    """``erfc(x)`` as ``1 - erf(x)``."""
    return 1 - lax.erf(_x(site)) if site.carries else None


@rewriting("functions", p.abs_p)
def abs_as_max(site: Site) -> Operand | None:
    """``abs(x)`` as ``max(x, -x)``."""
    return lax.max(_x(site), -_x(site)) if site.carries else None


@rewriting("functions", p.abs_p)
def abs_by_sign(site: Site) -> Operand | None:
    """``abs(x)`` as ``x * sign(x)``."""
    return _x(site) * lax.sign(_x(site)) if site.carries else None


@rewriting("functions", p.abs_p)
def abs_as_selection(site: Site) -> Operand | None:
    """``abs(x)`` as a selection of x and -x."""
    x = _x(site)
    return lax.select(x >= 0, x, -x) if site.carries else None


@rewriting("functions", p.abs_p)
def abs_as_root_of_square(site: Site) -> Operand | None:
    """``abs(x)`` as ``sqrt(x * x)``."""
    return lax.sqrt(_x(site) * _x(site)) if site.carries else None


def _rectified(site: Site) -> Operand | None:
    """The operand of a max with 0, or None."""
    for i in range(2):
        if site.carries and site.literal(i) == 0.0:
            return site.inputs[1 - i]
    return None


@rewriting("functions", p.max_p)
def relu_as_selection(site: Site) -> Operand | None:
    """``max(x, 0)`` as a selection of x and 0."""
    x = _rectified(site)
    return None if x is None else lax.select(x > 0, x, lax.full_like(x, 0.0))


@rewriting("functions", p.max_p)
def relu_times_step(site: Site) -> Operand | None:
    """``max(x, 0)`` as x times a step."""
    x = _rectified(site)
    return None if x is None else x * lax.convert_element_type(x > 0, x.dtype)


@rewriting("functions", p.max_p)
def relu_by_abs(site: Site) -> Operand | None:
    """``max(x, 0)`` as ``(x + abs(x)) / 2``."""
    x = _rectified(site)
    return None if x is None else (x + lax.abs(x)) * 0.5


@rewriting("functions", p.max_p)
def relu_as_clamp(site: Site) -> Operand | None:
    """``max(x, 0)`` as ``clamp(0, x, inf)``."""
    x = _rectified(site)
    if x is None:
        return None
    return lax.clamp(np.zeros((), x.dtype), x, np.asarray(np.inf, x.dtype))


@rewriting("functions", p.max_p, p.min_p)
def extremum_of_the_negative(site: Site) -> Operand | None:
    """``max(a, b)`` as ``-min(-a, -b)``, and the other way round."""
    if not site.carries:
        return None
    a, b = site.inputs
    other = lax.min if site.primitive is p.max_p else lax.max
    return -other(-a, -b)


def _wide(site: Site, x: Operand) -> Array:
    """An operand in the shape of the output."""
    return lax.broadcast_in_dim(x, site.shape, tuple(range(np.ndim(x))))


@rewriting("functions", p.max_p, p.min_p)
def extremum_as_selection(site: Site) -> Operand | None:
    """``max(a, b)`` as a selection by comparison."""
    if not site.carries:
        return None
    a, b = (
        x if np.shape(x) else lax.full(site.shape, x, site.dtype) for x in site.inputs
    )
    return lax.select(a > b if site.primitive is p.max_p else a < b, a, b)


@rewriting("functions", p.max_p, documented=documented.of_max)
def maximum_as_arithmetic(site: Site) -> Operand | None:
    """``max(a, b)`` of two active values as ``(a + b + abs(a - b)) / 2``."""
    if not site.is_active(0) or not site.is_active(1) or not site.is_float:
        return None
    a, b = site.inputs
    return (a + b + lax.abs(a - b)) * 0.5


@rewriting("functions", p.clamp_p)
def clamp_as_min_and_max(site: Site) -> Operand | None:
    """``clamp(low, x, high)`` as ``min(max(x, low), high)``."""
    low, x, high = site.inputs
    return lax.min(lax.max(x, low), high) if site.carries else None


@rewriting("functions", p.reduce_max_p)
def max_over_axis_pairwise(site: Site) -> Operand | None:
    """A maximum over a short axis as a chain of maxima."""
    if not site.carries:
        return None
    y, axes = _x(site), site.params["axes"]
    if any(not 1 <= y.shape[a] <= 8 for a in axes):
        return None
    for axis in sorted(axes, reverse=True):
        terms = [
            lax.index_in_dim(y, i, axis, keepdims=False) for i in range(y.shape[axis])
        ]
        y = functools.reduce(lax.max, terms)
    return y


@rewriting("functions", p.reduce_max_p)
def max_as_last_of_sorted(site: Site) -> Operand | None:
    """A maximum over an axis as the last of the sorted values."""
    if not site.carries or len(site.params["axes"]) != 1:
        return None
    (axis,) = site.params["axes"]
    y = lax.sort(jnp.asarray(_x(site)), dimension=axis)
    return lax.index_in_dim(y, y.shape[axis] - 1, axis, keepdims=False)


@rewriting("functions", p.reduce_max_p)
def max_by_windows(site: Site) -> Operand | None:
    """A maximum over axes as one over a window that covers them."""
    if not site.carries:
        return None
    y, axes = _x(site), site.params["axes"]
    window = tuple(n if a in axes else 1 for a, n in enumerate(y.shape))
    low = np.asarray(-np.inf, y.dtype)
    y = lax.reduce_window(y, low, lax.max, window, (1,) * y.ndim, "VALID")
    return lax.squeeze(y, axes)


@rewriting("functions", p.select_n_p)
def selection_with_negated_mask(site: Site) -> Operand | None:
    """A selection with its mask negated and its cases swapped."""
    if not site.carries or len(site.inputs) != 3 or site.inputs[0].dtype != bool:
        return None
    mask, *cases = site.inputs
    return site.bind(lax.bitwise_not(mask), *cases[::-1])


@rewriting("functions", p.select_n_p)
def selection_by_arithmetic(site: Site) -> Operand | None:
    """A selection of x or 0 as a product with the mask."""
    if not site.carries or len(site.inputs) != 3 or site.inputs[0].dtype != bool:
        return None
    mask, *cases = site.inputs
    for i in range(2):
        if _is_filled(site, 1 + i, 0.0) and np.shape(mask) == site.shape:
            kept = lax.bitwise_not(mask) if i else mask
            return cases[1 - i] * lax.convert_element_type(kept, site.dtype)
    return None


def _is_filled(site: Site, i: int, number: float) -> bool:
    wide = site.producer(i, p.broadcast_in_dim_p)
    found = site.literal(i) if wide is None else wide.literal(0)
    return found == number


@rewriting("functions", p.select_n_p)
def mask_added(site: Site) -> Operand | None:
    """Scores masked with -inf by a selection, as scores plus 0 or -inf."""
    if not site.carries or len(site.inputs) != 3 or site.inputs[0].dtype != bool:
        return None
    mask, *cases = site.inputs
    for i in range(2):
        if _is_filled(site, 1 + i, -np.inf) and np.shape(mask) == site.shape:
            gone = mask if i else lax.bitwise_not(mask)
            low = lax.full(site.shape, -np.inf, site.dtype)
            return cases[1 - i] + lax.select(gone, low, lax.full_like(low, 0.0))
    return None


@rewriting("functions", p.gather_p)
def rows_by_one_hot(site: Site) -> Operand | None:
    """Rows fetched from a table of parameters as a one-hot code times the table."""
    numbers = site.params["dimension_numbers"]
    if not site.is_float or site.is_active(0) or len(site.inputs) != 2:
        return None
    table, at = site.inputs
    if table.ndim != 2 or numbers.collapsed_slice_dims != (0,):
        return None
    if site.params["slice_sizes"] != (1, table.shape[1]) or at.shape[-1] != 1:
        return None
    if numbers.offset_dims != (at.ndim - 1,) or numbers.start_index_map != (0,):
        return None
    shape = (*at.shape[:-1], table.shape[0])
    codes = lax.broadcast_in_dim(at, shape, tuple(range(at.ndim)))
    columns = lax.convert_element_type(index(shape, at.ndim - 1), at.dtype)
    hot = lax.convert_element_type(codes == columns, table.dtype)
    return lax.dot_general(hot, table, (((hot.ndim - 1,), (0,)), ((), ())))
