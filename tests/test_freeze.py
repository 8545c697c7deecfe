"""What jlrp makes of some programs is what it made of them: no row differs.

Rows hold for one version of JAX, and are skipped with others. A change that is meant to
change some writes the file anew (benchmarks/README.md), and its diff is read.
"""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

TESTS = Path(__file__).parent
sys.path.append(str(TESTS.parent / "benchmarks"))
freeze = pytest.importorskip("freeze")
from canonical import canonical  # noqa: E402

pytestmark = pytest.mark.relaxed
X, W = jnp.arange(6.0).reshape(2, 3) / 7, jnp.arange(9.0).reshape(3, 3) / 5


def of(fn, *args):
    return canonical(jax.make_jaxpr(fn)(*(args or (W, X))))


def same(fn, other, *args):
    return of(fn, *args).hash == of(other, *args).hash


def test_no_row_differs():
    path = TESTS / "frozen" / f"jax-{jax.__version__}.jsonl"
    if not path.exists():
        pytest.skip(f"no rows are frozen for jax {jax.__version__}")
    old = freeze.Rows(path)
    assert len({program for program, _, _ in old.known}) >= 30
    differing = [
        "\n  ".join([" ".join(key), *lines])
        for key, lines in freeze.changes(old, list(old.known))
    ]
    assert not differing, "\n".join(differing)


# What a hash does not see.


def test_order_names_and_calls():
    def fn(w, x):
        a = jnp.tanh(x @ w)
        b = jnp.sin(x)
        return a + b

    @jax.jit
    def named(x):
        return jnp.sin(x)

    def other(w, x):
        b = named(x)
        unused = jnp.cos(b)
        del unused
        with jax.named_scope("scope"):
            return b + jax.jit(jnp.tanh)(x @ w)

    assert same(fn, other)
    assert of(fn).counts == of(other).counts


def test_declared_derivatives():
    @jax.custom_jvp
    def declared(x):
        return jnp.sin(x)

    declared.defjvp(lambda x, t: (declared(*x), t[0]))
    assert same(lambda w, x: declared(x), lambda w, x: jnp.sin(x))


def test_constants_by_their_bytes():
    table, again, other = np.arange(3.0), np.arange(3.0), np.array([0.0, 1.0, 2.5])
    assert same(lambda w, x: x * table, lambda w, x: x * again)
    assert not same(lambda w, x: x * table, lambda w, x: x * other)
    assert not same(lambda w, x: x * 2.0, lambda w, x: x * 3.0)


def test_order_inside_of_loops():
    """Carries, constants and slices in any order; what nothing reads."""

    def fn(w, x):
        def step(carry, slices):
            a, b = carry
            return (jnp.tanh(a + b @ w), b * slices[0]), a - slices[1]

        (a, _), ys = lax.scan(step, (x, 2 * x), (jnp.arange(4.0), jnp.arange(4.0) / 3))
        return a, ys

    def other(w, x):
        def step(carry, slices):
            unread, b, a = carry
            return (unread + 1, b * slices[1], jnp.tanh(b @ w + a)), a - slices[0]

        slices = (jnp.arange(4.0) / 3, jnp.arange(4.0))
        (_, _, a), ys = lax.scan(step, (0, 2 * x, x), slices)
        return a, ys

    assert same(fn, other)


# What it sees.


def looped(sign=1, start=1.0, length=4, reverse=False):
    def fn(w, x):
        def step(carry, y):
            a, b = carry
            return (jnp.tanh(a + sign * b), b @ w + y), a

        ys = jnp.arange(1.0 * length)
        return lax.scan(step, (x, start * x), ys, reverse=reverse)[0][0]

    return fn


DIFFERENT = {
    "operands": (lambda w, x: x - w[:2], lambda w, x: w[:2] - x),
    "inputs": (lambda w, x: w[:2], lambda w, x: x),
    "outputs": (lambda w, x: (w, x), lambda w, x: (x, w)),
    "parameters": (lambda w, x: w.sum(0), lambda w, x: w.sum(1)),
    "dtypes": (lambda w, x: x.astype("f4"), lambda w, x: x.astype("f2")),
    "bodies": (looped(), looped(sign=-1)),
    "starts": (looped(), looped(start=2.0)),
    "lengths": (looped(), looped(length=5)),
    "directions": (looped(), looped(reverse=True)),
    "branches": (
        lambda w, x: lax.cond(x[0, 0] > 0, jnp.sin, jnp.cos, x),
        lambda w, x: lax.cond(x[0, 0] > 0, jnp.cos, jnp.sin, x),
    ),
    "predicates": (
        lambda w, x: lax.while_loop(lambda x: x.sum() < 9, lambda x: 2 * x, x),
        lambda w, x: lax.while_loop(lambda x: x.sum() < 8, lambda x: 2 * x, x),
    ),
    "swapped carries": (
        lambda w, x: lax.fori_loop(0, 3, lambda i, c: (c[1] @ w, c[0]), (x, x + 1)),
        lambda w, x: lax.fori_loop(0, 3, lambda i, c: (c[1], c[0] @ w), (x, x + 1)),
    ),
}


@pytest.mark.parametrize("what", DIFFERENT)
def test_a_difference_is_seen(what):
    assert not same(*DIFFERENT[what])


def test_what_is_done_twice_is_counted():
    def twice(w, x):
        return jnp.tanh(x @ w) + jnp.tanh(x @ w)

    def once(w, x):
        a = jnp.tanh(x @ w)
        return a + a

    assert same(twice, once)
    assert (of(twice).counts["tanh"], of(once).counts["tanh"]) == (2, 1)


def test_what_a_scan_stacks_is_counted():
    assert of(lambda w, x: lax.scan(lambda c, y: (c + y, c), x[0], w)).stacked == 72


# Differences, and a file of rows.


def row(**changed):
    same = dict(rows=["dense", "sum"], hash="1", counts={"mul": 2}, bytes={"kept": 8})
    return same | changed


def test_differences_are_named():
    assert not list(freeze.differences(row(), row()))
    (rows,) = freeze.differences(row(), row(rows=["dense", "mean"]))
    assert rows.startswith("rows: 1 was sum")
    (rows,) = freeze.differences(row(), row(rows=["dense"]))
    assert rows.split() == "rows: 1 was sum is nothing".split()
    changed = row(hash="2", counts={"mul": 1, "add": 1}, bytes={"kept": 4})
    assert list(freeze.differences(row(), changed)) == [
        "hash",
        "counts: add 0 -> 1, mul 2 -> 1",
        "bytes: kept 8 -> 4",
    ]
    (error,) = freeze.differences(row(), dict(error="InputError: no"))
    assert "was no error" in error


def test_a_rename_is_no_difference():
    renamed = row(rows=["affine", "sum"])
    assert list(freeze.differences(row(), renamed))
    assert not list(freeze.differences(row(), renamed, [("dense", "affine")]))


def test_a_killed_run_goes_on(tmp_path):
    path, key = tmp_path / "rows", dict(composite="auto", policy="keep")
    rows = freeze.Rows(path)
    rows.add([row(program="a", **key)])
    rows.add([row(program="b", **key)])
    text = path.read_text()
    path.write_text(text[: text.rindex("program") + 20])  # cut in the last line
    read = freeze.Rows(path)
    assert list(read.known) == [("a", "auto", "keep")]
    assert read.has("a", ("auto", "keep")) and not read.has("b", ("auto", "keep"))
    read.add([row(program="b", **key)])
    assert list(freeze.Rows(path).known) == [(n, "auto", "keep") for n in "ab"]
