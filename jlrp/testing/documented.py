"""Differences between two forms of one function that the rules force, and that stay.

The closed list is in docs/how-to/check-spellings.md. Anything else is a fault.
"""

from __future__ import annotations

from jlrp.composites import Composite, Depth
from jlrp.rules import (
    Absolute,
    AlphaBeta,
    Epsilon,
    Flat,
    Gamma,
    GammaMontavon,
    Rule,
    WSquare,
    ZBox,
    ZPlus,
)

# What depends on the signs of single products, or on how many there are.
_LOOK_AT_SIGNS = (AlphaBeta, Flat, Gamma, GammaMontavon, WSquare, ZBox, ZPlus, Absolute)


def _has(composite: Composite, *rules: type[Rule]) -> bool:
    return any(isinstance(pair.rule, rules) for pair in composite.pairs)


def of_kernels(composite: Composite) -> str | None:
    """For a kernel that is split along its contraction."""
    if _has(composite, *_LOOK_AT_SIGNS):
        return "a kernel split along its contraction, under rules that look at signs"
    if _has(composite, Epsilon):
        return "a kernel split along its contraction has two stabilisers"
    return None


def of_signs(composite: Composite) -> str | None:
    """For a negation that passes a nonlinear function."""
    if _has(composite, *_LOOK_AT_SIGNS):
        return "a negation behind an activation stays there"
    return None


def of_loops(composite: Composite) -> str | None:
    """For a loop that is unrolled."""
    given: list[object] = [pair.selector for pair in composite.pairs]
    parts = [part for s in given for part in (s if isinstance(s, tuple) else (s,))]
    if any(isinstance(part, Depth) for part in parts):
        return "the operations of a loop's body have one depth in all iterations"
    return None


def of_max(composite: Composite) -> str | None:
    """For a maximum written as arithmetic."""
    if _has(composite, Absolute):
        return "max as arithmetic, under absolute splits"
    return None
