"""Quantized layers of a checkpoint, one by one, as what they mean and as layers of our own."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from . import nunchaku
from .linear import BranchLinear, FusedLinear
from .quantize import expand_groups
from .ranked import BASE, RANKS, RankedLinear, up_to
from .tensorfile import TensorFile


@dataclass(frozen=True)
class Quantized:
    """A layer: ``y = (x / smooth) @ W.T + x @ down.T @ up.T + bias``; ``W[n, k] = codes[n, k] scales[n, k // group]``.

    In float32 ``codes`` ``[N, K]``, ``scales`` ``[N, K / group]``, ``smooth`` ``[K]``, ``bias`` ``[N]``; in 16 bits
    ``down`` ``[R, K]``, ``up`` ``[N, R]``. The inputs are those of diffusers' layer: not shifted, not divided.
    """

    codes: Tensor
    scales: Tensor
    smooth: Tensor
    down: Tensor
    up: Tensor
    bias: Tensor

    def weight(self) -> Tensor:
        """W, float32: it acts on ``x / smooth``."""
        rows, groups = self.scales.shape
        return (self.codes.view(rows, groups, -1) * self.scales.unsqueeze(2)).view(rows, -1)

    def whole(self) -> Tensor:
        """The weight that acts on x, branch and all; float64."""
        return self.weight().double() / self.smooth.double() + self.up.double() @ self.down.double()

    def beside(self, other: Quantized) -> Quantized:
        """The layer of both inputs side by side, whose outputs are added."""
        up = torch.cat((self.up, other.up), dim=1)
        down = torch.block_diag(self.down, other.down)
        wide = {
            name: torch.cat((getattr(self, name), getattr(other, name)), dim=-1)
            for name in ("codes", "scales", "smooth")
        }
        return Quantized(**wide, up=up, down=down.to(self.down.dtype), bias=self.bias + other.bias)

    def rows(self, start: int, stop: int) -> Quantized:
        """A part of the outputs."""
        cut = {name: getattr(self, name)[start:stop] for name in ("codes", "scales", "up", "bias")}
        return replace(self, **cut)

    def times_rows(self, factor: Tensor, start: int, stop: int) -> Quantized:
        """Some outputs times a factor each."""
        full = torch.ones(len(self.bias), dtype=torch.float64, device=self.bias.device)
        full[start:stop] = factor.double()
        up = (self.up.double() * full.unsqueeze(1)).to(self.up.dtype)
        scales = (self.scales.double() * full.unsqueeze(1)).float()
        return replace(self, scales=scales, up=up, bias=(self.bias.double() * full).float())

    def divided(self, factor: Tensor) -> Quantized:
        """The layer for inputs that were divided by a factor and are not any more."""
        down = (self.down.double() / factor.double()).to(self.down.dtype)
        return replace(self, smooth=self.smooth * factor.float(), down=down)

    def fused(self, room: int, dtype: torch.dtype) -> FusedLinear:
        """As int8, with room for more ranks behind those of the branch."""
        wq, wscale = expand_groups(self.codes, self.scales)
        inverse = (1 / self.smooth.double()).float()
        plain = bool((self.smooth == 1).all())
        ranks = up_to(len(self.down), RANKS) + room
        layer = FusedLinear(wq, wscale, self.bias, inv_smooth=None if plain else inverse, ranks=ranks, dtype=dtype)
        return self._with_branch(layer)  # type: ignore[return-value]

    def branch(self, room: int, dtype: torch.dtype) -> BranchLinear:
        """As 16-bit weights (4 bits in, 16 bits computed), with the same branch and room."""
        weight = (self.weight().double() / self.smooth.double()).to(dtype)
        layer = BranchLinear(weight, self.bias.to(dtype), ranks=up_to(len(self.down), RANKS) + room)
        return self._with_branch(layer)  # type: ignore[return-value]

    def _with_branch(self, layer: RankedLinear) -> RankedLinear:
        if len(self.down):
            layer.load(BASE, self.down, self.up)
        return layer


def read(
    file: TensorFile, keys: dict[str, str], layer: str, size: tuple[int, int], shifted: bool, device: torch.device
) -> Quantized:
    """The layer of a checkpoint, of ``size`` outputs and inputs without padding, unpacked on ``device``.

    ``keys`` maps names of the first generation to those of the file. With ``shifted`` its inputs are shifted if it is
    int4, and the bias is one for inputs that are not.
    """

    def get(suffix: str) -> Tensor | None:
        key = keys.get(f"{layer}.{suffix}")
        return None if key is None or not file[key].numel() else file[key].to(device)

    qweight, wscales = (file[keys[f"{layer}.{part}"]].to(device) for part in ("qweight", "wscales"))
    wtscale = get("wtscale")
    codes, scales, factor = nunchaku.parts(
        qweight, wscales, get("wcscales"), 1.0 if wtscale is None else float(wtscale.float())
    )
    rows, columns = size
    group = codes.shape[1] // scales.shape[1]
    nunchaku.need(columns % group == 0, f"{layer}: {columns} inputs in groups of {group}")
    smooth = vector(get("smooth"), 1.0, codes[0])
    bias = vector(get("bias"), 0.0, codes[:, 0])
    packed = get("lora_down"), get("lora_up")
    if packed[0] is None or packed[1] is None:
        down, up = codes.new_zeros(0, codes.shape[1]), codes.new_zeros(len(codes), 0)
    else:
        down, up = nunchaku.unpack_low_rank(packed[0], "down"), nunchaku.unpack_low_rank(packed[1], "up")
    cut = Quantized(
        codes[:rows, :columns],
        (scales * factor.unsqueeze(1))[:rows, : columns // group],
        smooth[:columns],
        down[:, :columns],
        up[:rows],
        bias[:rows],
    )
    if shifted and wscales.dtype != torch.float8_e4m3fn:
        cut = replace(cut, bias=nunchaku.unshift_bias(cut.bias, cut.weight(), cut.smooth))
    return cut


def vector(packed: Tensor | None, default: float = 1.0, like: Tensor | None = None) -> Tensor:
    """A packed vector as float32; where there is none, ``default`` in the size of ``like``."""
    if packed is None:
        assert like is not None
        return torch.full_like(like, default)
    return nunchaku.unpack_vector(packed).float().squeeze(1)
