"""Small programs of every kind, in float64: what the spelling kit runs on.

Each is ``PROGRAMS[name]() -> fn, params, x``, with scores of shape (batch, classes) or
one per example, at a point that is away from kinks.
"""

import functools
import zlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import jlrp

PROGRAMS = {}
COMPOSITES = {
    "attnlrp": "attnlrp",
    "attnlrp_gamma": jlrp.composites.attnlrp(0.25, 0.05),
    "auto": "auto",
    "cp_lrp": "cp_lrp",
    "dynamic_lrp": "dynamic_lrp",
    "epsilon": "epsilon",
    "epsilon_plus_flat": "epsilon_plus_flat",
    "excitation_backprop": "excitation_backprop",
}


def cases(program, kinds, residue, of):
    """The kinds of one in ``of`` pairs of program and kind, by composite: one of them
    for each pair."""
    found = {}
    for kind in kinds:
        number = zlib.crc32(f"{program} {kind}".encode())
        if number % of == residue:
            composite = list(COMPOSITES)[number // of % len(COMPOSITES)]
            found.setdefault(composite, []).append(kind)
    return found


class Draw:
    """Normal numbers, the same ones for the same name."""

    def __init__(self, name):
        self.random = np.random.default_rng(zlib.crc32(name.encode()))

    def __call__(self, *shape, scale=1.0):
        return jnp.asarray(self.random.normal(size=shape) * scale)

    def positive(self, *shape):
        return jnp.asarray(self.random.uniform(0.5, 1.5, size=shape))


def program(build):
    name = build.__name__
    PROGRAMS[name] = functools.cache(lambda: build(Draw(name)))
    return build


def linen(draw, module, x):
    """A Linen module in float64, its variables drawn."""
    variables = module.init(jax.random.key(0), x)

    def leaf(path, value):
        name = path[-1].key
        if name in ("scale", "var"):
            return draw.positive(*value.shape)
        return draw(*value.shape, scale=0.6)

    variables = jax.tree_util.tree_map_with_path(leaf, variables)
    return module.apply, variables, x


LINEN = {"dtype": jnp.float64, "param_dtype": jnp.float64}
relu, gelu, silu, sigmoid = jax.nn.relu, jax.nn.gelu, jax.nn.silu, jax.nn.sigmoid


# Multilayer perceptrons.


def mlp(activation):
    def fn(p, x):
        return activation(x @ p["w"] + p["b"]) @ p["v"] + p["c"]

    return fn


def mlp_params(draw, width=6):
    return {"w": draw(4, width), "b": draw(width), "v": draw(width, 3), "c": draw(3)}


ACTIVATIONS = {
    "relu": relu,
    "relu_by_where": lambda h: jnp.where(h > 0, h, 0.0),
    "leaky_relu": jax.nn.leaky_relu,
    "elu": jax.nn.elu,
    "gelu": gelu,
    "gelu_exact": functools.partial(gelu, approximate=False),
    "gelu_by_erf": lambda h: 0.5 * h * (1 + lax.erf(h / np.sqrt(2))),
    "silu": silu,
    "silu_spelt_out": lambda h: h / (1 + jnp.exp(-h)),
    "tanh": jnp.tanh,
    "softplus": jax.nn.softplus,
    "mish": jax.nn.mish,
    "hard_swish": jax.nn.hard_swish,
    "squared_relu": lambda h: relu(h) ** 2,
    "sigmoid": sigmoid,
    "softsign": jax.nn.soft_sign,
}


def _mlp_of(name):
    def build(draw):
        return mlp(ACTIVATIONS[name]), mlp_params(draw), draw(2, 4)

    build.__name__ = f"mlp_{name}"
    return build


for _name in ACTIVATIONS:
    program(_mlp_of(_name))


@program
def mlp_literal_bias(draw):
    def fn(p, x):
        return relu(x @ p["w"] - 0.5) @ p["v"]

    return fn, mlp_params(draw), draw(2, 4)


@program
def mlp_of_three_layers(draw):
    p = [(draw(4, 5), draw(5)), (draw(5, 5), draw(5)), (draw(5, 3), draw(3))]

    def fn(p, x):
        for w, b in p[:-1]:
            x = relu(x @ w + b)
        return x @ p[-1][0] + p[-1][1]

    return fn, p, draw(2, 4)


@program
def mlp_of_stacked_layers(draw):
    """Equal layers, as a scan over their stacked weights."""
    p = {"w": draw(3, 4, 4), "b": draw(3, 4), "v": draw(4, 3)}

    def fn(p, x):
        def layer(h, wb):
            return jnp.tanh(h @ wb[0] + wb[1]), None

        return lax.scan(layer, x, (p["w"], p["b"]))[0] @ p["v"]

    return fn, p, draw(2, 4)


@program
def autoencoder(draw):
    p = {"e": draw(5, 3), "b": draw(3), "d": draw(3, 5), "c": draw(5)}

    def fn(p, x):
        code = jnp.tanh(x @ p["e"] + p["b"])
        return -((code @ p["d"] + p["c"] - x) ** 2).sum(-1)

    return fn, p, draw(2, 5)


@program
def bottleneck_of_two_maps(draw):
    p = {"a": draw(5, 2), "b": draw(2, 4), "v": draw(4, 3)}
    return lambda p, x: relu((x @ p["a"]) @ p["b"]) @ p["v"], p, draw(2, 5)


@program
def minus_a_layer(draw):
    p = {"w": draw(4, 4), "v": draw(4, 3)}
    return lambda p, x: (jnp.tanh(x) - x @ p["w"]) @ p["v"], p, draw(2, 4)


@program
def concatenated_branches(draw):
    p = {"a": draw(4, 3), "b": draw(4, 3), "c": draw(6), "v": draw(6, 3)}

    def fn(p, x):
        h = jnp.concatenate([x @ p["a"], x @ p["b"]], -1)
        return relu(h + p["c"]) @ p["v"]

    return fn, p, draw(2, 4)


@program
def log_softmax_head(draw):
    return (
        lambda p, x: jax.nn.log_softmax(mlp(relu)(p, x)),
        mlp_params(draw),
        draw(2, 4),
    )


@program
def logsumexp_energy(draw):
    return (
        lambda p, x: jax.nn.logsumexp(x @ p["w"] + p["b"], axis=-1),
        mlp_params(draw),
        draw(2, 4),
    )


@program
def temperature_head(draw):
    def fn(p, x):
        return jax.nn.softmax(mlp(gelu)(p, x) / 0.7)

    return fn, mlp_params(draw), draw(2, 4)


@program
def maxout(draw):
    p = {"a": draw(4, 5), "b": draw(4, 5), "v": draw(5, 3)}
    fn = lambda p, x: jnp.maximum(x @ p["a"], x @ p["b"]) @ p["v"]  # noqa: E731
    return fn, p, draw(2, 4)


@program
def factorisation_machine(draw):
    p = {"w": draw(5), "v": draw(5, 3)}

    def fn(p, x):
        pairs = (x @ p["v"]) ** 2 - (x**2) @ (p["v"] ** 2)
        return x @ p["w"] + 0.5 * pairs.sum(-1)

    return fn, p, draw(2, 5)


# Norms.


def normed(norm):
    def fn(p, x):
        return relu(norm(p, x @ p["w"])) @ p["v"]

    return fn


def norm_params(draw):
    return {
        "w": draw(4, 6),
        "g": draw.positive(6),
        "b": draw(6),
        "v": draw(6, 3),
        "mean": draw(6, scale=0.3),
        "var": draw.positive(6),
    }


def layer_norm(p, h):
    d = h - h.mean(-1, keepdims=True)
    return d / jnp.sqrt((d * d).mean(-1, keepdims=True) + 1e-3) * p["g"] + p["b"]


def layer_norm_by_rsqrt(p, h):
    mean, var = h.mean(-1, keepdims=True), h.var(-1, keepdims=True)
    return (h - mean) * (lax.rsqrt(var + 1e-3) * p["g"]) + p["b"]


def rms_norm(p, h):
    return h * lax.rsqrt((h**2).mean(-1, keepdims=True) + 1e-3) * p["g"]


def l2_norm(p, h):
    return h / jnp.linalg.norm(h, axis=-1, keepdims=True) * p["g"]


def group_norm(p, h):
    g = h.reshape(h.shape[0], 2, 3)
    d = g - g.mean(-1, keepdims=True)
    g = d / jnp.sqrt((d**2).mean(-1, keepdims=True) + 1e-3)
    return g.reshape(h.shape) * p["g"] + p["b"]


def batch_norm(p, h):
    return (h - p["mean"]) / jnp.sqrt(p["var"] + 1e-3) * p["g"] + p["b"]


NORMS = (layer_norm, layer_norm_by_rsqrt, rms_norm, l2_norm, group_norm, batch_norm)


def _norm_of(norm):
    def build(draw):
        return normed(norm), norm_params(draw), draw(2, 4)

    build.__name__ = norm.__name__
    return build


for _norm in NORMS:
    program(_norm_of(_norm))


# Gates and products.


@program
def gated_unit(draw):
    p = {"a": draw(4, 5), "g": draw(4, 5), "v": draw(5, 3)}
    fn = lambda p, x: ((x @ p["a"]) * sigmoid(x @ p["g"])) @ p["v"]  # noqa: E731
    return fn, p, draw(2, 4)


@program
def gate_by_quotient(draw):
    p = {"a": draw(4, 5), "g": draw(4, 5), "v": draw(5, 3)}
    fn = lambda p, x: ((x @ p["a"]) / (1 + jnp.exp(-(x @ p["g"])))) @ p["v"]  # noqa: E731
    return fn, p, draw(2, 4)


@program
def swiglu(draw):
    p = {"a": draw(4, 5), "g": draw(4, 5), "v": draw(5, 3)}
    fn = lambda p, x: (silu(x @ p["g"]) * (x @ p["a"])) @ p["v"]  # noqa: E731
    return fn, p, draw(2, 4)


@program
def bilinear_unit(draw):
    p = {"a": draw(4, 5), "g": draw(4, 5), "v": draw(5, 3)}
    return lambda p, x: ((x @ p["a"]) * (x @ p["g"])) @ p["v"], p, draw(2, 4)


@program
def product_of_three(draw):
    p = {"a": draw(4, 5), "b": draw(4, 5), "c": draw(4, 5), "v": draw(5, 3)}

    def fn(p, x):
        return ((x @ p["a"]) * (x @ p["b"]) * (x @ p["c"])) @ p["v"]

    return fn, p, draw(2, 4)


@program
def highway(draw):
    p = {"w": draw(4, 4), "t": draw(4, 4), "b": draw(4), "v": draw(4, 3)}

    def fn(p, x):
        t = sigmoid(x @ p["t"] + p["b"])
        return (t * jnp.tanh(x @ p["w"]) + (1 - t) * x) @ p["v"]

    return fn, p, draw(2, 4)


@program
def squeeze_and_excitation(draw):
    p = {"a": draw(3, 2), "b": draw(2, 3), "v": draw(3, 3)}

    def fn(p, x):
        s = sigmoid(relu(x.mean(1) @ p["a"]) @ p["b"])
        return (x * s[:, None]).mean(1) @ p["v"]

    return fn, p, draw(2, 5, 3)


@program
def learned_scalar_gate(draw):
    p = {"g": draw(4), "v": draw(4, 3)}
    fn = lambda p, x: (x * sigmoid(x @ p["g"])[:, None]) @ p["v"]  # noqa: E731
    return fn, p, draw(2, 4)


@program
def cross_network(draw):
    p = {"w": draw(2, 4), "b": draw(2, 4), "v": draw(4, 3)}

    def fn(p, x):
        h = x
        for w, b in zip(p["w"], p["b"], strict=True):
            h = x * (h @ w)[:, None] + b + h
        return h @ p["v"]

    return fn, p, draw(2, 4)


# Attention.


def attention_params(draw, width=4):
    names = ("q", "k", "u", "o")
    return {
        **{name: draw(width, width, scale=0.7) for name in names},
        "v": draw(width, 3),
        "g": draw.positive(width),
        "b": draw(width),
        "w1": draw(width, 6),
        "b1": draw(6),
        "w2": draw(6, width),
        "b2": draw(width),
    }


def heads(h, n=2):
    return h.reshape(*h.shape[:-1], n, -1).swapaxes(-2, -3)


def attended(p, x, mask=None, rotate=lambda h: h):
    q, k, u = (heads(x @ p[name]) for name in "qku")
    s = rotate(q) @ rotate(k).swapaxes(-1, -2) / jnp.sqrt(2.0)
    if mask is not None:
        s = jnp.where(mask, s, -jnp.inf)
    out = jax.nn.softmax(s) @ u
    return out.swapaxes(-2, -3).reshape(x.shape) @ p["o"]


@program
def attention(draw):
    def fn(p, x):
        s = jax.nn.softmax((x @ p["q"]) @ (x @ p["k"]).swapaxes(-1, -2) / 2)
        return (s @ (x @ p["u"])).mean(1) @ p["v"]

    return fn, attention_params(draw), draw(2, 3, 4)


@program
def causal_attention(draw):
    mask = jnp.tril(jnp.ones((3, 3), bool))

    def fn(p, x):
        return (x + attended(p, x, jnp.broadcast_to(mask, (2, 2, 3, 3))))[:, -1] @ p[
            "v"
        ]

    return fn, attention_params(draw), draw(2, 3, 4)


@program
def attention_with_late_division(draw):
    def fn(p, x):
        e = jnp.exp((x @ p["q"]) @ (x @ p["k"]).swapaxes(-1, -2) / 2)
        out = (e @ (x @ p["u"])) / e.sum(-1, keepdims=True)
        return out.mean(1) @ p["v"]

    return fn, attention_params(draw), draw(2, 3, 4)


@program
def cross_attention(draw):
    p = {**attention_params(draw), "memory": draw(2, 5, 4)}

    def fn(p, x):
        s = jnp.einsum("bnd,bmd->bnm", x @ p["q"], p["memory"] @ p["k"])
        return (jax.nn.softmax(s) @ (p["memory"] @ p["u"])).mean(1) @ p["v"]

    return fn, p, draw(2, 3, 4)


@program
def attention_pooling(draw):
    p = {"q": draw(4), "v": draw(4, 3)}

    def fn(p, x):
        a = jax.nn.softmax(jnp.tanh(x) @ p["q"])
        return (a[..., None] * x).sum(1) @ p["v"]

    return fn, p, draw(2, 3, 4)


@program
def transformer_block(draw):
    def fn(p, x):
        x = x + attended(p, layer_norm(p, x))
        h = gelu(layer_norm(p, x) @ p["w1"] + p["b1"])
        return (x + h @ p["w2"] + p["b2"]).mean(1) @ p["v"]

    return fn, attention_params(draw), draw(2, 3, 4)


@program
def llama_block(draw):
    p = {**attention_params(draw), "w3": draw(4, 6)}
    angles = np.arange(3)[:, None] * np.array([1.0])
    cos, sin = (np.broadcast_to(f(angles), (2, 2, 3, 1)) for f in (np.cos, np.sin))

    def rotate(h):
        a, b = h[..., :1], h[..., 1:]
        return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], -1)

    def fn(p, x):
        x = x + attended(p, rms_norm(p, x), rotate=rotate)
        h = rms_norm(p, x)
        h = (silu(h @ p["w1"]) * (h @ p["w3"])) @ p["w2"]
        return (x + h)[:, -1] @ p["v"]

    return fn, p, draw(2, 3, 4)


@program
def bert_of_ids(draw):
    p = {**attention_params(draw), "e": draw(7, 4), "pos": draw(3, 4)}

    def fn(p, ids):
        x = layer_norm(p, p["e"][ids] + p["pos"])
        x = layer_norm(p, x + attended(p, x))
        return jnp.tanh(x[:, 0] @ p["o"]) @ p["v"]

    return fn, p, jnp.array([[1, 4, 2], [6, 0, 3]])


@program
def linear_attention(draw):
    def fn(p, x):
        q, k = (jax.nn.elu(x @ p[n]) + 1 for n in "qk")
        state = jnp.einsum("bnd,bne->bde", k, x @ p["u"])
        norm = jnp.einsum("bnd,bd->bn", q, k.sum(1))
        out = jnp.einsum("bnd,bde->bne", q, state) / norm[..., None]
        return out.mean(1) @ p["v"]

    return fn, attention_params(draw), draw(2, 3, 4)


@program
def retention(draw):
    decay = np.tril(0.9 ** np.abs(np.subtract.outer(np.arange(3), np.arange(3))))

    def fn(p, x):
        s = jnp.einsum("bnd,bmd->bnm", x @ p["q"], x @ p["k"]) * decay
        return (s @ (x @ p["u"])).mean(1) @ p["v"]

    return fn, attention_params(draw), draw(2, 3, 4)


@program
def mixture_of_experts(draw):
    p = {"r": draw(4, 3), "e": draw(3, 4, 4), "v": draw(4, 3)}

    def fn(p, x):
        weights = jax.nn.softmax(x @ p["r"])
        experts = jnp.einsum("nd,edf->nef", x, p["e"])
        return (x + jnp.einsum("ne,nef->nf", weights, relu(experts))) @ p["v"]

    return fn, p, draw(2, 4)


@program
def mixture_of_top_experts(draw):
    p = {"r": draw(4, 3), "e": draw(3, 4, 4), "v": draw(4, 3)}

    def fn(p, x):
        weights, i = lax.top_k(jax.nn.softmax(x @ p["r"]), 2)
        weights = weights / weights.sum(-1, keepdims=True)
        experts = silu(jnp.einsum("nd,edf->nef", x, p["e"]))
        combine = (jax.nn.one_hot(i, 3, dtype=x.dtype) * weights[..., None]).sum(1)
        return jnp.einsum("ne,nef->nf", combine, experts) @ p["v"]

    return fn, p, draw(2, 4)


@program
def attention_in_base_two(draw):
    """Scaled before the contraction, masked by lax.select, with exp2."""

    def fn(p, x):
        s = ((x @ p["q"]) * 0.5) @ (x @ p["k"]).swapaxes(-1, -2)
        rows, columns = (lax.broadcasted_iota(int, s.shape, a) for a in (1, 2))
        s = lax.select(columns <= rows, s, lax.full_like(s, -jnp.inf))
        e = jnp.exp2(s)
        return (e / e.sum(-1, keepdims=True) @ (x @ p["u"])).mean(1) @ p["v"]

    return fn, attention_params(draw), draw(2, 3, 4)


@program
def rational_unit(draw):
    p = {"a": draw(4, 5), "b": draw(4, 5), "c": draw(4, 5), "v": draw(5, 3)}

    def fn(p, x):
        b, c = x @ p["b"], x @ p["c"]
        h = (x @ p["a"]) / (jnp.exp(b) * (1 + jnp.exp(-c)))
        return (h + lax.clamp(-1.0, b, 1.0) * (1 + c * c) ** -2) @ p["v"]

    return fn, p, draw(2, 4)


# Convolutions. Images are (batch, height, width, channels).


def conv(x, kernel, padding="SAME", stride=1, groups=1):
    return lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


def conv_params(draw):
    return {
        "k1": draw(3, 3, 2, 4, scale=0.5),
        "b1": draw(4, scale=0.3),
        "k2": draw(3, 3, 4, 4, scale=0.3),
        "b2": draw(4, scale=0.3),
        "d": draw(3, 3, 1, 4, scale=0.5),
        "o": draw(1, 1, 4, 4),
        "g": draw.positive(4),
        "mean": draw(4, scale=0.3),
        "var": draw.positive(4),
        "b": draw(4, scale=0.3),
        "v": draw(4, 3),
        "w": draw(16, 3),
    }


@program
def cnn(draw):
    def fn(p, x):
        x = relu(conv(x, p["k1"]) + p["b1"])
        x = relu(conv(x, p["k2"], stride=2) + p["b2"])
        return x.mean((1, 2)) @ p["v"]

    return fn, conv_params(draw), draw(1, 4, 4, 2)


@program
def cnn_with_max_pooling(draw):
    def fn(p, x):
        x = relu(conv(x, p["k1"]) + p["b1"])
        x = lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
        return x.reshape(len(x), -1) @ p["w"]

    return fn, conv_params(draw), draw(1, 4, 4, 2)


@program
def cnn_with_average_pooling(draw):
    def fn(p, x):
        x = relu(conv(x, p["k1"]) + p["b1"])
        x = lax.reduce_window(x, 0.0, lax.add, (1, 2, 2, 1), (1, 2, 2, 1), "VALID") / 4
        return gelu(x).reshape(len(x), -1) @ p["w"]

    return fn, conv_params(draw), draw(1, 4, 4, 2)


@program
def resnet_block(draw):
    def fn(p, x):
        x = relu(batch_norm(p, conv(x, p["k1"])))
        h = relu(batch_norm(p, conv(x, p["k2"])))
        h = batch_norm(p, conv(h, p["o"]))
        return relu(x + h).mean((1, 2)) @ p["v"]

    return fn, conv_params(draw), draw(1, 3, 3, 2)


@program
def mobilenet_block(draw):
    def fn(p, x):
        x = relu(conv(x, p["k1"]) + p["b1"])
        h = jax.nn.relu6(batch_norm(p, conv(x, p["d"], groups=4)))
        return (x + conv(h, p["o"])).mean((1, 2)) @ p["v"]

    return fn, conv_params(draw), draw(1, 3, 3, 2)


@program
def densenet_block(draw):
    def fn(p, x):
        a = relu(conv(x, p["k1"]) + p["b1"])
        b = jnp.concatenate([x, a], -1)
        return b.mean((1, 2)) @ jnp.concatenate([p["v"][:2], p["v"]], 0)

    return fn, conv_params(draw), draw(1, 3, 3, 2)


@program
def convnet_in_one_dimension(draw):
    draw = Draw("convnet")
    p = {"k": draw(3, 2, 4), "b": draw(4), "v": draw(4, 3)}

    def fn(p, x):
        h = lax.conv_general_dilated(
            x, p["k"], (1,), "VALID", dimension_numbers=("NWC", "WIO", "NWC")
        )
        return jnp.tanh(h + p["b"]).max(1) @ p["v"]

    return fn, p, draw(2, 6, 2)


@program
def vision_transformer(draw):
    p = {**attention_params(draw), "patch": draw(8, 4), "pos": draw(4, 4)}

    def fn(p, x):
        x = x.reshape(1, 2, 2, 2, 2, 2).transpose(0, 1, 3, 2, 4, 5).reshape(1, 4, 8)
        x = x @ p["patch"] + p["pos"]
        x = x + attended(p, layer_norm(p, x))
        return layer_norm(p, x).mean(1) @ p["v"]

    return fn, p, draw(1, 4, 4, 2)


@program
def mlp_mixer(draw):
    p = {**attention_params(draw), "t1": draw(3, 5), "t2": draw(5, 3)}

    def fn(p, x):
        h = layer_norm(p, x).swapaxes(1, 2)
        x = x + (gelu(h @ p["t1"]) @ p["t2"]).swapaxes(1, 2)
        h = gelu(layer_norm(p, x) @ p["w1"] + p["b1"])
        return (x + h @ p["w2"]).mean(1) @ p["v"]

    return fn, p, draw(1, 3, 4)


@program
def resized_image(draw):
    def fn(p, x):
        x = jax.image.resize(x, (1, 4, 4, 2), "bilinear")
        return relu(conv(x, p["k1"]) + p["b1"]).mean((1, 2)) @ p["v"]

    return fn, conv_params(draw), draw(1, 3, 3, 2)


# Recurrences and state spaces.


@program
def state_space_by_scan(draw):
    p = {"b": draw(3, 3), "c": draw(3, 3), "a": draw(3), "v": draw(3, 3)}

    def fn(p, x):
        decay = jnp.exp(-jax.nn.softplus(p["a"]))

        def step(h, xt):
            h = decay * h + xt @ p["b"]
            return h, h @ p["c"]

        _, y = lax.scan(step, jnp.zeros((2, 3)), x.swapaxes(0, 1))
        return y.mean(0) @ p["v"]

    return fn, p, draw(2, 4, 3)


@program
def selective_state_space(draw):
    p = {"b": draw(3, 3), "c": draw(3, 3), "d": draw(3, 3), "v": draw(3, 3)}

    def fn(p, x):
        delta = jax.nn.softplus(x @ p["d"])
        decay, drive = jnp.exp(-delta), delta * x * (x @ p["b"])

        def step(h, now):
            h = now[0] * h + now[1]
            return h, h * now[2]

        along = (decay, drive, x @ p["c"])
        along = [v.swapaxes(0, 1) for v in along]
        _, y = lax.scan(step, jnp.zeros((2, 3)), tuple(along))
        return silu(y).mean(0) @ p["v"]

    return fn, p, draw(2, 3, 3)


@program
def running_mean(draw):
    p = {"w": draw(3, 4), "v": draw(4, 3)}

    def fn(p, x):
        h = jnp.cumsum(x @ p["w"], 1) / (1.0 + jnp.arange(4.0))[:, None]
        return relu(h).mean(1) @ p["v"]

    return fn, p, draw(2, 4, 3)


@program
def recurrent_network(draw):
    p = {"w": draw(3, 4, scale=0.6), "u": draw(4, 4, scale=0.6), "v": draw(4, 3)}

    def fn(p, x):
        h = jnp.zeros((2, 4))
        for t in range(3):
            h = jnp.tanh(x[:, t] @ p["w"] + h @ p["u"])
        return h @ p["v"]

    return fn, p, draw(2, 3, 3)


# Graphs.


@program
def graph_convolution(draw):
    links = np.array([[1, 1, 0, 0], [1, 1, 1, 0], [0, 1, 1, 1], [0, 0, 1, 1.0]])
    links = jnp.asarray(links / links.sum(1, keepdims=True))
    p = {"w": draw(3, 4), "u": draw(4, 4), "v": draw(4, 3), "links": links}

    def fn(p, x):
        h = relu(p["links"] @ (x @ p["w"]))
        return relu(p["links"] @ (h @ p["u"])).mean(1) @ p["v"]

    return fn, p, draw(2, 4, 3)


@program
def graph_attention(draw):
    near = np.tril(np.ones((3, 3), bool)) | np.eye(3, k=1, dtype=bool)
    p = {"w": draw(3, 4), "a": draw(4), "b": draw(4), "v": draw(4, 3)}

    def fn(p, x):
        h = x @ p["w"]
        s = jax.nn.leaky_relu((h @ p["a"])[:, :, None] + (h @ p["b"])[:, None])
        s = jnp.where(jnp.broadcast_to(near, s.shape), s, -jnp.inf)
        return relu(jax.nn.softmax(s) @ h).mean(1) @ p["v"]

    return fn, p, draw(2, 3, 3)


# Flax.


class Head(nn.Module):
    """A layer of Flax between a dense layer and a head."""

    layer: nn.Module
    pool: bool = False

    @nn.compact
    def __call__(self, x):
        h = self.layer(x)
        if self.pool:
            h = h.mean(tuple(range(1, h.ndim - 1)))
        return nn.Dense(3, **LINEN)(nn.relu(h))


@program
def linen_dense(draw):
    return linen(draw, Head(nn.Dense(5, **LINEN)), draw(2, 4))


@program
def linen_conv(draw):
    module = Head(nn.Conv(4, (3, 3), **LINEN), pool=True)
    return linen(draw, module, draw(1, 4, 4, 2))


@program
def linen_layer_norm(draw):
    return linen(draw, Head(nn.LayerNorm(**LINEN)), draw(2, 5))


@program
def linen_group_norm(draw):
    return linen(draw, Head(nn.GroupNorm(2, **LINEN), pool=True), draw(2, 3, 4))


@program
def linen_batch_norm(draw):
    draw = Draw("batch norm")
    module = Head(nn.BatchNorm(use_running_average=True, **LINEN))
    return linen(draw, module, draw(2, 5))


@program
def linen_attention(draw):
    module = Head(nn.MultiHeadDotProductAttention(2, **LINEN), pool=True)
    return linen(draw, module, draw(2, 3, 4))


class Recurrent(nn.Module):
    cell: nn.Module

    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, **LINEN)(nn.RNN(self.cell)(x)[:, -1])


@program
def linen_lstm(draw):
    return linen(draw, Recurrent(nn.LSTMCell(3, **LINEN)), draw(2, 3, 3))


@program
def linen_gru(draw):
    return linen(draw, Recurrent(nn.GRUCell(3, **LINEN)), draw(2, 3, 3))
