"""Keras on JAX: built models become functions of (params, x)."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlrp
from jlrp.api import _explained
from jlrp.integrations import keras as integration

os.environ.setdefault("KERAS_BACKEND", "jax")
keras = pytest.importorskip("keras")
pytestmark = pytest.mark.relaxed
if keras.backend.backend() != "jax":
    pytest.skip("keras was imported with another backend", allow_module_level=True)

X = jax.random.normal(jax.random.key(0), (2, 4), jnp.float32)


def dense(units, name, activation=None):
    bias = keras.initializers.RandomNormal(seed=0)
    return keras.layers.Dense(units, activation, bias_initializer=bias, name=name)


def functional():
    ids = keras.Input((5,), dtype="int32", name="ids")
    x = keras.Input((4,), name="x")
    inner = keras.Sequential([keras.Input((4,)), dense(4, "fc", "relu")], name="inner")
    fetched = keras.layers.Embedding(7, 4, name="table")(ids)
    h = keras.layers.GlobalAveragePooling1D()(fetched)
    h = keras.layers.Dropout(0.5)(keras.layers.Add(name="both")([h, inner(x)]))
    h = keras.layers.BatchNormalization(name="norm")(h)
    return keras.Model({"ids": ids, "x": x}, dense(3, "logits")(h))


def test_functional_models_take_their_own_structure():
    net = functional()
    fn, params = integration.model(net)
    x = {"ids": jnp.array([[0, 1, 2, 3, 4], [5, 6, 0, 1, 2]]), "x": X}
    np.testing.assert_array_equal(fn(params, x), net(x, training=False))
    relevance = jlrp.relevance(fn, params, x)
    assert jax.tree.map(jnp.shape, relevance) == jax.tree.map(jnp.shape, x)
    scopes = {row.scope for row in jlrp.inspect(fn, params, x).operations}
    assert {"inner/fc", "logits", "both"} <= scopes
    after = integration.model(net)[1]
    jax.tree.map(np.testing.assert_array_equal, params, after)


def test_selectors_by_path():
    fn, params = integration.model(functional())
    x = {"ids": jnp.zeros((2, 5), jnp.int32), "x": X}
    stop = jlrp.Composite([("inner/*", jlrp.rules.Stop())])
    relevance = jlrp.relevance(fn, params, x, composite=stop)
    assert not relevance["x"].any() and relevance["ids"].any()


def test_compiles_once():
    net = keras.Sequential([keras.Input((4,)), dense(3, "logits")])
    _explained.clear_cache()
    for _ in range(2):
        fn, params = integration.model(net)
        jlrp.relevance(fn, params, X)
    assert _explained._cache_size() == 1
    for variable in net.trainable_variables:
        variable.assign(2.0 * variable.value)
    assert integration.model(net)[0] == fn  # trained on: other params, same function
    np.testing.assert_allclose(
        fn(integration.model(net)[1], X), 2.0 * fn(params, X), rtol=1e-5
    )


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self.fc, self.drop = dense(3, "fc"), keras.layers.Dropout(0.5)

    def call(self, x, y, training=True):
        return {"logits": self.drop(self.fc(x), training=training) + y}


def test_subclassed_models_and_layers():
    net = Subclassed()
    with pytest.raises(jlrp.IntegrationError, match="not built.*model.build"):
        integration.model(net)
    y = X[:, :3]
    expected = net(X, y, training=False)["logits"]
    fn, params = integration.model(net, output=lambda out: out["logits"])
    for x in ((X, y), {"x": X, "y": y}):
        np.testing.assert_array_equal(fn(params, x), expected)
        relevance = jlrp.relevance(fn, params, x)
        assert jax.tree.structure(relevance) == jax.tree.structure(x)

    layer = dense(3, "alone")
    layer.build((None, 4))
    fn, params = integration.model(layer)
    np.testing.assert_allclose(fn(params, X), layer(X), rtol=1e-6)


def test_abstract():
    fn, params = integration.model(
        keras.Sequential([keras.Input((4,)), dense(3, "logits")])
    )
    shapes = jax.eval_shape(lambda: (params, X))
    assert [row.scope for row in jlrp.inspect(fn, *shapes).operations] == ["logits"]


def test_another_backend(monkeypatch):
    net = keras.Sequential([keras.Input((4,)), dense(3, "logits")])
    monkeypatch.setattr(keras.backend, "backend", lambda: "tensorflow")
    with pytest.raises(jlrp.IntegrationError, match="tensorflow.*KERAS_BACKEND"):
        integration.model(net)
