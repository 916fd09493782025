"""Where diffusers' own converter is right, the tensors are the same to the bit: also where a scale had to be folded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers.loaders import FluxLoraLoaderMixin

import lorafmt
import oracle

#: Fixtures whose block modules diffusers 0.42 converts right. Outside the blocks it loses prefix and alpha.
RIGHT = ["flux_kohya_all_linear", "flux_kohya_split_qkv", "flux_comfy_native_down_up", "flux_xlabs_double_single"]


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
@pytest.mark.parametrize("name", RIGHT)
def test_same_bits_as_diffusers(tmp_path: Path, name: str, dtype: str) -> None:
    listing = oracle.fixture(name)
    blocks = ("blocks_0_", "blocks_1_", "blocks.0.", "blocks.1.")
    listing = {**listing, "tensors": {k: v for k, v in listing["tensors"].items() if any(b in k for b in blocks)}}
    source = oracle.make_file(listing, tmp_path / "lora.safetensors", dtype=dtype, seed=3)
    # diffusers divides an alpha by the rank in alpha's own type; in 16 bits that would round the scale itself.
    state = {k: v.float() if k.endswith(".alpha") else v for k, v in lorafmt.torch.load_file(source).items()}
    theirs = FluxLoraLoaderMixin.lora_state_dict(dict(state))
    ours = lorafmt.convert_state_dict(state, to="diffusers")
    compared = 0
    for key, tensor in theirs.items():
        if not key.startswith("transformer."):
            continue
        assert key in ours
        assert ours[key].dtype == tensor.dtype
        assert torch.equal(ours[key].view(torch.uint8), tensor.contiguous().view(torch.uint8)), key
        compared += 1
    assert compared >= 40
