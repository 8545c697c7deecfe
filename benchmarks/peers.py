"""jlrp beside its peers: same network, weights and rule, each over its own forward.

    python benchmarks/peers.py [--networks vgg16 llama] [--rules epsilon] [--batch 1]

Per library: seconds of its framework's forward pass, of the attribution (which has its
forward pass in it), their ratio, and how far its relevance is from jlrp's: medians of
interleaved runs in one process, PyTorch and XLA on as many threads. Where a library
does not take a network or a rule, that is said. Needs torch, transformers and

    pip install --no-deps zennit==1.0.0 lxt captum autolrp==0.2.0
"""

import argparse
import os
import sys
import warnings
from functools import partial
from importlib.metadata import version
from statistics import median

import numpy as np
import torch
import torch_networks
from cost import COMPOSITES, IMAGES, composite_of
from forms import form
from libraries import LIBRARIES, PACKAGES, Case, Refused, import_zennit
from measuring import (
    build,
    clear_caches,
    collect,
    finish,
    machine,
    markdown,
    new_record,
    ratio,
    ready,
    save,
    timed,
)
from networks import NETWORKS, VISION

import jlrp

__all__ = ["import_zennit"]  # faithfulness.py asks for it here

RULES = {
    "vgg16": COMPOSITES["vgg16"],
    "resnet50": COMPOSITES["resnet50"],
    **dict.fromkeys(("vit", "bert", "gpt2", "llama"), ["attnlrp"]),
}


def case_of(network, params, size):
    if network == "vgg16":
        build = partial(torch_networks.vgg16, params, size // 32)
    elif network == "resnet50":
        build = partial(torch_networks.resnet50, params)
    elif network == "vit":
        return Case(network, partial(torch_networks.vit, params, size), IMAGES)
    else:
        return Case(network, partial(getattr(torch_networks, network), params), IMAGES)
    return Case(network, lambda *args: (build(*args),) * 2, IMAGES)


def measure(network, batch, options):
    """Rows of one network: for each rule, jlrp and what each peer does."""
    size = options.size if network in VISION else options.length
    fn, params, x = NETWORKS[network](batch, size)
    torch_x = torch.tensor(np.asarray(x))
    if network in VISION:
        torch_x = torch_x.permute(0, 3, 1, 2).contiguous()
    case = case_of(network, params, size)
    forward = build(fn, params, x).run

    @torch.no_grad()
    def torch_forward():
        return case.scores(torch_x)

    scores, theirs = np.asarray(forward(params, x)), torch_forward().numpy()
    agree = np.abs(scores - theirs).max() / np.abs(scores).max()
    print(f"{network:9} scores agree to {agree:.0e}", flush=True)

    for rule in options.rules or RULES[network]:
        calls = {"jax": ready(forward, params, x), "torch": torch_forward}
        ours, refusals, warm = {}, {}, {}  # ours: jlrp's call beside each peer
        for library in ("jlrp", *options.libraries):
            composite = form(library, rule, IMAGES, case.is_transformer)
            ours[library] = "jlrp" if composite is None else f"jlrp as {library}"
            if library != "jlrp":
                try:
                    call = partial(LIBRARIES[library](case, rule), torch_x)
                    warm[library] = call()
                    calls[library] = call
                except Exception as refusal:
                    refusals[library] = reason(refusal)
                    continue
            if ours[library] not in calls:
                composite = composite or composite_of(rule, network)
                calls[ours[library]] = _explaining(fn, composite, params, x)
        times, results = timed(calls, options.seconds, options.least, results=warm)
        start = {"network": network, "batch": batch, "rule": rule}
        for name in calls:
            if name in ("jax", "torch"):
                continue
            is_ours = name.startswith("jlrp")
            beside = name if is_ours else ours[name]
            base = times["jax" if is_ours else "torch"]
            row = {
                **start,
                "library": name,
                "beside": beside,
                "forward": median(base),
                "time": median(times[name]),
                "ratio": ratio(times[name], base),
                "rounds": len(times[name]),
            }
            if not is_ours:
                row.update(_agreement(results[beside], results[name], network))
            show(row)
            yield row
        for name, why in refusals.items():
            row = {**start, "library": name, "refused": why}
            show(row)
            yield row


def _explaining(fn, composite, params, x):
    explain = jlrp.explain(fn, composite=composite)
    run = build(lambda params, x: explain(params, x).relevance, params, x).run
    return ready(run, params, x)


def _agreement(ours, theirs, network):
    ours, theirs = np.asarray(ours), theirs.detach().numpy()
    ours = ours.transpose(0, 3, 1, 2) if network in VISION else ours
    difference = np.abs(ours - theirs).max() / np.abs(ours).max()
    correlation = np.corrcoef(ours.ravel(), theirs.ravel())[0, 1]
    return {"difference": float(difference), "correlation": float(correlation)}


def reason(refusal):
    if isinstance(refusal, Refused):
        return str(refusal)
    text = " ".join(str(refusal).split())
    return f"{type(refusal).__name__}: {text}"[:90]


def show(row):
    start = f"{row['network']:9} {row['batch']:3} {row['rule']:13} {row['library']:15}"
    if "refused" in row:
        print(f"{start} refused: {row['refused']}", flush=True)
        return
    agreement = ""
    if "correlation" in row:
        agreement = f"  with {row['beside']}: correlation {row['correlation']:.6f}, "
        agreement += f"difference {row['difference']:.0e}"
    print(
        f"{start} {row['forward'] * 1e3:7.0f} ms {row['time'] * 1e3:7.0f} ms "
        f"{row['ratio']:6.2f}{agreement}",
        flush=True,
    )


def report(record):
    header = ["network", "batch", "rule", "library", "forward", "attribution"]
    header += ["ratio", "beside", "correlation", "largest difference"]
    cells = []
    for row in record["rows"]:
        start = [row["network"], row["batch"], row["rule"], row["library"]]
        if "refused" in row:
            cells.append([*start, "", "", "refused", row["refused"], "", ""])
            continue
        compared = "correlation" in row
        cells.append(
            [
                *start,
                f"{row['forward'] * 1e3:.0f} ms",
                f"{row['time'] * 1e3:.0f} ms",
                f"{row['ratio']:.2f}",
                row["beside"] if compared else "",
                f"{row['correlation']:.5f}" if compared else "",
                f"{row['difference']:.0e}" if compared else "",
            ]
        )
    return "\n".join([markdown(header, cells), *verdicts(record["rows"])])


def verdicts(rows):
    """What of "less overhead than every peer" holds, counted; what does not, named."""
    rows = [r for r in rows if "refused" not in r]
    key = ("network", "batch", "rule")
    ours = {(*(r[k] for k in key), r["library"]): r for r in rows}
    pairs = [
        (ours[(*(row[k] for k in key), row["beside"])], row)
        for row in rows
        if row["beside"] != row["library"]
    ]
    fair = [(a, b) for a, b in pairs if a["forward"] <= b["forward"]]
    claims = {
        "lower ratio than the peer": ("ratio", pairs),
        "shorter time where JAX's forward pass is not slower": ("time", fair),
    }
    for claim, (figure, among) in claims.items():
        lost = [b for a, b in among if a[figure] >= b[figure]]
        names = ", ".join(f"{b['network']} {b['rule']} {b['library']}" for b in lost)
        won = len(among) - len(lost)
        yield f"- {claim}: {won} of {len(among)}" + (f"; not: {names}" if lost else "")


def versions():
    names = {"torch": "torch", **PACKAGES}
    return ", ".join(f"{name} {version(package)}" for name, package in names.items())


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--networks", nargs="+", choices=RULES, default=list(RULES))
    add("--rules", nargs="+", help="default: what suits each network")
    add("--libraries", nargs="+", choices=LIBRARIES, default=list(LIBRARIES))
    add("--batch", type=int, nargs="+", default=[1])
    add("--size", type=int, default=224)
    add("--length", type=int, default=128)
    add("--seconds", type=float, default=6, help="of timed runs, per rule")
    add("--least", type=int, default=2, help="timed runs of each, at least")
    add("--threads", type=int, default=os.cpu_count(), help="of PyTorch")
    add("--json", metavar="PATH", help="also write the rows to this file")
    options = parser.parse_args()
    warnings.simplefilter("ignore")  # the peers' own
    torch.set_num_threads(options.threads)

    header = f"{machine()}, {versions()}, {options.threads} threads of PyTorch"
    print(f"{header}\n")
    print(f"{'network':9} {'':3} {'rule':13} {'library':15} {'forward':>10} ", end="")
    print(f"{'attributed':>10} {'ratio':>6}", flush=True)
    record = new_record(options, header)
    for network in options.networks:
        for batch in options.batch:
            rows = measure(network, batch, options)
            collect(record, f"{network}, batch {batch}", rows)
            clear_caches()
            save(record, options.json)
    print("\n".join(verdicts(record["rows"])))
    return finish(record, options.json)


if __name__ == "__main__":
    sys.exit(main())
