"""Transformers that make pictures."""

from __future__ import annotations

from .build import Build

CLASSES: dict[tuple[str, str | None], dict[str, Build]] = {}

EMBEDDINGS: set[str] = set()
