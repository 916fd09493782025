"""The table of loaders: well formed, every rule reachable, and what it says of diffusers is what diffusers does."""

from __future__ import annotations

import itertools
import re
from typing import Any

import pytest

import tables
from tables import tomllib

TABLE: dict[str, dict[str, Any]] = {
    loader["name"]: loader for loader in tomllib.loads((tables.DATA / "loaders.toml").read_text())["loader"]
}
DIALECTS = {tomllib.loads(path.read_text())["name"] for path in (tables.DATA / "dialects").glob("*.toml")}
FAMILIES = set(
    "flux1 chroma flux2 sd15 sd21 sdxl sdxl-refiner sd3 sd35 qwen-image z-image wan hunyuan-video ltx-video ltx2 "
    "lumina2 hidream sana auraflow cogvideox mochi cascade krea2 anima ideogram4 ace-step".split()
)
# What `inspect` can say of a file; the last two are files of several kinds, and of none.
KINDS = set("lora dora loha lokr full norm set bias oft glora ia3 mixed none".split())
FIELDS = {"dialects", "families", "kinds", "answer", "note", "source"}
ALL = {"dialects": DIALECTS, "families": FAMILIES, "kinds": KINDS}

Listing = dict[str, list[int]]


def matches(rule: dict[str, Any], dialect: str, family: str, kind: str) -> bool:
    asked = {"dialects": dialect, "families": family, "kinds": kind}
    return all(field not in rule or value in rule[field] for field, value in asked.items())


def rule_for(loader: str, dialect: str, family: str, kind: str) -> dict[str, Any] | None:
    return next((rule for rule in TABLE[loader]["rules"] if matches(rule, dialect, family, kind)), None)


# -------------------------------------------------------------------------------- the table


def test_loaders_have_names_and_versions() -> None:
    text = (tables.DATA / "loaders.toml").read_text()
    assert len(TABLE) == len(re.findall(r"^\[\[loader\]\]$", text, re.M)), "two loaders of one name"
    for loader in TABLE.values():
        assert set(loader) == {"name", "version", "rules"}
        assert loader["version"] and loader["rules"]


@pytest.mark.parametrize("name", TABLE)
def test_rules_are_well_formed(name: str) -> None:
    for rule in TABLE[name]["rules"]:
        assert set(rule) <= FIELDS, rule
        assert rule["answer"] in ("yes", "part", "no"), rule
        assert rule["source"].strip(), rule
        # Someone who reads a "no" must learn why; of a "yes" there is nothing to say.
        assert bool(rule.get("note")) == (rule["answer"] != "yes"), rule
        note = rule.get("note", "")
        assert "\n" not in note and not note.endswith(".") and len(note) <= 140, rule
        for field, known in ALL.items():
            if field in rule:
                given = rule[field]
                assert given and len(set(given)) == len(given) and set(given) <= known, rule


@pytest.mark.parametrize("name", TABLE)
def test_every_rule_decides_something(name: str) -> None:
    """A rule that earlier rules cover wholly, one by one or together, is a mistake."""
    rules = TABLE[name]["rules"]
    left = set(range(len(rules)))
    for asked in itertools.product(sorted(DIALECTS), sorted(FAMILIES), sorted(KINDS)):
        first = next((i for i, rule in enumerate(rules) if matches(rule, *asked)), None)
        left.discard(-1 if first is None else first)
    assert [rules[i] for i in sorted(left)] == []


def test_swarmui_says_what_comfyui_says() -> None:
    assert TABLE["SwarmUI"]["rules"] == TABLE["ComfyUI"]["rules"]


# -------------------------------------------------------------------------------- diffusers, run

for _library in ("torch", "diffusers", "peft", "transformers"):
    pytest.importorskip(_library)

import diffusers  # noqa: E402
import diffusers_loads as loads  # noqa: E402
import torch  # noqa: E402

MEASURED = diffusers.__version__ == TABLE["diffusers"]["version"]
measured = pytest.mark.skipif(not MEASURED, reason="the table is about another version of diffusers")

_DIALECTS = [
    ("peft", r"base_model\.model\."),
    ("kohya", r"lora_(unet|te\d?)_"),
    ("onetrainer", r"lora_transformer_|transformer\.(double|single)_blocks\..*\.\d\.lora_down"),
    ("lycoris", r"lycoris_"),
    ("comfyui", r"diffusion_model\..*(lora_down|\.lokr_|\.hada_)"),
    ("aitoolkit", r"diffusion_model\..*lora_A"),
    ("xlabs", r"(double|single)_blocks\.\d+\.processor"),
    ("bfl", r"(double|single)_blocks\."),
    ("diffusers", r"(transformer|unet|text_encoder)\."),
]
_KINDS = [
    ("lokr", r"\.lokr_"),
    ("loha", r"\.hada_"),
    ("full", r"\.diff$"),
    ("dora", r"dora_scale|magnitude"),
    ("lora", "lora"),
]


def dialect_of(listing: Listing) -> str | None:
    """By the first key, as these files do not mix. None: diffusers' names without a prefix, which nothing says."""
    first = next(iter(listing))
    return next((name for name, pattern in _DIALECTS if re.match(pattern, first)), None)


def kind_of(listing: Listing) -> str:
    return next(name for name, pattern in _KINDS if any(re.search(pattern, key) for key in listing))


# Spellings within a dialect that the table's columns cannot tell apart.
APART = {
    "flux_peft_named_default": "keys of a named adapter",
    "flux_mixed_same_block_twice": "of several dialects",
    "anima_lora_peft": "its shapes are not those of the published model",
}
FIXTURES = {
    item["name"]: item for item in loads.fixtures() if item["name"] not in APART and dialect_of(item["tensors"])
}


def check(dialect: str, family: str, listing: Listing) -> None:
    rule = rule_for("diffusers", dialect, family, kind_of(listing))
    if rule is None:
        pytest.skip("the table says nothing of it")
    outcome = loads.load(family, listing)
    if rule["answer"] != "part":
        assert outcome.answer == rule["answer"], f"{rule}\n{outcome.error}\nlost: {sorted(outcome.lost)[:5]}"


@measured
@pytest.mark.parametrize("name", FIXTURES)
def test_fixture_does_as_the_table_says(name: str) -> None:
    item = FIXTURES[name]
    listing = item["tensors"]
    if kind_of(listing) == "lokr":
        # PEFT takes a second for each such layer.
        modules = sorted({key.rsplit(".", 1)[0] for key in listing})[:3]
        listing = {key: shape for key, shape in listing.items() if key.rsplit(".", 1)[0] in modules}
    check(dialect_of(listing), loads.family_of(item), listing)


@measured
@pytest.mark.parametrize("family", list(loads.PIPELINES))
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_own_names_are_loaded(family: str, kind: str) -> None:
    listing = loads.made(family, "diffusers", kind)
    assert kind_of(listing) == kind
    check("diffusers", family, listing)


SOME = ("flux1", "sd15", "qwen-image", "hidream", "sana")


@measured
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
    "bias": (
        "comfyui",
        "flux1",
        _pairs("diffusion_model.double_blocks.0.img_attn.proj"),
        {**_pairs("diffusion_model.double_blocks.0.img_attn.proj"), "diffusion_model.double_blocks.0.img_attn.proj.diff_b": [3072]},
    ),
    "attention only": (
        "onetrainer",
        "flux1",
        {**(attention := _pairs("lora_transformer_transformer_blocks_0_attn_to_q")), **(alpha := {next(iter(attention)).split(".")[0] + ".alpha": []})},
        {**attention, **alpha, **_pairs("lora_transformer_transformer_blocks_0_norm1_linear", rows=18432), "lora_transformer_transformer_blocks_0_norm1_linear.alpha": []},
    ),
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
