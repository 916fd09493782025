"""The functions of the package: the same operations as the commands, with the same names and rules."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, overload

from . import _lorafmt, reports
from ._merging import Merging, choices
from ._names import Dialect, Dtype, Family, Lossy, Unknown
from ._sources import fill_numpy, fill_torch, framework_of, located, on_hub, usage_error
from ._strength import finite as _finite
from ._strength import strength as _strength
from .adapter import Adapter
from .base import BaseLike, native_base

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .hub import HubOptions

Layout: TypeAlias = Literal["aligned", "packed"]
Precision: TypeAlias = Literal["int4", "fp4"]

#: A path, an address (``hf://user/repo@revision/file``, ``user/repo/file.safetensors``, ``s3://bucket/key``), the bytes
#: of a file, a dict of torch or numpy tensors, or an adapter.
Source: TypeAlias = "str | os.PathLike[str] | bytes | Mapping[str, Any] | Adapter"

#: What :func:`compose` takes: sources, or pairs of a source and its strength.
Loras: TypeAlias = "Iterable[Source | tuple[Source, Strength]]"

#: Adapters with the JSON of their strengths, as the native module takes them.
Terms: TypeAlias = "list[tuple[_lorafmt.Adapter, str | None]]"

#: Called now and then with bytes written and bytes to write.
Progress: TypeAlias = Callable[[int, int], object]


#: Factors as nested as the model's modules: a number for all that is below, a list with one entry for each numbered
#: block, or a mapping by name. What is not named stays as it is.
Scales: TypeAlias = "float | Sequence[Scales] | Mapping[str, Scales] | Mapping[int, Scales]"

#: How strongly an adapter counts: a number, or numbers by place. Of a mapping, the key ``"*"`` is for everything (1
#: without it), ``"text_encoders"`` for all components but the main one, a component's name (``"transformer"``,
#: ``"text_encoder"``) for that component; every other key is a selector of modules (``"transformer_blocks.0-9"``,
#: ``"**.attn"``) whose factor is multiplied with those. ``"blocks"`` with a preset (``"ALL0.5"``) or a list of numbers
#: is block weights. A component can have nested scales in place of a number, as in diffusers' ``set_adapters``:
#: ``{"transformer": {"transformer_blocks": {"0": 0.5}, "single_transformer_blocks": [1, 0.8, ...]}}``. Of several that
#: are for a module, selectors count before nested scales, and those before block weights.
Strength: TypeAlias = "float | Mapping[str, float | str | Sequence[float] | Scales]"


def _native(
    src: Any,
    family: str | None,
    from_: str | None,
    base: BaseLike | _lorafmt.Base | None = None,
    hub: Mapping[str, Any] | None = None,
) -> _lorafmt.Adapter:
    if isinstance(src, Adapter):
        return src._native
    with located(src, hub) as source:
        return _lorafmt.Adapter.open(source, json.dumps({"family": family, "from": from_}), native_base(base))


def _looked_at(
    src: Any,
    family: str | None,
    from_: str | None,
    weights: bool,
    base: BaseLike | None,
    hub: Mapping[str, Any],
) -> str:
    """What a file is, as JSON."""
    url = None if weights else on_hub(src, hub)
    if url is None:
        return _native(src, family, from_, native_base(base), hub).inspect(weights)
    return _lorafmt.Adapter.glance(url, json.dumps({"family": family, "from": from_}), native_base(base))


def open(
    src: Source,
    *,
    family: Family | None = None,
    from_: Dialect | None = None,
    base: BaseLike | None = None,
    **hub: Unpack[HubOptions],
) -> Adapter:
    """Opens an adapter without reading more than its header. Tensors are never copied until they are asked for.

    ``base`` is the quantized checkpoint of a native adapter: its own branches are taken off. Files of a hub are fetched
    into its cache first; ``hub`` are diffusers' names for where they are (see :class:`lorafmt.hub.HubOptions`):
    ``open("user/repo", weight_name="style.safetensors", revision="v1.0")``.

    Raises:
        FormatError: for files that are damaged, of an unknown family, or hold half modules.
        FileNotFoundError: if there is no such file.
        PermissionError: if a hub or a store refuses it.
        ConnectionError: if a server cannot be reached, or is not to be asked.
    """
    native = _native(src, family, from_, base, hub)
    native.ensure_sound()
    return Adapter(native, options={"from": from_, "family": family}, framework=framework_of(src))


def inspect(
    src: Source,
    *,
    family: Family | None = None,
    from_: Dialect | None = None,
    weights: bool = False,
    base: BaseLike | None = None,
    **hub: Unpack[HubOptions],
) -> reports.AdapterInfo:
    """What a file is: dialect, family, kind, ranks, who loads it. Reads the header and alphas only.

    ``weights`` also measures them, which reads all: see :class:`lorafmt.Weights`. ``base`` is taken off native files.
    ``hub`` is as for :func:`open`; of a hub's files, too, only headers and alphas are read, by ranged requests, unless
    the cache has them. With ``weights``, ``token`` or ``cache_dir`` they are fetched whole.
    """
    return reports._info(_looked_at(src, family, from_, weights, base, hub))


def detect(
    src: Source, *, family: Family | None = None, from_: Dialect | None = None, **hub: Unpack[HubOptions]
) -> reports.Detection:
    """The dialect and family of a file, and the share of its keys that they explain. ``hub`` is as for :func:`open`."""
    return reports._detection(_looked_at(src, family, from_, False, None, hub))


def check(src: Source, *, family: Family | None = None, from_: Dialect | None = None) -> reports.CheckReport:
    """Looks for everything that can be wrong: half pairs, shapes, unknown keys, NaN. Reads every tensor once."""
    if isinstance(src, Adapter):
        return reports._check(src._native.check())
    with located(src) as source:
        return reports._check(_lorafmt.check(source, json.dumps({"family": family, "from": from_})))


def diff(
    a: Source,
    b: Source,
    *,
    tolerance: float = 1e-6,
    family: Family | None = None,
    base: BaseLike | None = None,
    by: Literal["block", "module"] = "block",
) -> reports.DiffReport:
    """Compares what two adapters do, module by module: relative Frobenius error of the deltas, whatever the dialect.

    ``base`` is taken off native files. The report has norms, cosine similarity and error of the whole and of each
    block; ``by="module"`` adds those of every module.
    """
    if by not in ("block", "module"):
        raise usage_error(f"`by` is {by!r}", "one of: block, module")
    behind = native_base(base)
    one, other = (_native(src, family, None, behind) for src in (a, b))
    return reports._diff(_lorafmt.diff(one, other, tolerance, by == "module"))


@overload
def convert(
    src: Source,
    dst: None = None,
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
    precision: Precision | None = None,
    max_rank: int | None = None,
    widen: int | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    **hub: Unpack[HubOptions],
) -> Adapter: ...


@overload
def convert(
    src: Source,
    dst: str | os.PathLike[str],
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
    precision: Precision | None = None,
    max_rank: int | None = None,
    widen: int | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    **hub: Unpack[HubOptions],
) -> reports.Report: ...


def convert(
    src: Source,
    dst: str | os.PathLike[str] | None = None,
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
    precision: Precision | None = None,
    max_rank: int | None = None,
    widen: int | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    **hub: Unpack[HubOptions],
) -> reports.Report | Adapter:
    """Converts an adapter into another dialect.

    Args:
        src: a path, an address, bytes, a dict of torch or numpy tensors, or an Adapter.
        dst: the file to write (for ``to="peft"`` also a folder); without it the result is an Adapter whose tensors are
            computed into memory.
        to: the dialect to write.
        from_: the dialect that the input is said to be; recognised by its keys otherwise.
        family: the base model's architecture, where keys alone do not tell.
        base: the quantized checkpoint (a path or a :class:`Base`): what a native adapter is written behind, and what
            is taken off one that is read.
        dtype: ``keep``, ``bf16``, ``fp16`` or ``fp32``. FP8 factors become bfloat16 under ``keep``, exactly. Branches
            of a quantized model have the type of the base's own.
        strength: a factor on every delta.
        unknown: what to do with keys no table knows: ``error``, ``drop`` or ``keep``.
        lossy: ``allow`` leaves out what the target cannot hold, and says so in the report.
        layout: where each adapter's ranks start in a native file: ``aligned`` on multiples of 16, or ``packed``.
        precision: refuses a base that is quantized to something else (``int4`` or ``fp4``).
        max_rank: writes LoHa and LoKr as LoRA where that is exact and takes no more ranks.
        widen: the input width of modules that come in several, filled with zeros (FLUX.1 Control: 128, Fill: 384).
        overwrite: replace an existing output.
        progress: called with bytes done and bytes to do.
        hub: where the file is in a repository, as for :func:`open`.

    Raises:
        LorafmtError: with ``code``, ``hint``, ``path`` and ``key``; nothing is left behind and no file is harmed.
    """
    options = _options(to, from_, family, dtype, strength, unknown, lossy, layout, precision, max_rank, widen)
    behind = native_base(base)
    terms: Terms = [(_native(src, family, from_, behind, hub), None)]
    return _run(terms, dst, options, behind, overwrite, progress, framework_of(src))


@overload
def compose(
    loras: Loras,
    dst: None = None,
    *,
    to: Dialect = "diffusers",
    family: Family | None = None,
    base: BaseLike | None = None,
    dtype: Dtype = "keep",
    unknown: Unknown = "error",
    lossy: Lossy = "error",
    layout: Layout = "aligned",
    precision: Precision | None = None,
    max_rank: int | None = None,
    widen: int | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    **merging: Unpack[Merging],
) -> Adapter: ...


@overload
def compose(
    loras: Loras,
    dst: str | os.PathLike[str],
    *,
    to: Dialect = "diffusers",
    family: Family | None = None,
    base: BaseLike | None = None,
    dtype: Dtype = "keep",
    unknown: Unknown = "error",
    lossy: Lossy = "error",
    layout: Layout = "aligned",
    precision: Precision | None = None,
    max_rank: int | None = None,
    widen: int | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    **merging: Unpack[Merging],
) -> reports.Report: ...


def compose(
    loras: Loras,
    dst: str | os.PathLike[str] | None = None,
    *,
    to: Dialect = "diffusers",
    family: Family | None = None,
    base: BaseLike | None = None,
    dtype: Dtype = "keep",
    unknown: Unknown = "error",
    lossy: Lossy = "error",
    layout: Layout = "aligned",
    precision: Precision | None = None,
    max_rank: int | None = None,
    widen: int | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    **merging: Unpack[Merging],
) -> reports.Report | Adapter:
    """Writes several adapters as one: the weighted sum of their deltas, by putting their ranks side by side, unless
    another ``method`` is given.

    Args:
        loras: sources with their strengths, ``[(src, 0.8), ...]``; a bare source has strength 1. A strength is a number
            or a mapping of numbers by place (see :data:`Strength`). A strength of 0 costs no rank.
        dst: the file to write; without it the result is an Adapter whose tensors are computed into memory.
        to, family, base, dtype, unknown, lossy, layout, precision, max_rank, widen, overwrite, progress: as for
            :func:`convert`. LoHa and LoKr are composed as LoRA if that takes at most ``max_rank`` ranks (128).
        merging: another method than the sum, and fewer ranks: ``method``, ``density``, ``rank`` and so on (see
            :class:`Merging`). Names of PEFT's ``add_weighted_adapter`` are understood.

    Without ``merging`` the result is exact: factors are copied, and each number is multiplied and rounded at most once.

    Raises:
        LorafmtError: with ``code``, ``hint``, ``path`` and ``key``; nothing is left behind and no file is harmed.
    """
    chosen = choices(merging)
    options = _options(to, None, family, dtype, 1.0, unknown, lossy, layout, precision, max_rank, widen, chosen)
    pairs = _pairs(loras)
    behind = native_base(base)
    terms: Terms = [(_native(src, family, None, behind), json.dumps(_strength(strength))) for src, strength in pairs]
    frameworks = {framework_of(src) for src, _ in pairs}
    return _run(terms, dst, options, behind, overwrite, progress, frameworks.pop() if len(frameworks) == 1 else None)


def scale(
    src: Source,
    dst: str | os.PathLike[str] | None = None,
    *,
    strength: Strength = 1.0,
    loras: Mapping[str, float] | None = None,
    to: Dialect | None = None,
    family: Family | None = None,
    base: BaseLike | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> reports.Report | Adapter:
    """Multiplies the effect of an adapter, in its own dialect unless ``to`` names another.

    Args:
        src: as for :func:`convert`.
        dst: the file to write; without it the result is an Adapter in memory.
        strength: a factor, or factors by place (see :data:`Strength`).
        loras: factors of single adapters inside a native file, by the names that :func:`split` gives them.
        to, family, overwrite, progress: as for :func:`convert`.
        base: the quantized checkpoint of a native file that has no metadata.

    Raises:
        LorafmtError: with ``code``, ``hint``, ``path`` and ``key``.
    """
    native = _native(src, family, None)
    info = reports._info(native.inspect())
    own = {name for name, writes in _lorafmt.formats()[0] if writes}
    if to is None and info.dialect not in own:
        raise usage_error(f"`{info.dialect}` cannot be written", "name a dialect with `to`")
    factors = {name: _finite(name, factor) for name, factor in (loras or {}).items()}
    terms: Terms
    if "native" not in info._document:
        if factors:
            raise usage_error("only a native file holds several adapters", "give factors by place in `strength`")
        native.ensure_sound()
        terms = [(native, json.dumps(_strength(strength)))]
        layout, behind = "aligned", native_base(base)
    else:
        parts, behind, layout = native.disassemble(native_base(base))
        labels = _labels(parts)
        unknown = sorted(factors.keys() - set(labels))
        if unknown:
            hint = f"its adapters: {', '.join(labels)}"
            raise usage_error(f"the file holds no adapter called {unknown[0]!r}", hint)
        named = zip(labels, parts, strict=True)
        terms = [(part, json.dumps(_strength(strength, factors.get(label, 1.0)))) for label, (_, part) in named]
    # What was carried into the file stays there.
    options = _options(to or info.dialect, None, family, "keep", 1.0, "keep", "error", layout, None, None, None)
    return _run(terms, dst, options, behind, overwrite, progress, framework_of(src))


def split(src: Source, *, base: BaseLike | None = None) -> dict[str, Adapter]:
    """The adapters inside a native file, by their names in its metadata (of equal names the later with a number).

    Nothing is copied.

    Raises:
        LorafmtError: ``base-needed`` if the file has no metadata and no base is given.
    """
    parts, _, _ = _native(src, None, None).disassemble(native_base(base))
    framework = framework_of(src)
    named = zip(_labels(parts), parts, strict=True)
    return {label: Adapter(part, options={"unknown": "keep"}, framework=framework) for label, (_, part) in named}


def _labels(parts: list[tuple[str, _lorafmt.Adapter]]) -> list[str]:
    """Names of adapters; of equal ones all but the first with their number."""
    labels: list[str] = []
    for number, (name, _) in enumerate(parts, 1):
        labels.append(f"{name}-{number}" if name in labels else name)
    return labels


def _native_plan(loras: Iterable[Any], base: _lorafmt.Base, layout: str) -> _lorafmt.Plan:
    """What adapters are behind a base, without the metadata of a file."""
    pairs = _pairs(loras)
    terms: Terms = [(_native(src, None, None, base), json.dumps(_strength(strength))) for src, strength in pairs]
    dialect = _lorafmt.native_dialect() or ""
    options = _options(dialect, None, None, "keep", 1.0, "error", "error", layout, None, None, None)
    return _lorafmt.plan(terms, options, base, False)


def _pairs(loras: Any) -> list[tuple[Any, Any]]:
    if isinstance(loras, str | bytes | os.PathLike | Mapping) or not isinstance(loras, Iterable):
        raise usage_error(f"the LoRAs to compose are {type(loras).__name__}", "pass a list of (source, strength) pairs")
    return [_pair(lora) for lora in loras]


def _pair(lora: Any) -> tuple[Any, Any]:
    if isinstance(lora, tuple | list):
        if len(lora) == 2:
            return lora[0], lora[1]
        raise usage_error(f"a LoRA to compose has {len(lora)} parts", "pass (source, strength) pairs")
    return lora, 1.0


def _run(
    terms: Terms,
    dst: str | os.PathLike[str] | None,
    options: str,
    base: _lorafmt.Base | None,
    overwrite: bool,
    progress: Progress | None,
    framework: str | None,
) -> reports.Report | Adapter:
    if not terms:
        raise usage_error("there is nothing to compose", "name at least one adapter")
    if dst is not None:
        return reports._report(_lorafmt.write(terms, os.fspath(dst), options, overwrite, base, progress))
    made, report = _lorafmt.converted(terms, options, base, progress)
    # Unknown keys that were asked to be kept are part of the result.
    return Adapter(made, options={"unknown": "keep"}, framework=framework, report=reports._report(report), base=base)


def _options(
    to: str,
    from_: str | None,
    family: str | None,
    dtype: str,
    strength: float,
    unknown: str,
    lossy: str,
    layout: str,
    precision: str | None,
    max_rank: int | None,
    widen: int | None,
    more: Mapping[str, Any] | None = None,
) -> str:
    """The keyword arguments as the native module takes them; values of the wrong type are errors here."""
    words = {"to": to, "dtype": dtype, "unknown": unknown, "lossy": lossy, "layout": layout}
    optional = {"from": from_, "family": family, "precision": precision}
    for name, value in {**words, **{k: v for k, v in optional.items() if v is not None}}.items():
        if not isinstance(value, str):
            raise usage_error(f"`{name}` is {value!r}", "pass a string")
    counts = {"max_rank": max_rank, "widen": widen}
    for name, count in counts.items():
        if count is not None and (not isinstance(count, int) or isinstance(count, bool) or count < 1):
            raise usage_error(f"`{name}` is {count!r}", "pass a positive whole number")
    return json.dumps({**words, **optional, **counts, "strength": _finite("strength", strength), **(more or {})})


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
