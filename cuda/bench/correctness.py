"""Compares the kernels with what the operators mean, computed by torch on the CPU and in float64."""

from __future__ import annotations

import itertools
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from lorafmt.runtime import ops
from lorafmt.runtime.quantize import quantize_weight

#: Odd and even, below, at and above the sizes of tiles; K and N as ragged as operands may be.
ROWS = (1, 17, 77, 128, 193, 515)
SHAPES = ((16, 8), (208, 264), (1040, 520), (3072, 1000))
RANKS = (0, 8, 32, 64, 160, 328)
#: (M, K, N, R) with many more tiles than multiprocessors.
LARGE = ((4608, 1040, 3080, 72), (4600, 15360, 1536, 64), (2000, 3072, 9216, 0))
KERNELS = {
    "mma": ops.MMA,
    "wgmma 128x256": ops.WGMMA_128x256,
    "wgmma 192x192": ops.WGMMA_192x192,
    "wgmma 128x192": ops.WGMMA_128x192,
    "wgmma 128x128": ops.WGMMA_128x128,
}


@dataclass
class Failure:
    """What differed, where."""

    what: str
    kernel: str
    shape: tuple[int, ...]
    dtype: str
    detail: str


def poison(bytes_: int) -> None:
    """Leaves a block of NaN bytes to torch's allocator: what is not written by the next call shows."""
    torch.full((max(bytes_, 1),), 0xFF, dtype=torch.uint8, device="cuda")


def _inputs(m: int, k: int, n: int, r: int, dtype: torch.dtype, seed: int) -> dict[str, Tensor | None]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    smooth = torch.exp(normal(k) * 0.5)
    x = normal(m, k) * torch.exp(normal(k))
    wq, wscale = quantize_weight(normal(n, k) / k**0.5)
    values = {
        "x": x.to(dtype),
        "down": (normal(r, k) / k**0.5).to(dtype),
        "strength": torch.rand(r, generator=generator) + 0.5,
        "inv_smooth": smooth if seed % 2 else None,
        "wq": wq,
        "wscale": wscale,
        "up": (normal(n, r) / 4).to(dtype),
        "bias": normal(n).to(dtype) if seed % 3 else None,
        "active": torch.tensor([r - r // 3], dtype=torch.int32) if seed % 5 == 0 else None,
    }
    return values


def _close(y: Tensor, exact: Tensor, unit: float) -> str | None:
    """None if ``y`` is ``exact`` up to rounding: 3e-3 (bfloat16) in norm, 2 units at the value's or the mean size."""
    error = (y.double() - exact).abs()
    relative = (error.norm() / exact.norm().clamp_min(1e-30)).item()
    scale = torch.maximum(exact.abs(), exact.square().mean().sqrt())
    worst = (error / scale.clamp_min(1e-30)).max().item() if error.numel() else 0.0
    # Of a few numbers all may be unlucky; no rounding is worse than a unit.
    if relative <= unit * (0.75 if y.numel() > 1000 else 1.02) and worst <= 2 * unit:
        return None
    return f"relative {relative:.2e}, worst {worst:.2e}"


def _same(a: Tensor, b: Tensor) -> bool:
    integer = {2: torch.int16, 4: torch.int32, 1: torch.int8}[a.element_size()]
    return torch.equal(a.contiguous().view(integer), b.contiguous().view(integer))


def check_case(m: int, k: int, n: int, r: int, dtype: torch.dtype, seed: int, kernels: dict[str, int]) -> list[Failure]:
    """All comparisons of one shape: the prologue with the CPU's, each product with the exact formula, twice."""
    cpu = _inputs(m, k, n, r, dtype, seed)
    gpu = {name: value.cuda() if value is not None else None for name, value in cpu.items()}
    failures: list[Failure] = []
    unit = 2**-8 if dtype == torch.bfloat16 else 2**-11

    def fail(what: str, kernel: str, detail: str) -> None:
        failures.append(Failure(what, kernel, (m, k, n, r), str(dtype), detail))

    down = ("x", "down", "strength", "inv_smooth", "active")
    for size in (m * k, 4 * m, 2 * m * r):
        poison(size)
    xq, xscale, t = ops.quantize_down(*(gpu[name] for name in down))
    again = ops.quantize_down(*(gpu[name] for name in down))
    if not all(_same(a, b) for a, b in zip((xq, xscale, t), again, strict=True)):
        fail("two runs differ", "prologue", "")
    want_q, want_scale, _ = ops._quantize_down(*(cpu[name] for name in down))
    if not _same(xscale.cpu(), want_scale):
        fail("row scales", "prologue", f"{(xscale.cpu() - want_scale).abs().max()}")
    if not torch.equal(xq.cpu(), want_q):
        off = (xq.cpu().int() - want_q.int()).abs()
        fail("codes", "prologue", f"{int((off > 0).sum())} of {off.numel()} differ, by up to {int(off.max())}")
    active = r if cpu["active"] is None else int(cpu["active"])
    counted = torch.arange(r) < active
    exact_t = cpu["x"].double() @ cpu["down"].double().t() * (cpu["strength"].double() * counted)
    if r and (bad := _close(t.cpu(), exact_t, unit)):
        fail("t", "prologue", bad)

    sums = (xq.double() @ gpu["wq"].double().t()).float()
    scaled = sums * (xscale.unsqueeze(1) * gpu["wscale"])
    exact = scaled.double() + t.double() @ gpu["up"].double().t()
    if gpu["bias"] is not None:
        exact = exact + gpu["bias"].double()
    bits = (scaled if gpu["bias"] is None else scaled + gpu["bias"].float()).to(dtype)
    rest = (gpu["wq"], gpu["wscale"], t, gpu["up"], gpu["bias"], gpu["active"])
    for name, kernel in kernels.items():
        poison(2 * m * n)
        y = ops.linear_w8a8(xq, xscale, *rest, kernel)
        if bad := _close(y, exact, unit):
            fail("y", name, bad)
        if r == 0 and not _same(y, bits):
            fail("bits without a branch", name, f"{int((y != bits).sum())} of {y.numel()}")
        if not _same(y, ops.linear_w8a8(xq, xscale, *rest, kernel)):
            fail("two runs differ", name, "")
    return failures


def check_integers(kernels: dict[str, int]) -> list[Failure]:
    """Integer sums, shown whole: magnitudes that 16 bits hold exactly, with scales of 1."""
    failures = []
    generator = torch.Generator("cuda").manual_seed(3)
    m, k, n = 517, 4000, 776
    sparse = torch.rand(m, k, generator=generator, device="cuda") < 4 / k
    xq = torch.randint(-3, 4, (m, k), generator=generator, device="cuda").to(torch.int8) * sparse
    wq = torch.randint(-127, 128, (n, k), generator=generator, device="cuda").to(torch.int8)
    sums = xq.double() @ wq.double().t()
    keep = sums.abs() <= 2048
    one = torch.ones(m, device="cuda"), torch.ones(n, device="cuda")
    t, up = torch.empty(m, 0, device="cuda", dtype=torch.half), torch.empty(n, 0, device="cuda", dtype=torch.half)
    for name, kernel in kernels.items():
        y = ops.linear_w8a8(xq.contiguous(), one[0], wq, one[1], t, up, None, None, kernel)
        wrong = int((y.double() != sums)[keep].sum())
        if wrong or keep.float().mean() < 0.99:
            failures.append(Failure("integers", name, (m, k, n, 0), "float16", f"{wrong} of {int(keep.sum())}"))
    return failures


def check_special(kernels: dict[str, int]) -> list[Failure]:
    """Rows of zeros give the bias; a NaN or an infinity in a row makes that row's results so, and no other's."""
    failures = []
    m, k, n, r = 70, 1536, 264, 16
    gpu = {
        name: None if value is None else value.cuda() for name, value in _inputs(m, k, n, r, torch.bfloat16, 7).items()
    }
    x = gpu["x"]
    x[3], x[5, 1000], x[40, 7], x[69, 1535] = 0, float("nan"), float("inf"), -float("inf")
    xq, xscale, t = ops.quantize_down(x, gpu["down"], gpu["strength"])
    odd = torch.zeros(m, dtype=torch.bool, device="cuda")
    odd[[5, 40, 69]] = True
    for name, kernel in kernels.items():
        y = ops.linear_w8a8(xq, xscale, gpu["wq"], gpu["wscale"], t, gpu["up"], gpu["bias"], None, kernel)
        good = y[~odd].isfinite().all() and not y[odd].isfinite().any() and _same(y[3], gpu["bias"])
        if not good:
            failures.append(Failure("special rows", name, (m, k, n, r), "bfloat16", ""))
    return failures


def check_all(kernels: dict[str, int], seed: int) -> dict[str, object]:
    """The whole grid; what is returned can be written as JSON."""
    failures = check_integers(kernels) + check_special(kernels)
    cases = 0
    for dtype, (k, n), m, r in itertools.product((torch.bfloat16, torch.float16), SHAPES, ROWS, RANKS):
        failures += check_case(m, k, n, r, dtype, seed + cases, kernels)
        cases += 1
    for shape in LARGE:
        failures += check_case(*shape, torch.bfloat16, seed + cases, kernels)
        cases += 1
    torch.cuda.synchronize()
    return {"cases": cases, "kernels": list(kernels), "failures": [asdict(failure) for failure in failures]}
