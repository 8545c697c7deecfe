"""Every primitive is in the table, and its relevance equals a slow replica's.

Linear algebra and complex numbers have files of their own.
"""

import functools
import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from differences import (
    EXACT,
    check,
    conserves,
    drawn,
    explained,
    jacobian,
    numbers,
    same,
)
from hypothesis import strategies as st
from jax import lax
from jax.extend.core import Primitive
from jax.extend.core import primitives as p

import jlrp
from jlrp.ir import primitives as table
from jlrp.tactics import batches, dependencies

pytestmark = pytest.mark.relaxed


SIZES = st.integers(1, 4)

# The table.

TABLE = sorted(table.documented())
GENERATOR = Path(__file__).parents[1] / "docs" / "generate_primitives.py"
EXISTING = {v.name for v in vars(p).values() if isinstance(v, Primitive)}
OTHERS = """split stack tile copy erfc ragged_dot_general pallas_call ffi_call shard_map
    psum_invariant pvary reduce_scatter scatter-sub random_wrap random_unwrap
    optimization_barrier reshard unstack""".split()


def test_every_primitive_is_in_the_table_once():
    """Fails when a new JAX adds one."""
    names = [row.primitive for row in TABLE]
    assert sorted(set(names)) == sorted(names)
    assert EXISTING - set(names) == set()
    assert set(OTHERS) - set(names) == set()


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.primitive)
def test_every_primitive_says_how_or_why_not(row):
    assert len(row.how) > 6
    assert row.kind in table.KINDS or row.kind in table.STATES


def test_the_compiler_s_helpers_are_in_the_table():
    """Else relevance of a relevance, explained in turn, stops at them."""
    helpers = {
        v.name
        for v in (*vars(batches).values(), *vars(dependencies).values())
        if isinstance(v, Primitive)
    }
    internal = table.names_where(lambda row: row.internal)
    assert helpers and helpers <= internal


def test_the_table_of_the_documentation_is_up_to_date():
    generator = runpy.run_path(str(GENERATOR))
    written = generator["PAGE"].read_text()
    if generator["VERSION"] not in written:
        pytest.skip("the page was generated with another version of JAX")
    assert written == generator["markdown"](), f"run python {GENERATOR}"


# Movement.


def axes(draw, rank):
    return tuple(draw(st.permutations(range(rank))))


@st.composite
def arrays(draw, low=1, high=3):
    return numbers(
        draw(st.integers(0, 99)), *draw(st.lists(SIZES, min_size=low, max_size=high))
    )


@st.composite
def padded(draw):
    x = draw(arrays())
    config = []
    for n in x.shape:
        low, high = draw(st.integers(-1, 2)), draw(st.integers(-1, 2))
        inner = draw(st.integers(0, 2))
        size = n + (n - 1) * inner + low + high
        config.append((low, high + max(0, 1 - size), inner))
    return x, config


@drawn(padded())
def test_pad(drawn):
    x, config = drawn
    check(lambda x: lax.pad(x, 0.7, config), x)
    conserves(lambda x: lax.pad(x, 0.7, config) * 2.0, x)


@drawn(arrays(), st.data())
def test_moves(x, data):
    permutation = axes(data.draw, x.ndim)
    reversed_axes = data.draw(st.lists(st.sampled_from(range(x.ndim)), unique=True))
    reps = data.draw(st.lists(st.integers(1, 2), min_size=x.ndim, max_size=x.ndim))
    starts = [data.draw(st.integers(0, n - 1)) for n in x.shape]
    strides = [data.draw(st.integers(1, 2)) for _ in x.shape]

    def fn(x):
        y = lax.rev(lax.transpose(x, permutation), reversed_axes)
        y = jnp.tile(y, reps).reshape(-1)
        z = lax.slice(x, starts, x.shape, strides).reshape(-1)
        return jnp.concatenate([y, z, lax.dynamic_slice(x, starts, x.shape).ravel()])

    check(fn, x)
    conserves(fn, x)


GATHERED = ("clip", "fill", "wrap")


@st.composite
def indexed(draw):
    x = draw(arrays(2, 3))
    axis = draw(st.integers(0, x.ndim - 1))
    mode = draw(st.sampled_from(GATHERED))
    n, beyond = x.shape[axis], 2
    size = draw(st.integers(1, 5))
    index = draw(
        st.lists(st.integers(-n, n - 1 + beyond), min_size=size, max_size=size)
    )
    return x, axis, np.asarray(index), mode


@drawn(indexed())
def test_gather(drawn):
    x, axis, index, mode = drawn
    fn = lambda x: jnp.take(x, index, axis, mode=mode, fill_value=0.5)  # noqa: E731
    check(fn, x)
    conserves(fn, x)
    index = index % x.shape[axis]
    inside = lambda x: x.at[(slice(None),) * axis + (index,)].get(  # noqa: E731
        mode="promise_in_bounds"
    )
    check(inside, x)


SCATTERS = {
    "set": lambda at, v, mode: at.set(v, mode=mode, unique_indices=True),
    "add": lambda at, v, mode: at.add(v, mode=mode),
    "subtract": lambda at, v, mode: at.subtract(v, mode=mode),
    "multiply": lambda at, v, mode: at.multiply(v, mode=mode),
    "min": lambda at, v, mode: at.min(v, mode=mode),
    "max": lambda at, v, mode: at.max(v, mode=mode),
}


@pytest.mark.parametrize("kind", SCATTERS)
@pytest.mark.parametrize("active", ["operand", "updates", "both"])
@drawn(indexed())
def test_scatter(kind, active, drawn):
    x, axis, index, mode = drawn
    mode = {"fill": "drop", "wrap": "promise_in_bounds"}.get(mode, mode)
    if mode == "promise_in_bounds":
        index = index % x.shape[axis]
    if kind == "set":
        index = np.unique(index % x.shape[axis])
    index = index % 99
    where = (slice(None),) * axis + (index,)
    n = len(index)
    rows = [i % x.shape[axis] for i in range(1, n + 1)]
    spread = 1.0 + 0.01 * jnp.arange(n).reshape(
        [-1 if i == axis else 1 for i in range(x.ndim)]
    )
    constant = numbers(7, *x.shape)

    def fn(x):
        updates = jnp.take(
            x if active != "operand" else constant, np.asarray(rows), axis
        )
        updates = updates * spread  # no ties
        operand = x if active != "updates" else constant
        return SCATTERS[kind](operand.at[where], updates, mode)

    if kind == "set" and active == "operand" and len(index) == x.shape[axis]:
        with pytest.raises(jlrp.NoRelevanceError):  # all of x is written over
            explained(fn, x)
        return
    degree = 1.0
    if kind == "multiply":
        count = np.zeros(x.shape)
        reached = np.clip(index, 0, x.shape[axis] - 1) if mode == "clip" else index
        for i in reached[reached < x.shape[axis]]:
            count[(slice(None),) * axis + (i,)] += 1
        degree = {"operand": 1, "updates": count, "both": count + 1}[active]
        degree = np.where(degree == 0, 1, degree)
    smooth = kind in ("set", "add", "subtract")
    check(fn, x, degree, None if smooth else 1e-5, 1e-9 if smooth else 1e-7)
    conserves(fn, x)


# Sums and products over axes and windows.


@drawn(arrays(), st.data())
def test_reductions(x, data):
    over = tuple(data.draw(st.sets(st.integers(0, x.ndim - 1))))
    check(lambda x: x.sum(over), x)
    check(lambda x: x.max(over), x, step=1e-5, tolerance=1e-7)
    check(lambda x: x.min(over), x, step=1e-5, tolerance=1e-7)
    n = int(np.prod([x.shape[a] for a in over]))
    fn = lambda x: lax.reduce(x, 1.0, lax.mul, over)  # noqa: E731
    check(fn, x, n, step=1e-3)
    conserves(fn, x)


CUMULATIVE = ("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp")


@pytest.mark.parametrize("name", CUMULATIVE)
@drawn(arrays(), st.data())
def test_cumulative(name, x, data):
    axis, reverse = data.draw(st.integers(0, x.ndim - 1)), data.draw(st.booleans())
    function = getattr(lax, name)
    fn = lambda x: function(x, axis, reverse=reverse)  # noqa: E731
    degree = 1.0
    if name == "cumprod":
        count = np.arange(1, x.shape[axis] + 1)
        count = count[::-1] if reverse else count
        degree = count.reshape([-1 if i == axis else 1 for i in range(x.ndim)])
    selects = name in ("cummax", "cummin")
    check(fn, x, degree, 1e-5 if selects else 1e-3, 1e-7)
    conserves(fn, x)


@st.composite
def windowed(draw):
    rank = draw(st.integers(1, 2))
    shape = draw(st.lists(st.integers(2, 4), min_size=rank, max_size=rank))
    some = lambda high: draw(  # noqa: E731
        st.lists(st.integers(1, high), min_size=rank, max_size=rank)
    )
    window, strides, base, dilation = some(2), some(2), some(2), some(2)
    padding = [(draw(st.integers(0, 1)), draw(st.integers(0, 1))) for _ in shape]
    options = dict(
        window_dimensions=tuple(window),
        window_strides=tuple(strides),
        padding=tuple(padding),
        base_dilation=tuple(base),
        window_dilation=tuple(dilation),
    )
    return numbers(draw(st.integers(0, 99)), *shape), options


# What XLA makes of a start that is not neutral is undefined, but for a shift of sums.
WINDOWS = {
    "sum": (lax.add, 0.0),
    "max": (lax.max, -np.inf),
    "min": (lax.min, np.inf),
    "product": (lax.mul, 1.0),
    "sum from 2": (lax.add, 2.0),
    "larger": (lambda a, b: jnp.where(a > b, a, b), -np.inf),
}


@pytest.mark.parametrize("kind", WINDOWS)
@drawn(windowed())
def test_reduce_window(kind, drawn):
    x, options = drawn
    body, start = WINDOWS[kind]
    fn = lambda x: lax.reduce_window(x, start, body, **options)  # noqa: E731
    degree = 1.0
    if kind.startswith("product"):
        ones = lax.reduce_window(jnp.ones_like(x), 0.0, lax.add, **options)
        degree = np.maximum(np.asarray(ones), 1)
    linear = kind.startswith("sum")
    kept = np.isfinite(np.asarray(fn(x)))  # a window of padding alone is infinite
    finite = lambda x: jnp.where(kept, fn(x), 0.0)  # noqa: E731
    check(finite, x, degree, None if linear else 1e-5, 1e-7)
    conserves(finite, x)


REDUCERS = {
    "sum from 2": (lax.add, 2.0),
    "product": (lambda a, b: a * b, 1.0),
    "smaller": (jnp.minimum, np.inf),
    "larger": (lambda a, b: jnp.where(a > b, a, b), -np.inf),
    "logaddexp": (jnp.logaddexp, -np.inf),
}


@pytest.mark.parametrize("kind", REDUCERS)
@drawn(arrays(), st.data())
def test_reduce_with_a_body(kind, x, data):
    over = tuple(data.draw(st.sets(st.integers(0, x.ndim - 1), min_size=1)))
    body, start = REDUCERS[kind]
    fn = lambda x: lax.reduce(x, start, body, over)  # noqa: E731
    n = int(np.prod([x.shape[a] for a in over]))
    degree = n if kind.startswith("product") else 1.0
    step = None if kind.startswith("sum") else 1e-5
    check(fn, x, degree, step, 1e-7)
    conserves(fn, x)
    report = jlrp.inspect(
        lambda _, x: fn(x), (), x, jnp.ones(jax.eval_shape(fn, x).shape)
    )
    assert bool(report.coverage.fallback) == (kind == "logaddexp")


def test_reduce_of_several_operands():
    """An arg-max that returns the value too: the winner takes all."""
    x = numbers(0, 3, 4)
    places = lax.broadcasted_iota(jnp.int32, x.shape, 1)

    def larger(a, b):
        wins = a[0] > b[0]
        return jnp.where(wins, a[0], b[0]), jnp.where(wins, a[1], b[1])

    def fn(x):
        start = (jnp.asarray(-jnp.inf), jnp.asarray(0, jnp.int32))
        return lax.reduce((x, places), start, larger, (1,))[0]

    same(fn, lambda x: x.max(1), x)
    conserves(fn, x)


# Selection.


@drawn(arrays(2, 2), st.data())
def test_sort(x, data):
    axis, stable = data.draw(st.integers(0, 1)), data.draw(st.booleans())
    n_keys = data.draw(st.integers(1, 2))
    keys = jnp.asarray(np.random.default_rng(3).integers(0, 3, x.shape))

    def fn(x):
        operands = (keys, x, x**2)
        found = lax.sort(operands, axis, is_stable=stable, num_keys=n_keys)
        return found[1] * 2.0 + found[2]

    plain = lambda x: lax.sort(x, axis)  # noqa: E731
    check(plain, x, step=1e-6, tolerance=1e-7)
    conserves(fn, x)
    order = np.lexsort(
        [np.arange(keys.size).reshape(keys.shape)]
        + ([np.asarray(x)] if n_keys == 2 else [])
        + [np.asarray(keys)],
        axis,
    )
    if stable or n_keys == 2:
        taken = lambda x: (  # noqa: E731
            jnp.take_along_axis(x, order, axis) * 2.0
            + jnp.take_along_axis(x**2, order, axis)
        )
        same(fn, taken, x)


@drawn(arrays(2, 3), st.data())
def test_top_k(x, data):
    k = data.draw(st.integers(1, x.shape[-1]))
    smooth = dict(step=1e-6, tolerance=1e-7)
    check(lambda x: lax.top_k(x, k)[0], x, **smooth)
    check(lambda x: lax.approx_max_k(x, k)[0], x, **smooth)
    check(lambda x: lax.approx_min_k(x, k)[0], x, **smooth)
    conserves(lambda x: lax.approx_max_k(x, k)[0] * 2.0, x)


def test_clamp_with_bounds_that_depend_on_x():
    x = numbers(0, 3, 5)
    fn = lambda x: lax.clamp(x[0], x[1], x[0] + x[2])  # noqa: E731
    check(fn, x, step=1e-6, tolerance=1e-7)
    conserves(fn, x)


def test_select_and_gather_and_scatter_add():
    """What makes the derivatives of max pooling: the operand only selects."""
    x, w = numbers(0, 4, 4), numbers(1, 4, 4)
    options = dict(
        select_prim=p.ge_p,
        window_dimensions=(2, 2),
        window_strides=(2, 2),
        padding=((0, 0), (0, 0)),
    )
    gather = functools.partial(
        p.select_and_gather_add_p.bind,
        base_dilation=(1, 1),
        window_dilation=(1, 1),
        **options,
    )
    scatter = functools.partial(p.select_and_scatter_add_p.bind, **options)
    for fn in (
        lambda x: gather(x, w),
        lambda x: gather(x, x[::-1]),
        lambda x: scatter(x[:2, :2], w),
        lambda x: scatter(x[:2, :2], x),
    ):
        check(fn, x, step=1e-6, tolerance=1e-7)
        conserves(fn, x)


# Contractions.


@st.composite
def contractions(draw):
    n_batch, n_contracted = draw(st.integers(0, 1)), draw(st.integers(0, 2))
    free = [draw(st.integers(0, 1)) for _ in range(2)]
    shared = [draw(SIZES) for _ in range(n_batch + n_contracted)]
    shapes, numbering = [], []
    for side in range(2):
        sizes = shared + [draw(SIZES) for _ in range(free[side])]
        order = draw(st.permutations(range(len(sizes))))
        shapes.append([sizes[i] for i in order])
        place = [order.index(i) for i in range(len(sizes))]
        numbering.append((place[n_batch : n_batch + n_contracted], place[:n_batch]))
    (lc, lb), (rc, rb) = numbering
    return shapes, ((lc, rc), (lb, rb))


@drawn(contractions())
def test_dot_general(drawn):
    (left, right), numbers_ = drawn
    x, w = numbers(0, *left), numbers(1, *right)
    check(lambda x: lax.dot_general(x, w, numbers_), x)
    check(lambda w: lax.dot_general(x, w, numbers_), w)
    both = numbers(2, x.size + w.size)

    def fn(v):
        a, b = v[: x.size].reshape(left), v[x.size :].reshape(right)
        return lax.dot_general(a, b, numbers_)

    check(fn, both, degree=2, step=1e-2)
    conserves(fn, both)


@st.composite
def convolutions(draw):
    rank = draw(st.integers(1, 2))
    some = lambda low, high: draw(  # noqa: E731
        st.lists(st.integers(low, high), min_size=rank, max_size=rank)
    )
    groups, batches = draw(st.sampled_from([(1, 1), (2, 1), (1, 2)]))
    space = some(3, 4)
    x_shape = [batches * draw(st.integers(1, 2)), groups * draw(st.integers(1, 2))]
    out = groups * batches * draw(st.integers(1, 2))
    kernel_shape = [out, x_shape[1] // groups, *some(1, 2)]
    letters = "XY"[:rank]
    permuted = lambda names: "".join(draw(st.permutations(names)))  # noqa: E731
    layouts = (
        permuted("NC" + letters),
        permuted("OI" + letters),
        permuted("NC" + letters),
    )
    put = lambda shape, names, layout: [shape[names.index(c)] for c in layout]  # noqa: E731
    options = dict(
        window_strides=some(1, 2),
        padding=[(draw(st.integers(0, 1)), draw(st.integers(0, 1))) for _ in space],
        lhs_dilation=some(1, 2),
        rhs_dilation=some(1, 2),
        dimension_numbers=layouts,
        feature_group_count=groups,
        batch_group_count=batches,
    )
    x = numbers(0, *put(x_shape + space, "NC" + letters, layouts[0]))
    kernel = numbers(1, *put(kernel_shape, "OI" + letters, layouts[1])) - 0.5
    return x, kernel, options


@drawn(convolutions())
def test_conv(drawn):
    x, kernel, options = drawn
    fn = lambda x: lax.conv_general_dilated(x, kernel, **options)  # noqa: E731
    check(fn, x)
    check(lambda k: lax.conv_general_dilated(x, k, **options), kernel)
    for composite in (jlrp.composites.epsilon_plus(), jlrp.composites.epsilon(0.1)):
        m = jnp.ones(jax.eval_shape(fn, x).shape)
        ledger = jlrp.audit(lambda _, x: fn(x), (), x, m, composite=composite)
        assert ledger.unexplained <= 1e-10 * max(1.0, abs(ledger.seed))


@drawn(convolutions())
def test_rules_that_look_at_kernels_see_groups(drawn):
    """z+ of a grouped convolution, against its dense form."""
    x, kernel, options = drawn
    fn = lambda x: lax.conv_general_dilated(x, kernel, **options)  # noqa: E731
    weights = jacobian(fn, x, None).reshape(x.size, -1)
    m = jnp.asarray(np.random.default_rng(1).normal(size=jax.eval_shape(fn, x).shape))
    flat = np.asarray(x).reshape(-1)
    z = np.maximum(weights, 0).T @ flat
    r = (weights.T @ flat) * np.asarray(m).reshape(-1)
    share = np.where(z == 0, 0, r / np.where(z == 0, 1, z))
    expected = flat * (np.maximum(weights, 0) @ share)
    rule = jlrp.Composite([("conv", jlrp.rules.ZPlus(stabilizer=0.0))], base=EXACT)
    ours, _ = explained(fn, x, composite=rule)
    np.testing.assert_allclose(ours.reshape(-1), expected, atol=1e-9)


@pytest.mark.parametrize("active", ["rows", "weights", "both"])
def test_ragged_dot(active):
    sizes = jnp.asarray([2, 0, 3], jnp.int32)
    rows, weights = numbers(0, 5, 4), numbers(1, 3, 4, 2)
    group = np.repeat(np.arange(3), np.asarray(sizes))
    x = jnp.concatenate([rows.reshape(-1), weights.reshape(-1)])

    def split(x):
        a = x[: rows.size].reshape(rows.shape) if active != "weights" else rows
        b = x[rows.size :].reshape(weights.shape) if active != "rows" else weights
        return a, b

    def ragged(x):
        a, b = split(x)
        return lax.ragged_dot(a, b, sizes)

    def plain(x):
        a, b = split(x)
        return jnp.einsum("ni,nio->no", a, b[group])

    same(ragged, plain, x)
    conserves(ragged, x)
    m = jnp.ones(jax.eval_shape(ragged, x).shape)
    report = jlrp.inspect(lambda _, x: ragged(x), (), x, m)
    assert "ragged_dot_general" in [e.primitive for e in report.coverage.equations]


# Functions of several values.

TWO = numbers(3, 2, 3) + 1.0


@pytest.mark.parametrize(
    "name, function",
    {
        "atan2": lambda a, b: jnp.arctan2(a, b),
        "pow": lambda a, b: a**b,
        "igamma": lax.igamma,
        "igammac": lax.igammac,
        "rem": lambda a, b: lax.rem(3 * a, b),
    }.items(),
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_functions_of_two_values(name, function):
    fn = lambda x: function(x[0], x[1])  # noqa: E731
    check(fn, TWO, step=1e-3, tolerance=1e-7)
    ledger = conserves(fn, TWO)
    if name == "rem":  # of degree 1
        assert abs(ledger.total("taylor")) < 1e-10
    if name == "atan2":  # of degree 0: nothing arrives at x
        assert abs(ledger.relevance) < 1e-10


PASSING = {
    "igamma": lambda x: lax.igamma(jnp.full_like(x, 2.0), x),
    "betainc": lambda x: lax.betainc(jnp.full_like(x, 2.0), jnp.full_like(x, 3.0), x),
    "pow by a parameter": lambda x: x ** (jnp.ones_like(x) * 1.7),
}
TAYLOR = {
    "igamma of a": lambda x: lax.igamma(x, jnp.full_like(x, 2.0)),
    "igammac": lambda x: lax.igammac(jnp.full_like(x, 2.0), x),
    "polygamma": lambda x: lax.polygamma(jnp.full_like(x, 2.0), x),
    "zeta": lambda x: lax.zeta(jnp.full_like(x, 3.0), x),
    "gamma sample": lambda x: jax.random.gamma(jax.random.key(0), x),
    "exponent": lambda x: jnp.full_like(x, 1.7) ** x,
}


@pytest.mark.parametrize("name", PASSING)
def test_functions_with_constants_pass_if_zero_at_zero(name):
    x = numbers(0, 2, 3)
    ours, m = explained(PASSING[name], x)
    np.testing.assert_allclose(ours, PASSING[name](x) * m, atol=1e-10)
    conserves(PASSING[name], x)


@pytest.mark.parametrize("name", TAYLOR)
def test_functions_with_constants_by_taylor(name):
    x = numbers(0, 2, 3)
    if name == "gamma sample":  # its derivative is that of the quantile
        ours, m = explained(TAYLOR[name], x)
        slope = jax.vmap(jax.vmap(jax.grad(lambda a, s: lax.igamma(a, s), (0, 1))))
        by_a, by_s = slope(x, TAYLOR[name](x))
        np.testing.assert_allclose(ours, x * (-by_a / by_s) * m, rtol=1e-3)
    else:
        check(TAYLOR[name], x, step=1e-3, tolerance=1e-7)
    conserves(TAYLOR[name], x)


def test_random_numbers_with_float_parameters():
    """They are functions of their parameters, for given random bits."""
    x, key = numbers(0, 2, 3), jax.random.key(1)

    def fn(x):
        normal = x[0] + x[1] * jax.random.normal(key, (3,))
        beta = jax.random.beta(key, x[0], x[1] + 1.0)
        uniform = jax.random.uniform(key, (3,), minval=x[0].min(), maxval=2.0)
        return normal + beta + uniform

    conserves(fn, x)
    noise = np.asarray(jax.random.normal(key, (3,)))
    same(
        lambda x: x[0] + x[1] * jax.random.normal(key, (3,)),
        lambda x: x[0] + x[1] * noise,
        x,
    )


@pytest.mark.skipif(not hasattr(p, "polynomial_p"), reason="newer JAX only")
def test_polynomial():
    x = numbers(0, 3)
    coefficients = [0.0, 2.0, -1.0]
    fn = lambda x: p.polynomial_p.bind(x, *map(jnp.asarray, coefficients))  # noqa: E731
    same(fn, lambda x: 0.0 + x * (2.0 + x * -1.0), x)
    conserves(lambda x: p.polynomial_p.bind(x, x + 1.0, x), x)


# What needs a rule of the user's, or carries none.

ERRORS = {
    "igamma_grad_a": (lambda x: lax.igamma_grad_a(x, x), "derivative"),
    "zeta": (lambda x: lax.zeta(x + 1.0, x), "first operand"),
    "polygamma": (lambda x: lax.polygamma(x, x), "first operand"),
    "regularized_incomplete_beta": (lambda x: lax.betainc(x, x, x), "by a and b"),
    "scatter": (lambda x: x.at[0].apply(jnp.sin), "set"),
    "svd": (lambda x: lax.linalg.svd(x[:2])[0], "full_matrices"),
    "pure_callback": (lambda x: jax.pure_callback(np.sin, x, x), "opaque"),
    "ffi_call": (
        lambda x: jax.ffi.ffi_call("nothing", jax.ShapeDtypeStruct(x.shape, x.dtype))(
            x
        ),
        "opaque",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_what_needs_a_rule_says_why(name):
    fn, words = ERRORS[name]
    x = numbers(0, 3, 3)
    m = jnp.ones(jax.eval_shape(fn, x).shape)
    with pytest.raises(jlrp.UnsupportedPrimitiveError, match=words) as caught:
        jlrp.relevance(lambda _, x: fn(x), (), x, m)
    for word in (f"`{name}`", "register_rule", 'fallback="stop"', "test_primitive"):
        assert word in str(caught.value)
    report = jlrp.inspect(lambda _, x: fn(x), (), x, m)
    assert report.coverage.uncovered == 1


def test_eigenvectors_of_a_general_matrix_are_opted_in():
    x, m = numbers(0, 3, 3), jnp.ones((3, 3))

    def vectors(_, x):
        return jnp.abs(lax.linalg.eig(x, compute_left_eigenvectors=False)[1])

    with pytest.raises(jlrp.UnsupportedPrimitiveError, match="enable_eigvec_derivs"):
        jlrp.relevance(vectors, (), x, m)


# The rule by itself.


def test_euler_takes_a_degree():
    """For a primitive of one's own: the degree is all that it needs."""
    cube = Primitive("cube")
    cube.def_impl(lambda x: x**3)
    cube.def_abstract_eval(lambda x: x)
    jax.interpreters.ad.defjvp(cube, lambda t, x: 3 * x**2 * t)
    lowered = jax.interpreters.mlir.lower_fun(lambda x: x**3, multiple_results=False)
    jax.interpreters.mlir.register_lowering(cube, lowered)
    x = numbers(0, 3)
    jlrp.register_rule(cube, jlrp.rules.Euler(3))
    try:
        ours, m = explained(cube.bind, x)
    finally:
        jlrp.unregister_rule(cube)
    np.testing.assert_allclose(ours, x**3 * m, rtol=1e-12)
    assert repr(jlrp.rules.Euler()) == "Euler()"
    assert repr(jlrp.rules.Euler(3)) == "Euler(3)"


def test_euler_refuses_what_has_no_degree():
    composite = jlrp.Composite([("activation", jlrp.rules.Euler())], base=EXACT)
    with pytest.raises(jlrp.SelectorError, match="degree"):
        jlrp.relevance(lambda _, x: jnp.tanh(x), (), numbers(0, 3), composite=composite)
