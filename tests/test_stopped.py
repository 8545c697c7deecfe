"""Relevance that stops while another path goes on: a cause, and a warning."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jlrp

pytestmark = pytest.mark.relaxed
RNG = np.random.default_rng(12)
quiet = pytest.mark.filterwarnings("ignore::jlrp.JlrpWarning")


def normal(*shape):
    return jnp.asarray(RNG.normal(size=shape))


P = {"w": normal(4, 3), "v": normal(4, 3), "b": normal(3), "c": normal(4)}
X = normal(2, 4)
LRP_0 = jlrp.composites.epsilon(0.0)

# What ends a path, as a function of one value. All are floats again.
ENDS = {
    "round": lambda h: jnp.round(h * 4),
    "floor": jnp.floor,
    "sign": jnp.sign,
    "cast": lambda h: (h * 3).astype(jnp.int32).astype(h.dtype),
    "bytes": lambda h: (h * 3).astype(jnp.int8).astype(h.dtype),
    "compared": lambda h: (h > 0).astype(h.dtype),
    "bits": lambda h: lax.bitcast_convert_type(h, jnp.int64).astype(h.dtype) * 1e-19,
    "stopped": lambda h: lax.stop_gradient(h * 2),
}


def causes_of(ledger):
    return {cause: ledger.total(cause) for cause in jlrp.reports.CAUSES}


def balanced(ledger):
    total = ledger.relevance + sum(causes_of(ledger).values())
    assert ledger.unexplained < 1e-9
    np.testing.assert_allclose(total, ledger.seed, atol=1e-9)


@quiet
@pytest.mark.parametrize("name", ENDS)
def test_a_dead_path_is_booked_as_stopped(name):
    end = ENDS[name]

    def fn(p, x):
        return x @ p["w"] + end(x) @ p["v"] + p["b"]

    ledger = jlrp.audit(fn, P, X, 1, composite=LRP_0)
    balanced(ledger)
    np.testing.assert_allclose(ledger.total("bias"), 2 * P["b"][1])
    np.testing.assert_allclose(ledger.total("stopped"), (end(X) @ P["v"])[:, 1].sum())
    np.testing.assert_allclose(ledger.relevance, (X @ P["w"])[:, 1].sum())


def test_constants_that_x_chooses_stay_constants():
    """By a predicate, an index, a sort: a choice, which inspect lists."""
    chosen = {
        "predicate of select_n": lambda p, x: jnp.where(x.sum() > 0, p["b"], 2.0),
        "index of gather": lambda p, x: p["w"][jnp.argmax(x, -1)],
    }
    for line, choose in chosen.items():
        fn = lambda p, x, c=choose: x @ p["w"] + c(p, x)  # noqa: E731
        ledger = jlrp.audit(fn, P, X, 1, composite=LRP_0)
        balanced(ledger)
        taken = jnp.broadcast_to(choose(P, X), (2, 3))[:, 1].sum()
        np.testing.assert_allclose(ledger.total("bias"), taken)
        assert ledger.total("stopped") == 0
        assert any(c.startswith(line) for c in jlrp.inspect(fn, P, X, 1).choices)


# Generated programs: the oracle is the derivative by a zero that is added at a place.


class Generated:
    """A random program, and the derivative of its score at every place.

    ``places`` are (cause, number); called with ``probes``, these zeros are added there.
    """

    def __init__(self, seed):
        self.seed = seed
        self.params = np.random.default_rng(seed)

    def __call__(self, p, x, probes=None):
        rng = np.random.default_rng(self.seed)
        self.places, live = [], [x]
        weights = iter(p)

        def place(cause, number):
            self.places.append((cause, number))
            return number if probes is None else number + probes[len(self.places) - 1]

        def dead():
            end = list(ENDS.values())[rng.integers(len(ENDS))]
            return place("stopped", end(live[rng.integers(len(live))]))

        for _ in range(7):
            h = live[rng.integers(len(live))]
            kind = rng.integers(7)
            if kind == 0:
                h = h @ next(weights) + place("bias", next(weights)[0])
            elif kind == 1:
                h = jax.nn.relu(h)
            elif kind == 2:
                h = h + dead()
            elif kind == 3:
                h = jnp.concatenate([h, dead()], 1) @ jnp.tile(next(weights), (2, 1))
            elif kind == 4:
                h = jnp.where(np.arange(4) % 2 == 0, h, dead())
            elif kind == 5:
                h = h - live[rng.integers(len(live))] @ next(weights)
            else:
                h = dead() * 0.5 - h
            live.append(h)
        return sum(live[1:]).sum(-1)


@quiet
@pytest.mark.parametrize("seed", range(12))
def test_generated_programs_book_value_times_derivative_at_each_place(seed):
    fn = Generated(seed)
    params = [jnp.asarray(fn.params.normal(size=(4, 4))) for _ in range(16)]
    fn(params, X)
    places = list(fn.places)
    zeros = [jnp.zeros(jnp.shape(number)) for _, number in places]
    by_probe = jax.grad(lambda z: fn(params, X, z).sum())(zeros)
    expected = {"bias": 0.0, "stopped": 0.0}
    for (cause, number), slope in zip(places, by_probe, strict=True):
        expected[cause] += float(jnp.sum(number * slope))
    ledger = jlrp.audit(fn, params, X, composite=LRP_0)
    balanced(ledger)
    found = causes_of(ledger)
    np.testing.assert_allclose(found.pop("stopped"), expected["stopped"], atol=1e-9)
    np.testing.assert_allclose(found.pop("bias"), expected["bias"], atol=1e-9)
    assert max(map(abs, found.values())) < 1e-9
    slope = jax.grad(lambda x: fn(params, x).sum())(X)
    relevance = jlrp.relevance(fn, params, X, composite=LRP_0)
    np.testing.assert_allclose(relevance, X * slope, atol=1e-9)


@quiet
def test_rules_divide_what_they_absorb():
    """``split`` shares what the offset takes by linearity; Gradient takes it apart."""

    def fn(p, x):
        return (x @ p["w"] + jnp.round(x * 2) @ p["v"]).sum(-1)

    for rule, cause in (
        (jlrp.rules.Zero(), "stopped"),
        (jlrp.rules.Zero(bias="split"), "stopped"),
        (jlrp.rules.Gradient(), "stopped"),
    ):
        composite = jlrp.Composite([("scale", rule)], base=LRP_0)
        ledger = jlrp.audit(fn, P, X, composite=composite)
        balanced(ledger)
        others = {k: v for k, v in causes_of(ledger).items() if k != cause}
        assert ledger.total(cause) and max(map(abs, others.values())) < 1e-9


@quiet
def test_loops_and_branches():
    def looped(p, x):
        def step(h, _):
            return jnp.tanh(h @ p["w"] @ p["v"].T + jnp.floor(h)), None

        return lax.scan(step, x, None, length=3)[0] @ p["w"]

    def unrolled(p, x):
        for _ in range(3):
            x = jnp.tanh(x @ p["w"] @ p["v"].T + jnp.floor(x))
        return x @ p["w"]

    one, other = (jlrp.audit(f, P, X, 0, composite=LRP_0) for f in (looped, unrolled))
    balanced(one)
    np.testing.assert_allclose(one.total("stopped"), other.total("stopped"))

    def branched(p, x):
        return lax.cond(p["c"][0] > 9, lambda h: h, jnp.round, x) @ p["w"]

    ledger = jlrp.audit(branched, P, X, 0, composite=LRP_0)
    balanced(ledger)
    np.testing.assert_allclose(ledger.total("stopped"), ledger.seed)


# The warning.


def warned(call):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [w for w in caught if issubclass(w.category, jlrp.JlrpWarning)]


def round_beside(p, x):
    return x @ p["w"] + jnp.round(x) @ p["v"]


def test_the_warning_says_where_once_for_each_program_and_at_the_users_line():
    (warning,) = warned(lambda: jlrp.relevance(round_beside, P, X, 0))
    text = str(warning.message)
    for part in ("round at", "test_stopped.py", "added by add", "jlrp.audit", "ignore"):
        assert part in text
    assert warning.filename == __file__
    assert not warned(lambda: jlrp.relevance(round_beside, P, X + 1, 0))
    fresh = lambda p, x: round_beside(p, x)  # noqa: E731
    limited = lambda: jlrp.relevance(fresh, P, X, 0, memory_limit=10**8)  # noqa: E731
    assert len(warned(limited)) == 1
    assert not warned(lambda: jlrp.inspect(round_beside, P, X, 0))


def scanned(p, x):
    return lax.scan(lambda h, _: (h + jnp.sign(h), None), x, None, length=2)[0]


def flat(h):
    return jnp.round(h)


declared_zero = jax.custom_vjp(flat)
declared_zero.defvjp(lambda h: (flat(h), None), lambda _, g: (jnp.zeros_like(g),))
WARNS = {
    "round": lambda p, x: x + jnp.round(x),
    "a fraction of another": lambda p, x: x - jnp.floor(x[:, ::-1]),
    "in a scan": scanned,
    "compared": lambda p, x: x @ p["w"] + (x > 0).astype(x.dtype) @ p["v"],
    "in a gelu": lambda p, x: jax.nn.gelu(x + jnp.floor(x)),
    "a derivative declared zero": lambda p, x: x + declared_zero(x),
    "concatenated": lambda p, x: jnp.concatenate([x, jnp.sign(x)], 1),
    "in one branch": lambda p, x: lax.cond(x.sum() > 0, lambda h: h, jnp.round, x),
}


@pytest.mark.parametrize("name", WARNS)
def test_warns(name):
    fn = lambda p, x: WARNS[name](p, x).sum(-1)  # noqa: E731
    assert len(warned(lambda: jlrp.relevance(fn, P, X))) == 1
    assert jlrp.inspect(fn, P, X).stops


def roberta(p, ids):
    """Positions counted from the ids that are no padding."""
    mask = (ids != 0).astype(jnp.int32)
    positions = jnp.cumsum(mask, 1) * mask + 1
    return P["c"][ids] + P["c"][positions % 4]


def attention(p, x):
    """A padding mask made from x: rows of zeros are left out."""
    h = x[None] @ p["w"]
    padding = jnp.any(x != 0, -1)
    scores = h @ h.swapaxes(1, 2) + jnp.where(padding, 0.0, -1e9)
    added = (1.0 - padding.astype(x.dtype)) * -1e4
    return jax.nn.softmax(scores + added) @ h


IDS = np.array([[1, 2, 0], [3, 0, 0]])
SILENT = {
    "softmax": (lambda p, x: jax.nn.softmax(x) @ p["w"], X),
    "log_softmax": (lambda p, x: jax.nn.log_softmax(x) @ p["w"], X),
    "logsumexp": (lambda p, x: jax.nn.logsumexp(x, -1), X),
    "softmax by hand": (
        lambda p, x: (
            jnp.exp(x - lax.stop_gradient(x.max(-1, keepdims=True)))
            / jnp.exp(x - lax.stop_gradient(x.max(-1, keepdims=True))).sum(-1)[:, None]
        ),
        X,
    ),
    "padding": (attention, X),
    "RoBERTa's positions": (roberta, IDS),
    "stop_gradient": (lambda p, x: x + lax.stop_gradient(jnp.round(x) - x), X),
    "leaky relu": (lambda p, x: jnp.where(x > 0, x, 0.1 * x), X),
    "elu": (lambda p, x: jax.nn.elu(x), X),
    "hard swish": (lambda p, x: jax.nn.hard_swish(x), X),
    "softplus": (lambda p, x: jax.nn.softplus(x), X),
    "xlogy": (lambda p, x: jax.scipy.special.xlogy(x, x), X**2),
    "signed root": (lambda p, x: jnp.sign(x) * jnp.sqrt(jnp.abs(x)), X),
    "dropout": (
        lambda p, x: jnp.where(jax.random.bernoulli(jax.random.key(0), 0.5), x, 0),
        X,
    ),
    "masked mean": (
        lambda p, x: (x * (x > 0)).sum(-1) / (x > 0).sum(-1).astype(x.dtype),
        X,
    ),
    "top k": (lambda p, x: lax.top_k(x, 2)[0], X),
    "sorted": (lambda p, x: jnp.sort(x, -1) @ p["w"], X),
    "argmax of logits": (lambda p, x: jnp.where(x.argmax(-1) > 1, x[:, 0], x[:, 1]), X),
    "straight through, apart": (
        lambda p, x: jax.nn.one_hot(x.argmax(-1), 4) - lax.stop_gradient(x) + x,
        X,
    ),
    "fraction": (lambda p, x: x - jnp.floor(x), X),
    "corners of a grid": (
        lambda p, x: (jnp.floor(x) + 1 - x) * P["c"][0] + (x - jnp.floor(x)) * 2.0,
        X,
    ),
    "nearest row": (lambda p, x: x + P["w"].T[jnp.argmax(x, -1) % 3], X),
    "buckets": (lambda p, x: x + P["c"][(jnp.floor(x) % 4).astype(int)], X),
    "one of two": (lambda p, x: x + jnp.where(x > 0, 2.0, P["c"]), X),
    "clip": (lambda p, x: jnp.clip(x, -1, 1), X),
    "layer norm": (lambda p, x: (x - x.mean(-1, keepdims=True)) / x.std(), X),
}


@pytest.mark.parametrize("name", SILENT)
def test_says_nothing(name):
    fn, x = SILENT[name]
    whole = lambda p, x: fn(p, x).reshape(x.shape[0], -1).sum(-1)  # noqa: E731
    if name == "padding":
        whole = lambda p, x: fn(p, x).sum()  # noqa: E731
    assert not warned(lambda: jlrp.relevance(whole, P, x))


@quiet
def test_inspect_lists_stops_and_choices():
    def fn(p, x):
        h = jnp.where(x.sum() > 0, x @ p["w"], x @ p["v"])
        h = h + jnp.round(h)
        h = h[:, jnp.argsort(h[0])]
        more = lax.while_loop(lambda s: jnp.sum(s) < 5, lambda s: s * 2.0, h**2 + 1)
        return more.sum(-1)

    report = jlrp.inspect(fn, P, X, composite="attnlrp")
    (stop,) = report.stops
    assert "round at" in stop and "added by add" in stop
    for what in ("predicate of select_n", "index of gather", "trip count of while"):
        assert any(line.startswith(what) for line in report.choices)
    text = str(report)
    assert "relevance stops:" in text and "x chooses:" in text
