"""What the integrations share: names, keys, arguments, missing frameworks."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlrp
from jlrp.integrations import _functions, _names, equinox, flax, haiku, keras
from jlrp.integrations._functions import ModelFunction, arguments, comparable
from jlrp.integrations._names import scope


@pytest.mark.parametrize(
    "module, extra, helper",
    [
        ("flax", "flax", lambda: flax.linen(None, None)),
        ("flax.nnx", "flax", lambda: flax.nnx(None)),
        ("equinox", "equinox", lambda: equinox.module(None)),
        ("haiku", "haiku", lambda: haiku.transformed(None, None)),
        ("keras", "keras", lambda: keras.model(None)),
    ],
)
def test_missing_frameworks(monkeypatch, module, extra, helper):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(jlrp.IntegrationError, match=f"pip install 'jlrp.{extra}.'"):
        helper()


def test_importing_integrations_imports_no_framework():
    program = (
        "import sys; from jlrp.integrations import equinox, flax, haiku, keras; "
        "sys.exit(not {'equinox', 'flax', 'haiku', 'keras'}.isdisjoint(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


def stacks(fn, *args):
    """The names of sines, through the bodies of calls."""
    program, _ = jlrp.ir.program.trace(fn, *args)
    return [e.scope for e in program.equations if e.primitive.name == "sin"]


def test_scopes_are_absolute_paths():
    def fn(x):
        with scope(""):
            y = jnp.sin(x)
            with scope("a"), jax.named_scope("own"), scope("a/b"):
                y = jnp.sin(y)
                y = jax.vmap(lambda y: _scoped("a/b", y))(y)
                with scope("other/c"):
                    y = jnp.sin(y)
            return jnp.sin(y)

    expected = ["", "a/b", "a/b", "other/c", ""]
    x = jnp.ones((2, 2, 2))
    assert stacks(fn, x) == expected
    assert stacks(jax.vmap(fn), x) == expected
    assert stacks(jax.vmap(jax.vmap(fn)), x) == expected
    around = [f"around/{path}".rstrip("/") for path in expected]
    assert stacks(lambda x: _around(fn, x), x) == around


def _around(fn, x):
    with jax.named_scope("around"):
        return fn(x)


@pytest.mark.parametrize("transform", [jax.jit, jax.checkpoint])
def test_scopes_in_bodies(transform):
    @transform
    def inner(x):
        x = jnp.sin(x)
        with scope("a/b"):
            x = jax.vmap(lambda x: _scoped("a/b/c", x))(x)
            x = jax.jit(lambda x: _scoped("a/b/d", x))(x)
        with scope("a/e"):
            return jnp.sin(x)

    def fn(x):
        with scope("a"):
            return inner(x)

    names = [name.replace("checkpoint/", "") for name in stacks(fn, jnp.ones(3))]
    assert names == ["a", "a/b/c", "a/b/d", "a/e"]


def _scoped(path, x):
    with scope(path):
        return jnp.sin(x)


def test_scopes_close_on_errors():
    with pytest.raises(ValueError), scope("a"), scope("a/b"):
        raise ValueError
    assert _names._innermost.get() is None
    assert stacks(lambda x: _scoped("c", x), jnp.ones(3)) == ["c"]


def test_arguments():
    assert arguments(1) == ((1,), {})
    assert arguments((1, 2)) == ((1, 2), {})
    assert arguments({"a": 1}) == ((), {"a": 1})
    assert arguments([1, 2]) == (([1, 2],), {})


def test_keys_are_equal_for_equal_plain_data():
    array = np.ones(2)
    for thing in (1, {"a": [1, (2,)]}, array, {"mask": array}, len, None):
        assert comparable(thing) == comparable(thing)
        assert hash(comparable(thing)) == hash(comparable(thing))
    for one, other in [(1, 1.0), (1, True), ([1], (1,)), (array, np.ones(2))]:
        assert comparable(one) != comparable(other)


def test_functions_are_equal_by_key():
    def run(params, x):
        return params * x

    one, same = (
        ModelFunction(run, ("a", {"b": [1]})),
        ModelFunction(run, ("a", {"b": [1]})),
    )
    assert one == same and hash(one) == hash(same)
    assert one != ModelFunction(run, ("a", {"b": [2]})) != "a"
    assert one != ModelFunction(run, ("a", {"b": [1]}), output=abs)
    assert ModelFunction(run, 0, output=abs)(2.0, -3.0) == 6.0
    assert ModelFunction(lambda p, x: x, 0, whole=True)(None, (1, 2)) == (1, 2)


def test_inference_arguments():
    def call(self, x, train, *, deterministic=None, inference=None):
        pass

    inference = _functions.inference_arguments
    assert inference(call, (0, 1), {}) == {"train": False, "inference": True}
    assert inference(call, (0, 1, True), {"inference": False}) == {}
    assert inference(print, (), {}) == {}
    assert inference(dict.get, (), {}) == {}
