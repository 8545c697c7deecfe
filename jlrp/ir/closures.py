"""What a function reads beside its arguments: the arrays that it holds.

They are constants of a compiled program, so that another array in their place asks for
another program. Looked through: cells and defaults of functions, arguments of
``functools.partial``, what a bound method is bound to, the globals that code names,
what ``functools.wraps`` (and so ``jax.jit``) wrapped; in these lists, tuples, dicts and
attributes of objects, classes and modules. Not the insides of libraries, nor more than
``_MOST`` objects.
"""

from __future__ import annotations

import builtins
import dis
import functools
import os
import sys
import sysconfig
from collections.abc import Iterator
from types import CodeType, FunctionType, MethodType, ModuleType

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


def arrays_of(function: object) -> list[object]:
    """The arrays that a function holds, in an order that is that of its structure."""
    found: list[object] = []
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


def _parts(held: object) -> Iterator[object]:
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


def _of_function(function: FunctionType) -> Iterator[object]:
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


def _attributes(held: object) -> Iterator[object]:
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


# Whether a function may be asked again, or must be: what of it can change is compared.

_PURE_PACKAGES = ("jax", "jaxlib", "numpy")
_PURE_BUILTINS = {
    *("abs", "bool", "dict", "enumerate", "float", "int", "isinstance", "len", "list"),
    *("max", "min", "range", "reversed", "round", "slice", "sum", "tuple", "zip"),
}
_FROM_OUTSIDE = {"fromfile", "genfromtxt", "load", "loadtxt", "memmap", "random"}
_IMPORTS = dis.opmap["IMPORT_NAME"]
_SMALL = 4096  # elements of a NumPy array, whose numbers may change in place


def state_of(function: object) -> tuple[tuple[object, ...], list[object]] | None:
    """All that a function reads, hashable, and what must live as long as this does.

    Two calls with equal states trace the same program. None: it reads what may change
    unseen (an object's attributes, an iterator, a file, random numbers).
    """
    state: list[object] = []
    kept: list[object] = []
    stack = [function]
    while stack:
        if len(state) > _MOST:
            return None
        held = stack.pop()
        if isinstance(held, _PLAIN):
            state.append((type(held), held))
            continue
        kept.append(held)
        if isinstance(held, np.ndarray):
            if held.size > _SMALL or held.dtype == object:
                return None
            state.append((held.shape, str(held.dtype), held.tobytes()))
        elif isinstance(held, jax.Array):
            if isinstance(held, jax.core.Tracer):  # type: ignore[attr]
                return None
            state.append(id(held))
        elif isinstance(held, list | tuple | dict):
            state.append((type(held), len(held)))
            stack += [*held.keys(), *held.values()] if type(held) is dict else held
        elif isinstance(held, functools.partial):
            state.append(type(held))
            stack += [held.func, held.args, held.keywords]
        elif _is_pure(held):
            state.append(id(held))
        elif type(held) is FunctionType and _reads_what_is_seen(held.__code__):
            state.append(held.__code__)
            parts = list(_of_function(held))
            state.append(len(parts))
            stack += parts
        else:
            return None
    return tuple(state), kept


def _is_pure(held: object) -> bool:
    """Of JAX or NumPy: a module, or a function that holds nothing of the user's."""
    if isinstance(held, ModuleType):
        return held.__name__.split(".")[0] in _PURE_PACKAGES
    module = getattr(held, "__module__", None) or ""
    return callable(held) and module.split(".")[0] in _PURE_PACKAGES


@functools.lru_cache(maxsize=4096)
def _reads_what_is_seen(code: CodeType) -> bool:
    names = _names(code)
    if not _FROM_OUTSIDE.isdisjoint(names):
        return False
    if any(name in vars(builtins) and name not in _PURE_BUILTINS for name in names):
        return False
    inner = [c for c in code.co_consts if isinstance(c, CodeType)]
    return all(_IMPORTS not in c.co_code[::2] for c in (code, *inner))
