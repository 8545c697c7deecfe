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

VGG_STAGES = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))
RESNET_STAGES = ((64, 3), (128, 4), (256, 6), (512, 3))
FEATURES, HEADS, HEAD = 768, 12, 64  # of every transformer here


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


def bert(batch=1, length=128, seed=0):
    """BERT-base in Flax Linen: 12 layers, norm after each sum, pooler, 2 scores."""
    return _linen_transformer(_Bert(), batch, length, seed)


def gpt2(batch=1, length=128, seed=0):
    """GPT-2 small in Flax Linen: 12 causal layers; the scores of the next token."""
    return _linen_transformer(_GPT2(), batch, length, seed)


def llama(batch=1, length=128, seed=0):
    """A plain function: RMS norm, rotary, grouped queries, SwiGLU; 6 causal layers."""
    kv, hidden, vocabulary, layers = 4, 2048, 32000, 6
    layer = {
        "attention_norm": _leaf("scale", FEATURES),
        "query": _leaf("kernel", FEATURES, HEADS * HEAD),
        "key": _leaf("kernel", FEATURES, kv * HEAD),
        "value": _leaf("kernel", FEATURES, kv * HEAD),
        "out": _leaf("kernel", HEADS * HEAD, FEATURES),
        "ffn_norm": _leaf("scale", FEATURES),
        "gate": _leaf("kernel", FEATURES, hidden),
        "up": _leaf("kernel", FEATURES, hidden),
        "down": _leaf("kernel", hidden, FEATURES),
    }
    shapes = {
        "layers": [layer] * layers,
        "norm": _leaf("scale", FEATURES),
        "head": _leaf("kernel", FEATURES, vocabulary),
    }
    return _llama, _fill(shapes, seed), _embeddings(batch, length, seed)


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


def _linen_transformer(model, batch, length, seed):
    x = _embeddings(batch, length, seed)
    shapes = jax.eval_shape(model.init, jax.random.key(0), x)
    return model.apply, _fill(shapes, seed), x


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


def _llama(params, x):
    for layer in params["layers"]:
        y = _rms_norm(x, layer["attention_norm"])
        x = x + _grouped_attention(y, layer) @ layer["out"]["kernel"]
        y = _rms_norm(x, layer["ffn_norm"])
        gate = jax.nn.silu(y @ layer["gate"]["kernel"])
        x = x + (gate * (y @ layer["up"]["kernel"])) @ layer["down"]["kernel"]
    return _rms_norm(x, params["norm"])[:, -1] @ params["head"]["kernel"]


def _rms_norm(x, layer):
    scale = jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6)
    return x * scale * layer["scale"]


def _grouped_attention(x, layer):
    batch, length, _ = x.shape
    heads = {
        name: (x @ layer[name]["kernel"]).reshape(batch, length, -1, HEAD)
        for name in ("query", "key", "value")
    }
    query, key = _rotated(heads["query"]), _rotated(heads["key"])
    query = query.reshape(batch, length, key.shape[2], -1, HEAD)
    scores = jnp.einsum("bqkgd,bskd->bkgqs", query, key) / np.float32(np.sqrt(HEAD))
    causal = np.tril(np.ones((length, length), bool))
    weights = jax.nn.softmax(jnp.where(causal, scores, np.float32(-1e9)))
    y = jnp.einsum("bkgqs,bskd->bqkgd", weights, heads["value"])
    return y.reshape(batch, length, -1)


def _rotated(x):
    """Rotary positions: halves of each head turned by an angle that grows."""
    frequencies = 10000.0 ** -(np.arange(HEAD // 2) * 2 / HEAD)
    angles = np.arange(x.shape[1])[:, None, None] * frequencies
    cos, sin = np.cos(angles).astype(x.dtype), np.sin(angles).astype(x.dtype)
    a, b = jnp.split(x, 2, -1)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], -1)


def _leaf(name, *shape):
    return {name: jax.ShapeDtypeStruct(shape, np.float32)}


def _fill(shapes, seed):
    """Random leaves for a tree of shapes, by the name of each leaf."""
    random = np.random.default_rng(seed)

    def leaf(path, shape):
        name, noise = path[-1].key, random.standard_normal(shape.shape, np.float32)
        if name == "kernel":
            heads = getattr(path[-2], "key", "") in (
                "query",
                "key",
                "value",
            )  # Linen: (in, heads, out)
            fan_in = shape.shape[0] if heads else np.prod(shape.shape[:-1])
            return jnp.asarray(noise * np.float32(np.sqrt(2 / fan_in)))
        if name in ("scale", "var"):  # positive, near one
            return jnp.asarray(np.exp(0.1 * noise))
        return jnp.asarray(0.1 * noise)  # bias, mean, positions

    return jax.tree_util.tree_map_with_path(leaf, shapes)


def _images(batch, size, seed):
    random = np.random.default_rng(seed + 1)
    return jnp.asarray(random.standard_normal((batch, size, size, 3), np.float32))


def _embeddings(batch, length, seed):
    random = np.random.default_rng(seed + 1)
    return jnp.asarray(random.standard_normal((batch, length, FEATURES), np.float32))


VISION = {"vgg16": vgg16, "resnet50": resnet50}
TRANSFORMERS = {"bert": bert, "gpt2": gpt2, "llama": llama}
NETWORKS = {**VISION, **TRANSFORMERS}
