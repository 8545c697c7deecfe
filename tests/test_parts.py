"""Rules hand on the parts of promises that they say, on all that they fit."""

from dataclasses import dataclass

import baseline_zoo
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_control_flow as loops
import zoo
from jax import lax

import jlrp
from jlrp import rules
from jlrp.composites import Pair
from jlrp.promise import Parts, Promise
from jlrp.rules import ByItself, Custom
from jlrp.rules.loops.parts import filled

pytestmark = pytest.mark.relaxed  # models promote dtypes and ranks as users write them
KINDS = (Parts.VALUE, Parts.MULTIPLIER, Parts.BOTH)


def subclasses(cls):
    return [cls, *(s for c in cls.__subclasses__() for s in subclasses(c))]


@pytest.fixture
def seen(monkeypatch):
    """The operations that rules explained, as (rule, kind).

    Whatever a rule is given it is given again as a value, a multiplier and both; from a
    reference there are multipliers alone.
    """
    found = set()

    def watched(propagate):
        def run(rule, op, r, ctx):
            def handed(r):
                propagation = propagate(rule, op, r, ctx)
                says = list(rule.parts(op, [Parts.of(p) for p in r]))
                does = [Parts.of(p) for p in propagation.promises]
                if isinstance(rule, (Custom, ByItself)):  # a function may give None
                    does = [a & b for a, b in zip(says, does, strict=True)]
                    says = does
                assert does == says, (rule, op, r)
                return propagation

            found.add((type(rule).__name__, op.kind))
            float64 = np.dtype(np.float64)
            kinds = KINDS if ctx.reference is None else (Parts.MULTIPLIER,)
            for kind in kinds if not op.bodies else ():
                which = [Parts.NONE if p is None else kind for p in r]
                handed(filled(r, which, op.outputs, float64))
            return handed(r)

        return run

    for cls in subclasses(rules.Rule):
        if "propagate" in vars(cls):
            monkeypatch.setattr(cls, "propagate", watched(cls.propagate))
    return found


def traced(fn, params, x, composite, **options):
    """Run all rules, without compiling."""
    shape = jax.eval_shape(fn, params, x).shape
    target = 0 if len(shape) > 1 else None
    jax.eval_shape(
        lambda p, x: jlrp.relevance(
            lambda p, x: fn(p, x), p, x, target, composite=composite, **options
        ),
        params,
        x,
    )


RULES = [
    *[rules.Absolute(), rules.AlphaBeta(), rules.Epsilon(), rules.Euler(1.0)],
    *[rules.Flat(), rules.Follow(), rules.Gamma(), rules.GammaMontavon()],
    *[rules.Gate(), rules.Gradient(), rules.NativeGradient(), rules.Pass()],
    *[rules.Selective(), rules.Stop(), rules.Uniform(), rules.WSquare()],
    *[rules.ZBox(-3.0, 3.0), rules.ZPlus(), rules.Zero("split")],
]


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_a_rule_on_all_operations_that_it_fits(rule, seen):
    composite = jlrp.Composite([Pair("*", rule, optional=True)], base="epsilon")
    names = list(zoo.PROGRAMS)
    start = RULES.index(rule)
    for name in names[start % 4 :: 4]:
        traced(*zoo.PROGRAMS[name](), composite)
    assert type(rule).__name__ in {name for name, _ in seen}


@pytest.mark.parametrize("composite", zoo.COMPOSITES.values(), ids=zoo.COMPOSITES)
def test_a_composite_on_the_zoo(composite, seen):
    start = list(zoo.COMPOSITES.values()).index(composite)
    for name in list(zoo.PROGRAMS)[start % 5 :: 5]:
        traced(*zoo.PROGRAMS[name](), composite)
    assert len(seen) > 5


def test_rules_from_a_reference(seen):
    def on_top(selector, rule):
        return jlrp.Composite([Pair(selector, rule, optional=True)], "deep_lift")

    composites = [
        "deep_lift",
        on_top("activation", rules.Gradient()),
        on_top("dense", rules.Epsilon()),
        on_top("dense", rules.Gamma()),
        on_top("*", rules.Gate()),
    ]
    for i, name in enumerate(baseline_zoo.PROGRAMS):
        fn, params, x = baseline_zoo.PROGRAMS[name]
        traced(fn, params, x, composites[i % 3], baseline=0.0)
    for composite in composites:
        for name in ("attention", "lstm"):
            traced(*baseline_zoo.PROGRAMS[name], composite, baseline=0.0)
    names = {name for name, _ in seen}
    expected = {"Difference", "KernelDifference", "EpsilonDifference", "Taylor", "Scan"}
    assert expected <= names


MODELS = {
    "rnn": loops.rnn(lax.scan, "learned"),
    "lstm": loops.lstm(lax.scan),
    "nested": loops.nested(lax.scan),
    "late": loops.late(lax.scan, 2),
    "while": loops.rnn(loops.whiled, "of x"),
    "cond": loops.cond_in_scan(lax.scan),
    "while in scan": loops.while_in_scan,
    "switch": loops.switched(1),
    "swapped": loops.swapped(lax.scan),
    "attending": loops.attending(lax.scan),
}


@pytest.mark.parametrize("composite", ["attnlrp", "dynamic_lrp", "epsilon_plus_flat"])
def test_loops_and_branches(composite, seen):
    for model in MODELS.values():
        traced(model, loops.P, loops.X, composite)
    assert {"Scan", "While", "Cond"} <= {name for name, _ in seen}


def test_every_rule_says_which_parts():
    inherited = [rules.Rule]  # a rule of a user's own
    for cls in subclasses(rules.Rule):
        if cls.__module__.startswith("jlrp.") and "propagate" in vars(cls):
            if cls not in inherited:
                assert "parts" in vars(cls), cls


@dataclass(frozen=True)
class Stub:
    """Shape and dtype of a value."""

    dtype: object
    shape: tuple = (2,)


@pytest.mark.parametrize(
    "dtype, of_value, of_multiplier",
    [
        ("float64", "float64", "float64"),
        ("complex64", "float32", "complex64"),
        ("bfloat16", "float32", "float32"),
        ("int32", "float64", "float64"),
    ],
)
def test_parts_are_filled_in_the_dtype_of_relevance(dtype, of_value, of_multiplier):
    value = Stub(jnp.dtype(dtype))
    for promise in (None, Promise(value=jnp.ones(2, jnp.float32))):
        (found,) = filled([promise], [Parts.BOTH], [value], np.dtype("float64"))
        assert (found.value.dtype, found.multiplier.dtype) == (of_value, of_multiplier)
        assert (found.value == (promise is not None)).all()
    (rows,) = filled([None], [Parts.VALUE], [value], np.dtype("float64"), 3)
    assert rows.value.shape == (3, 2) and rows.multiplier is None
    assert filled([None], [Parts.NONE], [value], np.dtype("float64")) == [None]


# Rules of one's own in loops.


@dataclass(frozen=True)
class Shared(rules.Rule):
    """Epsilon's multiplier where the relevance is a multiplier, else its value."""

    says: str = "nothing"

    def needs(self, op):
        return op.inputs + op.outputs

    def propagate(self, op, r, ctx):
        (promise,) = r
        (m,) = op.vjp([promise.over(ctx.read(op.outputs[0]), 1e-3)], ctx)
        if self.says == "value":
            return rules.Propagation([rules.Promise(value=m * ctx.read(op.inputs[0]))])
        return rules.Propagation([rules.Promise(multiplier=m)])


@dataclass(frozen=True)
class Saying(Shared):
    """The same, saying so."""

    says: str = "value"

    def parts(self, op, r):
        return [Parts.VALUE if self.says == "value" else Parts.MULTIPLIER]


@dataclass(frozen=True)
class Lying(Saying):
    def parts(self, op, r):
        return [Parts.VALUE]

    def propagate(self, op, r, ctx):
        promise = super().propagate(op, r, ctx).promises[0]
        return rules.Propagation([rules.Promise(promise.value, promise.value)])


OWN = [Shared(), Shared("value"), Saying(), Saying("multiplier")]


@pytest.mark.parametrize("rule", OWN, ids=repr)
@pytest.mark.parametrize("loop", [lax.scan, loops.whiled], ids=["scan", "while"])
def test_a_rule_of_ones_own_in_a_loop(rule, loop):
    composite = jlrp.Composite([("dense", rule)], base="dynamic_lrp")
    cases = {"rnn": loops.MODELS["rnn with a learned start"], "nested": loops.nested}
    cases |= {"late": loops.LATE["active after 2"], "swapped": loops.swapped}
    loops.assert_as_unrolled(cases, composite, [loop])


def test_a_rule_of_ones_own_in_a_branch():
    composite = jlrp.Composite([("dense", Shared("value"))], base="epsilon")
    fns = [loops.static_cond(None), loops.cond_in_scan(lax.scan)]
    expected, found = loops.explained(fns, composite)
    loops.assert_same(found, expected)


@pytest.mark.parametrize(
    "model", ["rnn", "while", "cond", "nested"], ids=lambda name: name
)
def test_what_a_rule_does_not_say_is_refused(model):
    composite = jlrp.Composite([("dense", Lying())], base="epsilon")
    with pytest.raises(jlrp.RuleError, match="multiplier at the dense .* parts") as e:
        traced(MODELS[model], loops.P, loops.X, composite)
    assert "Lying" in str(e.value) and "test_control_flow.py" in str(e.value)
    # Outside of loops parts need not be known.
    traced(lambda p, x: x[:, 0] @ p["w"], loops.P, loops.X, composite)


class Relative(Shared):
    """Epsilon's share of what changes."""

    def from_reference(self, op):
        return self

    def propagate(self, op, r, ctx):
        (m,) = op.vjp([p.multiplier for p in r], ctx)
        return rules.Propagation([rules.Promise(multiplier=m)])


class SaysSo(Relative):
    def parts(self, op, r):
        return [Parts.MULTIPLIER]


@pytest.mark.parametrize("model", ["rnn", "nested", "cond"], ids=lambda name: name)
def test_rules_of_ones_own_from_a_reference(model):
    composite = jlrp.Composite([("dense", Relative())], base="deep_lift")
    with pytest.raises(jlrp.RuleError, match="with a baseline it has to say which"):
        traced(MODELS[model], loops.P, loops.X, composite, baseline=0.0)
    traced(lambda p, x: x[:, 0] @ p["w"], loops.P, loops.X, composite, baseline=0.0)
    plain = jlrp.Composite([("dense", Relative())], base="gradient_input")
    traced(MODELS[model], loops.P, loops.X, plain)


def test_rules_of_ones_own_that_say_so_from_a_reference():
    composite = jlrp.Composite([("dense", SaysSo())], base="deep_lift")
    cases = {"rnn": loops.rnn, "nested": loops.nested}
    loops.assert_as_unrolled(cases, composite, [lax.scan], baseline=0.0)
