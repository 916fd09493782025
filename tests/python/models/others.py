"""Transformers for video and sound, and the rest."""

from __future__ import annotations

from .build import Build, Converter, Shapes, diffusers, meta


def union(*builds: Build) -> Build:
    """Models that differ in the modules they have, not in the shapes of those they share."""

    def build() -> Shapes:
        merged: Shapes = {}
        for one in builds:
            for name, shape in one().items():
                assert merged.setdefault(name, shape) == shape, name
        return merged

    return build


def ltx2_connectors(**config: object) -> Build:
    """What stands between LTX-2's text encoder and its transformer."""

    def make() -> object:
        from diffusers.pipelines.ltx2 import LTX2TextConnectors

        return LTX2TextConnectors(**config)

    return meta(make)


def text_model(model: str, config: str, **values: int) -> Build:
    """A text encoder of transformers, with a config of its own kind."""

    def make() -> object:
        import transformers

        return getattr(transformers, model)(getattr(transformers, config)(**values))

    return meta(make)


def sana(layers: int, **config: object) -> Build:
    """Sana in one of its sizes."""
    return diffusers("SanaTransformer2DModel", num_layers=layers, **config)


VACE_14B = [0, 5, 10, 15, 20, 25, 30, 35]
VACE_1_3B = list(range(0, 30, 2))


def wan(vace: list[int] | None, **config: int) -> Build:
    """Wan's transformer; in the sizes that have them, with the image modules and the blocks of VACE too."""
    if vace is None:
        return diffusers("WanTransformer3DModel", **config)
    width = config["num_attention_heads"] * 128
    image = diffusers("WanTransformer3DModel", image_dim=1280, added_kv_proj_dim=width, **config)
    return union(image, diffusers("WanVACETransformer3DModel", vace_layers=vace, **config))


WAN_14B = wan(VACE_14B, num_attention_heads=40)
WAN_5B = wan(None, num_attention_heads=24, num_layers=30, ffn_dim=14336, in_channels=48, out_channels=48)
WAN_1_3B = wan(VACE_1_3B, num_attention_heads=12, num_layers=30, ffn_dim=8960)

QWEN3_0_6B = text_model(
    "Qwen3Model",
    "Qwen3Config",
    hidden_size=1024,
    intermediate_size=3072,
    num_hidden_layers=28,
    num_attention_heads=16,
    num_key_value_heads=8,
    head_dim=128,
    vocab_size=151936,
)
GEMMA2_2B = text_model(
    "Gemma2Model",
    "Gemma2Config",
    hidden_size=2304,
    intermediate_size=9216,
    num_hidden_layers=26,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=256,
)
T5_XXL = text_model(
    "T5EncoderModel",
    "T5Config",
    d_model=4096,
    d_kv=64,
    d_ff=10240,
    num_layers=24,
    num_heads=64,
    feed_forward_proj="gated-gelu",
)

LTX_2_3 = {
    "gated_attn": True,
    "cross_attn_mod": True,
    "audio_gated_attn": True,
    "audio_cross_attn_mod": True,
    "use_prompt_embeddings": False,
    "perturbed_attn": True,
}
LTX_2_3_CONNECTORS = {
    "video_connector_num_attention_heads": 32,
    "video_connector_num_layers": 8,
    "video_gated_attn": True,
    "audio_connector_num_attention_heads": 32,
    "audio_connector_attention_head_dim": 64,
    "audio_connector_num_layers": 8,
    "audio_gated_attn": True,
    "per_modality_projections": True,
    "proj_bias": True,
}

SANA_SMALL = {
    "num_attention_heads": 36,
    "num_cross_attention_heads": 16,
    "cross_attention_head_dim": 72,
    "cross_attention_dim": 1152,
}
SANA_SPRINT = {"qk_norm": "rms_norm_across_heads", "guidance_embeds": True}

# (family, size) -> component -> the shapes of its parameters.
CLASSES: dict[tuple[str, str | None], dict[str, Build]] = {
    ("wan", "14b"): {"transformer": WAN_14B, "transformer_2": WAN_14B},
    ("wan", "5b"): {"transformer": WAN_5B},
    ("wan", "1.3b"): {"transformer": WAN_1_3B},
    ("ltx-video", "2b"): {"transformer": diffusers("LTXVideoTransformer3DModel")},
    ("ltx-video", "13b"): {
        "transformer": diffusers(
            "LTXVideoTransformer3DModel", num_layers=48, attention_head_dim=128, cross_attention_dim=4096
        )
    },
    ("cogvideox", "2b"): {"transformer": diffusers("CogVideoXTransformer3DModel"), "text_encoder": T5_XXL},
    ("cogvideox", "5b"): {
        "transformer": diffusers("CogVideoXTransformer3DModel", num_attention_heads=48, num_layers=42)
    },
    ("cogvideox", "1.5-5b"): {
        "transformer": diffusers(
            "CogVideoXTransformer3DModel",
            num_attention_heads=48,
            num_layers=42,
            patch_size_t=2,
            patch_bias=False,
            ofs_embed_dim=512,
            use_rotary_positional_embeddings=True,
        )
    },
    ("mochi", None): {"transformer": diffusers("MochiTransformer3DModel")},
    ("sana", "1.6b"): {"transformer": sana(20, qk_norm="rms_norm_across_heads"), "text_encoder": GEMMA2_2B},
    ("sana", "4.8b"): {"transformer": sana(60, qk_norm="rms_norm_across_heads")},
    ("sana", "0.6b"): {"transformer": sana(28, **SANA_SMALL)},
    ("sana", "sprint-1.6b"): {"transformer": sana(20, **SANA_SPRINT)},
    ("sana", "sprint-0.6b"): {"transformer": sana(28, **SANA_SMALL, **SANA_SPRINT)},
    ("ace-step", "1.5"): {"transformer": diffusers("AceStepTransformer1DModel")},
    ("ace-step", "1.5-xl"): {
        "transformer": diffusers(
            "AceStepTransformer1DModel",
            hidden_size=2560,
            intermediate_size=9728,
            num_hidden_layers=32,
            num_attention_heads=32,
            encoder_hidden_size=2048,
        )
    },
    ("anima", None): {
        "transformer": diffusers(
            "CosmosTransformer3DModel", in_channels=16, num_attention_heads=16, extra_pos_embed_type=None
        ),
        "text_conditioner": diffusers("AnimaTextConditioner"),
        "text_encoder": QWEN3_0_6B,
    },
    ("ltx2", "2.0"): {
        "transformer": diffusers("LTX2VideoTransformer3DModel"),
        "connectors": ltx2_connectors(),
    },
    ("ltx2", "2.3"): {
        "transformer": diffusers("LTX2VideoTransformer3DModel", **LTX_2_3),
        "connectors": ltx2_connectors(**LTX_2_3_CONNECTORS),
    },
}

# (family, size) -> how diffusers turns an original checkpoint into its own.
CONVERTERS: dict[tuple[str, str | None], Converter] = {
    **{("wan", size): Converter("convert_wan_transformer_to_diffusers") for size in ("14b", "5b", "1.3b")},
    **{("ltx-video", size): Converter("convert_ltx_transformer_checkpoint_to_diffusers") for size in ("2b", "13b")},
    ("ltx2", "2.0"): Converter("convert_ltx2_transformer_to_diffusers"),
    ("ltx2", "2.3"): Converter("convert_ltx2_transformer_to_diffusers", ignores=("prompt_adaln",)),
    ("anima", None): Converter("convert_cosmos_transformer_checkpoint_to_diffusers", prefix="net."),
    ("mochi", None): Converter("convert_mochi_transformer_checkpoint_to_diffusers", extras=("pos_frequencies",)),
    **{
        ("sana", size): Converter(
            "convert_sana_transformer_to_diffusers",
            extras=("pos_embed", "y_embedder.y_embedding", "final_layer.scale_shift_table"),
            ignores=("norm_q", "norm_k"),
        )
        for size in ("1.6b", "0.6b", "4.8b")
    },
}

# Paths of matrices that no adapter factors: looked up, not multiplied.
EMBEDDINGS = {
    "embed_tokens",
    "shared",
    "encoder.embed_tokens",
    "encoder.block.0.layer.0.SelfAttention.relative_attention_bias",
}
