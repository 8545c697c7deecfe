"""The main job runs, in few steps, and says and draws what it should."""

import re
import subprocess
import sys
from pathlib import Path

import matplotlib.image

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_digits(tmp_path):
    picture = tmp_path / "digits.png"
    command = [sys.executable, EXAMPLES / "digits.py", "--steps=60"]
    run = subprocess.run(
        [*command, f"--output={picture}"], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr

    accuracy = re.search(r"test accuracy: ([\d.]+) %", run.stdout)
    assert accuracy and float(accuracy[1]) > 85
    assert "conv" in run.stdout and "dense" in run.stdout  # the table of operations
    assert "unexplained" in run.stdout  # the ledger

    pixels = matplotlib.image.imread(picture)
    assert min(pixels.shape[:2]) > 300
    assert pixels[..., :3].std() > 0.05  # something is drawn
