"""One network, however it is written, has one explanation, under every composite."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from differences import spelled
from jax import lax
from peers import compare, flax_networks, jax_networks
from peers import networks as nets

import jlrp

TOLERANCE = 1e-10
COMPOSITES = {
    "epsilon": jlrp.composites.epsilon(),
    "epsilon_0": jlrp.composites.epsilon(epsilon=0.0),
    "epsilon_plus": jlrp.composites.epsilon_plus(),
    "epsilon_plus_flat": jlrp.composites.epsilon_plus_flat(),
    "epsilon_gamma_box": jlrp.composites.epsilon_gamma_box(low=-3.0, high=3.5),
    "epsilon_alpha2_beta1": jlrp.composites.epsilon_alpha2_beta1(),
    "epsilon_alpha2_beta1_flat": jlrp.composites.epsilon_alpha2_beta1_flat(),
    "excitation_backprop": jlrp.composites.excitation_backprop(),
    "gradient_input": jlrp.composites.gradient_input(),
    "dynamic_lrp": jlrp.composites.dynamic_lrp(),
    "dynamic_lrp_gamma": jlrp.composites.dynamic_lrp(gamma_conv=2.0, gamma_dense=0.5),
}
all_composites = pytest.mark.parametrize("composite", COMPOSITES)
# DynamicLRP gives a share to the bias of a layer and none to the shift of a batch norm.
# A layer that is scaled and shifted may be either, so its spellings do not count there.
mergeable = [name for name in COMPOSITES if not name.startswith("dynamic")]
# Where only one fact is in question: one composite for each thing that can be done.
FEW = ("epsilon_plus", "excitation_backprop", "dynamic_lrp_gamma")
few_composites = pytest.mark.parametrize("composite", FEW)
SEED = 11


def pairs(networks, others=()):
    """All composites on the networks, a few on the others."""
    both = [*itertools.product(networks, COMPOSITES), *itertools.product(others, FEW)]
    ids = [f"{network}-{composite}" for network, composite in both]
    return pytest.mark.parametrize(("network", "composite"), both, ids=ids)


@functools.cache
def sample(network):
    return nets.weights(network, SEED), nets.inputs(network, SEED)


@functools.cache
def explained(network, composite, **spelling):
    return compare.explain(network, *sample(network), COMPOSITES[composite], **spelling)


def assert_same(ours, network, composite):
    compare.assert_equal(ours, explained(network, composite), TOLERANCE)


@pairs([nets.CNN, nets.RESNET], [nets.CONV_KINDS, nets.DENSENET])
def test_channels_first(network, composite):
    assert_same(explained(network, composite, layout="NCHW"), network, composite)


@pytest.mark.parametrize("batch_norm", ["torch", "keras"])
@pairs([nets.RESNET], [nets.CONV_KINDS, nets.DENSENET])
def test_batch_norm(network, batch_norm, composite):
    ours = explained(network, composite, batch_norm=batch_norm)
    assert_same(ours, network, composite)


def explain_flax(function, variables, network, composite):
    x = jax_networks.to_layout(sample(network)[1], "NHWC")
    result = jlrp.relevance(
        function, variables, jnp.asarray(x), composite=COMPOSITES[composite]
    )
    return jax_networks.from_layout(result, "NHWC")


@pytest.mark.relaxed  # Flax's average pooling divides by an integer
@pairs([nets.CNN, nets.RESNET], [nets.CONV_KINDS, nets.MLP_TANH])
def test_linen(network, composite):
    variables = flax_networks.linen_variables(network, sample(network)[0])
    function = flax_networks.linen_function(network)
    assert_same(
        explain_flax(function, variables, network, composite), network, composite
    )


@pytest.mark.relaxed
@pairs([nets.CNN, nets.RESNET], [nets.CONV_KINDS, nets.MLP_TANH])
def test_nnx(network, composite):
    state = flax_networks.nnx_state(network, sample(network)[0])
    function = flax_networks.nnx_function(network)
    assert_same(explain_flax(function, state, network, composite), network, composite)


@pairs([nets.CNN, nets.RESNET, nets.MLP_TANH])
def test_without_jit(network, composite):
    with jax.disable_jit():
        ours = compare.explain(network, *sample(network), COMPOSITES[composite])
    assert_same(ours, network, composite)


@pairs([nets.MLP_TANH], [nets.RESNET])
def test_inside_jit(network, composite):
    values, x = sample(network)
    explain = jax.jit(
        functools.partial(
            jlrp.relevance,
            jax_networks.function(network),
            composite=COMPOSITES[composite],
        )
    )
    x = jnp.asarray(jax_networks.to_layout(x, "NHWC"))
    ours = explain(jax_networks.params(network, values), x)
    assert_same(jax_networks.from_layout(ours, "NHWC"), network, composite)


# Dense layers in other words: each gives x @ kernel + bias.


def bias_before_product(kernel, bias, x):
    return jnp.broadcast_to(bias, (x.shape[0], bias.size)) + x @ kernel


def bias_subtracted(kernel, bias, x):
    return x @ kernel - (-bias)[None, :]


def bias_in_two_parts(kernel, bias, x):
    return x @ kernel + bias[None, :] * 0.25 + bias[None, :] * 0.75


def bias_after_reshape(kernel, bias, x):
    y = (x @ kernel).reshape(x.shape[0], -1, 2)
    return (y + bias.reshape(1, -1, 2)).reshape(x.shape[0], -1)


def bias_before_transpose(kernel, bias, x):
    return jnp.transpose(kernel.T @ x.T + bias[:, None])


def bias_after_broadcast(kernel, bias, x):
    y = jnp.broadcast_to((x @ kernel)[None], (1, x.shape[0], bias.size))
    return (y + bias[None, None, :])[0]


def scaled_after_product(kernel, bias, x):
    return (x @ (kernel * 0.5)) * 2.0 + bias[None, :]


def scaled_after_bias(kernel, bias, x):
    return (x @ kernel + bias[None, :] - 0.5) / 4.0 * 4.0 + 0.5


def einsum(kernel, bias, x):
    return jnp.einsum("bi,io->bo", x, kernel) + bias[None, :]


def einsum_of_heads(kernel, bias, x):
    kernel = kernel.reshape(kernel.shape[0], -1, 2)
    y = jnp.einsum("bi,iho->hbo", x, kernel) + bias.reshape(-1, 1, 2)
    return y.transpose(1, 0, 2).reshape(x.shape[0], -1)


def einsum_of_split_input(kernel, bias, x):
    kernel = kernel.reshape(-1, 2, kernel.shape[1])
    x = x.reshape(x.shape[0], -1, 2)
    return jnp.einsum("sio,bsi->bo", kernel, x) + bias[None, :]


def kernel_on_the_left(kernel, bias, x):
    y = lax.dot_general(kernel, x, (((0,), (1,)), ((), ())))
    return y.T + bias[None, :]


def odd_dimension_numbers(kernel, bias, x):
    """x as (2, batch, rest), the kernel as (rest, out, 2)."""
    x = x.reshape(x.shape[0], -1, 2).transpose(2, 0, 1)
    kernel = kernel.reshape(-1, 2, kernel.shape[1]).transpose(0, 2, 1)
    y = lax.dot_general(x, kernel, (((2, 0), (0, 2)), ((), ())))
    return y + bias[None, :]


def one_example_at_a_time(kernel, bias, x):
    return jax.vmap(lambda one: kernel.T @ one + bias)(x)


def jitted(kernel, bias, x):
    return _jitted_dense(kernel, bias, x)


@jax.jit
def _jitted_dense(kernel, bias, x):
    return x @ kernel + bias[None, :]


DENSE_SPELLINGS = (
    bias_before_product,
    bias_subtracted,
    bias_in_two_parts,
    bias_after_reshape,
    bias_before_transpose,
    bias_after_broadcast,
    einsum,
    einsum_of_heads,
    einsum_of_split_input,
    kernel_on_the_left,
    odd_dimension_numbers,
    one_example_at_a_time,
    jitted,
)
SCALED_DENSE_SPELLINGS = (scaled_after_product, scaled_after_bias)


def some_at_a_time(spellings, size):
    starts = range(0, len(spellings), size)
    chosen = [spellings[start : start + size] for start in starts]
    ids = ["-".join(spelling.__name__ for spelling in few) for few in chosen]
    return pytest.mark.parametrize("spellings", chosen, ids=ids)


EVEN_MLP = nets.Network(
    "even_mlp",
    (10,),
    (
        nets.Dense("dense1", 10, 14),
        nets.RELU,
        nets.Dense("dense2", 14, 12),
        nets.TANH,
        nets.Dense("dense3", 12, 6),
    ),
)


def even_mlp(*dense):
    """The network with its dense layers spelled by each of `dense` in turn."""

    def fn(params, x):
        spellings = itertools.cycle(dense)
        for layer in EVEN_MLP.layers:
            if isinstance(layer, nets.Dense):
                values = params[layer.name]
                x = next(spellings)(values["kernel"], values["bias"], x)
            else:
                x = jax_networks.ACTIVATIONS[layer.function](x)
        return x

    return fn


@all_composites
@some_at_a_time(DENSE_SPELLINGS, 3)
def test_dense(spellings, composite):
    ours = explain_plain(even_mlp(*spellings), EVEN_MLP, composite)
    assert_same(ours, EVEN_MLP, composite)


@pytest.mark.parametrize("composite", mergeable)
def test_scaled_dense(composite):
    ours = explain_plain(even_mlp(*SCALED_DENSE_SPELLINGS), EVEN_MLP, composite)
    assert_same(ours, EVEN_MLP, composite)


def explain_plain(fn, network, composite):
    values, x = sample(network)
    params = jax_networks.params(network, values)
    x = jnp.asarray(jax_networks.to_layout(x, "NHWC"))
    result = jlrp.relevance(fn, params, x, composite=COMPOSITES[composite])
    return jax_networks.from_layout(result, "NHWC")


# Convolutions in other words: each is NHWC with a bias.


def same_padding(kernel, bias, x):
    y = lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return y + bias.reshape(1, 1, 1, -1)


def odd_convolution_layout(kernel, bias, x):
    y = lax.conv_general_dilated(
        x.transpose(3, 1, 2, 0),
        kernel.transpose(2, 0, 1, 3),
        (1, 1),
        [(1, 1), (1, 1)],
        dimension_numbers=("CHWN", "IHWO", "HNWC"),
    )
    return (y + bias.reshape(1, 1, 1, -1)).transpose(1, 0, 2, 3)


def spatial_dimensions_merged(kernel, bias, x):
    y = _convolution(kernel, x)
    return (y.reshape(len(y), -1, bias.size) + bias[None, None, :]).reshape(y.shape)


def bias_broadcast_first(kernel, bias, x):
    y = _convolution(kernel, x)
    return jnp.broadcast_to(bias, y.shape) + y


def bias_on_channels_first(kernel, bias, x):
    y = _convolution(kernel, x).transpose(0, 3, 1, 2)
    return (y + bias.reshape(1, -1, 1, 1)).transpose(0, 2, 3, 1)


def scale_around_bias(kernel, bias, x):
    """A scale that is a parameter: one by a literal belongs to the activation."""
    scale = jnp.abs(bias) + 0.5
    y = _convolution(kernel * scale[None, None, None, :], x)
    return (y + (bias * scale).reshape(1, 1, 1, -1)) / scale.reshape(1, 1, 1, -1)


def _convolution(kernel, x):
    return lax.conv_general_dilated(
        x, kernel, (1, 1), [(1, 1)] * 2, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


CONV_SPELLINGS = (
    same_padding,
    odd_convolution_layout,
    spatial_dimensions_merged,
    bias_broadcast_first,
    bias_on_channels_first,
)
SMALL_CNN = nets.Network(
    "small_cnn",
    (3, 6, 6),
    (
        nets.Conv("conv1", 3, 5, padding=1),
        nets.RELU,
        nets.Conv("conv2", 5, 4, padding=1),
        nets.RELU,
        nets.GlobalAveragePool(),
        nets.Dense("head", 4, 5),
    ),
)


def convolve(kernel, bias, x):
    return _convolution(kernel, x) + bias.reshape(1, 1, 1, -1)


def average(x):
    return jnp.mean(x, axis=(1, 2))


def small_cnn(*convs, relu=jax.nn.relu, mean=average):
    """The network with its convolutions spelled by each of `convs` in turn."""

    def fn(params, x):
        spellings = itertools.cycle(convs or [convolve])
        for name in ("conv1", "conv2"):
            values = params[name]
            x = relu(next(spellings)(values["kernel"], values["bias"], x))
        return mean(x) @ params["head"]["kernel"] + params["head"]["bias"][None, :]

    return fn


@all_composites
@some_at_a_time(CONV_SPELLINGS, 2)
def test_convolution(spellings, composite):
    ours = explain_plain(small_cnn(*spellings), SMALL_CNN, composite)
    assert_same(ours, SMALL_CNN, composite)


@pytest.mark.parametrize("composite", mergeable)
def test_scaled_convolution(composite):
    ours = explain_plain(small_cnn(scale_around_bias), SMALL_CNN, composite)
    assert_same(ours, SMALL_CNN, composite)


# Activations and means in other words.


RELUS = {
    "maximum": lambda x: jnp.maximum(x, 0.0),
    "where": lambda x: jnp.where(x > 0, x, 0.0),
    "clip": lambda x: jnp.clip(x, 0.0),
    "times_step": lambda x: x * (x > 0).astype(x.dtype),
    "half_sum": lambda x: (x + jnp.abs(x)) * 0.5,
}
MEANS = {
    "sum": lambda x: jnp.sum(x, axis=(1, 2)) / (x.shape[1] * x.shape[2]),
    "after_reshape": lambda x: x.reshape(len(x), -1, x.shape[-1]).mean(axis=1),
}


@few_composites
@pytest.mark.parametrize("relu", RELUS)
def test_relu(relu, composite):
    ours = explain_plain(small_cnn(relu=RELUS[relu]), SMALL_CNN, composite)
    assert_same(ours, SMALL_CNN, composite)


@few_composites
@pytest.mark.parametrize("mean", MEANS)
def test_mean(mean, composite):
    ours = explain_plain(small_cnn(mean=MEANS[mean]), SMALL_CNN, composite)
    assert_same(ours, SMALL_CNN, composite)


# Small functions in other words: under rules that look at signs, at the first layer, at
# activations and at gates. The first spelling of each is the one that is compared with.

ALL = {
    "attnlrp": "attnlrp",
    "cp_lrp": "cp_lrp",
    "epsilon_plus": jlrp.composites.epsilon_plus(),
    "epsilon_plus_flat": jlrp.composites.epsilon_plus_flat(),
    "gamma": jlrp.composites.attnlrp(0.25, 0.05),
    "excitation": jlrp.composites.excitation_backprop(),
}
RNG = np.random.default_rng(0)
WEIGHTS = {
    "w": jnp.asarray(RNG.normal(size=(4, 4))),
    "v": jnp.asarray(RNG.normal(size=(4, 4))),
    "b": jnp.asarray(RNG.normal(size=4)),
}
SAMPLE = jnp.asarray(RNG.normal(size=(4, 4)))


def on(function):
    """A function of ``x @ w``, and a second layer."""
    return lambda p, x: function(x @ p["w"]) @ p["v"]


def with_exp(quotient, exp=jnp.exp):
    return on(lambda s: quotient(exp(s)))


def gelu(inner):
    return on(lambda h: 0.5 * h * (1 + inner(h)))


def _inner(h):
    return 0.7978845608028654 * (h + 0.044715 * h**3)


def rms_norm(mean):
    return lambda p, x: x / jnp.sqrt(mean(x * x) + 1e-3) * p["b"][None] @ p["w"]


def layer_norm(mean):
    def norm(p, x):
        d = x - mean(x)
        return d / jnp.sqrt(mean(d * d) + 1e-3) * p["b"][None] @ p["w"]

    return norm


def gate(learned, f=jax.nn.sigmoid):
    return lambda p, x: x * f(learned(x, p["b"]))


def before_relu(z):
    return lambda p, x: jax.nn.relu(z(p, x)) @ p["v"]


def halves(p, x):
    return jnp.concatenate([x @ p["w"][:, :2], x @ p["w"][:, 2:]], -1)


def parts(p, x):
    zs = jnp.split(x @ p["w"], 2, -1)
    biases = jnp.split(p["b"], 2)
    both = zip(zs, biases, strict=True)
    return jnp.concatenate([jax.nn.relu(z + b[None]) for z, b in both], -1) @ p["v"]


def attention(average):
    def attend(p, x):
        scores = (x @ p["w"]) @ x.T
        return average(scores, x @ p["v"])

    return attend


def late(total, weights=jnp.exp):
    def average(s, v):
        e = weights(s)
        return (e @ v) / total(e)

    return attention(average)


def keep_sum(e):
    return e.sum(-1, keepdims=True)


def routed(combine):
    def route(p, x):
        w, i = jax.lax.top_k(jax.nn.softmax(x @ p["w"]), 2)
        experts = jnp.einsum("nd,ef->nef", x, p["v"])
        return combine(w / w.sum(-1, keepdims=True), i, experts)

    return route


def one_hot(i):
    return jax.nn.one_hot(i, 4, dtype=SAMPLE.dtype)


def placed(w, i):
    return (one_hot(i) * w[..., None]).sum(1)


def taken(experts, i):
    return jnp.take_along_axis(experts, i[..., None], 1)


def normalised(weights):
    return weights / keep_sum(weights)


LOWER = jnp.tril(jnp.ones((4, 4), bool))
MEAN = {
    "mean": lambda v: v.mean(-1, keepdims=True),
    "a dot": lambda v: v @ jnp.full((4, 1), 0.25),
    "the sum, scaled": lambda v: v.sum(-1, keepdims=True) * 0.25,
    "column by column": lambda v: sum(v[:, i : i + 1] for i in range(4)) / 4,
}
GROUPS = {
    "softmax": {
        "jax's": on(jax.nn.softmax),
        "by hand": with_exp(lambda e: e / keep_sum(e)),
        "columns": with_exp(lambda e: e / sum(e[:, i : i + 1] for i in range(4))),
        "a power": with_exp(lambda e: e / keep_sum(e), lambda s: jnp.power(np.e, s)),
        "running sum": with_exp(lambda e: e / jnp.cumsum(e, -1)[:, -1:]),
        "dot with ones": with_exp(lambda e: e / (e @ jnp.ones((4, 1)))),
        "times one over": with_exp(lambda e: e * (1 / e.sum(-1))[:, None]),
    },
    "masked softmax": {
        "scores": on(lambda s: jax.nn.softmax(jnp.where(LOWER, s, -jnp.inf))),
        "weights": with_exp(lambda e: normalised(e * LOWER.astype(e.dtype))),
        "renormalised": on(
            lambda s: normalised(jnp.where(LOWER, jax.nn.softmax(s), 0.0))
        ),
    },
    "attention": {
        "early": attention(lambda s, v: jax.nn.softmax(s) @ v),
        "late": late(keep_sum),
        "late, dot with ones": late(lambda e: e @ jnp.ones((4, 1))),
        "late, summed": attention(
            lambda s, v: (jnp.exp(s)[..., None] * v[None]).sum(1) / keep_sum(jnp.exp(s))
        ),
    },
    "masked attention": {
        "early": attention(
            lambda s, v: jax.nn.softmax(jnp.where(LOWER, s, -jnp.inf)) @ v
        ),
        "late": late(keep_sum, lambda s: jnp.exp(s) * LOWER.astype(s.dtype)),
    },
    "learned values": {
        "early": lambda p, x: jax.nn.softmax(x @ p["w"]) @ p["v"] + p["b"][None],
        "late": lambda p, x: (
            (lambda e: e @ p["v"] / keep_sum(e))(jnp.exp(x @ p["w"])) + p["b"][None]
        ),
    },
    "logsumexp": {
        name: on(lambda s, f=f: jnp.stack([f(s)] * 4, 1) ** 3)
        for name, f in {
            "jax's": lambda s: jax.nn.logsumexp(s, 1),
            "plain": lambda s: jnp.log(jnp.exp(s).sum(1)),
            "reshaped": lambda s: jax.nn.logsumexp(s, 1).reshape(2, 2).reshape(4),
        }.items()
    },
    "gelu": {
        "plain": gelu(lambda h: jnp.tanh(_inner(h))),
        "reshaped": gelu(lambda h: jnp.tanh(_inner(h).reshape(-1)).reshape(4, 4)),
        "transposed": gelu(lambda h: jnp.tanh(_inner(h).T).T),
    },
    "cos of tanh": {
        "plain": on(lambda h: jnp.cos(jnp.tanh(h))),
        "reshaped": on(lambda h: jnp.cos(jnp.tanh(h).reshape(-1)).reshape(4, 4)),
        "transposed": on(lambda h: jnp.cos(jnp.tanh(h).T).T),
        "reversed": on(lambda h: jnp.cos(jnp.tanh(h)[::-1])[::-1]),
    },
    "rms norm": {name: rms_norm(mean) for name, mean in MEAN.items()},
    "layer norm": {name: layer_norm(mean) for name, mean in MEAN.items()},
    "learned gate": {
        "dot": gate(lambda x, w: (x @ w)[:, None]),
        "sum": gate(lambda x, w: (x * w[None]).sum(-1, keepdims=True)),
        "einsum": gate(lambda x, w: jnp.einsum("bi,i->b", x, w)[:, None]),
    },
    "dense": {
        "dot": before_relu(lambda p, x: x @ p["w"] + p["b"][None]),
        "sum": before_relu(
            lambda p, x: (x[..., None] * p["w"][None]).sum(1) + p["b"][None]
        ),
        "joined": before_relu(lambda p, x: halves(p, x) + p["b"][None]),
        "cut": parts,
    },
    "dense, scaled": {
        "dot": before_relu(lambda p, x: (x @ p["w"]) * p["b"][None] + p["b"][None]),
        "joined": before_relu(lambda p, x: halves(p, x) * p["b"][None] + p["b"][None]),
    },
    "bias": {
        "parameter": before_relu(lambda p, x: x @ p["w"] + (p["b"] * 0 - 0.5)[None]),
        "literal": before_relu(lambda p, x: x @ p["w"] - 0.5),
        "array": before_relu(lambda p, x: x @ p["w"] + jnp.full((1, 4), -0.5)),
    },
    "negated": {
        "kernel": before_relu(lambda p, x: x @ (-p["w"])),
        "after": before_relu(lambda p, x: -(x @ p["w"])),
        "times -1": before_relu(lambda p, x: -1.0 * (x @ p["w"])),
    },
    "minus a layer": {
        "kernel": lambda p, x: jnp.tanh(x) + x @ (-p["w"]),
        "minus": lambda p, x: jnp.tanh(x) - x @ p["w"],
        "negated": lambda p, x: jnp.tanh(x) + (-(x @ p["w"])),
    },
    "mean before an activation": {
        "mean": lambda p, x: jax.nn.relu(x.mean(0))[None] @ p["w"],
        "dot": lambda p, x: jax.nn.relu(jnp.full((1, 4), 0.25) @ x) @ p["w"],
    },
    "gate by a quotient": {
        "sigmoid": lambda p, x: (x @ p["w"]) * jax.nn.sigmoid(x @ p["v"]),
        "one over": lambda p, x: (x @ p["w"]) * (1 / (1 + jnp.exp(-(x @ p["v"])))),
        "quotient": lambda p, x: (x @ p["w"]) / (1 + jnp.exp(-(x @ p["v"]))),
    },
    "experts": {
        "gathered": routed(
            lambda w, i, e: (w[..., None] * taken(e, i)).sum(1),
        ),
        "one-hot": routed(lambda w, i, e: jnp.einsum("ne,nef->nf", placed(w, i), e)),
        "one-hot, summed": routed(lambda w, i, e: (placed(w, i)[..., None] * e).sum(1)),
        "einsum": routed(
            lambda w, i, e: jnp.einsum("nke,nk,nef->nf", one_hot(i), w, e)
        ),
    },
}


STABILISED = ("experts",)  # gathered, or put in their places by a sum


@pytest.mark.parametrize("composite", ALL)
@pytest.mark.parametrize("group", GROUPS)
def test_small_functions(group, composite):
    forms = spelled(GROUPS[group], WEIGHTS, SAMPLE, ALL[composite])
    _, value, _ = next(forms)
    for name, same, error in forms:
        np.testing.assert_allclose(same, value, atol=1e-12)
        # Weights that a sum puts in their places have its stabiliser.
        assert error < (1e-5 if group in STABILISED else 1e-8), (name, error)


DECOYS = {  # of every sentence that says which of two readings holds: the kinds of rows
    "a literal shift before tanh belongs to it": (
        lambda p, x: jnp.tanh(x @ p["w"] + 0.5),
        ["dense", "activation"],
    ),
    "hard sigmoid keeps its shift": (
        lambda p, x: jax.nn.hard_sigmoid(x @ p["w"]),
        ["dense", "activation"],
    ),
    "a trailing literal belongs to the function": (
        lambda p, x: jax.nn.elu(x @ p["w"]) + 1,
        ["dense", "activation"],
    ),
    "a minus behind an activation stays there": (
        lambda p, x: -jax.nn.relu(x @ p["w"]),
        ["dense", "activation"],
    ),
    "a scale constant along the sum is none of its kernel": (
        lambda p, x: (x * p["b"][None]).sum(0),
        ["scale", "sum"],
    ),
    "a mask is no kernel": (
        lambda p, x: (x * LOWER.astype(x.dtype)).sum(1),
        ["scale", "sum"],
    ),
    "a matrix that is closed over is a kernel": (
        lambda p, x: x @ SAMPLE,
        ["dense"],
    ),
    "one made inside is a fixed map": (
        lambda p, x: x @ (jnp.arange(16.0).reshape(4, 4) + 1),
        ["linear"],
    ),
    "a scale that is not one over the count is no mean": (
        lambda p, x: x.sum(1) * 0.5,
        ["sum", "scale"],
    ),
    "sigmoids over their sum are no softmax": (
        lambda p, x: (lambda e: e / keep_sum(e))(jax.nn.sigmoid(x)),
        ["activation", "norm"],
    ),
}


@pytest.mark.parametrize("name", DECOYS)
def test_decoys(name):
    fn, kinds = DECOYS[name]
    report = jlrp.inspect(
        lambda p, x: fn(p, x).reshape(4, -1)[:, 0], WEIGHTS, SAMPLE, composite="epsilon"
    )
    found = [row.kind for row in report.operations if row.kind != "movement"]
    assert found == kinds


def test_flattening_stops_at_sums():
    """``(a b + c) d``: the sum gets a half, not two thirds."""

    def fn(p, x):
        a, b, c, d = (x[i] @ p["w"] for i in range(4))
        return (((a * b) + c) * d).sum()

    found = jlrp.relevance(fn, WEIGHTS, SAMPLE, composite="attnlrp").sum(1)
    a, b, c, d = SAMPLE @ WEIGHTS["w"]
    factor, whole = (a * b * d).sum() / 4, fn(WEIGHTS, SAMPLE)
    want = jnp.stack([factor, factor, (c * d).sum() / 2, whole / 2])
    np.testing.assert_allclose(found, want, rtol=1e-6)


# What a value is divided by is read as one over it, unless the derivative is asked for.

DIVIDED = {
    "logistic": lambda x, g: x / (1 + jnp.exp(-g)),
    "through a broadcast": lambda x, g: x / (1 + jnp.exp(-g[:, :1])),
    "softsign": lambda x, g: x / (1 + jnp.abs(g)),
    "quadratic": lambda x, g: x / (1 + g * g),
}


@pytest.mark.parametrize("name", DIVIDED)
def test_the_gradient_rule_alone_is_gradient_times_input(name):
    def fn(p, x):
        return DIVIDED[name](x @ p["w"], x @ p["v"]).sum(1)

    rule = jlrp.Composite([("*", jlrp.rules.Gradient())])
    found = jlrp.explain(fn, composite=rule)(WEIGHTS, SAMPLE)
    want = SAMPLE * jax.grad(lambda x: fn(WEIGHTS, x).sum())(SAMPLE)
    np.testing.assert_allclose(found.relevance, want, rtol=1e-9)
    ledger = jlrp.audit(fn, WEIGHTS, SAMPLE, composite=rule)
    assert abs(ledger.unexplained) < 1e-9 * abs(ledger.seed)


@pytest.mark.parametrize("name", DIVIDED)
def test_parameters_of_a_gate_that_divides(name):
    def fn(p, x):
        return DIVIDED[name](x @ p["w"], x @ p["v"] + p["b"][None]).sum(1)

    for composite in (jlrp.Composite([("*", jlrp.rules.Gradient())]), "gradient_input"):
        found = jlrp.relevance(fn, WEIGHTS, SAMPLE, composite=composite, wrt="params")
        slopes = jax.grad(lambda p: fn(p, SAMPLE).sum())(WEIGHTS)
        for key, slope in slopes.items():
            np.testing.assert_allclose(found[key], WEIGHTS[key] * slope, rtol=1e-9)
