"""The twins of ``safetensors.torch``: the same names and arguments, plus ``dialect=``."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from . import _lorafmt
from ._sources import fill_torch, native_source
from .api import convert


def load_file(filename: str | os.PathLike[str], device: Any = "cpu", *, dialect: str | None = None) -> dict[str, Any]:
    """Loads the tensors of a file as new torch tensors on ``device``; with ``dialect``, converted on the way."""
    if dialect is None:
        return fill_torch(_lorafmt.Plan.raw(os.fspath(filename)), device)
    return convert(filename, to=dialect).to_torch(device)


def save_file(
    tensors: Mapping[str, Any],
    filename: str | os.PathLike[str],
    metadata: dict[str, str] | None = None,
    *,
    dialect: str | None = None,
) -> None:
    """Writes torch tensors to a file, atomically, replacing an existing one; with ``dialect``, converted on the way.

    Tensors may share storage, unlike in ``safetensors.torch``: each is written in full.
    """
    if dialect is None:
        plan, entries = _lorafmt.Plan.raw(native_source(tensors)), dict(metadata or {})
    else:
        plan = convert(tensors, to=dialect)._plan(dialect)
        entries = {**dict(plan.metadata()), **(metadata or {})}
    plan.write(os.fspath(filename), list(entries.items()), True)
