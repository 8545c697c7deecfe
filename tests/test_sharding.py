"""Programs over eight virtual devices have the relevance of the same program on one.

The programs are in ``sharded_programs.py``, which runs in a process of its own: the
number of devices is fixed when JAX starts.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

# In one worker: each would run all programs again.
pytestmark = pytest.mark.xdist_group("sharding")

PROGRAMS = Path(__file__).with_name("sharded_programs.py")
NAMES = [
    line.split("(")[0].removeprefix("def ")
    for before, line in zip(
        ["", *PROGRAMS.read_text().splitlines()],
        PROGRAMS.read_text().splitlines(),
        strict=False,
    )
    if before == "@check"
]


@pytest.fixture(scope="module")
def found():
    """The differences that each check printed, and what it wrote on failing."""
    run = subprocess.run(
        [sys.executable, str(PROGRAMS)], capture_output=True, text=True, timeout=900
    )
    amounts = {}
    for line in run.stdout.splitlines():
        amounts.update(json.loads(line))
    return amounts, run.stderr[-4000:]


@pytest.mark.parametrize("name", NAMES)
def test_as_on_one_device(found, name):
    amounts, errors = found
    assert name in amounts, errors
    assert "error" not in amounts[name], amounts[name]["error"]
    too_large = {k: d for k, d in amounts[name].items() if not d < 1e-10}
    assert not too_large


def test_all_programs_are_listed():
    assert len(NAMES) > 30
    assert "ring_attention" in NAMES
