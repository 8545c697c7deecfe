"""How far a point is from where a program is not smooth.

At a kink (a ReLU at 0, a tie of a maximum) spellings of one function choose different
sides, and near a zero denominator rounding decides: no spelling is right there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import jax
import numpy as np
from jax.extend import core
from jax.extend.core import primitives as p

from jlrp.arguments import check_function, takes
from jlrp.errors import InputError
from jlrp.ir import jax_compat
from jlrp.ir.jax_compat import Jaxpr, JaxprEqn, Operand
from jlrp.testing.evaluating import evaluate
from jlrp.typing import Function, PyTree

Distance: TypeAlias = Callable[..., np.ndarray | float]
"""Of an equation's operands and parameters: how far each element is from a kink."""


@dataclass(frozen=True)
class Kink:
    """An equation, and how far its operands are from where it is not smooth.

    Attributes:
      primitive: its name.
      where: its name scope and source line.
      distance: the least over all elements, in the units of the operand.
    """

    primitive: str
    where: str
    distance: float

    def __str__(self) -> str:
        return f"{self.primitive} at {self.where}: {self.distance:.2g} away"


def _between(a: np.ndarray, b: np.ndarray, **_: object) -> np.ndarray:
    return np.abs(a - b)


def _from_zero(x: np.ndarray, **_: object) -> np.ndarray:
    return np.abs(x)


def _gap(x: np.ndarray, axes: Sequence[int], **_: object) -> np.ndarray | float:
    """Between the largest and the second along axes."""
    rest = [a for a in range(x.ndim) if a not in axes]
    rows = np.transpose(x, [*rest, *axes]).reshape(*(x.shape[a] for a in rest), -1)
    if rows.shape[-1] < 2:
        return np.inf
    ordered = np.sort(rows, axis=-1)
    return np.abs(ordered[..., -1] - ordered[..., -2])


def _gaps(
    x: np.ndarray, *_: np.ndarray, dimension: int = -1, **__: object
) -> np.ndarray:
    """Between neighbours in the order along an axis."""
    return np.diff(np.sort(x, axis=dimension), axis=dimension)


def _gap_in_windows(
    x: np.ndarray,
    window_dimensions: Sequence[int],
    window_strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
    **_: object,
) -> np.ndarray | float:
    padded = np.pad(x, padding, constant_values=-np.inf)
    views = np.lib.stride_tricks.sliding_window_view(padded, window_dimensions)
    views = views[tuple(slice(None, None, s) for s in window_strides)]
    return _gap(views, tuple(range(x.ndim, 2 * x.ndim)))


def _to_integer(x: np.ndarray, offset: float = 0.0) -> np.ndarray:
    return np.abs(x + offset - np.round(x + offset))


def _cast(x: np.ndarray, new_dtype: np.dtype, **_: object) -> np.ndarray | float:
    return _to_integer(x) if np.issubdtype(new_dtype, np.integer) else np.inf


_DISTANCES: dict[core.Primitive, Distance] = {
    **dict.fromkeys((p.max_p, p.min_p), _between),
    **dict.fromkeys((p.eq_p, p.ne_p, p.lt_p, p.le_p, p.gt_p, p.ge_p), _between),
    **dict.fromkeys((p.abs_p, p.sign_p, p.log_p, p.sqrt_p, p.rsqrt_p), _from_zero),
    **dict.fromkeys((p.cbrt_p,), _from_zero),
    p.log1p_p: lambda x, **_: np.abs(1 + x),
    p.pow_p: lambda x, y: np.abs(x),
    p.integer_pow_p: lambda x, y: np.abs(x) if y < 0 else np.inf,
    p.div_p: lambda a, b: np.abs(b),
    p.clamp_p: lambda low, x, high: np.minimum(np.abs(x - low), np.abs(high - x)),
    p.reduce_max_p: _gap,
    p.reduce_min_p: lambda x, axes, **_: _gap(-x, axes),
    p.argmax_p: _gap,
    p.argmin_p: lambda x, axes, **_: _gap(-x, axes),
    p.reduce_window_max_p: _gap_in_windows,
    p.sort_p: _gaps,
    p.top_k_p: lambda x, **_: _gaps(x),
    p.floor_p: _to_integer,
    p.ceil_p: _to_integer,
    p.round_p: lambda x, **_: _to_integer(x, 0.5),
    p.convert_element_type_p: _cast,
}


@takes()
def kinks(fn: Function, params: PyTree, x: PyTree, margin: float = 1e-3) -> list[Kink]:
    """What of ``fn`` is within a margin of a kink or a zero denominator at ``x``.

    Looked at are maxima, magnitudes, comparisons, roundings, selections by size,
    quotients, roots, logarithms and negative powers, in calls, loops and branches too;
    not what is only behind a ``stop_gradient``, such as the maximum that a softmax
    subtracts.

    Args:
      fn: ``fn(params, x) -> scores``: any JAX function.
      params: pytree of arrays.
      x: pytree of arrays.
      margin: what is nearer than this is listed, the nearest first.

    Returns:
      A list of ``Kink``; empty if the point is away from all.

    Raises:
      JlrpError: if ``fn`` is no function, or raises.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jlrp import testing
      >>> at = jnp.array([1.0, 1e-5])
      >>> [kink.primitive for kink in testing.kinks(lambda p, x: abs(x), None, at)]
      ['abs']
    """
    check_function(fn)
    closed = jax.make_jaxpr(fn)(params, x)
    jaxpr, consts = jax_compat.open_jaxpr(closed)
    live = _live(jaxpr, [True] * len(jaxpr.outvars))
    found: dict[tuple[str, str], float] = {}

    def visit(eqn: JaxprEqn, inputs: list[Operand], place: str) -> None:
        distance = _DISTANCES.get(eqn.primitive)
        if distance is None or id(eqn) not in live or _is_itself(eqn):
            return
        if not any(jax_compat.is_inexact(a.aval) for a in eqn.invars):
            return
        operands = [np.asarray(x) for x in inputs]
        away = np.min(distance(*operands, **eqn.params), initial=np.inf)
        if away < margin:
            key = eqn.primitive.name, place
            found[key] = min(float(away), found.get(key, np.inf))

    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves((params, x))]
    with np.errstate(all="ignore"):
        evaluate(jaxpr, consts, leaves, visit)
    near = [Kink(*key, away) for key, away in found.items()]
    return sorted(near, key=lambda kink: kink.distance)


def _is_itself(eqn: JaxprEqn) -> bool:
    """Whether a value is compared with itself, which asks if it is NaN."""
    first, *others = eqn.invars
    return not jax_compat.is_literal(first) and any(a is first for a in others)


def _live(jaxpr: Jaxpr, outputs: list[bool]) -> set[int]:
    """The equations that an output depends on but through ``stop_gradient``."""
    needed = {
        a
        for a, is_live in zip(jaxpr.outvars, outputs, strict=True)
        if is_live and not jax_compat.is_literal(a)
    }
    found: set[int] = set()
    for eqn in reversed(jaxpr.eqns):
        lives = [v in needed for v in eqn.outvars]
        if not any(lives) or eqn.primitive.name == "stop_gradient":
            continue
        found.add(id(eqn))
        needed.update(a for a in eqn.invars if not jax_compat.is_literal(a))
        call = jax_compat.call_body(eqn)
        for body, _ in [call] if call else jax_compat.bodies(eqn):
            is_call = call is not None
            inner = lives if is_call else [True] * len(body.outvars)
            found |= _live(body, inner)
    return found


def check_point(fn: Function, params: PyTree, x: PyTree, margin: float) -> None:
    """Refuse a point that is near a kink.

    Raises:
      InputError: naming what is near, and how near.
    """
    near = kinks(fn, params, x, margin)
    if near:
        others = f", and {len(near) - 3} more" if len(near) > 3 else ""
        raise InputError(
            f"x is within {margin:g} of where fn is not smooth, so that spellings may "
            f"choose different sides: {'; '.join(map(str, near[:3]))}{others}. Give "
            "another point (x plus a little noise), or a smaller margin=."
        )
