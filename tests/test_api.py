"""Targets, composites, reports, errors, and the examples in the docstrings."""

import doctest
import importlib
import pkgutil

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import pytest

import jlrp
from jlrp import rules

pytestmark = pytest.mark.relaxed
W = jax.random.normal(jax.random.key(0), (4, 3))
X = jax.random.normal(jax.random.key(1), (5, 4))


EXACT = jlrp.composites.epsilon(0.0)


def explained(fn, *args, **options):
    return jlrp.relevance(fn, *args, composite=EXACT, **options)


def linear(w, x):
    return x @ w


def parts(x, classes):
    return x * W[:, classes].T


def test_default_targets():
    best = jnp.argmax(X @ W, -1)
    np.testing.assert_allclose(explained(linear, W, X), parts(X, best), 1e-9)
    one = explained(linear, W, X[0])
    np.testing.assert_allclose(one, parts(X[:1], best[:1])[0], 1e-9)
    per_example = explained(lambda w, x: (x @ w)[:, 1], W, X)
    np.testing.assert_allclose(per_example, X * W[:, 1], 1e-9)
    scalar = explained(lambda w, x: (x @ w)[1], W, X[0])
    np.testing.assert_allclose(scalar, X[0] * W[:, 1], 1e-9)


def test_targets_by_index_function_and_multiplier():
    labels = jnp.asarray([0, 1, 2, 1, 0])
    np.testing.assert_allclose(explained(linear, W, X, labels), parts(X, labels), 1e-9)
    np.testing.assert_allclose(explained(linear, W, X, 2), X * W[:, 2], 1e-9)
    contrast = explained(linear, W, X, lambda out: out[:, 0] - out[:, 1])
    weights = jnp.broadcast_to(jnp.asarray([1.0, -1.0, 0.0]), (5, 3))
    seeded = explained(linear, W, X, weights)
    np.testing.assert_allclose(contrast, seeded, atol=1e-9)
    jitted = jax.jit(lambda t: explained(linear, W, X, t))
    np.testing.assert_allclose(jitted(labels), parts(X, labels), 1e-9)
    assert np.isnan(jitted(labels + 5)).any()  # a traced index cannot be refused


def test_seed_one_is_the_share_of_each_input():
    exact = jlrp.composites.epsilon(0.0)
    shares = jlrp.relevance(linear, W, X, 0, composite=exact, seed="one")
    np.testing.assert_allclose(shares.sum(-1), 1.0, rtol=1e-9)
    e = jlrp.explain(linear, target=0)(W, X)
    np.testing.assert_allclose(e.output, X @ W)


def test_inspect_is_static():
    shapes = jax.tree.map(lambda v: jax.ShapeDtypeStruct(v.shape, v.dtype), (W, X))
    report = jlrp.inspect(linear, *shapes)
    assert report.coverage.covered == 1 and "dense" in str(report)
    assert (report.coverage.fallback, report.coverage.uncovered) == (0, 0)


def test_selectors():
    def fn(p, x):
        with jax.named_scope("encoder"):
            h = jnp.tanh(x @ p)
        with jax.named_scope("head"):
            return h @ p[:3]

    def assigned(selector):
        composite = jlrp.Composite([(selector, rules.ZPlus())], base="epsilon")
        operations = jlrp.inspect(fn, W, X, composite=composite).operations
        return [row.rule.startswith("ZPlus") for row in operations]

    both, first, last = [True, False, True], [True, False, False], [False, False, True]
    assert assigned("dense") == assigned("dot_general") == both
    assert assigned("first") == assigned(("dense", "encoder*")) == first
    assert assigned("last") == assigned("head*") == last
    assert assigned(lambda op: op.inputs[0].shape[-1] == 4) == first
    assert assigned(jax.extend.core.primitives.dot_general_p) == both


def unroll(w, x):
    return jax.lax.scan(lambda c, _: (jnp.tanh(c), None), x, None, length=2)[0].sum(-1)


def cholesky(w, x):
    return jnp.linalg.cholesky(x[:4].T @ x[:4] + jnp.eye(4)).sum()


@pytest.mark.parametrize(
    "error, call, words",
    [
        ("UnsupportedPrimitive", lambda: jlrp.relevance(cholesky, W, X),
         ["cholesky", "test_api.py", "register_rule", 'fallback="gradient"']),
        ("UnsupportedPrimitive", lambda: jlrp.relevance(unroll, W, X),
         ["scan", "test_api.py", "Unroll", 'fallback="stop"']),
        ("Target", lambda: jlrp.relevance(linear, W, X, 3),
         ["Target 3", "3 classes"]),
        ("Target", lambda: jlrp.relevance(linear, W, X, np.array([0, 1, -1, 0, 0])),
         ["Target -1"]),
        ("Target", lambda: jlrp.relevance(linear, W, X, np.array([0, 1])),
         ["(2,)", "(5,)"]),
        ("Target", lambda: jlrp.relevance(lambda w, x: (x @ w)[None], W, X),
         ["(1, 5, 3)", "target=lambda"]),
        ("Target", lambda: jlrp.relevance(lambda w, x: jnp.argmax(x @ w, -1), W, X),
         ["int", "floating-point"]),
        ("Target", lambda: jlrp.relevance(lambda w, x: x @ w + 0j, W, X),
         ["complex"]),
        ("NoRelevance", lambda: jlrp.relevance(
            lambda w, x: (jax.lax.stop_gradient(x) @ w), W, X),
         ["stop_gradient", "does not depend"]),
        ("Selector", lambda: jlrp.relevance(
            linear, W, X, composite=jlrp.Composite([("conv", rules.ZPlus())])),
         ["'conv'", "dense"]),
        ("Selector", lambda: jlrp.relevance(
            linear, W, X, composite=jlrp.Composite([("dense", rules.Pass())])),
         ["Pass()", "dense", "elementwise"]),
        ("Selector", lambda: jlrp.relevance(linear, W, X, composite="epsilon_plu"),
         ["epsilon_plus"]),
        ("Input", lambda: jlrp.relevance(linear, W, X, seed="two"), ["seed", "score"]),
        ("Input", lambda: jlrp.relevance(linear, {"f": len}, X), ["params['f']"]),
        ("Input", lambda: jlrp.relevance(lambda w, i: w[i], W, jnp.arange(2)),
         ["int", "embedding"]),
    ],
)  # fmt: skip
def test_errors_say_what_where_and_the_way_out(error, call, words):
    with pytest.raises(getattr(jlrp, f"{error}Error")) as raised:
        call()
    for word in words:
        assert word in str(raised.value)
    assert isinstance(raised.value, jlrp.JlrpError)


def test_fallbacks_are_counted():
    for fallback in ("gradient", "stop"):
        report = jlrp.inspect(cholesky, W, X, fallback=fallback)
        assert report.coverage.fallback == 1 and report.coverage.uncovered == 0
        ledger = jlrp.audit(cholesky, W, X, fallback=fallback)
        assert ledger.unexplained < 1e-10 * abs(ledger.seed)
    assert jlrp.inspect(cholesky, W, X).coverage.uncovered == 1
    assert not np.any(jlrp.relevance(cholesky, W, X, fallback="stop"))


def test_a_rule_for_a_new_elementwise_primitive_is_one_line():
    cube = jax.extend.core.Primitive("my_cube")
    cube.def_impl(lambda x: x**3)
    cube.def_abstract_eval(lambda x: x)
    jax.interpreters.ad.defjvp(cube, lambda t, x: 3 * x**2 * t)
    jax.interpreters.mlir.register_lowering(
        cube, jax.interpreters.mlir.lower_fun(lambda x: x**3, multiple_results=False)
    )

    def fn(w, x):
        return cube.bind(x @ w)

    with pytest.raises(jlrp.UnsupportedPrimitiveError, match="my_cube"):
        jlrp.relevance(fn, W, X)
    jlrp.register_rule(cube, rules.Pass())
    exact = jlrp.composites.epsilon(0.0)
    ours = jlrp.relevance(fn, W, X, 0, composite=exact)
    np.testing.assert_allclose(ours, X * W[:, 0] * (X @ W)[:, :1] ** 2, rtol=1e-9)
    jlrp.unregister_rule(cube)


MODULES = [m.name for m in pkgutil.walk_packages(jlrp.__path__, "jlrp.")]


@pytest.mark.parametrize("module", ["jlrp", *MODULES])
def test_docstring_examples(module):
    with jax.enable_x64(False):
        result = doctest.testmod(importlib.import_module(module))
    assert result.failed == 0
