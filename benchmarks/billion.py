"""A billion parameters: a network of Llama-3.2-1B's shape, explained on a CPU.

    python benchmarks/billion.py                     # 16 layers, 512 tokens: minutes
    python benchmarks/billion.py --layers 4 --length 128 --scanned
    python benchmarks/billion.py --json out.json     # in a row and scanned, both

Random weights in bfloat16 are made in place, leaf by leaf, on the device. Each program
runs in a process of its own, so that its peak of resident memory is its own: the
forward pass, gradient x input, and `attnlrp`. Medians are over the runs asked for,
one behind another, not interleaved: the weights fill the memory once only.
"""

import argparse
import json
import resource
import subprocess
import sys
from functools import partial
from statistics import median

import jax
import jax.numpy as jnp
import numpy as np
from llama import Llama
from measuring import build, clock, markdown, new_record, save

PROGRAMS = ("forward", "gradient", "attnlrp")


def sizes(layers, scanned):
    return Llama(
        layers=layers,
        width=2048,
        heads=32,
        kv_heads=8,
        hidden=8192,
        vocabulary=128256,
        rope_theta=500000.0,
        scanned=scanned,
        tied=True,
    )


def weights(model):
    """bfloat16 leaves, drawn on the device: no float32 copy of the whole is made."""

    def leaf(path, shape):
        nonlocal key
        key, own = jax.random.split(key)
        if path[-1].key == "scale":
            return jnp.ones(shape.shape, jnp.bfloat16)
        return _noise(own, shape.shape, path[-1].key == "embedding")

    key = jax.random.key(0)
    return jax.tree_util.tree_map_with_path(leaf, model.shapes(jnp.bfloat16))


@partial(jax.jit, static_argnums=(1, 2))
def _noise(key, shape, is_table):
    """Row by row: what random bits take beside is small."""
    fan_in = shape[-1] if is_table else shape[-2]
    scale = jnp.asarray(np.sqrt(2 / fan_in), jnp.bfloat16)

    def row(key):
        return scale * jax.random.normal(key, shape[1:], jnp.bfloat16)

    size = max(1, 2**22 // int(np.prod(shape[1:])))
    return jax.lax.map(row, jax.random.split(key, shape[0]), batch_size=size)


def program_of(name, model, residuals):
    if name == "forward":
        return model
    if name == "gradient":

        def score(params, x):
            return model(params, x).max(-1).astype(jnp.float32).sum()

        return lambda params, x: x * jax.grad(score, argnums=1)(params, x)
    import jlrp

    explain = jlrp.explain(model, composite=name, residuals=residuals)
    return lambda params, x: explain(params, x).relevance


def measure(name, options):
    """One program in this process: what it takes, and what it says."""
    model = sizes(options.layers, options.scanned)
    params = weights(model)
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    ids = jax.random.randint(jax.random.key(1), (1, options.length), 0, 128256)
    x = params["head"]["embedding"][ids[0]][None]
    jax.block_until_ready(x)
    resting = _peak()
    built = build(program_of(name, model, options.residuals), params, x)
    seconds, out = [], None
    for _ in range(options.runs + 1):
        out, took = clock(lambda: jax.block_until_ready(built.run(params, x)))
        seconds.append(took)
    out = np.asarray(out, np.float64)
    scores = np.asarray(jax.jit(model)(params, x), np.float64)
    return {
        "program": name,
        "layers": options.layers,
        "length": options.length,
        "scanned": options.scanned,
        "residuals": options.residuals,
        "parameters": count,
        "first": seconds[0],
        "time": median(seconds[1:] or seconds),
        "trace": built.trace,
        "compile": built.compile,
        "temporary": built.memory,
        "weights_peak": resting,
        "peak": _peak(),
        "finite": bool(np.isfinite(out).all()),
        "sum": float(out.sum()),
        "score": float(scores.max()),
        "largest": float(np.abs(out).max()),
    }


def _peak():
    """Bytes: the most that this process had in memory so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def in_a_process(name, scanned, options):
    command = [sys.executable, __file__, "--program", name]
    for option in ("layers", "length", "runs", "residuals"):
        command += [f"--{option}", str(getattr(options, option))]
    command += ["--scanned"] if scanned else []
    run = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if run.returncode:
        row = {"program": name, "scanned": scanned, "failed": run.returncode}
        why = " (no memory was left)" if run.returncode == -9 else ""
        print(f"{name} failed: exit status {run.returncode}{why}", flush=True)
        return row
    row = json.loads(run.stdout.splitlines()[-1])
    print(
        f"{_layout(row)} {name:9} {row['time']:6.1f} s, temporary "
        f"{row['temporary'] / 2**30:.2f} GiB, peak {row['peak'] / 2**30:.2f} GiB, "
        f"trace {row['trace']:.2f} s, compile {row['compile']:.1f} s, finite "
        f"{row['finite']}, sum {row['sum']:.4g} of {row['score']:.4g}",
        flush=True,
    )
    return row


def _layout(row):
    return "scanned" if row["scanned"] else "in a row"


def report(record):
    header = ["layers", "program", "time", "over gradient x input", "temporary memory"]
    header += ["peak of the process", "tracing", "compiling", "finite"]
    header += ["relevance / score"]
    cells = []
    for row in record["rows"]:
        if "failed" in row:
            cells.append([_layout(row), row["program"], f"failed ({row['failed']})"])
            cells[-1] += [""] * (len(header) - 3)
            continue
        base = next(
            r
            for r in record["rows"]
            if r["program"] == "gradient" and r["scanned"] == row["scanned"]
        )
        has_base = "time" in base
        explains = row["program"] != "forward"
        cells.append(
            [
                _layout(row),
                row["program"],
                f"{row['time']:.1f} s",
                f"{row['time'] / base['time']:.2f}" if has_base else "",
                f"{row['temporary'] / 2**30:.2f} GiB",
                f"{row['peak'] / 2**30:.2f} GiB",
                f"{row['trace']:.2f} s",
                f"{row['compile']:.1f} s",
                "yes" if row["finite"] else "no",
                f"{row['sum'] / row['score']:.4g}" if explains else "",
            ]
        )
    measured = [row for row in record["rows"] if "parameters" in row]
    if not measured:
        return markdown(header, cells)
    return markdown(header, cells) + (
        f"\n{measured[0]['parameters'] / 1e9:.3f} billion parameters, "
        f"{measured[0]['length']} tokens, residuals "
        f'`"{measured[0]["residuals"]}"`.\n'
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--layers", type=int, default=16)
    add("--length", type=int, default=512)
    add("--runs", type=int, default=1, help="timed runs behind the first")
    add("--residuals", default="keep")
    add("--scanned", action="store_true", help="with --program")
    add("--layouts", nargs="+", choices=("row", "scan"), default=["row", "scan"])
    add("--programs", nargs="+", choices=PROGRAMS, default=PROGRAMS)
    add("--program", choices=PROGRAMS, help="this one, in this process; prints JSON")
    add("--json", metavar="PATH", help="also write the rows to this file")
    options = parser.parse_args()
    if options.program:
        print(json.dumps(measure(options.program, options)))
        return 0
    record = new_record(options)
    print(record["machine"], flush=True)
    for layout in options.layouts:
        for name in options.programs:
            record["rows"].append(in_a_process(name, layout == "scan", options))
            save(record, options.json)
    return int(any("failed" in row for row in record["rows"]))


if __name__ == "__main__":
    sys.exit(main())
