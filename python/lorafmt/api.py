"""The functions of the package: the same operations as the commands, with the same names and rules."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, TypeAlias, overload

from . import _lorafmt, reports
from ._names import COMPONENTS, Dialect, Dtype, Family, Lossy, Unknown
from ._sources import fill_numpy, fill_torch, framework_of, native_source, usage_error
from .adapter import Adapter
from .base import BaseLike, native_base

Layout: TypeAlias = Literal["aligned", "packed"]
Precision: TypeAlias = Literal["int4", "fp4"]

#: A path, the bytes of a file, a dict of torch or numpy tensors, or an adapter.
Source: TypeAlias = "str | os.PathLike[str] | bytes | Mapping[str, Any] | Adapter"

#: What :func:`compose` takes: sources, or pairs of a source and its strength.
Loras: TypeAlias = "Iterable[Source | tuple[Source, Strength]]"

#: Called now and then with bytes written and bytes to write.
Progress: TypeAlias = Callable[[int, int], object]


#: How strongly an adapter counts: a number, or numbers by place. Of a mapping, the key ``"*"`` is for everything (1
#: without it), ``"text_encoders"`` for all components but the main one, a component's name (``"transformer"``,
#: ``"text_encoder"``) for that component; every other key is a selector of modules (``"transformer_blocks.0-9"``,
#: ``"**.attn"``) whose factor is multiplied with those.
Strength: TypeAlias = "float | Mapping[str, float]"


def _native(src: Source, family: str | None, from_: str | None, base: BaseLike | None = None) -> _lorafmt.Adapter:
    if isinstance(src, Adapter):
        return src._native
    return _lorafmt.Adapter.open(native_source(src), json.dumps({"family": family, "from": from_}), native_base(base))


def open(
    src: Source,
    *,
    family: Family | None = None,
    from_: Dialect | None = None,
    base: BaseLike | None = None,
) -> Adapter:
    """Opens an adapter without reading more than its header. Tensors are never copied until they are asked for.

    ``base`` is the quantized checkpoint of a native adapter: its own branches are taken off.

    Raises:
        FormatError: for files that are damaged, of an unknown family, or hold half modules.
        FileNotFoundError: if there is no such file.
    """
    native = _native(src, family, from_, base)
    native.ensure_sound()
    return Adapter(native, options={"from": from_, "family": family}, framework=framework_of(src))


def inspect(src: Source, *, family: Family | None = None, from_: Dialect | None = None) -> reports.AdapterInfo:
    """What a file is: dialect, family, kind, ranks, who loads it. Reads the header and alphas only."""
    return reports._info(_native(src, family, from_).inspect())


def detect(src: Source, *, family: Family | None = None, from_: Dialect | None = None) -> reports.Detection:
    """The dialect and family of a file, and the share of its keys that they explain."""
    return reports._detection(_native(src, family, from_).inspect())


def check(src: Source, *, family: Family | None = None, from_: Dialect | None = None) -> reports.CheckReport:
    """Looks for everything that can be wrong: half pairs, shapes, unknown keys, NaN. Reads every tensor once."""
    if isinstance(src, Adapter):
        return reports._check(src._native.check())
    return reports._check(_lorafmt.check(native_source(src), json.dumps({"family": family, "from": from_})))


def diff(a: Source, b: Source, *, tolerance: float = 1e-6, family: Family | None = None) -> reports.DiffReport:
    """Compares what two adapters do, module by module: relative Frobenius error of the deltas, whatever the dialect."""
    return reports._diff(_lorafmt.diff(_native(a, family, None), _native(b, family, None), tolerance))


@overload
def convert(
    src: Source,
    dst: None = None,
    *,
    to: Dialect = "diffusers",
    from_: Dialect | None = None,
    family: Family | None = None,
    dtype: Dtype = "keep",
    strength: float = 1.0,
    unknown: Unknown = "error",
    lossy: Lossy = "error",
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Adapter: ...


@overload
def convert(
    src: Source,
    dst: str | os.PathLike[str],
    *,
    to: Dialect = "diffusers",
    from_: Dialect | None = None,
    family: Family | None = None,
    dtype: Dtype = "keep",
    strength: float = 1.0,
    unknown: Unknown = "error",
    lossy: Lossy = "error",
    overwrite: bool = False,
    progress: Progress | None = None,
) -> reports.Report: ...


def convert(
    src: Source,
    dst: str | os.PathLike[str] | None = None,
    *,
    to: Dialect = "diffusers",
    from_: Dialect | None = None,
    family: Family | None = None,
    dtype: Dtype = "keep",
    strength: float = 1.0,
    unknown: Unknown = "error",
    lossy: Lossy = "error",
    overwrite: bool = False,
    progress: Progress | None = None,
) -> reports.Report | Adapter:
    """Converts an adapter into another dialect.

    Args:
        src: a path, bytes, a dict of torch or numpy tensors, or an Adapter.
        dst: the file to write (for ``to="peft"`` also a folder); without it the result is an Adapter whose tensors are
            computed into memory.
        to: the dialect to write.
        from_: the dialect that the input is said to be; recognised by its keys otherwise.
        family: the base model's architecture, where keys alone do not tell.
        dtype: ``keep``, ``bf16``, ``fp16`` or ``fp32``. FP8 factors become bfloat16 under ``keep``, exactly.
        strength: a factor on every delta.
        unknown: what to do with keys no table knows: ``error``, ``drop`` or ``keep``.
        lossy: ``allow`` leaves out what the target cannot hold, and says so in the report.
        overwrite: replace an existing output.
        progress: called with bytes done and bytes to do.

    Raises:
        LorafmtError: with ``code``, ``hint``, ``path`` and ``key``; nothing is left behind and no file is harmed.
    """
    options = _options(to, from_, family, dtype, strength, unknown, lossy)
    native = _native(src, family, from_)
    if dst is not None:
        return reports._report(native.convert(os.fspath(dst), options, overwrite, progress))
    converted, report = native.converted(options, progress)
    # Unknown keys that were asked to be kept are part of the result.
    return Adapter(converted, options={"unknown": "keep"}, framework=framework_of(src), report=reports._report(report))


def _options(
    to: str,
    from_: str | None,
    family: str | None,
    dtype: str,
    strength: float,
    unknown: str,
    lossy: str,
) -> str:
    """The keyword arguments as the native module takes them; values of the wrong type are errors here."""
    words = {"to": to, "dtype": dtype, "unknown": unknown, "lossy": lossy}
    optional = {"from": from_, "family": family}
    for name, value in {**words, **{k: v for k, v in optional.items() if v is not None}}.items():
        if not isinstance(value, str):
            raise usage_error(f"`{name}` is {value!r}", "pass a string")
    try:
        factor = float(strength)
    except (TypeError, ValueError):
        factor = math.nan
    if isinstance(strength, str) or not math.isfinite(factor):
        raise usage_error(f"`strength` is {strength!r}", "pass a finite number")
    return json.dumps({**words, **optional, "strength": factor})


def convert_state_dict(
    state_dict: Mapping[str, Any],
    *,
    to: Dialect = "diffusers",
    from_: Dialect | None = None,
    family: Family | None = None,
    base: BaseLike | None = None,
    dtype: Dtype = "keep",
    strength: float = 1.0,
    unknown: Unknown = "error",
    lossy: Lossy = "error",
    layout: Layout = "aligned",
    max_rank: int | None = None,
    widen: int | None = None,
) -> dict[str, Any]:
    """Converts a dict of torch or numpy tensors into a new dict; tensors keep their framework and device."""
    options = _options(to, from_, family, dtype, strength, unknown, lossy, layout, None, max_rank, widen)
    terms = [(_native(state_dict, family, from_, base), None)]
    plan = _lorafmt.plan(terms, options, native_base(base), False)
    if framework_of(state_dict) != "torch":
        return fill_numpy(plan)
    return fill_torch(plan, next(iter(state_dict.values())).device)


def register_table(table: str) -> None:
    """Adds a dialect or a family, given as TOML text, for the rest of the process; an equal name replaces."""
    _lorafmt.register_table(table)
