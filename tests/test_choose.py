"""``jlrp.choose``: composites measured on one half, compared on the other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlrp
from jlrp import InputError, SelectorError, TargetError, composites, metrics, rules
from jlrp.metrics import interval

pytestmark = pytest.mark.relaxed


def model(params, x):
    return jax.nn.relu(x @ params["w"] + 0.3) @ params["v"]


KEYS = jax.random.split(jax.random.key(0), 3)
PARAMS = {
    "w": jax.random.normal(KEYS[0], (5, 8)),
    "v": jax.random.normal(KEYS[1], (8, 3)),
}
X = jax.random.normal(KEYS[2], (21, 5))
NAMES = ["epsilon", "excitation_backprop", "cp_lrp"]


def choose(x=X, target=None, **options):
    return jlrp.choose(model, PARAMS, x, target, **options)


def by_hand(composite, x, **options):
    """ABPC of each example."""
    relevance = jlrp.relevance(model, PARAMS, x, composite=composite, **options)
    found = metrics.curves(
        model,
        PARAMS,
        x,
        relevance,
        parts=metrics.features((5,)),
        removal=metrics.Constant(0),
        steps=16,
    )
    return np.asarray(found.abpc, np.float64)


def halves(seed=0):
    order = np.random.default_rng(seed).permutation(21)
    return X[order[:10]], X[order[-10:]]


def test_it_is_what_the_metrics_say():
    found = choose(candidates=NAMES, batch=4)
    first, second = halves()
    assert found.examples == 10
    default = by_hand("auto", first)
    means = {}
    for row in found.rows:
        values = by_hand(row.composite, first)
        means[row.name] = values.mean()
        assert np.isclose(row.abpc.mean, values.mean(), atol=1e-6)
        assert np.isclose(row.gap.low, interval(values - default).low, atol=1e-6)
    assert list(means) == sorted(means, key=lambda name: -means[name])
    assert found.name == found.rows[0].name
    if found.gap is not None:
        gap = by_hand(found.composite, second) - by_hand("auto", second)
        assert np.isclose(found.gap.mean, gap.mean(), atol=1e-6)


def test_composites_that_are_one_are_measured_once():
    found = choose(candidates=NAMES)
    also = {row.name: row.also for row in found.rows}
    assert also["auto"] == ("cp_lrp",) and also["epsilon"] == ()
    assert "auto is here what these are: cp_lrp." in str(found)


WORSE = jlrp.Composite([("dense", rules.Zero()), ("activation", rules.Stop())])


def test_a_difference_beyond_noise_is_said(monkeypatch):
    """The default is made bad: what is chosen in its place holds on the other half."""
    monkeypatch.setitem(composites._NAMED, "auto", lambda: WORSE)
    found = choose(candidates={"plain": "attnlrp"})
    assert found.name == "plain" and found.gap is not None and found.gap.low > 0
    assert not found.is_within_noise and found.verdict.endswith("the choice holds.")
    assert np.isclose(found.gap.mean, by_hand("attnlrp", halves()[1]).mean(), atol=1e-6)


def test_noise_and_a_choice_that_does_not_hold_are_said():
    row = metrics.Interval(0.5, 0.4, 0.6)

    def made(gap):
        return jlrp.choosing.Chosen(
            composites.epsilon(), "epsilon", gap, (), "auto", 10
        )

    within = made(metrics.Interval(0.01, -0.02, 0.03))
    assert within.is_within_noise and "within noise" in within.verdict
    below = made(metrics.Interval(-0.2, -0.3, -0.1))
    assert not below.is_within_noise and "does not hold" in below.verdict
    assert made(None).is_within_noise and "best of those" in made(None).verdict
    assert not made(row).is_within_noise


def test_no_candidate_is_begun_after_the_time():
    found = choose(candidates=NAMES, seconds=0)
    assert [row.name for row in found.rows] == ["auto"]
    assert found.left_out == ("epsilon", "excitation_backprop")
    assert "Not measured, for lack of time: epsilon, excitation_backprop." in str(found)


def test_targets_and_baselines_are_divided_with_the_examples():
    """Labels of each example; one for all; a function; multipliers."""
    labels = np.arange(21) % 3
    each = choose(target=labels, candidates=NAMES)
    listed = choose(target=labels.tolist(), candidates=NAMES)
    shares = choose(target=np.eye(3)[labels], candidates=NAMES)
    for found in (listed, shares):
        assert np.isclose(found.rows[0].abpc.mean, each.rows[0].abpc.mean)
    alike = choose(target=np.full(21, 1), candidates=NAMES)
    one = choose(target=1, candidates=NAMES)
    function = choose(target=lambda out: jax.nn.softmax(out)[:, 1], candidates=NAMES)
    assert np.isclose(alike.rows[0].abpc.mean, one.rows[0].abpc.mean)
    assert np.isfinite(function.rows[0].abpc.mean)

    first, _ = halves()
    per_example = choose(candidates=["deep_lift"], baseline=jnp.flip(X, 0) * 0 + 0.1)
    shared = choose(candidates=["deep_lift"], baseline=0.1)
    wanted = by_hand("auto", first, baseline=0.1).mean()
    for found in (per_example, shared):
        assert found.rows[0].also == ("deep_lift",)
        assert np.isclose(found.rows[0].abpc.mean, wanted, atol=1e-6)


def test_parts_of_each_example_are_divided_too():
    labels = np.stack([np.roll(np.arange(5), i) for i in range(21)])
    found = choose(candidates=["cp_lrp"], parts=metrics.Parts(labels))
    assert np.isclose(found.rows[0].abpc.mean, by_hand("auto", halves()[0]).mean())


def test_all_presets_are_candidates():
    found = choose()
    named = {name for row in found.rows for name in (row.name, *row.also)}
    missing = set(composites.PRESETS) - named - {"epsilon_gamma_box"}
    assert not missing
    assert any(name.startswith("epsilon_gamma_box(") for name in named)


def test_presets_without_a_meaning_from_a_baseline_are_left_out():
    named = {
        name for row in choose(baseline=0.0).rows for name in (row.name, *row.also)
    }
    assert "epsilon_plus" in named and "epsilon_plus_flat" not in named
    with pytest.raises(jlrp.JlrpError):
        choose(baseline=0.0, candidates=["epsilon_plus_flat"])


def test_token_ids():
    table = jax.random.normal(KEYS[0], (9, 4))
    fn = lambda p, ids: jnp.tanh(p[ids]).sum(1)  # noqa: E731
    ids = jax.random.randint(KEYS[1], (8, 6), 0, 9)
    found = jlrp.choose(fn, table, ids, candidates=["epsilon"])
    assert found.examples == 4 and found.rows


def refused(error, match, *args, **options):
    """Before the function is run on anything but shapes."""

    def fn(params, x):
        assert isinstance(x, jax.core.Tracer), "it was run"
        return model(params, x)

    given = dict(x=X) | options
    x = given.pop("x")
    with pytest.raises(error, match=match):
        jlrp.choose(fn, PARAMS, x, *args, **given)


def test_what_does_not_fit_is_refused_before_any_work():
    refused(InputError, "needs 4 at least", x=X[:3])
    refused(InputError, "one array of shape", x={"a": X})
    refused(InputError, "say what is removed together", x=X.reshape(-1, 5, 1, 1))
    refused(InputError, "do not fit x", parts=metrics.features((4,)))
    refused(InputError, "removal is 3", removal=3)
    refused(InputError, "candidates is 'epsilon'", candidates="epsilon")
    refused(InputError, r"candidates is \[\]", candidates=[])
    refused(SelectorError, "Did you mean 'epsilon'", candidates=["epsilom"])
    refused(
        SelectorError,
        "matches no",
        candidates={"mine": jlrp.Composite([("conv", rules.ZPlus())])},
    )
    refused(InputError, "seconds is a finite number", seconds=-1)
    refused(InputError, "baseline is 'zero'", baseline="zero")
    refused(InputError, "has no argument composite", composite="epsilon")
    refused(TargetError, "out of range", 7)
    refused(TargetError, "do not fit", np.zeros(4, int))


def test_a_picture():
    pytest.importorskip("matplotlib")
    found = choose(candidates=NAMES)
    picture = found.plot()
    assert str(picture).startswith("ABPC: ")
    assert picture.figure().axes[0].get_xlabel() == "ABPC"
    with pytest.raises(InputError, match="found is empty"):
        jlrp.plotting.intervals({})


def test_progress(capsys):
    pytest.importorskip("tqdm")
    choose(candidates=["epsilon"], progress=True)
    assert "composites" in capsys.readouterr().err
