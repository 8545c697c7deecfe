"""Killed at any moment and resumed, a job ends as if nothing had happened."""

import contextlib
import json
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import jax
import numpy as np
import pytest

import jlrp
from jlrp import jobs
from jlrp.jobs import store

BATCH, BLOCKS = 8, 40
ZEROS, NANS = 3, 5  # blocks of these

# Children start from a process that has imported JAX, but not started it.
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["jlrp.jobs"])


def model(params, x):
    return jax.nn.relu(x @ params["w"]) @ params["v"]


def data():
    rng = np.random.default_rng(0)
    params = {"w": rng.normal(size=(6, 5)), "v": rng.normal(size=(5, 3))}
    params = jax.tree.map(np.float32, params)
    x = rng.normal(size=(BATCH * BLOCKS - 3, 6)).astype(np.float32)
    x[ZEROS * BATCH : (ZEROS + 1) * BATCH] = 0
    x[NANS * BATCH : (NANS + 1) * BATCH] = np.nan
    return params, x


class Slow:
    """A source that takes its time, so that a kill finds the job at work."""

    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        time.sleep(0.0008)
        return self.items[index]


def killed_at(where, call):
    """Make this process kill itself at the n-th block, at some stage of writing it."""
    write, report, calls = store.Store.write, store.Store.report, []

    def die(*_):
        os.kill(os.getpid(), signal.SIGKILL)

    def during_write(self, start, arrays):
        calls.append(start)
        if len(calls) == call:
            for name, rows in arrays.items():
                self._arrays[name][start : start + len(rows)].write(rows)
            die()
        write(self, start, arrays)

    def before_report(self, record):
        calls.append(record)
        report(self, record) if len(calls) < call else die()

    def within_report(self, record):
        calls.append(record)
        if len(calls) == call:
            line = f"\n{json.dumps(record)}\n".encode()
            os.write(self._log, line[: len(line) // 2])
            die()
        report(self, record)

    if where == "writing":
        store.Store.write = during_write
    else:
        store.Store.report = {"written": before_report, "reporting": within_report}[
            where
        ]


def work(folder, how, fate=None, resume=False):
    """One process of a job; tells what it did in a file."""
    params, x = data()
    source = {"indexed": Slow(x), "stream": iter(Slow(x))}[how]
    if fate is not None:
        killed_at(*fate)
    done = jobs.run(
        jlrp.explain(model, composite="epsilon"),
        params,
        source,
        folder / "r.zarr",
        batch=BATCH,
        on_failure="skip",
        resume=resume,
        progress=False,
    )
    (folder / "explained").write_text(str(done.explained_now))


def refused(folder):
    try:
        work(folder, "indexed", resume=True)
    except jobs.JobError as error:
        (folder / "refused").write_text(str(error))


def run_to_end(folder, how, **kwargs):
    child = context.Process(target=work, args=(folder, how), kwargs=kwargs)
    child.start()
    child.join()
    assert child.exitcode == 0
    return int((folder / "explained").read_text())


def contents(path):
    """Every array, decoded, as bytes; the metadata, less the time."""
    group = json.loads((path / "zarr.json").read_text())
    del group["attributes"]["created"]
    arrays = {
        n: store.array(path, n).read().result().tobytes() for n in store.names(path)
    }
    metadata = {n: (path / n / "zarr.json").read_bytes() for n in arrays}
    return group, arrays, metadata


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    started = time.monotonic()
    run_to_end(folder, "indexed")
    seconds = time.monotonic() - started
    yield contents(folder / "r.zarr"), seconds


def reported(path):
    with contextlib.suppress(FileNotFoundError):
        return [record["block"] for record in store.done(path)]
    return []


FATES = [
    *[("writing", n) for n in (1, ZEROS + 1, 30)],
    *[("written", n) for n in (1, NANS + 1, BLOCKS)],
    *[("reporting", n) for n in (1, 7, BLOCKS)],
    *[("anywhere", n) for n in (0, 1, 5, 9, 12)],
]


@pytest.mark.parametrize(("where", "number"), FATES)
def test_resumed_as_if_undisturbed(where, number, undisturbed, tmp_path):
    expected, seconds = undisturbed
    path = tmp_path / "r.zarr"
    fate = None if where == "anywhere" else (where, number)
    child = context.Process(target=work, args=(tmp_path, "indexed", fate))
    child.start()
    if fate is None:
        # From the start, where the store is made, to the last blocks.
        rng = random.Random(number)
        enough = round(number / 13 * BLOCKS)
        while len(reported(path)) < enough and child.is_alive():
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.01) if enough else rng.uniform(0.3, 1) * seconds)
        child.kill()
    child.join()
    assert child.exitcode in (-signal.SIGKILL, 0)
    before = reported(path)
    explained = run_to_end(tmp_path, "indexed", resume=True)
    got = contents(path)
    assert got == expected
    _, x = data()
    counts = {r["block"]: r["count"] for r in store.done(path)}
    assert sorted(reported(path)) == list(range(BLOCKS))  # none was done twice
    assert explained == len(x) - sum(counts[block] for block in before)


@pytest.mark.parametrize("number", [2, 25])
def test_a_stream_is_resumed_too(number, tmp_path):
    undisturbed, killed = tmp_path / "a", tmp_path / "b"
    undisturbed.mkdir(), killed.mkdir()
    run_to_end(undisturbed, "stream")
    child = context.Process(target=work, args=(killed, "stream", ("writing", number)))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    run_to_end(killed, "stream", resume=True)
    assert contents(killed / "r.zarr") == contents(undisturbed / "r.zarr")


def test_chunks_of_zeros_and_of_nan_are_among_them(undisturbed):
    (_, arrays, _), _ = undisturbed
    relevance = np.frombuffer(arrays["relevance"], np.float32).reshape(-1, 6)
    blocks = [relevance[n * BATCH : (n + 1) * BATCH] for n in (ZEROS, NANS)]
    assert (blocks[0] == 0).all() and np.isnan(blocks[1]).all()


def test_two_jobs_on_one_store_are_refused(tmp_path):
    child = context.Process(target=work, args=(tmp_path, "indexed"))
    child.start()
    while not reported(Path(tmp_path / "r.zarr")):
        time.sleep(0.01)
    os.kill(child.pid, signal.SIGSTOP)
    try:
        second = context.Process(target=refused, args=(tmp_path,))
        second.start()
        second.join()
        assert "Another process is writing" in (tmp_path / "refused").read_text()
    finally:
        os.kill(child.pid, signal.SIGCONT)
    child.join()
    assert child.exitcode == 0
