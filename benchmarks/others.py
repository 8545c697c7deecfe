"""Models that nobody chose for jlrp, small, with random float64 weights.

Registered for ``covered.py --others``; each is ``build() -> (fn, params, x, target)``.
"""

import jax.numpy as jnp
import numpy as np

OTHERS = {}  # name: (source, whether it is a transformer, build)


def other(name, source, transformer=False):
    def register(build):
        OTHERS[name] = (source, transformer, build)
        return build

    return register


def floats(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float64)


def ids(*shape, high=100, low=3):
    rng = np.random.default_rng(0)
    return jnp.asarray(rng.integers(low, high, shape), jnp.int32)


def mixed(out):
    """One number for each example: its outputs with different weights."""
    leaves = [out] if hasattr(out, "shape") else list(out)
    total = 0.0
    for i, leaf in enumerate(leaves):
        flat = leaf.reshape(leaf.shape[0], -1)
        weights = np.cos(np.arange(1 + i, flat.shape[1] + 1 + i))
        total += flat @ jnp.asarray(weights, flat.dtype)
    return total


def last_token(out):
    return out[:, -1].max(-1)


# PyTorch models of transformers, through torchax.


def logits(out):
    return out.logits


def hidden(out):
    return out.last_hidden_state


def torch_module(build, x, output, target, prepare=None, **static):
    import torch

    from jlrp.integrations import torchax

    torchax.load()
    torch.manual_seed(0)
    module = build().eval()
    if prepare is not None:
        prepare(module)
    module = module.double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    fn, params = torchax.module(module, output=output, **static)
    return fn, params, x, target


def hf(
    name,
    model,
    x,
    output=logits,
    target=mixed,
    config=None,
    transformer=True,
    prepare=None,
    static=None,
    attention="eager",
    **small,
):
    """A model of transformers with its config class and small sizes."""

    @other(name, "transformers, torchax", transformer)
    def build():
        import transformers

        from jlrp.integrations import torchax

        torchax.load()
        kind = getattr(transformers, model)
        cls = getattr(transformers, config) if config else kind.config_class
        sizes = small() if callable(small) else small
        made = cls(
            **{k: v(transformers) if callable(v) else v for k, v in sizes.items()}
        )
        inputs = x() if callable(x) else x

        def built():
            try:
                return kind._from_config(made, attn_implementation=attention)
            except (ValueError, TypeError):
                return kind._from_config(made)

        return torch_module(built, inputs, output, target, prepare, **(static or {}))


BERT = dict(
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=64,
    vocab_size=100,
)
LLAMA = dict(BERT, num_key_value_heads=2, head_dim=8, max_position_embeddings=64)
IMAGE = lambda size=32: lambda: dict(pixel_values=floats(1, 3, size, size))  # noqa: E731
TOKENS = lambda: dict(input_ids=ids(1, 8))  # noqa: E731
NO_CACHE = dict(use_cache=False)
SEQ2SEQ = dict(
    d_model=32,
    encoder_layers=2,
    decoder_layers=2,
    encoder_attention_heads=4,
    decoder_attention_heads=4,
    encoder_ffn_dim=64,
    decoder_ffn_dim=64,
    vocab_size=100,
    pad_token_id=0,
    decoder_start_token_id=1,
    eos_token_id=2,
)
BOTH = lambda: dict(input_ids=ids(1, 8), decoder_input_ids=ids(1, 5))  # noqa: E731
VIT = dict(
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=64,
    image_size=32,
    patch_size=8,
)

# Vision.
hf(
    "swin",
    "SwinForImageClassification",
    IMAGE(),
    image_size=32,
    patch_size=2,
    embed_dim=16,
    depths=[2, 2],
    num_heads=[2, 4],
    window_size=4,
)
hf(
    "swinv2",
    "Swinv2ForImageClassification",
    IMAGE(),
    image_size=32,
    patch_size=2,
    embed_dim=16,
    depths=[2, 2],
    num_heads=[2, 4],
    window_size=4,
)
hf(
    "convnext",
    "ConvNextForImageClassification",
    IMAGE(),
    transformer=False,
    hidden_sizes=[8, 16],
    depths=[2, 2],
    num_stages=2,
)
hf(
    "convnextv2",
    "ConvNextV2ForImageClassification",
    IMAGE(),
    transformer=False,
    hidden_sizes=[8, 16],
    depths=[2, 2],
    num_stages=2,
)
hf("beit", "BeitForImageClassification", IMAGE(), **VIT)
hf("deit", "DeiTForImageClassification", IMAGE(), **VIT)
hf("dinov2", "Dinov2ForImageClassification", IMAGE(), **VIT)
hf("dinov3", "DINOv3ViTModel", IMAGE(), hidden, **VIT)
hf("vit-mae", "ViTMAEModel", IMAGE(), hidden, mask_ratio=0.0, **VIT)
hf(
    "segformer",
    "SegformerForSemanticSegmentation",
    IMAGE(64),
    num_encoder_blocks=4,
    depths=[1] * 4,
    hidden_sizes=[8, 16, 16, 32],
    num_attention_heads=[1, 2, 2, 4],
    decoder_hidden_size=16,
)
hf(
    "dpt",
    "DPTForDepthEstimation",
    IMAGE(),
    lambda o: o.predicted_depth,
    fusion_hidden_size=8,
    neck_hidden_sizes=[8, 8, 8, 8],
    backbone_out_indices=[0, 1, 2, 3],
    is_hybrid=False,
    **{**VIT, "num_hidden_layers": 4},
)
RESNET_BACKBONE = lambda t: t.ResNetConfig(  # noqa: E731
    embedding_size=8,
    hidden_sizes=[8, 8, 8, 16],
    depths=[1, 1, 1, 1],
    out_features=["stage2", "stage3", "stage4"],
)
DETR = dict(
    use_timm_backbone=False,
    use_pretrained_backbone=False,
    backbone=None,
    d_model=32,
    encoder_layers=2,
    decoder_layers=2,
    encoder_attention_heads=4,
    decoder_attention_heads=4,
    encoder_ffn_dim=64,
    decoder_ffn_dim=64,
    num_queries=6,
)
hf(
    "detr",
    "DetrForObjectDetection",
    IMAGE(64),
    lambda o: (o.logits, o.pred_boxes),
    backbone_config=lambda t: t.ResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 8, 8, 16],
        depths=[1, 1, 1, 1],
        out_features=["stage4"],
    ),
    **DETR,
)
hf(
    "conditional-detr",
    "ConditionalDetrForObjectDetection",
    IMAGE(64),
    lambda o: (o.logits, o.pred_boxes),
    backbone_config=lambda t: t.ResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 8, 8, 16],
        depths=[1, 1, 1, 1],
        out_features=["stage4"],
    ),
    **DETR,
)
hf(
    "deformable-detr",
    "DeformableDetrForObjectDetection",
    IMAGE(64),
    lambda o: (o.logits, o.pred_boxes),
    backbone_config=RESNET_BACKBONE,
    **{**DETR, "num_feature_levels": 3},
)
hf(
    "rt-detr",
    "RTDetrForObjectDetection",
    IMAGE(64),
    lambda o: (o.logits, o.pred_boxes),
    backbone_config=lambda t: t.RTDetrResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 8, 8, 16],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    ),
    backbone=None,
    use_timm_backbone=False,
    use_pretrained_backbone=False,
    encoder_in_channels=[8, 8, 16],
    encoder_hidden_dim=32,
    d_model=32,
    num_queries=6,
    encoder_ffn_dim=64,
    decoder_ffn_dim=64,
    decoder_layers=2,
    encoder_attention_heads=4,
    decoder_attention_heads=4,
    decoder_in_channels=[32, 32, 32],
    anchor_image_size=[64, 64],
    num_denoising=0,
)
hf(
    "yolos",
    "YolosForObjectDetection",
    IMAGE(),
    lambda o: (o.logits, o.pred_boxes),
    **{**VIT, "image_size": [32, 32]},
    num_detection_tokens=4,
)
hf(
    "maskformer",
    "MaskFormerForInstanceSegmentation",
    IMAGE(64),
    lambda o: (o.class_queries_logits, o.masks_queries_logits),
    backbone_config=lambda t: t.SwinConfig(
        image_size=64,
        patch_size=2,
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 2, 2, 2],
        window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    ),
    decoder_config=lambda t: t.DetrConfig(**DETR),
    fpn_feature_size=32,
    mask_feature_size=32,
    use_auxiliary_loss=False,
)
hf(
    "mask2former",
    "Mask2FormerForUniversalSegmentation",
    IMAGE(64),
    lambda o: (o.class_queries_logits, o.masks_queries_logits),
    backbone_config=lambda t: t.SwinConfig(
        image_size=64,
        patch_size=2,
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 2, 2, 2],
        window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    ),
    feature_size=32,
    mask_feature_size=32,
    hidden_dim=32,
    encoder_feedforward_dim=64,
    num_attention_heads=4,
    dim_feedforward=64,
    encoder_layers=1,
    decoder_layers=2,
    num_queries=5,
)
hf(
    "mobilenet-v2",
    "MobileNetV2ForImageClassification",
    IMAGE(),
    transformer=False,
    depth_multiplier=0.25,
)
hf(
    "regnet",
    "RegNetForImageClassification",
    IMAGE(),
    transformer=False,
    embedding_size=8,
    hidden_sizes=[8, 16],
    depths=[1, 2],
    groups_width=4,
)
hf(
    "levit",
    "LevitForImageClassification",
    IMAGE(64),
    image_size=64,
    hidden_sizes=[16, 24, 32],
    num_attention_heads=[2, 2, 2],
    depths=[1, 1, 1],
    key_dim=[8, 8, 8],
)
hf(
    "poolformer",
    "PoolFormerForImageClassification",
    IMAGE(64),
    transformer=False,
    hidden_sizes=[8, 8, 16, 16],
    depths=[1, 1, 1, 1],
)
hf(
    "pvt",
    "PvtForImageClassification",
    IMAGE(64),
    image_size=64,
    hidden_sizes=[8, 16, 16, 32],
    depths=[1] * 4,
    num_attention_heads=[1, 2, 2, 4],
)
hf(
    "cvt",
    "CvtForImageClassification",
    IMAGE(64),
    embed_dim=[8, 16, 32],
    num_heads=[1, 2, 2],
    depth=[1, 1, 1],
)
hf(
    "focalnet",
    "FocalNetForImageClassification",
    IMAGE(),
    transformer=False,
    image_size=32,
    embed_dim=16,
    depths=[1, 1],
    focal_levels=[2, 2],
    focal_windows=[3, 3],
    hidden_sizes=[16, 32],
)
hf(
    "mobilevit",
    "MobileViTForImageClassification",
    IMAGE(64),
    image_size=64,
    hidden_sizes=[16, 24, 32],
    neck_hidden_sizes=[4, 8, 8, 16, 16, 24, 32],
)
hf(
    "swiftformer",
    "SwiftFormerForImageClassification",
    IMAGE(64),
    image_size=64,
    depths=[1, 1, 1, 1],
    embed_dims=[8, 16, 16, 32],
)
hf(
    "hiera",
    "HieraForImageClassification",
    IMAGE(64),
    image_size=[64, 64],
    embed_dim=16,
    depths=[1, 1, 1],
    num_heads=[1, 2, 4],
    query_stride=[2, 2],
    patch_stride=[4, 4],
    num_query_pool=2,
    masked_unit_size=[4, 4],
)
hf(
    "glpn",
    "GLPNForDepthEstimation",
    IMAGE(64),
    lambda o: o.predicted_depth,
    hidden_sizes=[8, 16, 16, 32],
    depths=[1] * 4,
    num_attention_heads=[1, 2, 2, 4],
    decoder_hidden_size=16,
)
hf(
    "upernet",
    "UperNetForSemanticSegmentation",
    IMAGE(64),
    transformer=False,
    backbone_config=lambda t: t.ConvNextConfig(
        hidden_sizes=[8, 8, 16, 16],
        depths=[1, 1, 1, 1],
        out_features=["stage1", "stage2", "stage3", "stage4"],
    ),
    hidden_size=16,
    auxiliary_in_channels=16,
    auxiliary_channels=8,
)
hf(
    "depth-anything",
    "DepthAnythingForDepthEstimation",
    IMAGE(28),
    lambda o: o.predicted_depth,
    backbone_config=lambda t: t.Dinov2Config(
        **{**VIT, "image_size": 28, "patch_size": 14, "num_hidden_layers": 4},
        out_features=["stage1", "stage2", "stage3", "stage4"],
        reshape_hidden_states=False,
    ),
    reassemble_hidden_size=32,
    neck_hidden_sizes=[8, 8, 8, 8],
    fusion_hidden_size=8,
    patch_size=14,
    head_hidden_size=8,
)
hf(
    "superpoint",
    "SuperPointForKeypointDetection",
    IMAGE(64),
    transformer=False,
    output=lambda o: o.last_hidden_state,
)
hf(
    "sam",
    "SamModel",
    IMAGE(64),
    lambda o: (o.pred_masks, o.iou_scores),
    static=dict(input_points=np.array([[[[20.0, 30.0]]]]), multimask_output=True),
    vision_config=lambda t: t.SamVisionConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=64,
        patch_size=8,
        output_channels=16,
        window_size=4,
        global_attn_indexes=[1],
        mlp_dim=32,
    ),
    prompt_encoder_config=lambda t: t.SamPromptEncoderConfig(
        hidden_size=16, image_size=64, patch_size=8
    ),
    mask_decoder_config=lambda t: t.SamMaskDecoderConfig(
        hidden_size=16,
        mlp_dim=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        iou_head_hidden_dim=16,
    ),
)
hf(
    "videomae",
    "VideoMAEForVideoClassification",
    lambda: dict(pixel_values=floats(1, 4, 3, 16, 16)),
    num_frames=4,
    **{**VIT, "image_size": 16},
)
hf(
    "timesformer",
    "TimesformerForVideoClassification",
    lambda: dict(pixel_values=floats(1, 2, 3, 16, 16)),
    num_frames=2,
    **{**VIT, "image_size": 16},
)

# Images and text.
hf(
    "clip",
    "CLIPModel",
    lambda: dict(input_ids=ids(1, 7), pixel_values=floats(1, 3, 32, 32)),
    lambda o: o.logits_per_image,
    projection_dim=16,
    text_config=dict(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        vocab_size=100,
        max_position_embeddings=16,
        eos_token_id=2,
    ),
    vision_config=VIT,
)
hf(
    "blip",
    "BlipForImageTextRetrieval",
    lambda: dict(input_ids=ids(1, 7), pixel_values=floats(1, 3, 32, 32)),
    lambda o: o.itm_score,
    projection_dim=16,
    image_text_hidden_size=16,
    text_config=dict(BERT, encoder_hidden_size=32, max_position_embeddings=16),
    vision_config=VIT,
)
hf(
    "vilt",
    "ViltForQuestionAnswering",
    lambda: dict(input_ids=ids(1, 7), pixel_values=floats(1, 3, 32, 32)),
    max_position_embeddings=16,
    num_labels=5,
    **{**BERT, **VIT},
)
hf(
    "owlvit",
    "OwlViTForObjectDetection",
    lambda: dict(input_ids=ids(1, 7), pixel_values=floats(1, 3, 32, 32)),
    lambda o: (o.logits, o.pred_boxes),
    projection_dim=32,
    text_config=dict(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        vocab_size=100,
        max_position_embeddings=16,
    ),
    vision_config=VIT,
)
hf(
    "clipseg",
    "CLIPSegForImageSegmentation",
    lambda: dict(input_ids=ids(1, 7), pixel_values=floats(1, 3, 32, 32)),
    projection_dim=16,
    reduce_dim=16,
    extract_layers=[0, 1],
    conditional_layer=0,
    decoder_num_attention_heads=2,
    decoder_intermediate_size=32,
    text_config=dict(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        vocab_size=100,
        max_position_embeddings=16,
        eos_token_id=2,
    ),
    vision_config=VIT,
)
hf(
    "groupvit",
    "GroupViTModel",
    lambda: dict(input_ids=ids(1, 7), pixel_values=floats(1, 3, 32, 32)),
    lambda o: o.logits_per_image,
    projection_dim=16,
    projection_intermediate_dim=16,
    text_config=dict(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        vocab_size=100,
        max_position_embeddings=16,
        eos_token_id=2,
    ),
    vision_config=dict(
        VIT, depths=[1, 1, 1], num_group_tokens=[4, 2, 0], num_output_groups=[4, 2, 0]
    ),
)
hf(
    "perceiver",
    "PerceiverForImageClassificationLearned",
    lambda: dict(inputs=floats(1, 3, 8, 8)),
    image_size=8,
    num_latents=4,
    d_latents=16,
    d_model=16,
    num_blocks=1,
    num_self_attends_per_block=2,
    num_self_attention_heads=2,
    num_cross_attention_heads=1,
)

# Encoders.
hf("electra", "ElectraForSequenceClassification", TOKENS, embedding_size=16, **BERT)
hf("albert", "AlbertForSequenceClassification", TOKENS, embedding_size=16, **BERT)
hf(
    "distilbert",
    "DistilBertForSequenceClassification",
    TOKENS,
    dim=32,
    n_layers=2,
    n_heads=4,
    hidden_dim=64,
    vocab_size=100,
)
hf(
    "deberta-v2",
    "DebertaV2ForSequenceClassification",
    TOKENS,
    relative_attention=True,
    pos_att_type=["p2c", "c2p"],
    position_buckets=8,
    max_relative_positions=16,
    **BERT,
)
hf("mpnet", "MPNetForSequenceClassification", TOKENS, **BERT)
hf(
    "mobilebert",
    "MobileBertForSequenceClassification",
    TOKENS,
    embedding_size=16,
    intra_bottleneck_size=16,
    **BERT,
)
hf(
    "squeezebert",
    "SqueezeBertForSequenceClassification",
    TOKENS,
    embedding_size=32,
    **BERT,
)
hf("convbert", "ConvBertForSequenceClassification", TOKENS, embedding_size=32, **BERT)
hf(
    "funnel",
    "FunnelForSequenceClassification",
    TOKENS,
    d_model=32,
    n_head=4,
    d_head=8,
    d_inner=64,
    vocab_size=100,
    block_sizes=[1, 1],
    num_decoder_layers=1,
)
hf(
    "fnet",
    "FNetForSequenceClassification",
    TOKENS,
    transformer=False,
    hidden_size=32,
    num_hidden_layers=2,
    intermediate_size=64,
    vocab_size=100,
    max_position_embeddings=8,
)
hf(
    "nystromformer",
    "NystromformerForSequenceClassification",
    TOKENS,
    num_landmarks=4,
    segment_means_seq_len=8,
    **BERT,
)
hf(
    "longformer",
    "LongformerForSequenceClassification",
    TOKENS,
    attention_window=4,
    **BERT,
)
hf(
    "bigbird",
    "BigBirdForSequenceClassification",
    lambda: dict(input_ids=ids(1, 32)),
    attention_type="block_sparse",
    block_size=4,
    num_random_blocks=2,
    max_position_embeddings=64,
    **BERT,
)
hf(
    "reformer",
    "ReformerForSequenceClassification",
    TOKENS,
    axial_pos_embds=False,
    num_attention_heads=2,
    attention_head_size=16,
    hidden_size=32,
    feed_forward_size=64,
    attn_layers=["local", "lsh"],
    vocab_size=100,
    max_position_embeddings=8,
    local_attn_chunk_length=4,
    lsh_attn_chunk_length=4,
    num_buckets=2,
    is_decoder=False,
    hash_seed=0,
)
hf(
    "xlnet",
    "XLNetForSequenceClassification",
    TOKENS,
    d_model=32,
    n_layer=2,
    n_head=4,
    d_inner=64,
    vocab_size=100,
)
hf("modernbert", "ModernBertForSequenceClassification", TOKENS, pad_token_id=0, **BERT)
hf("roformer", "RoFormerForSequenceClassification", TOKENS, **BERT)
hf(
    "canine",
    "CanineForSequenceClassification",
    lambda: dict(input_ids=ids(1, 16)),
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=64,
    max_position_embeddings=64,
    num_hash_buckets=50,
    local_transformer_stride=8,
    downsampling_rate=4,
    upsampling_kernel_size=4,
)

# Decoders.
LM = dict(output=logits, target=last_token, static=NO_CACHE)
for _name, _model, _more in (
    (
        "gpt-j",
        "GPTJForCausalLM",
        dict(
            n_embd=32, n_layer=2, n_head=4, vocab_size=100, rotary_dim=4, n_positions=32
        ),
    ),
    (
        "gpt-neo",
        "GPTNeoForCausalLM",
        dict(
            hidden_size=32,
            num_layers=2,
            num_heads=4,
            vocab_size=100,
            window_size=4,
            attention_types=[[["global", "local"], 1]],
            max_position_embeddings=32,
        ),
    ),
    ("gpt-neox", "GPTNeoXForCausalLM", dict(BERT, max_position_embeddings=32)),
    (
        "bloom",
        "BloomForCausalLM",
        dict(hidden_size=32, n_layer=2, n_head=4, vocab_size=100),
    ),
    (
        "opt",
        "OPTForCausalLM",
        dict(
            hidden_size=32,
            num_hidden_layers=2,
            ffn_dim=64,
            num_attention_heads=4,
            vocab_size=100,
            max_position_embeddings=32,
            word_embed_proj_dim=32,
        ),
    ),
    ("falcon", "FalconForCausalLM", dict(BERT, multi_query=True)),
    ("mpt", "MptForCausalLM", dict(d_model=32, n_heads=4, n_layers=2, vocab_size=100)),
    ("phi3", "Phi3ForCausalLM", dict(LLAMA, pad_token_id=0)),
    ("gemma2", "Gemma2ForCausalLM", dict(LLAMA)),
    ("stablelm", "StableLmForCausalLM", dict(LLAMA, use_qkv_bias=True)),
    ("cohere", "CohereForCausalLM", dict(LLAMA, use_qk_norm=False)),
    ("olmo2", "Olmo2ForCausalLM", dict(LLAMA)),
    ("granite", "GraniteForCausalLM", dict(LLAMA)),
    ("diffllama", "DiffLlamaForCausalLM", dict(LLAMA)),
    (
        "gpt-oss",
        "GptOssForCausalLM",
        dict(LLAMA, num_local_experts=4, num_experts_per_tok=2, sliding_window=4),
    ),
    (
        "llama4-moe",
        "Llama4ForCausalLM",
        dict(
            LLAMA, num_local_experts=4, intermediate_size_mlp=64, attention_chunk_size=8
        ),
    ),
    ("mixtral", "MixtralForCausalLM", dict(LLAMA, num_local_experts=4)),
    ("granite-moe", "GraniteMoeForCausalLM", dict(LLAMA, num_local_experts=4)),
    (
        "rwkv",
        "RwkvForCausalLM",
        dict(
            hidden_size=32,
            num_hidden_layers=2,
            attention_hidden_size=32,
            intermediate_size=64,
            vocab_size=100,
            context_length=16,
        ),
    ),
    (
        "mamba2",
        "Mamba2ForCausalLM",
        dict(
            hidden_size=16,
            num_hidden_layers=2,
            head_dim=8,
            num_heads=4,
            state_size=4,
            n_groups=1,
            vocab_size=100,
            chunk_size=4,
        ),
    ),
    (
        "falcon-mamba",
        "FalconMambaForCausalLM",
        dict(hidden_size=16, num_hidden_layers=2, state_size=4, vocab_size=100),
    ),
    (
        "xlstm",
        "xLSTMForCausalLM",
        dict(
            hidden_size=32,
            num_hidden_layers=2,
            num_heads=2,
            vocab_size=100,
            chunk_size=4,
            embedding_dim=32,
            num_blocks=2,
        ),
    ),
    (
        "recurrent-gemma",
        "RecurrentGemmaForCausalLM",
        dict(
            LLAMA,
            lru_width=32,
            attention_window_size=4,
            block_types=["recurrent", "attention"],
        ),
    ),
    (
        "jamba",
        "JambaForCausalLM",
        dict(
            LLAMA,
            num_experts=1,
            num_experts_per_tok=1,
            attn_layer_period=2,
            attn_layer_offset=1,
            use_mamba_kernels=False,
            mamba_d_state=4,
            pad_token_id=0,
        ),
    ),
    (
        "bamba",
        "BambaForCausalLM",
        dict(
            LLAMA,
            mamba_n_heads=4,
            mamba_d_head=16,
            mamba_d_state=4,
            mamba_n_groups=1,
            mamba_chunk_size=4,
            attn_layer_indices=[1],
            pad_token_id=0,
        ),
    ),
    (
        "lfm2",
        "Lfm2ForCausalLM",
        dict(LLAMA, layer_types=["conv", "full_attention"], pad_token_id=0),
    ),
    (
        "qwen3-next",
        "Qwen3NextForCausalLM",
        dict(
            LLAMA,
            num_experts=0,
            linear_num_key_heads=2,
            linear_num_value_heads=4,
            linear_key_head_dim=8,
            linear_value_head_dim=8,
            pad_token_id=0,
            layer_types=["linear_attention", "full_attention"],
        ),
    ),
    (
        "ctrl",
        "CTRLLMHeadModel",
        dict(n_embd=32, dff=64, n_layer=2, n_head=4, vocab_size=100, n_positions=32),
    ),
):
    hf(_name, _model, TOKENS, **LM, **_more)

# Encoders with decoders.
hf(
    "bart",
    "BartForConditionalGeneration",
    BOTH,
    target=last_token,
    static=NO_CACHE,
    attention="sdpa",
    **SEQ2SEQ,
)
hf(
    "marian",
    "MarianMTModel",
    BOTH,
    target=last_token,
    static=NO_CACHE,
    attention="sdpa",
    **SEQ2SEQ,
)
hf(
    "pegasus",
    "PegasusForConditionalGeneration",
    BOTH,
    target=last_token,
    static=NO_CACHE,
    attention="sdpa",
    **SEQ2SEQ,
)
hf(
    "m2m-100",
    "M2M100ForConditionalGeneration",
    BOTH,
    target=last_token,
    static=NO_CACHE,
    attention="sdpa",
    **SEQ2SEQ,
)
hf(
    "led",
    "LEDForConditionalGeneration",
    lambda: dict(input_ids=ids(1, 8), decoder_input_ids=ids(1, 5)),
    target=last_token,
    static=NO_CACHE,
    attention_window=4,
    max_encoder_position_embeddings=32,
    **SEQ2SEQ,
)
hf(
    "prophetnet",
    "ProphetNetForConditionalGeneration",
    BOTH,
    target=last_token,
    static=NO_CACHE,
    hidden_size=32,
    num_encoder_layers=2,
    num_decoder_layers=2,
    num_encoder_attention_heads=4,
    num_decoder_attention_heads=4,
    encoder_ffn_dim=64,
    decoder_ffn_dim=64,
    vocab_size=100,
)
hf(
    "mt5",
    "MT5ForConditionalGeneration",
    BOTH,
    target=last_token,
    static=NO_CACHE,
    d_model=32,
    d_kv=8,
    d_ff=64,
    num_layers=2,
    num_heads=4,
    vocab_size=100,
)
hf(
    "umt5",
    "UMT5ForConditionalGeneration",
    BOTH,
    target=last_token,
    static=NO_CACHE,
    d_model=32,
    d_kv=8,
    d_ff=64,
    num_layers=2,
    num_heads=4,
    vocab_size=100,
)
hf(
    "longt5",
    "LongT5ForConditionalGeneration",
    BOTH,
    target=last_token,
    static=NO_CACHE,
    d_model=32,
    d_kv=8,
    d_ff=64,
    num_layers=2,
    num_heads=4,
    vocab_size=100,
    local_radius=3,
    encoder_attention_type="transient-global",
    global_block_size=4,
)

# Sound and series.
SOUND = dict(
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=64,
    conv_dim=(16,) * 7,
    num_conv_pos_embeddings=8,
    num_conv_pos_embedding_groups=4,
    vocab_size=32,
)


def fold_weight_norms(module):
    import torch

    for part in module.modules():
        if hasattr(part, "parametrizations"):
            for name in list(part.parametrizations):
                torch.nn.utils.parametrize.remove_parametrizations(part, name)


WAVE = lambda: dict(input_values=floats(1, 1600))  # noqa: E731
hf("hubert", "HubertForCTC", WAVE, prepare=fold_weight_norms, **SOUND)
hf("data2vec-audio", "Data2VecAudioForCTC", WAVE, prepare=fold_weight_norms, **SOUND)
hf("wavlm", "WavLMForCTC", WAVE, prepare=fold_weight_norms, **SOUND)
hf(
    "sew",
    "SEWForCTC",
    WAVE,
    prepare=fold_weight_norms,
    squeeze_factor=2,
    conv_stride=(5, 2, 2, 2, 2, 2, 2),
    conv_kernel=(10, 3, 3, 3, 3, 2, 2),
    **SOUND,
)
hf(
    "wav2vec2-conformer",
    "Wav2Vec2ConformerForCTC",
    WAVE,
    prepare=fold_weight_norms,
    position_embeddings_type="rotary",
    conv_depthwise_kernel_size=5,
    **SOUND,
)
hf(
    "encodec",
    "EncodecModel",
    lambda: dict(input_values=floats(1, 1, 320)),
    lambda o: o,
    transformer=False,
    prepare=fold_weight_norms,
    num_filters=4,
    hidden_size=16,
    codebook_size=16,
    codebook_dim=16,
    num_lstm_layers=1,
)
hf(
    "vits",
    "VitsModel",
    TOKENS,
    lambda o: o.waveform,
    prepare=fold_weight_norms,
    vocab_size=100,
    hidden_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    ffn_dim=32,
    upsample_initial_channel=16,
)
hf(
    "speech-to-text",
    "Speech2TextForConditionalGeneration",
    lambda: dict(input_features=floats(1, 16, 8), decoder_input_ids=ids(1, 4)),
    target=last_token,
    static=NO_CACHE,
    input_feat_per_channel=8,
    conv_channels=16,
    **SEQ2SEQ,
)
hf(
    "ast",
    "ASTForAudioClassification",
    lambda: dict(input_values=floats(1, 32, 16)),
    max_length=32,
    num_mel_bins=16,
    patch_size=8,
    frequency_stride=8,
    time_stride=8,
    **BERT,
)
hf(
    "univnet",
    "UnivNetModel",
    lambda: dict(input_features=floats(1, 6, 100), noise_sequence=floats(1, 6, 64)),
    lambda o: o.waveforms,
    transformer=False,
    model_hidden_channels=4,
    kernel_predictor_hidden_channels=8,
    prepare=fold_weight_norms,
)
SERIES = dict(
    prediction_length=3,
    context_length=6,
    input_size=1,
    lags_sequence=[1, 2],
    num_time_features=1,
    d_model=16,
    encoder_layers=1,
    decoder_layers=1,
    encoder_attention_heads=2,
    decoder_attention_heads=2,
    encoder_ffn_dim=16,
    decoder_ffn_dim=16,
)


def series(steps=8):
    return dict(
        past_values=floats(1, steps),
        past_time_features=floats(1, steps, 1, seed=1),
        past_observed_mask=jnp.ones((1, steps)),
        future_values=floats(1, 3, seed=2),
        future_time_features=floats(1, 3, 1, seed=3),
    )


hf(
    "time-series",
    "TimeSeriesTransformerModel",
    series,
    hidden,
    static=NO_CACHE,
    **SERIES,
)
hf("informer", "InformerModel", series, hidden, static=NO_CACHE, **SERIES)
hf(
    "autoformer",
    "AutoformerModel",
    series,
    hidden,
    static=NO_CACHE,
    label_length=2,
    moving_average=3,
    **SERIES,
)
hf(
    "patchtst",
    "PatchTSTForPrediction",
    lambda: dict(past_values=floats(1, 16, 2)),
    lambda o: o.prediction_outputs,
    num_input_channels=2,
    context_length=16,
    patch_length=4,
    patch_stride=4,
    prediction_length=3,
    d_model=16,
    ffn_dim=32,
    num_hidden_layers=2,
    num_attention_heads=2,
)
hf(
    "patchtsmixer",
    "PatchTSMixerForPrediction",
    lambda: dict(past_values=floats(1, 16, 2)),
    lambda o: o.prediction_outputs,
    transformer=False,
    context_length=16,
    patch_length=4,
    num_input_channels=2,
    patch_stride=4,
    d_model=8,
    num_layers=2,
    prediction_length=3,
    use_positional_encoding=False,
)
hf(
    "decision-transformer",
    "DecisionTransformerModel",
    lambda: dict(
        states=floats(1, 4, 5),
        actions=floats(1, 4, 2, seed=1),
        returns_to_go=floats(1, 4, 1, seed=2),
        timesteps=jnp.arange(4, dtype=jnp.int32)[None],
    ),
    lambda o: o.action_preds,
    state_dim=5,
    act_dim=2,
    hidden_size=32,
    n_layer=2,
    n_head=4,
    max_ep_len=16,
)
