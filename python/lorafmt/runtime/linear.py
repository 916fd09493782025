"""Linear layers with adapters: int8 weights in one fused operation, or 16-bit weights with the same room for adapters.

:mod:`lorafmt.runtime.ranked` has what they do with adapters.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from . import ops
from .quantize import leading, quantize_weight
from .ranked import BASE, RANKS, RankedLinear, Slot, padded, up_to

__all__ = ["BranchLinear", "FusedLinear", "Slot"]


class FusedLinear(RankedLinear):
    """``y = x @ W.T + bias + sum of strength * (x @ down.T) @ up.T``, with W as int8.

    Buffers besides those of :class:`RankedLinear`; N and K are padded to multiples of 8 and 16:
        wq int8 [N, K], wscale float32 [N]: ``W[n, k] ~ wscale[n] * wq[n, k]``, for ``x / smooth`` if there is smoothing
        inv_smooth float32 [K] or None
    """

    wq: Tensor
    wscale: Tensor
    inv_smooth: Tensor | None
    EXACT = ("wscale", "strength", "inv_smooth")

    def __init__(
        self,
        wq: Tensor,
        wscale: Tensor,
        bias: Tensor | None = None,
        *,
        inv_smooth: Tensor | None = None,
        ranks: int = 128,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        """Takes ``wq`` ``[N, K]`` and ``wscale`` ``[N]`` as they are if no padding is needed, else padded copies."""
        size = wq.shape[0], wq.shape[1]
        rows, columns = up_to(size[0], ops.N_MULTIPLE), up_to(size[1], ops.K_MULTIPLE)
        super().__init__(size, (rows, columns), bias, ranks, dtype, wq.device)
        self.register_buffer("wq", padded(wq, rows, columns))
        self.register_buffer("wscale", padded(wscale.float(), rows))
        self.register_buffer("inv_smooth", None if inv_smooth is None else padded(inv_smooth.float(), columns))

    @classmethod
    def from_linear(cls, linear: nn.Linear, rank: int = 32, ranks: int = 128) -> FusedLinear:
        """Quantizes a layer; its ``rank`` largest singular directions stay in 16 bits, as adapter ``base``.

        ``rank`` 0 leaves all to int8. New memory; the layer is not changed. Computed in float32 on its device.
        """
        return cls.from_weight(linear.weight.detach(), linear.bias, rank, ranks)

    @classmethod
    def from_weight(cls, weight: Tensor, bias: Tensor | None, rank: int = 32, ranks: int = 128) -> FusedLinear:
        """The same for a weight ``[N, K]`` of any floating type."""
        dtype = sixteen(weight.dtype)
        weight = weight.float()
        rank = min(rank, *weight.shape)
        up = down = None
        if rank:
            # The rest is what the rounded factors leave, so that their rounding is no error.
            up, down = (factor.to(dtype) for factor in leading(weight, rank))
            weight = weight - up.float() @ down.float()
        layer = cls(*quantize_weight(weight), bias, ranks=max(ranks, up_to(rank, RANKS)), dtype=dtype)
        if up is not None and down is not None:
            layer.load(BASE, down, up)
        return layer

    def forward(self, x: Tensor) -> Tensor:
        """``x`` ``[..., K]`` of the type of the factors to ``[..., N]``."""
        rows = x.reshape(-1, self.in_features)
        if self.wq.shape[1] != self.in_features:
            rows = nn.functional.pad(rows, (0, self.wq.shape[1] - self.in_features))
        xq, xscale, t = ops.quantize_down(rows, self.down, self.strength, self.inv_smooth, self.active)
        y = ops.linear_w8a8(xq, xscale, self.wq, self.wscale, t, self.up, self.bias, self.active)
        return y[:, : self.out_features].reshape(*x.shape[:-1], self.out_features)


class BranchLinear(RankedLinear):
    """A linear layer of 16-bit weights with room for adapters, composed of torch's operations.

    For layers that stay in 16 bits: what is around the blocks, modulation, and checkpoints that are not expanded to
    int8. ``weight`` ``[N, K]`` is taken as it is.
    """

    weight: Tensor

    def __init__(self, weight: Tensor, bias: Tensor | None = None, *, ranks: int = 128) -> None:
        size = weight.shape[0], weight.shape[1]
        super().__init__(size, size, bias, ranks, weight.dtype, weight.device)
        self.register_buffer("weight", weight.detach())

    @property
    def in_channels(self) -> int:
        return self.in_features

    def forward(self, x: Tensor) -> Tensor:
        """``x`` ``[..., K]`` of the type of the weight to ``[..., N]``; the product and the branch are each rounded."""
        y = nn.functional.linear(x, self.weight, self.bias)
        t = nn.functional.linear(x, self.down).float() * self.strength
        return y + nn.functional.linear(t.to(x.dtype), self.up)


def sixteen(dtype: torch.dtype) -> torch.dtype:
    """The 16-bit type that stands for a type of weights."""
    return dtype if dtype in (torch.bfloat16, torch.float16) else torch.bfloat16
