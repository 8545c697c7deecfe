"""Facts are found in every spelling, wherever they are written, not in their decoys."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jlrp

pytestmark = pytest.mark.relaxed  # models promote dtypes and ranks as users write them

RNG = np.random.default_rng(0)
normal = lambda *shape: jnp.asarray(RNG.normal(size=shape))  # noqa: E731
P = {name: normal(5, 5) for name in ("u", "v", "w")}
P |= {name: normal(5) for name in ("a", "b", "c")}
P["var"] = jnp.abs(normal(5)) + 0.1
P["kernel"] = normal(3, 3, 2, 4)
P |= {name: normal(4) for name in ("scale", "shift", "mean")}
P["variance"] = jnp.abs(normal(4)) + 0.1
P["map"] = normal(1, 4, 4, 1)
X = normal(3, 5)
IMAGE = normal(2, 4, 4, 2)
EXACT = jlrp.composites.epsilon(0.0)
relu = jax.nn.relu


def rows(fn, x=X, composite=EXACT):
    seed = jnp.ones(jax.eval_shape(fn, P, x).shape)
    return jlrp.inspect(fn, P, x, seed, composite=composite).operations


def kinds(fn, x=X):
    return [row.kind for row in rows(fn, x)]


def relevance(fns, composite=EXACT, x=X):
    """Relevance of several functions, in one program."""

    @jax.jit
    def explain(x):
        found = []
        for fn in fns:
            shape = jax.eval_shape(fn, P, x).shape
            seed = jnp.linspace(-1.0, 2.0, int(np.prod(shape))).reshape(shape)
            found.append(jlrp.relevance(fn, P, x, seed, composite=composite))
        return found

    return explain(x)


def assert_all_equal(found, tolerance=1e-10):
    first, *others = found
    for other in others:
        scale = float(jnp.abs(first).max())
        np.testing.assert_allclose(other, first, rtol=0, atol=tolerance * scale)


def table(cases):
    return pytest.mark.parametrize("case", cases.values(), ids=list(cases))


# Activity.


def equations(fn):
    seed = jnp.ones(jax.eval_shape(fn, P, X).shape)
    return [e.primitive for e in jlrp.inspect(fn, P, X, seed).coverage.equations]


def test_only_paths_from_x_to_the_output_are_active():
    def fn(p, x):
        kernel = p["u"] / jnp.sqrt(jnp.sum(p["u"] ** 2))  # of parameters only
        jnp.tanh(x)  # reaches no output
        mask = (x > 0).astype(x.dtype)  # a comparison
        position = jnp.arange(5.0)
        bits = jax.random.bernoulli(jax.random.key(0), 0.5, x.shape)
        still = lax.stop_gradient(jnp.sin(x))
        return jnp.where(bits, x @ kernel * mask + position, 0.0) + still

    found = equations(fn)
    assert "dot_general" in found
    assert not {"tanh", "sin", "gt", "iota", "sqrt", "random_bits"} & set(found)


def test_what_only_reaches_an_unexplained_output_is_not_active():
    def fn(p, x):
        return (x @ p["u"]).sum(-1), jnp.tanh(x).sum(-1)

    report = jlrp.inspect(fn, P, X, lambda out: out[0])
    assert "tanh" not in [e.primitive for e in report.coverage.equations]


# Sign.

NONNEGATIVE = {
    "ReLU": relu,
    "maximum": lambda x: jnp.maximum(0.0, x),
    "square": jnp.square,
    "x times x": lambda x: x * x,
    "even power": lambda x: x**4,
    "absolute": lambda x: 3.0 * jnp.abs(x),
    "exp": jnp.exp,
    "sigmoid": jax.nn.sigmoid,
    "sigmoid by parts": lambda x: 1 / (1 + jnp.exp(-x)),
    "softmax": lambda x: jax.nn.softmax(x, -1),
    "clip": lambda x: jnp.clip(x, 0.0, 1.0),
    "ReLU6": jax.nn.relu6,
    "sum": lambda x: relu(x) + relu(-x) + 0.5,
    "product": lambda x: relu(x) * relu(x[::-1]),
    "quotient": lambda x: relu(x) / (1.0 + relu(x[::-1])),
    "negated twice": lambda x: -(relu(x) * -1.0),
    "moved": lambda x: relu(x).T.reshape(3, 5)[:, ::-1],
    "padded": lambda x: jnp.pad(relu(x)[:, 1:], ((0, 0), (1, 0))),
    "joined": lambda x: jnp.concatenate([relu(x)[:, :2], jnp.abs(x)[:, 2:]], 1),
    "pooled": lambda x: lax.reduce_window(
        relu(x), -jnp.inf, lax.max, (1, 3), (1, 1), "SAME"
    ),
    "averaged": lambda x: (
        lax.reduce_window(relu(x), 0.0, lax.add, (1, 3), (1, 1), "SAME") / 3
    ),
    "cumulative": lambda x: jnp.cumsum(relu(x), 1),
    "dropout": lambda x: jnp.where(jnp.arange(5) > 2, relu(x) / 0.5, 0.0),
}
ANY_SIGN = {
    "x": lambda x: x,
    "tanh": jnp.tanh,
    "odd power": lambda x: x**3,
    "leaky ReLU": jax.nn.leaky_relu,
    "GELU": jax.nn.gelu,
    "difference": lambda x: relu(x) - relu(x[::-1]),
    "shift down": lambda x: relu(x) - 0.5,
    "signed factor": lambda x: relu(x) * x[::-1],
    "signed denominator": lambda x: relu(x[::-1]) / x,
    "negative": lambda x: -relu(x),
    "non-positive": lambda x: jnp.minimum(x, 0.0),
    "clip below zero": lambda x: jnp.clip(x, -0.1, 1.0),
    "joined": lambda x: jnp.concatenate([relu(x)[:, :2], x[:, 2:]], 1),
    "negative padding": lambda x: jnp.pad(
        relu(x)[:, 1:], ((0, 0), (1, 0)), constant_values=-1.0
    ),
    "negative fill": lambda x: jnp.where(x > 0, x, -1.0),
    "parameter shift": lambda x: relu(x) + P["a"],
    "parameter scale": lambda x: relu(x) * P["a"],
    "updated": lambda x: relu(x).at[0].add(x[0]),
    "dense": lambda x: relu(x) @ P["v"],
}


@table(NONNEGATIVE)
def test_nonnegative_inputs_are_marked(case):
    *_, dense = rows(lambda p, x: case(x) @ p["u"])
    assert dense.kind == "dense" and "nonnegative" in dense.facts


@table(ANY_SIGN)
def test_other_inputs_are_not_marked_nonnegative(case):
    *_, dense = rows(lambda p, x: case(x) @ p["u"])
    assert dense.kind == "dense" and "nonnegative" not in dense.facts


RECTIFYING = {
    "ReLU upside down": lambda x: relu(-x),  # the minus is the kernel's
    "shifted": lambda x: relu(x + 0.5),  # by a bias
    "ReLU": relu,
    "ReLU6": jax.nn.relu6,
    "where": lambda x: jnp.where(x > 0, x, 0.0),
    "where not": lambda x: jnp.where(x <= 0, 0.0, x),
    "mask": lambda x: x * (x >= 0),
    "clip": lambda x: jnp.clip(x, 0.0, 2.0),
    "hard, scaled": lambda x: jnp.minimum(jnp.maximum(x, 0.0), 6.0) * 2.0,
    "cast": lambda x: relu(x).astype(jnp.float32),
    "twice": lambda x: relu(x) + jnp.clip(x, 0.0, 1.0) ** 2,
}
NOT_RECTIFYING = {
    "leaky ReLU": jax.nn.leaky_relu,
    "GELU": jax.nn.gelu,
    "ReLU from below": lambda x: jnp.maximum(x, -0.1),
    "hard swish": jax.nn.hard_swish,
    "ELU": jax.nn.elu,
    "exp": jnp.exp,
    "read beside": lambda x: relu(x) + x,
    "read beside by another": lambda x: relu(x) + jnp.tanh(x[::-1]),
    "negative part": lambda x: jnp.where(x > 0, 0.0, x),
}


def facts_before(activation, composite="epsilon"):
    def model(p, x):
        return activation(x @ p["u"]).sum(1)

    (row,) = (r for r in rows(model, composite=composite) if r.kind == "dense")
    return row.facts


@table(RECTIFYING)
def test_maps_before_a_rectifier_are_marked(case):
    assert "rectified" in facts_before(case)


@table(NOT_RECTIFYING)
def test_maps_before_something_else_are_not_marked(case):
    assert "rectified" not in facts_before(case)


def test_a_rule_that_may_hand_on_more_is_no_rectifier():
    native = jlrp.Composite(
        [("activation", jlrp.rules.NativeGradient())], base="epsilon"
    )
    assert "rectified" not in facts_before(relu, native)


def test_what_is_explained_itself_is_not_marked():
    def model(p, x):
        z = x @ p["u"]
        return z, relu(z)

    shapes = jax.eval_shape(model, P, X)
    ones = jax.tree.map(lambda s: jnp.ones(s.shape, s.dtype), shapes)
    facts = [o.facts for o in jlrp.inspect(model, P, X, ones).operations]
    assert all("rectified" not in f for f in facts)


ANY, ABOVE, BETWEEN = "any sign", "non-negative", "non-negative, ReLU behind"
MAPS = {  # dot products of an explanation, the forward pass included
    (jlrp.rules.Epsilon(), ANY): 2,
    (jlrp.rules.ZPlus(), ANY): 5,
    (jlrp.rules.ZPlus(), ABOVE): 3,
    (jlrp.rules.Gamma(), ANY): 4,
    (jlrp.rules.Gamma(), ABOVE): 4,
    (jlrp.rules.Gamma(), BETWEEN): 3,
    (jlrp.rules.AlphaBeta(2, 1), ANY): 9,
    (jlrp.rules.AlphaBeta(2, 1), ABOVE): 5,  # one of them where signs are rare only
}


@pytest.mark.parametrize(("rule", "signs"), MAPS, ids=str)
def test_signs_save_maps(rule, signs):
    def model(p, x):
        z = (jnp.tanh(x) if signs == ANY else relu(x)) @ p["u"]
        return relu(z) if signs == BETWEEN else z

    composite = jlrp.Composite([("dense", rule)], base="epsilon")
    program = jax.make_jaxpr(
        lambda x: jlrp.relevance(model, P, x, jnp.ones((3, 5)), composite=composite)
    )
    assert str(program(X)).count("dot_general[") == MAPS[rule, signs]


def test_sums_of_many_products_share_maps():
    """W x and |W| |x|, their transposes; in a branch, eight where signs are rare."""
    kernel = jnp.asarray(np.random.default_rng(0).normal(size=(100, 5)))
    composite = jlrp.Composite([("dense", jlrp.rules.AlphaBeta())], base="epsilon")
    program = jax.make_jaxpr(
        lambda x: jlrp.relevance(
            lambda w, x: x @ w, kernel, x, jnp.ones((3, 5)), composite=composite
        )
    )
    assert str(program(jnp.ones((3, 100)))).count("dot_general[") == 4 + 8


# Affine operations: kinds here; test_rules and test_spellings compare the relevance.


def conv(x, kernel):
    return lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def keras_norm(p, z):
    inverse = lax.rsqrt(p["var"] + 1e-3) * p["a"]
    return z * inverse + (p["b"] - p["c"] * inverse)


ONE_DENSE = {
    "no bias": lambda p, x: x @ p["u"],
    "bias": lambda p, x: x @ p["u"] + p["b"],
    "bias first": lambda p, x: p["b"] + x @ p["u"],
    "bias subtracted": lambda p, x: x @ p["u"] - p["b"],
    "subtracted from a bias": lambda p, x: p["b"] - x @ p["u"],
    "literal bias": lambda p, x: 2.0 * (x @ p["u"]) - 0.5,
    "bias broadcast": lambda p, x: jnp.broadcast_to(p["b"], (3, 5)) + x @ p["u"],
    "bias behind a new axis": lambda p, x: (x @ p["u"])[:, None] + p["b"],
    "einsum to heads": lambda p, x: (
        jnp.einsum("bi,ioh->hbo", x, p["u"][..., None]) + p["b"]
    ),
    "normalised kernel": lambda p, x: (
        x @ (p["u"] / jnp.linalg.norm(p["u"], axis=0) * p["a"]) + p["b"]
    ),
    "scale": lambda p, x: (x @ p["u"] + p["b"]) * p["a"] / p["c"],
    "Flax's batch norm": lambda p, x: (
        (x @ p["u"] + p["b"] - p["c"]) * (lax.rsqrt(p["var"] + 1e-3) * p["a"]) + p["b"]
    ),
    "torch's batch norm": lambda p, x: (
        (x @ p["u"] - p["c"]) / jnp.sqrt(p["var"] + 1e-3) * p["a"] + p["b"]
    ),
    "Keras's batch norm": lambda p, x: keras_norm(p, x @ p["u"] + p["b"]),
    "jit and vmap": lambda p, x: jax.jit(jax.vmap(lambda v: v @ p["u"]))(x) + p["b"],
    "constant from outside": lambda p, x: x @ P["u"] + P["b"],
}


@table(ONE_DENSE)
def test_a_dense_map_is_one_operation(case):
    assert kinds(case) == ["dense"]


ONE_CONV = {
    "bias": lambda p, x: conv(x, p["kernel"]) + p["shift"],
    "batch norm": lambda p, x: (
        (conv(x, p["kernel"]) - p["mean"]) / jnp.sqrt(p["variance"]) * p["scale"]
    ),
    "channels moved": lambda p, x: (
        conv(x, p["kernel"]).transpose(0, 3, 1, 2) * p["scale"][:, None, None]
        + p["shift"][:, None, None]
    ),
    "pixels merged": lambda p, x: (
        conv(x, p["kernel"]).reshape(-1, 4) * p["scale"] + p["shift"]
    ),
    "channels grouped": lambda p, x: (
        conv(x, p["kernel"]).reshape(2, 4, 4, 2, 2) * p["scale"].reshape(2, 2)
    ),
    "scale broadcast": lambda p, x: (
        conv(x, p["kernel"]) * jnp.broadcast_to(p["scale"], (2, 4, 4, 4))
    ),
}


@table(ONE_CONV)
def test_a_convolution_is_one_operation(case):
    assert kinds(case, IMAGE) == ["conv"]


NOT_MERGED = {
    "scale over the batch": (
        lambda p, x: x @ p["u"] * jnp.asarray([[1.0], [0.5], [2.0]]),
        ["dense", "scale"],
    ),
    "scale by x": (lambda p, x: (x @ p["u"]) * x, ["dense", "product"]),
    "scale by a mask of x": (
        lambda p, x: (x @ p["u"]) * (x > 0) + p["b"],
        ["dense", "linear", "scale"],
    ),
    "scale by stopped x": (
        lambda p, x: (x @ p["u"]) * lax.stop_gradient(x),
        ["dense", "linear"],
    ),
    "residual": (lambda p, x: x @ p["u"] + p["b"] + x, ["dense", "add"]),
    "two active operands": (lambda p, x: x @ x.T, ["movement", "product"]),
    "a shared value": (
        lambda p, x: jnp.concatenate([(z := x @ p["u"]), z * p["a"] + p["b"]], 1),
        ["dense", "scale", "movement"],
    ),
    "two dense maps": (lambda p, x: x @ p["u"] @ p["v"], ["dense", "dense"]),
    "no kernel": (lambda p, x: x * p["a"] + p["b"], ["scale"]),
}


@table(NOT_MERGED)
def test_decoys_of_affine_operations(case):
    fn, expected = case
    assert kinds(fn) == expected


def test_a_scale_over_space_is_not_merged():
    found = kinds(lambda p, x: conv(x, p["kernel"]) * p["map"] + p["shift"], IMAGE)
    assert found[0] == "conv" and set(found[1:]) == {"scale"}


# Unary regions.

PASSING = {
    "relu": relu,
    "relu by mask": lambda x: x * (x > 0).astype(x.dtype),
    "relu by where": lambda x: jnp.where(x > 0, x, 0.0),
    "gelu": jax.nn.gelu,
    "gelu with erf": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu by hand": lambda x: (
        0.5 * x * (1 + jnp.tanh(0.7978845608 * (x + 0.044715 * x**3)))
    ),
    "gelu with erf by hand": lambda x: x * (1 + lax.erf(x / np.sqrt(2.0))) / 2,
    "silu": jax.nn.silu,
    "silu by hand": lambda x: x / (1 + jnp.exp(-x)),
    "quick gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "mish": lambda x: x * jnp.tanh(jax.nn.softplus(x)),
    "hard swish": jax.nn.hard_swish,
    "hard tanh": jax.nn.hard_tanh,
    "leaky": jax.nn.leaky_relu,
    "prelu": lambda x: jnp.where(x > 0, x, P["a"] * x),
    "prelu by parts": lambda x: jnp.maximum(x, 0) + P["a"] * jnp.minimum(x, 0),
    "elu": jax.nn.elu,
    "celu": jax.nn.celu,
    "selu": jax.nn.selu,
    "soft sign": jax.nn.soft_sign,
    "tanh": jnp.tanh,
    "tanh by hand": lambda x: 2 * jax.nn.sigmoid(2 * x) - 1,
    "snake": lambda x: x + jnp.sin(P["var"] * x) ** 2 / P["var"],
    "swish with a parameter": lambda x: x * jax.nn.sigmoid(P["a"] * x),
    "squared relu": lambda x: jnp.square(relu(x)),
    "tanh shrink": lambda x: x - jnp.tanh(x),
    "a user's own": lambda x: x / (1 + jnp.abs(x)) + 0.1 * x**3,
    "exp(x) - 1": lambda x: jnp.exp(x) - 1,
    "power": lambda x: jnp.abs(x) ** 1.5,
    "inverse": lambda x: 1 / x,
}


def layers(f):
    """f between two dense layers."""
    return lambda p, x: f(x @ p["u"] + p["b"]) @ p["v"]


@pytest.mark.parametrize("name", PASSING)
def test_an_activation_is_one_operation_and_passes(name):
    _, activation, _ = rows(layers(PASSING[name]))
    assert (activation.kind, activation.rule) == ("activation", "Pass()")
    assert activation.status == "covered"


def test_activations_that_pass_conserve():
    """What x gets is what the first bias leaves: the activation keeps nothing."""
    h, p = X @ P["u"] + P["b"], P
    names = [n for n in PASSING if n != "inverse"]
    seeds = jnp.linspace(-1.0, 2.0, 15).reshape(3, 5)
    ours = relevance([layers(PASSING[name]) for name in names])
    for name, found in zip(names, ours, strict=True):
        y = PASSING[name](h)
        arrived = y * (seeds @ p["v"].T)  # at the activation, and passed by it
        expected = X * ((arrived / h) @ p["u"].T)
        scale = float(jnp.abs(expected).max())
        np.testing.assert_allclose(
            found, expected, rtol=0, atol=1e-10 * scale, err_msg=name
        )


TAYLOR = {
    "sigmoid": [jax.nn.sigmoid, lambda x: 1 / (1 + jnp.exp(-x))],
    "softplus": [
        jax.nn.softplus,
        lambda x: jnp.log1p(jnp.exp(x)),
        lambda x: jnp.log(1 + jnp.exp(x)),
        lambda x: jnp.maximum(x, 0) + jnp.log1p(jnp.exp(-jnp.abs(x))),
    ],
    "one minus sigmoid": [
        lambda x: 1 - jax.nn.sigmoid(x),
        lambda x: jax.nn.sigmoid(-x),
    ],
    "exp": [jnp.exp, lambda x: jnp.exp(x / 2) ** 2, lambda x: 1 / jnp.exp(-x)],
    "cosine": [jnp.cos, lambda x: 1 - 2 * jnp.sin(x / 2) ** 2],
    "shifted gelu": [lambda x: jax.nn.gelu(x + 1.0)],
}


@pytest.mark.parametrize("name", TAYLOR)
def test_functions_with_an_offset_take_taylor_in_every_spelling(name):
    fns = [layers(f) for f in TAYLOR[name]]
    for fn in fns:
        _, activation, _ = rows(fn)
        assert (activation.kind, activation.rule) == ("activation", "Gradient()")
        assert activation.status == "covered"
    found = relevance(fns)
    slope = jax.vmap(jax.vmap(jax.grad(TAYLOR[name][0])))(X @ P["u"] + P["b"])
    seeds = jnp.linspace(-1.0, 2.0, 15).reshape(3, 5)
    assert_all_equal([X * ((seeds @ P["v"].T * slope) @ P["u"].T), *found])


NO_SINGLE_ACTIVATION = {
    "affine": (lambda p, x: 2 * x + 1, ["scale"]),
    "parameter shift before": (
        lambda p, x: relu(x + p["b"]),
        ["scale", "activation"],
    ),
    "parameter scale behind": (
        lambda p, x: relu(x) * p["b"],
        ["activation", "scale"],
    ),
    "parameter between": (
        lambda p, x: jnp.tanh(relu(x) + p["b"]),
        ["activation", "scale", "activation"],
    ),
    "a residual around a dense": (
        lambda p, x: x + jax.nn.gelu(x) @ p["u"],
        ["activation", "dense", "add"],
    ),
    "a gate from a dense": (
        lambda p, x: jax.nn.silu(x) * (x @ p["u"]),
        ["activation", "dense", "product"],
    ),
    "a reduction": (lambda p, x: x - x.max(), ["selection", "movement", "add"]),
    "a neighbour": (lambda p, x: x * x[::-1], ["movement", "product"]),
}


@table(NO_SINGLE_ACTIVATION)
def test_decoys_of_activations(case):
    fn, expected = case
    found = kinds(fn)
    assert [k for k in found if k != "movement"] == [
        k for k in expected if k != "movement"
    ]


def test_literal_shifts_belong_to_the_activation():
    fn = layers(lambda x: 3 - 2 * jnp.tanh(x / 4 + 0.5))
    assert kinds(fn) == ["dense", "activation", "dense"]


# Facts hold inside transformations.


def in_jit(f):
    return jax.jit(f)


def in_vmap(f):
    return jax.vmap(f)


def in_custom_jvp(f):
    wrapped = jax.custom_jvp(f)
    wrapped.defjvp(lambda primals, tangents: jax.jvp(f, primals, tangents))
    return wrapped


def in_custom_vjp(f):
    wrapped = jax.custom_vjp(f)
    wrapped.defvjp(lambda x: jax.vjp(f, x), lambda pull, ct: pull(ct))
    return wrapped


def in_checkpoint(f):
    return jax.checkpoint(f)


def in_nested_jits(f):
    return jax.jit(lambda x: jax.jit(f)(jax.jit(lambda v: v)(x)))


def layer_norm(h):
    c = h - h.mean(-1, keepdims=True)
    return c / jnp.sqrt((c * c).mean(-1, keepdims=True) + 1e-5)


INSIDE = {
    "activation": lambda h: jax.nn.gelu(h),
    "layer norm": layer_norm,
    "softmax": lambda h: jax.nn.softmax(h, axis=-1),
    "dense": lambda h: h @ P["w"] + P["c"],
}
WRAPPERS = [
    in_jit,
    in_vmap,
    in_custom_jvp,
    in_custom_vjp,
    in_checkpoint,
    in_nested_jits,
]


@pytest.mark.parametrize("name", INSIDE)
def test_facts_hold_inside_calls(name):
    f = INSIDE[name]
    plain = layers(f)
    others = [layers(wrap(f)) for wrap in WRAPPERS]
    for wrap, other in zip(WRAPPERS, others, strict=True):
        assert kinds(other) == kinds(plain), wrap.__name__
    assert_all_equal(relevance([plain, *others]))


# Statistics.


def fast_variance(h):
    m = h.mean(-1, keepdims=True)
    variance = jnp.maximum(0, (h * h).mean(-1, keepdims=True) - m * m)
    return (h - m) * lax.rsqrt(variance + 1e-5)


def library_variance(h):
    m = h.mean(-1, keepdims=True)
    return (h - m) * lax.rsqrt(h.var(-1, keepdims=True) + 1e-5)


def keras_layer_norm(h):
    inverse = lax.rsqrt(h.var(-1, keepdims=True) + 1e-5)
    return h * inverse - h.mean(-1, keepdims=True) * inverse


def transposed(h):
    h = h.T
    return ((h - h.mean(0)) / jnp.sqrt(h.var(0) + 1e-5)).T


def by_einsum(h):
    c = h - h.mean(-1, keepdims=True)
    return c / jnp.sqrt(jnp.einsum("bi,bi->b", c, c) / 5 + 1e-5)[:, None]


def by_vmap(h):
    return jax.vmap(lambda v: (v - v.mean()) * lax.rsqrt(v.var() + 1e-5))(h)


LAYER_NORMS = [
    layer_norm,
    fast_variance,
    library_variance,
    keras_layer_norm,
    transposed,
    by_einsum,
    by_vmap,
    functools.partial(jax.nn.standardize, epsilon=1e-5),
]


def frozen(norm, x):
    """x times the gradient of a layer norm whose deviation is a constant."""
    h = x @ P["u"] + P["b"]
    deviation = (
        jnp.sqrt(h.var(-1, keepdims=True) + 1e-5)
        if norm == "layer"
        else (jnp.sqrt((h * h).mean(-1, keepdims=True) + 1e-6))
    )
    seeds = jnp.linspace(-1.0, 2.0, 15).reshape(3, 5)

    def linear(x):
        h = x @ P["u"]
        h = h - h.mean(-1, keepdims=True) if norm == "layer" else h
        return jnp.sum(seeds * ((h / deviation * P["a"]) @ P["v"]))

    return x * jax.grad(linear)(x)


def scaled(norm):
    return lambda p, x: (norm(x @ p["u"] + p["b"]) * p["a"] + p["c"]) @ p["v"]


def test_layer_norm_in_every_spelling():
    models = [scaled(norm) for norm in LAYER_NORMS]
    for model, norm in zip(models, LAYER_NORMS, strict=True):
        assert "norm" in kinds(model) and "product" not in kinds(model), norm
    assert_all_equal([frozen("layer", X), *relevance(models)], 1e-9)


@pytest.mark.parametrize(
    "before", [relu, jnp.tanh, lambda h: h + jnp.tanh(h), layer_norm, keras_layer_norm]
)
def test_a_norm_of_what_is_nonlinear_already(before):
    """Keras's ``mean * inv``: the mean is linear in the norm's own source."""
    models = [
        lambda p, x, norm=norm: norm(before(x @ p["u"])) @ p["v"]
        for norm in (layer_norm, keras_layer_norm)
    ]
    assert "product" not in kinds(models[1])
    assert_all_equal(relevance(models))


def test_rms_norm_in_every_spelling():
    norms = [
        lambda h: h * lax.rsqrt((h**2).mean(-1, keepdims=True) + 1e-6),
        lambda h: h / jnp.sqrt(jnp.square(h).mean(-1, keepdims=True) + 1e-6),
        lambda h: h * ((h * h).sum(-1, keepdims=True) / 5 + 1e-6) ** -0.5,
        lambda h: jnp.sqrt(5.0) * h / jnp.sqrt((h * h).sum(-1)[:, None] + 5e-6),
    ]
    models = [scaled(norm) for norm in norms]
    for model in models:
        assert "norm" in kinds(model) and "product" not in kinds(model)
    assert_all_equal([frozen("rms", X), *relevance(models)], 1e-9)


def group_norm(h):
    g = h.reshape(2, 4, 4, 2, 2)
    m = g.mean((1, 2, 4), keepdims=True)
    g = (g - m) * lax.rsqrt(g.var((1, 2, 4), keepdims=True) + 1e-5)
    return g.reshape(h.shape) * P["scale"] + P["shift"]


OTHER_NORMS = {
    "group norm": group_norm,
    "instance norm": lambda h: (
        (h - h.mean((1, 2), keepdims=True))
        / jnp.sqrt(h.var((1, 2), keepdims=True) + 1e-5)
    ),
    "L2 norm": lambda h: h / jnp.linalg.norm(h, axis=-1, keepdims=True),
    "global response norm": lambda h: (
        h
        * (
            (g := jnp.sqrt(jnp.square(h).sum((1, 2), keepdims=True)))
            / (g.mean(-1, keepdims=True) + 1e-6)
        )
    ),
    "max norm": lambda h: h / jnp.abs(h).max(-1, keepdims=True),
    "softmax-free attention weights": lambda h: (
        jnp.square(h) / jnp.square(h).sum(-1, keepdims=True)
    ),
}


@table(OTHER_NORMS)
def test_other_norms_have_statistics(case):
    found = kinds(lambda p, x: case(conv(x, p["kernel"])), IMAGE)
    assert "norm" in found and "product" not in found


GATES = {
    "rsqrt of a dense": lambda p, h: lax.rsqrt(jnp.square(h @ p["v"]) + 1.0),
    "sigmoid of a dense": lambda p, h: jax.nn.sigmoid(h @ p["v"]),
    "squeeze and excite": lambda p, h: jax.nn.sigmoid(
        h.mean(-1, keepdims=True) @ p["v"][:1]
    ),
    "parameter shift": lambda p, h: jax.nn.sigmoid(
        h.mean(-1, keepdims=True) * 2 + p["b"][:1]
    ),
    "a neighbour's norm": lambda p, h: lax.rsqrt(
        jnp.square(h @ p["w"]).sum(-1, keepdims=True)
    ),
}


@table(GATES)
def test_decoys_of_statistics_are_products(case):
    def fn(p, x):
        h = x @ p["u"]
        return h * case(p, h)

    assert "product" in kinds(fn) and "norm" not in kinds(fn)


def test_other_decoys_of_statistics():
    assert kinds(lambda p, x: x * jax.nn.sigmoid(x)) == ["activation"]
    assert kinds(lambda p, x: x * jnp.sum(p["u"])) == ["scale"]
    assert "norm" not in kinds(lambda p, x: (x @ p["u"]) * x.sum(-1, keepdims=True))


# Softmax.


def by_hand(h):
    e = jnp.exp(h)
    return e / e.sum(-1, keepdims=True)


def shifted(h):
    e = jnp.exp(h - lax.stop_gradient(h.max(-1, keepdims=True)))
    return e / jnp.sum(e, -1, keepdims=True)


def along_rows(h):
    return jax.nn.softmax(h.T, axis=0).T


SOFTMAXES = [lambda h: jax.nn.softmax(h, axis=-1), by_hand, shifted, along_rows]


def test_softmax_in_every_spelling():
    models = [layers(softmax) for softmax in SOFTMAXES]
    for model in models:
        assert [k for k in kinds(model) if k != "movement"] == [
            "dense",
            "softmax",
            "dense",
        ]
    seeds = jnp.linspace(-1.0, 2.0, 15).reshape(3, 5)
    taylor = X * jax.grad(lambda x: jnp.sum(seeds * models[0](P, x)))(X)
    assert_all_equal([taylor, *relevance(models)], 1e-9)


def test_masked_scores_have_no_relevance():
    mask = jnp.asarray([True, False, True, True, False])

    def fn(p, x):
        return jax.nn.softmax(jnp.where(mask, x, -jnp.inf), axis=-1) @ p["v"]

    (found,) = relevance([fn])
    assert np.all(np.isfinite(found)) and not np.any(found[:, ~mask])
    assert np.all(found[:, mask] != 0)


def test_decoy_of_softmax():
    def fn(p, x):
        e = jnp.exp(x @ p["u"])
        return e / jnp.exp(x @ p["v"]).sum(-1, keepdims=True)

    assert "softmax" not in kinds(fn) and "product" in kinds(fn)


# Products.


def factors(p, x):
    return x @ p["u"], x @ p["v"], x @ p["w"]


def combined(function):
    return lambda p, x: function(*factors(p, x))


SAME_PRODUCTS = {
    "association": [
        combined(lambda a, b, c: (a * b) * c),
        combined(lambda a, b, c: a * (b * c)),
        combined(lambda a, b, c: b * (2 * (a * c).T.T) / 2),
        combined(lambda a, b, c: jnp.einsum("bi,bi,bi->bi", a, b, c)),
    ],
    "contraction": [
        combined(lambda a, b, c: jnp.sum(a * b, -1)),
        combined(lambda a, b, c: jnp.einsum("bi,bi->b", a, b)),
        combined(lambda a, b, c: jax.vmap(jnp.dot)(b, a)),
    ],
    "linear attention": [
        combined(lambda a, b, c: (a @ b.T) @ c),
        combined(lambda a, b, c: a @ (b.T @ c)),
    ],
    "linear attention of one value": [
        combined(lambda a, b, c: (a @ a.T) @ a),
        combined(lambda a, b, c: a @ (a.T @ a)),
    ],
    "attention as product and sum": [
        combined(lambda a, b, c: a @ b.T),
        combined(lambda a, b, c: jnp.sum(a[:, None] * b[None], -1)),
    ],
    "quotient": [
        combined(lambda a, b, c: a / b),
        combined(lambda a, b, c: a * (1 / b)),
        combined(lambda a, b, c: a * b**-1),
    ],
}


@pytest.mark.parametrize("rule", [jlrp.rules.Uniform(), jlrp.rules.Gate()], ids=repr)
@pytest.mark.parametrize("name", SAME_PRODUCTS)
def test_a_product_is_one_whatever_its_spelling(name, rule):
    composite = jlrp.Composite([("product", rule)], base=EXACT)
    assert_all_equal(relevance(SAME_PRODUCTS[name], composite), 1e-9)


def test_three_factors_get_a_third_each():
    fn = SAME_PRODUCTS["association"][0]
    a, b, c = factors(P, X)
    seeds = jnp.linspace(-1.0, 2.0, 15).reshape(3, 5) / 3
    u, v, w = ((seeds * rest) for rest in (b * c, a * c, a * b))
    expected = X * (u @ P["u"].T + v @ P["v"].T + w @ P["w"].T)
    assert_all_equal([expected, *relevance([fn])], 1e-9)


def gate(name, a, b, c):
    """A gated value, and the same with the gate as a constant."""
    sigmoid, stop = jax.nn.sigmoid, lax.stop_gradient
    z = sigmoid(a)
    return {
        "silu(a) b": (jax.nn.silu(a) * b, stop(jax.nn.silu(a)) * b),
        "sigmoid(a) b": (sigmoid(a) * b, stop(z) * b),
        "sigmoid(a) tanh(b)": (z * jnp.tanh(b), stop(z * jnp.tanh(b) / b) * b),
        "GRU": (
            (1 - z) * jnp.tanh(b) + z * c,
            stop((1 - z) * jnp.tanh(b) / b) * b + stop(z) * c,
        ),
        "sigmoid as a quotient": (b / (1 + jnp.exp(-a)), stop(z) * b),
        "softmax": (
            jax.nn.softmax(a, axis=-1) * b,
            stop(jax.nn.softmax(a, axis=-1)) * b,
        ),
        "attention": (
            jax.nn.softmax(a @ c.T, axis=-1) @ b,
            stop(jax.nn.softmax(a @ c.T, axis=-1)) @ b,
        ),
        "three": (z * b * c, stop(z * c) * b / 2 + stop(z * b) * c / 2),
        "two gates": (z * sigmoid(b) * c, stop(z * sigmoid(b)) * c),
    }[name]


@pytest.mark.parametrize(
    "name",
    [
        "silu(a) b",
        "sigmoid(a) b",
        "sigmoid(a) tanh(b)",
        "GRU",
        "sigmoid as a quotient",
        "softmax",
        "attention",
        "three",
        "two gates",
    ],
)
def test_gate_gives_nothing_to_the_gate(name):
    composite = jlrp.Composite([("product", jlrp.rules.Gate())], base=EXACT)
    (found,) = relevance([combined(lambda *abc: gate(name, *abc)[0])], composite)
    seeds = jnp.linspace(-1.0, 2.0, 15).reshape(3, 5)
    constant = combined(lambda *abc: gate(name, *abc)[1])
    expected = X * jax.grad(lambda x: jnp.sum(seeds * constant(P, x)))(X)
    assert_all_equal([expected, found], 1e-9)
