"""Fusing, unfusing and extracting, against numpy in float64. Nothing here shares code with lorafmt."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import lorafmt
from tensorfile import TensorFile, save

RNG = np.random.default_rng(7)


def rounded(values: np.ndarray, dtype: str) -> np.ndarray:
    """Float64 to the nearest number of the type, ties to even, in one step."""
    if dtype == "F32":
        return values.astype(np.float32).astype(np.float64)
    if dtype == "F16":
        return values.astype(np.float16).astype(np.float64)
    bits = {"BF16": 8}[dtype]
    mantissa, exponent = np.frexp(values)
    return np.ldexp(np.rint(np.ldexp(mantissa, bits)), exponent - bits)


def weight(rows: int, cols: int, dtype: str, size: float = 0.02) -> np.ndarray:
    return rounded(RNG.normal(0, size, (rows, cols)), dtype)


def factors(rows: int, cols: int, rank: int, dtype: str = "BF16") -> tuple[np.ndarray, np.ndarray]:
    return weight(rows, rank, dtype, 0.05), weight(rank, cols, dtype, 0.05)


def base_of(path: Path, tensors: dict[str, tuple[np.ndarray, str]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save(path, tensors)
    return path


def kohya(name: str, up: np.ndarray, down: np.ndarray, alpha: float) -> dict[str, tuple[np.ndarray, str]]:
    key = f"lora_unet_{name}"
    return {
        f"{key}.lora_up.weight": (up, "BF16"),
        f"{key}.lora_down.weight": (down, "BF16"),
        f"{key}.alpha": (np.array(alpha), "F32"),
    }


def diffusers(name: str, up: np.ndarray, down: np.ndarray) -> dict[str, tuple[np.ndarray, str]]:
    return {f"transformer.{name}.lora_B.weight": (up, "BF16"), f"transformer.{name}.lora_A.weight": (down, "BF16")}


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_several_adapters_are_rounded_once(tmp_path: Path, dtype: str) -> None:
    """A fused base with a fused and a split adapter: bit for bit the float64 sum, rounded.

    The strengths have few bits, so that float64 holds the sums of 16-bit numbers however they are ordered: with others
    a sum can lie so near to the middle of two numbers that the order of adding decides.
    """
    qkv, linear2 = weight(9216, 3072, dtype), weight(3072, 15360, dtype)
    ada = weight(6144, 3072, dtype)
    prefix = "model.diffusion_model."
    base = base_of(
        tmp_path / "base.safetensors",
        {
            prefix + "double_blocks.0.img_attn.qkv.weight": (qkv, dtype),
            prefix + "single_blocks.37.linear2.weight": (linear2, dtype),
            prefix + "final_layer.adaLN_modulation.1.weight": (ada, dtype),
            prefix + "double_blocks.0.img_attn.qkv.bias": (weight(1, 9216, dtype)[0], dtype),
        },
    )
    up, down = factors(9216, 3072, 8)
    k_up, k_down = factors(3072, 3072, 4)
    l_up, l_down = factors(3072, 15360, 4)
    a_up, a_down = factors(6144, 3072, 2)
    save(tmp_path / "a.safetensors", kohya("double_blocks_0_img_attn_qkv", up, down, 3.0))
    save(
        tmp_path / "b.safetensors",
        {
            **diffusers("transformer_blocks.0.attn.to_k", k_up, k_down),
            **diffusers("single_transformer_blocks.37.proj_out", l_up, l_down),
            **diffusers("norm_out.linear", a_up, a_down),
        },
    )
    out, undo = tmp_path / "out.safetensors", tmp_path / "undo.safetensors"
    report = lorafmt.fuse(
        base, [(tmp_path / "a.safetensors", 0.75), (tmp_path / "b.safetensors", -1.25)], out, undo=undo
    )
    want = qkv + (0.75 * 3.0 / 8) * (up @ down)
    want[3072:6144] += -1.25 * (k_up @ k_down)
    got = TensorFile(out)
    assert np.array_equal(got[prefix + "double_blocks.0.img_attn.qkv.weight"], rounded(want, dtype))
    want = linear2 - 1.25 * (l_up @ l_down)
    assert np.array_equal(got[prefix + "single_blocks.37.linear2.weight"], rounded(want, dtype))
    # diffusers: (scale, shift); the original: (shift, scale).
    exchanged = np.concatenate([a_up[3072:], a_up[:3072]])
    want = ada - 1.25 * (exchanged @ a_down)
    assert np.array_equal(got[prefix + "final_layer.adaLN_modulation.1.weight"], rounded(want, dtype))
    assert len(report.fused) == 3
    assert report.tensors.used == report.tensors.total == 9
    stored = rounded(want, dtype) - ada
    delta = want - ada
    found = next(t for t in report.fused if "adaLN" in t.key)
    # The rounded values are exact; what is measured of them is summed in float32 by rows where the base is bfloat16.
    assert found.gain == pytest.approx((stored * delta).sum() / (delta * delta).sum(), rel=1e-8)
    assert found.err == pytest.approx(np.linalg.norm(stored - delta) / np.linalg.norm(delta), rel=1e-7, abs=1e-12)
    lorafmt.unfuse(out, tmp_path / "back.safetensors", undo=undo)
    assert (tmp_path / "back.safetensors").read_bytes() == base.read_bytes()


def test_a_split_base_takes_a_fused_adapter(tmp_path: Path) -> None:
    """diffusers' shards with an adapter over linear1: rows of q, k, v and the MLP."""
    names = ["attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"]
    rows = [3072, 3072, 3072, 12288]
    weights = {
        f"single_transformer_blocks.2.{n}.weight": weight(r, 3072, "BF16") for n, r in zip(names, rows, strict=True)
    }
    folder = tmp_path / "model" / "transformer"
    base_of(folder / "m-00001-of-00002.safetensors", {k: (w, "BF16") for k, w in list(weights.items())[:2]})
    base_of(folder / "m-00002-of-00002.safetensors", {k: (w, "BF16") for k, w in list(weights.items())[2:]})
    files = ["m-00001-of-00002.safetensors"] * 2 + ["m-00002-of-00002.safetensors"] * 2
    (folder / "m.safetensors.index.json").write_text(json.dumps({"weight_map": dict(zip(weights, files, strict=True))}))
    up, down = factors(21504, 3072, 4)
    save(tmp_path / "a.safetensors", kohya("single_blocks_2_linear1", up, down, 4.0))
    lorafmt.fuse(tmp_path / "model", [tmp_path / "a.safetensors"], tmp_path / "out")
    start = 0
    for (key, w), file, count in zip(weights.items(), files, rows, strict=True):
        got = TensorFile(tmp_path / "out" / "transformer" / file)[key]
        assert np.array_equal(got, rounded(w + up[start : start + count] @ down, "BF16")), key
        start += count


def test_any_strength_is_rounded_once(tmp_path: Path) -> None:
    """Only where the float64 sum lies in the middle of two numbers, to its own rounding, may the other one be taken."""
    w = weight(3072, 3072, "BF16")
    base = base_of(tmp_path / "base.safetensors", {"double_blocks.1.img_attn.proj.weight": (w, "BF16")})
    pairs = [factors(3072, 3072, 4), factors(3072, 3072, 6)]
    for i, (up, down) in enumerate(pairs):
        save(tmp_path / f"{i}.safetensors", kohya("double_blocks_1_img_attn_proj", up, down, 2.0))
    lorafmt.fuse(
        base, [(tmp_path / "0.safetensors", 0.7), (tmp_path / "1.safetensors", -1.1)], tmp_path / "out.safetensors"
    )
    want = w + 0.7 * 0.5 * (pairs[0][0] @ pairs[0][1]) - 1.1 * 2 / 6 * (pairs[1][0] @ pairs[1][1])
    got = TensorFile(tmp_path / "out.safetensors")["double_blocks.1.img_attn.proj.weight"].astype(np.float64)
    low, high = rounded(want * (1 - 1e-9), "BF16"), rounded(want * (1 + 1e-9), "BF16")
    assert np.all((got == low) | (got == high) | (np.abs(want) < 1e-7))
    # The reference goes through float32, which makes a few ties of its own.
    assert (got != rounded(want, "BF16")).mean() < 3e-6


def fp8_codes(dtype: str) -> np.ndarray:
    from tensorfile import fp8_values

    return fp8_values(dtype)


def to_fp8(values: np.ndarray) -> np.ndarray:
    """The nearest E4M3 number, ties to even; saturated."""
    table = fp8_codes("F8_E4M3")[:127]
    size = np.minimum(np.abs(values), 448.0)
    at = np.clip(np.searchsorted(table, size), 1, 126)
    low, high = table[at - 1], table[at]
    up = (size - low > high - size) | ((size - low == high - size) & (at % 2 == 0))
    return np.where(up, high, low) * np.sign(values)


@pytest.mark.parametrize("rescale", [False, True])
def test_scaled_fp8(tmp_path: Path, rescale: bool) -> None:
    codes = to_fp8(RNG.normal(0, 100, (3072, 3072)))
    scale = 2.5e-4
    key = "double_blocks.1.img_attn.proj"
    scale = float(np.float32(scale))
    base = base_of(
        tmp_path / "base.safetensors",
        {
            f"{key}.weight": (codes, "F8_E4M3"),
            f"{key}.scale_weight": (np.array([scale]), "F32"),
            "scaled_fp8": (np.zeros(2), "F8_E4M3"),
        },
    )
    up, down = factors(3072, 3072, 8)
    save(tmp_path / "a.safetensors", kohya("double_blocks_1_img_attn_proj", up, down, 8.0))
    out, undo = tmp_path / "out.safetensors", tmp_path / "undo.safetensors"
    report = lorafmt.fuse(base, [tmp_path / "a.safetensors"], out, rescale=rescale, undo=undo)
    want = codes * scale + up @ down
    got = TensorFile(out)
    used = float(got[f"{key}.scale_weight"][0])
    if rescale:
        assert used == pytest.approx(np.abs(want).max() / 448, rel=1e-6)
    else:
        assert used == scale
    same = got[f"{key}.weight"] == to_fp8(want / used)
    assert same.mean() > 1 - 1e-6
    stored = got[f"{key}.weight"] * used - codes * scale
    delta = up @ down
    assert report.fused[0].gain == pytest.approx((stored * delta).sum() / (delta**2).sum(), rel=1e-6)
    lorafmt.unfuse(out, tmp_path / "back.safetensors", undo=undo)
    assert (tmp_path / "back.safetensors").read_bytes() == base.read_bytes()


def test_small_changes_of_coarse_weights_are_told_and_chance_keeps_them(tmp_path: Path) -> None:
    codes = to_fp8(RNG.normal(0, 0.02, (3072, 3072)))
    base = base_of(tmp_path / "base.safetensors", {"double_blocks.1.img_attn.proj.weight": (codes, "F8_E4M3")})
    up, down = factors(3072, 3072, 8)
    save(tmp_path / "a.safetensors", kohya("double_blocks_1_img_attn_proj", 0.01 * up, down, 8.0))
    nearest = lorafmt.fuse(base, [tmp_path / "a.safetensors"], tmp_path / "n.safetensors")
    assert nearest.gain is not None and nearest.gain < 0.5
    assert "weak-fuse" in {w.code for w in nearest.warnings}
    files = [tmp_path / f"{i}.safetensors" for i in range(3)]
    reports = [
        lorafmt.fuse(base, [tmp_path / "a.safetensors"], f, stochastic=s) for f, s in zip(files, [1, 1, 2], strict=True)
    ]
    assert abs(reports[0].gain - 1) < 0.2
    assert files[0].read_bytes() == files[1].read_bytes() != files[2].read_bytes()


def test_dora_by_its_definition(tmp_path: Path) -> None:
    w = weight(3072, 3072, "F32")
    up, down = factors(3072, 3072, 4, "F32")
    magnitude = rounded(RNG.uniform(0.5, 1.5, 3072), "F32")
    key = "transformer.transformer_blocks.3.attn.to_out.0"
    base = base_of(tmp_path / "base.safetensors", {"transformer_blocks.3.attn.to_out.0.weight": (w, "F32")})
    save(
        tmp_path / "a.safetensors",
        {
            f"{key}.lora_B.weight": (up, "F32"),
            f"{key}.lora_A.weight": (down, "F32"),
            f"{key}.lora_magnitude_vector": (magnitude, "F32"),
        },
    )
    lorafmt.fuse(base, [(tmp_path / "a.safetensors", 0.5)], tmp_path / "out.safetensors")
    v = w + up @ down
    full = magnitude[:, None] * v / np.linalg.norm(v, axis=1, keepdims=True)
    want = w + 0.5 * (full - w)
    got = TensorFile(tmp_path / "out.safetensors")["transformer_blocks.3.attn.to_out.0.weight"]
    assert np.abs(got - want).max() < 1e-7


def test_extract_is_as_good_as_a_dense_decomposition(tmp_path: Path) -> None:
    """Differently named and sharded checkpoints; ranks of the whole fused module."""
    rows, cols = 9216, 3072
    base, decay = weight(rows, cols, "F32"), (1.0 + np.arange(40)) ** -0.7
    delta = (RNG.normal(size=(rows, 40)) * decay) @ RNG.normal(size=(40, cols)) * 1e-4
    tuned = rounded(base + delta, "F32")
    base_of(tmp_path / "base.safetensors", {"double_blocks.0.img_attn.qkv.weight": (base, "F32")})
    parts = {
        f"transformer_blocks.0.attn.to_{n}.weight": (tuned[i * 3072 : (i + 1) * 3072], "F32")
        for i, n in enumerate("qkv")
    }
    base_of(tmp_path / "tuned.safetensors", parts)
    paths = (tmp_path / "tuned.safetensors", tmp_path / "base.safetensors", tmp_path / "lora.safetensors")
    report = lorafmt.extract(*paths, to="kohya", rank=8, family="flux1")
    change = tuned.astype(np.float64) - base
    left, _ = np.linalg.qr(change @ (change.T @ (change @ RNG.normal(size=(cols, 60)))))
    singular = np.linalg.svd(left.T @ change, compute_uv=False)
    best = np.sqrt(max((change**2).sum() - (singular[:8] ** 2).sum(), 0) / (change**2).sum())
    found = report.to_dict()["extract"]["modules"]
    assert [m["rank"] for m in found] == [8]
    assert found[0]["relative_error"] == pytest.approx(best, rel=1e-4)
    got = TensorFile(paths[2])
    key = "lora_unet_double_blocks_0_img_attn_qkv"
    scale = float(got[f"{key}.alpha"]) / 8 if f"{key}.alpha" in got.header else 1.0
    made = scale * got[f"{key}.lora_up.weight"].astype(np.float64) @ got[f"{key}.lora_down.weight"]
    assert np.linalg.norm(made - change) / np.linalg.norm(change) == pytest.approx(best, rel=1e-4)
    by_energy = lorafmt.extract(*paths[:2], to="kohya", energy=0.9, family="flux1").report
    kept = np.cumsum(singular**2) / (change**2).sum()
    assert [m["rank"] for m in by_energy["extract"]["modules"]] == [int(np.argmax(kept >= 0.9)) + 1]


def test_errors(tmp_path: Path) -> None:
    w = weight(3072, 3072, "BF16")
    base = base_of(tmp_path / "base.safetensors", {"double_blocks.1.img_attn.proj.weight": (w, "BF16")})
    up, down = factors(3072, 3072, 2)
    save(tmp_path / "a.safetensors", kohya("double_blocks_2_img_attn_proj", up, down, 8.0))
    with pytest.raises(lorafmt.UnsupportedError, match=r"transformer_blocks\.2") as raised:
        lorafmt.fuse(base, [tmp_path / "a.safetensors"], tmp_path / "out.safetensors")
    assert raised.value.code == "missing-weight" and raised.value.key
    with pytest.raises(lorafmt.LorafmtError) as raised:
        lorafmt.extract(base, base, tmp_path / "out.safetensors", rank=4, family="flux1")
    assert raised.value.code == "no-modules"
    with pytest.raises(lorafmt.FormatError):
        lorafmt.fuse(tmp_path / "a.safetensors", [tmp_path / "a.safetensors"], tmp_path / "out.safetensors")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.safetensors", "base.safetensors"]
