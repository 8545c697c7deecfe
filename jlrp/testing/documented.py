"""Differences between two forms of one function that the rules force, and that stay.

The closed list is in docs/how-to/check-spellings.md. Anything else is a fault.
"""

from __future__ import annotations

from jlrp.composites import Composite
from jlrp.rules import Absolute, Epsilon, Pass, Rule, Zero

# Rules of dense layers and convolutions that do not depend on the signs of products,
# and have no stabiliser that each of two kernels would have for itself.
_LINEAR = (Zero, Pass)


def _rules(composite: Composite) -> list[Rule]:
    return [pair.rule for pair in composite.pairs]


def of_kernels(composite: Composite) -> str | None:
    """For a kernel split along its contraction, or a padded one."""
    rules = [r for r in _rules(composite) if not isinstance(r, _LINEAR)]
    if composite.rest is not None or rules:
        return "a kernel split along its contraction, under rules that look at signs"
    return None


def of_signs(composite: Composite) -> str | None:
    """For a negation that passes a nonlinear function."""
    rules = [r for r in _rules(composite) if not isinstance(r, (*_LINEAR, Epsilon))]
    if composite.rest is not None or rules:
        return "a negation behind an activation stays there"
    return None


def of_max(composite: Composite) -> str | None:
    """For a maximum written as arithmetic."""
    if any(isinstance(r, Absolute) for r in _rules(composite)):
        return "max as arithmetic, under absolute splits"
    return None
