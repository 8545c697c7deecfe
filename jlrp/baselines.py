"""The field's other attributions, to compare with: as ``jlrp.relevance`` is called.

``method(fn, params, x, target=None, ...)`` returns an attribution like x, of any
function and any target. They differentiate as JAX does, and know nothing of LRP.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jlrp import arguments
from jlrp.arguments import broadcasts, takes
from jlrp.errors import InputError
from jlrp.metrics.parts import PARTS, Parts
from jlrp.metrics.removal import REMOVAL, Constant, Removal
from jlrp.metrics.scoring import Callee, Score, split_target
from jlrp.plan import targets
from jlrp.tactics.looping import for_a_loop
from jlrp.typing import Array, Function, PyTree, Target

__all__ = [
    "gradient",
    "gradient_input",
    "integrated_gradients",
    "occlusion",
    "smoothgrad",
]


@takes(
    fn=arguments.function,
    params=arguments.tree,
    x=arguments.batch,
    target=targets.check_kind,
)
def gradient(fn: Function, params: PyTree, x: PyTree, target: Target = None) -> PyTree:
    """The derivative of the explained score with respect to each element of x.

    Args:
      fn, params, target: as in ``jlrp.relevance``.
      x: pytree of float arrays of shape (batch, ...).

    Returns:
      A pytree like x, in units of score per unit of x.

    Raises:
      InputError: for an x that is not floating point.
      TargetError: for a target that does not fit the output.

    Example:
      >>> import jax.numpy as jnp
      >>> from jlrp import baselines
      >>> w, x = jnp.array([1.0, 2.0]), jnp.array([[3.0, 4.0]])
      >>> baselines.gradient(lambda w, x: x @ w, w, x).tolist()
      [[1.0, 2.0]]

    Source: Simonyan et al. 2014.
    """
    return _run(_gradient, fn, params, x, target)


@takes(
    fn=arguments.function,
    params=arguments.tree,
    x=arguments.batch,
    target=targets.check_kind,
)
def gradient_input(
    fn: Function, params: PyTree, x: PyTree, target: Target = None
) -> PyTree:
    """Gradient times input, the first-order Taylor term at zero.

    Args, Returns, Raises: as ``gradient``; in units of the score.

    Source: Shrikumar et al. 2016.
    """
    return _run(_gradient_input, fn, params, x, target)


@takes(
    fn=arguments.function,
    params=arguments.tree,
    x=arguments.batch,
    target=targets.check_kind,
    baseline=arguments.tree,
    steps=arguments.whole(1),
)
def integrated_gradients(
    fn: Function,
    params: PyTree,
    x: PyTree,
    target: Target = None,
    *,
    baseline: PyTree = 0.0,
    steps: int = 32,
) -> PyTree:
    """``(x - b) int_0^1 grad f(b + a (x - b)) da``, by the midpoint rule.

    One compiled program; the path's points are visited one after the other.

    Args:
      fn, params, x, target: as in ``gradient``.
      baseline: b: a number, or a pytree like x of arrays that broadcast to its leaves.
      steps: gradients taken along the path.

    Returns:
      A pytree like x; its sum tends to ``f(x) - f(b)``.

    Raises:
      InputError, TargetError: as ``gradient``, and for less than one step.

    Source: Sundararajan et al. 2017, eq. 1.
    """
    baseline = _like(x, baseline)
    return _run(_integrated, fn, params, x, target, (baseline,), (steps,))


@takes(
    fn=arguments.function,
    params=arguments.tree,
    x=arguments.batch,
    target=targets.check_kind,
    noise=arguments.number(0),
    samples=arguments.whole(1),
    seed=arguments.whole(0),
)
def smoothgrad(
    fn: Function,
    params: PyTree,
    x: PyTree,
    target: Target = None,
    *,
    noise: float = 0.15,
    samples: int = 32,
    seed: int = 0,
) -> PyTree:
    """The mean gradient at noisy copies of x. One compiled program.

    Args:
      fn, params, x, target: as in ``gradient``.
      noise: deviation of the normal noise, as a share of each example's range.
      samples: noisy copies, one after the other.
      seed: of the noise.

    Returns:
      A pytree like x, in units of score per unit of x.

    Raises:
      InputError, TargetError: as ``gradient``, and for less than one sample.

    Source: Smilkov et al. 2017.
    """
    key = jax.random.key(seed)
    return _run(_smoothed, fn, params, x, target, (key, noise), (samples,))


@takes(
    fn=arguments.function,
    params=arguments.tree,
    x=arguments.batch,
    target=targets.check_kind,
    parts=PARTS,
    removal=REMOVAL,
)
def occlusion(
    fn: Function,
    params: PyTree,
    x: PyTree,
    target: Target = None,
    *,
    parts: Parts,
    removal: Removal = Constant(0),  # noqa: B008  (a frozen value)
) -> PyTree:
    """How much the score falls when one part alone is removed.

    One compiled program of one forward pass per part.

    Args:
      fn, params, target: as in ``jlrp.relevance``.
      x: one array of shape (batch, ...), integers too.
      parts: what is removed together.
      removal: what takes its place.

    Returns:
      Float array like x: each element of a part has the part's number, elements of no
      part have 0.

    Raises:
      InputError: for parts that do not fit.
      TargetError: for a target that does not fit the output.

    Example:
      >>> import jax.numpy as jnp
      >>> from jlrp import baselines, metrics
      >>> w, x = jnp.array([1.0, 2.0]), jnp.array([[3.0, 4.0]])
      >>> parts = metrics.features((2,))
      >>> baselines.occlusion(lambda w, x: x @ w, w, x, parts=parts).tolist()
      [[3.0, 8.0]]

    Source: Zeiler and Fergus 2014.
    """
    labels = parts.for_batch(jnp.shape(x))
    return _run(
        _occluded, fn, params, x, target, (labels,), (Callee(removal), parts.count)
    )


def _like(x: PyTree, baseline: PyTree) -> PyTree:
    """A baseline for each leaf of x."""
    if jax.tree.structure(baseline).num_leaves == 1 and np.ndim(baseline) == 0:
        return jax.tree.map(lambda leaf: jnp.full_like(leaf, baseline), x)
    fits = jax.tree.structure(baseline) == jax.tree.structure(x) and all(
        broadcasts(np.shape(b), np.shape(leaf))
        for b, leaf in zip(jax.tree.leaves(baseline), jax.tree.leaves(x), strict=True)
    )
    if not fits:
        raise InputError(
            f"baseline is {arguments.shapes_of(baseline)}; give a number, or a pytree "
            f"like x, {arguments.shapes_of(x)}, of arrays that broadcast to its leaves."
        )
    return baseline


def _run(
    method: Callable[..., PyTree],
    fn: Function,
    params: PyTree,
    x: PyTree,
    target: Target,
    traced: tuple[PyTree, ...] = (),
    static: tuple[object, ...] = (),
) -> PyTree:
    """Refuse what does not fit, then run ``method`` compiled."""
    if method is not _occluded:
        for path, leaf in jax.tree_util.tree_leaves_with_path(x):
            if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
                raise InputError(
                    f"x{jax.tree_util.keystr(path)} is {jnp.result_type(leaf)}: what "
                    "is not floating point has no gradient. Explain the embeddings, "
                    "or use occlusion or jlrp.relevance."
                )
    static_target, traced_target = split_target(target)
    score = Score(Callee(fn), "output", static_target)
    score.check(params, x, traced_target)
    return _compiled((method, score, static), params, x, traced_target, traced)


@partial(jax.jit, static_argnums=0)
def _compiled(
    key: tuple[Callable[..., PyTree], Score, tuple[object, ...]],
    params: PyTree,
    x: PyTree,
    target: PyTree,
    traced: Sequence[PyTree],
) -> PyTree:
    method, score, static = key
    multipliers = score.multipliers(params, x, target)
    watched = partial(score, params, multipliers=multipliers)
    return method(watched, x, *traced, *static)


def _gradient(score: Callable[[PyTree], Array], x: PyTree) -> PyTree:
    return jax.grad(lambda x: score(x).sum())(x)


def _gradient_input(score: Callable[[PyTree], Array], x: PyTree) -> PyTree:
    return jax.tree.map(jnp.multiply, x, _gradient(score, x))


def _integrated(
    score: Callable[[PyTree], Array], x: PyTree, baseline: PyTree, steps: int
) -> PyTree:
    way = jax.tree.map(jnp.subtract, x, baseline)

    def point_at(share: Array) -> PyTree:
        return jax.tree.map(lambda b, w: b + share.astype(w.dtype) * w, baseline, way)

    shares = jnp.asarray((np.arange(steps) + 0.5) / steps)
    return jax.tree.map(jnp.multiply, way, _mean_gradient(score, point_at, shares))


def _smoothed(
    score: Callable[[PyTree], Array], x: PyTree, key: Array, noise: Array, samples: int
) -> PyTree:
    leaves, tree = jax.tree.flatten(x)

    def noisy(leaf: Array, key: Array) -> Array:
        axes = tuple(range(1, leaf.ndim))
        span = leaf.max(axes, keepdims=True) - leaf.min(axes, keepdims=True)
        random = jax.random.normal(key, leaf.shape, leaf.dtype)
        return leaf + jnp.asarray(noise, leaf.dtype) * span * random

    def point_at(key: Array) -> PyTree:
        keys = jax.random.split(key, len(leaves))
        point = [noisy(leaf, k) for leaf, k in zip(leaves, keys, strict=True)]
        return jax.tree.unflatten(tree, point)

    return _mean_gradient(score, point_at, jax.random.split(key, samples))


def _mean_gradient(
    score: Callable[[PyTree], Array], point_at: Callable[[Array], PyTree], keys: Array
) -> PyTree:
    """The mean over points, one for each key; never are all gradients kept at once."""
    shapes = jax.eval_shape(point_at, keys[0])
    gradient = for_a_loop(lambda _, x: _gradient(score, x), (), shapes)
    start = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

    def add(total: PyTree, key: Array) -> tuple[PyTree, None]:
        return jax.tree.map(jnp.add, total, gradient((), point_at(key))), None

    total, _ = jax.lax.scan(add, start, keys)
    return jax.tree.map(lambda t: t / keys.shape[0], total)


def _occluded(
    score: Callable[[PyTree], Array],
    x: Array,
    labels: Array,
    removal: Callee,
    count: int,
) -> Array:
    before = score(x)
    replacement = arguments.result_of("removal", removal.fn, x)
    looped = for_a_loop(lambda _, x: score(x), (), x)

    def fall(part: Array) -> Array:
        return before - looped((), jnp.where(labels == part, replacement, x))

    falls = jax.lax.map(fall, jnp.arange(count, dtype=labels.dtype)).T  # batch, parts
    place = jnp.broadcast_to(labels, (x.shape[0], *labels.shape[1:]))
    spread = jax.vmap(lambda fall, part: fall[part])(falls, place)
    return jnp.broadcast_to(jnp.where(place < 0, 0, spread), x.shape)
