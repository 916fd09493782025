"""What the table of loaders says of diffusers is what diffusers does: files are loaded, and looked for in the model.

An answer of "part" is about files that differ within one row of the table; for those there are pairs of files.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable
from typing import Any

import pytest

from test_loaders import TABLE, rule_for

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
pytest.importorskip("peft")
pytest.importorskip("transformers")

import diffusers_loads as loads  # noqa: E402

Listing = dict[str, list[int]]
MEASURED = diffusers.__version__ == TABLE["diffusers"]["version"]
measured = pytest.mark.skipif(not MEASURED, reason="the table is about another version of diffusers")

ANSWERS = {"yes": "yes", "in part": "part", "no": "no"}

# Files that no pipeline here is for.
APART: dict[str, str] = {}
FIXTURES = {item["name"]: item for item in loads.fixtures() if item["name"] not in APART}


def told(family: str, listing: Listing) -> tuple[str, str | None]:
    """What `inspect` says of diffusers and these very tensors, and the size of the family that they are for."""
    info = lorafmt.inspect(loads.marked(listing)[0], family=family)
    return info.loaders["diffusers"], info.variant


def check(family: str, listing: Listing) -> None:
    said, size = told(family, listing)
    if said == "not known":
        pytest.skip("the table says nothing of it")
    outcome = loads.load(family, listing, size)
    answer, _, note = said.partition(": ")
    # Of files of which some are taken and others are not, the table cannot tell which this is.
    expected = {"yes", "no"} if answer == "in part" and note.startswith("only ") else {ANSWERS[answer]}
    assert outcome.answer in expected, f"{said}\n{outcome.error}\nlost: {sorted(outcome.lost)[:5]}"


def some(names: Iterable[str], every: int) -> list[Any]:
    """Each load takes seconds: a usual run tries a few."""
    return [pytest.param(name, marks=[] if i % every == 0 else [pytest.mark.slow]) for i, name in enumerate(names)]


@measured
@pytest.mark.parametrize("name", some(FIXTURES, 12))
def test_fixture_does_as_the_table_says(name: str) -> None:
    item = FIXTURES[name]
    listing = item["tensors"]
    if kind_of(listing) == "lokr":
        # PEFT takes a second for each such layer.
        modules = sorted({key.rsplit(".", 1)[0] for key in listing})[:3]
        listing = {key: shape for key, shape in listing.items() if key.rsplit(".", 1)[0] in modules}
    check(dialect_of(listing), loads.family_of(item), listing)


@measured
@pytest.mark.parametrize("family", some(loads.PIPELINES, 8))
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_own_names_are_loaded(family: str, kind: str) -> None:
    listing = loads.made(family, "diffusers", kind)
    assert kind_of(listing) == kind
    check("diffusers", family, listing)


SOME = ("flux1", "sd15", "qwen-image", "hidream", "sana")


@measured
@pytest.mark.slow
@pytest.mark.parametrize(("family", "dialect"), list(itertools.product(SOME, ("peft", "onetrainer", "lycoris"))))
def test_other_spellings_of_own_names(family: str, dialect: str) -> None:
    check(dialect, family, loads.made(family, dialect))


@measured
@pytest.mark.parametrize(("family", "kind"), list(itertools.product(("flux1", "sd15", "ltx-video"), ("loha", "full"))))
def test_other_kinds(family: str, kind: str) -> None:
    check("diffusers", family, loads.made(family, "diffusers", kind))


# -------------------------------------------------------------------------------- answers of "part"


def _pairs(
    *paths: str, rows: int = 3072, columns: int = 3072, suffixes: tuple[str, str] = (".lora_down", ".lora_up")
) -> Listing:
    down, up = suffixes
    return {
        path + suffix + ".weight": shape for path in paths for suffix, shape in ((down, [2, columns]), (up, [rows, 2]))
    }


def _own(name: str, pattern: str = "") -> Listing:
    """A fixture's keys that the pattern finds."""
    return {key: shape for key, shape in loads.fixture(name)["tensors"].items() if re.search(pattern, key)}


BLOCK = _pairs("lora_unet_double_blocks_0_img_attn_proj")
NATIVE = _pairs("diffusion_model.double_blocks.0.img_attn.proj")
# OneTrainer's files have an alpha for every module, and diffusers asks for it.
ATTENTION = {
    **_pairs("lora_transformer_transformer_blocks_0_attn_to_q"),
    "lora_transformer_transformer_blocks_0_attn_to_q.alpha": [],
}
MODULATION = {
    **_pairs("lora_transformer_transformer_blocks_0_norm1_linear", rows=18432),
    "lora_transformer_transformer_blocks_0_norm1_linear.alpha": [],
}
PARTS: dict[str, tuple[str, str, Listing, Listing]] = {
    # what -> dialect, family, a file that loads whole, one that does not
    "kohya outside the blocks": ("kohya", "flux1", BLOCK, {**BLOCK, **_pairs("lora_unet_img_in", columns=64)}),
    "kohya and T5": (
        "kohya",
        "flux1",
        BLOCK,
        {**BLOCK, **_pairs("lora_te3_encoder_block_0_layer_0_SelfAttention_q", rows=4096, columns=4096)},
    ),
    "guidance layer": (
        "kohya",
        "chroma",
        BLOCK,
        {**BLOCK, **_pairs("lora_unet_distilled_guidance_layer_in_proj", rows=5120, columns=64)},
    ),
    "bias": ("comfyui", "flux1", NATIVE, {**NATIVE, "diffusion_model.double_blocks.0.img_attn.proj.diff_b": [3072]}),
    "attention only": ("onetrainer", "flux1", ATTENTION, {**ATTENTION, **MODULATION}),
    "fal": (
        "peft",
        "flux1",
        _own("flux_fal_kontext"),
        _own("flux_fal_kontext", r"double_blocks\.1\."),
    ),
}  # fmt: skip


@measured
@pytest.mark.parametrize("what", PARTS)
def test_part_means_that_some_load_and_some_do_not(what: str) -> None:
    dialect, family, whole, lossy = PARTS[what]
    assert rule_for("diffusers", dialect, family, "lora")["answer"] == "part"
    assert loads.load(family, whole).answer == "yes"
    assert loads.load(family, lossy).answer != "yes"


@measured
def test_control_files_lose_their_final_modulation() -> None:
    """Why they are loaded only in part: the halves of the first factor's rows are exchanged, which are ranks."""
    tensors, _ = loads.marked(_own("flux_control_lora"))
    source = torch.arange(4 * 3072, dtype=torch.float32).reshape(4, 3072)
    tensors["final_layer.adaLN_modulation.1.lora_A.weight"] = source
    tensors["final_layer.adaLN_modulation.1.lora_B.weight"] = torch.ones(6144, 4)
    converted = loads.mixin("flux1").lora_state_dict(tensors)
    assert torch.equal(converted["transformer.norm_out.linear.lora_A.weight"], source.roll(2, 0))
    assert rule_for("diffusers", "bfl", "flux1", "lora")["answer"] == "part"


def test_stable_cascade_has_no_loader() -> None:
    from diffusers.pipelines import stable_cascade

    classes = [getattr(stable_cascade, name) for name in dir(stable_cascade) if name.endswith("Pipeline")]
    assert classes and not any(hasattr(found, "load_lora_weights") for found in classes)
