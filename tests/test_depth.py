"""Where dense layers and convolutions lie, and composites that go by it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jlrp
from jlrp import composites, rules
from jlrp.composites import Depth


def conv(x, kernel):
    layout = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=layout)


def named(name, layer, x, weights):
    with jax.named_scope(name):
        return layer(x, weights)


def network(params, x):
    """a, then b and c beside d, then e, then dense."""
    a = jax.nn.relu(named("a", conv, x, params["a"]))
    c = named("c", conv, jax.nn.relu(named("b", conv, a, params["b"])), params["c"])
    e = jax.nn.relu(named("e", conv, c + named("d", conv, a, params["d"]), params["e"]))
    return named("dense", jnp.matmul, e.mean((1, 2)), params["dense"])


def made(shapes, seed=0):
    keys = jax.random.split(jax.random.key(seed), len(shapes))
    return {
        n: jax.random.normal(k, s)
        for k, (n, s) in zip(keys, shapes.items(), strict=True)
    }


PARAMS = made(
    {"a": (3, 3, 2, 4)} | {n: (3, 3, 4, 4) for n in "bcde"} | {"dense": (4, 3)}
)
X = jax.random.normal(jax.random.key(1), (2, 6, 6, 2))
DEPTHS = {"a": 0, "b": 1 / 4, "d": 1 / 4, "c": 2 / 4, "e": 3 / 4, "dense": 1}


def depths_of(fn, *args):
    found = []

    def watch(op):
        found.append((op.scope.split("/")[-1], op.kind, op.depth))
        return False

    watching = composites.Pair(watch, rules.Flat(), optional=True)
    jlrp.inspect(fn, *args, composite=jlrp.Composite([watching], base="epsilon"))
    return found


def test_the_longest_path_counts():
    found = depths_of(network, PARAMS, X)
    assert {name: depth for name, _, depth in found if depth is not None} == DEPTHS
    assert {k for _, k, depth in found if depth is not None} == {"conv", "dense"}


def test_the_body_of_a_loop_counts_once():
    def fn(w, x):
        x = named("before", jnp.matmul, x, w[0])
        x, _ = lax.scan(
            lambda x, w: (jnp.tanh(named("in", jnp.matmul, x, w)), None), x, w
        )
        return named("after", jnp.matmul, x, w[0])

    found = depths_of(fn, jnp.ones((3, 4, 4)), jnp.ones((2, 4)))
    depths = {name: depth for name, _, depth in found if depth is not None}
    assert depths == {"before": 0, "in": 1 / 2, "after": 1}


@pytest.mark.parametrize(
    "low, high, wanted",
    [
        (0, 1 / 4, "a"),
        (1 / 4, 3 / 4, "bcd"),
        (3 / 4, 1, ["e", "dense"]),
        (1, 1, ["dense"]),
    ],
)
def test_a_range_of_depths(low, high, wanted):
    composite = jlrp.Composite([(Depth(low, high), rules.Flat())], base="epsilon")
    rows = jlrp.inspect(network, PARAMS, X, composite=composite).operations
    flat = {row.scope for row in rows if row.rule == repr(rules.Flat())}
    assert flat == set(wanted)


def test_gammas_fall_with_depth():
    """As with a rule for each layer by its name, the formula worked out by hand."""

    def gamma(depth, steps=4):
        step = int((depth - 0.2) / 0.8 * steps)
        return rules.Gamma(2.0 * 0.05 ** ((step + 0.5) / steps))

    by_name = [("a", rules.Flat())]
    by_name += [(name, gamma(DEPTHS[name])) for name in "bdce"]
    wanted = jlrp.Composite(by_name, base="epsilon_plus")
    composite = composites.gamma_by_depth(0.2, (2.0, 0.1), steps=4)
    found, expected = (
        jlrp.relevance(network, PARAMS, X, composite=c) for c in (composite, wanted)
    )
    np.testing.assert_array_equal(found, expected)
    assert len({rule for _, rule in by_name}) == 4  # Flat and three gammas


def test_auto_has_one_gamma_where_small_images_and_signals_are_convolved():
    """Without Flat, since these are small."""

    def of_signals(params, x):
        h = jax.nn.relu(lax.conv(x, params["w"], (1,), "SAME"))
        return lax.conv(h, params["w"], (1,), "SAME").mean(2)

    signal = made({"w": (2, 2, 3)}), made({"x": (2, 2, 9)})["x"]
    for fn, params, x in ((network, PARAMS, X), (of_signals, *signal)):
        wanted = composites.gamma_by_depth(0.0, (0.2, 0.2), epsilon=0.0, stabilizer=0.0)
        found = jlrp.relevance(fn, params, x)
        expected = jlrp.relevance(fn, params, x, composite=wanted)
        # Stabilised are convolutions by 1e-6 in one of them, in the other nothing.
        gap = np.abs(found - expected).max()
        assert gap < 1e-4 * np.abs(expected).max()
