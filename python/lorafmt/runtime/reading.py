"""Adapters of any dialect as factors by module, computed once into memory that is used again."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .. import _lorafmt
from .._sources import _native_tensor, fill_torch, native_source
from ..adapter import Adapter
from ..api import Source, _options
from ..base import BaseLike, native_base
from ..exceptions import FormatError, UnsupportedError, UsageError
from .tensorfile import failed

_DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
_DOWN, _UP, _BIAS = ".lora_A.weight", ".lora_B.weight", ".lora_B.bias"

#: A strength that leaves out everything but the component of the model; what is left out costs nothing.
_MAIN_ONLY = json.dumps({"strength": 1.0, "text_encoder_strength": 0.0})


@dataclass
class Incoming:
    """An adapter on its way into a model: factors and bias differences by the path of their module, on the CPU."""

    native: _lorafmt.Adapter
    #: Paths of all its modules, in its order.
    modules: list[str]
    factors: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    biases: dict[str, Tensor] = field(default_factory=dict)
    #: Modules of other components (text encoders), which are not for this model.
    others: list[str] = field(default_factory=list)
    #: Modules that the branch cannot hold and that ``lossy="allow"`` left out.
    left_out: list[str] = field(default_factory=list)


def read(
    src: Source,
    dtype: torch.dtype,
    *,
    family: str | None = None,
    from_: str | None = None,
    base: BaseLike | _lorafmt.Base | None = None,
    lossy: str = "error",
    expand: Mapping[str, Any] | None = None,
    extra: Mapping[str, Any] | None = None,
    staging: dict[str, Tensor] | None = None,
) -> Incoming:
    """Reads an adapter and computes its factors in ``dtype``, alpha and all, each number rounded once.

    What is not plain LoRA is made so (:func:`lorafmt.expand`) with the options ``expand``: exactly, unless they have a
    rank or an error. ``extra`` has ``alphas`` and ``metadata`` as diffusers hands them over. ``staging`` is memory of
    an earlier call, which is written over, and has that of this call afterwards.

    Errors: those of :func:`lorafmt.open` and :func:`lorafmt.expand`; ``unsupported-kind`` for what no branch can hold.
    """
    native = _opened(src, family, from_, base, extra or {})
    pairs = native.modules()
    main = pairs[0][0] if pairs else ""
    others = [".".join(pair) for pair in pairs if pair[0] != main]
    incoming = Incoming(native, [path for _, path in pairs], others=others)
    plan = _plan(native, dtype, lossy)
    if plan is None or any(not key.endswith((_DOWN, _UP, _BIAS)) for key, _, _ in plan.tensors()):
        plan = _plan(_expanded(native, expand or {}, lossy), dtype, lossy)
        assert plan is not None
    tensors = fill_torch(plan, out=staging)
    seen = _sort(incoming, tensors, f"{main}.", lossy)
    if staging is not None:
        staging.clear()
        staging.update(tensors)
    missing = [path for component, path in pairs if component == main and path not in seen]
    incoming.left_out.extend(sorted(set(missing) - set(incoming.left_out)))
    if missing and lossy != "allow":
        raise _unsupported(native, f"{main}.{missing[0]}")
    if not seen:
        message = f"{_named(src)} has nothing for this model, only {', '.join(incoming.others) or 'nothing at all'}"
        raise failed(FormatError, "no-modules", message, "load it into the pipeline's text encoders")
    return incoming


def _opened(src: Any, family: str | None, from_: str | None, base: Any, extra: Mapping[str, Any]) -> _lorafmt.Adapter:
    """The adapter; ``base`` is opened only for native files that do not say themselves what is whose."""
    if isinstance(src, Adapter):
        return src._native
    source = native_source(src)
    if isinstance(source, tuple):
        tensors, metadata = source
        alphas = [_native_tensor(key, value) for key, value in (extra.get("alphas") or {}).items()]
        noted = extra.get("metadata")
        entries = [("lora_adapter_metadata", json.dumps(noted, default=list))] if noted else []
        source = [*tensors, *alphas], [*metadata, *entries]
    options = json.dumps({"family": family, "from": from_})
    try:
        native = _lorafmt.Adapter.open(source, options, None)
        native.ensure_sound()
    except UsageError as error:
        if error.code != "base-needed" or base is None:
            raise
        native = _lorafmt.Adapter.open(source, options, native_base(base))
        native.ensure_sound()
    return native


def _plan(native: _lorafmt.Adapter, dtype: torch.dtype, lossy: str) -> _lorafmt.Plan | None:
    """The factors in diffusers' names; None if some module cannot be said there."""
    options = _options("diffusers", None, None, _DTYPES[dtype], 1.0, "error", lossy, "aligned", None, None, None)
    try:
        return _lorafmt.plan([(native, _MAIN_ONLY)], options, None, False)
    except UnsupportedError as error:
        if error.code != "unsupported-kind":
            raise
        return None


def _expanded(native: _lorafmt.Adapter, how: Mapping[str, Any], lossy: str) -> _lorafmt.Adapter:
    known = {name: how.get(name) for name in ("rank", "energy", "max_error")}
    weights = how.get("base_weights")
    options = {**known, "seed": 0, "lossy": lossy}
    return _lorafmt.expand(native, json.dumps(options), None if weights is None else os.fspath(weights))[0]


def _sort(incoming: Incoming, tensors: dict[str, Tensor], prefix: str, lossy: str) -> set[str]:
    """Puts tensors where they belong by their keys; the modules that were met."""
    seen = set()
    for key, value in tensors.items():
        name = key.removeprefix(prefix)
        suffix = next((suffix for suffix in (_DOWN, _UP, _BIAS) if key.endswith(suffix)), None)
        if suffix is None:
            path = name.rpartition(".")[0]
            if lossy != "allow":
                raise _unsupported(incoming.native, prefix + path)
            incoming.left_out.append(path)
            continue
        path = name.removesuffix(suffix)
        seen.add(path)
        if suffix == _DOWN:
            up = tensors[key.removesuffix(_DOWN) + _UP]
            # A module of a bias alone has one rank of zeros beside it, for PEFT's sake.
            if value.shape[0] > 1 or bool(up.any()):
                incoming.factors[path] = value, up
        # Modules without a difference have zeros where others have one.
        elif suffix == _BIAS and bool(value.any()):
            incoming.biases[path] = value.float().clone()
    return seen


def _unsupported(native: _lorafmt.Adapter, name: str) -> UnsupportedError:
    kind = json.loads(native.module(name))["kind"]
    message = f"`{name}` is of the kind {kind}, which a low-rank branch cannot hold"
    hint = 'lossy="allow" leaves it out; lorafmt.fuse writes a checkpoint with it'
    error = failed(UnsupportedError, "unsupported-kind", message, hint, key=name)
    assert isinstance(error, UnsupportedError)
    return error


def _named(src: Any) -> str:
    return os.fspath(src) if isinstance(src, str | os.PathLike) else "the adapter"
