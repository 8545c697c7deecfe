"""The results: one Zarr group of named arrays, and a log of what is done.

The chunks of Zarr cannot say what is done: one that holds only the fill value has no
file. So each part of a job has a log, ``job/done-<part>.jsonl``, with one line for each
block, appended when the block's chunks are on the disk. Lines begin and end with a
newline, so that one that was cut off by a crash does not spoil the next.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tensorstore as ts

from jlrp.jobs.errors import JobError
from jlrp.jobs.fingerprint import difference
from jlrp.jobs.sources import reason
from jlrp.jobs.steps import UNWRITTEN
from jlrp.typing import DTypeLike

COMPRESSIONS: dict[str, list[dict[str, object]]] = {
    "none": [],
    "zstd": [{"name": "zstd", "configuration": {"level": 1}}],
    "gzip": [{"name": "gzip", "configuration": {"level": 1}}],
}
_GROUP, _JOB, _CREATED = "zarr.json", "job", "created"


@dataclass(frozen=True)
class Layout:
    """The arrays of a store.

    Attributes:
      shapes: for each array the shape and dtype of one example.
      rows: how many examples, or None if that is not known yet.
      chunk: rows of a chunk.
      notes: attributes of an array, by its name.
    """

    shapes: Mapping[str, jax.ShapeDtypeStruct]
    rows: int | None
    chunk: int
    compression: str
    notes: Mapping[str, object]


class Store:
    """A store, open for one part of a job; close it to let another job in."""

    def __init__(self, path: Path, layout: Layout, part: int, log: int):
        self.path, self.layout, self.part, self._log = path, layout, part, log
        self._arrays = {name: array(path, name) for name in layout.shapes}
        self._rows = min(a.shape[0] for a in self._arrays.values())

    def write(self, start: int, arrays: Mapping[str, np.ndarray]) -> None:
        """Write rows of every array; returns when they are on the disk."""
        written = [
            self._arrays[name][start : start + len(rows)].write(
                rows, can_reference_source_data_indefinitely=True
            )
            for name, rows in arrays.items()
        ]
        for future in written:
            future.result()

    def report(self, record: Mapping[str, object]) -> None:
        """Append to the log of done blocks; returns when it is on the disk."""
        line = f"\n{json.dumps(record)}\n".encode()
        if os.write(self._log, line) < len(line):
            raise JobError("the log was cut off: the disk is full")
        os.fsync(self._log)

    def done(self) -> Iterator[dict[str, Any]]:
        """The records of the blocks that this part has done."""
        return done(self.path, self.part)

    def grow(self, rows: int) -> None:
        """Make room, where the number of examples is not known before."""
        if rows > self._rows:
            self._rows = max(rows, 2 * self._rows)
            self._resize()

    def end_at(self, rows: int) -> None:
        """Cut off the room that was not needed."""
        # A crash may have left some of them cut off, and others not.
        if any(array.shape[0] != rows for array in self._arrays.values()):
            self._rows = rows
            self._resize()
        _write_group(self.path, attributes(self.path))

    def _resize(self) -> None:
        for name, array in self._arrays.items():
            shape = [self._rows, *array.shape[1:]]
            self._arrays[name] = array.resize(exclusive_max=shape).result()

    def close(self) -> None:
        os.close(self._log)


def open_for_writing(
    path: Path,
    layout: Layout,
    fingerprint: Mapping[str, object],
    part: int,
    resume: bool,
) -> Store:
    """Make a store, or open the one of an interrupted job, for one part of it.

    Raises:
      JobError: if the place holds something else, or the store of another job; if this
        part was begun and ``resume`` is False; if it is being written by another
        process; if it cannot be written.
    """
    try:
        _claim(path)
        with _locked(path / _JOB / "lock", wait=True):
            if (path / _GROUP).exists():
                _check_same(path, fingerprint)
            else:
                _create(path, layout, fingerprint)
        log = _open_log(path, part, resume)
    except OSError as error:
        raise JobError(
            f"The store {path} cannot be written: {reason(error)}."
        ) from error
    return Store(path, layout, part, log)


def attributes(path: Path) -> dict[str, Any]:
    """What the store says that made it.

    Raises:
      JobError: if there is no store of jlrp.
    """
    if not path.exists():
        raise JobError(
            f"There is no store at the path {path}; it is no store of jlrp. Give the "
            "folder that a job wrote (--out)."
        )
    try:
        found = json.loads((path / _GROUP).read_text())["attributes"]
    except (OSError, ValueError, KeyError) as error:
        raise JobError(
            f"The path {path} is no store of jlrp: {reason(error)}."
        ) from error
    if "job" not in found:
        raise JobError(f"{path} is a Zarr group, but no job of jlrp made it.")
    return found


def array(path: Path, name: str) -> ts.TensorStore:
    """An array of the store, opened with TensorStore."""
    return _opened(path / name)


def names(path: Path) -> list[str]:
    """The arrays of the store."""
    return sorted(
        p.parent.name for p in path.glob(f"*/{_GROUP}") if p.parent.name != _JOB
    )


def done(path: Path, part: int | None = None) -> Iterator[dict[str, Any]]:
    """The log's records: of one part, or of all."""
    pattern = "done-*.jsonl" if part is None else _log_name(part)
    for log in sorted((path / _JOB).glob(pattern)):
        for line in log.read_text(errors="replace").splitlines():
            with contextlib.suppress(ValueError):  # cut off by a crash: not done
                yield json.loads(line)


def fill(dtype: DTypeLike) -> object:
    """What an array holds where nothing was explained."""
    if np.issubdtype(dtype, np.floating):
        return np.nan
    if np.issubdtype(dtype, np.signedinteger):
        return UNWRITTEN
    return False if np.issubdtype(dtype, np.bool_) else 0


def _claim(path: Path) -> None:
    """Make the folder, or refuse one that holds something else."""
    if path.exists() and not path.is_dir():
        raise JobError(f"{path} is a file; a store is a folder. Choose another place.")
    if path.exists() and not (path / _JOB).is_dir() and any(path.iterdir()):
        raise JobError(
            f"{path} holds something that is no store of jlrp. Choose another place; "
            "nothing in it was changed."
        )
    (path / _JOB).mkdir(parents=True, exist_ok=True)


@contextlib.contextmanager
def _locked(path: Path, wait: bool) -> Iterator[int]:
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield file
    finally:
        os.close(file)


def _open_log(path: Path, part: int, resume: bool) -> int:
    """The part's log, locked: the lock ends with the process, however it ends."""
    log = path / _JOB / _log_name(part)
    file = os.open(log, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(file)
        raise JobError(
            f"Another process is writing part {part} of {path}. Wait for it, or end it."
        ) from None
    if not resume and any(done(path, part)):
        os.close(file)
        raise JobError(
            f"{path} has results of this job already. Go on with resume=True "
            "(--resume), or choose another place."
        )
    _sync(log.parent)
    return file


def _log_name(part: int) -> str:
    return f"done-{part}.jsonl"


def _check_same(path: Path, fingerprint: Mapping[str, object]) -> None:
    stored = attributes(path)["job"]
    if (what := difference(stored, fingerprint)) is not None:
        raise JobError(
            f"{path} was made by another job: {what}. Go on as that job was, or choose "
            "another place."
        )


def _create(path: Path, layout: Layout, fingerprint: Mapping[str, object]) -> None:
    for name, spec in layout.shapes.items():
        _create_array(path / name, name, spec, layout)
    _write_json(path / _JOB / _GROUP, _group({}))
    # Last: it says that the rest is there.
    _write_group(
        path, {"job": fingerprint, _CREATED: time.strftime("%FT%TZ", time.gmtime())}
    )


def _create_array(
    path: Path, name: str, spec: jax.ShapeDtypeStruct, layout: Layout
) -> None:
    dims = ["example", *(f"{name}_{axis + 1}" for axis in range(len(spec.shape)))]
    missing = fill(spec.dtype)
    chunk = [layout.chunk, *(max(size, 1) for size in spec.shape)]
    metadata = {
        "shape": [layout.rows or 0, *spec.shape],
        "data_type": str(spec.dtype),
        "fill_value": "NaN" if missing != missing else missing,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunk}},
        # One folder for an array, not one for each chunk and axis.
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
        "codecs": [
            {"name": "bytes", "configuration": {"endian": "little"}},
            *COMPRESSIONS[layout.compression],
        ],
        "dimension_names": dims,
        "attributes": layout.notes.get(name, {}),
    }
    try:
        _open(
            {**_location(path), "metadata": metadata}, create=True, delete_existing=True
        )
    except ValueError as error:
        raise JobError(f"{path} cannot be written: {reason(error)}.") from error


def _opened(path: Path) -> ts.TensorStore:
    try:
        return _open(_location(path), open=True)
    except ValueError as error:
        raise JobError(f"{path} cannot be opened: {reason(error)}.") from error


def _open(spec: dict[str, object], **mode: Any) -> ts.TensorStore:
    # Without a cache: nothing is read twice, and memory stays as it is.
    context = ts.Context({"cache_pool": {"total_bytes_limit": 0}})
    return ts.open(spec, context=context, **mode).result()


def _location(path: Path) -> dict[str, object]:
    return {
        "driver": "zarr3",
        "kvstore": {"driver": "file", "path": f"{path.absolute()}/"},
    }


def _write_group(path: Path, attributes: dict[str, object]) -> None:
    arrays = {n: json.loads((path / n / _GROUP).read_text()) for n in names(path)}
    consolidated = {"kind": "inline", "must_understand": False, "metadata": arrays}
    group = _group(attributes) | {"consolidated_metadata": consolidated}
    _write_json(path / _GROUP, group)


def _group(attributes: dict[str, object]) -> dict[str, object]:
    return {"zarr_format": 3, "node_type": "group", "attributes": attributes}


def _write_json(path: Path, content: dict[str, object]) -> None:
    """Replace a file in one step: a crash leaves the old one or the new one."""
    new = path.with_suffix(".new")
    with open(new, "w") as file:
        json.dump(content, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)
    _sync(path.parent)


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
