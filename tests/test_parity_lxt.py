"""AttnLRP and CP-LRP of Hugging Face's models equal LXT's rules."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest
from peers import hf_flax, hf_models, lxt_oracle, torch
from peers.compare import assert_equal

import jlrp

pytestmark = [
    pytest.mark.relaxed,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

TOLERANCE = 1e-5  # the models cast to float32 in their norms and softmaxes
CASES = [
    pytest.param(family, attention, id=f"{family}-{attention}")
    for family, spec in hf_models.FAMILIES.items()
    for attention in spec.attention
]


@functools.cache
def expected(family, variant):
    """One oracle for both implementations of attention: they compute the same."""
    spec = hf_models.FAMILIES[family]
    model = hf_models.build(family, spec.attention[0])
    model.requires_grad_(False)

    def score(out):
        return spec.score(out)

    def run(**x):
        return model(**x, **spec.arguments)

    return lxt_oracle.relevance(run, hf_models.inputs(family), score, variant)


@pytest.mark.parametrize("variant", lxt_oracle.VARIANTS)
@pytest.mark.parametrize(("family", "attention"), CASES)
def test_equals_lxt(family, attention, variant):
    theirs = expected(family, variant)
    ours = hf_models.explain(family, attention, variant)
    for name, relevance in theirs.items():
        assert_equal(ours[name], relevance, TOLERANCE)


def token_ids(name="input_ids"):
    shape = (hf_models.BATCH, hf_models.TOKENS)
    numbers = np.random.default_rng(sum(map(ord, name)))
    return numbers.integers(3, hf_models.VOCABULARY, shape, dtype=np.int32)


TEXTS = [
    family
    for family, spec in hf_models.FAMILIES.items()
    if spec.inputs[0] == "inputs_embeds"
]


@pytest.mark.parametrize("family", TEXTS)
def test_token_ids_are_sums_over_features(family):
    spec = hf_models.FAMILIES[family]
    names = {name: name.replace("inputs_embeds", "input_ids") for name in spec.inputs}
    ids = {name: token_ids(name) for name in names.values()}
    table = hf_models.build(family, spec.attention[0]).get_input_embeddings()
    with torch.no_grad():
        embedded = {e: table(torch.tensor(ids[i])).numpy() for e, i in names.items()}
    fn, params = hf_models.function(family, spec.attention[0])
    explain = jlrp.explain(fn, composite="attnlrp")
    of_ids = explain(params, {n: jnp.asarray(v) for n, v in ids.items()})
    of_embedded = explain(params, {n: jnp.asarray(v) for n, v in embedded.items()})
    for e, i in names.items():
        expected = np.asarray(of_embedded.relevance[e]).sum(-1)
        assert_equal(np.asarray(of_ids.relevance[i]), expected, TOLERANCE)


@pytest.mark.parametrize("variant", lxt_oracle.VARIANTS)
@pytest.mark.parametrize("family", hf_flax.MODELS)
def test_flax_equals_torch(family, variant):
    """Two implementations of one network have one explanation."""
    (name,) = hf_models.FAMILIES[family].inputs
    name = name.replace("inputs_embeds", "input_ids")
    x = hf_models.inputs(family).get(name, token_ids())
    fn, params = hf_models.function(family, "eager")
    explain = jlrp.explain(fn, composite=variant)
    theirs = explain(params, {name: jnp.asarray(x)})
    flax_fn, flax_params = hf_flax.function(family)
    ours = jlrp.explain(flax_fn, composite=variant)(flax_params, jnp.asarray(x))
    assert_equal(np.asarray(ours.output), np.asarray(theirs.output), TOLERANCE)
    ours, theirs = np.asarray(ours.relevance), np.asarray(theirs.relevance[name])
    assert_equal(ours, theirs, TOLERANCE)
