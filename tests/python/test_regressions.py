"""One test for each defect that somebody found by hand. The name says what went wrong."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import lorafmt

K = "lora_unet_double_blocks_0_img_attn_proj"
PATH = "transformer_blocks.0.attn.to_out.0"


def pair(name: str, down: str = ".lora_down.weight", up: str = ".lora_up.weight", seed: int = 0, rank: int = 4):
    generator = torch.Generator().manual_seed(seed)
    return {
        name + down: torch.randn(rank, 3072, generator=generator) * 0.02,
        name + up: torch.randn(3072, rank, generator=generator) * 0.02,
    }


def product(state: dict[str, torch.Tensor]) -> np.ndarray:
    down, up = state.values()
    return up.double().numpy() @ down.double().numpy()


def same(delta: np.ndarray, expected: np.ndarray) -> bool:
    return bool(np.linalg.norm(delta - expected) <= 1e-6 * np.linalg.norm(expected))


def test_metadata_of_save_lora_adapter_has_no_component(tmp_path: Path) -> None:
    source = tmp_path / "a.safetensors"
    state = pair(PATH, ".lora_A.weight", ".lora_B.weight")
    save_file(state, source, {"lora_adapter_metadata": json.dumps({"r": 4, "lora_alpha": 32})})
    assert lorafmt.open(source)[PATH].scale == 8.0


@pytest.mark.parametrize(("kind", "full", "scale"), [("LOKR", True, 4.0), ("LOKR", False, 4.0), ("LOHA", False, 4.0)])
def test_peft_calls_the_alpha_of_lycoris_kinds_alpha(tmp_path: Path, kind: str, full: bool, scale: float) -> None:
    generator = torch.Generator().manual_seed(1)
    noise = lambda *shape: torch.randn(*shape, generator=generator).double().float()  # noqa: E731
    base = f"base_model.model.{PATH}"
    if kind == "LOHA":
        a, b, c, d = noise(3072, 4), noise(4, 3072), noise(3072, 4), noise(4, 3072)
        state = {"hada_w1_a": a, "hada_w1_b": b, "hada_w2_a": c, "hada_w2_b": d}
        expected = (a.double() @ b.double()) * (c.double() @ d.double())
    else:
        w1, w2_a, w2_b = noise(2, 2), noise(1536, 4), noise(4, 1536)
        w2 = w2_a.double() @ w2_b.double()
        state = {"lokr_w1": w1} | ({"lokr_w2": w2.float()} if full else {"lokr_w2_a": w2_a, "lokr_w2_b": w2_b})
        expected = torch.kron(w1.double(), w2.float().double() if full else w2)
    save_file({f"{base}.{k}": v for k, v in state.items()}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": kind, "r": 4, "alpha": 16}))
    assert same(lorafmt.open(tmp_path)[PATH].delta(dtype="float64"), scale * expected.numpy())


def test_an_unreadable_pattern_is_no_default_alpha(tmp_path: Path) -> None:
    save_file(
        pair(f"base_model.model.{PATH}", ".lora_A.weight", ".lora_B.weight"), tmp_path / "adapter_model.safetensors"
    )
    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": 4, "alpha_pattern": {"(?!x).*": 1}}))
    with pytest.raises(lorafmt.FormatError) as caught:
        lorafmt.open(tmp_path)
    assert caught.value.code == "invalid-config"


def test_the_bias_of_a_norm_is_no_layer() -> None:
    norm = "text_encoders.clip_l.transformer.text_model.encoder.layers.0.layer_norm1.diff_b"
    state = {norm: torch.ones(768), **pair("diffusion_model.double_blocks.0.img_attn.proj")}
    for to in ("diffusers", "peft", "bfl"):
        with pytest.raises(lorafmt.UnsupportedError) as caught:
            lorafmt.convert(state, to=to)
        assert caught.value.code == "unsupported-kind"
    assert norm in lorafmt.convert(state, to="comfyui").state_dict()


def test_values_that_vanish_in_fp16_are_reported(tmp_path: Path) -> None:
    state = {k: torch.full_like(v, 1e-8).bfloat16() for k, v in pair(K).items()}
    report = lorafmt.convert(state, tmp_path / "o.safetensors", to="kohya", dtype="fp16")
    assert "underflow" in {w.code for w in report.warnings}
    fine = lorafmt.convert(pair(K), tmp_path / "p.safetensors", to="kohya", dtype="fp16")
    assert "underflow" not in {w.code for w in fine.warnings}


def test_ranks_of_decomposed_kronecker_factors_must_agree() -> None:
    state = {
        f"{K}.lokr_w1_a": torch.ones(4, 2),
        f"{K}.lokr_w1_b": torch.ones(3, 4),
        f"{K}.lokr_w2": torch.ones(768, 768),
    }
    with pytest.raises(lorafmt.FormatError) as caught:
        lorafmt.open(state)
    assert caught.value.code == "shape-mismatch"


def test_integer_factors_are_refused() -> None:
    state = {k: v.to(torch.int64) for k, v in pair(K).items()}
    with pytest.raises(lorafmt.FormatError) as caught:
        lorafmt.convert(state)
    assert caught.value.code == "invalid-dtype"


def test_a_shape_whose_product_wraps_is_refused() -> None:
    shape = [0, 3072, 3, 12297829382473034411]
    header = json.dumps({f"{K}.lora_down.weight": {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}}).encode()
    with pytest.raises(lorafmt.FormatError) as caught:
        lorafmt.open(struct.pack("<Q", len(header)) + header)
    assert caught.value.code == "invalid-offsets"


def test_a_peft_folder_is_not_written_over_itself(tmp_path: Path) -> None:
    folder = tmp_path / "p"
    lorafmt.convert(pair(K), folder, to="peft")
    before = (folder / "adapter_model.safetensors").read_bytes()
    with pytest.raises(lorafmt.LorafmtError) as caught:
        lorafmt.convert(folder, folder, to="peft", strength=0.5, overwrite=True)
    assert caught.value.code == "same-file"
    assert (folder / "adapter_model.safetensors").read_bytes() == before


def test_half_a_peft_folder_is_never_left(tmp_path: Path) -> None:
    folder = tmp_path / "p"
    (folder / "adapter_config.json").mkdir(parents=True)
    with pytest.raises(lorafmt.LorafmtError):
        lorafmt.convert(pair(K), folder, to="peft", overwrite=True)
    assert os.listdir(folder) == ["adapter_config.json"]


TO_OUT = "lora_unet_transformer_blocks_0_attn_to_out_0"
CLAIMS = {
    "two spellings": (
        pair(f"transformer.{PATH}", ".lora_A.weight", ".lora_B.weight"),
        pair(f"transformer.{PATH}", ".lora.down.weight", ".lora.up.weight", 1),
    ),
    "an underscore more": (pair(TO_OUT), pair(f"{TO_OUT}_", seed=1)),
    "two prefixes": (pair(K), pair("lora_unet__double_blocks_0_img_attn_proj", seed=1, rank=2)),
}


@pytest.mark.parametrize(("one", "two"), CLAIMS.values(), ids=CLAIMS)
def test_two_claims_on_one_module_add(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> None:
    # Whatever the order of keys, halves are paired as they are spelled.
    keys = [k for pair_of_keys in zip(one, reversed(two), strict=True) for k in pair_of_keys]
    adapter = lorafmt.open({k: {**one, **two}[k] for k in keys})
    assert same(adapter[PATH].delta(dtype="float64"), product(one) + product(two))
    assert lorafmt.convert({**one, **two}).report.tensors.used == 4


def test_an_alpha_counts_for_every_claim_under_its_name() -> None:
    one = pair(f"transformer.{PATH}", ".lora_A.weight", ".lora_B.weight")
    two = pair(f"transformer.{PATH}", ".lora.down.weight", ".lora.up.weight", 1)
    state = {**one, **two, f"transformer.{PATH}.alpha": torch.tensor(2.0)}
    assert same(lorafmt.open(state)[PATH].delta(dtype="float64"), 0.5 * (product(one) + product(two)))


def test_a_note_about_a_dropped_module_is_dropped_with_it() -> None:
    wide = {"img_in.lora_A.weight": torch.ones(2, 128), "img_in.lora_B.weight": torch.ones(3072, 2)}
    state = {f"diffusion_model.{k}": v for k, v in wide.items()} | pair("diffusion_model.double_blocks.0.img_attn.proj")
    state["diffusion_model.img_in.reshape_weight"] = torch.tensor([3072, 128])
    count = lorafmt.convert(state, to="xlabs", lossy="allow").report.tensors
    assert (count.used, count.dropped, count.total) == (2, 3, 5)


def test_contributions_of_different_width_are_no_panic() -> None:
    state = {
        "lora_unet_img_in.lora_down.weight": torch.ones(2, 64),
        "lora_unet_img_in.lora_up.weight": torch.ones(3072, 2),
        "transformer.x_embedder.lora_A.weight": torch.ones(2, 128),
        "transformer.x_embedder.lora_B.weight": torch.ones(3072, 2),
    }
    with pytest.raises(lorafmt.UnsupportedError) as caught:
        lorafmt.open(state)
    assert caught.value.code == "duplicate-module"


def test_a_checkpoint_is_told_from_an_adapter() -> None:
    state = {"model.diffusion_model.double_blocks.0.img_attn.proj.weight": torch.ones(3072, 3072)}
    with pytest.raises(lorafmt.FormatError) as caught:
        lorafmt.open(state)
    assert caught.value.code == "not-an-adapter"


def test_check_of_two_adapters_is_an_answer() -> None:
    state = pair(f"transformer.{PATH}", ".lora_A.one.weight", ".lora_B.one.weight")
    state |= pair(f"transformer.{PATH}", ".lora_A.two.weight", ".lora_B.two.weight")
    report = lorafmt.check(state)
    assert not report and [p["code"] for p in report.problems] == ["several-adapters"]


def test_check_of_an_adapter_sees_nan_in_bf16() -> None:
    state = {k: v.bfloat16() for k, v in pair(K).items()}
    state[f"{K}.lora_up.weight"][0, 0] = float("nan")
    assert not lorafmt.check(lorafmt.open(state))


def test_text_encoders_alone_prove_no_family() -> None:
    clip = "lora_te1_text_model_encoder_layers_0_mlp_fc1"
    state = {f"{clip}.lora_down.weight": torch.ones(2, 768), f"{clip}.lora_up.weight": torch.ones(3072, 2)}
    assert lorafmt.detect(state).family == "flux1"
    state["lora_unet_mystery_4_1_proj_in.alpha"] = torch.tensor(1.0)
    with pytest.raises(lorafmt.FormatError) as caught:
        lorafmt.open(state)
    assert caught.value.code == "unknown-family"


def test_a_bias_by_itself_survives_a_round_trip() -> None:
    state = {"diffusion_model.img_in.diff_b": torch.ones(3072), **pair("diffusion_model.double_blocks.0.img_attn.proj")}
    assert lorafmt.diff(lorafmt.convert(state, to="diffusers"), state, tolerance=0.0)


def test_a_trainers_note_is_not_the_scale(tmp_path: Path) -> None:
    source = tmp_path / "a.safetensors"
    save_file(pair(K), source, {"ss_network_alpha": "1", "ss_network_dim": "4"})
    with lorafmt.open(source) as adapter:
        assert adapter[PATH].scale == 1.0
        assert "alpha-metadata-unused" in {w.code for w in adapter.info.warnings}


def test_linear_factors_saved_as_convolutions_become_matrices() -> None:
    state = {k: v[:, :, None, None] for k, v in pair(K).items()}
    shapes = {tuple(t.shape) for t in lorafmt.convert(state, to="diffusers").to_torch().values()}
    assert shapes == {(4, 3072), (3072, 4)}


def test_hints_of_exceptions_speak_python(tmp_path: Path) -> None:
    (tmp_path / "o.safetensors").touch()
    with pytest.raises(lorafmt.OutputExistsError) as caught:
        lorafmt.convert(pair(K), tmp_path / "o.safetensors")
    assert "overwrite=True" in caught.value.hint and "--" not in caught.value.hint


def test_a_name_of_two_encoders_goes_by_its_shapes() -> None:
    """PEFT saves each model of a pipeline by itself: CLIP-L and CLIP-G then have the same names."""
    clip = "base_model.model.text_model.encoder.layers.0.mlp.fc1"
    unet = "base_model.model.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    state = {}
    for name, rows, columns in ((clip, 5120, 1280), (unet, 640, 640)):
        state |= {f"{name}.lora_A.weight": torch.ones(2, columns), f"{name}.lora_B.weight": torch.ones(rows, 2)}
    written = lorafmt.convert(state, to="kohya").to_torch()
    assert {key.split("_text_model_")[0] for key in written if "_text_model_" in key} == {"lora_te2"}
    assert sum(key.startswith("lora_te2") for key in written) == 3
