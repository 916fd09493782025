"""The table of loaders is well formed, and each of its rules decides something.

What it says of diffusers is held to diffusers itself in `test_loaders_diffusers.py`.
"""

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
FAMILIES = {
    "flux1", "chroma", "flux2", "sd15", "sd21", "sdxl", "sdxl-refiner", "sd3", "sd35", "qwen-image", "z-image",
    "wan", "hunyuan-video", "ltx-video", "ltx2", "lumina2", "hidream", "sana", "auraflow", "cogvideox", "mochi",
    "cascade", "krea2", "anima", "ideogram4", "ace-step",
}  # fmt: skip
# What `inspect` can say of a file; the last two are files of several kinds, and of none.
KINDS = {
    "lora", "dora", "loha", "lokr", "full", "norm", "set", "bias", "oft", "glora", "ia3", "mixed", "none",
}  # fmt: skip
FIELDS = {"dialects", "families", "kinds", "answer", "note", "source"}
ALL = {"dialects": DIALECTS, "families": FAMILIES, "kinds": KINDS}


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
