"""The sanity check: relevance of a network whose layers were randomised."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import KeyPath

from jlrp import arguments
from jlrp.arguments import takes
from jlrp.errors import InputError
from jlrp.ir.program import Value, trace
from jlrp.metrics.robustness import Method, predicted
from jlrp.metrics.scoring import Callee, split_target
from jlrp.plan import targets
from jlrp.typing import Function, PyTree, Target

Array = jax.Array
SIMILARITIES = ("spearman", "pearson")


@dataclass(frozen=True)
class Randomisation:
    """How alike relevance stays while layers are randomised from the top.

    Attributes:
      layers: names of the layers, the topmost first.
      similarity: float (batch, layers): of the relevance with that layer and all above
        it randomised, to the relevance of the network as it is.
    """

    layers: tuple[str, ...]
    similarity: Array


@takes(
    method=arguments.function,
    fn=arguments.function,
    params=arguments.tree,
    x=arguments.batch,
    target=targets.check_kind,
    similarity=arguments.choice(*SIMILARITIES),
    absolute=arguments.flag,
    seed=arguments.whole(0),
)
def randomisation(
    method: Method,
    fn: Function,
    params: PyTree,
    x: PyTree,
    target: Target = None,
    *,
    similarity: str = "spearman",
    absolute: bool = False,
    seed: int = 0,
) -> Randomisation:
    """Cascading randomisation of parameters: a faithful method loses its similarity.

    A layer is what lies under one key of ``params`` but the last (``conv1/kernel`` and
    ``conv1/bias``); its place is where the program first uses it. Each parameter's
    entries are shuffled, which keeps their distribution. One compiled program for all
    layers.

    Args:
      method: ``method(fn, params, x, target) -> relevance``, as in ``sensitivity``.
      fn, params, x, target: as in ``jlrp.relevance``; x is one float array of shape
        (batch, ...). The class predicted by the network as it is stays the target.
      similarity: ``"spearman"`` (ranks) or ``"pearson"``.
      absolute: whether to compare absolute values.
      seed: of the shuffles.

    Returns:
      A ``Randomisation``. Chance is 0.

    Raises:
      InputError: for another similarity, or params that the program does not use.

    Example:
      >>> import jax, jax.numpy as jnp, jlrp
      >>> from jlrp import metrics
      >>> keys = jax.random.split(jax.random.key(0), 2)
      >>> p = {"a": {"w": jax.random.normal(keys[0], (4, 8))},
      ...      "b": {"w": jax.random.normal(keys[1], (8, 3))}}
      >>> fn = lambda p, x: jax.nn.relu(x @ p["a"]["w"]) @ p["b"]["w"]
      >>> metrics.randomisation(jlrp.relevance, fn, p, jnp.ones((1, 4))).layers
      ('b', 'a')

    Source: Adebayo et al. 2018, section 3.1.
    """
    target = predicted(fn, params, x) if target is None else target
    static, traced = split_target(target)
    options = (Callee(method), Callee(fn), static, similarity, absolute)
    names = [_layer_name(path) for path, _ in _leaves(params)]
    layers = layers_from_the_top(fn, params, x)
    how = partial(method, fn)
    reference = arguments.result_of("method", how, params, x, target)
    shuffled = _shuffled(params, seed)
    leaves, tree = jax.tree.flatten(params)
    rows, done = [], set()
    for layer in layers:
        done.add(layer)
        mixed = [
            new if name in done else old
            for name, old, new in zip(names, leaves, shuffled, strict=True)
        ]
        mixed = jax.tree.unflatten(tree, mixed)
        rows.append(_similarity(options, mixed, x, traced, reference))
    return Randomisation(tuple(layers), jnp.stack(rows, axis=1))


@partial(jax.jit, static_argnums=0)
def _similarity(
    options: tuple[Callee, Callee, Target, str, bool],
    params: PyTree,
    x: PyTree,
    target: PyTree,
    reference: Array,
) -> Array:
    method, callee, static, how, absolute = options
    target = static if target is None else target
    explained_by = partial(method.fn, callee.fn)
    found = arguments.result_of("method", explained_by, params, x, target)
    maps = [m.reshape(m.shape[0], -1) for m in (found, reference)]
    if absolute:
        maps = [jnp.abs(m) for m in maps]
    if how == "spearman":
        maps = [_ranked(m) for m in maps]
    a, b = (m - m.mean(1, keepdims=True) for m in maps)
    norms = jnp.linalg.norm(a, axis=1) * jnp.linalg.norm(b, axis=1)
    return (a * b).sum(1) / jnp.where(norms == 0, 1, norms)


def _ranked(values: Array) -> Array:
    """Ranks along the last axis; equal values share their mean rank."""

    def of_row(row: Array) -> Array:
        ordered = jnp.sort(row)
        first = jnp.searchsorted(ordered, row, side="left")
        last = jnp.searchsorted(ordered, row, side="right")
        return (first + last).astype(row.dtype) / 2

    return jax.vmap(of_row)(values)


def _leaves(params: PyTree) -> Sequence[tuple[KeyPath, Array]]:
    return jax.tree_util.tree_leaves_with_path(params)


def _layer_name(path: KeyPath) -> str:
    """``a/b`` for the leaf ``a/b/kernel``; PyTorch's dots count as slashes."""
    name = jax.tree_util.keystr(path, simple=True, separator="/").replace(".", "/")
    return name.rpartition("/")[0] or name


def layers_from_the_top(fn: Function, params: PyTree, x: PyTree) -> list[str]:
    """The names of the layers of ``params``, the last that the program uses first.

    Args:
      fn, params, x: as in ``jlrp.relevance``; shapes are enough.

    Raises:
      InputError: the program uses no parameter.
    """
    program, _ = trace(partial(arguments.called, fn), params, x)
    leaves = _leaves(params)
    made_of: dict[Value, set[int]] = {
        value: {i} for i, value in enumerate(program.inputs[: len(leaves)])
    }
    from_x = set(program.inputs[len(leaves) :])
    first_use: dict[int, int] = {}
    for equation in program.equations:
        operands = [a for a in equation.inputs if isinstance(a, Value)]
        read = set().union(*(made_of.get(a, set()) for a in operands))
        if not from_x.isdisjoint(operands):
            from_x.update(equation.outputs)
            for i in read:
                first_use.setdefault(i, equation.position)
        else:
            made_of.update(dict.fromkeys(equation.outputs, read))
    place: dict[str, int] = {}
    for i, (path, _) in enumerate(leaves):
        if i in first_use:
            name = _layer_name(path)
            place[name] = max(place.get(name, -1), first_use[i])
    if not place:
        raise InputError("The function uses none of its params: nothing to randomise.")
    return sorted(place, key=lambda name: -place[name])


def _shuffled(params: PyTree, seed: int) -> list[PyTree]:
    random = np.random.default_rng(seed)
    return [
        jnp.asarray(random.permutation(np.asarray(leaf).reshape(-1))).reshape(
            jnp.shape(leaf)
        )
        for leaf in jax.tree.leaves(params)
    ]
