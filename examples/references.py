"""One digit, relative to four references: what is an absent pixel?

Trains the CNN of ``digits.py`` and explains one test digit from 0, from its mean, from
a blur of it, and from digits of the training set; draws the references and the
relevance. Prints for each that relevance sums to the change of the score, and how much
of it lies on paper, where the digit has no ink.
"""

import argparse

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from digits import CNN, load, train

import jlrp
from jlrp import metrics


def references(rows):
    """By name: what stands for absent, and an image of it for the picture."""
    return {
        "0: all paper": (0.0, jnp.zeros_like),
        "the mean of the digit": (metrics.Mean((1, 2)), metrics.Mean((1, 2))),
        "a blur of the digit": (metrics.Blur(5, 2.0), metrics.Blur(5, 2.0)),
        f"{len(rows)} other digits": (
            jlrp.Background(rows),
            lambda x: jnp.broadcast_to(rows.mean(0), x.shape),
        ),
    }


def change(score, params, x, baseline):
    """By how much the score is more at x than at the reference, in the mean."""
    if isinstance(baseline, jlrp.Background):
        return score(params, x)[0] - score(params, baseline.data).mean()
    absent = baseline(x) if callable(baseline) else jnp.full_like(x, baseline)
    return (score(params, x) - score(params, absent))[0]


def draw(x, shown, relevance, titles, path):
    """The digit, then a column for each reference: it, and the relevance from it."""
    count = len(shown)
    figure, axes = plt.subplots(
        2, count + 1, figsize=(2.5 * (count + 1), 5.6), layout="constrained"
    )
    largest = max(float(abs(r).max()) for r in relevance)
    for axis, image, title in zip(axes[0], [x, *shown], titles, strict=True):
        axis.imshow(image[0, ..., 0], cmap="gray_r", vmin=0, vmax=1)
        axis.set_title(title, fontsize=10)
    for axis, found in zip(axes[1, 1:], relevance, strict=True):
        colours = axis.imshow(
            found[0, ..., 0], cmap="RdBu_r", vmin=-largest, vmax=largest
        )
        axis.set_title(f"sums to {float(found.sum()):.1f}", fontsize=10)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    axes[1, 0].axis("off")
    text = "relevance\nfrom each\nreference"
    axes[1, 0].text(0.5, 0.5, text, ha="center", va="center", fontsize=11)
    figure.colorbar(colours, ax=axes[1], shrink=0.8, label="relevance")
    figure.savefig(path, dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=300, help="steps of training")
    parser.add_argument("--rows", type=int, default=100, help="of the background")
    parser.add_argument("--digit", type=int, default=4, help="the class of the digit")
    parser.add_argument("--output", default="references.png", help="the picture")
    args = parser.parse_args()

    images, test_images, labels, test_labels = load()
    model = CNN()
    params = train(model, images, labels, args.steps)
    predicted = np.asarray(model.apply(params, test_images).argmax(-1))
    right = (predicted == test_labels) & (test_labels == args.digit)
    x = jnp.asarray(test_images[np.flatnonzero(right)[:1]])
    paper = np.asarray(x == 0)

    def score(params, x):
        return model.apply(params, x)[:, args.digit]

    shown, relevance = [], []
    every = references(jnp.asarray(images[: args.rows]))
    for name, (baseline, image) in every.items():
        found = jlrp.relevance(
            model.apply, params, x, target=args.digit, baseline=baseline
        )
        on_paper = jnp.abs(found)[paper].sum() / jnp.abs(found).sum()
        print(
            f"{name}: change of the score {change(score, params, x, baseline):.4f}, "
            f"relevance {found.sum():.4f}, on paper {100 * on_paper:.1f} %"
        )
        shown.append(image(x))
        relevance.append(found)
    titles = [f"a {args.digit}", *every]
    draw(x, shown, jax.device_get(relevance), titles, args.output)
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
