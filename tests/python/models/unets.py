"""Stable Diffusion 1, 2 and XL, Stable Cascade, and the text encoders of CLIP."""

from __future__ import annotations

from .build import Build

CLASSES: dict[tuple[str, str | None], dict[str, Build]] = {}

EMBEDDINGS: set[str] = set()
