"""What is done for a compiler's sake, and changes no number but by rounding.

Control dependencies on relevance (``dependencies``), one branch for a whole batch
(``batches``), the layout of convolutions in a loop (``looping``), both signs of
contributions by two maps instead of four, large kernels by blocks, equal layers traced
once (``contributions``). All of it behind one switch: with it off, rules are what their
papers have.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

_switched_off = 0


def enabled() -> bool:
    """Whether tactics are used, in what is traced now."""
    return not _switched_off


@contextlib.contextmanager
def off() -> Iterator[None]:
    """Without tactics, in what is traced inside of the block."""
    global _switched_off
    _switched_off += 1
    try:
        yield
    finally:
        _switched_off -= 1
