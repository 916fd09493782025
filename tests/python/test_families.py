"""Every table of a family against the model's own class, built without memory on the meta device."""

from __future__ import annotations

import pytest

import models
import tables

CASES = [(family, model.variant) for family in tables.families() for model in tables.load(family)]


@pytest.mark.parametrize(("family", "variant"), CASES)
def test_modules_and_shapes_are_those_of_the_class(family: str, variant: str | None) -> None:
    model = next(m for m in tables.load(family) if m.variant == variant)
    known = models.CLASSES[family, variant]
    assert set(known) <= set(model.components)
    for component, build in known.items():
        shapes = build()
        table = model.components[component]
        factored = {path: layer for path, layer in table.items() if layer.param is None}
        matrices = {name: shape for name, shape in shapes.items() if name.endswith(".weight") and len(shape) > 1}
        parameters = {name.removesuffix(".weight"): shape for name, shape in matrices.items()}
        parameters = {path: shape for path, shape in parameters.items() if path not in models.EMBEDDINGS}
        # Every layer with a matrix is in the table, and nothing else is.
        only = {path for path, layer in table.items() if layer.param is not None}
        assert sorted(set(parameters) - set(factored) - only) == []
        assert sorted(set(factored) - set(parameters)) == []
        assert {p: factored[p].shape for p in factored} == {p: parameters[p] for p in factored}
        # What is replaced or shifted exists with that name and shape.
        for path, layer in table.items():
            if layer.param is not None:
                assert shapes[f"{path}.{layer.param}"] == layer.shape, path
