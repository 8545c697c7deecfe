"""LXT's rules on any PyTorch model: a gradient that is wrong on purpose, times input.

What LXT (git f043441, "efficient") does, from RULES.md, "Attention", written as a table
of PyTorch's functions. Relevance is x times the gradient of the explained logit, where
- an activation's derivative is y / (x + 1e-10);
- what a norm divides by is a constant;
- a product of two values that both depend on x halves the gradient of both, which is
  LXT's V by 2, Q and K by 4, gate products by 2; three factors get a third each;
- under CP-LRP softmax is a constant, and a sigmoid or activation that gates another
  value is.

Parameters need no gradient here, so a tensor that requires one depends on x. LXT
patches each family's modules; here it is PyTorch's functions, the same for all.
"""

import contextlib
import math

import numpy as np

from peers import torch

VARIANTS = ("attnlrp", "cp_lrp")

_PRODUCTS = {"mul", "matmul", "bmm", "imul", "rmul", "multiply", "einsum"}
_ACTIVATIONS = {"silu", "gelu", "relu", "tanh"}
_SIGMOIDS = {"sigmoid", "softplus", "exp"}
_STATISTICS = {"rsqrt", "norm", "linalg_vector_norm"}
_MOVEMENT = {
    *("getitem", "transpose", "permute", "unsqueeze", "squeeze", "view", "reshape"),
    *("expand", "contiguous", "neg", "to", "float", "double", "dropout"),
}


def relevance(model, x, score, variant):
    """Relevance shaped like the dict x, of ``score(model(**x))``, one per example.

    The model's parameters must not require gradients.
    """
    x = {name: torch.tensor(np.asarray(v), requires_grad=True) for name, v in x.items()}
    with _activation_modules(), _Rules(variant):
        scores = score(model(**x))
    gradients = torch.autograd.grad(scores.sum(), list(x.values()))
    pairs = zip(x.items(), gradients, strict=True)
    return {name: (v * g).detach().numpy() for (name, v), g in pairs}


class _Rules(torch.overrides.TorchFunctionMode):
    def __init__(self, variant):
        assert variant in VARIANTS
        self.cp = variant == "cp_lrp"

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(function, "__name__", "").strip("_")
        tensors = [*args, *kwargs.values()]
        active = [a for a in tensors if isinstance(a, torch.Tensor) and a.requires_grad]
        if name == "scaled_dot_product_attention":
            return self.attention(*args, **kwargs)
        if not active:
            return function(*args, **kwargs)
        if name == "layer_norm":
            return _layer_norm(*args, **kwargs)
        if name in _STATISTICS:
            return function(*args, **kwargs).detach()
        if name == "normalize":
            length = args[0].norm(dim=kwargs.get("dim", 1), keepdim=True).detach()
            return args[0] / length.clamp_min(1e-12)
        if name in _ACTIVATIONS:
            return _pass(lambda x: function(x, *args[1:], **kwargs), args[0])
        if name in ("softmax", "log_softmax"):
            y = function(*args, **kwargs)
            return y.detach() if self.cp else y
        if name == "baddbmm":
            return _baddbmm(*args, **kwargs)
        if name in _PRODUCTS and len(active) == 2 and active[0] is not active[1]:
            return self.product(function, args, kwargs)
        y = function(*args, **kwargs)
        if name in _SIGMOIDS:
            y.factors = ["sigmoid"]
        elif name in _MOVEMENT:
            y.factors = _factors(args[0])
        return y

    def product(self, function, args, kwargs):
        slots = [i for i, a in enumerate(args) if isinstance(a, torch.Tensor)]
        factors = [_factors(args[i]) for i in slots]
        together = factors[0] + factors[1]
        signals = factors
        if self.cp:
            for gate in ("sigmoid", "activation"):
                if 0 < together.count(gate) < len(together):
                    signals = [[f for f in side if f != gate] for side in factors]
                    break
        total = sum(map(len, signals))
        args = list(args)
        for i, side in zip(slots, signals, strict=True):
            args[i] = _scaled(args[i], len(side) / total)
        y = function(*args, **kwargs)
        y.factors = together
        return y

    def attention(
        self,
        query,
        key,
        value,
        attn_mask=None,
        dropout_p=0.0,
        is_causal=False,
        scale=None,
        enable_gqa=False,
    ):
        if enable_gqa:
            groups = query.shape[-3] // key.shape[-3]
            key = key.repeat_interleave(groups, -3)
            value = value.repeat_interleave(groups, -3)
        scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
        scores = _halved(query @ key.transpose(-1, -2)) * scale
        if is_causal:
            attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attn_mask, -math.inf)
        elif attn_mask is not None:
            scores = scores + attn_mask
        weights = scores.softmax(-1)
        if self.cp:
            return weights.detach() @ value
        return _halved(weights @ value)


def _factors(y):
    """The factors of a product, each by what it ends in."""
    return getattr(y, "factors", ["signal"])


def _scaled(y, share):
    """y, with a share of its gradient."""
    return y * share + (y * (1 - share)).detach()


def _halved(y):
    return _scaled(y, 1 / 2)


def _pass(f, x):
    y = (f(x.detach()) / (x.detach() + 1e-10)) * x
    y.factors = ["activation"]
    return y


def _baddbmm(bias, batch1, batch2, beta=1, alpha=1):
    return beta * bias + alpha * _halved(batch1 @ batch2)


def _layer_norm(x, shape, weight=None, bias=None, eps=1e-5):
    axes = tuple(range(-len(shape), 0))
    centred = x - x.mean(axes, keepdim=True)
    deviation = (centred.square().mean(axes, keepdim=True) + eps).sqrt()
    y = centred / deviation.detach()
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


@contextlib.contextmanager
def _activation_modules():
    """Activations that Hugging Face writes out pass as wholes."""
    from transformers import activations

    originals = {
        kind: kind.forward
        for kind in vars(activations).values()
        if isinstance(kind, type) and kind.__module__ == activations.__name__
        if issubclass(kind, torch.nn.Module) and "Activation" in kind.__name__
    }

    def passing(original):
        def forward(self, x):
            return _pass(lambda x: original(self, x), x)

        return forward

    for kind, original in originals.items():
        kind.forward = passing(original)
    try:
        yield
    finally:
        for kind, original in originals.items():
            kind.forward = original
