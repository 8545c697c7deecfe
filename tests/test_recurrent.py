"""Recurrences and their parallel forms have one relevance: that of a slow replica.

A replica is the plain parallel form as a function whose gradient is the rule: what is
held constant does not follow x, each factor of a product hands on its share.
"""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

import jlrp
from jlrp import composites
from jlrp.ops.kinds.product import ProductOp
from jlrp.options import Options
from jlrp.request import Request

pytestmark = pytest.mark.relaxed  # formulas as papers write them
T, D, N, CHUNK = 6, 4, 3, 2
stop = lax.stop_gradient


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape) / shape[0] ** 0.5


P = {
    "in": normal(0, D, 2 * D),
    "step": normal(1, D, D),
    "one_step": normal(2, D, 1),
    "b": normal(3, D, N),
    "c": normal(4, D, N),
    "decay": jnp.abs(normal(5, D, N)) + 0.3,
    "skip": normal(6, D),
    "k": normal(7, D, D),
    "v": normal(8, D, D),
    "r": normal(9, D, D),
    "w": jnp.abs(normal(10, D)) + 0.2,
    "u": normal(11, D),
    "mix": jax.random.uniform(jax.random.key(12), (3, D)),
    "out": normal(13, D, D),
    "cell": normal(14, 2 * D, 4 * D),
}
X = normal(15, T, D)


def loop(step, start, slices):
    return lax.scan(step, start, slices)[1]


def unrolled(step, start, slices):
    found = []
    for t in range(T):
        start, y = step(start, jax.tree.map(lambda a: a[t], slices))  # noqa: B023
        found.append(y)
    return jnp.stack(found)


def target(out):
    return out @ jnp.arange(1.0, D + 1)


def explained(fn, composite):
    return jlrp.relevance(fn, P, X, target, composite=composite)


def by_replica(replica):
    return X * jax.grad(lambda x: target(replica(P, x)))(X)


def shared(value, share):
    """A factor that hands on a share of what it gets."""
    return share * value + stop((1 - share) * value)


def passing(f, x):
    """An activation through which relevance passes."""
    return x * stop(f(x) / x)


def assert_same(found, expected):
    assert jnp.abs(found - expected).max() < 1e-12 * jnp.abs(expected).max()


# Selective state-space models: linear in the signal.


def selective(p, x, recurrence, silu=jax.nn.silu, gate=lambda y, z: y * z, hold=None):
    hold = hold or (lambda a: a)
    u, z = jnp.split(x @ p["in"], 2, -1)
    u = silu(u)
    y = recurrence(p, u, hold) + u * p["skip"]
    return (gate(y, silu(z)) @ p["out"])[-1]


def mamba(p, u, hold, run):
    step = hold(jax.nn.softplus(u @ p["step"]))
    b, c = hold(u @ p["b"]), hold(u @ p["c"])
    decay = jnp.exp(-step[:, :, None] * p["decay"])
    added = (step * u)[:, :, None] * b[:, None]
    return run(decay, added, c)


def by_steps(run):
    def states(decay, added, c):
        def step(h, slices):
            decay, added, c = slices
            h = decay * h + added
            return h, h @ c

        return run(step, jnp.zeros((D, N)), (decay, added, c))

    return states


def associative(decay, added, c):
    join = lambda a, b: (a[0] * b[0], b[0] * a[1] + b[1])  # noqa: E731
    h = lax.associative_scan(join, (decay, added))[1]
    return jnp.einsum("tdn,tn->td", h, c)


def mamba_2(p, u, hold, run):
    step = hold(jax.nn.softplus(u @ p["one_step"])[:, 0])
    b, c = hold(u @ p["b"]), hold(u @ p["c"])
    return run(-step * p["decay"][0, 0], u * step[:, None], b, c)


def sequential(run):
    def states(a, x, b, c):
        def step(h, slices):
            a, x, b, c = slices
            h = jnp.exp(a) * h + x[:, None] * b
            return h, h @ c

        return run(step, jnp.zeros((D, N)), (a, x, b, c))

    return states


def decays(a):
    """exp of the sum of a between two times."""
    total = jnp.cumsum(a)
    sums = total[:, None] - total
    causal = jnp.tril(jnp.ones((len(a), len(a)), bool))
    return jnp.exp(jnp.where(causal, sums, -jnp.inf))


def dual(a, x, b, c):
    return jnp.einsum("tn,sn,ts,sd->td", c, b, decays(a), x)


def chunked(a, x, b, c):
    a, x, b, c = (v.reshape(T // CHUNK, CHUNK, *v.shape[1:]) for v in (a, x, b, c))
    total = jnp.cumsum(a, -1)
    within = jnp.einsum("kln,ksn,kls,ksd->kld", c, b, jax.vmap(decays)(a), x)
    states = jnp.einsum("kln,kl,kld->kdn", b, jnp.exp(total[:, -1:] - total), x)
    states = jnp.concatenate([jnp.zeros_like(states[:1]), states])
    between = decays(jnp.pad(total[:, -1], (1, 0)))
    states = jnp.einsum("zk,kdn->zdn", between, states)[:-1]
    before = jnp.einsum("kln,kdn,kl->kld", c, states, jnp.exp(total))
    return (within + before).reshape(T, D)


MAMBA = [by_steps(loop), by_steps(unrolled), associative]
UNSEEN = sequential(unrolled)  # neither a loop nor two maps of the signal at once
MAMBA_2 = [sequential(loop), UNSEEN, dual, chunked]


def with_runs(model, run, **more):
    recurrence = lambda p, u, hold: model(p, u, hold, run)  # noqa: E731
    return lambda p, x: selective(p, x, recurrence, **more)


@pytest.mark.parametrize(
    ("model", "runs"), [(mamba, MAMBA), (mamba_2, MAMBA_2)], ids=["mamba", "mamba_2"]
)
def test_selective_models_in_every_spelling(model, runs):
    silu = lambda x: passing(jax.nn.silu, x)  # noqa: E731
    gate = lambda y, z: shared(y, 0.5) * shared(z, 0.5)  # noqa: E731
    replica = with_runs(model, runs[1], silu=silu, gate=gate, hold=stop)
    expected = by_replica(replica)
    for run in runs:
        fn = with_runs(model, run)
        assert_same(explained(fn, "mamba_lrp"), expected)
        if run is not UNSEEN:
            assert_same(explained(fn, "auto"), expected)


def test_mamba_under_cp_lrp_in_every_spelling():
    first, *others = (explained(with_runs(mamba, run), "cp_lrp") for run in MAMBA)
    for other in others:
        assert_same(other, first)


# LSTM and GRU.


def lstm(p, state, x):
    h, c = state
    i, f, g, o = jnp.split(jnp.concatenate([x, h]) @ p["cell"], 4)
    sigmoid = jax.nn.sigmoid
    c = sigmoid(f) * c + sigmoid(i) * jnp.tanh(g)
    h = sigmoid(o) * jnp.tanh(c)
    return (h, c), h


def gru(p, state, x):
    (h,) = state
    both = jnp.concatenate([x, h])
    z, r = jnp.split(jax.nn.sigmoid(both @ p["cell"][:, : 2 * D]), 2)
    w, u = p["cell"][:D, 2 * D : 3 * D], p["cell"][D:, 2 * D : 3 * D]
    n = jnp.tanh(x @ w + r * (h @ u))
    h = (1 - z) * n + z * h
    return (h,), h


def cells(cell, n_state, run):
    start = (jnp.zeros(D),) * n_state
    return lambda p, x: run(lambda s, x: cell(p, s, x), start, x)[-1] @ p["out"]


@pytest.mark.parametrize("composite", ["mamba_lrp", "cp_lrp"])
@pytest.mark.parametrize(("cell", "n_state"), [(lstm, 2), (gru, 1)])
def test_the_signal_among_factors_is_the_same_in_a_loop(cell, n_state, composite):
    """What the iteration before has made of a value is another value."""
    runs = loop, unrolled
    assert_same(*(explained(cells(cell, n_state, run), composite) for run in runs))


# What is no selective recurrence: auto stays with attnlrp. Of LSTM, GRU and highway
# networks, whose gates it holds constant on what they carry, see test_auto.py.


def self_gated(p, x):
    """Squeeze-and-excitation, twice: one learned map of the signal multiplies it."""
    x = jnp.tanh(x @ p["k"])
    x = x * jax.nn.sigmoid(x.mean(0) @ p["v"])
    return (x * jax.nn.sigmoid(x @ p["r"]))[-1] @ p["out"]


def highway(p, x):
    def step(h, x):
        gate = jax.nn.sigmoid(h @ p["k"])
        return gate * jnp.tanh(h @ p["v"]) + (1 - gate) * h + x, h

    return loop(step, jnp.zeros(D), x)[-1] @ p["out"]


def linear_attention(p, x):
    """Three factors, learned maps of what is no factor itself."""
    x = jnp.tanh(x @ p["v"])
    q, k, v = x @ p["b"], x @ p["c"], x @ p["k"]
    return (q @ (k.T @ v))[-1] @ p["out"]


def decaying(p, x):
    """A recurrence whose coefficient and input are maps of x, as in a minimal GRU."""

    def step(h, slices):
        z, g = slices
        h = (1 - z) * h + z * g
        return h, h

    z, g = jax.nn.sigmoid(x @ p["k"]), x @ p["v"]
    return loop(step, jnp.zeros(D), (z, g))[-1] @ p["out"]


def of_time(p, x):
    """A state-space model whose step size does not follow its signal."""
    decay = jnp.exp(-p["decay"])

    def step(h, u):
        h = decay * h + u[:, None] * p["c"]
        return h, h.sum(-1) * jax.nn.silu(u)

    return loop(step, jnp.zeros((D, N)), x @ p["k"])[-1] @ p["out"]


def conditioned(p, x):
    """Scales that follow from another input than what they multiply."""
    a, b = x[: T // 2] @ p["k"], x[T // 2 :]
    return ((a * jax.nn.sigmoid(b @ p["v"])) * jnp.tanh(b @ p["r"]))[-1] @ p["out"]


@pytest.mark.parametrize(
    "fn",
    [
        *(self_gated, linear_attention, decaying, of_time, conditioned),
        pytest.param(with_runs(mamba_2, UNSEEN), id="mamba_2 without a loop"),
    ],
)
def test_auto_takes_nothing_else_for_a_selective_recurrence(fn):
    assert_same(explained(fn, "auto"), explained(fn, "attnlrp"))


def test_auto_can_be_told_not_to_look_for_one():
    fn, plain = with_runs(mamba, MAMBA[0]), jlrp.Composite([], find_signals=False)
    expected = explained(fn, "attnlrp")
    assert_same(explained(fn, plain), expected)
    gap = explained(fn, "auto") - expected
    assert jnp.abs(gap).max() > 0.01 * jnp.abs(expected).max()


# Averages: softmax attention, summed step by step.


def mixed(p, x):
    before = jnp.pad(x, ((1, 0), (0, 0)))[:-1]
    k, v, r = (x * m + before * (1 - m) for m in p["mix"])
    return k @ p["k"], v @ p["v"], jax.nn.sigmoid(r @ p["r"])


def as_attention(p, x, share=lambda r, a, v: (r, a, v)):
    k, v, r = mixed(p, x)
    t = jnp.arange(T)
    back = (t[:, None] - t)[:, :, None]
    scores = k - (back - 1) * p["w"]
    scores = jnp.where(back == 0, k + p["u"], scores)
    weights = jax.nn.softmax(jnp.where(back < 0, -jnp.inf, scores), 1)
    r, weights, v = share(r, weights, v)
    return ((jnp.einsum("tsd,sd->td", weights, v) * r) @ p["out"])[-1]


def rwkv(run):
    """Numerator and denominator as the state."""

    def fn(p, x):
        def step(state, slices):
            n, d = state
            k, v, r = slices
            now = jnp.exp(p["u"] + k)
            y = (n + now * v) / (d + now) * r
            later = jnp.exp(-p["w"]) * n + jnp.exp(k) * v
            return (later, jnp.exp(-p["w"]) * d + jnp.exp(k)), y

        zero = jnp.zeros(D)
        return (run(step, (zero, zero), mixed(p, x)) @ p["out"])[-1]

    return fn


def stable_rwkv(run):
    """With a running maximum, by which both are rescaled."""

    def fn(p, x):
        def step(state, slices):
            n, d, m = state
            k, v, r = slices
            top = jnp.maximum(m, k + p["u"])
            old, now = jnp.exp(m - top), jnp.exp(k + p["u"] - top)
            y = (old * n + now * v) / (old * d + now) * r
            top = jnp.maximum(m - p["w"], k)
            old, now = jnp.exp(m - p["w"] - top), jnp.exp(k - top)
            return (old * n + now * v, old * d + now, top), y

        zero = jnp.zeros(D)
        start = (zero, zero, zero - 1e38)
        return (run(step, start, mixed(p, x)) @ p["out"])[-1]

    return fn


SHARES = {
    "auto": lambda *factors: [shared(f, 1 / 3) for f in factors],
    "attnlrp": lambda *factors: [shared(f, 1 / 3) for f in factors],
    "mamba_lrp": lambda *factors: [shared(f, 1 / 3) for f in factors],
    "cp_lrp": lambda r, a, v: (stop(r), stop(a), v),
}
both = pytest.mark.parametrize("composite", SHARES)
RWKVS = [
    as_attention,
    *(f(run) for f in (rwkv, stable_rwkv) for run in (loop, unrolled)),
]


@both
def test_rwkv_in_every_spelling(composite):
    expected = by_replica(lambda p, x: as_attention(p, x, SHARES[composite]))
    for fn in RWKVS:
        assert_same(explained(fn, composite), expected)


def projected(p, x):
    return x @ p["k"], x @ p["v"], x @ p["r"]


def attention(p, x, share=lambda a, v: (a, v)):
    q, k, v = projected(p, x)
    q, k = share(q, k)
    weights, v = share(jax.nn.softmax(q @ k.T), v)
    return (weights @ v @ p["out"])[-1]


def summed_by_chunks(run, shift=lambda m: m):
    """Attention over chunks of keys, with a running maximum: flash attention."""

    def fn(p, x):
        q, *others = projected(p, x)

        def step(state, slices):
            total, weight, m = state
            k, v = slices
            scores = q @ k.T
            top = shift(jnp.maximum(m, scores.max(-1)))
            old, now = jnp.exp(m - top), jnp.exp(scores - top[:, None])
            total = total * old[:, None] + now @ v
            return (total, weight * old + now.sum(-1), top), None

        start = (jnp.zeros((T, D)), jnp.zeros(T), jnp.full(T, -1e30))
        chunks = [v.reshape(T // CHUNK, CHUNK, D) for v in others]
        total, weight, _ = run(step, start, chunks)
        return (total / weight[:, None] @ p["out"])[-1]

    return fn


def final(step, start, slices):
    return lax.scan(step, start, slices)[0]


def final_unrolled(step, start, slices):
    for t in range(T // CHUNK):
        start, _ = step(start, [v[t] for v in slices])
    return start


def written_out(p, x):
    """exp(s) @ v over the sum of exp(s), broadcast with an epsilon."""
    q, k, v = projected(p, x)
    weights = jnp.exp(q @ k.T)
    total = jnp.broadcast_to(weights.sum(1)[:, None] + 1e-30, (T, D))
    return (weights @ v / total @ p["out"])[-1]


ATTENTIONS = [
    attention,
    written_out,
    summed_by_chunks(final),
    summed_by_chunks(final_unrolled),
    summed_by_chunks(final, stop),
]
OF_ATTENTION = {
    "attnlrp": lambda *factors: [shared(f, 0.5) for f in factors],
    "cp_lrp": lambda a, v: (stop(a), v),
}


@pytest.mark.parametrize("composite", OF_ATTENTION)
def test_attention_summed_by_chunks(composite):
    expected = by_replica(lambda p, x: attention(p, x, OF_ATTENTION[composite]))
    for fn in ATTENTIONS:
        assert_same(explained(fn, composite), expected)


@both
@pytest.mark.parametrize("fn", [RWKVS[3], ATTENTIONS[2]], ids=["rwkv", "chunks"])
def test_the_ledger_of_an_average_closes(fn, composite):
    ledger = jlrp.audit(fn, P, X, target, composite=composite)
    assert ledger.unexplained < 1e-12 * abs(ledger.seed)
    causes = ("bias", "stabilizer", "taylor", "constants", "blocked")
    absorbed = sum(map(ledger.total, causes))
    assert jnp.abs(ledger.seed - ledger.relevance - absorbed) < 1e-12


# What looks like an average and is none: a quotient of two factors, half to each.


def quotient(numerator, denominator):
    def fn(p, x):
        q, k, v = projected(p, x)
        w = jnp.exp(q)
        return (numerator(w, k, v, q) / denominator(w, k, v, q)).sum(0)

    return fn


def recurrent(n_decay=1.0, d_decay=1.0, start=0.0, weigh=jnp.exp, extra=0.0):
    def fn(p, x):
        def step(state, slices):
            n, d = state
            k, v = slices
            w = weigh(k)
            n, d = n_decay * p["w"] * n + w * v, d_decay * p["w"] * d + w
            return (n, d), None

        k, v, _ = projected(p, x)
        n, d = final(step, (jnp.full(D, start), jnp.full(D, start)), (k, v))
        return n / d + extra * d if extra else n / d

    return fn


NO_AVERAGES = {
    "another's weights": quotient(
        lambda w, k, v, q: w * v, lambda w, k, v, q: jnp.cosh(k * 2)
    ),
    "one sum has more": quotient(
        lambda w, k, v, q: w * v, lambda w, k, v, q: w + jnp.exp(k)
    ),
    "a sum along the other axis": quotient(
        lambda w, k, v, q: w[:D] @ v[:D], lambda w, k, v, q: w[:D].sum(0)[:, None]
    ),
    "a sum that is not broadcast to its rows": quotient(
        lambda w, k, v, q: w[:D] @ v[:D], lambda w, k, v, q: w[:D].sum(1)[None]
    ),
    "different decays": recurrent(0.5, 0.25),
    "a start that is weighted": recurrent(start=1.0),
    "weights of a loop that are no exponentials": recurrent(weigh=jnp.square),
    "a total that is also an output": recurrent(extra=1.0),
}


@pytest.mark.parametrize("case", NO_AVERAGES)
def test_decoys_of_averages(case):
    (shares,) = shares_of_quotients(NO_AVERAGES[case])
    assert min(shares) > 0 and sum(shares) == 1


@both
def test_a_quotient_by_an_exponential_is_a_product(composite):
    """Of another's weights: no average, and no quotient either."""
    divided = quotient(lambda w, k, v, q: w * v, lambda w, k, v, q: jnp.exp(q * 2))
    times = quotient(lambda w, k, v, q: w * v * jnp.exp(-2 * q), lambda *_: 1.0)
    assert shares_of_quotients(divided) == []
    a, b = (
        jlrp.relevance(fn, P, X, target, composite=composite) for fn in (divided, times)
    )
    assert jnp.max(jnp.abs(a - b)) < 1e-12 * jnp.max(jnp.abs(b))


def test_what_the_decoys_are_near_to():
    assert shares_of_quotients(recurrent(0.5, 0.5)) == [(1.0, -0.5)]
    near = quotient(
        lambda w, k, v, q: w[:D] @ v[:D], lambda w, k, v, q: w[:D].sum(1)[:, None]
    )
    # Without a loop, a late division is the early one: a softmax times values.
    assert shares_of_quotients(near) == []
    rows = jlrp.inspect(near, P, X, target, composite="attnlrp").operations
    assert "softmax" in [row.kind for row in rows]


def shares_of_quotients(fn):
    request = Request(fn, P, X, Options(composite=composites.attnlrp(), target=target))
    steps = request.plan().steps
    return [
        step.operation.product.uniform
        for step in steps
        if isinstance(step.operation, ProductOp) and step.operation.divides
    ]
