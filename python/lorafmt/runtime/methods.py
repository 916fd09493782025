"""The names users know, as methods of a model: Nunchaku's and diffusers', on the buffers of its layers.

A model gets them by getting a class of its own, which has the name and the bases of the old one, so that pipelines take
it as before. In a pipeline, ``pipe.load_lora_weights``, ``pipe.set_adapters`` and so on end in these methods.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..api import Source, Strength
from .adapters import Adapters, Loaded
from .ranked import refuse

#: The name under which :meth:`AdapterMethods.update_lora_params` loads.
UPDATED = "lora"
#: The file that diffusers writes and looks for.
WEIGHT_NAME = "pytorch_lora_weights.safetensors"
_MARK = "_lorafmt_adapted"


def adaptable(
    model: nn.Module, *, family: str | None = None, base: Any = None, component: str = "transformer"
) -> nn.Module:
    """Gives a model the methods of :class:`AdapterMethods`, and ``model.adapters``; returns it.

    Its layers must have room already. ``family``, ``base`` and ``component`` as for :class:`Adapters`.
    """
    if not hasattr(type(model), _MARK):
        model.__class__ = _adapted(type(model))
    model.adapters = Adapters(model, family=family, base=base, component=component)
    return model


_classes: dict[type, type] = {}


def _adapted(plain: type) -> type:
    """A subclass of the same name; one for each class, so that two models have one type."""
    if plain not in _classes:
        members = {_MARK: True, "__module__": plain.__module__, "__doc__": plain.__doc__}
        _classes[plain] = type(plain.__name__, (AdapterMethods, plain), members)
    return _classes[plain]


class AdapterMethods:
    """Adapters of a whole model by the names of Nunchaku and of diffusers.

    Whatever raises leaves the model as it was; errors are :class:`lorafmt.LorafmtError` with ``code`` and ``hint``.
    """

    adapters: Adapters

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        moved = super()._apply(fn, recurse)  # type: ignore[misc]
        if "adapters" in self.__dict__:
            self.adapters.flatten()
        return moved

    # ---------------------------------------------------------------- Nunchaku

    def update_lora_params(self, src: Source, strength: Strength = 1.0, **options: Any) -> Loaded:
        """Loads an adapter of any dialect in place of all others; ``set_lora_strength`` is 1 again.

        Nunchaku's native files are taken off the checkpoint that the model was loaded from.
        """
        kept = [name for name, adapter in self.adapters.loaded.items() if adapter.fused is not None]
        replace = [name for name in self.adapters.loaded if name not in kept]
        before, self.adapters.factor = self.adapters.factor, 1.0
        try:
            return self._warned(self.adapters.load(src, UPDATED, replace=replace, strength=strength, **options))
        except BaseException:
            self.adapters.factor = before
            raise

    def set_lora_strength(self, strength: float = 1.0) -> None:
        """One factor on all adapters, besides their own strengths."""
        from .._strength import finite

        self.adapters.factor = finite("strength", strength)
        self.adapters.update()

    def reset_lora(self) -> None:
        """Takes all adapters out: the model computes what it did before, to the last bit."""
        self.adapters.factor, self.adapters.enabled = 1.0, True
        self.adapters.delete(list(self.adapters.loaded))

    # ---------------------------------------------------------------- diffusers: coming and going

    def load_lora_adapter(
        self,
        pretrained_model_name_or_path_or_dict: Source,
        prefix: str | None = "transformer",
        hotswap: bool = False,
        *,
        adapter_name: str | None = None,
        weight_name: str | None = None,
        subfolder: str | None = None,
        network_alphas: Mapping[str, float] | None = None,
        metadata: Mapping[str, Any] | None = None,
        strength: Strength = 1.0,
        _pipeline: Any = None,
        low_cpu_mem_usage: bool = True,
        **options: Any,
    ) -> Loaded:
        """Loads an adapter of any dialect beside the others, or with ``hotswap`` in place of the one of its name.

        A path (a file, or a folder with ``weight_name``), bytes, a dict of tensors, or an opened adapter; nothing is
        downloaded. ``prefix`` and ``low_cpu_mem_usage`` are taken for diffusers' sake: keys say what they are.

        Args:
            adapter_name: by default ``default_0``, ``default_1`` and so on.
            strength: as for :meth:`set_adapters`.
            options: ``family`` and ``from_`` as for :func:`lorafmt.open`; ``base`` for native files; ``lossy="allow"``
                leaves out what a branch cannot hold; ``expand`` says how other kinds become LoRA, with the arguments of
                :func:`lorafmt.expand` (``{"rank": 32, "base_weights": path}``); ``share`` as for
                :meth:`Adapters.load`.

        Returns what was loaded; its ``others`` and ``left_out`` name what was not, about which there is a warning, too.
        """
        source = _file_of(pretrained_model_name_or_path_or_dict, subfolder, weight_name)
        name = adapter_name or self._new_name()
        if hotswap:
            self.adapters.get(name)
        extra = {"alphas": _alphas(network_alphas), "metadata": metadata}
        loaded = self.adapters.load(
            source, name, replace=(name,) if hotswap else (), strength=strength, extra=extra, **options
        )
        return loaded if _pipeline is not None else self._warned(loaded)

    def delete_adapters(self, adapter_names: str | Sequence[str]) -> None:
        """Takes adapters out."""
        self.adapters.delete([adapter_names] if isinstance(adapter_names, str) else adapter_names)

    def unload_lora(self) -> None:
        """Takes all adapters out."""
        self.reset_lora()

    def save_lora_adapter(
        self,
        save_directory: str | os.PathLike[str],
        adapter_name: str = "default",
        upcast_before_saving: bool = False,
        safe_serialization: bool = True,
        weight_name: str | None = None,
    ) -> Path:
        """Writes an adapter as it is in the buffers, in diffusers' form and without its strength; returns the path."""
        if not safe_serialization:
            raise refuse("invalid-argument", "adapters are not pickled", "leave out `safe_serialization`")
        from ..torch import save_file

        tensors = self.adapters.state_dict(adapter_name, torch.float32 if upcast_before_saving else None)
        path = Path(save_directory, weight_name or WEIGHT_NAME)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, path, {"format": "pt"})
        return path

    # ---------------------------------------------------------------- diffusers: strengths

    def set_adapters(
        self,
        adapter_names: str | Sequence[str],
        weights: Strength | Sequence[Strength | None] | None = None,
    ) -> None:
        """Makes these adapters active, and no others.

        A weight is a number or a mapping of numbers by place (:data:`lorafmt.api.Strength`): selectors as
        ``{"transformer_blocks.0-9": 0.5}``, or nested scales as diffusers has them. A list has one for each adapter.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        given = list(weights) if isinstance(weights, list | tuple) else [weights] * len(names)  # type: ignore[list-item]
        self.adapters.set_adapters(names, [_model_scales(weight, self.adapters.component) for weight in given])  # type: ignore[arg-type]

    def set_adapter(self, adapter_name: str | Sequence[str]) -> None:
        """Makes adapters active, each with the strength it has."""
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        self.adapters.set_adapters(names, [self.adapters.get(name).strength for name in names])

    def enable_lora(self) -> None:
        """Undoes :meth:`disable_lora`."""
        self.adapters.enabled = True
        self.adapters.update()

    def disable_lora(self) -> None:
        """Switches all adapters off, with their strengths kept; ranks that are off cost nothing on the GPU."""
        self.adapters.enabled = False
        self.adapters.update()

    enable_adapters = enable_lora
    disable_adapters = disable_lora

    def fuse_lora(
        self, lora_scale: float = 1.0, safe_fusing: bool = False, adapter_names: Sequence[str] | None = None
    ) -> None:
        """Makes active adapters part of the model: strengths and switches do not change them until ``unfuse_lora``.

        Quantized weights stay what they are, so nothing is rounded and undoing is exact; the ranks stay in use.
        ``safe_fusing`` looks for factors that are not finite first (``not-finite``).
        """
        names = list(self.adapters.loaded) if adapter_names is None else list(adapter_names)
        chosen = {name: self.adapters.get(name) for name in names}
        if safe_fusing:
            for name in chosen:
                self._need_finite(name)
        for name, adapter in chosen.items():
            if adapter.fused is None and adapter.active and self.adapters.enabled:
                adapter.fused = lora_scale * self.adapters.factor
            elif adapter_names is not None and adapter.fused is None:
                raise refuse("adapter-not-active", f"{name!r} is not active", "call set_adapters before")
        self.adapters.update()

    def unfuse_lora(self) -> None:
        """Undoes :meth:`fuse_lora`."""
        for adapter in self.adapters.loaded.values():
            adapter.fused = None
        self.adapters.update()

    def _need_finite(self, name: str) -> None:
        for key, value in self.adapters.state_dict(name).items():
            if not bool(torch.isfinite(value).all()):
                raise refuse(
                    "not-finite", f"{name!r} has values in `{key}` that are not finite", "is the file damaged?"
                )

    # ---------------------------------------------------------------- diffusers: asking

    def get_list_adapters(self) -> dict[str, list[str]]:
        """Names of the adapters that are loaded, under the model's name in pipelines."""
        return {self.adapters.component: list(self.adapters.loaded)} if self.adapters.loaded else {}

    def get_active_adapters(self) -> list[str]:
        """Names of the adapters that are active."""
        on = self.adapters.enabled
        return [name for name, a in self.adapters.loaded.items() if a.fused is not None or (a.active and on)]

    def active_adapters(self) -> list[str]:
        """The same, as diffusers' models call it."""
        return self.get_active_adapters()

    @property
    def peft_config(self) -> dict[str, Any]:
        """Names of adapters, where diffusers' pipelines look for them."""
        return {name: json.dumps({"peft_type": "LORA"}) for name in self.adapters.loaded}

    def enable_lora_hotswap(self, target_rank: int = 128, check_compiled: str = "error") -> None:
        """Nothing to prepare; refuses a ``target_rank`` that the layers have no room for."""
        narrow = {name: x.free_rank(self.adapters.loaded) for name, x in self.adapters.layers.items()}
        name = min(narrow, key=narrow.__getitem__)
        if narrow[name] < target_rank:
            message = f"{name} has room for {narrow[name]} ranks, not for {target_rank}"
            raise refuse("adapter-too-wide", message, "prepare the model with more room: ranks=")

    def add_adapter(self, adapter_config: Any, adapter_name: str = "default") -> None:
        """Refused: there is nothing to train here."""
        raise refuse("unsupported-call", "quantized models are not trained", "load an adapter instead")

    # ---------------------------------------------------------------- inside

    def _new_name(self) -> str:
        number = 0
        while f"default_{number}" in self.adapters.loaded:
            number += 1
        return f"default_{number}"

    def _warned(self, loaded: Loaded) -> Loaded:
        for what, names in (
            ("for other models", loaded.others),
            ("of kinds that a branch cannot hold, or without room here,", loaded.left_out),
        ):
            if names:
                text = f"{len(names)} modules of the adapter are {what} and were left out: {', '.join(names[:4])}"
                warnings.warn(text, stacklevel=3)
        return loaded


def _file_of(src: Any, subfolder: str | None, weight_name: str | None) -> Any:
    if not isinstance(src, str | os.PathLike):
        return src
    path = Path(src, subfolder) if subfolder else Path(src)
    if weight_name is not None:
        return path / weight_name
    return path / WEIGHT_NAME if path.is_dir() and (path / WEIGHT_NAME).exists() else path


def _alphas(alphas: Mapping[str, float] | None) -> dict[str, Tensor]:
    return {key: torch.tensor(float(value)) for key, value in (alphas or {}).items()}


def _model_scales(weight: Any, component: str) -> Any:
    """A mapping that is nested is for the model's own component."""
    if isinstance(weight, Mapping) and any(isinstance(value, Mapping | list | tuple) for value in weight.values()):
        nested = {key: value for key, value in weight.items() if isinstance(value, Mapping | list | tuple)}
        own = {key: value for key, value in weight.items() if key not in nested}
        if component not in nested and "blocks" not in nested:
            return {**own, component: nested}
    return weight
