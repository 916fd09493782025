"""Other models than FLUX.1 by the same mechanism: small ones of diffusers' classes, with tables of their sizes."""

from __future__ import annotations

import copy
import functools
import re
import subprocess
import sys
import types
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn

pytest.importorskip("diffusers", reason="diffusers is not installed")

import lorafmt
import lorafmt.diffusers
from lorafmt import LorafmtError, runtime
from lorafmt.runtime import BranchLinear, FusedLinear


@dataclass(frozen=True)
class Case:
    """A class in small: how it is made and called, and the sizes of its family's table that it has in their place."""

    family: str
    component: str
    build: Callable[[], nn.Module]
    inputs: Callable[[torch.dtype], dict[str, Any]]
    sizes: dict[int, int]
    #: A quantized layer, and one that stays in 16 bits.
    int8: str
    sixteen: str


def qwen() -> nn.Module:
    from diffusers import QwenImageTransformer2DModel

    return QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=64,
        num_attention_heads=2,
        joint_attention_dim=64,
        axes_dims_rope=(16, 24, 24),
    )


def qwen_inputs(dtype: torch.dtype) -> dict[str, Any]:
    return {
        "hidden_states": tiny.normal(7, 1, 16, 16).to(dtype),
        "encoder_hidden_states": tiny.normal(8, 1, 5, 64).to(dtype),
        "encoder_hidden_states_mask": torch.ones(1, 5, dtype=torch.long),
        "timestep": torch.tensor([0.5], dtype=dtype),
        "img_shapes": [[(1, 4, 4)]],
        "return_dict": False,
    }


def sdxl() -> nn.Module:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64, 128),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=2,
        transformer_layers_per_block=(1, 1, 2),
        attention_head_dim=(2, 2, 4),
        cross_attention_dim=48,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=80,
        norm_num_groups=8,
    )


def sdxl_inputs(dtype: torch.dtype) -> dict[str, Any]:
    return {
        "sample": tiny.normal(7, 1, 4, 8, 8).to(dtype),
        "timestep": torch.tensor([500.0], dtype=dtype),
        "encoder_hidden_states": tiny.normal(8, 1, 5, 48).to(dtype),
        "added_cond_kwargs": {
            "text_embeds": tiny.normal(9, 1, 32).to(dtype),
            "time_ids": tiny.normal(10, 1, 6).to(dtype),
        },
        "return_dict": False,
    }


CASES = {
    "qwen-image": Case(
        "qwen-image",
        "transformer",
        qwen,
        qwen_inputs,
        {3072: 128, 12288: 512, 18432: 768, 6144: 256, 3584: 64, 64: 16, 128: 64},
        "transformer_blocks.1.img_mlp.net.2",
        "transformer_blocks.0.img_mod.1",
    ),
    "sdxl": Case(
        "sdxl",
        "unet",
        sdxl,
        sdxl_inputs,
        {320: 32, 640: 64, 1280: 128, 1920: 192, 960: 96, 2560: 256, 5120: 512, 10240: 1024, 2816: 80, 2048: 48},
        "down_blocks.2.attentions.0.transformer_blocks.1.attn2.to_k",
        "time_embedding.linear_2",
    ),
}


@functools.cache
def register(name: str) -> str:
    """The family with the small sizes, under a name of its own."""
    case = CASES[name]
    text = (tiny.ROOT / f"rust/core/data/families/{case.family}.toml").read_text(encoding="utf-8")
    text = text.replace(f'name = "{case.family}"', f'name = "tiny-{case.family}"')
    # Convolutions' inputs stay: they are no sizes of linears.
    number = r"(?<=[ [])(\d{2,5})(?=[, \]\n])"
    text = re.sub(number, lambda found: str(case.sizes.get(int(found[0]), found[0])), text)
    lorafmt.register_table(text)
    return f"tiny-{case.family}"


@functools.cache
def built(name: str) -> nn.Module:
    model = CASES[name].build()
    with torch.no_grad():
        for number, (path, parameter) in enumerate(model.named_parameters()):
            scale = 1 / parameter[0].numel() ** 0.5 if parameter.dim() > 1 else 0.1
            one = parameter.dim() == 1 and "norm" in path and path.endswith("weight")
            parameter.copy_(tiny.normal(number, *parameter.shape) * scale + int(one))
    return model.to(torch.bfloat16).eval()


@functools.cache
def quantized(name: str) -> Any:
    model = copy.deepcopy(built(name))
    runtime.quantize_(model, rank=8, ranks=32)
    # The table of the class is of the full size.
    model.adapters = runtime.Adapters(model, family=register(name), component=CASES[name].component)
    return model


def adapter(name: str, seed: int, size: float = 0.05) -> dict[str, Tensor]:
    """A diffusers file for every linear."""
    shapes = tiny.linears(built(name))
    tensors = tiny.lora(seed, rank=4, shapes=shapes, size=size)
    return {key.replace("transformer.", f"{CASES[name].component}.", 1): value for key, value in tensors.items()}


@torch.no_grad()
def run(name: str, model: nn.Module, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return model(**CASES[name].inputs(dtype))[0]


@torch.no_grad()
def merged(name: str, tensors: dict[str, Tensor], strength: float) -> nn.Module:
    """The model in float64 with an adapter added to its weights: nothing of lorafmt computes here."""
    out = copy.deepcopy(built(name)).double()
    for key, down in tensors.items():
        if key.endswith(".lora_A.weight"):
            path = key.removeprefix(f"{CASES[name].component}.").removesuffix(".lora_A.weight")
            up = tensors[key.replace("lora_A", "lora_B")]
            out.get_submodule(path).weight += strength * up.double() @ down.double()
    return out


@pytest.mark.parametrize("name", CASES)
def test_adapters_act_as_if_merged(name: str) -> None:
    case, model = CASES[name], quantized(name)
    assert isinstance(model.get_submodule(case.int8), FusedLinear)
    assert isinstance(model.get_submodule(case.sixteen), BranchLinear)
    before = run(name, model)
    base = tiny.distance(before, run(name, built(name).double(), torch.float64))
    tensors = adapter(name, 3)
    model.load_lora_adapter(tensors, adapter_name="a")
    model.set_adapters("a", 0.7)
    assert model.get_list_adapters() == {case.component: ["a"]}
    want = run(name, merged(name, tensors, 0.7), torch.float64)
    assert tiny.distance(want, before) > 4 * base, "an adapter that does nothing shows nothing"
    assert tiny.distance(run(name, model), want) <= 1.1 * base
    model.delete_adapters("a")
    assert torch.equal(run(name, model), before)


@pytest.mark.parametrize("name", CASES)
def test_strengths_by_place_and_other_dialects(name: str) -> None:
    case, model = CASES[name], quantized(name)
    tensors = adapter(name, 4)
    model.load_lora_adapter(tensors, adapter_name="a")
    model.set_adapters("a", {case.int8: 0.0})
    one = {key: buffer.clone() for key, buffer in model.named_buffers()}
    # The same adapter as kohya's trainer would write it.
    as_kohya = lorafmt.convert(tensors, to="kohya", family=register(name)).to_torch()
    model.load_lora_adapter(as_kohya, adapter_name="a", hotswap=True)
    model.set_adapters("a", {case.int8: 0.0})
    assert all(torch.equal(one[key], buffer) for key, buffer in model.named_buffers())
    down = tensors[f"{case.component}.{case.int8}.lora_A.weight"]
    without = {key: value for key, value in tensors.items() if case.int8 not in key}
    here = run(name, model)
    model.delete_adapters("a")
    model.load_lora_adapter(without, adapter_name="b")
    assert down.numel() and torch.equal(run(name, model), here)
    model.delete_adapters("b")


def test_convolutions_have_no_room() -> None:
    model = quantized("sdxl")
    before = run("sdxl", model)
    path = "down_blocks.1.resnets.0.conv1"
    conv = {
        f"unet.{path}.lora_A.weight": tiny.normal(1, 4, 32, 3, 3).bfloat16(),
        f"unet.{path}.lora_B.weight": tiny.normal(2, 64, 4, 1, 1).bfloat16(),
    }
    with pytest.raises(LorafmtError, match=path):
        model.load_lora_adapter({**adapter("sdxl", 5), **conv}, adapter_name="c")
    assert torch.equal(run("sdxl", model), before) and not model.get_list_adapters()
    with pytest.warns(match="conv1"):
        model.load_lora_adapter({**adapter("sdxl", 5), **conv}, adapter_name="c", lossy="allow")
    assert not torch.equal(run("sdxl", model), before)
    model.delete_adapters("c")


class Pipe:
    """What `load_lora` needs of a pipeline with two text encoders, and what was asked of it."""

    _lora_loadable_modules = ("unet", "text_encoder", "text_encoder_2")
    lora_scale = 1.0

    def __init__(self) -> None:
        self.text_encoder = self.text_encoder_2 = self.unet = self
        self.adapters = object()
        self.calls: list[tuple[str, int]] = []

    def load_lora_adapter(self, adapter: lorafmt.Adapter, **options: Any) -> Any:
        self.calls.append((options["lossy"], sum(not path.startswith("text_encoder") for path in adapter)))
        return types.SimpleNamespace(left_out=["down_blocks.1.resnets.0.conv1"] if options["lossy"] == "allow" else [])

    def load_lora_into_text_encoder(self, tensors: dict[str, Tensor], *, prefix: str, **_: Any) -> None:
        self.calls.append((prefix, sum(key.startswith(f"{prefix}.") for key in tensors)))


def test_both_text_encoders_of_a_pipeline_are_loaded(tmp_path: Path) -> None:
    path = tmp_path / "sdxl.safetensors"
    words = ("sample", "--family", "sdxl", "--dialect", "kohya", "--rank", "1", "--text-encoders", "-o", str(path))
    subprocess.run([sys.executable, "-m", "lorafmt", *words], check=True)
    pipe = Pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lorafmt.diffusers.load_lora(pipe, path, "a")
    assert [name for name, _ in pipe.calls] == ["error", "text_encoder", "text_encoder_2"]
    assert all(count > 100 for _, count in pipe.calls)
    with pytest.warns(match="conv1"):
        lorafmt.diffusers.load_lora(pipe, path, "b", lossy="allow")
