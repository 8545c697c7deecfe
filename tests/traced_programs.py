"""The explanations of many programs as text, hashed: the same in every process."""

import hashlib
import json
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.scipy.sparse import linalg

import jlrp

RNG = np.random.default_rng(0)


def normal(*shape):
    """Constants of programs: numbers that all machines draw alike, to the last bit."""
    drawn = np.round(16 * RNG.standard_normal(shape)) / 16
    return jnp.asarray(drawn, jnp.float32)


W, V, X = normal(6, 6), normal(6, 3), normal(2, 6)
IDS, TYPES = jnp.array([[1, 2, 3]] * 2), jnp.array([[0, 1, 1]] * 2)
IMAGE, KERNEL = normal(2, 3, 5, 5), normal(4, 3, 3, 3)


def norm(x):
    x = x - x.mean(-1, keepdims=True)
    return x / jnp.sqrt((x * x).mean(-1, keepdims=True) + 1e-5)


def attention(w, x):
    q, k, v = (x[:, :, None] * w[i][:6] for i in range(3))
    scores = q @ k.swapaxes(-1, -2)
    return (jax.nn.softmax(scores) @ v).sum((1, 2))


def average(w, x):
    weight = jnp.exp(x @ w)
    return (weight * (x @ w.T)).sum(-1) / weight.sum(-1)


def lstm(w, x):
    def step(state, xt):
        h, c = state
        gates = jax.nn.sigmoid(h[:, None] * w[:4].sum(1) + xt[:, None])
        c = gates[:, 0] * c + gates[:, 1] * jnp.tanh(xt)
        return (gates[:, 2] * jnp.tanh(c), c), None

    zero = jnp.zeros(len(x))
    return lax.scan(step, (zero, zero), x.T)[0][0]


def recurrence(w, x):
    def step(s, xt):
        n, d = s
        weight = jnp.exp(xt)
        return (n + weight * xt * w[0, 0], d + weight), None

    zero = jnp.zeros(len(x))
    n, d = lax.scan(step, (zero, zero), x.T)[0]
    return n / d


def embedded(e, x):
    ids, types = x
    h = e["tokens"][ids] + e["types"][types] + e["both"][ids + types]
    return norm(h).sum(1) @ V


def looped(w, x):
    def step(s):
        return s[0] + 1, jnp.tanh(s[1] @ w)

    return lax.while_loop(lambda s: s[0] < 3, step, (0, x))[1] @ V


def branched(w, x):
    return lax.cond(x.sum() > 0, jnp.tanh, jnp.sin, x @ w) @ V


def convolved(k, x):
    h = jax.nn.relu(lax.conv(x, k, (1, 1), "VALID"))
    return lax.reduce_window(h, -jnp.inf, lax.max, (1, 1, 2, 2), (1, 1, 1, 1), "VALID")


def pooled(k, x):
    return convolved(k, x).mean((2, 3))


EMBEDDINGS = {"tokens": normal(5, 6), "types": normal(3, 6), "both": normal(8, 6)}
LINEN = nn.Sequential([nn.Dense(4), nn.gelu, nn.LayerNorm(), nn.Dense(3)])
LINEN_PARAMS = LINEN.init(jax.random.key(1), X)
SPD = W @ W.T + 9 * jnp.eye(6, dtype=W.dtype)


def solved(a, x):
    return jax.vmap(lambda b: linalg.gmres(a, b)[0])(x) @ V


PROGRAMS = {
    "dense": (lambda w, x: x @ w @ V, W, X, "auto"),
    "mlp": (lambda w, x: jax.nn.gelu(x @ w) @ V, W, X, "epsilon_plus_flat"),
    "residual": (lambda w, x: (x + jax.nn.relu(x @ w)) @ V, W, X, "dynamic_lrp"),
    "norm": (lambda w, x: norm(x @ w) @ V, W, X, "attnlrp"),
    "gates": (lambda w, x: jax.nn.silu(x @ w) * (x @ w.T) @ V, W, X, "cp_lrp"),
    "attention": (attention, W, X, "attnlrp"),
    "average": (average, W, X, "auto"),
    "lstm": (lstm, W, X, "mamba_lrp"),
    "average in a loop": (recurrence, W, X, "auto"),
    "two integer inputs": (embedded, EMBEDDINGS, (IDS, TYPES), "auto"),
    "a dict of inputs": (
        lambda w, x: jnp.tanh(x["b"] @ w + x["a"]) * x["c"] @ V,
        W,
        {"a": X, "b": X + 1, "c": X - 1},
        "auto",
    ),
    "while": (looped, W, X, "epsilon"),
    "cond": (branched, W, X, "auto"),
    "conv": (pooled, KERNEL, IMAGE, "auto"),
    "conv, alpha beta": (pooled, KERNEL, IMAGE, "epsilon_alpha2_beta1_flat"),
    "linen": (LINEN.apply, LINEN_PARAMS, X, "excitation_backprop"),
    "solver": (solved, SPD, X, "gradient_input"),
    "expm": (lambda w, x: jax.scipy.linalg.expm(x.T @ x)[:2] @ w, V, X, "auto"),
    "checkpoint": (
        jax.checkpoint(lambda w, x: jnp.tanh(x @ w) @ V),
        W,
        X,
        "epsilon",
    ),
    "sort": (lambda w, x: jnp.sort(x @ w, -1)[:, -3:], W, X, "auto"),
}


def text(fn, params, x, composite, **options):
    explain = jlrp.explain(fn, composite=composite, **options)
    return jax.jit(lambda p, x: explain(p, x)).lower(params, x).as_text()


def main():
    junk = [object() for _ in range(int(sys.argv[1]) * 1000)]  # other addresses
    found = {name: text(*program) for name, program in PROGRAMS.items()}
    found["weights"] = text(*PROGRAMS["lstm"], wrt=("x", "params"))
    found["sqrt"] = text(*PROGRAMS["mlp"], residuals="sqrt")
    found["promise"] = text(*PROGRAMS["attention"], residuals="promise")
    digests = {n: hashlib.sha256(t.encode()).hexdigest() for n, t in found.items()}
    del junk
    print(json.dumps(digests | {"length": int(np.sum([*map(len, found.values())]))}))


if __name__ == "__main__":
    main()
