"""Terms: one reading for every spelling, another for what is not the same."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jlrp
from jlrp.analysis.activity import Levels, activate
from jlrp.analysis.terms import Terms, View, merged
from jlrp.ir.program import trace
from jlrp.ops.softmax import Softmaxes

X = jnp.asarray(np.random.default_rng(0).normal(size=(3, 4)))


def traced(fn, *args):
    """The program of ``fn``, of whose arguments only the first is explained."""
    program, _ = trace(fn, *args)
    levels = Levels(lambda equation: True)
    activate(program, program.inputs[:1], program.outputs, levels, {})
    return program, Terms(program)


def reading(fn, *args):
    program, terms = traced(fn, *args)
    return terms, terms.closed(terms.read(program.outputs[0]))


# The algebra of axes, against numbers.


def indices(view):
    """What a view reads, by looking at it."""
    found = np.full(view.shape, view.offset)
    for i, axis in enumerate(view.axes):
        along = np.zeros(1, int)
        for size, stride in axis:
            along = (along[:, None] + np.arange(size) * stride).ravel()
        shape = [1] * len(view.shape)
        shape[i] = -1
        found = found + along.reshape(shape)
    return found


def factorised(rng, size):
    """A shape of so many elements."""
    shape = []
    while size > 1:
        n = int(rng.choice([n for n in range(2, size + 1) if size % n == 0]))
        shape.append(n)
        size //= n
    shape.insert(int(rng.integers(len(shape) + 1)), 1)
    return tuple(shape)


def step(rng, array, view):
    """One movement, of the numbers and of the view (None: it is no list of digits)."""
    shape, rank = array.shape, array.ndim
    kind = rng.integers(5)
    if kind == 0:
        order = [int(i) for i in rng.permutation(rank)]
        return array.transpose(order), view.transposed(order)
    if kind == 1:
        new = factorised(rng, array.size)
        return array.reshape(new), view.reshaped(new)
    if kind == 2:
        axes = [int(i) for i in range(rank) if rng.integers(2)]
        return np.flip(array, axes), view.reversed_along(axes)
    if kind == 3:
        starts = [int(rng.integers(n)) for n in shape]
        steps = [int(rng.integers(1, 3)) for _ in shape]
        sizes = [
            (n - a + s - 1) // s for n, a, s in zip(shape, starts, steps, strict=True)
        ]
        slices = tuple(slice(a, None, s) for a, s in zip(starts, steps, strict=True))
        return array[slices], view.cut(starts, sizes, steps)
    new = (*shape[:1], 2, *shape[1:])
    at = [i if i < 1 else i + 1 for i in range(rank)]
    out = np.broadcast_to(
        np.expand_dims(array, 1) if rank else array, new if rank else (2,)
    )
    return out, view.broadcast(out.shape, at)


@pytest.mark.parametrize("seed", range(60))
def test_views_read_what_moved_arrays_hold(seed):
    rng = np.random.default_rng(seed)
    shape = (4, 3, 2)
    array, view = np.arange(24).reshape(shape), View.whole(shape)
    known = 0
    for _ in range(8):
        array, after = step(rng, array, view)
        if after is None or array.size > 500:
            break
        view = after
        known += 1
        np.testing.assert_array_equal(indices(view), array)
        assert all(merged(axis) == axis for axis in view.axes)
    assert known


@pytest.mark.parametrize("seed", range(60))
def test_a_view_of_a_view_is_a_view(seed):
    rng = np.random.default_rng(100 + seed)
    inner_array, inner = np.arange(24).reshape(4, 3, 2), View.whole((4, 3, 2))
    for _ in range(3):
        moved, after = step(rng, inner_array, inner)
        inner_array, inner = (moved, after) if after else (inner_array, inner)
    outer_array = np.arange(inner_array.size).reshape(inner_array.shape)
    outer = View.whole(inner_array.shape)
    for _ in range(3):
        moved, after = step(rng, outer_array, outer)
        outer_array, outer = (moved, after) if after else (outer_array, outer)
    found = inner.after(outer)
    if found is not None:
        np.testing.assert_array_equal(indices(found), inner_array.ravel()[outer_array])


MOVES = {
    "reshape": lambda x: x.reshape(2, 6).reshape(3, 4),
    "transpose": lambda x: x.T.T,
    "split and join": lambda x: jnp.concatenate(jnp.split(x, 2, 1), 1),
    "unstack and stack": lambda x: jnp.stack([x[0], x[1], x[2]]),
    "uneven parts": lambda x: jnp.concatenate([x[:, :1], x[:, 1:]], 1),
    "pad and cut": lambda x: jnp.pad(x, 1)[1:-1, 1:-1],
    "zeros joined and cut": lambda x: jnp.concatenate([jnp.zeros((1, 4)), x])[1:],
    "reversed twice": lambda x: x[::-1][::-1],
    "gathered in order": lambda x: x[np.arange(3)],
    "gathered backwards twice": lambda x: x[jnp.array([2, 1, 0])][::-1],
    "broadcast and taken": lambda x: jnp.broadcast_to(x, (2, 3, 4))[1],
    "behind a barrier": lambda x: lax.optimization_barrier(x),
    "sliced dynamically": lambda x: lax.dynamic_slice(x, (0, 0), (3, 4)),
    "selected always": lambda x: lax.select(jnp.full(x.shape, True), x, 2 * x),
    "one column at a time": lambda x: jnp.stack([x[:, i] for i in range(4)], 1),
}


@pytest.mark.parametrize("move", MOVES.values(), ids=MOVES)
def test_what_is_moved_and_moved_back_is_itself(move):
    program, terms = traced(move, X)
    assert terms.read(program.outputs[0]).terms == terms.read(program.inputs[0]).terms


def test_moves_that_are_none():
    for move in (lambda x: x[::-1], lambda x: x.T.reshape(3, 4), lambda x: x[:, :2]):
        program, terms = traced(move, X)
        assert (
            terms.read(program.outputs[0]).terms != terms.read(program.inputs[0]).terms
        )


# Sums and products.


def by_columns(x):
    return sum(x[:, i] for i in range(4))


SUMS = {
    "sum": lambda x: x.sum(1),
    "as a dot": lambda x: x @ jnp.ones(4),
    "as an einsum": lambda x: jnp.einsum("ij,j->i", x, jnp.ones(4)),
    "column by column": by_columns,
    "as a tree": lambda x: (x[:, 0] + x[:, 1]) + (x[:, 2] + x[:, 3]),
    "from both ends": lambda x: (x[:, 0] + x[:, 3]) + (x[:, 1] + x[:, 2]),
    "in halves": lambda x: x[:, :2].sum(1) + x[:, 2:].sum(1),
    "by steps of two": lambda x: x.reshape(3, 2, 2).sum(1).sum(1),
    "transposed": lambda x: x.T.sum(0),
    "backwards": lambda x: x[:, ::-1].sum(1),
    "of a stack": lambda x: jnp.stack([x[:, :2], x[:, 2:]]).sum((0, 2)),
    "less what was not there": lambda x: x.sum(1) + x[:, 0] - x[:, 0],
}


@pytest.mark.parametrize("name", SUMS)
def test_a_sum_is_one_whatever_its_spelling(name):
    def both(x):
        return SUMS["sum"](x), SUMS[name](x)

    program, terms = traced(both, X)
    one, other = (terms.closed(terms.read(v)) for v in program.outputs)
    assert one == other


def test_other_sums_are_others():
    def several(x):
        return (
            x.sum(1),
            x[:, :3].sum(1),
            x.sum(1) + x[:, 0],
            2 * x.sum(1),
            (x * x).sum(1),
        )

    program, terms = traced(several, X)
    found = [terms.closed(terms.read(v)) for v in program.outputs]
    for one, other in itertools.combinations(found, 2):
        assert one != other


POWERS = {
    "x * x": lambda x: x * x,
    "square": jnp.square,
    "integer power": lambda x: x**2,
    "float power": lambda x: jnp.power(x, 2.0),
    "over its inverse": lambda x: x / (x**-1),
}


@pytest.mark.parametrize("power", POWERS.values(), ids=POWERS)
def test_powers(power):
    program, terms = traced(lambda x: (x**2, power(x)), X)
    one, other = (terms.closed(terms.read(v)) for v in program.outputs)
    assert one == other


# Softmax in many words.

E = 2.718281828459045


def of_exp(quotient, exp=jnp.exp):
    return lambda x: quotient(exp(x))


def over(total):
    return of_exp(lambda e: e / total(e))


def total(e):
    return e.sum(1, keepdims=True)


def shifted(x):
    e = jnp.exp(x - x.max(1, keepdims=True))
    return e / total(e)


def renormalised(weights):
    return weights / total(weights)


FEWER = (jnp.arange(4) < 3)[None]
SOFTMAXES = {
    "jax's": lambda x: jax.nn.softmax(x),
    "shifted by hand": shifted,
    "plain": over(total),
    "column by column": over(lambda e: sum(e[:, i : i + 1] for i in range(4))),
    "a dot with ones": over(lambda e: e @ jnp.ones((4, 1))),
    "a dot with a row": over(lambda e: (e @ jnp.ones(4))[:, None]),
    "last of a running sum": over(lambda e: jnp.cumsum(e, 1)[:, -1:]),
    "a tree": over(lambda e: (e[:, :1] + e[:, 1:2]) + (e[:, 2:3] + e[:, 3:])),
    "stabilised": over(lambda e: total(e) + 1e-9),
    "clipped": over(lambda e: jnp.maximum(total(e), 1e-9)),
    "power of e": of_exp(renormalised, lambda x: jnp.power(E, x)),
    "exp2": of_exp(renormalised, jnp.exp2),
    "times one over": of_exp(lambda e: e * (1 / total(e))),
    "times one over, spread": of_exp(lambda e: e * (1 / e.sum(1))[:, None]),
    "to the power -1": of_exp(lambda e: e * total(e) ** -1),
    "to the power -1.0": of_exp(lambda e: e * jnp.power(total(e), -1.0)),
    "two exponentials": lambda x: jnp.exp(x) / total(jnp.exp(x)),
    "transposed": of_exp(lambda e: (e.T / e.sum(1)[None]).T),
    "masked": of_exp(lambda e: renormalised(jnp.where(FEWER, e, 0.0))),
    "renormalised": lambda x: renormalised(jax.nn.softmax(x) * FEWER.astype(x.dtype)),
    "of the best": lambda x: renormalised(lax.top_k(jax.nn.softmax(x), 2)[0]),
    "along a part of an axis": lambda x: jax.nn.softmax(x.reshape(3, 2, 2), -1),
    "one column": of_exp(lambda e: e[:, 0] / (e[:, 0] + e[:, 1])),
}
DECOYS = {
    "a sum twice as large": of_exp(lambda e: e / total(2 * e)),
    "a sum of fewer": of_exp(lambda e: e / total(e[:, :3])),
    "of another exponential": lambda x: jnp.exp(x) / total(jnp.exp(2 * x)),
    "of squares": of_exp(lambda e: e / total(e * e)),
    "sigmoids": of_exp(renormalised, jax.nn.sigmoid),
    "numbers": renormalised,
    "mixed axes": of_exp(lambda e: e.reshape(4, 3) / e.reshape(4, 3).sum(0)[:1][None]),
    "with a gate": lambda x: jnp.exp(x) * jnp.tanh(x) / total(jnp.exp(x)),
    "its total held constant": of_exp(lambda e: e / lax.stop_gradient(total(e))),
}


def is_softmax(fn):
    program, terms = traced(fn, X)
    found = Softmaxes(terms).ending_at
    return [
        v
        for e in program.equations
        for v in e.outputs
        if v in program.active and found(v) is not None and found(v).weights
    ]


@pytest.mark.parametrize("name", SOFTMAXES)
def test_a_softmax_is_one_whatever_its_spelling(name):
    assert is_softmax(SOFTMAXES[name])


@pytest.mark.parametrize("name", DECOYS)
def test_decoys_of_softmax(name):
    assert not is_softmax(DECOYS[name])


def test_an_outer_product_of_a_mask_of_integers():
    """A dot that contracts nothing may mix dtypes, which a product may not."""

    def fn(w, x):
        mask = jnp.array([1, 0, 1])
        numbers = (((), ()), ((), ()))
        outer = lax.dot_general(mask, x @ w, numbers, preferred_element_type=x.dtype)
        return outer.sum((0, 1))

    w, x = jnp.ones((4, 5)), jnp.arange(8.0).reshape(2, 4)
    found = jlrp.relevance(fn, w, x, composite="epsilon")
    want = jlrp.relevance(lambda w, x: 2 * (x @ w).sum(0), w, x, composite="epsilon")
    np.testing.assert_allclose(found, want, rtol=1e-4)
