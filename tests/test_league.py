"""The league of small networks: what is measured is kept, and written once."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "benchmarks"))
for needed in ("flax", "optax", "sklearn", "PIL", "matplotlib"):
    pytest.importorskip(needed)
import league  # noqa: E402

pytestmark = pytest.mark.relaxed
ROW = {"network": "a", "seed": 0, "examples": 2, "removal": "zero", "method": "auto"}


def test_a_line_that_was_cut_off_counts_for_nothing(tmp_path):
    file = tmp_path / "rows"
    rows = league.Rows(file)
    rows.add({**ROW, "abpc": [0.1, 0.2]})
    cut_off = json.dumps({**ROW, "seed": 1})[:20]
    file.write_text(f"{file.read_text()}\n{cut_off}")
    again = league.Rows(file)
    assert list(again.found) == [tuple(ROW.values())]
    again.add({**ROW, "seed": 1, "abpc": [0.3, 0.4]})
    assert len(league.Rows(file).found) == 2


def test_a_run_does_what_lacks_alone(tmp_path, monkeypatch):
    rows = league.Rows(tmp_path / "rows")
    (name,) = [n for n in league.ENTRIES if n == "MLP of tanh, wine"]
    small = league.Entry("dense", league.small.wine, league.Dense((8,)), 5)
    monkeypatch.setitem(league.ENTRIES, name, small)
    wanted = ("attnlrp", "cp_lrp", "auto, differences")
    league.measure(name, 0, 20, rows, tmp_path, wanted)
    assert {key[3:] for key in rows.found} == {
        (removal, method) for removal in ("zero", "mean") for method in wanted
    }
    alike = [rows.found[name, 0, 20, "zero", m]["abpc"] for m in wanted[:2]]
    assert alike[0] == alike[1] and len(alike[0]) == 20
    monkeypatch.setattr(league, "Case", None)  # nothing is trained, nothing runs
    league.measure(name, 0, 20, rows, tmp_path, wanted)


def test_the_halves_have_no_network_in_common():
    assert not set(league.CHOOSING) & set(league.HELD_OUT)
    kinds = [{entry.kind for entry in half.values()} for half in league.HALVES.values()]
    assert kinds[0] == kinds[1]


def test_the_page_compares_on_the_same_examples(tmp_path, monkeypatch):
    network = next(iter(league.CHOOSING))
    values = {"auto": [0.5, 0.7], "epsilon": [0.4, 0.7], "attnlrp": [0.1, 0.1]}
    rows = [
        {**ROW, "network": network, "method": m, "abpc": v} for m, v in values.items()
    ]
    figures = league.Figures(rows, 2)
    ours, best, gap = league.comparison(
        figures.of(network, "zero"), "auto", ["epsilon", "attnlrp"]
    )
    assert (ours, best) == ("0.600", "0.550 (epsilon)") and gap.startswith("0.050 [")
    monkeypatch.setattr(league, "PAGE", tmp_path / "page.md")
    league.PAGE.write_text("What was decided.\n")
    for _ in range(2):
        league.page(figures, 2)
    text = league.PAGE.read_text()
    assert text.startswith("What was decided.\n") and text.count(league.MARK) == 1
    assert f"| {network} | 0.600 | 0.550 (epsilon) | {gap} |" in text
    assert np.isclose(figures.of(network, "zero")["auto"].mean(), 0.6)
