"""Adapters of whole models by the names of Nunchaku and diffusers: right, exchangeable, undone to the last bit."""

from __future__ import annotations

import copy
import runpy
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from torch import Tensor, nn

pytest.importorskip("diffusers", reason="diffusers is not installed")

import lorafmt
from lorafmt import LorafmtError, runtime
from lorafmt.runtime import BranchLinear, FusedLinear

TO_Q = "transformer_blocks.0.attn.to_q"


@pytest.fixture(scope="module")
def plain() -> nn.Module:
    return tiny.model()


@pytest.fixture(scope="module")
def quantized(plain: nn.Module) -> nn.Module:
    model = copy.deepcopy(plain)
    runtime.quantize_(model, rank=8, ranks=40)
    model.adapters = runtime.Adapters(model, family=tiny.register())
    return model


@pytest.fixture
def model(quantized: nn.Module) -> Any:
    quantized.reset_lora()
    yield quantized
    quantized.reset_lora()


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


def same(model: nn.Module, before: dict[str, Tensor]) -> bool:
    return all(torch.equal(before[name], buffer) for name, buffer in model.named_buffers())


def places(model: nn.Module) -> dict[str, tuple[int, torch.Size]]:
    return {name: (buffer.data_ptr(), buffer.shape) for name, buffer in model.named_buffers()}


# -------------------------------------------------------------------------------- right


def test_a_model_is_quantized_with_one_layer_for_q_k_and_v(quantized: nn.Module) -> None:
    attention = quantized.transformer_blocks[0].attn
    assert isinstance(attention.to_qkv, FusedLinear) and isinstance(attention.to_added_qkv, FusedLinear)
    assert attention.to_qkv.out_features == 384 and not hasattr(attention, "to_q")
    assert isinstance(quantized.transformer_blocks[0].norm1.linear, BranchLinear)
    assert type(quantized).__name__ == "FluxTransformer2DModel" and not any(
        type(module) is nn.Linear for module in quantized.modules()
    )


def test_quantized_models_with_adapters_are_as_good_as_without(plain: nn.Module, model: nn.Module) -> None:
    """Figure: the error to the float64 model with the adapter merged is at most 1.05 times the base's own."""
    ratios = []
    for seed in range(3):
        adapter = tiny.lora(seed + 20, rank=8, size=0.08)
        model.load_lora_adapter(adapter, adapter_name=f"a{seed}")
        model.set_adapters(f"a{seed}", 0.7)
        errors = []
        for strength in (0.0, 0.7):
            model.set_adapters(f"a{seed}", strength)
            reference = tiny.merged(plain, (adapter, strength))
            step = [
                tiny.distance(tiny.run(model, at, size=8), tiny.run(reference, at, torch.float64, size=8))
                for at in (7, 77)
            ]
            errors.append(sum(step))
        ratios.append(errors[1] / errors[0])
        model.delete_adapters(f"a{seed}")
    assert sum(ratios) / len(ratios) <= 1.05 and max(ratios) <= 1.1


@pytest.mark.parametrize("fuse", [True, False])
def test_several_adapters_at_several_strengths(plain: nn.Module, fuse: bool) -> None:
    model = copy.deepcopy(plain)
    runtime.quantize_(model, rank=8, ranks=40, fuse=fuse)
    one, two = tiny.lora(1, rank=6), tiny.lora(2, rank=3, only="attn|proj_out")
    family = tiny.register()
    model.load_lora_adapter(one, adapter_name="one", family=family)
    model.load_lora_adapter(two, adapter_name="two", family=family, strength=-0.5)
    assert model.get_active_adapters() == ["one", "two"]
    model.set_adapters(["two", "one"], [-0.5, 0.25])
    want = tiny.run(tiny.merged(plain, (one, 0.25), (two, -0.5)), dtype=torch.float64)
    assert tiny.distance(tiny.run(model), want) < 0.02
    model.set_lora_strength(2.0)
    want = tiny.run(tiny.merged(plain, (one, 0.5), (two, -1.0)), dtype=torch.float64)
    assert tiny.distance(tiny.run(model), want) < 0.03


def kohya(seed: int, alpha: float = 2.0) -> dict[str, Tensor]:
    """Fused modules under original names: q, k and v (and the MLP) have one `down`."""
    out = {}
    for number, (name, rows, columns) in enumerate(
        (
            ("double_blocks_0_img_attn_qkv", 384, 128),
            ("double_blocks_0_txt_mlp_0", 512, 128),
            ("single_blocks_0_linear1", 896, 128),
            ("single_blocks_0_linear2", 128, 640),
        )
    ):
        at = 100 * seed + 2 * number
        out[f"lora_unet_{name}.lora_down.weight"] = tiny.normal(at, 4, columns) / columns**0.5
        out[f"lora_unet_{name}.lora_up.weight"] = tiny.normal(at + 1, rows, 4) / 4
        out[f"lora_unet_{name}.alpha"] = torch.tensor(alpha)
    return out


def in_diffusers_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """By hand, alpha and all, in float64."""
    rows = {
        "double_blocks_0_img_attn_qkv": [(f"transformer_blocks.0.attn.to_{x}", 128) for x in "qkv"],
        "double_blocks_0_txt_mlp_0": [("transformer_blocks.0.ff_context.net.0.proj", 512)],
        "single_blocks_0_linear1": [
            *((f"single_transformer_blocks.0.attn.to_{x}", 128) for x in "qkv"),
            ("single_transformer_blocks.0.proj_mlp", 512),
        ],
        "single_blocks_0_linear2": [("single_transformer_blocks.0.proj_out", 128)],
    }
    out = {}
    for name, parts in rows.items():
        down, up, alpha = (tensors[f"lora_unet_{name}.{x}"] for x in ("lora_down.weight", "lora_up.weight", "alpha"))
        at = 0
        for path, size in parts:
            out[f"transformer.{path}.lora_A.weight"] = down.double() * alpha.double() / 4
            out[f"transformer.{path}.lora_B.weight"] = up[at : at + size].double()
            at += size
    return out


def test_any_dialect_goes_in_and_equal_factors_share_their_ranks(
    plain: nn.Module, model: nn.Module, tmp_path: Path
) -> None:
    tensors = kohya(3)
    want = tiny.run(tiny.merged(plain, (in_diffusers_names(tensors), 1.0)), dtype=torch.float64)
    lorafmt.torch.save_file(tensors, tmp_path / "kohya.safetensors")
    for source in (tmp_path / "kohya.safetensors", tensors, lorafmt.open(tensors, family=tiny.FAMILY)):
        model.update_lora_params(source)
        assert tiny.distance(tiny.run(model), want) < 0.02
    assert model.transformer_blocks[0].attn.to_qkv.slots["lora"].rank == 4
    shared = state(model)
    model.reset_lora()
    model.load_lora_adapter(tensors, adapter_name="lora", share=False)
    assert model.transformer_blocks[0].attn.to_qkv.slots["lora"].rank == 12
    assert not same(model, shared) and tiny.distance(tiny.run(model), want) < 0.02


def test_an_exchange_leaves_nothing_of_what_was_there(model: nn.Module) -> None:
    """Ranks that are written over are those of a fresh load, whichever parts of a layer either adapter has."""
    middle = tiny.lora(5, rank=9, only="to_k|add_k|proj_mlp")
    sources = [kohya(3), middle, tiny.lora(6, rank=3), biased(2), kohya(4), tiny.lora(7, rank=5, only="to_q|to_v")]
    fresh = []
    for source in sources:
        model.update_lora_params(source)
        fresh.append(state(model))
        model.reset_lora()
    for source, want in zip(sources, fresh, strict=True):
        model.update_lora_params(source)
        assert same(model, want)


# -------------------------------------------------------------------------------- strengths


def test_strengths_are_exact(model: nn.Module) -> None:
    base = tiny.run(model)
    one, two = tiny.lora(1), tiny.lora(2)
    model.load_lora_adapter(one, adapter_name="one")
    alone = tiny.run(model)
    model.load_lora_adapter(two, adapter_name="two")
    both, bits = tiny.run(model), state(model)
    model.set_adapters(["one", "two"], [0.3, -2.0])
    model.set_adapters(["one", "two"])
    assert same(model, bits) and torch.equal(tiny.run(model), both)
    model.set_adapters("one")
    assert torch.equal(tiny.run(model), alone) and model.get_active_adapters() == ["one"]
    model.set_adapters(["one", "two"], 0.0)
    assert torch.equal(tiny.run(model), base)
    model.set_adapters(["one", "two"], 1.0)
    model.disable_lora()
    assert torch.equal(tiny.run(model), base) and model.get_active_adapters() == []
    assert all(
        int(layer.active) == layer.slots["base"].rank
        for layer in model.adapters.layers.values()
        if "base" in layer.slots
    )
    model.enable_lora()
    assert torch.equal(tiny.run(model), both)
    model.set_lora_strength(0.0)
    assert torch.equal(tiny.run(model), base)
    model.set_lora_strength()
    model.delete_adapters("one")
    model.delete_adapters(["two"])
    assert torch.equal(tiny.run(model), base) and model.get_list_adapters() == {}


def test_strengths_by_place(plain: nn.Module, model: nn.Module) -> None:
    adapter = tiny.lora(4, size=0.5)
    model.load_lora_adapter(adapter, adapter_name="a")
    by_place = {"*": 0.5, "transformer_blocks.0": 2.0, "**.attn.to_q": 0.0}
    nested = {"transformer_blocks": {"0": {"attn": 0.25}}, "single_transformer_blocks": 3.0, "*": 0.5}

    def factors(path: str) -> tuple[float, float]:
        selected = 0.0 if path.endswith("attn.to_q") else 2.0 if path.startswith("transformer_blocks.0") else 1.0
        single = 3.0 if path.startswith("single") else 1.0
        return 0.5 * selected, 0.5 * (0.25 if path.startswith("transformer_blocks.0.attn") else single)

    for number, weights in enumerate((by_place, nested)):
        model.set_adapters(["a"], [weights])
        scaled = {
            key: value * factors(key.removeprefix("transformer.").rsplit(".", 2)[0])[number]
            if "lora_B" in key
            else value
            for key, value in ((key, value.double()) for key, value in adapter.items())
        }
        want = tiny.run(tiny.merged(plain, (scaled, 1.0)), dtype=torch.float64)
        assert tiny.distance(tiny.run(model), want) < 0.02
    bits = state(model)
    model.set_adapters("a", 1.0)
    model.set_adapters("a", nested)
    assert same(model, bits)


def test_modules_that_share_ranks_have_one_strength(model: nn.Module) -> None:
    model.load_lora_adapter(kohya(3), adapter_name="a")
    before = state(model)
    with pytest.raises(LorafmtError) as refused:
        model.set_adapters("a", {"**.attn.to_q": 0.5})
    assert refused.value.code == "strength-not-held" and "share=False" in refused.value.hint and same(model, before)
    model.delete_adapters("a")
    model.load_lora_adapter(kohya(3), adapter_name="a", share=False, strength={"**.attn.to_q": 0.5})


def test_fused_adapters_stay_as_they_are_until_they_are_unfused(model: nn.Module) -> None:
    base = tiny.run(model)
    model.load_lora_adapter(tiny.lora(1), adapter_name="a")
    model.set_adapters("a", 0.5)
    half = tiny.run(model)
    model.set_adapters("a", 1.0)
    model.fuse_lora(lora_scale=0.5, safe_fusing=True)
    assert torch.equal(tiny.run(model), half)
    model.load_lora_adapter(tiny.lora(2), adapter_name="b")
    model.set_adapters("b", 0.0)
    model.disable_lora()
    assert torch.equal(tiny.run(model), half) and model.get_active_adapters() == ["a"]
    model.unfuse_lora()
    assert torch.equal(tiny.run(model), base)
    model.enable_lora()
    model.load_lora_adapter({**tiny.lora(3), **_with_nan(tiny.lora(3))}, adapter_name="c")
    with pytest.raises(LorafmtError) as refused:
        model.fuse_lora(safe_fusing=True, adapter_names=["c"])
    assert refused.value.code == "not-finite"


def _with_nan(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    key = next(key for key in tensors if "lora_B" in key)
    value = tensors[key].clone()
    value[0, 0] = float("nan")
    return {key: value}


# -------------------------------------------------------------------------------- nothing moves


def test_nothing_is_compiled_again_and_nothing_moves(quantized: nn.Module) -> None:
    """A backend that counts sees one program, whatever comes, goes and changes by whatever name."""
    model = copy.deepcopy(quantized)
    programs = 0

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        nonlocal programs
        programs += 1
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend)
    base, where = tiny.run(compiled), places(model)
    first = programs
    seen = []
    for act in (
        lambda: model.update_lora_params(tiny.lora(1)),
        lambda: model.set_lora_strength(0.5),
        lambda: model.load_lora_adapter(tiny.lora(2, rank=2), adapter_name="b"),
        lambda: model.set_adapters(["b", "lora"], [{"transformer_blocks.0": 0.5}, 2.0]),
        lambda: model.load_lora_adapter(kohya(3), adapter_name="b", hotswap=True),
        lambda: model.load_lora_adapter(biased(1), adapter_name="c"),
        lambda: model.disable_lora(),
        lambda: model.enable_lora(),
        lambda: model.fuse_lora(),
        lambda: model.unfuse_lora(),
        lambda: model.delete_adapters("b"),
        lambda: model.reset_lora(),
    ):
        act()
        seen.append(tiny.run(compiled))
        assert torch.equal(seen[-1], tiny.run(model)) and places(model) == where
    assert programs == first > 0
    assert torch.equal(seen[-1], base) and torch.equal(seen[6], base) and not torch.equal(seen[5], seen[4])


def test_models_can_be_moved_cast_and_copied(model: nn.Module) -> None:
    model.load_lora_adapter(tiny.lora(1), adapter_name="a")
    y = tiny.run(model)
    model.to("cpu").to(torch.bfloat16)
    assert torch.equal(tiny.run(model), y)
    twin = copy.deepcopy(model)
    twin.set_adapters("a", 0.5)
    assert torch.equal(tiny.run(model), y) and not torch.equal(tiny.run(twin), y)
    # A layer that was moved by itself is out of the common memory, and still follows.
    layer = next(iter(twin.adapters.layers.values()))
    layer._buffers["strength"] = layer.strength.clone()
    layer._buffers["active"] = layer.active.clone()
    twin.set_adapters("a", 1.0)
    assert torch.equal(tiny.run(twin), y)
    half = twin.half()
    assert tiny.distance(tiny.run(half, dtype=torch.float16), y) < 0.03


# -------------------------------------------------------------------------------- what does not fit


def biased(seed: int) -> dict[str, Tensor]:
    """An adapter that also changes biases, as control adapters do."""
    tensors = tiny.lora(seed, only="to_q|x_embedder|norm1.linear")
    biases = {key.replace("lora_B.weight", "lora_B.bias"): value for key, value in tensors.items() if "lora_B" in key}
    return {**tensors, **{key: tiny.normal(seed, len(value)).bfloat16() for key, value in biases.items()}}


def test_biases_are_added_and_taken_out_to_the_last_bit(plain: nn.Module, model: nn.Module) -> None:
    before = state(model)
    adapter, other = biased(3), biased(4)
    model.load_lora_adapter(adapter, adapter_name="a")
    model.load_lora_adapter(other, adapter_name="b")
    model.set_adapters(["a", "b"], [0.5, -1.0])
    want = tiny.run(tiny.merged(plain, (adapter, 0.5), (other, -1.0)), dtype=torch.float64)
    assert tiny.distance(tiny.run(model), want) < 0.02
    model.delete_adapters("b")
    model.set_adapters("a", 0.5)
    want = tiny.run(tiny.merged(plain, (adapter, 0.5)), dtype=torch.float64)
    assert tiny.distance(tiny.run(model), want) < 0.02
    model.delete_adapters("a")
    assert same(model, before)


def lokr() -> tuple[dict[str, Tensor], Tensor]:
    """A LoKr of the rank that its small factor has, and its difference in float64."""
    w1, a, b = tiny.normal(1, 4, 4), tiny.normal(2, 32, 2), tiny.normal(3, 2, 32)
    name = "lycoris_transformer_blocks_0_attn_to_q"
    tensors = {
        f"{name}.lokr_w1": w1,
        f"{name}.lokr_w2_a": a,
        f"{name}.lokr_w2_b": b,
        f"{name}.alpha": torch.tensor(1.0),
    }
    return tensors, torch.kron(w1.double(), a.double() @ b.double()) / 2


def test_lokr_is_expanded_exactly(model: nn.Module) -> None:
    tensors, delta = lokr()
    model.load_lora_adapter(tensors, adapter_name="k")
    layer = model.transformer_blocks[0].attn.to_qkv
    ranks = layer.slots["k"].ranks
    assert layer.slots["k"].rank == 8
    got = layer.up[:128, ranks].double() @ layer.down[ranks].double()
    assert tiny.distance(got, delta) < 2**-7
    model.load_lora_adapter(tensors, adapter_name="k", hotswap=True, expand={"rank": 2})
    assert layer.slots["k"].rank == 2


def test_dora_needs_the_weights_and_is_refused_by_name(plain: nn.Module, model: nn.Module, tmp_path: Path) -> None:
    tensors = tiny.lora(1, only=r"^transformer_blocks.0.attn.to_q$")
    dora = {**tensors, "transformer.transformer_blocks.0.attn.to_q.lora_magnitude_vector": torch.ones(128)}
    before = state(model)
    with pytest.raises(LorafmtError) as refused:
        model.load_lora_adapter(dora, adapter_name="d")
    assert refused.value.code == "weights-needed" and "to_q" in str(refused.value) and same(model, before)
    lorafmt.torch.save_file(plain.state_dict(), tmp_path / "base.safetensors")
    model.load_lora_adapter(dora, adapter_name="d", expand={"base_weights": tmp_path / "base.safetensors", "rank": 24})
    layer = model.transformer_blocks[0].attn.to_qkv
    ranks = layer.slots["d"].ranks
    weight = plain.get_submodule("transformer_blocks.0.attn.to_q").weight.double()
    updated = (
        weight
        + tensors[f"transformer.{TO_Q}.lora_B.weight"].double() @ tensors[f"transformer.{TO_Q}.lora_A.weight"].double()
    )
    delta = updated / updated.norm(dim=1, keepdim=True) - weight
    s = torch.linalg.svdvals(delta.detach())
    best = torch.linalg.norm(s[24:])
    got = layer.up[:128, ranks].double() @ layer.down[ranks].double()
    assert torch.linalg.norm(got - delta) <= 1.05 * best + 2**-7 * s[0]


def test_norms_are_refused_by_name_or_left_out(model: nn.Module) -> None:
    tensors = {**tiny.lora(1, only="to_q"), "transformer.transformer_blocks.0.attn.norm_q.weight": torch.ones(64)}
    before = state(model)
    with pytest.raises(LorafmtError) as refused:
        model.load_lora_adapter(tensors, adapter_name="n")
    assert refused.value.code == "unsupported-kind" and "norm_q" in str(refused.value) and same(model, before)
    with pytest.warns(UserWarning, match="norm_q"):
        loaded = model.load_lora_adapter(tensors, adapter_name="n", lossy="allow")
    assert loaded.left_out == ("transformer_blocks.0.attn.norm_q",)


def test_parts_for_text_encoders_are_left_out_with_a_warning(model: nn.Module) -> None:
    te = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
    extra = {f"{te}.lora_A.weight": torch.ones(2, 768), f"{te}.lora_B.weight": torch.ones(768, 2)}
    with pytest.warns(UserWarning, match="self_attn"):
        loaded = model.load_lora_adapter({**tiny.lora(1, only="to_q"), **extra}, adapter_name="t")
    assert loaded.others == (te,)
    before = state(model)
    with pytest.raises(LorafmtError) as refused:
        model.load_lora_adapter(extra, adapter_name="u")
    assert refused.value.code in ("no-modules", "module-not-in-model") and same(model, before)


# -------------------------------------------------------------------------------- refused


def failures(folder: Path) -> dict[str, tuple[str, Callable[[nn.Module], Any]]]:
    missing = {
        k.replace("single_transformer_blocks.0", "single_transformer_blocks.30"): v for k, v in tiny.lora(5).items()
    }
    (folder / "cut.safetensors").write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00{}")
    return {
        "too wide": ("adapter-too-wide", lambda m: m.load_lora_adapter(tiny.lora(5, rank=29), adapter_name="x")),
        "too wide in place": ("adapter-too-wide", lambda m: m.update_lora_params(tiny.lora(5, rank=200))),
        "no such block": ("module-not-in-model", lambda m: m.load_lora_adapter(missing, adapter_name="x")),
        "other sizes": ("shape-mismatch", lambda m: m.update_lora_params(_wide(tiny.lora(5)))),
        "half a pair": ("unpaired-module", lambda m: m.update_lora_params(dict(list(tiny.lora(5).items())[1:]))),
        "no file": ("not-found", lambda m: m.update_lora_params(folder / "none.safetensors")),
        "no whole file": ("header-too-large", lambda m: m.update_lora_params(folder / "cut.safetensors")),
        "name in use": ("adapter-exists", lambda m: m.load_lora_adapter(tiny.lora(5), adapter_name="old")),
        "the base's name": ("invalid-argument", lambda m: m.load_lora_adapter(tiny.lora(5), adapter_name="base")),
        "nothing to swap": (
            "adapter-not-loaded",
            lambda m: m.load_lora_adapter(tiny.lora(5), adapter_name="x", hotswap=True),
        ),
        "no such adapter": ("adapter-not-loaded", lambda m: m.set_adapters(["old", "x"], [1, 2])),
        "no such adapter to delete": ("adapter-not-loaded", lambda m: m.delete_adapters(["old", "x"])),
        "weights missing": ("invalid-argument", lambda m: m.set_adapters(["old"], [1, 2])),
        "no number": ("invalid-argument", lambda m: m.set_adapters("old", float("nan"))),
        "no strength": ("invalid-argument", lambda m: m.set_lora_strength("much")),  # type: ignore[arg-type]
        "no such component": ("invalid-argument", lambda m: m.set_adapters("old", {"blocks": [1.0, 2.0]})),
        "training": ("unsupported-call", lambda m: m.add_adapter(None)),
        "no room": ("adapter-too-wide", lambda m: m.enable_lora_hotswap(500)),
    }


def _wide(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: torch.cat((value, value), dim=1) if "lora_A" in key else value for key, value in tensors.items()}


@pytest.mark.parametrize("case", failures(Path("/tmp")))
def test_what_fails_leaves_everything_as_it_was(model: nn.Module, tmp_path: Path, case: str) -> None:
    code, act = failures(tmp_path)[case]
    model.load_lora_adapter(biased(1), adapter_name="old", strength=0.5)
    model.set_lora_strength(0.75)
    before, y = state(model), tiny.run(model)
    slots = {name: dict(layer.slots) for name, layer in model.adapters.layers.items()}
    with pytest.raises(LorafmtError) as refused:
        act(model)
    assert refused.value.code == code and refused.value.hint
    assert same(model, before) and torch.equal(tiny.run(model), y)
    assert slots == {name: layer.slots for name, layer in model.adapters.layers.items()}
    assert model.get_list_adapters() == {"transformer": ["old"]} and model.get_active_adapters() == ["old"]


def test_messages_name_what_is_wrong(model: nn.Module) -> None:
    with pytest.raises(LorafmtError, match=r"32 are free|32 of 40|of 40 are free") as refused:
        model.load_lora_adapter(tiny.lora(5, rank=33, only="to_out"), adapter_name="x")
    assert "resize(32)" in refused.value.hint
    missing = {k.replace("blocks.0", "blocks.7"): v for k, v in tiny.lora(5, only="to_out").items()}
    with pytest.raises(LorafmtError, match=r"transformer_blocks\.7\.attn\.to_out\.0"):
        model.load_lora_adapter(missing, adapter_name="x")


# -------------------------------------------------------------------------------- files and pipelines


def test_adapters_are_saved_as_they_are(model: nn.Module, tmp_path: Path) -> None:
    for number, source in enumerate((tiny.lora(1), kohya(3), biased(2))):
        model.update_lora_params(source)
        y = tiny.run(model)
        path = model.save_lora_adapter(tmp_path / str(number), "lora")
        model.reset_lora()
        model.load_lora_adapter(tmp_path / str(number), adapter_name="back")
        assert torch.equal(tiny.run(model), y) and path.name == "pytorch_lora_weights.safetensors"
        model.reset_lora()
    saved = lorafmt.torch.load_file(tmp_path / "0" / "pytorch_lora_weights.safetensors")
    for key, value in tiny.lora(1).items():
        assert torch.equal(saved[key.removeprefix("transformer.")], value)


def test_alphas_that_diffusers_hands_over_are_applied(model: nn.Module) -> None:
    tensors = tiny.lora(1)
    alphas = {key.replace("lora_A.weight", "alpha"): 2.0 for key in tensors if "lora_A" in key}
    model.load_lora_adapter(tensors, adapter_name="a", network_alphas=alphas)
    halved = tiny.run(model)
    model.reset_lora()
    model.load_lora_adapter(tensors, adapter_name="a", strength=0.5)
    assert tiny.distance(halved, tiny.run(model)) < 2**-7


def test_the_example_runs_a_whole_pipeline() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = runpy.run_path(str(tiny.ROOT / "examples" / "flux_adapters.py"))["main"]()
    assert found["adapter"] > 0.05 and found["quantized"] < 0.2 * found["adapter"]
    assert found["again"] < 0.2 * found["adapter"] and found["reset"] < 0.2 * found["adapter"] and not found["moved"]


def pipeline(transformer: nn.Module) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline

    empty = dict.fromkeys(("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    return FluxPipeline(scheduler=FlowMatchEulerDiscreteScheduler(), transformer=transformer, **empty)


def test_load_lora_into_a_plain_pipeline(plain: nn.Module) -> None:
    """Whatever the dialect, the pipeline computes with alpha and strength what the merged model does."""
    pipe = pipeline(copy.deepcopy(plain))
    tensors, other = kohya(3), tiny.lora(4, only="to_out")
    tiny.register()
    report = lorafmt.diffusers.load_lora(pipe, tensors, "a", strength=0.5, family=tiny.FAMILY)
    assert report.tensors.used == len(tensors)
    lorafmt.diffusers.load_lora(pipe, other, "b", strength=2.0, family=tiny.FAMILY)
    want = tiny.run(tiny.merged(plain, (in_diffusers_names(tensors), 0.5), (other, 2.0)), dtype=torch.float64)
    assert tiny.distance(tiny.run(pipe.transformer), want) < 0.02
    assert sorted(pipe.get_active_adapters()) == ["a", "b"]
    for code, kwargs in {"invalid-argument": {"strength": 1.0}, "unknown-key": {"adapter_name": "c"}}.items():
        source = {**other, "nobody.knows": torch.ones(1)} if code == "unknown-key" else other
        with pytest.raises(LorafmtError) as refused:
            lorafmt.diffusers.load_lora(pipe, source, family=tiny.FAMILY, **kwargs)
        assert refused.value.code == code


def test_pipelines_work_on_quantized_models(plain: nn.Module, model: nn.Module) -> None:
    """diffusers' own calls end in the model's methods."""
    pipe = pipeline(model)
    one, two = tiny.lora(1), tiny.lora(2)
    lorafmt.diffusers.load_lora(pipe, one, "one", family=tiny.register())
    lorafmt.diffusers.load_lora(pipe, two, "two", family=tiny.FAMILY)
    pipe.set_adapters(["one", "two"], [0.5, 0.25])
    want = tiny.run(tiny.merged(plain, (one, 0.5), (two, 0.25)), dtype=torch.float64)
    assert tiny.distance(tiny.run(model), want) < 0.02
    lorafmt.diffusers.load_lora(pipe, two, "one", hotswap=True, family=tiny.FAMILY)
    pipe.delete_adapters("two")
    assert pipe.get_list_adapters() == {"transformer": ["one"]}
    pipe.set_adapters("one", 1.0)
    pipe.disable_lora()
    pipe.enable_lora()
    assert tiny.distance(tiny.run(model), tiny.run(tiny.merged(plain, (two, 1.0)), dtype=torch.float64)) < 0.02
    lorafmt.diffusers.load_lora(pipe, kohya(3), "three", strength=0.5, family=tiny.FAMILY)
    assert model.get_active_adapters() == ["one", "three"]
    te = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
    extra = {f"{te}.lora_A.weight": torch.ones(2, 768), f"{te}.lora_B.weight": torch.ones(768, 2)}
    with pytest.warns(UserWarning, match="text encoders"):
        lorafmt.diffusers.load_lora(pipe, {**tiny.lora(4, rank=2), **extra}, "four", family=tiny.FAMILY)
    pipe.unload_lora_weights()
    assert model.get_list_adapters() == {}


def test_ranks_that_a_layer_was_given_by_itself_stay(model: nn.Module) -> None:
    layer = model.single_transformer_blocks[0].proj_mlp
    layer.load("mine", torch.ones(2, 128).bfloat16(), torch.ones(512, 2).bfloat16(), strength=0.5)
    y = tiny.run(model)
    model.load_lora_adapter(tiny.lora(1), adapter_name="a")
    with pytest.raises(LorafmtError) as refused:
        model.load_lora_adapter(tiny.lora(1), adapter_name="mine")
    assert refused.value.code == "adapter-exists"
    model.reset_lora()
    assert torch.equal(tiny.run(model), y) and float(layer.strength[layer.slots["mine"].ranks].sum()) == 1.0
    layer.remove("mine")


def test_numbers_of_strengths_agree_with_numpy(model: nn.Module) -> None:
    model.load_lora_adapter(tiny.lora(1), adapter_name="a", strength=0.3)
    model.set_lora_strength(0.7)
    for layer in model.adapters.layers.values():
        slot = layer.slots["a"]
        assert np.allclose(layer.strength[slot.ranks].numpy(), np.float32(0.3 * 0.7), rtol=1e-7)
        assert int(layer.active) == max(s.start + s.rank for s in layer.slots.values())


def test_layers_are_quantized_one_after_the_other(plain: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """When a layer is quantized, the 16-bit weights of all before it are gone."""
    model = copy.deepcopy(plain)
    alive = [weakref.ref(module) for module in model.modules() if type(module) is nn.Linear]
    counts: list[int] = []
    make = FusedLinear.from_weight.__func__  # type: ignore[attr-defined]

    def counted(cls: type, *args: Any) -> FusedLinear:
        counts.append(sum(ref() is not None for ref in alive))
        return make(cls, *args)

    monkeypatch.setattr(FusedLinear, "from_weight", classmethod(counted))
    names = runtime.quantize_(model, rank=4, ranks=16)
    assert len(names) == 17 and len(counts) == 11
    assert counts == [len(alive) - 3 * n for n in range(4)][:3] + [len(alive) - 9 - n for n in range(8)]
    assert not any(ref() for ref in alive)
