"""Strips of tokens, and pairs of words."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from jlrp import arguments
from jlrp.arguments import takes
from jlrp.errors import InputError
from jlrp.plotting.drawing import (
    Picture,
    axes_of,
    check_values,
    colour,
    finite,
    hex_colour,
    ink_of,
    scale_of,
)
from jlrp.typing import ArrayLike

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def _words(name: str, value: Any) -> None:
    is_list = isinstance(value, Sequence | np.ndarray) and not isinstance(value, str)
    given = list(value) if is_list and np.ndim(value) == 1 else []
    if not given or not all(isinstance(word, str) for word in given):
        raise InputError(
            f"{name} is {arguments.shown(value)}; give a string for each token."
        )


@takes(
    words=_words,
    relevance=arguments.concrete,
    title=arguments.text,
    robust=arguments.number(0, 100),
)
def tokens(
    words: Sequence[str],
    relevance: ArrayLike,
    *,
    title: str = "",
    robust: float = 100.0,
) -> Picture:
    """A strip of tokens on the colour of their relevance, for terminal, HTML and file.

    Args:
      words: of each token.
      relevance: float (tokens,).
      title: before the strip.
      robust: percentile of the absolute values at which the colour saturates.

    Raises:
      InputError: for another number of relevances, NaN or inf.

    Example:
      >>> from jlrp import plotting
      >>> strip = plotting.tokens(["not", "bad"], [2.0, -1.0])
      >>> '<span title="2"' in strip._repr_html_()
      True
    """
    relevance = finite(relevance, "relevance")
    if relevance.shape != (len(words),):
        raise InputError(
            f"{len(words)} tokens need relevance of shape ({len(words)},); got "
            f"{relevance.shape}."
        )
    limit = scale_of(relevance, robust)
    shown = [_visible(word) for word in words]
    strip = list(zip(shown, relevance, strict=True))

    def draw() -> Figure:
        rows = 1 + sum(len(word) + 2 for word in words) // 80  # at least as many
        figure, axes = axes_of(1, 1, (9, 0.25 + 0.3 * rows))
        return _draw_words(figure, axes[0][0], strip, limit, title, 1 / rows)

    spans, cells = [], []
    for word, (seen, r) in zip(words, strip, strict=True):
        red, green, blue = colour(r / limit)
        ending = "<br>" if word.endswith("\n") else " "  # where a line may break
        spans.append(
            f'<span title="{r:.3g}" style="background:rgb({red},{green},{blue});'
            f'color:{ink_of(r / limit)};padding:1px 3px;white-space:pre-wrap">'
            f"{html.escape(seen)}</span>{ending}"
        )
        ink = "38;2;255;255;255" if ink_of(r / limit) == "#fff" else "38;2;0;0;0"
        cells.append(f"\x1b[48;2;{red};{green};{blue};{ink}m {seen} \x1b[0m")
    heading = f"<b>{html.escape(title)}</b> " if title else ""
    most = [str(words[int(i)]) for i in np.argsort(-relevance)[:3]]
    return Picture(
        draw,
        f"Relevance of {len(words)} tokens; most relevant: {', '.join(most)}.",
        f'<div style="font-family:monospace;line-height:1.9">{heading}'
        f"{''.join(spans)}</div>",
        (f"{title} " if title else "") + "".join(cells),
    )


@takes(
    examples=arguments.mapping,
    columns=arguments.whole(1),
    robust=arguments.number(0, 100),
)
def pairs(
    examples: Mapping[str, tuple[Sequence[str], Sequence[str], ArrayLike]],
    *,
    columns: int = 2,
    robust: float = 100.0,
) -> Picture:
    """Relevance of pairs of words of two sentences, one above the other: BiLRP.

    Args:
      examples: by title: the words of one sentence, those of the other, and the
        relevance of each pair, float (words of one, words of the other).
      columns: of the grid.
      robust: percentile of the absolute values at which a line has its full colour.

    Raises:
      InputError: for no examples, shapes that do not fit, NaN or inf.

    Example:
      >>> from jlrp import plotting
      >>> print(plotting.pairs({"": (["a", "cat"], ["cats"], [[0.1], [0.5]])}))
      Relevance of pairs of words: cat - cats (0.5).
    """
    if not examples:
        raise InputError("examples is empty; give at least one pair of sentences.")
    check_values("examples", examples, tuple, "(words, other words, relevance)")
    checked, strongest = {}, []
    for name, (words, others, relevance) in examples.items():
        relevance = finite(relevance, f"relevance of {name!r}")
        if relevance.shape != (len(words), len(others)):
            raise InputError(
                f"{len(words)} words and {len(others)} others need relevance of shape "
                f"{(len(words), len(others))}; got {relevance.shape}."
            )
        checked[name] = (words, others, relevance)
        i, j = divmod(int(relevance.argmax()), len(others))
        strongest.append(f"{words[i]} - {others[j]} ({relevance[i, j]:.2g})")

    def draw() -> Figure:
        rows = -(-len(checked) // columns)
        figure, grid = axes_of(rows, columns, (5.6 * columns, 1.75 * rows))
        for ax in grid.flat:
            ax.set_axis_off()
        for ax, (name, example) in zip(grid.flat, checked.items(), strict=False):
            ax.set_title(name, loc="left", fontsize=9)
            words, others, relevance = example
            _draw_pairs(ax, words, others, relevance, scale_of(relevance, robust))
        return figure

    return Picture(draw, f"Relevance of pairs of words: {', '.join(strongest)}.")


def _visible(word: str) -> str:
    """A token as it is read: what only moves to another line or place has a sign."""
    for character, sign in (("\n", "\u23ce"), ("\r", "\u240d"), ("\t", "\u21e5")):
        word = word.replace(character, sign)
    return word or "\u2205"


def _draw_words(
    figure: Figure,
    ax: Axes,
    strip: Sequence[tuple[str, float]],
    limit: float,
    title: str,
    row: float,
) -> Figure:
    """Words side by side, on a new line where the figure ends."""
    ax.set_axis_off()
    ax.set_title(title, loc="left", fontsize=9)
    renderer = figure.canvas.get_renderer()  # type: ignore  (Agg's has one)
    left, line, width = 0.0, 1.0, ax.get_window_extent(renderer).width
    for word, r in strip:
        text = ax.text(
            0,
            0,
            word,
            family="monospace",
            color=ink_of(r / limit),
            bbox={"facecolor": hex_colour(r / limit), "pad": 2, "edgecolor": "none"},
        )
        size = (text.get_window_extent(renderer).width + 8) / width
        if left + size > 1 and left > 0:
            left, line = 0.0, line - row
        text.set_position((left, line))
        text.set_transform(ax.transAxes)
        text.set_verticalalignment("top")
        left += size
    return figure


def _draw_pairs(
    ax: Axes,
    words: Sequence[str],
    others: Sequence[str],
    relevance: np.ndarray,
    limit: float,
) -> None:
    """Two rows of words, spread over the same width, and lines between them."""
    places = []
    for row, level in ((words, 1.0), (others, 0.0)):
        widths = np.array([len(word) + 1.5 for word in row])
        starts = np.cumsum(widths) - widths
        centres = (starts + widths / 2) / widths.sum()
        places.append(centres)
        for word, place in zip(row, centres, strict=True):
            va = "bottom" if level else "top"
            ax.text(place, level, word, ha="center", va=va, size=9)
    for flat in np.argsort(np.abs(relevance), axis=None):
        i, j = np.unravel_index(flat, relevance.shape)
        share = float(np.clip(relevance[i, j] / limit, -1, 1))
        ax.plot(
            [places[0][i], places[1][j]],
            [0.95, 0.05],
            color=hex_colour(np.sign(share)),
            alpha=abs(share),
            linewidth=0.3 + 4 * abs(share),
            solid_capstyle="round",
        )
    ax.set(xlim=(0, 1), ylim=(-0.35, 1.35))
