"""Flax: Linen modules with their variables, and NNX models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jlrp.errors import IntegrationError
from jlrp.integrations._functions import Function, framework, inference_arguments
from jlrp.integrations._names import named_class, scope, with_names


def linen(
    module: Any,
    variables: Any,
    *,
    method: str | Callable[..., Any] | None = None,
    output: Callable[[Any], Any] | None = None,
    **kwargs: Any,
) -> tuple[Function, Any]:
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
    errors = flax.errors
    refused = (
        errors.ModifyScopeVariableError,
        errors.ScopeVariableNotFoundError,
        errors.ScopeCollectionNotFound,
    )
    called = method if callable(method) else getattr(type(module), method or "__call__")

    def apply(variables: Any, *args: Any, **inputs: Any) -> Any:
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

    return Function(apply, (linen, module, method, kwargs), output), variables


def nnx(
    model: Any,
    *,
    output: Callable[[Any], Any] | None = None,
    **kwargs: Any,
) -> tuple[Function, Any]:
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
      ``fn(params, x)`` and its params, an ``nnx.State`` of arrays. x is the first
      argument, a tuple of arguments, or a dict of keyword arguments.

    Raises:
      IntegrationError: if Flax is missing.

    Example:
      >>> import jax.numpy as jnp, jlrp
      >>> from flax import nnx
      >>> from jlrp.integrations import flax
      >>> fn, params = flax.nnx(nnx.Linear(3, 2, rngs=nnx.Rngs(0)))
      >>> jlrp.relevance(fn, params, jnp.ones((1, 3))).shape
      (1, 3)
    """
    api = framework("flax.nnx", "flax")

    graph, state = api.split(model)

    def call(state: Any, *args: Any, **inputs: Any) -> Any:
        given = {**kwargs, **inputs}
        given |= inference_arguments(type(model).__call__, (model, *args), given)

        def run(named: bool) -> Any:
            # Without a copy, jax.grad of this dies of variables of another trace.
            copy = api.merge(graph, state, copy=True)
            copy.eval()
            if named:
                _name(copy, api)
            with scope(""):
                return copy(*args, **given)

        return with_names(run)

    return Function(call, (nnx, graph, kwargs), output), api.as_pure(state)


def _name(model: Any, api: Any) -> None:
    for path, module in api.iter_modules(model):
        if path and not isinstance(module, (api.List, api.Dict)):
            cls, name = type(module), "/".join(map(str, path))
            options = {} if cls._pytree__is_pytree else {"pytree": False}
            named = named_class(cls, name, api.Module, **options)
            object.__setattr__(module, "__class__", named)
