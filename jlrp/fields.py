"""Options as documented fields, and functions that take them as keywords.

An option is one ``Option`` in a dataclass: its default, how what is given is read, and
its documentation. Functions get their keywords, their signature and their ``Args:``
from the dataclass, at run time and for type checkers (by a ``ParamSpec`` of its
constructor). Writing each keyword in each signature would keep a list of the options
for every function.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import textwrap
from collections.abc import Callable, Mapping
from typing import (
    Any,
    Generic,
    ParamSpec,
    Protocol,
    TypeVar,
    cast,
    overload,
)

from jlrp.arguments import Check, takes
from jlrp.typing import Function, PyTree, Target

Given = TypeVar("Given")
Kept = TypeVar("Kept")
Keywords = ParamSpec("Keywords")
Options = TypeVar("Options")
Options_contra = TypeVar("Options_contra", contravariant=True)
Result = TypeVar("Result")
Result_co = TypeVar("Result_co", covariant=True)


class Option(Generic[Given, Kept]):
    """A field of a dataclass of options, which reads what is given.

    Args:
      default: as given, before it is read.
      text: what it means, for ``Args:``.
      read: ``read(name, given)``: the value to keep, which it must accept too; raises a
        ``JlrpError`` for what is none.
      brief: what it means, in a line of the command's help; None: a command line
        cannot say it.
      word: what a word of the command line is read as.
      choices: the words that it may be, if these are all.
      changes_results: whether other values give other numbers, but for rounding.
    """

    def __init__(
        self,
        default: Given,
        text: str,
        read: Callable[[str, Given], Kept],
        *,
        brief: str | None = None,
        word: type = str,
        choices: tuple[str, ...] = (),
        changes_results: bool = True,
    ):
        self.default, self.text, self.read = default, text, read
        self.brief, self.word, self.choices = brief, word, choices
        self.changes_results = changes_results

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    # Dataclasses take the default of such a field from the class's attribute, and set
    # what their constructor is given through the descriptor, frozen or not.
    @overload
    def __get__(self, of: None, owner: type) -> Given: ...
    @overload
    def __get__(self, of: object, owner: type) -> Kept: ...
    def __get__(self, of: object | None, owner: type) -> Given | Kept:
        return self.default if of is None else of.__dict__[self.name]

    def __set__(self, of: object, value: Given) -> None:
        of.__dict__[self.name] = self.read(self.name, value)


def checked(check: Check) -> Callable[[str, Given], Given]:
    """Reads a value by checking it alone."""

    def read(name: str, value: Given) -> Given:
        check(name, value)
        return value

    return read


def options_of(kind: type) -> dict[str, Option[object, object]]:
    """The options of a dataclass by name, in order."""
    found: dict[str, Option[object, object]] = {}
    for of in reversed(kind.__mro__):
        found |= {n: v for n, v in vars(of).items() if isinstance(v, Option)}
    return found


def _given_types(kind: type) -> dict[str, str]:
    """By name, the type of what may be given, as it is written."""
    found: dict[str, str] = {}
    for field in dataclasses.fields(kind):
        annotation = ast.parse(str(field.type)).body[0]  # Option[Given, Kept]
        pair = next(n for n in ast.walk(annotation) if isinstance(n, ast.Tuple))
        found[field.name] = ast.unparse(pair.elts[0])
    return found


class _FunctionBody(Protocol[Options_contra, Result_co]):
    def __call__(self, fn: Function, *, options: Options_contra) -> Result_co: ...


class _ExampleBody(Protocol[Options_contra, Result_co]):
    def __call__(
        self,
        fn: Function,
        params: PyTree,
        x: PyTree,
        target: Target = None,
        *,
        options: Options_contra,
    ) -> Result_co: ...


class OfFunction(Protocol[Keywords, Result_co]):
    """``call(fn, *, ...)`` with the keywords of some options."""

    def __call__(
        self, fn: Function, *args: Keywords.args, **options: Keywords.kwargs
    ) -> Result_co: ...


class OfExample(Protocol[Keywords, Result_co]):
    """``call(fn, params, x, target=None, *, ...)``, its keywords those of options."""

    def __call__(
        self,
        fn: Function,
        params: PyTree,
        x: PyTree,
        target: Target = None,
        *args: Keywords.args,
        **options: Keywords.kwargs,
    ) -> Result_co: ...


def of_function(
    kind: Callable[Keywords, Options],
) -> Callable[[_FunctionBody[Options, Result]], OfFunction[Keywords, Result]]:
    """Makes of ``body(fn, *, options)`` the public ``call(fn, *, ...)``."""

    def decorate(body: _FunctionBody[Options, Result]) -> OfFunction[Keywords, Result]:
        return cast(OfFunction[Keywords, Result], _with_keywords(kind, body))

    return decorate


def of_example(
    kind: Callable[Keywords, Options],
) -> Callable[[_ExampleBody[Options, Result]], OfExample[Keywords, Result]]:
    """The same with ``(fn, params, x, target=None, *, ...)``."""

    def decorate(body: _ExampleBody[Options, Result]) -> OfExample[Keywords, Result]:
        return cast(OfExample[Keywords, Result], _with_keywords(kind, body))

    return decorate


def _with_keywords(kind: Any, body: Callable[..., object]) -> Callable[..., object]:
    """A function with the options as keywords, which refuses others by their names."""
    options, types = options_of(kind), _given_types(kind)

    @functools.wraps(body)
    def call(*args: object, **keywords: object) -> object:
        given = {name: keywords.pop(name) for name in options.keys() & keywords}
        return body(*args, **keywords, options=kind(**given))

    own = inspect.signature(body)
    added = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=option.default,
            annotation=types[name],
        )
        for name, option in options.items()
    ]
    kept = [v for name, v in own.parameters.items() if name != "options"]
    call.__signature__ = own.replace(parameters=[*kept, *added])  # type: ignore
    call.__doc__ = with_arguments(body.__doc__, options)
    return takes()(call)


def with_arguments(
    text: str | None, options: Mapping[str, Option[object, object]]
) -> str | None:
    """A docstring whose section ``Args:`` ends with the options."""
    if text is None:  # python -OO
        return None
    before, rest = text.split("    Args:\n", 1)
    own, after = rest.split("\n\n", 1)
    entries = [
        textwrap.fill(
            f"{name}: {option.text}",
            width=88,
            initial_indent=" " * 6,
            subsequent_indent=" " * 8,
            break_long_words=False,
            break_on_hyphens=False,
        )
        for name, option in options.items()
    ]
    arguments = "\n".join([own, *entries])
    return f"{before}    Args:\n{arguments}\n\n{after}"
