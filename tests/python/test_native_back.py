"""Native files read back, split and scaled, and the command line."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import lorafmt
import oracle
from bases import SMALL, VARIED, Bases, BaseSpec
from checks import NATIVE_ROUNDING, RANK_LAYOUTS, assert_native, convert, deltas_of, to_native
from golden import Golden, write_by_rule
from loras import MODULES, ORIGINAL, everything, kohya, lora, noise
from native import Base, deltas_of_native
from tensorfile import TensorFile, save


@pytest.mark.parametrize("base", VARIED)
def test_native_and_back(scratch: Path, bases: Bases, base: str) -> None:
    source = lora(scratch / "lora.safetensors", {**everything(2), "x_embedder": 4, "norm_out.linear": 4, "proj_out": 4})
    native, target = scratch / "native.safetensors", scratch / "back.safetensors"
    found = to_native(source, native, bases(VARIED[base]))
    convert(native, target, base=bases(VARIED[base]))
    back = oracle.reference(target)
    comparison = oracle.compare(oracle.reference(source), back, 2 * NATIVE_ROUNDING["BF16"])
    assert comparison, str(comparison)
    if "folded" not in base:
        comparison = oracle.compare(found, back, 1e-12)
        assert comparison, str(comparison)


@pytest.mark.parametrize("to", ["kohya", "comfyui", "peft"])
def test_native_to_other_dialects(scratch: Path, bases: Bases, to: str) -> None:
    source = lora(scratch / "lora.safetensors", {**everything(), "x_embedder": 4})
    native, target = scratch / "native.safetensors", scratch / "back.safetensors"
    to_native(source, native, bases(SMALL))
    lorafmt.convert(native, target, to=to, base=bases(SMALL))
    comparison = oracle.compare(oracle.reference(source), oracle.reference(target), 2 * NATIVE_ROUNDING["BF16"])
    assert comparison, str(comparison)


def test_biases_and_norms_come_back(scratch: Path, bases: Bases) -> None:
    listing = oracle.thin(oracle.fixture("flux_control_lora"), (0, 1))
    source = oracle.make_file(listing, scratch / "lora.safetensors", shrink_rank=16, dtype="BF16")
    base = bases(BaseSpec(2, 2, rank=16, layout="v1", channels=128))
    to_native(source, scratch / "native.safetensors", base)
    convert(scratch / "native.safetensors", scratch / "back.safetensors", base=base)
    comparison = oracle.compare(
        oracle.reference(source), oracle.reference(scratch / "back.safetensors"), 2 * NATIVE_ROUNDING["BF16"]
    )
    assert comparison, str(comparison)


@pytest.mark.parametrize("name", ["kohya_r24_alpha7", "diffusers_equal_r16", "kohya_full_r8", "xlabs_r16"])
def test_nunchakus_own_files_come_back(scratch: Path, golden: Golden, name: str) -> None:
    """They have no metadata: the base shows by its ranks whether it is the right one."""
    base = golden.path("base_bf16")
    native = write_by_rule(scratch / "native.safetensors", golden.path(name), Base(base))
    assert lorafmt.detect(native).dialect == "nunchaku"
    convert(native, scratch / "back.safetensors", base=base)
    comparison = oracle.compare(
        deltas_of_native(native, base), oracle.reference(scratch / "back.safetensors"), NATIVE_ROUNDING["BF16"]
    )
    assert comparison, str(comparison)
    with pytest.raises(lorafmt.LorafmtError) as caught:
        lorafmt.convert(native, scratch / "wrong.safetensors", base=golden.path("base_other"))
    assert caught.value.code == "wrong-base"


def test_a_native_file_without_mlp_is_recognised(scratch: Path, bases: Bases) -> None:
    to_native(lora(scratch / "lora.safetensors", MODULES), scratch / "whole.safetensors", bases(SMALL))
    whole = TensorFile(scratch / "whole.safetensors")
    save(
        scratch / "part.safetensors", {key: (whole[key], whole.header[key].dtype) for key in whole if "mlp" not in key}
    )
    for name in ("whole", "part"):
        detection = lorafmt.detect(scratch / f"{name}.safetensors")
        assert (detection.dialect, detection.family) == ("nunchaku", "flux1")


WRONG = {
    "another model": BaseSpec(rank=16, seed=1),
    "another rank": BaseSpec(rank=32),
    "another type": BaseSpec(rank=16, dtype="F16"),
    "fewer blocks": BaseSpec(double=1, single=0, rank=16),
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_a_wrong_base_is_refused(scratch: Path, bases: Bases, wrong: BaseSpec) -> None:
    native, target = scratch / "native.safetensors", scratch / "back.safetensors"
    to_native(lora(scratch / "lora.safetensors", MODULES), native, bases(SMALL))
    with pytest.raises(lorafmt.LorafmtError) as caught:
        lorafmt.convert(native, target, base=bases(wrong))
    assert caught.value.code == "wrong-base" and not target.exists()


def test_one_bit_makes_a_wrong_base(scratch: Path, bases: Bases) -> None:
    native, target = scratch / "native.safetensors", scratch / "back.safetensors"
    to_native(lora(scratch / "lora.safetensors", MODULES), native, bases(SMALL))
    wrong = bases(replace(SMALL, flipped="single_transformer_blocks.0.mlp_fc2.lora_up"))
    with pytest.raises(lorafmt.LorafmtError) as caught:
        lorafmt.convert(native, target, base=wrong)
    assert caught.value.code == "wrong-base"


# -------------------------------------------------------------------------------- command line


def run(*args: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "lorafmt", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def succeed(*args: object) -> subprocess.CompletedProcess[str]:
    result = run(*args)
    assert result.returncode == 0, result.stderr
    return result


@pytest.fixture
def two(scratch: Path) -> tuple[Path, Path]:
    return lora(scratch / "a.safetensors", everything(), seed=1), kohya(scratch / "b.safetensors", ORIGINAL, seed=2)


@pytest.mark.parametrize("layout", [None, "aligned", "packed"])
def test_compose_on_the_command_line(scratch: Path, bases: Bases, two: tuple[Path, Path], layout: str | None) -> None:
    (a, b), base, target = two, bases(SMALL), scratch / "native.safetensors"
    options = ["--layout", layout] if layout else []
    result = succeed(
        "compose", f"{a}:0.8", f"{b}:-0.5", "--to", "nunchaku", "--base", base, "-o", target, *options, "--json"
    )
    report = json.loads(result.stdout)
    assert report["schema"] == 1 and report["target"]["dialect"] == "nunchaku"
    assert_native(deltas_of([(a, 0.8), (b, -0.5)]), target, base)
    lorafmt.compose(
        [(a, 0.8), (b, -0.5)], scratch / "same.safetensors", to="nunchaku", base=base, layout=layout or "aligned"
    )
    assert (scratch / "same.safetensors").read_bytes() == target.read_bytes()


def test_convert_on_the_command_line(scratch: Path, bases: Bases, two: tuple[Path, Path]) -> None:
    native, back = scratch / "native.safetensors", scratch / "back.safetensors"
    succeed("convert", two[1], "--to", "nunchaku", "--base", bases(SMALL), "-o", native)
    assert_native(oracle.reference(two[1]), native, bases(SMALL))
    succeed("convert", native, "--base", bases(SMALL), "--to", "diffusers", "-o", back)
    comparison = oracle.compare(oracle.reference(two[1]), oracle.reference(back), 2 * NATIVE_ROUNDING["BF16"])
    assert comparison, str(comparison)
    result = run(
        "convert", native, "--base", bases(WRONG["another model"]), "--to", "diffusers", "-o", back, "--force", "--json"
    )
    assert result.returncode == 2
    assert json.loads(result.stdout)["error"]["code"] == "wrong-base"


@pytest.mark.parametrize("layout", RANK_LAYOUTS)
def test_a_composition_can_be_split(scratch: Path, bases: Bases, two: tuple[Path, Path], layout: str) -> None:
    """What was composed by lorafmt knows which ranks are whose."""
    (a, b), native, folder = two, scratch / "native.safetensors", scratch / "parts"
    lorafmt.compose([(a, 0.8), (b, -0.5)], native, to="nunchaku", base=bases(SMALL), layout=layout)
    succeed("convert", native, "--split", "--to", "diffusers", "--out-dir", folder)
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) == 2
    parts = [oracle.reference(file) for file in files]
    # Each part is one of the inputs, at its strength or without it.
    for source, strength in ((a, 0.8), (b, -0.5)):
        ways = [deltas_of([(source, factor)]) for factor in (strength, 1.0)]
        assert any(oracle.compare(way, part, 2 * NATIVE_ROUNDING["BF16"]) for way in ways for part in parts), source


def test_a_composition_can_be_scaled(scratch: Path, bases: Bases, two: tuple[Path, Path]) -> None:
    (a, b), native, base = two, scratch / "native.safetensors", bases(SMALL)
    lorafmt.compose([(a, 0.75), (b, 1.0)], native, to="nunchaku", base=base)
    succeed("scale", native, "-o", scratch / "half.safetensors", "--strength", "0.5")
    assert_native(deltas_of([(a, 0.375), (b, 0.5)]), scratch / "half.safetensors", base, roundings=2)
    succeed("scale", native, "-o", scratch / "one.safetensors", "--lora", "b=-2")
    assert_native(deltas_of([(a, 0.75), (b, -2.0)]), scratch / "one.safetensors", base, roundings=2)
    succeed("scale", native, "-o", scratch / "off.safetensors", "--lora", "b=0")
    assert_native(deltas_of([(a, 0.75), (b, 0.0)]), scratch / "off.safetensors", base, roundings=2)
    result = run("scale", native, "-o", scratch / "no.safetensors", "--lora", "nobody=2")
    assert result.returncode == 2 and "error:" in result.stderr


def test_text_encoders_are_told_apart(scratch: Path, bases: Bases) -> None:
    """One adapter has CLIP's first layer, the other its first two, with alphas that are vectors of one element."""
    name = "lora_te1_text_model_encoder_layers_{}_mlp_fc1"
    files = []
    for number, layers in enumerate((range(1), range(2))):
        extra = {}
        for layer in layers:
            key = name.format(layer)
            extra[f"{key}.lora_down.weight"] = noise(4, 768, seed=layer + 1 + number)
            extra[f"{key}.lora_up.weight"] = noise(3072, 4, seed=layer + 7 + number)
            extra[f"{key}.alpha"] = np.full((1,), 2.0, np.float32), "F32"
        ranks = {"double_blocks.0.img_attn.proj": 4}
        files.append(kohya(scratch / f"{number}.safetensors", ranks, extra=extra, seed=number, dtype="F32"))
    native, base = scratch / "native.safetensors", bases(SMALL)
    lorafmt.compose([(file, 0.5) for file in files], native, to="nunchaku", base=base)
    # The runtime looks up every vector outside the blocks in the model.
    vectors = [key for key, entry in TensorFile(native).header.items() if len(entry.shape) == 1 and "lora_te" in key]
    assert not vectors and "lorafmt.composed" not in TensorFile(native).metadata
    parts = lorafmt.split(native)
    for file, (stem, part) in zip(files, parts.items(), strict=True):
        assert stem == file.stem
        part.save(scratch / f"part-{stem}.safetensors", "kohya")
        half = oracle.mixed([(oracle.reference(file), 0.5)])
        comparison = oracle.compare(half, oracle.reference(scratch / f"part-{stem}.safetensors"), 2.0**-7)
        assert comparison, str(comparison)


def test_smoothing_is_taken_off_only_with_the_base(scratch: Path, bases: Bases) -> None:
    """A scaled native file in memory has the ranks of its base, not the base's smoothing factors."""
    fused, plain = bases(BaseSpec(rank=16, fused=True)), bases(BaseSpec(rank=16))
    source = lora(scratch / "a.safetensors", everything())
    native = scratch / "native.safetensors"
    lorafmt.convert(source, native, to="nunchaku", base=fused)
    scaled = lorafmt.scale(native, strength=2.0)
    assert isinstance(scaled, lorafmt.Adapter)
    with pytest.raises(lorafmt.LorafmtError) as caught:
        scaled["transformer_blocks.0.attn.to_v"].delta()
    assert caught.value.code == "base-needed"
    with pytest.raises(lorafmt.LorafmtError) as caught:
        lorafmt.convert(native, scratch / "wrong.safetensors", base=plain)
    assert caught.value.code == "wrong-base" and not (scratch / "wrong.safetensors").exists()
    lorafmt.scale(native, scratch / "twice.safetensors", strength=2.0)
    assert_native(deltas_of([(source, 2.0)]), scratch / "twice.safetensors", fused)


def test_a_strength_of_convert_is_told(scratch: Path, bases: Bases) -> None:
    source, native = lora(scratch / "a.safetensors", MODULES), scratch / "native.safetensors"
    lorafmt.convert(source, native, to="nunchaku", base=bases(SMALL), strength=0.5)
    assert [entry["strength"] for entry in lorafmt.inspect(native)["native"]["adapters"]] == [0.5]


def test_untrained_modules_are_accounted_for(scratch: Path, bases: Bases) -> None:
    """Ups of zeros make no module; their tensors have a fate all the same."""
    name = "transformer.transformer_blocks.0.attn.to_q"
    zero = {f"{name}.lora_A.weight": noise(4, 3072), f"{name}.lora_B.weight": (np.zeros((3072, 4), np.float32), "F32")}
    source = lora(scratch / "a.safetensors", {"transformer_blocks.0.ff.net.2": 4}, extra=zero)
    native, base = scratch / "native.safetensors", bases(SMALL)
    to_native(source, native, base)
    convert(native, scratch / "back.safetensors", to="diffusers", base=base)


def test_equal_names_are_numbered(scratch: Path, bases: Bases) -> None:
    files = [lora(scratch / str(n) / "a.safetensors", MODULES, seed=n) for n in range(2)]
    native, base = scratch / "native.safetensors", bases(SMALL)
    lorafmt.compose([(file, 1.0) for file in files], native, to="nunchaku", base=base)
    assert list(lorafmt.split(native)) == ["a", "a-2"]
    lorafmt.scale(native, scratch / "scaled.safetensors", loras={"a-2": -2.0})
    assert_native(deltas_of([(files[0], 1.0), (files[1], -2.0)]), scratch / "scaled.safetensors", base)
    with pytest.raises(lorafmt.UsageError):
        lorafmt.scale(native, scratch / "no.safetensors", strength=1e200, loras={"a": 1e200})


def test_whole_and_parts_of_a_module_add(scratch: Path, bases: Bases) -> None:
    """A fused LoKr that cannot be cut, and a LoRA on one of its parts."""
    name = "lora_unet_double_blocks_0_img_attn_qkv"
    to_q = "transformer.transformer_blocks.0.attn.to_q"
    extra = {
        f"{name}.lokr_w1": noise(2, 3),
        f"{name}.lokr_w2_a": noise(4608, 2),
        f"{name}.lokr_w2_b": noise(2, 1024),
        f"{to_q}.lora_A.weight": noise(4, 3072),
        f"{to_q}.lora_B.weight": noise(3072, 4),
    }
    source = kohya(scratch / "a.safetensors", {"double_blocks.0.img_attn.proj": 4}, extra=extra)
    to_native(source, scratch / "native.safetensors", bases(SMALL))


def test_fp8_biases_outside_the_blocks(scratch: Path, bases: Bases) -> None:
    extra = {
        "transformer.x_embedder.lora_A.weight": (noise(4, 64)[0], "F8_E4M3"),
        "transformer.x_embedder.lora_B.weight": (noise(3072, 4)[0], "F8_E4M3"),
        "transformer.x_embedder.lora_B.bias": (noise(3072)[0], "F8_E4M3"),
    }
    source = lora(scratch / "a.safetensors", MODULES, extra=extra)
    base, native = bases(SMALL), scratch / "native.safetensors"
    lorafmt.compose([(source, 0.5)], native, to="nunchaku", base=base)
    assert TensorFile(native).header["x_embedder.bias"].dtype == "BF16"
    assert_native(deltas_of([(source, 0.5)]), native, base)
