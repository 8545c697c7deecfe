"""Bad input is refused, in one clear line, before or without losing work."""

import os
import subprocess

import jax
import numpy as np
import pytest

import jlrp
from jlrp import jobs
from jlrp.jobs import store

W = np.ones((3, 2), np.float32)
X = np.random.default_rng(0).normal(size=(40, 3)).astype(np.float32)


def model(w, x):
    return x @ w


EXPLAIN = jlrp.explain(model)


def run(path, explain=EXPLAIN, params=W, source=X, **options):
    options = {"batch": 8, "progress": False} | options
    return jobs.run(explain, params, source, path, **options)


def image(w, x):
    return jax.lax.conv(x, w, (1, 1), "SAME").sum((2, 3))


REFUSED = {
    "dtype of the source": (dict(source=np.array(["a"] * 4)), "dtype <U1"),
    "objects": (dict(source=np.array([X, None], object)), "has no arrays"),
    "complex": (dict(source=X + 1j), "dtype complex"),
    "dtype of the function": (
        dict(explain=jlrp.explain(lambda w, i: w[i].sum(1)), source=X),
        "cannot take a batch",
    ),
    "rank": (dict(explain=jlrp.explain(image), source=X), "cannot take a batch"),
    "shape": (dict(source=X[:, :2]), r"x = float32\[8, 2\]"),
    "scalars": (dict(source=X[:, 0]), "give it an axis"),
    "one number": (dict(source=np.float32(3.0)), "first axis is the examples"),
    "empty array": (dict(source=X[:0]), "no examples"),
    "empty list": (dict(source=[]), "no examples"),
    "empty iterator": (dict(source=iter([])), "no examples"),
    "no source": (dict(source=3), "no source"),
    "a path": (dict(source="x.npy"), "open the file"),
    "independent": (
        dict(explain=jlrp.explain(lambda w, x: (x > 0).astype(x.dtype) @ w)),
        "does not depend on x",
    ),
    "a plain function": (dict(explain=model), "jlrp.explain"),
    "wrt": (dict(explain=jlrp.explain(model, wrt="params")), "wrt"),
    "summed batch": (
        dict(explain=jlrp.explain(lambda w, x: (x @ w).sum())),
        "one score for each example",
    ),
    "processes": (dict(part=(0, 9)), "9 processes are more than the 5 blocks"),
    "part": (dict(part=(2, 2)), "no part 2 of 2"),
    "parts of a stream": (dict(source=iter(X), part=(0, 2)), "a length and an index"),
    "batch": (dict(batch=0), "batch must be"),
    "store dtype": (dict(dtype="int8"), "dtype must be one of"),
    "on_failure": (dict(on_failure="ignore"), "on_failure must be one of"),
    "compression": (dict(compression="zip"), "compression must be one of"),
    "devices": (dict(devices="gpu"), '"data", a mesh or None'),
    "target": (dict(target=np.zeros(3, int)), r"shape \(3,\) for 40"),
    "float target": (dict(target=0.5), "class indices"),
    "class": (dict(target=7), "out of range"),
    "two targets": (dict(target=1, split=lambda e: e), "not from both"),
    "split": (dict(split=lambda e: e[0] + None), "split must return"),
    "buckets": (dict(buckets=(8, 4)), "ascending"),
    "top k": (dict(reduce=jobs.Top(9)), "take a smaller k"),
    "capture": (dict(explain=jlrp.explain(model, capture="nothing")), "nothing"),
}


@pytest.mark.parametrize("options, message", REFUSED.values(), ids=REFUSED.keys())
def test_refused_before_any_work(options, message, tmp_path):
    with pytest.raises(jlrp.JlrpError, match=message):
        run(tmp_path / "r", **options)
    assert not (tmp_path / "r").exists()


CHANGED = {
    "params": (dict(params=W + 1), "its params is"),
    "composite": (dict(explain=jlrp.explain(model, composite="epsilon")), "composite"),
    "batch": (dict(batch=4), "its batch is 8, not 4"),
    "target": (dict(target=1), "its target is None, not 1"),
    "length": (dict(source=X[:39]), "its examples is 40, not 39"),
    "data": (dict(source=X + 1), "first_example"),
    "labels": (dict(target=np.zeros(40, int)), "its labels is"),
    "dtype": (dict(dtype="float16"), "its dtype is 'float32', not 'float16'"),
    "model": (dict(explain=jlrp.explain(lambda w, x: -x @ w)), "its program is"),
    "processes": (dict(part=(0, 2)), "its processes is 1, not 2"),
}


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    path = tmp_path_factory.mktemp("begun") / "r"
    run(path)
    return path


@pytest.mark.parametrize("options, message", CHANGED.values(), ids=CHANGED.keys())
def test_the_store_of_another_job(options, message, begun):
    before = sorted((p, p.stat().st_mtime_ns) for p in begun.rglob("*"))
    with pytest.raises(jobs.JobError, match=f"another job: .*{message}"):
        run(begun, **options, resume=True)
    assert sorted((p, p.stat().st_mtime_ns) for p in begun.rglob("*")) == before


def test_results_are_not_overwritten(begun):
    with pytest.raises(jobs.JobError, match="resume=True"):
        run(begun)


def test_a_place_that_holds_something_else(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(jobs.JobError, match="no store of jlrp"):
        run(tmp_path)
    with pytest.raises(jobs.JobError, match="is a file"):
        run(tmp_path / "notes.txt")
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(jobs.JobError, match="no store of jlrp"):
            jobs.summary(path)


@pytest.fixture
def small_disk(tmp_path):
    """Mounts a small file system, where that is allowed."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(*options):
        command = ["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", folder]
        if os.geteuid() or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("mounting needs root")
        return folder

    yield mount
    while not subprocess.run(["umount", folder], capture_output=True).returncode:
        pass


def test_a_full_disk(small_disk):
    path = small_disk("size=256k") / "r"
    with open(path.parent / "other", "wb") as other:
        other.write(b"0" * 100_000)
    source = np.random.default_rng(0).normal(size=(400, 64)).astype(np.float32)
    w = np.ones((64, 2), np.float32)
    with pytest.raises(jobs.JobError, match="cannot be written .*reported as done is"):
        run(path, params=w, source=source)
    reported = {r["block"] for r in store.done(path)}
    assert 0 < len(reported) < 50
    (path.parent / "other").unlink()
    subprocess.run(["mount", "-o", "remount,size=8m", path.parent], check=True)
    done = run(path, params=w, source=source, resume=True)
    assert done.examples == 400
    assert done.explained_now == 400 - 8 * len(reported)
    found = store.array(path, "relevance").read().result()
    np.testing.assert_allclose(found, EXPLAIN(w, source).relevance, rtol=1e-6)


def test_a_full_disk_at_the_start(small_disk):
    folder = small_disk("size=16k")
    with pytest.raises(jobs.JobError, match="cannot be written.*space"):
        run(folder / "r")


def test_a_read_only_store(small_disk):
    folder = small_disk("size=4m")
    run(folder / "r")
    subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
    for place in ("r", "new"):
        with pytest.raises(jobs.JobError, match="cannot be written.*[Rr]ead-only"):
            run(folder / place, resume=True)
    assert jobs.summary(folder / "r").examples == 40


PARAMETERS = {
    "absent.npz": (None, "There are no parameters"),
    "p.npz": (b"nonsense", "cannot be read"),
    "p.msgpack": (b"\xc1", "cannot be read"),
    "p.safetensors": (b"", "cannot be read"),
    "p.pickle": (b"", "is no file of parameters"),
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_unreadable_parameters(name, tmp_path):
    content, message = PARAMETERS[name]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(jobs.JobError, match=message):
        jobs.load_params(tmp_path / name)
    (tmp_path / "folder").mkdir(exist_ok=True)
    with pytest.raises(jobs.JobError, match="cannot be read"):
        jobs.load_params(tmp_path / "folder")


def test_no_artifact(tmp_path):
    (tmp_path / "a").write_bytes(b"nonsense")
    for name in ("a", "absent"):
        with pytest.raises(jobs.JobError, match="is no artifact"):
            jobs.load_artifact(tmp_path / name)
