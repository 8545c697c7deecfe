"""Facts that flow forward: through the equations of a jaxpr, and round a loop.

A fact is an element of a finite lattice (a boolean, a level, a set of names). Of two
paths to a value it is joined; it only grows from one iteration to the next.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from jlrp.ir import jax_compat
from jlrp.ir.jax_compat import JaxAtom, Jaxpr, JaxprEqn

T = TypeVar("T")


def settled(
    step: Callable[[list[T]], Sequence[T]],
    carry: Sequence[T],
    join: Callable[[T, T], T],
    rounds: int | None = None,
) -> list[T]:
    """The facts of a loop's carries before an iteration, joined over all iterations.

    Each round makes a carry grow or is the last: with booleans, no more rounds than
    carries do so.

    Args:
      step: from the facts of the carries before an iteration to those behind it.
      rounds: how many times an iteration follows another; None: there is no telling.
    """
    carry = list(carry)
    while rounds is None or rounds > 0:
        grown = list(map(join, carry, step(carry)))
        if grown == carry:
            break
        carry, rounds = grown, None if rounds is None else rounds - 1
    return carry


def through_jaxpr(
    jaxpr: Jaxpr,
    inputs: Sequence[T],
    transfer: Callable[[JaxprEqn, list[T]], Sequence[T]],
    nothing: T,
) -> list[T]:
    """The facts of a jaxpr's outputs, from those of its inputs.

    Args:
      transfer: from the facts of an equation's operands to those of its outputs; calls
        are looked into.
      nothing: the fact of literals and constants.
    """
    known: dict[JaxAtom, T] = dict(zip(jaxpr.invars, inputs, strict=True))

    def of(atom: JaxAtom) -> T:
        return nothing if jax_compat.is_literal(atom) else known.get(atom, nothing)

    for eqn in jaxpr.eqns:
        operands = [of(a) for a in eqn.invars]
        call = jax_compat.call_body(eqn)
        if call is None:
            outs = transfer(eqn, operands)
        else:
            outs = through_jaxpr(call[0], operands, transfer, nothing)
        known.update(zip(eqn.outvars, outs, strict=True))
    return [of(a) for a in jaxpr.outvars]
