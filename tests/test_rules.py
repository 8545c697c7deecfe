"""Every rule of linear maps equals a dense replica written from its formula."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jlrp
from jlrp import rules

pytestmark = pytest.mark.relaxed
NHWC = ("NHWC", "HWIO", "NHWC")
NCHW = ("NCHW", "OIHW", "NCHW")


def conv(p, x, **options):
    strides = options.pop("strides", (1, 1))
    return lax.conv_general_dilated(x, p["w"], strides, **options)


MAPS = {
    "dense": ((2, 6), (6, 5), (5,), lambda p, x: x @ p["w"] + p["b"]),
    "einsum": (
        (2, 3, 4),
        (5, 4, 3),
        (5,),
        lambda p, x: jnp.einsum("bij,oji->bo", x, p["w"]) + p["b"],
    ),
    "weight left": (
        (2, 6),
        (5, 6),
        (5, 1),
        lambda p, x: (p["w"] @ x.T + p["b"]).T,
    ),
    "strided NHWC": (
        (2, 5, 5, 2),
        (3, 3, 2, 3),
        (1, 1, 1, 3),
        lambda p, x: (
            conv(p, x, strides=(2, 2), padding="SAME", dimension_numbers=NHWC) + p["b"]
        ),
    ),
    "grouped NCHW": (
        (2, 4, 4, 4),
        (4, 2, 3, 3),
        (1, 4, 1, 1),
        lambda p, x: (
            conv(p, x, padding="SAME", dimension_numbers=NCHW, feature_group_count=2)
            + p["b"]
        ),
    ),
    "dilated": (
        (2, 5, 5, 2),
        (2, 2, 2, 2),
        (1, 1, 1, 2),
        lambda p, x: (
            conv(p, x, padding="VALID", dimension_numbers=NHWC, rhs_dilation=(2, 2))
            + p["b"]
        ),
    ),
    "transposed": (
        (2, 3, 3, 2),
        (3, 3, 2, 3),
        (1, 1, 1, 3),
        lambda p, x: (
            lax.conv_transpose(x, p["w"], (2, 2), "SAME", dimension_numbers=NHWC)
            + p["b"]
        ),
    ),
}
EPS = 1e-3  # visible


def positive(a):
    return np.maximum(a, 0)


def negative(a):
    return np.minimum(a, 0)


def stabilized(z, s):
    return z + np.where(z >= 0, s, -s)


def shares(numerators, z, r, s):
    """`sum_j n_ij r_j / z_j` of dense numerators (j, i)."""
    return np.einsum("ji,j->i", numerators, r / stabilized(z, s))


def epsilon(x, w, b, z, r, s):
    return shares(w * x, (w * x).sum(1) + b, r, s)


def z_plus(x, w, b, z, r, s):
    n = positive(w * x)
    return shares(n, n.sum(1) + positive(b), r, s)


def alpha_beta(x, w, b, z, r, s):
    n = negative(w * x)
    return 2 * z_plus(x, w, b, z, r, s) - shares(n, n.sum(1) + negative(b), r, s)


def gamma(x, w, b, z, r, s, g=0.25):
    up, down = w + g * positive(w), w + g * negative(w)
    n = positive(x) * up + negative(x) * down
    above = shares(n, n.sum(1) + b + g * positive(b), r * (z > 0), s)
    n = positive(x) * down + negative(x) * up
    return above + shares(n, n.sum(1) + b + g * negative(b), r * (z < 0), s)


def gamma_montavon(x, w, b, z, r, s, g=0.25):
    return epsilon(x, w + g * positive(w), b + g * positive(b), z, r, s)


def gamma_captum(x, w, b, z, r, s, g=0.25):
    return epsilon(x, w + g * positive(w), b, z, r, s)


def z_box(x, w, b, z, r, s, low=-3.0, high=4.0):
    n = x * w - low * positive(w) - high * negative(w)
    return shares(n, n.sum(1), r, s)


def w_square(x, w, b, z, r, s):
    return shares(w**2, (w**2).sum(1) + b**2, r, s)


def flat(x, w, b, z, r, s):
    seen = (w != 0).astype(float)
    return shares(seen, seen.sum(1), r, s)


REPLICAS = {
    "Zero": (rules.Zero(), lambda *a: epsilon(*a[:-1], 0.0)),
    "Epsilon": (rules.Epsilon(EPS), epsilon),
    "ZPlus": (rules.ZPlus(stabilizer=EPS), z_plus),
    "AlphaBeta": (rules.AlphaBeta(2.0, 1.0, stabilizer=EPS), alpha_beta),
    "Gamma": (rules.Gamma(0.25, stabilizer=EPS), gamma),
    "GammaMontavon": (rules.GammaMontavon(0.25, stabilizer=EPS), gamma_montavon),
    "GammaCaptum": (
        rules.GammaMontavon(0.25, gamma_bias=False, stabilizer=EPS),
        gamma_captum,
    ),
    "ZBox": (rules.ZBox(-3.0, 4.0, stabilizer=EPS), z_box),
    "WSquare": (rules.WSquare(stabilizer=EPS), w_square),
    "Flat": (rules.Flat(stabilizer=EPS), flat),
}


def dense_form(fn, p, x):
    """Kernel (outputs, inputs) and bias of one example's map, from its Jacobian."""

    def flat_map(v):
        return fn(p, v.reshape(1, *x.shape)).reshape(-1)

    v = jnp.asarray(x).reshape(-1)
    return np.asarray(jax.jacobian(flat_map)(v)), np.asarray(flat_map(v * 0))


@pytest.mark.parametrize("before", ["mixed", "nonnegative"])
@pytest.mark.parametrize("bias", ["absorb", "ignore"])
@pytest.mark.parametrize("rule", REPLICAS)
@pytest.mark.parametrize("name", MAPS)
def test_dense_replica(name, rule, bias, before):
    shape, w_shape, b_shape, fn = MAPS[name]
    ours, replica = REPLICAS[rule]
    if bias == "ignore":
        if not hasattr(ours, "bias"):
            pytest.skip("the rule has no bias term")
        ours = type(ours)(**{**vars(ours), "bias": "ignore"})
    rng = np.random.default_rng(len(name) + len(rule))
    x, w, b = (rng.normal(size=s) for s in (shape, w_shape, b_shape))
    p = {"w": jnp.asarray(w), "b": jnp.asarray(b)}

    def model(p, x):  # a ReLU in front makes the sign known; it passes relevance
        return fn(p, jax.nn.relu(x) if before == "nonnegative" else x)

    seed = rng.normal(size=jax.eval_shape(fn, p, x).shape)
    kind = "conv" if x.ndim == 4 else "dense"
    composite = jlrp.Composite([(kind, ours)], base="epsilon")
    if before == "nonnegative":
        x = np.abs(x)  # so that the ReLU is the identity, values included
    r = jlrp.relevance(model, p, jnp.asarray(x), jnp.asarray(seed), composite=composite)
    for i in range(len(x)):
        kernel, offset = dense_form(fn, p, x[i])
        v = x[i].reshape(-1)
        z = kernel @ v + offset
        b_used = offset if bias == "absorb" else offset * 0
        expected = replica(v, kernel, b_used, z, z * seed[i].reshape(-1), EPS)
        np.testing.assert_allclose(
            np.asarray(r[i]).reshape(-1),
            expected,
            rtol=0,
            atol=1e-10 * np.abs(expected).max(),
        )


def test_split_bias_is_dynamic_lrps():
    rng = np.random.default_rng(0)
    x, w, b = rng.normal(size=(1, 6)), rng.normal(size=(6, 5)), rng.normal(size=5)
    composite = jlrp.Composite([("dense", rules.Epsilon(EPS, bias="split"))])
    p = {"w": jnp.asarray(w), "b": jnp.asarray(b)}
    seed = jnp.ones((1, 5))
    fn = MAPS["dense"][3]
    ours = jlrp.relevance(fn, p, jnp.asarray(x), seed, composite=composite)
    z0 = x[0] @ w
    r = (z0 + b) * np.abs(z0) / (np.abs(z0) + np.abs(b) + EPS)
    np.testing.assert_allclose(ours[0], shares(w.T * x[0], z0, r, EPS), rtol=1e-10)


def test_uniform_gate_and_absolute_shares():
    p = {k: jnp.asarray(np.random.default_rng(i).normal(size=(6, 5)))
         for i, k in enumerate("uvw")}  # fmt: skip
    x = jnp.asarray(np.random.default_rng(9).normal(size=(1, 6)))

    def through(factor):
        """Relevance of x if all of the product went through one factor."""
        a, b = x @ p["u"], jax.nn.silu(x @ p["v"])
        seed = b if factor == "u" else a * b / (x @ p["v"])
        return x * (seed @ p[factor].T)

    def glu(p, x):
        return (x @ p["u"]) * jax.nn.silu(x @ p["v"])

    def explained(rule):
        composite = jlrp.Composite([("product", rule)], base=jlrp.composites.epsilon(0))
        return jlrp.relevance(glu, p, x, jnp.ones((1, 5)), composite=composite)

    halves = (through("u") + through("v")) / 2
    np.testing.assert_allclose(explained(rules.Uniform()), halves, rtol=1e-9)
    np.testing.assert_allclose(explained(rules.Gate()), through("u"), rtol=1e-9)
    a, b = x @ p["u"], jax.nn.silu(x @ p["v"])
    share = jnp.abs(a) / (jnp.abs(a) + jnp.abs(b) + 1e-11)
    expected = x * ((share * b) @ p["u"].T) + x * (
        ((1 - share) * a * b / (x @ p["v"])) @ p["v"].T
    )
    np.testing.assert_allclose(explained(rules.Absolute()), expected, rtol=1e-7)


def test_cumsum_formula():
    x = jnp.asarray([1.0, -3.0, 2.5, 0.5])
    composite = jlrp.Composite([("sum", rules.Epsilon(EPS))], base="epsilon")
    seed = jnp.asarray([0.5, 2.0, -1.0, 1.5])
    ours = jlrp.relevance(lambda _, x: jnp.cumsum(x), (), x, seed, composite=composite)
    y = np.cumsum(x)
    expected = x * np.cumsum((y * seed / stabilized(y, EPS))[::-1])[::-1]
    np.testing.assert_allclose(ours, expected, rtol=1e-12)
