"""The tensors of Nunchaku's quantized layers: out of their packed order and back, and as int8 with row scales.

Layouts were read in nunchaku (``lora/flux/packer.py``, ``src/kernels/zgemm``). Everything is a view and a permutation
of axes; each function names the axes in memory order. N and K are multiples of 128. Packed tensors are returned as new
memory in the advertised shape.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..exceptions import FormatError
from .quantize import expand_groups

#: Rows of a block; every layer is padded to whole blocks.
BLOCK = 128

#: Inputs that share a scale.
INT4_GROUP, FP4_GROUP = 64, 16

#: What is added to the inputs of a layer behind GELU before they are quantized without a sign.
SHIFT = 0.171875

#: Magnitudes of E2M1 codes 0..7; bit 3 is the sign.
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)

# Axes of a block of 4-bit weights in memory, and the order that makes rows and columns of them. A row of a block is 16
# sixteenths of 8 + 8; a column group of 64 is two halves of 4 words of 8 nibbles.
_CODE_AXES = ("block", "step", "sixteenth", "row", "word", "half_n", "half_k", "byte", "nibble")
_CODE_SIZES = (-1, 0, 8, 8, 4, 2, 2, 4, 2)
_CODE_ORDER = (0, 2, 5, 3, 1, 6, 4, 7, 8)


def _inverse(order: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(order.index(axis) for axis in range(len(order)))


def need(condition: bool, message: str) -> None:
    if not condition:
        error = FormatError(message)
        error.code = "bad-native-layout"
        error.hint = "is this a quantized layer of Nunchaku, whole and unchanged?"
        raise error


def _blocks(rows: int, columns: int, what: str) -> None:
    need(rows % BLOCK == 0 and columns % INT4_GROUP == 0, f"{what}: {rows} x {columns} is not whole blocks of 128 x 64")


def unpack_codes(qweight: Tensor) -> Tensor:
    """``qweight`` int8 ``[N, K / 2]`` as codes 0..15, uint8 ``[N, K]``."""
    rows, columns = qweight.shape[0], qweight.shape[1] * 2
    _blocks(rows, columns, "qweight")
    packed = qweight.contiguous().view(torch.uint8)
    nibbles = torch.stack((packed & 15, packed >> 4), dim=-1)
    sizes = (rows // BLOCK, columns // 64, *_CODE_SIZES[2:])
    return nibbles.view(sizes).permute(_CODE_ORDER).reshape(rows, columns)


def pack_codes(codes: Tensor) -> Tensor:
    """The inverse of :func:`unpack_codes`: codes 0..15 ``[N, K]`` to int8 ``[N, K / 2]``."""
    rows, columns = codes.shape
    _blocks(rows, columns, "codes")
    sizes = (rows // BLOCK, columns // 64, *_CODE_SIZES[2:])
    split = codes.to(torch.uint8).view([sizes[axis] for axis in _CODE_ORDER])
    nibbles = split.permute(_inverse(_CODE_ORDER)).reshape(rows, columns // 2, 2)
    return (nibbles[..., 0] | (nibbles[..., 1] << 4)).view(torch.int8)


def signed(codes: Tensor) -> Tensor:
    """Codes 0..15 as two's complement -8..7, int8."""
    return (codes.to(torch.int8) ^ 8) - 8


# block, group, sixteenth, pair, half, element of the pair -> block, sixteenth, half, pair, element, group
_VECTOR_SIZES = (8, 4, 2, 2)
_VECTOR_ORDER = (0, 2, 4, 3, 5, 1)


def unpack_vector(packed: Tensor, groups: int = 1) -> Tensor:
    """A packed 16-bit vector ``[N]`` (biases, smoothing, channel scales) or ``wscales`` ``[G, N]`` as ``[N, G]``."""
    rows = packed.numel() // groups
    need(
        rows % BLOCK == 0 and rows * groups == packed.numel(), f"a vector of {packed.numel()} values in {groups} groups"
    )
    split = packed.contiguous().view(rows // BLOCK, groups, *_VECTOR_SIZES)
    return split.permute(_VECTOR_ORDER).reshape(rows, groups)


def pack_vector(plain: Tensor) -> Tensor:
    """The inverse of :func:`unpack_vector`: ``[N, G]`` to ``[G, N]``, whose memory order is by blocks of rows."""
    rows, groups = plain.shape
    need(rows % BLOCK == 0, f"a vector of {rows} rows")
    split = plain.contiguous().view(rows // BLOCK, *(_VECTOR_SIZES[axis] for axis in (0, 2, 1, 3)), groups)
    return split.permute(_inverse(_VECTOR_ORDER)).reshape(groups, rows)


# block, step, row, word, quarter, group of the step -> block, quarter, word, row, step, group
_MICRO_SIZES = (8, 4, 4, 4)
_MICRO_ORDER = (0, 4, 3, 2, 1, 5)


def unpack_micro_scales(packed: Tensor) -> Tensor:
    """``wscales`` of 4-bit floats, float8 ``[K / 16, N]``, as ``[N, K / 16]``."""
    groups, rows = packed.shape
    _blocks(rows, groups * FP4_GROUP, "wscales")
    split = packed.contiguous().view(torch.uint8).view(rows // BLOCK, groups // 4, *_MICRO_SIZES)
    return split.permute(_MICRO_ORDER).reshape(rows, groups).view(packed.dtype)


def pack_micro_scales(plain: Tensor) -> Tensor:
    """The inverse of :func:`unpack_micro_scales`."""
    rows, groups = plain.shape
    _blocks(rows, groups * FP4_GROUP, "scales")
    split = plain.contiguous().view(torch.uint8).view(rows // BLOCK, 4, 4, 8, groups // 4, 4)
    return split.permute(_inverse(_MICRO_ORDER)).reshape(groups, rows).view(plain.dtype)


# channel tile, rank tile, row of 8, pair, half of rows, half of columns, element of the pair
_TILE_SIZES = (8, 4, 2, 2, 2)
#: Rows first: (tile, half, row) and (tile, half, pair, element), for `up` with channels as rows, for `down` with ranks.
_TILE_ORDER = {"up": (0, 4, 2, 1, 5, 3, 6), "down": (1, 4, 2, 0, 5, 3, 6)}


def unpack_low_rank(packed: Tensor, side: str) -> Tensor:
    """A packed factor ``[channels, R]`` as ``[R, channels]`` (``side="down"``) or ``[channels, R]`` (``"up"``)."""
    channels, rank = packed.shape
    need(channels % 16 == 0 and rank % 16 == 0, f"a factor of {channels} x {rank} is not whole tiles of 16 x 16")
    split = packed.contiguous().view(channels // 16, rank // 16, *_TILE_SIZES)
    shape = (rank, channels) if side == "down" else (channels, rank)
    return split.permute(_TILE_ORDER[side]).reshape(shape)


def pack_low_rank(plain: Tensor, side: str) -> Tensor:
    """The inverse of :func:`unpack_low_rank`."""
    rows, columns = plain.shape
    need(rows % 16 == 0 and columns % 16 == 0, f"a factor of {rows} x {columns} is not whole tiles of 16 x 16")
    split = plain.contiguous().view(rows // 16, 2, 8, columns // 16, 2, 4, 2)
    shape = (columns, rows) if side == "down" else (rows, columns)
    return split.permute(_inverse(_TILE_ORDER[side])).reshape(shape)


def dequantize(qweight: Tensor, wscales: Tensor, wcscales: Tensor | None = None, wtscale: float = 1.0) -> Tensor:
    """What the stored 4-bit weight means, float32 ``[N, K]``: the smoothed residual, which acts on ``x / smooth``.

    ``wscales`` 16-bit ``[K / 64, N]``: two's complement codes. float8 ``[K / 16, N]``: E2M1 codes, times ``wcscales``
    (packed ``[N]``) and ``wtscale``.
    """
    codes, scales, factor = parts(qweight, wscales, wcscales, wtscale)
    rows, groups = scales.shape
    weight = codes.view(rows, groups, -1) * scales.unsqueeze(2)
    return weight.view(codes.shape) * factor.unsqueeze(1)


def expand(
    qweight: Tensor, wscales: Tensor, wcscales: Tensor | None = None, wtscale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """The stored 4-bit weight as int8 ``[N, K]`` and a float32 scale for each row; see :func:`dequantize`."""
    codes, scales, factor = parts(qweight, wscales, wcscales, wtscale)
    wq, scale = expand_groups(codes, scales)
    return wq, scale * factor


def parts(qweight: Tensor, wscales: Tensor, wcscales: Tensor | None, wtscale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Codes as numbers ``[N, K]``, group scales ``[N, G]`` and a factor for each row, all float32."""
    raw = unpack_codes(qweight)
    rows, columns = raw.shape
    if wscales.dtype == torch.float8_e4m3fn:
        table = torch.tensor(E2M1, device=raw.device)
        codes = torch.where(raw >= 8, -1.0, 1.0) * table[(raw & 7).long()]
        scales, group = unpack_micro_scales(wscales).float(), FP4_GROUP
    else:
        codes = signed(raw).float()
        scales, group = unpack_vector(wscales, wscales.shape[0]).float(), INT4_GROUP
    need(scales.shape == (rows, columns // group), f"scales {tuple(wscales.shape)} for a weight of {rows} x {columns}")
    factor = torch.full((rows,), float(wtscale), device=raw.device)
    if wcscales is not None:
        factor = factor * unpack_vector(wcscales).float().squeeze(1)
    return codes, scales, factor


def unshift_bias(bias: Tensor, weight: Tensor, smooth: Tensor) -> Tensor:
    """The bias of a layer behind GELU for inputs that are not shifted; float32 ``[N]``.

    Nunchaku quantizes ``(x + SHIFT) / smooth`` there, and the stored bias takes the constant out again:
    ``bias = b - SHIFT * sum_k weight[n, k] / smooth[k]``, with the dequantized ``weight``. All arguments unpacked.
    """
    return bias.float() + SHIFT * (weight.double() / smooth.double()).sum(dim=1).float()
