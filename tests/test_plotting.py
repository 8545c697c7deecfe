"""Pictures show what they should: colours, signs, words, and their errors."""

import doctest
import re
import sys

import matplotlib.image
import numpy as np
import pytest

import jlrp
from jlrp import metrics, plotting


def made_up_curves():
    at = np.linspace(0, 1, 5)
    return metrics.Curves(at, morf=(1 - at)[None] ** 3, lerf=1 - at[None] ** 3)


def made_up_check():
    return metrics.Randomisation(("b", "a"), np.array([[0.8, 0.2], [0.4, 0.0]]))


HEADS = np.random.default_rng(2).normal(size=(2, 3, 4))
EDGES = {
    ("output", "mlp"): 2.0,
    ("output", "input"): -1.0,
    ("mlp", "input"): 1.5,
}
IMAGE = np.random.default_rng(0).uniform(size=(12, 10, 3))
MAP = np.random.default_rng(1).normal(size=(12, 10, 3))
PICTURES = {
    "heatmap": lambda: plotting.heatmap(MAP, IMAGE, title="cat"),
    "per channel": lambda: plotting.heatmap(MAP, per_channel=True),
    "comparison": lambda: plotting.comparison(
        {"a": {"lrp": MAP, "gradient": -MAP}, "b": {"lrp": MAP, "gradient": MAP}},
        {"a": IMAGE, "b": IMAGE},
    ),
    "tokens": lambda: plotting.tokens(["an", "awful", "<film>"], [0.1, -2.0, 1.0]),
    "layers": lambda: plotting.layers({"conv1": MAP, "conv2": -MAP}),
    "heads": lambda: plotting.heads({"a": HEADS, "b": -HEADS[:, :2]}, head_axis=1),
    "flow": lambda: plotting.flow(EDGES, title="flow"),
    "pairs": lambda: plotting.pairs({"one": (["a", "cat"], ["cats"], [[0.1], [0.9]])}),
    "curves": lambda: plotting.curves({"lrp": made_up_curves()}),
    "randomisation": lambda: plotting.randomisation({"lrp": made_up_check()}),
}


@pytest.mark.parametrize("name", PICTURES)
def test_pictures_are_saved_and_shown(name, tmp_path):
    picture = PICTURES[name]()
    picture.save(tmp_path / "picture.png")
    pixels = matplotlib.image.imread(tmp_path / "picture.png")[..., :3]
    colourful = np.ptp(pixels, axis=-1) > 0.2
    assert colourful.sum() > 200
    page = picture._repr_html_()
    assert page.startswith(("<img alt=", "<div"))
    picture.save(tmp_path / "picture.html")
    assert (tmp_path / "picture.html").read_text(encoding="utf-8") == page


def drawn_maps(picture):
    """The arrays and limits of the relevance maps of a picture."""
    for ax in picture.figure().axes:
        for shown in ax.images:
            if shown.get_cmap().name == plotting.COLOURS:
                yield np.asarray(shown.get_array()), shown.get_clim()


def test_zero_is_the_middle_of_the_map_and_one_pixel_does_not_decide_the_scale():
    relevance = np.full((20, 20), 1.0)
    relevance[0, 0] = -1000.0
    ((shown, (low, high)),) = drawn_maps(plotting.heatmap(relevance, channel_axis=None))
    assert low == -high and high == 1.0
    np.testing.assert_array_equal(shown, relevance)


def test_channels_are_summed_or_shown_each():
    ((summed, _),) = drawn_maps(
        plotting.heatmap(np.moveaxis(MAP, -1, 0), channel_axis=0)
    )
    np.testing.assert_allclose(summed, MAP.sum(-1))
    each = [m for m, _ in drawn_maps(plotting.heatmap(MAP, per_channel=True))]
    np.testing.assert_allclose(np.stack(each, -1), MAP)


def test_every_map_of_a_comparison_has_its_own_scale():
    maps = {"x": {"small": 1e-3 * MAP, "large": 1e3 * MAP}}
    limits = [high for _, (_, high) in drawn_maps(plotting.comparison(maps))]
    assert limits[1] == pytest.approx(1e6 * limits[0])


def test_a_sparse_map_has_a_scale():
    sparse = np.zeros((50, 50))
    sparse[3, 4] = 2.0
    assert plotting.scale_of(sparse) == 2.0
    assert plotting.scale_of(np.zeros(3)) == 1.0


def test_red_is_for_and_blue_is_against():
    red, _, blue = plotting.colour(1.0)
    assert red > 2 * blue
    red, _, blue = plotting.colour(-1.0)
    assert blue > 2 * red
    assert plotting.colour(0.0) == (255, 255, 255)


def test_words_have_their_colours_in_terminal_and_page():
    strip = plotting.tokens(["bad", "<b>", "good"], [-1.0, 0.0, 1.0], title="review")
    for share in (-1.0, 0.0, 1.0):
        assert "48;2;{};{};{};".format(*plotting.colour(share)) in str(strip)
        assert "rgb({},{},{})".format(*plotting.colour(share)) in strip._repr_html_()
    assert "&lt;b&gt;" in strip._repr_html_() and "<b>review</b>" in strip._repr_html_()
    assert re.sub(r"\x1b\[[^m]*m", "", str(strip)).split() == [
        "review",
        "bad",
        "<b>",
        "good",
    ]


def test_long_strips_have_several_lines():
    words = [f"token{i}" for i in range(60)]
    (ax,) = plotting.tokens(words, np.linspace(-1, 1, 60)).figure().axes
    places = [text.get_position() for text in ax.texts]
    assert [t.get_text() for t in ax.texts] == words
    assert len({y for _, y in places}) > 2
    assert len(set(places)) == 60 and all(0 <= x < 1 for x, _ in places)


def test_layers_show_what_is_for_and_against():
    (ax,) = plotting.layers({"a": np.array([3.0, -1.0])}).figure().axes
    assert [bar.get_width() for bar in ax.patches] == [3.0, -1.0]
    (net,) = [line for line in ax.lines if line.get_marker() == "|"]
    assert list(net.get_xdata()) == [2.0]


def test_heads_are_summed_over_all_but_their_axis():
    picture = plotting.heads({"a": HEADS, "b": -HEADS[:, :2]}, head_axis=1)
    (table,) = [shown for shown, _ in drawn_maps(picture)]
    np.testing.assert_allclose(table[0], HEADS.sum((0, 2)))
    np.testing.assert_allclose(table[1, :2], -HEADS[:, :2].sum((0, 2)))
    assert np.ma.getmaskarray(table)[1, 2] or np.isnan(table[1, 2])


def test_flows_are_as_wide_as_their_amounts_and_go_downwards():
    (ax,) = plotting.flow(EDGES).figure().axes
    lines = {tuple(p.get_path().vertices[[0, -1], 1]): p for p in ax.patches}
    assert set(lines) == {(2, 1), (2, 0), (1, 0)}  # output, mlp, input from the top
    widths = {ends: p.get_linewidth() for ends, p in lines.items()}
    assert widths[2, 1] > widths[1, 0] > widths[2, 0]
    red, _, blue, _ = lines[2, 0].get_edgecolor()
    assert blue > red  # what is against
    texts = [t.get_text() for t in ax.texts]
    assert {"output", "mlp", "input", "0.5"} <= set(texts)  # 1.5 - 1 arrives below


def test_flows_are_ordered_whatever_the_order_of_the_pairs():
    upside_down = dict(reversed(EDGES.items()))
    (ax,) = plotting.flow(upside_down).figure().axes
    heights = {t.get_text(): t.get_position()[1] for t in ax.texts}
    assert heights["output"] > heights["mlp"] > heights["input"]


def test_pairs_of_words_are_lines_between_them():
    (ax,) = (
        plotting.pairs(
            {"x": (["a", "cat"], ["cats", "."], [[0.1, 0.0], [0.9, -0.3]])}, columns=1
        )
        .figure()
        .axes
    )
    assert [t.get_text() for t in ax.texts] == ["a", "cat", "cats", "."]
    places = [t.get_position()[0] for t in ax.texts]
    strongest = ax.lines[-1]
    assert list(strongest.get_xdata()) == [places[1], places[2]]
    assert [line.get_alpha() for line in ax.lines] == pytest.approx(
        [0, 0.1 / 0.9, 0.3 / 0.9, 1]
    )


def test_a_sanity_check_starts_at_one():
    (ax,) = plotting.randomisation({"x": made_up_check()}).figure().axes
    np.testing.assert_allclose(ax.lines[0].get_ydata(), [1, 0.6, 0.1])
    np.testing.assert_allclose(ax.lines[0].get_xdata(), [0, 0.5, 1])


def test_curves_are_means_over_examples():
    at = np.linspace(0, 1, 3)
    two = metrics.Curves(
        at, np.array([[1.0, 0, 0], [0, 1, 0]]), np.array([[1.0, 1, 0], [0, 1, 0]])
    )
    (ax,) = plotting.curves({"x": two}).figure().axes
    np.testing.assert_allclose(ax.lines[0].get_ydata(), [0.5, 0.5, 0])
    np.testing.assert_allclose(ax.lines[1].get_ydata(), [0.5, 1, 0])
    assert "0.167" in ax.get_title()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: plotting.heatmap(MAP[None]), "take one: relevance"),
        (lambda: plotting.heatmap(MAP * np.nan), "NaN or inf"),
        (lambda: plotting.heatmap(MAP, IMAGE[:5]), "relevance \\(12, 10\\)"),
        (lambda: plotting.heatmap(MAP, robust=0), "percentile above 0"),
        (lambda: plotting.tokens(["a"], [1.0, 2.0]), "1 tokens need relevance"),
        (lambda: plotting.comparison({}), "same methods"),
        (lambda: plotting.comparison({"a": {"x": MAP}, "b": {}}), "same methods"),
        (lambda: plotting.layers({}), "at least one"),
        (lambda: plotting.heads({}), "at least one layer"),
        (lambda: plotting.heads({"a": HEADS}, head_axis=3), "no axis 3 of heads"),
        (lambda: plotting.flow({}), "at least one pair"),
        (lambda: plotting.flow({("a", "b"): 1, ("b", "a"): 1}), "without a cycle"),
        (lambda: plotting.pairs({}), "at least one pair"),
        (lambda: plotting.pairs({"x": (["a"], ["b"], [1.0])}), r"shape \(1, 1\)"),
        (lambda: plotting.randomisation({}), "at least one method"),
        (lambda: plotting.curves({}), "at least one"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(jlrp.InputError, match=message):
        call()


def test_without_matplotlib_the_error_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    picture = plotting.heatmap(MAP)
    with pytest.raises(jlrp.IntegrationError, match=r"jlrp\[plot\]"):
        picture.figure()


def test_the_examples_in_the_docstrings():
    assert doctest.testmod(plotting).failed == 0
