"""Transformers for video and sound, and the rest."""

from __future__ import annotations

from .build import Build, Shapes, diffusers, meta


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


def qwen3(**config: int) -> Build:
    """A text encoder of the third Qwen."""

    def make() -> object:
        from transformers import Qwen3Config, Qwen3Model

        return Qwen3Model(Qwen3Config(num_key_value_heads=8, head_dim=128, vocab_size=151936, **config))

    return meta(make)


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
    ("anima", None): {
        "transformer": diffusers(
            "CosmosTransformer3DModel", in_channels=16, num_attention_heads=16, extra_pos_embed_type=None
        ),
        "text_conditioner": diffusers("AnimaTextConditioner"),
        "text_encoder": qwen3(hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16),
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

# Paths of matrices that no adapter factors: looked up, not multiplied.
EMBEDDINGS: set[str] = set()
