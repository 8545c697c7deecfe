"""What an explanation costs, against jit(gradient x input) of the same target.

    python benchmarks/cost.py                         # all networks, all bars: minutes
    python benchmarks/cost.py --networks vgg16 --size 64 --composites control epsilon
    python benchmarks/cost.py --networks bert gpt2 llama --composites control attnlrp

Everything is measured in one process, interleaved (A B C, B C A, ...), so that a change
of the machine's mood meets all candidates alike. `ratio` is the ratio of medians,
`paired` the median of the ratios round by round, `best` the ratio of the minima. The
composite `control` is gradient x input once more: how far it is from 1 is the noise.
"""

import argparse
import gc
import json
import os
import platform
import sys
import time
from statistics import median

import jax
import jaxlib
import numpy as np
from networks import NETWORKS, VISION

BUILD_BARS = {"trace": 1.0, "compile": 1.3}
BARS = {
    "attnlrp": {"time": 1.05, "memory": 0.90, "trace": 1.1, "compile": 1.3},
    "epsilon": {"time": 1.10, "memory": 1.10, **BUILD_BARS},
    "epsilon_plus": {"time": 1.50, **BUILD_BARS},
}
METRICS = {  # name: (unit, factor from seconds or bytes)
    "time": ("ms", 1e3),
    "memory": ("MiB", 2.0**-20),
    "trace": ("ms", 1e3),
    "lower": ("ms", 1e3),
    "compile": ("ms", 1e3),
}
BASE = "gradient"


def usual_composites(network):
    return ["epsilon", "epsilon_plus"] if network in VISION else ["attnlrp"]


def candidate(name, fn):
    """A new function `(params, x) -> relevance`: nothing cached knows it."""

    def model(params, x):
        return fn(params, x)

    if name in (BASE, "control"):
        return lambda params, x: (
            x * jax.grad(lambda x: model(params, x).max(-1).sum())(x)
        )
    import jlrp

    explain = jlrp.explain(model, composite=name)
    return lambda params, x: explain(params, x).relevance


def clear_caches():
    """Forget every trace: jax's caches, and jlrp's memoised analyses."""
    jax.clear_caches()
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] == "jlrp":
            for value in list(vars(module).values()):
                if callable(clear := getattr(value, "cache_clear", None)):
                    clear()
    gc.collect()


def interleaved(names, rounds):
    for i in range(rounds):
        k = i % len(names)
        yield from ((i, name) for name in names[k:] + names[:k])


def clock(call):
    start = time.perf_counter()
    result = call()
    return result, time.perf_counter() - start


def measure(network, composites, options):
    size = options.size if network in VISION else options.length
    fn, params, x = NETWORKS[network](options.batch, size)
    names = [BASE, *composites]
    samples = {name: {metric: [] for metric in METRICS} for name in names}
    compiled = {}

    def build(name, times, compiling):
        clear_caches()
        f = jax.jit(candidate(name, fn))
        traced, times["trace"] = clock(lambda: f.trace(params, x))
        lowered, times["lower"] = clock(traced.lower)
        if compiling:
            compiled[name], times["compile"] = clock(lowered.compile)

    for name in names:  # warm: lazy imports
        build(name, {}, compiling=False)
    for i, name in interleaved(names, max(options.traces, options.compiles)):
        times = {}
        build(name, times, compiling=i < options.compiles)
        for metric, seconds in times.items():
            samples[name][metric].append(seconds)

    logit = float(jax.jit(fn)(params, x).max(-1).sum())
    conserved = {}
    for name in names:  # also the warm-up
        relevance = np.asarray(compiled[name](params, x), np.float64)
        conserved[name] = float(relevance.sum() / logit)
        memory = compiled[name].memory_analysis().temp_size_in_bytes
        samples[name]["memory"].append(memory)
    for _, name in interleaved(names, options.repeats):
        _, seconds = clock(
            lambda name=name: jax.block_until_ready(compiled[name](params, x))
        )
        samples[name]["time"].append(seconds)
    return samples, conserved


def compare(base, other):
    pairs = zip(base, other, strict=True)
    return {
        "base": median(base),
        "value": median(other),
        "ratio": median(other) / median(base),
        "paired": median(b / a for a, b in pairs),
        "best": min(other) / min(base),
    }


def rows(network, samples, conserved):
    for name in list(samples)[1:]:
        for metric in METRICS:
            row = compare(samples[BASE][metric], samples[name][metric])
            row.update(network=network, composite=name, metric=metric)
            row["bar"] = BARS.get(name, {}).get(metric)
            row["over"] = row["bar"] is not None and not row["ratio"] <= row["bar"]
            row["conserved"] = conserved[name]
            yield row


def show(row):
    unit, factor = METRICS[row["metric"]]
    verdict = ""
    if row["bar"] is not None:
        verdict = f"{row['bar']:5.2f} {'OVER' if row['over'] else 'ok'}"
    print(
        f"{row['network']:9} {row['composite']:22} {row['metric']:8}"
        f"{row['base'] * factor:9.0f} {row['value'] * factor:9.0f} {unit:4}"
        f"{row['ratio']:6.2f} {row['paired']:6.2f} {row['best']:6.2f}  {verdict}"
    )


def machine():
    model = platform.processor()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            lines = [line for line in file if line.startswith("model name")]
        model = lines[0].split(":")[1].strip() if lines else model
    device = jax.devices()[0]
    return (
        f"{platform.node()}: {model}, {os.cpu_count()} cores, load "
        f"{os.getloadavg()[0]:.1f}; device {device.device_kind}; Python "
        f"{platform.python_version()}, jax {jax.__version__}, "
        f"jaxlib {jaxlib.__version__}"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    add("--composites", nargs="+", help="default: those with a bar for the network")
    add("--batch", type=int, default=1)
    add("--size", type=int, default=224, help="pixels along each side of an image")
    add("--length", type=int, default=128, help="tokens of a sequence")
    add("--repeats", type=int, default=15, help="timed runs of each candidate")
    add("--traces", type=int, default=9, help="cold traces of each candidate")
    add("--compiles", type=int, default=3, help="cold compilations of each")
    add("--json", metavar="PATH", help="also write rows and samples to this file")
    add("--strict", action="store_true", help="exit 1 if a bar is exceeded")
    options = parser.parse_args()
    if min(options.repeats, options.traces, options.compiles) < 1:
        parser.error("--repeats, --traces and --compiles must be at least 1")

    header = machine()
    print(
        f"{header}\nbatch {options.batch}, size {options.size}, "
        f"length {options.length}\n"
    )
    print(
        f"{'network':9} {'composite':22} {'metric':8}{'grad x in':>9} "
        f"{'jlrp':>9} {'':4}{'ratio':>6} {'paired':>6} {'best':>6}    bar"
    )
    table, raw = [], {}
    for network in options.networks:
        composites = options.composites or usual_composites(network)
        samples, conserved = measure(network, composites, options)
        raw[network] = samples
        found = list(rows(network, samples, conserved))
        for row in found:
            show(row)
        sums = ", ".join(f"{name} {share:.4g}" for name, share in conserved.items())
        print(f"{network:9} relevance / explained score: {sums}\n", flush=True)
        table += found
    print(f"load at the end {os.getloadavg()[0]:.1f}")
    if options.json:
        with open(options.json, "w") as file:
            record = {"machine": header, "options": vars(options)}
            json.dump({**record, "rows": table, "samples": raw}, file, indent=1)
    return int(options.strict and any(row["over"] for row in table))


if __name__ == "__main__":
    sys.exit(main())
