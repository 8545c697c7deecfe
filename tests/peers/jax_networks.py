"""The networks as plain JAX functions `fn(params, x)`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from peers import networks as nets

DIMENSIONS = {"NHWC": ("NHWC", "HWIO", "NHWC"), "NCHW": ("NCHW", "OIHW", "NCHW")}
ACTIVATIONS = {"relu": jax.nn.relu, "tanh": jnp.tanh}


@functools.cache
def function(network, layout="NHWC", batch_norm="flax"):
    """`fn(params, x)`; batch norm in the spelling of "flax", "torch" or "keras"."""

    def fn(params, x):
        return run(network.layers, params, x, layout, BATCH_NORMS[batch_norm])

    fn.__name__ = f"{network}_{layout}_{batch_norm}"
    return fn


def to_layout(x, layout):
    """An image batch from torch's order; anything else as it is."""
    return x.transpose(0, 2, 3, 1) if x.ndim == 4 and layout == "NHWC" else x


def from_layout(x, layout):
    x = np.asarray(x)
    return x.transpose(0, 3, 1, 2) if x.ndim == 4 and layout == "NHWC" else x


def params(network, values, layout="NHWC"):
    """The weights in JAX's order: HWIO or OIHW, dense maps (in, out)."""
    return {
        layer.name: {
            name: jnp.asarray(
                _kernel(layer, value, layout) if name == "kernel" else value
            )
            for name, value in values[layer.name].items()
        }
        for layer in nets.leaves(network.layers)
        if hasattr(layer, "name")
    }


def _kernel(layer, kernel, layout):
    if isinstance(layer, nets.Dense):
        if layer.reads and layout == "NHWC":
            kernel = kernel.reshape(-1, *layer.reads).transpose(0, 2, 3, 1)
        return kernel.reshape(layer.outputs, -1).T
    if layer.transposed:
        kernel = kernel.transpose(1, 0, 2, 3)[:, :, ::-1, ::-1]
    return kernel.transpose(2, 3, 1, 0) if layout == "NHWC" else kernel


def run(layers, params, x, layout, batch_norm):
    for layer in layers:
        x = _step(layer, params, x, layout, batch_norm)
    return x


def _step(layer, params, x, layout, batch_norm):
    match layer:
        case nets.Conv():
            x = convolution(layer, params[layer.name]["kernel"], x, layout)
            if layer.bias:
                x = x + _per_channel(params[layer.name]["bias"], layout)
            return x
        case nets.Dense():
            values = params[layer.name]
            return x @ values["kernel"] + values["bias"][None, :]
        case nets.BatchNorm():
            values = params[layer.name]
            values = {name: _per_channel(v, layout) for name, v in values.items()}
            return batch_norm(x, layer.epsilon, **values)
        case nets.Activation():
            return ACTIVATIONS[layer.function](x)
        case nets.Pool():
            return pool(layer, x, layout)
        case nets.GlobalAveragePool():
            return jnp.mean(x, axis=(1, 2) if layout == "NHWC" else (2, 3))
        case nets.Flatten():
            return x.reshape(x.shape[0], -1)
    parts = [run(part, params, x, layout, batch_norm) for part in nets.branches(layer)]
    if isinstance(layer, nets.Residual):
        return parts[0] + parts[1]
    return jnp.concatenate(parts, axis=3 if layout == "NHWC" else 1)


def _per_channel(values, layout):
    return values.reshape((1, 1, 1, -1) if layout == "NHWC" else (1, -1, 1, 1))


def convolution(layer, kernel, x, layout):
    """The linear part; a transposed convolution dilates its input instead."""
    reach = layer.dilation * (layer.kernel - 1)
    padding = reach - layer.padding if layer.transposed else layer.padding
    stride = (layer.stride, layer.stride)
    return lax.conv_general_dilated(
        x,
        kernel,
        window_strides=(1, 1) if layer.transposed else stride,
        padding=[(padding, padding)] * 2,
        lhs_dilation=stride if layer.transposed else (1, 1),
        rhs_dilation=(layer.dilation, layer.dilation),
        dimension_numbers=DIMENSIONS[layout],
        feature_group_count=layer.groups,
    )


def pool(layer, x, layout):
    spatial = (1, 2) if layout == "NHWC" else (2, 3)
    window = tuple(layer.window if axis in spatial else 1 for axis in range(4))
    strides = tuple(layer.stride if axis in spatial else 1 for axis in range(4))
    if layer.kind == "max":
        return lax.reduce_window(x, -jnp.inf, lax.max, window, strides, "VALID")
    total = lax.reduce_window(x, 0.0, lax.add, window, strides, "VALID")
    return total / layer.window**2


def _flax_batch_norm(x, epsilon, *, scale, bias, mean, var):
    return (x - mean) * (lax.rsqrt(var + epsilon) * scale) + bias


def _torch_batch_norm(x, epsilon, *, scale, bias, mean, var):
    return (x - mean) / jnp.sqrt(var + epsilon) * scale + bias


def _keras_batch_norm(x, epsilon, *, scale, bias, mean, var):
    inverse = lax.rsqrt(var + epsilon) * scale
    return x * inverse + (bias - mean * inverse)


BATCH_NORMS = {
    "flax": _flax_batch_norm,
    "torch": _torch_batch_norm,
    "keras": _keras_batch_norm,
}
