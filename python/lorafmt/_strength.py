"""Strengths as users write them, in the form the native module takes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from . import _lorafmt
from ._sources import usage_error


def strength(given: Any, factor: float = 1.0) -> float | dict[str, Any]:
    """The JSON of a strength, ``factor`` times as strong."""

    def times(name: str, value: Any) -> float:
        return finite(name, finite(name, value) * factor)

    if not isinstance(given, Mapping):
        return times("strength", given)
    places = {_name(name): value for name, value in given.items()}
    out: dict[str, Any] = {"strength": times("strength['*']", places.pop("*", 1.0))}
    if "text_encoders" in places:
        out["text_encoder_strength"] = times("strength['text_encoders']", places.pop("text_encoders"))
    # A number under this name is a factor of modules called so.
    if isinstance(places.get("blocks"), str) or _is_list(places.get("blocks")):
        out["block_weights"] = _weights(places.pop("blocks"))
    names = set(_lorafmt.components())
    parts: dict[str, dict[str, Any]] = {"components": {}, "scales": {}, "blocks": {}}
    for name, value in places.items():
        label = f"strength[{name!r}]"
        if isinstance(value, Mapping) or _is_list(value):
            parts["scales"][name] = _scales(label, value)
        elif name in names:
            parts["components"][name] = times(label, value)
        else:
            parts["blocks"][name] = finite(label, value)
    return {**out, **parts}


def finite(name: str, value: Any) -> float:
    """A number; anything else is an error that calls it ``name``."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if isinstance(value, str) or not math.isfinite(number):
        raise usage_error(f"`{name}` is {value!r}", "pass a finite number")
    return number


def _is_list(value: Any) -> bool:
    """A list, a tuple, or a one-dimensional array."""
    if isinstance(value, str | bytes):
        return False
    return isinstance(value, Sequence) or getattr(value, "ndim", 0) == 1


def _name(name: Any) -> str:
    """A key; blocks may be named by their numbers."""
    if isinstance(name, str) or (isinstance(name, int) and not isinstance(name, bool)):
        return str(name)
    raise usage_error(f"a strength has the key {name!r}", "keys are strings")


def _weights(given: Any) -> str | list[float]:
    if isinstance(given, str):
        return given
    return [finite(f"strength['blocks'][{at}]", number) for at, number in enumerate(given)]


def _scales(label: str, given: Any) -> Any:
    if isinstance(given, Mapping):
        return {_name(name): _scales(f"{label}[{name!r}]", value) for name, value in given.items()}
    if _is_list(given):
        return [_scales(f"{label}[{at}]", value) for at, value in enumerate(given)]
    return finite(label, given)
