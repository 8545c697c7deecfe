"""The ledger: where relevance went, operation by operation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from jlrp.reports.table import Table

CAUSES = (
    *("bias", "stabilizer", "taylor", "constants"),
    *("stopped", "rounding", "blocked"),
)
# Of relevance from a reference alone.
CAUSES_OF_DIFFERENCES = ("switch", "statistic", "held", "quadrature")


@dataclass(frozen=True, repr=False)
class LedgerRow:
    """Relevance at one operation: ``arrived = handed + sum(causes) + unexplained``.

    Attributes:
      kind, scope, rule: of the operation, as in ``jlrp.inspect``.
      arrived: relevance of its outputs, R_out of a rule's formula.
      handed: relevance of its inputs, R_in.
      causes: what was absorbed, by cause.
      unexplained: what no cause accounts for: rounding, or a fault.
    """

    kind: str
    scope: str
    rule: str
    arrived: float
    handed: float
    causes: dict[str, float]
    unexplained: float


@dataclass(frozen=True, repr=False)
class Ledger(Table):
    """Where relevance went, operation by operation, from the output to the input.

    Attributes:
      seed: total relevance at the start.
      relevance: total relevance of x.
      rows: one per operation, in the order of the reverse pass.
      nonfinite: where NaN or inf began in the forward pass; empty if nowhere.
    """

    seed: float
    relevance: float
    rows: tuple[LedgerRow, ...]
    nonfinite: tuple[str, ...] = ()

    def total(self, cause: str) -> float:
        """Relevance absorbed by one cause over all operations."""
        return sum(row.causes.get(cause, 0.0) for row in self.rows)

    @property
    def unexplained(self) -> float:
        """The largest unexplained amount of any operation, in absolute value."""
        amounts = [abs(row.unexplained) for row in self.rows]
        return float(np.max(amounts, initial=0.0))  # NaN stays NaN

    @property
    def _causes(self) -> tuple[str, ...]:
        found = {cause for row in self.rows for cause in row.causes}
        return CAUSES + tuple(c for c in CAUSES_OF_DIFFERENCES if c in found)

    def _title(self) -> str:
        return f"relevance: seed {self.seed:.6g}, input {self.relevance:.6g}"

    def _cells(self) -> tuple[Sequence[str], Sequence[Sequence[str]]]:
        header = ("kind", "scope", "rule", "in", "out", *self._causes, "unexplained")
        rows = [
            (
                row.kind,
                row.scope,
                row.rule,
                f"{row.arrived:.5g}",
                f"{row.handed:.5g}",
                *(_amount(row.causes.get(cause)) for cause in self._causes),
                f"{row.unexplained:.1e}",
            )
            for row in self.rows
        ]
        return header, rows

    def _footer(self) -> str:
        causes = ", ".join(
            f"{cause} {total:.5g}"
            for cause in self._causes
            if (total := self.total(cause))
        )
        lines = [
            f"absorbed: {causes or 'nothing'}; "
            f"unexplained at most {self.unexplained:.1e}"
        ]
        if self.nonfinite:
            lines.append("NaN or inf began at: " + "; ".join(self.nonfinite))
        return "\n".join(lines)


def _amount(number: float | None) -> str:
    return "" if not number else f"{number:.4g}"
