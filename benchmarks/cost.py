"""What an explanation costs, against jit(gradient x input) of the same target.

    python benchmarks/cost.py                         # all networks, all bars: minutes
    python benchmarks/cost.py --networks vgg16 --size 64 --composites control epsilon
    python benchmarks/cost.py --networks bert gpt2 llama --batch 1

Everything is measured in one process, interleaved (A B C, B C A, ...), so that a change
of the machine's mood meets all candidates alike; ratios are of medians. The composite
`control` is gradient x input once more: how far it is from 1 is the noise. `counted` is
the multiplications of the traced program over the gradient's, `least` what the rule's
arithmetic allows (counting.py).
"""

import argparse
import os
import sys
from statistics import median

import jax
import jax.numpy as jnp
import numpy as np
from counting import arithmetic, compiled_contractions, multiplications
from measuring import (
    build,
    clear_caches,
    collect,
    finish,
    interleaved,
    machine,
    markdown,
    new_record,
    ratio,
    ready,
    save,
    timed,
)
from networks import NETWORKS, VISION

FORWARD, BASE = "forward", "gradient"
IMAGES = (-5.0, 5.0)  # bounds of the images, which are normal

CONVOLUTIONAL = ("vgg16", "resnet50")
COMPOSITES = {
    **dict.fromkeys(CONVOLUTIONAL, ["epsilon", "epsilon_plus", "gamma", "alpha_beta"]),
    "vit": ["epsilon", "attnlrp", "epsilon_plus", "gamma", "alpha_beta"],
}
USUAL = ["epsilon", "attnlrp", "gamma"]  # of a transformer: no convolution to treat

BUILD_BARS = {"trace": 0.8, "compile": 1.2}
TARGETS_BAR = 6.0
METRICS = ("time", "memory", "trace", "lower", "compile")


def composite_of(name, network):
    """Gamma and alpha-beta: on convolutions; in a transformer on dense layers too."""
    import jlrp
    from jlrp import composites, rules

    if name == "gamma" and network in CONVOLUTIONAL:
        return composites.epsilon_gamma_box(*IMAGES)
    if name == "gamma":
        return composites.attnlrp(gamma_conv=0.25, gamma_dense=0.05)
    if name == "alpha_beta" and network in CONVOLUTIONAL:
        return composites.epsilon_alpha2_beta1()
    if name == "alpha_beta":
        rule = rules.AlphaBeta(2.0, 1.0)
        pairs = [(kind, rule) for kind in ("conv", "dense")]
        return jlrp.Composite(pairs if network in VISION else pairs[1:], base="attnlrp")
    return composites.resolve(name)


def bars_of(name, network):
    """What the project promises, over gradient x input."""
    transformer = network not in CONVOLUTIONAL
    found = {
        "epsilon": {"time": 1.05, "memory": 1.0},
        "attnlrp": {"time": 1.0, "memory": 0.85},
        "epsilon_plus": {"time": 1.4},
        "gamma": {"time": 2.0 if transformer else 1.45},
        "alpha_beta": {"time": 2.2},
    }.get(name)
    return {} if found is None else {**found, **BUILD_BARS}


def least(name, network, counts):
    """The multiplications that the rules need, over the gradient's two maps.

    Where all inputs are non-negative z+ needs three maps, gamma too if a ReLU follows;
    whatever the signs, four are enough for gamma and alpha-beta.
    """

    def of_positive(equation):
        return 4 if _sees_images(equation) else 3

    def gamma(equation):
        bounded = _sees_images(equation)  # the box: one map, then three transposes
        return 4 if bounded or not _relu_follows(equation) else 3

    conv, dense = {
        "epsilon_plus": (of_positive, 2),
        "gamma": (gamma, 2),
        "alpha_beta": (lambda equation: 4, 2),
    }.get(name, (lambda equation: 2, 2))
    if name in ("gamma", "alpha_beta") and network not in CONVOLUTIONAL:
        conv, dense = (lambda equation: 4), 4
    return counts.of(conv, dense) / counts.gradient


def _sees_images(equation):
    kernel = equation.invars[1].aval.shape
    return kernel[equation.params["dimension_numbers"].rhs_spec[1]] == 3


def _relu_follows(equation):
    """Of VGG and ResNet: not behind the convolutions that a sum comes behind."""
    kernel = equation.invars[1].aval.shape
    spec = equation.params["dimension_numbers"].rhs_spec
    window = [kernel[axis] for axis in spec[2:]]
    return max(window) > 1 or kernel[spec[0]] <= kernel[spec[1]]


def candidate(name, network, fn):
    """A new function `(params, x) -> relevance`: nothing cached knows it."""

    def model(params, x):
        return fn(params, x)

    if name == FORWARD:
        return model
    if name in (BASE, "control"):
        return lambda params, x: (
            x * jax.grad(lambda x: model(params, x).max(-1).sum())(x)
        )
    import jlrp

    explain = jlrp.explain(model, composite=composite_of(name, network))
    return lambda params, x: explain(params, x).relevance


def measure(network, batch, composites, options):
    """Rows of one network and batch: for each candidate its medians and its counts."""
    size = options.size if network in VISION else options.length
    fn, params, x = NETWORKS[network](batch, size)
    names = [FORWARD, BASE, *composites]
    built, samples = {}, {name: {m: [] for m in METRICS} for name in names}
    jax.jit(candidate(names[-1], network, fn)).trace(params, x)  # lazy imports
    builds = options.builds if batch == min(options.batch) else 1
    for _, name in interleaved(names, builds):
        clear_caches()
        built[name] = build(candidate(name, network, fn), params, x)
        for metric in ("trace", "lower", "compile", "memory"):
            samples[name][metric].append(getattr(built[name], metric))

    calls = {name: ready(built[name].run, params, x) for name in names}
    times, results = timed(calls, options.seconds, options.least)
    counts = arithmetic(fn, candidate(BASE, network, fn), params, x)
    score = float(np.asarray(results[FORWARD], np.float64).max(-1).sum())
    for name in names:
        samples[name]["time"] = times[name]
    base = samples[BASE]
    for name in names:
        row = {
            "network": network,
            "batch": batch,
            "composite": name,
            "rounds": len(times[name]),
            "builds": builds,
            "contractions": compiled_contractions(built[name].run),
            "over_forward": ratio(times[name], times[FORWARD]),
        }
        for metric in METRICS:
            row[metric] = median(samples[name][metric])
            row[f"{metric}_ratio"] = row[metric] / max(median(base[metric]), 1e-12)
        if name != FORWARD:
            relevance = np.asarray(results[name], np.float64)
            row["conserved"] = relevance.sum() / score
            row["finite"] = bool(np.isfinite(relevance).all())
            program = candidate(name, network, fn)
            row["counted"] = multiplications(program, params, x) / counts.gradient
            row["least"] = least(name, network, counts)
        row["bars"] = bars_of(name, network)
        if builds == 1 < options.builds:  # a single cold build is no measurement
            row["bars"] = {k: v for k, v in row["bars"].items() if k not in BUILD_BARS}
        row["over"] = [
            metric
            for metric, bar in row["bars"].items()
            if round(row[f"{metric}_ratio"], 2) > bar
        ]
        show(row)
        yield row


def measure_targets(network, composite, options, classes=10):
    """Ten classes explained at once over one, beside the same of the gradient."""
    import jlrp

    size = options.size if network in VISION else options.length
    fn, params, x = NETWORKS[network](1, size)
    explain = jlrp.explain(fn, composite=composite_of(composite, network))

    def gradient(params, x, target):
        return x * jax.grad(lambda x: fn(params, x)[:, target[0]].sum())(x)

    def relevance(params, x, target):
        return explain(params, x, target).relevance

    calls, targets = {}, jnp.arange(classes)[:, None]
    for name, one in ((BASE, gradient), (composite, relevance)):
        several = jax.vmap(one, (None, None, 0))
        for count, program, given in (
            (1, one, targets[3]),
            (classes, several, targets),
        ):
            run = build(program, params, x, given).run
            calls[f"{name} x {count}"] = ready(run, params, x, given)
    times, results = timed(calls, options.seconds, options.least)
    same = np.asarray(results[f"{composite} x {classes}"])[3]
    alone = np.asarray(results[f"{composite} x 1"])
    row = {
        "network": network,
        "composite": composite,
        "classes": classes,
        "one": median(times[f"{composite} x 1"]),
        "ratio": ratio(times[f"{composite} x {classes}"], times[f"{composite} x 1"]),
        "gradient_ratio": ratio(times[f"{BASE} x {classes}"], times[f"{BASE} x 1"]),
        "difference": float(np.abs(same - alone).max() / np.abs(alone).max()),
        "bar": TARGETS_BAR,
    }
    print(
        f"{network:13} {composite:13} {classes} classes over one: {row['ratio']:.2f} "
        f"(gradient {row['gradient_ratio']:.2f}), "
        f"the same to {row['difference']:.0e}",
        flush=True,
    )
    return row


HEADER = (
    f"{'network':13} {'batch':>5} {'composite':13} {'time':>9} {'ratio':>6} "
    f"{'counted':>7} {'least':>6} {'forward':>7} {'memory':>9} {'ratio':>6} "
    f"{'trace':>6} {'compile':>7}  over the bar"
)


def show(row):
    counts = f"{row.get('counted', 0):7.2f} {row.get('least', 0):6.2f}"
    print(
        f"{row['network']:13} {row['batch']:5} {row['composite']:13} "
        f"{row['time'] * 1e3:6.0f} ms {row['time_ratio']:6.2f} {counts} "
        f"{row['over_forward']:7.2f} {row['memory'] / 2**20:5.0f} MiB "
        f"{row['memory_ratio']:6.2f} {row['trace_ratio']:6.2f} "
        f"{row['compile_ratio']:7.2f}  {', '.join(row['over'])}",
        flush=True,
    )


def report(record):
    """The tables of the record, in Markdown."""
    rows = record["rows"]
    lines = [*_verdicts(rows), ""]
    for network in dict.fromkeys(row["network"] for row in rows):
        found = [r for r in rows if r["network"] == network]
        lines += [f"### {network}", "", _cost_table(found), _build_table(found)]
    if record["targets"]:
        lines += ["### Ten classes over one", "", _targets_table(record["targets"])]
    return "\n".join(lines)


def _verdicts(rows):
    """How many of the bars are kept; which are not is marked in the tables."""
    for metric in ("time", "memory", "trace", "compile"):
        of = [row for row in rows if metric in row["bars"]]
        kept = [row for row in of if metric not in row["over"]]
        yield f"- {metric}: {len(kept)} of {len(of)} bars kept"


def _with_bar(row, metric):
    bar = row["bars"].get(metric)
    figure = f"{row[f'{metric}_ratio']:.2f}"
    if bar is None:
        return figure
    mark = " **over**" if metric in row["over"] else ""
    return f"{figure} (bar {bar:g}){mark}"


def _cost_table(rows):
    header = ["composite", "batch", "time", "over gradient x input", "counted", "least"]
    header += ["over forward", "temporary memory", "over gradient x input"]
    header += ["relevance / score"]
    cells = []
    for row in rows:
        relevance = row["composite"] != FORWARD
        cells.append(
            [
                row["composite"],
                row["batch"],
                f"{row['time'] * 1e3:.0f} ms",
                _with_bar(row, "time"),
                f"{row['counted']:.2f}" if relevance else "",
                f"{row['least']:.2f}" if relevance else "",
                f"{row['over_forward']:.2f}",
                f"{row['memory'] / 2**20:.1f} MiB",
                _with_bar(row, "memory"),
                f"{row['conserved']:.4g}" if relevance else "",
            ]
        )
    return markdown(header, cells)


def _build_table(rows):
    header = ["composite", "tracing", "over gradient x input", "compiling"]
    header += ["over gradient x input", "dots and convolutions compiled"]
    batch = min(row["batch"] for row in rows)
    return markdown(
        header,
        [
            [
                row["composite"],
                f"{row['trace'] * 1e3:.0f} ms",
                _with_bar(row, "trace"),
                f"{row['compile']:.2f} s",
                _with_bar(row, "compile"),
                row["contractions"],
            ]
            for row in rows
            if row["batch"] == batch
        ],
    )


def _targets_table(rows):
    header = ["network", "composite", "one class", "ten over one"]
    header += ["of the gradient", "largest difference"]
    return markdown(
        header,
        [
            [
                row["network"],
                row["composite"],
                f"{row['one'] * 1e3:.0f} ms",
                f"{row['ratio']:.2f} (bar {row['bar']:g})"
                + (" **over**" if row["ratio"] > row["bar"] else ""),
                f"{row['gradient_ratio']:.2f}",
                f"{row['difference']:.0e}",
            ]
            for row in rows
        ],
    )


def parser():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    add("--composites", nargs="+", help="default: what suits each network")
    add("--batch", type=int, nargs="+", default=[1, 8])
    add("--size", type=int, default=224, help="pixels along each side of an image")
    add("--length", type=int, default=128, help="tokens of a sequence")
    add("--seconds", type=float, default=10, help="of timed runs, per network")
    add("--least", type=int, default=2, help="timed runs of each candidate, at least")
    add("--builds", type=int, default=2, help="cold traces and compilations of each")
    add("--targets", nargs="*", default=["vgg16:epsilon", "gpt2:attnlrp"])
    add("--json", metavar="PATH", help="also write the rows to this file")
    add("--strict", action="store_true", help="exit 1 if a bar is exceeded")
    return parser


def main():
    options = parser().parse_args()
    record = new_record(options, machine(), targets=[])
    print(f"{record['machine']}\n\n{HEADER}", flush=True)
    for network in options.networks:
        usual = ["control", *COMPOSITES.get(network, USUAL)]
        for batch in options.batch:
            rows = measure(network, batch, options.composites or usual, options)
            collect(record, f"{network}, batch {batch}", rows)
            clear_caches()
            save(record, options.json)
        print(flush=True)
    for pair in options.targets:
        record["targets"].append(measure_targets(*pair.split(":"), options))
        save(record, options.json)
    print(f"load at the end {os.getloadavg()[0]:.1f}")
    over = any(row["over"] for row in record["rows"])
    return finish(record, options.json) or int(options.strict and over)


if __name__ == "__main__":
    sys.exit(main())
