"""Nunchaku's quantized layers, computed in numpy from the definition of their layout and arithmetic.

lorafmt is held to this module: it shares no code and no table with it. Tensors come as a file stores them. Places of
codes, scales and tiles are index formulas, element by element. `exact` is what a layer means in real numbers; `layer`
is what the kernels compute, step by step: 4-bit inputs in groups of 64 with scales rounded to 16 bits, integer sums by
group, sums of groups in 16 bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

SHIFT = 0.171875
Array = np.ndarray


def rounded(value: Array, dtype: torch.dtype) -> Array:
    """To the nearest number of a type, ties to even, as float64."""
    return torch.from_numpy(np.ascontiguousarray(value)).to(dtype).double().numpy()


def codes(qweight: Tensor) -> Array:
    """4-bit patterns 0..15 [N, K]: word w has reg = w mod 4, lane, sixteenth, step, block; nibble b is column + b."""
    rows, columns = qweight.shape[0], qweight.shape[1] * 2
    words = qweight.contiguous().numpy().view(np.uint32).reshape(-1)
    w, b = np.arange(words.size)[:, None], np.arange(8)[None, :]
    reg, lane, t = w % 4, w // 4 % 32, w // 128
    steps = columns // 64
    n = t // (8 * steps) * 128 + t % 8 * 16 + reg // 2 * 8 + lane // 4 + 0 * b
    k = t // 8 % steps * 64 + reg % 2 * 32 + lane % 4 * 8 + b
    out = np.zeros((rows, columns), np.int64)
    out[n, k] = words[:, None] >> (4 * b).astype(np.uint32) & 15
    return out


def vector(packed: Tensor, groups: int = 1) -> Array:
    """[N, groups] of a packed vector or of int4's group scales."""
    flat = packed.double().numpy().reshape(-1)
    p = np.arange(flat.size)
    q, g, block = p % 128, p // 128 % groups, p // (128 * groups)
    lane, e = q // 4, q % 4
    out = np.zeros((flat.size // groups, groups))
    out[block * 128 + lane // 4 * 16 + e // 2 * 8 + lane % 4 * 2 + e % 2, g] = flat
    return out


def factor(packed: Tensor, down: bool) -> Array:
    """A packed factor: down [R, K] or up [N, R]."""
    channels, rank = packed.shape
    flat = packed.double().numpy().reshape(-1)
    p = np.arange(flat.size)
    t, e, lane = p // 256, p % 8, p // 8 % 32
    i, j = e // 4 * 8 + lane // 4, e // 2 % 2 * 8 + lane % 4 * 2 + e % 2
    channel, r = t // (rank // 16) * 16, t % (rank // 16) * 16
    out = np.zeros((rank, channels) if down else (channels, rank))
    if down:
        out[r + i, channel + j] = flat
    else:
        out[channel + i, r + j] = flat
    return out


def micro_scales(wscales: Tensor) -> Array:
    """[N, K / 16] of nvfp4's float8 scales."""
    groups, rows = wscales.shape
    flat = wscales.float().numpy().reshape(-1)
    p = np.arange(flat.size)
    g4, e, lane, t = p % 4, p // 4 % 4, p // 16 % 32, p // 512
    steps = groups // 4
    out = np.zeros((rows, groups))
    out[t // steps * 128 + e * 32 + lane % 4 * 8 + lane // 4, t % steps * 4 + g4] = flat
    return out


@dataclass
class Layer:
    """weight [N, K] acts on x / smooth; integer codes and group scales where they are int4."""

    weight: Array
    smooth: Array
    bias: Array
    down: Array
    up: Array
    integers: Array | None = None
    scales: Array | None = None
    unsigned: bool = False


def read(file: dict[str, Tensor], name: str, unsigned: bool = False) -> Layer:
    """A layer by its name; `unsigned` for those behind GELU of int4 checkpoints."""
    raw, wscales = codes(file[f"{name}.qweight"]), file[f"{name}.wscales"]
    columns = raw.shape[1]
    integers = scales = None
    if wscales.dtype == torch.float8_e4m3fn:
        table = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
        weight = table[raw & 7] * np.where(raw >= 8, -1, 1) * np.repeat(micro_scales(wscales), 16, axis=1)
        if f"{name}.wcscales" in file:
            weight = weight * vector(file[f"{name}.wcscales"])
        if f"{name}.wtscale" in file:
            weight = weight * float(file[f"{name}.wtscale"])
    else:
        integers, scales = (raw + 8) % 16 - 8, vector(wscales, columns // 64)
        weight = integers * np.repeat(scales, 64, axis=1)
    smooth, bias = (vector(file[f"{name}.{part}"])[:, 0] for part in ("smooth", "bias"))
    down, up = factor(file[f"{name}.lora_down"], True), factor(file[f"{name}.lora_up"], False)
    return Layer(weight, smooth, bias, down, up, integers, scales, unsigned and integers is not None)


def exact(layer: Layer, x: Array) -> Array:
    """What the layer means, in float64: inputs are not quantized."""
    shifted = x + SHIFT if layer.unsigned else x
    return shifted / layer.smooth @ layer.weight.T + layer.bias + x @ layer.down.T @ layer.up.T


def layer(this: Layer, x: Array, dtype: torch.dtype) -> Array:
    """What Nunchaku's kernels compute for an int4 layer, but for the order of sums inside a group."""
    assert this.integers is not None and this.scales is not None
    low = x @ this.down.T
    shifted = rounded(x + SHIFT, dtype) if this.unsigned else x
    smoothed = rounded(shifted / this.smooth, dtype)
    groups = smoothed.reshape(len(x), -1, 64)
    most = 15 if this.unsigned else 7
    step = np.abs(groups).max(axis=2).astype(np.float32) * np.float32(1 / most)
    inverse = np.where(step == 0, 0, 1 / np.where(step == 0, 1, step))
    quantized = np.clip(np.rint(groups * inverse[:, :, None]), 0 if this.unsigned else -8, most)
    stored = rounded(step.astype(np.float64), dtype)
    weights = this.integers.reshape(len(this.weight), -1, 64)
    sums = np.zeros((len(x), len(this.weight)))
    for group in range(groups.shape[1]):
        product = rounded(quantized[:, group] @ weights[:, group].T, dtype)
        both = rounded(stored[:, group, None] * this.scales[None, :, group], dtype)
        sums = rounded(product * both + sums, dtype)
    y = rounded(sums + this.bias, dtype)
    return rounded(y + rounded(low, dtype) @ this.up.T, dtype)


def modulation(file: dict[str, Tensor], name: str) -> Array:
    """The weight of a modulation layer as stored, rows interleaved, [O, K]."""
    qweight, scales, zeros = (file[f"{name}.{part}"] for part in ("qweight", "wscales", "wzeros"))
    rows, columns = qweight.shape[0] * 4, qweight.shape[1] * 2
    words = qweight.numpy().view(np.uint32).reshape(-1).astype(np.int64)
    o, k = np.mgrid[0:rows, 0:columns]
    word = o // 4 * (columns // 2) + (k // 64 * 8 + o % 4 * 2 + k % 64 // 32) * 4 + k % 8 // 2
    value = words[word] >> (4 * (k % 32 // 8 + 4 * (k % 2))) & 15
    return value * scales.double().numpy()[k // 64, o] + zeros.double().numpy()[k // 64, o]
