"""Relevance of stored networks equals what LXT itself said of them."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from peers.compare import assert_equal

import jlrp

pytestmark = pytest.mark.relaxed

FOLDER = Path(__file__).with_name("golden")
FILES = {
    "llama": "lxt_llama_attnlrp",
    "bert": "lxt_bert_attnlrp",
    "gpt2": "lxt_gpt2_cplrp",
}
COMPOSITES = {"attnlrp": "attnlrp", "cplrp": "cp_lrp"}


def load(family):
    with np.load(FOLDER / f"{FILES[family]}.npz") as stored:
        arrays = dict(stored)
    meta = json.loads(str(arrays.pop("meta")))
    params = {
        name.removeprefix("param/").removeprefix("buffer:"): jnp.asarray(array)
        for name, array in arrays.items()
        if name.startswith("param/")
    }
    return params, arrays, meta


# The three networks in plain JAX, by the names and layouts of PyTorch. `lxt(f)` is the
# activation f as LXT sees it.


def exactly(f):
    return f


def with_offset(f):
    """LXT's f: in place of f(x)/x, its multiplier is f(x)/(x + 1e-10)."""
    return lambda x: x * jax.lax.stop_gradient(f(x) / (x + 1e-10))


def gelu(x):
    return jax.nn.gelu(x, approximate=False)


def gelu_new(x):
    inner = np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)
    return 0.5 * x * (1 + jnp.tanh(inner))


def linear(p, name, x):
    y = x @ p[f"{name}.weight"].T
    return y + p[f"{name}.bias"] if f"{name}.bias" in p else y


def layer_norm(p, name, x, epsilon):
    centred = x - x.mean(-1, keepdims=True)
    y = centred / jnp.sqrt((centred**2).mean(-1, keepdims=True) + epsilon)
    return y * p[f"{name}.weight"] + p[f"{name}.bias"]


def rms_norm(p, name, x, epsilon):
    return (
        p[f"{name}.weight"]
        * x
        * jax.lax.rsqrt((x**2).mean(-1, keepdims=True) + epsilon)
    )


def heads(x, number):
    return x.reshape(*x.shape[:-1], number, -1).swapaxes(-2, -3)


def attention(q, k, v, causal):
    scores = q @ k.swapaxes(-1, -2) / np.sqrt(q.shape[-1])
    if causal:
        scores = jnp.where(jnp.tri(q.shape[-2], dtype=bool), scores, -jnp.inf)
    y = (jax.nn.softmax(scores) @ v).swapaxes(-2, -3)
    return y.reshape(*y.shape[:-2], -1)


def rotated(x, frequencies):
    angles = jnp.arange(x.shape[-2])[:, None] * frequencies
    angles = jnp.concatenate([angles, angles], -1)
    left, right = jnp.split(x, 2, -1)
    turned = jnp.concatenate([-right, left], -1)
    return x * jnp.cos(angles) + turned * jnp.sin(angles)


def llama(p, x, config, lxt):
    epsilon, frequencies = config["rms_norm_eps"], p["model.rotary_emb.inv_freq"]
    n_heads, n_shared = config["num_attention_heads"], config["num_key_value_heads"]
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        y = rms_norm(p, f"{layer}.input_layernorm", x, epsilon)
        q = heads(linear(p, f"{layer}.self_attn.q_proj", y), n_heads)
        k = heads(linear(p, f"{layer}.self_attn.k_proj", y), n_shared)
        v = heads(linear(p, f"{layer}.self_attn.v_proj", y), n_shared)
        q, k = rotated(q, frequencies), rotated(k, frequencies)
        k, v = (jnp.repeat(a, n_heads // n_shared, -3) for a in (k, v))
        x = x + linear(p, f"{layer}.self_attn.o_proj", attention(q, k, v, True))
        y = rms_norm(p, f"{layer}.post_attention_layernorm", x, epsilon)
        gate = lxt(jax.nn.silu)(linear(p, f"{layer}.mlp.gate_proj", y))
        up = linear(p, f"{layer}.mlp.up_proj", y)
        x = x + linear(p, f"{layer}.mlp.down_proj", gate * up)
    return linear(p, "lm_head", rms_norm(p, "model.norm", x, epsilon))


def bert(p, x, config, lxt):
    epsilon, n_heads = config["layer_norm_eps"], config["num_attention_heads"]
    embeddings = "bert.embeddings"
    x = x + p[f"{embeddings}.position_embeddings.weight"][: x.shape[-2]]
    x = x + p[f"{embeddings}.token_type_embeddings.weight"][0]
    x = layer_norm(p, f"{embeddings}.LayerNorm", x, epsilon)
    for i in range(config["num_hidden_layers"]):
        layer = f"bert.encoder.layer.{i}"
        q, k, v = (
            heads(linear(p, f"{layer}.attention.self.{name}", x), n_heads)
            for name in ("query", "key", "value")
        )
        y = linear(p, f"{layer}.attention.output.dense", attention(q, k, v, False))
        x = layer_norm(p, f"{layer}.attention.output.LayerNorm", x + y, epsilon)
        y = linear(p, f"{layer}.intermediate.dense", x)
        y = linear(p, f"{layer}.output.dense", lxt(gelu)(y))
        x = layer_norm(p, f"{layer}.output.LayerNorm", x + y, epsilon)
    pooled = lxt(jnp.tanh)(linear(p, "bert.pooler.dense", x[..., 0, :]))
    return linear(p, "classifier", pooled)


def gpt2(p, x, config, lxt):
    epsilon, n_heads = config["layer_norm_epsilon"], config["n_head"]

    def conv1d(name, x):
        return x @ p[f"{name}.weight"] + p[f"{name}.bias"]

    x = x + p["transformer.wpe.weight"][: x.shape[-2]]
    for i in range(config["n_layer"]):
        layer = f"transformer.h.{i}"
        y = conv1d(f"{layer}.attn.c_attn", layer_norm(p, f"{layer}.ln_1", x, epsilon))
        q, k, v = (heads(part, n_heads) for part in jnp.split(y, 3, -1))
        x = x + conv1d(f"{layer}.attn.c_proj", attention(q, k, v, True))
        y = conv1d(f"{layer}.mlp.c_fc", layer_norm(p, f"{layer}.ln_2", x, epsilon))
        x = x + conv1d(f"{layer}.mlp.c_proj", lxt(gelu_new)(y))
    return linear(p, "lm_head", layer_norm(p, "transformer.ln_f", x, epsilon))


NETWORKS = {"llama": llama, "bert": bert, "gpt2": gpt2}


def target(scores):
    """The multiplier that the stored relevance starts with."""
    return jnp.asarray(scores["seed_relevance"] != 0, float)


# The offset is the largest difference between LXT and exact rules: 1e-10 / x.
TOLERANCES = {exactly: 3e-8, with_offset: 1e-9}


@pytest.mark.parametrize("lxt", TOLERANCES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("family", FILES)
def test_plain_jax(family, lxt):
    params, stored, meta = load(family)

    def fn(params, x):
        return NETWORKS[family](params, x, meta["config"], lxt)

    x = jnp.asarray(stored["input"])
    explain = jlrp.explain(fn, composite=COMPOSITES[meta["variant"]])
    explanation = explain(params, x, target(stored))
    assert_equal(np.asarray(explanation.output), stored["output"], 1e-9)
    assert_equal(
        np.asarray(explanation.relevance), stored["relevance"], TOLERANCES[lxt]
    )


# The same weights in Hugging Face's models, which cast to float32 here and there.

MODELS = {
    "llama": "LlamaForCausalLM",
    "bert": "BertForSequenceClassification",
    "gpt2": "GPT2LMHeadModel",
}


def hugging_face(family, attention):
    from peers import hf_models

    params, stored, meta = load(family)
    kind = getattr(hf_models.transformers, MODELS[family])
    config = kind.config_class.from_dict(meta["config"])
    config._attn_implementation = attention
    model = kind(config).eval().double()
    model.load_state_dict(hf_models.tensors(params), strict=False)
    return model, stored, meta


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", FILES)
def test_torchax(family, attention):
    pytest.importorskip("torch")
    model, stored, meta = hugging_face(family, attention)
    from jlrp.integrations import torchax

    options = {} if family == "bert" else {"use_cache": False}
    fn, params = torchax.module(model, output=lambda out: out.logits, **options)
    explain = jlrp.explain(fn, composite=COMPOSITES[meta["variant"]])
    x = {"inputs_embeds": jnp.asarray(stored["input"])}
    explanation = explain(params, x, target(stored))
    assert_equal(np.asarray(explanation.output), stored["output"], 1e-5)
    relevance = np.asarray(explanation.relevance["inputs_embeds"])
    assert_equal(relevance, stored["relevance"], 1e-5)


@pytest.mark.parametrize("family", FILES)
def test_oracle(family):
    """The oracle of tests/test_parity_lxt.py says what LXT says."""
    pytest.importorskip("torch")
    model, stored, meta = hugging_face(family, "eager")
    model.requires_grad_(False)
    from peers import lxt_oracle, torch

    multiplier = torch.tensor(np.asarray(target(stored)))
    relevance = lxt_oracle.relevance(
        model,
        {"inputs_embeds": stored["input"]},
        lambda out: (out.logits * multiplier).sum(),
        COMPOSITES[meta["variant"]],
    )
    assert_equal(relevance["inputs_embeds"], stored["relevance"], 1e-5)
