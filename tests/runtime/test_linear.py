"""Layers with adapters: they come, change and go without moving or reshaping anything."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lorafmt.exceptions import UsageError
from lorafmt.runtime import FusedLinear, quantize_
from lorafmt.runtime.quantize import leading

K, N = 72, 44  # neither is a multiple of what the operators want


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def adapter(seed: int, rank: int) -> tuple[Tensor, Tensor]:
    return normal(seed, rank, K).bfloat16(), (normal(seed + 1, N, rank) / 8).bfloat16()


def plain(seed: int = 1) -> nn.Linear:
    layer = nn.Linear(K, N, dtype=torch.bfloat16)
    with torch.no_grad():
        layer.weight.copy_(normal(seed, N, K) / K**0.5)
        layer.bias.copy_(normal(seed + 1, N))
    return layer


def state(layer: FusedLinear) -> dict[str, tuple[int, torch.Size]]:
    return {name: (buffer.data_ptr(), buffer.shape) for name, buffer in layer.named_buffers()}


def error(got: Tensor, x: Tensor, weight: np.ndarray, bias: Tensor) -> float:
    want = x.double().numpy() @ weight.T + bias.double().numpy()
    return float(np.linalg.norm(got.double().numpy() - want) / np.linalg.norm(want))


def delta(factors: tuple[Tensor, Tensor], strength: float) -> np.ndarray:
    return strength * factors[1].double().numpy() @ factors[0].double().numpy()


@torch.no_grad()
@pytest.mark.parametrize("rank", [0, 16])
def test_adapters_against_the_merged_weight(rank: int) -> None:
    """With adapters the error to the float64 model is the quantized base's own (within 1.05)."""
    source, x = plain(), normal(5, 3, 4, K).bfloat16()
    layer = FusedLinear.from_linear(source, rank=rank, ranks=64)
    weight = source.weight.double().numpy()
    base = error(layer(x), x, weight, source.bias)
    assert base < 0.012
    one, two = adapter(20, 8), adapter(30, 12)
    layer.load("one", *one, strength=0.5)
    layer.load("two", *two)
    assert error(layer(x), x, weight + delta(one, 0.5) + delta(two, 1), source.bias) <= base * 1.05
    layer.set_strength("one", -1.25)
    layer.remove("two")
    assert error(layer(x), x, weight + delta(one, -1.25), source.bias) <= base * 1.05


@torch.no_grad()
def test_what_comes_and_goes_leaves_nothing_and_moves_nothing() -> None:
    layer, x = FusedLinear.from_linear(plain(), rank=8, ranks=32), normal(5, 6, K).bfloat16()
    before, y, where = layer.state_dict(), layer(x), state(layer)
    before = {name: value.clone() for name, value in before.items()}
    layer.load("a", *adapter(1, 16))
    ya = layer(x)
    layer.load("b", *adapter(2, 8), strength=0.25)
    layer.remove("a")
    layer.load("c", *adapter(3, 10))
    layer.load("c", *adapter(4, 4))  # replaced
    layer.remove("b")
    layer.remove("c")
    assert state(layer) == where
    assert all(torch.equal(before[name], value) for name, value in layer.state_dict().items())
    assert torch.equal(layer(x), y)
    layer.load("a", *adapter(7, 16))
    layer.load("a", *adapter(1, 16))  # a then b is b
    assert torch.equal(layer(x), ya) and not torch.equal(ya, y)


@torch.no_grad()
def test_casting_keeps_scales_and_saving_keeps_names() -> None:
    layer, x = FusedLinear.from_linear(plain(), rank=8, ranks=32), normal(5, 6, K).bfloat16()
    layer.load("a", *adapter(1, 8), strength=0.3)
    y, scales = layer(x), layer.wscale.clone()
    assert torch.equal(layer.to(torch.bfloat16).wscale, scales) and torch.equal(layer(x), y)
    assert layer.half().up.dtype == torch.float16 and layer.strength.dtype == torch.float32
    layer.to(torch.bfloat16)
    copy = FusedLinear.from_linear(plain(9), rank=0, ranks=32)
    copy.load_state_dict(layer.state_dict())
    assert copy.slots == layer.slots and torch.equal(copy(x), layer(x))
    copy.remove("a")
    assert copy.free_rank() == 24


@torch.no_grad()
def test_leading_directions_against_numpy() -> None:
    """What is left is within a percent of what the best factors of this rank leave (Eckart and Young)."""
    weight = normal(1, 96, 64) * torch.linspace(2, 0.1, 64)
    singular = np.linalg.svd(weight.double().numpy(), compute_uv=False)
    for rank in (1, 8, 64):
        up, down = leading(weight, rank)
        assert up.shape == (96, rank) and down.shape == (rank, 64)
        rest = np.linalg.norm(weight.double().numpy() - up.double().numpy() @ down.double().numpy())
        assert rest <= 1.01 * np.linalg.norm(singular[rank:]) + 1e-5 * singular[0]


@torch.no_grad()
def test_strength_twice_is_the_last_one_and_zero_is_the_base() -> None:
    layer, x = FusedLinear.from_linear(plain(), rank=8, ranks=32), normal(5, 6, K).bfloat16()
    y = layer(x)
    layer.load("a", *adapter(1, 8), strength=2.0)
    y2 = layer(x)
    for strength in (0.5, -3.0, 2.0):
        layer.set_strength("a", strength)
    assert torch.equal(layer(x), y2)
    layer.set_strength("a", 0.0)
    assert torch.equal(layer(x), y)


@torch.no_grad()
def test_errors_change_nothing() -> None:
    layer, x = FusedLinear.from_linear(plain(), rank=8, ranks=32), normal(5, 6, K).bfloat16()
    layer.load("a", *adapter(1, 12))
    y, slots = layer(x), dict(layer.slots)
    down, up = adapter(2, 26)  # even without "a" 24 are free
    cases = {
        "adapter-too-wide": lambda: layer.load("a", down, up),
        "adapter-shape-mismatch": lambda: layer.load("b", down[:8], up[:, :9]),
        "adapter-not-loaded": lambda: layer.set_strength("b", 1.0),
    }
    for code, call in cases.items():
        with pytest.raises(UsageError) as refused:
            call()
        assert refused.value.code == code and refused.value.hint
        assert layer.slots == slots and torch.equal(layer(x), y)
    with pytest.raises(UsageError, match="12 of 32"):
        layer.load("b", down, up)
    assert layer.free_rank() == 12


@torch.no_grad()
def test_one_program_serves_all_adapters() -> None:
    """torch.compile traces once, whole, whatever is loaded; the backend is torch's own, which costs no compiler."""
    programs = 0

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]):  # type: ignore[no-untyped-def]
        nonlocal programs
        programs += 1
        return graph.forward

    layer, x = FusedLinear.from_linear(plain(), rank=8, ranks=32), normal(5, 6, K).bfloat16()
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    outputs = [compiled(x)]
    layer.load("a", *adapter(1, 16))
    outputs.append(compiled(x))
    layer.set_strength("a", 0.5)
    outputs.append(compiled(x))
    layer.load("a", *adapter(2, 8))
    assert torch.equal(compiled(x), layer(x))
    layer.remove("a")
    assert torch.equal(compiled(x), outputs[0]) and not torch.equal(outputs[1], outputs[2])
    assert programs == 1


@torch.no_grad()
def test_inductor_compiles_the_whole_layer() -> None:
    layer, x = FusedLinear.from_linear(plain(), rank=8, ranks=16), normal(5, 6, K).bfloat16()
    assert torch.equal(torch.compile(layer, fullgraph=True, dynamic=True)(x), layer(x))


@torch.no_grad()
def test_a_model_is_quantized_where_the_caller_says() -> None:
    model = nn.Sequential(
        plain(1), nn.GELU(), nn.Sequential(nn.Linear(N, 16, dtype=torch.bfloat16)), nn.LayerNorm(16).bfloat16()
    )
    x = normal(5, 6, K).bfloat16()
    y = model(x)
    assert quantize_(model, rank=4, ranks=16, include=lambda name, _: name != "0") == ["2.0"]
    assert type(model[0]) is nn.Linear and isinstance(model[2][0], FusedLinear)
    assert torch.linalg.norm((model(x) - y).float()) <= 0.02 * torch.linalg.norm(y.float())
