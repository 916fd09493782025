"""What the operators mean, against numpy in float64 and integers; strengths; the compiler."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from lorafmt.runtime import ops
from lorafmt.runtime.quantize import expand_groups, quantize_weight

HALVES = (torch.bfloat16, torch.float16)
#: Half a unit in the last place, relative.
EPS = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def f64(value: Tensor) -> np.ndarray:
    return value.detach().double().numpy()


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def codes(seed: int, *shape: int) -> Tensor:
    return torch.randint(-127, 128, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int8)


def linear_inputs(m: int, k: int, n: int, r: int, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    return {
        "xq": codes(1, m, k),
        "xscale": normal(2, m).abs() + 0.01,
        "wq": codes(3, n, k),
        "wscale": normal(4, n).abs() * 1e-3,
        "t": normal(5, m, r).to(dtype),
        "up": normal(6, n, r).to(dtype),
        "bias": normal(7, n).to(dtype),
    }


@pytest.mark.parametrize("k", [16, 208, 15360])
def test_integer_sums_are_exact(k: int) -> None:
    """Scales of 1 and float32's exact range show the sums themselves."""
    xq, wq = codes(1, 7, k), codes(2, 24, k)
    want = xq.numpy().astype(np.int64) @ wq.numpy().astype(np.int64).T
    assert np.array_equal(ops._integer_product(xq, wq).double().numpy(), want.astype(np.float32).astype(np.float64))


def test_largest_sums_do_not_overflow() -> None:
    xq = torch.full((1, 15360), 127, dtype=torch.int8)
    assert ops._integer_product(xq, -xq).item() == np.float32(-(127**2) * 15360)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("smooth", [False, True])
def test_codes_and_row_scales(dtype: torch.dtype, smooth: bool) -> None:
    """No code is off by more than half a step, the largest is 127, and the scale is the maximum's 127th."""
    x = (normal(1, 33, 208) * torch.exp(normal(2, 208))).to(dtype)
    inverse = torch.exp(normal(3, 208)) if smooth else None
    empty = torch.zeros(0, 208, dtype=dtype)
    xq, scale, t = ops.quantize_down(x, empty, torch.zeros(0), inverse)
    exact = f64(x) * (f64(inverse) if inverse is not None else 1.0)
    assert t.shape == (33, 0)
    assert np.allclose(f64(scale), np.abs(exact).max(axis=1) / 127, rtol=3e-7)
    assert np.abs(f64(xq)).max(axis=1).tolist() == [127.0] * 33
    assert np.all(np.abs(f64(xq) * f64(scale)[:, None] - exact) <= f64(scale)[:, None] * 0.5 * (1 + 1e-4))


def test_ties_go_to_even() -> None:
    """With a maximum of 127 the codes are the values, rounded: 0.5, 1.5, 2.5, -0.5, -1.5."""
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, 3.25, -126.5] + [0.0] * 8], dtype=torch.bfloat16)
    xq, scale, _ = ops.quantize_down(x, torch.zeros(0, 16, dtype=torch.bfloat16), torch.zeros(0))
    assert xq[0, :8].tolist() == [127, 0, 2, 2, 0, -2, 3, -126]
    assert scale.tolist() == [1.0]


def test_rows_of_zeros_and_rows_that_are_not_finite() -> None:
    x = torch.zeros(4, 16, dtype=torch.bfloat16)
    x[1, 3], x[2, 5], x[3] = float("nan"), float("inf"), 1e-38
    none = torch.zeros(0, 16, dtype=torch.bfloat16)
    xq, scale, t = ops.quantize_down(x, none, torch.zeros(0))
    wq, wscale = quantize_weight(normal(1, 8, 16))
    y = ops.linear_w8a8(xq, scale, wq, wscale, t, torch.zeros(8, 0, dtype=torch.bfloat16))
    assert torch.equal(y[0], torch.zeros(8, dtype=torch.bfloat16))
    assert y[1].isnan().all() and not y[2].isfinite().any()
    assert y[3].isfinite().all()


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("r", [0, 8, 40])
def test_the_whole_formula(dtype: torch.dtype, r: int) -> None:
    """One rounding from the exact result; sums in float32 may add a hundredth of it."""
    inputs = linear_inputs(17, 208, 24, r, dtype)
    a = {name: f64(value) for name, value in inputs.items()}
    want = (a["xq"] @ a["wq"].T) * a["xscale"][:, None] * a["wscale"] + a["t"] @ a["up"].T + a["bias"]
    got = f64(ops.linear_w8a8(**inputs))
    magnitude = np.abs(want) + np.abs(a["t"]) @ np.abs(a["up"]).T * 1e-2
    assert np.all(np.abs(got - want) <= EPS[dtype] * 1.02 * magnitude + 1e-7)


def test_the_branch_takes_raw_x() -> None:
    """Smoothing divides the quantized copy only."""
    x, down, strength = normal(1, 5, 64).bfloat16(), normal(2, 8, 64).bfloat16(), normal(3, 8)
    plain = ops.quantize_down(x, down, strength)
    smoothed = ops.quantize_down(x, down, strength, torch.exp(normal(4, 64)))
    assert torch.equal(plain[2], smoothed[2]) and not torch.equal(plain[0], smoothed[0])
    want = f64(x) @ f64(down).T * f64(strength)
    assert np.all(np.abs(f64(plain[2]) - want) <= 2.0**-8 * np.abs(want) + 1e-5)


def branch(seed: int, r: int) -> tuple[Tensor, Tensor, Tensor]:
    return normal(seed, r, 64).bfloat16(), normal(seed + 1, 24, r).bfloat16(), normal(seed + 2, r)


def run(x: Tensor, wq: Tensor, wscale: Tensor, down: Tensor, up: Tensor, strength: Tensor, **more: Tensor) -> Tensor:
    active = more.get("active")
    xq, xscale, t = ops.quantize_down(x, down.contiguous(), strength.contiguous(), None, active)
    return ops.linear_w8a8(xq, xscale, wq, wscale, t, up.contiguous(), None, active)


def test_strength_algebra() -> None:
    x = normal(9, 6, 64).bfloat16()
    base = quantize_weight(normal(10, 24, 64))
    down, up, strength = branch(20, 16)
    whole = run(x, *base, down, up, strength)
    none = torch.zeros(0, 64).bfloat16(), torch.zeros(24, 0).bfloat16(), torch.zeros(0)
    # Strength 0 and rank 0 are the base, bit for bit.
    assert torch.equal(run(x, *base, down, up, torch.zeros(16)), run(x, *base, *none))
    # Padding with ranks of nobody changes nothing.
    padded = [
        torch.cat((down, down[:8])),
        torch.cat((up, torch.zeros(24, 8)), 1).bfloat16(),
        torch.cat((strength, strength[:8])),
    ]
    assert torch.allclose(run(x, *base, *padded).float(), whole.float(), rtol=2**-8, atol=1e-6)
    # The order of ranks is a matter of the last bit of a sum.
    order = torch.randperm(16, generator=torch.Generator().manual_seed(1))
    permuted = run(x, *base, down[order], up[:, order], strength[order])
    assert torch.allclose(permuted.float(), whole.float(), rtol=2**-8, atol=1e-5)
    # `active` cuts ranks off, whatever stands there.
    first = run(x, *base, down[:8], up[:, :8], strength[:8])
    cut = run(x, *base, down, up, strength, active=torch.tensor([8], dtype=torch.int32))
    assert torch.allclose(cut.float(), first.float(), rtol=2**-8, atol=1e-6)


def test_two_adapters_side_by_side_are_their_sum() -> None:
    """In float64, of what the branch adds."""
    x, zero = normal(9, 6, 64).bfloat16(), (torch.zeros(24, 64, dtype=torch.int8), torch.zeros(24))
    one, two = branch(30, 8), branch(40, 24)
    both = run(x, *zero, torch.cat((one[0], two[0])), torch.cat((one[1], two[1]), 1), torch.cat((one[2], two[2])))
    want = sum(f64(x) @ f64(d).T * f64(s) @ f64(u).T for d, u, s in (one, two))
    assert np.linalg.norm(f64(both) - want) <= 4e-3 * np.linalg.norm(want)


def test_weights_are_off_by_half_a_step() -> None:
    weight = normal(1, 40, 96) * torch.exp(normal(2, 40, 1))
    weight[3] = 0
    wq, scale = quantize_weight(weight)
    assert wq.dtype == torch.int8 and scale.dtype == torch.float32
    assert np.all(np.abs(f64(wq) * f64(scale)[:, None] - f64(weight)) <= f64(scale)[:, None] * 0.5 * (1 + 1e-4))
    assert not wq[3].any() and int(wq.min()) >= -127


def test_groups_are_expanded_within_half_a_step_and_the_largest_exactly() -> None:
    scales = torch.exp(normal(1, 32, 4))
    raw = torch.randint(-8, 8, (32, 256), generator=torch.Generator().manual_seed(2), dtype=torch.int8)
    raw[:, ::64] = -8
    wq, scale = expand_groups(raw, scales)
    exact = f64(raw) * np.repeat(f64(scales), 64, axis=1)
    got = f64(wq) * f64(scale)[:, None]
    assert np.all(f64(scale) >= np.abs(exact).max(axis=1) / 127 * (1 - 1e-6))
    assert np.all(np.abs(got - exact) <= f64(scale)[:, None] * 0.5 * (1 + 1e-4))
    largest = np.repeat(f64(scales) == f64(scales).max(axis=1, keepdims=True), 64, axis=1)
    assert np.allclose(got[largest], exact[largest], rtol=1e-6)


def test_groups_that_agree_are_exact() -> None:
    raw = torch.randint(-8, 8, (16, 128), generator=torch.Generator().manual_seed(2), dtype=torch.int8)
    scales = torch.exp(normal(1, 16, 1)).repeat(1, 2)
    wq, scale = expand_groups(raw, scales)
    assert np.allclose(f64(wq) * f64(scale)[:, None], f64(raw) * f64(scales)[:, :1], rtol=1e-6)


WRONG = {
    "K": ({"xq": codes(1, 4, 24), "wq": codes(2, 8, 24)}, "multiple of 16"),
    "N": (
        {"wq": codes(2, 12, 32), "wscale": torch.ones(12), "up": torch.zeros(12, 8).bfloat16(), "bias": None},
        "multiple of 8",
    ),
    "widths": ({"wq": codes(2, 8, 64)}, "xq has 32 columns"),
    "scales": ({"wscale": torch.ones(8).double()}, "wscale is float32"),
    "types": ({"up": torch.zeros(8, 8).half()}, "up is torch.float16"),
    "ranks": ({"up": torch.zeros(8, 16).bfloat16()}, "up is"),
    "bias": ({"bias": torch.zeros(9).bfloat16()}, "bias is"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_operands_are_named(wrong: str) -> None:
    change, words = WRONG[wrong]
    with pytest.raises(ValueError, match=words):
        ops.linear_w8a8(**{**linear_inputs(4, 32, 8, 8), **change})


def test_wrong_inputs_of_the_prologue_are_named() -> None:
    down, strength = torch.zeros(8, 32).bfloat16(), torch.zeros(8)
    for x, words in ((torch.zeros(4, 32), "bfloat16 or float16"), (torch.zeros(4, 16).bfloat16(), "16 columns")):
        with pytest.raises(ValueError, match=words):
            ops.quantize_down(x, down, strength)
    with pytest.raises(ValueError, match="strength is float32"):
        ops.quantize_down(torch.zeros(4, 32).bfloat16(), down, torch.zeros(9))


@pytest.mark.parametrize("r", [0, 8])
def test_operators_are_what_torch_expects(r: int) -> None:
    checks = ("test_schema", "test_faketensor")
    x, strength = normal(1, 5, 32).bfloat16(), torch.ones(r)
    down = normal(2, r, 32).bfloat16()
    active = torch.tensor([r], dtype=torch.int32)
    for arguments in (
        (x, down, strength),
        (x, down, strength, torch.ones(32), active),
        (x.t().contiguous().t(), down, strength),
    ):
        torch.library.opcheck(torch.ops.lorafmt.quantize_down.default, arguments, test_utils=checks)
    inputs = linear_inputs(5, 32, 16, r)
    torch.library.opcheck(torch.ops.lorafmt.linear_w8a8.default, tuple(inputs.values()), test_utils=checks)
    torch.library.opcheck(torch.ops.lorafmt.linear_w8a8.default, (*inputs.values(), active, 0), test_utils=checks)
