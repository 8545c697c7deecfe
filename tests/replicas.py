"""Slow dense replicas of the rules, written from their formulas, in NumPy.

Every linear map is a matrix here: ``z_j = sum_i w_ji x_i + b_j`` with x and z flat,
examples included. Kernel and bias are read off the map itself, by its Jacobian, so one
replica serves dense, convolution, einsum and whatever else is affine. ``r`` is the
relevance of z, ``s`` the stabiliser. Nothing of jlrp is used.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np


@functools.partial(jax.jit, static_argnums=0)
def _dense_form(function, p, x):
    def flat(v):
        return function(p, v.reshape(x.shape)).reshape(-1)

    zero = jnp.zeros(x.size)
    return jax.jacobian(flat)(zero), flat(zero)


def dense_form(function, p, x):
    """The matrix (outputs, inputs) and the bias of an affine map, by its Jacobian."""
    kernel, bias = _dense_form(function, p, x)
    return np.asarray(kernel), np.asarray(bias)


def positive(a):
    return np.where(a > 0, a, 0.0)


def negative(a):
    return np.where(a < 0, a, 0.0)


def stabilized(z, s):
    """``z + s sign(z)`` with ``sign(0) = +1``."""
    return z + np.where(z >= 0, s, -s)


def divided(a, b):
    """``a / b``, and 0 where b is 0."""
    return np.where(b == 0, 0.0, a / np.where(b == 0, 1.0, b))


def shared(numerators, denominators, r, s):
    """``R_i = sum_j n_ji / (d_j + s sign(d_j)) R_j``."""
    share = divided(r, stabilized(denominators, s))
    return np.einsum("ji,j->i", numerators, share)


def without_bias(rule):
    """Options of all rules with a bias: absorb, ignore, or split before the rule."""

    def replica(x, w, b, r, s, bias="absorb", **options):
        z = w @ x + b
        if bias == "ignore":
            return rule(x, w, b * 0, z, r, s, **options)
        if bias == "split" and np.any(
            b
        ):  # R' = R |z0| / (|z0| + |b| + s), then without bias
            z0 = z - b
            r = r * divided(np.abs(z0), np.abs(z0) + np.abs(b) + s)
            return rule(x, w, b * 0, z0, r, s, **options)
        return rule(x, w, b, z, r, s, **options)

    return replica


@without_bias
def epsilon(x, w, b, z, r, s):
    return shared(w * x, w @ x + b, r, s)


@without_bias
def gamma(x, w, b, z, r, s, gamma=0.25):
    """Four products: for z > 0 the positive ones count more, for z < 0 the negative."""
    above = positive(x) * (w + gamma * positive(w))
    above = above + negative(x) * (w + gamma * negative(w))
    below = positive(x) * (w + gamma * negative(w))
    below = below + negative(x) * (w + gamma * positive(w))
    p = above.sum(1) + b + gamma * positive(b)
    n = below.sum(1) + b + gamma * negative(b)
    return shared(above, p, r * (z > 0), s) + shared(below, n, r * (z < 0), s)


@without_bias
def gamma_montavon(x, w, b, z, r, s, gamma=0.25, gamma_bias=True):
    w = w + gamma * positive(w)
    b = b + gamma * positive(b) * gamma_bias
    return shared(w * x, w @ x + b, r, s)


@without_bias
def alpha_beta(x, w, b, z, r, s, alpha=2.0, beta=1.0):
    products = w * x
    p, n = positive(products), negative(products)
    up = shared(p, p.sum(1) + positive(b), r, s)
    down = shared(n, n.sum(1) + negative(b), r, s)
    return alpha * up - beta * down


@without_bias
def z_plus(x, w, b, z, r, s):
    p = positive(w * x)
    return shared(p, p.sum(1) + positive(b), r, s)


@without_bias
def w_square(x, w, b, z, r, s):
    return shared(w**2, (w**2).sum(1) + b**2, r, s)


def z_box(x, w, b, r, s, low, high):
    n = w * x - low * positive(w) - high * negative(w)
    return shared(n, n.sum(1), r, s)


def flat(x, w, b, r, s):
    seen = (w != 0) * 1.0
    return shared(seen, seen.sum(1), r, s)


def absolute(parts, r, s):
    """``|a_k| / (sum_k |a_k| + s)`` of parts stacked along the first axis."""
    return np.abs(parts) * divided(r, np.abs(parts).sum(0) + s)
