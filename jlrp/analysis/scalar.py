"""Scalars known at trace time: literals, what is computed from them, and f(0).

Elementwise equations are evaluated on NumPy scalars. ``None`` means unknown; zero times
an unknown is zero, which proves f(0) = 0 for activations with parameters (PReLU).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from jax.extend.core import primitives as p

from jlrp.ir.homogeneity import is_inexact
from jlrp.ir.primitives import present
from jlrp.ir.program import Atom, Equation, Literal, Value

Scalar = np.ndarray | np.generic | float | bool | None

_UNARY: dict[Any, Callable[..., Any]] = {
    p.abs_p: np.abs,
    p.acosh_p: np.arccosh,
    p.bessel_i1e_p: lambda x: 0.0 if x == 0 else None,
    p.erf_inv_p: lambda x: 0.0 if x == 0 else None,
    p.cbrt_p: np.cbrt,
    p.ceil_p: np.ceil,
    p.copy_p: lambda x: x,
    p.cos_p: np.cos,
    p.cosh_p: np.cosh,
    p.erf_p: lambda x: math.erf(x),
    p.erfc_p: lambda x: math.erfc(x),
    p.exp2_p: np.exp2,
    p.exp_p: np.exp,
    p.expm1_p: np.expm1,
    p.floor_p: np.floor,
    p.is_finite_p: np.isfinite,
    p.log1p_p: np.log1p,
    p.log_p: np.log,
    p.logistic_p: lambda x: 1 / (1 + np.exp(-x)),
    p.neg_p: np.negative,
    p.not_p: np.logical_not,
    p.rsqrt_p: lambda x: 1 / np.sqrt(x),
    p.sign_p: np.sign,
    p.sin_p: np.sin,
    p.sinh_p: np.sinh,
    p.sqrt_p: np.sqrt,
    p.square_p: np.square,
    p.stop_gradient_p: lambda x: x,
    p.tan_p: np.tan,
    p.tanh_p: np.tanh,
    p.asin_p: np.arcsin,
    p.asinh_p: np.arcsinh,
    p.atan_p: np.arctan,
    p.atanh_p: np.arctanh,
}
for _name, _function in {  # newer than the oldest JAX supported
    "log2_p": np.log2,
    "one_minus_square_p": lambda x: 1 - x * x,
}.items():
    if hasattr(p, _name):
        _UNARY[getattr(p, _name)] = _function
_BINARY: dict[Any, Callable[..., Any]] = {
    p.add_p: np.add,
    p.add_jaxvals_p: np.add,
    p.and_p: np.logical_and,
    p.atan2_p: np.arctan2,
    p.div_p: np.divide,
    p.eq_p: np.equal,
    p.ge_p: np.greater_equal,
    p.gt_p: np.greater,
    p.le_p: np.less_equal,
    p.lt_p: np.less,
    p.max_p: np.maximum,
    p.min_p: np.minimum,
    p.mul_p: np.multiply,
    p.ne_p: np.not_equal,
    p.or_p: np.logical_or,
    p.pow_p: np.power,
    p.rem_p: np.fmod,
    p.sub_p: np.subtract,
}
_POLYNOMIAL = present("polynomial")
_SHAPE_ONLY = {p.broadcast_in_dim_p, p.reshape_p, p.squeeze_p, p.transpose_p}


def evaluate_scalar(equation: Equation, x: list[Scalar], rounds: bool = True) -> Scalar:
    """The value of an elementwise equation whose operands are the scalars ``x``.

    Casts to another floating dtype are left out if it does not ``rounds``.
    """
    prim = equation.primitive
    with np.errstate(all="ignore"):
        if prim is p.mul_p and None in x:
            known = [v for v in x if v is not None]
            return 0.0 if any(v == 0 for v in known) else None
        if prim is p.div_p and x[0] is not None and x[1] is None:
            return 0.0 if x[0] == 0 else None
        if prim is p.select_n_p:
            if x[0] is not None:
                return x[1 + int(np.asarray(x[0]))]
            return x[1] if all(v is not None and v == x[1] for v in x[1:]) else None
        if prim in (p.igamma_p, p.regularized_incomplete_beta_p) and x[-1] is not None:
            return 0.0 if x[-1] == 0 else None
        if prim is p.igammac_p and x[-1] is not None:
            return 1.0 if x[-1] == 0 else None
        if prim in _POLYNOMIAL and x[0] is not None and x[0] == 0:
            return x[1]
        if any(v is None for v in x):
            return None
        if prim in _POLYNOMIAL:
            total, power = np.float64(0), np.float64(1)
            for coefficient in x[1:]:
                total, power = total + coefficient * power, power * x[0]  # type: ignore
            return total
        if prim in _SHAPE_ONLY:
            return x[0]
        if prim is p.convert_element_type_p:
            if not rounds and is_inexact(equation.outputs[0]):
                return x[0]
            return np.asarray(x[0]).astype(equation.params["new_dtype"])
        if prim is p.integer_pow_p:
            return np.float64(x[0]) ** equation.params["y"]
        if prim is p.clamp_p:
            low, value, high = x
            return np.minimum(np.maximum(value, low), high)  # type: ignore[arg-type]
        if (unary := _UNARY.get(prim)) is not None:
            return unary(x[0])
        if (binary := _BINARY.get(prim)) is not None:
            return binary(*x)
    return None


def is_elementwise(value: Value) -> bool:
    """Whether a value was made element by element, comparisons included."""
    equation = value.producer
    return (
        equation is not None
        and _known_to(equation)
        and equation.primitive not in _SHAPE_ONLY
        and all(a.shape in ((), value.shape) for a in equation.inputs)
    )


def scalar_of(atom: Atom, memo: dict[Value, Scalar] | None = None) -> Scalar:
    """The one number that an atom consists of, if it is known at trace time.

    ``memo`` remembers what was found, for walks over a whole program.
    """
    if isinstance(atom, Literal):
        return atom.number if atom.number.ndim == 0 else None
    return _known(atom, {} if memo is None else memo)


def at_zero(end: Value, start: Value) -> Scalar:
    """``f(0)`` of the elementwise function from ``start`` to ``end``, if provable."""
    return _known(end, {start: 0.0})


def slope_at_infinity(end: Value, start: Value) -> float:
    """The slope of an elementwise function far from 0, its own gain; else 1.

    At infinity, else at minus infinity: where f(L) / L and f(2 L) / 2 L agree and are
    not 0, so that bounded functions have none, nor have powers.
    """
    for far in (_FAR, -_FAR):
        once, twice = (
            _known(end, {start: np.float64(n * far)}, rounds=False) for n in (1, 2)
        )
        if once is None or twice is None:
            continue
        a, b = float(once) / far, float(twice) / (2 * far)
        if np.isfinite([a, b]).all() and a and abs(a - b) <= 1e-5 * abs(a):
            return (float(twice) - float(once)) / far
    return 1.0


_FAR = 1e6


def _known(value: Value, memo: dict[Value, Scalar], rounds: bool = True) -> Scalar:
    stack = [value]
    while stack:
        v = stack[-1]
        if v in memo:
            stack.pop()
            continue
        equation = v.producer
        if equation is None or len(equation.outputs) > 1 or not _known_to(equation):
            memo[stack.pop()] = None
            continue
        operands = [a for a in equation.inputs if isinstance(a, Value)]
        missing = [a for a in operands if a not in memo]
        if missing:
            stack.extend(missing)
            continue
        x = [
            scalar_of(a) if isinstance(a, Literal) else memo[a] for a in equation.inputs
        ]
        memo[stack.pop()] = evaluate_scalar(equation, x, rounds)
    return memo[value]


def _known_to(equation: Equation) -> bool:
    prim = equation.primitive
    return (
        prim in _UNARY
        or prim in _BINARY
        or prim in _SHAPE_ONLY
        or prim in (p.select_n_p, p.convert_element_type_p, p.integer_pow_p, p.clamp_p)
        or prim in (p.igamma_p, p.igammac_p, p.regularized_incomplete_beta_p)
        or prim in _POLYNOMIAL
    )
