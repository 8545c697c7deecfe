"""Parameters from the files that Flax and others write."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jlrp.errors import IntegrationError
from jlrp.jobs.errors import JobError, check_path
from jlrp.jobs.sources import reason
from jlrp.typing import PyTree


def load_params(path: str | Path) -> PyTree:
    """Parameters from an Orbax checkpoint, or a msgpack, safetensors or NumPy file.

    Args:
      path: the folder of an Orbax checkpoint (of the item, if a ``CheckpointManager``
        wrote it: ``step/default``), or a file that ends with ``.msgpack`` (of
        ``flax.serialization``), ``.safetensors``, ``.npz`` or ``.npy``.

    Returns:
      A pytree of NumPy arrays. The flat names of ``.safetensors`` and ``.npz`` become
      nested dicts: ``"params/Dense_0/kernel"``, or with dots if no name has a slash.

    Raises:
      JobError: if the file cannot be read, or is of another kind.
      IntegrationError: if what reads it is not installed.

    Example:
      >>> import numpy as np, tempfile
      >>> from jlrp import jobs
      >>> path = tempfile.mkdtemp() + "/params.npz"
      >>> np.savez(path, **{"dense/kernel": np.ones((3, 2))})
      >>> jobs.load_params(path)["dense"]["kernel"].shape
      (3, 2)
    """
    check_path("path", path)
    path = Path(path).absolute()
    if not path.exists():
        raise JobError(f"There are no parameters at the path {path}.")
    read = _orbax if path.is_dir() else READERS.get(path.suffix)
    if read is None:
        raise JobError(
            f"The path {path} is no file of parameters: it must be a folder of Orbax, "
            f"or end with {', '.join(READERS)}."
        )
    try:
        return read(path)
    except IntegrationError:
        raise
    except Exception as error:
        raise JobError(f"The path {path} cannot be read: {reason(error)}.") from error


def _orbax(path: Path) -> PyTree:
    return _library("orbax.checkpoint", "flax").StandardCheckpointer().restore(path)


def _msgpack(path: Path) -> PyTree:
    flax = _library("flax.serialization", "flax")
    return flax.msgpack_restore(path.read_bytes())


def _safetensors(path: Path) -> PyTree:
    return _nested(_library("safetensors.numpy", "jobs").load_file(path))


def _npz(path: Path) -> PyTree:
    with np.load(path) as arrays:
        return _nested(dict(arrays))


READERS: dict[str, Callable[[Path], PyTree]] = {
    ".msgpack": _msgpack,
    ".safetensors": _safetensors,
    ".npz": _npz,
    ".npy": np.load,
}


def _nested(flat: Mapping[str, np.ndarray]) -> dict[str, PyTree]:
    separator = "/" if any("/" in name for name in flat) else "."
    tree: dict[str, PyTree] = {}
    for name, array in flat.items():
        *folders, last = name.split(separator)
        branch = tree
        for folder in folders:
            branch = branch.setdefault(folder, {})
        branch[last] = array
    return tree


def _library(name: str, extra: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise IntegrationError(
            f"To read these parameters, {name} is needed, which cannot be imported "
            f"({error}). Install it with: pip install 'jlrp[{extra}]'"
        ) from error
