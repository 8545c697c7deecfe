"""The clauses of ``auto``: what a program is decides, however it is written."""

import os

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jlrp
from jlrp import Composite, rules

pytestmark = pytest.mark.relaxed


def shaped(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def looked_at(fn, params, x):
    """The inspection of a function of shapes; its scores are summed."""
    return jlrp.inspect(fn, params, x, lambda out: out.sum())


def clause(fn, params, x):
    return looked_at(fn, params, x).why


def rules_of(fn, params, x, kind):
    return [row.rule for row in looked_at(fn, params, x).operations if row.kind == kind]


def conv(h, kernel, stride=1, padding="SAME", layout="NHWC", **more):
    rank = h.ndim - 2
    spatial = "DHW"[-rank:]
    channels_last = layout[-1] == "C"
    order = f"N{spatial}C" if channels_last else f"NC{spatial}"
    numbers = (order, f"{spatial}IO" if channels_last else f"OI{spatial}", order)
    return lax.conv_general_dilated(
        h, kernel, (stride,) * rank, padding, dimension_numbers=numbers, **more
    )


def stack(kernels, h, strides=(1, 1)):
    for kernel, stride in zip(kernels, strides, strict=True):
        h = jax.nn.relu(conv(h, kernel, stride))
    return h


# Convolutions

KERNELS = [shaped(3, 3, 3, 4), shaped(3, 3, 4, 4)]
IMAGE = shaped(2, 16, 16, 3)
TWO = "auto: convolutions (2): Gamma 0.2, no Flat, since all see more than 1/32 of 16"


def channels_first(kernels, h):
    for kernel in kernels:
        h = jax.nn.relu(conv(h, kernel.transpose(3, 2, 0, 1), layout="NCHW"))
    return h


def mapped(kernels, x):
    return jax.vmap(lambda one: stack(kernels, one[None])[0])(x)


def scanned(kernels, h):
    """The second kernel for both, by a loop over layers."""
    first, second = kernels
    h = jnp.pad(h, ((0, 0), (0, 0), (0, 0), (0, 1)))
    body = lambda h, kernel: (jax.nn.relu(conv(h, kernel)), None)  # noqa: E731
    return lax.scan(body, h, jnp.stack([second, second]))[0]


class Convolutions(nn.Module):
    @nn.compact
    def __call__(self, h):
        h = nn.relu(nn.Conv(4, (3, 3))(h))
        return nn.relu(nn.Conv(4, (3, 3))(h))


def flax(kernels, h):
    layers = {
        f"Conv_{i}": {"kernel": kernel, "bias": jnp.zeros(kernel.shape[-1])}
        for i, kernel in enumerate(kernels)
    }
    return Convolutions().apply({"params": layers}, h)


SPELLINGS = {
    "plain": stack,
    "jit": lambda k, h: jax.jit(stack)(k, h),
    "vmap": mapped,
    "remat": lambda k, h: jax.checkpoint(stack)(k, h),
    "scan": scanned,
    "flax": flax,
    "channels first": lambda k, h: channels_first(k, h.transpose(0, 3, 1, 2)),
    "a flat x": lambda k, h: stack(k, h.reshape(2, -1).reshape(2, 16, 16, 3)),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_convolutions_in_every_spelling(name):
    fn = lambda k, h: SPELLINGS[name](k, h).mean((1, 2))  # noqa: E731
    assert clause(fn, KERNELS, IMAGE) == TWO
    assert all(
        rule.startswith("Gamma") for rule in rules_of(fn, KERNELS, IMAGE, "conv")
    )


@pytest.mark.parametrize("rank", [1, 3])
def test_signals_and_volumes_are_convolved_alike(rank):
    kernels = [shaped(*(3,) * rank, 3, 4), shaped(*(3,) * rank, 4, 4)]
    wanted = TWO if rank == 3 else TWO.split(", no")[0] + ", no Flat on signals"
    assert clause(stack, kernels, shaped(2, *(16,) * rank, 3)) == wanted


def test_long_signals_are_no_large_images():
    """By one axis, or by two of which one is 1."""
    for kernel, x in (((3,), (2048,)), ((1, 3), (1, 2048)), ((3, 1), (2048, 1))):
        kernels = [shaped(*kernel, 3, 4), shaped(*kernel, 4, 4)]
        found = clause(stack, kernels, shaped(2, *x, 3))
        assert found.endswith("Gamma 0.2, no Flat on signals")


def test_gammas_are_as_said():
    """Two convolutions of a small image and a dense layer, by hand."""
    named = {"a": 0.2, "b": 0.2}

    def fn(params, h):
        for name in named:
            with jax.named_scope(name):
                h = jax.nn.relu(conv(h, params[name]))
        return h.mean((1, 2)) @ params["dense"]

    keys = jax.random.split(jax.random.key(0), 4)
    shapes = {"a": (3, 3, 2, 4), "b": (3, 3, 4, 4), "dense": (4, 3)}
    params = {
        name: jax.random.normal(key, shape)
        for (name, shape), key in zip(shapes.items(), keys, strict=False)
    }
    x = jax.random.normal(keys[3], (2, 6, 6, 2))
    pairs = [((n, "conv"), rules.Gamma(gamma)) for n, gamma in named.items()]
    wanted = jlrp.relevance(fn, params, x, composite=Composite(pairs, "attnlrp"))
    np.testing.assert_allclose(jlrp.relevance(fn, params, x), wanted, rtol=1e-12)


@pytest.mark.parametrize("count", [4, 49, 60])
def test_gammas_fall_in_large_images(count):
    """As was measured on EfficientNet-Lite0: 49 convolutions at 224 pixels."""
    kernels = [shaped(3, 3, 3, 4), *[shaped(3, 3, 4, 4)] * (count - 1)]
    fn = lambda k, h: stack(k, h, (2, 2, *[1] * (count - 2)))  # noqa: E731
    x = shaped(1, 224, 224, 3)
    far = 0.1 * 0.3 ** min(1, (count / 49) ** 2)
    wanted = f"auto: convolutions ({count}): Gamma 0.6 to {far:.2g}, Flat on 2 "
    assert clause(fn, kernels, x).startswith(wanted)
    *_, last = rules_of(fn, kernels, x, "conv")
    assert f"gamma={0.6 * (far / 0.6) ** (7.5 / 8):.6f}"[:14] in last
    small = rules_of(fn, kernels, shaped(1, 95, 95, 3), "conv")
    assert set(small) == {"Gamma(gamma=0.2, bias='absorb', stabilizer=1e-06)"}


def upwards(kernels, h):
    """Down by a pooling, up by a convolution with gaps in its input, and a skip."""
    first, second = kernels
    beside = jax.nn.relu(conv(h, first))
    h = jax.nn.relu(conv(nn.max_pool(beside, (2, 2), (2, 2)), second))
    return beside + conv(h, second, lhs_dilation=(2, 2), padding=((1, 2), (1, 2)))


def by_channels(kernels, h):
    """A dense layer on the channels of each place."""
    return stack(kernels, h) @ jnp.arange(20.0).reshape(4, 5)


MAP = "auto: convolutions ({}) of which a map is the output: z+"
PLACES = SPELLINGS | {"up and down": upwards, "dense on channels": by_channels}


@pytest.mark.parametrize("name", PLACES)
def test_a_map_is_read_at_one_place(name):
    fn = lambda k, h: PLACES[name](k, h)[:, 3, 5]  # noqa: E731
    report = jlrp.inspect(fn, KERNELS, IMAGE, 1)
    assert report.why == MAP.format(3 if name == "up and down" else 2)
    kernels = [row.rule for row in report.operations if row.kind == "conv"]
    assert all(rule.startswith("ZPlus") for rule in kernels)


POOLED = {
    "mean": lambda h, w: h.mean((1, 2)),
    "average pooling": lambda h, w: nn.avg_pool(h, (16, 16))[:, 0, 0],
    "max pooling": lambda h, w: nn.max_pool(h, (16, 16)).reshape(2, -1),
    "dense": lambda h, w: h.reshape(2, -1) @ w.reshape(1024, 5),
    "convolution": lambda h, w: conv(h, w, padding="VALID")[:, 0, 0],
    "weighted": lambda h, w: (h * jax.nn.softmax(h, (1, 2))).sum((1, 2)),
}


@pytest.mark.parametrize("name", POOLED)
def test_what_gathers_all_places_is_no_map(name):
    fn = lambda k, h: POOLED[name](stack(k[:2], h), k[2])  # noqa: E731
    params = [*KERNELS, shaped(16, 16, 4, 5)]
    assert "Gamma 0.2" in jlrp.inspect(fn, params, IMAGE, 1).why


def test_a_map_of_a_large_image_has_gammas():
    fn = lambda k, h: stack(k, h)[:, 3, 5]  # noqa: E731
    assert "Gamma 0.6" in jlrp.inspect(fn, KERNELS, shaped(1, 96, 96, 3), 1).why


# From a baseline


def relative_to_zero(fn, params, x):
    total = lambda out: out.sum()  # noqa: E731
    return jlrp.inspect(fn, params, x, total, baseline=0.0)


@pytest.mark.parametrize("count", [7, 8])
def test_many_convolutions_from_a_baseline(count):
    kernels = [shaped(3, 3, 3, 4), *[shaped(3, 3, 4, 4)] * (count - 1)]
    fn = lambda k, h: stack(k, h, [1] * count).mean((1, 2))  # noqa: E731
    report = relative_to_zero(fn, kernels, IMAGE)
    rules = [row.rule for row in report.operations if row.kind == "conv"]
    if count < 8:
        assert report.why == "auto: from a baseline: deep_lift"
        assert set(rules) == {"Difference()"}
    else:
        gammas = "on convolutions (8) Gamma 0.03 to 0.003"
        assert report.why == f"auto: from a baseline: deep_lift, {gammas}"
        assert all(rule.startswith("Difference(Gamma(gamma=0.0") for rule in rules)
    others = {row.rule for row in report.operations if row.kind != "conv"}
    assert others == {"Difference()"}


def test_a_map_from_a_baseline():
    fn = lambda k, h: stack(k, h)[:, 3, 5]  # noqa: E731
    report = jlrp.inspect(fn, KERNELS, IMAGE, 1, baseline=0.0)
    assert report.why.endswith("on convolutions (2) of a map Gamma 0.1 to 0.01")


def test_many_convolutions_of_a_large_image_from_a_baseline():
    kernels = [shaped(3, 3, 3, 4), *[shaped(3, 3, 4, 4)] * 7]
    fn = lambda k, h: stack(k, h, (2, 2, *[1] * 6)).mean((1, 2))  # noqa: E731
    for side, gammas in ((95, "0.03 to 0.003"), (96, "0.6 to 0.01")):
        report = relative_to_zero(fn, kernels, shaped(1, side, side, 3))
        assert report.why.endswith(f"on convolutions (8) Gamma {gammas}")


def test_many_convolutions_are_complete_from_a_baseline():
    keys = jax.random.split(jax.random.key(0), 9)
    shapes = [(3, 3, 3, 4), *[(3, 3, 4, 4)] * 7]
    kernels = [
        0.4 * jax.random.normal(k, s) for k, s in zip(keys[1:], shapes, strict=True)
    ]
    fn = lambda k, h: stack(k, h, [1] * 8).sum((1, 2))  # noqa: E731
    x = jax.random.normal(keys[0], (2, 6, 6, 3))
    found = jlrp.relevance(fn, kernels, x, 1, baseline=0.3)
    change = (fn(kernels, x) - fn(kernels, jnp.full_like(x, 0.3)))[:, 1]
    np.testing.assert_allclose(found.sum((1, 2, 3)), change, rtol=1e-10)


# Flat, by receptive field and image


def at_side(side, strides=(2, 1, 2)):
    kernels = [shaped(3, 3, 3, 4), shaped(3, 3, 4, 4), shaped(3, 3, 4, 4)]
    fn = lambda k, h: stack(k, h, strides)  # noqa: E731
    return rules_of(fn, kernels, shaped(1, side, side, 3), "conv")


@pytest.mark.parametrize(
    ("side", "flat"),
    [(16, 0), (95, 0), (96, 1), (223, 1), (224, 2), (351, 2), (352, 3)],
)
def test_flat_where_little_of_the_image_is_seen(side, flat):
    """Three kernels of 3 with strides 2, 1, 2 see 3, 7 and 11 pixels."""
    assert [rule.startswith("Flat") for rule in at_side(side)] == [
        i < flat for i in range(3)
    ]


def test_pooling_and_dilation_widen_what_is_seen():
    kernels = [shaped(3, 3, 3, 4), shaped(3, 3, 4, 4)]

    def pooled(k, h):  # sees 3, 4 behind the pooling, then 8
        h = jax.nn.relu(conv(h, k[0]))
        h = lax.reduce_window(h, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
        return conv(h, k[1])

    def averaged(k, h):
        return conv(nn.avg_pool(jax.nn.relu(conv(h, k[0])), (2, 2), (2, 2)), k[1])

    def dilated(k, h):  # 3, then 3 + 2 * 4
        return conv(jax.nn.relu(conv(h, k[0])), k[1], rhs_dilation=(4, 4))

    for fn, seen in ((pooled, 8), (averaged, 8), (dilated, 11)):
        for side, flat in ((32 * seen - 2, [True, False]), (32 * seen, [True, True])):
            found = rules_of(fn, kernels, shaped(1, side, side, 3), "conv")
            assert [rule.startswith("Flat") for rule in found] == flat


def test_what_sees_all_is_not_flat():
    """Behind a gate of the whole image, and behind a dense layer on it."""
    kernels = {"a": shaped(3, 3, 3, 3), "b": shaped(1, 1, 3, 3), "dense": shaped(3, 3)}

    def excited(p, h):
        h = jax.nn.relu(conv(h, p["a"]))
        h = h * jax.nn.sigmoid(h.mean((1, 2), keepdims=True) @ p["dense"])
        return conv(h, p["b"])

    x = shaped(1, 128, 128, 3)
    found = rules_of(excited, kernels, x, "conv")
    assert [rule.startswith("Flat") for rule in found] == [True, False]
    assert "Flat on 1" in clause(excited, kernels, x)

    def decoded(p, z):
        return conv((z @ p["all"]).reshape(1, 128, 128, 3), p["a"])

    kernels["all"] = shaped(5, 128 * 128 * 3)
    assert not rules_of(decoded, kernels, shaped(1, 5), "conv")[0].startswith("Flat")


def test_the_last_iteration_of_a_loop_over_layers_sees_most():
    def looped(kernels, h):
        body = lambda h, kernel: (jax.nn.relu(conv(h, kernel)), None)  # noqa: E731
        return lax.scan(body, h, kernels)[0]

    kernels = shaped(4, 3, 3, 3, 3)  # see 3, 5, 7, 9 pixels
    for side, flat in ((256, False), (288, True)):
        (rule, *_) = rules_of(looped, kernels, shaped(1, side, side, 3), "conv")
        assert rule.startswith("Flat") is flat
    assert clause(looped, kernels, shaped(1, 16, 16, 3)).startswith(
        "auto: convolutions (4): "
    )


def test_a_signal_of_two_axes_is_no_large_image():
    """Electrodes and time by kernels of one axis each (EEGNet)."""
    kernels = [shaped(1, 9, 1, 4), shaped(8, 1, 4, 4)]
    found = rules_of(stack, kernels, shaped(1, 8, 1024, 1), "conv")
    assert not any(rule.startswith("Flat") for rule in found)


# Patches

PATCHES = "auto: patches that do not overlap: LRP-0"
WEIGHTS = {"embed": shaped(4, 4, 3, 8), "across": shaped(16, 16), "out": shaped(8, 5)}


def mixed(p, h):
    """A mixer's block on (batch, patches, features)."""
    h = h + jax.nn.gelu(h.swapaxes(1, 2) @ p["across"]).swapaxes(1, 2)
    return h.mean(1) @ p["out"]


def by_conv(p, x):
    h = conv(x, p["embed"], 4, "VALID")
    return mixed(p, h.reshape(h.shape[0], -1, 8))


def by_conv_channels_first(p, x):
    kernel = p["embed"].transpose(3, 2, 0, 1)
    h = conv(x.transpose(0, 3, 1, 2), kernel, 4, "VALID", "NCHW")
    return mixed(p, h.reshape(h.shape[0], 8, -1).swapaxes(1, 2))


def by_reshape(p, x):
    h = x.reshape(-1, 4, 4, 4, 4, 3).swapaxes(2, 3).reshape(x.shape[0], 16, 48)
    return mixed(p, h @ p["embed"].reshape(48, 8))


def by_einsum(p, x):
    h = x.reshape(-1, 4, 4, 4, 4, 3)
    h = jnp.einsum("brpcqk,pqkf->brcf", h, p["embed"])
    return mixed(p, h.reshape(x.shape[0], 16, 8))


def by_example(p, x):
    return jax.vmap(lambda one: by_conv(p, one[None])[0])(x)


EMBEDDINGS = [by_conv, by_conv_channels_first, by_reshape, by_einsum, by_example]


@pytest.mark.parametrize("fn", EMBEDDINGS)
def test_patches_in_every_spelling(fn):
    assert clause(fn, WEIGHTS, IMAGE) == PATCHES


def test_patches_have_one_relevance():
    keys = iter(jax.random.split(jax.random.key(0), 4))
    weights = {k: jax.random.normal(next(keys), v.shape) for k, v in WEIGHTS.items()}
    x = jax.random.normal(next(keys), IMAGE.shape)
    first, *others = (jlrp.relevance(fn, weights, x) for fn in EMBEDDINGS)
    wanted = jlrp.relevance(by_conv, weights, x, composite="attnlrp")
    for found in (first, *others):
        np.testing.assert_allclose(found, wanted, atol=1e-11 * np.abs(wanted).max())


def test_a_convolution_of_one_position_is_a_dense_layer():
    """First or later: the whole image, or what a pooling left of it."""
    neither = "auto: neither convolutions nor products: LRP-0"
    whole = lambda k, x: conv(x, k, 1, "VALID")  # noqa: E731
    assert clause(whole, shaped(16, 16, 3, 5), IMAGE) == neither

    def excited(p, x):
        h = jax.nn.relu(conv(x, p["a"]))
        gate = jax.nn.relu(conv(h.mean((1, 2), keepdims=True), p["b"]))
        return h * jax.nn.sigmoid(conv(gate, p["b"]))

    kernels = {"a": shaped(3, 3, 3, 4), "b": shaped(1, 1, 4, 4)}
    found = rules_of(excited, kernels, IMAGE, "conv")
    assert [rule.split("(")[0] for rule in found] == ["Gamma", "Zero", "Zero"]
    assert clause(excited, kernels, IMAGE).startswith("auto: convolutions (1)")


def test_what_is_no_patch():
    def strided_later(p, x):
        return conv(jax.nn.relu(conv(x, p["a"])), p["b"], 2, "VALID")

    def overlapping(p, x):
        return conv(x, p["a"], 2)

    def by_point(p, x):
        return conv(x, p["point"])

    kernels = {
        "a": shaped(3, 3, 3, 4),
        "b": shaped(2, 2, 4, 4),
        "point": shaped(1, 1, 3, 4),
    }
    for fn, count in ((strided_later, 2), (overlapping, 1), (by_point, 1)):
        assert clause(fn, kernels, IMAGE).startswith(f"auto: convolutions ({count})")
        assert "patches" not in clause(fn, kernels, IMAGE)


def test_a_perceptron_that_reshapes_is_no_mixer():
    dense = "auto: neither convolutions nor products: LRP-0"
    weights = {"in": shaped(768, 32), "out": shaped(32, 5), "half": shaped(16, 4)}

    def flat(p, x):
        return jax.nn.relu(x.reshape(x.shape[0], -1) @ p["in"]) @ p["out"]

    def there_and_back(p, x):
        x = x.reshape(-1, 8, 2, 8, 2, 3).transpose(0, 2, 4, 1, 3, 5)
        return flat(p, x)

    def grouped(p, x):  # behind a dense layer it is features that are cut
        h = jax.nn.relu(x.reshape(x.shape[0], -1) @ p["in"])
        return h.reshape(-1, 2, 16) @ p["half"]

    def by_rows(p, x):
        return x.mean(-1) @ p["half"]

    for fn in (flat, there_and_back, grouped, by_rows):
        assert clause(fn, weights, IMAGE) == dense


def test_attention_on_patches():
    def fn(p, x):
        h = conv(x, p["embed"], 4, "VALID").reshape(x.shape[0], -1, 8)
        h = jax.nn.softmax(h @ h.swapaxes(1, 2)) @ h
        return h.mean(1) @ p["out"]

    assert clause(fn, WEIGHTS, IMAGE) == f"{PATCHES}; attention: attnlrp"


def test_convolutions_behind_patches():
    """ConvNeXt: the patches are dense, what overlaps is a convolution."""

    def fn(p, x):
        h = conv(x, p["embed"], 4, "VALID")
        return conv(jax.nn.relu(h), p["k"]).mean((1, 2))

    weights = {**WEIGHTS, "k": shaped(3, 3, 8, 8)}
    first, second = rules_of(fn, weights, IMAGE, "conv")
    assert first.startswith("Zero") and second.startswith("Gamma")
    assert clause(fn, weights, IMAGE).startswith("auto: convolutions (1): ")


# Recurrences

T, D = 5, 4
SEQUENCE = shaped(2, T, D)
CELL = {
    "x": shaped(D, 4 * D),
    "h": shaped(D, 4 * D),
    "both": shaped(2 * D, 4 * D),
    "b": shaped(4 * D),
    "out": shaped(D, 3),
}
GATED = (
    "auto: a gated recurrence (gates of what they made): constant on what it carries"
)
PLAIN = "auto: neither convolutions nor products: LRP-0"  # no gate, no clause


def loop(step, start, x):
    return lax.scan(step, start, x.swapaxes(0, 1))[1][-1]


def fori(step, start, x):
    return lax.fori_loop(0, T, lambda t, s: step(s, x[:, t])[0], start)[0]


def unrolled(step, start, x):
    for t in range(T):
        start, h = step(start, x[:, t])
    return h


def checkpointed(step, start, x):
    return loop(jax.checkpoint(step), start, x)


RUNS = [loop, fori, unrolled, checkpointed]


def separate(p, x, h):
    return x @ p["x"] + h @ p["h"] + p["b"]


def together(p, x, h):
    return jnp.concatenate([x, h], -1) @ p["both"] + p["b"]


def lstm(p, x, run, maps=separate):
    def step(state, x):
        h, c = state
        i, f, g, o = jnp.split(maps(p, x, h), 4, -1)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        h = jax.nn.sigmoid(o) * jnp.tanh(c)
        return (h, c), h

    start = jnp.zeros((x.shape[0], D))
    return run(step, (start, start), x) @ p["out"]


def gru(p, x, run, maps=separate):
    def step(state, x):
        (h,) = state
        z, r = jnp.split(jax.nn.sigmoid(maps(p, x, h)[..., : 2 * D]), 2, -1)
        n = jnp.tanh(x @ p["x"][:, :D] + r * (h @ p["h"][:, :D]))
        h = (1 - z) * n + z * h
        return (h,), h

    return run(step, (jnp.zeros((x.shape[0], D)),), x) @ p["out"]


def plain(p, x, run, maps=separate):
    def step(state, x):
        h = jnp.tanh(maps(p, x, state[0])[..., :D])
        return (h,), h

    return run(step, (jnp.zeros((x.shape[0], D)),), x) @ p["out"]


@pytest.mark.parametrize("maps", [separate, together])
@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("cell", [lstm, gru, plain])
def test_recurrences_in_every_spelling(cell, run, maps):
    found = clause(lambda p, x: cell(p, x, run, maps), CELL, SEQUENCE)
    assert found == (PLAIN if cell is plain else GATED)


def numbers(shapes, seed):
    leaves, tree = jax.tree.flatten(shapes)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    draw = jax.random.normal
    return jax.tree.unflatten(
        tree, [draw(k, s.shape) for k, s in zip(keys, leaves, strict=True)]
    )


def shared(value, share):
    """A factor that hands on a share of what it gets."""
    return share * value + lax.stop_gradient((1 - share) * value)


def passing(x):
    """tanh, through which relevance passes."""
    return x * lax.stop_gradient(jnp.tanh(x) / x)


def lstm_by_hand(p, x):
    """Of the first step nothing is carried yet: its output gate shares."""
    h = c = jnp.zeros((x.shape[0], D))
    for t in range(T):
        i, f, g, o = jnp.split(separate(p, x[:, t], h), 4, -1)
        i, f, o = map(jax.nn.sigmoid, (i, f, o))
        added = shared(i, 0.5) * shared(passing(g), 0.5)
        c = added + lax.stop_gradient(f) * c
        if t:
            h = lax.stop_gradient(o) * passing(c)
        else:
            h = shared(o, 0.5) * shared(passing(c), 0.5)
    return h @ p["out"]


def gru_by_hand(p, x):
    h = jnp.zeros((x.shape[0], D))
    for t in range(T):
        z, r = jnp.split(jax.nn.sigmoid(separate(p, x[:, t], h)[..., : 2 * D]), 2, -1)
        again = shared(r, 0.5) * shared(h @ p["h"][:, :D], 0.5)
        n = passing(x[:, t] @ p["x"][:, :D] + again)
        if t:
            h = lax.stop_gradient(1 - z) * n + lax.stop_gradient(z) * h
        else:
            h = shared(1 - z, 0.5) * shared(n, 0.5)
    return h @ p["out"]


@pytest.mark.parametrize("run", [loop, unrolled])
@pytest.mark.parametrize(
    ("cell", "by_hand"), [(lstm, lstm_by_hand), (gru, gru_by_hand)]
)
def test_gates_of_what_is_carried_are_constants(cell, by_hand, run):
    p, x = numbers(CELL, 0), numbers(SEQUENCE, 1)
    target = lambda out: out[:, 0].sum()  # noqa: E731
    wanted = x * jax.grad(lambda x: target(by_hand(p, x)))(x)
    found = jlrp.relevance(lambda p, x: cell(p, x, run), p, x, target)
    np.testing.assert_allclose(found, wanted, atol=1e-11 * np.abs(wanted).max())


def excited(p, x):
    """A gate by a map of the signal, once."""
    h = jax.nn.relu(x @ p["k"])
    return (h * jax.nn.sigmoid(h.mean(1, keepdims=True) @ p["v"])).mean(1)


def excited_layers(p, x):
    """The same in a loop over layers, each with maps of its own."""

    def layer(h, p):
        h = jax.nn.relu(h @ p["k"])
        return h * jax.nn.sigmoid(h.mean(1, keepdims=True) @ p["v"]), None

    return lax.scan(layer, x, p)[0].mean(1)


def linear_unit(p, x):
    return (jax.nn.sigmoid(x @ p["k"]) * (x @ p["v"])).mean(1)


def of_the_input(p, x):
    """A minimal GRU: its gates are no maps of what it carries."""
    z, g = jax.nn.sigmoid(x @ p["k"]), x @ p["v"]

    def step(h, now):
        z, g = now
        h = (1 - z) * h + z * g
        return h, h

    along = (z.swapaxes(0, 1), g.swapaxes(0, 1))
    return lax.scan(step, jnp.zeros((x.shape[0], D)), along)[1][-1]


def summed(p, x):
    """A loop over time whose maps read x alone."""
    step = lambda h, x: (h + jnp.tanh(x @ p["k"]), None)  # noqa: E731
    return lax.scan(step, jnp.zeros((x.shape[0], D)), x.swapaxes(0, 1))[0]


PAIR = {"k": shaped(D, D), "v": shaped(D, D)}
LAYERS = {"k": shaped(3, D, D), "v": shaped(3, D, D)}


@pytest.mark.parametrize(
    ("fn", "params"),
    [
        (excited, PAIR),
        (excited_layers, LAYERS),
        (linear_unit, PAIR),
        (of_the_input, PAIR),
    ],
)
def test_gates_that_are_no_recurrence(fn, params):
    assert clause(fn, params, SEQUENCE) == "auto: values times values: attnlrp"


def test_what_is_no_recurrence():
    dense = "auto: neither convolutions nor products: LRP-0"
    assert clause(summed, PAIR, SEQUENCE) == dense

    def layers(p, x):
        layer = lambda h, k: (h + jnp.tanh(h @ k), None)  # noqa: E731
        return lax.scan(layer, x, p["k"])[0].mean(1)

    def by_steps(p, x):
        for k in p["k"]:
            x = x + jnp.tanh(x @ k)
        return x.mean(1)

    def each_step(p, x):  # the same map, of every step by itself
        return sum(jnp.tanh(x[:, t] @ p["k"]) for t in range(T))

    assert clause(layers, LAYERS, SEQUENCE) == dense
    assert clause(by_steps, LAYERS, SEQUENCE) == dense
    assert clause(each_step, PAIR, SEQUENCE) == dense


def test_attention_with_shared_layers_is_no_recurrence():
    def fn(p, x):
        for _ in range(3):
            x = x + jax.nn.softmax((x @ p["k"]) @ x.swapaxes(1, 2)) @ (x @ p["v"])
        return x.mean(1)

    assert clause(fn, PAIR, SEQUENCE) == "auto: attention: attnlrp"


def test_a_selective_recurrence_is_mamba_lrp_its_convolution_too():
    def fn(p, x):
        u = jax.nn.silu(conv(x @ p["k"], p["conv"][:, None], feature_group_count=D))
        size, b = jax.nn.softplus(u @ p["v"]), u @ p["b"]
        decay = jnp.exp(-size)

        def step(h, now):
            decay, added = now
            h = decay * h + added
            return h, h

        along = [a.swapaxes(0, 1) for a in (decay, size * u * b)]
        return lax.scan(step, jnp.zeros((x.shape[0], D)), along)[1][-1]

    weights = {**PAIR, "b": shaped(D, D), "conv": shaped(3, D)}
    wanted = "auto: a selective recurrence (maps of the signal multiply it): mamba_lrp"
    assert clause(fn, weights, SEQUENCE) == wanted
    (rule,) = rules_of(fn, weights, SEQUENCE, "conv")
    assert rule.startswith("Zero")


# Frameworks


def test_flax_cells():
    for cell in (nn.OptimizedLSTMCell, nn.LSTMCell, nn.GRUCell):
        model = nn.RNN(cell(D))
        params = jax.eval_shape(model.init, jax.random.key(0), SEQUENCE)
        assert clause(model.apply, params, SEQUENCE) == GATED


@pytest.mark.parametrize("unroll", [False, True])
@pytest.mark.parametrize("layer", ["LSTM", "GRU"])
def test_keras_cells(layer, unroll):
    os.environ.setdefault("KERAS_BACKEND", "jax")
    keras = pytest.importorskip("keras")
    if keras.backend.backend() != "jax":
        pytest.skip("Keras runs on another backend")
    from jlrp.integrations import keras as of_keras

    model = keras.Sequential(
        [keras.Input((T, D)), getattr(keras.layers, layer)(D, unroll=unroll)]
    )
    assert clause(*of_keras.model(model), SEQUENCE) == GATED


def test_equinox_convolutions_and_patches():
    eqx = pytest.importorskip("equinox")
    from jlrp.integrations import equinox as of_equinox

    keys = jax.random.split(jax.random.key(0), 2)
    x = jax.ShapeDtypeStruct((2, 3, 16, 16), jnp.zeros(()).dtype)
    two = eqx.nn.Sequential(
        [
            eqx.nn.Conv2d(3, 4, 3, padding=1, key=keys[0]),
            eqx.nn.Lambda(jax.nn.relu),
            eqx.nn.Conv2d(4, 4, 3, padding=1, key=keys[1]),
        ]
    )
    embeds = eqx.nn.Conv2d(3, 8, 4, 4, key=keys[0])
    for model, wanted in ((two, TWO), (embeds, PATCHES)):
        fn, params = of_equinox.module(model)
        batched = lambda p, x, fn=fn: jax.vmap(lambda one: fn(p, one))(x)  # noqa: E731
        assert clause(batched, params, x) == wanted


def test_keras_convolutions_and_patches():
    os.environ.setdefault("KERAS_BACKEND", "jax")
    keras = pytest.importorskip("keras")
    if keras.backend.backend() != "jax":
        pytest.skip("Keras runs on another backend")
    from jlrp.integrations import keras as of_keras

    layers = keras.layers
    two = [layers.Conv2D(4, 3, padding="same", activation="relu") for _ in range(2)]
    patches = [layers.Conv2D(8, 4, strides=4)]
    for found, wanted in ((two, TWO), (patches, PATCHES)):
        net = keras.Sequential([keras.Input((16, 16, 3)), *found])
        assert clause(*of_keras.model(net), IMAGE) == wanted
