"""Whole libraries of adapters: one step for every file, resumable, with a record of each."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from . import _lorafmt
from ._names import Dialect, Dtype, Family, Lossy, Unknown
from ._resize import rank_options
from ._sources import usage_error
from ._strength import finite
from .base import BaseLike, native_base

if TYPE_CHECKING:
    from .api import Layout, Precision

#: What is done with each file.
Op: TypeAlias = Literal["convert", "resize", "normalize", "compose"]

#: What becomes of files with the same content.
Duplicates: TypeAlias = Literal["link", "copy", "convert"]

#: Called now and then with files done and files listed.
FileProgress: TypeAlias = Callable[[int, int], object]

Path_: TypeAlias = "str | os.PathLike[str]"


@dataclass(frozen=True)
class BatchReport:
    """How a run over a library ended. Iterating gives the records of the manifest, the last one of each output."""

    #: Files listed.
    files: int
    #: Converted now.
    done: int
    #: Given the output of a file with the same content.
    linked: int
    #: Done by an earlier run, and unchanged.
    unchanged: int
    #: No adapters, found in a folder.
    skipped: int
    failed: int
    #: Not begun, because the run was stopped.
    left: int
    #: Files with warnings, of those converted now.
    warned: int
    #: Bytes written.
    bytes: int
    seconds: float
    #: The file of records.
    manifest: str
    #: ``interrupted``, ``too-many-failures``, ``disk-full``, or None.
    stopped: str | None = None
    #: Files of other kinds in the folders.
    other_files: int = 0
    #: Everything, as the command's ``--json`` has it.
    raw: Mapping[str, Any] = field(default_factory=dict, repr=False)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(records(self.manifest))

    @property
    def failures(self) -> list[dict[str, Any]]:
        """The records of files that failed."""
        return [record for record in self if record["outcome"] == "failed"]

    def to_parquet(self, path: Path_) -> None:
        """Writes the records as a Parquet table. Takes pyarrow."""
        to_parquet(self.manifest, path)


def records(manifest: Path_) -> list[dict[str, Any]]:
    """The records of a manifest: of several of one source and output the last. An unfinished last line is no record."""
    last: dict[tuple[str, str], dict[str, Any]] = {}
    with open(manifest, encoding="utf-8") as lines:
        for line in lines:
            if line.endswith("\n"):
                record = json.loads(line)
                last[record["source"], record["output"]] = record
    return list(last.values())


def to_parquet(manifest: Path_, path: Path_) -> None:
    """Writes the records of a manifest as a Parquet table, whole or not at all. Takes pyarrow.

    Warnings and errors are JSON text.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise usage_error("Parquet takes pyarrow", "pip install pyarrow") from None
    columns = {
        "outcome": pyarrow.string(), "source": pyarrow.string(), "size": pyarrow.int64(), "version": pyarrow.string(),
        "beside": pyarrow.string(), "hash": pyarrow.string(), "step": pyarrow.string(), "dialect": pyarrow.string(),
        "family": pyarrow.string(), "kind": pyarrow.string(), "ranks": pyarrow.list_(pyarrow.int64()),
        "output": pyarrow.string(), "output_hash": pyarrow.string(), "bytes": pyarrow.int64(),
        "duplicate_of": pyarrow.string(), "seconds": pyarrow.float64(), "warnings": pyarrow.string(),
        "error": pyarrow.string(),
    }  # fmt: skip
    rows = records(manifest)
    for row in rows:
        row["warnings"] = json.dumps(row.get("warnings", []))
        row["error"] = None if row.get("error") is None else json.dumps(row["error"])
    table = pyarrow.Table.from_pylist(rows, schema=pyarrow.schema(columns))
    # Beside the target, so that it only has to be renamed.
    with tempfile.TemporaryDirectory(dir=os.path.dirname(os.fspath(path)) or ".", prefix=".lorafmt-") as folder:
        whole = os.path.join(folder, "table")
        parquet.write_table(table, whole)
        os.replace(whole, path)


def main(arguments: Sequence[str]) -> int:
    """What ``lorafmt batch --parquet`` runs. Without arguments it says whether a table can be written at all, with the
    name of one whether that is a table of records, and with those of a manifest and of a table it writes this."""
    from pyarrow import parquet

    if len(arguments) == 1:
        try:
            names = set(parquet.read_schema(arguments[0]).names)
        except (OSError, ValueError):
            return 3
        return 0 if {"outcome", "source", "step", "output"} <= names else 3
    if arguments:
        manifest, table = arguments
        try:
            to_parquet(manifest, table)
        except OSError as error:
            print(error, file=sys.stderr)
            return 4
    return 0


def batch(
    srcs: Path_ | Iterable[Path_],
    out_dir: Path_,
    *,
    to: Dialect | None = None,
    op: Op = "convert",
    base: BaseLike | None = None,
    rank: int | None = None,
    energy: float | None = None,
    max_error: float | None = None,
    like: Path_ | None = None,
    name: str | None = None,
    files_from: Path_ | Iterable[Path_] = (),
    from_: Dialect | None = None,
    family: Family | None = None,
    dtype: Dtype = "keep",
    strength: float = 1.0,
    unknown: Unknown = "error",
    lossy: Lossy = "error",
    layout: Layout = "aligned",
    precision: Precision | None = None,
    max_rank: int | None = None,
    widen: int | None = None,
    manifest: Path_ | None = None,
    verify_hash: bool = False,
    hash: bool = False,
    max_failures: int | None = None,
    duplicates: Duplicates = "link",
    workers: int | None = None,
    overwrite: bool = False,
    engine: str = "local",
    progress: FileProgress | None = None,
) -> BatchReport:
    """Does one step with every file of a library; what is done already and unchanged is left alone.

    Args:
        srcs: files, folders, patterns (``loras/**/*.safetensors``), and addresses (``s3://bucket/prefix/``,
            ``hf://user/repo``).
        out_dir: where outputs go, in the folders that their sources were found in; also ``s3://``.
        to: the dialect to write.
        op: ``convert``; ``resize`` to ``rank``, ``energy`` or ``max_error``; ``normalize`` to ``rank`` and the modules
            of ``like``; ``compose``, for which the sources are recipes.
        name: how outputs are called: ``{dir}/{stem}.{ending}.safetensors``.
        files_from: files with further sources, one a line.
        manifest: the file of records, ``manifest.jsonl`` in ``out_dir`` by default.
        verify_hash: tell by hashes whether a source has changed, in place of size and time.
        hash: record the XXH3 of every source and output.
        max_failures: stop after so many failures.
        duplicates: ``link`` converts one of several files with the same content and gives its output further names.
        workers: files that are worked on at a time.
        overwrite: redo everything, and replace outputs that the manifest does not know.
        engine: ``local``, ``ray``, or ``ray:ADDRESS``.
        progress: called with files done and files listed.

    A file that fails does not stop the others and raises nothing: see :attr:`BatchReport.failures`.

    Raises:
        UsageError: where two sources would have one output, before any work.
        FileNotFoundError: where a source does not exist.
    """
    options = {
        "sources": _paths(srcs),
        "out_dir": os.fspath(out_dir),
        "to": to,
        "op": op,
        **rank_options(rank=rank, energy=energy, max_error=max_error),
        "like": None if like is None else os.fspath(like),
        "name": name,
        "files_from": _paths(files_from),
        "from": from_,
        "family": family,
        "dtype": dtype,
        "strength": finite("strength", strength),
        "unknown": unknown,
        "lossy": lossy,
        "layout": layout,
        "precision": precision,
        "max_rank": max_rank,
        "widen": widen,
        "manifest": None if manifest is None else os.fspath(manifest),
        "verify_hash": verify_hash,
        "hash": hash,
        "max_failures": max_failures,
        "duplicates": duplicates,
        "workers": workers,
        "overwrite": overwrite,
    }
    if engine == "local":
        return local(options, native_base(base), progress)
    if engine == "ray" or engine.startswith("ray:"):
        from ._ray import run

        return run(options, base, engine.partition(":")[2] or None, progress)
    raise usage_error(f"`engine` is {engine!r}", "one of: local, ray, ray:ADDRESS")


def local(options: dict[str, Any], base: _lorafmt.Base | None, progress: FileProgress | None = None) -> BatchReport:
    """A run on this machine."""
    return report(json.loads(_lorafmt.batch(json.dumps(options), base, progress)))


def report(raw: dict[str, Any]) -> BatchReport:
    known = {key: value for key, value in raw.items() if key in BatchReport.__dataclass_fields__ and key != "raw"}
    return BatchReport(**known, raw=raw)


def _paths(given: Path_ | Iterable[Path_]) -> list[str]:
    if isinstance(given, str | os.PathLike):
        return [os.fspath(given)]
    return [os.fspath(path) for path in given]
