"""Relevance under jit, vmap and grad, and of programs that use them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jlrp

RNG = np.random.default_rng(1)
normal = lambda *shape: jnp.asarray(RNG.normal(size=shape))  # noqa: E731
P = {
    "k": normal(2, 2, 1, 3),
    "w": normal(12, 5),
    "b": normal(1, 5),
    "v": normal(5, 3),
}
X = normal(3, 4, 4, 1)
FLAT = normal(3, 12)
EXACT = jlrp.composites.epsilon(0.0)
NAMES = ["epsilon", "epsilon_plus", "epsilon_alpha2_beta1", "dynamic_lrp"]
COMPOSITES = {
    "epsilon_plus": "epsilon_plus",
    "dynamic_lrp": "dynamic_lrp",
    "box": jlrp.composites.epsilon_gamma_box(-4.0, 4.0),
    "flat": "epsilon_plus_flat",
}
all_composites = pytest.mark.parametrize("name", COMPOSITES)


def mlp(p, x):
    return jnp.tanh(x @ p["w"] + p["b"]) @ p["v"]


def model(p, x):
    h = lax.conv_general_dilated(
        x, p["k"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    h = jax.nn.relu(h)
    window = (1, 2, 2, 1)
    h = lax.reduce_window(h, -jnp.inf, lax.max, window, window, "VALID")
    return mlp(p, h.reshape(h.shape[0], -1))


def assert_close(ours, expected, tolerance=1e-12):
    def check(a, b):
        scale = float(jnp.abs(b).max())
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * scale)

    jax.tree.map(check, ours, expected)


# Of relevance.


@all_composites
def test_jit_vmap_and_eager_agree(name):
    def explain(p, x, labels):
        return jlrp.relevance(model, p, x, labels, composite=COMPOSITES[name])

    labels = jnp.asarray([2, 0, 1])
    expected = explain(P, X, labels)
    assert_close(jax.jit(explain)(P, X, labels), expected)
    alone = jax.vmap(lambda x, label: explain(P, x[None], label[None])[0])
    assert_close(alone(X, labels), expected)
    assert_close(jax.jit(alone)(X, labels), expected)
    if name == "epsilon_plus":  # test_spellings does this for every composite
        with jax.disable_jit():
            assert_close(explain(P, X, labels), expected)


@pytest.mark.parametrize("name", ["epsilon_plus", "box", "dynamic_lrp"])
def test_gradient_of_relevance(name):
    def penalty(w, x):
        p = P | {"w": w}
        r = jlrp.relevance(model, p, x, target=1, composite=COMPOSITES[name])
        return jnp.sum(r**2)

    slopes = jax.jit(jax.grad(penalty, (0, 1)))(P["w"], X)
    step = 1e-6
    penalty_of = jax.jit(penalty)
    for i, value in enumerate((P["w"], X)):
        direction = jnp.asarray(np.random.default_rng(i).normal(size=value.shape))
        ahead, behind = [P["w"], X], [P["w"], X]
        ahead[i], behind[i] = value + step * direction, value - step * direction
        difference = (penalty_of(*ahead) - penalty_of(*behind)) / (2 * step)
        np.testing.assert_allclose(
            jnp.vdot(slopes[i], direction), difference, rtol=1e-5
        )
    apart = jax.jit(jax.vmap(jax.grad(penalty), (None, 0)))(P["w"], X[:, None])
    assert_close(apart.sum(0), slopes[0], 1e-9)


def test_gradient_where_activations_vanish():
    """Relevance of dead units and of zeros is 0 and has finite gradients."""
    x = FLAT.at[0].set(0.0).at[1, :6].set(0.0)

    def fn(p, x):
        h = jax.nn.relu(x @ p["w"])
        h = h * jax.nn.sigmoid(h) + jax.nn.gelu(h) + jnp.sqrt(h + 1.0)
        return h @ p["v"]

    for composite in (EXACT, "dynamic_lrp"):

        def penalty(w, x, composite=composite):
            p = P | {"w": w}
            return jnp.sum(jlrp.relevance(fn, p, x, 0, composite=composite) ** 2)

        for slope in jax.grad(penalty, (0, 1))(P["w"], x):
            assert np.all(np.isfinite(slope))
        assert not np.any(jlrp.relevance(fn, P, x, 0, composite=composite)[0])


def test_forward_derivatives_of_relevance():
    def explain(x):
        return jlrp.relevance(mlp, P, x, 0)

    direction = jnp.ones_like(FLAT)
    _, forward = jax.jvp(explain, (FLAT,), (direction,))
    _, pull = jax.vjp(explain, FLAT)
    (backward,) = pull(jnp.ones_like(FLAT))
    np.testing.assert_allclose(forward.sum(), (backward * direction).sum(), rtol=1e-9)


def test_linear_in_the_seed_and_zero_in_zero_out():
    a, b = normal(3, 3), normal(3, 3)
    for composite in NAMES:
        explain = functools.partial(jlrp.relevance, model, P, composite=composite)
        together = explain(X, 2 * a - b)
        assert_close(together, 2 * explain(X, a) - explain(X, b), 1e-10)
        assert not np.any(explain(jnp.zeros_like(X), a))
        assert not np.any(explain(X, a * 0))


def test_relevance_inside_a_users_jit_closes_over_traced_params():
    @jax.jit
    def explain(p, x):
        return jlrp.relevance(lambda _, x: mlp(p, x), (), x)

    assert_close(explain(P, FLAT), jlrp.relevance(mlp, P, FLAT))


def test_export():
    def explain(x):
        return jlrp.relevance(mlp, P, x)

    exported = jax.export.export(jax.jit(explain))(FLAT)
    assert_close(exported.call(FLAT), explain(FLAT))


def test_reverse_pass_never_calls_python():
    text = str(jax.make_jaxpr(lambda x: jlrp.relevance(model, P, x))(X))
    assert "callback" not in text


def test_no_tracer_leaks():
    with jax.checking_leaks():
        jlrp.relevance(mlp, P, FLAT)
        jax.grad(lambda x: jlrp.relevance(mlp, P, x).sum())(FLAT)
        jlrp.inspect(mlp, P, FLAT)
    # Nothing of one trace is left in what the next one uses.
    jax.jit(lambda x: jlrp.relevance(mlp, P, x))(FLAT)
    jlrp.relevance(mlp, P, FLAT)


def test_audit_leaks_no_tracer():
    x = jnp.ones(2)
    with jax.checking_leaks():
        jlrp.audit(lambda p, x: jnp.sum(x * p), x, x)


# Compiling once.


class Counted:
    """A function that counts how often it is traced."""

    def __init__(self):
        self.traces = 0

    def __call__(self, p, x):
        self.traces += 1
        return mlp(p, x)


class Owner:
    """Has a method to explain, and, like a Linen module with a list, no hash."""

    __hash__ = None

    def __init__(self):
        self.traces = 0
        self.fields = []

    def __eq__(self, other):
        return self.fields == other.fields

    def apply(self, p, x):
        self.traces += 1
        return mlp(p, x)


def test_a_second_call_traces_nothing():
    fn = Counted()
    jlrp.relevance(fn, P, FLAT)
    traces = fn.traces
    for x in (FLAT * 2, FLAT + 1):
        jlrp.relevance(fn, P, x)
        jlrp.explain(fn)(P, x)
    assert fn.traces == traces
    jlrp.relevance(fn, P, FLAT, composite="epsilon")
    jlrp.relevance(fn, P, FLAT[:2])
    assert fn.traces > traces


def test_equal_composites_share_a_program():
    fn = Counted()
    for _ in range(2):
        composite = jlrp.Composite([("dense", jlrp.rules.ZBox(-4.0, np.full(5, 4.0)))])
        composite = jlrp.Composite([("first", jlrp.rules.Gamma(0.5))], base="epsilon")
        jlrp.relevance(fn, P, FLAT, composite=composite)
    traces = fn.traces
    jlrp.relevance(fn, P, FLAT, composite=jlrp.Composite(composite.pairs, base=None))
    assert fn.traces == traces


@pytest.mark.parametrize("kind", ["labels", "NumPy labels", "multipliers"])
def test_labels_vary_without_recompiling(kind):
    fn = Counted()
    labels = {
        "labels": [jnp.asarray([0, 1, 2]), jnp.asarray([2, 2, 0])],
        "NumPy labels": [np.asarray([0, 1, 2]), np.asarray([2, 2, 0])],
        "multipliers": [jnp.ones((3, 3)), jnp.eye(3)],
    }[kind]
    first = jlrp.relevance(fn, P, FLAT, labels[0])
    compiled = fn.traces
    second = jlrp.relevance(fn, P, FLAT, labels[1])
    # A check of the target's shape may trace; compiling would trace more.
    assert fn.traces - compiled < compiled
    assert not np.allclose(first, second)


def test_a_bound_method_compiles_once_for_each_owner():
    one, other = Owner(), Owner()
    assert_close(jlrp.relevance(one.apply, P, FLAT), jlrp.relevance(mlp, P, FLAT))
    traces = one.traces
    jlrp.relevance(one.apply, P, FLAT * 2)
    assert one.traces == traces
    jlrp.relevance(other.apply, P, FLAT)
    assert other.traces > 0  # an equal owner may compute something else


def test_a_lambda_made_anew_explains_what_it_says():
    def explain(n):
        return jlrp.relevance(lambda p, x: n * mlp(p, x), P, FLAT, composite=EXACT)

    assert_close(explain(2.0), 2 * explain(1.0))


# Of programs with something unusual in them.


def test_calls_of_one_function_share_no_values():
    layer = jax.jit(lambda h, w: jnp.tanh(h @ w))
    w = normal(4, 4)
    x = normal(2, 4)

    def shared(w, x):
        return layer(layer(layer(x, w), w), w)

    def separate(w, x):
        for _ in range(3):
            x = jnp.tanh(x @ w)
        return x

    ours, plain = (
        jlrp.relevance(f, w, x, jnp.ones((2, 4))) for f in (shared, separate)
    )
    assert_close(ours, plain)


def test_inputs_as_outputs_and_values_used_twice():
    x = {"a": normal(2, 3), "b": normal(2, 3)}
    h = normal(2, 3)

    def fn(p, x):
        s = x["a"] * p
        return {
            "input": x["a"],
            "twice": (s, s),
            "sum": s + s,
            "constant": p,
            "lit": 1.0,
        }

    def explain(**seeds):
        zeros = jax.tree.map(jnp.zeros_like, fn(h, x))
        return jlrp.relevance(fn, h, x, zeros | seeds, composite=EXACT)

    one = jnp.ones((2, 3))
    assert_close(explain(input=2 * one)["a"], 2 * x["a"])
    assert_close(explain(twice=(one, 3 * one))["a"], 4 * x["a"] * h)
    assert_close(explain(sum=one)["a"], 2 * x["a"] * h)
    assert_close(explain(sum=one, input=one)["a"], 2 * x["a"] * h + x["a"])
    both = explain(sum=one, constant=one, lit=jnp.asarray(5.0))
    assert_close(both["a"], 2 * x["a"] * h)
    assert not np.any(both["b"])  # not used at all


def test_square_has_one_variable_twice():
    x = normal(2, 3)
    ours = jlrp.relevance(lambda _, x: x * x, (), x, jnp.ones((2, 3)), composite=EXACT)
    assert_close(ours, x * x)
    ours = jlrp.relevance(lambda _, x: x @ x.T, (), x, jnp.ones((2, 2)))
    assert_close(ours, x * x.sum(0, keepdims=True))


def test_pytrees_with_leaves_that_carry_no_relevance():
    x = {
        "image": normal(2, 3),
        "nested": [normal(2, 3), (normal(2, 1),)],
        "mask": jnp.asarray([[True, False, True]] * 2),
        "key": jax.random.key(0),
        "none": None,
    }

    def fn(p, x):
        noise = jax.random.normal(x["key"], (2, 3))
        a, (b,) = x["nested"]
        return jnp.where(x["mask"], x["image"] * p + a, 0.0) + b + noise

    r = jlrp.relevance(fn, jnp.asarray(2.0), x, jnp.ones((2, 3)), composite=EXACT)
    assert_close(r["image"], jnp.where(x["mask"], 2 * x["image"], 0.0))
    assert_close(r["nested"][0], jnp.where(x["mask"], x["nested"][0], 0.0))
    assert_close(r["nested"][1][0], 3 * x["nested"][1][0])
    assert not np.any(r["mask"]) and r["mask"].shape == (2, 3)
    assert jnp.issubdtype(r["mask"].dtype, jnp.floating)
    assert r["key"] == () and r["none"] is None


def test_calls_inside_the_model_are_looked_into():
    @jax.custom_vjp
    def twice(h):
        return 2 * h

    twice.defvjp(lambda h: (2 * h, None), lambda _, ct: (3 * ct,))  # a wrong gradient

    @jax.custom_jvp
    def cut(h):
        return jax.nn.relu(h)

    cut.defjvp(lambda primals, tangents: (cut(*primals), 5 * tangents[0]))

    @functools.partial(jax.checkpoint, policy=None)
    def wrapped(h, w):
        return cut(twice(h @ w))

    def plain(p, x):
        return jax.nn.relu(2 * (x @ p["w"])) @ p["v"]

    for composite in NAMES:
        ours, expected = (
            jlrp.relevance(fn, P, FLAT, composite=composite)
            for fn in (lambda p, x: jax.jit(wrapped)(x, p["w"]) @ p["v"], plain)
        )
        assert_close(ours, expected)


def test_vmap_in_the_model():
    mapped = jax.vmap(lambda v, p: mlp(p, v[None])[0], (0, None))
    for composite in NAMES:
        ours = jlrp.relevance(lambda p, x: mapped(x, p), P, FLAT, composite=composite)
        assert_close(ours, jlrp.relevance(mlp, P, FLAT, composite=composite), 1e-11)


def test_gradients_in_the_model():
    """An energy model: the explained score is a derivative."""

    def force(p, x):
        return jax.grad(lambda x: jnp.sum(jnp.tanh(x @ p["w"]) @ p["v"]))(x)[:, 0]

    ledger = jlrp.audit(force, P, FLAT)
    assert ledger.unexplained <= 1e-10 * max(abs(r.arrived) for r in ledger.rows)
    assert np.all(np.isfinite(jlrp.relevance(force, P, FLAT)))


@pytest.mark.relaxed
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_low_precision_models_have_float32_relevance(dtype):
    low = jax.tree.map(lambda v: v.astype(dtype), (P, X))
    single = jax.tree.map(lambda v: v.astype(jnp.float32), low)
    for composite in ["epsilon_plus"]:
        e = jlrp.explain(model, target=1, composite=composite)(*low)
        reference = jlrp.relevance(model, *single, target=1, composite=composite)
        assert e.relevance.dtype == jnp.float32 and e.output.dtype == dtype
        error = jnp.abs(e.relevance - reference).max() / jnp.abs(reference).max()
        assert error < (0.1 if dtype == jnp.bfloat16 else 0.02)
        # Accumulated in float32: far better conserved than dtype could say.
        ledger = jlrp.audit(model, *low, target=1, composite=composite)
        scale = max(abs(row.arrived) for row in ledger.rows)
        assert ledger.unexplained < 0.02 * scale


@pytest.mark.relaxed
def test_dtypes_of_relevance():
    for dtype in (jnp.float32, jnp.float64):
        p, x = jax.tree.map(lambda v: v.astype(dtype), (P, FLAT))  # noqa: B023
        assert jlrp.relevance(mlp, p, x).dtype == dtype
    # A float32 input of a float64 model, and the reverse.
    assert jlrp.relevance(mlp, P, FLAT.astype(jnp.float32)).dtype == jnp.float32
    half = jax.tree.map(lambda v: v.astype(jnp.float16), P)
    assert jlrp.relevance(mlp, half, FLAT.astype(jnp.float32)).dtype == jnp.float32


def test_inputs_may_be_numpy_arrays():
    numpy = jax.tree.map(np.asarray, (P, FLAT))
    assert_close(jlrp.relevance(mlp, *numpy), jlrp.relevance(mlp, P, FLAT))


def test_inspect_needs_shapes_only():
    def shapes(tree):
        return jax.tree.map(lambda v: jax.ShapeDtypeStruct(v.shape, v.dtype), tree)

    big = {"w": jax.ShapeDtypeStruct((10**6, 10**6), jnp.bfloat16)}  # 2 TB
    x = jax.ShapeDtypeStruct((8, 10**6), jnp.bfloat16)
    report = jlrp.inspect(lambda p, x: jax.nn.relu(x @ p["w"]), big, x)
    assert [row.kind for row in report.operations] == ["dense", "activation"]
    concrete, abstract = jlrp.inspect(model, P, X), jlrp.inspect(model, *shapes((P, X)))
    assert str(concrete) == str(abstract)


def test_a_symbolic_batch():
    """As ``jax.export`` has it: one program for batches of any size."""
    (b,) = jax.export.symbolic_shape("b")

    def fn(p, x):
        h = (jax.nn.relu(x @ p["w"]) + p["b"]).reshape(x.shape[0], 2, -1)
        step = lambda h, _: (jnp.tanh(h @ p["u"]), None)  # noqa: E731
        h, _ = jax.lax.scan(step, h.reshape(x.shape[0], -1), None, length=3)
        return h

    keys = jax.random.split(jax.random.key(0), 4)
    p = {"w": jax.random.normal(keys[0], (3, 4)), "b": jnp.ones((1, 4))}
    p["u"] = jax.random.normal(keys[1], (4, 4))
    x = jax.random.normal(keys[2], (5, 3))
    for composite in ("attnlrp", "epsilon_plus"):
        for residuals in ("keep", "promise", "sqrt"):
            explain = jlrp.explain(fn, composite=composite, residuals=residuals)
            whole = jax.jit(lambda p, x, e=explain: e(p, x).relevance)
            exported = jax.export.export(whole)(
                p, jax.ShapeDtypeStruct((b, 3), x.dtype)
            )
            assert exported.out_avals[0].shape == (b, 3)
            np.testing.assert_allclose(exported.call(p, x), whole(p, x), atol=1e-12)
