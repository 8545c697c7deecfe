"""Degrees of homogeneity: the operands in which an operation has one, and which.

Of degree k in a group of operands: ``f(c x) = c^k f(x)``, so that Euler's identity
gives each its share. Reductions with a body of their own have the degree of that body.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from jax.extend.core import Primitive
from jax.extend.core import primitives as p

from jlrp.ir import jax_compat
from jlrp.ir.fixpoint import through_jaxpr
from jlrp.ir.jax_compat import Aval, JaxAtom, Jaxpr, JaxprEqn
from jlrp.ir.traits import COUNTED, Application, Degrees, Group, Groups, traits
from jlrp.typing import Array

# The groups of operands, with their degrees.


def of_degree(degree: Degrees, linear: bool = False) -> Groups:
    """One group of all operands."""

    def groups(equation: Application) -> tuple[Group, ...]:
        return (Group(tuple(range(len(equation.inputs))), degree, linear),)

    return groups


def in_groups(*groups: Group) -> Groups:
    return lambda equation: groups


def product_over_axes(equation: Application) -> tuple[Group, ...]:
    shape = equation.inputs[0].shape
    return (Group((0,), math.prod(shape[a] for a in equation.params["axes"])),)


def running_product(equation: Application) -> tuple[Group, ...]:
    axis, shape = equation.params["axis"], equation.inputs[0].shape
    count = np.arange(1, shape[axis] + 1)
    if equation.params["reverse"]:
        count = count[::-1]
    others = [1] * len(shape)
    others[axis] = -1
    return (Group((0,), count.reshape(others)),)


def power(equation: Application) -> tuple[Group, ...]:
    """Of one operand, of the degree that its row says."""
    degree = traits(equation).degree_with(equation.params)
    assert degree is not None  # else it were in no row as a power
    return (Group((0,), degree),)


def triangular_solver(equation: Application) -> tuple[Group, ...]:
    if equation.params["unit_diagonal"]:  # the ones are no part of a
        return (Group((0, 1), 0),)
    return (Group((0,), -1), Group((1,), 1, linear=True))


def solver(equation: Application) -> tuple[Group, ...]:
    lengths = equation.params["const_lengths"]
    first = sum(lengths)
    b = tuple(range(first, len(equation.inputs)))
    return (Group(tuple(range(lengths.matvec)), -1), Group(b, 1, linear=True))


def scattered_product(equation: Application) -> tuple[Group, ...]:
    return (Group((0,), 1, linear=True), Group((2,), COUNTED))


def by_body(equation: Application) -> tuple[Group, ...]:
    """A reduction with a body of its own; its degree is found in the body."""
    n = len(equation.inputs) // 2
    found = body_degree(equation)
    everything = tuple(range(2 * n))
    if found == "product":
        return (Group(everything, COUNTED),)
    return (Group(everything, 0 if found is None else 1),)


# The degree of a reduction's body.


def body_degree(equation: Application) -> str | None:
    """What the body of a ``reduce`` or ``reduce_window`` is.

    ``"sum"``, ``"product"``, ``"homogeneous"`` (of degree 1: selections), or None.
    """
    jaxpr, _ = body_of(equation)
    if [eqn.primitive for eqn in jaxpr.eqns] in ([p.mul_p], [p.add_p]):
        (eqn,) = jaxpr.eqns
        if not any(map(jax_compat.is_literal, eqn.invars)) and len(jaxpr.outvars) == 1:
            return "product" if eqn.primitive is p.mul_p else "sum"
    degrees = [1 if is_inexact(v) else 0 for v in jaxpr.invars]
    found = through_jaxpr(jaxpr, degrees, _degrees, None)
    outs = [
        degree
        for atom, degree in zip(jaxpr.outvars, found, strict=True)
        if jax_compat.is_literal(atom) or is_inexact(atom)
    ]
    return "homogeneous" if all(degree == 1 for degree in outs) else None


def body_of(equation: Application) -> tuple[Jaxpr, Sequence[Array]]:
    """The jaxpr of a reduction's body and its constants."""
    jaxpr, consts = jax_compat.open_jaxpr(equation.params["jaxpr"])
    return jaxpr, equation.params.get("consts", consts)


def is_inexact(atom: Aval | JaxAtom) -> bool:
    """Whether a value of the program or of a jaxpr holds real or complex numbers."""
    return jax_compat.is_inexact(getattr(atom, "aval", atom))


def _degrees(eqn: JaxprEqn, operands: list[int | None]) -> list[int | None]:
    """The degrees of an equation of a body in all of the body's operands together."""
    return [_degree_of(eqn.primitive, operands)] * len(eqn.outvars)


def _degree_of(primitive: Primitive, x: list[int | None]) -> int | None:
    """The degree of what is computed from operands of known degrees."""
    if primitive is p.select_n_p:
        which, *x = x
        return x[0] if which == 0 and len(set(x)) == 1 else None
    if None in x or len(set(x)) > 1:
        return None
    row = traits(primitive)
    if row.comparison:
        return 0
    keeps = row.elementwise and row.nature in ("linear", "movement", "selection")
    return x[0] if x[0] == 0 or keeps else None
