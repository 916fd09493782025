"""The Python package as users meet it: inputs of every form, adapters as mappings, exceptions, light imports."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file as safetensors_load
from safetensors.torch import save_file as safetensors_save

import lorafmt
import oracle

QKV = "lora_unet_double_blocks_0_img_attn_qkv"
PATH = "transformer_blocks.0.attn.to_k"


def small(dtype: torch.dtype = torch.float32, alpha: float = 2.0) -> dict[str, torch.Tensor]:
    """A kohya file of three layers, one of which exists in FLUX.1 but not in Chroma."""
    generator = torch.Generator().manual_seed(5)
    shapes = {QKV: (9216, 3072), "lora_unet_single_blocks_1_linear2": (3072, 15360)}
    shapes["lora_unet_final_layer_adaLN_modulation_1"] = (6144, 3072)
    state = {}
    for name, (out, width) in shapes.items():
        state[f"{name}.lora_down.weight"] = torch.randn(4, width, generator=generator).mul(0.02).to(dtype)
        state[f"{name}.lora_up.weight"] = torch.randn(out, 4, generator=generator).mul(0.02).to(dtype)
        state[f"{name}.alpha"] = torch.tensor(alpha)
    return state


@pytest.fixture
def path(tmp_path: Path) -> Path:
    target = tmp_path / "lora.safetensors"
    safetensors_save(small(), target)
    return target


def test_every_form_of_input_gives_the_same(path: Path) -> None:
    state = safetensors_load(path)
    numpy_state = {k: v.numpy() for k, v in state.items()}
    sources = [path, str(path), path.read_bytes(), state, numpy_state, lorafmt.open(path)]
    results = [lorafmt.convert(source, to="diffusers").to_numpy() for source in sources]
    for result in results[1:]:
        assert list(result) == list(results[0])
        assert all(np.array_equal(result[k], results[0][k]) for k in result)


def test_dict_in_dict_out_keeps_the_framework() -> None:
    state = small(torch.bfloat16)
    converted = lorafmt.convert_state_dict(state, to="comfyui")
    assert all(isinstance(t, torch.Tensor) for t in converted.values())
    back = lorafmt.convert_state_dict(converted, to="kohya")
    assert back.keys() == state.keys()
    assert all(torch.equal(back[k], state[k]) and back[k].dtype == state[k].dtype for k in state)
    arrays = lorafmt.convert_state_dict({k: v.float().numpy() for k, v in state.items()}, to="comfyui")
    assert all(isinstance(t, np.ndarray) for t in arrays.values())


def test_a_converted_adapter_is_what_it_says(path: Path) -> None:
    """Strength and element type are in the result, whatever is done with it next."""
    half = lorafmt.convert(path, to="kohya", strength=0.5)
    assert (half.dialect, half[PATH].scale) == ("kohya", 0.25)
    assert not lorafmt.diff(half, path)
    again = lorafmt.convert(half, to="diffusers", dtype="bf16")
    expected = 0.5 * lorafmt.open(path)[PATH].delta(dtype="float64")
    error = np.linalg.norm(again[PATH].delta(dtype="float64") - expected) / np.linalg.norm(expected)
    assert 0 < error < 2**-8
    assert half.report is not None and half.report.fidelity == "rescaled"
    assert lorafmt.open(path).report is None


@pytest.mark.parametrize("strength", [0.0, 1e-300])
@pytest.mark.parametrize("to", ["kohya", "diffusers", "comfyui"])
def test_no_strength_leaves_no_delta(path: Path, to: str, strength: float) -> None:
    """An alpha of zero would be read as "not set"."""
    assert np.abs(lorafmt.convert(path, to=to, strength=strength)[PATH].delta()).max() == 0.0


def test_strided_tensors_are_read_right() -> None:
    state = small()
    strided = {k: v.t().contiguous().t() if v.ndim == 2 else v for k, v in state.items()}
    assert not strided[f"{QKV}.lora_down.weight"].is_contiguous()
    assert lorafmt.diff(state, strided, tolerance=0.0)


def test_an_adapter_is_a_mapping_of_modules(path: Path) -> None:
    with lorafmt.open(path) as adapter:
        assert (adapter.family, adapter.dialect, adapter.kind, adapter.rank) == ("flux1", "kohya", "lora", 4)
        assert len(adapter) == len(list(adapter)) == len(adapter.modules) == 5
        assert PATH in adapter and "transformer_blocks.7.attn.to_k" not in adapter
        module = adapter[PATH]
        assert adapter[f"transformer.{PATH}"].name == module.name == f"transformer.{PATH}"
        assert (module.kind, module.rank, module.scale, module.alpha) == ("lora", 4, 0.5, 2.0)
        assert module.shape == (3072, 3072)
        with pytest.raises(KeyError):
            adapter["nonsense"]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_delta_against_the_formula(path: Path, dtype: str) -> None:
    state = safetensors_load(path)
    up = state[f"{QKV}.lora_up.weight"][3072:6144].double().numpy()
    expected = 0.8 * 0.5 * (up @ state[f"{QKV}.lora_down.weight"].double().numpy())
    delta = lorafmt.open(path)[PATH].delta(strength=0.8, dtype=dtype)
    assert delta.dtype == dtype
    assert np.abs(delta - expected).max() <= np.abs(expected).max() * (1e-7 if dtype == "float32" else 1e-14)


def test_the_final_modulation_swaps_output_halves_only(path: Path) -> None:
    state = safetensors_load(path)
    name = "lora_unet_final_layer_adaLN_modulation_1"
    out = lorafmt.convert_state_dict({k: v for k, v in state.items() if "alpha" not in k}, to="diffusers")
    up, swapped = state[f"{name}.lora_up.weight"], out["transformer.norm_out.linear.lora_B.weight"]
    assert torch.equal(swapped[:3072], up[3072:]) and torch.equal(swapped[3072:], up[:3072])
    assert torch.equal(out["transformer.norm_out.linear.lora_A.weight"], state[f"{name}.lora_down.weight"])


def test_save_and_state_dict_of_any_dialect(path: Path, tmp_path: Path) -> None:
    adapter = lorafmt.open(path)
    report = adapter.save(tmp_path / "c.safetensors", dialect="comfyui")
    assert (report.dialect_to, report.fidelity, report.tensors.used) == ("comfyui", "exact", 9)
    assert safetensors_load(tmp_path / "c.safetensors").keys() == adapter.state_dict("comfyui").keys()
    assert adapter.state_dict(framework="numpy").keys() == safetensors_load(path).keys()
    assert adapter.save(tmp_path / "same.safetensors").dialect_to == "kohya"


def test_torch_twins_of_safetensors(path: Path, tmp_path: Path) -> None:
    plain = lorafmt.torch.load_file(path)
    theirs = safetensors_load(path)
    assert plain.keys() == theirs.keys() and all(torch.equal(plain[k], theirs[k]) for k in theirs)
    shared = torch.ones(2, 3)
    lorafmt.torch.save_file({"a": shared, "b": shared}, tmp_path / "s.safetensors", {"who": "me"})
    assert torch.equal(safetensors_load(tmp_path / "s.safetensors")["b"], shared)
    lorafmt.torch.save_file(theirs, tmp_path / "d.safetensors", dialect="diffusers")
    loaded = lorafmt.torch.load_file(path, dialect="diffusers")
    assert loaded.keys() == safetensors_load(tmp_path / "d.safetensors").keys()
    assert "transformer.norm_out.linear.lora_B.weight" in loaded


def test_bf16_without_a_numpy_type_comes_as_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    state = small(torch.bfloat16)
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    arrays = lorafmt.convert(state, to="kohya").to_numpy()
    key = f"{QKV}.lora_up.weight"
    assert arrays[key].dtype == np.uint16
    assert np.array_equal(arrays[key], state[key].view(torch.uint16).numpy())


def test_the_report_accounts_for_every_tensor(path: Path, tmp_path: Path) -> None:
    progress: list[tuple[int, int]] = []
    target = tmp_path / "o.safetensors"
    report = lorafmt.convert(path, target, to="diffusers", progress=lambda done, total: progress.append((done, total)))
    count = report.tensors
    assert count.used + count.carried + count.dropped + count.unknown == count.total == 9
    document = report.to_dict()
    assert document["schema"] == 1 and document["tensors"]["in"] == report["tensors"]["in"] == 9
    assert len(document["source"]["sha256"]) == 64
    assert document["target"]["bytes"] == target.stat().st_size
    assert progress and progress[-1][1] >= progress[-1][0] > 0
    assert pickle.loads(pickle.dumps(report)) == report
    assert json.loads(json.dumps(document)) == document


@pytest.mark.parametrize(
    ("call", "builtin", "code"),
    [
        (lambda p: lorafmt.convert(p.parent / "absent.safetensors"), FileNotFoundError, "not-found"),
        (lambda p: lorafmt.convert(p, p, overwrite=True), ValueError, "same-file"),
        (lambda p: lorafmt.convert(p, p.parent / "there.safetensors"), FileExistsError, "output-exists"),
        (lambda p: lorafmt.convert(p.parent), ValueError, "is-a-directory"),
        (lambda p: lorafmt.convert(p, to="nonsense"), ValueError, "invalid-argument"),
        (lambda p: lorafmt.convert(p, dtype="int3"), ValueError, "invalid-argument"),
        (lambda p: lorafmt.convert(p, strength=float("nan")), ValueError, "invalid-argument"),
        (lambda p: lorafmt.convert(p, strength="0.5"), ValueError, "invalid-argument"),
        (lambda p: lorafmt.convert(p, lossy=True), ValueError, "invalid-argument"),
        (lambda p: lorafmt.convert(p, to=None), ValueError, "invalid-argument"),
        (lambda p: lorafmt.convert(p, dtype=torch.bfloat16), ValueError, "invalid-argument"),
        (lambda p: lorafmt.convert(p, to="xlabs"), NotImplementedError, "unsupported-module"),
        (lambda p: lorafmt.convert(p, family="chroma", unknown="error"), ValueError, "unknown-key"),
        (lambda p: lorafmt.convert(b"PK\x03\x04 and so on"), ValueError, "pickle-file"),
        (lambda p: lorafmt.convert(p.read_bytes()[:-1]), ValueError, "truncated"),
        (lambda p: lorafmt.convert({}), ValueError, "no-modules"),
        (lambda p: lorafmt.convert(object()), ValueError, "invalid-argument"),
    ],
)
def test_errors_are_also_the_builtin_one_would_catch(path: Path, call, builtin: type, code: str) -> None:
    (path.parent / "there.safetensors").write_bytes(b"precious")
    before = sorted(os.listdir(path.parent))
    with pytest.raises(lorafmt.LorafmtError) as caught:
        call(path)
    assert isinstance(caught.value, builtin)
    assert caught.value.code == code
    assert caught.value.hint
    assert sorted(os.listdir(path.parent)) == before
    assert (path.parent / "there.safetensors").read_bytes() == b"precious"


def test_check_finds_what_is_wrong() -> None:
    state = small()
    assert lorafmt.check(state)
    state[f"{QKV}.lora_up.weight"][0, 0] = float("nan")
    del state["lora_unet_single_blocks_1_linear2.lora_up.weight"]
    state["lora_unet_double_blocks_0_img_attn_qkw.alpha"] = torch.tensor(1.0)
    report = lorafmt.check(state)
    assert not report
    assert {p["code"] for p in report.problems} == {"not-finite", "unpaired-module", "unknown-key"}


def test_diff_sees_a_small_change() -> None:
    state = small()
    other = {k: v.clone() for k, v in state.items()}
    assert lorafmt.diff(state, other, tolerance=0.0)
    other[f"{QKV}.lora_up.weight"][0, 0] += 1e-3
    report = lorafmt.diff(state, other)
    assert not report and [m.module for m in report.differences] == ["transformer.transformer_blocks.0.attn.to_q"]
    up = {k: state[f"{QKV}.lora_{k}.weight"].double().numpy() for k in ("up", "down")}
    exact = 1e-3 * np.linalg.norm(up["down"][0]) / np.linalg.norm(up["up"][:3072] @ up["down"])
    assert report.max_relative_error == pytest.approx(exact, rel=1e-3)


def test_a_table_can_be_registered(tmp_path: Path) -> None:
    """In a process of its own, since a table stays for the rest of it."""
    program = """
import sys, lorafmt
lorafmt.register_table('''
name = "acme"
title = "Acme"
write = true
alpha = "folded"
[spelling]
down = "::d"
up = "::u"
[[place]]
families = ["flux1"]
component = "transformer"
namespace = "original"
prefix = "acme/"
''')
out = lorafmt.convert(sys.argv[1], to="acme").to_numpy()
assert "acme/double_blocks.0.img_attn.qkv::u" in out, list(out)
assert lorafmt.detect(out).dialect == "acme"
assert lorafmt.diff(out, sys.argv[1])
"""
    source = tmp_path / "lora.safetensors"
    safetensors_save(small(), source)
    subprocess.run([sys.executable, "-c", program, source], check=True)


def test_import_is_light() -> None:
    program = "import sys, lorafmt; print([m for m in ('torch', 'numpy', 'json', 'dataclasses') if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", program], text=True).strip() == "[]"


def test_ctrl_c_leaves_nothing_behind(tmp_path: Path) -> None:
    rank = 64
    state = {}
    for block in range(19):
        name = f"lora_unet_double_blocks_{block}_img_mod_lin"
        state[f"{name}.lora_down.weight"] = torch.zeros(rank, 3072)
        state[f"{name}.lora_up.weight"] = torch.zeros(18432, rank)
    source = tmp_path / "big.safetensors"
    safetensors_save(state, source)
    target = tmp_path / "out.safetensors"
    # A process started in the background ignores the signal; this one shall hear it.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Timer(0.05, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
    try:
        with pytest.raises(KeyboardInterrupt):
            for _ in range(1000):
                lorafmt.convert(source, target, to="diffusers", overwrite=True)
    finally:
        signal.signal(signal.SIGINT, before)
    assert not [name for name in os.listdir(tmp_path) if name.endswith(".tmp")]


def test_module_entry_point_is_the_command_line(path: Path) -> None:
    command = [sys.executable, "-m", "lorafmt", "detect", path, "--json"]
    document = json.loads(subprocess.check_output(command))
    assert document["schema"] == 1 and document["dialect"] == "kohya"
    failed = subprocess.run([sys.executable, "-m", "lorafmt", "inspect", "absent"], capture_output=True, check=False)
    assert failed.returncode == 2


def test_fp8_decodes_to_bf16_exactly(tmp_path: Path) -> None:
    source = tmp_path / "fp8.safetensors"
    listing = oracle.fixture("flux_bare_diffusers_single")
    oracle.make_file(listing, source, dtype="F8_E4M3", seed=2)
    out = lorafmt.convert(source, to="diffusers").to_torch()
    assert {t.dtype for t in out.values()} == {torch.bfloat16}
    raw = lorafmt.torch.load_file(source)
    assert all(torch.equal(out[f"transformer.{k}"].float(), raw[k].float()) for k in raw)


def test_unknown_keys_are_kept_or_dropped_on_request(tmp_path: Path) -> None:
    state = small()
    state["mystery.tensor"] = torch.ones(3)
    with pytest.raises(lorafmt.FormatError) as caught:
        lorafmt.convert(state)
    assert caught.value.key == "mystery.tensor"
    kept = lorafmt.convert(state, unknown="keep")
    assert kept.report.tensors.carried == 1 and "mystery.tensor" in kept.to_numpy()
    dropped = lorafmt.convert(state, unknown="drop")
    assert dropped.report.tensors.dropped == 1 and "mystery.tensor" not in dropped.to_numpy()


def test_metadata_travels_less_what_became_untrue(tmp_path: Path) -> None:
    source, target = tmp_path / "m.safetensors", tmp_path / "o.safetensors"
    metadata = {"ss_tag_frequency": "{}", "sshs_model_hash": "00", "ss_network_alpha": "2"}
    safetensors_save(small(), source, metadata)
    lorafmt.convert(source, target, to="diffusers")
    assert lorafmt.open(target).metadata == {"ss_tag_frequency": "{}", "format": "pt"}


def test_an_alpha_in_metadata_counts_once(tmp_path: Path) -> None:
    """Folding must take the entry away, or the next reader would apply it again."""
    source, target = tmp_path / "m.safetensors", tmp_path / "o.safetensors"
    state = {k: v for k, v in small().items() if not k.endswith("alpha")}
    safetensors_save(state, source, {"lora_alpha": "2"})
    report = lorafmt.convert(source, target, to="diffusers")
    assert report.to_dict()["alpha"] == {"tensor": 0, "metadata": 5, "config": 0, "rank": 0}
    assert lorafmt.diff(source, target, tolerance=1e-6)
    assert lorafmt.open(target)[PATH].scale == 1.0
