"""Perturbation curves: what a score does while parts are removed by their relevance."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jlrp import arguments
from jlrp.arguments import takes
from jlrp.errors import InputError
from jlrp.ir import jax_compat
from jlrp.metrics.parts import PARTS, POOLS, Parts, pooled, sizes
from jlrp.metrics.removal import REMOVAL, Inpaint, Removal
from jlrp.metrics.scoring import SCORES, Callee, Score, split_target
from jlrp.plan import targets
from jlrp.tactics.looping import for_a_loop
from jlrp.typing import Function, PyTree, Target

Array = jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Curves:
    """Scores while parts are removed, and the areas that the literature takes of them.

    All areas are in units of the score: 0.2 of ``"probability"`` means that the
    probability differs by 0.2 on average over the curve. DynamicLRP's paper (arXiv
    2512.07010) reports 4 times that, of ``score="hit"``.

    Attributes:
      removed: float (points,): the share of the parts that is removed, 0 to 1.
      morf: float (batch, points): the most relevant first.
      lerf: float (batch, points): the least relevant first.
    """

    removed: Array
    morf: Array
    lerf: Array

    @property
    def abpc(self) -> Array:
        """Area between the curves, mean over points of LeRF - MoRF; (batch,), high is
        good.

        Source: Schulz et al. 2020, as used by AttnLRP and DynamicLRP.
        """
        return (self.lerf - self.morf).mean(-1)

    @property
    def comprehensiveness(self) -> Array:
        """Mean drop when the most relevant go first; (batch,), high is good.

        ``abpc`` = ``comprehensiveness`` - ``sufficiency``. Source: DeYoung et al. 2020
        (ERASER), with the mean over all points, the first included, as DynamicLRP.
        """
        return (self.morf[:, :1] - self.morf).mean(-1)

    @property
    def sufficiency(self) -> Array:
        """Mean drop when the most relevant stay; (batch,), low is good.

        Source: DeYoung et al. 2020 (ERASER).
        """
        return (self.lerf[:, :1] - self.lerf).mean(-1)

    @property
    def aopc(self) -> Array:
        """Area over the MoRF curve, ``1/(L+1) sum_k f(x_0) - f(x_k)``; (batch,).

        The same number as ``comprehensiveness``. Source: Samek et al. 2017, eq. 12.
        """
        return self.comprehensiveness

    @property
    def deletion(self) -> Array:
        """Area under the MoRF curve by trapezoids; (batch,), low is good.

        Source: Petsiuk et al. 2018 (RISE); there with ``Constant(0)`` and pixels.
        """
        return _trapezoids(self.morf, self.removed)

    @property
    def insertion(self) -> Array:
        """Area under the curve of inserting the most relevant first; (batch,), high is
        good.

        It is the LeRF curve read from its end: inserting the most relevant leaves out
        the least relevant. Source: Petsiuk et al. 2018 (RISE); there with ``Blur``.
        """
        return _trapezoids(self.lerf, self.removed)


def _trapezoids(curve: Array, at: Array) -> Array:
    heights = (curve[:, 1:] + curve[:, :-1]) / 2
    return (heights * jnp.diff(at)[None]).sum(-1)


@takes(
    fn=arguments.function,
    params=arguments.tree,
    x=arguments.batch,
    target=targets.check_kind,
    relevance=arguments.array,
    parts=PARTS,
    removal=REMOVAL,
    steps=arguments.whole(1),
    pool=arguments.choice(*POOLS),
    score=arguments.choice(*SCORES),
)
def curves(
    fn: Function,
    params: PyTree,
    x: PyTree,
    relevance: PyTree,
    *,
    parts: Parts,
    removal: Removal | Inpaint,
    steps: int = 20,
    pool: str = "sum",
    score: str = "probability",
    target: Target = None,
) -> Curves:
    """Remove parts of x by their relevance and watch the score: one compiled program.

    ``2 (steps + 1)`` forward passes of the whole batch, one after the other. Compiles
    and caches per function, shapes and options, as ``jlrp.relevance`` does.

    Args:
      fn: ``fn(params, x) -> scores``.
      params: pytree of arrays. Inputs that are not perturbed (an attention mask) belong
        here: ``lambda p, ids: fn(p["model"], ids, p["mask"])``.
      x: one array of shape (batch, ...): images, embeddings, token ids.
      relevance: float array like x.
      parts: what is removed together: ``patches``, ``pixels``, ``tokens``, ``features``
        or ``Parts(labels)``.
      removal: what takes its place: ``Blur``, ``Constant``, ``Mean``, ``Noise``, any
        function of x that returns an array like it, or an ``Inpaint``.
      steps: into how many the removal is divided; 14 of 196 patches is 14 at a time.
      pool: relevance of a part: ``"sum"``, ``"max"`` or ``"mean"`` of its places.
      score: ``"probability"``: softmax of the scores at the target; ``"output"``: the
        score itself; ``"hit"``: 1 where the target is the arg-max, whose mean is the
        accuracy. A target function's own number is taken as it is.
      target: as in ``jlrp.relevance``. The default is the class predicted for the x
        given, at every step.

    Returns:
      ``Curves`` of ``steps + 1`` points.

    Raises:
      InputError: for parts, relevance or options that do not fit.
      TargetError: for a target or score that does not fit the output.

    Example:
      >>> import jax.numpy as jnp
      >>> from jlrp import metrics
      >>> w, x = jnp.array([4.0, 2.0, 1.0]), jnp.ones((1, 3))
      >>> found = metrics.curves(
      ...     lambda w, x: x @ w, w, x, x * w, parts=metrics.features((3,)),
      ...     removal=metrics.Constant(0), steps=3, score="output")
      >>> found.morf.tolist()
      [[7.0, 3.0, 1.0, 0.0]]

    Sources: Samek et al. 2017; Petsiuk et al. 2018; DeYoung et al. 2020.
    """
    if not isinstance(x, jax.Array | np.ndarray) or x.ndim < 2:
        raise InputError(
            "curves() perturbs x, one array of shape (batch, ...); got "
            f"{jax.tree.map(jnp.shape, x)}. What is not perturbed belongs to params."
        )
    if jnp.shape(relevance) != x.shape:
        raise InputError(
            f"Relevance has shape {jnp.shape(relevance)}, x {x.shape}: one number for "
            "each element of x is needed."
        )
    if not jax_compat.is_tracer(relevance) and not np.isfinite(relevance).all():
        raise InputError(
            "Relevance holds NaN or inf, which has no rank. jlrp.audit says where they "
            "began."
        )
    labels = parts.for_batch(x.shape)
    static, traced = split_target(target)
    score_of = Score(Callee(fn), score, static)
    score_of.check(params, x, traced)
    how = Callee(removal) if callable(removal) else removal
    options = (score_of, how, parts.count, steps, pool)
    return _curves(options, params, x, relevance, labels, traced)


@partial(jax.jit, static_argnums=0)
def _curves(
    options: tuple[Score, Callee | Inpaint, int, int, str],
    params: PyTree,
    x: PyTree,
    relevance: PyTree,
    labels: PyTree,
    target: PyTree,
) -> Curves:
    score, removal, count, steps, pool = options
    multipliers = score.multipliers(params, x, target)
    present = sizes(labels, count) > 0
    pools = pooled(relevance, labels, count, pool)
    ranks = jnp.stack([_ranks(-pools, present), _ranks(pools, present)])
    place = jnp.broadcast_to(labels, (x.shape[0], *labels.shape[1:]))
    of_place = jax.vmap(jax.vmap(lambda rank, part: rank[part]), (0, None))
    order = of_place(ranks, place)
    here = present.sum(-1, dtype=jnp.int32).reshape(-1, *[1] * (x.ndim - 1))
    fill = _filling(removal, x)
    looped = replace(score, callee=Callee(for_a_loop(score.callee.fn, params, x)))

    def at(point: Array) -> Array:
        which, step = point // (steps + 1), point % (steps + 1)
        removed = (order[which] < step * here // steps) & (place >= 0)
        return looped(params, jnp.where(removed, fill(removed), x), multipliers)

    scores = jax.lax.map(at, jnp.arange(2 * (steps + 1), dtype=jnp.int32))
    morf, lerf = scores.reshape(2, steps + 1, -1).swapaxes(1, 2)
    return Curves(jnp.arange(steps + 1) / steps, morf, lerf)


def _ranks(key: Array, present: Array) -> Array:
    """The place of each part in the ascending order of the keys, absent ones last."""
    order = jnp.argsort(jnp.where(present, key, jnp.inf), axis=-1)
    return jnp.argsort(order, axis=-1).astype(jnp.int32)


def _filling(removal: Callee | Inpaint, x: Array) -> Callable[[Array], Array]:
    """What is put at removed places; computed once, if it does not depend on them."""
    if isinstance(removal, Inpaint):

        def inpainted(removed: Array) -> Array:
            found = arguments.result_of("removal", removal.function, x, removed)
            return jnp.asarray(found).astype(x.dtype)

        return inpainted
    replacement = jnp.asarray(arguments.result_of("removal", removal.fn, x))
    if jnp.shape(replacement) != x.shape:
        raise InputError(
            f"The removal returned shape {jnp.shape(replacement)} for x of shape "
            f"{x.shape}; it must return an array like x."
        )
    return lambda removed: replacement.astype(x.dtype)
