"""What Zennit says: relevance of the explained logit, which starts as the logit.

Zennit's conventions (1.0.0), with s the stabiliser of every rule, 1e-6:
- s is added once to each rule's own denominator, away from zero (+s at zero): to z for
  Epsilon, to each of the two sums for Gamma and AlphaBeta, to the count for Flat;
- Gamma is the generalised form; its masks are z > 0 and z < 0 of the whole output, with
  its bias also under `zero_params="bias"`; the denominator's bias is `b + gamma * b+`
  where z > 0 and `b + gamma * b-` where z < 0;
- Flat counts the inputs that an output sees, padding not counted, and drops the bias;
  WSquare keeps the squared bias in the denominator; ZBox's bias cancels;
- composites: Pass for activations and for batch norms that no canonizer merged, Norm
  (Epsilon without parameters) for `Sum` and average pooling, autograd for max pooling,
  flatten and concatenation. ExcitationBackprop differs in having no Pass: activations
  are left to autograd, R * f'(x), and so are batch norms (merged ones are identities);
- the first layer is the first *module in order of definition* of the kind wanted:
  any linear one for Flat, a convolution for ZBox. Where two layers read the input, only
  one of them is first.
"""

from peers import torch, torch_networks, zennit


class Sum(torch.nn.Module):
    """A residual addition that Zennit's Norm rule shares by contribution."""

    def __init__(self):
        super().__init__()
        self.sum = zennit.layer.Sum()

    def forward(self, *terms):
        return self.sum(torch.stack(terms, dim=-1))


def model(network, values):
    return torch_networks.build(network, values, addition=Sum)


def forward(network, values, x):
    with torch.no_grad():
        return model(network, values)(torch.tensor(x)).numpy()


def relevance(network, values, x, composite, target=None, **options):
    """Relevance shaped like x, by a Zennit composite or the name of one.

    `target` is a class for all examples; without it, each one's arg-max. The name
    "gradient_input" is the plain gradient of the logit times the input.
    """
    x = torch.tensor(x)
    if composite == "gradient_input":
        composite, times, seed = None, x, torch.ones_like
    else:
        times, seed = 1.0, torch.clone
    if isinstance(composite, str):
        composite = zennit.composites.COMPOSITES[composite](
            canonizers=[zennit.canonizers.SequentialMergeBatchNorm()], **options
        )
    attributor = zennit.attribution.Gradient(model(network, values), composite)
    with attributor:
        _, result = attributor(x, lambda scores: _at(scores, target, seed))
    return (times * result).detach().numpy()


def _at(scores, target, seed):
    index = scores.argmax(1, keepdim=True)
    if target is not None:
        index = torch.full_like(index, target)
    mask = torch.zeros_like(scores).scatter(1, index, 1.0)
    return mask * seed(scores)


def rules(conv=None, dense=None, first=None, names=()):
    """A composite of Zennit rules for convolutions, dense maps and the first of them.

    With the names of modules, `first` is for those. Everything else is as in Zennit's
    own composites.
    """
    kinds = zennit.types
    composites = zennit.composites
    chosen = [(kinds.Convolution, conv), (torch.nn.Linear, dense)]
    layer_map = composites.layer_map_base() + [
        (kind, rule) for kind, rule in chosen if rule is not None
    ]
    canonizers = [zennit.canonizers.SequentialMergeBatchNorm()]
    if names:
        return composites.NameLayerMapComposite(
            [(names, first)], layer_map, canonizers=canonizers
        )
    first_map = [(kinds.Linear, first)] if first is not None else []
    return composites.SpecialFirstLayerMapComposite(layer_map, first_map, canonizers)
