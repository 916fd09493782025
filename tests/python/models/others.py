"""Transformers for video and sound, and the rest."""

from __future__ import annotations

from dataclasses import replace

from . import text
from .build import Converter, Model, diffusers


def ltx2_connectors(**config: object) -> Model:
    """What stands between LTX-2's text encoder and its transformer."""

    def make() -> object:
        from diffusers.pipelines.ltx2 import LTX2TextConnectors

        return LTX2TextConnectors(**config)

    return Model(make)


def sana(layers: int, **config: object) -> Model:
    """Sana in one of its sizes."""
    return diffusers("SanaTransformer2DModel", num_layers=layers, **config)


VACE_14B = [0, 5, 10, 15, 20, 25, 30, 35]
VACE_1_3B = list(range(0, 30, 2))


def wan(vace: list[int] | None, **config: int) -> Model:
    """Wan's transformer; in the sizes that have them, with the image modules and the blocks of VACE too."""
    plain = diffusers("WanTransformer3DModel", **config)
    if vace is None:
        return plain
    width = config["num_attention_heads"] * 128
    image = diffusers("WanTransformer3DModel", image_dim=1280, added_kv_proj_dim=width, **config)
    return replace(plain, others=(image, diffusers("WanVACETransformer3DModel", vace_layers=vace, **config)))


WAN_14B = wan(VACE_14B, num_attention_heads=40)
WAN_5B = wan(None, num_attention_heads=24, num_layers=30, ffn_dim=14336, in_channels=48, out_channels=48)
WAN_1_3B = wan(VACE_1_3B, num_attention_heads=12, num_layers=30, ffn_dim=8960)

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

# (family, size) -> component -> its model.
CLASSES: dict[tuple[str, str | None], dict[str, Model]] = {
    ("wan", "14b"): {"transformer": WAN_14B, "transformer_2": WAN_14B},
    ("wan", "5b"): {"transformer": WAN_5B},
    ("wan", "1.3b"): {"transformer": WAN_1_3B},
    ("ltx-video", "2b"): {"transformer": diffusers("LTXVideoTransformer3DModel")},
    ("ltx-video", "13b"): {
        "transformer": diffusers(
            "LTXVideoTransformer3DModel", num_layers=48, attention_head_dim=128, cross_attention_dim=4096
        )
    },
    ("cogvideox", "2b"): {"transformer": diffusers("CogVideoXTransformer3DModel"), "text_encoder": text.T5_XXL},
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
    ("sana", "1.6b"): {"transformer": sana(20, qk_norm="rms_norm_across_heads"), "text_encoder": text.GEMMA2_2B},
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
        "text_encoder": text.QWEN3_0_6B,
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
