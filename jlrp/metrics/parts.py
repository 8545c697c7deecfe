"""Parts of an example: what is removed together, and how much relevance each has."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jlrp import arguments
from jlrp.arguments import takes
from jlrp.errors import InputError
from jlrp.typing import PyTree

Array = jax.Array
POOLS = ("sum", "max", "mean")


class Parts:
    """Which part each element of an example belongs to.

    Patches, pixels, tokens and features are made by the functions of these names;
    superpixels are ``Parts(labels)``.

    Args:
      labels: integers from 0, and -1 for elements that are never removed (a class
        token, padding). An axis of size 1 is shared: all of x along it is one place,
        whose relevance is the sum. Either of rank x.ndim - 1, for all examples alike
        (``(height, width, 1)`` for images), or of rank x.ndim, for each its own.

    Attributes:
      labels: int32 array.
      count: how many parts there are.

    Raises:
      InputError: for labels that are no integers, or below -1, or all -1.

    Example:
      >>> import numpy as np
      >>> from jlrp import metrics
      >>> metrics.Parts(np.array([[0], [0], [1]])).count  # two words of three tokens
      2
    """

    def __init__(self, labels: PyTree):
        arguments.concrete("labels", labels)
        labels = np.asarray(labels)
        if not np.issubdtype(labels.dtype, np.integer) or labels.size == 0:
            raise InputError(
                f"labels of parts are integers; got {labels.dtype}{labels.shape}."
            )
        if labels.min() < -1 or labels.max() < 0:
            raise InputError(
                "The labels of parts count from 0; -1 marks what is never removed. Got "
                f"{labels.min()} to {labels.max()}."
            )
        self.labels = labels.astype(np.int32)
        self.count = int(labels.max()) + 1

    def __repr__(self) -> str:
        return f"Parts({self.count} parts, labels of shape {self.labels.shape})"

    def for_batch(self, shape: Sequence[int]) -> np.ndarray:
        """The labels with a leading axis, of size 1 if all examples share them.

        Args:
          shape: of the batch.

        Raises:
          InputError: the labels do not fit it.
        """
        given = self.labels.shape
        wanted = tuple(shape) if len(given) == len(shape) else tuple(shape[1:])
        if len(given) != len(wanted) or any(
            g not in (1, w) for g, w in zip(given, wanted, strict=True)
        ):
            raise InputError(
                f"The parts have labels of shape {given}, which do not fit x and "
                f"relevance of shape {tuple(shape)}: each axis of an example's "
                "labels has its size, or size 1."
            )
        return self.labels if given == wanted == tuple(shape) else self.labels[None]


PARTS = arguments.instance(
    Parts, of="parts: metrics.patches(...), pixels, tokens, features or Parts(labels)"
)


@takes(
    relevance=arguments.array,
    parts=PARTS,
    how=arguments.choice(*POOLS),
)
def pool(relevance: PyTree, parts: Parts, how: str = "sum") -> Array:
    """The relevance of each part.

    Args:
      relevance: of a batch, float of shape (batch, ...). Shared axes are summed first.
      parts: of its examples.
      how: ``"sum"``, ``"max"`` or ``"mean"`` over the places of a part.

    Returns:
      Shape (batch, parts); of a part that an example lacks: 0, or -inf for max.

    Raises:
      InputError: for another ``how``, or parts that do not fit.

    Example:
      >>> import jax.numpy as jnp
      >>> from jlrp import metrics
      >>> parts = metrics.patches((2, 4), size=2, channel_axis=None)
      >>> metrics.pool(jnp.arange(8.0).reshape(1, 2, 4), parts).tolist()
      [[10.0, 18.0]]
    """
    relevance = jnp.asarray(relevance)
    return pooled(relevance, parts.for_batch(relevance.shape), parts.count, how)


def pooled(relevance: Array, labels: PyTree, count: int, how: str) -> Array:
    """``pool`` with labels of a batch, which may be traced."""
    shared = tuple(axis for axis in range(1, relevance.ndim) if labels.shape[axis] == 1)
    placed = relevance.sum(shared, keepdims=True)
    flat = _flat(jnp.broadcast_to(labels, placed.shape), count)
    segment = jax.ops.segment_max if how == "max" else jax.ops.segment_sum
    values = placed.reshape(flat.shape)
    totals = jax.vmap(lambda v, part: segment(v, part, count + 1))(values, flat)
    totals = totals[:, :count]
    if how == "mean":
        totals = totals / jnp.maximum(sizes(labels, count), 1).astype(totals.dtype)
    return totals


def sizes(labels: PyTree, count: int) -> Array:
    """How many places each part has: int32 (batch, parts), with batch 1 if shared."""
    flat = _flat(labels, count)
    ones = jnp.ones_like(flat)
    add = jax.vmap(lambda one, part: jax.ops.segment_sum(one, part, count + 1))
    return add(ones, flat)[:, :count]


def _flat(labels: PyTree, count: int) -> Array:
    """Shape (batch, places), with -1 as one more part."""
    labels = jnp.asarray(labels)
    return jnp.where(labels < 0, count, labels).reshape(labels.shape[0], -1)


@takes(
    shape=arguments.shape,
    size=arguments.whole(1),
    channel_axis=arguments.optional(arguments.whole()),
)
def patches(
    shape: Sequence[int], size: int = 16, channel_axis: int | None = -1
) -> Parts:
    """Squares of an image, in rows from the upper left; a rest at the edges is smaller.

    Args:
      shape: of one example, two axes of pixels and at most one of channels.
      size: pixels along each side of a patch.
      channel_axis: which axis of the example holds channels; None: it has none.

    Raises:
      InputError: for a shape without two axes of pixels, or a size below 1.

    Example:
      >>> from jlrp import metrics
      >>> metrics.patches((3, 224, 224), size=16, channel_axis=0)
      Parts(196 parts, labels of shape (1, 224, 224))
    """
    pixels_shape = list(shape)
    if channel_axis is not None and -len(shape) <= channel_axis < len(shape):
        del pixels_shape[channel_axis]
    if len(pixels_shape) != 2 or size < 1:
        raise InputError(
            f"patches() cuts images into squares of at least 1 pixel; got an example "
            f"of shape {tuple(shape)}, channel_axis={channel_axis}, size={size}."
        )
    rows, columns = (np.arange(n) // size for n in pixels_shape)
    labels = rows[:, None] * (columns[-1] + 1) + columns
    return Parts(
        labels if channel_axis is None else np.expand_dims(labels, channel_axis)
    )


@takes(
    shape=arguments.shape,
    channel_axis=arguments.optional(arguments.whole()),
)
def pixels(shape: Sequence[int], channel_axis: int | None = -1) -> Parts:
    """Every pixel of an image, with all its channels. As ``patches`` of size 1.

    Example:
      >>> from jlrp import metrics
      >>> metrics.pixels((8, 8, 3)).count
      64
    """
    return patches(shape, 1, channel_axis)


@takes(
    shape=arguments.shape,
)
def tokens(shape: Sequence[int]) -> Parts:
    """Every token of a sequence: ids of shape (length,), or embeddings (length, width).

    A class token or padding is kept with ``Parts`` and -1.

    Example:
      >>> from jlrp import metrics
      >>> metrics.tokens((7, 32)).labels.shape
      (7, 1)
    """
    return Parts(np.arange(shape[0]).reshape(-1, *[1] * (len(shape) - 1)))


@takes(
    shape=arguments.shape,
)
def features(shape: Sequence[int]) -> Parts:
    """Every element of an example by itself.

    Example:
      >>> from jlrp import metrics
      >>> metrics.features((4,)).count
      4
    """
    return Parts(np.arange(int(np.prod(shape))).reshape(tuple(shape)))
