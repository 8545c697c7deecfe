"""From examples to batches of fixed shapes: padding, buckets of length, failures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from jlrp.arguments import shown
from jlrp.jobs.errors import JobError
from jlrp.jobs.sources import Examples, Source, Split, rows_of
from jlrp.typing import DTypeLike, PyTree

Targets = Mapping[int, object] | np.ndarray  # by the place of an example


@dataclass(frozen=True)
class Buckets:
    """Ragged examples are padded to the first of these lengths that they fit in.

    Attributes:
      lengths: ascending; one program is compiled for each that occurs.
      pad: the number to pad with. The function must ignore positions that have it.
      window: how many batches are read and sorted by length at a time, so that a batch
        has examples of about one length.
    """

    lengths: tuple[int, ...]
    pad: int = 0
    window: int = 16

    def __post_init__(self) -> None:
        try:
            lengths = tuple(self.lengths)
        except TypeError:
            lengths = ()
        if not isinstance(self.lengths, tuple | list | range):
            raise JobError(
                f"lengths is {shown(self.lengths)}; give a tuple, such as (32, 128)."
            )
        object.__setattr__(self, "lengths", lengths)
        whole = [type(n) is int or isinstance(n, np.integer) for n in lengths]
        for name in ("pad", "window"):
            if type(getattr(self, name)) is not int:
                raise JobError(f"{name} of the buckets must be a whole number.")
        ascending = all(whole) and list(lengths) == sorted(set(lengths))
        if not lengths or not ascending or lengths[0] < 1:
            raise JobError(
                "The lengths of buckets must be ascending whole numbers from 1; got "
                f"{shown(self.lengths)}."
            )
        if self.window < 1:
            raise JobError(
                f"The window of the buckets must be >= 1, got {self.window}."
            )

    def length_for(self, length: int) -> int:
        return next(n for n in self.lengths if n >= length)


@dataclass(frozen=True)
class Batch:
    """One call of the compiled function.

    Attributes:
      x: pytree of arrays with ``size`` rows, the last ones repeated if fewer are real.
      targets: one for each row, or None.
      places: of the real rows in the block that the batch belongs to.
      length: the bucket, or None where examples have one shape.
    """

    x: PyTree
    targets: np.ndarray | None
    places: np.ndarray
    length: int | None = None


@dataclass(frozen=True)
class Block:
    """Rows ``start`` to ``start + count``: what is read, and written, at once.

    Attributes:
      lengths: of each example, where these are ragged.
      failures: by place, why an example cannot be explained.
    """

    number: int
    start: int
    count: int
    batches: Sequence[Batch]
    lengths: np.ndarray | None
    failures: dict[int, str]

    @property
    def is_one_batch(self) -> bool:
        """Whether the rows of its one batch are the rows of the block, in order."""
        return (
            self.lengths is None
            and len(self.batches) == 1
            and len(self.batches[0].places) == self.count
        )


@dataclass(frozen=True)
class Batcher:
    """Makes the blocks of a source.

    Attributes:
      spec: pytree of the shape and dtype of one example; of ragged ones any.
      size: rows of a batch.
    """

    source: Source
    spec: PyTree
    size: int
    buckets: Buckets | None = None
    labels: np.ndarray | None = None
    split: Split | None = None

    @property
    def rows(self) -> int:
        """Rows of a block."""
        return self.size * (self.buckets.window if self.buckets else 1)

    @property
    def has_targets(self) -> bool:
        return self.labels is not None or self.split is not None

    def spec_of(self, length: int | None) -> PyTree:
        """The shape and dtype of an example that is padded to a length."""
        if length is None:
            return self.spec
        return jax.tree.map(
            lambda s: jax.ShapeDtypeStruct((length, *s.shape[1:]), s.dtype), self.spec
        )

    def count(self, blocks: range) -> int:
        """How many examples consecutive blocks have."""
        assert self.source.length is not None
        stop = min(blocks.stop * self.rows, self.source.length)
        return stop - blocks.start * self.rows

    def block(self, number: int) -> Block | None:
        """Read and batch a block; None beyond the end of the source."""
        start = number * self.rows
        examples = self.source.read(start, start + self.rows)
        if examples.count == 0:
            return None
        targets: Targets | None = None
        if self.split is not None:
            examples, targets = _targets_apart(examples, self.split)
        elif self.labels is not None:
            targets = self.labels[start : start + examples.count]
        if isinstance(examples.rows, np.ndarray):
            batches = [self._batch(examples.rows, targets, np.arange(examples.count))]
            return Block(number, start, examples.count, batches, None, {})
        return self._checked(number, start, examples, targets)

    def _checked(
        self, number: int, start: int, examples: Examples, targets: Targets | None
    ) -> Block:
        good: dict[int, PyTree] = {}
        failures = dict(examples.failures)
        lengths = np.zeros(examples.count, np.int32)
        for place, row in rows_of(examples):
            problem = misfit(row, self.spec, self.buckets)
            if problem is None:
                good[place] = row
                lengths[place] = _length(row) if self.buckets else 0
            else:
                failures[place] = problem
        places = np.array(sorted(good), np.int64)
        if self.buckets is None:
            groups = [places] if len(places) else []
        else:
            ordered = places[np.argsort(lengths[places], kind="stable")]
            groups = [
                ordered[i : i + self.size] for i in range(0, len(ordered), self.size)
            ]
        batches = []
        for group in groups:
            length = None
            rows = [good[place] for place in group]
            if self.buckets is not None:
                length = self.buckets.length_for(int(lengths[group].max()))
                rows = [_padded(row, length, self.buckets.pad) for row in rows]
            x = jax.tree.map(lambda *leaves: np.stack(leaves), *rows)
            chosen = None if targets is None else [targets[place] for place in group]
            batches.append(self._batch(x, chosen, group, length))
        kept = lengths if self.buckets is not None else None
        return Block(number, start, examples.count, batches, kept, failures)

    def _batch(
        self,
        x: PyTree,
        targets: Targets | Sequence[object] | None,
        places: np.ndarray,
        length: int | None = None,
    ) -> Batch:
        def filled(leaf: Any, dtype: DTypeLike) -> np.ndarray:
            array = np.asarray(leaf).astype(dtype, copy=False)
            missing = self.size - len(array)
            if missing == 0:
                return array
            return np.concatenate([array, np.repeat(array[-1:], missing, axis=0)])

        x = jax.tree.map(lambda leaf, spec: filled(leaf, spec.dtype), x, self.spec)
        if targets is not None:
            targets = filled(targets, np.int32)
        return Batch(x, targets, places, length)


def misfit(row: PyTree, spec: PyTree, buckets: Buckets | None) -> str | None:
    """Why an example is not like the others, or None."""
    if jax.tree.structure(row) != jax.tree.structure(spec):
        return f"its structure is {jax.tree.structure(row)}"
    for leaf, wanted in zip(jax.tree.leaves(row), jax.tree.leaves(spec), strict=True):
        array = np.asarray(leaf)
        ragged = 0 if buckets is None else 1
        if len(array.shape) != len(wanted.shape) or (
            array.shape[ragged:] != wanted.shape[ragged:]
        ):
            return f"its shape is {array.shape}, not {wanted.shape}"
        if jax.dtypes.canonicalize_dtype(array.dtype) != wanted.dtype:
            return f"its dtype is {array.dtype}, not {wanted.dtype}"
    if buckets is None:
        return None
    lengths = {np.shape(leaf)[0] for leaf in jax.tree.leaves(row)}
    if len(lengths) > 1:
        return f"its arrays have different lengths, {sorted(lengths)}"
    longest = buckets.lengths[-1]
    if not 0 < max(lengths) <= longest:
        return f"its length is {max(lengths)}; the buckets are for 1 to {longest}"
    return None


def _length(row: PyTree) -> int:
    return np.shape(jax.tree.leaves(row)[0])[0]


def _padded(row: PyTree, length: int, pad: int) -> PyTree:
    def one(leaf: np.ndarray) -> np.ndarray:
        after = [(0, length - len(leaf))] + [(0, 0)] * (np.ndim(leaf) - 1)
        return np.pad(leaf, after, constant_values=pad)

    return jax.tree.map(one, row)


def _targets_apart(
    examples: Examples, split: Split
) -> tuple[Examples, dict[int, object]]:
    """The x and the target of each example."""
    xs, targets, failures = {}, {}, dict(examples.failures)
    for place, row in rows_of(examples):
        try:
            xs[place], targets[place] = split(row)
        except Exception as error:
            failures[place] = f"split raised {type(error).__name__}: {error}"
    return Examples(xs, examples.count, failures), targets
