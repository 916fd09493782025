"""Stable Diffusion 1, 2 and XL, and Stable Cascade."""

from __future__ import annotations

from dataclasses import replace

from . import text
from .build import Converter, Model, diffusers

_WITH_ATTENTION = ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D")
_WITHOUT = ("DownBlock2D", "UpBlock2D")


def _unet(widths: tuple[int, ...], attention: tuple[bool, ...], **config: object) -> Model:
    """A UNet by the widths of its levels, the widest last, and which of them have attention; wider for inpainting."""
    levels = [_WITH_ATTENTION if level else _WITHOUT for level in attention]
    config["block_out_channels"] = widths
    config["down_block_types"] = tuple(down for down, _ in levels)
    config["up_block_types"] = tuple(up for _, up in reversed(levels))
    inpainting = diffusers("UNet2DConditionModel", in_channels=9, **config)
    return replace(diffusers("UNet2DConditionModel", **config), wider=(inpainting,))


def _xl(added: int) -> dict[str, object]:
    """What the UNets of XL have in common; `added` is the width of the text and size embeddings."""
    return {
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": added,
    }


def _prior(width: int, layers: tuple[int, int], heads: int) -> Model:
    """Stable Cascade's stage C."""
    return diffusers(
        "StableCascadeUNet",
        conditioning_dim=width,
        block_out_channels=(width, width),
        num_attention_heads=(heads, heads),
        down_num_layers_per_block=layers,
        up_num_layers_per_block=layers[::-1],
        clip_text_in_channels=1280,
        clip_image_in_channels=768,
        switch_level=(False,),
    )


_SD = ((320, 640, 1280, 1280), (True, True, True, False))

# (family, size) -> component -> its model.
CLASSES: dict[tuple[str, str | None], dict[str, Model]] = {
    ("sd15", None): {
        "unet": _unet(*_SD, cross_attention_dim=768, attention_head_dim=8),
        "text_encoder": text.CLIP_L,
    },
    ("sd21", None): {
        "unet": _unet(*_SD, cross_attention_dim=1024, attention_head_dim=(5, 10, 20, 20), use_linear_projection=True),
        "text_encoder": text.CLIP_H,
    },
    ("sdxl", None): {
        "unet": _unet(
            (320, 640, 1280),
            (False, True, True),
            cross_attention_dim=2048,
            attention_head_dim=(5, 10, 20),
            transformer_layers_per_block=(1, 2, 10),
            **_xl(2816),
        ),
        "text_encoder": text.CLIP_L,
        "text_encoder_2": text.CLIP_G,
    },
    ("sdxl-refiner", None): {
        "unet": _unet(
            (384, 768, 1536, 1536),
            (False, True, True, False),
            cross_attention_dim=1280,
            attention_head_dim=(6, 12, 24, 24),
            transformer_layers_per_block=4,
            **_xl(2560),
        ),
        "text_encoder_2": text.CLIP_G,
    },
    ("cascade", "3.6b"): {"prior": _prior(2048, (8, 24), 32), "text_encoder": text.CLIP_G},
    ("cascade", "1b"): {"prior": _prior(1536, (4, 12), 24), "text_encoder": text.CLIP_G},
}


def _ldm(**config: object) -> Converter:
    config = {"layers_per_block": 2, **config}
    return Converter(
        "convert_ldm_unet_checkpoint", "model.diffusion_model.", component="unet", arguments={"config": config}
    )


def _stage_c() -> Converter:
    return Converter("convert_stable_cascade_unet_single_file_to_diffusers", component="prior", joined=("in_proj",))


CONVERTERS: dict[tuple[str, str | None], Converter] = {
    ("sd15", None): _ldm(),
    ("sd21", None): _ldm(),
    ("sdxl", None): _ldm(addition_embed_type="text_time"),
    ("sdxl-refiner", None): _ldm(addition_embed_type="text_time"),
    ("cascade", "3.6b"): _stage_c(),
    ("cascade", "1b"): _stage_c(),
}
