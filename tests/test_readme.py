"""The documents are true: their Python runs, and their list of files is complete."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
NAMES = [path.relative_to(ROOT).as_posix() for path in DOCUMENTS]


def python_of(path):
    """All Python blocks of a document as one program."""
    return "\n".join(
        re.findall(r"^```python\n(.*?)^```", path.read_text(), re.M | re.S)
    )


@pytest.mark.parametrize("name", [n for n in NAMES if python_of(ROOT / n)])
def test_python_runs(name, tmp_path):
    program = tmp_path / "document.py"
    program.write_text(python_of(ROOT / name))
    command = [sys.executable, "-W", "error", program]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("path", DOCUMENTS, ids=NAMES)
def test_links_lead_to_files(path):
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", path.read_text()):
        assert (path.parent / target).exists(), f"{path.name} links to {target}"


def test_package_structure_names_every_file():
    section = (ROOT / "README.md").read_text().split("## Package structure")[1]
    listed = re.findall(r"^(jlrp/\S+\.py) +\S", section.split("\n## ")[0], re.M)
    files = [p.relative_to(ROOT).as_posix() for p in ROOT.glob("jlrp/**/*.py")]
    assert sorted(listed) == sorted(files)
