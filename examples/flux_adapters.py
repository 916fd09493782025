"""A whole FLUX.1 pipeline on a CPU, without a download: random weights, tiny sizes, real code.

The same adapter, in the names of kohya's scripts, first in diffusers' pipeline as it is, then in the quantized model of
lorafmt.runtime, where it is loaded, scaled, exchanged and taken out without changing an address.

    python examples/flux_adapters.py
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from safetensors.torch import save_file

import lorafmt
import lorafmt.diffusers
from lorafmt import runtime

WIDTH, TEXT, POOLED = 128, 64, 32

# lorafmt knows FLUX.1 by its sizes. A model of other sizes is a family of its own; yours needs nothing of this.
lorafmt.register_table("""
name = "example-flux"
title = "FLUX.1, tiny"
dialects = ["diffusers", "kohya"]
[blocks]
double = 1
single = 1
[[component]]
name = "transformer"
namespaces = ["diffusers", "original"]
rows = [
  { diffusers = "transformer_blocks.{double}.attn.{to_q,to_k,to_v}", op = "fuse", in = 128, out = [128, 128, 128],
    original = "double_blocks.{double}.img_attn.qkv" },
  { diffusers = "single_transformer_blocks.{single}.proj_out", in = 640, out = 128,
    original = "single_blocks.{single}.linear2" },
]
""")


def pipeline() -> FluxPipeline:
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=64,
        num_attention_heads=2,
        joint_attention_dim=TEXT,
        pooled_projection_dim=POOLED,
        axes_dims_rope=(16, 24, 24),
    )
    # diffusers makes the last layers zeros, for training.
    for parameter in transformer.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.05)
    vae = AutoencoderKL(latent_channels=4, block_out_channels=(32,), norm_num_groups=8, shift_factor=0.0)
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae,
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=transformer.to(torch.bfloat16).eval(),
    )


def image(pipe: FluxPipeline) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    prompt = torch.randn(1, 6, TEXT, generator=generator).bfloat16()
    pooled = torch.randn(1, POOLED, generator=generator).bfloat16()
    pipe.set_progress_bar_config(disable=True)
    out = pipe(
        prompt_embeds=prompt,
        pooled_prompt_embeds=pooled,
        height=16,
        width=16,
        num_inference_steps=2,
        generator=generator,
        output_type="latent",
    )
    return out.images.float()


def adapter(path: Path, seed: int) -> Path:
    torch.manual_seed(seed)
    tensors = {}
    for name, outputs, inputs in (
        ("lora_unet_double_blocks_0_img_attn_qkv", 3 * WIDTH, WIDTH),
        ("lora_unet_single_blocks_0_linear2", WIDTH, 5 * WIDTH),
    ):
        tensors[f"{name}.lora_down.weight"] = torch.randn(4, inputs) / inputs**0.5
        tensors[f"{name}.lora_up.weight"] = torch.randn(outputs, 4)
        tensors[f"{name}.alpha"] = torch.tensor(16.0)
    save_file(tensors, path)
    return path


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(torch.linalg.norm(a - b) / torch.linalg.norm(b))


@torch.no_grad()
def main() -> dict[str, float]:
    folder = Path(tempfile.mkdtemp())
    style, other = adapter(folder / "style.safetensors", 1), adapter(folder / "other.safetensors", 2)

    pipe = pipeline()
    plain = image(pipe)
    report = lorafmt.diffusers.load_lora(pipe, style, "style", strength=0.8, family="example-flux")
    styled = image(pipe)
    print(f"diffusers: {report.tensors.used} tensors, the image changes by {distance(styled, plain):.3f}")

    pipe = pipeline()
    model = pipe.transformer
    layers = runtime.quantize_(model, rank=8, ranks=32)
    print(f"{len(layers)} linears are int8; {runtime.status()}")
    model.load_lora_adapter(style, adapter_name="style", strength=0.8, family="example-flux")
    found = {"quantized": distance(image(pipe), styled), "adapter": distance(styled, plain)}
    print(f"quantized: {found['quantized']:.3f} from the image of 16 bits")

    where = {name: buffer.data_ptr() for name, buffer in model.named_buffers()}
    model.load_lora_adapter(other, adapter_name="other", family="example-flux")
    model.set_adapters(["style", "other"], [{"transformer_blocks.0": 0.5}, 0.3])
    image(pipe)
    model.update_lora_params(style, family="example-flux")
    model.set_lora_strength(0.8)
    again = image(pipe)
    model.reset_lora()
    found["again"], found["reset"] = distance(again, styled), distance(image(pipe), plain)
    found["moved"] = float(sum(where[name] != buffer.data_ptr() for name, buffer in model.named_buffers()))
    print(f"exchanged and back: {found['again']:.3f}; without adapters {found['reset']:.3f} from the plain image")
    return found


if __name__ == "__main__":
    main()
