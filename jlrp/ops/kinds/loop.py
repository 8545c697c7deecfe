"""Loops and branches, whose bodies hold operations in turn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from jax.extend.core import primitives as p

from jlrp.ir.loops import Body
from jlrp.ops.base import Operation


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class LoopOp(Operation):
    """A ``scan``, ``while`` or ``cond``, and the operations of each of its bodies."""

    bodies: Sequence[tuple[Body, list[Operation]]] = ()  # type: ignore[misc]

    @property
    def is_branch(self) -> bool:
        return self.primitive is p.cond_p

    @property
    def has_length(self) -> bool:
        """Whether its number of iterations is known."""
        return self.primitive is p.scan_p
