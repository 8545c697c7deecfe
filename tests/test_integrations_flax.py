"""Flax: Linen and NNX models become functions with names."""

import re
import subprocess
import sys
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlrp
from jlrp.api import _explained
from jlrp.integrations import flax as integration

nn = pytest.importorskip("flax.linen")
nnx = pytest.importorskip("flax.nnx")
pytestmark = pytest.mark.relaxed

X = jax.random.normal(jax.random.key(0), (2, 3, 4), jnp.float32)


def scopes(fn, params, x=X):
    return {row.scope for row in jlrp.inspect(fn, params, x).operations}


def names(fn, params, x=X):
    """The names of all equations, in bodies of loops too."""
    found = set()

    def visit(jaxpr, outer):
        for eqn in jaxpr.eqns:
            inner = [*outer, *filter(None, [str(eqn.source_info.name_stack)])]
            found.add("/".join(inner))
            for body in jax.tree.leaves(
                list(eqn.params.values()), is_leaf=lambda p: hasattr(p, "eqns")
            ):
                if hasattr(body, "eqns") or hasattr(body, "jaxpr"):
                    visit(getattr(body, "jaxpr", body), inner)

    visit(jax.make_jaxpr(fn)(params, x).jaxpr, [])
    return found


def counts_compilations(explanations):
    _explained.clear_cache()
    for fn, params in explanations:
        jlrp.relevance(fn, params, X)
    return _explained._cache_size()


# Linen


class Mlp(nn.Module):
    layers: list = (5, 3)  # a list given to it makes the module unhashable

    @nn.compact
    def __call__(self, x, *, train: bool):
        x = nn.relu(nn.Dense(self.layers[0], name="hidden")(x))
        self.sow("intermediates", "activity", x)
        x = nn.BatchNorm(use_running_average=not train, name="norm")(x)
        x = nn.Dropout(0.5)(x, deterministic=not train)
        return nn.Dense(self.layers[1], name="out")(x.mean(1))

    def hidden_only(self, x):
        return x.sum((1, 2))


@pytest.fixture
def mlp():
    return Mlp(), Mlp().init(jax.random.key(1), X, train=False)


def test_linen_is_the_modules_own_output(mlp):
    fn, params = integration.linen(*mlp)
    np.testing.assert_array_equal(fn(params, X), mlp[0].apply(mlp[1], X, train=False))
    assert params is mlp[1]
    assert {"Mlp/hidden", "Mlp/out"} <= scopes(fn, params)
    assert jlrp.relevance(fn, params, X).shape == X.shape


def test_linen_takes_the_users_choices(mlp):
    fn, params = integration.linen(*mlp, train=True)
    with pytest.raises(jlrp.IntegrationError, match="training mode.*running_average"):
        fn(params, X)
    fn, params = integration.linen(*mlp, method="hidden_only", output=lambda y: 2.0 * y)
    np.testing.assert_allclose(fn(params, X), 2.0 * X.sum((1, 2)))
    fn, params = integration.linen(*mlp, method=Mlp.hidden_only)
    np.testing.assert_allclose(fn(params, (X,)), fn(params, {"x": X}))


def test_linen_compiles_once(mlp):
    pairs = [integration.linen(Mlp(), mlp[1]) for _ in range(2)]
    assert pairs[0][0] == pairs[1][0] and hash(pairs[0][0]) == hash(pairs[1][0])
    assert counts_compilations(pairs) == 1
    unhashable = Mlp(layers=[5, 3])
    pairs = [integration.linen(unhashable, mlp[1]) for _ in range(2)]
    assert counts_compilations(pairs) == 1
    assert pairs[0][0] != integration.linen(Mlp(layers=[5, 3]), mlp[1])[0]
    assert pairs[0][0] != integration.linen(unhashable, mlp[1], train=False)[0]


def test_linen_abstract(mlp):
    init = jax.eval_shape(
        lambda key: Mlp().init(key, X, train=False), jax.random.key(0)
    )
    fn, params = integration.linen(Mlp(), init)
    assert "Mlp/hidden" in scopes(fn, params, jax.ShapeDtypeStruct(X.shape, X.dtype))


def test_linen_fields_and_arguments_that_choose_inference():
    class Net(nn.Module):
        deterministic: bool | None = None

        @nn.compact
        def __call__(self, x, deterministic=None):
            off = nn.merge_param("deterministic", self.deterministic, deterministic)
            return nn.Dropout(0.5)(x, deterministic=off)

    for net in (Net(), Net(deterministic=True)):
        fn, params = integration.linen(net, {})
        np.testing.assert_array_equal(fn(params, X), X)
        assert not np.array_equal(
            fn(params, X),
            Net().apply({}, X, False, rngs={"dropout": jax.random.key(0)}),
        )


def test_linen_modules_that_insist_on_writing():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            seen = self.variable("cache", "seen", jnp.zeros, ())
            seen.value += 1.0
            return nn.Dense(2, use_bias=False)(x)[:, 0] + seen.value

    params = Net().init(jax.random.key(0), X)
    fn, params = integration.linen(Net(), {"params": params["params"]})
    assert fn(params, X).shape == (2, 2)


def test_linen_errors_of_the_model_come_through(mlp):
    fn, params = integration.linen(mlp[0], {"params": mlp[1]["params"]})
    with pytest.raises(Exception, match="batch_stats"):
        fn(params, X)


# NNX


class Block(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.LayerNorm(4, rngs=rngs)
        self.attn = nnx.MultiHeadAttention(2, 4, rngs=rngs, decode=False)
        self.mlp = nnx.Linear(4, 4, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        x = x + self.attn(self.norm(x))
        return self.drop(x + nnx.gelu(self.feed(x)))

    def feed(self, x):
        return self.mlp(x)


class Net(nnx.Module):
    def __init__(self, rngs, block=Block):
        self.blocks = nnx.List([block(rngs) for _ in range(2)])
        self.norm = nnx.BatchNorm(4, rngs=rngs)

    def __call__(self, x):
        for block in self.blocks:
            x = block(x)
        return self.norm(x).mean(1)


PATHS = {f"blocks/{i}/{name}" for i in range(2) for name in ("mlp", "norm")}
PATHS |= {f"blocks/{i}/attn/{name}" for i in range(2) for name in ("query", "out")}


def test_nnx_leaves_the_model_as_it_is():
    net = Net(nnx.Rngs(0))
    before = nnx.to_pure_dict(nnx.state(net))
    fn, params = integration.nnx(net)
    relevance = jlrp.relevance(fn, params, X, composite="attnlrp")
    assert PATHS <= scopes(fn, params)

    assert type(net.blocks[0]) is Block and type(net.norm) is nnx.BatchNorm
    assert net.blocks[0].drop.deterministic is False
    assert net.norm.use_running_average is False
    jax.tree.map(
        np.testing.assert_array_equal,
        jax.tree.map(jax.random.key_data, _keys(before)),
        jax.tree.map(jax.random.key_data, _keys(nnx.to_pure_dict(nnx.state(net)))),
    )
    net.blocks[0].mlp.kernel[...] = jnp.zeros(
        (4, 4), jnp.float32
    )  # later changes are not seen
    np.testing.assert_array_equal(
        jlrp.relevance(fn, params, X, composite="attnlrp"), relevance
    )
    own = Net(nnx.Rngs(0))
    own.eval()
    np.testing.assert_allclose(fn(params, X), own(X), rtol=1e-5)


def _keys(state):
    leaves = jax.tree.leaves(state)
    return [a for a in leaves if jax.dtypes.issubdtype(a.dtype, jax.dtypes.prng_key)]


def test_nnx_selectors_by_path():
    fn, params = integration.nnx(Net(nnx.Rngs(0)))
    stop = jlrp.Composite([("blocks/*/attn/value", jlrp.rules.Stop())], base="attnlrp")
    rows = jlrp.inspect(fn, params, X, composite=stop).operations
    stopped = {row.scope for row in rows if row.rule == "Stop()"}
    assert stopped == {"blocks/0/attn/value", "blocks/1/attn/value"}


def test_nnx_compiles_once():
    pairs = [integration.nnx(Net(nnx.Rngs(seed))) for seed in range(2)]
    assert pairs[0][0] == pairs[1][0]
    assert counts_compilations(pairs) == 1


def test_nnx_abstract_and_grad():
    fn, params = integration.nnx(nnx.eval_shape(lambda: Net(nnx.Rngs(0))))
    assert PATHS <= scopes(fn, params, jax.ShapeDtypeStruct(X.shape, X.dtype))
    fn, params = integration.nnx(Net(nnx.Rngs(0)))
    assert jax.grad(lambda x: fn(params, x).sum())(X).shape == X.shape
    assert jax.jit(fn)(params, X).shape == (2, 4)


class JitBlock(Block):
    @nnx.jit
    def __call__(self, x):
        return super().__call__(x)


class RematBlock(Block):
    __call__ = nnx.remat(Block.__call__)


@pytest.mark.parametrize("block", [JitBlock, RematBlock])
def test_nnx_names_hold_under_jit_and_remat(block):
    fn, params = integration.nnx(Net(nnx.Rngs(0), block))
    assert PATHS <= scopes(fn, params)
    plain, weights = integration.nnx(Net(nnx.Rngs(0)))
    np.testing.assert_allclose(
        jlrp.relevance(fn, params, X), jlrp.relevance(plain, weights, X), atol=1e-5
    )


class Stacked(nnx.Module):
    def __init__(self, rngs, transform):
        @nnx.split_rngs(splits=3)
        @nnx.vmap(in_axes=0, out_axes=0)
        def make(rngs):
            return Block(rngs)

        self.blocks, self.transform = make(rngs), transform

    def __call__(self, x):
        return self.transform(self.blocks, x).mean(1)


def over_scan(blocks, x):
    @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
    def step(block, x):
        return block(x)

    return step(blocks, x)


def over_vmap(blocks, x):
    return nnx.vmap(lambda block, x: block(x), in_axes=(0, None))(blocks, x).sum(0)


@pytest.mark.parametrize("transform", [over_scan, over_vmap])
def test_nnx_names_hold_under_scan_and_vmap(transform):
    fn, params = integration.nnx(Stacked(nnx.Rngs(0), transform))
    found = names(fn, params)
    assert {"blocks/mlp", "blocks/attn/query"} <= found
    assert jax.grad(lambda x: fn(params, x).sum())(X).shape == X.shape
    if transform is over_vmap:
        assert jlrp.relevance(fn, params, X).shape == X.shape


class Stacking(Net):
    """Stacks its blocks when called, for which they must be of one class."""

    def __call__(self, x):
        mlps = [block.mlp for block in self.blocks]
        stacked = jax.tree.map(lambda *arrays: jnp.stack(arrays), *mlps)
        return stacked.kernel[...].sum() * self.norm(x).mean(1)


def test_nnx_models_that_do_not_bear_names_go_without():
    fn, params = integration.nnx(Stacking(nnx.Rngs(0)))
    with pytest.warns(UserWarning, match="without names"):
        assert fn(params, X).shape == (2, 4)


def test_nnx_errors_of_the_model_come_once():
    class Broken(nnx.Module):
        def __call__(self, x):
            raise ValueError("of the model")

    fn, params = integration.nnx(Broken())
    with pytest.raises(ValueError, match="of the model") as caught:
        fn(params, X)
    assert caught.value.__context__ is None
    assert jlrp.relevance(*integration.nnx(Net(nnx.Rngs(0))), X).shape == X.shape


def test_nnx_shared_nested_and_registered_modules():
    registry = []

    class Registered(nnx.Module):
        def __init_subclass__(cls, **options):
            super().__init_subclass__(**options)
            registry.append(cls.__name__)

    class Leaf(Registered):
        def __init__(self, rngs):
            self.fc = nnx.Linear(4, 4, rngs=rngs)

        def encode(self, x):
            return self.fc(x)

    class Refuses(nnx.Module):
        def __init_subclass__(cls, **options):
            raise TypeError("no subclasses")

        def __call__(self, x):
            return 2.0 * x

    class Tree(nnx.Module):
        def __init__(self, rngs):
            self.a = Leaf(rngs)
            self.b = self.a  # shared
            self.table = nnx.Dict(left=nnx.Linear(4, 4, rngs=rngs))
            self.refuses = Refuses()

        def __call__(self, x):
            x = jax.vmap(self.a.encode)(x) + self.b.encode(x)
            return self.refuses(self.table["left"](x)).mean(1)

    fn, params = integration.nnx(Tree(nnx.Rngs(0)))
    assert {"a/fc", "table/left"} <= scopes(fn, params)
    assert registry.count("Leaf") == 1


def test_nnx_arguments():
    class Two(nnx.Module):
        def __call__(self, x, mask, *, train=True):
            assert not train
            return {"logits": jnp.where(mask, x, 0.0).mean(1)}

    fn, params = integration.nnx(Two(), output=lambda out: out["logits"])
    mask = jnp.array([True, False, True, True])
    for x in ((X, mask), {"x": X, "mask": mask}):
        relevance = jlrp.relevance(fn, params, x)
        assert jax.tree.structure(relevance) == jax.tree.structure(x)
    total = fn(params, x).max(-1).sum()
    np.testing.assert_allclose(relevance["x"].sum(), total, rtol=1e-5)


def test_nnx_threads_do_not_mix_names():
    pairs = [integration.nnx(Net(nnx.Rngs(0))), integration.nnx(Block(nnx.Rngs(0)))]
    found = [set(), set()]

    def work(i):
        with jax.numpy_rank_promotion("allow"):  # is of the thread
            for _ in range(3):
                found[i] |= names(*pairs[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert PATHS <= found[0] and "blocks/0/mlp" not in found[1] and "mlp" in found[1]
    assert "mlp" not in found[0]


class Noisy(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Linear(4, 5, rngs=rngs)])
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.norm = nnx.BatchNorm(5, rngs=rngs)
        self.last = nnx.Linear(5, 3, rngs=rngs)

    def __call__(self, x):
        for layer in self.layers:
            x = self.drop(nnx.relu(layer(x)))
        return self.last(self.norm(x))


def saved(model, kind):
    """What is read from a file: a dict with strings for its keys."""
    pure = nnx.to_pure_dict(nnx.state(model, kind))
    names = jax.tree_util.tree_leaves_with_path(pure)
    tree = {}
    for path, leaf in names:
        *folders, last = (str(part.key) for part in path)
        branch = tree
        for folder in folders:
            branch = branch.setdefault(folder, {})
        branch[last] = np.asarray(leaf)
    return tree


def test_nnx_random_state_belongs_to_the_function():
    model = Noisy(nnx.Rngs(0))
    fn, params = integration.nnx(model)
    assert all(
        jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in jax.tree.leaves(params)
    )
    x = jnp.ones((2, 4))
    wanted = jlrp.relevance(fn, params, x, composite="epsilon")
    whole = (nnx.Param, nnx.BatchStat)
    for given in (
        saved(model, whole),
        nnx.to_pure_dict(nnx.state(model, whole)),
        nnx.state(model),  # random state in it is left out
        nnx.state(model, whole),
    ):
        got = jlrp.relevance(
            fn, jax.tree.map(jnp.asarray, given), x, composite="epsilon"
        )
        np.testing.assert_allclose(got, wanted)
    shapes, _ = integration.nnx(nnx.eval_shape(lambda: Noisy(nnx.Rngs(1))))
    got = jlrp.relevance(shapes, saved(model, whole), x, composite="epsilon")
    np.testing.assert_allclose(got, wanted)


@pytest.mark.parametrize(
    "kind, message",
    [
        (nnx.Param, "lacks norm/mean, norm/var"),
        (nnx.BatchStat, "lacks last/bias, last/kernel, layers/0/bias"),
    ],
)
def test_nnx_params_that_lack_some(kind, message):
    model = Noisy(nnx.Rngs(0))
    fn, _ = integration.nnx(model)
    with pytest.raises(jlrp.IntegrationError, match=message):
        jlrp.relevance(fn, saved(model, kind), jnp.ones((2, 4)))
    other = {**saved(model, (nnx.Param, nnx.BatchStat)), "more": {"w": np.ones(2)}}
    with pytest.raises(jlrp.IntegrationError, match="has more/w, which"):
        jlrp.relevance(fn, other, jnp.ones((2, 4)))


def test_nnx_randomisation():
    from jlrp import metrics

    fn, params = integration.nnx(Noisy(nnx.Rngs(0)))
    x = jax.random.normal(jax.random.key(1), (2, 4))
    found = metrics.randomisation(jlrp.relevance, fn, params, x)
    assert found.layers == ("last", "norm", "layers/0")


def test_the_recipe_of_a_checkpoint(tmp_path):
    """The files and the command of docs/how-to/integrations.md, as they stand there."""
    pytest.importorskip("orbax.checkpoint")
    page = Path(__file__).parents[1] / "docs" / "how-to" / "integrations.md"
    section = page.read_text().split("### A checkpoint, and the command line")[1]
    model, save, command = re.findall(r"```(?:py|sh)\n(.*?)```", section, re.S)[:3]
    (tmp_path / "classifier.py").write_text(model)
    (tmp_path / "save.py").write_text(save)
    lines = [
        [sys.executable, "save.py"],
        [sys.executable, "-m", *command.split()],
        [sys.executable, "-m", *command.split(), "--resume"],
    ]
    for line in lines:
        run = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr[-1500:]
    assert "10 of 10 examples done" in run.stdout
