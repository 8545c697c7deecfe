"""CLRP: what speaks for one class and not for the others (Gu et al. 2018).

Two digits stand side by side, and a small CNN says which ones are there. Relevance by
the z+ rule lights up both, whichever of them is asked for. Its contrast with the
relevance of all other classes, the dual, is about the class in question alone:
`max(0, R / |sum R| - R_dual / |sum R_dual|)`.

Prints how much of the relevance lies on the digit that was asked for, and draws some.
"""

import argparse

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from sklearn.datasets import load_digits

import jlrp

COMPOSITE = "excitation_backprop"  # the z+ rule in every layer


class CNN(nn.Module):
    @nn.compact
    def __call__(self, images):  # (batch, 8, 16, 1) -> (batch, 10), independent scores
        h = nn.relu(nn.Conv(16, (3, 3))(images))
        h = nn.relu(nn.Conv(32, (3, 3))(h))
        h = nn.max_pool(h, (2, 2), (2, 2))
        h = nn.relu(nn.Conv(64, (3, 3))(h))
        return nn.Dense(10)(h.reshape(h.shape[0], -1))


def pairs(images, labels, size, seed):
    """Pairs of different digits side by side, and the labels of both."""
    rng = np.random.default_rng(seed)
    left, right = rng.integers(len(images), size=(2, 2 * size))
    different = np.flatnonzero(labels[left] != labels[right])[:size]
    left, right = left[different], right[different]
    both = np.concatenate([images[left], images[right]], 2)
    return both, np.stack([labels[left], labels[right]], 1)


def train(model, images, labels, steps):
    optimizer = optax.adamw(2e-3)
    params = model.init(jax.random.key(0), images[:1])
    present = jax.nn.one_hot(labels, 10).sum(1)

    def loss(params, images, present):
        scores = model.apply(params, images)
        return optax.sigmoid_binary_cross_entropy(scores, present).mean()

    @jax.jit
    def step(params, state, images, present):
        gradient = jax.grad(loss)(params, images, present)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    state, rng = optimizer.init(params), np.random.default_rng(0)
    for _ in range(steps):
        pick = rng.integers(len(images), size=128)
        params, state = step(params, state, images[pick], present[pick])
    return params


def clrp(fn, params, x, labels):
    """Relevance of a class, and its contrast with that of all the others."""
    chosen = jax.nn.one_hot(labels, 10)

    def normalised(target):
        # seed="one": every class that is asked for starts with the same relevance.
        r = jlrp.relevance(
            fn, params, x, target=target, composite=COMPOSITE, seed="one"
        )
        return r / jnp.abs(r.sum((1, 2, 3), keepdims=True))

    relevance, dual = jax.vmap(normalised)(jnp.stack([chosen, 1 - chosen]))
    return relevance, jnp.maximum(relevance - dual, 0)


def on_the_right_digit(relevance, side):
    """The share of positive relevance on the half of the image that was asked for."""
    halves = np.maximum(relevance, 0).reshape(len(relevance), 8, 2, 8).sum((1, 3))
    return halves[np.arange(len(halves)), side] / halves.sum(1)


def draw(images, labels, found, path):
    """Each image, then relevance and contrast for the left and for the right digit."""
    figure, rows = plt.subplots(
        len(images), 5, figsize=(12, 1.5 * len(images) + 0.9), layout="constrained"
    )
    figure.suptitle("red pixels spoke for the digit that was asked for")
    for row, axes in enumerate(rows):
        axes[0].imshow(images[row, ..., 0], cmap="gray_r", vmin=0, vmax=1)
        axes[0].set_ylabel(f"{labels[row, 0]} and {labels[row, 1]}")
        for side in (0, 1):
            for index, name in enumerate(("LRP", "CLRP")):
                axis, r = axes[1 + 2 * side + index], found[side][index][row, ..., 0]
                share = r / np.abs(r).max()
                axis.imshow(share, cmap="RdBu_r", vmin=-1, vmax=1)
                axis.set_title(f"{name} for {labels[row, side]}", fontsize=10)
    for axis in rows.flat:
        axis.set(xticks=[], yticks=[])
    figure.savefig(path, dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=400, help="steps of training")
    parser.add_argument("--output", default="clrp.png", help="the picture")
    args = parser.parse_args()

    digits = load_digits()
    images = (digits.images[..., None] / 16).astype(np.float32)
    model = CNN()
    x, labels = pairs(images[:1400], digits.target[:1400], 8000, seed=0)
    params = train(model, x, labels, args.steps)
    x, labels = pairs(images[1400:], digits.target[1400:], 400, seed=1)
    scores = np.asarray(model.apply(params, x))
    right = (np.sort(scores.argsort(-1)[:, -2:]) == np.sort(labels)).all(-1)
    print(f"both digits right: {100 * right.mean():.2f} % of test images")

    x, labels = jnp.asarray(x[right]), labels[right]
    found = [clrp(model.apply, params, x, labels[:, side]) for side in (0, 1)]
    print("relevance on the digit that was asked for, of all positive relevance:")
    for index, name in enumerate(("LRP", "CLRP")):
        shares = [on_the_right_digit(found[side][index], side) for side in (0, 1)]
        print(f"  {name:5} {100 * np.mean(shares):6.2f} %")
    draw(x[:4], labels, found, args.output)
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
