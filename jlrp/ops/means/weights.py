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

from dataclasses import dataclass

import jax.numpy as jnp
from jax import lax

from jlrp.ir.program import Value
from jlrp.ops.base import Cotangents, Operation
from jlrp.ops.context import Context, widened
from jlrp.ops.kinds.softmax import SoftmaxOp
from jlrp.ops.means import line
from jlrp.ops.means.secant import decay
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
    shares = safe_divide(mean, rows.total(mean))
    if rows.form == "softmax":
        handed = rows.base * (mean * m - shares * rows.total(mean * m))
    elif rows.form == "log":
        handed = m - shares * rows.total(m)
    else:
        handed = shares * rows.spread(m)
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
    mean, (s, s0, _) = rows.log_mean(points), rows.weights(points)
    switched = lax.ne(s == 0, s0 == 0)
    change = jnp.where(switched, s - s0, 0)
    gone = safe_divide(rows.total(change), rows.total(mean))
    if rows.form == "softmax":
        taken = product(m, change) - jnp.where(switched, 0, product(m, mean * gone))
    elif rows.form == "log":
        taken = -jnp.where(switched, 0, product(m, gone))
    else:
        taken = m * jnp.reshape(jnp.max(gone, rows.axes), m.shape)
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
        """The sum of each row, over all of it."""
        return jnp.broadcast_to(jnp.sum(v, self.axes, keepdims=True), v.shape)

    def spread(self, y: Array) -> Array:
        """One number a row, over all of it."""
        shape = self.op.inputs[0].shape
        kept = [1 if i in self.axes else n for i, n in enumerate(shape)]
        return jnp.broadcast_to(jnp.reshape(y, kept), shape)

    def weights(self, points: Context) -> tuple[Array, Array, Array]:
        """The weights at both points, and the difference of their logarithms."""
        here, there = self._logs(points), self._logs(points.there)
        (s, of_s), (s0, of_s0) = here, there
        return s, s0, difference(of_s, of_s0)

    def _logs(self, at: Context) -> tuple[Array, Array]:
        x, y = at.read(self.op.inputs[0]), at.read(self.op.outputs[0])
        if self.form == "softmax":
            s = jnp.where(y != y, 0, y)  # a row in which all is masked
            if not self.plain:
                return s, lax.log(s)
            shifted = x - jnp.max(x, self.axes, keepdims=True)
            shifted = jnp.where(shifted != shifted, -jnp.inf, shifted)
            return s, shifted - jnp.log(self.total(lax.exp(shifted)))
        logs = y if self.form == "log" else x - self.spread(y)
        logs = jnp.where(logs != logs, -jnp.inf, logs)
        return lax.exp(logs), logs

    def log_mean(self, points: Context) -> Array:
        s, s0, d = self.weights(points)
        mean = lax.max(s, s0) * decay(lax.abs(d))
        return jnp.where(d != d, 0, mean)  # all of a row is masked at one point


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
