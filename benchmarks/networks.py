"""The networks that the benchmarks explain, at full size, with random weights.

Each builder returns `(fn, params, x)` in float32, where `fn(params, x)` gives scores of
shape (batch, classes). x is an image (NHWC), or the token embeddings of a transformer:
(batch, length, features). Weights are He-initialised, so that activations neither
vanish nor explode; biases are small but visible.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from llama import Llama

VGG_STAGES = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))
RESNET_STAGES = ((64, 3), (128, 4), (256, 6), (512, 3))
FEATURES, HEADS = 768, 12  # of every transformer here


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
    return _vgg16, fill(params, seed), _images(batch, size, seed)


def resnet50(batch=1, size=224, seed=0):
    """ResNet-50 in Flax Linen; inference batch norm, not merged into convolutions."""
    model = _ResNet50()
    x = _images(batch, size, seed)
    shapes = jax.eval_shape(model.init, jax.random.key(0), x)
    return model.apply, fill(shapes, seed), x


def bert(batch=1, length=128, seed=0):
    """BERT-base in Flax Linen: 12 layers, norm after each sum, pooler, 2 scores."""
    return _linen_transformer(_Bert(), batch, length, seed)


def gpt2(batch=1, length=128, seed=0):
    """GPT-2 small in Flax Linen: 12 causal layers; the scores of the next token."""
    return _linen_transformer(_GPT2(), batch, length, seed)


def vit(batch=1, size=224, seed=0):
    """ViT-B/16 in Flax Linen: 12 layers, norm before each, a class token."""
    model = _ViT()
    x = _images(batch, size, seed)
    shapes = jax.eval_shape(model.init, jax.random.key(0), x)
    return model.apply, fill(shapes, seed), x


def llama(batch=1, length=128, seed=0):
    """A plain function: RMS norm, rotary, grouped queries, SwiGLU; 6 causal layers."""
    return _of_llama(Llama(), batch, length, seed)


def llama_scanned(batch=1, length=128, seed=0):
    """The same, its layers' parameters stacked and run by a scan."""
    return _of_llama(Llama(scanned=True), batch, length, seed)


def _of_llama(model, batch, length, seed):
    x = _embeddings(batch, length, seed, model.width)
    return model, fill(model.shapes(), seed), x


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
        y = nn.relu(_conv_norm(y, self.features, (3, 3), strides, 1))
        y = _conv_norm(y, 4 * self.features, (1, 1))
        if x.shape != y.shape:
            x = _conv_norm(x, 4 * self.features, (1, 1), strides)
        return nn.relu(x + y)


class _ResNet50(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(_conv_norm(x, 64, (7, 7), (2, 2), 3))
        x = nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
        for stage, (features, blocks) in enumerate(RESNET_STAGES):
            for block in range(blocks):
                stride = 2 if stage > 0 and block == 0 else 1
                x = _Bottleneck(features, stride)(x)
        return nn.Dense(1000)(x.mean((1, 2)))


def _conv_norm(x, features, window, strides=(1, 1), padding=0):
    """Called inside a compact module: the layers become that module's own.

    Padded alike on both sides, as in torchvision.
    """
    x = nn.Conv(features, window, strides, padding, use_bias=False)(x)
    return nn.BatchNorm(use_running_average=True)(x)


def _linen_transformer(model, batch, length, seed):
    x = _embeddings(batch, length, seed)
    shapes = jax.eval_shape(model.init, jax.random.key(0), x)
    return model.apply, fill(shapes, seed), x


class _Bert(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.LayerNorm(epsilon=1e-12)(x + _positions(self, x))
        for _ in range(12):
            y = nn.MultiHeadDotProductAttention(HEADS)(x)
            x = nn.LayerNorm(epsilon=1e-12)(x + y)
            y = nn.gelu(nn.Dense(4 * FEATURES)(x), approximate=False)
            x = nn.LayerNorm(epsilon=1e-12)(x + nn.Dense(FEATURES)(y))
        return nn.Dense(2)(nn.tanh(nn.Dense(FEATURES)(x[:, 0])))


class _ViT(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(FEATURES, (16, 16), (16, 16), padding=0)(x)
        x = x.reshape(x.shape[0], -1, FEATURES)
        start = self.param("start", nn.initializers.zeros, (1, 1, FEATURES))
        start = jnp.broadcast_to(start, (x.shape[0], 1, FEATURES))
        x = jnp.concatenate([start, x], 1)
        x = x + _positions(self, x)
        for _ in range(12):
            y = nn.LayerNorm()(x)
            x = x + nn.MultiHeadDotProductAttention(HEADS)(y)
            y = nn.Dense(4 * FEATURES)(nn.LayerNorm()(x))
            x = x + nn.Dense(FEATURES)(nn.gelu(y, approximate=False))
        return nn.Dense(1000)(nn.LayerNorm()(x)[:, 0])


class _GPT2(nn.Module):
    @nn.compact
    def __call__(self, x):
        mask = nn.make_causal_mask(jnp.ones(x.shape[:2]))
        x = x + _positions(self, x)
        for _ in range(12):
            y = nn.LayerNorm(epsilon=1e-5)(x)
            x = x + nn.MultiHeadDotProductAttention(HEADS)(y, mask=mask)
            y = nn.Dense(4 * FEATURES)(nn.LayerNorm(epsilon=1e-5)(x))
            x = x + nn.Dense(FEATURES)(nn.gelu(y))
        x = nn.LayerNorm(epsilon=1e-5)(x)
        return nn.Dense(50257, use_bias=False)(x[:, -1])


def _positions(module, x):
    """The learned positions of a compact module, as a parameter like a bias."""
    return module.param("positions", nn.initializers.zeros, x.shape[1:])


def fill(shapes, seed):
    """Random leaves for a tree of shapes, by the name of each leaf."""
    random = np.random.default_rng(seed)

    def leaf(path, shape):
        name, noise = path[-1].key, random.standard_normal(shape.shape, np.float32)
        if name == "kernel":
            return jnp.asarray(noise * np.float32(np.sqrt(2 / _fan_in(path, shape))))
        if name in ("scale", "var"):  # positive, near one
            return jnp.asarray(np.exp(0.1 * noise))
        return jnp.asarray(0.1 * noise)  # bias, mean, positions

    return jax.tree_util.tree_map_with_path(leaf, shapes)


def _fan_in(path, shape):
    """Kernels are (..., in, out), but for Linen's heads and the stacks of a scan."""
    names = [getattr(key, "key", None) for key in path]
    if "layers" in names:
        return shape.shape[-2]
    if len(shape.shape) == 3 and names[-2] in ("query", "key", "value"):
        return shape.shape[0]  # (in, heads, out)
    return np.prod(shape.shape[:-1])


def _images(batch, size, seed):
    random = np.random.default_rng(seed + 1)
    return jnp.asarray(random.standard_normal((batch, size, size, 3), np.float32))


def _embeddings(batch, length, seed, width=FEATURES):
    random = np.random.default_rng(seed + 1)
    return jnp.asarray(random.standard_normal((batch, length, width), np.float32))


VISION = {"vgg16": vgg16, "resnet50": resnet50, "vit": vit}
TRANSFORMERS = {
    "bert": bert,
    "gpt2": gpt2,
    "llama": llama,
    "llama_scanned": llama_scanned,
}
NETWORKS = {**VISION, **TRANSFORMERS}
