"""What operations return: frozen views of the JSON documents that the command line prints with ``--json``."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from .weights import Weights, _weights


@dataclass(frozen=True)
class Warning:
    """Something that deserves a word but is no error."""

    code: str
    module: str | None
    detail: str


@dataclass(frozen=True)
class TensorCount:
    """Where every input tensor went: ``used + carried + dropped + unknown == total``.

    ``in`` is no name that Python takes, so the document's ``in`` is called ``total`` here.
    """

    total: int
    used: int
    carried: int
    dropped: int
    unknown: int


@dataclass(frozen=True)
class _Document:
    """A report with the document it was read from."""

    _document: dict[str, Any] = field(repr=False, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """The document as ``--json`` prints it."""
        return json.loads(json.dumps(self._document))

    def __getitem__(self, name: str) -> Any:
        """A part of the document: ``report["tensors"]["in"]``."""
        return self._document[name]


@dataclass(frozen=True)
class Detection(_Document):
    """What a file was recognised as."""

    dialect: str
    family: str
    coverage: float
    families: tuple[str, ...]
    """All families that explain the keys equally well."""
    variant: str | None = None
    """Which of the family's sizes, if the model comes in several."""


@dataclass(frozen=True)
class AdapterInfo(_Document):
    """What a file is, from its header alone."""

    path: str
    bytes: int
    dialect: str
    family: str
    kind: str
    coverage: float
    tensors: int
    modules: dict[str, int]
    """Modules by component."""
    rank: int | None
    """The rank, if all modules share one."""
    ranks: dict[int, int]
    """Modules by rank."""
    dtypes: dict[str, int]
    loaders: dict[str, str]
    """Programs, and `yes` or what goes wrong."""
    metadata: dict[str, str]
    unknown: tuple[str, ...]
    """Keys that no table knows."""
    warnings: tuple[Warning, ...]
    problems: tuple[dict[str, Any], ...]
    """What makes a conversion impossible, as error objects."""
    weights: Weights | None = None
    """What the weights look like, if that was asked for."""
    variant: str | None = None
    """Which of the family's sizes, if the model comes in several."""


@dataclass(frozen=True)
class Report(_Document):
    """What a conversion did."""

    source_path: str
    dialect_from: str
    dialect_to: str
    family: str
    kind: str
    path: str | None
    """Where it was written; None for a result in memory."""
    bytes: int
    tensors: TensorCount
    modules: int
    fidelity: str
    """``exact``, ``regrouped``, ``rescaled`` or ``approximate``."""
    max_relative_error: float
    """Bound on the relative rounding error of every written number."""
    warnings: tuple[Warning, ...]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """The document as ``--json`` prints it. Reads the source file once more, for its SHA-256."""
        document = super().to_dict()
        # A source in memory has no file to hash.
        hashes: dict[str, str] = {}
        for source in [document["source"], *document.get("sources", [])]:
            with suppress(OSError):
                path = source["path"]
                source["sha256"] = hashes[path] = hashes.get(path) or _sha256(path)
        return document


@dataclass(frozen=True)
class CheckReport(_Document):
    """The result of a check; true if nothing is wrong."""

    path: str
    ok: bool
    tensors: int
    modules: int
    problems: tuple[dict[str, Any], ...]
    warnings: tuple[Warning, ...]

    def __bool__(self) -> bool:
        return self.ok


@dataclass(frozen=True)
class ModuleDiff:
    """One module in which two adapters are not the same."""

    module: str
    relative_error: float
    state: str
    norm_a: float | None
    """Frobenius norm of the first delta; None where there is none, or none that is finite."""
    norm_b: float | None
    cosine: float | None
    """Inner product of the deltas over both norms; None where one is zero."""


@dataclass(frozen=True)
class GroupDiff:
    """The modules of a block, or of a component outside of blocks, together."""

    component: str
    block: str | None
    modules: int
    norm_a: float
    norm_b: float
    cosine: float | None
    relative_error: float


@dataclass(frozen=True)
class DiffReport(_Document):
    """A comparison; true if every module is within the tolerance."""

    equal: bool
    tolerance: float
    modules: int
    max_relative_error: float
    differences: tuple[ModuleDiff, ...]
    measured: int
    """Modules with deltas that could be measured: those that the next four numbers are about."""
    norm_a: float
    norm_b: float
    cosine: float | None
    relative_error: float
    """Root of the sum of squared differences, over the larger norm."""
    by_block: tuple[GroupDiff, ...]
    by_module: tuple[ModuleDiff, ...]
    """Every module, with ``by="module"``."""

    def __bool__(self) -> bool:
        return self.equal


def _sha256(path: str) -> str:
    import hashlib

    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _warnings(document: dict[str, Any]) -> tuple[Warning, ...]:
    return tuple(Warning(**w) for w in document["warnings"])


def _detection(text: str) -> Detection:
    d = json.loads(text)
    kept = ("schema", "path", "dialect", "dialects", "family", "variant", "families", "coverage")
    keep = {name: d[name] for name in kept}
    return Detection(keep, d["dialect"], d["family"], d["coverage"], tuple(d["families"]), d["variant"])


def _info(text: str) -> AdapterInfo:
    d = json.loads(text)
    return AdapterInfo(
        d,
        path=d["path"],
        bytes=d["bytes"],
        dialect=d["dialect"],
        family=d["family"],
        kind=d["kind"],
        coverage=d["coverage"],
        tensors=d["tensors"],
        modules=d["modules"],
        rank=d["rank"],
        ranks={int(rank): count for rank, count in d["ranks"].items()},
        dtypes=d["dtypes"],
        loaders={loader["name"]: loader["loads"] for loader in d["loaders"]},
        metadata=d["metadata"],
        unknown=tuple(d["unknown"]),
        warnings=_warnings(d),
        problems=tuple(d["problems"]),
        weights=_weights(d["weights"]) if "weights" in d else None,
        variant=d["variant"],
    )


def _report(text: str) -> Report:
    d = json.loads(text)
    count = d["tensors"]
    return Report(
        d,
        source_path=d["source"]["path"],
        dialect_from=d["source"]["dialect"],
        dialect_to=d["target"]["dialect"],
        family=d["source"]["family"],
        kind=d["source"]["kind"],
        path=d["target"]["path"],
        bytes=d["target"]["bytes"],
        tensors=TensorCount(count["in"], count["used"], count["carried"], count["dropped"], count["unknown"]),
        modules=d["modules"],
        fidelity=d["fidelity"],
        max_relative_error=d["max_relative_error"],
        warnings=_warnings(d),
        seconds=d["seconds"],
    )


def _check(text: str) -> CheckReport:
    d = json.loads(text)
    return CheckReport(d, d["path"], d["ok"], d["tensors"], d["modules"], tuple(d["problems"]), _warnings(d))


def _diff(text: str) -> DiffReport:
    d = json.loads(text)
    modules = {name: tuple(ModuleDiff(**m) for m in d.get(name, ())) for name in ("differences", "by_module")}
    plain = ("equal", "tolerance", "modules", "max_relative_error", "measured")
    numbers = ("norm_a", "norm_b", "cosine", "relative_error")
    blocks = tuple(GroupDiff(**block) for block in d["by_block"])
    return DiffReport(d, **{name: d[name] for name in plain + numbers}, **modules, by_block=blocks)
