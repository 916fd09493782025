"""The table of loaders is well formed, and each of its rules decides something.

What it says of diffusers is held to diffusers itself in `test_loaders_diffusers.py`.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable
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
FIELDS = {"dialects", "families", "kinds", "keys", "without", "answer", "note", "source"}
ALL = {"dialects": DIALECTS, "families": FAMILIES, "kinds": KINDS}


def matches(rule: dict[str, Any], dialect: str, family: str, kind: str, keys: Iterable[str] = ()) -> bool:
    asked = {"dialects": dialect, "families": family, "kinds": kind}
    if not all(field not in rule or value in rule[field] for field, value in asked.items()):
        return False
    has = {field: any(text in key for text in rule.get(field, ()) for key in keys) for field in ("keys", "without")}
    return ("keys" not in rule or has["keys"]) and not has["without"]


def rule_for(loader: str, dialect: str, family: str, kind: str, keys: Iterable[str] = ()) -> dict[str, Any] | None:
    asked = (dialect, family, kind, keys)
    return next((rule for rule in TABLE[loader]["rules"] if matches(rule, *asked)), None)


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
        for field in ("keys", "without"):
            texts = rule.get(field, ["a text"])
            assert texts and all(texts), rule
            # One that has another in it says nothing of its own.
            assert not any(one in other for one, other in itertools.permutations(texts, 2)), rule


def usual(loader: str, rule: dict[str, Any], dialect: str) -> set[str]:
    """Keys of a file that the rule is about and that is otherwise as usual: with what other rules miss first of all."""
    rules = [other for other in TABLE[loader]["rules"] if dialect in other.get("dialects", DIALECTS)]
    return {other["without"][0] for other in rules if "without" in other} - set(rule.get("without", ()))


def decides(loader: str, rule: dict[str, Any], text: str | None) -> bool:
    """Whether it is the first rule about some usual file, but with this text in a key."""
    asked = itertools.product(*(sorted(rule.get(field, known)) for field, known in ALL.items()))
    return any(rule_for(loader, *one, {*usual(loader, rule, one[0]), text or ""}) is rule for one in asked)


@pytest.mark.parametrize("name", TABLE)
def test_every_rule_decides_something(name: str) -> None:
    """A rule that earlier rules cover wholly, one by one or together, is a mistake; so is a text within `keys`."""
    texts = [(rule, text) for rule in TABLE[name]["rules"] for text in rule.get("keys", [None])]
    assert [(rule, text) for rule, text in texts if not decides(name, rule, text)] == []


def test_swarmui_says_what_comfyui_says() -> None:
    assert TABLE["SwarmUI"]["rules"] == TABLE["ComfyUI"]["rules"]
