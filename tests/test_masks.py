"""Masks of -inf, in any spelling: no NaN in the ledger, whatever becomes of biases."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jlrp
from jlrp.composites import Pair
from jlrp.rules import AlphaBeta, Epsilon, Gamma, Gradient, WSquare, Zero

pytestmark = pytest.mark.relaxed
rng = np.random.default_rng(0)
X, W = jnp.asarray(rng.normal(size=(2, 4))), jnp.asarray(rng.normal(size=(4, 4)))
V = jnp.asarray(rng.normal(size=4))
KEPT = np.array([[1, 0, 1, 1], [1, 0, 1, 1]], bool)
LAID_ON = jnp.where(KEPT, 0.0, -jnp.inf)

MASKS = {
    "where": lambda s, low: jnp.where(KEPT, s, low),
    "sum": lambda s, low: s + jnp.where(KEPT, 0, low),
    "parameter": lambda s, low: s + LAID_ON,
    "concatenate": lambda s, low: jnp.concatenate([s[:, :3], jnp.full((2, 1), low)], 1),
    "pad": lambda s, low: lax.pad(s[:, :3], jnp.asarray(low), [(0, 0, 0), (0, 1, 0)]),
    "scatter": lambda s, low: s.at[:, 1].set(low),
    "scaled": lambda s, low: 2 * jnp.where(KEPT, s, low),
}
LOWEST = float(np.finfo(np.float64).min)
HEADS = {
    "softmax": lambda s: (jax.nn.softmax(s) * V).sum(),
    "logsumexp": lambda s: jax.nn.logsumexp(s, 1).sum(),
    "max": lambda s: s.max(1).sum(),
    "relu": lambda s: (jax.nn.relu(s) * V).sum(),
}
RULES = {
    "absorb": ("*", Epsilon(1e-6)),
    "ignore": ("*", Epsilon(1e-6, bias="ignore")),
    "split": ("*", Epsilon(1e-6, bias="split")),
    "zero ignore": ("*", Zero(bias="ignore")),
    "gamma": ("dense", Gamma(0.25)),
    "gamma ignore": ("dense", Gamma(0.25, bias="ignore")),
    "gamma split": ("dense", Gamma(0.25, bias="split")),
    "alpha beta": ("dense", AlphaBeta(2.0, 1.0, bias="ignore")),
    "w2": ("dense", WSquare()),
}
# Each mask, head and rule with some of the others: all together take minutes.
MIXED = [
    *(("where", "softmax", rule) for rule in RULES),
    *((mask, "softmax", "split") for mask in MASKS),
    *(("parameter", head, rule) for head, rule in zip(HEADS, RULES, strict=False)),
    *(("parameter", "softmax", rule) for rule in ("gamma split", "w2", "alpha beta")),
    *(("sum", "relu", rule) for rule in ("w2", "gamma ignore")),
    *((mask, "logsumexp", "ignore") for mask in ("pad", "scaled", "scatter")),
]


def ledger_of(mask, head, rule, low=-np.inf):
    others = [(kind, Gradient()) for kind in ("softmax", "function", "activation")]
    pairs = [Pair(*pair, optional=True) for pair in (*others, RULES[rule])]
    composite = jlrp.Composite(pairs, base="attnlrp")

    def fn(w, x):
        return HEADS[head](MASKS[mask](x @ w + V, low))

    return jlrp.audit(fn, W, X, composite=composite), jlrp.relevance(
        fn, W, X, composite=composite
    )


@pytest.mark.parametrize(("mask", "head", "rule"), list(dict.fromkeys(MIXED)))
def test_the_ledger_is_finite_and_balances(mask, head, rule):
    ledger, found = ledger_of(mask, head, rule)
    assert np.isfinite(found).all()
    for row in ledger.rows:
        assert all(np.isfinite(amount) for amount in row.causes.values())
    assert ledger.unexplained < 1e-9 * max(1, abs(ledger.seed))


@pytest.mark.parametrize("rule", ["absorb", "gamma split"])
def test_the_lowest_number_is_a_mask_too(rule):
    ledger, found = ledger_of("sum", "softmax", rule, LOWEST)
    _, infinite = ledger_of("sum", "softmax", rule)
    np.testing.assert_allclose(found, infinite, rtol=1e-9, atol=1e-12)
    assert ledger.unexplained < 1e-9


def test_masks_of_infinity():
    def fn(w, x):
        return jnp.min(jnp.where(KEPT, x @ w + V, jnp.inf), 1).sum()

    composite = jlrp.Composite([("*", Epsilon(bias="split"))], base="attnlrp")
    ledger = jlrp.audit(fn, W, X, composite=composite)
    assert ledger.unexplained < 1e-9 and np.isfinite(ledger.total("bias"))


@pytest.mark.parametrize("bias", ["absorb", "ignore", "split"])
def test_masked_positions_take_nothing(bias):
    """All goes to the greatest that is left, none to a greater one that is masked."""
    composite = jlrp.Composite([("movement", Zero(bias=bias))], base="attnlrp")
    x = X.at[:, 1].set(9.0)

    def fn(p, x):
        return jnp.where(KEPT, x, -jnp.inf).max(1).sum()

    found = jlrp.relevance(fn, (), x, composite=composite)
    left = np.where(KEPT, x, -np.inf)
    winner = left == left.max(1, keepdims=True)
    np.testing.assert_allclose(found, np.where(winner, x, 0), rtol=1e-9)
