"""The picture that all functions return, its colours and its axes."""

# matplotlib types its functions in part.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

import base64
import html
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from jlrp import arguments
from jlrp.errors import InputError, IntegrationError
from jlrp.typing import ArrayLike

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

COLOURS = "RdBu_r"
ROBUST = 99.0  # percentile of |relevance| that has the full colour


@dataclass(frozen=True)
class Picture:
    """Something drawn on demand.

    Attributes:
      draw: makes a matplotlib figure.
      description: what it shows, for those who do not see it.
      markup: HTML shown instead of the drawing in notebooks, if there is any.
      terminal: text with ANSI colours that says the same, if there is any.
    """

    draw: Callable[[], Figure]
    description: str
    markup: str | None = None
    terminal: str | None = None

    def figure(self) -> Figure:
        """A new ``matplotlib.figure.Figure``."""
        return self.draw()

    def save(self, path: str | Path, dpi: int = 120) -> None:
        """Write it to a file, of the type that the name ends in; html is text."""
        if str(path).endswith((".html", ".htm")):
            with open(path, "w", encoding="utf-8") as file:
                file.write(self._repr_html_())
            return
        self.draw().savefig(path, dpi=dpi, bbox_inches="tight")

    def _repr_html_(self) -> str:
        if self.markup is not None:
            return self.markup
        data = io.BytesIO()
        self.draw().savefig(data, format="png", dpi=90, bbox_inches="tight")
        encoded = base64.b64encode(data.getvalue()).decode()
        alt = html.escape(self.description, quote=True)
        return f'<img alt="{alt}" src="data:image/png;base64,{encoded}">'

    def __str__(self) -> str:
        return self.description if self.terminal is None else self.terminal


def scale_of(relevance: np.ndarray, robust: float = ROBUST) -> float:
    """The absolute relevance that has the full colour: a percentile, so that one pixel
    does not make all others white.

    Args:
      relevance: finite, of any shape.
      robust: the percentile, above 0 and up to 100.

    Raises:
      InputError: for another percentile.
    """
    if not 0 < robust <= 100:
        raise InputError(f"robust is a percentile above 0, up to 100; got {robust}.")
    amounts = np.abs(relevance)
    # Of a map that is mostly zero the percentile may be 0: then the largest.
    return float(np.percentile(amounts, robust) or amounts.max() or 1.0)


def colour(share: float) -> tuple[int, int, int]:
    """The colour of a relevance in -1 to 1, without matplotlib: red, green, blue."""
    share = float(np.clip(share, -1, 1))
    end = np.array([178, 24, 43]) if share > 0 else np.array([33, 102, 172])
    red, green, blue = np.rint(255 + abs(share) * (end - 255)).astype(int)
    return int(red), int(green), int(blue)


def hex_colour(share: float) -> str:
    return "#{:02x}{:02x}{:02x}".format(*colour(share))


def ink_of(share: float) -> str:
    return "#fff" if abs(share) > 0.6 else "#000"


def finite(array: ArrayLike | Sequence[float], name: str) -> np.ndarray:
    arguments.concrete(name, array)
    array = np.asarray(array, np.float64)
    if array.size == 0 or not np.isfinite(array).all():
        raise InputError(
            f"{name} of shape {array.shape} holds NaN or inf, or nothing. jlrp.audit "
            "says where they began."
        )
    return array


def check_values(name: str, given: Mapping[str, object], kind: type, of: str) -> None:
    for key, value in given.items():
        arguments.instance(kind, of=of)(f"{name}[{key!r}]", value)


def colour_bar(figure: Figure, shown: AxesImage, axes: Axes | list[Axes]) -> None:
    bar = figure.colorbar(shown, ax=axes, shrink=0.8, extend="both")
    bar.set_label("relevance")
    if bar.solids is not None:
        bar.solids.set_alpha(1)


def axes_of(
    rows: int, columns: int, size: tuple[float, float], ticks: bool = False
) -> tuple[Figure, np.ndarray]:
    """A figure that no window manager knows, and its axes by row and column."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise IntegrationError(
            "Pictures are drawn by matplotlib, which is not installed: "
            "pip install 'jlrp[plot]'."
        ) from error
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False)
    if not ticks:
        for ax in axes.flat:
            ax.set_xticks([])
            ax.set_yticks([])
    return figure, axes
