"""Linear algebra: decompositions by their degree, solvers as products of 1/A and b."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from differences import EXACT, check, conserves, explained, numbers, replica, same
from jax import lax

import jlrp

pytestmark = pytest.mark.relaxed


# Linear algebra.


def symmetric(x):
    return x + x.swapaxes(-1, -2)


def positive(x):
    return x @ x.swapaxes(-1, -2) + jnp.eye(x.shape[-1])


def lower(x):
    return jnp.tril(x) + jnp.eye(x.shape[-1])


eigh = functools.partial(lax.linalg.eigh, symmetrize_input=False)
cholesky = functools.partial(lax.linalg.cholesky, symmetrize_input=False)
DECOMPOSITIONS = {
    # name: the function of a matrix, the degree, what makes the matrix
    "cholesky": (cholesky, 0.5, positive),
    "eigenvalues": (lambda a: eigh(a)[1], 1, symmetric),
    "eigenvectors": (lambda a: eigh(a)[0], 0, symmetric),
    "singular values": (lambda a: lax.linalg.svd(a)[1], 1, None),
    "singular values alone": (lambda a: lax.linalg.svd(a, compute_uv=False), 1, None),
    "singular vectors": (lambda a: lax.linalg.svd(a, full_matrices=False)[0], 0, None),
    "r": (lambda a: lax.linalg.qr(a, full_matrices=False)[1], 1, None),
    "q": (lambda a: lax.linalg.qr(a, full_matrices=False)[0], 0, None),
    "upper": (lambda a: jnp.triu(lax.linalg.lu(a)[0]), 1, None),
    "lower": (lambda a: jnp.tril(lax.linalg.lu(a)[0], -1), 0, None),
    "eig": (lambda a: jnp.abs(jnp.linalg.eig(a)[0]), 1, None),
    "eigvals": (lambda a: jnp.linalg.eigvals(a).real, 1, None),
    "determinant": (lambda a: jnp.prod(jnp.diagonal(lax.linalg.lu(a)[0])), 3, None),
}


@pytest.mark.parametrize("name", DECOMPOSITIONS)
def test_decompositions(name):
    """Against differences of function values, moved within symmetric matrices."""
    function, degree, make = DECOMPOSITIONS[name]
    a = numbers(5, 3, 3) + jnp.diag(jnp.asarray([3.0, 2.0, 1.0]))
    if make is not None:
        a = make(a)
        inner = function
        # The matrix is read as a symmetric one, whatever moves.
        function = lambda a: inner((a + a.T) / 2)  # noqa: E731
    check(function, a, degree or 1, step=1e-4, tolerance=1e-7)
    ledger = conserves(function, a, 1e-9, "score")
    if degree:
        lost = ledger.total("taylor") + ledger.total("constants")
        assert abs(lost) < 1e-9 * abs(ledger.seed)
    else:
        assert abs(ledger.relevance) < 1e-9 * abs(ledger.seed)


@pytest.mark.parametrize("name", ["cholesky", "eigenvalues", "singular values", "r"])
def test_decompositions_of_batches(name):
    function, degree, make = DECOMPOSITIONS[name]
    a = numbers(5, 2, 3, 3) + jnp.eye(3)
    a = a if make is None else make(a)
    one = lambda a: jnp.stack([function(v) for v in a])  # noqa: E731
    same(function, one, a)


@pytest.mark.parametrize("shape", [(4, 2), (2, 4)])
def test_rectangular_decompositions(shape):
    a = numbers(5, *shape)
    for function in (
        lambda a: lax.linalg.svd(a, full_matrices=False)[1],
        lambda a: lax.linalg.qr(a, full_matrices=False)[1],
        lambda a: jnp.triu(lax.linalg.lu(a)[0]),
    ):
        check(function, a, step=1e-4, tolerance=1e-7)
        conserves(function, a)


def hessenberg(a):
    return jnp.triu(lax.linalg.hessenberg(a)[0], -1)


def diagonals(a, lower):
    _, d, e, _ = lax.linalg.tridiagonal(a, lower=lower)
    return jnp.concatenate([d, e])


CONDENSED = {
    "schur": lambda a: lax.linalg.schur(a)[0],
    "schur alone": lambda a: lax.linalg.schur(a, compute_schur_vectors=False)[0],
    "hessenberg": hessenberg,
    "tridiagonal": lambda a: diagonals(a, True),
    "tridiagonal, upper": lambda a: diagonals(a, False),
}


@pytest.mark.parametrize("name", CONDENSED)
def test_condensed_forms_are_linear_with_q_held(name):
    """``T = Q* A Q``: the replica computes Q by other means (SciPy, or by hand)."""
    a = numbers(5, 4, 4)
    a = symmetric(a) if "tridiagonal" in name else a
    function = CONDENSED[name]
    ours, m = explained(function, a)
    q = condensing(name, np.asarray(a))

    def held(a):
        if name == "tridiagonal":
            a = jnp.tril(a) + jnp.tril(a, -1).T
        elif name == "tridiagonal, upper":
            a = jnp.triu(a) + jnp.triu(a, 1).T
        t = q.T @ a @ q
        if name == "hessenberg":
            return jnp.triu(t, -1)
        if "schur" in name:
            return t
        return jnp.concatenate([jnp.diagonal(t), jnp.diagonal(t, 1)])

    np.testing.assert_allclose(held(a), function(a), atol=1e-12)
    np.testing.assert_allclose(ours, replica(held, a, m), atol=1e-10)
    ledger = conserves(function, a, seed="score")
    assert ledger.relevance == pytest.approx(ledger.seed)


def condensing(name, a):
    """The orthogonal Q of a condensed form, by reflections written out."""
    if "schur" in name:
        return np.asarray(lax.linalg.schur(jnp.asarray(a))[1])
    if name == "tridiagonal, upper":
        packed, _, _, taus = map(np.asarray, lax.linalg.tridiagonal(a, lower=False))
        columns = [np.r_[packed[:i, i + 1], 1.0, np.zeros(3 - i)] for i in range(3)]
        order = [2, 1, 0]
    else:
        found = (
            lax.linalg.hessenberg(a)
            if name == "hessenberg"
            else lax.linalg.tridiagonal(a, lower=True)
        )
        packed, taus = np.asarray(found[0]), np.asarray(found[-1])
        columns = [np.r_[np.zeros(i + 1), 1.0, packed[i + 2 :, i]] for i in range(3)]
        order = [0, 1, 2]
    q = np.eye(4)
    for i in order:
        q = q @ (np.eye(4) - taus[i] * np.outer(columns[i], columns[i]))
    return q


@pytest.mark.parametrize("dtype", ["real", "complex"])
def test_householder_product(dtype):
    x = numbers(0, 2, 5, 3) - 0.5

    def fn(x):
        if dtype == "real":
            return lax.linalg.householder_product(x[0, :, :2], x[1, 0, :2])
        a = lax.complex(x[0], x[1])
        q = lax.linalg.householder_product(a, a[0])
        return jnp.stack([q.real, q.imag])

    check(fn, x, step=1e-3)
    conserves(fn, x)


@pytest.mark.parametrize("kind", ["schur", "hessenberg", "cholesky", "eigh"])
def test_decompositions_of_complex_matrices(kind):
    x = numbers(0, 2, 3, 3)

    def fn(x):
        a = lax.complex(x[0], x[1])
        if kind in ("cholesky", "eigh"):
            a = a @ a.conj().T + jnp.eye(3)
        y = {
            "schur": lambda: lax.linalg.schur(a)[0],
            "hessenberg": lambda: lax.linalg.hessenberg(a)[0],
            "cholesky": lambda: cholesky(a),
            "eigh": lambda: eigh(a)[1],
        }[kind]()
        return y.real + y.imag

    conserves(fn, x)


# Solvers: products of 1/A and b.

FLAGS = [
    dict(left_side=left, lower=low, transpose_a=transposed, unit_diagonal=unit)
    for left in (True, False)
    for low in (True, False)
    for transposed in (True, False)
    for unit in (True, False)
]


@pytest.mark.parametrize("flags", FLAGS, ids=lambda f: "".join(k[0] for k in f if f[k]))
def test_triangular_solve(flags):
    a = numbers(0, 3, 3) + 2 * jnp.eye(3)
    b = numbers(1, 3, 3)
    solve = functools.partial(lax.linalg.triangular_solve, **flags)
    x = jnp.stack([a, b])
    smooth = dict(step=1e-3, tolerance=1e-8)
    check(lambda b: solve(a, b), b)
    conserves(lambda x: solve(x[0], x[1]), x)
    if flags["unit_diagonal"]:  # the ones are no part of a: Taylor in both
        check(lambda x: solve(x[0], x[1]), x, **smooth)
        return
    check(lambda a: solve(a, b), a, -1, **smooth)
    ours, m = explained(lambda x: solve(x[0], x[1]), x)
    by_a = replica(lambda a: solve(a, b), a, m, -2.0, 1e-3)
    by_b = replica(lambda b: solve(a, b), b, m, 2.0)
    np.testing.assert_allclose(ours, np.stack([by_a, by_b]), atol=1e-8)
    total = float((solve(a, b) * m).sum())
    assert by_a.sum() == pytest.approx(total / 2) == by_b.sum()


@pytest.mark.parametrize("vector", [True, False])
def test_solve(vector):
    """Linear in b; as a product of the inverse and b, each gets half."""
    a, b = numbers(0, 3, 3) + 2 * jnp.eye(3), numbers(1, 3, 3)
    solve = lambda a, b: jnp.linalg.solve(a, b[:, 0] if vector else b)  # noqa: E731
    m = jnp.asarray(np.random.default_rng(1).normal(size=solve(a, b).shape))
    x = jnp.stack([a, b])
    check(lambda b: solve(a, b), b)
    check(lambda a: solve(a, b), a, -1, step=1e-3, tolerance=1e-8)
    ours = jlrp.relevance(lambda _, x: solve(x[0], x[1]), (), x, m, composite=EXACT)
    inverse = lambda _, x: solve_by_inverse(x[0], x[1][:, 0] if vector else x[1])  # noqa: E731
    theirs = jlrp.relevance(inverse, (), x, m, composite=EXACT)
    np.testing.assert_allclose(ours, theirs, atol=1e-10)
    conserves(lambda x: solve(x[0], x[1]), x)


def solve_by_inverse(a, b):
    return jnp.linalg.inv(a) @ b


def test_tridiagonal_solve():
    x = numbers(0, 6, 4).at[1].add(3.0)
    w = numbers(1, 6, 4).at[1].add(3.0)

    def solve(dl, d, du, b):
        dl, du = dl.at[0].set(0.0), du.at[-1].set(0.0)
        return lax.linalg.tridiagonal_solve(dl, d, du, b)

    def dense(x):
        a = jnp.diag(x[1]) + jnp.diag(x[0, 1:], -1) + jnp.diag(x[2, :-1], 1)
        return jnp.linalg.solve(a, x[3:].T)

    same(lambda x: solve(*x[:3], x[3:].T), dense, x)
    check(lambda x: solve(*w[:3], x[3:].T), x)
    conserves(lambda x: solve(x[0], w[1], w[2], w[3:].T), x)
    conserves(lambda x: solve(*x[:3], x[3:].T), x)


def test_custom_linear_solve():
    """An iterative solver: as the dense one; of A without a transpose an error."""
    a, b = positive(numbers(0, 3, 3)), numbers(1, 3)
    cg = functools.partial(jax.scipy.sparse.linalg.cg, tol=1e-14)
    x = jnp.concatenate([a, b[None]])

    def iterative(x):
        return cg(lambda v: ((x[:3] + x[:3].T) / 2) @ v, x[3])[0]

    same(iterative, lambda x: jnp.linalg.solve((x[:3] + x[:3].T) / 2, x[3]), x, 1e-8)
    conserves(iterative, x, 1e-9)

    def untransposed(x):
        return lax.custom_linear_solve(
            lambda v: a @ v, x, lambda _, v: jnp.linalg.solve(a, v)
        )

    with pytest.raises(jlrp.UnsupportedPrimitiveError, match="transpose_solve"):
        jlrp.relevance(lambda _, x: untransposed(x), (), b, jnp.ones(3))
