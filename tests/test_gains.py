"""Literal gains under NativeGradient, and what it and Pass are for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jlrp
from jlrp import rules

X = jnp.linspace(-3.1, 2.9, 11)
SLOPE = jnp.array(0.3)  # a parameter

# An activation and its own slope at infinity, else at minus infinity, else 1.
GAINS = {
    "relu": (lambda a, x: jax.nn.relu(x), 1),
    "relu * sqrt(2)": (lambda a, x: jax.nn.relu(x) * 2**0.5, 2**0.5),
    "relu * jnp.sqrt(2)": (lambda a, x: jax.nn.relu(x) * jnp.sqrt(2.0), 2**0.5),
    "relu / 2": (lambda a, x: jax.nn.relu(x) / 2, 0.5),
    "relu(2 x)": (lambda a, x: jax.nn.relu(2 * x), 2),
    "relu(-x)": (lambda a, x: jax.nn.relu(-x), -1),
    "-3 relu": (lambda a, x: -3 * jax.nn.relu(x), -3),
    "leaky relu": (lambda a, x: 2**0.5 * jax.nn.leaky_relu(x, 0.2), 2**0.5),
    "elu(3 x)": (lambda a, x: jax.nn.elu(3 * x), 3),
    "gelu": (lambda a, x: 1.7 * jax.nn.gelu(x, approximate=False), 1.7),
    "tanh gelu": (lambda a, x: 1.7 * jax.nn.gelu(x), 1.7),
    "silu": (lambda a, x: jax.nn.silu(x) * 0.6, 0.6),
    "hard swish": (lambda a, x: 2 * jax.nn.hard_swish(x), 2),
    "hard swish by hand": (lambda a, x: x * jnp.clip(x + 3, 0, 6) / 3, 2),
    "softplus": (lambda a, x: 2 * jax.nn.softplus(x), 2),
    "mish": (lambda a, x: 2 * jax.nn.mish(x), 2),
    "prelu": (lambda a, x: 1.5 * jnp.where(x > 0, x, a * x), 1.5),
    "prelu by max": (
        lambda a, x: 1.5 * (jnp.maximum(x, 0) + a * jnp.minimum(x, 0)),
        1.5,
    ),
    # Bounded, a power, or unknown: the gain is the function's.
    "sigmoid - .5": (lambda a, x: jax.nn.sigmoid(x) - 0.5, 1),
    "tanh / 2": (lambda a, x: 0.5 * jnp.tanh(x / 2), 1),
    "relu6": (lambda a, x: 2 * jax.nn.relu6(x), 1),
    "softsign": (lambda a, x: 2 * jax.nn.soft_sign(x), 1),
    "sin": (lambda a, x: 2 * jnp.sin(x), 1),
    "square": (lambda a, x: 2 * x * x, 1),
    "exp": (lambda a, x: jnp.exp(x), 1),
    "swish": (lambda a, x: 2 * x * jax.nn.sigmoid(a * x), 1),
}


@pytest.mark.relaxed
@pytest.mark.parametrize("name", GAINS)
def test_the_own_slope_is_no_gain_of_relevance(name):
    act, gain = GAINS[name]
    composite = jlrp.Composite([("activation", rules.NativeGradient())], base="attnlrp")
    found = jlrp.relevance(lambda a, x: act(a, x).sum(), SLOPE, X, composite=composite)
    slope = jax.vmap(jax.grad(lambda x: act(SLOPE, x)))(X)
    np.testing.assert_allclose(
        found, act(SLOPE, X) * slope / gain, rtol=1e-6, atol=1e-9
    )


def test_a_cast_inside_is_no_part_of_the_gain():
    def act(x):
        return jax.nn.relu(x.astype(jnp.float16)).astype(jnp.float32) * 2

    composite = jlrp.Composite([("activation", rules.NativeGradient())], base="attnlrp")
    x = jnp.array([1.0, -2.0, 0.5], jnp.float32)
    found = jlrp.relevance(lambda p, x: act(x).sum(), (), x, composite=composite)
    np.testing.assert_allclose(found, [2.0, 0.0, 1.0], rtol=1e-6)


def test_excitation_backprop_conserves_through_a_gain():
    rng = np.random.default_rng(0)
    w, v, x = (jnp.asarray(rng.uniform(0.1, 1, s)) for s in ((4, 6), (6, 3), (2, 4)))

    def fn(p, x):
        return jax.nn.relu(x @ p[0]) * 2**0.5 @ p[1]

    ledger = jlrp.audit(fn, (w, v), x, 1, composite="excitation_backprop")
    assert abs(ledger.relevance - ledger.seed) < 1e-4 * ledger.seed


SQUARE = jnp.asarray(np.random.default_rng(1).normal(size=(3, 3)))
INPUT = jnp.asarray(np.random.default_rng(2).normal(size=(2, 3)))
MAPS = {
    "dense": (lambda w, x: x @ w, "dense"),
    "conv": (
        lambda w, x: lax.conv(x[None, None], w[None, None, :1, :2], (1, 1), "SAME"),
        "conv",
    ),
    "fft": (lambda w, x: jnp.fft.fft(x).real, "fft"),
    "sort": (lambda w, x: jnp.sort(x), "sort"),
    "cumsum": (lambda w, x: jnp.cumsum(x, 1), "cumsum"),
    "cumprod": (lambda w, x: lax.cumprod(x, 1), "cumprod"),
    "cummax": (lambda w, x: lax.cummax(x, 1), "cummax"),
    "transpose": (lambda w, x: (x @ w).T[:2, :2].T, "transpose"),
    "rev": (lambda w, x: x[::-1], "rev"),
    "roll": (lambda w, x: x[jnp.array([1, 0])], "gather"),
    "diagonal norm": (lambda w, x: x - x.mean(1, keepdims=True), "add"),
    "inverse": (lambda w, x: jnp.linalg.inv(x[:, :2]), "linalg"),
}


@pytest.mark.parametrize("rule", [rules.NativeGradient(), rules.Pass()], ids=repr)
@pytest.mark.parametrize("name", MAPS)
def test_a_map_is_refused_whatever_its_shapes(name, rule):
    fn, selector = MAPS[name]
    composite = jlrp.Composite([(selector, rule)], base="attnlrp")
    with pytest.raises(jlrp.errors.SelectorError, match="elementwise"):
        jlrp.relevance(lambda w, x: fn(w, x).sum(), SQUARE, INPUT, composite=composite)


TAKEN = {
    "activation": (lambda w, x: jnp.tanh(x), "activation"),
    "scale": (lambda w, x: x * w[:1], "scale"),
    "shift": (lambda w, x: x + w[:1], "scale"),
    "negation": (lambda w, x: -x, "neg"),
    "cast": (lambda w, x: x.astype(jnp.float32), "movement"),
    "mask": (lambda w, x: jnp.where(w[:2] > 0, x, w[:2]), "movement"),
    "doubled": (lambda w, x: x + x, "add"),
}


@pytest.mark.relaxed
@pytest.mark.parametrize("rule", [rules.NativeGradient(), rules.Pass()], ids=repr)
@pytest.mark.parametrize("name", TAKEN)
def test_what_is_elementwise_is_taken(name, rule):
    fn, selector = TAKEN[name]
    composite = jlrp.Composite([(selector, rule)], base="attnlrp")
    ledger = jlrp.audit(lambda w, x: fn(w, x).sum(), SQUARE, INPUT, composite=composite)
    assert ledger.unexplained < 1e-6


def test_a_softmax_passes_as_dynamic_lrp_has_it():
    fn = lambda w, x: (jax.nn.softmax(x) @ w).sum()  # noqa: E731
    composite = jlrp.Composite([("softmax", rules.Pass())], base="attnlrp")
    assert jlrp.audit(fn, SQUARE, INPUT, composite=composite).unexplained < 1e-9
    composite = jlrp.Composite([("softmax", rules.NativeGradient())], base="attnlrp")
    with pytest.raises(jlrp.errors.SelectorError, match="elementwise"):
        jlrp.relevance(fn, SQUARE, INPUT, composite=composite)
