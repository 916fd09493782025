"""Modulation layers of Nunchaku's checkpoints: 4-bit weights, a scale and a zero for each 64 of them, 16-bit inputs.

    w[o, k] = code[o, k] * wscales[k // 64, o] + wzeros[k // 64, o]

Rows are interleaved: row ``d * S + s`` is row ``s * D + d`` of diffusers' layer, which has S parts (shift, scale, gate,
...) of D rows. The bias has the 1 of ``1 + scale`` in it. Read in nunchaku (``src/kernels/awq``, ``src/Linear.cpp``).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .nunchaku import need

GROUP = 64

# Words of 8 nibbles: rows by four, group, row, half of the group, pair, then in the word: parity, eighth of the half.
_ORDER = (0, 2, 1, 3, 6, 4, 5)
_INVERSE = tuple(_ORDER.index(axis) for axis in range(7))

#: Of S parts those that are a scale, whose stored bias is one more.
SCALES = {3: (1,), 6: (1, 4)}


def unpack_codes(qweight: Tensor) -> Tensor:
    """``qweight`` int32 ``[O / 4, K / 2]`` as codes 0..15, uint8 ``[O, K]``."""
    rows, columns = qweight.shape[0] * 4, qweight.shape[1] * 2
    need(qweight.dtype == torch.int32 and columns % GROUP == 0, f"qweight: {rows} x {columns} of {qweight.dtype}")
    shifts = torch.arange(8, dtype=torch.int32, device=qweight.device) * 4
    nibbles = (qweight.contiguous().unsqueeze(-1) >> shifts) & 15
    split = nibbles.to(torch.uint8).view(rows // 4, columns // GROUP, 4, 2, 4, 2, 4)
    return split.permute(_ORDER).reshape(rows, columns)


def pack_codes(codes: Tensor) -> Tensor:
    """The inverse of :func:`unpack_codes`."""
    rows, columns = codes.shape
    need(rows % 4 == 0 and columns % GROUP == 0, f"codes: {rows} x {columns}")
    split = codes.view(rows // 4, 4, columns // GROUP, 2, 4, 4, 2).permute(_INVERSE)
    nibbles = split.reshape(rows // 4, columns // 2, 8).long()
    words = (nibbles << (torch.arange(8, device=codes.device) * 4)).sum(dim=-1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def dequantize(qweight: Tensor, wscales: Tensor, wzeros: Tensor) -> Tensor:
    """The weight as stored, float32 ``[O, K]``, rows interleaved."""
    codes = unpack_codes(qweight).float()
    rows, columns = codes.shape
    shape = (columns // GROUP, rows)
    need(tuple(wscales.shape) == tuple(wzeros.shape) == shape, f"scales {tuple(wscales.shape)} for {rows} x {columns}")
    scales, zeros = (value.float().t().unsqueeze(2) for value in (wscales, wzeros))
    return (codes.view(rows, columns // GROUP, GROUP) * scales + zeros).view(rows, columns)


def quantize(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """``[O, K]`` as ``qweight``, ``wscales`` and ``wzeros`` of ``dtype``, to nearest: off by half a scale at most, and
    by the rounding of the zero."""
    rows, columns = weight.shape
    groups = weight.float().view(rows, columns // GROUP, GROUP)
    low, high = groups.amin(dim=2), groups.amax(dim=2)
    zeros = low.to(dtype)
    # Rounded up, so that the largest is reached.
    scales = ((high - zeros.float()) / 15 * (1 + 2**-7)).to(dtype)
    step = torch.where(scales == 0, torch.ones_like(scales), scales).float().unsqueeze(2)
    codes = torch.round((groups - zeros.float().unsqueeze(2)) / step).clamp_(0, 15)
    packed = pack_codes(codes.view(rows, columns).to(torch.uint8))
    return packed, scales.t().contiguous(), zeros.t().contiguous()


def deinterleave(rows: Tensor, parts: int) -> Tensor:
    """Stored rows in diffusers' order."""
    return rows.reshape(-1, parts, *rows.shape[1:]).transpose(0, 1).reshape(rows.shape)


def interleave(rows: Tensor, parts: int) -> Tensor:
    """The inverse of :func:`deinterleave`."""
    return rows.reshape(parts, -1, *rows.shape[1:]).transpose(0, 1).reshape(rows.shape)


def without_one(bias: Tensor, parts: int, one: float = 1.0) -> Tensor:
    """A bias in diffusers' order without the 1 in its scales (with it for ``one=-1``); float32."""
    split = bias.float().view(parts, -1).clone()
    split[list(SCALES[parts])] -= one
    return split.view(-1)
