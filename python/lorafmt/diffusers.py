"""Adapters of any dialect in diffusers' own pipelines.

    lorafmt.diffusers.load_lora(pipe, "kohya.safetensors", adapter_name="style", strength=0.8)

Needs torch and diffusers; importing it imports neither.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

from ._names import Dialect, Family, Lossy, Unknown
from .api import Source, convert

if TYPE_CHECKING:
    from .adapter import Adapter
    from .reports import Report


def load_lora(
    pipe: Any,
    src: Source,
    adapter_name: str | None = None,
    *,
    strength: Any = None,
    hotswap: bool = False,
    family: Family | None = None,
    from_: Dialect | None = None,
    unknown: Unknown = "error",
    lossy: Lossy = "error",
    max_rank: int | None = 128,
    **options: Any,
) -> Report:
    """Converts an adapter in memory to diffusers' dialect and hands it to ``pipe.load_lora_weights``.

    Args:
        pipe: a pipeline with ``load_lora_weights``; its transformer or UNet may be one of :mod:`lorafmt.runtime`.
        src: a path, bytes, a dict of tensors, or an opened adapter, of any dialect.
        adapter_name: as for ``load_lora_weights``; by default the pipeline makes one.
        strength: sets the adapter active with this weight, beside those that are active already
            (``pipe.set_adapters``); needs a name. By default nothing is set.
        hotswap: in place of the adapter of that name, without changing the model's structure.
        family, from_, unknown, lossy, max_rank: as for :func:`lorafmt.convert`.
        options: passed on to ``load_lora_weights``.

    Returns the report of the conversion: what was used, dropped, unknown. Tensors are new memory; alphas are multiplied
    in. Raises :class:`lorafmt.LorafmtError` before the pipeline is touched, and what the pipeline raises.
    """
    if strength is not None and adapter_name is None:
        from ._sources import usage_error

        raise usage_error("a strength needs an adapter's name", "pass `adapter_name`")
    adapter = convert(src, to="diffusers", family=family, from_=from_, unknown=unknown, lossy=lossy, max_rank=max_rank)
    if hotswap:
        options["hotswap"] = True
    active = _active(pipe) if strength is not None else {}
    own = _own(pipe)
    if own is not None:
        _load_apart(pipe, own, adapter, adapter_name, lossy, options)
    else:
        pipe.load_lora_weights(adapter.to_torch(), adapter_name=adapter_name, **options)
    if strength is not None:
        weights = {**active, adapter_name: strength}
        pipe.set_adapters(list(weights), list(weights.values()))
    assert adapter.report is not None
    return adapter.report


def _own(pipe: Any) -> Any:
    """The pipeline's model, if it is one of :mod:`lorafmt.runtime`."""
    models = (getattr(pipe, name, None) for name in ("transformer", "unet"))
    return next((model for model in models if hasattr(model, "adapters")), None)


def _load_apart(
    pipe: Any, model: Any, adapter: Adapter, name: str | None, lossy: Lossy, options: dict[str, Any]
) -> None:
    """Loads into a model of :mod:`lorafmt.runtime`, whose layers the pipeline's loader does not know, and the rest into
    the pipeline's text encoders."""
    loaded = model.load_lora_adapter(adapter, adapter_name=name, lossy=lossy, _pipeline=pipe, **options)
    if loaded.left_out:
        warnings.warn(f"{len(loaded.left_out)} modules were left out, {loaded.left_out[0]} the first", stacklevel=3)
    rest = [path for path in adapter if path.startswith("text_encoder")]
    for prefix in ("text_encoder", "text_encoder_2"):
        encoder = getattr(pipe, prefix, None)
        own = [path for path in rest if path.startswith(f"{prefix}.")]
        if not own or encoder is None or prefix not in getattr(pipe, "_lora_loadable_modules", ()):
            continue
        rest = [path for path in rest if path not in own]
        pipe.load_lora_into_text_encoder(
            adapter.to_torch(),
            network_alphas=None,
            text_encoder=encoder,
            prefix=prefix,
            lora_scale=pipe.lora_scale,
            adapter_name=name,
            _pipeline=pipe,
            **options,
        )
    if rest:
        warnings.warn(f"{len(rest)} modules are for text encoders and were left out: {rest[0]}", stacklevel=3)


def _active(pipe: Any) -> dict[str | None, Any]:
    """Adapters that are active, with their weights."""
    own = _own(pipe)
    if own is not None:
        return {name: loaded.strength for name, loaded in own.adapters.loaded.items() if loaded.active}
    return {name: _weight(pipe, name) for name in pipe.get_active_adapters()}


def _weight(pipe: Any, name: str) -> float:
    """The weight that diffusers gave an adapter: it is in the scale of its layers, of which the first is looked at."""
    for component in pipe.components.values():
        for module in component.modules() if hasattr(component, "modules") else ():
            if name in getattr(module, "scaling", {}):
                return float(module.scaling[name] * module.r[name] / module.lora_alpha[name])
    return 1.0
