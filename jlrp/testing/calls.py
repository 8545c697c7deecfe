"""Rewritings by what stands around equations: calls, maps, loops and branches."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import primitives as p

from jlrp.ir import jax_compat
from jlrp.testing import documented
from jlrp.testing.movement import ELEMENTWISE
from jlrp.testing.rewriting import Function, Site, rewriting


@rewriting("calls", whole=True)
def jit_around(fn: Function, params: Any, x: Any) -> Function:
    """The function inside of ``jax.jit``."""
    return jax.jit(fn)


@rewriting("calls", whole=True)
def remat_around(fn: Function, params: Any, x: Any) -> Function:
    """The function inside of ``jax.checkpoint``."""
    return jax.checkpoint(fn)


@rewriting("calls", whole=True)
def vmap_over_one(fn: Function, params: Any, x: Any) -> Function:
    """The function mapped over one x."""

    def twin(params: Any, x: Any) -> Any:
        one = jax.tree.map(lambda leaf: lax.expand_dims(leaf, (0,)), x)
        out = jax.vmap(fn, (None, 0))(params, one)
        return jax.tree.map(lambda leaf: lax.squeeze(leaf, (0,)), out)

    return twin


@rewriting("calls", whole=True)
def vmap_over_batch(fn: Function, params: Any, x: Any) -> Function | None:
    """The function of one example, mapped over the batch."""
    sizes = {np.shape(leaf)[:1] for leaf in jax.tree.leaves(x)}

    def one(params: Any, x: Any) -> Any:
        out = fn(params, jax.tree.map(lambda leaf: lax.expand_dims(leaf, (0,)), x))
        return jax.tree.map(lambda leaf: lax.squeeze(leaf, (0,)), out)

    twin = jax.vmap(one, (None, 0))
    try:
        found = jax.tree.leaves(twin(params, x))
        wanted = jax.tree.leaves(fn(params, x))
    except (TypeError, ValueError):  # it takes no batch of one
        return None
    same = len(sizes) == 1 and all(
        np.shape(a) == np.shape(b) and np.allclose(a, b, rtol=1e-9, atol=1e-9)
        for a, b in zip(found, wanted, strict=True)
    )
    return twin if same else None  # examples of some functions see each other


@rewriting("calls", whole=True)
def scan_around(fn: Function, params: Any, x: Any) -> Function:
    """The function as the body of a scan of one step."""

    def twin(params: Any, x: Any) -> Any:
        once = jax.tree.map(lambda leaf: lax.expand_dims(leaf, (0,)), x)
        _, out = lax.scan(lambda carry, x: (carry, fn(params, x)), None, once)
        return jax.tree.map(lambda leaf: lax.squeeze(leaf, (0,)), out)

    return twin


@rewriting("calls", whole=True)
def branch_around(fn: Function, params: Any, x: Any) -> Function:
    """The function as a branch of a cond, the one that is taken."""

    def zeros(params: Any, x: Any) -> Any:
        out = jax.eval_shape(fn, params, x)
        return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), out)

    def twin(params: Any, x: Any) -> Any:
        return lax.cond(jnp.bool_(True), fn, zeros, params, x)

    return twin


def _all_float(tree: Any) -> bool:
    return all(jax_compat.is_inexact(leaf) for leaf in jax.tree.leaves(tree))


@rewriting("calls", whole=True)
def custom_jvp_around(fn: Function, params: Any, x: Any) -> Function | None:
    """The function with a ``custom_jvp`` that declares the derivative it has."""
    if not _all_float((params, x)):
        return None
    around = jax.custom_jvp(fn)
    around.defjvp(lambda primals, tangents: jax.jvp(fn, primals, tangents))
    return around


@rewriting("calls", whole=True)
def custom_vjp_around(fn: Function, params: Any, x: Any) -> Function | None:
    """The function with a ``custom_vjp`` that declares the derivative it has."""
    if not _all_float((params, x)):
        return None
    around = jax.custom_vjp(fn)
    around.defvjp(
        lambda params, x: (fn(params, x), (params, x)),
        lambda kept, ct: jax.vjp(fn, *kept)[1](ct),
    )
    return around


PIECES = (*ELEMENTWISE, p.dot_general_p, p.conv_general_dilated_p, p.reduce_sum_p)


def _function(site: Site) -> Any:
    """An elementwise equation as a function of its operands, if it carries."""
    if not site.carries:
        return None
    return lambda *inputs: site.bind(*inputs)


@rewriting(
    "calls", *ELEMENTWISE, p.dot_general_p, p.conv_general_dilated_p, p.reduce_sum_p
)
def jit_pieces(site: Site) -> Any:
    """Every operation in a ``jax.jit`` of its own."""
    f = _function(site)
    return None if f is None else jax.jit(f)(*map(jnp.asarray, site.inputs))


@rewriting(
    "calls", *ELEMENTWISE, p.dot_general_p, p.conv_general_dilated_p, p.reduce_sum_p
)
def remat_pieces(site: Site) -> Any:
    """Every operation in a ``jax.checkpoint`` of its own."""
    f = _function(site)
    return None if f is None else jax.checkpoint(f)(*map(jnp.asarray, site.inputs))


@rewriting(
    "calls", *ELEMENTWISE, p.dot_general_p, p.conv_general_dilated_p, p.reduce_sum_p
)
def custom_jvp_pieces(site: Site) -> Any:
    """Every operation with a ``custom_jvp`` of the derivative that it has."""
    f = _function(site)
    if f is None or not all(jax_compat.is_inexact(a.aval) for a in site.eqn.invars):
        return None
    around = jax.custom_jvp(f)
    around.defjvp(lambda primals, tangents: jax.jvp(f, primals, tangents))
    return around(*map(jnp.asarray, site.inputs))


@rewriting("calls", p.jit_p, p.remat_p, p.closed_call_p)
def calls_inlined(site: Site) -> Any:
    """What a jit or a checkpoint holds, without it."""
    if not any(jax_compat.is_inexact(v.aval) for v in site.eqn.outvars):
        return None
    return _inlined(site)


@rewriting("calls", p.custom_jvp_call_p)
def custom_jvp_inlined(site: Site) -> Any:
    """What a ``custom_jvp`` holds, without the derivative that it declares."""
    return _inlined(site) if site.carries else None


def _inlined(site: Site) -> list[Any]:
    body = jax_compat.call_body(site.eqn)
    assert body is not None  # it is a call
    return jax_compat.evaluate(*body, site.inputs)


@rewriting("calls", p.scan_p, documented=documented.of_loops)
def scan_unrolled(site: Site) -> Any:
    """A scan of up to 8 steps, step by step."""
    params = site.params
    steps = params["length"]
    if steps > 8 or not any(jax_compat.is_inexact(v.aval) for v in site.eqn.outvars):
        return None
    jaxpr, consts = jax_compat.open_jaxpr(params["jaxpr"])
    fixed, carried = jax_compat.scan_counts(params)
    constants = site.inputs[:fixed]
    carries = site.inputs[fixed : fixed + carried]
    rows: list[list[Any]] = []
    order = range(steps)[::-1] if params["reverse"] else range(steps)
    for n in order:
        xs = [
            lax.index_in_dim(jnp.asarray(v), n, 0, keepdims=False)
            for v in site.inputs[fixed + carried :]
        ]
        outs = jax_compat.evaluate(jaxpr, consts, [*constants, *carries, *xs])
        carries = outs[:carried]
        rows.append(outs[carried:])
    if params["reverse"]:
        rows.reverse()
    stacked = [
        lax.concatenate([lax.expand_dims(jnp.asarray(v), (0,)) for v in column], 0)
        for column in zip(*rows, strict=True)
    ]
    return [*carries, *stacked]
