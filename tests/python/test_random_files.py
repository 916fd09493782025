"""Seeded random FLUX.1 files in every spelling, beyond the fixtures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import lorafmt
import oracle
from checks import ONE_ROUNDING, WRITTEN, assert_equal, convert, must_hold, target_path
from generate import SPELLINGS, random_file
from tensorfile import TensorFile, save

SEEDS = ((0, "F32"), (1, "BF16"), (2, "F16"))
TABLE_NAMES = ("kohya", "comfyui")


@pytest.mark.parametrize(("seed", "dtype"), SEEDS)
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_any_spelling_to_diffusers(tmp_path: Path, spelling: str, seed: int, dtype: str) -> None:
    source = random_file(tmp_path / "in" / "lora.safetensors", seed, spelling, dtype=dtype)
    target = tmp_path / "out.safetensors"
    report = convert(source, target)
    expected = oracle.reference(source)
    assert_equal(expected, target, dtype)
    has_t5 = any(module.startswith("text_encoder_2.") for module in expected)
    assert (report["tensors"]["carried"] > 0) is has_t5
    # One such key would make diffusers treat the whole file as a kohya file and drop its CLIP part.
    assert not any(key.endswith((".lora_down.weight", ".alpha")) for key in TensorFile(target))


@pytest.mark.parametrize("dialect", WRITTEN)
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_any_spelling_to_any_dialect(tmp_path: Path, spelling: str, dialect: str) -> None:
    source = random_file(tmp_path / "in" / "lora.safetensors", 11, spelling)
    expected = oracle.reference(source)
    middle, target = target_path(tmp_path, dialect), tmp_path / "back.safetensors"
    try:
        convert(source, middle, to=dialect)
    except lorafmt.LorafmtError:
        if all(must_hold(dialect, module) for module in expected):
            raise
        return
    assert_equal(expected, middle, tolerance=1e-6)
    convert(middle, target)
    assert_equal(expected, target, tolerance=1e-6)


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2"])
@pytest.mark.parametrize("spelling", ["kohya", "aitoolkit", "diffusers"])
def test_fp8_becomes_bf16(tmp_path: Path, spelling: str, dtype: str) -> None:
    """Both 8-bit floats fit into bf16, so only a folded scale may round."""
    source = random_file(tmp_path / "in" / "lora.safetensors", 5, spelling, dtype=dtype)
    target = tmp_path / "out.safetensors"
    convert(source, target)
    assert {entry.dtype for entry in TensorFile(target).header.values()} == {"BF16"}
    # So few values differ in 8 bits that rounding errors do not average out: the worst case of one rounding.
    assert_equal(oracle.reference(source), target, "BF16", tolerance=2.0**-8)


@pytest.mark.parametrize(("name", "dtype"), [("bf16", "BF16"), ("fp16", "F16"), ("fp32", "F32")])
def test_output_dtype(tmp_path: Path, name: str, dtype: str) -> None:
    source = random_file(tmp_path / "in" / "lora.safetensors", 6, "kohya")
    target = tmp_path / "out.safetensors"
    convert(source, target, dtype=name)
    assert {entry.dtype for entry in TensorFile(target).header.values()} == {dtype}
    # Both factors are rounded here, once each.
    comparison = oracle.compare(oracle.reference(source), oracle.reference(target), 2 * ONE_ROUNDING[dtype])
    assert comparison, str(comparison)


@pytest.mark.parametrize("kind", ["loha", "full", "dora", "bias"])
@pytest.mark.parametrize("spelling", TABLE_NAMES)
def test_other_kinds_keep_their_tensors(tmp_path: Path, spelling: str, kind: str) -> None:
    """Between dialects with the same module names every kind is only renamed, to the last bit."""
    source = random_file(tmp_path / "in" / "lora.safetensors", 8, spelling, kind=kind)
    for dialect in TABLE_NAMES:
        target = target_path(tmp_path, dialect)
        convert(source, target, to=dialect)
        assert_equal(oracle.reference(source), target)


@pytest.mark.parametrize("kind", ["loha", "full"])
@pytest.mark.parametrize("spelling", ["kohya", "kohya diffusers names", "comfyui"])
def test_diffusers_has_no_such_kind(tmp_path: Path, spelling: str, kind: str) -> None:
    source = random_file(tmp_path / "in" / "lora.safetensors", 9, spelling, kind=kind)
    with pytest.raises(lorafmt.LorafmtError) as caught:
        lorafmt.convert(source, tmp_path / "out.safetensors")
    assert caught.value.code == "unsupported-kind"
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize("kind", ["dora", "bias"])
@pytest.mark.parametrize("spelling", ["kohya", "kohya diffusers names", "comfyui", "aitoolkit", "diffusers"])
def test_dora_and_biases_reach_diffusers(tmp_path: Path, spelling: str, kind: str) -> None:
    source = random_file(tmp_path / "in" / "lora.safetensors", 10, spelling, kind=kind)
    target = tmp_path / "out.safetensors"
    convert(source, target)
    assert_equal(oracle.reference(source), target)


def test_input_axis_dora_is_refused(tmp_path: Path) -> None:
    """A magnitude per column is another normalization: without the base weight it has no PEFT form."""
    name = "lora_transformer_transformer_blocks_0_attn_to_q"
    source = tmp_path / "in.safetensors"
    ones = {"lora_down.weight": (2, 3072), "lora_up.weight": (3072, 2), "dora_scale": (1, 3072), "alpha": ()}
    save(source, {f"{name}.{slot}": (np.ones(shape, np.float32), "F32") for slot, shape in ones.items()})
    with pytest.raises(lorafmt.LorafmtError) as caught:
        lorafmt.convert(source, tmp_path / "out.safetensors")
    assert caught.value.code == "unsupported-kind"
    convert(source, tmp_path / "kept.safetensors", to="onetrainer")
    assert_equal(oracle.reference(source), tmp_path / "kept.safetensors")
