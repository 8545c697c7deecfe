"""Localisation: whether relevance lies where it is known to belong."""

# JAX types its functions in part.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

import jax
import jax.numpy as jnp

from jlrp import arguments
from jlrp.arguments import takes
from jlrp.errors import InputError
from jlrp.ir import jax_compat
from jlrp.typing import ArrayLike

Array = jax.Array


@takes(relevance=arguments.array, mask=arguments.array)
def relevance_mass(relevance: ArrayLike, mask: ArrayLike) -> Array:
    """The share of positive relevance that lies in the mask; (batch,), 0 to 1.

    Args:
      relevance: float (batch, ...): of pixels or tokens; channels are summed before,
        by ``pool`` or by hand.
      mask: bool (batch, ...), like relevance or broadcast to it.

    Returns:
      Shape (batch,); NaN where no relevance is positive.

    Raises:
      InputError: for a mask that is not bool, does not fit, or is empty.

    Example:
      >>> import jax.numpy as jnp
      >>> from jlrp import metrics
      >>> r = jnp.array([[3.0, 1.0, -2.0]])
      >>> metrics.relevance_mass(r, jnp.array([[True, False, False]])).tolist()
      [0.75]

    Source: Arras et al. 2022 (CLEVR-XAI), eq. 6.
    """
    relevance, mask = _flat(relevance, mask)
    positive = jnp.maximum(relevance, 0)
    return jnp.where(mask, positive, 0).sum(1) / positive.sum(1)


@takes(relevance=arguments.array, mask=arguments.array)
def relevance_rank(relevance: ArrayLike, mask: ArrayLike) -> Array:
    """The share of the K most relevant that lies in the mask of size K; (batch,).

    Args, Raises: as ``relevance_mass``.

    Source: Arras et al. 2022 (CLEVR-XAI), eq. 7.
    """
    relevance, mask = _flat(relevance, mask)
    inside = _by_relevance(relevance, mask)
    size = mask.sum(1)
    among = jnp.arange(mask.shape[1])[None] < size[:, None]
    return (inside & among).sum(1) / size


@takes(relevance=arguments.array, mask=arguments.array, k=arguments.whole(1))
def top_k_accuracy(relevance: ArrayLike, mask: ArrayLike, k: int = 1) -> Array:
    """The share of the k most relevant that lies in the mask; (batch,), 0 to 1.

    Args:
      relevance, mask: as in ``relevance_mass``.
      k: how many, at most as many as there are.

    Raises:
      InputError: as ``relevance_mass``, and for such a k.

    Example:
      >>> import jax.numpy as jnp
      >>> from jlrp import metrics
      >>> span = jnp.array([[False, True, True]])
      >>> metrics.top_k_accuracy(jnp.array([[2.0, 3.0, 1.0]]), span, k=2).tolist()
      [0.5]

    Source: AttnLRP (arXiv 2402.05602) and DynamicLRP, on answer spans of SQuAD.
    """
    relevance, mask = _flat(relevance, mask)
    if not 1 <= k <= mask.shape[1]:
        raise InputError(f"k must lie between 1 and {mask.shape[1]}; got {k}.")
    return _by_relevance(relevance, mask)[:, :k].mean(1)


@takes(relevance=arguments.array, mask=arguments.array)
def pointing_game(relevance: ArrayLike, mask: ArrayLike) -> Array:
    """1 where the most relevant place lies in the mask; (batch,).

    ``top_k_accuracy`` with k = 1. Source: Zhang et al. 2016, without tolerance.
    """
    return top_k_accuracy(relevance, mask, 1)


def _by_relevance(relevance: Array, mask: Array) -> Array:
    """The mask, in the order of falling relevance."""
    return jnp.take_along_axis(mask, jnp.argsort(-relevance, axis=1), axis=1)


def _flat(relevance: ArrayLike, mask: ArrayLike) -> tuple[Array, Array]:
    relevance, mask = jnp.asarray(relevance), jnp.asarray(mask)
    fits = mask.ndim == relevance.ndim >= 2 and all(
        m in (1, r) for m, r in zip(mask.shape, relevance.shape, strict=True)
    )
    if mask.dtype != bool or not fits:
        raise InputError(
            f"The mask is bool and like relevance, which has shape {relevance.shape} "
            f"(batch, ...); got {mask.dtype}{mask.shape}."
        )
    mask = jnp.broadcast_to(mask, relevance.shape).reshape(relevance.shape[0], -1)
    if not jax_compat.is_tracer(mask) and not bool(mask.any(1).all()):
        raise InputError("The mask of an example is empty: nothing can lie in it.")
    return relevance.reshape(mask.shape), mask
