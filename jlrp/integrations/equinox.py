"""Equinox modules."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import jax

from jlrp.integrations._functions import (
    ModelFunction,
    check_model,
    framework,
    inference_arguments,
    parameters,
)
from jlrp.integrations._names import named_class, scope, with_names
from jlrp.typing import PyTree

__all__ = [
    "module",
]


def module(
    model: Any,
    *,
    state: PyTree = None,
    batched: bool = False,
    output: Callable[[PyTree], PyTree] | None = None,
    **kwargs: object,
) -> tuple[ModelFunction, PyTree]:
    """An Equinox module as ``(fn, params)``; attribute paths name its operations.

    The names are those of submodules, such as ``"layers/0/attention/query_proj"``, also
    of those that the model calls under ``jax.vmap``. Below them stand the names that
    Equinox gives to its own layers, ``"eqx.nn.Linear"``.

    Args:
      model: an ``equinox.Module``, also one made by ``equinox.filter_eval_shape``. It
        is put into inference mode; the model itself is not changed.
      state: its ``equinox.nn.State``, if it has one. It is read, never updated.
      batched: whether the leading axis of all of x is a batch, over which the model,
        written for one example, is mapped.
      output: picks what is explained from what the model returns (without the state).
      **kwargs: further arguments of the call. ``inference``, ``deterministic`` and the
        like choose inference if the call has them and they are not given. Where it
        insists on a ``key``, it gets one.

    Returns:
      ``fn(params, x)`` and its params: the arrays of the model, as a model; with a
      state the pair of these and the arrays of the state. x is the first argument, a
      tuple of arguments, or a dict of keyword arguments.

    Raises:
      IntegrationError: if Equinox is missing.

    Example:
      >>> import equinox as eqx, jax, jax.numpy as jnp, jlrp
      >>> from jlrp.integrations import equinox
      >>> model = eqx.nn.Linear(3, 2, key=jax.random.key(0))
      >>> fn, params = equinox.module(model, batched=True)
      >>> jlrp.relevance(fn, params, jnp.ones((5, 3))).shape
      (5, 3)
    """
    eqx = framework("equinox", "equinox")
    check_model(model, "model", eqx.Module, "an equinox.Module")

    def is_array(leaf: object) -> bool:
        return eqx.is_array(leaf) or isinstance(leaf, jax.ShapeDtypeStruct)

    stateful, method = state is not None, type(model).__call__
    whole = eqx.nn.inference_mode(model)
    params, static = eqx.partition((whole, state) if stateful else whole, is_array)

    def call(params: PyTree, *args: PyTree, **inputs: PyTree) -> PyTree:
        given = {**kwargs, **inputs}
        given |= inference_arguments(method, (model, *args), given)
        free = dict(list(parameters(method).items())[1 + len(args) :])
        if "key" in free and free["key"].default is inspect.Parameter.empty:
            # In inference mode nothing depends on it.
            given.setdefault("key", jax.random.key(0))

        def run(named: bool) -> PyTree:
            combined = eqx.combine(params, static)
            net, now = combined if stateful else (combined, None)
            if named:
                _name(net, eqx.Module)
            with scope(""):
                if not stateful:
                    return net(*args, **given)
                if "state" in free:
                    return net(*args, state=now, **given)[0]
                return net(*args, now, **given)[0]

        return with_names(run)

    def mapped(params: PyTree, *args: PyTree, **inputs: PyTree) -> PyTree:
        return jax.vmap(lambda a, i: call(params, *a, **i))(args, inputs)

    key = (module, jax.tree.flatten(static), stateful, batched, kwargs)
    return ModelFunction(mapped if batched else call, key, output), params


def _name(node: Any, base: type, path: str = "") -> None:
    """Name the modules inside a module that are nodes of its pytree."""

    def is_inner(leaf: object) -> bool:
        return leaf is not node and isinstance(leaf, base)

    for keys, leaf in jax.tree_util.tree_leaves_with_path(node, is_leaf=is_inner):
        if is_inner(leaf):
            name = jax.tree_util.keystr(keys, simple=True, separator="/")
            inner = f"{path}/{name}" if path else name
            _name(leaf, base, inner)
            object.__setattr__(leaf, "__class__", named_class(type(leaf), inner, base))
