"""A function as the body of a loop: its convolutions in the layout that a loop needs.

XLA's compiler for CPUs brings convolutions into channels-last order only outside of
loops. In a loop others are left to plain nested loops: measured 7 times slower with
1 x 1 kernels and 45 times with 3 x 3. A convolution with groups runs no better in that
order, and is left as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
from jax import lax
from jax.extend.core import JaxprEqn
from jax.extend.core import primitives as p

from jlrp import tactics
from jlrp.ir import jax_compat
from jlrp.typing import Array, Function, PyTree

_CONVOLUTION = frozenset({p.conv_general_dilated_p.name})


def for_a_loop(fn: Function, params: PyTree, x: PyTree) -> Function:
    """``fn`` at these shapes, with the same values up to rounding.

    Args:
      fn: ``fn(params, x) -> scores``.
      params, x: arrays, or their shapes.

    Returns:
      ``fn`` itself where nothing is to be gained: on other devices than CPUs, without
      such a convolution, or with side effects, which are to happen as written.
    """
    if jax.default_backend() != "cpu" or not tactics.enabled():
        return fn
    traced, shapes = jax.make_jaxpr(fn, return_shape=True)(params, x)
    jaxpr, consts = jax_compat.open_jaxpr(traced)
    if jaxpr.effects or not jax_compat.holds(jaxpr, _CONVOLUTION):
        return fn
    structure = jax.tree.structure(shapes)

    def looped(params: PyTree, x: PyTree) -> PyTree:
        leaves = jax.tree.leaves((params, x))
        return structure.unflatten(jax_compat.evaluate(jaxpr, consts, leaves, _apply))

    return looped


def _apply(eqn: JaxprEqn, args: Sequence[Array]) -> list[Array]:
    if eqn.primitive is p.conv_general_dilated_p:
        return [_channels_last(eqn.params, *args)]
    if eqn.primitive in (p.jit_p, p.closed_call_p):  # no rule of its own is lost
        body = jax_compat.call_body(eqn)
        if body is not None and jax_compat.holds(body[0], _CONVOLUTION):
            return jax_compat.evaluate(*body, args, _apply)
    return jax_compat.bind(eqn.primitive, eqn.params, args)


def _channels_last(params: dict[str, Any], x: Array, kernel: Array) -> Array:
    if params["feature_group_count"] > 1 or params["batch_group_count"] > 1:
        return p.conv_general_dilated_p.bind(x, kernel, **params)
    layout = params["dimension_numbers"]
    rank = x.ndim
    last = (0, rank - 1, *range(1, rank - 1))
    order = lax.ConvDimensionNumbers(last, (rank - 1, rank - 2, *range(rank - 2)), last)
    out = p.conv_general_dilated_p.bind(
        _reordered(x, layout.lhs_spec, order.lhs_spec),
        _reordered(kernel, layout.rhs_spec, order.rhs_spec),
        **{**params, "dimension_numbers": order},
    )
    return _reordered(out, order.out_spec, layout.out_spec)


def _reordered(array: Array, now: Sequence[int], wanted: Sequence[int]) -> Array:
    """Each spec says which axis holds batch (or outputs), features, then the space."""
    source = dict(zip(wanted, now, strict=True))
    return array.transpose([source[axis] for axis in range(array.ndim)])
