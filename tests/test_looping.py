"""What the body of a metric's loop makes of a function: its values, in a new layout."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jlrp import baselines, metrics
from jlrp.ir import jax_compat
from jlrp.tactics.looping import for_a_loop

convolve = partial(lax.conv_general_dilated, window_strides=(1, 1), padding="SAME")


def arrays(*shapes):
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return [jax.random.normal(k, s) for k, s in zip(keys, shapes, strict=True)]


def in_layout(*layout, **options):
    return lambda kernel, x: convolve(x, kernel, dimension_numbers=layout, **options)


NCHW, KERNEL = (2, 3, 9, 8), (4, 3, 3, 2)
CASES = {
    "as torch": (in_layout("NCHW", "OIHW", "NCHW"), KERNEL, NCHW),
    "as flax": (in_layout("NHWC", "HWIO", "NHWC"), (3, 2, 3, 4), (2, 9, 8, 3)),
    "space in between": (in_layout("HNWC", "OHIW", "CHNW"), (4, 3, 3, 2), (9, 2, 8, 3)),
    "strides and dilation": (
        in_layout(
            *("NCHW", "OIHW", "NCHW"),
            window_strides=(2, 3),
            padding=((0, 2), (3, 1)),
            rhs_dilation=(1, 2),
        ),
        KERNEL,
        NCHW,
    ),
    "transposed": (
        in_layout(
            "NCHW", "OIHW", "NCHW", padding=((1, 1), (0, 1)), lhs_dilation=(2, 2)
        ),
        KERNEL,
        NCHW,
    ),
    "groups": (
        in_layout("NCHW", "OIHW", "NCHW", feature_group_count=3),
        (6, 1, 3, 2),
        NCHW,
    ),
    "groups of the batch": (
        in_layout("NCHW", "OIHW", "NCHW", batch_group_count=2),
        KERNEL,
        NCHW,
    ),
    "one axis": (
        in_layout("NCH", "OIH", "NCH", window_strides=(1,)),
        (4, 3, 3),
        (2, 3, 9),
    ),
    "three axes": (
        in_layout("NCDHW", "OIDHW", "NCDHW", window_strides=(1, 2, 1)),
        (4, 3, 3, 2, 1),
        (2, 3, 5, 6, 4),
    ),
}


def convolutions(fn, *args):
    """The convolutions of a program, those of its calls included."""

    def inside(jaxpr):
        for eqn in jaxpr.eqns:
            if eqn.primitive.name == "conv_general_dilated":
                yield eqn.params
            body = jax_compat.call_body(eqn)
            if body is not None:
                yield from inside(body[0])

    return list(inside(jax.make_jaxpr(fn)(*args).jaxpr))


@pytest.mark.parametrize("case", CASES)
def test_values_stay_and_the_layout_changes(case):
    fn, *shapes = CASES[case]
    kernel, x = arrays(*shapes)
    nested = jax.jit(lambda kernel, x: {"scores": jnp.sin(fn(kernel, x))})
    looped = for_a_loop(nested, kernel, x)
    wanted, found = nested(kernel, x)["scores"], looped(kernel, x)["scores"]
    assert found.shape == wanted.shape
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    (params,) = convolutions(looped, kernel, x)
    grouped = params["feature_group_count"] * params["batch_group_count"] > 1
    last = (0, x.ndim - 1, *range(1, x.ndim - 1))
    layout = params["dimension_numbers"]
    assert grouped or (layout.lhs_spec == last and layout.out_spec == last)


def test_a_function_without_convolutions_is_itself():
    fn, (w, x) = (lambda w, x: x @ w), arrays((3, 2), (4, 3))
    assert for_a_loop(fn, w, x) is fn


def test_side_effects_happen_as_written():
    def fn(kernel, x):
        jax.debug.callback(lambda: None)
        return CASES["as torch"][0](kernel, x)

    args = arrays(KERNEL, NCHW)
    assert for_a_loop(fn, *args) is fn


def test_derivatives_of_ones_own_are_kept():
    @jax.custom_jvp
    def own(kernel, x):
        return CASES["as torch"][0](kernel, x)

    own.defjvp(lambda primals, tangents: (own(*primals), 7 * tangents[1][:, :1]))
    kernel, x = arrays((1, 3, 3, 2), NCHW)
    looped = for_a_loop(lambda k, x: own(k, x), kernel, x)
    _, tangent = jax.jvp(partial(looped, kernel), (x,), (jnp.ones_like(x),))
    np.testing.assert_array_equal(tangent, 7)


def test_curves_of_a_convolution_are_those_of_single_calls():
    fn, *shapes = CASES["as torch"]
    kernel, x = arrays(*shapes)

    def scores(kernel, x):
        return fn(kernel, x).sum((2, 3))

    found = metrics.curves(
        scores,
        kernel,
        x,
        x,
        parts=metrics.features(x.shape[1:]),
        removal=metrics.Constant(0),
        steps=2,
        score="output",
        target=1,
    )
    order = np.argsort(-x.reshape(2, -1), axis=1)[:, : x[0].size // 2]
    half = np.asarray(x).reshape(2, -1).copy()
    np.put_along_axis(half, order, 0, axis=1)
    wanted = [scores(kernel, half.reshape(x.shape)), scores(kernel, 0 * x)]
    np.testing.assert_allclose(
        found.morf[:, 1:], np.stack(wanted, 1)[..., 1], atol=1e-4
    )


@pytest.mark.parametrize("name", ["integrated_gradients", "smoothgrad", "occlusion"])
def test_attributions_loop_over_channels_last(name):
    fn, *shapes = CASES["as torch"]
    kernel, x = arrays(*shapes)
    parts = {"parts": metrics.features(x.shape[1:])} if name == "occlusion" else {}

    def scores(kernel, x):
        return jnp.tanh(fn(kernel, x)).sum((2, 3))

    found = partial(getattr(baselines, name), scores, target=1, **parts)
    traced = jax.make_jaxpr(found)(kernel, x)
    inside = [e for e in jax_compat.call_body(traced.eqns[-1])[0].eqns]
    (loop,) = [e for e in inside if e.primitive.name == "scan"]
    layouts = [
        eqn.params["dimension_numbers"]
        for eqn in loop.params["jaxpr"].jaxpr.eqns
        if eqn.primitive.name == "conv_general_dilated"
    ]
    assert layouts and all(n.lhs_spec == n.out_spec == (0, 3, 1, 2) for n in layouts)
