"""The original names of a model against diffusers' converters of whole checkpoints: rows land where they do there."""

from __future__ import annotations

from typing import Any

import pytest

import models
import tables

CASES = [
    (family, model.variant)
    for family in tables.families()
    for model in tables.load(family)
    if (family, model.variant) in models.CONVERTERS
]


def numbered(model: tables.Model, converter: models.Converter) -> tuple[dict[str, Any], dict[str, Any]]:
    """A checkpoint whose every output row has a number of its own, and what our table says becomes of it.

    One number stands for a whole row: no converter moves the columns of a weight.
    """
    import torch

    part = converter.component
    layers = model.components[part]
    swapped = model.swapped.get(part, {}).get("original", set())
    params = model.params.get(part, {}).get("original", {})
    checkpoint, expected, first = {}, {}, 0
    for name, canonical in model.names[part]["original"].items():
        # A parameter that is no layer may be called differently on either side; layers have a bias too.
        own, theirs = layers[canonical[0]].param or "weight", params.get(name, "weight")
        for ours, their in [(own, theirs), ("bias", "bias")] if own == "weight" else [(own, theirs)]:
            rows = []
            for path in canonical:
                rows.append(torch.arange(first, first + layers[path].outputs))
                first += layers[path].outputs
                moved = torch.cat(rows[-1].chunk(2)[::-1]) if name in swapped else rows[-1]
                expected[f"{path}.{ours}"] = moved
            dot = "_" if converter.joined and name.endswith(converter.joined) else "."
            checkpoint[f"{converter.prefix}{name}{dot}{their}"] = torch.cat(rows)
    for extra in converter.extras:
        checkpoint[converter.prefix + extra] = torch.zeros(2)
    return checkpoint, expected


@pytest.mark.parametrize(("family", "variant"), CASES)
def test_rows_land_where_diffusers_puts_them(family: str, variant: str | None) -> None:
    import torch
    from diffusers.loaders import single_file_utils

    converter = models.CONVERTERS[family, variant]
    model = next(m for m in tables.load(family) if m.variant == variant)
    checkpoint, expected = numbered(model, converter)
    found = getattr(single_file_utils, converter.function)(checkpoint, **converter.arguments)
    known = {key: rows for key, rows in expected.items() if not any(part in key for part in converter.ignores)}
    # Diffusers leaves out the biases that the model does not have.
    assert [key for key in known if key not in found and not key.endswith(".bias")] == []
    assert [key for key in known if key in found and not torch.equal(known[key], found[key])] == []
