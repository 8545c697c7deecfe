"""Names in the bodies of loops and branches: as those of the loop written out.

A program is written once, with its loop and its names as arguments. Written out in
Python, with a name of its own for each iteration, it is the reference.
"""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jlrp
from jlrp import flow
from jlrp.ir import names

pytestmark = pytest.mark.relaxed
RNG = np.random.default_rng(5)
normal = lambda *shape: jnp.asarray(RNG.normal(size=shape))  # noqa: E731
N, B, T, H = 3, 2, 3, 4
P = {"layers": normal(N, H, H) / 2, "biases": normal(N, H) / 2, "out": normal(H, 2)}
P |= {"u": normal(H, H) / 2, "grid": normal(2, 2, H, H) / 2}
P |= {name: normal(N, H, H) / 2 for name in ("q", "k", "v", "up", "down")}
X, SEQUENCE = normal(B, H), normal(B, T, H)
relu = jax.nn.relu


# Each program is written for these two: loops that run, and loops written out.


class Looped:
    """The loops of JAX, and names as they are."""

    scan = staticmethod(lax.scan)
    cond = staticmethod(lax.cond)
    checkpoint = staticmethod(jax.checkpoint)
    name = staticmethod(jlrp.tag)


class WrittenOut:
    """The same in Python; a name has its iterations behind it."""

    def __init__(self):
        self._at = []

    @contextlib.contextmanager
    def iteration(self, i):
        self._at.append(i)
        yield
        self._at.pop()

    def scan(self, step, carry, xs, reverse=False):
        n, ys = len(jax.tree.leaves(xs)[0]), [None] * len(jax.tree.leaves(xs)[0])
        for i in reversed(range(n)) if reverse else range(n):
            with self.iteration(i):
                carry, ys[i] = step(carry, jax.tree.map(lambda a: a[i], xs))  # noqa: B023
        return carry, jax.tree.map(lambda *parts: jnp.stack(parts), *ys)

    def cond(self, decides, yes, no, *operands):
        return yes(*operands) if self.decisions.pop(0) else no(*operands)

    def checkpoint(self, step):
        return step

    def name(self, y, name):
        return jlrp.tag(y, written(name, self._at))


def written(name, index):
    return ".".join(map(str, (name, *index)))


# The programs.


def mlp(on):
    def step(h, layer):
        w, b = layer
        update = on.name(relu(h @ w + b), "update")
        return on.name(h + update, "stream"), None

    def fn(p, x):
        h, _ = on.scan(step, x, (p["layers"], p["biases"]))
        return h @ p["out"]

    return fn, X


def rnn(on, of_x=False, reverse=False):
    """Both outputs are read. From a state of zeros, the first step differs.

    From one of x, the state has a name where it comes in, too: there, and where it went
    out, it is one value.
    """

    def fn(p, x):
        def step(h, x):
            before = on.name(h, "before") if of_x else h
            gate = on.name(jax.nn.sigmoid(x @ p["u"]), "gate")
            h = on.name(jnp.tanh(x + before @ p["u"]) * gate, "state")
            return h, h

        h = jnp.tanh(x[:, 0] @ p["q"][0]) if of_x else jnp.zeros((B, H))
        h, hs = on.scan(step, h, x.swapaxes(0, 1), reverse=reverse)
        return (h + hs[1]) @ p["out"]

    return fn, SEQUENCE


def attention(on):
    def step(h, layer):
        q, k, v, up, down = layer
        a = jax.nn.softmax((h @ q) @ jnp.swapaxes(h @ k, -1, -2), -1)
        a = on.name(a, "weights")
        h = on.name(h + a @ (h @ v), "attended")
        h = h / jnp.sqrt((h**2).mean(-1, keepdims=True) + 1e-6)
        return h + on.name(jax.nn.gelu(h @ up), "hidden") @ down, None

    def fn(p, x):
        h, _ = on.scan(step, x, tuple(p[n] for n in ("q", "k", "v", "up", "down")))
        return h.mean(1) @ p["out"]

    return fn, SEQUENCE


def nested(on):
    def outer(h, ws):
        def inner(h, w):
            h = on.name(h + relu(h @ w), "inner")
            return h, h.sum(-1)

        h, sums = on.scan(inner, h, ws)
        return on.name(h + jnp.tanh(sums.sum(0))[:, None], "outer"), None

    def fn(p, x):
        return on.scan(outer, x, p["grid"])[0] @ p["out"]

    return fn, X


def rematerialised(on):
    def step(h, w):
        hidden = on.name(jnp.tanh(h @ w), "hidden")
        return on.name(h + hidden @ w.T, "stream"), None

    def fn(p, x):
        return on.scan(on.checkpoint(step), x, p["layers"])[0] @ p["out"]

    return fn, X


def mapped(on):
    """A loop for each example: the value as traced has no axis of examples."""

    def one(p, x):
        def step(h, w):
            return on.name(h + relu(w @ h), "stream"), on.name(relu(h), "relu")

        h, ys = on.scan(step, x, p["layers"])
        return (jnp.tanh(h) + ys.sum(0)) @ p["out"]

    return lambda p, x: jax.vmap(functools.partial(one, p))(x), X


def branching(on):
    """Layers of two kinds; the first and last are of one."""

    def step(h, layer):
        w, kind = layer

        def plain(h):
            return on.name(h + relu(h @ w), "plain")

        def gated(h):
            return h + on.name(jax.nn.silu(h @ w), "gate") * (h @ w.T)

        return on.cond(kind, plain, gated, h), None

    def fn(p, x):
        on.decisions = [True, False, True]
        kinds = jnp.asarray(on.decisions)
        return on.scan(step, x, (p["layers"], kinds))[0] @ p["out"]

    return fn, X


def long(on):
    """Enough iterations for chunks, and a rest."""

    def step(h, w):
        h = on.name(h + jnp.tanh(h @ w) / 4, "stream")
        return h, None

    def fn(p, x):
        ws = jnp.concatenate([p["layers"], p["q"], p["k"][:1]])
        return on.scan(step, x, ws)[0] @ p["out"]

    return fn, X


PROGRAMS = {
    "mlp": (mlp, "epsilon"),
    "rnn from zeros": (rnn, "epsilon"),
    "reverse": (functools.partial(rnn, of_x=True, reverse=True), "epsilon_plus"),
    "attention": (attention, "attnlrp"),
    "nested": (nested, "epsilon"),
    "remat": (rematerialised, "epsilon"),
    "vmap outside": (mapped, "attnlrp"),
    "cond in scan": (branching, "epsilon"),
    "chunks": (long, "epsilon"),
}


def tags(fn, x):
    program, _ = jlrp.ir.program.trace(fn, P, x)
    return tuple(program.tags)


def assert_close(ours, expected, tolerance=1e-10):
    scale = max(float(jnp.abs(expected).max()), 1e-300)
    np.testing.assert_allclose(ours, expected, rtol=0, atol=tolerance * scale)


def names_of(written_out):
    return sorted({name.split(".")[0] for name in written_out})


def stacked(by_name, name, shape, axes):
    """What was written out, as the loop stacks it: zeros for what did not run."""
    rows = np.zeros(shape)
    for index in np.ndindex(shape[:axes]):
        if (key := written(name, index)) in by_name:
            rows[index] = by_name[key]
    return rows


def explain(fn, x, **options):
    return jlrp.explain(fn, **options)(P, x, 0)


@pytest.mark.parametrize("name", PROGRAMS)
def test_scanned_is_written_out(name):
    """With masks of one; then others: for all iterations alike, or one for each."""
    make, composite = PROGRAMS[name]
    (fn, x), (twin, _) = make(Looped()), make(WrittenOut())
    each = tags(twin, x)
    named = names.places(jlrp.ir.program.trace(fn, P, x)[0])
    masks, of_twin, axes = {}, {}, {}
    for k, (tag, (place,)) in enumerate(named.items()):
        shape, axes[tag] = place.stacked(None), len(place.stacked(None))
        axes[tag] -= len(place.value.shape)
        masks[tag] = normal(*shape[axes[tag] * (k % 2) :])
        for index in np.ndindex(shape[: axes[tag]]):
            if written(tag, index) in each:
                mask = masks[tag] if k % 2 else masks[tag][index]
                of_twin[written(tag, index)] = mask
    assert set(of_twin) == set(each)
    both = [
        jlrp.explain(f, capture=capture, condition=m, composite=composite, residuals=r)
        for f, capture, m, r in (
            (fn, tuple(masks), masks, "sqrt" if name == "chunks" else "keep"),
            (twin, each, of_twin, "keep"),
        )
    ]
    for change in (jnp.ones_like, lambda mask: mask):
        got, want = (e(P, x, 0, jax.tree.map(change, e.condition)) for e in both)
        assert_close(got.relevance, want.relevance)
        for tag, rows in got.captured.items():
            assert np.any(rows), tag
            assert_close(rows, stacked(want.captured, tag, rows.shape, axes[tag]))


# Loops of unknown length.


def whiled(on, name="stream"):
    """Runs as often as a data-dependent state says: 3 times for X."""

    def fn(p, x):
        def goes_on(state):
            return (state[1] < 3) & (jnp.abs(state[0]).max() < 1e6)

        def body(state):
            h, i = state
            h = on.name(h + jnp.tanh(h @ p["u"]) + x / 4, name)
            return h, i + 1

        if isinstance(on, Looped):
            h, _ = lax.while_loop(goes_on, body, (x, 0))
        else:
            h = x
            for i in range(3):
                with on.iteration(i):
                    h, _ = body((h, i))
        return h @ p["out"]

    return fn, X


@functools.cache
def of_while():
    (fn, x), (twin, _) = whiled(Looped()), whiled(WrittenOut())
    each = tags(twin, x)
    masks = {name: normal(B, H) for name in each}
    want = explain(twin, x, capture=each, composite="epsilon")
    masked = explain(twin, x, capture=each, composite="epsilon", condition=masks)
    rows, mask = (jnp.stack([d[n] for n in each]) for d in (want.captured, masks))
    return fn, want.relevance, rows, mask, masked


@pytest.mark.parametrize("steps", [3, 5])
def test_a_while_loop_has_zeros_behind_its_last_iteration(steps):
    fn, relevance, rows, mask, masked = of_while()
    options = dict(capture="stream", composite="epsilon", capture_steps=steps)
    e = explain(fn, X, **options)
    assert_close(e.relevance, relevance)
    assert e.captured["stream"].shape == (steps, B, H)
    assert_close(e.captured["stream"][:3], rows)
    assert not np.any(e.captured["stream"][3:])
    mask = jnp.concatenate([mask, jnp.ones((steps - 3, B, H))])
    e = explain(fn, X, condition={"stream": mask}, **options)
    assert_close(e.relevance, masked.relevance)
    assert_close(e.captured["stream"][0], masked.captured["stream.0"])


def test_more_iterations_than_are_recorded_are_an_error():
    fn, relevance, *_ = of_while()
    explain = jlrp.explain(fn, capture="stream", composite="epsilon", capture_steps=2)
    with pytest.raises(jlrp.InputError, match="ran 3 times.*capture_steps=3"):
        explain(P, X, 0)
    found = jax.jit(explain)(P, X, 0)  # there it cannot raise
    assert np.all(np.isnan(found.captured["stream"]))
    assert_close(found.relevance, relevance)
    masked = jlrp.explain(
        fn, condition={"stream": jnp.ones((2, 1, 1))}, capture_steps=2
    )
    with pytest.raises(jlrp.InputError, match="ran 3 times"):
        masked(P, X, 0)
    found = jax.jit(lambda p, x: masked(p, x, 0))(P, X)
    assert np.any(np.isnan(found.relevance))


def test_a_while_loop_needs_a_number_of_steps():
    fn, *_ = of_while()
    for pattern in ("stream", "**"):
        with pytest.raises(jlrp.InputError, match="capture_steps=N.*zeros"):
            explain(fn, X, capture=pattern)
    assert np.any(explain(fn, X, condition={"stream": jnp.ones(H)}).relevance)
    with pytest.raises(jlrp.InputError, match="capture_steps=N"):
        explain(fn, X, condition={"stream": jnp.ones((3, 1, 1))})
    for steps in (0, True, 2.0):
        with pytest.raises(jlrp.InputError, match="at least 1"):
            jlrp.explain(fn, capture="stream", capture_steps=steps)


def test_each_example_of_a_batched_while_loop_has_its_own_iterations():
    """Under a vmap around the loop, those that have ended are zeros."""

    def one(p, x):
        def body(state):
            h, i = state
            return jlrp.tag(h + jnp.tanh(h @ p["u"]), "stream"), i + 1

        n = jnp.where(x[0] > 0, 3, 1)
        h, _ = lax.while_loop(lambda s: s[1] < n, body, (x, 0))
        return h @ p["out"]

    x = X.at[:, 0].set(jnp.array([1.0, -1.0]))
    options = dict(capture="stream", composite="epsilon", capture_steps=4)
    inside = explain(lambda p, x: jax.vmap(lambda x: one(p, x))(x), x, **options)
    explainer = jlrp.explain(one, **options)
    outside = jax.vmap(lambda x: explainer(P, x, 0))(x)
    alone = [explainer(P, row, 0) for row in x]
    for i, e in enumerate(alone):
        assert_close(inside.captured["stream"][:, i], e.captured["stream"])
        assert_close(outside.captured["stream"][i], e.captured["stream"])
    assert [int(np.any(e.captured["stream"], -1).sum()) for e in alone] == [3, 1]


def test_a_while_loop_in_a_scan_and_a_scan_in_a_while_loop():
    def run(h, w, n):
        def inner(h, v):
            return jlrp.tag(h + jnp.tanh(h @ v), "inner"), None

        def body(state):
            return lax.scan(inner, state[0], jnp.stack([w, w.T]))[0], state[1] + 1

        return lax.while_loop(lambda s: s[1] < n, body, (h, 0))[0]

    def fn(p, x):
        counts = jnp.array([1, 0, 2])
        step = lambda h, layer: (run(h, *layer), None)  # noqa: E731
        return lax.scan(step, x, (p["layers"], counts))[0] @ p["out"]

    def twin(p, x):
        for i, n in enumerate((1, 0, 2)):
            for j in range(n):
                for k, v in enumerate((p["layers"][i], p["layers"][i].T)):
                    name = written("inner", (i, j, k))
                    x = jlrp.tag(x + jnp.tanh(x @ v), name)
        return x @ p["out"]

    got = explain(fn, X, capture="inner", composite="epsilon", capture_steps=2)
    want = explain(twin, X, capture="inner*", composite="epsilon")
    rows = got.captured["inner"]
    assert_close(got.relevance, want.relevance)
    assert rows.shape == (3, 2, 2, B, H)
    assert_close(rows, stacked(want.captured, "inner", rows.shape, 3))
    with pytest.raises(jlrp.InputError, match="ran 2 times"):
        explain(fn, X, capture="inner", composite="epsilon", capture_steps=1)


def test_a_branch_that_was_not_taken_has_zeros():
    def fn(p, x):
        branches = [
            lambda h: jlrp.tag(relu(h @ p["u"]), "first"),
            lambda h: h + jlrp.tag(jnp.tanh(h @ p["u"]), "second"),
        ]
        return lax.switch((x[0, 0] > 0).astype(int), branches, x) @ p["out"]

    def twin(p, x):
        return (x + jlrp.tag(jnp.tanh(x @ p["u"]), "second")) @ p["out"]

    x = X.at[0, 0].set(1.0)
    mask = normal(H)
    for options in ({}, {"condition": {"second": mask}}):
        got = explain(fn, x, capture="*", composite="epsilon", **options)
        want = explain(twin, x, capture="*", composite="epsilon", **options)
        assert_close(got.captured["second"], want.captured["second"])
        assert_close(got.relevance, want.relevance)
        assert not np.any(got.captured["first"]) and np.any(got.captured["second"])
        assert got.captured["first"].shape == (B, H)


# What a name stands for.


def layer(h, w):
    with jax.named_scope("layer"):
        h = h + relu(h @ w)
    return h, h


def scores(h, p):
    return h @ p["out"]


def written_out(p, x, n=N):
    for i in range(n):
        x = jlrp.tag(x + relu(x @ p["layers"][i]), f"layer.{i}")
    return scores(x, p)


@functools.cache
def layers_alone():
    e = explain(written_out, X, capture="layer.*", composite="epsilon")
    return jnp.stack(list(e.captured.values()))


def test_a_scope_in_a_body_ends_with_the_body():
    """The scopes around a loop end behind it: what it hands to itself is inside."""

    def fn(p, x):
        with jax.named_scope("encoder"):
            h, _ = lax.scan(layer, x, p["layers"])
        return scores(h, p)

    e = explain(fn, X, capture="**", composite="epsilon")
    assert sorted(e.captured) == ["encoder", "encoder/layer"]
    assert_close(e.captured["encoder/layer"], layers_alone())
    assert_close(e.captured["encoder"], layers_alone()[-1])
    assert e.captured["encoder"].shape == (B, H)


def test_a_name_inside_and_outside_has_both_in_the_order_of_the_program():
    def fn(p, x):
        h, _ = layer(x, p["layers"][0])
        h, _ = lax.scan(layer, h, p["layers"][1:])
        h, _ = layer(h, p["u"])
        return scores(h, p)

    def twin(p, x):
        layers = jnp.concatenate([p["layers"], p["u"][None]])
        return written_out(p | {"layers": layers}, x, N + 1)

    e = explain(fn, X, capture="layer", composite="epsilon")
    first, scanned, last = e.captured["layer"]
    want = explain(twin, X, capture="layer.*", composite="epsilon").captured
    assert_close(jnp.stack([first, *scanned, last]), jnp.stack(list(want.values())))
    with pytest.raises(jlrp.SelectorError, match="names 3"):
        explain(fn, X, condition={"layer": 0.0})


def test_a_stacked_output_that_is_not_read_names_what_it_stacks():
    def fn(p, x):
        h, hs = lax.scan(layer, x, p["layers"])
        jlrp.tag(hs, "layers")
        return scores(h, p)

    e = explain(fn, X, capture=("layers", "layer"), composite="epsilon")
    assert_close(e.captured["layers"], layers_alone())
    assert_close(e.captured["layer"], layers_alone())
    masks = normal(N, B, H)
    twin = {f"layer.{i}": mask for i, mask in enumerate(masks)}
    want = explain(written_out, X, condition=twin, composite="epsilon").relevance
    for name in ("layers", "layer"):
        got = explain(fn, X, condition={name: masks}, composite="epsilon").relevance
        assert_close(got, want)


def test_a_stacked_output_of_nested_scans_that_is_not_read():
    def outer(h, ws):
        return lax.scan(layer, h, ws)

    def fn(p, x):
        h, hs = lax.scan(outer, x, p["grid"])
        jlrp.tag(hs, "layers")
        return scores(h, p)

    e = explain(fn, X, capture="**", composite="epsilon")
    assert e.captured["layers"].shape == (2, 2, B, H)
    assert_close(e.captured["layers"], e.captured["layer"])
    assert np.any(e.captured["layer"])


def test_a_stacked_output_that_is_read_is_a_value_of_its_own():
    """It stands for what its readers give it, as ``jnp.stack`` does written out."""

    def fn(p, x, scan):
        h, hs = scan(layer, x, p["layers"])
        return scores(jnp.tanh(h) + jlrp.tag(hs, "stacked").mean(0), p)

    got, want = (
        explain(functools.partial(fn, scan=scan), X, capture="stacked")
        for scan in (lax.scan, WrittenOut().scan)
    )
    assert_close(got.captured["stacked"], want.captured["stacked"])


def test_a_value_on_no_path_has_zeros_of_its_own_shape():
    def fn(p, x):
        def body(h, w):
            jlrp.tag(jnp.cos(h).sum(-1), "unused")
            kernel = jlrp.tag(w * 2.0, "kernel")
            return h + relu(h @ kernel), jlrp.tag(h[:, :1] > 0, "flag").astype(float)

        h, flags = lax.scan(body, x, p["layers"])
        dead, _ = lax.scan(lambda h, w: (jlrp.tag(h @ w, "dead"), None), x, p["layers"])
        jlrp.tag(dead, "dead end")
        return scores(h, p) + 0.0 * lax.stop_gradient(flags.sum())

    found = explain(fn, X, capture="*", composite="epsilon").captured
    shapes = {"unused": (N, B), "kernel": (N, H, H), "flag": (N, B, 1)}
    shapes |= {"dead": (N, B, H), "dead end": (B, H)}
    assert {name: r.shape for name, r in found.items()} == shapes
    assert not any(map(np.any, found.values()))


def test_a_carry_can_be_named_where_it_comes_in():
    def fn(p, x):
        def body(h, w):
            h = jlrp.tag(h, "before")
            return h + relu(h @ w), None

        return scores(lax.scan(body, x, p["layers"])[0], p)

    e = explain(fn, X, capture="before", composite="epsilon")
    assert_close(e.captured["before"][1:], layers_alone()[:-1])
    assert_close(e.captured["before"][0], e.relevance)
    half = jnp.array([1.0, 1.0, 0.5])[:, None, None]
    got = explain(fn, X, condition={"before": half}, composite="epsilon").relevance
    assert_close(got, e.relevance / 2)


def test_a_carry_is_one_value_where_it_goes_out_and_comes_in():
    """In flow, too: it is made when the iteration before makes it."""

    def make(on):
        def fn(p, x):
            def step(h, w):
                h = on.name(h, "in")
                made = jnp.tanh(h @ w) * jax.nn.sigmoid(h)
                return made, (made, on.name(made + h, "out"))

            h, (hs, outs) = on.scan(step, x, p["layers"])
            return scores(jnp.cos(h) + hs.mean(0) + outs[0], p)

        return fn

    fn, twin = make(Looped()), make(WrittenOut())
    want = flow.between(twin, P, X, tags(twin, X), 0, composite="epsilon")
    got = flow.between(fn, P, X, ("in", "out"), 0, composite="epsilon")
    scale = max(map(abs, want.values()))
    for (a, b), amount in want.items():
        assert got[label(a), label(b)] == pytest.approx(amount, abs=1e-10 * scale)


def label(node):
    name, *index = node.split(".")
    return f"{name}[{', '.join(index)}]" if index else name


def test_masks_that_do_not_fit_are_refused_with_both_shapes():
    def fn(p, x):
        return scores(lax.scan(layer, x, p["layers"])[0], p)

    for mask in (jnp.ones(H + 1), jnp.ones((N + 1, 1, 1)), jnp.ones((1, N, B, H))):
        with pytest.raises(jlrp.InputError, match=r"\(2, 4\), or to \(3, 2, 4\)"):
            explain(fn, X, condition={"layer": mask})


def test_a_loop_with_a_rule_as_a_whole_hides_its_names():
    def fn(p, x):
        return scores(lax.scan(layer, x, p["layers"])[0], p)

    whole = jlrp.Composite([("scan", jlrp.rules.Gradient())], base="epsilon")
    for options in ({"capture": "layer"}, {"condition": {"layer": jnp.ones(H)}}):
        with pytest.raises(jlrp.SelectorError, match="layer"):
            explain(fn, X, composite=whole, **options)


# Libraries.


def test_layers_of_a_scanned_linen_model():
    linen = pytest.importorskip("flax.linen")

    class Block(linen.Module):
        @linen.compact
        def __call__(self, x, _):
            h = linen.LayerNorm(name="norm")(x)
            h = linen.Dense(6, name="up")(h)
            return x + linen.Dense(H, name="down")(linen.gelu(h)), None

    class Net(linen.Module):
        @linen.compact
        def __call__(self, x):
            scanned = linen.scan(
                linen.remat(Block),
                variable_axes={"params": 0},
                split_rngs={"params": True},
                length=N,
            )
            return scanned(name="blocks")(x, None)[0] @ P["out"]

    net = Net()
    params = net.init(jax.random.key(0), X)
    options = dict(composite="attnlrp")
    found = jlrp.explain(net.apply, capture="Net/**", **options)(params, X, 0)

    def twin(params, x):
        for i in range(N):
            one = jax.tree.map(lambda leaf: leaf[i], params["params"]["blocks"])  # noqa: B023
            x, _ = Block().apply({"params": one}, x, None)
            x = jlrp.tag(x, f"block.{i}")
        return x @ P["out"]

    want = jlrp.explain(twin, capture="block.*", **options)(params, X, 0)
    assert_close(found.relevance, want.relevance)
    inside = {"Net/blocks", *(f"Net/blocks/{n}" for n in ("norm", "up", "down"))}
    assert set(found.captured) == inside
    assert found.captured["Net/blocks/norm"].shape == (N, B, H)
    blocks = jnp.stack(list(want.captured.values()))
    assert_close(found.captured["Net/blocks"], blocks)


def test_blocks_of_a_scanned_nnx_model():
    nnx = pytest.importorskip("flax.nnx")

    class Block(nnx.Module):
        def __init__(self, rngs):
            self.attention = nnx.MultiHeadAttention(
                2,
                H,
                decode=False,
                rngs=rngs,
                param_dtype=jnp.float64,
                dtype=jnp.float64,
            )
            self.mlp = nnx.Linear(H, H, rngs=rngs, param_dtype=jnp.float64)

        def __call__(self, x, i=None):
            x = x + self.attention(x)
            x = x + nnx.gelu(self.mlp(x))
            return jlrp.tag(x, "block" if i is None else f"block.{i}")

    make = nnx.split_rngs(splits=N)(nnx.vmap(Block, in_axes=0, out_axes=0))
    graph, state = nnx.split(make(nnx.Rngs(0)))

    def fn(state, x):
        model = nnx.merge(graph, state)
        run = nnx.scan(
            lambda x, block: block(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry
        )
        return run(x, model).mean(1) @ P["out"]

    def twin(state, x):
        for i in range(N):
            one = jax.tree.map(lambda leaf: leaf[i], state)  # noqa: B023
            x = nnx.merge(graph, one)(x, i)
        return x.mean(1) @ P["out"]

    options = dict(composite="attnlrp")
    got = jlrp.explain(fn, capture="block", **options)(state, SEQUENCE, 0)
    want = jlrp.explain(twin, capture="block.*", **options)(state, SEQUENCE, 0)
    assert_close(got.relevance, want.relevance)
    assert_close(got.captured["block"], jnp.stack(list(want.captured.values())))


# Transformations, the ledger, flow.


def test_under_jit_vmap_and_grad():
    fn, x = mlp(Looped())
    explainer = jlrp.explain(fn, capture="stream", composite="epsilon")
    want = explainer(P, x, 0)
    jitted = jax.jit(explainer)(P, x, 0)
    one = jax.vmap(lambda row: explainer(P, row[None], 0))(x)
    for got in (
        jitted.captured["stream"],
        one.captured["stream"][:, :, 0].swapaxes(0, 1),
    ):
        assert_close(got, want.captured["stream"])

    def total(b):
        found = explainer(P | {"biases": b}, x, 0).captured["stream"]
        return jnp.sum(found**2)

    direction, step = normal(N, H), 1e-6
    slope = jnp.vdot(jax.grad(total)(P["biases"]), direction)
    ahead, behind = (total(P["biases"] + s * direction) for s in (step, -step))
    np.testing.assert_allclose(slope, (ahead - behind) / (2 * step), rtol=1e-5)


def test_the_ledger_says_what_masks_in_a_loop_blocked():
    fn, x = mlp(Looped())
    mask = {"stream": jnp.array([1.0, 0.25, 1.0])[:, None, None]}
    ledger = jlrp.audit(fn, P, x, 0, composite="epsilon", condition=mask)
    e = explain(fn, x, capture="stream", condition=mask, composite="epsilon")
    blocked = ledger.total("blocked")  # three times what was left over
    assert blocked == pytest.approx(3.0 * float(e.captured["stream"][1].sum()))
    assert ledger.unexplained <= 1e-9 * abs(ledger.seed)


@pytest.mark.parametrize("make", [mlp, nested, branching])
def test_flow_between_iterations_is_that_of_the_loop_written_out(make):
    (fn, x), (twin, _) = make(Looped()), make(WrittenOut())
    each = tags(twin, x)
    want = flow.between(twin, P, x, each, 0, composite="epsilon")
    got = flow.between(fn, P, x, names_of(each), 0, composite="epsilon")
    assert list(got)[0][0] == "output" and list(got)[-1][1] == "input"

    scale = max(map(abs, want.values()))
    for (a, b), amount in want.items():
        assert got.pop((label(a), label(b))) == pytest.approx(amount, abs=1e-10 * scale)
    assert not any(got.values())  # branches that were not taken


def test_flow_in_a_while_loop():
    (fn, x), (twin, _) = whiled(Looped()), whiled(WrittenOut())
    want = flow.between(twin, P, x, "stream*", 0, composite="epsilon")
    got = flow.between(fn, P, x, "stream", 0, composite="epsilon", capture_steps=3)
    np.testing.assert_allclose(list(got.values()), list(want.values()), atol=1e-10)
    with pytest.raises(jlrp.InputError, match="ran 3 times"):
        flow.between(fn, P, x, "stream", 0, composite="epsilon", capture_steps=2)
    with pytest.raises(jlrp.InputError, match="capture_steps"):
        flow.between(fn, P, x, "stream", 0)
