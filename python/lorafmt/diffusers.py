"""Adapters of any dialect in diffusers' own pipelines.

    lorafmt.diffusers.load_lora(pipe, "kohya.safetensors", adapter_name="style", strength=0.8)

Needs torch and diffusers; importing it imports neither.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ._names import Dialect, Family, Lossy, Unknown
from .api import Source, convert

if TYPE_CHECKING:
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
        pipe: a pipeline with ``load_lora_weights``; its transformer may be one of :mod:`lorafmt.runtime`.
        src: a path, bytes, a dict of tensors, or an opened adapter, of any dialect.
        adapter_name: as for ``load_lora_weights``; by default the pipeline makes one.
        strength: sets the adapter active with this weight, beside those that are active (``pipe.set_adapters``); needs a
            name. By default nothing is set.
        hotswap: in place of the adapter of that name, without changing the model's structure.
        family, from_, unknown, lossy, max_rank: as for :func:`lorafmt.convert`.
        options: passed on to ``load_lora_weights``.

    Returns the report of the conversion: what was used, dropped, unknown. Tensors are new memory; alphas are multiplied
    in. Raises :class:`lorafmt.LorafmtError` before the pipeline is touched, and what the pipeline raises.
    """
    if strength is not None and adapter_name is None:
        from ._sources import usage_error

        raise usage_error("a strength needs an adapter's name", "pass `adapter_name`")
    adapter = convert(
        src, to="diffusers", family=family, from_=from_, unknown=unknown, lossy=lossy, max_rank=max_rank
    )
    if hotswap:
        options["hotswap"] = True
    pipe.load_lora_weights(adapter.to_torch(), adapter_name=adapter_name, **options)
    if strength is not None:
        _activate(pipe, adapter_name, strength)
    assert adapter.report is not None
    return adapter.report


def _activate(pipe: Any, name: str | None, strength: Any) -> None:
    """Sets one adapter's weight and leaves those of the others, which diffusers keeps in its layers."""
    transformer = getattr(pipe, "transformer", None)
    own = getattr(transformer, "adapters", None)
    if own is not None:
        others = {other: a.strength for other, a in own.loaded.items() if a.active and other != name}
        transformer.set_adapters([*others, name], [*others.values(), strength])
        return
    active = [other for other in pipe.get_active_adapters() if other != name]
    pipe.set_adapters([*active, name], [*(_weight(pipe, other) for other in active), strength])


def _weight(pipe: Any, name: str) -> float:
    """The weight that an adapter has in a pipeline now: that of the first layer which has it."""
    for component in pipe.components.values():
        for module in component.modules() if hasattr(component, "modules") else ():
            if name in getattr(module, "scaling", {}):
                return module.scaling[name] * module.r[name] / module.lora_alpha[name]
    return 1.0
