"""FLUX.1 and its descendants."""

from __future__ import annotations

from .build import Converter, diffusers

# (family, size) -> component -> the shapes of its parameters.
CLASSES = {
    ("flux1", None): {"transformer": diffusers("FluxTransformer2DModel", guidance_embeds=True)},
    ("chroma", None): {"transformer": diffusers("ChromaTransformer2DModel")},
}

# Paths of matrices that no adapter factors: looked up, not multiplied.
EMBEDDINGS: set[str] = set()

CONVERTERS = {
    ("flux1", None): Converter("convert_flux_transformer_checkpoint_to_diffusers"),
    ("chroma", None): Converter("convert_chroma_transformer_checkpoint_to_diffusers"),
}
