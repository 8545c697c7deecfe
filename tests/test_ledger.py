"""The ledger names every cause from its own formula, and shows a wrong rule."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.extend.core.primitives import tanh_p

import jlrp
from jlrp import composites, rules
from jlrp.context import context_of
from jlrp.interpreter import forward, reverse
from jlrp.options import Options
from jlrp.reports import CAUSES
from jlrp.request import Request

pytestmark = pytest.mark.relaxed
RNG = np.random.default_rng(2)
normal = lambda *shape: jnp.asarray(RNG.normal(size=shape))  # noqa: E731
P = {
    "k": normal(3, 3, 2, 3),
    "bias": normal(3),
    "k2": normal(3, 3, 3, 3),
    "mean": normal(3),
    "scale": normal(3),
    "shift": normal(3),
    "variance": jnp.square(normal(3)) + 0.1,
    "w": normal(3, 4),
    "b": normal(4),
    "s": normal(4),
    "v": normal(4, 3),
}
X = normal(2, 4, 4, 2)
PRESETS = {
    "epsilon": composites.epsilon(0.1),
    "epsilon 0": composites.epsilon(0.0),
    "epsilon_plus": composites.epsilon_plus(),
    "epsilon_plus_flat": composites.epsilon_plus_flat(),
    "epsilon_gamma_box": composites.epsilon_gamma_box(-4.0, 4.0),
    "epsilon_alpha2_beta1": composites.epsilon_alpha2_beta1(),
    "gamma_by_depth": composites.gamma_by_depth(),
    "epsilon_alpha2_beta1_flat": composites.epsilon_alpha2_beta1_flat(),
    "excitation_backprop": composites.excitation_backprop(),
    "gradient_input": composites.gradient_input(),
    "dynamic_lrp": composites.dynamic_lrp(),
    "attnlrp": composites.attnlrp(),
    "attnlrp gamma": composites.attnlrp(0.25, 0.05),
    "cp_lrp": composites.cp_lrp(),
    "mamba_lrp": composites.mamba_lrp(),
    "auto": composites.auto(),
    "dynamic_lrp gamma": composites.dynamic_lrp(100.0, 0.01),
}
all_presets = pytest.mark.parametrize("name", PRESETS)


def test_every_preset_is_here():
    assert set(composites.PRESETS) <= {name.split()[0] for name in PRESETS}


def conv(x, k):
    return lax.conv_general_dilated(
        x, k, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def model(p, x):
    """Residual, batch norm, both poolings, tanh, layer norm, sigmoid gate, softmax."""
    h = jax.nn.relu(conv(x, p["k"]) + p["bias"])
    norm = (conv(h, p["k2"]) - p["mean"]) * (lax.rsqrt(p["variance"]) * p["scale"])
    h = h + jax.nn.relu(norm + p["shift"])
    window = (1, 2, 2, 1)
    h = lax.reduce_window(h, -jnp.inf, lax.max, window, window, "VALID")
    h = jnp.tanh(h.mean((1, 2)) @ p["w"] + p["b"])
    deviation = jnp.sqrt(h.var(-1, keepdims=True) + 1e-5)
    h = (h - h.mean(-1, keepdims=True)) / deviation * p["s"]
    return jax.nn.softmax((h * jax.nn.sigmoid(h[:, ::-1])) @ p["v"])


def scale_of(ledger):
    """Rounding grows with what passes through a row, which may exceed the seed."""
    return max(abs(ledger.seed), *(abs(row.arrived) for row in ledger.rows))


@functools.cache
def audited(name):
    return jlrp.audit(model, P, X, target=1, composite=PRESETS[name])


@all_presets
def test_every_row_is_explained(name):
    ledger = audited(name)
    scale = scale_of(ledger)
    for row in ledger.rows:
        assert abs(row.unexplained) <= 1e-10 * scale, row.kind
        left = row.arrived - row.handed - sum(row.causes.values())
        assert row.unexplained == pytest.approx(left, abs=1e-14 * scale)
        assert set(row.causes) <= set(CAUSES)
    assert ledger.unexplained == max(abs(row.unexplained) for row in ledger.rows)


@all_presets
def test_seed_is_relevance_and_causes(name):
    ledger = audited(name)
    absorbed = sum(ledger.total(cause) for cause in CAUSES)
    scale = scale_of(ledger)
    assert abs(ledger.seed - ledger.relevance - absorbed) <= 1e-10 * scale
    score = float(model(P, X)[:, 1].sum())
    assert ledger.seed == pytest.approx(score, rel=1e-10)


@pytest.mark.parametrize("name", ["epsilon", "epsilon_plus", "dynamic_lrp"])
def test_the_ledger_is_of_the_same_relevance(name):
    relevance = jlrp.relevance(model, P, X, target=1, composite=PRESETS[name])
    assert audited(name).relevance == pytest.approx(float(relevance.sum()), rel=1e-9)


def test_a_printed_ledger():
    ledger = audited("epsilon")
    text = str(ledger)
    for word in ("seed", "relevance", "unexplained", "stabilizer", "conv", "Epsilon"):
        assert word in text
    assert len(text.splitlines()) >= len(ledger.rows) + 4
    assert max(map(len, text.splitlines())) < 200
    assert ledger._repr_html_().count("<tr>") == len(ledger.rows) + 1
    assert not ledger.nonfinite


# Each cause against its own formula, in programs of one operation.

V = normal(4)
KERNEL, BIAS = normal(4, 3), normal(3)
S = 0.1
Z = np.asarray(V @ KERNEL + BIAS)
SIGNED = np.where(Z >= 0, S, -S)


def dense(p, x):
    return x @ p["w"] + p["b"]


def only_row(fn, p, x, rule, kind, seed="score", target=None):
    composite = jlrp.Composite([(kind, rule)], base="epsilon")
    shape = jax.eval_shape(fn, p, x).shape
    target = jnp.ones(shape) if target is None else target
    ledger = jlrp.audit(fn, p, x, target, composite=composite, seed=seed)
    (row,) = (row for row in ledger.rows if row.kind == kind)
    assert abs(row.unexplained) <= 1e-12 * max(1.0, abs(row.arrived))
    return row.causes


def assert_causes(causes, **expected):
    expected = {name: float(np.sum(part)) for name, part in expected.items()}
    for name in CAUSES:
        wanted = expected.get(name, 0.0)
        assert causes.get(name, 0.0) == pytest.approx(wanted, abs=1e-12), name


def positive(a):
    return np.maximum(a, 0)


def test_causes_of_dense_rules():
    p = {"w": KERNEL, "b": BIAS}
    causes = functools.partial(only_row, dense, p, V, kind="dense")
    share = Z / (Z + SIGNED)
    assert_causes(causes(rules.Zero()), bias=BIAS)
    assert_causes(
        causes(rules.Epsilon(S)), bias=share * BIAS, stabilizer=share * SIGNED
    )
    z0 = Z - np.asarray(BIAS)
    signed0 = np.where(z0 >= 0, S, -S)
    share = Z / (z0 + signed0)
    assert_causes(causes(rules.Epsilon(S, bias="ignore")), stabilizer=share * signed0)
    kept = np.abs(z0) / (np.abs(z0) + np.abs(BIAS) + S)
    assert_causes(
        causes(rules.Epsilon(S, bias="split")),
        bias=Z * (1 - kept),
        stabilizer=share * kept * signed0,
    )
    plus = positive(np.asarray(KERNEL) * np.asarray(V)[:, None]).sum(0)
    b = positive(BIAS)
    share = Z / (plus + b + S)
    assert_causes(
        causes(rules.ZPlus(stabilizer=S)), bias=share * b, stabilizer=share * S
    )
    squares = (np.asarray(KERNEL) ** 2).sum(0)
    b = np.asarray(BIAS) ** 2
    share = Z / (squares + b + S)
    assert_causes(
        causes(rules.WSquare(stabilizer=S)), bias=share * b, stabilizer=share * S
    )
    assert_causes(causes(rules.Flat(S)), stabilizer=Z / (4 + S) * S)
    assert_causes(causes(rules.Stop()), blocked=Z)


def test_causes_of_functions():
    y, slope = np.tanh(V), 1 - np.tanh(V) ** 2
    causes = functools.partial(
        only_row, lambda p, x: jnp.tanh(x), (), V, kind="activation"
    )
    assert_causes(causes(rules.Pass()))
    assert_causes(causes(rules.Gradient()), taylor=y - V * slope)
    assert_causes(causes(rules.NativeGradient()), taylor=(1 - slope) * y)
    exp = np.exp(V)
    causes = only_row(
        lambda p, x: jnp.exp(x), (), V, rules.Gradient(), kind="activation"
    )
    assert_causes(causes, taylor=exp - V * exp)


def test_causes_of_sums_products_and_movement():
    x = {"a": V, "b": V[::-1] + 0.3}
    a, b = (np.asarray(v) for v in x.values())
    y = a + b
    signed = np.where(y >= 0, S, -S)
    causes = only_row(lambda p, x: x["a"] + x["b"], (), x, rules.Epsilon(S), kind="add")
    assert_causes(causes, stabilizer=y / (y + signed) * signed)
    y = a * b
    signed = np.where(y >= 0, S, -S)
    causes = only_row(
        lambda p, x: x["a"] * x["b"], (), x, rules.Uniform(S), kind="product"
    )
    assert_causes(causes, stabilizer=y / (y + signed) * signed)
    causes = only_row(
        lambda p, x: jnp.concatenate([x["a"], p]), BIAS, x, rules.Follow(), "movement"
    )
    assert_causes(causes, constants=BIAS)
    mask = jnp.arange(4) < 1
    causes = only_row(
        lambda p, x: jnp.where(mask, x["a"], p), a, x, rules.Follow(), "movement"
    )
    assert_causes(causes, constants=a[1:])


def test_lost_where_nothing_can_be_divided_is_blocked():
    """A value that arrives at z = 0 has nowhere to go without a stabiliser."""
    w = jnp.asarray([[1.0, 1.0], [1.0, -1.0]])
    p = {"w": w, "b": jnp.zeros(2)}
    x = jnp.asarray([0.5, 0.5])  # z = (1, 0)
    seeds = jnp.asarray([2.0, 3.0])
    causes = only_row(dense, p, x, rules.Zero(), "dense", seed="one", target=seeds)
    assert_causes(causes, blocked=3.0)


# A wrong rule.


@pytest.fixture
def doubling_tanh():
    jlrp.register_rule(tanh_p, lambda r, x, y, **_: [2 * r[0]])
    yield
    jlrp.unregister_rule(tanh_p)


def tanh_layers(p, x):
    return jnp.tanh(x @ p["w"] + p["b"]) @ p["w"].T


def test_a_wrong_rule_is_unexplained(doubling_tanh):
    p = {"w": KERNEL, "b": BIAS}
    ledger = jlrp.audit(tanh_layers, p, V, 0, composite="epsilon")
    (row,) = (row for row in ledger.rows if "Custom" in row.rule)
    assert row.unexplained == pytest.approx(-row.arrived)
    assert abs(row.unexplained) > 0.01 * abs(ledger.seed)
    assert ledger.unexplained == abs(row.unexplained)
    others = [r for r in ledger.rows if r is not row]
    assert max(abs(r.unexplained) for r in others) <= 1e-10 * scale_of(ledger)


def test_taking_the_rule_back_mends_it(doubling_tanh):
    p = {"w": KERNEL, "b": BIAS}
    wrong = jlrp.relevance(tanh_layers, p, V, 0, composite="epsilon")
    jlrp.unregister_rule(tanh_p)
    right = jlrp.relevance(tanh_layers, p, V, 0, composite="epsilon")
    np.testing.assert_allclose(wrong, 2 * right, rtol=1e-9)
    ledger = jlrp.audit(tanh_layers, p, V, 0, composite="epsilon")
    assert ledger.unexplained <= 1e-10 * scale_of(ledger)


def test_a_wrong_rule_of_a_composite_is_unexplained():
    class Leaky(rules.Epsilon):
        """Epsilon that loses a tenth and does not say so."""

        def propagate(self, op, r, ctx):
            handed = super().propagate(op, r, ctx)
            promises = [p and p.map(lambda m: 0.9 * m) for p in handed.promises]
            return type(handed)(promises, handed.causes)

    p = {"w": KERNEL, "b": BIAS}
    composite = jlrp.Composite([("first", Leaky(0.0))], base=composites.epsilon(0.0))
    ledger = jlrp.audit(tanh_layers, p, V, 0, composite=composite)
    *others, first = ledger.rows
    assert first.unexplained == pytest.approx(first.handed / 9)
    assert max(abs(row.unexplained) for row in others) <= 1e-12 * scale_of(ledger)


# NaN and inf.


def test_names_the_operation_where_nan_began():
    def fn(p, x):
        with jax.named_scope("encoder"):
            h = jnp.log(x @ p["w"])  # NaN, and what follows is NaN too
        return jnp.exp(h @ p["w"].T)

    w = jnp.abs(KERNEL) * jnp.asarray([1.0, -1.0, 1.0])
    ledger = jlrp.audit(fn, {"w": w}, jnp.abs(V), 0, composite="epsilon")
    (start,) = ledger.nonfinite
    assert "log" in start and "encoder" in start and "test_ledger.py" in start
    assert start in str(ledger)


def test_names_the_operation_where_inf_began():
    def fn(p, x):
        return jnp.exp(x * 1e4) @ jnp.abs(KERNEL) + 1.0

    (start,) = jlrp.audit(fn, (), jnp.abs(V), 0).nonfinite
    assert "exp" in start and "test_ledger.py" in start


def test_bad_parameters_are_named_where_they_enter():
    p = {"w": KERNEL.at[0, 0].set(jnp.nan), "b": BIAS}
    (start,) = jlrp.audit(tanh_layers, p, V, 0, composite="epsilon").nonfinite
    assert "dense" in start


def test_nan_of_relevance_alone_is_not_hidden():
    """The derivative may be NaN where the activations on both sides are finite."""

    def fn(p, x):
        return jnp.tanh(jnp.exp(x)).sum()

    x = jnp.asarray([800.0, 0.5])
    ledger = jlrp.audit(fn, (), x, composite=composites.epsilon(0.0))
    if np.isnan(ledger.relevance):
        assert np.isnan(ledger.unexplained)
        (start,) = ledger.nonfinite
        assert "activation" in start


# Plans keep what rules declare, and rules read no more.


def request_of(fn, x, name, **options):
    request = Request(fn, P, x, Options(composite=PRESETS[name], target=1))
    return request, request.plan(**options)


@all_presets
def test_each_rule_reads_only_what_it_declares(name):
    """Reading anything else is a RuleError: each step sees its own only."""
    request, plan = request_of(model, X, name)

    def explain(arguments):
        outputs, residuals = forward(plan, arguments)
        assert set(residuals) == set(plan.kept)
        pending = request._seeds(outputs)
        for step in plan.steps:
            op = step.operation
            declared = {*op.constants, *step.rule.needs(op)}
            own = context_of(plan, {value: residuals[value] for value in declared})
            arriving = [pending.pop(v, None) for v in op.outputs]
            if any(promise is not None for promise in arriving):
                handed = step.rule.propagate(op, arriving, own).promises
                for value, promise in zip(op.inputs, handed, strict=True):
                    if promise is not None:
                        pending[value] = promise + pending.get(value)
        return pending

    assert jax.eval_shape(explain, request.arguments) is not None


def test_poisoned_residuals_change_nothing():
    """Every value that no rule declares may be NaN."""
    request, plan = request_of(model, X, "epsilon_plus", for_ledger=True)

    def explain(arguments, poison):
        outputs, residuals = forward(plan, arguments)
        seeds = request._seeds(outputs)
        declared = set(plan.program.sources)
        for step in plan.steps:
            declared |= {*step.operation.constants, *step.rule.needs(step.operation)}
        if poison:
            residuals = {
                v: number if v in declared else number * jnp.nan
                for v, number in residuals.items()
            }
            assert any(v not in declared for v in residuals)
        (promise,) = reverse(plan, context_of(plan, residuals), seeds).sources
        return promise.resolve(X)

    clean, poisoned = (
        jax.jit(explain, static_argnums=1)(request.arguments, poison)
        for poison in (False, True)
    )
    np.testing.assert_array_equal(clean, poisoned)
    expected = jlrp.relevance(model, P, X, 1, composite=PRESETS["epsilon_plus"])
    np.testing.assert_allclose(clean, expected, rtol=1e-9, atol=1e-14)


def test_zero_keeps_no_activations():
    """LRP-0 on a ReLU network keeps what the gradient keeps: masks' inputs."""
    p = {"w": KERNEL, "v": KERNEL.T}

    def fn(p, x):
        return jax.nn.relu(x @ p["w"]) @ p["v"]

    def kept(composite):
        request = Request(fn, p, V, Options(composite=composite, target=0))
        plan = request.plan()
        constants = set(plan.program.inputs[: len(p)])
        return {v for v in plan.kept if v not in constants}

    assert len(kept(composites.epsilon(0.0))) <= len(kept("epsilon_plus"))
    assert len(kept("epsilon")) <= 4  # x, both sides of the ReLU, the scores


def test_an_exponential_of_a_mask_is_no_number_of_the_ledger():
    """exp(-inf) outside of a softmax: a decay that is causal, times scores."""
    causal = jnp.tril(jnp.ones((4, 4), bool))

    def decaying(p, x):
        total = jnp.cumsum(x @ p["f"], -1)
        sums = jnp.where(causal, total[:, :, None] - total[:, None], -jnp.inf)
        scores = jnp.einsum("btd,bsd->bts", x, x @ p["k"])
        return jnp.einsum("bts,bsd->bd", jnp.exp(sums) * scores, x)

    draw = lambda i, *s: jax.random.normal(jax.random.key(i), s)  # noqa: E731
    x, p = draw(0, 2, 4, 3), {"f": draw(1, 3), "k": draw(2, 3, 3)}
    ledger = jlrp.audit(decaying, p, x, composite="attnlrp")
    assert not ledger.nonfinite and jnp.isfinite(ledger.relevance)
    assert ledger.unexplained < 1e-12 * abs(ledger.seed)
