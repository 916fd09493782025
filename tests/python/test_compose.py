"""Several adapters written as one: the weighted sum of their deltas, in every dialect."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

import lorafmt
import oracle
from checks import ONE_ROUNDING, deltas_of, must_hold, target_path
from generate import KOHYA, SPELLINGS, random_file
from loras import DIFFUSERS, MODULES, QKV, kohya, lora, noise, size
from tensorfile import TensorFile

MIXES = [
    ("kohya", "diffusers", "comfyui"),
    ("peft", "onetrainer", "kohya diffusers names"),
    ("kohya", "kohya", "xlabs"),
]
TARGETS = ("diffusers", "peft", "kohya", "comfyui", "onetrainer", "aitoolkit")
Q, K, V = QKV


def held(expected: oracle.Reference, dialect: str) -> oracle.Reference:
    return {module: delta for module, delta in expected.items() if must_hold(dialect, module)}


def scaled(reference: oracle.Reference, factor: Mapping[str, float] | float) -> oracle.Reference:
    """Each module times a number; of a mapping, that of the longest beginning that fits."""

    def of(module: str) -> float:
        if not isinstance(factor, Mapping):
            return factor
        return factor[max((start for start in factor if module.startswith(start)), key=len)]

    parts = [({module: delta}, of(module)) for module, delta in reference.items()]
    return oracle.mixed(parts)


def assert_sum(expected: oracle.Reference, target: Path, tolerance: float = 1e-6) -> None:
    comparison = oracle.compare(expected, oracle.reference(target), tolerance)
    assert comparison, str(comparison)


@pytest.mark.parametrize("to", TARGETS)
@pytest.mark.parametrize("mix", MIXES, ids=lambda mix: "+".join(mix))
def test_any_mix_is_the_weighted_sum(tmp_path: Path, mix: tuple[str, ...], to: str) -> None:
    # Text encoders are in the spellings' own tests; not every target has a place for them.
    inputs = [
        (random_file(tmp_path / str(n) / "lora.safetensors", n + 5, spelling, text=False), strength)
        for n, (spelling, strength) in enumerate(zip(mix, (0.8, -1.25, 1 / 3), strict=True))
    ]
    assert all(spelling in SPELLINGS for spelling in mix)
    target = target_path(tmp_path, to)
    report = lorafmt.compose(inputs, target, to=to)
    counts = report.tensors
    assert counts.total == counts.used == sum(len(TensorFile(path)) for path, _ in inputs)
    assert [source["strength"] for source in report["sources"]] == [0.8, -1.25, 1 / 3]
    assert_sum(held(deltas_of(inputs), to), target)


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_one_rounding_in_half_precision(tmp_path: Path, dtype: str) -> None:
    inputs = [(lora(tmp_path / f"{n}.safetensors", MODULES, seed=n, dtype=dtype), 0.3 + n) for n in range(3)]
    lorafmt.compose(inputs, tmp_path / "out.safetensors")
    assert_sum(deltas_of(inputs), tmp_path / "out.safetensors", ONE_ROUNDING[dtype])


def test_dtypes_meet_in_the_wider_one(tmp_path: Path) -> None:
    pairs = [("BF16", 1.0), ("F16", 1.0), ("F32", 1.0)]
    inputs = [
        (lora(tmp_path / f"{dtype}.safetensors", MODULES, seed=n, dtype=dtype), strength)
        for n, (dtype, strength) in enumerate(pairs)
    ]
    lorafmt.compose(inputs, tmp_path / "out.safetensors")
    assert {entry.dtype for entry in TensorFile(tmp_path / "out.safetensors").header.values()} == {"F32"}
    # Nothing is multiplied, so nothing is rounded.
    assert_sum(deltas_of(inputs), tmp_path / "out.safetensors", 1e-12)


def test_text_encoders_have_a_strength_of_their_own(tmp_path: Path) -> None:
    source = random_file(tmp_path / "lora.safetensors", 3, "kohya")
    strengths = {"*": 0.5, "text_encoders": 0.25, "text_encoder_2": -2.0}
    lorafmt.compose([(source, strengths)], tmp_path / "out.safetensors")
    wanted = {"transformer.": 0.5, "text_encoder.": 0.25, "text_encoder_2.": -2.0}
    assert_sum(scaled(oracle.reference(source), wanted), tmp_path / "out.safetensors")


def test_selectors_reach_exactly_what_they_name(tmp_path: Path) -> None:
    blocks = (1, 2, 10, 11)
    modules = {f"{kind}_blocks.{n}.attn.to_q": 4 for kind in ("transformer", "single_transformer") for n in blocks}
    source = lora(tmp_path / "lora.safetensors", modules, dtype="F32")
    places = {"transformer_blocks.1": 2.0, "single_transformer_blocks.10-11": 0.5, "**.nothing": 3.0}
    report = lorafmt.compose([(source, places)], tmp_path / "out.safetensors")
    wanted = {
        "transformer.": 1.0,
        "transformer.transformer_blocks.1.": 2.0,
        "transformer.single_transformer_blocks.10.": 0.5,
        "transformer.single_transformer_blocks.11.": 0.5,
    }
    assert_sum(scaled(oracle.reference(source), wanted), tmp_path / "out.safetensors")
    assert [w.detail for w in report.warnings if w.code == "unmatched-selector"] == ["`**.nothing` matches no module"]


def test_a_fused_layer_can_have_other_strengths_for_its_parts(tmp_path: Path) -> None:
    """q, k and v of one fused module at strengths of their own, back into a fused module."""
    source = kohya(tmp_path / "a.safetensors", {"double_blocks.0.img_attn.qkv": 4}, alpha=3.0, dtype="F32")
    places = {"transformer_blocks.0.attn.to_v": 0.0, "transformer_blocks.0.attn.to_k": -0.7}
    lorafmt.compose([(source, places)], tmp_path / "out.safetensors", to="kohya")
    start = "transformer.transformer_blocks.0.attn."
    wanted = {f"{start}to_q": 1.0, f"{start}to_k": -0.7, f"{start}to_v": 0.0}
    assert_sum(scaled(oracle.reference(source), wanted), tmp_path / "out.safetensors")


def rank(path: Path, key: str) -> int:
    return TensorFile(path).header[key].shape[0]


def test_zero_costs_no_rank(tmp_path: Path) -> None:
    a, b = (lora(tmp_path / f"{n}.safetensors", {Q: 4 + n}, seed=n) for n in range(2))
    report = lorafmt.compose([(a, 1.0), (b, 0.0)], tmp_path / "out.safetensors")
    assert rank(tmp_path / "out.safetensors", f"transformer.{Q}.lora_A.weight") == 4
    assert report.tensors.dropped == 2 and "zero-strength" in {warning.code for warning in report.warnings}
    with pytest.raises(lorafmt.LorafmtError, match="nothing would be written") as caught:
        lorafmt.compose([(a, 0.0), (b, 0.0)], tmp_path / "none.safetensors")
    assert caught.value.code == "no-modules" and not (tmp_path / "none.safetensors").exists()


def test_the_same_adapter_twice_adds_and_is_worth_a_word(tmp_path: Path) -> None:
    source = lora(tmp_path / "a.safetensors", MODULES, dtype="F32")
    (tmp_path / "copy.safetensors").write_bytes(source.read_bytes())
    inputs = [(source, 0.75), (tmp_path / "copy.safetensors", 0.5)]
    report = lorafmt.compose(inputs, tmp_path / "out.safetensors")
    assert "repeated-adapter" in {warning.code for warning in report.warnings}
    assert_sum(deltas_of(inputs), tmp_path / "out.safetensors")
    # Equal factors are not written twice.
    assert rank(tmp_path / "out.safetensors", f"transformer.{Q}.lora_A.weight") == MODULES[Q]


def test_rows_that_parts_share_stand_once(tmp_path: Path) -> None:
    """One adapter shares A among q, k and v, another does not: fused, the shared rows are not tripled."""
    shared = kohya(tmp_path / "a.safetensors", {"double_blocks.0.img_attn.qkv": 4}, alpha=4.0, dtype="F32")
    split = lora(tmp_path / "b.safetensors", {Q: 3, K: 3, V: 3}, dtype="F32", seed=5)
    inputs = [(shared, 1.0), (split, 1.0)]
    key = "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight"
    lorafmt.compose(inputs, tmp_path / "fused.safetensors", to="kohya")
    assert rank(tmp_path / "fused.safetensors", key) == 4 + 3 * 3
    # Also after the two were written apart: the common rows are found again by their bytes.
    lorafmt.compose(inputs, tmp_path / "apart.safetensors")
    assert rank(tmp_path / "apart.safetensors", f"transformer.{K}.lora_A.weight") == 4 + 3
    lorafmt.convert(tmp_path / "apart.safetensors", tmp_path / "again.safetensors", to="kohya")
    assert rank(tmp_path / "again.safetensors", key) == 4 + 3 * 3
    for name in ("fused", "apart", "again"):
        assert_sum(deltas_of(inputs), tmp_path / f"{name}.safetensors", 1e-12)


def test_biases_add_and_norms_come_from_one(tmp_path: Path) -> None:
    bias = f"transformer.{Q}.lora_B.bias"
    norm = "transformer.transformer_blocks.0.attn.norm_q.weight"
    a = lora(tmp_path / "a.safetensors", {Q: 2}, extra={bias: noise(3072, seed=1)}, dtype="F32")
    b = lora(
        tmp_path / "b.safetensors", {Q: 2}, extra={bias: noise(3072, seed=2), norm: noise(128)}, dtype="F32", seed=1
    )
    inputs = [(a, 0.5), (b, -2.0)]
    report = lorafmt.compose(inputs, tmp_path / "out.safetensors")
    assert "unscaled-parameter" in {warning.code for warning in report.warnings}
    assert_sum(deltas_of(inputs), tmp_path / "out.safetensors")
    c = lora(tmp_path / "c.safetensors", {K: 2}, extra={norm: noise(128, seed=3)})
    with pytest.raises(lorafmt.UnsupportedError, match=r"b\.safetensors.*c\.safetensors") as caught:
        lorafmt.compose([b, c], tmp_path / "two.safetensors")
    assert caught.value.code == "incompatible-modules"


@pytest.mark.parametrize("widths", [(64, 128), (128, 64), (64, 384), (64, 128, 384)], ids=str)
def test_narrow_inputs_are_widened(tmp_path: Path, widths: tuple[int, ...]) -> None:
    inputs = [
        (lora(tmp_path / f"{width}.safetensors", {"x_embedder": 2, Q: 2}, width=width, seed=width, dtype="F32"), 0.5)
        for width in widths
    ]
    report = lorafmt.compose(inputs, tmp_path / "out.safetensors")
    assert TensorFile(tmp_path / "out.safetensors").header["transformer.x_embedder.lora_A.weight"].shape[1] == max(
        widths
    )
    assert "widened-inputs" in {warning.code for warning in report.warnings}
    assert_sum(deltas_of(inputs), tmp_path / "out.safetensors")


def test_inputs_are_widened_when_asked(tmp_path: Path) -> None:
    source = lora(tmp_path / "a.safetensors", {"x_embedder": 2, Q: 2}, width=64)
    lorafmt.convert(source, tmp_path / "out.safetensors", widen=128)
    header = TensorFile(tmp_path / "out.safetensors").header
    assert header["transformer.x_embedder.lora_A.weight"].shape == (2, 128)
    assert header[f"transformer.{Q}.lora_A.weight"].shape == (2, size(Q)[1])


def lokr(path: Path) -> Path:
    """q of the first block as a Kronecker product of a full 4 x 4 and a rank-3 factor: rank 12 as LoRA."""
    name = "lora_unet_double_blocks_0_img_attn_proj"
    parts = {"lokr_w1": noise(4, 4), "lokr_w2_a": noise(768, 3), "lokr_w2_b": noise(3, 768, seed=4)}
    extra = {f"{name}.{slot}": tensor for slot, tensor in parts.items()}
    return kohya(path, {}, extra={**extra, f"{name}.alpha": (np.float32(2.0), "F32")})


def test_lokr_is_composed_by_its_exact_plain_form(tmp_path: Path) -> None:
    other = kohya(tmp_path / "b.safetensors", {"double_blocks.0.img_attn.proj": 4}, dtype="F32")
    inputs = [(lokr(tmp_path / "a.safetensors"), 0.8), (other, 1.0)]
    lorafmt.compose(inputs, tmp_path / "out.safetensors")
    assert rank(tmp_path / "out.safetensors", "transformer.transformer_blocks.0.attn.to_out.0.lora_A.weight") == 12 + 4
    assert_sum(deltas_of(inputs), tmp_path / "out.safetensors")
    with pytest.raises(lorafmt.UnsupportedError, match="--max-rank 12") as caught:
        lorafmt.compose(inputs, tmp_path / "less.safetensors", max_rank=11)
    assert caught.value.code == "unsupported-kind"


def test_loha_is_composed_by_its_exact_plain_form(tmp_path: Path) -> None:
    a = random_file(tmp_path / "a.safetensors", 2, "kohya", kind="loha", blocks=1)
    b = random_file(tmp_path / "b.safetensors", 3, "kohya", blocks=1, text=False)
    inputs = [(a, 0.8), (b, -1.0)]
    lorafmt.compose(inputs, tmp_path / "out.safetensors", max_rank=36)
    assert_sum(deltas_of(inputs), tmp_path / "out.safetensors")


def test_dora_adds_to_nothing(tmp_path: Path) -> None:
    a = random_file(tmp_path / "a.safetensors", 2, "kohya", kind="dora", blocks=1)
    with pytest.raises(lorafmt.UnsupportedError) as caught:
        lorafmt.compose([(a, 1.0), (a, 0.5)], tmp_path / "out.safetensors", to="kohya")
    assert caught.value.code in ("incompatible-modules", "unsupported-strength") and caught.value.hint


def test_other_families_are_refused(tmp_path: Path) -> None:
    flux = lora(tmp_path / "flux.safetensors", {"norm_out.linear": 2, Q: 2})
    chroma = lora(
        tmp_path / "chroma.safetensors",
        {Q: 2},
        extra={
            "transformer.distilled_guidance_layer.in_proj.lora_A.weight": noise(2, 64),
            "transformer.distilled_guidance_layer.in_proj.lora_B.weight": noise(5120, 2),
        },
    )
    with pytest.raises(lorafmt.UnsupportedError) as caught:
        lorafmt.compose([flux, chroma], tmp_path / "out.safetensors")
    assert caught.value.code == "family-mismatch" and caught.value.path
    # What fits both families goes with either.
    either = lora(tmp_path / "either.safetensors", {Q: 2}, seed=3, dtype="F32")
    for other in (flux, chroma):
        report = lorafmt.compose([either, other], tmp_path / f"{other.stem}-2.safetensors")
        assert {source["family"] for source in report["sources"]} == {lorafmt.detect(other).family}


@pytest.mark.parametrize(
    ("loras", "code"),
    [
        ([], "invalid-argument"),
        ([("a", float("nan"))], "invalid-argument"),
        ([("a", float("inf"))], "invalid-argument"),
        ([("a", "0.5")], "invalid-argument"),
        ([("a", {"transformer_blocks.9-3": 1.0})], "invalid-argument"),
        ([("a", {"": 1.0})], "invalid-argument"),
        ([("a", 1.0, 2.0)], "invalid-argument"),
        (["missing"], "not-found"),
    ],
    ids=str,
)
def test_nonsense_is_refused(tmp_path: Path, loras: list[object], code: str) -> None:
    source = lora(tmp_path / "a.safetensors", MODULES)

    def real(entry: object) -> object:
        paths = {"a": source, "missing": tmp_path / "none.safetensors"}
        return (paths[entry[0]], *entry[1:]) if isinstance(entry, tuple) else paths[str(entry)]

    with pytest.raises(lorafmt.LorafmtError) as caught:
        lorafmt.compose([real(entry) for entry in loras], tmp_path / "out.safetensors")  # type: ignore[misc]
    assert caught.value.code == code and caught.value.hint
    assert not (tmp_path / "out.safetensors").exists()


def test_a_composition_is_an_adapter(tmp_path: Path) -> None:
    a, b = (lora(tmp_path / f"{n}.safetensors", {Q: 2}, seed=n, dtype="F32") for n in range(2))
    both = lorafmt.compose([(a, 0.5), b])
    wanted = 0.5 * lorafmt.open(a)[Q].delta() + lorafmt.open(b)[Q].delta()
    assert np.allclose(both[Q].delta(), wanted, rtol=0, atol=1e-6 * np.abs(wanted).max())
    assert both.rank == 4 and both.report and both.report.modules == 1
    again = lorafmt.compose([both, (a, -0.5)])
    assert np.allclose(again[Q].delta(), lorafmt.open(b)[Q].delta(), rtol=0, atol=1e-6 * np.abs(wanted).max())


def test_scaling_keeps_the_dialect(tmp_path: Path) -> None:
    source = kohya(tmp_path / "a.safetensors", {"double_blocks.0.img_attn.qkv": 4}, alpha=3.0, dtype="F32")
    report = lorafmt.scale(
        source, tmp_path / "out.safetensors", strength={"*": 0.3, "transformer_blocks.0.attn.to_q": 2}
    )
    assert isinstance(report, lorafmt.Report) and report.dialect_to == "kohya"
    start = "transformer.transformer_blocks.0.attn."
    wanted = {f"{start}to_q": 0.6, f"{start}to_k": 0.3, f"{start}to_v": 0.3}
    assert_sum(scaled(oracle.reference(source), wanted), tmp_path / "out.safetensors")
    with pytest.raises(lorafmt.UsageError):
        lorafmt.scale(source, tmp_path / "no.safetensors", loras={"a": 0.5})


def test_provenance_is_written(tmp_path: Path) -> None:
    shared = {"ss_base_model_version": "flux1", "ss_network_dim": "4"}
    a = kohya(tmp_path / "a.safetensors", {"img_in": 4}, metadata={**shared, "ss_output_name": "a"})
    b = lora(tmp_path / "b.safetensors", {"x_embedder": 4}, DIFFUSERS, metadata={**shared, "ss_output_name": "b"})
    assert KOHYA[0] in next(iter(TensorFile(a).header)) + "".join(TensorFile(a).header)
    lorafmt.compose([(a, 0.5), (b, {"*": 1.0, "x_embedder": 2.0})], tmp_path / "out.safetensors", to="kohya")
    metadata = TensorFile(tmp_path / "out.safetensors").metadata
    assert metadata["ss_base_model_version"] == "flux1" and "ss_output_name" not in metadata
    assert "ss_network_dim" not in metadata
    assert metadata["lorafmt.composed"].startswith('[{"name":"a","strength":0.5},{"name":"b"')
