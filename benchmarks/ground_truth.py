"""Whether explanations find evidence that is known: networks trained here on tasks of
which it is known where the answer stands.

    python benchmarks/ground_truth.py             # all of it, and the pictures
    python benchmarks/ground_truth.py copying     # one part

questions: a transformer answers questions about a passage by saying a thing; is the
most relevant token one of the words that tell it? shortcut: a CNN has learnt the class
of an image of a digit by a mark beside it, which alone tells the class; is the most
relevant pixel, or window of 4 x 4, in the mark? copying: a selective state-space model
says letters again in order; is the most relevant token the letter said? sanity: does
relevance change when the trained layers are randomised from the top?

Explained is the score of what the network says, and, since what all classes have in
common decides nothing, that score less the mean of all classes' scores: the contrast.
Only examples that the network gets right are counted. An attribution of a token is the
sum over its features, for gradient and SmoothGrad, which are no shares of the score,
the norm; pixels of these two count by absolute value. The intervals are Wilson's, 95 %.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import known_tasks as tasks
import numpy as np
from cost import machine

import jlrp
from jlrp import baselines, flow, metrics, plotting

IMAGES = Path(__file__).parents[1] / "docs" / "images"
UNSIGNED = ("gradient", "SmoothGrad")
BARS = {"questions": 0.98, "shortcut": 1.0}


@dataclass(frozen=True)
class Case:
    """A trained network and the examples that it gets right.

    Attributes:
      fn, params, x: what is explained; x has features, or channels, last.
      target: the multiplier of each output: 1 for what was said. Classes come last.
      evidence: bool, like x without its last axis.
      composites: those to be compared.
      parts: what occlusion removes together.
      accuracy: share of the test that is right.
      windows: of an image, which count as one place.
    """

    fn: Callable[[Any, Any], Any]
    params: Any
    x: Any
    target: Any
    evidence: np.ndarray
    composites: tuple[str, ...]
    parts: Any
    accuracy: float
    windows: Any = None

    def methods(self):
        yield from (
            (f"jlrp `{name}`", partial(jlrp.relevance, composite=name))
            for name in self.composites
        )
        yield "gradient", baselines.gradient
        yield "gradient x input", baselines.gradient_input
        yield "integrated gradients", baselines.integrated_gradients
        yield "SmoothGrad", baselines.smoothgrad
        yield "occlusion", partial(baselines.occlusion, parts=self.parts)
        yield "random", by_chance

    def places(self, name, attribution):
        """One number for each token or pixel."""
        if name in UNSIGNED:
            return np.linalg.norm(attribution, axis=-1)
        return np.asarray(attribution).sum(-1)

    @property
    def contrast(self):
        """The multipliers of a score less the mean of those it competes with."""
        competing = jnp.any(self.target != 0, -1, keepdims=True)
        return self.target - competing / self.target.shape[-1]

    def attributions(self, target):
        for name, method in self.methods():
            found = method(self.fn, self.params, self.x, target)
            yield name, self.places(name, found)

    def some(self, count):
        """A case of the first examples."""
        cut = jax.tree.map(lambda leaf: leaf[:count], self.params[1])
        values = dict(vars(self), params=(self.params[0], cut))
        for name in ("x", "target", "evidence"):
            values[name] = values[name][:count]
        return Case(**values)


def by_chance(fn, params, x, target):
    return np.random.default_rng(0).normal(size=x.shape)


def questions(keep=None, steps=800, size=20000, tests=300):
    """The transformer, explained at the score of the thing that it says."""
    model, test = tasks.Reader(), tasks.questions(tests, 1)

    def both(variables, ids):
        def method(model, ids):
            return model.points(model.embed(ids), ids > 0)

        return model.apply(variables, ids, method=method)

    task = tasks.questions(size, 0)
    variables = _trained(model, both, task, steps, _file(keep, "questions"))
    said = np.asarray(jax.jit(both)(variables, test.x)).argmax(-1)[:, 1]
    right = said == test.labels[:, 1]
    x = model.apply(variables, test.x[right], method="embed")
    return Case(
        lambda params, x: model.apply(params[0], x, params[1]),
        (variables, jnp.asarray(test.x[right] > 0)),
        x,
        jax.nn.one_hot(said[right], len(tasks.THINGS)),
        test.evidence[right],
        ("auto", "attnlrp", "cp_lrp"),
        metrics.tokens(x.shape[1:]),
        right.mean(),
    ), test.x[right]


def shortcut(keep=None, steps=1000, size=8000, tests=300, agreeing=0.1, unmarked=0.2):
    """The CNN, where it says the class of the mark although the digit is another.

    And where the mark decided: painted over, the network says something else.
    """
    model = tasks.Convolutional()
    test = tasks.marked_digits(tests, 1, training=False)
    task = tasks.marked_digits(size, 0, agreeing=agreeing, unmarked=unmarked)
    file = _file(keep, f"shortcut-{agreeing}-{unmarked}")
    variables = _trained(model, model.apply, task, steps, file)
    classify = jax.jit(model.apply)
    scores = np.asarray(classify(variables, test.x))
    said = scores.argmax(-1)
    painted = np.where(test.evidence[..., None], np.float32(0.15), test.x)
    without = np.asarray(classify(variables, painted))
    decided = without.argmax(-1) != said
    print(f"without its mark, {100 * decided.mean():.1f} % get another class")
    of_said = np.arange(tests), said
    left = [(s - s.mean(-1, keepdims=True))[of_said] for s in (scores, without)]
    print("contrast, and without the mark:", *(f"{c.mean():.2f}" for c in left))
    print(f"at most {(left[1] / left[0]).max():.2f} of it is left, in any image")
    right = (said == test.labels) & decided
    return Case(
        lambda params, x: model.apply(params[0], x),
        (variables, ()),
        jnp.asarray(test.x[right]),
        jax.nn.one_hot(said[right], 10),
        test.evidence[right],
        ("auto", "epsilon", "epsilon_alpha2_beta1"),
        metrics.patches(test.x.shape[1:], tasks.MARK),
        (said == test.labels).mean(),
        metrics.patches(test.evidence.shape[1:], tasks.MARK, channel_axis=None),
    )


def copying(keep=None, steps=1000, size=12000, tests=100):
    """The state-space model, explained at each of its answers by itself."""
    model, test = tasks.Selective(), tasks.copying(tests, 1)

    def say(variables, ids):
        return model.apply(variables, ids, method=_from_ids())

    task = tasks.copying(size, 0)
    variables = _trained(model, say, task, steps, _file(keep, "copying"))
    said = np.asarray(jax.jit(say)(variables, test.x)).argmax(-1)
    row, which = np.nonzero(said == test.labels)
    x = model.apply(variables, test.x[row], method="embed")
    target = np.zeros((len(row), tasks.TOLD, tasks.LETTERS), np.float32)
    target[np.arange(len(row)), which, said[row, which]] = 1
    return Case(
        lambda params, x: model.apply(params[0], x),
        (variables, ()),
        x,
        jnp.asarray(target),
        test.evidence[row, which],
        ("mamba_lrp", "auto", "cp_lrp"),
        metrics.tokens(x.shape[1:]),
        (said == test.labels).mean(),
    )


def _from_ids(others=lambda ids: []):
    return lambda model, ids: model(model.embed(ids), *others(ids))


def _file(keep, name):
    return None if keep is None else keep / f"{name}.npz"


def _trained(model, apply, task, steps, file):
    """The trained variables, from the file if it is there, and kept in it."""
    if task.x.dtype == np.int32:
        method = _from_ids(lambda ids: [ids > 0] * isinstance(model, tasks.Reader))
        variables = model.init(jax.random.key(0), task.x[:1], method=method)
    else:
        variables = model.init(jax.random.key(0), task.x[:1])
    leaves, tree = jax.tree.flatten(variables)
    if file is not None and file.exists():
        with np.load(file) as kept:
            return jax.tree.unflatten(tree, [jnp.asarray(kept[n]) for n in kept.files])
    start = time.perf_counter()
    variables = tasks.train(apply, variables, task, steps)
    seconds = time.perf_counter() - start
    print(f"{type(model).__name__}: {steps} steps in {seconds:.0f} s", flush=True)
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        names = [f"{i:03}" for i in range(len(leaves))]
        np.savez(file, **dict(zip(names, jax.tree.leaves(variables), strict=True)))
    return variables


def wilson(hits):
    """A share of successes and its interval (Wilson 1927)."""
    n, z = len(hits), 1.959964
    p = float(np.mean(hits))
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return p, max(0.0, middle - half), min(1.0, middle + half)


def report(name, case):
    """Print how often each method finds the evidence; the shares by method."""
    right, chance = len(case.x), case.evidence.reshape(len(case.x), -1).mean()
    print(
        f"\n{name}: {100 * case.accuracy:.1f} % right, {right} of them explained, "
        f"{100 * chance:.1f} % of the places hold evidence\n"
    )
    columns = ["the score", "the contrast", "the contrast, share in the evidence"]
    if case.windows is not None:
        columns.append("the contrast, of windows")
    print(f"| most relevant in the evidence, of | {' | '.join(columns)} |")
    print("|---" * (1 + len(columns)) + "|")
    shares = {}
    both = zip(
        case.attributions(case.target), case.attributions(case.contrast), strict=True
    )
    for (method, of_score), (_, of_contrast) in both:
        mass = np.asarray(metrics.relevance_mass(of_contrast, case.evidence))
        found = [_hits(of_score, case.evidence), _hits(of_contrast, case.evidence)]
        cells = [*map(_share, found), f"{100 * np.nanmean(mass):.0f} %"]
        if case.windows is not None:
            pooled = metrics.pool(of_contrast, case.windows)
            inside = np.asarray(metrics.pool(case.evidence * 1.0, case.windows)) > 0
            cells.append(_share(_hits(pooled, inside)))
        shares[method] = float(found[1].mean())
        print(f"| {method} | {' | '.join(cells)} |", flush=True)
    return shares


def _hits(places, evidence):
    return np.asarray(metrics.top_k_accuracy(places, evidence))


def _share(hits):
    p, low, high = wilson(hits)
    return f"{100 * p:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"


def sanity(reader, cnn, count=32):
    """Similarity of relevance, layer by layer randomised; by network and method."""
    lengths = np.asarray(reader.params[1].sum(1))
    longest = np.argsort(-lengths, kind="stable")[:count]  # padding is always alike
    words = reader.params[1][longest]

    def read(variables, x):
        return reader.fn((variables, words), x)

    def classify(variables, x):
        return cnn.fn((variables, ()), x)

    found = {}
    for name, composites, fn, params, x, target in (
        (
            "transformer",
            ("auto", "cp_lrp", "gradient_input"),
            read,
            reader.params[0],
            reader.x[longest],
            reader.contrast[longest],
        ),
        (
            "CNN",
            ("auto", "epsilon", "epsilon_alpha2_beta1"),
            classify,
            cnn.params[0],
            cnn.x[:count],
            cnn.contrast[:count],
        ),
    ):
        for composite in composites:
            explain = _Summed(composite)
            found[f"{name}, {composite}"] = metrics.randomisation(
                explain, fn, params, x, target
            )
    print("\nsanity: rank correlation with the relevance of the trained network\n")
    print("| network, composite | top layer randomised | half | all |")
    print("|---|---|---|---|")
    for name, checked in found.items():
        rows = [0, (len(checked.layers) - 1) // 2, len(checked.layers) - 1]
        cells = [metrics.interval(checked.similarity[:, i]) for i in rows]
        print(f"| {name} | {' | '.join(map(str, cells))} |")
    return found


@dataclass(frozen=True)
class _Summed:
    """Relevance of each token or pixel."""

    composite: str

    def __call__(self, fn, params, x, target):
        return jlrp.relevance(fn, params, x, target, composite=self.composite).sum(-1)


def draw_questions(case, ids, folder):
    """One passage in colours, the heads that read it, and the flow between blocks."""
    one = case.some(1)
    words = [tasks.VOCABULARY[i] for i in ids[0] if i]
    for name in ("auto", "gradient_input"):
        r = jlrp.relevance(one.fn, one.params, one.x, one.contrast, composite=name)
        strip = plotting.tokens(words, r[0, : len(words)].sum(-1), title=name)
        strip.save(folder / f"known-questions-{name}.png")
    explain = jlrp.explain(case.fn, composite="auto", capture="*/heads")
    heads = explain(case.params, case.x, case.contrast).captured
    mean = {name: np.asarray(r) / len(case.x) for name, r in heads.items()}
    plotting.heads(mean, title="heads of the reader, mean over the passages").save(
        folder / "heads.png"
    )
    some = case.some(64)
    edges = flow.between(
        some.fn,
        some.params,
        some.x,
        ("*/attention", "*/mlp"),
        some.contrast,
        composite="auto",
    )
    edges = {pair: amount / len(some.x) for pair, amount in edges.items()}
    plotting.flow(edges, title="relevance between the reader's blocks").save(
        folder / "flow.png"
    )


def draw_shortcut(case, folder, count=4):
    some = case.some(count)
    rows = {f"image {i + 1}": {} for i in range(count)}
    for name, places in some.attributions(some.contrast):
        if name != "random":
            for row, one in zip(rows.values(), places, strict=True):
                row[name.replace("`", "")] = one
    images = {row: x[..., 0] for row, x in zip(rows, np.asarray(some.x), strict=True)}
    plotting.comparison(rows, images, channel_axis=None).save(
        folder / "known-shortcut.png"
    )


PARTS = ("questions", "shortcut", "copying", "sanity")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="all, if none")
    parser.add_argument("--images", type=Path, default=IMAGES, help="where to draw")
    parser.add_argument("--weights", type=Path, help="a folder to keep trained ones in")
    parser.add_argument("--strict", action="store_true", help="below a bar is an error")
    args = parser.parse_args()
    parts = args.parts or PARTS
    print(machine())
    found, reader, cnn = {}, None, None
    if {"questions", "sanity"} & set(parts):
        reader, ids = questions(args.weights)
    if {"shortcut", "sanity"} & set(parts):
        cnn = shortcut(args.weights)
    if "questions" in parts:
        found["questions"] = report("questions", reader)
        draw_questions(reader, ids, args.images)
    if "shortcut" in parts:
        found["shortcut"] = report("shortcut", cnn)
        draw_shortcut(cnn, args.images)
    if "copying" in parts:
        found["copying"] = report("copying", copying(args.weights))
    if "sanity" in parts:
        checked = sanity(reader, cnn)
        plotting.randomisation(checked).save(args.images / "known-sanity.png")
    below = [
        part
        for part, bar in BARS.items()
        if part in found and found[part]["jlrp `auto`"] < bar
    ]
    print(f"\nbelow their bars: {', '.join(below) or 'none'}")
    return int(args.strict and bool(below))


if __name__ == "__main__":
    raise SystemExit(main())
