"""Transformers and gated networks: one explanation, however they are written."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jlrp
from jlrp.reports import CAUSES

pytestmark = pytest.mark.relaxed  # models promote dtypes and ranks as users write them

B, T, D, H, K, F, E = 2, 5, 16, 4, 4, 6, 4  # heads H of size K; experts E of width F
RNG = np.random.default_rng(5)
normal = lambda *shape: jnp.asarray(RNG.normal(size=shape))  # noqa: E731
P = {name: normal(D, D) / 2 for name in ("q", "k", "v", "o", "r", "s")}
P |= {f"b{name}": normal(D) / 2 for name in ("q", "k", "v", "o")}
P |= {"k2": normal(D, D // 2), "v2": normal(D, D // 2)}  # two heads for four
P |= {"scale": normal(D), "shift": normal(D)}
P |= {"gate": normal(D, F), "up": normal(D, F), "down": normal(F, D)}
P |= {"router": normal(D, E), "ffn": normal(D, F), "bffn": normal(F)}
P |= {"eg": normal(E, D, F), "eu": normal(E, D, F), "ed": normal(E, F, D)}
P |= {"squeeze": normal(D, 3), "excite": normal(3, D)}
P |= {"bias": normal(H, T, T), "near": normal(2 * T - 1, H)}
P |= {"table": normal(11, D), "positions": normal(T, D), "classes": normal(D, 3)}
X = normal(B, T, D)
OTHER = normal(B, 3, D)
COMPOSITES = {"attnlrp": jlrp.composites.attnlrp(), "cp_lrp": jlrp.composites.cp_lrp()}
both = pytest.mark.parametrize("composite", COMPOSITES)
CAUSAL = jnp.tril(jnp.ones((T, T), bool))
PADDED = jnp.arange(T) < 3
stop = lax.stop_gradient


@pytest.fixture(autouse=True)
def _same_numbers():
    """What a test draws does not depend on which tests ran before it."""
    RNG.bit_generator.state = np.random.default_rng(15).bit_generator.state


def seed_like(fn, x):
    shape = jax.eval_shape(fn, P, x).shape
    return jnp.linspace(-1.0, 2.0, int(np.prod(shape))).reshape(shape)


def relevance(fns, composite, x=X):
    """Relevance of several functions, in one program."""

    @jax.jit
    def explain(x):
        composed = COMPOSITES.get(composite, composite)
        return [
            jlrp.relevance(fn, P, x, seed_like(fn, x), composite=composed) for fn in fns
        ]

    return explain(x)


def assert_all_equal(found, tolerance=1e-10):
    first, *others = found
    scale = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(first))
    assert np.isfinite(scale) and scale > 0
    for other in others:
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(
                a, b, rtol=0, atol=tolerance * scale
            ),
            other,
            first,
        )


def table(cases):
    return pytest.mark.parametrize("case", cases.values(), ids=list(cases))


def kinds(fn, x=X, composite="attnlrp"):
    report = jlrp.inspect(fn, P, x, seed_like(fn, x), composite=composite)
    return [row.kind for row in report.operations]


# Attention: each spelling is one function (params, x) -> (B, T, D).


def split(y):
    return y.reshape(*y.shape[:2], -1, K)


def qkv(p, x, memory=None):
    """Queries, keys, values (batch, position, head, feature)."""
    memory = x if memory is None else memory
    sources = {"q": x, "k": memory, "v": memory}
    return [split(s @ p[name] + p[f"b{name}"]) for name, s in sources.items()]


def joined(p, o):
    return o.reshape(*o.shape[:2], D) @ p["o"] + p["bo"]


def softmax(s):
    return jax.nn.softmax(s, axis=-1)


def by_einsum(p, x, prepare=lambda s: s, softmax=softmax):
    q, k, v = qkv(p, x)
    s = prepare(jnp.einsum("bthk,bshk->bhts", q, k) * K**-0.5)
    return joined(p, jnp.einsum("bhts,bshk->bthk", softmax(s), v))


def by_matmul(p, x):
    q, k, v = (a.transpose(0, 2, 1, 3) for a in qkv(p, x))
    w = softmax(q @ k.swapaxes(-1, -2) / jnp.sqrt(float(K)))
    return joined(p, (w @ v).transpose(0, 2, 1, 3))


def attend(q, k, v, mask=None):
    """``jax.nn.dot_product_attention`` without its cast to float32."""
    s = jnp.einsum("bthk,bshk->bhts", q, k) * q.shape[-1] ** -0.5
    s = s if mask is None else jnp.where(mask, s, -jnp.inf)
    return jnp.einsum("bhts,bshk->bthk", softmax(s), v)


def by_product_and_sum(p, x):
    q, k, v = qkv(p, x)
    s = jnp.sum(q[:, :, None] * k[:, None], -1) * K**-0.5  # (B, T, S, H)
    w = jax.nn.softmax(s, axis=2)
    return joined(p, jnp.sum(w[..., None] * v[:, None], 2))


def keys_first(p, x):
    q, k, v = qkv(p, x)
    s = jnp.einsum("bshk,bthk->sbth", k, q) * K**-0.5
    return joined(p, jnp.einsum("sbth,bshk->bthk", jax.nn.softmax(s, axis=0), v))


def heads_last(p, x):
    """Head axis last: the projections make (batch, position, feature, head)."""

    def project(name):
        kernel = p[name].reshape(D, H, K).swapaxes(1, 2)
        bias = p[f"b{name}"].reshape(H, K).T
        return jnp.einsum("btd,dkh->btkh", x, kernel) + bias

    q, k, v = map(project, "qkv")
    s = jnp.einsum("btkh,bskh->btsh", q, k) * K**-0.5
    o = jnp.einsum("btsh,bskh->btkh", jax.nn.softmax(s, axis=2), v)
    kernel = p["o"].reshape(H, K, D).swapaxes(0, 1)
    return jnp.einsum("btkh,khd->btd", o, kernel) + p["bo"]


def heads_first(p, x):
    def project(name):
        kernel = p[name].reshape(D, H, K)
        bias = p[f"b{name}"].reshape(H, 1, 1, K)
        return jnp.einsum("btd,dhk->hbtk", x, kernel) + bias

    q, k, v = map(project, "qkv")
    w = softmax(jnp.einsum("hbtk,hbsk->hbts", q * K**-0.5, k))
    o = jnp.einsum("hbts,hbsk->hbtk", w, v)
    return jnp.einsum("hbtk,hkd->btd", o, p["o"].reshape(H, K, D)) + p["bo"]


def one_head_at_a_time(p, x):
    q, k, v = qkv(p, x)
    found = [
        softmax(q[:, :, h] @ k[:, :, h].swapaxes(1, 2) * K**-0.5) @ v[:, :, h]
        for h in range(H)
    ]
    return joined(p, jnp.concatenate(found, -1))


def vmapped(p, x):
    def head(q, k, v):
        return softmax(q @ k.T * K**-0.5) @ v

    per_example = jax.vmap(head, in_axes=1, out_axes=1)
    return joined(p, jax.vmap(per_example)(*qkv(p, x)))


def fused(p, x):
    kernel = jnp.concatenate([p["q"], p["k"], p["v"]], 1)
    bias = jnp.concatenate([p["bq"], p["bk"], p["bv"]])
    q, k, v = map(split, jnp.split(x @ kernel + bias, 3, -1))
    return joined(p, attend(q, k, v))


def fused_in_one_axis(p, x):
    kernel = jnp.stack([p[n].reshape(D, H, K) for n in "qkv"], 1)
    bias = jnp.stack([p[f"b{n}"].reshape(H, K) for n in "qkv"])
    q, k, v = jnp.moveaxis(jnp.einsum("btd,dnhk->btnhk", x, kernel) + bias, 2, 0)
    return joined(p, attend(q, k, v))


def query_scaled(p, x):
    q, k, v = qkv(p, x)
    s = jnp.einsum("bthk,bshk->bhts", q / jnp.sqrt(jnp.asarray(K, q.dtype)), k)
    return joined(p, jnp.einsum("bhts,bshk->bthk", softmax(s), v))


def both_scaled(p, x):
    q, k, v = (a * K**-0.25 for a in qkv(p, x))
    w = softmax(jnp.einsum("bthk,bshk->bhts", q, k))
    return joined(p, jnp.einsum("bhts,bshk->bthk", w, v) * K**0.25)


def kernel_scaled(p, x):
    q, k, v = qkv(p | {"q": p["q"] * K**-0.5, "bq": p["bq"] * K**-0.5}, x)
    w = softmax(jnp.einsum("bthk,bshk->bhts", q, k))
    return joined(p, jnp.einsum("bhts,bshk->bthk", w, v))


ATTENTION = [
    by_einsum,
    by_matmul,
    by_product_and_sum,
    keys_first,
    heads_last,
    heads_first,
    one_head_at_a_time,
    vmapped,
    fused,
    fused_in_one_axis,
    query_scaled,
    both_scaled,
    kernel_scaled,
]


def halved(a, b, product, gate=None):
    """A product whose gradient is half for each operand, or none for the gate."""
    if gate == "a":
        return product(stop(a), b)
    return (product(a, stop(b)) + product(stop(a), b)) / 2


def attention_reference(composite, x):
    """x times the gradient of LXT's efficient form, written out."""
    gate = "a" if composite == "cp_lrp" else None

    def scored(x):
        q, k, v = qkv(P, x)
        s = halved(q, k, functools.partial(jnp.einsum, "bthk,bshk->bhts")) * K**-0.5
        mix = functools.partial(jnp.einsum, "bhts,bshk->bthk")
        y = joined(P, halved(softmax(s), v, mix, gate))
        return jnp.sum(y * seed_like(by_einsum, x))

    return x * jax.grad(scored)(x)


@both
def test_attention_in_every_spelling(composite):
    expected = attention_reference(composite, X)
    assert_all_equal([expected, *relevance(ATTENTION, composite)])


LIBRARY = {
    "plain": (ATTENTION[0], {}),
    "causal": (
        functools.partial(by_einsum, prepare=lambda s: where(s, -jnp.inf)),
        {"is_causal": True},
    ),
    "masked": (
        functools.partial(by_einsum, prepare=lambda s: where(s, -jnp.inf)),
        {"mask": CAUSAL},
    ),
    "window": (
        functools.partial(
            by_einsum, prepare=lambda s: jnp.where(window(s), s, -jnp.inf)
        ),
        {"local_window_size": 1},
    ),
    "bias": (
        functools.partial(by_einsum, prepare=lambda s: s + P["bias"]),
        {"bias": P["bias"][None]},
    ),
}


@both
def test_attention_of_the_library(composite):
    """``jax.nn.dot_product_attention`` computes its softmax in float32."""
    for name, (plain, options) in LIBRARY.items():

        def fn(p, x, options=options):
            return joined(p, jax.nn.dot_product_attention(*qkv(p, x), **options))

        assert_all_equal(relevance([plain, fn], composite), 1e-5)
        assert kinds(fn).count("softmax") == 1, name

    def groups(p, x):
        return joined(p, jax.nn.dot_product_attention(*grouped(p, x)))

    assert_all_equal(relevance([GROUPED[0], groups], composite), 1e-5)


def test_attnlrp_and_cp_lrp_differ_in_attention():
    (attn,), (cp,) = (relevance([by_einsum], name) for name in COMPOSITES)
    assert float(jnp.abs(attn - cp).max()) > 0.01 * float(jnp.abs(attn).max())


# The same network each time, in other words.


def softmaxes():
    def masked_max(s):
        e = jnp.exp(s - stop(s.max(-1, keepdims=True)))
        return e / e.sum(-1, keepdims=True)

    def inverse(s):
        e = jnp.exp(s)
        return e * (1.0 / e.sum(-1, keepdims=True))

    def power(s):
        e = jnp.exp(s - s.max(-1, keepdims=True))
        return e * e.sum(-1, keepdims=True) ** -1

    def log(s):
        return jnp.exp(jax.nn.log_softmax(s, axis=-1))

    def logsumexp(s):
        return jnp.exp(s - jax.nn.logsumexp(s, axis=-1, keepdims=True))

    def no_shift(s):
        return jnp.exp(s - jnp.log(jnp.exp(s).sum(-1, keepdims=True)))

    def turned(s):
        return jax.nn.softmax(s.transpose(3, 0, 1, 2), axis=0).transpose(1, 2, 3, 0)

    found = [softmax, masked_max, inverse, power, log, logsumexp, no_shift, turned]
    return [functools.partial(by_einsum, softmax=s) for s in found]


def with_mask(prepare, after=lambda w: w):
    return functools.partial(
        by_einsum, prepare=prepare, softmax=lambda s: after(softmax(s))
    )


def where(s, low):
    return jnp.where(CAUSAL, s, low)


MASKS = [
    with_mask(lambda s: where(s, -jnp.inf)),
    with_mask(lambda s: where(s / 0.5, -jnp.inf) * 0.5),
    with_mask(lambda s: where(s * 2, -1e30) / 2),
    with_mask(lambda s: where(s, jnp.finfo(s.dtype).min)),
    with_mask(lambda s: s + jnp.where(CAUSAL, 0.0, -jnp.inf)),
    with_mask(lambda s: s + (1.0 - CAUSAL) * -1e9),
    with_mask(lambda s: jnp.where(~CAUSAL, -1e9, s)),
    with_mask(
        lambda s: lax.select(
            jnp.broadcast_to(CAUSAL, s.shape), s, jnp.full_like(s, -1e9)
        )
    ),
    with_mask(lambda s: where(s, -jnp.inf), lambda w: jnp.where(CAUSAL, w, 0.0)),
]


def window(s):
    i = jnp.arange(T)
    return jnp.abs(i[:, None] - i) <= 1


def windowed_by_slices(p, x):
    """Each query sees its neighbours: keys are shifted, not masked."""
    q, k, v = qkv(p, x)
    pad = ((0, 0), (1, 1), (0, 0), (0, 0))
    near = [jnp.pad(k, pad)[:, i : i + T] for i in range(3)]
    s = jnp.stack([jnp.sum(q * n, -1) for n in near], -1) * K**-0.5  # (B, T, H, 3)
    i = jnp.arange(T)[:, None] + jnp.arange(3) - 1
    w = softmax(jnp.where(((i >= 0) & (i < T))[:, None], s, -jnp.inf))
    v = jnp.stack([jnp.pad(v, pad)[:, i : i + T] for i in range(3)], -1)
    return joined(p, jnp.sum(w[..., None, :] * v, -1))


WINDOWS = [
    with_mask(lambda s: jnp.where(window(s), s, -jnp.inf)),
    windowed_by_slices,
]


def grouped(p, x):
    q = split(x @ p["q"] + p["bq"])
    return q, split(x @ p["k2"]), split(x @ p["v2"])


def grouped_by(repeat):
    def fn(p, x):
        q, k, v = grouped(p, x)
        k, v = repeat(k), repeat(v)
        w = softmax(jnp.einsum("bthk,bshk->bhts", q, k) * K**-0.5)
        return joined(p, jnp.einsum("bhts,bshk->bthk", w, v))

    return fn


def grouped_einsum(p, x):
    q, k, v = grouped(p, x)
    q = q.reshape(B, T, 2, 2, K)
    w = softmax(jnp.einsum("btgnk,bsgk->bgnts", q, k) * K**-0.5)
    return joined(p, jnp.einsum("bgnts,bsgk->btgnk", w, v))


GROUPED = [
    grouped_by(lambda k: jnp.repeat(k, 2, axis=2)),
    grouped_by(
        lambda k: jnp.broadcast_to(k[:, :, :, None], (B, T, 2, 2, K)).reshape(
            B, T, H, K
        )
    ),
    grouped_by(lambda k: k[:, :, jnp.arange(H) // 2]),
    grouped_by(lambda k: jnp.stack([k, k], 3).reshape(B, T, H, K)),
    grouped_einsum,
]


def relative_by_gather(p, x):
    i = jnp.arange(T)
    bias = p["near"][i[:, None] - i + T - 1].transpose(2, 0, 1)
    return by_einsum(p, x, lambda s: s + bias)


def relative_by_slices(p, x):
    rows = [p["near"][T - 1 - j + jnp.arange(T)] for j in range(T)]
    bias = jnp.stack(rows, 1).transpose(2, 0, 1)
    q, k, v = qkv(p, x)
    s = K**-0.5 * jnp.einsum("bthk,bshk->bhts", q, k)
    o = jnp.einsum("bhts,bshk->bthk", softmax(bias[None] + s), v)
    return joined(p, o)


ANGLES = np.arange(T)[:, None, None] / 10.0 ** np.arange(K // 2)  # (T, 1, K / 2)
COS, SIN = np.cos(ANGLES), np.sin(ANGLES)


def rotary(rotate):
    def fn(p, x):
        q, k, v = qkv(p, x)
        q, k = rotate(q, COS, SIN), rotate(k, COS, SIN)
        return joined(p, attend(q, k, v))

    return fn


def twice(a):
    return jnp.concatenate([a, a], -1)


def rotate_half(a, cos, sin):
    turned = jnp.concatenate([-a[..., K // 2 :], a[..., : K // 2]], -1)
    return a * twice(cos) + turned * twice(sin)


def rotate_parts(a, cos, sin):
    u, v = jnp.split(a, 2, -1)
    return jnp.concatenate([u * cos - v * sin, v * cos + u * sin], -1)


def rotate_stacked(a, cos, sin):
    u, v = jnp.moveaxis(a.reshape(*a.shape[:-1], 2, K // 2), -2, 0)
    return jnp.stack([u * cos - v * sin, u * sin + v * cos], -2).reshape(a.shape)


def rotate_by_matrix(a, cos, sin):
    c, s = (jax.vmap(jnp.diag)(v[:, 0]) for v in (cos, sin))
    upper, lower = jnp.concatenate([c, -s], 2), jnp.concatenate([s, c], 2)
    return jnp.einsum("bthk,tjk->bthj", a, jnp.concatenate([upper, lower], 1))


def capped(cap):
    return functools.partial(by_einsum, prepare=cap)


def cross(p, x):
    return joined(p, attend(*qkv(p, x["x"], x["memory"])))


def cross_by_product_and_sum(p, x):
    q, k, v = qkv(p, x["x"], x["memory"])
    w = jax.nn.softmax(jnp.sum(q[:, :, None] * k[:, None], -1) * K**-0.5, axis=2)
    return joined(p, jnp.sum(w[..., None] * v[:, None], 2))


def cross_transposed(p, x):
    q, k, v = qkv(p, x["x"], x["memory"])
    s = jnp.einsum("bshk,bthk->hsbt", k, q / K**0.5)
    return joined(p, jnp.einsum("hsbt,bshk->bthk", jax.nn.softmax(s, axis=1), v))


def linear_attention(associate):
    def fn(p, x):
        return joined(p, associate(*qkv(p, x)))

    return fn


def kernelised(associate):
    def fn(p, x):
        q, k, v = qkv(p, x)
        q, k = jax.nn.elu(q) + 1, jax.nn.elu(k) + 1
        return joined(p, associate(q, k, v))

    return fn


def three(product):
    return lambda p, x: product(x @ p["q"], x @ p["k"], x @ p["v"])


SAME = {
    "softmax": softmaxes(),
    "mask": MASKS,
    "sliding window": WINDOWS,
    "grouped queries": GROUPED,
    "additive bias": [
        lambda p, x: by_einsum(p, x, lambda s: s + p["bias"]),
        lambda p, x: by_einsum(p, x, lambda s: p["bias"][None] + s),
        lambda p, x: by_einsum(p, x, lambda s: (s * 2 + 2 * p["bias"]) / 2),
    ],
    "relative positions": [relative_by_gather, relative_by_slices],
    "rotary positions": [
        rotary(r) for r in (rotate_half, rotate_parts, rotate_stacked, rotate_by_matrix)
    ],
    "soft cap": [
        capped(lambda s: 2.0 * jnp.tanh(s / 2.0)),
        capped(lambda s: jnp.tanh(s * 0.5) * 2.0),
        capped(lambda s: 2.0 * (1 - 2 / (jnp.exp(s) + 1))),
        capped(lambda s: 2.0 * (2 * jax.nn.sigmoid(s) - 1)),
    ],
    "three factors": [
        three(lambda a, b, c: (a * b) * c),
        three(lambda a, b, c: a * (b * c)),
        three(lambda a, b, c: c * a * b),
        three(lambda a, b, c: jnp.einsum("btd,btd,btd->btd", a, b, c)),
        three(lambda a, b, c: -0.5 * ((a * 2.0) * (b * -1.0)) * c),
        three(lambda a, b, c: (a.swapaxes(1, 2) * b.swapaxes(1, 2)).swapaxes(1, 2) * c),
    ],
    "three factors, summed": [
        three(lambda a, b, c: jnp.sum((a * b) * c, -1)),
        three(lambda a, b, c: jnp.sum(a * (b * c), -1)),
        three(lambda a, b, c: jnp.einsum("btd,btd->bt", a * b, c)),
        three(lambda a, b, c: jnp.einsum("btd,btd->bt", a, b * c)),
        three(lambda a, b, c: jax.vmap(jax.vmap(jnp.dot))(a * c, b)),
    ],
    "linear attention": [
        linear_attention(lambda q, k, v: jnp.einsum("bthk,bshk,bshj->bthj", q, k, v)),
        linear_attention(
            lambda q, k, v: jnp.einsum(
                "bhts,bshj->bthj", jnp.einsum("bthk,bshk->bhts", q, k), v
            )
        ),
        linear_attention(
            lambda q, k, v: jnp.einsum(
                "bthk,bhkj->bthj", q, jnp.einsum("bshk,bshj->bhkj", k, v)
            )
        ),
    ],
    "linear attention by sums": [
        linear_attention(
            lambda q, k, v: jnp.einsum(
                "bthk,bhkj->bthj", q, jnp.einsum("bshk,bshj->bhkj", k, v)
            )
        ),
        linear_attention(
            lambda q, k, v: jnp.sum(
                q[..., None] * jnp.sum(k[..., None] * v[..., None, :], 1)[:, None], -2
            )
        ),
    ],
    "kernelised attention": [
        kernelised(
            lambda q, k, v: jnp.einsum(
                "bthk,bhkj->bthj", q, jnp.einsum("bshk,bshj->bhkj", k, v)
            )
        ),
        kernelised(
            lambda q, k, v: jnp.einsum(
                "bhts,bshj->bthj", jnp.einsum("bthk,bshk->bhts", q, k), v
            )
        ),
    ],
}


@both
@pytest.mark.parametrize("name", SAME)
def test_the_same_in_every_spelling(name, composite):
    assert_all_equal(relevance(SAME[name], composite))


@both
def test_cross_attention_in_every_spelling(composite):
    fns = [cross, cross_by_product_and_sum, cross_transposed]
    found = relevance(fns, composite, {"x": X, "memory": OTHER})
    assert_all_equal(found)
    given_to_queries = np.any(np.abs(found[0]["x"]) > 1e-12)
    assert given_to_queries == (composite == "attnlrp")
    assert np.any(found[0]["memory"])


# Norms.


def torchax_layer_norm(h):
    """As torch decomposes it: the mean as a sum over a count, rsqrt, one product."""
    n = float(D)
    mean = jnp.sum(h, -1, keepdims=True) / n
    c = lax.sub(h, jnp.broadcast_to(mean, h.shape))
    variance = jnp.sum(lax.pow(c, 2.0), -1, keepdims=True) / n
    return c * lax.rsqrt(variance + 1e-5) * P["scale"] + P["shift"]


def keras_layer_norm(h):
    mean = h.mean(-1, keepdims=True)
    inverse = lax.rsqrt(h.var(-1, keepdims=True) + 1e-5) * P["scale"]
    return h * inverse + (P["shift"] - mean * inverse)


def flax_layer_norm(h):
    mean = h.mean(-1)
    square = lax.square(h).mean(-1)
    variance = jnp.maximum(0.0, square - lax.square(mean))
    factor = lax.rsqrt(variance[..., None] + 1e-5) * P["scale"]
    return (h - mean[..., None]) * factor + P["shift"]


def equinox_layer_norm(h):
    def one(v):
        inverse = lax.rsqrt(jnp.var(v) + 1e-5)
        return (v - v.mean()) * inverse * P["scale"] + P["shift"]

    return jax.vmap(jax.vmap(one))(h)


def two_pass(h):
    c = h - h.mean(-1, keepdims=True)
    deviation = jnp.sqrt((c * c).mean(-1, keepdims=True) + 1e-5)
    return P["scale"] * (c / deviation) + P["shift"]


def by_power(h):
    c = h - h.mean(-1, keepdims=True)
    return (
        c * (jnp.mean(c**2, -1, keepdims=True) + 1e-5) ** -0.5 * P["scale"] + P["shift"]
    )


def by_half_power(h):
    c = h - h.mean(-1, keepdims=True)
    spread = jnp.mean(jnp.square(c), -1, keepdims=True) + 1e-5
    return c / jnp.power(spread, 0.5) * P["scale"] + P["shift"]


def by_standard_deviation(h):
    c = h - h.mean(-1, keepdims=True)
    norm = jnp.linalg.norm(c, axis=-1, keepdims=True)
    return c / jnp.sqrt(norm**2 / D + 1e-5) * P["scale"] + P["shift"]


LAYER_NORMS = [
    torchax_layer_norm,
    keras_layer_norm,
    flax_layer_norm,
    equinox_layer_norm,
    two_pass,
    by_power,
    by_half_power,
    by_standard_deviation,
]


def root_mean_squares():
    mean = lambda a: a.mean(-1, keepdims=True)  # noqa: E731
    return [
        lambda h: h * lax.rsqrt(mean(lax.pow(h, 2.0)) + 1e-6) * P["scale"],
        lambda h: h * lax.rsqrt(mean(jnp.square(h)) + 1e-6) * P["scale"],
        lambda h: P["scale"] * (h * lax.rsqrt(mean(h**2) + 1e-6)),
        lambda h: h / jnp.sqrt(mean(h * h) + 1e-6) * P["scale"],
        lambda h: h * (1 / jnp.sqrt(mean(h * h) + 1e-6)) * P["scale"],
        lambda h: h * (mean(h**2) + 1e-6) ** -0.5 * P["scale"],
        lambda h: h * (lax.rsqrt(mean(h**2) + 1e-6) * P["scale"]),
        lambda h: h / jnp.sqrt(mean(h**2) + 1e-6) * (1 + (P["scale"] - 1)),
        lambda h: (
            h
            * lax.rsqrt(jnp.einsum("btd,btd->bt", h, h) / D + 1e-6)[..., None]
            * P["scale"]
        ),
        lambda h: (
            h * D**0.5 / jnp.sqrt((h * h).sum(-1)[..., None] + D * 1e-6) * P["scale"]
        ),
    ]


def norm_reference(kind):
    """x times the gradient with what the norm divides by held constant."""

    def scored(x):
        h = x @ P["q"] + P["bq"]
        c = h - h.mean(-1, keepdims=True) if kind == "layer" else h
        spread = (c * c).mean(-1, keepdims=True)
        root = stop(jnp.sqrt(spread + (1e-5 if kind == "layer" else 1e-6)))
        y = (c / root * P["scale"]) @ P["k"]
        return jnp.sum(y * jnp.linspace(-1.0, 2.0, y.size).reshape(y.shape))

    return X * jax.grad(scored)(X)


@both
@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_norms_in_every_spelling(kind, composite):
    norms = LAYER_NORMS if kind == "layer" else root_mean_squares()
    models = [
        lambda p, x, norm=norm: norm(x @ p["q"] + p["bq"]) @ p["k"] for norm in norms
    ]
    assert_all_equal([norm_reference(kind), *relevance(models, composite)])


# Activations.

ROOT = np.sqrt(2.0)
erf, erfc = lax.erf, lax.erfc
ACTIVATIONS = {
    "exact GELU": [
        lambda h: jax.nn.gelu(h, approximate=False),
        lambda h: 0.5 * h * erfc(-h / ROOT),
        lambda h: h * (0.5 * (1 + erf(h / ROOT))),
        lambda h: (h * 0.5) * (1.0 + erf(h * (1 / ROOT))),
        lambda h: h * jax.scipy.stats.norm.cdf(h),
    ],
    "tanh GELU": [
        lambda h: jax.nn.gelu(h, approximate=True),
        lambda h: 0.5 * h * (1 + jnp.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * h**3))),
        lambda h: (
            0.5
            * h
            * (1 + jnp.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * lax.pow(h, 3.0))))
        ),
        lambda h: (
            h * 0.5 * (1 + jnp.tanh(np.sqrt(2 / np.pi) * h * (1 + 0.044715 * h * h)))
        ),
        lambda h: (
            h * jax.nn.sigmoid(2 * np.sqrt(2 / np.pi) * (h + 0.044715 * h * h * h))
        ),
    ],
    "quick GELU": [
        lambda h: h * jax.nn.sigmoid(1.702 * h),
        lambda h: h / (1 + jnp.exp(-1.702 * h)),
        lambda h: jax.nn.silu(1.702 * h) / 1.702,
        lambda h: h * (0.5 + 0.5 * jnp.tanh(0.851 * h)),
    ],
    "SiLU": [
        jax.nn.silu,
        lambda h: h * jax.nn.sigmoid(h),
        lambda h: h / (1 + jnp.exp(-h)),
        lambda h: jax.jit(lambda v: v * (1 / (1 + jnp.exp(-v))))(h),
    ],
    "mish": [
        jax.nn.mish,
        lambda h: h * jnp.tanh(jax.nn.softplus(h)),
        lambda h: h * jnp.tanh(jnp.log(1 + jnp.exp(h))),
        lambda h: h * ((1 + jnp.exp(h)) ** 2 - 1) / ((1 + jnp.exp(h)) ** 2 + 1),
    ],
    "hard swish": [
        jax.nn.hard_swish,
        lambda h: h * jax.nn.relu6(h + 3.0) / 6.0,
        lambda h: h * jnp.clip(h / 6 + 0.5, 0.0, 1.0),
        lambda h: jnp.where(h <= -3, 0.0, jnp.where(h >= 3, h, h * (h + 3) / 6)),
    ],
    "softplus": [
        jax.nn.softplus,
        lambda h: jnp.log1p(jnp.exp(h)),
        lambda h: jnp.log(1 + jnp.exp(h)),
        lambda h: jnp.maximum(h, 0) + jnp.log1p(jnp.exp(-jnp.abs(h))),
        lambda h: -jnp.log(jax.nn.sigmoid(-h)),
    ],
    "squared ReLU": [
        lambda h: jnp.square(jax.nn.relu(h)),
        lambda h: jax.nn.relu(h) * h,
        lambda h: jnp.where(h > 0, h**2, 0.0),
    ],
    "sigmoid": [
        jax.nn.sigmoid,
        lambda h: 1 / (1 + jnp.exp(-h)),
        lambda h: 0.5 * (jnp.tanh(h / 2) + 1),
        lambda h: jnp.exp(h) / (1 + jnp.exp(h)),
    ],
}


@both
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_in_every_spelling(name, composite):
    """In the middle of a network, and as what gates another branch."""
    models = [
        lambda p, x, f=f: (
            f(x @ p["ffn"] + p["bffn"]) * (x @ p["up"]) @ p["down"]
            + f(x @ p["gate"]) @ p["down"]
        )
        for f in ACTIVATIONS[name]
    ]
    assert_all_equal(relevance(models, composite))


def test_a_literal_tail_belongs_to_the_activation():
    """Also before a scale by a parameter."""
    models = [
        lambda p, x, f=f: f(x @ p["q"] + p["bq"]) * p["scale"] @ p["k"]
        for f in ACTIVATIONS["sigmoid"]
    ]
    assert_all_equal(relevance(models, "attnlrp"))


# Gates.


def swiglu_reference(composite):
    def scored(x):
        g, u = x @ P["gate"], x @ P["up"]
        g = g * stop(jax.nn.silu(g) / g)
        gate = "a" if composite == "cp_lrp" else None
        y = halved(g, u, jnp.multiply, gate) @ P["down"]
        return jnp.sum(y * jnp.linspace(-1.0, 2.0, y.size).reshape(y.shape))

    return X * jax.grad(scored)(X)


def fused_swiglu(p, x):
    g, u = jnp.split(x @ jnp.concatenate([p["gate"], p["up"]], 1), 2, -1)
    return jax.nn.silu(g) * u @ p["down"]


def stacked_swiglu(p, x):
    g, u = jnp.einsum("btd,ndf->nbtf", x, jnp.stack([p["gate"], p["up"]]))
    return (g / (1 + jnp.exp(-g)) * u) @ p["down"]


SWIGLU = [
    lambda p, x: jax.nn.silu(x @ p["gate"]) * (x @ p["up"]) @ p["down"],
    fused_swiglu,
    lambda p, x: (x @ p["up"]) * jax.nn.silu(x @ p["gate"]) @ p["down"],
    lambda p, x: jnp.einsum(
        "btf,btf,fd->btd", jax.nn.silu(x @ p["gate"]), x @ p["up"], p["down"]
    ),
    stacked_swiglu,
]


@both
def test_a_gated_mlp_in_every_spelling(composite):
    assert_all_equal([swiglu_reference(composite), *relevance(SWIGLU, composite)])


def excited(product):
    """Squeeze and excite: positions are pooled, channels are gated."""

    def fn(p, x):
        h = x @ p["q"]
        z = jax.nn.relu(h.mean(1) @ p["squeeze"])
        return product(h, jax.nn.sigmoid(z @ p["excite"])) @ p["k"]

    return fn


EXCITED = [
    excited(lambda h, g: h * g[:, None]),
    excited(lambda h, g: jnp.einsum("btd,bd->btd", h, g)),
    excited(lambda h, g: (h.transpose(0, 2, 1) * g[..., None]).transpose(0, 2, 1)),
    excited(lambda h, g: jax.vmap(lambda a, b: a * b)(h, g)),
    excited(lambda h, g: jnp.broadcast_to(g[:, None], h.shape) * h),
]


@both
def test_squeeze_and_excite_in_every_spelling(composite):
    found = relevance(EXCITED, composite)
    assert_all_equal(found)
    assert "norm" not in kinds(EXCITED[0]) and "product" in kinds(EXCITED[0])
    if composite == "cp_lrp":  # all to the signal
        constant = X * jax.grad(lambda x: jnp.sum(seeded(x)))(X)
        assert_all_equal([constant, found[0]])


def seeded(x):
    h = x @ P["q"]
    z = jax.nn.relu(h.mean(1) @ P["squeeze"])
    y = h * stop(jax.nn.sigmoid(z @ P["excite"]))[:, None] @ P["k"]
    return y * jnp.linspace(-1.0, 2.0, y.size).reshape(y.shape)


# Mixture of experts.


def expert(p, e, x):
    return jax.nn.silu(x @ p["eg"][e]) * (x @ p["eu"][e]) @ p["ed"][e]


def all_experts(p, x):
    g, u = (jnp.einsum("btd,edf->btef", x, p[n]) for n in ("eg", "eu"))
    return jnp.einsum("btef,efd->bted", jax.nn.silu(g) * u, p["ed"])


def soft_mixture(combine):
    def fn(p, x):
        return combine(softmax(x @ p["router"]), all_experts(p, x))

    return fn


MIXTURES = [
    soft_mixture(lambda w, y: jnp.einsum("bte,bted->btd", w, y)),
    soft_mixture(lambda w, y: jnp.sum(w[..., None] * y, 2)),
    soft_mixture(lambda w, y: sum(w[..., e, None] * y[..., e, :] for e in range(E))),
    soft_mixture(lambda w, y: (w[..., None, :] @ y)[..., 0, :]),
    lambda p, x: sum(
        softmax(x @ p["router"])[..., e, None] * expert(p, e, x) for e in range(E)
    ),
]


def routed_by_gather(p, x):
    w, index = lax.top_k(softmax(x @ p["router"]), 2)
    w = w / w.sum(-1, keepdims=True)
    g, u = (jnp.einsum("btd,btndf->btnf", x, p[n][index]) for n in ("eg", "eu"))
    y = jnp.einsum("btnf,btnfd->btnd", jax.nn.silu(g) * u, p["ed"][index])
    return jnp.einsum("btn,btnd->btd", w, y)


def routed_by_one_hot(p, x):
    w, index = lax.top_k(softmax(x @ p["router"]), 2)
    w = w / w.sum(-1, keepdims=True)
    dispatch = jax.nn.one_hot(index, E, dtype=w.dtype)
    w = jnp.einsum("btn,btne->bte", w, dispatch)
    return jnp.sum(w[..., None] * all_experts(p, x), 2)


def routed_by_mask(p, x):
    w = softmax(x @ p["router"])
    kept = jnp.argsort(jnp.argsort(-w, axis=-1), axis=-1) < 2
    w = jnp.where(kept, w, 0.0)
    w = w / w.sum(-1, keepdims=True)
    return jnp.einsum("bte,bted->btd", w, all_experts(p, x))


def routed_by_take(p, x):
    w, index = lax.top_k(softmax(x @ p["router"]), 2)
    w = w / w.sum(-1, keepdims=True)
    y = jnp.take_along_axis(all_experts(p, x), index[..., None], axis=2)
    return jnp.sum(w[..., None] * y, 2)


ROUTED = [routed_by_gather, routed_by_one_hot, routed_by_mask, routed_by_take]


def mixtral_by_gather(p, x):
    s, index = lax.top_k(x @ p["router"], 2)
    y = jnp.take_along_axis(all_experts(p, x), index[..., None], axis=2)
    return jnp.einsum("btn,btnd->btd", softmax(s), y)


def mixtral_by_mask(p, x):
    s = x @ p["router"]
    least = lax.top_k(s, 2)[0][..., -1:]
    w = softmax(jnp.where(s >= least, s, -jnp.inf))
    return jnp.sum(w[..., None] * all_experts(p, x), 2)


@both
@pytest.mark.parametrize("name", ["all experts", "top 2", "softmax of top 2"])
def test_mixtures_of_experts_in_every_spelling(name, composite):
    fns = {
        "all experts": MIXTURES,
        "top 2": ROUTED,
        "softmax of top 2": [mixtral_by_gather, mixtral_by_mask],
    }[name]
    outputs = [fn(P, X) for fn in fns]
    assert_all_equal(outputs, 1e-12)  # they are the same function
    assert_all_equal(relevance(fns, composite))


def test_a_router_gets_no_relevance_under_cp_lrp():
    def constant(p, x):
        return jnp.einsum("bte,bted->btd", softmax(X @ p["router"]), all_experts(p, x))

    assert_all_equal(relevance([MIXTURES[0], constant], "cp_lrp"))


# Recurrent cells.

R = 4  # state
CELL = {
    name: (normal(D, R) / 2, normal(R, R) / 2, normal(R) / 2)
    for name in ("i", "f", "g", "o", "z", "r", "n")
}
SIGMOIDS = [
    jax.nn.sigmoid,
    lambda a: 1 / (1 + jnp.exp(-a)),
    lambda a: 0.5 + 0.5 * jnp.tanh(0.5 * a),
]


def linear(name, x, h):
    w, u, b = CELL[name]
    return x @ w + h @ u + b


def fused_linear(names, x, h):
    w, u, b = (
        jnp.concatenate(parts, -1) for parts in zip(*map(CELL.get, names), strict=True)
    )
    return jnp.split(x @ w + h @ u + b, len(names), -1)


def unrolled(cell, n_state, start=None):
    """Three steps, from zeros or from a state made of x."""

    def fn(p, x):
        zeros = jnp.zeros((B, R)) if start is None else x[:, 3, :R]
        state = (zeros,) * n_state
        for t in range(3):
            state = cell(x[:, t], *state)
        return state[0]

    return fn


def lstm(sigmoid=jax.nn.sigmoid):
    def cell(x, h, c):
        i, f, o = (sigmoid(linear(name, x, h)) for name in "ifo")
        c = f * c + i * jnp.tanh(linear("g", x, h))
        return o * jnp.tanh(c), c

    return unrolled(cell, 2)


def fused_lstm(x, h, c):
    i, f, g, o = fused_linear("ifgo", x, h)
    sigmoid = jax.nn.sigmoid
    c = jnp.tanh(g) * sigmoid(i) + c * sigmoid(f)
    return jnp.tanh(c) * sigmoid(o), c


def frozen_lstm(x, h, c):
    """Gates constant, tanh passes."""
    i, f, o = (stop(jax.nn.sigmoid(linear(name, x, h))) for name in "ifo")
    g = linear("g", x, h)
    c = f * c + i * g * stop(jnp.tanh(g) / g)
    return o * c * stop(jnp.tanh(c) / c), c


def mixed(z, n, h):
    return (1 - z) * n + z * h


def gru_cell(x, h, sigmoid=jax.nn.sigmoid, mix=mixed):
    z, r = sigmoid(linear("z", x, h)), sigmoid(linear("r", x, h))
    w, u, b = CELL["n"]
    n = jnp.tanh(x @ w + r * (h @ u + b))
    return (mix(z, n, h),)


def gru(sigmoid=jax.nn.sigmoid, mix=mixed):
    return unrolled(functools.partial(gru_cell, sigmoid=sigmoid, mix=mix), 1)


def frozen_gru(x, h):
    z, r = (stop(jax.nn.sigmoid(linear(name, x, h))) for name in "zr")
    w, u, b = CELL["n"]
    a = x @ w + r * (h @ u + b)
    return ((1 - z) * a * stop(jnp.tanh(a) / a) + z * h,)


LSTMS = [*map(lstm, SIGMOIDS), unrolled(fused_lstm, 2)]
GRUS = [
    *map(gru, SIGMOIDS),
    gru(mix=lambda z, n, h: z * h + (1.0 - z) * n),
    gru(mix=lambda z, n, h: n * (1 - z) + h * z),
    gru(mix=lambda z, n, h: -((z - 1) * n) + z * h),
]


@both
@pytest.mark.parametrize("name", ["LSTM", "GRU"])
def test_recurrent_cells_in_every_spelling(name, composite):
    fns = LSTMS if name == "LSTM" else GRUS
    found = relevance(fns, composite)
    assert_all_equal(found)
    assert not np.any(found[0][:, 3:])  # not reached


@pytest.mark.parametrize("name", ["LSTM", "GRU"])
def test_gates_of_recurrent_cells_get_none(name):
    """All to c, g, n and h; a gate of a constant, as in step 0 from zeros, is none."""
    cell, frozen, n_state = {
        "LSTM": (fused_lstm, frozen_lstm, 2),
        "GRU": (gru_cell, frozen_gru, 1),
    }[name]
    fn, frozen = (unrolled(c, n_state, start="x") for c in (cell, frozen))
    seeds = seed_like(fn, X)
    expected = X * jax.grad(lambda x: jnp.sum(frozen(P, x) * seeds))(X)
    assert_all_equal([expected, *relevance([fn], "cp_lrp")])


# Decoys: what looks like a fact and is not.


def exp_over(total):
    def fn(p, x):
        h = x @ p["q"]
        return jnp.exp(h) / total(p, h, x)

    return fn


NOT_SOFTMAX = {
    "another's sum": exp_over(
        lambda p, h, x: jnp.exp(x @ p["k"]).sum(-1, keepdims=True)
    ),
    "the same of other weights": exp_over(
        lambda p, h, x: jnp.exp(x @ (p["q"] * 2)).sum(-1, keepdims=True)
    ),
    "a sum of squares": exp_over(
        lambda p, h, x: jnp.square(jnp.exp(h)).sum(-1, keepdims=True)
    ),
    "a largest exponential": exp_over(
        lambda p, h, x: jnp.exp(h).max(-1, keepdims=True)
    ),
    "a shift of the sum only": exp_over(
        lambda p, h, x: jnp.exp(h - x.max(-1, keepdims=True)).sum(-1, keepdims=True)
    ),
    "a sum of exponentials of gates": exp_over(
        lambda p, h, x: (jnp.exp(h) * x).sum(-1, keepdims=True)
    ),
    "sums to two": lambda p, x: (
        jnp.sinh(h := x @ p["q"]) / jnp.sum(jnp.sinh(h), -1, keepdims=True)
    ),
}


@table(NOT_SOFTMAX)
def test_decoys_of_softmax(case):
    assert "softmax" not in kinds(case)


def test_the_logsumexp_of_another_makes_no_log_softmax():
    def fn(p, x):
        return x @ p["q"] - jax.nn.logsumexp(x @ p["k"], axis=-1, keepdims=True)

    assert sorted(kinds(fn)) == ["add", "dense", "dense", "softmax"]


def test_a_softmax_summed_over_another_axis_is_no_softmax():
    """``exp(x)``, summed over one axis and divided along another."""

    def fn(p, x):
        e = jnp.exp(x[:, :, :T] @ p["q"][:T, :T])  # (B, T, T)
        return e / e.sum(-1)[:, None, :]

    assert "softmax" not in kinds(fn)
    ledger = jlrp.audit(fn, P, X, seed_like(fn, X), composite="attnlrp")
    assert ledger.unexplained <= 1e-10 * abs(ledger.seed)


NOT_NORM = {
    "rsqrt of a dense": lambda p, x: x * lax.rsqrt(jnp.square(x @ p["q"]) + 1),
    "sigmoid of a dense": lambda p, x: x * jax.nn.sigmoid(x @ p["q"]),
    "rsqrt of a dense's variance": lambda p, x: (
        x * lax.rsqrt((x @ p["q"]).var(-1, keepdims=True) + 1)
    ),
    "pooled and mapped": lambda p, x: (
        x * jax.nn.sigmoid(x.mean(1, keepdims=True) @ p["q"])
    ),
    "shifted by a parameter": lambda p, x: (
        x * lax.rsqrt(jnp.square(x + p["scale"]).mean(-1, keepdims=True))
    ),
    "another value's variance": lambda p, x: (
        (x @ p["q"]) * lax.rsqrt((x @ p["k"]).var(-1, keepdims=True) + 1)
    ),
    "a neighbour's rms": lambda p, x: (
        x[:, 1:] * lax.rsqrt((x[:, :-1] @ p["q"]).var(-1, keepdims=True))
    ),
    "no reduction": lambda p, x: (x @ p["q"]) * jnp.tanh(x @ p["k"]),
    "two measures of one size": lambda p, x: (
        jnp.sqrt(jnp.square(x @ p["q"]).mean(-1)) * (x @ p["q"]).var(-1)
    ),
}


@table(NOT_NORM)
def test_decoys_of_statistics(case):
    assert "norm" not in kinds(case) and "product" in kinds(case)


def squashed(p, x, hold=lambda a: a):
    """A capsule: a pooled signal, scaled by one statistic and divided by another."""
    s = (x @ p["q"]).sum(1)
    square = jnp.square(s).sum(-1, keepdims=True)
    return hold(square / (1 + square)) * s / hold(jnp.sqrt(square + 1e-9))


def test_a_pooled_signal_may_be_scaled_before_its_norm():
    """Both operands reduce what the other is made of: the one broadcast measures."""
    assert kinds(squashed).count("norm") == 1
    (found,) = relevance([squashed], "attnlrp")
    seeds = seed_like(squashed, X)
    expected = X * jax.grad(lambda x: jnp.sum(squashed(P, x, stop) * seeds))(X)
    assert_all_equal([expected, found])


NOT_ACTIVATION = {
    "residual branch": lambda p, x: x + jax.nn.gelu(x) @ p["q"],
    "gate of a dense": lambda p, x: x * jax.nn.sigmoid(x @ p["q"]),
    "gate of a neighbour": lambda p, x: x * jax.nn.sigmoid(jnp.roll(x, 1, 1)),
    "gate of a transpose": lambda p, x: (
        x[:, :, :T] * jax.nn.sigmoid(x[:, :, :T].swapaxes(1, 2))
    ),
}


@table(NOT_ACTIVATION)
def test_decoys_of_unary_regions(case):
    """A region from x to the end would be one activation, and nothing else."""
    assert set(kinds(case)) != {"activation"} and len(kinds(case)) > 1


def test_decoys_of_gates():
    assert kinds(lambda p, x: x * jnp.sum(p["q"])) == ["scale"]
    assert kinds(lambda p, x: x * softmax(p["scale"])) == ["scale"]
    assert kinds(lambda p, x: x * jax.nn.sigmoid(x)) == ["activation"]
    assert "product" not in kinds(lambda p, x: x * (x @ p["q"] > 0))
    assert "product" not in kinds(lambda p, x: x * stop(jax.nn.sigmoid(x @ p["q"])))
    assert "product" not in kinds(lambda p, x: layer_norm(x) @ p["q"])


def test_attention_over_constant_weights_is_no_product():
    """Token mixing by a parameter, and a softmax of parameters."""

    def fn(p, x):
        return jnp.einsum("ts,bsd->bdt", softmax(p["bias"][0]), x)

    assert [kind for kind in kinds(fn) if kind != "movement"] == ["dense"]


# Blocks and networks.


def layer_norm(h):
    c = h - h.mean(-1, keepdims=True)
    variance = jnp.square(c).mean(-1, keepdims=True)
    return c * lax.rsqrt(variance + 1e-5) * P["scale"] + P["shift"]


def rms_norm(h):
    return h * lax.rsqrt((h**2).mean(-1, keepdims=True) + 1e-6) * P["scale"]


def bert_block(p, h, mask=PADDED):
    q, k, v = qkv(p, h)
    s = jnp.einsum("bthk,bshk->bhts", q, k) / np.sqrt(K)
    w = softmax(s + jnp.where(mask, 0.0, -jnp.inf))
    o = jnp.einsum("bhts,bshk->bthk", w, v)
    h = layer_norm(h + joined(p, o))
    return layer_norm(
        h + jax.nn.gelu(h @ p["ffn"] + p["bffn"], approximate=False) @ p["down"]
    )


def llama_block(p, h):
    n = rms_norm(h)
    q, k, v = (split(n @ p[name]) for name in ("q", "k2", "v2"))
    q, k = (rotate_half(rms(a), COS, SIN) for a in (q, k))
    o = attend(q, jnp.repeat(k, 2, axis=2), jnp.repeat(v, 2, axis=2), CAUSAL)
    h = h + o.reshape(h.shape) @ p["o"]
    n = rms_norm(h)
    return h + jax.nn.silu(n @ p["gate"]) * (n @ p["up"]) @ p["down"]


def rms(a):  # the norm of queries and keys
    return a * lax.rsqrt((a**2).mean(-1, keepdims=True) + 1e-6)


def bert(p, h, depth=1):
    h = layer_norm(h + p["positions"])
    for _ in range(depth):
        h = bert_block(p, h)
    return jnp.tanh(h[:, 0] @ p["o"] + p["bo"]) @ p["classes"]


def llama(p, h, depth=1):
    for _ in range(depth):
        h = llama_block(p, h)
    return rms_norm(h)[:, -1] @ p["classes"]


NETWORKS = {"bert": bert, "llama": llama}
CONSERVING = {
    **COMPOSITES,
    "epsilon": jlrp.composites.epsilon(),
    "epsilon_plus": jlrp.composites.epsilon_plus(),
    "excitation_backprop": jlrp.composites.excitation_backprop(),
    "gradient_input": jlrp.composites.gradient_input(),
    "dynamic_lrp": jlrp.composites.dynamic_lrp(),
}


@pytest.mark.parametrize("composite", CONSERVING)
@pytest.mark.parametrize("name", NETWORKS)
def test_seed_is_relevance_and_causes(name, composite):
    fn = NETWORKS[name]
    ledger = jlrp.audit(fn, P, X, 1, composite=CONSERVING[composite])
    score = float(fn(P, X)[:, 1].sum())
    assert ledger.seed == pytest.approx(score, rel=1e-12) and abs(score) > 0.1
    assert ledger.unexplained <= 1e-10 * abs(ledger.seed)
    absorbed = sum(ledger.total(cause) for cause in CAUSES)
    assert abs(ledger.seed - ledger.relevance - absorbed) <= 1e-10 * abs(ledger.seed)
    if composite in COMPOSITES:
        found = jlrp.relevance(fn, P, X, 1, composite=composite)
        assert ledger.relevance == pytest.approx(float(found.sum()), abs=1e-9)


def test_every_equation_of_both_networks_is_covered():
    for name, fn in NETWORKS.items():
        for composite in COMPOSITES:
            deep = functools.partial(fn, depth=2)
            report = jlrp.inspect(deep, P, X, composite=composite)
            coverage = report.coverage
            assert coverage.fallback == coverage.uncovered == 0, (name, composite)
            kinds = [row.kind for row in report.operations]
            assert kinds.count("softmax") == 2 and "norm" in kinds


@both
@pytest.mark.parametrize("name", NETWORKS)
def test_token_relevance_is_the_sum_over_the_embedding(name, composite):
    ids = jnp.asarray(RNG.integers(0, 11, (B, T)))
    fn = NETWORKS[name]
    of_ids = jlrp.relevance(
        lambda p, ids: fn(p, p["table"][ids]), P, ids, 1, composite=composite
    )
    of_vectors = jlrp.relevance(fn, P, P["table"][ids], 1, composite=composite)
    assert of_ids.shape == ids.shape
    assert_all_equal([of_vectors.sum(-1), of_ids])


@both
def test_jit_vmap_and_eager_agree_on_a_block(composite):
    composed = COMPOSITES[composite]
    labels = jnp.asarray([2, 0])

    def explain(x, labels):
        return jlrp.relevance(llama, P, x, labels, composite=composed)

    expected = explain(X, labels)
    one = jax.vmap(lambda x, label: explain(x[None], label[None])[0])
    found = [jax.jit(explain)(X, labels), jax.jit(one)(X, labels)]
    if composite == "attnlrp":
        with jax.disable_jit():
            found.append(explain(X, labels))
    assert_all_equal([expected, *found])


@both
def test_a_checkpointed_block_is_looked_into(composite):
    def checkpointed(policy=None):
        block = jax.checkpoint(llama_block, policy=policy)
        return lambda p, x: block(p, block(p, x))

    policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    fns = [
        lambda p, x: llama_block(p, llama_block(p, x)),
        checkpointed(),
        checkpointed(policy),
        lambda p, x: jax.jit(jax.checkpoint(jax.jit(llama_block)))(
            p, jax.jit(llama_block)(p, x)
        ),
    ]
    assert_all_equal(relevance(fns, composite))
    assert sorted(kinds(fns[1])) == sorted(kinds(fns[0]))


def test_relevance_of_a_transformer_has_finite_gradients():
    def penalty(p):
        r = jlrp.relevance(bert, p, X, 1, composite="attnlrp")
        return jnp.sum(r**2)

    slopes = jax.jit(jax.grad(penalty))(P)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(slopes))
    step, name = 1e-6, "q"
    direction = jnp.cos(jnp.arange(D * D)).reshape(D, D)
    ahead, behind = (
        jax.jit(penalty)(P | {name: P[name] + s * direction}) for s in (step, -step)
    )
    slope = jnp.vdot(slopes[name], direction)
    np.testing.assert_allclose(slope, (ahead - behind) / (2 * step), rtol=1e-5)


# Masks.

ALL_MASKED = jnp.asarray([[True, True, False, True, False], [False] * 5])
MASKINGS = {
    "where": lambda s, m: jnp.where(m, s, -jnp.inf),
    "added": lambda s, m: s + jnp.where(m, 0.0, -jnp.inf),
    "large": lambda s, m: jnp.where(m, s, -1e30),
    "after a cap": lambda s, m: jnp.where(m, 5 * jnp.tanh(s / 5), -jnp.inf),
}


def masked_attention(masking, keys):
    """Keys (batch, position) that are seen; a last token joins by a residual."""

    def fn(p, x):
        return x + by_einsum(p, x, lambda s: masking(s, keys[:, None, None]))

    return fn


@both
@pytest.mark.parametrize("name", MASKINGS)
def test_masked_positions_get_exactly_zero(name, composite):
    keys = jnp.asarray([[True, True, False, True, False]] * B)
    fn = masked_attention(MASKINGS[name], keys)

    def last(p, x):  # one query, which is not masked itself
        return fn(p, x)[:, 0] - x[:, 0]

    (found,) = relevance([last], composite)
    assert np.all(np.isfinite(found))
    hidden, seen = found[~keys], found[keys]
    assert not np.any(hidden) and np.all(seen.any(-1))


@both
@pytest.mark.parametrize("name", ["where", "added", "after a cap"])
def test_no_nan_from_rows_in_which_all_is_masked(name, composite):
    """The output of the row is NaN; another example's relevance is not."""
    fn = masked_attention(MASKINGS[name], ALL_MASKED)

    def guarded(p, x):
        y = fn(p, x)
        return jnp.where(ALL_MASKED.any(-1)[:, None, None], y, 0.0)

    def first(p, x):
        return fn(p, x)[:1]

    for found in relevance([guarded, first], composite):
        assert np.all(np.isfinite(found)) and np.any(found[0])
        assert not np.any(found[1])
    ledger = jlrp.audit(
        guarded, P, X, seed_like(guarded, X), composite=COMPOSITES[composite]
    )
    for row in ledger.rows:
        assert np.all(np.isfinite([row.arrived, row.handed, row.unexplained])), row
        assert np.all(np.isfinite(list(row.causes.values())))


@both
def test_queries_that_see_nothing(composite):
    """A causal mask that hides a query's own key too: its row is all masked."""
    strict = jnp.tril(jnp.ones((T, T), bool), -1)

    def fn(p, x):
        q, k, v = qkv(p, x)
        s = jnp.where(strict, jnp.einsum("bthk,bshk->bhts", q, k), -jnp.inf)
        w = jnp.where(strict.any(-1)[:, None], softmax(s), 0.0)
        return joined(p, jnp.einsum("bhts,bshk->bthk", w, v))

    (found,) = relevance([fn], composite)
    assert np.all(np.isfinite(found)) and np.any(found)
    assert not np.any(found[:, -1] if composite == "cp_lrp" else 0.0)
    ledger = jlrp.audit(fn, P, X, seed_like(fn, X), composite=composite)
    assert ledger.unexplained <= 1e-10 * abs(ledger.seed)


@both
def test_a_masked_score_is_zero_in_audit_and_in_capture(composite):
    def fn(p, x):
        q, k, v = qkv(p, x)
        with jax.named_scope("scores"):
            s = jnp.einsum("bthk,bshk->bhts", q, k) * K**-0.5
        s = jlrp.tag(jnp.where(CAUSAL, s, -jnp.inf), "masked")
        w = jlrp.tag(softmax(s), "weights")
        return joined(p, jnp.einsum("bhts,bshk->bthk", w, v))

    explain = jlrp.explain(
        fn, capture=("scores", "masked", "weights"), composite=composite
    )
    captured = explain(P, X, seed_like(fn, X)).captured
    for name, found in captured.items():
        assert np.all(np.isfinite(found)), name
        assert not np.any(found[..., ~CAUSAL]), name
        if composite == "attnlrp":
            assert np.any(found[..., CAUSAL]), name
    ledger = jlrp.audit(fn, P, X, seed_like(fn, X), composite=composite)
    amounts = [
        (row.arrived, row.handed, row.unexplained, *row.causes.values())
        for row in ledger.rows
    ]
    assert all(np.all(np.isfinite(row)) for row in amounts)
    assert ledger.unexplained <= 1e-10 * abs(ledger.seed)


def test_a_mask_of_minus_infinity_is_no_alarm():
    ledger = jlrp.audit(bert, P, X, 1, composite="attnlrp")
    assert not ledger.nonfinite and "NaN" not in str(ledger)


def test_a_mask_that_overflows_in_a_cast_is_no_alarm():
    """Unlike a number of the model's own that does."""

    def weighted(scores):
        return jax.nn.softmax(scores.astype(jnp.float32))[..., 0]

    w, x = jnp.ones((3, 2)), jnp.ones((4, 3))
    lowest = jnp.array([0.0, jnp.finfo(jnp.float64).min])
    masked = jlrp.audit(lambda w, x: weighted(x @ w + lowest), w, x)
    assert masked.nonfinite == ()
    overflown = jlrp.audit(lambda w, x: weighted(x @ w * -1e39), w, x)
    assert "convert_element_type" in overflown.nonfinite[0]


@both
def test_zero_inputs_get_zero(composite):
    def fn(p, x):  # layer norm of zeros, scores of zeros
        n = x * lax.rsqrt((x**2).mean(-1, keepdims=True) + 1e-6) * p["scale"]
        q, k, v = (split(n @ p[name]) for name in "qkv")
        o = attend(q, k, v).reshape(B, T, D)
        return jax.nn.silu(o @ p["gate"]) * (o @ p["up"])

    zero, part = (
        relevance([fn], composite, X * 0),
        relevance([fn], composite, X.at[:, 1].set(0.0)),
    )
    assert not np.any(zero[0])
    assert np.all(np.isfinite(part[0])) and not np.any(part[0][:, 1])
    with np.errstate(all="ignore"):
        ledger = jlrp.audit(fn, P, X * 0, seed_like(fn, X), composite=composite)
    assert ledger.unexplained == 0 and not ledger.nonfinite


# A slow replica: one attention block, in loops, from the formulas of RULES.md.


def replica(composite, x, seeds):
    """Relevance of one example: layer norm, attention of one head, output dense."""
    p = {name: np.asarray(value) for name, value in P.items()}
    n, d = x.shape
    mean, centred = np.zeros(n), np.zeros((n, d))
    for t in range(n):
        mean[t] = sum(x[t]) / d
        centred[t] = x[t] - mean[t]
    root = [np.sqrt(sum(c * c) / d + 1e-5) for c in centred]
    h = np.stack([centred[t] / root[t] for t in range(n)])
    g = h * p["scale"] + p["shift"]
    q, k, v = (g @ p[name] + p[f"b{name}"] for name in "qkv")
    s = np.zeros((n, n))
    for j in range(n):
        for i in range(n):
            s[j, i] = sum(q[j, c] * k[i, c] for c in range(d)) / np.sqrt(d)
    a = np.zeros((n, n))
    for j in range(n):
        e = [np.exp(s[j, i]) if i <= j else 0.0 for i in range(n)]
        a[j] = np.asarray(e) / sum(e)
    o = a @ v
    y = o @ p["o"] + p["bo"]
    r_y = y * seeds
    # dense, LRP-0: R_i = sum_j x_i w_ij / z_j R_j
    r_o = dense_replica(o, p["o"], y, r_y)
    # A V, uniform: R^A_ji = sum_p A_ji V_ip R_jp / (2 O_jp), R^V_ip summed over j
    share = 2.0 if composite == "attnlrp" else 1.0
    r_a, r_v = np.zeros((n, n)), np.zeros((n, d))
    for j in range(n):
        for i in range(n):
            for c in range(d):
                part = a[j, i] * v[i, c] * r_o[j, c] / (share * o[j, c])
                r_a[j, i] += part if composite == "attnlrp" else 0.0
                r_v[i, c] += part
    # softmax: R_i = s_i (R^out_i - a_i sum_j R^out_j), the input being s
    r_s = np.zeros((n, n))
    for j in range(n):
        for i in range(j + 1):
            r_s[j, i] = s[j, i] * (r_a[j, i] - a[j, i] * sum(r_a[j]))
    # Q K^T, uniform
    r_q, r_k = np.zeros((n, d)), np.zeros((n, d))
    for j in range(n):
        for i in range(j + 1):
            for c in range(d):
                part = q[j, c] * k[i, c] / np.sqrt(d) / (2 * s[j, i]) * r_s[j, i]
                r_q[j, c] += part
                r_k[i, c] += part
    r_g = dense_replica(g, p["q"], q, r_q)
    r_g += dense_replica(g, p["k"], k, r_k) + dense_replica(g, p["v"], v, r_v)
    # scale and shift: LRP-0; layer norm: the statistic is a constant
    r_h = r_g * h * p["scale"] / g
    r_x = np.zeros((n, d))
    for t in range(n):
        for i in range(d):
            for j in range(d):
                weight = float(i == j) - 1 / d
                r_x[t, i] += x[t, i] * weight / centred[t, j] * r_h[t, j]
    return r_x


def dense_replica(x, w, z, r):
    found = np.zeros_like(x)
    for t in range(x.shape[0]):
        for i in range(x.shape[1]):
            found[t, i] = sum(
                x[t, i] * w[i, j] / z[t, j] * r[t, j] for j in range(w.shape[1])
            )
    return found


@both
def test_a_block_equals_its_slow_replica(composite):
    def fn(p, x):
        g = layer_norm(x)
        q, k, v = (g @ p[name] + p[f"b{name}"] for name in "qkv")
        w = softmax(jnp.where(CAUSAL, q @ k.T / jnp.sqrt(float(D)), -jnp.inf))
        return w @ v @ p["o"] + p["bo"]

    x = X[0]
    (found,) = relevance([fn], composite, x)
    expected = replica(composite, np.asarray(x), np.asarray(seed_like(fn, x)))
    assert_all_equal([expected, found], 1e-9)


# Modules of libraries, with the weights of the plain function.


def plain_heads(p, x):
    def project(name):
        return jnp.einsum("btd,dhk->bthk", x, p[name]) + p[f"b{name}"]

    q, k, v = map(project, ("query", "key", "value"))
    w = softmax(jnp.einsum("bthk,bshk->bhts", q, k) / np.sqrt(K))
    o = jnp.einsum("bhts,bshk->bthk", w, v)
    return jnp.einsum("bthk,hkd->btd", o, p["out"]) + p["bout"]


def explained(fn, params, composite, x=X):
    seeds = jnp.linspace(-1.0, 2.0, X.size).reshape(X.shape)
    return jlrp.relevance(fn, params, x, seeds, composite=composite)


@both
def test_linen_attention_is_the_plain_one(composite):
    linen = pytest.importorskip("flax.linen")
    module = linen.MultiHeadDotProductAttention(
        H, qkv_features=D, param_dtype=jnp.float64
    )
    params = module.init(jax.random.key(0), X)
    params = jax.tree.map(
        lambda a: a + 0.1 * jnp.cos(jnp.arange(a.size)).reshape(a.shape), params
    )
    plain = {}
    for name, leaves in params["params"].items():
        plain |= {name: leaves["kernel"], f"b{name}": leaves["bias"]}
    np.testing.assert_allclose(module.apply(params, X), plain_heads(plain, X))
    found = explained(module.apply, params, composite)
    assert_all_equal([explained(plain_heads, plain, composite), found])


@both
def test_nnx_attention_is_the_plain_one(composite):
    nnx = pytest.importorskip("flax.nnx")
    from jlrp.integrations import flax

    module = nnx.MultiHeadAttention(
        H, D, decode=False, param_dtype=jnp.float64, rngs=nnx.Rngs(0)
    )
    fn, state = flax.nnx(module)
    plain = {}
    for name in ("query", "key", "value", "out"):
        layer = getattr(module, name)
        layer.bias[...] = jnp.cos(jnp.arange(layer.bias.size)).reshape(layer.bias.shape)
        plain |= {name: layer.kernel[...], f"b{name}": layer.bias[...]}
    fn, state = flax.nnx(module)
    np.testing.assert_allclose(fn(state, X), plain_heads(plain, X), rtol=1e-4)
    found = explained(fn, state, composite)  # with a softmax in float32
    assert_all_equal([explained(plain_heads, plain, composite), found], 1e-5)


# Many targets at once.


def dots(jaxpr):
    """The operand shapes of every dot_general, bodies of calls included."""
    found = []
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            found.append(tuple(v.aval.shape for v in equation.invars))
        for param in equation.params.values():
            for inner in param if isinstance(param, list | tuple) else [param]:
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    found += dots(inner)
    return found


@both
def test_many_targets_share_the_forward_pass(composite):
    n = 7

    def explain(seed):
        return jlrp.relevance(llama, P, X, seed, composite=COMPOSITES[composite])

    shape = jax.eval_shape(llama, P, X).shape
    seeds = (
        normal(n, *shape)
        .at[:3]
        .set(jnp.stack([jnp.zeros(shape).at[:, c].set(1.0) for c in range(3)]))
    )
    together = jax.jit(jax.vmap(explain))(seeds)
    one = jax.jit(explain)
    assert_all_equal([jnp.stack([one(seed) for seed in seeds]), together])
    np.testing.assert_allclose(
        one(seeds[0]),
        jlrp.relevance(llama, P, X, 0, composite=COMPOSITES[composite]),
        atol=1e-12,
    )
    forward = dots(jax.make_jaxpr(lambda x: llama(P, x))(X).jaxpr)
    alone = dots(jax.make_jaxpr(explain)(seeds[0]).jaxpr)
    shared = dots(jax.make_jaxpr(jax.vmap(explain))(seeds).jaxpr)
    assert len(shared) == len(alone)  # nothing is done twice
    unbatched = [
        operands for operands in shared if all(n not in shape for shape in operands)
    ]
    assert set(unbatched) == set(forward)  # all of it, and no other, is shared
    assert len(unbatched) < len(shared) < 3 * len(forward)
