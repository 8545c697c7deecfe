"""Every rule equals the dense replica that follows its formula."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import replicas
from jax import lax

import jlrp
from jlrp import rules

NHWC = ("NHWC", "HWIO", "NHWC")
NCHW = ("NCHW", "OIHW", "NCHW")
SEEDS = (0, 1)
S = 1e-2  # stabilisers of this size are visible


def conv(x, w, strides=(1, 1), padding="VALID", dims=NHWC, **options):
    return lax.conv_general_dilated(
        x, w, strides, padding, dimension_numbers=dims, **options
    )


def batch_norm_flax(p, h):
    h = h - p["mean"].reshape(1, 1, 1, -1)
    h = h * (lax.rsqrt(p["var"] + 1e-3) * p["scale"]).reshape(1, 1, 1, -1)
    return h + p["shift"].reshape(1, 1, 1, -1)


def batch_norm_torch(p, h):  # channels first
    channels = (1, -1, 1, 1)
    h = h - p["mean"].reshape(channels)
    h = h / jnp.sqrt(p["var"].reshape(channels) + 1e-3)
    return h * p["scale"].reshape(channels) + p["shift"].reshape(channels)


# name: shapes of x, w and b; the map of x
MAPS = {
    "dense": ((2, 6), (6, 5), (1, 5), lambda p, x: x @ p["w"] + p["b"]),
    "no bias": ((2, 6), (6, 5), (1, 5), lambda p, x: x @ p["w"]),
    "einsum, two axes": (
        (2, 3, 4),
        (5, 4, 3),
        (1, 5),
        lambda p, x: jnp.einsum("bij,oji->bo", x, p["w"]) + p["b"],
    ),
    "einsum, batch axis in the middle": (
        (2, 3, 4),
        (4, 2, 3),
        (1, 1, 4),
        lambda p, x: jnp.einsum("bij,joi->obj", x, p["w"]) + p["b"],
    ),
    "kernel of each example": (
        (2, 4),
        (2, 3, 4),
        (2, 3),
        lambda p, x: p["b"] - jnp.einsum("noi,ni->no", p["w"], x),
    ),
    "kernel on the left": (
        (6, 2),
        (5, 6),
        (5, 1),
        lambda p, x: p["w"] @ x + p["b"],
    ),
    "conv, strided": (
        (2, 5, 5, 2),
        (3, 3, 2, 3),
        (1, 1, 1, 3),
        lambda p, x: conv(x, p["w"], (2, 2), "SAME") + p["b"],
    ),
    "conv, channels first, groups": (
        (2, 4, 4, 4),
        (4, 2, 3, 3),
        (1, 4, 1, 1),
        lambda p, x: (
            conv(x, p["w"], padding="SAME", dims=NCHW, feature_group_count=2) + p["b"]
        ),
    ),
    "conv, depthwise, uneven padding": (
        (1, 4, 4, 3),
        (2, 3, 1, 6),
        (1, 1, 1, 6),
        lambda p, x: (
            conv(x, p["w"], (1, 2), [(1, 0), (0, 2)], feature_group_count=3) + p["b"]
        ),
    ),
    "conv, dilated": (
        (1, 5, 5, 2),
        (2, 2, 2, 2),
        (1, 1, 1, 2),
        lambda p, x: conv(x, p["w"], rhs_dilation=(2, 3)) + p["b"],
    ),
    "conv, batch groups": (
        (4, 3, 3, 2),
        (2, 2, 2, 4),
        (1, 1, 1, 4),
        lambda p, x: conv(x, p["w"], batch_group_count=2) + p["b"],
    ),
    "conv, one dimension": (
        (2, 6, 2),
        (3, 2, 3),
        (1, 1, 3),
        lambda p, x: (
            lax.conv_general_dilated(
                x, p["w"], (2,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
            )
            + p["b"]
        ),
    ),
    "conv, transposed": (
        (1, 3, 3, 2),
        (3, 3, 2, 3),
        (1, 1, 1, 3),
        lambda p, x: (
            lax.conv_transpose(x, p["w"], (2, 2), "SAME", dimension_numbers=NHWC)
            + p["b"]
        ),
    ),
    "conv of a parameter with x": (
        (2, 2, 2, 3),
        (1, 4, 4, 2),
        (1, 1, 1, 3),
        lambda p, x: conv(p["w"], x) + p["b"],
    ),
    "conv and batch norm": (
        (1, 4, 4, 2),
        (3, 3, 2, 3),
        (1, 1, 1, 3),
        lambda p, x: batch_norm_flax(p, conv(x, p["w"], padding="SAME") + p["b"]),
    ),
    "conv and batch norm, channels first": (
        (1, 2, 4, 4),
        (3, 2, 3, 3),
        (1, 3, 1, 1),
        lambda p, x: batch_norm_torch(p, conv(x, p["w"], (2, 2), "SAME", NCHW)),
    ),
}
BIASES = ("absorb", "ignore", "split")
WITH_BIAS = {
    "Gamma": (rules.Gamma, replicas.gamma, {"gamma": 0.7}),
    "GammaMontavon": (rules.GammaMontavon, replicas.gamma_montavon, {"gamma": 0.7}),
    "GammaMontavon, bias kept": (
        rules.GammaMontavon,
        replicas.gamma_montavon,
        {"gamma": 0.7, "gamma_bias": False},
    ),
    "AlphaBeta": (
        rules.AlphaBeta,
        replicas.alpha_beta,
        {"alpha": 1.5, "beta": 0.5},
    ),
    "ZPlus": (rules.ZPlus, replicas.z_plus, {}),
    "WSquare": (rules.WSquare, replicas.w_square, {}),
}


EVERY_OPTION = ("dense", "conv, strided", "conv and batch norm")


def rule_values(shape, every_option):
    """Name: (rule value, its replica as a function of x, w, b, r) for x of a shape."""
    table = {}
    options = [("absorb", S)]
    if every_option:  # what bias does is seen with a stabiliser
        options += [("ignore", S), ("split", S), ("absorb", 0.0)]
    for bias, s in options:
        for name, (rule, replica, options) in WITH_BIAS.items():
            table[f"{name} {bias} {s}"] = (
                rule(**options, bias=bias, stabilizer=s),
                functools.partial(replica, s=s, bias=bias, **options),
            )
        table[f"Epsilon {bias} {s}"] = (
            rules.Epsilon(s, bias=bias),
            functools.partial(replicas.epsilon, s=s, bias=bias),
        )
    for bias in BIASES if every_option else ():
        table[f"Zero {bias}"] = (
            rules.Zero(bias=bias),
            functools.partial(replicas.epsilon, s=0.0, bias=bias),
        )
    low = np.random.default_rng(5).uniform(-4, -3, (1, *shape[1:]))
    for s, a in [(S, low), *([(0.0, -3.0)] if every_option else [])]:
        table[f"ZBox {s} {np.ndim(a)}"] = (
            rules.ZBox(a, 3.5, stabilizer=s),
            functools.partial(
                replicas.z_box, s=s, low=np.broadcast_to(a, shape).reshape(-1), high=3.5
            ),
        )
    table[f"Flat {S}"] = (rules.Flat(S), functools.partial(replicas.flat, s=S))
    return table


def normal(rng, shape):
    return jnp.asarray(rng.normal(size=shape))


def sample(name, seed):
    shape, w_shape, b_shape, _ = MAPS[name]
    rng = np.random.default_rng([seed, len(name)])
    norms = {k: normal(rng, b_shape) for k in ("mean", "scale", "shift")}
    p = {"w": normal(rng, w_shape), "b": normal(rng, b_shape), **norms}
    return p | {"var": 0.3 + jnp.square(normal(rng, b_shape))}, normal(rng, shape)


ALL_MAPS = [
    *((name, "any sign") for name in MAPS),
    *((name, "behind a ReLU") for name in (*EVERY_OPTION, "conv, transposed")),
]


@pytest.mark.parametrize(("name", "before"), ALL_MAPS, ids=map("; ".join, ALL_MAPS))
def test_linear_rules(name, before):
    """All rules in one program, which compiles much faster than one program each."""
    shape, *_, fn = MAPS[name]
    kind = "conv" if name.startswith("conv") else "dense"
    table = rule_values(shape, name in EVERY_OPTION)
    arrives_as = "one" if before == "any sign" else "score"

    def model(p, x):  # ReLU passes relevance
        return fn(p, jax.nn.relu(x) if before == "behind a ReLU" else x)

    @jax.jit
    def explain(p, x, target):
        return {
            key: jlrp.relevance(
                model,
                p,
                x,
                target,
                composite=jlrp.Composite([(kind, rule)], base="epsilon"),
                seed=arrives_as,
            )
            for key, (rule, _) in table.items()
        }

    for seed in SEEDS:
        p, x = sample(name, seed)
        z = fn(p, x)
        target = normal(np.random.default_rng(seed), z.shape)
        ours = explain(p, x, target)
        # Relevance arrives as a value or as a multiplier of z.
        h = np.maximum(x, 0) if before == "behind a ReLU" else np.asarray(x)
        w, b = replicas.dense_form(fn, p, x)
        r = np.asarray(target).reshape(-1)
        r = r if arrives_as == "one" else r * (w @ h.reshape(-1) + b)
        for key, (_, replica) in table.items():
            expected = replica(h.reshape(-1), w, b, r).reshape(shape)
            scale = np.abs(expected).max()
            np.testing.assert_allclose(
                ours[key], expected, rtol=0, atol=1e-10 * scale, err_msg=key
            )


@pytest.mark.parametrize("before", ["any sign", "behind a ReLU"])
@pytest.mark.parametrize("name", EVERY_OPTION)
@pytest.mark.parametrize("arrives_as", ["score", "one"])
def test_rules_before_a_relu(name, before, arrives_as):
    """Of a multiplier only z > 0 gets anything; a value passes a ReLU for every z."""
    shape, *_, fn = MAPS[name]
    kind = "conv" if name.startswith("conv") else "dense"
    table = rule_values(shape, every_option=True)
    relu = jax.nn.relu

    def model(p, x):
        return relu(fn(p, relu(x) if before == "behind a ReLU" else x))

    p, x = sample(name, 3)
    h = np.maximum(x, 0) if before == "behind a ReLU" else np.asarray(x)
    w, b = replicas.dense_form(fn, p, x)
    z = (w @ h.reshape(-1) + b).reshape(jax.eval_shape(fn, p, x).shape)
    target = normal(np.random.default_rng(4), z.shape)
    r = target * np.maximum(z, 0) if arrives_as == "score" else target

    @jax.jit
    def explain(p, x):
        return {
            key: jlrp.relevance(
                model,
                p,
                x,
                target,
                composite=jlrp.Composite([(kind, rule)], base="epsilon"),
                seed=arrives_as,
            )
            for key, (rule, _) in table.items()
        }

    for key, ours in explain(p, x).items():
        expected = table[key][1](h.reshape(-1), w, b, np.asarray(r).reshape(-1))
        assert_close(ours, expected.reshape(shape), err_msg=key)


@pytest.mark.parametrize("rare", ["positive", "negative"])
@pytest.mark.parametrize(
    "rule", [rules.Gamma(0.25), rules.AlphaBeta(2, 1), rules.ZPlus()], ids=repr
)
@pytest.mark.parametrize("before", ["any sign", "behind a ReLU"])
def test_rare_signs_keep_their_digits(rule, rare, before):
    """One product of 300 has the other sign and is small, in float32."""
    rng = np.random.default_rng(0)
    x, w = rng.uniform(0.5, 1.5, (4, 300)), rng.uniform(0.5, 1.5, (300, 5))
    if before == "any sign":
        signs = np.where(np.arange(300) % 2, 1.0, -1.0)
        x, w = x * signs, w * signs[:, None]
    w[7] *= -1e-3
    w = w if rare == "negative" else -w

    def model(w, x):
        return (jax.nn.relu(x) if before == "behind a ReLU" else x) @ w

    composite = jlrp.Composite([("dense", rule)], base="epsilon")
    single, double = (
        jlrp.relevance(
            model,
            w.astype(dtype),
            x.astype(dtype),
            np.ones((4, 5), dtype),
            composite=composite,
        )
        for dtype in (np.float32, np.float64)
    )
    np.testing.assert_allclose(single, double, rtol=3e-5, atol=3e-6)


@pytest.mark.parametrize("before", [jnp.tanh, jax.nn.relu])
def test_a_batch_of_examples_decides_once(before):
    """Under vmap, too, a branch is run or not: a batched predicate would run both."""
    rng = np.random.default_rng(0)
    w, x = rng.normal(size=(100, 5)), rng.normal(size=(4, 100))
    w[:, 2] = np.abs(w[:, 2]) + 0.1  # behind a ReLU no product is negative
    composite = jlrp.Composite([("dense", rules.AlphaBeta())], base="epsilon")

    def explain(x):
        return jlrp.relevance(
            lambda w, x: before(x) @ w, w, x, jnp.ones(5), composite=composite
        )

    program = str(jax.make_jaxpr(jax.vmap(explain))(x))
    assert "cond[" in program and "bool[4] = any_unbatched" not in program
    one_by_one = jnp.stack([explain(row) for row in x])
    np.testing.assert_allclose(jax.vmap(explain)(x), one_by_one, rtol=1e-9, atol=1e-12)
    slope = jax.grad(lambda x: explain(x)[3])(jnp.asarray(x[0]))
    assert jnp.isfinite(slope).all()


def test_sign_fact_is_used_by_these_models():
    """The tables above test both forms of the rules: of any sign, and halved."""
    for name, (*_, fn) in MAPS.items():
        p, x = sample(name, 0)
        target = jnp.ones(jax.eval_shape(fn, p, x).shape)
        (any_sign,) = jlrp.inspect(fn, p, x, target).operations[-1:]
        behind = functools.partial(lambda fn, p, x: fn(p, jax.nn.relu(x)), fn)
        (nonnegative,) = jlrp.inspect(behind, p, x, target).operations[-1:]
        assert "nonnegative" not in any_sign.facts, name
        assert "nonnegative" in nonnegative.facts, name


def explained(fn, x, target, *pairs, params=(), base="epsilon", seed="score"):
    composite = jlrp.Composite(pairs, base=base)
    return jlrp.relevance(fn, params, x, target, composite=composite, seed=seed)


def both_arrivals(fn, x, target, *pairs, **options):
    """Relevance if ``target`` arrives as a value, and as a multiplier of the output.

    Equal unless a rule treats them apart: the multiplier is made from the value.
    """
    y = jax.eval_shape(functools.partial(fn, options.get("params", ())), x)
    assert y.shape == target.shape
    out = fn(options.get("params", ()), x)
    as_value = explained(fn, x, target, *pairs, seed="one", **options)
    as_multiplier = explained(fn, x, target / out, *pairs, **options)
    return as_value, as_multiplier


def assert_close(ours, expected, tolerance=1e-10, **options):
    def check(a, b):
        scale = np.abs(b).max()
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * scale, **options)

    jax.tree.map(check, ours, expected)


ACTIVATIONS = {
    "tanh": (jnp.tanh, lambda v: 1 - np.tanh(v) ** 2),
    "silu": (
        jax.nn.silu,
        lambda v: (1 + np.exp(-v) * (1 + v)) / (1 + np.exp(-v)) ** 2,
    ),
    "leaky ReLU": (
        lambda v: jax.nn.leaky_relu(v, 0.1),
        lambda v: np.where(v > 0, 1, 0.1),
    ),
    "sigmoid": (jax.nn.sigmoid, lambda v: np.exp(-v) / (1 + np.exp(-v)) ** 2),
    "exp": (jnp.exp, np.exp),
    "cube": (lambda v: v**3, lambda v: 3 * v**2),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(name):
    function, slope = ACTIVATIONS[name]
    x, r = (normal(np.random.default_rng([6, i]), (7,)) for i in (0, 1))
    expected = {
        rules.Pass(): r,
        rules.Gradient(): x * slope(x) / function(x) * r,
        rules.NativeGradient(): slope(x) * r,
        rules.Stop(): r * 0,
    }
    for rule, relevance in expected.items():
        for ours in both_arrivals(lambda _, x: function(x), x, r, ("activation", rule)):
            assert_close(ours, relevance, err_msg=repr(rule))


def test_activations_at_zero():
    """f(x) / x has the limit f'(0); a value passes where its multiplier cannot."""
    x = jnp.asarray([0.0, -0.0, 1.5])

    def multiplier(function):
        seed = jnp.ones(3)
        slope = jax.grad(
            lambda t: jlrp.relevance(lambda _, x: function(x), (), t, seed).sum()
        )
        return slope(x)[0]  # d(x m(x))/dx at 0 is m(0)

    assert multiplier(jnp.tanh) == pytest.approx(1.0)
    assert multiplier(jax.nn.gelu) == pytest.approx(0.5)
    assert multiplier(jax.nn.silu) == pytest.approx(0.5)
    assert multiplier(lambda v: jnp.sin(2 * v)) == pytest.approx(2.0)
    assert multiplier(jnp.cbrt) == 0  # the limit is infinite


A_B = {"a": (3, 4), "b": (3, 4)}
ROW = {"a": (3, 4), "b": (1, 4)}  # b is broadcast
# name: shapes, function of a and b, |b|'s part of Absolute
PRODUCTS = {
    "product": (A_B, lambda a, b: a * b, np.abs),
    "quotient": (A_B, lambda a, b: a / b, lambda b: 1 / np.abs(b)),
    "broadcast product": (ROW, lambda a, b: a * b, np.abs),
    "broadcast quotient": (ROW, lambda a, b: a / b, lambda b: 1 / np.abs(b)),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_elementwise_products(name):
    shapes, function, size = PRODUCTS[name]
    rng = np.random.default_rng(7)
    x = {k: normal(rng, shape) for k, shape in shapes.items()}
    r = normal(rng, (3, 4))

    def fn(_, x):
        return function(x["a"], x["b"])

    y = np.asarray(fn((), x))
    kept = r * y / replicas.stabilized(y, S)

    def share(part, name):
        parts = np.broadcast_to(part, (3, 4))
        return parts.sum(0, keepdims=True) if shapes[name][0] == 1 else parts

    sizes = np.abs(x["a"]), np.broadcast_to(size(x["b"]), (3, 4))
    total = sizes[0] + sizes[1] + S
    expected = {
        rules.Uniform(): [r / 2, r / 2],
        rules.Uniform(S): [kept / 2, kept / 2],
        rules.Absolute(S): [sizes[0] / total * r, sizes[1] / total * r],
    }
    for rule, (of_a, of_b) in expected.items():
        wanted = {"a": share(of_a, "a"), "b": share(of_b, "b")}
        for ours in both_arrivals(fn, x, r, ("product", rule)):
            assert_close(ours, wanted, err_msg=repr(rule))


def test_gate_gives_all_to_the_signal():
    rng = np.random.default_rng(8)
    x = {k: normal(rng, (3, 4)) for k in "ab"}
    r = normal(rng, (3, 4))
    zero = jnp.zeros_like(r)
    gated = [
        (lambda _, x: x["a"] * jax.nn.sigmoid(x["b"]), {"a": r, "b": zero}),
        (lambda _, x: jax.nn.silu(x["a"]) * x["b"], {"a": zero, "b": r}),
        (lambda _, x: x["a"] * x["b"], {"a": r / 2, "b": r / 2}),
    ]
    for fn, expected in gated:
        for ours in both_arrivals(fn, x, r, ("product", rules.Gate())):
            assert_close(ours, expected)


@pytest.mark.parametrize("s", [0.0, S])
def test_contractions_share_every_term(s):
    """``R^A_ij = sum_k A_ij B_jk R_ik / (2 (O_ik + s))`` and likewise for B."""
    rng = np.random.default_rng(9)
    x = {"a": normal(rng, (2, 3, 4)), "b": normal(rng, (2, 4, 5))}
    r = normal(rng, (2, 3, 5))

    def fn(_, x):
        return jnp.einsum("nij,njk->nik", x["a"], x["b"])

    terms = np.asarray(x["a"])[..., None] * np.asarray(x["b"])[:, None]
    share = np.asarray(r) / replicas.stabilized(terms.sum(2), s) / 2
    expected = {
        "a": np.einsum("nijk,nik->nij", terms, share),
        "b": np.einsum("nijk,nik->njk", terms, share),
    }
    for ours in both_arrivals(fn, x, r, ("product", rules.Uniform(s))):
        assert_close(ours, expected)


# Sums as (function, its terms: one array an operand, terms along the last axis).


def windows(x):
    return x.reshape(2, 2, 2, 2, 2).transpose(0, 1, 3, 2, 4).reshape(2, 2, 2, 4)


def average_pool(x):
    return lax.reduce_window(x, 0.0, lax.add, (1, 2, 2), (1, 2, 2), "VALID") / 4


def unwindowed(terms):
    return terms.reshape(2, 2, 2, 2, 2).transpose(0, 1, 3, 2, 4).reshape(2, 4, 4)


SUMS = {
    "sum": (lambda x: x.sum(-1), lambda x: x, lambda r: r),
    "mean": (lambda x: x.mean(-1), lambda x: x / 4, lambda r: r),
    "average pool": (average_pool, lambda x: windows(x) / 4, unwindowed),
}


@pytest.mark.parametrize("name", SUMS)
def test_sums_over_axes(name):
    fn, terms_of, back = SUMS[name]
    rng = np.random.default_rng(10)
    x = normal(rng, (2, 4, 4))
    terms = np.asarray(terms_of(x))
    y = terms.sum(-1)
    r = normal(rng, y.shape)
    kind = {"sum": "sum", "mean": "mean", "average pool": "avg_pool"}[name]
    expected = {
        rules.Zero(): terms / y[..., None],
        rules.Epsilon(S): terms / replicas.stabilized(y, S)[..., None],
        rules.Flat(0.0): np.full_like(terms, 1 / terms.shape[-1]),
    }
    if name == "sum":
        expected[rules.Absolute(S)] = (
            np.abs(terms) / (np.abs(terms).sum(-1) + S)[..., None]
        )
    for rule, shares in expected.items():
        wanted = back(shares * np.asarray(r)[..., None])
        for ours in both_arrivals(lambda _, x: fn(x), x, r, (kind, rule)):
            assert_close(ours, wanted, err_msg=repr(rule))


def test_sums_of_values():
    rng = np.random.default_rng(11)
    x = {k: normal(rng, (3, 4)) for k in "abc"}
    r = normal(rng, (3, 4))
    shift = normal(rng, (1, 4))

    def fn(p, x):
        return (x["a"] - x["b"]) + (x["c"] + p) - x["a"] / 4

    terms = np.stack([0.75 * x["a"], -x["b"], x["c"]])
    y = np.asarray(fn(shift, x))
    norm = terms * np.asarray(r) / replicas.stabilized(y, S)
    for rule, shares in {
        rules.Zero(): terms * np.asarray(r) / y,
        rules.Epsilon(S): norm,
        rules.Stop(): terms * 0,
    }.items():
        wanted = dict(zip("abc", shares, strict=True))
        for ours in both_arrivals(fn, x, r, ("add", rule), params=shift):
            assert_close(ours, wanted, err_msg=repr(rule))


def test_absolute_sums_of_values():
    rng = np.random.default_rng(12)
    x = {k: normal(rng, (3, 4)) for k in "abc"}
    r = normal(rng, (3, 4))
    expected = dict(
        zip("abc", replicas.absolute(np.stack([*x.values()]), r, S), strict=True)
    )
    for fn in (
        lambda _, x: x["a"] - x["b"] + x["c"],
        lambda _, x: x["a"] + (x["c"] + x["b"]),
    ):
        for ours in both_arrivals(fn, x, r, ("add", rules.Absolute(S))):
            assert_close(ours, expected)


@pytest.mark.parametrize("reverse", [False, True])
def test_cumsum(reverse):
    """``R_i = x_i sum_{j >= i} R_j / (y_j + eps)``."""
    rng = np.random.default_rng(13)
    x, r = normal(rng, (2, 5)), normal(rng, (2, 5))
    order = slice(None, None, -1) if reverse else slice(None)
    y = np.cumsum(x[:, order], 1)[:, order]
    expected = np.zeros((2, 5))
    for i, j in itertools.product(range(5), range(5)):
        if (j <= i) if reverse else (j >= i):
            expected[:, i] += x[:, i] * r[:, j] / replicas.stabilized(y[:, j], S)
    fn = functools.partial(lax.cumsum, axis=1, reverse=reverse)
    for ours in both_arrivals(lambda _, x: fn(x), x, r, ("sum", rules.Epsilon(S))):
        assert_close(ours, expected)


def pooled(x, padding="VALID"):
    return lax.reduce_window(x, -jnp.inf, lax.max, (2, 2), (2, 1), padding)


ROWS = jnp.asarray([2, 0, 0, 3, 2])
MASK = jnp.asarray([[True, False, True, True]])
# Every output element is an element of x (shape (4, 4)), or a constant.
MOVES = {
    "max pooling": pooled,
    "max pooling, padded": lambda x: pooled(x, "SAME"),
    "min pooling": lambda x: lax.reduce_window(
        x, jnp.inf, lax.min, (2, 2), (2, 2), "VALID"
    ),
    "max over axes": lambda x: x.max(0),
    "min over axes": lambda x: x.min((0, 1)),
    "maximum": lambda x: jnp.maximum(x, x[::-1]),
    "maximum with constants": lambda x: jnp.maximum(x, 0.25 * jnp.ones((4, 1))),
    "minimum of parts": lambda x: jnp.minimum(x[:2], x[2:]),
    "clamp": lambda x: lax.clamp(0.2, x, 0.9),
    "sort": lambda x: jnp.sort(x, -1),
    "sort two": lambda x: sum(
        (jnp.concatenate([v], 0) for v in lax.sort((x, x.T), num_keys=1)[1:]),
    ),
    "top k": lambda x: lax.top_k(x, 2)[0],
    "argmax and gather": lambda x: jnp.take_along_axis(x, x.argmax(1)[:, None], 1),
    "cumulative maximum": lambda x: lax.cummax(x, 1),
    "cumulative minimum": lambda x: lax.cummin(x, 0, reverse=True),
    "concatenation": lambda x: jnp.concatenate([x[1:], jnp.ones((1, 4)), x, x], 0),
    "slice": lambda x: x[::2, 1:],
    "gather": lambda x: x[ROWS],
    "gather out of range": lambda x: jnp.take(x, ROWS + 1, 0, mode="fill"),
    "dynamic slice": lambda x: lax.dynamic_slice(x, (1, 2), (2, 2)),
    "dynamic update": lambda x: lax.dynamic_update_slice(x, x[:2, :2], (1, 1)),
    "scatter": lambda x: x.at[jnp.asarray([0, 2])].set(x[1:3]),
    "pad": lambda x: jnp.pad(x[1:, 1:], ((1, 0), (0, 1)), constant_values=0.5),
    "negative pad": lambda x: lax.pad(x, 0.5, ((-1, 1, 1), (0, 0, 0))),
    "reverse, transpose, reshape": lambda x: x[::-1].T.reshape(2, 8),
    "broadcast": lambda x: jnp.broadcast_to(x[:, None], (4, 3, 4)),
    "stack and split": lambda x: jnp.stack(jnp.split(x, 2)[::-1] * 2),
    "tile and roll": lambda x: jnp.roll(jnp.tile(x, (1, 2)), 1, 0),
    "where": lambda x: jnp.where(MASK, x, x.T),
    "where constant": lambda x: jnp.where(MASK, x, 0.0 * jnp.ones((4, 4))),
    "squeeze": lambda x: jnp.squeeze(x[:, None], 1),
    "repeat": lambda x: jnp.repeat(x, 2, axis=1),
    "triangle": jnp.tril,
}


@pytest.mark.relaxed
@pytest.mark.parametrize("name", MOVES)
def test_relevance_follows_the_numbers(name):
    fn = MOVES[name]
    x = normal(np.random.default_rng(14), (4, 4))
    y = np.nan_to_num(np.asarray(fn(x)))
    r = normal(np.random.default_rng(15), y.shape)
    came_from = y.reshape(-1, 1) == np.asarray(x).reshape(1, -1)  # numbers are distinct
    expected = (np.asarray(r).reshape(-1) @ came_from).reshape(4, 4)
    multiplier = jnp.asarray(np.where(y == 0, 0, r / np.where(y == 0, 1, y)))

    @jax.jit
    def explain(x):  # relevance that arrives as a value, and as a multiplier
        one = explained(lambda _, x: fn(x), x, r, seed="one")
        return one, explained(lambda _, x: fn(x), x, multiplier)

    for ours in explain(x):
        assert_close(ours, expected)


@pytest.mark.parametrize("fn", [lambda x: x.max(-1), lambda x: jnp.maximum(x, 3.0)])
def test_ties_are_split_as_in_the_gradient(fn):
    x = jnp.asarray([[1.0, 3.0, 3.0, 0.5]])
    ours = explained(lambda _, x: fn(x), x, jnp.ones(fn(x).shape))
    np.testing.assert_allclose(ours, x * jax.grad(lambda x: fn(x).sum())(x))


@pytest.mark.parametrize("strides", [(1, 1), (2, 2)])
@pytest.mark.parametrize(
    "rule",
    [rules.Flat(), rules.WSquare(), rules.ZBox(-3.0, 2.0), rules.ZPlus()],
    ids=repr,
)
def test_padding_is_no_input_wherever_it_is_written(rule, strides):
    rng = np.random.default_rng(0)
    x, w = normal(rng, (2, 6, 6, 2)), normal(rng, (3, 3, 2, 4))
    padding = ((1, 2), (0, 1))
    before = ((0, 0, 0), (1, 2, 0), (0, 1, 0), (0, 0, 0))
    forms = {
        "by the convolution": lambda p, x: conv(x, w, strides, padding),
        "before it": lambda p, x: conv(lax.pad(x, 0.0, before), w, strides),
        "by numpy": lambda p, x: conv(jnp.pad(x, [b[:2] for b in before]), w, strides),
    }
    target = jnp.ones(jax.eval_shape(forms["before it"], (), x).shape)
    first, *others = (explained(f, x, target, ("conv", rule)) for f in forms.values())
    for other in others:
        assert_close(other, first)


def test_padding_by_another_number_is_an_input():
    rng = np.random.default_rng(0)
    x, w = normal(rng, (1, 4, 4, 1)), jnp.ones((3, 3, 1, 1))

    def fn(p, x):
        return conv(jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=2), w)

    target = jnp.ones((1, 4, 4, 1))
    found = explained(fn, x, target, ("conv", rules.Flat()), seed="one")
    inside = explained(
        lambda p, x: conv(x, w, padding="SAME"),
        x,
        target,
        ("conv", rules.Flat()),
        seed="one",
    )
    assert found.sum() < inside.sum() - 1
