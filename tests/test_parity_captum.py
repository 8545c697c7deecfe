"""jlrp equals Captum's LRP: EpsilonRule on everything, and GammaRule.

Batch norms are merged for Captum and not for jlrp, which merges them itself. Captum's
relevance is wrong for a value that a concatenation shares with a layer, so the network
with concatenations is left out (both are in `captum_oracle`).
"""

import pytest
from peers import captum_oracle
from peers import networks as nets
from peers.compare import assert_equal, explain

import jlrp

TOLERANCE = 1e-7
NETWORKS = [net for net in nets.NETWORKS if not nets.has(net, nets.Concatenate)]


def compare(network, composite, seed, rule=captum_oracle.EpsilonRule, target=None):
    values, x = nets.weights(network, seed), nets.inputs(network, seed)
    expected = captum_oracle.relevance(
        *nets.merge_batch_norm(network, values), x, target, rule
    )
    ours = explain(network, values, x, composite, target=target)
    assert_equal(ours, expected, TOLERANCE)


@pytest.mark.parametrize("seed", [0, 1, 2, 3])
@pytest.mark.parametrize("network", NETWORKS, ids=str)
def test_epsilon(network, seed):
    compare(network, jlrp.composites.epsilon(epsilon=1e-9), seed)


@pytest.mark.parametrize("network", NETWORKS, ids=str)
def test_target(network):
    compare(network, jlrp.composites.epsilon(epsilon=1e-9), seed=4, target=2)


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("network", NETWORKS, ids=str)
def test_gamma(network, with_bias):
    """Captum's gamma leaves the bias as it is, or drops it."""
    ours = jlrp.rules.GammaMontavon(
        0.25,
        gamma_bias=False,
        bias="absorb" if with_bias else "ignore",
        stabilizer=1e-9,
    )
    kinds = ["conv", "dense"] if nets.has(network, nets.Conv) else ["dense"]
    composite = jlrp.Composite(
        [(kind, ours) for kind in kinds], base=jlrp.composites.epsilon(epsilon=1e-9)
    )

    def rule():
        return captum_oracle.GammaRule(0.25, set_bias_to_zero=not with_bias)

    compare(network, composite, seed=5, rule=rule)
