"""What a user gave, refused by its name where it is no such thing.

Functions of the user's run through ``called``: what they raise about arguments that do
not fit says which function it was, with what, and what to check.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import inspect
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np

from jlrp.errors import InputError, JlrpError, TargetError
from jlrp.ir import jax_compat
from jlrp.typing import Array, DTypeLike, PyTree

# Models of these libraries are no functions of params and x; what makes one of them.
_INTEGRATIONS = {
    "equinox": "jlrp.integrations.equinox.module(model)",
    "flax": "jlrp.integrations.flax.nnx(model), or linen(module, variables)",
    "haiku": "jlrp.integrations.haiku.transformed(transformed, params)",
    "keras": "jlrp.integrations.keras.model(model)",
    "torch": "jlrp.integrations.torchax.module(model)",
}


def check_function(fn: object, name: str = "fn") -> None:
    """Refuse what cannot be called.

    Raises:
      InputError: naming the argument.
    """
    if not callable(fn):
        raise InputError(
            f"{name} is a {type(fn).__name__}, not a function: give a function "
            f"{name}(params, x) that returns the scores.{_instead_of(fn)}"
        )


def check_predicate(name: str, fn: object) -> None:
    """Refuse what cannot be called with an operation.

    Raises:
      InputError: naming the argument.
    """
    if not callable(fn):
        raise InputError(
            f"{name} is {shown(fn)}; give a function of an operation that returns a "
            'bool, such as lambda op: op.kind == "dense".'
        )


def check_choice(name: str, value: object, choices: Collection[str]) -> None:
    """Refuse a word that is none of the choices.

    Raises:
      InputError: naming the argument and the choices.
    """
    if not isinstance(value, str) or value not in choices:
        raise InputError(f"{name} must be one of {tuple(choices)}; got {shown(value)}.")


def check_array(name: str, leaf: object, abstract: bool = False) -> None:
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


def called(fn: Callable[..., PyTree], params: PyTree, x: PyTree) -> PyTree:
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


def output_of(fn: Callable[..., PyTree], params: PyTree, x: PyTree) -> PyTree:
    """The shapes of ``fn(params, x)``; JAX remembers them for each function.

    Raises:
      InputError: what the function raised, with the arguments that it was given.
    """
    with _saying_what_failed(fn, params, x):
        return jax.eval_shape(fn, params, x)


@contextlib.contextmanager
def _saying_what_failed(fn: object, params: PyTree, x: PyTree) -> Iterator[None]:
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


def _is_number(leaf: object) -> bool:
    try:
        check_array("", leaf)
    except InputError:
        return isinstance(leaf, complex)
    return True


def chosen(target: Callable[[PyTree], PyTree], output: PyTree) -> PyTree:
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


def _instead_of(fn: object) -> str:
    """The integration of the library that a model is of, as a hint; or nothing."""
    for cls in type(fn).__mro__:
        how = _INTEGRATIONS.get(cls.__module__.partition(".")[0])
        if how is not None:
            return f" fn is a model: fn, params = {how} makes a function of it."
    return ""


Check = Callable[[str, object], None]
Public = TypeVar("Public", bound=Callable[..., object])


def takes(**checks: Check) -> Callable[[Public], Public]:
    """A public function whose arguments are checked, by name, before it runs.

    A tracer that has left its trace, which JAX finds when it is used, is refused too.
    """

    def decorate(public: Public) -> Public:
        signature = inspect.signature(public)

        @functools.wraps(public)
        def run(*args: object, **kwargs: object) -> object:
            given = _bound(public.__qualname__, signature, args, kwargs)
            for name, value in given.items():
                if name in checks:
                    checks[name](name, value)
            try:
                return public(*args, **kwargs)
            except jax.errors.UnexpectedTracerError as error:
                raise InputError(
                    f"One of {', '.join(given)}, or what a function closed over, is a "
                    "tracer of a trace that has ended (of a jit, grad or vmap before). "
                    "Return such values from the function that made them. "
                    f"{first_lines(error)}"
                ) from error

        return cast(Public, run)

    return decorate


def _bound(
    name: str,
    signature: inspect.Signature,
    args: Sequence[object],
    kwargs: Mapping[str, object],
) -> Mapping[str, object]:
    """The arguments of a call by name.

    Raises:
      InputError: for a keyword that is none, too many arguments or too few.
    """
    try:
        return signature.bind(*args, **kwargs).arguments
    except TypeError as error:
        takes = [n for n in signature.parameters if n != "self"]
        wrong = [n for n in kwargs if n not in takes]
        if not wrong:
            raise InputError(
                f"{name}: {error}. It takes {', '.join(takes)}."
            ) from error
        near = difflib.get_close_matches(wrong[0], takes, n=1, cutoff=0.5)
        hint = f"Did you mean {near[0]}? " if near else ""
        raise InputError(
            f"{name} has no argument {wrong[0]}. {hint}It takes {', '.join(takes)}."
        ) from error


def optional(check: Check) -> Check:
    """None is fine too."""

    def checked(name: str, value: object) -> None:
        if value is not None:
            check(name, value)

    return checked


_LARGEST = 2**32 - 1  # seeds are that large


def whole(low: int | None = None, high: int | None = None) -> Check:
    """A whole number, not less than ``low`` nor more than ``high``."""

    def checked(name: str, value: Any) -> None:
        is_whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
        if not is_whole or _outside(value, low, high) or abs(value) > _LARGEST:
            raise InputError(
                f"{name} is a whole number{_range(low, high)}; got {shown(value)}."
            )

    return checked


def number(low: float | None = None, high: float | None = None) -> Check:
    """A finite real number, not less than ``low`` nor more than ``high``."""

    def checked(name: str, value: Any) -> None:
        kinds = (int, float, np.integer, np.floating)
        is_number = isinstance(value, kinds) and not isinstance(value, bool)
        if is_number:
            try:
                is_number = bool(np.isfinite(float(value)))
            except OverflowError:
                is_number = False
        if not is_number or _outside(value, low, high):
            raise InputError(
                f"{name} is a finite number{_range(low, high)}; got {shown(value)}."
            )

    return checked


def _outside(value: Any, low: float | None, high: float | None) -> bool:
    return (low is not None and value < low) or (high is not None and value > high)


def _range(low: float | None, high: float | None) -> str:
    if high is None:
        return "" if low is None else f" of at least {low}"
    return f" from {low} to {high}"


def choice(*choices: str) -> Check:
    """One of these words."""
    return lambda name, value: check_choice(name, value, choices)


def instance(*kinds: type, of: str) -> Check:
    """A value of these classes; ``of`` says how to make one."""

    def checked(name: str, value: object) -> None:
        if not isinstance(value, kinds):
            raise InputError(f"{name} is {shown(value)}; give {of}.")

    return checked


text = instance(str, of="a string")
flag = instance(bool, np.bool_, of="True or False")
mapping = instance(Mapping, of="a dict")


def function(name: str, value: object) -> None:
    check_function(value, name)


def concrete(name: str, value: object) -> None:
    """An array of real numbers that is known, not traced."""
    if jax_compat.is_tracer(value):
        raise InputError(
            f"{name} is a tracer: call this outside of jit, grad and vmap, or hand the "
            "values out of the function first."
        )
    array(name, value)


def array(name: str, value: object) -> None:
    """An array of real numbers, or nested lists of them."""
    if isinstance(value, jax.Array):
        found: Array | np.ndarray = value
    else:
        try:
            found = np.asarray(value)
        except Exception as error:
            raise InputError(
                f"{name} is {shown(value)}, which is no array: give an array of "
                f"numbers. NumPy says: {first_lines(error)}"
            ) from error
    if found.dtype != bool and not _is_real(found.dtype):
        raise InputError(
            f"{name} is {shown(value)}, of dtype {found.dtype}; give an array of real "
            "numbers."
        )


def _is_real(dtype: DTypeLike) -> bool:
    kinds = (jnp.integer, jnp.floating)
    return any(jnp.issubdtype(dtype, kind) for kind in kinds)


def words(name: str, value: object) -> None:
    """A string, or several."""
    given = [value] if isinstance(value, str) else value
    is_list = isinstance(given, tuple | list | set | dict)
    if not is_list or not all(isinstance(word, str) for word in given):
        raise InputError(f"{name} is {shown(value)}; give a string, or a list of them.")


def axes(name: str, value: object) -> None:
    """Some axes of an array: whole numbers in a tuple, hashable."""
    given = value if isinstance(value, tuple) else (None,)
    if not all(isinstance(a, int) and not isinstance(a, bool) for a in given):
        raise InputError(f"{name} is {shown(value)}; give axes, such as (1, 2).")


def numbers(count: int) -> Check:
    """So many numbers above 0, in a tuple."""

    def checked(name: str, value: object) -> None:
        if not isinstance(value, tuple | list) or len(value) != count:
            raise InputError(f"{name} is {shown(value)}; give {count} numbers.")
        for part in value:
            number(0)(name, part)
            if part == 0:
                raise InputError(f"{name} is {shown(value)}; give numbers above 0.")

    return checked


def tree(name: str, value: object) -> None:
    """A pytree of arrays."""
    for where, leaf in leaves_of(name, value):
        check_array(where, leaf)


def batch(name: str, value: object) -> None:
    """A pytree of arrays that all have a batch axis."""
    tree(name, value)
    shapes = [np.shape(leaf) for _, leaf in leaves_of(name, value)]
    if not shapes or not all(shapes):
        raise InputError(
            f"{name} has the shapes {shapes}; give a batch, arrays (batch, ...)."
        )


def leaves_of(name: str, tree: PyTree) -> list[tuple[str, PyTree]]:
    """The leaves of a pytree with their names.

    Raises:
      InputError: for a dict whose keys cannot be sorted.
    """
    try:
        leaves = jax.tree_util.tree_leaves_with_path(tree)
    except Exception as error:
        raise InputError(
            f"{name} is no pytree that JAX can flatten: {first_lines(error)} Keys of a "
            "dict are of one type, such as strings."
        ) from error
    return [(f"{name}{jax.tree_util.keystr(path)}", leaf) for path, leaf in leaves]


def broadcasts(shape: tuple[int, ...], to: tuple[int, ...]) -> bool:
    """Whether an array of one shape broadcasts to another, without growing it."""
    try:
        return np.broadcast_shapes(shape, to) == to
    except ValueError:
        return False


def result_of(name: str, fn: Callable[..., PyTree], *args: object) -> Array:
    """What a function of the user's returns, which must be an array.

    Raises:
      InputError: what it raised, or returned instead.
    """
    try:
        found = fn(*args)
    except (JlrpError, jax.errors.UnexpectedTracerError):
        raise
    except Exception as error:
        raise InputError(
            f"{name} raised {type(error).__name__}: {first_lines(error)} It was called "
            f"with {', '.join(map(shapes_of, args))}."
        ) from error
    if not _is_number(found):
        raise InputError(f"{name} returned {shown(found)}; it must return an array.")
    return found


def shape(name: str, value: object) -> None:
    """The shape of an array: whole numbers."""
    given = list(value) if isinstance(value, tuple | list) else []
    try:
        sizes = [int(size) for size in given]
        fits = sizes == given and all(size >= 0 for size in sizes)
    except (TypeError, ValueError, OverflowError):
        fits = False
    if not fits or not given:
        raise InputError(f"{name} is {shown(value)}; give a shape, such as (3, 4).")


def first_lines(error: BaseException) -> str:
    """What an error says, in one paragraph that ends as a sentence."""
    text = " ".join(str(error).split("\n--------------------")[0].split())
    text = text if len(text) <= 400 else text[:397] + "..."
    return text if text.endswith((".", "...", "!", "?")) else f"{text}."


def shapes_of(tree: PyTree) -> str:
    """A pytree of arrays in short: ``{'w': float32[3, 2]}``."""

    def of(leaf: PyTree) -> _Text:
        shape = getattr(leaf, "shape", None)
        return _Text(f"{leaf.dtype}{list(shape)}" if shape is not None else shown(leaf))

    text = repr(jax.tree.map(of, tree))
    return text if len(text) <= 200 else text[:197] + "..."


class _Text:
    def __init__(self, text: str):
        self.text = text

    def __repr__(self) -> str:
        return self.text


def shown(value: object) -> str:
    """A value in a message: an array's shape, else its repr, cut off."""
    if isinstance(value, jax.Array | np.ndarray):  # tracers too
        return f"an array {value.dtype}{list(value.shape)}"
    if isinstance(value, int) and abs(value) >= _LARGEST**4:
        return "a whole number of many digits"
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else text[:77] + "..."
