"""Transposes that are written down, against those that JAX derives."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from jax.extend.core import primitives as p

import jlrp
from jlrp.ops.kinds import linear
from jlrp.ops.transposes import core_transpose, direct_transpose, dot_transpose

LAYOUTS = list(itertools.permutations(range(4)))


def draw_convolution(data):
    """Operands' shapes and parameters of a convolution over two axes."""
    groups = data.draw(st.integers(1, 3), "groups")
    x = [2, groups * data.draw(st.integers(1, 2)), *data.draw(sizes(3, 7))]
    kernel = [groups * data.draw(st.integers(1, 2)), x[1] // groups]
    kernel += data.draw(sizes(1, 3))
    specs = [data.draw(st.sampled_from(LAYOUTS)) for _ in range(3)]
    params = dict(
        window_strides=data.draw(sizes(1, 3)),
        padding=[data.draw(sizes(-1, 2)) for _ in range(2)],
        lhs_dilation=data.draw(sizes(1, 2)),
        rhs_dilation=data.draw(sizes(1, 2)),
        dimension_numbers=lax.ConvDimensionNumbers(*specs),
        feature_group_count=groups,
    )

    def laid_out(shape, spec):
        return tuple(shape[spec.index(axis)] for axis in range(4))

    return laid_out(x, specs[0]), laid_out(kernel, specs[1]), params


def sizes(low, high):
    return st.lists(st.integers(low, high), min_size=2, max_size=2)


@settings(max_examples=40, derandomize=True, deadline=None)
@given(st.data())
def test_convolutions(data):
    shape, kernel_shape, params = draw_convolution(data)
    rng = np.random.default_rng(0)
    kernel = jnp.asarray(rng.normal(size=kernel_shape))
    convolve = lambda x: lax.conv_general_dilated(x, kernel, **params)  # noqa: E731
    x = jax.ShapeDtypeStruct(shape, kernel.dtype)
    try:
        out = jax.eval_shape(convolve, x)
    except (TypeError, ValueError):  # a window larger than its input
        return
    if 0 in out.shape:
        return
    m = jnp.asarray(rng.normal(size=out.shape))
    (eqn,) = jax.make_jaxpr(convolve)(x).eqns
    assert eqn.primitive is p.conv_general_dilated_p
    ours = core_transpose(eqn.primitive, eqn.params, 0, m, kernel, x, None)
    (expected,) = jax.linear_transpose(convolve, x)(m)
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-12)


def test_convolutions_with_groups_of_the_batch_are_left_to_jax():
    x, kernel = jnp.ones((4, 2, 5)), jnp.ones((6, 2, 3))
    jaxpr = jax.make_jaxpr(
        lambda x: lax.conv_general_dilated(x, kernel, (1,), "SAME", batch_group_count=2)
    )(x)
    (eqn,) = jaxpr.eqns
    like, m = jax.ShapeDtypeStruct(x.shape, x.dtype), jnp.ones((2, 6, 5))
    core = eqn.primitive, eqn.params, 0
    assert core_transpose(*core, m, kernel, like, None) is None


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize(
    "dims",
    [
        (((1,), (0,)), ((), ())),
        (((0, 2), (2, 1)), ((), ())),
        (((2,), (1,)), ((0,), (2,))),
        (((2, 1), (0, 1)), ((0,), (2,))),
    ],
    ids=str,
)
def test_dots(dims, side):
    rng = np.random.default_rng(1)
    rank = 2 if dims[0] == ((1,), (0,)) else 3
    sizes = [[3, 4, 5][:rank], [None] * rank]
    sizes[1] = [6, 7, 8][:rank]
    for a, b in (dims[0], dims[1]):
        for i, j in zip(a, b, strict=True):
            sizes[1][j] = sizes[0][i]
    operands = [jnp.asarray(rng.normal(size=s)) for s in sizes]

    def dot(wanted):
        args = list(operands)
        args[side] = wanted
        return lax.dot_general(*args, dims)

    jaxpr = jax.make_jaxpr(dot)(operands[side])
    out = dot(operands[side])
    m = jnp.asarray(rng.normal(size=out.shape))
    ours = dot_transpose(
        jaxpr.eqns[0].params, m, operands[1 - side], side, operands[side].shape
    )
    (expected,) = jax.linear_transpose(dot, operands[side])(m)
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-12)


# Kernels of several axes, as attention has them: one matrix where their axes allow it.
SEVERAL = {
    "heads out": ((2, 3, 8), (8, 2, 4), ((2,), (0,))),
    "heads in": ((2, 3, 2, 4), (2, 4, 7), ((2, 3), (0, 1))),
    "heads in, by another order": ((2, 3, 4, 2), (2, 4, 7), ((3, 2), (0, 1))),
    "features first": ((2, 3, 2, 4), (7, 2, 4), ((2, 3), (1, 2))),
    "of squares": ((2, 4, 4), (4, 4, 4), ((1, 2), (0, 1))),
    "apart": ((2, 3, 4, 5), (4, 7, 5), ((2, 3), (0, 2))),
    "all": ((3, 4), (3, 4), ((0, 1), (0, 1))),
    "none": ((3, 4), (5,), ((), ())),
}


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("name", SEVERAL)
def test_dots_with_kernels_of_several_axes(name, side):
    rng = np.random.default_rng(1)
    *shapes, contracted = SEVERAL[name]
    operands = [jnp.asarray(rng.normal(size=shape)) for shape in shapes]

    def dot(wanted):
        args = [wanted if i == side else x for i, x in enumerate(operands)]
        return lax.dot_general(*args, (contracted, ((), ())))

    (eqn,) = jax.make_jaxpr(dot)(operands[side]).eqns
    m = jnp.asarray(rng.normal(size=dot(operands[side]).shape))
    found = dot_transpose(eqn.params, m, operands[1 - side], side, shapes[side])
    (expected,) = jax.linear_transpose(dot, operands[side])(m)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("padding", ["VALID", "SAME", ((0, 0), (2, 1), (0, 0))])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("kind", ["max", "min"])
def test_pooling_goes_to_the_winner_as_in_jax(kind, stride, padding, monkeypatch):
    """Ties included: the numbers are few."""
    combine, start = (lax.max, -jnp.inf) if kind == "max" else (lax.min, jnp.inf)
    x = jnp.asarray(np.random.default_rng(2).integers(-2, 3, (2, 9, 3)) * 1.0)

    def pooled(_, x):
        window, strides = (1, 3, 1), (1, stride, 1)
        return lax.reduce_window(x, start, combine, window, strides, padding)

    m = jnp.asarray(np.random.default_rng(3).normal(size=pooled(None, x).shape))
    m = jnp.where(jnp.isfinite(pooled(None, x)), m, 0)
    monkeypatch.setattr(jax, "vjp", None)  # not asked
    ours = jlrp.relevance(lambda p, x: pooled(p, x), (), x, m, composite="epsilon")
    monkeypatch.undo()
    _, pull = jax.vjp(lambda x: pooled(None, x), x)
    np.testing.assert_allclose(ours, x * pull(m)[0], rtol=0, atol=1e-12)


# Linear operations of several equations, against JAX's transpose of them.

C = np.random.default_rng(3).normal(size=(3, 4))
LINEAR = {
    "slice": lambda x: x[1:, ::2],
    "empty slice": lambda x: jnp.concatenate([x[:, 4::2], x], 1),
    "slice to nothing before": lambda x: x[:1, 1:2],
    "split": lambda x: jnp.split(x, [1, 3], axis=1)[1],
    "split, all parts": lambda x: sum(
        (i + 2) * part.sum(1) for i, part in enumerate(jnp.split(x, 2, axis=1))
    ),
    "concatenate": lambda x: jnp.concatenate([x, jnp.asarray(C), -x], 1),
    "select": lambda x: jnp.where(C > 0, x, 3.0),
    "select the other": lambda x: jnp.where(C > 0, 0.0, x),
    "select between": lambda x: jnp.where(C > 0, x, 2 * x),
    "broadcast": lambda x: jnp.broadcast_to(x[:, None], (3, 5, 4)),
    "broadcast a row": lambda x: jnp.broadcast_to(x[:, :1], (3, 4)) * C,
    "center": lambda x: x - x.mean(-1, keepdims=True),
    "center along both": lambda x: x - x.mean(),
    "mean": lambda x: x.mean(0),
    "negative sums": lambda x: -(x.sum(1) / 3) - 2 * x[:, 0],
    "transposed": lambda x: x.T / C.T,
    "scaled twice": lambda x: x * (jnp.asarray(C) * jnp.asarray(C[:, :1])),
    "squeezed": lambda x: jnp.squeeze(x[None] * 2, 0).reshape(2, 6),
}


@pytest.mark.relaxed
@pytest.mark.parametrize("composite", ["epsilon", "attnlrp"])
@pytest.mark.parametrize("name", LINEAR)
def test_linear_operations(name, composite, monkeypatch):
    x = jnp.asarray(np.random.default_rng(4).normal(size=(3, 4)))
    weights = jnp.asarray(np.random.default_rng(5).normal(size=100))

    def fn(weights, x):
        y = LINEAR[name](x)
        return (y * weights[: y.size].reshape(y.shape)).sum()

    def relevance():
        return jlrp.relevance(lambda w, x: fn(w, x), weights, x, composite=composite)

    taken, left = [], []

    def spied(op, cotangents, numbers):
        found = direct_transpose(op, cotangents, numbers)
        (left if found is None else taken).append(op)
        return found

    monkeypatch.setattr(linear, "direct_transpose", spied)
    ours = relevance()
    assert taken and not left
    monkeypatch.setattr(linear, "direct_transpose", lambda *args: None)
    np.testing.assert_allclose(ours, relevance(), rtol=0, atol=1e-12)
