"""Small FLUX.1 LoRA files and quantized bases, the same bytes everywhere: the inputs of the golden listings.

Files hold one or two blocks of each kind at their true widths. Numbers come from the raw words of a PCG64 generator
that is seeded by file and tensor name, by integer sums, one product in float32 and one rounding: no platform and no
version of numpy can disagree. The listing has the digest of every file.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from tensorfile import ITEM_SIZE, Planned, encode, save_planned

WIDTH, MLP = 3072, 12288
STREAMS = ("img", "txt")


# -------------------------------------------------------------------------------- numbers


def words(seed: int, name: str, count: int) -> np.ndarray:
    """The first 64-bit words of the stream that belongs to this name."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = np.random.PCG64()
    state = generator.state
    state["state"] = {"state": int.from_bytes(digest[:16], "little"), "inc": int.from_bytes(digest[16:], "little") | 1}
    generator.state = state
    return generator.random_raw(count)


def bell(seed: int, name: str, shape: tuple[int, ...], deviation: float) -> np.ndarray:
    """Nearly normal numbers: each the sum of the four 16-bit parts of a word, centred."""
    parts = words(seed, name, math.prod(shape)).view("<u2").reshape(-1, 4)
    sums = parts.astype(np.int32).sum(axis=1) - 2 * 65535
    return (sums.astype(np.float32) * np.float32(deviation * 3**0.5 / 65536)).reshape(shape)


# -------------------------------------------------------------------------------- adapters


@dataclass(frozen=True)
class Module:
    """A module of a file: its path in the file's vocabulary, and the output rows of each part if it is fused."""

    path: str
    in_: int
    out: int
    parts: tuple[int, ...] = ()


# What the four choices of layers add to each other: attention, mlp, modulation, and what is outside the blocks.
GROUPS = {"attn": 1, "attn-mlp": 2, "all": 3, "full": 4}


def original(double: int, single: int, groups: int) -> Iterator[Module]:
    for block in range(double):
        for stream in STREAMS:
            path = f"double_blocks.{block}.{stream}"
            yield Module(f"{path}_attn.qkv", WIDTH, 3 * WIDTH, (WIDTH,) * 3)
            yield Module(f"{path}_attn.proj", WIDTH, WIDTH)
            if groups > 1:
                yield Module(f"{path}_mlp.0", WIDTH, MLP)
                yield Module(f"{path}_mlp.2", MLP, WIDTH)
            if groups > 2:
                yield Module(f"{path}_mod.lin", WIDTH, 6 * WIDTH)
    for block in range(single):
        path = f"single_blocks.{block}"
        yield Module(f"{path}.linear1", WIDTH, 3 * WIDTH + MLP, (WIDTH, WIDTH, WIDTH, MLP))
        yield Module(f"{path}.linear2", WIDTH + MLP, WIDTH)
        if groups > 2:
            yield Module(f"{path}.modulation.lin", WIDTH, 3 * WIDTH)
    if groups > 3:
        yield Module("img_in", 64, WIDTH)
        yield Module("txt_in", 4096, WIDTH)
        for name, in_ in (("time_in", 256), ("vector_in", 768), ("guidance_in", 256)):
            yield Module(f"{name}.in_layer", in_, WIDTH)
            yield Module(f"{name}.out_layer", WIDTH, WIDTH)
        yield Module("final_layer.linear", WIDTH, 64)
        yield Module("final_layer.adaLN_modulation.1", WIDTH, 2 * WIDTH)


def diffusers(double: int, single: int, groups: int) -> Iterator[Module]:
    for block in range(double):
        path = f"transformer_blocks.{block}"
        for leaf in ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"):
            yield Module(f"{path}.attn.{leaf}", WIDTH, WIDTH)
        if groups > 1:
            for ff in ("ff", "ff_context"):
                yield Module(f"{path}.{ff}.net.0.proj", WIDTH, MLP)
                yield Module(f"{path}.{ff}.net.2", MLP, WIDTH)
        if groups > 2:
            for norm in ("norm1", "norm1_context"):
                yield Module(f"{path}.{norm}.linear", WIDTH, 6 * WIDTH)
    for block in range(single):
        path = f"single_transformer_blocks.{block}"
        for leaf in ("to_q", "to_k", "to_v"):
            yield Module(f"{path}.attn.{leaf}", WIDTH, WIDTH)
        if groups > 1:
            yield Module(f"{path}.proj_mlp", WIDTH, MLP)
            yield Module(f"{path}.proj_out", WIDTH + MLP, WIDTH)
        if groups > 2:
            yield Module(f"{path}.norm.linear", WIDTH, 3 * WIDTH)
    if groups > 3:
        yield Module("x_embedder", 64, WIDTH)
        yield Module("context_embedder", 4096, WIDTH)
        for name, in_ in (("timestep", 256), ("text", 768), ("guidance", 256)):
            yield Module(f"time_text_embed.{name}_embedder.linear_1", in_, WIDTH)
            yield Module(f"time_text_embed.{name}_embedder.linear_2", WIDTH, WIDTH)
        yield Module("proj_out", WIDTH, 64)
        yield Module("norm_out.linear", WIDTH, 2 * WIDTH)


def clip() -> Iterator[Module]:
    for layer in range(2):
        path = f"text_model_encoder_layers_{layer}"
        yield Module(f"{path}_self_attn_q_proj", 768, 768)
        yield Module(f"{path}_self_attn_out_proj", 768, 768)
        yield Module(f"{path}_mlp_fc1", 768, 3072)
        yield Module(f"{path}_mlp_fc2", 3072, 768)


def xlabs(double: int) -> Iterator[Module]:
    for block in range(double):
        for number in (1, 2):
            yield Module(f"double_blocks.{block}.processor.qkv_lora{number}", WIDTH, 3 * WIDTH)
            yield Module(f"double_blocks.{block}.processor.proj_lora{number}", WIDTH, WIDTH)


@dataclass(frozen=True)
class Lora:
    """What makes one adapter file; the fields are those of the listing."""

    dialect: str
    seed: int
    rank: int = 16
    ranks: tuple[int, ...] = ()
    """Ranks of the modules in turn, over `rank`."""
    alpha: float = 0.0
    dtype: str = "BF16"
    alpha_dtype: str = ""
    layers: str = "all"
    double: int = 1
    single: int = 1
    split_qkv: bool = False
    """Fused modules have an up factor that is block-diagonal over their parts, and a rank for each part."""
    equal_qkv: bool = False
    """q, k and v have one down factor."""
    text: bool = False
    tensors: dict[str, Planned] = field(default_factory=dict, compare=False, repr=False)

    def plan(self) -> dict[str, Planned]:
        {"kohya": self._kohya, "xlabs": self._xlabs}.get(self.dialect, self._diffusers)()
        return self.tensors

    def metadata(self) -> dict[str, str]:
        if self.dialect == "kohya":
            return {
                "ss_network_module": "networks.lora_flux",
                "ss_network_dim": str(self.rank),
                "ss_network_alpha": str(float(self.alpha)),
                "ss_base_model_version": "flux1",
            }
        if self.dialect == "aitoolkit":
            software = json.dumps({"name": "ai-toolkit"})
            return {"format": "pt", "name": "synthetic", "version": "1.0", "software": software}
        return {"format": "pt"}

    def _alpha(self, name: str, value: float) -> None:
        dtype = self.alpha_dtype or self.dtype
        self.tensors[f"{name}.alpha"] = Planned(dtype, (), lambda: encode(np.array(value, np.float32), dtype))

    def _pair(
        self, down: str, up: str, module: Module, rank: int, stream: str = "", diagonal: tuple[int, ...] = ()
    ) -> None:
        def make_down() -> bytes:
            return encode(bell(self.seed, stream or down, (rank, module.in_), 0.5 / module.in_**0.5), self.dtype)

        def make_up() -> bytes:
            values = bell(self.seed, up, (module.out, rank), 0.02)
            row, share = 0, rank // max(1, len(diagonal))
            for number, rows in enumerate(diagonal):
                values[row : row + rows, : number * share] = 0
                values[row : row + rows, (number + 1) * share :] = 0
                row += rows
            return encode(values, self.dtype)

        self.tensors[down] = Planned(self.dtype, (rank, module.in_), make_down)
        self.tensors[up] = Planned(self.dtype, (module.out, rank), make_up)

    def _kohya(self) -> None:
        for module in original(self.double, self.single, GROUPS[self.layers]):
            name = "lora_unet_" + module.path.replace(".", "_")
            diagonal = module.parts if self.split_qkv else ()
            times = max(1, len(diagonal))
            if not module.path.startswith("final_layer"):
                self._alpha(name, self.alpha * times)
            self._pair(f"{name}.lora_down.weight", f"{name}.lora_up.weight", module, self.rank * times, "", diagonal)
        for module in clip() if self.text else ():
            name = f"lora_te1_{module.path}"
            self._alpha(name, self.alpha)
            self._pair(f"{name}.lora_down.weight", f"{name}.lora_up.weight", module, self.rank)

    def _xlabs(self) -> None:
        for module in xlabs(self.double):
            self._pair(f"{module.path}.down.weight", f"{module.path}.up.weight", module, self.rank)

    def _diffusers(self) -> None:
        ranks = self.ranks or (self.rank,)
        for number, module in enumerate(diffusers(self.double, self.single, GROUPS[self.layers])):
            rank, stream = ranks[number % len(ranks)], ""
            head, _, leaf = module.path.rpartition(".")
            if self.equal_qkv and leaf in ("to_q", "to_k", "to_v"):
                rank, stream = self.rank, f"{head}.self"
            elif self.equal_qkv and leaf in ("add_q_proj", "add_k_proj", "add_v_proj"):
                rank, stream = self.rank, f"{head}.added"
            if self.dialect == "onetrainer":
                name = "lora_transformer_" + module.path.replace(".", "_")
                self._alpha(name, self.alpha)
                self._pair(f"{name}.lora_down.weight", f"{name}.lora_up.weight", module, rank, stream)
            else:
                name = f"transformer.{module.path}"
                self._pair(f"{name}.lora_A.weight", f"{name}.lora_B.weight", module, rank, stream)


# -------------------------------------------------------------------------------- bases

DOUBLE_LAYERS = {
    "qkv_proj": (WIDTH, 3 * WIDTH),
    "qkv_proj_context": (WIDTH, 3 * WIDTH),
    "out_proj": (WIDTH, WIDTH),
    "out_proj_context": (WIDTH, WIDTH),
    "mlp_fc1": (WIDTH, MLP),
    "mlp_fc2": (MLP, WIDTH),
    "mlp_context_fc1": (WIDTH, MLP),
    "mlp_context_fc2": (MLP, WIDTH),
}
SINGLE_LAYERS = {name: DOUBLE_LAYERS[name] for name in ("qkv_proj", "out_proj", "mlp_fc1", "mlp_fc2")}
NOISE_WORDS = 512


@dataclass(frozen=True)
class Base:
    """A base of 4-bit integers; behind a little noise its weights and scales are zeros."""

    seed: int
    rank: int = 32
    dtype: str = "BF16"
    double: int = 2
    single: int = 2
    tensors: dict[str, Planned] = field(default_factory=dict, compare=False, repr=False)

    def plan(self) -> dict[str, Planned]:
        for block in range(self.double):
            norms = ("norm_q", "norm_k", "norm_added_q", "norm_added_k")
            self._block(
                f"transformer_blocks.{block}", DOUBLE_LAYERS, ("norm1.linear", "norm1_context.linear"), 6, norms
            )
        for block in range(self.single):
            name = f"single_transformer_blocks.{block}"
            self._block(name, SINGLE_LAYERS, ("norm.linear",), 3, ("norm_q", "norm_k"))
        return self.tensors

    def metadata(self) -> dict[str, str]:
        return {"format": "pt", "quantization": "svdquant-int4", "rank": str(self.rank)}

    def _put(self, name: str, dtype: str, shape: tuple[int, ...], content: Callable[[], bytes]) -> None:
        self.tensors[name] = Planned(dtype, shape, content)

    def _noise(self, name: str, shape: tuple[int, ...], deviation: float = 0.02, mean: float = 0.0) -> None:
        def content() -> bytes:
            return encode(bell(self.seed, name, shape, deviation) + np.float32(mean), self.dtype)

        self._put(name, self.dtype, shape, content)

    def _codes(self, name: str, dtype: str, shape: tuple[int, ...]) -> None:
        self._put(name, dtype, shape, lambda: words(self.seed, name, NOISE_WORDS).astype("<u8").tobytes())

    def _block(
        self,
        block: str,
        layers: dict[str, tuple[int, int]],
        modulation: tuple[str, ...],
        splits: int,
        norms: tuple[str, ...],
    ) -> None:
        for layer, (in_, out) in layers.items():
            name = f"{block}.{layer}"
            self._codes(f"{name}.qweight", "I8", (out, in_ // 2))
            self._codes(f"{name}.wscales", self.dtype, (in_ // 64, out))
            self._noise(f"{name}.bias", (out,))
            self._noise(f"{name}.smooth", (in_,), 0.1, 1.0)
            self._noise(f"{name}.smooth_orig", (in_,), 0.1, 1.0)
            self._noise(f"{name}.lora_down", (in_, self.rank))
            self._noise(f"{name}.lora_up", (out, self.rank))
        for layer in modulation:
            name = f"{block}.{layer}"
            self._codes(f"{name}.qweight", "I32", (splits * WIDTH // 4, WIDTH // 2))
            self._codes(f"{name}.wscales", self.dtype, (WIDTH // 64, splits * WIDTH))
            self._codes(f"{name}.wzeros", self.dtype, (WIDTH // 64, splits * WIDTH))
            self._noise(f"{name}.bias", (splits * WIDTH,))
        for norm in norms:
            self._noise(f"{block}.{norm}.weight", (128,), 0.1, 1.0)


# -------------------------------------------------------------------------------- files


def write(path: Path, recipe: Lora | Base) -> None:
    """Wider types first, then by name, as the safetensors library sorts."""
    plan = recipe.plan()
    order = sorted(plan, key=lambda key: (-ITEM_SIZE[plan[key].dtype], key))
    save_planned(path, {key: plan[key] for key in order}, recipe.metadata())


def digest(path: Path) -> str:
    state = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            state.update(chunk)
    return state.hexdigest()


def make(folder: Path, name: str, entry: dict) -> Path:
    """Write the input of that name and make sure that it is the one of the listing."""
    fields = {key: tuple(value) if isinstance(value, list) else value for key, value in entry["recipe"].items()}
    path = folder / f"{name}.safetensors"
    write(path, Lora(**fields) if "dialect" in fields else Base(**fields))
    if digest(path) != entry["sha256"]:
        raise AssertionError(f"{name}: these are not the bytes that the listing was made from")
    return path
