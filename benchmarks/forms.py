"""What a peer's rule is in jlrp, where it is not what jlrp's preset of that name does.

Timings are of the same explanation only if the relevances agree; these make them agree
where jlrp has the peer's form.
"""

from jlrp import Composite
from jlrp.rules import (
    Absolute,
    AlphaBeta,
    Epsilon,
    Gamma,
    GammaMontavon,
    Pass,
    ZBox,
    ZPlus,
)


def form(library, rule, box, transformer):
    """The composite that is the peer's, or None: the preset is."""
    if library == "captum" and rule in ("epsilon_plus", "gamma"):
        return captum(rule)
    if library == "autolrp":
        return autolrp_attention() if transformer else autolrp(rule, box)
    return None


def captum(rule):
    """The first convolution, whose input has both signs, by epsilon.

    Captum's z+ has no bias; its gamma raises positive weights, whatever the input, and
    leaves the bias. A batch norm is a layer of its own.
    """
    conv = {
        "epsilon_plus": ZPlus(bias="ignore", stabilizer=1e-9),
        "gamma": GammaMontavon(0.25, gamma_bias=False, stabilizer=1e-9),
    }[rule]
    pairs = [
        (("first", "conv"), Epsilon(1e-6)),
        ("conv", conv),
        ("batch_norm", Epsilon(1e-9)),
    ]
    return _of_present(pairs, "epsilon", merge_batch_norm=False)


def autolrp(rule, box):
    """Biases and the terms of a sum take their shares by absolute value."""
    eps = 1e-6
    conv = {
        "epsilon": Epsilon(eps, bias="split"),
        "epsilon_plus": ZPlus(bias="split", stabilizer=eps),
        "gamma": Gamma(0.25, bias="split", stabilizer=eps),
        "alpha_beta": AlphaBeta(2.0, 1.0, bias="split", stabilizer=eps),
    }[rule]
    pairs = [("conv", conv), ("dense", Epsilon(eps, bias="split"))]
    if rule == "gamma":
        pairs.insert(0, (("first", "conv"), ZBox(*box, stabilizer=eps)))
    return _of_present([*pairs, ("add", Absolute(eps))], "dynamic_lrp")


def autolrp_attention():
    eps = 1e-11
    split = Epsilon(eps, bias="split")
    pairs = [
        ("conv", split),
        ("dense", split),
        ("add", Absolute(eps)),
        (("product", _is_elementwise), Absolute(eps)),
        ("norm", Pass()),
    ]
    return _of_present(pairs, "attnlrp")


def _is_elementwise(operation):
    return operation.primitive.name in ("mul", "div")


def _of_present(pairs, base, **view):
    """A pair for what a network does not have is passed over."""
    from jlrp.composites import Pair

    return Composite([Pair(*pair, optional=True) for pair in pairs], base, **view)
