"""The number per example that a metric watches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from jlrp.arguments import called, chosen, output_of
from jlrp.errors import InputError, TargetError
from jlrp.plan import targets
from jlrp.request import batch_of
from jlrp.typing import PyTree, Target

Array = jax.Array
SCORES = ("probability", "output", "hit")


class Callee:
    """A function as a static argument of ``jit``: hashable even if it is not.

    A bound method of an unhashable object (a Linen module with a list for a field)
    counts as the same while it is the same method of the same object.
    """

    def __init__(self, fn: Callable[..., PyTree]):
        self.fn = fn
        try:
            hash(fn)
            self._identity: object = fn
        except TypeError:
            owner = getattr(fn, "__self__", fn)
            self._identity = (id(owner), getattr(fn, "__func__", None))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Callee) and self._identity == other._identity

    def __hash__(self) -> int:
        return hash(self._identity)


@dataclass(frozen=True)
class Score:
    """What of ``fn(params, x)`` is watched, with the classes that an original x chose.

    Attributes:
      kind: one of ``SCORES``.
      target: static target of ``jlrp.relevance``, or None beside a traced one.
    """

    callee: Callee
    kind: str = "output"
    target: Target = None

    def check(self, params: PyTree, x: PyTree, target: Target = None) -> None:
        """Refuse what does not fit, before any work.

        Raises:
          InputError, TargetError: as said.
        """
        if self.kind not in SCORES:
            raise InputError(f"score must be one of {SCORES}; got {self.kind!r}.")
        target = self.target if target is None else target
        output = output_of(self.callee.fn, params, x)
        watched = partial(chosen, target) if callable(target) else self._watched
        scores = jax.eval_shape(watched, output)
        shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(x)]
        if not shapes or not all(shapes):
            raise InputError(
                f"x has the shapes {shapes}; a metric needs a batch: arrays of shape "
                "(batch, ...)."
            )
        batch = shapes[0][0]
        for leaf in jax.tree.leaves(scores):
            if not leaf.shape or leaf.shape[:1] != (batch,):
                raise InputError(
                    f"The watched scores have shape {leaf.shape} for a batch of "
                    f"{batch}; a metric needs one row per example."
                )
        targets.check(scores, targets.fitting(scores, target), batch_of(x))

    def multipliers(self, params: PyTree, x: PyTree, target: Target = None) -> PyTree:
        """The share of each watched output, chosen at ``x``: a pytree like them."""
        target = self.target if target is None else target
        scores = self._scores(params, x)
        target = targets.fitting(scores, target)
        seeds = targets.seeds(jax.tree.leaves(scores), target, batch_of(x), "score")
        shares = [lax.stop_gradient(seed.multiplier) for seed in seeds]
        return jax.tree.unflatten(jax.tree.structure(scores), shares)

    def __call__(self, params: PyTree, x: PyTree, multipliers: PyTree) -> Array:
        """Shape (batch,)."""
        batch = jax.tree.leaves(x)[0].shape[0]

        def summed(score: Array, share: Array) -> Array:
            return (score * share).reshape(batch, -1).sum(1)

        parts = jax.tree.map(summed, self._scores(params, x), multipliers)
        return sum(jax.tree.leaves(parts), start=jnp.zeros(()))

    def _scores(self, params: PyTree, x: PyTree) -> PyTree:
        output = called(self.callee.fn, params, x)
        if callable(self.target):
            return chosen(self.target, output)
        return self._watched(output)

    def _watched(self, output: PyTree) -> PyTree:
        if self.kind == "output":
            return output
        if len(jax.tree.leaves(output)) != 1 or jnp.ndim(output) != 2:
            shapes = jax.tree.map(jnp.shape, output)
            raise TargetError(
                f"score={self.kind!r} needs scores of shape (batch, classes); the "
                f'output has {shapes}. Say score="output", or give a target function '
                "that returns one number per example."
            )
        if self.kind == "probability":
            return jax.nn.softmax(output)
        return jax.nn.one_hot(output.argmax(-1), output.shape[-1], dtype=output.dtype)


def split_target(target: Target) -> tuple[Target, Target]:
    """(static, traced): one of them is None."""
    static, traced = targets.apart(targets.given(target))
    return static, jax.tree.map(jnp.asarray, traced)
