"""Measured means with their intervals."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from jlrp import arguments
from jlrp.arguments import takes
from jlrp.errors import InputError
from jlrp.metrics import Interval
from jlrp.plotting.drawing import Picture, axes_of, check_values, hex_colour

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@takes(
    found=arguments.mapping,
    axis=arguments.text,
)
def intervals(found: Mapping[str, Interval], *, axis: str = "mean") -> Picture:
    """Means with their confidence intervals, one below the other.

    Args:
      found: by name, ``jlrp.metrics.Interval``, from the top.
      axis: name of the horizontal axis.

    Raises:
      InputError: for none.
    """
    if not found:
        raise InputError("found is empty; give the interval of at least one mean.")
    check_values("found", found, Interval, "a jlrp.metrics.Interval")

    def draw() -> Figure:
        figure, axes = axes_of(1, 1, (6.5, 0.28 * len(found) + 0.9), ticks=True)
        ax = axes[0][0]
        for place, mean in enumerate(found.values()):
            colour = hex_colour(1.0 if place == 0 else -1.0)
            ax.plot([mean.low, mean.high], [place, place], color=colour)
            ax.plot([mean.mean], [place], "o", color=colour, markersize=4)
        ax.set_yticks(range(len(found)), list(found), fontsize=8)
        ax.set_ylim(len(found) - 0.5, -0.5)  # from the top
        ax.set_xlabel(axis)
        ax.grid(axis="x", color="0.9")
        return figure

    means = ", ".join(f"{name} {mean}" for name, mean in found.items())
    return Picture(draw, f"{axis}: {means}.")
