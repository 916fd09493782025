"""Module names of any family for the oracle, from `tables.py`: no code shared with lorafmt, and tables that are held to
the models' own classes and converters by `test_families.py` and `test_original_names.py`.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass

import tables
from flux_map import Target

# Before the names of a model; `{}` is the component's. Flattened ones end with an underscore.
MODEL = (
    "", "model.", "diffusion_model.", "model.diffusion_model.", "{}.", "base_model.model.", "base_model.model.{}.",
    "{}.base_model.model.", "base_model.model.diffusion_model.", "lora_unet_", "lora_unet__", "lora_transformer_",
    "lora_prior_unet_", "lora_decoder_unet_", "lycoris_",
)  # fmt: skip
TEXT = ("{}.", "base_model.model.{}.", "{}.base_model.model.", "base_model.model.")
NUMBERS = {"text_encoder": ("1", ""), "text_encoder_2": ("2",), "text_encoder_3": ("3",), "text_encoder_4": ("4",)}
COMFYUI = {
    "clip-l": "clip_l", "clip-g": "clip_g", "clip-h": "clip_h", "t5-xxl": "t5xxl",
}  # fmt: skip


PARAMETERS = ("weight", "scale", "gamma", "modulation", "scale_shift_table")


@dataclass
class Names:
    """What paths of one family mean."""

    # Component and path -> modules.
    dotted: dict[str, dict[str, list[Target]]]
    flat: dict[str, dict[str, tuple[str, list[Target]]]]
    prefixes: dict[str, list[str]]
    shapes: dict[str, tuple[int, tuple[int, ...]]]
    params: dict[str, str]

    def resolve(self, path: str) -> tuple[list[Target], str] | None:
        """What a module path, prefix and all, stands for; and the dotted path itself."""
        for component, prefixes in self.prefixes.items():
            for prefix in prefixes:
                if not path.startswith(prefix):
                    continue
                rest = path[len(prefix) :]
                if prefix.endswith("_"):
                    if found := self.flat[component].get(rest.strip("_")):
                        return found[1], found[0]
                elif targets := self.dotted[component].get(rest):
                    return targets, rest
        return None


def _targets(model: tables.Model, component: str) -> dict[str, list[Target]]:
    layers = model.components[component]
    found = {path: [Target(f"{component}.{path}")] for path in layers}
    for space, names in model.names.get(component, {}).items():
        swapped = model.swapped.get(component, {}).get(space, set())
        for name, canonical in names.items():
            if name in found and len(canonical) == 1:
                continue
            start, parts = 0, []
            for path in canonical:
                stop = start + layers[path].outputs
                whole = len(canonical) == 1
                parts.append(
                    Target(f"{component}.{path}", 0 if whole else start, None if whole else stop, name in swapped)
                )
                start = stop
            found.setdefault(name, parts)
            if len(canonical) > 1:
                for number, path in enumerate(canonical):
                    found.setdefault(f"{name}.{number}", [Target(f"{component}.{path}")])
    return found


@functools.cache
def names(family: str, variant: str | None) -> Names:
    """The names of a family in one of its sizes."""
    model = next(m for m in tables.load(family) if m.variant == variant)
    raw = {part["name"]: part for part in tables.raw(family)["component"]}
    dotted, flat, prefixes, shapes, params = {}, {}, {}, {}, {}
    for component, layers in model.components.items():
        own = itertools.chain.from_iterable(
            [place["prefix"]] if isinstance(place.get("prefix"), str) else place.get("prefix", [])
            for place in raw[component].get("places", {}).values()
        )
        every = [text.format(component) for text in (TEXT if component.startswith("text_encoder") else MODEL)]
        if component in NUMBERS:
            every += [f"{head}_te{number}_" for head in ("lora", "lycoris") for number in NUMBERS[component]]
        if comfy := COMFYUI.get(raw[component].get("use", "")):
            every += [f"text_encoders.{comfy}.transformer.", f"{comfy}.transformer.", f"{comfy}."]
        prefixes[component] = sorted({*own, *every}, key=len, reverse=True)
        dotted[component] = _targets(model, component)
        for name, targets in list(dotted[component].items()):
            if len(targets) == 1 and layers[targets[0].module.removeprefix(f"{component}.")].param:
                # A parameter that is replaced or shifted may stand at the end of its name.
                dotted[component].update({f"{name}.{param}": targets for param in PARAMETERS})
        flat[component] = {path.replace(".", "_"): (path, targets) for path, targets in dotted[component].items()}
        for path, layer in layers.items():
            area = 1
            for axis in layer.kernel:
                area *= axis
            shapes[f"{component}.{path}"] = (layer.outputs, tuple(width * area for width in layer.widths))
            if layer.param:
                params[f"{component}.{path}"] = layer.param
    return Names(dotted, flat, prefixes, shapes, params)
