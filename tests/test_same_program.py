"""The traced explanation of a program does not depend on the process that traces it.

Jobs are resumed, and divided, by the text of their program.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parent / "traced_programs.py"


def traced(seed):
    environment = {**os.environ, "PYTHONHASHSEED": str(seed), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, SCRIPT, str(seed)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    return json.loads(run.stdout)


def test_three_processes_trace_the_same_programs():
    first, *others = (traced(seed) for seed in (1, 2, 3))
    assert len(first) > 20
    for other in others:
        assert {n for n in first if first[n] != other[n]} == set()
