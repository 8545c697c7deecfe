"""Whether a flag is set anywhere: one answer for a whole batch.

``lax.cond`` on a predicate that ``vmap`` has batched runs both branches. Where one of
them is the exact way and always right, one answer for all examples is enough.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

Array = jax.Array


def _reduced(flags: Array) -> Array:
    return lax.reduce_or(flags, range(flags.ndim))


def _batched(args: Sequence[Any], axes: Sequence[Any]) -> tuple[Any, Any]:
    return anywhere_p.bind(*args), None  # an axis: none


anywhere_p = Primitive("anywhere")
anywhere_p.def_impl(_reduced)
anywhere_p.def_abstract_eval(
    lambda flags: jax.core.ShapedArray((), np.dtype(bool))  # type: ignore[attr]
)
mlir.register_lowering(anywhere_p, mlir.lower_fun(_reduced, multiple_results=False))
batching.primitive_batchers[anywhere_p] = _batched
ad.primitive_jvps[anywhere_p] = lambda primals, tangents: (
    anywhere_p.bind(*primals),
    ad.Zero(jax.core.ShapedArray((), jax.dtypes.float0)),  # type: ignore[attr]
)


def anywhere(flags: Array) -> Array:
    """Whether any of the flags is set, for any example of a batch."""
    return anywhere_p.bind(flags)
