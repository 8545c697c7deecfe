"""Padding is no input: what a convolution pads by itself, or a framework before it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.extend.core import primitives as p

from jlrp.analysis.intervals import scalar_of
from jlrp.ir.program import Value
from jlrp.rules.base import Array
from jlrp.typing import DTypeLike


class Padding(NamedTuple):
    """A value inside of its padding by literal zeros: its shape, and that padding."""

    inside: tuple[int, ...]
    configurations: tuple[Sequence[tuple[int, int, int]], ...]  # from the innermost


def padding_of(value: Value) -> Padding:
    made = value.producer
    if made is not None and made.primitive is p.pad_p:
        padded, filling = made.inputs
        known = scalar_of(filling)
        if known is not None and known == 0 and isinstance(padded, Value):
            inside, configurations = padding_of(padded)
            return Padding(inside, (*configurations, made.params["padding_config"]))
    return Padding(value.shape, ())


def ones(padding: Padding, dtype: DTypeLike) -> Array:
    """1 for each input, 0 where a value is padding."""
    found = jnp.ones(padding.inside, dtype)
    for configuration in padding.configurations:
        found = lax.pad(found, jnp.zeros((), dtype), configuration)
    return found
