"""What relevance is relative to: ``baseline=``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jlrp import arguments
from jlrp.arguments import check_array, leaves_of, shown
from jlrp.errors import InputError
from jlrp.ir import jax_compat
from jlrp.tactics.looping import for_a_loop
from jlrp.typing import Array, ArrayLike, PyTree


@dataclass(frozen=True, eq=False)
class Background:
    """References to average over: relevance is the mean of those from each row.

    With ``deep_lift`` this is DeepSHAP. The forward pass at x is run once, rows are
    taken in chunks, and memory does not grow with their number.

    Args:
      data: pytree like x, of arrays with one more leading axis: its rows. A row is a
        baseline by itself, and broadcasts to x: of a batch of images, one image serves
        all of them.
      chunk: how many rows are run at once.

    Example:
      >>> import jax.numpy as jnp, jlrp
      >>> fn = lambda w, x: jnp.tanh(x @ w)
      >>> rows = jlrp.Background(jnp.array([[0.0, 0.0], [1.0, -1.0]]))
      >>> w, x = jnp.array([1.0, 2.0]), jnp.array([0.5, 0.2])
      >>> jlrp.relevance(fn, w, x, baseline=rows).shape
      (2,)

    Source: Lundberg and Lee 2017 (DeepSHAP).
    """

    data: PyTree
    chunk: int = 8

    def __post_init__(self) -> None:
        arguments.whole(1, 2**20)("chunk", self.chunk)
        leaves = leaves_of("data", self.data)
        for where, leaf in leaves:
            check_array(where, leaf)
        counts = {np.shape(leaf)[:1] for _, leaf in leaves}
        if len(counts) != 1 or not next(iter(counts)) or next(iter(counts)) == (0,):
            raise InputError(
                "data of a Background has rows along the first axis of each of its "
                f"arrays, equally many and at least one; got {shown(self.data)}."
            )


@dataclass(frozen=True)
class Given:
    """Stands for a baseline where it is known that there is one, but not which.

    ``chunk``: of a background; 0: it is a single reference.
    """

    chunk: int = 0


Baseline: TypeAlias = Background | Given | Callable[[PyTree], PyTree] | PyTree | None
_KINDS = (Background, Given)


def given(baseline: Baseline) -> Given | None:
    """What of a baseline is part of a compiled program."""
    return None if baseline is None else Given(getattr(baseline, "chunk", 0))


def check(name: str, baseline: Baseline) -> Baseline:
    """Refuse what can be no baseline, whatever x is."""
    if baseline is None or callable(baseline) or isinstance(baseline, _KINDS):
        return baseline
    if isinstance(baseline, str):
        raise InputError(
            f"{name} is {baseline!r}; give a number, an array that broadcasts to x, "
            "a function of x, or jlrp.Background(data)."
        )
    for where, leaf in leaves_of(name, baseline):
        check_array(where, leaf, abstract=True)
    return baseline


def resolved(baseline: Baseline, x: PyTree) -> list[Array] | None:
    """The reference's leaves as arrays that broadcast to x; of a background, rows.

    Raises:
      InputError: it does not fit x.
    """
    if baseline is None:
        return None
    rows = isinstance(baseline, Background)
    if rows:
        baseline = baseline.data
    elif callable(baseline):
        baseline = baseline(x)
    leaves, tree = jax.tree.flatten(x)
    given, structure = jax.tree.flatten(baseline)
    if structure != tree:
        if len(given) != 1 or np.ndim(given[0]) > int(rows):
            raise InputError(
                f"baseline is {shown(baseline)}, and x {shown(x)}: give one number for "
                "all of x, or a pytree like x, of arrays that broadcast to its own."
            )
        floats = any(jnp.issubdtype(jnp.result_type(v), jnp.inexact) for v in leaves)
        alike = _alike if floats else lambda leaf, number, rows: number
        given = [alike(leaf, given[0], rows) for leaf in leaves]
    pairs = zip(leaves_of("x", x), given, strict=True)
    return [_fitting(where, leaf, number, rows) for (where, leaf), number in pairs]


def _alike(leaf: ArrayLike, number: ArrayLike, rows: bool) -> ArrayLike:
    """One number for all of x: of integers and booleans beside floats, their own."""
    dtype, given = jnp.result_type(leaf), jnp.result_type(number)
    if jnp.issubdtype(dtype, jnp.inexact) or not jnp.issubdtype(given, jnp.inexact):
        return number
    if not rows:
        return leaf
    (n_rows, *_) = np.shape(number)
    return jnp.broadcast_to(leaf, (n_rows, *np.shape(leaf)))


def _fitting(where: str, leaf: Array, number: ArrayLike, rows: bool) -> Array:
    dtype, shape = jnp.result_type(leaf), np.shape(leaf)
    given = jnp.result_type(number)
    name = f"baseline{where.removeprefix('x')}"
    if jax_compat.is_key(dtype):
        return leaf
    if not jnp.issubdtype(dtype, jnp.inexact) and jnp.issubdtype(given, jnp.inexact):
        raise InputError(
            f"{name} holds {given}, and {where} {dtype}: of integers, such as token "
            "ids, the baseline is integers too, such as the id of a pad or mask token."
        )
    row = np.shape(number)[1:] if rows else np.shape(number)
    try:
        fits = np.broadcast_shapes(row, shape) == shape
    except ValueError:
        fits = False
    if not fits:
        what = "rows of shape" if rows else "shape"
        raise InputError(
            f"{name} has {what} {row}, which does not broadcast to {where}, {shape}."
        )
    return jnp.asarray(number, dtype)


def mean_over(
    of_one: Callable[[Sequence[Array]], PyTree], rows: Sequence[Array], chunk: int
) -> PyTree:
    """The mean of ``of_one(row)`` over rows, by chunks: memory does not grow."""
    count = rows[0].shape[0]
    size = min(chunk, count)

    def summed(rows: Sequence[Array]) -> PyTree:
        found = jax.vmap(of_one)(rows)
        return jax.tree.map(lambda a: jnp.sum(a, 0, dtype=_summing(a)), found)

    whole = count - count % size
    chunks = [r[:whole].reshape(-1, size, *r.shape[1:]) for r in rows]
    first = [c[0] for c in chunks]
    shapes = jax.eval_shape(summed, first)
    total = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    looped = for_a_loop(lambda _, rows: summed(rows), (), first)

    def step(total: PyTree, rows: Sequence[Array]) -> tuple[PyTree, None]:
        return jax.tree.map(jnp.add, total, looped((), rows)), None

    total, _ = lax.scan(step, total, chunks)
    if count > whole:
        total = jax.tree.map(jnp.add, total, summed([r[whole:] for r in rows]))
    return jax.tree.map(lambda a: a / count, total)


def _summing(array: Array) -> np.dtype:
    floating = jnp.issubdtype(array.dtype, jnp.inexact)
    return array.dtype if floating else jnp.result_type(float)
