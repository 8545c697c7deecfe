"""jlrp equals Zennit: its composites, and each rule on its own."""

import jax.numpy as jnp
import numpy as np
import pytest
from peers import networks as nets
from peers import torch, zennit, zennit_oracle
from peers.compare import assert_equal, explain

import jlrp

TOLERANCE = 1e-8
SEEDS = (0, 1, 2)
COMPOSITES = (
    "epsilon_plus",
    "epsilon_plus_flat",
    "epsilon_alpha2_beta1",
    "epsilon_alpha2_beta1_flat",
    "excitation_backprop",
    "gradient_input",
)
theirs = zennit.rules
rules = jlrp.rules


def sample(network, seed):
    return nets.weights(network, seed), nets.inputs(network, seed)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("composite", COMPOSITES)
@pytest.mark.parametrize("network", nets.NETWORKS, ids=str)
def test_composite(network, composite, seed):
    values, x = sample(network, seed)
    expected = zennit_oracle.relevance(network, values, x, composite)
    assert_equal(explain(network, values, x, composite), expected, TOLERANCE)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("network", nets.NETWORKS, ids=str)
def test_epsilon_gamma_box(network, seed):
    values, x = sample(network, seed)
    bounds = {"low": -3.0, "high": 3.5}
    expected = zennit_oracle.relevance(
        network, values, x, "epsilon_gamma_box", **bounds
    )
    composite = jlrp.composites.epsilon_gamma_box(**bounds)
    assert_equal(explain(network, values, x, composite), expected, TOLERANCE)


@pytest.mark.parametrize("layout", ["NHWC", "NCHW"])
def test_epsilon_gamma_box_with_bounds_by_channel(layout):
    values, x = sample(nets.CNN, 0)
    low, high = np.array([-3.0, -2.6, -4.0]), np.array([2.5, 3.0, 3.5])
    expected = zennit_oracle.relevance(
        nets.CNN,
        values,
        x,
        "epsilon_gamma_box",
        low=torch.tensor(low.reshape(1, 3, 1, 1)),
        high=torch.tensor(high.reshape(1, 3, 1, 1)),
    )
    shape = (1, 1, 1, 3) if layout == "NHWC" else (1, 3, 1, 1)
    composite = jlrp.composites.epsilon_gamma_box(
        low=jnp.asarray(low.reshape(shape)), high=jnp.asarray(high.reshape(shape))
    )
    ours = explain(nets.CNN, values, x, composite, layout)
    assert_equal(ours, expected, TOLERANCE)


@pytest.mark.parametrize("target", [0, 3])
@pytest.mark.parametrize("network", [nets.CNN, nets.MLP_TANH], ids=str)
def test_target(network, target):
    values, x = sample(network, 0)
    expected = zennit_oracle.relevance(network, values, x, "epsilon_plus", target)
    ours = explain(network, values, x, "epsilon_plus", target=target)
    assert_equal(ours, expected, TOLERANCE)
    targets = jnp.array([target, (target + 1) % 5])
    ours = explain(network, values, x, "epsilon_plus", target=targets)
    assert_equal(ours[:1], expected[:1], TOLERANCE)
    assert np.abs(ours[1] - expected[1]).max() > 0.01 * np.abs(expected).max()


RULES = {
    "Epsilon": (rules.Epsilon(0.05), theirs.Epsilon(0.05)),
    "Gamma": (rules.Gamma(0.25), theirs.Gamma(0.25)),
    "Gamma_large": (
        rules.Gamma(20.0, stabilizer=1e-3),
        theirs.Gamma(20.0, stabilizer=1e-3),
    ),
    "ZPlus": (rules.ZPlus(), theirs.ZPlus()),
    "ZPlus_stabilised": (rules.ZPlus(stabilizer=0.1), theirs.ZPlus(stabilizer=0.1)),
    "AlphaBeta": (rules.AlphaBeta(2.0, 1.0), theirs.AlphaBeta(2.0, 1.0)),
    "AlphaBeta_3_2": (
        rules.AlphaBeta(3.0, 2.0, stabilizer=1e-3),
        theirs.AlphaBeta(3.0, 2.0, stabilizer=1e-3),
    ),
    "ZBox": (rules.ZBox(-4.0, 5.0), theirs.ZBox(-4.0, 5.0)),
    "WSquare": (rules.WSquare(), theirs.WSquare()),
    "Flat": (rules.Flat(), theirs.Flat()),
    "Flat_stabilised": (rules.Flat(stabilizer=0.5), theirs.Flat(stabilizer=0.5)),
}
RULES_IGNORING_BIAS = {
    "Epsilon": (
        rules.Epsilon(0.05, bias="ignore"),
        theirs.Epsilon(0.05, zero_params="bias"),
    ),
    "Gamma": (
        rules.Gamma(0.25, bias="ignore"),
        theirs.Gamma(0.25, zero_params="bias"),
    ),
    "ZPlus": (rules.ZPlus(bias="ignore"), theirs.ZPlus(zero_params="bias")),
    "AlphaBeta": (
        rules.AlphaBeta(2.0, 1.0, bias="ignore"),
        theirs.AlphaBeta(2.0, 1.0, zero_params="bias"),
    ),
    "WSquare": (rules.WSquare(bias="ignore"), theirs.WSquare(zero_params="bias")),
}
AFFINE_NETWORKS = (nets.CNN, nets.RESNET, nets.MLP_TANH, nets.CONV_KINDS)


def compare_rule(network, ours, expected, seed):
    """The rule on every convolution and every dense map."""
    values, x = sample(network, seed)
    expected = zennit_oracle.relevance(
        network, values, x, zennit_oracle.rules(conv=expected, dense=expected)
    )
    pairs = [(kind, ours) for kind in kinds(network)]
    composite = jlrp.Composite(pairs, base="epsilon_plus")
    assert_equal(explain(network, values, x, composite), expected, TOLERANCE)


def kinds(network):
    return ["conv", "dense"] if nets.has(network, nets.Conv) else ["dense"]


@pytest.mark.parametrize("seed", SEEDS[:2])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("network", AFFINE_NETWORKS, ids=str)
def test_rule(network, rule, seed):
    compare_rule(network, *RULES[rule], seed)


@pytest.mark.parametrize("rule", RULES_IGNORING_BIAS)
@pytest.mark.parametrize("network", AFFINE_NETWORKS, ids=str)
def test_rule_without_bias(network, rule):
    compare_rule(network, *RULES_IGNORING_BIAS[rule], seed=2)


@pytest.mark.parametrize("rule", ["WSquare", "Flat", "ZBox"])
@pytest.mark.parametrize("network", AFFINE_NETWORKS, ids=str)
def test_first_layer(network, rule):
    values, x = sample(network, 1)
    ours, expected = RULES[rule]
    expected = zennit_oracle.rules(
        conv=theirs.ZPlus(), dense=theirs.Epsilon(), first=expected
    )
    expected = zennit_oracle.relevance(network, values, x, expected)
    composite = jlrp.Composite([("first", ours)], base="epsilon_plus")
    assert_equal(explain(network, values, x, composite), expected, TOLERANCE)


def test_two_layers_that_read_the_input_are_both_first():
    stems = tuple(
        (nets.Conv(name, 3, 4, kernel=kernel, padding=kernel // 2), nets.RELU)
        for name, kernel in (("narrow", 1), ("wide", 5))
    )
    network = nets.Network(
        "stems",
        (3, 6, 6),
        (
            nets.Concatenate(stems),
            nets.Conv("conv", 8, 6, stride=2),
            nets.RELU,
            nets.GlobalAveragePool(),
            nets.Dense("head", 6, 5),
        ),
    )
    values, x = sample(network, 0)
    names = ("layer0.branches.0.narrow", "layer0.branches.1.wide")
    expected = zennit_oracle.rules(
        theirs.ZPlus(), theirs.Epsilon(), first=theirs.Flat(), names=names
    )
    expected = zennit_oracle.relevance(network, values, x, expected)
    assert_equal(explain(network, values, x, "epsilon_plus_flat"), expected, TOLERANCE)
