"""Relevance that named values hand to each other."""

# matplotlib types its functions in part.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from jlrp import arguments
from jlrp.arguments import takes
from jlrp.errors import InputError
from jlrp.plotting.drawing import (
    Picture,
    axes_of,
    finite,
    hex_colour,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@takes(
    edges=arguments.mapping,
    title=arguments.text,
)
def flow(edges: Mapping[tuple[str, str], float], *, title: str = "") -> Picture:
    """Relevance that named values hand to each other, as ``jlrp.flow.between`` finds.

    The output is above, the input below. A line from one value down to another is as
    wide as its flow; those that skip values pass them on the right. Beside each name is
    what arrives there.

    Args:
      edges: by pair (from, to), the nearest to the output first.
      title: of the figure.

    Raises:
      InputError: for no edges, NaN or inf.

    Example:
      >>> from jlrp import plotting
      >>> print(plotting.flow({("output", "mlp"): 2.0, ("mlp", "input"): 1.5}))
      Relevance flows output - mlp: 2, mlp - input: 1.5.
    """
    if not edges:
        raise InputError("edges is empty; flow() needs at least one pair of names.")
    amounts = finite(list(edges.values()), "edges")
    places = _from_the_top(edges)
    largest = float(np.abs(amounts).max() or 1.0)
    arriving = dict.fromkeys(places, 0.0)
    for (_, to), amount in zip(edges, amounts, strict=True):
        arriving[to] += float(amount)
    strongest = sorted(edges.items(), key=lambda edge: -abs(edge[1]))

    def draw() -> Figure:
        figure, axes = axes_of(1, 1, (6.5, 1.0 + 0.62 * len(places)))
        ax = axes[0][0]
        ax.set_axis_off()
        ax.set_title(title)
        for (start, end), amount in reversed(strongest):
            _draw_flow(ax, places[start], places[end], amount, largest)
        for name, place in places.items():
            ax.text(-0.25, place, name, ha="right", va="center")
            ax.plot(0, place, "o", color="black", markersize=5, zorder=3)
            if arriving[name]:
                amount = f"{arriving[name]:.3g}"
                ax.text(-0.2, place - 0.3, amount, ha="right", va="center", size=7)
        ax.set_xlim(-0.9 - 0.09 * max(map(len, places)), 0.55 * len(places) + 0.6)
        ax.set_ylim(-0.6, len(places) - 0.4)
        return figure

    listed = [f"{a} - {b}: {amount:.3g}" for (a, b), amount in strongest[:3]]
    return Picture(draw, f"Relevance flows {', '.join(listed)}.")


def _from_the_top(edges: Mapping[tuple[str, str], float]) -> dict[str, int]:
    """The height of each name: what gives is above what it gives to."""
    names = dict.fromkeys(name for pair in edges for name in pair)
    above = {name: {a for a, b in edges if b == name} for name in names}
    ordered: list[str] = []
    while len(ordered) < len(names):
        free = [n for n in names if n not in ordered and above[n] <= set(ordered)]
        if not free:
            raise InputError("flow() needs pairs (from, to) without a cycle.")
        ordered.append(free[0])
    return {name: len(names) - 1 - i for i, name in enumerate(ordered)}


def _draw_flow(ax: Axes, top: int, bottom: int, amount: float, largest: float) -> None:
    """A line between neighbours, an arc past those between."""
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    share = amount / largest
    if abs(share) < 0.01:
        return
    out = 0.55 * (top - bottom - 1)
    corners = [(0, top), (out * 4 / 3, top), (out * 4 / 3, bottom), (0, bottom)]
    codes = [Path.MOVETO, Path.CURVE4, Path.CURVE4, Path.CURVE4]
    line = PathPatch(
        Path(corners, codes),
        facecolor="none",
        edgecolor=hex_colour(1.0 if share > 0 else -1.0),
        linewidth=0.6 + 11 * abs(share),
        alpha=0.35 + 0.5 * abs(share),
        capstyle="butt",
    )
    ax.add_patch(line)
    if abs(share) > 0.1:
        middle = (out + 0.08, (top + bottom) / 2)
        ax.text(*middle, f"{amount:.2g}", size=8, va="center", zorder=4)
