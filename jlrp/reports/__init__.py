"""What jlrp found and did, as tables: the inspection, its coverage, the ledger."""

from jlrp.reports.audit import audited as audited
from jlrp.reports.inspection import (
    Activation,
    Activations,
    Coverage,
    EquationCoverage,
    Inspection,
    OperationRow,
)
from jlrp.reports.ledger import CAUSES, Ledger, LedgerRow

__all__ = [
    "CAUSES",
    "Activation",
    "Activations",
    "Coverage",
    "EquationCoverage",
    "Inspection",
    "Ledger",
    "LedgerRow",
    "OperationRow",
]
