"""What layers with adapters have in common: ranks that come, go and change while nothing else does.

A layer has room for a fixed number of ranks. The first ones may belong to the base; adapters take free ones. Loading,
scaling and removing write into buffers whose addresses and shapes never change, so compiled programs and captured
graphs stay what they are.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..exceptions import UsageError
from .tensorfile import failed

#: The name of the ranks that belong to the base; adapters have names of their own.
BASE = "base"

#: Ranks start at multiples of this, and there are a multiple of it.
RANKS = 8


@dataclass(frozen=True)
class Slot:
    """The ranks of one adapter: ``start`` to ``start + rank``."""

    start: int
    rank: int

    @property
    def ranks(self) -> slice:
        return slice(self.start, self.start + self.rank)


@dataclass(frozen=True)
class Part:
    """A module of the model whose outputs are the rows ``start`` to ``stop`` of a layer that stands for several."""

    name: str
    start: int
    stop: int


@dataclass(frozen=True)
class Block:
    """Factors of some rows of a layer: ``down`` ``[r, K]``, and the first row and ``up`` ``[rows, r]`` of each part."""

    down: Tensor
    ups: tuple[tuple[int, Tensor], ...]

    @property
    def rank(self) -> int:
        return int(self.down.shape[0])


def refuse(code: str, message: str, hint: str) -> UsageError:
    error = failed(UsageError, code, message, hint)
    assert isinstance(error, UsageError)
    return error


def up_to(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def padded(value: Tensor, *shape: int) -> Tensor:
    """``value``, or a copy with zeros behind it if it is smaller than ``shape``."""
    value = value.contiguous()
    if tuple(value.shape) == shape:
        return value
    larger = value.new_zeros(shape)
    larger[tuple(slice(size) for size in value.shape)] = value
    return larger


class RankedLinear(nn.Module):
    """A linear layer with buffers for adapters; what it does with them is its subclasses' affair.

    Buffers, K inputs, N outputs (as the subclass pads them), Rmax ranks (a multiple of 8):
        down [Rmax, K], up [N, Rmax]: bfloat16 or float16; zeros where nobody is
        strength float32 [Rmax], active int32 [1]: the ranks behind the last used one cost nothing
        bias [N] or None
    """

    down: Tensor
    up: Tensor
    strength: Tensor
    active: Tensor
    bias: Tensor | None
    #: Counts what was done to slots of single layers, anywhere.
    edits = 0
    #: Buffers that stay float32 when the layer is cast.
    EXACT: tuple[str, ...] = ("strength",)

    def __init__(
        self,
        size: tuple[int, int],
        stored: tuple[int, int],
        bias: Tensor | None,
        ranks: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """``size`` and ``stored``: outputs and inputs, before and after padding."""
        super().__init__()
        self.out_features, self.in_features = size
        rows, columns = stored
        ranks = up_to(ranks, RANKS)
        self.register_buffer("bias", None if bias is None else padded(bias.detach().to(dtype), rows))
        self.register_buffer("down", torch.zeros(ranks, columns, dtype=dtype, device=device))
        self.register_buffer("up", torch.zeros(rows, ranks, dtype=dtype, device=device))
        self.register_buffer("strength", torch.zeros(ranks, dtype=torch.float32, device=device))
        self.register_buffer("active", torch.zeros(1, dtype=torch.int32, device=device))
        self.slots: dict[str, Slot] = {}
        self.parts: tuple[Part, ...] = ()

    @property
    def max_rank(self) -> int:
        return self.strength.numel()

    def free_rank(self, without: Collection[str] = ()) -> int:
        """The widest adapter that fits now, or would without some others."""
        return max((size for _, size in self._gaps(without)), default=0)

    def place(self, rank: int, without: Collection[str] = ()) -> int | None:
        """The first start of ``rank`` free ranks; None if no run of free ranks is as long."""
        return next((start for start, size in self._gaps(without) if size >= rank), None)

    def _gaps(self, without: Collection[str] = ()) -> list[tuple[int, int]]:
        """Start and size of every run of free ranks, in order."""
        gaps, at = [], 0
        kept = (slot for name, slot in self.slots.items() if name not in without)
        for slot in sorted(kept, key=lambda slot: slot.start):
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
            raise refuse(
                "adapter-shape-mismatch",
                f"{name}: factors {tuple(down.shape)} and {tuple(up.shape)} for a layer of "
                f"{self.in_features} inputs and {self.out_features} outputs",
                "is the adapter for this model?",
            )
        start = self.place(rank, (name,))
        if start is None:
            free = self.free_rank()
            raise refuse(
                "adapter-too-wide",
                f"{name}: rank {rank}, and {free} of {self.max_rank} ranks are free together",
                f"resize it to rank {free}, remove another adapter, or make room with ranks={self.max_rank + rank}",
            )
        self.clear(name)
        self.fill(name, start, [Block(down, ((0, up),))])
        self.strength[self.slots[name].ranks].fill_(strength)
        self._count()

    @torch.no_grad()
    def fill(self, name: str, start: int, blocks: Collection[Block], used: bool = False) -> None:
        """Writes factors into ranks, one block after the other; strengths stay zero.

        The ranks are zeros, or ``used``: then what is not written over is made zeros.
        """
        at = start
        for block in blocks:
            ranks = slice(at, at + block.rank)
            self.down[ranks, : self.in_features].copy_(block.down)
            above = 0
            for row, up in sorted(block.ups, key=lambda part: part[0]):
                if used and row > above:
                    self.up[above:row, ranks].zero_()
                above = row + len(up)
                self.up[row:above, ranks].copy_(up)
            if used and above < self.out_features:
                self.up[above:, ranks].zero_()
            at += block.rank
        self.slots[name] = Slot(start, at - start)

    @torch.no_grad()
    def clear(self, name: str, but: range = range(0)) -> None:
        """Makes the ranks of an adapter zeros again and free; those in ``but`` are left, to be written over."""
        slot = self.slots.pop(name, None)
        if slot is None:
            return
        self.strength[slot.ranks].zero_()
        end = slot.start + slot.rank
        kept = range(max(slot.start, but.start), min(end, but.stop))
        for ranks in (slice(slot.start, kept.start), slice(kept.stop, end)) if kept else (slot.ranks,):
            if ranks.stop > ranks.start:
                self.down[ranks].zero_()
                self.up[:, ranks].zero_()

    @torch.no_grad()
    def set_strength(self, name: str, strength: float) -> None:
        """Scales an adapter: writes its ranks' numbers and nothing else."""
        self.strength[self._slot(name).ranks].fill_(strength)

    def remove(self, name: str) -> None:
        """Takes an adapter out: its ranks are zeros again and free."""
        self._slot(name)
        self.clear(name)
        self._count()

    def _slot(self, name: str) -> Slot:
        if name not in self.slots:
            known = ", ".join(self.slots) or "none"
            raise refuse("adapter-not-loaded", f"no adapter {name!r} is loaded", f"loaded are: {known}")
        return self.slots[name]

    @torch.no_grad()
    def _count(self) -> None:
        RankedLinear.edits += 1
        self.active.fill_(max((slot.start + slot.rank for slot in self.slots.values()), default=0))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RankedLinear:
        """Moves and casts like any module, but scales and strengths stay float32."""
        exact = {name: self._buffers[name] for name in self.EXACT}
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
        RankedLinear.edits += 1
        self.slots = {name: Slot(start, rank) for name, (start, rank) in slots.items()}

    def extra_repr(self) -> str:
        used = ", ".join(f"{name} {slot.rank}" for name, slot in self.slots.items()) or "none"
        return f"{self.in_features}, {self.out_features}, ranks={self.max_rank} (used: {used})"
