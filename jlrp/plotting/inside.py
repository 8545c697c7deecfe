"""Relevance inside of a network: layers, and heads of attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from jlrp import arguments
from jlrp.arguments import takes
from jlrp.errors import InputError
from jlrp.plotting.drawing import (
    COLOURS,
    Picture,
    axes_of,
    colour_bar,
    finite,
    hex_colour,
    ink_of,
    scale_of,
)
from jlrp.typing import ArrayLike

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@takes(
    relevance=arguments.mapping,
    title=arguments.text,
)
def layers(relevance: Mapping[str, ArrayLike], *, title: str = "") -> Picture:
    """What relevance passes each named place, such as ``Explanation.captured``.

    Two bars each: the sum for, and the sum against.

    Args:
      relevance: by name, arrays of any shape, in the order to be shown.
      title: of the figure.

    Raises:
      InputError: for no names, NaN or inf.
    """
    if not relevance:
        raise InputError("relevance is empty; give at least one, by name.")
    values = {name: finite(r, f"relevance[{name!r}]") for name, r in relevance.items()}
    positive = [float(np.maximum(r, 0).sum()) for r in values.values()]
    negative = [float(np.minimum(r, 0).sum()) for r in values.values()]

    def draw() -> Figure:
        figure, axes = axes_of(1, 1, (6.5, 0.9 + 0.34 * len(values)), ticks=True)
        ax, at = axes[0][0], np.arange(len(values))
        ax.barh(at, positive, color=hex_colour(1.0), label="for")
        ax.barh(at, negative, color=hex_colour(-1.0), label="against")
        net = np.add(positive, negative)
        ax.plot(net, at, "k|", markersize=12, label="sum")
        ax.axvline(0, color="black", linewidth=0.8)
        ax.set_yticks(at, list(values))
        ax.invert_yaxis()
        ax.set_xlabel("relevance")
        ax.set_title(title)
        ax.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
        return figure

    return Picture(draw, f"Relevance for and against at {', '.join(values)}.")


@takes(
    relevance=arguments.mapping,
    head_axis=arguments.whole(),
    title=arguments.text,
)
def heads(
    relevance: Mapping[str, ArrayLike], *, head_axis: int = -2, title: str = ""
) -> Picture:
    """What relevance passes each attention head: a row per layer, a column per head.

    Args:
      relevance: by layer, in the order to be shown: float arrays with one axis of
        heads, such as what the heads found, (batch, position, head, feature), captured
        by a tag. Layers may differ in their heads.
      head_axis: which axis that is; all others are summed.
      title: of the figure.

    Raises:
      InputError: for no layers, no such axis, NaN or inf.

    Example:
      >>> import numpy as np
      >>> from jlrp import plotting
      >>> r = np.array([[[1.0, 2.0], [-4.0, 0.5]]])  # (position, head, feature)
      >>> print(plotting.heads({"layer_0": r}))
      Relevance of the heads of layer_0; the most: layer_0 head 0 (3).
    """
    if not relevance:
        raise InputError("relevance is empty; heads() needs at least one layer.")
    sums = {
        name: _sum_to(finite(r, f"relevance[{name!r}]"), head_axis, name)
        for name, r in relevance.items()
    }
    columns = max(map(len, sums.values()))
    table = np.full((len(sums), columns), np.nan)
    for row, one in zip(table, sums.values(), strict=True):
        row[: len(one)] = one
    limit = scale_of(np.concatenate(list(sums.values())), 100)

    def draw() -> Figure:
        size = (1.9 + 0.62 * columns, 1.2 + 0.42 * len(sums))
        figure, axes = axes_of(1, 1, size, ticks=True)
        ax = axes[0][0]
        shown = ax.imshow(table, cmap=COLOURS, vmin=-limit, vmax=limit, aspect="auto")
        for (row, column), r in np.ndenumerate(table):
            if not np.isnan(r):
                ink = ink_of(r / limit)
                ax.text(column, row, f"{r:.2g}", ha="center", va="center", color=ink)
        ax.set_xticks(range(columns))
        ax.set_yticks(range(len(sums)), list(sums))
        ax.set_xlabel("head")
        ax.set_title(title)
        colour_bar(figure, shown, ax)
        return figure

    names = list(sums)
    row, column = np.unravel_index(np.nanargmax(table), table.shape)
    return Picture(
        draw,
        f"Relevance of the heads of {', '.join(names)}; the most: {names[int(row)]} "
        f"head {column} ({table[row, column]:.3g}).",
    )


def _sum_to(array: np.ndarray, axis: int, name: str) -> np.ndarray:
    if not -array.ndim <= axis < array.ndim:
        raise InputError(f"{name} of shape {array.shape} has no axis {axis} of heads.")
    return np.moveaxis(array, axis, -1).reshape(-1, array.shape[axis]).sum(0)
