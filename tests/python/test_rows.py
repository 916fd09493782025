"""The original names of every table, row by row, against diffusers' own converters of whole checkpoints.

A checkpoint is made of the names in the table, and each row of its tensors holds a number of its own. What the
converter makes of it must be what the table says: the same rows, in the same order, under the same names.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from diffusers.loaders import single_file_utils as library

import tables

Checkpoint = dict[str, torch.Tensor]

# Parameters that are no layers, and that a converter asks for.
EXTRA = {
    "auraflow": {"positional_encoding": (1,)},
    "sd3": {"pos_embed": (1, 1, 1536)},
    "sd35": {"pos_embed": (1, 1, 2432)},
}
WIDTH = {("sd35", "medium"): 1536}

CONVERTERS: dict[str, Callable[[Checkpoint], Checkpoint]] = {
    "auraflow": library.convert_auraflow_transformer_checkpoint_to_diffusers,
    "chroma": library.convert_chroma_transformer_checkpoint_to_diffusers,
    "flux1": library.convert_flux_transformer_checkpoint_to_diffusers,
    "flux2": library.convert_flux2_transformer_checkpoint_to_diffusers,
    "hunyuan-video": library.convert_hunyuan_video_transformer_to_diffusers,
    "krea2": library.convert_krea2_transformer_checkpoint_to_diffusers,
    "lumina2": library.convert_lumina2_to_diffusers,
    "sd3": library.convert_sd3_transformer_checkpoint_to_diffusers,
    "sd35": library.convert_sd3_transformer_checkpoint_to_diffusers,
    "z-image": library.convert_z_image_transformer_checkpoint_to_diffusers,
}
CASES = [(family, model.variant) for family in CONVERTERS for model in tables.load(family)]


def numbered(model: tables.Model) -> tuple[Checkpoint, Checkpoint]:
    """A checkpoint with numbered rows under original names, and what it is under diffusers' names."""
    layers = model.components["transformer"]
    params = model.params.get("transformer", {}).get("original", {})
    swapped = model.swapped.get("transformer", {}).get("original", set())
    source, wanted, start = {}, {}, 0
    for name, targets in model.names["transformer"]["original"].items():
        count = sum(layers[target].outputs for target in targets)
        rows = torch.arange(start, start + count, dtype=torch.float64)
        start += count
        if name in params:
            source[f"{name}.{params[name]}"] = rows
        else:
            source[f"{name}.weight"] = rows[:, None]
            source[f"{name}.bias"] = rows + 0.5
        moved = rows.roll(count // 2) if name in swapped else rows
        sizes = [layers[target].outputs for target in targets]
        for target, part in zip(targets, moved.split(sizes), strict=True):
            wanted[f"{target}.{layers[target].param or 'weight'}"] = part
    return source, wanted


@pytest.mark.parametrize(("family", "variant"), CASES)
def test_rows_move_as_in_the_converter(family: str, variant: str | None) -> None:
    model = next(m for m in tables.load(family) if m.variant == variant)
    source, wanted = numbered(model)
    for name, shape in EXTRA.get(family, {}).items():
        source[name] = torch.zeros(*shape[:-1], WIDTH.get((family, variant), shape[-1]))
    made = CONVERTERS[family](source)
    assert sorted(set(wanted) - set(made)) == []
    assert [name for name, rows in wanted.items() if not torch.equal(made[name].flatten(), rows)] == []
