"""What the weights of an adapter look like: the ``weights`` object of ``inspect --weights --json``, frozen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Spectrum:
    """What the singular values of a delta say."""

    rank: int
    """Singular values above rounding."""
    spectral_norm: float
    """The largest one."""
    stable_rank: float
    """Sum of squares over the largest square."""
    effective_rank: float
    """exp of the entropy of the squares (Roy and Vetterli 2007)."""
    condition: float
    """The largest over the smallest."""
    energy_by_rank: dict[int, float]
    """Share of the sum of squares that a truncation to each rank keeps."""
    rank_for_energy: dict[float, int]
    """The smallest rank that keeps each share."""


@dataclass(frozen=True)
class ModuleWeights:
    """One module; all numbers include its scale."""

    module: str
    component: str
    block: str | None
    kind: str
    shape: tuple[int, int] | None
    rank: int | None
    scale: float
    status: str
    """``ok``, ``dead``, ``not-finite``, ``norm-only`` or ``unmeasured``."""
    norm: float | None
    """Frobenius norm of the delta."""
    share: float | None
    """Of the sum of squared norms of the whole adapter."""
    spectrum: Spectrum | None
    vector_norm: float | None
    """Norm of the differences of biases and norm layers."""
    note: str | None


@dataclass(frozen=True)
class GroupWeights:
    """The modules of a block, of a component, or all."""

    component: str
    block: str | None
    modules: int
    norm: float
    share: float
    stable_rank: float | None
    """Median over the modules."""
    effective_rank: float | None
    """Median over the modules."""
    energy_by_rank: dict[int, float]
    """Share of the energy that is left if every module is truncated to a rank."""
    rank_for_energy: dict[float, int]
    """The smallest rank for all modules that keeps each share."""


@dataclass(frozen=True)
class Weights:
    """Norms, ranks and energies of an adapter."""

    total: GroupWeights
    components: tuple[GroupWeights, ...]
    blocks: tuple[GroupWeights, ...]
    """In the order of the model; what is outside of blocks has ``block`` None."""
    dead: tuple[str, ...]
    """Modules that do nothing."""
    not_finite: tuple[str, ...]
    """Modules with NaN or infinite values; no sum includes them."""
    modules: tuple[ModuleWeights, ...]


def _keyed(d: dict[str, Any]) -> dict[str, Any]:
    """The fields that two classes share, with numbers as keys."""
    energies = {int(rank): share for rank, share in d["energy_by_rank"].items()}
    return {**d, "energy_by_rank": energies, "rank_for_energy": {float(s): r for s, r in d["rank_for_energy"].items()}}


def _module(d: dict[str, Any]) -> ModuleWeights:
    spectrum, shape = d["spectrum"], d["shape"]
    found = None if spectrum is None else Spectrum(**_keyed(spectrum))
    return ModuleWeights(**{**d, "spectrum": found, "shape": None if shape is None else (shape[0], shape[1])})


def _group(d: dict[str, Any]) -> GroupWeights:
    return GroupWeights(**_keyed(d))


def _weights(d: dict[str, Any]) -> Weights:
    return Weights(
        total=_group(d["total"]),
        components=tuple(map(_group, d["components"])),
        blocks=tuple(map(_group, d["blocks"])),
        dead=tuple(d["dead"]),
        not_finite=tuple(d["not_finite"]),
        modules=tuple(map(_module, d["modules"])),
    )
