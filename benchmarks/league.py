"""All methods on 39 small networks, beside each other: docs/league.md.

    python benchmarks/league.py run                  # goes on where it was
    python benchmarks/league.py run --half choosing --seeds 3 --examples 400
    python benchmarks/league.py page                 # writes docs/league.md
    python benchmarks/league.py run --for-cells --half held-out --seeds 3 --examples 500
    python benchmarks/league.py cells --examples 500 # where `auto` loses: the same page

Networks of every kind that `auto` tells apart are trained here, on data that packages
ship or that is made here. Parts (a pixel with its channels, a step of time, a word, a
column) are removed by their relevance, by 0, by the example's mean, by a blur; the
score is the probability of the predicted class; ABPC is the mean over the points of
LeRF - MoRF. What explains from a baseline has as baseline what the removal leaves.

Each measurement is a line of a file in --folder, written when it is made; a run that
was killed goes on with what lacks. Trained weights lie beside it.

The split was written down before the first run: CHOOSING is what constants and clauses
of `auto` may be taken from, HELD_OUT is what they are checked on. Both halves have the
same kinds of networks; data, depth and width differ.
"""

import argparse
import functools
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flax.linen as nn
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import small_networks as small
from cost import machine
from scipy import stats

import jlrp
from jlrp import Composite, baselines, composites, metrics, rules

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "league.md"
POINTS = 8  # of a curve

# Data


@functools.cache
def large_digits(seed):
    """The digits at 16 x 16 pixels."""
    images = small.sklearn.datasets.load_digits()
    shape = (len(images.images), 16, 16)
    x = np.asarray(jax.image.resize(images.images / 16, shape, "linear"))
    return small.split(x[..., None], images.target, seed)


TOPICS = (
    "goal match team score league coach".split(),
    "bread soup onion butter salt oven".split(),
    "rain storm cloud wind snow frost".split(),
    "song guitar drum choir tune band".split(),
)
FILLERS = (
    "the a of and then we they saw had said some very once again under near with for "
    "old new good small day town man woman child house road morning"
).split()
WORDS = ["", *(word for topic in TOPICS for word in topic), *FILLERS]
IDS = {word: i for i, word in enumerate(WORDS)}


@functools.cache
def sentences(seed, size=3000, length=12):
    """Which topic has most words: three of one, one of another, the rest says nothing.

    Words are vectors, drawn once; the networks map them as they like.
    """
    rng = np.random.default_rng(seed)
    vectors = np.random.default_rng(0).normal(size=(len(WORDS), 16))
    ids, labels = np.zeros((size, length), int), rng.integers(0, len(TOPICS), size)
    for row, label in zip(ids, labels, strict=True):
        other = (label + rng.integers(1, len(TOPICS))) % len(TOPICS)
        words = [*rng.choice(TOPICS[label], 3), rng.choice(TOPICS[other])]
        words += list(rng.choice(FILLERS, length - len(words)))
        row[:] = [IDS[word] for word in rng.permutation(words)]
    return small.split(vectors[ids], labels, seed)


TESTS = 500  # examples that take no part in the training; tables are all of both


@functools.cache
def data_of(name, seed):
    """An entry's data, so many of its first rows for the test."""
    data = ENTRIES[name].data(seed)
    more = TESTS - len(data.test)
    if data.test is data.x or more <= 0:
        return data
    test = np.concatenate([data.test, data.x[:more]])
    return small.Data(data.x[more:], data.labels[more:], test)


# Networks


@dataclass(frozen=True)
class Entry:
    """A network: what it is, its data, the steps of its training."""

    kind: str
    data: Any
    model: nn.Module
    steps: int = 300
    read: Any = staticmethod(lambda scores: scores)  # what is explained of its output


def middle(logits):
    """Of logits by pixel those of the pixel in the middle."""
    return logits[:, logits.shape[1] // 2, logits.shape[2] // 2]


def convolutions(count, width=12):
    """The widths of a stack of convolutions."""
    return tuple(width * (1 + (2 * i) // count) for i in range(count))


Stack, Residual, Transformer = small.Stack, small.Residual, small.Transformer
Mixer, Recurrent, Dense = small.Mixer, small.Recurrent, small.Dense
large_shapes = functools.partial(small.shapes, side=32)
CHOOSING = {
    "CNN of 2, digits": Entry("convolutions", small.digits, Stack((16, 32), (1,))),
    "CNN of 4, digits at 16": Entry(
        "convolutions", large_digits, Stack((12, 16, 24, 32), (1,), True)
    ),
    "CNN of 8, shapes": Entry(
        "convolutions", small.shapes, Stack(convolutions(8), (2, 5), True, True)
    ),
    "CNN of 20, digits": Entry(
        "convolutions", small.digits, Stack(convolutions(20), (9,), True, True), 400
    ),
    "ResNet of 15, digits": Entry("convolutions", small.digits, Residual(2, 12)),
    "ResNet of 15, shapes": Entry("convolutions", small.shapes, Residual(2, 10)),
    "CNN of 3, signals": Entry(
        "convolutions", small.signals, Stack((16, 24, 32), (0, 1), kernel=5)
    ),
    "ViT, digits at 16": Entry("attention", large_digits, Transformer(4), 400),
    "transformer, sentences": Entry("attention", sentences, Transformer(0, "dense")),
    "mixer, shapes": Entry("mixer", small.shapes, Mixer(4), 600),
    "LSTM, signals": Entry("recurrence", small.signals, Recurrent(), 800),
    "GRU, rows of digits": Entry(
        "recurrence", small.digits, Recurrent(nn.GRUCell), 600
    ),
    "MLP of ReLU, digits": Entry("dense", small.digits, Dense((64, 64))),
    "MLP of tanh, wine": Entry("dense", small.wine, Dense((32, 32), nn.tanh)),
    "MLP of GELU, cancer": Entry("dense", small.cancer, Dense((32, 32), nn.gelu)),
}
HELD_OUT = {
    "CNN of 3, shapes": Entry(
        "convolutions", small.shapes, Stack((16, 24, 32), (0, 1, 2))
    ),
    "CNN of 6, digits": Entry(
        "convolutions", small.digits, Stack(convolutions(6), (3,), True)
    ),
    "CNN of 12, digits at 16": Entry(
        "convolutions", large_digits, Stack(convolutions(12), (3, 7), True, True)
    ),
    "ResNet of 9, digits at 16": Entry("convolutions", large_digits, Residual(1, 12)),
    "ResNet of 21, shapes": Entry("convolutions", small.shapes, Residual(3, 8), 400),
    "dilated CNN of 5, signals": Entry(
        "convolutions",
        small.signals,
        Stack((16,) * 5, (), average=True, dilation=True),
        400,
    ),
    "ViT with a token, digits": Entry(
        "attention", small.digits, Transformer(2, "dense", token=True), 500
    ),
    "transformer of GLU, sentences": Entry(
        "attention", sentences, Transformer(0, "dense", mlp="glu", token=True)
    ),
    "mixer, digits at 16": Entry("mixer", large_digits, Mixer(4, False), 500),
    "LSTM, rows of digits": Entry("recurrence", small.digits, Recurrent(), 600),
    "GRU averaged, signals": Entry(
        "recurrence", small.signals, Recurrent(nn.GRUCell, mean=True), 800
    ),
    "MLP of ReLU, cancer": Entry("dense", small.cancer, Dense((32, 32))),
    "MLP of tanh, digits": Entry("dense", small.digits, Dense((64, 64), nn.tanh)),
    "MLP of GELU, diabetes": Entry("dense", small.diabetes, Dense((32, 32), nn.gelu)),
}
# Kinds that were added later, to both halves, when what `auto` does had been decided.
CHOOSING |= {
    "CNN of 6, shapes at 32": Entry(
        "convolutions",
        large_shapes,
        Stack(convolutions(6), (1, 3), True, True),
        400,
    ),
    "U-Net, middle of a scene": Entry(
        "convolutions", small.scenes, small.UNet(), 300, middle
    ),
    "Mamba, signals": Entry("selective", small.signals, small.Mamba(), 500),
    "graph network by its matrix": Entry("graph", small.graphs, small.Graph(), 800),
}
HELD_OUT |= {
    "ResNet of 9, shapes at 32": Entry(
        "convolutions", large_shapes, Residual(1, 12), 400
    ),
    "U-Net of transposed, middle of a scene": Entry(
        *("convolutions", small.scenes, small.UNet(16, 1, True, False), 300, middle)
    ),
    "Mamba, rows of digits": Entry("selective", small.digits, small.Mamba(24, 1), 500),
    "graph network by edges": Entry(
        "graph", small.graphs, small.Graph(layers=3, by_edges=True), 800
    ),
}
# Added to the first half alone: is the U-Net there one of its kind?
CHOOSING |= {
    "CNN of 7, middle of a scene": Entry(
        "convolutions", small.scenes, small.Places(), 400, middle
    ),
    "U-Net, middle of a dark scene": Entry(
        "convolutions", small.dark_scenes, small.UNet(), 300, middle
    ),
}
HALVES = {"choosing": CHOOSING, "held-out": HELD_OUT}
ENTRIES = {**CHOOSING, **HELD_OUT}

# Removals: what is put in place, by the rank of an example


def removals(shape):
    """By name; an image has channels last."""
    found = {
        "zero": metrics.Constant(0.0),
        "mean": metrics.Mean(tuple(range(1, max(2, len(shape))))),
    }
    if len(shape) == 3:
        found["blur"] = metrics.Blur(7, 2.0, axes=(1, 2))
    return found


# Methods: (case, removal) -> relevance


@dataclass(frozen=True)
class ByRules:
    """Relevance by a composite, relative to what the removal leaves if asked for."""

    composite: str | Composite
    relative: bool = False

    def options(self, case, removal):
        baseline = {"baseline": removal(case.x)} if self.relative else {}
        return {"composite": self.composite, **baseline}

    def __call__(self, case, removal):
        return jlrp.relevance(*case.called, **self.options(case, removal))

    def key(self, case, removal):
        """What two composites have in common that are one on this network."""
        report = jlrp.inspect(*case.called, **self.options(case, removal))
        return self.relative, *((row.kind, row.rule) for row in report.operations)


def gradients(name, **options):
    def method(case, removal):
        return getattr(baselines, name)(*case.called, **options)

    return method


def integrated(case, removal):
    baseline = removal(case.x)
    return baselines.integrated_gradients(*case.called, baseline=baseline, steps=32)


def occluded(case, removal):
    windows = metrics.Parts(quarters(case.x.shape[1:]))
    return baselines.occlusion(*case.called, parts=windows, removal=removal)


def quarters(shape):
    """Labels of four windows: of an image by both axes, else along the first."""
    if len(shape) == 3:
        rows, columns = (2 * np.arange(n) // n for n in shape[:2])
        return (2 * rows[:, None] + columns)[..., None]
    labels = 4 * np.arange(shape[0]) // shape[0]
    return labels.reshape(-1, *[1] * (len(shape) - 1))


def on_convolutions(near, far, base="attnlrp"):
    """Gamma that falls from x to the output, the rest by a base."""
    falling = composites.gamma_by_depth(0.0, (near, far)).pairs
    pairs = [(p.selector, p.rule) for p in falling if isinstance(p.rule, rules.Gamma)]
    optional = [composites.Pair(*pair, optional=True) for pair in pairs]
    return Composite(optional, base)


PRESETS = [n for n in sorted(composites.PRESETS) if n != "gradient_input"]
GAMMAS = (
    (1.5, 0.1),
    (0.6, 0.3),
    (0.6, 0.1),
    (0.6, 0.03),
    (0.3, 0.3),
    (0.2, 0.2),
    (0.3, 0.1),
    (0.3, 0.03),
    (0.1, 0.1),
    (0.1, 0.01),
)
ON_DIFFERENCES = ((1.5, 0.1), (0.6, 0.03), (0.1, 0.01), (0.03, 0.003))
# What clauses are chosen from is measured first.
FIRST = ("attnlrp", "auto", "cp_lrp", "dynamic_lrp", "epsilon_plus", "mamba_lrp")


# Presets that may be relative to a baseline; some refuse one on some networks.
FROM_A_BASELINE = (
    "attnlrp",
    "cp_lrp",
    "dynamic_lrp",
    "epsilon",
    "epsilon_alpha2_beta1",
    "epsilon_plus",
    "gradient_input",
    "mamba_lrp",
)


def falling(near, far):
    return f"Gamma {near:g} to {far:g}"


def methods(kind, low, high):
    """By name, in the order in which they are measured."""
    bounded = {"epsilon_gamma_box": composites.epsilon_gamma_box(low, high)}
    found = {name: ByRules(name) for name in FIRST}
    if kind == "convolutions":
        for gammas in GAMMAS:
            found[falling(*gammas)] = ByRules(on_convolutions(*gammas))
        for gammas in ON_DIFFERENCES:
            composite = on_convolutions(*gammas, "deep_lift")
            found[f"{falling(*gammas)}, differences"] = ByRules(composite, True)
    for name in ("auto", "deep_lift"):
        found[f"{name}, differences"] = ByRules(name, True)
    found["gradient x input"] = gradients("gradient_input")
    found["integrated gradients"] = integrated
    found["occlusion, 4 windows"] = occluded
    rest = (name for name in PRESETS if name not in found)
    found |= {name: ByRules(bounded.get(name, name)) for name in rest}
    found |= {f"{name}, differences": ByRules(name, True) for name in FROM_A_BASELINE}
    found["gradient"] = gradients("gradient")
    found["SmoothGrad"] = gradients("smoothgrad", samples=16)
    return found


RELATIVE = ("integrated gradients", "occlusion, 4 windows")


def in_cells(method, removal):
    """Whether a cell compares it: presets without a baseline where 0 is put alone."""
    name = method.removesuffix(", differences")
    if name in (*PRESETS, *FROM_A_BASELINE, "deep_lift"):
        return name != method or removal == "zero"
    return method in RELATIVE


# Running


@functools.cache
def function_of(name):
    """What is explained: one for all seeds, so that it is compiled once."""
    model, read = ENTRIES[name].model, ENTRIES[name].read
    return lambda variables, x: read(model.apply(variables, x))


class Case:
    """A trained network with the examples that are explained."""

    def __init__(self, name, seed, examples, folder):
        self.entry, data = ENTRIES[name], data_of(name, seed)
        model = self.entry.model
        self.fn = function_of(name)
        self.variables = trained(
            folder / "weights" / slug(name, seed),
            *((model, data, self.entry.steps, seed)),
        )
        self.x, self.parts = jnp.asarray(data.test[:examples]), data.parts
        self.called = self.fn, self.variables, self.x
        scores = jax.nn.softmax(self.fn(self.variables, self.x))
        self.sure = float(scores.max(-1).mean())
        self.known, self.keys = {}, {}

    def key(self, name, method, removal):
        """What methods have in common that are one here; rules are of no removal."""
        if name not in self.keys:
            of_rules = isinstance(method, ByRules)
            self.keys[name] = method.key(self, removal) if of_rules else name
        return self.keys[name]

    def relevance(self, name, method, removal):
        """One relevance for all methods and removals that make no difference to it."""
        key = self.key(name, method, removal)
        relative = getattr(method, "relative", name in RELATIVE)
        key = (key, removal) if relative else key
        if key not in self.known:
            self.known[key] = method(self, removal)
        return key, self.known[key]

    def abpc(self, relevance, removal):
        found = metrics.curves(
            *self.called,
            relevance,
            parts=self.parts,
            removal=removal,
            steps=min(self.parts.count, POINTS),
        )
        return np.asarray(found.abpc)


def slug(name, seed):
    return f"{name.replace(' ', '_').replace(',', '')}_{seed}.msgpack"


def trained(file, model, data, steps, seed):
    """The variables, from the file if they are there."""
    if file.exists():
        return flax.serialization.msgpack_restore(file.read_bytes())
    variables = small.train(model, data, steps, seed)
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".part")
    partial.write_bytes(
        flax.serialization.msgpack_serialize(
            jax.tree.map(np.asarray, flax.serialization.to_state_dict(variables))
        )
    )
    partial.rename(file)
    return variables


class Rows:
    """A line for each measurement; a last line that was cut off counts for nothing."""

    def __init__(self, file):
        self.file, self.found = file, {}
        lines = file.read_text().splitlines() if file.exists() else []
        for line in lines:
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                continue
            self.found[self.key(row)] = row

    @staticmethod
    def key(row):
        return (
            row["network"],
            row["seed"],
            row["examples"],
            row["removal"],
            row["method"],
        )

    def add(self, row):
        self.found[self.key(row)] = row
        with self.file.open("a") as file:
            file.write("\n" + json.dumps(row))  # behind what may have been cut off


def measure(name, seed, examples, rows, folder, only):
    """What lacks of one network; `only`: whether a method and removal are wanted."""
    data = data_of(name, seed)
    low, high = min(0.0, float(data.test.min())), max(0.0, float(data.test.max()))
    every, hows = methods(ENTRIES[name].kind, low, high), removals(data.test.shape[1:])
    wanted = [
        (method, removal)
        for method in every
        for removal in hows
        if only(method, removal)
        if (name, seed, examples, removal, method) not in rows.found
    ]
    if not wanted:
        return
    begun = time.perf_counter()
    case, known = Case(name, seed, examples, folder), {}
    for method, removal in wanted:
        how = hows[removal]
        row = dict(network=name, seed=seed, examples=examples, removal=removal)
        row |= {"method": method, "sure": round(case.sure, 3)}
        try:
            key, relevance = case.relevance(method, every[method], how)
        except jlrp.errors.JlrpError as error:  # a rule that knows no baseline
            rows.add({**row, "abpc": [], "refused": str(error).split("\n")[0]})
            continue
        if (key, removal) not in known:
            known[key, removal] = case.abpc(relevance, how)
        rows.add({**row, "abpc": [round(float(v), 4) for v in known[key, removal]]})
    print(f"{name}, seed {seed}: {time.perf_counter() - begun:.0f} s", flush=True)


# Cells: does the default lose more than may be lost?

LOST = 0.03  # of ABPC


@dataclass(frozen=True)
class Cell:
    """The default beside its best rival on one network, one removal.

    The rival is the best on one half of the examples, and compared on the other.
    """

    network: str
    question: str  # "zero", or "zero, baseline"
    ours: float  # mean on the half that took no part in the choice
    rival: str
    theirs: float
    gaps: np.ndarray  # of each example of that half

    @property
    def gap(self):
        return float(self.gaps.mean())

    @functools.cached_property
    def chance(self):
        """How likely so low a mean is, had the default lost no more than LOST.

        By Student's t of one side.
        """
        spread = self.gaps.std(ddof=1) / np.sqrt(self.gaps.size)
        if spread == 0.0:
            return float(self.gap >= -LOST)
        return float(stats.t.cdf((self.gap + LOST) / spread, self.gaps.size - 1))

    def interval(self, level):
        """What two sides of Student's t leave outside is 1 - level."""
        spread = self.gaps.std(ddof=1) / np.sqrt(self.gaps.size)
        reach = spread * stats.t.ppf((1 + level) / 2, self.gaps.size - 1)
        return metrics.Interval(self.gap, self.gap - reach, self.gap + reach, level)


def compared(network, question, ours, rivals):
    """A cell of the default's ABPC and that of its rivals, by name."""
    best = max(rivals, key=lambda name: rivals[name][::2].mean())
    mine, theirs = ours[1::2], rivals[best][1::2]
    gaps = mine - theirs
    return Cell(network, question, float(mine.mean()), best, float(theirs.mean()), gaps)


def judged(cells, level=0.95):
    """Of each cell its interval, and whether its upper end is below -LOST: a failure.

    Holm over all cells: of m cells the least likely has the level 1 - 0.05 / m, the
    next 1 - 0.05 / (m - 1), until one does not fail; it and all behind it hold.
    """
    order = sorted(range(len(cells)), key=lambda i: cells[i].chance)
    found, failing = {}, True
    for place, i in enumerate(order):
        share = (1 - level) / (len(cells) - place)
        interval = cells[i].interval(1 - share)
        failing &= interval.high < -LOST
        found[i] = interval, failing
    return [found[i] for i in range(len(cells))]


def cells_of(figures, half):
    """Without a baseline where 0 is put; from what the removal leaves, at each."""
    found = []
    for network in HALVES[half]:
        for removal in ("zero", "mean", "blur"):
            for question, default, wanted in questions(removal):
                every = figures.of(network, removal, wanted)
                if len(every) > 1 and default in every:
                    ours = every.pop(default)
                    found.append(compared(network, question, ours, every))
    return found


def questions(removal):
    """What is asked of a removal: its name, the default, what is compared."""
    if removal == "zero":
        yield "zero", "auto", lambda m: m in PRESETS

    def relative(method):
        return method not in PRESETS and in_cells(method, removal)

    yield f"{removal}, baseline", "auto, differences", relative


def of_cells(cells):
    """A line for each cell."""
    yield ["network", "removed by", "`auto`", "best rival", "`auto` more by", "verdict"]
    for cell, (interval, fails) in zip(cells, judged(cells), strict=True):
        said = "**fails**" if fails else "holds"
        said += ", below chance" if cell.ours < 0 else ""
        theirs = f"{cell.theirs:.3f} ({cell.rival})"
        mine = f"{cell.ours:.3f}"
        yield [cell.network, cell.question, mine, theirs, str(interval), said]


def named(cells):
    return "; ".join(f"{c.network} ({c.question})" for c in cells) or "none"


def in_a_word(cells):
    """How many cells hold, the means, and which fail: among all, and by themselves."""
    verdicts = judged(cells)
    failing = [c for c, (_, fails) in zip(cells, verdicts, strict=True) if fails]
    alone = [c for c in cells if judged([c])[0][1]]
    lower = [c for c in cells if c.gap < -LOST]
    chance = [c for c in cells if c.ours < 0]
    ours, theirs = (np.mean([getattr(c, n) for c in cells]) for n in ("ours", "theirs"))
    return (
        f"{len(cells) - len(failing)} of {len(cells)} cells hold. Failing: "
        f"{named(failing)}. {len(alone)} would fail if each were the only one, "
        f"by 95 %: {named(alone)}. {len(lower)} have a mean more than {LOST:g} below "
        f"the rival's: {named(lower)}. {len(chance)} are below chance. `auto` has "
        f"{ours:.3f} in the mean, the rivals {theirs:.3f}."
    )


# The page


OURS = set(PRESETS) - {"auto"}
MARK = "<!-- What follows is written by benchmarks/league.py -->"
CELLS = "<!-- cells, by benchmarks/league.py -->", "<!-- end of cells -->"


class Figures:
    """ABPC of each example by network, removal and method; of all seeds."""

    def __init__(self, rows, examples):
        self.values = {}  # (network, removal) -> method -> seed -> (examples,)
        for row in rows:
            if row["examples"] == examples and row["abpc"]:
                of = self.values.setdefault((row["network"], row["removal"]), {})
                of.setdefault(row["method"], {})[row["seed"]] = row["abpc"]

    def of(self, network, removal, wanted=lambda method: True):
        """By method, of the seeds that all of them have: the same examples."""
        found = self.values.get((network, removal), {})
        found = {method: by for method, by in found.items() if wanted(method)}
        common = sorted(set.intersection(*map(set, found.values()))) if found else []
        return {
            method: np.concatenate([by[seed] for seed in common])
            for method, by in found.items()
            if common
        }

    def curves(self):
        """How many pairs of curves there are."""
        return sum(
            len(abpc)
            for of in self.values.values()
            for by in of.values()
            for abpc in by.values()
        )

    def seeds(self, networks):
        """Of some networks, how many seeds: from, to."""
        counts = [
            len(by)
            for (network, _), of in self.values.items()
            for by in of.values()
            if network in networks
        ]
        return min(counts), max(counts)


def mean_of(found, method):
    return f"{found[method].mean():.3f}" if method in found else ""


def comparison(found, ours, others):
    """The default, the best of others, and the interval of their difference."""
    others = [m for m in others if m in found]
    if ours not in found or not others:
        return "", "", ""
    best = max(others, key=lambda m: found[m].mean())
    gap = metrics.interval(found[ours] - found[best])
    return mean_of(found, ours), f"{mean_of(found, best)} ({best})", str(gap)


def summary(figures, half, removal):
    """A line for each network."""
    others = ("gradient x input", "integrated gradients", "occlusion, 4 windows")
    header = ["network", "`auto`", "best preset", "`auto` more by"]
    header += ["from the baseline: `auto`", "best other", "`auto` more by", *others]
    yield header
    for network in HALVES[half]:
        if not (found := figures.of(network, removal)):
            continue
        from_baseline = [m for m in found if m.endswith(", differences")]
        yield [
            network,
            *comparison(found, "auto", OURS),
            *comparison(
                found,
                "auto, differences",
                [m for m in from_baseline if m != "auto, differences"],
            ),
            *(mean_of(found, m) for m in others),
        ]


def in_full(figures, half, removal):
    """A line for each method, a column for each network."""
    networks = [n for n in HALVES[half] if figures.of(n, removal)]
    found = {n: figures.of(n, removal) for n in networks}
    every = list(dict.fromkeys(m for f in found.values() for m in f))
    yield ["method", *networks]
    for method in sorted(every, key=lambda m: (m.endswith("differences"), m)):
        yield [method, *(mean_of(found[n], method) for n in networks)]


def candidates(figures, half, base):
    """What others have more than a base: mean of the convolutional networks, least."""
    networks = [n for n, entry in HALVES[half].items() if entry.kind == "convolutions"]
    relative = base.endswith(", differences")
    gaps = {}
    for removal in ("zero", "mean", "blur"):
        for network in networks:
            found = figures.of(network, removal)
            for method in found if base in found else ():
                if method.endswith(", differences") == relative and method != base:
                    gap = found[method].mean() - found[base].mean()
                    gaps.setdefault(method, {}).setdefault(removal, []).append(gap)
    yield [f"more than {base}", "networks", "zero", "mean", "blur"]
    for method in sorted(gaps, key=lambda m: -np.mean(sum(gaps[m].values(), []))):
        if method.startswith(("Gamma", "auto", "attnlrp", "epsilon_plus", "deep_lift")):
            yield [
                method,
                str(len(gaps[method]["zero"])),
                *(f"{np.mean(v):+.3f} ({min(v):+.3f})" for v in gaps[method].values()),
            ]


def table(lines):
    header, *rows = lines
    rule = ["---"] * len(header)
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, rule, *rows))


def page(figures, examples):
    """Write the figures behind the text of the page."""
    said = f"Up to {examples} examples of each network, {figures.curves()} curve pairs."
    parts = [MARK, "", "## Figures", "", f"{said} {machine()}."]
    parts += ["", "## Convolutions: means over networks, and the least of one"]
    for half in HALVES:
        for base in ("Gamma 0.6 to 0.1", "deep_lift, differences"):
            parts += ["", f"### {half.capitalize()} half, beside {base}", ""]
            parts.append(table(candidates(figures, half, base)))
    parts += ["", "## By network"]
    for half in HALVES:
        for removal in ("zero", "mean", "blur"):
            title = f"{half} half, removed by {removal}".capitalize()
            parts += ["", f"### {title}", "", table(summary(figures, half, removal))]
    parts += ["", "## Every method"]
    for half in HALVES:
        for removal in ("zero", "mean", "blur"):
            title = f"{half} half, every method, removed by {removal}".capitalize()
            parts += ["", f"### {title}", "", table(in_full(figures, half, removal))]
    text = PAGE.read_text().split(MARK)[0] if PAGE.exists() else ""
    PAGE.write_text(text + "\n".join(parts) + "\n")


def cells_page(figures, half, examples):
    """Write the cells between their marks."""
    cells = cells_of(figures, half)
    if not cells:
        raise SystemExit(f"{half}: no rows; make them with `run --for-cells`")
    least, most = figures.seeds(HALVES[half])
    seeds = f"seeds: {most}" if least == most else f"seeds: {least} to {most}"
    before, mark, rest = PAGE.read_text().partition(CELLS[0])
    _, end, behind = rest.partition(CELLS[1])
    if not (mark and end):
        raise SystemExit(f"{PAGE}: the marks {CELLS} are not in it")
    said = f"{half.capitalize()} half; {seeds}, up to {examples} examples each"
    parts = [mark, "", f"{said}. {machine()}.", "", in_a_word(cells), ""]
    parts += [table(of_cells(cells)), "", end]
    PAGE.write_text(before + "\n".join(parts) + behind)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("what", choices=["run", "page", "cells"])
    add("names", nargs="*", help="of networks; all, if none")
    add("--half", choices=HALVES, help="both, if not given")
    add("--seeds", type=int, default=1, help="networks and data of each kind")
    add("--examples", type=int, default=200, help="at most, of each network")
    add("--methods", nargs="+", help="names, for a part of the rows")
    add("--for-cells", action="store_true", help="the rows of which cells are made")
    add("--folder", type=Path, default=ROOT / "build" / "league")
    options = parser.parse_intermixed_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    rows = Rows(options.folder / "rows.jsonl")
    figures = Figures(rows.found.values(), options.examples)
    if options.what == "page":
        return page(figures, options.examples)
    if options.what == "cells":
        return cells_page(figures, options.half or "held-out", options.examples)
    print(machine())
    chosen = options.names or HALVES.get(options.half, ENTRIES)

    def only(method, removal):
        named = not options.methods or method in options.methods
        return named and (not options.for_cells or in_cells(method, removal))

    for name in chosen:
        for seed in range(options.seeds):
            measure(name, seed, options.examples, rows, options.folder, only)
        jax.clear_caches()


if __name__ == "__main__":
    sys.exit(main())
