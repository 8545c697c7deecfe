"""capture returns relevance at named values, condition masks it there (CRP)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jlrp
from jlrp import composites
from jlrp.ir import names
from jlrp.reports import CAUSES

pytestmark = pytest.mark.relaxed
RNG = np.random.default_rng(7)
normal = lambda *shape: jnp.asarray(RNG.normal(size=shape))  # noqa: E731
P = {
    "w": normal(6, 8),
    "b": normal(8),
    "u": normal(8, 8),
    "v": normal(8, 3),
    "k": normal(3, 3, 2, 4),
    "k2": normal(3, 3, 4, 4),
    "mean": normal(4),
    "scale": normal(4),
    "shift": normal(4),
    "variance": jnp.abs(normal(4)) + 0.1,
    "head": normal(4, 3),
}
X = normal(3, 6)
IMAGE = normal(2, 5, 5, 2)
EXACT = composites.epsilon(0.0)
relu = jax.nn.relu


@pytest.fixture(autouse=True)
def _same_numbers():
    """What a test draws does not depend on which tests ran before it."""
    RNG.bit_generator.state = np.random.default_rng(17).bit_generator.state


def assert_close(ours, expected, tolerance=1e-12):
    scale = max(float(jnp.abs(expected).max()), 1e-300)
    np.testing.assert_allclose(ours, expected, rtol=0, atol=tolerance * scale)


def residual(p, x):
    """An encoder of two residual layers and a head, by named scopes."""
    with jax.named_scope("encoder"):
        with jax.named_scope("embed"):
            h = x @ p["w"] + p["b"]
        for i in range(2):
            with jax.named_scope(f"layer_{i}"):
                with jax.named_scope("mlp"):
                    update = relu(h @ p["u"])
                h = h + update
    h = jlrp.tag(h, "stream")
    with jax.named_scope("head"):
        return jnp.tanh(h) @ p["v"]


def captured(fn, *patterns, x=X, composite="epsilon", **options):
    explain = jlrp.explain(fn, capture=patterns, composite=composite, **options)
    return explain(P, x, 0).captured


# Patterns.

GLOBS = {
    "encoder/embed": ["encoder/embed"],
    "encoder/*": ["encoder/embed", "encoder/layer_0", "encoder/layer_1"],
    "*/layer_?": ["encoder/layer_0", "encoder/layer_1"],
    "*/layer_[1-9]": ["encoder/layer_1"],
    "*": ["encoder", "head", "stream"],
    "**/mlp": ["encoder/layer_0/mlp", "encoder/layer_1/mlp"],
    "encoder/**/mlp": ["encoder/layer_0/mlp", "encoder/layer_1/mlp"],
    "encoder/**": [
        "encoder/embed",
        "encoder/layer_0",
        "encoder/layer_0/mlp",
        "encoder/layer_1",
        "encoder/layer_1/mlp",
    ],
    "st*": ["stream"],
}


@pytest.mark.parametrize("pattern", GLOBS)
def test_globs_match_component_by_component(pattern):
    assert sorted(captured(residual, pattern)) == GLOBS[pattern]


def test_all_names():
    names = {name for found in GLOBS.values() for name in found}
    assert set(captured(residual, "**")) == names


@pytest.mark.parametrize(
    ("path", "pattern", "matches"),
    [
        ("a/b/c", "a/**/c", True),
        ("a/c", "a/**/c", True),
        ("a/b", "a", False),
        ("a", "a/*", False),
        ("a/b/c", "a/*", False),
        ("abc", "a.c", False),
        ("a.c", "a.c", True),
        ("a+b", "a+b", True),
        ("layers/0/eqx.nn.Linear", "layers/*/eqx.nn.*", True),
        ("a/b/c/d", "**/c/**", True),
        ("c", "**/c", True),
        ("cc", "**/c", False),
    ],
)
def test_a_glob_is_of_the_whole_path(path, pattern, matches):
    assert names.matches_path(path, pattern) is matches


def test_several_patterns_and_one_string():
    both = captured(residual, "stream", "encoder/embed", "encoder/*")
    assert set(both) == {"stream", *GLOBS["encoder/*"]}
    one = jlrp.explain(residual, capture="stream", composite="epsilon")(P, X, 0)
    assert_close(one.captured["stream"], both["stream"])
    assert jlrp.explain(residual)(P, X).captured == {}


def test_a_name_that_matches_nothing_is_an_error_with_the_nearest():
    with pytest.raises(jlrp.SelectorError) as error:
        captured(residual, "encoder/layer_2")
    text = str(error.value)
    assert "'encoder/layer_1'" in text and "encoder/layer_2" in text
    assert "named_scope" in text and "jlrp.tag" in text
    with pytest.raises(jlrp.SelectorError, match="Names here: none"):
        jlrp.explain(lambda p, x: x @ p["w"], capture="layer")(P, X)


# What is captured.


def test_relevance_at_a_value_is_that_of_the_rest_of_the_network():
    """With the embedding's output for an input, the same relevance."""

    def rest(p, h):
        for _ in range(2):
            h = h + relu(h @ p["u"])
        return jnp.tanh(h) @ p["v"]

    h = X @ P["w"] + P["b"]
    for composite in ("epsilon", "attnlrp", "dynamic_lrp", "excitation_backprop"):
        found = captured(residual, "encoder/embed", composite=composite)
        expected = jlrp.relevance(rest, P, h, 0, composite=composite)
        assert_close(found["encoder/embed"], expected)


def test_the_residual_stream_is_what_the_ledger_says():
    for composite in ("epsilon", "attnlrp", "epsilon_plus", "gradient_input"):
        found = captured(residual, "stream", "encoder/**", composite=composite)
        ledger = jlrp.audit(residual, P, X, 0, composite=composite)
        absorbed = {}
        for row in ledger.rows:
            absorbed[row.scope] = absorbed.get(row.scope, 0) + sum(row.causes.values())
        behind = 0.0
        for scope, name in [
            ("head", "stream"),
            ("encoder/layer_1", "encoder/layer_0"),
            ("encoder/layer_0", "encoder/embed"),
        ]:
            behind += sum(
                amount
                for where, amount in absorbed.items()
                if where == scope or where.startswith(f"{scope}/")
            )
            total = float(found[name].sum())
            assert total == pytest.approx(ledger.seed - behind, abs=1e-10), name
        assert_close(found["stream"], found["encoder/layer_1"])


def test_a_scope_of_several_values_is_a_list():
    def fn(p, x):
        with jax.named_scope("pair"):
            a = x @ p["w"]
            b = jnp.tanh(a)
        return a @ p["v"] + b @ p["v"]

    found = captured(fn, "pair", composite=EXACT)["pair"]
    assert isinstance(found, list) and len(found) == 2
    total = jlrp.relevance(fn, P, X, 0, composite=EXACT).sum()
    assert float(found[0].sum()) == pytest.approx(float(total))  # b's part included
    assert_close(found[1], jnp.tanh(X @ P["w"]) * P["v"][:, 0])


def test_one_tag_of_several_values_and_of_a_pytree():
    def fn(p, x):
        h = jlrp.tag({"a": x @ p["w"], "b": x @ p["w"] + p["b"]}, "tree")
        y = jlrp.tag(jnp.tanh(h["a"]), "again") + jlrp.tag(relu(h["b"]), "again")
        return y @ p["v"]

    found = captured(fn, "tree", "again")
    assert [len(found[name]) for name in ("tree", "again")] == [2, 2]
    for before, after in zip(found["tree"], found["again"], strict=True):
        assert_close(before, after)  # activations pass


def test_shapes_are_those_of_the_values_and_outputs_come_too():
    e = jlrp.explain(residual, capture="**")(P, X, 0)
    assert {a.shape for a in e.captured.values()} == {(3, 8), (3, 3)}
    assert_close(e.output, residual(P, X))
    assert e.captured["head"][0, 0] == e.output[0, 0]
    assert not np.any(e.captured["head"][:, 1:])


def test_inputs_and_constants_can_be_named():
    def fn(p, x):
        x = jlrp.tag(x, "x")
        kernel = jlrp.tag(p["w"], "kernel")
        return x @ kernel

    e = jlrp.explain(fn, capture=("x", "kernel"), composite="epsilon")(P, X, 0)
    assert_close(e.captured["x"], e.relevance)
    assert not np.any(e.captured["kernel"])


def test_a_value_that_reaches_no_explained_output_has_zeros():
    def fn(p, x):
        jlrp.tag(jnp.sin(x), "unused")
        return x @ p["w"]

    assert not np.any(captured(fn, "unused")["unused"])


# Naming never changes an explanation.


def conv(x, k):
    return lax.conv_general_dilated(
        x, k, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def batch_norm(p, h):
    return (h - p["mean"]) / jnp.sqrt(p["variance"]) * p["scale"] + p["shift"]


def cnn(p, x, tag=jlrp.tag):
    with jax.named_scope("block"):
        with jax.named_scope("conv"):
            h = conv(x, p["k"])
        h = tag(h, "before norm")
        with jax.named_scope("norm"):
            h = batch_norm(p, h)
        h = tag(relu(tag(h, "after norm")), "active")
    with jax.named_scope("second"):
        h = h + relu(batch_norm(p, tag(conv(h, p["k2"]), "second conv")))
    return h.mean((1, 2)) @ p["head"]


PRESETS = {
    name: composites.epsilon_gamma_box(-4.0, 4.0)
    if name == "epsilon_gamma_box"
    else composites.resolve(name)
    for name in composites.PRESETS
}


@pytest.mark.parametrize("name", PRESETS)
def test_capture_never_changes_relevance(name):
    composite = PRESETS[name]
    plain = functools.partial(cnn, tag=lambda h, name: h)
    expected = jlrp.relevance(plain, P, IMAGE, 1, composite=composite)
    explain = jlrp.explain(cnn, capture="**", composite=composite)
    e = explain(P, IMAGE, 1)
    np.testing.assert_array_equal(e.relevance, expected)
    assert {"block", "block/conv", "second conv", "after norm"} <= set(e.captured)
    assert all(map(np.all, map(np.isfinite, jax.tree.leaves(e.captured))))


def test_a_value_inside_an_operation_is_reported_at_its_end():
    found = captured(cnn, "before norm", "after norm", "block/*", x=IMAGE)
    for name in ("before norm", "block/conv"):
        np.testing.assert_array_equal(found[name], found["after norm"])
    own = captured(cnn, "before norm", "after norm", x=IMAGE, composite="dynamic_lrp")
    assert np.any(own["before norm"] != 0)  # batch norm is an operation by itself


def test_a_library_model_by_module_path():
    linen = pytest.importorskip("flax.linen")

    class Block(linen.Module):
        @linen.compact
        def __call__(self, x):
            h = linen.LayerNorm(name="norm")(x)
            return x + linen.Dense(6, name="out")(linen.gelu(linen.Dense(9)(h)))

    class Net(linen.Module):
        @linen.compact
        def __call__(self, x):
            for i in range(2):
                x = Block(name=f"block_{i}")(x)
            return linen.Dense(3, name="head")(x)

    net = Net()
    params = net.init(jax.random.key(0), X)
    explain = jlrp.explain(net.apply, capture="Net/block_*", composite="attnlrp")
    e = explain(params, X, 0)
    assert sorted(e.captured) == ["Net/block_0", "Net/block_1"]
    out = jnp.asarray(params["params"]["head"]["kernel"])[:, 0]
    stream = net.apply(params, X, capture_intermediates=True)[1]["intermediates"]
    (block_1,) = stream["block_1"]["__call__"]
    assert_close(e.captured["Net/block_1"], block_1 * out, 1e-9)
    inner = jlrp.explain(net.apply, capture="**/norm", composite="attnlrp")
    assert sorted(inner(params, X, 0).captured) == [
        "Net/block_0/norm",
        "Net/block_1/norm",
    ]
    plain = jlrp.relevance(net.apply, params, X, 0, composite="attnlrp")
    np.testing.assert_array_equal(e.relevance, plain)


# Conditions.


def relu_net(p, x):
    h = jlrp.tag(relu(x @ p["w"]), "hidden")
    return h @ p["v"]


def masked(mask, fn=relu_net, name="hidden", x=X, composite=EXACT):
    return jlrp.relevance(fn, P, x, 0, composite=composite, condition={name: mask})


def test_a_mask_follows_its_formula():
    """``R^l <- R^l * mask``, then on (Achtibat et al. 2023)."""
    mask = normal(8)
    live = (X @ P["w"] > 0) * mask * P["v"][:, 0]
    assert_close(masked(mask), X * (live @ P["w"].T))


@pytest.mark.parametrize("name", ["epsilon", "attnlrp", "epsilon_plus", "dynamic_lrp"])
def test_masks_of_one_change_nothing_and_masks_of_zero_leave_nothing(name):
    plain = jlrp.relevance(residual, P, X, 0, composite=name)
    run = functools.partial(masked, fn=residual, name="stream", composite=name)
    for ones in (jnp.ones((3, 8)), jnp.ones(8), jnp.ones(()), 1, jnp.ones(8, bool)):
        assert_close(run(ones), plain)
    assert not np.any(run(0.0))


@pytest.mark.parametrize("name", ["epsilon", "attnlrp", "epsilon_plus"])
def test_masks_that_sum_to_one_sum_to_the_whole(name):
    """One unit at a time, by vmap: relevance is linear in what arrives."""
    run = functools.partial(masked, fn=residual, name="stream", composite=name)
    parts = jax.vmap(run)(jnp.eye(8))
    assert_close(parts.sum(0), jlrp.relevance(residual, P, X, 0, composite=name), 1e-11)
    for i in (0, 5):
        assert_close(run(jnp.eye(8)[i]), parts[i], 1e-11)
    assert float(jnp.abs(parts[0] - parts[1]).max()) > 1e-3


def test_masks_by_example_and_several_conditions():
    mask = normal(3, 8)
    each = jnp.concatenate([masked(m, x=X[i : i + 1]) for i, m in enumerate(mask)])
    assert_close(masked(mask), each)
    both = jlrp.relevance(
        residual,
        P,
        X,
        0,
        composite="epsilon",
        condition={"stream": mask, "encoder/embed": mask[0]},
    )
    h = X @ P["w"] + P["b"]

    def rest(p, h):
        for _ in range(2):
            h = h + relu(h @ p["u"])
        return jnp.tanh(jlrp.tag(h, "stream")) @ p["v"]

    at_embedding = jlrp.relevance(
        rest, P, h, 0, composite="epsilon", condition={"stream": mask}
    )
    arrived = at_embedding * mask[0]
    first = jlrp.relevance(
        lambda p, x: x @ p["w"] + p["b"], P, X, arrived / h, composite="epsilon"
    )
    assert_close(both, first, 1e-9)


def test_a_mask_at_a_call_is_traced():
    traces = []

    def fn(p, x):
        traces.append(1)
        return relu_net(p, x)

    explain = jlrp.explain(fn, composite=EXACT, condition={"hidden": jnp.ones(8)})
    first = explain(P, X, 0)
    counted = len(traces)
    masks = [normal(8) for _ in range(3)]
    for mask in masks:
        e = explain(P, X, 0, condition={"hidden": mask})
        assert_close(e.relevance, masked(mask))
    assert len(traces) == counted
    assert_close(first.relevance, jlrp.relevance(relu_net, P, X, 0, composite=EXACT))
    whole = jax.jit(lambda m: explain(P, X, 0, condition={"hidden": m}).relevance)
    assert_close(whole(masks[0]), masked(masks[0]))


def test_what_was_captured_shows_the_mask():
    explain = jlrp.explain(
        residual, composite="epsilon", capture=("encoder/layer_0", "stream")
    )
    e = explain(P, X, 0, condition={"stream": 0.0})
    assert not np.any(e.captured["encoder/layer_0"])


def test_the_ledger_says_what_a_mask_blocked():
    mask = jnp.arange(8) % 2
    found = captured(residual, "stream")["stream"]
    ledger = jlrp.audit(
        residual, P, X, 0, composite="epsilon", condition={"stream": mask}
    )
    (row,) = (row for row in ledger.rows if "Mask" in row.rule)
    assert row.causes["blocked"] == pytest.approx(float((found * (1 - mask)).sum()))
    absorbed = sum(ledger.total(cause) for cause in CAUSES)
    assert ledger.seed == pytest.approx(ledger.relevance + absorbed)
    assert ledger.unexplained <= 1e-10 * abs(ledger.seed)


def test_a_condition_between_a_convolution_and_its_norm_splits_them():
    """Capturing there does not; a mask there needs the value to be an output."""
    ones = {"before norm": jnp.ones(4)}
    ledgers = [
        jlrp.audit(cnn, P, IMAGE, 0, composite=EXACT, condition=condition)
        for condition in (None, ones)
    ]
    merged, apart = ([row.kind for row in ledger.rows] for ledger in ledgers)
    assert merged.count("conv") == apart.count("conv") == 2
    assert len(apart) >= len(merged) + 2  # the norm and the mask
    assert ledgers[1].unexplained <= 1e-10 * abs(ledgers[1].seed)
    plain = jlrp.relevance(cnn, P, IMAGE, 0, composite=EXACT)
    run = functools.partial(masked, fn=cnn, name="before norm", x=IMAGE)
    assert_close(run(jnp.ones(4)), plain, 1e-10)  # LRP-0 does not care
    parts = [run(jnp.eye(4)[i]) for i in range(4)]
    assert_close(sum(parts), plain, 1e-10)


def test_a_condition_inside_an_activation_splits_it():
    def fn(p, x):
        h = x @ p["w"]
        return h * jlrp.tag(jax.nn.sigmoid(h), "gate") @ p["v"]

    run = functools.partial(masked, fn=fn, name="gate", composite="attnlrp")
    assert np.all(np.isfinite(run(jnp.ones(8)))) and np.any(run(0.0))


AMBIGUOUS = {
    "two values": (
        lambda p, x: (jlrp.tag(x @ p["w"], "n") + jlrp.tag(x, "n") @ p["w"]) @ p["v"],
        "n",
        "names 2",
    ),
    "a glob": (residual, "encoder/layer_*", "narrower"),
    "none": (residual, "decoder", "matches no name scope"),
    "near": (residual, "streem", "stream"),
    "off the path": (
        lambda p, x: (jlrp.tag(jnp.cos(x), "n").sum() > 0) * (x @ p["w"]),
        "n",
        "no path of relevance",
    ),
}


@pytest.mark.parametrize("name", AMBIGUOUS)
def test_a_condition_is_set_on_one_value_that_gets_relevance(name):
    fn, at, message = AMBIGUOUS[name]
    with pytest.raises(jlrp.SelectorError, match=message):
        jlrp.relevance(fn, P, X, 0, condition={at: 1.0})


def test_conditions_are_a_mapping():
    with pytest.raises(jlrp.InputError, match="condition"):
        jlrp.relevance(residual, P, X, 0, condition="stream")
    with pytest.raises(jlrp.InputError, match="condition"):
        jlrp.explain(residual, condition=("stream",))


def test_a_mask_of_another_shape_is_an_error_that_names_it():
    with pytest.raises(jlrp.InputError, match="hidden"):
        masked(jnp.ones(5))


# Transformations.


def test_capture_under_jit_vmap_and_eager():
    explain = jlrp.explain(
        residual, capture=("stream", "encoder/*"), composite="epsilon"
    )

    def run(x, labels):
        return explain(P, x, labels)

    labels = jnp.asarray([2, 0, 1])
    expected = run(X, labels)
    one = jax.vmap(lambda x, label: run(x[None], label[None]))
    alone = jax.tree.map(lambda leaf: leaf[:, 0], jax.jit(one)(X, labels))
    found = [jax.jit(run)(X, labels), alone]
    with jax.disable_jit():
        found.append(run(X, labels))
    for e in found:
        jax.tree.map(assert_close, e.captured, expected.captured)
        assert_close(e.relevance, expected.relevance)


def test_gradients_of_captured_relevance_and_of_masks():
    explain = jlrp.explain(residual, capture="encoder/embed", composite="epsilon")

    def captured_of(w):
        e = explain(P | {"w": w}, X, 0)
        return jnp.sum(e.captured["encoder/embed"] ** 2)

    direction, step = normal(6, 8), 1e-6
    slope = jnp.vdot(jax.grad(captured_of)(P["w"]), direction)
    ahead, behind = (captured_of(P["w"] + s * direction) for s in (step, -step))
    np.testing.assert_allclose(slope, (ahead - behind) / (2 * step), rtol=1e-5)

    seed, mask = normal(3, 6), normal(8)
    slope = jax.grad(lambda m: jnp.sum(masked(m) * seed))(mask)
    by_unit = jnp.stack([jnp.sum(masked(unit) * seed) for unit in jnp.eye(8)])
    assert_close(slope, by_unit, 1e-9)  # relevance is linear in the mask
