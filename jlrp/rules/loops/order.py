"""In which order a scan's iterations go, and how many of them are run at once."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax

from jlrp.ir.program import Equation
from jlrp.rules.base import Array
from jlrp.typing import PyTree

ScanBody = Callable[[PyTree, PyTree], tuple[PyTree, PyTree]]  # as lax.scan takes it
Recompute = tuple[ScanBody, PyTree]  # what makes residuals again, and scanned arrays


class Order:
    """The order of a scan's iterations along the arrays that it reads and writes."""

    def __init__(self, equation: Equation, n_first: int):
        self.length = equation.params["length"]
        self.reverse = equation.params["reverse"]
        self.unroll = equation.params["unroll"]
        self.n_first = min(n_first, self.length)

    def spans(self, chunked: bool) -> list[Whole | Chunks]:
        """What is scanned at once of all iterations but the first."""
        length = self.length - self.n_first
        if not chunked or length < _FEWEST_CHUNKED:
            return [Whole(length, self.reverse, self.unroll)]
        size = math.isqrt(length)
        count, rest = divmod(length, size)
        spans: list[Whole | Chunks] = [Chunks(0, count, size, length, self.reverse)]
        if rest:
            spans.append(Chunks(length - rest, 1, rest, length, self.reverse))
        return spans

    def concatenated(self, of_spans: list[PyTree]) -> PyTree:
        """The arrays of all spans."""
        if len(of_spans) == 1:
            return of_spans[0]
        of_spans = of_spans[::-1] if self.reverse else of_spans
        return jax.tree.map(lambda *parts: jnp.concatenate(parts), *of_spans)

    def taken(self, arrays: PyTree) -> tuple[list[PyTree], PyTree]:
        """The slices of the first iterations, and the arrays of the others."""
        count = self.n_first
        if not count:
            return [], arrays
        rest = slice(0, self.length - count) if self.reverse else slice(count, None)
        indices = [self.length - 1 - i if self.reverse else i for i in range(count)]
        slices = [jax.tree.map(lambda a: a[i], arrays) for i in indices]  # noqa: B023
        return slices, jax.tree.map(lambda a: a[rest], arrays)

    def of_next(self, array: Array, behind: Array) -> Array:
        """What each iteration has of the next; ``behind`` is what the last has."""
        if not self.length:
            return array
        if self.reverse:
            return jnp.concatenate([behind[None], array[:-1]])
        return jnp.concatenate([array[1:], behind[None]])

    def joined(self, first: list[PyTree], rest: PyTree) -> PyTree:
        """The arrays of all iterations."""
        if not first:
            return rest
        first = first[::-1] if self.reverse else first

        def join(*parts: Array) -> Array:
            *one_by_one, others = parts
            stacked = jnp.stack(one_by_one).astype(others.dtype)
            both = [others, stacked] if self.reverse else [stacked, others]
            return jnp.concatenate(both)

        return jax.tree.map(join, *first, rest)


_FEWEST_CHUNKED = 4


@dataclass(frozen=True)
class Whole:
    """Iterations of which all that rules read is stacked."""

    length: int
    reversed: bool
    unroll: int | bool

    def forward(self, run: ScanBody, carry: PyTree, xs: PyTree) -> PyTree:
        return lax.scan(run, carry, xs, self.length, self.reversed, self.unroll)

    def reverse(
        self,
        step: ScanBody,
        state: PyTree,
        arrays: PyTree,
        residuals: PyTree,
        again: Recompute | None,
    ) -> PyTree:
        xs = (arrays[0], residuals, arrays[1])
        return lax.scan(step, state, xs, self.length, not self.reversed, self.unroll)


@dataclass(frozen=True)
class Chunks:
    """Iterations in chunks, of which the carries before each are kept.

    ``start`` is the first of them in time, ``length`` how many there are with those of
    other spans: they index the whole arrays, since a slice of all weights of a chunk
    would be a copy.
    """

    start: int
    count: int
    size: int
    length: int
    reversed: bool

    def _times(self) -> Array:
        return self.start + jnp.arange(self.count * self.size).reshape(-1, self.size)

    def _at(self, arrays: PyTree, time: Array) -> PyTree:
        index = self.length - 1 - time if self.reversed else time
        return jax.tree.map(
            lambda a: lax.dynamic_index_in_dim(a, index, 0, False), arrays
        )

    def _flat(self, stacked: PyTree) -> PyTree:
        def flat(a: Array) -> Array:
            a = a.reshape(-1, *a.shape[2:])
            return jnp.flip(a, 0) if self.reversed else a

        return jax.tree.map(flat, stacked)

    def forward(self, run: ScanBody, carry: PyTree, xs: PyTree) -> PyTree:
        def one(carry: PyTree, time: Array) -> PyTree:
            carry, (ys, _) = run(carry, self._at(xs, time))
            return carry, ys

        def chunk(start: PyTree, times: Array) -> PyTree:
            carry, ys = lax.scan(one, start, times)
            return carry, (ys, start)

        carry, (ys, starts) = lax.scan(chunk, carry, self._times())
        return carry, (self._flat(ys), starts)

    def reverse(
        self,
        step: ScanBody,
        state: PyTree,
        arrays: PyTree,
        starts: PyTree,
        again: Recompute | None,
    ) -> PyTree:
        assert again is not None
        run, xs = again

        def one(carry: PyTree, time: Array) -> PyTree:
            return run(carry, self._at(xs, time))

        def back(state: PyTree, at_time: PyTree) -> PyTree:
            time, residuals = at_time
            ys, slices = self._at(arrays, time)
            return step(state, (ys, residuals, slices))

        def chunk(state: PyTree, of_chunk: PyTree) -> PyTree:
            start, times = of_chunk
            _, residuals = lax.scan(one, start, times)
            return lax.scan(back, state, (times, residuals), reverse=True)

        state, out = lax.scan(chunk, state, (starts, self._times()), reverse=True)
        return state, self._flat(out)
