"""Networks written once for many libraries, and what those libraries say about them.

`from peers import captum, shap, torch, zennit` imports the libraries that the parity
tests compare with; in a test module it skips the module where they are not installed.
"""

import importlib.util
import sys
import warnings
from types import ModuleType, SimpleNamespace

import pytest


def _import_torch():
    torch = pytest.importorskip("torch")
    torch.set_num_threads(1)
    return torch


def _import_zennit():
    # Zennit imports torchvision for the names of three classes, so empty classes do.
    # They go again afterwards: others ask whether torchvision is there.
    if importlib.util.find_spec("torchvision") is not None:
        return pytest.importorskip("zennit")
    models = ModuleType("torchvision.models")
    resnet = ModuleType("torchvision.models.resnet")
    for name in ("BasicBlock", "Bottleneck"):
        setattr(resnet, name, type(name, (), {}))
    torchvision = ModuleType("torchvision")
    frozen = type("FrozenBatchNorm2d", (), {})
    torchvision.ops = SimpleNamespace(FrozenBatchNorm2d=frozen)
    stubs = {module.__name__: module for module in (torchvision, models, resnet)}
    sys.modules.update(stubs)
    try:
        return pytest.importorskip("zennit")
    finally:
        for name in stubs:
            del sys.modules[name]


def _import_shap():
    with warnings.catch_warnings():  # of its own imports
        warnings.simplefilter("ignore")
        return pytest.importorskip("shap")


_LIBRARIES = {
    "torch": _import_torch,
    "zennit": _import_zennit,
    "shap": _import_shap,
    "captum": lambda: pytest.importorskip("captum.attr"),
}


def __getattr__(name):
    if name not in _LIBRARIES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _LIBRARIES[name]()
