"""Checkpoints in Nunchaku's layout from 16-bit FLUX.1 transformers, for tests and for those who have no other.

Rounded to the nearest; smoothing only by maxima that the caller measured. That is a sound checkpoint, but not what the
calibration of SVDQuant makes: expect more error than of a published one.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..exceptions import FormatError, UnsupportedError, UsageError
from . import awq, flux, nunchaku
from .linear import sixteen
from .quantize import leading
from .ranked import up_to
from .tensorfile import Promise, TensorFile, failed, write

#: Smoothing factors are between these.
_LEAST, _MOST = 2.0**-6, 2.0**6


@dataclass(frozen=True)
class Job:
    """A quantized layer to be: rows of some weights one below the other, and some of their columns."""

    name: str
    modules: tuple[str, ...]
    columns: slice
    shifted: bool
    bias: bool


def quantize_checkpoint(
    model: nn.Module | str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    rank: int = 32,
    maxima: Mapping[str, Tensor] | None = None,
    alpha: float = 0.5,
    modulation: bool = True,
    overwrite: bool = False,
    progress: Callable[[int, int], object] | None = None,
) -> Path:
    """Writes a FLUX.1 transformer as Nunchaku's first generation has it: int4 in groups of 64, and a 16-bit branch.

    Args:
        model: a ``FluxTransformer2DModel``, or a folder or file of its weights in diffusers' names.
        out: the file to write; it appears when it is whole.
        rank: of the branch, the largest singular directions of the smoothed weight; a multiple of 16.
        maxima: the largest magnitude of each input of a module, by its path (for q, k and v that of ``to_q``), from
            which smoothing factors are made: ``maxima^alpha / largest weight^(1 - alpha)`` (SmoothQuant, formula 4).
            Modules without are not smoothed.
        modulation: modulation layers in 4 bits, too (16-bit inputs); otherwise they stay as they are.
        progress: called with layers done and layers to do.

    One layer is in memory at a time. No weight of the residual is off by more than half a scale and its rounding.

    Errors: ``invalid-argument``, ``wrong-checkpoint``, ``missing-tensor``, ``output-exists``, ``unsupported-model``.
    """
    promises, config = promised(model, rank, maxima, alpha, modulation, progress)
    write(out, promises, _metadata(config, rank), overwrite)
    return Path(out)


def promised(
    model: nn.Module | str | os.PathLike[str],
    rank: int,
    maxima: Mapping[str, Tensor] | None,
    alpha: float,
    modulation: bool,
    progress: Callable[[int, int], object] | None,
) -> tuple[dict[str, Promise], dict[str, Any]]:
    """The tensors of :func:`quantize_checkpoint`, not computed yet, and the model's configuration."""
    if rank < 16 or rank % 16:
        raise failed(UsageError, "invalid-argument", f"a rank of {rank}", "a multiple of 16")
    if not 0 <= alpha <= 1:
        raise failed(UsageError, "invalid-argument", f"an alpha of {alpha}", "from 0 to 1")
    weights, config = _source(model)
    jobs = list(_jobs(weights))
    if not jobs:
        message = "no blocks of a FLUX.1 transformer in diffusers' names"
        raise failed(FormatError, "wrong-checkpoint", message, "convert original checkpoints with diffusers first")
    modules = {module for job in jobs for module in job.modules}
    _check_maxima(weights, maxima or {})
    maker = Maker(weights, rank, maxima or {}, alpha, progress, len(jobs))
    promises: dict[str, Promise] = {}
    for job in jobs:
        promises.update(maker.layer(job))
    modulations = set(_modulations(weights)) if modulation else set()
    for name, parts in sorted(modulations):
        promises.update(maker.modulation(name, parts))
    promises.update(maker.rest(modules | {name for name, _ in modulations}))
    return promises, config


def _check_maxima(weights: Mapping[str, Tensor], maxima: Mapping[str, Tensor]) -> None:
    """Those of layers that are not smoothed are allowed: whoever measures, measures all."""
    for name, values in maxima.items():
        weight = f"{name}.weight"
        if weight not in weights:
            hint = "maxima stand under the paths of layers, such as `transformer_blocks.0.attn.to_q`"
            raise failed(UsageError, "invalid-argument", f"maxima for `{name}`, which is no layer", hint, key=name)
        inputs = weights[weight].shape[-1]
        if weights[weight].dim() == 2 and values.numel() != inputs:
            message = f"{values.numel()} maxima for `{name}`, which has {inputs} inputs"
            raise failed(UsageError, "invalid-argument", message, "one for each input", key=name)


def _source(model: Any) -> tuple[Mapping[str, Tensor], dict[str, Any]]:
    """Weights by name, and the configuration."""
    if isinstance(model, nn.Module):
        if not hasattr(model, "single_transformer_blocks"):
            message = f"{type(model).__name__} is no FLUX.1 transformer"
            raise failed(UnsupportedError, "unsupported-model", message, "pass a FluxTransformer2DModel")
        return model.state_dict(), {key: value for key, value in dict(model.config).items() if key[0] != "_"}
    path = Path(model)
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    opened = [TensorFile(file) for file in files or [path / "diffusion_pytorch_model.safetensors"]]
    home = {key: file for file in opened for key in file}
    beside = (path if path.is_dir() else path.parent) / "config.json"
    config = json.loads(beside.read_text(encoding="utf-8")) if beside.exists() else {}
    return _Sharded(home), {key: value for key, value in config.items() if key[0] != "_"}


class _Sharded(Mapping[str, Tensor]):
    """The tensors of several files."""

    def __init__(self, home: dict[str, TensorFile]) -> None:
        self._home = home

    def __getitem__(self, key: str) -> Tensor:
        return self._home[key][key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._home)

    def __len__(self) -> int:
        return len(self._home)


def _blocks(weights: Mapping[str, Tensor]) -> list[tuple[str, str]]:
    """Kind and path of every block, in order."""
    found = {(m[1], int(m[2])) for key in weights if (m := flux.BLOCK.fullmatch(key))}
    return [
        (kind, f"{kind}.{number}")
        for kind, number in sorted(found, key=lambda b: (list(flux.BLOCKS).index(b[0]), b[1]))
    ]


def _jobs(weights: Mapping[str, Tensor]) -> Iterator[Job]:
    for kind, prefix in _blocks(weights):
        for layer in flux.BLOCKS[kind]:
            modules = tuple(f"{prefix}.{name}" for name in layer.modules)
            for module in modules:
                if f"{module}.weight" not in weights:
                    message, hint = f"`{module}.weight` is missing", "is the model whole, and in diffusers' names?"
                    raise failed(FormatError, "missing-tensor", message, hint, key=f"{module}.weight")
            rows, width = weights[f"{modules[0]}.weight"].shape
            cuts = [slice(0, width)] if len(layer.stored) == 1 else [slice(0, rows), slice(rows, width)]
            for at, (source, cut) in enumerate(zip(layer.stored, cuts, strict=True)):
                yield Job(f"{prefix}.{source.name}", modules, cut, source.shifted, at == 0)


def _modulations(weights: Mapping[str, Tensor]) -> Iterator[tuple[str, int]]:
    for kind, prefix in _blocks(weights):
        for name, parts in flux.MODULATION[kind].items():
            if f"{prefix}.{name}.weight" in weights:
                yield f"{prefix}.{name}", parts


class Maker:
    """Makes a checkpoint's tensors from weights, layer by layer."""

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        rank: int,
        maxima: Mapping[str, Tensor],
        alpha: float,
        progress: Callable[[int, int], object] | None,
        total: int,
    ) -> None:
        self._weights, self._rank, self._maxima, self._alpha = weights, rank, maxima, alpha
        self._progress, self._total, self._done = progress, total, 0
        self._last: tuple[str, dict[str, Tensor]] = ("", {})
        first = next(value for key, value in weights.items() if value.dim() == 2)
        self._dtype = sixteen(first.dtype)

    def layer(self, job: Job) -> dict[str, Promise]:
        """Promises of a quantized layer's tensors; the layer is computed when the first is asked for."""
        rows = up_to(sum(self._weights[f"{module}.weight"].shape[0] for module in job.modules), nunchaku.BLOCK)
        width = self._weights[f"{job.modules[0]}.weight"].shape[1]
        columns = up_to(len(range(*job.columns.indices(width))), nunchaku.BLOCK)
        shapes = {
            "qweight": (torch.int8, (rows, columns // 2)),
            "wscales": (self._dtype, (columns // nunchaku.INT4_GROUP, rows)),
            "bias": (self._dtype, (rows,)),
            "smooth": (self._dtype, (columns,)),
            "smooth_orig": (self._dtype, (columns,)),
            "lora_down": (self._dtype, (columns, self._rank)),
            "lora_up": (self._dtype, (rows, self._rank)),
        }
        return {
            f"{job.name}.{part}": (dtype, shape, lambda part=part: self._computed(job)[part])  # type: ignore[misc]
            for part, (dtype, shape) in shapes.items()
        }

    def _computed(self, job: Job) -> dict[str, Tensor]:
        if self._last[0] != job.name:
            self._last = job.name, self._quantized(job)
            self._done += 1
            if self._progress is not None:
                self._progress(self._done, self._total)
        return self._last[1]

    @torch.no_grad()
    def _quantized(self, job: Job) -> dict[str, Tensor]:
        weight = torch.cat([self._weights[f"{m}.weight"].detach()[:, job.columns].float().cpu() for m in job.modules])
        rows, columns = (up_to(size, nunchaku.BLOCK) for size in weight.shape)
        weight = nn.functional.pad(weight, (0, columns - weight.shape[1], 0, rows - weight.shape[0]))
        smooth = self._smooth(job, weight)
        up, down = leading(weight * smooth, min(self._rank, *weight.shape))
        up, down = _ranks(up.to(self._dtype), 1, self._rank), _ranks((down / smooth).to(self._dtype), 0, self._rank)
        # What the rounded factors leave, so that their rounding is no error.
        residual = (weight - up.float() @ down.float()) * smooth
        codes, scales = quantize_groups(residual, self._dtype)
        meaning = (codes.view(rows, scales.shape[1], -1) * scales.float().unsqueeze(2)).view(rows, columns)
        bias = nn.functional.pad(self._bias(job), (0, rows))[:rows]
        if job.shifted:
            bias = bias - nunchaku.SHIFT * (meaning.double() / smooth.double()).sum(dim=1).float()
        packed = nunchaku.pack_vector(smooth.to(self._dtype).unsqueeze(1)).view(-1)
        return {
            "qweight": nunchaku.pack_codes(codes.to(torch.int8).view(torch.uint8) & 15),
            "wscales": nunchaku.pack_vector(scales),
            "bias": nunchaku.pack_vector(bias.to(self._dtype).unsqueeze(1)).view(-1),
            "smooth": packed,
            "smooth_orig": packed,
            "lora_down": nunchaku.pack_low_rank(down, "down"),
            "lora_up": nunchaku.pack_low_rank(up, "up"),
        }

    def _smooth(self, job: Job, weight: Tensor) -> Tensor:
        """Smoothing factors in the type that stores them, as float32; ones without maxima."""
        given = self._maxima.get(job.modules[0])
        if given is None:
            return torch.ones(weight.shape[1])
        inputs = nn.functional.pad(given.float().flatten()[job.columns], (0, weight.shape[1]), value=1.0)[
            : weight.shape[1]
        ]
        largest = weight.abs().amax(dim=0)
        factor = inputs.clamp_min(1e-5) ** self._alpha / largest.clamp_min(1e-5) ** (1 - self._alpha)
        return factor.clamp(_LEAST, _MOST).to(self._dtype).float()

    def _bias(self, job: Job) -> Tensor:
        """Biases one behind the other; zeros for a part that is not the first, whose outputs are added to it."""
        out = []
        for module in job.modules:
            rows = self._weights[f"{module}.weight"].shape[0]
            have = self._weights.get(f"{module}.bias") if job.bias else None
            out.append(torch.zeros(rows) if have is None else have.detach().float().cpu())
        return torch.cat(out)

    def modulation(self, name: str, parts: int) -> dict[str, Promise]:
        """Promises of a modulation layer in 4 bits."""
        rows, columns = self._weights[f"{name}.weight"].shape
        groups = (columns // awq.GROUP, rows)

        def make() -> dict[str, Tensor]:
            if self._last[0] != name:
                weight = awq.interleave(self._weights[f"{name}.weight"].detach().float().cpu(), parts)
                have = self._weights.get(f"{name}.bias")
                bias = torch.zeros(rows) if have is None else have.detach().float().cpu()
                bias = awq.interleave(awq.without_one(bias, parts, -1.0), parts).to(self._dtype)
                made = dict(zip(("qweight", "wscales", "wzeros"), awq.quantize(weight, self._dtype), strict=True))
                self._last = name, {**made, "bias": bias}
            return self._last[1]

        return {
            f"{name}.qweight": (torch.int32, (rows // 4, columns // 2), lambda: make()["qweight"]),
            f"{name}.wscales": (self._dtype, groups, lambda: make()["wscales"]),
            f"{name}.wzeros": (self._dtype, groups, lambda: make()["wzeros"]),
            f"{name}.bias": (self._dtype, (rows,), lambda: make()["bias"]),
        }

    def rest(self, used: set[str]) -> dict[str, Promise]:
        """What is not quantized, as it is; norms of attentions under the names of the first generation."""
        out: dict[str, Promise] = {}
        for key in sorted(self._weights):
            value = self._weights[key]
            if key.rpartition(".")[0] in used:
                continue
            found = flux.BLOCK.fullmatch(key)
            name = f"{found[1]}.{found[2]}.{found[3].removeprefix('attn.')}" if found else key
            out[name] = value.dtype, tuple(value.shape), lambda key=key: self._weights[key]  # type: ignore[misc]
        return out


def quantize_groups(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """``[N, K]`` as codes -8..7, float32, and scales ``[N, K / 64]`` of ``dtype``: the largest is 7, to nearest."""
    groups = weight.view(weight.shape[0], -1, nunchaku.INT4_GROUP)
    scales = (groups.abs().amax(dim=2) / 7).to(dtype)
    step = torch.where(scales == 0, torch.ones_like(scales), scales).float().unsqueeze(2)
    return torch.round(groups / step).clamp_(-8, 7).view(weight.shape), scales


def _ranks(factor: Tensor, axis: int, rank: int) -> Tensor:
    """A factor with zeros up to a number of ranks."""
    missing = rank - factor.shape[axis]
    return nn.functional.pad(factor, (0, missing) if axis == 1 else (0, 0, 0, missing))


def _metadata(config: dict[str, Any], rank: int) -> dict[str, str]:
    weight = {"dtype": "int4", "scale_dtype": None, "group_size": nunchaku.INT4_GROUP}
    activation = {"dtype": "int4", "scale_dtype": None, "group_size": nunchaku.INT4_GROUP}
    quantization = {"method": "svdquant", "weight": weight, "activation": activation, "rank": rank}
    out = {"model_class": "NunchakuFluxTransformer2dModel", "quantization_config": json.dumps(quantization)}
    return {**out, "config": json.dumps(config)} if config else out
