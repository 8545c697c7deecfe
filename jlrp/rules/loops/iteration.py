"""One iteration of a loop, or a branch, in reverse."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import jax.numpy as jnp
import numpy as np

from jlrp.ir.jax_compat import Operand
from jlrp.ir.loops import Body
from jlrp.ir.program import Atom, Equation, Literal, Value
from jlrp.ops.captures import Captured, Entry
from jlrp.promise import Parts, Promise, difference
from jlrp.rules.base import (
    Array,
    BodyPlan,
    BodyStep,
    Both,
    Causes,
    LoopContext,
    Propagation,
    Residuals,
)
from jlrp.rules.loops.parts import Inside, Promises, check_declared, filled
from jlrp.typing import PyTree

T = TypeVar("T")
Masks = Mapping[str, Array]


@dataclass(frozen=True)
class Extra:
    """What is asked for beside the promises of active operands.

    Attributes:
      wanted: the parameters among the operands whose multipliers are.
    """

    captures: bool = False
    causes: bool = False
    wanted: frozenset[Value] = frozenset()


class Handed(NamedTuple):
    """What an iteration hands back: promises of its inputs, captures, amounts."""

    constants: Promises
    carries: Promises
    slices: Promises
    captured: Mapping[Any, PyTree]
    causes: Causes


class Iteration:
    """One run of a body in reverse: promises of its outputs in, of its inputs out.

    What is wanted of parameters comes back as promises too: with multipliers.
    """

    def __init__(
        self,
        body: Body,
        plan: BodyPlan,
        equation: Equation,
        ctx: LoopContext,
        extra: Extra,
        dtype: np.dtype,
    ):
        self.body, self.plan, self.ctx, self.extra = body, plan, ctx, extra
        self.dtype = dtype  # of relevance of integers

        def is_made(v: Value, outer: Atom) -> bool:
            if v in body.carries:  # by the iteration before, or the initial state
                return bool(extra.wanted) and v in plan.parameters
            return outer in extra.wanted

        pairs = zip(body.program.inputs, body.operands(equation), strict=True)
        made = tuple(v for v, outer in pairs if is_made(v, outer))
        self.inside = Inside(body, plan, made)

    def __call__(
        self,
        residuals: Residuals | Both,
        outs: Promises,
        masks: Masks,
        parts: Sequence[Parts],
    ) -> Handed:
        """What it hands back, with these parts; ``masks`` are of this iteration."""
        program, made = self.body.program, self.inside.made
        seeds, explained, causes = self._seeds(outs, residuals)
        r_in, multipliers, captured = self.ctx.reverse_body(
            self.plan,
            residuals,
            seeds,
            self._observer(causes),
            made,
            explained,
            masks,
            self.extra.captures,
        )
        by_input = dict(zip(program.sources, r_in, strict=True))
        of_made = (Promise(multiplier=m) for m in multipliers)
        by_input |= zip(made, of_made, strict=True)
        promises = [by_input.get(v) for v in program.inputs]
        promises = filled(promises, parts, program.inputs, self.dtype)
        return Handed(*self.body.divided(promises), captured, causes)

    def _seeds(
        self, outs: Promises, residuals: Residuals | Both
    ) -> tuple[dict[Value, Promise], dict[Value, Array], Causes]:
        """Promises that go on; multipliers of parameters; what constants absorb."""
        program = self.body.program
        seeds: dict[Value, Promise] = {}
        explained: dict[Value, Array] = {}
        causes: Causes = {}
        for atom, promise in zip(program.outputs, outs, strict=True):
            if promise is None:
                continue
            if isinstance(atom, Value) and program.is_active(atom):
                seeds[atom] = promise + seeds.get(atom)
                continue  # else only other iterations' plans have it active
            if self.extra.wanted and atom in self.plan.parameters:
                multiplier = promise.per_unit(_number(atom, residuals))
                if multiplier is not None:
                    add_to(explained, atom, multiplier)  # type: ignore[arg-type]
            if self.extra.causes:
                amount = jnp.sum(promise.resolve(_number(atom, residuals)))
                cause = "stopped" if program.is_dead(atom) else "constants"
                add_to(causes, cause, amount)
        return seeds, explained, causes

    def _observer(self, causes: Causes) -> Callable[..., None]:
        def observe(
            step: BodyStep,
            r_out: Sequence[Promise | None],
            propagation: Propagation,
            numbers: object,
        ) -> None:
            check_declared(step.rule, step.operation, r_out, propagation.promises)
            if self.extra.causes:
                for name, amount in propagation.causes().items():
                    add_to(causes, name, jnp.sum(amount))

        return observe

    def captured_nothing(self) -> Captured:
        """What it captures where it does not run: zeros."""

        def zeros(entry: Entry) -> PyTree:
            return () if entry.like is None else jnp.zeros_like(entry.like)

        captured = self.plan.captured if self.extra.captures else {}
        return {name: list(map(zeros, entries)) for name, entries in captured.items()}


def _number(atom: Atom, residuals: Residuals | Both) -> Array:
    """What multipliers of an atom are of: from a reference, its change."""

    def at(residuals: Residuals) -> Operand:
        return atom.number if isinstance(atom, Literal) else residuals[atom]

    found = at_both(at, residuals)
    if isinstance(found, Both):
        return difference(jnp.asarray(found.here), jnp.asarray(found.there))
    return found


def both_of(ctx: LoopContext, read: Callable[[LoopContext], T]) -> T | Both:
    """What is read at x, and, from a reference, there too."""
    here, reference = read(ctx), ctx.reference
    if reference is None:
        return here
    assert isinstance(reference, LoopContext)
    return Both(here, read(reference))


def at_both(function: Callable[..., PyTree], *args: PyTree) -> PyTree:
    """A function of what there may be one of at each point."""
    if not any(isinstance(a, Both) for a in args):
        return function(*args)
    here = [a.here if isinstance(a, Both) else a for a in args]
    there = [a.there if isinstance(a, Both) else a for a in args]
    return Both(function(*here), function(*there))


def add_to(found: dict[T, Array], key: T, amount: Array) -> None:
    found[key] = found[key] + amount if key in found else amount
