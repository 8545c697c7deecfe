"""Names in the bodies of loops and branches: as those of the loop written out.

A program is written once, with its loop and its names as arguments. Written out in
Python, with a name of its own for each iteration, it is the reference.
"""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jlrp

pytestmark = pytest.mark.relaxed
RNG = np.random.default_rng(5)
normal = lambda *shape: jnp.asarray(RNG.normal(size=shape))  # noqa: E731
N, B, T, H = 3, 2, 4, 4
P = {"layers": normal(N, H, H) / 2, "biases": normal(N, H) / 2, "out": normal(H, 2)}
P |= {"u": normal(H, H) / 2, "h0": normal(B, H), "grid": normal(2, N, H, H) / 2}
P |= {name: normal(N, H, H) / 2 for name in ("q", "k", "v", "up", "down")}
X, SEQUENCE = normal(B, H), normal(B, T, H)
relu = jax.nn.relu


# Each program is written for these two: loops that run, and loops written out.


class Looped:
    """The loops of JAX, and names as they are."""

    scan = staticmethod(lax.scan)
    cond = staticmethod(lax.cond)
    checkpoint = staticmethod(jax.checkpoint)
    name = staticmethod(jlrp.tag)


class WrittenOut:
    """The same in Python; a name has its iterations behind it."""

    def __init__(self):
        self._at = []

    @contextlib.contextmanager
    def iteration(self, i):
        self._at.append(i)
        yield
        self._at.pop()

    def scan(self, step, carry, xs, reverse=False):
        n, ys = len(jax.tree.leaves(xs)[0]), [None] * len(jax.tree.leaves(xs)[0])
        for i in reversed(range(n)) if reverse else range(n):
            with self.iteration(i):
                carry, ys[i] = step(carry, jax.tree.map(lambda a: a[i], xs))  # noqa: B023
        return carry, jax.tree.map(lambda *parts: jnp.stack(parts), *ys)

    def cond(self, decides, yes, no, *operands):
        return yes(*operands) if self.decisions.pop(0) else no(*operands)

    def checkpoint(self, step):
        return step

    def name(self, y, name):
        return jlrp.tag(y, written(name, self._at))


def written(name, index):
    return ".".join(map(str, (name, *index)))


# The programs.


def mlp(on):
    def step(h, layer):
        w, b = layer
        update = on.name(relu(h @ w + b), "update")
        return on.name(h + update, "stream"), None

    def fn(p, x):
        h, _ = on.scan(step, x, (p["layers"], p["biases"]))
        return h @ p["out"]

    return fn, X


def rnn(on, learned=False, reverse=False):
    """From a state of zeros, so that the first step differs; both outputs are read."""

    def fn(p, x):
        def step(h, x):
            gate = on.name(jax.nn.sigmoid(x @ p["u"]), "gate")
            h = on.name(jnp.tanh(x + h @ p["u"]) * gate, "state")
            return h, h * 2.0

        h = p["h0"] if learned else jnp.zeros((B, H))
        h, hs = on.scan(step, h, x.swapaxes(0, 1), reverse=reverse)
        return (h + hs[1]) @ p["out"]

    return fn, SEQUENCE


def attention(on):
    def step(h, layer):
        q, k, v, up, down = layer
        a = jax.nn.softmax((h @ q) @ jnp.swapaxes(h @ k, -1, -2), -1)
        a = on.name(a, "weights")
        h = on.name(h + a @ (h @ v), "attended")
        h = h / jnp.sqrt((h**2).mean(-1, keepdims=True) + 1e-6)
        return h + on.name(jax.nn.gelu(h @ up), "hidden") @ down, None

    def fn(p, x):
        h, _ = on.scan(step, x, tuple(p[n] for n in ("q", "k", "v", "up", "down")))
        return h.mean(1) @ p["out"]

    return fn, SEQUENCE


def nested(on):
    def outer(h, ws):
        def inner(h, w):
            h = on.name(h + relu(h @ w), "inner")
            return h, h.sum(-1)

        h, sums = on.scan(inner, h, ws)
        return on.name(h + jnp.tanh(sums.sum(0))[:, None], "outer"), None

    def fn(p, x):
        return on.scan(outer, x, p["grid"])[0] @ p["out"]

    return fn, X


def rematerialised(on):
    def step(h, w):
        hidden = on.name(jnp.tanh(h @ w), "hidden")
        return on.name(h + hidden @ w.T, "stream"), None

    def fn(p, x):
        return on.scan(on.checkpoint(step), x, p["layers"])[0] @ p["out"]

    return fn, X


def mapped(on):
    """A loop for each example: the value as traced has no axis of examples."""

    def one(p, x):
        def step(h, w):
            return on.name(h + relu(w @ h), "stream"), on.name(relu(h), "relu")

        h, ys = on.scan(step, x, p["layers"])
        return (jnp.tanh(h) + ys.sum(0)) @ p["out"]

    return lambda p, x: jax.vmap(functools.partial(one, p))(x), X


def branching(on):
    """Layers of two kinds; the first and last are of one."""

    def step(h, layer):
        w, kind = layer

        def plain(h):
            return on.name(h + relu(h @ w), "plain")

        def gated(h):
            return h + on.name(jax.nn.silu(h @ w), "gate") * (h @ w.T)

        return on.cond(kind, plain, gated, h), None

    def fn(p, x):
        on.decisions = [True, False, True]
        kinds = jnp.asarray(on.decisions)
        return on.scan(step, x, (p["layers"], kinds))[0] @ p["out"]

    return fn, X


def long(on):
    """Enough iterations for chunks, and a rest."""

    def step(h, w):
        h = on.name(h + jnp.tanh(h @ w) / 4, "stream")
        return h, None

    def fn(p, x):
        ws = jnp.concatenate([p["layers"], p["q"], p["k"], p["v"][:2]])
        return on.scan(step, x, ws)[0] @ p["out"]

    return fn, X


PROGRAMS = {
    "mlp": (mlp, "epsilon"),
    "rnn from zeros": (rnn, "epsilon"),
    "rnn from parameters": (functools.partial(rnn, learned=True), "attnlrp"),
    "reverse": (functools.partial(rnn, reverse=True), "epsilon_plus"),
    "attention": (attention, "attnlrp"),
    "nested": (nested, "epsilon"),
    "remat": (rematerialised, "epsilon"),
    "vmap outside": (mapped, "attnlrp"),
    "cond in scan": (branching, "epsilon"),
    "chunks": (long, "epsilon"),
}


def tags(fn, x):
    program, _ = jlrp.graph.trace(fn, P, x)
    return tuple(program.tags)


def assert_close(ours, expected, tolerance=1e-10):
    scale = max(float(jnp.abs(expected).max()), 1e-300)
    np.testing.assert_allclose(ours, expected, rtol=0, atol=tolerance * scale)


def names_of(written_out):
    return sorted({name.split(".")[0] for name in written_out})


def stacked(by_name, name, shape, axes):
    """What was written out, as the loop stacks it: zeros for what did not run."""
    rows = np.zeros(shape)
    for index in np.ndindex(shape[:axes]):
        if (key := written(name, index)) in by_name:
            rows[index] = by_name[key]
    return rows


def axes_of(written_out, name):
    return max(n.count(".") for n in written_out if n.split(".")[0] == name)


def explain(fn, x, **options):
    return jlrp.explain(fn, **options)(P, x, 0)


@pytest.mark.parametrize("name", PROGRAMS)
def test_scanned_is_written_out(name):
    """Captures; then masks for all iterations alike, and one for each."""
    make, composite = PROGRAMS[name]
    options = {"residuals": "sqrt"} if name == "chunks" else {}
    (fn, x), (twin, _) = make(Looped()), make(WrittenOut())
    each = tags(twin, x)
    want = explain(twin, x, capture=each, composite=composite)
    got = explain(fn, x, capture=names_of(each), composite=composite, **options)
    assert_close(got.relevance, want.relevance)
    assert sorted(got.captured) == names_of(each)
    for tag, rows in got.captured.items():
        axes = axes_of(each, tag)
        assert np.any(rows), tag
        assert_close(rows, stacked(want.captured, tag, rows.shape, axes))
    masks, of_twin = {}, {}
    for k, (tag, rows) in enumerate(got.captured.items()):
        axes = axes_of(each, tag)
        masks[tag] = normal(*rows.shape[axes * (k % 2) :])
        for index in np.ndindex(rows.shape[:axes]):
            if written(tag, index) in each:
                mask = masks[tag] if k % 2 else masks[tag][index]
                of_twin[written(tag, index)] = mask
    want = explain(twin, x, composite=composite, capture=each, condition=of_twin)
    conditioned = dict(composite=composite, capture=names_of(each), condition=masks)
    got = explain(fn, x, **conditioned, **options)
    assert_close(got.relevance, want.relevance)
    for tag, rows in got.captured.items():
        axes = axes_of(each, tag)
        assert_close(rows, stacked(want.captured, tag, rows.shape, axes))
