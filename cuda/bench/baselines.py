"""What else computes a linear with a LoRA: the rivals that the fused kernels are measured against.

Each is a function of a :class:`Case` that gives a call without arguments. B1, B2 and B3 exist eager and compiled where
that makes a difference, and the faster one counts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear

from lorafmt.runtime import ops
from lorafmt.runtime.quantize import quantize_weight

Call = Callable[[], Tensor]


@dataclass
class Case:
    """One set of inputs: ``x`` [M, K], ``weight`` [N, K], ``down`` [R, K], ``up`` [N, R], bfloat16, and their forms."""

    x: Tensor
    weight: Tensor
    down: Tensor
    up: Tensor
    bias: Tensor
    strength: Tensor
    wq: Tensor
    wscale: Tensor

    @classmethod
    def random(cls, m: int, k: int, n: int, r: int, seed: int, dtype: torch.dtype = torch.bfloat16) -> Case:
        generator = torch.Generator("cuda").manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, device="cuda")

        x, weight = normal(m, k).to(dtype), (normal(n, k) / k**0.5).to(dtype)
        down, up = (normal(r, k) / k**0.5).to(dtype), (normal(n, r) / 4).to(dtype)
        wq, wscale = quantize_weight(weight)
        strength = torch.rand(r, generator=generator, device="cuda") + 0.5
        return cls(x, weight, down, up, normal(n).to(dtype), strength, wq, wscale)


def merged(case: Case) -> Call:
    """B0: bfloat16 with the LoRA folded into the weight."""
    weight = (case.weight.float() + (case.up.float() * case.strength) @ case.down.float()).to(case.x.dtype)
    return lambda: linear(case.x, weight, case.bias)


def _separate(x: Tensor, weight: Tensor, bias: Tensor, down: Tensor, up: Tensor) -> Tensor:
    return torch.addmm(linear(x, weight, bias), x @ down.t(), up.t())


def _rowwise_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    scale = x.abs().amax(dim=1, keepdim=True).float().clamp_min(1e-12) / 448
    return (x.float() / scale).to(torch.float8_e4m3fn), scale


def _rowwise_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    scale = x.abs().amax(dim=1, keepdim=True).float().clamp_min(1e-12) / 127
    return torch.round(x.float() / scale).to(torch.int8), scale


def _scaled(sums: Tensor, row: Tensor, column: Tensor, bias: Tensor) -> Tensor:
    return (sums.float() * (row * column) + bias.float()).to(bias.dtype)


_compiled: dict[str, Callable[..., object]] = {}


def _compile(name: str, function: Callable[..., object]) -> Callable[..., object]:
    if name not in _compiled:
        _compiled[name] = torch.compile(function, dynamic=False)
    return _compiled[name]


def separate_eager(case: Case) -> Call:
    """B1: bfloat16 and the LoRA beside it, as PEFT computes it (its scale folded into ``up``)."""
    up = (case.up.float() * case.strength).to(case.x.dtype)
    return lambda: _separate(case.x, case.weight, case.bias, case.down, up)


def separate_compiled(case: Case) -> Call:
    """B1, compiled."""
    up = (case.up.float() * case.strength).to(case.x.dtype)
    function = _compile("separate", _separate)
    return lambda: function(case.x, case.weight, case.bias, case.down, up)  # type: ignore[return-value]


def fp8_separate(case: Case) -> Call:
    """B2: fp8 with row and column scales through cuBLASLt or CUTLASS, the LoRA beside it."""
    up = (case.up.float() * case.strength).to(case.x.dtype)
    scale = case.weight.float().abs().amax(dim=1).clamp_min(1e-12) / 448
    weight = (case.weight.float() / scale.unsqueeze(1)).to(torch.float8_e4m3fn).t()
    quantize = _compile("fp8", _rowwise_fp8)

    def call() -> Tensor:
        xq, row = quantize(case.x)  # type: ignore[misc]
        y = torch._scaled_mm(
            xq, weight, row, scale.unsqueeze(0), bias=case.bias, out_dtype=torch.bfloat16, use_fast_accum=True
        )
        return torch.addmm(y, case.x @ case.down.t(), up.t())

    return call


def int8_separate(case: Case) -> Call:
    """B3: int8 through cuBLASLt, a compiled rescaling, the LoRA beside it."""
    up = (case.up.float() * case.strength).to(case.x.dtype)
    quantize, scaled = _compile("int8", _rowwise_int8), _compile("scaled", _scaled)
    column = case.wscale.unsqueeze(0)

    def call() -> Tensor:
        xq, row = quantize(case.x)  # type: ignore[misc]
        y: Tensor = scaled(torch._int_mm(xq, case.wq.t()), row, column, case.bias)  # type: ignore[assignment]
        return torch.addmm(y, case.x @ case.down.t(), up.t())

    return call


def fused(case: Case, kernel: int = ops.AUTO) -> Call:
    """The two operators."""

    def call() -> Tensor:
        xq, xscale, t = ops.quantize_down(case.x, case.down, case.strength)
        return ops.linear_w8a8(xq, xscale, case.wq, case.wscale, t, case.up, case.bias, None, kernel)

    return call


def prologue_only(case: Case) -> Call:
    """P alone."""
    return lambda: ops.quantize_down(case.x, case.down, case.strength)[0]


def product_only(case: Case, kernel: int = ops.AUTO) -> Call:
    """G alone."""
    xq, xscale, t = ops.quantize_down(case.x, case.down, case.strength)
    return lambda: ops.linear_w8a8(xq, xscale, case.wq, case.wscale, t, case.up, case.bias, None, kernel)


def scaled_mm_only(case: Case) -> Call:
    """The fp8 product of B2 alone: what G is compared with."""
    xq, row = _rowwise_fp8(case.x)
    scale = case.weight.float().abs().amax(dim=1).clamp_min(1e-12) / 448
    weight = (case.weight.float() / scale.unsqueeze(1)).to(torch.float8_e4m3fn).t()
    column = scale.unsqueeze(0)
    return lambda: torch._scaled_mm(
        xq, weight, row, column, bias=case.bias, out_dtype=torch.bfloat16, use_fast_accum=True
    )
