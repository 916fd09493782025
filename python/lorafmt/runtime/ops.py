"""The two operators, ``torch.ops.lorafmt.quantize_down`` and ``torch.ops.lorafmt.linear_w8a8``.

    xq, xscale, t = quantize_down(x, down, strength)      # one read of x
    y = linear_w8a8(xq, xscale, wq, wscale, t, up, bias)  # y ~ x @ (W + up @ diag(strength) @ down).T + bias

Here are their signatures, what they mean (compositions of torch, for every device), and what they give to the compiler.
The kernels of ``cuda/`` replace the compositions on CUDA. In exact terms, with every operation in float32 unless it
says otherwise, and ``rn`` rounding to the nearest, ties to even:

    xs[m, k]  = x[m, k] * inv_smooth[k]
    a[m]      = max(max_k |xs[m, k]|, 1e-30)
    xscale[m] = a[m] / 127
    xq[m, k]  = rn(xs[m, k] * (127 / a[m]))                           the product is not rounded before
    t[m, r]   = rn16((sum_k x[m, k] * down[r, k]) * strength[r])      of the raw x; 0 from rank `active` on
    s[m, n]   = sum_k xq[m, k] * wq[n, k]                             in integers, exact
    y[m, n]   = rn16(s * (xscale[m] * wscale[n]) + sum_r t[m, r] * up[n, r] + bias[n])

16-bit is the type of ``x``, bfloat16 or float16. ``active`` is an int32 on the device, the number of ranks that count,
so that the others cost nothing and a captured graph follows a change. A row with a NaN or an infinity has a
scale that is one, so its results are NaN; its codes mean nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import library
from .quantize import LIMIT, TINY

_QUANTIZE_DOWN = (
    "(Tensor x, Tensor down, Tensor strength, Tensor? inv_smooth=None, Tensor? active=None) -> (Tensor, Tensor, Tensor)"
)
_LINEAR = (
    "(Tensor xq, Tensor xscale, Tensor wq, Tensor wscale, Tensor t, Tensor up, Tensor? bias=None, "
    "Tensor? active=None, int kernel=0) -> Tensor"
)

#: Values of `kernel` of `linear_w8a8`. The composition knows one way and takes any.
AUTO, MMA, WGMMA_128x256, WGMMA_192x192, WGMMA_128x192, WGMMA_128x128 = range(6)

#: Widths are multiples of these, so that every row starts at 16 bytes.
K_MULTIPLE, N_MULTIPLE, R_MULTIPLE = 16, 8, 8


def _expect(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(f"lorafmt: {message}")


def _check_down(x: Tensor, down: Tensor, strength: Tensor, inv_smooth: Tensor | None, active: Tensor | None) -> None:
    _expect(x.dim() == 2 and down.dim() == 2, "x is [M, K], down is [R, K]")
    width, rank = x.shape[1], down.shape[0]
    _expect(x.dtype in (torch.bfloat16, torch.float16), f"x is bfloat16 or float16, not {x.dtype}")
    _expect(down.dtype == x.dtype, f"down is {down.dtype}, x is {x.dtype}")
    _expect(down.shape[1] == width, f"x has {width} columns, down has {down.shape[1]}")
    _expect(width % K_MULTIPLE == 0, f"K = {width} is not a multiple of {K_MULTIPLE}")
    _expect(rank % R_MULTIPLE == 0, f"R = {rank} is not a multiple of {R_MULTIPLE}")
    _vector(strength, rank, "strength")
    if inv_smooth is not None:
        _vector(inv_smooth, width, "inv_smooth")
    _check_active(active)


def _check_linear(
    xq: Tensor,
    xscale: Tensor,
    wq: Tensor,
    wscale: Tensor,
    t: Tensor,
    up: Tensor,
    bias: Tensor | None,
    active: Tensor | None,
) -> None:
    _expect(all(a.dim() == 2 for a in (xq, wq, t, up)), "xq is [M, K], wq is [N, K], t is [M, R], up is [N, R]")
    (rows, width), columns, rank = xq.shape, wq.shape[0], t.shape[1]
    _expect(xq.dtype == wq.dtype == torch.int8, f"xq and wq are int8, not {xq.dtype} and {wq.dtype}")
    _expect(wq.shape[1] == width, f"xq has {width} columns, wq has {wq.shape[1]}")
    _expect(t.dtype in (torch.bfloat16, torch.float16) and up.dtype == t.dtype, f"t is {t.dtype}, up is {up.dtype}")
    _expect(tuple(t.shape) == (rows, rank) and tuple(up.shape) == (columns, rank), "t is [M, R], up is [N, R]")
    _expect(width % K_MULTIPLE == 0, f"K = {width} is not a multiple of {K_MULTIPLE}")
    _expect(columns % N_MULTIPLE == 0, f"N = {columns} is not a multiple of {N_MULTIPLE}")
    _expect(rank % R_MULTIPLE == 0, f"R = {rank} is not a multiple of {R_MULTIPLE}")
    _vector(xscale, rows, "xscale")
    _vector(wscale, columns, "wscale")
    if bias is not None:
        _expect(bias.dtype == t.dtype and tuple(bias.shape) == (columns,), f"bias is [{columns}] of {t.dtype}")
    _check_active(active)


def _vector(value: Tensor, length: int, name: str) -> None:
    _expect(value.dtype == torch.float32 and tuple(value.shape) == (length,), f"{name} is float32 [{length}]")


def _check_active(active: Tensor | None) -> None:
    if active is not None:
        _expect(active.dtype == torch.int32 and active.numel() == 1, "active is one int32")


def _integer_product(xq: Tensor, wq: Tensor) -> Tensor:
    """``xq @ wq.T`` as float32: the exact integer, rounded once."""
    if xq.device.type != "cuda":
        # Sums of products of bytes are whole numbers far below 2^53.
        return (xq.double() @ wq.double().t()).float()
    rows = xq.shape[0]
    # torch._int_mm wants more than 16 rows, and both widths as multiples of 8.
    padded = torch.nn.functional.pad(xq, (0, 0, 0, max(0, 32 - rows)))
    return torch._int_mm(padded, wq.t())[:rows].float()


def _quantize_down(
    x: Tensor, down: Tensor, strength: Tensor, inv_smooth: Tensor | None = None, active: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    _check_down(x, down, strength, inv_smooth, active)
    x = x.contiguous()
    raw = x.float()
    smoothed = raw if inv_smooth is None else raw * inv_smooth
    largest = smoothed.abs().amax(dim=1, keepdim=True).clamp_min(TINY)
    # Tensors on both sides: torch would divide by a number as a product with its inverse, which rounds twice.
    limit = torch.full_like(largest, LIMIT)
    codes = torch.round(smoothed.double() * (limit / largest).double())
    # A NaN has no code; its row's scale is NaN.
    xq = torch.nan_to_num(codes).clamp_(-LIMIT, LIMIT).to(torch.int8)
    if active is not None:
        strength = torch.where(torch.arange(strength.numel(), device=x.device) < active, strength, 0.0)
    t = (raw @ down.float().t() if x.device.type == "cpu" else (x @ down.t()).float()) * strength
    return xq, (largest / limit).squeeze(1), t.to(x.dtype)


def _linear_w8a8(
    xq: Tensor,
    xscale: Tensor,
    wq: Tensor,
    wscale: Tensor,
    t: Tensor,
    up: Tensor,
    bias: Tensor | None = None,
    active: Tensor | None = None,
    kernel: int = AUTO,
) -> Tensor:
    _check_linear(xq, xscale, wq, wscale, t, up, bias, active)
    y = _integer_product(xq, wq) * (xscale.unsqueeze(1) * wscale)
    # Ranks from `active` on are zeros in t already.
    if t.shape[1]:
        y = y + (t.float() @ up.float().t())
    if bias is not None:
        y = y + bias.float()
    return y.to(t.dtype)


def _quantize_down_fake(x, down, strength, inv_smooth=None, active=None):  # type: ignore[no-untyped-def]
    _check_down(x, down, strength, inv_smooth, active)
    rows = x.shape[0]
    return (
        torch.empty_like(x, dtype=torch.int8, memory_format=torch.contiguous_format),
        x.new_empty((rows,), dtype=torch.float32),
        x.new_empty((rows, down.shape[0])),
    )


def _linear_w8a8_fake(xq, xscale, wq, wscale, t, up, bias=None, active=None, kernel=AUTO):  # type: ignore[no-untyped-def]
    _check_linear(xq, xscale, wq, wscale, t, up, bias, active)
    return t.new_empty((xq.shape[0], wq.shape[0]))


def _define() -> None:
    table = (
        ("quantize_down", _QUANTIZE_DOWN, _quantize_down, _quantize_down_fake),
        ("linear_w8a8", _LINEAR, _linear_w8a8, _linear_w8a8_fake),
    )
    for name, signature, composed, fake in table:
        qualified = f"lorafmt::{name}"
        torch.library.define(qualified, signature, tags=(torch.Tag.needs_fixed_stride_order,))
        torch.library.impl(qualified, "default")(composed)
        torch.library.register_fake(qualified)(fake)


_define()
library.load()

quantize_down = torch.ops.lorafmt.quantize_down
linear_w8a8 = torch.ops.lorafmt.linear_w8a8
