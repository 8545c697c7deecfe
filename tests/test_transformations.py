"""Relevance under jit, vmap, grad, and of programs that use them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlrp

pytestmark = pytest.mark.relaxed
KEYS = iter(jax.random.split(jax.random.key(1), 9))
P = {
    "k": jax.random.normal(next(KEYS), (3, 3, 1, 4)),
    "w": jax.random.normal(next(KEYS), (16, 6)),
    "b": jax.random.normal(next(KEYS), (6,)),
    "v": jax.random.normal(next(KEYS), (6, 3)),
}
X = jax.random.normal(next(KEYS), (4, 4, 4, 1))


def model(p, x):
    h = jax.lax.conv_general_dilated(
        x, p["k"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    h = jax.nn.relu(h)
    h = jax.lax.reduce_window(
        h, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID"
    )
    return jnp.tanh(h.reshape(h.shape[0], -1) @ p["w"] + p["b"]) @ p["v"]


COMPOSITES = ["epsilon", "epsilon_plus", "epsilon_alpha2_beta1", "dynamic_lrp"]


@pytest.mark.parametrize("composite", COMPOSITES)
def test_jit_vmap_and_eager_agree(composite):
    def explain(p, x):
        return jlrp.relevance(model, p, x, composite=composite)

    expected = explain(P, X)
    with jax.disable_jit():
        np.testing.assert_allclose(explain(P, X), expected, atol=1e-12)
    np.testing.assert_allclose(jax.jit(explain)(P, X), expected, atol=1e-12)
    one_by_one = jax.vmap(lambda x: explain(P, x[None])[0])(X)
    np.testing.assert_allclose(one_by_one, expected, atol=1e-12)


@pytest.mark.parametrize("composite", COMPOSITES)
def test_gradient_of_relevance(composite):
    def penalty(w, x):
        return jnp.sum(
            jlrp.relevance(model, P | {"w": w}, x, target=1, composite=composite) ** 2
        )

    direction = jax.random.normal(jax.random.key(5), P["w"].shape)
    slope = jnp.vdot(jax.grad(penalty)(P["w"], X), direction)
    h = 1e-6
    difference = (
        penalty(P["w"] + h * direction, X) - penalty(P["w"] - h * direction, X)
    ) / (2 * h)
    np.testing.assert_allclose(slope, difference, rtol=1e-5)
    together = jax.grad(penalty)(P["w"], X)
    apart = jax.jit(jax.vmap(jax.grad(penalty), (None, 0)))(P["w"], X[:, None])
    np.testing.assert_allclose(apart.sum(0), together, rtol=1e-8, atol=1e-10)


def test_labels_and_new_calls_do_not_recompile():
    traces = []

    class Model:
        def __init__(self):
            self.layers = []  # makes it unhashable, as a Linen module with a list is

        __hash__ = None

        def apply(self, p, x):
            traces.append(1)
            return model(p, x)

    owner = Model()
    for labels in ([0, 1, 2, 0], [2, 2, 1, 1]):
        r = jlrp.relevance(owner.apply, P, X, np.asarray(labels))
        scores = np.asarray(model(P, X))[np.arange(4), labels]
        assert r.shape == X.shape and np.all(np.isfinite(scores))
    count = len(traces)
    explain = jlrp.explain(model)
    jlrp.relevance(owner.apply, P, X, np.asarray([1, 1, 1, 1]))
    assert len(traces) <= count + 1  # the target check looks at shapes only
    del explain


def test_linear_in_the_seed_and_zero_in_zero_out():
    rng = np.random.default_rng(0)
    a, b = (jnp.asarray(rng.normal(size=(4, 3))) for _ in range(2))

    def explain(seed, x=X):
        return jlrp.relevance(model, P, x, seed)

    np.testing.assert_allclose(
        explain(2 * a - b), 2 * explain(a) - explain(b), atol=1e-10
    )
    assert not np.any(explain(a, jnp.zeros_like(X)))


def test_programs_with_awkward_variables():
    square = jax.jit(lambda h, w: jnp.tanh(h @ w))

    def fn(p, x):  # one body called twice; x returned; one value twice
        h = square(square(x["a"], p["w"]), p["w"])
        return jnp.concatenate([h + h, x["a"], x["b"][:, None]], -1)

    p = {"w": P["w"][:6]}
    x = {"a": X.reshape(4, -1)[:, :6], "b": X[:, 0, 0, 0], "mask": X[:, 0, 0, 0] > 0}
    r = jlrp.relevance(
        fn, p, x, jnp.ones((4, 13)), composite=jlrp.composites.epsilon(0.0)
    )
    np.testing.assert_allclose(r["b"], x["b"])
    assert not np.any(r["mask"]) and r["mask"].dtype == jnp.float32

    def passing(a):  # tanh passes: multiplier tanh(z) / z
        z1 = a @ p["w"]
        z2 = jnp.tanh(z1) @ p["w"]
        m = (2 * jnp.tanh(z2) / z2) @ p["w"].T
        return a * ((m * jnp.tanh(z1) / z1) @ p["w"].T) + a

    np.testing.assert_allclose(r["a"], passing(x["a"]), atol=1e-12)


def test_checkpoint_custom_derivatives_and_leaks():
    @jax.custom_vjp
    def twice(h):
        return 2 * h

    twice.defvjp(lambda h: (2 * h, None), lambda _, ct: (2 * ct,))

    def plain(p, x):
        return jax.nn.relu(2 * (x @ p["w"])) @ p["v"]

    def wrapped(p, x):
        return jax.checkpoint(lambda h: jax.nn.relu(twice(h @ p["w"])))(x) @ p["v"]

    x = X.reshape(4, -1)
    with jax.checking_leaks():
        np.testing.assert_allclose(
            jlrp.relevance(wrapped, P, x), jlrp.relevance(plain, P, x), atol=1e-12
        )


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_low_precision_models_have_float32_relevance(dtype):
    low = jax.tree.map(lambda v: v.astype(dtype), (P, X))
    single = jax.tree.map(lambda v: v.astype(jnp.float32), low)
    for composite in ("epsilon", "epsilon_plus"):
        ours = jlrp.relevance(model, *low, target=1, composite=composite)
        reference = jlrp.relevance(model, *single, target=1, composite=composite)
        assert ours.dtype == jnp.float32
        error = jnp.abs(ours - reference).max() / jnp.abs(reference).max()
        assert error < 0.1


def test_epsilon_zero_is_gradient_input_on_relu_networks():
    def fn(p, x):
        return jax.nn.relu(jax.nn.relu(x @ p["w"]) @ p["w"][:6]) @ p["v"]

    x = X.reshape(4, -1)
    gradient = x * jax.grad(lambda x: fn(P, x).max(-1).sum())(x)
    for composite in (jlrp.composites.epsilon(0.0), "gradient_input"):
        ours = jlrp.relevance(fn, P, x, composite=composite)
        np.testing.assert_allclose(
            ours, gradient, atol=1e-12 * float(jnp.abs(gradient).max())
        )
