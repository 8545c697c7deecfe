"""Infidelity and sensitivity: relevance under perturbations of x at random."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from jlrp import arguments
from jlrp.arguments import takes
from jlrp.errors import InputError
from jlrp.metrics.scoring import SCORES, Callee, Score, split_target
from jlrp.plan import targets
from jlrp.typing import Function, PyTree, Target

Array = jax.Array
Method = Callable[[Function, PyTree, PyTree, Target], PyTree]


@takes(
    fn=arguments.function,
    params=arguments.tree,
    x=arguments.batch,
    target=targets.check_kind,
    relevance=arguments.array,
    contributions=arguments.flag,
    score=arguments.choice(*SCORES),
    samples=arguments.whole(1),
    seed=arguments.whole(0),
)
def infidelity(
    fn: Function,
    params: PyTree,
    x: PyTree,
    relevance: PyTree,
    *,
    perturb: float | Callable[[Array, Array], Array] = 0.1,
    contributions: bool = True,
    score: str = "output",
    target: Target = None,
    samples: int = 100,
    seed: int = 0,
) -> Array:
    """``E_I (I . phi - (f(x) - f(x - I)))^2``: low is good. One compiled program.

    Args:
      fn, params, x, score, target: as in ``curves``; x is one float array.
      relevance: float array like x.
      perturb: what is subtracted from x: the deviation of normal noise, or a function
        ``(key, x) -> I`` that returns an array like x.
      contributions: whether relevance is an amount (LRP, gradient x input), so that phi
        is relevance / x (0 where x is 0), or is phi itself (a gradient).
      samples: perturbations drawn.
      seed: of the draws.

    Returns:
      Shape (batch,), in squared units of the score.

    Raises:
      InputError, TargetError: for arguments that do not fit.

    Example:
      >>> import jax.numpy as jnp
      >>> from jlrp import metrics
      >>> w, x = jnp.array([1.0, 2.0]), jnp.array([[3.0, 4.0]])
      >>> found = metrics.infidelity(lambda w, x: x @ w, w, x, x * w)
      >>> bool(found[0] < 1e-9)  # what is linear is explained fully
      True

    Source: Yeh et al. 2019, definition 2.1; Captum ``infidelity``.
    """
    if jnp.shape(relevance) != jnp.shape(x) or not _is_float(x):
        raise InputError(
            f"infidelity() takes a float array x and relevance like it; got x "
            f"{jnp.shape(x)} of {jnp.result_type(x)}, relevance {jnp.shape(relevance)}."
        )
    if not callable(perturb):
        arguments.number(0)("perturb", perturb)
        perturb = _Normal(float(perturb))
    static, traced = split_target(target)
    score_of = Score(Callee(fn), score, static)
    score_of.check(params, x, traced)
    options = (score_of, Callee(perturb), contributions, samples)
    return _infidelity(options, params, x, relevance, traced, jax.random.key(seed))


class _Normal:
    def __init__(self, scale: float):
        self.scale = scale

    def __call__(self, key: Array, x: Array) -> Array:
        return self.scale * jax.random.normal(key, x.shape, x.dtype)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Normal) and self.scale == other.scale

    def __hash__(self) -> int:
        return hash(self.scale)


@partial(jax.jit, static_argnums=0)
def _infidelity(
    options: tuple[Score, Callee, bool, int],
    params: PyTree,
    x: Array,
    relevance: Array,
    target: PyTree,
    key: Array,
) -> Array:
    score, perturb, contributions, samples = options
    multipliers = score.multipliers(params, x, target)
    before = score(params, x, multipliers)
    slope = relevance
    if contributions:
        slope = jnp.where(x == 0, 0, relevance / jnp.where(x == 0, 1, x))

    def squared_gap(key: Array) -> Array:
        step = arguments.result_of("perturb", perturb.fn, key, x)
        said = (slope * step).reshape(x.shape[0], -1).sum(1)
        return (said - (before - score(params, x - step, multipliers))) ** 2

    return jax.lax.map(squared_gap, jax.random.split(key, samples)).mean(0)


@takes(
    method=arguments.function,
    fn=arguments.function,
    params=arguments.tree,
    x=arguments.batch,
    target=targets.check_kind,
    radius=arguments.number(0),
    samples=arguments.whole(1),
    seed=arguments.whole(0),
)
def sensitivity(
    method: Method,
    fn: Function,
    params: PyTree,
    x: PyTree,
    target: Target = None,
    *,
    radius: float = 0.02,
    samples: int = 10,
    seed: int = 0,
) -> Array:
    """The largest relative change of relevance in a cube around x: low is good.

    ``max_d |R(x + d) - R(x)| / |R(x)|`` in the Euclidean norm, d uniform in
    [-radius, radius]. One compiled program.

    Args:
      method: ``method(fn, params, x, target) -> relevance``, such as
        ``jlrp.relevance``, one of ``jlrp.baselines``, or a ``functools.partial``.
      fn, params, x, target: as in ``jlrp.relevance``; x is one float array of shape
        (batch, ...). The class predicted for x stays the target of its neighbours.
      radius: in units of x.
      samples: neighbours drawn.
      seed: of the draws.

    Returns:
      Shape (batch,).

    Raises:
      InputError: for a radius or number of samples that is not positive, or such an x.

    Example:
      >>> import jax.numpy as jnp, jlrp
      >>> from jlrp import metrics
      >>> w, x = jnp.array([1.0, 2.0]), jnp.array([[3.0, 4.0]])
      >>> found = metrics.sensitivity(jlrp.relevance, lambda w, x: x @ w, w, x)
      >>> bool(found[0] <= 0.02)
      True

    Source: Yeh et al. 2019, definition 3.1 (max-sensitivity); Captum
    ``sensitivity_max``.
    """
    if not _is_float(x) or jnp.ndim(x) < 2 or radius <= 0:
        raise InputError(
            "sensitivity() needs a float array x of shape (batch, ...) and a positive "
            f"radius; got x {jnp.shape(x)} and radius={radius}."
        )
    static, traced = split_target(target)
    options = (Callee(method), Callee(fn), static, samples)
    return _sensitivity(options, params, x, traced, radius, jax.random.key(seed))


@partial(jax.jit, static_argnums=0)
def _sensitivity(
    options: tuple[Callee, Callee, Target, int],
    params: PyTree,
    x: Array,
    target: PyTree,
    radius: Array,
    key: Array,
) -> Array:
    method, callee, static, samples = options
    target = static if target is None else target
    if target is None:
        target = predicted(callee.fn, params, x)

    def explained(x: Array) -> Array:
        how = partial(method.fn, callee.fn)
        relevance = arguments.result_of("method", how, params, x, target)
        return relevance.reshape(x.shape[0], -1)

    here = explained(x)

    def distance(key: Array) -> Array:
        step = jax.random.uniform(key, x.shape, x.dtype, -1, 1) * radius
        return jnp.linalg.norm(explained(x + step.astype(x.dtype)) - here, axis=1)

    distances = jax.lax.map(distance, jax.random.split(key, samples))
    return distances.max(0) / jnp.linalg.norm(here, axis=1)


def predicted(fn: Function, params: PyTree, x: PyTree) -> PyTree:
    """The classes that ``fn`` predicts; None where its output has no classes."""
    output = arguments.called(fn, params, x)
    return output.argmax(-1) if jnp.ndim(output) == 2 else None


def _is_float(x: PyTree) -> bool:
    leaves = jax.tree.leaves(x)
    return (
        len(leaves) == 1
        and leaves[0] is x
        and jnp.issubdtype(jnp.result_type(x), jnp.floating)
    )
