"""Clocks, compilers, records and tables that the benchmarks share."""

import gc
import json
import os
import platform
import sys
import time
import traceback
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import jax
import jaxlib


def clock(call):
    start = time.perf_counter()
    result = call()
    return result, time.perf_counter() - start


def interleaved(names, rounds):
    """A B C, B C A, ...: a change of the machine's mood meets all alike."""
    for i in range(rounds):
        k = i % len(names)
        yield from ((i, name) for name in names[k:] + names[:k])


def timed(calls, seconds, least=2, most=15, results=None):
    """Seconds of each call, by name, after a warm-up; and what the warm-up returned.

    Interleaved, as many rounds as take about ``seconds``: of ``least`` to ``most``.
    Where one round alone takes longer, the warm-up is the first of them. ``results``
    has the names of what needs no warm-up any more.
    """
    results, samples = dict(results or {}), {name: [] for name in calls}
    start = {}
    for name, call in calls.items():
        if name not in results:
            results[name], start[name] = clock(call)
    one_round = sum(start.values()) * len(calls) / max(len(start), 1)
    rounds = min(most, max(least, int(seconds / max(one_round, 1e-9))))
    if one_round > seconds and len(start) == len(calls) and rounds > 1:
        samples, rounds = {name: [took] for name, took in start.items()}, rounds - 1
    for _, name in interleaved(list(calls), rounds):
        samples[name].append(clock(calls[name])[1])
    return samples, results


def ready(function, *args):
    """A call that returns when its arrays are there."""
    return lambda: jax.block_until_ready(function(*args))


def build(function, *args):
    """Trace, lower and compile: seconds of each, bytes, and the executable."""
    traced, trace = clock(lambda: jax.jit(function).trace(*args))
    lowered, lower = clock(traced.lower)
    run, compiling = clock(lowered.compile)
    memory = run.memory_analysis().temp_size_in_bytes
    return SimpleNamespace(
        run=run, trace=trace, lower=lower, compile=compiling, memory=memory
    )


def clear_caches():
    """Forget every trace: jax's caches, and jlrp's memoised analyses."""
    jax.clear_caches()
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] == "jlrp":
            for value in list(vars(module).values()):
                if callable(clear := getattr(value, "cache_clear", None)):
                    clear()
    gc.collect()


def ratio(samples, base):
    return median(samples) / median(base)


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


def new_record(options, where=None, **more):
    """What a benchmark writes: where, by which command, and rows to be added."""
    arguments = sys.argv[1:]
    for name in ("--json", "--figure"):  # of run.py's
        if name in arguments:
            at = arguments.index(name)
            del arguments[at : at + 2]
    command = ["python", f"benchmarks/{Path(sys.argv[0]).name}", *arguments]
    return {
        "machine": where or machine(),
        "command": " ".join(command),
        "options": vars(options),
        "rows": [],
        "failures": [],
        **more,
    }


def collect(record, what, rows):
    """Add rows as they come; what fails is noted, and the rest goes on."""
    try:
        record["rows"] += rows
    except Exception as failure:
        traceback.print_exc()
        reason = f"{type(failure).__name__}: {' '.join(str(failure).split())}"
        record["failures"].append(f"{what}: {reason}"[:200])


def finish(record, path):
    """Save, and the exit status."""
    save(record, path)
    for failure in record["failures"]:
        print(f"failed: {failure}")
    return int(bool(record["failures"]))


def save(record, path):
    """Called after each part of the work: what was measured is not lost."""
    if path:
        with open(path, "w") as file:
            json.dump(record, file, indent=1)


def markdown(header, rows):
    """A table: the first column to the left, numbers to the right."""
    lines = ["| " + " | ".join(header) + " |"]
    lines.append("|---" + "|---:" * (len(header) - 1) + "|")
    lines += ["| " + " | ".join(map(str, row)) + " |" for row in rows]
    return "\n".join(lines) + "\n"
