"""Merge rules against PEFT's own, against mergekit's definitions in numpy, and what must not change a result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lorafmt
import oracle
from tensorfile import save

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

# Both have a short side of 64, so a dense decomposition takes no time. Outputs and inputs.
SHAPES = {"x_embedder": (3072, 64), "proj_out": (64, 3072)}
RANKS = {"a": 4, "b": 4, "c": 8}
ALPHAS = {"a": 4, "b": 2, "c": 16}
WEIGHTS = [0.8, -0.6, 1.3]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """Three adapters in PEFT, and the folder that it saved them to."""
    torch.manual_seed(5)
    layers = {name: torch.nn.Linear(n, m, bias=False) for name, (m, n) in SHAPES.items()}
    base = torch.nn.Module()
    for name, layer in layers.items():
        base.add_module(name, layer)
    base.forward = lambda x: x  # type: ignore[method-assign]
    made = None
    for name, rank in RANKS.items():
        config = peft.LoraConfig(r=rank, lora_alpha=ALPHAS[name], target_modules=list(SHAPES), init_lora_weights=False)
        if made is None:
            made = peft.get_peft_model(base, config, adapter_name=name)
        else:
            made.add_adapter(name, config)
    assert made is not None
    folder = tmp_path_factory.mktemp("peft")
    made.save_pretrained(folder, selected_adapters=list(RANKS))
    return made, folder


def dense(path: Path) -> dict[str, np.ndarray]:
    found = oracle.reference(path)
    return {
        name.removeprefix("transformer."): oracle.sum_rows(delta.terms, 0, delta.terms[0].shape[0])
        for name, delta in found.items()
    }


def ours(out: Path, loras: list[tuple[Path, float]], **merging: Any) -> tuple[dict[str, np.ndarray], lorafmt.Report]:
    report = lorafmt.compose(loras, out, dtype="fp32", overwrite=True, **merging)
    return dense(out), report


def distance(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def scaled(folder: Path, names: str) -> list[tuple[Path, float]]:
    return [(folder / name, weight) for name, weight in zip(names, WEIGHTS, strict=False)]


CASES = [
    ("svd", "abc", {"svd_rank": 16}),
    ("svd", "abc", {"svd_rank": 6}),
    ("ties_svd", "abc", {"density": 0.3}),
    ("ties_svd", "abc", {"density": 0.5, "majority_sign_method": "frequency"}),
    ("ties_svd", "ab", {"density": 1.0, "svd_rank": 20}),
    ("magnitude_prune_svd", "abc", {"density": 0.2, "svd_rank": 32}),
    ("dare_linear_svd", "abc", {"density": 1.0, "svd_rank": 16}),
    ("dare_ties_svd", "ab", {"density": 1.0}),
    ("linear", "ab", {}),
    ("ties", "ab", {"density": 0.4}),
    ("ties", "ab", {"density": 0.7, "majority_sign_method": "frequency"}),
    ("magnitude_prune", "ab", {"density": 0.5}),
    ("dare_ties", "ab", {"density": 1.0}),
]


@pytest.mark.parametrize(("kind", "names", "options"), CASES, ids=lambda x: str(x))
def test_results_are_those_of_peft(
    model: tuple[Any, Path], tmp_path: Path, kind: str, names: str, options: dict[str, Any]
) -> None:
    made, folder = model
    made.add_weighted_adapter(list(names), WEIGHTS[: len(names)], "merged", combination_type=kind, **options)
    layers = made.base_model.model
    theirs = {name: getattr(layers, name).get_delta_weight("merged").detach().double().numpy() for name in SHAPES}
    made.delete_adapter("merged")
    found, report = ours(tmp_path / "out.safetensors", scaled(folder, names), combination_type=kind, **options)
    for name, wanted in theirs.items():
        assert distance(found[name], wanted) < 2e-4, name
    codes = {warning.code for warning in report.warnings}
    if kind == "linear":
        assert "linear-merge" in codes
    elif kind.endswith("_svd"):
        assert "recompression-loss" in codes
    elif kind != "svd":
        assert "factor-space" in codes


def test_the_losses_are_told(model: tuple[Any, Path], tmp_path: Path) -> None:
    _, folder = model
    loras = scaled(folder, "abc")
    low, report = ours(tmp_path / "low.safetensors", loras, method="ties", density=0.3, space="delta", rank=8)
    whole, _ = ours(tmp_path / "whole.safetensors", loras, method="ties", density=0.3, space="delta", rank=64)
    told = {m["module"].removeprefix("transformer."): m for m in report.to_dict()["merge"]["modules"]}
    for name, wanted in whole.items():
        s = np.linalg.svd(wanted, compute_uv=False)
        least = np.sqrt((s[8:] ** 2).sum() / (s**2).sum())
        assert told[name]["relative_error"] == pytest.approx(least, rel=1e-4)
        assert distance(low[name], wanted) == pytest.approx(least, rel=1e-4)
    linear, report = ours(tmp_path / "linear.safetensors", scaled(folder, "ab"), method="linear")
    exact, _ = ours(tmp_path / "cat.safetensors", scaled(folder, "ab"), method="cat")
    squares = [(np.linalg.norm(linear[n] - exact[n]) ** 2, np.linalg.norm(exact[n]) ** 2) for n in SHAPES]
    total = np.sqrt(sum(e for e, _ in squares) / sum(n for _, n in squares))
    assert report.to_dict()["merge"]["relative_error"] == pytest.approx(total, rel=1e-5)


def gauged(out: Path, folder: Path, seed: int) -> Path:
    """The same deltas by other factors: any invertible matrix between them."""
    rng = np.random.default_rng(seed)
    tensors: dict[str, tuple[np.ndarray, str]] = {}
    file = oracle.TensorFile(folder / "adapter_model.safetensors")
    for name in SHAPES:
        down, up = (file[f"base_model.model.{name}.lora_{x}.weight"].astype(np.float64) for x in "AB")
        g = rng.standard_normal((down.shape[0],) * 2)
        scale = ALPHAS[folder.name] / RANKS[folder.name]
        tensors[f"transformer.{name}.lora_A.weight"] = (np.linalg.inv(g) @ down).astype(np.float32), "F32"
        tensors[f"transformer.{name}.lora_B.weight"] = (scale * up @ g).astype(np.float32), "F32"
    save(out, tensors)
    return out


@pytest.mark.parametrize("method", ["ties", "dare-linear", "dare-ties", "magnitude-prune", "della", "breadcrumbs"])
def test_core_results_do_not_depend_on_factors(model: tuple[Any, Path], tmp_path: Path, method: str) -> None:
    _, folder = model
    merging = {"method": method, "density": 0.5, "seed": 3}
    plain, report = ours(tmp_path / "plain.safetensors", scaled(folder, "abc"), **merging)
    pairs = enumerate(zip("abc", WEIGHTS, strict=True))
    turned = [(gauged(tmp_path / f"{n}.safetensors", folder / n, i), w) for i, (n, w) in pairs]
    found, _ = ours(tmp_path / "turned.safetensors", turned, **merging)
    for name in SHAPES:
        assert distance(found[name], plain[name]) < 1e-4
    assert report.to_dict()["merge"]["relative_error"] is None


def deltas(folder: Path, names: str) -> dict[str, list[np.ndarray]]:
    found = [dense(folder / name) for name in names]
    return {name: [f[name] for f in found] for name in SHAPES}


def top(x: np.ndarray, skip: int, keep: int) -> np.ndarray:
    order = np.argsort(-np.abs(x), axis=None)[skip : skip + keep]
    mask = np.zeros(x.size)
    mask[order] = 1
    return x * mask.reshape(x.shape)


def test_mergekit_ties_and_breadcrumbs(model: tuple[Any, Path], tmp_path: Path) -> None:
    """Weights before the election, and the sum of the weights that agree as the divisor."""
    _, folder = model
    weights = np.array([0.8, 0.5, 1.3])[:, None, None]
    loras = [(folder / name, float(w)) for name, w in zip("abc", weights[:, 0, 0], strict=True)]
    mergekit: dict[str, Any] = {"rule": "mergekit", "space": "delta", "rank": 64}
    ties, _ = ours(tmp_path / "t.safetensors", loras, method="ties", density=0.3, **mergekit)
    crumbs, _ = ours(tmp_path / "b.safetensors", loras, method="breadcrumbs", density=0.4, gamma=0.05, **mergekit)
    mergekit["normalize"] = True
    signed, _ = ours(tmp_path / "s.safetensors", loras, method="breadcrumbs_ties", density=1.0, **mergekit)
    for name, parts in deltas(folder, "abc").items():
        n = parts[0].size

        def elected(parts: list[np.ndarray]) -> np.ndarray:
            y = weights * np.stack(parts)
            mask = np.sign(y) == np.where(y.sum(0) >= 0, 1, -1)
            mass = (weights * mask).sum(0)
            return (y * mask).sum(0) / np.where(mass == 0, 1, mass)

        assert distance(ties[name], elected([top(p, 0, int(0.3 * n)) for p in parts])) < 1e-4
        assert distance(signed[name], elected(parts)) < 1e-4
        middle = [top(p, int(0.05 * n), int(0.4 * n)) for p in parts]
        assert distance(crumbs[name], (weights * np.stack(middle)).sum(0)) < 1e-4


def test_dare_in_distribution(model: tuple[Any, Path], tmp_path: Path) -> None:
    """Kept with the chance of the density and divided by it: unbiased, of variance (1 - d) / d x^2."""
    _, folder = model
    density, draws = 0.3, 12
    wanted = deltas(folder, "a")["proj_out"][0]
    merging = {"method": "dare-linear", "density": density, "space": "delta", "rank": 64}
    runs = []
    for seed in range(draws):
        found, _ = ours(tmp_path / "d.safetensors", [(folder / "a", 1.0)], seed=seed, **merging)
        runs.append(found["proj_out"])
        ratio = runs[-1] / wanted
        large = np.abs(wanted) > np.abs(wanted).mean()
        kept = np.abs(ratio[large]) > 0.5 / density
        assert np.allclose(ratio[large][kept], 1 / density, rtol=1e-2) and np.abs(ratio[large][~kept]).max() < 5e-2
        assert kept.mean() == pytest.approx(density, abs=5 * np.sqrt(density * (1 - density) / kept.size))
    noise = np.linalg.norm(np.mean(runs, axis=0) - wanted) / np.linalg.norm(wanted)
    assert noise == pytest.approx(np.sqrt((1 - density) / density / draws), rel=0.03)
    energy = np.mean([np.linalg.norm(run - wanted) ** 2 for run in runs]) / np.linalg.norm(wanted) ** 2
    assert energy == pytest.approx((1 - density) / density, rel=0.03)


def test_mergekit_dare_and_della_keep_the_norm(model: tuple[Any, Path], tmp_path: Path) -> None:
    _, folder = model
    wanted = deltas(folder, "a")["proj_out"][0]
    size = np.abs(wanted)
    kept = {}
    for method in ("dare-linear", "della-linear"):
        merging = {"rule": "mergekit", "space": "delta", "rank": 64, "density": 0.5}
        found, _ = ours(tmp_path / "m.safetensors", [(folder / "a", 1.0)], method=method, **merging)
        assert np.abs(found["proj_out"]).sum() == pytest.approx(size.sum(), rel=1e-3)
        kept[method] = np.abs(found["proj_out"]) > 0.5 * size
    ranks = size.argsort(axis=1).argsort(axis=1) / (size.shape[1] - 1)
    for low, high in ((0.1, 0.3), (0.7, 0.9)):
        band = (ranks > low) & (ranks < high)
        assert kept["dare-linear"][band].mean() == pytest.approx(0.5, abs=0.02)
        # From density - 0.15 for the smallest of a row to density + 0.15 for the largest.
        assert kept["della-linear"][band].mean() == pytest.approx(0.35 + 0.3 * (low + high) / 2, abs=0.02)


def test_densities_of_single_adapters(model: tuple[Any, Path], tmp_path: Path) -> None:
    _, folder = model
    merging = {"method": "magnitude-prune", "space": "delta", "rank": 64}
    found, _ = ours(tmp_path / "x.safetensors", scaled(folder, "ab"), density=[0.2, 1.0], **merging)
    for name, (a, b) in deltas(folder, "ab").items():
        assert distance(found[name], WEIGHTS[0] * top(a, 0, int(0.2 * a.size)) + WEIGHTS[1] * b) < 1e-4


@pytest.mark.parametrize(
    ("merging", "words"),
    [
        ({"method": "ties"}, "density"),
        ({"method": "ties", "density": 1.2}, "density"),
        ({"method": "ties", "density": [0.5]}, "1 densities for 2"),
        ({"method": "slerp"}, "slerp"),
        ({"density": 0.5}, "cat"),
        ({"method": "svd"}, "rank"),
        ({"method": "della", "density": 0.5, "epsilon": 0.6}, "epsilon"),
        ({"method": "della", "density": 0.5, "rule": "peft"}, "della"),
        ({"combination_type": "ties_foo"}, "ties_foo"),
        ({"combination_type": "ties_svd", "density": "half"}, "half"),
    ],
)
def test_arguments_that_make_no_sense(model: tuple[Any, Path], merging: dict[str, Any], words: str) -> None:
    _, folder = model
    with pytest.raises(lorafmt.UsageError, match=words) as caught:
        lorafmt.compose(scaled(folder, "ab"), **merging)
    assert caught.value.code == "invalid-argument"


def test_adapters_that_do_not_merge(model: tuple[Any, Path], tmp_path: Path) -> None:
    _, folder = model
    with pytest.raises(lorafmt.LorafmtError, match="rank 4 in one and rank 8") as caught:
        lorafmt.compose([*scaled(folder, "a"), (folder / "c", 1.0)], method="ties", density=0.5, space="factors")
    assert caught.value.code == "incompatible-modules"
    spoiled = {
        "transformer.proj_out.lora_A.weight": (np.zeros((4, 3072), np.float32), "F32"),
        "transformer.proj_out.lora_B.weight": (np.full((64, 4), np.nan, np.float32), "F32"),
    }
    save(tmp_path / "nan.safetensors", spoiled)
    with pytest.raises(lorafmt.FormatError) as nan:
        lorafmt.compose([folder / "a", tmp_path / "nan.safetensors"], method="ties", density=0.5)
    assert (nan.value.code, nan.value.key) == ("not-finite", "transformer.proj_out.lora_B.weight")
    assert str(nan.value.path).endswith("nan.safetensors")
