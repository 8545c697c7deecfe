"""Pictures of relevance: images, words, layers, heads, flows, comparisons, curves.

Each function returns a ``Picture``: shown in a notebook by itself, ``save(path)`` for a
file, ``figure()`` for matplotlib. Colours: blue speaks against, white is zero, red
speaks for; the map is the same for both kinds of colour blindness. matplotlib is
imported when a picture is drawn (``pip install 'jlrp[plot]'``).
"""

from jlrp.plotting.drawing import COLOURS, ROBUST, Picture, colour, scale_of
from jlrp.plotting.faithfulness import curves, randomisation
from jlrp.plotting.flows import flow
from jlrp.plotting.images import comparison, heatmap
from jlrp.plotting.inside import heads, layers
from jlrp.plotting.measured import intervals
from jlrp.plotting.words import pairs, tokens

__all__ = [
    "COLOURS",
    "ROBUST",
    "Picture",
    "colour",
    "comparison",
    "curves",
    "flow",
    "heads",
    "heatmap",
    "intervals",
    "layers",
    "pairs",
    "randomisation",
    "scale_of",
    "tokens",
]
