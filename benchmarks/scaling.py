"""How the cost of AttnLRP grows: with depth, width, length and batch; and compiling.

    python benchmarks/scaling.py [--axes depth width] [--figure docs/images/scaling.png]

A small network of Llama's kind, one size varied at a time, gradient x input, attnlrp
and attnlrp with residuals="sqrt" interleaved. With depth the layers are in a row, so
that what is traced and compiled grows with them.
"""

import argparse
import sys
from dataclasses import replace
from statistics import median

import jax
import numpy as np
from counting import compiled_contractions
from llama import Llama
from measuring import (
    build,
    clear_caches,
    collect,
    finish,
    markdown,
    new_record,
    ready,
    save,
    timed,
)
from networks import fill

import jlrp

SMALL = Llama(layers=6, width=256, heads=4, kv_heads=2, hidden=704, vocabulary=512)
LENGTH, BATCH = 64, 1
AXES = {
    "depth": [6, 12, 24, 48, 96],
    "width": [128, 256, 512, 1024],
    "length": [64, 128, 256, 512],
    "batch": [1, 4, 16, 64],
}
QUICK = {axis: values[:2] for axis, values in AXES.items()}
BASE, JLRP, SQRT = "gradient", "attnlrp", "attnlrp, sqrt"


def setting(axis, value):
    """The network, its batch and its length, with one size that is not the usual."""
    if axis == "depth":
        return replace(SMALL, layers=value), BATCH, LENGTH
    if axis == "width":
        heads = value // 64
        hidden = 64 * round(value * 2.75 / 64)
        sized = replace(SMALL, width=value, heads=heads, hidden=hidden)
        return replace(sized, kv_heads=max(1, heads // 2)), BATCH, LENGTH
    return SMALL, *((value, LENGTH) if axis == "batch" else (BATCH, value))


def candidates(model):
    def of(residuals):
        explain = jlrp.explain(model, composite="attnlrp", residuals=residuals)
        return lambda params, x: explain(params, x).relevance

    def gradient(params, x):
        return x * jax.grad(lambda x: model(params, x).max(-1).sum())(x)

    return {BASE: gradient, JLRP: of("keep"), SQRT: of("sqrt")}


def measure(axis, value, options):
    model, batch, length = setting(axis, value)
    params = fill(model.shapes(), seed=0)
    random = np.random.default_rng(1)
    x = random.standard_normal((batch, length, model.width), np.float32)
    built = {}
    for name, program in candidates(model).items():
        clear_caches()
        built[name] = build(program, params, x)
    calls = {name: ready(made.run, params, x) for name, made in built.items()}
    times, results = timed(calls, options.seconds, least=2, most=9)
    base = np.asarray(results[JLRP])
    scale = np.abs(base).max()
    for name, made in built.items():
        row = {
            "axis": axis,
            "value": value,
            "program": name,
            "time": median(times[name]),
            "memory": made.memory,
            "trace": made.trace,
            "compile": made.compile,
            "contractions": compiled_contractions(made.run),
        }
        if name == SQRT:
            gap = np.abs(np.asarray(results[SQRT]) - base).max() / scale
            row["difference"] = float(gap)
        print(
            f"{axis:7} {value:5} {name:14} {row['time'] * 1e3:8.1f} ms "
            f"{row['memory'] / 2**20:7.1f} MiB, trace {row['trace']:6.2f} s, "
            f"compile {row['compile']:6.2f} s, {row['contractions']} contractions",
            flush=True,
        )
        yield row


def exponent(rows, figure):
    """k of ``a + b n^k``'s growth over the upper half: the slope between logarithms."""
    values = np.log([row["value"] for row in rows])
    figures = np.log([max(row[figure], 1e-9) for row in rows])
    half = max(2, (len(rows) + 1) // 2)
    return np.polyfit(values[-half:], figures[-half:], 1)[0]


def report(record):
    rows = record["rows"]
    lines = []
    for axis in dict.fromkeys(row["axis"] for row in rows):
        lines += [f"### With {axis}", "", _table(rows, axis)]
    return "\n".join(lines)


def _table(rows, axis):
    header = [axis, "program", "time", "over gradient x input", "temporary memory"]
    header += ["over gradient x input", "tracing", "compiling", "contractions"]
    cells = []
    for row in (r for r in rows if r["axis"] == axis):
        base = _of(rows, axis, BASE, row["value"])
        cells.append(
            [
                row["value"],
                row["program"],
                f"{row['time'] * 1e3:.1f} ms",
                f"{row['time'] / base['time']:.2f}",
                f"{row['memory'] / 2**20:.2f} MiB",
                f"{row['memory'] / max(base['memory'], 1):.2f}",
                f"{row['trace']:.2f} s ({row['trace'] / base['trace']:.2f})",
                f"{row['compile']:.2f} s ({row['compile'] / base['compile']:.2f})",
                row["contractions"],
            ]
        )
    growth = []
    for program in (BASE, JLRP, SQRT):
        own = [r for r in rows if r["axis"] == axis and r["program"] == program]
        powers = (
            f"{name} n^{exponent(own, name):.2f}"
            for name in ("time", "memory", "trace", "compile")
        )
        growth.append(f"- {program}: {', '.join(powers)}\n")
    return markdown(header, cells) + (
        "\nGrowth over the larger sizes (a slope between logarithms):\n\n"
        + "".join(growth)
    )


def _of(rows, axis, program, value):
    return next(
        r
        for r in rows
        if (r["axis"], r["program"], r["value"]) == (axis, program, value)
    )


FIGURES = {
    "time": ("time, ms", 1e3),
    "memory": ("temporary memory, MiB", 2.0**-20),
    "compile": ("tracing and compiling, s", 1.0),
}


def draw(record, path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = record["rows"]
    axes = list(dict.fromkeys(row["axis"] for row in rows))
    figure, plots = plt.subplots(
        len(FIGURES),
        len(axes),
        figsize=(3.2 * len(axes), 2.6 * len(FIGURES)),
        squeeze=False,
        layout="constrained",
    )
    for column, axis in enumerate(axes):
        for line, (name, (label, factor)) in enumerate(FIGURES.items()):
            plot = plots[line][column]
            for program, marker in ((BASE, "o"), (JLRP, "s"), (SQRT, "^")):
                own = [r for r in rows if (r["axis"], r["program"]) == (axis, program)]
                figures = [
                    factor * (r[name] + (r["trace"] if name == "compile" else 0))
                    for r in own
                ]
                values = [r["value"] for r in own]
                plot.loglog(values, figures, marker=marker, label=program, lw=1, ms=4)
            plot.set_xticks(values, [str(v) for v in values])
            plot.minorticks_off()
            if line == len(FIGURES) - 1:
                plot.set_xlabel(axis)
            if column == 0:
                plot.set_ylabel(label)
    plots[0][0].legend(fontsize="small")
    figure.savefig(path, dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--axes", nargs="+", choices=AXES, default=list(AXES))
    add("--quick", action="store_true", help="two sizes along each axis")
    add("--seconds", type=float, default=4, help="of timed runs, per size")
    add("--figure", metavar="PATH", help="also draw the growth")
    add("--json", metavar="PATH", help="also write the rows to this file")
    options = parser.parse_args()
    record = new_record(options)
    print(record["machine"], flush=True)
    for axis in options.axes:
        for value in (QUICK if options.quick else AXES)[axis]:
            collect(record, f"{axis} {value}", measure(axis, value, options))
            save(record, options.json)
    if options.figure:
        draw(record, options.figure)
    return finish(record, options.json)


if __name__ == "__main__":
    sys.exit(main())
