"""Where integers of x turn into floats: look-ups, one-hot codes."""

from __future__ import annotations

from dataclasses import dataclass

from jlrp.ops.base import Operation
from jlrp.ops.embedding import Embedding


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class EmbeddingOp(Operation):
    """Integers, and the floats that they fetch; ``embedding`` says by which way."""

    embedding: Embedding
