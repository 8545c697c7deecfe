"""Relevance that goes from one named value to another, and through none between."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlrp import arguments, targets
from jlrp.api import explain
from jlrp.arguments import takes
from jlrp.captures import conditioned, matching, named_values
from jlrp.composites import Composite
from jlrp.errors import InputError
from jlrp.graph import trace

OUTPUT, INPUT = "output", "input"


@takes(
    fn=arguments.function,
    params=arguments.tree,
    x=arguments.tree,
    names=arguments.words,
    target=targets.check_kind,
)
def between(
    fn: Callable[[Any, Any], Any],
    params: Any,
    x: Any,
    names: str | Iterable[str],
    target: Any = None,
    *,
    composite: str | Composite = "auto",
) -> dict[tuple[str, str], float]:
    """The relevance that each named value hands to each one before it, directly.

    Directly means through no other of the ``names``. What the names do not hold, such
    as the stream around the blocks of a residual network, is looked through: it shows
    as flow that skips them. From every name to all before it, and what a bias or a
    remainder took on the way is missing from the sum.

    Args:
      fn, params, x, target, composite: as in ``jlrp.relevance``.
      names: globs of name scopes and tags, each of one value, as in ``condition``. As
        there, one inside an operation splits it.

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
    ordered = _in_order(fn, params, x, names)
    count = len(ordered)
    masks = dict.fromkeys(ordered, jnp.ones(()))
    explainer = explain(fn, composite=composite, capture=ordered, condition=masks)

    def arriving(mask: jax.Array) -> jax.Array:
        condition = dict(zip(ordered, mask, strict=True))
        found = explainer(params, x, target, condition)
        ends = [found.relevance, *(found.captured[name] for name in ordered)]
        return jnp.stack([_total(end) for end in ends])

    # arrived[i, j]: at value i (0: the input), with all values masked that lie behind
    # it and before value j.
    cases = [(i, j) for i in range(count + 1) for j in range(i + 1, count + 2)]
    at = np.arange(1, count + 1)
    passes = np.stack([(at <= i) | (at >= j) for i, j in cases])
    found = jax.jit(lambda rows: jax.lax.map(arriving, rows, batch_size=8))(
        jnp.asarray(passes, jnp.result_type(float))
    )
    arrived = {
        case: float(row[case[0]]) for case, row in zip(cases, found, strict=True)
    }
    every = [INPUT, *ordered, OUTPUT]
    edges = {}
    for j in range(count + 1, 0, -1):
        for i in range(j - 1, -1, -1):
            through_others = arrived[i, j + 1] if j <= count else 0.0
            edges[every[j], every[i]] = arrived[i, j] - through_others
    return edges


def _in_order(
    fn: Callable[[Any, Any], Any], params: Any, x: Any, names: str | Iterable[str]
) -> tuple[str, ...]:
    """The names that the globs match, in the order in which their values are made."""
    patterns = (names,) if isinstance(names, str) else tuple(names)
    program, _ = trace(partial(arguments.called, fn), params, x)
    named = named_values(program)
    if not patterns:
        raise InputError("names is empty; give globs of name scopes and tags.")
    values = conditioned(named, matching(named, patterns))
    made = {
        name: -1 if value.producer is None else value.producer.position
        for name, value in values.items()
    }
    return tuple(sorted(made, key=lambda name: made[name]))


def _total(tree: Any) -> jax.Array:
    leaves = [leaf for leaf in jax.tree.leaves(tree) if jnp.size(leaf)]
    return sum((jnp.sum(leaf) for leaf in leaves), jnp.zeros(()))
