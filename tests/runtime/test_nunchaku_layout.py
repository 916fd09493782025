"""Packed tensors of Nunchaku's layers: every element against the documented place, packing and unpacking, meaning."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from lorafmt.exceptions import FormatError
from lorafmt.runtime import nunchaku as layout
from lorafmt.runtime import ops

N, K, R = 256, 192, 48


def random_codes(seed: int = 1) -> Tensor:
    return torch.randint(0, 16, (N, K), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def numbered(*shape: int) -> Tensor:
    """Distinct 16-bit patterns as bfloat16."""
    count = int(np.prod(shape))
    return torch.arange(count, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).view(shape)


def bits(value: Tensor) -> np.ndarray:
    return value.contiguous().view(torch.int16).numpy()


def test_codes_lie_where_words_and_nibbles_say() -> None:
    """Word w of 32 bits: reg = w mod 4, lane, sixteenth, step, block; nibble b is column 8 (lane mod 4) + b."""
    codes = random_codes()
    words = layout.pack_codes(codes).numpy().view(np.uint32).reshape(-1)
    w = np.arange(words.size)[:, None]
    b = np.arange(8)[None, :]
    reg, lane, t = w % 4, w // 4 % 32, w // 128
    n16, kt, nb = t % 8, t // 8 % (K // 64), t // (8 * (K // 64))
    n = nb * 128 + n16 * 16 + reg // 2 * 8 + lane // 4
    k = kt * 64 + reg % 2 * 32 + lane % 4 * 8 + b
    assert np.array_equal(
        words[:, None] >> (4 * b).astype(np.uint32) & 15, codes.numpy()[np.broadcast_to(n, k.shape), k]
    )
    assert torch.equal(layout.unpack_codes(layout.pack_codes(codes)), codes)


@pytest.mark.parametrize("groups", [1, 3])
def test_vectors_lie_in_blocks_of_128(groups: int) -> None:
    plain = numbered(N, groups)
    packed = bits(layout.pack_vector(plain)).reshape(-1)
    p = np.arange(packed.size)
    q, g, nb = p % 128, p // 128 % groups, p // (128 * groups)
    lane, e = q // 4, q % 4
    n = nb * 128 + lane // 4 * 16 + e // 2 * 8 + lane % 4 * 2 + e % 2
    assert np.array_equal(packed, bits(plain)[n, g])
    assert n[:8].tolist() == [0, 1, 8, 9, 2, 3, 10, 11]
    assert np.array_equal(bits(layout.unpack_vector(layout.pack_vector(plain), groups)), bits(plain))


def test_micro_scales() -> None:
    plain = torch.arange(N * K // 16, dtype=torch.int32).to(torch.uint8).view(N, K // 16).view(torch.float8_e4m3fn)
    packed = layout.pack_micro_scales(plain).view(torch.uint8).numpy().reshape(-1)
    p = np.arange(packed.size)
    g4, e, lane, t = p % 4, p // 4 % 4, p // 16 % 32, p // 512
    kt, nb = t % (K // 64), t // (K // 64)
    n, group = nb * 128 + e * 32 + lane % 4 * 8 + lane // 4, kt * 4 + g4
    assert np.array_equal(packed, plain.view(torch.uint8).numpy()[n, group])
    back = layout.unpack_micro_scales(layout.pack_micro_scales(plain))
    assert torch.equal(back.view(torch.uint8), plain.view(torch.uint8))


@pytest.mark.parametrize("side", ["down", "up"])
def test_factors_lie_in_tiles_of_16(side: str) -> None:
    """Inverse of the documented offset; for `down` i runs over ranks, for `up` over channels."""
    plain = numbered(R, N) if side == "down" else numbered(N, R)
    packed = layout.pack_low_rank(plain, side)
    assert packed.shape == (N, R)
    p = np.arange(packed.numel())
    t, e, lane = p // 256, p % 8, p // 8 % 32
    i, j = e // 4 * 8 + lane // 4, e // 2 % 2 * 8 + lane % 4 * 2 + e % 2
    channel, rank = t // (R // 16) * 16, t % (R // 16) * 16
    rows, columns = (rank + i, channel + j) if side == "down" else (channel + i, rank + j)
    assert np.array_equal(bits(packed).reshape(-1), bits(plain)[rows, columns])
    assert np.array_equal(bits(layout.unpack_low_rank(packed, side)), bits(plain))


def test_the_worked_example_of_a_tile() -> None:
    tile = torch.arange(256, dtype=torch.int16).view(torch.bfloat16).view(16, 16)
    packed = bits(layout.pack_low_rank(tile, "up")).reshape(-1)
    assert packed[:16].tolist() == [0, 1, 8, 9, 128, 129, 136, 137, 2, 3, 10, 11, 130, 131, 138, 139]
    assert packed[32:40].tolist() == [16, 17, 24, 25, 144, 145, 152, 153]


def int4_layer(seed: int) -> tuple[Tensor, Tensor, np.ndarray]:
    """Packed weight and scales, and what they mean in float64."""
    codes = random_codes(seed)
    scales = torch.exp(torch.randn(N, K // 64, generator=torch.Generator().manual_seed(seed))).bfloat16()
    numbers = (codes.numpy().astype(np.int64) + 8) % 16 - 8
    meaning = numbers * np.repeat(scales.double().numpy(), 64, axis=1)
    return layout.pack_codes(codes), layout.pack_vector(scales), meaning


def test_int4_weights_mean_codes_times_scales() -> None:
    qweight, wscales, meaning = int4_layer(3)
    assert np.array_equal(layout.dequantize(qweight, wscales).double().numpy(), meaning)
    wq, scale = layout.expand(qweight, wscales)
    error = wq.double().numpy() * scale.double().numpy()[:, None] - meaning
    assert np.all(np.abs(error) <= scale.double().numpy()[:, None] * 0.5 * (1 + 1e-4))
    assert np.linalg.norm(error) <= 1e-2 * np.linalg.norm(meaning)


@pytest.mark.parametrize("outliers", [0.5, 1.5])
def test_a_layer_of_a_checkpoint_against_the_exact_meaning_of_its_weights(outliers: float) -> None:
    """As SVDQuant makes one: channel outliers, smoothing, a branch of rank 32 on the raw input. Figure: 1.5e-2."""
    generator = torch.Generator().manual_seed(11)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    n, k, rank = 384, 1024, 32
    x = (normal(64, k) * torch.exp(normal(k) * outliers)).bfloat16()
    smooth = x.float().abs().amax(dim=0).sqrt().clamp_min(1e-2)
    weight = normal(n, k) / k**0.5
    u, s, vh = torch.linalg.svd(weight * smooth, full_matrices=False)
    up, down = (u[:, :rank] * s[:rank]).bfloat16(), (vh[:rank] / smooth).bfloat16()
    groups = (weight * smooth - u[:, :rank] * s[:rank] @ vh[:rank]).view(n, k // 64, 64)
    scales = (groups.abs().amax(dim=2) / 7).bfloat16()
    codes = torch.round(groups / scales.float().unsqueeze(2)).clamp(-8, 7).view(n, k)
    packed = layout.pack_codes(codes.to(torch.int8).view(torch.uint8) & 15), layout.pack_vector(scales)

    branch = x.double() @ down.double().t() @ up.double().t()
    exact = (x.double() / smooth.double()) @ layout.dequantize(*packed).double().t() + branch
    xq, xscale, t = ops.quantize_down(x, down, torch.ones(rank), 1 / smooth)
    y = ops.linear_w8a8(xq, xscale, *layout.expand(*packed), t, up)
    assert torch.linalg.norm(y.double() - exact) <= 1.5e-2 * torch.linalg.norm(exact)


def test_nvfp4_weights_mean_codes_times_both_scales() -> None:
    codes = random_codes(5)
    generator = torch.Generator().manual_seed(6)
    micro = (torch.rand(N, K // 16, generator=generator) * 4 + 0.1).to(torch.float8_e4m3fn)
    channel = (torch.rand(N, 1, generator=generator) + 0.5).bfloat16()
    table = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    numbers = table[codes.numpy() & 7] * np.where(codes.numpy() >= 8, -1, 1)
    meaning = numbers * np.repeat(micro.double().numpy(), 16, axis=1) * channel.double().numpy() * 0.25
    packed = (layout.pack_codes(codes), layout.pack_micro_scales(micro), layout.pack_vector(channel), 0.25)
    assert np.allclose(layout.dequantize(*packed).double().numpy(), meaning, rtol=1e-6, atol=0)
    wq, scale = layout.expand(*packed)
    error = wq.double().numpy() * scale.double().numpy()[:, None] - meaning
    assert np.all(np.abs(error) <= scale.double().numpy()[:, None] * 0.5 * (1 + 1e-4))


def test_inputs_that_are_not_shifted_give_what_shifted_ones_gave() -> None:
    """In float64: (x + shift) / s @ R.T + stored bias = x / s @ R.T + bias."""
    generator = torch.Generator().manual_seed(8)
    residual, smooth = torch.randn(N, K, generator=generator), torch.rand(K, generator=generator) + 0.5
    x, stored = torch.randn(5, K, generator=generator).double(), torch.randn(N, generator=generator)
    shifted = ((x + 0.171875) / smooth.double()) @ residual.double().t() + stored.double()
    plain = (x / smooth.double()) @ residual.double().t() + layout.unshift_bias(stored, residual, smooth).double()
    assert torch.allclose(plain, shifted, rtol=1e-6, atol=1e-5)


def test_what_is_not_whole_blocks_is_refused() -> None:
    for call in (
        lambda: layout.unpack_codes(torch.zeros(100, 32, dtype=torch.int8)),
        lambda: layout.unpack_vector(torch.zeros(100).bfloat16()),
        lambda: layout.unpack_low_rank(torch.zeros(128, 20).bfloat16(), "up"),
        lambda: layout.expand(torch.zeros(128, 64, dtype=torch.int8), torch.zeros(1, 128).bfloat16()),
    ):
        with pytest.raises(FormatError) as refused:
            call()
        assert refused.value.code == "bad-native-layout" and refused.value.hint
