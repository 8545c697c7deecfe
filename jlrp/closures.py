"""What a function reads beside its arguments: the arrays that it holds.

They are constants of a compiled program, so that another array in their place asks for
another program. Looked through: cells and defaults of functions, arguments of
``functools.partial``, what a bound method is bound to, the globals that code names,
what ``functools.wraps`` (and so ``jax.jit``) wrapped; in these lists, tuples, dicts and
attributes of objects, classes and modules. Not the insides of libraries, nor more than
``_MOST`` objects.
"""

from __future__ import annotations

import functools
import os
import sys
import sysconfig
from collections.abc import Iterator
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import jax
import numpy as np

_MOST = 2000
_PLAIN = (bool, bytes, complex, float, int, str, type(None), np.generic, np.dtype)
# Objects of these hold no arrays that a traced function reads, or very many others.
_CLOSED = frozenset(
    ("jax", "jaxlib", "keras", "logging", "numpy", "tensorflow", "threading", "torch")
)
_LIBRARIES = tuple(
    {sysconfig.get_paths()[name] for name in ("stdlib", "purelib", "platlib")}
    | {os.path.dirname(__file__)}
)


def arrays_of(function: Any) -> list[Any]:
    """The arrays that a function holds, in an order that is that of its structure."""
    found: list[Any] = []
    seen: set[int] = set()
    stack = [function]
    while stack and len(seen) < _MOST:
        held = stack.pop()
        if isinstance(held, _PLAIN) or id(held) in seen:
            continue
        seen.add(id(held))
        if isinstance(held, np.ndarray | jax.Array):
            found.append(held)
        else:
            stack += _parts(held)
    return found


def _parts(held: Any) -> Iterator[Any]:
    if isinstance(held, FunctionType):
        yield from _of_function(held)
    elif isinstance(held, functools.partial):
        yield from (held.func, held.args, held.keywords)
    elif isinstance(held, MethodType):
        yield from (held.__func__, held.__self__)
    elif isinstance(held, dict):
        yield from held.values()
    elif isinstance(held, list | tuple | set | frozenset):
        yield from held
    elif isinstance(held, staticmethod | classmethod):
        yield held.__func__
    elif isinstance(held, type):
        if not _in_library(held):
            yield from vars(held).values()
    elif (wrapped := getattr(held, "__wrapped__", None)) is not None:
        yield wrapped
    elif not isinstance(held, ModuleType) and not _is_closed(type(held)):
        yield from _attributes(held)
        yield type(held)


def _of_function(function: FunctionType) -> Iterator[Any]:
    if function.__module__ and function.__module__.split(".")[0] == "jlrp":
        return  # an integration's: what it reads of a model is among its parameters
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # not set yet
            continue
    yield from function.__defaults__ or ()
    yield from (function.__kwdefaults__ or {}).values()
    if (wrapped := function.__dict__.get("__wrapped__")) is not None:
        yield wrapped
    if _is_library(function.__code__.co_filename):
        return
    names, outside = _names(function.__code__), function.__globals__
    for name in names:
        held = outside.get(name)
        if not isinstance(held, ModuleType):
            yield held
        elif not _is_library(getattr(held, "__file__", None)):
            yield from (vars(held).get(other) for other in names)


@functools.lru_cache(maxsize=4096)
def _names(code: CodeType) -> tuple[str, ...]:
    """The globals and attributes that code names, with the functions made in it."""
    inner = [c for c in code.co_consts if isinstance(c, CodeType)]
    return tuple(
        dict.fromkeys((*code.co_names, *(n for c in inner for n in _names(c))))
    )


@functools.lru_cache(maxsize=4096)
def _is_library(filename: str | None) -> bool:
    """Whether a file is no user's; of modules without one, that is so too."""
    return filename is None or filename.startswith(_LIBRARIES)


@functools.lru_cache(maxsize=4096)
def _in_library(cls: type) -> bool:
    module = sys.modules.get(cls.__module__)
    own = cls.__module__ == "__main__"
    return not own and _is_library(getattr(module, "__file__", None))


@functools.lru_cache(maxsize=4096)
def _is_closed(cls: type) -> bool:
    return cls.__module__.split(".")[0] in _CLOSED or cls.__module__ == "builtins"


def _attributes(held: Any) -> Iterator[Any]:
    yield from getattr(held, "__dict__", {}).values()
    for name in _slots(type(held)):
        yield getattr(held, name, None)


@functools.lru_cache(maxsize=4096)
def _slots(cls: type) -> tuple[str, ...]:
    found: dict[str, None] = {}
    for base in cls.__mro__:
        slots = vars(base).get("__slots__", ())
        found |= dict.fromkeys((slots,) if isinstance(slots, str) else slots)
    return tuple(found)
