"""What a job is: equal for two runs whose results may stand in one store."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import re
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive

import jlrp
from jlrp.typing import ArrayLike, PyTree

Described = bool | int | str | list[str] | None


def digest(*parts: bytes) -> str:
    hashed = hashlib.blake2b(digest_size=16)
    for part in parts:
        hashed.update(part)
    return hashed.hexdigest()


def of_tree(tree: PyTree) -> str:
    """A digest of the structure, dtypes, shapes and numbers of a pytree of arrays."""
    hashed = hashlib.blake2b(digest_size=16)
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        array = _local(leaf)
        head = (jax.tree_util.keystr(path), str(array.dtype), array.shape)
        hashed.update(repr(head).encode())
        hashed.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return hashed.hexdigest()


def _local(leaf: ArrayLike) -> np.ndarray:
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        # Parts of it live in other processes, and all must find the same digest.
        sums = jax.jit(lambda a: jnp.stack([a.sum(), jnp.abs(a).sum()]))(leaf)
        return np.asarray(sums.addressable_data(0))
    return np.asarray(leaf)


def versions() -> dict[str, str]:
    return {"jlrp": jlrp.__version__, "jax": jax.__version__}


def described(value: object) -> Described:
    """A value as JSON has it: readable, and the same in every process.

    Numbers, strings and lists of strings are themselves. A function has its name, which
    says where it was written and not what it does: that is in the program, which has
    its own digest.
    """
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, tuple | list) and all(isinstance(v, str) for v in value):
        return list(value)
    return _text(value)


def _text(value: object) -> str:
    if isinstance(value, Primitive):
        return value.name
    if isinstance(value, np.ndarray | jax.Array):
        return _array_text(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        parts = [(f.name, getattr(value, f.name)) for f in dataclasses.fields(value)]
        given = ", ".join(f"{name}={_text(part)}" for name, part in parts)
        return f"{type(value).__qualname__}({given})"
    if isinstance(value, functools.partial):
        return f"partial{_text((value.func, *value.args, value.keywords))}"
    if isinstance(value, Mapping):
        items = sorted((_text(key), _text(part)) for key, part in value.items())
        return "{" + ", ".join(f"{key}: {part}" for key, part in items) + "}"
    if isinstance(value, set | frozenset):
        return "{" + ", ".join(sorted(map(_text, value))) + "}"
    if isinstance(value, tuple | list):
        inside = ", ".join(map(_text, value))
        return f"[{inside}]" if isinstance(value, list) else f"({inside})"
    name = getattr(value, "__qualname__", None)
    if name is not None:  # a function, a method, a class
        return f"{getattr(value, '__module__', None)}.{name}"
    if type(value).__repr__ is object.__repr__:
        return f"{type(value).__module__}.{type(value).__qualname__}"
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value))


def _array_text(value: ArrayLike) -> str:
    """Few numbers are told, of many a digest."""
    array = _local(value)
    numbers = array.tolist() if array.size <= 8 else f"#{of_tree(array)}"
    return f"{array.dtype}{list(array.shape)} {numbers}"


def difference(stored: Mapping[str, object], own: Mapping[str, object]) -> str | None:
    """The first thing that two jobs do not share, in words, or None."""
    for name in own:
        if stored.get(name) != own[name]:
            before, now = _around_difference(stored.get(name), own[name])
            return f"its {name} is {before}, not {now}"
    return None


def _around_difference(*values: object) -> list[str]:
    """Two values as text: of long ones what is about the first place that differs."""
    texts = [repr(value) for value in values]
    first = next(
        (i for i, (a, b) in enumerate(zip(*texts, strict=False)) if a != b),
        min(map(len, texts)),
    )
    start = max(0, first - _AROUND)

    def cut(text: str) -> str:
        if len(text) <= 3 * _AROUND:
            return text
        end = start + 3 * _AROUND
        before, after = "..." * (start > 0), "..." * (end < len(text))
        return f"{before}{text[start:end]}{after}"

    return list(map(cut, texts))


_AROUND = 40  # characters
