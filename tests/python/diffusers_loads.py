"""What diffusers really does with a file: every tensor is marked, the file is loaded, and the marks are looked for.

Every tensor that counts (all but alpha) is filled with a number of its own, odd and exact in float32, with
alpha = rank; `load_lora_weights` then puts the values into the model's adapter layers, cut and renamed. A number
that is in no layer belongs to a tensor that was lost. The models have their published layout and no memory: their
weights are one zero seen through stride 0.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders import lora_pipeline
from peft.tuners.tuners_utils import BaseTunerLayer

import models

Listing = dict[str, list[int]]
FIXTURES = Path(__file__).parents[1] / "fixtures"

# family -> the mixin of its pipeline that loads adapters.
PIPELINES = {
    "flux1": "FluxLoraLoaderMixin",
    "chroma": "FluxLoraLoaderMixin",
    "flux2": "Flux2LoraLoaderMixin",
    "sd15": "StableDiffusionLoraLoaderMixin",
    "sd21": "StableDiffusionLoraLoaderMixin",
    "sdxl": "StableDiffusionXLLoraLoaderMixin",
    "sdxl-refiner": "StableDiffusionXLLoraLoaderMixin",
    "sd3": "SD3LoraLoaderMixin",
    "sd35": "SD3LoraLoaderMixin",
    "qwen-image": "QwenImageLoraLoaderMixin",
    "z-image": "ZImageLoraLoaderMixin",
    "wan": "WanLoraLoaderMixin",
    "hunyuan-video": "HunyuanVideoLoraLoaderMixin",
    "ltx-video": "LTXVideoLoraLoaderMixin",
    "ltx2": "LTX2LoraLoaderMixin",
    "lumina2": "Lumina2LoraLoaderMixin",
    "hidream": "HiDreamImageLoraLoaderMixin",
    "sana": "SanaLoraLoaderMixin",
    "auraflow": "AuraFlowLoraLoaderMixin",
    "cogvideox": "CogVideoXLoraLoaderMixin",
    "mochi": "Mochi1LoraLoaderMixin",
    "krea2": "Krea2LoraLoaderMixin",
    "anima": "AnimaLoraLoaderMixin",
    "ideogram4": "Ideogram4LoraLoaderMixin",
    "ace-step": "AceStepLoraLoaderMixin",
}


def hollow(build: Callable[[], Any]) -> torch.nn.Module:
    """The model that `build` makes, with stride-0 zeros for matrices."""
    with torch.device("meta"):
        model = build()
    for name, parameter in list(model.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        zeros = torch.zeros(1).expand(parameter.shape) if parameter.ndim > 1 else torch.zeros(parameter.shape)
        setattr(model.get_submodule(owner), leaf, torch.nn.Parameter(zeros, requires_grad=False))
    for name, buffer in list(model.named_buffers()):
        owner, _, leaf = name.rpartition(".")
        values = torch.zeros(buffer.shape, dtype=buffer.dtype)
        model.get_submodule(owner).register_buffer(leaf, values, persistent=False)
    return model


def mixin(family: str) -> type:
    """The class that loads the family's adapters."""
    return getattr(lora_pipeline, PIPELINES[family])


def main_component(family: str) -> str:
    """What the pipeline calls the model that is not one of its helpers."""
    return "unet" if hasattr(mixin(family), "unet_name") else "transformer"


def size_of(family: str, size: str | None) -> dict[str, models.Model]:
    """The family's models in a size; in its first one, if none is named."""
    if (family, size) in models.CLASSES:
        return models.CLASSES[family, size]
    assert size is None, f"{family} has no size {size}"
    return next(parts for (name, _), parts in models.CLASSES.items() if name == family)


def pipeline(family: str, size: str | None, make: Callable[[], Any]) -> Any:
    """The part of the family's pipeline that loads adapters, around the main model that `make` builds.

    All models are new ones: loading may widen layers and set vectors, and both stay.
    """
    loader, main = mixin(family), main_component(family)
    known = size_of(family, size)
    # A second transformer of the same shape is loaded only on request.
    named = [name for name in loader._lora_loadable_modules if name in known and known[name] is not known[main]]
    made = type("Pipeline", (loader,), {"hf_device_map": None, "lora_scale": 1.0})()
    # Pipelines of models that lack a part (the refiner has one text encoder) hold nothing in its place.
    vars(made).update(dict.fromkeys(loader._lora_loadable_modules), components={})
    vars(made).update({name: hollow(known[name].published()[0]) for name in named}, **{main: hollow(make)})
    return made


@dataclass(frozen=True)
class Outcome:
    """What became of a file's tensors; `error` where loading stopped."""

    loaded: frozenset[str]
    lost: frozenset[str]
    error: str | None

    @property
    def answer(self) -> str:
        if self.error is not None or not self.loaded:
            return "no"
        return "part" if self.lost else "yes"


def _small(key: str, shape: list[int], rank: int) -> list[int]:
    """The shape with the rank's axis shortened, where the key has one."""
    first = (".lora_down.", ".lora_A", ".lora.down.", "_lora.down.", ".down.weight", "_w1_b", "_w2_b")
    second = (".lora_up.", ".lora_B.", ".lora.up.", "_lora.up.", ".up.weight", "_w1_a", "_w2_a")
    shape = list(shape)
    if key.endswith(".bias") or len(shape) < 2:
        return shape
    if any(mark in key for mark in first):
        shape[0] = min(rank, shape[0])
    elif any(mark in key for mark in second):
        shape[1] = min(rank, shape[1])
    return shape


def marked(listing: Listing, rank: int = 2) -> tuple[dict[str, torch.Tensor], dict[float, str]]:
    """Tensors of these keys, each filled with its own odd number; and the numbers' keys."""
    tensors, marks = {}, {}
    for number, (key, shape) in enumerate(listing.items()):
        if key.endswith(".alpha"):
            tensors[key] = torch.full(shape, float(rank))
            continue
        mark = float(2 * number + 3)
        tensors[key] = torch.full(_small(key, shape, rank), mark)
        marks[mark] = key
    return tensors, marks


def _values(pipe: Any) -> set[float]:
    """Every number in the adapter layers, and in the vectors that were set."""
    found: set[float] = set()
    for part in vars(pipe).values():
        if not isinstance(part, torch.nn.Module):
            continue
        for module in part.modules():
            if isinstance(module, BaseTunerLayer):
                for name, parameter in module.named_parameters():
                    if not name.startswith("base_layer.") and not parameter.is_meta:
                        found |= set(parameter.detach().unique().tolist())
        norms = getattr(part, "_transformer_norm_layers", None)
        for parameter in part.parameters() if norms else ():
            if parameter.ndim == 1 and not parameter.is_meta:
                found |= set(parameter.detach().unique().tolist())
    return found


def _loaded(pipe: Any, listing: Listing) -> Outcome:
    tensors, marks = marked(listing)
    try:
        pipe.load_lora_weights(tensors)
    except Exception as error:  # any way of failing is the answer
        return Outcome(frozenset(), frozenset(marks.values()), f"{type(error).__name__}: {error}")
    found = _values(pipe)
    loaded = frozenset(key for mark, key in marks.items() if mark in found)
    return Outcome(loaded, frozenset(marks.values()) - loaded, None)


def load(family: str, listing: Listing, size: str | None = None) -> Outcome:
    """Load a file of these keys and shapes with diffusers, for real.

    Where a size has models that differ (inpainting, image to video), a file is for the one that takes most of it.
    """
    best = None
    for make in size_of(family, size)[main_component(family)].published():
        outcome = _loaded(pipeline(family, size, make), listing)
        if best is None or len(outcome.loaded) > len(best.loaded):
            best = outcome
        if best.answer == "yes":
            break
    assert best is not None
    return best


def fixtures() -> list[dict[str, Any]]:
    """The key listings beside the tests, of families that diffusers has."""
    listings = [json.loads(path.read_text()) for path in sorted(FIXTURES.glob("*.json"))]
    return [listing for listing in listings if listing["family"].replace("_", "-") in PIPELINES]


def fixture(name: str) -> dict[str, Any]:
    """The key listing of that name."""
    return json.loads((FIXTURES / f"{name}.json").read_text())


# -------------------------------------------------------------------------------- made files

# dialect -> prefix for the model, whether names are flattened, suffixes of the pair.
_SPELLED = {
    "diffusers": ("{component}.", False, (".lora_A.weight", ".lora_B.weight")),
    "peft": ("base_model.model.", False, (".lora_A.weight", ".lora_B.weight")),
    "comfyui": ("diffusion_model.", False, (".lora_down.weight", ".lora_up.weight")),
    "aitoolkit": ("diffusion_model.", False, (".lora_A.weight", ".lora_B.weight")),
    "kohya": ("lora_unet_", True, (".lora_down.weight", ".lora_up.weight")),
    "onetrainer": ("lora_{component}_", True, (".lora_down.weight", ".lora_up.weight")),
    "lycoris": ("lycoris_", True, (".lora_down.weight", ".lora_up.weight")),
}


def _tensors(kind: str, dialect: str, rows: int, columns: list[int]) -> Listing:
    """Suffix -> shape of one module's tensors."""
    down, up = _SPELLED[dialect][2]
    kernel = columns[1:]
    pair = {down: [2, *columns], up: [rows, 2, *(1 for _ in kernel)]}
    wide = math.prod(columns)
    if dialect in ("kohya", "onetrainer", "lycoris"):
        pair[".alpha"] = []
    if kind == "lora":
        return pair
    if kind == "dora":
        plain = dialect in ("diffusers", "peft")
        return {**pair, (".lora_magnitude_vector" if plain else ".dora_scale"): [rows] if plain else [rows, 1]}
    if kind == "loha":
        return {".alpha": [], ".hada_w1_a": [rows, 2], ".hada_w1_b": [2, wide], ".hada_w2_a": [rows, 2],
                ".hada_w2_b": [2, wide]}  # fmt: skip
    if kind == "lokr":
        return {".lokr_w1": [2, 2], ".lokr_w2": [rows // 2, columns[0] // 2, *kernel]}
    return {".diff": [rows, *columns]}


def made(family: str, dialect: str, kind: str = "lora") -> Listing:
    """A file with the model's own module names: the first block of each kind, and all modules outside the blocks."""
    component = main_component(family)
    model = hollow(size_of(family, None)[component].published()[0])
    prefix, flat, _ = _SPELLED[dialect]
    listing: Listing = {}
    for name, module in model.named_modules():
        layer = isinstance(module, torch.nn.Linear | torch.nn.Conv2d) and name
        numbers = [int(part) for part in name.split(".")[1:2] if part.isdigit()]
        # Adapters of depthwise convolutions are not made: PEFT asks for a rank that is a multiple of the groups.
        if not layer or any(numbers) or getattr(module, "groups", 1) > 1:
            continue
        if kind == "dora" and not isinstance(module, torch.nn.Linear):
            continue
        rows, *columns = module.weight.shape
        path = prefix.format(component=component) + (name.replace(".", "_") if flat else name)
        listing |= {path + suffix: shape for suffix, shape in _tensors(kind, dialect, rows, columns).items()}
    return listing
