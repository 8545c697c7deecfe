"""The cheapest residual policy whose compiled program fits into some memory.

What a plan keeps is known; what XLA makes of it is not. So the policies are compiled,
for the shapes at hand, and asked for their temporary memory: by bisection, since each
of them runs more again, and needs less, than the one before.
"""

from __future__ import annotations

from collections.abc import Callable

from jlrp.errors import MemoryLimitError
from jlrp.plan.residuals import Recompute

Choice = str | Recompute  # of explain's residuals

LADDER: tuple[Choice, ...] = ("keep", *(Recompute(n / 8) for n in range(9)))


def fitting(bytes_of: Callable[[Choice], int], limit: int) -> Choice:
    """The first policy of the ladder whose program takes at most ``limit`` bytes.

    Args:
      bytes_of: the temporary memory of the program that is compiled for a policy.

    Raises:
      MemoryLimitError: if there is none; it says the least that was found.
    """
    sizes: dict[int, int] = {}

    def fits(rung: int) -> bool:
        if rung not in sizes:
            sizes[rung] = bytes_of(LADDER[rung])
        return sizes[rung] <= limit

    low, high = 0, len(LADDER) - 1
    if fits(low):
        return LADDER[low]
    if not fits(high):
        others = (rung for rung in reversed(range(1, high)) if fits(rung))
        found = next(others, None)
        if found is None:
            raise MemoryLimitError(_least(limit, min(sizes.values())))
        return LADDER[found]
    while high - low > 1:
        middle = (low + high) // 2
        if fits(middle):
            high = middle
        else:
            low = middle
    return LADDER[high]


def _least(limit: int, least: int) -> str:
    return (
        f"memory_limit is {limit} bytes; the least possible for these shapes is "
        f"{least} bytes ({least / 2**20:.1f} MiB) of temporary memory. Raise the limit "
        "to that, or explain a smaller batch."
    )
