"""Quantized FLUX.1 checkpoints for tests: true widths, names and layouts, few blocks, hardly any room on disk.

What conversions read (low-rank branches, biases, smoothing factors) is random; 4-bit weights and their scales are
holes in the file.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np

from flux_map import HIDDEN, SHAPES
from native import NORMS, OUTSIDE, Layer, layers_of, modulation_of, name_v2, pack_vectors
from tensorfile import ITEM_SIZE, Planned, encode, save_planned

LAYOUTS = ("blocks", "v1", "v2")
"""The blocks alone, as in the older folders; one file for the whole model; the same under the names of v2 classes."""
PRECISIONS = ("int4", "nvfp4")
POOL = np.random.default_rng(20250).standard_normal(1 << 20, np.float32)


@dataclass(frozen=True)
class BaseSpec:
    """What a base looks like."""

    double: int = 1
    single: int = 1
    rank: int = 32
    dtype: str = "BF16"
    layout: str = "blocks"
    precision: str = "int4"
    seed: int = 0
    channels: int = 64
    """Inputs of x_embedder: 64, or more for the variants that see an image."""
    fused: bool = False
    """The smoothing of out_proj is folded into the values; its factor is only noted."""
    without: tuple[str, ...] = ()
    """Full names of layers that have no branch."""
    empty: tuple[str, ...] = ()
    """Full names of layers whose branch has no ranks."""
    damage: str = ""
    """A name from `DAMAGES`."""
    flipped: str = ""
    """A tensor whose last bit is another one."""


SMALL = BaseSpec(rank=16)
Bases = Callable[[BaseSpec], Path]
"""The fixture `bases`."""
VARIED = {
    "rank 16": BaseSpec(2, 2, rank=16),
    "rank 32, fp16, one file": BaseSpec(2, 2, rank=32, dtype="F16", layout="v1"),
    "rank 64, second names, nvfp4": BaseSpec(2, 2, rank=64, layout="v2", precision="nvfp4"),
    "rank 16, folded smoothing": BaseSpec(2, 2, rank=16, fused=True),
}


Tensors = dict[str, Planned]


@dataclass
class _Writer:
    spec: BaseSpec
    tensors: Tensors = field(default_factory=dict)

    def noise(self, name: str, shape: tuple[int, ...], scale: float = 0.02, mean: float = 0.0) -> None:
        dtype = self.spec.dtype

        def content() -> bytes:
            count = int(np.prod(shape))
            start = zlib.crc32(f"{self.spec.seed}/{name}".encode()) % POOL.size
            values = np.resize(np.roll(POOL, -start)[: max(1, count)], count)
            return encode(values * np.float32(scale) + np.float32(mean), dtype)

        self.tensors[name] = Planned(dtype, shape, content)

    def hole(self, name: str, dtype: str, shape: tuple[int, ...]) -> None:
        self.tensors[name] = Planned(dtype, shape)

    def values(self, name: str, values: np.ndarray, dtype: str | None = None) -> None:
        dtype = dtype or self.spec.dtype
        self.tensors[name] = Planned(dtype, values.shape, partial(encode, values, dtype))

    def layer(self, block: str, layer: Layer) -> None:
        name, spec = f"{block}.{layer.name}", self.spec
        self.hole(f"{name}.qweight", "I8", (layer.out, layer.in_ // 2))
        if spec.precision == "int4":
            self.hole(f"{name}.wscales", spec.dtype, (layer.in_ // 64, layer.out))
        else:
            self.hole(f"{name}.wscales", "F8_E4M3", (layer.in_ // 16, layer.out))
            # The scales of three fused tensors became scales of channels; a single tensor keeps one.
            if len(layer.modules) > 1:
                self.values(f"{name}.wcscales", np.ones(layer.out, np.float32))
            else:
                self.values(f"{name}.wtscale", np.ones(1, np.float32))
        self.noise(f"{name}.bias", (layer.out,))
        self.smooth(block, layer)
        if name not in spec.without:
            rank = 0 if name in spec.empty else spec.rank
            self.noise(f"{name}.lora_down", (layer.in_, rank))
            self.noise(f"{name}.lora_up", (layer.out, rank))

    def smooth(self, block: str, layer: Layer) -> None:
        name = f"{block}.{layer.name}"
        original = smoothing(self.spec, block, layer)
        stored = pack_vectors(original[None])[0]
        fused = self.spec.fused and layer.name.startswith("out_proj")
        self.values(f"{name}.smooth", np.ones_like(stored) if fused else stored)
        self.values(f"{name}.smooth_orig", stored)

    def modulation(self, name: str, out: int) -> None:
        self.hole(f"{name}.qweight", "I32", (out // 4, HIDDEN // 2))
        self.hole(f"{name}.wscales", self.spec.dtype, (HIDDEN // 64, out))
        self.hole(f"{name}.wzeros", self.spec.dtype, (HIDDEN // 64, out))
        self.noise(f"{name}.bias", (out,))

    def block(self, block: str) -> None:
        for layer in layers_of(block):
            self.layer(block, layer)
        for local, splits in modulation_of(block).items():
            self.modulation(f"{block}.{local}", splits * HIDDEN)
        for norm in NORMS[:2] if block.startswith("single") else NORMS:
            self.noise(f"{block}.{norm}.weight", (128,), 0.1, 1.0)

    def outside(self) -> None:
        for name in OUTSIDE:
            out, in_ = SHAPES[f"transformer.{name}"]
            self.hole(f"{name}.weight", self.spec.dtype, (out, in_ or self.spec.channels))
            self.hole(f"{name}.bias", self.spec.dtype, (out,))


def smoothing(spec: BaseSpec, block: str, layer: Layer) -> np.ndarray:
    """A layer's factors, by channel. Both outputs of an attention have one: their inputs come from the same values."""
    shared = "out_proj" if layer.name == "out_proj_context" else layer.name
    seed = zlib.crc32(f"{spec.seed}/{block}.{shared}/smooth".encode())
    return np.random.default_rng(seed).uniform(0.5, 2.0, layer.in_).astype(np.float32)


# -------------------------------------------------------------------------------- damage


def _damage(name: str, change: Callable[[Planned], Planned | None]) -> Callable[[Tensors], None]:
    def apply(tensors: Tensors) -> None:
        changed = change(tensors.pop(name))
        if changed:
            tensors[name] = changed

    return apply


def _both(first: Callable[[Tensors], None], second: Callable[[Tensors], None]) -> Callable[[Tensors], None]:
    def apply(tensors: Tensors) -> None:
        first(tensors)
        second(tensors)

    return apply


DOWN, UP = (f"transformer_blocks.0.mlp_fc1.lora_{side}" for side in ("down", "up"))


def _flip(tensor: Planned) -> Planned:
    content = bytearray(tensor.content())
    content[-2] ^= 1
    return replace(tensor, content=lambda: bytes(content))


OTHER_STREAM = "transformer_blocks.0.out_proj_context.smooth"


def _twos() -> bytes:
    return encode(np.full(HIDDEN, 2.0, np.float32), "BF16")


def _shaped(*shape: int) -> Callable[[Planned], Planned]:
    return lambda tensor: replace(tensor, shape=shape)


DAMAGES: dict[str, Callable[[Tensors], None]] = {
    "a rank of 24": _both(_damage(DOWN, _shaped(HIDDEN, 24)), _damage(UP, _shaped(4 * HIDDEN, 24))),
    "a down factor of another width": _damage(DOWN, _shaped(2048, 32)),
    "an up factor of another width": _damage(UP, _shaped(2048, 32)),
    "no up factor": _damage(UP, lambda tensor: None),
    "no down factor": _damage(DOWN, lambda tensor: None),
    "factors of different rank": _damage(UP, _shaped(4 * HIDDEN, 48)),
    "a factor of three dimensions": _damage(DOWN, _shaped(HIDDEN, 32, 1)),
    "a factor of 32 bits": _damage(DOWN, lambda tensor: replace(tensor, dtype="F32", content=bytes)),
    "factors of different types": _damage(DOWN, lambda tensor: replace(tensor, dtype="F16")),
    "another factor for each stream": _damage(f"{OTHER_STREAM}_orig", lambda tensor: replace(tensor, content=_twos)),
    "a factor folded for one stream only": _damage(OTHER_STREAM, lambda tensor: replace(tensor, content=_twos)),
}
"""Each is done to a layer of the first double block, of rank 32; what concerns streams, to a base that is `fused`."""


# -------------------------------------------------------------------------------- files


def metadata(spec: BaseSpec) -> dict[str, str]:
    if spec.layout == "blocks":
        return {}
    fp4 = spec.precision == "nvfp4"
    numbers = {"dtype": "fp4_e2m1_all" if fp4 else "int4", "group_size": 16 if fp4 else 64}
    scale = "fp8_e4m3_nan" if fp4 else None
    quantization = {
        "method": "svdquant",
        "weight": {**numbers, "scale_dtype": [None, scale] if fp4 else None},
        "activation": {**numbers, "scale_dtype": scale},
        "rank": spec.rank,
    }
    config = {
        "_class_name": "FluxTransformer2DModel",
        "attention_head_dim": 128,
        "axes_dims_rope": [16, 56, 56],
        "guidance_embeds": True,
        "in_channels": spec.channels,
        "joint_attention_dim": 4096,
        "num_attention_heads": 24,
        "num_layers": spec.double,
        "num_single_layers": spec.single,
        "pooled_projection_dim": 768,
    }
    comfy = {"model_class": "Flux", "model_config": {"image_model": "flux", "depth": spec.double}}
    return {
        "config": json.dumps(config),
        "comfy_config": json.dumps(comfy),
        "model_class": f"NunchakuFluxTransformer2{'DModelV2' if spec.layout == 'v2' else 'dModel'}",
        "quantization_config": json.dumps(quantization),
    }


def make_base(path: Path, spec: BaseSpec) -> Path:
    writer = _Writer(spec)
    for number in range(spec.double):
        writer.block(f"transformer_blocks.{number}")
    for number in range(spec.single):
        writer.block(f"single_transformer_blocks.{number}")
    if spec.layout != "blocks":
        writer.outside()
    tensors = writer.tensors
    if spec.damage:
        DAMAGES[spec.damage](tensors)
    if spec.flipped:
        _damage(spec.flipped, _flip)(tensors)
    if spec.layout == "v2":
        tensors = {name_v2(name): tensor for name, tensor in tensors.items()}
    order = sorted(tensors, key=lambda name: (-ITEM_SIZE[tensors[name].dtype], name))
    save_planned(path, {name: tensors[name] for name in order}, metadata(spec))
    return path
