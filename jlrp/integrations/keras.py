"""Keras 3 models on the JAX backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jlrp.errors import IntegrationError
from jlrp.integrations._functions import (
    ModelFunction,
    Same,
    check_model,
    framework,
    inference_arguments,
)
from jlrp.typing import PyTree

__all__ = [
    "model",
]


def model(
    model: Any,
    *,
    output: Callable[[PyTree], PyTree] | None = None,
    **kwargs: object,
) -> tuple[ModelFunction, PyTree]:
    """A Keras model as ``(fn, params)``, in inference mode.

    Keras puts the names of layers into name scopes by itself: ``"block_1/conv"``.
    A classifier that ends in a softmax is better explained before it: build it with
    ``classifier_activation=None`` or leave out the last activation.

    Args:
      model: a built ``keras.Model`` (or layer), on the JAX backend. Its variables are
        read now: after more training, call this again.
      output: picks what is explained from what the model returns.
      **kwargs: further arguments of the call, such as ``mask=``.

    Returns:
      ``fn(params, x)`` and its params, ``{"trainable": [...], "non_trainable":
      [...]}``. x is the input of a functional or sequential model, whatever its
      structure; for other models it is the first argument, a tuple of arguments, or a
      dict of keyword arguments.

    Raises:
      IntegrationError: if Keras is missing, runs on another backend, or the model has
        no variables yet.

    Example:
      >>> import os
      >>> os.environ["KERAS_BACKEND"] = "jax"
      >>> import jax.numpy as jnp, jlrp, keras as K
      >>> from jlrp.integrations import keras
      >>> net = K.Sequential([K.layers.Input((3,)), K.layers.Dense(2)])
      >>> fn, params = keras.model(net)
      >>> jlrp.relevance(fn, params, jnp.ones((1, 3))).shape
      (1, 3)
    """
    keras = framework("keras", "keras")
    check_model(model, "model", keras.Layer, "a keras.Model or keras.Layer")
    if (backend := keras.backend.backend()) != "jax":
        raise IntegrationError(
            f"Keras runs on the {backend} backend, which jlrp cannot trace. Set the "
            'environment variable KERAS_BACKEND to "jax" before keras is imported.'
        )
    if not model.built:
        raise IntegrationError(
            f"The model {model.name!r} is not built, so it has no variables. Call it "
            "once on an input, or model.build(input_shape)."
        )
    # Functional and sequential models know their inputs, and take them as one.
    whole = hasattr(model, "inputs") and hasattr(model, "outputs")

    def call(params: PyTree, *args: PyTree, **inputs: PyTree) -> PyTree:
        given = {**kwargs, **inputs}
        given |= inference_arguments(type(model).call, (model, *args), given)
        trainable, non_trainable = params["trainable"], params["non_trainable"]
        return model.stateless_call(trainable, non_trainable, *args, **given)[0]

    params = {
        "trainable": [v.value for v in model.trainable_variables],
        "non_trainable": [v.value for v in model.non_trainable_variables],
    }
    key = ("keras", Same(model), kwargs)
    return ModelFunction(call, key, output, whole=whole), params
