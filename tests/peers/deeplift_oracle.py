"""What SHAP's DeepExplainer and Captum's DeepLift say: relevance from a reference.

Both take the secant at activation modules, and the gradient where the input hardly
changes (1e-6). SHAP averages over the rows of a background; its max pooling is
cross-max, of windows that do not overlap. Captum 0.9's max pooling divides by the wrong
difference: its sums are wrong. Every module may be used once only.
"""

import warnings

import numpy as np

from peers import captum, shap, torch


def of_shap(module, x, background):
    """SHAP values of every output: an array like x with a last axis of outputs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        explainer = shap.DeepExplainer(module, torch.tensor(background))
        return np.asarray(
            explainer.shap_values(torch.tensor(x), check_additivity=False)
        )


def of_captum(module, x, baseline, target):
    """Captum's attributions of an output, from one reference for each example."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = captum.DeepLift(module).attribute(
            torch.tensor(x, requires_grad=True), torch.tensor(baseline), target=target
        )
    return found.detach().numpy()
