"""Where JAX has no derivative of a primitive, and what to write instead."""

from __future__ import annotations

from collections.abc import Collection

from jlrp.ir.traits import Application

Positions = Collection[int]  # of the operands and outputs that are active

NO_DERIVATIVE = "JAX has no derivative of it"


def betainc(equation: Application, active: Positions, outputs: Positions) -> str | None:
    return NO_DERIVATIVE + " by a and b" if {0, 1} & set(active) else None


def first_operand(
    equation: Application, active: Positions, outputs: Positions
) -> str | None:
    return NO_DERIVATIVE + " by its first operand" if 0 in active else None


def svd(equation: Application, active: Positions, outputs: Positions) -> str | None:
    *_, m, n = equation.inputs[0].shape
    full = equation.params["full_matrices"] and equation.params["compute_uv"]
    return f"{NO_DERIVATIVE}: use full_matrices=False" if full and m != n else None


def eig(equation: Application, active: Positions, outputs: Positions) -> str | None:
    allowed = equation.params.get("enable_eigvec_derivs", False)
    if allowed or not set(outputs) - {0}:
        return None
    return f"{NO_DERIVATIVE}'s vectors: use enable_eigvec_derivs=True"


def scatter(equation: Application, active: Positions, outputs: Positions) -> str | None:
    if equation.params.get("update_jaxpr") is None:
        return None
    return f"{NO_DERIVATIVE} with a function: write x.at[i].set(f(x[i]))"


def solve(equation: Application, active: Positions, outputs: Positions) -> str | None:
    if equation.params["jaxprs"].transpose_solve is not None:
        return None
    return f"{NO_DERIVATIVE}: give it transpose_solve, or symmetric=True"
