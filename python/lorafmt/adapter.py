"""An adapter in memory: a mapping of modules whose tensors are computed when they are asked for."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal

from . import _lorafmt, reports
from ._sources import fill_numpy, fill_torch
from .exceptions import UnsupportedError

if TYPE_CHECKING:
    import numpy as np

    from .api import Layout, Strength
    from .base import BaseLike


class Module:
    """One adapted layer under its canonical (diffusers) path."""

    def __init__(self, adapter: _lorafmt.Adapter, component: str, path: str) -> None:
        self._adapter = adapter
        self.component = component
        self.path = path
        self._facts: dict[str, Any] = json.loads(adapter.module(self.name))

    @property
    def name(self) -> str:
        """Component and path: ``transformer.transformer_blocks.0.attn.to_q``."""
        return f"{self.component}.{self.path}"

    @property
    def kind(self) -> str:
        """``lora``, ``dora``, ``loha``, ``lokr``, ``full``, ``norm``, ``set``, ..."""
        return str(self._facts["kind"])

    @property
    def rank(self) -> int | None:
        """The rank, for kinds that have one."""
        rank: int | None = self._facts["rank"]
        return rank

    @property
    def scale(self) -> float:
        """The factor on ``up @ down``: alpha / rank."""
        return float(self._facts["scale"])

    @property
    def alpha(self) -> float | None:
        """scale * rank."""
        return None if self.rank is None else self.scale * self.rank

    @property
    def shape(self) -> tuple[int, int] | None:
        """(out, in) of the delta; None for kinds without one."""
        shape = self._facts["shape"]
        return None if shape is None else (shape[0], shape[1])

    def delta(self, strength: float = 1.0, dtype: str = "float32") -> np.ndarray:
        """The weight difference ``strength * scale * up @ down`` (for LoHa and LoKr their own formula), as a new
        numpy array of ``shape``; accumulated in float64 and rounded once to ``dtype`` (``float32`` or ``float64``).

        Raises:
            UnsupportedError: for kinds that need the base weight, such as DoRA.
        """
        import numpy

        shape = self.shape
        if shape is None:
            error = UnsupportedError(f"a {self.kind} module has no delta without the base weights")
            error.code, error.key = "unsupported-kind", self.name
            raise error
        out = numpy.empty(shape, numpy.dtype(dtype))
        self._adapter.delta_into(self.name, strength, (out.__array_interface__["data"][0], out.nbytes, out))
        return out

    def __repr__(self) -> str:
        return f"<{self.kind} module {self.name} {self.shape} rank {self.rank} scale {self.scale:g}>"


class Adapter(Mapping[str, Module]):
    """An adapter that was opened or converted. Nothing but the header has been read; files stay mapped.

    A mapping from canonical module paths to modules. Paths of the main component stand by themselves, those of text
    encoders carry the component's name (``text_encoder.text_model...``). Usable as a context manager.
    """

    def __init__(
        self,
        native: _lorafmt.Adapter,
        *,
        options: dict[str, Any],
        framework: str | None,
        report: reports.Report | None = None,
        base: _lorafmt.Base | None = None,
    ) -> None:
        self._native = native
        self._base = base
        self._report = report
        self._options = options
        self._framework = framework
        self._info: reports.AdapterInfo | None = None
        self._paths: dict[str, tuple[str, str]] | None = None

    @property
    def info(self) -> reports.AdapterInfo:
        """Everything that ``inspect`` says of the file it came from."""
        if self._info is None:
            self._info = reports._info(self._native.inspect())
        return self._info

    @property
    def family(self) -> str:
        """The base model's architecture."""
        return self.info.family

    @property
    def dialect(self) -> str:
        """The dialect that its keys are in."""
        return self.info.dialect

    @property
    def kind(self) -> str:
        """The kind of its modules."""
        return self.info.kind

    @property
    def rank(self) -> int | None:
        """The rank, if all modules share one."""
        return self.info.rank

    @property
    def metadata(self) -> dict[str, str]:
        """The metadata of the file it came from."""
        return dict(self.info.metadata)

    @property
    def modules(self) -> list[str]:
        """The paths of all modules."""
        return list(self._index())

    @property
    def report(self) -> reports.Report | None:
        """What the conversion did that made this adapter; None for one that was opened."""
        return self._report

    def _index(self) -> dict[str, tuple[str, str]]:
        if self._paths is None:
            pairs = self._native.modules()
            main = pairs[0][0] if pairs else ""
            self._paths = {
                path if component == main else f"{component}.{path}": (component, path) for component, path in pairs
            }
        return self._paths

    def __getitem__(self, path: str) -> Module:
        index = self._index()
        found = index.get(path)
        if found is None:
            wanted = next((pair for pair in index.values() if ".".join(pair) == path), None)
            if wanted is None:
                raise KeyError(path)
            found = wanted
        return Module(self._native, *found)

    def __iter__(self) -> Iterator[str]:
        return iter(self._index())

    def __len__(self) -> int:
        return len(self._index())

    def __enter__(self) -> Adapter:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing to close: the mapping of the file ends with the last reference to the adapter."""

    def _with_target(self, dialect: str | None) -> str:
        """The options of writing it: as ``dialect``, else as its own if that can be written, else as diffusers'."""
        written = {name for name, writes in _lorafmt.formats()[0] if writes}
        own = self.dialect if self.dialect in written else "diffusers"
        return json.dumps({**self._options, "to": dialect or own})

    def _plan(self, dialect: str | None) -> _lorafmt.Plan:
        return _lorafmt.plan([(self._native, None)], self._with_target(dialect), self._base)

    def to_numpy(self, dialect: str | None = None) -> dict[str, np.ndarray]:
        """The tensors as new numpy arrays, keyed as ``dialect`` spells them.

        bfloat16 and FP8 arrays need the ml_dtypes package; without it their bits come as uint16 and uint8.
        """
        return fill_numpy(self._plan(dialect))

    def to_torch(self, device: Any = "cpu", dialect: str | None = None) -> dict[str, Any]:
        """The tensors as new torch tensors on ``device``, keyed as ``dialect`` spells them."""
        return fill_torch(self._plan(dialect), device)

    def state_dict(self, dialect: str | None = None, *, framework: str | None = None) -> dict[str, Any]:
        """The tensors keyed as ``dialect`` spells them.

        ``framework`` is ``torch`` or ``numpy``; by default that of the dict the adapter came from, else torch if it
        is installed, else numpy.
        """
        framework = framework or self._framework or _installed()
        return self.to_torch(dialect=dialect) if framework == "torch" else self.to_numpy(dialect)

    def to_lora(
        self,
        *,
        rank: int | None = None,
        energy: float | None = None,
        max_error: float | None = None,
        base_weights: str | os.PathLike[str] | None = None,
        lossy: Literal["error", "allow"] = "error",
        seed: int = 0,
    ) -> Adapter:
        """The same adapter as plain LoRA, exact unless a rank or an error is given; see :func:`lorafmt.expand`.

        Its tensors are computed when they are asked for, but for those of differences of full rank.
        """
        from ._expand import _expanded

        how = {"rank": rank, "energy": energy, "max_error": max_error, "seed": seed, "lossy": lossy}
        plain = _expanded(self._native, how, base_weights)
        return Adapter(plain, options=self._options, framework=self._framework)

    def to_nunchaku(
        self,
        base: BaseLike,
        *,
        strength: Strength = 1.0,
        layout: Layout = "aligned",
        device: Any = "cpu",
        out: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """The adapter behind the branches of ``base`` as torch tensors, for ``transformer.update_lora_params(dict)``.

        No file is written. Keep a :class:`lorafmt.Base` for several adapters; see :meth:`lorafmt.Base.to_torch`.
        """
        from .base import Base

        opened = base if isinstance(base, Base) else Base.open(base)
        return opened.to_torch((self, strength), layout=layout, device=device, out=out)

    def save(
        self,
        path: str | os.PathLike[str],
        dialect: str | None = None,
        *,
        overwrite: bool = False,
    ) -> reports.Report:
        """Writes a file, atomically. Raises OutputExistsError unless ``overwrite`` is given."""
        terms = [(self._native, None)]
        return reports._report(
            _lorafmt.write(terms, os.fspath(path), self._with_target(dialect), overwrite, self._base)
        )

    def __repr__(self) -> str:
        info = self.info
        return (
            f"<Adapter {info.family} {info.kind} from {info.dialect}, {len(self)} modules, rank {info.rank or 'mixed'}>"
        )


def _installed() -> str:
    import importlib.util

    return "torch" if importlib.util.find_spec("torch") else "numpy"
