"""Intervals hold all that a program makes; what is known of f is what f computes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jlrp.analysis import intervals
from jlrp.analysis.intervals import (
    at_zero,
    interval_of,
    is_nonnegative,
    scalar_of,
    slope_at_infinity,
    vanishes_below_zero,
)
from jlrp.ir.primitives import ROWS
from jlrp.ir.program import evaluate, trace

pytestmark = pytest.mark.relaxed

# Generated programs: every value they make lies in its interval.

UNARY = [
    *(jnp.abs, jnp.cbrt, jnp.ceil, jnp.cos, jnp.cosh, jnp.exp, jnp.exp2, jnp.expm1),
    *(jnp.floor, jnp.log, jnp.log1p, jnp.negative, jnp.sign, jnp.sin, jnp.sinh),
    *(jnp.sqrt, jnp.square, jnp.tanh, jnp.arctan, jnp.arcsinh, jnp.arctanh),
    *(lax.erf, lax.erfc, lax.logistic, lax.rsqrt, lax.stop_gradient, jnp.round),
    *(lambda x: x**3, lambda x: x**4, lambda x: lax.integer_pow(x, -1)),
    *(lambda x: lax.integer_pow(x, -2), lambda x: x * x, lambda x: x - x),
    *(jax.nn.relu, jax.nn.relu6, jax.nn.softplus, jax.nn.gelu, jax.nn.softmax),
    *(lambda x: x * 3.5, lambda x: x - 2, lambda x: 1 - x, lambda x: 2 / x),
    *(lambda x: jnp.clip(x, -1, 0.3), lambda x: jnp.maximum(x, 1e-6)),
    lambda x: (x > 0).astype(x.dtype),
    lambda x: x.astype(jnp.int32).astype(x.dtype),
    lambda x: x.astype(bool).astype(x.dtype),
    lambda x: x.astype(jnp.float16).astype(x.dtype),
    lambda x: x.astype(jnp.bfloat16).astype(x.dtype),
    lambda x: lax.reduce_precision(x, 5, 4),
    lambda x: jnp.cumsum(x, 0) + jnp.cumsum(x, 1),
    lambda x: lax.cummax(x) - lax.cummin(x),
    lambda x: jnp.broadcast_to(x.sum(0), x.shape),
    lambda x: x / x.sum(1, keepdims=True),
    lambda x: x - x.max(1, keepdims=True),
    lambda x: x.T[::-1],
    lambda x: x[:, jnp.array([2, 0, 1])],
    lambda x: jnp.pad(x[1:], ((1, 0), (0, 0)), constant_values=-1.0),
    lambda x: jnp.sort(x, 0),
    lambda x: x.at[1].set(2.0),
    lambda x: x.at[1].add(2.0),
    lambda x: lax.reduce_window(x, -jnp.inf, lax.max, (2, 2), (1, 1), "SAME"),
    lambda x: lax.dynamic_slice(jnp.tile(x, (2, 2)), (1, 2), (3, 3)),
    lambda x: lax.dynamic_update_slice(x, x[:1, :1] ** 2, (1, 2)),
]
BINARY = [
    *(jnp.add, jnp.subtract, jnp.multiply, jnp.divide, jnp.maximum, jnp.minimum),
    *(jnp.matmul, jnp.arctan2, jnp.power, jnp.fmod),
    lambda a, b: jnp.where(a > 0, a, b),
    lambda a, b: jnp.where(a * a < b, a, b),
    lambda a, b: jnp.where(a <= b, b, 1.0),
    lambda a, b: jnp.where((a == b) | (a >= 3), b, a),
    lambda a, b: jnp.concatenate([a[:1], b[1:]]),
    lambda a, b: lax.sort((a, b), num_keys=1)[1],
    lambda a, b: jnp.clip(a, b, b + 1),
    lambda a, b: lax.clamp(-abs(a), b, abs(a)),
]
X = np.array([[-2.5, -1, 0], [1e-3, 0.5, 1], [2.5, 7, -30]])
SAMPLES = [X, -X, X * 1e-3, X * 0, abs(X), -abs(X), X * 1e12, X * 1e-40, np.eye(3)]


def generated(rng):
    steps = []
    for _ in range(8):
        functions = UNARY if rng.random() < 0.6 else BINARY
        function = functions[rng.integers(len(functions))]
        steps.append((function, rng.integers(99, size=1 + (functions is BINARY))))

    def fn(x):
        values = [x]
        for function, at in steps:
            values.append(function(*(values[-1 - i % min(len(values), 3)] for i in at)))
        return values

    return fn


RANGES = [(-np.inf, np.inf), (0, 1), (-3, -1), (1, 7), (-0.5, 2), (2, 2), (1e-30, 1e20)]


def assert_all_inside(fn, dtype):
    """What is made of x is inside, for every x and for x in some ranges."""
    program, _ = trace(fn, jnp.zeros((3, 3), dtype))
    (start,) = program.inputs
    values = [v for e in program.equations for v in e.outputs]

    def made(x):
        env = {**program.constants, start: x}
        evaluate(program.equations, env)
        return [env[v] for v in values]

    limits = np.array(RANGES).T[..., None, None, None]
    with np.errstate(over="ignore"):  # by range and sample
        x = jnp.asarray(np.clip(np.stack(SAMPLES), *limits), dtype)
    numbers = jax.jit(jax.vmap(jax.vmap(made)))(x)
    for k, interval in enumerate(RANGES):
        finite = np.ones(len(SAMPLES), bool)  # all numbers on the way
        for value, several in zip(values, numbers, strict=True):
            found = (
                intervals._behind(value, start, interval) if k else interval_of(value)
            )
            low, high = (float(end) for end in found)
            slack = 1e-15  # XLA's cbrt(0) is -6e-16
            if low == high:  # what NumPy makes, up to XLA's rounding
                slack += 64 * float(jnp.finfo(dtype).eps) * abs(low)
            computed = np.asarray(several[k], np.float64)
            finite &= np.isfinite(computed).reshape(len(finite), -1).all(1)
            computed = computed[finite]
            inside = (computed >= low - slack) & (computed <= high + slack)
            assert inside.all(), f"{value.producer}: {computed[~inside]} not in {found}"


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize("seed", range(20))
def test_generated_programs(seed, dtype):
    assert_all_inside(generated(np.random.default_rng(seed)), dtype)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_floats(dtype):
    assert_all_inside(lambda x: [jnp.exp(x), x * x, x + x, jnp.tanh(x) * 3], dtype)


ROWS_OF_ONE = [
    (row, params)
    for row in ROWS
    if row.elementwise and row.evaluate and row.kind in ("activation", "no relevance")
    if row.primitive and not row.comparison and not row.logic
    for params in (
        [{"y": y} for y in range(-3, 5)] if row.name == "integer_pow" else [{}]
    )
]


@pytest.mark.parametrize(
    ("row", "params"), ROWS_OF_ONE, ids=lambda at: getattr(at, "name", at)
)
def test_functions_of_one_value(row, params):
    names = {"exp", "exp2", "expm1", "log", "log1p", "sin", "cos", "tan", "tanh"}
    if row.name in names | {"logistic", "sqrt", "rsqrt", "cbrt"}:
        params = {**params, "accuracy": None}
    assert_all_inside(lambda x: [row.primitive.bind(x, **params)], jnp.float32)


# What is known, and what must not be.


def found(fn, *shapes):
    shapes = shapes or ((3,),)
    arrays = [jnp.zeros(shape, jnp.float32) for shape in shapes]
    program, _ = trace(fn, *arrays)
    return program.outputs[0]


NONNEGATIVE = {
    "relu": jax.nn.relu,
    "relu of a sum": lambda x: jax.nn.relu(x.sum(0) + x),
    "softmax": jax.nn.softmax,
    "pooled": lambda x: jax.nn.relu(x).mean(0),
    "weighted": lambda x: jax.nn.softmax(x) @ abs(x),
    "square": lambda x: x * x,
    "power": lambda x: x**4,
    "of negatives": lambda x: (-abs(x)) * jnp.minimum(x, 0),
    "difference": lambda x: abs(x) - jnp.minimum(x, 0),
    "clipped": lambda x: jnp.clip(x, 0, 6),
    "mask": lambda x: (x > 0).astype(x.dtype),
    "sorted": lambda x: jnp.sort(abs(x)),
    "the second of a sort": lambda x: lax.sort((x, abs(x)))[1],
    "padded": lambda x: jnp.pad(abs(x), 1),
    "joined": lambda x: jnp.concatenate([abs(x), x**2]),
    "through silu's square": lambda x: jnp.sqrt(jax.nn.silu(x) ** 2),
}
SIGNED = {
    "x": lambda x: x + 0,
    "leaky": jax.nn.leaky_relu,
    "gelu": jax.nn.gelu,
    "odd power": lambda x: x**3,
    "centred": lambda x: abs(x) - abs(x).mean(),
    "two factors": lambda x: x * x[::-1],
    "padded with less": lambda x: jnp.pad(abs(x), 1, constant_values=-1.0),
    "the second of a sort": lambda x: lax.sort((abs(x), x))[1],
    "as a boolean": lambda x: -((-abs(x)).astype(bool).astype(x.dtype)),
    "a rounded difference": lambda x: jnp.exp(x) - jnp.exp(x),
    "gathered with a fill": lambda x: abs(x).at[7].get(mode="fill", fill_value=-1.0),
    "scattered": lambda x: abs(x).at[1].set(-1.0),
}


@pytest.mark.parametrize("name", NONNEGATIVE)
def test_nonnegative(name):
    assert is_nonnegative(found(NONNEGATIVE[name]))


@pytest.mark.parametrize("name", SIGNED)
def test_of_no_known_sign(name):
    assert not is_nonnegative(found(SIGNED[name]))


VANISHING = {
    "relu": jax.nn.relu,
    "relu6": jax.nn.relu6,
    "where": lambda x: jnp.where(x > 0, x, 0),
    "where not": lambda x: jnp.where(x < 0, 0, x),
    "squared": lambda x: jnp.square(jax.nn.relu(x)),
    "shifted": lambda x: jax.nn.relu(x - 0.5),
    "times a mask": lambda x: x * (x > 0),
    "in half precision": lambda x: jax.nn.relu(x.astype(jnp.bfloat16)),
}
NOT_VANISHING = {
    "leaky": jax.nn.leaky_relu,
    "elu": jax.nn.elu,
    "silu": jax.nn.silu,
    "shifted the other way": lambda x: jax.nn.relu(x + 0.5),
    "mirrored": lambda x: jax.nn.relu(-x),
    "hard sigmoid": jax.nn.hard_sigmoid,
    "step": lambda x: jnp.where(x > -1, x, 0),
    "one below zero": lambda x: jnp.where(x > 0, x, 1),
    "almost": lambda x: jax.nn.relu(x) + 1e-30,
}


@pytest.mark.parametrize("name", VANISHING)
def test_vanishes_below_zero(name):
    program, _ = trace(VANISHING[name], jnp.zeros(3, jnp.float32))
    assert vanishes_below_zero(program.outputs[0], program.inputs[0])


@pytest.mark.parametrize("name", NOT_VANISHING)
def test_does_not_vanish_below_zero(name):
    program, _ = trace(NOT_VANISHING[name], jnp.zeros(3, jnp.float32))
    assert not vanishes_below_zero(program.outputs[0], program.inputs[0])


# Points are exact: the number that NumPy makes, in its dtype.

POINTS = {
    "product": (lambda x: jnp.full(3, 0.1, jnp.float32) * 3, np.float32(0.1) * 3),
    "cast": (lambda x: jnp.full(3, 0.1).astype(jnp.bfloat16), jnp.bfloat16(0.1)),
    "root": (lambda x: jnp.sqrt(jnp.full((), 2.0)), np.sqrt(2.0)),
    "zero times x": (lambda x: x * 0.0, 0.0),
    "chosen": (lambda x: jnp.where(jnp.full(3, 1.0) > 0, 2.0, x), 2.0),
    "not a number": (lambda x: jnp.full(3, 0.0) / 0.0, np.nan),
    "infinite": (lambda x: jnp.log(jnp.full(3, 0.0)), -np.inf),
    "complex": (lambda x: lax.complex(1.0, 2.0) * 1j, None),
    "x": (lambda x: x + 1, None),
    "x - x": (lambda x: x - x, None),
    "ones of a random bit": (lambda x: jnp.where(x > 0, 1.0, 1.5), None),
}


@pytest.mark.parametrize("name", POINTS)
def test_points(name):
    fn, expected = POINTS[name]
    known = scalar_of(found(fn))
    if expected is None:
        assert known is None
        return
    np.testing.assert_array_equal(np.asarray(known), np.asarray(expected))
    if not isinstance(expected, float):
        assert np.asarray(known).dtype == np.asarray(expected).dtype


ACTIVATIONS = {
    name: getattr(jax.nn, name)
    for name in [
        *("relu", "relu6", "gelu", "silu", "softplus", "elu", "celu", "selu", "mish"),
        *("leaky_relu", "hard_tanh", "hard_silu", "hard_sigmoid", "log_sigmoid"),
        *("soft_sign", "squareplus", "sigmoid", "tanh"),
    ]
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_what_is_known_of_activations_is_what_they_compute(name):
    fn = ACTIVATIONS[name]
    program, _ = trace(fn, jnp.zeros(3))
    (end,), (start,) = program.outputs, program.inputs
    np.testing.assert_allclose(at_zero(end, start), fn(0.0), rtol=1e-12, atol=1e-12)
    slope = (fn(2e6) - fn(1e6)) / 1e6
    bounded = abs(fn(1e6)) < 10
    backwards = (fn(-2e6) - fn(-1e6)) / -1e6
    expected = slope if not bounded else backwards if abs(fn(-1e6)) > 10 else 1
    np.testing.assert_allclose(slope_at_infinity(end, start), expected, rtol=1e-5)


def test_the_slope_is_that_before_casts_round():
    def fn(x):
        return (x.astype(jnp.float16) * 0.25).astype(jnp.float32)

    program, _ = trace(fn, jnp.zeros(3, jnp.float32))  # 1e6 is infinite in float16
    assert slope_at_infinity(program.outputs[0], program.inputs[0]) == 0.25


def test_each_value_is_looked_at_once(monkeypatch):
    looked, before = [], intervals._interval
    monkeypatch.setattr(
        intervals, "_interval", lambda e, *args: looked.append(e) or before(e, *args)
    )

    def fn(x):
        for _ in range(500):
            x = jnp.tanh(x) * x + x  # 2**500 paths
        return x

    program, _ = trace(fn, jnp.zeros(3))
    for equation in program.equations:
        for value in equation.outputs:
            interval_of(value)
    assert len(looked) == len(set(looked)) <= len(program.equations)
    looked.clear()
    start, end = program.equations[-4].outputs[0], program.outputs[0]
    at_zero(end, start)
    assert len(looked) < 10  # what lies before start is known
