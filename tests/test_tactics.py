"""What is done for a compiler's sake changes no number but by rounding.

For every rule that looks at kernels, on every kind of layer, and for programs of the
zoo under the composites: with tactics and without. JLRP_ALL=1 takes all pairs of
program and composite, else there is one of every third program.
"""

import os
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import zoo
from jax import lax

import jlrp
from jlrp import rules, tactics
from jlrp.composites import Pair

pytestmark = pytest.mark.relaxed
ALL = bool(os.environ.get("JLRP_ALL"))
RULES = {
    "z+": rules.ZPlus(),
    "z+, bias ignored": rules.ZPlus(bias="ignore"),
    "z+, bias split": rules.ZPlus(bias="split"),
    "alpha-beta": rules.AlphaBeta(2.0, 1.0),
    "alpha-beta, bias split": rules.AlphaBeta(3.0, 2.0, bias="split"),
    "alpha 1, beta 0": rules.AlphaBeta(1.0, 0.0),
    "gamma": rules.Gamma(0.25),
    "gamma, bias ignored": rules.Gamma(2.0, bias="ignore"),
    "gamma, bias split": rules.Gamma(0.25, bias="split"),
    "gamma on weights": rules.GammaMontavon(0.25),
    "w squared": rules.WSquare(),
    "box": rules.ZBox(-3.0, 4.0),
    "flat": rules.Flat(),
    "epsilon": rules.Epsilon(0.1),
    "epsilon, bias split": rules.Epsilon(0.1, bias="split"),
}
RANDOM = np.random.default_rng(0)


def normal(*shape):
    return jnp.asarray(RANDOM.normal(size=shape))


def dense(p, x):
    return x @ p["w"] + p["b"]


def between_relus(p, x):
    return jax.nn.relu(dense(p, jax.nn.relu(x)))


def subtracted(p, x):
    return 3 * x[:, :3] - dense(p, x)


def convolved(stride, groups, scaled):
    def fn(p, x):
        y = lax.conv_general_dilated(
            x,
            p["k"],
            (stride, stride),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=groups,
        )
        y = y + p["b"]
        return jax.nn.relu(y * p["s"] + p["b"] if scaled else y)

    return fn


def of_dense(n, shift=0.0):
    return {"w": normal(n, 3) + shift, "b": normal(3)}, normal(2, n) + shift


def of_conv(ins, outs):
    params = {"k": normal(3, 3, ins, outs), "b": normal(outs), "s": normal(outs)}
    return params, normal(2, 6, 6, 4)


LAYERS = {
    "few contributions": (dense, *of_dense(5)),
    "many contributions": (dense, *of_dense(80)),
    "one sign is rare": (dense, *of_dense(80, 2.0)),
    "between ReLUs": (between_relus, *of_dense(80)),
    "subtracted": (subtracted, *of_dense(80)),
    "conv": (convolved(1, 1, False), *of_conv(4, 6)),
    "conv with batch norm": (convolved(1, 1, True), *of_conv(4, 6)),
    "conv with stride and groups": (convolved(2, 4, False), *of_conv(1, 8)),
}


def weighted(y):
    """A target that all outputs are part of."""
    return jnp.sum(y * jnp.arange(1.0, y.shape[-1] + 1))


def on_and_off(fn, params, x, composite, **options):
    """Relevance with tactics, and without."""

    def relevance():
        return jlrp.relevance(fn, params, x, composite=composite, **options)

    used = relevance()
    with tactics.off():
        return used, relevance()


def assert_equal(used, without):
    for a, b in zip(*map(jax.tree.leaves, (used, without)), strict=True):
        scale = max(1e-300, float(jnp.max(jnp.abs(b))))
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-10 * scale)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("rule", RULES)
def test_rules(rule, layer):
    pairs = [("dense", RULES[rule]), ("conv", RULES[rule])]
    composite = jlrp.Composite([Pair(*pair, optional=True) for pair in pairs])
    used, without = on_and_off(*LAYERS[layer], composite, target=weighted)
    assert np.any(np.asarray(without))
    assert_equal(used, without)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize(
    "rule", [rules.ZPlus(), rules.AlphaBeta(), rules.Gamma()], ids=repr
)
def test_parameters_and_differences(rule, layer):
    pairs = [Pair(kind, rule, optional=True) for kind in ("dense", "conv")]
    composite = jlrp.Composite(pairs)
    fn, params, x = LAYERS[layer]
    assert_equal(*on_and_off(fn, params, x, composite, target=weighted, wrt="params"))
    assert_equal(*on_and_off(fn, params, x, composite, target=weighted, baseline=0.3))


def test_a_large_kernel_by_blocks():
    params, x = {"w": normal(2100, 2000), "b": normal(2000)}, normal(1, 2100)
    composite = jlrp.Composite([("dense", rules.Gamma(0.25))])
    assert_equal(*on_and_off(dense, params, x, composite, target=weighted))


@pytest.mark.parametrize("program", list(zoo.PROGRAMS)[:: 1 if ALL else 3])
def test_programs(program):
    names = list(zoo.COMPOSITES)
    if not ALL:
        names = [names[zlib.crc32(program.encode()) % len(names)]]
    for name in names:
        try:
            used, without = on_and_off(
                *zoo.PROGRAMS[program](), zoo.COMPOSITES[name], target=0
            )
        except jlrp.JlrpError as error:
            pytest.skip(str(error))
        assert_equal(used, without)


def test_the_switch_changes_what_is_traced():
    """Else the tests above would compare a program with itself."""
    fn, params, x = LAYERS["many contributions"]
    composite = jlrp.Composite([("dense", rules.AlphaBeta())])

    def traced():
        explain = jlrp.explain(lambda p, x: fn(p, x), composite=composite)
        return str(jax.make_jaxpr(lambda p, x: explain(p, x).relevance)(params, x))

    used = traced()
    with tactics.off():
        without = traced()
    assert "any_unbatched" in used and "depend" in used and "cond" in used
    assert not any(name in without for name in ("any_unbatched", "depend", "cond"))
