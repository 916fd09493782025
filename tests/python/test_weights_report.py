"""`inspect --weights` and the numbers of `diff` against dense decompositions in float64."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import lorafmt
from loras import dotted, lora, noise

TE = "text_model.encoder.layers.0.self_attn.q_proj"
RANKS = {"transformer_blocks.2.attn.to_q": 5, "single_transformer_blocks.1.attn.to_k": 3}


def sources(tmp_path: Path, name: str, seed: int, **options: object) -> Path:
    encoder = {
        f"text_encoder.{TE}.lora_A.weight": noise(2, 768, seed=seed),
        f"text_encoder.{TE}.lora_B.weight": (noise(768, 2, seed=seed)[0], "F16"),
    }
    path = tmp_path / f"{name}.safetensors"
    return lora(path, RANKS, dotted("transformer."), seed=seed, extra=encoder, **options)  # type: ignore[arg-type]


def dense(path: Path) -> dict[str, np.ndarray]:
    """Deltas from the file's own tensors, not by lorafmt's algebra."""
    from safetensors.torch import load_file

    tensors = {key: value.double().numpy() for key, value in load_file(path).items()}
    names = [key.removesuffix(".lora_A.weight") for key in tensors if key.endswith(".lora_A.weight")]
    return {n: tensors[f"{n}.lora_B.weight"] @ tensors[f"{n}.lora_A.weight"] for n in names}


def test_numbers_are_those_of_the_dense_decomposition(tmp_path: Path) -> None:
    path = sources(tmp_path, "a", 1)
    weights = lorafmt.inspect(path, weights=True).weights
    assert weights is not None
    deltas = dense(path)
    assert {m.module for m in weights.modules} == set(deltas)
    total = sum(np.sum(d**2) for d in deltas.values())
    assert weights.total.norm == pytest.approx(np.sqrt(total), rel=1e-9)
    by_rank: dict[int, float] = dict.fromkeys((1, 2, 4), 0.0)
    for module in weights.modules:
        rank = module.rank
        s = np.linalg.svd(deltas[module.module], compute_uv=False)[:rank]
        p = s**2 / np.sum(s**2)
        found = module.spectrum
        assert found is not None and module.status == "ok" and found.rank == rank
        assert module.norm == pytest.approx(np.linalg.norm(s), rel=1e-9)
        assert module.share == pytest.approx(np.sum(s**2) / total, rel=1e-9)
        assert found.spectral_norm == pytest.approx(s[0], rel=1e-9)
        assert found.stable_rank == pytest.approx(1 / p[0], rel=1e-9)
        assert found.effective_rank == pytest.approx(np.exp(-np.sum(p * np.log(p))), rel=1e-9)
        assert found.condition == pytest.approx(s[0] / s[-1], rel=1e-6)
        for k, kept in found.energy_by_rank.items():
            assert kept == pytest.approx(np.sum(p[:k]), rel=1e-9)
        for share, k in found.rank_for_energy.items():
            assert np.sum(p[:k]) >= share - 1e-9 and (k == 1 or np.sum(p[: k - 1]) < share)
        for k in by_rank:
            by_rank[k] += float(np.sum(s[:k] ** 2))
    for k, kept in weights.total.energy_by_rank.items():
        assert kept == pytest.approx(by_rank[k] / total, rel=1e-9)
    assert [c.component for c in weights.components] == ["transformer", "text_encoder"]
    assert [b.block for b in weights.blocks] == [
        "transformer_blocks.2",
        "single_transformer_blocks.1",
        "text_model.encoder.layers.0",
    ]


def test_nan_and_dead_modules_are_named(tmp_path: Path) -> None:
    bad = np.full((4, 3072), np.nan, np.float32)
    name = "transformer.transformer_blocks.0.attn.to_k"
    idle = "transformer.transformer_blocks.0.attn.to_v"
    extra = {
        f"{name}.lora_A.weight": (bad, "F32"),
        f"{name}.lora_B.weight": noise(3072, 4),
        f"{idle}.lora_A.weight": noise(4, 3072),
        f"{idle}.lora_B.weight": (np.zeros((3072, 4), np.float32), "F32"),
    }
    path = lora(tmp_path / "x.safetensors", RANKS, dotted("transformer."), extra=extra)
    info = lorafmt.inspect(path, weights=True)
    assert info.weights is not None
    assert (info.weights.not_finite, info.weights.dead) == ((name,), (idle,))
    assert [(w.code, w.module) for w in info.warnings if w.code == "not-finite"] == [("not-finite", name)]
    assert np.isfinite(info.weights.total.norm)
    assert lorafmt.open(path).weights() == info.weights
    assert lorafmt.inspect(path).weights is None


def test_differences_in_numbers(tmp_path: Path) -> None:
    a, b = sources(tmp_path, "a", 1), sources(tmp_path, "b", 2)
    x, y = dense(a), dense(b)
    report = lorafmt.diff(a, b, by="module")
    norms = [np.sqrt(sum(np.sum(d**2) for d in side.values())) for side in (x, y)]
    inner = sum(np.sum(x[n] * y[n]) for n in x)
    error = np.sqrt(sum(np.sum((x[n] - y[n]) ** 2) for n in x)) / max(norms)
    assert (report.norm_a, report.norm_b) == pytest.approx(norms, rel=1e-9)
    assert report.cosine == pytest.approx(inner / (norms[0] * norms[1]), abs=1e-9)
    assert report.relative_error == pytest.approx(error, rel=1e-9)
    for module in report.by_module:
        p, q = x[module.module], y[module.module]
        cosine = np.sum(p * q) / (np.linalg.norm(p) * np.linalg.norm(q))
        assert module.cosine == pytest.approx(cosine, abs=1e-9)
    same = lorafmt.diff(a, a)
    assert (same.equal, same.cosine, same.relative_error) == (True, pytest.approx(1.0), 0.0)
