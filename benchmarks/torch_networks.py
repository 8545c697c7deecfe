"""The networks of networks.py in PyTorch, with the same weights.

VGG16 and ResNet-50 are written here, of modules that Zennit and Captum know, each used
once; the transformers are those of Hugging Face's transformers, without a download. A
network takes what its JAX twin takes, images as (batch, channels, height, width).
"""

from functools import partial

import numpy as np
import torch
import transformers  # noqa: F401  before libraries.py has a stub for torchvision
from llama import Llama
from networks import FEATURES, HEADS, RESNET_STAGES, VGG_STAGES

nn = torch.nn


class VGG16(nn.Module):
    """Flatten is a function: Captum has no rule for the module."""

    def __init__(self, side):
        super().__init__()
        layers, channels = [], 3
        for features, repeats in VGG_STAGES:
            for _ in range(repeats):
                layers += [nn.Conv2d(channels, features, 3, padding=1), nn.ReLU()]
                channels = features
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        sizes = (side * side * channels, 4096, 4096, 1000)
        dense = []
        for i in range(3):
            dense += [nn.Linear(sizes[i], sizes[i + 1]), nn.ReLU()]
        self.classifier = nn.Sequential(*dense[:-1])

    def forward(self, x):
        return self.classifier(torch.flatten(self.features(x), 1))


class Plus(nn.Module):
    """A sum as a module: for libraries that hook modules to be replaced."""

    def forward(self, a, b):
        return a + b


class Bottleneck(nn.Module):
    def __init__(self, channels, features, stride, plus):
        super().__init__()
        out = 4 * features
        self.conv1 = nn.Conv2d(channels, features, 1, bias=False)
        self.norm1, self.relu1 = nn.BatchNorm2d(features), nn.ReLU()
        self.conv2 = nn.Conv2d(features, features, 3, stride, 1, bias=False)
        self.norm2, self.relu2 = nn.BatchNorm2d(features), nn.ReLU()
        self.conv3 = nn.Conv2d(features, out, 1, bias=False)
        self.norm3 = nn.BatchNorm2d(out)
        self.skip = None
        if channels != out or stride != 1:
            conv = nn.Conv2d(channels, out, 1, stride, bias=False)
            self.skip = nn.Sequential(conv, nn.BatchNorm2d(out))
        self.plus, self.relu3 = plus(), nn.ReLU()

    def forward(self, x):
        y = self.relu1(self.norm1(self.conv1(x)))
        y = self.relu2(self.norm2(self.conv2(y)))
        y = self.norm3(self.conv3(y))
        x = x if self.skip is None else self.skip(x)
        return self.relu3(self.plus(x, y))


class ResNet50(nn.Module):
    """``plus`` makes the module of a residual sum."""

    def __init__(self, plus=Plus):
        super().__init__()
        self.conv = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.norm, self.relu = nn.BatchNorm2d(64), nn.ReLU()
        self.pool = nn.MaxPool2d(3, 2, 1)
        blocks, channels = [], 64
        for stage, (features, repeats) in enumerate(RESNET_STAGES):
            for block in range(repeats):
                stride = 2 if stage > 0 and block == 0 else 1
                blocks.append(Bottleneck(channels, features, stride, plus))
                channels = 4 * features
        self.blocks = nn.Sequential(*blocks)
        self.mean, self.dense = nn.AdaptiveAvgPool2d(1), nn.Linear(2048, 1000)

    def forward(self, x):
        x = self.blocks(self.pool(self.relu(self.norm(self.conv(x)))))
        return self.dense(torch.flatten(self.mean(x), 1))


# From parameters of JAX.


def vgg16(params, side):
    model = VGG16(side)
    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    for layer, values in zip(layers, params, strict=True):
        kernel = np.asarray(values["kernel"])
        if layer is model.classifier[0]:  # rows are (height, width, channel)
            kernel = kernel.reshape(side, side, -1, 4096).transpose(2, 0, 1, 3)
            kernel = kernel.reshape(-1, 4096)
        _set(layer, kernel, values["bias"])
    return _frozen(model)


def resnet50(params, plus=Plus):
    """Of Linen's variables."""
    model = ResNet50(plus)
    weights, statistics = params["params"], params["batch_stats"]
    _conv_norms(model, [("conv", "norm")], weights, statistics)
    for i, block in enumerate(model.blocks):
        name = f"_Bottleneck_{i}"
        layers = [(f"conv{k}", f"norm{k}") for k in (1, 2, 3)]
        layers += [] if block.skip is None else [("skip.0", "skip.1")]
        _conv_norms(block, layers, weights[name], statistics[name])
    _set(model.dense, *_dense(weights["Dense_0"]))
    return _frozen(model)


def _conv_norms(module, names, weights, statistics):
    for i, (conv, norm) in enumerate(names):
        _set(module.get_submodule(conv), weights[f"Conv_{i}"]["kernel"])
        norm, values = module.get_submodule(norm), weights[f"BatchNorm_{i}"]
        _set_norm(norm, values)
        _copy(norm.running_mean, statistics[f"BatchNorm_{i}"]["mean"])
        _copy(norm.running_var, statistics[f"BatchNorm_{i}"]["var"])


def llama(params, sizes=None):
    from transformers.models.llama import modeling_llama as hf

    sizes = sizes or Llama()
    config = hf.LlamaConfig(
        vocab_size=sizes.vocabulary,
        hidden_size=sizes.width,
        intermediate_size=sizes.hidden,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.kv_heads,
        rope_theta=sizes.rope_theta,
        rms_norm_eps=1e-6,
    )
    model = hf.LlamaForCausalLM(config)
    for layer, values in zip(model.model.layers, params["layers"], strict=True):
        attention, mlp = layer.self_attn, layer.mlp
        pairs = zip(
            ("query", "key", "value", "out", "gate", "up", "down"),
            (
                *(attention.q_proj, attention.k_proj, attention.v_proj),
                *(attention.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj),
            ),
            strict=True,
        )
        for name, linear in pairs:
            _set(linear, values[name]["kernel"])
        _copy(layer.input_layernorm.weight, values["attention_norm"]["scale"])
        _copy(layer.post_attention_layernorm.weight, values["ffn_norm"]["scale"])
    _copy(model.model.norm.weight, params["norm"]["scale"])
    _set(model.lm_head, params["head"]["kernel"])
    model = _frozen(model)
    return model, partial(_last_scores, model)


def gpt2(params):
    from transformers.models.gpt2 import modeling_gpt2 as hf

    params = params["params"]
    length = params["positions"].shape[0]
    config = hf.GPT2Config(
        n_embd=FEATURES, n_head=HEADS, n_layer=12, vocab_size=50257, n_positions=length
    )
    model = hf.GPT2LMHeadModel(config)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    _copy(model.transformer.wpe.weight, params["positions"])
    for i, layer in enumerate(model.transformer.h):
        attention = params[f"MultiHeadDotProductAttention_{i}"]
        parts = [attention[name] for name in ("query", "key", "value")]
        kernels = [np.asarray(p["kernel"]).reshape(FEATURES, -1) for p in parts]
        biases = [np.asarray(p["bias"]).reshape(-1) for p in parts]
        _copy(layer.attn.c_attn.weight, np.concatenate(kernels, 1))  # (in, out)
        _copy(layer.attn.c_attn.bias, np.concatenate(biases))
        out = attention["out"]
        _copy(layer.attn.c_proj.weight, np.asarray(out["kernel"]).reshape(-1, FEATURES))
        _copy(layer.attn.c_proj.bias, out["bias"])
        for k, linear in enumerate((layer.mlp.c_fc, layer.mlp.c_proj)):
            _copy(linear.weight, params[f"Dense_{2 * i + k}"]["kernel"])
            _copy(linear.bias, params[f"Dense_{2 * i + k}"]["bias"])
        for k, norm in enumerate((layer.ln_1, layer.ln_2)):
            _set_norm(norm, params[f"LayerNorm_{2 * i + k}"])
    _set_norm(model.transformer.ln_f, params["LayerNorm_24"])
    _set(model.lm_head, params["Dense_24"]["kernel"])
    model = _frozen(model)
    return model, partial(_last_scores, model)


def bert(params):
    from transformers.models.bert import modeling_bert as hf

    params = params["params"]
    config = hf.BertConfig(
        hidden_size=FEATURES,
        num_attention_heads=HEADS,
        num_hidden_layers=12,
        intermediate_size=4 * FEATURES,
        max_position_embeddings=params["positions"].shape[0],
        hidden_act="gelu",
        num_labels=2,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model = hf.BertForSequenceClassification(config)
    embeddings = model.bert.embeddings
    _copy(embeddings.position_embeddings.weight, params["positions"])
    with torch.no_grad():
        embeddings.token_type_embeddings.weight.zero_()
    _set_norm(embeddings.LayerNorm, params["LayerNorm_0"])
    for i, layer in enumerate(model.bert.encoder.layer):
        _encoder_layer(layer, params, i)
        _set_norm(layer.attention.output.LayerNorm, params[f"LayerNorm_{2 * i + 1}"])
        _set_norm(layer.output.LayerNorm, params[f"LayerNorm_{2 * i + 2}"])
    _set(model.classifier, *_dense(params["Dense_24"]))  # Linen names the outer first
    _set(model.bert.pooler.dense, *_dense(params["Dense_25"]))
    model = _frozen(model)
    return model, lambda x: model(inputs_embeds=x).logits


def vit(params, size):
    from transformers.models.vit import modeling_vit as hf

    params = params["params"]
    config = hf.ViTConfig(
        hidden_size=FEATURES,
        num_attention_heads=HEADS,
        num_hidden_layers=12,
        intermediate_size=4 * FEATURES,
        image_size=size,
        patch_size=16,
        hidden_act="gelu",
        layer_norm_eps=1e-6,
        num_labels=1000,
    )
    model = hf.ViTForImageClassification(config)
    embeddings = model.vit.embeddings
    _copy(embeddings.cls_token, params["start"])
    _copy(embeddings.position_embeddings, np.asarray(params["positions"])[None])
    _set(embeddings.patch_embeddings.projection, *_dense(params["Conv_0"]))
    for i, layer in enumerate(model.vit.encoder.layer):
        _encoder_layer(layer, params, i)
        _set_norm(layer.layernorm_before, params[f"LayerNorm_{2 * i}"])
        _set_norm(layer.layernorm_after, params[f"LayerNorm_{2 * i + 1}"])
    _set_norm(model.vit.layernorm, params["LayerNorm_24"])
    _set(model.classifier, *_dense(params["Dense_24"]))
    model = _frozen(model)
    return model, lambda x: model(x).logits


def _encoder_layer(layer, params, i):
    """The linear maps of a layer of BERT or of ViT, which have the same names."""
    inner = layer.attention
    inner = getattr(inner, "self", None) or inner.attention
    values = params[f"MultiHeadDotProductAttention_{i}"]
    for name in ("query", "key", "value"):
        kernel = np.asarray(values[name]["kernel"]).reshape(FEATURES, -1)
        _set(getattr(inner, name), kernel, np.ravel(values[name]["bias"]))
    kernel = np.asarray(values["out"]["kernel"]).reshape(-1, FEATURES)
    _set(layer.attention.output.dense, kernel, values["out"]["bias"])
    _set(layer.intermediate.dense, *_dense(params[f"Dense_{2 * i}"]))
    _set(layer.output.dense, *_dense(params[f"Dense_{2 * i + 1}"]))


def _last_scores(model, x):
    return model(inputs_embeds=x, use_cache=False, logits_to_keep=1).logits[:, -1]


def _dense(values):
    return values["kernel"], values["bias"]


def _set(layer, kernel, bias=None):
    """A kernel (..., in, out) of JAX to PyTorch's (out, in, ...)."""
    axes = (3, 2, 0, 1) if np.ndim(kernel) == 4 else (1, 0)
    _copy(layer.weight, np.asarray(kernel).transpose(axes))
    if bias is not None:
        _copy(layer.bias, bias)


def _set_norm(norm, values):
    _copy(norm.weight, values["scale"])
    _copy(norm.bias, values["bias"])


def _copy(tensor, array):
    with torch.no_grad():
        tensor.copy_(torch.tensor(np.ascontiguousarray(array)))


def _frozen(model):
    return model.requires_grad_(False).eval()
