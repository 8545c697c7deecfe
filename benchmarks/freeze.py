"""What jlrp makes of many programs, frozen: to see what a change of the code changes.

    python benchmarks/freeze.py save FILE --jobs 2  # goes on where it was stopped
    python benchmarks/freeze.py save FILE --small   # what tests have
    python benchmarks/freeze.py save FILE --programs 'tests/*' --composites auto
    python benchmarks/freeze.py compare FILE --jobs 2  # status 1 if a row differs
    python benchmarks/freeze.py list

A row is a program under a composite and a residual policy: the rows of `jlrp.inspect`,
a hash of the traced relevance and its equations by primitive (see `canonical.py`), and
the bytes that are kept. Nothing is compiled. Only jlrp's public face is used, so that
one checkout of this file freezes another tree: `PYTHONPATH=TREE python .../freeze.py`.

What a change means to rename is given to `compare`, and then is no difference:
`--renamed Zero=LRP0 Follow=Route`.

The programs: those of `tests/` (traced_programs.py, the spellings, the networks of the
peers), of `networks.py` and of `covered.py` and `others*.py` at their small sizes.
What a framework does not trace is a row that says so. Rows hold for one version of JAX.
"""

import argparse
import fnmatch
import functools
import gzip
import hashlib
import itertools
import json
import os
import re
import sys
import warnings
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("KERAS_BACKEND", "jax")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import jax
from canonical import canonical
from jax.extend.core import jaxpr_as_fun

import jlrp
from jlrp import composites, rules

jax.config.update("jax_enable_x64", True)  # before any program makes its constants
# The tests first: both folders have a `peers`.
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

try:
    from tqdm import tqdm
except ImportError:
    tqdm = None


@dataclass
class Program:
    """``fn(params, x)`` of shapes, traced once, and what of it is explained."""

    fn: object
    params: object
    x: object
    target: object = None


def _traced(fn, params, x, target=None):
    """A program that is a jaxpr: each composite reads it without running ``fn``."""
    closed, out = jax.make_jaxpr(fn, return_shape=True)(params, x)
    run, tree = jax.jit(jaxpr_as_fun(closed)), jax.tree.structure(out)

    def again(params, x):
        return jax.tree.unflatten(tree, run(*jax.tree.leaves((params, x))))

    return Program(again, _shapes(params), _shapes(x), target)


def _shapes(tree):
    def shape(leaf):
        aval = jax.typeof(leaf) if not hasattr(leaf, "shape") else leaf
        return jax.ShapeDtypeStruct(aval.shape, aval.dtype)

    return jax.tree.map(shape, tree)


# Programs: ``{name: build() -> (fn, params, x[, target])}`` of each source.


def _of_tests():
    import traced_programs

    return {
        name.replace(", ", " ").replace(" ", "_"): functools.partial(tuple, program[:3])
        for name, program in traced_programs.PROGRAMS.items()
    }


def _of_spellings():
    import test_spellings as s

    def build(fn, network):
        values, x = s.sample(network)
        params = s.jax_networks.params(network, values)
        return fn, params, s.jax_networks.to_layout(x, "NHWC")

    found = {}
    for dense in (*s.DENSE_SPELLINGS, *s.SCALED_DENSE_SPELLINGS):
        found[dense.__name__] = (s.even_mlp(dense), s.EVEN_MLP)
    for conv in (*s.CONV_SPELLINGS, s.scale_around_bias):
        found[conv.__name__] = (s.small_cnn(conv), s.SMALL_CNN)
    for name, relu in s.RELUS.items():
        found[f"relu_{name}"] = (s.small_cnn(relu=relu), s.SMALL_CNN)
    for name, mean in s.MEANS.items():
        found[f"mean_{name}"] = (s.small_cnn(mean=mean), s.SMALL_CNN)
    return {name: functools.partial(build, *made) for name, made in found.items()}


def _of_peers():
    from peers import jax_networks, networks

    def build(network, **spelling):
        layout = spelling.get("layout", "NHWC")
        params = jax_networks.params(network, networks.weights(network, 0), layout)
        x = jax_networks.to_layout(networks.inputs(network, 0), layout)
        return jax_networks.function(network, **spelling), params, x

    found = {str(n): functools.partial(build, n) for n in networks.NETWORKS}
    for network in (networks.RESNET, networks.CONV_KINDS, networks.DENSENET):
        for norm in ("torch", "keras"):
            made = functools.partial(build, network, batch_norm=norm)
            found[f"{network}_{norm}"] = made
        found[f"{network}_nchw"] = functools.partial(build, network, layout="NCHW")
    return found


_SIZES = {"vgg16": 32, "resnet50": 32, "vit": 32}


def _of_networks():
    import networks

    networks.fill = lambda shapes, seed: shapes  # no numbers are needed

    def build(name, make):
        length = _SIZES.get(name)
        return make(size=length) if length else make(length=4)

    return {n: functools.partial(build, n, m) for n, m in networks.NETWORKS.items()}


def _of_coverage():
    import covered

    def build(make):
        model = make(False, None)
        return model.fn, model.params, model.x, model.target

    return {
        name: functools.partial(build, make)
        for name, (_, make) in covered.MODELS.items()
    }


def _of_others():
    import others
    import others_jax  # noqa: F401  (adds to the same table)

    return {name: build for name, (_, _, build) in others.OTHERS.items()}


SOURCES = {
    "tests": _of_tests,
    "spellings": _of_spellings,
    "peers": _of_peers,
    "networks": _of_networks,
    "coverage": _of_coverage,
    "others": _of_others,
}


def programs(patterns=("*",)):
    """The names that match, of all sources or of those that patterns begin with."""
    chosen = [
        source
        for source in SOURCES
        if any(fnmatch.fnmatch(source, p.split("/")[0]) for p in patterns)
    ]
    names = [f"{source}/{name}" for source in chosen for name in _builds(source)]
    found = [n for n in names if any(fnmatch.fnmatch(n, p) for p in patterns)]
    if not found:
        raise SystemExit(f"No program matches {', '.join(patterns)}.")
    return found


@functools.cache
def _builds(source):
    return SOURCES[source]()


def program(name):
    source, _, name = name.partition("/")
    return _traced(*_builds(source)[name]())


# Composites and policies.


def _all(rule, base="epsilon"):
    """A rule on all that has a kernel, where there is such."""
    pairs = [(kind, rule) for kind in ("conv", "dense", "linear")]
    return _optional(pairs, base)


def _optional(pairs, base, **view):
    """Pairs of a base may match nothing."""
    return jlrp.Composite([], jlrp.Composite(pairs, base, **view))


COMPOSITES = {
    name: name
    for name in (
        "auto attnlrp cp_lrp dynamic_lrp epsilon epsilon_alpha2_beta1 "
        "epsilon_alpha2_beta1_flat epsilon_plus epsilon_plus_flat excitation_backprop "
        "gamma_by_depth gradient_input mamba_lrp"
    ).split()
} | {
    "epsilon_gamma_box": composites.epsilon_gamma_box(low=-3.0, high=3.5),
    "epsilon_0": composites.epsilon(epsilon=0.0),
    "attnlrp_gamma": composites.attnlrp(gamma_conv=0.25, gamma_dense=0.05),
    "dynamic_lrp_gamma": composites.dynamic_lrp(gamma_conv=2.0, gamma_dense=0.5),
    "z_plus": _all(rules.ZPlus()),
    "gamma": _all(rules.Gamma(0.25)),
    "gamma_montavon": _all(rules.GammaMontavon(0.25)),
    "alpha_beta": _all(rules.AlphaBeta(2.0, 1.0, bias="split")),
    "w_square": _all(rules.WSquare()),
    "split": _optional(
        [
            ("conv", rules.Epsilon(1e-6, bias="split")),
            ("dense", rules.Epsilon(1e-6, bias="split")),
            ("activation", rules.NativeGradient()),
            ("product", rules.Absolute(1e-6)),
        ],
        "attnlrp",
        merge_batch_norm=False,
        hold_statistics=False,
    ),
}


@functools.cache
def policies():
    saves = jax.checkpoint_policies
    return {
        "keep": "keep",
        "promise": "promise",
        "sqrt": "sqrt",
        "offload": "offload",
        "kernels": jlrp.KeepWhere(lambda op: op.kind in ("conv", "dense")),
        "dots_saveable": saves.dots_saveable,
        "nothing_saveable": saves.nothing_saveable,
    }


# The whole product would take hours. Every composite with `keep`, every policy with
# these; of the 150 others a few pairs that tell recognisers, rules, policies apart.
WITH_POLICIES = ("auto", "epsilon", "epsilon_alpha2_beta1_flat", "split")
FEW = (
    ("auto", "keep"),
    ("attnlrp_gamma", "keep"),
    ("epsilon_alpha2_beta1_flat", "keep"),
    ("gradient_input", "keep"),
    ("split", "promise"),
    ("epsilon", "sqrt"),
)

# What the tests have, with the few.
SMALL = (
    "tests/*",
    "spellings/bias_[ab]*",
    "spellings/einsum_of_heads",
    "spellings/odd_*",
    "spellings/scale*",
    "spellings/relu_times_step",
    "peers/conv_kinds",
)


def pairs_of(name, options):
    """The composites and policies of a program."""
    if options.composites or options.policies:
        chosen = options.composites or COMPOSITES, options.policies or policies()
        return list(itertools.product(*chosen))
    if options.small or name.startswith("others/"):
        return list(FEW)
    every = set(itertools.product(WITH_POLICIES, policies()))
    every |= {(composite, "keep") for composite in COMPOSITES}
    return sorted(every)


# Rows.


def frozen(name, pairs):
    """The rows of a program: a dict for each pair of a composite and a policy."""
    where = dict(program=name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            made = program(name)
        except Exception as error:  # of the framework: jlrp has not seen it
            return [where | dict(composite="", policy="", error=_error(error))]
        return [
            where | dict(composite=c, policy=p) | _row_or_error(made, c, p)
            for c, p in pairs
        ]


def _row_or_error(made, composite, policy):
    try:
        return _row(made, COMPOSITES[composite], policies()[policy])
    except Exception as error:
        return dict(error=_error(error))


def _row(made, composite, residuals):
    options = dict(composite=composite, residuals=residuals)
    report = jlrp.inspect(made.fn, made.params, made.x, made.target, **options)
    explain = jlrp.explain(made.fn, target=made.target, **options)
    relevance = jax.make_jaxpr(lambda p, x: explain(p, x).relevance)
    found = canonical(relevance(made.params, made.x))
    kept = report.activations
    return dict(
        rows=[*map(_operation, report.operations), *_footer(report)],
        hash=found.hash,
        counts=found.counts,
        bytes=dict(
            kept=kept.kept_bytes,
            peak=kept.peak_bytes,
            stacked=found.stacked,
            promises=kept.promises,
            chain=kept.total_chain,
        ),
    )


def _operation(row):
    shapes = " ".join(map(_shape, (*row.input_shapes, row.output_shape)))
    words = [f"{'  ' * row.depth}{row.kind}", *row.facts, f"({row.primitive}"]
    words[-1] += f" x {row.equations})" if row.equations > 1 else ")"
    status = [] if row.status == "covered" else [f"[{row.status}]"]
    return _plain(" ".join([*words, f"{shapes}:", row.rule, *status]))


def _footer(report):
    c = report.coverage
    yield f"{c.covered} covered, {c.fallback} by fallback, {c.uncovered} uncovered"
    if report.why:
        yield report.why
    for title, lines in (("stop", report.stops), ("x chooses", report.choices)):
        counts = Counter(map(_plain, lines))
        yield from sorted(f"{title}: {n} x {line}" for line, n in counts.items())


def _shape(shape):
    return "x".join(map(str, shape)) or "scalar"


def _plain(text):
    """Without addresses, scopes and lines of source."""
    text = re.sub(r" at 0x[0-9a-f]+", "", text)
    line = r" \((?:[^()]|\([^()]*\))*:\d+(?:[^()]|\([^()]*\))*\)"
    return re.sub(rf" at [^ ,]+( level)?({line})?", "", text)


def _error(error):
    return f"{type(error).__name__}: {_plain(' '.join(str(error).split()))}"[:300]


# Files: a line each of JSON; tables of `inspect` are written once, by their digest.


class Rows:
    """The rows of a file; what is added is in the file before it counts as done."""

    def __init__(self, path):
        self.path, self.known, self.tables, self.version = Path(path), {}, {}, None
        self.whole = 0  # bytes: a killed run may have cut the last line
        if self.path.exists():
            opened = gzip.open if self.path.suffix == ".gz" else open
            with opened(self.path, "rb") as file:
                for line in file:
                    if line.endswith(b"\n"):
                        self._take(json.loads(line))
                        self.whole += len(line)

    def _take(self, line):
        if "jax" in line:
            self.version = line["jax"]
        elif "table" in line:
            self.tables[line["table"]] = line["rows"]
        else:
            key = (line["program"], line["composite"], line["policy"])
            self.known[key] = line

    def get(self, key):
        row = self.known[key]
        if "rows" in row:
            row = row | dict(rows=self.tables[row["rows"]])
        return row

    def has(self, name, pair):
        return (name, "", "") in self.known or (name, *pair) in self.known

    def add(self, rows):
        lines = []
        if self.version is None:
            lines.append(dict(jax=jax.__version__))
        for row in rows:
            if "rows" in row:
                digest = _digest(row["rows"])
                if digest not in self.tables:
                    lines.append(dict(table=digest, rows=row["rows"]))
                row = row | dict(rows=digest)
            lines.append(row)
        for line in lines:
            self._take(line)
        with open(self.path, "ab") as file:
            file.truncate(self.whole)
            text = "".join(json.dumps(line) + "\n" for line in lines).encode()
            self.whole += file.write(text)
            file.flush()
            os.fsync(file.fileno())


def _digest(rows):
    return hashlib.blake2b("\n".join(rows).encode(), digest_size=8).hexdigest()


# Differences.


def differences(old, new, renamed=()):
    """What of a row differs, in words."""
    if new is None:  # it did not trace, and does
        new = dict(error="none")
    if "error" in old or "error" in new:
        texts = [r.get("error", "no error") for r in (old, new)]
        if texts[0] != texts[1]:
            yield f"error: was {texts[0]}\n    is {texts[1]}"
        return
    was = [_renamed(text, renamed) for text in old["rows"]]
    if was != new["rows"]:
        pairs = zip([*was, "nothing"], [*new["rows"], "nothing"], strict=False)
        i, (a, b) = next((i, ab) for i, ab in enumerate(pairs) if ab[0] != ab[1])
        yield f"rows: {i} was {a}\n    is {b}"
    if old["hash"] != new["hash"]:
        yield "hash"
    for what in ("counts", "bytes"):
        names = sorted({*old[what], *new[what]})
        pairs = [(n, old[what].get(n, 0), new[what].get(n, 0)) for n in names]
        changed = [f"{n} {a} -> {b}" for n, a, b in pairs if a != b]
        if changed:
            yield f"{what}: {', '.join(changed)}"


def _renamed(text, renamed):
    for old, new in renamed:
        text = re.sub(rf"\b{re.escape(old)}\b", new, text)
    return text


# Commands.


def tasks(options, known):
    """Programs, and those of their pairs that are not known yet."""
    for name in programs(options.programs or (SMALL if options.small else "*")):
        pairs = pairs_of(name, options)
        if missing := [pair for pair in pairs if not known.has(name, pair)]:
            yield name, missing


def run(todo, jobs):
    """The rows of each program, as they come: ``todo`` are names and pairs."""
    total = sum(len(pairs) for _, pairs in todo)
    bar = tqdm(total=total, unit="row", smoothing=0.05) if tqdm else None
    if jobs < 2:
        found = (_frozen_alone(*task) for task in todo)
    else:
        found = _in_processes(todo, jobs)
    for rows in found:
        yield rows
        if bar is not None:
            bar.update(len(rows))
            bar.set_postfix_str(rows[-1]["program"])
    if bar is not None:
        bar.close()


def _frozen_alone(name, pairs):
    try:
        return frozen(name, pairs)
    finally:
        jax.clear_caches()


def _in_processes(todo, jobs):
    context = get_context("spawn")
    with ProcessPoolExecutor(jobs, context, max_tasks_per_child=12) as pool:
        for done in as_completed([pool.submit(_frozen_alone, *task) for task in todo]):
            yield done.result()


def save(options):
    rows = Rows(options.file)
    if rows.version not in (None, jax.__version__):
        raise SystemExit(f"{options.file} was made with jax {rows.version}.")
    for found in run(list(tasks(options, rows)), options.jobs):
        rows.add(found)
    print(f"{len(rows.known)} rows in {options.file}")


def compare(options):
    """The rows of a file that are of the programs, composites, policies asked for."""
    old = Rows(options.file)
    if old.version != jax.__version__:
        print(f"{options.file} was made with jax {old.version}: all may differ.")
    renamed = [pair.split("=") for pair in options.renamed]
    asked = [
        (name, composite, policy)
        for name, composite, policy in old.known
        if any(fnmatch.fnmatch(name, glob) for glob in options.programs or "*")
        and composite in ("", *(options.composites or COMPOSITES))
        and policy in ("", *(options.policies or policies()))
    ]
    wrong = 0
    for key, lines in changes(old, asked, options.jobs, renamed):
        wrong += 1
        print(" ".join(key), *lines, sep="\n  ", flush=True)
    print(f"{wrong} of {len(asked)} rows differ")
    return int(wrong > 0)


def changes(old, keys, jobs=1, renamed=()):
    """The keys whose rows are others now, and in what."""
    todo = {}
    for name, composite, policy in keys:
        todo.setdefault(name, []).append((composite or "auto", policy or "keep"))
    for found in run(list(todo.items()), jobs):
        new = {(r["program"], r["composite"], r["policy"]): r for r in found}
        untraced = new.get((found[0]["program"], "", ""))
        for key in (k for k in keys if k[0] == found[0]["program"]):
            if lines := list(
                differences(old.get(key), new.get(key, untraced), renamed)
            ):
                yield key, lines


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("command", choices=["save", "compare", "list"])
    parser.add_argument("file", nargs="?")
    add = parser.add_argument
    add("--small", action="store_true", help="the programs and pairs of the tests")
    add("--programs", nargs="+", metavar="GLOB", help="such as 'coverage/*'")
    add("--composites", nargs="+", choices=COMPOSITES, metavar="NAME")
    add("--policies", nargs="+", choices=policies(), metavar="NAME")
    add("--renamed", nargs="+", default=[], metavar="OLD=NEW", help="in old rows")
    add("--jobs", type=int, default=1, help="processes")
    options = parser.parse_args()
    if options.command == "list":
        for name in programs(options.programs or "*"):
            print(name, len(pairs_of(name, options)))
        return 0
    if options.file is None:
        parser.error("a file is needed")
    print(f"jlrp of {Path(jlrp.__file__).parent}", file=sys.stderr)
    return {"save": save, "compare": compare}[options.command](options)


if __name__ == "__main__":
    sys.exit(main())
