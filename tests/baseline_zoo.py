"""Small programs for relevance from a reference: (fn, params, x) by name."""

import jax
import jax.numpy as jnp
from jax import lax

KEYS = iter(jax.random.split(jax.random.key(0), 99))


def normal(*shape):
    return jax.random.normal(next(KEYS), shape)


W, V, X = normal(6, 6), normal(6, 3), normal(2, 6)
B, G = normal(1, 6), 1 + 0.3 * normal(1, 6)
IMAGE, FIRST, SECOND = normal(2, 3, 8, 8), normal(4, 3, 3, 3), normal(5, 4, 3, 3)


def layer_norm(x):
    mean = x.mean(-1, keepdims=True)
    variance = ((x - mean) ** 2).mean(-1, keepdims=True)
    return (x - mean) / jnp.sqrt(variance + 1e-5)


def fast_layer_norm(x):
    mean = x.mean(-1, keepdims=True)
    variance = (x * x).mean(-1, keepdims=True) - mean * mean
    return (x - mean) * lax.rsqrt(variance + 1e-5)


def keras_layer_norm(x):
    mean = x.mean(-1, keepdims=True)
    inverse = lax.rsqrt(((x - mean) ** 2).mean(-1, keepdims=True) + 1e-5)
    return x * inverse + (0 - mean * inverse)


def rms_norm(x):
    return x * lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-6)


def heads(w, x):
    return [jnp.stack([x @ w, x @ w.T, x], 1) @ m for m in (w, w.T, w * 0.5)]


def attention(w, x):
    q, k, v = heads(w, x)
    scores = q @ k.swapaxes(-1, -2) / 6**0.5
    return (jax.nn.softmax(scores) @ v).sum(1) @ V


def causal_attention(w, x):
    q, k, v = heads(w, x)
    scores = q @ k.swapaxes(-1, -2) / 6**0.5
    scores = jnp.where(jnp.tri(3, dtype=bool)[None], scores, -jnp.inf)
    return (jax.nn.softmax(scores) @ v).sum(1) @ V


def lstm(w, x):
    def step(state, xt):
        h, c = state
        gates = jax.nn.sigmoid(h[:, None] * w[:4].sum(1)[None] + xt[:, None])
        c = gates[:, 0] * c + gates[:, 1] * jnp.tanh(xt)
        return (gates[:, 2] * jnp.tanh(c), c), None

    zero = jnp.zeros(len(x))
    return lax.scan(step, (zero, zero), x.T)[0][0]


def average_in_a_loop(w, x):
    def step(state, xt):
        n, d = state
        weight = jnp.exp(xt)
        return (n + weight * xt * w[0, 0], d + weight), None

    zero = jnp.zeros(len(x))
    n, d = lax.scan(step, (zero, zero), x.T)[0]
    return n / d


def windows(h, start, combine):
    return lax.reduce_window(h, start, combine, (1, 1, 2, 2), (1, 1, 2, 2), "VALID")


def cnn(p, x):
    h = jax.nn.relu(lax.conv(x, p[0], (1, 1), "SAME"))
    h = jax.nn.gelu(lax.conv(windows(h, -jnp.inf, lax.max), p[1], (1, 1), "SAME"))
    return (windows(h, 0.0, lax.add) / 4).reshape(2, -1)[:, :6] @ V


def three_layers(w, x):
    return lax.scan(lambda h, m: (jnp.tanh(h @ m) + h, None), x, jnp.stack([w, w.T, w]))


def branched(w, x):
    def step(h, _):
        h = lax.cond(h.sum() > 0, jnp.tanh, jnp.sin, h @ w)
        return h, h.sum()

    return lax.scan(step, x, jnp.arange(3))[0] @ V


def counted(w, x):
    def step(state):
        return state[0] + 1, jnp.tanh(state[1] @ w)

    return lax.while_loop(lambda s: s[0] < 3, step, (0, x))[1] @ V


def recurrence(w, x):
    def combine(a, b):
        return a[0] * b[0], a[1] * b[0] + b[1]

    gates = jax.nn.sigmoid(x)
    return lax.associative_scan(combine, (gates, x @ w), axis=1)[1] @ V


def picked(w, x):
    h = x @ w
    return jnp.take_along_axis(h, jnp.argsort(h, -1)[:, :3], 1)


def cosine(w, x):
    a, b = x @ w, x @ w.T
    sizes = [jnp.sqrt((v * v).sum(-1) + 1e-3) for v in (a, b)]
    return (a * b).sum(-1) / (sizes[0] * sizes[1])


def solved(w, x):
    return jnp.linalg.solve(w @ w.T + 9 * jnp.eye(6), x.T).T @ V


def of(function):
    return lambda w, x: function(x @ w + B) @ V


ACTIVATIONS = {
    "abs": jnp.abs,
    "atan": jnp.arctan,
    "cbrt": jnp.cbrt,
    "clip": lambda x: jnp.clip(x, -0.5, 0.7),
    "elu": jax.nn.elu,
    "erf": jax.scipy.special.erf,
    "exp": jnp.exp,
    "gelu": jax.nn.gelu,
    "gelu by erf": lambda x: jax.nn.gelu(x, approximate=False),
    "hard swish": jax.nn.hard_swish,
    "log cosh": lambda x: jnp.log(jnp.cosh(x)),
    "log sigmoid": jax.nn.log_sigmoid,
    "mish": jax.nn.mish,
    "power": lambda x: jnp.abs(x) ** 1.7,
    "relu": jax.nn.relu,
    "sigmoid": jax.nn.sigmoid,
    "silu": jax.nn.silu,
    "sin": jnp.sin,
    "softplus": jax.nn.softplus,
    "softsign": jax.nn.soft_sign,
    "tanh": jnp.tanh,
    "x**3": lambda x: x**3,
    "x**-2": lambda x: 1 / (x * x + 1),
}

# Nothing is left over in any of these.
EXACT = {
    **{name: (of(function), W, X) for name, function in ACTIVATIONS.items()},
    "associative scan": (recurrence, W, X),
    "attention": (attention, W, X),
    "average in a loop": (average_in_a_loop, W, X),
    "batch norm": (
        lambda w, x: jax.nn.relu((x @ w - B) / jnp.sqrt(G * G + 1e-3) * G + B) @ V,
        W,
        X,
    ),
    "causal attention": (causal_attention, W, X),
    "cnn": (cnn, [FIRST, SECOND], IMAGE),
    "concatenate": (
        lambda w, x: jnp.concatenate([x @ w, 2 * x], 1) @ jnp.concatenate([V, V]),
        W,
        X,
    ),
    "cosine": (cosine, W, X),
    "cummax": (lambda w, x: lax.cummax(x @ w, 1) @ V, W, X),
    "cumprod": (lambda w, x: jnp.cumprod(x @ w, -1) @ V, W, X),
    "dict": (
        lambda w, x: jnp.tanh(x["b"] @ w + x["a"]) * x["c"] @ V,
        W,
        {"a": X, "b": X + 1, "c": X - 1},
    ),
    "gated": (lambda w, x: (jax.nn.silu(x @ w) * (x @ w.T)) @ V, W, X),
    "gram": (lambda w, x: (lambda h: h @ h.T @ h)(x @ w) @ V, W, X),
    "layer norm": (lambda w, x: layer_norm(x @ w) @ V, W, X),
    "log softmax": (lambda w, x: jax.nn.log_softmax(x @ w) @ V, W, X),
    "logsumexp": (lambda w, x: jax.nn.logsumexp(x @ w, -1), W, X),
    "lstm": (lstm, W, X),
    "maximum": (lambda w, x: jnp.maximum(x @ w, x @ w.T) @ V, W, X),
    "max": (lambda w, x: (x @ w).max(-1), W, X),
    "prod": (lambda w, x: (x @ w).prod(-1), W, X),
    "quotient": (lambda w, x: (x @ w) / (x @ jnp.abs(w) + 99) @ V, W, X),
    "quotient by a gate": (lambda w, x: (x @ w) / (1 + jnp.exp(x @ w.T)) @ V, W, X),
    "rms norm": (lambda w, x: rms_norm(x @ w) @ V, W, X),
    "scan": (lambda w, x: three_layers(w, x)[0] @ V, W, X),
    "softmax": (lambda w, x: jax.nn.softmax(x @ w) @ V, W, X),
    "softmax, divided late": (
        lambda w, x: (jnp.exp(x @ w) @ V) / jnp.exp(x @ w).sum(-1, keepdims=True),
        W,
        X,
    ),
    "solved for x": (solved, W, X),
    "std": (lambda w, x: jnp.std(x @ w, -1), W, X),
    "three factors": (lambda w, x: ((x @ w) * (x @ w.T) * jnp.tanh(x)) @ V, W, X),
    "while": (counted, W, X),
}

# Something is, by a cause of its own.
WITH_REMAINDER = {
    "atan2": (lambda w, x: jnp.arctan2(x @ w, x + 3) @ V, W, X, "quadrature"),
    "branches": (branched, W, X, "switch"),
    "cholesky": (
        lambda w, x: jnp.linalg.cholesky(x.T @ x + jnp.eye(6)).sum(0) @ V,
        W,
        X,
        "quadrature",
    ),
    "masked by x": (
        lambda w, x: (
            jax.nn.softmax(
                jnp.where((x > 0) | (jnp.arange(6)[None] < 2), x @ w, -jnp.inf)
            )
            @ V
        ),
        W,
        X,
        "switch",
    ),
    "picked": (picked, W, X, "switch"),
    "selected": (lambda w, x: jnp.where(x @ w.T > 0, x @ w, x) @ V, W, X, "switch"),
    "sorted": (lambda w, x: jnp.sort(x @ w, -1)[:, -3:], W, X, "switch"),
    "stopped": (lambda w, x: (x @ w + lax.stop_gradient(x)) @ V, W, X, "stopped"),
    "stopped factor": (
        lambda w, x: ((x @ w) * lax.stop_gradient(x)) @ V,
        W,
        X,
        "switch",
    ),
}
PROGRAMS = {**EXACT, **{n: (*row[:3],) for n, row in WITH_REMAINDER.items()}}
