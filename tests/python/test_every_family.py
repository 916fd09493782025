"""Files of every family, converted to every dialect that is written for it, and compared with the oracle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import family_map
import lorafmt
import oracle
import tables
from checks import EVERY, ONE_ROUNDING, convert, needs_rounding, target_path
from tensorfile import TensorFile, save

# FLUX.1 and Chroma have tests of their own, with names that are written by hand.
NAMES = [name for name in EVERY if oracle.fixture(name)["family"] not in ("flux1", "chroma")]
# Their listings do not have the shapes of the model: text inputs of 2048 instead of 1024.
WRONG = ("anima_lora_kohya", "anima_lora_peft")
# A fixture's own word for its family and dialect -> what lorafmt calls it.
FAMILIES = {"sd35_diffusers_peft": "sd35", "sd35_kohya": "sd35"}
DIALECTS = {
    "aitoolkit_bfl": {"aitoolkit"},
    "aitoolkit_lokr": {"aitoolkit", "comfyui"},
    "bare_diffusers": {"diffusers"},
    "bare_kohya_suffix": {"diffusers"},
    "bare_original": {"bfl"},
    "diffusion_model_lokr": {"aitoolkit", "comfyui"},
    "bfl_lycoris": {"aitoolkit", "comfyui"},
    "comfy_native": {"comfyui"},
    "diffusers_lokr": {"diffusers"},
    "diffusers_old": {"diffusers"},
    "diffusers_peft": {"diffusers"},
    "diffusion_model_peft": {"aitoolkit"},
    "kohya": {"kohya"},
    "kohya_diffusers_names": {"kohya"},
    "kohya_lycoris": {"kohya"},
    "lycoris_wrapper": {"lycoris"},
    "mixed": {"mixed", "kohya"},
    "onetrainer": {"onetrainer"},
    "onetrainer_bfl": {"onetrainer"},
    "onetrainer_dotted": {"diffusers"},
    "onetrainer_omi": {"onetrainer"},
    "original_peft": {"onetrainer", "diffusers"},
    "peft_base_model": {"peft"},
    "peft_named_adapter": {"diffusers", "peft"},
}
# Where the keys could be of several: the label is one of them.
ALSO = {
    "anima_comfy_te": {"comfyui"},
    "sdxl_onetrainer_dora_in": {"kohya"},
    "sdxl_onetrainer_omi": {"onetrainer"},
    "wan_diffsynth_vace": {"bfl"},
}
# What refusals are about: kinds that a dialect has no spelling for, and modules that it has no name for.
HONEST = {"unsupported-kind", "unsupported-module", "mixed-magnitudes"}


def small(name: str, folder: Path, dtype: str = "F32") -> Path:
    """A fixture's file at a small rank, without most blocks of long listings."""
    listing = oracle.fixture(name)
    if len(listing["tensors"]) > 400:
        keys = sorted({key.rsplit(".lora", 1)[0].split(".alpha")[0] for key in listing["tensors"]})
        kept = set(keys[:: max(1, len(keys) // 90)])
        tensors = {k: v for k, v in listing["tensors"].items() if k.rsplit(".lora", 1)[0].split(".alpha")[0] in kept}
        listing = {**listing, "tensors": tensors}
    largest = max((min(shape) for shape in listing["tensors"].values() if len(shape) > 1), default=1)
    folder.mkdir(exist_ok=True)
    return oracle.make_file(
        listing, folder / f"{name}.safetensors", dtype=dtype, seed=5, shrink_rank=max(4, largest // 2)
    )


def family_of(name: str) -> str:
    return FAMILIES.get(name, oracle.fixture(name)["family"].replace("_", "-"))


def names_of(path: Path) -> tuple[dict[str, Any], family_map.Names]:
    seen = lorafmt.inspect(path).to_dict()
    return seen, family_map.names(seen["family"], seen["variant"])


@pytest.mark.parametrize("name", NAMES)
def test_detect(tmp_path: Path, name: str) -> None:
    listing = oracle.fixture(name)
    seen = lorafmt.inspect(oracle.make_file(name, tmp_path / f"{name}.safetensors", shrink_rank=64)).to_dict()
    assert seen["family"] == family_of(name)
    assert seen["dialect"] in DIALECTS[listing["dialect"]] | ALSO.get(name, set())
    assert seen["unknown"] == []
    assert bool(seen["problems"]) == (name in WRONG)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in WRONG])
def test_every_written_dialect_means_the_same(tmp_path: Path, name: str) -> None:
    source = small(name, tmp_path / "in")
    seen, names = names_of(source)
    expected = oracle.reference(source, names)
    written = tables.raw(seen["family"])["dialects"]
    reached = 0
    for dialect in written:
        if dialect == "nunchaku":
            continue
        target = target_path(tmp_path, dialect)
        try:
            report = convert(source, target, to=dialect, family=label(seen))
        except lorafmt.LorafmtError as error:
            assert error.code in HONEST, (dialect, error)
            assert error.hint and not target.exists()
            continue
        reached += 1
        assert report["tensors"]["dropped"] == 0
        actual = oracle.reference(target, names)
        comparison = oracle.compare(expected, actual, ONE_ROUNDING["F32"])
        assert comparison, (dialect, str(comparison))
        spared = [module for module, delta in expected.items() if not needs_rounding(delta)]
        assert all(comparison.errors.get(module, 0.0) <= 1e-12 for module in spared)
        # Whatever was written is read as the same family, in that dialect.
        again = lorafmt.inspect(target, family=label(seen)).to_dict()
        assert (again["family"], again["variant"], again["unknown"]) == (seen["family"], seen["variant"], [])
    # Kronecker factors over a fusion of its own can be written in no other way; plain LoRA always can.
    assert reached > 0 or seen["kind"] == "lokr"


def label(seen: dict[str, Any]) -> str:
    return f"{seen['family']}-{seen['variant']}" if seen["variant"] else seen["family"]


ROUND_TRIPS = (
    "sdxl_locon_all",
    "sd15_locon",
    "sdxl_kohya_ldm",
    "wan_musubi",
    "lumina2_kohya",
    "zimage_kohya",
    "sd35_kohya",
)


@pytest.mark.parametrize("name", ROUND_TRIPS)
def test_kohya_and_back_is_the_same_file(tmp_path: Path, name: str) -> None:
    """Alphas that are the rank need no folding: the tensors come back byte for byte."""
    listing = oracle.fixture(name)
    first = oracle.make_file(listing, tmp_path / "a.safetensors", dtype="BF16", shrink_rank=64)
    ones = TensorFile(first)
    ranks = {key.removesuffix(".lora_down.weight"): ones[key].shape[0] for key in ones if "lora_down" in key}
    tensors = {}
    for key in ones:
        values = ones[key]
        if key.endswith(".alpha"):
            values = values * 0 + ranks[key.removesuffix(".alpha")]
        tensors[key] = values, "BF16"
    source = tmp_path / "b.safetensors"
    save(source, tensors, None)
    there, back = tmp_path / "there.safetensors", tmp_path / "back.safetensors"
    convert(source, there, to="diffusers")
    convert(there, back, to="kohya", family=label(lorafmt.inspect(source).to_dict()))
    ours, theirs = TensorFile(source), TensorFile(back)
    assert set(ours) == set(theirs)
    for key in ours:
        if not key.endswith(".alpha"):
            assert ours.header[key].shape == theirs.header[key].shape, key
            assert np.array_equal(ours.raw(key), theirs.raw(key)), key
    json.dumps(report := lorafmt.inspect(back).to_dict())
    assert report["dialect"] == "kohya"
