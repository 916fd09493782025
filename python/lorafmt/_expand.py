"""Every kind of adapter as plain LoRA."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any, overload

from . import _lorafmt, reports
from ._names import Dialect, Dtype, Family, Lossy, Unknown
from ._sources import framework_of, usage_error
from .adapter import Adapter
from .api import Progress, Source, _native, _options, _run

if TYPE_CHECKING:
    PathLike = str | os.PathLike[str]


@overload
def expand(
    src: Source,
    dst: None = None,
    *,
    rank: int | None = None,
    energy: float | None = None,
    max_error: float | None = None,
    base_weights: PathLike | None = None,
    to: Dialect | None = None,
    from_: Dialect | None = None,
    family: Family | None = None,
    dtype: Dtype = "keep",
    unknown: Unknown = "error",
    lossy: Lossy = "error",
    seed: int = 0,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Adapter: ...


@overload
def expand(
    src: Source,
    dst: PathLike,
    *,
    rank: int | None = None,
    energy: float | None = None,
    max_error: float | None = None,
    base_weights: PathLike | None = None,
    to: Dialect | None = None,
    from_: Dialect | None = None,
    family: Family | None = None,
    dtype: Dtype = "keep",
    unknown: Unknown = "error",
    lossy: Lossy = "error",
    seed: int = 0,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> reports.Report: ...


def expand(
    src: Source,
    dst: PathLike | None = None,
    *,
    rank: int | None = None,
    energy: float | None = None,
    max_error: float | None = None,
    base_weights: PathLike | None = None,
    to: Dialect | None = None,
    from_: Dialect | None = None,
    family: Family | None = None,
    dtype: Dtype = "keep",
    unknown: Unknown = "error",
    lossy: Lossy = "error",
    seed: int = 0,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> reports.Report | Adapter:
    """Makes plain LoRA of LoHa, LoKr, Tucker factors, DoRA, GLoRA, OFT, IA3 and full differences.

    Args:
        src: as for :func:`lorafmt.convert`.
        dst: the file to write; without it the result is an Adapter in memory.
        rank: the highest rank of a module. Without ``rank``, ``energy`` and ``max_error`` the result is exact, which
            differences of full rank (DoRA, OFT, IA3, full) do not allow.
        energy: the smallest rank that keeps this share of the sum of squared singular values, module by module.
        max_error: the smallest rank whose relative error (Frobenius) is at most this, module by module.
        base_weights: the checkpoint that the adapter was made for (a file, an index, or a folder): DoRA, GLoRA, OFT and
            IA3 need it.
        to: the dialect to write; by default that of the source, if it can be written.
        seed: of the random directions in which differences of full rank are searched.
        from_, family, dtype, unknown, lossy, overwrite, progress: as for :func:`lorafmt.convert`.

    The report's ``to_dict()["expand"]`` says what happened to each module.

    Raises:
        LorafmtError: with ``code`` ``weights-needed`` if ``base_weights`` is missing, ``rank-needed`` if a difference
            has full rank and nothing says how much of it is enough.
    """
    how = {"rank": rank, "energy": energy, "max_error": max_error, "seed": seed, "dtype": dtype, "lossy": lossy}
    plain = _expanded(_native(src, family, from_), how, base_weights)
    written = to or _own(src, plain)
    options = _options(written, from_, family, dtype, 1.0, unknown, lossy, "aligned", None, None, None)
    return _run([(plain, None)], dst, options, None, overwrite, progress, framework_of(src))


def _expanded(native: _lorafmt.Adapter, how: dict[str, Any], base_weights: PathLike | None) -> _lorafmt.Adapter:
    path = None if base_weights is None else os.fspath(base_weights)
    return _lorafmt.expand(native, json.dumps(how), path)[0]


def _own(src: Any, native: _lorafmt.Adapter) -> str:
    """The dialect of the source, if it can be written."""
    dialect = json.loads(native.inspect())["dialect"]
    if dialect in {name for name, writes in _lorafmt.formats()[0] if writes}:
        return str(dialect)
    raise usage_error(f"`{dialect}` cannot be written", "name a dialect with `to`")
