"""The networks of the parity tests: layers as data, weights as NumPy float64.

A network is described once, here. `jax_networks`, `flax_networks` and `torch_networks`
spell the same description and weights in their own way. Shapes and weights are in
torch's order: images (channels, height, width), convolutions (out, in, height, width),
dense maps (out, in).
"""

from dataclasses import dataclass, replace

import numpy as np


@dataclass(frozen=True)
class Conv:
    name: str
    inputs: int
    outputs: int
    kernel: int = 3
    stride: int = 1
    padding: int = 0
    dilation: int = 1
    groups: int = 1
    bias: bool = True
    transposed: bool = False


@dataclass(frozen=True)
class Dense:
    """`reads` is the (channels, height, width) that was flattened before it."""

    name: str
    inputs: int
    outputs: int
    reads: tuple[int, int, int] | None = None


@dataclass(frozen=True)
class BatchNorm:
    """At inference: running mean and variance, scale and bias."""

    name: str
    channels: int
    epsilon: float = 1e-3


@dataclass(frozen=True)
class Activation:
    function: str


@dataclass(frozen=True)
class Pool:
    """`kind` is "max" or "average"; no padding."""

    kind: str
    window: int
    stride: int


@dataclass(frozen=True)
class GlobalAveragePool:
    pass


@dataclass(frozen=True)
class Flatten:
    pass


@dataclass(frozen=True)
class Residual:
    """The sum of two branches; an empty branch is the identity."""

    main: tuple
    skip: tuple = ()


@dataclass(frozen=True)
class Concatenate:
    """Branches side by side on the channel axis; an empty branch is the identity."""

    branches: tuple


@dataclass(frozen=True)
class Network:
    name: str
    input_shape: tuple[int, ...]
    layers: tuple

    def __str__(self):
        return self.name


RELU = Activation("relu")
TANH = Activation("tanh")


def branches(layer):
    """The sequences of layers inside a layer: none for most."""
    if isinstance(layer, Residual):
        return (layer.main, layer.skip)
    if isinstance(layer, Concatenate):
        return layer.branches
    return ()


def leaves(layers):
    """All layers that hold no others, in the order of execution."""
    for layer in layers:
        if not branches(layer):
            yield layer
        for branch in branches(layer):
            yield from leaves(branch)


def has(network, kind):
    def within(layers):
        return any(
            isinstance(layer, kind) or any(map(within, branches(layer)))
            for layer in layers
        )

    return within(network.layers)


def _conv_norm_relu(name, *args, **kwargs):
    conv = Conv(f"{name}_conv", *args, **kwargs)
    return (conv, BatchNorm(f"{name}_norm", conv.outputs), RELU)


CNN = Network(
    "cnn",
    (3, 12, 12),
    (
        Conv("conv1", 3, 6, stride=2, padding=1),
        RELU,
        Conv("conv2", 6, 8, padding=1),
        RELU,
        Pool("max", window=2, stride=2),
        Pool("average", window=2, stride=1),
        Flatten(),
        Dense("dense1", 32, 12, reads=(8, 2, 2)),
        RELU,
        Dense("dense2", 12, 5),
    ),
)

RESNET = Network(
    "resnet",
    (3, 12, 12),
    (
        *_conv_norm_relu("stem", 3, 6, stride=2, padding=1, bias=False),
        Residual(
            main=(
                *_conv_norm_relu("block1a", 6, 6, padding=1, bias=False),
                *_conv_norm_relu("block1b", 6, 6, padding=1)[:2],
            )
        ),
        RELU,
        Residual(
            main=(
                *_conv_norm_relu("block2a", 6, 8, stride=2, padding=1),
                *_conv_norm_relu("block2b", 8, 8, padding=1, bias=False)[:2],
            ),
            skip=_conv_norm_relu("block2s", 6, 8, kernel=1, stride=2, bias=False)[:2],
        ),
        RELU,
        GlobalAveragePool(),
        Dense("head", 8, 5),
    ),
)


def _mlp(name, activation):
    return Network(
        name,
        (10,),
        (
            Dense("dense1", 10, 14),
            activation,
            Dense("dense2", 14, 12),
            activation,
            Dense("dense3", 12, 5),
        ),
    )


MLP_TANH = _mlp("mlp_tanh", TANH)
MLP_RELU = _mlp("mlp_relu", RELU)

CONV_KINDS = Network(
    "conv_kinds",
    (4, 10, 10),
    (
        Conv("grouped", 4, 8, padding=1, groups=2),
        RELU,
        Conv("depthwise", 8, 16, stride=2, groups=8),
        RELU,
        Conv("dilated", 16, 6, padding=2, dilation=2),
        TANH,
        Conv("transposed", 6, 5, stride=2, padding=1, transposed=True),
        BatchNorm("norm", 5),
        RELU,
        Pool("average", window=3, stride=2),
        Flatten(),
        Dense("head", 45, 5, reads=(5, 3, 3)),
    ),
)

DENSENET = Network(
    "densenet",
    (3, 8, 8),
    (
        Conv("stem", 3, 4, padding=1),
        RELU,
        Concatenate(((), _conv_norm_relu("grow1", 4, 4, padding=1, bias=False))),
        Concatenate(((), _conv_norm_relu("grow2", 8, 4, padding=1))),
        Conv("transition", 12, 6, kernel=1),
        RELU,
        Pool("max", window=2, stride=2),
        GlobalAveragePool(),
        Dense("head", 6, 5),
    ),
)

NETWORKS = (CNN, RESNET, MLP_TANH, MLP_RELU, CONV_KINDS, DENSENET)


def weights(network, seed):
    """Random weights with visible biases: {layer: {name: array in torch's order}}."""
    draw = np.random.default_rng([seed, *network.name.encode()])

    def bias(size):
        return draw.uniform(0.1, 0.6, size) * draw.choice([-1.0, 1.0], size)

    def one(layer):
        if isinstance(layer, BatchNorm):
            size = layer.channels
            return {
                "scale": draw.uniform(0.5, 1.5, size) * draw.choice([-1.0, 1.0], size),
                "bias": bias(size),
                "mean": draw.normal(0.0, 0.4, size),
                "var": draw.uniform(0.3, 2.0, size),
            }
        if isinstance(layer, Dense):
            shape = (layer.outputs, layer.inputs)
            fan_in = layer.inputs
        else:
            ends = (layer.outputs, layer.inputs)
            first, second = ends[::-1] if layer.transposed else ends
            shape = (first, second // layer.groups, layer.kernel, layer.kernel)
            fan_in = layer.inputs // layer.groups * layer.kernel**2
        kernel = draw.normal(0.0, (2.0 / fan_in) ** 0.5, shape)
        if isinstance(layer, Conv) and not layer.bias:
            return {"kernel": kernel}
        return {"kernel": kernel, "bias": bias(layer.outputs)}

    named = (layer for layer in leaves(network.layers) if hasattr(layer, "name"))
    return {layer.name: one(layer) for layer in named}


def inputs(network, seed, batch=2):
    """A batch of both signs, in torch's order, within (-3, 3)."""
    draw = np.random.default_rng([seed, 7])
    return draw.uniform(-2.5, 2.5, (batch, *network.input_shape))


def merge_batch_norm(network, values):
    """The network and weights with each batch norm merged into the layer before it."""
    values = dict(values)

    def merge(layers):
        merged = []
        for layer in layers:
            if isinstance(layer, BatchNorm):
                before = merged.pop()
                values[before.name] = _merge(
                    before, values[before.name], layer.epsilon, **values.pop(layer.name)
                )
                layer = replace(before, bias=True)
            elif isinstance(layer, Residual):
                layer = Residual(*map(merge, branches(layer)))
            elif isinstance(layer, Concatenate):
                layer = Concatenate(tuple(map(merge, branches(layer))))
            merged.append(layer)
        return tuple(merged)

    return replace(network, layers=merge(network.layers)), values


def _merge(conv, before, epsilon, *, scale, bias, mean, var):
    factor = scale / np.sqrt(var + epsilon)
    shape = (1, -1, 1, 1) if conv.transposed else (-1, 1, 1, 1)
    return {
        "kernel": before["kernel"] * factor.reshape(shape),
        "bias": (before.get("bias", 0.0) - mean) * factor + bias,
    }
