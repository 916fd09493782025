"""The adapters of a whole model: which there are, how strong each is where, and how they come and go.

Everything that changes is in buffers that stay where they are. The strengths of all layers are one vector on the
device, of which each layer has its piece, so that changing an adapter's strength is one small copy.
"""

from __future__ import annotations

import copy
import itertools
import json
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import _lorafmt
from .._strength import strength as as_strength
from ..api import Source, Strength
from ..base import BaseLike
from .ranked import BASE, Block, RankedLinear, refuse
from .reading import Incoming, read

#: A mistake in an adapter can be in hundreds of modules; a message names the first ones.
_NAMED = 4


class Place(NamedTuple):
    """Where a module of the model is: in a layer, from one row to another."""

    layer: str
    start: int
    stop: int


class Piece(NamedTuple):
    """Ranks of an adapter that are for one module."""

    path: str
    ranks: range


@dataclass
class Loaded:
    """An adapter that is in the model."""

    native: _lorafmt.Adapter
    #: Paths of all its modules, in its order.
    modules: list[str]
    layers: dict[str, list[Piece]]
    #: For each layer the rank behind its last.
    ends: dict[str, int]
    biases: dict[str, Tensor]
    #: Modules of other components, and those that the branch cannot hold and that were to be left out.
    others: tuple[str, ...]
    left_out: tuple[str, ...]
    #: Positions of its ranks in the vector of strengths, on its device; modules that share ranks; which of these each
    #: rank belongs to.
    index: Tensor
    members: list[tuple[str, ...]]
    member_of_rank: Tensor
    strength: Strength = 1.0
    active: bool = True
    #: The factor it was fused with; strengths and switches do not change it then.
    fused: float | None = None
    factors: dict[str, float] = field(default_factory=dict)

    def __deepcopy__(self, memo: dict[int, Any]) -> Loaded:
        """Copies all but what was opened, which never changes."""
        memo[id(self.native)] = self.native
        copied = copy.copy(self)
        memo[id(self)] = copied
        copied.__dict__ = copy.deepcopy(self.__dict__, memo)
        return copied


class Adapters:
    """The adapters of a model whose layers have room for them (:class:`RankedLinear`).

    All methods leave the model as it was when they raise. Errors have a ``code`` and a ``hint``.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        family: str | None = None,
        base: BaseLike | None = None,
        component: str = "transformer",
    ) -> None:
        """``base`` is the checkpoint that the model was read from: native adapter files are taken off it.

        ``component`` is what pipelines call the model.
        """
        self._model = model
        self.component = component
        self._family = family
        self._base = base
        self.layers = {name: module for name, module in model.named_modules() if isinstance(module, RankedLinear)}
        self._places: dict[str, Place] = {}
        for name, layer in self.layers.items():
            parent = name.rpartition(".")[0]
            for part in layer.parts:
                self._places[f"{parent}.{part.name}"] = Place(name, part.start, part.stop)
            if not layer.parts:
                self._places[name] = Place(name, 0, layer.out_features)
        self.loaded: dict[str, Loaded] = {}
        self.enabled = True
        self.factor = 1.0
        self._biases: dict[str, Tensor] = {}
        self._staging: dict[str, Tensor] = {}
        self._own: tuple[tuple[int, tuple[str, ...]] | None, dict[str, int]] = None, {}
        self.flatten()

    # ---------------------------------------------------------------- memory

    @torch.no_grad()
    def flatten(self) -> None:
        """Gives the strengths of all layers one memory, if they have not. Called when a model was moved."""
        layers = list(self.layers.values())
        ends = itertools.accumulate((layer.max_rank for layer in layers), initial=0)
        self._starts = dict(zip(self.layers, ends, strict=False))
        strengths = [layer.strength for layer in layers]
        self._flat: Tensor | None = None
        if len({strength.device for strength in strengths}) != 1:
            return
        self._flat = torch.cat(strengths)
        self._actives = torch.cat([layer.active for layer in layers])
        for position, (name, layer) in enumerate(self.layers.items()):
            start = self._starts[name]
            layer._buffers["strength"] = self._flat[start : start + layer.max_rank]
            layer._buffers["active"] = self._actives[position : position + 1]
        for adapter in self.loaded.values():
            adapter.index = adapter.index.to(self._flat.device)
        self._biases = {path: value.to(self._flat.device) for path, value in self._biases.items()}

    # ---------------------------------------------------------------- coming and going

    def load(
        self,
        src: Source,
        name: str,
        *,
        replace: Collection[str] = (),
        strength: Strength = 1.0,
        share: bool = True,
        **options: Any,
    ) -> Loaded:
        """Loads an adapter of any dialect under a name, in place of some others.

        Modules of one layer (q, k, v) whose ``down`` is the same have it once, unless ``share`` is false.
        ``options`` are those of :func:`lorafmt.runtime.reading.read`: ``family``, ``base``, ``lossy``, ``expand``.
        Errors: those of reading; ``adapter-exists``, ``module-not-in-model``, ``adapter-shape-mismatch``,
        ``bias-not-held``, ``adapter-too-wide``, ``strength-not-held``.
        """
        if name in self.loaded and name not in replace:
            raise refuse("adapter-exists", f"there is an adapter {name!r} already", "hotswap=True replaces it")
        if name == BASE:
            raise refuse("invalid-argument", f"{name!r} is what the base's own ranks are called", "use another name")
        self._name_is_free(name, replace)
        options["base"] = options.get("base") or self._base
        options["family"] = options.get("family") or self._family
        incoming = read(src, self._dtype(), staging=self._staging, **options)
        factors = self._strengths(incoming.native, incoming.modules, strength)
        if options.get("lossy") == "allow":
            self._leave_out(incoming)
        blocks = self._fitted(incoming, share)
        _check_shared([tuple(members) for parts in blocks.values() for _, members in parts], factors)
        starts = self._room(name, blocks, replace)
        new = {path: range(at, at + sum(block.rank for block, _ in blocks[path])) for path, at in starts.items()}
        for other in {*replace} & self.loaded.keys():
            self._drop(other, new)
        loaded = self._write(name, incoming, blocks, starts, bool(replace))
        loaded.strength, loaded.factors = strength, factors
        self.loaded[name] = loaded
        self.update()
        return loaded

    def delete(self, names: Iterable[str]) -> None:
        """Takes adapters out; their ranks are free, and what they added to biases is gone to the last bit."""
        names = list(names)
        for name in names:
            self.get(name)
        for name in names:
            self._drop(name)
        self.update()

    def get(self, name: str) -> Loaded:
        if name not in self.loaded:
            known = ", ".join(self.loaded) or "none"
            raise refuse("adapter-not-loaded", f"no adapter {name!r} is loaded", f"loaded are: {known}")
        return self.loaded[name]

    def release_staging(self) -> None:
        """Frees the memory that the last load left for the next one."""
        self._staging.clear()

    def _name_is_free(self, name: str, replace: Collection[str]) -> None:
        """Ranks that someone gave a layer by itself must not be taken for this adapter's."""
        for path, layer in self.layers.items():
            if name in layer.slots and name not in self.loaded:
                hint = "use another name, or remove it from the layer"
                raise refuse("adapter-exists", f"{path} has ranks of its own called {name!r}", hint)

    def _dtype(self) -> torch.dtype:
        found = Counter(layer.up.dtype for layer in self.layers.values())
        return found.most_common(1)[0][0] if found else torch.bfloat16

    def _leave_out(self, incoming: Incoming) -> None:
        """Takes out what the model has without room for adapters, as convolutions; what it lacks stays an error."""
        for path in {*incoming.factors, *incoming.biases}:
            if path not in self._places and _has(self._model, path):
                incoming.factors.pop(path, None)
                incoming.biases.pop(path, None)
                incoming.left_out.append(path)
        incoming.left_out.sort()

    def _fitted(self, incoming: Incoming, share: bool) -> dict[str, list[tuple[Block, list[str]]]]:
        """The blocks that each layer gets, with the modules they are for; refuses what has no place here."""
        wanted = [*incoming.factors, *(path for path in incoming.biases if path not in incoming.factors)]
        unknown = [path for path in wanted if path not in self._places]
        if unknown:
            missing = [path for path in unknown if not _has(self._model, path)]
            roomless, unknown = not missing, missing or unknown
            why = "have no room for adapters" if roomless else "the model does not have"
            hint = "is it for another model? `lorafmt inspect` says what it is for"
            raise refuse(
                "module-not-in-model",
                f"the adapter is for {len(unknown)} modules that {why}: {_first(unknown)}",
                'lossy="allow" leaves them out' if roomless else hint,
            )
        for path, bias in incoming.biases.items():
            self._check_bias(path, bias)
        blocks: dict[str, list[tuple[Block, list[str]]]] = {}
        for path, (down, up) in incoming.factors.items():
            place = self._places[path]
            inputs, outputs = self.layers[place.layer].in_features, place.stop - place.start
            if tuple(down.shape) != (up.shape[1], inputs) or up.shape[0] != outputs:
                message = (
                    f"{path}: factors {tuple(down.shape)} and {tuple(up.shape)} for {inputs} inputs, {outputs} outputs"
                )
                raise refuse("adapter-shape-mismatch", message, "is the adapter for this model?")
            _add(blocks.setdefault(place.layer, []), path, place.start, down, up, share)
        return blocks

    def _check_bias(self, path: str, bias: Tensor) -> None:
        place = self._places[path]
        if self.layers[place.layer].bias is None:
            message = f"{path}: the adapter changes its bias, and the layer has none"
            raise refuse("bias-not-held", message, "an adapter for a model with biases?")
        if bias.numel() != place.stop - place.start:
            message = f"{path}: a bias of {bias.numel()} for {place.stop - place.start} outputs"
            raise refuse("adapter-shape-mismatch", message, "is the adapter for this model?")

    def _room(
        self, name: str, blocks: Mapping[str, list[tuple[Block, list[str]]]], replace: Collection[str]
    ) -> dict[str, int]:
        """Where the ranks of each layer start; refuses an adapter that is wider than what is free."""
        starts, short = {}, []
        for path, parts in blocks.items():
            rank = sum(block.rank for block, _ in parts)
            start = self.layers[path].place(rank, replace)
            if start is None:
                short.append((self.layers[path].free_rank(replace), rank, path, len(parts)))
            else:
                starts[path] = start
        if short:
            free, rank, path, several = min(short)
            layer = self.layers[path]
            # A layer that stands for several modules has the room of each.
            more = -(-(rank - free) // max(1, len(layer.parts)))
            narrower = f"make it narrower, lorafmt.open(...).resize({free // several}), " if free >= several else ""
            raise refuse(
                "adapter-too-wide",
                f"{name!r} needs {rank} ranks in {path} ({len(short)} layers are too narrow), and {free} of "
                f"{layer.max_rank} are free together",
                f"{narrower}delete another adapter, or prepare the model with more room: ranks= larger by {more}",
            )
        return starts

    def _write(
        self,
        name: str,
        incoming: Incoming,
        blocks: Mapping[str, list[tuple[Block, list[str]]]],
        starts: Mapping[str, int],
        used: bool,
    ) -> Loaded:
        layers: dict[str, list[Piece]] = {}
        index: list[int] = []
        shared: list[tuple[str, ...]] = []
        member_of_rank: list[int] = []
        for layer, parts in blocks.items():
            self.layers[layer].fill(name, starts[layer], [block for block, _ in parts], used)
            at = starts[layer]
            for block, members in parts:
                ranks = range(at, at + block.rank)
                layers.setdefault(layer, []).extend(Piece(path, ranks) for path in members)
                index.extend(self._starts[layer] + rank for rank in ranks)
                member_of_rank.extend([len(shared)] * block.rank)
                shared.append(tuple(members))
                at += block.rank
        device = "cpu" if self._flat is None else self._flat.device
        return Loaded(
            incoming.native,
            incoming.modules,
            layers,
            {path: pieces[-1].ranks.stop for path, pieces in layers.items()},
            incoming.biases,
            tuple(incoming.others),
            tuple(incoming.left_out),
            torch.tensor(index, dtype=torch.long, device=device),
            shared,
            torch.tensor(member_of_rank, dtype=torch.long),
        )

    def _drop(self, name: str, new: Mapping[str, range] | None = None) -> None:
        """Takes an adapter out, but for ranks that are about to be written over."""
        for layer in self.loaded.pop(name).layers:
            self.layers[layer].clear(name, (new or {}).get(layer, range(0)))

    # ---------------------------------------------------------------- strengths

    def set_adapters(self, names: Sequence[str], weights: Sequence[Strength | None]) -> None:
        """Makes these adapters active with these strengths, and no others."""
        if len(names) != len(weights):
            message = f"{len(names)} adapters and {len(weights)} weights"
            raise refuse("invalid-argument", message, "give one weight, or one for each adapter")
        adapters = [self.get(name) for name in names]
        given = [1.0 if weight is None else weight for weight in weights]
        factors = [self._strengths(a.native, a.modules, weight) for a, weight in zip(adapters, given, strict=True)]
        for adapter, places in zip(adapters, factors, strict=True):
            _check_shared(adapter.members, places)
        for adapter in self.loaded.values():
            adapter.active = False
        for adapter, weight, places in zip(adapters, given, factors, strict=True):
            adapter.active, adapter.strength, adapter.factors = True, weight, places
        self.update()

    def _strengths(self, native: _lorafmt.Adapter, modules: Sequence[str], strength: Strength) -> dict[str, float]:
        """Strengths by module; empty for a plain number, which is the same everywhere."""
        document = as_strength(strength)
        if not isinstance(document, Mapping):
            return {}
        factors = native.strengths(json.dumps(document))
        return dict(zip(modules, factors, strict=True))

    def strength_of(self, adapter: Loaded, path: str) -> float:
        """What an adapter is multiplied with in a module, now."""
        if adapter.fused is None and not (adapter.active and self.enabled):
            return 0.0
        factor = self.factor if adapter.fused is None else adapter.fused
        own = adapter.factors.get(path, 1.0) if adapter.factors else float(adapter.strength)  # type: ignore[arg-type]
        return own * factor

    @torch.no_grad()
    def update(self) -> None:
        """Writes strengths, the numbers of ranks that count, and biases."""
        whole = self._whole()
        last = dict(self._own_ranks())
        for name, adapter in self.loaded.items():
            if self._write_strengths(name, adapter, whole):
                for path, end in adapter.ends.items():
                    if end > last[path]:
                        last[path] = end
        if whole:
            self._actives.copy_(torch.tensor(list(last.values()), dtype=torch.int32))
        else:
            for path, count in last.items():
                self.layers[path].active.fill_(count)
        self._write_biases()

    def _own_ranks(self) -> dict[str, int]:
        """For each layer the number of ranks up to the last that is no adapter's of the model."""
        key = RankedLinear.edits, tuple(self.loaded)
        if self._own[0] != key:
            own = {
                path: max((x.start + x.rank for name, x in layer.slots.items() if name not in self.loaded), default=0)
                for path, layer in self.layers.items()
            }
            self._own = key, own
        return self._own[1]

    def _write_strengths(self, name: str, adapter: Loaded, whole: bool) -> bool:
        """Whether the adapter does anything now."""
        if adapter.factors:
            table = [self.strength_of(adapter, members[0]) for members in adapter.members]
            on = any(table)
            values = torch.tensor(table, dtype=torch.float32)[adapter.member_of_rank]
        else:
            one = self.strength_of(adapter, "")
            on, values = one != 0, torch.full((len(adapter.index),), one)
        if whole and self._flat is not None:
            self._flat.index_copy_(0, adapter.index, values.to(self._flat.device))
            return on
        at = 0
        for path in adapter.layers:
            layer = self.layers[path]
            slot = layer.slots[name]
            layer.strength[slot.ranks] = values[at : at + slot.rank].to(layer.strength.device)
            at += slot.rank
        return on

    def _whole(self) -> bool:
        """Whether the numbers of all layers are still in one memory: someone may have moved a layer by itself."""
        if self._flat is None:
            return False
        strength, active = self._flat.data_ptr(), self._actives.data_ptr()
        # This is most of the time that a change of strengths takes, hence no attributes of modules.
        for layer in self.layers.values():
            buffers = layer._buffers
            if buffers["strength"].data_ptr() != strength or buffers["active"].data_ptr() != active:  # type: ignore[union-attr]
                return False
            strength += 4 * len(buffers["strength"])  # type: ignore[arg-type]
            active += 4
        return True

    def _write_biases(self) -> None:
        """Biases as they were read, plus what adapters add; without one they are those of the model to the last bit."""
        sums: dict[str, Tensor] = {}
        for adapter in self.loaded.values():
            for path, delta in adapter.biases.items():
                strength = self.strength_of(adapter, path)
                if strength:
                    sums[path] = sums.get(path, torch.zeros_like(delta)) + strength * delta
        for path in {*sums, *self._biases}:
            place = self._places[path]
            bias = self.layers[place.layer].bias
            assert bias is not None
            rows = bias[place.start : place.stop]
            if path not in self._biases:
                self._biases[path] = rows.clone()
            plain = self._biases[path].to(rows.device, rows.dtype)
            added = sums.get(path)
            rows.copy_(plain if added is None else plain.float() + added.to(rows.device))
            if added is None:
                del self._biases[path]

    # ---------------------------------------------------------------- reading back

    def state_dict(self, name: str, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """An adapter as it is in the buffers, without strengths, in diffusers' keys without a component's prefix."""
        adapter = self.get(name)
        out: dict[str, Tensor] = {}
        for layer_name, pieces in adapter.layers.items():
            layer = self.layers[layer_name]
            for path in dict.fromkeys(piece.path for piece in pieces):
                ranks = [rank for piece in pieces if piece.path == path for rank in piece.ranks]
                place = self._places[path]
                down = layer.down[ranks, : layer.in_features]
                up = layer.up[place.start : place.stop][:, ranks]
                out[f"{path}.lora_A.weight"] = down.detach().to("cpu", dtype)
                out[f"{path}.lora_B.weight"] = up.detach().to("cpu", dtype)
        for path, delta in adapter.biases.items():
            out[f"{path}.lora_B.bias"] = delta.to(dtype or self._dtype())
        return out


def _check_shared(shared: Sequence[tuple[str, ...]], factors: Mapping[str, float]) -> None:
    """Refuses different strengths for modules that have their ranks together."""
    for members in shared if factors else ():
        if len({factors.get(path, 1.0) for path in members}) > 1:
            message = f"{', '.join(members)} have ranks in common in this adapter, which have one strength"
            raise refuse("strength-not-held", message, "load it with share=False, or give them one strength")


def _add(blocks: list[tuple[Block, list[str]]], path: str, row: int, down: Tensor, up: Tensor, share: bool) -> None:
    """Adds a module's factors to a layer's blocks; modules with equal ``down`` share its ranks."""
    for at, (block, members) in enumerate(blocks):
        if share and block.down.shape == down.shape and torch.equal(block.down, down):
            blocks[at] = Block(block.down, (*block.ups, (row, up))), [*members, path]
            return
    blocks.append((Block(down, ((row, up),)), [path]))


def _has(model: nn.Module, path: str) -> bool:
    try:
        model.get_submodule(path)
    except AttributeError:
        return False
    return True


def _first(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_NAMED])
    return shown if len(names) <= _NAMED else f"{shown} and {len(names) - _NAMED} more"


__all__ = ["Adapters", "Loaded"]
