"""Ruff and pyright find nothing."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


COMMANDS = {
    "ruff check": ["ruff", "check", "."],
    "ruff format": ["ruff", "format", "--check", "."],
    "pyright": ["pyright", "--pythonpath", sys.executable],
}


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS.keys())
def test_style(command):
    run = subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout + run.stderr


def test_the_hooks_run_the_pinned_versions():
    hooks = (ROOT / ".pre-commit-config.yaml").read_text()
    pinned = re.search(r'"ruff==([\d.]+)"', (ROOT / "pyproject.toml").read_text())
    assert f"rev: v{pinned[1]}\n" in hooks


def test_the_workflow_runs_what_ci_runs():
    steps = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    assert "- run: .ci/run\n" in steps


@pytest.mark.parametrize("folder", ["tests", "benchmarks", "examples", "docs", ".ci"])
def test_nothing_outside_of_the_repository_is_read(folder):
    outside = re.compile(r"parents\[[2-9]\]|(?<![\w.])/(?:work|home|root)/")
    for path in (ROOT / folder).rglob("*"):
        if path.suffix in (".py", ".md", ".ipynb", "") and path.is_file():
            found = outside.search(path.read_text(errors="replace"))
            assert not found, f"{path} reads {found[0]}"
