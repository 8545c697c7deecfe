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

    def only(method, _):
        return method in wanted

    league.measure(name, 0, 20, rows, tmp_path, only)
    assert {key[3:] for key in rows.found} == {
        (removal, method) for removal in ("zero", "mean") for method in wanted
    }
    alike = [rows.found[name, 0, 20, "zero", m]["abpc"] for m in wanted[:2]]
    assert alike[0] == alike[1] and len(alike[0]) == 20
    monkeypatch.setattr(league, "Case", None)  # nothing is trained, nothing runs
    league.measure(name, 0, 20, rows, tmp_path, only)


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


# Cells


def rows_of(network, removal, methods, seed=0):
    size = len(next(iter(methods.values())))
    row = {"network": network, "seed": seed, "examples": size, "removal": removal}
    return [{**row, "method": m, "abpc": list(v)} for m, v in methods.items()]


def test_the_rival_is_chosen_on_examples_that_it_is_not_compared_on():
    lucky, steady = np.tile([0.9, 0.1], 10), np.full(20, 0.4)
    cell = league.compared("a", "zero", np.full(20, 0.3), {"l": lucky, "s": steady})
    assert cell.rival == "l"
    np.testing.assert_allclose(cell.gaps, np.full(10, 0.2), atol=1e-12)
    assert (cell.ours, cell.theirs) == pytest.approx((0.3, 0.1))


def made_up(mean, noise, seed, size=150):
    """A cell whose gaps have exactly that mean and deviation."""
    gaps = np.random.default_rng(seed).normal(size=size)
    gaps = mean + noise * (gaps - gaps.mean()) / gaps.std(ddof=1)
    return league.Cell("a", "zero", 0.5, "b", 0.5 - mean, gaps)


def test_cells_are_judged_as_holm_says():
    """Against p values and their running maximum, which is another spelling."""
    stats = pytest.importorskip("scipy.stats")
    below = [-1.0, -2.2, -2.5, -2.7, -3.2, -4.0, -9.0, 0.0, 3.0]  # in standard errors
    noise = 0.1
    means = [-league.LOST + t * noise / np.sqrt(150) for t in below]
    for count in (len(below), 4, 1):
        cells = [made_up(m, noise, i) for i, m in enumerate(means[:count])]
        found = league.judged(cells)
        p = [
            stats.ttest_1samp(c.gaps, -league.LOST, alternative="less").pvalue
            for c in cells
        ]
        order = np.argsort(p)
        adjusted = np.maximum.accumulate(np.sort(p) * (count - np.arange(count)))
        expected = np.empty(count, bool)
        expected[order] = adjusted < 0.025
        assert [fails for _, fails in found] == expected.tolist()
    alone = [league.judged([made_up(m, noise, 0)])[0][1] for m in means]
    together = [f for _, f in league.judged([made_up(m, noise, 0) for m in means])]
    assert sum(alone) > sum(together) > 0  # what fails by itself need not among many


def test_a_loss_fails_if_it_is_sure_and_more_than_may_be_lost():
    cells = [
        made_up(-0.02, 0.001, 0),  # sure, and little
        made_up(-0.05, 1.0, 1),  # much, and not sure
        made_up(-0.05, 0.01, 2),  # both
        league.Cell("a", "zero", 0.5, "b", 0.5, np.zeros(9)),  # one relevance
    ]
    found = league.judged(cells)
    assert [fails for _, fails in found] == [False, False, True, False]
    widths = [interval.high - interval.low for interval, _ in found]
    assert found[2][0].level == pytest.approx(1 - 0.05 / 4) and widths[3] == 0


def test_what_is_asked_of_each_removal():
    network = next(iter(league.HELD_OUT))
    names = ("auto", "epsilon", "Gamma 0.1 to 0.1", "integrated gradients")
    names += ("auto, differences", "deep_lift, differences", "gradient x input")
    names += ("Gamma 0.1 to 0.01, differences", "occlusion, 4 windows")
    values = {m: np.full(10, 0.1 * i) for i, m in enumerate(names)}
    rows = rows_of(network, "zero", values) + rows_of(network, "mean", values)
    cells = league.cells_of(league.Figures(rows, 10), "held-out")
    assert [(c.question, c.rival) for c in cells] == [
        ("zero", "epsilon"),
        ("zero, baseline", "occlusion, 4 windows"),
        ("mean, baseline", "occlusion, 4 windows"),
    ]
    assert not league.cells_of(league.Figures(rows, 10), "choosing")


def test_seeds_that_all_methods_have_are_compared():
    network = next(iter(league.HELD_OUT))
    both = {"auto": np.full(4, 0.5), "epsilon": np.full(4, 0.4)}
    rows = rows_of(network, "zero", both, seed=1) + rows_of(network, "zero", both)
    cut_off = {"auto": np.zeros(4)}  # its rival was not measured yet
    rows += rows_of(network, "zero", cut_off, seed=2)
    (cell,) = league.cells_of(league.Figures(rows, 4), "held-out")
    np.testing.assert_allclose(cell.gaps, np.full(4, 0.1))


def test_a_refused_method_is_no_rival(tmp_path):
    network = next(iter(league.HELD_OUT))
    values = {"auto": [0.5, 0.5], "epsilon": [0.1, 0.1], "attnlrp": []}
    rows = rows_of(network, "zero", values)
    (cell,) = league.cells_of(league.Figures(rows, 2), "held-out")
    assert cell.rival == "epsilon"


def test_failing_cells_are_named(tmp_path, monkeypatch):
    network, other = list(league.HELD_OUT)[:2]
    rows = rows_of(network, "zero", {"auto": -0.1 * np.ones(8), "epsilon": np.ones(8)})
    rows += rows_of(other, "zero", {"auto": np.ones(8), "epsilon": np.zeros(8)})
    figures = league.Figures(rows, 8)
    monkeypatch.setattr(league, "PAGE", tmp_path / "page.md")
    league.PAGE.write_text("Before.\n" + "\n".join(league.CELLS) + "\nBehind.\n")
    for _ in range(2):
        league.cells_page(figures, "held-out", 8)
    text = league.PAGE.read_text()
    assert text.startswith("Before.\n") and text.endswith("\nBehind.\n")
    assert "1 of 2 cells hold" in text and f"Failing: {network} (zero)." in text
    assert f"1 would fail if each were the only one, by 95 %: {network} (zero)" in text
    assert "1 are below chance" in text and "0.450 in the mean" in text
    (line,) = [row for row in text.splitlines() if row.startswith(f"| {network} |")]
    assert line.endswith("**fails**, below chance |") and "1.000 (epsilon)" in line


def test_the_kinds_that_were_added_are_what_they_say():
    near = league.small.neighbours()
    np.testing.assert_array_equal(near, near.T)
    assert (near.sum(0) == 3).all() and not near.diagonal().any()
    data = league.small.graphs(0)
    found = data.x.argmax(1)  # where each kind is
    for places, label in zip(found[:200], data.labels[:200], strict=True):
        a, b = (places[k] for k in range(league.small.KINDS) if k != label)
        assert near[a, b] == 1 and not near[places[label], [a, b]].any()
    scene = league.small.scenes(0)
    assert (scene.labels[:, 8, 8] > 0).mean() > 0.8
    logits = np.arange(2 * 4 * 4 * 3).reshape(2, 4, 4, 3)
    np.testing.assert_array_equal(league.middle(logits), logits[:, 2, 2])
