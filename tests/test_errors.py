"""Every error says what is wrong, where, and the way out."""

import dataclasses
import functools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, mlir

import jlrp
from jlrp import rules

pytestmark = pytest.mark.relaxed
RNG = np.random.default_rng(4)
W, X = jnp.asarray(RNG.normal(size=(4, 3))), jnp.asarray(RNG.normal(size=(5, 4)))
relevance, shapes = jlrp.relevance, jax.ShapeDtypeStruct


def linear(w, x):
    return x @ w


def raised(error, call, *words):
    with pytest.raises(error) as caught:
        call()
    assert isinstance(caught.value, jlrp.JlrpError)
    message = str(caught.value)
    for word in words:
        assert word in message, message
    assert message.rstrip()[-1] in ".)", message  # a sentence
    return message


def line_of(text):
    """Where in this file a text stands, as messages say it."""
    lines = Path(__file__).read_text().splitlines()
    (number,) = (i for i, line in enumerate(lines, 1) if f"{text}  # here" in line)
    return f"test_errors.py:{number}"


def unknown_primitive():
    """One of a user's own, that jlrp has no rule for."""
    primitive = Primitive("whitened")
    root = jnp.linalg.cholesky
    primitive.def_impl(root)
    primitive.def_abstract_eval(lambda square: square)
    lowered = mlir.lower_fun(root, multiple_results=False)
    mlir.register_lowering(primitive, lowered)
    ad.primitive_jvps[primitive] = lambda x, t: jax.jvp(root, x, t)
    return primitive


WHITENED = unknown_primitive()


def decomposed(w, x):
    with jax.named_scope("encoder"), jax.named_scope("whiten"):
        square = x[:4].T @ x[:4] + jnp.eye(4)
        root = WHITENED.bind(square)  # here
    return root @ w


def looped(w, x):
    with jax.named_scope("steps"):
        x = lax.fori_loop(0, 2, lambda i, c: jnp.tanh(c), x)  # here
    return x @ w


def branched(w, x):
    x = lax.cond(w[0, 0] > 0, jnp.tanh, jnp.sin, x)  # here
    return x @ w


# Primitives without a rule.


def test_unknown_primitive():
    raised(
        jlrp.UnsupportedPrimitiveError,
        lambda: relevance(decomposed, W, X, target=0),
        "`whitened`",
        "encoder/whiten",
        line_of("WHITENED.bind(square)"),
        "jlrp.register_rule(primitive, rule)",
        'fallback="gradient"',
        'fallback="stop"',
    )


@pytest.mark.parametrize("fn", [looped, branched])
def test_loops_and_branches_are_explained(fn):
    report = jlrp.inspect(fn, W, X)
    assert report.coverage.uncovered == report.coverage.fallback == 0
    assert np.all(np.isfinite(relevance(fn, W, X)))


def test_a_primitive_without_a_rule_inside_a_loop():
    def fn(w, x):
        step = lambda i, c: c + WHITENED.bind(c.T @ c + jnp.eye(4)).sum()  # noqa: E731
        return lax.fori_loop(0, 2, step, x) @ w

    raised(jlrp.UnsupportedPrimitiveError, lambda: relevance(fn, W, X, 0), "`whitened`")
    assert jlrp.inspect(fn, W, X, 0).coverage.uncovered >= 1


def test_loops_off_the_paths_of_relevance_are_no_error():
    def fn(w, x):
        w = lax.fori_loop(0, 2, lambda i, c: c * 2.0, w)
        return x @ w

    exact = jlrp.composites.epsilon(0.0)
    ours = relevance(fn, W, X, 0, composite=exact)
    np.testing.assert_allclose(ours, X * 4 * W[:, 0], rtol=1e-12)


def test_while_loops_are_explained():
    def fn(w, x):
        return lax.while_loop(lambda c: c.sum() < 9, lambda c: c + 1.0, x) @ w

    assert np.all(np.isfinite(relevance(fn, W, X)))


@pytest.mark.parametrize("fallback", ["gradient", "stop"])
def test_fallbacks_are_used_and_counted(fallback):
    report = jlrp.inspect(decomposed, W, X, 0, fallback=fallback)
    assert (report.coverage.fallback, report.coverage.uncovered) == (1, 0)
    assert "[fallback]" in str(report)
    assert "1 by fallback" in str(report)
    ledger = jlrp.audit(decomposed, W, X, 0, fallback=fallback)
    scale = max(abs(row.arrived) for row in ledger.rows)
    assert ledger.unexplained <= 1e-10 * scale
    ours = relevance(decomposed, W, X, 0, fallback=fallback)
    assert np.any(ours) == (fallback == "gradient")
    if fallback == "stop":
        assert ledger.total("blocked") == pytest.approx(ledger.rows[-1].arrived)


def test_inspect_reports_a_missing_rule_and_raises_nothing():
    report = jlrp.inspect(decomposed, W, X, 0)
    assert report.coverage.uncovered == 1
    (missing,) = (e for e in report.coverage.equations if e.status == "uncovered")
    assert missing.primitive == "whitened" and "encoder/whiten" in missing.where
    assert "[uncovered]" in str(report) and "1 uncovered" in str(report)


def test_unknown_fallback():
    message = raised(
        jlrp.InputError,
        lambda: relevance(linear, W, X, fallback="gradients"),
        "'gradients'",
        "stop",
    )
    assert "gradient'" in message


# Targets.


@pytest.mark.parametrize(
    "target", [3, -1, np.asarray([0, 1, 3, 0, 0]), jnp.full(5, -1)]
)
def test_target_out_of_range(target):
    bad = int(np.asarray(target).reshape(-1)[np.argmax(np.abs(np.asarray(target)))])
    raised(
        jlrp.TargetError,
        lambda: relevance(linear, W, X, target),
        f"Target {bad}",
        "3 classes",
        "0 to 2",
    )
    raised(jlrp.TargetError, lambda: jlrp.inspect(linear, W, X, target), "3 classes")
    raised(jlrp.TargetError, lambda: jlrp.audit(linear, W, X, target), "3 classes")


@pytest.mark.parametrize(
    "fn, target, words",
    [
        (linear, np.asarray([0, 1]), ["(2,)", "(5, 3)", "(5,)"]),
        (linear, np.zeros((5, 1), int), ["(5, 1)", "(5, 3)"]),
        (linear, np.ones((3, 5)), ["(5, 3)", "(3, 5)", "multiplier"]),
        (lambda w, x: (x @ w)[None], None, ["(1, 5, 3)", "target=lambda"]),
        (lambda w, x: (x @ w).sum(), 0, ["scalar", "leave the target out"]),
        (lambda w, x: (x @ w, x), None, ["2 arrays", "target=lambda"]),
        (linear, lambda out: out, ["(5, 3)", "one number per example"]),
        (lambda w, x: (x @ w)[None], 1, ["(1, 5, 3)", "target=lambda"]),
    ],
)
def test_targets_that_do_not_fit(fn, target, words):
    raised(jlrp.TargetError, lambda: relevance(fn, W, X, target), *words)


def test_a_list_of_labels_is_named_as_such():
    """Or it is taken as an array of labels."""
    try:
        relevance(linear, W, X, [0, 1, 2, 1, 0])
    except jlrp.TargetError as error:
        assert "floats" not in str(error) and "array" in str(error)


@pytest.mark.parametrize(
    "fn, words",
    [
        (lambda w, x: jnp.argmax(x @ w, -1), ["int", "floating-point"]),
        (lambda w, x: x @ w > 0, ["bool", "floating-point"]),
        (lambda w, x: x @ w + 0j, ["complex", "floating-point"]),
    ],
)
def test_outputs_that_are_no_scores(fn, words):
    raised(jlrp.TargetError, lambda: relevance(fn, W, X), *words)


# Inputs.


@pytest.mark.parametrize(
    "params, x, words",
    [
        ({"f": len}, X, ["params['f']", "builtin_function_or_method"]),
        (W, {"a": X, "b": "text"}, ["x['b']", "str"]),
        (W, {}, ["x has no arrays"]),
        (W, X.astype(complex), ["complex", "real"]),
        (W, [X, X.astype(complex)], ["x[1]", "complex"]),
        (W, None, ["x has no arrays"]),
    ],
)
def test_inputs_that_cannot_be_explained(params, x, words):
    raised(jlrp.InputError, lambda: relevance(lambda p, x: x, params, x), *words)


def test_shapes_that_do_not_fit_keep_jaxs_own_error():
    with pytest.raises((TypeError, ValueError), match="dot_general|shape"):
        relevance(linear, W, X[:, :3])


@pytest.mark.parametrize(
    "fn, words",
    [
        (lambda w, x: lax.stop_gradient(x) @ w, ["stop_gradient", "constant"]),
        (lambda w, x: (x > 0).astype(w.dtype) @ w, ["gt", "booleans"]),
        (lambda w, x: jnp.round(x) @ w, ["round", "derivative is zero"]),
        (lambda w, x: w[:3], ["fn(params, x)"]),
    ],
)
def test_outputs_that_do_not_depend_on_x(fn, words):
    words = ["does not depend on x", *words]
    raised(jlrp.NoRelevanceError, lambda: relevance(fn, W, X), *words)
    if len(words) > 2:
        message = raised(jlrp.NoRelevanceError, lambda: jlrp.audit(fn, W, X))
        assert "test_errors.py" in message


def test_swapped_arguments():
    raised(
        jlrp.NoRelevanceError,
        lambda: relevance(lambda x, w: jnp.sum(x), W, X),
        "argument order",
    )


@pytest.mark.parametrize("seed", ["two", None, 1.0])
def test_unknown_seed(seed):
    call = functools.partial(relevance, linear, W, X, seed=seed)
    raised(jlrp.InputError, call, repr(seed), "score", "one")


# Composites.


def scoped(w, x):
    with jax.named_scope("encoder"):
        h = jnp.tanh(x @ w)
    with jax.named_scope("head"):
        return h @ w[:3]


@pytest.mark.parametrize(
    "selector, words",
    [
        ("conv", ["'conv'", "dense", "activation", "encoder", "head"]),
        ("encoded", ["'encoded'", "Nearest", "'encoder'"]),
        ("dens", ["'dens'", "Nearest", "'dense'"]),
        ("encoder/layer_*", ["Scopes here", "encoder"]),
        (jax.extend.core.primitives.sin_p, ["sin"]),
        (lambda op: False, ["matches no operation"]),
        (("dense", "activation"), ["matches no operation"]),
    ],
)
def test_selectors_that_match_nothing(selector, words):
    composite = jlrp.Composite([(selector, rules.Stop())], base="epsilon")
    for call in (relevance, jlrp.inspect, jlrp.audit):
        raised(
            jlrp.SelectorError,
            functools.partial(call, scoped, W, X, composite=composite),
            "matches no operation",
            *words,
        )


@pytest.mark.parametrize(
    "selector, rule, words",
    [
        ("dense", rules.Pass(), ["Pass()", "dense", "elementwise"]),
        ("activation", rules.ZPlus(), ["ZPlus", "activation", "no kernel"]),
        ("activation", rules.Epsilon(), ["Epsilon", "activation", "not linear"]),
        ("dense", rules.Uniform(), ["Uniform", "not a product"]),
        ("dense", rules.Absolute(), ["Absolute", "neither a sum nor a product"]),
        ("activation", rules.Flat(), ["Flat", "no kernel"]),
        ("first", rules.ZBox(np.zeros(7), 1.0), ["low", "(7,)", "(5, 4)"]),
        ("dense", rules.Follow(), ["Follow", "dense"]),
    ],
)
def test_rules_that_do_not_fit(selector, rule, words):
    composite = jlrp.Composite([(selector, rule)], base="epsilon")
    raised(
        jlrp.SelectorError,
        lambda: relevance(scoped, W, X, composite=composite),
        "test_errors.py",
        "narrower selector",
        *words,
    )


@pytest.mark.parametrize(
    "composite, words",
    [
        ("epsilon_plu", ["'epsilon_plu'", "epsilon_plus", "Did you mean"]),
        ("lrp", ["The presets are", "gradient_input"]),
        ("epsilon_gamma_box", ["bounds", "epsilon_gamma_box(low="]),
        (rules.Epsilon(), ["Epsilon", "presets"]),
        (None, ["None", "presets"]),
    ],
)
def test_composites_that_do_not_exist(composite, words):
    raised(
        jlrp.SelectorError,
        lambda: relevance(linear, W, X, composite=composite),
        *words,
    )


def test_a_class_in_place_of_a_rule():
    raised(
        jlrp.SelectorError,
        lambda: jlrp.Composite([("dense", rules.ZPlus)]),
        "ZPlus",
        "instance",
    )


def test_a_base_that_does_not_exist():
    raised(jlrp.SelectorError, lambda: jlrp.Composite([], base="auto2"), "'auto2'")


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: rules.AlphaBeta(2.0, 2.0), ["alpha - beta = 1", "2.0"]),
        (lambda: rules.AlphaBeta(0.5, -0.5), ["non-negative"]),
        (lambda: rules.Epsilon(-1.0), ["negative", "-1.0"]),
        (lambda: rules.ZPlus(stabilizer=-1e-3), ["negative"]),
        (lambda: rules.Epsilon(bias="drop"), ["'drop'", "absorb", "ignore"]),
        (lambda: rules.ZBox(1.0, -1.0), ["low <= high"]),
        (lambda: rules.Flat(-1.0), ["negative"]),
    ],
)
def test_parameters_of_rules(make, words):
    with pytest.raises(ValueError) as caught:
        make()
    for word in words:
        assert word in str(caught.value)


# Rules of one's own.


def test_a_rule_that_is_none():
    raised(
        jlrp.InputError,
        lambda: jlrp.register_rule(jax.extend.core.primitives.sin_p, "pass"),
        "'pass'",
        "jlrp.rules",
    )


def test_a_rule_that_returns_too_few():
    sin_p = jax.extend.core.primitives.sin_p
    jlrp.register_rule(sin_p, lambda r, x, y, **_: [])
    try:
        raised(
            jlrp.InputError,
            lambda: relevance(lambda w, x: jnp.sin(x) @ w, W, X),
            "sin",
            "0 relevances for 1 operands",
        )
    finally:
        jlrp.unregister_rule(sin_p)


def test_a_rule_that_reads_what_it_does_not_declare():
    @dataclasses.dataclass(frozen=True)
    class Reads(rules.Rule):
        def needs(self, op):
            return ()

        def propagate(self, op, r, ctx):
            return rules.Propagation([rules.Promise(value=ctx.read(op.inputs[0]))])

    def fn(w, x):
        return jnp.tanh(x[:, ::-1]) @ w  # here

    composite = jlrp.Composite([("activation", Reads())], base="attnlrp")
    raised(
        jlrp.RuleError,
        lambda: relevance(fn, W, X, composite=composite),
        "needs(op)",
        "rev",
        line_of("jnp.tanh(x[:, ::-1]) @ w"),
    )


# All of them.


def test_all_errors_share_a_base_and_builtin_kin():
    kin = {
        jlrp.UnsupportedPrimitiveError: NotImplementedError,
        jlrp.TargetError: ValueError,
        jlrp.SelectorError: ValueError,
        jlrp.NoRelevanceError: ValueError,
        jlrp.InputError: TypeError,
    }
    for error, builtin in kin.items():
        assert issubclass(error, jlrp.JlrpError) and issubclass(error, builtin)
    others = {e for e in vars(jlrp).values() if re.fullmatch(r".*Error", str(e))}
    assert others <= {jlrp.JlrpError, *kin}


def test_errors_inside_a_users_jit():
    raised(
        jlrp.UnsupportedPrimitiveError,
        lambda: jax.jit(functools.partial(relevance, decomposed))(W, X),
        "`whitened`",
        line_of("WHITENED.bind(square)"),
    )
    raised(
        jlrp.TargetError,
        lambda: jax.jit(lambda x: relevance(linear, W, x, 7))(X),
        "Target 7",
    )


def test_abstract_arrays_are_for_inspect_only():
    x = shapes(X.shape, X.dtype)
    message = raised(jlrp.InputError, lambda: relevance(linear, W, x), "not an array")
    assert "ShapeDtypeStruct" in message
