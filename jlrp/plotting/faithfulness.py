"""Pictures of what ``jlrp.metrics`` found."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from jlrp import arguments
from jlrp.arguments import takes
from jlrp.errors import InputError
from jlrp.metrics import Curves, Randomisation
from jlrp.plotting.drawing import (
    Picture,
    axes_of,
    check_values,
    hex_colour,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@takes(
    found=arguments.mapping,
    score=arguments.text,
)
def curves(found: Mapping[str, Curves], *, score: str = "score") -> Picture:
    """Perturbation curves of several methods, with the area between.

    Args:
      found: by method, ``jlrp.metrics.Curves``: means over examples are drawn.
      score: name of the vertical axis.

    Raises:
      InputError: for no methods.
    """
    if not found:
        raise InputError("found is empty; give the curves of at least one method.")
    check_values("found", found, Curves, "jlrp.metrics.Curves")

    def draw() -> Figure:
        figure, axes = axes_of(1, len(found), (3.0 * len(found) + 0.5, 2.9), ticks=True)
        top = max(float(np.mean(c.morf, 0).max()) for c in found.values())
        top = max(top, *(float(np.mean(c.lerf, 0).max()) for c in found.values()))
        for ax, (name, curve) in zip(axes[0], found.items(), strict=True):
            removed = np.asarray(curve.removed)
            morf, lerf = np.mean(curve.morf, 0), np.mean(curve.lerf, 0)
            ax.fill_between(removed, morf, lerf, color="0.9")
            ax.plot(removed, morf, color=hex_colour(1.0), label="most relevant first")
            ax.plot(removed, lerf, color=hex_colour(-1.0), ls="--", label="least first")
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
def randomisation(found: Mapping[str, Randomisation]) -> Picture:
    """The sanity check: similarity of relevance while layers are randomised.

    Args:
      found: by method, ``jlrp.metrics.Randomisation``: means over examples are drawn.

    Raises:
      InputError: for no methods.
    """
    if not found:
        raise InputError("found is empty; randomisation() needs at least one method.")
    check_values("found", found, Randomisation, "a jlrp.metrics.Randomisation")
    means = {
        name: np.concatenate([[1.0], np.mean(checked.similarity, 0)])
        for name, checked in found.items()
    }

    def draw() -> Figure:
        figure, axes = axes_of(1, 1, (7.5, 3.4), ticks=True)
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
