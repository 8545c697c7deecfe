"""What relevance from a reference costs, against jit(gradient x input).

    python benchmarks/references.py                          # all networks: minutes
    python benchmarks/references.py --networks bert --length 128 --seconds 1

Beside `deep_lift` and gamma on differences: integrated gradients of 32 steps from the
same reference, and a background of some rows. All in one process, interleaved; ratios
are of medians. `counted` is the multiplications of the traced program over the
gradient's.
"""

import argparse
from statistics import median

import jax
import jax.numpy as jnp
import numpy as np
from counting import arithmetic, multiplications
from measuring import build, clear_caches, markdown, ratio, ready, timed
from networks import NETWORKS, VISION

BASE, DEEP_LIFT, GAMMA = "gradient", "deep_lift", "gamma on differences"
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


def measure(network, options):
    size = options.size if network in VISION else options.length
    fn, params, x = NETWORKS[network](options.batch, size)
    names = [n for n in NAMES if n not in options.without]
    built = {}
    for name in names:
        clear_caches()
        built[name] = build(candidate(name, fn, x), params, x)
    calls = {name: ready(built[name].run, params, x) for name in names}
    times, results = timed(calls, options.seconds, options.least)
    counts = arithmetic(fn, candidate(BASE, fn, x), params, x)
    change = np.asarray(fn(params, x) - fn(params, jnp.zeros_like(x)), np.float64)
    target = np.asarray(fn(params, x)).argmax(-1)
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


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="+", default=["vgg16", "bert", "llama"])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--least", type=int, default=2)
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
