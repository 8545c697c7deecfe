"""Integer inputs get one number each: the sum over the features that they became."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jlrp

pytestmark = pytest.mark.relaxed
RNG = np.random.default_rng(3)
normal = lambda *shape: jnp.asarray(RNG.normal(size=shape))  # noqa: E731
P = {
    "table": normal(11, 6),
    "positions": normal(5, 6),
    "mix": normal(6, 6),
    "out": normal(6, 3),
}
IDS = jnp.asarray(RNG.integers(1, 11, (2, 5)).astype(np.int32))
SEGMENTS = IDS % 2


def body(p, h):
    h = h + p["positions"]
    weights = jax.nn.softmax(h @ p["mix"] @ h.swapaxes(1, 2) / 2.0)
    return (weights @ h).mean(1) @ p["out"]


LOOKUPS = {
    "indexed": lambda t, i: t[i],
    "take": lambda t, i: jnp.take(t, i, axis=0),
    "take, clipped": lambda t, i: jnp.take(t, jnp.clip(i, 0, 10), axis=0, mode="clip"),
    "one-hot": lambda t, i: jax.nn.one_hot(i, 11, dtype=t.dtype) @ t,
    "one-hot by hand": lambda t, i: (
        jnp.where(i[..., None] == jnp.arange(11), 1.0, 0.0) @ t
    ),
    "flat": lambda t, i: t[i.reshape(-1)].reshape(2, 5, 6),
    "looped": lambda t, i: jax.vmap(lambda row: t[row])(i),
    "one by one": lambda t, i: jax.vmap(jax.vmap(lambda one: t[one]))(i),
    "transposed": lambda t, i: t.T[:, i].transpose(1, 2, 0),
    "padding masked": lambda t, i: t[i] * (i > 0)[..., None],
    "table in parts": lambda t, i: jnp.where(
        (i < 4)[..., None], t[:4][jnp.minimum(i, 3)], t[4:][jnp.maximum(i - 4, 0)]
    ),
    "low precision": lambda t, i: t.astype(jnp.bfloat16)[i].astype(jnp.float32),
}


@pytest.mark.parametrize("composite", ["attnlrp", "cp_lrp", "epsilon_plus"])
@pytest.mark.parametrize("name", LOOKUPS)
def test_tokens_get_the_sum_over_their_embedding(name, composite):
    lookup = LOOKUPS[name]

    def from_ids(p, ids):
        return body(p, lookup(p["table"], ids))

    embedded = lookup(P["table"], IDS)
    expected = jlrp.relevance(body, P, embedded, composite=composite).sum(-1)
    ours = jlrp.relevance(from_ids, P, IDS, composite=composite)
    assert ours.shape == IDS.shape and jnp.issubdtype(ours.dtype, jnp.floating)
    scale = float(jnp.abs(expected).max())
    low = 1e-5 if "one-hot" in name and composite == "epsilon_plus" else 1e-10
    low = 1e-5 if name == "low precision" else low  # accumulated in float32
    np.testing.assert_allclose(ours, expected, rtol=0, atol=low * scale)
    ledger = jlrp.audit(from_ids, P, IDS, composite=composite)
    assert ledger.unexplained <= (1e-5 if name == "low precision" else 1e-10)


def test_a_network_of_ids_is_inspected_abstractly():
    ids = jax.ShapeDtypeStruct(IDS.shape, jnp.int32)
    report = jlrp.inspect(lambda p, i: body(p, p["table"][i]), P, ids)
    (row,) = (row for row in report.operations if row.kind == "embedding")
    assert row.rule == "SumFeatures()" and report.coverage.uncovered == 0


def test_several_integer_inputs_and_shifted_ids():
    """Segments, positions counted from the ids, decoder inputs shifted right."""

    def fn(p, x):
        ids = jnp.pad(x["ids"], ((0, 0), (1, 0)))[:, :-1]
        positions = jnp.cumsum(ids != 0, 1) % 5
        h = p["table"][ids] + p["positions"][x["segments"]] + p["mix"][positions]
        return body(p, h)

    def parts(p, h):
        return body(p, h["ids"] + h["segments"] + h["positions"])

    x = {"ids": IDS, "segments": SEGMENTS}
    shifted = jnp.pad(IDS, ((0, 0), (1, 0)))[:, :-1]
    h = {
        "ids": P["table"][shifted],
        "segments": P["positions"][SEGMENTS],
        "positions": P["mix"][jnp.cumsum(shifted != 0, 1) % 5],
    }
    expected = jlrp.relevance(parts, P, h, composite="attnlrp")
    ours = jlrp.relevance(fn, P, x, composite="attnlrp")
    tokens = expected["ids"].sum(-1)
    np.testing.assert_allclose(ours["ids"][:, :-1], tokens[:, 1:], atol=1e-12)
    assert not np.any(ours["ids"][:, -1])  # no position fetched it
    np.testing.assert_allclose(ours["segments"], expected["segments"].sum(-1))


def test_integer_pixels_and_mixed_leaves():
    pixels = jnp.asarray(RNG.integers(0, 255, (2, 6)).astype(np.uint8))

    def fn(p, x):
        return (x["pixels"].astype(p["mix"].dtype) / 255.0 + x["more"]) @ p["out"]

    more = normal(2, 6)
    ours = jlrp.relevance(fn, P, {"pixels": pixels, "more": more})
    floats = {"pixels": pixels / 255.0, "more": more}
    expected = jlrp.relevance(
        lambda p, x: (x["pixels"] + x["more"]) @ p["out"], P, floats
    )
    for name in floats:
        np.testing.assert_allclose(ours[name], expected[name], atol=1e-12)


MASKS = {
    "padding": lambda p, i: (i != 0).astype(p["out"].dtype)[..., None] * p["positions"],
    "length": lambda p, i: (i > 3).sum(-1, keepdims=True)[..., None] * p["positions"],
    "position": lambda p, i: p["positions"][jnp.cumsum(i != 0, 1) % 5],
    "stopped": lambda p, i: lax.stop_gradient(p["positions"])[
        jnp.argsort(jnp.argsort(i, axis=1), axis=1)
    ],
}


@pytest.mark.parametrize("name", MASKS)
def test_masks_and_positions_made_of_ids_are_no_embeddings(name):
    def fn(p, ids):
        return body(p, MASKS[name](p, ids) + jnp.zeros((2, 5, 6)))

    with pytest.raises(jlrp.NoRelevanceError):
        jlrp.relevance(fn, P, IDS, composite="attnlrp")


def test_ids_beside_the_explained_input_are_constants():
    def fn(p, x):
        return body(p, x["h"] + p["table"][x["ids"]])

    x = {"h": normal(2, 5, 6), "ids": IDS}
    ours = jlrp.relevance(fn, P, x, composite="attnlrp")
    with_constant = P | {"positions": P["positions"] + P["table"][IDS]}
    expected = jlrp.relevance(body, with_constant, x["h"], composite="attnlrp")
    np.testing.assert_allclose(ours["h"], expected, atol=1e-12)
    assert np.any(ours["ids"])


def test_jit_vmap_and_the_gradient_of_relevance_of_ids():
    def explain(p, ids):
        return jlrp.relevance(
            lambda p, i: body(p, p["table"][i]), p, ids, 1, composite="attnlrp"
        )

    expected = explain(P, IDS)
    np.testing.assert_allclose(jax.jit(explain)(P, IDS), expected, atol=1e-12)
    alone = jax.vmap(lambda ids: explain(P, ids[None])[0])
    np.testing.assert_allclose(alone(IDS), expected, atol=1e-12)
    slope = jax.grad(lambda p: jnp.sum(explain(p, IDS) ** 2))(P)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(slope))
    assert np.any(slope["table"])
