"""What an explanation says about the model: metrics of faithfulness and localisation.

All take batches and return one number per example; ``interval`` makes a mean with its
confidence interval of them. Those that run the model are one compiled program.
"""

from jlrp.metrics.intervals import Interval, interval
from jlrp.metrics.localisation import (
    pointing_game,
    relevance_mass,
    relevance_rank,
    top_k_accuracy,
)
from jlrp.metrics.parts import Parts, features, patches, pixels, pool, tokens
from jlrp.metrics.perturbation import Curves, curves
from jlrp.metrics.removal import Blur, Constant, Inpaint, Mean, Noise
from jlrp.metrics.robustness import infidelity, sensitivity
from jlrp.metrics.sanity import Randomisation, randomisation

__all__ = [
    "Blur",
    "Constant",
    "Curves",
    "Inpaint",
    "Interval",
    "Mean",
    "Noise",
    "Parts",
    "Randomisation",
    "curves",
    "features",
    "infidelity",
    "interval",
    "patches",
    "pixels",
    "pointing_game",
    "pool",
    "randomisation",
    "relevance_mass",
    "relevance_rank",
    "sensitivity",
    "tokens",
    "top_k_accuracy",
]
