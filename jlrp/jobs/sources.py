"""Where examples come from: arrays, anything with a length and an index, iterators."""

from __future__ import annotations

import itertools
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import jax
import numpy as np

from jlrp.arguments import shown
from jlrp.ir import jax_compat
from jlrp.jobs.errors import JobError
from jlrp.typing import ArrayLike, PyTree

# Examples that are looked at before any work is done.
_LOOK_AT = 16
_LOW_PRECISION = (jax.numpy.bfloat16, jax.numpy.float16)


Split = Callable[[PyTree], tuple[PyTree, object]]  # (x, target) of an example


@dataclass
class Examples:
    """Consecutive examples of a source.

    Attributes:
      rows: one pytree for each example that could be read, by its place in here; an
        array where the source is one.
      count: how many there are, readable or not.
      failures: by place, why an example could not be read.
    """

    rows: PyTree
    count: int
    failures: dict[int, str] = field(default_factory=dict)


class Source(Protocol):
    """A run of examples. ``length`` is None where only reading to the end tells."""

    @property
    def length(self) -> int | None: ...

    def read(self, start: int, stop: int) -> Examples:
        """Examples ``start`` to ``stop``; fewer only at the end of the source."""
        ...

    def peek(self, count: int) -> Examples:
        """The first examples, before any is read."""
        ...


class ArraySource:
    """An array, a memory map, or a stored array of Zarr or TensorStore."""

    def __init__(self, array: Any):
        self.array = array
        self.length: int = int(array.shape[0])

    def read(self, start: int, stop: int) -> Examples:
        stop = min(stop, self.length)
        try:
            # A copy, so that a memory map is read here and not in the computation.
            return Examples(np.array(self.array[start:stop]), stop - start)
        except Exception:
            # One unreadable chunk of a stored array is no reason to lose the others.
            return _one_by_one(self.array.__getitem__, start, stop)

    def peek(self, count: int) -> Examples:
        return self.read(0, count)


class TreeSource:
    """A dict of arrays of one length: an example is a dict of their rows."""

    def __init__(self, arrays: Mapping[str, Any]):
        self.arrays = dict(arrays)
        lengths = {
            name: np.shape(array)[0] if np.ndim(array) else None
            for name, array in self.arrays.items()
        }
        if not lengths or None in lengths.values() or len(set(lengths.values())) > 1:
            raise JobError(
                f"A dict as a source has arrays of one length; got lengths {lengths}."
            )
        self.length = int(next(iter(lengths.values())) or 0)

    def read(self, start: int, stop: int) -> Examples:
        stop = min(stop, self.length)
        return _one_by_one(
            lambda i: {name: array[i] for name, array in self.arrays.items()},
            start,
            stop,
        )

    def peek(self, count: int) -> Examples:
        return self.read(0, count)


class IndexedSource:
    """Anything with ``len`` and an integer index: a list, a data set of Grain."""

    def __init__(self, items: Any):
        self.items = items
        self.length: int = len(items)

    def read(self, start: int, stop: int) -> Examples:
        stop = min(stop, self.length)
        return _one_by_one(self.items.__getitem__, start, stop)

    def peek(self, count: int) -> Examples:
        return self.read(0, count)


class StreamSource:
    """An iterator or iterable, read once and in order."""

    length = None

    def __init__(self, items: Any):
        self._iterator: Iterator[object] = iter(items)
        self._position, self._ended = 0, False

    def read(self, start: int, stop: int) -> Examples:
        if self._ended:
            return Examples({}, 0)
        if start != self._position:
            raise JobError(
                f"The stream stands at example {self._position}, not at {start}: "
                "something else reads from the same iterator."
            )
        try:
            rows = dict(enumerate(itertools.islice(self._iterator, stop - start)))
        except Exception as error:
            # A generator that raised is at its end: going on would lose the rest of
            # its examples without a word.
            raise JobError(
                f"The source raised after example {self._position}: {reason(error)}. "
                "An iterator cannot skip an example; catch the error inside it, or "
                "give a source with a length and an index."
            ) from error
        self._position += len(rows)
        self._ended = len(rows) < stop - start
        return Examples(rows, len(rows))

    def peek(self, count: int) -> Examples:
        seen = self.read(0, count)
        self._iterator = itertools.chain(seen.rows.values(), self._iterator)
        self._position, self._ended = 0, False
        return seen


def open_source(source: Any) -> Source:
    """The source that an object is.

    Raises:
      JobError: if it is none, or empty.
    """
    if isinstance(source, str | bytes):
        raise JobError(f"The source is a string, {source!r}; open the file first.")
    if isinstance(source, jax.ShapeDtypeStruct) or jax_compat.is_tracer(source):
        raise JobError(f"The source is {shown(source)}, which has no numbers.")
    if isinstance(source, Mapping):
        opened: Source = TreeSource(source)
    elif hasattr(source, "shape") and hasattr(source, "dtype"):
        if len(source.shape) == 0:
            raise JobError("The source is one number; its first axis is the examples.")
        opened = ArraySource(source)
    elif hasattr(source, "__len__") and hasattr(source, "__getitem__"):
        opened = IndexedSource(source)
    elif hasattr(source, "__iter__") or hasattr(source, "__next__"):
        return StreamSource(source)
    else:
        raise JobError(
            f"A {type(source).__name__} is no source: give an array, something with a "
            "length and an index, or an iterator, over the examples."
        )
    if opened.length == 0:
        raise JobError("The source has no examples.")
    return opened


def first_example(source: Source, split: Split | None = None) -> tuple[PyTree, PyTree]:
    """The first example of the usual kind, and its shapes and dtypes.

    Usual is what most of the first examples are: a broken one is no measure.

    Raises:
      JobError: if none can be read, or examples are no arrays of numbers.
    """
    examples = source.peek(_LOOK_AT)
    rows = [row for _, row in rows_of(examples)]
    if not rows:
        why = next(iter(examples.failures.values()), None)
        raise JobError(
            f"None of the first {_LOOK_AT} examples can be read: {why}"
            if why
            else "The source has no examples."
        )
    if split is not None:
        try:
            rows = [split(row)[0] for row in rows]
        except Exception as error:
            raise JobError(
                f"split must return (x, target) of an example: {reason(error)}."
            ) from error
    specs = [_spec(row) for row in rows]
    usual, _ = Counter(map(str, specs)).most_common(1)[0]
    index = [str(spec) for spec in specs].index(usual)
    return rows[index], specs[index]


def rows_of(examples: Examples) -> list[tuple[int, PyTree]]:
    """The readable examples with their places."""
    if isinstance(examples.rows, dict):
        return list(examples.rows.items())
    return list(enumerate(examples.rows))


def _spec(row: PyTree) -> PyTree:
    def of_leaf(leaf: ArrayLike) -> jax.ShapeDtypeStruct:
        array = np.asarray(leaf)
        if array.dtype.kind not in "biuf" and array.dtype not in _LOW_PRECISION:
            raise JobError(
                f"The examples of the source have dtype {array.dtype}; they must be "
                "real numbers."
            )
        dtype = jax.dtypes.canonicalize_dtype(array.dtype)
        return jax.ShapeDtypeStruct(array.shape, dtype)

    if not jax.tree.leaves(row):
        raise JobError(f"An example of the source is {shown(row)}: it has no arrays.")
    spec = jax.tree.map(of_leaf, row)
    if any(leaf.ndim == 0 for leaf in jax.tree.leaves(spec)):
        raise JobError(
            "An example of the source is, or has, a single number: give it an axis, as "
            "in x[:, None]. If it is the label of the example, take it apart: "
            'split=lambda example: (example["x"], example["label"]).'
        )
    return spec


def reason(error: BaseException) -> str:
    """An exception in one line."""
    text = " ".join(str(error).split())
    # TensorStore names the system's error in the midst of all that it was about.
    if (system := re.search(r"os_error_code='(\d+)'", text)) is not None:
        text = os.strerror(int(system[1]))
    text = text if len(text) <= 300 else text[:297] + "..."
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _one_by_one(get: Callable[[int], PyTree], start: int, stop: int) -> Examples:
    rows, failures = {}, {}
    for index in range(start, stop):
        try:
            rows[index - start] = jax.tree.map(np.asarray, get(index))
        except Exception as error:
            failures[index - start] = reason(error)
    return Examples(rows, stop - start, failures)
