"""Models, built from their own classes; their parameters' names and shapes, on the meta device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

Shapes = dict[str, tuple[int, ...]]


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


@dataclass(frozen=True)
class Model:
    """A model in one of its sizes, built where `torch.device` says; called, its parameters' names and shapes."""

    make: Callable[[], Any]
    # Further models of that size, which share modules with it and have others.
    others: tuple[Model, ...] = ()
    # Models of the same modules, some of which take wider inputs.
    wider: tuple[Model, ...] = ()
    # What pipelines hold, where its names are not those that adapters have.
    held: Callable[[], Any] | None = None
    # Parameters of the class that the model lacks.
    lacks: tuple[str, ...] = ()

    def __call__(self) -> Shapes:
        import torch

        merged: Shapes = {}
        for model in (self, *self.others):
            with torch.device("meta"):
                module = model.make()
            for name, parameter in module.named_parameters():
                shape = tuple(parameter.shape)
                assert merged.setdefault(name, shape) == shape, name
        return {name: shape for name, shape in merged.items() if name not in self.lacks}

    def published(self) -> list[Callable[[], Any]]:
        """How those are built that adapters of this size can be for, the most usual first."""
        return [model.held or model.make for model in (self, *self.others, *self.wider)]


def diffusers(name: str, **config: object) -> Model:
    """A model of diffusers; what `config` leaves out is the class's default."""

    def make() -> object:
        import diffusers as library

        return getattr(library, name)(**config)

    return Model(make)


def transformers(model: str, config: str, **values: object) -> Model:
    """A model of transformers, with a config of its own kind."""

    def make() -> object:
        import transformers as library

        return getattr(library, model)(getattr(library, config)(**values))

    return Model(make)
