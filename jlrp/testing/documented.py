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
    NativeGradient,
    Rule,
    WSquare,
    ZBox,
    ZPlus,
)

# What depends on the signs of single products, or on how many there are.
_LOOK_AT_SIGNS = (AlphaBeta, Flat, Gamma, GammaMontavon, WSquare, ZBox, ZPlus, Absolute)


def _has(composite: Composite, *rules: type[Rule]) -> bool:
    return any(isinstance(pair.rule, rules) for pair in composite.pairs)


def _parts(selector: object) -> tuple[object, ...]:
    return selector if isinstance(selector, tuple) else (selector,)


def of_kernels(composite: Composite) -> str | None:
    """For a kernel that is split along its contraction."""
    if _has(composite, *_LOOK_AT_SIGNS):
        return "a kernel split along its contraction, under rules that look at signs"
    if _has(composite, Epsilon):
        return "a kernel split along its contraction has two stabilisers"
    return None


def of_layer_kinds(composite: Composite) -> str | None:
    """For a convolution of single pixels that is written as a dense layer."""

    def rules(kind: str) -> list[tuple[object, Rule]]:
        pairs = ((set(_parts(pair.selector)), pair.rule) for pair in composite.pairs)
        return [(parts - {kind}, rule) for parts, rule in pairs if kind in parts]

    if composite.rest is not None or rules("conv") != rules("dense"):
        return "the composite has other rules for convolutions than for dense layers"
    return None


def of_biases(composite: Composite) -> str | None:
    """For a bias that is added to the sum of two layers, or to one of them."""
    if _has(composite, *_LOOK_AT_SIGNS, Epsilon):
        return "a bias behind a sum of layers belongs to one of them, or to the sum"
    return None


def of_inputs(composite: Composite) -> str | None:
    """For a number that scales the input of a layer, in place of its output."""
    if _has(composite, *_LOOK_AT_SIGNS, Epsilon):
        return "what stabilises a layer is added to its output, in another unit then"
    if _has(composite, NativeGradient):
        return "a literal behind a layer is a gain of a bounded activation"
    return None


def of_signs(composite: Composite) -> str | None:
    """For a negation that passes a nonlinear function."""
    if _has(composite, *_LOOK_AT_SIGNS):
        return "a negation behind an activation stays there"
    return None


def of_negations(composite: Composite) -> str | None:
    """For a negation of a layer."""
    if _has(composite, *_LOOK_AT_SIGNS):
        return "a negation before a function that is larger below zero stays there"
    return None


def of_loops(composite: Composite) -> str | None:
    """For a loop that is unrolled."""
    parts = [part for pair in composite.pairs for part in _parts(pair.selector)]
    if any(isinstance(part, Depth) for part in parts):
        return "the operations of a loop's body have one depth in all iterations"
    if _has(composite, NativeGradient):
        return "a literal behind a loop is no gain of a bounded activation in its body"
    return None


def of_max(composite: Composite) -> str | None:
    """For a maximum written as arithmetic."""
    if _has(composite, Absolute):
        return "max as arithmetic, under absolute splits"
    return None


def of_factors(composite: Composite) -> str | None:
    """For a number that scales a factor of a product, in place of the product."""
    if _has(composite, Absolute):
        return "absolute splits of a product depend on the units of its factors"
    if _has(composite, NativeGradient):
        return "a literal is a gain of a bounded activation, and not of a product"
    return None


def of_order(composite: Composite) -> str | None:
    """For a product of several factors in another order."""
    if _has(composite, Absolute):
        return "absolute splits of a product of products depend on their order"
    return None


def of_divisions(composite: Composite) -> str | None:
    """For a division of a contraction, in place of one of its factors."""
    if _has(composite, Absolute):
        return "absolute splits of a quotient have other shares than a contraction has"
    return None
