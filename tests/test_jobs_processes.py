"""A job of every composite and target, killed, resumed and divided by processes."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from killed_jobs import EXAMPLES, jobs_to_do

from jlrp.jobs import fingerprint, store

pytestmark = pytest.mark.xdist_group("jobs_processes")  # its stores are made once
SCRIPT = Path(__file__).parent / "killed_jobs.py"
NAMES = list(jobs_to_do())


def run(*args, seed="0"):
    command = [sys.executable, SCRIPT, *args]
    environment = {**os.environ, "PYTHONHASHSEED": seed}
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """By how they were made: folders with one store for each job."""
    folder = tmp_path_factory.mktemp("jobs")
    assert run("killed", folder / "resumed").returncode == -signal.SIGKILL
    for name in NAMES:
        (done,) = store.done(folder / "resumed" / name.replace(" ", "_"))
        assert done["block"] == 0  # each was killed at work
    for how, where, *part in (
        ("whole", "whole"),
        ("resumed", "resumed"),
        ("part", "parts", "0"),
        ("part", "parts", "1"),
    ):
        done = run(how, folder / where, *part, seed=str(len(part) + len(where)))
        assert done.returncode == 0, done.stderr[-2000:]
    return folder


def contents(path):
    """Every array, decoded, as bytes; what the job was."""
    group = json.loads((path / "zarr.json").read_text())["attributes"]["job"]
    names = store.names(path)
    return group, {n: store.array(path, n).read().result().tobytes() for n in names}


@pytest.mark.parametrize("name", NAMES)
def test_stores_are_equal(name, stores):
    name = name.replace(" ", "_")
    whole, arrays = contents(stores / "whole" / name)
    for how in ("resumed", "parts"):
        job, found = contents(stores / how / name)
        assert found == arrays, how
        assert {**job, "processes": 1} == {**whole, "processes": 1}
        done = sum(record["count"] for record in store.done(stores / how / name))
        assert done == EXAMPLES
    assert " at 0x" not in json.dumps(whole)
    assert "object at" not in json.dumps(whole)


def test_a_mismatch_shows_the_difference():
    rules = ", ".join(f"Pair({i})" for i in range(40))
    stored = {"composite": f"Composite({rules}, Epsilon(0.1))"}
    own = {"composite": f"Composite({rules}, Epsilon(0.25))"}
    said = fingerprint.difference(stored, own)
    assert "Epsilon(0.1)" in said and "Epsilon(0.25)" in said and len(said) < 300
    assert fingerprint.difference(own, own) is None
