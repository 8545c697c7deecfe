"""The operation: equations that one rule explains, and what a composite sees as one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from jlrp.ir.loops import Body
from jlrp.ir.program import Equation, Value
from jlrp.ops.activation import Region
from jlrp.ops.affine import Affine
from jlrp.ops.embedding import Embedding
from jlrp.ops.product import Product
from jlrp.ops.softmax import Softmax


@dataclass(frozen=True, eq=False)
class Operation:
    """What relevance passes in one step.

    Attributes:
      kind: what composites select: ``"conv"``, ``"dense"``, ``"activation"``, ...
      nature: how relevance can be derived (see ``ir/primitives.py``).
      inputs: the active operands; a product's may repeat.
      outputs: the values whose promises it resolves.
      equations: the equations from inputs to outputs.
      constants: the other values that these read.
      stopped: those of the constants that it adds to its inputs, and that are dead.
      position: order in the program.
      depth: of a dense or convolution, how many lie before it on the longest path from
        x, as a share of the most that lie before any: 0 is nearest to x, 1 nearest to
        the output. Of other operations, None.
    """

    kind: str
    nature: str
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    equations: tuple[Equation, ...]
    constants: tuple[Value, ...]
    affine: Affine | None = None
    region: Region | None = None
    product: Product | None = None
    embedding: Embedding | None = None
    softmax: Softmax | None = None
    bodies: tuple[tuple[Body, list[Operation]], ...] = ()
    facts: frozenset[str] = field(default_factory=frozenset)
    stopped: tuple[Value, ...] = ()
    depth: float | None = None

    @property
    def primitive(self) -> Any:
        return self.equations[-1].primitive if self.affine is None else self.core

    @property
    def core(self) -> Any:
        assert self.affine is not None
        return self.affine.core.primitive

    @property
    def scope(self) -> str:
        equation = self.equations[-1] if self.affine is None else self.affine.core
        return equation.scope

    @property
    def position(self) -> int:
        return max(v.position for v in self.outputs)

    @property
    def has_offset(self) -> bool:
        """Whether constants add something to the operation's linear part."""
        return "offset" in self.facts

    def where(self) -> str:
        equation = self.equations[-1] if self.affine is None else self.affine.core
        return equation.where()

    def __repr__(self) -> str:
        return f"{self.kind} operation ({self.primitive.name}) at {self.where()}"


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
