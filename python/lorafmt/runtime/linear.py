"""A linear layer of int8 weights with adapters that come, go and change while nothing else does.

The low-rank branch has room for a fixed number of ranks. The first ones may belong to the base; adapters take free
ones. Loading, scaling and removing write into buffers whose addresses and shapes never change, so compiled programs
and captured graphs stay what they are.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..exceptions import UsageError
from . import ops
from .quantize import leading, quantize_weight


@dataclass(frozen=True)
class Slot:
    """The ranks of one adapter: ``start`` to ``start + rank``."""

    start: int
    rank: int


def _refuse(code: str, message: str, hint: str) -> UsageError:
    error = UsageError(message)
    error.code, error.hint = code, hint
    return error


class FusedLinear(nn.Module):
    """``y = x @ W.T + bias + sum of strength * (x @ down.T) @ up.T``, with W as int8.

    Buffers, K inputs, N outputs (padded to multiples of 16 and 8), Rmax ranks (a multiple of 8):
        wq int8 [N, K], wscale float32 [N]: ``W[n, k] ~ wscale[n] * wq[n, k]``, for ``x / smooth`` if there is smoothing
        down [Rmax, K], up [N, Rmax]: bfloat16 or float16; zeros where nobody is
        strength float32 [Rmax], active int32 [1]: the ranks behind the last used one cost nothing
        inv_smooth float32 [K] or None, bias [N] or None
    """

    wq: Tensor
    wscale: Tensor
    down: Tensor
    up: Tensor
    strength: Tensor
    active: Tensor
    inv_smooth: Tensor | None
    bias: Tensor | None

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
        super().__init__()
        self.out_features, self.in_features = wq.shape
        rows, columns = _up_to(self.out_features, ops.N_MULTIPLE), _up_to(self.in_features, ops.K_MULTIPLE)
        ranks = _up_to(ranks, ops.R_MULTIPLE)
        device = wq.device
        self.register_buffer("wq", _padded(wq, rows, columns))
        self.register_buffer("wscale", _padded(wscale.float(), rows))
        self.register_buffer("bias", None if bias is None else _padded(bias.detach().to(dtype), rows))
        self.register_buffer("inv_smooth", None if inv_smooth is None else _padded(inv_smooth.float(), columns))
        self.register_buffer("down", torch.zeros(ranks, columns, dtype=dtype, device=device))
        self.register_buffer("up", torch.zeros(rows, ranks, dtype=dtype, device=device))
        self.register_buffer("strength", torch.zeros(ranks, dtype=torch.float32, device=device))
        self.register_buffer("active", torch.zeros(1, dtype=torch.int32, device=device))
        self.slots: dict[str, Slot] = {}

    @classmethod
    def from_linear(cls, linear: nn.Linear, rank: int = 32, ranks: int = 128) -> FusedLinear:
        """Quantizes a layer; its ``rank`` largest singular directions stay in 16 bits, as adapter ``base``.

        ``rank`` 0 leaves all to int8. New memory; the layer is not changed. Computed in float32 on its device.
        """
        dtype = linear.weight.dtype if linear.weight.dtype in (torch.bfloat16, torch.float16) else torch.bfloat16
        weight = linear.weight.detach().float()
        rank = min(rank, *weight.shape)
        up = down = None
        if rank:
            # The rest is what the rounded factors leave, so that their rounding is no error.
            up, down = (factor.to(dtype) for factor in leading(weight, rank))
            weight = weight - up.float() @ down.float()
        layer = cls(*quantize_weight(weight), linear.bias, ranks=max(ranks, _up_to(rank, 8)), dtype=dtype)
        if up is not None and down is not None:
            layer.load("base", down, up)
        return layer

    @property
    def max_rank(self) -> int:
        return self.strength.numel()

    def free_rank(self) -> int:
        """The widest adapter that fits now."""
        return max((size for _, size in self._gaps()), default=0)

    def _gaps(self) -> list[tuple[int, int]]:
        """Start and size of every run of free ranks, in order."""
        gaps, at = [], 0
        for slot in sorted(self.slots.values(), key=lambda slot: slot.start):
            if slot.start > at:
                gaps.append((at, slot.start - at))
            at = slot.start + slot.rank
        if at < self.max_rank:
            gaps.append((at, self.max_rank - at))
        return gaps

    @torch.no_grad()
    def load(self, name: str, down: Tensor, up: Tensor, strength: float = 1.0) -> None:
        """Puts an adapter, ``down`` ``[r, K]`` and ``up`` ``[N, r]``, into free ranks; replaces one of that name.

        Copies into the buffers. Errors, with nothing changed: ``adapter-shape-mismatch``, ``adapter-too-wide``.
        """
        rank = down.shape[0]
        if down.shape != (rank, self.in_features) or up.shape != (self.out_features, rank):
            raise _refuse(
                "adapter-shape-mismatch",
                f"{name}: factors {tuple(down.shape)} and {tuple(up.shape)} for a layer of "
                f"{self.in_features} inputs and {self.out_features} outputs",
                "is the adapter for this model?",
            )
        old = self.slots.pop(name, None)
        start = next((start for start, size in self._gaps() if size >= rank), None)
        if start is None:
            free = self.free_rank()
            if old is not None:
                self.slots[name] = old
            raise _refuse(
                "adapter-too-wide",
                f"{name}: rank {rank}, and {free} of {self.max_rank} ranks are free together",
                f"resize it to rank {free}, remove another adapter, or make room with ranks={self.max_rank + rank}",
            )
        if old is not None:
            self._clear(old)
        self.slots[name] = Slot(start, rank)
        self.down[start : start + rank, : self.in_features].copy_(down)
        self.up[: self.out_features, start : start + rank].copy_(up)
        self.strength[start : start + rank].fill_(strength)
        self._count()

    @torch.no_grad()
    def set_strength(self, name: str, strength: float) -> None:
        """Scales an adapter: writes its ranks' numbers and nothing else."""
        slot = self._slot(name)
        self.strength[slot.start : slot.start + slot.rank].fill_(strength)

    @torch.no_grad()
    def remove(self, name: str) -> None:
        """Takes an adapter out: its ranks are zeros again and free."""
        slot = self._slot(name)
        del self.slots[name]
        self._clear(slot)
        self._count()

    def _slot(self, name: str) -> Slot:
        if name not in self.slots:
            known = ", ".join(self.slots) or "none"
            raise _refuse("adapter-not-loaded", f"no adapter {name!r} is loaded", f"loaded are: {known}")
        return self.slots[name]

    def _clear(self, slot: Slot) -> None:
        ranks = slice(slot.start, slot.start + slot.rank)
        self.strength[ranks].zero_()
        self.down[ranks].zero_()
        self.up[:, ranks].zero_()

    def _count(self) -> None:
        self.active.fill_(max((slot.start + slot.rank for slot in self.slots.values()), default=0))

    def forward(self, x: Tensor) -> Tensor:
        """``x`` ``[..., K]`` of the type of the factors to ``[..., N]``."""
        rows = x.reshape(-1, self.in_features)
        if self.wq.shape[1] != self.in_features:
            rows = nn.functional.pad(rows, (0, self.wq.shape[1] - self.in_features))
        xq, xscale, t = ops.quantize_down(rows, self.down, self.strength, self.inv_smooth, self.active)
        y = ops.linear_w8a8(xq, xscale, self.wq, self.wscale, t, self.up, self.bias, self.active)
        return y[:, : self.out_features].reshape(*x.shape[:-1], self.out_features)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FusedLinear:
        """Moves and casts like any module, but scales and strengths stay float32."""
        exact = {name: self._buffers[name] for name in ("wscale", "strength", "inv_smooth")}
        super()._apply(fn, recurse)
        for name, value in exact.items():
            moved = self._buffers[name]
            if value is not None and moved is not None and moved.dtype != torch.float32:
                self._buffers[name] = value.to(moved.device)
        return self

    def get_extra_state(self) -> Tensor:
        """Who has which ranks, as bytes of JSON, so that it is saved with the buffers."""
        slots = {name: [slot.start, slot.rank] for name, slot in self.slots.items()}
        return torch.tensor(list(json.dumps(slots).encode()), dtype=torch.uint8)

    def set_extra_state(self, state: Any) -> None:
        slots = json.loads(bytes(state.tolist()).decode())
        self.slots = {name: Slot(start, rank) for name, (start, rank) in slots.items()}

    def extra_repr(self) -> str:
        used = ", ".join(f"{name} {slot.rank}" for name, slot in self.slots.items()) or "none"
        return f"{self.in_features}, {self.out_features}, ranks={self.max_rank} (used: {used})"


def _up_to(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _padded(value: Tensor, *shape: int) -> Tensor:
    value = value.contiguous()
    if tuple(value.shape) == shape:
        return value
    padded = value.new_zeros(shape)
    padded[tuple(slice(size) for size in value.shape)] = value
    return padded


def quantize_(
    model: nn.Module, rank: int = 32, ranks: int = 128, include: Callable[[str, nn.Linear], bool] | None = None
) -> list[str]:
    """Replaces linears of a model by :class:`FusedLinear`, one after the other; the names of those replaced.

    ``include`` chooses by name and layer; by default all. Each layer is quantized where it is, and its 16-bit weight is
    freed before the next one.
    """
    wanted = [
        name
        for name, module in model.named_modules()
        if type(module) is nn.Linear and (include is None or include(name, module))
    ]
    for name in wanted:
        parent_name, _, leaf = name.rpartition(".")
        parent = model.get_submodule(parent_name)
        layer = FusedLinear.from_linear(getattr(parent, leaf), rank, ranks)
        layer.train(parent.training)
        setattr(parent, leaf, layer)
    return wanted
