"""The methods to compare with equal Captum's, and what the papers say of them."""

import doctest

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlrp
from jlrp import baselines, metrics

METHODS = [
    baselines.gradient,
    baselines.gradient_input,
    baselines.integrated_gradients,
    baselines.smoothgrad,
]


def scores_of(params, x):
    return jnp.tanh(x @ params["v"]) @ params["w"]


def sample():
    keys = jax.random.split(jax.random.key(0), 3)
    params = {
        "v": jax.random.normal(keys[0], (6, 8)),
        "w": jax.random.normal(keys[1], (8, 4)),
    }
    return params, jax.random.normal(keys[2], (3, 6))


def torch_of(torch, params):
    v, w = (torch.tensor(np.array(params[name])) for name in ("v", "w"))
    return lambda x: torch.tanh(x @ v) @ w


def of_captum(name, target, **options):
    from peers import torch

    attr = pytest.importorskip("captum.attr")
    params, x = sample()
    method = getattr(attr, name)(torch_of(torch, params))
    x, target = (torch.tensor(np.array(a)) for a in (x, target))
    return method.attribute(x, target=target, **options).detach().numpy()


CAPTUM = {
    "gradient": ("Saliency", {"abs": False}, {}),
    "gradient_input": ("InputXGradient", {}, {}),
    "integrated_gradients": (
        "IntegratedGradients",
        {"n_steps": 9, "method": "riemann_middle", "baselines": 0.5},
        {"steps": 9, "baseline": 0.5},
    ),
}


@pytest.mark.filterwarnings("ignore:Input Tensor 0 did not already require")
@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("name", CAPTUM)
def test_equals_captum(name, given):
    theirs, options, own = CAPTUM[name]
    params, x = sample()
    target = jnp.array([3, 0, 1]) if given else scores_of(params, x).argmax(-1)
    found = getattr(baselines, name)(
        scores_of, params, x, target if given else None, **own
    )
    expected = of_captum(theirs, target, **options)
    np.testing.assert_allclose(found, expected, rtol=1e-6)  # their float32


def test_occlusion_equals_captum():
    params, x = sample()
    target = scores_of(params, x).argmax(-1)
    parts = metrics.Parts(np.arange(6) // 2)
    found = baselines.occlusion(
        scores_of, params, x, parts=parts, removal=metrics.Constant(0.5)
    )
    expected = of_captum(
        "Occlusion", target, sliding_window_shapes=(2,), strides=2, baselines=0.5
    )
    np.testing.assert_allclose(found, expected, rtol=1e-6)  # float32 of Captum


def test_occlusion_of_token_ids_that_stay():
    table = jnp.array([[1.0, 0.0], [5.0, 2.0], [0.0, 0.0]])

    def fn(table, ids):
        return table[ids].sum(1)

    found = baselines.occlusion(
        fn,
        table,
        jnp.array([[0, 1, 1]]),
        target=0,
        parts=metrics.Parts(np.array([0, 1, -1])),
        removal=metrics.Constant(2),
    )
    assert found.tolist() == [[1.0, 5.0, 0.0]]


def test_smoothgrad_is_the_mean_gradient_at_noisy_copies():
    # Of x^3 / 3 it is E (x + n)^2 = x^2 + deviation^2.
    x = jnp.array([[1.0, 3.0]])
    found = baselines.smoothgrad(
        lambda _, x: (x**3).sum(-1) / 3, {}, x, noise=0.25, samples=20_000
    )
    np.testing.assert_allclose(found, x**2 + 0.5**2, rtol=0.01)


def test_integrated_gradients_are_complete():
    params, x = sample()
    found = baselines.integrated_gradients(scores_of, params, x, 2, steps=200)
    gap = scores_of(params, x)[:, 2] - scores_of(params, 0 * x)[:, 2]
    np.testing.assert_allclose(found.sum(1), gap, rtol=1e-3)


@pytest.mark.parametrize("method", METHODS)
def test_pytrees_and_target_functions(method):
    params, x = sample()

    def split(params, x):
        return scores_of(params, jnp.concatenate([x["a"], x["b"]], axis=1))

    parts = {"a": x[:, :2], "b": x[:, 2:]}
    difference = lambda out: out[:, 0] - out[:, 1]  # noqa: E731
    found = method(split, params, parts, difference)
    whole = method(scores_of, params, x, difference)
    assert jax.tree.map(jnp.shape, found) == {"a": (3, 2), "b": (3, 4)}
    if method is not baselines.smoothgrad:  # other noise
        both = jnp.concatenate([found["a"], found["b"]], axis=1)
        np.testing.assert_allclose(both, whole, rtol=1e-9)


@pytest.mark.parametrize("method", METHODS)
def test_integers_are_refused(method):
    with pytest.raises(jlrp.InputError, match="no gradient"):
        method(scores_of, sample()[0], jnp.ones((2, 6), int))


def test_refusals():
    params, x = sample()
    with pytest.raises(jlrp.TargetError, match="out of range"):
        baselines.gradient(scores_of, params, x, 4)
    with pytest.raises(jlrp.InputError, match="steps is a whole number of at least 1"):
        baselines.integrated_gradients(scores_of, params, x, steps=0)
    with pytest.raises(jlrp.InputError, match="samples is a whole number"):
        baselines.smoothgrad(scores_of, params, x, samples=0)
    with pytest.raises(jlrp.InputError, match="do not fit x"):
        baselines.occlusion(scores_of, params, x, parts=metrics.features((5,)))


@pytest.mark.relaxed
def test_the_examples_in_the_docstrings():
    assert doctest.testmod(baselines).failed == 0
