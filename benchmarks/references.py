"""What relevance from a reference costs, against jit(gradient x input).

    python benchmarks/references.py                          # all networks: minutes
    python benchmarks/references.py --networks bert --length 128 --seconds 1
    python benchmarks/references.py --networks vgg16 --peers # SHAP and Captum beside it

Beside `deep_lift` and gamma on differences: integrated gradients of 32 steps from the
same reference, and a background of some rows. All in one process, interleaved; ratios
are of medians. `counted` is the multiplications of the traced program over the
gradient's. Peers are Captum's DeepLift and SHAP's DeepExplainer from the same zeros,
each over PyTorch's own gradient x input; of these networks they take VGG16 alone.
"""

import argparse
import os
import warnings
from statistics import median

import jax
import jax.numpy as jnp
import numpy as np
from counting import arithmetic, multiplications
from measuring import build, clear_caches, markdown, ratio, ready, timed
from networks import NETWORKS, VISION

BASE, DEEP_LIFT, GAMMA = "gradient", "deep_lift", "gamma on differences"
TORCH = "PyTorch's gradient"
INTEGRATED, BACKGROUND = "integrated gradients (32)", "background"
NAMES = [BASE, "control", DEEP_LIFT, GAMMA, INTEGRATED, BACKGROUND]
STEPS, ROWS = 32, 8
BARS = {
    DEEP_LIFT: {"time": 1.7, "memory": 2.1},
    GAMMA: {"time": 2.7, "memory": 3.0},
    BACKGROUND: {"time": 1.7 * ROWS},
}
FASTER = 15.0  # deep_lift than integrated gradients


def candidate(name, fn, x):
    """A new function `(params, x) -> relevance`: nothing cached knows it."""
    import jlrp
    from jlrp import baselines

    def model(params, x):
        return fn(params, x)

    if name in (BASE, "control"):
        return lambda params, x: (
            x * jax.grad(lambda x: model(params, x).max(-1).sum())(x)
        )
    if name == INTEGRATED:
        return lambda params, x: baselines.integrated_gradients(
            model, params, x, steps=STEPS
        )
    baseline = 0.0
    if name == BACKGROUND:
        rows = jax.random.normal(jax.random.key(5), (ROWS, *x.shape[1:]), x.dtype)
        baseline = jlrp.Background(0.1 * rows, chunk=1)
    composite = "deep_lift"
    if name == GAMMA:
        rule = jlrp.rules.Gamma(0.1)
        pairs = [(jlrp.composites.Pair(kind, rule, True)) for kind in ("conv", "dense")]
        composite = jlrp.Composite(pairs, base="deep_lift")
    explain = jlrp.explain(model, composite=composite, baseline=baseline)
    return lambda params, x: explain(params, x).relevance


def of_peers(params, x, target):
    """Calls of PyTorch's gradient x input, Captum and SHAP on the same VGG16."""
    import captum.attr
    import shap
    import torch
    import torch_networks

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    model = torch_networks.vgg16(params, x.shape[1] // 32)
    # A ReLU of its own behind each layer, as both ask; hooks stay from call to call.
    pixels = torch.tensor(np.asarray(x)).permute(0, 3, 1, 2).contiguous()
    zeros, target = torch.zeros_like(pixels), torch.tensor(target)

    def quietly(explain):
        def call():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return np.moveaxis(np.asarray(explain()).reshape(pixels.shape), 1, -1)

        return call

    def gradient():
        leaf = pixels.clone().requires_grad_()
        out = model(leaf).gather(1, target[:, None]).sum()
        (grad,) = torch.autograd.grad(out, leaf)
        return (grad * leaf).detach()

    def of_captum():
        leaf = pixels.clone().requires_grad_()
        found = captum.attr.DeepLift(model).attribute(leaf, zeros, target=target)
        return found.detach()

    def of_shap():
        explainer = shap.DeepExplainer(model, zeros)
        options = {"ranked_outputs": 1, "check_additivity": False}
        return explainer.shap_values(pixels, **options)[0]

    calls = {TORCH: gradient, "Captum DeepLift": of_captum}
    calls["SHAP DeepExplainer"] = of_shap
    return {name: quietly(call) for name, call in calls.items()}


def measure(network, options):
    size = options.size if network in VISION else options.length
    fn, params, x = NETWORKS[network](options.batch, size)
    names = [n for n in NAMES if n not in options.without]
    built = {}
    for name in names:
        clear_caches()
        built[name] = build(candidate(name, fn, x), params, x)
    calls = {name: ready(built[name].run, params, x) for name in names}
    target = np.asarray(fn(params, x)).argmax(-1)
    peers = options.peers and network == "vgg16"
    calls |= of_peers(params, x, target) if peers else {}
    times, results = timed(calls, options.seconds, options.least)
    counts = arithmetic(fn, candidate(BASE, fn, x), params, x)
    change = np.asarray(fn(params, x) - fn(params, jnp.zeros_like(x)), np.float64)
    change = np.take_along_axis(change, target[..., None], -1).sum()
    for name in names:
        found = np.asarray(results[name], np.float64)
        row = {
            "network": network,
            "size": size,
            "method": name,
            "time": median(times[name]),
            "time_ratio": ratio(times[name], times[BASE]),
            "memory": built[name].memory,
            "memory_ratio": built[name].memory / max(built[BASE].memory, 1),
            "counted": multiplications(candidate(name, fn, x), params, x)
            / counts.gradient,
            "complete": found.sum() / change,
        }
        bars = BARS.get(name, {})
        over = [m for m, bar in bars.items() if row[f"{m}_ratio"] > bar]
        if name == DEEP_LIFT and INTEGRATED in names:
            row["faster"] = ratio(times[INTEGRATED], times[DEEP_LIFT])
            over += ["faster"] if row["faster"] < FASTER else []
        row["over"] = over
        print(
            f"{network:8} {size:4} {name:26} {row['time'] * 1e3:8.0f} ms "
            f"{row['time_ratio']:6.2f} counted {row['counted']:6.2f} "
            f"{row['memory'] / 2**20:7.1f} MiB {row['memory_ratio']:5.2f} "
            f"complete {row['complete']:.4f} {row.get('faster', 0):5.1f} "
            f"{'over: ' + ', '.join(over) if over else ''}",
            flush=True,
        )
        yield row
    for name in calls.keys() - set(names):
        ours, theirs = (np.asarray(results[n], np.float64) for n in (DEEP_LIFT, name))
        print(
            f"{network:8} {size:4} {name:26} {median(times[name]) * 1e3:8.0f} ms "
            f"{ratio(times[name], times[TORCH]):6.2f} of PyTorch's gradient, "
            f"{ratio(times[name], times[DEEP_LIFT]):.2f} of deep_lift, "
            f"which differs by {np.abs(ours - theirs).max() / np.abs(ours).max():.1e}",
            flush=True,
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="+", default=["vgg16", "bert", "llama"])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--least", type=int, default=2)
    parser.add_argument("--peers", action="store_true", help="of vgg16")
    parser.add_argument("--without", nargs="*", default=[])
    options = parser.parse_args()
    rows = [row for n in options.networks for row in measure(n, options)]
    header = ["network", "size", "method", "time", "over gradient x input", "counted"]
    header += ["memory", "over", "sum / change"]
    cells = [
        [
            row["network"],
            row["size"],
            row["method"],
            f"{row['time'] * 1e3:.0f} ms",
            f"{row['time_ratio']:.2f}",
            f"{row['counted']:.2f}",
            f"{row['memory'] / 2**20:.1f} MiB",
            f"{row['memory_ratio']:.2f}",
            f"{row['complete']:.4f}",
        ]
        for row in rows
    ]
    print("\n" + markdown(header, cells))


if __name__ == "__main__":
    main()
