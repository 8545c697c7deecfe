"""What is kept for the reverse pass and what is made again, without another answer."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jlrp
from jlrp.ir import jax_compat
from jlrp.options import Options
from jlrp.plan import budget, residuals
from jlrp.plan.planning import Plan
from jlrp.request import Request

pytestmark = pytest.mark.relaxed

RNG = np.random.default_rng(0)
normal = lambda *shape: jnp.asarray(RNG.normal(size=shape))  # noqa: E731
DEPTH, WIDTH = 9, 8
P = {
    "in": normal(6, WIDTH),
    "up": normal(DEPTH, WIDTH, 2 * WIDTH) / 3,
    "down": normal(DEPTH, 2 * WIDTH, WIDTH) / 3,
    "bias": normal(DEPTH, 2 * WIDTH),
    "out": normal(WIDTH, 3),
}
X = normal(5, 6)
POLICIES = {
    **{name: name for name in residuals.POLICIES},
    "nothing": jax.checkpoint_policies.nothing_saveable,
    "everything": jax.checkpoint_policies.everything_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "offloaded dots": jax.checkpoint_policies.offload_dot_with_no_batch_dims(
        "device", "pinned_host"
    ),
    "where": jlrp.KeepWhere(lambda op: op.kind == "dense"),
}
COMPOSITES = ("attnlrp", "epsilon", "epsilon_plus", "epsilon_alpha2_beta1")
table = functools.partial(pytest.mark.parametrize, "policy")
by_policy = table(POLICIES.values(), ids=POLICIES)


def block(h, layer):
    up, down, bias = layer
    return h + jax.nn.relu(jax.nn.gelu(h @ up + bias)) @ down


def layers(p, i):
    return p["up"][i], p["down"][i], p["bias"][i]


def stacked(p, x, block=block):
    h = x @ p["in"]
    for i in range(DEPTH):
        h = block(h, layers(p, i))
    return h @ p["out"]


def scanned(p, x, block=block):
    step = lambda h, layer: (block(h, layer), None)  # noqa: E731
    h, _ = lax.scan(step, x @ p["in"], layers(p, slice(None)))
    return h @ p["out"]


def attending(p, x):
    h = (x @ p["in"])[None]
    for i in range(2):
        q, k, v = (h @ m for m in (p["up"][i][:, :WIDTH], p["down"][i][:WIDTH], h[0].T))
        h = h + jax.nn.softmax(q @ k.swapaxes(1, 2)) @ v @ h / 9
        h = h / jnp.sqrt(jnp.square(h).mean(-1, keepdims=True))
    return h.mean(1) @ p["out"]


MODELS = {"stacked": stacked, "scanned": scanned, "attending": attending}


def plan_of(fn, composite="epsilon", policy="keep", **options) -> Plan:
    chosen = Options(composite=composite, residuals=policy, **options)
    return Request(fn, P, X, chosen).plan()


def explained(fn, composite, **options):
    seed = jnp.linspace(-1.0, 2.0, 3) * jnp.ones(jax.eval_shape(fn, P, X).shape)
    explain = jlrp.explain(fn, composite=composite, **options)
    return explain(P, X, seed)


def assert_same(a, b):
    for one, other in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        scale = np.abs(one).max()
        np.testing.assert_allclose(other, one, rtol=0, atol=1e-12 * scale)


@by_policy
@pytest.mark.parametrize("model", MODELS)
def test_every_policy_gives_the_same_relevance(model, policy):
    for composite in COMPOSITES:
        wrt = ("x", "params") if composite == "epsilon" else "x"
        both = (
            explained(MODELS[model], composite, wrt=wrt, residuals=r)
            for r in ("keep", policy)
        )
        assert_same(*both)


@by_policy
def test_policies_compose_with_jit_vmap_and_grad(policy):
    def total(x, residuals):
        explain = jlrp.explain(stacked, composite="epsilon", residuals=residuals)
        return jnp.sum(explain(P, x[None], 1).relevance ** 2)

    both = (
        jax.jit(jax.vmap(jax.grad(functools.partial(total, residuals=r))))(X)
        for r in ("keep", policy)
    )
    assert_same(*both)


def test_captured_and_conditioned_values_may_be_promised():
    def fn(p, x):
        h = jlrp.tag(block(x @ p["in"], layers(p, 0)), "hidden")
        return block(h, layers(p, 1)) @ p["out"]

    mask = jnp.arange(WIDTH) % 2 == 0
    options = dict(capture="hidden", condition={"hidden": mask})
    both = (explained(fn, "epsilon", residuals=r, **options) for r in ("keep", "sqrt"))
    assert_same(*((e.captured, e.relevance) for e in both))


# How much is kept.


def bytes_made(plan):
    """Of what is kept, without inputs."""
    made = [v for v in plan.kept if v.producer is not None]
    return sum(map(residuals.size_of, made))


def deep(depth):
    def fn(p, x):
        h = x @ p["in"]
        for i in range(depth):
            h = block(h, layers(p, i % DEPTH))
        return h @ p["out"]

    return fn


def test_promise_keeps_less_and_runs_no_dot_again():
    keep, promise = (plan_of(stacked, policy=name) for name in ("keep", "promise"))
    assert bytes_made(promise) < bytes_made(keep)
    assert not keep.recomputed and promise.recomputed
    dots = [dots_in(stacked, residuals=name) for name in ("keep", "promise")]
    assert dots[0] == dots[1]


@pytest.mark.parametrize("composite", ["attnlrp", "epsilon"])
def test_a_scan_does_not_ask_for_the_derivative_where_it_need_not(
    composite, monkeypatch
):
    def asked(body):
        raise AssertionError("traced the derivative of the body")

    monkeypatch.setattr(residuals, "_kept", asked)
    explain = jlrp.explain(lambda p, x: scanned(p, x), composite=composite)
    assert jnp.isfinite(explain(P, X, 1).relevance).all()


def test_sqrt_grows_like_the_square_root_of_depth():
    depths = (16, 64, 256)
    sizes = [bytes_made(plan_of(deep(n), policy="sqrt")) for n in depths]
    linear = [bytes_made(plan_of(deep(n), policy="keep")) for n in depths]
    for i in (1, 2):
        assert linear[i] > 3.5 * linear[i - 1]
        assert sizes[i] < 2.5 * sizes[i - 1]


def dots_in(fn, composite="epsilon", **options):
    """``dot_general`` equations in the traced explanation, those in loops included."""
    explain = jlrp.explain(fn, composite=composite, **options)
    jaxpr = jax.make_jaxpr(lambda p, x: explain(p, x, 1).relevance)(P, X)
    return len(re.findall(r"= dot_general", str(jaxpr)))


def test_sqrt_runs_each_dot_at_most_once_more():
    keep = dots_in(stacked)
    again = dots_in(stacked, residuals="sqrt") - keep
    assert 0 < again <= 2 * DEPTH + 2


# The user's checkpoints.

CHECKPOINTS = {
    "nothing": None,
    "dots": jax.checkpoint_policies.dots_saveable,
    "everything": jax.checkpoint_policies.everything_saveable,
}


@pytest.mark.parametrize("policy", CHECKPOINTS.values(), ids=CHECKPOINTS)
@pytest.mark.parametrize("model", [stacked, scanned])
def test_checkpoints_change_nothing(model, policy):
    fn = functools.partial(model, block=jax.checkpoint(block, policy=policy))
    for composite in COMPOSITES:
        assert_same(explained(model, composite), explained(fn, composite))


def test_a_checkpoint_keeps_its_inputs_alone():
    fn = functools.partial(stacked, block=jax.checkpoint(block))
    plan = plan_of(fn)
    inside = [v for v in plan.kept if v.producer and v.producer.regions]
    # The output of one is the input of the next.
    assert all(v.shape == (len(X), WIDTH) for v in inside)
    assert dots_in(fn) - dots_in(stacked) == 2 * DEPTH  # epsilon reads every output


def test_a_checkpoints_policy_is_honoured():
    policy = jax.checkpoint_policies.dots_saveable
    fn = functools.partial(stacked, block=jax.checkpoint(block, policy=policy))
    assert dots_in(fn) == dots_in(stacked)
    assert plan_of(fn).recomputed


def test_names_saved_by_a_checkpoint():
    from jax.ad_checkpoint import checkpoint_name

    def named(h, layer):
        up, down, bias = layer
        z = checkpoint_name(h @ up + bias, "z")
        return h + jax.nn.relu(jax.nn.gelu(z)) @ down

    policy = jax.checkpoint_policies.save_only_these_names("z")
    fn = functools.partial(stacked, block=jax.checkpoint(named, policy=policy))
    assert_same(explained(stacked, "epsilon"), explained(fn, "epsilon"))
    assert dots_in(fn) - dots_in(stacked) == DEPTH  # the others' outputs have no name


def test_a_checkpointed_loop_is_run_again():
    def fn(p, x):
        return jax.checkpoint(lambda x: scanned(p, x))(x)

    for composite in COMPOSITES:
        assert_same(explained(scanned, composite), explained(fn, composite))
    plan = plan_of(fn)
    assert [e.primitive.name for e in plan.repeated] == ["scan"]


def test_checkpoints_in_a_checkpoint():
    fn = functools.partial(stacked, block=jax.checkpoint(block))
    nested = jax.checkpoint(fn)
    assert_same(explained(stacked, "epsilon"), explained(nested, "epsilon"))
    kept = [v for v in plan_of(nested).kept if v.producer and v.producer.regions]
    assert [v.shape for v in kept] in ([], [(len(X), 3)])  # what is explained


# Loops.


def stacks(fn, composite="epsilon"):
    """Shapes that the forward scan hands to the reverse scan."""
    plan = plan_of(fn, composite)
    (rule,) = plan.recorders.values()
    return [v.shape for v in rule.stacking[-1].stacked]


def test_a_loop_of_linear_maps_stacks_its_carry_alone():
    """Epsilon reads every output of them, and the derivative none."""

    def rnn(p, x):
        square = p["in"] @ p["in"].T / 9

        def step(h, t):
            for _ in range(4):
                h = h @ square
            return jnp.tanh(h + x * t), None

        h, _ = lax.scan(step, x, jnp.arange(4.0))
        return h[:, :3]

    plan = plan_of(rnn)
    (rule,) = plan.recorders.values()
    part = rule.stacking[-1]
    (carry,) = part.body.carries
    (out,) = part.body.program.outputs
    assert set(part.stacked) <= {carry, out}


def test_a_checkpointed_body_stacks_its_carry_alone():
    fn = functools.partial(scanned, block=jax.checkpoint(block))
    assert set(stacks(fn)) == {(len(X), WIDTH)}


def recurrent(p, x, length, reverse):
    """Relevance through carries, scanned inputs and outputs, and constants."""

    def step(h, t):
        inputs, i = t
        h = jnp.tanh(h @ p["up"][0][:, :WIDTH] + inputs @ p["in"] + p["bias"][0, 0])
        return h, jax.nn.relu(h * i)

    xs = jnp.stack([x * (i + 1) for i in range(length)])
    h, ys = lax.scan(
        step, x @ p["in"], (xs, jnp.arange(length) / length - 0.3), reverse=reverse
    )
    return (h + ys.sum(0)) @ p["out"]


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("length", [3, 4, 7, 12])  # 7 and 12 leave some over
def test_a_scan_in_chunks_gives_the_same(length, reverse):
    fn = functools.partial(recurrent, length=length, reverse=reverse)
    for composite in (*COMPOSITES, "epsilon_plus_flat"):
        wrt = ("x", "params") if composite == "epsilon" else "x"
        both = (
            explained(fn, composite, wrt=wrt, residuals=r) for r in ("keep", "sqrt")
        )
        assert_same(*both)


def test_a_scan_in_chunks_composes():
    fn = functools.partial(recurrent, length=7, reverse=False)

    def total(x, residuals):
        explain = jlrp.explain(fn, composite="epsilon", residuals=residuals)
        return jnp.sum(explain(P, x[None], 1).relevance ** 2)

    both = (
        jax.jit(jax.vmap(jax.grad(functools.partial(total, residuals=r))))(X)
        for r in ("keep", "sqrt")
    )
    assert_same(*both)


def temporary(fn, x, **options):
    """Bytes of temporary memory of a compiled explanation."""
    explain = jlrp.explain(fn, composite="epsilon_plus", **options)
    compiled = jax.jit(lambda x: explain(P, x, 1).relevance).lower(x).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def test_a_scan_in_chunks_needs_the_square_root_of_memory():
    wide = jnp.ones((200, 6))

    def need(length, residuals):
        def fn(p, x):
            step = lambda h, i: (block(h, layers(p, 0)) / (1 + i), None)  # noqa: E731
            return lax.scan(step, x @ p["in"], jnp.arange(float(length)))[0] @ p["out"]

        return temporary(fn, wide, residuals=residuals)

    lengths = (64, 256)
    keep, chunks = ([need(n, r) for n in lengths] for r in ("keep", "sqrt"))
    assert keep[1] > 3.5 * keep[0]
    assert chunks[1] < 2.4 * chunks[0] and chunks[0] < keep[0] / 2


def test_a_checkpointed_scan_in_a_scan():
    def fn(p, x, wrap):
        def inner(h, layer):
            return block(h, layer), None

        def outer(h, i):
            run = lambda h: lax.scan(inner, h, layers(p, slice(None)))[0]  # noqa: E731
            return wrap(run)(h) * (1 - i / 9), None

        return lax.scan(outer, x @ p["in"], jnp.arange(3.0))[0] @ p["out"]

    for composite in COMPOSITES:
        plain, again = (
            explained(functools.partial(fn, wrap=w), composite)
            for w in (lambda f: f, jax.checkpoint)
        )
        assert_same(plain, again)


def test_offloaded_activations_wait_on_the_host():
    def moved(policy):
        plan = plan_of(stacked, policy=policy)
        explain = jlrp.explain(stacked, composite="epsilon", residuals=policy)
        jaxpr = jax.make_jaxpr(lambda x: explain(P, x, 1).relevance)(X)
        return plan, str(jaxpr).count("= device_put")

    plan, puts = moved("offload")
    made = {v for v in plan.kept if v.producer is not None}
    assert plan.offloaded == made - set(plan.program.outputs) and len(made) > DEPTH
    assert puts >= 2 * len(plan.offloaded)  # there and back
    plan, _ = moved(POLICIES["offloaded dots"])
    primitives = {v.producer.primitive.name for v in plan.offloaded}
    assert primitives == {"dot_general"}
    assert moved("keep")[1] == 0


def test_offloading_needs_a_memory_to_go_to(monkeypatch):
    monkeypatch.setattr(jax_compat, "has_host_memory", lambda: False)
    with pytest.raises(jlrp.InputError, match="memory of the host"):
        jlrp.inspect(stacked, P, X, 1, composite="epsilon", residuals="offload")


# A limit of memory.


def test_the_first_rung_that_fits_is_taken():
    sizes = dict(
        zip(budget.LADDER, (90, 80, 70, 60, 50, 40, 30, 20, 15, 10), strict=True)
    )
    for limit in range(10, 100, 5):
        chosen = budget.fitting(sizes.__getitem__, limit)
        assert sizes[chosen] == max(s for s in sizes.values() if s <= limit)
    with pytest.raises(jlrp.MemoryLimitError, match="least possible .* 10 bytes"):
        budget.fitting(sizes.__getitem__, 9)
    crooked = dict.fromkeys(budget.LADDER, 50) | {budget.LADDER[4]: 20}
    assert budget.fitting(crooked.__getitem__, 30) == budget.LADDER[4]


def test_shares_of_the_program_are_run_again():
    kept = [bytes_made(plan_of(deep(64), policy=r)) for r in budget.LADDER]
    assert kept == sorted(kept, reverse=True) and kept[-1] < kept[0] / 3
    dots = [dots_in(deep(16), residuals=r) for r in budget.LADDER]
    assert dots == sorted(dots) and dots[1] == dots[0]


def test_a_limit_of_memory_is_kept():
    wide = jnp.ones((300, 6))

    def fn(p, x):
        step = lambda h, i: (block(h, layers(p, 0)) / (1 + i), None)  # noqa: E731
        return lax.scan(step, x @ p["in"], jnp.arange(64.0))[0] @ p["out"]

    most = temporary(fn, wide)
    least = temporary(fn, wide, residuals="sqrt")
    for share in (1.0, 0.8, 0.6):
        limit = int(least + share * (most - least))
        assert temporary(fn, wide, memory_limit=limit) <= limit
    explain = jlrp.explain(fn, composite="epsilon_plus", memory_limit=limit)
    np.testing.assert_allclose(
        explain(P, wide).relevance,
        jlrp.relevance(fn, P, wide, composite="epsilon_plus"),
        rtol=1e-9,
    )
    message = f"memory_limit is {least // 2} bytes; the least possible .* bytes"
    with pytest.raises(jlrp.MemoryLimitError, match=message):
        jlrp.relevance(fn, P, wide, composite="epsilon_plus", memory_limit=least // 2)


@pytest.mark.parametrize("wrong", [0, -1, 1.5, "1GB", True])
def test_limits_that_are_no_bytes_are_refused(wrong):
    with pytest.raises(jlrp.InputError, match="memory_limit is a number of bytes"):
        jlrp.explain(stacked, memory_limit=wrong)
    with pytest.raises(jlrp.InputError, match="chooses the residuals itself"):
        jlrp.explain(stacked, memory_limit=10**6, residuals="sqrt")


def test_operations_are_kept_by_the_users_word():
    dense = jlrp.KeepWhere(lambda op: op.kind == "dense")
    plan = plan_of(stacked, policy=dense)
    made = [v.producer.primitive.name for v in plan.kept if v.producer is not None]
    assert set(made) <= {"dot_general", "add"}  # with its bias
    assert plan.recomputed


# Several targets.


def test_targets_share_the_forward_pass():
    explain = jlrp.explain(stacked, composite="epsilon_plus")

    def one(x, target):
        return explain(P, x, target).relevance

    def runs(fn, *args):
        return str(jax.make_jaxpr(fn)(*args)).count("dot_general")

    classes = jnp.eye(3)[:, None] * jnp.ones((3, len(X), 3))
    all_classes = jax.vmap(one, (None, 0))
    assert runs(all_classes, X, classes) == runs(one, X, classes[0])
    text = jax.jit(all_classes).lower(X, classes).as_text()
    batched = [line for line in text.splitlines() if "dot_general" in line]
    width = f"tensor<3x{len(X)}x"
    forward = [line for line in batched if width not in line]
    assert len(forward) >= 2 * DEPTH + 2
    each = jnp.stack([one(X, c) for c in classes])
    assert_same(all_classes(X, classes), each)


# What is never run again.


def test_random_numbers_are_kept():
    key = jax.random.key(0)

    def fn(p, x):
        h = x @ p["in"]
        for i in range(4):
            bits = jax.random.bernoulli(jax.random.fold_in(key, i), 0.5, h.shape)
            h = block(jnp.where(bits, h * 2.0, 0.0), layers(p, i))
        return h @ p["out"]

    for policy in POLICIES.values():
        plan = plan_of(fn, policy=policy)
        again = jax.make_jaxpr(
            lambda x, r=policy: jlrp.explain(fn, residuals=r)(P, x, 1).relevance
        )(X)
        assert str(again).count("= random_bits") == 4
        assert all(v.producer.primitive.name != "random_bits" for v in plan.recomputed)
    assert_same(explained(fn, "epsilon"), explained(fn, "epsilon", residuals="sqrt"))


def test_loops_with_random_numbers_are_kept():
    def fn(p, x):
        def step(h, key):
            return jnp.where(jax.random.bernoulli(key, 0.5, h.shape), h * 2, 0.0), None

        keys = jax.random.split(jax.random.key(0), 9)
        return lax.scan(step, x @ p["in"], keys)[0] @ p["out"]

    again = plan_of(fn, policy="sqrt")
    assert not any(rule.chunked for rule in again.recorders.values())
    (whole,) = plan_of(scanned, policy="sqrt").recorders.values()
    assert whole.chunked
    assert_same(explained(fn, "epsilon"), explained(fn, "epsilon", residuals="sqrt"))


# Errors.


@pytest.mark.parametrize("wrong", ["everything", 3, None])
def test_unknown_policies_are_refused(wrong):
    with pytest.raises(jlrp.InputError, match="residuals is one of"):
        jlrp.explain(stacked, residuals=wrong)
    with pytest.raises(jlrp.InputError, match="'keep', 'promise', 'sqrt'"):
        jlrp.relevance(stacked, P, X, residuals=wrong)


# The report.


def test_the_report_says_what_is_kept_and_what_is_promised():
    keep, promise = (
        jlrp.inspect(stacked, P, X, 1, composite="epsilon", residuals=policy)
        for policy in ("keep", "promise")
    )
    assert keep.activations.promises == 0 == keep.activations.total_chain
    found = promise.activations
    assert found.kept_bytes < keep.activations.kept_bytes
    assert len(found.values) == len(keep.activations.values)
    assert found.promises == sum(v.chain > 0 for v in found.values) >= DEPTH
    assert found.total_chain >= found.promises
    assert found.density == found.promises / found.equations
    assert f"{found.promises} promised" in str(promise)
    assert "promised" not in str(keep)
    deepest = [
        jlrp.inspect(deep(64), P, X, 1, composite="epsilon", residuals=r).activations
        for r in ("keep", "sqrt")
    ]
    assert deepest[0].peak_bytes == deepest[0].kept_bytes
    assert deepest[1].kept_bytes < deepest[1].peak_bytes < deepest[0].peak_bytes / 2
    kept = [v for v in found.values if not v.chain]
    assert sum(8 * np.prod(v.shape) for v in kept) == found.kept_bytes
