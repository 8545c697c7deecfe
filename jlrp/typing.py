"""The types that the signatures of jlrp name.

JAX has no type for a pytree: which containers there are is open, since classes are
registered as ones. ``PyTree`` says that a value is one, and type checkers accept any.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
from jax.typing import ArrayLike as ArrayLike
from jax.typing import DTypeLike as DTypeLike

__all__ = ["Array", "ArrayLike", "DTypeLike", "Function", "PyTree", "Target"]

Array: TypeAlias = jax.Array

PyTree: TypeAlias = Any
"""Arrays in any nesting of registered containers; a single array is one."""

Function: TypeAlias = Callable[[PyTree, PyTree], PyTree]
"""``fn(params, x) -> scores``."""

Target: TypeAlias = int | ArrayLike | Callable[[PyTree], Array] | PyTree | None
"""A class index, one for each example, a function of the output, or multipliers."""
