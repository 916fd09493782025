"""What Nunchaku makes of seeded inputs (`tests/golden`), and the rule that explains its bytes.

`diffusers_by_rule` and `native_by_rule` follow the rule from the definition of the files. That they give Nunchaku's
own digests shows that the rule, and with it the oracle's packing, is right; lorafmt has no part in it.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import ModuleType

import numpy as np

import oracle
from native import MLPS, TILE, Base, Layer, interleave, layers_of, modulation_of, pack, unpack
from oracle import LowRank
from tensorfile import Planned, TensorFile, decode, encode, save_planned

FOLDER = Path(__file__).parents[1] / "golden"


@dataclass(frozen=True)
class Tensor:
    """A tensor of a listing. Without a digest only its module's delta is given, not its bytes."""

    dtype: str
    shape: tuple[int, ...]
    digest: str | None

    @classmethod
    def parse(cls, text: str) -> Tensor:
        dtype, shape, digest = text.split(" ")
        return cls(dtype, tuple(int(size) for size in shape.split("x")), None if digest == "value" else digest)


@dataclass(frozen=True)
class Truth:
    """A module's delta in float64: its norm, and four of its entries."""

    shape: tuple[int, int]
    norm: float
    entries: dict[tuple[int, int], float]


Listing = dict[str, Tensor]


class Golden:
    """The listings; inputs are made in `folder` when they are first asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._paths: dict[str, Path] = {}

    @cached_property
    def data(self) -> dict:
        return json.loads((FOLDER / "golden.json").read_text())

    def path(self, name: str) -> Path:
        if name not in self._paths:
            self._paths[name] = _generator().make(self.folder, name, self.data["inputs"][name])
        return self._paths[name]

    def listing(self, operation: str, case: str) -> Listing:
        entry = self.data[operation][case]
        return {name: Tensor.parse(text) for name, text in entry.get("tensors", entry).items()}

    def truth(self, kind: str, name: str) -> dict[str, Truth]:
        """`kind`: `deltas` of an input, or `mix_deltas`."""
        return {module: self._truth(*values) for module, values in self.data[kind][name].items()}

    def _truth(self, shape: str, norm: float, *entries: float) -> Truth:
        rows, columns = (int(size) for size in shape.split("x"))
        places = [(row, column) for row, column in self.data["places"][shape]]
        return Truth((rows, columns), norm, dict(zip(places, entries, strict=True)))


def _generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("golden_inputs", FOLDER / "inputs.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    # Its dataclasses look their own module up.
    sys.modules["golden_inputs"] = module
    spec.loader.exec_module(module)
    return module


def names(operation: str) -> list[str]:
    return list(Golden(Path()).data[operation])


def digest(raw: np.ndarray | bytes) -> str:
    return hashlib.sha256(raw if isinstance(raw, bytes) else np.ascontiguousarray(raw)).hexdigest()


def assert_truth(delta: oracle.Delta, truth: Truth, tolerance: float) -> None:
    """A low-rank delta against the norm and entries of the truth, which no code of this project made."""
    assert delta.shape == truth.shape
    terms = [term for term in delta.terms if isinstance(term, LowRank)]
    assert len(terms) == len(delta.terms)
    up = np.concatenate([term.scale * term.up.astype(np.float64) for term in terms], axis=1)
    down = np.concatenate([term.down.astype(np.float64) for term in terms])
    norm = np.sqrt(np.sum((up.T @ up) * (down @ down.T)))
    assert abs(norm - truth.norm) <= tolerance * truth.norm
    for (row, column), expected in truth.entries.items():
        products = up[row] * down[:, column]
        # Products cancel: an entry is as exact as the sum of their sizes.
        assert abs(products.sum() - expected) <= tolerance * np.abs(products).sum() + 1e-11, (row, column)


# -------------------------------------------------------------------------------- the rule


def folded(term: LowRank, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """(down, up) with the scale in them, rounded once: all of it on down, but for factors of two that balance it."""
    on_down, on_up = abs(term.scale), 1.0
    while 2 * on_down < on_up:
        on_down, on_up = 2 * on_down, on_up / 2
    down = term.down.astype(np.float32) * np.float32(np.copysign(on_down, term.scale))
    return rounded(down, dtype), rounded(term.up.astype(np.float32) * np.float32(on_up), dtype)


def rounded(values: np.ndarray, dtype: str) -> np.ndarray:
    return decode(np.frombuffer(encode(values, dtype), np.uint8), dtype, values.shape)


def pieces(path: Path) -> dict[str, LowRank]:
    """diffusers module -> its part of the file. A block-diagonal up is cut along its diagonal, and down with it."""
    found: dict[str, LowRank] = {}
    fused: dict[int, list[str]] = {}
    for module, delta in oracle.reference(path).items():
        (term,) = delta.terms
        assert isinstance(term, LowRank)
        found[module] = term
        fused.setdefault(id(term.down), []).append(module)
    for modules in fused.values():
        rank = found[modules[0]].down.shape[0]
        share = rank // len(modules)
        slices = [slice(number * share, (number + 1) * share) for number in range(len(modules))]
        if len(modules) == 1 or rank % len(modules) or not _diagonal([found[m].up for m in modules], slices):
            continue
        for module, part in zip(modules, slices, strict=True):
            term = found[module]
            found[module] = LowRank(term.down[part], term.up[:, part], term.scale)
    return {module.removeprefix("transformer."): term for module, term in found.items() if "text" not in module[:5]}


def _diagonal(ups: list[np.ndarray], slices: list[slice]) -> bool:
    return all(not np.delete(up, part, axis=1).any() for up, part in zip(ups, slices, strict=True))


def input_dtype(path: Path) -> str:
    return next(entry.dtype for entry in TensorFile(path).header.values() if len(entry.shape) == 2)


def diffusers_by_rule(path: Path) -> Iterator[tuple[str, np.ndarray, str]]:
    """(key without prefix, values, dtype) of every tensor."""
    dtype = input_dtype(path)
    for module, term in pieces(path).items():
        for side, values in zip("AB", folded(term, dtype), strict=True):
            yield f"{module}.lora_{side}.weight", values, dtype


Pair = tuple[np.ndarray, np.ndarray]


def _joined(parts: list[Pair | None], layer: Layer) -> Pair | None:
    """Parts of a fused layer: one down if theirs are equal, otherwise block-diagonal; absent parts are zero."""
    present = [part for part in parts if part is not None]
    if not present:
        return None
    rows = layer.out // len(parts)
    if len(present) == len(parts) and all(np.array_equal(part[0], present[0][0]) for part in present):
        return present[0][0], np.concatenate([part[1] for part in present])
    down = np.concatenate([part[0] for part in present])
    up = np.zeros((layer.out, down.shape[0]), np.float32)
    column = 0
    for number, part in enumerate(parts):
        if part is not None:
            width = part[1].shape[1]
            up[number * rows : (number + 1) * rows, column : column + width] = part[1]
            column += width
    return down, up


def _padded(pair: Pair, rank: int) -> Pair:
    more = rank - pair[0].shape[0]
    return np.pad(pair[0], ((0, more), (0, 0))), np.pad(pair[1], ((0, 0), (0, more)))


def _up_to_tiles(rank: int) -> int:
    return -(-rank // TILE) * TILE


def _bits(values: np.ndarray, dtype: str) -> np.ndarray:
    return np.frombuffer(encode(values, dtype), "<u2").reshape(values.shape)


def native_by_rule(path: Path, base: Base) -> Iterator[tuple[str, np.ndarray, str]]:
    """(key, stored bits or values, dtype) of every tensor that Nunchaku writes for this file and base."""
    found = pieces(path)
    for block in base.blocks:
        yield from _block_by_rule(block, found, base)
    dtype = input_dtype(path)
    for module, term in found.items():
        if "blocks." not in module:
            for side, values in zip("AB", folded(term, dtype), strict=True):
                yield f"{module}.lora_{side}.weight", values, dtype


def _block_by_rule(block: str, found: dict[str, LowRank], base: Base) -> Iterator[tuple[str, np.ndarray, str]]:
    added: dict[str, Pair | None] = {}
    for layer in layers_of(block):
        branch = base.branch(f"{block}.{layer.name}")
        assert branch
        parts = [found.get(f"{block}.{module}") for module in layer.modules]
        pair = _joined([folded(term, branch.dtype) if term else None for term in parts], layer)
        if pair and layer.modules == ("proj_out",):
            pair = pair[0][:, layer.column : layer.column + layer.in_], pair[1]
        added[layer.name] = pair
    for both in MLPS:
        ranks = [pair[0].shape[0] for name in both if (pair := added.get(name))]
        for name in both:
            if pair := added.get(name):
                added[name] = _padded(pair, max(ranks))
    for name, pair in added.items():
        branch = base.branch(f"{block}.{name}")
        assert branch
        down, up = unpack(branch.down, down=True), unpack(branch.up, down=False)
        if pair:
            down = np.concatenate([down, _bits(pair[0], branch.dtype)])
            up = np.concatenate([up, _bits(pair[1], branch.dtype)], axis=1)
            down, up = _padded((down, up), _up_to_tiles(down.shape[0]))
        yield f"{block}.{name}.lora_down", pack(down, down=True), branch.dtype
        yield f"{block}.{name}.lora_up", pack(up, down=False), branch.dtype
    for name, splits in modulation_of(block).items():
        if term := found.get(f"{block}.{name}"):
            pair = folded(term, "BF16")
            down, up = _padded(pair, _up_to_tiles(pair[0].shape[0]))
            yield f"{block}.{name}.lora_down", _bits(down, "BF16"), "BF16"
            yield f"{block}.{name}.lora_up", _bits(interleave(up, splits), "BF16"), "BF16"


def write_by_rule(target: Path, path: Path, base: Base) -> Path:
    """The native file that Nunchaku would write."""

    def planned(values: np.ndarray, dtype: str) -> Planned:
        content = values.tobytes() if values.dtype == np.uint16 else encode(values, dtype)
        return Planned(dtype, values.shape, lambda: content)

    save_planned(target, {key: planned(values, dtype) for key, values, dtype in native_by_rule(path, base)})
    return target
