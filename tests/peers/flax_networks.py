"""The networks in Flax Linen and in Flax NNX, as `fn(variables, x)`, NHWC."""

import functools

import flax.linen as linen
import jax.numpy as jnp
from flax import nnx

from peers import jax_networks
from peers import networks as nets


def _conv_options(layer):
    padding = layer.padding
    if layer.transposed:
        padding = layer.dilation * (layer.kernel - 1) - layer.padding
    options = {
        "kernel_size": (layer.kernel, layer.kernel),
        "strides": (layer.stride, layer.stride),
        "padding": [(padding, padding)] * 2,
        "kernel_dilation": (layer.dilation, layer.dilation),
        "use_bias": layer.bias,
        "param_dtype": jnp.float64,
    }
    if not layer.transposed:  # Flax has no grouped transposed convolution
        options["feature_group_count"] = layer.groups
    return options


def _run(layers, x, call):
    """All layers in turn; `call(layer, x)` runs those that have parameters."""
    for layer in layers:
        match layer:
            case nets.Activation():
                x = jax_networks.ACTIVATIONS[layer.function](x)
            case nets.Pool():
                pool = linen.max_pool if layer.kind == "max" else linen.avg_pool
                window, stride = (layer.window,) * 2, (layer.stride,) * 2
                x = pool(x, window, strides=stride)
            case nets.GlobalAveragePool():
                x = jnp.mean(x, axis=(1, 2))
            case nets.Flatten():
                x = x.reshape(x.shape[0], -1)
            case nets.Residual():
                x = _run(layer.main, x, call) + _run(layer.skip, x, call)
            case nets.Concatenate():
                parts = [_run(branch, x, call) for branch in layer.branches]
                x = jnp.concatenate(parts, axis=-1)
            case _:
                x = call(layer, x)
    return x


class LinenNetwork(linen.Module):
    layers: tuple

    @linen.compact
    def __call__(self, x):
        return _run(self.layers, x, lambda layer, x: _linen_layer(layer)(x))


def _linen_layer(layer):
    match layer:
        case nets.Conv():
            kind = linen.ConvTranspose if layer.transposed else linen.Conv
            return kind(layer.outputs, name=layer.name, **_conv_options(layer))
        case nets.BatchNorm():
            return linen.BatchNorm(
                use_running_average=True,
                epsilon=layer.epsilon,
                param_dtype=jnp.float64,
                name=layer.name,
            )
    return linen.Dense(layer.outputs, param_dtype=jnp.float64, name=layer.name)


@functools.cache
def linen_function(network):
    return LinenNetwork(network.layers).apply


def linen_variables(network, values):
    learned, statistics = {}, {}
    for name, arrays in jax_networks.params(network, values).items():
        learned[name] = {k: v for k, v in arrays.items() if k not in ("mean", "var")}
        if "mean" in arrays:
            statistics[name] = {"mean": arrays["mean"], "var": arrays["var"]}
    if not statistics:
        return {"params": learned}
    return {"params": learned, "batch_stats": statistics}


class NnxNetwork(nnx.Module):
    def __init__(self, network):
        self.network = network
        for layer in nets.leaves(network.layers):
            if hasattr(layer, "name"):
                setattr(self, layer.name, _nnx_layer(layer))

    def __call__(self, x):
        return _run(
            self.network.layers, x, lambda layer, x: getattr(self, layer.name)(x)
        )


def _nnx_layer(layer):
    rngs = nnx.Rngs(0)
    match layer:
        case nets.Conv():
            kind = nnx.ConvTranspose if layer.transposed else nnx.Conv
            return kind(layer.inputs, layer.outputs, rngs=rngs, **_conv_options(layer))
        case nets.BatchNorm():
            return nnx.BatchNorm(
                layer.channels,
                use_running_average=True,
                epsilon=layer.epsilon,
                param_dtype=jnp.float64,
                rngs=rngs,
            )
    return nnx.Linear(layer.inputs, layer.outputs, param_dtype=jnp.float64, rngs=rngs)


@functools.cache
def nnx_function(network):
    graph, _ = nnx.split(NnxNetwork(network))
    return lambda state, x: nnx.merge(graph, state)(x)


def nnx_state(network, values):
    model = NnxNetwork(network)
    for name, arrays in jax_networks.params(network, values).items():
        module = getattr(model, name)
        for key, value in arrays.items():
            setattr(module, key, type(getattr(module, key))(value))
    return nnx.split(model)[1]
