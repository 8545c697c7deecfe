"""What used to end in an error of Python or JAX: explained, or refused by name."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.scipy.sparse import linalg

import jlrp
from jlrp import plotting

pytestmark = pytest.mark.relaxed
RNG = np.random.default_rng(7)
W, X = jnp.asarray(RNG.normal(size=(4, 2))), jnp.asarray(RNG.normal(size=(2, 4)))
X3 = jnp.asarray(RNG.normal(size=(3, 4)))


def linear(w, x):
    return x @ w


# Targets.


@pytest.mark.parametrize(
    "target",
    [
        True,
        np.True_,
        np.array([True, False]),
        [True, False],
        jnp.array([True, False]),
        "cat",
        ["cat", "dog"],
        np.array(["cat", "dog"]),
        b"cat",
        {"a": "cat"},
        1j,
        [],
        {0, 1},
    ],
)
@pytest.mark.parametrize("call", [jlrp.relevance, jlrp.inspect, jlrp.audit])
def test_what_is_no_target(call, target):
    jlrp.relevance(linear, W, X, 1)  # is compiled: 1 == True
    with pytest.raises(jlrp.TargetError, match="target"):
        call(linear, W, X, target)


@pytest.mark.parametrize("labels", [[0, 1], (0, 1), [np.int64(0), 1], [0.5, -1.0]])
def test_a_list_of_numbers_is_an_array(labels):
    """Unless the output is such a list: then it has a multiplier for each."""
    floats = isinstance(labels[0], float)
    fn = (lambda w, x: (x @ w)[:, 0]) if floats else linear
    ours = jlrp.relevance(fn, W, X, labels, composite="gradient_input")
    theirs = jlrp.relevance(fn, W, X, jnp.array(labels), composite="gradient_input")
    np.testing.assert_allclose(ours, theirs, rtol=1e-12)


def test_a_list_like_the_output_is_its_multipliers():
    def fn(w, x):
        return [(x @ w)[0, 0], (x @ w)[1, 1]]

    ours = jlrp.relevance(fn, W, X, [2.0, -1.0], composite="gradient_input")
    np.testing.assert_allclose(ours, X * np.stack([2 * W[:, 0], -W[:, 1]]), rtol=1e-12)


def test_a_list_of_labels_out_of_range():
    for call in (jlrp.relevance, jlrp.audit):
        with pytest.raises(jlrp.TargetError, match="Target 2 is out of range"):
            call(linear, W, X, [0, 2])


# Functions, params, composites.


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: jlrp.relevance(linear, X3, W), r"params = float64\[3, 4\]"),
        (lambda: jlrp.relevance(linear, {"w": W}, X), "raised TypeError"),
        (lambda: jlrp.relevance(lambda w, x: w["b"], {"w": W}, X), "raised KeyError"),
        (lambda: jlrp.relevance(linear, None, X), "params = None"),
        (lambda: jlrp.relevance(W, linear, X), "fn is a ArrayImpl"),
        (lambda: jlrp.explain(W), "fn is a ArrayImpl"),
        (lambda: jlrp.audit(W, linear, X), "fn is a ArrayImpl"),
        (lambda: jlrp.inspect(W, linear, X), "fn is a ArrayImpl"),
        (lambda: jlrp.relevance(linear, {"act": jnp.tanh}, X), r"params\['act'\]"),
        (lambda: jlrp.relevance(linear, {"act": "relu"}, X), r"params\['act'\]"),
        (lambda: jlrp.relevance(linear, np.array(["a"]), X), "params is not an array"),
        (lambda: jlrp.relevance(lambda w, x: "out", W, X), "is a str"),
        (lambda: jlrp.relevance(lambda w, x: object(), W, X), "is a object"),
        (lambda: jlrp.relevance(lambda w, x: None, W, X), "pytree of 0 arrays"),
        (lambda: jlrp.relevance(linear, W, X, lambda out: "a"), "target function"),
        (lambda: jlrp.relevance(linear, W, X, lambda out: out[9, 9, 9]), "raised"),
        (lambda: jlrp.audit(linear, X3, W), "in this order"),
        (lambda: jlrp.inspect(linear, X3, W), "in this order"),
        (lambda: jlrp.explain(linear)(X3, W), "in this order"),
    ],
)
def test_refused_with_what_was_given(call, message):
    with pytest.raises(jlrp.JlrpError, match=message):
        call()


def test_a_module_as_the_function():
    nnx = pytest.importorskip("flax.nnx")
    model = nnx.Linear(4, 2, rngs=nnx.Rngs(0))
    with pytest.raises(jlrp.InputError, match="jlrp.integrations.flax.nnx"):
        jlrp.relevance(model, None, X)


@pytest.mark.parametrize(
    "composite, message",
    [
        (jlrp.composites.epsilon, r"call it, jlrp.composites.epsilon\(\)"),
        (jlrp.composites.attnlrp, r"call it, jlrp.composites.attnlrp\(\)"),
        (jlrp.rules.Epsilon(), r"jlrp.Composite\(\[\(\"dense\", Epsilon"),
        ([("dense", jlrp.rules.Zero())], r"jlrp.Composite\(pairs\)"),
        (
            jlrp.Composite([(lambda op: op.nothing, jlrp.rules.Zero())]),
            "raised AttributeError",
        ),
    ],
)
def test_what_is_no_composite(composite, message):
    with pytest.raises(jlrp.SelectorError, match=message):
        jlrp.relevance(linear, W, X, composite=composite)


# Programs.


SPD = W @ W.T + 2 * jnp.eye(4)
B = X[0]
SOLVED = np.asarray(B) * np.linalg.solve(np.asarray(SPD).T, np.ones(4))
SOLVERS = {
    "cg": linalg.cg,
    "gmres": linalg.gmres,
    "bicgstab": linalg.bicgstab,
    "of a function": lambda a, b, **k: linalg.gmres(lambda v: a @ v, b, **k),
    "under vmap": lambda a, b, **k: (
        jax.vmap(lambda b: linalg.cg(a, b, **k)[0])(b[None]),
        None,
    ),
}


@pytest.mark.parametrize("composite", ["epsilon", "gradient_input"])
@pytest.mark.parametrize("name", SOLVERS)
def test_iterative_solvers(name, composite):
    """A solution is linear in b; tolerances and start are not part of it."""

    def fn(a, b):
        return SOLVERS[name](a, b, tol=1e-12)[0].sum()

    ours = jlrp.relevance(fn, SPD, B, composite=composite)
    np.testing.assert_allclose(ours, SOLVED, rtol=1e-5)


@pytest.mark.parametrize("together", [lax.optimization_barrier, jax.device_put])
def test_parameters_handed_on_beside_x(together):
    def fn(w, x):
        x, w = together((x, w))
        return (x @ w)[:, 0]

    ours = jlrp.relevance(fn, W, X, composite=jlrp.composites.epsilon(0.0))
    np.testing.assert_allclose(ours, X * W[:, 0], rtol=1e-12)


SQUARE = 0.3 * jnp.asarray(RNG.normal(size=(2, 2)))
TWICE = {
    "square of a square": lambda x: (x @ x) @ (x @ x),
    "expm": jax.scipy.linalg.expm,
    "matrix power": lambda x: jnp.linalg.matrix_power(x, 5),
    "squared norm, used twice": lambda x: (x @ x.T) @ (x @ x.T).T,
}


@pytest.mark.parametrize("name", TWICE)
def test_a_value_times_itself(name):
    """Of degree n and uniform, each factor gets 1/n: Euler's x df/dx / n."""
    f = TWICE[name]
    ours = jlrp.relevance(
        lambda _, x: f(x), 0.0, SQUARE, lambda out: out.sum(), composite="attnlrp"
    )
    if name in ("square of a square", "squared norm, used twice"):
        gradient = jax.grad(lambda x: f(x).sum())(SQUARE)
        np.testing.assert_allclose(ours, SQUARE * gradient / 4, rtol=1e-9)
    lost = jnp.linalg.norm(f(SQUARE).sum() - ours.sum())
    assert lost < 1e-9 if name != "expm" else np.isfinite(lost)


@pytest.mark.parametrize(
    "scaled", [lambda n, s: lax.mul(n, 0.5), lambda n, s: n * s, lambda n, s: s * n]
)
def test_averages_scaled_by_a_scalar(scaled):
    """A scalar beside an array reads as the array that it stands for."""

    def average(scale):
        def fn(p, x):
            k, v = x @ p["k"], x @ p["v"]
            n, d = jnp.zeros(2), jnp.zeros(2)
            for t in range(2):
                e = jnp.exp(k[t])
                n, d = scale(n, p["s"]) + e * v[t], scale(d, p["s"]) + e
            return n / d

        return fn

    p = {"k": W, "v": W[::-1], "s": jnp.asarray(0.5)}
    full = average(lambda n, s: n * jnp.full(n.shape, 0.5))
    theirs = jlrp.relevance(full, p, X, 0)
    np.testing.assert_allclose(
        jlrp.relevance(average(scaled), p, X, 0), theirs, rtol=1e-12
    )


# The ledger.


V = jnp.array([0.5, -0.8, 0.3])
H = jnp.array([1.0, 2.0, -0.5])


def scanned(w, x):
    return lax.scan(lambda h, v: (jnp.tanh(h * v), None), x, w)[0]


def ran(w, x):
    return lax.fori_loop(0, 2, lambda i, h: jnp.tanh(h * w[0]), x)


def chosen(w, x):
    return lax.cond(x.sum() > 0, lambda h: jnp.tanh(h * w[0]), lambda h: h, x)


def whiled(w, x):
    step = lambda s: (s[0] + 1, jnp.tanh(s[1] * w[1]))  # noqa: E731
    return lax.while_loop(lambda s: s[0] < 2, step, (0, x))[1]


PARTS = {"scan": scanned, "fori": ran, "cond": chosen, "while": whiled}


def accounted(ledger):
    causes = {cause for row in ledger.rows for cause in row.causes}
    return ledger.relevance + sum(map(ledger.total, causes))


@pytest.mark.parametrize("second", PARTS)
@pytest.mark.parametrize("first", PARTS)
def test_the_ledger_of_two_loops_in_a_row(first, second):
    def fn(w, x):
        return PARTS[second](w, PARTS[first](w, x)).sum()

    ledger = jlrp.audit(fn, V, H, composite="attnlrp")
    assert ledger.unexplained < 1e-12
    assert accounted(ledger) == pytest.approx(ledger.seed)
    ours = jlrp.relevance(fn, V, H, composite="attnlrp").sum()
    assert ledger.relevance == pytest.approx(float(ours))


STARTS = {
    "zeros": lambda w, x: (x, jnp.zeros(3), jnp.zeros(3)),
    "parameters": lambda w, x: (x, w, 2 * w),
    "x beside a parameter": lambda w, x: (x, x, w),
}
LOOPS = {
    "scan": lambda step, start, n: lax.scan(
        lambda s, _: (step(s), None), start, None, length=n
    )[0],
    "fori": lambda step, start, n: lax.fori_loop(0, n, lambda i, s: step(s), start),
    "while": lambda step, start, n: lax.while_loop(
        lambda s: s[0] < n, lambda s: (s[0] + 1, step(s[1])), (0, start)
    )[1],
}


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("loop", LOOPS)
def test_the_ledger_of_carries_that_change_place(loop, start, n):
    def fn(w, x):
        def step(s):
            return jnp.tanh(s[0]) * w + s[2], s[0], s[1]

        return LOOPS[loop](step, STARTS[start](w, x), n)[0].sum()

    ledger = jlrp.audit(fn, V, H, composite="attnlrp")
    assert ledger.unexplained < 1e-12
    assert accounted(ledger) == pytest.approx(ledger.seed)


def test_a_second_audit_is_not_traced():
    traces = []

    def fn(w, x):
        traces.append(None)
        return jnp.tanh(x @ w)

    first = jlrp.audit(fn, W, X, 1)
    before = len(traces)
    again = jlrp.audit(fn, W, 2 * X, 1)
    assert len(traces) == before
    assert str(again) == str(jlrp.audit(fn, W, 2 * X, jnp.array([1, 1])))
    assert first.seed != again.seed
    jlrp.audit(fn, W, X, 0)  # another static target
    assert len(traces) > before


# What is printed.


def stack(ws, x):
    for w in ws:
        x = x + jax.nn.gelu(x @ w)
    return x[:, :3]


def test_coverage_is_a_few_lines():
    report = jlrp.inspect(stack, [np.ones((4, 4))] * 12, X)
    assert len(str(report.coverage)) < 500 and "0 uncovered" in str(report.coverage)
    composite = jlrp.Composite([("activation", jlrp.rules.Stop())])
    report = jlrp.inspect(stack, [np.ones((4, 4))] * 12, X, composite=composite)
    assert len(str(report.coverage).splitlines()) <= 10


def test_a_strip_of_tokens_wraps():
    words = ["a\n", "\n", "<b>", "", *(f"tok{i}" for i in range(300))]
    picture = plotting.tokens(words, np.linspace(-1, 1, 304))
    html = picture._repr_html_()
    assert html.count("</span> <span") >= 300 and html.count("<br>") == 2
    assert "\u23ce" in html and "&lt;b&gt;" in html
    assert "\n" not in picture.terminal
