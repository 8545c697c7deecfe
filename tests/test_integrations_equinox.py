"""Equinox: modules become functions with names."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlrp
from jlrp.api import _explained
from jlrp.integrations import equinox as integration

eqx = pytest.importorskip("equinox")
pytestmark = pytest.mark.relaxed

X = jax.random.normal(jax.random.key(0), (2, 3, 4))
KEY = jax.random.key(1)


class Layer(eqx.Module):
    attention: eqx.nn.MultiheadAttention
    norm: eqx.nn.LayerNorm
    mlp: eqx.nn.MLP
    drop: eqx.nn.Dropout
    jitted: eqx.Module

    def __init__(self, key):
        self.attention = eqx.nn.MultiheadAttention(2, 4, key=key)
        self.norm = eqx.nn.LayerNorm(4)
        self.mlp = eqx.nn.MLP(4, 4, 8, 1, activation=jax.nn.gelu, key=key)
        self.drop = eqx.nn.Dropout(0.5)
        self.jitted = eqx.filter_jit(eqx.nn.Linear(4, 4, key=key))

    def __call__(self, x, key):
        h = jax.vmap(self.norm)(x)
        x = x + self.attention(h, h, h)
        x = x + jax.vmap(self.feed)(x)
        return self.drop(x + eqx.filter_vmap(self.jitted)(x), key=key)

    def feed(self, x):
        return self.mlp(x)


class Net(eqx.Module):
    layers: list

    def __init__(self, key):
        self.layers = [Layer(k) for k in jax.random.split(key)]

    @eqx.filter_jit
    def __call__(self, x, *, key):
        for layer in self.layers:
            x = layer(x, key)
        return x.mean(0)


PATHS = {
    f"layers/{i}/{name}/eqx.nn.Linear"
    for i in range(2)
    for name in ("attention/query_proj", "attention/output_proj", "mlp/layers/0")
}
PATHS |= {"layers/0/norm/eqx.nn.LayerNorm", "layers/1/jitted/eqx.nn.Linear"}


def scopes(fn, params, x=X):
    return {row.scope for row in jlrp.inspect(fn, params, x).operations}


@pytest.mark.parametrize("batched", [False, True])
def test_is_the_models_own_output(batched):
    net = Net(KEY)
    fn, params = integration.module(net, batched=batched)
    x = X if batched else X[0]
    own = eqx.nn.inference_mode(net)
    expected = jax.vmap(lambda x: own(x, key=KEY))(x) if batched else own(x, key=KEY)
    np.testing.assert_allclose(fn(params, x), expected, rtol=1e-5)
    relevance = jlrp.relevance(fn, params, x, composite="attnlrp")
    assert relevance.shape == x.shape
    assert PATHS <= scopes(fn, params, x)
    # The model is as it was.
    assert type(net.layers[0]) is Layer and not net.layers[0].drop.inference
    assert isinstance(params, Net) and params.layers[0].drop.inference is None


def test_selectors_by_path():
    fn, params = integration.module(Net(KEY), batched=True)
    pairs = [("layers/*/attention/value_proj/*", jlrp.rules.Stop())]
    stop = jlrp.Composite(pairs, base="attnlrp")
    rows = jlrp.inspect(fn, params, X, composite=stop).operations
    assert sum(row.rule == "Stop()" for row in rows) == 2


def test_compiles_once():
    _explained.clear_cache()
    net = Net(KEY)
    for model in (net, net, Net(jax.random.key(2))):
        fn, params = integration.module(model, batched=True)
        jlrp.relevance(fn, params, X)
    assert _explained._cache_size() == 1
    assert fn != integration.module(net)[0]


def test_abstract():
    model = eqx.filter_eval_shape(Net, KEY)
    fn, params = integration.module(model, batched=True)
    assert PATHS <= scopes(fn, params, jax.ShapeDtypeStruct(X.shape, X.dtype))


class Normed(eqx.Module):
    norm: eqx.nn.BatchNorm

    def __init__(self):
        self.norm = eqx.nn.BatchNorm(4, axis_name="batch", mode="ema")

    def __call__(self, x, s):
        x, s = self.norm(x, s)
        return {"logits": x}, s


def test_state():
    net, state = eqx.nn.make_with_state(Normed)()
    index = net.norm.ema_state_index
    state = state.set(net.norm.ema_first_time_index, jnp.array(False))
    state = state.set(index, (jnp.array([0.5] * 4), jnp.array([4.0] * 4)))
    fn, params = integration.module(
        net, state=state, batched=True, output=lambda out: out["logits"]
    )
    x = X[:, 0]
    np.testing.assert_allclose(
        fn(params, x), (x - 0.5) / np.sqrt(4.0 + 1e-5), rtol=1e-5
    )
    assert jlrp.relevance(fn, params, x).shape == x.shape
    np.testing.assert_array_equal(state.get(index)[0], np.full(4, 0.5))

    layers = [eqx.nn.BatchNorm(4, axis_name="batch", mode="ema"), eqx.nn.Lambda(abs)]
    net, state = eqx.nn.make_with_state(eqx.nn.Sequential)(layers)
    fn, params = integration.module(net, state=state, batched=True)
    assert fn(params, x).shape == x.shape


class Activation(eqx.Module):
    function: Callable = jax.nn.relu  # a field, no method
    plain: Callable = jnp.tanh

    def __call__(self, x):
        return self.function(self.plain(x))


def test_functions_as_fields():
    linear = eqx.nn.Linear(4, 4, key=KEY)
    net = eqx.nn.Sequential([eqx.nn.Lambda(Activation()), linear])
    fn, params = integration.module(net)
    expected = linear(jax.nn.relu(jnp.tanh(X[0, 0])))
    np.testing.assert_allclose(fn(params, X[0, 0]), expected)
    assert "layers/0/fn" in scopes(fn, params, X[0, 0])


class Flags(eqx.Module):
    def __call__(self, x, mask, *, inference=False, key):
        assert inference
        return jnp.where(mask, x, 0.0).sum(0)


def test_arguments():
    fn, params = integration.module(Flags(), batched=True)
    mask = X > 0.0
    for x in ((X, mask), {"x": X, "mask": mask}):
        relevance = jlrp.relevance(fn, params, x)
        assert jax.tree.structure(relevance) == jax.tree.structure(x)
    with pytest.raises(AssertionError):
        integration.module(Flags(), inference=False)[0](params, (X, mask))


def test_names_hold_when_layers_are_scanned():
    class Scanned(eqx.Module):
        layers: eqx.nn.Linear

        def __call__(self, x):
            arrays, static = eqx.partition(self.layers, eqx.is_array)

            def step(x, arrays):
                return jax.nn.relu(eqx.combine(arrays, static)(x)), None

            return jax.lax.scan(step, x, arrays)[0]

    make = eqx.filter_vmap(lambda key: eqx.nn.Linear(4, 4, key=key))
    fn, params = integration.module(Scanned(make(jax.random.split(KEY, 3))))
    (scan,) = [e for e in jax.make_jaxpr(fn)(params, X[0, 0]).eqns if e.params]
    body = scan.params["jaxpr"]
    stacks = {str(e.source_info.name_stack) for e in getattr(body, "jaxpr", body).eqns}
    assert "layers/eqx.nn.Linear" in stacks


def test_models_that_do_not_bear_names_go_without():
    class Stacking(eqx.Module):
        layers: list

        def __call__(self, x):
            stacked = jax.tree.map(lambda *arrays: jnp.stack(arrays), *self.layers)
            return stacked.weight.sum(0) @ x

    net = Stacking([eqx.nn.Linear(4, 4, key=KEY) for _ in range(2)])
    fn, params = integration.module(net)
    with pytest.warns(UserWarning, match="without names"):
        assert fn(params, X[0, 0]).shape == (4,)
