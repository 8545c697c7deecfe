"""Facts are found in every spelling, and not in their decoys."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jlrp

pytestmark = pytest.mark.relaxed
KEYS = iter(jax.random.split(jax.random.key(0), 50))
P = {name: jax.random.normal(next(KEYS), (5, 5)) for name in ("u", "v", "w")}
P |= {name: jax.random.normal(next(KEYS), (5,)) for name in ("a", "b", "c")}
X = jax.random.normal(next(KEYS), (3, 5))
EXACT = jlrp.composites.epsilon(0.0)


def kinds(fn):
    report = jlrp.inspect(fn, P, X, jnp.ones(jax.eval_shape(fn, P, X).shape))
    return [row.kind for row in report.operations]


def relevance(fn, composite=EXACT):
    seed = jnp.ones(jax.eval_shape(fn, P, X).shape)
    return jlrp.relevance(fn, P, X, seed, composite=composite)


ACTIVATIONS = {
    "relu": jax.nn.relu,
    "relu by mask": lambda x: x * (x > 0).astype(x.dtype),
    "relu by where": lambda x: jnp.where(x > 0, x, 0.0),
    "gelu": jax.nn.gelu,
    "gelu erf": lambda x: jax.nn.gelu(x, approximate=False),
    "silu": jax.nn.silu,
    "quick gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "mish": lambda x: x * jnp.tanh(jax.nn.softplus(x)),
    "hard swish": jax.nn.hard_swish,
    "leaky": jax.nn.leaky_relu,
    "prelu": lambda x: jnp.where(x > 0, x, P["a"] * x),
    "elu": jax.nn.elu,
    "tanh": jnp.tanh,
    "squared relu": lambda x: jnp.square(jax.nn.relu(x)),
    "a user's own": lambda x: x / (1 + jnp.abs(x)) + 0.1 * x**3,
    "exp(x) - 1": lambda x: jnp.exp(x) - 1,
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation_is_one_operation_and_passes(name):
    def fn(p, x):
        return ACTIVATIONS[name](x @ p["u"] + p["b"]) @ p["v"]

    assert kinds(fn) == ["dense", "activation", "dense"]
    # Passing conserves: the input gets what the first bias leaves of the output.
    ledger = jlrp.audit(fn, P, X, jnp.ones((3, 5)), composite=EXACT)
    absorbed = ledger.total("bias")
    assert ledger.total("taylor") == 0
    assert abs(ledger.seed - ledger.relevance - absorbed) < 1e-10 * abs(ledger.seed)


OPEN = {
    "sigmoid": (jax.nn.sigmoid, lambda x: 1 / (1 + jnp.exp(-x))),
    "softplus": (jax.nn.softplus, lambda x: jnp.log1p(jnp.exp(x))),
    "logaddexp": (jax.nn.softplus, lambda x: jnp.logaddexp(x, 0.0)),
    "one minus sigmoid": (
        lambda x: 1 - jax.nn.sigmoid(x),
        lambda x: jax.nn.sigmoid(-x),
    ),
}


@pytest.mark.parametrize("name", OPEN)
def test_spellings_of_one_function_have_one_relevance(name):
    def spelled(f):
        return lambda p, x: f(x @ p["u"] + p["b"]) @ p["v"]

    one, other = map(spelled, OPEN[name])
    assert kinds(one) == kinds(other) == ["dense", "activation", "dense"]
    np.testing.assert_allclose(relevance(one), relevance(other), atol=1e-10)
    assert jlrp.audit(one, P, X, jnp.ones((3, 5)), composite=EXACT).total("taylor")


@pytest.mark.parametrize(
    "fn, expected",
    [
        (lambda p, x: 2 * x + 1, ["scale"]),
        (lambda p, x: jax.nn.relu(x + p["b"]), ["scale", "activation"]),
        (lambda p, x: jax.nn.relu(x) * p["b"], ["activation", "scale"]),
        (
            lambda p, x: x + jax.nn.gelu(x) @ p["u"],
            ["activation", "dense", "add"],
        ),
    ],
)
def test_decoys_of_activations(fn, expected):
    assert kinds(fn) == expected


def two_pass(h):
    c = h - h.mean(-1, keepdims=True)
    return c / jnp.sqrt((c * c).mean(-1, keepdims=True) + 1e-5)


def fast_variance(h):
    m = h.mean(-1, keepdims=True)
    variance = jnp.maximum(0, (h * h).mean(-1, keepdims=True) - m * m)
    return (h - m) * lax.rsqrt(variance + 1e-5)


def library_variance(h):
    m = h.mean(-1, keepdims=True)
    return (h - m) * lax.rsqrt(h.var(-1, keepdims=True) + 1e-5)


def keras(h):
    inverse = lax.rsqrt(h.var(-1, keepdims=True) + 1e-5)
    return h * inverse - h.mean(-1, keepdims=True) * inverse


def test_layer_norm_in_four_spellings():
    def model(norm):
        return lambda p, x: (norm(x @ p["u"] + p["b"]) * p["a"] + p["c"]) @ p["v"]

    reference = relevance(model(two_pass))
    # The statistic held constant, by hand.
    h = X @ P["u"] + P["b"]
    deviation = jnp.sqrt(h.var(-1, keepdims=True) + 1e-5)

    def frozen(x):
        h = x @ P["u"]
        centred = h - h.mean(-1, keepdims=True)
        return ((centred / deviation * P["a"]) @ P["v"]).sum()

    np.testing.assert_allclose(reference, X * jax.grad(frozen)(X), atol=1e-10)
    for norm in (fast_variance, library_variance, keras):
        assert "norm" in kinds(model(norm))
        np.testing.assert_allclose(relevance(model(norm)), reference, atol=1e-10)


def test_rms_norm_in_two_spellings():
    def model(norm):
        return lambda p, x: norm(x @ p["u"]) @ p["v"]

    rooted = model(lambda h: h * lax.rsqrt((h**2).mean(-1, keepdims=True) + 1e-6))
    divided = model(
        lambda h: h / jnp.sqrt(jnp.square(h).mean(-1, keepdims=True) + 1e-6)
    )
    assert "norm" in kinds(rooted)
    np.testing.assert_allclose(relevance(rooted), relevance(divided), atol=1e-10)


@pytest.mark.parametrize(
    "gate",
    [
        lambda p, h: lax.rsqrt(jnp.square(h @ p["v"]) + 1.0),
        lambda p, h: jax.nn.sigmoid(h @ p["v"]),
        lambda p, h: jax.nn.sigmoid(h.mean(-1, keepdims=True) * 2 + p["b"][:1]),
    ],
)
def test_decoys_of_statistics_are_products(gate):
    def fn(p, x):
        h = x @ p["u"]
        return h * gate(p, h)

    assert "product" in kinds(fn) and "norm" not in kinds(fn)


def test_softmax_and_its_decoy():
    def softmax(p, x):
        return jax.nn.softmax(x @ p["u"], axis=-1)

    def decoy(p, x):
        e = jnp.exp(x @ p["u"])
        return e / jnp.exp(x @ p["v"]).sum(-1, keepdims=True)

    assert kinds(softmax) == ["dense", "softmax"]
    assert "softmax" not in kinds(decoy)
    expected = X * jax.grad(lambda x: (softmax(P, x) ** 2 / 2).sum())(X)
    seed = softmax(P, X)
    ours = jlrp.relevance(softmax, P, X, seed, composite=EXACT)
    np.testing.assert_allclose(ours, expected, atol=1e-12)


def test_products_do_not_depend_on_association():
    def left(p, x):
        return ((x @ p["u"]) * (x @ p["v"])) * (x @ p["w"])

    def right(p, x):
        return (x @ p["u"]) * ((x @ p["v"]) * (x @ p["w"]))

    np.testing.assert_allclose(relevance(left), relevance(right), atol=1e-10)
    np.testing.assert_allclose(
        relevance(lambda p, x: jnp.sum((x @ p["u"]) * (x @ p["v"]), -1)),
        relevance(lambda p, x: jnp.einsum("bi,bi->b", x @ p["u"], x @ p["v"])),
        atol=1e-10,
    )


def test_sign_halves_the_work_behind_relu():
    def fn(p, x):
        return jax.nn.relu(x @ p["u"]) @ p["v"]

    first, _, second = jlrp.inspect(fn, P, X).operations
    assert "nonnegative" not in first.facts and "nonnegative" in second.facts
    composite = jlrp.Composite([("dense", jlrp.rules.ZPlus())])
    text = str(
        jax.make_jaxpr(lambda x: jlrp.relevance(fn, P, x, composite=composite))(X)
    )
    # forward 2; first layer 2 sums and 2 transposes; second layer 1 and 1
    assert text.count("dot_general[") == 2 + 4 + 2


def test_a_scale_over_the_batch_is_not_merged():
    mask = jnp.asarray([[1.0], [0.5], [2.0]])

    def fn(p, x):
        return (x @ p["u"]) * (p["a"][0] * mask) + p["b"]

    assert kinds(fn) == ["dense", "linear", "scale"] or kinds(fn) == [
        "dense",
        "scale",
        "scale",
    ]
