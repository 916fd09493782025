"""Native files for Nunchaku, from any file and for any base.

Every output is held to the deltas of its inputs by the native oracle, beside the base it was made for.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import lorafmt
import oracle
from bases import DAMAGES, LAYOUTS, PRECISIONS, SMALL, VARIED, Bases, BaseSpec
from checks import (
    ALL,
    LOKR,
    NATIVE_ROUNDING,
    RANK_LAYOUTS,
    assert_native,
    convert,
    deltas_of,
    right_or_refused,
    to_native,
)
from generate import SPELLINGS, XLABS, random_file
from loras import MODULES, QKV, SINGLE, dotted, everything, kohya, lora, noise
from native import Base, Native, layers_of, modulation_of
from tensorfile import TensorFile, save

# -------------------------------------------------------------------------------- any file, any base


@pytest.mark.parametrize(("base", "dtype"), list(zip(VARIED, ("F32", "BF16", "F16", "BF16"), strict=True)), ids=VARIED)
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_any_spelling_to_native(scratch: Path, bases: Bases, spelling: str, base: str, dtype: str) -> None:
    source = random_file(scratch / "in" / "lora.safetensors", list(VARIED).index(base), spelling, dtype=dtype, blocks=2)
    to_native(source, scratch / "native.safetensors", bases(VARIED[base]))


@pytest.mark.parametrize("name", [name for name in ALL if name.startswith("flux_") and name != "flux_lokr_bfl"])
def test_published_files_to_native(scratch: Path, bases: Bases, name: str) -> None:
    blocks = (2,) if name == "flux_kohya_lokr" else (0, 1)
    listing = oracle.thin(oracle.fixture(name), blocks)
    source = oracle.make_file(listing, scratch / "lora.safetensors", shrink_rank=8)
    base, target = bases(BaseSpec(3, 3, rank=16)), scratch / "native.safetensors"
    if name not in LOKR:
        to_native(source, target, base)
        return
    # A sum of Kronecker products has a plain form only where its rank is small.
    right_or_refused([(source, 1.0)], target, base, ("unsupported-kind",))


@pytest.mark.parametrize("layout", RANK_LAYOUTS)
@pytest.mark.parametrize(
    "strengths",
    [(0.7,), (1.0, -0.5), (0.8, 0.0), (-1.25, 0.3, 1.0), (0.5, -2.0, 0.0, 1 / 3)],
    ids=lambda value: ",".join(f"{x:.2g}" for x in value),
)
def test_compositions(scratch: Path, bases: Bases, strengths: tuple[float, ...], layout: str) -> None:
    spellings = ("kohya", "diffusers", "xlabs", "peft")
    types = ("BF16", "F32", "F16", "BF16")
    inputs = [
        (random_file(scratch / spelling / "lora.safetensors", 3, spelling, dtype=dtype, blocks=2), strength)
        for spelling, dtype, strength in zip(spellings, types, strengths, strict=False)
    ]
    base, target = bases(VARIED["rank 16, folded smoothing"]), scratch / "native.safetensors"
    lorafmt.compose(inputs, target, to="nunchaku", base=base, layout=layout)
    assert_native(deltas_of(inputs), target, base)
    lorafmt.compose(inputs, scratch / "plain.safetensors")
    comparison = oracle.compare(deltas_of(inputs), oracle.reference(scratch / "plain.safetensors"), 2.0**-8)
    assert comparison, str(comparison)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_bases_names_and_precision_make_no_difference(scratch: Path, bases: Bases, precision: str) -> None:
    source = lora(scratch / "lora.safetensors", everything())
    files = []
    for layout in LAYOUTS:
        target = scratch / f"{layout}.safetensors"
        base = bases(BaseSpec(rank=16, layout=layout, precision=precision))
        to_native(source, target, base)
        files.append(Native(target, base).all_factors)
    for other in files[1:]:
        assert other.keys() == files[0].keys()
        for name, factors in files[0].items():
            assert np.array_equal(factors.down, other[name].down) and np.array_equal(factors.up, other[name].up), name


@pytest.mark.parametrize("rank", [16, 32, 64, 128])
@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_every_base_rank(scratch: Path, bases: Bases, rank: int, dtype: str) -> None:
    source = lora(scratch / "lora.safetensors", everything(), dtype=dtype)
    target = scratch / "native.safetensors"
    found = to_native(source, target, base := bases(BaseSpec(rank=rank, dtype=dtype)))
    native = Native(target, base)
    assert {factors.base_rank for name, factors in native.all_factors.items() if "norm" not in name} == {rank}
    # Nothing had to be rounded where the types agree and there is no scale.
    exact = {module: delta for module, delta in oracle.reference(source).items() if "norm" not in module}
    comparison = oracle.compare(exact, {m: d for m, d in found.items() if m in exact}, 1e-12)
    assert comparison, str(comparison)


@pytest.mark.parametrize("dtype", ["keep", "bf16", "fp16"])
def test_the_base_decides_the_type_of_its_layers(scratch: Path, bases: Bases, dtype: str) -> None:
    source = lora(scratch / "lora.safetensors", {**everything(), "x_embedder": 4}, dtype="F32")
    target = scratch / "native.safetensors"
    to_native(source, target, bases(BaseSpec(rank=16, dtype="F16")), dtype=dtype)
    header = TensorFile(target).header
    outside = {"keep": "F32", "bf16": "BF16", "fp16": "F16"}[dtype]
    assert header["x_embedder.lora_A.weight"].dtype == header["x_embedder.lora_B.weight"].dtype == outside
    assert header["transformer_blocks.0.qkv_proj.lora_down"].dtype == "F16"


def test_small_scales_survive_half_precision(scratch: Path, bases: Bases) -> None:
    """alpha / rank of 2^-12 on one factor alone would leave fp16 with subnormal numbers."""
    source = kohya(scratch / "a.safetensors", {"double_blocks.0.img_attn.proj": 16}, alpha=2.0**-8, dtype="F16")
    to_native(source, scratch / "native.safetensors", bases(BaseSpec(rank=16, dtype="F16")))


def test_a_whole_model(scratch: Path, bases: Bases) -> None:
    """All 57 blocks: layers that the adapter does not touch are there as well, unchanged."""
    base = bases(BaseSpec(19, 38, rank=16, layout="v1"))
    modules = {"transformer_blocks.18.ff.net.2": 4, "single_transformer_blocks.37.proj_out": 4, "x_embedder": 4}
    target = scratch / "native.safetensors"
    to_native(lora(scratch / "lora.safetensors", modules), target, base)
    native = Native(target, base)
    assert len([name for name in native.layers if "norm" not in name]) == 19 * 8 + 38 * 4


def test_equal_inputs_give_equal_bytes(scratch: Path, bases: Bases) -> None:
    inputs = [(lora(scratch / f"{seed}.safetensors", everything(), seed=seed), 0.7) for seed in (1, 2)]
    for name in "ab":
        lorafmt.compose(inputs, scratch / f"{name}.out", to="nunchaku", base=bases(SMALL))
    assert (scratch / "a.out").read_bytes() == (scratch / "b.out").read_bytes()


# -------------------------------------------------------------------------------- layout of ranks


def striped(path: Path, first: int, ranks: dict[str, int], seed: int, stripes: int = 4) -> Path:
    """An adapter whose down factors have every `stripes`-th input column only, so that its ranks can be told apart."""
    lora(path, ranks, seed=seed, dtype="F32")
    file = TensorFile(path)
    tensors = {}
    for key in file:
        values = file[key].copy()
        if key.endswith("lora_A.weight"):
            values[:, np.arange(values.shape[1]) % stripes != first] = 0
        tensors[key] = values, "BF16"
    save(path, tensors)
    return path


def owners(down: np.ndarray, count: int, stripes: int = 4) -> list[set[int]]:
    """For each rank, the adapters that it belongs to; none for zeros."""
    return [{i for i in range(count) if row[i::stripes].any()} for row in down]


RANKS = (5, 16, 18)


def composition(scratch: Path, base: Path, layout: str) -> Native:
    inputs = [
        (striped(scratch / f"{i}.safetensors", i, dict.fromkeys(everything(), rank), i), 1.0)
        for i, rank in enumerate(RANKS)
    ]
    lorafmt.compose(inputs, scratch / "native.safetensors", to="nunchaku", base=base, layout=layout)
    assert_native(deltas_of(inputs), scratch / "native.safetensors", base)
    return Native(scratch / "native.safetensors", base)


def test_aligned_adapters_start_on_a_multiple_of_16(scratch: Path, bases: Bases) -> None:
    """No group of 16 ranks holds two adapters, so that a runtime can give each its own strength."""
    native = composition(scratch, bases(SMALL), "aligned")
    # A modulation layer has one strength for its whole branch.
    quantized = {name: factors for name, factors in native.all_factors.items() if "norm" not in name}
    for name, factors in quantized.items():
        found = owners(factors.down, len(RANKS))
        groups = [set().union(*found[start : start + 16]) for start in range(0, len(found), 16)]
        assert all(len(group) == 1 for group in groups), name
        assert [min(group) for group in groups] == sorted(min(group) for group in groups), name


def test_packed_adapters_leave_no_gap(scratch: Path, bases: Bases) -> None:
    native = composition(scratch, bases(SMALL), "packed")
    for name, factors in native.all_factors.items():
        found = owners(factors.down, len(RANKS))
        used = [rank for rank, owner in enumerate(found) if owner]
        fused = 3 if "qkv" in name else 1
        assert len(used) == fused * sum(RANKS), name
        assert used == list(range(len(used))), name
        assert factors.down.shape[0] == -(-len(used) // 16) * 16, name
        order = [min(found[rank]) for rank in used]
        assert order == sorted(order), name


def test_fused_projections_share_an_equal_down(scratch: Path, bases: Bases) -> None:
    source = lora(scratch / "lora.safetensors", dict.fromkeys(QKV, 16), shared=True)
    to_native(source, scratch / "native.safetensors", base := bases(SMALL))
    factors = Native(scratch / "native.safetensors", base).all_factors["transformer_blocks.0.qkv_proj"]
    assert factors.total == 32


def test_fused_projections_add_their_ranks(scratch: Path, bases: Bases) -> None:
    """1, 7 and 3 make 11, which is one group of 16; three times the largest would be two."""
    source = lora(scratch / "lora.safetensors", dict(zip(QKV, (1, 7, 3), strict=True)))
    to_native(source, scratch / "native.safetensors", base := bases(SMALL))
    factors = Native(scratch / "native.safetensors", base).all_factors["transformer_blocks.0.qkv_proj"]
    assert factors.total == 32


@pytest.mark.parametrize(
    ("ranks", "pair"),
    [
        ({f"{SINGLE}.proj_mlp": 20}, f"{SINGLE}.mlp_fc"),
        ({f"{SINGLE}.proj_out": 20}, f"{SINGLE}.mlp_fc"),
        ({f"{SINGLE}.proj_mlp": 4, f"{SINGLE}.proj_out": 40}, f"{SINGLE}.mlp_fc"),
        ({f"{SINGLE}.proj_mlp": 40, f"{SINGLE}.proj_out": 4}, f"{SINGLE}.mlp_fc"),
        ({"transformer_blocks.0.ff.net.0.proj": 20}, "transformer_blocks.0.mlp_fc"),
        ({"transformer_blocks.0.ff.net.2": 20}, "transformer_blocks.0.mlp_fc"),
        ({"transformer_blocks.0.ff_context.net.0.proj": 20}, "transformer_blocks.0.mlp_context_fc"),
        ({"transformer_blocks.0.ff_context.net.2": 40}, "transformer_blocks.0.mlp_context_fc"),
    ],
    ids=lambda value: "+".join(name.split(".", 2)[2] for name in value) if isinstance(value, dict) else "",
)
@pytest.mark.parametrize("layout", RANK_LAYOUTS)
def test_both_layers_of_an_mlp_have_equal_ranks(
    scratch: Path, bases: Bases, ranks: dict[str, int], pair: str, layout: str
) -> None:
    source = lora(scratch / "lora.safetensors", ranks)
    other = lora(scratch / "other.safetensors", {f"{SINGLE}.proj_out": 3, "transformer_blocks.0.ff.net.2": 3}, seed=1)
    inputs, target = [(source, 1.0), (other, 1.0)], scratch / "native.safetensors"
    lorafmt.compose(inputs, target, to="nunchaku", base=(base := bases(SMALL)), layout=layout)
    assert_native(deltas_of(inputs), target, base)
    totals = {Native(target, base).all_factors[f"{pair}{number}"].total for number in (1, 2)}
    assert len(totals) == 1


# -------------------------------------------------------------------------------- files that replace earlier ones


def test_untouched_modulation_layers_have_zero_branches(scratch: Path, bases: Bases) -> None:
    """A runtime keeps the last adapter's branch of a layer that a new file does not name."""
    source = lora(scratch / "lora.safetensors", {"transformer_blocks.0.norm1.linear": 4})
    to_native(source, scratch / "native.safetensors", base := bases(VARIED["rank 16"]))
    native = Native(scratch / "native.safetensors", base)
    names = {f"{block}.{name}" for block in native.base.blocks for name in modulation_of(block)}
    assert names <= set(native.all_factors)
    assert [name for name in names if native.all_factors[name].up.any()] == ["transformer_blocks.0.norm1.linear"]


def test_untouched_biases_have_zero_deltas(scratch: Path, bases: Bases) -> None:
    """Nunchaku sets a linear layer's bias only if the file names it: absent, the last adapter's would stay."""
    key = "transformer.transformer_blocks.0.attn.to_out.0"
    bias = np.linspace(-1, 1, 3072, dtype=np.float32)
    source = lora(
        scratch / "lora.safetensors",
        {"transformer_blocks.0.attn.to_out.0": 4},
        extra={f"{key}.lora_B.bias": (bias, "F32")},
    )
    for spec in (SMALL, BaseSpec(rank=16, dtype="F16")):
        target = scratch / f"{spec.dtype}.safetensors"
        found = to_native(source, target, base := bases(spec))
        assert [module for module in found if module.endswith("#bias")] == [f"{key}#bias"]
        file = TensorFile(target)
        for block in Base(base).blocks:
            for layer in layers_of(block):
                name = f"{block}.{layer.vector}.bias"
                if layer.bias:
                    assert (file.header[name].dtype, file.header[name].shape) == (spec.dtype, (layer.out,)), name


def test_biases_of_every_kind_of_layer(scratch: Path, bases: Bases) -> None:
    """Fused ones side by side, a missing member zero, modulation in diffusers' order, all in the base's type."""
    rng = np.random.default_rng(5)
    sizes = {
        **dict.fromkeys(QKV[::2], 3072),
        "transformer_blocks.0.attn.add_v_proj": 3072,
        "transformer_blocks.0.ff.net.0.proj": 12288,
        "transformer_blocks.0.ff_context.net.2": 3072,
        "transformer_blocks.0.norm1.linear": 6 * 3072,
        f"{SINGLE}.attn.to_v": 3072,
        f"{SINGLE}.proj_mlp": 12288,
        f"{SINGLE}.proj_out": 3072,
        f"{SINGLE}.norm.linear": 3 * 3072,
        "x_embedder": 3072,
        "proj_out": 64,
    }
    extra = {f"transformer.{m}.lora_B.bias": (rng.standard_normal(n, np.float32), "F32") for m, n in sizes.items()}
    source = lora(scratch / "lora.safetensors", dict.fromkeys(sizes, 2), extra=extra)
    for spec in (SMALL, BaseSpec(rank=16, dtype="F16"), BaseSpec(rank=16, fused=True)):
        found = to_native(source, scratch / "native.safetensors", bases(spec), overwrite=True)
        assert len([module for module in found if "#bias" in module]) == len(sizes)


def test_norms_of_control_adapters_are_replaced(scratch: Path, bases: Bases) -> None:
    extra = {f"double_blocks.0.img_attn.norm.{n}_norm.scale": (np.full(128, 1.5), "BF16") for n in ("query", "key")}
    source = lora(scratch / "lora.safetensors", {"double_blocks.0.img_attn.qkv": 4}, dotted(), extra=extra)
    found = to_native(source, scratch / "native.safetensors", bases(SMALL))
    assert {m.rpartition(".")[2] for m in found if "#set" in m} == {"norm_q#set", "norm_k#set"}


# -------------------------------------------------------------------------------- parts of modules

PARTS = {
    "q alone": QKV[:1],
    "k alone": QKV[1:2],
    "v alone": QKV[2:],
    "k and v": QKV[1:],
    "added v alone": ("transformer_blocks.0.attn.add_v_proj",),
    "v of a single block": (f"{SINGLE}.attn.to_v",),
    "k and v of a single block": (f"{SINGLE}.attn.to_k", f"{SINGLE}.attn.to_v"),
}


@pytest.mark.parametrize("shared", [False, True], ids=["different", "equal"])
@pytest.mark.parametrize("modules", PARTS.values(), ids=PARTS)
def test_projections_without_the_others(scratch: Path, bases: Bases, modules: tuple[str, ...], shared: bool) -> None:
    source = lora(scratch / "lora.safetensors", dict.fromkeys(modules, 4), shared=shared)
    to_native(source, scratch / "native.safetensors", bases(SMALL))
    other = lora(scratch / "other.safetensors", dict.fromkeys(QKV, 8), seed=2)
    inputs = [(source, 0.5), (other, -1.0)]
    lorafmt.compose(inputs, scratch / "both.safetensors", to="nunchaku", base=bases(SMALL))
    assert_native(deltas_of(inputs), scratch / "both.safetensors", bases(SMALL))


def test_xlabs_single_blocks_have_no_mlp(scratch: Path, bases: Bases) -> None:
    paths = {"single_blocks.0.processor.qkv_lora": 4, "single_blocks.0.processor.proj_lora": 4}
    source = lora(scratch / "lora.safetensors", paths, dotted(), XLABS)
    to_native(source, scratch / "native.safetensors", bases(SMALL))


def test_text_encoders_are_carried(scratch: Path, bases: Bases) -> None:
    source = random_file(scratch / "lora.safetensors", 4, "kohya", blocks=1)
    expected = oracle.reference(source)
    text = [module for module in expected if module.startswith("text_encoder")]
    report = convert(source, scratch / "native.safetensors", to="nunchaku", base=bases(SMALL))
    found = assert_native(expected, scratch / "native.safetensors", bases(SMALL))
    assert text and report["tensors"]["dropped"] == 0
    assert set(text) <= set(found)


# -------------------------------------------------------------------------------- embedders of several widths


@pytest.mark.parametrize("widths", [(64, 128), (128, 64), (64, 128, 384), (384, 64)])
@pytest.mark.parametrize("to", ["nunchaku", "diffusers"])
def test_embedders_of_several_widths_add(scratch: Path, bases: Bases, widths: tuple[int, ...], to: str) -> None:
    """An adapter for a model that sees an image, and one for the plain model: missing inputs add nothing."""
    inputs = [
        (lora(scratch / f"{i}.safetensors", {"x_embedder": 4, QKV[0]: 4}, seed=i, width=width), 0.5 + i)
        for i, width in enumerate(widths)
    ]
    target = scratch / "out.safetensors"
    options = {"base": bases(BaseSpec(rank=16, layout="v1", channels=max(widths)))} if to == "nunchaku" else {}
    lorafmt.compose(inputs, target, to=to, **options)
    expected = deltas_of(inputs)
    assert expected["transformer.x_embedder"].shape == (3072, max(widths))
    if to == "nunchaku":
        assert_native(expected, target, options["base"])
    else:
        comparison = oracle.compare(expected, oracle.reference(target), NATIVE_ROUNDING["BF16"])
        assert comparison, str(comparison)


# -------------------------------------------------------------------------------- bases that are unusual or damaged

WITHOUT = ("transformer_blocks.0.qkv_proj", "transformer_blocks.0.mlp_fc1", "transformer_blocks.0.mlp_fc2")


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
@pytest.mark.parametrize("how", ["without", "empty"])
def test_layers_without_a_branch(scratch: Path, bases: Bases, how: str, dtype: str) -> None:
    base = bases(BaseSpec(rank=16, dtype=dtype, **{how: (*WITHOUT, f"{SINGLE}.out_proj")}))
    source = lora(scratch / "lora.safetensors", everything(), dtype=dtype)
    to_native(source, scratch / "native.safetensors", base)
    native = Native(scratch / "native.safetensors", base)
    assert {native.all_factors[name].base_rank for name in WITHOUT} == {0}


def test_folded_smoothing_reaches_the_values(scratch: Path, bases: Bases) -> None:
    """All layers of both streams and of a single block, with a bias; the result differs from that of a plain base."""
    extra = {f"transformer.{QKV[2]}.lora_B.bias": noise(3072), f"transformer.{QKV[0]}.lora_B.bias": noise(3072, seed=1)}
    source = lora(scratch / "lora.safetensors", everything(), extra=extra)
    files = {}
    for fused in (False, True):
        target = scratch / f"{fused}.safetensors"
        base = bases(BaseSpec(rank=16, fused=fused))
        to_native(source, target, base)
        files[fused] = Native(target, base).all_factors
    changed = {name for name, factors in files[True].items() if not np.array_equal(factors.up, files[False][name].up)}
    assert changed == {"transformer_blocks.0.qkv_proj", "transformer_blocks.0.qkv_proj_context", f"{SINGLE}.qkv_proj"}
    changed = {
        name for name, factors in files[True].items() if not np.array_equal(factors.down, files[False][name].down)
    }
    assert changed >= {"transformer_blocks.0.out_proj", "transformer_blocks.0.out_proj_context", f"{SINGLE}.out_proj"}


@pytest.mark.parametrize("damage", [damage for damage in DAMAGES if "stream" in damage])
def test_bases_that_contradict_themselves_are_worth_a_word(scratch: Path, bases: Bases, damage: str) -> None:
    source = lora(scratch / "lora.safetensors", everything())
    base = bases(BaseSpec(damage=damage, fused=True))
    report = lorafmt.convert(source, scratch / "native.safetensors", to="nunchaku", base=base)
    assert "inconsistent-smoothing" in [warning.code for warning in report.warnings]


@pytest.mark.parametrize("damage", [damage for damage in DAMAGES if "stream" not in damage])
def test_damaged_bases_are_refused(scratch: Path, bases: Bases, damage: str) -> None:
    source = lora(scratch / "lora.safetensors", everything())
    target = scratch / "native.safetensors"
    with pytest.raises(lorafmt.LorafmtError) as caught:
        lorafmt.convert(source, target, to="nunchaku", base=bases(BaseSpec(damage=damage)))
    assert caught.value.code in ("invalid-base", "invalid-packing") and caught.value.hint
    assert not target.exists()


def test_what_is_no_base_is_refused(scratch: Path, bases: Bases) -> None:
    source, target = lora(scratch / "lora.safetensors", MODULES), scratch / "native.safetensors"
    save(scratch / "dense.safetensors", {"x_embedder.weight": (np.zeros((3072, 64)), "BF16")})
    (scratch / "text.safetensors").write_text("no safetensors file, this")
    for base in (source, scratch / "dense.safetensors", scratch / "text.safetensors", scratch):
        with pytest.raises(lorafmt.LorafmtError) as caught:
            lorafmt.convert(source, target, to="nunchaku", base=base)
        assert caught.value.code and not target.exists(), base
    with pytest.raises(FileNotFoundError):
        lorafmt.convert(source, target, to="nunchaku", base=scratch / "absent.safetensors")
    with pytest.raises(lorafmt.LorafmtError) as caught:
        lorafmt.convert(source, target, to="nunchaku")
    assert caught.value.code == "base-needed"
