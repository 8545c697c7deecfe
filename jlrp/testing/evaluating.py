"""Relevance at one point, without compiling: a check runs hundreds of small programs.

Compiling each takes far longer than its few operations do. So the traced relevance runs
equation by equation, in numpy where that computes the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import jax
import numpy as np
from jax import lax
from jax.extend import core
from jax.extend.core import primitives as p

from jlrp.ir import jax_compat
from jlrp.ir.jax_compat import Jaxpr, JaxprEqn, Operand
from jlrp.testing.rewriting import where
from jlrp.typing import Function, PyTree

InNumpy: TypeAlias = Callable[..., np.ndarray]
"""A primitive in NumPy, called with its operands, and its parameters as keywords."""


def _dot(
    a: np.ndarray,
    b: np.ndarray,
    dimension_numbers: lax.DotDimensionNumbers,
    **_: object,
) -> np.ndarray:
    (left, right), (batch_left, batch_right) = dimension_numbers
    letters = iter(range(a.ndim + b.ndim))
    names_a = [next(letters) for _ in range(a.ndim)]
    names_b = [next(letters) for _ in range(b.ndim)]
    for i, j in zip((*left, *batch_left), (*right, *batch_right), strict=True):
        names_b[j] = names_a[i]
    batch = [names_a[i] for i in batch_left]
    gone = {names_a[i] for i in left}
    out = [n for n in names_a if n not in gone and n not in batch]
    out += [n for n in names_b if n not in gone and n not in batch]
    return np.einsum(a, names_a, b, names_b, [*batch, *out])


def _broadcast(
    x: np.ndarray,
    *_: np.ndarray,
    shape: Sequence[int],
    broadcast_dimensions: Sequence[int],
    **__: object,
) -> np.ndarray:
    wide = [1] * len(shape)
    for axis, size in zip(broadcast_dimensions, np.shape(x), strict=True):
        wide[axis] = size
    return np.broadcast_to(np.reshape(x, wide), shape)


def _slice(
    x: np.ndarray,
    start_indices: Sequence[int],
    limit_indices: Sequence[int],
    strides: Sequence[int] | None,
) -> np.ndarray:
    steps = strides or (1,) * x.ndim
    ends = zip(start_indices, limit_indices, steps, strict=True)
    return x[tuple(slice(*end) for end in ends)]


def _pad(
    x: np.ndarray, value: np.ndarray, padding_config: Sequence[tuple[int, int, int]]
) -> np.ndarray:
    shape, at = [], []
    for size, (low, high, inside) in zip(x.shape, padding_config, strict=True):
        wide = size + max(size - 1, 0) * inside
        shape.append(wide + max(low, 0) + max(high, 0))
        at.append(slice(max(low, 0), max(low, 0) + wide, inside + 1))
    y = np.full(shape, value, x.dtype)
    y[tuple(at)] = x
    cut = [
        slice(max(-low, 0), n - max(-high, 0))
        for n, (low, high, _) in zip(shape, padding_config, strict=True)
    ]
    return y[tuple(cut)]


def _cumsum(x: np.ndarray, axis: int, reverse: bool) -> np.ndarray:
    if not reverse:
        return np.cumsum(x, axis, dtype=x.dtype)
    return np.flip(np.cumsum(np.flip(x, axis), axis, dtype=x.dtype), axis)


def _starts(
    x: np.ndarray, starts: Sequence[np.ndarray], sizes: Sequence[int]
) -> tuple[slice, ...]:
    ends = zip(x.shape, starts, sizes, strict=True)
    low = [(min(max(int(start), 0), size - n), n) for size, start, n in ends]
    return tuple(slice(start, start + n) for start, n in low)


def _updated(x: np.ndarray, update: np.ndarray, *starts: np.ndarray) -> np.ndarray:
    y = np.array(x)
    y[_starts(x, starts, update.shape)] = update
    return y


def _iota(
    dtype: np.dtype, shape: Sequence[int], dimension: int, **_: object
) -> np.ndarray:
    along = np.arange(shape[dimension], dtype=dtype)
    wide = [n if i == dimension else 1 for i, n in enumerate(shape)]
    return np.broadcast_to(along.reshape(wide), shape)


def _plain(function: InNumpy) -> InNumpy:
    return lambda *x, **_: function(*x)


_NUMPY: dict[core.Primitive, InNumpy] = {
    **{
        prim: _plain(function)
        for prim, function in {
            p.abs_p: np.abs,
            p.add_p: np.add,
            p.and_p: np.bitwise_and,
            p.div_p: np.divide,
            p.cos_p: np.cos,
            p.eq_p: np.equal,
            p.exp2_p: np.exp2,
            p.exp_p: np.exp,
            p.expm1_p: np.expm1,
            p.floor_p: np.floor,
            p.ge_p: np.greater_equal,
            p.gt_p: np.greater,
            p.le_p: np.less_equal,
            p.is_finite_p: np.isfinite,
            p.log1p_p: np.log1p,
            p.log_p: np.log,
            p.lt_p: np.less,
            p.max_p: np.maximum,
            p.min_p: np.minimum,
            p.mul_p: np.multiply,
            p.ne_p: np.not_equal,
            p.neg_p: np.negative,
            p.not_p: np.bitwise_not,
            p.or_p: np.bitwise_or,
            p.sign_p: np.sign,
            p.sin_p: np.sin,
            p.sqrt_p: np.sqrt,
            p.square_p: np.square,
            p.stop_gradient_p: lambda x: x,
            p.sub_p: np.subtract,
            p.tanh_p: np.tanh,
        }.items()
    },
    p.argmax_p: lambda x, axes, **_: np.argmax(x, axes[0]),
    p.broadcast_in_dim_p: _broadcast,
    p.clamp_p: lambda low, x, high: np.minimum(np.maximum(x, low), high),
    p.convert_element_type_p: lambda x, new_dtype, **_: x.astype(new_dtype),
    p.copy_p: lambda x: x,
    p.cumsum_p: _cumsum,
    p.dynamic_slice_p: lambda x, *starts, slice_sizes: x[
        _starts(x, starts, slice_sizes)
    ],
    p.dynamic_update_slice_p: _updated,
    p.iota_p: _iota,
    p.pad_p: _pad,
    p.rev_p: lambda x, dimensions: np.flip(x, dimensions),
    p.concatenate_p: lambda *x, dimension: np.concatenate(x, dimension),
    p.dot_general_p: _dot,
    p.integer_pow_p: lambda x, y: np.power(x, y, dtype=x.dtype),
    p.logistic_p: lambda x, **_: 1 / (1 + np.exp(-x)),
    p.reduce_max_p: lambda x, axes, **_: np.max(x, axis=axes),
    p.reduce_sum_p: lambda x, axes, **_: np.sum(x, axis=axes, dtype=x.dtype),
    p.reshape_p: lambda x, new_sizes, **_: np.reshape(x, new_sizes),
    p.rsqrt_p: lambda x, **_: 1 / np.sqrt(x),
    p.select_n_p: lambda which, *cases: (
        np.where(which, cases[1], cases[0])
        if which.dtype == bool and len(cases) == 2
        else np.choose(which, cases)
    ),
    p.slice_p: _slice,
    p.squeeze_p: lambda x, dimensions: np.squeeze(x, dimensions),
    p.transpose_p: lambda x, permutation: np.transpose(x, permutation),
}
_BY_NAME: dict[str, InNumpy] = {  # there are no public objects for these
    "add_any": np.add,
    "stack": lambda *x, axis: np.stack(x, axis),
}
Visit = Callable[[JaxprEqn, list[Operand], str], None]
Body = tuple[Jaxpr, Sequence[Operand]]


def evaluate(
    jaxpr: Jaxpr,
    consts: Sequence[Operand],
    args: Sequence[Operand],
    visit: Visit | None = None,
    place: str = "",
) -> list[Operand]:
    """The outputs of a jaxpr at some arrays.

    ``visit(eqn, operands, place)`` sees each equation, and where it is: its own name
    scope and source line, or those of the call around it.
    """

    def apply(eqn: JaxprEqn, inputs: list[Operand]) -> Sequence[Operand]:
        here = (where(eqn) or place) if visit else ""
        outs = _entered(eqn, inputs, visit, here)
        if outs is None:
            if visit is not None:
                visit(eqn, inputs, here)
            outs = _outputs(eqn, inputs)
        return outs

    return jax_compat.evaluate(jaxpr, consts, args, apply)


def _entered(
    eqn: JaxprEqn, inputs: list[Operand], visit: Visit | None, place: str
) -> list[Operand] | None:
    """The outputs of a call, loop or branch; None for other equations."""
    body = jax_compat.call_body(eqn)
    if body is not None:
        return evaluate(*body, inputs, visit, place)
    bodies = jax_compat.bodies(eqn)
    if eqn.primitive is p.cond_p:
        index = min(max(int(inputs[0]), 0), len(bodies) - 1)
        return evaluate(*bodies[index], inputs[1:], visit, place)
    if eqn.primitive is p.scan_p:
        return _scanned(eqn, bodies[0], inputs, visit, place)
    if eqn.primitive is p.while_p:
        first = eqn.params["cond_nconsts"]
        second = first + eqn.params["body_nconsts"]
        carries = inputs[second:]
        while evaluate(*bodies[0], [*inputs[:first], *carries])[0]:
            carries = evaluate(
                *bodies[1], [*inputs[first:second], *carries], visit, place
            )
        return carries
    return None


def _scanned(
    eqn: JaxprEqn,
    body: Body,
    inputs: list[Operand],
    visit: Visit | None,
    place: str,
) -> list[Operand]:
    jaxpr, consts = body
    fixed, carried = jax_compat.scan_counts(eqn.params)
    carries, steps = inputs[fixed : fixed + carried], eqn.params["length"]
    rows: list[list[np.ndarray]] = [[] for _ in eqn.outvars[carried:]]
    for n in range(steps)[::-1] if eqn.params["reverse"] else range(steps):
        xs = [np.asarray(x)[n] for x in inputs[fixed + carried :]]
        outs = evaluate(jaxpr, consts, [*inputs[:fixed], *carries, *xs], visit, place)
        carries = outs[:carried]
        for row, out in zip(rows, outs[carried:], strict=True):
            row.append(np.asarray(out))
    ordered = [row[::-1] if eqn.params["reverse"] else row for row in rows]
    avals = map(jax_compat.shape_of, eqn.outvars[carried:])
    stacked = [
        np.stack(row) if row else np.zeros(aval.shape, aval.dtype)
        for row, aval in zip(ordered, avals, strict=True)
    ]
    return [*carries, *stacked]


def _outputs(eqn: JaxprEqn, inputs: list[Operand]) -> Sequence[Operand]:
    if eqn.primitive.name == "optimization_barrier":
        return inputs
    function = _NUMPY.get(eqn.primitive) or _BY_NAME.get(eqn.primitive.name)
    dtypes = [jax_compat.shape_of(v).dtype for v in eqn.outvars]
    if function is None or len(dtypes) != 1 or dtypes[0] not in _DTYPES:
        return jax_compat.bind(eqn.primitive, eqn.params, inputs)
    out = function(*map(np.asarray, inputs), **eqn.params)
    return [np.asarray(out, dtypes[0])]


_DTYPES = frozenset(map(np.dtype, ("bool", "int32", "int64", "float32", "float64")))


def leaves_of(fn: Function, params: PyTree, x: PyTree) -> list[np.ndarray]:
    """The leaves of ``fn(params, x)``, in numpy."""
    jaxpr, consts = jax_compat.open_jaxpr(jax.make_jaxpr(fn)(params, x))
    leaves = jax.tree.leaves((params, x))
    with np.errstate(all="ignore"):
        found = evaluate(jaxpr, consts, [np.asarray(leaf) for leaf in leaves])
    return [np.asarray(leaf) for leaf in found]
