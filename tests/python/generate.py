"""FLUX.1 LoRA files that are in nobody's collection: random modules, ranks, alphas, spellings and kinds.

Everything follows from the seed. A spelling is a point in (prefix, module vocabulary, suffix); trainers mix
these, so the generator does. Names come from the oracle's hand-written map; what a file means, from
`oracle.reference`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from flux_map import SHAPES, TEXT_ENCODERS, TRANSFORMER, Target
from tensorfile import save

KOHYA = (".lora_down.weight", ".lora_up.weight")
PEFT = (".lora_A.weight", ".lora_B.weight")
NAMED = (".lora_A.default.weight", ".lora_B.default.weight")
OLD = (".lora.down.weight", ".lora.up.weight")
XLABS = (".down.weight", ".up.weight")


def _flat(prefix: str, tail: str = "") -> Callable[[str], str]:
    return lambda path: prefix + path.replace(".", "_") + tail


def _dotted(prefix: str) -> Callable[[str], str]:
    return lambda path: prefix + path


@dataclass(frozen=True)
class Spelling:
    """How one tool names things; it has no prefix for text encoders that it does not train."""

    vocabulary: str
    transformer: Callable[[str], str]
    suffixes: tuple[str, str]
    clip: Callable[[str], str] | None = None
    t5: Callable[[str], str] | None = None
    alpha: bool = False
    config_file: bool = False
    header_alpha: bool = False


SPELLINGS = {
    "kohya": Spelling("bfl", _flat("lora_unet_"), KOHYA, _flat("lora_te1_"), _flat("lora_te3_"), alpha=True),
    "kohya double underscore": Spelling("bfl", _flat("lora_unet__"), KOHYA, alpha=True),
    "kohya trailing underscore": Spelling("diffusers", _flat("lora_unet_", "_"), KOHYA, alpha=True),
    "kohya diffusers names": Spelling("diffusers", _flat("lora_unet_"), KOHYA, _flat("lora_te1_"), alpha=True),
    "onetrainer": Spelling(
        "diffusers", _flat("lora_transformer_"), KOHYA, _flat("lora_te1_"), _flat("lora_te2_"), alpha=True
    ),
    "onetrainer numbered": Spelling("numbered", _dotted("transformer."), KOHYA, alpha=True),
    "comfyui": Spelling(
        "bfl",
        _dotted("diffusion_model."),
        KOHYA,
        _dotted("text_encoders.clip_l.transformer."),
        _dotted("text_encoders.t5xxl.transformer."),
        alpha=True,
    ),
    "aitoolkit": Spelling("bfl", _dotted("diffusion_model."), PEFT, alpha=True),
    "merged model": Spelling("bfl", _dotted("model.diffusion_model."), KOHYA, alpha=True),
    "diffusers": Spelling(
        "diffusers",
        _dotted("transformer."),
        PEFT,
        _dotted("text_encoder."),
        _dotted("text_encoder_2."),
        header_alpha=True,
    ),
    "diffusers with alpha": Spelling("diffusers", _dotted("transformer."), PEFT, _dotted("text_encoder."), alpha=True),
    "diffusers old": Spelling("diffusers", _dotted("transformer."), OLD),
    "diffusers bare": Spelling("diffusers", _dotted(""), PEFT),
    "named adapter": Spelling("diffusers", _dotted("transformer."), NAMED),
    "peft": Spelling("diffusers", _dotted("base_model.model."), PEFT, config_file=True),
    "peft transformer": Spelling("diffusers", _dotted("base_model.model.transformer."), PEFT, config_file=True),
    "peft original names": Spelling("bfl", _dotted("base_model.model."), PEFT, config_file=True),
    "bfl": Spelling("bfl", _dotted(""), PEFT),
    "xlabs": Spelling("xlabs", _dotted(""), XLABS),
}


def _vocabulary(path: str, targets: list[Target]) -> str:
    if "processor" in path:
        return "xlabs"
    if f"transformer.{path}" in SHAPES:
        return "diffusers"
    return "numbered" if path.rpartition(".")[0] in TRANSFORMER else "bfl"


def _paths(vocabulary: str) -> list[str]:
    """Module paths that a tool of this vocabulary writes."""
    found = {path: _vocabulary(path, targets) for path, targets in TRANSFORMER.items() if "distilled" not in path}
    if vocabulary == "numbered":  # single modules keep their original name, fused ones are numbered
        return [p for p, v in found.items() if v == "numbered" or (v == "bfl" and len(TRANSFORMER[p]) == 1)]
    return [path for path, kind in found.items() if kind == vocabulary]


def _size(targets: list[Target]) -> tuple[int, int]:
    out = sum(SHAPES[target.module][0] for target in targets)
    return out, SHAPES[targets[0].module][1] or 64


class Builder:
    """One random file in the making."""

    def __init__(
        self,
        seed: int,
        spelling: str,
        dtype: str = "F32",
        kind: str = "lora",
        text: bool = True,
        blocks: int | None = None,
    ) -> None:
        self.rng = np.random.default_rng([seed, sum(spelling.encode()), sum(kind.encode())])
        self.spelling, self.dtype, self.kind, self.text = SPELLINGS[spelling], dtype, kind, text
        self.block_limit = blocks
        self.tensors: dict[str, tuple[np.ndarray, str]] = {}
        self.metadata: dict[str, str] = {}
        self.config: dict[str, object] | None = None
        self.ranks: dict[str, int] = {}
        self.alpha_shape = () if self.rng.integers(2) else (1,)
        self.alpha_dtype = str(self.rng.choice(["F32", "BF16", "I64"]))

    def _random(self, *shape: int) -> np.ndarray:
        return self.rng.standard_normal(shape, np.float32) * np.float32(0.02)

    def _put(self, key: str, values: np.ndarray, dtype: str | None = None) -> None:
        self.tensors[key] = values, dtype or self.dtype

    def _put_alpha(self, name: str, rank: int) -> None:
        if self.spelling.alpha and self.rng.random() < 0.8:
            choices = [1, 2, 3, 4, 6, 12, 24]
            alpha = float(self.rng.choice([value for value in choices if value != rank]))
            self._put(f"{name}.alpha", np.full(self.alpha_shape, alpha), self.alpha_dtype)

    def add(self, name: str, out: int, in_: int) -> int:
        rank = int(self.rng.integers(1, 7))
        if self.kind == "loha":
            for number in "12":
                self._put(f"{name}.hada_w{number}_a", self._random(out, rank))
                self._put(f"{name}.hada_w{number}_b", self._random(rank, in_))
        else:
            down, up = self.spelling.suffixes
            self._put(name + down, self._random(rank, in_))
            self._put(name + up, self._random(out, rank))
        if self.kind == "dora":
            values = np.abs(self._random(out, 1)) + np.float32(1)
            peft = self.spelling.suffixes == PEFT
            self._put(name + (".lora_magnitude_vector" if peft else ".dora_scale"), values[:, 0] if peft else values)
        if self.kind == "bias":
            self._put(name + (".lora_B.bias" if self.spelling.suffixes == PEFT else ".diff_b"), self._random(out))
        self._put_alpha(name, rank)
        return rank

    def add_full(self, name: str, out: int, in_: int) -> None:
        self._put(f"{name}.diff", self._random(out, in_))
        self._put(f"{name}.diff_b", self._random(out))

    def _within(self, path: str) -> bool:
        number = re.search(r"blocks\.(\d+)\.", path)
        return number is None or self.block_limit is None or int(number[1]) < self.block_limit

    def modules(self) -> None:
        spelling = self.spelling
        paths = [path for path in _paths(spelling.vocabulary) if self._within(path)]
        # Always something from a block, with a width that says FLUX.
        blocks = [path for path in paths if path.startswith(("single", "double", "transformer_blocks"))]
        chosen = {str(path) for path in self.rng.choice(blocks, 3, replace=False)}
        chosen |= {str(path) for path in self.rng.choice(paths, int(self.rng.integers(1, 8)), replace=False)}
        for path in sorted(chosen, key=paths.index):
            self.ranks[path] = self.add(spelling.transformer(path), *_size(TRANSFORMER[path]))
        if self.kind == "full":
            whole = "single_blocks.4.modulation.lin" if spelling.vocabulary == "bfl" else "x_embedder"
            if whole not in chosen:
                self.add_full(spelling.transformer(whole), *_size(TRANSFORMER[whole]))
        if self.text and self.kind == "lora":
            for component, prefix in (("text_encoder", spelling.clip), ("text_encoder_2", spelling.t5)):
                if prefix:
                    names = list(TEXT_ENCODERS[component])
                    # diffusers cannot tell the format of a CLIP part without attention.
                    chosen_text = [
                        names[0],
                        *self.rng.choice(names[1:], int(self.rng.integers(1, 4)), replace=False),
                    ]
                    for path in chosen_text:
                        out, in_ = SHAPES[f"{component}.{path}"]
                        self.ranks[str(path)] = self.add(prefix(str(path)), out, int(in_ or 0))

    def side_alpha(self) -> None:
        """alpha outside the tensors: adapter_config.json or diffusers' header entry, at times with rsLoRA."""
        values: dict[str, object] = {"r": 4, "lora_alpha": 6, "use_rslora": bool(self.rng.integers(2))}
        values["rank_pattern"] = {path: rank for path, rank in self.ranks.items() if rank != 4}
        if self.rng.integers(2):
            values["alpha_pattern"] = {"attn.to_q": 3, "proj_out": 10}
        if self.spelling.config_file:
            self.config = {"peft_type": "LORA", **values}
        elif self.spelling.header_alpha and self.rng.random() < 0.7:
            components = ("transformer", "text_encoder") if self.text else ("transformer",)
            entries = {f"{name}.{key}": value for name in components for key, value in values.items()}
            self.metadata["lora_adapter_metadata"] = json.dumps(entries)

    def write(self, path: Path) -> Path:
        path.parent.mkdir(exist_ok=True)
        save(path, self.tensors, {"format": "pt", **self.metadata})
        if self.config is not None:
            (path.parent / "adapter_config.json").write_text(json.dumps(self.config))
        return path


def random_file(
    path: Path,
    seed: int,
    spelling: str,
    *,
    dtype: str = "F32",
    kind: str = "lora",
    text: bool = True,
    blocks: int | None = None,
) -> Path:
    """`blocks`: only the first so many of each kind."""
    builder = Builder(seed, spelling, dtype, kind, text, blocks)
    builder.modules()
    builder.side_alpha()
    return builder.write(path)
