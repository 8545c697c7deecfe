"""A slow replica of relevance from function values alone, and the ledger's test.

Its Jacobian comes from differences of function values: exact for linear maps, of fourth
order for others. Hypothesis draws the same few examples every time; JLRP_EXAMPLES sets
how many. Nothing of jlrp but what it checks is used.
"""

import os

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import Phase, given, settings

import jlrp

EXAMPLES = int(os.environ.get("JLRP_EXAMPLES", "3"))
EXACT = jlrp.composites.epsilon(0.0)


def drawn(*strategies):
    """A test over examples: the same ones every time, few unless asked for more."""

    def decorate(test):
        chosen = settings(
            max_examples=EXAMPLES,
            deadline=None,
            derandomize=True,
            database=None,
            phases=[Phase.generate],
        )
        return chosen(given(*strategies)(test))

    return decorate


def jacobian(function, x, step):
    """``df_j / dx_i`` by differences of function values, as (inputs, *outputs)."""
    function = jax.jit(function)
    flat = np.asarray(x).reshape(-1)

    def at(i, h):
        moved = flat.copy()
        moved[i] += h
        return np.asarray(function(jnp.asarray(moved.reshape(x.shape))))

    if step is None:  # linear: any step does
        zero = np.asarray(function(jnp.zeros_like(x)))
        basis = np.eye(flat.size).reshape(-1, *x.shape)
        return np.stack([np.asarray(function(jnp.asarray(e))) - zero for e in basis])
    h = step
    return np.stack(
        [
            (8 * (at(i, h) - at(i, -h)) - (at(i, 2 * h) - at(i, -2 * h))) / (12 * h)
            for i in range(flat.size)
        ]
    )


def replica(function, x, m, degree=1.0, step=None):
    """``R_i = x_i sum_j df_j/dx_i m_j / k_j``."""
    slopes = jacobian(function, x, step)
    share = np.asarray(m) / degree
    return np.asarray(x) * (slopes * share).reshape(*x.shape, -1).sum(-1)


def numbers(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).uniform(0.2, 0.9, size=shape))


def explained(fn, x, seed=0, **options):
    """Relevance of x with a random multiplier at the output; all of it explained."""
    shape = jax.eval_shape(fn, x).shape
    m = jnp.asarray(np.random.default_rng(seed + 1).normal(size=shape))
    options = {"composite": EXACT} | options
    relevance = jlrp.relevance(lambda _, x: fn(x), (), x, m, **options)
    return np.asarray(relevance), m


def check(fn, x, degree=1.0, step=None, tolerance=1e-9, **options):
    """Against the replica."""
    ours, m = explained(fn, x, **options)
    theirs = replica(fn, x, m, degree, step)
    scale = max(1.0, np.abs(theirs).max(initial=0))
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance * scale)


def conserves(fn, x, tolerance=1e-10, seed="one"):
    """Arrived, handed and named causes add up at every operation; the ledger."""
    m = jnp.asarray(np.random.default_rng(1).normal(size=jax.eval_shape(fn, x).shape))
    ledger = jlrp.audit(lambda _, x: fn(x), (), x, m, seed=seed, composite=EXACT)
    scale = max([abs(ledger.seed), *(abs(row.arrived) for row in ledger.rows)])
    assert ledger.unexplained <= tolerance * scale
    return ledger


def spelled(forms, params, x, composite):
    """By name of a form: its values, and relevance's distance from the first form's."""
    first, want = next(iter(forms)), None
    for name, fn in forms.items():
        found = jlrp.relevance(
            lambda p, x, fn=fn: fn(p, x).sum(-1), params, x, composite=composite
        )
        want = found if name == first else want
        error = jnp.abs(found - want).max() / jnp.abs(want).max()
        yield name, fn(params, x), float(error)


def same(one, other, x, tolerance=1e-10, **options):
    """Two spellings of one function get one relevance."""
    ours, theirs = explained(one, x, **options)[0], explained(other, x, **options)[0]
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance)
