"""Softmax, its logarithm, and the log of its sum, between two points.

With the weights s and s0 of the two points, L their logarithmic mean ``(s - s0) / (log
s - log s0)`` and D the change of the scores, ``s - s0 = L (D - sum(L D) / sum(L))``
holds exactly, since weights sum to 1 at both points. So the mean Jacobian of a softmax
is ``diag(L) - L L' / sum(L)``; of its logarithm ``1 - L' / sum(L)``, of logsumexp ``L'
/ sum(L)``. It is symmetric, the same for every shift of the scores, and needs no
quadrature. Rejected: eight points of Gauss-Legendre, off by .1 at a score difference of
20; the chain of exp, sum and quotient, which depends on the shift.

A score of -inf at one point alone weighs nothing in L; what it took or gave is left
over, as a switch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax.numpy as jnp
from jax import lax

from jlrp.ir.program import Value
from jlrp.ops.base import Cotangents, Operation
from jlrp.ops.context import Context, widened
from jlrp.ops.kinds.softmax import SoftmaxOp
from jlrp.ops.means import line
from jlrp.promise import difference, product, safe_divide
from jlrp.typing import Array


def reads(op: Operation) -> tuple[Value, ...]:
    return op.inputs + op.outputs


def mean_vjp(op: Operation, cotangents: Cotangents, points: Context) -> list[Array]:
    rows = _rows_of(op)
    (m,) = cotangents
    assert m is not None
    if rows is None:
        return line.mean_vjp(op, cotangents, points)
    mean = rows.log_mean(points)
    if rows.form == "softmax":
        average = safe_divide(rows.total(mean * m), rows.total(mean))
        # mean * (m - average) takes XLA for CPUs five times as long.
        handed = rows.base * (mean * m - mean * average)
    elif rows.form == "log":
        handed = m - mean * safe_divide(rows.total(m), rows.total(mean))
    else:
        handed = mean * safe_divide(rows.spread(m), rows.total(mean))
    return [handed.astype(widened(op.inputs[0]).dtype)]


def left_over(
    op: Operation, cotangents: Cotangents, points: Context
) -> dict[str, Array]:
    rows = _rows_of(op)
    (m,) = cotangents
    assert m is not None
    if rows is None:
        return line.left_over(op, cotangents, points)
    assert isinstance(op, SoftmaxOp)
    if not op.masked:
        return {}
    mean, weights = rows.log_mean(points), rows.weights(points)
    s, s0 = map(_unless_masked, weights[:2])
    switched = lax.ne(s == 0, s0 == 0)
    change = jnp.where(switched, s - s0, 0)
    gone = safe_divide(rows.total(change), rows.total(mean))
    if rows.form == "softmax":
        taken = product(m, change) - jnp.where(switched, 0, product(m, mean * gone))
    elif rows.form == "log":
        taken = -jnp.where(switched, 0, product(m, jnp.broadcast_to(gone, m.shape)))
    else:
        taken = m * jnp.reshape(gone, m.shape)
    return {"switch": jnp.sum(taken)}


@dataclass(frozen=True)
class _Rows:
    """The axes along which weights sum to one.

    Attributes:
      form: what the operation is: ``"softmax"``, ``"log"`` or ``"sum"``.
      plain: scores are exponentiated as they are, with no mask behind.
      base: the logarithm of the base of the exponentials.
    """

    op: Operation
    form: str
    axes: tuple[int, ...]
    plain: bool
    base: float

    def total(self, v: Array) -> Array:
        """The sum of each row."""
        return jnp.sum(v, self.axes, keepdims=True)

    def largest(self, v: Array) -> Array:
        return jnp.max(v, self.axes, keepdims=True)

    def spread(self, y: Array) -> Array:
        """One number a row, beside the row."""
        shape = self.op.inputs[0].shape
        kept = [1 if i in self.axes else n for i, n in enumerate(shape)]
        return jnp.reshape(y, kept)

    def weights(self, points: Context) -> tuple[Array, Array, Array]:
        """The weights at both points, and the difference of their logarithms."""
        (x, y), (x0, y0) = (self._scores(at) for at in (points, points.there))
        if self.form != "softmax":
            logs, logs0 = self._logs(x, y), self._logs(x0, y0)
            return lax.exp(logs), lax.exp(logs0), difference(logs, logs0)
        if not self.plain:
            return y, y0, difference(lax.log(y), lax.log(y0))
        of_sums = self._log_of_sum(x, y) - self._log_of_sum(x0, y0)
        return y, y0, difference(x, x0) - of_sums

    def _scores(self, at: Context) -> tuple[Array, Array]:
        return at.read(self.op.inputs[0]), at.read(self.op.outputs[0])

    def _logs(self, x: Array, y: Array) -> Array:
        logs = y if self.form == "log" else x - self.spread(y)
        return jnp.where(logs != logs, -jnp.inf, logs)

    def _log_of_sum(self, x: Array, y: Array) -> Array:
        """Of the exponentials: the largest weight is the largest of them over it."""
        return self.largest(x) - lax.log(self.largest(y))

    def log_mean(self, points: Context) -> Array:
        return _unless_masked(_log_mean(*self.weights(points)))


_NEAR = 0.5
_TERMS = {4: 9, 8: 14}  # of the series at _NEAR, by bytes: to rounding


def _log_mean(s: Array, s0: Array, d: Array) -> Array:
    """``(s - s0) / d`` of ``d = log s - log s0``, by a series where d is small.

    Rejected: ``max(s, s0) (1 - exp(-|d|)) / |d|``, whose expm1 takes half of the time
    of an attention on CPUs.
    """
    size, terms = lax.abs(d), _TERMS[max(4, d.dtype.itemsize)]
    series = jnp.full_like(d, 1 / math.factorial(terms))
    for k in reversed(range(1, terms)):
        series = 1 / math.factorial(k) - size * series
    near = size < _NEAR
    secant = (s - s0) / jnp.where(near, 1, d)
    return jnp.where(near, lax.max(s, s0) * series, secant)


def _unless_masked(weights: Array) -> Array:
    """The weights, 0 in rows that are masked as a whole: there they are NaN."""
    return jnp.where(weights != weights, 0, weights)


def is_exact(op: Operation) -> bool:
    """Whether it is by logarithmic means, not by quadrature."""
    return _rows_of(op) is not None


def _rows_of(op: Operation) -> _Rows | None:
    """None: scattered or moved rows."""
    assert isinstance(op, SoftmaxOp)
    found, scores, end = op.softmax, op.inputs[0], op.outputs[0]
    if found.rows is None:
        return None
    plain = found.axes is not None and found.base == 1
    if found.weights:
        return _Rows(op, "softmax", found.rows, plain, found.base)
    if found.base != 1:
        return None
    if scores.shape == end.shape:
        return _Rows(op, "log", found.rows, True, found.base)
    kept = [1 if i in found.rows else n for i, n in enumerate(scores.shape)]
    alike = [n for n in kept if n != 1] == [n for n in end.shape if n != 1]
    return _Rows(op, "sum", found.rows, True, found.base) if alike else None
