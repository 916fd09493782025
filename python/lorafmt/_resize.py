"""Ranks: fewer with the least error, more with the same delta, one for all."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from . import _lorafmt, reports
from ._names import Dialect, Dtype, Family, Lossy, Unknown
from ._sources import framework_of, usage_error

if TYPE_CHECKING:
    from .adapter import Adapter
    from .api import Progress, Source

#: How ranks are changed.
ResizeMethod: TypeAlias = Literal["svd", "rsvd", "random", "sparse-random", "pad", "orthogonal"]

_COUNTS = ("rank", "bytes", "niter", "oversample", "seed")
_NUMBERS = ("energy", "max_error", "sv_ratio", "sv_fro", "sv_cumulative", "mean_rank", "density")


def rank_options(**given: Any) -> dict[str, Any]:
    """The options of a change of ranks as the native module takes them; values of the wrong type are errors here."""
    out: dict[str, Any] = {}
    for name, value in given.items():
        if value is None:
            continue
        whole = isinstance(value, int) and not isinstance(value, bool)
        if name in _COUNTS and (not whole or value < 0):
            raise usage_error(f"`{name}` is {value!r}", "pass a whole number")
        if name in _NUMBERS:
            if not whole and not isinstance(value, float):
                raise usage_error(f"`{name}` is {value!r}", "pass a number")
            # JSON has no NaN and no infinities; the native module refuses 0 and below as it would these.
            if value != value or value in (float("inf"), float("-inf")):
                raise usage_error(f"`{name}` is {value!r}", "pass a finite number")
        out[name] = value
    criteria = [name for name in _NUMBERS[:5] if name in out]
    budgets = [name for name in ("bytes", "mean_rank") if name in out]
    clashing = criteria + budgets + (["rank"] if budgets and "rank" in out else [])
    if len(criteria) > 1 or (len(clashing) > 1 and budgets):
        raise usage_error(f"{' and '.join(f'`{name}`' for name in clashing)} exclude each other", "pass one of them")
    return out


def resize(
    src: Source,
    dst: str | os.PathLike[str] | None = None,
    *,
    rank: int | None = None,
    energy: float | None = None,
    max_error: float | None = None,
    sv_ratio: float | None = None,
    sv_fro: float | None = None,
    sv_cumulative: float | None = None,
    bytes: int | None = None,
    mean_rank: float | None = None,
    ranks: Mapping[str, int] | None = None,
    method: ResizeMethod = "svd",
    niter: int = 4,
    oversample: int = 10,
    density: float = 0.1,
    seed: int = 0,
    to: Dialect | None = None,
    family: Family | None = None,
    dtype: Dtype = "keep",
    unknown: Unknown = "error",
    lossy: Lossy = "error",
    overwrite: bool = False,
    progress: Progress | None = None,
) -> reports.Report | Adapter:
    """Gives an adapter another rank: fewer with the least error, or more with the same delta.

    Args:
        src: as for :func:`lorafmt.convert`.
        dst: the file to write; without it the result is an Adapter in memory.
        rank: the highest rank of a module; alone, or as a limit beside a criterion.
        energy: the smallest rank that keeps this share of the sum of squared singular values.
        max_error: the smallest rank whose relative Frobenius error is at most this.
        sv_ratio, sv_fro, sv_cumulative: the criteria of sd-scripts' ``resize_lora.py`` (which keeps one rank more).
        bytes, mean_rank: a budget for all modules together, spent where it keeps most.
        ranks: ranks of single modules, by selector.
        method: ``svd`` (exact), ``rsvd`` (randomised, for full differences; ``niter``, ``oversample``), ``random`` and
            ``sparse-random`` (``density``) projections, ``pad`` (zeros) and ``orthogonal`` (orthonormal rows of down).
        seed: of everything random; equal seeds give equal bytes.
        to: the dialect to write; the source's own unless given.
        family, dtype, unknown, lossy, overwrite, progress: as for :func:`lorafmt.convert`.

    The report's ``resize`` has the rank and the error of every module.

    Raises:
        LorafmtError: with ``code``, ``hint``, ``path`` and ``key``; nothing is left behind and no file is harmed.
    """
    from .api import _native, _options, _run

    wanted = rank_options(
        rank=rank,
        energy=energy,
        max_error=max_error,
        sv_ratio=sv_ratio,
        sv_fro=sv_fro,
        sv_cumulative=sv_cumulative,
        bytes=bytes,
        mean_rank=mean_rank,
    )
    if not wanted and not ranks:
        raise usage_error("no rank is given", "pass `rank`, `energy`, `max_error`, `bytes` or `mean_rank`")
    wanted |= rank_options(niter=niter, oversample=oversample, density=density, seed=seed)
    wanted |= {"method": method, "ranks": {k: _positive(k, n) for k, n in (ranks or {}).items()}}
    native = _native(src, family, None)
    native.ensure_sound()
    target = to or _own_dialect(native)
    options = _options(target, None, family, dtype, 1.0, unknown, lossy, "aligned", None, None, None)
    options = json.dumps({**json.loads(options), "resize": wanted})
    return _run([(native, None)], dst, options, None, overwrite, progress, framework_of(src))


def normalize(
    srcs: Iterable[Source],
    out_dir: str | os.PathLike[str] | None = None,
    *,
    rank: int,
    to: Dialect = "diffusers",
    like: Source | None = None,
    family: Family | None = None,
    dtype: Dtype = "keep",
    unknown: Unknown = "error",
    overwrite: bool = False,
) -> list[reports.Report] | list[Adapter]:
    """Gives adapters one set of keys and one rank, so that programs can swap them without compiling again.

    Args:
        srcs: adapters to one model.
        out_dir: the folder to write ``{stem}.r{rank}.safetensors`` into; it is made if missing. Sources must be paths
            then. Without it the results are Adapters in memory.
        rank: the rank of every module: higher ones are reduced by singular values, lower ones filled with zeros.
        to: the dialect to write.
        like: an adapter whose keys all are to have, instead of those of all of them together.
        family, dtype, unknown, overwrite: as for :func:`lorafmt.convert`.

    Raises:
        LorafmtError: for modules that cannot be zero (DoRA, LyCORIS kinds) or that differ in shape.
    """
    from .api import _native, _options, _run

    sources = list(srcs)
    natives = [_native(src, family, None) for src in sources]
    completed = _lorafmt.completed(natives, None if like is None else _native(like, family, None))
    options = _options(to, None, family, dtype, 1.0, unknown, "error", "aligned", None, None, None)
    wanted = {"method": "svd+pad", "rank": _positive("rank", rank)}
    options = json.dumps({**json.loads(options), "resize": wanted})
    targets: list[str | None] = [None] * len(sources)
    if out_dir is not None:
        targets = [_target(src, out_dir, rank) for src in sources]
        twice = next((t for t in targets if targets.count(t) > 1), None)
        if twice is not None:
            raise usage_error(f"two sources would both be written to `{twice}`", "give them different names")
        Path(out_dir).mkdir(parents=True, exist_ok=True)
    pairs = zip(sources, completed, targets, strict=True)
    return [  # type: ignore[return-value]
        _run([(native, None)], target, options, None, overwrite, None, framework_of(src))
        for src, native, target in pairs
    ]


def _target(src: Any, out_dir: str | os.PathLike[str], rank: int) -> str:
    if not isinstance(src, str | os.PathLike):
        raise usage_error("only files have a name for the output", "pass paths, or leave out `out_dir`")
    return os.fspath(Path(out_dir) / f"{Path(src).stem}.r{rank}.safetensors")


def _positive(name: str, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise usage_error(f"`{name}` is {value!r}", "pass a rank of at least 1")
    return value


def _own_dialect(native: _lorafmt.Adapter) -> str:
    own = reports._info(native.inspect()).dialect
    if own not in {name for name, writes in _lorafmt.formats()[0] if writes}:
        raise usage_error(f"`{own}` cannot be written", "name a dialect with `to`")
    return own
