"""Native files of Nunchaku's second generation (Qwen-Image, Z-Image, SDXL), and bases for them, in numpy.

lorafmt is held to this module. It shares no code and no table of layers with it: those are from Nunchaku's classes
(`models/transformers/transformer_qwenimage.py`, `transformer_zimage.py`, `models/unets/unet_sdxl.py`). Packing is that
of `native.py`; names and shapes of 16-bit modules are those of `tables.py`.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np

import family_map
import tables
from native import TILE, pack_vectors, require, unpack, unpack_vectors
from oracle import Delta, Full, LowRank, Reference
from tensorfile import Planned, TensorFile, decode, encode, save_planned

POOL = np.random.default_rng(20260).standard_normal(1 << 20, np.float32)


@dataclass(frozen=True)
class Layer:
    """An `SVDQW4A4Linear` of a block; names are without the block's."""

    name: str
    in_: int
    modules: tuple[str, ...]
    """Modules whose output rows it stacks."""
    out: int
    """Output rows of each."""
    bias: bool = True
    smoothed_by: str = ""
    """The layer behind attention over the values that its last rows are; or itself, if it is that layer."""


def _qwen(width: int = 3072, hidden: int = 12288) -> tuple[Layer, ...]:
    names = {"to_qkv": ("to_q", "to_k", "to_v"), "add_qkv_proj": ("add_q_proj", "add_k_proj", "add_v_proj")}
    qkv = [
        Layer(f"attn.{n}", width, tuple(f"attn.{m}" for m in of), width, True, "attn.to_out.0")
        for n, of in names.items()
    ]
    out = [Layer(f"attn.{n}", width, (f"attn.{n}",), width, True, "attn.to_out.0") for n in ("to_out.0", "to_add_out")]
    first = [Layer(f"{m}_mlp.net.0.proj", width, (f"{m}_mlp.net.0.proj",), hidden) for m in ("img", "txt")]
    second = [Layer(f"{m}_mlp.net.2", hidden, (f"{m}_mlp.net.2",), width) for m in ("img", "txt")]
    return (*qkv, *out, *first, *second)


def _z_image(width: int = 3840, hidden: int = 10240) -> tuple[Layer, ...]:
    qkv, out, ff = ("attention.to_q", "attention.to_k", "attention.to_v"), "attention.to_out.0", "feed_forward"
    return (
        Layer("attention.to_qkv", width, qkv, width, False, out),
        Layer(out, width, (out,), width, False, out),
        # diffusers' SwiGLU: value rows, then gate rows; Z-Image's own class has silu(w1) * w3.
        Layer(f"{ff}.net.0.proj", width, (f"{ff}.w3", f"{ff}.w1"), hidden, False),
        Layer(f"{ff}.net.2", hidden, (f"{ff}.w2",), width, False),
    )


def _sdxl(width: int) -> tuple[Layer, ...]:
    return (
        Layer("attn1.to_qkv", width, ("attn1.to_q", "attn1.to_k", "attn1.to_v"), width, False, "attn1.to_out.0"),
        Layer("attn1.to_out.0", width, ("attn1.to_out.0",), width, True, "attn1.to_out.0"),
        Layer("attn2.to_q", width, ("attn2.to_q",), width, False),
        Layer("attn2.to_out.0", width, ("attn2.to_out.0",), width, True, "attn2.to_out.0"),
        Layer("ff.net.0.proj", width, ("ff.net.0.proj",), 8 * width),
        Layer("ff.net.2", 4 * width, ("ff.net.2",), width),
    )


SUFFIXES = {
    "lora_down": "proj_down", "lora_up": "proj_up", "smooth": "smooth_factor", "smooth_orig": "smooth_factor_orig",
}  # fmt: skip


@dataclass(frozen=True)
class Spec:
    """What a base looks like."""

    family: str
    blocks: tuple[str, ...]
    """Quantized blocks."""
    unquantized: tuple[str, ...] = ()
    """Blocks in 16 bits."""
    rank: int = 32
    dtype: str = "BF16"
    precision: str = "int4"
    fused: bool = False
    """The smoothing of attention's outputs is folded into the values; its factor is only noted."""
    seed: int = 0
    only: frozenset[str] = field(default=frozenset(), hash=False, compare=False)
    """16-bit modules that are wanted; all, if none is named."""

    @property
    def component(self) -> str:
        return "unet" if self.family == "sdxl" else "transformer"

    def layers(self, block: str) -> tuple[Layer, ...]:
        if self.family == "qwen-image":
            return _qwen()
        if self.family == "z-image":
            return _z_image()
        return _sdxl(640 if block.startswith(("down_blocks.1.", "up_blocks.1.")) else 1280)

    def closed(self, path: str) -> bool:
        """Whether a module is an `AWQW4A16Linear`."""
        return self.family == "qwen-image" and path.endswith(("img_mod.1", "txt_mod.1"))

    def every(self) -> Iterator[tuple[str, Layer]]:
        for block in self.blocks:
            for layer in self.layers(block):
                yield block, layer


QWEN = Spec("qwen-image", ("transformer_blocks.0", "transformer_blocks.1"))
Z_IMAGE = Spec("z-image", ("layers.0", "layers.1", "noise_refiner.0", "context_refiner.0"))
Z_REFINERS = replace(Z_IMAGE, blocks=("layers.0", "layers.1"), unquantized=("noise_refiner.0", "context_refiner.0"))
SDXL = Spec("sdxl", ("down_blocks.1.attentions.0.transformer_blocks.0", "mid_block.attentions.0.transformer_blocks.3"))


# -------------------------------------------------------------------------------- bases


def smoothing(spec: Spec, block: str, layer: Layer) -> np.ndarray:
    """Factors by channel; both streams of one attention have the same."""
    seed = zlib.crc32(f"{spec.seed}/{block}.{layer.smoothed_by or layer.name}".encode())
    values = np.random.default_rng(seed).uniform(0.5, 2.0, layer.in_).astype(np.float32)
    # As the base stores them.
    return decode(np.frombuffer(encode(values, spec.dtype), np.uint8), spec.dtype, values.shape).astype(np.float32)


def is_output(layer: Layer) -> bool:
    return bool(layer.smoothed_by) and len(layer.modules) == 1


def _noise(spec: Spec, name: str, shape: tuple[int, ...]) -> Planned:
    def content() -> bytes:
        start, count = zlib.crc32(f"{spec.seed}/{name}".encode()) % POOL.size, int(np.prod(shape))
        return encode(np.resize(np.roll(POOL, -start)[: min(count, POOL.size)], count) * np.float32(0.02), spec.dtype)

    return Planned(spec.dtype, shape, content)


def _quantized(spec: Spec, block: str, layer: Layer) -> dict[str, Planned]:
    rows, group = layer.out * len(layer.modules), 64 if spec.precision == "int4" else 16
    stored = pack_vectors(smoothing(spec, block, layer)[None])[0]
    used = np.ones_like(stored) if spec.fused and is_output(layer) else stored
    vectors = {"smooth": used, "smooth_orig": stored}
    tensors = {
        "qweight": Planned("I8", (rows, layer.in_ // 2)),
        "wscales": Planned(spec.dtype if group == 64 else "F8_E4M3", (layer.in_ // group, rows)),
        "lora_down": _noise(spec, f"{block}.{layer.name}.down", (layer.in_, spec.rank)),
        "lora_up": _noise(spec, f"{block}.{layer.name}.up", (rows, spec.rank)),
    }
    tensors |= {n: Planned(spec.dtype, v.shape, partial(encode, v, spec.dtype)) for n, v in vectors.items()}
    if layer.bias:
        tensors["bias"] = _noise(spec, f"{block}.{layer.name}.bias", (rows,))
    # SDXL's checkpoints have the older names, which its loader turns into the later ones.
    names = {} if spec.family == "sdxl" else SUFFIXES
    return {f"{block}.{layer.name}.{names.get(n, n)}": tensor for n, tensor in tensors.items()}


def plain_shapes(spec: Spec) -> dict[str, tuple[tuple[int, ...], bool]]:
    """What the model has in 16 bits: module -> shape of its weight, and whether it is a layer."""
    modules = tables.load(spec.family)[0].components[spec.component]
    mine = {f"{block}.{module}" for block, layer in spec.every() for module in layer.modules}
    shapes = {}
    for path, layer in modules.items():
        inner = path.startswith(("transformer_blocks.", "layers.", "noise_refiner.", "context_refiner."))
        inner |= ".transformer_blocks." in path
        there = not inner or any(path.startswith(f"{block}.") for block in spec.blocks + spec.unquantized)
        if there and path not in mine and not spec.closed(path):
            shapes[path] = layer.shape, layer.inputs > 0 and not layer.param
    for block in spec.unquantized:
        for layer in spec.layers(block):
            if "feed_forward" in layer.name:
                for module in layer.modules:
                    del shapes[f"{block}.{module}"]
                shapes[f"{block}.{layer.name}"] = (layer.out * len(layer.modules), layer.in_), True
    return shapes


def make_base(path: Path, spec: Spec) -> Path:
    tensors: dict[str, Planned] = {}
    for block, layer in spec.every():
        tensors |= _quantized(spec, block, layer)
        if spec.family == "qwen-image":
            for name in ("img_mod.1", "txt_mod.1"):
                tensors[f"{block}.{name}.qweight"] = Planned("I32", (18432 // 4, 3072 // 2))
                tensors[f"{block}.{name}.bias"] = Planned(spec.dtype, (18432,))
    for name, (shape, is_layer) in plain_shapes(spec).items():
        if not spec.only or name in spec.only:
            tensors[f"{name}.weight"] = Planned(spec.dtype, shape)
            if is_layer and spec.family != "z-image" and not name.endswith((".to_q", ".to_k", ".to_v")):
                tensors[f"{name}.bias"] = Planned(spec.dtype, shape[:1])
    save_planned(path, tensors)
    return path


# -------------------------------------------------------------------------------- reading


class Native:
    """A native file beside its base: what it adds, and with which types."""

    def __init__(self, path: Path, base: Path, spec: Spec) -> None:
        self.file, self.base, self.spec = TensorFile(path), TensorFile(base), spec
        self.layers = {f"{block}.{layer.name}": (block, layer) for block, layer in spec.every()}
        self.types: dict[str, str] = {}
        self.ranks: dict[str, int] = {}

    def _bits(self, file: TensorFile, key: str) -> np.ndarray:
        return np.asarray(file.raw(key)).view("<u2").reshape(file.header[key].shape)

    def factor(self, name: str, side: str) -> np.ndarray:
        """The matrix behind the base's ranks, which must be its own to the last bit."""
        old = side.replace("proj", "lora") if self.spec.family == "sdxl" else side
        ours, theirs = self._bits(self.file, f"{name}.{side}"), self._bits(self.base, f"{name}.{old}")
        dtype = self.file.header[f"{name}.{side}"].dtype
        require(dtype == self.spec.dtype, name, "is", dtype)
        rank, own = ours.shape[1], theirs.shape[1]
        require(ours.shape[0] == theirs.shape[0] and rank % TILE == 0 and own <= rank <= 1024, name, ours.shape)
        first = ours.reshape(-1, rank // TILE, TILE * TILE)[:, : own // TILE]
        require(np.array_equal(first, theirs.reshape(-1, own // TILE, TILE * TILE)), name, "is not the base's")
        matrix = unpack(ours, down=side == "proj_down", skip=own)
        self.ranks[name] = rank
        return decode(np.ascontiguousarray(matrix).reshape(-1).view(np.uint8), dtype, matrix.shape)

    def fed(self, block: str, layer: Layer) -> np.ndarray | None:
        return smoothing(self.spec, block, layer).astype(np.float64) if self.spec.fused and layer.smoothed_by else None

    def _of_layer(self, name: str) -> Iterator[tuple[str, LowRank]]:
        block, layer = self.layers[name]
        down, up = (self.factor(name, side).astype(np.float64) for side in ("proj_down", "proj_up"))
        require(down.shape[0] == up.shape[1], name, "has factors of", down.shape, up.shape)
        factor = self.fed(block, layer)
        if factor is not None and is_output(layer):
            down = down / factor
        for number, module in enumerate(layer.modules):
            rows = up[number * layer.out : (number + 1) * layer.out]
            if factor is not None and not is_output(layer) and number == 2:
                rows = rows * factor[:, None]
            used = np.flatnonzero(rows.any(axis=0) & down.any(axis=1))
            if used.size:
                yield f"{block}.{module}", LowRank(down[used], rows[:, used], 1.0)

    def _parts(self, path: str) -> list[tuple[str, slice, np.ndarray | None]]:
        """The canonical modules of a 16-bit module, and what their rows were divided by."""
        for block in self.spec.unquantized:
            for layer in self.spec.layers(block):
                if path == f"{block}.{layer.name}" and "feed_forward" in path:
                    rows = [slice(i * layer.out, (i + 1) * layer.out) for i in range(len(layer.modules))]
                    return [(f"{block}.{m}", part, None) for m, part in zip(layer.modules, rows, strict=True)]
        block, _, local = path.rpartition(".attn2.")
        if local == "to_v" and block in self.spec.blocks:
            layer = next(x for x in self.spec.layers(block) if x.name == "attn2.to_out.0")
            return [(path, slice(None), self.fed(block, layer))]
        return [(path, slice(None), None)]

    def _plain(self, key: str) -> Iterator[tuple[str, LowRank]]:
        path = key.removesuffix(".lora_A.weight")
        require(f"{path}.weight" in self.base.header, path, "is no module of the base")
        down, up = self.file[key].astype(np.float64), self.file[f"{path}.lora_B.weight"].astype(np.float64)
        shape = self.base.header[f"{path}.weight"].shape
        require(down.shape[1:] == shape[1:] and up.shape[:2] == (shape[0], down.shape[0]), path, down.shape, up.shape)
        for module, rows, factor in self._parts(path):
            part = up.reshape(up.shape[0], -1)[rows]
            part = part if factor is None else part * factor[:, None]
            if part.any():
                yield module, LowRank(down.reshape(down.shape[0], -1), part, 1.0)

    def _vector(self, key: str) -> Iterator[tuple[str, np.ndarray]]:
        path, values = key.removesuffix(".bias"), self.file[key].astype(np.float64)
        require(key in self.base.header, key, "has no bias in the base")
        if path not in self.layers:
            yield path, values * (1.0 if (factor := self._parts(path)[0][2]) is None else factor)
            return
        block, layer = self.layers[path]
        values, factor = unpack_vectors(values[None])[0], self.fed(block, layer)
        for number, module in enumerate(layer.modules):
            part = values[number * layer.out : (number + 1) * layer.out]
            yield f"{block}.{module}", part * factor if factor is not None and number == 2 else part

    def deltas(self) -> Reference:
        found: Reference = {}

        def add(module: str, term: LowRank | Full, key: str) -> None:
            name = f"{self.spec.component}.{module}"
            found.setdefault(name, Delta()).terms.append(term)
            self.types[name] = self.file.header[key].dtype

        halves = {key.rpartition(".")[0] for key in self.file if key.rpartition(".")[2] in ("proj_down", "proj_up")}
        require(halves == set(self.layers), "layers", sorted(halves ^ set(self.layers))[:4])
        for key in self.file:
            head, _, last = key.rpartition(".")
            if key.startswith("lora_te"):
                continue
            if last == "proj_down":
                for module, term in self._of_layer(head):
                    add(module, term, key)
            elif key.endswith(".lora_A.weight"):
                for module, term in self._plain(key):
                    add(module, term, key)
            elif last == "bias":
                for module, values in self._vector(key):
                    if values.any():
                        add(f"{module}#bias", Full(values), key)
            elif last == "weight" and not key.endswith(".lora_B.weight"):
                require(key in self.base.header, key, "is no parameter of the base")
                add(f"{head}#set", Full(self.file[key]), key)
            else:
                require(last == "proj_up" or key.endswith(".lora_B.weight"), key, "is no key of a native file")
        return found


def names(spec: Spec) -> family_map.Names:
    return family_map.names(spec.family, None)
