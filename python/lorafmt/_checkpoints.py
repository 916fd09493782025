"""Base checkpoints: adapters into their weights, out again, and out of two checkpoints."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, overload

from . import _lorafmt, reports
from ._names import Dialect, Dtype, Family, Lossy
from ._sources import usage_error
from ._strength import strength as _strength_of
from .adapter import Adapter
from .api import Loras, Progress, Terms, _native, _options, _pairs

if TYPE_CHECKING:
    PathLike = str | os.PathLike[str]


@dataclass(frozen=True)
class FusedTensor:
    """A tensor of the base that was changed."""

    key: str
    dtype: str
    modules: tuple[str, ...]
    """The modules of the adapters that changed it."""
    norm: float | None
    """The Frobenius norm of the wanted change; None in a dry run."""
    gain: float | None
    """How much of the wanted change arrived: the projection of the stored change on it."""
    err: float | None
    """Norm of what the stored change is off by, relative to the wanted one."""
    outside: int
    """Numbers that left the range of the type."""


@dataclass(frozen=True)
class FuseReport(reports._Document):
    """What :func:`fuse` did."""

    path: str | None
    bytes: int
    family: str
    tensors: reports.TensorCount
    """Where the tensors of the adapters went."""
    modules: int
    fused: tuple[FusedTensor, ...]
    gain: float | None
    """The least gain."""
    err: float | None
    """The largest error."""
    warnings: tuple[reports.Warning, ...]
    seconds: float


@dataclass(frozen=True)
class UnfuseReport(reports._Document):
    """What :func:`unfuse` did."""

    path: str | None
    bytes: int
    base: str
    """The name that the checkpoint had."""
    tensors: int
    """Tensors that were restored."""
    seconds: float


def fuse(
    base: PathLike,
    loras: Loras,
    dst: PathLike,
    *,
    undo: PathLike | None = None,
    stochastic: int | None = None,
    rescale: bool = False,
    family: Family | None = None,
    unknown: Literal["error", "drop"] = "error",
    lossy: Lossy = "error",
    dry_run: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> FuseReport:
    """Adds adapters to the weights of a base checkpoint: all summed in float64, rounded once to each weight's type.

    Args:
        base: a ``.safetensors`` file, an index of shards, a component's folder or a whole pipeline's, in any naming of
            its family. It streams through; no weight is held as a whole.
        loras: sources with their strengths, ``[(src, 0.8), ...]``, as for :func:`compose`.
        dst: the file to write, or the folder, where the base is one. Tensors that no adapter changes are copied.
        undo: also write what :func:`unfuse` needs.
        stochastic: a seed; numbers are rounded up and down by chance, right on average, instead of to the nearest.
        rescale: give FP8 weights that have a scale a new one, from their new numbers.
        family: the base model's architecture, where keys alone do not tell.
        unknown: what to do with keys of adapters that no table knows.
        lossy: ``allow`` leaves out modules whose weights the base lacks.
        dry_run: write nothing.
        overwrite: replace existing outputs.
        progress: called with bytes done and bytes to do.

    Raises:
        LorafmtError: with ``code``, ``hint``, ``path`` and ``key``; nothing is left behind and no file is harmed.
    """
    if stochastic is not None and (not isinstance(stochastic, int) or isinstance(stochastic, bool) or stochastic < 0):
        raise usage_error(f"`stochastic` is {stochastic!r}", "pass a seed: a whole number that is not negative")
    options = _document(
        unknown=unknown,
        lossy=lossy,
        family=family,
        stochastic=stochastic,
        rescale=bool(rescale),
        dry_run=bool(dry_run),
        overwrite=bool(overwrite),
    )
    terms: Terms = [(_native(src, family, None), json.dumps(_strength_of(s))) for src, s in _pairs(loras)]
    undo_path = None if undo is None else os.fspath(undo)
    return _fused(_lorafmt.fuse(os.fspath(base), terms, os.fspath(dst), options, undo_path, progress))


def unfuse(
    fused: PathLike,
    dst: PathLike,
    *,
    undo: PathLike,
    dry_run: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> UnfuseReport:
    """Restores the checkpoint that ``fused`` was before, to the bit, with the undo file that :func:`fuse` wrote.

    Raises:
        UnsupportedError: ``wrong-undo`` if the undo file is of another checkpoint; nothing is written.
    """
    paths = (os.fspath(fused), os.fspath(undo), os.fspath(dst))
    d = json.loads(_lorafmt.unfuse(*paths, bool(dry_run), bool(overwrite), progress))
    return UnfuseReport(d, path=d["path"], bytes=d["bytes"], base=d["base"], tensors=d["tensors"], seconds=d["seconds"])


@overload
def extract(
    tuned: PathLike,
    base: PathLike,
    dst: None = None,
    *,
    to: Dialect = "diffusers",
    rank: int | None = None,
    energy: float | None = None,
    max_error: float | None = None,
    family: Family | None = None,
    dtype: Dtype = "keep",
    lossy: Lossy = "error",
    niter: int | None = None,
    seed: int = 0,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Adapter: ...


@overload
def extract(
    tuned: PathLike,
    base: PathLike,
    dst: PathLike,
    *,
    to: Dialect = "diffusers",
    rank: int | None = None,
    energy: float | None = None,
    max_error: float | None = None,
    family: Family | None = None,
    dtype: Dtype = "keep",
    lossy: Lossy = "error",
    niter: int | None = None,
    seed: int = 0,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> reports.Report: ...


def extract(
    tuned: PathLike,
    base: PathLike,
    dst: PathLike | None = None,
    *,
    to: Dialect = "diffusers",
    rank: int | None = None,
    energy: float | None = None,
    max_error: float | None = None,
    family: Family | None = None,
    dtype: Dtype = "keep",
    lossy: Lossy = "error",
    niter: int | None = None,
    seed: int = 0,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> reports.Report | Adapter:
    """Makes an adapter of the difference of two checkpoints, by randomised decompositions of each weight.

    Args:
        tuned: the tuned checkpoint: a file, an index of shards, or a folder, in any naming of its family.
        base: the one that it was tuned from; it may be named and sharded differently.
        dst: the file to write; without it the result is an Adapter in memory.
        to: the dialect to write.
        rank: the highest rank.
        energy: the smallest rank that keeps this share of the squared norm of each difference.
        max_error: the smallest rank whose relative Frobenius error is at most this.
        family: the base model's architecture, where keys alone do not tell.
        dtype: of the factors; ``keep`` is that of the tuned weights.
        lossy: ``allow`` leaves out biases, norms and other parameters that the dialect cannot hold.
        niter: passes over each weight before the last one.
        seed: of the random directions.
        overwrite: replace an existing output.
        progress: called with bytes done and bytes to do.

    The report's document has an ``extract`` part: rank, norm, kept energy and error of every weight.

    Raises:
        LorafmtError: with ``code``, ``hint``, ``path`` and ``key``; ``no-modules`` if both hold the same weights.
    """
    for name, count in {"rank": rank, "niter": niter, "seed": seed}.items():
        if count is not None and (not isinstance(count, int) or isinstance(count, bool) or count < 0):
            raise usage_error(f"`{name}` is {count!r}", "pass a whole number")
    options = _document(
        to=to,
        lossy=lossy,
        family=family,
        dtype=dtype,
        rank=rank,
        energy=energy,
        max_error=max_error,
        niter=niter,
        seed=seed,
    )
    made, found = _lorafmt.extract(os.fspath(tuned), os.fspath(base), options, progress)
    written = _options(to, None, None, "keep", 1.0, "error", lossy, "aligned", None, None, None)
    terms: Terms = [(made, None)]
    if dst is not None:
        return _with(found, _lorafmt.write(terms, os.fspath(dst), written, overwrite, None, progress))
    adapter, report = _lorafmt.converted(terms, written, None, progress)
    return Adapter(adapter, options={"unknown": "keep"}, framework=None, report=_with(found, report))


def _document(**options: Any) -> str:
    return json.dumps(options)


def _with(found: str, report: str) -> reports.Report:
    return reports._report(json.dumps({**json.loads(report), "extract": json.loads(found)}))


def _fused(text: str) -> FuseReport:
    d = json.loads(text)
    count = d["tensors"]
    tensors = [FusedTensor(**{**t, "modules": tuple(t["modules"])}) for t in d["fused"]]
    return FuseReport(
        d,
        path=d["target"]["path"],
        bytes=d["target"]["bytes"],
        family=d["base"]["family"],
        tensors=reports.TensorCount(count["in"], count["used"], count["carried"], count["dropped"], count["unknown"]),
        modules=d["modules"],
        fused=tuple(tensors),
        gain=d["gain"],
        err=d["err"],
        warnings=reports._warnings(d),
        seconds=d["seconds"],
    )
