"""The networks that the benchmarks explain, at full size, with random weights.

Each builder returns `(fn, params, x)` in float32, NHWC, where `fn(params, x)` gives the
scores. Weights are He-initialised, so that activations neither vanish nor explode;
biases are small but visible.
"""

import flax.linen as nn
import jax
import numpy as np
from jax import lax

VGG_STAGES = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))
RESNET_STAGES = ((64, 3), (128, 4), (256, 6), (512, 3))


def vgg16(batch=1, size=224, seed=0):
    """VGG16 as a plain function: 13 convolutions, 3 dense layers, biases everywhere."""
    side, channels, shapes = size // 32, 3, []
    for features, repeats in VGG_STAGES:
        for _ in range(repeats):
            shapes.append((3, 3, channels, features))
            channels = features
    shapes += [(side * side * channels, 4096), (4096, 4096), (4096, 1000)]
    params = [
        {
            "kernel": jax.ShapeDtypeStruct(shape, np.float32),
            "bias": jax.ShapeDtypeStruct(shape[-1:], np.float32),
        }
        for shape in shapes
    ]
    return _vgg16, _fill(params, seed), _images(batch, size, seed)


def resnet50(batch=1, size=224, seed=0):
    """ResNet-50 in Flax Linen; inference batch norm, not merged into convolutions."""
    model = _ResNet50()
    x = _images(batch, size, seed)
    shapes = jax.eval_shape(model.init, jax.random.key(0), x)
    return model.apply, _fill(shapes, seed), x


def _vgg16(params, x):
    layers = iter(params)
    for _, repeats in VGG_STAGES:
        for _ in range(repeats):
            layer = next(layers)
            x = lax.conv_general_dilated(
                x,
                layer["kernel"],
                (1, 1),
                "SAME",
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
            )
            x = jax.nn.relu(x + layer["bias"])
        x = nn.max_pool(x, (2, 2), (2, 2))
    x = x.reshape(x.shape[0], -1)
    for layer in layers:
        x = x @ layer["kernel"] + layer["bias"]
        if layer is not params[-1]:
            x = jax.nn.relu(x)
    return x


class _Bottleneck(nn.Module):
    features: int
    stride: int

    @nn.compact
    def __call__(self, x):
        strides = (self.stride, self.stride)
        y = nn.relu(_conv_norm(x, self.features, (1, 1)))
        y = nn.relu(_conv_norm(y, self.features, (3, 3), strides))
        y = _conv_norm(y, 4 * self.features, (1, 1))
        if x.shape != y.shape:
            x = _conv_norm(x, 4 * self.features, (1, 1), strides)
        return nn.relu(x + y)


class _ResNet50(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(_conv_norm(x, 64, (7, 7), (2, 2)))
        x = nn.max_pool(x, (3, 3), (2, 2), "SAME")
        for stage, (features, blocks) in enumerate(RESNET_STAGES):
            for block in range(blocks):
                stride = 2 if stage > 0 and block == 0 else 1
                x = _Bottleneck(features, stride)(x)
        return nn.Dense(1000)(x.mean((1, 2)))


def _conv_norm(x, features, window, strides=(1, 1)):
    """Called inside a compact module: the layers become that module's own."""
    x = nn.Conv(features, window, strides, use_bias=False)(x)
    return nn.BatchNorm(use_running_average=True)(x)


def _fill(shapes, seed):
    """Random leaves for a tree of shapes, by the name of each leaf."""
    random = np.random.default_rng(seed)

    def leaf(path, shape):
        name, noise = path[-1].key, random.standard_normal(shape.shape, np.float32)
        if name == "kernel":
            fan_in = np.prod(shape.shape[:-1])
            return jax.numpy.asarray(noise * np.float32(np.sqrt(2 / fan_in)))
        if name in ("scale", "var"):  # positive, near one
            return jax.numpy.asarray(np.exp(0.1 * noise))
        return jax.numpy.asarray(0.1 * noise)  # bias, mean

    return jax.tree_util.tree_map_with_path(leaf, shapes)


def _images(batch, size, seed):
    random = np.random.default_rng(seed + 1)
    return jax.numpy.asarray(random.standard_normal((batch, size, size, 3), np.float32))


NETWORKS = {"vgg16": vgg16, "resnet50": resnet50}
