"""Keyword arguments of :func:`lorafmt.compose` that say how adapters become one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypedDict

from ._sources import usage_error


class Merging(TypedDict, total=False):
    """How several adapters become one. What is left out, or None, is as the rule has it."""

    #: ``cat`` (the sum, ranks side by side), ``svd`` (the same with fewer ranks), ``ties``, ``dare-linear``,
    #: ``dare-ties``, ``magnitude-prune``, ``della``, ``della-linear``, ``breadcrumbs``, ``breadcrumbs-ties``,
    #: ``linear``.
    method: str | None
    #: The share of elements that is kept, 0 to 1; or one for each adapter (None for what the rule has).
    density: float | Sequence[float | None] | None
    #: Whose conventions.
    rule: Literal["peft", "mergekit"] | None
    #: Whose elements: those of the deltas in bases that all adapters share, of the deltas, or of the factors.
    space: Literal["core", "delta", "factors"] | None
    #: How signs are elected.
    sign: Literal["total", "frequency"] | None
    #: Whether sums are divided by what was added.
    normalize: bool | None
    #: Whether kept elements make up for dropped ones.
    rescale: bool | None
    #: DELLA: how far chances differ from the density.
    epsilon: float | None
    #: Breadcrumbs: the share of largest elements that is left out.
    gamma: float | None
    #: A factor on what a rule gives.
    lambda_: float | None
    #: Of random choices.
    seed: int | None
    #: The highest rank of the result.
    rank: int | None
    #: The share of the energy that the rank keeps.
    energy: float | None
    #: The largest relative error of the rank.
    max_error: float | None
    #: PEFT's name of a method, its rule and its space, such as ``ties_svd``.
    combination_type: str | None
    #: PEFT's name of ``sign``.
    majority_sign_method: Literal["total", "frequency"] | None
    #: PEFT's name of ``rank``.
    svd_rank: int | None


#: Names of PEFT, and ours.
_ALIASES = {"majority_sign_method": "sign", "svd_rank": "rank", "lambda_": "lambda"}
_WORDS = {"method", "rule", "space", "sign", "combination_type"}
_FLAGS = {"normalize", "rescale"}
_COUNTS = {"seed", "rank"}


def choices(merging: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments as the native module takes them; values of the wrong type are errors here."""
    unknown = merging.keys() - Merging.__annotations__.keys()
    if unknown:
        raise TypeError(f"compose() got an unexpected keyword argument {min(unknown)!r}")
    out: dict[str, Any] = {}
    for given, value in merging.items():
        name = _ALIASES.get(given, given)
        if value is None:
            continue
        if name in out and out[name] != value:
            raise usage_error(f"`{given}` and `{name}` are two names of one thing", "give one of them")
        out[name] = _checked(given, name, value)
    return out


def _checked(given: str, name: str, value: Any) -> Any:
    if name == "density":
        return _density(value)
    if name in _WORDS:
        return _typed(given, value, isinstance(value, str), "a string")
    if name in _FLAGS:
        return _typed(given, value, isinstance(value, bool), "True or False")
    if name in _COUNTS:
        whole = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**64
        return _typed(given, value, whole, "a whole number, not below 0")
    return _typed(given, value, _is_finite(value), "a finite number")


def _density(value: Any) -> Any:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [v if v is None else _typed("density", v, _is_finite(v), "numbers") for v in value]
    return _typed("density", value, _is_finite(value), "a number, or one for each adapter")


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _typed(name: str, value: Any, fits: bool, wanted: str) -> Any:
    if not fits:
        raise usage_error(f"`{name}` is {value!r}", f"pass {wanted}")
    return value
