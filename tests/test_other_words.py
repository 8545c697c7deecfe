"""What is read as one equation, in whatever words it is written, and what is not.

Each group is one function in several forms; each decoy looks like one of them and is
none. The forms are written by hand, beside those that ``jlrp.testing`` makes.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from differences import spelled
from jax import lax

import jlrp
from jlrp import testing

ALL = {
    "cp_lrp": "cp_lrp",
    "dynamic_lrp": "dynamic_lrp",
    "epsilon_plus_flat": "epsilon_plus_flat",
    "excitation_backprop": "excitation_backprop",
    "gamma": jlrp.composites.attnlrp(0.25, 0.05),
}
RNG = np.random.default_rng(5)
WEIGHTS = {
    "w": jnp.asarray(RNG.normal(size=(4, 4))),
    "v": jnp.asarray(RNG.normal(size=(4, 4))),
    "u": jnp.asarray(RNG.normal(size=(4, 4))),
    "b": jnp.asarray(RNG.normal(size=4)),
    "k": jnp.asarray(RNG.normal(size=(2, 2, 4, 6))),
}
SAMPLE = jnp.asarray(RNG.normal(size=(4, 4)))
exp, relu, tanh = jnp.exp, jax.nn.relu, jnp.tanh


def of_three(function):
    """A function of three layers of x, and a layer behind it."""

    def fn(p, x):
        return function(x @ p["w"], x @ p["v"], x @ p["u"]) @ p["w"]

    return fn


def of_parts(function):
    """A function of two activations, side by side, and a layer behind it."""
    return lambda p, x: (
        function(tanh(x @ p["w"]), relu(x @ p["v"])[:, :3])
        @ p["k"][0].reshape(8, 6)[:7]
    )


def padded(x, before, behind):
    return jnp.pad(x, ((0, 0), (before, behind)))


def written(a, b):
    whole = jnp.zeros((4, 7))
    whole = lax.dynamic_update_slice(whole, a, (0, 0))
    return lax.dynamic_update_slice(whole, b, (0, 4))


def with_gap(function):
    return lambda p, x: (
        function(tanh(x @ p["w"]), relu(x @ p["v"]))
        @ jnp.concatenate([p["u"], p["w"], p["v"]])
    )


def image(x):
    return x.reshape(1, 2, 2, 4)


def conv(x, kernel):
    return lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def behind_conv(function):
    return lambda p, x: relu(function(image(x), p["k"])).sum((1, 2))


def wide(b):
    return jnp.broadcast_to(b[None], (4, 4))


def rectified(total):
    return lambda p, x: relu(total(p, x, p["b"][None])) @ p["v"]


def log_of(function):
    return of_three(lambda a, b, c: jnp.log(function(exp(a).sum(1, keepdims=True))) * b)


def pooled(mean):
    def fn(p, x):
        return mean(image(tanh(x @ p["w"]) + x)) @ p["v"]

    return fn


def of_windows(total, divisor):
    """Sums over windows that overlap, divided, and their total."""

    def fn(p, x):
        h = image(tanh(x @ p["w"]) + x)
        pads = ((0, 0), (1, 1), (0, 0), (0, 0))
        h = lax.reduce_window(h, 0.0, lax.add, (1, 3, 1, 1), (1,) * 4, pads)
        return total(h / divisor) @ p["v"]

    return fn


TOTALS = {
    "sum": lambda h: h.sum((1, 2)),
    "one by one": lambda h: h.sum(2).sum(1),
    "transposed": lambda h: h.transpose(1, 2, 0, 3).sum((0, 1)),
    "a dot": lambda h: (jnp.ones((1, 4)) @ h.transpose(1, 2, 0, 3).reshape(4, 4))[0:1],
}


def softmax_of(function):
    return lambda p, x: function(x @ p["w"]) @ (x @ p["v"])


def in_halves(h, p):
    halves = [h @ p["u"][:, :2], h @ p["u"][:, 2:]]
    return jnp.concatenate(halves, 1) + p["b"]


def logits(function):
    return lambda p, x: tanh(function(tanh(x @ p["w"]) @ p["u"])) @ p["v"]


def lse(scores):
    return jax.nn.logsumexp(scores, -1, keepdims=True)


def attention(average):
    def fn(p, x):
        e = exp((x @ p["w"]) @ (x @ p["u"]).T)
        return average(e, x @ p["v"])

    return fn


GROUPS = {
    "two divisors": {
        "of their product": of_three(lambda a, b, c: a / (exp(b) * (1 + exp(-c)))),
        "one by one": of_three(lambda a, b, c: a / exp(b) / (1 + exp(-c))),
        "a reciprocal": of_three(lambda a, b, c: a * (1 / (exp(b) * (1 + exp(-c))))),
        "a power": of_three(lambda a, b, c: a * (exp(b) * (1 + exp(-c))) ** -1),
        "a sigmoid": of_three(lambda a, b, c: a * exp(-b) * jax.nn.sigmoid(c)),
    },
    "a divided divisor": {
        "a quotient": of_three(lambda a, b, c: a / ((1 + b * b) / c)),
        "a product": of_three(lambda a, b, c: a / (1 + b * b) * c),
    },
    "late division": {
        "early": attention(lambda e, v: (e / e.sum(-1, keepdims=True)) @ v),
        "late": attention(lambda e, v: (e @ v) / e.sum(-1, keepdims=True)),
        "a reciprocal": attention(lambda e, v: (e @ v) * (1 / e.sum(-1))[:, None]),
        "a power": attention(lambda e, v: (e @ v) * e.sum(-1, keepdims=True) ** -1.0),
    },
    "softmax in log space": {
        "softmax": softmax_of(jax.nn.softmax),
        "of log_softmax": softmax_of(lambda s: exp(jax.nn.log_softmax(s))),
        "less logsumexp": softmax_of(
            lambda s: exp(s - jax.nn.logsumexp(s, -1, keepdims=True))
        ),
        "less the log": softmax_of(
            lambda s: exp(s - jnp.log(exp(s).sum(-1, keepdims=True)))
        ),
        "plus a minus": softmax_of(
            lambda s: exp(-jnp.log(exp(s).sum(-1, keepdims=True)) + s)
        ),
    },
    "log-softmax": {
        "jax's": logits(jax.nn.log_softmax),
        "less jax's logsumexp": logits(lambda s: s - lse(s)),
        "less the log": logits(lambda s: s - jnp.log(exp(s).sum(-1, keepdims=True))),
        "plus a minus": logits(lambda s: -jnp.log(exp(s).sum(-1, keepdims=True)) + s),
        "log1p": logits(lambda s: s - jnp.log1p(exp(s).sum(-1, keepdims=True) - 1)),
        "by powers of two": logits(
            lambda s: s - jnp.log(jnp.exp2(s / np.log(2)).sum(-1, keepdims=True))
        ),
        "quotients": logits(
            lambda s: (
                lambda m: s - jnp.log((exp(s) / exp(m)).sum(-1, keepdims=True)) - m
            )(lax.stop_gradient(s.max(-1, keepdims=True)))
        ),
        "of the negative": logits(lambda s: s - lse(0 - (-s))),
        "copied": logits(lambda s: jnp.copy(s) - lse(s + 0.0)),
        "flipped": logits(lambda s: (s[:, ::-1] - lse(s))[:, ::-1]),
    },
    "differences": {
        "minus": of_three(lambda a, b, c: tanh(a) - b * c),
        "plus a minus": of_three(lambda a, b, c: -(b * c) + tanh(a)),
        "the other way": of_three(lambda a, b, c: -(b * c - tanh(a))),
        "minus a minus": of_three(lambda a, b, c: tanh(a) - (0 - (-(b * c)))),
    },
    "side by side": {
        "concatenated": of_parts(lambda a, b: jnp.concatenate([a, b], 1)),
        "padded": of_parts(lambda a, b: padded(a, 0, 3) + padded(b, 4, 0)),
        "written": of_parts(written),
        "reversed": of_parts(
            lambda a, b: jnp.concatenate([b[:, ::-1], a[:, ::-1]], 1)[:, ::-1]
        ),
        "transposed": of_parts(lambda a, b: jnp.concatenate([a.T, b.T]).T),
        "joined with zeros": of_parts(
            lambda a, b: (
                jnp.concatenate([a, jnp.zeros((4, 3))], 1)
                + jnp.concatenate([jnp.zeros((4, 4)), b], 1)
            )
        ),
    },
    "with zeros between": {
        "concatenated": with_gap(
            lambda a, b: jnp.concatenate([a, jnp.zeros((4, 4)), b], 1)
        ),
        "padded": with_gap(lambda a, b: padded(a, 0, 8) + padded(b, 8, 0)),
    },
    "copies": {
        "broadcast": of_three(
            lambda a, b, c: a * jnp.broadcast_to(b.mean(0)[None], (4, 4))
        ),
        "concatenated": of_three(
            lambda a, b, c: a * jnp.concatenate([b.mean(0)[None]] * 4)
        ),
        "tiled": of_three(lambda a, b, c: a * jnp.tile(b.mean(0)[None], (4, 1))),
    },
    "a sum of two": {
        "added": of_three(lambda a, b, c: tanh(a) + b * c),
        "stacked": of_three(lambda a, b, c: jnp.stack([tanh(a), b * c]).sum(0)),
        "stacked inside": of_three(
            lambda a, b, c: jnp.stack([tanh(a), b * c], 2).sum(2)
        ),
    },
    "a mean over two axes": {
        "mean": pooled(lambda h: h.mean((1, 2))),
        "of means": pooled(lambda h: h.mean(1).mean(1)),
        "divided first": pooled(lambda h: (h / 4).sum((1, 2))),
        "scaled between": pooled(lambda h: (h.sum(2) * 0.5).sum(1) / 2),
        "a dot": pooled(lambda h: jnp.einsum("bijc,ij->bc", h, jnp.full((2, 2), 0.25))),
        "a window": pooled(
            lambda h: (
                lax.reduce_window(h, 0.0, lax.add, (1, 2, 2, 1), (1,) * 4, "VALID") / 4
            )[:, 0, 0]
        ),
    },
    "a sum of averages of windows": {
        name: of_windows(total, 3.0) for name, total in TOTALS.items()
    },
    "an average of sums of windows": {
        name: of_windows(total, 4.0) for name, total in TOTALS.items()
    },
    "scaled sums of windows": {
        name: of_windows(total, 5.0) for name, total in TOTALS.items()
    },
    "a convolution": {
        "whole": behind_conv(conv),
        "by features": behind_conv(
            lambda x, k: jnp.concatenate([conv(x, k[..., :2]), conv(x, k[..., 2:])], -1)
        ),
        "one by one": behind_conv(
            lambda x, k: jnp.concatenate(
                [conv(x, k[..., i : i + 1]) for i in range(6)], -1
            )
        ),
    },
    "a sum of quotients": {
        "divided": lambda p, x: tanh((tanh(x @ p["w"]) / p["v"]).sum(0) @ p["u"])[None],
        "times one over": lambda p, x: tanh(
            (tanh(x @ p["w"]) * (1 / p["v"])).sum(0) @ p["u"]
        )[None],
        "a contraction": lambda p, x: tanh(
            jnp.einsum("io,io->o", tanh(x @ p["w"]), 1 / p["v"]) @ p["u"]
        )[None],
    },
    "a scale before a sum": {
        "divided": lambda p, x: tanh((tanh(x @ p["w"]) / p["b"]).sum(0) @ p["u"])[None],
        "times one over": lambda p, x: tanh(
            (tanh(x @ p["w"]) * (1 / p["b"])).sum(0) @ p["u"]
        )[None],
    },
    "a gated unit": {
        "an activation": of_three(lambda a, b, c: a * jax.nn.silu(b) * c),
        "the gate last": of_three(lambda a, b, c: (a * b) * jax.nn.sigmoid(b) * c),
        "the gate first": of_three(lambda a, b, c: jax.nn.sigmoid(b) * (a * b) * c),
        "divided": of_three(lambda a, b, c: (a * b) / (1 + exp(-b)) * c),
    },
    "a layer of copies": {
        "a kernel": lambda p, x: relu(
            jnp.repeat(tanh(x @ p["w"]), 2, 0) @ p["u"] + p["b"]
        )[::3],
        "split": lambda p, x: relu(in_halves(jnp.repeat(tanh(x @ p["w"]), 2, 0), p))[
            ::3
        ],
    },
    "a scaled kernel": {
        "kernel": lambda p, x: tanh(x @ p["w"]) @ p["v"],
        "doubled and halved": lambda p, x: tanh((x @ (2 * p["w"])) * 0.5) @ p["v"],
        "halved and doubled": lambda p, x: tanh((x @ (p["w"] / 2)) / 0.5) @ p["v"],
    },
    "a scaled query": {
        "behind": softmax_of(lambda s: s)
        and (lambda p, x: jax.nn.softmax((x @ p["w"]) @ (x @ p["u"]).T * 0.5) @ x),
        "before": lambda p, x: jax.nn.softmax((x @ p["w"] * 0.5) @ (x @ p["u"]).T) @ x,
        "of the key": lambda p, x: (
            jax.nn.softmax((x @ p["w"]) @ (x @ p["u"] / 2).T) @ x
        ),
    },
    "a bias behind a sum": {
        "of the layer": rectified(lambda p, x, b: tanh(x) + (x @ p["w"] + b)),
        "of the sum": rectified(lambda p, x, b: (tanh(x) + x @ p["w"]) + b),
        "subtracted": rectified(lambda p, x, b: tanh(x) - (-b - x @ p["w"])),
    },
    "a maximum": {
        "maximum": of_three(lambda a, b, c: jnp.maximum(a, b) * c),
        "arithmetic": of_three(lambda a, b, c: (a + b + abs(a - b)) / 2 * c),
        "of the other": of_three(lambda a, b, c: 0.5 * (abs(b - a) + (b + a)) * c),
    },
    "a minimum": {
        "minimum": of_three(lambda a, b, c: jnp.minimum(a, b) * c),
        "arithmetic": of_three(lambda a, b, c: (a + b - abs(a - b)) * 0.5 * c),
    },
    "logsumexp": {
        "plain": log_of(lambda s: s),
        "a magnitude": log_of(abs),
        "a maximum": log_of(lambda s: jnp.maximum(s, -s)),
        "a selection": log_of(lambda s: jnp.where(s < 0, -s, s)),
        "with its sign": log_of(lambda s: s * jnp.sign(s)),
        "a root": log_of(lambda s: jnp.sqrt(s * s)),
    },
    "a running sum": {
        "cumsum": lambda p, x: relu(jnp.cumsum(x @ p["w"], 0)) @ p["v"],
        "a dot": lambda p, x: relu(jnp.tri(4) @ (x @ p["w"])) @ p["v"],
        "from the right": lambda p, x: relu(((x @ p["w"]).T @ jnp.tri(4).T).T) @ p["v"],
    },
    "in another shape": {
        "batch norm": lambda p, x: relu(
            (x @ p["w"] - wide(p["b"])) * wide(p["b"]) ** 2
        ),
        "flat": lambda p, x: relu(
            (
                ((x @ p["w"]).reshape(16) - wide(p["b"]).reshape(16))
                * (wide(p["b"]) ** 2).reshape(16)
            ).reshape(4, 4)
        ),
    },
    "a contraction": {
        "dot": of_three(lambda a, b, c: (tanh(a) * b).sum(1)[:, None] * c),
        "einsum": of_three(
            lambda a, b, c: jnp.einsum("ij,ij->i", tanh(a), b)[:, None] * c
        ),
    },
}


@pytest.mark.relaxed
@pytest.mark.parametrize("composite", ALL)
@pytest.mark.parametrize("group", GROUPS)
def test_one_relevance(group, composite):
    forms = spelled(GROUPS[group], WEIGHTS, SAMPLE, ALL[composite])
    _, value, _ = next(forms)
    for name, same, error in forms:
        np.testing.assert_allclose(same, value, atol=1e-11)
        assert error < 1e-9, (name, error)


def attention(average):
    """A function of scores and values, between a residual and a layer."""

    def fn(p, x):
        scores = (x @ p["w"]) @ (x @ p["v"]).T / 2.0
        return (x + average(scores, x @ p["u"], p["v"])) @ p["w"]

    return fn


def softmax(scores):
    e = exp(scores - lax.stop_gradient(scores.max(-1, keepdims=True)))
    return e / e.sum(-1, keepdims=True)


def halves(scores):
    e = [exp(scores[:2]), exp(scores[2:])]
    total = jnp.concatenate(e).sum(-1, keepdims=True)
    return jnp.concatenate([e[0] / total[:2], e[1] / total[2:]])


def moved_inside(scores):
    e = jnp.expm1(scores).T + 1.0
    return (e / e.sum(0, keepdims=True)).T


def late(scores, values):
    e = exp(scores)
    return (e @ values) / e.sum(-1, keepdims=True)


def behind_a_layer(scores, values, kernel):
    e = exp(scores)
    return ((e @ values) @ kernel) / e.sum(-1, keepdims=True)


GROUPS |= {
    "an attention": {
        "early": attention(lambda s, v, w: softmax(s) @ v @ w),
        "late": attention(lambda s, v, w: late(s, v) @ w),
        "behind a layer": attention(behind_a_layer),
        "in halves": attention(lambda s, v, w: halves(s) @ v @ w),
        "moved inside": attention(lambda s, v, w: moved_inside(s) @ v @ w),
        "negated twice": attention(lambda s, v, w: -(-(late(s, v)) @ w)),
        "scaled and back": attention(
            lambda s, v, w: ((softmax(s) @ v) @ (2.0 * w)) * 0.5
        ),
        "of a mapped row": attention(
            lambda s, v, w: jax.vmap(late, (0, None))(s[:, None], v)[:, 0] @ w
        ),
    },
    "two layers of an average": {
        "early": attention(
            lambda s, v, w: tanh(softmax(s) @ v @ w) * (softmax(s) @ v @ w.T)
        ),
        "behind both": attention(
            lambda s, v, w: tanh(behind_a_layer(s, v, w)) * behind_a_layer(s, v, w.T)
        ),
    },
    "a sum of two, averaged": {
        "an addition": of_three(lambda a, b, c: (relu(a) + b).mean(0, keepdims=True)),
        "a stack": of_three(
            lambda a, b, c: (
                jnp.concatenate([relu(a)[None], b[None]]).sum(0).mean(0, keepdims=True)
            )
        ),
    },
    "a tile": {
        "broadcast": of_three(
            lambda a, b, c: (jnp.broadcast_to(relu(a), (2, 4, 4)) * b).reshape(8, 4)
        ),
        "tiled": of_three(
            lambda a, b, c: jnp.tile(relu(a), (2, 1)) * jnp.tile(b, (2, 1))
        ),
        "repeated": of_three(
            lambda a, b, c: (
                jnp.repeat(relu(a)[None], 2, 0).reshape(8, 4) * jnp.concatenate([b, b])
            )
        ),
    },
    "rows computed apart": {
        "together": of_three(lambda a, b, c: relu(a) * b),
        "unstacked": of_three(
            lambda a, b, c: jnp.stack(
                [
                    relu(r) * s
                    for r, s in zip(jnp.unstack(a), jnp.unstack(b), strict=True)
                ]
            )
        ),
        "split": of_three(
            lambda a, b, c: jnp.concatenate(
                [
                    relu(r) * s
                    for r, s in zip(jnp.split(a, 4), jnp.split(b, 4), strict=True)
                ]
            )
        ),
        "indexed": of_three(
            lambda a, b, c: jnp.stack([relu(a[i]) * b[i] for i in range(4)])
        ),
    },
    "parts that are put together twice": {
        "of parts": of_three(
            lambda a, b, c: (
                jnp.concatenate([tanh(a[:2]), tanh(a[2:])])
                * jnp.concatenate([tanh(a[:2]), tanh(a[2:])], 1).reshape(4, 4)
            )
        ),
        "of the whole": of_three(
            lambda a, b, c: (
                tanh(a) * jnp.concatenate([tanh(a)[:2], tanh(a)[2:]], 1).reshape(4, 4)
            )
        ),
    },
}
DECOYS = {  # and the kinds of their operations, movement left out
    "parts that overlap are added": (
        of_parts(lambda a, b: padded(a, 0, 3) + padded(b, 3, 1)),
        ["dense", "activation", "dense", "activation", "add", "dense"],
    ),
    "what is written over is gone": (
        of_three(lambda a, b, c: lax.dynamic_update_slice(tanh(a), b[:, :2], (0, 1))),
        ["dense", "activation", "dense", "dense"],
    ),
    "a sum along a concatenation is none of its parts": (
        of_three(lambda a, b, c: jnp.concatenate([tanh(a), b], 1).sum(1)[:, None] * c),
        ["dense", "activation", "dense", "sum", "dense", "product", "dense"],
    ),
    "half of a sum of three": (
        of_three(lambda a, b, c: (a + b + abs(a - c)) / 2),
        ["dense", "dense", "dense", "add", "activation", "add", "scale", "dense"],
    ),
    "a third of what would be a maximum": (
        of_three(lambda a, b, c: (a + b + abs(a - b)) / 3),
        ["dense", "dense", "add", "activation", "add", "scale", "dense"],
    ),
    "a number behind an activation belongs to it": (
        of_three(lambda a, b, c: (2 * tanh(a)) @ b),
        ["dense", "activation", "dense", "product", "dense"],
    ),
    "a bias behind a sum of two layers": (
        lambda p, x: relu(x @ p["w"] + tanh(x) @ p["v"] + p["b"][None]) @ p["u"],
        ["activation", "dense", "dense", "add", "scale", "activation", "dense"],
    ),
    **{
        f"no log-softmax: {name}": (
            of_three(lambda a, b, c, total=total: total(a) * b),
            ["dense", "softmax", "add", "dense", "product", "dense"],
        )
        for name, total in {
            "of another row": lambda a: a[::-1] - lse(a),
            "turned around inside": lambda a: a[:, ::-1] - lse(a[:, :3]),
            "of a part": lambda a: a - lse(a[:, :2]),
            "of each pair of rows": lambda a: (a[:, None] - lse(a)[None])[:, 0],
        }.items()
    },
    "no logsumexp: a score more": (
        of_three(
            lambda a, b, c: (a - jnp.log(1 + exp(a).sum(-1, keepdims=True)) * 1.0) * b
        ),
        [
            "dense",
            "activation",
            "sum",
            "activation",
            "add",
            "dense",
            "product",
            "dense",
        ],
    ),
    "a divisor that is one activation": (
        of_three(lambda a, b, c: a / (b * jax.nn.sigmoid(b))),
        ["dense", "dense", "activation", "product", "dense"],
    ),
    "a weighted sum is no running sum": (
        lambda p, x: (jnp.tri(4) * 2) @ (x @ p["w"]),
        ["dense", "linear"],
    ),
    "a sum divided by another count is no mean": (
        lambda p, x: (tanh(x @ p["w"]) / 3).sum(0)[None] @ p["v"],
        ["dense", "activation", "sum", "dense"],
    ),
    "two convolutions of two images": (
        behind_conv(
            lambda x, k: jnp.concatenate(
                [conv(x, k[..., :2]), conv(tanh(x), k[..., 2:])], -1
            )
        ),
        ["conv", "activation", "conv", "activation", "sum"],
    ),
    "an exponential of a difference": (
        of_three(lambda a, b, c: exp(a - b)),
        ["dense", "dense", "add", "activation", "dense"],
    ),
}


@pytest.mark.relaxed
@pytest.mark.parametrize("name", DECOYS)
def test_decoys(name):
    fn, kinds = DECOYS[name]
    report = jlrp.inspect(
        lambda p, x: fn(p, x)[:, 0], WEIGHTS, SAMPLE, composite="epsilon"
    )
    found = [row.kind for row in report.operations if row.kind != "movement"]
    assert sorted(found) == sorted(kinds)


@pytest.mark.relaxed
@pytest.mark.parametrize("form", GROUPS["an attention"])
def test_gradient_input_is_the_gradient(form):
    def score(x):
        return GROUPS["an attention"][form](WEIGHTS, x)[:, 0].sum()

    found = jlrp.relevance(
        lambda p, x: score(x), WEIGHTS, SAMPLE, composite="gradient_input"
    )
    np.testing.assert_allclose(found, SAMPLE * jax.grad(score)(SAMPLE), atol=1e-12)


IDS = jnp.array([2, 0, 3, 3])


@pytest.mark.parametrize("composite", ALL)
def test_a_one_hot_code_fetches_rows(composite):
    def fetched(p, ids):
        return (relu(p["w"][ids] + p["b"][None]) @ p["v"]).sum(-1)

    def coded(p, ids):
        code = jax.nn.one_hot(ids, 4, dtype=p["w"].dtype)
        return (relu(code @ p["w"] + p["b"][None]) @ p["v"]).sum(-1)

    want, found = (
        jlrp.relevance(fn, WEIGHTS, IDS, composite=ALL[composite])
        for fn in (fetched, coded)
    )
    np.testing.assert_allclose(found, want, rtol=0, atol=1e-12)


def test_a_number_of_x_times_a_kernel_is_a_layer():
    """Decoy of a one-hot code: each column is a number, and no row is fetched."""
    report = jlrp.inspect(
        lambda p, x: (x.astype(float) @ p["w"]).sum(-1), WEIGHTS, IDS[None]
    )
    assert "dense" in [row.kind for row in report.operations]


def test_a_negated_part_of_a_layer_keeps_its_sign():
    """The dot is read through its parts, and the minus between is none of it."""

    def model(p, x):
        return jax.nn.gelu(x @ p["w"], approximate=False) @ p["v"]

    twin = testing.twins(model, WEIGHTS, SAMPLE)["stacked_and_taken"]
    gradient = jax.grad(lambda x: twin(WEIGHTS, x)[:, 0].sum())(SAMPLE)
    found = jlrp.relevance(twin, WEIGHTS, SAMPLE, composite="gradient_input", target=0)
    np.testing.assert_allclose(found, SAMPLE * gradient, rtol=0, atol=1e-12)


@pytest.mark.parametrize("number", ["a number", "an array"])
def test_what_has_a_name_is_not_read_through_moves(number):
    """Relevance at a scaled value that is moved and summed is of that value."""
    divisor = WEIGHTS["w"] if number == "an array" else 4.0

    def model(p, x):
        h = jlrp.tag(tanh(x @ p["w"]) / divisor, "scaled")
        return h.T.reshape(4, 4).sum(1)[None] @ p["v"]

    explain = jlrp.explain(model, composite="epsilon", capture=("scaled",), target=0)
    found = explain(WEIGHTS, SAMPLE)
    total = model(WEIGHTS, SAMPLE)[0, 0]
    np.testing.assert_allclose(found.captured["scaled"].sum(), total, rtol=1e-4)


def test_a_log_softmax_spans_no_name():
    def model(p, x):
        h = tanh(x @ p["w"])
        return (h - lse(jlrp.tag(0 - (0 - h), "inside"))) @ p["v"]

    explain = jlrp.explain(
        model, composite="gradient_input", capture=("inside",), target=0
    )
    found = explain(WEIGHTS, SAMPLE)
    gradient = jax.grad(lambda x: model(WEIGHTS, x)[:, 0].sum())(SAMPLE)
    np.testing.assert_allclose(found.relevance, SAMPLE * gradient, atol=1e-12)
    h = tanh(SAMPLE @ WEIGHTS["w"])
    inside = jax.grad(lambda h: -(lse(h) * WEIGHTS["v"][:, 0].sum()).sum())(h)
    np.testing.assert_allclose(found.captured["inside"], h * inside, atol=1e-12)
