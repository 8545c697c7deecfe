"""The peers: LRP of other libraries on PyTorch, each as it asks to be used.

An attributor `(case, rule) -> relevance_of(x)` raises `Refused` where the library has
no such rule or does not take the network. A case has the network (`model`), how it is
called (`scores`), and how to make it anew (`build`).
"""

import contextlib
import sys
import types

import torch


class Refused(Exception):
    """Why a library does not explain a network by a rule."""


class Case:
    """A network of torch_networks.py.

    Attributes:
      name: of the network.
      build: makes ``(model, scores)``, ``scores(x)`` being (batch, classes).
      box: bounds of its images.
    """

    def __init__(self, name, build, box):
        self.name, self.build, self.box = name, build, box
        self.model, self.scores = build()
        self.is_transformer = name not in ("vgg16", "resnet50")


# Zennit.


def stub_torchvision():
    """Zennit and LXT import torchvision for a few names only; do without it."""
    try:
        import torchvision.models  # noqa: F401

        return
    except ImportError:
        pass
    names = {
        "torchvision": (),
        "torchvision.ops": ("FrozenBatchNorm2d",),
        "torchvision.models": (),
        "torchvision.models.resnet": ("Bottleneck", "BasicBlock"),
        "torchvision.models.vision_transformer": (),
    }
    for module, classes in names.items():
        stub = types.ModuleType(module)
        for name in classes:
            setattr(stub, name, type(name, (torch.nn.Module,), {}))
        sys.modules[module] = stub
        parent, _, child = module.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, stub)
    sys.modules["torchvision.models.vision_transformer"].nn = torch.nn


def import_zennit():
    stub_torchvision()
    import zennit.composites

    return zennit.composites.COMPOSITES


ZENNIT = {
    "epsilon_plus": "epsilon_plus",
    "gamma": "epsilon_gamma_box",
    "alpha_beta": "epsilon_alpha2_beta1",
}


def zennit(case, rule):
    composites = import_zennit()
    if case.is_transformer:
        raise Refused("no rules for attention and norms: a gradient, silently")
    from zennit.canonizers import SequentialMergeBatchNorm
    from zennit.layer import Sum

    class Plus(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.sum = Sum()

        def forward(self, a, b):
            return self.sum(torch.stack([a, b], -1))

    model, _ = case.build(Plus) if case.name == "resnet50" else case.build()
    canonizers = [SequentialMergeBatchNorm()] if case.name == "resnet50" else []
    if rule == "epsilon":
        composite = _zennit_epsilon(canonizers)
    elif rule in ZENNIT:
        low, high = (torch.tensor(bound) for bound in case.box)
        bounds = {"low": low, "high": high} if rule == "gamma" else {}
        composite = composites[ZENNIT[rule]](canonizers=canonizers, **bounds)
    else:
        raise Refused("no such composite")

    def relevance(x):
        x = x.clone().requires_grad_()
        with composite.context(model) as explained:
            out = explained(x)
            seed = torch.nn.functional.one_hot(out.argmax(-1), out.shape[-1]) * out
            (relevance,) = torch.autograd.grad(out, x, seed)
        return relevance

    return relevance


def _zennit_epsilon(canonizers):
    from zennit.composites import LayerMapComposite, layer_map_base
    from zennit.rules import Epsilon
    from zennit.types import Convolution, Linear

    layers = [(Convolution, Epsilon()), (Linear, Epsilon())]
    return LayerMapComposite(layer_map_base() + layers, canonizers=canonizers)


# Captum.


def captum(case, rule):
    """Its rules are attributes of modules, removed by each call."""
    import captum.attr
    from captum.attr._utils.custom_modules import Addition_Module
    from captum.attr._utils.lrp_rules import Alpha1_Beta0_Rule, EpsilonRule, GammaRule

    rules = {
        "epsilon": lambda: EpsilonRule(1e-6),
        "epsilon_plus": lambda: Alpha1_Beta0_Rule(set_bias_to_zero=True),
        "gamma": lambda: GammaRule(0.25),
    }
    if rule not in rules and not case.is_transformer:
        raise Refused("no such rule")
    plus = [Addition_Module] if case.name == "resnet50" else []
    model, scores = case.build(*plus)

    def relevance(x):
        first = True  # its input has both signs: forms.py
        for module in model.modules():
            if isinstance(module, torch.nn.Conv2d) and not case.is_transformer:
                module.rule = rules["epsilon" if first else rule]()
                first = False
            elif isinstance(module, torch.nn.Linear):
                module.rule = EpsilonRule(1e-6)
        target = scores(x).argmax(-1)
        return captum.attr.LRP(model).attribute(x, target=target)

    return relevance


# autoLRP.


def autolrp(case, rule):
    import autolrp as library

    base = library.BASE
    passing = library.on(library.ELEMENTWISE_NODES, "yx")
    low, high = case.box
    rules = {
        "epsilon": {},
        "epsilon_plus": {"ConvolutionBackward": "zplus"},
        "gamma": {
            "ConvolutionBackward": ("gamma", {"gamma": 0.25}),
            "input_conv": ("zbox", {"low": low, "high": high}),
        },
        "alpha_beta": {
            "ConvolutionBackward": ("alpha_beta", {"alpha": 2.0, "beta": 1.0})
        },
        "attnlrp": {**library.ATTNLRP, **passing},
    }
    if rule not in rules:
        raise Refused("no such rule")
    eps = 1e-11 if rule == "attnlrp" else 1e-6
    config = library.LRPConfig(rule={**base, **rules[rule]}, eps=eps)

    def relevance(x):
        x = library.tensor(x)
        out = case.scores(x)
        best = out.detach().argmax(-1).tolist()
        scores = [out[i, k] for i, k in enumerate(best)]
        sum(scores).lrp(config=config)
        shape = (-1, *[1] * (x.ndim - 1))
        seeds = torch.stack([score.detach() for score in scores])  # it starts at one
        return x.relevance * seeds.as_subclass(torch.Tensor).reshape(shape)

    return relevance


# LXT.

LXT = {
    "llama": "transformers.models.llama.modeling_llama",
    "gpt2": "transformers.models.gpt2.modeling_gpt2",
    "bert": "transformers.models.bert.modeling_bert",
}


def lxt(case, rule):
    """The efficient form: classes are patched, then it is gradient times input."""
    if case.name not in LXT:
        raise Refused("patches only some classes of Hugging Face and torchvision")
    if rule != "attnlrp":
        raise Refused("AttnLRP only")
    stub_torchvision()
    import importlib

    import lxt.efficient.models as known

    module = importlib.import_module(LXT[case.name])
    patches = getattr(known, case.name).attnLRP
    with _patched(module, patches):
        _, scores = case.build()

    def relevance(x):
        with _patched(module, patches):
            x = x.clone().requires_grad_()
            (gradient,) = torch.autograd.grad(scores(x).amax(-1).sum(), x)
        return x * gradient

    return relevance


@contextlib.contextmanager
def _patched(module, patches):
    """LXT's patches, undone behind: others use the same classes."""
    before = {target: dict(vars(target)) for target in {module, *patches}}
    try:
        for target, patch in patches.items():
            patch(target)
        yield
    finally:
        for target, attributes in before.items():
            for name, value in list(vars(target).items()):
                if name not in attributes:
                    delattr(target, name)
                elif attributes[name] is not value:
                    setattr(target, name, attributes[name])


LIBRARIES = {"zennit": zennit, "lxt": lxt, "captum": captum, "autolrp": autolrp}
PACKAGES = {"zennit": "zennit", "lxt": "lxt", "captum": "captum", "autolrp": "autoLRP"}
