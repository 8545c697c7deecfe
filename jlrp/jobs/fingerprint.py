"""What a job is: equal for two runs whose results may stand in one store."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jlrp


def digest(*parts: bytes) -> str:
    hashed = hashlib.blake2b(digest_size=16)
    for part in parts:
        hashed.update(part)
    return hashed.hexdigest()


def of_tree(tree: Any) -> str:
    """A digest of the structure, dtypes, shapes and numbers of a pytree of arrays."""
    hashed = hashlib.blake2b(digest_size=16)
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        array = _local(leaf)
        head = (jax.tree_util.keystr(path), str(array.dtype), array.shape)
        hashed.update(repr(head).encode())
        hashed.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return hashed.hexdigest()


def _local(leaf: Any) -> np.ndarray:
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        # Parts of it live in other processes, and all must find the same digest.
        sums = jax.jit(lambda a: jnp.stack([a.sum(), jnp.abs(a).sum()]))(leaf)
        return np.asarray(sums.addressable_data(0))
    return np.asarray(leaf)


def versions() -> dict[str, str]:
    return {"jlrp": jlrp.__version__, "jax": jax.__version__}


def difference(stored: Mapping[str, Any], own: Mapping[str, Any]) -> str | None:
    """The first thing that two jobs do not share, in words, or None."""
    for name in own:
        if stored.get(name) != own[name]:
            return f"its {name} is {_short(stored.get(name))}, not {_short(own[name])}"
    return None


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 120 else text[:117] + "..."
