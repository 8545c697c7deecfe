"""What one batch becomes: named arrays, all with the example for their first axis."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp

from jlrp.api import Explainer, Explanation
from jlrp.arguments import check_array, first_lines, leaves_of, shapes_of, shown
from jlrp.errors import JlrpError
from jlrp.fields import options_of
from jlrp.ir import jax_compat
from jlrp.jobs.errors import JobError
from jlrp.jobs.fingerprint import described
from jlrp.options import Options
from jlrp.plan import targets
from jlrp.typing import Array, PyTree, Target

Arrays = dict[str, Array]
Reduction = Callable[[PyTree], PyTree]

DTYPES = ("float16", "float32", "float64")

# The values of the array "failure"; a row that was never written has UNWRITTEN.
FAILURES = ("none", "unreadable", "nan_in_x", "not_finite")
UNREADABLE, NAN_IN_X, NOT_FINITE = 1, 2, 3
UNWRITTEN = -1
REASONS = {
    NAN_IN_X: "x has NaN",
    NOT_FINITE: "its score or relevance, as stored, is not finite",
}


@dataclass(frozen=True)
class Step:
    """``step(params, x, target=None)``: explains a batch, reduces, names the results.

    Attributes:
      reduce: ``relevance -> pytree`` of a batch, or None to keep it as it is.
      dtype: of relevance, captured and floating-point outputs.
      allow_nan: whether the function takes NaN in x, and replaces it itself.

    The arrays that it returns: ``relevance``, ``output`` and ``captured.<name>``, with
    a suffix for each leaf if there are several; ``target``, where it is a class;
    ``score``: what was explained; ``absorbed``: the score less the sum of the
    relevance; ``failure``: an index into ``FAILURES``.
    """

    explainer: Explainer
    reduce: Reduction | None = None
    dtype: str = "float32"
    allow_nan: bool = False

    def __call__(self, params: PyTree, x: PyTree, target: Target = None) -> Arrays:
        found = self.explainer(params, x, target)
        target = self.explainer.target if target is None else target
        size = jax.tree.leaves(x)[0].shape[0]
        kept = found.relevance
        if self.reduce is not None:
            kept = _reduced(self.reduce, kept)
        relevances = {
            **_named("relevance", kept),
            **_named("captured", _by_example(found)),
        }
        relevances = {name: self._stored(r) for name, r in relevances.items()}
        score = _explained_score(found.output, target, self.explainer.seed)
        if score.shape != (size,):
            raise JobError(
                f"The explained score has shape {score.shape} for a batch of {size}: a "
                "job needs one score for each example. Let the function keep the batch "
                "axis first, and a target function return shape (batch,)."
            )
        arrays = {
            **relevances,
            **{
                name: self._stored(out)
                for name, out in _named("output", found.output).items()
            },
            "score": score,
            "absorbed": score - _total(found.relevance, size),
        }
        chosen = _chosen_class(found.output, target, size)
        if chosen is not None:
            arrays["target"] = chosen
        for name, array in arrays.items():
            if array.shape[:1] != (size,):
                raise JobError(
                    f"{name!r} has shape {array.shape} for a batch of {size}: a store "
                    "has one row for each example, so its first axis must be theirs."
                )
        refused = () if self.allow_nan else x
        arrays["failure"] = _failure(refused, [*relevances.values(), score])
        return arrays

    def _stored(self, array: Array) -> Array:
        if jnp.issubdtype(array.dtype, jnp.floating):
            return array.astype(self.dtype)
        return array

    def with_target(self, target: int) -> Step:
        return replace(self, explainer=replace(self.explainer, target=target))

    @property
    def made_by(self) -> dict[str, object]:
        """What the results depend on besides params and data, for the store."""
        options = options_of(Options).items()
        return {
            **{
                name: described(getattr(self.explainer, name))
                for name, option in options
                if option.changes_results
            },
            "reduce": described(self.reduce),
            "dtype": self.dtype,
            **({"allow_nan": True} if self.allow_nan else {}),
        }


def check_options(reduce: object, dtype: object) -> None:
    """Refuse what is no reduction, or no dtype of a store."""
    if reduce is not None and not callable(reduce):
        raise JobError(
            f"reduce is {shown(reduce)}; give jobs.sum_channels, jobs.Top(k), or a "
            "function of the relevance of a batch."
        )
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise JobError(f"dtype must be one of {DTYPES}; got {shown(dtype)}.")


def sum_channels(relevance: PyTree) -> PyTree:
    """Relevance summed over the last axis of each leaf, as heat maps of images need.

    Args:
      relevance: pytree of arrays of shape ``(batch, ..., channels)``.

    Returns:
      A pytree of arrays of shape ``(batch, ...)``.

    Example:
      >>> import jax.numpy as jnp
      >>> from jlrp import jobs
      >>> jobs.sum_channels(jnp.ones((2, 8, 8, 3))).shape
      (2, 8, 8)
    """
    return jax.tree.map(lambda r: r.sum(-1), relevance)


@dataclass(frozen=True)
class Top:
    """The ``k`` largest relevances of each example by absolute value, and where.

    Of a relevance of shape ``(batch, tokens)``, or flattened to it, the ``values`` and
    their ``positions``, both ``(batch, k)``, the largest first.

    Example:
      >>> import jax.numpy as jnp
      >>> from jlrp import jobs
      >>> jobs.Top(2)(jnp.array([[0.5, -2.0, 1.0]]))["positions"].tolist()
      [[1, 2]]
    """

    k: int

    def __post_init__(self) -> None:
        is_whole = isinstance(self.k, int) and not isinstance(self.k, bool)
        if not is_whole or self.k < 1:
            raise JobError(f"Top(k) takes a whole number k >= 1; got {shown(self.k)}.")

    def __call__(self, relevance: PyTree) -> dict[str, Array]:
        leaves = jax.tree.leaves(relevance)
        if len(leaves) != 1:
            raise JobError(f"Top({self.k}) needs one relevance, x has {len(leaves)}.")
        flat = leaves[0].reshape(leaves[0].shape[0], -1)
        if flat.shape[1] < self.k:
            raise JobError(
                f"Top({self.k}) of an example with {flat.shape[1]} relevances: take a "
                "smaller k, or a longer first bucket."
            )
        _, positions = jax.lax.top_k(jnp.abs(flat), self.k)
        values = jnp.take_along_axis(flat, positions, axis=1)
        return {"values": values, "positions": positions}


def _reduced(reduce: Reduction, relevance: PyTree) -> PyTree:
    try:
        found = reduce(relevance)
        for _, leaf in leaves_of("reduce(relevance)", found):
            check_array("reduce(relevance)", leaf)
    except JlrpError:
        raise
    except Exception as error:
        raise JobError(
            f"reduce raised {type(error).__name__}: {first_lines(error)} It was called "
            f"with the relevance of a batch, {shapes_of(relevance)}."
        ) from error
    return found


def _named(name: str, tree: PyTree) -> Arrays:
    """Leaves by the name of their store's array: ``relevance``, ``relevance.image``."""
    pairs = jax.tree_util.tree_leaves_with_path(tree)
    names = [
        ".".join([name, *(_key(part) for part in path)]).replace("/", ".")
        for path, _ in pairs
    ]
    if len(set(names)) < len(names):
        raise JobError(f"Two results have one name in the store: {sorted(names)}.")
    return dict(zip(names, (leaf for _, leaf in pairs), strict=True))


def _key(part: object) -> str:
    return jax.tree_util.keystr((part,), simple=True)


def _by_example(found: Explanation) -> dict[str, PyTree]:
    """What was captured, its examples first and the iterations of loops behind them."""
    captured = dict(found.captured)
    for name, counts in found.loop_axes:
        arrays = captured[name]
        several = arrays if isinstance(arrays, list) else [arrays]
        moved = [_behind(a, n) for a, n in zip(several, counts, strict=True)]
        captured[name] = moved if isinstance(arrays, list) else moved[0]
    return captured


def _behind(array: Array, n: int) -> Array:
    """The first n axes behind the next."""
    return jnp.moveaxis(array, n, 0) if 0 < n < array.ndim else array


def _explained_score(output: PyTree, target: Target, seed: str) -> Array:
    """What the relevance of each example starts from: all of it, before any rule."""
    scores = target(output) if callable(target) else output
    leaves = [jax_compat.at_least_float32(leaf) for leaf in jax.tree.leaves(scores)]
    batch = leaves[0].shape[0] if leaves[0].ndim else None
    starts = targets.seeds(leaves, target, batch, seed)
    amounts = [
        _per_example(start.resolve(leaf))
        for start, leaf in zip(starts, leaves, strict=True)
    ]
    return sum(amounts[1:], start=amounts[0]).astype(jnp.float32)


def _per_example(array: Array) -> Array:
    return array.sum(axis=tuple(range(1, array.ndim)))


def _total(relevance: PyTree, size: int) -> Array:
    amounts = [_per_example(r) for r in jax.tree.leaves(relevance)]
    return sum(
        (a.astype(jnp.float32) for a in amounts), start=jnp.zeros(size, jnp.float32)
    )


def _chosen_class(output: PyTree, target: Target, size: int) -> Array | None:
    if callable(target):
        return None
    if target is not None:
        whole = jnp.issubdtype(jnp.result_type(target), jnp.integer)
        return jnp.broadcast_to(target, (size,)).astype(jnp.int32) if whole else None
    if getattr(output, "ndim", 0) == 2:
        return jnp.argmax(output, axis=-1).astype(jnp.int32)
    return None


def _failure(refused: PyTree, results: list[Array]) -> Array:
    def any_of(arrays: list[Array], found: Callable[[Array], Array]) -> Array:
        floats = [a for a in arrays if jnp.issubdtype(a.dtype, jnp.floating)]
        flags = [found(a).reshape(a.shape[0], -1).any(axis=1) for a in floats]
        return jnp.stack(flags).any(axis=0) if flags else jnp.asarray(False)

    poisoned = any_of(jax.tree.leaves(refused), jnp.isnan)
    infinite = any_of(results, lambda a: ~jnp.isfinite(a))
    codes = jnp.where(infinite, NOT_FINITE, 0)
    return jnp.where(poisoned, NAN_IN_X, codes).astype(jnp.int8)
