"""What a FLUX.1 or Chroma LoRA file means, computed in float64 straight from the definition of each kind.

lorafmt is held to this module: it shares no code and no table with it. Kinds, with W of shape [out, in]:

* LoRA: dW = scale * up @ down; scale = alpha / rank (alpha / sqrt(rank) under rsLoRA), rank = rows of down.
* LoHa: dW = scale * (w1_a @ w1_b) * (w2_a @ w2_b), elementwise; rank = rows of w1_b.
* LoKr: dW = scale * kron(w1, w2); a factor may itself be a product. Without a decomposed factor the scale is
  1, otherwise alpha / rank with the rank of the decomposed one (w2 before w1).
* full: dW = diff; bias deltas are `diff_b`, or `lora_B.bias` which PEFT multiplies with the LoRA's scale.
* norms of control LoRAs replace the parameter; DoRA keeps a magnitude, per row or per column, beside a LoRA.

alpha comes from the module's own tensor, else from the header, else from adapter_config.json beside the file,
else it is the rank.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

import flux_map
from flux_map import Target
from tensorfile import TensorFile, save

FIXTURES = Path(__file__).parents[1] / "fixtures"
CHUNK_ROWS = 1024


# -------------------------------------------------------------------------------- deltas


@dataclass(frozen=True)
class LowRank:
    """scale * up @ down. Factors keep the file's values; arithmetic is in float64."""

    down: np.ndarray
    up: np.ndarray
    scale: float

    @property
    def shape(self) -> tuple[int, int]:
        return self.up.shape[0], self.down.shape[1]

    def take(self, rows: Rows) -> LowRank:
        return replace(self, up=self.up[rows])

    def rows(self, start: int, stop: int) -> np.ndarray:
        return self.scale * (self.up[start:stop].astype(np.float64) @ self.down.astype(np.float64))


@dataclass(frozen=True)
class Kron:
    """scale * kron(w1, w2), and which of its rows belong to the module."""

    w1: np.ndarray
    w2: np.ndarray
    scale: float
    index: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))

    def __post_init__(self) -> None:
        if not self.index.size:
            object.__setattr__(self, "index", np.arange(self.w1.shape[0] * self.w2.shape[0]))

    @property
    def shape(self) -> tuple[int, int]:
        return self.index.size, self.w1.shape[1] * self.w2.shape[1]

    def take(self, rows: Rows) -> Kron:
        return replace(self, index=self.index[rows])

    def rows(self, start: int, stop: int) -> np.ndarray:
        first, second = np.divmod(self.index[start:stop], self.w2.shape[0])
        product = (self.scale * self.w1)[first][:, :, None] * self.w2[second][:, None, :]
        return product.reshape(len(first), -1)


@dataclass(frozen=True)
class Hadamard:
    """scale * (a1 @ b1) * (a2 @ b2)."""

    a1: np.ndarray
    b1: np.ndarray
    a2: np.ndarray
    b2: np.ndarray
    scale: float

    @property
    def shape(self) -> tuple[int, int]:
        return self.a1.shape[0], self.b1.shape[1]

    def take(self, rows: Rows) -> Hadamard:
        return replace(self, a1=self.a1[rows], a2=self.a2[rows])

    def rows(self, start: int, stop: int) -> np.ndarray:
        return self.scale * (self.a1[start:stop] @ self.b1) * (self.a2[start:stop] @ self.b2)


@dataclass(frozen=True)
class Full:
    """A tensor taken as it is: a weight, bias or norm delta, a parameter to set, or a DoRA magnitude."""

    values: np.ndarray
    scale: float = 1.0

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    def take(self, rows: Rows) -> Full:
        return replace(self, values=self.values[rows])

    def rows(self, start: int, stop: int) -> np.ndarray:
        return self.scale * self.values[start:stop].astype(np.float64)


Term = LowRank | Kron | Hadamard | Full
Rows = np.ndarray | slice


@dataclass
class Delta:
    """The sum of one module's contributions."""

    terms: list[Term] = field(default_factory=list)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.terms[0].shape

    def dense(self) -> np.ndarray:
        return sum_rows(self.terms, 0, self.shape[0])


Reference = dict[str, Delta]
"""Module -> delta. What is no weight delta has a mark after the name: `#bias`, `#set` (a norm that is
replaced), `#magnitude` and `#magnitude_in` (DoRA, per row or per column)."""


def sum_rows(terms: list[Term], start: int, stop: int) -> np.ndarray:
    return np.sum([term.rows(start, stop) for term in terms], axis=0)


# -------------------------------------------------------------------------------- keys

# Slot -> suffix. PEFT may put an adapter's name before `.weight`.
_NAME = r"(?:\.(?P<adapter>[^.]+))?"
_SLOTS = [
    (slot, re.compile(rf"^(?P<path>.*?){suffix}$"))
    for slot, suffix in [
        ("mid", r"\.lora_mid\.weight"),
        ("down", r"(?:(?<=to_[qkv])|(?<=to_out))_lora\.down\.weight"),
        ("up", r"(?:(?<=to_[qkv])|(?<=to_out))_lora\.up\.weight"),
        ("down", r"\.lora_down\.weight"),
        ("up", r"\.lora_up\.weight"),
        ("down", r"\.lora_linear_layer\.down\.weight"),
        ("up", r"\.lora_linear_layer\.up\.weight"),
        ("down", r"(?:(?<=qkv_lora)|(?<=proj_lora)|(?<=_lora[12]))\.down\.weight"),
        ("up", r"(?:(?<=qkv_lora)|(?<=proj_lora)|(?<=_lora[12]))\.up\.weight"),
        ("down", r"\.lora\.down\.weight"),
        ("up", r"\.lora\.up\.weight"),
        ("lora_bias", rf"\.lora_B{_NAME}\.bias"),
        ("down", rf"\.lora_A{_NAME}\.weight"),
        ("up", rf"\.lora_B{_NAME}\.weight"),
        ("down", r"\.lora_A"),
        ("up", r"\.lora_B"),
        ("magnitude", r"\.lora_magnitude_vector(?:\.(?!weight)(?P<adapter>[^.]+))?(?:\.weight)?"),
        ("magnitude", r"\.dora_scale"),
        ("alpha", r"\.alpha"),
        ("diff_b", r"\.(?:diff_b|b_norm)"),
        ("diff", r"(?:\.scale)?\.(?:diff|diff_m|w_norm)"),
        ("reshape", r"\.reshape_weight"),
        ("set", r"(?:\.scale)?\.set_weight"),
        ("set", r"(?<=_norm)\.scale"),
        ("set", r"(?:(?<=\.norm_[qk])|(?<=_added_[qk]))\.weight"),
        *((name, rf"\.{name}") for name in ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b")),
        *((name, rf"\.{name}") for name in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")),
    ]
]


class UnknownKey(ValueError):
    """A key that this module cannot place: a mistake of the file's writer, or of this module."""


def split_key(key: str) -> tuple[str, str, str | None]:
    """Key -> (module path with its prefix, slot, adapter name)."""
    for slot, pattern in _SLOTS:
        if match := pattern.match(key):
            return match["path"], slot, match.groupdict().get("adapter")
    raise UnknownKey(key)


# -------------------------------------------------------------------------------- alpha


@dataclass
class Side:
    """alpha as a header or an adapter_config.json gives it for one component."""

    alpha: float | None = None
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    rslora: bool = False

    def for_module(self, path: str) -> float | None:
        for pattern, alpha in self.alpha_pattern.items():
            # PEFT: the pattern is the name's tail, from the start of a dotted part.
            if re.match(rf"(.*\.)?({pattern})$", path):
                return float(alpha)
        return self.alpha


def _side(config: dict[str, Any], prefix: str = "") -> Side:
    alpha = config.get(f"{prefix}lora_alpha")
    return Side(
        None if alpha is None else float(alpha),
        config.get(f"{prefix}alpha_pattern") or {},
        bool(config.get(f"{prefix}use_rslora")),
    )


def _header_side(metadata: dict[str, str], component: str) -> Side | None:
    if text := metadata.get("lora_adapter_metadata"):
        config = json.loads(text)
        for prefix in (f"{component}.", ""):
            if f"{prefix}lora_alpha" in config:
                return _side(config, prefix)
    for name in (f"{component}.lora_alpha", "lora_alpha", "network_alpha", "alpha"):
        if name in metadata:
            return Side(float(metadata[name]), rslora=metadata.get("use_rslora", "").lower() == "true")
    return None


def _scale(alpha: float | None, side: Side | None, path: str, rank: int) -> float:
    if alpha is not None:
        # An alpha tensor is always meant over the rank: LyCORIS stores alpha * sqrt(rank) for rsLoRA.
        return alpha / rank
    if side is None or (alpha := side.for_module(path)) is None:
        return 1.0
    return alpha / (math.sqrt(rank) if side.rslora else rank)


# -------------------------------------------------------------------------------- reading


def _f64(values: np.ndarray) -> np.ndarray:
    return values.astype(np.float64)


def _factor(slots: dict[str, np.ndarray], name: str) -> np.ndarray:
    if name in slots:
        return _f64(slots[name])
    return _f64(slots[f"{name}_a"]) @ _f64(slots[f"{name}_b"])


def _matrix(values: np.ndarray) -> np.ndarray:
    """Of a convolution, and of a linear layer stored as one: channels and kernel side by side."""
    return values.reshape(values.shape[0], -1)


def _terms(slots: dict[str, np.ndarray], side: Side | None, path: str) -> Iterator[tuple[str, Term]]:
    """One source module's contributions, each with the `#` part of its name."""
    alpha = float(slots["alpha"].reshape(-1)[0]) if "alpha" in slots else None
    scale = 1.0
    if "down" in slots or "up" in slots:
        down, up = _matrix(slots["down"]), _matrix(slots["up"])
        scale = _scale(alpha, side, path, down.shape[0])
        if "mid" in slots:
            # LyCORIS, functional/general.py, rebuild_tucker: the core has the kernel.
            core = np.einsum("pq...,qj->pj...", _f64(slots["mid"]), _f64(down))
            down = core.reshape(core.shape[0], -1)
        yield "", LowRank(down, up, scale)
    if "hada_w1_b" in slots:
        rank = slots["hada_w1_b"].shape[0]
        a1, b1, a2, b2 = (_f64(slots[f"hada_{name}"]) for name in ("w1_a", "w1_b", "w2_a", "w2_b"))
        yield "", Hadamard(a1, b1, a2, b2, _scale(alpha, side, path, rank))
    if any(slot.startswith("lokr") for slot in slots):
        split = slots.get("lokr_w2_b", slots.get("lokr_w1_b"))
        kron_scale = 1.0 if split is None else _scale(alpha, side, path, split.shape[0])
        yield "", Kron(_factor(slots, "lokr_w1"), _factor(slots, "lokr_w2"), kron_scale)
    if "diff" in slots:
        yield "", Full(_matrix(slots["diff"]) if slots["diff"].ndim > 1 else slots["diff"])
    if "lora_bias" in slots:
        yield "#bias", Full(slots["lora_bias"], scale)
    if "diff_b" in slots:
        yield "#bias", Full(slots["diff_b"])
    if "set" in slots:
        yield "#set", Full(slots["set"])
    if "magnitude" in slots:
        values = slots["magnitude"]
        by_column = values.ndim > 1 and values.shape[0] == 1
        yield ("#magnitude_in" if by_column else "#magnitude"), Full(values.reshape(-1))


def _rows(target: Target, out: int) -> Rows | None:
    if target.swap_halves:
        return np.roll(np.arange(out), out // 2)
    return None if target.stop is None else slice(target.start, target.stop)


def locate(path: str | Path) -> tuple[Path, Path]:
    """A LoRA file, or the file in a PEFT folder; and where its adapter_config.json would be."""
    path = Path(path)
    file = path / "adapter_model.safetensors" if path.is_dir() else path
    return file, file.parent / "adapter_config.json"


def reference(path: str | Path, names: Any = flux_map) -> Reference:
    """Every module's delta. A key that has no place raises `UnknownKey`: nothing is left out unseen."""
    file, config = locate(path)
    tensors = TensorFile(file)
    side = _side(json.loads(config.read_text())) if config.exists() else None
    return meaning(tensors, tensors.metadata, side, names)


def meaning(
    tensors: TensorFile | Mapping[str, np.ndarray],
    metadata: dict[str, str],
    config_side: Side | None,
    names: Any = flux_map,
) -> Reference:
    """The same of tensors by themselves, and what is known of alpha from outside them.

    `names` has `resolve` and `shapes` of the model's family.
    """
    modules: dict[str, dict[str, np.ndarray]] = {}
    adapters: set[str | None] = set()
    for key in tensors:
        source, slot, adapter = split_key(key)
        slots = modules.setdefault(source, {})
        assert slot not in slots, f"{key}: second {slot} of one module"
        slots[slot] = tensors[key]
        adapters.add(adapter)
    assert len(adapters - {None}) <= 1, f"more than one adapter: {adapters}"

    result: Reference = {}
    for source, slots in modules.items():
        found = names.resolve(source)
        if found is None:
            raise UnknownKey(f"{source} ({', '.join(slots)})")
        targets, dotted = found
        component = targets[0].module.split(".")[0]
        side = _header_side(metadata, component) or config_side
        if component.startswith("text_encoder"):
            # Encoders stand beside the model, and may have equal names: patterns name the component, or need not.
            dotted = f"{component}.{dotted}"
        for suffix, term in _terms(slots, side, dotted):
            for target in targets:
                rows = None if suffix == "#magnitude_in" else _rows(target, term.shape[0])
                part = term if rows is None else term.take(rows)
                _check_shape(names.shapes, target.module, suffix, part)
                result.setdefault(target.module + suffix, Delta()).terms.append(part)
    return result


def _check_shape(shapes: dict[str, tuple[int, tuple[int, ...]]], module: str, suffix: str, term: Term) -> None:
    if module not in shapes:
        return
    out, widths = shapes[module]
    if suffix == "" and len(term.shape) == 2:
        assert term.shape[0] == out, f"{module}: {term.shape}"
        assert not widths or term.shape[1] in widths, f"{module}: {term.shape}"
    elif suffix in ("#bias", "#magnitude"):
        assert term.shape == (out,), f"{module}{suffix}: {term.shape}"


# -------------------------------------------------------------------------------- comparing


@dataclass
class Comparison:
    """Relative Frobenius errors of the modules in both; modules that only one side has, if not zero."""

    errors: dict[str, float]
    missing: list[str]
    extra: list[str]
    tolerance: float

    @property
    def worst(self) -> float:
        return max(self.errors.values(), default=0.0)

    @property
    def wrong(self) -> dict[str, float]:
        return {module: error for module, error in self.errors.items() if not error <= self.tolerance}

    def __bool__(self) -> bool:
        return not (self.missing or self.extra or self.wrong)

    def __str__(self) -> str:
        wrong = sorted(self.wrong.items(), key=lambda item: -item[1])
        return (
            f"{len(self.errors)} compared, {len(wrong)} wrong {wrong[:5]}, "
            f"{len(self.missing)} missing {self.missing[:5]}, {len(self.extra)} extra {self.extra[:5]}"
        )


def _low_rank_norm(terms: list[LowRank]) -> float:
    """|sum of scale * up @ down|: the R factors of the stacked ups and downs have the same product norm."""
    up = np.concatenate([_f64(term.up) * term.scale for term in terms], axis=1)
    down = np.concatenate([_f64(term.down) for term in terms], axis=0)
    left: np.ndarray = np.linalg.qr(up, mode="r")  # type: ignore[assignment]
    right: np.ndarray = np.linalg.qr(down.T, mode="r")  # type: ignore[assignment]
    return float(np.linalg.norm(left @ right.T))


def norm(terms: list[Term]) -> float:
    """Frobenius norm of a sum of terms."""
    if not terms:
        return 0.0
    low_rank = [term for term in terms if isinstance(term, LowRank)]
    if len(low_rank) == len(terms):
        return _low_rank_norm(low_rank)
    out = terms[0].shape[0]
    squares = 0.0
    for start in range(0, out, CHUNK_ROWS):
        squares += float(np.square(sum_rows(terms, start, min(start + CHUNK_ROWS, out))).sum())
    return math.sqrt(squares)


def _same(first: Delta, second: Delta) -> bool:
    """One term each, with equal factors and scale: equal without arithmetic."""
    if len(first.terms) != 1 or len(second.terms) != 1 or type(first.terms[0]) is not type(second.terms[0]):
        return False
    ours, theirs = vars(first.terms[0]), vars(second.terms[0])
    return all(np.array_equal(ours[name], theirs[name]) for name in ours)


def relative_error(expected: Delta, actual: Delta) -> float:
    if expected.shape != actual.shape:
        return math.inf
    if _same(expected, actual):
        return 0.0
    negated = [replace(term, scale=-term.scale) for term in actual.terms]
    difference, size = norm(expected.terms + negated), norm(expected.terms)
    return difference / size if size else (0.0 if difference == 0.0 else math.inf)


def compare(expected: Reference, actual: Reference, tolerance: float = 1e-6) -> Comparison:
    """Module by module. A module that one side lacks counts only if the other's delta is not zero.

    A set norm and a DoRA magnitude are replacements, not deltas: there a zero counts as well.
    """
    errors = {module: relative_error(delta, actual[module]) for module, delta in expected.items() if module in actual}

    def only_in(one: Reference, other: Reference) -> list[str]:
        return [m for m in one if m not in other and ("#set" in m or "#magnitude" in m or norm(one[m].terms) > 0)]

    return Comparison(errors, only_in(expected, actual), only_in(actual, expected), tolerance)


# -------------------------------------------------------------------------------- sums of adapters


def widened(delta: Delta, width: int) -> Delta:
    """With zero columns up to an input width: what an adapter for 64 channels does to an embedder of 128."""

    def wide(term: Term) -> Term:
        if not isinstance(term, LowRank) or term.down.shape[1] == width:
            return term
        columns = np.zeros((term.down.shape[0], width), term.down.dtype)
        columns[:, : term.down.shape[1]] = term.down
        return replace(term, down=columns)

    return Delta([wide(term) for term in delta.terms])


def mixed(parts: Iterable[tuple[Reference, float]]) -> Reference:
    """The sum of strength * delta. A parameter that is replaced is not scaled."""
    result: Reference = {}
    for reference, strength in parts:
        for module, delta in reference.items():
            factor = 1.0 if "#set" in module else strength
            terms = [replace(term, scale=term.scale * factor) for term in delta.terms]
            result.setdefault(module, Delta()).terms.extend(terms)
    for module, delta in result.items():
        if "#" not in module:
            result[module] = widened(delta, max(term.shape[1] for term in delta.terms))
    return result


# -------------------------------------------------------------------------------- making files


def fixture(name: str) -> dict[str, Any]:
    return json.loads((FIXTURES / f"{name}.json").read_text())


def thin(listing: dict[str, Any], blocks: tuple[int, ...] = (0, 11, 18, 37)) -> dict[str, Any]:
    """The listing with these block (and text encoder layer) numbers only, as a partial file has them."""
    number = re.compile(r"(?:blocks|layers|block)[._](\d+)")
    tensors = {
        key: shape
        for key, shape in listing["tensors"].items()
        if not (match := number.search(key)) or int(match[1]) in blocks
    }
    return {**listing, "tensors": tensors or listing["tensors"]}


_RANK_AXIS = {
    "down": 0,
    "up": 1,
    "lokr_w1_a": 1,
    "lokr_w1_b": 0,
    "lokr_w2_a": 1,
    "lokr_w2_b": 0,
    "hada_w1_a": 1,
    "hada_w1_b": 0,
    "hada_w2_a": 1,
    "hada_w2_b": 0,
}


def _shrunk(rank: int, divisor: int, parts: int) -> int:
    return parts * max(1, rank // parts // divisor)


def random_alpha(rng: np.random.Generator, rank: int) -> float:
    """Not the rank, and not only powers of two apart from it."""
    return float(rng.choice([a for a in (0.5, 1, 1.5, 2, 3, 4, 6, 8, 12, 20, 24, 32, 48) if a != rank]))


def make_file(
    source: str | dict[str, Any],
    path: str | Path,
    *,
    dtype: str = "F32",
    seed: int = 0,
    shrink_rank: int | None = None,
) -> Path:
    """Fill a fixture's shapes with seeded values.

    `shrink_rank` divides every rank; at least 1 stays, and in block-diagonal modules 1 for each part.
    """
    listing = fixture(source) if isinstance(source, str) else source
    rng = np.random.default_rng([seed, sum(listing["name"].encode())])
    divisor = shrink_rank or 1
    diagonal: dict[str, list[int]] = listing.get("block_diagonal_up", {})
    ranks: dict[str, int] = {}
    keys = [(key, *split_key(key)[:2], tuple(shape)) for key, shape in listing["tensors"].items()]
    for _, module, slot, shape in keys:
        if slot in _RANK_AXIS:
            ranks[module] = _shrunk(shape[_RANK_AXIS[slot]], divisor, len(diagonal.get(module, [0])))

    tensors: dict[str, tuple[np.ndarray, str]] = {}
    for key, module, slot, full_shape in keys:
        shape = full_shape
        if slot in _RANK_AXIS:
            sizes = list(full_shape)
            sizes[_RANK_AXIS[slot]] = ranks[module]
            shape = tuple(sizes)
        elif slot == "mid":
            shape = (ranks[module], ranks[module], *full_shape[2:])
        if slot == "alpha":
            values = np.full(shape, random_alpha(rng, ranks.get(module, 1)), np.float32)
        else:
            values = rng.standard_normal(shape, np.float32) * np.float32(0.02)
        if slot == "set":
            values += np.float32(1)
        if slot == "up" and module in diagonal:
            values *= block_mask(diagonal[module], shape[1])
        tensors[key] = values, dtype
    path = Path(path)
    save(path, tensors, listing.get("metadata"))
    if config := listing.get("adapter_config"):
        config = {**config, "r": _shrunk(config["r"], divisor, 1)}
        (path.parent / "adapter_config.json").write_text(json.dumps(config))
    return path


def block_mask(parts: list[int], rank: int) -> np.ndarray:
    """1 on the diagonal blocks of an up matrix [sum(parts), rank], 0 elsewhere."""
    mask = np.zeros((sum(parts), rank), np.float32)
    start, width = 0, rank // len(parts)
    for i, rows in enumerate(parts):
        mask[start : start + rows, i * width : (i + 1) * width] = 1
        start += rows
    return mask
