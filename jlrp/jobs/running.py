"""The job: read, explain, write, report, each while the others are at work."""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from tqdm import tqdm

from jlrp.api import Explainer
from jlrp.arguments import check_array, leaves_of, shown
from jlrp.jobs import fingerprint
from jlrp.jobs import store as storing
from jlrp.jobs.artifact import Artifact
from jlrp.jobs.batches import Batch, Batcher, Block, Buckets
from jlrp.jobs.errors import JobError, check_path
from jlrp.jobs.placement import blocks_of, placement
from jlrp.jobs.programs import Programs
from jlrp.jobs.sources import Source, Split, first_example, open_source, reason
from jlrp.jobs.steps import (
    FAILURES,
    NOT_FINITE,
    REASONS,
    UNREADABLE,
    Arrays,
    Reduction,
    Step,
    check_options,
)
from jlrp.jobs.summary import Summary, summary
from jlrp.typing import ArrayLike, PyTree

ON_FAILURE = ("stop", "skip")

# Blocks that are read ahead, that are computed but not yet written, and the threads
# that write them: more than one, because they wait for the disk.
_AHEAD, _IN_FLIGHT, _WRITERS = 2, 4, 2


def run(
    explain: Explainer | Artifact,
    params: PyTree,
    source: object,
    store: str | Path,
    *,
    target: ArrayLike | Sequence[int] | None = None,
    split: Split | None = None,
    batch: int = 64,
    buckets: Buckets | Sequence[int] | None = None,
    reduce: Reduction | None = None,
    dtype: str = "float32",
    allow_nan: bool = False,
    compression: str = "zstd",
    on_failure: str = "stop",
    resume: bool = False,
    devices: str | Mesh | None = None,
    part: tuple[int, int] | None = None,
    progress: bool = True,
) -> Summary:
    """Explain all examples of a source, and write the results to a Zarr store.

    Compiles once; reading, computing and writing overlap, in constant memory. Killed at
    any moment, the job goes on with ``resume=True`` and ends with the same results.

    Args:
      explain: made by ``jlrp.explain``, or loaded by ``jobs.load_artifact``. Its target
        is static; examples are explained one by one, whatever batch they are in.
      params: pytree of arrays, as the function takes it.
      source: the examples along the first axis of an array (NumPy, memory map, Zarr,
        TensorStore), anything with a length and an index (a list, a Grain data set), or
        an iterator over examples.
      store: the folder of the results; it must be on a file system.
      target: class index of each example, ``int[examples]``, or one for all.
      split: ``split(example) -> (x, target)``, where a source gives both.
      batch: examples per call of the compiled function, in each process, and per chunk
        of the store. The last batch is filled up, and cut.
      buckets: lengths that ragged examples are padded to along their first axis, or
        ``jobs.Buckets``; results are cut to each example's length.
      reduce: function of the relevance of a batch, applied on the device before
        anything is written: ``jobs.sum_channels``, ``jobs.Top(k)`` or one's own.
      dtype: ``"float32"``, ``"float16"`` or ``"float64"``: of what is written.
      allow_nan: explain examples with NaN in x too: the function replaces missing
        numbers itself. Else such an example is one that cannot be explained.
      compression: ``"zstd"``, ``"gzip"`` or ``"none"``.
      on_failure: ``"stop"`` at an example that cannot be explained (unreadable, of
        another shape, NaN), or ``"skip"`` it: its row stays NaN, its index and the
        reason are recorded.
      resume: go on with the interrupted job of this store, if there is one.
      devices: ``"data"`` divides batches over the devices of this process; a mesh, over
        its axis "data" or else its first. Params stay as they are sharded on that mesh,
        and are replicated otherwise.
      part: ``(index, parts)``: the part of the source to do. By default that of this
        process among those of ``jax.distributed``.
      progress: show a progress bar.

    Returns:
      A ``Summary``, which prints.

    Raises:
      JobError: before any work for arguments that do not fit, and a store that cannot
        be written or belongs to another job; later if an example fails and
        ``on_failure`` is ``"stop"``, or a write fails. What was reported as done is
        safe.
      JlrpError: for a function that cannot be explained, as ``jlrp.relevance``.

    Example:
      >>> import jlrp, numpy as np, tempfile
      >>> from jlrp import jobs
      >>> explain = jlrp.explain(lambda w, x: x @ w)
      >>> w, x = np.ones((3, 2), np.float32), np.ones((10, 3), np.float32)
      >>> folder = tempfile.mkdtemp() + "/r.zarr"
      >>> jobs.run(explain, w, x, folder, batch=4, progress=False).examples
      10
    """
    started = time.perf_counter()
    _check_choice("on_failure", on_failure, ON_FAILURE)
    check_options(reduce, dtype)
    _check_choice("compression", compression, tuple(storing.COMPRESSIONS))
    _check(batch, split, resume, progress, part, store)
    for where, leaf in leaves_of("params", params):
        check_array(where, leaf)
    part = part or (jax.process_index(), jax.process_count())
    placed = placement(devices, batch)
    buckets = _as_buckets(buckets, placed.is_global)
    opened = open_source(source)
    step, labels = _targeted(
        _step(explain, reduce, dtype, allow_nan), target, split, opened
    )
    first, spec = first_example(opened, split)
    batcher = Batcher(opened, spec, batch, buckets, labels, split)
    blocks = blocks_of(part, opened.length, batcher.rows)
    programs = Programs(step, params, batcher, placed)
    _check_labels(labels, programs.classes)
    made_by = {
        **step.made_by,
        "batch": batch,
        "buckets": fingerprint.described(buckets),
        "compression": compression,
        "examples": opened.length,
        "example": str(jax.tree.map(lambda s: f"{s.dtype}{list(s.shape)}", spec)),
        "processes": part[1],
        "devices": placed.devices,
        **_fingerprints(programs, labels, first),
    }
    shapes = dict(programs.results)
    if buckets is not None:
        shapes["length"] = jax.ShapeDtypeStruct((), np.int32)
    layout = storing.Layout(shapes, opened.length, batch, compression, _NOTES)
    path = Path(store)
    with closing(
        storing.open_for_writing(path, layout, made_by, part[0], resume)
    ) as results:
        job = _Job(programs, results, blocks, on_failure == "stop")
        explained = job.work(progress)
    return summary(path).of_run(explained, time.perf_counter() - started)


def _fingerprints(
    programs: Programs, labels: np.ndarray | None, first: PyTree
) -> dict[str, str]:
    """What tells the program, its parameters and the data of one job from another's."""
    return {
        **fingerprint.versions(),
        "params": fingerprint.of_tree(programs.params),
        "labels": fingerprint.of_tree(labels),
        "first_example": fingerprint.of_tree(first),
        "program": fingerprint.digest(programs.text().encode()),
    }


_NOTES: dict[str, object] = {
    "failure": {
        "flag_values": list(range(len(FAILURES))),
        "flag_meanings": " ".join(FAILURES),
    },
    "score": {"long_name": "what was explained"},
    "absorbed": {"long_name": "score less the sum of the relevance"},
}


def _check(
    batch: object,
    split: object,
    resume: object,
    progress: object,
    part: object,
    store: object,
) -> None:
    if not isinstance(batch, int) or isinstance(batch, bool) or not 0 < batch < 2**31:
        raise JobError(f"batch must be a whole number >= 1, got {shown(batch)}.")
    if split is not None and not callable(split):
        raise JobError(
            f"split is {shown(split)}; give a function of an example that returns "
            "(x, target)."
        )
    for name, value in (("resume", resume), ("progress", progress)):
        if not isinstance(value, bool):
            raise JobError(f"{name} is {shown(value)}; give True or False.")
    pair = part if isinstance(part, tuple | list) else ()
    is_pair = len(pair) == 2 and all(type(i) is int for i in pair)
    if part is not None and not is_pair:
        raise JobError(f"part is {shown(part)}; give (index, parts), such as (0, 4).")
    check_path("store", store)


def _as_buckets(buckets: object, share_a_mesh: bool) -> Buckets | None:
    if buckets is None:
        return None
    if isinstance(buckets, tuple | list | range):
        buckets = Buckets(tuple(buckets))
    if not isinstance(buckets, Buckets):
        raise JobError(
            f"buckets is {shown(buckets)}; give lengths, such as (32, 128), or "
            "jobs.Buckets(...)."
        )
    if share_a_mesh:
        raise JobError(
            "Processes that share a mesh must compute batches of one shape: leave the "
            'buckets out, or give each process its own devices, with devices="data".'
        )
    return buckets


def _check_labels(labels: np.ndarray | None, classes: int | None) -> None:
    if labels is None or classes is None:
        return
    outside = np.flatnonzero((labels < 0) | (labels >= classes))
    if outside.size:
        first = int(outside[0])
        raise JobError(
            f"target is {labels[first]} for example {first}, out of range: the output "
            f"has {classes} classes, 0 to {classes - 1}."
        )


def _step(
    explain: object, reduce: Reduction | None, dtype: str, allow_nan: bool
) -> Step | Artifact:
    if isinstance(explain, Artifact):
        if reduce is not None or dtype != "float32" or allow_nan:
            raise JobError(
                "An artifact has its reduction, dtype and allow_nan in it: give them "
                "to jobs.export_artifact."
            )
        return explain
    if not isinstance(explain, Explainer):
        raise JobError(
            f"The first argument is a {type(explain).__name__}; it must be made by "
            "jlrp.explain(fn, ...) or loaded by jobs.load_artifact."
        )
    if explain.asked != ("x",):
        raise JobError(f'A job needs an explainer with wrt="x", not {explain.wrt!r}.')
    return Step(explain, reduce, dtype, allow_nan)


def _targeted(
    step: Step | Artifact, target: object, split: Split | None, source: Source
) -> tuple[Step | Artifact, np.ndarray | None]:
    """The step with the target for all examples, and the labels of each, if given."""
    length = source.length
    if target is None:
        return step, None
    if split is not None:
        raise JobError("The targets come from split or from target, not from both.")
    try:
        labels = np.asarray(target)
    except (TypeError, ValueError) as error:
        raise JobError(
            f"target is {shown(target)}; give one class index, or an array of them."
        ) from error
    if labels.dtype.kind not in "iu":
        raise JobError(
            f"target has dtype {labels.dtype}; it must be class indices. Other targets "
            "are given to jlrp.explain(fn, target=...)."
        )
    if labels.ndim == 0:
        return step.with_target(int(labels)), None
    if length is None or labels.shape != (length,):
        raise JobError(
            f"target has shape {labels.shape} for {length or 'an unknown number of'} "
            "examples: give one class index for each, or one for all. A stream gives "
            "them itself, by split."
        )
    return step, labels.astype(np.int32)


@dataclass
class _Job:
    """One part of a job at work.

    Attributes:
      blocks: of this part; None for all of a stream.
      stop: whether the first failed example ends it.
    """

    programs: Programs
    results: storing.Store
    blocks: range | None
    stop: bool
    failed: int = 0

    def work(self, progress: bool) -> int:
        """Do all blocks that are not done; how many examples that were."""
        batcher, placed = self.programs.batcher, self.programs.placed
        finished = {r["block"]: r["count"] for r in self.results.done()}
        before = sum(finished.values())
        if self.blocks is None:
            # A stream is read from its start: what is done is skipped after reading.
            wanted, total = itertools.count(), None
        else:
            wanted = [block for block in self.blocks if block not in finished]
            total = batcher.count(self.blocks)
        idle = _idle_steps(wanted) if placed.is_global else 0
        end = 0
        writing: deque[Future[None]] = deque()
        with (
            tqdm(
                total=total,
                initial=before,
                unit=" examples",
                disable=not progress,
            ) as bar,
            ThreadPoolExecutor(1, "jlrp-reader") as reader,
            ThreadPoolExecutor(_WRITERS, "jlrp-writer") as writers,
        ):
            for block in _ahead(reader, batcher.block, wanted):
                end = block.start + block.count
                if block.number in finished:
                    continue
                if self.blocks is None:
                    self.results.grow(end)
                found = [self.programs(batch) for batch in block.batches]
                if placed.is_global and not found:
                    self.programs(self.programs.blank())
                writing.append(writers.submit(self._save, block, found, bar))
                if len(writing) > _IN_FLIGHT:
                    writing.popleft().result()
            for _ in range(idle):
                self.programs(self.programs.blank())
            while writing:
                writing.popleft().result()
        if self.blocks is None:
            self.results.end_at(end)
        return sum(r["count"] for r in self.results.done()) - before

    def _save(self, block: Block, found: list[Arrays], bar: tqdm) -> None:
        """Write a block, then report it as done."""
        arrays = self._assembled(block, found)
        outside = _outside(block, self.programs.classes)
        failed = {
            block.start + place: block.failures.get(place)
            or (code == NOT_FINITE and outside.get(place))
            or REASONS[code]
            for place, code in enumerate(arrays["failure"].tolist())
            if code
        }
        if failed and self.stop:
            index, why = next(iter(failed.items()))
            differs = (
                why.startswith("its shape") and self.programs.batcher.buckets is None
            )
            hint = " Lengths that differ need buckets (--buckets)." if differs else ""
            raise JobError(
                f"Example {index} cannot be explained: {why}. Correct it in the "
                'source, or skip such examples with on_failure="skip" (--on-failure '
                f"skip); then resume.{hint}"
            )
        record = {"block": block.number, "count": block.count, "failed": failed}
        try:
            self.results.write(block.start, arrays)
            self.results.report(record)
        except Exception as error:
            last = block.start + block.count - 1
            raise JobError(
                f"Examples {block.start} to {last} cannot be written to "
                f"{self.results.path}: {reason(error)}. What was reported as done is "
                "safe; remove the cause, then resume."
            ) from error
        with bar.get_lock():
            self.failed += len(failed)
        if self.failed:
            bar.set_postfix(failed=self.failed, refresh=False)
        bar.update(block.count)

    def _assembled(self, block: Block, found: list[Arrays]) -> dict[str, np.ndarray]:
        """The rows of a block, from the results of its batches."""
        if block.is_one_batch:
            arrays = self._rows(block.batches[0], found[0])
            # What has no failure is written as it lies: a job is as fast as its copies.
            if not arrays["failure"].any():
                return arrays
        return self._gathered(block, found)

    def _rows(self, batch: Batch, result: Arrays) -> dict[str, np.ndarray]:
        """The results of a batch, without those of the rows that fill it up."""
        real = len(batch.places)
        return {n: self.programs.placed.local(a)[:real] for n, a in result.items()}

    def _gathered(self, block: Block, found: list[Arrays]) -> dict[str, np.ndarray]:
        """The rows of a block of several batches, or ragged, or with failures."""
        arrays: dict[str, np.ndarray] = {
            name: np.full(
                (block.count, *spec.shape), storing.fill(spec.dtype), spec.dtype
            )
            for name, spec in self.results.layout.shapes.items()
        }
        for batch, result in zip(block.batches, found, strict=True):
            for name, rows in self._rows(batch, result).items():
                inside = tuple(slice(0, size) for size in rows.shape[1:])
                arrays[name][(batch.places, *inside)] = rows
        arrays["failure"][list(block.failures)] = UNREADABLE
        # Rules may turn a NaN of x into a relevance of 0, which would look like one.
        failed = arrays["failure"] != 0
        for name in arrays.keys() - {"failure"}:
            arrays[name][failed] = storing.fill(arrays[name].dtype)
        if block.lengths is not None:
            arrays["length"] = block.lengths
            for name in self.programs.ragged:
                whole = arrays[name]
                beyond = np.arange(whole.shape[1]) >= block.lengths[:, None]
                whole[beyond] = storing.fill(whole.dtype)
        return arrays


def _outside(block: Block, classes: int | None) -> dict[int, str]:
    """The labels that are no classes, by place."""
    found: dict[int, str] = {}
    for batch in block.batches:
        if batch.targets is None or classes is None:
            continue
        for place, label in zip(batch.places, batch.targets, strict=False):
            if not 0 <= label < classes:
                found[int(place)] = (
                    f"its label is {label}, out of range: the output has {classes} "
                    f"classes, 0 to {classes - 1}"
                )
    return found


def _idle_steps(wanted: Iterable[int]) -> int:
    """How many more batches the busiest process has: all must take every step."""
    own = len(list(wanted))
    counts = multihost_utils.process_allgather(np.array(own))
    return int(np.max(counts)) - own


def _ahead(
    reader: ThreadPoolExecutor,
    read: Callable[[int], Block | None],
    wanted: Iterable[int],
) -> Iterator[Block]:
    """The blocks, the next ones being read meanwhile."""
    numbers = iter(wanted)
    reading = deque(reader.submit(read, n) for n in itertools.islice(numbers, _AHEAD))
    while reading:
        block = reading.popleft().result()
        if block is None:
            return
        reading.extend(reader.submit(read, n) for n in itertools.islice(numbers, 1))
        yield block


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in choices:
        raise JobError(f"{name} must be one of {choices}; got {shown(value)}.")
