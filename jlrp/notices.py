"""The warning that relevance stops, at the user's line that asked for it."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax

from jlrp.analysis.stopped import Stop
from jlrp.errors import JlrpWarning

_LIBRARIES = tuple(str(Path(file).parent) for file in (__file__, jax.__file__))
_LISTED = 3


def warn_of(stops: Sequence[Stop]) -> None:
    """Warn of paths from x that end while others go on, but for those that are meant.

    Called where a plan is made: a cached program does not warn again.
    """
    found = list(dict.fromkeys(str(s) for s in stops if not s.is_meant))
    if not found:
        return
    listed = "; ".join(found[:_LISTED])
    more = f"; and {len(found) - _LISTED} more" if len(found) > _LISTED else ""
    _warn(
        f"Relevance stops, while another path from x goes on: {listed}{more}. What "
        "these paths contribute is on no input: jlrp.audit says how much, as "
        "`stopped`. A straight-through derivative (x + stop_gradient(f(x) - x), or a "
        "jax.custom_vjp) carries it; warnings.filterwarnings('ignore', "
        "category=jlrp.JlrpWarning) accepts it."
    )


def _warn(text: str) -> None:
    frame, level = sys._getframe(0), 1
    while frame.f_back and frame.f_code.co_filename.startswith(
        (*_LIBRARIES, contextlib.__file__)
    ):
        frame, level = frame.f_back, level + 1
    warnings.warn(text, JlrpWarning, stacklevel=level)


@contextlib.contextmanager
def once(report: Callable[[str], None] = _warn) -> Iterator[None]:
    """Report once what several plans of one program would each warn of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    ours = [w for w in caught if issubclass(w.category, JlrpWarning)]
    for warning in caught:
        if warning not in ours:
            warnings.warn_explicit(
                warning.message, warning.category, warning.filename, warning.lineno
            )
    for text in dict.fromkeys(str(w.message) for w in ours):
        report(text)
