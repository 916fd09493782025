"""Quantized checkpoints: written within the bound of int4, opened as what they mean, refused when they are damaged."""

from __future__ import annotations

import copy
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import w4a4
from torch import Tensor, nn

pytest.importorskip("diffusers", reason="diffusers is not installed")

from safetensors.torch import load_file, save_file

from lorafmt import LorafmtError, runtime
from lorafmt.runtime import FusedLinear, awq
from lorafmt.runtime import nunchaku as layout

#: Layers of the checkpoint: modules they are made of, the columns of these, and whether they are behind GELU.
DOUBLE = {
    "qkv_proj": (("attn.to_q", "attn.to_k", "attn.to_v"), slice(None), False),
    "qkv_proj_context": (("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"), slice(None), False),
    "out_proj": (("attn.to_out.0",), slice(None), False),
    "out_proj_context": (("attn.to_add_out",), slice(None), False),
    "mlp_fc1": (("ff.net.0.proj",), slice(None), False),
    "mlp_fc2": (("ff.net.2",), slice(None), True),
    "mlp_context_fc1": (("ff_context.net.0.proj",), slice(None), False),
    "mlp_context_fc2": (("ff_context.net.2",), slice(None), True),
}
SINGLE = {
    "qkv_proj": (("attn.to_q", "attn.to_k", "attn.to_v"), slice(None), False),
    "mlp_fc1": (("proj_mlp",), slice(None), False),
    "out_proj": (("proj_out",), slice(0, 128), False),
    "mlp_fc2": (("proj_out",), slice(128, 640), True),
}
LAYERS = {
    **{f"transformer_blocks.0.{name}": value for name, value in DOUBLE.items()},
    **{f"single_transformer_blocks.0.{name}": value for name, value in SINGLE.items()},
}
MODULATION = {"transformer_blocks.0.norm1.linear": 6, "single_transformer_blocks.0.norm.linear": 3}


@pytest.fixture(scope="module")
def source() -> nn.Module:
    return tiny.model()


@pytest.fixture(scope="module")
def maxima(source: nn.Module) -> dict[str, Tensor]:
    """Largest inputs with strong channels; those of proj_out's two parts apart."""
    shapes = tiny.linears(source)
    return {name: torch.exp(tiny.normal(n, shape[1])) for n, (name, shape) in enumerate(shapes.items())}


@pytest.fixture(scope="module")
def checkpoint(source: nn.Module, maxima: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base") / "svdq-int4.safetensors"
    return runtime.quantize_checkpoint(source, path, rank=16, maxima=maxima)


@pytest.fixture(scope="module")
def stored(checkpoint: Path) -> dict[str, Tensor]:
    return load_file(checkpoint)


def opened(checkpoint: Path, **options: Any) -> nn.Module:
    return runtime.load_quantized(None, checkpoint, family=tiny.register(), **options)


def block_of(name: str) -> str:
    return ".".join(name.split(".")[:2])


def plain_weight(source: nn.Module, name: str) -> np.ndarray:
    modules, columns, _ = LAYERS[name]
    weights = [source.get_submodule(f"{block_of(name)}.{module}").weight[:, columns] for module in modules]
    return torch.cat(weights).double().detach().numpy()


# -------------------------------------------------------------------------------- written


@pytest.mark.parametrize("name", LAYERS)
def test_written_weights_are_within_half_a_step_of_int4(
    source: nn.Module, stored: dict[str, Tensor], name: str
) -> None:
    layer = w4a4.read(stored, name)
    rest = (plain_weight(source, name) - layer.up @ layer.down) * layer.smooth
    step = np.repeat(layer.scales, 64, axis=1)
    # The scale is rounded to bfloat16, so the largest weight may be a little above seven of them.
    assert np.all(np.abs(rest - layer.weight) <= step * (0.5 + 7 * 2.0**-8))
    assert np.linalg.norm(rest - layer.weight) <= 0.15 * np.linalg.norm(rest)
    assert layer.smooth.std() > 0.1


def test_the_branch_holds_the_largest_directions(source: nn.Module, stored: dict[str, Tensor]) -> None:
    """Within two percent of the best that rank 16 can do (Eckart and Young), on the smoothed weight."""
    for name in ("transformer_blocks.0.out_proj", "single_transformer_blocks.0.mlp_fc2"):
        layer = w4a4.read(stored, name)
        smoothed = plain_weight(source, name) * layer.smooth
        rest = np.linalg.norm(smoothed - layer.up @ layer.down * layer.smooth)
        best = np.linalg.norm(np.linalg.svd(smoothed, compute_uv=False)[16:])
        assert rest <= 1.02 * best < 0.95 * np.linalg.norm(smoothed)


@pytest.mark.parametrize("name", MODULATION)
def test_written_modulation_is_within_half_a_step(source: nn.Module, stored: dict[str, Tensor], name: str) -> None:
    parts = MODULATION[name]
    plain = source.get_submodule(name)
    weight, bias = (value.double().detach().numpy() for value in (plain.weight, plain.bias))
    got = w4a4.modulation(stored, name)
    size = len(weight) // parts
    rows = np.arange(len(weight))
    order = rows % parts * size + rows // parts
    step = np.repeat(stored[f"{name}.wscales"].double().numpy().T, 64, axis=1)
    assert np.all(np.abs(got - weight[order]) <= step * 0.5 * (1 + 1e-6) + np.abs(weight[order]).max() * 2.0**-9)
    one = np.isin(np.arange(len(weight)) // size, (1, 4) if parts == 6 else (1,))
    assert np.allclose(stored[f"{name}.bias"].double().numpy(), (bias + one)[order], atol=2.0**-8)


def test_written_names_are_those_of_the_first_generation(stored: dict[str, Tensor], checkpoint: Path) -> None:
    assert {f"{name}.qweight" for name in (*LAYERS, *MODULATION)} < stored.keys()
    assert {
        "transformer_blocks.0.norm_added_q.weight",
        "single_transformer_blocks.0.norm_k.weight",
        "x_embedder.bias",
    } < (stored.keys())
    with open(checkpoint, "rb") as file:
        header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
    assert json.loads(header["__metadata__"]["config"])["num_single_layers"] == 1
    assert json.loads(header["__metadata__"]["quantization_config"])["rank"] == 16


def test_writing_streams_and_refuses(source: nn.Module, tmp_path: Path, checkpoint: Path) -> None:
    source.save_pretrained(tmp_path / "model")
    seen: list[tuple[int, int]] = []
    path = runtime.quantize_checkpoint(
        tmp_path / "model", tmp_path / "again.safetensors", rank=16, progress=lambda *at: seen.append(at)
    )
    assert seen == [(n, 12) for n in range(1, 13)]
    plain = runtime.quantize_checkpoint(source, tmp_path / "plain.safetensors", rank=16)
    assert path.read_bytes()[-1000:] == plain.read_bytes()[-1000:]
    before = checkpoint.read_bytes()
    for code, call in {
        "output-exists": lambda: runtime.quantize_checkpoint(source, checkpoint),
        "invalid-argument": lambda: runtime.quantize_checkpoint(source, tmp_path / "x.safetensors", rank=20),
        "unsupported-model": lambda: runtime.quantize_checkpoint(nn.Linear(2, 2), tmp_path / "x.safetensors"),
        "wrong-checkpoint": lambda: runtime.quantize_checkpoint(_saved(tmp_path), tmp_path / "x.safetensors"),
    }.items():
        with pytest.raises(LorafmtError) as refused:
            call()
        assert refused.value.code == code and refused.value.hint
    with pytest.raises(LorafmtError, match="maxima"):
        runtime.quantize_checkpoint(
            source, tmp_path / "x.safetensors", maxima={"transformer_blocks.0.ff.net.2": torch.ones(3)}
        )
    assert checkpoint.read_bytes() == before and not list(tmp_path.glob("*x.safetensors*"))


def _saved(folder: Path) -> Path:
    save_file({"model.weight": torch.zeros(4, 4)}, folder / "other.safetensors")
    return folder / "other.safetensors"


# -------------------------------------------------------------------------------- opened


def inputs(layer: w4a4.Layer, width: int, gelu: bool) -> np.ndarray:
    """Inputs with strong channels, as bfloat16; behind GELU as it leaves them."""
    x = tiny.normal(5, 32, width) * torch.from_numpy(layer.smooth[:width]).float()
    x = nn.functional.gelu(x, approximate="tanh") if gelu else x
    return x.bfloat16().double().numpy()


def applied(layer: nn.Module, x: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return layer(torch.from_numpy(x).bfloat16()).double().numpy()


def relative(got: np.ndarray, want: np.ndarray) -> float:
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


@pytest.fixture(scope="module")
def fused(checkpoint: Path) -> nn.Module:
    return opened(checkpoint)


@pytest.mark.parametrize("name", [name for name in LAYERS if LAYERS[name][0] != ("proj_out",)])
def test_opened_layers_against_the_meaning_of_the_file_and_against_w4a4(
    fused: nn.Module, stored: dict[str, Tensor], name: str
) -> None:
    """Figure: 1.5e-2 of exact 4-bit weights with 16-bit inputs. Nunchaku's own arithmetic is further away."""
    modules, _, gelu = LAYERS[name]
    fused_names = {"attn.to_q": "attn.to_qkv", "attn.add_q_proj": "attn.to_added_qkv"}
    layer = fused.get_submodule(f"{block_of(name)}.{fused_names.get(modules[0], modules[0])}")
    assert isinstance(layer, FusedLinear)
    meaning = w4a4.read(stored, name, unsigned=gelu)
    x = inputs(meaning, layer.in_features, gelu)
    want, ours, theirs = w4a4.exact(meaning, x), applied(layer, x), w4a4.layer(meaning, x, torch.bfloat16)
    assert relative(ours, want) <= 1.5e-2
    assert 2 * relative(ours, want) < relative(theirs, want) < 0.15
    if gelu:
        # With the stored bias, which is for shifted inputs, it would not be the layer.
        layer_bias = layer.bias.clone()
        try:
            layer.bias.copy_(torch.from_numpy(meaning.bias))
            assert relative(applied(layer, x), want) > 3 * relative(ours, want)
        finally:
            layer.bias.copy_(layer_bias)


def test_the_output_of_single_blocks_is_two_layers_side_by_side(fused: nn.Module, stored: dict[str, Tensor]) -> None:
    attention, mlp = (
        w4a4.read(stored, f"single_transformer_blocks.0.{name}", unsigned=gelu)
        for name, gelu in (("out_proj", False), ("mlp_fc2", True))
    )
    one, two = inputs(attention, 128, False), inputs(mlp, 512, True)
    want = w4a4.exact(attention, one) + w4a4.exact(mlp, two)
    got = applied(fused.get_submodule("single_transformer_blocks.0.proj_out"), np.concatenate((one, two), axis=1))
    assert relative(got, want) <= 1.5e-2


def dense(stored: dict[str, Tensor], source: nn.Module) -> nn.Module:
    """diffusers' model in float64 with the weights that the file means, by the oracle alone."""
    out = tiny.merged(source)
    with torch.no_grad():
        for name, (modules, columns, gelu) in LAYERS.items():
            layer = w4a4.read(stored, name, unsigned=gelu)
            weight = torch.from_numpy(layer.weight / layer.smooth + layer.up @ layer.down)
            shift = w4a4.SHIFT * (layer.weight / layer.smooth).sum(axis=1) if gelu else 0
            bias, at = torch.from_numpy(layer.bias + shift), 0
            for module in modules:
                linear = out.get_submodule(f"{block_of(name)}.{module}")
                rows = slice(at, at + linear.out_features)
                linear.weight[:, columns] = weight[rows]
                if columns.start:
                    linear.bias += bias[rows]
                else:
                    linear.bias.copy_(bias[rows])
                at += linear.out_features
        for name in (
            "transformer_blocks.0.norm1",
            "transformer_blocks.0.norm1_context",
            "single_transformer_blocks.0.norm",
        ):
            linear, parts = out.get_submodule(f"{name}.linear"), 3 if "single" in name else 6
            stored_weight, stored_bias = w4a4.modulation(stored, f"{name}.linear"), stored[f"{name}.linear.bias"]
            for part in range(parts):
                rows = slice(part * 128, (part + 1) * 128)
                linear.weight[rows] = torch.from_numpy(stored_weight[part::parts])
                linear.bias[rows] = stored_bias[part::parts].double() - float(part in (1, 4))
    return out


@pytest.mark.parametrize("options", [{}, {"fuse": False}, {"weights": "16bit"}], ids=["fused", "split", "16bit"])
def test_whole_models_against_what_the_file_means(
    checkpoint: Path, stored: dict[str, Tensor], source: nn.Module, options: dict[str, Any]
) -> None:
    """Against diffusers' model in float64 with the weights of the file, and with an adapter merged into these."""
    want = dense(stored, source)
    model = opened(checkpoint, **options)
    assert not any(parameter.is_meta for parameter in (*model.parameters(), *model.buffers()))
    base = tiny.distance(tiny.run(model), tiny.run(want, dtype=torch.float64))
    assert base < (0.012 if "weights" in options else 0.03)
    adapter = tiny.lora(4, rank=8, size=0.1)
    model.load_lora_adapter(adapter, adapter_name="a")
    with_lora = tiny.run(tiny.merged(want, (adapter, 1.0)), dtype=torch.float64)
    assert tiny.distance(tiny.run(model), with_lora) < 1.25 * base
    assert tiny.distance(with_lora, tiny.run(want, dtype=torch.float64)) > 5 * base


def test_names_of_the_second_generation_and_folders(
    checkpoint: Path, stored: dict[str, Tensor], tmp_path: Path
) -> None:
    import native

    want = tiny.run(opened(checkpoint))
    metadata = {"config": json.dumps(tiny.CONFIG)}
    save_file({native.name_v2(key): value for key, value in stored.items()}, tmp_path / "v2.safetensors", metadata)
    assert torch.equal(tiny.run(opened(tmp_path / "v2.safetensors")), want)
    parts: dict[bool, dict[str, Tensor]] = {True: {}, False: {}}
    for key, value in stored.items():
        parts["blocks." in key][key] = value
    save_file(parts[True], tmp_path / "transformer_blocks.safetensors", metadata)
    save_file(parts[False], tmp_path / "unquantized_layers.safetensors")
    assert torch.equal(tiny.run(opened(tmp_path)), want)
    model = tiny.model(seed=9)
    runtime.load_quantized(model, tmp_path, family=tiny.FAMILY)
    assert torch.equal(tiny.run(model), want)


def as_nvfp4(stored: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same layers with random 4-bit floats, some with a scale for each channel, some with one for all."""
    out = dict(stored)
    for number, name in enumerate(LAYERS):
        rows, columns = stored[f"{name}.qweight"].shape[0], stored[f"{name}.qweight"].shape[1] * 2
        generator = torch.Generator().manual_seed(number)
        micro = (torch.rand(rows, columns // 16, generator=generator) * 4 + 0.5).to(torch.float8_e4m3fn)
        raw = torch.randint(0, 16, (rows, columns), generator=generator, dtype=torch.uint8)
        out[f"{name}.qweight"], out[f"{name}.wscales"] = layout.pack_codes(raw), layout.pack_micro_scales(micro)
        scale = torch.rand(rows, 1, generator=generator) / 8 / columns**0.5
        if number % 2:
            out[f"{name}.wcscales"] = layout.pack_vector(scale.bfloat16()).view(-1)
        else:
            out[f"{name}.wtscale"] = scale[:1, 0].bfloat16()
        out[f"{name}.bias"] = (tiny.normal(number, rows) / 4).bfloat16()
    return out


def test_nvfp4_checkpoints(stored: dict[str, Tensor], source: nn.Module, tmp_path: Path) -> None:
    """Not shifted behind GELU, two kinds of scales above the groups'."""
    tensors = as_nvfp4(stored)
    save_file(tensors, tmp_path / "fp4.safetensors", {"config": json.dumps(tiny.CONFIG)})
    want = tiny.run(dense_nvfp4(tensors, source), dtype=torch.float64)
    assert tiny.distance(tiny.run(opened(tmp_path / "fp4.safetensors")), want) < 0.03


def dense_nvfp4(tensors: dict[str, Tensor], source: nn.Module) -> nn.Module:
    signed = {name: (*rest, False) for name, (*rest, _) in LAYERS.items()}
    before = dict(LAYERS)
    LAYERS.update(signed)  # type: ignore[arg-type]
    try:
        return dense(tensors, source)
    finally:
        LAYERS.update(before)


def test_smoothing_that_was_folded_into_the_values_is_undone(
    stored: dict[str, Tensor], checkpoint: Path, tmp_path: Path
) -> None:
    """The same model: values divided by a factor, and an output layer that knows (smooth of ones, smooth_orig)."""
    folded, factor = dict(stored), torch.exp2(torch.arange(128) % 4 - 1.0)
    for block, outputs in (
        ("transformer_blocks.0", ("out_proj", "out_proj_context")),
        ("single_transformer_blocks.0", ("out_proj",)),
    ):
        for name in [f"{block}.qkv_proj"] + ([f"{block}.qkv_proj_context"] if "single" not in block else []):
            rows = torch.ones(384)
            rows[256:] = 1 / factor
            scales = layout.unpack_vector(stored[f"{name}.wscales"], 2) * rows.unsqueeze(1)
            folded[f"{name}.wscales"] = layout.pack_vector(scales.bfloat16())
            bias = layout.unpack_vector(stored[f"{name}.bias"]) * rows.unsqueeze(1)
            folded[f"{name}.bias"] = layout.pack_vector(bias.bfloat16()).view(-1)
            up = layout.unpack_low_rank(stored[f"{name}.lora_up"], "up") * rows.unsqueeze(1)
            folded[f"{name}.lora_up"] = layout.pack_low_rank(up.bfloat16(), "up")
        for name in (f"{block}.{output}" for output in outputs):
            # As if the layer had been smoothed by the factor alone: its weight stays, the inputs come divided.
            folded[f"{name}.smooth"] = torch.ones(128).bfloat16()
            folded[f"{name}.smooth_orig"] = layout.pack_vector(factor.bfloat16().unsqueeze(1)).view(-1)
            down = layout.unpack_low_rank(stored[f"{name}.lora_down"], "down") * factor
            folded[f"{name}.lora_down"] = layout.pack_low_rank(down.bfloat16(), "down")
    plain = {**stored}
    for name in (
        "transformer_blocks.0.out_proj",
        "transformer_blocks.0.out_proj_context",
        "single_transformer_blocks.0.out_proj",
    ):
        plain[f"{name}.smooth"] = layout.pack_vector(factor.bfloat16().unsqueeze(1)).view(-1)
        plain[f"{name}.smooth_orig"] = plain[f"{name}.smooth"].clone()
    metadata = {"config": json.dumps(tiny.CONFIG)}
    save_file(plain, tmp_path / "plain.safetensors", metadata)
    save_file(folded, tmp_path / "folded.safetensors", metadata)
    one, other = (opened(tmp_path / f"{name}.safetensors") for name in ("plain", "folded"))
    adapter = tiny.lora(6, only=r"to_out|to_v|proj_out|add_v|add_out", size=0.3)
    before = tiny.run(one)
    assert tiny.distance(tiny.run(other), before) < 0.004
    for model in (one, other):
        model.update_lora_params(adapter)
    assert tiny.distance(tiny.run(other), tiny.run(one)) < 0.004 < tiny.distance(tiny.run(one), before)


# -------------------------------------------------------------------------------- refused


def damage(stored: dict[str, Tensor], **changes: Tensor | None) -> dict[str, Tensor]:
    out = {**stored, **{key: value for key, value in changes.items() if value is not None}}
    return {key: value for key, value in out.items() if changes.get(key, value) is not None}


QKV = "transformer_blocks.0.qkv_proj"
DAMAGES: dict[str, tuple[str, Callable[[dict[str, Tensor]], dict[str, Tensor]]]] = {
    "no scales": ("missing-tensor", lambda s: damage(s, **{f"{QKV}.wscales": None})),
    "a layer less": ("missing-tensor", lambda s: {k: v for k, v in s.items() if not k.startswith(f"{QKV}.")}),
    "a norm less": ("missing-tensor", lambda s: damage(s, **{"x_embedder.weight": None})),
    "a block more": (
        "wrong-checkpoint",
        lambda s: {**s, **{k.replace("blocks.0", "blocks.1"): v for k, v in s.items() if "single" in k}},
    ),
    "another family": (
        "wrong-checkpoint",
        lambda s: {
            k.replace("mlp_fc1", "img_mlp.net.0.proj").replace("out_proj", "attn.to_out"): v for k, v in s.items()
        },
    ),
    "not quantized": ("wrong-checkpoint", lambda s: {k: v for k, v in s.items() if "blocks." not in k}),
    "a stranger": ("unknown-key", lambda s: {**s, "transformer_blocks.0.attn.to_q.weight_scale": torch.ones(1)}),
    "other sizes": (
        "wrong-checkpoint",
        lambda s: damage(s, **{f"{QKV}.qweight": torch.zeros(256, 64, dtype=torch.int8)}),
    ),
    "half a branch": ("wrong-checkpoint", lambda s: damage(s, **{f"{QKV}.lora_up": None})),
    "two precisions": (
        "mixed-precision",
        lambda s: {**s, **{k: v for k, v in as_nvfp4(s).items() if k.startswith(f"{QKV}.")}},
    ),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_damaged_checkpoints_are_refused_and_change_nothing(
    stored: dict[str, Tensor], tmp_path: Path, case: str
) -> None:
    code, change = DAMAGES[case]
    path = tmp_path / "bad.safetensors"
    save_file({key: value.clone() for key, value in change(stored).items()}, path, {"config": json.dumps(tiny.CONFIG)})
    with torch.device("meta"):
        model = type(tiny.model())(**tiny.CONFIG)
    before = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(LorafmtError) as refused:
        runtime.load_quantized(model, path)
    assert refused.value.code == code and refused.value.hint and str(path) in str(refused.value)
    assert {name: type(module) for name, module in model.named_modules()} == before


def test_files_that_are_none_and_devices_that_are_not_there(checkpoint: Path, tmp_path: Path) -> None:
    whole = checkpoint.read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "head.safetensors").write_bytes(whole[:100])
    (tmp_path / "text.safetensors").write_bytes(b"not a checkpoint, but a text of some length")
    cases = {
        "cut": "truncated",
        "head": "truncated",
        "text": "invalid-header",
        "none": "not-found",
    }
    for name, code in cases.items():
        with pytest.raises(LorafmtError) as refused:
            runtime.load_quantized(None, tmp_path / f"{name}.safetensors")
        assert refused.value.code == code, name
    options: list[tuple[str, dict[str, Any]]] = [("invalid-argument", {"weights": "int3"})]
    if not torch.cuda.is_available():
        options += [("device-not-available", {"device": "cuda"}), ("kernels-unavailable", {"kernels": "require"})]
    for code, kwargs in options:
        with pytest.raises(LorafmtError) as refused:
            runtime.load_quantized(None, checkpoint, **kwargs)
        assert refused.value.code == code and refused.value.hint
    with pytest.raises(LorafmtError) as refused:
        runtime.load_quantized(nn.Sequential(nn.Linear(2, 2)), checkpoint)
    assert refused.value.code == "unsupported-model"


def test_modulation_codes_come_back() -> None:
    plain = torch.randint(0, 16, (24, 128), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    assert torch.equal(awq.unpack_codes(awq.pack_codes(plain)), plain)
    rows = torch.arange(24)
    assert torch.equal(awq.deinterleave(awq.interleave(rows, 6), 6), rows)
    assert awq.interleave(rows, 6)[:7].tolist() == [0, 4, 8, 12, 16, 20, 1]


def test_a_model_that_was_opened_can_be_copied(fused: nn.Module) -> None:
    adapter = tiny.lora(2, only="to_q")
    copied = copy.deepcopy(fused)
    copied.load_lora_adapter(adapter, adapter_name="a")
    assert fused.get_active_adapters() == [] and copied.get_active_adapters() == ["a"]
    assert not torch.equal(tiny.run(copied), tiny.run(fused))
