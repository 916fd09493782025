"""Transformers for video and sound, and the rest."""

from __future__ import annotations

from .build import Build, Shapes, diffusers


def union(*builds: Build) -> Build:
    """Models that differ in the modules they have, not in the shapes of those they share."""

    def build() -> Shapes:
        merged: Shapes = {}
        for one in builds:
            for name, shape in one().items():
                assert merged.setdefault(name, shape) == shape, name
        return merged

    return build


VACE_14B = [0, 5, 10, 15, 20, 25, 30, 35]
VACE_1_3B = list(range(0, 30, 2))


def wan(vace: list[int] | None, **config: int) -> Build:
    """Wan's transformer; in the sizes that have them, with the image modules and the blocks of VACE too."""
    if vace is None:
        return diffusers("WanTransformer3DModel", **config)
    width = config["num_attention_heads"] * 128
    image = diffusers("WanTransformer3DModel", image_dim=1280, added_kv_proj_dim=width, **config)
    return union(image, diffusers("WanVACETransformer3DModel", vace_layers=vace, **config))


WAN_14B = wan(VACE_14B, num_attention_heads=40)
WAN_5B = wan(None, num_attention_heads=24, num_layers=30, ffn_dim=14336, in_channels=48, out_channels=48)
WAN_1_3B = wan(VACE_1_3B, num_attention_heads=12, num_layers=30, ffn_dim=8960)

# (family, size) -> component -> the shapes of its parameters.
CLASSES: dict[tuple[str, str | None], dict[str, Build]] = {
    ("wan", "14b"): {"transformer": WAN_14B, "transformer_2": WAN_14B},
    ("wan", "5b"): {"transformer": WAN_5B},
    ("wan", "1.3b"): {"transformer": WAN_1_3B},
}

# Paths of matrices that no adapter factors: looked up, not multiplied.
EMBEDDINGS: set[str] = set()
