"""Module paths as name scopes, without a change to the model's code.

``scope(path)`` opens a path. ``named_class`` makes a subclass of a module's class whose
methods run inside a path: an instance that is given it keeps its name through ``jit``,
``vmap``, ``scan`` and ``remat`` of its framework, and no class of the user's changes.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import inspect
import warnings
from collections.abc import Callable, Iterator
from typing import NamedTuple

from jax.extend.source_info_util import NameStack, current_name_stack, set_name_stack

from jlrp.typing import PyTree


class _Open(NamedTuple):
    """The innermost open path, and how it is written into the names.

    ``stack`` holds the scopes ``around`` all paths, then the path without what stands
    ``above`` already: the path of the call in whose body (of a jit, say) this is.
    """

    path: str
    above: str
    around: NameStack
    stack: NameStack


_innermost: contextvars.ContextVar[_Open | None] = contextvars.ContextVar(
    "jlrp_innermost_path", default=None
)
_SCOPE = type(NameStack().extend("").stack[0])


@contextlib.contextmanager
def scope(path: str) -> Iterator[None]:
    """Give the operations made inside the name ``path``, such as ``"layers/0/query"``.

    Paths are absolute: ``scope("layers/0/query")`` within ``scope("layers/0")`` names
    ``layers/0/query``, whatever other names are open, also under ``jax.vmap``, which by
    itself makes it ``vmap(layers/0)/query``. The empty path is the model.
    """
    now, outer = current_name_stack(), _innermost.get()
    scopes = NameStack(tuple(part for part in now.stack if isinstance(part, _SCOPE)))
    if outer is not None and outer.path == path:
        with set_name_stack(scopes):  # a method that calls another of its module
            yield
        return
    if outer is not None and now.stack[: len(outer.stack)] == outer.stack.stack:
        above, around = outer.above, outer.around
    else:
        # Outermost, or in a body, whose names start afresh.
        above = f"{outer.path}/" if outer is not None and outer.path else ""
        around = scopes
    stack = around
    for part in filter(None, path.removeprefix(above).split("/")):
        stack = stack.extend(part)
    token = _innermost.set(_Open(path, above, around, stack))
    try:
        with set_name_stack(stack):
            yield
    finally:
        _innermost.reset(token)


@functools.cache
def named_class(cls: type, path: str, base: type, **options: bool) -> type:
    """A subclass of ``cls`` whose public methods run inside ``scope(path)``.

    One class per path, since the class is all that a framework keeps of a module
    wherever it takes it apart; the same for equal arguments, so that caches hit. The
    methods of ``base``, the framework's own class of modules, stay as they are.
    ``options`` are class keywords.
    """
    own = [c for c in cls.__mro__ if c is not base and issubclass(c, base)]
    names = dict.fromkeys(name for c in own for name in vars(c) if _is_method(c, name))
    namespace = {name: _inside(path, cls, name) for name in names}
    namespace |= {name: getattr(cls, name) for name in ("__module__", "__doc__")}
    namespace |= {"__slots__": (), "__annotations__": {}}
    try:
        # Not the name of cls, which may be its key in a registry of subclasses.
        named = type(cls)(f"{cls.__name__}[{path}]", (cls,), namespace, **options)
    except Exception:
        return cls  # it refuses subclasses: its modules go without a name
    return named if names else cls


def with_names(run: Callable[[bool], PyTree]) -> PyTree:
    """``run(True)``; ``run(False)`` if the model does not bear that classes differ.

    It may stack the arrays of its blocks, say, which must be of one class for that.
    """
    try:
        return run(True)
    except Exception:
        pass  # if it is the model's own error, it comes again
    out = run(False)
    warnings.warn(
        "The model runs only without names, so its operations have no module paths.",
        stacklevel=2,
    )
    return out


def _is_method(cls: type, name: str) -> bool:
    value = vars(cls)[name]
    is_function = callable(value) and not isinstance(value, (type, staticmethod))
    is_field = name in inspect.get_annotations(cls)  # with a function for its default
    is_public = name == "__call__" or not name.startswith("_")
    return is_function and is_public and not is_field


def _inside(path: str, cls: type, name: str) -> Callable[..., object]:
    method = inspect.getattr_static(cls, name)

    @functools.wraps(getattr(cls, name))
    def named(self: object, *args: object, **kwargs: object) -> object:
        bound = method.__get__(self, cls) if hasattr(method, "__get__") else method
        with scope(path):
            return bound(*args, **kwargs)

    return named
