"""The operation: equations that one rule explains, and what a composite sees as one.

Each kind of operation is a class of its own in ``ops/kinds``, with its fields and its
mathematics; what holds of all of them is here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jlrp.ir.loops import Body
from jlrp.ir.program import Equation, Value
from jlrp.ops.context import Context, widened
from jlrp.typing import Array

Cotangents = Sequence[Array | None]  # one for each output, None for zero


@dataclass(frozen=True, eq=False)
class Operation:
    """What relevance passes in one step.

    Attributes:
      kind: what composites select: ``"conv"``, ``"dense"``, ``"activation"``, ...
      inputs: the active operands; a product's may repeat.
      outputs: the values whose promises it resolves.
      equations: the equations from inputs to outputs.
      constants: the other values that these read.
      facts: what else composites select: ``"first"``, ``"attention"``, ``"gate"``, ...
      stopped: those of the constants that it adds to its inputs, and that are dead.
    """

    kind: str
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    equations: tuple[Equation, ...]
    constants: tuple[Value, ...]
    facts: frozenset[str] = frozenset()
    stopped: tuple[Value, ...] = ()

    # What selectors may ask of any operation: a dense or convolution has a depth.
    depth: ClassVar[float | None] = None
    # Only loops and branches have any.
    bodies: ClassVar[Sequence[tuple[Body, list[Operation]]]] = ()

    @property
    def equation(self) -> Equation:
        """The one that names the operation in tables and errors."""
        return self.equations[-1]

    @property
    def primitive(self) -> Any:
        return self.equation.primitive

    @property
    def scope(self) -> str:
        return self.equation.scope

    def where(self) -> str:
        return self.equation.where()

    @property
    def position(self) -> int:
        return max(v.position for v in self.outputs)

    @property
    def has_offset(self) -> bool:
        """Whether constants add something to the operation's linear part."""
        return "offset" in self.facts

    @property
    def effective_constants(self) -> tuple[Value, ...]:
        """The constants that make a difference to the outputs."""
        return self.constants

    def __repr__(self) -> str:
        return f"{self.kind} operation ({self.primitive.name}) at {self.where()}"

    # Its mathematics, at the values of a context.

    def apply(self, x: Sequence[Array], ctx: Context) -> list[Array]:
        """The outputs for other inputs, the constants kept."""
        inputs = dict(zip(self.inputs, x, strict=True))
        constants = [v for v in self.constants if v not in inputs]
        env = ctx.run(self.equations, constants, inputs)
        return [env[v] for v in self.outputs]

    def at_inputs(self, ctx: Context) -> list[Array]:
        """The inputs at which it is differentiated."""
        return [ctx.read(v) for v in self.inputs]

    def vjp(self, cotangents: Cotangents, ctx: Context) -> list[Array]:
        """Transpose of the derivative at the actual inputs."""
        _, pull = jax.vjp(lambda *x: self.apply(x, ctx), *self.at_inputs(ctx))
        return list(pull(self.filled(cotangents)))

    def jvp(self, ctx: Context, tangents: Sequence[Array] | None = None) -> list[Array]:
        """The derivative, applied to the actual inputs if not told else."""
        x = self.at_inputs(ctx)
        tangents = x if tangents is None else tangents
        return jax.jvp(lambda *x: self.apply(x, ctx), tuple(x), tuple(tangents))[1]

    def vjp_constants(
        self, cotangents: Cotangents, wanted: Sequence[Value], ctx: Context
    ) -> list[Array]:
        """Transpose of the derivative by some of the constants."""
        x = [ctx.read(v) for v in self.inputs]

        def outputs(*constants: Array) -> list[Array]:
            at = ctx.replaced(dict(zip(wanted, constants, strict=True)))
            return self.apply(x, at)

        _, pull = jax.vjp(outputs, *(ctx.read(v) for v in wanted))
        return list(pull(self.filled(cotangents)))

    def filled(self, cotangents: Cotangents) -> list[Array]:
        return [
            jnp.zeros_like(widened(v)) if m is None else m
            for v, m in zip(self.outputs, cotangents, strict=True)
        ]


@dataclass(frozen=True)
class View:
    """What a composite wants to see as one operation."""

    merge_batch_norm: bool = True  # in the dense or convolution before it
    hold_statistics: bool = True  # what a norm divides by is a constant
    find_signals: bool = False  # among factors, the one the others are computed from
    peel_first: bool = False  # a first iteration may hold the first affine operation
    as_differentiated: bool = False  # what JAX's gradient sees, no more and no less
    relative: bool = False  # to a reference: a product is one operation of all factors


def with_inner(operations: Iterable[Operation]) -> Iterator[Operation]:
    """Operations, and those in their bodies."""
    for op in operations:
        yield op
        for _, inner in op.bodies:
            yield from with_inner(inner)
