"""One network, one set of weights: each framework gives the relevance of plain JAX."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlrp

os.environ.setdefault("KERAS_BACKEND", "jax")
pytestmark = pytest.mark.relaxed

D, HEADS, TOKENS, CLASSES = 4, 2, 5, 3


def numbers(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


IMAGE = numbers(0, 2, 6, 6, 2)
CNN = {
    "conv": (numbers(1, 3, 3, 2, D), numbers(2, D)),
    "norm": (1.0 + 0.3 * numbers(3, D), numbers(4, D)),
    "stats": (numbers(5, D), numbers(6, D) ** 2 + 0.5),
    "hidden": (numbers(7, D, 7), numbers(8, 7)),
    "logits": (numbers(9, 7, CLASSES), numbers(10, CLASSES)),
}
SEQUENCE = numbers(20, 2, TOKENS, D)
PROJECTION = ((D, HEADS, D // HEADS), (HEADS, D // HEADS))
ATTENTION = {
    name: tuple(numbers(21 + 2 * i + j, *shape) for j, shape in enumerate(PROJECTION))
    for i, name in enumerate(("query", "key", "value"))
}
ATTENTION["out"] = (numbers(30, HEADS, D // HEADS, D), numbers(31, D))


def plain_cnn(p, x):
    kernel, bias = p["conv"]
    dims = ("NHWC", "HWIO", "NHWC")
    h = jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=dims)
    (scale, shift), (mean, var) = p["norm"], p["stats"]
    h = (h + bias - mean) / jnp.sqrt(var + 1e-5) * scale + shift
    h = jax.nn.relu(h).mean((1, 2))
    h = jax.nn.relu(h @ p["hidden"][0] + p["hidden"][1])
    return h @ p["logits"][0] + p["logits"][1]


def plain_attention(p, x):
    q, k, v = (
        jnp.einsum("btd,dhe->bthe", x, p[name][0]) + p[name][1]
        for name in ("query", "key", "value")
    )
    weights = jax.nn.softmax(jnp.einsum("bqhe,bkhe->bhqk", q, k) * (D // HEADS) ** -0.5)
    h = jnp.einsum("bhqk,bkhe->bqhe", weights, v)
    h = jnp.einsum("bqhe,hed->bqd", h, p["out"][0]) + p["out"][1]
    return (x + h).mean(1)


class Linen:
    @staticmethod
    def cnn():
        nn = pytest.importorskip("flax.linen")
        from jlrp.integrations.flax import linen

        class Net(nn.Module):
            @nn.compact
            def __call__(self, x, train: bool):
                x = nn.Conv(D, (3, 3), name="conv")(x)
                x = nn.BatchNorm(use_running_average=not train, name="norm")(x)
                x = nn.relu(x).mean((1, 2))
                x = nn.relu(nn.Dense(7, name="hidden")(x))
                return nn.Dense(CLASSES, name="logits")(nn.Dropout(0.5)(x, not train))

        params = {
            name: {"kernel": CNN[name][0], "bias": CNN[name][1]}
            for name in ("conv", "hidden", "logits")
        }
        params["norm"] = {"scale": CNN["norm"][0], "bias": CNN["norm"][1]}
        stats = {"norm": {"mean": CNN["stats"][0], "var": CNN["stats"][1]}}
        return *linen(Net(), {"params": params, "batch_stats": stats}), "Net/hidden"

    @staticmethod
    def attention():
        nn = pytest.importorskip("flax.linen")
        from jlrp.integrations.flax import linen

        class Net(nn.Module):
            @nn.compact
            def __call__(self, x):
                attend = nn.MultiHeadDotProductAttention(HEADS, name="attention")
                return (x + attend(x)).mean(1)

        params = {n: {"kernel": k, "bias": b} for n, (k, b) in ATTENTION.items()}
        variables = {"params": {"attention": params}}
        return *linen(Net(), variables), "Net/attention/value"


class NNX:
    @staticmethod
    def cnn():
        nnx = pytest.importorskip("flax.nnx")
        from jlrp.integrations import flax

        class Net(nnx.Module):
            def __init__(self, rngs):
                self.conv = nnx.Conv(2, D, (3, 3), rngs=rngs)
                self.norm = nnx.BatchNorm(D, rngs=rngs)
                self.drop = nnx.Dropout(0.5, rngs=rngs)
                self.head = nnx.List(
                    [nnx.Linear(D, 7, rngs=rngs), nnx.Linear(7, CLASSES, rngs=rngs)]
                )

            def __call__(self, x):
                x = nnx.relu(self.norm(self.conv(x))).mean((1, 2))
                return self.head[1](self.drop(nnx.relu(self.head[0](x))))

        net = Net(nnx.Rngs(0))
        layers = (net.conv, net.head[0], net.head[1])
        for layer, name in zip(layers, ("conv", "hidden", "logits"), strict=True):
            layer.kernel, layer.bias = map(nnx.Param, map(jnp.asarray, CNN[name]))
        net.norm.scale, net.norm.bias = map(nnx.Param, map(jnp.asarray, CNN["norm"]))
        stats = map(nnx.BatchStat, map(jnp.asarray, CNN["stats"]))
        net.norm.mean, net.norm.var = stats
        return *flax.nnx(net), "head/0"

    @staticmethod
    def attention():
        nnx = pytest.importorskip("flax.nnx")
        from jlrp.integrations import flax

        class Net(nnx.Module):
            def __init__(self, rngs):
                self.attention = nnx.MultiHeadAttention(
                    HEADS, D, rngs=rngs, decode=False
                )

            def __call__(self, x):
                return (x + self.attention(x)).mean(1)

        net = Net(nnx.Rngs(0))
        for name, weights in ATTENTION.items():
            layer = getattr(net.attention, name)
            layer.kernel, layer.bias = map(nnx.Param, map(jnp.asarray, weights))
        return *flax.nnx(net), "attention/value"


def channels_first(fn):
    return lambda params, x: fn(params, jnp.moveaxis(x, -1, 1))


class Equinox:
    @staticmethod
    def cnn():
        eqx = pytest.importorskip("equinox")
        from jlrp.integrations import equinox

        class Net(eqx.Module):
            conv: eqx.nn.Conv2d
            norm: eqx.nn.BatchNorm
            head: list
            drop: eqx.nn.Dropout

            def __init__(self, key):
                self.conv = eqx.nn.Conv2d(2, D, 3, padding=1, key=key)
                self.norm = eqx.nn.BatchNorm(D, axis_name="batch", mode="ema")
                self.head = [
                    eqx.nn.Linear(D, 7, key=key),
                    eqx.nn.Linear(7, CLASSES, key=key),
                ]
                self.drop = eqx.nn.Dropout(0.5)

            def __call__(self, x, state, *, key):
                x, state = self.norm(self.conv(x), state)
                x = jax.nn.relu(self.head[0](jax.nn.relu(x).mean((1, 2))))
                return self.head[1](self.drop(x, key=key)), state

        net, state = eqx.nn.make_with_state(Net)(jax.random.key(0))
        state = state.set(net.norm.ema_first_time_index, jnp.array(False))
        stats = tuple(map(jnp.asarray, CNN["stats"]))
        state = state.set(net.norm.ema_state_index, stats)
        net = eqx.tree_at(
            lambda n: [
                *(n.conv.weight, n.conv.bias, n.norm.weight, n.norm.bias),
                *(n.head[0].weight, n.head[0].bias, n.head[1].weight, n.head[1].bias),
            ],
            net,
            [
                jnp.asarray(array)
                for array in (
                    CNN["conv"][0].transpose(3, 2, 0, 1),
                    CNN["conv"][1].reshape(D, 1, 1),
                    *CNN["norm"],
                    *(CNN["hidden"][0].T, CNN["hidden"][1]),
                    *(CNN["logits"][0].T, CNN["logits"][1]),
                )
            ],
        )
        fn, params = equinox.module(net, state=state, batched=True)
        return channels_first(fn), params, "head/0/*"

    @staticmethod
    def attention():
        eqx = pytest.importorskip("equinox")
        from jlrp.integrations import equinox

        class Net(eqx.Module):
            attention: eqx.nn.MultiheadAttention

            def __call__(self, x):
                return (x + self.attention(x, x, x)).mean(0)

        biases = {f"use_{n}_bias": True for n in ("query", "key", "value", "output")}
        key = jax.random.key(0)
        net = Net(eqx.nn.MultiheadAttention(HEADS, D, key=key, **biases))
        names = {"query": "query_proj", "key": "key_proj", "value": "value_proj"}
        names["out"] = "output_proj"
        for name, attribute in names.items():
            kernel, bias = map(jnp.asarray, ATTENTION[name])
            net = eqx.tree_at(
                lambda n, a=attribute: [
                    getattr(n.attention, a).weight,
                    getattr(n.attention, a).bias,
                ],
                net,
                [kernel.reshape(D, D).T, bias.reshape(D)],
            )
        fn, params = equinox.module(net, batched=True)
        return fn, params, "attention/value_proj*"


class Haiku:
    @staticmethod
    def cnn():
        hk = pytest.importorskip("haiku")
        from jlrp.integrations import haiku

        def net(x, is_training):
            x = hk.Conv2D(D, 3, name="conv")(x)
            x = hk.BatchNorm(True, True, 0.9, name="norm")(x, is_training)
            x = jax.nn.relu(x).mean((1, 2))
            x = jax.nn.relu(hk.Linear(7, name="hidden")(x))
            return hk.Linear(CLASSES, name="logits")(x)

        def shaped(array):
            return jnp.asarray(array).reshape(1, 1, 1, D)

        params = {
            name: {"w": jnp.asarray(CNN[name][0]), "b": jnp.asarray(CNN[name][1])}
            for name in ("conv", "hidden", "logits")
        }
        scale, offset = map(shaped, CNN["norm"])
        params["norm"] = {"scale": scale, "offset": offset}
        state = {
            f"norm/~/{name}_ema": {
                "average": shaped(array),
                "hidden": shaped(array),
                "counter": jnp.array(0),
            }
            for name, array in zip(("mean", "var"), CNN["stats"], strict=True)
        }
        model = hk.transform_with_state(net)
        fn, params = haiku.transformed(model, params, state, is_training=False)
        return fn, params, "hidden"

    @staticmethod
    def attention():
        hk = pytest.importorskip("haiku")
        from jlrp.integrations import haiku

        def net(x):
            init = hk.initializers.Constant(0.0)
            attend = hk.MultiHeadAttention(
                HEADS, D // HEADS, w_init=init, model_size=D, name="attention"
            )
            return (x + attend(x, x, x)).mean(1)

        params = {
            f"attention/{'linear' if name == 'out' else name}": {
                "w": jnp.asarray(kernel).reshape(D, D),
                "b": jnp.asarray(bias).reshape(D),
            }
            for name, (kernel, bias) in ATTENTION.items()
        }
        return *haiku.transformed(hk.transform(net), params), "attention/value"


class Keras:
    @staticmethod
    def cnn():
        keras = pytest.importorskip("keras")
        from jlrp.integrations import keras as integration

        layers, options = keras.layers, {"dtype": "float64"}
        net = keras.Sequential(
            [
                layers.Input((6, 6, 2), dtype="float64"),
                layers.Conv2D(D, 3, padding="same", name="conv", **options),
                layers.BatchNormalization(epsilon=1e-5, name="norm", **options),
                layers.ReLU(**options),
                layers.GlobalAveragePooling2D(**options),
                layers.Dense(7, "relu", name="hidden", **options),
                layers.Dropout(0.5, **options),
                layers.Dense(CLASSES, name="logits", **options),
            ]
        )
        for name in ("conv", "hidden", "logits"):
            net.get_layer(name).set_weights(CNN[name])
        net.get_layer("norm").set_weights([*CNN["norm"], *CNN["stats"]])
        return *integration.model(net), "hidden*"

    @staticmethod
    def attention():
        keras = pytest.importorskip("keras")
        from jlrp.integrations import keras as integration

        layers, options = keras.layers, {"dtype": "float64"}
        x = layers.Input((TOKENS, D), dtype="float64")
        attend = layers.MultiHeadAttention(
            HEADS, D // HEADS, name="attention", **options
        )
        h = layers.Add(**options)([x, attend(x, x)])
        net = keras.Model(x, layers.GlobalAveragePooling1D(**options)(h))
        weights = [array for name in ATTENTION for array in ATTENTION[name]]
        attend.set_weights(weights)
        return *integration.model(net), "attention/value/*"


FRAMEWORKS = [Linen, NNX, Equinox, Haiku, Keras]


# What computes in float32 whatever the dtype of its inputs: Keras's norms, poolings and
# attention, and the softmax of jax.nn.dot_product_attention, which NNX calls.
SINGLE_PRECISION = [Keras.cnn, Keras.attention, NNX.attention]


def check(network, plain, weights, x, composite):
    fn, params, selector = network()
    tolerance = 1e-5 if network in SINGLE_PRECISION else 1e-10
    np.testing.assert_allclose(fn(params, x), plain(weights, x), rtol=tolerance)
    expected = jlrp.relevance(plain, weights, x, composite=composite)
    actual = jlrp.relevance(fn, params, x, composite=composite)
    assert actual.dtype == jnp.float64
    largest = np.abs(expected).max()
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * largest)

    scopes = [o.scope for o in jlrp.inspect(fn, params, x).operations]
    assert selector.removesuffix("/*").removesuffix("*") in "\n".join(scopes)
    stop = jlrp.Composite([(selector, jlrp.rules.Stop())], base=composite)
    stopped = jlrp.relevance(fn, params, x, composite=stop)
    assert not np.allclose(stopped, actual)


@pytest.mark.parametrize("composite", ["epsilon_plus", "epsilon_alpha2_beta1"])
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_convolutions(framework, composite):
    check(framework.cnn, plain_cnn, CNN, jnp.asarray(IMAGE), composite)


@pytest.mark.parametrize("composite", ["attnlrp", "cp_lrp"])
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_attention(framework, composite):
    x = jnp.asarray(SEQUENCE)
    check(framework.attention, plain_attention, ATTENTION, x, composite)
