"""How sure a mean over examples is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from jlrp import arguments
from jlrp.arguments import takes
from jlrp.errors import InputError
from jlrp.typing import ArrayLike


@dataclass(frozen=True)
class Interval:
    """A mean with its confidence interval."""

    mean: float
    low: float
    high: float
    level: float = 0.95

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


@takes(
    values=arguments.concrete,
    level=arguments.number(),
    resamples=arguments.whole(1, 10**7),
    seed=arguments.whole(0),
)
def interval(
    values: ArrayLike | Sequence[float],
    groups: Sequence[object] | np.ndarray | None = None,
    *,
    level: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Interval:
    """The mean of a metric over examples, with a bootstrap interval.

    Two methods are compared by the interval of their difference on the same examples,
    ``interval(ours - theirs)``.

    Args:
      values: float (examples,).
      groups: (examples,): which examples are not independent, such as the crops of one
        photograph. Groups are drawn, not examples, and each counts the same.
      level: of confidence, between 0 and 1.
      resamples: how many.
      seed: of the random draws.

    Returns:
      An ``Interval`` by percentiles.

    Raises:
      InputError: for no values, NaN, groups that do not fit, a level outside 0 to 1.

    Example:
      >>> from jlrp import metrics
      >>> found = metrics.interval([1.0, 1.0, 4.0], groups=["a", "a", "b"])
      >>> found.mean, found.low, found.high
      (2.5, 1.0, 4.0)

    Source: Efron and Tibshirani 1993, chapter 13.
    """
    values = np.asarray(values, np.float64)
    if values.ndim != 1 or values.size == 0 or not np.isfinite(values).all():
        raise InputError(
            f"values are finite numbers, one per example; got shape "
            f"{values.shape} with {np.size(values) - np.isfinite(values).sum()} others."
        )
    if not 0 < level < 1:
        raise InputError(f"level must lie between 0 and 1; got {level}.")
    if groups is not None:
        try:
            groups = np.asarray(groups)
            np.unique(groups)
        except (TypeError, ValueError) as error:
            raise InputError(
                "groups are numbers or strings, one for each value; got "
                f"{arguments.shown(groups)}."
            ) from error
        if groups.shape != values.shape:
            raise InputError(
                f"groups has shape {groups.shape}, values {values.shape}: one each."
            )
        _, member = np.unique(groups, return_inverse=True)
        values = np.bincount(member, values) / np.bincount(member)
    random = np.random.default_rng(seed)
    draws = random.integers(0, values.size, (resamples, values.size))
    tail = (1 - level) / 2
    low, high = np.quantile(values[draws].mean(1), [tail, 1 - tail])
    return Interval(float(values.mean()), float(low), float(high), level)
