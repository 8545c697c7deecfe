"""Every public function with every argument wrong: refused by name, or right.

Each argument gets each of these values while all others are as they should be. What is
raised is an error of jlrp that names the argument, in a sentence; or nothing is, where
the value is one that the argument may have.
"""

import re
import tempfile
import types
import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlrp
from jlrp import baselines, composites, flow, jobs, metrics, plotting, rules
from jlrp.integrations import equinox, flax

pytestmark = pytest.mark.relaxed
W = jnp.asarray([[1.0, -2.0], [0.5, 3.0], [-1.0, 0.25]])
X = jnp.asarray([[1.0, 2.0, -1.0], [0.5, -0.5, 2.0]])
R = np.asarray([[1.0, 2.0, -1.0], [0.5, -0.5, 2.0]])


def fn(w, x):
    return x @ w


def tagged(w, x):
    return jlrp.tag(jnp.tanh(x), "a") @ w


def left_trace():
    found = []
    jax.jit(lambda x: found.append(x) or x)(X)
    return found[0]


class Thing:
    def __repr__(self):
        return "Thing()"


# Made anew for each call: a generator ends.
WRONG = {
    "None": lambda: None,
    "True": lambda: True,
    "string": lambda: "text",
    "empty string": lambda: "",
    "bytes": lambda: b"text",
    "object": Thing,
    "class": lambda: Thing,
    "module": lambda: types,
    "negative": lambda: -1,
    "fraction": lambda: 0.5,
    "huge": lambda: 10**400,
    "NaN": lambda: float("nan"),
    "inf": lambda: float("inf"),
    "complex": lambda: 1 + 2j,
    "empty list": list,
    "list": lambda: ["a", 3],
    "empty dict": dict,
    "dict": lambda: {"b": None, 3: "c"},
    "set": lambda: {1, 2},
    "generator": lambda: (i for i in range(2)),
    "empty array": lambda: np.zeros((0,)),
    "wrong rank": lambda: np.ones((2, 2, 2, 2)),
    "strings": lambda: np.array([["a", "b", "c"]] * 2),
    "objects": lambda: np.array([None, "a"], object),
    "NaN array": lambda: np.full((2, 3), np.nan),
    "abstract": lambda: jax.ShapeDtypeStruct((2, 3), np.float32),
    "left trace": left_trace,
    "raises": lambda: lambda *_: 1 / 0,
    "returns no array": lambda: lambda *_: Thing(),
}


def run_job(**options):
    """In a folder of its own, where the test gives none."""
    with tempfile.TemporaryDirectory() as folder:
        if options["store"] is None:
            options["store"] = f"{folder}/r"
        return jobs.run(**options)


def export(**options):
    with tempfile.TemporaryDirectory() as folder:
        if options["path"] is None:
            options["path"] = f"{folder}/e"
        return jobs.export_artifact(**options)


def of_op(op):
    return op.kind == "dense"


PARTS = metrics.features((3,))
COMMON = {"params": W, "x": X}
MODEL = {"fn": fn, **COMMON}
CURVES = {
    "a": metrics.curves(
        fn, W, X, R, parts=PARTS, removal=metrics.Constant(0), steps=2, score="output"
    )
}
RANDOMISED = {"a": metrics.Randomisation(("b",), jnp.ones((2, 1)))}
OPTIONS = {"composite": "epsilon", "seed": "score", "fallback": "stop"}
EXPLAINER = {
    **OPTIONS,
    "wrt": "x",
    "condition": None,
    "residuals": "keep",
    "memory_limit": None,
}

# By name: the callable, and arguments that are right.
CALLS = {
    "relevance": (jlrp.relevance, {**MODEL, "target": 0, **EXPLAINER}),
    "explain": (jlrp.explain, {"fn": fn, "target": 0, "capture": (), **EXPLAINER}),
    "explainer": (jlrp.explain(fn), {**COMMON, "target": 0, "condition": None}),
    "inspect": (
        jlrp.inspect,
        {**MODEL, "target": 0, "composite": "epsilon", "residuals": "keep"},
    ),
    "audit": (jlrp.audit, {**MODEL, "target": 0, **OPTIONS, "condition": None}),
    "tag": (jlrp.tag, {"y": X, "name": "a"}),
    "custom_relevance": (jlrp.custom_relevance, {"fun": jnp.sin}),
    "register_rule": (
        jlrp.register_rule,
        {"primitive": jax.extend.core.primitives.erf_inv_p, "rule": rules.Pass()},
    ),
    "Composite": (
        jlrp.Composite,
        {"pairs": [("dense", rules.Zero())], "base": "epsilon"},
    ),
    "KeepWhere": (jlrp.KeepWhere, {"chosen": of_op}),
    "Depth": (composites.Depth, {"low": 0.0, "high": 1.0}),
    "gamma_by_depth": (
        composites.gamma_by_depth,
        {"flat": 0.1, "gammas": (0.6, 0.1), "steps": 2, "epsilon": 1e-6},
    ),
    "epsilon": (composites.epsilon, {"epsilon": 1e-6, "stabilizer": 1e-6}),
    "epsilon_plus": (composites.epsilon_plus, {"epsilon": 1e-6, "stabilizer": 1e-6}),
    "attnlrp": (composites.attnlrp, {"gamma_conv": 0.1, "gamma_dense": 0.1}),
    "epsilon_gamma_box": (
        composites.epsilon_gamma_box,
        {"low": -1.0, "high": 1.0, "gamma": 0.25, "stabilizer": 0.0},
    ),
    "Epsilon": (rules.Epsilon, {"epsilon": 1e-6, "bias": "absorb"}),
    "Gamma": (rules.Gamma, {"gamma": 0.1, "bias": "absorb", "stabilizer": 0.0}),
    "GammaMontavon": (rules.GammaMontavon, {"gamma": 0.1, "gamma_bias": True}),
    "AlphaBeta": (rules.AlphaBeta, {"alpha": 2.0, "beta": 1.0, "bias": "absorb"}),
    "ZBox": (rules.ZBox, {"low": -1.0, "high": 1.0, "stabilizer": 0.0}),
    "Flat": (rules.Flat, {"stabilizer": 0.0}),
    "Uniform": (rules.Uniform, {"stabilizer": 0.0}),
    "gradient": (baselines.gradient, {**MODEL, "target": 0}),
    "gradient_input": (baselines.gradient_input, {**MODEL, "target": 0}),
    "integrated_gradients": (
        baselines.integrated_gradients,
        {**MODEL, "target": 0, "baseline": 0.0, "steps": 2},
    ),
    "smoothgrad": (
        baselines.smoothgrad,
        {**MODEL, "target": 0, "noise": 0.1, "samples": 2, "seed": 0},
    ),
    "occlusion": (
        baselines.occlusion,
        {**MODEL, "target": 0, "parts": PARTS, "removal": metrics.Constant(0)},
    ),
    "interval": (
        metrics.interval,
        {"values": [1.0, 2.0], "groups": ["a", "b"], "level": 0.9, "resamples": 9}
        | {"seed": 0},
    ),
    "relevance_mass": (metrics.relevance_mass, {"relevance": R, "mask": R > 0}),
    "relevance_rank": (metrics.relevance_rank, {"relevance": R, "mask": R > 0}),
    "top_k_accuracy": (metrics.top_k_accuracy, {"relevance": R, "mask": R > 0, "k": 1}),
    "pointing_game": (metrics.pointing_game, {"relevance": R, "mask": R > 0}),
    "Parts": (metrics.Parts, {"labels": np.array([0, 0, 1])}),
    "pool": (metrics.pool, {"relevance": R, "parts": PARTS, "how": "sum"}),
    "patches": (metrics.patches, {"shape": (4, 4, 1), "size": 2, "channel_axis": -1}),
    "pixels": (metrics.pixels, {"shape": (4, 4, 1), "channel_axis": -1}),
    "tokens": (metrics.tokens, {"shape": (4,)}),
    "features": (metrics.features, {"shape": (4,)}),
    "Constant": (metrics.Constant, {"value": 0}),
    "Mean": (metrics.Mean, {"axes": (1,)}),
    "Noise": (metrics.Noise, {"seed": 0, "scale": 1.0}),
    "Blur": (metrics.Blur, {"kernel": 3, "sigma": 1.0, "axes": (1, 2)}),
    "Inpaint": (metrics.Inpaint, {"function": lambda x, removed: x}),
    "curves": (
        metrics.curves,
        {**MODEL, "relevance": R, "parts": PARTS, "removal": metrics.Constant(0)}
        | {"steps": 2, "pool": "sum", "score": "output", "target": 0},
    ),
    "infidelity": (
        metrics.infidelity,
        {**MODEL, "relevance": R, "perturb": 0.1, "contributions": True}
        | {"score": "output", "target": 0, "samples": 2, "seed": 0},
    ),
    "sensitivity": (
        metrics.sensitivity,
        {"method": baselines.gradient, **MODEL, "target": 0, "radius": 0.1}
        | {"samples": 2, "seed": 0},
    ),
    "randomisation": (
        metrics.randomisation,
        {"method": baselines.gradient, **MODEL, "target": 0}
        | {"similarity": "pearson", "absolute": False, "seed": 0},
    ),
    "heatmap": (
        plotting.heatmap,
        {"relevance": R, "image": R, "title": "t", "channel_axis": None}
        | {"per_channel": False, "robust": 99.0},
    ),
    "comparison": (
        plotting.comparison,
        {"rows": {"a": {"b": R}}, "images": {"a": R}, "channel_axis": None}
        | {"robust": 99.0},
    ),
    "strip": (
        plotting.tokens,
        {"words": ["a", "b"], "relevance": [1.0, 2.0], "title": "t", "robust": 99.0},
    ),
    "layers": (plotting.layers, {"relevance": {"a": R}, "title": "t"}),
    "heads": (plotting.heads, {"relevance": {"a": R}, "head_axis": -2, "title": "t"}),
    "flow": (plotting.flow, {"edges": {("a", "b"): 1.0}, "title": "t"}),
    "pairs": (
        plotting.pairs,
        {"examples": {"": (["a"], ["b"], [[0.1]])}, "columns": 2, "robust": 99.0},
    ),
    "plotted curves": (plotting.curves, {"found": CURVES, "score": "s"}),
    "plotted randomisation": (plotting.randomisation, {"found": RANDOMISED}),
    "between": (
        flow.between,
        {"fn": tagged, **COMMON, "names": ("a",), "target": 0, "composite": "epsilon"},
    ),
    "jobs.run": (
        run_job,
        {"explain": jlrp.explain(fn), "params": W, "source": R, "store": None}
        | {"target": 0, "split": None, "batch": 2, "buckets": None, "reduce": None}
        | {"dtype": "float32", "compression": "zstd", "on_failure": "stop"}
        | {"resume": False, "devices": None, "part": None, "progress": False},
    ),
    "export_artifact": (
        export,
        {"explain": jlrp.explain(fn), "params": W, "example": R[0], "path": None}
        | {"labels": False, "reduce": None, "dtype": "float32"},
    ),
    "load_artifact": (jobs.load_artifact, {"path": "nowhere"}),
    "load_params": (jobs.load_params, {"path": "nowhere"}),
    "summary": (jobs.summary, {"path": "nowhere"}),
    "Top": (jobs.Top, {"k": 1}),
    "Buckets": (jobs.Buckets, {"lengths": (2, 4), "pad": 0, "window": 2}),
    "equinox": (equinox.module, {"model": None}),
    "flax.nnx": (flax.nnx, {"model": None}),
    "flax.linen": (flax.linen, {"module": nn.Dense(2), "variables": {}}),
}
CASES = [(name, argument) for name, (_, right) in CALLS.items() for argument in right]


def outcome(call, right, argument, value):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            found = call(**{**right, argument: value})
            jax.block_until_ready(found)
        except jlrp.JlrpError as error:
            return str(error)
    return None


@pytest.mark.parametrize("name, argument", CASES)
def test_refused_by_name_or_right(name, argument, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where the store "text" is written
    call, right = CALLS[name]
    for wrong, make in WRONG.items():
        said = outcome(call, right, argument, make())
        if said is not None:
            assert re.search(rf"\b{argument}\b", said, re.IGNORECASE), (wrong, said)
            assert said.rstrip()[-1] in ".)", (wrong, said)  # a sentence
