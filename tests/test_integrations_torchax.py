"""PyTorch through torchax: the same numbers, module paths, an unchanged model."""

import builtins
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from peers import torch
from peers.compare import assert_equal

import jlrp
from jlrp.errors import InputError, IntegrationError, NoRelevanceError
from jlrp.integrations import torchax

try:
    torchax.load()
except IntegrationError as error:
    pytest.skip(str(error), allow_module_level=True)

pytestmark = pytest.mark.relaxed
nn = torch.nn


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.inner = nn.Sequential(nn.Linear(width, 8), nn.GELU(), nn.Linear(8, width))

    def forward(self, x):
        return x + self.inner(self.norm(x))


class Network(nn.Module):
    """Blocks in a list, shared and tied weights, a buffer, a plain tensor."""

    def __init__(self, width=4):
        super().__init__()
        self.embed = nn.Embedding(7, width)
        self.blocks = nn.ModuleList([Block(width), Block(width)])
        self.again = self.blocks[0]
        self.head = nn.Linear(width, 7, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("shift", torch.full((width,), 0.5))
        self.scale = torch.tensor(2.0)

    def forward(self, x=None, *, ids=None, mask=None, times=1.0):
        x = self.embed(ids) if x is None else x
        x = x * self.scale + self.shift
        for block in self.blocks:
            x = block(x)
        x = self.again(x)
        if mask is not None:
            x = x * mask[..., None]
        return self.head(x).sum(1) * times


def build(kind, *args, seed=0, **kwargs):
    torch.manual_seed(seed)
    return kind(*args, **kwargs).eval()


@pytest.fixture
def model():
    return build(Network)


@pytest.fixture
def x():
    return jax.random.normal(jax.random.key(0), (2, 3, 4), jnp.float32)


def gradient_input(model, x, target=None):
    """By PyTorch: the gradient of each example's largest score, times x."""
    x = torch.tensor(np.asarray(x), requires_grad=True)
    (gradient,) = torch.autograd.grad(model(x).amax(-1).sum(), x)
    return (x * gradient).detach().numpy()


def convolutions():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 4, 3, groups=2),
        nn.Hardswish(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Dropout(),
        nn.Linear(4, 3),
    )


def encoder():
    layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
    return nn.Sequential(
        nn.TransformerEncoder(layer, 2, enable_nested_tensor=False),
        nn.Flatten(),
        nn.Linear(12, 3),
    )


MODELS = {
    "network": (Network, (2, 3, 4)),
    "convolutions": (convolutions, (2, 3, 8, 8)),
    "encoder": (encoder, (2, 3, 4)),
}


@pytest.mark.parametrize("name", MODELS)
def test_output_and_gradient_are_torchs(name):
    kind, shape = MODELS[name]
    model = build(kind)
    x = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    fn, params = torchax.module(model)
    with torch.no_grad():
        expected = model(torch.tensor(x)).numpy()
    assert_equal(np.asarray(fn(params, x)), expected, 1e-5)
    ours = jlrp.relevance(fn, params, jnp.asarray(x), composite="gradient_input")
    assert_equal(np.asarray(ours), gradient_input(model, x), 1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_nothing_uncovered(name):
    kind, shape = MODELS[name]
    fn, params = torchax.module(build(kind))
    coverage = jlrp.inspect(fn, params, jnp.ones(shape, jnp.float32)).coverage
    assert (coverage.uncovered, coverage.fallback) == (0, 0)


def test_arguments(model, x):
    """x is an argument, a tuple of them, or a dict; the rest is closed over."""
    fn, params = torchax.module(model)
    one = jlrp.relevance(fn, params, x)
    (positional,) = jlrp.relevance(fn, params, (x,))
    keyword = jlrp.relevance(fn, params, {"x": x})["x"]
    np.testing.assert_array_equal(one, positional)
    np.testing.assert_array_equal(one, keyword)
    doubled, _ = torchax.module(model, times=2.0)
    np.testing.assert_allclose(jlrp.relevance(doubled, params, x), 2 * one, rtol=1e-5)


@pytest.mark.parametrize("library", [np.asarray, jnp.asarray, torch.tensor])
def test_static_arrays(model, x, library):
    fn, params = torchax.module(model, mask=library([[1.0, 1.0, 0.0]] * 2))
    relevance = jlrp.relevance(fn, params, x)
    assert not relevance[:, 2].any() and relevance[:, :2].all()


def test_token_ids(model):
    fn, params = torchax.module(model)
    ids = jnp.array([[1, 2, 3], [4, 5, 5]])
    ours = jlrp.relevance(fn, params, {"ids": ids})["ids"]
    fetched = jlrp.relevance(fn, params, params["embed.weight"][ids])
    np.testing.assert_allclose(ours, fetched.sum(-1), rtol=1e-5)


def test_params_are_an_argument(model, x):
    fn, params = torchax.module(model)
    assert "head.weight" not in params or "embed.weight" not in params  # tied
    assert {"shift", "scale"} < set(params)
    none = jax.tree.map(jnp.zeros_like, params)
    assert not fn(none, x).any()
    other, _ = torchax.module(model)
    assert other == fn and hash(other) == hash(fn)


def test_output(model, x):
    first, params = torchax.module(model, output=lambda out: out[:, 0])
    whole, _ = torchax.module(model)
    np.testing.assert_allclose(
        jlrp.relevance(first, params, x),
        jlrp.relevance(whole, params, x, target=0),
        rtol=1e-5,
    )


class Result(dict):
    """As Hugging Face's ModelOutput: a dict of tensors, some None."""


class Wrapped(nn.Module):
    def __init__(self, cache):
        super().__init__()
        self.linear, self.cache = nn.Linear(4, 2), cache

    def forward(self, x):
        y = self.linear(x)
        return Result(scores=y, loss=None, hidden=(y, x), cache=self.cache)


def test_dicts_become_plain(x):
    fn, params = torchax.module(build(Wrapped, None))
    out = fn(params, x)
    assert type(out) is dict and list(out) == ["scores", "hidden"]
    relevance = jlrp.relevance(
        fn, params, x, target=lambda out: out["scores"].max((1, 2))
    )
    assert relevance.shape == x.shape


def test_error_for_what_is_no_array(x):
    fn, params = torchax.module(build(Wrapped, object()))
    with pytest.raises(IntegrationError, match=r"output=lambda out: out\.logits"):
        jlrp.relevance(fn, params, x)


def test_scopes(model, x):
    """Module paths, absolute, whoever calls the module; each opened and closed."""
    fn, params = torchax.module(model)
    report = jlrp.inspect(fn, params, x)
    scopes = [op.scope for op in report.operations]
    for path in ("blocks/0/norm", "blocks/1/inner/0", "blocks/1/inner/1", "head"):
        assert any(s == path or s.startswith(f"{path}/") for s in scopes), path
    assert not any("blocks/0" in s and "blocks/1" in s for s in scopes)
    plain = jlrp.relevance(fn, params, x)
    composite = jlrp.Composite([("blocks/1/*", jlrp.rules.Stop())])
    assert np.abs(plain - jlrp.relevance(fn, params, x, composite=composite)).max() > 0


def test_scopes_close_when_forward_raises(model, x):
    fn, params = torchax.module(model)
    with pytest.raises(Exception, match="shape|size|dot"):
        fn(params, jnp.ones((2, 3, 5)))
    scopes = {op.scope for op in jlrp.inspect(fn, params, x).operations}
    assert not any("norm" in s and "inner" in s for s in scopes)


def test_the_model_stays_as_it_is(model, x):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    calls = []
    handle = model.blocks[0].register_forward_hook(lambda *_: calls.append(1))
    fn, params = torchax.module(model)
    jlrp.relevance(fn, params, x)
    assert calls  # a user's own hooks run
    handle.remove()
    for part in model.modules():
        assert not part._forward_hooks and not part._forward_pre_hooks
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(type(after[name]) is torch.Tensor for name in after)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert model.embed.weight.requires_grad and model.head.weight is model.embed.weight
    assert all(type(p) is nn.Parameter for p in model.parameters())
    assert type(model.scale) is type(model.shift) is torch.Tensor
    assert not torch.compiler.is_compiling()
    with torch.no_grad():
        model.embed.weight.zero_()  # params are copies
    assert params[next(n for n in params if n.endswith("weight"))].any()


def test_transformations(model, x):
    fn, params = torchax.module(model)
    expected = jlrp.relevance(fn, params, x, composite="epsilon")

    def explain(params, x):
        return jlrp.relevance(fn, params, x, composite="epsilon")

    np.testing.assert_allclose(jax.jit(explain)(params, x), expected, atol=1e-5)
    single = jax.vmap(lambda x: explain(params, x[None])[0])(x)
    np.testing.assert_allclose(single, expected, atol=1e-5)
    slopes = jax.grad(lambda params: explain(params, x).max())(params)
    assert all(np.isfinite(leaf).all() for leaf in slopes.values())


def test_meta_device(x):
    """Abstract params of a model without memory, as of the real one."""
    with torch.device("meta"):
        abstract = build(Network)
    abstract.scale = torch.tensor(2.0, device="meta")
    fn, params = torchax.module(abstract)
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in params.values())
    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
    real, real_params = torchax.module(build(Network))
    assert str(jlrp.inspect(fn, params, shape)) == str(
        jlrp.inspect(real, real_params, shape)
    )


def test_low_precision(model, x):
    fn, params = torchax.module(model.bfloat16())
    assert params["shift"].dtype == jnp.bfloat16
    relevance = jlrp.relevance(fn, params, x.astype(jnp.bfloat16))
    assert relevance.dtype == jnp.float32 and np.isfinite(relevance).all()


def test_errors(model, x):
    with pytest.raises(IntegrationError, match="torch.nn.Module; got function"):
        torchax.module(lambda x: x)
    with pytest.raises(IntegrationError, match=r"model\.eval\(\)"):
        torchax.module(Network())
    model.blocks[1].train()
    with pytest.raises(IntegrationError, match=r"blocks\.1"):
        torchax.module(model)
    model.eval()
    fn, params = torchax.module(model)
    with pytest.raises(NoRelevanceError):
        jlrp.relevance(
            fn, params, {"x": x, "mask": jnp.zeros(())}, target=lambda y: 1.0
        )
    with pytest.raises(InputError):
        jlrp.relevance(fn, params, torch.ones(2, 3, 4))


@pytest.mark.parametrize("name", ["torch", "torchax"])
def test_a_missing_library(monkeypatch, name):
    real = builtins.__import__

    def without(wanted, *args, **kwargs):
        if wanted.split(".")[0] == name:
            raise ImportError(f"No module named {name!r}")
        return real(wanted, *args, **kwargs)

    for loaded in [m for m in sys.modules if m.split(".")[0] == name]:
        monkeypatch.setitem(sys.modules, loaded, None)
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(IntegrationError, match=rf"needs {name}.*pip install"):
        torchax.load()


def test_a_replaced_submodule_makes_another_function():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
    fn, params = torchax.module(model)
    again, _ = torchax.module(model)
    assert again == fn and hash(again) == hash(fn)  # compiled once
    x = jnp.ones((2, 3))
    before = jax.jit(fn)(params, x)
    model[1] = nn.Sigmoid().eval()
    other, params = torchax.module(model)
    assert other != fn
    assert not np.allclose(jax.jit(other)(params, x), before)


def test_auto_takes_the_clauses_of_other_libraries():
    two = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU()
    )
    patches = nn.Sequential(nn.Conv2d(3, 8, 4, stride=4), nn.Flatten(2))
    x = jax.ShapeDtypeStruct((2, 3, 16, 16), jnp.float32)
    for net, wanted in (
        (two, "auto: convolutions (2): Gamma 0.2, no Flat"),
        (patches, "auto: patches that do not overlap: LRP-0"),
    ):
        fn, params = torchax.module(net.eval())
        found = jlrp.inspect(fn, params, x, lambda out: out.sum())
        assert found.why.startswith(wanted)
