"""What of real architectures jlrp covers: the 15 of DynamicLRP, at full size.

    python benchmarks/covered.py                          # all of them: some minutes
    python benchmarks/covered.py gpt2 mamba-130m --layers 2
    python benchmarks/covered.py --small                  # shrunk, random weights
    python benchmarks/covered.py --others                 # small models of all kinds
    python benchmarks/covered.py --markdown docs/coverage.md

No weights are needed: the models are traced on shapes alone (PyTorch's on its meta
device, through torchax). Each model runs in a process of its own. What there is to
recognise is counted by primitives, independently of jlrp's facts: exponentials that
are summed (softmaxes), square roots that depend on x (norms), contractions of one
active operand (affine) and of two (products), other nonlinear equations (activations).
`jax.vjp` is traced on the same jaxpr as the explanation.

Needs transformers 4.57, torch, torchax, keras.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from functools import partial

os.environ.setdefault("KERAS_BACKEND", "jax")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import jax
import jax.numpy as jnp
import numpy as np

MODELS = {}


@dataclass
class Model:
    """``fn(params, x)``, abstract or with numbers, and what of it is explained."""

    fn: object
    params: object
    x: object
    target: object = None


def model(name, source):
    def register(build):
        MODELS[name] = (source, build)
        return build

    return register


# The models. `full` is the real size on shapes; else small, with float64 weights.


def last_token(out):
    return out[:, -1].max(-1)


def all_tokens(out):
    return out.max(-1).sum(-1)


def array(full, *shape, dtype=None, high=None):
    if high is not None:
        if full:
            return jax.ShapeDtypeStruct(shape, jnp.int32)
        return jnp.asarray(np.random.default_rng(0).integers(2, high, shape), jnp.int32)
    if full:
        return jax.ShapeDtypeStruct(shape, jnp.float32)
    return jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float64)


def torch_model(full, build, output, x, target, *, prepare=None, **static):
    import torch

    from jlrp.integrations import torchax

    torchax.load()
    torch.manual_seed(0)
    with torch.device("meta" if full else "cpu"):
        module = build().eval()
    if prepare is not None:
        prepare(module)
    if not full:
        module = module.double()
        with torch.no_grad():  # biases start at zero, norms at one: draw them all
            for parameter in module.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
    fn, params = torchax.module(module, output=output, **static)
    return Model(fn, params, x, target)


def logits(out):
    return out.logits


def keras_model(full, build, x, target=None):
    import keras

    keras.config.set_floatx("float32" if full else "float64")
    keras.utils.set_random_seed(0)
    network = build()
    if not full:
        rng = np.random.default_rng(0)
        for v in network.variables:
            drawn = rng.uniform(0.5, 1.5, v.shape)
            if v.path.endswith("kernel"):
                drawn = np.array(v) + 0.01 * rng.normal(size=v.shape)
            v.assign(drawn)
    from jlrp.integrations import keras as integration

    fn, params = integration.model(network)
    if full:
        params = jax.tree.map(lambda v: jax.ShapeDtypeStruct(v.shape, v.dtype), params)
    return Model(fn, params, x, target)


def _auto(name, config):
    import transformers

    build = getattr(transformers, name)._from_config
    return partial(build, config, attn_implementation="eager")


@model("vgg16", "Keras")
def vgg16(full, layers):
    import keras

    shape, classes = ((224, 224, 3), 1000) if full else ((32, 32, 3), 10)
    return keras_model(
        full,
        lambda: keras.applications.VGG16(
            weights=None,
            input_shape=shape,
            classes=classes,
            classifier_activation=None,
        ),
        array(full, 1, *shape),
    )


@model("resnet-50", "HF, torchax")
def resnet50(full, layers):
    import transformers

    small = dict(embedding_size=8, hidden_sizes=[16, 24], depths=[2, 2], num_labels=10)
    config = transformers.ResNetConfig(**(dict(num_labels=1000) if full else small))
    size = 224 if full else 64
    return torch_model(
        full,
        _auto("ResNetForImageClassification", config),
        logits,
        array(full, 1, 3, size, size),
        None,
    )


@model("vit-b-16", "HF, torchax")
def vit(full, layers):
    import transformers

    small = dict(
        hidden_size=32, intermediate_size=64, num_attention_heads=4, image_size=32
    )
    config = transformers.ViTConfig(
        num_labels=1000,
        num_hidden_layers=layers or (12 if full else 2),
        **({} if full else small),
    )
    size = config.image_size
    return torch_model(
        full,
        _auto("ViTForImageClassification", config),
        logits,
        array(full, 1, 3, size, size),
        None,
    )


@model("efficientnet-v2-m", "Keras")
def efficientnet(full, layers):
    import keras

    size = 480 if full else 64
    return keras_model(
        full,
        lambda: (
            keras.applications.EfficientNetV2M if full else _small_efficientnet(keras)
        )(weights=None, input_shape=(size, size, 3), classifier_activation=None),
        array(full, 1, size, size, 3),
    )


def _small_efficientnet(keras):
    from keras.src.applications import efficientnet_v2 as module

    blocks = [dict(b) for b in module.DEFAULT_BLOCKS_ARGS["efficientnetv2-m"]]
    for block in blocks:
        block.update(num_repeat=min(block["num_repeat"], 2))
        block.update(input_filters=8, output_filters=8)
    return lambda **kwargs: module.EfficientNetV2(
        width_coefficient=1.0,
        depth_coefficient=1.0,
        default_size=64,
        blocks_args=blocks,
        name="small",
        include_top=True,
        classes=10,
        **kwargs,
    )


@model("siglip2-so400m", "HF, torchax")
def siglip(full, layers):
    import transformers

    big = dict(hidden_size=1152, intermediate_size=4304, num_attention_heads=16)
    small = dict(hidden_size=32, intermediate_size=64, num_attention_heads=4)
    sizes = big if full else small
    sizes["num_hidden_layers"] = layers or (27 if full else 2)
    size, patch, vocabulary = (384, 14, 256000) if full else (28, 14, 100)
    config = transformers.SiglipConfig(
        text_config=dict(
            vocab_size=vocabulary,
            max_position_embeddings=64,
            projection_size=sizes["hidden_size"],
            **sizes,
        ),
        vision_config=dict(image_size=size, patch_size=patch, **sizes),
    )
    x = dict(
        input_ids=array(full, 1, 64, high=vocabulary),
        pixel_values=array(full, 1, 3, size, size),
    )
    return torch_model(
        full,
        _auto("SiglipModel", config),
        lambda out: out.logits_per_image,
        x,
        lambda out: out[:, 0],
    )


@model("wav2vec2-xls-r-300m", "HF, torchax")
def wav2vec2(full, layers):
    import torch
    import transformers

    big = dict(hidden_size=1024, intermediate_size=4096, num_attention_heads=16)
    small = dict(
        hidden_size=32,
        intermediate_size=64,
        num_attention_heads=4,
        conv_dim=(16,) * 7,
        num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=4,
    )
    config = transformers.Wav2Vec2Config(
        num_hidden_layers=layers or (24 if full else 2),
        feat_extract_norm="layer",
        conv_bias=True,
        do_stable_layer_norm=True,
        **(big if full else small),
    )

    def fold(module):  # weight norm's parametrisation does not trace
        conv = module.wav2vec2.encoder.pos_conv_embed.conv
        torch.nn.utils.parametrize.remove_parametrizations(conv, "weight")

    return torch_model(
        full,
        _auto("Wav2Vec2ForCTC", config),
        logits,
        array(full, 1, 16000 if full else 2000),
        all_tokens,
        prepare=fold,
    )


@model("whisper-small", "HF, torchax")
def whisper(full, layers):
    import transformers

    n, width = (12, 768) if full else (2, 32)
    n = layers or n
    frames = 1500 if full else 20
    config = transformers.WhisperConfig(
        d_model=width,
        encoder_layers=n,
        decoder_layers=n,
        encoder_attention_heads=12 if full else 4,
        decoder_attention_heads=12 if full else 4,
        encoder_ffn_dim=4 * width,
        decoder_ffn_dim=4 * width,
        vocab_size=51865 if full else 100,
        max_source_positions=frames,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
        decoder_start_token_id=1,
    )
    x = dict(
        input_features=array(full, 1, 80, 2 * frames),
        decoder_input_ids=array(full, 1, 16, high=config.vocab_size),
    )
    return torch_model(
        full,
        _auto("WhisperForConditionalGeneration", config),
        logits,
        x,
        last_token,
        use_cache=False,
    )


@model("gpt2", "HF, torchax")
def gpt2(full, layers):
    import transformers

    config = transformers.GPT2Config(
        n_layer=layers or (12 if full else 2),
        **({} if full else dict(n_embd=32, n_head=4, vocab_size=100)),
    )
    return torch_model(
        full,
        _auto("GPT2LMHeadModel", config),
        logits,
        dict(input_ids=array(full, 1, 16, high=config.vocab_size)),
        last_token,
        use_cache=False,
    )


@model("roberta-large", "HF, torchax")
def roberta(full, layers):
    import transformers

    big = dict(
        hidden_size=1024,
        intermediate_size=4096,
        num_attention_heads=16,
        vocab_size=50265,
    )
    small = dict(
        hidden_size=32, intermediate_size=64, num_attention_heads=4, vocab_size=100
    )
    config = transformers.RobertaConfig(
        num_hidden_layers=layers or (24 if full else 2),
        max_position_embeddings=514,
        type_vocab_size=1,
        **(big if full else small),
    )
    return torch_model(
        full,
        _auto("RobertaForSequenceClassification", config),
        logits,
        dict(input_ids=array(full, 1, 16, high=config.vocab_size)),
        None,
    )


def decoder(name, full, layers, big, small, *, masks=None, **more):
    """A causal decoder of embeddings."""
    import transformers

    sizes = dict(big if full else small)
    sizes["num_hidden_layers"] = layers or sizes.get("num_hidden_layers", 2)
    kind = "Gemma3Text" if name == "Gemma3" else name
    config = getattr(transformers, f"{kind}Config")(**sizes, **more)
    return torch_model(
        full,
        _auto(f"{name}ForCausalLM", config),
        logits,
        dict(inputs_embeds=array(full, 1, 16, config.hidden_size)),
        last_token,
        use_cache=False,
        **({} if masks is None else dict(attention_mask=masks)),
    )


SMALL = dict(
    hidden_size=32,
    intermediate_size=64,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    vocab_size=100,
)


@model("llama-3.2-1b", "HF, torchax")
def llama(full, layers):
    big = dict(
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        vocab_size=128256,
        max_position_embeddings=131072,
    )
    scaling = dict(
        rope_type="llama3",
        factor=32.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=8192,
    )
    return decoder(
        "Llama",
        full,
        layers,
        big,
        SMALL,
        rope_scaling=scaling,
        rope_theta=500000.0,
        tie_word_embeddings=True,
    )


@model("gemma-3-270m", "HF, torchax")
def gemma(full, layers):
    big = dict(
        hidden_size=640,
        intermediate_size=2048,
        num_hidden_layers=18,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=256,
        vocab_size=262144,
        sliding_window=512,
        query_pre_attn_scalar=256,
    )
    # torchax cannot make the sliding window's mask in 32 bits; of 16 tokens it is
    # causal like the other
    mask = np.triu(np.full((1, 1, 16, 16), -1e30, np.float32), 1)
    masks = dict(full_attention=mask, sliding_attention=mask)
    return decoder("Gemma3", full, layers, big, SMALL, masks=masks)


@model("qwen3-0.6b", "HF, torchax")
def qwen3(full, layers):
    big = dict(
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=151936,
    )
    return decoder("Qwen3", full, layers, big, SMALL, tie_word_embeddings=True)


@model("flan-t5-large", "HF, torchax")
def flan_t5(full, layers):
    import transformers

    big = dict(d_model=1024, d_kv=64, d_ff=2816, num_heads=16)
    small = dict(d_model=32, d_kv=8, d_ff=64, num_heads=4, vocab_size=100)
    config = transformers.T5Config(
        num_layers=layers or (24 if full else 2),
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        **(big if full else small),
    )
    x = dict(
        inputs_embeds=array(full, 1, 16, config.d_model),
        decoder_inputs_embeds=array(full, 1, 8, config.d_model),
    )
    return torch_model(
        full,
        _auto("T5ForConditionalGeneration", config),
        logits,
        x,
        last_token,
        use_cache=False,
    )


@model("deplot", "HF, torchax")
def deplot(full, layers):
    import transformers

    n = layers or (12 if full else 2)
    small = dict(hidden_size=32, d_ff=64, d_kv=8, seq_len=64)
    text = dict(num_heads=4, vocab_size=100)
    vision = dict(num_attention_heads=4, patch_embed_hidden_size=48)
    config = transformers.Pix2StructConfig(
        text_config=dict(num_layers=n, **({} if full else {**small, **text})),
        vision_config=dict(
            num_hidden_layers=n, **({} if full else {**small, **vision})
        ),
    )
    if full:
        patches = array(True, 1, 2048, 770)
    else:
        patches = array(False, 1, 9, 50)
        ids = jnp.stack(jnp.meshgrid(jnp.arange(3), jnp.arange(3)), -1)
        patches = patches.at[0, :, :2].set(ids.reshape(9, 2) + 1.0)
    vocabulary = config.text_config.vocab_size
    x = dict(
        flattened_patches=patches,
        decoder_input_ids=array(full, 1, 16, high=vocabulary),
    )
    return torch_model(
        full,
        _auto("Pix2StructForConditionalGeneration", config),
        logits,
        x,
        last_token,
        use_cache=False,
    )


@model("mamba-130m", "HF, torchax")
def mamba(full, layers):
    import transformers

    config = transformers.MambaConfig(
        num_hidden_layers=layers or (24 if full else 2),
        **({} if full else dict(hidden_size=16, state_size=4, vocab_size=100)),
    )
    return torch_model(
        full,
        _auto("MambaForCausalLM", config),
        logits,
        dict(inputs_embeds=array(full, 1, 16 if full else 6, config.hidden_size)),
        last_token,
        use_cache=False,
    )


# Counting.

NONLINEAR = set(
    "abs acos acosh asin asinh atan atan2 atanh cbrt ceil clamp cos cosh digamma erf "
    "erf_inv erfc exp exp2 expm1 floor integer_pow lgamma log log1p logistic max min "
    "pow rem round rsqrt sign sin sinh sqrt square tan tanh".split()
)
MOVEMENT = set(
    "broadcast_in_dim reshape transpose convert_element_type copy squeeze slice "
    "expand_dims".split()
)


def recursive(jaxpr):
    """Equations of a jaxpr and of all that it holds, calls not counted."""
    total = 0
    for eqn in jaxpr.eqns:
        inner = [
            getattr(leaf, "jaxpr", leaf)
            for leaf in jax.tree.leaves(
                list(eqn.params.values()), is_leaf=lambda v: hasattr(v, "eqns")
            )
            if hasattr(leaf, "eqns") or hasattr(getattr(leaf, "jaxpr", None), "eqns")
        ]
        total += sum(map(recursive, inner)) + (not inner)
    return total


def composites(plan, found=None):
    """``{what: [recognised, of]}``, and the equations missed."""
    found = found or {"missed": Counter(), "kinds": Counter()}
    program = plan.program
    inside = {}
    for step in plan.steps:
        found["kinds"][step.operation.kind] += 1
        for equation in step.operation.equations:
            inside.setdefault(equation, []).append(step.operation)

    def count(what, good, equation):
        pair = found.setdefault(what, [0, 0])
        pair[0] += bool(good)
        pair[1] += 1
        if not good:
            kinds = ",".join(o.kind for o in inside.get(equation, ())) or "held"
            found["missed"][f"{what}: {equation.primitive.name} ({kinds})"] += 1

    def kinds(equation):
        return {o.kind for o in inside.get(equation, ())}

    def is_averaged(equation):  # weights of a softmax that is summed step by step
        uses = program.uses.get(equation.outputs[0], ())
        facts = {f for use in uses for o in inside.get(use, ()) for f in o.facts}
        return "attention" in facts

    for equation in program.equations:
        if not any(map(program.is_active, equation.outputs)):
            continue
        name = equation.primitive.name
        active = [program.is_active(a) for a in equation.inputs]
        if name == "exp" and _is_summed(program, equation):
            good = "softmax" in kinds(equation) or is_averaged(equation)
            count("softmax", good, equation)
        elif name in ("rsqrt", "sqrt"):
            held = not kinds(equation)
            count("norm", held, equation)
        elif name in ("dot_general", "conv_general_dilated"):
            if not kinds(equation):
                continue  # of what is held constant
            if sum(active) == 1:
                good = kinds(equation) <= {"dense", "conv"}
                count("affine", good, equation)
            else:
                good = kinds(equation) <= {"product", "attention", "gate"}
                count("products", good, equation)
        elif name in NONLINEAR and inside.get(equation):
            binary = sum(active) > 1
            if not binary:
                good = kinds(equation) <= {"activation", "softmax"}
                count("activations", good, equation)
    for step in plan.steps:
        for body in step.bodies[-1:]:
            composites(body, found)
    return found


def _is_summed(program, equation):
    """Whether what an equation makes reaches a sum through movement alone."""
    stack = list(equation.outputs)
    while stack:
        for use in program.uses.get(stack.pop(), ()):
            if use.primitive.name == "reduce_sum":
                return True
            if use.primitive.name in MOVEMENT:
                stack.extend(use.outputs)
    return False


# Measuring.


def timed(fn):
    start = time.perf_counter()
    found = fn()
    return found, time.perf_counter() - start


def measure(name, composite, layers):
    """One model at full size, on shapes: a row of the table."""
    import jlrp
    from jlrp.options import Options
    from jlrp.plan import targets
    from jlrp.request import Request

    source, build = MODELS[name]
    m, build_time = timed(lambda: build(True, layers))
    row = dict(model=name, source=source, build_s=build_time)
    closed, row["trace_s"] = timed(lambda: jax.make_jaxpr(m.fn)(m.params, m.x))
    row["equations"] = recursive(closed.jaxpr)
    shapes = jax.tree.leaves((m.params, m.x))
    out_tree = jax.tree.structure(jax.eval_shape(m.fn, m.params, m.x))

    def ready(params, x):  # the jaxpr itself as the function
        leaves = jax.tree.leaves((params, x))
        out = jax.core.eval_jaxpr(closed.jaxpr, closed.consts, *leaves)
        return jax.tree.unflatten(out_tree, out)

    options = Options(composite=composite, target=m.target)
    request, row["retrace_s"] = timed(lambda: Request(ready, m.params, m.x, options))
    plan, row["plan_s"] = timed(lambda: request.plan(strict=False))
    covered = coverage(plan)
    row["active"] = len(covered.equations)
    row["covered"] = covered.covered
    row["fallback"] = covered.fallback
    row["uncovered"] = covered.uncovered
    row["gaps"] = gaps(covered)
    found = composites(plan)
    row["missed"] = found.pop("missed")
    row["kinds"] = found.pop("kinds")
    row["recognised"] = found

    def both_passes(*leaves):
        return request.run(plan, leaves, {}).relevance()

    if not covered.uncovered:
        _, row["run_s"] = timed(lambda: jax.make_jaxpr(both_passes)(*shapes))

    gradient = partial(_gradient, targets.scored(ready, m.target))
    _, row["vjp_s"] = timed(lambda: jax.make_jaxpr(gradient)(m.params, m.x))
    try:
        r, row["end_to_end_s"] = timed(
            lambda: jax.eval_shape(
                lambda p, x: jlrp.relevance(
                    m.fn, p, x, target=m.target, composite=composite
                ),
                m.params,
                m.x,
            )
        )
        same = jax.tree.map(lambda a, b: a.shape == b.shape, r, m.x)
        row["end_to_end"] = "yes" if all(jax.tree.leaves(same)) else "wrong shapes"
    except Exception as error:  # what the table is for
        row["end_to_end"] = f"{type(error).__name__}: {error}"[:2000]
    return row


def _gradient(scored, params, x):
    """Of the score, for the floats of x and the tables that its ids look up."""
    named, tree = jax.tree_util.tree_flatten_with_path((params, x))
    leaves = [leaf for _, leaf in named]
    n_params = len(jax.tree.leaves(params))
    ids = not all(map(_is_float, leaves[n_params:]))
    chosen = [
        i
        for i, (path, leaf) in enumerate(named)
        if (i >= n_params and _is_float(leaf))
        or (ids and any(t in jax.tree_util.keystr(path) for t in TABLES))
    ]

    def score(floats):
        for i, leaf in zip(chosen, floats, strict=True):
            leaves[i] = leaf
        score, _ = scored(*jax.tree.unflatten(tree, leaves))
        return sum(jnp.sum(s.max(-1)) if s.ndim else s for s in jax.tree.leaves(score))

    out, pull = jax.vjp(score, [leaves[i] for i in chosen])
    return pull(jnp.ones_like(out))


TABLES = ("wte", "word_embeddings", "embed_tokens", "token_embedding")


def _is_float(leaf):
    return jnp.issubdtype(leaf.dtype, jnp.floating)


def shrunk(name, composite, layers):
    """A small version with random float64 weights: does the ledger close?"""
    import jlrp

    jax.config.update("jax_enable_x64", True)
    source, build = MODELS[name]
    m = build(False, layers)
    row = ledger_row(m, composite)
    r = jlrp.relevance(m.fn, m.params, m.x, target=m.target, composite=composite)
    leaves = jax.tree.leaves(r)
    row["relevance"] = sum(float(leaf.sum()) for leaf in leaves)
    row["finite"] = all(bool(jnp.isfinite(leaf).all()) for leaf in leaves)
    return dict(model=name, source=source, **row)


def to_float32(m):
    """Where a float64 model itself makes float32 of its numbers: scope and line."""
    return list(_casts_of(planned(m, "attnlrp")))


def _casts_of(plan):
    program = plan.program
    for e in program.equations:
        types = [v.dtype for v in (*e.inputs, *e.outputs)]
        casts = e.primitive.name == "convert_element_type"
        if casts and types == [np.float64, np.float32]:
            if any(map(program.is_active, e.outputs)):
                yield e.where()
    for step in plan.steps:
        for body in step.bodies[-1:]:
            yield from _casts_of(body)


def measure_other(name):
    """One of the models of ``others.py``: a row of its table."""
    jax.config.update("jax_enable_x64", True)
    source, transformer, build = OTHERS()[name]
    row = dict(model=name, source=source)
    try:
        m = Model(*build())
        closed = jax.make_jaxpr(m.fn)(m.params, m.x)
    except Exception as error:  # of the framework: jlrp has not seen it
        return row | dict(untraced=f"{type(error).__name__}: {error}"[:200])
    row["equations"] = recursive(closed.jaxpr)
    composites_of = ("auto", "attnlrp") if transformer else ("auto",)
    row["gaps"], row["missed"] = [], {}
    for composite in composites_of:
        plan = planned(m, composite)
        covered = coverage(plan)
        row |= dict(
            active=len(covered.equations),
            covered=covered.covered,
            fallback=row.get("fallback", 0) + covered.fallback,
            uncovered=row.get("uncovered", 0) + covered.uncovered,
        )
        row["gaps"] += gaps(covered)
    found = composites(planned(m, "attnlrp"))
    row["missed"] = found.pop("missed")
    found.pop("kinds")
    row["recognised"] = found
    row["composite"] = composites_of[-1]
    return row | ledger_row(m, composites_of[-1])


def planned(m, composite):
    from jlrp.options import Options
    from jlrp.request import Request

    options = Options(composite=composite, target=m.target)
    return Request(m.fn, m.params, m.x, options).plan(strict=False)


def coverage(plan):
    from jlrp.reports.inspection import coverage

    return coverage(plan)


def gaps(covered):
    return Counter(
        f"{e.primitive} [{e.status} {e.by}] {e.where}"
        for e in covered.equations
        if e.status != "covered"
    ).most_common(20)


def ledger_row(m, composite):
    import jlrp

    ledger = jlrp.audit(m.fn, m.params, m.x, target=m.target, composite=composite)
    worst = max(ledger.rows, key=lambda row: abs(row.unexplained))
    unexplained = ledger.unexplained / abs(ledger.seed)
    casts = to_float32(m)
    bar = 1e-6 if casts else 1e-8
    return dict(
        # A sum of relevance that is a number is one of numbers.
        finite=bool(np.isfinite(ledger.relevance)) and not ledger.nonfinite,
        seed=ledger.seed,
        relevance=ledger.relevance,
        unexplained=unexplained,
        bar=bar,
        casts=len(casts),
        cast_at=casts[0] if casts else "",
        within=bool(unexplained <= bar),
        worst=f"{worst.kind} {worst.scope} {worst.rule}",
        nonfinite=list(ledger.nonfinite),
    )


def OTHERS():
    import others
    import others_jax  # noqa: F401  (adds to the same table)

    return others.OTHERS


# Tables.


def of(pair):
    return "-" if pair is None else f"{pair[0]}/{pair[1]}"


WHAT = ("softmax", "norm", "affine", "products", "activations")
FULL = ("model", "source", "equations", "active", "exact", "fallback", "uncovered")
FULL += ("softmaxes", "norms", "affine", "products", "activations", "end to end")
FULL += ("trace s", "plan s", "both passes s", "vjp s")
SHRUNK = ("model", "relevance / seed", "finite", "unexplained / seed", "bar", "within")
SHRUNK += ("casts to float32",)
OTHER = ("model", "source", "equations", "active", "exact", "fallback", "uncovered")
OTHER += ("softmaxes", "norms", "affine", "products", "activations")
OTHER += ("ledger of", "unexplained / seed", "casts to float32")


def full_cells(row):
    if "error" in row:
        return [row["model"], row["source"], row["error"].splitlines()[-1][:200]]
    keys = ("model", "source", "equations", "active", "covered", "fallback")
    counts = [row[key] for key in (*keys, "uncovered")]
    recognised = [of(row["recognised"].get(what)) for what in WHAT]
    end = row["end_to_end"] if row["end_to_end"] == "yes" else "no"
    times = [row.get(f"{key}_s", 0.0) for key in ("trace", "plan", "run", "vjp")]
    return [*map(str, counts), *recognised, end, *(f"{t:.2f}" for t in times)]


def shrunk_cells(row):
    if "error" in row:
        return [row["model"], row["error"].splitlines()[-1][:200]]
    return [
        row["model"],
        f"{row['relevance']:.5g} / {row['seed']:.5g}",
        "yes" if row["finite"] else "no",
        f"{row['unexplained']:.1e}",
        f"{row['bar']:.0e}",
        "yes" if row["within"] else "no",
        casts(row),
    ]


def other_cells(row):
    if "error" in row or "untraced" in row:
        why = row.get("error") or f"not traced by its framework: {row['untraced']}"
        return [row["model"], row["source"], why.splitlines()[0][:90]]
    keys = ("equations", "active", "covered", "fallback", "uncovered")
    cells = [row["model"], row["source"], *(str(row[key]) for key in keys)]
    cells += [of(row["recognised"].get(what)) for what in WHAT]
    within = f"{row['unexplained']:.1e}" + ("" if row["within"] else " (too much)")
    return [*cells, row["composite"], within, casts(row)]


def casts(row):
    """How often a model casts to float32, and in which module first."""
    if not row["casts"]:
        return "-"
    return f"{row['casts']}, first in `{row['cast_at'].split(' ')[0]}`"


def complaints(row):
    """What is not as it should be, in words."""
    name = row["model"]
    if "error" in row:
        return [f"{name}: {row['error']}"]
    found = [f"{name}: {n} x {what}" for what, n in row.get("gaps", ())]
    found += [f"{name}: missed {n} x {w}" for w, n in row.get("missed", {}).items()]
    if row.get("end_to_end", "yes") != "yes":
        found.append(f"{name}: {row['end_to_end']}")
    if not row.get("within", True) or not row.get("finite", True):
        found.append(f"{name}: worst at {row['worst']}")
    return found


def as_markdown(header, rows):
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    padded = (cells + [""] * (len(header) - len(cells)) for cells in rows)
    return "\n".join(lines + ["| " + " | ".join(cells) + " |" for cells in padded])


def as_text(header, rows):
    rows = [
        list(header),
        *(cells + [""] * (len(header) - len(cells)) for cells in rows),
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    return "\n".join(
        "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


PAGE = """# Coverage of real architectures

Written by `python benchmarks/covered.py --markdown docs/coverage.md` with composite
`{composite}`, {versions}. Models are random or abstract: no weights are needed.

## Full size, on shapes

{full}

*Equations*: of the traced program, those of calls and loops included. *Active*: those
of them that lie between what is explained and x, dead ones removed. *Exact*: by the
exact rule of their kind, or held constant by one (what computes a norm's statistic, a
softmax's shift). The next columns are recognised / there: softmaxes (exponentials that
are summed), norms (square roots that depend on x), affine maps (dots and convolutions
of one active operand), products (dots of two), activations (the other nonlinear
equations). *End to end*: `jlrp.relevance` traced by `jax.eval_shape`, from the model
to relevance in the shape of x. Seconds on one shared CPU: tracing the model; annotating
it, assigning the rules, planning; tracing both passes of the explanation; tracing
`jax.vjp` of the same jaxpr, to compare with the two before it.

## Shrunk, with random float64 weights

{shrunk}

*Unexplained*: the largest amount of any operation that the ledger of `jlrp.audit`
cannot name a cause for, over the explained score. The bar is 1e-8, or 1e-6 where the
model itself casts to float32: *casts to float32* are the equations of its float64
program, on paths of relevance, that do so (softmaxes and RMS norms of Hugging Face's
PyTorch models, batch norms of Keras).

## Others

Models that jlrp was not made with, small, with random float64 weights: of transformers
(PyTorch through torchax, and Flax), Keras, Haiku, Equinox, Flax, plain JAX
(`benchmarks/others.py`, `others_jax.py`). Counts are those of `auto` and, of
transformers, of `attnlrp` too. Where a framework does not trace a model, jlrp has not
seen it: most of these choose shapes by the numbers in their input.

{others}
{complaints}"""


def versions():
    from importlib.metadata import version

    names = ("jax", "transformers", "torch", "torchax", "keras")
    packages = ", ".join(f"{name} {version(name)}" for name in names)
    return f"Python {platform.python_version()}, {packages}"


def in_a_process(name, arguments):
    """One model's row, or its error, from a process of its own."""
    command = [sys.executable, os.path.abspath(__file__), name, "--json", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    errors = [line for line in lines if "Error" in line.split(":")[0]]
    error = (errors or lines or [f"exit status {done.returncode}"])[-1]
    source = MODELS[name][0] if name in MODELS else OTHERS()[name][0]
    return dict(model=name, source=source, error=error)


def in_this_process(name):
    """One of the others: small, so that to import their frameworks takes longest."""
    try:
        return measure_other(name)
    except Exception as error:
        text = f"{type(error).__name__}: {error}"[:500]
        return dict(model=name, source=OTHERS()[name][0], error=text)
    finally:
        jax.clear_caches()


class Rows:
    """Rows measured before, in a file: a run that was stopped goes on."""

    def __init__(self, file):
        self.file, self.known = file, {}
        if file and os.path.exists(file):
            for line in open(file):
                what, row = json.loads(line)
                self.known[what, row["model"]] = row

    def get(self, what, name, measure):
        if (what, name) not in self.known:
            self.known[what, name] = row = measure()
            if self.file:
                with open(self.file, "a") as file:
                    file.write(json.dumps([what, row]) + "\n")
        return self.known[what, name]


TABLES_OF = {
    "full": (FULL, full_cells, []),
    "shrunk": (SHRUNK, shrunk_cells, ["--small"]),
    "others": (OTHER, other_cells, ["--others"]),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help=f"of {', '.join(MODELS)}")
    parser.add_argument("--composite", default="attnlrp")
    parser.add_argument("--layers", type=int, help="instead of the real number")
    parser.add_argument("--small", action="store_true", help="only the shrunk ones")
    parser.add_argument("--full", action="store_true", help="only the full ones")
    parser.add_argument("--others", action="store_true", help="only those of others.py")
    parser.add_argument("--markdown", metavar="FILE")
    parser.add_argument("--rows", metavar="FILE", help="keep rows here, and go on")
    parser.add_argument(
        "--json", action="store_true", help="one model, in this process"
    )
    parser.add_argument("--strict", action="store_true", help="complaints: status 1")
    args = parser.parse_args()
    names = args.names or list(OTHERS() if args.others else MODELS)
    if unknown := set(names) - set(OTHERS() if args.others else MODELS):
        parser.error(f"no model {', '.join(unknown)}; there are {', '.join(MODELS)}")
    if args.json:
        if args.others:
            row = measure_other(names[0])
        elif args.small:
            row = shrunk(names[0], args.composite, args.layers)
        else:
            row = measure(names[0], args.composite, args.layers)
        print(json.dumps(row))
        return
    passed = ["--composite", args.composite]
    passed += ["--layers", str(args.layers)] if args.layers else []
    asked = dict(full=args.full, shrunk=args.small, others=args.others)
    rows, tables, wrong = Rows(args.rows), {}, []
    for what, (header, cells, flags) in TABLES_OF.items():
        if any(asked.values()) and not asked[what]:
            continue
        of_table = names if args.names or what != "others" else list(OTHERS())
        found = []
        for name in of_table:
            run = partial(in_a_process, name, [*passed, *flags])
            run = run if flags != ["--others"] else partial(in_this_process, name)
            found.append(rows.get(what, name, run))
            print(*cells(found[-1]), sep="  ", file=sys.stderr, flush=True)
        wrong += [text for row in found for text in complaints(row)]
        tables[what] = (header, [cells(row) for row in found])
        print(as_text(*tables[what]), end="\n\n")
    print("\n".join(wrong or ["Nothing missed."]))
    if args.markdown:
        page = {what: as_markdown(*table) for what, table in tables.items()}
        listed = "".join(f"- {text}\n" for text in wrong)
        text = PAGE.format(
            composite=args.composite,
            versions=versions(),
            **{what: page.get(what, "Not run.") for what in TABLES_OF},
            complaints=f"\n## Open\n\n{listed}" if wrong else "",
        )
        with open(args.markdown, "w") as file:
            file.write(text)
    if args.strict and wrong:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
