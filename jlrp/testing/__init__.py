"""Testing that relevance does not depend on how a program is written.

``check_spellings`` explains a function and its *twins*: the same function in other
words, rewritten equation by equation.
"""

# Each file registers its rewritings.
from jlrp.testing import calls as calls
from jlrp.testing import dense as dense
from jlrp.testing import functions as functions
from jlrp.testing import movement as movement
from jlrp.testing import products as products
from jlrp.testing import sums as sums
from jlrp.testing.checking import COMPOSITES as COMPOSITES
from jlrp.testing.checking import SpellingError as SpellingError
from jlrp.testing.checking import SpellingRow as SpellingRow
from jlrp.testing.checking import Spellings as Spellings
from jlrp.testing.checking import Twin as Twin
from jlrp.testing.checking import check_spellings as check_spellings
from jlrp.testing.checking import kinds as kinds
from jlrp.testing.checking import twins as twins
from jlrp.testing.points import Kink as Kink
from jlrp.testing.points import kinks as kinks
from jlrp.testing.rewriting import Rewriting as Rewriting
