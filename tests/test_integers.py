"""Integers and booleans of x: as numbers they are their float twins, as codes what they
fetch; both add up."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jlrp

pytestmark = pytest.mark.relaxed
RNG = np.random.default_rng(5)


def normal(*shape):
    return jnp.asarray(RNG.normal(size=shape))


P = {
    "w": normal(4, 3),
    "v": normal(5, 3),
    "table": normal(12, 3),
    "kernel": normal(2, 1, 3),
    "whole": jnp.asarray(RNG.integers(-3, 4, (4, 3))),
    "remap": jnp.asarray(RNG.permutation(12)),
}
COUNTS = jnp.asarray(RNG.integers(0, 5, (2, 4)).astype(np.int32))
FLAGS = jnp.asarray([[True, False, True, True], [False, True, False, True]])
relu = jax.nn.relu

# Functions of x that compute the same with floats; `x` may be integers or their twins.
NUMBERS = {
    "x @ w": lambda p, x: x @ p["w"],
    "w.T @ x": lambda p, x: (p["w"].T @ x.T).T,
    "dot": lambda p, x: jnp.dot(x, p["w"]),
    "einsum": lambda p, x: jnp.einsum("bi,ij->bj", x, p["w"]),
    "mixed dot": lambda p, x: lax.dot_general(
        x, p["w"], (((1,), (0,)), ((), ())), preferred_element_type=p["w"].dtype
    ),
    "cast": lambda p, x: x.astype(p["w"].dtype) @ p["w"],
    "sum": lambda p, x: x.sum(1, keepdims=True) * p["w"][0],
    "cumsum": lambda p, x: jnp.cumsum(x, 1) @ p["w"],
    "affine": lambda p, x: (3 * x - 2) @ p["w"],
    "negated": lambda p, x: (5 - x) @ p["w"],
    "summed": lambda p, x: (x[:, :2] + x[:, 2:]) @ p["w"][:2],
    "product": lambda p, x: (x[:, :2] * x[:, 2:]) @ p["w"][:2],
    "squared": lambda p, x: (x**2) @ p["w"],
    "whole weights": lambda p, x: relu((x @ p["whole"]) * 0.5 + 20.0),
    "clipped": lambda p, x: jnp.clip(x, 1, 3) @ p["w"],
    "largest": lambda p, x: x.max(1, keepdims=True) * p["w"][0],
    "moved": lambda p, x: x.T.reshape(4, 2)[::-1].T @ p["w"],
    "chosen": lambda p, x: jnp.where(np.arange(4) > 1, x, 2 * x) @ p["w"],
    "convolution": lambda p, x: lax.conv_general_dilated(
        x[..., None].astype(p["w"].dtype),
        p["kernel"],
        (1,),
        "SAME",
        dimension_numbers=("NWC", "WIO", "NWC"),
    ).sum(1),
    "beside floats": lambda p, x: (
        jnp.concatenate([x * 1.0, p["w"].T[:2]], 1) @ jnp.concatenate([p["w"], p["w"]])
    ),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_are_their_float_twins(name):
    fn = NUMBERS[name]
    expected = jlrp.relevance(fn, P, COUNTS.astype(jnp.float64), 1, composite="attnlrp")
    for x in (COUNTS, COUNTS.astype(jnp.uint8) if name != "negated" else COUNTS):
        if x.dtype == jnp.uint8 and name in ("affine", "whole weights", "mixed dot"):
            continue  # these wrap around, or do not trace
        ours = jlrp.relevance(fn, P, x, 1, composite="attnlrp")
        assert np.any(ours) and jnp.issubdtype(ours.dtype, jnp.floating)
        np.testing.assert_allclose(ours, expected, atol=1e-12)


BOOLEANS = {
    "x @ w": lambda p, x: x @ p["w"],
    "einsum": lambda p, x: jnp.einsum("bi,ij->bj", x, p["w"]),
    "sum": lambda p, x: x.sum(1, keepdims=True) * p["w"][0],
    "cumsum": lambda p, x: jnp.cumsum(x, 1) @ p["w"],
    "column of a table": lambda p, x: (
        jnp.concatenate([x[:, :2] * 1.0, x[:, 2:]], 1) @ p["w"]
    ),
}


@pytest.mark.parametrize("name", BOOLEANS)
def test_booleans_that_are_counted(name):
    fn = BOOLEANS[name]
    twin = FLAGS.astype(jnp.float64)
    ours = jlrp.relevance(fn, P, FLAGS, 1, composite="attnlrp")
    expected = jlrp.relevance(fn, P, twin, 1, composite="attnlrp")
    np.testing.assert_allclose(ours, expected, atol=1e-12)


def test_booleans_that_mask_are_choices():
    def fn(p, x):
        h = x["h"] * x["mask"] + jnp.where(x["mask"], x["h"], 0.0)
        return h @ p["w"]

    h = normal(2, 4)
    ours = jlrp.relevance(fn, P, {"h": h, "mask": FLAGS}, 1, composite="attnlrp")
    expected = jlrp.relevance(
        lambda p, h: fn(p, {"h": h, "mask": FLAGS}), P, h, 1, composite="attnlrp"
    )
    assert not np.any(ours["mask"])
    np.testing.assert_allclose(ours["h"], expected, atol=1e-12)


# Codes.

IDS = jnp.asarray(RNG.integers(0, 4, (2, 4)).astype(np.int32))
LAST = lambda out: out[:, 1]  # noqa: E731


def fetched(p, rows):
    """The relevance of what is fetched, one number for each row: its own value."""
    return np.asarray(p["table"])[rows][..., 1]


CODES = {
    "indexed": (lambda p, i: p["table"][i].sum(1), lambda i: i),
    "shifted": (lambda p, i: p["table"][2 * i + 3].sum(1), lambda i: 2 * i + 3),
    "remainder": (lambda p, i: p["table"][i % 3].sum(1), lambda i: i % 3),
    "halves": (lambda p, i: p["table"][i // 2].sum(1), lambda i: i // 2),
    "bits": (lambda p, i: p["table"][(i << 1) ^ 1].sum(1), lambda i: (i << 1) ^ 1),
    "remapped": (
        lambda p, i: p["table"][p["remap"][i]].sum(1),
        lambda i: np.asarray(P["remap"])[i],
    ),
    "one-hot": (lambda p, i: (jax.nn.one_hot(i, 12) @ p["table"]).sum(1), lambda i: i),
    "integer one-hot": (
        lambda p, i: (jax.nn.one_hot(i, 12, dtype=jnp.int32) @ p["table"]).sum(1),
        lambda i: i,
    ),
    "compared": (
        lambda p, i: ((i[..., None] == jnp.arange(12)) @ p["table"]).sum(1),
        lambda i: i,
    ),
    "counted words": (
        lambda p, i: jax.nn.one_hot(i, 12, dtype=jnp.int8).sum(1) @ p["table"],
        lambda i: i,
    ),
    "through a float": (
        lambda p, i: p["table"][i.astype(jnp.float32).astype(jnp.int32)].sum(1),
        lambda i: i,
    ),
}


@pytest.mark.parametrize("name", CODES)
def test_codes_get_what_they_fetched(name):
    fn, rows = CODES[name]
    expected = fetched(P, rows(np.asarray(IDS)))
    ours = jlrp.relevance(fn, P, IDS, LAST, composite="attnlrp")
    np.testing.assert_allclose(ours, expected, atol=1e-6)
    ledger = jlrp.audit(fn, P, IDS, LAST, composite="attnlrp")
    assert ledger.unexplained < 1e-6


def test_several_integers_of_one_code_share_equally():
    fn = lambda p, i: p["table"][i[:, :2] * 3 + i[:, 2:]].sum(1)  # noqa: E731
    rows = np.asarray(IDS[:, :2] * 3 + IDS[:, 2:])
    ours = jlrp.relevance(fn, P, IDS, LAST, composite="attnlrp")
    share = fetched(P, rows) / 2
    np.testing.assert_allclose(ours, np.concatenate([share, share], 1), atol=1e-12)


def test_numbers_and_codes_add_up():
    number = lambda p, i: (3 * i) @ p["w"]  # noqa: E731
    code = lambda p, i: p["table"][i + 1].sum(1)  # noqa: E731
    both = lambda p, i: number(p, i) + code(p, i)  # noqa: E731
    of_each = [
        jlrp.relevance(fn, P, IDS, LAST, composite="attnlrp") for fn in (number, code)
    ]
    ours = jlrp.relevance(both, P, IDS, LAST, composite="attnlrp")
    np.testing.assert_allclose(ours, sum(of_each), atol=1e-12)


# Codes that came as floats.

FLOATS = {
    "cast": lambda p, x: p["table"][x.astype(jnp.int32)],
    "clipped": lambda p, x: p["table"][jnp.clip(x, 0, 11).astype(jnp.int32)],
    "moved": lambda p, x: p["table"][x.T[::-1].astype(jnp.int32)[::-1].T],
    "wrapped": lambda p, x: p["table"][jnp.where(x < 0, x + 12, x).astype(jnp.int32)],
    "narrowed": lambda p, x: p["table"][x.astype(jnp.float32).astype(jnp.int16)],
    "one-hot": lambda p, x: jax.nn.one_hot(x.astype(jnp.int32), 12) @ p["table"],
}


@pytest.mark.parametrize("name", FLOATS)
def test_floats_that_are_codes(name):
    fn = lambda p, x: FLOATS[name](p, x).sum(1)  # noqa: E731
    ours = jlrp.relevance(fn, P, IDS * 1.0, LAST, composite="attnlrp")
    np.testing.assert_allclose(ours, fetched(P, np.asarray(IDS)), atol=1e-6)


def test_a_column_of_codes_in_a_table_of_floats():
    def fn(p, x):
        return x[:, :3] @ p["w"][:3] + p["table"][x[:, 3].astype(jnp.int32)]

    x = jnp.concatenate([normal(2, 3), jnp.array([[3.0], [7.0]])], 1)
    ours = jlrp.relevance(fn, P, x, 1, composite="attnlrp")
    np.testing.assert_allclose(ours[:, :3], x[:, :3] * P["w"][:3, 1], atol=1e-12)
    np.testing.assert_allclose(ours[:, 3], fetched(P, [3, 7]), atol=1e-12)
    assert jlrp.audit(fn, P, x, 1, composite="attnlrp").total("stopped") == 0


DECOYS = {
    "binned": lambda p, x: p["table"][jnp.floor(x * 3).astype(jnp.int32) % 12],
    "scaled": lambda p, x: p["table"][(x * 3).astype(jnp.int32) % 12],
    "rounded": lambda p, x: p["table"][jnp.round(x).astype(jnp.int32) % 12],
    "hashed": lambda p, x: p["table"][(jnp.ceil(x).astype(jnp.int32) * 7919 ^ 31) % 12],
    "searched": lambda p, x: p["table"][jnp.searchsorted(jnp.arange(3.0), x)],
    "an activation": lambda p, x: p["table"][jnp.tanh(x).astype(jnp.int32)],
}


@pytest.mark.filterwarnings("ignore::jlrp.JlrpWarning")
@pytest.mark.parametrize("name", DECOYS)
def test_floats_that_are_no_codes(name):
    x = normal(2, 4)
    fn = lambda p, x: DECOYS[name](p, x).sum(1) + x @ p["w"]  # noqa: E731
    ours = jlrp.relevance(fn, P, x, LAST, composite="attnlrp")
    np.testing.assert_allclose(ours, x * P["w"][:, 1], atol=1e-12)
    taken = np.asarray(DECOYS[name](P, x))[..., 1].sum()
    ledger = jlrp.audit(fn, P, x, LAST, composite="attnlrp")
    np.testing.assert_allclose(ledger.total("bias"), taken, atol=1e-9)


def test_bilinear_sampling_is_no_code():
    def fn(p, x):
        low = jnp.floor(x)
        i = low.astype(jnp.int32) % 11
        a, b = p["table"][i], p["table"][i + 1]
        return (a + (b - a) * (x - low)[..., None]).sum(1)

    x = normal(2, 4)
    slope = jax.grad(lambda x: fn(P, x)[:, 1].sum())(x)
    ours = jlrp.relevance(fn, P, x, LAST, composite=jlrp.composites.epsilon(0.0))
    np.testing.assert_allclose(ours, x * slope, atol=1e-12)


def test_integers_that_a_loop_computes_with_are_refused():
    def fn(p, x):
        step = lambda c, xt: (c + xt @ p["w"], None)  # noqa: E731
        return lax.scan(step, jnp.zeros((2, 3)), x.reshape(2, 2, 4))[0]

    x = jnp.concatenate([COUNTS, COUNTS])
    with pytest.raises(jlrp.InputError, match="before the loop"):
        jlrp.relevance(fn, P, x, 1)


def test_integers_under_jit_vmap_and_other_composites():
    fn = lambda p, x: relu((2 * x) @ p["w"]) @ p["w"].T  # noqa: E731
    twin = COUNTS.astype(jnp.float64)
    for composite in ("epsilon_plus", "gradient_input", "auto"):
        expected = jlrp.relevance(fn, P, twin, 1, composite=composite)
        explain = lambda x, c=composite: jlrp.relevance(fn, P, x, 1, composite=c)  # noqa: E731
        np.testing.assert_allclose(jax.jit(explain)(COUNTS), expected, atol=1e-12)
    one = lambda x: jlrp.relevance(fn, P, x[None], 1, composite="attnlrp")[0]  # noqa: E731
    alone = jax.vmap(one)
    expected = jlrp.relevance(fn, P, twin, 1, composite="attnlrp")
    np.testing.assert_allclose(alone(COUNTS), expected, atol=1e-12)
