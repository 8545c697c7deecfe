"""A second call explains what functions and targets read now."""

import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlrp
from jlrp.api import _explained

rng = np.random.default_rng(0)
W, X = jnp.asarray(rng.normal(size=(4, 5))), jnp.asarray(rng.normal(size=(2, 4)))
ROWS = jnp.arange(2)
FIRST, SECOND = np.array([0, 1]), np.array([3, 4])


def dense(w, x):
    return x @ w


def relevance_of(labels):
    """Of a linear map: the row of the weights, times x."""
    return np.asarray(X) * np.asarray(W).T[np.asarray(labels)]


class Holder:
    value = None

    def __call__(self, y):
        return y[ROWS, self.value]

    def method(self, y):
        return y[ROWS, self.value]


HOLDER, ARRAYS, NUMBERS = Holder(), {}, np.zeros(2, int)
GLOBAL = COUNTER = None


def by_global(y):
    return y[ROWS, GLOBAL]


def by_helper(y):
    return by_global(y)


def by_iterator(y):
    return y[ROWS, next(COUNTER)]


def by_dict(y):
    return y[ROWS, ARRAYS["labels"]]


def by_object(y):
    return y[ROWS, HOLDER.value]


def by_numbers(y):
    return y[ROWS, NUMBERS]


def by_default(y, labels=None):
    return y[ROWS, labels]


def chosen(labels, y):
    return y[ROWS, labels]


def set_global(labels, target):
    global GLOBAL, COUNTER
    GLOBAL, COUNTER = labels, iter([labels])
    return target


def set_attribute(of, name, value, target):
    setattr(of, name, value)
    return target


TARGETS = {
    "global": lambda v: set_global(v, by_global),
    "helper": lambda v: set_global(v, by_helper),
    "iterator": lambda v: set_global(v, by_iterator),
    "closure": lambda v: lambda y: y[ROWS, v],
    "partial": lambda v: functools.partial(chosen, v),
    "default": lambda v: set_attribute(by_default, "__defaults__", (v,), by_default),
    "dict": lambda v: (ARRAYS.update(labels=v), by_dict)[1],
    "object": lambda v: set_attribute(HOLDER, "value", v, by_object),
    "bound method": lambda v: set_attribute(HOLDER, "value", v, HOLDER.method),
    "callable": lambda v: set_attribute(HOLDER, "value", v, HOLDER),
    "in place": lambda v: (np.copyto(NUMBERS, v), by_numbers)[1],
}


@pytest.mark.parametrize("name", TARGETS)
def test_a_target_reads_the_labels_of_now(name):
    _explained.clear_cache()
    for labels in (FIRST, SECOND, FIRST):
        held = labels if name == "in place" else jnp.asarray(labels)
        found = jlrp.relevance(dense, W, X, TARGETS[name](held), composite="attnlrp")
        np.testing.assert_allclose(found, relevance_of(labels), rtol=1e-9)
    assert _explained._cache_size() == 1  # labels do not compile again


def test_a_target_of_another_number_is_another_program():
    explain = jlrp.explain(dense, composite="attnlrp", target=lambda y: y[:, GLOBAL])
    for number in (1, 3):
        set_global(number, None)
        found = explain(W, X).relevance
        np.testing.assert_allclose(found, relevance_of([number] * 2), rtol=1e-9)


def test_a_target_may_read_what_is_traced():
    def explained(labels):
        target = lambda y: y[ROWS, labels]  # noqa: E731
        return jlrp.relevance(dense, W, X, target, composite="attnlrp")

    both = jnp.asarray([FIRST, SECOND])
    want = [relevance_of(labels) for labels in (FIRST, SECOND)]
    np.testing.assert_allclose(jax.vmap(explained)(both), want, rtol=1e-9)
    compiled = jax.jit(explained)
    np.testing.assert_allclose([compiled(v) for v in both], want, rtol=1e-9)


WEIGHTS = None


def with_global(p, x):
    return x @ WEIGHTS


def with_helper(p, x):
    return with_global(p, x)


def with_argument(w, p, x):
    return x @ w


def with_default(p, x, w=None):
    return x @ w


class Layer:
    w = None

    def __call__(self, p, x):
        return x @ self.w


class Model:
    def __init__(self):
        self.layers = [Layer()]

    def apply(self, p, x):
        return self.layers[0](p, x)


LAYER, MODEL = Layer(), Model()


def nested():
    w = None

    def inner(x):
        return x @ w

    def fn(p, x):
        return inner(x)

    def set_to(value):
        nonlocal w
        w = value
        return fn

    return set_to


NESTED = nested()


def set_weights(w, fn):
    global WEIGHTS
    WEIGHTS = w
    return fn


FUNCTIONS = {
    "global": lambda w: set_weights(w, with_global),
    "helper": lambda w: set_weights(w, with_helper),
    "wrapped": lambda w: set_weights(w, functools.wraps(with_global)(with_global)),
    "partial": lambda w: functools.partial(with_argument, w),
    "default": lambda w: set_attribute(
        with_default, "__defaults__", (w,), with_default
    ),
    "callable": lambda w: set_attribute(LAYER, "w", w, LAYER),
    "bound method": lambda w: set_attribute(MODEL.layers[0], "w", w, MODEL.apply),
    "nested closure": NESTED,
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_reads_the_arrays_of_now(name):
    other = jnp.asarray(rng.normal(size=W.shape))
    for w in (W, other, W):
        fn = FUNCTIONS[name](w)
        found = jlrp.relevance(fn, {}, X, 2, composite="attnlrp")
        np.testing.assert_allclose(found, X * w[None, :, 2], rtol=1e-9)


def test_the_same_arrays_do_not_compile_again():
    _explained.clear_cache()
    for _ in range(2):
        jlrp.relevance(FUNCTIONS["bound method"](W), {}, X, 2)
        jlrp.relevance(FUNCTIONS["partial"](W), {}, X, 2)
    assert _explained._cache_size() == 3  # a partial is no other's equal


def test_a_repeated_call_is_cheap():
    params = [jnp.eye(8) for _ in range(24)]
    x = jnp.ones((2, 8))

    def fn(params, x):
        for w in params:
            x = jax.nn.relu(x @ w)
        return x

    labels = jnp.array([1, 2])
    target = lambda y: y[ROWS, labels]  # noqa: E731
    explain = jlrp.explain(fn, composite="epsilon")
    compiled = jax.jit(lambda p, x: explain(p, x, target).relevance)

    def fastest(call):
        times = []
        for _ in range(50):
            start = time.perf_counter()
            jax.block_until_ready(call())
            times.append(time.perf_counter() - start)
        return min(times)

    alone = fastest(lambda: compiled(params, x))
    assert fastest(lambda: explain(params, x).relevance) - alone < 1e-3
    assert fastest(lambda: explain(params, x, target).relevance) - alone < 1e-3
