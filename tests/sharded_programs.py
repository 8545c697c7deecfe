"""Programs on eight virtual devices, each beside the same program on one.

Run by ``test_sharding.py`` in a process of its own, since the number of devices is
fixed when JAX starts: ``python sharded_programs.py [name ...]`` prints, for each check,
its name and the largest difference, as JSON.
"""

import functools
import json
import os
import sys
import traceback

_FLAGS = "--xla_force_host_platform_device_count=8"
_FAST = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
os.environ["XLA_FLAGS"] = f"{_FLAGS} {_FAST}"

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from jax import lax  # noqa: E402
from jax.sharding import AxisType, NamedSharding  # noqa: E402
from jax.sharding import PartitionSpec as P  # noqa: E402

import jlrp  # noqa: E402

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_enable_x64", True)

RULES = jlrp.rules
COMPOSITES = {
    "epsilon(0)": jlrp.composites.epsilon(0.0),
    "epsilon": jlrp.composites.epsilon(1e-2),
    "epsilon_plus": "epsilon_plus",
    "z+": jlrp.Composite([("dense", RULES.ZPlus())], base="excitation_backprop"),
    "attnlrp": "attnlrp",
    "cp_lrp": "cp_lrp",
    "gradient_input": "gradient_input",
}
FEW = {name: COMPOSITES[name] for name in ("epsilon", "z+")}
CHECKS = {}


def mesh(axis_type=AxisType.Auto, **sizes):
    types = (axis_type,) * len(sizes)
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=types)


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def check(function):
    """Register ``name() -> largest difference``, or a dictionary of several."""
    CHECKS[function.__name__] = function
    return function


def difference(a, b):
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return max(float(jnp.max(jnp.abs(x - jax.device_get(y)))) for x, y in pairs)


def compared(sharded, single, params, x, composites=FEW, **options):
    """The largest difference of the relevance, for each composite."""
    found = {}
    for name, composite in composites.items():
        one = jlrp.relevance(single, params, x, composite=composite, **options)
        many = jlrp.relevance(sharded, params, x, composite=composite, **options)
        assert float(jnp.max(jnp.abs(jax.tree.leaves(one)[0]))) > 1e-3
        found[name] = difference(jax.device_get(one), many)
    return found


def both_checked(body, single, params, x, composites=FEW, options=None, **how):
    """With replication checked by JAX, and without."""
    found = {}
    for checked in (True, False):
        sharded = jax.shard_map(body, check_vma=checked, **how)
        chosen = composites if checked else {"epsilon": COMPOSITES["epsilon"]}
        amounts = compared(sharded, single, params, x, chosen, **(options or {}))
        found |= {f"{name} {checked}": d for name, d in amounts.items()}
    return found


def mlp_params(d=6, h=16, out=4):
    return {
        "w": normal(0, d, h) / np.sqrt(d),
        "b": normal(1, h) / 4,
        "v": normal(2, h, out) / np.sqrt(h),
        "c": normal(3, out),
    }


def mlp(params, x):
    hidden = jax.nn.gelu(x @ params["w"] + params["b"])
    return hidden @ params["v"] + params["c"]


COLUMN_ROW = {"w": P(None, "m"), "b": P("m"), "v": P("m", None), "c": P()}


# Data parallel.


@check
def data_parallel_mlp():
    return both_checked(
        mlp,
        mlp,
        mlp_params(),
        normal(4, 16, 6),
        COMPOSITES,
        mesh=mesh(d=8),
        in_specs=(P(), P("d")),
        out_specs=P("d"),
    )


def cnn(params, x):
    dims = ("NHWC", "HWIO", "NHWC")
    conv = lambda x, w: lax.conv_general_dilated(  # noqa: E731
        x, w, (1, 1), "SAME", dimension_numbers=dims
    )
    x = jax.nn.relu(conv(x, params["a"]) + params["b"])
    x = lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    scale = params["g"] / jnp.sqrt(params["var"] + 1e-3)
    x = jax.nn.relu((conv(x, params["c"]) - params["mu"]) * scale + params["beta"])
    return x.mean((1, 2)) @ params["v"]


def cnn_params():
    shapes = {"a": (3, 3, 2, 8), "b": (8,), "c": (3, 3, 8, 8), "g": (8,), "mu": (8,)}
    shapes |= {"beta": (8,), "v": (8, 3)}
    params = {name: normal(i, *s) / 2 for i, (name, s) in enumerate(shapes.items())}
    return params | {"var": jnp.abs(normal(9, 8)) + 0.5}


@check
def data_parallel_cnn():
    chosen = {k: COMPOSITES[k] for k in ("epsilon", "epsilon_plus")}
    sharded = jax.shard_map(
        cnn, mesh=mesh(d=8), in_specs=(P(), P("d")), out_specs=P("d")
    )
    return compared(sharded, cnn, cnn_params(), normal(10, 8, 6, 6, 2), chosen)


# Tensor parallel.


@check
def column_then_row():
    def body(params, x):
        hidden = jax.nn.gelu(x @ params["w"] + params["b"])
        return lax.psum(hidden @ params["v"], "m") + params["c"]

    return both_checked(
        body,
        mlp,
        mlp_params(),
        normal(4, 4, 6),
        COMPOSITES,
        mesh=mesh(d=2, m=4),
        in_specs=(COLUMN_ROW, P("d")),
        out_specs=P("d"),
    )


@check
def bias_on_one_device_before_the_sum():
    def body(params, x):
        hidden = jax.nn.gelu(x @ params["w"] + params["b"])
        bias = jnp.where(lax.axis_index("m") == 0, params["c"], 0.0)
        return lax.psum(hidden @ params["v"] + bias, "m")

    return both_checked(
        body,
        mlp,
        mlp_params(),
        normal(4, 4, 6),
        mesh=mesh(m=8),
        in_specs=(COLUMN_ROW, P()),
        out_specs=P(),
    )


@check
def bias_outside_of_the_shard_map():
    row = jax.shard_map(
        lambda h, v: lax.psum(h @ v, "m"),
        mesh=mesh(m=8),
        in_specs=(P(None, "m"), P("m")),
        out_specs=P(),
    )

    def sharded(params, x):
        hidden = jax.nn.gelu(x @ params["w"] + params["b"])
        return row(hidden, params["v"]) + params["c"]

    return compared(sharded, mlp, mlp_params(), normal(4, 4, 6))


@check
def one_sum_for_two_maps():
    params = mlp_params() | {"u": normal(7, 6, 16), "t": normal(8, 16, 4)}

    def single(params, x):
        one = jax.nn.gelu(x @ params["w"] + params["b"]) @ params["v"]
        two = jax.nn.relu(x @ params["u"]) @ params["t"]
        return one + two + params["c"]

    def body(params, x):
        one = jax.nn.gelu(x @ params["w"] + params["b"]) @ params["v"]
        two = jax.nn.relu(x @ params["u"]) @ params["t"]
        return lax.psum(one + two, "m") + params["c"]

    specs = COLUMN_ROW | {"u": P(None, "m"), "t": P("m")}
    return both_checked(
        body,
        single,
        params,
        normal(4, 4, 6),
        mesh=mesh(m=8),
        in_specs=(specs, P()),
        out_specs=P(),
    )


@check
def gathered_outputs():
    def body(params, x):
        hidden = jax.nn.gelu(x @ params["w"] + params["b"])
        hidden = lax.all_gather(hidden, "m", axis=1, tiled=True)
        out = lax.all_gather(hidden @ params["v"], "m", axis=1, tiled=True)
        return out + params["c"]

    specs = {"w": P(None, "m"), "b": P("m"), "v": P(None, "m"), "c": P()}
    sharded = jax.shard_map(
        body, mesh=mesh(m=4), in_specs=(specs, P()), out_specs=P(), check_vma=False
    )
    return compared(sharded, mlp, mlp_params(), normal(4, 4, 6))


@check
def gathered_outputs_known_to_agree():
    def body(params, x):
        hidden = jax.nn.gelu(x @ params["w"] + params["b"])
        hidden = lax.all_gather(hidden, "m", axis=1, tiled=True, to="invarying")
        return hidden @ params["v"] + params["c"]

    specs = {"w": P(None, "m"), "b": P("m"), "v": P(), "c": P()}
    sharded = jax.shard_map(body, mesh=mesh(m=4), in_specs=(specs, P()), out_specs=P())
    return compared(sharded, mlp, mlp_params(), normal(4, 4, 6))


@check
def sequence_parallel_around_tensor_parallel():
    """Megatron: gather along the sequence, column, row, scatter the sums."""

    def body(params, x):
        x = lax.all_gather(x, "m", axis=1, tiled=True)
        hidden = jax.nn.gelu(x @ params["w"] + params["b"])
        out = lax.psum_scatter(
            hidden @ params["v"], "m", scatter_dimension=1, tiled=True
        )
        return out + params["c"]

    return both_checked(
        body,
        mlp,
        mlp_params(),
        normal(4, 2, 16, 6),
        options={"target": lambda out: out[:, -1].max(-1) + out[:, 3].sum(-1)},
        mesh=mesh(m=8),
        in_specs=(COLUMN_ROW, P(None, "m")),
        out_specs=P(None, "m"),
    )


@check
def contraction_over_two_mesh_axes():
    def body(params, x):
        out = lax.psum(x @ params["w"], ("d", "m")) + params["b"]
        return jax.nn.relu(out) @ params["v"] + params["c"]

    def single(params, x):
        return jax.nn.relu(x @ params["w"] + params["b"]) @ params["v"] + params["c"]

    both = ("d", "m")
    specs = {"w": P(both), "b": P(), "v": P(), "c": P()}
    return both_checked(
        body,
        single,
        mlp_params(d=16),
        normal(4, 3, 16),
        mesh=mesh(d=2, m=4),
        in_specs=(specs, P(None, both)),
        out_specs=P(),
    )


@check
def convolution_over_sharded_channels():
    def conv(x, w, groups=1):
        return lax.conv_general_dilated(
            x,
            w,
            (1, 1),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=groups,
        )

    def single(params, x):
        x = jax.nn.relu(conv(x, params["a"]) + params["b"])
        return x.sum((1, 2)) @ params["v"]

    def body(params, x):
        x = jax.nn.relu(lax.psum(conv(x, params["a"]), "m") + params["b"])
        return x.sum((1, 2)) @ params["v"]

    params = {"a": normal(1, 3, 3, 8, 6), "b": normal(2, 6), "v": normal(3, 6, 3)}
    specs = {"a": P(None, None, "m"), "b": P(), "v": P()}
    return both_checked(
        body,
        single,
        params,
        normal(5, 2, 5, 5, 8),
        mesh=mesh(m=4),
        in_specs=(specs, P(None, None, None, "m")),
        out_specs=P(),
    )


# Norms, softmax, attention.


def attention_params(d=8, heads=8, k=4, ff=16):
    return {
        "q": normal(11, d, heads, k) / 2,
        "k": normal(12, d, heads, k) / 2,
        "v": normal(13, d, heads, k) / 2,
        "o": normal(14, heads, k, d) / 4,
        "g": normal(15, d),
        "w": normal(16, d, ff) / 2,
        "u": normal(17, ff, d) / 3,
    }


NAMES = ("epsilon", "attnlrp", "cp_lrp", "gradient_input")
ATTENTIVE = {name: COMPOSITES[name] for name in NAMES}
ATTENTION = {
    "q": P(None, "m"),
    "k": P(None, "m"),
    "v": P(None, "m"),
    "o": P("m"),
    "g": P(),
    "w": P(None, "m"),
    "u": P("m"),
}


def rms_norm(x, g):
    return x * lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6) * g


def block(params, x, total=lambda y: y):
    h = rms_norm(x, params["g"])
    q, k, v = (jnp.einsum("btd,dhk->bthk", h, params[n]) for n in "qkv")
    a = jax.nn.softmax(jnp.einsum("bthk,bshk->bhts", q, k) / 2.0, axis=-1)
    o = jnp.einsum("bhts,bshk->bthk", a, v)
    x = x + total(jnp.einsum("bthk,hkd->btd", o, params["o"]))
    return x + total(jax.nn.silu(x @ params["w"]) @ params["u"])


def last(out):
    return out[:, -1].max(-1)


@check
def transformer_block_by_heads():
    return both_checked(
        lambda params, x: block(params, x, lambda y: lax.psum(y, "m")),
        block,
        attention_params(),
        normal(18, 2, 5, 8),
        ATTENTIVE,
        options={"target": last},
        mesh=mesh(d=2, m=4),
        in_specs=(ATTENTION, P("d")),
        out_specs=P("d"),
    )


@check
def norm_of_sharded_features():
    def single(params, x):
        mean = x.mean(-1, keepdims=True)
        var = ((x - mean) ** 2).mean(-1, keepdims=True)
        h = (x - mean) / jnp.sqrt(var + 1e-5) * params["g"] + params["b"]
        return h @ params["v"] + params["c"]

    def body(params, x):
        mean = lax.pmean(x.mean(-1, keepdims=True), "m")
        var = lax.pmean(((x - mean) ** 2).mean(-1, keepdims=True), "m")
        h = (x - mean) / jnp.sqrt(var + 1e-5) * params["g"] + params["b"]
        return lax.psum(h @ params["v"], "m") + params["c"]

    params = {"g": normal(1, 16), "b": normal(2, 16), "v": normal(3, 16, 4)}
    params["c"] = normal(4, 4)
    specs = {"g": P("m"), "b": P("m"), "v": P("m"), "c": P()}
    return both_checked(
        body,
        single,
        params,
        normal(5, 3, 16),
        mesh=mesh(m=8),
        in_specs=(specs, P(None, "m")),
        out_specs=P(),
    )


@check
def softmax_over_sharded_scores():
    def single(params, x):
        scores = x @ params["w"]
        return jax.nn.softmax(scores, axis=-1) @ params["v"]

    def body(params, x):
        scores = x @ params["w"]
        top = lax.stop_gradient(scores.max(-1, keepdims=True))
        e = jnp.exp(scores - lax.pmax(top, "m"))
        weights = e / lax.psum(e.sum(-1, keepdims=True), "m")
        return lax.psum(weights @ params["v"], "m")

    params = {"w": normal(1, 6, 16), "v": normal(2, 16, 4)}
    specs = {"w": P(None, "m"), "v": P("m")}
    return both_checked(
        body,
        single,
        params,
        normal(5, 3, 6),
        ATTENTIVE,
        mesh=mesh(m=8),
        in_specs=(specs, P()),
        out_specs=P(),
    )


@check
def attention_over_sharded_keys():
    """Sequence parallel: each device has some keys and values, all have the queries."""
    params = {n: normal(i, 6, 4) for i, n in enumerate("qkv")} | {"o": normal(9, 4, 3)}

    def single(params, x):
        q, k, v = (x @ params[n] for n in "qkv")
        a = jax.nn.softmax(q @ k.swapaxes(-1, -2) / 2.0, axis=-1)
        return (a @ v) @ params["o"]

    def body(params, x):
        whole = lax.all_gather(x, "s", axis=1, tiled=True)
        q, k, v = whole @ params["q"], x @ params["k"], x @ params["v"]
        scores = q @ k.swapaxes(-1, -2) / 2.0
        top = lax.pmax(lax.stop_gradient(scores).max(-1, keepdims=True), "s")
        e = jnp.exp(scores - top)
        total = lax.psum(e.sum(-1, keepdims=True), "s")
        return lax.psum((e / total) @ v, "s") @ params["o"]

    sharded = jax.shard_map(
        body, mesh=mesh(s=8), in_specs=(P(), P(None, "s")), out_specs=P()
    )
    x = normal(5, 2, 16, 6)
    return compared(sharded, single, params, x, ATTENTIVE, target=last)


# Rings, exchanges, loops.


def online_attention(q, k, v, n, following):
    """Attention to one block of keys after another, as a ring of devices does it."""
    shape = q.shape[:-1]
    start = (k, v, jnp.full(shape, -1e30), jnp.zeros(shape), jnp.zeros_like(q))

    def step(carry, _):
        k, v, top, total, out = carry
        scores = q @ k.swapaxes(-1, -2)
        new = jnp.maximum(top, lax.stop_gradient(scores).max(-1))
        e, shrink = jnp.exp(scores - new[..., None]), jnp.exp(top - new)
        total = total * shrink + e.sum(-1)
        out = out * shrink[..., None] + e @ v
        return (following(k), following(v), new, total, out), None

    (*_, total, out), _ = lax.scan(step, start, None, length=n)
    return out / total[..., None]


@check
def ring_attention():
    """On one device, a batch of all queries with the keys in the same order."""
    params = {n: normal(i, 6, 4) for i, n in enumerate("qkv")} | {"o": normal(9, 4, 3)}
    n = 4

    def body(params, x):
        q, k, v = (x @ params[name] for name in "qkv")
        ring = [(i, (i + 1) % n) for i in range(n)]
        following = lambda a: lax.ppermute(a, "s", ring)  # noqa: E731
        return online_attention(q, k, v, n, following) @ params["o"]

    def single(params, x):
        blocks = x.reshape(x.shape[0], n, -1, x.shape[-1]).swapaxes(0, 1)
        q, k, v = (blocks @ params[name] for name in "qkv")
        following = lambda a: jnp.roll(a, 1, axis=0)  # noqa: E731
        out = online_attention(q, k, v, n, following) @ params["o"]
        return out.swapaxes(0, 1).reshape(*x.shape[:2], -1)

    def whole(params, x):
        q, k, v = (x @ params[name] for name in "qkv")
        a = jax.nn.softmax(q @ k.swapaxes(-1, -2), axis=-1)
        return (a @ v) @ params["o"]

    x = normal(5, 2, 16, 6)
    sharded = jax.shard_map(
        body,
        mesh=mesh(s=n),
        in_specs=(P(), P(None, "s")),
        out_specs=P(None, "s"),
        check_vma=False,
    )
    found = compared(sharded, single, params, x, ATTENTIVE, target=last)
    gradient = {"gradient_input": "gradient_input"}
    amounts = compared(sharded, whole, params, x, gradient, target=last)
    return found | {"of the whole softmax": amounts["gradient_input"]}


@check
def experts_by_all_to_all():
    """Tokens go to the device of their expert and back; the router's gate weighs."""
    experts, tokens, d = 8, 16, 4
    params = {"r": normal(1, d, experts), "w": normal(2, experts, d, 6) / 2}
    params |= {"v": normal(3, experts, 6, d) / 2}

    def routed(params, x, exchange, back):
        gates = jax.nn.softmax(x @ params["r"], axis=-1)
        sent = gates.T[..., None] * x  # (experts, tokens, d): every expert's tokens
        received = exchange(sent)
        hidden = jax.nn.relu(jnp.einsum("etd,edh->eth", received, params["w"]))
        out = jnp.einsum("eth,ehd->etd", hidden, params["v"])
        return x + back(out).sum(0)

    def body(params, x):
        to = lambda a: lax.all_to_all(a, "e", 0, 1, tiled=True)  # noqa: E731
        back = lambda a: lax.all_to_all(a, "e", 1, 0, tiled=True)  # noqa: E731
        return routed(params, x, to, back)

    def single(params, x):
        return routed(params, x, lambda a: a, lambda a: a)

    specs = {"r": P(), "w": P("e"), "v": P("e")}
    return both_checked(
        body,
        single,
        params,
        normal(5, tokens, d),
        COMPOSITES,
        mesh=mesh(e=8),
        in_specs=(specs, P("e")),
        out_specs=P("e"),
    )


@check
def exchange_without_tiles():
    def body(params, x):  # (1, 8, 3): what this device sends to each
        return lax.all_to_all(x, "e", 1, 1) * params

    def single(params, x):
        return x.swapaxes(0, 1) * params

    return both_checked(
        body,
        single,
        normal(1, 3),
        normal(2, 8, 8, 3),
        {k: COMPOSITES[k] for k in ("epsilon", "gradient_input")},
        options={"target": lambda out: (out[:, 5] * jnp.arange(1.0, 4.0)).sum(-1)},
        mesh=mesh(e=8),
        in_specs=(P(), P("e")),
        out_specs=P("e"),
    )


@check
def exchange_with_the_neighbours():
    """A stencil on a line: its ends receive zeros."""
    n = 8

    def body(params, x):
        left = lax.ppermute(x[-1:], "s", [(i, i + 1) for i in range(n - 1)])
        right = lax.ppermute(x[:1], "s", [(i + 1, i) for i in range(n - 1)])
        whole = jnp.concatenate([left, x, right])
        return jax.nn.relu(
            whole[:-2] @ params[0] + x @ params[1] + whole[2:] @ params[2]
        )

    def single(params, x):
        whole = jnp.pad(x, ((1, 1), (0, 0)))
        return jax.nn.relu(
            whole[:-2] @ params[0] + x @ params[1] + whole[2:] @ params[2]
        )

    return both_checked(
        body,
        single,
        normal(1, 3, 3, 3),
        normal(2, 16, 3),
        mesh=mesh(s=n),
        in_specs=(P(), P("s")),
        out_specs=P("s"),
    )


def layers(params, x, total=lambda y: y):
    def layer(x, p):
        hidden = jax.nn.gelu(x @ p["w"] + p["b"])
        return x + total(hidden @ p["v"]), None

    return lax.scan(layer, x, params)[0]


LAYERS = {"w": P(None, None, "m"), "b": P(None, "m"), "v": P(None, "m")}


def layers_params(n=3, d=6, h=16):
    return {
        "w": normal(1, n, d, h) / 2,
        "b": normal(2, n, h),
        "v": normal(3, n, h, d) / 4,
    }


@check
def scan_over_tensor_parallel_layers():
    return both_checked(
        lambda params, x: layers(params, x, lambda y: lax.psum(y, "m")),
        layers,
        layers_params(),
        normal(4, 4, 6),
        mesh=mesh(d=2, m=4),
        in_specs=(LAYERS, P("d")),
        out_specs=P("d"),
    )


@check
def shard_map_inside_of_a_scan():
    sharded_mlp = jax.jit(
        jax.shard_map(
            lambda p, x: lax.psum(jax.nn.gelu(x @ p["w"] + p["b"]) @ p["v"], "m"),
            mesh=mesh(m=4),
            out_specs=P(),
            in_specs=({"w": P(None, "m"), "b": P("m"), "v": P("m")}, P()),
        )
    )

    def sharded(params, x):
        return lax.scan(lambda x, p: (x + sharded_mlp(p, x), None), x, params)[0]

    return compared(sharded, layers, layers_params(), normal(4, 4, 6))


@check
def branches_and_loops_of_collectives():
    def program(params, x, total):
        def even(x):
            return x + total(jnp.tanh(x @ params["w"]) @ params["v"])

        def odd(x):
            return 0.5 * x

        def step(i, x):
            return lax.cond(i % 2 == 0, even, odd, x)

        x = lax.while_loop(
            lambda s: s[0] < 2, lambda s: (s[0] + 1, even(s[1])), (0, x)
        )[1]
        return lax.fori_loop(0, 3, step, jax.checkpoint(even)(x))

    params = {"w": normal(1, 6, 16) / 2, "v": normal(2, 16, 6) / 4}
    return both_checked(
        lambda params, x: program(params, x, lambda y: lax.psum(y, "m")),
        lambda params, x: program(params, x, lambda y: y),
        params,
        normal(4, 4, 6),
        mesh=mesh(m=8),
        in_specs=({"w": P(None, "m"), "v": P("m")}, P()),
        out_specs=P(),
    )


@check
def largest_over_devices():
    def single(params, x):
        h = x @ params["w"]
        return (h.max(0) + h.min(0)) @ params["v"] + jnp.maximum(h[:8].max(), 0.0)

    def body(params, x):
        h = x @ params["w"]
        most, least = lax.pmax(h.max(0), "d"), lax.pmin(h.min(0), "d")
        first = jnp.where(lax.axis_index("d") < 4, h.max(), -jnp.inf)
        return (most + least) @ params["v"] + jnp.maximum(lax.pmax(first, "d"), 0.0)

    params = {"w": normal(1, 3, 5), "v": normal(2, 5, 4)}
    return both_checked(
        body,
        single,
        params,
        normal(3, 16, 3),
        mesh=mesh(d=8),
        in_specs=(P(), P("d")),
        out_specs=P(),
    )


@check
def winners_that_tie():
    x = jnp.asarray(np.repeat([[3.0, 1.0]], 16, 0)).at[3].set(-1.0)
    return both_checked(
        lambda p, x: lax.pmax(x.max(0), "d") * p,
        lambda p, x: x.max(0) * p,
        jnp.array([2.0, 3.0]),
        x,
        {"epsilon": "epsilon"},
        mesh=mesh(d=8),
        in_specs=(P(), P("d")),
        out_specs=P(),
    )


# Meshes of other kinds, nesting, what else can be asked for.


@check
def some_axes_of_the_mesh():
    """The other axes are left to the compiler, constraints included."""
    both = mesh(d=2, m=4)

    def body(params, x):
        hidden = jax.nn.gelu(x @ params["w"] + params["b"])
        hidden = lax.with_sharding_constraint(hidden, P("d", None))
        return lax.psum(hidden @ params["v"], "m") + params["c"]

    sharded = jax.shard_map(
        body, mesh=both, in_specs=(COLUMN_ROW, P()), out_specs=P(), axis_names={"m"}
    )
    x = jax.device_put(normal(4, 4, 6), NamedSharding(both, P("d")))
    with jax.set_mesh(both):
        return compared(sharded, mlp, mlp_params(), x)


@check
def nested_shard_maps():
    both = mesh(d=2, m=4)

    def body(params, x):
        inner = jax.shard_map(
            lambda p, x: lax.psum(jax.nn.gelu(x @ p["w"] + p["b"]) @ p["v"], "m"),
            in_specs=({k: COLUMN_ROW[k] for k in "wbv"}, P()),
            out_specs=P(),
            axis_names={"m"},
        )
        out = inner({k: params[k] for k in "wbv"}, x) + params["c"]
        return out + lax.pmean(out.mean(), "d")

    def single(params, x):
        out = mlp(params, x)
        return out + out.mean()

    sharded = jax.shard_map(
        body, mesh=both, in_specs=(P(), P("d")), out_specs=P("d"), axis_names={"d"}
    )
    return compared(sharded, single, mlp_params(), normal(4, 4, 6))


@check
def parameters_and_captures():
    """Relevance of sharded parameters, and of a value named inside the body."""

    def body(params, x):
        hidden = jlrp.tag(jax.nn.gelu(x @ params["w"] + params["b"]), "hidden")
        return lax.psum(hidden @ params["v"], "m") + params["c"]

    def single(params, x):
        hidden = jlrp.tag(jax.nn.gelu(x @ params["w"] + params["b"]), "hidden")
        return hidden @ params["v"] + params["c"]

    sharded = jax.shard_map(
        body, mesh=mesh(d=2, m=4), in_specs=(COLUMN_ROW, P("d")), out_specs=P("d")
    )
    params, x, found = mlp_params(), normal(4, 4, 6), {}
    for name in FEW:
        options = {"composite": COMPOSITES[name], "wrt": ("x", "params")}
        one = jlrp.relevance(single, params, x, **options)
        found[name] = difference(one, jlrp.relevance(sharded, params, x, **options))
    explain = [
        jlrp.explain(fn, composite="epsilon", capture="hidden")
        for fn in (single, sharded)
    ]
    one, many = (e(params, x).captured["hidden"] for e in explain)
    found["captured"] = abs(float(one.sum() - many.sum()))
    found["unexplained"] = abs(float(jlrp.audit(sharded, params, x).unexplained))
    return found


@check
def token_ids_in_a_sharded_table():
    """Each device looks up the tokens of its part of the vocabulary."""
    params = {"e": normal(1, 32, 6), "v": normal(2, 6, 4)}

    def single(params, ids):
        return params["e"][ids].sum(1) @ params["v"]

    def body(params, ids):
        size = params["e"].shape[0]
        local = ids - lax.axis_index("m") * size
        here = (local >= 0) & (local < size)
        fetched = params["e"][jnp.clip(local, 0, size - 1)]
        return (
            lax.psum(jnp.where(here[..., None], fetched, 0.0), "m").sum(1) @ params["v"]
        )

    ids = jnp.asarray(np.random.default_rng(0).integers(0, 32, (3, 5)))
    return both_checked(
        body,
        single,
        params,
        ids,
        mesh=mesh(m=8),
        in_specs=({"e": P("m"), "v": P()}, P()),
        out_specs=P(),
    )


@check
def rule_of_the_users_inside():
    def fused(w, x):
        return jnp.tanh(x @ w)

    def made():
        wrapped = jlrp.custom_relevance(fused)
        wrapped.def_relevance(
            lambda r, x, y: (None, (r / (x[1] @ x[0])) @ x[0].T * x[1])
        )
        return wrapped

    wrapped = made()

    def body(params, x):
        return lax.psum(wrapped(params["w"], x) @ params["v"], "m")

    def single(params, x):
        return wrapped(params["w"], x) @ params["v"]

    params = {"w": normal(1, 6, 16), "v": normal(2, 16, 4)}
    return both_checked(
        body,
        single,
        params,
        normal(5, 3, 6),
        mesh=mesh(m=8),
        in_specs=({"w": P(None, "m"), "v": P("m")}, P()),
        out_specs=P(),
    )


def kernel_with_derivative(x):
    @jax.custom_vjp
    def kernel(x):
        shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
        out = jax.pure_callback(np.tanh, shape, x, vmap_method="expand_dims")
        return out

    kernel.defvjp(lambda x: (kernel(x), x), lambda x, g: (g * (1 - jnp.tanh(x) ** 2),))
    return kernel(x)


@check
def kernel_inside():
    """Of an opaque kernel, all that is known is the derivative around it."""

    def body(params, x):
        return lax.psum(kernel_with_derivative(x @ params["w"]) @ params["v"], "m")

    def single(params, x):
        return kernel_with_derivative(x @ params["w"]) @ params["v"]

    params = {"w": normal(1, 6, 16), "v": normal(2, 16, 4)}
    specs = {"w": P(None, "m"), "v": P("m")}
    sharded = jax.shard_map(
        body, mesh=mesh(m=8), in_specs=(specs, P()), out_specs=P(), check_vma=False
    )
    return compared(sharded, single, params, normal(5, 3, 6))


# jlrp inside of a shard_map, meshes of Explicit axes.


@check
def relevance_inside_of_a_shard_map():
    found = {}
    cases = {
        "mlp": (mlp, mlp_params(), normal(4, 16, 6), None),
        "scan": (layers, layers_params(), normal(4, 16, 6), None),
        "attention": (block, attention_params(), normal(18, 8, 5, 8), last),
    }
    for checked in (True, False):
        for name, (fn, params, x, target) in cases.items():
            explain = functools.partial(
                jlrp.relevance, fn, target=target, composite="attnlrp"
            )
            inside = jax.shard_map(
                explain,
                mesh=mesh(d=8),
                in_specs=(P(), P("d")),
                out_specs=P("d"),
                check_vma=checked,
            )
            one, many = explain(params, x), inside(params, x)
            found[f"{name} {checked}"] = difference(one, many)
    return found


@check
def explicit_axes():
    """Types that say how arrays are spread: relevance has the type of x."""
    both, found = mesh(AxisType.Explicit, d=2, m=4), {}
    params, x = mlp_params(), normal(4, 4, 6)
    put = {
        k: jax.device_put(v, NamedSharding(both, COLUMN_ROW[k]))
        for k, v in params.items()
    }
    placed = jax.device_put(x, NamedSharding(both, P("d")))

    def row_summed(params, x):
        hidden = jax.nn.gelu(x @ params["w"] + params["b"])
        return jnp.matmul(hidden, params["v"], out_sharding=P("d")) + params["c"]

    def body(params, x):
        hidden = jax.nn.gelu(x @ params["w"] + params["b"])
        return lax.psum(hidden @ params["v"], "m") + params["c"]

    with jax.set_mesh(both):
        mapped = jax.shard_map(body, in_specs=(COLUMN_ROW, P("d")), out_specs=P("d"))
        for name, fn in {"jit": row_summed, "shard_map": mapped}.items():
            many = jlrp.relevance(fn, put, placed, composite="epsilon")
            assert jax.typeof(many) == jax.typeof(placed), jax.typeof(many)
            one = jlrp.relevance(mlp, params, x, composite="epsilon")
            found[name] = difference(one, many)
            ledger = jlrp.audit(fn, put, placed, composite="epsilon")
            found[f"{name}, unexplained"] = abs(float(ledger.unexplained))
    return found


# Without shard_map.


@check
def sharding_constraints():
    """jit with shardings: constraints are not seen by facts, x keeps its sharding."""
    both = mesh(d=2, m=4)
    placed = lambda x, *spec: lax.with_sharding_constraint(  # noqa: E731
        x, NamedSharding(both, P(*spec))
    )

    def sharded(params, x):
        z = placed(x @ params["w"], "d", "m") + params["b"]
        hidden = placed(jax.nn.gelu(placed(z, "d", "m")), "d", "m")
        out = placed(hidden @ params["v"], "d", None) + params["c"]
        scores = placed(jnp.exp(placed(out - out.max(-1, keepdims=True), "d")), "d")
        return scores / placed(scores.sum(-1, keepdims=True), "d", None)

    def single(params, x):
        return jax.nn.softmax(mlp(params, x), axis=-1)

    params = mlp_params()
    put = {
        k: jax.device_put(v, NamedSharding(both, COLUMN_ROW[k]))
        for k, v in params.items()
    }
    x = jax.device_put(normal(4, 4, 6), NamedSharding(both, P("d")))
    jitted = jax.jit(sharded, out_shardings=NamedSharding(both, P("d")))
    found = compared(jitted, single, put, x, ATTENTIVE)
    relevance = jlrp.relevance(jitted, put, x)
    assert relevance.sharding.is_equivalent_to(x.sharding, 2), relevance.sharding
    return found


@check
def named_axes_of_vmap():
    """Collectives of ``jax.vmap``'s axes are gone when the program is traced."""

    def body(params, x):
        h = jax.nn.relu(x @ params["w"] + params["b"])
        h = h + lax.ppermute(h, "n", [(i, (i + 1) % 4) for i in range(4)])
        return (h - lax.pmean(h, "n")) @ params["v"] + lax.pmax(h, "n")[:4]

    def single(params, x):
        h = jax.nn.relu(x @ params["w"] + params["b"])
        h = h + jnp.roll(h, 1, axis=0)
        return (h - h.mean(0)) @ params["v"] + h.max(0)[:4]

    mapped = jax.vmap(body, in_axes=(None, 0), axis_name="n")
    return compared(mapped, single, mlp_params(), normal(4, 4, 6))


# What is local stays local, and what is refused says why.


@check
def collectives_as_few_as_in_the_gradient():
    """Of the compiled relevance, dots and collectives are as in the gradient's."""
    both = mesh(d=2, m=4)

    def body(params, x):
        hidden = jax.nn.relu(x @ params["w"] + params["b"])
        return lax.psum(hidden @ params["v"], "m") + params["c"]

    fn = jax.shard_map(body, mesh=both, in_specs=(COLUMN_ROW, P("d")), out_specs=P("d"))
    params = {
        k: jax.device_put(v, NamedSharding(both, COLUMN_ROW[k]))
        for k, v in mlp_params().items()
    }
    x = jax.device_put(normal(4, 4, 6), NamedSharding(both, P("d")))
    explained = lambda p, x: jlrp.relevance(fn, p, x, composite="epsilon")  # noqa: E731
    gradient = jax.grad(lambda p, x: fn(p, x).max(-1).sum(), argnums=1)

    def counted(function):
        text = jax.jit(function).lower(params, x).compile().as_text()
        kinds = ("all-reduce", "all-gather", "all-to-all", "collective-permute")
        return [text.count(f" {kind}(") for kind in kinds], text.count(" dot(")

    (sums, *others), dots = counted(explained)
    (most, *_), same = counted(gradient)
    assert others == [0, 0, 0] and 0 < sums <= most and dots == same, (sums, most, dots)
    return {
        "replicated": 0.0
        if jax.jit(explained)(params, x).sharding.spec[0] == "d"
        else 1.0
    }


@check
def groups_of_rows_and_of_batches():
    """Ragged products and convolutions by batch groups, summed over features."""
    line = mesh(m=8)
    sizes = jnp.array([1, 3, 2], jnp.int32)

    def ragged(params, x):
        return jax.nn.relu(lax.ragged_dot(x, params["w"], sizes)) @ params["v"]

    def ragged_shards(params, x):
        z = lax.psum(lax.ragged_dot(x, params["w"], sizes), "m")
        return jax.nn.relu(z) @ params["v"]

    by_features = {"w": P(None, "m"), "v": P()}, P(None, "m")
    params = {"w": normal(1, 3, 16, 4), "v": normal(2, 4, 3)}

    def conv(x, w):
        numbers = ("NHWC", "HWIO", "NHWC")
        return lax.conv_general_dilated(
            x, w, (1, 1), "SAME", dimension_numbers=numbers, batch_group_count=2
        )

    by_channels = {"w": P(None, None, "m")}, P(None, None, None, "m")
    kernel = {"w": normal(3, 3, 3, 8, 6)}
    large = jlrp.composites.epsilon(0.5)
    cases = {
        "ragged": (ragged, ragged_shards, by_features, params, normal(4, 6, 16)),
        "batches": (
            lambda p, x: conv(x, p["w"]).mean((1, 2)),
            lambda p, x: lax.psum(conv(x, p["w"]), "m").mean((1, 2)),
            by_channels,
            kernel,
            normal(5, 4, 5, 5, 8),
        ),
    }
    found = {}
    for name, (one, shards, specs, params, x) in cases.items():
        spread = jax.shard_map(shards, mesh=line, in_specs=specs, out_specs=P())
        for c in (large, "epsilon_plus", "attnlrp"):
            a, b = (jlrp.relevance(f, params, x, 0, composite=c) for f in (one, spread))
            found[f"{name} {c if isinstance(c, str) else 'epsilon'}"] = difference(a, b)
    return found


@check
def refusals():
    """Errors name the collective, the line and the way out."""
    found = {}

    def message(name, fn, *args):
        try:
            fn(*args)
        except jlrp.JlrpError as error:
            found[name] = str(error)

    line = mesh(d=8)
    groups = jax.shard_map(
        lambda p, x: lax.psum(x, "d", axis_index_groups=[[0, 1, 2, 3], [4, 5, 6, 7]]),
        mesh=line,
        in_specs=(P(), P("d")),
        out_specs=P("d"),
        check_vma=False,
    )
    message("groups", jlrp.relevance, groups, (), normal(1, 8, 3))
    inside = jax.shard_map(
        lambda x: jlrp.relevance(lambda p, x: lax.psum(x, "d"), (), x),
        mesh=line,
        in_specs=P("d"),
        out_specs=P("d"),
    )
    message("inside", inside, normal(1, 8, 3))
    for name, word in {
        "groups": "groups of devices",
        "inside": "around the shard_map",
    }.items():
        assert word in found[name] and "sharded_programs.py" in found[name], found
        assert "psum" in found[name], found
    return {}


if __name__ == "__main__":
    for chosen in sys.argv[1:] or list(CHECKS):
        try:
            amounts = CHECKS[chosen]()
        except Exception:  # the other programs are to be run all the same
            amounts = {"error": traceback.format_exc()}
        print(json.dumps({chosen: amounts}), flush=True)
        jax.clear_caches()
