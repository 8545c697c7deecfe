"""Quantised layers equal their straight-through twins; decoys are what they were.

The twin is written by hand: the signal over its scale, plus a constant that rounds it,
with scales and zero points held constant.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jlrp

pytestmark = pytest.mark.relaxed
RNG = np.random.default_rng(7)
hold = lax.stop_gradient


def normal(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


X = normal(3, 8)
WEIGHTS = {"w": normal(8, 6), "b": normal(6), "v": normal(6, 4), "skip": normal(8, 4)}


def quantised(w, axis=0, largest=127, dtype=jnp.int8):
    t = jnp.abs(w).max(axis, keepdims=True) / largest
    return jnp.round(w / t).astype(dtype), t


def contracted(i, q):
    """A dot in integers, accumulated in 32 bits."""
    dims = (((1,), (0,)), ((), ()))
    return lax.dot_general(i, q, dims, preferred_element_type=jnp.int32)


def largest(h, axis=-1):
    return jnp.abs(h).max(axis, keepdims=True)


# How activations are quantised: scale, zero point, rounding of what is scaled, dtype.

SYMMETRIC = lambda v: jnp.round(v)  # noqa: E731
CLIPPED = lambda v: jnp.clip(jnp.round(v), -127, 127)  # noqa: E731
SCHEMES = {
    "by row": (lambda h: largest(h) / 127, None, SYMMETRIC, jnp.int8),
    "by tensor": (lambda h: jnp.abs(h).max() / 127, None, SYMMETRIC, jnp.int8),
    "by channel": (lambda h: largest(h, 0) / 127 + 0.01, None, SYMMETRIC, jnp.int8),
    "clipped after": (lambda h: largest(h) / 160, None, CLIPPED, jnp.int8),
    "clipped before": (
        lambda h: largest(h) / 127,
        None,
        lambda v: jnp.round(jnp.clip(v, -127, 127)),
        jnp.int8,
    ),
    "stopped scale": (lambda h: hold(largest(h) / 127), None, SYMMETRIC, jnp.int8),
    "power of two": (
        lambda h: jnp.exp2(jnp.ceil(jnp.log2(largest(h) / 127))),
        None,
        SYMMETRIC,
        jnp.int8,
    ),
    "guarded": (
        lambda h: jnp.where(largest(h) == 0, 1.0, largest(h) / 127),
        None,
        SYMMETRIC,
        jnp.int8,
    ),
    "mean": (lambda h: jnp.abs(h).mean() / 20, None, CLIPPED, jnp.int8),
    "four bits": (
        lambda h: largest(h) / 7,
        None,
        lambda v: jnp.clip(jnp.round(v), -8, 7),
        jnp.int4,
    ),
    "wide": (lambda h: largest(h) / 127, None, SYMMETRIC, jnp.int32),
    "static": (lambda h: 0.03, None, CLIPPED, jnp.int8),
    "zero point": (
        lambda h: (h.max(-1, keepdims=True) - h.min(-1, keepdims=True)) / 255,
        lambda h, s: jnp.round(-h.min(-1, keepdims=True) / s) - 128,
        lambda v: jnp.clip(jnp.round(v), -128, 127),
        jnp.int8,
    ),
    "half added": (
        lambda h: largest(h) / 127,
        None,
        lambda v: jnp.floor(v + 0.5),
        jnp.int8,
    ),
}


def by_integers(scheme, h, q, t):
    scale, zero, rounds, dtype = scheme
    s = scale(h)
    if zero is None:
        i = rounds(h / s).astype(dtype)
        if jnp.shape(s)[-1:] > (1,):  # by channel: scaled back before the dot
            return (i.astype(jnp.float32) * s) @ (q.astype(jnp.float32) * t)
        return contracted(i.astype(jnp.int8), q).astype(jnp.float32) * s * t
    z = zero(h, s)
    i = rounds(h / s + z).astype(dtype)
    shifted = i.astype(jnp.int32) - z.astype(jnp.int32)
    return contracted(shifted, q.astype(jnp.int32)).astype(jnp.float32) * s * t


def straight_through(scheme, h, q, t):
    scale, zero, rounds, _ = scheme
    s = hold(scale(h))
    z = 0.0 if zero is None else hold(zero(h, s))
    v = h / s + z
    rounded = rounds(v)
    inside = jnp.abs(rounded - v) < 1  # a clip takes more than rounding would
    v = jnp.where(inside, v, 0)
    if jnp.shape(s)[-1:] > (1,):
        return ((v + hold(rounded - v)) * s) @ (q.astype(jnp.float32) * t)
    return ((v + hold(rounded - v) - z) @ q.astype(jnp.float32)) * s * t


def network(layer, scheme):
    def fn(p, x):
        h = jax.nn.relu(layer(scheme, x, *p["w"]) + p["b"])
        return layer(scheme, h, *p["v"]) + x @ p["skip"]

    return fn


P = {k: quantised(v) if k in "wv" else v for k, v in WEIGHTS.items()}


def difference(one, other):
    return float(jnp.abs(one - other).max() / jnp.abs(other).max())


@pytest.mark.parametrize("name", SCHEMES)
def test_integers_equal_the_straight_through_twin(name):
    fn, twin = (
        network(layer, SCHEMES[name]) for layer in (by_integers, straight_through)
    )
    np.testing.assert_allclose(fn(P, X), twin(P, X), rtol=1e-4, atol=1e-5)
    ours = jlrp.relevance(fn, P, X, 0, composite="epsilon_plus")
    expected = jlrp.relevance(twin, P, X, 0, composite="epsilon_plus")
    assert difference(ours, expected) < 1e-5


def test_the_ledger_of_a_quantised_network_balances():
    fn = network(by_integers, SCHEMES["zero point"])
    ledger = jlrp.audit(fn, P, X, 0, composite="attnlrp")
    assert ledger.unexplained < 1e-5
    causes = sum(ledger.total(cause) for cause in jlrp.reports.CAUSES)
    np.testing.assert_allclose(ledger.relevance + causes, ledger.seed, rtol=1e-4)


def test_what_rounding_took_is_the_cause_rounding():
    scale = lambda h: largest(h) / 127  # noqa: E731

    def fn(q, x):
        s = scale(x)
        return (jnp.round(x / s).astype(jnp.int8).astype(jnp.float32) @ q) * s

    q = normal(8, 2)
    s = np.asarray(scale(X), np.float64)
    x, w = np.asarray(X, np.float64), np.asarray(q, np.float64)[:, 0]
    taken = ((np.round(x / s) - x / s) * w * s).sum()
    ledger = jlrp.audit(fn, q, X, 0, composite="attnlrp")
    np.testing.assert_allclose(ledger.total("rounding"), taken, rtol=1e-4)
    np.testing.assert_allclose(ledger.relevance, (x * w).sum(), rtol=1e-5)
    assert ledger.total("stopped") == 0


def test_nothing_passes_where_a_clip_cuts():
    x = jnp.array([[0.5, 3.0, -0.2, -9.0]])
    w = jnp.array([[1.0], [2.0], [3.0], [4.0]])

    def fn(w, x):  # numbers up to 127 * .01
        i = jnp.clip(jnp.round(x / 0.01), -127, 127).astype(jnp.int8)
        return (i.astype(jnp.float32) @ w) * 0.01

    relevance = jlrp.relevance(fn, w, x, composite="attnlrp")
    np.testing.assert_allclose(relevance, [[0.5, 0, -0.6, 0]], rtol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float8_e4m3fn, jnp.float8_e5m2])
def test_float8_by_hand(dtype):
    limit = float(jnp.finfo(dtype).max)
    w = P["w"][0].astype(jnp.float32)

    def fn(p, x):
        s = largest(x) / limit
        f = jnp.clip(x / s, -limit, limit).astype(dtype)
        q = (w / 127).astype(dtype)
        dims = (((1,), (0,)), ((), ()))
        return lax.dot_general(f, q, dims, preferred_element_type=jnp.float32) * s

    def twin(p, x):
        s = hold(largest(x) / limit)
        v = x / s
        q = (w / 127).astype(dtype).astype(jnp.float32)
        return ((v + hold(v.astype(dtype).astype(jnp.float32) - v)) @ q) * s

    ours = jlrp.relevance(fn, P, X, 0, composite="attnlrp")
    assert difference(ours, jlrp.relevance(twin, P, X, 0, composite="attnlrp")) < 1e-5


def test_convolutions_scans_batches_and_calls():
    """A quantised convolution; layers in a scan; vmap; a custom_vjp around a layer."""
    kernels, scales = quantised(normal(3, 1, 3, 3, 1) / 2, (1, 2, 3, 4))
    images = normal(2, 5, 5, 1)
    dims = ("NHWC", "HWIO", "NHWC")

    def conv(i, k, dtype):
        return lax.conv_general_dilated(
            i, k, (1, 1), "SAME", dimension_numbers=dims, preferred_element_type=dtype
        )

    kernels = kernels.reshape(3, 3, 3, 1, 1)

    def layer(h, k, t):
        s = jnp.abs(h).max((1, 2, 3), keepdims=True) / 127
        i = jnp.round(h / s).astype(jnp.int8)
        return conv(i, k, jnp.int32).astype(jnp.float32) * s * t

    def twin(h, k, t):
        s = hold(jnp.abs(h).max((1, 2, 3), keepdims=True) / 127)
        v = h / s
        return conv(v + hold(jnp.round(v) - v), k.astype(jnp.float32), None) * s * t

    @jax.custom_vjp
    def called(h, k, t):
        return layer(h, k, t)

    called.defvjp(lambda *a: (layer(*a), a[1:]), lambda a, g: (g, None, None))

    def scanned(layer):
        def step(h, p):
            return h + jax.nn.relu(layer(h, *p)), None

        return lambda p, x: lax.scan(step, x, p)[0].sum((1, 2))

    params = (kernels, scales.reshape(3, 1))
    expected = jlrp.relevance(scanned(twin), params, images, 0, composite="attnlrp")
    for name in (layer, called):
        ours = jlrp.relevance(scanned(name), params, images, 0, composite="attnlrp")
        assert difference(ours, expected) < 1e-5
    one = scanned(layer)
    alone = jax.vmap(lambda x: one(params, x[None])[0])
    ours = jlrp.relevance(lambda _, x: alone(x), None, images, 0, composite="attnlrp")
    assert difference(ours, expected) < 1e-5


def test_attention_in_integers():
    """Projections, scores and read-out are quantised products of two active values."""
    w = {k: quantised(normal(8, 8)) for k in "qkvo"}
    x = normal(2, 5, 8)

    def number(h, by_hand):
        s = largest(h) / 127
        if not by_hand:
            return jnp.round(h / s).astype(jnp.int8), s
        s = hold(s)
        return h / s + hold(jnp.round(h / s) - h / s), s

    def product(spec, a, b, by_hand):
        dtype = jnp.float32 if by_hand else jnp.int32
        return jnp.einsum(spec, a, b, preferred_element_type=dtype).astype(jnp.float32)

    def attention(by_hand):
        def dense(h, q, t):
            i, s = number(h, by_hand)
            q = q.astype(jnp.float32) if by_hand else q
            return product("bti,ij->btj", i, q, by_hand) * s * t

        def fn(p, x):
            q, k, v = (dense(x, *p[name]) for name in "qkv")
            (qi, qs), (ki, ks) = number(q, by_hand), number(k, by_hand)
            scores = product("btd,bsd->bts", qi, ki, by_hand) * qs * ks[..., 0][:, None]
            weights = jax.nn.softmax(scores / 8**0.5)
            return dense(x + dense(weights @ v, *p["o"]), *p["o"]).mean(1)

        return fn

    ours = jlrp.relevance(attention(False), w, x, 0, composite="attnlrp")
    expected = jlrp.relevance(attention(True), w, x, 0, composite="attnlrp")
    assert difference(ours, expected) < 1e-5


def test_gradient_input_stays_the_gradient():
    fn = network(by_integers, SCHEMES["by row"])
    expected = jax.jit(jax.grad(lambda x: fn(P, x)[:, 0].sum()))(X) * X
    ours = jlrp.relevance(fn, P, X, 0, composite="gradient_input")
    assert difference(ours, expected) < 1e-5


def test_relevance_of_parameters_goes_through_quantised_weights():
    def fn(p, x):
        q, t = quantised(p["w"])
        return by_integers(SCHEMES["by row"], x, q, t)

    def twin(p, x):
        t = hold(jnp.abs(p["w"]).max(0, keepdims=True) / 127)
        v = p["w"] / t
        return straight_through(SCHEMES["by row"], x, v + hold(jnp.round(v) - v), t)

    options = {"composite": "attnlrp", "wrt": "params"}
    ours = jlrp.relevance(fn, WEIGHTS, X, 0, **options)["w"]
    expected = jlrp.relevance(twin, WEIGHTS, X, 0, **options)["w"]
    assert np.any(expected) and difference(ours, expected) < 1e-5


# What is no quantised layer: its relevance is that of JAX's gradient.

TABLE = normal(16, 4)
DECOYS = {
    "binary weights of x": lambda p, x: (jnp.sign(x) * jnp.abs(x).mean()) @ p["skip"],
    "a rounded scale": lambda p, x: jnp.round(jnp.abs(x).max() * 4) * (x @ p["skip"]),
    "floor plus fraction": lambda p, x: (
        (jnp.floor(x / 0.3) * 0.3 + (x - jnp.floor(x / 0.3) * 0.3)) @ p["skip"]
    ),
    "buckets": lambda p, x: (
        x @ p["skip"]
        + TABLE[jnp.round((x - x.min()) / (x.max() - x.min()) * 15).astype(int)].sum(1)
    ),
    "bytes as buckets": lambda p, x: (
        x @ p["skip"]
        + TABLE[
            jnp.clip(jnp.round(x / jnp.abs(x).max() * 7 + 8), 0, 15).astype(jnp.uint8)
        ].sum(1)
    ),
    "a hash": lambda p, x: (
        x @ p["skip"]
        + TABLE[(jnp.floor(x / 0.3).astype(jnp.int32) * 7919 ^ 31) & 15].sum(1)
    ),
    "compared": lambda p, x: (
        ((jnp.round(x / jnp.abs(x).max() * 7).astype(jnp.int8) > 2) * x) @ p["skip"]
    ),
    "decimals": lambda p, x: x @ p["skip"] + jnp.round(x, 1) @ p["skip"],
    "whole numbers": lambda p, x: (
        x @ p["skip"] + (x * 3).astype(jnp.int32).astype(x.dtype) @ p["skip"]
    ),
}


@pytest.mark.filterwarnings("ignore::jlrp.JlrpWarning")
@pytest.mark.parametrize("name", DECOYS)
def test_decoys_are_what_they_were(name):
    fn = DECOYS[name]
    rows = jlrp.inspect(fn, WEIGHTS, X, 0).operations
    assert "rounding" not in {row.kind for row in rows}
    uniform = jlrp.Composite([], base="gradient_input", as_differentiated=False)
    ours = jlrp.relevance(fn, WEIGHTS, X, 0, composite=uniform)
    expected = jax.grad(lambda x: fn(WEIGHTS, x)[:, 0].sum())(X) * X
    assert difference(ours, expected) < 1e-5


# Qwix and AQT, on the same float weights.


class Float:
    """``relu(x @ w + b) @ v`` with its products quantised by ``product``."""

    def __init__(self, product):
        self.product = product

    def __call__(self, p, x):
        h = jax.nn.relu(self.product(x, p["w"]) + p["b"])
        return self.product(h, p["v"])


def twin_product(steps, bound, round_first):
    """The straight-through twin of a product whose scale is largest / steps."""

    def rounded(v):
        if round_first:
            return jnp.clip(jnp.round(v), -bound - 1, bound)
        return jnp.round(jnp.clip(v, -bound, bound))

    def product(h, w):
        s, t = hold(largest(h) / steps), largest(w, 0) / steps
        v = h / s
        return (v + hold(rounded(v) - v)) @ rounded(w / t) * s * t

    return product


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_qwix():
    qwix = pytest.importorskip("qwix")
    nn = pytest.importorskip("flax.linen")

    class Network(nn.Module):
        @nn.compact
        def __call__(self, x):
            h = jax.nn.relu(nn.Dense(6, name="w")(x))
            return nn.Dense(4, use_bias=False, name="v")(h)

    model = Network()
    w = WEIGHTS
    params = {"w": {"kernel": w["w"], "bias": w["b"]}, "v": {"kernel": w["v"]}}
    types = {"weight_qtype": jnp.int8, "act_qtype": jnp.int8, "module_path": ".*"}
    trained = qwix.quantize_model(model, qwix.QtProvider([qwix.QtRule(**types)]))
    after = qwix.quantize_model(
        model, qwix.PtqProvider([qwix.QuantizationRule(**types)])
    )
    abstract = after.init(jax.random.key(0), X)["params"]
    expected = jlrp.relevance(Float(twin_product(127.5, 127, True)), w, X, 0)
    for network, p in (
        (trained, params),
        (after, qwix.quantize_params(params, abstract)),
    ):
        fn = lambda p, x, network=network: network.apply({"params": p}, x)  # noqa: E731
        assert difference(jlrp.relevance(fn, p, X, 0), expected) < 1e-5


def test_aqt():
    config = pytest.importorskip("aqt.jax.v2.config")
    dot = config.fully_quantized(fwd_bits=8, bwd_bits=8)
    fn = Float(lambda h, w: dot(h, w, (((1,), (0,)), ((), ()))))
    ours = jlrp.relevance(fn, WEIGHTS, X, 0)
    expected = jlrp.relevance(Float(twin_product(127.5, 127, False)), WEIGHTS, X, 0)
    assert difference(ours, expected) < 1e-5
