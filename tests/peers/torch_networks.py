"""The networks as torch modules."""

from peers import networks as nets
from peers import torch


class Sequence(torch.nn.Module):
    """Steps in turn: modules, by the names given, and plain functions."""

    def __init__(self, steps):
        super().__init__()
        self.steps = tuple(step for _, step in steps)
        for name, step in steps:
            if isinstance(step, torch.nn.Module):
                self.add_module(name, step)

    def forward(self, x):
        for step in self.steps:
            x = step(x)
        return x


class Join(torch.nn.Module):
    """Runs branches and joins their results by `join`, a function or a module."""

    def __init__(self, branches, join):
        super().__init__()
        self.branches = Sequence([(str(i), part) for i, part in enumerate(branches)])
        self.join = join

    def forward(self, x):
        return self.join(*(branch(x) for branch in self.branches.steps))


def build(network, values, addition):
    """A module in float64; `addition()` makes what adds the branches of a residual."""
    return _sequence(network.layers, values, addition).double().eval()


def _sequence(layers, values, addition):
    steps = []
    for layer in layers:
        name = getattr(layer, "name", f"layer{len(steps)}")
        steps.append((name, _step(layer, values, addition)))
        if isinstance(layer, nets.GlobalAveragePool):
            steps.append(("flatten", _flatten))
    return Sequence(steps) if steps else _identity


def _identity(x):
    return x


def _flatten(x):
    return x.flatten(1)


def _step(layer, values, addition):
    match layer:
        case nets.Activation():
            return {"relu": torch.nn.ReLU, "tanh": torch.nn.Tanh}[layer.function]()
        case nets.Pool():
            pools = {"max": torch.nn.MaxPool2d, "average": torch.nn.AvgPool2d}
            return pools[layer.kind](layer.window, layer.stride)
        case nets.GlobalAveragePool():
            return torch.nn.AdaptiveAvgPool2d(1)
        case nets.Flatten():
            return _flatten
        case nets.Residual() | nets.Concatenate():
            parts = [_sequence(b, values, addition) for b in nets.branches(layer)]
            if isinstance(layer, nets.Residual):
                return Join(parts, addition())
            return Join(parts, lambda *tensors: torch.cat(tensors, dim=1))
    module = _empty_layer(layer)
    torch_names = {"kernel": "weight", "scale": "weight"}
    torch_names |= {"mean": "running_mean", "var": "running_var"}
    for name, value in values[layer.name].items():
        getattr(module, torch_names.get(name, name)).data = torch.tensor(value)
    return module


def _empty_layer(layer):
    match layer:
        case nets.Dense():
            return torch.nn.Linear(layer.inputs, layer.outputs)
        case nets.BatchNorm():
            return torch.nn.BatchNorm2d(layer.channels, eps=layer.epsilon)
    kind = torch.nn.ConvTranspose2d if layer.transposed else torch.nn.Conv2d
    return kind(
        layer.inputs,
        layer.outputs,
        layer.kernel,
        stride=layer.stride,
        padding=layer.padding,
        dilation=layer.dilation,
        groups=layer.groups,
        bias=layer.bias,
    )
