"""What diffusers really does with a file: every tensor is marked, the file is loaded, and the marks are looked for.

Every tensor that counts (all but alpha) is filled with a number of its own, odd and exact in float32, with
alpha = rank; `load_lora_weights` then puts the values into the model's adapter layers, cut and renamed. A number
that is in no layer belongs to a tensor that was lost. The models have their published layout and no memory: their
weights are one zero seen through stride 0.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers.loaders import lora_pipeline
from peft.tuners.tuners_utils import BaseTunerLayer

FIXTURES = Path(__file__).parents[1] / "fixtures"

# SDXL's and SD 1.5's published configs, where the class's defaults differ.
_SD15 = {"cross_attention_dim": 768}
_SDXL = {
    "cross_attention_dim": 2048,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
_SD35 = {"num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432, "qk_norm": "rms_norm"}
_HIDREAM = {
    "patch_size": 2,
    "in_channels": 16,
    "num_layers": 16,
    "num_single_layers": 32,
    "num_attention_heads": 20,
    "caption_channels": [4096, 4096],
    "text_emb_dim": 2048,
    "num_routed_experts": 4,
    "num_activated_experts": 2,
    "axes_dims_rope": (64, 32, 32),
    "max_resolution": (128, 128),
    "llama_layers": [0, 1],
}

# family -> loader mixin, model class, config where it is not the class's default.
PIPELINES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "flux1": ("FluxLoraLoaderMixin", "FluxTransformer2DModel", {"guidance_embeds": True}),
    "chroma": ("FluxLoraLoaderMixin", "ChromaTransformer2DModel", {}),
    "flux2": ("Flux2LoraLoaderMixin", "Flux2Transformer2DModel", {}),
    "sd15": ("StableDiffusionLoraLoaderMixin", "UNet2DConditionModel", _SD15),
    "sd21": ("StableDiffusionLoraLoaderMixin", "UNet2DConditionModel", {"cross_attention_dim": 1024}),
    "sdxl": ("StableDiffusionXLLoraLoaderMixin", "UNet2DConditionModel", _SDXL),
    "sd3": ("SD3LoraLoaderMixin", "SD3Transformer2DModel", _SD35),
    "qwen-image": ("QwenImageLoraLoaderMixin", "QwenImageTransformer2DModel", {}),
    "z-image": ("ZImageLoraLoaderMixin", "ZImageTransformer2DModel", {}),
    "wan": ("WanLoraLoaderMixin", "WanTransformer3DModel", {}),
    "hunyuan-video": ("HunyuanVideoLoraLoaderMixin", "HunyuanVideoTransformer3DModel", {}),
    "ltx-video": ("LTXVideoLoraLoaderMixin", "LTXVideoTransformer3DModel", {}),
    "ltx2": ("LTX2LoraLoaderMixin", "LTX2VideoTransformer3DModel", {}),
    "lumina2": ("Lumina2LoraLoaderMixin", "Lumina2Transformer2DModel", {}),
    "hidream": ("HiDreamImageLoraLoaderMixin", "HiDreamImageTransformer2DModel", _HIDREAM),
    "sana": ("SanaLoraLoaderMixin", "SanaTransformer2DModel", {}),
    "auraflow": ("AuraFlowLoraLoaderMixin", "AuraFlowTransformer2DModel", {}),
    "cogvideox": ("CogVideoXLoraLoaderMixin", "CogVideoXTransformer3DModel", {}),
    "mochi": ("Mochi1LoraLoaderMixin", "MochiTransformer3DModel", {}),
    "krea2": ("Krea2LoraLoaderMixin", "Krea2Transformer2DModel", {}),
    "anima": (
        "AnimaLoraLoaderMixin",
        "CosmosTransformer3DModel",
        {"num_layers": 28, "num_attention_heads": 16, "text_embed_dim": 1024},
    ),
    "ideogram4": ("Ideogram4LoraLoaderMixin", "Ideogram4Transformer2DModel", {}),
    "ace-step": ("AceStepLoraLoaderMixin", "AceStepTransformer1DModel", {}),
}


def hollow(build) -> torch.nn.Module:
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


def _model(family: str) -> torch.nn.Module:
    """A new one for every file: loading may widen layers and set vectors, and both stay."""
    _, name, config = PIPELINES[family]
    return hollow(lambda: getattr(diffusers, name)(**config))


def _clip(hidden: int, layers: int) -> torch.nn.Module:
    config = transformers.CLIPTextConfig(
        hidden_size=hidden, intermediate_size=4 * hidden, num_hidden_layers=layers, num_attention_heads=hidden // 64
    )
    return hollow(lambda: transformers.CLIPTextModel(config))


def _clip_g() -> torch.nn.Module:
    config = transformers.CLIPTextConfig(
        hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20, projection_dim=1280
    )
    return hollow(lambda: transformers.CLIPTextModelWithProjection(config))


def _text_encoders(family: str) -> dict[str, torch.nn.Module]:
    if family in ("sdxl", "sd3"):
        return {"text_encoder": _clip(768, 12), "text_encoder_2": _clip_g()}
    if family in ("flux1", "sd15"):
        return {"text_encoder": _clip(768, 12)}
    return {}


def mixin(family: str) -> type:
    """The class that loads the family's adapters."""
    return getattr(lora_pipeline, PIPELINES[family][0])


def pipeline(family: str) -> Any:
    """The part of the family's pipeline that loads adapters."""
    loader = mixin(family)
    parts = {"text_encoder": None, "text_encoder_2": None, **_text_encoders(family)}
    name = "unet" if hasattr(loader, "unet_name") else "transformer"
    made = type("Pipeline", (loader,), {"hf_device_map": None, "lora_scale": 1.0})()
    vars(made).update(parts, **{name: _model(family)}, components={})
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


def marked(listing: dict[str, list[int]], rank: int = 2) -> tuple[dict[str, torch.Tensor], dict[float, str]]:
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


def load(family: str, listing: dict[str, list[int]]) -> Outcome:
    """Load a file of these keys and shapes with diffusers, for real."""
    tensors, marks = marked(listing)
    pipe = pipeline(family)
    try:
        pipe.load_lora_weights(tensors)
    except Exception as error:  # any way of failing is the answer
        return Outcome(frozenset(), frozenset(marks.values()), f"{type(error).__name__}: {error}")
    found = _values(pipe)
    loaded = frozenset(key for mark, key in marks.items() if mark in found)
    return Outcome(loaded, frozenset(marks.values()) - loaded, None)


def fixtures() -> list[dict[str, Any]]:
    """The key listings beside the tests, of families that diffusers has."""
    listings = [json.loads(path.read_text()) for path in sorted(FIXTURES.glob("*.json"))]
    return [listing for listing in listings if family_of(listing) in PIPELINES]


def fixture(name: str) -> dict[str, Any]:
    """The key listing of that name."""
    return json.loads((FIXTURES / f"{name}.json").read_text())


def family_of(listing: dict[str, Any]) -> str:
    return listing["family"].replace("_", "-")


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


def _tensors(kind: str, dialect: str, rows: int, columns: list[int]) -> dict[str, list[int]]:
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


def made(family: str, dialect: str, kind: str = "lora") -> dict[str, list[int]]:
    """A file with the model's own module names: the first block of each kind, and all modules outside the blocks."""
    model = _model(family)
    component = "unet" if hasattr(mixin(family), "unet_name") else "transformer"
    prefix, flat, _ = _SPELLED[dialect]
    listing: dict[str, list[int]] = {}
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
