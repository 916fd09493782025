"""A FLUX.1 that is small enough for every test: 128 wide, two heads, a block of each kind; and adapters for it."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lorafmt

ROOT = Path(__file__).resolve().parents[2]
FAMILY = "tiny-flux"
CONFIG: dict[str, Any] = {
    "patch_size": 1,
    "in_channels": 16,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 64,
    "num_attention_heads": 2,
    "joint_attention_dim": 64,
    "pooled_projection_dim": 32,
    "guidance_embeds": True,
    "axes_dims_rope": [16, 24, 24],
}
#: Sizes of FLUX.1 and of this model.
SIZES = {3072: 128, 12288: 512, 18432: 768, 9216: 384, 15360: 640, 6144: 256, 4096: 64, 768: 32, 64: 16, 128: 64}
QKV = tuple(f"transformer_blocks.0.attn.{leaf}" for leaf in ("to_q", "to_k", "to_v"))


@functools.cache
def register() -> str:
    """The family of FLUX.1 with this model's sizes, from the built-in table; its name."""
    text = (ROOT / "rust/core/data/families/flux1.toml").read_text(encoding="utf-8")
    text = text.replace('name = "flux1"', f'name = "{FAMILY}"').replace("[64, 128, 384]", "64")
    text = re.sub(r"(?<=[ [])(\d{2,5})(?=[, \]])", lambda found: str(SIZES.get(int(found[0]), found[0])), text)
    lorafmt.register_table(text)
    return FAMILY


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def model(seed: int = 0, dtype: torch.dtype = torch.bfloat16, **config: Any) -> nn.Module:
    """A random model whose layers are of one magnitude, none of them zeros."""
    from diffusers import FluxTransformer2DModel

    made = FluxTransformer2DModel(**{**CONFIG, **config})
    with torch.no_grad():
        for number, (name, parameter) in enumerate(made.named_parameters()):
            noise = normal(1000 * seed + number, *parameter.shape)
            scale = 1 / parameter.shape[-1] ** 0.5 if parameter.dim() > 1 else 0.1
            parameter.copy_(noise * scale + (1 if "norm_" in name and "linear" not in name else 0))
    return made.to(dtype).eval()


def inputs(seed: int = 7, dtype: torch.dtype = torch.bfloat16, size: int = 4, words: int = 5) -> dict[str, Any]:
    """What a step of a pipeline calls the model with."""
    ids = torch.zeros(size, size, 3)
    ids[..., 1], ids[..., 2] = torch.arange(size)[:, None], torch.arange(size)[None, :]
    return {
        "hidden_states": normal(seed, 1, size * size, CONFIG["in_channels"]).to(dtype),
        "encoder_hidden_states": normal(seed + 1, 1, words, CONFIG["joint_attention_dim"]).to(dtype),
        "pooled_projections": normal(seed + 2, 1, CONFIG["pooled_projection_dim"]).to(dtype),
        "timestep": torch.tensor([0.5], dtype=dtype),
        "guidance": torch.tensor([1.0], dtype=dtype),
        "img_ids": ids.view(-1, 3).to(dtype),
        "txt_ids": torch.zeros(words, 3, dtype=dtype),
        "return_dict": False,
    }


@torch.no_grad()
def run(transformer: nn.Module, seed: int = 7, dtype: torch.dtype = torch.bfloat16, **more: int) -> Tensor:
    return transformer(**inputs(seed, dtype, **more))[0]


def linears(transformer: nn.Module) -> dict[str, tuple[int, int]]:
    """Outputs and inputs of every linear of a plain model."""
    found = ((name, module) for name, module in transformer.named_modules() if isinstance(module, nn.Linear))
    return {name: (module.out_features, module.in_features) for name, module in found}


def lora(
    seed: int, rank: int = 4, only: str = "", shapes: dict[str, tuple[int, int]] | None = None, size: float = 0.3
) -> dict[str, Tensor]:
    """A diffusers file for every linear of the model whose path matches, as bfloat16."""
    chosen = {path: shape for path, shape in (shapes or sizes()).items() if re.search(only, path)}
    tensors = {}
    for number, (path, (outputs, inputs_)) in enumerate(chosen.items()):
        at = 10_000 * seed + 2 * number
        tensors[f"transformer.{path}.lora_A.weight"] = (normal(at, rank, inputs_) / inputs_**0.5).bfloat16()
        tensors[f"transformer.{path}.lora_B.weight"] = (normal(at + 1, outputs, rank) * size / rank**0.5).bfloat16()
    return tensors


@functools.cache
def sizes() -> dict[str, tuple[int, int]]:
    return linears(model())


@torch.no_grad()
def merged(transformer: nn.Module, *adapters: tuple[dict[str, Tensor], float]) -> nn.Module:
    """The model in float64 with adapters added to its weights and biases: nothing of lorafmt computes here."""
    out = type(transformer)(**{**CONFIG, **_config(transformer)}).double().eval()
    out.load_state_dict({key: value.double() for key, value in transformer.state_dict().items()})
    for tensors, strength in adapters:
        for key, down in tensors.items():
            path = key.removeprefix("transformer.").removesuffix(".lora_A.weight")
            if key.endswith(".lora_A.weight"):
                up = tensors[key.replace("lora_A", "lora_B")]
                out.get_submodule(path).weight += strength * up.double() @ down.double()
            elif key.endswith(".lora_B.bias"):
                path = key.removeprefix("transformer.").removesuffix(".lora_B.bias")
                out.get_submodule(path).bias += strength * down.double()
    return out


def _config(transformer: nn.Module) -> dict[str, Any]:
    return {key: transformer.config[key] for key in CONFIG}


def distance(got: Tensor, want: Tensor) -> float:
    """Relative L2 error."""
    return float(torch.linalg.norm(got.double() - want.double()) / torch.linalg.norm(want.double()))
