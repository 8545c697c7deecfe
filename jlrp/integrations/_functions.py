"""What the integrations share: calling conventions, cache keys, missing frameworks."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from jlrp.arguments import shown
from jlrp.errors import IntegrationError
from jlrp.typing import PyTree

# Arguments that choose inference, as the frameworks call them.
INFERENCE = {
    "train": False,
    "training": False,
    "is_training": False,
    "deterministic": True,
    "inference": True,
    "use_running_average": True,
}


def framework(name: str, extra: str) -> Any:
    """Import a framework, or say how to install it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise IntegrationError(
            f"This integration needs {name}, which cannot be imported ({error}). "
            f"Install it with: pip install 'jlrp[{extra}]'"
        ) from error


def check_model(model: object, name: str, kind: type, of: str) -> None:
    """Refuse what is no model of a framework.

    Raises:
      IntegrationError: naming the argument.
    """
    if not isinstance(model, kind):
        raise IntegrationError(f"{name} is {shown(model)}; give {of}.")


class ModelFunction:
    """``fn(params, x)`` of a model: ``run(params, *args, **kwargs)``, then ``output``.

    x is the first argument, a tuple of positional arguments, or a dict of keyword
    arguments; if ``whole``, it is the first argument in any case. Functions with equal
    ``key``s are equal, so that jlrp compiles once.
    """

    def __init__(
        self,
        run: Callable[..., PyTree],
        key: object,
        output: Callable[[PyTree], PyTree] | None = None,
        whole: bool = False,
    ):
        self._run, self._output, self._whole = run, output, whole
        self._key = comparable((key, output))
        self._hash = hash(self._key)

    def __call__(self, params: PyTree, x: PyTree) -> PyTree:
        args, kwargs = ((x,), {}) if self._whole else arguments(x)
        out = self._run(params, *args, **kwargs)
        return out if self._output is None else self._output(out)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ModelFunction) and self._key == other._key

    def __hash__(self) -> int:
        return self._hash


def arguments(x: PyTree) -> tuple[tuple[PyTree, ...], dict[str, PyTree]]:
    """x as positional and keyword arguments."""
    if isinstance(x, tuple) and not hasattr(x, "_fields"):
        return x, {}
    if isinstance(x, Mapping):
        return (), dict(x)
    return (x,), {}


def inference_arguments(
    method: Callable[..., object], args: tuple[object, ...], given: Mapping[str, object]
) -> dict[str, object]:
    """The arguments that switch a function of a class to inference, if it has any.

    ``args``, the instance among them, and ``given`` are what the user decides.
    """
    names = list(parameters(method))
    free = set(names[len(args) :]) - set(given)
    if "inference" in names:
        free.discard("deterministic")  # of Equinox, which warns that it is deprecated
    return {name: value for name, value in INFERENCE.items() if name in free}


def parameters(method: Callable[..., object]) -> Mapping[str, inspect.Parameter]:
    """The parameters of a function by name; none if it does not say."""
    try:
        return inspect.signature(method).parameters
    except (TypeError, ValueError):  # written in C
        return {}


class Same:
    """Equal to itself alone; keeps alive what it is the key of."""

    def __init__(self, thing: object):
        self._thing = thing

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and self._thing is other._thing

    def __hash__(self) -> int:
        return id(self._thing)


def comparable(thing: object) -> object:
    """A hashable stand-in: by value for plain data, else by identity.

    Types count: 1, 1.0 and True are equal, but trace to different programs.
    """
    if isinstance(thing, Mapping):
        items = thing.items()
        return type(thing), tuple((comparable(k), comparable(v)) for k, v in items)
    if isinstance(thing, (tuple, list)):
        return type(thing), tuple(map(comparable, thing))
    try:
        hash(thing)
    except TypeError:
        return Same(thing)
    return type(thing), thing
