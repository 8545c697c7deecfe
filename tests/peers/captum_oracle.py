"""What Captum's LRP says with EpsilonRule on every layer that has a rule.

Captum's conventions (0.9): relevance `x * grad / (z + epsilon * sign(z))` with sign(0)
= +1 on convolutions, dense maps, batch norms, average pooling, additions, and on max
pooling too, where the winner gets `R * y / (y + epsilon)`; ReLU and tanh pass; flatten
is left to autograd. A batch norm is a linear layer of its own with a bias, so that the
stabiliser acts twice, before and after it: beside small outputs of the convolution that
shows (1e-7 of the largest relevance was seen), so merge batch norms first to compare.
Every module may be used once only. A value that both a concatenation and a module use
gets wrong relevance: autograd adds what the one hands on, relevance, to the multiplier
of the other, and Captum then multiplies their sum by the value.
"""

from peers import captum, torch, torch_networks

Addition_Module = captum._utils.custom_modules.Addition_Module
EpsilonRule = captum._utils.lrp_rules.EpsilonRule
GammaRule = captum._utils.lrp_rules.GammaRule
AFFINE = (torch.nn.Conv2d, torch.nn.ConvTranspose2d, torch.nn.Linear)


def forward(network, values, x):
    module = torch_networks.build(network, values, addition=Addition_Module)
    with torch.no_grad():
        return module(torch.tensor(x)).numpy()


def relevance(network, values, x, target=None, rule=EpsilonRule):
    """Relevance shaped like x of the class `target`, or of each example's arg-max.

    `rule()` makes the rule of convolutions and dense maps; Captum's stabiliser is 1e-9.
    """
    module = torch_networks.build(network, values, addition=Addition_Module)
    for layer in module.modules():
        if not list(layer.children()) and not isinstance(
            layer, torch.nn.ReLU | torch.nn.Tanh
        ):
            affine = isinstance(layer, AFFINE)
            layer.rule = rule() if affine else EpsilonRule()
    x = torch.tensor(x, requires_grad=True)
    if target is None:
        target = module(x).argmax(1)
    return captum.LRP(module).attribute(x, target=target).detach().numpy()
