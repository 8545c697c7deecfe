"""Flow between named values: by hand in a linear network, by capture in others."""

import doctest

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlrp
from jlrp import flow

RNG = np.random.default_rng(0)
P = {name: jnp.asarray(RNG.normal(size=(4, 4))) for name in "abc"}
P["d"] = jnp.asarray(RNG.normal(size=4))
X = jnp.asarray(RNG.normal(size=(3, 4)))


def linear(p, x):
    h = x @ p["a"]
    h = h + jlrp.tag(h @ p["b"], "blocks/first")
    h = h + jlrp.tag(h @ p["c"], "blocks/second")
    return h @ p["d"]


def nonlinear(p, x):
    h = x @ p["a"]
    with jax.named_scope("first"):
        f = jax.nn.gelu(h @ p["b"])
    h = jlrp.tag(h + f, "between")
    with jax.named_scope("second"):
        f = jax.nn.sigmoid(h @ p["c"])
    return (h * f) @ p["d"]


def test_flows_of_a_linear_residual_network_are_those_computed_by_hand():
    a, b, c, d = (np.asarray(P[name]) for name in "abcd")
    x = np.asarray(X)
    first = x @ a @ b
    second = (x @ a + first) @ c
    by_hand = {
        ("output", "blocks/second"): second @ d,
        ("output", "blocks/first"): first @ d,
        ("output", "input"): x @ (a @ d),
        ("blocks/second", "blocks/first"): first @ (c @ d),
        ("blocks/second", "input"): x @ (a @ c @ d),
        ("blocks/first", "input"): x @ (a @ b @ (d + c @ d)),
    }
    edges = flow.between(linear, P, X, "blocks/*", composite="attnlrp")
    assert list(edges) == list(by_hand)  # the nearest to the output first
    for pair, amount in by_hand.items():
        np.testing.assert_allclose(edges[pair], amount.sum(), rtol=1e-10)


@pytest.mark.parametrize("composite", ["auto", "epsilon", "cp_lrp"])
def test_what_flows_into_a_value_is_what_is_captured_there(composite):
    names = ("first", "between", "second")
    edges = flow.between(nonlinear, P, X, names[::-1], composite=composite)
    e = jlrp.explain(nonlinear, capture=names, composite=composite)(P, X)
    arriving = {**e.captured, "input": e.relevance}
    for name, r in arriving.items():
        into = sum(amount for (_, to), amount in edges.items() if to == name)
        np.testing.assert_allclose(into, r.sum(), rtol=1e-8, atol=1e-10)
    scale = abs(edges["output", "second"]) + abs(edges["output", "between"])
    assert abs(edges["between", "input"]) > 1e-3 * scale  # all of it passes there
    for giver in ("output", "second"):
        assert abs(edges[giver, "input"]) < 1e-10 * scale


def test_a_name_of_several_values_or_of_none_is_refused():
    with pytest.raises(jlrp.SelectorError, match="matches no name scope"):
        flow.between(linear, P, X, "blocks/third")

    def two(p, x):
        h = jlrp.tag((x @ p["a"], x @ p["b"]), "pair")
        return (h[0] + h[1]) @ p["d"]

    with pytest.raises(jlrp.SelectorError, match="names 2"):
        flow.between(two, P, X, "pair")


def test_the_example_in_the_docstring():
    assert doctest.testmod(flow).failed == 0
