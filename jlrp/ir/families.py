"""How an equation carries relevance, given which of its values are active."""

from __future__ import annotations

import math
import operator
from collections.abc import Collection, Sequence

import jax.numpy as jnp
from jax.extend.core import primitives as p

from jlrp.ir.fixpoint import settled, through_jaxpr
from jlrp.ir.homogeneity import body_of, is_inexact
from jlrp.ir.jax_compat import JaxprEqn
from jlrp.ir.primitives import traits
from jlrp.ir.program import Atom, Equation
from jlrp.ir.traits import Family, Group


def rounds(equation: Equation) -> bool:
    """Whether a cast keeps so few digits (float8) that the number is another one."""
    if equation.primitive is p.reduce_precision_p:
        return equation.params["mantissa_bits"] < _DIGITS
    if equation.primitive is not p.convert_element_type_p:
        return False
    out = equation.outputs[0].dtype
    if not jnp.issubdtype(out, jnp.floating):
        return False
    given = equation.inputs[0].dtype
    return jnp.finfo(out).nmant < _DIGITS and out != given


_DIGITS = jnp.finfo(jnp.bfloat16).nmant  # casts to it are taken as exact


def rearranges(equation: Equation) -> bool:
    """Whether it gives the same numbers, each once, in another shape, order or dtype.

    A broadcast along axes of size 1 does, as ``reshape`` would.
    """
    source, out = equation.inputs[0], equation.outputs[0]
    return traits(equation).view and math.prod(source.shape) == math.prod(out.shape)


def keeps_order(equation: Equation) -> bool:
    """The same where their order in memory is kept: element i stays element i."""
    return rearranges(equation) and equation.primitive is not p.transpose_p


def positions(atoms: Sequence[Atom], among: Collection[Atom]) -> list[int]:
    """Where in a sequence some values are."""
    return [i for i, atom in enumerate(atoms) if atom in among]


def why_missing(equation: Equation, active: Collection[Atom]) -> str | None:
    """Why no rule can be derived, with some operands and outputs active."""
    row = traits(equation)
    if row.kind == "needs a rule":
        return row.how
    if row.lacks is None:
        return None
    operands = positions(equation.inputs, active)
    return row.lacks(equation, operands, positions(equation.outputs, active))


def groups_of(equation: Equation) -> tuple[Group, ...]:
    """The groups of operands in which a homogeneous equation has a degree."""
    groups = traits(equation).groups
    assert groups is not None
    return groups(equation)


def family_at(equation: Equation, active: Collection[Atom]) -> Family | None:
    """The family of an equation of which some operands and outputs are active.

    With a single active operand, products and solvers are linear.
    """
    row = traits(equation)
    family = row.family
    if family is None or why_missing(equation, active) is not None:
        return None
    if _adds_one_number(equation):
        return family._replace(kind="movement", nature="movement")
    operands = positions(equation.inputs, active)
    if family.nature == "product" and len(operands) == 1:
        if equation.primitive is p.div_p and operands[0] == 1:
            return family._replace(kind="function", nature="homogeneous")
        return family._replace(kind=row.linear_kind, nature="linear")
    if family.nature == "homogeneous":
        groups = [g for g in groups_of(equation) if set(g.operands) & set(operands)]
        # What only steers a solver (its tolerance, made from b) is in no group.
        alone = len(groups) == 1 and set(operands) <= set(groups[0].operands)
        if alone and groups[0].linear:
            kind = "linear" if family.kind == "function" else family.kind
            return family._replace(kind=kind, nature="linear")
    return family


def _adds_one_number(equation: Equation) -> bool:
    """Whether it is a sum over axes of size 1, which puts numbers elsewhere."""
    if traits(equation).reduction != "sum" or "axes" not in equation.params:
        return False
    shape = equation.inputs[0].shape
    return all(shape[axis] == 1 for axis in equation.params["axes"])


# What only chooses.


def taken_from(equation: Equation) -> list[set[int]] | None:
    """For each output, the operands whose numbers it may be; None: all of them.

    The key of a sort, or of a reduction that finds a winner, chooses among others'.
    """
    if equation.primitive is p.sort_p:
        return [{i} for i in range(len(equation.inputs))]
    if equation.primitive not in (p.reduce_p, p.reduce_window_p):
        return None
    n = len(equation.inputs) // 2
    jaxpr, _ = body_of(equation)

    def step(found: Sequence[set[int]]) -> list[set[int]]:
        return through_jaxpr(jaxpr, [*found, *found], _sources, set())

    # What is left over is an operand of the next call of the body.
    found = settled(step, [{j} for j in range(n)], operator.or_)
    return [{i for j in part for i in (j, n + j)} for part in found]


def _sources(eqn: JaxprEqn, operands: Sequence[set[int]]) -> list[set[int]]:
    """The operands of a body that an equation makes real or complex numbers of."""
    atoms = zip(eqn.invars, operands, strict=True)
    numbers = set[int]().union(*(of for atom, of in atoms if is_inexact(atom)))
    return [numbers if is_inexact(v) else set() for v in eqn.outvars]


def choosing(equation: Equation, active: Collection[Atom]) -> frozenset[Atom]:
    """The operands of which no active output takes its numbers."""
    sources = taken_from(equation)
    if sources is None:
        return frozenset()
    wanted = positions(equation.outputs, active)
    taken = {i for j in wanted for i in sources[j]}
    kept = [equation.inputs[i] for i in taken]
    return frozenset(a for a in equation.inputs if a not in kept)
