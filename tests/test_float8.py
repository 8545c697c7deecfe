"""float8 is low precision: read in float32, its relevance float32, nothing lost."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jlrp

pytestmark = pytest.mark.relaxed
NAMES = [
    *("float8_e3m4", "float8_e4m3", "float8_e4m3b11fnuz", "float8_e4m3fn"),
    *("float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu"),
    "float4_e2m1fn",
]
rng = np.random.default_rng(0)
X = jnp.asarray(rng.uniform(0.5, 2, size=(2, 4)), jnp.float32)
W = jnp.asarray(rng.uniform(-2, 2, size=(4, 3)), jnp.float32)


def rounded(x, dtype):
    return np.asarray(x.astype(dtype).astype(jnp.float32), np.float64)


@pytest.mark.parametrize(
    ("name", "scale"), [*((name, 1.0) for name in NAMES), ("float8_e4m3fn", 1000.0)]
)
def test_a_cast_passes_relevance_on(name, scale):
    dtype = getattr(jnp, name)
    w = W * scale

    def fn(w, x):
        return x.astype(dtype).astype(jnp.float32) @ w

    found = jlrp.relevance(fn, w, X, 0, composite="attnlrp")
    assert found.dtype == jnp.float32
    want = rounded(X, dtype) * np.asarray(w, np.float64)[:, 0]
    np.testing.assert_allclose(found, want, rtol=1e-5)
    ledger = jlrp.audit(fn, w, X, 0, composite="attnlrp")
    assert ledger.unexplained < 1e-5 * np.abs(want).sum()


def test_x_and_params_may_be_float8():
    x, w = X.astype(jnp.float8_e4m3fn), W.astype(jnp.float8_e5m2)

    def fn(w, x):
        return lax.dot(x, w, preferred_element_type=jnp.float32)

    found, of_w = jlrp.relevance(fn, w, x, 1, composite="attnlrp", wrt=("x", "params"))
    products = np.asarray(x, np.float64)[:, :, None] * np.asarray(w, np.float64)
    np.testing.assert_allclose(found, products[:, :, 1], rtol=1e-5)
    np.testing.assert_allclose(of_w[:, 1], products[:, :, 1].sum(0), rtol=1e-5)
    assert found.dtype == of_w.dtype == jnp.float32


def test_activations_and_loops_of_float8():
    """A region ends at the cast; what is carried is float8."""
    dtype = jnp.float8_e4m3fn

    def fn(w, x):
        def step(h, _):
            h = jax.nn.relu(h.astype(jnp.float32) @ w @ w.T)
            return (h / 8).astype(dtype), None

        return lax.scan(step, x.astype(dtype), None, length=2)[0].astype(jnp.float32)

    ledger = jlrp.audit(fn, W, X, lambda y: y.sum(-1), composite="attnlrp")
    assert ledger.seed > 0 and ledger.unexplained < 1e-5 * ledger.seed
    assert abs(ledger.relevance - ledger.seed) < 1e-5 * ledger.seed


def test_a_derivative_around_a_float8_dot():
    """Kernels in float8 come with a custom_vjp whose cotangents are float8 too."""

    @jax.custom_vjp
    def dot(x, w):
        return lax.dot(x, w, preferred_element_type=jnp.float32)

    def backward(kept, g):
        x, w = kept
        g = g.astype(jnp.float8_e5m2)
        dx = lax.dot(g, w.T, preferred_element_type=jnp.float32)
        return dx.astype(x.dtype), (x.T.astype(jnp.float32) @ g).astype(w.dtype)

    dot.defvjp(lambda x, w: (dot(x, w), (x, w)), backward)
    dtype = jnp.float8_e4m3fn

    def fn(w, x):
        return dot(x.astype(dtype), w.astype(dtype))

    found = jlrp.relevance(fn, W, X, 0, composite="attnlrp")
    want = rounded(X, dtype) * rounded(W, dtype)[:, 0]
    np.testing.assert_allclose(found, want, rtol=1e-5)


def test_flax_dense_in_float8():
    nn = pytest.importorskip("flax.linen")
    from jlrp.integrations import flax

    module = nn.Dense(3, dot_general_cls=nn.Fp8DirectDotGeneralOp)
    variables = module.init(jax.random.key(0), X)
    fn, params = flax.linen(module, variables)
    found = jlrp.relevance(fn, params, X, 0)
    kernel = variables["params"]["kernel"]
    assert found.dtype == jnp.float32 and jnp.isfinite(found).all()
    np.testing.assert_allclose(found, X * kernel[:, 0], rtol=0.15, atol=0.02)


def test_bfloat16_is_as_it_was():
    """Of a cast that keeps more digits the multiplier passes."""

    def fn(w, x):
        return x.astype(jnp.bfloat16).astype(jnp.float32) @ w

    found = jlrp.relevance(fn, W, X, 0, composite="attnlrp")
    np.testing.assert_allclose(found, X * W[:, 0], rtol=1e-6)
