"""Rewritings by what stands around equations: calls, maps, loops and branches."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import primitives as p

from jlrp.ir import jax_compat
from jlrp.testing import documented
from jlrp.testing.movement import ELEMENTWISE
from jlrp.testing.rewriting import Outputs, Site, rewriting, rewriting_of_whole
from jlrp.typing import Array, Function, PyTree


@rewriting_of_whole("calls")
def jit_around(fn: Function, params: PyTree, x: PyTree) -> Function:
    """The function inside of ``jax.jit``."""
    return jax.jit(fn)


@rewriting_of_whole("calls")
def remat_around(fn: Function, params: PyTree, x: PyTree) -> Function:
    """The function inside of ``jax.checkpoint``."""
    return jax.checkpoint(fn)


@rewriting_of_whole("calls")
def vmap_over_one(fn: Function, params: PyTree, x: PyTree) -> Function:
    """The function mapped over one x."""

    def twin(params: PyTree, x: PyTree) -> PyTree:
        one = jax.tree.map(lambda leaf: lax.expand_dims(leaf, (0,)), x)
        out = jax.vmap(fn, (None, 0))(params, one)
        return jax.tree.map(lambda leaf: lax.squeeze(leaf, (0,)), out)

    return twin


@rewriting_of_whole("calls")
def vmap_over_batch(fn: Function, params: PyTree, x: PyTree) -> Function | None:
    """The function of one example, mapped over the batch."""
    sizes = {np.shape(leaf)[:1] for leaf in jax.tree.leaves(x)}

    def one(params: PyTree, x: PyTree) -> PyTree:
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


def _all_float(tree: PyTree) -> bool:
    return all(jax_compat.is_inexact(leaf) for leaf in jax.tree.leaves(tree))


@rewriting_of_whole("calls")
def scan_around(fn: Function, params: PyTree, x: PyTree) -> Function | None:
    """The function as the body of a scan of one step."""
    if not _all_float(x):
        return None  # jlrp says that integers are to be embedded before a loop

    def twin(params: PyTree, x: PyTree) -> PyTree:
        once = jax.tree.map(lambda leaf: lax.expand_dims(leaf, (0,)), x)
        _, out = lax.scan(lambda carry, x: (carry, fn(params, x)), None, once)
        return jax.tree.map(lambda leaf: lax.squeeze(leaf, (0,)), out)

    return twin


@rewriting_of_whole("calls")
def branch_around(fn: Function, params: PyTree, x: PyTree) -> Function | None:
    """The function as a branch of a cond, the one that is taken."""
    if not _all_float(x):
        return None

    def zeros(params: PyTree, x: PyTree) -> PyTree:
        out = jax.eval_shape(fn, params, x)
        return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), out)

    def twin(params: PyTree, x: PyTree) -> PyTree:
        return lax.cond(jnp.bool_(True), fn, zeros, params, x)

    return twin


@rewriting_of_whole("calls")
def custom_jvp_around(fn: Function, params: PyTree, x: PyTree) -> Function | None:
    """The function with a ``custom_jvp`` that declares the derivative it has."""
    if not _all_float((params, x)):
        return None
    around = jax.custom_jvp(fn)
    around.defjvp(lambda primals, tangents: jax.jvp(fn, primals, tangents))
    return around


@rewriting_of_whole("calls")
def custom_vjp_around(fn: Function, params: PyTree, x: PyTree) -> Function | None:
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


def _function(site: Site) -> Callable[..., Array] | None:
    """An elementwise equation as a function of its operands, if it carries."""
    if not site.carries:
        return None
    return lambda *inputs: site.bind(*inputs)


@rewriting(
    "calls", *ELEMENTWISE, p.dot_general_p, p.conv_general_dilated_p, p.reduce_sum_p
)
def jit_pieces(site: Site) -> Outputs:
    """Every operation in a ``jax.jit`` of its own."""
    f = _function(site)
    return None if f is None else jax.jit(f)(*map(jnp.asarray, site.inputs))


@rewriting(
    "calls", *ELEMENTWISE, p.dot_general_p, p.conv_general_dilated_p, p.reduce_sum_p
)
def remat_pieces(site: Site) -> Outputs:
    """Every operation in a ``jax.checkpoint`` of its own."""
    f = _function(site)
    return None if f is None else jax.checkpoint(f)(*map(jnp.asarray, site.inputs))


@rewriting(
    "calls", *ELEMENTWISE, p.dot_general_p, p.conv_general_dilated_p, p.reduce_sum_p
)
def custom_jvp_pieces(site: Site) -> Outputs:
    """Every operation with a ``custom_jvp`` of the derivative that it has."""
    f = _function(site)
    if f is None or not all(jax_compat.is_inexact(a.aval) for a in site.eqn.invars):
        return None
    around = jax.custom_jvp(f)
    around.defjvp(lambda primals, tangents: jax.jvp(f, primals, tangents))
    return around(*map(jnp.asarray, site.inputs))


@rewriting("calls", p.jit_p, p.remat_p, p.closed_call_p)
def calls_inlined(site: Site) -> Outputs:
    """What a jit or a checkpoint holds, without it."""
    if not any(jax_compat.is_inexact(v.aval) for v in site.eqn.outvars):
        return None
    return _inlined(site)


@rewriting("calls", p.custom_jvp_call_p)
def custom_jvp_inlined(site: Site) -> Outputs:
    """What a ``custom_jvp`` holds, without the derivative that it declares."""
    return _inlined(site) if site.carries else None


def _inlined(site: Site) -> list[Array]:
    body = jax_compat.call_body(site.eqn)
    assert body is not None  # it is a call
    return jax_compat.evaluate(*body, site.inputs)


@rewriting("calls", p.scan_p, documented=documented.of_loops)
def scan_unrolled(site: Site) -> Outputs:
    """A scan of up to 8 steps, step by step."""
    params = site.params
    steps = params["length"]
    if steps > 8 or not any(jax_compat.is_inexact(v.aval) for v in site.eqn.outvars):
        return None
    jaxpr, consts = jax_compat.open_jaxpr(params["jaxpr"])
    fixed, carried = jax_compat.scan_counts(params)
    constants = site.inputs[:fixed]
    carries = site.inputs[fixed : fixed + carried]
    rows: list[list[Array]] = []
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
