"""The key of a sort only chooses: it has no place in depth, and gets nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jlrp
from jlrp.composites import Depth
from jlrp.rules import Flat, ZBox

rng = np.random.default_rng(0)
X = jnp.asarray(rng.normal(size=(2, 4)))
W = [jnp.asarray(rng.normal(size=(4, 4))) for _ in range(4)]


def key(w, x):
    return jax.nn.relu(x @ w[0]) @ w[1]


def behind(w, v):
    return jax.nn.relu(v @ w[2]) @ w[3]


def taken(v, order):
    return jnp.take_along_axis(v, order, 1)


def greatest(k, v):
    def larger(a, b):
        wins = a[0] > b[0]
        return jnp.where(wins, a[0], b[0]), jnp.where(wins, a[1], b[1])

    return lax.reduce((k, v), (-jnp.inf, 0.0), larger, (1,))[1]


def sorted_by(*keys, values):
    return lax.sort((*keys, values), dimension=1, num_keys=len(keys))[-1]


ZEROS = jnp.zeros_like(X)
FORMS = {
    "sort": (
        lambda w, x: behind(w, sorted_by(key(w, x), values=x)),
        lambda w, x: behind(w, taken(x, jnp.argsort(key(w, x), 1))),
    ),
    "two keys": (
        lambda w, x: behind(w, sorted_by(ZEROS, key(w, x), values=x)),
        lambda w, x: behind(w, taken(x, jnp.argsort(key(w, x), 1))),
    ),
    "of a constant": (
        lambda w, x: behind(w, x) + sorted_by(key(w, x), values=w[3][:2]),
        lambda w, x: behind(w, x) + taken(w[3][:2], jnp.argsort(key(w, x), 1)),
    ),
    "reduce": (
        lambda w, x: greatest(key(w, x), x @ w[2])[:, None] * w[3][:1],
        lambda w, x: taken(x @ w[2], jnp.argmax(key(w, x), 1)[:, None]) * w[3][:1],
    ),
}
COMPOSITES = {
    "flat": jlrp.Composite([("first", Flat())], base="epsilon"),
    "zbox": jlrp.Composite([("first", ZBox(-3.0, 3.0))], base="epsilon"),
    "depth": jlrp.Composite([(Depth(0.0, 0.4), Flat())], base="epsilon"),
}


@pytest.mark.parametrize("composite", COMPOSITES)
@pytest.mark.parametrize("name", FORMS)
def test_sorted_by_a_key_as_taken_by_its_order(name, composite):
    composite = COMPOSITES[composite]
    fn, by_index = FORMS[name]
    found = jlrp.relevance(fn, W, X, 0, composite=composite)
    want = jlrp.relevance(by_index, W, X, 0, composite=composite)
    np.testing.assert_allclose(found, want, rtol=1e-9)
    assert jlrp.audit(fn, W, X, 0, composite=composite).unexplained < 1e-9


def test_a_key_that_goes_on_is_no_mere_key():
    def fn(w, x):
        k, v = lax.sort((key(w, x), x), dimension=1)
        return k + behind(w, v)

    def by_index(w, x):
        order = jnp.argsort(key(w, x), 1)
        return taken(key(w, x), order) + behind(w, taken(x, order))

    found, want = (
        jlrp.relevance(f, W, X, 0, composite="epsilon") for f in (fn, by_index)
    )
    np.testing.assert_allclose(found, want, rtol=1e-6)


def test_a_key_alone_carries_nothing():
    with pytest.raises(jlrp.errors.NoRelevanceError):
        jlrp.relevance(lambda w, x: sorted_by(x @ w[0], values=w[3][:2]), W, X, 0)


# What a derivative of relevance goes through, with numbers whose winners are clear.
UPDATED = {
    "max": lambda x, y: x.at[jnp.array([2, 0])].max(y),
    "min": lambda x, y: x.at[jnp.array([2, 0])].min(y),
    "mul": lambda x, y: x.at[jnp.array([2, 0])].mul(y, unique_indices=True),
    "mul twice": lambda x, y: x.at[jnp.array([2, 2])].mul(y),
    "segment_max": lambda x, y: jax.ops.segment_max(x * y[:1], jnp.array([0, 1, 1]), 2),
    "segment_prod": lambda x, y: jax.ops.segment_prod(x, jnp.array([0, 1, 1]), 2),
    "zeta": lambda x, y: jax.scipy.special.zeta(2.5, x * x + 1),
}


@pytest.mark.parametrize("name", UPDATED)
def test_the_derivative_of_relevance_behind_a_scatter(name):
    def total(x):
        def fn(w, x):
            return (UPDATED[name](x, (x * w)[:2] + 0.1) ** 2).sum()

        w = jnp.array([0.3, -0.4, 0.9])
        return jnp.sum(jlrp.relevance(fn, w, x, composite="attnlrp") ** 2)

    x, e, h = jnp.array([1.0, -2.0, 0.5]), jnp.array([0.3, 0.7, -0.2]), 1e-6
    total = jax.jit(total)
    want = (total(x + h * e) - total(x - h * e)) / (2 * h)
    np.testing.assert_allclose(jax.grad(total)(x) @ e, want, rtol=1e-5)
    np.testing.assert_allclose(jax.jvp(total, (x,), (e,))[1], want, rtol=1e-5)
