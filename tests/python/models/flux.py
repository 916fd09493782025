"""FLUX.1 and its descendants."""

from __future__ import annotations

from . import text
from .build import Converter, Model, diffusers

# (family, size) -> component -> its model.
CLASSES: dict[tuple[str, str | None], dict[str, Model]] = {
    ("flux1", None): {
        "transformer": diffusers("FluxTransformer2DModel", guidance_embeds=True),
        "text_encoder": text.CLIP_L,
        "text_encoder_2": text.T5_XXL,
    },
    ("chroma", None): {"transformer": diffusers("ChromaTransformer2DModel"), "text_encoder": text.T5_XXL},
}

CONVERTERS = {
    ("flux1", None): Converter("convert_flux_transformer_checkpoint_to_diffusers"),
    ("chroma", None): Converter("convert_chroma_transformer_checkpoint_to_diffusers"),
}
