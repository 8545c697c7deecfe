"""Models of Flax, Haiku, Equinox, Keras and plain JAX for ``others.py``."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from others import TOKENS, floats, ids, last_token, mixed, other

BATCH, LENGTH, WIDTH = 2, 8, 16


def drawn(seed, **shapes):
    """Random parameters by name."""
    rng = np.random.default_rng(seed)
    return {
        name: jnp.asarray(rng.normal(size=s) / np.sqrt(s[0]), jnp.float64)
        for name, s in shapes.items()
    }


def redrawn(params):
    """Flax's and Haiku's parameters in float64, none at its initial number."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda v: jnp.asarray(np.asarray(v) + 0.05 * rng.normal(size=v.shape)), params
    )


def plain(name, transformer=False):
    """``build() -> fn, shapes of parameters, x``."""

    def register(build):
        @other(name, "plain JAX", transformer)
        def made():
            fn, shapes, x = build()
            return fn, drawn(1, **shapes), x, mixed

        return build

    return register


# Flax classes of transformers.


def flax_model(name, model, x, config, target=last_token, transformer=True, **small):
    @other(name, "transformers, Flax", transformer)
    def build():
        import flax
        import transformers

        made = getattr(transformers, config)(**small)
        module = getattr(transformers, model)(made, dtype=jnp.float64, seed=0)
        params = redrawn(flax.core.unfreeze(module.params))
        inputs = x()

        def fn(params, x):
            return module(**x, params=params).logits

        return fn, params, inputs, target


BERT = dict(
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=64,
    vocab_size=100,
    max_position_embeddings=32,
)
NHWC = lambda: dict(pixel_values=floats(1, 3, 32, 32))  # noqa: E731
flax_model(
    "flax-bert",
    "FlaxBertForSequenceClassification",
    TOKENS,
    "BertConfig",
    mixed,
    **BERT,
)
flax_model(
    "flax-gpt-j",
    "FlaxGPTJForCausalLM",
    TOKENS,
    "GPTJConfig",
    n_embd=32,
    n_layer=2,
    n_head=4,
    rotary_dim=4,
    vocab_size=100,
    n_positions=32,
)
flax_model(
    "flax-mistral",
    "FlaxMistralForCausalLM",
    TOKENS,
    "MistralConfig",
    num_key_value_heads=2,
    sliding_window=4,
    **BERT,
)
flax_model(
    "flax-gemma",
    "FlaxGemmaForCausalLM",
    TOKENS,
    "GemmaConfig",
    num_key_value_heads=2,
    head_dim=8,
    **BERT,
)
flax_model(
    "flax-bloom",
    "FlaxBloomForCausalLM",
    TOKENS,
    "BloomConfig",
    hidden_size=32,
    n_layer=2,
    n_head=4,
    vocab_size=100,
)
flax_model(
    "flax-bart",
    "FlaxBartForSequenceClassification",
    TOKENS,
    "BartConfig",
    mixed,
    d_model=32,
    encoder_layers=2,
    decoder_layers=2,
    vocab_size=100,
    encoder_attention_heads=4,
    decoder_attention_heads=4,
    encoder_ffn_dim=64,
    decoder_ffn_dim=64,
    max_position_embeddings=32,
    eos_token_id=2,
)
flax_model(
    "flax-beit",
    "FlaxBeitForImageClassification",
    NHWC,
    "BeitConfig",
    mixed,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=64,
    image_size=32,
    patch_size=8,
)
flax_model(
    "flax-regnet",
    "FlaxRegNetForImageClassification",
    NHWC,
    "RegNetConfig",
    mixed,
    False,
    embedding_size=8,
    hidden_sizes=[8, 16],
    depths=[1, 2],
    groups_width=4,
)
flax_model(
    "flax-roformer",
    "FlaxRoFormerForSequenceClassification",
    TOKENS,
    "RoFormerConfig",
    mixed,
    **BERT,
)
flax_model(
    "flax-electra",
    "FlaxElectraForSequenceClassification",
    TOKENS,
    "ElectraConfig",
    mixed,
    embedding_size=16,
    **BERT,
)


# Flax, Haiku, Equinox.


@other("linen-unet", "Flax Linen")
def linen_unet():
    from flax import linen as nn

    class Block(nn.Module):
        width: int

        @nn.compact
        def __call__(self, x, time):
            h = nn.Conv(self.width, (3, 3))(nn.silu(nn.GroupNorm(2)(x)))
            scale, shift = jnp.split(nn.Dense(2 * self.width)(nn.silu(time)), 2, -1)
            h = nn.GroupNorm(2)(h) * (1 + scale[:, None, None]) + shift[:, None, None]
            h = nn.Conv(self.width, (3, 3))(nn.silu(h))
            return h + nn.Conv(self.width, (1, 1))(x)

    class UNet(nn.Module):
        """Of a diffusion model: with the noise's time, and attention in the middle."""

        @nn.compact
        def __call__(self, x, t):
            angles = t[:, None] * jnp.exp(-jnp.arange(4.0))
            time = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], -1)
            time = nn.Dense(16)(nn.silu(nn.Dense(16)(time)))
            x = nn.Conv(8, (3, 3))(x)
            first = Block(8)(x, time)
            h = Block(16)(nn.avg_pool(first, (2, 2), (2, 2)), time)
            flat = nn.GroupNorm(2)(h).reshape(len(h), -1, 16)
            h = h + nn.SelfAttention(2)(flat).reshape(h.shape)
            h = nn.ConvTranspose(8, (2, 2), (2, 2))(Block(16)(h, time))
            h = Block(8)(jnp.concatenate([h, first], -1), time)
            return nn.Conv(3, (3, 3))(nn.silu(nn.GroupNorm(2)(h)))

    x = dict(x=floats(1, 8, 8, 3), t=jnp.asarray([0.3]))
    net = UNet()
    params = redrawn(net.init(jax.random.key(0), x["x"], x["t"]))
    return lambda p, x: net.apply(p, x["x"], x["t"]), params, x, mixed


@other("nnx-mixer", "Flax NNX")
def nnx_mixer():
    from flax import nnx

    from jlrp.integrations import flax as integration

    class Block(nnx.Module):
        def __init__(self, rngs):
            self.norms = nnx.List([nnx.LayerNorm(WIDTH, rngs=rngs) for _ in range(2)])
            sizes = (LENGTH, WIDTH)
            self.up = nnx.List([nnx.Linear(n, 2 * n, rngs=rngs) for n in sizes])
            self.down = nnx.List([nnx.Linear(2 * n, n, rngs=rngs) for n in sizes])

        def __call__(self, x):
            for i, along in enumerate((1, 2)):
                h = jnp.swapaxes(self.norms[i](x), 2, along)
                h = self.down[i](nnx.gelu(self.up[i](h)))
                x = x + jnp.swapaxes(h, 2, along)
            return x

    rngs = nnx.Rngs(0)
    net = nnx.Sequential(Block(rngs), Block(rngs), nnx.LayerNorm(WIDTH, rngs=rngs))
    fn, params = integration.nnx(net)
    return fn, redrawn(params), floats(BATCH, LENGTH, WIDTH), mixed


@other("linen-lstm-seq2seq", "Flax Linen")
def linen_seq2seq():
    from flax import linen as nn

    double = dict(dtype=jnp.float64, param_dtype=jnp.float64)

    class Seq2Seq(nn.Module):
        """A recurrent encoder and a decoder that attends to it (Bahdanau)."""

        @nn.compact
        def __call__(self, x, y):
            states = nn.RNN(nn.LSTMCell(WIDTH, **double))(x)
            keys = nn.Dense(WIDTH)(states)
            carry = states[:, -1]
            outs = []
            for t in range(y.shape[1]):
                query = nn.Dense(WIDTH, name=f"query_{t}")(carry)
                energy = nn.tanh(keys + query[:, None])
                scores = nn.Dense(1, name=f"energy_{t}")(energy)
                context = (nn.softmax(scores, 1) * states).sum(1)
                both = jnp.concatenate([y[:, t], context], -1)
                carry, out = nn.GRUCell(WIDTH, name=f"cell_{t}", **double)(carry, both)
                outs.append(nn.Dense(5, name=f"out_{t}")(out))
            return jnp.stack(outs, 1)

    x = dict(x=floats(BATCH, LENGTH, 4), y=floats(BATCH, 3, 4, seed=1))
    net = Seq2Seq()
    params = redrawn(net.init(jax.random.key(0), **x))
    return lambda p, x: net.apply(p, **x), params, x, mixed


def haiku_net(name, forward, x):
    @other(name, "Haiku")
    def build():
        import haiku as hk

        net = hk.transform_with_state(lambda x, training: forward(hk, x, training))
        inputs = x()
        params, state = net.init(jax.random.key(0), inputs, True)
        both = dict(params=redrawn(params), state=state)

        def fn(both, x):
            return net.apply(both["params"], both["state"], None, x, False)[0]

        return fn, both, inputs, mixed


IMAGE = lambda: floats(1, 32, 32, 3)  # noqa: E731
haiku_net(
    "haiku-mobilenet",
    lambda hk, x, training: hk.nets.MobileNetV1(
        channels=(8, 8, 16, 16, 16, 16, 16, 16, 16, 16, 16, 16, 16), num_classes=5
    )(x, training),
    IMAGE,
)
haiku_net(
    "haiku-resnet-v2",
    lambda hk, x, training: hk.nets.ResNet(
        (1, 1, 1, 1), 5, resnet_v2=True, channels_per_group=(8, 8, 16, 16)
    )(x, training),
    IMAGE,
)


def _haiku_lstm(hk, x, training):
    core = hk.DeepRNN([hk.LSTM(WIDTH), hk.GRU(WIDTH)])
    out, _ = hk.dynamic_unroll(core, x, core.initial_state(BATCH), time_major=False)
    return hk.Linear(5)(out)


haiku_net("haiku-deep-rnn", _haiku_lstm, lambda: floats(BATCH, LENGTH, 4))


@other("equinox-transformer", "Equinox", True)
def equinox_transformer():
    import equinox as eqx

    from jlrp.integrations import equinox as integration

    class Block(eqx.Module):
        attention: eqx.nn.MultiheadAttention
        norms: list
        mlp: eqx.nn.MLP

        def __init__(self, key):
            a, b = jax.random.split(key)
            self.attention = eqx.nn.MultiheadAttention(4, WIDTH, key=a)
            self.norms = [eqx.nn.LayerNorm(WIDTH), eqx.nn.RMSNorm(WIDTH)]
            self.mlp = eqx.nn.MLP(WIDTH, WIDTH, 32, 1, jax.nn.gelu, key=b)

        def __call__(self, x):
            h = jax.vmap(self.norms[0])(x)
            x = x + self.attention(h, h, h)
            return x + jax.vmap(self.mlp)(jax.vmap(self.norms[1])(x))

    keys = jax.random.split(jax.random.key(0), 2)
    net = eqx.nn.Sequential([eqx.nn.Lambda(Block(k)) for k in keys])
    fn, params = integration.module(net, batched=True)
    return fn, redrawn(params), floats(BATCH, LENGTH, WIDTH), mixed


# Keras.


def keras_net(name, make, shape=(64, 64, 3)):
    @other(name, "Keras")
    def build():
        import keras

        from jlrp.integrations import keras as integration

        keras.config.set_floatx("float64")
        keras.utils.set_random_seed(0)
        net = make(keras)
        rng = np.random.default_rng(0)
        for v in net.variables:
            uniform = rng.uniform(0.5, 1.5, v.shape)
            kernel = v.path.endswith("kernel")
            v.assign(
                np.array(v) + 0.01 * rng.normal(size=v.shape) if kernel else uniform
            )
        fn, params = integration.model(net)
        return fn, params, floats(1, *shape), mixed


APPLICATION = dict(
    weights=None, classes=5, classifier_activation=None, input_shape=(64, 64, 3)
)
keras_net(
    "keras-mobilenet-v3",
    lambda k: k.applications.MobileNetV3Small(minimalistic=False, **APPLICATION),
)
keras_net("keras-densenet", lambda k: k.applications.DenseNet121(**APPLICATION))
keras_net(
    "keras-bidirectional",
    lambda k: k.Sequential(
        [
            k.Input((LENGTH, 4)),
            k.layers.Bidirectional(k.layers.LSTM(8, return_sequences=True)),
            k.layers.GRU(8),
            k.layers.Dense(5),
        ]
    ),
    (LENGTH, 4),
)
keras_net(
    "keras-conv-lstm",
    lambda k: k.Sequential(
        [
            k.Input((4, 6, 6, 2)),
            k.layers.ConvLSTM2D(4, 3),
            k.layers.Flatten(),
            k.layers.Dense(5),
        ]
    ),
    (4, 6, 6, 2),
)
keras_net(
    "keras-separable",
    lambda k: k.Sequential(
        [
            k.Input((16, 16, 3)),
            k.layers.SeparableConv2D(8, 3, activation="swish"),
            k.layers.GroupNormalization(2),
            k.layers.SpatialDropout2D(0.5),
            k.layers.DepthwiseConv2D(3),
            k.layers.PReLU(),
            k.layers.UnitNormalization(),
            k.layers.Conv2DTranspose(4, 2, 2),
            k.layers.UpSampling2D(2, interpolation="bilinear"),
            k.layers.GlobalMaxPooling2D(),
            k.layers.Dense(5),
        ]
    ),
    (16, 16, 3),
)


# Plain JAX.


def graph():
    """Edges of a graph of 6 nodes, each with itself."""
    edges = [(0, 1), (1, 2), (2, 0), (3, 4), (4, 5), (5, 3), (2, 3)]
    pairs = [*edges, *((b, a) for a, b in edges), *((i, i) for i in range(6))]
    return np.array(pairs, np.int32).T


@plain("graph-attention")
def graph_attention():
    """GAT: a softmax over the edges into each node."""
    senders, receivers = graph()

    def layer(p, name, x):
        h = x @ p[f"w{name}"]
        scores = (h @ p[f"s{name}"])[senders] + (h @ p[f"r{name}"])[receivers]
        scores = jax.nn.leaky_relu(scores, 0.2)
        top = jax.ops.segment_max(scores, receivers, 6)
        e = jnp.exp(scores - top[receivers])
        weights = e / jax.ops.segment_sum(e, receivers, 6)[receivers]
        return jax.ops.segment_sum(weights[:, None] * h[senders], receivers, 6)

    def fn(p, x):
        x = jax.nn.elu(jax.vmap(lambda x: layer(p, 0, x))(x))
        return jax.vmap(lambda x: layer(p, 1, x))(x).mean(1)

    shapes = dict(w0=(4, 8), s0=(8,), r0=(8,), w1=(8, 5), s1=(5,), r1=(5,))
    return fn, shapes, floats(BATCH, 6, 4)


@plain("message-passing")
def message_passing():
    """Edge networks, a GRU at each node (Gilmer et al. 2017)."""
    senders, receivers = graph()

    def fn(p, x):
        nodes, edges = x["nodes"], x["edges"]
        for _ in range(2):
            both = jnp.concatenate([nodes[senders], edges], -1)
            messages = jax.nn.relu(both @ p["message"]) @ p["value"]
            m = jax.ops.segment_sum(messages, receivers, 6)
            z = jax.nn.sigmoid(m @ p["z"] + nodes @ p["uz"])
            nodes = (1 - z) * nodes + z * jnp.tanh(m @ p["n"])
        gate = jax.nn.sigmoid(nodes @ p["gate"])
        return ((gate * (nodes @ p["out"])).sum(0))[None]

    shapes = dict(message=(7, 8), value=(8, 4), z=(4, 4), uz=(4, 4), n=(4, 4))
    shapes |= dict(gate=(4, 5), out=(4, 5))
    return fn, shapes, dict(nodes=floats(6, 4), edges=floats(20, 3, seed=1))


@plain("mixture-of-experts")
def mixture_of_experts():
    """Top-2 routing with a capacity, dispatched and combined by one-hot codes."""

    def fn(p, x):
        tokens = x.reshape(-1, WIDTH)
        weights, chosen = lax.top_k(jax.nn.softmax(tokens @ p["router"]), 2)
        weights = weights / weights.sum(-1, keepdims=True)
        code = jax.nn.one_hot(chosen, 4, dtype=x.dtype)
        place = (jnp.cumsum(code.reshape(-1, 4), 0) - 1).reshape(code.shape) * code
        kept = code * (place < 8)
        slots = jax.nn.one_hot(place.sum(-1).astype(int), 8, dtype=x.dtype)
        dispatch = jnp.einsum("tke,tkc->tec", kept, slots)
        combine = jnp.einsum("tk,tke,tkc->tec", weights, kept, slots)
        inputs = jnp.einsum("tec,td->ecd", dispatch, tokens)
        h = jax.nn.gelu(jnp.einsum("ecd,edf->ecf", inputs, p["up"]))
        out = jnp.einsum("ecf,efd->ecd", h, p["down"])
        return (tokens + jnp.einsum("tec,ecd->td", combine, out)).reshape(x.shape)

    shapes = dict(router=(WIDTH, 4), up=(4, WIDTH, 32), down=(4, 32, WIDTH))
    return fn, shapes, floats(BATCH, LENGTH, WIDTH)


@plain("neural-ode")
def neural_ode():
    """An adaptive Heun method, whose step depends on the error: a while_loop."""

    def fn(p, x):
        def f(y):
            return jnp.tanh(y @ p["w"] + p["b"]) @ p["v"]

        def step(state):
            t, h, y = state
            h = jnp.minimum(h, 1.0 - t)
            k1 = f(y)
            k2 = f(y + h * k1)
            new = y + h / 2 * (k1 + k2)
            error = lax.stop_gradient(jnp.abs(h / 2 * (k2 - k1)).max())
            good = error < 1e-2
            t = jnp.where(good, t + h, t)
            y = jnp.where(good, new, y)
            scale = jnp.clip(0.9 * jnp.sqrt(1e-2 / (error + 1e-12)), 0.2, 2.0)
            return t, h * scale, y

        start = (jnp.zeros(()), jnp.full((), 0.2), x)
        return lax.while_loop(lambda s: s[0] < 1.0, step, start)[2] @ p["out"]

    shapes = dict(w=(4, 8), b=(8,), v=(8, 4), out=(4, 3))
    return fn, shapes, floats(BATCH, 4)


@plain("deep-equilibrium")
def deep_equilibrium():
    """A fixed point by custom_root: Newton's method, a linear solve in its rule."""

    def fn(p, x):
        def one(x):
            def residual(z):
                return jnp.tanh(0.3 * (p["w"] @ z) + p["u"] @ x) - z

            def solve(f, z):
                step = lambda _, z: z + f(z)  # noqa: E731
                return lax.fori_loop(0, 60, step, z)

            def tangent(g, y):
                return jnp.linalg.solve(jax.jacobian(g)(y), y)

            return lax.custom_root(residual, jnp.zeros(8), solve, tangent)

        return jax.vmap(one)(x) @ p["out"]

    return fn, dict(w=(8, 8), u=(8, 4), out=(8, 3)), floats(BATCH, 4)


@plain("capsules")
def capsules():
    """Routing by agreement (Sabour et al. 2017)."""

    def squash(s):
        n2 = (s**2).sum(-1, keepdims=True)
        return n2 / (1 + n2) * s / jnp.sqrt(n2 + 1e-9)

    def fn(p, x):
        u = squash(x.reshape(BATCH, 6, 4))
        votes = jnp.einsum("bid,ijdk->bijk", u, p["w"])
        logits = jnp.zeros((BATCH, 6, 3))
        for _ in range(3):
            weights = jax.nn.softmax(logits, -1)
            v = squash((weights[..., None] * votes).sum(1))
            logits = logits + (votes * v[:, None]).sum(-1)
        return jnp.sqrt((v**2).sum(-1) + 1e-9)

    return fn, dict(w=(6, 3, 4, 5)), floats(BATCH, 24)


@plain("normalizing-flow")
def normalizing_flow():
    """RealNVP with an invertible 1x1 map: the log-likelihood."""

    def fn(p, x):
        log_det = 0.0
        for i in range(2):
            w = p[f"lu{i}"]
            lower = jnp.tril(w, -1) + jnp.eye(4)
            upper = jnp.triu(w, 1) + jnp.diag(jnp.exp(jnp.diag(w)))
            x = x @ (lower @ upper)
            log_det += jnp.diag(w).sum()
            a, b = jnp.split(x, 2, -1)
            s, t = jnp.split(jnp.tanh(a @ p[f"a{i}"]) @ p[f"b{i}"], 2, -1)
            s = jnp.tanh(s)
            x = jnp.concatenate([b * jnp.exp(s) + t, a], -1)
            log_det += s.sum(-1)
        return (log_det - 0.5 * (x**2).sum(-1))[:, None]

    shapes = dict(lu0=(4, 4), lu1=(4, 4), a0=(2, 8), b0=(8, 4), a1=(2, 8), b1=(8, 4))
    return fn, shapes, floats(BATCH, 4)


@plain("kan")
def kan():
    """Kolmogorov-Arnold: cubic B-splines on every edge, by their recursion."""
    grid = np.linspace(-3, 3, 12)

    def bases(x):
        x = x[..., None]
        b = ((x >= grid[:-1]) & (x < grid[1:])).astype(x.dtype)
        for k in (1, 2, 3):
            left = (x - grid[: -k - 1]) / (grid[k:-1] - grid[: -k - 1])
            right = (grid[k + 1 :] - x) / (grid[k + 1 :] - grid[1:-k])
            b = left * b[..., :-1] + right * b[..., 1:]
        return b

    def fn(p, x):
        for i in range(2):
            spline = jnp.einsum("bik,iko->bo", bases(x), p[f"c{i}"])
            x = jax.nn.silu(x) @ p[f"w{i}"] + spline
        return x

    return fn, dict(c0=(4, 8, 6), w0=(4, 6), c1=(6, 8, 3), w1=(6, 3)), floats(BATCH, 4)


@plain("pointer-network")
def pointer_network():
    """Greedy pointing in a scan: what is chosen is masked and fed back."""

    def fn(p, x):
        def step(state, _):
            h, chosen = state
            scores = jnp.tanh(x @ p["k"] + (h @ p["q"])[:, None]) @ p["v"]
            scores = jnp.where(chosen, -1e9, scores)
            weights = jax.nn.softmax(scores)
            best = jax.nn.one_hot(jnp.argmax(scores, -1), LENGTH, dtype=bool)
            context = jnp.einsum("bt,btd->bd", weights, x)
            h = jnp.tanh(h @ p["u"] + context @ p["w"])
            return (h, chosen | best), jax.nn.log_softmax(scores)[:, :1]

        start = (x.mean(1) @ p["w"], jnp.zeros((BATCH, LENGTH), bool))
        return lax.scan(step, start, None, 3)[1].swapaxes(0, 1)

    shapes = dict(k=(4, 8), q=(8, 8), v=(8,), u=(8, 8), w=(4, 8))
    return fn, shapes, floats(BATCH, LENGTH, 4)


@plain("greedy-decoder", True)
def greedy_decoder():
    """Decoding with a cache that is updated in place, in a scan."""

    def fn(p, x):
        def step(state, t):
            h, keys, values = state
            q, k, v = (h @ p[name] for name in "qkv")
            keys = lax.dynamic_update_index_in_dim(keys, k, t, 1)
            values = lax.dynamic_update_index_in_dim(values, v, t, 1)
            scores = jnp.einsum("bd,btd->bt", q, keys)
            scores = jnp.where(jnp.arange(4) <= t, scores, -jnp.inf)
            mixed = jnp.einsum("bt,btd->bd", jax.nn.softmax(scores), values)
            logits = (h + mixed @ p["o"]) @ p["e"].T
            token = jnp.argmax(logits, -1)
            return (p["e"][token] + mixed, keys, values), logits.max(-1)

        zeros = jnp.zeros((BATCH, 4, WIDTH))
        _, scores = lax.scan(step, (x, zeros, zeros), jnp.arange(4))
        return scores.T

    square = (WIDTH, WIDTH)
    return (
        fn,
        dict(q=square, k=square, v=square, o=square, e=(20, WIDTH)),
        floats(BATCH, WIDTH),
    )


@plain("slstm")
def slstm():
    """xLSTM's scalar cell: exponential gates, a normaliser, a stabiliser."""

    def fn(p, x):
        def step(state, x):
            h, c, n, m = state
            z, i, f, o = jnp.split(x @ p["w"] + h @ p["u"] + p["b"], 4, -1)
            f = jax.nn.log_sigmoid(f)
            top = jnp.maximum(f + m, i)
            old, new = jnp.exp(f + m - top), jnp.exp(i - top)
            c = old * c + new * jnp.tanh(z)
            n = old * n + new
            h = jax.nn.sigmoid(o) * c / n
            return (h, c, n, top), h

        zero = jnp.zeros((BATCH, 8))
        return lax.scan(step, (zero,) * 4, x.swapaxes(0, 1))[1][-1] @ p["out"]

    shapes = dict(w=(4, 32), u=(8, 32), b=(32,), out=(8, 3))
    return fn, shapes, floats(BATCH, LENGTH, 4)


@plain("mlstm")
def mlstm():
    """xLSTM's matrix cell in its parallel form."""

    def fn(p, x):
        q, k, v = (x @ p[name] for name in "qkv")
        i, f = (x @ p["if"])[..., 0], jax.nn.log_sigmoid((x @ p["if"])[..., 1])
        total = jnp.cumsum(f, -1)
        decay = total[:, :, None] - total[:, None] + i[:, None]
        causal = jnp.tril(jnp.ones((LENGTH, LENGTH), bool))
        decay = jnp.where(causal, decay, -jnp.inf)
        top = decay.max(-1, keepdims=True)
        weights = jnp.einsum("btd,bsd->bts", q, k / 2.0) * jnp.exp(decay - top)
        norm = jnp.maximum(jnp.abs(weights.sum(-1, keepdims=True)), jnp.exp(-top))
        return weights / norm @ v

    shapes = {"q": (4, 4), "k": (4, 4), "v": (4, 4), "if": (4, 2)}
    return fn, shapes, floats(BATCH, LENGTH, 4)


@plain("s5")
def s5():
    """A diagonal complex state-space model by an associative scan."""

    def fn(p, x):
        a = lax.complex(-jnp.exp(p["decay"]), p["turn"])
        b = lax.complex(p["b_re"], p["b_im"])
        c = lax.complex(p["c_re"], p["c_im"])
        u = jnp.einsum("btd,dn->btn", x.astype(b.dtype), b)
        a = jnp.broadcast_to(jnp.exp(0.1 * a), u.shape)
        join = lambda l, r: (l[0] * r[0], r[0] * l[1] + r[1])  # noqa: E731, E741
        _, h = lax.associative_scan(join, (a, u), axis=1)
        y = jnp.einsum("btn,nd->btd", h, c).real + x * p["d"]
        return jax.nn.gelu(y) @ p["out"]

    shapes = dict(decay=(6,), turn=(6,), b_re=(4, 6), b_im=(4, 6), c_re=(6, 4))
    return fn, shapes | dict(c_im=(6, 4), d=(4,), out=(4, 3)), floats(BATCH, LENGTH, 4)


@plain("fourier-operator")
def fourier_operator():
    """A Fourier neural operator: weights on the low modes."""

    def fn(p, x):
        h = x @ p["lift"]
        for i in range(2):
            modes = jnp.fft.rfft(h, axis=1)[:, :5]
            weight = lax.complex(p[f"re{i}"], p[f"im{i}"])
            low = jnp.einsum("bkc,kcd->bkd", modes, weight)
            spectral = jnp.fft.irfft(low, n=16, axis=1)
            h = jax.nn.gelu(spectral + h @ p[f"w{i}"])
        return h @ p["out"]

    shapes = dict(lift=(2, 6), out=(6, 1))
    for i in range(2):
        shapes |= {f"re{i}": (5, 6, 6), f"im{i}": (5, 6, 6), f"w{i}": (6, 6)}
    return fn, shapes, floats(BATCH, 16, 2)


@plain("hyena")
def hyena():
    """Gated long convolutions by the FFT, with filters of positions."""

    def fn(p, x):
        v, a, b = jnp.split(x @ p["in"], 3, -1)
        t = jnp.arange(LENGTH)[:, None] / LENGTH
        for gate, name in ((a, "f"), (b, "g")):
            filters = jnp.sin(t @ p[f"{name}0"]) @ p[f"{name}1"] * jnp.exp(-t)
            spectrum = jnp.fft.rfft(filters, 2 * LENGTH, 0)
            y = jnp.fft.rfft(v * gate, 2 * LENGTH, 1) * spectrum
            v = jnp.fft.irfft(y, 2 * LENGTH, 1)[:, :LENGTH]
        return v @ p["out"]

    shapes = {"in": (4, 24), "f0": (1, 6), "f1": (6, 8), "g0": (1, 6), "g1": (6, 8)}
    return fn, shapes | {"out": (8, 3)}, floats(BATCH, LENGTH, 4)


@plain("linear-attention", True)
def linear_attention():
    def fn(p, x):
        q, k, v = (x @ p[name] for name in "qkv")
        q, k = jax.nn.elu(q) + 1, jax.nn.elu(k) + 1
        kv = jnp.cumsum(jnp.einsum("btd,bte->btde", k, v), 1)
        norm = jnp.einsum("btd,btd->bt", q, jnp.cumsum(k, 1))
        return jnp.einsum("btd,btde->bte", q, kv) / (norm[..., None] + 1e-6)

    return fn, dict(q=(4, 4), k=(4, 4), v=(4, 4)), floats(BATCH, LENGTH, 4)


@plain("delta-net")
def delta_net():
    """A fast-weight memory with the delta rule."""

    def fn(p, x):
        def step(memory, slices):
            q, k, v, beta = slices
            k = k / jnp.sqrt((k**2).sum(-1, keepdims=True) + 1e-6)
            old = jnp.einsum("bde,bd->be", memory, k)
            memory = memory + jnp.einsum("bd,be->bde", k, beta * (v - old))
            return memory, jnp.einsum("bde,bd->be", memory, q)

        parts = [(x @ p[name]).swapaxes(0, 1) for name in "qkv"]
        beta = jax.nn.sigmoid(x @ p["beta"]).swapaxes(0, 1)
        return lax.scan(step, jnp.zeros((BATCH, 4, 4)), (*parts, beta))[1].swapaxes(
            0, 1
        )

    return fn, dict(q=(4, 4), k=(4, 4), v=(4, 4), beta=(4, 1)), floats(BATCH, LENGTH, 4)


@plain("flash-attention", True)
def flash_attention():
    """Attention summed over chunks of keys, checkpointed."""

    def fn(p, x):
        q, k, v = (x @ p[name] for name in "qkv")

        @jax.checkpoint
        def step(state, slices):
            total, weight, top = state
            k, v = slices
            scores = jnp.einsum("btd,bsd->bts", q, k)
            new = jnp.maximum(top, scores.max(-1))
            old, e = jnp.exp(top - new), jnp.exp(scores - new[..., None])
            total = total * old[..., None] + jnp.einsum("bts,bsd->btd", e, v)
            return (total, weight * old + e.sum(-1), new), None

        chunks = [a.reshape(BATCH, 4, 2, WIDTH).swapaxes(0, 1) for a in (k, v)]
        zero = jnp.zeros((BATCH, LENGTH))
        start = (jnp.zeros_like(q), zero, zero - 1e30)
        (total, weight, _), _ = lax.scan(step, start, chunks)
        return x + total / weight[..., None] @ p["o"]

    square = (WIDTH, WIDTH)
    return (
        fn,
        dict(q=square, k=square, v=square, o=square),
        floats(BATCH, LENGTH, WIDTH),
    )


@plain("vector-quantised")
def vector_quantised():
    """A VQ-VAE with a straight-through estimate: the code is a constant."""

    def fn(p, x):
        z = jax.nn.relu(x @ p["e0"]) @ p["e1"]
        distance = ((z[:, None] - p["codes"]) ** 2).sum(-1)
        code = p["codes"][jnp.argmin(distance, -1)]
        z = z + lax.stop_gradient(code - z)
        return jax.nn.relu(z @ p["d0"]) @ p["d1"]

    shapes = dict(e0=(6, 8), e1=(8, 3), codes=(5, 3), d0=(3, 8), d1=(8, 6))
    return fn, shapes, floats(BATCH, 6)


@plain("spatial-transformer")
def spatial_transformer():
    """Bilinear sampling at positions that the image predicts."""

    def fn(p, x):
        theta = jnp.tanh(x.reshape(BATCH, -1) @ p["w"]).reshape(BATCH, 2, 3) * 0.3
        theta = theta + jnp.eye(2, 3)
        grid = jnp.stack(jnp.meshgrid(*[jnp.linspace(-1, 1, 6)] * 2), -1).reshape(-1, 2)
        grid = jnp.concatenate([grid, jnp.ones((36, 1))], -1)
        at = (jnp.einsum("bij,nj->bin", theta, grid) + 1) * 2.5
        sample = lambda image, at: jax.scipy.ndimage.map_coordinates(  # noqa: E731
            image, list(at), order=1, mode="nearest"
        )
        return jax.vmap(sample)(x, at) @ p["out"]

    return fn, dict(w=(36, 6), out=(36, 3)), floats(BATCH, 6, 6)


@plain("gaussian-process")
def gaussian_process():
    """A deep kernel: the posterior mean through a Cholesky solve."""

    def fn(p, x):
        h = jnp.tanh(x @ p["w"])

        def kernel(a, b):
            return jnp.exp(-0.5 * ((a[:, None] - b) ** 2).sum(-1))

        inducing = jnp.tanh(p["z"] @ p["w"])
        k = kernel(inducing, inducing) + 1e-2 * jnp.eye(5)
        factor = jax.scipy.linalg.cho_factor(k)
        return kernel(h, inducing) @ jax.scipy.linalg.cho_solve(factor, p["y"])

    return fn, dict(w=(4, 3), z=(5, 4), y=(5, 2)), floats(BATCH, 4)


@plain("deep-sets")
def deep_sets():
    def fn(p, x):
        h = jax.nn.selu(x @ p["a"])
        pooled = jnp.concatenate([h.sum(1), h.max(1), h.std(1)], -1)
        return jax.nn.softplus(pooled @ p["b"]) @ p["c"]

    return fn, dict(a=(4, 8), b=(24, 8), c=(8, 3)), floats(BATCH, LENGTH, 4)


@other("word-bag", "plain JAX")
def word_bag():
    """Bags of n-grams hashed into a table, ids alone."""

    def fn(p, x):
        pairs = (x[:, 1:] * 31 + x[:, :-1]) % 64
        h = p["one"][x].mean(1) + p["two"][pairs].mean(1)
        return jax.nn.relu(h) @ p["out"]

    params = drawn(1, one=(100, 8), two=(64, 8), out=(8, 3))
    return fn, params, ids(BATCH, LENGTH), mixed
