"""Facts through loops are those of the unrolled loops, found in few rounds."""

import operator
from functools import reduce

import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jlrp
from jlrp.analysis.activity import Levels
from jlrp.analysis.dataflow import Dependence, Flow, Passage, dependent, reached
from jlrp.ir.fixpoint import settled
from jlrp.ir.primitives import traits
from jlrp.ir.program import CARRIED, CHOSEN, DEAD, trace

FLOWS = {
    "levels": (lambda: Levels(lambda e: not traits(e).stops), range(4)),
    "dependence": (Dependence, range(2)),
    "passage": (lambda: Passage(lambda e, v: e.primitive is not lax.sin_p), range(2)),
}
N = 4  # carries of the generated loops
OPERATIONS = {
    "add": lambda a, b, c: a + b,
    "sin": lambda a, b, c: jnp.sin(a),
    "stop": lambda a, b, c: lax.stop_gradient(a) + b,
    "round": lambda a, b, c: jnp.round(a),
    "choose": lambda a, b, c: jnp.where(a > 0, b, c + 1),
    "branch": lambda a, b, c: lax.cond(a > 0, lambda: b, lambda: c + 1),
    "one branch": lambda a, b, c: lax.cond(True, lambda: b, lambda: jnp.sin(c)),
    "sort": lambda a, b, c: lax.sort((jnp.stack([a, b]), jnp.stack([b, c])))[1][0],
    "constant": lambda a, b, c: jnp.float64(2),
    "move": lambda a, b, c: a,
}


def random_body(rng):
    """A function of carries and a slice, to the next carries and what is stacked."""
    names = list(OPERATIONS)
    steps = [(names[rng.integers(len(names))], rng.integers(9, size=3)) for _ in "abcd"]
    outs = [*rng.integers(9, size=N - 1), N + 1, 8]

    def body(carry, x):
        values = [*carry, x]
        for name, at in steps:
            values.append(OPERATIONS[name](*(values[i % len(values)] for i in at)))
        *carry, y = (values[i % len(values)] for i in outs)
        return tuple(carry), y

    return body


def looped(body, length, again):
    """The loop; or one with such a loop in its body."""

    def fn(*args):
        def step(carry, x):
            if again:
                carry, _ = lax.scan(body, carry, jnp.stack([x, x]))
            return body(carry, x)

        *carry, x = args
        carry, ys = lax.scan(step, tuple(carry), jnp.broadcast_to(x, (length,)))
        return *carry, ys

    return fn


def unrolled(body, length, again):
    """Of every iteration, the carries and what is stacked."""

    def fn(*args):
        *carry, x = args
        outs = []
        for _ in range(length):
            for _ in range(2 * again):
                carry, _ = body(tuple(carry), x)
            carry, y = body(tuple(carry), x)
            outs.append((*carry, y))
        return outs

    return fn


def facts(flow, program, starts):
    known = flow.forward(program, dict(zip(program.inputs, starts, strict=True)))
    return [int(known.get(v, flow.nothing)) for v in program.outputs]


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("name", FLOWS)
def test_generated_loops_have_the_facts_of_the_unrolled_ones(name, seed, again):
    rng = np.random.default_rng([seed, again])
    body, length = random_body(rng), int(rng.integers(1, 5))
    make, lattice = FLOWS[name]
    loop, iterations = (
        trace(of(body, length, again), *[0.5] * (N + 1))[0] for of in (looped, unrolled)
    )
    for _ in range(3):
        starts = [type(make().nothing)(f) for f in rng.choice(lattice, N + 1)]
        found = facts(make(), loop, starts)
        every = facts(make(), iterations, starts)
        expected = np.reshape(every, (length, N + 1)).max(0)
        assert np.all(found >= expected)
        if not again:  # else what is joined inside is joined before it is handed on
            assert found == expected.tolist()


def test_a_single_iteration_hands_nothing_on():
    def fn(length):
        def step(carry, _):
            return (carry[1], carry[0]), carry[0]

        return lambda a, b: lax.scan(step, (a, b), length=length)[1]

    def levels(length):
        program, _ = trace(fn(length), 1.0, 2.0)
        return len(dependent(program, program.inputs[1:]).intersection(program.outputs))

    assert levels(1) == 0
    assert levels(2) == 1


# What decides is a dependence, but no passage of numbers.

DECIDES = {
    "index": lambda x, a, b: lax.cond(x > 0, lambda: a, lambda: b),
    "mask": lambda x, a, b: jnp.where(x > 0, a, b),
    "trips": lambda x, a, b: lax.while_loop(lambda c: c < x, lambda c: c + a, b),
    "trips by a carry": lambda x, a, b: lax.while_loop(
        lambda c: c[0] < a, lambda c: (c[0] + c[1], c[1], c[2] + b), (b, x, b)
    )[2],
}


@pytest.mark.parametrize("name", DECIDES)
def test_what_decides(name):
    program, _ = trace(DECIDES[name], 1.0, 2.0, 3.0)
    x, (out,) = program.inputs[0], program.outputs
    assert out in dependent(program, [x])
    (value,) = dependent(program, [x]).intersection(program.outputs)
    levels = FLOWS["levels"][0]().forward(program, {x: CARRIED})
    assert levels[value] == CHOSEN
    assert (out in reached(Passage(lambda e, v: True), program, [x])) == (
        name == "mask"
    )


UNDECIDED = {
    "one value": lambda x, a, b: lax.select_n(x > 0, lax.stop_gradient(a), a),
    "a fixed number": lambda x, a, b: lax.scan(lambda c, _: (c + a, None), b, length=3)[
        0
    ],
    "another condition": lambda x, a, b: lax.while_loop(
        lambda c: c[1] < a, lambda c: (c[0] + x, c[1] + b), (b, a)
    )[1],
}


@pytest.mark.parametrize("name", UNDECIDED)
def test_what_does_not(name):
    program, _ = trace(UNDECIDED[name], 1.0, 2.0, 3.0)
    assert dependent(program, program.inputs[:1]).isdisjoint(program.outputs)


def test_levels_of_what_a_loop_starts_from():
    """A while loop that may run no time at all returns what it was given."""

    def fn(x, n):
        return lax.while_loop(
            lambda c: c[1] < n, lambda c: (0.0, c[1] + 1), (jnp.round(x), 0)
        )[0]

    program, _ = trace(fn, 1.0, 2)
    levels = FLOWS["levels"][0]().forward(program, {program.inputs[0]: CARRIED})
    assert levels[program.outputs[0]] == DEAD


@pytest.mark.parametrize("n", [0, 2])
def test_relevance_of_what_a_loop_starts_from(n):
    def fn(w, x):
        def step(carry):
            return jnp.full_like(carry[0], 3), carry[1] + 1

        h, _ = lax.while_loop(lambda c: c[1] < w[1], step, (x, 0))
        return (h * w[0]).sum()

    w, x = jnp.arange(1.0, 4), jnp.array([2.0, -1.0, 0.5])
    relevance = jlrp.relevance(fn, (w, n), x)
    np.testing.assert_allclose(relevance, x * w if n == 0 else 0 * x, rtol=1e-12)


@pytest.mark.parametrize("residuals", ["keep", "promise", "sqrt"])
@pytest.mark.parametrize("composite", ["epsilon", "gradient_input"])
def test_weights_chosen_by_the_iteration(composite, residuals):
    def step(w, h, i):
        chosen = lax.cond(i % 2 == 0, lambda a, b: a, lambda a, b: b, *w)
        return jnp.tanh(h @ chosen), i + 1

    def scanned(w, x):
        return lax.scan(lambda c, _: (step(w, *c), None), (x, 0), length=3)[0][0].sum()

    def one_by_one(w, x):
        for i in range(3):
            x = jnp.tanh(x @ w[i % 2])
        return x.sum()

    rng = np.random.default_rng(0)
    w, x = jnp.asarray(rng.normal(size=(2, 4, 4))), jnp.asarray(rng.normal(size=4))
    options = {"composite": composite, "residuals": residuals}
    np.testing.assert_allclose(
        jlrp.relevance(scanned, (w[0], w[1]), x, **options),
        jlrp.relevance(one_by_one, (w[0], w[1]), x, composite=composite),
        rtol=1e-9,
    )


# Rounds.


def test_a_register_of_n_carries_settles_in_n_rounds():
    for n in range(1, 8):
        rounds = []

        def step(carry):
            rounds.append(carry)  # noqa: B023
            return [True, *carry[:-1]]

        assert settled(step, [False] * n, operator.or_) == [True] * n
        assert len(rounds) == n + 1
        assert settled(step, [False] * n, operator.or_, rounds=1) == [
            True,
            *[False] * (n - 1),
        ]


class Counting(Dependence):
    walks = 0

    def forward(self, program, starts):
        self.walks += 1
        return super().forward(program, starts)


def test_nested_loops_are_not_walked_again_and_again():
    depth, n = 5, 3

    def nest(level):
        def step(carry, _):
            carry = (carry[-1] + 1, *carry[:-1])
            if level:
                carry, _ = lax.scan(nest(level - 1), carry, length=9)
            return carry, None

        return step

    program, _ = trace(lambda *c: nest(depth)(c, None)[0], *[1.0] * n)
    flow = Counting()
    found = flow.forward(program, {program.inputs[0]: True})
    assert all(v in found for v in program.outputs)
    assert flow.walks <= 1 + depth * 2**n  # each body, for each set of carries


def test_facts_join_where_two_paths_meet():
    class Names(Flow[frozenset]):
        nothing = frozenset()

        def join(self, a, b):
            return a | b

        def transfer(self, equation, operands):
            if equation.bodies:
                return self.through(equation, operands)
            return [reduce(self.join, operands)] * len(equation.outputs)

    def fn(a, b, c):
        def step(carry, x):
            return (carry[1], carry[0] + x), carry[0]

        (a, b), ys = lax.scan(step, (a, b), jnp.stack([c, c, c]))
        return a, b, ys[0] * 1.0

    program, _ = trace(fn, 1.0, 2.0, 3.0)
    names = {v: frozenset({n}) for v, n in zip(program.inputs, "abc", strict=True)}
    known = Names().forward(program, names)
    assert [known[v] for v in program.outputs] == [frozenset("abc")] * 3
    assert Names().forward(program, {}) == {}
