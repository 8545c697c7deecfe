"""All benchmarks of cost, and docs/benchmarks.md from what they measured.

    python benchmarks/run.py                    # about 25 minutes on 2 idle cores
    python benchmarks/run.py --quick            # small sizes: does everything run?
    python benchmarks/run.py --only peers scaling
    python benchmarks/run.py --only billion     # 10 minutes more, and 10 GB
    python benchmarks/run.py --only             # the document again, nothing measured
    python benchmarks/run.py --newer .venv312/bin/python   # growth with a newer JAX too

Each part runs in a process of its own and leaves a file of JSON in --results; the
document shows all parts that have one. A part that fails leaves the others standing,
and the exit status says so.
"""

import argparse
import importlib
import json
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
PARTS = {
    "cost": "What an explanation costs",
    "peers": "Beside its peers",
    "scaling": "How it grows",
    "policies": "Residual policies",
    "scaling_newer": "How it grows with depth, newer JAX",
    "policies_newer": "Residual policies, newer JAX",
    "billion": "A billion parameters",
}
USUAL = ["cost", "peers", "scaling", "policies"]
NEWER = ["scaling_newer", "policies_newer"]  # by another interpreter
ARGUMENTS = {"scaling_newer": ["--axes", "depth"]}
QUICK = {
    "cost": "--size 32 --length 16 --seconds 0.5 --least 1 --builds 1 --batch 1",
    "peers": "--size 32 --length 16 --seconds 0.5 --least 1",
    "scaling": "--quick --seconds 1",
    "policies": "--layers 4 --length 16 --seconds 1",
    "billion": "--layers 2 --length 64",
}
TEXTS = {
    "cost": """\
Over jit(gradient x input) of the same target, medians of interleaved runs (where one
round takes longer than {seconds:g} s, the first runs and one more), random weights,
images of {size} x {size}, sequences of {length} tokens as embeddings. `forward` is the
network alone, `control` is gradient x input once more: how far it is from 1 is the
noise. Temporary memory is XLA's own figure (`memory_analysis().temp_size_in_bytes`).
A bar is what the project promises.

`counted` is the multiplications in the dots and convolutions of the traced program over
those of the gradient's, which goes through each linear map twice; `least` is what the
rule's arithmetic allows: z+ three maps where inputs are not negative, gamma three if
also a ReLU follows, else four, alpha-beta four. `gamma` is `epsilon_gamma_box` on the
convolutional networks and `attnlrp(gamma_conv=0.25, gamma_dense=0.05)` on the
transformers; `alpha_beta` is `epsilon_alpha2_beta1`, and on ViT AlphaBeta(2, 1) on all
dense maps over `attnlrp`. `llama` has 6 layers x 768 in a row, `llama_scanned` the same
in a scan. Tracing and compiling are cold.
""",
    "peers": """\
The same network, the same weights, in JAX and in PyTorch, in one process; `ratio` is
the attribution over its own framework's forward pass. Peers whose form of a rule is
another one (how biases and sums take their share) are beside jlrp in that form, `jlrp
as ...`; correlation and the largest difference over the largest relevance say that the
same was computed. Where a peer does not take a network or a rule, it is said.
""",
    "scaling": """\
`attnlrp` on a small network of Llama's kind (6 layers x 256, 64 tokens, batch 1), one
size varied at a time; with depth the layers are in a row. In brackets: over gradient x
input.

![growth of time, memory and compile time](images/{part}.png)
""",
    "policies": """\
`attnlrp` on that network with {layers} layers. What a policy runs again is in the
traced program; where the compiler merges it with the first run, it is not in the
compiled one, and saves nothing. Below, `memory_limit` between what `sqrt` and `keep`
take, and what the compiled program then takes.
""",
    "billion": """\
A network of Llama-3.2-1B's shape (d 2048, 32 heads, 8 of keys and values, hidden 8192,
vocabulary 128256, rotary positions, tied embedding), random bfloat16 weights, each
program in a process of its own.
""",
}


def measured(part, options):
    """Run one part; whether it went well."""
    name = module_of(part)
    python = options.newer if part in NEWER else sys.executable
    arguments = [*ARGUMENTS.get(part, ()), "--json"]
    arguments.append(str(options.results / f"{part}.json"))
    if options.quick:
        arguments += QUICK[name].split()
    if name == "scaling":
        picture = options.document.parent / "images" / f"{part}.png"
        arguments += ["--figure", str(picture)]
    print(f"\n== {part}", flush=True)
    start = time.perf_counter()
    run = subprocess.run([python, str(HERE / f"{name}.py"), *arguments])
    minutes = (time.perf_counter() - start) / 60
    print(f"== {part}: {minutes:.1f} minutes, exit {run.returncode}", flush=True)
    return run.returncode == 0


def module_of(part):
    return part.removesuffix("_newer")


def document(results):
    lines = ["# Benchmarks", ""]
    lines += [
        "Written by `python benchmarks/run.py`. Every figure is of one machine and"
    ]
    lines += ["one run, whose command and machine stand under its heading.", ""]
    for part, title in PARTS.items():
        path = results / f"{part}.json"
        if not path.exists():
            continue
        record = json.loads(path.read_text())
        report = importlib.import_module(module_of(part)).report
        text = TEXTS[module_of(part)].format(part=part, **record["options"])
        lines += [f"## {title}", "", text]
        lines += [f"    {record['command']}", "", record["machine"] + ".", ""]
        lines += [report(record), *(f"- failed: {f}" for f in record["failures"]), ""]
    return "\n".join(lines).rstrip() + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--only", nargs="*", choices=list(QUICK), default=USUAL, help="these parts")
    add("--newer", metavar="PYTHON", help="an interpreter with a newer JAX, and flax")
    add("--quick", action="store_true", help="small sizes, to see that all runs")
    add("--results", type=Path, default=HERE / "results", help="a folder for JSON")
    add("--document", type=Path, default=HERE.parent / "docs/benchmarks.md")
    options = parser.parse_args()
    options.results.mkdir(parents=True, exist_ok=True)
    (options.document.parent / "images").mkdir(parents=True, exist_ok=True)
    if options.newer:
        options.only += [part for part in NEWER if part not in options.only]
    failed = [part for part in options.only if not measured(part, options)]
    options.document.write_text(document(options.results))
    print(f"\nwrote {options.document}")
    if failed:
        print(f"failed: {', '.join(failed)}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
