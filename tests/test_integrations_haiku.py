"""Haiku: transformed functions become functions of (params, x)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlrp
from jlrp.api import _explained
from jlrp.integrations import haiku as integration

hk = pytest.importorskip("haiku")
pytestmark = pytest.mark.relaxed

X = jax.random.normal(jax.random.key(0), (2, 4), jnp.float32)
KEY = jax.random.key(1)


def normed(x, is_training):
    x = hk.nets.MLP([5, 4])(x)
    x = hk.BatchNorm(True, True, 0.9)(x, is_training)
    return {"logits": hk.Linear(3)(x)}


def noisy(x):
    if hk.maybe_next_rng_key() is not None:
        x = hk.dropout(hk.next_rng_key(), 0.5, x)
    return hk.Linear(3)(x)


def test_transform_with_state():
    model = hk.transform_with_state(normed)
    params, state = model.init(KEY, X, True)
    for _ in range(2):
        fn, weights = integration.transformed(
            model, params, state, is_training=False, output=logits
        )
        assert weights == (params, state)
        relevance = jlrp.relevance(fn, weights, X)
    assert relevance.shape == X.shape
    expected = model.apply(params, state, None, X, False)[0]["logits"]
    np.testing.assert_array_equal(fn(weights, X), expected)
    scopes = {row.scope for row in jlrp.inspect(fn, weights, X).operations}
    assert {"mlp/~/linear_0", "linear"} <= scopes or {
        "mlp/linear_0",
        "linear",
    } <= scopes


def logits(out):
    return out["logits"]


def test_compiles_once():
    model = hk.transform(noisy)
    params = model.init(KEY, X)
    _explained.clear_cache()
    for _ in range(2):
        fn, weights = integration.transformed(model, params)
        assert weights is params
        jlrp.relevance(fn, weights, X)
    assert _explained._cache_size() == 1


def test_keys_and_without_apply_rng():
    model = hk.transform(noisy)
    params = model.init(KEY, X)
    fn, weights = integration.transformed(model, params, rng=KEY)
    np.testing.assert_array_equal(fn(weights, X), model.apply(params, KEY, X))
    assert jlrp.relevance(fn, weights, X).shape == X.shape
    fn, weights = integration.transformed(hk.without_apply_rng(model), params)
    np.testing.assert_array_equal(fn(weights, (X,)), model.apply(params, None, X))


def test_abstract():
    model = hk.transform_with_state(normed)
    params, state = jax.eval_shape(lambda key: model.init(key, X, True), KEY)
    fn, weights = integration.transformed(
        model, params, state, is_training=False, output=logits
    )
    shape = jax.ShapeDtypeStruct(X.shape, X.dtype)
    assert len(jlrp.inspect(fn, weights, shape).operations) > 3


def test_errors():
    with pytest.raises(jlrp.IntegrationError, match="hk.transform"):
        integration.transformed(noisy, {})
    with pytest.raises(jlrp.IntegrationError, match="goes with a state"):
        integration.transformed(hk.transform_with_state(noisy), {})
    with pytest.raises(jlrp.IntegrationError, match="goes with no state"):
        integration.transformed(hk.transform(noisy), {}, {})
