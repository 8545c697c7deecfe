"""Train a small transformer on sentences, then explain which words decided.

The sentences are made here: somebody asks for something at home, among remarks that
decide nothing. Two words decide the class, the thing and what is to become of it; both
have synonyms. So it is known for every sentence which words decided, and an explanation
can be marked: it is right if exactly these words have the largest relevance, in size.
Integer token ids go in, one number for each token comes out.

Prints the share of sentences that are explained rightly, and some of them in colour;
draws these as a picture and as a page of HTML.
"""

import argparse
import html
from math import comb
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from matplotlib.colors import to_hex
from matplotlib.patches import Rectangle

import jlrp

LENGTH = 32
COMPOSITES = {"AttnLRP": "attnlrp", "gradient x input": "gradient_input"}
THINGS = {
    "light": "light lamp bulb lantern".split(),
    "heating": "heating radiator stove fire".split(),
    "music": "music radio song piano".split(),
    "blinds": "blinds curtain shutter awning".split(),
}
CHANGES = {
    "more": "up higher further more".split(),
    "less": "down lower less".split(),
    "off": "off out away".split(),
}
CLASSES = [f"{thing} {change}" for thing in THINGS for change in CHANGES]
REQUESTS = (
    "please turn the {thing} in the {room} {change}",
    "could you put that {thing} {change} for us",
    "i want the {thing} {change} before {day}",
    "{change} with the {thing} in my {room}",
    "when you see the {thing} turn it {change}",
)
REMARKS = (
    "we come home on {day}",
    "my {person} is in the {room} with us",
    "it was raining in {place}",
    "the train from {place} is full on {day}",
    "we have not seen {place} before",
    "my {person} was asleep in the {room}",
    "you know that my {person} called from {place}",
)
WORDS = {
    "day": "monday tuesday friday sunday tomorrow".split(),
    "person": "sister brother neighbour teacher aunt cousin".split(),
    "place": "london paris rome vienna lisbon".split(),
    "room": "kitchen bedroom hall garden office".split(),
}


def sentence(rng):
    """The words of a sentence, which of them decide (a mask), and its class."""
    thing, change = rng.choice(list(THINGS)), rng.choice(list(CHANGES))
    deciding = {
        "thing": rng.choice(THINGS[thing]),
        "change": rng.choice(CHANGES[change]),
    }
    clauses = [_filled(rng, rng.choice(REQUESTS), **deciding)]
    clauses += [_filled(rng, remark) for remark in rng.choice(REMARKS, 2, False)]
    order = rng.permutation(len(clauses))
    words = " and ".join(clauses[index] for index in order).split()
    mask = [word in deciding.values() for word in words]
    return words, mask, CLASSES.index(f"{thing} {change}")


def _filled(rng, template, **deciding):
    others = {name: rng.choice(words) for name, words in WORDS.items()}
    return template.format(**others, **deciding)


def vocabulary():
    templates = " and ".join(REQUESTS + REMARKS).split()
    words = {word for word in templates if "{" not in word}
    groups = (WORDS, THINGS, CHANGES)
    words = words.union(*(word for group in groups for word in group.values()))
    return {word: index for index, word in enumerate(["", *sorted(words)])}  # 0: none


def dataset(size, seed):
    """Sentences, their ids and decisive words (size, LENGTH), and their classes."""
    rng, ids_of = np.random.default_rng(seed), vocabulary()
    sentences, labels = [], np.zeros(size, np.int32)
    ids = np.zeros((size, LENGTH), np.int32)
    decisive = np.zeros((size, LENGTH), bool)
    for row in range(size):
        words, mask, labels[row] = sentence(rng)
        sentences.append(words)
        ids[row, : len(words)] = [ids_of[word] for word in words]
        decisive[row, : len(words)] = mask
    return sentences, ids, decisive, labels


class Transformer(nn.Module):
    words: int
    features: int = 64

    @nn.compact
    def __call__(self, ids):  # (batch, LENGTH) -> (batch, classes)
        here = ids > 0
        mask = nn.make_attention_mask(here, here)
        h = nn.Embed(self.words, self.features)(ids)
        normal = nn.initializers.normal(0.1)
        h = h + self.param("positions", normal, (LENGTH, self.features))
        for _ in range(2):
            h = h + nn.MultiHeadDotProductAttention(4)(nn.LayerNorm()(h), mask=mask)
            wide = nn.gelu(nn.Dense(4 * self.features)(nn.LayerNorm()(h)))
            h = h + nn.Dense(self.features)(wide)
        counted = here[..., None] / here.sum(-1)[:, None, None]
        return nn.Dense(len(CLASSES))((nn.LayerNorm()(h) * counted).sum(1))


def train(model, ids, labels, steps, batch=64):
    schedule = optax.warmup_cosine_decay_schedule(0.0, 2e-3, steps // 10, steps)
    optimizer = optax.adamw(schedule)
    params = model.init(jax.random.key(0), ids[:1])

    def loss(params, ids, labels):
        scores = model.apply(params, ids)
        return optax.softmax_cross_entropy_with_integer_labels(scores, labels).mean()

    @jax.jit
    def step(params, state, ids, labels):
        gradient = jax.grad(loss)(params, ids, labels)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    rng = np.random.default_rng(0)
    for _ in range(steps):
        pick = rng.integers(len(ids), size=batch)
        params, state = step(params, state, ids[pick], labels[pick])
    return params


def found(relevance, decisive):
    """Whether exactly the decisive words have the largest relevance, in size."""
    size = np.abs(relevance)
    least = np.where(decisive, size, np.inf).min(-1)
    return least > np.where(decisive, -1, size).max(-1)


def colours(relevance):
    """Zero is white; red spoke for the prediction, blue against it."""
    share = relevance / np.abs(relevance).max()
    return plt.get_cmap("RdBu_r")(0.5 + share / 2)[:, :3]


def ink(colour):
    return "black" if np.dot(colour, (0.299, 0.587, 0.114)) > 0.5 else "white"


def print_strip(words, decisive, relevance):
    """The words of a sentence on their colours; the decisive ones underlined."""
    parts = []
    for word, mark, colour in zip(words, decisive, colours(relevance), strict=True):
        r, g, b = (255 * colour).astype(int)
        front = 30 if ink(colour) == "black" else 97
        line = "\x1b[4m" if mark else ""
        parts.append(f"\x1b[48;2;{r};{g};{b};{front}m {line}{word}\x1b[24m \x1b[0m")
    print("".join(parts))


def draw(rows, path):
    """Each sentence twice: as AttnLRP and as gradient x input explain it."""
    width = max(sum(len(word) + 2 for word in row["words"]) for row in rows)
    height = 3.6 * len(rows)
    figure, axes = plt.subplots(figsize=(0.088 * width + 1.4, 0.26 * height + 0.8))
    figure.subplots_adjust(0.01, 0.01, 0.99, 1 - 0.6 / figure.get_figheight())
    axes.set(xlim=(-15, width + 1), ylim=(height, 0))
    axes.axis("off")
    for index, row in enumerate(rows):
        top = 3.6 * index + 0.2
        axes.text(0, top + 0.45, row["title"], va="center", weight="bold", size=9)
        for line, name in enumerate(COMPOSITES):
            y = top + 1 + 1.05 * line
            axes.text(-0.7, y + 0.5, name, ha="right", va="center", size=8.5)
            left = 0
            for word, mark, colour in zip(
                row["words"], row["decisive"], colours(row[name]), strict=True
            ):
                box = Rectangle((left, y), len(word) + 2, 1, color=colour, lw=0)
                axes.add_patch(box)
                axes.text(
                    left + len(word) / 2 + 1,
                    y + 0.47,
                    word,
                    ha="center",
                    va="center",
                    family="monospace",
                    size=9,
                    color=ink(colour),
                )
                if mark:
                    ends = (left + 1, left + len(word) + 1)
                    axes.plot(ends, (y + 0.87,) * 2, color=ink(colour), lw=1.2)
                left += len(word) + 2
            frame = Rectangle((0, y), left, 1, fill=False, color="0.7", lw=0.6)
            axes.add_patch(frame)
    figure.suptitle(
        "Which words decided?  Red words spoke for the prediction, blue ones against "
        "it.\nUnderlined: the words that really decide.  Colours: share of each "
        "strip's largest relevance.",
        size=10,
        y=1 - 0.1 / figure.get_figheight(),
    )
    figure.savefig(path, dpi=130)
    plt.close(figure)


def write_html(rows, path):
    """The sentences as AttnLRP explains them; hovering over a word shows its number."""
    lines = [
        "<!doctype html><meta charset=utf-8><title>Which words decided?</title>",
        "<style>body{font:16px/2 sans-serif;max-width:60em;margin:2em auto}",
        "span{padding:.2em .3em}h2{font-size:1em;margin:1em 0 0}</style>",
        "<h1>Which words decided?</h1><p>Red words spoke for the prediction, blue ones "
        "against it; the words that really decide are underlined.</p>",
    ]
    for row in rows:
        lines.append(f"<h2>{html.escape(row['title'])}</h2><p>")
        for word, mark, number, colour in zip(
            row["words"],
            row["decisive"],
            row["AttnLRP"],
            colours(row["AttnLRP"]),
            strict=True,
        ):
            style = f"background:{to_hex(colour)};color:{ink(colour)}"
            text = f"<u>{html.escape(word)}</u>" if mark else html.escape(word)
            lines.append(f'<span style="{style}" title="{number:+.3f}">{text}</span>')
        lines.append("</p>")
    Path(path).write_text("\n".join(lines), encoding="utf-8")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--steps", type=int, default=600, help="steps of training")
    add("--tests", type=int, default=2000, help="sentences to test and explain")
    add("--output", default="text_relevance.png", help="the picture; .html beside it")
    args = parser.parse_args()

    _, ids, _, labels = dataset(8000, seed=0)
    sentences, test_ids, decisive, test_labels = dataset(args.tests, seed=1)
    model = Transformer(len(vocabulary()))
    params = train(model, ids, labels, args.steps)
    predicted = np.asarray(jax.jit(model.apply)(params, test_ids).argmax(-1))
    right = predicted == test_labels
    print(f"test accuracy: {100 * right.mean():.2f} %\n")

    x = jnp.asarray(test_ids)
    relevance = {
        name: np.asarray(jlrp.relevance(model.apply, params, x, composite=composite))
        for name, composite in COMPOSITES.items()
    }
    order = [1 / comb(len(words), 2) for words in sentences]
    marks = {name: found(r, decisive) for name, r in relevance.items()}
    marks["a random order"] = np.array(order)
    print(
        f"of {right.sum()} sentences classified correctly, the two deciding words have"
    )
    print("the largest relevance in")
    for name, mark in marks.items():
        print(f"  {name:17} {100 * mark[right].mean():6.2f} %")

    rows = []
    for i in range(8):
        words = sentences[i]
        row = {name: r[i, : len(words)] for name, r in relevance.items()}
        truth = "" if right[i] else f" (wrong: it is {CLASSES[test_labels[i]]})"
        row["title"] = f"predicted {CLASSES[predicted[i]]}{truth}"
        row.update(words=words, decisive=decisive[i, : len(words)])
        rows.append(row)
        print(f"\n{row['title']}")
        print_strip(words, row["decisive"], row["AttnLRP"])

    page = Path(args.output).with_suffix(".html")
    draw(rows, args.output)
    write_html(rows, page)
    print(f"\nwrote {args.output} and {page}")


if __name__ == "__main__":
    main()
