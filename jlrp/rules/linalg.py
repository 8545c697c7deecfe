"""Euler's identity: operations that are homogeneous of a known degree.

Decompositions, solvers, products over axes, reductions with a body of their own, and
powers of complex numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.extend.core import primitives as p

from jlrp.ir.families import groups_of
from jlrp.ir.homogeneity import body_degree, is_inexact
from jlrp.ir.program import Value
from jlrp.ir.traits import Degree, Degrees
from jlrp.ops.base import Operation
from jlrp.ops.context import Context
from jlrp.ops.decompositions import bound, decomposition_of, n_factors
from jlrp.ops.kinds.generic import HomogeneousOp
from jlrp.promise import Parts, Promise
from jlrp.rules.base import Array, Causes, Propagation, Rule, refuse
from jlrp.rules.reference import Difference


@dataclass(frozen=True, repr=False)
class Euler(Rule):
    """``R_i = x_i sum_j df_j/dx_i R_j / (k y_j)`` for f of degree k: conserves exactly.

    Named after Euler's theorem for homogeneous functions, ``sum_i x_i df/dx_i = k f``.
    Gradient x input divided by the degree; of degree 1 it is what LRP-0 is for layers.
    Where an operation is homogeneous in each of n groups of operands (a solver: of
    degree -1 in the matrix, 1 in the right-hand side), each gets 1/n: the rule of
    products. An output of degree 0 (eigenvectors, the Q of QR) is explained by
    first-order Taylor, and the ledger holds the remainder. Source for products:
    AttnLRP (arXiv 2402.05602), eq. 7.

    Args:
      degree: k of all outputs in all active operands; None: as the table of primitives
        has it.
    """

    degree: float | None = None

    def __repr__(self) -> str:
        return "Euler()" if self.degree is None else f"Euler({self.degree})"

    def needs(self, op: Operation) -> tuple[Value, ...]:
        return op.inputs + op.outputs

    def parts(self, op: Operation, r: Sequence[Parts]) -> Sequence[Parts]:
        return [Parts.MULTIPLIER] * len(op.inputs)

    def check(self, op: Operation) -> None:
        if len(op.equations) != 1:
            refuse(self, op, "it consists of several equations")
        if self.degree is None and not isinstance(op, HomogeneousOp):
            refuse(self, op, "its degree is not known; give it")

    def from_reference(self, op: Operation) -> Rule:
        return Difference()

    def propagate(
        self, op: Operation, r: Sequence[Promise | None], ctx: Context
    ) -> Propagation:
        (equation,) = op.equations
        slots = [i for i, a in enumerate(equation.inputs) if a in op.inputs]
        operands = [ctx.read(a) for a in equation.inputs]
        whole = decomposition_of(equation) or bound(equation)
        outs = [equation.outputs.index(v) for v in op.outputs]

        def function(*xs: Array) -> list[Array]:
            filled = list(operands)
            for i, x in zip(slots, xs, strict=True):
                filled[i] = x
            found = whole(*filled)
            return [found[i] for i in outs]

        x = [operands[i] for i in slots]
        y = [ctx.read(v) for v in op.outputs]
        multipliers = [
            None if promise is None else promise.per_unit(number)
            for promise, number in zip(r, y, strict=True)
        ]
        _, pull = jax.vjp(function, *x)
        parts = self._parts(op, slots, operands)
        found: dict[Value, Array] = {}
        for members, degrees in parts:
            cotangents = pull(
                [
                    jnp.zeros_like(number) if m is None else _over(m, degrees, i)
                    for m, number, i in zip(multipliers, y, outs, strict=True)
                ]
            )
            for i, m in zip(slots, cotangents, strict=True):
                atom = equation.inputs[i]
                if i in members and isinstance(atom, Value):
                    found[atom] = found[atom] + m if atom in found else m

        def causes() -> Causes:
            lost: dict[str, Array] = {}
            for members, degrees in parts:
                tangents = [
                    v if i in members else jnp.zeros_like(v)
                    for i, v in zip(slots, x, strict=True)
                ]
                _, linear = jax.jvp(function, tuple(x), tuple(tangents))
                for m, number, j, i in zip(multipliers, y, linear, outs, strict=True):
                    if m is None:
                        continue
                    name = "constants" if members - set(slots) else "taylor"
                    rest = number / len(parts) * m - j * _over(m, degrees, i)
                    rest = jnp.sum(jnp.real(jnp.where(m == 0, 0, rest)))
                    lost[name] = lost[name] + rest if name in lost else rest
            for promise, number in zip(r, y, strict=True):
                if promise is not None and promise.value is not None:
                    blocked = jnp.sum(jnp.where(number == 0, promise.value, 0))
                    lost["blocked"] = lost.get("blocked", 0) + blocked
            return lost

        promises = [
            Promise(multiplier=found[v]) if v in found else None for v in op.inputs
        ]
        return Propagation(promises, causes, multipliers)

    def _parts(
        self, op: Operation, slots: Sequence[int], operands: Sequence[Array]
    ) -> list[tuple[set[int], Degrees]]:
        """Groups of operands, each with what its multipliers are divided by."""
        (equation,) = op.equations
        floats = {i for i, a in enumerate(equation.inputs) if is_inexact(a)}
        if self.degree is not None:
            return [(floats, self.degree)]
        groups = [g for g in groups_of(equation) if set(g.operands) & set(slots)]
        parts: list[tuple[set[int], Degrees]] = []
        for group in groups:
            if isinstance(group.degree, str):
                return [(floats, n_factors(equation, slots, operands))]
            degrees = _times(group.degree, len(groups))
            parts.append((floats & set(group.operands), degrees))
        return parts

    def is_exact(self, op: Operation) -> bool:
        if op.primitive not in (p.reduce_p, p.reduce_window_p):
            return True
        return body_degree(op.equations[0]) is not None


def _times(degree: Degrees, n: int) -> Degrees:
    if isinstance(degree, tuple):
        return tuple(k * n for k in degree)
    return degree * n


def _degree(degrees: Degrees, output: int) -> Degree | None:
    """The divisor for one output; None: degree 0."""
    degree = degrees[output] if isinstance(degrees, tuple) else degrees
    return None if isinstance(degree, int | float) and degree == 0 else degree


def _over(m: Array, degrees: Degrees, output: int) -> Array:
    degree = _degree(degrees, output)
    if degree is None:
        return m
    if isinstance(degree, int | float):
        return m / degree
    # No factor of an element is active: nothing goes on.
    degree = jnp.asarray(degree, jnp.real(m).dtype)
    return jnp.where(degree == 0, 0, m / jnp.where(degree == 0, 1, degree))
