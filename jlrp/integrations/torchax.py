"""PyTorch modules, run on JAX by torchax."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlrp.errors import IntegrationError
from jlrp.integrations._functions import ModelFunction, framework
from jlrp.integrations._names import scope
from jlrp.typing import Array, PyTree

__all__ = [
    "load",
    "module",
]

_kept: list[object] = []  # torch forgets an operator library when its object dies


def module(
    model: Any,
    *,
    output: Callable[[PyTree], PyTree] | None = None,
    **static_kwargs: object,
) -> tuple[ModelFunction, dict[str, PyTree]]:
    """A ``torch.nn.Module`` as ``fn(params, x)``, and its ``params``.

    ``fn`` traces the model's forward with its own parameters replaced by ``params``;
    operations carry module paths (``layers/0/self_attn/q_proj``) as name scopes. The
    model stays as it is: its parameters are copied, its hooks run.

    Args:
      model: a module in ``eval()`` mode. On the meta device its params are
        ``jax.ShapeDtypeStruct``, enough for ``jlrp.inspect``.
      output: picks what is explained from the model's output, for instance
        ``lambda out: out.logits``.
      **static_kwargs: keyword arguments of forward that are not explained:
        ``use_cache=False``, an attention mask (an array of any library).

    Returns:
      ``fn`` and ``params``, a dict by PyTorch's names that holds buffers too. x is the
      first argument (floats, or token ids), a tuple of positional arguments, or a dict
      of keyword arguments such as ``{"inputs_embeds": ...}``. Outputs that are dicts
      (Hugging Face's ``ModelOutput``) become plain dicts without their None.

    Raises:
      IntegrationError: torch or torchax is missing, the model is in training mode, or
        its output holds something that is no array.

    Example:
      >>> import jax.numpy as jnp, jlrp, torch
      >>> from jlrp.integrations import torchax
      >>> fn, params = torchax.module(torch.nn.Linear(3, 2).eval())
      >>> jlrp.relevance(fn, params, jnp.ones((1, 3))).shape
      (1, 3)
    """
    torchax = load()
    torch = framework("torch", "torchax")
    if not isinstance(model, torch.nn.Module):
        raise IntegrationError(
            f"module() takes a torch.nn.Module; got {type(model).__name__}."
        )
    training = [path for path, part in model.named_modules() if part.training]
    if training:
        raise IntegrationError(
            f"The model, or a part of it ({training[0] or 'all'!r}), is in training "
            "mode, in which dropout is random and batch norm uses its batch. Call "
            "model.eval() first."
        )
    env = torchax.default_env()
    held = _held(model, torch)
    first = {
        id(tensor): name for name, tensor in reversed(held.items())
    }  # of tied ones

    def run(params: PyTree, *args: PyTree, **kwargs: PyTree) -> PyTree:
        own = _tensors(params, torch, env)
        own = {name: own[first[id(tensor)]] for name, tensor in held.items()}
        args, kwargs = _tensors((args, {**static_kwargs, **kwargs}), torch, env)
        with env, torch.no_grad(), _compiling(torch), _scopes(model):
            out = torch.func.functional_call(
                model, own, args, kwargs, tie_weights=False
            )
            return _arrays(out if output is None else output(out), torch, env)

    key = (tuple(model.modules()), static_kwargs, output)  # one may be replaced later
    params = {name: _array(held[name]) for name in first.values()}
    return ModelFunction(run, key), params


def _held(model: Any, torch: Any) -> dict[str, PyTree]:
    """Every tensor of every module once by name: parameters, buffers, plain ones."""
    held = {}
    for path, part in model.named_modules():  # a shared module comes once
        members = {**part._parameters, **part._buffers, **vars(part)}
        for name, member in members.items():
            if isinstance(member, torch.Tensor):
                held[f"{path}.{name}".lstrip(".")] = member
    return held


def load() -> Any:
    """Import torchax, in spite of two faults of its surroundings.

    Torchax 0.0.13 asks PyTorch 2.13 for operators on named tensors, which are gone;
    it needs them as dictionary keys only. And a torchvision whose compiled half does
    not fit the installed PyTorch cannot be imported, nor can what imports it:
    transformers. Call this before.
    """
    torch = framework("torch", "torchax")
    if importlib.util.find_spec("torchvision") is not None:
        _declare_torchvision(torch)
    with _missing_overloads(torch):
        torchax = framework("torchax", "torchax")
        torchax.default_env()  # imports the table of operators
    return torchax


@contextlib.contextmanager
def _missing_overloads(torch: Any) -> Iterator[None]:
    """Overloads of operators that PyTorch no longer has are placeholders inside."""
    packet = torch._ops.OpOverloadPacket
    original = packet.__getattr__

    class Missing:
        def __init__(self, name: str):
            self._name = name

        def name(self) -> str:
            return self._name

    def lookup(self: Any, key: str) -> object:
        try:
            return original(self, key)
        except AttributeError:
            if key.startswith("_"):
                raise
            return Missing(f"{self._qualified_op_name}.{key}")

    packet.__getattr__ = lookup
    try:
        yield
    finally:
        packet.__getattr__ = original


def _declare_torchvision(torch: Any) -> None:
    """Import torchvision; where its operators do not load, declare them first."""
    try:
        importlib.import_module("torchvision")
    except RuntimeError:  # operator torchvision::nms does not exist
        library = torch.library.Library("torchvision", "DEF")
        _kept.append(library)
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor a, Tensor b, float threshold) -> Tensor")


@contextlib.contextmanager
def _scopes(model: Any) -> Iterator[None]:
    """Inside, every submodule opens a name scope of its path when it is called."""
    opened: list[tuple[str, AbstractContextManager[object]]] = []

    def enter(path: str, *_: object) -> None:
        context = scope(path)
        context.__enter__()
        opened.append((path, context))

    def leave(path: str, *_: object) -> None:
        left = None
        while opened and left != path:  # also what an exception left open inside
            left, context = opened.pop()
            context.__exit__(None, None, None)

    handles = []
    for name, part in model.named_modules():
        if name:
            path = name.replace(".", "/")
            entering, leaving = partial(enter, path), partial(leave, path)
            handles.append(part.register_forward_pre_hook(entering, prepend=True))
            handles.append(part.register_forward_hook(leaving))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        leave("")


@contextlib.contextmanager
def _compiling(torch: Any) -> Iterator[None]:
    """Inside, ``torch.compiler.is_compiling()``: models must not look at numbers."""
    before = torch.compiler._is_compiling_flag
    torch.compiler._is_compiling_flag = True
    try:
        yield
    finally:
        torch.compiler._is_compiling_flag = before


def _array(tensor: Any) -> Array | jax.ShapeDtypeStruct:
    """A tensor of PyTorch as an array of JAX; its shape alone on the meta device."""
    from torchax.ops import mappings  # type: ignore

    if tensor.device.type == "meta":
        dtype = jax.dtypes.canonicalize_dtype(mappings.t2j_dtype(tensor.dtype))
        return jax.ShapeDtypeStruct(tuple(tensor.shape), dtype)
    return mappings.t2j(tensor.detach(), use_dlpack=False)


def _tensors(tree: PyTree, torch: Any, env: Any) -> PyTree:
    """The arrays in a tree of arguments as torchax's tensors; all else as it is."""
    if isinstance(tree, Mapping):
        return {name: _tensors(leaf, torch, env) for name, leaf in tree.items()}
    if isinstance(tree, (tuple, list)):
        return type(tree)(_tensors(leaf, torch, env) for leaf in tree)
    if isinstance(tree, torch.Tensor):
        tree = _array(tree)
    if isinstance(tree, (jax.Array, np.ndarray, np.generic)):
        return env.j2t_iso(jnp.asarray(tree))
    return tree


def _arrays(out: PyTree, torch: Any, env: Any) -> PyTree:
    """The tensors in a model's output as arrays, dicts as plain dicts."""
    if isinstance(out, torch.Tensor):
        return env.t2j_iso(out)
    if isinstance(out, Mapping):
        items = {name: leaf for name, leaf in out.items() if leaf is not None}
        return {name: _arrays(leaf, torch, env) for name, leaf in items.items()}
    if isinstance(out, (tuple, list)):
        leaves = [_arrays(leaf, torch, env) for leaf in out]
        return type(out)(*leaves) if hasattr(out, "_fields") else type(out)(leaves)
    if out is None:
        return None
    raise IntegrationError(
        f"The model's output holds a {type(out).__name__}, which is no array. Pick "
        "what is explained, such as output=lambda out: out.logits, or switch it off, "
        "such as use_cache=False."
    )
