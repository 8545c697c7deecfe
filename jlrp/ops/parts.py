"""Whether a sum is that of all weights of a row."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jlrp.analysis.terms import Term, refined, strides_of


def is_part_of(weights: Term, summed: Term) -> bool:
    """Whether a sum is that of all weights, summed along all in which they differ.

    So that, divided by it, the weights sum to one.
    """
    if not summed.inner or len(weights.factors) != len(summed.factors):
        return False
    if weights.inner or not np.isclose(weights.coefficient, summed.coefficient):
        return False
    pairs = list(zip(weights.factors, summed.factors, strict=True))
    if any(a.root is not b.root or a.power != b.power for a, b in pairs):
        return False
    index = _Index(summed)
    start = [a.view.offset - b.view.offset for a, b in pairs]
    if not index.moves(start, 1):
        return False
    for i in range(len(pairs[0][0].view.axes)):
        axes = [f.view.axes[i] for f in (*weights.factors, *summed.factors)]
        sizes = refined(axes)
        strides = sizes and [strides_of(axis, sizes) for axis in axes]
        if sizes is None or (strides and None in strides):
            return False
        for k, size in enumerate(sizes):
            at = [s[k] for s in strides or ()]  # type: ignore[index]
            half = len(pairs)
            step = [a - b for a, b in zip(at[:half], at[half:], strict=True)]
            if any(step) and not index.moves(step, size):
                return False
    return True


class _Index:
    """An index into the summed digits of a term, and how far it has been moved."""

    def __init__(self, summed: Term):
        self.digits = [
            (size, [f.inner[k] for f in summed.factors])
            for k, size in enumerate(summed.inner)
        ]
        self._low = [0] * len(self.digits)
        self._high = [0] * len(self.digits)

    def moves(self, step: Sequence[int], size: int) -> bool:
        """Whether steps move it along its digits, and stay within them."""
        order = sorted(
            range(len(self.digits)), key=lambda k: -max(map(abs, self.digits[k][1]))
        )
        left = list(step)
        for k in order:
            along = self.digits[k][1]
            main = max(range(len(along)), key=lambda i: abs(along[i]))
            times = int(left[main] / along[main])
            if not times:
                continue
            left = [a - times * b for a, b in zip(left, along, strict=True)]
            far = times * (size - 1)
            self._low[k] += times if size == 1 else min(far, 0)
            self._high[k] += times if size == 1 else max(far, 0)
        if any(left):
            return False
        bounds = zip(self.digits, self._low, self._high, strict=True)
        return all(low >= 0 and high < n for (n, _), low, high in bounds)
