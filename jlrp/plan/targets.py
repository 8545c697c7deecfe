"""Targets: what of the output is explained, and with which relevance it starts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jlrp.arguments import called, check_array, chosen, leaves_of, shown
from jlrp.errors import InputError, TargetError
from jlrp.ir import jax_compat
from jlrp.ir.jax_compat import Jaxpr
from jlrp.promise import Promise
from jlrp.typing import Array, DTypeLike, Function, PyTree, Target

SEEDS = ("score", "one")
_HOW = (
    "Say what to explain with a function of the output that returns one number per "
    "example, such as target=lambda out: out[:, -1].max(-1)."
)


def is_static(target: Target) -> bool:
    """Whether a target is part of the compiled program: None, ints and functions."""
    return target is None or callable(target) or isinstance(target, int | np.integer)


@dataclass(frozen=True)
class Traced:
    """A target function as traced on the output, apart from the arrays that it holds.

    Equal for the same code and the same program: other labels do not compile again.
    """

    code: object
    text: str
    tree: object
    jaxpr: Jaxpr = field(compare=False, repr=False)

    def at(self, held: Sequence[Array]) -> Callable[[PyTree], PyTree]:
        """The function, with these arrays."""

        def target(output: PyTree) -> PyTree:
            found = jax_compat.evaluate(self.jaxpr, held, jax.tree.leaves(output))
            return jax.tree.unflatten(self.tree, found)

        return target


def traced(
    target: Callable[[PyTree], PyTree], output: PyTree
) -> tuple[Traced, list[Array]]:
    """A target function traced on an output's shapes, and the arrays that it holds."""
    # A function of its own: traces are remembered by function.
    closed, shapes = jax.make_jaxpr(lambda y: chosen(target, y), return_shape=True)(
        output
    )
    jaxpr, held = jax_compat.open_jaxpr(closed)
    code = getattr(target, "__code__", type(target))
    text = jaxpr.pretty_print(source_info=False, name_stack=False, use_color=False)
    # JAX gives a NumPy array that lives on the same constant, whatever is in it now.
    held = [v if isinstance(v, jax.Array) else jnp.array(v) for v in held]
    return Traced(code, text, jax.tree.structure(shapes), jaxpr), held


def joined(static: Target | Traced, traced: PyTree) -> Target:
    """The target of which these are the static and the traced part."""
    if isinstance(static, Traced):
        return static.at(traced)
    return traced if static is None else static


def check_kind(name: str, target: Target) -> None:
    """Refuse what can be no target of any function."""
    given(target)


def given(target: Target) -> Target:
    """The target as the library has it: whole numbers are Python's.

    Raises:
      TargetError: for what can be no target of any function.
    """
    if target is None or callable(target):
        return target
    if isinstance(target, int | np.integer) and not isinstance(target, bool):
        return int(target)
    try:
        leaves = leaves_of("target", target)
    except InputError as error:
        raise TargetError(str(error)) from error
    for name, leaf in leaves:
        dtype: object = getattr(leaf, "dtype", type(leaf).__name__)
        try:
            check_array(name, leaf)
            dtype = jnp.result_type(leaf)
        except InputError:
            dtype = str(dtype)
        if str(dtype) in ("bool", "bool_"):
            raise TargetError(
                f"{name} is a boolean, not a class: give indices, as "
                "target.astype(int) does, or a function of the output."
            )
        if not _is_real(dtype):
            raise TargetError(
                f"{name} is {shown(leaf)} ({dtype}): a target is a class index, an "
                "integer array of them, a float pytree like the output, or a function "
                "of the output."
            )
    if not leaves:
        raise TargetError(
            f"The target {shown(target)} holds nothing: leave it out, or give a class "
            "index, an array of them, or a function of the output."
        )
    return target


def _is_real(dtype: DTypeLike) -> bool:
    if isinstance(dtype, str):
        return False
    return jnp.issubdtype(dtype, jnp.integer) or jnp.issubdtype(dtype, jnp.floating)


def apart(target: Target) -> tuple[Target, Target]:
    """(static, traced): one of them is None."""
    return (target, None) if is_static(target) else (None, target)


def fitting(scores: PyTree, target: Target) -> Target:
    """A list of numbers as the array that it is, unless the output is such a list."""
    if not isinstance(target, list | tuple) or hasattr(target, "_fields"):
        return target
    if jax.tree.structure(target) == jax.tree.structure(scores):
        return target
    numbers = jax.tree.leaves(target)
    if len(numbers) != len(target) or any(map(np.ndim, numbers)):
        return target
    return jnp.stack([jnp.asarray(number) for number in numbers])


def scored(fn: Function, target: Target) -> Function:
    """``fn`` with its explained scores beside its output: ``(scores, output)``."""

    def with_scores(params: PyTree, x: PyTree) -> tuple[PyTree, PyTree]:
        output = called(fn, params, x)
        return (chosen(target, output) if callable(target) else output), output

    return with_scores


def check(scores: PyTree, target: Target, batch: int | None) -> None:
    """Refuse a target that does not fit the scores' shapes, before any work is done.

    Args:
      scores: pytree of ``ShapeDtypeStruct``: the output, or what the target made of it.
      target: as given by the user.
      batch: size of the leading axis that all leaves of x share, if they have one.
    """
    leaves = jax.tree.leaves(scores)
    for leaf in leaves:
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise TargetError(
                f"The explained output has dtype {leaf.dtype}; relevance needs a real "
                "floating-point score. " + _HOW
            )
    if _is_multiplier(target):
        _check_multiplier(scores, target)
        return
    if len(leaves) != 1:
        raise TargetError(f"The output is a pytree of {len(leaves)} arrays. " + _HOW)
    (score,) = leaves
    if callable(target):
        if score.ndim > 1:
            raise TargetError(
                f"The target function returned shape {score.shape}; it must return one "
                "number per example: a scalar or shape (batch,)."
            )
        return
    if score.ndim > 2:
        raise TargetError(f"The output has shape {score.shape}. " + _HOW)
    if target is None:
        return
    if score.ndim == 0:
        raise TargetError("A scalar output has no classes: leave the target out.")
    _check_index(np.shape(target), score.shape)
    if not jax_compat.is_tracer(target):
        classes, indices = score.shape[-1], np.asarray(target)
        if indices.size and (indices.min() < 0 or indices.max() >= classes):
            bad = indices.reshape(-1)[
                ((indices < 0) | (indices >= classes)).reshape(-1)
            ][0]
            raise TargetError(
                f"Target {shown(int(bad))} is out of range: the output has "
                f"{classes} classes, 0 to {classes - 1}."
            )


def _check_index(target_shape: tuple[int, ...], shape: tuple[int, ...]) -> None:
    if target_shape != () and target_shape != shape[:-1]:
        raise TargetError(
            f"Targets of shape {target_shape} do not fit an output of shape {shape}: "
            f"give one class index, or one per example, shape {shape[:-1]}."
        )


def _is_multiplier(target: Target) -> bool:
    if is_static(target):
        return False
    leaves = jax.tree.leaves(target)
    return len(leaves) != 1 or jnp.issubdtype(jnp.result_type(leaves[0]), jnp.floating)


def _check_multiplier(scores: PyTree, target: Target) -> None:
    wanted = jax.tree.map(lambda leaf: leaf.shape, scores)
    given = jax.tree.map(np.shape, target)
    if given != wanted:
        leaves = jax.tree.leaves(target)
        if not any(jnp.issubdtype(jnp.result_type(v), jnp.floating) for v in leaves):
            raise TargetError(
                "A pytree of integers is no target; give the labels as one array, "
                "such as jnp.array([0, 2])."
            )
        raise TargetError(
            "A target of floats is the multiplier of each output, so its shape must "
            f"be the output's, {wanted}; got {given}."
        )


def seeds(
    scores: Sequence[Array], target: Target, batch: int | None, seed: str
) -> list[Promise]:
    """The promises that start the reverse pass: one for each leaf of the scores.

    Seed ``"score"``: multiplier 1 at the target, so that relevance sums to the score;
    ``"one"``: relevance 1 there.
    """
    if _is_multiplier(target):
        starts = [jnp.asarray(m, s.dtype) for m, s in _paired(scores, target)]
    else:
        starts = [_one_hot(scores[0], target, batch)]
    if seed == "one":
        return [Promise(value=start) for start in starts]
    return [Promise(multiplier=start) for start in starts]


def _paired(scores: Sequence[Array], target: Target) -> list[tuple[Array, Array]]:
    return list(zip(jax.tree.leaves(target), scores, strict=True))


def _one_hot(score: Array, target: Target, batch: int | None) -> Array:
    per_example = score.ndim == 1 and batch == score.shape[0]
    if callable(target) or score.ndim == 0 or (target is None and per_example):
        return jnp.ones_like(score)
    if target is None:
        return _marked(score, lax.argmax(score, score.ndim - 1, np.int32))
    index = jnp.broadcast_to(jnp.asarray(target), score.shape[:-1])
    # A traced index cannot be refused; NaN shows it where zeros would hide it.
    inside = (index >= 0) & (index < score.shape[-1])
    return jnp.where(inside[..., None], _marked(score, index), jnp.nan)


def _marked(score: Array, index: Array) -> Array:
    """1 at an index of the last axis, 0 elsewhere."""
    classes = lax.broadcasted_iota(index.dtype, score.shape, score.ndim - 1)
    index = lax.broadcast_in_dim(index, score.shape, tuple(range(index.ndim)))
    return lax.convert_element_type(lax.eq(classes, index), score.dtype)
