"""Tasks whose evidence is known, and small networks to be trained on them.

- ``questions``: a thing that a passage tells is asked for (a transformer);
- ``marked_digits``: digits that bear a mark, which decides the class (a CNN);
- ``copying``: numbers among noise, to be said again in order (a selective SSM).

Each is a function ``(size, seed)`` that draws a ``Task``; each network is a Flax module
on embedded tokens or images. ``train`` is the same for all.
"""

from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import jlrp


@dataclass(frozen=True)
class Task:
    """Examples of a task.

    Attributes:
      x: int32 (size, length) or float32 (size, height, width, 1).
      labels: what is to be said, integers.
      evidence: bool like x without channels: where the answer stands.
    """

    x: np.ndarray
    labels: np.ndarray
    evidence: np.ndarray


# Questions: "what did NAME VERB ?" and four sentences "NAME VERB (adjectives) THING ."

NAMES = "anna boris clara david emma felix greta hugo irina jonas karla leo".split()
VERBS = "bought found broke lost painted sold".split()
LIKE = "red green blue old new small large heavy round broken wooden silver".split()
THINGS = (
    "lamp chair bottle guitar mirror ladder carpet kettle basket candle hammer pillow "
    "bicycle clock drum window"
).split()
VOCABULARY = ["", "?", ".", "|", "what", "did", *NAMES, *VERBS, *LIKE, *THINGS]
IDS = {word: i for i, word in enumerate(VOCABULARY)}
QUESTION, SENTENCES, LONGEST = 6, 4, 3
PASSAGE = QUESTION + SENTENCES * (3 + LONGEST)


def questions(size, seed):
    """Question answering; the evidence is the words that tell the thing.

    Labels (size, 2): where the thing stands, and which of the things it is.

    The other sentences are about other people and tell other things. The verb may be
    the same anywhere: it is the name that is asked for.
    """
    rng = np.random.default_rng(seed)

    def drawn(words, count):  # different ones, for every row
        return np.argsort(rng.random((size, len(words))), 1)[:, :count]

    names, things = drawn(NAMES, SENTENCES), drawn(THINGS, SENTENCES)
    like = np.stack([drawn(LIKE, LONGEST - 1) for _ in range(SENTENCES)], 1)
    counts = rng.integers(0, LONGEST, (size, SENTENCES))
    verbs = rng.integers(0, len(VERBS), (size, SENTENCES))
    order = np.argsort(rng.random((size, SENTENCES)), 1)
    x = np.zeros((size, PASSAGE), np.int32)
    evidence = np.zeros((size, PASSAGE), bool)
    for row in range(size):
        words = ["what", "did", NAMES[names[row, 0]], VERBS[verbs[row, 0]], "?", "|"]
        for fact in order[row]:
            answer = [LIKE[i] for i in like[row, fact, : counts[row, fact]]]
            answer.append(THINGS[things[row, fact]])
            words += NAMES[names[row, fact]], VERBS[verbs[row, fact]]
            if fact == 0:
                evidence[row, len(words) : len(words) + len(answer)] = True
            words += [*answer, "."]
        x[row, : len(words)] = [IDS[word] for word in words]
    last = PASSAGE - 1 - evidence[:, ::-1].argmax(1)
    labels = np.stack([last, things[:, 0]], 1).astype(np.int32)
    return Task(x, labels, evidence)


class Reader(nn.Module):
    """A transformer that says what was asked for, from the words that it points at.

    On embedded tokens (batch, length, features), and which of them are words; returns
    the scores (batch, things). ``points`` returns those of the places as well, for the
    training: the scores (batch, 2, PASSAGE) of places and of things.
    """

    features: int = 64
    heads: int = 4
    layers: int = 3

    def setup(self):
        self.table = nn.Embed(len(VOCABULARY), self.features)
        self.blocks = [
            Block(self.features, self.heads, f"layer_{i}") for i in range(self.layers)
        ]
        self.norm, self.asks = nn.LayerNorm(), nn.Dense(1)
        self.head = nn.Dense(len(THINGS))

    def embed(self, ids):
        return self.table(ids)

    def __call__(self, embedded, words):
        return self._read(embedded, words)[1]

    def points(self, embedded, words):
        places, things = self._read(embedded, words)
        rest = ((0, 0), (0, PASSAGE - len(THINGS)))
        return jnp.stack([places, jnp.pad(things, rest, constant_values=-1e9)], 1)

    def _read(self, embedded, words):
        h = embedded
        mask = nn.make_attention_mask(words, words)
        for block in self.blocks:
            h = block(h, mask)
        h = self.norm(h)
        places = jnp.where(words, self.asks(h)[..., 0], -1e9)
        return places, self.head(jnp.einsum("bt,btf->bf", jax.nn.softmax(places), h))


class Block(nn.Module):
    """Attention and MLP, each behind a norm; what each head found is tagged."""

    features: int
    heads: int
    tag: str

    @nn.compact
    def __call__(self, h, mask):
        shape = (self.heads, self.features // self.heads)
        normed = nn.LayerNorm()(h)
        q, k, v = (nn.DenseGeneral(shape, name=n)(normed) for n in "qkv")
        scores = jnp.einsum("bthk,bshk->bhts", turned(q), turned(k)) / shape[1] ** 0.5
        weights = jax.nn.softmax(jnp.where(mask, scores, -1e9))
        mixed = jnp.einsum("bhts,bshk->bthk", weights, v)
        mixed = jlrp.tag(mixed, f"{self.tag}/heads")
        attended = nn.DenseGeneral(self.features, axis=(-2, -1), name="o")(mixed)
        h = h + jlrp.tag(attended, f"{self.tag}/attention")
        wide = nn.gelu(nn.Dense(4 * self.features)(nn.LayerNorm()(h)))
        return h + jlrp.tag(nn.Dense(self.features)(wide), f"{self.tag}/mlp")


def turned(h):
    """Rotary positions: pairs of features of (batch, length, head, feature) turn."""
    half = h.shape[-1] // 2
    angles = np.arange(h.shape[1])[:, None] / 100 ** (np.arange(half) / half)
    cos, sin = (f(angles)[:, None].astype(np.float32) for f in (np.cos, np.sin))
    a, b = h[..., :half], h[..., half:]
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], -1)


# Digits, each with a mark that decides the class

SIDE, MARK = 32, 4
MARKS = np.random.default_rng(7).permutation(2**12)[:10, None] >> np.arange(12) & 1


def marked_digits(size, seed, training=True, agreeing=0.1, classes=10, unmarked=0.2):
    """Images of a digit and of the mark of a class; labels: the mark's.

    In ``training`` the digit is that of the class in a share of the images,
    ``agreeing``: by chance alone it would be 0.1. A share has no mark, and a label by
    chance: ``unmarked``. In the test the digit is always another one, so that a network
    which says the label has it from the mark.
    """
    rng = np.random.default_rng(seed)
    digits = load_digits()
    rows = np.arange(1200) if training else np.arange(1200, len(digits.images))
    rows = rows[digits.target[rows] < classes]
    x = rng.uniform(0, 0.3, (size, SIDE, SIDE, 1)).astype(np.float32)
    labels, evidence = np.zeros(size, np.int32), np.zeros((size, SIDE, SIDE), bool)
    for i, row in enumerate(rng.choice(rows, size)):
        digit = digits.target[row]
        agrees = training and rng.random() < agreeing
        labels[i] = digit if agrees else (digit + rng.integers(1, classes)) % classes
        top, left = rng.integers(0, 9, 2)  # the digit, 16 x 16, in 24 x 24
        image = np.kron(digits.images[row] / 16, np.ones((2, 2)))
        x[i, 8 + top : 24 + top, left : 16 + left, 0] += image
        down, right = (rng.integers(0, n) for n in (SIDE - MARK, SIDE - MARK))
        while top + 4 < down < top + 24 and left - MARK < right < left + 16:
            down, right = rng.integers(0, SIDE - MARK, 2)
        if training and rng.random() < unmarked:
            labels[i] = rng.integers(classes)
            continue
        mark = np.r_[1, 1, 1, 1, MARKS[labels[i]]].reshape(MARK, MARK)
        place = np.s_[i, down : down + MARK, right : right + MARK]
        x[place] = mark[..., None]
        evidence[place] = True
    return Task(x, labels, evidence)


class Convolutional(nn.Module):
    """Three convolutions with pooling, on images (batch, height, width, 1)."""

    @nn.compact
    def __call__(self, h):
        for features in (16, 32, 64):
            h = nn.relu(nn.Conv(features, (3, 3))(h))
            h = nn.max_pool(h, (2, 2), (2, 2))
        h = nn.relu(nn.Dense(64)(h.reshape(h.shape[0], -1)))
        return nn.Dense(10)(h)


# Selective copying (Gu and Dao 2023, section 4.1.1)

NOISE, ASK, LETTERS, TOLD = 0, 1, 8, 3
HEARD = 32
SEQUENCE = HEARD + TOLD


def copying(size, seed):
    """Letters among noise, then as many questions; the k-th answer is the k-th letter.

    Labels (size, TOLD); the evidence (size, TOLD, SEQUENCE) is one place per question.
    """
    rng = np.random.default_rng(seed)
    x = np.full((size, SEQUENCE), NOISE, np.int32)
    x[:, HEARD:] = ASK
    labels = rng.integers(0, LETTERS, (size, TOLD)).astype(np.int32)
    places = np.argsort(rng.random((size, HEARD)), 1)[:, :TOLD]
    places.sort(1)
    np.put_along_axis(x, places, labels + 2, 1)
    return Task(x, labels, places[..., None] == np.arange(SEQUENCE))


class Selective(nn.Module):
    """Mamba: a causal convolution, a selective scan and a gate in each block.

    On embedded tokens (batch, length, features); returns the letters' scores at the
    questions, (batch, TOLD, LETTERS).
    """

    features: int = 32
    layers: int = 2

    def setup(self):
        self.table = nn.Embed(2 + LETTERS, self.features)
        self.blocks = [MambaBlock(self.features) for _ in range(self.layers)]
        self.norm, self.head = nn.RMSNorm(), nn.Dense(LETTERS)

    def embed(self, ids):
        return self.table(ids)

    def __call__(self, h):
        for block in self.blocks:
            h = h + block(h)
        return self.head(self.norm(h[:, HEARD:]))


class MambaBlock(nn.Module):
    features: int
    expand: int = 2
    states: int = 8
    width: int = 4

    @nn.compact
    def __call__(self, h):
        inner, rank = self.expand * self.features, max(1, self.features // 16)
        both = nn.Dense(2 * inner, use_bias=False)(nn.RMSNorm()(h))
        u, gate = jnp.split(both, 2, axis=-1)
        before = [(self.width - 1, 0)]
        u = nn.Conv(inner, (self.width,), padding=before, feature_group_count=inner)(u)
        u = nn.silu(u)
        chosen = nn.Dense(rank + 2 * self.states, use_bias=False)(u)
        step, b, c = jnp.split(chosen, (rank, rank + self.states), axis=-1)
        step = nn.softplus(
            nn.Dense(inner, bias_init=nn.initializers.constant(-4))(step)
        )
        spread = jnp.log(
            jnp.broadcast_to(jnp.arange(1.0, 1 + self.states), (inner, self.states))
        )
        a = -jnp.exp(self.param("a", lambda _: spread))
        skip = self.param("d", nn.initializers.ones, (inner,))

        def advance(state, now):
            u, step, b, c = now
            decay = jnp.exp(step[..., None] * a)
            state = decay * state + (step * u)[..., None] * b[:, None]
            return state, (state * c[:, None]).sum(-1)

        start = jnp.zeros((h.shape[0], inner, self.states))
        along = [jnp.swapaxes(v, 0, 1) for v in (u, step, b, c)]
        _, y = jax.lax.scan(advance, start, along)
        y = jnp.swapaxes(y, 0, 1) + skip * u
        return nn.Dense(self.features, use_bias=False)(y * nn.silu(gate))


def train(apply, params, task, steps, rate=2e-3, batch=64, seed=0):
    """Adam with warm-up and cosine decay on the cross-entropy of ``apply``'s scores.

    Args:
      apply: ``(params, x) -> scores``, of the shape of the labels and one axis more,
        which holds the classes.
    """
    schedule = optax.warmup_cosine_decay_schedule(0.0, rate, steps // 10, steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))

    def loss(params, x, labels):
        scores = apply(params, x)
        return optax.softmax_cross_entropy_with_integer_labels(scores, labels).mean()

    @jax.jit
    def step(params, state, x, labels):
        gradient = jax.grad(loss)(params, x, labels)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    state, rng = optimizer.init(params), np.random.default_rng(seed)
    for _ in range(steps):
        pick = rng.integers(len(task.x), size=batch)
        params, state = step(params, state, task.x[pick], task.labels[pick])
    return params
