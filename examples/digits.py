"""Train a small CNN on scikit-learn's digits, then explain what it saw.

Prints the test accuracy, the rule of every operation, the conservation ledger and how
much relevance lies on blank paper: none. Draws ten test digits with the relevance of
their pixels.
"""

import argparse

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import jlrp


class CNN(nn.Module):
    @nn.compact
    def __call__(self, images):  # (batch, 8, 8, 1) -> (batch, 10)
        h = nn.relu(nn.Conv(16, (3, 3))(images))
        h = nn.relu(nn.Conv(32, (3, 3))(h))
        h = nn.max_pool(h, (2, 2), strides=(2, 2))
        h = nn.relu(nn.Dense(64)(h.reshape(h.shape[0], -1)))
        return nn.Dense(10)(h)


def load():
    """Digits of 8 x 8 pixels between 0 (paper) and 1 (ink): training and test set."""
    digits = load_digits()
    images = (digits.images[..., None] / 16).astype(np.float32)
    return train_test_split(images, digits.target, test_size=0.25, random_state=0)


def train(model, images, labels, steps, batch=128):
    optimizer = optax.adamw(2e-3)
    params = model.init(jax.random.key(0), images[:1])

    def loss(params, images, labels):
        scores = model.apply(params, images)
        return optax.softmax_cross_entropy_with_integer_labels(scores, labels).mean()

    @jax.jit
    def step(params, state, images, labels):
        updates, state = optimizer.update(
            jax.grad(loss)(params, images, labels), state, params
        )
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    rng = np.random.default_rng(0)
    for _ in range(steps):
        pick = rng.integers(len(images), size=batch)
        params, state = step(params, state, images[pick], labels[pick])
    return params


def draw(images, relevance, predicted, labels, path):
    """Ten digits, and below each the relevance of its pixels."""
    figure, axes = plt.subplots(4, 5, figsize=(10, 8.8), layout="constrained")
    figure.suptitle("red pixels spoke for the predicted digit, blue ones against it")
    for i in range(10):
        top, bottom = axes[i // 5 * 2 : i // 5 * 2 + 2, i % 5]
        right = predicted[i] == labels[i]
        top.set_title(
            f"predicted {predicted[i]}, true {labels[i]}",
            color="black" if right else "red",
        )
        top.imshow(images[i, ..., 0], cmap="gray_r", vmin=0, vmax=1)
        share = relevance[i, ..., 0] / np.abs(relevance[i]).max()
        colours = bottom.imshow(share, cmap="RdBu_r", vmin=-1, vmax=1)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    figure.colorbar(
        colours, ax=axes, shrink=0.5, label="relevance (share of each digit's largest)"
    )
    figure.savefig(path, dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=300, help="steps of training")
    parser.add_argument("--output", default="digits_relevance.png", help="the picture")
    args = parser.parse_args()

    images, test_images, labels, test_labels = load()
    model = CNN()
    params = train(model, images, labels, args.steps)
    predicted = model.apply(params, test_images).argmax(-1)
    print(f"test accuracy: {100 * np.mean(predicted == test_labels):.2f} %\n")

    # One test digit of each class, and the evidence for what the network said it is.
    chosen = np.array([np.flatnonzero(test_labels == c)[0] for c in range(10)])
    x = jnp.asarray(test_images[chosen])
    relevance = jlrp.relevance(model.apply, params, x)

    print(jlrp.inspect(model.apply, params, x), end="\n\n")
    print(jlrp.audit(model.apply, params, x), end="\n\n")

    paper = np.asarray(x == 0)
    on_paper = np.abs(relevance)[paper].sum() / np.abs(relevance).sum()
    print(f"relevance on blank paper, of all: {100 * on_paper:.2f} %")
    print(f"paper is, of all pixels: {paper.mean():.2f}\n")

    draw(x, relevance, predicted[chosen], test_labels[chosen], args.output)
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
