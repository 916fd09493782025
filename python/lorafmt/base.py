"""Quantized checkpoints: what native adapters are written behind, and taken off."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

from . import _lorafmt
from ._sources import fill_numpy, fill_torch, located

if TYPE_CHECKING:
    from .api import Layout, Source, Strength

#: A quantized checkpoint: its path, or a Base that was opened from it.
BaseLike: TypeAlias = "str | os.PathLike[str] | Base"


class Base:
    """A quantized checkpoint, opened once and used for many adapters.

    Only its header is read and its branches are mapped, never unpacked: they are copied tile by tile into what is made.
    """

    def __init__(self, path: str | os.PathLike[str] | _lorafmt.Base) -> None:
        self._native = path if isinstance(path, _lorafmt.Base) else _opened(path)
        self._facts = self._native.facts()

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Base:
        """Opens a checkpoint: ``transformer_blocks.safetensors``, or a single file of either generation.

        It can be an address, as an adapter can; then it is fetched first.

        Raises:
            FormatError: ``invalid-base`` if the file holds no quantized layers, ``invalid-packing`` if its branches
                have sizes that cannot be.
        """
        return cls(_opened(path))

    @property
    def path(self) -> str:
        """The file's path or address."""
        return self._native.path()

    @property
    def family(self) -> str:
        """The architecture of the model."""
        return self._facts[0]

    @property
    def fingerprint(self) -> str:
        """A short hash over its branches, the same for every layout of one checkpoint."""
        return self._facts[1]

    @property
    def precision(self) -> str | None:
        """``int4`` or ``fp4``; None if that does not show."""
        return self._facts[2]

    @property
    def rank(self) -> int:
        """The rank of most of its own branches."""
        return self._facts[3]

    def to_torch(
        self,
        *loras: Source | tuple[Source, Strength],
        layout: Layout = "aligned",
        device: Any = "cpu",
        out: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """One adapter, or several with their strengths, as torch tensors for ``transformer.update_lora_params(dict)``.

        Everything is computed straight into the tensors. ``out`` is an earlier result that is no longer needed: tensors
        of the right size are used again instead of new ones, which saves the system finding the memory.
        """
        return fill_torch(self._plan(loras, layout), device, out)

    def to_numpy(self, *loras: Source | tuple[Source, Strength], layout: Layout = "aligned") -> dict[str, Any]:
        """The same as numpy arrays."""
        return fill_numpy(self._plan(loras, layout))

    def _plan(self, loras: tuple[Any, ...], layout: str) -> _lorafmt.Plan:
        from .api import _native_plan

        return _native_plan(loras, self._native, layout)

    def __deepcopy__(self, _: object) -> Base:
        return self  # nothing in it changes

    def __repr__(self) -> str:
        return f"<Base {self.family} {self.precision or 'quantized'} rank {self.rank} {self.fingerprint}>"


def native_base(base: Any) -> _lorafmt.Base | None:
    """The base as the native module takes it."""
    if base is None or isinstance(base, _lorafmt.Base):
        return base
    if isinstance(base, Base):
        return base._native
    return _opened(base)


def _opened(path: str | os.PathLike[str]) -> _lorafmt.Base:
    with located(path) as source:
        return _lorafmt.Base.open(source)
