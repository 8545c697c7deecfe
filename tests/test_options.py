"""An option is one field: its keyword, documentation and checks come from there."""

import inspect
import re
from dataclasses import dataclass, fields, replace

import jax.numpy as jnp
import pytest

import jlrp
from jlrp import arguments
from jlrp.fields import Option, checked, of_example, options_of
from jlrp.options import AuditOptions, InspectOptions, Options, RelevanceOptions

X = jnp.ones((2, 3))
W = jnp.ones((3, 2))
TAKES = {
    "relevance": RelevanceOptions,
    "explain": Options,
    "inspect": InspectOptions,
    "audit": AuditOptions,
}


def fn(w, x):
    return x @ w


@pytest.mark.parametrize("name", TAKES)
def test_keywords_and_documentation_come_from_the_fields(name):
    public, options = getattr(jlrp, name), options_of(TAKES[name])
    found = inspect.signature(public).parameters
    keywords = {n: p for n, p in found.items() if p.kind is p.KEYWORD_ONLY}
    assert keywords.keys() == options.keys()
    text = " ".join(inspect.getdoc(public).split())
    arguments_ = text.split("Args:")[1].split("Returns:")[0]
    for option, parameter in keywords.items():
        assert parameter.default == options[option].default
        assert f"{option}: {options[option].text}" in arguments_


@dataclass(frozen=True, kw_only=True)
class Louder(AuditOptions):
    volume: Option[int, int] = Option(
        11, "how loud it is.", checked(arguments.whole(0)), brief="Loudness."
    )


@of_example(Louder)
def shout(fn, params, x, target=None, *, options):
    """Shouts.

    Args:
      fn, params, x, target: as in ``relevance``.

    Returns:
      The options.
    """
    return options


def test_an_option_is_one_field():
    assert inspect.signature(shout).parameters["volume"].default == 11
    assert "volume: how loud it is." in inspect.getdoc(shout)
    assert shout(fn, W, X).volume == 11
    assert shout(fn, W, X, volume=3, seed="one").volume == 3
    with pytest.raises(jlrp.InputError, match="volume is a whole number"):
        shout(fn, W, X, volume=-1)
    with pytest.raises(jlrp.InputError, match="volume is a whole number"):
        replace(shout(fn, W, X), volume=0.5)


@pytest.mark.parametrize("name", TAKES)
def test_other_keywords_are_refused_with_the_nearest(name):
    public = getattr(jlrp, name)
    given = (fn,) if name == "explain" else (fn, W, X)
    with pytest.raises(jlrp.InputError, match="Did you mean composite?") as caught:
        public(*given, composit="epsilon")
    assert isinstance(caught.value, TypeError)  # as Python's own
    with pytest.raises(jlrp.InputError, match=f"{name} has no argument zzz. It takes"):
        public(*given, zzz=1)
    with pytest.raises(jlrp.InputError, match="missing a required argument: '(fn|x)'"):
        public(*given[:-1])


def test_what_is_kept_is_accepted_again():
    for options in (
        Options(),
        Options(composite="epsilon", wrt=["x", "params"], capture="a", target=2),
        Options(condition={"a": 1.0}, capture_steps=2, residuals="sqrt"),
        Options(fallback="stop", seed="one", memory_limit=1000),
    ):
        assert replace(options) == options
        for field in fields(options):
            kept = getattr(options, field.name)
            assert getattr(Options(**{field.name: kept}), field.name) == kept


def test_an_explainers_options_are_its_attributes():
    explain = jlrp.explain(fn, composite="epsilon", capture="a", seed="one")
    assert (explain.seed, explain.capture, explain.wrt) == ("one", ("a",), "x")
    assert isinstance(explain.composite, jlrp.Composite)
    other = replace(explain, seed="score")
    assert other.fn is fn and other.seed == "score" and other.capture == ("a",)
    with pytest.raises(jlrp.InputError, match="seed must be one of"):
        replace(explain, seed="two")


def test_options_that_exclude_each_other():
    with pytest.raises(jlrp.InputError, match="leave residuals out"):
        jlrp.explain(fn, memory_limit=10, residuals="sqrt")


def test_the_command_has_what_a_command_line_can_say():
    cli = pytest.importorskip("jlrp.cli")
    options = options_of(Options)
    sayable = {name for name, option in options.items() if option.brief}
    assert sayable == options.keys() - {"condition", "target", "wrt"}
    for command, kind in ((cli.explain, Options), (cli.inspect, InspectOptions)):
        found = {parameter.name for parameter in command.params}
        assert sayable & options_of(kind).keys() <= found
    seed = next(p for p in cli.explain.params if p.name == "seed")
    assert seed.help == "Where relevance starts.  [default: score]"


def test_jobs_record_what_changes_results():
    steps = pytest.importorskip("jlrp.jobs.steps")
    explain = jlrp.explain(fn, capture="a/*", seed="one", capture_steps=4)
    made_by = steps.Step(explain).made_by
    assert made_by["capture"] == ["a/*"] and made_by["capture_steps"] == 4
    assert made_by["seed"] == "one" and made_by["fallback"] is None
    assert re.match(r"Composite\(pairs=", made_by["composite"])
    assert not {"residuals", "memory_limit", "wrt"} & made_by.keys()
