"""Many files as one page, and the data behind it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from . import _lorafmt
from ._names import Dialect, Family
from ._sources import located, usage_error
from .adapter import Adapter
from .api import Progress, Source
from .reports import _Document

if TYPE_CHECKING:
    PathLike = str | os.PathLike[str]

#: What a report is about: a source, a folder of files, or several of them.
Sources: TypeAlias = "Source | Iterable[Source]"


@dataclass(frozen=True)
class Finding:
    """What is wrong with a file, or deserves a word, by its code."""

    level: Literal["problem", "warning", "note"]
    code: str
    count: int
    messages: tuple[str, ...]
    """The first few, as sentences."""
    hint: str | None
    command: str | None
    """The command that helps, where one does."""


@dataclass(frozen=True)
class NearDuplicate:
    """A file whose delta is nearly that of another one, or a multiple of it."""

    path: str
    cosine: float
    """Of the deltas; estimated."""
    error: float
    """The standard error of that."""
    ratio: float
    """How many times the other one it is."""
    partial: bool
    """Whether one of them does more than was compared."""


@dataclass(frozen=True)
class FileReport(_Document):
    """One file of a report."""

    path: str
    bytes: int | None
    error: dict[str, Any] | None
    """Why it could not be read, as an error object; then there is no family, dialect and kind."""
    family: str | None
    dialect: str | None
    kind: str | None
    rank: int | None
    """The rank, if all modules share one."""
    norm: float | None
    """Frobenius norm of all deltas together."""
    findings: tuple[Finding, ...]
    near: tuple[NearDuplicate, ...]
    """The files most like it."""


@dataclass(frozen=True)
class DuplicateGroup:
    """Files that hold the same."""

    relation: Literal["file", "tensors", "delta"]
    """Every byte, every tensor, or the effect in different forms."""
    paths: tuple[str, ...]
    spare_bytes: int
    """Bytes of all but the largest; 0 for different forms."""


@dataclass(frozen=True)
class LibraryReport(_Document):
    """What :func:`report` found; true if every file could be read and none has problems."""

    files: tuple[FileReport, ...]
    """In the order given."""
    groups: tuple[DuplicateGroup, ...]
    bytes: int
    failed: int
    """Files that could not be read as adapters."""
    problems: int
    """Files with problems, those that failed not counted."""
    duplicates: int
    """Files whose tensors another file has, too."""
    duplicate_bytes: int
    path: str | None
    """Where the page was written."""

    def __bool__(self) -> bool:
        return self.failed == 0 and self.problems == 0


def report(
    srcs: Sources,
    dst: PathLike | None = None,
    *,
    weights: bool = True,
    family: Family | None = None,
    from_: Dialect | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> LibraryReport:
    """Writes one self-contained HTML page about files: what they are, what is wrong, which are the same.

    Args:
        srcs: a source as for :func:`lorafmt.inspect`, a folder (all ``.safetensors`` files in it and below), or a list
            of such. Files that cannot be read are part of the report, with their error.
        dst: the page; without it there is only the result.
        weights: measure the weights and compare the files, which reads every byte; else headers only.
        family, from_: what all of the files are said to be.
        overwrite: replace an existing page.
        progress: called now and then with files done and files to do.

    Raises:
        LorafmtError: if the page cannot be written, or there are no files.
    """
    options = json.dumps({"family": family, "from": from_})
    path = None if dst is None else os.fspath(dst)
    with ExitStack() as fetched:
        # What is elsewhere is fetched, and removed when the page is written.
        subjects = [
            src._native if isinstance(src, Adapter) else fetched.enter_context(located(src)) for src in _listed(srcs)
        ]
        if not subjects:
            raise usage_error("there is nothing to report on", "name at least one adapter file")
        return _library(_lorafmt.report(subjects, path, options, weights, overwrite, progress), path)


def _listed(srcs: Any) -> list[Any]:
    """Every source by itself, folders as the files in them."""
    single = isinstance(srcs, str | bytes | bytearray | memoryview | os.PathLike | Mapping | Adapter)
    if not single and not isinstance(srcs, Iterable):
        raise usage_error(
            f"cannot read adapters from {type(srcs).__name__}", "pass a path, a folder, or a list of them"
        )
    out: list[Any] = []
    for src in [srcs] if single else srcs:
        out.extend(_inside(src) if isinstance(src, str | os.PathLike) else [src])
    return out


def _inside(src: str | os.PathLike[str]) -> list[str | os.PathLike[str]]:
    """The files of a folder, in order, without hidden ones; a folder that PEFT wrote is one adapter."""
    folder = Path(src)
    if not folder.is_dir() or (folder / "adapter_model.safetensors").is_file():
        return [src]
    found: list[str | os.PathLike[str]] = []
    for parent, folders, files in os.walk(folder, followlinks=False):
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        names = sorted(f for f in files if f.lower().endswith(".safetensors") and not f.startswith("."))
        found.extend(os.path.join(parent, name) for name in names)
    if not found:
        raise usage_error(f"the folder `{src}` holds no .safetensors file", "name another folder, or files")
    return found


def _library(text: str, path: str | None) -> LibraryReport:
    d = json.loads(text)
    paths = [file["path"] for file in d["files"]]
    totals = d["totals"]
    return LibraryReport(
        d,
        files=tuple(_file(file, paths) for file in d["files"]),
        groups=tuple(
            DuplicateGroup(g["relation"], tuple(paths[i] for i in g["files"]), g["spare_bytes"]) for g in d["groups"]
        ),
        bytes=totals["bytes"],
        failed=totals["failed"],
        problems=totals["problems"],
        duplicates=totals["duplicates"],
        duplicate_bytes=totals["duplicate_bytes"],
        path=path,
    )


def _file(d: dict[str, Any], paths: list[str]) -> FileReport:
    adapter = d["adapter"] or {}
    near = ("cosine", "error", "ratio", "partial")
    return FileReport(
        d,
        path=d["path"],
        bytes=d["bytes"],
        error=d["error"],
        family=adapter.get("family"),
        dialect=adapter.get("dialect"),
        kind=adapter.get("kind"),
        rank=adapter.get("rank"),
        norm=(adapter.get("weights") or {}).get("norm"),
        findings=tuple(Finding(**{**f, "messages": tuple(f["messages"])}) for f in d["findings"]),
        near=tuple(NearDuplicate(paths[n["file"]], **{name: n[name] for name in near}) for n in d["near"]),
    )
