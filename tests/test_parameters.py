"""wrt="params": the relevance of parameters, each times its multiplier."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import replicas
from jax import lax

import jlrp
from jlrp import composites, rules

pytestmark = pytest.mark.relaxed
RNG = np.random.default_rng(8)
normal = lambda *shape: jnp.asarray(RNG.normal(size=shape))  # noqa: E731
EXACT = composites.epsilon(0.0)
X = normal(3, 5)
IMAGE = normal(2, 4, 4, 2)
relu = jax.nn.relu


@pytest.fixture(autouse=True)
def _same_numbers():
    """What a test draws does not depend on which tests ran before it."""
    RNG.bit_generator.state = np.random.default_rng(18).bit_generator.state


def close(ours, expected, tolerance=1e-12):
    scale = max(float(jnp.abs(expected).max()), 1e-300)
    np.testing.assert_allclose(ours, expected, rtol=0, atol=tolerance * scale)


def all_close(ours, expected, tolerance=1e-12):
    assert jax.tree.structure(ours) == jax.tree.structure(expected)
    scale = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(expected))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * scale),
        ours,
        expected,
    )


def of_params(fn, p, x, target=None, composite=EXACT, **options):
    return jlrp.relevance(
        fn, p, x, target, composite=composite, wrt="params", **options
    )


# What comes back.

DEEP = {
    "layers": [
        {"kernel": normal(5, 6), "bias": normal(6)},
        {"kernel": normal(6, 4), "bias": normal(4)},
    ],
    "scale": normal(4),
    "steps": jnp.asarray(7),
    "flag": jnp.asarray(True),
    "unused": normal(2, 2),
    "half": normal(4).astype(jnp.float16),
    "none": None,
}


def deep(p, x):
    h = jnp.tanh(x @ p["layers"][0]["kernel"] + p["layers"][0]["bias"])
    y = h @ p["layers"][1]["kernel"] + p["layers"][1]["bias"]
    y = y * p["scale"] + p["half"].astype(y.dtype)
    return jnp.where(p["flag"], y, y * p["steps"])


def test_relevance_of_params_is_a_pytree_like_params():
    found = of_params(deep, DEEP, X)
    assert jax.tree.structure(found) == jax.tree.structure(DEEP)
    for name, part in zip(DEEP, jax.tree.leaves(found), strict=False):
        assert jnp.issubdtype(part.dtype, jnp.floating), name
    assert jax.tree.map(jnp.shape, found) == jax.tree.map(jnp.shape, DEEP)
    assert not np.any(found["unused"]) and not np.any(found["steps"])
    assert not np.any(found["flag"])
    assert found["half"].dtype == jnp.float32
    for leaf in (*jax.tree.leaves(found["layers"]), found["scale"], found["half"]):
        assert np.any(leaf) and np.all(np.isfinite(leaf))


def test_relevance_of_biases_is_what_the_ledger_says():
    p = {"w": normal(5, 4), "b": normal(4)}
    fn = lambda p, x: x @ p["w"] + p["b"]  # noqa: E731
    found = of_params(fn, p, X, 1)
    ledger = jlrp.audit(fn, p, X, 1, composite=EXACT)
    assert float(found["b"].sum()) == pytest.approx(ledger.total("bias"))
    assert float(found["w"].sum()) == pytest.approx(ledger.relevance)


PRESETS = sorted(set(composites.PRESETS) - {"epsilon_gamma_box", "auto"})


def gated(p, x):
    """Layer norm, attention, a gated MLP: everything that reads parameters."""
    h = x - x.mean(-1, keepdims=True)
    h = h * lax.rsqrt(h.var(-1, keepdims=True) + 1e-5) * p["scale"] + p["shift"]
    w = jax.nn.softmax(h @ p["q"] @ (h @ p["k"]).T, axis=-1)
    h = x + w @ (h @ p["v"])
    return h + jax.nn.silu(h @ p["gate"] + p["bias"]) * (h @ p["up"]) @ p["down"]


GATED = {name: normal(5, 5) / 2 for name in ("q", "k", "v")}
GATED |= {"gate": normal(5, 6), "up": normal(5, 6), "down": normal(6, 5)}
GATED |= {"scale": normal(5), "shift": normal(5), "bias": normal(6)}


@pytest.mark.parametrize("name", PRESETS)
def test_asking_for_params_does_not_change_the_relevance_of_x(name):
    explain = functools.partial(jlrp.relevance, gated, GATED, X, 1, composite=name)
    alone = explain()
    x, params = explain(wrt=("x", "params"))
    np.testing.assert_array_equal(x, alone)
    all_close(explain(wrt="params"), params, 0.0)
    first, second = explain(wrt=("params", "x"))
    np.testing.assert_array_equal(second, alone)
    all_close(first, params, 0.0)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(params))


def test_explain_and_its_errors():
    explain = jlrp.explain(gated, composite="attnlrp", wrt=("x", "params"))
    e = explain(GATED, X, 1)
    assert jax.tree.structure(e.params) == jax.tree.structure(GATED)
    assert jlrp.explain(gated)(GATED, X).params is None
    for wrong in ("weights", ("x", "y"), ()):
        with pytest.raises(jlrp.InputError, match="wrt"):
            jlrp.relevance(gated, GATED, X, wrt=wrong)


# Exact values.


@pytest.mark.parametrize("fn", [gated, deep])
def test_gradient_input_is_params_times_their_gradient(fn):
    p = GATED if fn is gated else {k: v for k, v in DEEP.items() if k != "half"}
    fn = fn if fn is gated else lambda p, x: deep(p | {"half": DEEP["scale"]}, x)
    found = of_params(fn, p, X, 1, "gradient_input")
    floats = {k: v for k, v in p.items() if k not in ("steps", "flag")}
    slopes = jax.grad(lambda q: fn(p | q, X)[:, 1].sum())(floats)
    expected = jax.tree.map(jnp.multiply, floats, slopes)
    all_close({k: found[k] for k in floats}, expected)


def relu_layers(p, x):
    for kernel in p:
        x = relu(x @ kernel)
    return x


@pytest.mark.parametrize("composite", [EXACT, "attnlrp", "cp_lrp"])
def test_without_biases_every_kernel_sums_to_the_seed(composite):
    p = [normal(5, 7), normal(7, 6), normal(6, 4)]
    every_output = jnp.ones((3, 4))
    x, found = jlrp.relevance(
        relu_layers, p, X, every_output, composite=composite, wrt=("x", "params")
    )
    seed = float(relu_layers(p, X).sum())
    assert seed > 0.1
    assert float(x.sum()) == pytest.approx(seed, rel=1e-12)
    for kernel in found:
        assert float(kernel.sum()) == pytest.approx(seed, rel=1e-12)


def test_without_biases_convolutions_sum_to_the_seed():
    p = [normal(3, 3, 2, 4), normal(3, 3, 4, 3)]

    def fn(p, x):
        return relu(conv(relu(conv(x, p[0])), p[1])).mean((1, 2))

    seed = float(fn(p, IMAGE)[:, 1].sum())
    for kernel in of_params(fn, p, IMAGE, 1):
        assert float(kernel.sum()) == pytest.approx(seed, rel=1e-12)


def conv(x, k):
    return lax.conv_general_dilated(
        x, k, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


# Rules against dense replicas: R_ij = sum over the batch of the messages i <- j.


def messages(replica, x, w, b, r, s, **options):
    """What the replica hands from each output j to each input i, one at a time."""
    found = np.zeros((x.shape[1], w.shape[1]))
    for example in range(x.shape[0]):
        for j in range(w.shape[1]):
            only = np.zeros(w.shape[1])
            only[j] = r[example, j]
            found[:, j] += replica(
                np.asarray(x[example]),
                np.asarray(w).T,
                np.asarray(b),
                only,
                s,
                **options,
            )
    return found


S = 0.1
KERNEL_RULES = {
    "Zero": (rules.Zero(), replicas.epsilon, 0.0, {}),
    "Epsilon": (rules.Epsilon(S), replicas.epsilon, S, {}),
    "Gamma": (rules.Gamma(0.3, stabilizer=S), replicas.gamma, S, {"gamma": 0.3}),
    "GammaMontavon": (
        rules.GammaMontavon(0.3, stabilizer=S),
        replicas.gamma_montavon,
        S,
        {"gamma": 0.3},
    ),
    "AlphaBeta": (
        rules.AlphaBeta(2.0, 1.0, stabilizer=S),
        replicas.alpha_beta,
        S,
        {"alpha": 2.0, "beta": 1.0},
    ),
    "ZPlus": (rules.ZPlus(stabilizer=S), replicas.z_plus, S, {}),
    "ZBox": (
        rules.ZBox(-4.0, 4.5, stabilizer=S),
        replicas.z_box,
        S,
        {"low": -4.0, "high": 4.5},
    ),
    "WSquare": (rules.WSquare(stabilizer=S), replicas.w_square, S, {}),
    "Epsilon, bias ignored": (
        rules.Epsilon(S, bias="ignore"),
        replicas.epsilon,
        S,
        {"bias": "ignore"},
    ),
}
DENSE = {"w": normal(5, 4), "b": normal(4)}


@pytest.mark.parametrize("positive", [False, True], ids=["any sign", "nonnegative"])
@pytest.mark.parametrize("name", KERNEL_RULES)
def test_relevance_of_a_kernel_is_the_sum_of_its_messages(name, positive):
    rule, replica, s, options = KERNEL_RULES[name]
    composite = jlrp.Composite([("dense", rule)], base=EXACT)

    def fn(p, x):
        return (relu(x) if positive else x) @ p["w"] + p["b"]

    seed = normal(3, 4)
    x = relu(X) if positive else X
    r = np.asarray(fn(DENSE, X) * seed)
    expected = messages(replica, x, DENSE["w"], DENSE["b"], r, s, **options)
    ours, found = jlrp.relevance(
        fn, DENSE, X, seed, composite=composite, wrt=("x", "params")
    )
    close(found["w"], expected, 1e-10)
    of_x = sum(  # the replica is the rule that x sees
        np.asarray(
            replica(
                v, np.asarray(DENSE["w"]).T, np.asarray(DENSE["b"]), q, s, **options
            )
        ).sum()
        for v, q in zip(np.asarray(x), r, strict=True)
    )
    assert float(found["w"].sum()) == pytest.approx(float(of_x), rel=1e-9)
    assert float(ours.sum()) == pytest.approx(float(of_x), rel=1e-9)


def test_the_relevance_of_a_bias_is_what_its_rule_absorbs():
    for name in ("Zero", "Epsilon", "Gamma", "AlphaBeta", "ZPlus", "WSquare"):
        rule = KERNEL_RULES[name][0]
        composite = jlrp.Composite([("dense", rule)], base=EXACT)
        fn = lambda p, x: x @ p["w"] + p["b"]  # noqa: E731
        found = of_params(fn, DENSE, X, 1, composite)["b"]
        ledger = jlrp.audit(fn, DENSE, X, 1, composite=composite)
        assert float(found.sum()) == pytest.approx(ledger.total("bias")), name


@pytest.mark.parametrize("name", ["Epsilon", "Gamma", "AlphaBeta", "ZPlus", "WSquare"])
def test_relevance_of_a_convolution_kernel(name):
    """As a dense layer of its patches, which share the kernel."""
    rule = KERNEL_RULES[name][0]
    both = jlrp.Composite([("conv", rule)], base=EXACT)
    p = {"w": normal(2, 2, 2, 3), "b": normal(3)}

    def fn(p, x):
        y = lax.conv_general_dilated(
            x, p["w"], (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return y + p["b"]

    def patches(p, x):
        parts = [x[:, i : i + 3, j : j + 3] for i in range(2) for j in range(2)]
        return jnp.concatenate(parts, -1) @ p["w"].reshape(8, 3) + p["b"]

    seed = normal(2, 3, 3, 3)
    dense = jlrp.Composite([("dense", rule)], base=EXACT)
    ours = of_params(fn, p, IMAGE, seed, both)
    all_close(ours, of_params(patches, p, IMAGE, seed, dense), 1e-10)


# Norms, tables, ties.


def test_batch_norm_parameters():
    p = {"k": normal(3, 3, 2, 4), "b": normal(4)}
    p |= {"mean": normal(4), "scale": normal(4), "shift": normal(4)}
    p["variance"] = jnp.abs(normal(4)) + 0.1

    def fn(p, x):
        h = conv(x, p["k"]) + p["b"]
        inverse = lax.rsqrt(p["variance"] + 1e-3)
        return relu((h - p["mean"]) * (inverse * p["scale"]) + p["shift"]).mean((1, 2))

    found = of_params(fn, p, IMAGE, 1)
    seed = float(fn(p, IMAGE)[:, 1].sum())
    slopes = jax.grad(lambda p: fn(p, IMAGE)[:, 1].sum())(p)
    all_close(found, jax.tree.map(jnp.multiply, p, slopes), 1e-10)  # ReLU, LRP-0
    absorbed = float(found["b"].sum() + found["mean"].sum() + found["shift"].sum())
    kernel = float(found["k"].sum())
    assert kernel + absorbed == pytest.approx(seed)
    assert float(found["scale"].sum()) == pytest.approx(
        seed - float(found["shift"].sum())
    )
    for name in ("epsilon_plus", "epsilon_alpha2_beta1", "dynamic_lrp"):
        others = of_params(fn, p, IMAGE, 1, name)
        assert all(np.all(np.isfinite(v)) for v in jax.tree.leaves(others)), name
        assert np.any(others["k"]) and np.any(others["scale"]), name


@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_the_scale_of_a_norm(kind):
    p = {"scale": normal(5), "shift": normal(5), "w": normal(5, 3)}

    def normed(x):
        c = x - x.mean(-1, keepdims=True) if kind == "layer" else x
        return c * lax.rsqrt((c * c).mean(-1, keepdims=True) + 1e-6)

    def fn(p, x):
        return (normed(x) * p["scale"] + p["shift"]) @ p["w"]

    def inside(p, x):
        spread = (
            x.var(-1, keepdims=True)
            if kind == "layer"
            else (x * x).mean(-1, keepdims=True)
        )
        c = x - x.mean(-1, keepdims=True) if kind == "layer" else x
        return (c * (lax.rsqrt(spread + 1e-6) * p["scale"]) + p["shift"]) @ p["w"]

    for spelling in (fn, inside):
        found = of_params(spelling, p, X, 1, "attnlrp")
        by_feature = p["w"][:, 1]
        close(found["scale"], (normed(X) * p["scale"] * by_feature).sum(0), 1e-9)
        close(found["shift"], 3 * p["shift"] * by_feature, 1e-9)


@pytest.mark.parametrize("lookup", ["gather", "one-hot"])
def test_rows_of_an_embedding_table(lookup):
    p = {"table": normal(9, 5), "w": normal(5, 3)}
    ids = jnp.asarray([[1, 4, 4], [0, 1, 8]])

    def fn(p, ids):
        if lookup == "gather":
            h = p["table"][ids]
        else:
            h = jax.nn.one_hot(ids, 9, dtype=p["table"].dtype) @ p["table"]
        return jnp.tanh(h).sum(1) @ p["w"]

    r, found = jlrp.relevance(fn, p, ids, 1, composite=EXACT, wrt=("x", "params"))
    rows = np.zeros((9, 5))
    values = np.asarray(jnp.tanh(p["table"][ids]) * p["w"][:, 1])
    for example in range(2):
        for position in range(3):
            rows[ids[example, position]] += values[example, position]
    close(found["table"], rows, 1e-10)
    assert not np.any(found["table"][jnp.asarray([2, 3, 5, 6, 7])])
    tokens = np.zeros(9)
    np.add.at(tokens, np.asarray(ids), np.asarray(r))
    close(found["table"].sum(-1), tokens, 1e-10)


def test_shared_weights_add_up():
    """A kernel used twice, and a table tied to the output layer."""
    w, v = normal(5, 5), normal(5, 5)

    def twice(p, x):
        return relu(relu(x @ p["a"]) @ p["b"]) @ p["c"]

    apart = of_params(twice, {"a": w, "b": w, "c": v}, X, 1)
    tied = of_params(lambda p, x: twice(p | {"b": p["a"]}, x), {"a": w, "c": v}, X, 1)
    close(tied["a"], apart["a"] + apart["b"])
    close(tied["c"], apart["c"])

    ids = jnp.asarray([[1, 4, 2]])
    table = normal(9, 5)

    def language_model(p, ids):
        return jnp.tanh(p["in"][ids].mean(1)) @ p["out"].T

    apart = of_params(language_model, {"in": table, "out": table}, ids, 3)
    tied = of_params(lambda p, i: language_model({"in": p, "out": p}, i), table, ids, 3)
    close(tied, apart["in"] + apart["out"])


def test_what_is_made_of_parameters_hands_on_to_them():
    """Weight normalisation, a transpose, a sum: linear parts exact, else Taylor."""
    p = {"v": normal(5, 4), "g": normal(4), "delta": normal(5, 4) / 9}

    def fn(p, x):
        kernel = p["v"] / jnp.linalg.norm(p["v"], axis=0) * p["g"]
        return x @ (kernel + p["delta"].T.T)

    found = of_params(fn, p, X, 1)
    kernel = p["v"] / jnp.linalg.norm(p["v"], axis=0) * p["g"]
    multiplier = jnp.zeros((5, 4)).at[:, 1].set(X.sum(0))
    close(found["delta"], p["delta"] * multiplier)
    close(found["g"], (kernel * multiplier).sum(0), 1e-10)
    assert abs(float(found["v"].sum())) < 1e-10  # homogeneous of degree zero


# Transformations.


def test_params_under_jit_and_vmap():
    def explain(p, x, labels):
        return jlrp.relevance(
            gated, p, x, labels, composite="attnlrp", wrt=("x", "params")
        )

    labels = jnp.asarray([2, 0, 1])
    expected = explain(GATED, X, labels)
    all_close(jax.jit(explain)(GATED, X, labels), expected)
    xs, ys = jnp.stack([X, 2 * X]), jnp.stack([labels, labels[::-1]])
    together = jax.vmap(explain, (None, 0, 0))(GATED, xs, ys)
    one = [explain(GATED, x, y) for x, y in zip(xs, ys, strict=True)]
    all_close(together, jax.tree.map(lambda *leaves: jnp.stack(leaves), *one), 1e-11)


def test_relevance_of_params_sums_over_the_batch():
    p = DENSE

    def fn(p, x):
        return relu(x @ p["w"] + p["b"])

    alone = [of_params(fn, p, X[i : i + 1], 1) for i in range(3)]
    summed = jax.tree.map(lambda *leaves: sum(leaves), *alone)
    all_close(of_params(fn, p, X, 1), summed)


def test_gradients_go_through_the_relevance_of_params():
    def penalty(w):
        found = of_params(gated, GATED | {"up": w}, X, 1, "attnlrp")
        return jnp.sum(found["down"] ** 2) + jnp.sum(found["up"] ** 2)

    direction, step = normal(5, 6), 1e-6
    slope = jnp.vdot(jax.grad(penalty)(GATED["up"]), direction)
    ahead, behind = (penalty(GATED["up"] + s * direction) for s in (step, -step))
    np.testing.assert_allclose(slope, (ahead - behind) / (2 * step), rtol=1e-5)


def test_pruning_by_relevance():
    """Weights of no relevance can be set to zero, and nothing changes."""
    w = normal(5, 4).at[:, 2].set(0.0)
    p = {"w": w, "v": normal(4, 3)}
    found = of_params(lambda p, x: jnp.tanh(x @ p["w"]) @ p["v"], p, X, 0)
    assert not np.any(found["w"][:, 2]) and not np.any(found["v"][2])
    assert not np.any(found["v"][:, 1:])
    assert np.all(found["v"][jnp.asarray([0, 1, 3]), 0] != 0)
