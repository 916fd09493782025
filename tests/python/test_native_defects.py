"""What other tools get wrong on the way to a native file. A defect has a name, and inputs that show it.

`RIGHT`: lorafmt gives the right deltas. `REFUSED`: it cannot, and says so with a code. `EITHER`: one of the two.
Nunchaku's own converter does neither: it drops parts unseen, or fails with the error that the name says.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lorafmt
import oracle
from bases import SMALL, Bases
from checks import assert_native, deltas_of, native_of, right_or_refused
from generate import KOHYA, PEFT, XLABS
from loras import ATTENTION, DIFFUSERS, MODULES, ORIGINAL, QKV, SINGLE, dotted, everything, flat, kohya, lora, noise
from native import deltas_of_native
from tensorfile import TensorFile, save

Build = Callable[[Path, Path], list[tuple[Path, float]]]
"""(folder, base) -> inputs with strengths."""
RIGHT: dict[str, Build] = {}
EITHER: dict[str, Build] = {}
REFUSED: dict[str, tuple[Build, tuple[str, ...]]] = {}


def case(cases: dict[str, Any], name: str, *codes: str) -> Callable[[Build], Build]:
    def add(build: Build) -> Build:
        assert name not in cases
        cases[name] = (build, codes) if cases is REFUSED else build
        return build

    return add


def one(cases: dict[str, Any], name: str, *codes: str, strength: float = 1.0, **options: Any) -> None:
    """A defect that one file shows: `modules` and options of `lora`."""
    modules = options.pop("modules")
    make = options.pop("make", lora)

    def build(folder: Path, base: Path) -> list[tuple[Path, float]]:
        return [(make(folder / "lora" / "adapter_model.safetensors", modules, **options), strength)]

    case(cases, name, *codes)(build)


def lycoris(kind: str) -> dict[str, tuple[np.ndarray, str]]:
    name = "lora_unet_double_blocks_0_img_attn_proj"
    if kind == "loha":
        shapes = {"hada_w1_a": (3072, 2), "hada_w1_b": (2, 3072), "hada_w2_a": (3072, 2), "hada_w2_b": (2, 3072)}
    else:
        shapes = {"lokr_w1": (4, 4), "lokr_w2_a": (768, 2), "lokr_w2_b": (2, 768)}
    return {f"{name}.{slot}": noise(*shape, seed=i) for i, (slot, shape) in enumerate(shapes.items())}


PEFT_PREFIX = "base_model.model."
FINAL = {"final_layer.linear": 4, "final_layer.adaLN_modulation.1": 4, "double_blocks.0.img_attn.qkv": 4}
DORA = {"lora_unet_double_blocks_0_img_attn_proj.dora_scale": (np.ones((3072, 1), np.float32), "F32")}
PEFT_DORA = {f"transformer.{QKV[0]}.lora_magnitude_vector": (np.ones(3072, np.float32), "F32")}
FOREIGN = "lora_te1_text_model_encoder_layers_0_self_attn_q_proj"
CLIP = {f"{FOREIGN}.lora_down.weight": noise(4, 768), f"{FOREIGN}.lora_up.weight": noise(768, 4)}
PEFT_CLIP = {
    "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight": noise(4, 768),
    "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_B.weight": noise(768, 4),
}
T5 = "text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q"
HEADER = {"lora_adapter_metadata": json.dumps({"transformer.r": 4, "transformer.lora_alpha": 6})}
CONTROL = {"double_blocks.0.img_attn.norm.query_norm.scale": (np.full(128, 1.25, np.float32), "BF16")}
OUT = "transformer.transformer_blocks.0.attn.to_out.0"
HALF = {f"{OUT}.lora_A.weight": noise(4, 3072)}
NARROW = {f"{OUT}.lora_A.weight": noise(4, 2048), f"{OUT}.lora_B.weight": noise(3072, 4)}
SHORT = {
    f"transformer.{SINGLE}.proj_out.lora_A.weight": noise(4, 3072),
    f"transformer.{SINGLE}.proj_out.lora_B.weight": noise(3072, 4),
}
# One module's name and suffixes, inputs and outputs.
OTHER_MODELS = {
    "SDXL": ("lora_unet_input_blocks_4_1_proj_in", KOHYA, 640, 640),
    "SD3": ("lora_unet_joint_blocks_0_x_block_attn_proj", KOHYA, 1536, 1536),
    "Chroma": ("lora_unet_distilled_guidance_layer_layers_0_in_layer", KOHYA, 5120, 5120),
    "FLUX.2": ("diffusion_model.double_blocks.0.img_attn.qkv", PEFT, 6144, 18432),
    "Qwen-Image": ("transformer.transformer_blocks.0.img_mlp.net.0.proj", PEFT, 3072, 12288),
}
onetrainer = dict(modules=MODULES, spell=flat("lora_transformer_"), suffixes=KOHYA)

one(RIGHT, "PEFT over original names has no effect", modules=ORIGINAL, spell=dotted(PEFT_PREFIX))
one(RIGHT, "PEFT over original names ignores strength", modules=ORIGINAL, spell=dotted(PEFT_PREFIX), strength=0.5)
one(RIGHT, "PEFT over diffusers names has no effect", modules=MODULES, spell=dotted(PEFT_PREFIX))
one(RIGHT, "PEFT over diffusers names cannot be composed", modules=MODULES, spell=dotted(PEFT_PREFIX), strength=0.5)
one(
    RIGHT,
    "alpha of adapter_config.json is not read",
    modules=MODULES,
    spell=dotted(PEFT_PREFIX),
    config={"r": 4, "lora_alpha": 6},
)
one(RIGHT, "alpha of the header is not read", modules=MODULES, metadata=HEADER)
one(RIGHT, "original names with A and B are a KeyError", modules=ORIGINAL, spell=dotted("diffusion_model."))
one(RIGHT, "bare original names with A and B have no effect", modules=ORIGINAL, spell=dotted())
one(RIGHT, "bare original names with down and up have no effect", modules=ORIGINAL, spell=dotted(), suffixes=KOHYA)
one(RIGHT, "alpha behind transformer. is not applied", modules=MODULES, spell=DIFFUSERS, suffixes=KOHYA, alpha=1.0)
one(RIGHT, "alpha behind transformer. cannot be composed", modules=MODULES, suffixes=KOHYA, alpha=1.0, strength=-0.5)
one(RIGHT, "original names behind transformer. are a KeyError", modules=ORIGINAL, suffixes=KOHYA, alpha=2.0)
one(
    RIGHT,
    "numbered slices",
    modules={f"double_blocks.0.img_attn.qkv.{i}": 2 + i for i in range(3)},
    suffixes=KOHYA,
    alpha=1.0,
)
one(
    REFUSED,
    "magnitudes of LyCORIS are dropped",
    "unsupported-kind",
    modules={"double_blocks.0.img_attn.proj": 4},
    make=kohya,
    extra=DORA,
)
one(REFUSED, "magnitudes of PEFT are dropped", "unsupported-kind", modules=MODULES, extra=PEFT_DORA)
for kind in ("loha", "lokr"):
    alpha = {"lora_unet_double_blocks_0_img_attn_proj.alpha": (np.float32(1), "F32")}
    one(EITHER, f"{kind} has no effect", modules={}, make=kohya, extra=lycoris(kind))
    one(EITHER, f"{kind} with alpha is an AssertionError", modules={}, make=kohya, extra={**lycoris(kind), **alpha})
one(RIGHT, "the final layer with alpha is refused", modules=FINAL, make=kohya)
one(RIGHT, "the final modulation swaps halves of both factors", modules=FINAL, make=kohya, alpha=None)
one(RIGHT, "a final modulation of rank 1", modules={"final_layer.adaLN_modulation.1": 1, **ATTENTION}, make=kohya)
one(RIGHT, "the final layer without its modulation", modules={"final_layer.linear": 4, **ATTENTION}, make=kohya)
one(
    RIGHT,
    "bias deltas of ComfyUI are deleted",
    modules=ORIGINAL,
    spell=dotted("diffusion_model."),
    suffixes=KOHYA,
    extra={
        "diffusion_model.double_blocks.0.img_attn.qkv.diff_b": noise(9216),
        "diffusion_model.single_blocks.0.linear1.diff_b": noise(21504),
        "diffusion_model.single_blocks.0.linear2.diff_b": noise(3072),
        "diffusion_model.img_in.diff_b": noise(3072),
    },
)
one(
    REFUSED,
    "deltas of norms are deleted",
    modules=ORIGINAL,
    spell=dotted("diffusion_model."),
    suffixes=KOHYA,
    extra={"diffusion_model.double_blocks.0.img_attn.norm.query_norm.scale.diff": noise(128)},
)
one(
    EITHER,
    "T5 is deleted",
    modules=ORIGINAL,
    spell=dotted("diffusion_model."),
    suffixes=KOHYA,
    extra={f"{T5}.lora_down.weight": noise(4, 4096), f"{T5}.lora_up.weight": noise(4096, 4)},
)
one(
    REFUSED,
    "position embeddings are deleted",
    "unsupported-kind",
    modules=ORIGINAL,
    spell=dotted("diffusion_model."),
    suffixes=KOHYA,
    extra={"text_encoders.clip_l.transformer.text_model.embeddings.position_embedding.weight": noise(77, 768)},
)
one(
    REFUSED,
    "full differences are concatenated into nonsense",
    "unsupported-kind",
    modules=ORIGINAL,
    make=kohya,
    extra={"lora_unet_img_in.diff": noise(3072, 64)},
)
one(RIGHT, "kohya's CLIP vanishes", modules=ATTENTION, make=kohya, extra=CLIP)
one(RIGHT, "a text encoder of PEFT is a KeyError", modules=MODULES, extra=PEFT_CLIP)
one(RIGHT, "a foreign key disables renaming", extra=CLIP, alpha=3.0, **onetrainer)
one(RIGHT, "an integer alpha is rounded to bf16", alpha=257.0, alpha_tensor=((), "I64"), dtype="F32", **onetrainer)
one(RIGHT, "an alpha of one dimension promotes one factor", alpha=3.0, alpha_tensor=((1,), "F32"), **onetrainer)
one(RIGHT, "alpha is rounded twice", alpha=5.0, **onetrainer)
one(RIGHT, "half of a control adapter is a KeyError", modules=ORIGINAL, spell=dotted(), extra=CONTROL)
one(RIGHT, "factors of one byte", modules=MODULES, dtype="F8_E4M3")
one(
    RIGHT,
    "single blocks of XLabs are a KeyError",
    modules={"single_blocks.0.processor.qkv_lora": 4, "single_blocks.0.processor.proj_lora": 4},
    spell=dotted(),
    suffixes=XLABS,
)
one(RIGHT, "proj_out without proj_mlp is a KeyError", modules={f"{SINGLE}.proj_out": 4})
one(RIGHT, "proj_mlp without proj_out has too many ranks", modules={f"{SINGLE}.proj_mlp": 20})
one(RIGHT, "the first layer of an MLP alone is an AssertionError", modules={"transformer_blocks.0.ff.net.0.proj": 4})
one(RIGHT, "the second layer of an MLP alone has too many ranks", modules={"transformer_blocks.0.ff.net.2": 20})
one(RIGHT, "a rank above the base's replaces the base", modules={QKV[0]: 64, "transformer_blocks.0.attn.to_out.0": 64})
one(RIGHT, "q alone cannot be composed", modules={QKV[0]: 4}, strength=0.5)
one(RIGHT, "k and v are dropped", modules={QKV[1]: 4, QKV[2]: 4}, strength=0.5)
one(RIGHT, "v is dropped", modules={QKV[2]: 4}, strength=0.5)
one(RIGHT, "projections of different rank", modules={QKV[0]: 1, QKV[1]: 7, QKV[2]: 3}, strength=0.5)
one(RIGHT, "a strength is rounded into the factor", modules=MODULES, strength=1 / 3)
one(EITHER, "more ranks than Nunchaku has scales for", modules=dict.fromkeys(QKV, 360))
one(REFUSED, "a block that the base does not have", modules={"transformer_blocks.7.attn.to_q": 4, **MODULES})
one(REFUSED, "a factor without its other half", "unpaired-module", modules=MODULES, extra=HALF)
one(REFUSED, "a factor of another width", "shape-mismatch", modules=MODULES, extra=NARROW)
one(REFUSED, "proj_out without the inputs of the MLP", "shape-mismatch", modules=MODULES, extra=SHORT)
for model, (name, (down, up), in_, out) in OTHER_MODELS.items():
    module = {name + down: noise(2, in_), name + up: noise(out, 2)}
    one(REFUSED, f"a file for {model} has no effect", modules={}, extra=module)


@case(RIGHT, "two of PEFT over original names join on the wrong axis")
def _two_peft(folder: Path, base: Path) -> list[tuple[Path, float]]:
    files = [lora(folder / f"{i}.safetensors", ORIGINAL, dotted(PEFT_PREFIX), seed=i) for i in (1, 2)]
    return list(zip(files, (0.75, -0.5), strict=True))


@case(RIGHT, "convolutions of one pixel are not two-dimensional")
def _convolution(folder: Path, base: Path) -> list[tuple[Path, float]]:
    flat = TensorFile(lora(folder / "flat.safetensors", MODULES))
    save(folder / "conv.safetensors", {key: (flat[key][:, :, None, None], "BF16") for key in flat})
    return [(folder / "conv.safetensors", 0.5)]


@case(RIGHT, "tiny factors of opposite sign count as equal")
def _tiny(folder: Path, base: Path) -> list[tuple[Path, float]]:
    tensors = {}
    for sign, name in zip((1, -1, 1), QKV, strict=True):
        values = np.random.default_rng(3).standard_normal((4, 3072), np.float32) * np.float32(1e-9)
        tensors[f"transformer.{name}.lora_A.weight"] = sign * values, "BF16"
        tensors[f"transformer.{name}.lora_B.weight"] = noise(3072, 4)[0] * np.float32(1e6), "BF16"
    save(folder / "lora.safetensors", tensors)
    return [(folder / "lora.safetensors", 0.5)]


@case(RIGHT, "equal factors of two projections, another of the third")
def _two_equal(folder: Path, base: Path) -> list[tuple[Path, float]]:
    shared = TensorFile(lora(folder / "shared.safetensors", dict.fromkeys(QKV, 4), shared=True))
    tensors = {key: (shared[key], "BF16") for key in shared}
    tensors[f"transformer.{QKV[2]}.lora_A.weight"] = noise(4, 3072)[0], "BF16"
    save(folder / "lora.safetensors", tensors)
    return [(folder / "lora.safetensors", 1.0)]


@case(RIGHT, "embedders of two widths do not add")
def _widths(folder: Path, base: Path) -> list[tuple[Path, float]]:
    files = [lora(folder / f"{w}.safetensors", {"x_embedder": 4, **MODULES}, width=w, seed=w) for w in (64, 128)]
    return list(zip(files, (1.0, 0.5), strict=True))


@case(RIGHT, "one of two spellings of a module is lost")
def _spellings(folder: Path, base: Path) -> list[tuple[Path, float]]:
    first = lora(folder / "1.safetensors", {"x_embedder": 4, **MODULES}, seed=1)
    second = kohya(folder / "2.safetensors", {"img_in": 4, **ATTENTION}, seed=2, dtype="BF16")
    third = lora(folder / "3.safetensors", {"x_embedder": 4, **MODULES}, dotted(), seed=3)
    return [(first, 1.0), (second, 0.5), (third, -0.25)]


@case(RIGHT, "types of the inputs differ")
def _types(folder: Path, base: Path) -> list[tuple[Path, float]]:
    return [
        (lora(folder / f"{t}.safetensors", MODULES, dtype=t, seed=i), 0.5) for i, t in enumerate(("F16", "BF16", "F32"))
    ]


@case(RIGHT, "biases of several adapters add")
def _biases(folder: Path, base: Path) -> list[tuple[Path, float]]:
    files = [
        lora(
            folder / f"{i}.safetensors", MODULES, seed=i, extra={f"transformer.{name}.lora_B.bias": noise(3072, seed=i)}
        )
        for i, name in enumerate((QKV[0], QKV[0], QKV[2]))
    ]
    return list(zip(files, (1.0, -0.5, 2.0), strict=True))


@case(RIGHT, "a strength of zero")
def _zero(folder: Path, base: Path) -> list[tuple[Path, float]]:
    files = [lora(folder / f"{i}.safetensors", MODULES, seed=i) for i in (1, 2)]
    return list(zip(files, (0.0, 0.5), strict=True))


@case(RIGHT, "norms are not scaled")
def _norm(folder: Path, base: Path) -> list[tuple[Path, float]]:
    extra = {"double_blocks.0.img_attn.norm.key_norm.scale": (np.full(128, 1.25, np.float32), "BF16")}
    first = lora(folder / "1.safetensors", ORIGINAL, dotted(), extra=extra)
    return [(first, 1.0), (lora(folder / "2.safetensors", MODULES, seed=2), 0.5)]


@case(REFUSED, "two adapters replace one norm")
def _norms(folder: Path, base: Path) -> list[tuple[Path, float]]:
    name = "double_blocks.0.img_attn.norm.key_norm.scale"
    extras = [{name: (np.full(128, value, np.float32), "BF16")} for value in (1.25, 1.5)]
    files = [lora(folder / f"{i}.safetensors", ORIGINAL, dotted(), extra=extra) for i, extra in enumerate(extras)]
    return [(file, 1.0) for file in files]


for value in (0.5, 0.0, -3.0, 2.0):

    @case(EITHER, f"a native file at strength {value:g}")
    def _native(folder: Path, base: Path, value: float = value) -> list[tuple[Path, float]]:
        source = lora(folder / "lora.safetensors", MODULES)
        lorafmt.convert(source, folder / "native.safetensors", to="nunchaku", base=base)
        return [(folder / "native.safetensors", value)]


@pytest.mark.parametrize("build", RIGHT.values(), ids=RIGHT)
def test_defects_that_are_none_here(scratch: Path, bases: Bases, build: Build) -> None:
    base, target = bases(SMALL), scratch / "native.safetensors"
    inputs = build(scratch, base)
    native_of(inputs, target, base)
    found = assert_native(deltas_of(inputs, base), target, base)
    assert found or all(strength == 0 for _, strength in inputs)


@pytest.mark.parametrize("build", EITHER.values(), ids=EITHER)
def test_defects_that_are_right_or_refused(scratch: Path, bases: Bases, build: Build) -> None:
    base = bases(SMALL)
    right_or_refused(build(scratch, base), scratch / "out.safetensors", base)


@pytest.mark.parametrize(("build", "codes"), REFUSED.values(), ids=REFUSED)
def test_defects_that_are_refused(scratch: Path, bases: Bases, build: Build, codes: tuple[str, ...]) -> None:
    base = bases(SMALL)
    assert right_or_refused(build(scratch, base), scratch / "out.safetensors", base, codes)


def test_opposite_strengths_cancel(scratch: Path, bases: Bases) -> None:
    source = lora(scratch / "lora.safetensors", everything())
    target = scratch / "native.safetensors"
    lorafmt.compose([(source, 0.7), (source, -0.7)], target, to="nunchaku", base=bases(SMALL))
    size = {module: oracle.norm(delta.terms) for module, delta in oracle.reference(source).items()}
    for module, delta in deltas_of_native(target, bases(SMALL)).items():
        assert oracle.norm(delta.terms) <= 1e-12 * size[module], module
