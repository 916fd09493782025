"""Transformers that make pictures."""

from __future__ import annotations

from .build import Build, diffusers

CLASSES: dict[tuple[str, str | None], dict[str, Build]] = {
    ("qwen-image", None): {"transformer": diffusers("QwenImageTransformer2DModel")},
    ("z-image", None): {"transformer": diffusers("ZImageTransformer2DModel")},
}

EMBEDDINGS: set[str] = set()
