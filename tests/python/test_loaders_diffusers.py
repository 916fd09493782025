"""What `inspect` says of diffusers is what diffusers does: files are loaded, and looked for in the model."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable
from typing import Any

import pytest

import lorafmt
from test_loaders import TABLE

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
pytest.importorskip("peft")
pytest.importorskip("transformers")

import diffusers_loads as loads  # noqa: E402

Listing = loads.Listing
MEASURED = diffusers.__version__ == TABLE["diffusers"]["version"]
measured = pytest.mark.skipif(not MEASURED, reason="the table is about another version of diffusers")

ANSWERS = {"yes": "yes", "in part": "part", "no": "no"}

# Files that no pipeline here is for.
APART = {"anima_lora_peft": "its shapes are not those of the published model"}
FIXTURES = {item["name"]: item for item in loads.fixtures() if item["name"] not in APART}


def told(listing: Listing, family: str | None = None) -> tuple[str, str, str | None]:
    """What `inspect` says of diffusers and these very tensors; the family and its size that they are for."""
    info = lorafmt.inspect(loads.marked(listing)[0], family=family)
    return info.loaders["diffusers"], info.family, info.variant


def check(listing: Listing, family: str | None = None) -> None:
    said, family, size = told(listing, family)
    if said == "not known":
        pytest.skip("the table says nothing of it")
    outcome = loads.load(family, listing, size)
    answer, _, note = said.partition(": ")
    # Where keys do not tell whether a file is taken, the note says which ones are.
    expected = {"yes", "no"} if answer == "in part" and note.startswith("only ") else {ANSWERS[answer]}
    assert outcome.answer in expected, f"{said}\n{outcome.error}\nlost: {sorted(outcome.lost)[:5]}"


def some(cases: Iterable[Any], every: int) -> list[Any]:
    """Each load takes seconds: a usual run tries a few."""
    values = [case if isinstance(case, tuple) else (case,) for case in cases]
    return [pytest.param(*v, marks=[] if i % every == 0 else [pytest.mark.slow]) for i, v in enumerate(values)]


@measured
@pytest.mark.parametrize("name", some(FIXTURES, 12))
def test_fixture_does_as_the_table_says(name: str) -> None:
    listing = FIXTURES[name]["tensors"]
    if any(".lokr_" in key for key in listing):
        # PEFT takes a second for each such layer.
        modules = sorted({key.rsplit(".", 1)[0] for key in listing})[:3]
        listing = {key: shape for key, shape in listing.items() if key.rsplit(".", 1)[0] in modules}
    # Of families that explain it alike, the listing names the right one; sizes of one model may be families.
    family = FIXTURES[name]["family"].replace("_", "-")
    alike = lorafmt.detect(loads.marked(listing)[0]).families
    check(listing, family if family in alike else None)


# -------------------------------------------------------------------------------- made files


@measured
@pytest.mark.parametrize("family", some(loads.PIPELINES, 8))
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_own_names_are_loaded(family: str, kind: str) -> None:
    listing = loads.made(family, "diffusers", kind)
    assert told(listing, family)[0] == "yes"
    check(listing, family)


@measured
@pytest.mark.parametrize(("family", "kind"), list(itertools.product(("flux1", "sd15", "ltx-video"), ("loha", "full"))))
def test_other_kinds(family: str, kind: str) -> None:
    check(loads.made(family, "diffusers", kind), family)


def _renamed(listing: Listing, names: dict[str, str]) -> Listing:
    for old, new in names.items():
        listing = {key.replace(old, new): shape for key, shape in listing.items()}
    return listing


def _alphas(listing: Listing) -> Listing:
    return {**listing, **{re.sub(r"\.lo(ra|kr)_.*", ".alpha", key): [] for key in listing}}


def _bare(listing: Listing) -> Listing:
    return {key.partition(".")[2]: shape for key, shape in listing.items()}


KOHYA = {".lora_A.": ".lora_down.", ".lora_B.": ".lora_up."}
# Ways to spell diffusers' own names otherwise.
SPELLINGS: dict[str, Callable[[Listing], Listing]] = {
    "bare": _bare,
    "bare with alphas": lambda own: _alphas(_bare(own)),
    "with alphas": _alphas,
    "lora_down": lambda own: _renamed(own, KOHYA),
    "lora_down with alphas": lambda own: _alphas(_renamed(own, KOHYA)),
    "named adapter": lambda own: _renamed(own, {".weight": ".default.weight"}),
}
ELSEWHERE = ("peft", "kohya", "comfyui", "aitoolkit", "onetrainer", "lycoris")


@measured
@pytest.mark.parametrize(("family", "spelling"), some(itertools.product(loads.PIPELINES, SPELLINGS), 13))
def test_other_spellings_of_own_names(family: str, spelling: str) -> None:
    check(SPELLINGS[spelling](loads.made(family, "diffusers")), family)


@measured
@pytest.mark.parametrize(("family", "dialect"), some(itertools.product(loads.PIPELINES, ELSEWHERE), 13))
def test_own_names_elsewhere(family: str, dialect: str) -> None:
    check(loads.made(family, dialect), family)


@measured
@pytest.mark.parametrize("spelling", ["own", "bare", "bare with alphas", "with alphas"])
@pytest.mark.parametrize("family", ["flux2", "z-image"])
def test_lokr(family: str, spelling: str) -> None:
    own = loads.made(family, "diffusers", "lokr")
    few = {key: own[key] for key in list(own)[:4]}
    check(SPELLINGS[spelling](few) if spelling != "own" else few, family)


# -------------------------------------------------------------------------------- what decides within a dialect


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
MORE: dict[str, tuple[str, Listing, Listing]] = {
    # what -> family, a file that loads whole, what more stops that
    "kohya outside the blocks": ("flux1", BLOCK, _pairs("lora_unet_img_in", columns=64)),
    "kohya and T5": (
        "flux1",
        BLOCK,
        _pairs("lora_te3_encoder_block_0_layer_0_SelfAttention_q", rows=4096, columns=4096),
    ),
    "guidance layer": ("chroma", BLOCK, _pairs("lora_unet_distilled_guidance_layer_in_proj", rows=5120, columns=64)),
    "bias": ("flux1", NATIVE, {"diffusion_model.double_blocks.0.img_attn.proj.diff_b": [3072]}),
    "attention only": ("flux1", ATTENTION, MODULATION),
}  # fmt: skip


@measured
@pytest.mark.parametrize("what", MORE)
def test_keys_make_the_difference(what: str) -> None:
    family, whole, more = MORE[what]
    assert told(whole, family)[0] == "yes"
    check(whole, family)
    assert told({**whole, **more}, family)[0] != "yes"
    check({**whole, **more}, family)


@measured
def test_incomplete_files_of_fal_are_refused() -> None:
    whole = _own("flux_fal_kontext")
    assert told(whole)[0].startswith("in part: only complete files")
    assert loads.load("flux1", whole).answer == "yes"
    assert loads.load("flux1", _own("flux_fal_kontext", r"double_blocks\.1\.")).answer == "no"


@measured
def test_control_files_lose_their_final_modulation() -> None:
    """Why they are loaded only in part: the halves of the first factor's rows are exchanged, which are ranks."""
    tensors, _ = loads.marked(_own("flux_control_lora"))
    source = torch.arange(4 * 3072, dtype=torch.float32).reshape(4, 3072)
    tensors["final_layer.adaLN_modulation.1.lora_A.weight"] = source
    tensors["final_layer.adaLN_modulation.1.lora_B.weight"] = torch.ones(6144, 4)
    converted = loads.mixin("flux1").lora_state_dict(tensors)
    assert torch.equal(converted["transformer.norm_out.linear.lora_A.weight"], source.roll(2, 0))
    assert told(_own("flux_control_lora"))[0].startswith("in part: only complete Control files")


def test_stable_cascade_has_no_loader() -> None:
    from diffusers.pipelines import stable_cascade

    classes = [getattr(stable_cascade, name) for name in dir(stable_cascade) if name.endswith("Pipeline")]
    assert classes and not any(hasattr(found, "load_lora_weights") for found in classes)
