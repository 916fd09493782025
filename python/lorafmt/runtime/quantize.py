"""Weights as int8 with one scale for each output channel.

    w[n, k] ~ scale[n] * wq[n, k],   -127 <= wq <= 127

Symmetric, round half to even, float32 throughout. Everything returned is new memory on the input's device.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: The largest code. -128 is never used, so that a sign never changes a magnitude.
LIMIT = 127

#: Smaller maxima count as this, so that a row of zeros has a finite scale; its codes are zeros all the same.
TINY = 1e-30


def quantize_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Quantizes ``[N, K]`` of any floating type to int8 ``[N, K]`` and float32 ``[N]``.

    ``scale[n] = max_k |w[n, k]| / 127``: no code is clipped, and no weight is off by more than half a scale.
    """
    weight = weight.float()
    scale = weight.abs().amax(dim=1).clamp_min(TINY) / LIMIT
    return _codes(weight, scale), scale


def expand_groups(codes: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """Brings ``[N, K]`` codes with a scale for each group ``[N, G]`` to int8 with one scale for each row.

    A code stands for ``codes[n, k] * scales[n, k // (K / G)]``. The row's scale is the largest group's divided by the
    largest integer that clips nothing: that group, which has most of the weight, is exact, and so is a row whose
    groups agree. All others are off by half a scale at most.
    """
    rows, width = codes.shape
    groups = scales.shape[1]
    scales = scales.float()
    weight = (codes.float().view(rows, groups, width // groups) * scales.unsqueeze(2)).view(rows, width)
    least = weight.abs().amax(dim=1).clamp_min(TINY) / LIMIT
    largest = scales.abs().amax(dim=1).clamp_min(TINY)
    # A quotient that is a whole number may come out just below it.
    steps = torch.floor(largest / least * (1 + 1e-6)).clamp_min(1)
    scale = torch.maximum(largest / steps, least)
    return _codes(weight, scale), scale


def leading(weight: Tensor, rank: int, rounds: int = 4) -> tuple[Tensor, Tensor]:
    """The ``rank`` largest directions of ``[N, K]``: ``up`` ``[N, rank]`` and ``down`` ``[rank, K]``, float32.

    Subspace iteration from fixed random directions (Halko, Martinsson, Tropp 2011, algorithm 4.4): a few products with
    the weight instead of its whole decomposition. The same input gives the same factors.
    """
    weight = weight.float()
    width = min(rank + 16, *weight.shape)
    generator = torch.Generator().manual_seed(0)
    right = torch.randn(weight.shape[1], width, generator=generator).to(weight.device)
    for _ in range(rounds):
        left = torch.linalg.qr(weight @ right).Q
        right = torch.linalg.qr(weight.t() @ left).Q
    u, s, vh = torch.linalg.svd(weight @ right, full_matrices=False)
    root = s[:rank].sqrt()
    return u[:, :rank] * root, root.unsqueeze(1) * (vh[:rank] @ right.t())


def _codes(weight: Tensor, scale: Tensor) -> Tensor:
    return torch.round(weight / scale.unsqueeze(1)).clamp_(-LIMIT, LIMIT).to(torch.int8)
