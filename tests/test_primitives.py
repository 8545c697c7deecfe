"""tag and custom_relevance are JAX primitives that change nothing outside of jlrp."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export, lax

import jlrp

RNG = np.random.default_rng(6)
normal = lambda *shape: jnp.asarray(RNG.normal(size=shape))  # noqa: E731
X, W = normal(3, 4), normal(4, 4)
FLAG = normal(4)
EXACT = jlrp.composites.epsilon(0.0)


@pytest.fixture(autouse=True)
def _same_numbers():
    """What a test draws does not depend on which tests ran before it."""
    RNG.bit_generator.state = np.random.default_rng(16).bit_generator.state


def assert_equal(a, b, tolerance=1e-12):
    jax.tree.map(
        lambda u, v: np.testing.assert_allclose(u, v, rtol=0, atol=tolerance), a, b
    )


# The same function plain, with a tag, and with a rule of its own.


def plain(x, w):
    return jnp.tanh(x @ w) * x


def tagged(x, w):
    h = jlrp.tag(jnp.tanh(jlrp.tag(x, "in") @ w), "h")
    return jlrp.tag(h * x, "out")


def first_gets_all(r, x, y):
    return r, None


own = jlrp.custom_relevance(plain)
own.def_relevance(first_gets_all)
WRAPPED = {"tag": tagged, "custom_relevance": own}
wrapped = pytest.mark.parametrize("f", WRAPPED.values(), ids=list(WRAPPED))


def hessian_row(f):
    return jax.grad(lambda x, w: jnp.sum(jax.grad(lambda v: jnp.sum(f(v, w) ** 2))(x)))


def scanned(f):
    def run(x, w):
        carry, ys = lax.scan(lambda c, t: (f(c, w) * t, c.sum()), x, jnp.arange(1.0, 4))
        return carry, ys

    return run


TRANSFORMATIONS = {
    "eager": lambda f: f,
    "jit": jax.jit,
    "vmap of x": lambda f: jax.vmap(f, (0, None)),
    "vmap of w": lambda f: lambda x, w: jax.vmap(f, (None, 0))(x, jnp.stack([w, -w])),
    "vmap of both": lambda f: (
        lambda x, w: jax.vmap(f)(jnp.stack([x, 2 * x]), jnp.stack([w, -w]))
    ),
    "vmap of the last axis": lambda f: (
        lambda x, w: jax.vmap(f, (2, None), 2)(jnp.stack([x, 2 * x], 2), w)
    ),
    "vmap of vmap": lambda f: (
        lambda x, w: jax.vmap(jax.vmap(f, (0, None)), (None, 0))(x, jnp.stack([w, -w]))
    ),
    "vmap of jit": lambda f: jax.vmap(jax.jit(f), (0, None)),
    "grad": lambda f: jax.grad(lambda x, w: jnp.sum(f(x, w) ** 2), (0, 1)),
    "value and grad": lambda f: jax.value_and_grad(
        lambda x, w: jnp.sum(f(x, w) ** 2), 1
    ),
    "jit of vmap of grad": lambda f: jax.jit(
        jax.vmap(jax.grad(lambda x, w: jnp.sum(f(x, w) ** 2)), (0, None))
    ),
    "second derivative": hessian_row,
    "jvp": lambda f: lambda x, w: jax.jvp(f, (x, w), (jnp.cos(x), jnp.sin(w))),
    "linearize": lambda f: lambda x, w: jax.linearize(lambda v: f(v, w), x)[1](x),
    "scan": scanned,
    "gradient of a scan": lambda f: jax.grad(lambda x, w: jnp.sum(scanned(f)(x, w)[0])),
    "fori_loop": lambda f: lambda x, w: lax.fori_loop(0, 3, lambda i, c: f(c, w), x),
    "cond": lambda f: lambda x, w: lax.cond(x[0, 0] < 9, f, lambda x, w: x, x, w),
    "checkpoint": jax.checkpoint,
    "gradient of checkpoint": lambda f: jax.grad(
        lambda x, w: jnp.sum(jax.checkpoint(f)(x, w) ** 2), (0, 1)
    ),
    "eval_shape": lambda f: (
        lambda x, w: jax.tree.map(lambda s: jnp.zeros(s.shape), jax.eval_shape(f, x, w))
    ),
}


@wrapped
@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_they_are_transparent(name, f):
    transform = TRANSFORMATIONS[name]
    assert_equal(transform(f)(X, W), transform(plain)(X, W))


@wrapped
def test_they_go_through_export(f):
    exported = export.export(jax.jit(f))(X, W)
    assert_equal(exported.call(X, W), plain(X, W))


@wrapped
def test_they_go_through_serialised_export(f):
    pytest.importorskip("flatbuffers")
    exported = export.export(jax.jit(f))(X, W)
    again = export.deserialize(bytearray(exported.serialize()))
    assert_equal(again.call(X, W), plain(X, W))


@wrapped
def test_they_lower_to_nothing_of_their_own(f):
    text = jax.jit(f).lower(X, W).as_text()
    assert "custom_call" not in text and "dot_general" in text


# Tags.


def test_a_tag_of_a_pytree_names_all_leaves():
    tree = {"a": X, "b": (W, jnp.arange(3))}
    named = jlrp.tag(tree, "name")
    assert_equal(named, tree)
    assert jax.tree.structure(named) == jax.tree.structure(tree)
    program = jax.make_jaxpr(lambda t: jlrp.tag(t, "name"))(tree)
    assert [str(e.primitive) for e in program.jaxpr.eqns] == ["tag"] * 3
    assert all(e.params == {"name": "name"} for e in program.jaxpr.eqns)


@pytest.mark.parametrize("name", ["", None, 3, b"x"])
def test_a_tag_needs_a_name(name):
    with pytest.raises(jlrp.InputError, match="non-empty string"):
        jlrp.tag(X, name)


@pytest.mark.parametrize("composite", ["attnlrp", "cp_lrp", "epsilon_plus", "epsilon"])
def test_a_tag_does_not_change_relevance(composite):
    explain = functools.partial(jlrp.relevance, composite=composite)
    ours = explain(lambda w, x: tagged(x, w), W, X)
    np.testing.assert_array_equal(ours, explain(lambda w, x: plain(x, w), W, X))


def test_a_tag_inside_an_activation_or_a_layer_does_not_split_it():
    def fn(w, x, tag):
        h = tag(x @ w, "inside") + FLAG[None]
        return h * tag(jax.nn.sigmoid(tag(1.7 * h, "scaled")), "gate")

    plain_kinds, tagged_kinds = (
        [row.kind for row in jlrp.inspect(named(fn, tag), W, X).operations]
        for tag in (lambda y, name: y, jlrp.tag)
    )
    assert plain_kinds == tagged_kinds == ["dense", "activation"]


def named(fn, tag):
    return lambda w, x: fn(w, x, tag)


# A rule of one's own.


def swish_norm(x, gate, scale):
    """A fused kernel: RMS norm and gate."""
    inverse = lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6)
    return x * inverse * scale[None] * jax.nn.silu(gate)


def model_of(kernel):
    def fn(p, x):
        return kernel(x @ p["w"], x @ p["g"], p["s"]) @ p["v"]

    return fn


P = {"w": normal(4, 5), "g": normal(4, 5), "s": normal(5), "v": normal(5, 3)}


def halves(r, x, y):
    return 0.5 * r, 0.5 * r, None


fused_kernel = jlrp.custom_relevance(swish_norm)
fused_kernel.def_relevance(halves)


@pytest.mark.parametrize("composite", ["attnlrp", "epsilon"])
def test_a_fused_kernel_carries_its_rule(composite):
    """Its rule is AttnLRP's for what is inside; another rule, another relevance."""
    plain, fused = model_of(swish_norm), model_of(fused_kernel)
    for target in (0, 1):
        attnlrp = jlrp.relevance(plain, P, X, target, composite="attnlrp")
        ours = jlrp.relevance(fused, P, X, target, composite=composite)
        tolerance = 1e-10 if composite == "attnlrp" else 1e-4
        assert_equal(ours, attnlrp, tolerance * float(jnp.abs(attnlrp).max()))

    other = jlrp.custom_relevance(swish_norm)
    other.def_relevance(lambda r, x, y: (r, None, None))
    cp = jlrp.relevance(model_of(swish_norm), P, X, 0, composite="cp_lrp")
    ours = jlrp.relevance(model_of(other), P, X, 0, composite="attnlrp")
    assert_equal(ours, cp, 1e-10 * float(jnp.abs(cp).max()))


def test_it_is_one_operation_with_its_rule_in_the_tables():
    report = jlrp.inspect(model_of(fused_kernel), P, X, composite="attnlrp")
    assert [row.kind for row in report.operations].count("custom") == 1
    assert "norm" not in [row.kind for row in report.operations]
    assert report.coverage.uncovered == 0
    assert "swish_norm" in str(report) or "halves" in str(report)


def losing(r, x, y):
    return 0.5 * r, 0.25 * r, None


def test_the_ledger_shows_what_a_rule_does_not_hand_on():
    kernel = jlrp.custom_relevance(swish_norm)
    kernel.def_relevance(losing)
    ledger = jlrp.audit(model_of(kernel), P, X, 0, composite="attnlrp")
    (row,) = (row for row in ledger.rows if row.kind == "custom")
    assert row.unexplained == pytest.approx(row.arrived / 4)
    assert row.handed == pytest.approx(0.75 * row.arrived)
    conserving = jlrp.audit(model_of(fused_kernel), P, X, 0, composite="attnlrp")
    assert conserving.unexplained <= 1e-10 * abs(conserving.seed)


@pytest.mark.parametrize("composite", [EXACT, "epsilon_plus", "dynamic_lrp"])
def test_a_preset_does_not_overrule_it(composite):
    fn = lambda p, x: fused_kernel(x, 2.0 * x, FLAG)  # noqa: E731
    seed = normal(3, 4)
    ours = jlrp.relevance(fn, P, X, seed, composite=composite)
    assert_equal(ours, fn(P, X) * seed, 1e-9)


def test_gradient_input_and_a_pair_of_ones_own_overrule_it():
    fn = lambda p, x: fused_kernel(x, 2.0 * x, FLAG)  # noqa: E731
    seed = normal(3, 4)
    expected = X * jax.grad(lambda x: jnp.sum(fn(P, x) * seed))(X)
    own = jlrp.Composite([("custom", jlrp.rules.Gradient())], base="attnlrp")
    for composite in ("gradient_input", own):
        ours = jlrp.relevance(fn, P, X, seed, composite=composite)
        assert_equal(ours, expected)


@pytest.mark.parametrize("composite", ["attnlrp", "epsilon_plus"])
def test_relevance_by_a_rule_under_jit_vmap_and_eager(composite):
    fn = model_of(fused_kernel)

    def explain(x, labels):
        return jlrp.relevance(fn, P, x, labels, composite=composite)

    labels = jnp.asarray([2, 0, 1])
    expected = explain(X, labels)
    one = jax.vmap(lambda x, label: explain(x[None], label[None])[0])
    assert_equal(jax.jit(explain)(X, labels), expected)
    assert_equal(one(X, labels), expected)
    assert_equal(jax.jit(one)(X, labels), expected)
    with jax.disable_jit():
        assert_equal(explain(X, labels), expected)


def test_the_gradient_of_relevance_goes_through_a_rule():
    def penalty(w):
        r = jlrp.relevance(
            model_of(fused_kernel), P | {"w": w}, X, 1, composite="attnlrp"
        )
        return jnp.sum(r**2)

    slope, step = jax.grad(penalty)(P["w"]), 1e-6
    direction = jnp.cos(jnp.arange(20.0)).reshape(4, 5)
    ahead, behind = (penalty(P["w"] + s * direction) for s in (step, -step))
    np.testing.assert_allclose(
        jnp.vdot(slope, direction), (ahead - behind) / (2 * step), rtol=1e-6
    )


@jlrp.custom_relevance
def scaled_sum(x, w):
    return jnp.sum(x * w)


@scaled_sum.def_relevance
def by_size(r, x, y):
    values, w = x
    assert values.shape == w.shape == (4,) and y.shape == r.shape == ()
    return r * jnp.abs(values) / jnp.abs(values).sum(), None


def by_size_replica(x):
    share = jnp.abs(x) / jnp.abs(x).sum(-1, keepdims=True)
    return share * (x @ FLAG)[:, None]


VMAPS = {
    "one": lambda x: jax.vmap(scaled_sum, (0, None))(x, FLAG),
    "last axis": lambda x: jax.vmap(scaled_sum, (1, None))(x.T, FLAG),
    "of vmap": lambda x: jax.vmap(jax.vmap(scaled_sum, (0, None)), (0, None))(
        x[None], FLAG
    )[0],
    "of jit": lambda x: jax.vmap(jax.jit(scaled_sum), (0, None))(x, FLAG),
    "of both": lambda x: jax.vmap(scaled_sum)(x, jnp.broadcast_to(FLAG, x.shape)),
    "of checkpoint": lambda x: jax.vmap(jax.checkpoint(scaled_sum), (0, None))(x, FLAG),
    "of a loop": lambda x: jnp.stack([scaled_sum(row, FLAG) for row in x]),
}


@pytest.mark.parametrize("name", VMAPS)
def test_a_batch_of_calls_has_the_batch_of_rules(name):
    ours = jlrp.relevance(lambda p, x: VMAPS[name](x), (), X, jnp.ones(3))
    assert_equal(ours, by_size_replica(X))


def test_an_operand_that_a_batch_shares_gets_the_sum():
    @jlrp.custom_relevance
    def product(x, shared):
        return x * shared

    product.def_relevance(lambda r, x, y: (0.25 * r, 0.75 * r))
    seed = normal(3, 4)

    def fn(p, x):
        return jax.vmap(product, (0, None))(x["rows"], x["shared"])

    x = {"rows": X, "shared": FLAG}
    ours = jlrp.relevance(fn, (), x, seed)
    whole = X * FLAG[None] * seed
    assert_equal(ours, {"rows": 0.25 * whole, "shared": 0.75 * whole.sum(0)})
    nested = jax.vmap(jax.vmap(product, (None, 0)), (0, None))

    def outer(p, x):
        return nested(x["rows"], jnp.stack([x["shared"], 2.0 * x["shared"]]))

    seeds = normal(3, 2, 4)
    ours = jlrp.relevance(outer, (), x, seeds, composite=EXACT)
    whole = X[:, None] * jnp.stack([FLAG, 2.0 * FLAG])[None] * seeds
    assert_equal(ours["rows"], 0.25 * whole.sum(1))
    assert_equal(ours["shared"], 0.75 * whole.sum((0, 1)))


def test_pytrees_in_and_out():
    @jlrp.custom_relevance
    def crossed(tree, n):
        return {"sum": tree["a"] + tree["b"][0], "n": n + 1}, tree["b"][0] * 2.0

    @crossed.def_relevance
    def rule(r, x, y):
        (of_sum, of_double), (tree, _) = r, x
        assert set(of_sum) == {"sum", "n"} and set(tree) == {"a", "b"}
        assert of_sum["sum"].shape == of_double.shape == (3, 4)
        return {"a": of_sum["sum"], "b": (of_double,)}, None

    def fn(p, x):
        out, double = crossed({"a": x["a"], "b": (x["b"],)}, jnp.arange(2))
        return out["sum"] + double

    x = {"a": X, "b": 2 * X + 1}
    assert_equal(crossed({"a": X, "b": (X,)}, 1)[0]["sum"], 2 * X)
    seed = normal(3, 4)
    ours = jlrp.relevance(fn, (), x, seed, composite=EXACT)
    assert_equal(ours, {"a": (x["a"] + x["b"]) * seed, "b": 2 * x["b"] * seed})


def test_a_function_may_close_over_traced_values():
    def fn(p, x):
        scale = p["w"][0] ** 2

        @jlrp.custom_relevance
        def times(v):
            return v * scale[None] + jnp.arange(4.0)[None]

        times.def_relevance(lambda r, x, y: (r,))
        return times(x)

    seed, p = normal(3, 4), {"w": W}
    for explain in (jlrp.relevance, jax.jit(jlrp.relevance, static_argnums=0)):
        assert_equal(explain(fn, p, X, seed), fn(p, X) * seed)
    whole = jax.vmap(lambda x: fn(p, x[None])[0])(X)
    assert_equal(whole, fn(p, X))
    assert_equal(
        jax.grad(lambda p: fn(p, X).sum())(p)["w"][0], 2 * W[0] * X.sum(0), 1e-12
    )


def test_a_method_can_have_a_rule():
    class Layer:
        def __init__(self, w):
            self.w = w

        @jlrp.custom_relevance
        def apply(self, x):
            return x @ self.w

        @apply.def_relevance
        def rule(r, x, y):  # noqa: N805
            return None, jnp.broadcast_to(r.sum(-1, keepdims=True) / 4, (3, 4))

    jax.tree_util.register_pytree_node(
        Layer, lambda layer: ((layer.w,), None), lambda _, w: Layer(*w)
    )
    layer = Layer(W)
    assert_equal(layer.apply(X), X @ W)
    ours = jlrp.relevance(lambda p, x: p.apply(x), layer, X, jnp.ones((3, 4)))
    assert_equal(ours, jnp.broadcast_to((X @ W).sum(-1, keepdims=True) / 4, (3, 4)))
    assert Layer.apply.__name__ == "apply"


def test_the_decorated_function_keeps_its_name_and_document():
    assert fused_kernel.__name__ == "swish_norm"
    assert "fused" in fused_kernel.__doc__


# Errors.


def test_a_missing_rule_is_an_error_at_the_call():
    @jlrp.custom_relevance
    def lonely(x):
        return x

    with pytest.raises(jlrp.InputError, match="lonely.*def_relevance"):
        lonely(X)


WRONG = {
    "too many": lambda r, x, y: (r, r, r),
    "too few": lambda r, x, y: (r,),
    "no sequence": lambda r, x, y: r,
    "none at all": lambda r, x, y: None,
    "another shape": lambda r, x, y: (r[:1], None),
    "a number": lambda r, x, y: (0.0, None),
    "another tree": lambda r, x, y: ({"a": r}, r),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_rule_that_returns_what_does_not_fit_is_an_error(name):
    @jlrp.custom_relevance
    def broken(x, w):
        return x @ w

    broken.def_relevance(WRONG[name])
    assert_equal(broken(X, W), X @ W)
    with pytest.raises(jlrp.InputError, match="broken"):
        jlrp.relevance(lambda w, x: broken(x, w), W, X)
    with pytest.raises(jlrp.InputError, match="broken"):
        batched = jax.vmap(broken, (0, None))
        jlrp.relevance(lambda w, x: batched(x[None], w)[0], W, X)


def test_a_rule_may_give_none_to_every_argument():
    @jlrp.custom_relevance
    def sink(x):
        return x * 2.0

    sink.def_relevance(lambda r, x, y: (None,))
    seed = jnp.ones((3, 4))
    ours = jlrp.relevance(lambda p, x: sink(x) + x, (), X, seed, composite=EXACT)
    assert_equal(ours, X)


def test_a_rule_may_return_a_list_and_lower_precision():
    @jlrp.custom_relevance
    def doubled(x):
        return 2.0 * x

    doubled.def_relevance(lambda r, x, y: [r.astype(jnp.float32)])
    ours = jlrp.relevance(lambda p, x: doubled(x), (), X, jnp.ones((3, 4)))
    assert ours.dtype == X.dtype
    assert_equal(ours, 2 * X, 1e-6)


def test_a_changed_rule_is_not_taken_from_the_cache():
    def explain(rule):
        f = jlrp.custom_relevance(lambda x: x + 1.0)
        f.def_relevance(rule)
        return jlrp.relevance(lambda p, x: f(x), (), X, jnp.ones((3, 4)))

    one = explain(lambda r, x, y: (r,))
    two = explain(lambda r, x, y: (2.0 * r,))
    assert_equal(two, 2 * one)


def test_errors_point_at_the_users_line():
    f = jlrp.custom_relevance(lambda x: jnp.log(x))
    f.def_relevance(lambda r, x, y: (r,))
    ledger = jlrp.audit(
        lambda p, x: f(jlrp.tag(x, "x")), (), -jnp.abs(X), jnp.ones((3, 4))
    )
    (start, *_) = ledger.nonfinite
    assert "test_primitives.py" in start and "jlrp/ir/own_primitives.py" not in start
