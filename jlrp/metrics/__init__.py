"""What an explanation says about the model: metrics of faithfulness and localisation.

All take batches and return one number per example; ``interval`` makes a mean with its
confidence interval of them. Those that run the model are one compiled program.
"""

from jlrp.metrics.intervals import Interval as Interval
from jlrp.metrics.intervals import interval as interval
from jlrp.metrics.localisation import pointing_game as pointing_game
from jlrp.metrics.localisation import relevance_mass as relevance_mass
from jlrp.metrics.localisation import relevance_rank as relevance_rank
from jlrp.metrics.localisation import top_k_accuracy as top_k_accuracy
from jlrp.metrics.parts import Parts as Parts
from jlrp.metrics.parts import features as features
from jlrp.metrics.parts import patches as patches
from jlrp.metrics.parts import pixels as pixels
from jlrp.metrics.parts import pool as pool
from jlrp.metrics.parts import tokens as tokens
from jlrp.metrics.perturbation import Curves as Curves
from jlrp.metrics.perturbation import curves as curves
from jlrp.metrics.removal import Blur as Blur
from jlrp.metrics.removal import Constant as Constant
from jlrp.metrics.removal import Inpaint as Inpaint
from jlrp.metrics.removal import Mean as Mean
from jlrp.metrics.removal import Noise as Noise
from jlrp.metrics.robustness import infidelity as infidelity
from jlrp.metrics.robustness import sensitivity as sensitivity
from jlrp.metrics.sanity import Randomisation as Randomisation
from jlrp.metrics.sanity import randomisation as randomisation
