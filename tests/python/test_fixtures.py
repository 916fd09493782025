"""Every FLUX.1 and Chroma fixture, converted and compared with the oracle."""

from __future__ import annotations

from pathlib import Path

import pytest

import checks
import lorafmt
import oracle
from checks import ALL, DETECT_ONLY, LOKR, PLAIN, WRITTEN, assert_equal, convert, must_hold, target_path
from tensorfile import TensorFile

DTYPES = ("F32", "BF16")
# Dialect of a fixture -> the names that detection may give it.
DETECTED = {
    "aitoolkit_bfl": {"aitoolkit"},
    "bare_diffusers": {"diffusers"},
    "bfl_control": {"bfl"},
    "bfl_lycoris": {"comfyui", "lycoris"},
    "comfy_native": {"comfyui"},
    "diffusers_old": {"diffusers"},
    "diffusers_peft": {"diffusers"},
    "fal_kontext": {"peft"},
    "kohya": {"kohya"},
    "kohya_diffusers_names": {"kohya"},
    "kohya_lycoris": {"kohya", "lycoris"},
    "lycoris_wrapper": {"lycoris"},
    "mixed": {"mixed"},
    "onetrainer": {"onetrainer"},
    "onetrainer_bfl": {"onetrainer"},
    "peft_base_model": {"peft"},
    "peft_named_adapter": {"diffusers", "peft"},
    "xlabs": {"xlabs"},
}


def make(name: str, folder: Path, dtype: str = "F32", *, whole: bool = True) -> Path:
    """A fixture's file at a small rank; `whole=False` keeps a few blocks."""
    listing = oracle.fixture(name)
    largest = max((min(shape) for shape in listing["tensors"].values() if len(shape) == 2), default=1)
    divisor = max(4, largest // 2) if len(listing["tensors"]) > 300 else 4
    folder.mkdir(exist_ok=True)
    chosen = listing if whole else oracle.thin(listing)
    return oracle.make_file(chosen, folder / f"{name}.safetensors", dtype=dtype, seed=7, shrink_rank=divisor)


@pytest.mark.parametrize("name", ALL)
def test_detect(tmp_path: Path, name: str) -> None:
    listing = oracle.fixture(name)
    found = lorafmt.detect(make(name, tmp_path / "in"))
    assert found.family == listing["family"]
    assert found.dialect in DETECTED[listing["dialect"]]
    assert found.coverage == 1.0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", PLAIN)
def test_to_diffusers(tmp_path: Path, name: str, dtype: str) -> None:
    source = make(name, tmp_path / "in", dtype)
    expected = oracle.reference(source)
    target = tmp_path / "out.safetensors"
    report = convert(source, target, to="diffusers")
    assert report["source"]["family"] == oracle.fixture(name)["family"]
    assert report["tensors"]["dropped"] == 0
    assert report["modules"] > 0
    assert_equal(expected, target, dtype)

    written = TensorFile(target)
    assert {entry.dtype for entry in written.header.values()} == {dtype}
    assert [key for key in written if not checks.DIFFUSERS_KEY.fullmatch(key)] == []
    # PEFT gives every layer of a component a bias as soon as one has it; absent ones are left without memory.
    for component in ("transformer.", "text_encoder."):
        layers = {key.split(".lora_")[0] for key in written if key.startswith(component) and ".lora_" in key}
        biases = {key for key in written if key.startswith(component) and key.endswith(".lora_B.bias")}
        assert len(biases) in (0, len(layers))


@pytest.mark.parametrize("name", LOKR)
def test_lokr_is_not_a_plain_lora(tmp_path: Path, name: str) -> None:
    target = tmp_path / "out.safetensors"
    with pytest.raises(lorafmt.LorafmtError) as caught:
        lorafmt.convert(make(name, tmp_path / "in"), target, to="diffusers")
    assert caught.value.code == "unsupported-kind"
    assert caught.value.hint
    assert not target.exists()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dialect", ["kohya", "comfyui"])
@pytest.mark.parametrize("name", LOKR)
def test_lokr_keeps_its_factors(tmp_path: Path, name: str, dialect: str, dtype: str) -> None:
    source = make(name, tmp_path / "in", dtype)
    target = target_path(tmp_path, dialect)
    try:
        convert(source, target, to=dialect)
    except lorafmt.LorafmtError as error:
        # Separate q, k and v have no common Kronecker factors, so a dialect that fuses them may refuse.
        if name != "flux_lycoris_lokr" or error.code != "unsupported-kind":
            raise
    else:
        assert_equal(oracle.reference(source), target, dtype)


@pytest.mark.parametrize("dialect", WRITTEN)
@pytest.mark.parametrize("name", PLAIN)
def test_round_trip(tmp_path: Path, name: str, dialect: str) -> None:
    source = make(name, tmp_path / "in", whole=False)
    expected = oracle.reference(source)
    held = {module: delta for module, delta in expected.items() if must_hold(dialect, module)}
    middle, target = target_path(tmp_path, dialect), tmp_path / "back.safetensors"
    try:
        convert(source, middle, to=dialect)
        assert dialect != "xlabs" or len(held) == len(expected), "xlabs has no place for this"
    except lorafmt.LorafmtError as error:
        if error.code == "unsupported-target" and (name, dialect) == ("chroma_kohya_guidance_layer", "xlabs"):
            return  # XLabs never trained Chroma
        if len(held) == len(expected):
            raise
        assert not middle.exists()
        if not held:
            return
        report = convert(source, middle, to=dialect, lossy="allow")
        assert report["tensors"]["dropped"] > 0
        assert report["warnings"]
        expected = _kept(expected, held, middle)
    assert_equal(expected, middle)
    family = oracle.fixture(name)["family"]
    convert(middle, target, to="diffusers", family=family)
    assert_equal(expected, target, tolerance=1e-6)


def _kept(expected: oracle.Reference, held: oracle.Reference, written: Path) -> oracle.Reference:
    """What a lossy conversion kept: at least all that the dialect must hold."""
    found = oracle.reference(written)
    assert set(held) <= set(found)
    return {module: delta for module, delta in expected.items() if module in found}


def test_peft_in_one_file(tmp_path: Path) -> None:
    """With a file as the target the scale is folded, so that the file is right without a configuration."""
    source = make("flux_diffusers_peft_with_alpha", tmp_path / "in")
    convert(source, tmp_path / "one.safetensors", to="peft")
    assert not (tmp_path / "adapter_config.json").exists()
    assert_equal(oracle.reference(source), tmp_path / "one.safetensors")
    assert all(key.startswith("base_model.model.") for key in TensorFile(tmp_path / "one.safetensors"))


def test_peft_folder_is_what_peft_saves(tmp_path: Path) -> None:
    source = make("flux_peft_base_model_attn", tmp_path / "in", whole=False)
    convert(source, tmp_path / "adapter", to="peft")
    names = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert names == {"adapter_model.safetensors", "adapter_config.json"}
    assert_equal(oracle.reference(source), tmp_path / "adapter")


@pytest.mark.parametrize("dialect", ["diffusers", "kohya", "comfyui"])
@pytest.mark.parametrize("name", PLAIN)
def test_same_bytes_every_time(tmp_path: Path, name: str, dialect: str) -> None:
    source = make(name, tmp_path / "in", "BF16", whole=False)
    targets = [tmp_path / f"{run}.safetensors" for run in (1, 2)]
    for target in targets:
        lorafmt.convert(source, target, to=dialect, lossy="allow")
    assert targets[0].read_bytes() == targets[1].read_bytes()


@pytest.mark.parametrize("strength", [0.5, -1.25])
def test_strength(tmp_path: Path, strength: float) -> None:
    source = make("flux_kohya_clip_partial", tmp_path / "in")
    convert(source, tmp_path / "out.safetensors", to="diffusers", strength=strength)
    expected = oracle.reference(source)
    for delta in expected.values():
        delta.terms = [oracle.replace(term, scale=term.scale * strength) for term in delta.terms]
    assert_equal(expected, tmp_path / "out.safetensors", tolerance=1e-6)


def test_existing_output_is_left_alone(tmp_path: Path) -> None:
    source = make("flux_bare_diffusers_single", tmp_path / "in")
    target = tmp_path / "out.safetensors"
    target.write_bytes(b"mine")
    with pytest.raises(lorafmt.LorafmtError) as caught:
        lorafmt.convert(source, target)
    assert caught.value.code == "output-exists"
    assert target.read_bytes() == b"mine"
    convert(source, target, overwrite=True)
    assert_equal(oracle.reference(source), target)


def _warnings(report: dict) -> set[str]:
    return {warning["code"] for warning in report["warnings"]}


def test_flux_or_chroma(tmp_path: Path) -> None:
    """Without modulation modules nothing tells FLUX.1 and Chroma apart: say so, unless the user has."""
    source = make("flux_lora_aitoolkit", tmp_path / "in", whole=False)
    outputs = []
    for family, warned in ((None, True), ("flux1", False), ("chroma", False)):
        target = tmp_path / f"{family}.safetensors"
        report = convert(source, target, family=family)
        assert ("ambiguous-family" in _warnings(report)) is warned
        assert report["source"]["family"] == (family or "flux1")
        outputs.append(oracle.reference(target))
    assert oracle.compare(outputs[0], outputs[1], 0.0)
    assert oracle.compare(outputs[0], outputs[2], 0.0)
    clear = make("flux_lora_kohya", tmp_path / "clear", whole=False)
    assert "ambiguous-family" not in _warnings(convert(clear, tmp_path / "clear.safetensors"))


def test_factors_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    for name in DETECT_ONLY:
        with pytest.raises(lorafmt.LorafmtError):
            lorafmt.convert(make(name, tmp_path / "in"), tmp_path / "out.safetensors", to="diffusers")
