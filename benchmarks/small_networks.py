"""The default beside every preset, on small networks that train in seconds.

    python benchmarks/small_networks.py                        # what is reported
    python benchmarks/small_networks.py --chosen-on --seeds 1  # what it was chosen on

Images and signals that are drawn here, patches of three photographs that packages ship,
scikit-learn's tables and digits; networks of every kind that `auto` tells apart. Single
pixels (all channels), steps of time or columns are set to 0, by their relevance; the
score is the probability of the predicted class; ABPC is the mean over all points of
LeRF - MoRF. Intervals are over examples, of all seeds.
"""

import argparse
import functools
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
import sklearn.datasets
from cost import machine
from PIL import Image

import jlrp
from jlrp import composites, metrics

EXAMPLES, POINTS = 400, 32


@dataclass(frozen=True)
class Data:
    """Float32 examples with features, or channels, last, and their classes."""

    x: np.ndarray
    labels: np.ndarray
    test: np.ndarray

    @property
    def parts(self):
        """What is removed together: a pixel, a step of time, a column of a table."""
        shape = self.test.shape[1:]
        places = int(np.prod(shape[:-1]))
        if len(shape) == 1:
            return metrics.features(shape)
        labels = np.arange(places).reshape(*shape[:-1], 1)
        return metrics.Parts(np.broadcast_to(labels, shape))


def split(x, labels, seed, tests=EXAMPLES):
    order = np.random.default_rng(seed).permutation(len(x))
    x, labels = np.asarray(x, np.float32)[order], np.asarray(labels, np.int32)[order]
    return Data(x[tests:], labels[tests:], x[:tests])


@functools.cache
def digits(seed):
    """8 x 8 pixels, 0 is paper."""
    found = sklearn.datasets.load_digits()
    return split(found.images[..., None] / 16, found.target, seed)


@functools.cache
def shapes(seed, size=3000, side=16):
    """Bright outlines of six kinds at any place, on a darker ground with noise."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 6, size)
    y, x = np.mgrid[:side, :side]
    images = rng.normal(0.15, 0.1, (size, side, side, 1))
    for image, label in zip(images, labels, strict=True):
        radius = rng.uniform(2.5, side / 4)
        dy, dx = (a - rng.uniform(radius, side - 1 - radius) for a in (y, x))
        far, square = np.hypot(dy, dx), np.maximum(abs(dy), abs(dx))
        inside = square <= radius
        drawn = [
            abs(far - radius) < 0.7,
            abs(square - radius) < 0.6,
            inside & (np.minimum(abs(dy), abs(dx)) < 0.6),
            inside & (abs(abs(dy) - abs(dx)) < 0.8),
            inside & (abs(dx) < 0.6),
            inside & (abs(dy) < 0.6),
        ][label]
        image[drawn] += rng.uniform(0.5, 1.0)
    return split(images, labels, seed)


@functools.cache
def patches(seed, size=4000, side=16):
    """Squares of three photographs that packages ship: of which is it one?

    Colours between -1 and 1. Those of the test come from every fourth strip of columns.
    """
    rng = np.random.default_rng(seed)
    folders = Path(sklearn.datasets.__file__).parent, Path(matplotlib.get_data_path())
    files = [
        folders[0] / "images" / "china.jpg",
        folders[0] / "images" / "flower.jpg",
        folders[1] / "sample_data" / "grace_hopper.jpg",
    ]
    photographs = [np.asarray(Image.open(f).convert("RGB").reduce(2)) for f in files]

    def drawn(count, strips):
        labels = rng.integers(0, 3, count)
        images = np.empty((count, side, side, 3), np.float32)
        for image, label in zip(images, labels, strict=True):
            photograph = photographs[label]
            height, width, _ = photograph.shape
            chosen = [s for s in range(width // 32) if s % 4 in strips]
            column = 32 * rng.choice(chosen) + rng.integers(0, 32 - side)
            row = rng.integers(0, height - side)
            image[:] = photograph[row : row + side, column : column + side]
        return images / 127.5 - 1, labels.astype(np.int32)

    return Data(*drawn(size, (0, 1, 3)), drawn(EXAMPLES, (2,))[0])


@functools.cache
def signals(seed, size=3000, length=32):
    """A burst of one of five forms somewhere in noise; two channels."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 5, size)
    x = rng.normal(0, 0.15, (size, length, 2))
    t = np.linspace(0, 1, 16)
    forms = [
        np.sin(6 * np.pi * t),
        np.sign(np.sin(6 * np.pi * t)),
        np.sin(12 * np.pi * t),
        2 * t - 1,
        np.exp(-20 * (t - 0.5) ** 2),
    ]
    for one, label in zip(x, labels, strict=True):
        start, channel = rng.integers(0, length - 16), rng.integers(0, 2)
        one[start : start + 16, channel] += rng.uniform(1, 2) * forms[label]
    return split(x, labels, seed)


NODES, KINDS = 16, 3


@functools.cache
def neighbours():
    """One graph for all examples: a ring with chords, three neighbours each."""
    near = np.zeros((NODES, NODES), np.float32)
    for node in range(NODES):
        for other in (node + 1, node + (5 if node % 2 else -5)):
            near[node, other % NODES] = near[other % NODES, node] = 1
    return near


@functools.cache
def graphs(seed, size=3000):
    """Nodes of three kinds, one each; two of them are neighbours: which?

    A kind is a channel. The third stands apart from both, and all else is noise.
    """
    rng, near = np.random.default_rng(seed), neighbours()
    labels = rng.integers(0, KINDS, size)  # of the kind that stands apart
    x = rng.normal(0, 0.15, (size, NODES, KINDS))
    for one, label in zip(x, labels, strict=True):
        first = rng.integers(NODES)
        second = rng.choice(np.flatnonzero(near[first]))
        apart = (near[first] + near[second] == 0).nonzero()[0]
        apart = [n for n in apart if n not in (first, second)]
        places = first, second, rng.choice(apart)
        kinds = [k for k in range(KINDS) if k != label]
        for place, kind in zip(places, (*kinds, label), strict=True):
            one[place, kind] += rng.uniform(0.8, 1.2)
    return split(x, labels, seed)


@functools.cache
def scenes(seed, size=3000, side=16):
    """Filled things of four kinds on a darker ground, of which one is in the middle.

    The label of a pixel is the kind of what covers it, and 0 of the ground.
    """
    rng = np.random.default_rng(seed)
    labels = np.zeros((size, side, side), int)
    images = rng.normal(0.15, 0.1, (size, side, side, 1))
    y, x = np.mgrid[:side, :side]
    for image, label in zip(images, labels, strict=True):
        corner = rng.choice([2.5, side - 3.5], 2)
        for centre in (corner, side / 2 - 0.5 + rng.uniform(-1, 1, 2)):
            dy, dx = abs(y - centre[0]), abs(x - centre[1])
            kind, radius = rng.integers(1, 5), rng.uniform(2.4, 3.4)
            drawn = [
                np.hypot(dy, dx) <= radius,
                np.maximum(dy, dx) <= 0.8 * radius,
                dy + dx <= radius,
                (np.minimum(dy, dx) <= 0.8) & (np.maximum(dy, dx) <= radius),
            ][kind - 1]
            image[drawn] += rng.uniform(0.5, 1.0)
            label[drawn] = kind
    return split(images, labels, seed)


@functools.cache
def dark_scenes(seed):
    """The same things on a ground of 0, which is then what stands for absent."""
    data = scenes(seed)
    x, test = (np.where(v > 0.45, v, 0).astype(np.float32) for v in (data.x, data.test))
    return Data(x, data.labels, test)


@functools.cache
def table(name, seed):
    """Standardised columns; all rows are explained, those of the training too.

    Diabetes is a measure of its progress, in three classes of equal size.
    """
    found = getattr(sklearn.datasets, f"load_{name}")()
    x = (found.data - found.data.mean(0)) / found.data.std(0)
    labels = found.target
    if name == "diabetes":
        labels = np.searchsorted(np.quantile(labels, [1 / 3, 2 / 3]), labels)
    data = split(x, labels, seed, 0)
    return Data(data.x, data.labels, data.x)


cancer, wine, diabetes = (
    functools.partial(table, name) for name in ("breast_cancer", "wine", "diabetes")
)


# Networks. Convolutional ones have batch norms where they are deep.


class Stack(nn.Module):
    """Convolutions in a row, each with an activation, over images or signals."""

    widths: tuple[int, ...] = (16, 32)
    pool: tuple[int, ...] = (1,)  # behind which of them
    norm: bool = False
    average: bool = False
    kernel: int = 3
    strides: tuple[int, ...] = ()  # of those that pool instead of a pooling
    dilation: bool = False
    activation: Callable = nn.relu
    excite: bool = False

    @nn.compact
    def __call__(self, h, train=False):
        axes = tuple(range(1, h.ndim - 1))
        for i, width in enumerate(self.widths):
            size, two = (self.kernel,) * len(axes), (2,) * len(axes)
            strides = 2 if i in self.strides else 1
            rate = 2**i if self.dilation else 1
            h = nn.Conv(width, size, strides, kernel_dilation=rate)(h)
            h = nn.BatchNorm(not train)(h) if self.norm else h
            h = self.activation(h)
            if self.excite:
                squeezed = nn.relu(nn.Dense(width // 4)(h.mean(axes, keepdims=True)))
                h = h * nn.sigmoid(nn.Dense(width)(squeezed))
            if i in self.pool:
                h = nn.max_pool(h, two, two)
        if self.average:
            return nn.Dense(10)(h.mean(axes))
        return nn.Dense(10)(nn.relu(nn.Dense(64)(h.reshape(h.shape[0], -1))))


class Residual(nn.Module):
    """Blocks of two convolutions with batch norms and a skip; three widths."""

    blocks: int = 3
    width: int = 12
    kernel: int = 3

    @nn.compact
    def __call__(self, h, train=False):
        axes = tuple(range(1, h.ndim - 1))

        def convolved(h, width, strides=1, size=self.kernel):
            h = nn.Conv(width, (size,) * len(axes), strides, use_bias=False)(h)
            return nn.BatchNorm(not train)(h)

        h = nn.relu(convolved(h, self.width))
        for stage in range(3):
            width = self.width * 2**stage
            for block in range(self.blocks):
                strides = 2 if stage and not block else 1
                inner = nn.relu(convolved(h, width, strides))
                inner = convolved(inner, width)
                if strides > 1:
                    h = convolved(h, width, 2, 1)
                h = nn.relu(h + inner)
        return nn.Dense(10)(h.mean(axes))


class Separable(nn.Module):
    """MobileNetV2's blocks: expanded, depthwise, projected."""

    blocks: tuple[int, ...] = (1, 2, 1, 2, 1)
    width: int = 12

    @nn.compact
    def __call__(self, h, train=False):
        def convolved(h, width, size=1, strides=1, groups=1):
            h = nn.Conv(width, (size, size), strides, feature_group_count=groups)(h)
            return nn.BatchNorm(not train)(h)

        h = nn.relu6(convolved(h, self.width, 3))
        for strides in self.blocks:
            width = h.shape[-1] * strides
            inner = nn.relu6(convolved(h, 4 * h.shape[-1]))
            groups = inner.shape[-1]
            inner = nn.relu6(convolved(inner, groups, 3, strides, groups))
            inner = convolved(inner, width)
            h = h + inner if strides == 1 else inner
        h = nn.relu6(convolved(h, 64))
        return nn.Dense(10)(h.mean((1, 2)))


class ConvNext(nn.Module):
    """Patches, then depthwise convolutions and dense layers on channels."""

    width: int = 24
    blocks: int = 3

    @nn.compact
    def __call__(self, h, train=False):
        h = nn.LayerNorm()(nn.Conv(self.width, (2, 2), 2)(h))
        for _ in range(self.blocks):
            groups = self.width
            inner = nn.Conv(groups, (3, 3), feature_group_count=groups)(h)
            inner = nn.gelu(nn.Dense(4 * self.width)(nn.LayerNorm()(inner)))
            h = h + nn.Dense(self.width)(inner)
        return nn.Dense(10)(nn.LayerNorm()(h.mean((1, 2))))


def to_patches(h, side):
    """(batch, height, width, channels) -> (batch, patches, pixels of one)."""
    batch, height, width, channels = h.shape
    h = h.reshape(batch, height // side, side, width // side, side, channels)
    return h.swapaxes(2, 3).reshape(batch, -1, side * side * channels)


class Transformer(nn.Module):
    """Blocks of attention over patches, over steps of time, or over columns."""

    side: int = 2  # of a patch; 0: of signals and tables
    by: str = "conv"  # or "dense", or "stem": two convolutions that overlap
    width: int = 32
    layers: int = 2
    mlp: str = "gelu"
    token: bool = False

    @nn.compact
    def __call__(self, h, train=False):
        if self.by == "columns":
            scale = self.param("scale", nn.initializers.normal(1), (h.shape[1], 32))
            shift = self.param("shift", nn.initializers.normal(1), (h.shape[1], 32))
            h = h[..., None] * scale + shift
        elif self.by == "dense":
            h = nn.Dense(self.width)(to_patches(h, self.side) if self.side else h)
        else:
            axes, side = h.ndim - 2, self.side
            if self.by == "stem":
                h, side = nn.relu(nn.Conv(self.width, (3,) * axes)(h)), 3
            h = nn.Conv(self.width, (side,) * axes, self.side)(h)
            h = h.reshape(h.shape[0], -1, self.width)
        if self.by != "columns":
            place = nn.initializers.normal(0.1)
            h = h + self.param("place", place, (h.shape[1], self.width))
        if self.token:
            first = self.param("first", nn.initializers.normal(0.1), (self.width,))
            first = jnp.broadcast_to(first, (h.shape[0], 1, self.width))
            h = jnp.concatenate([first, h], 1)
        for _ in range(self.layers):
            h = h + nn.MultiHeadDotProductAttention(4)(nn.LayerNorm()(h))
            inner = nn.Dense(4 * self.width)(nn.LayerNorm()(h))
            if self.mlp == "glu":
                inner = nn.silu(inner) * nn.Dense(4 * self.width)(nn.LayerNorm()(h))
            h = h + nn.Dense(self.width)(nn.gelu(inner) if self.mlp != "glu" else inner)
        h = nn.LayerNorm()(h)
        return nn.Dense(10)(h[:, 0] if self.token else h.mean(1))


class Mixer(nn.Module):
    """An MLP-mixer, its patches by a convolution or by a reshape."""

    side: int = 2
    conv: bool = True
    width: int = 32
    layers: int = 2

    @nn.compact
    def __call__(self, h, train=False):
        if self.conv:
            h = nn.Conv(self.width, (self.side,) * (h.ndim - 2), self.side)(h)
            h = h.reshape(h.shape[0], -1, self.width)
        else:
            h = nn.Dense(self.width)(to_patches(h, self.side))

        def mlp(h, inner):
            return nn.Dense(h.shape[-1])(nn.gelu(nn.Dense(inner)(h)))

        for _ in range(self.layers):
            h = h + mlp(nn.LayerNorm()(h).swapaxes(1, 2), 32).swapaxes(1, 2)
            h = h + mlp(nn.LayerNorm()(h), 64)
        return nn.Dense(10)(nn.LayerNorm()(h).mean(1))


class Recurrent(nn.Module):
    """Rows of an image or steps of time, one by one."""

    cell: Any = nn.OptimizedLSTMCell
    layers: int = 1
    width: int = 32
    mean: bool = False
    both: bool = False

    @nn.compact
    def __call__(self, h, train=False):
        h = h.reshape(*h.shape[:2], -1)
        for _ in range(self.layers):
            run = nn.RNN(self.cell(self.width))
            if self.both:
                back = nn.RNN(self.cell(self.width), reverse=True, keep_order=True)
                run = nn.Bidirectional(run, back)
            h = run(h)
        return nn.Dense(10)(h.mean(1) if self.mean else h[:, -1])


class Minimal(nn.Module):
    """A minimal GRU: the gate follows the input, not the state."""

    width: int = 32

    @nn.compact
    def __call__(self, h, train=False):
        z, g = nn.sigmoid(nn.Dense(self.width)(h)), nn.Dense(self.width)(h)

        def step(h, now):
            z, g = now
            h = (1 - z) * h + z * g
            return h, h

        along = [jnp.swapaxes(v, 0, 1) for v in (z, g)]
        _, h = jax.lax.scan(step, jnp.zeros_like(g[:, 0]), along)
        return nn.Dense(10)(nn.relu(nn.Dense(self.width)(h[-1])))


class WaveNet(nn.Module):
    """Dilated convolutions gated by tanh and sigmoid, with skips."""

    width: int = 16
    layers: int = 4
    dims: int = 1

    @nn.compact
    def __call__(self, h, train=False):
        axes = tuple(range(1, h.ndim - 1))

        def conv(h, rate, size=3):
            sizes = (size,) * len(axes)
            return nn.Conv(self.width, sizes, kernel_dilation=rate)(h)

        h = conv(h, 1)
        for i in range(self.layers):
            inner = nn.tanh(conv(h, 2**i)) * nn.sigmoid(conv(h, 2**i))
            h = h + conv(inner, 1, 1)
        return nn.Dense(10)(nn.relu(h).mean(axes))


class Mamba(nn.Module):
    width: int = 16
    layers: int = 2

    @nn.compact
    def __call__(self, h, train=False):
        import known_tasks

        h = nn.Dense(self.width)(h.reshape(*h.shape[:2], -1))
        for _ in range(self.layers):
            h = h + known_tasks.MambaBlock(self.width)(h)
        return nn.Dense(10)(nn.RMSNorm()(h).mean(1))


class Graph(nn.Module):
    """Messages along the edges of one graph: by its matrix, or fetched edge by edge."""

    width: int = 32
    layers: int = 2
    by_edges: bool = False

    @nn.compact
    def __call__(self, h, train=False):
        near = neighbours()
        source, target = near.nonzero()
        for _ in range(self.layers):
            if self.by_edges:
                sent = jnp.zeros_like(h).at[:, target].add(h[:, source])
                h = nn.relu(nn.Dense(self.width)(jnp.concatenate([h, sent], -1)))
                h = nn.relu(nn.Dense(self.width)(h))
            else:
                sent = near @ nn.Dense(self.width, use_bias=False)(h)
                h = nn.relu(nn.Dense(self.width)(h) + sent)
        return nn.Dense(10)(h.max(1) if self.by_edges else h.mean(1))


class UNet(nn.Module):
    """Logits of every pixel: down, up, and beside each level a skip."""

    width: int = 12
    levels: int = 2
    transposed: bool = False  # or enlarged by its nearest pixel
    norm: bool = True

    @nn.compact
    def __call__(self, h, train=False):
        def convolved(h, width):
            for _ in range(2):
                h = nn.Conv(width, (3, 3))(h)
                h = nn.relu(nn.BatchNorm(not train)(h) if self.norm else h)
            return h

        beside = []
        for level in range(self.levels):
            beside.append(convolved(h, self.width * 2**level))
            h = nn.max_pool(beside[-1], (2, 2), (2, 2))
        h = convolved(h, self.width * 2**self.levels)
        for level in reversed(range(self.levels)):
            width = self.width * 2**level
            if self.transposed:
                h = nn.ConvTranspose(width, (2, 2), (2, 2))(h)
            else:
                h = nn.Conv(width, (3, 3))(h.repeat(2, 1).repeat(2, 2))
            h = convolved(jnp.concatenate([h, beside[level]], -1), width)
        return nn.Conv(10, (1, 1))(h)


class Places(nn.Module):
    """Logits of every pixel by convolutions alone, every second one dilated."""

    widths: tuple[int, ...] = (12, 12, 16, 16, 24, 24)

    @nn.compact
    def __call__(self, h, train=False):
        for i, width in enumerate(self.widths):
            h = nn.Conv(width, (3, 3), kernel_dilation=1 + i % 2)(h)
            h = nn.relu(nn.BatchNorm(not train)(h))
        return nn.Conv(10, (1, 1))(h)


class Dense(nn.Module):
    """A perceptron, with gates if asked for."""

    widths: tuple[int, ...] = (32, 32)
    activation: Callable = nn.relu
    gated: Any = None
    norm: bool = False

    @nn.compact
    def __call__(self, h, train=False):
        h = h.reshape(h.shape[0], -1)
        for width in self.widths:
            inner = nn.Dense(width)(h)
            inner = nn.BatchNorm(not train)(inner) if self.norm else inner
            gate = self.gated and self.gated(nn.Dense(width)(h))
            h = self.activation(inner) if gate is None else inner * gate
        return nn.Dense(10)(h)


# By name: the data, the network, steps of training. `auto` was fitted on the first.
CHOSEN_ON = {
    "CNN of 1, digits": (digits, Stack((16,), (0,)), 300),
    "CNN of 3, shapes": (shapes, Stack((16, 24, 32), (0, 1, 2)), 300),
    "CNN of 3, patches": (patches, Stack((16, 24, 32), (0, 1, 2)), 300),
    "CNN of 4 averaged, digits": (
        digits,
        Stack((12, 16, 24, 32), (1,), True, True),
        300,
    ),
    "strided CNN of 4, patches": (
        patches,
        Stack((12, 16, 24, 32), (), True, True, strides=(1, 3)),
        300,
    ),
    "CNN of 6, digits": (digits, Stack((12, 12, 16, 16, 24, 24), (3,), True), 400),
    "CNN of 6, shapes": (
        shapes,
        Stack((12, 12, 16, 16, 24, 24), (1, 3), True, True),
        400,
    ),
    "residual of 15, digits": (digits, Residual(2, 12), 400),
    "residual of 21, shapes": (shapes, Residual(3, 10), 400),
    "squeeze and excite, shapes": (
        shapes,
        Stack((16, 24, 32), (0, 1), True, True, excite=True),
        300,
    ),
    "CNN of 3, signals": (signals, Stack((16, 24, 32), (0, 1), kernel=5), 300),
    "dilated CNN of 5, signals": (
        signals,
        Stack((16,) * 5, (), average=True, dilation=True),
        400,
    ),
    "residual of 15, signals": (signals, Residual(2, 10), 400),
    "WaveNet, signals": (signals, WaveNet(), 400),
    "ViT, patches": (patches, Transformer(4), 400),
    "mixer, shapes": (shapes, Mixer(4), 600),
    "GRU, signals": (signals, Recurrent(nn.GRUCell), 1000),
    "GRU, rows of digits": (digits, Recurrent(nn.GRUCell), 1000),
    "LSTM, signals": (signals, Recurrent(), 1000),
    "LSTM, rows of shapes": (shapes, Recurrent(), 1500),
    "bidirectional LSTM, signals": (
        signals,
        Recurrent(both=True, mean=True),
        1000,
    ),
    "plain recurrence, signals": (signals, Recurrent(nn.SimpleCell, mean=True), 1000),
    "minimal GRU, signals": (signals, Minimal(), 1500),
    "MLP, cancer": (cancer, Dense(), 300),
    "MLP of GLU, cancer": (cancer, Dense(gated=nn.sigmoid), 300),
    "MLP of GELU, diabetes": (diabetes, Dense((32, 32, 32), nn.gelu), 300),
}
REPORTED = {
    "CNN of 2, digits": (digits, Stack((16, 32), (1,)), 300),
    "residual of 9, digits": (digits, Residual(1, 12), 300),
    "ViT, digits": (digits, Transformer(2, "dense"), 500),
    "mixer, digits": (digits, Mixer(2), 500),
    "LSTM, rows of digits": (digits, Recurrent(), 800),
    "CNN of 5, shapes": (shapes, Stack((12, 12, 16, 24, 24), (1, 3), True), 300),
    "CNN of 4, signals": (signals, Stack((12, 16, 24, 24), (1,), True, True), 300),
    "GRU averaged, signals": (signals, Recurrent(nn.GRUCell, mean=True), 800),
    "MLP, wine": (wine, Dense((32, 32)), 300),
    "transformer of columns, diabetes": (
        diabetes,
        Transformer(0, "columns", 32, 1),
        300,
    ),
}


def train(model, data, steps, seed, batch=128, rate=4e-3):
    """AdamW on the cross-entropy; running statistics as Flax keeps them."""
    variables = model.init(jax.random.key(seed), data.x[:2])
    params, rest = (
        variables["params"],
        {k: v for k, v in variables.items() if k != "params"},
    )
    schedule = optax.cosine_decay_schedule(rate, steps)
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=1e-3)
    )

    @jax.jit
    def step(params, rest, state, x, labels):
        def loss(params):
            scores, after = model.apply(
                {"params": params, **rest}, x, True, mutable=list(rest)
            )
            losses = optax.softmax_cross_entropy_with_integer_labels(scores, labels)
            return losses.mean(), after

        gradient, rest = jax.grad(loss, has_aux=True)(params)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), rest, state

    state, rng = optimizer.init(params), np.random.default_rng(seed)
    for _ in range(steps):
        pick = rng.integers(len(data.x), size=min(batch, len(data.x)))
        params, rest, state = step(params, rest, state, data.x[pick], data.labels[pick])
    return {"params": params, **rest}


def candidates(fn, variables, x):
    """The presets by name, those that give the same rules to every operation as one."""
    low, high = min(0.0, float(x.min())), max(0.0, float(x.max()))
    found = {}
    for name in sorted(composites.PRESETS):
        composite = name
        if name == "epsilon_gamma_box":
            composite = composites.epsilon_gamma_box(low, high)
        rows = jlrp.inspect(fn, variables, x, composite=composite).operations
        key = tuple((row.kind, row.rule) for row in rows)
        found.setdefault(key, (composite, []))[1].append(name)
    return [(composite, names) for composite, names in found.values()]


def measure(name, seeds):
    """ABPC of each preset on all examples, how sure the network is, what was taken."""
    make, model, steps = {**CHOSEN_ON, **REPORTED}[name]
    values, sure, line = {}, [], ""

    def fn(variables, x):
        return model.apply(variables, x)

    for seed in range(seeds):
        data = make(seed)
        variables = train(model, data, steps, seed)
        x = jnp.asarray(data.test)
        sure.append(float(jax.nn.softmax(fn(variables, x)).max(-1).mean()))
        line = jlrp.inspect(fn, variables, x).choice
        for composite, names in candidates(fn, variables, x):
            found = metrics.curves(
                fn,
                variables,
                x,
                jlrp.relevance(fn, variables, x, composite=composite),
                parts=data.parts,
                removal=metrics.Constant(0.0),
                steps=min(data.parts.count, POINTS),
            )
            for preset in names:
                values.setdefault(preset, []).append(np.asarray(found.abpc))
    return {k: np.concatenate(v) for k, v in values.items()}, np.mean(sure), line


def row(name, values, sure):
    """`auto`, the best other preset, and their difference on the same examples."""
    others = {k: v for k, v in values.items() if k != "auto"}
    best = max(others, key=lambda k: others[k].mean())
    gap = metrics.interval(values["auto"] - others[best])
    ours, theirs = values["auto"].mean(), others[best].mean()
    return f"| {name} | {sure:.2f} | {ours:.3f} | {theirs:.3f} (`{best}`) | {gap} |"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", help="of networks; all, if none")
    parser.add_argument("--chosen-on", action="store_true", help="those fitted on")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="also keep all means in this file")
    options = parser.parse_args()
    print(machine())
    print(
        "\n| network | mean probability | `auto` | best other preset | `auto` more by |"
    )
    print("|---" * 5 + "|")
    kept = {}
    for name in options.names or (CHOSEN_ON if options.chosen_on else REPORTED):
        values, sure, line = measure(name, options.seeds)
        print(row(name, values, sure), flush=True)
        means = {k: round(float(v.mean()), 4) for k, v in values.items()}
        kept[name] = {"choice": line, "examples": len(values["auto"]), **means}
        if options.json:
            options.json.write_text(json.dumps(kept, indent=1))


if __name__ == "__main__":
    sys.exit(main())
