"""`baseline=` equals SHAP's DeepExplainer and Captum's DeepLift on what they support.

Networks of the parity tests, and one small network for each activation; logits, in
float64.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from peers import compare, deeplift_oracle, jax_networks, torch, torch_networks
from peers import networks as nets

import jlrp

TOLERANCE = 1e-10
# SHAP and Captum know what a module is, and a sum or a concatenation is none.
PLAIN = [
    net
    for net in nets.NETWORKS
    if not nets.has(net, nets.Concatenate) and not nets.has(net, nets.Residual)
]
WITHOUT_MAX_POOLING = [net for net in PLAIN if net is not nets.CNN]

ACTIVATIONS = {
    "relu": (torch.nn.ReLU, jax.nn.relu),
    "tanh": (torch.nn.Tanh, jnp.tanh),
    "sigmoid": (torch.nn.Sigmoid, jax.nn.sigmoid),
    "softplus": (torch.nn.Softplus, jax.nn.softplus),
    "elu": (torch.nn.ELU, jax.nn.elu),
    "leaky relu": (torch.nn.LeakyReLU, jax.nn.leaky_relu),
    "gelu": (torch.nn.GELU, lambda x: jax.nn.gelu(x, approximate=False)),
}


def of_network(network, seed):
    values, x = nets.weights(network, seed), nets.inputs(network, seed)
    module = torch_networks.build(network, values, addition=lambda: torch.add)
    fn = jax_networks.function(network, "NHWC", "flax")
    return values, x, module, fn


def ours(network, values, x, baseline, target):
    result = jlrp.relevance(
        jax_networks.function(network, "NHWC", "flax"),
        jax_networks.params(network, values, "NHWC"),
        jnp.asarray(jax_networks.to_layout(x, "NHWC")),
        jnp.full(len(x), target),  # traced: one program for all classes
        baseline=baseline,
    )
    return jax_networks.from_layout(result, "NHWC")


def background_of(network, seed, rows):
    return nets.inputs(network, seed + 100, batch=rows) * 0.7


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("network", PLAIN, ids=str)
def test_shap(network, seed):
    """Dense, convolutions of all kinds, batch norm, pooling, ReLU, tanh; five rows."""
    values, x, module, _ = of_network(network, seed)
    rows = background_of(network, seed, 5)
    theirs = deeplift_oracle.of_shap(module, x, rows)
    data = jlrp.Background(jnp.asarray(jax_networks.to_layout(rows, "NHWC")), chunk=2)
    for target in range(theirs.shape[-1]):
        found = ours(network, values, x, data, target)
        compare.assert_equal(found, theirs[..., target], TOLERANCE)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("network", WITHOUT_MAX_POOLING, ids=str)
def test_captum(network, seed):
    values, x, module, _ = of_network(network, seed)
    rows = background_of(network, seed, len(x))
    baseline = jnp.asarray(jax_networks.to_layout(rows, "NHWC"))
    for target in (0, 3):
        theirs = deeplift_oracle.of_captum(module, x, rows, target)
        found = ours(network, values, x, baseline, target)
        compare.assert_equal(found, theirs, TOLERANCE)


def test_captums_sums_are_wrong_with_max_pooling():
    """Why it is compared without: SHAP and jlrp add up to the difference there."""
    values, x, module, fn = of_network(nets.CNN, 0)
    rows = background_of(nets.CNN, 0, len(x))
    theirs = deeplift_oracle.of_captum(module, x, rows, 0)
    params = jax_networks.params(nets.CNN, values, "NHWC")

    def score(x):
        return np.asarray(fn(params, jnp.asarray(jax_networks.to_layout(x, "NHWC"))))

    change = (score(x) - score(rows))[:, 0]
    baseline = jnp.asarray(jax_networks.to_layout(rows, "NHWC"))
    found = ours(nets.CNN, values, x, baseline, 0)
    np.testing.assert_allclose(found.sum((1, 2, 3)), change, atol=1e-10)
    assert np.abs(theirs.sum((1, 2, 3)) - change).max() > 1e-2


def two_layers(name, seed):
    """A network of two activations, in torch and in jax, and its inputs."""
    of_torch, of_jax = ACTIVATIONS[name]
    draw = np.random.default_rng(seed)
    kernels = [draw.normal(0, 0.7, s) for s in ((8, 6), (7, 8), (3, 7))]
    biases = [draw.normal(0, 0.5, len(k)) for k in kernels]
    layers = []
    for kernel, bias in zip(kernels, biases, strict=True):
        layer = torch.nn.Linear(*kernel.shape[::-1])
        layer.weight.data, layer.bias.data = map(torch.tensor, (kernel, bias))
        layers += [layer, of_torch()]

    def fn(params, x):
        for i, (kernel, bias) in enumerate(params):
            x = (x if i == 0 else of_jax(x)) @ kernel.T + bias
        return x

    params = [tuple(map(jnp.asarray, p)) for p in zip(kernels, biases, strict=True)]
    module = torch.nn.Sequential(*layers[:-1]).double()
    x, rows = draw.normal(0, 1.5, (3, 6)), draw.normal(0, 1.5, (4, 6))
    return module, fn, params, x, rows


def broadcast(fn):
    """Biases of rank 1 under strict promotion."""
    return lambda p, x: fn(
        [(k, jnp.broadcast_to(b, (len(x), len(b)))) for k, b in p], x
    )


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_of_shap(name):
    module, fn, params, x, rows = two_layers(name, 3)
    theirs = deeplift_oracle.of_shap(module, x, rows)
    data, model = jlrp.Background(jnp.asarray(rows)), broadcast(fn)
    for target in range(3):
        found = jlrp.relevance(
            model, params, jnp.asarray(x), jnp.full(len(x), target), baseline=data
        )
        compare.assert_equal(np.asarray(found), theirs[..., target], TOLERANCE)


@pytest.mark.parametrize("name", [n for n in ACTIVATIONS if n != "gelu"])
def test_activations_of_captum(name):
    """Captum 0.9 knows no GELU."""
    module, fn, params, x, rows = two_layers(name, 4)
    baseline, model = jnp.asarray(rows[:3]), broadcast(fn)
    for target in range(3):
        theirs = deeplift_oracle.of_captum(module, x, rows[:3], target)
        found = jlrp.relevance(
            model, params, jnp.asarray(x), jnp.full(len(x), target), baseline=baseline
        )
        compare.assert_equal(np.asarray(found), theirs, TOLERANCE)
