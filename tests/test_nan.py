"""What is not a number, and is replaced by the model itself, gets no relevance."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlrp
from jlrp.rules import Flat, NativeGradient, WSquare, ZBox

pytestmark = pytest.mark.relaxed
rng = np.random.default_rng(0)
NAN = rng.normal(size=(3, 4))
NAN[0, 1] = NAN[2, 3] = np.nan
VALID = ~np.isnan(NAN)
P = {
    "w": jnp.asarray(rng.normal(size=(4, 5))),
    "b": jnp.asarray(rng.normal(size=5)),
    "v": jnp.asarray(rng.normal(size=(5, 3))),
    "c": jnp.asarray(rng.normal(size=4)),
}


def net(p, h):
    return jax.nn.relu(h @ p["w"] + p["b"]) @ p["v"]


def first(rule):
    return jlrp.Composite([("first", rule)], base="epsilon")


COMPOSITES = {
    "epsilon": "epsilon",
    "dynamic_lrp": "dynamic_lrp",
    "excitation": "excitation_backprop",
    "gradient_input": "gradient_input",
    "flat": first(Flat()),
    "w2": first(WSquare()),
    "zbox": first(ZBox(-3.0, 3.0)),
}

# What the model makes of x, and the numbers that stand in for what is missing.
REPLACED = {
    "isnan": (lambda p, x: jnp.where(jnp.isnan(x), 0.5, x), 0.5),
    "learned": (lambda p, x: jnp.where(jnp.isnan(x), p["c"], x), P["c"]),
    "x == x": (lambda p, x: jnp.where(x == x, x, 0.5), 0.5),
    "isfinite": (lambda p, x: jnp.where(jnp.isfinite(x), x, 0.0), 0.0),
    "not or": (lambda p, x: jnp.where(~(jnp.isnan(x) | jnp.isinf(x)), x, 0.5), 0.5),
    "nan_to_num": (lambda p, x: jnp.nan_to_num(x), 0.0),
    "its numbers": (lambda p, x: jnp.nan_to_num(x, nan=0.7, posinf=3, neginf=-3), 0.7),
}


def expected(composite, numbers):
    """Of the network behind it: relevance of its input, 0 where that stood in."""
    h = jnp.where(VALID, NAN, numbers)
    return np.where(VALID, jlrp.relevance(net, P, h, 0, composite=composite), 0)


PAIRS = [
    *((name, how) for name in REPLACED for how in ("epsilon", "flat")),
    *(("learned", how) for how in COMPOSITES if how not in ("epsilon", "flat")),
    ("nan_to_num", "excitation"),
]


@pytest.mark.parametrize(("name", "composite"), PAIRS)
def test_what_is_replaced_gets_nothing(name, composite):
    replace, numbers = REPLACED[name]
    composite = COMPOSITES[composite]
    fn = lambda p, x: net(p, replace(p, x))  # noqa: E731
    found = jlrp.relevance(fn, P, NAN, 0, composite=composite)
    want = expected(composite, numbers)
    np.testing.assert_allclose(found, want, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", ["learned", "x == x"])
def test_what_stands_in_takes_constants(name):
    replace, numbers = REPLACED[name]
    fn = lambda p, x: net(p, replace(p, x))  # noqa: E731
    h = jnp.where(VALID, NAN, numbers)
    for composite in (first(Flat()), "epsilon"):
        ledger = jlrp.audit(fn, P, NAN, 0, composite=composite)
        behind = np.asarray(jlrp.relevance(net, P, h, 0, composite=composite))
        np.testing.assert_allclose(ledger.total("constants"), behind[~VALID].sum())
        assert ledger.unexplained < 1e-9 and not ledger.nonfinite


REDUCED = {
    "nansum": (lambda x: jnp.nansum(x, 1), lambda x: np.nansum(x, 1)),
    "nanmean": (lambda x: jnp.nanmean(x, 1), lambda x: np.nanmean(x, 1)),
    "nanmax": (lambda x: jnp.nanmax(x, 1), lambda x: np.nanmax(x, 1)),
    "nanprod": (lambda x: jnp.nanprod(x, 1), lambda x: np.nanprod(x, 1)),
}


@pytest.mark.parametrize("name", REDUCED)
def test_reductions_over_what_is_there(name):
    fn, plain = REDUCED[name]
    found = np.asarray(jlrp.relevance(lambda p, x: fn(x), (), NAN, composite="attnlrp"))
    assert (found[~VALID] == 0).all()
    if name == "nanprod":  # of n factors, ones included, each gets 1/n
        want = plain(NAN) * VALID.sum(1) / VALID.shape[1]
    else:
        want = plain(NAN)
    np.testing.assert_allclose(found.sum(1), want)


# Behind a function of x, which is no number there either.
BEHIND = {
    "scaled": lambda p, x: (x - 0.3) / 2,
    "learned scale": lambda p, x: (x - p["c"]) / 2,
    "sinh": lambda p, x: jnp.sinh(x),
    "exp": lambda p, x: jnp.exp(x),
}


@pytest.mark.parametrize(
    ("name", "composite"),
    [*((name, first(Flat())) for name in BEHIND), ("exp", "epsilon")],
    ids=[*BEHIND, "exp epsilon"],
)
def test_a_test_of_x_replaces_what_is_made_of_it(name, composite):
    make = BEHIND[name]
    fn = lambda p, x: net(p, jnp.where(jnp.isnan(x), 0.0, make(p, x)))  # noqa: E731
    ledger = jlrp.audit(fn, P, NAN, 0, composite=composite)
    found = np.asarray(jlrp.relevance(fn, P, NAN, 0, composite=composite))
    assert (found[~VALID] == 0).all() and ledger.unexplained < 1e-9
    # The complete rows are those of the function without a test.
    plain = lambda p, x: net(p, make(p, x))  # noqa: E731
    want = jlrp.relevance(plain, P, NAN[1:2], 0, composite=composite)
    np.testing.assert_allclose(found[1:2], want, rtol=1e-9)


def kinds(fn, x=NAN):
    report = jlrp.inspect(lambda p, x: fn(x).sum(), (), x)
    return [row.kind for row in report.operations]


def test_look_alikes():
    x = jnp.asarray(rng.normal(size=(2, 3)))
    activations = {
        "a threshold": lambda x: jnp.where(x > 0, x, 0.0),
        "of its logarithm": lambda x: jnp.where(jnp.isnan(jnp.log(x)), 0.0, x),
        "softplus": jax.nn.softplus,  # tests for NaN inside
        "between functions": lambda x: jnp.where(jnp.isnan(x), -x, jnp.tanh(x)),
        "a number": lambda x: jnp.where(x == 2.0, 0.0, x),
    }
    for fn in activations.values():
        assert kinds(fn, x) == ["activation", "sum"]
    y = jnp.asarray(NAN[:2, :3])
    movements = {
        "of another": lambda x: jnp.where(jnp.isnan(y), 0.0, x),
        "of a row": lambda x: jnp.where(jnp.isnan(x).any(1, keepdims=True), 0.0, x),
        "itself": lambda x: jnp.where(jnp.isnan(x), 0.0, x),
    }
    for fn in movements.values():
        assert kinds(fn, x) == ["movement", "sum"]


def test_a_threshold_is_still_relu():
    x = jnp.array([-1.0, 2.0])
    composite = jlrp.Composite([("activation", NativeGradient())], base="epsilon")
    fn = lambda p, x: jnp.where(x > 0, x, 0.0).sum()  # noqa: E731
    for how in ("epsilon", composite):
        found = jlrp.relevance(fn, (), x, composite=how)
        np.testing.assert_allclose(found, [0, 2], rtol=1e-5)


@pytest.mark.parametrize("composite", ["epsilon", first(Flat()), "excitation_backprop"])
def test_a_threshold_that_nothing_missing_passes(composite):
    """A mixed test stays an activation function; NaN gets nothing all the same."""
    replace = lambda x: jnp.where(jnp.isfinite(x) & (x > -9), x, 0.0)  # noqa: E731
    fn = lambda p, x: net(p, replace(x))  # noqa: E731
    found = jlrp.relevance(fn, P, NAN, 0, composite=composite)
    want = expected(composite, 0.0)
    np.testing.assert_allclose(found, want, rtol=1e-6, atol=1e-9)
    assert jlrp.audit(fn, P, NAN, 0, composite=composite).unexplained < 1e-9


def test_relevance_of_missing_numbers_has_a_derivative():
    fn = lambda p, x: net(p, jnp.where(jnp.isnan(x), p["c"], x))  # noqa: E731

    def total(p):
        return jnp.sum(jlrp.relevance(fn, p, NAN, 0, composite="epsilon") ** 2)

    for leaf in jax.tree.leaves(jax.grad(total)(P)):
        assert jnp.isfinite(leaf).all()


def test_a_model_that_has_nan_keeps_it():
    found = jlrp.relevance(net, P, NAN, 0, composite="epsilon")
    assert np.isnan(found[0, 1]) and np.isfinite(found[1]).all()
