"""Integers and booleans of x as numbers: ``x @ w`` with an integer x is x_i w_i.

They carry relevance in two ways, which add up. As a *code*: what they fetch from a
table (``ops.embedding``). As a *number*: sums, products and selections of integers
propagate as their float twins do, which this file writes into the program. Remainders,
integer division, shifts and bits are codes only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from jlrp.analysis.dataflow import Dependence, reached
from jlrp.ir import jax_compat
from jlrp.ir.primitives import traits
from jlrp.ir.program import Equation, Program, Value
from jlrp.ir.rewriting import (
    Rewriting,
    computes_numbers,
    is_narrow,
    number_operands,
)


def with_numbers(program: Program, sources: Sequence[Value]) -> None:
    """Write a program again in which integers of x are computed with as numbers."""
    integers = [v for v in sources if is_narrow(v) and not jax_compat.is_inexact(v)]
    needed = _needed(program, integers) if integers else set()
    if needed:
        dtype = _dtype_of_readers(program, needed)
        _Integers(program, integers, needed, dtype).run()


def _dtype_of_readers(program: Program, needed: set[Value]) -> Any:
    """The widest dtype of the floats that are computed from integers."""
    readers = (e for e in program.equations if not needed.isdisjoint(e.inputs))
    floats = {v.dtype for e in readers for v in e.outputs if jax_compat.is_inexact(v)}
    return np.result_type(np.float32, *(d for d in floats if d.itemsize > 4))


def _needed(program: Program, integers: Sequence[Value]) -> set[Value]:
    """The integers from x that are computed with, and that reach floats as numbers."""
    from_x = reached(Dependence(is_narrow), program, integers)
    needed: set[Value] = set()
    computed = False
    for equation in reversed(program.equations):
        if not computes_numbers(equation):
            continue
        if not any(v in needed or not is_narrow(v) for v in equation.outputs):
            continue
        operands = [equation.inputs[i] for i in number_operands(equation)]
        found = {a for a in operands if a in from_x}
        needed |= found  # type: ignore[arg-type]
        computed |= bool(found) and traits(equation).codes != "moves"
    return needed if computed else set()


class _Integers(Rewriting):
    def __init__(
        self,
        program: Program,
        integers: Sequence[Value],
        needed: set[Value],
        dtype: Any,
    ):
        super().__init__(program, dtype)
        self.needed = needed
        for value in integers:
            if value in needed:
                self.twins[value] = self.as_float(None, value)  # type: ignore

    def visit(self, kept: Equation) -> None:
        if self.compute_with_twins(kept):
            return
        for value in kept.outputs:  # what integers of x fetched or decided, as numbers
            if value in self.needed:
                self.twins[value] = self.as_float(kept, value)  # type: ignore
