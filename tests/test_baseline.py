"""Relevance from a reference: `baseline=`, the composite `deep_lift`, `Background`."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from baseline_zoo import (
    ACTIVATIONS,
    EXACT,
    PROGRAMS,
    WITH_REMAINDER,
    B,
    V,
    W,
    X,
    fast_layer_norm,
    keras_layer_norm,
    layer_norm,
)
from jax import lax

import jlrp
from jlrp.ops.means import line


def moved(x, key, scale=0.7):
    """Another point near zero."""
    leaves, tree = jax.tree.flatten(x)
    keys = jax.random.split(jax.random.key(key), len(leaves))
    found = [
        0.3 * leaf + scale * jax.random.normal(k, leaf.shape)
        for leaf, k in zip(leaves, keys, strict=True)
    ]
    return jax.tree.unflatten(tree, found)


X0 = moved(X, 1)


def references(x):
    """Eight of them: constants, x itself in parts, turned around, noise."""
    of = [
        lambda a: jnp.zeros_like(a),
        lambda a: jnp.full_like(a, 0.5),
        lambda a: jnp.broadcast_to(a.mean(-1, keepdims=True), a.shape),
        lambda a: -a,
        lambda a: jnp.flip(a, -1),
        lambda a: jnp.where(jnp.arange(a.shape[-1]) % 2 == 0, a, 0.1 * a),
        lambda a: a + 1e-7,
    ]
    return [jax.tree.map(f, x) for f in of] + [moved(x, 2, 2.0)]


def explained_score(fn, params, x):
    """The sum of the scores that x chooses."""
    return at_reference(fn, params, x, x)


def total(tree):
    return float(sum(jnp.sum(leaf) for leaf in jax.tree.leaves(tree)))


def relevance(fn, params, x, baseline, **options):
    return jlrp.relevance(fn, params, x, baseline=baseline, **options)


# A slow oracle: DeepLIFT's Rescale, written out.


def test_mlp_is_rescale():
    draw = np.random.default_rng(0)
    w, v = draw.normal(size=(5, 7)), draw.normal(size=(7, 3))
    b, c = draw.normal(size=7), draw.normal(size=3)
    x, x0 = draw.normal(size=5), draw.normal(size=5)
    h, h0 = x @ w + b, x0 @ w + b
    expected = np.zeros(5)
    target = int(np.argmax(np.maximum(h, 0) @ v + c))
    for i, j in itertools.product(range(5), range(7)):
        change = max(h[j], 0) - max(h0[j], 0)
        secant = change / (h[j] - h0[j])
        expected[i] += (x[i] - x0[i]) * w[i, j] * secant * v[j, target]

    def fn(p, x):
        return jax.nn.relu(x @ p[0] + p[1]) @ p[2] + p[3]

    params = tuple(map(jnp.asarray, (w, b, v, c)))
    found = relevance(fn, params, jnp.asarray(x), jnp.asarray(x0))
    np.testing.assert_allclose(found, expected, rtol=1e-12)


# The sum of relevance.


@pytest.mark.parametrize("name", EXACT)
def test_sums_to_the_difference(name):
    """Each operation hands on what it gets, to rounding, for eight references."""
    fn, params, x = EXACT[name]
    for x0 in references(x):
        ledger = jlrp.audit(fn, params, x, baseline=x0)
        change = explained_score(fn, params, x) - at_reference(fn, params, x, x0)
        scale = max(1.0, *(abs(row.arrived) for row in ledger.rows))
        assert abs(ledger.seed - change) < 1e-10 * scale
        assert abs(ledger.relevance - change) < 1e-10 * scale
        assert ledger.unexplained < 1e-10 * scale
        absorbed = [abs(a) for row in ledger.rows for a in row.causes.values()]
        assert max(absorbed, default=0.0) < 1e-10 * scale


def at_reference(fn, params, x, x0):
    """What the scores that x chooses are at the reference."""
    y, y0 = fn(params, x), fn(params, x0)
    if y.ndim == 2:
        return float(jnp.take_along_axis(y0, y.argmax(-1)[:, None], 1).sum())
    if y.shape == (2,):
        return float(y0.sum())
    return float(y0[y.argmax()])


@pytest.mark.parametrize("name", WITH_REMAINDER)
def test_what_is_left_over_has_a_name(name):
    fn, params, x, cause = WITH_REMAINDER[name]
    largest = 0.0
    for x0 in references(x):
        ledger = jlrp.audit(fn, params, x, baseline=x0)
        lost = [(c, a) for row in ledger.rows for c, a in row.causes.items()]
        assert {c for c, a in lost if abs(a) > 1e-10} <= {cause}
        assert ledger.unexplained < 1e-10
        rest = ledger.seed - ledger.relevance
        assert abs(rest - ledger.total(cause)) < 1e-9
        largest = max(largest, abs(rest))
    assert 1e-9 < largest < 20  # there is something, and it is bounded


@pytest.mark.parametrize(
    "name", ["attention", "cnn", "lstm", "masked by x", "branches"]
)
def test_relevance_is_what_the_audit_says(name):
    """The rules declare what they read: an audit keeps everything."""
    fn, params, x = PROGRAMS[name]
    x0 = moved(x, 1)
    found = total(relevance(fn, params, x, x0))
    assert abs(found - jlrp.audit(fn, params, x, baseline=x0).relevance) < 1e-10


# Axioms.


@pytest.mark.parametrize("name", ["attention", "cnn", "layer norm", "scan", "dict"])
def test_what_does_not_change_gets_nothing(name):
    fn, params, x = PROGRAMS[name]
    half = jax.tree.map(lambda a: jnp.where(jnp.arange(a.shape[-1]) < 3, a, 0.2), x)
    found = relevance(fn, params, x, half)
    for r, a, b in zip(*map(jax.tree.leaves, (found, x, half)), strict=True):
        assert not np.any(np.asarray(r)[np.asarray(a == b)])
        assert np.any(np.asarray(r))


@pytest.mark.parametrize("name", [n for n in PROGRAMS if n not in ACTIVATIONS])
def test_swapping_the_points_negates(name):
    fn, params, x = PROGRAMS[name]
    x0, shape = moved(x, 1), jax.eval_shape(fn, params, x).shape
    target = jnp.ones(2, int) if len(shape) == 2 else None
    if shape == (3,):
        target = 1
    there = relevance(fn, params, x, x0, target=target)
    back = relevance(fn, params, x0, x, target=target)
    for a, b in zip(jax.tree.leaves(there), jax.tree.leaves(back), strict=True):
        np.testing.assert_allclose(a, -b, atol=1e-10)


def test_symmetric_inputs_share_alike():
    def fn(p, x):
        return jnp.tanh(x[0] * x[1] + x[0] + x[1]) / (1 + x[0] ** 2 + x[1] ** 2)

    found = relevance(fn, (), jnp.array([0.7, 0.7]), jnp.array([-0.2, -0.2]))
    assert abs(found[0] - found[1]) < 1e-14


def test_linear_in_the_seed():
    seeds = jax.random.normal(jax.random.key(3), (2, 2, 3))
    fn, params, x = PROGRAMS["attention"]
    a, b, both = (
        relevance(fn, params, x, X0, target=s)
        for s in (*seeds, 2 * seeds[0] - seeds[1])
    )
    np.testing.assert_allclose(both, 2 * a - b, atol=1e-12)


# Shapley values.


def shapley(function, x, x0):
    """By all subsets of inputs that have their value at x."""
    n = len(x)
    found = np.zeros(n)

    def at(subset):
        return float(function(jnp.where(jnp.isin(jnp.arange(n), subset), x, x0)))

    for i in range(n):
        others = [j for j in range(n) if j != i]
        for size in range(n):
            weight = 1 / (n * math.comb(n - 1, size))
            for subset in itertools.combinations(others, size):
                without = jnp.asarray(subset, int)
                with_i = jnp.asarray((*subset, i), int)
                found[i] += weight * (at(with_i) - at(without))
    return found


MULTILINEAR = {
    "two": lambda x: x[0] * x[1],
    "three": lambda x: x[0] * x[1] * x[2],
    "three, otherwise": lambda x: x[0] * (x[1] * x[2]),
    "five": lambda x: (x[0] * x[1]) * (x[2] * (x[3] * x[4])),
    "prod": lambda x: x.prod(),
    "contraction": lambda x: x[:2] @ x[2:4],
    "three matrices": lambda x: (
        x[:2].reshape(1, 2) @ (x[2] * jnp.eye(2)) @ x[3:5].reshape(2, 1)
    )[0, 0],
    "einsum": lambda x: jnp.einsum("i,i,i->", x[:2], x[2:4], x[4:6]),
    "scaled": lambda x: 3.0 * x[0] * (-x[1]) * (x[2] / 2.0),
    "sum of products": lambda x: x[0] * x[1] + x[2] * x[3] * x[4] - x[5],
}


@pytest.mark.parametrize("name", MULTILINEAR)
def test_products_share_by_shapley_values(name):
    function = MULTILINEAR[name]
    draw = np.random.default_rng(5)
    x, x0 = map(jnp.asarray, draw.normal(size=(2, 6)))
    found = relevance(lambda _, x: function(x), (), x, x0)
    np.testing.assert_allclose(found, shapley(function, x, x0), atol=1e-12)


def test_where_a_hidden_unit_differs():
    """`(x1 x2 + x3) x4` is a product of two for the rule; its expansion is of three."""
    x, x0 = jnp.array([1.0, 2.0, 3.0, 4.0]), jnp.zeros(4)

    def factored(_, x):
        return (x[0] * x[1] + x[2]) * x[3]

    def expanded(_, x):
        return x[0] * x[1] * x[3] + x[2] * x[3]

    exact = shapley(lambda x: expanded((), x), x, x0)
    np.testing.assert_allclose(relevance(expanded, (), x, x0), exact, atol=1e-12)
    found = relevance(factored, (), x, x0)
    np.testing.assert_allclose(found, [2.0, 2.0, 6.0, 10.0], atol=1e-12)
    assert abs(float(found.sum()) - exact.sum()) < 1e-12


# Secants.


def slopes(function, x, d):
    """The secant by float64, the derivative between where that would lose digits."""
    x, x0 = np.float64(x), np.float64(x) - np.float64(d)
    if abs(x - x0) < 1e-3:
        return jax.jvp(function, (jnp.float64((x + x0) / 2),), (jnp.float64(1),))[1]
    return (function(jnp.float64(x)) - function(jnp.float64(x0))) / (x - x0)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_secants_in_float32(name):
    """Off by at most 1e-5 of the largest derivative between the points.

    And 2e-7, which is what the tail of a GELU, 1 + tanh, is off by itself.
    """
    function = ACTIVATIONS[name]
    starts = np.float32([-20, -5.3, -3.1, -1, -0.3, 0.21, 0.9, 1.7, 3.2, 6, 15])
    steps = np.float32([1e-12, 1e-8, 1e-6, 1e-4, 3e-3, 0.02, 0.2, 0.6, 1, 3, 40, 1e3])
    steps = steps[steps < 3] if name in ("exp", "log cosh", "x**3") else steps
    x, d = (a.reshape(-1) for a in np.meshgrid(starts, np.r_[steps, -steps]))
    x0 = np.float32(x - d)
    seed = np.ones(x.size, np.float32)

    @jax.jit
    def explained(x, x0):
        return jlrp.relevance(lambda _, x: function(x), (), x, seed, baseline=x0)

    found = np.asarray(explained(x, x0), np.float64)
    change = np.float64(x) - np.float64(x0)
    for i in np.flatnonzero(change):
        between = np.linspace(np.float64(x0[i]), np.float64(x[i]), 201)
        near_zero = np.clip(np.linspace(-8, 8, 201), between.min(), between.max())
        between = np.concatenate([between, near_zero])
        largest = np.abs(jax.vmap(jax.grad(function))(jnp.asarray(between))).max()
        exact = float(slopes(function, x[i], change[i]))
        error = abs(found[i] / change[i] - exact)
        assert error <= 1e-5 * largest + 2e-7, (
            x[i],
            x0[i],
            found[i] / change[i],
            exact,
        )
    assert not found[change == 0].any()


@pytest.mark.parametrize(
    ("function", "kink"),
    [
        (jax.nn.relu, 0.0),
        (jnp.abs, 0.0),
        (jax.nn.leaky_relu, 0.0),
        (jax.nn.hard_swish, -3.0),
        (jax.nn.hard_swish, 3.0),
        (jax.nn.relu6, 6.0),
        (lambda x: jnp.clip(x, -0.5, 0.75), 0.75),
    ],
)
def test_secants_across_kinks_in_float32(function, kink):
    for power in (-20, -12, -6, -2, 0):
        above = np.float32(kink + 2.0**power)
        below = np.float32(kink - 3 * 2.0**power)
        found = relevance(lambda _, x: function(x), (), above, below)
        change = float(above) - float(below)
        exact = float(function(jnp.float64(above)) - function(jnp.float64(below)))
        between = jnp.linspace(float(below), float(above), 99)
        largest = float(jnp.abs(jax.vmap(jax.grad(function))(between)).max())
        assert abs(float(found) - exact) <= 1e-5 * largest * change


# Spellings of one function.


def swish_gate(a, g):
    return a * jax.nn.sigmoid(g)


SHIFT = jnp.full((1, 6), 99.0)


def behind(function):
    """A function of one dense layer."""
    return lambda w, x: function(x @ w) @ V


SPELLINGS = {
    "gate": (
        lambda w, x: swish_gate(x @ w, x @ w.T) @ V,
        lambda w, x: (x @ w) / (1 + jnp.exp(-(x @ w.T))) @ V,
        lambda w, x: (x @ w) * (1 / (1 + jnp.exp(-(x @ w.T)))) @ V,
    ),
    "quotient": (
        lambda w, x: (x @ w) / (x @ jnp.abs(w) + SHIFT) @ V,
        lambda w, x: (x @ w) * (1 / (x @ jnp.abs(w) + SHIFT)) @ V,
        lambda w, x: (x @ w) * (x @ jnp.abs(w) + SHIFT) ** -1 @ V,
    ),
    "layer norm": (
        behind(layer_norm),
        behind(fast_layer_norm),
        behind(keras_layer_norm),
        behind(lambda h: jax.nn.standardize(h, epsilon=1e-5)),
    ),
    "three factors": (
        lambda w, x: ((x @ w) * (x @ w.T) * jnp.tanh(x)) @ V,
        lambda w, x: ((x @ w) * ((x @ w.T) * jnp.tanh(x))) @ V,
        lambda w, x: jnp.einsum("bi,bi,bi->bi", jnp.tanh(x), x @ w, x @ w.T) @ V,
    ),
    "linear attention": (
        lambda w, x: ((x @ w) @ (x @ w.T).T) @ x @ V,
        lambda w, x: (x @ w) @ ((x @ w.T).T @ x) @ V,
    ),
    "softmax": (
        behind(jax.nn.softmax),
        behind(lambda h: jax.nn.softmax(h + 7.0)),
        behind(lambda h: jnp.exp(jax.nn.log_softmax(h))),
        behind(lambda h: (lambda e: e / e.sum(-1, keepdims=True))(jnp.exp(h))),
        behind(lambda h: jnp.exp(h - jax.nn.logsumexp(h, -1, keepdims=True))),
    ),
    "maximum": (
        lambda w, x: (x @ w).max(-1),
        lambda w, x: (lambda h: jnp.maximum(h[:, :4].max(-1), h[:, 4:].max(-1)))(x @ w),
        lambda w, x: lax.cummax(x @ w, 1)[:, -1],
    ),
    "relu": (
        behind(jax.nn.relu),
        behind(lambda h: jnp.where(h > 0, h, 0.0)),
        behind(lambda h: (h + jnp.abs(h)) / 2),
    ),
    "three layers": (
        PROGRAMS["scan"][0],
        lambda w, x: (
            (lambda f: f(f(f(x, w), w.T), w))(lambda h, m: jnp.tanh(h @ m) + h) @ V
        ),
    ),
    "dense": (
        lambda w, x: jax.nn.relu(x @ w + B) @ V,
        lambda w, x: jax.nn.relu((x[..., None] * w[None]).sum(1) + B) @ V,
        lambda w, x: jax.nn.relu(B - x @ (-w)) @ V,
    ),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_spellings_agree(name):
    first, *others = (relevance(fn, W, X, X0) for fn in SPELLINGS[name])
    for other in others:
        np.testing.assert_allclose(other, first, atol=1e-10)


def test_a_constant_added_to_the_scores_changes_nothing():
    def scores(shift):
        return lambda w, x: jax.nn.softmax(x @ w + shift * x.sum(-1, keepdims=True)) @ V

    a, b = (relevance(scores(shift), W, X, X0) for shift in (0.0, 3.0))
    np.testing.assert_allclose(a, b, atol=1e-12)


# Norms.


def test_a_norm_at_a_flat_reference_stays_bounded():
    """A deviation of 0: signal times the mean of its inverse would explode."""
    fn, params, x = PROGRAMS["layer norm"]
    found = relevance(fn, params, x, 0.0)
    assert np.abs(found).max() < 20
    np.testing.assert_allclose(
        total(found),
        explained_score(fn, params, x) - at_reference(fn, params, x, 0 * x),
    )


def test_a_held_statistic_is_a_cause():
    fn, params, x = PROGRAMS["layer norm"]
    held = jlrp.composites.deep_lift(hold_statistics=True)
    ledger = jlrp.audit(fn, params, x, baseline=X0, composite=held)
    assert abs(ledger.total("statistic")) > 1e-3
    assert ledger.unexplained < 1e-12
    rest = ledger.seed - ledger.relevance
    assert abs(rest - ledger.total("statistic")) < 1e-10


def test_a_held_gate_is_a_cause():
    def fn(w, x):
        return swish_gate(x @ w, x @ w.T) @ V

    composite = jlrp.Composite(
        [("product", jlrp.rules.Gate())], base=jlrp.composites.deep_lift()
    )
    ledger = jlrp.audit(fn, W, X, baseline=X0, composite=composite)
    assert abs(ledger.total("held")) > 1e-3
    assert ledger.unexplained < 1e-12
    gates = (jax.nn.sigmoid(X @ W.T) + jax.nn.sigmoid(X0 @ W.T)) / 2
    target = fn(W, X).argmax(-1)
    expected = (X - X0) * ((gates * V.T[target]) @ W.T)
    found = relevance(fn, W, X, X0, composite=composite)
    np.testing.assert_allclose(found, expected, atol=1e-12)


# Rules that look at the kernel.


def changes(seed=0):
    draw = np.random.default_rng(seed)
    w, b = draw.normal(size=(6, 5)), draw.normal(size=5)
    x, x0 = draw.normal(size=6), draw.normal(size=6)
    x[2] = x0[2]
    return w, b, x, x0, draw.normal(size=5)


def shares(rule, contributions, z):
    """What each contribution `w_i D_i` to one output gets of 1, by the formula."""
    own = contributions if z > 0 else -contributions
    above, below = np.maximum(own, 0), np.minimum(own, 0)
    match rule:
        case jlrp.rules.Gamma():
            favoured = own + rule.gamma * above
            return favoured / favoured.sum()
        case jlrp.rules.ZPlus():
            return above / above.sum()
        case jlrp.rules.AlphaBeta():
            if not below.any():
                return above / above.sum()
            return rule.alpha * above / above.sum() - rule.beta * below / below.sum()
    raise AssertionError(rule)


@pytest.mark.parametrize(
    "rule",
    [
        jlrp.rules.Gamma(0.25),
        jlrp.rules.Gamma(100.0),
        jlrp.rules.ZPlus(),
        jlrp.rules.AlphaBeta(2.0, 1.0),
    ],
    ids=str,
)
def test_kernel_rules_on_differences(rule):
    w, b, x, x0, seed = changes()
    expected = np.zeros(6)
    for j in range(5):
        contributions = w[:, j] * (x - x0)
        z = contributions.sum()
        expected += seed[j] * z * shares(rule, contributions, z)
    composite = jlrp.Composite([("dense", rule)], base="deep_lift")

    def fn(p, x):
        return x @ p[0] + p[1]

    found = relevance(
        fn, (w, b), jnp.asarray(x), jnp.asarray(x0), target=seed, composite=composite
    )
    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-12)
    ledger = jlrp.audit(
        fn, (w, b), jnp.asarray(x), target=seed, baseline=x0, composite=composite
    )
    assert ledger.unexplained < 1e-12
    assert abs(ledger.seed - ledger.relevance) < 1e-12


def test_alpha_beta_where_one_side_is_empty():
    w = np.abs(changes()[0])
    composite = jlrp.Composite(
        [("dense", jlrp.rules.AlphaBeta(2.0, 1.0))], base="deep_lift"
    )
    x0 = jnp.zeros(6)
    found = relevance(lambda w, x: x @ w, w, x0 + 1, x0, target=1, composite=composite)
    np.testing.assert_allclose(found, w[:, 1], rtol=1e-12)


def test_little_changes_lose_nothing():
    """A stabiliser of 1e-6 would take two fifths of a change of 1e-6."""
    w, b, x, x0, _ = changes()
    composite = jlrp.Composite([("dense", jlrp.rules.Gamma(0.25))], base="deep_lift")
    near = jnp.asarray(x0 + 1e-6 * (x - x0))

    def fn(p, x):
        return jnp.tanh(x @ p[0] + p[1]).sum()

    found = relevance(fn, (w, b), near, jnp.asarray(x0), composite=composite)
    change = fn((w, b), near) - fn((w, b), jnp.asarray(x0))
    np.testing.assert_allclose(found.sum(), change, rtol=1e-8)


def test_epsilon_absorbs():
    w, b, x, x0, seed = changes()
    z = w.T @ (x - x0)
    kept = np.abs(z) / (np.abs(z) + 0.5)
    composite = jlrp.Composite([("dense", jlrp.rules.Epsilon(0.5))], base="deep_lift")

    def fn(p, x):
        return x @ p[0] + p[1]

    arguments = (fn, (w, b), jnp.asarray(x))
    options = {"target": seed, "composite": composite, "baseline": jnp.asarray(x0)}
    found = jlrp.relevance(*arguments, **options)
    np.testing.assert_allclose(found, (x - x0) * (w @ (seed * kept)), rtol=1e-10)
    ledger = jlrp.audit(*arguments, **options)
    np.testing.assert_allclose(
        ledger.total("stabilizer"), (seed * z * (1 - kept)).sum()
    )
    assert ledger.unexplained < 1e-12


def test_gradient_input_is_the_gradient_times_the_change():
    fn, params, x = PROGRAMS["attention"]
    found = relevance(fn, params, x, X0, composite="gradient_input")
    target = fn(params, x).argmax(-1)

    def score(x):
        return jnp.take_along_axis(fn(params, x), target[:, None], 1).sum()

    np.testing.assert_allclose(found, jax.grad(score)(x) * (x - X0), atol=1e-12)
    ledger = jlrp.audit(fn, params, x, baseline=X0, composite="gradient_input")
    assert abs(ledger.total("taylor")) > 1e-3


REFUSED = [
    "dynamic_lrp",
    "epsilon_alpha2_beta1_flat",
    "epsilon_plus_flat",
    "excitation_backprop",
    jlrp.composites.epsilon_gamma_box(-3.0, 3.0),
    jlrp.Composite([("dense", jlrp.rules.WSquare())]),
    jlrp.Composite([("dense", jlrp.rules.GammaMontavon())]),
]


@pytest.mark.parametrize("composite", REFUSED, ids=lambda c: c if c is str(c) else "")
def test_rules_without_a_meaning_are_refused(composite):
    fn, params, x = PROGRAMS["cnn"]
    with pytest.raises(jlrp.RuleError, match="deep_lift"):
        relevance(fn, params, x, 0.0, composite=composite)


@pytest.mark.parametrize(
    "composite", ["epsilon", "epsilon_plus", "attnlrp", "cp_lrp", "mamba_lrp", "auto"]
)
def test_other_presets_have_one(composite):
    fn, params, x = PROGRAMS["attention"]
    ledger = jlrp.audit(fn, params, x, baseline=X0, composite=composite)
    assert ledger.unexplained < 1e-11


def test_auto_is_deep_lift():
    fn, params, x = PROGRAMS["cnn"]
    ours = relevance(fn, params, x, 0.1)
    deep_lift = relevance(fn, params, x, 0.1, composite="deep_lift")
    np.testing.assert_array_equal(ours, deep_lift)
    assert "deep_lift" in jlrp.inspect(fn, params, x, baseline=0.1).why


# What a baseline may be.


def test_forms_of_a_baseline():
    fn, params, x = PROGRAMS["dict"]
    whole = relevance(fn, params, x, jax.tree.map(lambda a: jnp.full_like(a, 0.5), x))
    for baseline in (0.5, np.float32(0.5), lambda x: jax.tree.map(lambda a: 0.5, x)):
        found = relevance(fn, params, x, baseline)
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(whole), strict=True):
            np.testing.assert_array_equal(a, b)
    row = relevance(*PROGRAMS["attention"], X0[0])
    np.testing.assert_array_equal(
        row, relevance(*PROGRAMS["attention"], jnp.stack([X0[0]] * 2))
    )


def test_a_blur_is_a_baseline():
    from jlrp.metrics import Blur

    def fn(p, x):
        return jnp.tanh(x * p).sum((1, 2, 3))

    x = jax.random.normal(jax.random.key(1), (2, 8, 8, 3))
    p = jnp.broadcast_to(0.7, (1, 1, 1, 1))
    blur = Blur(5)
    found = relevance(fn, p, x, blur)
    np.testing.assert_allclose(found.sum((1, 2, 3)), fn(p, x) - fn(p, blur(x)))


BAD = {
    "a shape": (X, jnp.zeros((3, 6)), "does not broadcast"),
    "a word": (X, "zero", "a function of x"),
    "another tree": ({"a": X, "b": X}, {"a": X}, "pytree like x"),
    "floats for ids": (jnp.array([1, 2]), 0.0, "token"),
    "a column": (X, jnp.zeros((2, 6, 1)), "does not broadcast"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_fits_no_x_is_refused(name):
    x, baseline, message = BAD[name]

    def fn(p, x):
        return sum(jnp.sum(leaf * 1.0) for leaf in jax.tree.leaves(x))

    with pytest.raises(jlrp.InputError, match=message):
        relevance(fn, (), x, baseline)


def test_deep_lift_without_a_baseline_is_from_zero():
    fn, *args = PROGRAMS["relu"]
    for composite in (
        "deep_lift",
        jlrp.Composite([("dense", jlrp.rules.Gamma(0.1))], base="deep_lift"),
    ):
        found = jlrp.relevance(fn, *args, composite=composite)
        expected = jlrp.relevance(fn, *args, composite=composite, baseline=0.0)
        np.testing.assert_array_equal(found, expected)
    with pytest.raises(jlrp.InputError, match="token"):
        jlrp.relevance(
            lambda p, x: p[x].sum(), X[0, 0], jnp.array([1, 2]), composite="deep_lift"
        )


def test_a_seed_of_one_is_refused():
    with pytest.raises(jlrp.InputError, match='seed="score"'):
        relevance(*PROGRAMS["relu"], 0.0, seed="one")


def test_a_rule_of_the_users_own_is_refused():
    @jlrp.custom_relevance
    def double(x):
        return 2 * x

    double.def_relevance(lambda r, x, y: [r[0]])
    with pytest.raises(jlrp.RuleError, match="Leave the baseline out"):
        relevance(lambda w, x: double(x @ w) @ V, W, X, 0.0)


def test_a_trip_count_that_x_decides_is_refused():
    def fn(w, x):
        return lax.while_loop(
            lambda s: s.sum() < 100, lambda s: s + jnp.abs(s @ w) + 1, x
        ).sum(-1)

    with pytest.raises(jlrp.SelectorError, match="fixed length"):
        relevance(fn, W, X, 0.0)


# Background.


def rows_of(n):
    return jax.random.normal(jax.random.key(9), (n, 6))


@pytest.mark.parametrize("chunk", [1, 4, 16])
def test_background_is_the_mean_over_its_rows(chunk):
    fn, params, x = PROGRAMS["attention"]
    rows = rows_of(7)
    expected = sum(relevance(fn, params, x, row) for row in rows) / 7
    background = jlrp.Background(rows, chunk=chunk)
    found = relevance(fn, params, x, background)
    np.testing.assert_allclose(found, expected, atol=1e-12)
    ledger = jlrp.audit(fn, params, x, baseline=background)
    assert ledger.unexplained < 1e-12
    assert abs(ledger.relevance - float(expected.sum())) < 1e-11


def test_background_with_captures_and_parameters():
    def fn(w, x):
        return jlrp.tag(jnp.tanh(x @ w), "h") @ V

    rows = rows_of(3)
    options = {"capture": "h", "wrt": ("x", "params")}
    whole = jlrp.explain(fn, baseline=jlrp.Background(rows), **options)(W, X)
    ones = [jlrp.explain(fn, baseline=row, **options)(W, X) for row in rows]
    np.testing.assert_allclose(whole.output, fn(W, X))
    for part in (lambda e: e.captured["h"], lambda e: e.params, lambda e: e.relevance):
        mean = sum(map(part, ones)) / 3
        np.testing.assert_allclose(part(whole), mean, atol=1e-12)


def test_background_runs_x_once_and_its_memory_does_not_grow():
    def compiled(n):
        explain = jlrp.explain(
            PROGRAMS["three factors"][0], baseline=jlrp.Background(rows_of(n), chunk=4)
        )
        return jax.jit(lambda w, x: explain(w, x).relevance).lower(W, X).compile()

    few, many = (compiled(n).memory_analysis().temp_size_in_bytes for n in (8, 64))
    assert many <= few + 64
    explain = jlrp.explain(
        lambda w, x: jnp.sinh(x @ w).sum(-1), baseline=jlrp.Background(rows_of(8))
    )
    text = str(jax.make_jaxpr(explain)(W, X).jaxpr)
    outside, inside = text.split("scan[", 1)
    assert "sinh" in outside.split("let", 1)[1] or "sinh" in text[: text.index("scan[")]
    assert inside


@pytest.mark.parametrize(
    "data", [jnp.zeros((0, 6)), 0.5, {"a": jnp.zeros((2, 3)), "b": jnp.zeros((3, 3))}]
)
def test_what_is_no_background_is_refused(data):
    with pytest.raises(jlrp.InputError, match="rows"):
        jlrp.Background(data)


# With all else.


def test_token_ids():
    table = jax.random.normal(jax.random.key(0), (9, 6))
    ids, pad = jnp.array([[1, 2, 3], [4, 2, 2]]), 0

    def fn(p, ids):
        return jnp.tanh(p[ids].sum(1) @ W) @ V

    found = relevance(fn, table, ids, pad)
    assert found.shape == ids.shape
    floats = relevance(
        lambda p, h: jnp.tanh(h.sum(1) @ W) @ V, (), table[ids], table[pad]
    )
    np.testing.assert_allclose(found, floats.sum(-1), atol=1e-12)
    same = relevance(fn, table, ids, ids.at[0, 1].set(0))
    assert same[0, 1] != 0 and not np.any(np.delete(np.asarray(same).ravel(), 1))


def test_one_hot_ids():
    table = jax.random.normal(jax.random.key(0), (9, 6))
    ids, mask = jnp.array([[1, 2, 3], [4, 2, 2]]), jnp.array([[8, 7, 8]])

    def by_one_hot(p, ids):
        return jnp.tanh((jax.nn.one_hot(ids, 9, dtype=p.dtype) @ p).sum(1) @ W) @ V

    def by_gather(p, ids):
        return jnp.tanh(p[ids].sum(1) @ W) @ V

    a, b = (relevance(fn, table, ids, mask) for fn in (by_one_hot, by_gather))
    np.testing.assert_allclose(a, b, atol=1e-12)


def test_parameters_get_weight_times_multiplier():
    def fn(w, x):
        return jnp.tanh(x @ w) @ V

    explained = jlrp.explain(fn, baseline=X0, wrt=("x", "params"))(W, X)
    h, h0 = X @ W, X0 @ W
    target = fn(W, X).argmax(-1)
    m = V.T[target] * (jnp.tanh(h) - jnp.tanh(h0)) / (h - h0)
    np.testing.assert_allclose(explained.params, W * ((X - X0).T @ m), atol=1e-12)
    assert abs(float(explained.params.sum() - explained.relevance.sum())) < 1e-12
    alone = jlrp.relevance(fn, W, X, baseline=X0)
    np.testing.assert_array_equal(alone, explained.relevance)


@pytest.mark.parametrize("name", ["scan", "while", "branches"])
def test_parameters_in_loops(name):
    """Of a linear use of the weights, the sum is the change that goes through them."""
    fn, params, x = PROGRAMS[name]
    explained = jlrp.explain(fn, baseline=X0, wrt=("x", "params"))(params, x)
    assert np.isfinite(explained.params).all() and np.any(explained.params)
    alone = jlrp.relevance(fn, params, x, baseline=X0)
    np.testing.assert_array_equal(alone, explained.relevance)


def tagged(w, x):
    h = jlrp.tag(jnp.tanh(x @ w), "h")
    return jlrp.tag(h * x, "product") @ V


def test_captures_sum_to_the_change():
    explained = jlrp.explain(tagged, baseline=X0, capture=("h", "product"))(W, X)
    change = explained_score(tagged, W, X) - at_reference(tagged, W, X, X0)
    np.testing.assert_allclose(explained.captured["product"].sum(), change)
    m = V.T[tagged(W, X).argmax(-1)] * (X + X0) / 2
    expected = m * (jnp.tanh(X @ W) - jnp.tanh(X0 @ W))
    np.testing.assert_allclose(explained.captured["h"], expected, atol=1e-12)


def test_conditions():
    mask = jnp.arange(6) < 2
    found = relevance(tagged, W, X, X0, condition={"h": mask[None]})
    other = relevance(tagged, W, X, X0, condition={"h": ~mask[None]})
    direct = X * 0 + relevance(tagged, W, X, X0, condition={"h": jnp.zeros((1, 6))})
    whole = relevance(tagged, W, X, X0)
    np.testing.assert_allclose(found + other - direct, whole, atol=1e-12)
    ledger = jlrp.audit(tagged, W, X, baseline=X0, condition={"h": mask[None]})
    assert ledger.unexplained < 1e-12 and abs(ledger.total("blocked")) > 1e-3


def test_captures_in_loops():
    def fn(w, x):
        def step(h, _):
            return jlrp.tag(jnp.tanh(h @ w), "h"), None

        return lax.scan(step, x, None, length=3)[0] @ V

    explained = jlrp.explain(fn, baseline=X0, capture="h")(W, X)
    change = explained_score(fn, W, X) - at_reference(fn, W, X, X0)
    np.testing.assert_allclose(explained.captured["h"].sum((1, 2)), [change] * 3)


def test_flow():
    from jlrp import flow

    edges = flow.between(tagged, W, X, "h", baseline=X0)
    into = sum(amount for (_, to), amount in edges.items() if to == "input")
    change = explained_score(tagged, W, X) - at_reference(tagged, W, X, X0)
    np.testing.assert_allclose(into, change, atol=1e-10)


@pytest.mark.parametrize("residuals", ["promise", "sqrt"])
@pytest.mark.parametrize("name", ["attention", "cnn", "scan", "lstm", "masked by x"])
def test_residual_policies(name, residuals):
    fn, params, x = PROGRAMS[name]
    x0 = moved(x, 1)
    kept = relevance(fn, params, x, x0)
    again = relevance(fn, params, x, x0, residuals=residuals)
    np.testing.assert_allclose(again, kept, atol=1e-12)


def test_a_limit_of_memory():
    fn, params, x = PROGRAMS["scan"]
    kept = relevance(fn, params, x, X0)
    limited = relevance(fn, params, x, X0, memory_limit=10**7)
    np.testing.assert_allclose(limited, kept, atol=1e-12)


@pytest.mark.parametrize("name", ["attention", "cnn", "while", "layer norm"])
def test_jit_vmap(name):
    fn, params, x = PROGRAMS[name]
    x0 = moved(x, 1)
    plain = relevance(fn, params, x, x0)

    def explained(x, x0):
        return jlrp.relevance(fn, params, x, baseline=x0)

    np.testing.assert_allclose(jax.jit(explained)(x, x0), plain, atol=1e-12)
    several = jax.vmap(explained)(jnp.stack([x, x0]), jnp.stack([x0, x]))
    np.testing.assert_allclose(several[0], plain, atol=1e-12)


def test_gradients_of_relevance():
    """By x, by the baseline and by the parameters, against finite differences."""
    fn, params, x = PROGRAMS["gated"]

    def loss(w, x, x0):
        found = jlrp.relevance(fn, w, x, jnp.zeros(2, int), baseline=x0)
        return (found**2).sum()

    for i, at in enumerate((params, x, X0)):
        direction = jax.random.normal(jax.random.key(4), at.shape)

        def along(t, i=i, at=at, direction=direction):
            arguments = [params, x, X0]
            arguments[i] = at + t * direction
            return loss(*arguments)

        slope = jax.jvp(along, (0.0,), (1.0,))[1]
        numeric = (along(1e-5) - along(-1e-5)) / 2e-5
        np.testing.assert_allclose(slope, numeric, rtol=1e-6)
        reverse = jnp.vdot(jax.grad(loss, i)(params, x, X0), direction)
        np.testing.assert_allclose(reverse, slope, rtol=1e-10)


@pytest.mark.parametrize("name", ["relu", "gelu", "layer norm", "softmax", "max"])
def test_gradients_of_relevance_stay_finite_at_the_reference(name):
    fn, params, x = PROGRAMS[name]

    def loss(x):
        found = jlrp.relevance(fn, params, x, baseline=jnp.zeros_like(x))
        return (found**2).sum()

    for at in (x, jnp.zeros_like(x), x.at[0].set(0.0)):
        assert np.isfinite(jax.grad(loss)(at)).all()


def test_low_precision():
    """Differences and multipliers are float32, secants evaluated in it."""

    def fn(w, x):
        return jax.nn.gelu(x @ w) @ w[:, :3]

    w, x, x0 = (a.astype(jnp.bfloat16) for a in (W, X, X0))
    found = relevance(fn, w, x, x0)
    assert found.dtype == jnp.float32
    wide = relevance(fn, *(a.astype(jnp.float32) for a in (w, x, x0)))
    np.testing.assert_allclose(found, wide, atol=0.1)


def test_no_mean_jacobian_needs_more_points_than_it_has():
    nodes, weights = line.nodes_of(3)
    for power in range(6):
        moment = sum(w * t**power for t, w in zip(nodes, weights, strict=True))
        assert abs(moment - 1 / (power + 1)) < 1e-14


def test_a_job(tmp_path):
    """A background, recorded: another one is another job."""
    zarr = pytest.importorskip("zarr")
    pytest.importorskip("tensorstore")
    from jlrp import jobs

    fn, params, _ = PROGRAMS["gated"]
    data = np.asarray(jax.random.normal(jax.random.key(6), (5, 6)))

    def run(rows, **options):
        explain = jlrp.explain(fn, baseline=jlrp.Background(rows))
        options |= {"batch": 2, "progress": False}
        return jobs.run(explain, params, data, tmp_path / "store", **options)

    run(rows_of(3))
    stored = zarr.open_group(tmp_path / "store", mode="r")["relevance"][...]
    expected = relevance(fn, params, jnp.asarray(data), jlrp.Background(rows_of(3)))
    np.testing.assert_allclose(stored, expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(jlrp.JlrpError, match="baseline"):
        run(rows_of(4), resume=True)
