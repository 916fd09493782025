"""Every kind as plain LoRA, against the definition of each kind in float64.

The layers are those of a small made-up family with a convolution; the formulas are written out here and share nothing
with lorafmt.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lorafmt
import oracle
from tensorfile import TensorFile, save

OUT, IN, CONV_OUT, CONV_IN, KERNEL = 12, 18, 16, 4, (3, 3)
FAMILY = f"""
name = "expandtoy"
title = "Toy"
[blocks]
layer = 2
[[component]]
name = "transformer"
namespaces = ["diffusers", "original"]
rows = [
  {{ diffusers = "blocks.{{layer}}.fc", original = "layers.{{layer}}.fc", in = {IN}, out = {OUT} }},
  {{ diffusers = "blocks.{{layer}}.conv", original = "layers.{{layer}}.conv", in = {CONV_IN * 9}, out = {CONV_OUT} }},
  {{ diffusers = "blocks.{{layer}}.attn.{{to_q,to_k,to_v}}", \
original = "layers.{{layer}}.qkv", op = "fuse", in = {IN}, out = [6, 6, 6] }},
  {{ diffusers = "norm_out", original = "final", op = "swap_halves", in = {IN}, out = {OUT} }},
]
"""
DIALECT = """
name = "expandtoy-{name}"
title = "Toy"
write = true
alpha = "tensor"
column_magnitude = true
[spelling]
down = ".lora_down.weight"
up = ".lora_up.weight"
alpha = ".alpha"
diff_b = ".diff_b"
{more}
[[place]]
families = ["expandtoy"]
component = "transformer"
namespace = "{namespace}"
prefix = "toy_{name}."
"""
FC, CONV, QKV, NORM = "layers.0.fc", "layers.0.conv", "layers.0.qkv", "final"
SIZE = {FC: (OUT, IN), CONV: (CONV_OUT, CONV_IN * 9), QKV: (18, IN), NORM: (OUT, IN)}
WEIGHT = {FC: (OUT, IN), CONV: (CONV_OUT, CONV_IN, *KERNEL), QKV: (18, IN), NORM: (OUT, IN)}
CANONICAL = {FC: "blocks.0.fc", CONV: "blocks.0.conv"}
Tensors = dict[str, np.ndarray]


@pytest.fixture(scope="module", autouse=True)
def tables() -> None:
    lorafmt.register_table(FAMILY)
    lorafmt.register_table(DIALECT.format(name="own", more="", namespace="original"))
    lorafmt.register_table(DIALECT.format(name="parts", more="", namespace="diffusers"))


def rand(*shape: int, seed: int = 0, size: float = 0.5) -> np.ndarray:
    return (np.random.default_rng([seed, *shape]).standard_normal(shape) * size).astype(np.float32)


def write(path: Path, module: str, tensors: Tensors, dtype: str = "F32") -> Path:
    """A file of one module; integers and alphas keep a type of their own."""
    typed = {}
    for slot, values in tensors.items():
        own = "I64" if slot == "on_input" else "F32" if slot == "alpha" else dtype
        typed[f"toy_own.{module}.{slot}"] = (np.asarray(values), own)
    save(path, typed)
    return path


def base(folder: Path, module: str) -> tuple[Path, np.ndarray]:
    """A checkpoint with the weight of one module, and its weight."""
    weight = rand(*WEIGHT[module], seed=77, size=0.3)
    path = folder / "base.safetensors"
    # Other layers make the family certain.
    others = {m: rand(*WEIGHT[m], seed=78) for m in WEIGHT if m != module}
    save(path, {f"{m}.weight": (w, "F32") for m, w in {module: weight, **others}.items()})
    return path, weight.astype(np.float64)


def f64(tensors: Tensors) -> dict[str, np.ndarray]:
    return {slot: np.asarray(values, np.float64) for slot, values in tensors.items()}


def flat(values: np.ndarray) -> np.ndarray:
    return values.reshape(values.shape[0], -1)


# ---------------------------------------------------------------------------------- formulas


def lora(t: Tensors) -> np.ndarray:
    up, down = flat(t["lora_up.weight"]), flat(t["lora_down.weight"])
    scale = float(t["alpha"]) / down.shape[0] if "alpha" in t else 1.0
    if "lora_mid.weight" in t:
        return scale * flat(np.einsum("pqxy,ip,qj->ijxy", t["lora_mid.weight"], up, down))
    return scale * up @ down


def loha(t: Tensors) -> np.ndarray:
    scale = float(t["alpha"]) / t["hada_w1_b"].shape[0]
    if "hada_t1" in t:
        parts = [np.einsum("ijxy,jr,ip->prxy", t[f"hada_t{n}"], t[f"hada_w{n}_b"], t[f"hada_w{n}_a"]) for n in (1, 2)]
        return scale * flat(parts[0] * parts[1])
    return scale * (t["hada_w1_a"] @ t["hada_w1_b"]) * (t["hada_w2_a"] @ t["hada_w2_b"])


def lokr(t: Tensors) -> np.ndarray:
    scale = 1.0
    w1 = t.get("lokr_w1")
    if w1 is None:
        w1 = t["lokr_w1_a"] @ t["lokr_w1_b"]
        scale = float(t["alpha"]) / t["lokr_w1_b"].shape[0]
    w2 = t.get("lokr_w2")
    if w2 is None:
        scale = float(t["alpha"]) / t["lokr_w2_b"].shape[0]
        if "lokr_t2" in t:
            w2 = np.einsum("ijxy,ip,jr->prxy", t["lokr_t2"], t["lokr_w2_a"], t["lokr_w2_b"])
        else:
            w2 = t["lokr_w2_a"] @ flat(t["lokr_w2_b"])
    w1 = w1.reshape(*w1.shape, *(1 for _ in w2.shape[2:]))
    return scale * flat(np.kron(w1, w2))


def dora(t: Tensors, weight: np.ndarray, delta: np.ndarray) -> np.ndarray:
    changed = weight + delta.reshape(weight.shape)
    scale = t["dora_scale"]
    if scale.size == weight.shape[0] and scale.shape[0] == weight.shape[0]:
        norm = np.linalg.norm(flat(changed), axis=1).reshape(-1, *(1 for _ in weight.shape[1:]))
        scale = scale.reshape(norm.shape)
    else:
        axes = (0, *range(2, weight.ndim))
        norm = np.sqrt((changed**2).sum(axis=axes, keepdims=True))
    return flat(changed / norm * scale - weight)


def cayley(t: Tensors, rows: int) -> np.ndarray:
    blocks = t["oft_blocks"]
    q = blocks - np.swapaxes(blocks, -1, -2)
    limit = float(t.get("alpha", 0.0)) * rows
    norm = np.linalg.norm(q)
    if limit > 0 and norm > limit:
        q = q * limit / norm
    one = np.eye(q.shape[-1])
    return (one + q) @ np.linalg.inv(one - q)


def oft(t: Tensors, weight: np.ndarray) -> np.ndarray:
    w = flat(weight)
    r = cayley(t, len(w))
    if r.ndim == 3:
        count, side, _ = r.shape
        new = np.einsum("knm,knj->kmj", r, w.reshape(count, side, -1)).reshape(w.shape)
    else:
        stages, count, side, _ = r.shape
        new = w
        for stage in range(stages):
            k = 2**stage * side // 2
            new = new.reshape(-1, 2, k, w.shape[1]).transpose(0, 2, 1, 3).reshape(count, side, -1)
            new = np.einsum("bij,bjc->bic", r[stage], new)
            new = new.reshape(-1, k, 2, w.shape[1]).transpose(0, 2, 1, 3).reshape(w.shape)
    if "rescale" in t:
        new = new * t["rescale"].reshape(-1, 1)
    return new - w


def glora(t: Tensors, weight: np.ndarray) -> np.ndarray:
    a1, a2, b1, b2 = (t[f"{n}.weight"] for n in ("a1", "a2", "b1", "b2"))
    scale = float(t["alpha"]) / a1.shape[1]
    mixed = np.einsum("oi...,ir,rj->oj...", weight, flat(a1), flat(a2))
    return scale * (flat(mixed) + flat(b1) @ flat(b2))


def ia3(t: Tensors, weight: np.ndarray) -> np.ndarray:
    factor = t["weight"].reshape(-1)
    if int(t["on_input"]):
        return flat(weight * factor.reshape(1, -1, *(1 for _ in weight.shape[2:])))
    return flat(weight) * factor[:, None]


# ------------------------------------------------------------------------------------- cases


def hada(out: int, width: int, r: int) -> Tensors:
    return {
        "hada_w1_a": rand(out, r, seed=1),
        "hada_w1_b": rand(r, width, seed=2),
        "hada_w2_a": rand(out, r, seed=3),
        "hada_w2_b": rand(r, width, seed=4),
        "alpha": np.float32(1.5),
    }


def deficient(rows: int, cols: int, rank: int) -> np.ndarray:
    """Small whole numbers of a rank that is exact in float32."""
    rng = np.random.default_rng(5)
    return (rng.integers(-3, 4, (rows, rank)) @ rng.integers(-3, 4, (rank, cols))).astype(np.float32)


HADA_TUCKER: Tensors = {
    "hada_t1": rand(3, 3, *KERNEL, seed=5),
    "hada_t2": rand(3, 3, *KERNEL, seed=6),
    "hada_w1_a": rand(3, CONV_OUT, seed=1),
    "hada_w1_b": rand(3, CONV_IN, seed=2),
    "hada_w2_a": rand(3, CONV_OUT, seed=3),
    "hada_w2_b": rand(3, CONV_IN, seed=4),
    "alpha": np.float32(2),
}
HUGE = np.float32(9999999999.0)
"""What trainers store where alpha means nothing."""
W1, W2 = rand(3, 6, seed=7), rand(4, 3, seed=8)
LOKR: dict[str, tuple[str, Tensors, int]] = {
    "both full": (FC, {"lokr_w1": W1, "lokr_w2": W2, "alpha": HUGE}, 9),
    "w1 full": (
        FC,
        {"lokr_w1": W1, "lokr_w2_a": rand(4, 2, seed=9), "lokr_w2_b": rand(2, 3, seed=9), "alpha": np.float32(3)},
        6,
    ),
    "w2 full": (
        FC,
        {"lokr_w1_a": rand(3, 2, seed=9), "lokr_w1_b": rand(2, 6, seed=9), "lokr_w2": W2, "alpha": np.float32(3)},
        6,
    ),
    "both decomposed": (
        FC,
        {
            "lokr_w1_a": rand(3, 2, seed=1),
            "lokr_w1_b": rand(2, 6, seed=2),
            "lokr_w2_a": rand(4, 2, seed=3),
            "lokr_w2_b": rand(2, 3, seed=4),
            "alpha": np.float32(3),
        },
        4,
    ),
    "w1 of rank 1": (FC, {"lokr_w1": deficient(3, 6, 1), "lokr_w2": W2}, 3),
    "both of lower rank": (FC, {"lokr_w1": deficient(3, 6, 2), "lokr_w2": deficient(4, 3, 2)}, 4),
    "convolution, w2 full": (CONV, {"lokr_w1": rand(4, 2, seed=1), "lokr_w2": rand(4, 2, *KERNEL, seed=2)}, 8),
    "convolution, w2 decomposed": (
        CONV,
        {
            "lokr_w1": rand(4, 2, seed=1),
            "lokr_w2_a": rand(4, 3, seed=2),
            "lokr_w2_b": rand(3, 2 * 9, seed=3),
            "alpha": np.float32(2),
        },
        6,
    ),
    "Tucker": (
        CONV,
        {
            "lokr_w1": rand(4, 2, seed=1),
            "lokr_t2": rand(3, 3, *KERNEL, seed=2),
            "lokr_w2_a": rand(3, 4, seed=3),
            "lokr_w2_b": rand(3, 2, seed=4),
            "alpha": np.float32(2),
        },
        6,
    ),
}
LOCON: Tensors = {
    "lora_up.weight": rand(CONV_OUT, 3, 1, 1, seed=1),
    "lora_mid.weight": rand(3, 3, *KERNEL, seed=2),
    "lora_down.weight": rand(3, CONV_IN, 1, 1, seed=3),
    "alpha": np.float32(2),
}
PLAIN: Tensors = {
    "lora_up.weight": rand(OUT, 3, seed=1),
    "lora_down.weight": rand(3, IN, seed=2),
    "alpha": np.float32(2),
}
CONV_PLAIN: Tensors = {
    "lora_up.weight": rand(CONV_OUT, 3, 1, 1, seed=1),
    "lora_down.weight": rand(3, CONV_IN, *KERNEL, seed=3),
}


def read(path: Path) -> dict[str, tuple[np.ndarray, np.ndarray, float]]:
    """Every module of a file as up, down and scale, in the shapes of the file."""
    file = TensorFile(path)
    names = {key.rsplit(".lora_up", 1)[0] for key in file if ".lora_up" in key}
    out = {}
    for name in names:
        up, down = (file[f"{name}.lora_{s}.weight"].astype(np.float64) for s in ("up", "down"))
        alpha = file[f"{name}.alpha"] if f"{name}.alpha" in file else down.shape[0]
        out[name] = up, down, float(alpha) / down.shape[0]
    return out


def the_one(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    ((up, down, scale),) = read(path).values()
    return scale * flat(up) @ flat(down), up, down


def relative(have: np.ndarray, want: np.ndarray) -> float:
    return float(np.linalg.norm(have - want) / np.linalg.norm(want))


def best(want: np.ndarray, rank: int) -> float:
    """The least relative error that any matrix of that rank has."""
    s = np.linalg.svd(want, compute_uv=False)
    return float(np.sqrt((s[rank:] ** 2).sum() / (s**2).sum()))


def expanded(source: Path, folder: Path, **options: Any) -> tuple[Path, dict[str, Any]]:
    target = folder / "plain.safetensors"
    report = lorafmt.expand(source, target, to="expandtoy-own", overwrite=True, **options)
    document = report.to_dict()
    count = document["tensors"]
    assert count["used"] == count["in"], count
    return target, document["expand"]


EXACT: dict[str, tuple[str, Tensors, Any, int]] = {
    "Tucker LoCon": (CONV, LOCON, lora, 3),
    "LoHa": (FC, hada(OUT, IN, 2), loha, 4),
    "LoHa of more products than rows": (FC, hada(OUT, IN, 4), loha, 12),
    "LoHa of a convolution": (CONV, hada(CONV_OUT, CONV_IN * 9, 2), loha, 4),
    "LoHa Tucker": (CONV, HADA_TUCKER, loha, 9),
    **{f"LoKr {name}": (module, tensors, lokr, rank) for name, (module, tensors, rank) in LOKR.items()},
}


@pytest.mark.parametrize("name", EXACT)
def test_exact(name: str, tmp_path: Path) -> None:
    module, tensors, formula, rank = EXACT[name]
    want = formula(f64(tensors))
    source = write(tmp_path / "a.safetensors", module, tensors)
    target, report = expanded(source, tmp_path)
    have, up, down = the_one(target)
    assert relative(have, want) < 1e-6
    assert down.shape[0] == rank
    assert report["modules"][0]["rank_after"] == rank and report["relative_error"] == 0
    # lorafmt's own judgement of both files agrees.
    assert lorafmt.diff(source, target).max_relative_error < 1e-6
    if any(np.ndim(t) == 4 for t in tensors.values()):
        assert up.shape == (CONV_OUT, rank, 1, 1) and down.shape == (rank, CONV_IN, *KERNEL)


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("name", EXACT)
def test_the_best_of_a_rank(name: str, rank: int, tmp_path: Path) -> None:
    module, tensors, formula, _ = EXACT[name]
    want = formula(f64(tensors))
    target, report = expanded(write(tmp_path / "a.safetensors", module, tensors), tmp_path, rank=rank)
    have, _, down = the_one(target)
    optimum = best(want, rank)
    assert down.shape[0] == rank
    assert relative(have, want) < optimum * (1 + 1e-4) + 1e-6
    assert report["relative_error"] == pytest.approx(optimum, rel=1e-4, abs=1e-6)
    assert report["modules"][0]["norm"] in (None, pytest.approx(np.linalg.norm(want)))


@pytest.mark.parametrize("share", [0.5, 0.9, 0.999])
@pytest.mark.parametrize("name", ["LoHa", "LoKr both full", "LoKr Tucker", "LoHa of more products than rows"])
def test_the_smallest_rank_that_is_enough(name: str, share: float, tmp_path: Path) -> None:
    module, tensors, formula, _ = EXACT[name]
    want = formula(f64(tensors))
    source = write(tmp_path / "a.safetensors", module, tensors)
    energy = np.cumsum(np.linalg.svd(want, compute_uv=False) ** 2)
    enough = int(np.argmax(energy >= share * energy[-1])) + 1
    for options in ({"energy": share}, {"max_error": float(np.sqrt(1 - share))}):
        target, _ = expanded(source, tmp_path, **options)
        assert the_one(target)[2].shape[0] == enough
    target, _ = expanded(source, tmp_path, energy=share, rank=2)
    assert the_one(target)[2].shape[0] == min(enough, 2)


BASED: dict[str, tuple[str, Tensors, Any]] = {
    "DoRA over outputs": (FC, {**PLAIN, "dora_scale": np.abs(rand(OUT, 1, seed=9)) + 1}, "lora"),
    "DoRA over inputs": (FC, {**PLAIN, "dora_scale": np.abs(rand(1, IN, seed=9)) + 1}, "lora"),
    "DoRA of a convolution": (CONV, {**CONV_PLAIN, "dora_scale": np.abs(rand(CONV_OUT, 1, 1, 1, seed=9)) + 1}, "lora"),
    "DoRA over channels": (CONV, {**CONV_PLAIN, "dora_scale": np.abs(rand(1, CONV_IN, 1, 1, seed=9)) + 1}, "lora"),
    "DoRA on Tucker": (CONV, {**LOCON, "dora_scale": np.abs(rand(CONV_OUT, 1, 1, 1, seed=9)) + 1}, "lora"),
    "DoRA on LoHa": (FC, {**hada(OUT, IN, 2), "dora_scale": np.abs(rand(OUT, 1, seed=9)) + 1}, "loha"),
    "DoRA on LoKr": (FC, {"lokr_w1": W1, "lokr_w2": W2, "dora_scale": np.abs(rand(OUT, 1, seed=9)) + 1}, "lokr"),
    "OFT": (FC, {"oft_blocks": rand(3, 4, 4, seed=1, size=0.2)}, oft),
    "OFT with a constraint": (FC, {"oft_blocks": rand(3, 4, 4, seed=1, size=0.4), "alpha": np.float32(0.05)}, oft),
    "OFT with factors": (
        FC,
        {"oft_blocks": rand(2, 6, 6, seed=1, size=0.2), "rescale": np.abs(rand(OUT, 1, seed=2)) + 0.8},
        oft,
    ),
    "OFT of a convolution": (CONV, {"oft_blocks": rand(4, 4, 4, seed=1, size=0.2)}, oft),
    "BOFT": (CONV, {"oft_blocks": rand(3, 4, 4, 4, seed=1, size=0.2)}, oft),
    "BOFT of blocks of two, with factors": (
        CONV,
        {"oft_blocks": rand(4, 8, 2, 2, seed=1, size=0.2), "rescale": np.abs(rand(CONV_OUT, 1, 1, 1, seed=2)) + 0.8},
        oft,
    ),
    "IA3 over outputs": (FC, {"weight": rand(OUT, seed=1), "on_input": np.int64(0)}, ia3),
    "IA3 over inputs": (FC, {"weight": rand(IN, seed=1), "on_input": np.int64(1)}, ia3),
    "IA3 over channels": (CONV, {"weight": rand(1, CONV_IN, 1, 1, seed=1), "on_input": np.int64(1)}, ia3),
}


def based(formula: Any, tensors: Tensors, weight: np.ndarray) -> np.ndarray:
    t = f64(tensors)
    if isinstance(formula, str):
        return dora(t, weight, globals()[formula](t))
    return np.asarray(formula(t, weight))


@pytest.mark.parametrize("name", BASED)
def test_with_base_weights(name: str, tmp_path: Path) -> None:
    module, tensors, formula = BASED[name]
    path, weight = base(tmp_path, module)
    want = based(formula, tensors, weight)
    source = write(tmp_path / "a.safetensors", module, tensors)
    with pytest.raises(lorafmt.UnsupportedError) as none:
        lorafmt.expand(source, rank=4, to="expandtoy-own")
    assert none.value.code == "weights-needed" and "--base-weights" in none.value.hint
    with pytest.raises(lorafmt.UsageError) as whole:
        lorafmt.expand(source, base_weights=path, to="expandtoy-own")
    assert whole.value.code == "rank-needed"
    target, report = expanded(source, tmp_path, base_weights=path, rank=min(want.shape))
    assert relative(the_one(target)[0], want) < 1e-6
    for rank in (1, 4):
        target, report = expanded(source, tmp_path, base_weights=path, rank=rank)
        optimum = best(want, rank)
        assert relative(the_one(target)[0], want) < optimum * (1 + 1e-4) + 1e-6
        assert report["relative_error"] == pytest.approx(optimum, rel=1e-4, abs=1e-6)
    target, _ = expanded(source, tmp_path, base_weights=path, max_error=0.3)
    assert relative(the_one(target)[0], want) <= 0.3 + 1e-6


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("module", [FC, CONV])
def test_glora_is_exact(module: str, old: bool, tmp_path: Path) -> None:
    (out, width), r = SIZE[module], 2
    inputs = width if module == FC else CONV_IN
    a1, a2, b1, b2 = rand(inputs, r, seed=1), rand(r, inputs, seed=2), rand(out, r, seed=3), rand(r, width, seed=4)
    path, weight = base(tmp_path, module)
    new = {"a1.weight": a1, "a2.weight": a2, "b1.weight": b1, "b2.weight": b2, "alpha": np.float32(3)}
    want = glora(f64(new), weight)
    stored = {"a1.weight": a2, "a2.weight": a1, "b1.weight": b2, "b2.weight": b1, "alpha": np.float32(3)}
    source = write(tmp_path / "a.safetensors", module, stored if old else new)
    target, report = expanded(source, tmp_path, base_weights=path)
    have, _, down = the_one(target)
    assert relative(have, want) < 1e-6 and report["relative_error"] == 0
    assert down.shape[0] == (2 * r if module == FC else r + 9 * r)
    target, _ = expanded(source, tmp_path, base_weights=path, rank=2)
    assert relative(the_one(target)[0], want) < best(want, 2) * (1 + 1e-4)


def test_full_differences(tmp_path: Path) -> None:
    diff = rand(OUT, IN, seed=3)
    source = write(tmp_path / "a.safetensors", FC, {"diff": diff, "diff_b": rand(OUT, seed=1)})
    with pytest.raises(lorafmt.UsageError) as whole:
        lorafmt.expand(source, to="expandtoy-own")
    assert whole.value.code == "rank-needed"
    target, _ = expanded(source, tmp_path, rank=3)
    assert relative(the_one(target)[0], diff) < best(diff.astype(np.float64), 3) * (1 + 1e-4)
    assert np.array_equal(TensorFile(target)[f"toy_own.{FC}.diff_b"], rand(OUT, seed=1))


@pytest.mark.parametrize("kind", ["lokr", "oft", "lora"])
def test_fused_modules_are_cut_at_last(kind: str, tmp_path: Path) -> None:
    """A LoKr whose factors do not divide at the parts, and an OFT, are parts of nothing until they are plain."""
    path, weight = base(tmp_path, QKV)
    options: dict[str, Any] = {}
    if kind == "lokr":
        tensors: Tensors = {"lokr_w1": rand(2, 3, seed=1), "lokr_w2": rand(9, 6, seed=2)}
        want = lokr(f64(tensors))
    elif kind == "oft":
        tensors = {"oft_blocks": rand(2, 9, 9, seed=1, size=0.2)}
        want, options = oft(f64(tensors), weight), {"base_weights": path, "rank": 18}
    else:
        tensors = {**PLAIN, "lora_up.weight": rand(18, 3, seed=1), "dora_scale": np.abs(rand(1, IN, seed=9)) + 1}
        want, options = dora(f64(tensors), weight, lora(f64(tensors))), {"base_weights": path, "rank": 18}
    source = write(tmp_path / "a.safetensors", QKV, tensors)
    target = tmp_path / "parts.safetensors"
    lorafmt.expand(source, target, to="expandtoy-parts", **options)
    modules = read(target)
    for i, part in enumerate(("to_q", "to_k", "to_v")):
        up, down, scale = modules[f"toy_parts.blocks.0.attn.{part}"]
        assert relative(scale * up @ down, want[6 * i : 6 * i + 6]) < 1e-6
    target, _ = expanded(source, tmp_path, **options)
    assert relative(the_one(target)[0], want) < 1e-6


def test_conversion_cuts_them_too(tmp_path: Path) -> None:
    tensors: Tensors = {"lokr_w1": rand(2, 3, seed=1), "lokr_w2": rand(9, 6, seed=2)}
    source = write(tmp_path / "a.safetensors", QKV, tensors)
    target = tmp_path / "parts.safetensors"
    with pytest.raises(lorafmt.UnsupportedError):
        lorafmt.convert(source, target, to="expandtoy-parts")
    lorafmt.convert(source, target, to="expandtoy-parts", max_rank=12)
    want = lokr(f64(tensors))
    for i, part in enumerate(("to_q", "to_k", "to_v")):
        up, down, scale = read(target)[f"toy_parts.blocks.0.attn.{part}"]
        assert relative(scale * up @ down, want[6 * i : 6 * i + 6]) < 1e-6


def test_exchanged_halves(tmp_path: Path) -> None:
    path, weight = base(tmp_path, NORM)
    tensors: Tensors = {"oft_blocks": rand(3, 4, 4, seed=1, size=0.2)}
    source = write(tmp_path / "a.safetensors", NORM, tensors)
    target = tmp_path / "parts.safetensors"
    lorafmt.expand(source, target, to="expandtoy-parts", base_weights=path, rank=12)
    want = np.roll(oft(f64(tensors), weight), OUT // 2, axis=0)
    up, down, scale = read(target)["toy_parts.norm_out"]
    assert relative(scale * up @ down, want) < 1e-6


def test_what_cannot_be_made_plain_is_left_out_on_request(tmp_path: Path) -> None:
    dora_module = {**PLAIN, "dora_scale": np.abs(rand(OUT, 1, seed=9)) + 1}
    tensors = {f"toy_own.{FC}.{slot}": (np.asarray(v), "F32") for slot, v in dora_module.items()}
    kept = {f"toy_own.{CONV}.{slot}": (np.asarray(v), "F32") for slot, v in CONV_PLAIN.items()}
    save(tmp_path / "a.safetensors", {**tensors, **kept})
    target = tmp_path / "b.safetensors"
    with pytest.raises(lorafmt.UnsupportedError):
        lorafmt.expand(tmp_path / "a.safetensors", target, to="expandtoy-own")
    assert not target.exists()
    report = lorafmt.expand(tmp_path / "a.safetensors", target, to="expandtoy-own", lossy="allow")
    assert (report.tensors.used, report.tensors.dropped, report.tensors.unknown) == (2, 4, 0)
    assert report.fidelity == "approximate"
    assert "weights-needed" in {w.code for w in report.warnings}
    # What was plain is copied bit by bit, in the shapes of a convolution.
    for slot, values in CONV_PLAIN.items():
        assert np.array_equal(TensorFile(target)[f"toy_own.{CONV}.{slot}"], values)


def test_missing_weight_and_nan(tmp_path: Path) -> None:
    oft_module: Tensors = {"oft_blocks": rand(3, 4, 4, seed=1)}
    source = write(tmp_path / "a.safetensors", "layers.1.fc", oft_module)
    path, _ = base(tmp_path, FC)
    with pytest.raises(lorafmt.UnsupportedError) as missing:
        lorafmt.expand(source, base_weights=path, rank=2, to="expandtoy-own")
    assert missing.value.code == "missing-weight" and missing.value.key is not None
    bad = rand(3, 6, seed=7)
    bad[1, 1] = np.nan
    source = write(tmp_path / "b.safetensors", FC, {"lokr_w1": W1[:], "lokr_w2": np.where(W2 > 9, W2, np.nan)})
    with pytest.raises(lorafmt.FormatError) as spoiled:
        lorafmt.expand(source, rank=2, to="expandtoy-own")
    assert (spoiled.value.code, spoiled.value.key) == ("not-finite", f"toy_own.{FC}.lokr_w2")
    for options in ({"rank": 0}, {"energy": 1.5}, {"max_error": -1.0}, {"energy": 0.9, "max_error": 0.1}):
        with pytest.raises(lorafmt.UsageError):
            lorafmt.expand(source, to="expandtoy-own", **options)


def test_zeros_keep_one_rank(tmp_path: Path) -> None:
    tensors = {**hada(OUT, IN, 2), "hada_w1_a": np.zeros((OUT, 2), np.float32)}
    for options in ({"rank": 2}, {"energy": 0.9}):
        target, report = expanded(write(tmp_path / "a.safetensors", FC, tensors), tmp_path, **options)
        have, _, down = the_one(target)
        assert not have.any() and down.shape[0] >= 1 and report["relative_error"] == 0


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_computed_numbers_are_rounded_once(dtype: str, tmp_path: Path) -> None:
    tensors = {k: v for k, v in hada(OUT, IN, 2).items() if k != "alpha"}
    source = write(tmp_path / "a.safetensors", FC, tensors, dtype)
    stored = {k: TensorFile(source)[f"toy_own.{FC}.{k}"] for k in tensors}
    want = loha({**f64(stored), "alpha": np.float64(2)})
    unit = 2.0**-8 if dtype == "BF16" else 2.0**-11
    for options in ({}, {"rank": 4}, {"rank": 4, "dtype": "fp32"}):
        have = the_one(expanded(source, tmp_path, **options)[0])[0]
        assert relative(have, want) < (1e-6 if "dtype" in options else 3 * unit)


def test_an_adapter_in_memory(tmp_path: Path) -> None:
    module, tensors, formula, rank = EXACT["LoKr w1 full"]
    source = write(tmp_path / "a.safetensors", module, tensors)
    adapter = lorafmt.open(source)
    plain = adapter.to_lora()
    assert (plain[CANONICAL[module]].kind, plain[CANONICAL[module]].rank) == ("lora", rank)
    want = formula(f64(tensors))
    assert relative(plain[CANONICAL[module]].delta(dtype="float64"), want) < 1e-6
    assert relative(adapter[CANONICAL[module]].delta(dtype="float64"), want) < 1e-12
    cut = lorafmt.expand(adapter, to="expandtoy-own", rank=2)
    assert isinstance(cut, lorafmt.Adapter)
    assert relative(cut[CANONICAL[module]].delta(dtype="float64"), want) < best(want, 2) * (1 + 1e-4)


@pytest.mark.parametrize("name", ["flux_kohya_lokr", "flux_bfl_lokr_consistent", "flux_lycoris_lokr"])
def test_files_of_trainers(name: str, scratch: Path) -> None:
    """Rank 16 of every LoKr of a published key list: to diffusers' names, and no worse than any matrix of that rank."""
    source = oracle.make_file(oracle.thin(oracle.fixture(name)), scratch / f"{name}.safetensors")
    target = scratch / "lora.safetensors"
    report = lorafmt.expand(source, target, to="diffusers", rank=16, dtype="fp32").to_dict()
    assert report["expand"]["left_out"] == 0 and report["tensors"]["used"] == report["tensors"]["in"]
    assert {m["rank_after"] for m in report["expand"]["modules"]} == {16}
    # Singular values of a Kronecker product are the products of those of its factors: the optimum of every module.
    file = TensorFile(source)
    optima = []
    for key in file:
        if key.endswith(".lokr_w1"):
            module = key.removesuffix("lokr_w1")
            t = {k.removeprefix(module): file[k].astype(np.float64) for k in file if k.startswith(module)}
            w2 = t["lokr_w2"] if "lokr_w2" in t else t["lokr_w2_a"] @ t["lokr_w2_b"]
            s = np.outer(*(np.linalg.svd(w, compute_uv=False) for w in (t["lokr_w1"], w2))).ravel()
            s = np.sort(s)[::-1]
            optima.append(float(np.sqrt((s[16:] ** 2).sum() / (s**2).sum())))
    reported = [m["relative_error"] for m in report["expand"]["modules"]]
    # Parts that were cut when they were read have an optimum each.
    if len(reported) == len(optima):
        assert np.allclose(sorted(reported), sorted(optima), rtol=1e-6)
    else:
        assert name == "flux_lycoris_lokr"
    # What is written differs from what was read by what is reported.
    compared = oracle.compare(oracle.reference(source), oracle.reference(target), tolerance=1.0)
    assert not compared.missing and not compared.extra
    errors = {m["module"]: m["relative_error"] for m in report["expand"]["modules"]}
    shared = errors.keys() & compared.errors.keys()
    assert shared
    for module in shared:
        assert compared.errors[module] == pytest.approx(errors[module], rel=1e-4)
