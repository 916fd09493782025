"""Tensors of safetensors files, read one by one without copying, and written one by one.

Checkpoints have tens of gigabytes: nothing but the tensor at hand is in memory.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import struct
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..exceptions import FormatError, InputNotFoundError, LorafmtError, OutputExistsError

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}

#: No header of a model is larger; more means that this is no such file.
_LARGEST_HEADER = 100_000_000


def failed(kind: type[LorafmtError], code: str, message: str, hint: str, **where: Any) -> LorafmtError:
    """An error with its code and hint; ``where`` are ``path`` and ``key``."""
    error = kind(message)
    error.code, error.hint = code, hint
    error.path, error.key = where.get("path"), where.get("key")
    return error


class TensorFile(Mapping[str, Tensor]):
    """A file's tensors by key: views of the mapped file, to be copied and never to be written to.

    Raises ``invalid-header`` for what is no such file and ``truncated`` for one that ends before its last tensor.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        try:
            with open(self.path, "rb") as file:
                self._size = os.fstat(file.fileno()).st_size
                header = self._header(file)
                self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except FileNotFoundError:
            raise failed(
                InputNotFoundError, "not-found", f"{self.path}: no such file", "is the path right?", path=self.path
            ) from None
        self.metadata: dict[str, str] = header.pop("__metadata__", {})
        self.entries = {key: self._entry(key, entry) for key, entry in header.items()}

    def _bad(self, code: str, message: str, key: str | None = None) -> LorafmtError:
        hint = "download or copy the file again"
        return failed(FormatError, code, f"{self.path}: {message}", hint, path=self.path, key=key)

    def _header(self, file: Any) -> dict[str, Any]:
        head = file.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else _LARGEST_HEADER
        if length >= _LARGEST_HEADER:
            raise self._bad("invalid-header", "not a safetensors file")
        self._start = 8 + length
        try:
            header = json.loads(file.read(length))
        except ValueError:
            code = "truncated" if self._start > self._size else "invalid-header"
            raise self._bad(code, "the header cannot be read") from None
        if not isinstance(header, dict):
            raise self._bad("invalid-header", "the header is no object")
        return header

    def _entry(self, key: str, entry: Any) -> tuple[torch.dtype, tuple[int, ...], int]:
        try:
            name, shape, (start, stop) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
            count = 1
            for size in shape:
                count *= size
        except (KeyError, TypeError, ValueError):
            raise self._bad("invalid-header", f"`{key}` is not described", key) from None
        dtype = _DTYPES.get(name)
        if dtype is None:
            raise self._bad("invalid-header", f"`{key}` has the element type {name}", key)
        if start < 0 or stop - start != count * dtype.itemsize:
            raise self._bad("invalid-header", f"`{key}` has {stop - start} bytes for {list(shape)} of {name}", key)
        if self._start + stop > self._size:
            raise self._bad("truncated", f"the file ends before `{key}` does", key)
        return dtype, shape, self._start + start

    def shape(self, key: str) -> tuple[int, ...]:
        return self.entries[key][1]

    def dtype(self, key: str) -> torch.dtype:
        return self.entries[key][0]

    def __getitem__(self, key: str) -> Tensor:
        dtype, shape, offset = self.entries[key]
        count = 1
        for size in shape:
            count *= size
        if not count:
            return torch.empty(shape, dtype=dtype)
        with warnings.catch_warnings():
            # The mapping is read-only, and nobody writes to it.
            warnings.filterwarnings("ignore", message=".*not writable.*")
            flat = torch.frombuffer(self._data, dtype=torch.uint8, count=count * dtype.itemsize, offset=offset)
        # An odd place in the file is no place for wider elements.
        return (flat if offset % dtype.itemsize == 0 else flat.clone()).view(dtype).view(shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)


#: Type and shape of a tensor, and what computes it.
Promise = tuple[torch.dtype, tuple[int, ...], Callable[[], Tensor]]


def write(
    path: str | os.PathLike[str], tensors: Mapping[str, Promise], metadata: Mapping[str, str], overwrite: bool
) -> int:
    """Writes a file, computing one tensor after the other; the number of its bytes.

    It appears under its name when it is whole. Raises ``output-exists`` without ``overwrite``.
    """
    target = Path(path)
    if target.exists() and not overwrite:
        raise failed(OutputExistsError, "output-exists", f"{target} exists", "pass `overwrite=True`", path=str(target))
    header, at = _described(tensors, metadata)
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(struct.pack("<Q", len(header)) + header)
            for key, (dtype, shape, compute) in tensors.items():
                value = compute().detach().cpu().contiguous()
                if value.dtype != dtype or tuple(value.shape) != tuple(shape):
                    raise AssertionError(f"{key}: {value.dtype} {tuple(value.shape)} for {dtype} {tuple(shape)}")
                file.write(memoryview(value.view(-1).view(torch.uint8).numpy()))  # type: ignore[arg-type]
        os.chmod(name, 0o666 & ~_umask())
        os.replace(name, target)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)
        raise
    return 8 + len(header) + at


def _described(tensors: Mapping[str, Promise], metadata: Mapping[str, str]) -> tuple[bytes, int]:
    """The header, padded to 8 bytes, and the number of bytes behind it."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    at = 0
    for key, (dtype, shape, _) in tensors.items():
        size = dtype.itemsize
        for length in shape:
            size *= length
        header[key] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % 8), at


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
