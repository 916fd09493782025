"""Nunchaku's FLUX.1 checkpoints, int4 and nvfp4, opened in diffusers' model with int8 layers.

Everything is looked at before anything is changed: an error leaves the model as it was.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..exceptions import FileError, FormatError, UnsupportedError, UsageError
from . import awq, flux, library, models, stored
from .linear import BranchLinear
from .methods import adaptable
from .ranked import RankedLinear
from .tensorfile import TensorFile, failed

#: Files of an older repository: the blocks, and what is around them.
_BLOCKS_FILE, _REST_FILE = "transformer_blocks.safetensors", "unquantized_layers.safetensors"
#: What the runtime does not need: true factors of layers whose own are ones are read apart.
_UNUSED = ("smooth_orig",)
#: The first parts of what a quantized layer can have.
_PARTS = ("qweight", "wscales", "wtscale", "wcscales", "bias", "smooth", "lora_down", "lora_up")
_HINT = "is the checkpoint for this model, and of Nunchaku's FLUX.1 classes?"


def load_quantized(
    model: nn.Module | Mapping[str, Any] | None,
    checkpoint: str | os.PathLike[str],
    *,
    ranks: int = 96,
    fuse: bool = True,
    weights: Literal["int8", "16bit"] = "int8",
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    family: str | None = None,
    kernels: Literal["auto", "require"] = "auto",
) -> nn.Module:
    """Opens a quantized checkpoint: its 4-bit layers become int8 once, with their branches and room for adapters.

    Args:
        model: a ``FluxTransformer2DModel`` (on the meta device it takes no memory), its configuration, or None for the
            configuration that the checkpoint has in its metadata. A model that is given is changed in place.
        checkpoint: a single file of either generation of names, or a folder with ``transformer_blocks.safetensors``
            and ``unquantized_layers.safetensors``.
        ranks: room for adapters behind the ranks of the base, in each of diffusers' layers.
        fuse: q, k and v stay one layer, whose prologue runs once; otherwise they are split.
        weights: ``16bit`` makes plain layers of the exact 4-bit weights instead, for comparison.
        dtype: of what is computed in 16 bits; by default that of the checkpoint.
        device: where the layers go; by default where the model is, the CPU for one on the meta device.
        family: of the adapters, if they are for a model of other sizes than FLUX.1.
        kernels: ``require`` refuses to go on without the compiled kernels.

    Layers are read and expanded one by one from the mapped file. Returns the model with the methods of
    :class:`lorafmt.runtime.AdapterMethods`.

    Errors: ``not-found``, ``invalid-header``, ``truncated``, ``wrong-checkpoint`` (another model, version or size),
    ``missing-tensor``, ``unknown-key``, ``mixed-precision``, ``bad-native-layout``, ``unsupported-model``,
    ``device-not-available``, ``kernels-unavailable``, ``invalid-argument``.
    """
    if weights not in ("int8", "16bit"):
        raise failed(UsageError, "invalid-argument", f"`weights` is {weights!r}", "one of: int8, 16bit")
    if kernels == "require" and not library.load():
        raise failed(UnsupportedError, "kernels-unavailable", library.status(), 'kernels="auto" computes with torch')
    files = _files(checkpoint)
    opened = Opened(files)
    made = _model(model, opened)
    entry = models.model_of(made)
    if entry is None:
        known = ", ".join(models.MODELS)
        raise failed(UnsupportedError, "unsupported-model", f"no layout for {type(made).__name__}", f"known: {known}")
    target = _device(device, made)
    opened.check(made)
    reader = Reader(opened, made, dtype or opened.dtype(), target, ranks, fuse, weights)
    layers = dict(reader.layers(entry))
    others = dict(reader.others(made, layers))
    _install(made, entry, layers, others)
    models.add_room(made, ranks)
    blocks = next(file.path for file in files if any(key.endswith(".qweight") for key in file))
    return adaptable(made, family=family or entry.family, base=blocks)


def _files(checkpoint: str | os.PathLike[str]) -> list[TensorFile]:
    path = Path(checkpoint)
    if path.is_dir():
        return [TensorFile(path / name) for name in (_BLOCKS_FILE, _REST_FILE) if (path / name).exists()] or [
            TensorFile(path / _BLOCKS_FILE)
        ]
    return [TensorFile(path)]


def _model(model: Any, opened: Opened) -> nn.Module:
    if isinstance(model, nn.Module):
        return model
    config = opened.config() if model is None else model
    if not isinstance(config, Mapping):
        message = f"a model or its configuration, not {type(model).__name__}"
        raise failed(UsageError, "invalid-argument", message, "pass FluxTransformer2DModel or a dict")
    try:
        from diffusers import FluxTransformer2DModel
    except ImportError:
        raise failed(
            UnsupportedError,
            "unsupported-model",
            "diffusers is not installed",
            "pip install diffusers, or pass a model",
        ) from None
    with torch.device("meta"):
        made: nn.Module = FluxTransformer2DModel.from_config(dict(config))
    return made.eval()


def _device(device: torch.device | str | None, model: nn.Module) -> torch.device:
    if device is None:
        first = next(model.parameters(), None)
        return torch.device("cpu") if first is None or first.device.type == "meta" else first.device
    try:
        target = torch.device(device)
        torch.empty(0, device=target)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise failed(
            UsageError, "device-not-available", f"{device}: {reason}", 'device="cpu" loads it without'
        ) from None
    return target


class Opened:
    """The tensors of a checkpoint under the names of the first generation."""

    def __init__(self, files: list[TensorFile]) -> None:
        self.files = files
        self.path = files[0].path
        self.home = {flux.first_generation(key): (file, key) for file in files for key in file}
        self.keys = {name: key for name, (_, key) in self.home.items()}
        #: Layer -> the file it is in.
        self.quantized = {name.removesuffix(".qweight"): file for name, (file, _) in self.home.items() if _is_q(name)}
        if not self.quantized:
            raise self.wrong("no quantized layers")

    def wrong(self, message: str, code: str = "wrong-checkpoint", key: str | None = None) -> FormatError:
        error = failed(FormatError, code, f"{self.path}: {message}", _HINT, path=self.path, key=key)
        assert isinstance(error, FormatError)
        return error

    def __getitem__(self, name: str) -> Tensor:
        file, key = self.home[name]
        return file[key]

    def __contains__(self, name: str) -> bool:
        return name in self.home

    def shape(self, name: str) -> tuple[int, ...]:
        file, key = self.home[name]
        return file.shape(key)

    def dtype(self) -> torch.dtype:
        """The 16-bit type of its scales and branches."""
        types = {self._type(f"{name}.bias") for name in self.quantized if f"{name}.bias" in self}
        types &= {torch.bfloat16, torch.float16}
        return types.pop() if len(types) == 1 else torch.bfloat16

    def _type(self, name: str) -> torch.dtype:
        file, key = self.home[name]
        return file.dtype(key)

    def config(self) -> dict[str, Any]:
        """The configuration in the metadata, or beside the file."""
        text = next((file.metadata["config"] for file in self.files if "config" in file.metadata), None)
        beside = Path(self.path).with_name("config.json")
        if text is None and beside.exists():
            text = beside.read_text(encoding="utf-8")
        try:
            config = json.loads(text or "")
        except ValueError:
            hint = "pass the model or its configuration"
            message = f"{self.path}: no configuration in the metadata"
            raise failed(FileError, "missing-config", message, hint, path=self.path) from None
        return {key: value for key, value in config.items() if not key.startswith("_")}

    def check(self, model: nn.Module) -> None:
        """Whether every layer is there, in one precision, of the model's sizes, and nothing else."""
        said = next((file.metadata["model_class"] for file in self.files if "model_class" in file.metadata), "Flux")
        if "Flux" not in said:
            raise self.wrong(f"it is for {said}")
        expected = self._expected(model)
        surplus = sorted(self.quantized.keys() - expected.keys())
        if surplus:
            raise self.wrong(
                f"{len(surplus)} quantized layers that the model does not have: {surplus[0]}", key=surplus[0]
            )
        precisions: dict[bool, str] = {}
        for name, (rows, columns) in expected.items():
            if name not in self.quantized:
                raise self.wrong(f"`{name}` is missing", "missing-tensor", name)
            if name in self._modulation(model):
                self._check_modulation(name, rows, columns)
                continue
            precisions.setdefault(self._check_layer(name, rows, columns), name)
        if len(precisions) > 1:
            message = f"`{precisions[False]}` is int4 and `{precisions[True]}` is nvfp4"
            raise self.wrong(message, "mixed-precision", precisions[True])
        self._check_rest(model)

    def _expected(self, model: nn.Module) -> dict[str, tuple[int, int]]:
        """Outputs and inputs of each layer that the model needs."""
        sizes: dict[str, tuple[int, int]] = {}
        for kind, number, block in blocks(model):
            for layer in flux.BLOCKS[kind]:
                members = [_linear(block, name) for name in layer.modules]
                rows = sum(member[0] for member in members)
                widths = _widths(layer, members[0][1], rows)
                for source, width in zip(layer.stored, widths, strict=True):
                    sizes[f"{kind}.{number}.{source.name}"] = rows, width
            for name in flux.MODULATION[kind]:
                if f"{kind}.{number}.{name}.qweight" in self or f"{kind}.{number}.{name}.weight" not in self:
                    sizes[f"{kind}.{number}.{name}"] = _linear(block, name)
        return sizes

    def _modulation(self, model: nn.Module) -> set[str]:
        return {f"{kind}.{number}.{name}" for kind, number, _ in blocks(model) for name in flux.MODULATION[kind]}

    def _check_layer(self, name: str, rows: int, columns: int) -> bool:
        """Whether a layer is nvfp4; refuses sizes that are not the model's."""
        for part in ("wscales", "bias", "smooth"):
            if f"{name}.{part}" not in self:
                raise self.wrong(f"`{name}.{part}` is missing", "missing-tensor", f"{name}.{part}")
        padded = -(-rows // 128) * 128, -(-columns // 128) * 128
        have = self.shape(f"{name}.qweight")
        if len(have) != 2 or (have[0], have[1] * 2) != padded or self._type(f"{name}.qweight") != torch.int8:
            message = f"`{name}.qweight` is {list(have)}, for {rows} outputs and {columns} inputs of 4 bits"
            raise self.wrong(message, key=f"{name}.qweight")
        fp4 = self._type(f"{name}.wscales") == torch.float8_e4m3fn
        wanted = {"wscales": padded[0] * padded[1] // (16 if fp4 else 64), "bias": padded[0], "smooth": padded[1]}
        for part, count in wanted.items():
            if torch.Size(self.shape(f"{name}.{part}")).numel() != count:
                message = f"`{name}.{part}` is {list(self.shape(f'{name}.{part}'))}, not {count} values"
                raise self.wrong(message, key=f"{name}.{part}")
        self._check_branch(name, padded)
        return fp4

    def _check_branch(self, name: str, padded: tuple[int, int]) -> None:
        down, up = (self.shape(k) if (k := f"{name}.{side}") in self else (0, 0) for side in ("lora_down", "lora_up"))
        if 0 in down and 0 in up:
            return
        if down[0] != padded[1] or up[0] != padded[0] or down[1:] != up[1:]:
            message = f"the branch of `{name}` is {list(down)} and {list(up)}"
            raise self.wrong(message, key=f"{name}.lora_down")

    def _check_modulation(self, name: str, rows: int, columns: int) -> None:
        for part in ("wscales", "wzeros", "bias"):
            if f"{name}.{part}" not in self:
                raise self.wrong(f"`{name}.{part}` is missing", "missing-tensor", f"{name}.{part}")
        have = self.shape(f"{name}.qweight")
        if have != (rows // 4, columns // 2) or self.shape(f"{name}.bias") != (rows,):
            message = f"`{name}.qweight` is {list(have)}, for {rows} outputs and {columns} inputs of 4 bits"
            raise self.wrong(message, key=f"{name}.qweight")

    def _check_rest(self, model: nn.Module) -> None:
        """Every tensor is part of a quantized layer or is one of the model's."""
        parameters = {name: tuple(value.shape) for name, value in model.state_dict().items()}
        for name in self.home:
            layer, _, part = name.rpartition(".")
            if layer in self.quantized and part in (*_PARTS, *_UNUSED, "wzeros"):
                continue
            if name not in parameters:
                raise self.wrong(f"`{self.keys[name]}` is no part of the model", "unknown-key", self.keys[name])
            if parameters[name] != self.shape(name):
                message = f"`{name}` is {list(self.shape(name))}, and {list(parameters[name])} in the model"
                raise self.wrong(message, key=self.keys[name])


def _is_q(name: str) -> bool:
    return name.endswith(".qweight")


def _linear(block: nn.Module, name: str) -> tuple[int, int]:
    layer = block.get_submodule(name)
    if not isinstance(layer, nn.Linear):
        message = f"{name} is {type(layer).__name__}, not a linear"
        raise failed(UnsupportedError, "unsupported-model", message, "pass a model that was not quantized before")
    return layer.out_features, layer.in_features


def _widths(layer: flux.Layer, columns: int, rows: int) -> list[int]:
    """Inputs of a layer's parts: of two the first, the attention, is as wide as the outputs."""
    return [columns] if len(layer.stored) == 1 else [rows, columns - rows]


def blocks(model: nn.Module) -> Iterator[tuple[str, int, nn.Module]]:
    """Kind, number and module of every block."""
    for kind in flux.BLOCKS:
        for number, block in enumerate(getattr(model, kind)):
            yield kind, number, block


class Reader:
    """Makes layers of a checkpoint's tensors, one after the other."""

    def __init__(
        self,
        opened: Opened,
        model: nn.Module,
        dtype: torch.dtype,
        device: torch.device,
        room: int,
        fuse: bool,
        weights: str,
    ) -> None:
        self._opened, self._model, self._dtype, self._device = opened, model, dtype, device
        self._room, self._fuse, self._weights = room, fuse, weights

    def layers(self, entry: models.Model) -> Iterator[tuple[str, RankedLinear]]:
        """Path and layer of all that is quantized; what stands for several is under the path of its first member."""
        for kind, number, block in blocks(self._model):
            prefix = f"{kind}.{number}"
            factor = self._folded(prefix)
            for layer in flux.BLOCKS[kind]:
                whole = self._whole(prefix, block, layer, factor)
                members = [f"{prefix}.{name}" for name in layer.modules]
                if self._fuse or len(members) == 1:
                    yield members[0], self._made(whole, self._room * len(members))
                    continue
                at = 0
                for name in members:
                    rows = self._model.get_submodule(name).out_features
                    assert isinstance(rows, int)
                    yield name, self._made(whole.rows(at, at + rows), self._room)
                    at += rows
            for name, parts in flux.MODULATION[kind].items():
                if f"{prefix}.{name}" in self._opened.quantized:
                    yield f"{prefix}.{name}", self._modulation(f"{prefix}.{name}", parts)

    def others(self, model: nn.Module, layers: Mapping[str, nn.Module]) -> Iterator[tuple[str, Tensor]]:
        """Name and value of every parameter that is not in a quantized layer; refuses a model that lacks one."""
        covered = [f"{path}." for path in self._covered(layers)]
        for name, value in model.state_dict().items():
            if any(name.startswith(path) for path in covered):
                continue
            if name in self._opened:
                yield name, self._opened[name].clone().to(self._device, self._dtype)
            elif value.is_meta:
                raise self._opened.wrong(f"`{name}` is missing", "missing-tensor", name)
            else:
                yield name, value.detach().to(self._device, self._dtype)

    def _covered(self, layers: Mapping[str, nn.Module]) -> Iterator[str]:
        yield from layers
        for kind, number, _ in blocks(self._model):
            for layer in flux.BLOCKS[kind]:
                yield from (f"{kind}.{number}.{name}" for name in layer.modules)

    def _made(self, layer: stored.Quantized, room: int) -> RankedLinear:
        make = layer.fused if self._weights == "int8" else layer.branch
        return make(room, self._dtype)

    def _whole(self, prefix: str, block: nn.Module, layer: flux.Layer, factor: Tensor | None) -> stored.Quantized:
        sizes = [_linear(block, name) for name in layer.modules]
        rows, columns = sum(size[0] for size in sizes), sizes[0][1]
        read: list[stored.Quantized] = []
        for source, width in zip(layer.stored, _widths(layer, columns, rows), strict=True):
            name = f"{prefix}.{source.name}"
            part = stored.read(
                self._opened.quantized[name], self._opened.keys, name, (rows, width), source.shifted, self._device
            )
            if factor is not None and layer.output and not read:
                part = part.divided(factor)
            read.append(part)
        whole = read[0] if len(read) == 1 else read[0].beside(read[1])
        if factor is not None and layer.values:
            whole = whole.times_rows(factor, rows - sizes[-1][0], rows)
        return whole

    def _folded(self, prefix: str) -> Tensor | None:
        """The factor that the values of a block's attention were divided by, if they were (see the guide of Nunchaku).

        Then the smoothing of the output layer is ones, and the true one is noted beside it. It is undone in both.
        """
        names = [f"{prefix}.out_proj.{part}" for part in ("smooth", "smooth_orig")]
        if not all(name in self._opened for name in names):
            return None
        smooth, original = (stored.vector(self._opened[name]) for name in names)
        if bool((smooth != 1).any()) or bool((original == 1).all()):
            return None
        return original.to(self._device)

    def _modulation(self, name: str, parts: int) -> BranchLinear:
        packed = [self._opened[f"{name}.{part}"].to(self._device) for part in ("qweight", "wscales", "wzeros", "bias")]
        weight = awq.dequantize(*packed[:3])
        bias = awq.without_one(awq.deinterleave(packed[3], parts), parts)
        weight = awq.deinterleave(weight, parts).to(self._dtype)
        return BranchLinear(weight, bias.to(self._dtype), ranks=self._room)


def _install(
    model: nn.Module, entry: models.Model, layers: Mapping[str, RankedLinear], others: Mapping[str, Tensor]
) -> None:
    """Puts everything in its place; nothing here can fail."""
    for path, layer in layers.items():
        parent_name, _, leaf = path.rpartition(".")
        parent = model.get_submodule(parent_name)
        group = next((group for group in entry.fused if group.members[0] == leaf), None)
        old = parent.get_submodule(leaf)
        if group is not None and layer.out_features != old.out_features:
            models.install_fused(parent, entry, group, layer)
        else:
            models.replace_module(model, path, layer)
    for name, value in others.items():
        parent_name, _, leaf = name.rpartition(".")
        model.get_submodule(parent_name).register_parameter(leaf, nn.Parameter(value, requires_grad=False))
