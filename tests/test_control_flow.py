"""Loops and branches are explained as the programs that they stand for.

A model here is written once, with its loop as an argument: the same model unrolled in
Python is the reference for ``lax.scan``, ``lax.fori_loop`` and ``lax.while_loop``.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jlrp

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
T, F, H = 5, 4, 3
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
        masks = jnp.array([True, False, True, True, False])
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
        return (a + 2.0 * b + ys[3] + xs[1, :, :H]) @ p["out"]

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
        step = lambda a, x: (lax.optimization_barrier(a) + x @ p["w"], None)  # noqa: E731
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
    "rnn": rnn,
    "rnn with a learned start": functools.partial(rnn, start="learned"),
    "rnn that starts from x": functools.partial(rnn, start="of x"),
    "lstm": lstm,
    "gru": gru,
    "layers": layers,
    "convs": convs,
    "attending": attending,
}
MORE = {
    "lstm with a learned start": functools.partial(lstm, start="learned"),
    "gru that starts from x": functools.partial(gru, start="of x"),
    "only ys": functools.partial(rnn, use="ys"),
    "only the carry": functools.partial(rnn, use="carry"),
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
    "sum": residual_sum,
    "ignoring": ignoring,
    "layers from x": layers_from_x,
}
MORE |= {f"active after {n}": functools.partial(late, after=n) for n in range(6)}
MORE |= {f"length {n}": functools.partial(of_length, n=n) for n in (1, 2)}
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


@table(FEW)
@pytest.mark.parametrize("half", [0, 1])
def test_scan_is_the_unrolled_loop_in_every_use(case, half):
    names = list(MORE)[half::2]
    assert_as_unrolled({k: MORE[k] for k in names}, case, [lax.scan])
