"""What becomes of the bias: an option of the rules that divide by ``z = W x + b``."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax

from jlrp.promise import Promise, safe_divide, zeros_like
from jlrp.typing import Array

BIASES = ("absorb", "ignore", "split")


class Shared(NamedTuple):
    """What is shared among contributions.

    Attributes:
      z: their sum.
      promise: of the relevance.
      bias: that takes part like a contribution, if there is one.
      lost: relevance that the bias has had already; None for none.
    """

    z: Array
    promise: Promise
    bias: Array | None
    lost: Array | None = None


def by_option(
    option: str, z: Array, promise: Promise, bias: Array | None, stabilizer: float
) -> Shared:
    """What is shared of ``z = W x + bias``.

    ``"absorb"``: the bias takes its share of z; ``"ignore"``: it is taken as zero;
    ``"split"``: relevance is first shared between ``W x`` and the bias by absolute
    value (DynamicLRP).
    """
    if bias is None or option == "absorb":
        return Shared(z, promise, bias)
    z0, relevance = without(z, bias), promise.resolve(z)
    if option == "ignore":
        return Shared(z0, Promise(value=relevance), None)
    lost = relevance * _share_of_bias(z0, bias, stabilizer)
    return Shared(z0, Promise(value=relevance - lost), None, lost)


def without(z: Array, bias: Array) -> Array:
    """``z - bias``; 0 at a mask's -inf, where nothing comes from the inputs."""
    masked = lax.eq(lax.abs(bias), np.asarray(np.inf, jnp.finfo(bias.dtype).dtype))
    zeros = zeros_like(z)
    kept, shift = lax.select(masked, zeros, z), lax.select(masked, zeros, bias)
    return lax.sub(kept, shift)


def _share_of_bias(z0: Array, b: Array, stabilizer: float) -> Array:
    """The part of relevance that is not ``|z0| / (|z0| + |b| + stabilizer)``."""
    size = jnp.minimum(jnp.abs(z0), jnp.finfo(z0.dtype).max / 4)
    total = size + jnp.abs(b) + stabilizer
    return 1 - safe_divide(size, total)
