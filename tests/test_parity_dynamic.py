"""The preset `dynamic_lrp` equals a slow replica of DynamicLRP's own rules."""

import pytest
from peers import dynamic_oracle
from peers import networks as nets
from peers.compare import assert_equal, explain

import jlrp

TOLERANCE = 1e-8
GAMMAS = {
    "epsilon": {},
    "gamma_conv": {"gamma_conv": 0.5},
    "gamma_dense": {"gamma_dense": 0.3},
    "gamma_both": {"gamma_conv": 100.0, "gamma_dense": 1.0},
}


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("gammas", GAMMAS)
@pytest.mark.parametrize("network", nets.NETWORKS, ids=str)
def test_dynamic_lrp(network, gammas, seed):
    values, x = nets.weights(network, seed), nets.inputs(network, seed)
    expected = dynamic_oracle.relevance(network, values, x, **GAMMAS[gammas])
    composite = jlrp.composites.dynamic_lrp(**GAMMAS[gammas])
    assert_equal(explain(network, values, x, composite), expected, TOLERANCE)


def test_target():
    values, x = nets.weights(nets.RESNET, 3), nets.inputs(nets.RESNET, 3)
    expected = dynamic_oracle.relevance(nets.RESNET, values, x, target=1)
    ours = explain(nets.RESNET, values, x, "dynamic_lrp", target=1)
    assert_equal(ours, expected, TOLERANCE)
