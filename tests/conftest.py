"""Strict settings for all tests."""

import os
from pathlib import Path

import jax
import pytest

# Compiling dominates: a tiny ResNet's explanation takes 10 s with XLA's optimisations
# and 1 s without. Read when the backend starts, which importing jax does not do.
_FAST = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
os.environ["XLA_FLAGS"] = f"{_FAST} {os.environ.get('XLA_FLAGS', '')}".strip()

# Programs that tests start find the package, installed or not.
_PATH = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")]
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, _PATH))

jax.config.update("jax_platforms", os.environ.get("JAX_PLATFORMS") or "cpu")
jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(autouse=True)
def _relaxed(request):
    """`@pytest.mark.relaxed`: for models that promote dtypes or ranks implicitly."""
    if request.node.get_closest_marker("relaxed") is None:
        yield
    else:
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            yield


@pytest.fixture(autouse=True, scope="module")
def _without_old_programs():
    """A process that keeps thousands of compiled programs runs out of memory maps.

    LLVM then ends it without a Python error.
    """
    yield
    jax.clear_caches()
