"""Declared derivatives: the body, or what the user declared where the body ends."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jlrp

pytestmark = pytest.mark.relaxed
RNG = np.random.default_rng(9)


def normal(*shape):
    return jnp.asarray(RNG.normal(size=shape))


P = {"w": normal(4, 5), "v": normal(5, 3), "skip": normal(4, 3)}
X = normal(2, 4)
LRP_0 = jlrp.composites.epsilon(0.0)


def by_vjp(function, backward):
    called = jax.custom_vjp(function)
    called.defvjp(lambda *a: (function(*a), a), backward)
    return called


def by_jvp(function, forward):
    called = jax.custom_jvp(function)
    called.defjvp(lambda primals, tangents: (called(*primals), forward(*tangents)))
    return called


def eighths(h):
    return jnp.round(h * 8) / 8


@jax.custom_vjp
def nested(h):
    return passes_vjp(h) * 1.0


passes_vjp = by_vjp(eighths, lambda a, g: (g,))
nested.defvjp(lambda h: (nested(h), None), lambda _, g: (g,))
STRAIGHT = {
    "custom_vjp": passes_vjp,
    "custom_jvp": by_jvp(eighths, lambda t: t),
    "nested": nested,
    "jitted": jax.jit(passes_vjp),
    "binary": by_vjp(lambda h: jnp.sign(h), lambda a, g: (g * (abs(a[0]) < 1),)),
    "thresholded": by_vjp(
        lambda h: (h > 0).astype(h.dtype), lambda a, g: (g * (abs(a[0]) < 1),)
    ),
    "cast": by_vjp(
        lambda h: (h * 8).astype(jnp.int32).astype(h.dtype) / 8, lambda a, g: (g,)
    ),
}


def network(q):
    def fn(p, x):
        return q(jax.nn.relu(x @ p["w"])) @ p["v"] + 0.1 * (x @ p["skip"])

    return fn


@pytest.mark.parametrize("name", STRAIGHT)
def test_a_straight_through_estimator_takes_its_derivative(name):
    fn = network(STRAIGHT[name])
    expected = jax.grad(lambda x: fn(P, x)[:, 0].sum())(X) * X
    for composite in (LRP_0, "gradient_input"):
        ours = jlrp.relevance(fn, P, X, 0, composite=composite)
        np.testing.assert_allclose(ours, expected, atol=1e-12)
    ledger = jlrp.audit(fn, P, X, 0, composite=LRP_0)
    causes = sum(ledger.total(cause) for cause in jlrp.reports.CAUSES)
    assert ledger.unexplained < 1e-12
    np.testing.assert_allclose(ledger.relevance + causes, ledger.seed, atol=1e-12)
    assert ledger.total("stopped") == 0 and ledger.total("taylor") != 0
    assert jlrp.inspect(fn, P, X, 0).coverage.fallback == 0


def test_alone_it_still_carries():
    fn = lambda p, x: passes_vjp(x @ p["w"])  # noqa: E731
    np.testing.assert_allclose(
        jlrp.relevance(fn, P, X, 0, composite=LRP_0), X * P["w"][:, 0], atol=1e-12
    )


def test_in_loops_batches_and_low_precision():
    def looped(p, x):
        return lax.scan(lambda h, _: (passes_vjp(h * 1.5), None), x, None, length=2)[0]

    score = lambda x: looped(P, x).sum()  # noqa: E731
    ours = jlrp.relevance(lambda p, x: looped(p, x).sum(-1), P, X, composite=LRP_0)
    np.testing.assert_allclose(ours, jax.grad(score)(X) * X, atol=1e-12)

    mapped = lambda p, x: jax.vmap(passes_vjp)(x) @ p["w"]  # noqa: E731
    ours = jlrp.relevance(mapped, P, X, 0, composite=LRP_0)
    np.testing.assert_allclose(ours, X * P["w"][:, 0], atol=1e-12)

    def low(p, x):
        h = passes_vjp(x.astype(jnp.bfloat16))
        return h.astype(jnp.float32) @ p["w"].astype(jnp.float32)

    ours = jlrp.relevance(low, P, X.astype(jnp.float32), 0, composite=LRP_0)
    rounded = X.astype(jnp.bfloat16).astype(jnp.float32)
    np.testing.assert_allclose(ours, rounded * P["w"][:, 0], rtol=2e-2)


def test_several_operands_take_the_declared_derivative():
    """A learned step size: the signal is rounded, the step is not."""

    def stepped(h, s):
        return jnp.round(h / s) * s

    def backward(a, g):
        h, s = a
        return g, jnp.sum(g * (jnp.round(h / s) - h / s))

    learned = by_vjp(stepped, backward)
    fn = lambda p, x: learned(x, 0.25) @ p["w"]  # noqa: E731
    ours = jlrp.relevance(fn, P, X, 0, composite=LRP_0)
    np.testing.assert_allclose(ours, X * P["w"][:, 0], atol=1e-12)

    plain = by_vjp(lambda h: jnp.round(h), lambda a, g: (g,))

    def of_x(p, x):  # the step comes from x: shares add up to the score
        s = jnp.abs(x).mean(-1, keepdims=True)
        return (plain(x / s) * s) @ p["w"]

    ledger = jlrp.audit(of_x, P, X, 0, composite="attnlrp")
    rest = ledger.relevance + ledger.total("taylor")
    np.testing.assert_allclose(rest, ledger.seed, atol=1e-9)


# Whose body says how its output comes about: it is looked into, as ever.


def identity(h):
    return h


DECOYS = {
    "gradient clipping": by_vjp(identity, lambda a, g: (jnp.clip(g, -0.1, 0.1),)),
    "gradient reversal": by_vjp(identity, lambda a, g: (-g,)),
    "relu6": by_vjp(jax.nn.relu6, lambda a, g: (g,)),
    "clip": by_vjp(lambda h: jnp.clip(h, -0.5, 0.5), lambda a, g: (g,)),
    "half rounded": by_vjp(lambda h: h + jnp.round(h), lambda a, g: (g,)),
    "low precision": by_vjp(
        lambda h: h.astype(jnp.float32).astype(h.dtype), lambda a, g: (g * 2,)
    ),
}
BODIES = {
    "gradient clipping": identity,
    "gradient reversal": identity,
    "relu6": jax.nn.relu6,
    "clip": lambda h: jnp.clip(h, -0.5, 0.5),
    "half rounded": lambda h: h + jnp.round(h),
    "low precision": lambda h: h.astype(jnp.float32).astype(h.dtype),
}


@pytest.mark.filterwarnings("ignore::jlrp.JlrpWarning")
@pytest.mark.parametrize("name", DECOYS)
def test_a_body_that_carries_is_looked_into(name):
    fn, body = network(DECOYS[name]), network(BODIES[name])
    ours, expected = (
        jlrp.relevance(f, P, X, 0, composite="attnlrp") for f in (fn, body)
    )
    np.testing.assert_allclose(ours, expected, atol=1e-12)
    gradient = jax.grad(lambda x: fn(P, x)[:, 0].sum())(X) * X
    ours = jlrp.relevance(fn, P, X, 0, composite="gradient_input")
    np.testing.assert_allclose(ours, gradient, atol=1e-6)


def test_a_derivative_declared_zero_stops():
    zero = by_vjp(eighths, lambda a, g: (jnp.zeros_like(g),))
    with pytest.warns(jlrp.JlrpWarning, match="round at"):
        ledger = jlrp.audit(network(zero), P, X, 0, composite=LRP_0)
    taken = (eighths(jax.nn.relu(X @ P["w"])) @ P["v"])[:, 0].sum()
    np.testing.assert_allclose(ledger.total("stopped"), taken)


def test_softmax_and_logsumexp_are_what_they_are():
    """Their custom derivatives stop the shift by the largest, which carries nothing."""
    fn = lambda p, x: jax.nn.logsumexp(x @ p["w"], -1)  # noqa: E731
    expected = X * jax.grad(lambda x: fn(P, x).sum())(X)
    ours = jlrp.relevance(fn, P, X, composite=LRP_0)
    np.testing.assert_allclose(ours, expected, atol=1e-12)
    kinds = [row.kind for row in jlrp.inspect(fn, P, X).operations]
    assert "function" not in kinds
