"""Which layers of a model become int8, which stay in 16 bits with room for adapters, and which share an input.

Everything about an architecture is in :data:`MODELS`; another one is another entry.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .linear import BranchLinear, FusedLinear
from .methods import adaptable
from .ranked import Part, RankedLinear


@dataclass(frozen=True)
class Fused:
    """Layers of one parent that read the same input and become one, under a name that the parent's code knows."""

    name: str
    members: tuple[str, ...]


@dataclass(frozen=True)
class Model:
    """What to do with the layers of a class of models."""

    #: The family of its adapters; None if several have this class, and an adapter's shapes tell.
    family: str | None
    #: Paths of linears that become int8; all others stay in 16 bits.
    quantized: re.Pattern[str]
    fused: tuple[Fused, ...] = ()
    #: What a parent is told when its layers were fused.
    fused_flag: str = "fused_projections"
    #: What pipelines call the model.
    component: str = "transformer"


#: Class name -> what to do. FluxAttention computes from `to_qkv` and `to_added_qkv` where `fused_projections` is set;
#: the attentions of the others do not.
MODELS = {
    "FluxTransformer2DModel": Model(
        "flux1",
        re.compile(
            r"transformer_blocks\.\d+\.(attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)|ff(_context)?\.net\.(0\.proj|2))"
            r"|single_transformer_blocks\.\d+\.(attn\.to_[qkv]|proj_mlp|proj_out)"
        ),
        (
            Fused("to_qkv", ("to_q", "to_k", "to_v")),
            Fused("to_added_qkv", ("add_q_proj", "add_k_proj", "add_v_proj")),
        ),
    ),
    "QwenImageTransformer2DModel": Model(
        "qwen-image",
        re.compile(
            r"transformer_blocks\.\d+\.(attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)|(img|txt)_mlp\.net\.(0\.proj|2))"
        ),
    ),
    # Stable Diffusion 1.5, 2.1 and XL, and the refiner. Convolutions stay as they are, without room for adapters.
    "UNet2DConditionModel": Model(
        None,
        re.compile(
            r"(down_blocks\.\d+|mid_block|up_blocks\.\d+)\.attentions\.\d+\."
            r"(proj_in|proj_out|transformer_blocks\.\d+\.(attn[12]\.(to_[qkv]|to_out\.0)|ff\.net\.(0\.proj|2)))"
        ),
        component="unet",
    ),
}


def model_of(model: nn.Module) -> Model | None:
    """The entry for a model; None if there is none."""
    return MODELS.get(type(model).__name__)


def quantize_(
    model: nn.Module,
    rank: int = 32,
    ranks: int = 128,
    include: Callable[[str, nn.Linear], bool] | None = None,
    *,
    fuse: bool = True,
) -> list[str]:
    """Replaces linears of a model by :class:`FusedLinear`, one after the other; the names of those replaced.

    Each layer is quantized where it is, and its 16-bit weight is freed before the next one.

    Args:
        rank: directions of each weight that stay in 16 bits.
        ranks: how many there is room for, those included; layers that stand for several have the room of each.
        include: chooses by name and layer; by default those of :data:`MODELS`, or all if the class has no entry.
        fuse: make one layer of q, k and v, whose prologue runs once. Only for classes with an entry.

    A model with an entry gets the methods of :class:`lorafmt.runtime.AdapterMethods`, and its other linears room for
    adapters.
    """
    entry = model_of(model)
    chosen = include or _all if entry is None else include or _matches(entry.quantized)
    wanted = [name for name, layer in _linears(model) if chosen(name, layer)]
    done = set()
    if entry is not None and fuse:
        for parent_name, group in _groups(model, entry, set(wanted)):
            parent = model.get_submodule(parent_name)
            members = [parent.get_submodule(member) for member in group.members]
            room = rank + len(members) * max(0, ranks - rank)
            install_fused(parent, entry, group, _joined(members, rank, room))  # type: ignore[arg-type]
            done |= {f"{parent_name}.{member}" for member in group.members}
            del members
    for name in wanted:
        if name not in done:
            _replace(model, name, lambda linear: FusedLinear.from_linear(linear, rank, ranks))
    if entry is not None:
        add_room(model, ranks - rank)
        adaptable(model, family=entry.family, component=entry.component)
    return wanted


def add_room(model: nn.Module, ranks: int) -> None:
    """Gives the linears of a model that are left room for adapters; their weights are not copied."""
    for name, _ in list(_linears(model)):
        _replace(model, name, lambda linear: BranchLinear(linear.weight.detach(), linear.bias, ranks=ranks))


def install_fused(parent: nn.Module, entry: Model, group: Fused, layer: RankedLinear) -> None:
    """Puts a layer that stands for several in their place."""
    at, parts = 0, []
    for member in group.members:
        rows = getattr(parent, member).out_features
        parts.append(Part(member, at, at + rows))
        at += rows
        delattr(parent, member)
    layer.parts = tuple(parts)
    layer.train(parent.training)
    setattr(parent, group.name, layer)
    setattr(parent, entry.fused_flag, True)


def replace_module(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Puts a module in the place of another."""
    parent_name, _, leaf = name.rpartition(".")
    parent = model.get_submodule(parent_name)
    layer.train(parent.training)
    setattr(parent, leaf, layer)


def _replace(model: nn.Module, name: str, make: Callable[[nn.Linear], nn.Module]) -> None:
    linear = model.get_submodule(name)
    assert isinstance(linear, nn.Linear)
    replace_module(model, name, make(linear))


def _joined(members: list[nn.Linear], rank: int, ranks: int) -> FusedLinear:
    """One quantized layer of several: outputs side by side."""
    weight = torch.cat([member.weight.detach() for member in members])
    return FusedLinear.from_weight(weight, _joined_bias(members), rank, ranks)


def _joined_bias(members: list[nn.Linear]) -> Tensor | None:
    if all(member.bias is None for member in members):
        return None
    rows = [m.weight.new_zeros(m.out_features) if m.bias is None else m.bias.detach() for m in members]
    return torch.cat(rows)


def _groups(model: nn.Module, entry: Model, wanted: set[str]) -> list[tuple[str, Fused]]:
    """Parents whose layers are to be fused: all of them are wanted. By name, so that nothing is kept alive."""
    return [
        (name, group)
        for name, parent in model.named_modules()
        if hasattr(parent, entry.fused_flag) and _whole(name, parent, entry, wanted)
        for group in entry.fused
        if hasattr(parent, group.members[0])
    ]


def _whole(name: str, parent: nn.Module, entry: Model, wanted: set[str]) -> bool:
    """The flag of a parent is for all its groups, so each must be whole or absent."""
    for group in entry.fused:
        present = [hasattr(parent, member) for member in group.members]
        if any(present) and not all(f"{name}.{member}" in wanted for member in group.members):
            return False
    return True


def _linears(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    return ((name, module) for name, module in model.named_modules() if type(module) is nn.Linear)


def _matches(pattern: re.Pattern[str]) -> Callable[[str, nn.Linear], bool]:
    return lambda name, _: pattern.fullmatch(name) is not None


def _all(_: str, __: nn.Linear) -> bool:
    return True
