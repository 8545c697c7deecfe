"""What loops and branches share: their rule, and the reverse pass of their bodies."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Generic, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from jlrp.ir.loops import Body
from jlrp.ir.program import Equation, Value
from jlrp.ops.base import Operation
from jlrp.ops.context import Context
from jlrp.promise import Parts, Promise
from jlrp.rules.base import Array, BodyPlan, Causes, LoopContext, Propagation, Rule
from jlrp.rules.loops.iteration import Extra, Handed, Iteration, Masks, add_to
from jlrp.rules.loops.parts import Inside, Promises, check_said, filled, settled

T = TypeVar("T")
B = TypeVar("B", bound="Bodies")


@dataclass(frozen=True, eq=False)
class Bodies(Rule):
    """The rule of a loop or branch: its bodies and the plans for them."""

    bodies: tuple[Body, ...]
    plans: tuple[BodyPlan, ...]
    reversal: ClassVar[Callable[..., Reversal[Any]]]

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"

    def needs(self, op: Operation) -> tuple[Value, ...]:
        return tuple(a for a in op.equations[0].inputs if isinstance(a, Value))

    def parts(self, op: Operation, r: Sequence[Parts]) -> Sequence[Parts]:
        (equation,), body = op.equations, self.bodies[0]
        found = self.parts_inside(equation, _at_outputs(op, r, Parts.NONE))
        pairs = zip(body.operands(equation), found, strict=True)
        active = set(op.inputs)
        return [parts for atom, parts in pairs if atom in active]

    def parts_inside(self, equation: Equation, outs: Sequence[Parts]) -> list[Parts]:
        """The parts that its bodies hand back, by those at its outputs."""
        return settled(self.inside(), outs)

    def inside(self) -> list[Inside]:
        return [Inside(*pair) for pair in zip(self.bodies, self.plans, strict=True)]

    def propagate(
        self, op: Operation, r: Sequence[Promise | None], ctx: Context
    ) -> Propagation:
        assert isinstance(ctx, LoopContext)
        (equation,) = op.equations
        r_out = _at_outputs(op, r, None)
        if ctx.reference is not None:
            check_said(self.plans)

        def reverse(extra: Extra) -> tuple[Promises, Handed]:
            found = self.reversal(self, equation, r_out, ctx, extra).run()
            before: Promises = [None] * self.bodies[0].first
            return [*before, *found.constants, *found.carries, *found.slices], found

        def constants(wanted: Sequence[Value]) -> Sequence[Array]:
            promises, _ = reverse(Extra(wanted=frozenset(wanted)))
            multipliers: dict[Value, Array] = {}
            for atom, promise in zip(equation.inputs, promises, strict=True):
                if isinstance(atom, Value) and atom in wanted:
                    number = ctx.read(atom)
                    found = (promise or Promise()).per_unit(number)
                    found = jnp.zeros_like(number) if found is None else found
                    add_to(multipliers, atom, found)
            return [multipliers[v] for v in wanted]

        promises, found = reverse(Extra(captures=self.captures()))
        pairs = zip(equation.inputs, promises, strict=True)
        active = set(op.inputs)
        return Propagation(
            [promise for atom, promise in pairs if atom in active],
            lambda: reverse(Extra(causes=True))[1].causes,
            constants=constants,
            captured={i: inside for i, inside in found.captured.items() if inside},
        )

    def captures(self) -> bool:
        return any(plan.captured for plan in self.plans)

    def masks(self, ctx: LoopContext) -> Masks:
        """The masks in a loop's bodies that have one for each iteration, on axis 0."""
        axes = {name: n for plan in self.plans for name, n in plan.masks.items()}
        masks = {name: ctx.masks[name] for name in axes}
        return {name: mask for name, mask in masks.items() if mask.ndim > axes[name]}


def _at_outputs(op: Operation, r: Sequence[T], nothing: T) -> list[T]:
    """What there is one of for each output of a loop's equation."""
    by_value = dict(zip(op.outputs, r, strict=True))
    return [by_value.get(v, nothing) for v in op.equations[0].outputs]


class Reversal(Generic[B]):
    """One reverse pass through a loop or branch.

    Attributes:
      iterations: one for each body, or each plan of a body.
      parts: what those hand back which run in one compiled loop.
      dtype: of relevance of integers.
    """

    parts: list[Parts]

    def __init__(
        self,
        rule: B,
        equation: Equation,
        r_out: Promises,
        ctx: LoopContext,
        extra: Extra,
    ):
        self.rule, self.equation, self.r_out = rule, equation, r_out
        self.ctx, self.extra, self.body = ctx, extra, rule.bodies[0]
        leaves = [jnp.finfo(part.dtype).dtype for part in jax.tree.leaves(r_out)]
        self.dtype = np.dtype(jnp.result_type(*leaves))
        self.iterations = [
            Iteration(body, plan, equation, ctx, extra, self.dtype)
            for body, plan in zip(rule.bodies, rule.plans, strict=True)
        ]
        self.inside = [iteration.inside for iteration in self.iterations]
        self.outs = list(map(Parts.of, r_out))

    def run(self) -> Handed:
        """Run the iterations, the last first; captures are by the number of a body."""
        raise NotImplementedError

    def start(self) -> tuple[Promises, Promises]:
        """Behind the last iteration: promises of carries, and sums for constants."""
        outs = self.r_out[: self.body.n_carries]
        none: Promises = [None] * self.body.n_constants
        of_constants, of_carries, _ = self.body.divided(self.parts)
        return (
            filled(outs, of_carries, self.body.carries, self.dtype),
            filled(none, of_constants, self.body.constants, self.dtype),
        )

    def alike(
        self, run: Callable[..., Handed], *args: Any
    ) -> tuple[list[Callable[..., Handed]], Causes]:
        """``run`` of each iteration, with the same causes whichever it is; and zeros.

        Which causes there are is known only when all are traced, with ``args``.
        """
        runs = [partial(run, iteration) for iteration in self.iterations]
        zeros: Causes = {}
        for run in runs if self.extra.causes else ():
            for name, amount in jax.eval_shape(run, *args).causes.items():
                zeros[name] = jnp.zeros(amount.shape, amount.dtype)

        def with_all(run: Callable[..., Handed], *args: Any) -> Handed:
            handed = run(*args)
            causes = zeros | handed.causes
            cast = {name: a.astype(zeros[name].dtype) for name, a in causes.items()}
            return handed._replace(causes=cast)

        return [partial(with_all, run) for run in runs], zeros


def plus(a: Sequence[Promise | None], b: Sequence[Promise | None]) -> Promises:
    """Sums of promises of the same values."""
    return [q if p is None else p + q for p, q in zip(a, b, strict=True)]
