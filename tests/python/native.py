"""What a native Nunchaku FLUX.1 LoRA file does, computed in numpy from the definition of its layout.

lorafmt is held to this module: it shares no code and no table with it. In such a file every quantized layer of the
base model has one 16-bit branch, and that branch is the base's own one with the adapter's ranks behind it: the file
only makes sense beside the base it was made for.

* Low-rank factors are stored in tiles of 16 x 16 in the order in which one warp of an `mma.m16n8k16` loads its B
  operand: `tile_order`. Tiles follow each other by rank, then by channel; the stored shape ([in, rank] for down,
  [out, rank] for up) is only a name for the size.
* Vectors over channels (bias, smoothing factors) are permuted within 128: `VECTOR_ORDER`.
* The modulation layers have no base branch and are not packed; the rows of up alternate between the splits.
* Modules outside the blocks keep diffusers' names, and bias deltas are plain vectors under diffusers' names.
* A base may have folded the smoothing of `out_proj` into the values before it: `Base.smoothing`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

import oracle
from flux_map import HIDDEN, MLP, SHAPES
from oracle import Delta, Full, LowRank, Reference
from tensorfile import TensorFile, decode

TILE = 16
MAX_RANK = 1024
"""More ranks than this in one layer, and Nunchaku's kernels read beyond their table of scales."""


# -------------------------------------------------------------------------------- packing


def tile_order() -> np.ndarray:
    """[16, 16]: where row i and column j of a tile are among its 256 numbers.

    A lane holds eight of them; lane = 4 * (i mod 8) + (j mod 8) // 2.
    """
    i, j = np.mgrid[0:TILE, 0:TILE]
    lane = i % 8 * 4 + j % 8 // 2
    return lane * 8 + i // 8 * 4 + j // 8 * 2 + j % 2


TILE_ORDER = tile_order()


def pack(matrix: np.ndarray, *, down: bool) -> np.ndarray:
    """A low-rank factor, down [rank, in] or up [out, rank], as it is stored: [in or out, rank]."""
    channels, ranks = matrix.shape[::-1] if down else matrix.shape
    assert channels % TILE == 0 and ranks % TILE == 0, matrix.shape
    tiles = matrix.reshape(matrix.shape[0] // TILE, TILE, matrix.shape[1] // TILE, TILE)
    packed = np.empty((channels // TILE, ranks // TILE, TILE * TILE), matrix.dtype)
    # Within a tile, rows are ranks in a down matrix and channels in an up matrix.
    packed[:, :, TILE_ORDER] = tiles.transpose((2, 0, 1, 3) if down else (0, 2, 1, 3))
    return packed.reshape(channels, ranks)


def unpack(packed: np.ndarray, *, down: bool, skip: int = 0) -> np.ndarray:
    """The inverse of `pack`; the first `skip` ranks are left out."""
    channels, ranks = packed.shape
    assert channels % TILE == 0 and ranks % TILE == 0 and skip % TILE == 0, packed.shape
    tiles = packed.reshape(channels // TILE, ranks // TILE, TILE * TILE)[:, skip // TILE :][:, :, TILE_ORDER]
    tiles = tiles.transpose((1, 2, 0, 3) if down else (0, 2, 1, 3))
    return tiles.reshape((ranks - skip, channels) if down else (channels, ranks - skip))


def _vector_order() -> np.ndarray:
    place = np.arange(128)
    lane, e = place // 4, place % 4
    return lane // 4 * 16 + e // 2 * 8 + lane % 4 * 2 + e % 2


VECTOR_ORDER = _vector_order()
"""Which of 128 channels is stored at each place."""


def pack_vectors(values: np.ndarray) -> np.ndarray:
    """[groups, channels] as stored: per 128 channels, one group after the other. A bias is one group."""
    groups, channels = values.shape
    return values.reshape(groups, channels // 128, 128).transpose(1, 0, 2)[:, :, VECTOR_ORDER].reshape(groups, channels)


def unpack_vectors(packed: np.ndarray) -> np.ndarray:
    groups, channels = packed.shape
    values = np.empty((channels // 128, groups, 128), packed.dtype)
    values[:, :, VECTOR_ORDER] = packed.reshape(channels // 128, groups, 128)
    return values.transpose(1, 0, 2).reshape(groups, channels)


def interleave(rows: np.ndarray, splits: int) -> np.ndarray:
    """Rows of a modulation layer, one split after the other, as stored: the splits take turns."""
    return rows.reshape(splits, -1, *rows.shape[1:]).swapaxes(0, 1).reshape(rows.shape)


def deinterleave(rows: np.ndarray, splits: int) -> np.ndarray:
    return rows.reshape(-1, splits, *rows.shape[1:]).swapaxes(0, 1).reshape(rows.shape)


# -------------------------------------------------------------------------------- layers


@dataclass(frozen=True)
class Layer:
    """A quantized layer of a block: local names, without the block's own."""

    name: str
    name_v2: str
    modules: tuple[str, ...]
    """diffusers modules whose outputs it stacks."""
    out: int
    in_: int
    column: int = 0
    """The first input column of the diffusers module that is its own."""
    bias: bool = True

    @property
    def vector(self) -> str:
        """The name under which the delta of its bias is stored."""
        fused = {"to_q": "to_qkv", "add_q_proj": "add_qkv_proj"}
        head, _, leaf = self.modules[0].rpartition(".")
        return f"{head}.{fused[leaf]}" if leaf in fused else self.modules[0]


QKV = ("attn.to_q", "attn.to_k", "attn.to_v")
ADDED_QKV = ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")
VALUES = ("attn.to_v", "attn.add_v_proj")
DOUBLE = (
    Layer("qkv_proj", "attn.to_qkv", QKV, 3 * HIDDEN, HIDDEN),
    Layer("qkv_proj_context", "attn.add_qkv_proj", ADDED_QKV, 3 * HIDDEN, HIDDEN),
    Layer("out_proj", "attn.to_out.0", ("attn.to_out.0",), HIDDEN, HIDDEN),
    Layer("out_proj_context", "attn.to_add_out", ("attn.to_add_out",), HIDDEN, HIDDEN),
    Layer("mlp_fc1", "ff.net.0.proj", ("ff.net.0.proj",), MLP, HIDDEN),
    Layer("mlp_fc2", "ff.net.2", ("ff.net.2",), HIDDEN, MLP),
    Layer("mlp_context_fc1", "ff_context.net.0.proj", ("ff_context.net.0.proj",), MLP, HIDDEN),
    Layer("mlp_context_fc2", "ff_context.net.2", ("ff_context.net.2",), HIDDEN, MLP),
)
# diffusers' proj_out reads (attention, mlp) side by side; here two layers add their outputs. The bias is out_proj's:
# that of mlp_fc2 only makes up for the shift of its unsigned inputs.
SINGLE = (
    Layer("qkv_proj", "attn.to_qkv", QKV, 3 * HIDDEN, HIDDEN),
    Layer("out_proj", "attn.to_out", ("proj_out",), HIDDEN, HIDDEN),
    Layer("mlp_fc1", "mlp_fc1", ("proj_mlp",), MLP, HIDDEN),
    Layer("mlp_fc2", "mlp_fc2", ("proj_out",), HIDDEN, MLP, column=HIDDEN, bias=False),
)
DOUBLE_MODULATION = {"norm1.linear": 6, "norm1_context.linear": 6}
SINGLE_MODULATION = {"norm.linear": 3}
OUTSIDE = {
    name
    for module in SHAPES
    if (name := module.removeprefix("transformer.")) != module and "blocks." not in name and "distilled" not in name
}
MLPS = (("mlp_fc1", "mlp_fc2"), ("mlp_context_fc1", "mlp_context_fc2"))
NORMS = ("norm_q", "norm_k", "norm_added_q", "norm_added_k")
SUFFIXES_V2 = {
    "lora_down": "proj_down",
    "lora_up": "proj_up",
    "smooth": "smooth_factor",
    "smooth_orig": "smooth_factor_orig",
}
_BLOCK = re.compile(r"((?:single_)?transformer_blocks\.\d+)\.(.+)")


def layers_of(block: str) -> tuple[Layer, ...]:
    return SINGLE if block.startswith("single") else DOUBLE


def modulation_of(block: str) -> dict[str, int]:
    return SINGLE_MODULATION if block.startswith("single") else DOUBLE_MODULATION


def split_block(key: str) -> tuple[str, str] | None:
    """`transformer_blocks.0.qkv_proj.lora_down` -> (`transformer_blocks.0`, `qkv_proj.lora_down`)."""
    match = _BLOCK.fullmatch(key)
    return (match[1], match[2]) if match else None


def layer_of(name: str) -> Layer:
    """The quantized layer of a full name such as `transformer_blocks.0.qkv_proj`."""
    block, local = split_block(name) or ("", "")
    return next(layer for layer in layers_of(block) if layer.name == local)


def name_v2(key: str) -> str:
    """A base's key as the second generation of its model classes spells it."""
    if (parts := split_block(key)) is None:
        return key
    block, local = parts
    layer, _, suffix = local.rpartition(".")
    found = [known.name_v2 for known in layers_of(block) if known.name == layer]
    norm = f"attn.{layer}" if layer in NORMS else layer
    return f"{block}.{found[0] if found else norm}.{SUFFIXES_V2.get(suffix, suffix)}"


# -------------------------------------------------------------------------------- bases


@dataclass(frozen=True)
class Branch:
    """The low-rank branch of a base's layer, as stored."""

    down: np.ndarray
    up: np.ndarray
    dtype: str

    @property
    def rank(self) -> int:
        return self.down.shape[1]


class Base:
    """A quantized checkpoint, under either generation of names."""

    def __init__(self, path: str | Path) -> None:
        self.file = TensorFile(path)
        self.blocks = sorted({parts[0] for key in self.file if (parts := split_block(key))})
        self.second = any(key.endswith(".proj_down") for key in self.file)

    def key(self, key: str) -> str:
        return name_v2(key) if self.second else key

    def values(self, key: str) -> np.ndarray | None:
        return self.file[self.key(key)] if self.key(key) in self.file.header else None

    def branch(self, layer: str) -> Branch | None:
        """None for a layer whose branch is absent, or has no ranks."""
        entry = self.file.header.get(self.key(f"{layer}.lora_down"))
        if entry is None or 0 in entry.shape:
            return None
        down, up = (_bits(self.file, self.key(f"{layer}.{side}")) for side in ("lora_down", "lora_up"))
        return Branch(down, up, entry.dtype)

    def smoothing(self, block: str) -> np.ndarray | None:
        """The factor by which the inputs of this block's `out_proj` are divided already, if they are.

        Then the layer's own factor is one everywhere and the true one is only noted beside it; the values before
        (and so the rows of v, of both streams) were divided by it.
        """
        smooth = self.values(f"{block}.out_proj.smooth")
        original = self.values(f"{block}.out_proj.smooth_orig")
        if smooth is None or original is None or np.any(smooth != 1) or np.all(original == 1):
            return None
        return unpack_vectors(original[None])[0].astype(np.float64)


def _bits(file: TensorFile, key: str) -> np.ndarray:
    """A 16-bit tensor as integers, so that equal means equal to the last bit."""
    return np.asarray(file.raw(key)).view("<u2").reshape(file.header[key].shape)


def _values(bits: np.ndarray, dtype: str) -> np.ndarray:
    return decode(np.ascontiguousarray(bits).reshape(-1).view(np.uint8), dtype, bits.shape)


# -------------------------------------------------------------------------------- reading a native file


class NotNative(AssertionError):
    """The file is no sound native file for this base."""


def require(condition: object, *words: object) -> None:
    if not condition:
        raise NotNative(" ".join(str(word) for word in words))


@dataclass(frozen=True)
class Factors:
    """What a file adds to one layer: down [rank, in], up [out, rank], behind the base's ranks."""

    down: np.ndarray
    up: np.ndarray
    base_rank: int
    dtype: str

    @property
    def total(self) -> int:
        return self.base_rank + self.down.shape[0]


class Native:
    """A native file beside its base; what cannot be read raises `NotNative`."""

    def __init__(self, path: str | Path, base: Base | str | Path) -> None:
        self.file = TensorFile(path)
        self.base = base if isinstance(base, Base) else Base(base)
        self.outside: list[str] = []
        self.layers: dict[str, dict[str, str]] = {}
        self.vectors: list[str] = []
        for key in self.file:
            self._sort(key)

    def _sort(self, key: str) -> None:
        parts = split_block(key)
        if parts is None and not key.endswith(".bias"):
            self.outside.append(key)
            return
        if len(self.file.header[key].shape) == 1:
            self.vectors.append(key)
            return
        require(parts, key, "is no vector")
        block, local = parts
        require(block in self.base.blocks, key, "has no block in the base")
        layer, _, side = local.rpartition(".")
        known = {layer.name for layer in layers_of(block)} | set(modulation_of(block))
        if layer not in known:
            layer = next((x.name for x in layers_of(block) if x.name_v2 == layer), layer)
        side = {"proj_down": "lora_down", "proj_up": "lora_up"}.get(side, side)
        require(layer in known and side in ("lora_down", "lora_up"), key, "is no layer's branch")
        self.layers.setdefault(f"{block}.{layer}", {})[side] = key

    def factors(self, name: str) -> Factors | None:
        """The ranks behind the base's, which are checked to be the base's own to the last bit."""
        if name not in self.layers:
            return None
        require(set(self.layers[name]) == {"lora_down", "lora_up"}, name, "lacks one factor")
        down, up = (self.layers[name][side] for side in ("lora_down", "lora_up"))
        header = self.file.header
        dtype = header[down].dtype
        require(dtype == header[up].dtype and dtype in ("BF16", "F16"), name, "is", dtype, header[up].dtype)
        stored = _bits(self.file, down), _bits(self.file, up)
        block, local = split_block(name) or ("", "")
        if local in modulation_of(block):
            return self._modulation(name, *stored, dtype, modulation_of(block)[local])
        return self._quantized(name, *stored, dtype, layer_of(name))

    def _modulation(self, name: str, down: np.ndarray, up: np.ndarray, dtype: str, splits: int) -> Factors:
        require(down.shape[1:] == (HIDDEN,), name, "has a down factor of", down.shape)
        require(up.shape == (splits * HIDDEN, down.shape[0]), name, "has an up factor of", up.shape)
        require(down.shape[0] % TILE == 0, name, "has rank", down.shape[0])
        return Factors(_values(down, dtype), deinterleave(_values(up, dtype), splits), 0, dtype)

    def _quantized(self, name: str, down: np.ndarray, up: np.ndarray, dtype: str, layer: Layer) -> Factors:
        rank = down.shape[1]
        require(down.shape == (layer.in_, rank), name, "has a down factor of", down.shape)
        require(up.shape == (layer.out, rank), name, "has an up factor of", up.shape)
        require(rank % TILE == 0 and 0 < rank <= MAX_RANK, name, "has rank", rank)
        branch = self.base.branch(name)
        if branch is not None:
            require(dtype == branch.dtype, name, "is", dtype, "but its base", branch.dtype)
            require(rank >= branch.rank, name, "has rank", rank, "but its base", branch.rank)
            for side, ours, theirs in (("down", down, branch.down), ("up", up, branch.up)):
                first = ours.reshape(-1, rank // TILE, TILE * TILE)[:, : branch.rank // TILE]
                same = np.array_equal(first, theirs.reshape(-1, branch.rank // TILE, TILE * TILE))
                require(same, name, "does not start with its base's", side)
        skip = branch.rank if branch else 0
        return Factors(
            _values(unpack(down, down=True, skip=skip), dtype),
            _values(unpack(up, down=False, skip=skip), dtype),
            skip,
            dtype,
        )

    @cached_property
    def all_factors(self) -> dict[str, Factors]:
        return {name: factors for name in self.layers if (factors := self.factors(name))}

    def check(self) -> None:
        """What Nunchaku needs of a file and does not look at before it computes."""
        for block in self.base.blocks:
            names = [f"{block}.{layer.name}" for layer in layers_of(block)]
            missing = [name for name in names if name not in self.layers and self.base.branch(name)]
            require(not missing, "no branch for", missing)
            for first, second in MLPS:
                totals = [self._total(f"{block}.{layer}") for layer in (first, second)]
                require(totals[0] == totals[1], f"{block}.{first} and {second} have ranks", totals)
        for key in self.vectors:
            self._check_vector(key)

    def _total(self, name: str) -> int:
        """Ranks of a layer once this file is loaded: those of the base stay where it has none."""
        if name in self.all_factors:
            return self.all_factors[name].total
        return branch.rank if (branch := self.base.branch(name)) else 0

    def _check_vector(self, key: str) -> None:
        entry = self.file.header[key]
        if entry.dtype not in ("BF16", "F16") and split_block(key):
            raise NotNative(f"{key} is {entry.dtype}")
        require(key.endswith((".bias", ".weight")), key, "is no bias")
        for _ in _vector_targets(key, entry.shape[0]):
            pass

    def deltas(self) -> Reference:
        """diffusers module (with component) -> what the file adds to it. Modules without a delta are absent."""
        self.check()
        result: Reference = {}
        for name, factors in self.all_factors.items():
            for module, term in self._terms(name, factors):
                result.setdefault(f"transformer.{module}", Delta()).terms.append(term)
        for module, mark, values in self._parts_of_vectors():
            if mark == "#set" or values.any():
                result.setdefault(f"transformer.{module}{mark}", Delta()).terms.append(Full(values))
        for key in self.outside:
            module, _, side = key.partition(".lora_")
            known = key.startswith("lora_te") or (module in OUTSIDE and side in ("A.weight", "B.weight"))
            require(known, key, "is no key of a native file")
        result.update(oracle.meaning({key: self.file[key] for key in self.outside}, {}, None))
        return result

    def _terms(self, name: str, factors: Factors) -> Iterator[tuple[str, LowRank]]:
        block, local = split_block(name) or ("", "")
        if local in modulation_of(block):
            if term := _trimmed(factors.down, factors.up):
                yield name, term
            return
        layer, smoothing, down = layer_of(name), self.base.smoothing(block), factors.down
        if smoothing is not None and local.startswith("out_proj"):
            down = down / smoothing
        rows = layer.out // len(layer.modules)
        for number, module in enumerate(layer.modules):
            up = factors.up[number * rows : (number + 1) * rows]
            if smoothing is not None and module in VALUES:
                up = up * smoothing[:, None]
            if term := _trimmed(down, up):
                yield f"{block}.{module}", _in_columns(term, layer.column) if module == "proj_out" else term

    def _parts_of_vectors(self) -> Iterator[tuple[str, str, np.ndarray]]:
        for key in self.vectors:
            values = self.file[key].astype(np.float64)
            for module, rows in _vector_targets(key, values.size):
                part = values[rows]
                block, local = split_block(module) or ("", "")
                if local in VALUES and (smoothing := self.base.smoothing(block)) is not None:
                    part = part * smoothing
                yield module, _mark(key), part

    def types(self) -> dict[str, str]:
        """Module (of the deltas) -> the type that its factors or values are stored in."""
        types: dict[str, str] = {}
        for name, factors in self.all_factors.items():
            block, local = split_block(name) or ("", "")
            modules = (local,) if local in modulation_of(block) else layer_of(name).modules
            types |= {f"transformer.{block}.{module}": factors.dtype for module in modules}
        for key in self.vectors:
            entry = self.file.header[key]
            targets = _vector_targets(key, entry.shape[0])
            types |= {f"transformer.{module}{_mark(key)}": entry.dtype for module, _ in targets}
        for key in self.outside:
            if key.endswith(".lora_A.weight"):
                types[f"transformer.{key.removesuffix('.lora_A.weight')}"] = self.file.header[key].dtype
        return types


def _mark(key: str) -> str:
    """A bias is a delta; the weight of a norm takes the place of the base's."""
    return "#set" if key.endswith(".weight") else "#bias"


def _vector_targets(key: str, size: int) -> Iterator[tuple[str, slice]]:
    """The diffusers modules that a vector belongs to, with their part of it."""
    path, _, parameter = key.rpartition(".")
    parts = split_block(key)
    if parts is None:
        require(path in OUTSIDE, key, "belongs to no module")
        yield path, slice(None)
        return
    block, local = parts
    local = local.removesuffix(f".{parameter}")
    if parameter == "weight":
        require(local in {f"attn.{norm}" for norm in NORMS} and size == 128, key, "is no norm")
        yield path, slice(None)
        return
    if local in modulation_of(block):
        require(size == modulation_of(block)[local] * HIDDEN, key, "has size", size)
        yield path, slice(None)
        return
    found = [layer for layer in layers_of(block) if layer.bias and layer.vector == local]
    require(found and size == found[0].out, key, "belongs to no layer of", size)
    rows = size // len(found[0].modules)
    for number, module in enumerate(found[0].modules):
        yield f"{block}.{module}", slice(number * rows, (number + 1) * rows)


def _trimmed(down: np.ndarray, up: np.ndarray) -> LowRank | None:
    """Without the ranks that add nothing, such as padding and the other parts of a block-diagonal up."""
    used = np.flatnonzero(up.any(axis=0) & down.any(axis=1))
    return LowRank(down[used], up[:, used], 1.0) if used.size else None


def _in_columns(term: LowRank, column: int) -> LowRank:
    """A part of diffusers' proj_out, which reads attention and mlp side by side."""
    down = np.zeros((term.down.shape[0], HIDDEN + MLP), term.down.dtype)
    down[:, column : column + term.down.shape[1]] = term.down
    return replace(term, down=down)


def deltas_of_native(path: str | Path, base: Base | str | Path) -> Reference:
    return Native(path, base).deltas()
