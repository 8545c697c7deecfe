"""Testing that relevance does not depend on how a program is written.

``check_spellings`` explains a function and its *twins*: the same function in other
words, rewritten equation by equation.
"""

# Each of these files registers its rewritings.
from jlrp.testing import calls as _calls  # noqa: F401
from jlrp.testing import dense as _dense  # noqa: F401
from jlrp.testing import functions as _functions  # noqa: F401
from jlrp.testing import movement as _movement  # noqa: F401
from jlrp.testing import products as _products  # noqa: F401
from jlrp.testing import sums as _sums  # noqa: F401
from jlrp.testing.checking import (
    SpellingRow,
    Spellings,
    Twin,
    check_spellings,
    kinds,
    twins,
)
from jlrp.testing.points import Kink, kinks
from jlrp.testing.rewriting import Rewriting

__all__ = [
    "Kink",
    "Rewriting",
    "SpellingRow",
    "Spellings",
    "Twin",
    "check_spellings",
    "kinds",
    "kinks",
    "twins",
]
