"""Primitives whose derivative JAX lacks, spelled in others that have one.

A spelling is a function of all operands that returns all outputs. Decompositions into a
condensed form ``T = Q* A Q`` hold the unitary Q constant: T is then linear in A.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import primitives as p

from jlrp.ir import jax_compat
from jlrp.ir.homogeneity import body_of
from jlrp.ir.primitives import traits
from jlrp.ir.program import Equation
from jlrp.promise import safe_divide

Array = jax.Array
Evaluation = Callable[..., list[Array]]


def decomposition_of(equation: Equation) -> Evaluation | None:
    """A differentiable spelling of an equation, if it needs one."""
    spell = _SPELLINGS.get(equation.primitive)
    return spell and spell(equation)


def with_derivative(equation: Equation) -> Evaluation | None:
    """The same for the forward pass, which the derivative of relevance goes through.

    Only where the numbers are computed as they were.
    """
    return decomposition_of(equation) if equation.primitive in _WRAPPED else None


def bound(equation: Equation) -> Evaluation:
    """The equation itself, as a function of its operands."""
    if traits(equation).has_derivative:
        return _as_traced(equation)
    params = jax_compat.widened(equation.params)
    return lambda *x: jax_compat.bind(equation.primitive, params, x)


def _as_traced(equation: Equation) -> Evaluation:
    """A call whose body has fixed dtypes: low precision inside, widened outside."""

    def function(*x: Array) -> list[Array]:
        operands = zip(x, equation.inputs, strict=True)
        args = [jnp.asarray(v, atom.dtype) for v, atom in operands]
        outs = jax_compat.bind(equation.primitive, equation.params, args)
        return [jax_compat.at_least_float32(out) for out in outs]

    return function


def n_factors(equation: Equation, active: Sequence[int], x: Sequence[Array]) -> Array:
    """How many active operands are multiplied in each element of the output."""
    if equation.primitive is p.scatter_mul_p:
        ones = [jnp.ones_like(v) if i in active else None for i, v in enumerate(x)]
        start = jnp.zeros_like(x[0]) if ones[0] is None else ones[0]
        return (
            start if ones[2] is None else _scatter_add(equation, start, x[1], ones[2])
        )
    count = [jnp.full_like(v, i in active) for i, v in enumerate(x)]
    n = len(x) // 2
    start, inits = [jnp.zeros_like(v) for v in x[n:]], count[n:]
    fold = _reduce if equation.primitive is p.reduce_p else _reduce_window
    (total,) = fold(equation, lambda a, b: [a[0] + b[0]])(*count[:n], *start)
    return total + inits[0]


# Unitary matrices from their reflectors.


def _householder_product(equation: Equation) -> Evaluation:
    def function(a: Array, taus: Array) -> list[Array]:
        k = taus.shape[-1]
        column, row = np.arange(k), np.arange(a.shape[-2])[:, None]
        v = jnp.where(row > column, a[..., :k], (row == column).astype(a.dtype))
        return [_reflected(v, taus)[..., : a.shape[-1]]]

    return function


def _reflected(v: Array, taus: Array, reverse: bool = False) -> Array:
    """``H_1 ... H_k`` with ``H_i = 1 - tau_i v_i v_i*``, v_i the columns of v."""
    size = v.shape[-2]

    def one(v: Array, taus: Array) -> Array:
        def step(q: Array, reflector: tuple[Array, Array]) -> tuple[Array, None]:
            w, tau = reflector
            return q - tau * jnp.outer(w, jnp.conj(w) @ q), None

        start = jnp.eye(size, dtype=v.dtype)
        return lax.scan(step, start, (v.T, taus), reverse=not reverse)[0]

    return jnp.vectorize(one, signature="(m,k),(k)->(m,m)")(v, taus)


def _condensed(q: Array, a: Array) -> Array:
    q = lax.stop_gradient(q)
    return jnp.conj(jnp.swapaxes(q, -1, -2)) @ a @ q


def _schur(equation: Equation) -> Evaluation:
    def function(a: Array) -> list[Array]:
        params = {**equation.params, "compute_schur_vectors": True}
        found = jax_compat.bind(equation.primitive, params, [lax.stop_gradient(a)])
        _, q, *others = found
        outs = [_condensed(q, a), q, *others]
        return outs[: len(equation.outputs)]

    return function


def _eig(equation: Equation) -> Evaluation:
    """Eigenvalues by themselves: vectors that carry no relevance may be constants."""
    none = {"compute_left_eigenvectors": False, "compute_right_eigenvectors": False}

    def function(a: Array) -> list[Array]:
        if equation.params.get("enable_eigvec_derivs", False):
            return bound(equation)(a)
        (w,) = jax_compat.bind(equation.primitive, {**equation.params, **none}, [a])
        return [w, *bound(equation)(lax.stop_gradient(a))[1:]]

    return function


def _hessenberg(equation: Equation) -> Evaluation:
    def function(a: Array) -> list[Array]:
        packed, taus = bound(equation)(lax.stop_gradient(a))
        n = a.shape[-1]
        row, column = np.arange(n)[:, None], np.arange(n)
        h = _condensed(_below_diagonal(packed, taus), a)
        return [jnp.where(row <= column + 1, h, packed), taus]

    return function


def _below_diagonal(packed: Array, taus: Array) -> Array:
    """The product of reflectors stored below the first subdiagonal."""
    n = packed.shape[-1]
    row, column = np.arange(n)[:, None], np.arange(n - 1)
    one = (row == column + 1).astype(packed.dtype)
    return _reflected(jnp.where(row > column + 1, packed[..., : n - 1], one), taus)


def _tridiagonal(equation: Equation) -> Evaluation:
    lower = equation.params["lower"]

    def function(a: Array) -> list[Array]:
        packed, d, e, taus = bound(equation)(lax.stop_gradient(a))
        n = a.shape[-1]
        row, column = np.arange(n)[:, None], np.arange(n)
        if lower:
            q = _below_diagonal(packed, taus)
            used, kept = row >= column, (row == column) | (row == column + 1)
        else:
            j = np.arange(n - 1)
            one = (row == j).astype(a.dtype)
            v = jnp.where(row < j, packed[..., 1:], one)
            q = _reflected(v, taus, reverse=True)
            used, kept = row <= column, (row == column) | (row == column - 1)
        triangle = jnp.where(used, a, 0)
        strict = jnp.where(row == column, 0, triangle)
        whole = triangle + jnp.conj(jnp.swapaxes(strict, -1, -2))
        t = _condensed(q, whole)
        i = np.arange(n)
        off = t[..., i[1:], i[:-1]] if lower else t[..., i[:-1], i[1:]]
        diagonals = [t[..., i, i], off]
        d, e = (
            x.real if jnp.isrealobj(y) else x
            for x, y in zip(diagonals, (d, e), strict=True)
        )
        return [jnp.where(kept, t, packed), d, e, taus]

    return function


# Functions.


def _zeta(equation: Equation) -> Evaluation:
    @jax.custom_jvp
    def zeta(x: Array, q: Array) -> Array:
        return bound(equation)(x, q)[0]

    @zeta.defjvp
    def _(primals: Any, tangents: Any) -> Any:
        (x, q), (_, t) = primals, tangents
        return zeta(x, q), -x * zeta(x + 1, q) * t

    return lambda x, q: [zeta(x, q)]


# Reductions with a body, and scatter.


def _scatter_add(equation: Equation, x: Array, indices: Array, updates: Array) -> Array:
    params = equation.params
    return lax.scatter_add(
        x,
        indices,
        updates,
        params["dimension_numbers"],
        indices_are_sorted=params["indices_are_sorted"],
        unique_indices=params["unique_indices"],
        mode=params["mode"],
    )


# What a custom_jvp reads is passed to it: a closure over tracers of an outer
# derivative could not be traced.


def _scatter_mul(equation: Equation) -> Evaluation:
    """Its derivative by updates whose indices repeat: the product over the update."""
    like = equation.inputs[0]

    @jax.custom_jvp
    def factor(indices: Array, updates: Array) -> Array:
        ones = jnp.ones(like.shape, updates.dtype)
        return bound(equation)(ones, indices, updates)[0]

    @factor.defjvp
    def _(primals: Any, tangents: Any) -> Any:
        (indices, updates), (_, t) = primals, tangents
        y = factor(indices, updates)
        ratios = _scatter_add(
            equation, jnp.zeros_like(y), indices, safe_divide(t, updates)
        )
        return y, y * ratios

    return lambda x, indices, updates: [x * factor(indices, updates)]


def _scatter_extreme(equation: Equation) -> Evaluation:
    """Its derivative where indices are clipped: the winner's, ties shared equally."""

    @jax.custom_jvp
    def extreme(x: Array, indices: Array, updates: Array) -> Array:
        return bound(equation)(x, indices, updates)[0]

    @extreme.defjvp
    def _(primals: Any, tangents: Any) -> Any:
        (x, indices, updates), (dx, _, du) = primals, tangents
        y, zeros = extreme(x, indices, updates), jnp.zeros_like(x)

        def add(start: Array, u: Array) -> Array:
            return _scatter_add(equation, start, indices, u)

        (reached,) = jax.linear_transpose(lambda u: add(zeros, u), updates)(y)
        of_x = (x == y).astype(x.dtype)
        of_updates = (updates == reached).astype(x.dtype)
        count = add(of_x, of_updates)
        return y, add(dx * of_x, du * of_updates) / count

    return lambda x, indices, updates: [extreme(x, indices, updates)]


Body = Callable[[list[Array], list[Array]], list[Array]]


def _body(equation: Equation) -> Body:
    """The body of a reduction, element by element."""
    jaxpr, consts = body_of(equation)

    def scalar(*x: Array) -> list[Array]:
        return jax_compat.evaluate(jaxpr, consts, x)

    def function(a: list[Array], b: list[Array]) -> list[Array]:
        shape = jnp.broadcast_shapes(a[0].shape, b[0].shape)
        flat = [jnp.broadcast_to(v, shape).reshape(-1) for v in (*a, *b)]
        return [v.reshape(shape) for v in jax.vmap(scalar)(*flat)]

    return function


def _folded(parts: list[list[Array]], body: Body) -> list[Array]:
    """Combine neighbours until one is left; XLA may associate as it likes, too."""
    while len(parts) > 1:
        pairs = [body(a, b) for a, b in zip(parts[::2], parts[1::2], strict=False)]
        parts = pairs + parts[len(pairs) * 2 :]
    return parts[0]


def _reduce(equation: Equation, body: Body) -> Evaluation:
    axes = equation.params["dimensions"]

    def function(*x: Array) -> list[Array]:
        n = len(x) // 2
        moved = [jnp.moveaxis(v, axes, range(len(axes))) for v in x[:n]]
        rest = moved[0].shape[len(axes) :]
        xs = [v.reshape(-1, *rest) for v in moved]
        while (size := xs[0].shape[0]) > 1:
            half = size // 2
            pairs = body([v[:half] for v in xs], [v[half : 2 * half] for v in xs])
            odd = [v[2 * half :] for v in xs]
            xs = [jnp.concatenate(v) for v in zip(pairs, odd, strict=True)]
        inits = [jnp.broadcast_to(v, rest) for v in x[n:]]
        return body(inits, [v[0] for v in xs]) if xs[0].shape[0] else inits

    return function


def _reduce_window(equation: Equation, body: Body) -> Evaluation:
    """Slices of the padded operand, one for each place in the window, folded."""
    params = equation.params
    window, strides = params["window_dimensions"], params["window_strides"]
    dilation, shape = params["window_dilation"], equation.outputs[0].shape
    pads = [
        (low, high, base - 1)
        for (low, high), base in zip(
            params["padding"], params["base_dilation"], strict=True
        )
    ]

    def function(*x: Array) -> list[Array]:
        n = len(x) // 2
        inits = [jnp.broadcast_to(v, shape) for v in x[n:]]
        if 0 in shape:
            return inits
        padded = [lax.pad(v, i, pads) for v, i in zip(x[:n], x[n:], strict=True)]
        parts = []
        for place in itertools.product(*map(range, window)):
            start = [i * d for i, d in zip(place, dilation, strict=True)]
            limit = [
                s + (size - 1) * stride + 1
                for s, size, stride in zip(start, shape, strides, strict=True)
            ]
            parts.append([lax.slice(v, start, limit, strides) for v in padded])
        return _folded([inits, *parts], body)

    return function


def _pooled(extreme: Callable[[Array, Array], Array], start: float) -> Any:
    """Max pooling with dilation, which JAX cannot differentiate."""

    def spell(equation: Equation) -> Evaluation | None:
        params = equation.params
        if {*params["window_dilation"], *params["base_dilation"]} == {1}:
            return None
        pool = _reduce_window(equation, lambda a, b: [extreme(a[0], b[0])])
        return lambda x: pool(x, jnp.asarray(start, x.dtype))

    return spell


# Of these the primitive itself is run, with a derivative around it.
_WRAPPED = (p.scatter_max_p, p.scatter_min_p, p.scatter_mul_p, p.zeta_p)
_SPELLINGS: dict[Any, Callable[[Equation], Evaluation | None]] = {
    p.eig_p: _eig,
    p.hessenberg_p: _hessenberg,
    p.householder_product_p: _householder_product,
    p.reduce_p: lambda equation: _reduce(equation, _body(equation)),
    p.reduce_window_p: lambda equation: _reduce_window(equation, _body(equation)),
    p.reduce_window_max_p: _pooled(lax.max, -np.inf),
    p.reduce_window_min_p: _pooled(lax.min, np.inf),
    p.scatter_max_p: _scatter_extreme,
    p.scatter_min_p: _scatter_extreme,
    p.scatter_mul_p: _scatter_mul,
    p.schur_p: _schur,
    p.tridiagonal_p: _tridiagonal,
    p.zeta_p: _zeta,
}
