"""Small hand-made adapters: some modules, ranks and a spelling."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from flux_map import SHAPES, TRANSFORMER
from generate import KOHYA, PEFT
from native import layers_of, modulation_of
from tensorfile import save

Spell = Callable[[str], str]


def dotted(prefix: str = "") -> Spell:
    return lambda path: prefix + path


def flat(prefix: str) -> Spell:
    return lambda path: prefix + path.replace(".", "_")


DIFFUSERS = dotted("transformer.")
QKV = tuple(f"transformer_blocks.0.attn.{leaf}" for leaf in ("to_q", "to_k", "to_v"))
SINGLE = "single_transformer_blocks.0"
MODULES = {**dict.fromkeys(QKV, 4), "transformer_blocks.0.ff.net.0.proj": 4, "transformer_blocks.0.ff.net.2": 4}
"""Some modules with their ranks, under diffusers' names."""
ATTENTION = {"double_blocks.0.img_attn.qkv": 4, "double_blocks.0.txt_attn.proj": 4}
ORIGINAL = {**ATTENTION, "single_blocks.0.linear1": 4, "single_blocks.0.linear2": 4}
"""The same under original names."""
Extra = Mapping[str, tuple[np.ndarray, str]]


def noise(*shape: int, seed: int = 9) -> tuple[np.ndarray, str]:
    return np.random.default_rng([seed, *shape]).standard_normal(shape, np.float32) * np.float32(0.02), "F32"


def size(path: str) -> tuple[int, int]:
    """Outputs and inputs of a module under any of its dotted names."""
    targets = TRANSFORMER[path]
    out = targets[0].module if len(targets) == 1 else None
    return (SHAPES[out][0] if out else sum(SHAPES[t.module][0] for t in targets)), SHAPES[targets[0].module][1] or 64


def lora(
    path: Path,
    ranks: Mapping[str, int],
    spell: Spell = DIFFUSERS,
    suffixes: tuple[str, str] = PEFT,
    *,
    alpha: float | None = None,
    alpha_tensor: tuple[tuple[int, ...], str] = ((), "F32"),
    dtype: str = "BF16",
    seed: int = 0,
    shared: bool = False,
    width: int | None = None,
    extra: Extra | None = None,
    metadata: dict[str, str] | None = None,
    config: dict[str, object] | None = None,
) -> Path:
    """`shared`: modules of one rank and width have equal down factors. `width`: inputs of x_embedder."""
    tensors: dict[str, tuple[np.ndarray, str]] = {}
    for number, (module, rank) in enumerate(ranks.items()):
        out, in_ = size(module)
        in_ = width if width and module in ("x_embedder", "img_in") else in_
        first, second = (np.random.default_rng([seed, side, 0 if shared and not side else number]) for side in (0, 1))
        name = spell(module)
        tensors[name + suffixes[0]] = first.standard_normal((rank, in_), np.float32) * np.float32(0.02), dtype
        tensors[name + suffixes[1]] = second.standard_normal((out, rank), np.float32) * np.float32(0.02), dtype
        if alpha is not None:
            shape, alpha_dtype = alpha_tensor
            tensors[f"{name}.alpha"] = np.full(shape, alpha, np.float64), alpha_dtype
    path.parent.mkdir(parents=True, exist_ok=True)
    save(path, {**tensors, **(extra or {})}, metadata)
    if config is not None:
        (path.parent / "adapter_config.json").write_text(json.dumps(config))
    return path


def kohya(path: Path, ranks: Mapping[str, int], **options: object) -> Path:
    return lora(path, ranks, flat("lora_unet_"), KOHYA, **{"alpha": 1.0, **options})  # type: ignore[arg-type]


def everything(blocks: int = 1) -> dict[str, int]:
    """Every module of the first blocks, with ranks that differ."""
    names: dict[str, None] = {}
    for kind in ("transformer", "single_transformer"):
        for block in (f"{kind}_blocks.{number}" for number in range(blocks)):
            local = [*(module for layer in layers_of(block) for module in layer.modules), *modulation_of(block)]
            names |= dict.fromkeys(f"{block}.{module}" for module in local)
    return {name: 1 + number % 5 for number, name in enumerate(names)}
