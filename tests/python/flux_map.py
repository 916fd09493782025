"""FLUX.1 and Chroma module names, written by hand and apart from lorafmt's tables: one checks the other.

The original (BFL) transformer keeps q, k and v in one Linear, and in single blocks the MLP input as well;
diffusers has one Linear each. A source module therefore stands for one or more `Target`s: a diffusers module
and the rows of the source's output that it owns. Every name below is spelled with dots; trainers that join
with underscores are found through `FLATTENED`, which is made from the same names, so that no underscore is
ever guessed back.
"""

from __future__ import annotations

from dataclasses import dataclass

HIDDEN, MLP, DOUBLE, SINGLE = 3072, 12288, 19, 38
CLIP_HIDDEN, CLIP_MLP, CLIP_LAYERS = 768, 3072, 12
T5_HIDDEN, T5_MLP, T5_BLOCKS = 4096, 10240, 24
GUIDANCE_HIDDEN, GUIDANCE_LAYERS = 5120, 5


@dataclass(frozen=True)
class Target:
    """A diffusers module (component first) and the rows of the source module's output that belong to it."""

    module: str
    start: int = 0
    stop: int | None = None
    swap_halves: bool = False


SHAPES: dict[str, tuple[int, int | None]] = {}
"""Diffusers module -> (out, in); in is None where published files differ (x_embedder: 64, 128 or 384)."""
TRANSFORMER: dict[str, list[Target]] = {}
"""Every transformer module path in any dotted vocabulary -> what it stands for in diffusers."""
TEXT_ENCODERS: dict[str, dict[str, str]] = {"text_encoder": {}, "text_encoder_2": {}}
"""Component -> dotted path -> diffusers module."""
NORMS: dict[str, str] = {}
"""Norm parameter paths (without `.scale` or `.weight`) -> diffusers module."""
WIDE_INPUTS = (64, 128, 384)


def _module(path: str, out: int, in_: int | None) -> str:
    name = f"transformer.{path}"
    SHAPES[name] = (out, in_)
    TRANSFORMER[path] = [Target(name)]
    return name


def _split(source: str, modules: list[str], numbered: bool = False) -> None:
    """A fused source module, and at times the numbered slices that OneTrainer writes for it."""
    start = 0
    targets = []
    for number, module in enumerate(modules):
        stop = start + SHAPES[module][0]
        targets.append(Target(module, start, stop))
        if numbered:
            TRANSFORMER[f"{source}.{number}"] = [Target(module)]
        start = stop
    TRANSFORMER[source] = targets


def _alias(source: str, module: str, swap_halves: bool = False) -> None:
    TRANSFORMER[source] = [Target(module, swap_halves=swap_halves)]


def _double_block(i: int) -> None:
    old, new = f"double_blocks.{i}", f"transformer_blocks.{i}"
    streams = (
        ("img", "1", ("to_q", "to_k", "to_v"), "to_out.0", "ff", "norm1", "norm"),
        (
            "txt",
            "2",
            ("add_q_proj", "add_k_proj", "add_v_proj"),
            "to_add_out",
            "ff_context",
            "norm1_context",
            "norm_added",
        ),
    )
    for stream, digit, qkv, out, ff, modulation, norm in streams:
        heads = [_module(f"{new}.attn.{leaf}", HIDDEN, HIDDEN) for leaf in qkv]
        proj = _module(f"{new}.attn.{out}", HIDDEN, HIDDEN)
        _split(f"{old}.{stream}_attn.qkv", heads, numbered=True)
        _split(f"{old}.processor.qkv_lora{digit}", heads)
        for source in (f"{old}.{stream}_attn.proj", f"{old}.processor.proj_lora{digit}"):
            _alias(source, proj)
        _alias(f"{old}.{stream}_mlp.0", _module(f"{new}.{ff}.net.0.proj", MLP, HIDDEN))
        _alias(f"{old}.{stream}_mlp.2", _module(f"{new}.{ff}.net.2", HIDDEN, MLP))
        _alias(f"{old}.{stream}_mod.lin", _module(f"{new}.{modulation}.linear", 6 * HIDDEN, HIDDEN))
        for source, leaf in (("query_norm", "q"), ("key_norm", "k")):
            name = f"{new}.attn.{norm}_{leaf}"
            NORMS[f"{old}.{stream}_attn.norm.{source}"] = NORMS[name] = f"transformer.{name}"


def _single_block(i: int) -> None:
    old, new = f"single_blocks.{i}", f"single_transformer_blocks.{i}"
    heads = [_module(f"{new}.attn.{leaf}", HIDDEN, HIDDEN) for leaf in ("to_q", "to_k", "to_v")]
    out = _module(f"{new}.proj_out", HIDDEN, HIDDEN + MLP)
    _split(f"{old}.linear1", [*heads, _module(f"{new}.proj_mlp", MLP, HIDDEN)], numbered=True)
    _split(f"{old}.processor.qkv_lora", heads)
    _alias(f"{old}.linear2", out)
    _alias(f"{old}.processor.proj_lora", out)
    _alias(f"{old}.modulation.lin", _module(f"{new}.norm.linear", 3 * HIDDEN, HIDDEN))
    for source, leaf in (("query_norm", "norm_q"), ("key_norm", "norm_k")):
        NORMS[f"{old}.norm.{source}"] = NORMS[f"{new}.attn.{leaf}"] = f"transformer.{new}.attn.{leaf}"


def _top_level() -> None:
    _alias("img_in", _module("x_embedder", HIDDEN, None))
    _alias("txt_in", _module("context_embedder", HIDDEN, 4096))
    for old, new, width in (
        ("time_in", "timestep_embedder", 256),
        ("guidance_in", "guidance_embedder", 256),
        ("vector_in", "text_embedder", 768),
    ):
        _alias(f"{old}.in_layer", _module(f"time_text_embed.{new}.linear_1", HIDDEN, width))
        _alias(f"{old}.out_layer", _module(f"time_text_embed.{new}.linear_2", HIDDEN, HIDDEN))
    _alias("final_layer.linear", _module("proj_out", 64, HIDDEN))
    # The original computes (shift, scale), diffusers (scale, shift).
    _alias("final_layer.adaLN_modulation.1", _module("norm_out.linear", 2 * HIDDEN, HIDDEN), swap_halves=True)


def _chroma_guidance() -> None:
    layer = "distilled_guidance_layer"
    wide = GUIDANCE_HIDDEN
    _module(f"{layer}.in_proj", wide, 64)
    _module(f"{layer}.out_proj", HIDDEN, wide)
    for i in range(GUIDANCE_LAYERS):
        _alias(f"{layer}.layers.{i}.in_layer", _module(f"{layer}.layers.{i}.linear_1", wide, wide))
        _alias(f"{layer}.layers.{i}.out_layer", _module(f"{layer}.layers.{i}.linear_2", wide, wide))
        NORMS[f"{layer}.norms.{i}"] = f"transformer.{layer}.norms.{i}"


def _text(component: str, path: str, out: int, in_: int) -> None:
    TEXT_ENCODERS[component][path] = f"{component}.{path}"
    SHAPES[f"{component}.{path}"] = (out, in_)


for _i in range(DOUBLE):
    _double_block(_i)
for _i in range(SINGLE):
    _single_block(_i)
_top_level()
FLUX_LINEARS = len(SHAPES)
_chroma_guidance()
for _i in range(CLIP_LAYERS):
    _layer = f"text_model.encoder.layers.{_i}"
    for _leaf in ("q_proj", "k_proj", "v_proj", "out_proj"):
        _text("text_encoder", f"{_layer}.self_attn.{_leaf}", CLIP_HIDDEN, CLIP_HIDDEN)
    _text("text_encoder", f"{_layer}.mlp.fc1", CLIP_MLP, CLIP_HIDDEN)
    _text("text_encoder", f"{_layer}.mlp.fc2", CLIP_HIDDEN, CLIP_MLP)
for _i in range(T5_BLOCKS):
    for _leaf in ("q", "k", "v", "o"):
        _text("text_encoder_2", f"encoder.block.{_i}.layer.0.SelfAttention.{_leaf}", T5_HIDDEN, T5_HIDDEN)
    for _leaf in ("wi_0", "wi_1"):
        _text("text_encoder_2", f"encoder.block.{_i}.layer.1.DenseReluDense.{_leaf}", T5_MLP, T5_HIDDEN)
    _text("text_encoder_2", f"encoder.block.{_i}.layer.1.DenseReluDense.wo", T5_HIDDEN, T5_MLP)


def _flatten(paths: dict) -> dict[str, str]:
    flat = {path.replace(".", "_"): path for path in paths}
    assert len(flat) == len(paths), "two module names are the same once flattened"
    return flat


shapes = {name: (out, WIDE_INPUTS if in_ is None else (in_,)) for name, (out, in_) in SHAPES.items()}
"""Diffusers module -> (out, every width of in), as the oracle asks for it."""

FLATTENED = {
    "transformer": _flatten(TRANSFORMER),
    "text_encoder": _flatten(TEXT_ENCODERS["text_encoder"]),
    "text_encoder_2": _flatten(TEXT_ENCODERS["text_encoder_2"]),
}
FLATTENED_NORMS = _flatten(NORMS)

# A flattened prefix is followed by a flattened path; some files double the underscore there, or end with one.
FLAT_PREFIXES = (
    ("lora_unet_", "transformer"),
    ("lora_transformer_", "transformer"),
    ("lycoris_", "transformer"),
    ("lora_te1_", "text_encoder"),
    ("lora_te2_", "text_encoder_2"),  # OneTrainer's T5; the CLIP-G of other families has no place in FLUX
    ("lora_te3_", "text_encoder_2"),
    ("lora_te_", "text_encoder"),
)
DOTTED_PREFIXES = (
    ("model.diffusion_model.", "transformer"),
    ("diffusion_model.", "transformer"),
    ("transformer.", "transformer"),
    ("text_encoders.clip_l.transformer.", "text_encoder"),
    ("text_encoders.t5xxl.transformer.", "text_encoder_2"),
    ("text_encoder_2.", "text_encoder_2"),
    ("text_encoder.", "text_encoder"),
    ("clip_l.", "text_encoder"),
    ("t5xxl.", "text_encoder_2"),
    ("", "transformer"),
)


def _look_up(component: str, path: str) -> list[Target] | None:
    if component != "transformer":
        module = TEXT_ENCODERS[component].get(path)
        return [Target(module)] if module else None
    if path in NORMS:
        return [Target(NORMS[path])]
    return TRANSFORMER.get(path)


def resolve(path: str) -> tuple[list[Target], str] | None:
    """What a module path (prefix and all) stands for, and the dotted path that alpha patterns see."""
    dotted = path.removeprefix("base_model.model.")
    for prefix, component in DOTTED_PREFIXES:
        if dotted.startswith(prefix) and (targets := _look_up(component, dotted[len(prefix) :])):
            return targets, dotted[len(prefix) :]
    for prefix, component in FLAT_PREFIXES:
        if not path.startswith(prefix):
            continue
        flat = path.removeprefix(prefix).strip("_")
        name = FLATTENED[component].get(flat)
        if name is None and component == "transformer":
            name = FLATTENED_NORMS.get(flat)
        if name and (targets := _look_up(component, name)):
            return targets, name
    return None
