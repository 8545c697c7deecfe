"""Loops and branches: the rules of their bodies' operations, run in reverse.

A scan keeps what its body's rules read, stacked over the iterations, and hands
relevance back by a scan the other way round. A branch is run again where relevance
comes back, and so is a ``while_loop``, from checkpoints: its trip count is not known
before it has run, so that nothing can be stacked.
"""

from jlrp.rules.loops.cond import Cond
from jlrp.rules.loops.scan import Scan
from jlrp.rules.loops.while_loop import While

CONTROL_FLOW = {"scan": Scan, "cond": Cond, "while": While}
