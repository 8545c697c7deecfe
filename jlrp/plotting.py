"""Pictures of relevance: images, words, layers, heads, flows, comparisons, curves.

Each function returns a ``Picture``: shown in a notebook by itself, ``save(path)`` for a
file, ``figure()`` for matplotlib. Colours: blue speaks against, white is zero, red
speaks for; the map is the same for both kinds of colour blindness. matplotlib is
imported when a picture is drawn (``pip install 'jlrp[plot]'``).
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jlrp import arguments
from jlrp.arguments import takes
from jlrp.errors import InputError, IntegrationError
from jlrp.metrics import Curves, Randomisation

COLOURS = "RdBu_r"
ROBUST = 99.0  # percentile of |relevance| that has the full colour


def _check_values(name: str, given: Mapping[Any, Any], kind: type, of: str) -> None:
    for key, value in given.items():
        arguments.instance(kind, of=of)(f"{name}[{key!r}]", value)


def _words(name: str, value: Any) -> None:
    is_list = isinstance(value, Sequence | np.ndarray) and not isinstance(value, str)
    given = list(value) if is_list and np.ndim(value) == 1 else []
    if not given or not all(isinstance(word, str) for word in given):
        raise InputError(
            f"{name} is {arguments.shown(value)}; give a string for each token."
        )


@dataclass(frozen=True)
class Picture:
    """Something drawn on demand.

    Attributes:
      draw: makes a matplotlib figure.
      description: what it shows, for those who do not see it.
      markup: HTML shown instead of the drawing in notebooks, if there is any.
      terminal: text with ANSI colours that says the same, if there is any.
    """

    draw: Callable[[], Any]
    description: str
    markup: str | None = None
    terminal: str | None = None

    def figure(self) -> Any:
        """A new ``matplotlib.figure.Figure``."""
        return self.draw()

    def save(self, path: Any, dpi: int = 120) -> None:
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


@takes(
    relevance=arguments.concrete,
    image=arguments.optional(arguments.concrete),
    title=arguments.text,
    channel_axis=arguments.optional(arguments.whole()),
    per_channel=arguments.flag,
    robust=arguments.number(0, 100),
)
def heatmap(
    relevance: Any,
    image: Any = None,
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
        (height, width). Any range.
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
    relevance = _finite(relevance, "relevance")
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

    def draw() -> Any:
        columns = len(maps) + (background is not None)
        figure, axes = _axes(1, columns, (3.2 * columns + 0.8, 3.3))
        axes = list(axes[0])
        if background is not None:
            axes[0].imshow(background, cmap="gray")
            axes[0].set_title("image")
        shown: Any = None
        for ax, one, name in zip(axes[-len(maps) :], maps, names, strict=True):
            shown = _draw_map(ax, one, limit, background)
            ax.set_title(name)
        _colour_bar(figure, shown, axes)
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
    rows: Mapping[str, Mapping[str, Any]],
    images: Mapping[str, Any] | None = None,
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
    _check_values("rows", rows, Mapping, "a dict of maps by method")
    methods = list(next(iter(rows.values()), {}))
    if not methods or any(list(row) != methods for row in rows.values()):
        raise InputError(
            "rows need with the same methods; got "
            f"{ {name: list(row) for name, row in rows.items()} }."
        )
    maps = {
        name: [
            _channels_last(_finite(r, f"{name} {m}"), channel_axis).sum(-1)
            for m, r in row.items()
        ]
        for name, row in rows.items()
    }
    shown = {
        name: _image(image, channel_axis, f"images[{name!r}]")
        for name, image in (images or {}).items()
    }

    def draw() -> Any:
        first = int(bool(shown))
        columns = len(methods) + first
        figure, grid = _axes(len(maps), columns, (2.1 * columns, 2.15 * len(maps)))
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


@takes(
    words=_words,
    relevance=arguments.concrete,
    title=arguments.text,
    robust=arguments.number(0, 100),
)
def tokens(
    words: Sequence[str], relevance: Any, *, title: str = "", robust: float = 100.0
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
    relevance = _finite(relevance, "relevance")
    if relevance.shape != (len(words),):
        raise InputError(
            f"{len(words)} tokens need relevance of shape ({len(words)},); got "
            f"{relevance.shape}."
        )
    limit = scale_of(relevance, robust)
    shown = [_visible(word) for word in words]
    strip = list(zip(shown, relevance, strict=True))

    def draw() -> Any:
        rows = 1 + sum(len(word) + 2 for word in words) // 80  # at least as many
        figure, axes = _axes(1, 1, (9, 0.25 + 0.3 * rows))
        return _draw_words(figure, axes[0][0], strip, limit, title, 1 / rows)

    spans, cells = [], []
    for word, (seen, r) in zip(words, strip, strict=True):
        red, green, blue = colour(r / limit)
        ending = "<br>" if word.endswith("\n") else " "  # where a line may break
        spans.append(
            f'<span title="{r:.3g}" style="background:rgb({red},{green},{blue});'
            f'color:{_ink(r / limit)};padding:1px 3px;white-space:pre-wrap">'
            f"{html.escape(seen)}</span>{ending}"
        )
        ink = "38;2;255;255;255" if _ink(r / limit) == "#fff" else "38;2;0;0;0"
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


def _visible(word: str) -> str:
    """A token as it is read: what only moves to another line or place has a sign."""
    for character, sign in (("\n", "\u23ce"), ("\r", "\u240d"), ("\t", "\u21e5")):
        word = word.replace(character, sign)
    return word or "\u2205"


@takes(
    relevance=arguments.mapping,
    title=arguments.text,
)
def layers(relevance: Mapping[str, Any], *, title: str = "") -> Picture:
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
    values = {name: _finite(r, f"relevance[{name!r}]") for name, r in relevance.items()}
    positive = [float(np.maximum(r, 0).sum()) for r in values.values()]
    negative = [float(np.minimum(r, 0).sum()) for r in values.values()]

    def draw() -> Any:
        figure, axes = _axes(1, 1, (6.5, 0.9 + 0.34 * len(values)), ticks=True)
        ax, at = axes[0][0], np.arange(len(values))
        ax.barh(at, positive, color=_hex(1.0), label="for")
        ax.barh(at, negative, color=_hex(-1.0), label="against")
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
    relevance: Mapping[str, Any], *, head_axis: int = -2, title: str = ""
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
        name: _sum_to(_finite(r, f"relevance[{name!r}]"), head_axis, name)
        for name, r in relevance.items()
    }
    columns = max(map(len, sums.values()))
    table = np.full((len(sums), columns), np.nan)
    for row, one in zip(table, sums.values(), strict=True):
        row[: len(one)] = one
    limit = scale_of(np.concatenate(list(sums.values())), 100)

    def draw() -> Any:
        size = (1.9 + 0.62 * columns, 1.2 + 0.42 * len(sums))
        figure, axes = _axes(1, 1, size, ticks=True)
        ax = axes[0][0]
        shown = ax.imshow(table, cmap=COLOURS, vmin=-limit, vmax=limit, aspect="auto")
        for (row, column), r in np.ndenumerate(table):
            if not np.isnan(r):
                ink = _ink(r / limit)
                ax.text(column, row, f"{r:.2g}", ha="center", va="center", color=ink)
        ax.set_xticks(range(columns))
        ax.set_yticks(range(len(sums)), list(sums))
        ax.set_xlabel("head")
        ax.set_title(title)
        _colour_bar(figure, shown, ax)
        return figure

    names = list(sums)
    row, column = np.unravel_index(np.nanargmax(table), table.shape)
    return Picture(
        draw,
        f"Relevance of the heads of {', '.join(names)}; the most: {names[int(row)]} "
        f"head {column} ({table[row, column]:.3g}).",
    )


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
    amounts = _finite(list(edges.values()), "edges")
    places = _from_the_top(edges)
    largest = float(np.abs(amounts).max() or 1.0)
    arriving = dict.fromkeys(places, 0.0)
    for (_, to), amount in zip(edges, amounts, strict=True):
        arriving[to] += float(amount)
    strongest = sorted(edges.items(), key=lambda edge: -abs(edge[1]))

    def draw() -> Any:
        figure, axes = _axes(1, 1, (6.5, 1.0 + 0.62 * len(places)))
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


@takes(
    examples=arguments.mapping,
    columns=arguments.whole(1),
    robust=arguments.number(0, 100),
)
def pairs(
    examples: Mapping[str, tuple[Sequence[str], Sequence[str], Any]],
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
    _check_values("examples", examples, tuple, "(words, other words, relevance)")
    checked, strongest = {}, []
    for name, (words, others, relevance) in examples.items():
        relevance = _finite(relevance, f"relevance of {name!r}")
        if relevance.shape != (len(words), len(others)):
            raise InputError(
                f"{len(words)} words and {len(others)} others need relevance of shape "
                f"{(len(words), len(others))}; got {relevance.shape}."
            )
        checked[name] = (words, others, relevance)
        i, j = divmod(int(relevance.argmax()), len(others))
        strongest.append(f"{words[i]} - {others[j]} ({relevance[i, j]:.2g})")

    def draw() -> Any:
        rows = -(-len(checked) // columns)
        figure, grid = _axes(rows, columns, (5.6 * columns, 1.75 * rows))
        for ax in grid.flat:
            ax.set_axis_off()
        for ax, (name, example) in zip(grid.flat, checked.items(), strict=False):
            ax.set_title(name, loc="left", fontsize=9)
            words, others, relevance = example
            _draw_pairs(ax, words, others, relevance, scale_of(relevance, robust))
        return figure

    return Picture(draw, f"Relevance of pairs of words: {', '.join(strongest)}.")


@takes(
    found=arguments.mapping,
    score=arguments.text,
)
def curves(found: Mapping[str, Any], *, score: str = "score") -> Picture:
    """Perturbation curves of several methods, with the area between.

    Args:
      found: by method, ``jlrp.metrics.Curves``: means over examples are drawn.
      score: name of the vertical axis.

    Raises:
      InputError: for no methods.
    """
    if not found:
        raise InputError("found is empty; give the curves of at least one method.")
    _check_values("found", found, Curves, "jlrp.metrics.Curves")

    def draw() -> Any:
        figure, axes = _axes(1, len(found), (3.0 * len(found) + 0.5, 2.9), ticks=True)
        top = max(float(np.mean(c.morf, 0).max()) for c in found.values())
        top = max(top, *(float(np.mean(c.lerf, 0).max()) for c in found.values()))
        for ax, (name, curve) in zip(axes[0], found.items(), strict=True):
            removed = np.asarray(curve.removed)
            morf, lerf = np.mean(curve.morf, 0), np.mean(curve.lerf, 0)
            ax.fill_between(removed, morf, lerf, color="0.9")
            ax.plot(removed, morf, color=_hex(1.0), label="most relevant first")
            ax.plot(removed, lerf, color=_hex(-1.0), ls="--", label="least first")
            ax.set_ylim(0, 1.05 * top)
            ax.set_xlabel("removed")
            ax.set_title(f"{name}\nABPC {float(np.mean(curve.abpc)):.3f}", fontsize=9)
        axes[0][0].set_ylabel(score)
        axes[0][0].legend(fontsize=7)
        return figure

    areas = ", ".join(
        f"{name} {float(np.mean(c.abpc)):.3f}" for name, c in found.items()
    )
    return Picture(draw, f"Perturbation curves; area between them: {areas}.")


@takes(
    found=arguments.mapping,
)
def randomisation(found: Mapping[str, Any]) -> Picture:
    """The sanity check: similarity of relevance while layers are randomised.

    Args:
      found: by method, ``jlrp.metrics.Randomisation``: means over examples are drawn.

    Raises:
      InputError: for no methods.
    """
    if not found:
        raise InputError("found is empty; randomisation() needs at least one method.")
    _check_values("found", found, Randomisation, "a jlrp.metrics.Randomisation")
    means = {
        name: np.concatenate([[1.0], np.mean(checked.similarity, 0)])
        for name, checked in found.items()
    }

    def draw() -> Any:
        figure, axes = _axes(1, 1, (7.5, 3.4), ticks=True)
        from matplotlib import colormaps

        ax = axes[0][0]
        tones = colormaps["viridis"](np.linspace(0, 0.85, len(means)))
        marks = "osD^v<>Px*"
        for i, (name, mean) in enumerate(means.items()):
            share = np.linspace(0, 1, len(mean))
            style = {"color": tones[i], "marker": marks[i % len(marks)]}
            ax.plot(share, mean, markersize=4, label=name, **style)
        ax.axhline(0, color="black", linewidth=0.8)
        ax.set_xlabel("share of the layers randomised, from the top")
        ax.set_ylabel("similarity")
        ax.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
        return figure

    ends = ", ".join(f"{name} {mean[-1]:.2f}" for name, mean in means.items())
    return Picture(draw, f"Similarity with all layers randomised: {ends}.")


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


def _hex(share: float) -> str:
    return "#{:02x}{:02x}{:02x}".format(*colour(share))


def _ink(share: float) -> str:
    return "#fff" if abs(share) > 0.6 else "#000"


def _finite(array: Any, name: str) -> np.ndarray:
    arguments.concrete(name, array)
    array = np.asarray(array, np.float64)
    if array.size == 0 or not np.isfinite(array).all():
        raise InputError(
            f"{name} of shape {array.shape} holds NaN or inf, or nothing. jlrp.audit "
            "says where they began."
        )
    return array


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


def _image(image: Any, channel_axis: int | None, name: str = "image") -> np.ndarray:
    """Colours or greys in 0 to 1, channels last."""
    image = _finite(image, name)
    if image.ndim == 3:
        image = _channels_last(image, channel_axis)
    if image.ndim == 3 and image.shape[-1] not in (3, 4):
        image = image.mean(-1)
    low, high = image.min(), image.max()
    return (image - low) / (high - low or 1.0)


def _draw_map(ax: Any, relevance: Any, limit: float, image: Any) -> Any:
    """A map, over the grey image where it is white."""
    if image is None:
        return ax.imshow(relevance, cmap=COLOURS, vmin=-limit, vmax=limit)
    grey = image if image.ndim == 2 else image[..., :3].mean(-1)
    ax.imshow(0.55 + 0.45 * grey, cmap="gray", vmin=0, vmax=1)
    opacity = np.clip(np.abs(relevance) / limit, 0, 1) ** 0.5
    return ax.imshow(relevance, cmap=COLOURS, vmin=-limit, vmax=limit, alpha=opacity)


def _colour_bar(figure: Any, shown: Any, axes: Any) -> None:
    bar = figure.colorbar(shown, ax=axes, shrink=0.8, extend="both")
    bar.set_label("relevance")
    bar.solids.set_alpha(1)


def _draw_words(
    figure: Any, ax: Any, strip: Any, limit: float, title: str, row: float
) -> Any:
    """Words side by side, on a new line where the figure ends."""
    ax.set_axis_off()
    ax.set_title(title, loc="left", fontsize=9)
    renderer = figure.canvas.get_renderer()
    left, line, width = 0.0, 1.0, ax.get_window_extent(renderer).width
    for word, r in strip:
        text = ax.text(
            0,
            0,
            word,
            family="monospace",
            color=_ink(r / limit),
            bbox={"facecolor": _hex(r / limit), "pad": 2, "edgecolor": "none"},
        )
        size = (text.get_window_extent(renderer).width + 8) / width
        if left + size > 1 and left > 0:
            left, line = 0.0, line - row
        text.set_position((left, line))
        text.set_transform(ax.transAxes)
        text.set_verticalalignment("top")
        left += size
    return figure


def _sum_to(array: np.ndarray, axis: int, name: str) -> np.ndarray:
    if not -array.ndim <= axis < array.ndim:
        raise InputError(f"{name} of shape {array.shape} has no axis {axis} of heads.")
    return np.moveaxis(array, axis, -1).reshape(-1, array.shape[axis]).sum(0)


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


def _draw_flow(ax: Any, top: int, bottom: int, amount: float, largest: float) -> None:
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
        edgecolor=_hex(1.0 if share > 0 else -1.0),
        linewidth=0.6 + 11 * abs(share),
        alpha=0.35 + 0.5 * abs(share),
        capstyle="butt",
    )
    ax.add_patch(line)
    if abs(share) > 0.1:
        middle = (out + 0.08, (top + bottom) / 2)
        ax.text(*middle, f"{amount:.2g}", size=8, va="center", zorder=4)


def _draw_pairs(
    ax: Any, words: Sequence[str], others: Sequence[str], relevance: Any, limit: float
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
            color=_hex(np.sign(share)),
            alpha=abs(share),
            linewidth=0.3 + 4 * abs(share),
            solid_capstyle="round",
        )
    ax.set(xlim=(0, 1), ylim=(-0.35, 1.35))


def _axes(rows: int, columns: int, size: tuple[float, float], ticks: bool = False):
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
