"""Transformers that make pictures, HunyuanVideo, and the language models that read their prompts."""

from __future__ import annotations

from .build import Build, Converter, diffusers, meta


def transformers(model: str, config: str, **values: object) -> Build:
    """A model of transformers, with a config of its own kind."""

    def make() -> object:
        import transformers as library

        return getattr(library, model)(getattr(library, config)(**values))

    return meta(make)


def sd3(width: int, blocks: int, **values: object) -> Build:
    """Stable Diffusion 3 and 3.5, with heads of 64 channels."""
    return diffusers(
        "SD3Transformer2DModel",
        num_layers=blocks,
        num_attention_heads=width // 64,
        caption_projection_dim=width,
        pos_embed_max_size=192,
        **values,
    )


def klein(heads: int, text: int, double: int, single: int) -> Build:
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

QWEN25_VL_7B = {
    "text_config": {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
    },
    "vision_config": {"hidden_size": 1280, "intermediate_size": 3420, "depth": 32, "out_hidden_size": 3584},
}

QWEN3_4B = {
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 151936,
}

LLAMA3_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}

CLIP_L = transformers(
    "CLIPTextModelWithProjection",
    "CLIPTextConfig",
    hidden_size=768,
    intermediate_size=3072,
    num_hidden_layers=12,
    num_attention_heads=12,
    projection_dim=768,
)

T5_XXL = transformers(
    "T5EncoderModel",
    "T5Config",
    d_model=4096,
    d_ff=10240,
    d_kv=64,
    num_heads=64,
    num_layers=24,
    feed_forward_proj="gated-gelu",
)

LLAMA = transformers("LlamaForCausalLM", "LlamaConfig", **LLAMA3_8B)

CLASSES: dict[tuple[str, str | None], dict[str, Build]] = {
    ("qwen-image", None): {
        "transformer": diffusers("QwenImageTransformer2DModel"),
        "text_encoder": transformers("Qwen2_5_VLForConditionalGeneration", "Qwen2_5_VLConfig", **QWEN25_VL_7B),
    },
    ("z-image", None): {
        "transformer": diffusers("ZImageTransformer2DModel"),
        "text_encoder": transformers("Qwen3Model", "Qwen3Config", **QWEN3_4B),
    },
    ("sd3", None): {"transformer": sd3(1536, 24), "text_encoder": CLIP_L, "text_encoder_3": T5_XXL},
    ("sd35", "medium"): {
        "transformer": sd3(1536, 24, dual_attention_layers=tuple(range(13)), qk_norm="rms_norm"),
    },
    ("sd35", "large"): {"transformer": sd3(2432, 38, qk_norm="rms_norm")},
    ("flux2", "dev"): {"transformer": diffusers("Flux2Transformer2DModel")},
    ("flux2", "klein-9b"): {"transformer": klein(heads=32, text=12288, double=8, single=24)},
    ("flux2", "klein-4b"): {"transformer": klein(heads=24, text=7680, double=5, single=20)},
    ("lumina2", None): {
        "transformer": diffusers("Lumina2Transformer2DModel", cap_feat_dim=2304),
        "text_encoder": transformers("Gemma2Model", "Gemma2Config"),
    },
    ("hunyuan-video", None): {
        "transformer": diffusers("HunyuanVideoTransformer3DModel"),
        "text_encoder": LLAMA,
    },
    ("auraflow", None): {"transformer": diffusers("AuraFlowTransformer2DModel")},
    ("hidream", None): {
        "transformer": diffusers("HiDreamImageTransformer2DModel", **HIDREAM),
        "text_encoder_4": LLAMA,
    },
    ("krea2", None): {"transformer": diffusers("Krea2Transformer2DModel")},
    ("ideogram4", None): {"transformer": diffusers("Ideogram4Transformer2DModel")},
}

# Vocabularies differ between releases of one language model; T5 counts its distances in a table.
EMBEDDINGS = {
    "embed_tokens",
    "model.embed_tokens",
    "shared",
    "encoder.block.0.layer.0.SelfAttention.relative_attention_bias",
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
