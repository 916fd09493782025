"""Strengths by place: every block weight and every nested scale reaches its modules and no others."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lorafmt
import oracle
from bases import SMALL, Bases
from checks import assert_native
from loras import DIFFUSERS, lora, noise
from tensorfile import TensorFile, save

DOUBLE, SINGLE = 19, 38
CLIP, T5 = "text_model.encoder.layers.{}.mlp.fc1", "encoder.block.{}.layer.0.SelfAttention.q"

#: The slots of each length, from the sources of the tools that have them.
BLOCKS = [f"D{n:02}" for n in range(DOUBLE)] + [f"S{n:02}" for n in range(SINGLE)]
SLOTS = {57: BLOCKS, 58: ["BASE", *BLOCKS], 61: ["CLIP", "T5", "IN", *BLOCKS, "OUT"]}


def slot(module: str, names: list[str]) -> str | None:
    """The slot of a module of the oracle, by looking at its name."""
    component, _, path = module.partition(".")
    name = {"text_encoder": "CLIP", "text_encoder_2": "T5"}.get(component, "IN")
    parts = path.split(".")
    if parts[0] == "transformer_blocks":
        name = f"D{int(parts[1]):02}"
    elif parts[0] == "single_transformer_blocks":
        name = f"S{int(parts[1]):02}"
    elif parts[0] in ("norm_out", "proj_out"):
        name = "OUT"
    return name if name in names else "BASE" if "BASE" in names else None


def by_module(reference: oracle.Reference, factor: Callable[[str], float]) -> oracle.Reference:
    return oracle.mixed([({module: delta}, factor(module)) for module, delta in reference.items()])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Something in every slot: two modules of each block, the ends, both text encoders."""
    modules = {}
    for n in range(DOUBLE):
        modules |= {f"transformer_blocks.{n}.{leaf}": 1 for leaf in ("attn.to_q", "ff_context.net.2")}
    for n in range(SINGLE):
        modules |= {f"single_transformer_blocks.{n}.{leaf}": 1 for leaf in ("attn.to_k", "norm.linear")}
    modules |= dict.fromkeys(("x_embedder", "context_embedder", "time_text_embed.guidance_embedder.linear_1"), 1)
    modules |= dict.fromkeys(("norm_out.linear", "proj_out"), 1)
    extra = {}
    for component, path, out, in_ in (("text_encoder", CLIP, 3072, 768), ("text_encoder_2", T5, 4096, 4096)):
        for n in (0, 1, 10):
            name = f"{component}.{path.format(n)}"
            extra[f"{name}.lora_A.weight"] = noise(1, in_, seed=n)
            extra[f"{name}.lora_B.weight"] = noise(out, 1, seed=n + 50)
    folder = tmp_path_factory.mktemp("whole")
    return lora(folder / "lora.safetensors", modules, DIFFUSERS, dtype="F32", extra=extra)


def assert_scaled(source: Path, strength: Any, factor: Callable[[str], float], folder: Path) -> None:
    """`compose` and `scale` both do what the oracle says."""
    expected = by_module(oracle.reference(source), factor)
    lorafmt.compose([(source, strength)], folder / "composed.safetensors", overwrite=True)
    lorafmt.scale(source, folder / "scaled.safetensors", strength=strength, overwrite=True)
    for name in ("composed.safetensors", "scaled.safetensors"):
        comparison = oracle.compare(expected, oracle.reference(folder / name))
        assert comparison, f"{name}: {comparison}"


@pytest.mark.parametrize("length", SLOTS)
def test_every_number_of_a_vector_reaches_its_slot(whole: Path, tmp_path: Path, length: int) -> None:
    names = SLOTS[length]
    numbers = dict(zip(names, np.random.default_rng(length).uniform(-2, 2, length).tolist(), strict=True))

    def factor(module: str) -> float:
        name = slot(module, names)
        return 1.0 if name is None else numbers[name]

    assert {slot(module, names) for module in oracle.reference(whole)} - {None} == set(names)
    assert_scaled(whole, {"blocks": list(numbers.values())}, factor, tmp_path)
    # Text, a tuple and an array are the same.
    first = TensorFile(tmp_path / "scaled.safetensors").header
    for given in (",".join(map(repr, numbers.values())), tuple(numbers.values()), np.array(list(numbers.values()))):
        lorafmt.scale(whole, tmp_path / "again.safetensors", strength={"blocks": given}, overwrite=True)
        assert TensorFile(tmp_path / "again.safetensors").header == first
        assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "scaled.safetensors").read_bytes()


def test_weights_are_times_the_rest_and_selectors_count_before_them(whole: Path, tmp_path: Path) -> None:
    numbers = [0.5, *(0.25 if n < 10 else 1.0 for n in range(DOUBLE + SINGLE))]
    strength = {"*": 2.0, "text_encoder": -1.0, "blocks": numbers, "**.attn.{to_q,to_k}": 3.0}

    def factor(module: str) -> float:
        base = -1.0 if module.startswith("text_encoder.") else 2.0
        if module.endswith(("attn.to_q", "attn.to_k")):
            return base * 3.0
        name = slot(module, SLOTS[58])
        return base * numbers[SLOTS[58].index(name or "BASE")]

    assert_scaled(whole, strength, factor, tmp_path)


@pytest.mark.parametrize(("preset", "number"), [("ALL", 1.0), ("ALL0.5", 0.5), ("FLUXALL", 1.0)])
def test_presets(whole: Path, tmp_path: Path, preset: str, number: float) -> None:
    assert_scaled(whole, {"blocks": preset}, lambda _: number, tmp_path)
    assert_scaled(whole, {"*": -3.0, "blocks": preset.lower()}, lambda _: -3.0 * number, tmp_path)


def test_nothing_is_left_of_none(whole: Path, tmp_path: Path) -> None:
    with pytest.raises(lorafmt.LorafmtError, match="strength 0") as caught:
        lorafmt.compose([(whole, {"blocks": "NONE"})], tmp_path / "none.safetensors")
    assert caught.value.code == "no-modules"


def test_nested_scales_as_diffusers_writes_them(whole: Path, tmp_path: Path) -> None:
    components = {"transformer": 0.5, "text_encoder": 0.25}
    assert_scaled(whole, components, lambda m: components.get(m.partition(".")[0], 1.0), tmp_path)
    singles = np.linspace(-1, 1, SINGLE)
    nested = {
        "transformer": {
            "transformer_blocks": {"1": 0.5, 10: {"attn": 2, "ff_context": {"net": -1}}, "2.attn": 0.125},
            "single_transformer_blocks": singles,
            "norm_out": {"linear": 3},
        },
        "text_encoder": {"text_model": {"encoder": {"layers": {"1": 4.0}}}},
        "text_encoder_2": 0.75,
    }
    exact = {
        "transformer.transformer_blocks.1.": 0.5,
        "transformer.transformer_blocks.10.attn.": 2,
        "transformer.transformer_blocks.10.ff_context.net.": -1,
        "transformer.transformer_blocks.2.attn.": 0.125,
        "transformer.norm_out.linear": 3,
        "text_encoder.text_model.encoder.layers.1.": 4.0,
        "text_encoder_2.": 0.75,
        **{f"transformer.single_transformer_blocks.{n}.": float(s) for n, s in enumerate(singles)},
    }

    def factor(module: str) -> float:
        return next((number for start, number in exact.items() if module.startswith(start)), 1.0)

    assert_scaled(whole, nested, factor, tmp_path)
    # Beside weights and a general strength.
    both = {**nested, "*": 2.0, "text_encoder_2": 1.5, "blocks": "ALL0.5"}

    def with_weights(module: str) -> float:
        if module.startswith("text_encoder_2."):
            return 1.5 * 0.5
        return 2.0 * next((number for start, number in exact.items() if module.startswith(start)), 0.5)

    assert_scaled(whole, both, with_weights, tmp_path)


def test_elements_and_ranges(whole: Path, tmp_path: Path) -> None:
    strength = {"**.attn.{to_q,to_k}": 0.5, "single_transformer_blocks.0-3,30": 2.0, "text_encoder*:**.fc1": -1.0}

    def factor(module: str) -> float:
        component, _, path = module.partition(".")
        if component == "text_encoder" and path.endswith("fc1"):
            return -1.0
        parts = path.split(".")
        if parts[0] == "single_transformer_blocks" and int(parts[1]) in (0, 1, 2, 3, 30):
            return 2.0
        return 0.5 if path.endswith(("attn.to_q", "attn.to_k")) else 1.0

    assert_scaled(whole, strength, factor, tmp_path)


@pytest.mark.parametrize(
    ("strength", "message", "hint"),
    [
        ({"blocks": [1.0, 2.0]}, "2 block weights are no vector for FLUX.1", "61 (CLIP, T5, IN, "),
        ({"blocks": "MIDD"}, "`MIDD` is not for FLUX.1", "ALL0.5, FLUXALL"),
        ({"blocks": "MIDDLE"}, "called `MIDDLE`", "57, 58, 61"),
        ({"blocks": [1.0, float("nan")]}, "['blocks'][1]` is nan", "finite"),
        ({"blocks": ["1"] * 57}, "['blocks'][0]` is '1'", "finite"),
        ({"transformer": {"transformer_blocks": [0.5] * 18}}, "takes 19 scales", "one number"),
        (
            {"transformer": {"transformer_blocks": {"19": 0.5}}},
            "`transformer.transformer_blocks` has no `19`",
            "it has",
        ),
        ({"transformer": {"blocks": 0.5}}, "`transformer` has no `blocks`", "transformer_blocks"),
        ({"unet": {"down": 0.5}}, "no component `unet`", "transformer, text_encoder, text_encoder_2"),
        ({"transformer": {"proj_out": None}}, "['proj_out']` is None", "finite"),
        ({"transformer": {"proj_out": float("inf")}}, "['proj_out']` is inf", "finite"),
        ({1.5: 0.5}, "the key 1.5", "strings"),
    ],
)
def test_what_makes_no_sense(whole: Path, tmp_path: Path, strength: Mapping[Any, Any], message: str, hint: str) -> None:
    for work in (
        lambda out: lorafmt.compose([(whole, strength)], out),
        lambda out: lorafmt.scale(whole, out, strength=strength),
    ):
        with pytest.raises(lorafmt.UsageError) as caught:
            work(tmp_path / "out.safetensors")
        assert message in str(caught.value) and hint in (caught.value.hint or "")
        assert caught.value.code == "invalid-argument"
    assert not (tmp_path / "out.safetensors").exists()


def test_a_module_called_blocks_can_have_a_number(whole: Path, tmp_path: Path) -> None:
    report = lorafmt.compose([(whole, {"blocks": 0.5})], tmp_path / "out.safetensors")
    assert [w.detail for w in report.warnings if w.code == "unmatched-selector"] == ["`blocks` matches no module"]


def test_what_is_written_down_is_the_same_strength(scratch: Path, whole: Path, bases: Bases) -> None:
    """Metadata holds selectors; a native file can be scaled by blocks, again and again."""
    numbers = [1.0] * 58
    numbers[0], numbers[1:4], numbers[6], numbers[20:58] = 0.5, [0.25] * 3, 2.0, [1.0, 0.75] * 19
    other = lora(scratch / "other.safetensors", {"transformer_blocks.0.attn.to_q": 1})
    strength = {"blocks": numbers}
    lorafmt.compose([(whole, strength), (other, 1.0)], scratch / "both.safetensors")
    told = json.loads(TensorFile(scratch / "both.safetensors").metadata["lorafmt.composed"])[0]["strength"]
    assert told["blocks"]["transformer_blocks.0-2"] == 0.25 and told["blocks"]["transformer_blocks.5"] == 2.0
    assert told["strength"] == 1.0 and len(told["blocks"]) == 6 and told["blocks"]["*:"] == 0.5
    # Selectors alone mean the same.
    lorafmt.compose([(whole, told["blocks"]), (other, 1.0)], scratch / "again.safetensors")
    pair = (oracle.reference(scratch / name) for name in ("both.safetensors", "again.safetensors"))
    assert oracle.compare(*pair, 1e-12)

    modules = dict.fromkeys((f"{kind}_blocks.0.attn.to_q" for kind in ("transformer", "single_transformer")), 4)
    source, native, base = lora(scratch / "a.safetensors", modules), scratch / "native.safetensors", bases(SMALL)
    numbers[1], numbers[20] = 2.0, -0.5
    lorafmt.compose([(source, strength | {"blocks": numbers})], native, to="nunchaku", base=base)
    wanted = by_module(oracle.reference(source), lambda m: -0.5 if ".single" in m else 2.0)
    assert_native(wanted, native, base)
    (entry,) = lorafmt.inspect(native)["native"]["adapters"]
    assert entry["strength"]["blocks"]["transformer_blocks.0,5"] == 2.0
    lorafmt.scale(native, scratch / "twice.safetensors", strength={"blocks": numbers})
    wanted = by_module(oracle.reference(source), lambda m: 0.25 if ".single" in m else 4.0)
    assert_native(wanted, scratch / "twice.safetensors", base, roundings=2)


SCALE = """
import json, sys
import lorafmt
family, dialect, source, target, strength = sys.argv[1:]
for table in (family, dialect):
    lorafmt.register_table(open(table, encoding="utf-8").read())
lorafmt.scale(source, target, strength=json.loads(strength))
"""

DIALECT = """
name = "mine"
title = "Mine"
write = true
alpha = "folded"
spelling = { down = ".down", up = ".up" }
[[place]]
families = ["mini"]
component = "unet"
namespace = "hf"
prefix = "net/"
"""

DOWN, CROSS = "DownBlock2D", "CrossAttnDownBlock2D"
UP, CROSS_UP = "UpBlock2D", "CrossAttnUpBlock2D"


@pytest.mark.parametrize(
    "scales",
    [
        0.5,
        {"down": 0.5},
        {"mid": [0.25], "up": 2.0},
        {"down": {"block_1": [0.5, 0.25]}, "up": {"block_0": 3.0, "block_1": [1.0, 2.0, 4.0]}},
        {"down": {"block_2": -1.0}, "mid": 0.125, "up": [1.5, 2.5, 3.5]},
    ],
    ids=str,
)
def test_scales_of_a_unet_are_those_of_set_adapters(tmp_path: Path, scales: Any) -> None:
    """The factor of every module of a real (tiny) U-Net, as diffusers sets it, and what we write."""
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(8, 8, 8),
        down_block_types=(DOWN, CROSS, CROSS),
        up_block_types=(CROSS_UP, CROSS_UP, UP),
        layers_per_block=2,
        norm_num_groups=4,
        cross_attention_dim=8,
        attention_head_dim=4,
    )
    targets = ["to_q", "to_out.0", "proj_in", "conv1", "conv"]
    unet.add_adapter(peft.LoraConfig(r=2, lora_alpha=2, target_modules=targets), "default")
    unet.set_adapters(["default"], [scales])
    layer = peft.tuners.tuners_utils.BaseTunerLayer
    wanted = {name: m.scaling["default"] for name, m in unet.named_modules() if isinstance(m, layer)}
    assert len(wanted) > 50

    rows = ", ".join(f'{{ hf = "{name}", in = 8, out = 8 }}' for name in wanted)
    head = 'name = "mini"\ntitle = "Mini"\n[[component]]\nname = "unet"\nnamespaces = ["hf"]\n'
    (tmp_path / "family.toml").write_text(f"{head}rows = [{rows}]\n")
    (tmp_path / "dialect.toml").write_text(DIALECT)
    tensors = {}
    for number, name in enumerate(wanted):
        tensors[f"net/{name}.down"] = noise(2, 8, seed=number)
        tensors[f"net/{name}.up"] = noise(8, 2, seed=number + 1000)
    source, target = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    save(source, tensors)
    arguments = [tmp_path / "family.toml", tmp_path / "dialect.toml", source, target, json.dumps({"unet": scales})]
    # Tables stay registered, so in a process of its own.
    subprocess.run([sys.executable, "-c", SCALE, *map(str, arguments)], check=True)
    before, after = TensorFile(source), TensorFile(target)
    for name, factor in wanted.items():
        up, down = (before[f"net/{name}.{slot}"].astype(np.float64) for slot in ("up", "down"))
        got_up, got_down = (after[f"net/{name}.{slot}"].astype(np.float64) for slot in ("up", "down"))
        np.testing.assert_allclose(got_up @ got_down, factor * (up @ down), rtol=1e-6, atol=1e-9, err_msg=name)
