"""One branch for a whole batch.

``lax.cond`` on a predicate that ``vmap`` has batched runs both branches. Where one of
them is the exact way and always right, one answer for all examples is enough.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from jlrp.typing import Array


def _reduced(flags: Array) -> Array:
    return lax.reduce_or(flags, range(flags.ndim))


def _any_unbatched_batched(
    args: Sequence[Array], axes: Sequence[int | None]
) -> tuple[Array, int | None]:
    return any_unbatched_p.bind(*args), None  # an axis: none


any_unbatched_p = Primitive("any_unbatched")
any_unbatched_p.def_impl(_reduced)
any_unbatched_p.def_abstract_eval(
    lambda flags: jax.core.ShapedArray((), np.dtype(bool))  # type: ignore[attr]
)
mlir.register_lowering(
    any_unbatched_p, mlir.lower_fun(_reduced, multiple_results=False)
)
batching.primitive_batchers[any_unbatched_p] = _any_unbatched_batched
ad.primitive_jvps[any_unbatched_p] = lambda primals, tangents: (
    any_unbatched_p.bind(*primals),
    ad.Zero(jax.core.ShapedArray((), jax.dtypes.float0)),  # type: ignore[attr]
)


def any_unbatched(flags: Array) -> Array:
    """Whether any of the flags is set, for any example of a batch."""
    return any_unbatched_p.bind(flags)
