"""What a user gave, refused by its name where it is no such thing.

Functions of the user's run through ``called``: what they raise about arguments that do
not fit says which function it was, with what, and what to check.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlrp.errors import InputError, JlrpError, TargetError

# Models of these libraries are no functions of params and x; what makes one of them.
_INTEGRATIONS = {
    "equinox": "jlrp.integrations.equinox.module(model)",
    "flax": "jlrp.integrations.flax.nnx(model), or linen(module, variables)",
    "haiku": "jlrp.integrations.haiku.transformed(transformed, params)",
    "keras": "jlrp.integrations.keras.model(model)",
    "torch": "jlrp.integrations.torchax.module(model)",
}


def check_function(fn: Any, name: str = "fn") -> None:
    """Refuse what cannot be called.

    Raises:
      InputError: naming the argument.
    """
    if not callable(fn):
        raise InputError(
            f"{name} is a {type(fn).__name__}, not a function: give a function "
            f"{name}(params, x) that returns the scores.{_instead_of(fn)}"
        )


def check_choice(name: str, value: Any, choices: Any) -> None:
    """Refuse a word that is none of the choices.

    Raises:
      InputError: naming the argument and the choices.
    """
    if not isinstance(value, str) or value not in choices:
        raise InputError(f"{name} must be one of {tuple(choices)}; got {shown(value)}.")


def check_array(name: str, leaf: Any, abstract: bool = False) -> None:
    """Refuse what is no array of numbers; ``abstract``: shapes of some are fine.

    Raises:
      InputError: naming the argument.
    """
    kinds = (jax.Array, np.ndarray, np.generic, float, int)
    if not isinstance(leaf, (*kinds, jax.ShapeDtypeStruct) if abstract else kinds):
        raise InputError(
            f"{name} is a {type(leaf).__name__}, not an array. Close over what is not "
            "an array, or split it from the model."
        )
    try:
        jnp.result_type(leaf)
        if isinstance(leaf, int | float):
            jnp.asarray(leaf)
    except (TypeError, ValueError, OverflowError) as error:
        dtype = getattr(leaf, "dtype", "none that an array can have")
        raise InputError(
            f"{name} is not an array of numbers: its dtype is {dtype}. Convert it to "
            "floats or integers that JAX has."
        ) from error


def called(fn: Callable[..., Any], params: Any, x: Any) -> Any:
    """``fn(params, x)``, which must be a pytree of arrays.

    Raises:
      InputError: what the function raised, with the arguments that it was given.
      TargetError: for an output that has something else in it.
    """
    with _saying_what_failed(fn, params, x):
        output = fn(params, x)
    for path, leaf in jax.tree_util.tree_leaves_with_path(output):
        if _is_number(leaf):
            continue
        where = jax.tree_util.keystr(path)
        raise TargetError(
            f"fn(params, x){where} is a {type(leaf).__name__}, which is no array. "
            "Return the scores alone: fn=lambda params, x: model(params, x).logits, "
            "for example."
        )
    return output


def output_of(fn: Callable[..., Any], params: Any, x: Any) -> Any:
    """The shapes of ``fn(params, x)``; JAX remembers them for each function.

    Raises:
      InputError: what the function raised, with the arguments that it was given.
    """
    with _saying_what_failed(fn, params, x):
        return jax.eval_shape(fn, params, x)


@contextlib.contextmanager
def _saying_what_failed(fn: Any, params: Any, x: Any) -> Iterator[None]:
    try:
        yield
    except (JlrpError, jax.errors.UnexpectedTracerError):
        raise
    except Exception as error:
        raise InputError(
            f"fn(params, x) raised {type(error).__name__}: {first_lines(error)} It was "
            f"called with params = {shapes_of(params)} and x = {shapes_of(x)}: check "
            f"that these are as the function takes them, in this order."
            f"{_instead_of(fn)}"
        ) from error


def _is_number(leaf: Any) -> bool:
    try:
        check_array("", leaf)
    except InputError:
        return isinstance(leaf, complex)
    return True


def chosen(target: Callable[[Any], Any], output: Any) -> Any:
    """What a target function makes of the output.

    Raises:
      TargetError: what the target function raised, with the output's shapes.
    """
    try:
        found = target(output)
        leaves = jax.tree.leaves(found)
    except (JlrpError, jax.errors.UnexpectedTracerError):
        raise
    except Exception as error:
        raise TargetError(
            f"The target function raised {type(error).__name__}: {first_lines(error)} "
            f"It was called with the output, {shapes_of(output)}."
        ) from error
    if not leaves or not all(map(_is_number, leaves)):
        raise TargetError(
            f"The target function returned {shown(found)}; it must return one number "
            "per example: a scalar or shape (batch,)."
        )
    return found


def _instead_of(fn: Any) -> str:
    """The integration of the library that a model is of, as a hint; or nothing."""
    for cls in type(fn).__mro__:
        how = _INTEGRATIONS.get(cls.__module__.partition(".")[0])
        if how is not None:
            return f" fn is a model: fn, params = {how} makes a function of it."
    return ""


def refuses_ended_traces(public: Callable[..., Any]) -> Callable[..., Any]:
    """JAX's error about a tracer that has left its trace, as an ``InputError``."""

    @functools.wraps(public)
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return public(*args, **kwargs)
        except jax.errors.UnexpectedTracerError as error:
            raise InputError(
                "An argument, or something that a function closed over, is a tracer of "
                "a trace that has ended (of a jit, grad or vmap before). Return such "
                f"values from the function that made them. {first_lines(error)}"
            ) from error

    return run


def first_lines(error: BaseException) -> str:
    """What an error says, in one paragraph that ends as a sentence."""
    text = " ".join(str(error).split("\n--------------------")[0].split())
    text = text if len(text) <= 400 else text[:397] + "..."
    return text if text.endswith((".", "...", "!", "?")) else f"{text}."


def shapes_of(tree: Any) -> str:
    """A pytree of arrays in short: ``{'w': float32[3, 2]}``."""

    def of(leaf: Any) -> Any:
        shape = getattr(leaf, "shape", None)
        return _Text(f"{leaf.dtype}{list(shape)}" if shape is not None else shown(leaf))

    text = repr(jax.tree.map(of, tree))
    return text if len(text) <= 200 else text[:197] + "..."


class _Text:
    def __init__(self, text: str):
        self.text = text

    def __repr__(self) -> str:
        return self.text


def shown(value: Any) -> str:
    """A value in a message: an array's shape, else its repr, cut off."""
    if isinstance(value, jax.Array | np.ndarray):
        return f"an array {value.dtype}{list(value.shape)}"
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else text[:77] + "..."


def is_number(value: Any) -> bool:
    """Whether it is one real number, not a boolean."""
    kinds = (int, float, np.integer, np.floating)
    return isinstance(value, kinds) and not isinstance(value, bool)


def is_whole(value: Any) -> bool:
    """Whether it is one whole number, not a boolean."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)

