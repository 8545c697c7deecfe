"""Opaque kernels: an error with the ways out, or what the user said about them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

import jlrp

W = jnp.asarray(np.random.default_rng(0).normal(size=(4, 3)))
X = jnp.asarray(np.random.default_rng(1).normal(size=(2, 4)))
LAST = lambda out: out[:, -1]  # noqa: E731


def written_out(z):
    return jnp.tanh(z) * z


def by_pallas(z):
    def kernel(z_ref, out_ref):
        out_ref[...] = jnp.tanh(z_ref[...]) * z_ref[...]

    shape = jax.ShapeDtypeStruct(z.shape, z.dtype)
    return pl.pallas_call(kernel, out_shape=shape, interpret=True)(z)


def by_callback(z):
    shape = jax.ShapeDtypeStruct(z.shape, z.dtype)
    kernel = lambda v: np.tanh(v) * v  # noqa: E731
    return jax.pure_callback(kernel, shape, z, vmap_method="expand_dims")


def by_ffi(z):
    """No such target is registered: enough to trace, not to run."""
    return jax.ffi.ffi_call("fused", jax.ShapeDtypeStruct(z.shape, z.dtype))(z)


KERNELS = {
    "pallas_call": by_pallas,
    "pure_callback": by_callback,
    "ffi_call": by_ffi,
}
THAT_RUN = ["pallas_call", "pure_callback"]


def behind_a_dot(kernel):
    return lambda w, x: kernel(x @ w)


def primitive_of(kernel):
    return jax.make_jaxpr(kernel)(X).eqns[0].primitive


@pytest.fixture(params=THAT_RUN)
def kernel(request):
    return KERNELS[request.param]


# The error.


@pytest.mark.parametrize("fallback", [None, "gradient"])
@pytest.mark.parametrize("name", KERNELS)
def test_error_names_the_kernel_the_line_and_the_ways_out(name, fallback):
    fn = behind_a_dot(KERNELS[name])
    with pytest.raises(jlrp.errors.UnsupportedPrimitiveError) as raised:
        jlrp.relevance(fn, W, X, target=LAST, fallback=fallback)
    message = str(raised.value)
    assert f"`{name}`" in message and "test_opaque.py:" in message
    for way in ("register_rule", "custom_relevance", "custom_vjp", 'fallback="stop"'):
        assert way in message


@pytest.mark.parametrize("name", KERNELS)
def test_inspect_counts_a_kernel_as_uncovered(name):
    report = jlrp.inspect(behind_a_dot(KERNELS[name]), W, X, target=LAST)
    assert (report.coverage.fallback, report.coverage.uncovered) == (0, 1)


def test_a_kernel_off_the_paths_of_relevance_is_just_run(kernel):
    fn = lambda w, x: (x @ w) * kernel(w[:1] * 1.0)  # noqa: E731
    plain = lambda w, x: (x @ w) * written_out(w[:1] * 1.0)  # noqa: E731
    one = jlrp.relevance(plain, W, X, target=LAST, composite="epsilon")
    many = jlrp.relevance(fn, W, X, target=LAST, composite="epsilon")
    np.testing.assert_allclose(many, one, rtol=1e-12)


def test_stop_absorbs_what_reaches_the_kernel(kernel):
    fn = lambda w, x: kernel(x @ w) + x @ w  # noqa: E731
    ledger = jlrp.audit(fn, W, X, target=LAST, composite="epsilon", fallback="stop")
    blocked = np.sum(written_out(X @ W)[:, -1])
    np.testing.assert_allclose(ledger.total("blocked"), blocked, rtol=1e-4)
    assert ledger.unexplained < 1e-12


# A registered rule, a custom_relevance.


@pytest.fixture
def registered(kernel):
    """The kernel, whose primitive passes relevance on as it is."""
    primitive = primitive_of(kernel)
    jlrp.register_rule(primitive, lambda r, x, y, **params: r)
    yield kernel
    jlrp.unregister_rule(primitive)


def test_registered_rule_is_taken(registered):
    relevance = jlrp.relevance(
        behind_a_dot(registered), W, X, target=LAST, composite="epsilon"
    )
    plain = jlrp.Composite([("activation", jlrp.rules.Pass())], base="epsilon")
    expected = jlrp.relevance(
        behind_a_dot(written_out), W, X, target=LAST, composite=plain
    )
    np.testing.assert_allclose(relevance, expected, rtol=1e-6)


def test_registered_rule_goes_before_the_derivative_around_it(registered):
    fn = behind_a_dot(with_derivative(registered))
    relevance = jlrp.relevance(fn, W, X, target=LAST, composite="epsilon")
    direct = behind_a_dot(registered)
    expected = jlrp.relevance(direct, W, X, target=LAST, composite="epsilon")
    np.testing.assert_allclose(relevance, expected, rtol=1e-12)
    assert jlrp.inspect(fn, W, X, target=LAST).coverage.fallback == 0


def test_custom_relevance_around_a_kernel(kernel):
    @jlrp.custom_relevance
    def fused(w, x):
        return kernel(x @ w)

    @fused.def_relevance
    def shared_by_contribution(r, x, y):
        w, x = x
        return None, x * ((r / (x @ w)) @ w.T)

    relevance = jlrp.relevance(fused, W, X, target=LAST)
    expected = X * W[None, :, -1] / (X @ W[:, -1:]) * written_out(X @ W)[:, -1:]
    np.testing.assert_allclose(relevance, expected, rtol=1e-10)


# The custom_vjp or custom_jvp around a kernel.


def with_derivative(kernel):
    """The kernel with a derivative that nobody else would give it: twice the true."""
    fused = jax.custom_vjp(kernel)
    slope = jax.grad(lambda z: written_out(z).sum())
    fused.defvjp(lambda z: (kernel(z), z), lambda z, g: (2 * g * slope(z),))
    return fused


def with_forward_derivative(kernel):
    fused = jax.custom_jvp(kernel)
    slope = jax.grad(lambda z: written_out(z).sum())
    fused.defjvps(lambda t, out, z: 2 * t * slope(z))
    return fused


AROUND = {"custom_vjp": with_derivative, "custom_jvp": with_forward_derivative}


@pytest.mark.parametrize("around", AROUND.values(), ids=AROUND)
@pytest.mark.parametrize("composite", ["epsilon", "attnlrp", "gradient_input"])
def test_derivative_around_a_kernel_is_taken(kernel, around, composite):
    fn = behind_a_dot(around(kernel))
    relevance = jlrp.relevance(fn, W, X, target=LAST, composite=composite)
    gradient = jax.grad(lambda x: written_out(x @ W)[:, -1].sum())(X)
    np.testing.assert_allclose(relevance, 2 * X * gradient, rtol=1e-4)


@pytest.mark.parametrize("around", AROUND.values(), ids=AROUND)
def test_derivative_around_a_kernel_is_a_fallback(kernel, around):
    report = jlrp.inspect(behind_a_dot(around(kernel)), W, X, target=LAST)
    assert (report.coverage.fallback, report.coverage.uncovered) == (1, 0)


@pytest.mark.parametrize("around", AROUND.values(), ids=AROUND)
def test_ledger_holds_the_remainder_of_the_derivative(kernel, around):
    ledger = jlrp.audit(behind_a_dot(around(kernel)), W, X, target=LAST)
    z = (X @ W)[:, -1]
    slope = jax.grad(lambda z: written_out(z).sum())(z)
    remainder = np.sum(written_out(z) - 2 * slope * z)
    np.testing.assert_allclose(ledger.total("taylor"), remainder, rtol=1e-8)
    assert ledger.unexplained < 1e-10


def test_derivative_around_a_kernel_in_a_loop_under_jit_and_vmap(kernel):
    fused = with_derivative(kernel)

    def fn(w, x):
        step = lambda z, _: (jax.jit(fused)(z), None)  # noqa: E731
        return jax.lax.scan(step, x @ w, None, length=2)[0]

    composite = "gradient_input"
    explain = lambda x: jlrp.relevance(fn, W, x, target=2, composite=composite)  # noqa: E731
    gradient = jax.grad(lambda x: fn(W, x)[:, 2].sum())(X)
    np.testing.assert_allclose(jax.vmap(explain)(X), X * gradient, rtol=1e-10)


def test_custom_derivatives_without_a_kernel_are_looked_into():
    fn = behind_a_dot(with_derivative(written_out))
    report = jlrp.inspect(fn, W, X, target=LAST)
    assert report.coverage.fallback == 0
    assert [op.kind for op in report.operations] == [
        op.kind
        for op in jlrp.inspect(behind_a_dot(written_out), W, X, target=LAST).operations
    ]


def test_a_kernel_with_a_rule_in_a_scan(kernel):
    """It has no derivative, which would say how much a scan may stack."""

    def scanned(kernel):
        def fn(w, x):
            h, _ = jax.lax.scan(lambda h, _: (kernel(h @ w), None), x, None, length=3)
            return h

        return fn

    square = np.ones((X.shape[1], X.shape[1])) * 0.1 + np.eye(X.shape[1])
    jlrp.register_rule(primitive_of(kernel), jlrp.rules.Stop())
    try:
        found = jlrp.relevance(scanned(kernel), square, X, np.ones(X.shape))
    finally:
        jlrp.unregister_rule(primitive_of(kernel))
    assert found.shape == X.shape and not found.any()
