"""jlrp beside Zennit: VGG16, the same weights and images, relative to each forward.

    python benchmarks/peers.py [--composites epsilon_plus ...] [--batch 1]

Per library: seconds of the forward pass, seconds of the attribution, and their ratio,
medians of interleaved repeats in one process; then how far the two relevances differ.
Needs torch and zennit (1.0.0).
"""

import argparse
import sys
import types
from statistics import median

import jax
import numpy as np
import torch
from cost import clock, interleaved, machine
from networks import VGG_STAGES, vgg16

import jlrp


def import_zennit():
    """Zennit imports torchvision for three class names only; do without it."""
    try:
        import torchvision  # noqa: F401
    except ImportError:
        names = {
            "torchvision.ops": ("FrozenBatchNorm2d",),
            "torchvision.models": (),
            "torchvision.models.resnet": ("Bottleneck", "BasicBlock"),
        }
        for module, classes in {"torchvision": (), **names}.items():
            stub = types.ModuleType(module)
            for name in classes:
                setattr(stub, name, type(name, (torch.nn.Module,), {}))
            sys.modules[module] = stub
            parent, _, child = module.rpartition(".")
            if parent:
                setattr(sys.modules[parent], child, stub)
    import zennit.composites

    return zennit.composites.COMPOSITES


def torch_vgg16(params, side):
    """The same network in torch, with the weights of the JAX one."""
    layers, weights = [], iter(params)

    def add(layer, *permutation):
        values = next(weights)
        kernel = np.asarray(values["kernel"])
        if isinstance(layer, torch.nn.Linear) and permutation:
            kernel = kernel.reshape(side, side, -1, kernel.shape[-1])
            kernel = kernel.transpose(permutation).reshape(kernel.shape[-1], -1)
        else:
            kernel = kernel.transpose(permutation or (1, 0))
        with torch.no_grad():
            layer.weight.copy_(torch.tensor(np.ascontiguousarray(kernel)))
            layer.bias.copy_(torch.tensor(np.asarray(values["bias"])))
        layers.extend((layer, torch.nn.ReLU()))

    channels = 3
    for features, repeats in VGG_STAGES:
        for _ in range(repeats):
            add(torch.nn.Conv2d(channels, features, 3, padding=1), 3, 2, 0, 1)
            channels = features
        layers.append(torch.nn.MaxPool2d(2))
    layers.append(torch.nn.Flatten())
    add(torch.nn.Linear(side * side * channels, 4096), 3, 2, 0, 1)  # HWC to CHW
    add(torch.nn.Linear(4096, 4096))
    add(torch.nn.Linear(4096, 1000))
    model = torch.nn.Sequential(*layers[:-1]).requires_grad_(False)  # no last ReLU
    return model.eval()


def zennit_relevance(model, composite, x):
    x = x.clone().requires_grad_()
    with composite.context(model) as explained:
        out = explained(x)
        seed = torch.nn.functional.one_hot(out.argmax(-1), out.shape[-1]) * out
        (relevance,) = torch.autograd.grad(out, x, seed)
    return relevance


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--composites", nargs="+", default=["epsilon_plus", "epsilon_alpha2_beta1"])
    add("--batch", type=int, default=1)
    add("--size", type=int, default=224)
    add("--repeats", type=int, default=7)
    options = parser.parse_args()

    composites = import_zennit()
    fn, params, x = vgg16(options.batch, options.size)
    model = torch_vgg16(params, options.size // 32)
    torch_x = torch.tensor(np.asarray(x).transpose(0, 3, 1, 2))
    forward = jax.jit(fn)
    calls = {
        "jax forward": lambda: jax.block_until_ready(forward(params, x)),
        "torch forward": lambda: model(torch_x),
    }
    for name in options.composites:
        explain = jax.jit(jlrp.explain(fn, composite=name))
        calls[f"jlrp {name}"] = lambda explain=explain: jax.block_until_ready(
            explain(params, x).relevance
        )
        composite = composites[name]()
        calls[f"zennit {name}"] = lambda composite=composite: zennit_relevance(
            model, composite, torch_x
        )

    print(f"{machine()}, torch {torch.__version__}")
    print(f"VGG16, batch {options.batch}, size {options.size}\n")
    results = {name: call() for name, call in calls.items()}  # and warm-up
    seconds = {name: [] for name in calls}
    for _, name in interleaved(list(calls), options.repeats):
        seconds[name].append(clock(calls[name])[1])
    took = {name: median(values) for name, values in seconds.items()}

    print(f"{'composite':22} {'library':8} {'forward':>9} {'attribution':>13} ratio")
    for name in options.composites:
        for library, forward_name in (("jlrp", "jax"), ("zennit", "torch")):
            base, own = took[f"{forward_name} forward"], took[f"{library} {name}"]
            print(
                f"{name:22} {library:8} {base:7.3f} s {own:11.3f} s {own / base:5.2f}"
            )
        ours = np.asarray(results[f"jlrp {name}"]).transpose(0, 3, 1, 2)
        theirs = results[f"zennit {name}"].numpy()
        gap = np.abs(ours - theirs).max() / np.abs(theirs).max()
        print(f"{name:22} largest difference / largest relevance: {gap:.1e}\n")


if __name__ == "__main__":
    main()
