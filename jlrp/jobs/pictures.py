"""One example of a store, as colours: heat maps and token strips."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from jlrp.errors import IntegrationError
from jlrp.jobs import store
from jlrp.jobs.errors import JobError
from jlrp.jobs.steps import FAILURES, UNWRITTEN

_POSITIVE, _NEGATIVE = np.array([200, 30, 30]), np.array([40, 70, 200])
_RESET = "\x1b[0m"


def load_example(path: str | Path, index: int) -> dict[str, np.ndarray]:
    """One row of every array of a store.

    Raises:
      JobError: if there is no such row, or it is not done.
    """
    path = Path(path)
    store.attributes(path)
    failure = store.array(path, "failure")
    if not 0 <= index < failure.shape[0]:
        raise JobError(
            f"{path} has no example {index}: it has 0 to {failure.shape[0] - 1}."
        )
    names = store.names(path)
    row = {n: store.array(path, n)[index].read().result() for n in names}
    if row["failure"] == UNWRITTEN:
        raise JobError(f"Example {index} of {path} is not done yet; resume the job.")
    return row


def heading(index: int, row: dict[str, np.ndarray]) -> str:
    """An example's numbers in a line."""
    target = f" target {row['target']}," if "target" in row else ""
    failed = f", failed: {FAILURES[int(row['failure'])]}" if row["failure"] else ""
    return (
        f"example {index}:{target} score {float(row['score']):.4g}, "
        f"absorbed {float(row['absorbed']):.4g}{failed}"
    )


def relevances(row: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The relevances of an example as maps ``(height, width)`` or strips ``(1, n)``.

    Channels are summed. Ragged ones end where the example does.
    """
    maps: dict[str, np.ndarray] = {}
    for name, array in row.items():
        if name.split(".")[0] != "relevance" or not np.issubdtype(
            array.dtype, np.floating
        ):
            continue
        if "length" in row and array.ndim:
            array = array[: int(row["length"])]
        while array.ndim > 2:
            array = array.sum(-1)
        maps[name] = np.atleast_2d(array.astype(np.float32))
    return maps


def colours(relevance: np.ndarray) -> np.ndarray:
    """Red where it spoke for the target, blue against; ``uint8[..., 3]``."""
    largest = np.nanmax(np.abs(relevance), initial=0)
    share = np.nan_to_num(relevance / largest if largest > 0 else relevance * 0)
    ends = np.where(share[..., None] > 0, _POSITIVE, _NEGATIVE)
    strength = np.abs(share)[..., None]
    return (255 + (ends - 255) * strength).round().astype(np.uint8)


def terminal(relevance: np.ndarray, tokens: Sequence[object] | None = None) -> str:
    """A heat map in colours of the terminal, or a strip of tokens."""
    painted = colours(relevance)
    if len(relevance) > 1:
        return "\n".join("".join(_on(c, "  ") for c in line) for line in painted)
    texts = [f"{r:+.2g}" for r in relevance[0]] if tokens is None else tokens
    cells = zip(painted[0], texts, strict=False)
    return " ".join(_on(colour, f" {text} ") for colour, text in cells)


def write_png(relevance: np.ndarray, path: str | Path) -> None:
    """Write a heat map or strip as a picture of at least 256 pixels.

    Raises:
      IntegrationError: if Matplotlib is missing.
    """
    try:
        from matplotlib.image import imsave
    except ImportError as error:
        raise IntegrationError(
            "Pictures need matplotlib. Install it with: pip install 'jlrp[plot]'"
        ) from error
    zoom = max(1, -(-256 // max(relevance.shape)))
    painted = colours(relevance).repeat(zoom, axis=0).repeat(zoom, axis=1)
    imsave(path, painted)


def _on(colour: np.ndarray, text: str) -> str:
    red, green, blue = colour
    return f"\x1b[48;2;{red};{green};{blue}m\x1b[38;2;0;0;0m{text}{_RESET}"
