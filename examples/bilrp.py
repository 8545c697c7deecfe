"""BiLRP: which pixels of two digits, taken together, make the two look alike.

The similarity of two images is the inner product of their embeddings. Relevance of one
image pair of pixels (i, j) is `sum_m R_i(m, a) R_j(m, b)`, where `R(m, a)` is the
relevance of coordinate m of the embedding of image a (Eberle et al. 2020, BiLRP). All
coordinates are explained in one call, by `jax.vmap` over targets: the forward pass does
not depend on the target, so it runs once.

Prints how much of each similarity arrived at pairs of pixels and what absorbed the
rest, and draws the strongest pairs.
"""

import argparse
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from matplotlib.patches import ConnectionPatch
from sklearn.datasets import load_digits

import jlrp

COMPOSITE = jlrp.Composite([("conv", jlrp.rules.Gamma(0.25))], base="epsilon")
PAIRS = ((3, 3), (0, 0), (3, 8))  # digits to compare


class Network(nn.Module):
    def setup(self):
        self.layers = [nn.Conv(16, (3, 3)), nn.Conv(32, (3, 3)), nn.Dense(32)]
        self.head = nn.Dense(10)

    def embed(self, images):  # (batch, 8, 8, 1) -> (batch, 32)
        h = nn.relu(self.layers[0](images))
        h = nn.max_pool(nn.relu(self.layers[1](h)), (2, 2), (2, 2))
        return nn.relu(self.layers[2](h.reshape(h.shape[0], -1)))

    def __call__(self, images):
        return self.head(self.embed(images))


def train(model, images, labels, steps):
    optimizer = optax.adamw(2e-3)
    params = model.init(jax.random.key(0), images[:1])

    def loss(params, images, labels):
        scores = model.apply(params, images)
        return optax.softmax_cross_entropy_with_integer_labels(scores, labels).mean()

    @jax.jit
    def step(params, state, images, labels):
        gradient = jax.grad(loss)(params, images, labels)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    state, rng = optimizer.init(params), np.random.default_rng(0)
    for _ in range(steps):
        pick = rng.integers(len(images), size=128)
        params, state = step(params, state, images[pick], labels[pick])
    return params


@partial(jax.jit, static_argnums=0)
def of_coordinates(embed, params, image):
    """The relevance of each coordinate of an embedding: (coordinates, *image)."""
    x = image[None]
    targets = jnp.eye(jax.eval_shape(embed, params, x).shape[-1])

    def of_one(target):
        return jlrp.relevance(
            embed, params, x, target=target[None], composite=COMPOSITE
        )

    return jax.vmap(of_one)(targets)[:, 0]


def bilrp(embed, params, a, b):
    """Relevance of every pair of elements of two images: (a.size, b.size)."""
    of_a, of_b = (of_coordinates(embed, params, image) for image in (a, b))
    of_a, of_b = (r.reshape(len(r), -1) for r in (of_a, of_b))
    return of_a.T @ of_b


def check(embed, params, a, b):
    """Print where the similarity went: the two halves of BiLRP, each with its ledger.

    The first half takes the similarity, as a function of the embedding of a alone, to
    the pixels of a; what arrives there is what the second half takes to those of b.
    """
    kept = of_coordinates(embed, params, a).sum((1, 2, 3))[None]
    audit = partial(jlrp.audit, embed, params, composite=COMPOSITE)
    first = audit(a[None], target=embed(params, b[None]))
    second = audit(b[None], target=kept)
    similarity, arrived = first.seed, bilrp(embed, params, a, b).sum()
    rows = (*first.rows, *second.rows)
    absorbed = {
        cause: first.total(cause) + second.total(cause)
        for cause in sorted({cause for row in rows for cause in row.causes})
    }
    print(f"  similarity {similarity:10.4f}")
    print(f"  pixel pairs {arrived:9.4f}")
    for name, amount in absorbed.items():
        if amount:
            print(f"  {name:11} {amount:9.4f}")
    rest = similarity - arrived - sum(absorbed.values())
    print(f"  unexplained {rest:9.4f}")


def draw(pairs, path):
    """Two images side by side, and lines between the pixels that fit together."""
    figure, rows = plt.subplots(
        len(pairs), 2, figsize=(6.4, 2.9 * len(pairs)), layout="constrained"
    )
    figure.suptitle(
        "which pixels make two digits alike?\nred pairs add to the similarity, blue "
        "ones take from it"
    )
    largest = max(np.abs(pair["relevance"]).max() for pair in pairs)
    for pair, axes in zip(pairs, rows, strict=True):
        relevance = np.asarray(pair["relevance"])
        for axis, image in zip(axes, pair["images"], strict=True):
            axis.imshow(image[..., 0], cmap="gray_r", vmin=0, vmax=1.6)
            axis.set(xticks=[], yticks=[])
        axes[0].set_title(pair["title"], loc="left", fontsize=10)
        strongest = np.argsort(-np.abs(relevance), axis=None)[:40]
        for flat in strongest[::-1]:
            i, j = divmod(int(flat), relevance.shape[1])
            value = relevance[i, j]
            line = ConnectionPatch(
                (i % 8, i // 8),
                (j % 8, j // 8),
                "data",
                "data",
                axesA=axes[0],
                axesB=axes[1],
                color="firebrick" if value > 0 else "royalblue",
                alpha=min(1.0, 0.1 + float(abs(value) / largest)),
                lw=1.5,
            )
            figure.add_artist(line)
    figure.savefig(path, dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=300, help="steps of training")
    parser.add_argument("--output", default="bilrp.png", help="the picture")
    args = parser.parse_args()

    digits = load_digits()
    images = (digits.images[..., None] / 16).astype(np.float32)
    held_out = slice(1500, None)
    model = Network()
    params = train(model, images[:1500], digits.target[:1500], args.steps)
    predicted = model.apply(params, images[held_out]).argmax(-1)
    accuracy = np.mean(predicted == digits.target[held_out])
    print(f"test accuracy: {100 * accuracy:.2f} %")

    embed = partial(model.apply, method="embed")
    pairs = []
    for left, right in PAIRS:
        first = 1500 + np.flatnonzero(digits.target[held_out] == left)[0]
        second = 1500 + np.flatnonzero(digits.target[held_out] == right)[1]
        a, b = jnp.asarray(images[first]), jnp.asarray(images[second])
        print(f"\n{left} and {right}")
        check(embed, params, a, b)
        u, v = embed(params, a[None])[0], embed(params, b[None])[0]
        cosine = u @ v / jnp.linalg.norm(u) / jnp.linalg.norm(v)
        title = f"{left} and {right}: similarity {u @ v:.0f}, cosine {cosine:.2f}"
        relevance = bilrp(embed, params, a, b)
        pairs.append({"relevance": relevance, "images": (a, b), "title": title})
    draw(pairs, args.output)
    print(f"\nwrote {args.output}")


if __name__ == "__main__":
    main()
