"""Tiny random models of Hugging Face, and jlrp's relevance of them through torchax."""

import dataclasses
import functools
import types
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import jlrp
from jlrp.integrations import torchax
from peers import torch

pytest.importorskip("transformers")
try:
    torchax.load()
except jlrp.errors.IntegrationError as error:
    pytest.skip(str(error), allow_module_level=True)

import transformers  # noqa: E402

transformers.logging.set_verbosity_error()

BATCH, TOKENS, HIDDEN, VOCABULARY = 2, 6, 32, 40


def last_token(out):
    """The largest logit of the last position: what a language model says next."""
    return out.logits[:, -1].amax(-1)


def largest(out):
    return out.logits.amax(-1)


@dataclasses.dataclass(frozen=True)
class Family:
    """How a family's smallest model is made, and what of it is explained."""

    model: str
    config: dict[str, Any]
    score: Callable[[Any], Any] = last_token
    inputs: tuple[str, ...] = ("inputs_embeds",)
    attention: tuple[str, ...] = ("eager", "sdpa")
    arguments: dict[str, Any] = dataclasses.field(default_factory=dict)


_SIZES = dict(
    hidden_size=HIDDEN,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
)
_ENCODER = dict(
    vocab_size=VOCABULARY, max_position_embeddings=64, num_labels=3, **_SIZES
)
_DECODER = dict(
    vocab_size=VOCABULARY,
    max_position_embeddings=64,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    tie_word_embeddings=False,
    **_SIZES,
)
_GROUPED = dict(num_key_value_heads=2, **_DECODER)
_DISTIL = dict(
    vocab_size=VOCABULARY,
    max_position_embeddings=64,
    dim=HIDDEN,
    hidden_dim=48,
    n_layers=2,
    n_heads=4,
    num_labels=3,
)
_GPT2 = dict(vocab_size=VOCABULARY, n_positions=64, n_embd=HIDDEN, n_layer=2, n_head=4)
_T5 = dict(
    vocab_size=VOCABULARY,
    d_model=HIDDEN,
    d_kv=8,
    d_ff=48,
    num_layers=2,
    num_heads=4,
    relative_attention_num_buckets=8,
    relative_attention_max_distance=16,
)
_DEBERTA = dict(
    _ENCODER,
    relative_attention=True,
    position_buckets=4,
    norm_rel_ebd="layer_norm",
    share_att_key=True,
    pos_att_type=["p2c", "c2p"],
)
_EXPERTS = dict(num_experts_per_tok=2, **_GROUPED)
_MAMBA = dict(
    vocab_size=VOCABULARY,
    hidden_size=HIDDEN,
    state_size=4,
    num_hidden_layers=2,
    expand=2,
    conv_kernel=3,
    time_step_rank=4,
)
_BART = dict(
    vocab_size=VOCABULARY,
    d_model=HIDDEN,
    encoder_layers=2,
    decoder_layers=2,
    encoder_attention_heads=4,
    decoder_attention_heads=4,
    encoder_ffn_dim=48,
    decoder_ffn_dim=48,
    max_position_embeddings=64,
)
_IMAGES = dict(image_size=8, patch_size=2, num_channels=3, num_labels=3)
_BOTH = ("inputs_embeds", "decoder_inputs_embeds")
_NO_CACHE = {"use_cache": False}


def _decoder(model, config, **options):
    return Family(model, config, arguments=_NO_CACHE, **options)


FAMILIES = {
    "llama": _decoder("LlamaForCausalLM", _GROUPED | {"attention_bias": True}),
    "gemma3": _decoder(
        "Gemma3ForCausalLM",
        _GROUPED
        | dict(
            head_dim=8,
            sliding_window=4,
            query_pre_attn_scalar=8,
            layer_types=["sliding_attention", "full_attention"],
            final_logit_softcapping=5.0,
        ),
    ),
    "gemma2": _decoder(
        "Gemma2ForCausalLM",
        _GROUPED | dict(head_dim=8, sliding_window=4, attn_logit_softcapping=2.0),
        attention=("eager",),
    ),
    "qwen2": _decoder("Qwen2ForCausalLM", _GROUPED),
    "qwen3": _decoder("Qwen3ForCausalLM", _GROUPED | {"head_dim": 8}),
    "mistral": _decoder("MistralForCausalLM", _GROUPED | {"sliding_window": 3}),
    "phi": _decoder("PhiForCausalLM", _DECODER),
    "phi3": _decoder("Phi3ForCausalLM", _GROUPED),
    "gpt2": _decoder("GPT2LMHeadModel", _GPT2),
    "mixtral": _decoder("MixtralForCausalLM", _EXPERTS | {"num_local_experts": 4}),
    "qwen3_moe": _decoder(
        "Qwen3MoeForCausalLM",
        _EXPERTS
        | dict(
            head_dim=8, num_experts=4, moe_intermediate_size=24, norm_topk_prob=True
        ),
    ),
    "mamba": _decoder("MambaForCausalLM", _MAMBA, attention=("eager",)),
    "t5": _decoder(
        "T5ForConditionalGeneration", _T5, inputs=_BOTH, attention=("eager",)
    ),
    "flan_t5": _decoder(
        "T5ForConditionalGeneration",
        _T5 | {"feed_forward_proj": "gated-gelu"},
        inputs=_BOTH,
        attention=("eager",),
    ),
    "bart": _decoder(
        "BartForConditionalGeneration", _BART, inputs=_BOTH, attention=("sdpa",)
    ),
    "modernbert": Family(
        "ModernBertForSequenceClassification",
        _ENCODER | dict(pad_token_id=0, reference_compile=False),
        largest,
        attention=("sdpa",),
    ),
    "xlnet": Family(
        "XLNetForSequenceClassification",
        dict(
            vocab_size=VOCABULARY,
            d_model=HIDDEN,
            n_layer=2,
            n_head=4,
            d_inner=48,
            num_labels=3,
        ),
        largest,
        attention=("eager",),
    ),
    "bert": Family("BertForSequenceClassification", _ENCODER, largest),
    "distilbert": Family("DistilBertForSequenceClassification", _DISTIL, largest),
    "roberta": Family("RobertaForSequenceClassification", _ENCODER, largest),
    "deberta_v2": Family(
        "DebertaV2ForSequenceClassification", _DEBERTA, largest, attention=("eager",)
    ),
    "swinv2": Family(
        "Swinv2ForImageClassification",
        _IMAGES | dict(embed_dim=8, depths=[2, 1], num_heads=[2, 2], window_size=2),
        largest,
        inputs=("pixel_values",),
        attention=("eager",),
    ),
    "convnextv2": Family(
        "ConvNextV2ForImageClassification",
        _IMAGES | dict(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2),
        largest,
        inputs=("pixel_values",),
        attention=("eager",),
    ),
    "vit": Family(
        "ViTForImageClassification",
        dict(image_size=8, patch_size=4, num_labels=3, **_SIZES),
        largest,
        inputs=("pixel_values",),
    ),
}


@functools.cache
def build(family, attention):
    """A model in float64, its weights and visible biases random."""
    spec = FAMILIES[family]
    kind = getattr(transformers, spec.model)
    config = kind.config_class(**spec.config)
    config._attn_implementation = attention
    return randomised(kind(config))


def randomised(model, seed=0):
    numbers = torch.Generator().manual_seed(seed)
    model = model.eval().double()
    for name, parameter in model.named_parameters():
        if name.endswith("A_log"):
            continue
        noise = torch.randn(parameter.shape, generator=numbers, dtype=torch.float64)
        if parameter.ndim > 1:
            parameter.data = noise / parameter[0].numel() ** 0.5
        else:
            parameter.data += 0.3 * noise
    for block in model.modules():
        if hasattr(block, "experts"):
            block.forward = types.MethodType(_batched_experts, block)
    return model


def tensors(arrays):
    return {name: torch.tensor(np.asarray(array)) for name, array in arrays.items()}


def inputs(family, seed=1):
    spec = FAMILIES[family]
    numbers = np.random.default_rng(seed)
    shapes = {"pixel_values": (BATCH, 3, 8, 8)}
    return {
        name: numbers.normal(size=shapes.get(name, (BATCH, TOKENS, HIDDEN)))
        for name in spec.inputs
    }


def explain(family, attention, composite):
    """jlrp's relevance through torchax, a dict like x."""
    fn, params = function(family, attention)
    x = {name: jnp.asarray(v) for name, v in inputs(family).items()}
    result = jlrp.relevance(fn, params, x, composite=composite)
    return {name: np.asarray(v) for name, v in result.items()}


@functools.cache
def function(family, attention):
    spec = FAMILIES[family]
    model = build(family, attention)
    return torchax.module(model, output=spec.score, **spec.arguments)


def _batched_experts(block, hidden):
    """A mixture of experts as transformers 5 writes it ("batched_mm").

    Transformers 4 loops over the experts that were chosen, which depends on the data
    and cannot be traced.
    """
    flat = hidden.view(-1, hidden.shape[-1])
    logits = block.gate(flat)
    weights = torch.nn.functional.softmax(logits, dim=1, dtype=torch.float)
    weights, chosen = torch.topk(weights, block.top_k, dim=-1)
    weights = weights / weights.sum(dim=-1, keepdim=True)
    weights = weights.to(hidden.dtype)
    names = ("w1", "w3", "w2")
    if not hasattr(block.experts[0], "w1"):
        names = ("gate_proj", "up_proj", "down_proj")
    gate, up, down = (
        torch.stack([getattr(expert, name).weight for expert in block.experts])[chosen]
        for name in names
    )
    columns = flat[:, None, :, None]
    inner = block.experts[0].act_fn(gate @ columns) * (up @ columns)
    out = (down @ inner).squeeze(-1) * weights[..., None]
    return out.sum(1).view(hidden.shape), logits
