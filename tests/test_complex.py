"""Complex numbers inside: relevance is real, and that of the same real arithmetic."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from differences import EXACT, check, conserves, numbers, same
from jax import lax

import jlrp

pytestmark = pytest.mark.relaxed


# Complex numbers.


@pytest.mark.parametrize("shape", [(5,), (3, 4)])
@pytest.mark.parametrize("kind", ["fft", "ifft", "rfft", "irfft"])
def test_fft(kind, shape):
    x = numbers(0, *shape)

    def fn(x):
        if kind == "irfft":
            half = lax.complex(x, x**2)
            return jnp.fft.irfft(half, 2 * max(1, x.shape[-1] - 1))
        y = getattr(jnp.fft, kind)(x)
        return jnp.concatenate([y.real, y.imag])

    def matrix(x):
        n = x.shape[-1]
        sign = 1 if kind == "ifft" else -1
        k = np.arange(n // 2 + 1 if kind == "rfft" else n)
        f = np.exp(sign * 2j * np.pi * np.outer(np.arange(n), k) / n)
        f = f / n if kind == "ifft" else f
        return jnp.concatenate([x @ jnp.asarray(f.real), x @ jnp.asarray(f.imag)])

    if kind != "irfft":
        same(fn, matrix, x)
    conserves(fn, x)


def complexes(x):
    return lax.complex(x[0], x[1]), lax.complex(x[2], x[3])


PAIRS = {  # the same in complex and in real arithmetic
    "mul": (
        lambda a, b: a * b,
        lambda a, b, c, d: (a * c - b * d, a * d + b * c),
    ),
    "mul by a constant": (
        lambda a, b: a * (2 - 1j) + b,
        lambda a, b, c, d: (2 * a + b + c, 2 * b - a + d),
    ),
    "conj, add": (
        lambda a, b: jnp.conj(a) - b,
        lambda a, b, c, d: (a - c, -b - d),
    ),
    "dot": (
        lambda a, b: a @ b,
        lambda a, b, c, d: (a @ c - b @ d, a @ d + b @ c),
    ),
    "bias": (
        lambda a, b: a + (0.5 - 2j) + b,
        lambda a, b, c, d: (a + 0.5 + c, b - 2.0 + d),
    ),
    "where, mean": (
        lambda a, b: jnp.where(jnp.eye(3) > 0, a, b).mean(0),
        lambda a, b, c, d: (
            jnp.where(jnp.eye(3) > 0, a, c).mean(0),
            jnp.where(jnp.eye(3) > 0, b, d).mean(0),
        ),
    ),
    "abs": (
        lambda a, b: jnp.abs(a) + 0j * b,
        lambda a, b, c, d: (jnp.sqrt(a**2 + b**2), 0 * d),
    ),
}


@pytest.mark.parametrize("kind", PAIRS)
@pytest.mark.parametrize("composite", ["exact", "gradient_input", "attnlrp", "cp_lrp"])
def test_complex_and_real_arithmetic_agree(kind, composite):
    x = numbers(0, 4, 3, 3)
    in_complex, in_real = PAIRS[kind]

    def one(x):
        y = in_complex(*complexes(x))
        return jnp.tanh(jnp.stack([y.real, y.imag]))

    def other(x):
        return jnp.tanh(jnp.stack(in_real(*x)))

    if composite == "gradient_input" and kind == "abs":
        pytest.skip("sqrt and square by themselves have a Taylor remainder")
    options = {} if composite == "exact" else {"composite": composite}
    same(one, other, x, **options)
    conserves(one, x)


COMPLEX_FUNCTIONS = {
    "exp": (jnp.exp, None),
    "log": (jnp.log, None),
    "sin": (jnp.sin, None),
    "tanh": (jnp.tanh, None),
    "sqrt": (jnp.sqrt, 0.5),
    "rsqrt": (lax.rsqrt, -0.5),
    "cube": (lambda z: lax.integer_pow(z, 3), 3),
    "square": (jnp.square, 2),
    "inverse": (lambda z: (2 - 1j) / z, -1),
    "abs": (lambda z: jnp.abs(z) + 0j, 1),
    "power": (lambda z: z ** (2.5 + 0.5j), None),
}


@pytest.mark.parametrize("name", COMPLEX_FUNCTIONS)
def test_complex_functions(name):
    """A power passes by Euler; anything else is first-order Taylor."""
    function, degree = COMPLEX_FUNCTIONS[name]
    x = numbers(0, 2, 3)

    def fn(x):
        y = function(lax.complex(x[0], x[1]))
        return jnp.concatenate([y.real, y.imag])

    check(fn, x, degree or 1, step=1e-3)
    ledger = conserves(fn, x)
    if degree is not None:
        assert abs(ledger.total("taylor")) < 1e-10


# Complex models.


def fnet(w, x):
    """FNet: the real part of a two-dimensional Fourier transform mixes tokens."""
    h = x + jnp.real(jnp.fft.fft2(x))
    return h + jax.nn.gelu(h @ w["up"], approximate=False) @ w["down"]


def fnet_in_real(w, x):
    def cas(n):
        angle = 2 * np.pi * np.outer(np.arange(n), np.arange(n)) / n
        return jnp.asarray(np.cos(angle)), jnp.asarray(np.sin(angle))

    (ct, s_t), (cd, sd) = cas(x.shape[0]), cas(x.shape[1])
    h = x + (ct @ x @ cd - s_t @ x @ sd)
    return h + jax.nn.gelu(h @ w["up"], approximate=False) @ w["down"]


def recurrence(w):
    eigenvalues = jnp.exp(lax.complex(-jnp.exp(w["rate"]), w["phase"]))
    return eigenvalues, lax.complex(*w["b"]), lax.complex(*w["c"])


def lru(w, x):
    """A linear recurrent unit (or S4D): diagonal, complex, unrolled."""
    a, b, c = recurrence(w)
    state, out = jnp.zeros(b.shape[1], b.dtype), []
    for u in x:
        state = a * state + u.astype(b.dtype) @ b
        out.append(jnp.real(state @ c) + u * w["skip"])
    return jnp.tanh(jnp.stack(out))


def lru_scanned(w, x):
    a, b, c = recurrence(w)

    def step(state, u):
        state = a * state + u.astype(b.dtype) @ b
        return state, jnp.real(state @ c) + u * w["skip"]

    return jnp.tanh(lax.scan(step, jnp.zeros(b.shape[1], b.dtype), x)[1])


def lru_in_real(w, x):
    a, _, _ = recurrence(w)
    (br, bi), (cr, ci) = w["b"], w["c"]
    re = im = jnp.zeros(br.shape[1])
    out = []
    for u in x:
        re, im = (
            a.real * re - a.imag * im + u @ br,
            a.imag * re + a.real * im + u @ bi,
        )
        out.append(re @ cr - im @ ci + u * w["skip"])
    return jnp.tanh(jnp.stack(out))


MODELS = {
    "fnet": (fnet, fnet_in_real),
    "lru": (lru, lru_in_real),
    "lru, scanned": (lru_scanned, lru_in_real),
}
W = {
    "up": numbers(1, 3, 5) - 0.5,
    "down": numbers(2, 5, 3) - 0.5,
    "rate": numbers(3, 4),
    "phase": numbers(4, 4) * 3,
    "b": numbers(5, 2, 3, 4) - 0.5,
    "c": numbers(6, 2, 4, 3) - 0.5,
    "skip": numbers(7, 3),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "composite, seed",
    [("exact", "one"), ("attnlrp", "score"), ("gradient_input", "score")],
)
def test_complex_models_equal_real_ones(name, composite, seed):
    composite = EXACT if composite == "exact" else composite
    in_complex, in_real = MODELS[name]
    x, m = numbers(0, 3, 3), numbers(9, 3, 3) - 0.5
    ours, theirs = (
        jlrp.relevance(fn, W, x, m, composite=composite, seed=seed)
        for fn in (in_complex, in_real)
    )
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-10)
    ledger = jlrp.audit(in_complex, W, x, m, composite=composite, seed=seed)
    assert ledger.unexplained < 1e-10
    report = jlrp.inspect(in_complex, W, x, m, composite=composite)
    assert report.coverage.uncovered == 0


@pytest.mark.parametrize("name", ["fnet", "lru"])
def test_parameters_of_complex_models(name):
    """Complex numbers made of parameters hand relevance on to these."""
    x, m = numbers(0, 3, 3), numbers(9, 3, 3) - 0.5
    ours, theirs = (
        jlrp.explain(fn, composite=EXACT, wrt=("x", "params"), target=m)(W, x).params
        for fn in MODELS[name]
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-10), ours, theirs
    )


@pytest.mark.parametrize("name", sorted(jlrp.composites.PRESETS))
def test_every_preset_takes_complex_models(name):
    if name == "epsilon_gamma_box":
        name = jlrp.composites.epsilon_gamma_box(-4.0, 4.0)
    x, m = numbers(0, 2, 3), numbers(9, 2, 3) - 0.5

    def fn(w, x):
        return lru(w, x + jnp.real(jnp.fft.fft2(x)))

    for seed in ("score", "one"):
        ledger = jlrp.audit(fn, W, x, m, composite=name, seed=seed)
        assert np.isfinite(ledger.relevance) and ledger.unexplained < 1e-9


def test_relevance_of_a_complex_value_is_real():
    x, m = numbers(0, 3, 3), numbers(9, 3, 3) - 0.5

    def fn(w, x):
        return jnp.real(jlrp.tag(jnp.fft.fft2(x), "spectrum") * (1 + 2j))

    explain = jlrp.explain(fn, composite=EXACT, capture=("spectrum",), target=m)
    found = explain((), x)
    inside = found.captured["spectrum"]
    assert inside.dtype == np.float64 and inside.shape == x.shape
    total = float((fn((), x) * m).sum())
    assert float(inside.sum()) == pytest.approx(total)
    assert float(found.relevance.sum()) == pytest.approx(total)


def test_relevance_that_is_a_value_goes_through_complex_numbers():
    def model(lifted, w, x):
        h = jnp.real(lax.complex(x, jnp.zeros_like(x))) if lifted else x
        return h @ w

    w, x = numbers(3, 3, 2), numbers(0, 2, 3)
    plain, lifted = (
        jlrp.relevance(partial(model, kind), w, x, composite="epsilon_plus_flat")
        for kind in (False, True)
    )
    np.testing.assert_allclose(lifted, plain, rtol=0, atol=1e-12)
