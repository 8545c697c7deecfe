"""Targets, explainers, composites and tables, and the examples in the docstrings."""

import doctest
import functools
import importlib
import inspect
import pkgutil
from importlib.util import find_spec

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import pytest

import jlrp
from jlrp import composites, rules

pytestmark = pytest.mark.relaxed
RNG = np.random.default_rng(3)
normal = lambda *shape: jnp.asarray(RNG.normal(size=shape))  # noqa: E731
W, X = normal(4, 3), normal(5, 4)
EXACT = composites.epsilon(0.0)
explained = functools.partial(jlrp.relevance, composite=EXACT)


def linear(w, x):
    return x @ w


def parts(x, classes):
    """Relevance of a linear map: x times the class's weights."""
    return x * W[:, classes].T


def assert_close(ours, expected):
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-12)


# Targets.


def test_default_target_is_the_best_class_of_each_row():
    best = jnp.argmax(X @ W, -1)
    assert len(set(best.tolist())) > 1
    assert_close(explained(linear, W, X), parts(X, best))
    assert_close(explained(linear, W, X[0]), parts(X[:1], best[:1])[0])


def test_default_target_of_a_number_an_example():
    assert_close(explained(lambda w, x: (x @ w)[:, 1], W, X), X * W[:, 1])
    assert_close(explained(lambda w, x: (x @ w)[1], W, X[0]), X[0] * W[:, 1])
    assert_close(explained(lambda w, x: (x @ w).sum(), W, X), X * W.sum(1))


def test_one_example_with_a_batch_axis():
    best = jnp.argmax(X[:1] @ W, -1)
    assert_close(explained(linear, W, X[:1]), parts(X[:1], best))


@pytest.mark.parametrize("index", [2, np.int64(2), np.asarray(2), jnp.asarray(2)])
def test_one_class_for_all(index):
    assert_close(explained(linear, W, X, index), parts(X, 2))
    assert_close(explained(linear, W, X[0], index), X[0] * W[:, 2])


@pytest.mark.parametrize("array", [np.asarray, jnp.asarray])
def test_a_class_an_example(array):
    labels = array([0, 1, 2, 1, 0])
    assert_close(explained(linear, W, X, labels), parts(X, labels))


def test_multipliers_of_every_output():
    seeds = normal(5, 3)
    assert_close(explained(linear, W, X, seeds), X * (seeds @ W.T))
    tree = {"a": seeds, "b": (jnp.ones(5),)}

    def fn(w, x):
        return {"a": x @ w, "b": ((x @ w)[:, 0],)}

    assert_close(explained(fn, W, X, tree), X * ((seeds @ W.T) + W[:, 0]))
    whole = jax.tree.map(lambda v: np.asarray(v, np.float32), tree)
    assert explained(fn, W, X, whole).dtype == X.dtype


def test_functions_of_the_output():
    contrast = explained(linear, W, X, lambda out: out[:, 0] - out[:, 1])
    assert_close(contrast, X * (W[:, 0] - W[:, 1]))
    one = explained(linear, W, X, lambda out: out[2, 1])
    assert_close(one, jnp.zeros_like(X).at[2].set(X[2] * W[:, 1]))
    deep = explained(
        lambda w, x: {"scores": (x @ w)[:, None]},
        W,
        X,
        lambda out: out["scores"][:, 0, 2],
    )
    assert_close(deep, X * W[:, 2])


def test_traced_targets():
    labels = jnp.asarray([0, 1, 2, 1, 0])
    jitted = jax.jit(lambda t: explained(linear, W, X, t))
    assert_close(jitted(labels), parts(X, labels))
    assert_close(jitted(labels - labels + 2), parts(X, 2))
    assert np.isnan(jitted(labels + 5)).any()  # a traced index cannot be refused
    every = jax.vmap(lambda t: explained(linear, W, X[0], t))(jnp.arange(3))
    assert_close(every, X[0] * W.T)


def test_seeds():
    shares = explained(linear, W, X, 0, seed="one")
    assert_close(shares.sum(-1), jnp.ones(5))
    scores = explained(linear, W, X, 0, seed="score")
    assert_close(scores, shares * (X @ W)[:, :1])
    seeds = normal(5, 3)
    start = explained(linear, W, X, seeds, seed="one")
    assert_close(start.sum(), seeds.sum())


# Explainers.


def test_an_explainer_gives_relevance_and_output():
    def fn(w, x):
        return {"logits": x @ w, "features": x}

    explain = jlrp.explain(fn, composite=EXACT, target=lambda out: out["logits"][:, 0])
    e = explain(W, X)
    assert isinstance(e, jlrp.Explanation)
    assert_close(e.output["logits"], X @ W)
    assert_close(e.output["features"], X)
    assert_close(e.relevance, X * W[:, 0])
    again = explain(W, X, lambda out: out["logits"][:, 1])  # overrides
    assert_close(again.relevance, X * W[:, 1])


def test_an_explanation_is_a_pytree():
    explain = jax.jit(jlrp.explain(linear, composite=EXACT))
    e = explain(W, X)
    doubled = jax.tree.map(lambda v: 2 * v, e)
    assert isinstance(doubled, jlrp.Explanation)
    assert_close(doubled.relevance, 2 * e.relevance)
    many = jax.vmap(explain, (None, 0))(W, X[:, None])
    assert many.relevance.shape == (5, 1, 4) and many.output.shape == (5, 1, 3)


def test_explain_equals_relevance():
    for composite in ("epsilon", composites.epsilon_plus()):
        e = jlrp.explain(linear, composite=composite, seed="one")(W, X, 1)
        expected = jlrp.relevance(linear, W, X, 1, composite=composite, seed="one")
        assert_close(e.relevance, expected)


# Composites.


def mlp(p, x):
    with jax.named_scope("encoder"), jax.named_scope("layer_0"):
        h = jnp.tanh(x @ p)
    with jax.named_scope("head"):
        return h @ p[:3]


def rules_of(composite, fn=mlp):
    return [row.rule for row in jlrp.inspect(fn, W, X, composite=composite).operations]


SELECTORS = {
    "kind": ("dense", [0, 2]),
    "primitive's name": ("dot_general", [0, 2]),
    "primitive": (jax.extend.core.primitives.dot_general_p, [0, 2]),
    "glob": ("encoder/*", [0, 1]),
    "exact scope": ("head", [2]),
    "first": ("first", [0]),
    "last": ("last", [2]),
    "all": ("*", [0, 1, 2]),
    "several": (("dense", "encoder*"), [0]),
    "predicate": (lambda op: op.inputs[0].shape[-1] == 4, [0]),
    "predicate of a scope": (lambda op: "layer_0" in op.scope, [0, 1]),
}


@pytest.mark.parametrize("name", SELECTORS)
def test_selectors(name):
    selector, chosen = SELECTORS[name]
    composite = jlrp.Composite([(selector, rules.Stop())], base="epsilon")
    found = rules_of(composite)
    assert [i for i, rule in enumerate(found) if rule == "Stop()"] == chosen


def test_the_first_match_wins_over_the_base():
    pairs = [("first", rules.ZPlus()), ("dense", rules.Gamma(0.5))]
    first, activation, last = rules_of(jlrp.Composite(pairs, base="epsilon"))
    assert first.startswith("ZPlus") and last.startswith("Gamma(gamma=0.5")
    assert activation == "Pass()"
    first, _, last = rules_of(jlrp.Composite(pairs[:1], base=composites.epsilon(0.5)))
    assert first.startswith("ZPlus") and last.startswith("Epsilon(epsilon=0.5")
    nested = jlrp.Composite(pairs[:1], base=jlrp.Composite(pairs[1:], base="epsilon"))
    assert rules_of(nested) == rules_of(jlrp.Composite(pairs, base="epsilon"))
    assert rules_of(nested)[2].startswith("Gamma")
    # A base's own pairs need not match: a composite is reused as a base.
    base = jlrp.Composite([("conv", rules.ZPlus())])
    assert rules_of(jlrp.Composite([("first", rules.ZPlus())], base=base))


def test_a_base_of_none_leaves_the_kinds_own_rules():
    assert rules_of(jlrp.Composite([], base=None)) == [
        "Zero(bias='absorb')",
        "Pass()",
        "Zero(bias='absorb')",
    ]


@pytest.mark.parametrize("name", composites.PRESETS)
def test_presets_work_on_an_mlp_by_name_and_as_objects(name):
    """Their pairs for convolutions and pooling match nothing, which is no error."""
    needs = {"low": -3.0, "high": 3.0} if name == "epsilon_gamma_box" else {}
    composite = composites.PRESETS[name](**needs)
    ours = jlrp.relevance(mlp, W, X, composite=composite)
    assert np.all(np.isfinite(ours)) and np.any(ours)
    if not needs:
        assert_close(ours, jlrp.relevance(mlp, W, X, composite=name))
    assert rules_of(composite)  # inspect agrees that all is covered


def test_auto_is_the_default():
    assert_close(
        jlrp.relevance(mlp, W, X), jlrp.relevance(mlp, W, X, composite="attnlrp")
    )


def test_auto_is_attnlrp_where_values_multiply_values():
    def fn(w, x):
        h = x @ w
        return (h * jax.nn.sigmoid(h[:, ::-1] @ jnp.eye(3))).sum(-1)

    found = jlrp.relevance(fn, W, X)
    assert_close(found, jlrp.relevance(fn, W, X, composite="attnlrp"))
    exact = jlrp.Composite([("dense", rules.ZPlus())])  # over auto
    rows = jlrp.inspect(fn, W, X, composite=exact).operations
    assert {row.rule for row in rows if row.kind == "dense"} == {repr(rules.ZPlus())}
    assert "Zero(bias='absorb')" in {row.rule for row in rows}


def test_rule_values_are_frozen_hashable_and_printable():
    values = [
        rules.Zero(),
        rules.Epsilon(1e-6),
        rules.Gamma(0.25),
        rules.GammaMontavon(0.25),
        rules.AlphaBeta(2.0, 1.0),
        rules.ZPlus(),
        rules.ZBox(-1.0, np.ones(3)),
        rules.WSquare(),
        rules.Flat(),
        rules.Pass(),
        rules.Gradient(),
        rules.NativeGradient(),
        rules.Stop(),
        rules.Uniform(),
        rules.Gate(),
        rules.Absolute(),
    ]
    assert len(set(values)) == len(values)
    for value in values:
        name = type(value).__name__
        assert repr(value).startswith(f"{name}(")
        for field in getattr(value, "__dataclass_fields__", {}):
            with pytest.raises((AttributeError, TypeError)):
                setattr(value, field, None)
    assert rules.ZBox(-1.0, np.ones(3)) == rules.ZBox(-1.0, np.ones(3))
    assert rules.ZBox(-1.0, np.ones(3)) != rules.ZBox(-1.0, np.zeros(3))
    assert rules.Gamma(0.5) != rules.Gamma(0.25)


# Composites that equal the gradient.


def deep_relu(p, x):
    h = jax.nn.relu(x @ p[0])
    h = h + jax.nn.relu(h @ p[1])
    return jnp.max(h, 1, keepdims=True) * jnp.ones((1, 3)) + h @ p[2]


def test_epsilon_zero_is_gradient_times_input_on_relu_networks():
    p = [normal(4, 6), normal(6, 6), normal(6, 3)]
    gradient = X * jax.grad(lambda x: deep_relu(p, x).max(-1).sum())(X)
    scale = float(jnp.abs(gradient).max())
    for composite in (EXACT, "gradient_input"):
        ours = jlrp.relevance(deep_relu, p, X, composite=composite)
        np.testing.assert_allclose(ours, gradient, rtol=0, atol=1e-12 * scale)


GRADIENT_INPUT = {
    "anything": lambda w, x: jax.nn.log_softmax(
        jnp.sort(jax.nn.gelu(x @ w + 0.3) * jnp.exp(jnp.sin(x[:, :3]))), -1
    ),
    "a norm": lambda w, x: (h := x @ w) / (1 + jnp.linalg.norm(h, axis=-1)[:, None]),
}


@pytest.mark.parametrize("name", GRADIENT_INPUT)
def test_gradient_input_is_exact_on(name):
    fn = GRADIENT_INPUT[name]
    ours = jlrp.relevance(fn, W, X, 1, composite="gradient_input")
    expected = X * jax.grad(lambda x: fn(W, x)[:, 1].sum())(X)
    np.testing.assert_allclose(ours, expected, rtol=1e-10, atol=1e-13)


# Tables.


def test_inspect_prints_a_table():
    report = jlrp.inspect(mlp, W, X, composite="epsilon")
    text = str(report)
    lines = text.splitlines()
    assert repr(report) == text and lines[0].startswith("3 operations")
    for word in ("kind", "scope", "rule", "dense", "encoder/layer_0", "head", "5x4"):
        assert word in text
    assert "Epsilon(epsilon=1e-06" in text and "3 covered" in lines[-2]
    assert lines[-1].startswith("activations: ")
    html = report._repr_html_()
    assert html.count("<tr>") == 4 and "<caption>" in html


def test_inspect_says_what_auto_took():
    report = jlrp.inspect(mlp, W, X)
    assert str(report).splitlines()[1] == report.why
    assert report.why == "auto: neither convolutions nor products: LRP-0"
    own = jlrp.Composite([("first", rules.ZPlus())])  # over auto
    assert jlrp.inspect(mlp, W, X, composite=own).why == report.why
    assert jlrp.inspect(mlp, W, X, composite="epsilon").why == ""


def test_html_is_escaped():
    def fn(w, x):
        with jax.named_scope("<b>&"):
            return x @ w

    html = jlrp.inspect(fn, W, X)._repr_html_()
    assert "&lt;b&gt;&amp;" in html and "<b>" not in html


def test_coverage_counts_equations():
    report = jlrp.inspect(mlp, W, X)
    coverage = report.coverage
    assert (coverage.covered, coverage.fallback, coverage.uncovered) == (3, 0, 0)
    assert [e.primitive for e in coverage.equations].count("dot_general") == 2
    assert all("test_api.py" in e.where for e in coverage.equations)
    assert len(coverage.equations) == 3
    taylor = jlrp.inspect(mlp, W, X, composite="gradient_input").coverage
    assert taylor.covered + taylor.fallback == 3 and taylor.fallback > 0


def test_operations_of_a_report():
    first, activation, last = jlrp.inspect(mlp, W, X).operations
    assert (first.kind, activation.kind, last.kind) == ("dense", "activation", "dense")
    assert first.scope == "encoder/layer_0" and last.scope == "head"
    assert first.input_shapes == ((5, 4),) and first.output_shape == (5, 3)
    assert "first" in first.facts and "last" in last.facts
    assert first.primitive == "dot_general" and first.status == "covered"


# The package.

MODULES = ["jlrp", *(m.name for m in pkgutil.walk_packages(jlrp.__path__, "jlrp."))]


@pytest.mark.parametrize("module", MODULES)
def test_docstring_examples(module):
    if module == "jlrp.integrations.torchax" and not find_spec("torchax"):
        pytest.skip("torchax is not installed")  # a plain import of it fails
    with jax.enable_x64(False):
        result = doctest.testmod(importlib.import_module(module))
    assert result.failed == 0


def test_public_functions_have_examples_and_names():
    for name in ("relevance", "explain", "inspect", "audit", "register_rule"):
        text = inspect.getdoc(getattr(jlrp, name))
        assert ">>>" in text and "Args:" in text and "Raises:" in text, name
    signature = inspect.signature(jlrp.relevance).parameters
    assert list(signature)[:4] == ["fn", "params", "x", "target"]
    assert signature["composite"].default == "auto"
