"""The spelling kit: its twins are other programs of the same function, and it finds
what depends on a spelling."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import zoo
from jax import lax
from jax.extend.core import primitives as p

import jlrp
from jlrp import testing
from jlrp.testing import checking, rewriting
from jlrp.testing.evaluating import leaves_of

DRAW = zoo.Draw("kit")
W, V, X = DRAW(4, 6), DRAW(6, 3), DRAW(2, 4)
PARAMS = {"w": W, "v": V}


def mlp(params, x):
    return jax.nn.relu(x @ params["w"]) @ params["v"]


def equations(fn, *args):
    return [str(eqn) for eqn in jax.make_jaxpr(fn)(*args).eqns]


def names(jaxpr):
    """The primitives of a jaxpr, those in calls and loops too."""
    for eqn in jaxpr.eqns:
        yield eqn.primitive.name
        for inner in jax.extend.core.jaxprs_in_params(eqn.params):
            yield from names(getattr(inner, "jaxpr", inner))


# What the twins of each rewriting are tried on: between them, all apply.


def everything(params, x):
    """Something of every kind that a rewriting looks for."""
    h = x @ params["w"]
    h = h - h.mean(-1, keepdims=True)
    h = h / jnp.sqrt((h * h).sum(-1, keepdims=True) / 6 + 1e-2)
    s = jax.nn.softmax((h.T @ h) / 3.0)
    a, b = h[:, :2], h[:, 2:]
    a = jnp.concatenate([a @ s[:2, :2], jnp.tanh(b) * (0.5 - b)], -1)
    a = a[:, ::2] * jax.nn.sigmoid(a[:, ::2]) + (a[:, 1::2] + (h[:, 1::2] + 2.0))
    return jnp.log1p(jnp.exp(a)) @ params["v"][: a.shape[-1]]


ZOO = ("cnn", "mixture_of_top_experts")


@pytest.mark.relaxed
@pytest.mark.parametrize("name", ["everything", *ZOO])
def test_twins_are_other_programs_of_the_same_function(name):
    fn, params, x = (
        (everything, PARAMS, X) if name == "everything" else zoo.PROGRAMS[name]()
    )
    plain = jax.make_jaxpr(fn)(params, x)
    wanted = fn(params, x)
    found = testing.twins(fn, params, x)
    assert len(found) > 30
    for twin in found.values():
        assert str(jax.make_jaxpr(twin)(params, x)) != str(plain), twin.name
        (value,) = leaves_of(twin, params, x)
        np.testing.assert_allclose(value, wanted, rtol=1e-9, err_msg=twin.name)


def test_a_twin_is_a_function():
    twin = testing.twins(mlp, PARAMS, X, kinds="computed_flat")["computed_flat"]
    wanted = mlp(PARAMS, X)
    np.testing.assert_allclose(jax.jit(twin)(PARAMS, X), wanted)
    many = jnp.stack([X, 2 * X])
    np.testing.assert_allclose(
        jax.vmap(twin, (None, 0))(PARAMS, many)[1], mlp(PARAMS, 2 * X)
    )
    found, expected = (
        jax.grad(lambda x, f=f: f(PARAMS, x).sum())(X) for f in (twin, mlp)
    )
    np.testing.assert_allclose(found, expected)
    inside = jax.jit(lambda w: _closing_over(w)((), X))  # over what is traced
    np.testing.assert_allclose(inside(W), jnp.tanh(X @ W))
    np.testing.assert_allclose(inside(2 * W), jnp.tanh(X @ (2 * W)))
    larger = jnp.concatenate([X, X])  # another shape
    np.testing.assert_allclose(twin(PARAMS, larger), mlp(PARAMS, larger))


def _closing_over(w):
    fn = lambda _, x: jnp.tanh(x @ w)  # noqa: E731
    return testing.twins(fn, (), X, kinds="computed_flat")["computed_flat"]


def test_rewrites_inside_calls_loops_and_branches():
    def fn(w, x):
        def step(h, _):
            return jax.jit(jnp.tanh)(h @ w), None

        h = lax.scan(step, x, None, 2)[0]
        h = jax.checkpoint(jnp.tanh)(h)
        h = lax.cond(w.sum() > 0, jnp.tanh, jnp.tanh, h)
        return lax.while_loop(lambda h: h.sum() > 1e9, jnp.tanh, h)

    w = DRAW(4, 4)
    twin = testing.twins(fn, w, X, kinds="tanh_by_logistic")["tanh_by_logistic"]
    assert len(twin.sites) == 5
    found = list(names(jax.make_jaxpr(twin)(w, X).jaxpr))
    assert "tanh" not in found and found.count("logistic") == 5
    assert {"scan", "cond", "while", "jit"} <= set(found)
    np.testing.assert_allclose(twin(w, X), fn(w, X), rtol=1e-12)


def test_keeps_custom_derivatives():
    @jax.custom_jvp
    def f(x):
        return jnp.tanh(x)

    f.defjvp(lambda primals, tangents: (f(*primals), 7.0 * tangents[0]))
    twin = testing.twins(lambda _, x: f(x), (), X, kinds="tanh_by_logistic")
    twin = twin["tanh_by_logistic"]
    assert "logistic" in names(jax.make_jaxpr(twin)((), X).jaxpr)
    np.testing.assert_allclose(jax.grad(lambda x: twin((), x).sum())(X), 7.0)


def test_what_is_not_of_x_stays():
    """Neither parameters alone nor integers are written in other words."""
    fn = lambda w, x: x * jnp.tanh(w).sum()  # noqa: E731
    assert not testing.twins(fn, W, DRAW(3), kinds=["tanh_by_logistic", "sum_added_up"])
    fn = lambda w, i: w[i + i]  # noqa: E731
    twins = testing.twins(fn, W[:, 0], jnp.array([1, 0]), kinds="reshaped_and_back")
    assert [site[0] for site in twins["reshaped_and_back"].sites] == ["gather"]


def test_constants_are_made_inside():
    fn = lambda _, x: x.sum(-1)  # noqa: E731
    twin = testing.twins(fn, (), X, kinds="sum_as_dot_with_ones")[
        "sum_as_dot_with_ones"
    ]
    assert not jax.make_jaxpr(twin)((), X).consts


def test_kinds_by_name_and_family():
    families = {kind.family for kind in testing.kinds().values()}
    assert families == {"calls", "dense", "functions", "movement", "products", "sums"}
    assert all(kind.summary for kind in testing.kinds().values())
    twins = testing.twins(mlp, PARAMS, X, kinds=["calls", "relu_times_step"])
    found = {twin.rewriting.family for twin in twins.values()}
    assert found == {"calls", "functions"}
    assert "relu_times_step" in twins


# A rule that depends on a spelling is found; one that does not is not.


def spelled(rule):
    """attnlrp, but for tanh, which has a rule of its own."""
    return jlrp.Composite([(p.tanh_p, rule)], base="attnlrp")


def test_finds_a_rule_that_depends_on_a_spelling():
    fn = lambda params, x: jnp.tanh(x @ params["w"]) @ params["v"]  # noqa: E731
    table = testing.check_spellings(
        fn,
        PARAMS,
        X,
        composites={"broken": spelled(jlrp.rules.Gradient()), "attnlrp": "attnlrp"},
        kinds=["tanh_by_logistic", "operands_of_dot_swapped", "jit_around"],
    )
    assert not table.ok and not table
    assert {(row.twin, row.composite) for row in table.differences} == {
        ("tanh_by_logistic", "broken")
    }
    (row,) = table.differences
    assert row.status in ("differs", "raises")
    if row.status == "differs":
        assert row.error > 1e-3
    assert "test_testing.py" in row.where
    with pytest.raises(jlrp.SpellingError, match="tanh_by_logistic"):
        table.raise_if_different()


def test_names_the_first_place():
    """Of two tanh, only the second is where the rule makes a difference."""

    def fn(params, x):
        h = jax.named_scope("first")(jnp.tanh)(x @ params["w"])
        return jax.named_scope("second")(jnp.tanh)(h @ params["v"]) @ params["v"].T

    rule = jlrp.rules.Gradient()
    composite = jlrp.Composite([(("second", p.tanh_p), rule)], base="attnlrp")
    table = testing.check_spellings(
        fn, PARAMS, X, composites=[composite], kinds="tanh_of_exponentials"
    )
    (row,) = table.differences
    assert row.where.startswith("second (")


def test_says_nothing_where_nothing_differs():
    table = testing.check_spellings(
        mlp, PARAMS, X, composites="attnlrp", kinds=["calls", "relu_times_step"]
    )
    assert table and not table.differences
    assert str(table).endswith("0 differ") and "\n" not in str(table)
    assert all(row.status == "equal" and row.error <= 1e-9 for row in table.rows)
    table.raise_if_different()


def test_documented_differences_are_shown():
    table = testing.check_spellings(
        mlp,
        PARAMS,
        X,
        composites=["attnlrp", "excitation_backprop"],
        kinds="kernel_split_by_inputs",
    )
    assert table.ok
    by_composite = {row.composite: row for row in table.rows}
    assert by_composite["attnlrp"].status == "equal"
    row = by_composite["excitation_backprop"]
    assert row.status == "documented" and row.error > 1e-3
    assert "contraction" in row.why and "contraction" in str(table)


def test_documented_only_where_the_rules_force_it():
    twin = testing.twins(mlp, PARAMS, X, kinds="kernel_split_by_inputs")
    twin = twin["kernel_split_by_inputs"]
    assert twin.documented("attnlrp") is None
    assert twin.documented("cp_lrp") is None
    assert twin.documented("gradient_input") is None
    assert twin.documented("excitation_backprop")
    twin = testing.twins(mlp, PARAMS, X, kinds="computed_flat")["computed_flat"]
    assert all(twin.documented(name) is None for name in checking.COMPOSITES)


def test_a_twin_of_another_function_is_our_fault(monkeypatch):
    wrong = testing.Rewriting(
        "wrong", "sums", "", lambda site: site.inputs[0], primitives={p.add_p}
    )
    monkeypatch.setitem(rewriting.REWRITINGS, "wrong", wrong)
    fn = lambda w, x: (x + 1.0) @ w  # noqa: E731
    with pytest.raises(jlrp.SpellingError, match="'wrong' computes another value"):
        testing.check_spellings(fn, W, X, kinds="wrong", composites="attnlrp")


def test_what_a_twin_raises_is_a_difference(monkeypatch):
    unknown = jax.extend.core.Primitive("unknown_to_jlrp")
    unknown.def_impl(lambda x: x)
    unknown.def_abstract_eval(lambda x: x)
    odd = testing.Rewriting(
        "odd",
        "sums",
        "",
        lambda s: unknown.bind(s.computed()[0]),
        primitives={p.tanh_p},
    )
    monkeypatch.setitem(rewriting.REWRITINGS, "odd", odd)
    fn = lambda w, x: jnp.tanh(x) @ w  # noqa: E731
    table = testing.check_spellings(fn, W, X, kinds="odd", composites="attnlrp")
    (row,) = table.differences
    assert row.status == "raises" and np.isnan(row.error)
    assert "UnsupportedPrimitiveError" in row.why and "unknown_to_jlrp" in row.why
    assert "unsupported" in str(table)


# Arguments.


def test_refuses_an_unknown_kind():
    with pytest.raises(jlrp.InputError, match="'reshaped'.*no rewriting"):
        testing.twins(mlp, PARAMS, X, kinds=["reshaped"])


def test_refuses_what_is_no_function():
    with pytest.raises(jlrp.InputError, match="fn is a dict"):
        testing.check_spellings(PARAMS, PARAMS, X)


def test_refuses_a_point_near_a_kink():
    x = X.at[0].set(0.0)
    with pytest.raises(jlrp.InputError, match="max at .*test_testing.py.*margin="):
        testing.check_spellings(mlp, PARAMS, x, kinds="calls")
    assert testing.check_spellings(
        mlp, PARAMS, x, kinds="jit_around", composites="attnlrp", margin=0
    )


def test_refuses_narrow_floats_that_it_cannot_widen():
    def fn(w, x):
        return (x.astype(jnp.float32) @ w.astype(jnp.float32)).sum(-1)

    with pytest.raises(jlrp.InputError, match="computes in float32 at .*tolerance="):
        testing.check_spellings(fn, W, X, kinds="calls")
    assert testing.check_spellings(
        fn, W, X, kinds="jit_around", composites="attnlrp", tolerance=1e-4
    )


def test_names_bfloat16_where_fn_computes_in_it():
    def fn(w, x):
        return (x.astype(jnp.bfloat16) @ w.astype(jnp.bfloat16)).sum(-1)

    with pytest.raises(jlrp.InputError, match="computes in bfloat16 at "):
        testing.check_spellings(fn, W, X, kinds="calls")


def test_widens_float32():
    params, x = jax.tree.map(lambda a: a.astype(jnp.float32), (PARAMS, X))
    with jax.enable_x64(False):
        table = testing.check_spellings(
            mlp, params, x, kinds="operands_of_dot_swapped", composites="attnlrp"
        )
    assert table and max(row.error for row in table.rows) < 1e-13


# Kinks.


@pytest.mark.parametrize(
    ("fn", "x", "primitive"),
    [
        (jnp.abs, [1.0, 1e-5], "abs"),
        (jax.nn.relu, [1.0, -1e-5], "max"),
        (lambda x: 1 / x, [1.0, 1e-5], "div"),
        (lambda x: x.max(), [1.0, 1.0 + 1e-5], "reduce_max"),
        (lambda x: jnp.where(x > 0.5, x, 0.0), [1.0, 0.5 + 1e-5], "gt"),
        (lambda x: lax.top_k(x, 1)[0], [1.0, 1.0 + 1e-5], "top_k"),
        (lambda x: x * jnp.floor(x), [1.5, 2.0 - 1e-5], "floor"),
        (lambda x: x**-2, [1.0, 1e-5], "integer_pow"),
        (lambda x: lax.rsqrt(x), [1.0, 1e-5], "rsqrt"),
        (lambda x: jnp.clip(x, -3.0, 1.5), [1.0, 1.5 - 1e-5], "min"),
    ],
)
def test_kinks(fn, x, primitive):
    (kink,) = testing.kinks(lambda _, x: fn(x), (), jnp.array(x))
    assert kink.primitive == primitive
    np.testing.assert_allclose(kink.distance, 1e-5, rtol=1e-6)
    assert "test_testing.py" in kink.where
    away = [1.25, 0.75]
    assert not testing.kinks(lambda _, x: fn(x), (), jnp.array(away))


def test_kinks_in_loops_and_branches():
    def fn(_, x):
        h = lax.scan(lambda h, _: (jnp.abs(h) - 1.0, None), x, None, 3)[0]
        return lax.cond(h.sum() > -1e9, jax.nn.relu, jnp.sin, h)

    assert not testing.kinks(fn, (), jnp.array([2.5]))
    found = testing.kinks(fn, (), jnp.array([1.0 + 1e-5]))
    assert {kink.primitive for kink in found} == {"abs", "max"}  # at the second step


def test_what_stops_is_no_kink():
    """The maximum that a softmax subtracts may be a tie."""
    assert not testing.kinks(lambda _, x: jax.nn.softmax(x), (), jnp.ones(3))
    assert testing.kinks(lambda _, x: x.max(), (), jnp.ones(3))


def test_windows_have_gaps():
    pool = lambda _, x: lax.reduce_window(x, -jnp.inf, lax.max, (2,), (2,), "SAME")  # noqa: E731
    assert not testing.kinks(pool, (), jnp.array([1.0, 2.0, 2.0, 5.0, 7.0]))
    (kink,) = testing.kinks(pool, (), jnp.array([1.0, 2.0, 5.0, 5.0 + 1e-4, 7.0]))
    np.testing.assert_allclose(kink.distance, 1e-4, rtol=1e-6)


@pytest.mark.relaxed
def test_evaluates_what_jax_computes():
    """Relevance in numpy is that of JAX."""
    for name in ("cnn_with_max_pooling", "mixture_of_top_experts", "linen_gru"):
        fn, params, x = zoo.PROGRAMS[name]()
        for composite in ("attnlrp", "dynamic_lrp"):
            explain = lambda p, x, f=fn, c=composite: jlrp.relevance(  # noqa: E731
                f, p, x, composite=c
            )
            (found,) = leaves_of(explain, params, x)
            wanted = np.asarray(jax.jit(explain)(params, x))
            np.testing.assert_allclose(found, wanted, rtol=1e-9, atol=1e-12)
