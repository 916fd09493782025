"""What users pass as an adapter, in the form the native module takes."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from . import _lorafmt
from .exceptions import UsageError

NativeTensor = tuple[str, str, list[int], tuple[int, int, object]]
#: A path, the bytes of a file, a fetched file with its address and whether all beside it came along, or tensors with
#: metadata.
NativeSource = str | bytes | tuple[str, str, bool] | tuple[list[NativeTensor], list[tuple[str, str]]]

#: numpy's name of an element type -> safetensors' name. bfloat16 and FP8 come from the ml_dtypes package.
NUMPY_TO_SAFETENSORS = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint64": "U64",
    "uint32": "U32",
    "uint16": "U16",
    "uint8": "U8",
    "bool": "BOOL",
}


def native_source(src: Any) -> NativeSource:
    """A path, the bytes of a file, or a dict of torch or numpy tensors, without copying contiguous host tensors."""
    if isinstance(src, bytes):
        return src
    if isinstance(src, bytearray | memoryview):
        return bytes(src)
    if isinstance(src, str | os.PathLike):
        path = os.fspath(src)
        if isinstance(path, str):
            return path
    if isinstance(src, Mapping):
        return [_native_tensor(key, value) for key, value in src.items()], []
    raise usage_error(f"cannot read an adapter from {type(src).__name__}", "pass a path, bytes, or a dict of tensors")


@contextmanager
def located(src: Any, options: Mapping[str, Any] | None = None) -> Iterator[NativeSource]:
    """The same, where an address is one, too: what is elsewhere is fetched, and may be gone when this ends.

    ``options`` are those of a hub (:class:`lorafmt.hub.HubOptions`). A path that exists is never an address.
    """
    from . import hub

    chosen = hub.checked(dict(options or {}))
    text = os.fspath(src) if isinstance(src, str | os.PathLike) else None
    if not isinstance(text, str):
        if chosen:
            raise usage_error(f"`{next(iter(chosen))}` is about a repository", "pass the name of one")
        yield native_source(src)
        return
    if os.path.exists(text):
        inside = [chosen[name] for name in ("subfolder", "weight_name") if name in chosen]
        yield os.path.join(text, *inside)
        return
    address = _lorafmt.address(text, bool(chosen))
    if address is None:
        yield text
    elif address[0] == "hf":
        _, repo, revision, path = address
        yield hub.fetch(repo, revision, path, chosen)
    else:
        from . import storage

        # What is mapped stays readable without its name, but not on Windows: there the system tidies up.
        folder = tempfile.mkdtemp(prefix="lorafmt-")
        try:
            yield storage.fetch(text, folder), text, True
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def on_hub(src: Any, options: Mapping[str, Any] | None = None) -> str | None:
    """The whole address of what is on a hub, where nothing but its place is said of it; None for all else."""
    from . import hub

    chosen = hub.checked(dict(options or {}))
    place = chosen.keys() <= {"weight_name", "subfolder", "revision"}
    if not place or not isinstance(src, str) or os.path.exists(src):
        return None
    address = _lorafmt.address(src, bool(chosen))
    if address is None or address[0] != "hf":
        return None
    _, repo, revision, path = address
    return hub.address(repo, *hub.place(revision, path, chosen))


def usage_error(message: str, hint: str) -> UsageError:
    """An error about an argument, as the native module makes them."""
    error = UsageError(message)
    error.code, error.hint = "invalid-argument", hint
    return error


def _native_tensor(key: Any, value: Any) -> NativeTensor:
    if not isinstance(key, str):
        raise usage_error(f"keys are strings, not {type(key).__name__}", "pass a state dict")
    if type(value).__module__.partition(".")[0] == "torch":
        value = value.detach().cpu().contiguous()
        dtype = _torch_name(value.dtype)
        return key, dtype, list(value.shape), (value.data_ptr(), value.numel() * value.element_size(), value)
    if hasattr(value, "__array_interface__"):
        import numpy

        value = numpy.ascontiguousarray(value).reshape(numpy.shape(value))
        dtype = NUMPY_TO_SAFETENSORS.get(value.dtype.name)
        if dtype is None or not value.dtype.isnative:
            raise usage_error(f"`{key}` has the dtype {value.dtype}", "use one that safetensors knows")
        return key, dtype, list(value.shape), (value.__array_interface__["data"][0], value.nbytes, value)
    raise usage_error(f"`{key}` is {type(value).__name__}", "values are torch or numpy tensors")


def _torch_name(dtype: Any) -> str:
    name = str(dtype).removeprefix("torch.")
    found = NUMPY_TO_SAFETENSORS.get(name)
    if found is None:
        raise usage_error(f"torch.{name} cannot be stored", "use an element type that safetensors knows")
    return found


def framework_of(src: Any) -> str | None:
    """``torch`` or ``numpy`` if the source is a dict of such tensors, else None."""
    if not isinstance(src, Mapping) or not src:
        return None
    first = next(iter(src.values()))
    return "torch" if type(first).__module__.partition(".")[0] == "torch" else "numpy"


def fill_numpy(plan: _lorafmt.Plan) -> dict[str, Any]:
    """Computes a plan into new numpy arrays. Without ml_dtypes, bfloat16 and FP8 come as uint16 and uint8 bits."""
    import numpy

    names = {v: k for k, v in NUMPY_TO_SAFETENSORS.items()}

    def dtype_of(name: str) -> Any:
        try:
            return numpy.dtype(names[name])
        except TypeError:
            pass
        try:
            import ml_dtypes
        except ImportError:
            return numpy.dtype("uint16" if name == "BF16" else "uint8")
        return numpy.dtype(getattr(ml_dtypes, names[name]))

    arrays = {key: numpy.empty(shape, dtype_of(dtype)) for key, dtype, shape in plan.tensors()}
    plan.fill([(a.__array_interface__["data"][0], a.nbytes, a) for a in arrays.values()])
    return arrays


def fill_torch(plan: _lorafmt.Plan, device: Any = "cpu", out: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Computes a plan into new torch tensors, or those of ``out`` that fit, and moves them to ``device``."""
    import torch

    names = {v: k for k, v in NUMPY_TO_SAFETENSORS.items()}

    def place(key: str, dtype: str, shape: list[int]) -> Any:
        wanted = getattr(torch, names[dtype])
        have = None if out is None else out.get(key)
        if have is not None and have.dtype == wanted and list(have.shape) == shape and have.device.type == "cpu":
            return have.contiguous()
        return torch.empty(shape, dtype=wanted)

    tensors = {key: place(key, dtype, shape) for key, dtype, shape in plan.tensors()}
    plan.fill([(t.data_ptr(), t.numel() * t.element_size(), t) for t in tensors.values()])
    if str(device) == "cpu":
        return tensors
    return {key: tensor.to(device) for key, tensor in tensors.items()}
