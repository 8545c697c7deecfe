"""What each residual policy keeps and runs again: the contractions that XLA compiled.

    python benchmarks/policies.py [--layers 12] [--length 64]

A dot or convolution that is promised runs again when a rule asks for it, and shows in
the compiled program. Where the compiler merges the second run with the first, the
traced program has it and the compiled one has not: then no memory is saved either.
Five memory limits are then set on two networks, between what `sqrt` and `keep` take,
and one below the least that is possible.
"""

import argparse
import sys
from dataclasses import replace

import jax
import numpy as np
from counting import compiled_contractions, contractions
from measuring import build, collect, finish, markdown, new_record, ready, timed
from networks import fill
from scaling import SMALL, candidates

import jlrp

POLICIES = {
    "keep": "keep",
    "promise": "promise",
    "sqrt": "sqrt",
    "dots_saveable": jax.checkpoint_policies.dots_saveable,
    "nothing_saveable": jax.checkpoint_policies.nothing_saveable,
}


def measure(scanned, options):
    model = replace(SMALL, layers=options.layers, scanned=scanned)
    params = fill(model.shapes(), seed=0)
    random = np.random.default_rng(1)
    x = random.standard_normal((1, options.length, model.width), np.float32)

    programs = {"gradient": candidates(model)["gradient"]}
    for name, residuals in POLICIES.items():
        explain = jlrp.explain(model, composite="attnlrp", residuals=residuals)
        programs[name] = lambda p, x, explain=explain: explain(p, x).relevance
    built = {name: build(program, params, x) for name, program in programs.items()}
    calls = {name: ready(made.run, params, x) for name, made in built.items()}
    times, results = timed(calls, options.seconds)
    keep = np.asarray(results["keep"])
    for name, made in built.items():
        traced = sum(times for _, times in contractions(programs[name], params, x))
        difference = np.abs(np.asarray(results[name]) - keep).max()
        row = {
            "layout": "scanned" if scanned else "in a row",
            "policy": name,
            "traced": traced,
            "compiled": compiled_contractions(made.run),
            "memory": made.memory,
            "time": float(np.median(times[name])),
            "difference": float(difference / np.abs(keep).max()),
        }
        print(
            f"{row['layout']:9} {name:17} traced {traced}, compiled {row['compiled']}, "
            f"{row['memory'] / 2**20:.2f} MiB, {row['time'] * 1e3:.1f} ms",
            flush=True,
        )
        yield row


def measure_limits(options):
    """Limits from below the least possible to what `keep` takes, and what was taken."""
    model = replace(SMALL, layers=options.layers)
    scanned = replace(model, scanned=True)
    shape = (1, options.length, model.width)
    x = np.random.default_rng(1).standard_normal(shape, np.float32)
    networks = {
        "in a row": ("attnlrp", model, fill(model.shapes(), seed=0), x),
        "scanned": ("attnlrp", scanned, fill(scanned.shapes(), seed=0), x),
    }
    for name, network in networks.items():
        least, most = (taken(*network, residuals=p) for p in ("sqrt", "keep"))
        for share in (-0.25, 0.0, 0.25, 0.5, 0.75, 1.0):
            limit = round(least + share * (most - least))
            row = {"network": name, "limit": limit, "taken": None, "refused": ""}
            try:
                row["taken"] = taken(*network, memory_limit=limit)
            except jlrp.MemoryLimitError as error:
                row["refused"] = str(error)
            print(f"{name:9} limit {limit}, taken {row['taken']} {row['refused']}")
            yield row


def taken(composite, fn, params, x, **options):
    """Bytes of temporary memory of the compiled explanation."""
    explain = jlrp.explain(fn, composite=composite, **options)
    run = jax.jit(lambda p, x: explain(p, x).relevance).lower(params, x).compile()
    return run.memory_analysis().temp_size_in_bytes


def report(record):
    return _policies_table(record) + "\n" + _limits_table(record)


def _limits_table(record):
    header = ["network", "memory_limit", "temporary memory compiled"]
    return markdown(
        header,
        [
            [
                row["network"],
                f"{row['limit'] / 2**20:.2f} MiB",
                row["refused"] or f"{row['taken'] / 2**20:.2f} MiB",
            ]
            for row in record["limits"]
        ],
    )


def _policies_table(record):
    header = ["layers", "policy", "contractions traced", "compiled"]
    header += ["temporary memory", "time", "largest difference from keep"]
    return markdown(
        header,
        [
            [
                row["layout"],
                row["policy"],
                row["traced"],
                row["compiled"],
                f"{row['memory'] / 2**20:.2f} MiB",
                f"{row['time'] * 1e3:.1f} ms",
                "" if row["policy"] == "gradient" else f"{row['difference']:.0e}",
            ]
            for row in record["rows"]
        ],
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--layers", type=int, default=12)
    add("--length", type=int, default=64)
    add("--seconds", type=float, default=3)
    add("--json", metavar="PATH", help="also write the rows to this file")
    options = parser.parse_args()
    record = new_record(options, limits=[])
    print(record["machine"], flush=True)
    for scanned in (False, True):
        collect(record, f"scanned: {scanned}", measure(scanned, options))
    record["limits"] = list(measure_limits(options))
    return finish(record, options.json)


if __name__ == "__main__":
    sys.exit(main())
