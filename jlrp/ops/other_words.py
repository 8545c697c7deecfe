"""All that a program says in other words, read until nothing more is found.

What one reading has found may be what another one looks for: a product in the words of
a contraction is the divisor of a quotient.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from jlrp.ir.program import Program
from jlrp.ops.behind import Layers
from jlrp.ops.extrema import Extrema, Magnitudes
from jlrp.ops.inverses import Inverses
from jlrp.ops.late import LateDivisions
from jlrp.ops.regrouped import Regrouped
from jlrp.ops.side_by_side import Concatenations, Rows
from jlrp.ops.standing import OtherWords
from jlrp.ops.written_out import Sums

_READINGS: tuple[type[OtherWords], ...] = (
    *(Concatenations, Magnitudes, Extrema, Inverses),
    *(Regrouped, Sums, Rows, Layers, LateDivisions),
)
_ROUNDS = 8  # at most: a program may be left as it is, it computes the same


def read_other_words(program: Program, opaque: Iterable[Any]) -> None:
    """Let equations that recognisers know stand for what computes the same."""
    quiet = 0  # readings in a row that find no more
    for reading in _READINGS * _ROUNDS:
        quiet = 1 if reading.read_all(program, opaque) else quiet + 1
        if quiet == len(_READINGS):
            return
