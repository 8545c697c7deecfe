"""Attention over a node's neighbours: a softmax whose sum is scattered and gathered."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlrp

pytestmark = pytest.mark.relaxed

RNG = np.random.default_rng(0)
normal = lambda *shape: jnp.asarray(RNG.normal(size=shape))  # noqa: E731
NODES, FEATURES, HEADS = 5, 6, 2
SOURCES = jnp.array([0, 1, 2, 3, 4, 1, 0, 2])
TARGETS = jnp.array([0, 0, 1, 1, 1, 3, 4, 4])  # nothing arrives at node 2
P = {"w": normal(FEATURES, HEADS, 4), "a": normal(2, HEADS, 4), "out": normal(4, 3)}
X = normal(NODES, FEATURES)
COMPOSITES = (
    "attnlrp",
    "cp_lrp",
    "gradient_input",
    jlrp.composites.epsilon(0.0),  # a stabilizer would see different sums
)


def layer(weights):
    """Graph attention (arXiv 1710.10903), with the weights of edges as an argument."""

    def model(p, x):
        h = jnp.einsum("nf,fhd->nhd", x, p["w"])
        left, right = (jnp.einsum("nhd,hd->nh", h, a) for a in p["a"])
        scores = jax.nn.leaky_relu(left[SOURCES] + right[TARGETS], 0.2)
        messages = weights(scores)[..., None] * h[SOURCES]
        return jax.ops.segment_sum(messages, TARGETS, NODES).mean(1) @ p["out"]

    return model


def shifted(scores, guarded=False, stabilizer=0.0):
    largest = jax.ops.segment_max(scores, TARGETS, NODES)
    if guarded:
        largest = jnp.where(jnp.isfinite(largest), largest, 0.0)
    exps = jnp.exp(scores - largest[TARGETS])
    total = jax.ops.segment_sum(exps, TARGETS, NODES) + stabilizer
    return exps / total[TARGETS]


def plain(scores):
    exps = jnp.exp(scores)
    return exps / jax.ops.segment_sum(exps, TARGETS, NODES)[TARGETS]


def by_the_largest_of_all(scores):
    exps = jnp.exp(scores - jax.lax.stop_gradient(scores.max()))
    total = jnp.zeros((NODES, HEADS)).at[TARGETS].add(exps)
    return exps * (1.0 / jnp.take(total, TARGETS, axis=0))


def heads_first(scores):
    exps = jnp.exp(scores.T)
    total = jnp.zeros((HEADS, NODES)).at[:, TARGETS].add(exps)
    return (exps / total[:, TARGETS]).T


def dense(p, x):
    """The same over all pairs of nodes, those without an edge masked."""
    h = jnp.einsum("nf,fhd->nhd", x, p["w"])
    left, right = (jnp.einsum("nhd,hd->nh", h, a) for a in p["a"])
    scores = jax.nn.leaky_relu(left[None] + right[:, None], 0.2)
    edges = jnp.zeros((NODES, NODES), bool).at[TARGETS, SOURCES].set(True)
    weights = jax.nn.softmax(jnp.where(edges[..., None], scores, -1e30), 1)
    return jnp.einsum("ijh,jhd->ihd", weights, h).mean(1) @ p["out"]


SPELLINGS = {
    "shifted": shifted,
    "guarded": lambda scores: shifted(scores, True),
    "stabilised": lambda scores: shifted(scores, True, 1e-16),
    "plain": plain,
    "shifted by the largest of all": by_the_largest_of_all,
    "heads first": heads_first,
}


@pytest.mark.parametrize("weights", SPELLINGS.values(), ids=SPELLINGS)
def test_a_softmax_of_segments_is_a_softmax(weights):
    model, seed = layer(weights), jnp.asarray(RNG.normal(size=(NODES, 3)))
    seed = seed.at[2].set(0.0)  # a node without neighbours: nothing, or their mean
    reached = jnp.array([0, 1, 3, 4])
    y, expected = (fn(P, X)[reached] for fn in (model, dense))
    np.testing.assert_allclose(y, expected, atol=1e-12)
    for composite in COMPOSITES:
        ours, theirs = (
            jlrp.relevance(fn, P, X, seed, composite=composite) for fn in (model, dense)
        )
        np.testing.assert_allclose(ours, theirs, atol=1e-9 * np.abs(theirs).max())
    report = jlrp.inspect(model, P, X, seed, composite="attnlrp")
    kinds = [op.kind for op in report.operations]
    assert kinds.count("softmax") == 1 and report.coverage.fallback == 0


def test_relevance_is_conserved_over_segments():
    seed = jnp.ones((NODES, 3))
    ledger = jlrp.audit(layer(shifted), P, X, seed, composite="attnlrp")
    assert ledger.unexplained <= 1e-10 * max(abs(row.arrived) for row in ledger.rows)


def other_rows(scores):
    exps = jnp.exp(scores)
    return exps / jax.ops.segment_sum(exps, TARGETS, NODES)[TARGETS[::-1]]


def other_exponentials(scores):
    total = jax.ops.segment_sum(jnp.exp(2.0 * scores), TARGETS, NODES)
    return jnp.exp(scores) / total[TARGETS]


def not_from_zero(scores):
    exps = jnp.exp(scores)
    total = jnp.ones((NODES, HEADS)).at[TARGETS].add(exps)
    return exps / total[TARGETS]


def no_exponentials(scores):
    squares = scores**2
    return squares / jax.ops.segment_sum(squares, TARGETS, NODES)[TARGETS]


@pytest.mark.parametrize(
    "weights", [other_rows, other_exponentials, not_from_zero, no_exponentials]
)
def test_what_is_no_softmax_of_segments(weights):
    seed = jnp.ones((NODES, 3))
    report = jlrp.inspect(layer(weights), P, X, seed, composite="attnlrp")
    assert "softmax" not in [op.kind for op in report.operations]


def test_a_view_that_is_traced_twice_is_one():
    """torchax replays it for a signal and for its norm."""

    def norm(p, x):
        signal, same = x[:, :4], x[:, :4]
        return signal / jnp.sqrt((same * same).sum(-1, keepdims=True)) @ p["out"]

    def decoy(p, x):
        signal, other = x[:, :4], x[:, 1:5]
        return signal / jnp.sqrt((other * other).sum(-1, keepdims=True)) @ p["out"]

    kinds = [
        [op.kind for op in jlrp.inspect(fn, P, X, 0, composite="attnlrp").operations]
        for fn in (norm, decoy)
    ]
    assert "norm" in kinds[0] and "norm" not in kinds[1]
