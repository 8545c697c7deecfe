"""The command line, as a user has it: in a process of its own, or through click."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from click.testing import CliRunner

from jlrp import cli

MODULE = """
import jax, jlrp, numpy as np

def model(params, x):
    return jax.nn.relu(x.reshape(x.shape[0], -1) @ params["w"]) @ params["v"]

def tokens(params, ids):
    h = jax.numpy.where((ids > 0)[..., None], params["e"][ids], 0)
    return h.sum(1) @ params["v"]

def stuck(params, x):
    return (x > 0).sum((1, 2, 3)).astype("float32")

explainer = jlrp.explain(model, composite="epsilon")
number = 3
def two(params, x):
    return x["a"].sum(1, keepdims=True) + x["b"] * 2

labelled = [{"x": np.zeros(3, "f4"), "label": 1}] * 4
uneven = {"a": np.zeros((3, 2)), "b": np.zeros((2, 2))}
rows = [np.arange(1, n % 5 + 2, dtype=np.int32) for n in range(12)]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("cli")
    rng = np.random.default_rng(0)
    arrays = {"w": (16, 8), "v": (8, 3), "e": (9, 8)}
    arrays = {n: rng.normal(size=s).astype(np.float32) for n, s in arrays.items()}
    (path / "cli_models.py").write_text(MODULE)
    (path / "cli_broken.py").write_text("import nothing_of_this_name\n")
    np.savez(path / "p.npz", **arrays)
    np.save(path / "x.npy", rng.normal(size=(20, 4, 4, 1)).astype(np.float32))
    np.save(path / "empty.npy", np.zeros((0, 4, 4, 1), np.float32))
    np.save(path / "flat.npy", np.zeros((20, 4), np.float32))
    np.save(path / "labels.npy", np.array([0, 1, 3] + [0] * 17))
    np.save(path / "good_labels.npy", np.array([0, 1, 2, 1] * 5))
    two = {"a": np.ones((20, 3), np.float32), "b": np.ones((20, 2), np.float32)}
    np.savez(path / "two.npz", **two)
    np.save(path / "text.npy", np.array(["a", "b"]))
    np.save(path / "objects.npy", np.array([None, 1], object), allow_pickle=True)
    (path / "broken.npy").write_bytes(b"nonsense")
    return path


@pytest.fixture
def jlrp(folder, monkeypatch):
    monkeypatch.chdir(folder)

    def command(line):
        return CliRunner().invoke(cli.main, line.split(), catch_exceptions=False)

    return command


EXPLAIN = "explain cli_models:model --params p.npz --batch 8 --quiet"


def test_python_m_jlrp(folder):
    line = f"{EXPLAIN} --data x.npy --out r.zarr --composite epsilon_plus".split()
    command = [sys.executable, "-W", "error", "-m", "jlrp", *line]
    run = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "20 of 20 examples done" in run.stdout and "failed: none" in run.stdout
    again = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert again.returncode == 1 and "--resume" in again.stderr
    assert len(again.stderr.splitlines()) == 1
    resumed = subprocess.run(
        [*command, "--resume"], cwd=folder, capture_output=True, text=True
    )
    assert resumed.returncode == 0


def test_show(jlrp, folder):
    assert jlrp(f"{EXPLAIN} --data x.npy --out shown.zarr").exit_code == 0
    shown = jlrp("show shown.zarr 17")
    assert shown.exit_code == 0
    assert re.match(r"example 17: target \d, score -?[\d.]+", shown.output)
    assert shown.output.count("\x1b[48;2;") == 16
    assert jlrp("show shown.zarr 17 --output map.png").exit_code == 0
    assert min(matplotlib.image.imread(folder / "map.png").shape[:2]) == 256
    refused = jlrp("show shown.zarr 20")
    assert refused.exit_code == 1 and "it has 0 to 19" in refused.output


def test_tokens(jlrp):
    made = jlrp(
        "explain cli_models:tokens --params p.npz --data cli_models:rows --out t.zarr "
        "--batch 4 --buckets 2,5 --quiet"
    )
    assert made.exit_code == 0, made.output
    shown = jlrp("show t.zarr 3 --data cli_models:rows")
    words = re.findall(r"m (\S+) \x1b\[0m", shown.output)
    assert words == ["1", "2", "3", "4"]


def test_inspect(jlrp):
    table = jlrp("inspect cli_models:model --params p.npz --shape 1,4,4,1")
    assert table.exit_code == 0 and "dense" in table.output


def test_export(jlrp, folder):
    made = jlrp(
        "export cli_models:model --params p.npz --shape 4,4,1 --out m.jlrp "
        "--composite epsilon"
    )
    assert made.exit_code == 0, made.output
    program = "import sys; sys.modules['cli_models'] = None; from jlrp import __main__"
    program = f"{program}; __main__.main()"
    line = (
        "explain --artifact m.jlrp --params p.npz --data x.npy --out a.zarr --batch 8"
    )
    command = [sys.executable, "-c", program, *line.split()]
    run = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "100%" in run.stderr  # the progress bar
    direct = jlrp(f"{EXPLAIN} --data x.npy --out d.zarr --composite epsilon")
    assert direct.exit_code == 0
    from jlrp.jobs import store

    a, d = (
        store.array(folder / n, "relevance").read().result()
        for n in ("a.zarr", "d.zarr")
    )
    np.testing.assert_allclose(a, d, rtol=1e-5, atol=1e-6)


def test_an_explainer(jlrp):
    line = "explain cli_models:explainer --params p.npz --data x.npy --quiet"
    assert jlrp(f"{line} --out e.zarr --target 2 --reduce channels").exit_code == 0
    refused = jlrp(f"{line} --out f.zarr --composite epsilon")
    assert refused.exit_code == 1 and "has its composite already" in refused.output


REFUSED = {
    "absent data": (f"{EXPLAIN} --data no.npy", "cannot be read"),
    "unreadable data": (f"{EXPLAIN} --data broken.npy", "cannot be read"),
    "objects": (f"{EXPLAIN} --data objects.npy", "cannot be read"),
    "text": (f"{EXPLAIN} --data text.npy", "dtype <U1"),
    "empty": (f"{EXPLAIN} --data empty.npy", "no examples"),
    "rank": (f"{EXPLAIN} --data flat.npy", "cannot take a batch"),
    "module": ("explain no_module:f --data x.npy", "cannot be imported"),
    "broken module": ("explain cli_broken:f --data x.npy", "nothing_of_this_name"),
    "name": ("explain cli_models:f --data x.npy", "has no attribute 'f'"),
    "form": ("explain cli_models --data x.npy", "package.module:name"),
    "not a function": ("explain cli_models:number --data x.npy", "not a function"),
    "independent": ("explain cli_models:stuck --data x.npy", "does not depend on x"),
    "params": (
        "explain cli_models:model --params no.npz --data x.npy",
        "There are no parameters",
    ),
    "composite": (f"{EXPLAIN} --data x.npy --composite none", "none"),
    "processes": (f"{EXPLAIN} --data x.npy --part 0/9", "more than the 3 blocks"),
    "part": (f"{EXPLAIN} --data x.npy --part 0of9", "--part is I/N"),
    "reduce": (f"{EXPLAIN} --data x.npy --reduce mean", "--reduce is"),
    "buckets": (f"{EXPLAIN} --data x.npy --buckets 4,x", "--buckets is numbers"),
    "cluster": (f"{EXPLAIN} --data x.npy --distributed", "found no cluster"),
    "artifact": ("explain --artifact x.npy --data x.npy", "is no artifact"),
    "no params": ("explain cli_models:model --data x.npy", "No --params was given"),
    "label": (f"{EXPLAIN} --data x.npy --target 7", "Target 7 is out of range"),
    "one label": (f"{EXPLAIN} --data x.npy --target labels.npy", "is 3 for example 2"),
    "a word as target": (f"{EXPLAIN} --data x.npy --target cat", "cannot be read"),
    "a scalar field": (f"{EXPLAIN} --data cli_models:labelled", "split="),
    "lengths": (f"{EXPLAIN} --data cli_models:uneven", "arrays of one length"),
}

# For each option that has a value: values that none can take.
WRONG = ("", "-1", "1e400", "nan", "a/b", "0/0", ",", "..", "[1]", "x.npy:", "top:0")
OPTIONS = ("--params", "--composite", "--fallback", "--seed", "--reduce", "--dtype")
OPTIONS += ("--data", "--target", "--batch", "--buckets", "--pad", "--compression")
OPTIONS += ("--on-failure", "--devices", "--part", "--capture", "--artifact")
RIGHT = {"--target": ("-0",), "--pad": ("-1",)}


@pytest.mark.parametrize("option", OPTIONS)
def test_wrong_values_are_refused_in_words(option, folder, monkeypatch, tmp_path):
    monkeypatch.chdir(folder)
    out = tmp_path / "r"
    for value in WRONG:
        if value in RIGHT.get(option, ()):
            continue
        line = f"{EXPLAIN} --data x.npy --out {out}".split()
        if option == "--artifact":
            line = f"explain --data x.npy --out {out}".split()
        run = CliRunner().invoke(cli.main, [*line, option, value])
        assert isinstance(run.exception, SystemExit | None), (option, value)
        assert run.exit_code in (0, 1, 2) and "Traceback" not in run.output
        if run.exit_code == 0:  # the empty capture and the like say nothing
            assert value in ("", ","), (option, value)
            shutil.rmtree(out)


@pytest.mark.parametrize(
    "line, message",
    [
        ("show nowhere.zarr 0", "There is no store at the path nowhere.zarr"),
        ("show . 0", "no store of jlrp"),
        ("inspect cli_models:model --shape 1,4,4,1", "No --params was given"),
        ("inspect cli_models:model --params p.npz --shape 1,x", "--shape is numbers"),
        (
            "inspect cli_models:model --params p.npz --shape 1,4,4,1 --target 3",
            "Target 3 is out of range",
        ),
        (
            "inspect cli_models:model --params p.npz --shape 1,4,4,1 --dtype word",
            "no dtype",
        ),
        ("export cli_models:model --params p.npz --shape 4 --out m", "raised"),
    ],
)
def test_other_commands_refuse_in_one_line(line, message, jlrp):
    run = jlrp(line)
    assert run.exit_code == 1 and message in run.output
    assert len(run.output.splitlines()) == 1


def test_lengths_that_differ(jlrp):
    line = "explain cli_models:tokens --params p.npz --data cli_models:rows --batch 4"
    run = jlrp(f"{line} --out lengths.zarr --quiet")
    assert run.exit_code == 1 and "--buckets" in run.output
    assert len(run.output.splitlines()) == 1


def test_inspect_of_a_target(jlrp):
    line = "inspect cli_models:model --params p.npz --shape 1,4,4,1 --target 2"
    assert jlrp(line).exit_code == 0


def test_an_artifact_without_labels(jlrp):
    made = "export cli_models:model --params p.npz --shape 4,4,1 --out u.jlrp"
    assert jlrp(made).exit_code == 0
    run = jlrp(
        "explain --artifact u.jlrp --params p.npz --data x.npy --out u.zarr --quiet "
        "--target good_labels.npy --batch 8"
    )
    assert run.exit_code == 1 and "takes no labels" in run.output


def test_arrays_by_name(jlrp):
    """A .npz file as data is a dict of arrays: each example has a row of each."""
    run = jlrp("explain cli_models:two --data two.npz --out two.zarr --batch 8 --quiet")
    assert run.exit_code == 0 and "20 of 20" in run.output, run.output


@pytest.mark.parametrize("line, message", REFUSED.values(), ids=REFUSED.keys())
def test_refused_in_one_line(line, message, jlrp, folder):
    run = jlrp(f"{line} --out refused.zarr")
    assert run.exit_code == 1
    assert message in run.output
    assert len(run.output.splitlines()) == 1
    assert not (folder / "refused.zarr").exists()


def test_usage(jlrp):
    assert jlrp("explain --data x.npy --out r2.zarr").exit_code == 2
    for command in ("", "explain", "inspect", "show", "export"):
        assert jlrp(f"{command} --help").exit_code == 0


def test_the_demo(tmp_path):
    example = Path(__file__).parents[1] / "examples" / "batch_job.py"
    options = ["--steps=20", "--examples=1500", "--output=digit.png"]
    run = subprocess.run(
        [sys.executable, example, *options],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    killed = int(re.search(r"killed after (\d+) examples", run.stdout)[1])
    assert 750 <= killed < 1500
    assert f"this run: {1500 - killed} in" in run.stdout
    assert run.stdout.count("\x1b[48;2;") == 64
    assert matplotlib.image.imread(tmp_path / "digit.png").shape[0] == 256
