"""Flax: Linen modules with their variables, and NNX models."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlrp.arguments import leaves_of, shown
from jlrp.errors import IntegrationError
from jlrp.integrations._functions import (
    ModelFunction,
    check_model,
    framework,
    inference_arguments,
)
from jlrp.integrations._names import named_class, scope, with_names
from jlrp.typing import PyTree

__all__ = [
    "linen",
    "nnx",
]


def linen(
    module: Any,
    variables: PyTree,
    *,
    method: str | Callable[..., PyTree] | None = None,
    output: Callable[[PyTree], PyTree] | None = None,
    **kwargs: object,
) -> tuple[ModelFunction, PyTree]:
    """A Linen module and its variables as ``(fn, params)``.

    Linen puts the paths of modules into name scopes by itself, below the name of the
    outermost class: ``"ResNet/block_1/conv"``.

    Args:
      module: a ``flax.linen.Module``.
      variables: what ``module.init`` returned, or its ``jax.eval_shape``: all
        collections are the params, and none is changed.
      method: name of the method, or the method, to explain; ``__call__`` if None.
      output: picks what is explained from what the module returns.
      **kwargs: further arguments of the call. ``train``, ``training``,
        ``is_training``, ``deterministic``, ``inference`` and ``use_running_average``
        choose inference if the call has them and they are not given.

    Returns:
      ``fn(params, x)`` and its params. x is the first argument, a tuple of arguments,
      or a dict of keyword arguments.

    Raises:
      IntegrationError: if Flax is missing; when called, if the module updates its batch
        statistics, so is not in inference mode.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, jlrp
      >>> from jlrp.integrations.flax import linen
      >>> model, x = nn.Dense(2), jnp.ones((1, 3))
      >>> fn, params = linen(model, model.init(jax.random.key(0), x))
      >>> jlrp.relevance(fn, params, x).shape
      (1, 3)
    """
    flax = framework("flax", "flax")
    classes = framework("flax.linen", "flax")
    check_model(module, "module", classes.Module, "a flax.linen.Module")
    if not isinstance(variables, Mapping):
        raise IntegrationError(
            f"variables is {shown(variables)}; give what module.init returned."
        )
    leaves_of("variables", variables)
    errors = flax.errors
    refused = (
        errors.ModifyScopeVariableError,
        errors.ScopeVariableNotFoundError,
        errors.ScopeCollectionNotFound,
    )
    called = method if callable(method) else getattr(type(module), method or "__call__")

    def apply(variables: PyTree, *args: PyTree, **inputs: PyTree) -> PyTree:
        given = {**kwargs, **inputs}
        options = inference_arguments(called, (module, *args), given)
        # A module that has the choice as a field takes it from there, and only there.
        options = {k: v for k, v in options.items() if getattr(module, k, None) is None}
        call = {**given, **options, "method": method}
        try:
            return module.apply(variables, *args, **call)
        except refused:
            # The module insists on writing, say to a cache: let it, forget what it
            # wrote. Batch statistics are written in training mode alone.
            writable = flax.core.DenyList(("params", "batch_stats"))
        try:
            return module.apply(variables, *args, **call, mutable=writable)[0]
        except errors.ModifyScopeVariableError as error:
            raise IntegrationError(
                f"{type(module).__name__} updates its batch statistics, so it is in "
                "training mode, whose output depends on the rest of the batch. Pass "
                "what switches it off, such as use_running_average=True."
            ) from error

    return ModelFunction(apply, (linen, module, method, kwargs), output), variables


def nnx(
    model: Any,
    *,
    output: Callable[[PyTree], PyTree] | None = None,
    **kwargs: object,
) -> tuple[ModelFunction, PyTree]:
    """An NNX model as ``(fn, params)``; attribute paths name its operations.

    The names are those of submodules, such as ``"blocks/0/attn/query"``. A module that
    is stored in two places has the name of the first. ``fn`` works on copies in eval
    mode: the model is not changed, and changes to it later are not seen.

    Args:
      model: a ``flax.nnx.Module``, also one made by ``nnx.eval_shape``.
      output: picks what is explained from what the model returns.
      **kwargs: further arguments of the call. ``train``, ``deterministic`` and the like
        choose inference if the call has them and they are not given.

    Returns:
      ``fn(params, x)`` and its params, an ``nnx.State`` of arrays without random state,
      which belongs to fn. Params may also be what was saved of the model, such as
      ``nnx.to_pure_dict(nnx.state(model, nnx.Param))`` or a checkpoint of it. x is the
      first argument, a tuple of arguments, or a dict of keyword arguments.

    Raises:
      IntegrationError: if Flax is missing, or the model is none; when called, for
        params that lack some of the model's, by their paths.

    Example:
      >>> import jax.numpy as jnp, jlrp
      >>> from flax import nnx
      >>> from jlrp.integrations import flax
      >>> fn, params = flax.nnx(nnx.Linear(3, 2, rngs=nnx.Rngs(0)))
      >>> jlrp.relevance(fn, params, jnp.ones((1, 3))).shape
      (1, 3)
    """
    api = framework("flax.nnx", "flax")

    check_model(model, "model", api.Module, "a flax.nnx.Module")
    graph, random, state = api.split(model, api.RngState, ...)
    random = _concrete(random)
    params = api.as_pure(state)

    def call(state: PyTree, *args: PyTree, **inputs: PyTree) -> PyTree:
        state = _fitting(state, params, random)
        given = {**kwargs, **inputs}
        given |= inference_arguments(type(model).__call__, (model, *args), given)

        def run(named: bool) -> PyTree:
            # Without a copy, jax.grad of this dies of variables of another trace.
            copy = api.merge(graph, random, state, copy=True)
            copy.eval()
            if named:
                _name(copy, api)
            with scope(""):
                return copy(*args, **given)

        return with_names(run)

    return ModelFunction(call, (nnx, graph, kwargs), output), params


def _concrete(random: PyTree) -> PyTree:
    """Random keys and counts; of a model of shapes alone those of some seed."""

    def of(leaf: Any) -> object:
        if not isinstance(leaf, jax.ShapeDtypeStruct):
            return leaf
        if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jnp.zeros(leaf.shape, leaf.dtype)
        count = int(np.prod(leaf.shape))
        return jax.random.split(jax.random.key(0), count).reshape(leaf.shape)

    return jax.tree.map(of, random)


def _fitting(given: PyTree, params: PyTree, random: PyTree) -> PyTree:
    """Given params in the structure of the model's own, matched by their paths.

    What was saved has the paths of the model, but may be a plain dict with strings for
    the indices of lists; random state in it is left out.
    """
    structure = jax.tree.structure(params)
    if jax.tree.structure(given) == structure:
        return given
    found = _by_path(given)
    names = list(_by_path(params))
    missing = [name for name in names if name not in found]
    unknown = [name for name in found if name not in names]
    unknown = [name for name in unknown if name not in _by_path(random)]
    if missing or unknown:
        lacks = f" It lacks {_listed(missing)}." if missing else ""
        has = f" It has {_listed(unknown)}, which the model has not." if unknown else ""
        raise IntegrationError(
            f"params are not those of the model.{lacks}{has} Give the params that "
            "flax.nnx returned, or a checkpoint of nnx.state(model) without random "
            "state: of nnx.Param, and of nnx.BatchStat where the model has it."
        )
    return jax.tree.unflatten(structure, [found[name] for name in names])


def _by_path(tree: PyTree) -> dict[str, PyTree]:
    """Leaves by their paths, ``"layers/0/kernel"``."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value"): x
        for path, x in jax.tree_util.tree_leaves_with_path(tree)
    }


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more


def _name(model: Any, api: Any) -> None:
    for path, module in api.iter_modules(model):
        if path and not isinstance(module, (api.List, api.Dict)):
            cls, name = type(module), "/".join(map(str, path))
            options = {} if cls._pytree__is_pytree else {"pytree": False}
            named = named_class(cls, name, api.Module, **options)
            object.__setattr__(module, "__class__", named)
