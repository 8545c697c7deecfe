"""What the reverse pass makes of parameters is made when relevance arrives."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jlrp
from jlrp import rules
from jlrp.rules import kernel as kernel_rules
from jlrp.tactics import contributions
from jlrp.tactics.dependencies import depend_on

pytestmark = pytest.mark.relaxed
ARRIVED, NUMBER = jnp.ones((3, 4)), jnp.arange(25.0).reshape(5, 5) - 7


def doubled(arrived, number):
    return 2 * depend_on(number, after=arrived)


@pytest.mark.parametrize(
    "through",
    [
        lambda f: f,
        jax.jit,
        jax.checkpoint,
        lambda f: jax.vmap(f, (None, None), axis_size=1),
        lambda f: lambda *args: jax.jvp(f, args, args)[0],
        lambda f: lambda *args: jax.vjp(f, *args)[0],
    ],
)
@pytest.mark.parametrize("arrived", [ARRIVED, jnp.nan * ARRIVED, jnp.ones(0), None])
def test_the_number_is_unchanged(through, arrived):
    out = (
        through(doubled)(arrived, NUMBER)
        if arrived is not None
        else doubled(None, NUMBER)
    )
    np.testing.assert_array_equal(jnp.squeeze(out), 2 * NUMBER)


@pytest.mark.parametrize("dtype", ["int32", "bool", "float16", "complex64"])
def test_numbers_of_any_dtype(dtype):
    number = NUMBER.astype(dtype)
    found = jax.jit(depend_on)(number, after=ARRIVED)
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, number)


def test_derivatives_are_those_of_the_number():
    by_arrived, by_number = jax.grad(lambda a, n: doubled(a, n).sum(), (0, 1))(
        ARRIVED, NUMBER
    )
    np.testing.assert_array_equal(by_arrived, 0 * ARRIVED)
    np.testing.assert_array_equal(by_number, jnp.full((5, 5), 2.0))


def test_a_batch_waits_once():
    jaxpr = jax.make_jaxpr(jax.vmap(doubled, (0, None), out_axes=None))(ARRIVED, NUMBER)
    (out,) = jaxpr.out_avals  # out_axes=None: it would be an error if it had a batch
    assert out.shape == NUMBER.shape


def test_under_explicit_axes_and_in_a_shard_map():
    mesh = jax.make_mesh((1,), ("i",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        sharded = jax.device_put(ARRIVED, NamedSharding(mesh, PartitionSpec("i")))
        np.testing.assert_array_equal(jax.jit(doubled)(sharded, NUMBER), 2 * NUMBER)
    mesh = jax.make_mesh((1,), ("i",), axis_types=(AxisType.Auto,))
    specs = (PartitionSpec("i"), PartitionSpec())
    mapped = jax.shard_map(
        doubled, mesh=mesh, in_specs=specs, out_specs=PartitionSpec()
    )
    np.testing.assert_array_equal(jax.jit(mapped)(ARRIVED, NUMBER), 2 * NUMBER)


def images_through_convolutions(layers=8, channels=64):
    rng = np.random.default_rng(0)
    kernels = [
        jnp.asarray(rng.normal(size=(3, 3, channels, channels)) / 30, jnp.float32)
        for _ in range(layers)
    ]

    def fn(kernels, x):
        for kernel in kernels:
            x = jax.lax.conv_general_dilated(
                x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
            x = jax.nn.relu(x)
        return x.sum((1, 2, 3))

    return fn, kernels, jnp.asarray(rng.normal(size=(1, 8, 8, channels)), jnp.float32)


@pytest.mark.parametrize("composite", ["epsilon", "epsilon_plus"])
def test_kernels_are_not_all_held_at_once(composite, monkeypatch):
    fn, kernels, x = images_through_convolutions()

    def compiled():
        explain = jlrp.explain(lambda w, x: fn(w, x), composite=composite)
        relevance = lambda w, x: explain(w, x).relevance  # noqa: E731
        return jax.jit(relevance).lower(kernels, x).compile()

    waits = compiled()
    monkeypatch.setattr(
        "jlrp.rules.contributions.depend_on", lambda value, after: value
    )
    monkeypatch.setattr("jlrp.ops.transposes.depend_on", lambda value, after: value)
    jax.clear_caches()
    hurries = compiled()
    np.testing.assert_allclose(
        waits(kernels, x), hurries(kernels, x), rtol=1e-5, atol=1e-6
    )
    bytes_of = lambda run: run.memory_analysis().temp_size_in_bytes  # noqa: E731
    assert bytes_of(waits) < 0.6 * bytes_of(hurries)


def test_kernels_are_not_made_for_each_of_several_targets():
    rng = np.random.default_rng(0)
    w = jnp.asarray(rng.normal(size=(7, 11)), jnp.float32)
    x = jnp.asarray(rng.normal(size=(1, 7)), jnp.float32)
    explain = jlrp.explain(
        lambda w, x: x @ w, composite=jlrp.Composite([("dense", rules.ZPlus())])
    )
    several = jax.vmap(lambda t: explain(w, x, t).relevance)
    targets = jnp.arange(5)[:, None]
    made = str(jax.make_jaxpr(several)(targets))
    assert "depend" in made and "f32[7,11]" in made
    assert "f32[5,7,11]" not in made
    one_by_one = jnp.stack([explain(w, x, t).relevance for t in targets])
    np.testing.assert_allclose(several(targets), one_by_one, rtol=1e-5, atol=1e-7)


# What the compiler makes of it.


def residual_stream(depth, width=16):
    rng = np.random.default_rng(0)
    kernels = jnp.asarray(rng.normal(size=(depth, 2, width, width)) / 4, jnp.float32)

    def fn(kernels, x):
        for up, down in kernels:
            mean = x.mean(-1, keepdims=True)
            scale = jax.lax.rsqrt(jnp.square(x - mean).mean(-1, keepdims=True) + 1e-5)
            x = x + jax.nn.gelu((x - mean) * scale @ up) @ down
        return x.sum((1, 2))

    return fn, list(kernels), jnp.asarray(rng.normal(size=(1, 8, width)), jnp.float32)


def test_a_residual_stream_is_not_written_into_each_fusion():
    """The compiled program would grow with the square of the depth."""
    lines = []
    for depth in (6, 12, 24):
        fn, kernels, x = residual_stream(depth)
        explain = jlrp.explain(lambda w, x, fn=fn: fn(w, x), composite="attnlrp")
        run = jax.jit(lambda w, x, e=explain: e(w, x).relevance)
        lines.append(len(run.lower(kernels, x).compile().as_text().splitlines()))
    assert lines[2] - lines[1] < 2.3 * (lines[1] - lines[0])


@pytest.mark.parametrize("rule", [rules.Gamma(0.25), rules.ZPlus()], ids=repr)
def test_equal_layers_are_traced_once(rule, monkeypatch):
    fn, kernels, x = residual_stream(8)
    shared, layers = kernel_rules._KernelRule.share, []

    def counted(self, layer, numbers):
        layers.append(layer)
        return shared(self, layer, numbers)

    monkeypatch.setattr(kernel_rules._KernelRule, "share", counted)
    jax.clear_caches()
    composite = jlrp.Composite([("dense", rule)], base="attnlrp")
    explain = jlrp.explain(lambda w, x: fn(w, x), composite=composite)
    jax.make_jaxpr(lambda w, x: explain(w, x).relevance)(kernels, x)
    assert len(layers) <= 2  # 16 dense; of the last, relevance arrives in another rank


def test_two_explanations_in_one_program_share_the_forward_pass():
    fn, kernels, x = residual_stream(4)

    def dots(*names):
        explainers = {
            name: jlrp.explain(lambda w, x: fn(w, x), composite=name) for name in names
        }
        run = jax.jit(
            lambda w, x: {k: e(w, x).relevance for k, e in explainers.items()}
        )
        return len(re.findall(r" dot\(", run.lower(kernels, x).compile().as_text()))

    one, other = dots("attnlrp"), dots("epsilon")
    assert dots("attnlrp", "epsilon") <= one + other - 7


# Blocks of a large kernel.

BLOCKED = {
    "gamma": rules.Gamma(0.25),
    "gamma, bias ignored": rules.Gamma(0.25, bias="ignore"),
    "gamma, bias split": rules.Gamma(0.25, bias="split"),
    "alpha_beta": rules.AlphaBeta(2.0, 1.0),
    "z+": rules.ZPlus(),
    "gamma_montavon": rules.GammaMontavon(0.5),
    "w2": rules.WSquare(),
    "z_box": rules.ZBox(-4.0, 4.0),
}


@pytest.mark.parametrize("features", [48, 50, 17])
@pytest.mark.parametrize("name", BLOCKED)
def test_blocks_of_a_large_kernel_are_the_whole(name, features, monkeypatch):
    rng = np.random.default_rng(0)
    w = {
        "kernel": jnp.asarray(rng.normal(size=(6, features))),
        "bias": jnp.asarray(rng.normal(size=features)),
        "scale": jnp.asarray(rng.normal(size=features)),
    }
    x = jnp.asarray(rng.normal(size=(2, 6)))
    composite = jlrp.Composite([("dense", BLOCKED[name])])

    def fn(w, x):
        return (x @ w["kernel"] + w["bias"]) * w["scale"]

    def found():
        explain = jlrp.explain(
            lambda w, x: fn(w, x), composite=composite, wrt=("x", "params")
        )
        ledger = jlrp.audit(lambda w, x: fn(w, x), w, x, composite=composite)
        absorbed = [row.causes for row in ledger.rows]
        in_blocks = "scan" in str(jax.make_jaxpr(lambda: explain(w, x).relevance)())
        return in_blocks, (explain(w, x).relevance, absorbed)

    without, whole = found()
    monkeypatch.setattr(contributions, "_BLOCK", 24)  # 4 features
    monkeypatch.setattr(contributions, "_MUCH_LARGER", 1)
    blocks, parts = found()
    assert blocks and not without
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(parts), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)
