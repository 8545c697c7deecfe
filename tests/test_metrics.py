"""Metrics equal slow replicas, written from the papers, and Captum's."""

import doctest
import importlib
import pkgutil
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlrp
from jlrp import baselines, metrics
from jlrp.metrics.sanity import layers_from_the_top


def network(seed=0, features=12, hidden=16, classes=5):
    keys = jax.random.split(jax.random.key(seed), 3)
    return {
        "a": {
            "w": jax.random.normal(keys[0], (features, hidden)),
            "b": jax.random.normal(keys[2], (1, hidden)),
        },
        "b": {"w": jax.random.normal(keys[1], (hidden, classes))},
    }


def scores_of(params, x):
    flat = x.reshape(x.shape[0], -1)
    hidden = jax.nn.relu(flat @ params["a"]["w"] + params["a"]["b"])
    return hidden @ params["b"]["w"]


def batch(*shape, seed=1):
    return jax.random.normal(jax.random.key(seed), shape)


def softmax(scores):
    shares = np.exp(scores - scores.max(-1, keepdims=True))
    return shares / shares.sum(-1, keepdims=True)


def slow_curve(params, example, replaced, order, labels, steps, watch):
    """One example, one part after the other."""
    curve = []
    for step in range(steps + 1):
        gone = order[: step * len(order) // steps]
        x = np.array(example)
        for index in np.ndindex(x.shape):
            at = tuple(
                i if n > 1 else 0 for i, n in zip(index, labels.shape, strict=True)
            )
            if labels[at] in gone:
                x[index] = replaced[index]
        curve.append(watch(np.asarray(scores_of(params, x[None]))[0]))
    return curve


@pytest.mark.parametrize("steps", [1, 3, 4, 7])
@pytest.mark.parametrize("score", ["probability", "output", "hit"])
@pytest.mark.parametrize("how", ["sum", "max", "mean"])
def test_curves_equal_a_slow_replica(how, score, steps):
    params, x, relevance = network(), batch(3, 2, 2, 3), batch(3, 2, 2, 3, seed=2)
    labels = np.array([[[0], [2]], [[1], [2]]])
    found = metrics.curves(
        scores_of,
        params,
        x,
        relevance,
        parts=metrics.Parts(labels),
        removal=metrics.Mean((1, 2)),
        steps=steps,
        pool=how,
        score=score,
    )
    pool = {"sum": np.sum, "max": np.max, "mean": np.mean}[how]
    for i in range(3):
        target = int(scores_of(params, x)[i].argmax())
        watch = {
            "probability": lambda s, t=target: softmax(s)[t],
            "output": lambda s, t=target: s[t],
            "hit": lambda s, t=target: float(s.argmax() == t),
        }[score]
        places = np.asarray(relevance[i]).sum(-1)
        amounts = np.array([pool(places[labels[..., 0] == part]) for part in range(3)])
        replaced = np.broadcast_to(np.asarray(x[i]).mean((0, 1)), x.shape[1:])
        slow = partial(slow_curve, params, x[i], replaced)
        morf = slow(np.argsort(-amounts), labels, steps, watch)
        lerf = slow(np.argsort(amounts), labels, steps, watch)
        np.testing.assert_allclose(found.morf[i], morf, rtol=1e-9)
        np.testing.assert_allclose(found.lerf[i], lerf, rtol=1e-9)


def made_up_curves():
    return metrics.Curves(
        jnp.array([0.0, 0.5, 1.0]),
        morf=jnp.array([[0.8, 0.2, 0.2]]),
        lerf=jnp.array([[0.8, 0.7, 0.2]]),
    )


@pytest.mark.parametrize(
    ("area", "by_hand"),
    [
        ("abpc", (0.0 + 0.5 + 0.0) / 3),
        ("comprehensiveness", (0.0 + 0.6 + 0.6) / 3),
        ("sufficiency", (0.0 + 0.1 + 0.6) / 3),
        ("aopc", (0.0 + 0.6 + 0.6) / 3),
        ("deletion", 0.5 * (0.8 + 0.2) / 2 + 0.5 * 0.2),
        ("insertion", 0.5 * (0.8 + 0.7) / 2 + 0.5 * (0.7 + 0.2) / 2),
    ],
)
def test_areas(area, by_hand):
    assert float(getattr(made_up_curves(), area)[0]) == pytest.approx(by_hand)


def test_insertion_inserts_the_most_relevant_first():
    params, x = network(), batch(1, 12)
    relevance = x * baselines.gradient(scores_of, params, x)
    found = metrics.curves(
        scores_of,
        params,
        x,
        relevance,
        parts=metrics.features((12,)),
        removal=metrics.Constant(0),
        steps=12,
    )
    target = int(scores_of(params, x).argmax())
    order = np.argsort(-np.asarray(relevance[0]))
    start, curve = np.zeros((1, 12)), []
    for n in range(13):
        start[0, order[:n]] = np.asarray(x)[0, order[:n]]
        curve.append(softmax(np.asarray(scores_of(params, start)))[0, target])
    area = np.trapezoid(curve, dx=1 / 12)
    assert float(found.insertion[0]) == pytest.approx(area)


def test_tokens_are_masked_and_the_class_token_stays():
    table = batch(11, 4)

    def fn(params, ids):
        return params["table"][ids].sum(1) @ params["w"]

    params = {"table": table, "w": batch(4, 3, seed=5)}
    ids = jnp.array([[7, 1, 2, 3], [7, 4, 5, 0]])
    labels = np.array([[-1, 0, 1, 2], [-1, 0, 1, -1]])  # the second is padded
    relevance = jnp.array([[9.0, 1.0, 3.0, 2.0], [9.0, 1.0, 2.0, 50.0]])
    seen = []

    def spy(params, ids):
        jax.debug.callback(lambda i: seen.append(np.array(i)), ids)
        return fn(params, ids)

    found = metrics.curves(
        spy,
        params,
        ids,
        relevance,
        parts=metrics.Parts(labels),
        removal=metrics.Constant(10),
        steps=6,
    )
    jax.block_until_ready(found)
    jax.effects_barrier()
    seen = {tuple(map(tuple, s)) for s in seen}
    assert ((7, 1, 10, 3), (7, 4, 10, 0)) in seen  # after 3 of 6: one of 3, one of 2
    assert ((7, 10, 10, 10), (7, 10, 10, 0)) in seen
    assert all(row[0] == 7 for rows in seen for row in rows)
    assert all(rows[1][3] == 0 for rows in seen)


def test_features_of_an_image_are_its_channels_too():
    parts = metrics.features((2, 2, 3))
    assert parts.count == 12
    r = jnp.arange(12.0).reshape(1, 2, 2, 3)
    np.testing.assert_array_equal(metrics.pool(r, parts)[0], np.arange(12))


@pytest.mark.parametrize("channel_axis", [0, -1, None])
def test_patches_with_a_rest_at_the_edge(channel_axis):
    shape = {0: (3, 5, 4), -1: (5, 4, 3), None: (5, 4)}[channel_axis]
    parts = metrics.patches(shape, 2, channel_axis)
    assert parts.count == 6
    axis = () if channel_axis is None else (channel_axis,)
    grid = parts.labels.squeeze(axis)
    np.testing.assert_array_equal(grid[:, 0], [0, 0, 2, 2, 4])
    np.testing.assert_array_equal(grid[4], [4, 4, 5, 5])


def test_blur_equals_reflected_convolution():
    scipy = pytest.importorskip("scipy.ndimage")
    x = batch(2, 30, 40, 3)
    found = metrics.Blur(11, 2.5)(x)
    # scipy's "mirror" reflects about the centre of the last pixel, as torchvision.
    expected = scipy.gaussian_filter(
        np.asarray(x), 2.5, axes=(1, 2), mode="mirror", radius=5
    )
    np.testing.assert_allclose(found, expected, rtol=1e-9)


def test_blur_equals_torch():
    from peers import torch

    x = batch(1, 2, 60, 52)
    weights = np.exp(-((np.arange(51) - 25) ** 2) / 800.0)
    kernel = torch.tensor(np.outer(weights, weights) / weights.sum() ** 2)
    padded = torch.nn.functional.pad(torch.tensor(np.array(x)), [25] * 4, "reflect")
    expected = torch.nn.functional.conv2d(padded, kernel.expand(2, 1, 51, 51), groups=2)
    found = metrics.Blur(51, 20.0, axes=(2, 3))(x)
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-9)


def test_noise_has_the_mean_and_deviation_of_its_example():
    x = batch(1, 40, 50) * 3 + 7
    noise = metrics.Noise(seed=3, scale=0.5)(x)
    assert float(noise.mean()) == pytest.approx(float(x.mean()), abs=0.1)
    assert float(noise.std()) == pytest.approx(0.5 * float(x.std()), rel=0.1)
    assert not np.array_equal(noise, metrics.Noise(seed=4, scale=0.5)(x))


def test_inpainting_sees_what_is_removed():
    params, x = network(), batch(2, 12)

    def left_over_mean(x, removed):
        kept = jnp.where(removed, 0, x).sum(1, keepdims=True)
        count = (~removed).sum(1, keepdims=True).astype(x.dtype)
        return jnp.broadcast_to(kept / count, x.shape)

    found = metrics.curves(
        scores_of,
        params,
        x,
        x,
        parts=metrics.features((12,)),
        removal=metrics.Inpaint(left_over_mean),
        steps=4,
    )
    order = np.argsort(-np.asarray(x[0]))
    half = np.array(x[0])
    half[order[:6]] = half[order[6:]].mean()
    target = int(scores_of(params, x)[0].argmax())
    expected = softmax(np.asarray(scores_of(params, half[None])))[0, target]
    assert float(found.morf[0, 2]) == pytest.approx(expected)


@pytest.mark.parametrize("as_array", [False, True])
def test_a_given_target_is_watched(as_array):
    params, x = network(), batch(2, 12)
    target = jnp.array([1, 1]) if as_array else 1
    found = metrics.curves(
        scores_of,
        params,
        x,
        x,
        parts=metrics.features((12,)),
        removal=metrics.Constant(0),
        steps=2,
        target=target,
    )
    expected = softmax(np.asarray(scores_of(params, x)))[:, 1]
    np.testing.assert_allclose(found.morf[:, 0], expected)


def test_a_target_of_multipliers_is_watched():
    params, x = network(), batch(2, 12)
    shares = batch(2, 5, seed=9)
    found = metrics.curves(
        scores_of,
        params,
        x,
        x,
        parts=metrics.features((12,)),
        removal=metrics.Constant(0),
        steps=2,
        score="output",
        target=shares,
    )
    expected = (np.asarray(scores_of(params, x)) * np.asarray(shares)).sum(1)
    np.testing.assert_allclose(found.morf[:, 0], expected)


def test_a_target_function_is_watched_as_it_is():
    params, x = network(), batch(2, 12)
    found = metrics.curves(
        scores_of,
        params,
        x,
        x,
        parts=metrics.features((12,)),
        removal=metrics.Constant(0),
        steps=2,
        target=lambda out: out[:, 0] - out[:, 1],
    )
    scores = np.asarray(scores_of(params, x))
    np.testing.assert_allclose(found.lerf[:, 0], scores[:, 0] - scores[:, 1])


def test_the_target_stays_the_class_of_the_whole_example():
    fn = lambda w, x: x @ w  # noqa: E731
    w, x = jnp.array([[2.0, 0.0], [0.0, 1.0]]), jnp.array([[1.0, 1.0]])
    found = metrics.curves(
        fn,
        w,
        x,
        x * w[None, :, 0],
        parts=metrics.features((2,)),
        removal=metrics.Constant(0),
        steps=2,
        score="output",
    )
    assert found.morf.tolist() == [[2.0, 0.0, 0.0]]
    assert found.lerf.tolist() == [[2.0, 2.0, 0.0]]


def test_many_steps_are_one_program_whose_forward_passes_are_a_loop():
    def traced(steps):
        calls = []

        def counted(params, x):
            calls.append(None)
            return scores_of(params, x)

        args = (network(), batch(64, 12), batch(64, 12))
        options = {"parts": metrics.features((12,)), "removal": metrics.Constant(0)}

        def measure(params, x, r):
            return metrics.curves(counted, params, x, r, steps=steps, **options).abpc

        program = jax.jit(measure).lower(*args).as_text()
        return len(calls), program.count("\n")

    assert traced(1000) == traced(3)


def test_curves_under_jit_and_vmap():
    params, x = network(), batch(2, 3, 12)
    curve = partial(
        metrics.curves,
        scores_of,
        parts=metrics.features((12,)),
        removal=metrics.Constant(0),
        steps=4,
    )
    mapped = jax.jit(jax.vmap(lambda x: curve(params, x, x).abpc))(x)
    np.testing.assert_allclose(mapped[1], curve(params, x[1], x[1]).abpc)


REFUSED = {
    "shape of relevance": ({"relevance": jnp.ones((2, 11))}, "one number for each"),
    "NaN": ({"relevance": jnp.full((2, 12), jnp.nan)}, "holds NaN"),
    "pool": ({"pool": "median"}, "pool must be one of"),
    "score": ({"score": "loss"}, "score must be one of"),
    "steps": ({"steps": 0}, "steps is a whole number of at least 1"),
    "parts": ({"parts": metrics.features((11,))}, "do not fit x"),
    "x": ({"x": {"a": jnp.ones((2, 12))}}, "belongs to params"),
    "target": ({"target": 5}, "out of range"),
    "targets": ({"target": jnp.array([0, 1, 2])}, "do not fit an output"),
    "removal": ({"removal": lambda x: x[0]}, "must return an array like x"),
    "rank": ({"fn": lambda p, x: scores_of(p, x).sum(1)}, "needs scores of shape"),
    "batch": ({"fn": lambda p, x: scores_of(p, x).sum(0)}, "needs scores of shape"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_curves_refuse(case):
    changed, message = REFUSED[case]
    good = {
        "fn": scores_of,
        "params": network(),
        "x": batch(2, 12),
        "relevance": batch(2, 12),
        "parts": metrics.features((12,)),
        "removal": metrics.Constant(0),
    }
    given = good | changed
    with pytest.raises(jlrp.JlrpError, match=message):
        metrics.curves(
            given.pop("fn"),
            given.pop("params"),
            given.pop("x"),
            given.pop("relevance"),
            **given,
        )


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.array([0.5, 1.0]), "are integers"),
        (np.array([-2, 0]), "count from 0"),
        (np.array([-1, -1]), "count from 0"),
    ],
)
def test_parts_refuse(labels, message):
    with pytest.raises(jlrp.InputError, match=message):
        metrics.Parts(labels)


def test_a_score_per_batch_is_refused():
    with pytest.raises(jlrp.InputError, match="one row per example"):
        metrics.curves(
            lambda p, x: scores_of(p, x).sum(),
            network(),
            batch(2, 12),
            batch(2, 12),
            parts=metrics.features((12,)),
            removal=metrics.Constant(0),
            score="output",
        )


def torch_network(torch, params):
    first = torch.nn.Linear(12, 16).double()
    last = torch.nn.Linear(16, 5, bias=False).double()
    with torch.no_grad():
        first.weight.copy_(torch.tensor(np.array(params["a"]["w"]).T))
        first.bias.copy_(torch.tensor(np.array(params["a"]["b"])[0]))
        last.weight.copy_(torch.tensor(np.array(params["b"]["w"]).T))
    return torch.nn.Sequential(first, torch.nn.ReLU(), last)


@pytest.mark.parametrize("contributions", [False, True])
def test_infidelity_equals_captum(contributions):
    from peers import torch

    captum = pytest.importorskip("captum.metrics")
    params, x, relevance = network(), batch(3, 12), batch(3, 12, seed=2)
    steps = 0.3 * np.asarray(batch(7, *x.shape, seed=3))
    keys = iter(range(7))

    def perturb(key, x):
        index = jax.random.key_data(key)[-1]
        return jnp.asarray(steps)[index % 7]

    drawn = jax.random.split(jax.random.key(0), 7)
    order = [int(jax.random.key_data(key)[-1]) % 7 for key in drawn]

    def torch_perturb(inputs):
        step = torch.tensor(steps[order[next(keys)]])
        return (step / inputs if contributions else step), inputs - step

    expected = captum.infidelity(
        torch_network(torch, params),
        torch_perturb,
        torch.tensor(np.array(x)),
        torch.tensor(np.array(relevance)),
        target=torch.tensor(np.array(scores_of(params, x).argmax(-1))),
        n_perturb_samples=7,
        max_examples_per_batch=3,
    )
    found = metrics.infidelity(
        scores_of,
        params,
        x,
        relevance,
        perturb=perturb,
        contributions=contributions,
        samples=7,
    )
    np.testing.assert_allclose(found, expected.detach().numpy(), rtol=1e-6)


@pytest.mark.filterwarnings("ignore:Input Tensor 0 did not already require")
def test_sensitivity_equals_captum():
    from peers import torch

    captum = pytest.importorskip("captum.metrics")
    attr = pytest.importorskip("captum.attr")
    params, x = network(), batch(3, 12)
    found = metrics.sensitivity(
        baselines.gradient_input, scores_of, params, x, radius=0.2, samples=6, seed=4
    )
    draws = iter(jax.random.split(jax.random.key(4), 6))
    target = torch.tensor(np.array(scores_of(params, x).argmax(-1)))

    def perturb(inputs):
        step = jax.random.uniform(next(draws), x.shape, x.dtype, -1, 1) * 0.2
        return inputs + torch.tensor(np.array(step))

    expected = captum.sensitivity_max(
        attr.InputXGradient(torch_network(torch, params)).attribute,
        torch.tensor(np.array(x)),
        perturb_func=perturb,
        n_perturb_samples=6,
        max_examples_per_batch=3,
        target=target,
    )
    np.testing.assert_allclose(found, expected.detach().numpy(), rtol=1e-6)


def test_infidelity_of_a_wrong_relevance():
    w, x = jnp.array([1.0, 2.0]), jnp.ones((1, 2))
    fn = lambda w, x: x @ w  # noqa: E731
    found = metrics.infidelity(fn, w, x, jnp.zeros((1, 2)), perturb=0.5, samples=20_000)
    assert float(found[0]) == pytest.approx(0.25 * (1 + 4), rel=0.05)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p, x: metrics.infidelity(scores_of, p, x, x[:1]), "relevance like it"),
        (lambda p, x: metrics.infidelity(scores_of, p, x, x, samples=0), "samples"),
        (
            lambda p, x: metrics.sensitivity(
                jlrp.relevance, scores_of, p, x, radius=-1.0
            ),
            "radius is a finite number of at least 0",
        ),
        (
            lambda p, x: metrics.sensitivity(
                jlrp.relevance, scores_of, p, x.astype(int)
            ),
            "float array",
        ),
        (
            lambda p, x: metrics.randomisation(
                jlrp.relevance, scores_of, p, x, similarity="ssim"
            ),
            "similarity must be one of",
        ),
        (
            lambda p, x: metrics.randomisation(
                jlrp.relevance, lambda p, x: x.reshape(2, -1), p, x
            ),
            "none of its params",
        ),
    ],
)
def test_robustness_refuses(call, message):
    with pytest.raises(jlrp.InputError, match=message):
        call(network(), batch(2, 12))


def test_layers_are_in_the_order_of_their_use():
    shapes = jax.eval_shape(lambda: ({"z": network(), "unused": {"w": batch(3)}},))[0]

    def fn(params, x):
        return scores_of(params["z"], x)

    assert layers_from_the_top(fn, shapes, batch(1, 12)) == ["z/b", "z/a"]


@pytest.mark.parametrize("similarity", ["spearman", "pearson"])
def test_randomisation_against_scipy(similarity):
    stats = pytest.importorskip("scipy.stats")
    params, x = network(), batch(3, 12)
    found = metrics.randomisation(
        jlrp.relevance, scores_of, params, x, similarity=similarity, seed=3
    )
    assert found.layers == ("b", "a") and found.similarity.shape == (3, 2)
    random = np.random.default_rng(3)
    leaves, tree = jax.tree.flatten(params)
    new = [
        random.permutation(np.asarray(w).reshape(-1)).reshape(w.shape) for w in leaves
    ]
    new = jax.tree.unflatten(tree, map(jnp.asarray, new))
    target = scores_of(params, x).argmax(-1)
    before = jlrp.relevance(scores_of, params, x, target)
    after = jlrp.relevance(scores_of, {"a": params["a"], "b": new["b"]}, x, target)
    correlate = {"spearman": stats.spearmanr, "pearson": stats.pearsonr}[similarity]
    expected = [correlate(a, b)[0] for a, b in zip(before, after, strict=True)]
    np.testing.assert_allclose(found.similarity[:, 0], expected, rtol=1e-6)


def test_a_method_that_ignores_the_network_fails_the_sanity_check():
    edges = lambda fn, params, x, target: x  # noqa: E731
    found = metrics.randomisation(edges, scores_of, network(), batch(3, 12))
    np.testing.assert_allclose(found.similarity, 1.0)


RELEVANCE = jnp.array([[[4.0, 1.0], [-3.0, 3.0]]])
MASK = jnp.array([[[True, False], [True, False]]])


@pytest.mark.parametrize(
    ("metric", "expected"),
    [
        (metrics.relevance_mass, 4 / 8),
        (metrics.relevance_rank, 1 / 2),
        (metrics.pointing_game, 1.0),
        (partial(metrics.top_k_accuracy, k=3), 1 / 3),
    ],
)
def test_localisation(metric, expected):
    assert metric(RELEVANCE, MASK).tolist() == pytest.approx([expected])
    assert jax.jit(metric)(RELEVANCE, MASK).tolist() == pytest.approx([expected])


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (MASK.astype(int), "is bool"),
        (MASK[0], "like relevance"),
        (jnp.zeros_like(MASK), "empty"),
    ],
)
def test_localisation_refuses(mask, message):
    with pytest.raises(jlrp.InputError, match=message):
        metrics.relevance_mass(RELEVANCE, mask)


def test_top_k_refuses_more_than_there_are():
    with pytest.raises(jlrp.InputError, match="between 1 and 4"):
        metrics.top_k_accuracy(RELEVANCE, MASK, k=5)


def test_interval_of_independent_values_is_the_normal_one():
    values = np.random.default_rng(0).normal(2.0, 3.0, 400)
    found = metrics.interval(values)
    half = 1.96 * values.std(ddof=1) / 20
    assert found.mean == pytest.approx(values.mean())
    assert found.low == pytest.approx(values.mean() - half, abs=0.05)
    assert found.high == pytest.approx(values.mean() + half, abs=0.05)


def test_interval_of_groups_is_as_wide_as_that_of_their_means():
    random = np.random.default_rng(1)
    means = random.normal(size=50)
    values = np.repeat(means, 40) + 0.01 * random.normal(size=2000)
    grouped = metrics.interval(values, groups=np.repeat(np.arange(50), 40))
    blind = metrics.interval(values)
    assert grouped.high - grouped.low == pytest.approx(
        4 * 0.98 * means.std() / 7, rel=0.2
    )
    assert blind.high - blind.low < 0.3 * (grouped.high - grouped.low)


@pytest.mark.parametrize(
    ("values", "options", "message"),
    [
        ([], {}, "finite numbers"),
        ([1.0, np.nan], {}, "finite numbers"),
        ([1.0], {"groups": [1, 2]}, "one each"),
        ([1.0], {"level": 1.0}, "between 0 and 1"),
    ],
)
def test_interval_refuses(values, options, message):
    with pytest.raises(jlrp.InputError, match=message):
        metrics.interval(values, **options)


MODULES = [m.name for m in pkgutil.iter_modules(metrics.__path__, "jlrp.metrics.")]


@pytest.mark.relaxed
@pytest.mark.parametrize("name", MODULES)
def test_the_examples_in_the_docstrings(name):
    assert doctest.testmod(importlib.import_module(name)).failed == 0
