"""The compiled programs: one for each length that batches are padded to."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from jlrp.errors import InputError, JlrpError
from jlrp.jobs.batches import Batch, Batcher
from jlrp.jobs.errors import JobError
from jlrp.jobs.placement import Placement
from jlrp.jobs.sources import reason
from jlrp.notices import once
from jlrp.typing import PyTree

Compiled = Callable[..., dict[str, jax.Array]]
_LOG = logging.getLogger("jlrp.jobs")


class Programs:
    """The step, compiled for the batches of a job.

    Args:
      step: ``step(params, x, target) -> named arrays``.

    Attributes:
      results: shape and dtype of each result of one example, of ragged ones the
        longest.
      ragged: the results that have the tokens for their second axis.

    Raises:
      JlrpError: if the function cannot take such a batch, or cannot be explained.
    """

    def __init__(
        self, step: Compiled, params: PyTree, batcher: Batcher, placed: Placement
    ):
        self.step, self.batcher, self.placed = step, batcher, placed
        self.params = placed.parameters(params)
        longest = batcher.buckets.lengths[-1] if batcher.buckets else None
        self._lowered = self._lower(longest)
        self._compiled = {longest: self._lowered.compile()}
        out = self._lowered.out_info
        self.results = {
            name: jax.ShapeDtypeStruct(a.shape[1:], a.dtype) for name, a in out.items()
        }
        self.ragged: frozenset[str] = frozenset()
        if longest is not None:
            shortest = max(1, longest - 1)
            other = self._lower(shortest).out_info
            self.ragged = frozenset(
                name for name in out if out[name].shape[1:2] != other[name].shape[1:2]
            )

    @property
    def classes(self) -> int | None:
        """How many classes a label chooses from, where that is known."""
        output = self.results.get("output")
        if output is None or not self.batcher.has_targets:
            return None
        return output.shape[0] if len(output.shape) == 1 else None

    def text(self) -> str:
        """The program before compilation: the same in every process."""
        return self._lowered.as_text()

    def __call__(self, batch: Batch) -> dict[str, jax.Array]:
        """Start a batch on the devices; the results are there later."""
        if batch.length not in self._compiled:
            self._compiled[batch.length] = self._lower(batch.length).compile()
        x, targets = self.placed.batch((batch.x, batch.targets))
        return self._compiled[batch.length](self.params, x, targets)

    def blank(self) -> Batch:
        """A batch without examples, for the sake of processes that share the mesh."""
        rows = [self.batcher.size]
        zeros = jax.tree.map(
            lambda s: np.zeros([*rows, *s.shape], s.dtype), self.batcher.spec
        )
        targets = np.zeros(rows, np.int32) if self.batcher.has_targets else None
        return Batch(zeros, targets, np.arange(0))

    def _lower(self, length: int | None) -> jax.stages.Lowered:
        def batched(spec: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
            return self.placed.shape(self.batcher.size, spec)

        x = jax.tree.map(batched, self.batcher.spec_of(length))
        label = jax.ShapeDtypeStruct((), np.int32)
        target = batched(label) if self.batcher.has_targets else None
        sharded = self.placed.batches
        options: Mapping[str, Any] = (
            {} if sharded is None else {"out_shardings": sharded}
        )

        def step(params: PyTree, x: PyTree, target: PyTree) -> dict[str, jax.Array]:
            return self.step(params, x, target)  # which may be no hashable object

        try:
            with once(_LOG.warning):  # a job has a log, and nobody who reads warnings
                return jax.jit(step, **options).lower(self.params, x, target)
        except JlrpError as error:
            if isinstance(error, InputError) and error.__cause__ is not None:
                raise JobError(
                    f"The function cannot take a batch of the source. {error}"
                ) from error
            raise
        except Exception as error:
            shapes = jax.tree.map(lambda s: f"{s.dtype}{list(s.shape)}", x)
            raise JobError(
                f"The function cannot take a batch of the source, x = {shapes}: "
                f"{reason(error)}"
            ) from error
