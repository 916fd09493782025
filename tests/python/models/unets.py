"""Stable Diffusion 1, 2 and XL, Stable Cascade, and the text encoders of CLIP."""

from __future__ import annotations

from .build import Build, Converter, Shapes, diffusers, meta

_WITH_ATTENTION = ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D")
_WITHOUT = ("DownBlock2D", "UpBlock2D")


def _unet(widths: tuple[int, ...], attention: tuple[bool, ...], **config: object) -> Build:
    """A UNet by the widths of its levels, the widest last, and which of them have attention."""
    levels = [_WITH_ATTENTION if level else _WITHOUT for level in attention]
    return diffusers(
        "UNet2DConditionModel",
        block_out_channels=widths,
        down_block_types=tuple(down for down, _ in levels),
        up_block_types=tuple(up for _, up in reversed(levels)),
        **config,
    )


def _xl(added: int) -> dict[str, object]:
    """What the UNets of XL have in common; `added` is the width of the text and size embeddings."""
    return {
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": added,
    }


def _prior(width: int, layers: tuple[int, int], heads: int) -> Build:
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


def _clip(hidden: int, layers: int, heads: int, *, projected: bool = True) -> Build:
    """A text model of CLIP; its projection, where it has one, is as wide as the model.

    Without a projection its class is CLIPTextModel, which lost the `text_model.` before its names in transformers 5.6.
    """

    def make() -> object:
        import transformers

        config = transformers.CLIPTextConfig(
            hidden_size=hidden,
            intermediate_size=4 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            projection_dim=hidden,
        )
        return transformers.CLIPTextModelWithProjection(config)

    def build() -> Shapes:
        shapes = meta(make)()
        return {name: shape for name, shape in shapes.items() if projected or name != "text_projection.weight"}

    return build


_CLIP_L = _clip(768, 12, 12)
_CLIP_G = _clip(1280, 32, 20)
_CLIP_H = _clip(1024, 23, 16, projected=False)

_SD = ((320, 640, 1280, 1280), (True, True, True, False))

# (family, size) -> component -> the shapes of its parameters.
CLASSES: dict[tuple[str, str | None], dict[str, Build]] = {
    ("sd15", None): {
        "unet": _unet(*_SD, cross_attention_dim=768, attention_head_dim=8),
        "text_encoder": _CLIP_L,
    },
    ("sd21", None): {
        "unet": _unet(*_SD, cross_attention_dim=1024, attention_head_dim=(5, 10, 20, 20), use_linear_projection=True),
        "text_encoder": _CLIP_H,
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
        "text_encoder": _CLIP_L,
        "text_encoder_2": _CLIP_G,
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
        "text_encoder_2": _CLIP_G,
    },
    ("cascade", "3.6b"): {"prior": _prior(2048, (8, 24), 32), "text_encoder": _CLIP_G},
    ("cascade", "1b"): {"prior": _prior(1536, (4, 12), 24), "text_encoder": _CLIP_G},
}

# Paths of matrices that no adapter factors: looked up, not multiplied.
EMBEDDINGS: set[str] = set()


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
