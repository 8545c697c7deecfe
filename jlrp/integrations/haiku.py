"""Haiku: transformed functions with their parameters."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from jlrp.errors import IntegrationError
from jlrp.integrations._functions import ModelFunction, framework
from jlrp.typing import PyTree

__all__ = [
    "transformed",
]


def transformed(
    transformed: Any,
    params: PyTree,
    state: PyTree = None,
    *,
    rng: PyTree = None,
    output: Callable[[PyTree], PyTree] | None = None,
    **kwargs: object,
) -> tuple[ModelFunction, PyTree]:
    """A transformed Haiku function and its parameters as ``(fn, params)``.

    Haiku puts the paths of modules into name scopes by itself: ``"mlp/linear_0"``.

    Args:
      transformed: what ``hk.transform`` or ``hk.transform_with_state`` returned, with
        ``hk.without_apply_rng`` or not.
      params: what its ``init`` returned, or the ``jax.eval_shape`` of that.
      state: the state, of a transform with state. It is read, its update dropped.
      rng: key for a function that draws; a constant of the explanation.
      output: picks what is explained from what the function returns.
      **kwargs: further arguments of the call, such as ``is_training=False``: Haiku
        hides which ones the function has, so none is set by itself.

    Returns:
      ``fn(params, x)`` and its params: ``params``, with a state ``(params, state)``. x
      is the first argument, a tuple of arguments, or a dict of keyword arguments.

    Raises:
      IntegrationError: if Haiku is missing, ``transformed`` is something else, or a
        transform with state comes without one.

    Example:
      >>> import haiku as hk, jax, jax.numpy as jnp, jlrp
      >>> from jlrp.integrations import haiku
      >>> model, x = hk.transform(lambda x: hk.Linear(2)(x)), jnp.ones((1, 3))
      >>> fn, params = haiku.transformed(model, model.init(jax.random.key(0), x))
      >>> jlrp.relevance(fn, params, x).shape
      (1, 3)
    """
    hk = framework("haiku", "haiku")
    stateful = isinstance(transformed, hk.TransformedWithState)
    if not stateful and not isinstance(transformed, hk.Transformed):
        raise IntegrationError(
            f"transformed is a {type(transformed).__name__}; pass what hk.transform or "
            "hk.transform_with_state returned, not the function or module itself."
        )
    if stateful == (state is None):
        made, wanted = ("_with_state", "a") if stateful else ("", "no")
        raise IntegrationError(
            f"hk.transform{made} goes with {wanted} state: pass it as the third "
            "argument if there is one, as init returned it."
        )
    draws = "rng" in inspect.signature(transformed.apply).parameters
    keys = (rng,) if draws else ()

    def apply(params: PyTree, *args: PyTree, **inputs: PyTree) -> PyTree:
        variables = params if stateful else (params,)
        out = transformed.apply(*variables, *keys, *args, **kwargs, **inputs)
        return out[0] if stateful else out

    key = ("haiku", transformed.apply, rng, kwargs)
    return ModelFunction(apply, key, output), (params, state) if stateful else params
