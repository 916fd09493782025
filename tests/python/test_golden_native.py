"""lorafmt against Nunchaku itself: the same bytes where Nunchaku rounds once, and never a worse delta."""

from __future__ import annotations

from pathlib import Path

import pytest

import lorafmt
import oracle
from checks import NATIVE_ROUNDING, assert_native, convert, transformer_only
from golden import Golden, Listing, assert_truth, digest, names
from native import deltas_of_native, split_block
from tensorfile import TensorFile


def assert_listed(file: TensorFile, listing: Listing) -> None:
    for key, tensor in listing.items():
        assert key in file.header, key
        assert file.header[key].dtype == tensor.dtype, key
        if tensor.digest:
            assert file.header[key].shape == tensor.shape, key
            assert digest(file.raw(key)) == tensor.digest, key


def assert_clears_only(file: TensorFile, extra: set[str]) -> None:
    """What Nunchaku does not write adds nothing: zeros that clear an adapter loaded before, and text encoders."""
    for key in extra:
        if key.startswith("lora_te1_"):
            continue
        _, local = split_block(key) or ("", "")
        assert local.startswith("norm") or local.endswith(".bias"), key
        assert not file.raw(key).any(), key


@pytest.mark.parametrize("name", names("to_diffusers"))
def test_diffusers_files_are_nunchakus(golden: Golden, scratch: Path, name: str) -> None:
    """But for the prefix, which Nunchaku leaves out where diffusers needs it."""
    target = scratch / "out.safetensors"
    convert(golden.path(name), target)
    file = TensorFile(target)
    listing = {key.removeprefix("transformer."): tensor for key, tensor in golden.listing("to_diffusers", name).items()}
    assert {key for key in file if key.startswith("transformer.")} == {f"transformer.{key}" for key in listing}
    assert_listed(file, {f"transformer.{key}": tensor for key, tensor in listing.items()})


@pytest.mark.parametrize("case", names("to_nunchaku"))
def test_native_files_are_nunchakus(golden: Golden, scratch: Path, case: str) -> None:
    entry, listing = golden.data["to_nunchaku"][case], golden.listing("to_nunchaku", case)
    source, base, target = golden.path(entry["input"]), golden.path(entry["base"]), scratch / "out.safetensors"
    convert(source, target, to="nunchaku", base=base)
    file = TensorFile(target)
    assert_listed(file, listing)
    assert_clears_only(file, set(file) - set(listing))
    deltas = assert_native(oracle.reference(source), target, base)
    for module, truth in golden.truth("deltas", entry["input"]).items():
        assert_truth(deltas[f"transformer.{module}"], truth, 2 * NATIVE_ROUNDING["BF16"])


@pytest.mark.parametrize("layout", ["aligned", "packed"])
@pytest.mark.parametrize("name", names("mixes"))
def test_mixes_are_as_good_as_nunchakus(golden: Golden, scratch: Path, name: str, layout: str) -> None:
    mix, target = golden.data["mixes"][name], scratch / "out.safetensors"
    inputs = [(golden.path(source), strength) for source, strength in mix["inputs"]]
    base = golden.path(mix["base"])
    lorafmt.compose(inputs, target, to="nunchaku", base=base, layout=layout)
    deltas = deltas_of_native(target, base)
    truth = golden.truth("mix_deltas", name)
    assert {f"transformer.{module}" for module in truth} == set(transformer_only(deltas))
    for module, expected in truth.items():
        assert_truth(deltas[f"transformer.{module}"], expected, 2 * NATIVE_ROUNDING["BF16"])
    references = oracle.mixed((oracle.reference(path), strength) for path, strength in inputs)
    comparison = oracle.compare(transformer_only(references), transformer_only(deltas), 1.1 * mix["error"] + 1e-12)
    assert comparison, str(comparison)


@pytest.mark.parametrize("name", names("mixes"))
def test_mixes_for_diffusers(golden: Golden, scratch: Path, name: str) -> None:
    mix, target = golden.data["mixes"][name], scratch / "out.safetensors"
    inputs = [(golden.path(source), strength) for source, strength in mix["inputs"]]
    lorafmt.compose(inputs, target)
    deltas = oracle.reference(target)
    for module, expected in golden.truth("mix_deltas", name).items():
        assert_truth(deltas[f"transformer.{module}"], expected, 2 * NATIVE_ROUNDING["BF16"])
    comparison = oracle.compare(
        oracle.mixed((oracle.reference(path), strength) for path, strength in inputs),
        deltas,
        1.1 * mix["error"] + 1e-12,
    )
    assert comparison, str(comparison)
