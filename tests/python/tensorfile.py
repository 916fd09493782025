"""A minimal safetensors reader and writer in numpy: tests make and read every LoRA dtype without torch.

Values are handed out in the narrowest numpy type that holds them exactly: float32 for each 8-, 16- and 32-bit
float, float64 for F64, integers as they are.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import numpy as np

ITEM_SIZE = {
    "BF16": 2,
    "F16": 2,
    "F32": 4,
    "F64": 8,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "I8": 1,
    "U8": 1,
    "I16": 2,
    "I32": 4,
    "I64": 8,
    "BOOL": 1,
}
PLAIN = {
    "F16": "<f2",
    "F32": "<f4",
    "F64": "<f8",
    "I8": "i1",
    "U8": "u1",
    "I16": "<i2",
    "I32": "<i4",
    "I64": "<i8",
    "BOOL": "?",
}


@lru_cache
def fp8_values(dtype: str) -> np.ndarray:
    """The 256 values of an 8-bit float: sign, exponent, mantissa; subnormals at exponent 0.

    E4M3 (the "fn" variant) has bias 7, no infinities, and one NaN pattern per sign; E5M2 has bias 15, and
    infinities as IEEE 754 has them.
    """
    exponent_bits, mantissa_bits, bias = (4, 3, 7) if dtype == "F8_E4M3" else (5, 2, 15)
    values = np.empty(256, np.float32)
    for code in range(256):
        sign = -1.0 if code & 0x80 else 1.0
        exponent = (code >> mantissa_bits) & ((1 << exponent_bits) - 1)
        fraction = (code & ((1 << mantissa_bits) - 1)) / (1 << mantissa_bits)
        if dtype == "F8_E4M3" and code & 0x7F == 0x7F:
            value = np.nan
        elif dtype == "F8_E5M2" and exponent == 31:
            value = np.nan if fraction else np.inf
        elif exponent == 0:
            value = fraction * 2.0 ** (1 - bias)
        else:
            value = (1 + fraction) * 2.0 ** (exponent - bias)
        values[code] = sign * value
    return values


def encode(values: np.ndarray, dtype: str) -> bytes:
    """Little-endian bytes of `values` in a safetensors dtype, rounding to nearest (ties to even)."""
    if dtype == "BF16":
        bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
        half = np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
        return ((bits + half) >> np.uint32(16)).astype("<u2").tobytes()
    if dtype.startswith("F8"):
        table = fp8_values(dtype)
        codes = np.flatnonzero(np.isfinite(table) & (np.arange(256) < 128))
        grid = table[codes]
        flat = np.abs(np.asarray(values, np.float32)).ravel()
        upper = np.clip(np.searchsorted(grid, flat), 1, len(grid) - 1)
        below, above = flat - grid[upper - 1], grid[upper] - flat
        up = (above < below) | ((above == below) & (codes[upper] % 2 == 0))
        out = codes[np.where(up, upper, upper - 1)].astype(np.uint8)
        return (out | (np.signbit(np.asarray(values, np.float32)).ravel() * np.uint8(0x80))).tobytes()
    return np.ascontiguousarray(values).astype(PLAIN[dtype]).tobytes()


def decode(raw: np.ndarray, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    """The exact values of a tensor's bytes."""
    if dtype == "BF16":
        return (raw.view("<u2").astype(np.uint32) << np.uint32(16)).view(np.float32).reshape(shape)
    if dtype.startswith("F8"):
        return fp8_values(dtype)[raw].reshape(shape)
    values = raw.view(PLAIN[dtype]).reshape(shape)
    return values.astype(np.float32) if dtype == "F16" else values


@dataclass(frozen=True)
class Entry:
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


class TensorFile:
    """A mapped safetensors file: `header`, `metadata`, and tensors decoded on access."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        with self.path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
        self.metadata: dict[str, str] = header.pop("__metadata__", {})
        self.header = {key: Entry(e["dtype"], tuple(e["shape"]), *e["data_offsets"]) for key, e in header.items()}
        self._base = 8 + length
        empty = self.path.stat().st_size == self._base
        self._data = np.empty(0, np.uint8) if empty else np.memmap(self.path, np.uint8, "r")

    def __iter__(self):
        return iter(self.header)

    def __len__(self) -> int:
        return len(self.header)

    def __getitem__(self, key: str) -> np.ndarray:
        entry = self.header[key]
        return decode(np.asarray(self.raw(key)), entry.dtype, entry.shape)

    def raw(self, key: str) -> np.ndarray:
        entry = self.header[key]
        return self._data[self._base + entry.start : self._base + entry.stop]


@dataclass(frozen=True)
class Planned:
    """A tensor to write: `content` makes its first bytes, the rest are zeros that take no room on disk."""

    dtype: str
    shape: tuple[int, ...]
    content: Callable[[], bytes] = bytes

    @property
    def size(self) -> int:
        return ITEM_SIZE[self.dtype] * int(np.prod(self.shape, dtype=np.int64))


def save_planned(path: str | Path, tensors: Mapping[str, Planned], metadata: dict[str, str] | None = None) -> None:
    """Write tensors in the given order, one at a time; what is zero to the end of a tensor becomes a hole."""
    header: dict[str, object] = {"__metadata__": metadata} if metadata else {}
    start = 0
    for key, tensor in tensors.items():
        offsets = [start, start + tensor.size]
        header[key] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": offsets}
        start = offsets[1]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with Path(path).open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        position = file.tell()
        for tensor in tensors.values():
            content = tensor.content()[: tensor.size]
            if content:
                file.seek(position)
                file.write(content)
            position += tensor.size
        file.truncate(position)


def save(path: str | Path, tensors: dict[str, tuple[np.ndarray, str]], metadata: dict[str, str] | None = None) -> None:
    """Write `key -> (values, dtype)` in the given order."""
    planned = {key: Planned(dtype, v.shape, partial(encode, v, dtype)) for key, (v, dtype) in tensors.items()}
    save_planned(path, planned, metadata)
