"""The ledger names every cause, and shows a wrong rule."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core.primitives import tanh_p

import jlrp
from jlrp import composites
from jlrp.api import _Request
from jlrp.interpreter import forward, reverse

pytestmark = pytest.mark.relaxed
KEYS = iter(jax.random.split(jax.random.key(2), 20))
NORMAL = {
    name: jax.random.normal(next(KEYS), shape)
    for name, shape in {
        "k": (3, 3, 2, 4), "kb": (4,), "g": (4,), "m": (4,), "be": (4,),
        "k2": (3, 3, 4, 4), "w": (4, 5), "b": (5,), "s": (5,), "v": (5, 3),
    }.items()
}  # fmt: skip
P = NORMAL | {"var": jnp.square(jax.random.normal(next(KEYS), (4,))) + 0.1}
X = jax.random.normal(next(KEYS), (2, 6, 6, 2))
PRESETS = [
    composites.epsilon(), composites.epsilon(0.0), composites.epsilon_plus(),
    composites.epsilon_plus_flat(), composites.epsilon_gamma_box(-4.0, 4.0),
    composites.epsilon_alpha2_beta1(), composites.epsilon_alpha2_beta1_flat(),
    composites.excitation_backprop(), composites.gradient_input(),
    composites.dynamic_lrp(), composites.dynamic_lrp(100.0, 0.01),
]  # fmt: skip


def conv(x, k):
    return jax.lax.conv_general_dilated(
        x, k, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def model(p, x):
    h = jax.nn.relu(conv(x, p["k"]) + p["kb"])
    norm = (conv(h, p["k2"]) - p["m"]) * (jax.lax.rsqrt(p["var"] + 1e-5) * p["g"])
    h = h + jax.nn.relu(norm + p["be"])
    h = jax.lax.reduce_window(
        h, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID"
    )
    h = jnp.tanh(h.mean((1, 2)) @ p["w"] + p["b"])
    deviation = jnp.sqrt(h.var(-1, keepdims=True) + 1e-5)
    h = (h - h.mean(-1, keepdims=True)) / deviation * p["s"]
    return jax.nn.softmax((h * jax.nn.sigmoid(h)) @ p["v"])


@pytest.mark.parametrize("composite", PRESETS, ids=range(len(PRESETS)))
def test_every_row_is_explained(composite):
    ledger = jlrp.audit(model, P, X, composite=composite)
    # Rounding scales with what passes through a row, which may exceed the seed.
    scale = max(abs(ledger.seed), *(abs(row.arrived) for row in ledger.rows))
    assert ledger.unexplained <= 1e-10 * scale
    causes = sum(ledger.total(cause) for cause in jlrp.reports.CAUSES)
    assert abs(ledger.seed - ledger.relevance - causes) <= 1e-9 * scale
    relevance = jlrp.relevance(model, P, X, composite=composite)
    np.testing.assert_allclose(ledger.relevance, relevance.sum(), rtol=1e-9)
    assert not ledger.nonfinite and "unexplained" in str(ledger)
    assert "<table>" in ledger._repr_html_()


def test_causes_from_their_formulas():
    x, w, b = jnp.asarray([1.0, -2.0]), jnp.asarray([3.0, 0.5]), jnp.asarray(0.7)
    composite = jlrp.composites.epsilon(0.1)
    ledger = jlrp.audit(
        lambda p, x: x @ p["w"] + p["b"], {"w": w, "b": b}, x, composite=composite
    )
    z = float(x @ w + b)
    assert ledger.total("bias") == pytest.approx(z * 0.7 / (z + 0.1))
    assert ledger.total("stabilizer") == pytest.approx(z * 0.1 / (z + 0.1))
    assert ledger.relevance == pytest.approx(z * (z - 0.7) / (z + 0.1))


@pytest.fixture
def doubling_tanh():
    jlrp.register_rule(tanh_p, lambda r, x, y, **_: [2 * r[0]])
    yield
    jlrp.unregister_rule(tanh_p)


def test_a_wrong_rule_is_visible(doubling_tanh):
    def fn(p, x):
        return jnp.tanh(x.mean((1, 2)) @ p["w"][:2] + p["b"]) @ p["v"]

    ledger = jlrp.audit(fn, P, X, composite="epsilon")
    (row,) = (row for row in ledger.rows if "Custom" in row.rule)
    assert row.unexplained == pytest.approx(-row.arrived)
    assert abs(row.unexplained) > 0.01 * abs(ledger.seed)


def test_names_where_nan_began():
    def fn(p, x):
        h = x.mean((1, 2)) @ p["w"][:2]
        return jnp.exp(jnp.log(h) @ p["v"])

    (start,) = jlrp.audit(fn, P, X, composite="epsilon").nonfinite
    assert "log" in start and "test_ledger.py" in start


@pytest.mark.parametrize("composite", PRESETS, ids=range(len(PRESETS)))
def test_rules_read_only_what_they_declare(composite):
    request = _Request(model, P, X, None, "score")
    plan = request.plan(composite, None)
    outputs, residuals = forward(plan, request.arguments)
    assert set(residuals) == set(plan.kept)  # whatever else is read raises KeyError
    seeds = request.seeds(residuals, outputs)
    (promise,) = reverse(plan, residuals, seeds)
    expected = jlrp.relevance(model, P, X, composite=composite)
    np.testing.assert_allclose(promise.resolve(X), expected, rtol=1e-9, atol=1e-12)
