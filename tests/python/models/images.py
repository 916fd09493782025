"""Transformers that make pictures, and HunyuanVideo."""

from __future__ import annotations

from . import text
from .build import Converter, Model, diffusers


def sd3(width: int, blocks: int, **values: object) -> Model:
    """Stable Diffusion 3 and 3.5, with heads of 64 channels."""
    return diffusers(
        "SD3Transformer2DModel",
        num_layers=blocks,
        num_attention_heads=width // 64,
        caption_projection_dim=width,
        pos_embed_max_size=192,
        **values,
    )


def klein(heads: int, text: int, double: int, single: int) -> Model:
    """FLUX.2 klein: no guidance, the text of a smaller Qwen3."""
    return diffusers(
        "Flux2Transformer2DModel",
        num_layers=double,
        num_single_layers=single,
        num_attention_heads=heads,
        joint_attention_dim=text,
        guidance_embeds=False,
    )


HIDREAM = {
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 16,
    "num_single_layers": 32,
    "attention_head_dim": 128,
    "num_attention_heads": 20,
    "caption_channels": [4096, 4096],
    "text_emb_dim": 2048,
    "num_routed_experts": 4,
    "num_activated_experts": 2,
    "axes_dims_rope": [64, 32, 32],
    "max_resolution": [128, 128],
}

SD3_ENCODERS = {
    "text_encoder": text.CLIP_L_PROJECTED,
    "text_encoder_2": text.CLIP_G,
    "text_encoder_3": text.T5_XXL,
}

# (family, size) -> component -> its model.
CLASSES: dict[tuple[str, str | None], dict[str, Model]] = {
    ("qwen-image", None): {
        "transformer": diffusers("QwenImageTransformer2DModel"),
        "text_encoder": text.QWEN25_VL_7B,
    },
    ("z-image", None): {
        "transformer": diffusers("ZImageTransformer2DModel"),
        "text_encoder": text.QWEN3_4B,
    },
    ("sd3", None): {"transformer": sd3(1536, 24), **SD3_ENCODERS},
    ("sd35", "medium"): {
        "transformer": sd3(1536, 24, dual_attention_layers=tuple(range(13)), qk_norm="rms_norm"),
        **SD3_ENCODERS,
    },
    ("sd35", "large"): {"transformer": sd3(2432, 38, qk_norm="rms_norm"), **SD3_ENCODERS},
    ("flux2", "dev"): {"transformer": diffusers("Flux2Transformer2DModel")},
    ("flux2", "klein-9b"): {"transformer": klein(heads=32, text=12288, double=8, single=24)},
    ("flux2", "klein-4b"): {"transformer": klein(heads=24, text=7680, double=5, single=20)},
    ("lumina2", None): {
        "transformer": diffusers("Lumina2Transformer2DModel", cap_feat_dim=2304),
        "text_encoder": text.GEMMA2_2B,
    },
    ("hunyuan-video", None): {
        "transformer": diffusers("HunyuanVideoTransformer3DModel"),
        "text_encoder": text.LLAMA3_8B,
    },
    ("auraflow", None): {"transformer": diffusers("AuraFlowTransformer2DModel")},
    ("hidream", None): {
        "transformer": diffusers("HiDreamImageTransformer2DModel", **HIDREAM),
        "text_encoder_4": text.LLAMA3_8B,
    },
    ("krea2", None): {"transformer": diffusers("Krea2Transformer2DModel")},
    ("ideogram4", None): {"transformer": diffusers("Ideogram4Transformer2DModel")},
}

SD3 = Converter("convert_sd3_transformer_checkpoint_to_diffusers", extras=("pos_embed",))
FLUX2 = Converter("convert_flux2_transformer_checkpoint_to_diffusers")

CONVERTERS: dict[tuple[str, str | None], Converter] = {
    ("z-image", None): Converter("convert_z_image_transformer_checkpoint_to_diffusers"),
    ("sd3", None): SD3,
    **{("sd35", size): SD3 for size in ("medium", "large")},
    **{("flux2", size): FLUX2 for size in ("dev", "klein-9b", "klein-4b")},
    ("lumina2", None): Converter("convert_lumina2_to_diffusers"),
    ("hunyuan-video", None): Converter("convert_hunyuan_video_transformer_to_diffusers"),
    ("auraflow", None): Converter(
        "convert_auraflow_transformer_checkpoint_to_diffusers", extras=("positional_encoding",)
    ),
    ("krea2", None): Converter("convert_krea2_transformer_checkpoint_to_diffusers"),
}
