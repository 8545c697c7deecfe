"""What a store holds, in numbers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from jlrp.jobs import store
from jlrp.jobs.errors import check_path
from jlrp.jobs.steps import FAILURES, NAN_IN_X, NOT_FINITE, UNWRITTEN

_ROWS_AT_A_TIME = 1 << 20
_QUANTILES = (0.5, 0.9, 0.99)
# Errors are counted by size, so that memory does not grow with the store: the edges are
# a 40th of a decade apart, which is 6 %.
_EDGES = np.logspace(-12, 6, 18 * 40 + 1)


def done(path: str | Path) -> int:
    """How many examples of a store are done, failed ones included.

    It reads the log alone, and may be asked while the job is at work.
    """
    check_path("path", path)
    return sum(record["count"] for record in store.done(Path(path)))


@dataclass(frozen=True)
class Summary:
    """What a job has done.

    Attributes:
      examples: rows that are done, failed ones included.
      total: rows of the store.
      failures: how many examples failed, by reason.
      reasons: of the first failed examples, by index, what happened.
      conservation: the median, the 90 % and 99 % quantiles and the largest of
        ``|score - sum of relevance| / |score|``; empty if nothing was explained.
      not_finite: how many examples have NaN in x, or NaN or inf in their results.
      explained_now, seconds: what this run did, and in what time.
    """

    path: Path
    examples: int
    total: int
    failures: dict[str, int]
    reasons: dict[int, str]
    conservation: dict[str, float]
    not_finite: int
    explained_now: int = 0
    seconds: float = 0.0

    @property
    def rate(self) -> float:
        """Examples per second of this run."""
        return self.explained_now / self.seconds if self.seconds else 0.0

    def of_run(self, explained_now: int, seconds: float) -> Summary:
        return replace(self, explained_now=explained_now, seconds=seconds)

    def __str__(self) -> str:
        lines = [f"{self.path}: {self.examples} of {self.total} examples done"]
        if self.seconds:
            lines.append(
                f"this run: {self.explained_now} in {self.seconds:.1f} s, "
                f"{self.rate:.0f} per second"
            )
        if self.conservation:
            errors = ", ".join(f"{k} {v:.1e}" for k, v in self.conservation.items())
            lines.append(f"absorbed share of the score: {errors}")
        lines.append(f"not finite: {self.not_finite}")
        counts = ", ".join(f"{n} {name}" for name, n in self.failures.items())
        lines.append(f"failed: {counts or 'none'}")
        lines += [f"  example {index}: {why}" for index, why in self.reasons.items()]
        return "\n".join(lines)


def summary(path: str | Path) -> Summary:
    """The summary of a store, finished or not.

    Args:
      path: the folder of the store.

    Returns:
      A ``Summary``.

    Raises:
      JobError: if there is no store of jlrp.

    Example:
      >>> from jlrp import jobs
      >>> print(jobs.summary("relevance.zarr"))  # doctest: +SKIP
    """
    check_path("path", path)
    path = Path(path)
    store.attributes(path)
    failure, score, absorbed = (
        store.array(path, name) for name in ("failure", "score", "absorbed")
    )
    codes, errors = np.zeros(len(FAILURES), int), np.zeros(len(_EDGES) + 1, int)
    largest = 0.0
    for start in range(0, failure.shape[0], _ROWS_AT_A_TIME):
        rows = slice(start, min(start + _ROWS_AT_A_TIME, failure.shape[0]))
        found = failure[rows].read().result()
        codes += np.bincount(found[found != UNWRITTEN], minlength=len(FAILURES))
        explained = found == 0
        scores = np.abs(score[rows].read().result()[explained])
        missing = np.abs(absorbed[rows].read().result()[explained])
        error = missing / np.maximum(scores, np.finfo(np.float32).tiny)
        errors += np.bincount(np.searchsorted(_EDGES, error), minlength=len(errors))
        largest = max(largest, float(error.max(initial=0)))
    return Summary(
        path,
        int(codes.sum()),
        int(failure.shape[0]),
        {FAILURES[c]: int(n) for c, n in enumerate(codes) if c and n},
        _first_reasons(path),
        _quantiles(errors, largest) if errors.sum() else {},
        int(codes[NAN_IN_X] + codes[NOT_FINITE]),
    )


def _first_reasons(path: Path, most: int = 10) -> dict[int, str]:
    found: dict[int, str] = {}
    for record in store.done(path):
        found |= {int(index): why for index, why in record["failed"].items()}
        if len(found) >= most:
            break
    return dict(sorted(found.items())[:most])


def _quantiles(counts: np.ndarray, largest: float) -> dict[str, float]:
    share = np.cumsum(counts) / counts.sum()
    edges = np.append(_EDGES, largest)
    at = {f"{q:.0%}": float(edges[np.searchsorted(share, q)]) for q in _QUANTILES}
    return {name: min(value, largest) for name, value in at.items()} | {"max": largest}
