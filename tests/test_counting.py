"""What the benchmarks count: multiplications, and contractions that XLA compiled."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlrp

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
counting = pytest.importorskip("counting")

DEPTH, WIDTH = 4, 8


def network(params, x):
    """``DEPTH`` dense layers in a row, then as many in a scan, then a head."""

    def layer(x, w):
        return jnp.tanh(x @ w), None

    for w in params["row"]:
        x, _ = layer(x, w)
    x, _ = jax.lax.scan(layer, x, params["stack"])
    return x @ params["head"]


def arguments():
    random = np.random.default_rng(0)
    stack = random.normal(size=(DEPTH, WIDTH, WIDTH)) / np.sqrt(WIDTH)
    params = {
        "row": list(stack),
        "stack": stack,
        "head": random.normal(size=(WIDTH, 3)),
    }
    return params, random.normal(size=(2, WIDTH))


def gradient(params, x):
    return jax.grad(lambda x: network(params, x).max(-1).sum())(x)


def test_multiplications_of_dots_in_a_row_and_in_a_scan():
    params, x = arguments()
    forward = 2 * (2 * DEPTH * WIDTH * WIDTH + WIDTH * 3)
    assert counting.multiplications(network, params, x) == forward
    assert counting.multiplications(gradient, params, x) == 2 * forward
    found = counting.arithmetic(network, gradient, params, x)
    assert (found.dense, found.product, found.convolutions) == (forward, 0, ())


def test_multiplications_of_a_product_of_values():
    def product(_, x):
        return (x @ x.T).sum()

    x = np.ones((3, 5))
    found = counting.arithmetic(product, jax.grad(product, 1), None, x)
    assert (found.dense, found.product) == (0, 3 * 3 * 5)
    assert found.gradient == 3 * found.product


def test_multiplications_of_convolutions():
    kernel, x = np.ones((3, 3, 2, 4)), np.ones((1, 8, 8, 2))

    def convolve(kernel, x):
        return jax.lax.conv_general_dilated(
            x, kernel, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    forward = 4 * 4 * 4 * 3 * 3 * 2
    assert counting.multiplications(convolve, kernel, x) == forward

    def back(kernel, x):
        return jax.vjp(lambda x: convolve(kernel, x), x)[1](np.ones((1, 4, 4, 4)))

    found = counting.contractions(back, kernel, x)
    assert len(found) == 2  # forward, and back to the input
    assert counting.multiplications(back, kernel, x) == 2 * forward


def compiled(residuals):
    explain = jlrp.explain(network, composite="epsilon", residuals=residuals)
    params, x = arguments()
    program = jax.jit(lambda params, x: explain(params, x).relevance)
    return counting.compiled_contractions(program.lower(params, x).compile())


DOTS = 2 * DEPTH + 1


@pytest.mark.parametrize("residuals", ["keep", "promise"])
def test_what_is_kept_is_not_run_again(residuals):
    assert compiled(residuals) == 2 * DOTS


def test_a_gradient_compiles_two_dots_for_each():
    run = jax.jit(gradient).lower(*arguments()).compile()
    assert counting.compiled_contractions(run) == 2 * DOTS


def test_what_is_promised_is_run_again():
    """At most the forward pass, once; at least the scan's, which nothing merges."""
    again = compiled("sqrt") - 2 * DOTS
    assert DEPTH <= again <= DOTS
