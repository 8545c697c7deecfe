"""Along which axes of a mesh the values of a ``shard_map``'s body may vary.

JAX knows it too, where it checks replication; here it is found for every body.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence

from jax.extend.core import primitives as p

from jlrp.ir import jax_compat
from jlrp.ir.fixpoint import settled, through_jaxpr
from jlrp.ir.jax_compat import Jaxpr, JaxprEqn, Params

Axes = frozenset[str]
NOWHERE: Axes = frozenset()

_AGREED = ("psum", "psum_invariant", "pmax", "pmin", "all_gather")
_AGREED += ("all_gather_invariant", "pbroadcast")


def named(params: Params) -> tuple[str | int, ...]:
    """The mesh axes that a collective names; a number, where ``vmap`` mapped one."""
    names = params.get("axes", params.get("axis_name", ()))
    return tuple(names) if isinstance(names, tuple | list) else (names,)


def mesh_axes(params: Params) -> tuple[str, ...]:
    """The same, without the axes of ``vmap``."""
    return tuple(name for name in named(params) if isinstance(name, str))


def variation(eqn: JaxprEqn, operands: Sequence[Axes]) -> list[Axes]:
    """The axes along which the outputs vary, from those of the operands."""
    params, everywhere = eqn.params, NOWHERE.union(*operands)
    name = eqn.primitive.name
    if name == "axis_index":
        everywhere = frozenset(mesh_axes(params))
    elif name in _AGREED:
        everywhere -= frozenset(mesh_axes(params))
    elif (call := jax_compat.call_body(eqn)) is not None:
        return _variations(call[0], operands)
    elif eqn.primitive is p.scan_p:
        return of_scan(eqn, operands)
    elif eqn.primitive is p.cond_p:
        bodies = [_variations(b, operands[1:]) for b, _ in jax_compat.bodies(eqn)]
        columns = zip(*bodies, strict=True)
        return [operands[0].union(*column) for column in columns]
    elif eqn.primitive is p.while_p:
        (condition, _), (body, _) = jax_compat.bodies(eqn)
        n, m = params["cond_nconsts"], params["body_nconsts"]
        first, constants, carry = operands[:n], operands[n : n + m], operands[n + m :]

        def again(carry: Sequence[Axes]) -> list[Axes]:
            (goes_on,) = _variations(condition, [*first, *carry])
            return [a | goes_on for a in _variations(body, [*constants, *carry])]

        return settled(again, carry, operator.or_)
    return [everywhere] * len(eqn.outvars)


def of_scan(eqn: JaxprEqn, operands: Sequence[Axes]) -> list[Axes]:
    ((body, _),) = jax_compat.bodies(eqn)
    c, n = jax_compat.scan_counts(eqn.params)
    constants, carry, slices = operands[:c], operands[c : c + n], operands[c + n :]
    carry = settled(
        lambda carry: _variations(body, [*constants, *carry, *slices])[:n],
        carry,
        operator.or_,
    )
    return [*carry, *_variations(body, [*constants, *carry, *slices])[n:]]


def _variations(jaxpr: Jaxpr, inputs: Sequence[Axes]) -> list[Axes]:
    return through_jaxpr(jaxpr, inputs, variation, NOWHERE)
