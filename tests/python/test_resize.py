"""Other ranks: errors against singular values that numpy finds, deltas that must not change, bytes that must not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lorafmt
import oracle
from loras import DIFFUSERS, MODULES, QKV, flat, kohya, lora, noise
from oracle import relative_error
from tensorfile import TensorFile, save

# Both have a short side of 64, so a dense decomposition takes no time.
SMALL = {"x_embedder": 12, "proj_out": 12}
EMBED, OUT = (f"transformer.{name}" for name in SMALL)


def dense(delta: oracle.Delta) -> np.ndarray:
    return oracle.sum_rows(delta.terms, 0, delta.terms[0].shape[0])


def singular_values(delta: oracle.Delta) -> np.ndarray:
    return np.linalg.svd(dense(delta), compute_uv=False)


def fading(path: Path, ranks: dict[str, int] = SMALL, **options: Any) -> Path:
    """Singular values that fall over two decades, as those of trained adapters do."""
    lora(path, ranks, dtype="F32", **options)
    tensors = {}
    for key, entry in TensorFile(path).header.items():
        values = TensorFile(path)[key].astype(np.float32)
        if key.endswith("lora_B.weight"):
            values = values * np.logspace(0, -2, values.shape[1], dtype=np.float32)
        tensors[key] = values, entry.dtype
    save(path, tensors)
    return path


def resized(report: lorafmt.Report) -> dict[str, dict[str, Any]]:
    return {module["module"]: module for module in report["resize"]["modules"]}


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_the_error_is_the_least_there_can_be(tmp_path: Path, rank: int) -> None:
    source = fading(tmp_path / "a.safetensors")
    report = lorafmt.resize(source, tmp_path / "b.safetensors", rank=rank)
    before, after = oracle.reference(source), oracle.reference(tmp_path / "b.safetensors")
    squares = []
    for module, told in resized(report).items():
        s = singular_values(before[module])
        least = float(np.sqrt((s[rank:] ** 2).sum() / (s**2).sum()))
        assert relative_error(before[module], after[module]) == pytest.approx(least, rel=1e-4)
        assert told["relative_error"] == pytest.approx(least, rel=1e-6)
        assert told["energy"] == pytest.approx(1 - least**2, rel=1e-6)
        assert told["norm"] == pytest.approx(float(np.linalg.norm(s)), rel=1e-6)
        assert (told["rank_before"], told["rank_after"]) == (12, rank)
        squares.append(((s[rank:] ** 2).sum(), (s**2).sum()))
    total = np.sqrt(sum(e for e, _ in squares) / sum(n for _, n in squares))
    assert report["resize"]["relative_error"] == pytest.approx(float(total), rel=1e-6)
    assert report.fidelity == "approximate"


def wanted_rank(s: np.ndarray, criterion: str, number: float) -> int:
    """The smallest rank that fulfils the criterion, by its definition."""
    squares, ranks = s**2, range(1, len(s) + 1)
    fulfilled = {
        "energy": lambda k: squares[:k].sum() >= number * squares.sum(),
        "max_error": lambda k: np.sqrt(squares[k:].sum() / squares.sum()) <= number,
        "sv_fro": lambda k: np.sqrt(squares[:k].sum() / squares.sum()) >= number,
        "sv_cumulative": lambda k: s[:k].sum() >= number * s.sum(),
        "sv_ratio": lambda k: k == len(s) or not s[k] > s[0] / number,
    }[criterion]
    return next(k for k in ranks if fulfilled(k))


@pytest.mark.parametrize(
    ("criterion", "number"),
    [
        ("energy", 0.9),
        ("energy", 0.999),
        ("max_error", 0.2),
        ("max_error", 0.01),
        ("sv_fro", 0.95),
        ("sv_cumulative", 0.8),
        ("sv_ratio", 10.0),
        ("sv_ratio", 50.0),
    ],
)
def test_criteria_give_the_smallest_rank(tmp_path: Path, criterion: str, number: float) -> None:
    source = fading(tmp_path / "a.safetensors")
    report = lorafmt.resize(source, tmp_path / "b.safetensors", **{criterion: number})
    for module, told in resized(report).items():
        s = singular_values(oracle.reference(source)[module])[:12]
        assert told["rank_after"] == wanted_rank(s, criterion, number), module
    codes = {w.code for w in report.warnings}
    assert ("smallest-rank" in codes) == criterion.startswith("sv_")


def test_a_limit_beside_a_criterion(tmp_path: Path) -> None:
    source = fading(tmp_path / "a.safetensors")
    report = lorafmt.resize(source, tmp_path / "b.safetensors", energy=0.9999, rank=3)
    assert {m["rank_after"] for m in resized(report).values()} == {3}


@pytest.mark.parametrize("alpha", [None, 1.0, 6.0, 48.0])
def test_the_strength_stays(tmp_path: Path, alpha: float | None) -> None:
    """A rank that keeps everything keeps the delta, whatever alpha and rank were, in every dialect."""
    source = lora(tmp_path / "a.safetensors", MODULES, dtype="F32", alpha=alpha)
    twice = lorafmt.compose([(source, 0.5), (source, 0.5)], tmp_path / "twice.safetensors", to="kohya")
    assert twice.modules > 0
    for to in ("kohya", "diffusers", "peft", "comfyui"):
        target = tmp_path / f"{to}.safetensors"
        lorafmt.resize(tmp_path / "twice.safetensors", target, energy=1.0, to=to)
        comparison = oracle.compare(oracle.reference(source), oracle.reference(target), 1e-5)
        assert comparison, f"{to}: {comparison}"


def test_fused_modules_keep_one_down(tmp_path: Path) -> None:
    """A fused layer of rank 8 resized to 4 has rank 4, not 4 for each of its parts."""
    source = kohya(tmp_path / "a.safetensors", {"double_blocks.0.img_attn.qkv": 8}, dtype="F32")
    report = lorafmt.resize(source, tmp_path / "b.safetensors", rank=4)
    shapes = {k: e.shape for k, e in TensorFile(tmp_path / "b.safetensors").header.items()}
    name = "lora_unet_double_blocks_0_img_attn_qkv"
    assert shapes == {f"{name}.lora_down.weight": (4, 3072), f"{name}.lora_up.weight": (9216, 4), f"{name}.alpha": ()}
    # alpha / rank is what it was.
    assert float(TensorFile(tmp_path / "b.safetensors")[f"{name}.alpha"]) == pytest.approx(0.5)
    parts = [oracle.reference(source)[f"transformer.{q}"] for q in QKV]
    whole = np.concatenate([dense(p) for p in parts])
    left, right = (np.linalg.qr(x, mode="r") for x in (parts_up(source, name), parts_down(source, name).T))
    s = np.linalg.svd(left @ right.T, compute_uv=False) / 8
    assert np.linalg.norm(s) == pytest.approx(np.linalg.norm(whole), rel=1e-6)
    least = np.sqrt((s[4:] ** 2).sum() / (s**2).sum())
    assert next(iter(resized(report).values()))["relative_error"] == pytest.approx(float(least), rel=1e-6)


def parts_up(path: Path, name: str) -> np.ndarray:
    return TensorFile(path)[f"{name}.lora_up.weight"].astype(np.float64)


def parts_down(path: Path, name: str) -> np.ndarray:
    return TensorFile(path)[f"{name}.lora_down.weight"].astype(np.float64)


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
def test_padding_changes_no_bit(tmp_path: Path, dtype: str) -> None:
    source = kohya(tmp_path / "a.safetensors", {"double_blocks.0.img_attn.qkv": 4}, dtype=dtype, alpha=3.0)
    lorafmt.resize(source, tmp_path / "b.safetensors", rank=7, method="pad")
    a, b = TensorFile(source), TensorFile(tmp_path / "b.safetensors")
    name = "lora_unet_double_blocks_0_img_attn_qkv"
    down, up = f"{name}.lora_down.weight", f"{name}.lora_up.weight"
    assert np.array_equal(a[down], b[down][:4]) and np.array_equal(a[up], b[up][:, :4])
    assert not b[down][4:].any() and not b[up][:, 4:].any()
    assert float(b[f"{name}.alpha"]) == 3.0 * 7 / 4
    assert oracle.compare(oracle.reference(source), oracle.reference(tmp_path / "b.safetensors"), 1e-12)


def test_orthogonal_completion_keeps_the_delta(tmp_path: Path) -> None:
    source = lora(tmp_path / "a.safetensors", {"x_embedder": 4}, dtype="F32")
    report = lorafmt.resize(source, tmp_path / "b.safetensors", rank=200, method="orthogonal")
    assert "rank-clamped" in {w.code for w in report.warnings}
    down = TensorFile(tmp_path / "b.safetensors")["transformer.x_embedder.lora_A.weight"].astype(np.float64)
    up = TensorFile(tmp_path / "b.safetensors")["transformer.x_embedder.lora_B.weight"]
    assert down.shape == (64, 64) and not up[:, 4:].any()
    old, new = down[:4], down[4:]
    gram = new @ new.T
    length = np.mean((old**2).sum(1))
    assert np.allclose(gram, np.eye(60) * length, atol=1e-6 * length)
    assert np.abs(new @ old.T).max() < 1e-6 * length
    assert oracle.compare(oracle.reference(source), oracle.reference(tmp_path / "b.safetensors"), 1e-12)


def test_projections_are_told_as_bad_as_they_are(tmp_path: Path) -> None:
    source = fading(tmp_path / "a.safetensors")
    before = oracle.reference(source)
    for method in ("random", "sparse-random"):
        outputs = []
        for seed in (1, 1, 2):
            target = tmp_path / f"{len(outputs)}.safetensors"
            report = lorafmt.resize(source, target, rank=4, method=method, seed=seed, overwrite=True)
            after = oracle.reference(target)
            for module, told in resized(report).items():
                assert told["relative_error"] == pytest.approx(relative_error(before[module], after[module]), rel=1e-4)
            outputs.append(target.read_bytes())
        assert outputs[0] == outputs[1] != outputs[2]


def test_sparse_projections_are_unbiased(tmp_path: Path) -> None:
    """The mean over seeds comes to the delta, and does not shrink with the density."""
    source = lora(tmp_path / "a.safetensors", {"proj_out": 8}, dtype="F32")
    wanted = dense(oracle.reference(source)[OUT])
    mean = np.zeros_like(wanted)
    rounds = 120
    for seed in range(rounds):
        made = lorafmt.resize(source, rank=4, method="sparse-random", density=0.25, seed=seed)
        mean += made["proj_out"].delta(dtype="float64") / rounds
    gain = float((mean * wanted).sum() / (wanted**2).sum())
    assert gain == pytest.approx(1, abs=0.15)


def test_randomised_decompositions(tmp_path: Path) -> None:
    source = fading(tmp_path / "a.safetensors")
    before = oracle.reference(source)
    report = lorafmt.resize(source, tmp_path / "b.safetensors", rank=5, method="rsvd")
    after = oracle.reference(tmp_path / "b.safetensors")
    for module, told in resized(report).items():
        s = singular_values(before[module])
        least = float(np.sqrt((s[5:] ** 2).sum() / (s**2).sum()))
        assert relative_error(before[module], after[module]) == pytest.approx(least, rel=1e-3)
        assert told["relative_error"] == pytest.approx(least, rel=1e-3)
    # No power iteration is allowed, too; it is only worse.
    assert lorafmt.resize(source, rank=5, method="rsvd", niter=0, oversample=0).report["resize"]["changed"] == 2


def test_full_differences_have_no_factors_but_some_can_be_found(tmp_path: Path) -> None:
    rng = np.random.default_rng(4)
    full = (rng.standard_normal((64, 6)) @ rng.standard_normal((6, 3072))).astype(np.float32)
    source = tmp_path / "a.safetensors"
    save(source, {"lora_unet_final_layer_linear.diff": (full, "F32")})
    with pytest.raises(lorafmt.UnsupportedError) as caught:
        lorafmt.resize(source, tmp_path / "b.safetensors", rank=6)
    assert caught.value.code == "unsupported-kind" and "rsvd" in caught.value.hint
    lorafmt.resize(source, tmp_path / "b.safetensors", rank=6, method="rsvd")
    after = oracle.reference(tmp_path / "b.safetensors")[OUT]
    assert np.linalg.norm(dense(after) - full) < 1e-5 * np.linalg.norm(full)


def test_a_budget_has_the_least_error_for_its_bytes(tmp_path: Path) -> None:
    """No exchange of ranks between the two modules that fits has a smaller error."""
    source = fading(tmp_path / "a.safetensors", {"x_embedder": 10, "transformer_blocks.0.ff.net.2": 10})
    spectra, sizes = {}, {}
    for module, delta in oracle.reference(source).items():
        (term,) = delta.terms
        left, right = (np.linalg.qr(np.asarray(x, np.float64), mode="r") for x in (term.up, term.down.T))  # type: ignore[union-attr]
        spectra[module] = np.linalg.svd(left @ right.T, compute_uv=False)
        sizes[module] = 4 * sum(delta.terms[0].shape)
    first, second = spectra
    budget = 4 * sizes[first] + 3 * sizes[second]
    report = lorafmt.resize(source, tmp_path / "b.safetensors", bytes=budget)
    ranks = {m: told["rank_after"] for m, told in resized(report).items()}

    def error(k: int, n: int) -> float:
        return float((spectra[first][k:] ** 2).sum() + (spectra[second][n:] ** 2).sum())

    assert sum(ranks[m] * sizes[m] for m in ranks) <= budget
    fits = [(k, n) for k in range(1, 11) for n in range(1, 11) if k * sizes[first] + n * sizes[second] <= budget]
    # Greedy by energy a byte: at most one step of the larger module away from the best.
    best = min(error(*pair) for pair in fits)
    assert error(ranks[first], ranks[second]) <= best + max(float(s[1] ** 2) for s in spectra.values())
    mean = lorafmt.resize(source, tmp_path / "c.safetensors", mean_rank=3)
    ranks = {m: told["rank_after"] for m, told in resized(mean).items()}
    assert sum(ranks.values()) == 6
    assert error(ranks[first], ranks[second]) == pytest.approx(min(error(k, 6 - k) for k in range(1, 6)))


def test_ranks_of_single_modules(tmp_path: Path) -> None:
    source = lora(tmp_path / "a.safetensors", MODULES, dtype="F32")
    ranks = {"**.attn": 2, "transformer_blocks.0.attn.to_v": 3, "**.nothing": 1}
    report = lorafmt.resize(source, tmp_path / "b.safetensors", rank=4, ranks=ranks)
    have = {m.removeprefix("transformer."): told["rank_after"] for m, told in resized(report).items()}
    assert have == {**dict.fromkeys(MODULES, 4), QKV[0]: 2, QKV[1]: 2, QKV[2]: 3}
    assert "unmatched-selector" in {w.code for w in report.warnings}


def test_modules_within_the_rank_keep_their_bytes(tmp_path: Path) -> None:
    source = lora(tmp_path / "a.safetensors", {"x_embedder": 2, "proj_out": 9}, dtype="BF16")
    report = lorafmt.resize(source, tmp_path / "b.safetensors", rank=4)
    a, b = TensorFile(source), TensorFile(tmp_path / "b.safetensors")
    for suffix in ("lora_A.weight", "lora_B.weight"):
        key = f"{EMBED}.{suffix}"
        assert np.array_equal(a[key], b[key])
    assert report["resize"]["changed"] == 1


def test_zero_modules_get_one_rank_of_zeros(tmp_path: Path) -> None:
    zeros = {f"{OUT}.lora_A.weight": noise(8, 3072), f"{OUT}.lora_B.weight": (np.zeros((64, 8), np.float32), "F32")}
    source = lora(tmp_path / "a.safetensors", {"x_embedder": 8}, dtype="F32", extra=zeros)
    report = lorafmt.resize(source, tmp_path / "b.safetensors", rank=4)
    told = resized(report)[OUT]
    assert (told["rank_after"], told["relative_error"]) == (1, 0.0)
    assert not TensorFile(tmp_path / "b.safetensors")[f"{OUT}.lora_B.weight"].any()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_is_named(tmp_path: Path, value: float) -> None:
    down, _ = noise(8, 64)
    down[3, 5] = value
    extra = {f"{EMBED}.lora_A.weight": (down, "F32"), f"{EMBED}.lora_B.weight": noise(3072, 8)}
    source = lora(tmp_path / "a.safetensors", {"proj_out": 8}, dtype="F32", extra=extra)
    with pytest.raises(lorafmt.FormatError) as caught:
        lorafmt.resize(source, tmp_path / "b.safetensors", rank=4)
    assert (caught.value.code, caught.value.key) == ("not-finite", f"{EMBED}.lora_A.weight")
    assert not (tmp_path / "b.safetensors").exists()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"rank": 0},
        {"rank": True},
        {"energy": 0.0},
        {"energy": 1.5},
        {"energy": float("nan")},
        {"max_error": 1.0},
        {"sv_ratio": 0.5},
        {"energy": 0.9, "max_error": 0.1},
        {"rank": 4, "bytes": 100},
        {"bytes": 1},
        {"mean_rank": 0.5},
        {"rank": 4, "method": "magic"},
        {"rank": 4, "method": "sparse-random", "density": 0.0},
    ],
)
def test_what_makes_no_sense_is_refused(tmp_path: Path, options: dict[str, Any]) -> None:
    source = lora(tmp_path / "a.safetensors", {"proj_out": 8})
    with pytest.raises(lorafmt.UsageError) as caught:
        lorafmt.resize(source, tmp_path / "b.safetensors", **options)
    assert caught.value.code == "invalid-argument" and caught.value.hint
    assert not (tmp_path / "b.safetensors").exists()


def test_adapters_resize_in_memory(tmp_path: Path) -> None:
    source = fading(tmp_path / "a.safetensors")
    with lorafmt.open(source) as adapter:
        small = adapter.resize(4)
    assert small.rank == 4 and small.dialect == "diffusers"


# ------------------------------------------------------------------------------------------------ one set of keys


@pytest.mark.parametrize("to", ["diffusers", "kohya"])
def test_a_folder_gets_one_set_of_keys_and_one_rank(tmp_path: Path, to: str) -> None:
    paths = [
        lora(tmp_path / "a.safetensors", {QKV[0]: 3, "proj_out": 9}, dtype="F32", alpha=2.0),
        kohya(tmp_path / "b.safetensors", {"double_blocks.0.img_attn.qkv": 6}, dtype="F32"),
        lora(tmp_path / "c.safetensors", {"x_embedder": 2}, DIFFUSERS, dtype="F32", extra=bias()),
    ]
    out = tmp_path / "out"
    reports = lorafmt.normalize(paths, out, rank=6, to=to)
    files = [TensorFile(out / f"{p.stem}.r6.safetensors") for p in paths]
    shapes = [{key: (e.dtype, e.shape) for key, e in f.header.items()} for f in files]
    assert shapes[0] == shapes[1] == shapes[2]
    ranks = {m["rank_after"] for report in reports for m in report["resize"]["modules"]}  # type: ignore[index]
    assert ranks == {6}
    # Module b fits; a's one of rank 9 loses what it must; all others keep their deltas.
    for path, told in zip(paths, reports, strict=True):
        before, after = oracle.reference(path), oracle.reference(out / f"{path.stem}.r6.safetensors")
        for module, delta in before.items():
            if path.stem == "a" and module == OUT:
                s = singular_values(delta)
                least = float(np.sqrt((s[6:] ** 2).sum() / (s**2).sum()))
                assert relative_error(delta, after[module]) == pytest.approx(least, rel=1e-4)
            elif "#" not in module:
                assert relative_error(delta, after[module]) < 1e-5, (path, module)
        assert all(oracle.norm(after[m].terms) == 0 for m in after if m not in before and "#" not in m)
        assert told.tensors.total == told.tensors.used  # type: ignore[union-attr]


def bias() -> dict[str, tuple[np.ndarray, str]]:
    return {f"{EMBED}.lora_B.bias": noise(3072)}


def test_a_new_adapter_takes_the_keys_of_the_others(tmp_path: Path) -> None:
    one = lora(tmp_path / "a.safetensors", {"x_embedder": 2, "proj_out": 2}, dtype="F32")
    other = lora(tmp_path / "b.safetensors", {"proj_out": 3}, dtype="F32")
    lorafmt.normalize([one], tmp_path / "out", rank=4)
    lorafmt.normalize([other], tmp_path / "out", rank=4, like=tmp_path / "out" / "a.r4.safetensors")
    files = [TensorFile(tmp_path / "out" / f"{name}.r4.safetensors").header for name in "ab"]
    assert {k: e.shape for k, e in files[0].items()} == {k: e.shape for k, e in files[1].items()}
    with pytest.raises(lorafmt.UnsupportedError) as caught:
        lorafmt.normalize([one], tmp_path / "out", rank=4, like=other)
    assert caught.value.code == "unsupported-module" and "x_embedder" in str(caught.value)


def test_what_cannot_be_nothing_is_refused(tmp_path: Path) -> None:
    magnitude = {f"{OUT}.lora_magnitude_vector": (np.ones(64, np.float32), "F32")}
    dora = lora(tmp_path / "a.safetensors", {"proj_out": 2}, dtype="F32", extra=magnitude)
    plain = lora(tmp_path / "b.safetensors", {"x_embedder": 2}, dtype="F32")
    with pytest.raises(lorafmt.UnsupportedError) as caught:
        lorafmt.normalize([dora, plain], tmp_path / "out", rank=4)
    assert caught.value.code == "unsupported-kind" and "expand" in caught.value.hint


def test_flat_names_are_resized_alike(tmp_path: Path) -> None:
    """The same module under kohya's and under diffusers' names loses the same."""
    suffixes = (".lora_down.weight", ".lora_up.weight")
    one = lora(tmp_path / "a.safetensors", {"x_embedder": 12}, dtype="F32", seed=5)
    other = lora(tmp_path / "b.safetensors", {"img_in": 12}, flat("lora_unet_"), suffixes, dtype="F32", seed=5)
    errors = [lorafmt.resize(p, rank=4, family="flux1").report["resize"]["relative_error"] for p in (one, other)]
    assert errors[0] == pytest.approx(errors[1], rel=1e-12)
