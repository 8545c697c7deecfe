"""Loops and branches are explained as the programs that they stand for.

A model here is written once, with its loop as an argument: the same model unrolled in
Python is the reference for ``lax.scan``, ``lax.fori_loop`` and ``lax.while_loop``.
"""

import functools
import linecache
import os
import re

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.interpreters import ad, mlir

import jlrp
from jlrp import rules
from jlrp.context import EvalContext
from jlrp.errors import SelectorError, UnsupportedPrimitiveError

pytestmark = pytest.mark.relaxed  # models promote dtypes and ranks as users write them

COMPOSITES = {
    name: name
    for name in (
        "attnlrp",
        "cp_lrp",
        "epsilon",
        "epsilon_plus",
        "epsilon_plus_flat",
        "epsilon_alpha2_beta1",
        "excitation_backprop",
        "gradient_input",
        "dynamic_lrp",
    )
}
COMPOSITES["epsilon_gamma_box"] = jlrp.composites.epsilon_gamma_box(low=-4.0, high=4.0)
FEW = {name: COMPOSITES[name] for name in ("attnlrp", "epsilon_plus", "dynamic_lrp")}

RNG = np.random.default_rng(0)
normal = lambda *shape: jnp.asarray(RNG.normal(size=shape))  # noqa: E731
T, F, H = 4, 4, 3
P = {"w": normal(F, H), "u": normal(H, H), "b": normal(H), "h0": normal(2, H)}
P |= {"w4": normal(F, 4 * H), "u4": normal(H, 4 * H), "b4": normal(4 * H)}
P |= {"out": normal(H, 2), "start": normal(F, H)}
P |= {"layers": normal(4, H, H), "biases": normal(4, H), "square": normal(3, F, F)}
P |= {"kernels": normal(3, 3, 3, 2, 2), "kernel": normal(3, 3, 2, 2)}
P |= {"kernel_biases": normal(3, 2), "decay": jnp.abs(normal(H)) / 2}
X = normal(2, T, F)
IMAGE = normal(2, 4, 4, 2)
sigmoid, relu = jax.nn.sigmoid, jax.nn.relu


# The loops that a model may be written with.


def unrolled(step, init, xs=None, length=None, reverse=False, unroll=1):
    if xs is not None and jax.tree.leaves(xs):
        length = len(jax.tree.leaves(xs)[0])
    carry, ys = init, []
    for t in reversed(range(length)) if reverse else range(length):
        carry, y = step(carry, jax.tree.map(lambda a: a[t], xs))  # noqa: B023
        ys.append(y)
    ys = ys[::-1] if reverse else ys
    return carry, jax.tree.map(lambda *parts: jnp.stack(parts), *ys)


def as_loop(run):
    """A scan written with ``run(n, body, state)``, its outputs kept in a buffer."""

    def scan(step, init, xs=None, length=None, reverse=False, unroll=1):
        if xs is not None and jax.tree.leaves(xs):
            length = len(jax.tree.leaves(xs)[0])
        at = lambda t: jax.tree.map(lambda a: a[t], xs)  # noqa: E731
        _, shapes = jax.eval_shape(step, init, at(0))
        buffers = jax.tree.map(lambda s: jnp.zeros((length, *s.shape), s.dtype), shapes)

        def body(i, state):
            carry, ys = state
            t = length - 1 - i if reverse else i
            carry, y = step(carry, at(t))
            return carry, jax.tree.map(lambda a, b: a.at[t].set(b), ys, y)

        return run(length, body, (init, buffers))

    return scan


def _while(n, body, state):
    def step(s):
        return s[0] + 1, body(s[0], s[1])

    return lax.while_loop(lambda s: s[0] < n, step, (0, state))[1]


fori = as_loop(lambda n, body, state: lax.fori_loop(0, n, body, state))
whiled = as_loop(_while)
fori.__name__, whiled.__name__ = "fori_loop", "while_loop"


# Models.


def time_first(x):
    return x.swapaxes(0, 1)


def rnn_step(p, h, x):
    h = jnp.tanh(x @ p["w"] + h @ p["u"] + p["b"])
    return h, h * sigmoid(h @ p["u"])


def rnn(scan, start="zero", use="both", **options):
    def model(p, x):
        h = {
            "zero": lambda: jnp.zeros((2, H)),
            "learned": lambda: p["h0"],
            "of x": lambda: jnp.tanh(x[:, 0] @ p["start"]),
        }[start]()
        step = functools.partial(rnn_step, p)
        h, ys = scan(step, h, time_first(x), **options)
        if use == "ys":
            h = ys.mean(0)
        elif use == "both":
            h = h + ys[1]
        return h @ p["out"]

    return model


def lstm(scan, start="zero"):
    def model(p, x):
        def step(state, x):
            h, c = state
            i, f, g, o = jnp.split(x @ p["w4"] + h @ p["u4"] + p["b4"], 4, -1)
            c = sigmoid(f) * c + sigmoid(i) * jnp.tanh(g)
            h = sigmoid(o) * jnp.tanh(c)
            return (h, c), h

        zero = p["h0"] if start == "learned" else jnp.zeros((2, H))
        (h, _), ys = scan(step, (zero, zero), time_first(x))
        return (h + ys[2]) @ p["out"]

    return model


def gru(scan, start="zero"):
    def model(p, x):
        def step(h, x):
            r, z, _, n = jnp.split(x @ p["w4"] + p["b4"], 4, -1)
            a, b, _, c = jnp.split(h @ p["u4"], 4, -1)
            r, z = sigmoid(r + a), sigmoid(z + b)
            h = (1 - z) * jnp.tanh(n + r * c) + z * h
            return h, None

        h = jnp.zeros((2, H)) if start == "zero" else x[:, 1] @ p["start"]
        h, _ = scan(step, h, time_first(x))
        return h @ p["out"]

    return model


def layers(scan, **options):
    def model(p, x):
        def step(h, layer):
            kernel, bias = layer
            return h + relu(h @ kernel + bias), None

        h, _ = scan(step, x[:, 0] @ p["w"], (p["layers"], p["biases"]), **options)
        return h @ p["out"]

    return model


def layers_from_x(scan):
    """The first of the layers is the first affine operation of the model."""

    def model(p, x):
        step = lambda h, kernel: (jnp.tanh(h @ kernel), None)  # noqa: E731
        h, _ = scan(step, x[:, 0], p["square"])
        return h @ p["w"]

    return model


def convs(scan):
    def model(p, x):
        def step(h, layer):
            kernel, bias = layer
            dims = ("NHWC", "HWIO", "NHWC")
            h = lax.conv_general_dilated(
                h, kernel, (1, 1), "SAME", dimension_numbers=dims
            )
            return relu(h + bias), None

        h, _ = step(x, (p["kernel"], p["kernel_biases"][0]))
        h, _ = scan(step, h, (p["kernels"], p["kernel_biases"]))
        return h.mean((1, 2)) @ p["out"][:2]

    return model


def convs_from_x(scan):
    def model(p, x):
        def step(h, kernel):
            dims = ("NHWC", "HWIO", "NHWC")
            return relu(
                lax.conv_general_dilated(
                    h, kernel, (1, 1), "SAME", dimension_numbers=dims
                )
            ), None

        h, _ = scan(step, x, p["kernels"])
        return h.mean((1, 2)) @ p["out"][:2]

    return model


def late(scan, after):
    """A chain of carries: x enters the first, and the last is read."""

    def model(p, x):
        def step(carries, t):
            new = jnp.tanh(x[:, 1] @ p["w"]) * (1.0 + t)
            moved = [jnp.tanh(c @ p["u"] + 0.1) for c in carries[:-1]]
            return (new, *moved), carries[-1]

        start = tuple(0.3 * (i + 1) * p["h0"] for i in range(after + 1))
        carries, ys = scan(step, start, jnp.arange(6.0))
        return (carries[-1] + ys[-1] + ys[1]) @ p["out"]

    return model


def x_as_constant(scan):
    def model(p, x):
        def step(h, t):
            return jnp.tanh(h @ p["u"] + x[:, 0] @ p["w"] + t), h

        h, ys = scan(step, p["h0"], jnp.arange(4.0))
        return (h + ys[2]) @ p["out"]

    return model


def constant_and_slices(scan):
    def model(p, x):
        xs = time_first(x)

        def step(h, x):
            return jnp.tanh(h @ p["u"] + (x - xs.mean(0)) @ p["w"] + xs[2, :, :H]), None

        return scan(step, jnp.zeros((2, H)), xs)[0] @ p["out"]

    return model


def attending(scan):
    """Every step attends to all of x, a constant of the loop."""

    def model(p, x):
        def step(h, x_t):
            scores = jnp.einsum("bh,bth->bt", h, x @ p["w"])
            context = jnp.einsum("bt,btf->bf", jax.nn.softmax(scores, -1), x)
            norm = (h - h.mean(-1, keepdims=True)) * lax.rsqrt(
                h.var(-1, keepdims=True) + 1e-3
            )
            h = jax.nn.gelu(norm @ p["u"] + context @ p["w"] + x_t @ p["start"])
            return h, context[:, :2]

        h, ys = scan(step, p["h0"], time_first(x))
        return h @ p["out"] + ys[3]

    return model


def nested(scan):
    def model(p, x):
        def outer(h, x_t):
            def inner(g, layer):
                kernel, bias = layer
                g = jnp.tanh(g @ kernel + bias + x_t @ p["w"])
                return g, g * 0.5

            g, ys = scan(inner, h, (p["layers"][:2], p["biases"][:2]))
            return g, ys[0] + 2.0 * ys[1]

        h, ys = scan(outer, jnp.zeros((2, H)), time_first(x)[:3])
        return (h + ys[1]) @ p["out"]

    return model


def nested_in_jit(scan):
    def model(p, x):
        @jax.jit
        def inner(h, x_t):
            step = lambda g, k: (jnp.tanh(g @ k + x_t @ p["w"]), None)  # noqa: E731
            return scan(step, h, p["layers"][:2])[0]

        outer = lambda h, x_t: (inner(h, x_t) + inner(h * 0.5, x_t), None)  # noqa: E731
        return scan(outer, jnp.zeros((2, H)), time_first(x)[:3])[0] @ p["out"]

    return model


def mixed_dtypes(scan):
    """Integer, boolean and key carries and slices, beside float ones and None."""

    def model(p, x):
        def step(carry, xs):
            h, i, flip, key, _ = carry
            x, t, m, _ = xs
            key, sub = jax.random.split(key)
            noise = jax.random.normal(sub, (2, H))
            h = jnp.tanh(x @ p["w"] + h @ p["u"] * jnp.where(flip, 1.0, 0.5) + noise)
            h = jnp.where(m, h, h * p["layers"][i % 4, 0])
            flips = jnp.logical_xor(flip, t > 1)
            return (h, i + t, flips, key, None), (h.argmax(-1), h, flip)

        start = (jnp.zeros((2, H)), jnp.int32(0), True, jax.random.key(3), None)
        masks = jnp.array([True, False, True, False])
        xs = (time_first(x), jnp.arange(T, dtype=jnp.int32), masks, None)
        (h, *_), (best, ys, _) = scan(step, start, xs)
        return (h + ys[2] * (best[1, 0] + 1)) @ p["out"]

    return model


def swapped(scan):
    """Carries that change places, and an output that is an input."""

    def model(p, x):
        def step(carry, x):
            a, b = carry
            return (b, jnp.tanh(a @ p["u"] + x @ p["w"])), (a, x)

        (a, b), (ys, xs) = scan(step, (p["h0"], x[:, 0] @ p["start"]), time_first(x))
        return (a + b + ys[3] + xs[1, :, :H]) @ p["out"]

    return model


def same_twice(scan):
    """One array as constant, carry and slices; one output used twice."""

    def model(p, x):
        h0 = x[:, 0] @ p["start"]

        def step(h, x):
            h = jnp.tanh(h @ p["u"] + x @ p["w"] + h0)
            return h, (h, h)

        h, (a, b) = scan(step, h0, time_first(x))
        return (h + a[-1] * 0.5 + b[0] + h0) @ p["out"]

    return model


def of_length(scan, n):
    def model(p, x):
        step = functools.partial(rnn_step, p)
        h, ys = scan(step, x[:, 0] @ p["start"], time_first(x)[:n])
        return (h + ys.sum(0)) @ p["out"]

    return model


def checkpointed(scan):
    def model(p, x):
        step = functools.partial(rnn_step, p)
        step = step if scan is unrolled else jax.checkpoint(step)
        h, ys = scan(step, p["h0"], time_first(x))
        return (h + ys[1]) @ p["out"]

    return model


def inside_vmap(scan):
    def model(p, x):
        def one(x):
            step = lambda h, x: (jnp.tanh(x @ p["w"] + h @ p["u"]), h)  # noqa: E731
            h, ys = scan(step, jnp.zeros(H), x)
            return (h + ys[2]) @ p["out"]

        return jax.vmap(one)(x)

    return model


def vmap_inside(scan):
    def model(p, x):
        def step(h, x):
            one = lambda h, x: jnp.tanh(x @ p["w"] + p["u"] @ h)  # noqa: E731
            return jax.vmap(one)(h, x), None

        return scan(step, p["h0"], time_first(x))[0] @ p["out"]

    return model


def residual_sum(scan):
    """A sum over the iterations: every one adds to what was carried."""

    def model(p, x):
        step = lambda a, x: (a + x @ p["w"], None)  # noqa: E731
        return scan(step, jnp.zeros((2, H)), time_first(x))[0] @ p["out"]

    return model


def ignoring(scan):
    """A carry that reaches nothing, a slice that is not read."""

    def model(p, x):
        def step(carry, xs):
            h, lost = carry
            x, unread = xs
            h = jnp.tanh(x @ p["w"] + h @ p["u"])
            return (h, jnp.sin(lost) + h), None

        h = (jnp.zeros((2, H)), x[:, 0] @ p["start"])
        (h, _), _ = scan(step, h, (time_first(x), time_first(x)))
        return h @ p["out"]

    return model


def cond_in_scan(scan):
    def model(p, x):
        def step(h, xs):
            x, t = xs
            z = x @ p["w"] + h @ p["u"]
            h = lax.cond(t % 2 == 0, jnp.tanh, lambda z: relu(z + p["b"]), z)
            return h, h

        h, ys = scan(step, p["h0"], (time_first(x), jnp.arange(T)))
        return (h + ys[1]) @ p["out"]

    return model


def static_cond(scan):
    """What ``cond_in_scan`` computes, its branches chosen in Python."""

    def model(p, x):
        h, ys = p["h0"], []
        for t in range(T):
            z = x[:, t] @ p["w"] + h @ p["u"]
            h = jnp.tanh(z) if t % 2 == 0 else relu(z + p["b"])
            ys.append(h)
        return (h + ys[1]) @ p["out"]

    return model


# Every composite: the same numbers as unrolled, and all of them accounted for.

MODELS = {
    "rnn with a learned start": functools.partial(rnn, start="learned"),
    "lstm": lstm,
    "gru that starts from x": functools.partial(gru, start="of x"),
    "convs": convs,
    "attending": attending,
}
MORE = {
    "rnn": rnn,
    "rnn that starts from x": functools.partial(rnn, start="of x"),
    "lstm with a learned start": functools.partial(lstm, start="learned"),
    "gru": gru,
    "layers": layers,
    "layers from x": layers_from_x,
    "only ys": functools.partial(rnn, use="ys"),
    "reverse": functools.partial(rnn, reverse=True),
    "reverse from a learned start": functools.partial(
        rnn, start="learned", reverse=True
    ),
    "unroll=2": functools.partial(rnn, unroll=2),
    "x as constant": x_as_constant,
    "constant and slices": constant_and_slices,
    "nested": nested,
    "nested in jit": nested_in_jit,
    "mixed dtypes": mixed_dtypes,
    "swapped carries": swapped,
    "one array twice": same_twice,
    "checkpoint": checkpointed,
    "inside vmap": inside_vmap,
    "vmap inside": vmap_inside,
    "ignoring": ignoring,
}
LATE = {f"active after {n}": functools.partial(late, after=n) for n in range(6)}
LATE |= {f"length {n}": functools.partial(of_length, n=n) for n in (1, 2)}
IMAGES = ("convs", "convs from x")


def seed_of(fn, p, x):
    shape = jax.eval_shape(fn, p, x).shape
    return jnp.linspace(-1.0, 2.0, int(np.prod(shape))).reshape(shape)


def explained(fns, composite, x=X, p=P, **options):
    """Relevance of several functions of the same arguments, in one program."""

    @jax.jit
    def explain(p, x):
        return [
            jlrp.relevance(fn, p, x, seed_of(fn, p, x), composite=composite, **options)
            for fn in fns
        ]

    return explain(p, x)


def assert_same(found, expected, tolerance=1e-10):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        scale = float(jnp.abs(b).max())
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * scale)


def assert_as_unrolled(cases, composite, loops, x=X, **options):
    """Each model written with each loop is explained as the unrolled one."""
    wrong = []
    models = list(cases.values())
    fns = [model(loop) for model in models for loop in (unrolled, *loops)]
    found = iter(explained(fns, composite, x, **options))
    for name in cases:
        expected = next(found)
        assert max(float(jnp.abs(a).max()) for a in jax.tree.leaves(expected)) > 1e-6
        for loop in loops:
            try:
                assert_same(next(found), expected)
            except AssertionError as error:
                wrong.append(f"{name} with {loop.__name__}: {error}")
    assert not wrong, "\n".join(wrong)


def table(cases):
    return pytest.mark.parametrize("case", cases.values(), ids=list(cases))


def split(cases):
    images = {k: v for k, v in cases.items() if k in IMAGES}
    return images, {k: v for k, v in cases.items() if k not in IMAGES}


@table(COMPOSITES)
def test_scan_is_the_unrolled_loop_for_every_composite(case):
    images, others = split(MODELS)
    assert_as_unrolled(others, case, [lax.scan])
    assert_as_unrolled(images, case, [lax.scan], IMAGE)


@pytest.mark.parametrize("half", [0, 1])
def test_scan_is_the_unrolled_loop_in_every_use(half):
    names = list(MORE)[half::2]
    assert_as_unrolled({k: MORE[k] for k in names}, "dynamic_lrp", [lax.scan])


def test_a_sum_over_iterations():
    """Unrolled it is one sum of all, whose shares are those of sums of two unless they
    are absolute or stabilised."""
    cases = {"sum": residual_sum}
    assert_as_unrolled(cases, jlrp.composites.epsilon(epsilon=0.0), [lax.scan, whiled])


@pytest.mark.parametrize("composite", ["epsilon_plus", "dynamic_lrp"])
def test_carries_become_active_when_x_reaches_them(composite):
    assert_as_unrolled(LATE, composite, [lax.scan])


def test_every_spelling_of_a_loop():
    cases = {"rnn": functools.partial(rnn, start="learned"), "nested": nested}
    cases |= {"reverse": MORE["reverse"], "mixed": mixed_dtypes}
    cases |= {"layers": layers, "late": LATE["active after 2"]}
    assert_as_unrolled(cases, "dynamic_lrp", [whiled])
    assert_as_unrolled({"lstm": lstm}, "cp_lrp", [fori, whiled])


@pytest.mark.parametrize("name", ["epsilon_plus_flat", "epsilon_gamma_box"])
def test_the_first_operation_may_be_in_the_first_iteration(name):
    if name == "epsilon_plus_flat":
        cases = {
            "layers": layers_from_x,
            "rnn": functools.partial(rnn, start="of x"),
            "gru": functools.partial(gru, start="of x"),
            "nested": nested,
            "swapped": swapped,
            "one array twice": same_twice,
            "ignoring": ignoring,
        }
        assert_as_unrolled(cases, name, [lax.scan, whiled])
    convs = {"convs from x": convs_from_x}
    assert_as_unrolled(convs, COMPOSITES[name], [lax.scan, whiled], IMAGE)


def test_a_loop_of_no_iterations():
    def model(p, x):
        h, ys = lax.scan(
            functools.partial(rnn_step, p), x[:, 0] @ p["start"], time_first(x)[:0]
        )
        return jnp.concatenate([h, ys.sum(0)], 1)[:, :3] @ p["out"]

    def unrolled(p, x):
        return x[:, 0] @ p["start"] @ p["out"]

    a, b = explained([unrolled, model], "epsilon_plus")
    assert_same(b, a)


def test_low_precision_is_accumulated_in_float32():
    low = functools.partial(jax.tree.map, lambda a: a.astype(jnp.bfloat16))

    def model(scan):
        def fn(p, x):
            def step(h, x):
                return jnp.tanh(x @ p["w"] + h @ p["u"] + p["b"]), h

            h = jnp.zeros((2, H), x.dtype)
            h, ys = scan(step, h, time_first(x))
            return (h + ys[2]) @ p["out"]

        return fn

    fns = [model(loop) for loop in (unrolled, lax.scan, whiled)]
    for composite in FEW:
        first, *others = explained(fns, composite, low(X), low(P))
        for other in others:
            assert other.dtype == jnp.float32
            assert_same(other, first, 2e-2)


# Carries whose promises differ: in parts, in dtype, between iterations and branches.


def complex_state(scan, use="carry"):
    """A linear recurrence with complex eigenvalues, as state-space models have."""

    def model(p, x):
        decay = p["decay"] * jnp.exp(1j * jnp.arange(1.0, H + 1))

        def step(h, x):
            h = decay * h + x @ p["w"]
            return h, (h * (1 + 2j)).real

        h, ys = scan(step, jnp.zeros((2, H), complex), time_first(x))
        return (h.real + h.imag if use == "carry" else ys[1] + ys[3]) @ p["out"]

    return model


def two_precisions(scan):
    """A state in float32 beside one in float64."""

    def model(p, x):
        def step(state, x):
            h, c = state
            z = x @ p["w"] + h.astype(x.dtype) @ p["u"]
            return (jnp.tanh(z.astype(jnp.float32)), jnp.tanh(c @ p["u"] + z)), h

        zero = jnp.zeros((2, H))
        (h, c), ys = scan(step, (zero.astype(jnp.float32), zero), time_first(x))
        return (c + h.astype(x.dtype) + ys[1].astype(x.dtype)) @ p["out"]

    return model


def branch_of_loops(scan):
    """Branches that hand back other parts: a loop, a map, the state itself."""

    def model(p, x):
        def step(h, xs):
            x, t = xs
            z = x @ p["w"] + h @ p["u"]

            def deeper(z):
                inner = lambda g, k: (jnp.tanh(g @ k + z), g)  # noqa: E731
                g, ys = scan(inner, z, p["layers"][:2])
                return g + ys[1]

            cases = (deeper, lambda z: relu(z + p["b"]), lambda z: h)
            if scan is unrolled:
                h = cases[t % 3](z)
            else:
                h = lax.switch(t % 3, cases, z)
            return h, h

        times = np.arange(T) if scan is unrolled else jnp.arange(T)
        h, ys = scan(step, p["h0"], (time_first(x), times))
        return (h + ys[1]) @ p["out"]

    return model


@pytest.mark.parametrize("name", ["attnlrp", "cp_lrp", "gradient_input"])
def test_complex_states(name):
    cases = {"carry": complex_state, "ys": functools.partial(complex_state, use="ys")}
    assert_as_unrolled(cases, name, [lax.scan, whiled])


def test_states_of_two_precisions():
    for composite in FEW:
        first, *others = explained(
            [two_precisions(loop) for loop in (unrolled, lax.scan, whiled)], composite
        )
        for other in others:
            assert other.dtype == first.dtype
            assert_same(other, first, 1e-5)


@table(FEW)
def test_branches_and_loops_in_loops_hand_back_their_own_parts(case):
    cases = {"branches": branch_of_loops}
    assert_as_unrolled(cases, case, [lax.scan, whiled])


@pytest.mark.parametrize("composite", ["epsilon_plus_flat", "dynamic_lrp"])
def test_parameters_of_chunked_and_peeled_loops(composite):
    """Those of first iterations and of chunks are added to those of the rest."""
    cases = {"rnn": functools.partial(rnn, start="of x"), "layers": layers_from_x}
    cases |= {"swapped": swapped, "branches": branch_of_loops}
    fns = [case(scan) for case in cases.values() for scan in (unrolled, lax.scan)]
    for residuals in ("keep", "sqrt"):
        options = {"wrt": ("x", "params"), "residuals": residuals}
        found = explained(fns, composite, **options)
        for expected, other in zip(found[::2], found[1::2], strict=True):
            assert_same(other, expected)


# Recurrences and maps.


@table(COMPOSITES)
def test_a_map_over_groups_is_a_vmap(case):
    def model(over):
        def fn(p, x):
            def norm(z):
                z = z - z.mean()
                return z * lax.rsqrt((z**2).mean() + 1e-5)

            return over(norm)(x).mean(1) @ p["w"] @ p["out"]

        return fn

    mapped = lambda f: lambda x: lax.map(f, x)  # noqa: E731
    batched = lambda f: lambda x: lax.map(f, x, batch_size=2)  # noqa: E731
    a, *others = explained([model(m) for m in (jax.vmap, mapped, batched)], case)
    for b in others:
        assert_same(b, a)


@pytest.mark.parametrize("name", ["attnlrp", "cp_lrp", "gradient_input", "exact"])
def test_a_linear_recurrence_in_three_spellings(name):
    """The same relevance where nothing stabilises: they add in another order."""

    def recurrent(scan):
        def fn(p, x):
            def step(h, z):
                h = p["decay"] * h + z
                return h, h

            zero = jnp.zeros((2, H))
            _, ys = scan(step, zero, time_first(x @ p["w"]))
            return (ys[-1] + ys[2]) @ p["out"]

        return fn

    def associative(p, x):
        h = x @ p["w"]
        join = lambda a, b: (a[0] * b[0], b[0] * a[1] + b[1])  # noqa: E731
        decay = jnp.broadcast_to(p["decay"], h.shape)
        _, ys = lax.associative_scan(join, (decay, h), axis=1)
        return (ys[:, -1] + ys[:, 2]) @ p["out"]

    composite = jlrp.composites.epsilon(0.0) if name == "exact" else name
    fns = [recurrent(unrolled), recurrent(lax.scan), associative]
    first, *others = explained(fns, composite)
    for other in others:
        assert_same(other, first)


# Loops whose trip count is known only when they run.


def counted(p, x):
    """As many iterations as the second part of x says."""
    x, n = x

    def body(state):
        i, h = state
        h = jnp.tanh(0.9 * h + 0.1 * (h @ p["u"]) + 0.05 * (x[:, 0] @ p["w"]) + p["b"])
        return i + 1, h

    start = (jnp.zeros_like(n), x[:, 1] @ p["start"])
    return lax.while_loop(lambda s: s[0] < n, body, start)[1] @ p["out"]


def counted_by_scan(n, p, x):
    """The same for a count that is known: a scan has no limit to its residuals."""
    x, _ = x

    def step(h, _):
        h = jnp.tanh(0.9 * h + 0.1 * (h @ p["u"]) + 0.05 * (x[:, 0] @ p["w"]) + p["b"])
        return h, None

    loop = unrolled if 0 < n < 4 else lax.scan
    return loop(step, x[:, 1] @ p["start"], length=n)[0] @ p["out"]


@table(FEW)
def test_dynamic_trip_counts(case):
    compiled = jlrp.explain(counted, composite=case)
    seed = jnp.array([[1.0, -1.0], [2.0, 0.5]])
    counts = (0, 1, 3, 64, 65, 130)
    xs = [(X, jnp.int32(n)) for n in counts]

    @jax.jit
    def expected(p, x):
        fns = [functools.partial(counted_by_scan, n) for n in counts]
        pairs = zip(fns, x, strict=True)
        return [jlrp.relevance(f, p, a, seed, composite=case)[0] for f, a in pairs]

    for x, other in zip(xs, expected(P, xs), strict=True):
        assert_same(compiled(P, x, seed).relevance[0], other)


def test_a_condition_on_the_data():
    def body(p, h):
        return 1.5 * h + 0.1 * jnp.abs(h @ p["u"])

    def model(p, x):
        h = x[:, 1] @ p["start"]
        loop = functools.partial(body, p)
        return lax.while_loop(lambda h: jnp.abs(h).sum() < 40.0, loop, h) @ p["out"]

    h, n = X[:, 1] @ P["start"], 0
    while jnp.abs(h).sum() < 40.0:
        h, n = body(P, h), n + 1
    assert n > 2

    def unrolled(p, x):
        h = x[:, 1] @ p["start"]
        for _ in range(n):
            h = body(p, h)
        return h @ p["out"]

    for composite in ("cp_lrp", "epsilon_plus", "dynamic_lrp"):
        a, b = explained([unrolled, model], composite)
        assert_same(b, a)


def while_in_scan(p, x):
    def outer(h, x):
        def inner(state):
            i, h = state
            return i + 1, jnp.tanh(h @ p["u"] + x @ p["w"])

        return lax.while_loop(lambda s: s[0] < 2, inner, (0, h))[1], None

    return lax.scan(outer, p["h0"], time_first(x))[0] @ p["out"]


def while_in_scan_unrolled(p, x):
    h = p["h0"]
    for t in range(T):
        for _ in range(2):
            h = jnp.tanh(h @ p["u"] + x[:, t] @ p["w"])
    return h @ p["out"]


def in_branch(model):
    def fn(p, x):
        short = lambda x: x[:, 0, :2]  # noqa: E731
        return lax.cond(p["b"].sum() < 99.0, lambda x: model(p, x), short, x)

    return fn


@table(FEW)
def test_loops_in_loops_and_branches(case):
    groups = [
        [while_in_scan_unrolled, while_in_scan],
        [rnn(unrolled), in_branch(rnn(lax.scan)), in_branch(rnn(whiled))],
        [static_cond(None), cond_in_scan(lax.scan), cond_in_scan(whiled)],
    ]
    found = iter(explained([fn for group in groups for fn in group], case))
    for group in groups:
        expected = next(found)
        for _ in group[1:]:
            assert_same(next(found), expected)


@table(FEW)
def test_a_batched_trip_count(case):
    """``vmap`` makes a loop that runs until the last example has ended."""

    def one(p, x, n):
        def body(state):
            i, h = state
            return i + 1, jnp.tanh(h @ p["u"] + x[0] @ p["w"])

        start = (jnp.zeros_like(n), x[1] @ p["start"])
        return lax.while_loop(lambda s: s[0] < n, body, start)[1] @ p["out"]

    counts = (2, 4)

    def model(p, x):
        return jax.vmap(one, (None, 0, 0))(p, x, jnp.array(counts))

    def expected(p, x):
        found = []
        for i, n in enumerate(counts):
            h = x[i, 1] @ p["start"]
            for _ in range(n):
                h = jnp.tanh(h @ p["u"] + x[i, 0] @ p["w"])
            found.append(h @ p["out"])
        return jnp.stack(found)

    a, b = explained([expected, model], case)
    assert_same(b, a)


def test_loops_without_relevance_are_just_run():
    def model(p, x):
        power = lambda s: (s[0] + 1, s[1] @ p["u"])  # noqa: E731
        k = lax.while_loop(lambda s: s[0] < 3, power, (0, p["u"]))[1]
        i = lax.while_loop(lambda i: x[0, 0, 0] + 5.0 > i, lambda i: i + 1, 0)
        count = lambda n, x: (n + (x[0, 0] > 0), None)  # noqa: E731
        n, _ = lax.scan(count, 0, time_first(x))
        return (x[:, 0] @ p["w"] @ k) * (i + n) @ p["out"]

    i = 0
    while X[0, 0, 0] + 5.0 > i:
        i += 1
    n = int((X[0, :, 0] > 0).sum())

    def expected(p, x):
        k = p["u"] @ p["u"] @ p["u"] @ p["u"]
        return (x[:, 0] @ p["w"] @ k) * (i + n) @ p["out"]

    a, b = explained([expected, model], "attnlrp")
    assert_same(b, a)
    kinds = {row.kind for row in jlrp.inspect(model, P, X, 0).operations}
    assert not kinds & {"scan", "while"}


# Branches.


def branches(p):
    return (
        lambda h: jnp.tanh(h @ p["u"]),
        lambda h: 2.0 * relu(h) + p["b"],
        lambda h: h,
        lambda h: p["h0"],  # it ignores x
    )


def taken(i):
    def fn(p, x):
        y = branches(p)[i](x[:, 0] @ p["w"])
        return (lax.optimization_barrier(y) + x[:, 1] @ p["start"]) @ p["out"]

    return fn


def switched(i):
    def fn(p, x):
        index = i + (p["b"][0] > 99.0).astype(jnp.int32)
        y = lax.switch(index, branches(p), x[:, 0] @ p["w"])
        return (y + x[:, 1] @ p["start"]) @ p["out"]

    return fn


def conditional(i):
    def fn(p, x):
        h = x[:, 0] @ p["w"]
        a, b, *_ = branches(p)
        y = lax.cond(h[0, 0] > 99.0 * i, a, b, h)  # it depends on x
        return (y + x[:, 1] @ p["start"]) @ p["out"]

    return fn


@table(COMPOSITES)
def test_a_branch_is_what_was_taken(case):
    fns = [f(i) for i in range(3) for f in (taken, switched)]
    fns += [taken(1), conditional(1)]
    if case in ("attnlrp", "cp_lrp", "gradient_input"):  # no stabiliser of a sum
        fns += [taken(3), switched(3)]
    found = explained(fns, case)
    for expected, other in zip(found[::2], found[1::2], strict=True):
        assert_same(other, expected)


def batched_switch(index):
    def fn(p, x):
        def one(x, i):
            tanh = lambda h: jnp.tanh(h @ p["u"])  # noqa: E731
            shifted = lambda h: 2.0 * relu(h) + p["b"]  # noqa: E731
            return lax.switch(i, [tanh, shifted], x[0] @ p["w"]) @ p["out"]

        return jax.vmap(one)(x, index(p, x))

    return fn


def each_taken(p, x):
    h = x[:, 0] @ p["w"]
    first = jnp.tanh(h[0] @ p["u"]) @ p["out"]
    second = (2.0 * relu(h[1]) + p["b"]) @ p["out"]
    return jnp.stack([first, second])


INDICES = {
    "constant": lambda p, x: jnp.arange(2),
    "of x": lambda p, x: (x[:, 0, 0] > 99.0) + jnp.arange(2),
}


@table(INDICES)
def test_a_batched_branch_is_a_selection(case):
    for composite in ("attnlrp", "epsilon_plus", "excitation_backprop", "dynamic_lrp"):
        a, b = explained([each_taken, batched_switch(case)], composite)
        assert_same(b, a)


def test_an_index_among_the_inputs_gets_nothing_from_a_branch():
    def model(p, x):
        return batched_switch(lambda p, _: x[1])(p, x[0])

    def expected(p, x):
        return each_taken(p, x[0])

    a, b = explained([expected, model], "attnlrp", (X, jnp.arange(2)))
    assert_same(b, a)


# Integer inputs inside of loops: right, or refused, but never silently zero.


def looked_up(scan, outside=False, floats=False):
    def fn(p, x):
        ids, xs = x if floats else (x, jnp.zeros((2, T, F)))
        if outside:
            xs = xs + p["table"][ids]

        def step(h, slices):
            i, x = slices
            return jnp.tanh((p["table"][i] + x) @ p["w"] + h @ p["u"]), None

        xs = (ids.T, time_first(xs))
        return scan(step, jnp.zeros((2, H)), xs)[0] @ p["out"]

    return fn


@pytest.mark.parametrize("loop", [lax.scan, whiled], ids=["scan", "while"])
@pytest.mark.parametrize("outside, floats", [(0, 0), (1, 0), (0, 1)])
def test_integer_inputs_of_a_loop(loop, outside, floats):
    ids = jnp.array([[0, 2, 1, 3], [1, 1, 0, 2]])
    p = P | {"table": P["start"].T[jnp.array([0, 1, 2, 0])]}
    x = (ids, X) if floats else ids
    fns = [looked_up(scan, outside, floats) for scan in (unrolled, loop)]
    (a,) = explained(fns[:1], "attnlrp", x, p)
    assert all(jnp.abs(r).max() > 1e-3 for r in jax.tree.leaves(a))
    try:
        (b,) = explained(fns[1:], "attnlrp", x, p)
    except jlrp.InputError as error:
        assert "loop" in str(error) and "integer" in str(error)
        return
    assert_same(b, a)


# The ledger.


@table({**FEW, "gradient_input": "gradient_input"})
def test_the_ledger_explains_loops(case):
    models = [
        attending(lax.scan),
        late(lax.scan, 2),
        cond_in_scan(lax.scan),
        rnn(whiled, "learned"),
    ]

    def fn(p, x):
        return sum(model(p, x) for model in models)

    ledger = jlrp.audit(fn, P, X, seed_of(fn, P, X), composite=case)
    assert {"scan", "while"} <= {row.kind for row in ledger.rows}
    scale = max(abs(ledger.seed), *(abs(row.arrived) for row in ledger.rows))
    causes = sum(sum(row.causes.values()) for row in ledger.rows)
    assert ledger.unexplained <= 1e-10 * scale
    assert abs(ledger.seed - ledger.relevance - causes) <= 1e-9 * scale


# Relevance of parameters.


def carried_parameters(scan):
    """A carry that is made of parameters alone, for ever."""

    def model(p, x):
        def step(state, x):
            h, k = state
            return (jnp.tanh(x @ p["w"] + h @ k), 0.5 * (k @ p["u"])), None

        start = (jnp.zeros((2, H)), p["u"])
        return scan(step, start, time_first(x))[0][0] @ p["out"]

    return model


def late_parameters(scan):
    """States made of parameters meet relevance some iterations later."""

    def model(p, x):
        def step(state, t):
            a, b, c = state
            new = jnp.tanh(x[:, 1] @ p["w"]) * (1.0 + t)
            return (new, jnp.tanh(a @ p["u"]), jnp.tanh(b @ p["u"])), c

        start = (p["h0"], 2.0 * p["h0"], p["h0"])
        (*_, c), ys = scan(step, start, jnp.arange(5.0))
        return (c + ys[1] + ys[-1]) @ p["out"]

    return model


WEIGHTED = {
    "rnn": functools.partial(rnn, start="learned"),
    "lstm": functools.partial(lstm, start="learned"),
    "reverse": functools.partial(rnn, start="learned", reverse=True),
    "layers": layers,
    "attending": attending,
    "nested": nested,
    "mixed dtypes": mixed_dtypes,
    "checkpoint": checkpointed,
    "carried parameters": carried_parameters,
    "late parameters": late_parameters,
}


@pytest.mark.parametrize("loop", [lax.scan, whiled], ids=["scan", "while"])
@table(WEIGHTED)
def test_relevance_of_parameters(case, loop):
    wrt = ("x", "params")
    a, b = explained([case(scan) for scan in (unrolled, loop)], "epsilon_plus", wrt=wrt)
    assert_same(b, a)


def test_relevance_of_parameters_of_branches():
    fns = [static_cond(None), cond_in_scan(lax.scan), cond_in_scan(whiled)]
    groups = [fns, [taken(1), switched(1)], [taken(3), switched(3)]]
    for first, *others in groups:
        a, *found = explained([first, *others], "attnlrp", wrt=("x", "params"))
        for b in found:
            assert_same(b, a)


# Transformations of relevance.


@pytest.mark.parametrize(
    "name, composite", [("scan", "dynamic_lrp"), ("cond", "epsilon_plus")]
)
def test_relevance_through_loops_is_transformed(name, composite):
    models = {
        "scan": (late(unrolled, 1), late(lax.scan, 1)),
        "cond": (static_cond(None), cond_in_scan(lax.scan)),
    }
    xs, direction = normal(3, *X.shape), normal(*X.shape)
    ways = []
    for fn in models[name]:
        seed = seed_of(fn, P, X)

        def explain(x, fn=fn, seed=seed):
            return jlrp.relevance(fn, P, x, seed, composite=composite)

        square = lambda x, explain=explain: (explain(x) ** 2).sum()  # noqa: E731
        ways.append(
            jax.jit(
                lambda x, xs, e=explain, s=square: (  # noqa: B023
                    e(x),
                    jax.vmap(e)(xs),
                    jax.grad(s)(x),
                    jax.vmap(jax.grad(s))(xs),
                )
            )
        )
    a, b = (way(X, xs) for way in ways)
    assert_same(b, a)
    assert_same(b[1][0], ways[1](xs[0], xs)[0])
    square = jax.jit(square)
    difference = square(X + 1e-5 * direction) - square(X - 1e-5 * direction)
    np.testing.assert_allclose((b[2] * direction).sum(), difference / 2e-5, rtol=1e-5)


def test_relevance_through_while_has_forward_derivatives_only():
    explain = lambda x: jlrp.relevance(rnn(whiled), P, x, 1)  # noqa: E731
    with pytest.raises(ValueError, match="Reverse-mode differentiation does not work"):
        jax.grad(lambda x: explain(x).sum())(X)
    expected = jax.jvp(lambda x: jlrp.relevance(rnn(unrolled), P, x, 1), (X,), (X,))
    assert_same(jax.jvp(explain, (X,), (X,)), expected)
    xs = normal(2, *X.shape)
    assert_same(jax.vmap(explain)(xs)[1], explain(xs[1]))


def test_relevance_of_batched_trip_counts():
    seed = jnp.array([[1.0, -1.0], [2.0, 0.5]])
    explain = lambda n: jlrp.relevance(counted, P, (X, n), seed)[0]  # noqa: E731
    found = jax.jit(jax.vmap(explain))(jnp.array([1, 3]))
    for n, r in zip((1, 3), found, strict=True):
        assert_same(r, explain(jnp.int32(n)))


# What is seen of loops.


def scoped(scan, tags=False):
    def model(p, x):
        def step(h, x):
            with jax.named_scope("input"):
                a = x @ p["w"]
            with jax.named_scope("state"):
                b = h @ p["u"]
            h = jnp.tanh(a + b)
            h = jlrp.tag(h, "hidden") if tags else h
            return h, h

        with jax.named_scope("rnn"):
            h, ys = scan(step, jnp.zeros((2, H)), time_first(x))
        return (h + ys[1]) @ p["out"]

    return model


def test_bodies_are_listed_with_their_depth():
    shapes = jax.eval_shape(lambda: (P, X))
    report = jlrp.inspect(nested(lax.scan), *shapes, 0, composite="epsilon")
    depths = [(row.kind, row.depth) for row in report.operations]
    assert {("scan", 0), ("scan", 1), ("dense", 2), ("activation", 2)} <= set(depths)
    assert "\n    dense" in str(report)
    numbers = jlrp.inspect(nested(lax.scan), P, X, 0, composite="epsilon")
    assert numbers.operations == report.operations
    branches = jlrp.inspect(cond_in_scan(lax.scan), *shapes, 0).operations
    assert {"cond"} == {row.kind for row in branches if row.depth == 1} & {"cond"}
    assert any(row.kind == "activation" and row.depth == 2 for row in branches)


def primitives(fn):
    coverage = jlrp.inspect(fn, P, X, 0).coverage
    assert coverage.covered == len(coverage.equations)
    return [e.primitive for e in coverage.equations]


def test_coverage_counts_each_equation_of_a_body_once():
    found = primitives(scoped(lax.scan))  # its first iteration has a plan of its own
    assert sorted(found) == sorted(
        ["transpose", "scan", "dot_general", "dot_general", "add", "tanh"]
        + ["slice", "squeeze", "add", "dot_general"]
    )
    for after in (1, 2, 3):
        assert primitives(late(lax.scan, after)).count("tanh") == after + 1
    assert primitives(cond_in_scan(lax.scan)).count("tanh") == 1


RULES = jlrp.rules
SELECTORS = {
    "scope": ("rnn/state", RULES.ZPlus()),
    "glob": ("*input", RULES.ZPlus()),
    "kind": ("dense", RULES.ZPlus()),
    "primitive": ("tanh", RULES.Gradient()),
    "both": (("rnn/*", "dense"), RULES.Gamma(0.5)),
    "predicate": (lambda op: op.scope == "rnn", RULES.Epsilon(0.2)),
}


@table(SELECTORS)
def test_selectors_reach_into_bodies(case):
    selector, rule = case
    if callable(selector):
        selector = lambda op: op.scope == "rnn" and op.kind == "add"  # noqa: E731
    composite = jlrp.Composite([(selector, rule)], base="epsilon")
    fns = [scoped(loop) for loop in (unrolled, lax.scan)]
    plain, *_ = explained(fns[:1], "epsilon")
    first, *others = explained(fns, composite)
    assert jnp.abs(first - plain).max() > 1e-3
    for other in others:
        assert_same(other, first)


def test_selectors_that_match_nothing():
    composite = jlrp.Composite([("rnn/nothing", RULES.ZPlus())])
    with pytest.raises(SelectorError, match="rnn/state"):
        jlrp.relevance(scoped(lax.scan), P, X, 0, composite=composite)


@pytest.mark.parametrize("kind", ["scan", "while", "cond"])
@pytest.mark.parametrize("rule", [RULES.Stop(), RULES.Gradient()])
def test_a_rule_for_a_whole_loop_is_used_or_refused(kind, rule):
    """It must not be ignored."""
    models = {"scan": rnn(lax.scan), "while": rnn(whiled), "cond": switched(0)}
    composite = jlrp.Composite([(kind, rule)], base="epsilon")
    try:
        report = jlrp.inspect(models[kind], P, X, 0, composite=composite)
    except SelectorError as error:
        assert kind in str(error)
    else:
        assert [r.rule for r in report.operations if r.kind == kind] == [repr(rule)]


double = jax.extend.core.Primitive("double")
double.def_impl(lambda x: 2.0 * x)
double.def_abstract_eval(lambda x: x)
mlir.register_lowering(double, mlir.lower_fun(lambda x: 2.0 * x, False))
ad.deflinear2(double, lambda ct, x: [double.bind(ct)])


def with_primitive(scan):
    def model(p, x):
        def step(h, x):
            h = jnp.tanh(x @ p["w"] + h @ p["u"])
            with jax.named_scope("mine"):
                h = double.bind(h)  # here
            return h, None

        return scan(step, jnp.zeros((2, H)), time_first(x))[0] @ p["out"]

    return model


def in_cond(p, x):
    with jax.named_scope("mine"):
        h = lax.cond(p["b"][0] < 99.0, double.bind, relu, x[:, 0] @ p["w"])  # here
    return h @ p["out"]


@pytest.mark.parametrize(
    "fn", [with_primitive(lax.scan), with_primitive(whiled), in_cond]
)
def test_a_missing_rule_in_a_body_is_an_error(fn):
    with pytest.raises(UnsupportedPrimitiveError) as caught:
        jlrp.relevance(fn, P, X, 0)
    assert "`double`" in str(caught.value) and "mine" in str(caught.value)
    line = int(re.search(r"test_control_flow.py:(\d+)", str(caught.value))[1])
    assert linecache.getline(__file__, line).strip().endswith("# here")
    coverage = jlrp.inspect(fn, P, X, 0).coverage
    assert coverage.uncovered == 1 and coverage.fallback == 0


@pytest.mark.parametrize("fallback", ["gradient", "stop"])
def test_fallbacks_in_bodies(fallback):
    fns = [with_primitive(loop) for loop in (unrolled, lax.scan, whiled)]
    a, *others = explained(fns, "epsilon_plus", fallback=fallback)
    assert bool(jnp.any(a != 0)) == (fallback == "gradient")
    for b in others:
        assert_same(b, a)
    coverage = jlrp.inspect(fns[1], P, X, 0, fallback=fallback).coverage
    assert coverage.uncovered == 0 and coverage.fallback == 1


def test_registered_and_custom_rules_in_bodies(monkeypatch):
    monkeypatch.setitem(rules._registered, double, RULES.Pass())
    fns = [with_primitive(loop) for loop in (unrolled, lax.scan, whiled)]
    a, *others = explained(fns, "epsilon_plus")
    for b in others:
        assert_same(b, a)

    @jlrp.custom_relevance
    def squashed(z):
        return jnp.sin(z)

    squashed.def_relevance(lambda r, x, y: (0.5 * r,))

    def model(scan):
        def fn(p, x):
            step = lambda h, x: (squashed(x @ p["w"] + h @ p["u"]), None)  # noqa: E731
            return scan(step, jnp.zeros((2, H)), time_first(x))[0] @ p["out"]

        return fn

    fns = [model(loop) for loop in (unrolled, lax.scan, whiled)]
    a, *others = explained(fns, "epsilon_plus")
    for b in others:
        assert_same(b, a)


@pytest.mark.parametrize("loop", [lax.scan, whiled], ids=["scan", "while_loop"])
def test_names_inside_of_bodies(loop):
    fns = [scoped(loop, tags=True) for loop in (unrolled, loop)]
    names = ("hidden", "rnn/state", "rnn/input")
    a, b = (
        jlrp.explain(fn, capture=names, composite="epsilon", capture_steps=T)(P, X, 0)
        for fn in fns
    )
    assert_same(b.relevance, a.relevance)  # a tag changes nothing
    assert_same(b.captured, {n: jnp.stack(rows) for n, rows in a.captured.items()})


def test_a_name_both_inside_and_outside_of_a_body():
    def fn(p, x):
        return jlrp.tag(scoped(lax.scan, tags=True)(p, x), "hidden")

    inside, outside = jlrp.explain(fn, capture="hidden")(P, X, 0).captured["hidden"]
    assert inside.shape == (T, 2, H) and outside.shape == (2, 2)
    with pytest.raises(SelectorError, match="names 2"):
        jlrp.explain(fn, condition={"hidden": jnp.zeros(2)})(P, X, 0)


def test_names_of_outputs_of_loops():
    def model(scan):
        def fn(p, x):
            step = functools.partial(rnn_step, p)
            h, ys = scan(step, jnp.zeros((2, H)), time_first(x))
            return (h + jlrp.tag(ys, "states")[1]) @ p["out"]

        return fn

    mask = jnp.array([1.0, 0.0, 1.0])
    a, b = (
        jlrp.explain(model(s), capture="states", condition={"states": mask})(P, X, 0)
        for s in (unrolled, lax.scan)
    )
    assert_same((b.captured, b.relevance), (a.captured, a.relevance))


# Cost.


def equations_of(jaxpr):
    total = len(jaxpr.eqns)
    for eqn in jaxpr.eqns:
        for param in jax.tree.leaves(
            list(eqn.params.values()), is_leaf=lambda p: hasattr(p, "eqns")
        ):
            inner = getattr(param, "jaxpr", param)
            total += equations_of(inner) if hasattr(inner, "eqns") else 0
    return total


@table(COMPOSITES)
def test_the_program_does_not_grow_with_the_length(case):
    for loop in (lax.scan, whiled):
        fn = rnn(loop, start="learned", use="carry")
        sizes = {
            equations_of(
                jax.make_jaxpr(
                    lambda x: jlrp.relevance(fn, P, x, 0, composite=case)  # noqa: B023
                )(jnp.ones((2, n, F))).jaxpr
            )
            for n in (6, 60)
        }
        assert len(sizes) == 1


def nested_layers(p, x):
    def outer(h, kernel):
        step = lambda g, k: (jnp.tanh(g @ k + h @ kernel), None)  # noqa: E731
        return lax.scan(step, h, p["layers"])[0], None

    return lax.scan(outer, x[:, 0] @ p["w"], p["layers"])[0] @ p["out"]


def while_from_x(p, x):
    step = lambda s: (s[0] + 1, jnp.tanh(s[1] @ p["u"]))  # noqa: E731
    return lax.while_loop(lambda s: s[0] < 5, step, (0, x[:, 0] @ p["w"]))[1] @ p["out"]


TRACED = {
    "scan": (layers(lax.scan), 1),
    "a first iteration of its own": (rnn(lax.scan), 2),
    "nested scans": (nested_layers, 2),
    "while": (while_from_x, 1),
    "branches": (switched(1), 4),
}


@pytest.mark.parametrize("residuals", ["keep", "sqrt"])
@table(TRACED)
def test_each_body_is_traced_once_in_reverse(case, residuals, monkeypatch):
    fn, n_bodies = case
    traced = []
    reverse_body = EvalContext.reverse_body

    def counted(self, plan, *args, **kwargs):
        traced.append(plan)
        return reverse_body(self, plan, *args, **kwargs)

    monkeypatch.setattr(EvalContext, "reverse_body", counted)
    options = {"composite": "dynamic_lrp", "residuals": residuals}
    explain = lambda p, x: jlrp.relevance(fn, p, x, 0, **options)  # noqa: E731
    jax.make_jaxpr(explain)(P, X)
    assert len(traced) == len(set(traced)) == n_bodies


@pytest.mark.parametrize("composite", ["attnlrp", "epsilon"])
def test_memory_is_that_of_the_gradient(composite):
    """Temporary memory of a compiled 32-step tanh RNN, against ``jax.grad``."""
    batch, width = 16, 64
    p = {"w": jnp.ones((8, width)), "u": jnp.ones((width, width)), "b": jnp.ones(width)}
    x = jnp.ones((batch, 32, 8))

    def model(p, x):
        step = lambda h, x: (jnp.tanh(x @ p["w"] + h @ p["u"] + p["b"]), None)  # noqa: E731
        return lax.scan(step, jnp.zeros((batch, width)), time_first(x))[0].sum(1)

    def temporary(fn):
        compiled = jax.jit(fn).lower(p, x).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    gradient = temporary(jax.grad(lambda p, x: model(p, x).sum(), argnums=1))
    explain = functools.partial(jlrp.relevance, model, composite=composite)
    assert temporary(explain) <= 1.2 * gradient


# Recurrent layers of libraries.


SINGLE = X.astype(jnp.float32)


@pytest.mark.parametrize("cell", ["LSTMCell", "GRUCell"])
def test_linen_rnns(cell):
    nn = pytest.importorskip("flax.linen")
    single = getattr(nn, cell)(H)
    layer = nn.RNN(getattr(nn, cell)(H))
    params = layer.init(jax.random.key(0), SINGLE)

    def scanned(p, x):
        return layer.apply(p, x)[:, -1]

    def unrolled(p, x):
        weights = {"params": p["params"]["cell"]}
        carry = single.initialize_carry(jax.random.key(0), x[:, 0].shape)
        for t in range(T):
            carry, y = single.apply(weights, carry, x[:, t])
        return y

    np.testing.assert_allclose(
        scanned(params, SINGLE), unrolled(params, SINGLE), rtol=1e-5
    )
    a, b = explained([unrolled, scanned], "cp_lrp", SINGLE, params)
    assert_same(b, a, 1e-4)


def test_nnx_rnns():
    nnx = pytest.importorskip("flax.nnx")
    cell = nnx.LSTMCell(F, H, rngs=nnx.Rngs(0))
    graph, params = nnx.split(nnx.RNN(cell))

    def scanned(p, x):
        return nnx.merge(graph, p)(x)[:, -1]

    def unrolled(p, x):
        cell = nnx.merge(graph, p).cell
        carry = cell.initialize_carry(x[:, 0].shape, nnx.Rngs(0))
        for t in range(T):
            carry, y = cell(carry, x[:, t])
        return y

    a, b = explained([unrolled, scanned], "cp_lrp", SINGLE, params)
    assert_same(b, a, 1e-4)


def test_keras_lstms():
    os.environ.setdefault("KERAS_BACKEND", "jax")
    keras = pytest.importorskip("keras")
    if keras.backend.backend() != "jax":
        pytest.skip("keras was imported with another backend")
    layer = keras.layers.LSTM(H, name="lstm")
    net = keras.Sequential([keras.Input((T, F)), layer])
    from jlrp.integrations import keras as integration

    fn, params = integration.model(net)
    kernel, recurrent, bias = (jnp.asarray(w.value) for w in layer.weights)

    def unrolled(_, x):
        h = c = jnp.zeros((2, H), jnp.float32)
        for t in range(T):
            i, f, g, o = jnp.split(x[:, t] @ kernel + h @ recurrent + bias, 4, -1)
            c = sigmoid(f) * c + sigmoid(i) * jnp.tanh(g)
            h = sigmoid(o) * jnp.tanh(c)
        return h

    np.testing.assert_allclose(fn(params, SINGLE), unrolled(params, SINGLE), atol=1e-5)
    a, b = explained([unrolled, fn], "cp_lrp", SINGLE, params)
    assert_same(b, a, 1e-4)
    assert jlrp.audit(fn, params, SINGLE, 0, composite="epsilon").unexplained < 1e-5
