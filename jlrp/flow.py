"""Relevance that goes from one named value to another, and through none between."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jlrp import arguments
from jlrp.api import explain
from jlrp.arguments import takes
from jlrp.composites import Composite
from jlrp.errors import InputError
from jlrp.ir.names import Place, check_steps, conditioned, matching, places
from jlrp.ir.program import trace
from jlrp.plan import targets
from jlrp.references import Baseline
from jlrp.typing import Function, PyTree, Target

__all__ = [
    "between",
]

OUTPUT, INPUT = "output", "input"


@takes(
    fn=arguments.function,
    params=arguments.tree,
    x=arguments.tree,
    names=arguments.words,
    target=targets.check_kind,
)
def between(
    fn: Function,
    params: PyTree,
    x: PyTree,
    names: str | Iterable[str],
    target: Target = None,
    *,
    composite: str | Composite = "auto",
    capture_steps: int | None = None,
    baseline: Baseline = None,
) -> dict[tuple[str, str], float]:
    """The relevance that each named value hands to each one before it, directly.

    Directly means through no other of the ``names``. What the names do not hold, such
    as the stream around the blocks of a residual network, is looked through: it shows
    as flow that skips them. From every name to all before it, and what a bias or a
    remainder took on the way is missing from the sum.

    Args:
      fn, params, x, target, composite: as in ``jlrp.relevance``.
      baseline: as in ``jlrp.relevance``.
      capture_steps: as in ``jlrp.explain``, for names in a ``while_loop``.
      names: globs of name scopes and tags, each of one value, as in ``condition``. As
        there, one inside an operation splits it. In the body of a loop, each iteration
        is a value of its own: ``"layer[0]"``, in nested loops ``"layer[0, 2]"``.

    Returns:
      By pair (from, to), the nearest to the output first: relevance, summed over the
      batch and all else. ``"output"`` and ``"input"`` stand for the two ends.

    Raises:
      JlrpError: as ``jlrp.relevance``, and for a name of no value or of several.

    Example:
      >>> import jax.numpy as jnp, jlrp
      >>> from jlrp import flow
      >>> def fn(w, x):
      ...     return (x + jlrp.tag(x * w, "block")).sum()
      >>> edges = flow.between(fn, jnp.array([2.0]), jnp.array([3.0]), "block")
      >>> {pair: round(amount, 3) for pair, amount in edges.items()}
      {('output', 'block'): 6.0, ('output', 'input'): 3.0, ('block', 'input'): 6.0}

    Source: the masks of concept relevance propagation (Achtibat et al. 2023). As
    relevance is linear in what arrives at a value, a direct flow is the difference of
    two explanations: with all values between masked, and with their giver masked too.
    """
    found = _places(fn, params, x, names, capture_steps)
    nodes = _in_order(found, capture_steps)
    count = len(nodes)
    explainer = explain(
        fn,
        composite=composite,
        capture=tuple(found),
        condition=dict.fromkeys(found, jnp.ones(())),
        capture_steps=capture_steps,
        baseline=baseline,
    )

    def arriving(mask: jax.Array) -> jax.Array:
        explained = explainer(params, x, target, _masks(nodes, found, mask))
        amounts = [_summed(explained.relevance)]
        for node in nodes:
            amounts.append(_summed(explained.captured[node.name][node.index]))
        return jnp.stack(amounts)

    # arrived[i, j]: at value i (0: the input), with all values masked that lie behind
    # it and before value j.
    cases = [(i, j) for i in range(count + 1) for j in range(i + 1, count + 2)]
    at = np.arange(1, count + 1)
    passes = np.stack([(at <= i) | (at >= j) for i, j in cases])
    rows = jax.jit(lambda rows: jax.lax.map(arriving, rows, batch_size=8))(
        jnp.asarray(passes, jnp.result_type(float))
    )
    if capture_steps is not None and not np.all(np.isfinite(rows)):
        explainer(params, x, target)  # refuses a loop that runs more often
    arrived = {case: float(row[case[0]]) for case, row in zip(cases, rows, strict=True)}
    every = [INPUT, *(node.label for node in nodes), OUTPUT]
    edges = {}
    for j in range(count + 1, 0, -1):
        for i in range(j - 1, -1, -1):
            through_others = arrived[i, j + 1] if j <= count else 0.0
            edges[every[j], every[i]] = arrived[i, j] - through_others
    return edges


@dataclass(frozen=True)
class _Node:
    """A named value; in loops, that of one iteration, as an index of its first axes."""

    name: str
    index: tuple[int, ...]

    @property
    def label(self) -> str:
        return f"{self.name}{list(self.index)}" if self.index else self.name


def _places(
    fn: Function,
    params: PyTree,
    x: PyTree,
    names: str | Iterable[str],
    steps: int | None,
) -> dict[str, Place]:
    """The names that the globs match, and the one value of each."""
    patterns = (names,) if isinstance(names, str) else tuple(names)
    if not patterns:
        raise InputError("names is empty; give globs of name scopes and tags.")
    program, _ = trace(partial(arguments.called, fn), params, x)
    matched = matching(places(program), patterns)
    check_steps(matched, steps)
    found = conditioned(matched, matched)
    return {name: place for name, (_, place) in found.items()}


def _axes(place: Place, steps: int | None) -> tuple[int, ...]:
    """The iterations of the loops around a value."""
    shape = place.stacked(steps) or ()
    return shape[: len(shape) - len(place.value.shape)]


def _in_order(found: dict[str, Place], steps: int | None) -> list[_Node]:
    """The named values, in the order in which they are made."""
    made = {
        _Node(name, index): place.made_at(index)
        for name, place in found.items()
        for index in np.ndindex(_axes(place, steps))
    }
    return sorted(made, key=lambda node: made[node])


def _masks(
    nodes: list[_Node], found: dict[str, Place], passes: jax.Array
) -> dict[str, jax.Array]:
    """A mask for each name: what passes at each of its nodes."""
    masks = {}
    for name, place in found.items():
        mine = {node.index: i for i, node in enumerate(nodes) if node.name == name}
        axes = tuple(n + 1 for n in max(mine))
        order = [mine[index] for index in np.ndindex(axes)]
        ones = (1,) * len(place.value.shape) if axes else ()
        masks[name] = passes[np.asarray(order)].reshape(axes + ones)
    return masks


def _summed(tree: PyTree) -> jax.Array:
    leaves = [leaf for leaf in jax.tree.leaves(tree) if jnp.size(leaf)]
    return sum((jnp.sum(leaf) for leaf in leaves), jnp.zeros(()))
