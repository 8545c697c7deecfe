"""Maps over images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from jlrp import arguments
from jlrp.arguments import takes
from jlrp.errors import InputError
from jlrp.plotting.drawing import (
    COLOURS,
    ROBUST,
    Picture,
    axes_of,
    check_values,
    colour_bar,
    finite,
    scale_of,
)
from jlrp.typing import ArrayLike

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage


@takes(
    relevance=arguments.concrete,
    image=arguments.optional(arguments.concrete),
    title=arguments.text,
    channel_axis=arguments.optional(arguments.whole()),
    per_channel=arguments.flag,
    robust=arguments.number(0, 100),
)
def heatmap(
    relevance: ArrayLike,
    image: ArrayLike | None = None,
    *,
    title: str = "",
    channel_axis: int | None = -1,
    per_channel: bool = False,
    robust: float = ROBUST,
) -> Picture:
    """The relevance of one image: zero is white, whatever the range.

    Args:
      relevance: float (height, width, channels), in the order that ``channel_axis``
        says, or (height, width) with None. Channels are summed.
      image: what to show beside it and, in grey, under it; shape of relevance or
        (height, width), in whatever range.
      title: of the figure.
      channel_axis: which axis holds channels.
      per_channel: one map for each channel instead of their sum.
      robust: percentile of the absolute values at which the colour saturates; 100: the
        largest.

    Raises:
      InputError: for other shapes, NaN or inf, or a percentile outside (0, 100].

    Example:
      >>> import numpy as np
      >>> from jlrp import plotting
      >>> relevance = np.array([[1.0, -2.0], [0.0, 0.5]])
      >>> print(plotting.heatmap(relevance, channel_axis=None))
      Relevance of 2 x 2 pixels, from -2 to 1, sum -0.5.
    """
    relevance = finite(relevance, "relevance")
    channels = _channels_last(relevance, channel_axis)
    maps = [channels.sum(-1)]
    names = [title]
    if per_channel:
        maps = [channels[..., i] for i in range(channels.shape[-1])]
        names = [f"{title} channel {i}".strip() for i in range(len(maps))]
    background = None if image is None else _image(image, channel_axis)
    if background is not None and background.shape[:2] != maps[0].shape:
        raise InputError(
            f"The image has {background.shape[:2]} pixels, relevance {maps[0].shape}."
        )
    limit = scale_of(np.stack(maps), robust)

    def draw() -> Figure:
        columns = len(maps) + (background is not None)
        figure, axes = axes_of(1, columns, (3.2 * columns + 0.8, 3.3))
        axes = list(axes[0])
        if background is not None:
            axes[0].imshow(background, cmap="gray")
            axes[0].set_title("image")
        drawn = []
        for ax, one, name in zip(axes[-len(maps) :], maps, names, strict=True):
            drawn.append(_draw_map(ax, one, limit, background))
            ax.set_title(name)
        colour_bar(figure, drawn[-1], axes)
        return figure

    total = channels.sum(-1)
    return Picture(
        draw,
        f"Relevance of {total.shape[0]} x {total.shape[1]} pixels, from "
        f"{total.min():.3g} to {total.max():.3g}, sum {total.sum():.3g}.",
    )


@takes(
    rows=arguments.mapping,
    images=arguments.optional(arguments.mapping),
    channel_axis=arguments.optional(arguments.whole()),
    robust=arguments.number(0, 100),
)
def comparison(
    rows: Mapping[str, Mapping[str, ArrayLike]],
    images: Mapping[str, ArrayLike] | None = None,
    *,
    channel_axis: int | None = -1,
    robust: float = ROBUST,
) -> Picture:
    """A grid of maps: one row per image, one column per method.

    Every map has a scale of its own: methods differ in units (a gradient is no
    relevance), so colours are compared within a map, not across.

    Args:
      rows: by image's name, by method's name: relevance as in ``heatmap``.
      images: by name, shown first in their rows.
      channel_axis, robust: as in ``heatmap``.

    Raises:
      InputError: for no rows, or rows of different methods.
    """
    check_values("rows", rows, Mapping, "a dict of maps by method")
    methods = list(next(iter(rows.values()), {}))
    if not methods or any(list(row) != methods for row in rows.values()):
        raise InputError(
            "rows need with the same methods; got "
            f"{ {name: list(row) for name, row in rows.items()} }."
        )
    maps = {
        name: [
            _channels_last(finite(r, f"{name} {m}"), channel_axis).sum(-1)
            for m, r in row.items()
        ]
        for name, row in rows.items()
    }
    shown = {
        name: _image(image, channel_axis, f"images[{name!r}]")
        for name, image in (images or {}).items()
    }

    def draw() -> Figure:
        first = int(bool(shown))
        columns = len(methods) + first
        figure, grid = axes_of(len(maps), columns, (2.1 * columns, 2.15 * len(maps)))
        for axes, (name, row) in zip(grid, maps.items(), strict=True):
            background = shown.get(name)
            if background is not None:
                axes[0].imshow(background, cmap="gray")
            axes[0].set_ylabel(name)
            for ax, one in zip(axes[first:], row, strict=True):
                _draw_map(ax, one, scale_of(one, robust), background)
        for ax, method in zip(grid[0][first:], methods, strict=True):
            ax.set_title(method, fontsize=9)
        return figure

    return Picture(
        draw,
        f"Relevance of {', '.join(maps)} in rows, by {', '.join(methods)}.",
    )


def _channels_last(array: np.ndarray, channel_axis: int | None) -> np.ndarray:
    wanted = 2 if channel_axis is None else 3
    axis = 0 if channel_axis is None else channel_axis
    if array.ndim != wanted or not -wanted <= axis < wanted:
        raise InputError(
            f"One image with channel_axis={channel_axis} has {wanted} axes; got shape "
            f"{array.shape}. Of a batch, take one: relevance[0]."
        )
    return (
        array[..., None]
        if channel_axis is None
        else np.moveaxis(array, channel_axis, -1)
    )


def _image(
    image: ArrayLike, channel_axis: int | None, name: str = "image"
) -> np.ndarray:
    """Colours or greys in 0 to 1, channels last."""
    pixels = finite(image, name)
    if pixels.ndim == 3:
        pixels = _channels_last(pixels, channel_axis)
    if pixels.ndim == 3 and pixels.shape[-1] not in (3, 4):
        pixels = pixels.mean(-1)
    low, high = pixels.min(), pixels.max()
    return (pixels - low) / (high - low or 1.0)


def _draw_map(
    ax: Axes, relevance: np.ndarray, limit: float, image: np.ndarray | None
) -> AxesImage:
    """A map, over the grey image where it is white."""
    if image is None:
        return ax.imshow(relevance, cmap=COLOURS, vmin=-limit, vmax=limit)
    grey = image if image.ndim == 2 else image[..., :3].mean(-1)
    ax.imshow(0.55 + 0.45 * grey, cmap="gray", vmin=0, vmax=1)
    opacity = np.clip(np.abs(relevance) / limit, 0, 1) ** 0.5
    return ax.imshow(relevance, cmap=COLOURS, vmin=-limit, vmax=limit, alpha=opacity)
