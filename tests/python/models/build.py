"""Parameter names and shapes of a model, from its own class on the meta device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

Shapes = dict[str, tuple[int, ...]]
Build = Callable[[], Shapes]


@dataclass(frozen=True)
class Converter:
    """A function of `diffusers.loaders.single_file_utils` that reads an original checkpoint."""

    function: str
    prefix: str = ""
    # What it wants in a checkpoint that no adapter names.
    extras: tuple[str, ...] = ()
    # Parts of the names that it does not know, because it was written for an earlier version of the model.
    ignores: tuple[str, ...] = ()
    component: str = "transformer"
    # What it is told beside the checkpoint.
    arguments: dict[str, object] = field(default_factory=dict)
    # Ends of names behind which a parameter follows without a dot: fused q, k and v of torch's own attention.
    joined: tuple[str, ...] = ()


def meta(make: Callable[[], object]) -> Build:
    """Parameter shapes of a module that is built on the meta device, without memory."""

    def build() -> Shapes:
        import torch

        with torch.device("meta"):
            module = make()
        return {name: tuple(p.shape) for name, p in module.named_parameters()}

    return build


def diffusers(name: str, **config: object) -> Build:
    """A model of diffusers; what `config` leaves out is the class's default."""

    def make() -> object:
        import diffusers as library

        return getattr(library, name)(**config)

    return meta(make)
