"""Native files for Qwen-Image, Z-Image and SDXL: beside their base they do what the adapter does, and Nunchaku's
parameters take them."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lorafmt
import oracle
import tables
from bases import Bases, BaseSpec
from checks import NATIVE_ROUNDING, convert
from native_v2 import QWEN, SDXL, SUFFIXES, Z_IMAGE, Z_REFINERS, Native, Spec, make_base, names, plain_shapes
from oracle import Reference
from tensorfile import TensorFile, save

DOCS = Path(__file__).resolve().parents[2] / "docs" / "native-format.md"
SPECS = {"qwen": QWEN, "z-image": Z_IMAGE, "refiners in 16 bits": Z_REFINERS, "sdxl": SDXL}
Base = Callable[[Spec], Path]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    made: dict[Spec, Path] = {}
    folder = tmp_path_factory.mktemp("bases")

    def get(spec: Spec) -> Path:
        if spec not in made:
            made[spec] = make_base(folder / f"svdq-{len(made)}.safetensors", spec)
        return made[spec]

    return get


def bases_modules(spec: Spec) -> set[str]:
    """Canonical modules that a base of few blocks has, those without a branch included."""
    every = set(tables.load(spec.family)[0].components[spec.component])
    inside = {f"{block}.{module}" for block, layer in spec.every() for module in layer.modules}
    for block in spec.unquantized:
        inside |= {f"{block}.{module}" for layer in spec.layers(block) for module in layer.modules}
    closed = {path for path in every if spec.closed(path) and path.startswith(tuple(f"{b}." for b in spec.blocks))}
    return (inside | closed | set(plain_shapes(spec))) & every


def thinned(name: str, spec: Spec) -> dict[str, Any]:
    """The fixture, with those of its modules that the base has, and the first layer of text encoders."""
    listing, there, known = oracle.fixture(name), bases_modules(spec), names(spec)

    def kept(key: str) -> bool:
        found = known.resolve(oracle.split_key(key)[0])
        assert found, key
        modules = [target.module for target in found[0]]
        if modules[0].startswith("text_encoder"):
            return "layers.0." in modules[0]
        return all(module.partition(".")[2] in there for module in modules)

    tensors = {key: shape for key, shape in listing["tensors"].items() if kept(key)}
    return {**listing, "tensors": tensors}


def adapter(path: Path, spec: Spec, ranks: dict[str, int], extra: dict | None = None, dtype: str = "F32") -> Path:
    """An adapter in diffusers' names."""
    modules = tables.load(spec.family)[0].components[spec.component]
    tensors: dict[str, tuple[np.ndarray, str]] = {}
    rng = np.random.default_rng([len(path.stem), *path.stem.encode()])
    for module, rank in ranks.items():
        out, inputs = modules[module].outputs, modules[module].inputs
        for side, shape in (("A", (rank, inputs)), ("B", (out, rank))):
            values = rng.standard_normal(shape, np.float32) * np.float32(0.02)
            tensors[f"{spec.component}.{module}.lora_{side}.weight"] = values, dtype
    for key, shape in (extra or {}).items():
        tensors[key] = rng.standard_normal(shape, np.float32) * np.float32(0.02), dtype
    save(path, tensors)
    return path


def model_only(reference: Reference, spec: Spec) -> Reference:
    """Without text encoders and what no branch can take."""
    module = f"{spec.component}."
    return {
        name: delta for name, delta in reference.items()
        if name.startswith(module) and not spec.closed(name.removeprefix(module).partition("#")[0])
    }  # fmt: skip


def assert_adds(expected: Reference, target: Path, base: Path, spec: Spec, *, roundings: int = 1) -> Native:
    native = Native(target, base, spec)
    deltas = native.deltas()
    comparison = oracle.compare(model_only(expected, spec), deltas, math.inf)
    limits = {module: roundings * NATIVE_ROUNDING[native.types[module]] for module in comparison.errors}
    wrong = {module: error for module, error in comparison.errors.items() if not error <= limits[module]}
    assert comparison and not wrong, f"{comparison}; wrong: {wrong}"
    return native


FIXTURES = [
    ("qwen", "qwen_kohya", False), ("qwen", "qwen_kohya_top_level", True), ("qwen", "qwen_diffusion_model_peft", False),
    ("z-image", "zimage_kohya_fused_qkv", False), ("z-image", "zimage_diffusers_peft", True),
    ("z-image", "zimage_comfy_native_top", False), ("refiners in 16 bits", "zimage_kohya_fused_qkv", True),
    ("refiners in 16 bits", "zimage_onetrainer_dotted", False), ("sdxl", "sdxl_kohya_ldm", True),
    ("sdxl", "sdxl_diffusers_peft", False), ("sdxl", "sdxl_locon_all", True),
]  # fmt: skip
"""Each once, and with the smoothing of attention's outputs folded or not."""


@pytest.mark.parametrize(("which", "name", "fused"), FIXTURES)
def test_fixtures_to_native_and_back(scratch: Path, base: Base, which: str, name: str, fused: bool) -> None:
    spec = replace(SPECS[which], fused=fused)
    source = oracle.make_file(thinned(name, spec), scratch / "a.safetensors", shrink_rank=4)
    expected = oracle.reference(source, names(spec))
    native, back = scratch / "native.safetensors", scratch / "back.safetensors"
    lost = {m for m in expected if spec.closed(m.partition(".")[2])}
    if lost:
        with pytest.raises(lorafmt.LorafmtError, match="without a low-rank branch") as caught:
            lorafmt.convert(source, native, to="nunchaku", base=base(spec))
        assert caught.value.code == "unsupported-module" and not native.exists()
    report = convert(source, native, to="nunchaku", base=base(spec), lossy="allow" if lost else "error")
    warned = [w for w in report["warnings"] if w["code"] == "unsupported-module"]
    assert len(warned) == len(lost) and (report["tensors"]["dropped"] > 0) is bool(lost)
    assert not any("smoothing" in w["code"] for w in report["warnings"])
    assert_adds(expected, native, base(spec), spec)
    # Text encoders are carried, and found again.
    convert(native, back, to="diffusers", base=base(spec), lossy="allow")
    wanted = {m: delta for m, delta in expected.items() if m not in lost}
    found = oracle.reference(back, names(spec))
    comparison = oracle.compare(wanted, found, 2.0**-7)
    assert comparison, str(comparison)


PARTIAL = {
    "qwen": {"transformer_blocks.0.attn.to_v": 4, "transformer_blocks.1.attn.add_k_proj": 20},
    "z-image": {"layers.0.attention.to_v": 4, "layers.1.feed_forward.w1": 3, "noise_refiner.0.feed_forward.w3": 5},
    "refiners in 16 bits": {"layers.1.attention.to_k": 4, "noise_refiner.0.feed_forward.w1": 3},
    "sdxl": {"mid_block.attentions.0.transformer_blocks.3.attn1.to_q": 4,
             "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_v": 2,
             "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_q": 2},
}  # fmt: skip


@pytest.mark.parametrize("which", PARTIAL)
def test_absent_parts_are_zero(scratch: Path, base: Base, which: str) -> None:
    spec = replace(SPECS[which], dtype="F16", precision="nvfp4", rank=16, fused=True)
    source = adapter(scratch / "a.safetensors", spec, PARTIAL[which])
    convert(source, scratch / "native.safetensors", to="nunchaku", base=base(spec), precision="fp4")
    native = assert_adds(oracle.reference(source, names(spec)), scratch / "native.safetensors", base(spec), spec)
    untouched = {f"{b}.{layer.name}" for b, layer in spec.every()} - {
        f"{b}.{layer.name}" for b, layer in spec.every() if any(f"{b}.{m}" in PARTIAL[which] for m in layer.modules)
    }
    if which == "qwen":
        # Offloading copies every block into the same buffers.
        assert native.ranks["transformer_blocks.0.attn.add_qkv_proj"] == 16 + 32
        assert native.ranks["transformer_blocks.1.attn.to_qkv"] == 16 + 16
        untouched -= {"transformer_blocks.0.attn.add_qkv_proj", "transformer_blocks.1.attn.to_qkv"}
    assert {native.ranks[layer] for layer in untouched} == {16}


BIASED = {
    "qwen": ("transformer_blocks.0.attn.to_v", "transformer_blocks.1.img_mlp.net.2", "proj_out"),
    "sdxl": ("mid_block.attentions.0.transformer_blocks.3.ff.net.0.proj", "mid_block.attentions.0.proj_in"),
}


@pytest.mark.parametrize("which", BIASED)
def test_biases_are_packed_as_the_bases(scratch: Path, base: Base, which: str) -> None:
    spec = replace(SPECS[which], fused=True)
    modules = tables.load(spec.family)[0].components[spec.component]
    extra = {f"{spec.component}.{m}.lora_B.bias": (modules[m].outputs,) for m in BIASED[which]}
    source = adapter(scratch / "a.safetensors", spec, dict.fromkeys(BIASED[which], 4), extra)
    native = scratch / "native.safetensors"
    lorafmt.compose([(source, 0.5)], native, to="nunchaku", base=base(spec))
    expected = oracle.mixed([(oracle.reference(source, names(spec)), 0.5)])
    assert sum(name.endswith("#bias") for name in expected) == len(BIASED[which])
    assert_adds(expected, native, base(spec), spec)
    # No zeros for layers that are not touched: nothing replaces a bias.
    assert sum(key.endswith(".bias") for key in TensorFile(native)) == len(BIASED[which])
    convert(native, scratch / "back.safetensors", to="diffusers", base=base(spec), lossy="allow")
    found = oracle.reference(scratch / "back.safetensors", names(spec))
    comparison = oracle.compare(expected, {m: d for m, d in found.items() if m in expected}, 2.0**-7)
    assert comparison, str(comparison)


@pytest.mark.parametrize("which", PARTIAL)
def test_adapters_are_told_apart_and_scaled(scratch: Path, base: Base, which: str) -> None:
    spec = SPECS[which]
    # Both files of Qwen-Image fit FLUX.1 as well: the base tells.
    files = [adapter(scratch / f"{n}.safetensors", spec, PARTIAL[which]) for n in ("a", "bb")]
    native, scaled, back = (scratch / f"{n}.safetensors" for n in ("native", "scaled", "back"))
    lorafmt.compose([(files[0], 1.0), (files[1], -0.5)], native, to="nunchaku", base=base(spec))
    parts = [oracle.reference(file, names(spec)) for file in files]
    assert_adds(oracle.mixed([(parts[0], 1.0), (parts[1], -0.5)]), native, base(spec), spec)
    for (stem, part), reference, strength in zip(lorafmt.split(native).items(), parts, (1.0, -0.5), strict=True):
        part.save(scratch / f"part-{stem}.safetensors", "diffusers")
        found = oracle.reference(scratch / f"part-{stem}.safetensors", names(spec))
        comparison = oracle.compare(oracle.mixed([(reference, strength)]), found, 2.0**-7)
        assert comparison, str(comparison)
    lorafmt.scale(native, scaled, loras={"bb": 2.0})
    assert_adds(oracle.mixed([(parts[0], 1.0), (parts[1], -1.0)]), scaled, base(spec), spec, roundings=2)
    # Without the base, by what the file says of itself.
    convert(scaled, back, to="diffusers")
    comparison = oracle.compare(
        oracle.mixed([(parts[0], 1.0), (parts[1], -1.0)]), oracle.reference(back, names(spec)), 2.0**-7
    )
    assert comparison, str(comparison)
    info = lorafmt.inspect(native)
    assert (info["dialect"], info["family"]) == ("nunchaku", spec.family)


def test_what_the_base_does_not_have_is_said(scratch: Path, base: Base) -> None:
    target = scratch / "no.safetensors"

    def refused(spec: Spec, source: Path, code: str, words: str, path: Path | None = None) -> None:
        with pytest.raises(lorafmt.LorafmtError, match=words) as caught:
            lorafmt.convert(source, target, to="nunchaku", base=path or base(spec))
        assert caught.value.code == code and not target.exists()

    other = adapter(scratch / "block.safetensors", QWEN, {"transformer_blocks.7.attn.to_q": 4})
    refused(QWEN, other, "unsupported-module", "of a block that the base does not have")
    refused(QWEN, other, "wrong-base", "is a z-image model", base(Z_IMAGE))
    mod = adapter(scratch / "mod.safetensors", QWEN, {"transformer_blocks.7.img_mod.1": 4, "img_in": 4})
    refused(QWEN, mod, "unsupported-module", "without a low-rank branch")
    deep = "up_blocks.0.attentions.0.transformer_blocks.4.attn2.to_k"
    refused(SDXL, adapter(scratch / "deep.safetensors", SDXL, {deep: 4}), "unsupported-module", "is not in the base")
    name = "transformer.layers.0.attention.to_q"
    bias = adapter(
        scratch / "bias.safetensors", Z_IMAGE, {"layers.0.attention.to_q": 4}, {f"{name}.lora_B.bias": (3840,)}
    )
    refused(Z_IMAGE, bias, "unsupported-module", "its layer in the base has none")
    name = "noise_refiner.0.feed_forward.w1"
    bias = adapter(scratch / "w1.safetensors", Z_REFINERS, {name: 4}, {f"transformer.{name}.lora_B.bias": (10240,)})
    refused(Z_REFINERS, bias, "unsupported-module", "its layer in the base has none")


def test_a_base_of_flux_is_no_base_of_qwen(bases: Bases) -> None:
    """FLUX.1 in the names of the second generation shares half of its double blocks' names with Qwen-Image."""
    flux = bases(BaseSpec(double=3, single=0, rank=16, layout="v2"))
    assert lorafmt.Base.open(flux).family == "flux1"


# -------------------------------------------------------------------------------- loading


def documented() -> Callable[[Any, str], None]:
    """The function that the documentation gives."""
    blocks = re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)
    scope: dict[str, Any] = {}
    exec(next(block for block in blocks if "def apply_adapter" in block), scope)
    return scope["apply_adapter"]


def module_of(torch: Any, path: Path, spec: Spec) -> Any:
    """A module with the parameters of Nunchaku's class, as its `from_pretrained` leaves them."""
    from safetensors.torch import load_file

    root = torch.nn.Module()
    for key, value in load_file(path).items():
        *parents, leaf = key.split(".")
        at = root
        for part in parents:
            if part not in at._modules:
                at.add_module(part, torch.nn.Module())
            at = at._modules[part]
        name = SUFFIXES.get(leaf, leaf) if spec.family == "sdxl" else leaf
        at.register_parameter(name, torch.nn.Parameter(value, requires_grad=False))
    return root


LOADED = {
    "qwen": (replace(QWEN, blocks=("transformer_blocks.0",)),
             {"transformer_blocks.0.attn.to_k": 4, "transformer_blocks.0.txt_mlp.net.2": 8, "proj_out": 3},
             {"transformer.proj_out.lora_B.bias": (64,),
              "transformer.transformer_blocks.0.attn.to_v.lora_B.bias": (3072,)}),
    "refiners in 16 bits": (replace(Z_REFINERS, blocks=("layers.0",), unquantized=("noise_refiner.0",)),
                            {"layers.0.feed_forward.w1": 4, "noise_refiner.0.feed_forward.w3": 2,
                             "noise_refiner.0.attention.to_q": 2, "layers.0.adaLN_modulation.0": 3}, {}),
    "sdxl": (replace(SDXL, blocks=SDXL.blocks[:1]),
             {f"{SDXL.blocks[0]}.attn1.to_v": 4, f"{SDXL.blocks[0]}.attn2.to_k": 4},
             {"unet.down_blocks.1.resnets.0.conv1.lora_A.weight": (2, 320, 3, 3),
              "unet.down_blocks.1.resnets.0.conv1.lora_B.weight": (640, 2, 1, 1),
              "text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_A.weight": (2, 768),
              "text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_B.weight": (3072, 2)}),
}  # fmt: skip


@pytest.mark.parametrize("which", LOADED)
def test_the_documented_way_of_loading(scratch: Path, which: str) -> None:
    torch = pytest.importorskip("torch")
    spec, ranks, extra = LOADED[which]
    source = adapter(scratch / "a.safetensors", spec, ranks, extra)
    expected = model_only(oracle.reference(source, names(spec)), spec)
    touched = {module.partition(".")[2].partition("#")[0] for module in expected}
    fused = {f"{b}.{x.name}" for b in spec.unquantized for x in spec.layers(b)}
    base = make_base(scratch / "base.safetensors", replace(spec, only=frozenset(touched | fused)))
    native = scratch / "native.safetensors"
    lorafmt.convert(source, native, to="nunchaku", base=base, family=spec.family)
    model = module_of(torch, base, spec)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    documented()(model, str(native))
    state, file = model.state_dict(), Native(native, base, spec)
    file.deltas()
    checked = set()
    for layer in file.layers:
        for side in ("proj_down", "proj_up"):
            stored = file.file.raw(f"{layer}.{side}")
            assert state[f"{layer}.{side}"].shape == file.file.header[f"{layer}.{side}"].shape
            assert np.array_equal(state[f"{layer}.{side}"].view(torch.uint8).numpy().reshape(-1), stored)
            checked.add(f"{layer}.{side}")
    # The 16-bit weights of these bases are zeros, so the model's are now the deltas.
    for path in {key.removesuffix(".lora_A.weight") for key in file.file if key.endswith(".lora_A.weight")}:
        weight = state[f"{path}.weight"].double().flatten(1).numpy()
        for module, rows, _ in file._parts(path):
            if delta := expected.get(f"{spec.component}.{module}"):
                want = oracle.sum_rows(delta.terms, 0, 64)
                error = np.linalg.norm(weight[rows][:64] - want) / np.linalg.norm(want)
                assert 0 < error < 2.0**-7, (module, error)
        checked.add(f"{path}.weight")
    for key in (key for key in file.file if key.endswith(".bias")):
        added = state[key].double().numpy() - before[key].double().numpy()
        assert np.linalg.norm(added - file.file[key]) < 2.0**-6 * np.linalg.norm(file.file[key]), key
        checked.add(key)
    assert len(checked) == 2 * len(file.layers) + {"qwen": 3, "refiners in 16 bits": 3, "sdxl": 2}[which]
    assert all(torch.equal(state[key], value) for key, value in before.items() if key not in checked)
    model.load_state_dict(state, strict=True)
