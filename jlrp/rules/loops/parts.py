"""Which parts of promises the bodies of a loop or branch hand back, from their plans.

Compiled loops need the same arrays in every iteration. Rules say which parts they hand
on (``Rule.parts``), so that what iterations have in common is known before any of them
is traced: a walk over the steps of a plan, repeated while the parts of carries grow.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from operator import or_

import jax.numpy as jnp
import numpy as np
from jax import lax

from jlrp.errors import RuleError
from jlrp.ir import fixpoint, jax_compat
from jlrp.ir.loops import Body
from jlrp.ir.program import Value
from jlrp.ops.base import Operation
from jlrp.promise import Parts, Promise
from jlrp.rules.base import Array, BodyPlan, Rule

Promises = list[Promise | None]


@dataclass(frozen=True)
class Inside:
    """A body and its plan, as a map from parts at its outputs to parts at its inputs.

    Attributes:
      made: the inputs whose multipliers are wanted, since parameters make them.
    """

    body: Body
    plan: BodyPlan
    made: tuple[Value, ...] = ()

    def __call__(self, outs: Sequence[Parts]) -> list[Parts]:
        program = self.body.program
        known: dict[Value, Parts] = {}

        def add(value: Value, parts: Parts) -> None:
            known[value] = known.get(value, Parts.NONE) | parts

        for atom, parts in zip(program.outputs, outs, strict=True):
            if isinstance(atom, Value) and program.is_active(atom):
                add(atom, parts)
        for step in self.plan.steps:
            op = step.operation
            r = [known.pop(v, Parts.NONE) for v in op.outputs]
            if any(r):
                for value, parts in zip(op.inputs, step.rule.parts(op, r), strict=True):
                    add(value, parts)
        found = {v: known.get(v, Parts.NONE) for v in program.sources}
        found |= dict.fromkeys(self.made, Parts.MULTIPLIER)
        return [found.get(v, Parts.NONE) for v in program.inputs]


def settled(several: Sequence[Inside], outs: Sequence[Parts]) -> list[Parts]:
    """What any of these hands back, however often they follow each other."""
    body = several[0].body
    n = body.n_carries

    def union(carries: Sequence[Parts]) -> list[Parts]:
        return reduce(joined, [inside([*carries, *outs[n:]]) for inside in several])

    carries = fixpoint.settled(lambda c: body.divided(union(c))[1], outs[:n], or_)
    constants, _, slices = body.divided(union(carries))
    return [*constants, *carries, *slices]


def joined(a: Sequence[Parts], b: Sequence[Parts]) -> list[Parts]:
    """The parts that either has."""
    return list(map(or_, a, b))


def filled(
    promises: Sequence[Promise | None],
    parts: Sequence[Parts],
    values: Sequence[Value],
    dtype: np.dtype,
    *rows: int,
) -> Promises:
    """Promises of values with these parts, in the dtypes of their relevance.

    Args:
      dtype: of relevance of integers.
      rows: sizes of the axes in front of those of the values.
    """

    def one(promise: Promise | None, parts: Parts, v: Value) -> Promise | None:
        def part(which: Parts, part: Array | None, dtype: np.dtype) -> Array | None:
            if which not in parts:
                return None
            empty = part is None
            return (
                lax.full((*rows, *v.shape), 0, dtype) if empty else part.astype(dtype)
            )

        have, like = promise or Promise(), _dtype_of(v, dtype)
        value = part(Parts.VALUE, have.value, jnp.finfo(like).dtype)
        multiplier = part(Parts.MULTIPLIER, have.multiplier, like)
        return Promise(value, multiplier) if parts else None

    return [one(*each) for each in zip(promises, parts, values, strict=True)]


def _dtype_of(value: Value, of_integers: np.dtype) -> np.dtype:
    """The dtype of a value's multipliers."""
    if not jnp.issubdtype(value.dtype, jnp.inexact):
        return of_integers
    low = str(value.dtype) in jax_compat.LOW_PRECISION
    return np.dtype(np.float32) if low else np.dtype(value.dtype)


def check_said(plans: Sequence[BodyPlan]) -> None:
    """Refuse rules that do not say their parts, where relevance is from a reference.

    Zeros in place of what they do not hand on would be values, and what the other rules
    read there is enough for multipliers alone.

    Raises:
      RuleError: there is such a rule, in these bodies or in bodies in them.
    """
    for step in (step for plan in plans for step in plan.steps):
        check_said(getattr(step.rule, "plans", ()))
        if type(step.rule).parts is Rule.parts:
            raise RuleError(
                f"{step.rule!r} is in a loop or branch, at the {step.operation!r}, and "
                "with a baseline it has to say which parts of promises it hands on: "
                "let its parts(op, r) return [jlrp.rules.Parts.MULTIPLIER] for each "
                "input, or what else it returns."
            )


def check_declared(
    rule: Rule,
    op: Operation,
    r: Sequence[Promise | None],
    promises: Sequence[Promise | None],
) -> None:
    """Refuse what a rule hands on and does not say: it would be lost in the loop.

    Raises:
      RuleError: a promise has a part that ``rule.parts`` leaves out.
    """
    declared = rule.parts(op, list(map(Parts.of, r)))
    for promise, parts in zip(promises, declared, strict=True):
        if more := Parts.of(promise) & ~parts:
            names = " and a ".join(str(part.name).lower() for part in more)
            raise RuleError(
                f"{rule!r} hands on a {names} at the {op!r}, in a loop or branch, and "
                "its parts(op, r) does not say so. Let parts(op, r) return what the "
                "promises of the inputs have, or leave it to jlrp.rules.Rule."
            )
