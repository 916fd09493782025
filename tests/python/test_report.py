"""`lorafmt.report`: duplicates and near duplicates against the deltas in float64, and what it takes and gives."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import lorafmt
from loras import kohya, lora
from tensorfile import TensorFile, save

MODULES = dict.fromkeys(("transformer_blocks.0.attn.to_q", "single_transformer_blocks.3.attn.to_k"), 4)
ORIGINAL = {"double_blocks.0.img_attn.qkv": 4}


def load(path: Path) -> dict[str, np.ndarray]:
    file = TensorFile(path)
    return {key: np.array(file[key]) for key in file}


def changed(
    path: Path, to: Path, *, noise: float = 0.0, factor: float = 1.0, dtype: str = "F32", seed: int = 5
) -> Path:
    """A copy whose `up` factors are scaled, and all of whose numbers are moved by a share of noise."""
    random = np.random.default_rng(seed)
    out: dict[str, tuple[np.ndarray, str]] = {}
    for key, values in load(path).items():
        moved = values * (1 + noise * random.standard_normal(values.shape))
        out[key] = (moved * (factor if "lora_B" in key else 1.0)).astype(np.float32), dtype
    save(to, out)
    return to


def factors(path: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """`up` and `down` of every module in float64, under its name."""
    tensors = {key: values.astype(np.float64) for key, values in load(path).items()}
    ends = ".lora_B.weight", ".lora_A.weight"
    names = [key.removesuffix(ends[0]) for key in tensors if key.endswith(ends[0])]
    return {name: (tensors[name + ends[0]], tensors[name + ends[1]]) for name in names}


def inner(a: Path, b: Path) -> float:
    """The inner product of all deltas: <B A, D C> is the trace of (B^T D) (C A^T)."""
    x, y = factors(a), factors(b)
    assert x.keys() == y.keys()
    return sum(float(np.sum((x[n][0].T @ y[n][0]) * (x[n][1] @ y[n][1].T))) for n in x)


def cosine(a: Path, b: Path) -> float:
    return inner(a, b) / np.sqrt(inner(a, a) * inner(b, b))


def energies(path: Path) -> np.ndarray:
    """Squares of the k-th singular values, all modules together: those of R_b R_a^T, with Q R = B and Q R = A^T."""
    values = [np.linalg.svd(np.linalg.qr(b)[1] @ np.linalg.qr(a.T)[1].T)[1] for b, a in factors(path).values()]
    return np.sum(np.square(values), axis=0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "loras"
    first = lora(folder / "a.safetensors", MODULES, seed=1, dtype="F32")
    (folder / "b.safetensors").write_bytes(first.read_bytes())
    changed(first, folder / "c.safetensors", noise=0.1, factor=0.5)
    changed(first, folder / "d.safetensors", dtype="BF16")
    lora(folder / "e.safetensors", MODULES, seed=2, dtype="F32")
    lorafmt.convert(first, folder / "f.safetensors", to="kohya")
    (folder / "broken.safetensors").write_bytes(b"no")
    return folder


def test_near_duplicates_have_the_cosine_of_the_deltas(folder: Path) -> None:
    found = lorafmt.report(folder)
    files = {Path(f.path).stem: f for f in found.files}
    assert list(files) == ["a", "b", "broken", "c", "d", "e", "f"]
    a = folder / "a.safetensors"
    for name, ratio in (("c", 2.0), ("d", 1.0)):
        near = {Path(n.path).stem: n for n in files[name].near}["a"]
        exact = cosine(a, folder / f"{name}.safetensors")
        assert exact > 0.98
        assert abs(near.cosine - exact) <= 4 * near.error + 2e-6
        # From the file to the other one: the inverse of what was done to it.
        assert near.ratio == pytest.approx(ratio, rel=0.05)
        assert not near.partial
    assert not files["e"].near
    assert abs(cosine(a, folder / "e.safetensors")) < 0.1


def test_the_same_is_told_from_what_is_alike(folder: Path) -> None:
    found = lorafmt.report(folder)
    groups = {g.relation: [Path(p).stem for p in g.paths] for g in found.groups}
    assert groups == {"file": ["a", "b"], "delta": ["a", "b", "f"]}
    size = (folder / "a.safetensors").stat().st_size
    assert (found.duplicates, found.duplicate_bytes) == (1, size)
    assert (found.failed, found.problems, bool(found)) == (1, 0, False)
    broken = found.files[2]
    assert broken.error is not None and broken.family is None and broken.error["hint"]


def test_other_metadata_is_no_other_adapter(tmp_path: Path) -> None:
    one = lora(tmp_path / "one.safetensors", MODULES, metadata={"a": "1"})
    two = lora(tmp_path / "two.safetensors", MODULES, metadata={"a": "2"})
    (group,) = lorafmt.report([one, two]).groups
    assert group.relation == "tensors"


def test_a_scale_outside_of_the_tensors_counts(tmp_path: Path) -> None:
    """Equal tensors with other alphas in `adapter_config.json` are other adapters."""
    paths = []
    for alpha in (4, 2):
        config = {"peft_type": "LORA", "r": 4, "lora_alpha": alpha}
        path = tmp_path / str(alpha) / "adapter_model.safetensors"
        paths.append(lora(path, MODULES, lambda p: f"base_model.model.{p}", config=config))
    found = lorafmt.report(paths)
    assert found.groups == ()
    (near,) = found.files[0].near
    assert (near.cosine, near.ratio) == (pytest.approx(1.0), pytest.approx(0.5))


def test_numbers_are_those_of_inspect(tmp_path: Path) -> None:
    path = lora(tmp_path / "a.safetensors", MODULES, seed=3)
    (file,) = lorafmt.report(path).files
    weights = lorafmt.inspect(path, weights=True).weights
    assert weights is not None and file.norm == pytest.approx(weights.total.norm, rel=1e-3)
    kept = file["adapter"]["weights"]["kept"]
    exact = energies(path)
    assert kept == pytest.approx(np.cumsum(exact) / np.sum(exact), abs=2e-5)
    assert file["adapter"]["weights"]["values"] == pytest.approx(np.sqrt(exact), rel=1e-3)


def test_a_rank_that_would_do(tmp_path: Path) -> None:
    """Of rank 8, six are nothing: two keep all, and the command that is named makes such a file."""
    path = lora(tmp_path / "a.safetensors", dict.fromkeys(MODULES, 8), dtype="F32")
    tensors = load(path)
    for key in tensors:
        if "lora_B" in key:
            tensors[key][:, 2:] *= 1e-3
    save(path, {key: (values, "F32") for key, values in tensors.items()})
    (file,) = lorafmt.report(path).files
    smaller = file["adapter"]["weights"]["smaller"]
    assert smaller["rank"] == 2 and smaller["kept"] > 0.9999
    assert smaller["command"] == f"lorafmt resize {path} --rank 2"


def test_what_it_takes(tmp_path: Path) -> None:
    path = kohya(tmp_path / "a.safetensors", ORIGINAL)
    opened = lorafmt.open(path)
    calls: list[tuple[int, int]] = []
    subjects = [path, str(path), path.read_bytes(), load(path), opened]
    found = lorafmt.report(subjects, tmp_path / "page.html", progress=lambda *n: calls.append(n))
    assert len(found.files) == 5 and found and calls[-1] == (5, 5)
    (group,) = [g for g in found.groups if g.relation != "file"]
    assert len(group.paths) == 5
    assert found.path == str(tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    data = page.split('type="application/json">')[1].split("</script>")[0]
    assert json.loads(data) == found.to_dict()
    with pytest.raises(lorafmt.OutputExistsError):
        lorafmt.report(path, tmp_path / "page.html")
    lorafmt.report(path, tmp_path / "page.html", overwrite=True, weights=False)
    for wrong in (3, [], tmp_path / "nothing-in-it"):
        if isinstance(wrong, Path):
            wrong.mkdir()
        with pytest.raises(lorafmt.UsageError):
            lorafmt.report(wrong)  # type: ignore[arg-type]
    missing = lorafmt.report(tmp_path / "missing.safetensors")
    assert missing.files[0].error is not None and missing.files[0].error["code"] == "not-found"
