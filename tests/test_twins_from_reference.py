"""The spelling kit from a reference: one relevance for every spelling there too.

The programs and rewritings of test_twins_zoo.py, some of the pairs, under deep_lift.
"""

import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import zoo

import jlrp
from jlrp import testing

pytestmark = pytest.mark.relaxed
SHARE = 96  # one in so many pairs of program and rewriting


def kinds(program):
    names = testing.kinds()
    return [k for k in names if zlib.crc32(f"{k} {program}".encode()) % SHARE == 0]


def reference(name, x):
    rng = np.random.default_rng(zlib.crc32(f"reference of {name}".encode()))

    def one(leaf):
        if jnp.issubdtype(leaf.dtype, jnp.integer):
            return jnp.zeros_like(leaf)
        return jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype)

    return jax.tree.map(one, x)


@pytest.mark.parametrize("name", zoo.PROGRAMS)
def test_one_relevance(name):
    fn, params, x = zoo.PROGRAMS[name]()
    baseline = reference(name, x)
    explained = [fn]
    twins = testing.twins(fn, params, x, kinds=kinds(name)) if kinds(name) else {}
    explained += twins.values()
    first, *others = (
        jlrp.relevance(f, params, x, composite="deep_lift", baseline=baseline)
        for f in explained
    )
    ledger = jlrp.audit(fn, params, x, composite="deep_lift", baseline=baseline)
    assert abs(ledger.unexplained) <= 1e-10 * max(abs(ledger.seed), 1)
    largest = max(float(jnp.abs(a).max()) for a in jax.tree.leaves(first))
    for other in others:
        for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(other), strict=True):
            np.testing.assert_allclose(b, a, rtol=0, atol=1e-9 * largest)
